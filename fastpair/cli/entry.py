"""Where the command line begins, and how it ends."""

from __future__ import annotations

import os
import signal
import sys

import click

from fastpair.cli.ending import end_by_signal, stop, stop_interrupted, stop_unheard
from fastpair.cli.shared import commands
from fastpair.errors import FastpairError


def main() -> None:
    """Run the command line; a FastpairError becomes one sentence and exit code 1."""
    use_wide_matrix_products()
    signal.signal(signal.SIGTERM, end_by_signal)
    try:
        commands(standalone_mode=False)
    except click.exceptions.Exit as leaving:
        sys.exit(leaving.exit_code)
    except click.Abort:
        stop_interrupted()
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        stop_interrupted()
    except BrokenPipeError:
        stop_unheard()
    except SystemExit:
        if type(sys.stdout).__name__.endswith("PacifyFlushWrapper"):  # click's way to say the same
            stop_unheard()
        raise
    except FastpairError as error:
        from fastpair.spooling import named

        stop(named(str(error)), 1)
    except MemoryError:
        stop("the machine has no memory left: give a smaller --memory or a smaller task", 1)


SKYLAKE_X = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}
"""What a CPU must have for the widest kernels of the OpenBLAS in NumPy's wheels."""


def use_wide_matrix_products() -> None:
    """Let OpenBLAS use AVX-512 where it takes a new CPU for an old one.

    It knows CPUs by their number, and takes a new one for a Haswell; what a CPU can do is in its
    flags. The widest kernels in NumPy's wheels are those of Skylake-X, which is also what OpenBLAS
    chooses itself where it knows the CPU. It must be told before NumPy is imported, and only in
    the process of the command; who has told it already is left alone.
    """
    if "OPENBLAS_CORETYPE" in os.environ or not sys.platform.startswith("linux"):
        return
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as info:
            flags = next((line for line in info if line.startswith("flags")), "").split()
    except OSError:
        return
    if set(flags) >= SKYLAKE_X:
        os.environ["OPENBLAS_CORETYPE"] = "SkylakeX"
