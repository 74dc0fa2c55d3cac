"""One GPU's part of a walk over all pairs: what lies there in which portions, and what is found.

Left rows are taken in groups, right rows in chunks, as large as the device's memory allows; where a
device has less than it seemed, portions become smaller. What is found does not depend on them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from fastpair.backend import run_ordered
from fastpair.errors import MemoryBudgetError
from fastpair.kernels import Plan
from fastpair.kernels.gpu import DeviceTable, OutOfDeviceMemory, Runtime, score_pairs
from fastpair.kernels.gpu_tiles import (
    Block,
    DeviceSide,
    Operands,
    PairList,
    TileKernels,
    empty_operands,
    launch_select,
    pack_operands,
    row_words,
    split_tile_bound,
)
from fastpair.kernels.operands import Panels, column_shifts, operand_counts

_Result = TypeVar("_Result")

_ROWS_PACKED_AT_ONCE = 4096
_PACKING_BYTES = 64
"""What a column of a row takes on the host, in float64, on its way into operands."""

_MOST_LISTED = 1 << 24
_LEAST_LISTED = 1 << 12
"""Pairs that a list on a device holds: at most what is worth it, at least a row's candidates."""

_SIZES = ("size", "length", "norm", "error", "drift")
"""What `Panels` tell of each row."""

_NO_TABLE_ROW = -(1 << 62)

_SAMPLE = 32, 2048
"""Left and right rows that a choice of the form looks at."""
_MOST_UNDECIDED = 1e-3
"""Share of the pairs above which a threshold's candidates cost more than coarse tiles save."""


class HostSide:
    """One side of a walk on the host, made into operands piece by piece.

    Parameters
    ----------
    rows : (n, row_bytes) uint8.
    plan : the plan.
    form : a name of `gpu_tiles.FORMS`.
    side : "left" or "right".
    shifts : what is taken from columns of differences, the same for both sides.
    threads : number of threads that pack.
    """

    def __init__(
        self,
        rows: np.ndarray,
        plan: Plan,
        form: str,
        side: str,
        shifts: dict[str, np.ndarray],
        threads: int,
    ) -> None:
        self.rows, self.plan, self.form, self.side = rows, plan, form, side
        self.shifts, self.threads = shifts, threads
        self._sizes = np.full((len(_SIZES), len(rows)), np.nan)
        self._greatest: Panels | None = None
        self._lock = threading.Lock()

    def pack(self, first: int, last: int) -> Operands:
        """Return the operands of rows `first` to `last`."""
        operands = empty_operands(last - first, self.plan, self.form, self.side)

        def fill(start: int) -> None:
            some = self.rows[first + start : min(first + start + _ROWS_PACKED_AT_ONCE, last)]
            pack_operands(operands, start, some, self.plan, self.shifts)

        starts = range(0, last - first, _ROWS_PACKED_AT_ONCE)
        for _ in run_ordered(fill, starts, self.threads):
            pass
        for own, name in zip(self._sizes, _SIZES, strict=True):
            own[first:last] = getattr(operands.bounds, name)
        return operands

    def pieces(self, first: int, last: int, share: int) -> Iterator[tuple[int, int]]:
        """Yield (first, last) rows whose operands, and the way there, fit into a memory."""
        columns = sum(operand_counts(self.plan))
        step = max(_ROWS_PACKED_AT_ONCE, share // (8 * max(1, columns)))
        for start in range(first, last, step):
            yield start, min(start + step, last)

    def greatest(self, share: int) -> Panels:
        """The greatest sizes of all rows, as of one: they bound every tile of the other side.

        Rows that were packed already have told theirs.
        """
        with self._lock:
            if self._greatest is None:
                for first, last in self.pieces(0, len(self.rows), share):
                    if np.isnan(self._sizes[:, first:last]).any():
                        self.pack(first, last)
                greatest = self._sizes.max(axis=1, initial=0)[:, None]
                empty = np.empty((0, 0), np.float32)
                self._greatest = Panels(empty, self.form, self.side, *greatest)
            return self._greatest


class HostSides:
    """Both sides on the host, shared by the devices.

    Parameters
    ----------
    left : (n, row_bytes) uint8.
    right : (n', row_bytes) uint8, or None: one table.
    plan, form, threads : as `HostSide`.
    memory : bytes that packing may take.
    """

    def __init__(
        self,
        left: np.ndarray,
        right: np.ndarray | None,
        plan: Plan,
        form: str,
        threads: int,
        memory: int,
    ) -> None:
        self.distinct, self.plan, self.form, self.share = right is not None, plan, form, memory // 8
        others = left if right is None else right
        shifts = column_shifts(others, plan)
        self.left = HostSide(left, plan, form, "left", shifts, threads)
        self.right = HostSide(others, plan, form, "right", shifts, threads)

    def bound(self, operands: Operands) -> np.ndarray:
        """Return (n,) float32: how far raw scores of a row's tiles are from the pair kernel's.

        Rows are left ones, or of one table.
        """
        greatest = self.right.greatest(self.share)
        own, others = split_tile_bound(operands.bounds, greatest, self.plan)
        return np.nextafter(own + others.max(initial=0), np.float32(np.inf))


@dataclass
class Portion:
    """Rows of one side on a device.

    Parameters
    ----------
    first, last : rows of the table.
    rows : device array (last - first, row_bytes) uint8.
    side : their operands there.
    slack : device array (last - first,) float32, how far tiles may be from the pair kernel; of
        right rows zeros, unless they are those of one table and tiles are not raised.
    most : the greatest of them.
    """

    first: int
    last: int
    rows: Any
    side: DeviceSide
    slack: Any
    most: float

    @property
    def count(self) -> int:
        """Rows."""
        return self.last - self.first


class DeviceWalk:
    """A walk on one device.

    Parameters
    ----------
    runtime : the device.
    sides : what is walked.
    raised : whether tiles tell upper bounds.
    row_bytes : bytes on the device that results take for each left row.
    pair_bytes : bytes that they take for each left row and right row of a chunk.
    memory : bytes that may be used there.

    Attributes
    ----------
    chunk, group : right rows, and left rows, that are there at once.
    """

    def __init__(
        self,
        runtime: Runtime,
        sides: HostSides,
        *,
        raised: bool,
        row_bytes: int = 0,
        pair_bytes: int = 0,
        memory: int,
    ) -> None:
        self.runtime, self.sides, self.raised, self.memory = runtime, sides, raised, memory
        self.plan = sides.plan
        self.stream = runtime.stream()
        self.tiles = TileKernels(runtime, self.stream, self.plan, sides.form)
        self._row_bytes, self._pair_bytes = row_bytes, pair_bytes
        self._side_bytes = self.plan.layout.row_bytes + 4 * row_words(self.plan, sides.form) + 8
        self._left: Portion | None = None
        self._right: Portion | None = None
        self._pairs: PairList | None = None
        self._divide()

    # --- memory

    def _divide(self) -> None:
        """Divide the memory between a list of pairs, a chunk and a group."""
        listed = self.memory // 8 // PairList.PAIR_BYTES
        self._listed = min(max(listed, _LEAST_LISTED), _MOST_LISTED)
        left = self.memory - self._listed * PairList.PAIR_BYTES - 4096
        others = len(self.sides.right.rows)
        self.chunk = max(1, min(others, left // 2 // self._side_bytes))
        left -= self.chunk * self._side_bytes
        row = self._side_bytes + self._row_bytes + self._pair_bytes * self.chunk
        if left < row and self._pair_bytes:
            self.chunk = max(1, self.chunk // 4)
            left += 3 * self.chunk * self._side_bytes
            row = self._side_bytes + self._row_bytes + self._pair_bytes * self.chunk
        self.group = min(max(1, len(self.sides.left.rows)), left // row)
        if self.group < 1:
            raise MemoryBudgetError(
                f"one row of the result needs {row} bytes on the GPU, more than the "
                f"{max(left, 0)} that its memory leaves: allow more with --device-memory, or use "
                "--device cpu"
            )

    def _shrink(self) -> None:
        """Free what can be freed, and take less from now on."""
        self.runtime.synchronize(self.stream)
        self._left = self._right = self._pairs = None
        self.memory = self.memory * 3 // 4
        self._divide()

    @property
    def whole(self) -> bool:
        """Whether all rows of both sides are there at once."""
        rows = len(self.sides.left.rows), len(self.sides.right.rows)
        return (self.group, self.chunk) == rows

    def run(self, first: int, last: int, work: Callable[[Portion], _Result]) -> list[_Result]:
        """Return ``work(group)`` of the left rows `first` to `last` in groups, in order.

        A group for which there was no room is begun again, smaller.
        """
        results: list[_Result] = []
        while first < last:
            stop = min(first + self.group, last)
            try:
                results.append(work(self._group(first, stop)))
                first = stop
            except OutOfDeviceMemory:
                self._shrink()
        return results

    # --- rows on the device

    def _group(self, first: int, last: int) -> Portion:
        """Left rows, and a list of pairs, so that later work finds it; the last ones are kept."""
        if self._pairs is None:
            self._pairs = PairList(self.runtime, self._listed)
        if self.chunk == len(self.sides.right.rows):
            next(self.chunks())  # it tells what bounds the left rows
        if self._left is None or (self._left.first, self._left.last) != (first, last):
            self._left = None
            self._left = self._load(self.sides.left, first, last)
        return self._left

    def _load(self, side: HostSide, first: int, last: int) -> Portion:
        """Bring rows of a side and their operands to the device; done when it returns."""
        runtime, stream, count = self.runtime, self.stream, last - first
        words = runtime.empty((count, max(1, row_words(self.plan, side.form))), np.uint32)
        bias, slack = (runtime.empty(count, np.float32) for _ in range(2))
        rows = None if self._right is None else self._shared(side, first, last)
        if rows is None:
            rows = runtime.empty((count, self.plan.layout.row_bytes), np.uint8)
            runtime.upload(rows, side.rows[first:last], stream)
        most, left = 0.0, side.side == "left"
        bounded = left or not (self.sides.distinct or self.raised)
        for start, stop in side.pieces(first, last, self.sides.share):
            operands, here = side.pack(start, stop), slice(start - first, stop - first)
            bound = np.zeros(stop - start, np.float32)
            if bounded:
                bound = self.sides.bound(operands)
            if self.raised and left:
                operands.raise_biases(bound)
            if operands.words.shape[1]:
                runtime.upload(words[here], operands.words, stream)
            runtime.upload(bias[here], operands.bias, stream)
            runtime.upload(slack[here], bound, stream)
            runtime.synchronize(stream)
            most = max(most, float(bound.max(initial=0)))
        runtime.synchronize(stream)
        return Portion(first, last, rows, DeviceSide(words, bias, first), slack, most)

    def _shared(self, side: HostSide, first: int, last: int) -> Any:
        """Rows of one table that are there already, as right ones."""
        right = self._right
        if self.sides.distinct or right is None or (first, last) != (right.first, right.last):
            return None
        return right.rows

    def chunks(self) -> Iterator[Portion]:
        """Yield the right rows in chunks; one that is there is not loaded again."""
        for first in range(0, len(self.sides.right.rows), self.chunk):
            last = min(first + self.chunk, len(self.sides.right.rows))
            if self._right is None or (self._right.first, self._right.last) != (first, last):
                self._right = None
                self._right = self._load(self.sides.right, first, last)
            yield self._right

    def block(self, left: Portion, right: Portion, triangle: bool = False) -> Block:
        """A whole group against a whole chunk."""
        one_table = 0 if self.sides.distinct else 2 if triangle else 1
        return Block(left.side, right.side, 0, left.count, 0, right.count, one_table)

    # --- pairs by the pair kernel

    @property
    def pairs(self) -> PairList:
        """The list of pairs."""
        assert self._pairs is not None
        return self._pairs

    def score(self, left: Portion, right: Portion, count: int, runs: bool = False) -> None:
        """Fill the scores of the first `count` listed pairs."""
        table = DeviceTable(self.runtime, left.rows, right.rows, self.plan, self.stream)
        pairs = self.pairs
        self.runtime.fill(pairs.first_bad, 0xFF, self.stream)
        rows, columns = pairs.rows[:count], pairs.columns[:count]
        scores, bad = pairs.scores[:count], pairs.first_bad
        score_pairs(self.runtime, table, rows, columns, scores, bad, self.stream, runs=runs)

    def listed(
        self, block: Block, launch: Callable[[Block], None], most: int | None = None
    ) -> Iterator[tuple[Block, int]]:
        """Launch what lists pairs; yield (block, pairs) for the block, or parts of it that fit.

        Where one launch finds more than `most` pairs, yield (block, -1) and end.
        """
        waiting, count = [block], self.runtime.pinned(1, np.uint64)
        while waiting:
            part = waiting.pop()
            if part.empty:
                continue
            self.runtime.fill(self.pairs.count, 0, self.stream)
            launch(part)
            self.fetch(self.pairs.count, count)
            found = int(count[0])
            if most is not None and found > most:
                yield part, -1
                return
            if found > self.pairs.capacity:
                waiting += reversed(part.halves())
            else:
                yield part, found

    def fetch(self, array: Any, target: np.ndarray | None = None) -> np.ndarray:
        """Return a device array on the host, after all work so far."""
        if target is None:
            target = self.runtime.pinned(array.shape, array.dtype)
        if target.size:
            self.runtime.download(target, array, self.stream)
        self.runtime.synchronize(self.stream)
        return target

    def put(self, source: np.ndarray) -> Any:
        """Return a copy of an array on the device; done when it returns."""
        target = self.runtime.empty(source.shape, source.dtype)
        if source.size:
            self.runtime.upload(target, np.ascontiguousarray(source), self.stream)
        self.runtime.synchronize(self.stream)
        return target

    def select(self, name: str, threads: int, *arguments: Any) -> None:
        """Launch a kernel of `select.cu`."""
        launch_select(self.runtime, self.stream, name, threads, *arguments)

    def itself(self, left: Portion) -> np.int64:
        """The table row of a group's row 0 where pairs (i, i) are left out, else far below any."""
        return np.int64(_NO_TABLE_ROW if self.sides.distinct else left.first)


# --- which form scans ----------------------------------------------------------------------------


def choose_form(
    left: np.ndarray,
    right: np.ndarray | None,
    plan: Plan,
    *,
    k: int | None = None,
    room: int = 0,
    floor: float | None = None,
) -> str:
    """Return the form of tiles that leaves few enough pairs undecided, the fastest first.

    A sample of the pairs tells what the error of bfloat16 products would leave undecided.

    Parameters
    ----------
    left, right, plan : as `HostSides` takes them.
    k, room : how many right rows are wanted of each left row, and how many may be undecided; or
    floor : the least raw score of what is wanted, about which a small share may be undecided.
    """
    others = left if right is None else right
    if not operand_counts(plan)[0] or not len(left) or not len(others):
        return "float32"
    first, second = _evenly(len(left), _SAMPLE[0]), _evenly(len(others), _SAMPLE[1])
    sides = HostSides(left[first], others[second], plan, "bfloat16", 1, 1 << 30)
    some, many = sides.left.pack(0, len(first)), sides.right.pack(0, len(second))
    slack = sides.bound(some)[:, None]
    raw = _approximate(some, many, plan)
    if right is None:
        raw[first[:, None] == second] = -np.inf
    if floor is not None:
        undecided = np.abs(raw - floor) <= 2 * slack
        return "bfloat16" if undecided.mean() <= _MOST_UNDECIDED else "float32"
    place = min(max(1, round((k or 1) * len(second) / len(others))), len(second))
    best = np.partition(raw, len(second) - place, axis=1)[:, len(second) - place, None]
    undecided = (raw >= best - 2 * slack).mean(axis=1) * len(others)
    return "bfloat16" if np.median(undecided) <= room else "float32"


def _evenly(rows: int, count: int) -> np.ndarray:
    """Numbers of at most `count` rows, evenly spaced."""
    return np.arange(min(count, rows)) * rows // min(count, rows)


def _approximate(left: Operands, right: Operands, plan: Plan) -> np.ndarray:
    """Return the raw scores (n, n') of two sides of bfloat16 operands, about."""
    _, plus, minus = operand_counts(plan)
    words = row_words(plan, "bfloat16") - plus - minus
    products, maxima = [], []
    for side in (left, right):
        halves = np.ascontiguousarray(side.words[:, :words]).view(np.uint16)
        products.append((halves.astype(np.uint32) << 16).view(np.float32))
        maxima.append(np.ascontiguousarray(side.words[:, words:].T).view(np.float32))
    raw = products[0] @ products[1].T
    raw += np.float32(plan.constant) + left.bias[:, None] + right.bias
    signs = np.repeat(np.array([1, -1], np.float32), [plus, minus])
    for sign, x, y in zip(signs, *maxima, strict=True):
        raw += sign * np.maximum(x[:, None], y)
    return raw
