"""What a GPU can do at most: launchers of the probes in ``limits.cu``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from fastpair.kernels.gpu import BASE_OPTIONS, THREADS, Kernel, Runtime, read_source

SOURCE = "limits.cu"
NAMES = ("copy_vectors", "gather_rows", "multiply_add", "matrix_product")

BLOCKS = 2112
"""Blocks of a launch: some for each multiprocessor of the largest devices."""

OPERATIONS = {"multiply_add": 2 * 8 * THREADS, "matrix_product": 4 * 4096 * (THREADS // 32)}
"""Operations of a block and round: a multiply-add is two, a product of matrices 2 x 16 x 16 x 8."""


def variants() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield (source, kernel, options) of everything that this room compiles."""
    for name in NAMES:
        yield SOURCE, name, BASE_OPTIONS


def _kernel(runtime: Runtime, name: str) -> Kernel:
    return runtime.kernel(read_source(SOURCE), name, BASE_OPTIONS)


def copy_vectors(
    runtime: Runtime, source: Any, target: Any, stream: Any, *, blocks: int = BLOCKS
) -> None:
    """Copy device bytes (n,) uint8, n a multiple of 16, asynchronously."""
    arguments = source, target, np.int64(source.nbytes // 16)
    _kernel(runtime, "copy_vectors")((blocks,), (THREADS,), arguments, stream)


def gather_rows(
    runtime: Runtime, rows: Any, order: Any, sink: Any, stream: Any, *, blocks: int = BLOCKS
) -> None:
    """Read rows (n, row_bytes) uint8 in the order (m,) int32; nothing is kept.

    `sink` is a device array (1,) uint32.
    """
    arguments = rows, order, sink, np.int64(len(order)), np.int32(rows.shape[1] // 64)
    _kernel(runtime, "gather_rows")((blocks,), (THREADS,), arguments, stream)


def multiply_add(
    runtime: Runtime, sink: Any, rounds: int, stream: Any, *, blocks: int = BLOCKS
) -> int:
    """Do float32 multiply-adds in registers; return how many operations these are."""
    arguments = sink, np.int32(rounds), np.float32(0.5), np.float32(0.25)
    _kernel(runtime, "multiply_add")((blocks,), (THREADS,), arguments, stream)
    return OPERATIONS["multiply_add"] * rounds * blocks


def matrix_product(
    runtime: Runtime, sink: Any, rounds: int, stream: Any, *, blocks: int = BLOCKS
) -> int:
    """Do bfloat16 products of matrices in registers; return how many operations these are."""
    arguments = sink, np.int32(rounds), np.uint32(0x3F803F80)
    _kernel(runtime, "matrix_product")((blocks,), (THREADS,), arguments, stream)
    return OPERATIONS["matrix_product"] * rounds * blocks
