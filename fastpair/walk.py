"""The walk over all pairs: both sides packed within a memory, blocks of them taken by threads.

Left rows are taken in groups, right rows in chunks, as large as the memory allows. Where left and
right are one table and all of it fits, only its upper triangle is walked. What a scan finds does
not depend on groups, chunks, blocks, threads or the form of the panels.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TypeVar

import numpy as np

from fastpair.backend import run_ordered
from fastpair.errors import MemoryBudgetError
from fastpair.kernels import Plan, aligned_empty, cpu
from fastpair.kernels.operands import (
    MOST_BYTE_COLUMNS,
    Frame,
    Panels,
    empty_panels,
    make_frame,
    operand_counts,
    pack_rows,
    raise_biases,
    row_words,
    split_bound,
    tile_bound,
    word_counts,
)
from fastpair.kernels.tile import FORMS, HEADER, TILE_COLUMNS, TILE_ROWS

_Result = TypeVar("_Result")
Task = tuple[int, int, int, int]
"""First and last left panel, first and last right panel."""

_PANELS_A_TASK = 16
_ROWS_PACKED_AT_ONCE = 1024
_PACKING_BYTES = 64
"""What a column of a row takes, in float64, on its way into a panel."""

_BLOCK_BYTES = 512 * 1024
_BLOCKS_A_THREAD = 8
_LEAST_BLOCK = 8
"""The least block of a triangle, in rows that make whole panels of both sides."""
_BOTH_WIDTHS = math.lcm(TILE_ROWS, TILE_COLUMNS)


def pack_side(
    rows: np.ndarray, side: str, form: str, plan: Plan, frame: Frame, threads: int, memory: int
) -> Panels:
    """Return rows of a table as panels of one side, packed in threads.

    What lies about meanwhile takes at most a quarter of the memory.
    """
    panels = empty_panels(len(rows), plan, form, side)
    share = memory // (4 * threads)
    within = _rows_within(share, _PACKING_BYTES * sum(operand_counts(plan)), panels.width)
    step = min(within, -(-_ROWS_PACKED_AT_ONCE // panels.width) * panels.width)

    def fill(first: int) -> None:
        pack_rows(panels, first, rows[first : first + step], plan, frame)

    for _ in run_ordered(fill, range(0, len(rows), step), threads):
        pass
    return panels


@dataclass(frozen=True)
class Shared:
    """What walks of parts of two tables must share, so that their tiles are those of one walk.

    Parameters
    ----------
    frame : of both whole tables.
    greatest : sizes of all right rows, as of one; see `Sides.greatest`.
    one_table : whether both sides are parts of one table.
    """

    frame: Frame
    greatest: Panels
    one_table: bool


class Sides:
    """Both sides of a walk, packed in one form when they are needed.

    Parameters
    ----------
    left : (n, row_bytes) uint8 rows of a table.
    right : (n', row_bytes) uint8 rows of a table with the same plan, or None: one table.
    plan : the plan of both.
    form : a name of `fastpair.kernels.tile.FORMS`.
    threads : number of threads.
    memory : bytes that panels and results may take.
    shared : of the tables of which these are parts; None: they are whole.
    frame : the same, where it alone is known.
    """

    def __init__(
        self,
        left: np.ndarray,
        right: np.ndarray | None,
        plan: Plan,
        form: str,
        threads: int,
        memory: int,
        shared: Shared | None = None,
        frame: Frame | None = None,
    ) -> None:
        self.left, self.right = left, left if right is None else right
        self.distinct = right is not None
        self.plan, self.form, self.threads, self.memory = plan, form, threads, memory
        numbers = 8 * 5  # what bounds a row's error
        self.row_bytes = 4 * (row_words(plan, form) + HEADER) + numbers
        self.chunk = _rows_within(memory // 2, self.row_bytes, TILE_COLUMNS)
        self.chunks = range(0, max(1, len(self.right)), self.chunk)
        frame = shared.frame if shared else frame
        self._frame = frame or make_frame(self.left, self.right, plan)
        self._kept: Panels | None = None
        self._greatest: Panels | None = shared.greatest if shared else None

    def _pack(self, rows: np.ndarray, side: str) -> Panels:
        shared = self.plan, self._frame, self.threads, self.memory
        return pack_side(rows, side, self.form, *shared)

    def groups(
        self,
        result_bytes: int,
        start: int = 0,
        most: int | None = None,
        stop: int | None = None,
    ) -> Iterator[tuple[int, int]]:
        """Yield (first, last) left rows that are finished together, of rows `start` to `stop`.

        Their results take at most `most` bytes, if given.

        Raises
        ------
        MemoryBudgetError : the memory does not bear a panel with `result_bytes` a row.
        """
        share = self.memory - min(len(self.right), self.chunk) * self.row_bytes
        step = _rows_within(share * 3 // 4, self.row_bytes + result_bytes, TILE_ROWS)
        if TILE_ROWS * (self.row_bytes + result_bytes) > share:
            raise MemoryBudgetError(
                f"a few rows of the result need {TILE_ROWS * result_bytes} bytes, more than the "
                f"{max(share, 0)} that the memory leaves: allow more memory"
            )
        if most is not None:
            step = min(step, _rows_within(most, result_bytes, TILE_ROWS))
        end = len(self.left) if stop is None else stop
        for first in range(start, end, step):
            yield first, min(first + step, end)

    def _right_side(self, chunk: int) -> Panels:
        if self._kept is not None:
            return self._kept
        packed = self._pack(self.right[chunk : chunk + self.chunk], "right")
        if len(self.chunks) == 1:
            self._kept = packed
        return packed

    def greatest(self) -> Panels:
        """The greatest sizes of all right rows, as of one: they bound every tile of a left row."""
        if self._greatest is None:
            self._greatest = greatest_of(self._right_side(chunk) for chunk in self.chunks)
        return self._greatest

    def left_side(self, first: int, last: int, raised: bool = False) -> tuple[Panels, np.ndarray]:
        """Pack a group; return it and how far its tiles can be from the pair kernel, per row.

        With `raised`, tiles tell upper bounds.
        """
        side = self._pack(self.left[first:last], "left")
        bound = tile_bound(side, self.greatest(), self.plan)
        if raised:
            raise_biases(side, bound)
        return side, bound

    def right_slack(self) -> np.ndarray:
        """Return (n',) float32: what `left_side` tells of left rows, of the right rows."""
        greatest = self.greatest()
        parts = [tile_bound(self._right_side(chunk), greatest, self.plan) for chunk in self.chunks]
        return np.concatenate(parts)

    def run(
        self, left: Panels, first: int, work: Callable[[cpu.Walk, Task], _Result]
    ) -> Iterator[tuple[cpu.Walk, Task, _Result]]:
        """Run ``work(walk, task)`` in threads over blocks of the left panels of one group.

        A task holds all right panels of a chunk. Yield walk, task and result in order, for every
        chunk of right rows again.
        """
        for chunk in self.chunks:
            right = self._right_side(chunk)
            walk = self._meet(left, right, (first, chunk))
            yield from self.run_blocks(walk, range(walk.left_panels), _PANELS_A_TASK, work)
            del right  # before the next one is packed

    def _meet(
        self, left: Panels, right: Panels, first: tuple[int, int], triangle: bool = False
    ) -> cpu.Walk:
        step = self._frame.step
        return cpu.make_walk(left, right, self.plan, step, first, self.distinct, triangle)

    def run_blocks(
        self,
        walk: cpu.Walk,
        panels: range,
        size: int,
        work: Callable[[cpu.Walk, Task], _Result],
    ) -> Iterator[tuple[cpu.Walk, Task, _Result]]:
        """Run ``work(walk, task)`` over blocks of `size` of the left panels `panels`, in order."""
        tasks = [
            (low, min(low + size, panels.stop), 0, walk.right_panels)
            for low in range(panels.start, panels.stop, size)
        ]
        # Kernels know the panels by address: they must be done before the panels go.
        with closing(run_ordered(lambda task: work(walk, task), tasks, self.threads)) as results:
            for task, result in zip(tasks, results, strict=True):
                yield walk, task, result

    # --- the upper triangle ---

    def fits_triangle(self, result_bytes: int) -> bool:
        """Whether one table's panels, both sides, and `result_bytes` a row fit into the memory."""
        needed = len(self.left) * (2 * self.row_bytes + result_bytes)
        return not self.distinct and len(self.left) > 0 and needed <= self.memory * 3 // 4

    def triangle(self, raised: bool = False) -> Triangle:
        """Pack both sides of one table whole; with `raised`, tiles tell upper bounds."""
        left, right = self._pack(self.left, "left"), self._right_side(0)
        bounds = split_bound(left, right, self.plan)
        if raised:
            raise_biases(left, bounds[0])
            raise_biases(right, bounds[1])
            self._kept = None  # whoever walks on without the triangle needs them as they were
        block = _rows_within(_BLOCK_BYTES, 4 * row_words(self.plan, self.form), _BOTH_WIDTHS)
        share = len(self.left) // (_BLOCKS_A_THREAD * self.threads)
        block = min(block, max(share // _BOTH_WIDTHS, _LEAST_BLOCK) * _BOTH_WIDTHS)
        walk = self._meet(left, right, (0, 0), True)
        return Triangle(walk, (left, right), bounds, block, self.threads)


def greatest_of(parts: Iterable[Panels]) -> Panels:
    """Return the greatest sizes of all rows of some right sides, as of one row."""
    names = ("size", "length", "norm", "error", "drift")
    greatest, form = np.zeros((len(names), 1)), "float32"
    for side in parts:
        form = side.form
        for own, name in zip(greatest, names, strict=True):
            np.maximum(own, getattr(side, name).max(initial=0), out=own)
        del side  # before the next one is packed
    return Panels(np.empty((0, 0)), form, "right", *greatest)


class Triangle:
    """The pairs (i, j), i < j, of one table: blocks of rows against blocks of rows.

    Parameters
    ----------
    walk : what kernels walk.
    sides : the panels, kept alive.
    bounds : two (n,) float32; a pair's tile is no further from the pair kernel than the sum of the
        first of its left and the second of its right row.
    block : rows of a block.
    threads : number of threads.
    """

    def __init__(
        self,
        walk: cpu.Walk,
        sides: tuple[Panels, Panels],
        bounds: tuple[np.ndarray, np.ndarray],
        block: int,
        threads: int,
    ) -> None:
        self.walk, self.sides, self.bounds = walk, sides, bounds
        self.block, self.threads = block, threads
        self.blocks = -(-walk.left_count // block)

    def task(self, i: int, j: int) -> Task:
        """The panels of row block i and column block j."""
        left, right = self.block // TILE_ROWS, self.block // TILE_COLUMNS
        return (
            i * left,
            min((i + 1) * left, self.walk.left_panels),
            j * right,
            min((j + 1) * right, self.walk.right_panels),
        )

    def rows(self, block: int) -> range:
        """The rows of a block."""
        return range(block * self.block, min((block + 1) * self.block, self.walk.left_count))

    def pairs(self, i: int, j: int) -> int:
        """How many pairs a task answers for, each in both directions."""
        return len(self.rows(i)) * len(self.rows(j)) * (1 if i == j else 2)

    def run(self, work: Callable[[Task], None]) -> Iterator[tuple[int, int]]:
        """Run ``work(task)`` so that for each row partners come in rising order, one task a time.

        Yield the row block and the column block of what is done. When the last column block of a
        row block is, nothing touches the rows of this and of earlier row blocks any more.
        """
        with closing(
            run_triangle(lambda i, j: work(self.task(i, j)), self.blocks, self.threads)
        ) as tasks:
            yield from tasks


def run_triangle(
    work: Callable[[int, int], None], blocks: int, threads: int
) -> Generator[tuple[int, int], None, None]:
    """Call ``work(i, j)`` for 0 <= i <= j < blocks in threads; yield (i, j) when it is done.

    Calls that share a block, as i or as j, never run at once and come in rising order of the
    other one: (i, j) waits for (i, j - 1) and (i - 1, j), the tasks move as a wave front.
    """
    following = list(range(blocks))  # the next column of each row
    busy = [False] * blocks
    change = threading.Condition()
    finished: SimpleQueue[tuple[int, int] | BaseException] = SimpleQueue()
    stopped = False

    def next_row() -> int | None:
        """A row whose next task may run; -1 when none is left; None when one must wait."""
        waiting = False
        for row in range(blocks):
            if following[row] == blocks:
                continue
            if not busy[row] and (row == 0 or following[row - 1] > following[row]):
                return row
            waiting = True
            if following[row] == row:
                break  # not begun: nor are those below
        return None if waiting else -1

    def loop() -> None:
        while True:
            with change:
                row = next_row()
                while row is None and not stopped:
                    change.wait()
                    row = next_row()
                if stopped or row is None or row < 0:
                    return
                busy[row], column = True, following[row]
            try:
                work(row, column)
            except BaseException as error:
                finished.put(error)
                return
            with change:
                busy[row], following[row] = False, column + 1
                change.notify_all()
            finished.put((row, column))

    workers: list[threading.Thread] = []
    try:
        for n in range(threads):
            workers.append(threading.Thread(target=loop, name=f"fastpair-{n}", daemon=True))
            workers[-1].start()
        for _ in range(blocks * (blocks + 1) // 2):
            done = finished.get()
            if isinstance(done, BaseException):
                raise done
            yield done
    finally:
        with change:
            stopped = True
            change.notify_all()
        for worker in workers:
            if worker.ident is not None:  # an interrupt may have come before its start
                worker.join()


def _rows_within(memory: int, row_bytes: int, width: int) -> int:
    """Rows, whole panels of `width` and at least one, that fit into a memory."""
    return max(width, memory // max(1, row_bytes) // width * width)


# --- which form scans ----------------------------------------------------------------------------

_SAMPLE = 32, 2048
"""Left and right rows that a choice looks at."""

_LEAST_PAIRS = 1 << 24
"""Below this a choice and another packing cost more than they gain."""

_HIT_CYCLES = 400
"""What a pair costs that a scan cannot rule out, against 1 for a word of 16 pairs."""


def choose_form(
    left: np.ndarray,
    right: np.ndarray | None,
    plan: Plan,
    *,
    k: int | None = None,
    floor: float | None = None,
) -> str:
    """Return the form of panels in which a scan for the k best or for a raw floor costs least.

    A sample of the pairs tells how many pairs the error of a form would leave undecided.

    Parameters
    ----------
    left, right, plan : as `Sides` takes them.
    k : how many right rows are wanted of each left row; or
    floor : the least raw score of what is wanted.
    """
    products = operand_counts(plan)[0]
    others = left if right is None else right
    small = len(left) * len(others) < _LEAST_PAIRS
    if small or len(FORMS) == 1:
        return "float32"
    forms = [f for f in FORMS if f != "int8" or products <= MOST_BYTE_COLUMNS]
    raw_plan = replace(plan, link="identity", slope=1.0, offset=0.0)
    first, second = _evenly(len(left), _SAMPLE[0]), _evenly(len(others), _SAMPLE[1])
    some, many = _aligned(left[first]), _aligned(others[second])
    itself = (first[:, None] == second) & (right is None)
    costs = {}
    raw = np.empty((len(some), len(many)), np.float32)
    for form in forms:
        sides = Sides(some, many, raw_plan, form, 1, 1 << 40)
        panels, slack = sides.left_side(0, len(some))
        if form == "float32":
            for walk, task, _ in sides.run(panels, 0, lambda walk, task: None):
                table = cpu.table_arguments(some, many, raw_plan)
                cpu.scan_dense(table, walk, task, slack, np.zeros_like(raw[0]), raw)
            raw[itself] = -np.inf
            if k is not None:
                place = min(max(1, round(k * len(many) / len(others))), len(many))
                best = np.partition(raw, len(many) - place, axis=1)[:, len(many) - place]
        needed = best - 2 * slack if k is not None else floor - slack
        share = float((raw >= np.asarray(needed)[:, None]).mean())
        products, *maxima = word_counts(plan, form)
        costs[form] = (products + 4 * sum(maxima)) / 16 + share * _HIT_CYCLES
    return min(costs, key=lambda form: costs[form])


def _evenly(rows: int, count: int) -> np.ndarray:
    """Numbers of at most `count` rows, evenly spaced."""
    return np.arange(min(count, rows)) * rows // min(count, rows)


def _aligned(rows: np.ndarray) -> np.ndarray:
    """A copy on the boundary that kernels want."""
    copy = aligned_empty(rows.shape, np.uint8)
    copy[:] = rows
    return copy
