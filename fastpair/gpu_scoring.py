"""Pair stream -> GPUs -> score stream: copies in, kernels and copies out at the same time.

The scores are those of the CPU, to the bit, whatever the GPUs, their number, their memory and the
blocks. `fastpair.gpu_worker` has what one GPU does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, Generic

import numpy as np

from fastpair.backend import memory_budget, read_ahead, thread_count
from fastpair.device import failures_told, pick
from fastpair.errors import ArgumentError
from fastpair.gpu_worker import FEWEST_AT_ONCE, PAIRS_AT_ONCE, SETS, Part, Worker
from fastpair.kernels import Plan
from fastpair.scoring import AnyBlock, check_kind, meet

SORTED_PAIR_BYTES = 64
"""Host bytes a pair while pairs are sorted by blocks of the table: numbers, order, scores."""

MOST_SORTED = 1 << 26
"""Pairs that are sorted together, at most."""

_Work = SimpleQueue[list[Part] | None]


class GpuPairScorer:
    """Scores pairs of rows of one table, or of a left and a right table, on GPUs.

    Tables that fit are kept on every device. Larger ones are walked in blocks of rows: pairs are
    sorted by the blocks that they need, and their scores put back in order.

    Parameters
    ----------
    left_rows : (n, row_bytes) uint8 rows of a table.
    plan : its plan.
    right_rows : (n', row_bytes) uint8 rows of the right table; None: the same table.
    right_plan : its plan; it must differ in nothing but int8 scales.
    devices : a text as `device.pick` takes it, or runtimes; default "gpu": all that are there.
    device_memory : bytes, or a text such as "8GiB", to use on each device; default 90 % of what is
        free there.
    memory : bytes, or a text, that sorting pairs may take here; default 80 % of what is free.
    threads : threads that fill the buffers; default one for each processor.

    Raises
    ------
    MismatchError : the tables do not have the same plan.
    DeviceError : there is no such device.
    MemoryBudgetError : a device has no room even for small blocks.
    """

    def __init__(
        self,
        left_rows: np.ndarray,
        plan: Plan,
        right_rows: np.ndarray | None = None,
        right_plan: Plan | None = None,
        *,
        devices: str | Sequence[Any] = "gpu",
        device_memory: int | str | None = None,
        memory: int | str | None = None,
        threads: int | None = None,
    ) -> None:
        self.threads = thread_count(threads)
        runtimes = pick(devices).runtimes if isinstance(devices, str) else tuple(devices)
        if not runtimes:
            raise ArgumentError(f"devices is {devices!r}, expected at least one GPU")
        if right_rows is not None and right_plan is not None:
            left_rows, right_rows, plan = meet(left_rows, plan, right_rows, right_plan)
        self.left_count = len(left_rows)
        self.right_count = self.left_count if right_rows is None else len(right_rows)
        self._memory = memory
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="fastpair-copy")
        self._workers = [
            Worker(runtime, left_rows, right_rows, plan, device_memory, self._pool)
            for runtime in runtimes
        ]

    @property
    def resident(self) -> bool:
        """Whether every device holds the tables as a whole."""
        return all(worker.block_rows is None for worker in self._workers)

    def __call__(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return the scores (m,) float32 of pairs of row numbers `left` and `right`, (m,) each.

        Raises
        ------
        DataError : a row number is negative or past the table's end.
        """
        left, right = np.asarray(left), np.asarray(right)
        if left.shape != right.shape or left.ndim != 1:
            raise ArgumentError(f"left has shape {left.shape}, right {right.shape}, expected (m,)")
        with self._working() as work:
            pairs = _Scored(_Pairs(left, right))
            self._submit(work, [pairs])
            return pairs.result()[1]

    def stream(self, blocks: Iterable[AnyBlock]) -> Iterator[tuple[AnyBlock, np.ndarray]]:
        """Yield each block with its scores, in order; the next ones are under way meanwhile.

        Row numbers are checked as they are scored.
        """
        resident = self.resident
        together = 1 if resident else self._sorted_together()
        under_way = len(self._workers) * (SETS if resident else 1)
        waiting: deque[list[_Scored[AnyBlock]]] = deque()
        group: list[_Scored[AnyBlock]] = []
        with self._working() as work:
            for block in read_ahead(blocks):
                group.append(_Scored(block))
                if sum(len(scored.scores) for scored in group) < together:
                    continue
                self._submit(work, group)
                waiting.append(group)
                group = []
                if len(waiting) > under_way:
                    yield from (scored.result() for scored in waiting.popleft())
            self._submit(work, group)
            for last in (*waiting, group):
                yield from (scored.result() for scored in last)

    def score_device(self, left: Any, right: Any, out: Any = None, *, runs: bool = False) -> Any:
        """Score row numbers that live on a GPU; the scores stay there and nothing is copied.

        Parameters
        ----------
        left, right : (m,) each, both int32 or both int64: CuPy arrays or anything with
            ``__cuda_array_interface__`` or DLPack, on one of this scorer's devices.
        out : (m,) float32 on the same device; default: a new CuPy array.
        runs : whether equal left rows stand together, which another kernel uses; the same bits.

        Returns
        -------
        out : complete when this returns.

        Raises
        ------
        ArgumentError : arrays of other shapes or types, or on another device.
        DataError : a row number is negative or past the table's end.
        MemoryBudgetError : the tables do not fit the device as a whole.
        """
        number = _device_number(left)
        for worker in self._workers:
            if number in (None, worker.runtime.number):
                with failures_told(worker.runtime.number):
                    return worker.score_resident(left, right, out, runs)
        raise ArgumentError(f"left is on gpu:{number}, which is none of this scorer's devices")

    def _sorted_together(self) -> int:
        room = memory_budget(self._memory) // (SORTED_PAIR_BYTES * 2 * len(self._workers))
        return max(FEWEST_AT_ONCE, min(MOST_SORTED, room))

    def _submit(self, work: _Work, blocks: list[_Scored[Any]]) -> None:
        """Hand blocks on to the devices: piece by piece, or together where they are sorted."""
        if self.resident:
            for block in blocks:
                for part in block.cut(PAIRS_AT_ONCE):
                    work.put([part])
            return
        together = self._sorted_together()
        group: list[Part] = []
        for part in (part for block in blocks for part in block.cut(together)):
            if group and sum(map(len, group)) + len(part) > together:
                work.put(group)
                group = []
            group.append(part)
        if group:
            work.put(group)

    @contextmanager
    def _working(self) -> Iterator[_Work]:
        """Run one thread a device that takes lists of parts from a queue, until the end."""
        work: _Work = SimpleQueue()
        stop = Event()
        threads = [
            Thread(target=worker.run, args=(work, stop), name=f"fastpair-gpu{number}")
            for number, worker in enumerate(self._workers)
        ]
        try:
            for thread in threads:
                thread.start()
            yield work
        except BaseException:
            stop.set()
            raise
        finally:
            work.put(None)
            for thread in threads:
                if thread.ident is not None:  # it was started before an interruption
                    thread.join()


def _device_number(array: Any) -> int | None:
    """Return the GPU that an array says it is on, in the words of CuPy or of PyTorch."""
    device = getattr(array, "device", None)
    numbers = (getattr(device, name, None) for name in ("id", "index"))
    return next((number for number in numbers if isinstance(number, int)), None)


@dataclass(frozen=True)
class _Pairs:
    left: np.ndarray
    right: np.ndarray


class _Scored(Generic[AnyBlock]):
    """A block and its scores, which come in parts."""

    def __init__(self, block: AnyBlock) -> None:
        self.block = block
        self.scores = np.empty(len(block.left), np.float32)
        self._parts: list[Part] = []

    def cut(self, size: int) -> list[Part]:
        """Return the parts of at most `size` pairs."""
        left, right = self.block.left, self.block.right
        for rows, side in ((left, "left"), (right, "right")):
            check_kind(rows, side)
        starts = range(0, len(left), size)
        self._parts = [Part(left, right, self.scores, n, min(n + size, len(left))) for n in starts]
        return self._parts

    def result(self) -> tuple[AnyBlock, np.ndarray]:
        """Wait for the scores."""
        for part in self._parts:
            part.done.result()
        return self.block, self.scores
