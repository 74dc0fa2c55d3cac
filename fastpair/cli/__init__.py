"""The command line: options are validated, a function of `fastpair.jobs` called, words printed.

Nothing heavy is imported before a command runs, so that ``fastpair --help`` answers at once.
"""

from __future__ import annotations

from fastpair.cli import (  # the commands add themselves
    completing,
    folding,
    learning,
    measuring,
    planning,
    scoring,
)
from fastpair.cli.entry import main, use_wide_matrix_products
from fastpair.cli.shared import commands

__all__ = [
    "commands",
    "completing",
    "folding",
    "learning",
    "main",
    "measuring",
    "planning",
    "scoring",
    "use_wide_matrix_products",
]
