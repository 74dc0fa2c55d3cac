"""One GPU at work on pairs: its memory, its buffers and its streams; `gpu_scoring` feeds it.

A worker is used by one thread. It fills one of three sets of page-locked buffers while the GPU
works on the others, and has three streams (in, work, out) that wait for each other by events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Event
from typing import Any

import numpy as np

from fastpair.backend import parse_size
from fastpair.device import failures_told, told
from fastpair.errors import (
    ArgumentError,
    DataError,
    DeviceError,
    MemoryBudgetError,
)
from fastpair.kernels import Plan
from fastpair.scoring import PAIRS_A_TASK, check_rows

PAIRS_AT_ONCE = 1 << 22
"""Pairs of the largest buffers: each is copied in one go of 16 or 32 MiB."""

FEWEST_AT_ONCE = 1 << 14
"""Pairs of the smallest buffers: where even these do not fit, nothing does."""

FEWEST_ROWS = 64
"""Rows of the smallest block of a table that is walked in blocks."""

SETS = 3
"""Sets of buffers: one is filled, one is worked on, one is emptied."""

SHARE_OF_FREE = 0.9
"""Of the device's free memory, what is used unless another size is given."""

COPIED_BY_A_THREAD = 1 << 18
"""Pairs that one thread copies into or out of a buffer."""

_PROBES, _NEIGHBOURS = 32, 32
_NONE_BAD = np.iinfo(np.uint64).max


# --- pairs on their way ---------------------------------------------------------------------------


@dataclass
class Part:
    """Consecutive pairs of a block, from `start` to `stop`, and whether they are scored.

    Parameters
    ----------
    left, right : (b,) row numbers of the whole block.
    scores : (b,) float32 of the whole block, filled between `start` and `stop`.
    """

    left: np.ndarray
    right: np.ndarray
    scores: np.ndarray
    start: int
    stop: int
    done: Future[None] = field(default_factory=Future)

    def __len__(self) -> int:
        return self.stop - self.start

    def refuse(self, pair: int, counts: tuple[int, int]) -> None:
        """Refuse what is out of range near a pair of the block, in the words of the CPU.

        Its threads take `PAIRS_A_TASK` pairs and look at the left side of all of them first.
        """
        first = pair // PAIRS_A_TASK * PAIRS_A_TASK
        task = slice(first, first + PAIRS_A_TASK)
        check_rows(self.left[task], counts[0], "left", first)
        check_rows(self.right[task], counts[1], "right", first)

    def check(self, counts: tuple[int, int]) -> None:
        """Refuse the first row number that is not in a table."""
        for first in range(self.start // PAIRS_A_TASK * PAIRS_A_TASK, self.stop, PAIRS_A_TASK):
            self.refuse(first, counts)

    def succeed(self) -> None:
        """Say that the scores are there, unless something failed."""
        if not self.done.done():
            self.done.set_result(None)

    def fail(self, error: BaseException) -> None:
        """Say why the scores will not come; the first reason counts."""
        if not self.done.done():
            self.done.set_exception(error)


def in_runs(left: np.ndarray) -> bool:
    """Return whether equal left rows stand together, seen at a few places of the list.

    It decides between two kernels that give the same bits.
    """
    if len(left) < 2:
        return False
    starts = np.linspace(0, max(0, len(left) - _NEIGHBOURS), _PROBES).astype(np.int64)
    places = (starts[:, None] + np.arange(_NEIGHBOURS - 1)).reshape(-1)
    places = places[places < len(left) - 1]
    return 4 * int((left[places] == left[places + 1]).sum()) >= 3 * len(places)


def narrow(source: np.ndarray, target: np.ndarray) -> None:
    """Copy row numbers into a smaller type; what does not fit becomes -1, which no table has."""
    np.copyto(target, source, casting="unsafe")
    if np.can_cast(source.dtype, target.dtype) or not len(source):
        return
    most = np.iinfo(target.dtype).max
    if source.min() < 0 or source.max() > most:
        target[(source < 0) | (source > most)] = -1


def device_budget(runtime: Any, memory: int | str | None = None) -> int:
    """Return the bytes to use on a device: the given size, or `SHARE_OF_FREE` of what is free."""
    if memory is None:
        return int(SHARE_OF_FREE * runtime.free_memory())
    size = parse_size(memory) if isinstance(memory, str) else int(memory)
    if size < 1:
        raise ArgumentError(f"device memory is {size} bytes, expected at least 1")
    return size


# --- one device -----------------------------------------------------------------------------------


@dataclass
class _Buffers:
    """One set of buffers (left, right, scores, number of a bad pair) and what is in them."""

    host: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
    device: tuple[Any, Any, Any, Any]
    count: int = 0
    ready: Any = None
    store: Callable[[np.ndarray, int], None] | None = None
    parts: Sequence[Part] = ()


class Worker:
    """One GPU with two tables, or one twice, or with a block of each where they do not fit.

    Parameters
    ----------
    runtime : `fastpair.kernels.gpu.Runtime` of the GPU.
    left, right : (n, row_bytes) and (n', row_bytes) uint8; right None: the same table.
    plan : the plan of both.
    memory : bytes, or a text, to use there; default `SHARE_OF_FREE` of what is free.
    pool : threads that copy into and out of buffers.

    Attributes
    ----------
    block_rows : rows of a block of the tables; None: they are there as a whole.
    """

    def __init__(
        self,
        runtime: Any,
        left: np.ndarray,
        right: np.ndarray | None,
        plan: Plan,
        memory: int | str | None,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.runtime, self.plan = runtime, plan
        self._one = right is None
        self._tables = left, left if right is None else right
        self.counts = len(self._tables[0]), len(self._tables[1])
        fits = max(self.counts) <= np.iinfo(np.int32).max
        self._index = np.dtype(np.int32 if fits else np.int64)
        self._pool = pool
        self._budget, self._used = device_budget(runtime, memory), 0
        self._in, self._work, self._out = (runtime.stream() for _ in range(3))
        self._free: deque[_Buffers] = deque()
        self._busy: deque[_Buffers] = deque()
        self._spaces: tuple[Any, Any] | None = None
        self._held: tuple[int, int] | None = None
        self._table: Any = None
        self._network: int | None = None
        self._size, self._most = 0, PAIRS_AT_ONCE
        self.block_rows: int | None = None
        with failures_told(runtime.number):
            self._arrange(FEWEST_AT_ONCE)

    # --- memory ---

    def _arrange(self, pairs: int) -> None:
        """Take memory for the tables, and for buffers of `pairs` pairs or of what fits.

        Where it does not suffice, buffers get smaller first, then blocks of the tables.
        """
        from fastpair.kernels.gpu import OutOfDeviceMemory

        while True:
            try:
                if self._spaces is None:
                    self._take_tables()
                self._take_buffers(pairs)
                return
            except OutOfDeviceMemory:
                self._release()
            rows = self.block_rows or max(self.counts)
            if rows <= FEWEST_ROWS:
                raise MemoryBudgetError(
                    f"gpu:{self.runtime.number} has no room for pairs: {self._budget} bytes of it "
                    f"may be used and {self.runtime.free_memory()} are free: allow more with "
                    "--device-memory, end what else uses it, or use the device cpu"
                )
            self.block_rows = max(FEWEST_ROWS, -(-rows // 2))

    def _empty(self, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> Any:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._use(size)
        try:
            return self.runtime.empty(shape, dtype)
        except Exception:
            self._used -= size
            raise

    def _use(self, size: int) -> None:
        from fastpair.kernels.gpu import OutOfDeviceMemory

        if self._used + size > self._budget:
            raise OutOfDeviceMemory(f"{size} bytes are more than the budget leaves")
        self._used += size

    def _network_bytes(self) -> int:
        """Return what a network takes beside the tables: its weights, and room for its units."""
        from fastpair.kernels.gpu import DeviceTable

        if self.plan.network is None:
            return 0
        if self._network is None:
            none = self.runtime.empty((0, self.plan.layout.row_bytes), np.uint8)
            network = DeviceTable(self.runtime, none, None, self.plan, self._work).network
            assert network is not None
            parts = network.device_weights, network.device_widths, network.scratch(self._work)
            self._network = sum(part.nbytes for part in parts)
            self.runtime.synchronize(self._work)
        return self._network

    def _release(self) -> None:
        self._free.clear()
        self._spaces = self._held = self._table = None
        self._used = self._size = 0

    def _take_tables(self) -> None:
        """Take room for the tables, or for a block of each; bring them there if they fit."""
        width, rows = self.plan.layout.row_bytes, self.block_rows
        self._use(self._network_bytes())
        left = self._empty((rows or max(1, self.counts[0]), width), np.uint8)
        twice = rows is None and self._one
        right = None if twice else self._empty((rows or max(1, self.counts[1]), width), np.uint8)
        self._spaces = left, right
        self._load(0, 0)

    def _load(self, *blocks: int) -> None:
        """Have a left and a right block of the tables on the device."""
        from fastpair.kernels.gpu import DeviceTable

        if self._held == blocks:
            return
        self._drain()  # a network goes with its table
        assert self._spaces is not None
        views: list[Any] = []
        for side, (number, space) in enumerate(zip(blocks, self._spaces, strict=True)):
            rows = self.block_rows or len(self._tables[side])
            block = self._tables[side][number * rows : (number + 1) * rows]
            views.append(None if space is None else space[: len(block)])
            held = self._held is not None and self._held[side] == number
            if len(block) and space is not None and not held:
                self.runtime.upload(views[-1], block, self._work)
        self._table = None  # first: there may be no room for two networks
        self._table = DeviceTable(self.runtime, views[0], views[1], self.plan, self._work)
        if self._table.network is not None:
            self._table.network.scratch(self._work)  # now, where less memory can be met
        self.runtime.synchronize(self._work)
        self._held = blocks[0], blocks[1]

    def _take_buffers(self, pairs: int) -> None:
        """Take the sets of buffers, of half as many pairs until they fit."""
        from fastpair.kernels.gpu import OutOfDeviceMemory

        size = min(PAIRS_AT_ONCE, max(FEWEST_AT_ONCE, 1 << (pairs - 1).bit_length()))
        used = self._used
        while True:
            try:
                self._free.extend(self._buffers(size) for _ in range(SETS))
                self._size = size
                return
            except OutOfDeviceMemory:
                self._free.clear()
                self._used = used
                if size <= FEWEST_AT_ONCE:
                    raise
                size = max(FEWEST_AT_ONCE, size // 2)

    def _buffers(self, size: int) -> _Buffers:
        kinds = ((size, self._index), (size, self._index), (size, np.float32), (1, np.uint64))
        left, right, scores, bad = (self._empty((count,), dtype) for count, dtype in kinds)
        host = [self.runtime.pinned((count,), dtype) for count, dtype in kinds]
        return _Buffers((host[0], host[1], host[2], host[3]), (left, right, scores, bad))

    def _grow(self, pairs: int) -> None:
        """Have larger buffers if `pairs` ask for them; where there is no room, those that fit."""
        wanted = min(pairs, self._most)
        if self._size >= wanted:
            return
        self._drain()
        self._used -= sum(array.nbytes for buffers in self._free for array in buffers.device)
        self._free.clear()
        self._arrange(wanted)
        if self._size < wanted:
            self._most = self._size

    # --- work ---

    def run(self, work: SimpleQueue[list[Part] | None], stop: Event) -> None:
        """Score what comes until None comes."""
        while True:
            try:
                parts = work.get(block=not self._busy)
            except Empty:
                self._collect()
                continue
            if parts is None:
                work.put(None)  # for the other devices
                self._drain()
                return
            if not stop.is_set():
                try:
                    self._score(parts)
                except Exception as error:
                    self._fail(parts, error)

    def _score(self, parts: list[Part]) -> None:
        self._grow(max(map(len, parts)))
        if self.block_rows is not None:
            self._score_sorted(parts)
            return
        for part in parts:
            self._score_part(part)

    def _score_part(self, part: Part) -> None:
        """Send pairs of tables that are on the device."""
        for start in range(part.start, part.stop, self._size):
            stop = min(start + self._size, part.stop)

            def store(scores: np.ndarray, bad: int, start: int = start, stop: int = stop) -> None:
                if bad < stop - start:
                    part.refuse(start + bad, self.counts)
                    self._contradict(start + bad)
                self._copy([(scores, part.scores[start:stop])])
                if stop == part.stop:
                    part.succeed()

            self._launch(part.left[start:stop], part.right[start:stop], store, [part])

    def _contradict(self, pair: int) -> None:
        raise DeviceError(
            f"gpu:{self.runtime.number} says that pair {pair} has a row number out of range, which "
            "it has not: do not trust this GPU or its driver"
        )

    def _score_sorted(self, parts: list[Part]) -> None:
        """Send pairs by the blocks of the tables that they need; wait for their scores."""
        good = [part for part in parts if self._in_range(part)]
        if not good:
            return
        left, right = (
            np.concatenate([getattr(p, side)[p.start : p.stop] for p in good]).astype(self._index)
            for side in ("left", "right")
        )
        scores = np.empty(len(left), np.float32)
        rows = self.block_rows or 1
        across = -(-self.counts[1] // rows)
        cells = left.astype(np.int64) // rows * across + right // rows
        order = np.argsort(cells, kind="stable")
        ends = np.flatnonzero(np.diff(cells[order])) + 1
        for places in np.split(order, ends):
            block = divmod(int(cells[places[0]]), across)
            self._load(*block)
            for start in range(0, len(places), self._size):
                piece = places[start : start + self._size]

                def store(found: np.ndarray, bad: int, piece: np.ndarray = piece) -> None:
                    if bad < len(piece):
                        self._contradict(int(piece[bad]))
                    scores[piece] = found

                some = left[piece] - block[0] * rows, right[piece] - block[1] * rows
                self._launch(*some, store, good)
        self._drain()
        first = 0
        for part in good:
            part.scores[part.start : part.stop] = scores[first : first + len(part)]
            first += len(part)
            part.succeed()

    def _in_range(self, part: Part) -> bool:
        try:
            part.check(self.counts)
        except DataError as error:
            part.fail(error)
            return False
        return True

    def _launch(
        self,
        left: np.ndarray,
        right: np.ndarray,
        store: Callable[[np.ndarray, int], None],
        parts: Sequence[Part],
    ) -> None:
        """Begin to score pairs; `store` gets their scores and the first bad one when they come."""
        from fastpair.kernels.gpu import score_pairs

        if not self._free:
            self._collect()
        buffers, count, runtime = self._free.popleft(), len(left), self.runtime
        host, bad = buffers.host, buffers.device[3]
        rows_left, rows_right, scores = (array[:count] for array in buffers.device[:3])
        self._copy([(left, host[0][:count]), (right, host[1][:count])])
        runtime.upload(rows_left, host[0][:count], self._in)
        runtime.upload(rows_right, host[1][:count], self._in)
        runtime.wait(self._work, runtime.record(self._in))
        runtime.fill(bad, 0xFF, self._work)
        numbers, runs = (rows_left, rows_right), in_runs(left)
        score_pairs(runtime, self._table, *numbers, scores, bad, self._work, runs=runs)
        runtime.wait(self._out, runtime.record(self._work))
        runtime.download(host[2][:count], scores, self._out)
        runtime.download(host[3], bad, self._out)
        buffers.count, buffers.store, buffers.parts = count, store, parts
        buffers.ready = runtime.record(self._out)
        self._busy.append(buffers)

    def _copy(self, arrays: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Copy arrays (source, target) into each other, long ones by several threads."""
        step = COPIED_BY_A_THREAD
        pieces = [
            (source[n : n + step], target[n : n + step])
            for source, target in arrays
            for n in range(0, len(source), step)
        ]
        if len(pieces) <= len(arrays):
            for source, target in pieces:
                _copy_piece(source, target)
        else:
            for _ in self._pool.map(lambda piece: _copy_piece(*piece), pieces):
                pass

    def _collect(self) -> None:
        """Wait for what was sent first, and hand on its scores."""
        buffers = self._busy.popleft()
        try:
            self.runtime.synchronize(buffers.ready)
            assert buffers.store is not None
            buffers.store(buffers.host[2][: buffers.count], int(buffers.host[3][0]))
        except Exception as error:
            self._fail(buffers.parts, error)
        buffers.store, buffers.parts = None, ()
        self._free.append(buffers)

    def _drain(self) -> None:
        while self._busy:
            self._collect()

    def _fail(self, parts: Sequence[Part], error: Exception) -> None:
        for part in parts:
            part.fail(told(error, self.runtime.number))

    # --- arrays that live on the device ---

    def score_resident(self, left: Any, right: Any, out: Any, runs: bool) -> Any:
        """Score row numbers that are on the device; see `GpuPairScorer.score_device`."""
        from fastpair.kernels.gpu import score_pairs

        if self.block_rows is not None:
            raise MemoryBudgetError(
                f"the tables do not fit gpu:{self.runtime.number}, where {self._budget} bytes may "
                "be used: allow more, or give row numbers in NumPy arrays"
            )
        runtime, stream = self.runtime, self._work
        left, right = self._adopted(left, "left"), self._adopted(right, "right")
        for rows, side in ((left, "left"), (right, "right")):
            if rows.dtype not in (np.int32, np.int64) or (rows.dtype, rows.shape) != (
                left.dtype,
                (len(left),),
            ):
                raise ArgumentError(
                    f"{side} is {rows.dtype} of shape {rows.shape} on the device, expected both "
                    "sides int32 or both int64, (m,)"
                )
        out = runtime.empty(left.shape, np.float32) if out is None else out
        scores = self._adopted(out, "out")
        if scores.dtype != np.float32 or scores.shape != left.shape:
            raise ArgumentError(
                f"out is {scores.dtype} of shape {scores.shape}, expected float32 of {left.shape}"
            )
        bad, first = runtime.empty((1,), np.uint64), np.empty(1, np.uint64)
        runtime.fill(bad, 0xFF, stream)
        score_pairs(runtime, self._table, left, right, scores, bad, stream, runs=runs)
        runtime.download(first, bad, stream)
        runtime.synchronize(stream)
        if first[0] != _NONE_BAD:
            self._refuse_resident(left, right, int(first[0]))
        return out

    def _adopted(self, array: Any, name: str) -> Any:
        try:
            return self.runtime.adopt(array)
        except ValueError as error:
            raise ArgumentError(f"{name} is {error}") from None

    def _refuse_resident(self, left: Any, right: Any, pair: int) -> None:
        first = pair // PAIRS_A_TASK * PAIRS_A_TASK
        for rows, count, side in zip((left, right), self.counts, ("left", "right"), strict=True):
            task = rows[first : first + PAIRS_A_TASK]
            there = np.empty(task.shape, task.dtype)
            self.runtime.download(there, task, self._work)
            self.runtime.synchronize(self._work)
            check_rows(there, count, side, first)
        self._contradict(pair)


def _copy_piece(source: np.ndarray, target: np.ndarray) -> None:
    if source.dtype == target.dtype:
        np.copyto(target, source)
    else:
        narrow(source, target)
