"""fastpair: learn how similar two things are from good and bad pairs, then score by the million."""

from typing import Any

__all__ = ["lookup"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: it needs compiled kernels."""
    if name == "lookup":
        from fastpair.attention import lookup

        return lookup
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
