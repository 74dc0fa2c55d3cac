"""Compiles what ``fastpair bench`` calls, in two processes at once, before anything is measured.

Numba compiles on one core, and half a minute of a cold run of ``fastpair bench`` would be that.
Processes leave machine code in the cache, from which the one that measures loads it.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from fastpair.agreement import agreement, backends, cases
from fastpair.bench_figures import FIGURES, PRECISION_HEADS, Figure, folded, precision_errors
from fastpair.bench_works import BEST, MEMORY
from fastpair.kernels import PRECISIONS

ROWS, COLUMNS = 2000, 40
"""Of tables that are made to have kernels called."""

SHARES = (
    ("top-k", "threshold", "max", "sqdiff", "float32", "bfloat16"),
    ("pairs", "cosine", "absdiff", "float16", "int8"),
)
"""Works and heads of figures, and precisions of agreement, whose kernels one process compiles.

They take about equally long. More processes would end little sooner: most kernels of a precision
are compiled for all that compare it.
"""

PROGRAM = "from fastpair.bench_compile import compile_share; compile_share({})"

CHECKED_EVERY = 0.02
"""Seconds between looks at whether processes have ended."""


def compile_kernels(deadline: float) -> bool:
    """Have kernels compiled that are not in the cache, until a time of `time.perf_counter`.

    What is under way then is stopped, and goes on in the next run. A process that fails is no
    matter here: what it would have compiled is compiled, or fails with a message, where it is
    measured. Nothing is done where no folder can be a cache.

    Returns
    -------
    complete : whether nothing is left to be compiled.
    """
    if _mark("") is None:
        return False
    todo = [n for n, names in enumerate(SHARES) if not all(map(compiled, names))]
    quiet = subprocess.DEVNULL
    running = [
        subprocess.Popen([sys.executable, "-c", PROGRAM.format(n)], stdout=quiet, stderr=quiet)
        for n in todo
    ]
    try:
        while any(one.poll() is None for one in running):
            if time.perf_counter() > deadline:
                return False
            time.sleep(CHECKED_EVERY)
    finally:
        for one in running:
            one.kill()
            one.wait()
    return True


def compile_share(number: int) -> None:
    """Call every kernel of a share once, but for those that are compiled."""
    for name in SHARES[number]:
        if compiled(name):
            continue
        if name in PRECISION_HEADS:
            precision_errors(name, COLUMNS, ROWS, ROWS)
        elif name in PRECISIONS:
            agreement(backends("cpu"), cases(precisions=[name]))
        for figure in FIGURES:
            if figure.work == name:
                call(figure)
        if (mark := _mark(name)) is not None:
            mark.touch()


def compiled(name: str) -> bool:
    """Return whether the kernels of a part of `SHARES` are in the cache."""
    mark = _mark(name)
    return mark is not None and mark.exists()


def _mark(name: str) -> Path | None:
    """Return the file that says so, in the folder of the cache.

    Numba keeps machine code for each processor and for each place where sources lie.
    """
    from fastpair.kernels import simd

    folder = simd.cache_folder()
    if folder is None:
        return None
    kept_for = f"{simd.cpu_features()} {simd.__file__}"
    return folder / f"bench-{hashlib.sha256(kept_for.encode()).hexdigest()[:16]}-{name}"


def call(figure: Figure) -> None:
    """Do the work of a figure once, on a small table."""
    from fastpair.matrix import all_pairs
    from fastpair.scoring import PairScorer

    rows, plan = folded(figure, (ROWS, COLUMNS), 0, 1)
    if figure.work == "pairs":
        ends = np.arange(ROWS, dtype=np.int32)
        PairScorer(rows, plan, threads=1)(ends, ends[::-1])
        return
    walk = all_pairs(rows, None, plan, threads=1, memory=MEMORY)
    for _ in walk.top_k(BEST) if figure.work == "top-k" else walk.above(0.0):
        pass
