"""Pair stream -> kernels -> score stream: blocks are read ahead, scored in threads, written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol, TypeVar

import numpy as np

from fastpair.backend import read_ahead, thread_count
from fastpair.errors import ArgumentError, DataError, MismatchError
from fastpair.folding import common_scales
from fastpair.kernels import Plan
from fastpair.kernels.network import NetworkTables

PAIRS_A_TASK = 1 << 16
"""Pairs that one thread scores before it takes the next ones: about 3 ms of work."""


class _Block(Protocol):
    """A block of pairs, as `fastpair.pairs` reads it."""

    @property
    def left(self) -> np.ndarray: ...
    @property
    def right(self) -> np.ndarray: ...


_AnyBlock = TypeVar("_AnyBlock", bound=_Block)


class PairScorer:
    """Scores pairs of rows of one table, or of a left and a right table, in threads.

    Parameters
    ----------
    left_rows : (n, row_bytes) uint8 rows of a table.
    plan : its plan.
    right_rows : (n', row_bytes) uint8 rows of the right table; None: the same table.
    right_plan : its plan; it must differ in nothing but int8 scales.
    threads : number of threads; default one for each processor.

    Raises
    ------
    MismatchError : the tables do not have the same plan.
    """

    def __init__(
        self,
        left_rows: np.ndarray,
        plan: Plan,
        right_rows: np.ndarray | None = None,
        right_plan: Plan | None = None,
        *,
        threads: int | None = None,
    ) -> None:
        self.threads = thread_count(threads)
        self.left_count = len(left_rows)
        self.right_count = self.left_count if right_rows is None else len(right_rows)
        if right_rows is None:
            right_rows = left_rows
        elif right_plan is not None:
            left_rows, right_rows, plan = meet(left_rows, plan, right_rows, right_plan)
        self._rows = left_rows, right_rows  # kernels know only their addresses
        self._score = _worker(left_rows, right_rows, plan)

    def __call__(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return the scores (m,) float32 of pairs of row numbers `left` and `right`, (m,) each.

        Raises
        ------
        DataError : a row number is negative or past the table's end.
        """
        left, right = np.asarray(left), np.asarray(right)
        check_rows(left, self.left_count, "left")
        check_rows(right, self.right_count, "right")
        if left.shape != right.shape or left.ndim != 1:
            raise ArgumentError(f"left has shape {left.shape}, right {right.shape}, expected (m,)")
        scores = np.empty(len(left), dtype=np.float32)
        with ThreadPoolExecutor(self.threads, thread_name_prefix="fastpair") as pool:
            _wait(self._submit(pool, left, right, scores))
        return scores

    def stream(self, blocks: Iterable[_AnyBlock]) -> Iterator[tuple[_AnyBlock, np.ndarray]]:
        """Yield each block with its scores, in order; the next ones are under way meanwhile.

        The blocks' row numbers are checked again before a kernel sees them.
        """
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="fastpair")
        waiting: deque[tuple[_AnyBlock, np.ndarray, list[Future[None]]]] = deque()
        try:
            for block in read_ahead(blocks):
                check_rows(block.left, self.left_count, "left")
                check_rows(block.right, self.right_count, "right")
                scores = np.empty(len(block.left), dtype=np.float32)
                waiting.append((block, scores, self._submit(pool, block.left, block.right, scores)))
                if len(waiting) > 1:
                    yield _scored(*waiting.popleft())
            while waiting:
                yield _scored(*waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _submit(
        self, pool: ThreadPoolExecutor, left: np.ndarray, right: np.ndarray, scores: np.ndarray
    ) -> list[Future[None]]:
        ranges = (
            slice(start, start + PAIRS_A_TASK) for start in range(0, len(scores), PAIRS_A_TASK)
        )
        return [pool.submit(self._score, left[r], right[r], scores[r]) for r in ranges]


def _worker(
    left_rows: np.ndarray, right_rows: np.ndarray, plan: Plan
) -> Callable[[np.ndarray, np.ndarray, np.ndarray], None]:
    """Return what fills the scores (m,) of left and right row numbers (m,), in any thread."""
    if plan.network is not None:
        return NetworkTables(left_rows, right_rows, plan).score
    from fastpair.kernels import cpu  # Numba: only those who score wait for it

    table = cpu.table_arguments(left_rows, right_rows, plan)
    return lambda left, right, scores: cpu.score_pairs(table, left, right, scores)


def _wait(tasks: list[Future[None]]) -> None:
    for task in tasks:
        task.result()


def _scored(
    block: _AnyBlock, scores: np.ndarray, tasks: list[Future[None]]
) -> tuple[_AnyBlock, np.ndarray]:
    _wait(tasks)
    return block, scores


def check_rows(rows: np.ndarray, count: int, side: str) -> None:
    """Refuse row numbers that are not in 0 to count - 1: a kernel must never see one."""
    if rows.dtype.kind not in "iu":
        raise DataError(f"{side} row numbers are {rows.dtype}, expected integers")
    if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= count):
        bad = int(np.flatnonzero((rows < 0) | (rows >= count))[0])
        raise DataError(
            f"pair {bad} has the {side} row number {rows[bad]}, expected 0 to {count - 1}"
        )


def meet(
    left_rows: np.ndarray,
    left_plan: Plan,
    right_rows: np.ndarray,
    right_plan: Plan,
    *,
    in_place: bool = False,
) -> tuple[np.ndarray, np.ndarray, Plan]:
    """Bring two tables to one plan; int8 tables may differ in scales and are rounded to the larger.

    With `in_place` the rows that are given are changed; by default, copies.

    Raises
    ------
    MismatchError : the plans differ in anything else.
    """
    if left_plan == right_plan:
        return left_rows, right_rows, left_plan
    scales = tuple(
        max(pair) for pair in zip(left_plan.segment_scales, right_plan.segment_scales, strict=True)
    )
    plan = replace(left_plan, segment_scales=scales)
    if plan != replace(right_plan, segment_scales=scales):
        raise MismatchError(
            "the two tables were not made by one model in one precision: project both again"
        )
    tables = ((left_rows, left_plan), (right_rows, right_plan))
    left, right = (
        common_scales(rows, own, scales, rows if in_place else None) for rows, own in tables
    )
    return left, right, plan


def distance_form(plan: Plan) -> Callable[[np.ndarray], np.ndarray] | None:
    """Return what turns scores (m,) float32 of a plan into distances, or None where there is none.

    The built-in euclidean and manhattan, hyperbolic (the Lorentz distance) and rbf
    (``1 - exp(-gamma d^2)``) are exact, calibrated or not. Learned differences have one if no
    weight is above 0 and nothing else is added: the sum of absolute differences, or the root of the
    squared ones, under the calibrated weights.
    """
    slope, offset = plan.slope, plan.offset
    if plan.link == "exponential":
        return lambda scores: 1 - (scores.astype(np.float64) - offset) / slope
    if plan.link in ("negative_root", "negative_arcosh"):
        return lambda scores: (offset - scores.astype(np.float64)) / slope
    product, maximum, mirrored, absolute, squared = plan.layout.columns
    others = any((*product, *maximum, *mirrored, absolute[0], squared[0])) or plan.layout.bias
    if plan.network is not None or others or (any(absolute) and any(squared)):
        return None
    shift = offset + slope * float(np.float32(plan.constant))
    if any(squared):
        return lambda scores: np.sqrt(np.maximum(shift - scores.astype(np.float64), 0))
    return lambda scores: shift - scores.astype(np.float64)
