"""How a run ends early: signals, a closed pipe, one sentence, the exit code."""

from __future__ import annotations

import os
import signal
import sys
from itertools import pairwise

import click

GOES_ON = "; --resume goes on where it stopped"
"""What to say after an interruption that leaves something to go on with."""


def stop_interrupted() -> None:
    """End after a signal; what no resume needs is removed."""
    if staging := sys.modules.get("fastpair.staging"):
        staging.remove_exports()
    stop("interrupted" + going_on(), 128 + _ended_by)


def stop_unheard() -> None:
    """End where whoever read standard output is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # type: ignore[union-attr]
    stop("standard output was closed before everything was printed", 1)


_ended_by: int = signal.SIGINT
"""The signal that ended the process, if one did."""


def end_by_signal(number: int, _frame: object) -> None:
    """Let a signal end the process as Ctrl-C does: what is of no use to a resume is removed."""
    global _ended_by
    _ended_by = number
    raise KeyboardInterrupt


def going_on() -> str:
    """What to say of work that is left, if some is."""
    words = sys.argv[1:]
    if not words or words[0] not in ("score", "matrix", "project"):
        return ""
    outputs = [b for a, b in pairwise(words) if a in ("-o", "--output")]
    outputs += [word.partition("=")[2] for word in words if word.startswith("--output=")]
    left = [f"{output}.parts" for output in outputs]
    if words[0] != "project":  # which begins anew without a cluster
        left += [f"{output}.partial" for output in outputs]
    return GOES_ON if any(map(os.path.exists, left)) else ""


def stop(sentence: str, code: int) -> None:
    """End the process with a sentence on standard error."""
    click.echo(f"fastpair: {sentence}", err=True)
    sys.exit(code)


def interrupted_code() -> int:
    """Return the exit code of a process that a signal ended."""
    return 128 + _ended_by
