"""Soft lookup on a GPU: the launches of attention.cu.

Everything here is asynchronous in one stream and allocates nothing but what it returns;
`fastpair.gpu_lookup` decides what is looked up when.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from fastpair.kernels import LINKS, PRECISIONS, Plan
from fastpair.kernels.gpu import (
    BASE_OPTIONS,
    NATURAL_LANES,
    THREADS,
    Runtime,
    pack_plan,
    read_source,
)
from fastpair.kernels.gpu_tiles import TILE, Block, pack_tiles

SOURCE = "attention.cu"

VALUE_COLUMNS = 64
"""Keys of a tile, and columns of values that a block of threads adds up."""

SPAN = 4096
"""Keys whose sums one block of threads adds up, whole tiles; spans are then added in order."""

ROOTED = ("negative_root", "negative_arcosh")
"""Links that make much of a tile's error near their end: there the pair kernel decides."""

LOOKUP = np.dtype([("span", "<i4"), ("width", "<i4"), ("factor", "<f4")], align=True)
"""The struct `Lookup` of attention.cu."""


def _options(link: str, near: bool, precision: str) -> tuple[str, ...]:
    """Compiler options; the precision matters where the pair kernel decides."""
    defined = {
        "FORM": 0,
        "OWN_COLUMNS": VALUE_COLUMNS // 16,
        "LINK": LINKS.index(link),
        "NEAR": int(near),
        "PRECISION": list(PRECISIONS).index(precision),
        "LANES": NATURAL_LANES[precision],
        "PRODUCTS_ONLY": 0,
        "UNROLL": 1,
    }
    return (*BASE_OPTIONS, *(f"-DFP_{name}={number}" for name, number in defined.items()))


_PLAIN = _options("identity", False, "float32")


def variants() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield (file, kernel, options) of everything that is ever compiled of these kernels."""
    for link in LINKS:
        if link not in ROOTED:
            yield SOURCE, "attend", _options(link, False, "float32")
        for precision in PRECISIONS:
            yield SOURCE, "attend", _options(link, True, precision)
    for name in ("combine_spans", "finish_means"):
        yield SOURCE, name, _PLAIN


class Sums:
    """What spans, or all keys so far, add up to for each query.

    Parameters
    ----------
    runtime : the device.
    shape : queries, or (spans, queries).
    width : columns of values.

    Attributes
    ----------
    greatest, sums : device arrays of the shape, float32: greatest scores, sums of weights.
    outputs : device array (*shape, width) float32: sums of weighted values.
    """

    def __init__(self, runtime: Runtime, shape: tuple[int, ...], width: int) -> None:
        self.greatest, self.sums = (runtime.empty(shape, np.float32) for _ in range(2))
        self.outputs = runtime.empty((*shape, width), np.float32)

    @staticmethod
    def query_bytes(width: int) -> int:
        """Bytes that a query takes."""
        return 4 * (2 + width)


class AttentionKernels:
    """Launches of attention.cu for one plan on one device.

    Parameters
    ----------
    runtime, stream : where they run.
    plan : the plan of queries and keys.
    factor : what a linked score without offset and slope is multiplied by, to become the exponent
        of a power of two.
    width : columns of values.
    span : keys of a span, whole tiles; results depend on it by rounding.
    """

    def __init__(
        self,
        runtime: Runtime,
        stream: Any,
        plan: Plan,
        *,
        factor: np.float32,
        width: int,
        span: int = SPAN,
    ) -> None:
        self.runtime, self.stream, self.plan, self.span, self.width = (
            *(runtime, stream, plan),
            *(span, width),
        )
        self._lookup = np.zeros(1, LOOKUP)
        self._lookup[0] = span, width, factor
        self._layout, constants = pack_plan(plan)
        self._unscaled = constants.copy()
        self._unscaled["slope"], self._unscaled["offset"] = 1, 0

    def _kernel(self, name: str, options: tuple[str, ...] = _PLAIN) -> Any:
        return self.runtime.kernel(read_source(SOURCE), name, options)

    @property
    def column_tiles(self) -> int:
        """Blocks of threads that a tile of queries and a span of keys take."""
        return -(-self.width // VALUE_COLUMNS)

    def attend(
        self, block: Block, rows: tuple[Any, Any], slack: Any, values: Any, near: bool, found: Sums
    ) -> None:
        """Fill the sums (spans, queries) of a block's keys.

        Parameters
        ----------
        block : queries as left and keys as right rows; keys begin at a multiple of the span.
        rows : device arrays of the table rows of both sides of the block, whole.
        slack : device array, by left row of the side: how far its tiles are from the pair kernel.
        values : device array (right rows of the side, width) float32.
        near : whether the pair kernel decides where tiles are not near enough to it.
        found : filled; (spans of the block, its left rows).
        """
        left, right = block.left, block.right
        here, there = slice(block.low, block.high), slice(block.start, block.stop)
        tiles = pack_tiles(block, self.plan, "float32")
        spans = -(-(block.stop - block.start) // self.span)
        precision = self.plan.precision if near else "float32"
        kernel = self._kernel("attend", _options(self.plan.link, near, precision))
        grid = -(-(block.high - block.low) // TILE) * self.column_tiles, spans
        sides = left.words[here], left.bias[here], right.words[there], right.bias[there]
        exact = rows[0][here], rows[1][there], slack[here], self._layout, self._unscaled
        sums = found.greatest, found.sums, found.outputs
        arguments = (*sides, tiles, *exact, values[there], self._lookup, *sums)
        kernel(grid, (THREADS,), arguments, self.stream)

    def combine(self, found: Sums, spans: int, queries: int, begin: bool, state: Sums) -> None:
        """Add spans, in order, to the state (queries,); `begin`: there was nothing before."""
        numbers = np.int32(spans), np.int64(queries), self._lookup, np.int32(begin)
        arguments = (
            *(found.greatest, found.sums, found.outputs, *numbers),
            *(state.greatest, state.sums, state.outputs),
        )
        grid = (-(-queries * 32 // THREADS),)
        self._kernel("combine_spans")(grid, (THREADS,), arguments, self.stream)

    def finish(self, state: Sums, queries: int, scale: np.float32) -> None:
        """Turn the outputs of a state into means, times `scale`; NaN where a query has no key."""
        numbers = np.int64(queries), np.int32(self.width), np.float32(scale)
        grid = (-(-queries * self.width // THREADS),)
        arguments = (state.sums, state.outputs, *numbers)
        self._kernel("finish_means")(grid, (THREADS,), arguments, self.stream)
