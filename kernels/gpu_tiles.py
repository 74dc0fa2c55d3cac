"""All pairs on a GPU: operands there, and the launches that walk tiles and keep what is wanted.

Everything here is asynchronous in one stream and allocates nothing on the device but what it
returns; `fastpair.gpu_matrix` decides what is walked when. Lists of pairs hold rows of tables on
the device, int32; keys name right rows of the whole table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastpair.kernels import LINKS, Plan
from fastpair.kernels.gpu import BASE_OPTIONS, THREADS, Runtime, pack_plan, read_source
from fastpair.kernels.operands import (
    Panels,
    make_operand,
    operand_counts,
    pack_bfloat16,
    row_norms,
    split_bound,
)

TILE = 128
"""Rows and columns of the tile of a block of threads."""

FORMS = {"float32": 1, "bfloat16": 2}
"""What a word of the product columns holds -> how many of them."""

KEEPS = ("dense", "hits", "best", "range", "histogram")
"""What may become of a tile, by number."""

CAPACITIES = (1024, 2048, 4096)
"""Candidates that a row may have: what `keep_best` sorts in shared memory."""

MOST_KEPT = CAPACITIES[-1] // 2
"""The greatest k for which candidates are kept instead of whole rows."""

SELECT_KERNELS = (
    "keep_best",
    "forget_appended",
    "begin_rows",
    "list_candidates",
    "rescore_candidates",
    "gather_best",
    "list_rows",
    "offer_scores",
    "lay_keys",
    "sort_step",
    "put_scores",
)
"""Kernels of select.cu; the capacity matters to `keep_best` alone."""

_UNIT_ROUNDOFF = 2.0**-24
_MOST_BLOCKS = (1 << 31) - 1


def _tile_options(form: str, keep: str, link: int) -> tuple[str, ...]:
    wanted = {"FORM": list(FORMS).index(form), "KEEP": KEEPS.index(keep), "LINK": link}
    return (*BASE_OPTIONS, *(f"-DFP_{name}={number}" for name, number in wanted.items()))


def _select_options(capacity: int) -> tuple[str, ...]:
    return (*BASE_OPTIONS, f"-DFP_CAPACITY={capacity}")


def variants() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield (file, kernel, options) of everything that is ever compiled of these kernels."""
    for keep in KEEPS:
        for form in FORMS if keep in ("hits", "best") else ("float32",):
            for link in range(len(LINKS)) if keep == "dense" else (0,):
                yield "tiles.cu", "walk_tiles", _tile_options(form, keep, link)
    for name in SELECT_KERNELS:
        for capacity in CAPACITIES if name == "keep_best" else CAPACITIES[:1]:
            yield "select.cu", name, _select_options(capacity)


# --- operands ------------------------------------------------------------------------------------


@dataclass
class Operands:
    """One side of a walk on the host, rows one after another.

    Parameters
    ----------
    words : (n, words) uint32: product columns, one or two to a word, then maxima to add, then
        maxima to subtract, float32.
    bias : (n,) float32.
    bounds : what bounds the error of its tiles; it holds no words.
    """

    words: np.ndarray
    bias: np.ndarray
    bounds: Panels

    def raise_biases(self, bound: np.ndarray) -> None:
        """Add a bound (n,) to the biases, rounded up: tiles then tell upper bounds.

        Rows whose bound is infinite lose their columns, which might take that infinity off again.
        """
        with np.errstate(over="ignore"):
            self.bias = np.nextafter(self.bias + bound, np.float32(np.inf))
        self.words[np.isposinf(self.bias)] = 0


def row_words(plan: Plan, form: str) -> int:
    """Return the words of a row of operands."""
    products, plus, minus = operand_counts(plan)
    return products // FORMS[form] + plus + minus


def empty_operands(count: int, plan: Plan, form: str, side: str) -> Operands:
    """Return operands of `count` rows, to be filled by `pack_operands`."""
    bounds = Panels(np.empty((0, 0), np.float32), form, side, *np.zeros((5, count)))
    words = np.empty((count, row_words(plan, form)), np.uint32)
    return Operands(words, np.empty(count, np.float32), bounds)


def pack_operands(
    operands: Operands, first: int, rows: np.ndarray, plan: Plan, shifts: dict[str, np.ndarray]
) -> None:
    """Fill operands from row `first` on with rows of a table; `shifts` as `column_shifts`."""
    bounds = operands.bounds
    operand = make_operand(rows, plan, bounds.side, shifts)
    here = slice(first, first + len(rows))
    bounds.size[here], bounds.length[here] = operand.size, operand.length
    products, maxima = np.split(operand.columns, [operand.counts[0]], axis=1)
    words = np.ascontiguousarray(products).view(np.uint32)
    if bounds.form == "bfloat16":
        words, _, _, bounds.error[here] = pack_bfloat16(products, bounds.side)
        bounds.norm[here] = row_norms(products)
        bounds.error[here] += 4 * _UNIT_ROUNDOFF * bounds.norm[here]  # that of finding the error
    operands.bias[here] = operand.bias
    operands.words[here, : words.shape[1]] = words
    operands.words[here, words.shape[1] :] = np.ascontiguousarray(maxima).view(np.uint32)


def split_tile_bound(side: Panels, other: Panels, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Return (n,) and (n',) float32 whose sums bound how far tiles are from the pair kernel.

    Those of `operands.split_bound`; tensor cores add 8 products and a sum at a time, aligned to
    the greatest and cut to its 24 bits, and cut the result: 10 units in the last place of the sum
    of sizes, 20 unit roundoffs, for 8 columns (Fasi, Higham, Mikaitis and Pranesh, Numerical
    behavior of NVIDIA tensor cores, PeerJ Computer Science 7:e330, 2021).
    """
    parts = split_bound(side, other, plan)
    if side.form != "bfloat16":
        return parts
    unit = 2.5 * operand_counts(plan)[0] * _UNIT_ROUNDOFF
    length = other.length.max(initial=0)
    more = unit * (abs(plan.constant) + side.size + side.length * length), unit * other.size
    with np.errstate(over="ignore"):
        own, others = (
            np.nextafter((part + extra).astype(np.float32), np.float32(np.inf))
            for part, extra in zip(parts, more, strict=True)
        )
    return own, others


# --- on the device -------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeviceSide:
    """Operands on a device.

    Parameters
    ----------
    words, bias : device arrays, as `Operands`.
    first : the table row of their first row.
    """

    words: Any
    bias: Any
    first: int


@dataclass(frozen=True)
class Block:
    """Left rows [low, high) of one side against right rows [start, stop) of another.

    Parameters
    ----------
    left, right : both sides; their rows are those of the tables on the device.
    low, high, start, stop : rows within the sides.
    one_table : 0 two tables; 1 one, whose pairs (i, i) are left out; 2 only columns above rows.
    """

    left: DeviceSide
    right: DeviceSide
    low: int
    high: int
    start: int
    stop: int
    one_table: int

    @property
    def empty(self) -> bool:
        """Whether a triangle has nothing to say here."""
        last = self.right.first + self.stop - 1
        return self.one_table == 2 and last < self.left.first + self.low

    def cut(self, rows: tuple[int, int], columns: tuple[int, int]) -> Block:
        """The block with other ends: low and high, start and stop."""
        return replace(self, low=rows[0], high=rows[1], start=columns[0], stop=columns[1])

    def halves(self) -> list[Block]:
        """The block in two, its longer side cut."""
        if self.stop - self.start >= self.high - self.low:
            middle = (self.start + self.stop) // 2
            return [replace(self, stop=middle), replace(self, start=middle)]
        middle = (self.low + self.high) // 2
        return [replace(self, high=middle), replace(self, low=middle)]

    def parts(self) -> Iterator[Block]:
        """The block, or several where a grid has not enough tiles for it."""
        tiles = -(-(self.high - self.low) // TILE) * -(-(self.stop - self.start) // TILE)
        if tiles <= _MOST_BLOCKS:
            yield self
        else:
            for half in self.halves():
                yield from half.parts()


_TILES = np.dtype(
    [
        ("left_first", "<i8"),
        ("right_first", "<i8"),
        ("left_start", "<i4"),
        ("right_start", "<i4"),
        ("left_count", "<i4"),
        ("right_count", "<i4"),
        ("row_words", "<i4"),
        ("products", "<i4"),
        ("plus", "<i4"),
        ("minus", "<i4"),
        ("row_tiles", "<i4"),
        ("column_tiles", "<i4"),
        ("one_table", "<i4"),
        ("constant", "<f4"),
    ],
    align=True,
)
"""The struct `Tiles` of tile.cuh."""


def pack_tiles(block: Block, plan: Plan, form: str) -> np.ndarray:
    """Return the struct `Tiles` of a block, an array of one element."""
    products, plus, minus = operand_counts(plan)
    rows, columns = block.high - block.low, block.stop - block.start
    tiles = np.zeros(1, _TILES)
    tiles[0] = (
        block.left.first + block.low,
        block.right.first + block.start,
        block.low,
        block.start,
        rows,
        columns,
        row_words(plan, form),
        products // FORMS[form],
        plus,
        minus,
        -(-rows // TILE),
        -(-columns // TILE),
        block.one_table,
        np.float32(plan.constant),
    )
    return tiles


class PairList:
    """Pairs that tiles list for the pair kernel.

    Parameters
    ----------
    runtime : the device.
    capacity : pairs that it holds.

    Attributes
    ----------
    rows, columns, scores : device arrays (capacity,) int32, int32, float32.
    count : device array (1,) uint64; it goes on counting past the capacity.
    first_bad : device array (1,) uint64 that the pair kernel asks for.
    """

    PAIR_BYTES = 12

    def __init__(self, runtime: Runtime, capacity: int) -> None:
        self.capacity = capacity
        self.rows = runtime.empty(capacity, np.int32)
        self.columns = runtime.empty(capacity, np.int32)
        self.scores = runtime.empty(capacity, np.float32)
        self.count, self.first_bad = (runtime.empty(1, np.uint64) for _ in range(2))

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The list as kernels take it."""
        return self.rows, self.columns, self.count, np.uint64(self.capacity)


class TileKernels:
    """Launches of `tiles.cu` for one plan on one device.

    Parameters
    ----------
    runtime, stream : where they run.
    plan : the plan of both sides.
    form : a name of `FORMS`.
    """

    def __init__(self, runtime: Runtime, stream: Any, plan: Plan, form: str) -> None:
        self.runtime, self.stream, self.plan, self.form = runtime, stream, plan, form

    def _launch(self, keep: str, block: Block, *arguments: Any) -> None:
        link = self.plan.link_code if keep == "dense" else 0
        options = _tile_options(self.form, keep, link)
        kernel = self.runtime.kernel(read_source("tiles.cu"), "walk_tiles", options)
        for part in block.parts():
            tiles = pack_tiles(part, self.plan, self.form)
            left, right = part.left, part.right
            sides = (
                left.words[part.low : part.high],
                left.bias[part.low : part.high],
                right.words[part.start : part.stop],
                right.bias[part.start : part.stop],
            )
            grid = int(tiles["row_tiles"][0]) * int(tiles["column_tiles"][0])
            kernel((grid,), (THREADS,), (*sides, tiles, *arguments), self.stream)

    def hits(self, block: Block, floor: np.float32, found: PairList) -> None:
        """Add the pairs of a block whose value reaches a floor to a list."""
        self._launch("hits", block, floor, *found.arguments)

    def best(self, block: Block, best: Candidates) -> None:
        """Add the pairs of a block that are above their row's floor to its candidates."""
        arrays = best.floors, best.counts, best.keys, np.int32(best.capacity), best.overflow
        self._launch("best", block, *arrays)

    def dense(
        self, block: Block, slack: tuple[Any, Any], scores: Any, pitch: int, near: PairList
    ) -> None:
        """Write the scores of a block at ``scores[row * pitch + column]``, numbers of the sides.

        `slack` (left rows,) and (right rows,) of both sides say where the pair kernel decides: such
        pairs are listed.
        """
        slacks = slack[0][block.low : block.high], slack[1][block.start : block.stop]
        self._launch(
            "dense",
            block,
            *slacks,
            pack_plan(self.plan)[1],
            scores,
            np.int64(pitch),
            *near.arguments,
        )

    def range(self, block: Block, ends: Any) -> None:
        """Widen ``ends``, a device array (2,) uint32 of `ordered` numbers, to a block."""
        self._launch("range", block, ends)

    def histogram(
        self,
        block: Block,
        cells: Any,
        grid: tuple[np.float32, np.float32],
        counts: Any,
        unclear: PairList,
    ) -> None:
        """Count the raw scores of a block in bins; list those whose cell is -1."""
        size, bins = (np.int32(array.shape[0]) for array in (cells, counts))
        self._launch("histogram", block, cells, size, *grid, counts, bins, *unclear.arguments)


class Candidates:
    """What may be among the best of some left rows, on the device.

    Parameters
    ----------
    runtime, stream : where they lie.
    rows : number of rows.
    capacity : candidates of a row, one of `CAPACITIES`.
    """

    def __init__(self, runtime: Runtime, stream: Any, rows: int, capacity: int) -> None:
        self.runtime, self.stream, self.rows, self.capacity = runtime, stream, rows, capacity
        self.keys = runtime.empty((rows, capacity), np.uint64)
        self.counts, self.kept = (runtime.empty(rows, np.uint32) for _ in range(2))
        self.floors = runtime.empty(rows, np.float32)
        self.overflow = runtime.empty(1, np.uint32)
        self._launch("begin_rows", rows, self.counts, self.kept, self.floors, np.int64(rows))

    @staticmethod
    def row_bytes(capacity: int) -> int:
        """Bytes that a row takes."""
        return 8 * capacity + 12

    def _launch(self, name: str, threads: int, *arguments: Any) -> None:
        launch_select(self.runtime, self.stream, name, threads, *arguments, capacity=self.capacity)

    def cut(self, first: int, last: int) -> Candidates:
        """The candidates of some of the rows; both share the device's arrays."""
        part = object.__new__(Candidates)
        part.__dict__.update(self.__dict__)
        part.rows = last - first
        for name in ("keys", "counts", "kept", "floors"):
            setattr(part, name, getattr(self, name)[first:last])
        return part

    def clear_overflow(self) -> None:
        """Say that no row is without room."""
        self.runtime.fill(self.overflow, 0, self.stream)

    def keep(self, count: int, every: bool = False) -> None:
        """Keep the best `count` of each row, and raise floors; sort `every` row, or full ones."""
        arrays = self.keys, self.counts, self.kept, self.floors
        numbers = np.int32(count), np.int32(every)
        self._launch("keep_best", self.rows * THREADS, *arrays, *numbers)

    def forget(self) -> None:
        """Forget what was added since `keep`."""
        self._launch("forget_appended", self.rows, self.counts, self.kept, np.int64(self.rows))

    def list(self, count: int, left_start: int, columns: range, pairs: PairList) -> None:
        """List `count` candidates of each row as pairs with the right rows `columns`."""
        numbers = np.int64(self.rows), np.int32(self.capacity), np.int32(count)
        ends = np.int32(left_start), np.int64(columns.start), np.int64(columns.stop)
        arguments = self.keys, self.counts, *numbers, *ends, pairs.rows, pairs.columns
        self._launch("list_candidates", self.rows * count, *arguments)

    def rescore(self, count: int, columns: range, pairs: PairList) -> None:
        """Put the scores of `list` into the keys."""
        numbers = np.int64(self.rows), np.int32(self.capacity), np.int32(count)
        ends = np.int64(columns.start), np.int64(columns.stop)
        arguments = self.keys, self.counts, *numbers, *ends, pairs.scores
        self._launch("rescore_candidates", self.rows * count, *arguments)

    def gather(self, count: int, best: Any) -> None:
        """Copy the first `count` keys of each row to `best` (rows, count) uint64; 0 for none."""
        numbers = np.int64(self.rows), np.int32(self.capacity), np.int32(count)
        self._launch("gather_best", self.rows * count, self.keys, self.counts, *numbers, best)


def launch_select(
    runtime: Runtime,
    stream: Any,
    name: str,
    threads: int,
    *arguments: Any,
    capacity: int = CAPACITIES[0],
) -> None:
    """Launch a kernel of `select.cu` with at least so many threads."""
    if threads:
        options = _select_options(capacity if name == "keep_best" else CAPACITIES[0])
        kernel = runtime.kernel(read_source("select.cu"), name, options)
        kernel((-(-threads // THREADS),), (THREADS,), arguments, stream)


def sort_rows(runtime: Runtime, stream: Any, keys: Any) -> None:
    """Sort each row of `keys` (rows, a power of two) uint64, the greatest first."""
    rows, length = keys.shape
    run = 2
    while run <= length:
        apart = run // 2
        while apart:
            numbers = (np.int64(n) for n in (rows * length // 2, length, run, apart))
            launch_select(runtime, stream, "sort_step", rows * length // 2, keys, *numbers)
            apart //= 2
        run *= 2


# --- keys on the host ----------------------------------------------------------------------------


def values_of(ordered: np.ndarray) -> np.ndarray:
    """Return the float32 of `ordered` numbers, uint32; see device.cuh."""
    negative = ordered < 0x80000000
    return np.where(negative, ~ordered, ordered & np.uint32(0x7FFFFFFF)).view(np.float32)


def split_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scores float32 and columns int64 of keys uint64; NaN and -1 where there is none."""
    scores = values_of((keys >> np.uint64(32)).astype(np.uint32))
    columns = (~keys.astype(np.uint32)).astype(np.int64)
    return np.where(keys == 0, np.float32(np.nan), scores), np.where(keys == 0, -1, columns)
