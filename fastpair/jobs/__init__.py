"""The commands as functions: files in, files out, a summary of plain numbers and words back.

Each function is what one command of ``fastpair`` calls. Summaries hold only what JSON can hold;
``notes`` are sentences for the reader. ``progress`` is called with numbers of pairs or rows done
and ``expect`` with how many there are. A room of this package is imported when one of its
functions is first asked for, so that a command loads no more than it runs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastpair.jobs.all_pairs import matrix
    from fastpair.jobs.folding import convert, features, project
    from fastpair.jobs.information import info
    from fastpair.jobs.learning import train
    from fastpair.jobs.measuring import evaluate
    from fastpair.jobs.scoring import score

ROOMS = {
    "convert": "folding",
    "evaluate": "measuring",
    "features": "folding",
    "info": "information",
    "matrix": "all_pairs",
    "project": "folding",
    "score": "scoring",
    "train": "learning",
}
"""Where each function is."""

__all__ = ["convert", "evaluate", "features", "info", "matrix", "project", "score", "train"]


def __getattr__(name: str) -> Any:
    if name not in ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastpair.jobs.{ROOMS[name]}"), name)
