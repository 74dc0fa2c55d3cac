"""fastpair: learn how similar two things are from good and bad pairs, then score by the million."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastpair.attention import lookup
    from fastpair.estimator import PairSimilarity
    from fastpair.functions import (
        above_threshold,
        entity_groups,
        fold,
        pairwise,
        score_pairs,
        top_k,
    )

__all__ = [
    "PairSimilarity",
    "above_threshold",
    "entity_groups",
    "fold",
    "lookup",
    "pairwise",
    "score_pairs",
    "top_k",
]

_ROOMS = {"lookup": "attention", "PairSimilarity": "estimator"}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: it needs compiled kernels or scikit-learn.

    The version is that of the installed package, which has it from pyproject.toml.
    """
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(f"fastpair.{_ROOMS.get(name, 'functions')}"), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("fastpair")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
