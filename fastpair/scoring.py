"""Pair stream -> kernels -> score stream: blocks are read ahead, scored in threads, written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol, TypeVar

import numpy as np

from fastpair.backend import one_blas_thread, read_ahead, thread_count
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


AnyBlock = TypeVar("AnyBlock", bound=_Block)


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
        self._score, self._kept = row_scorer(left_rows, right_rows, plan)

    def __call__(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return the scores (m,) float32 of pairs of row numbers `left` and `right`, (m,) each.

        Raises
        ------
        DataError : a row number is negative or past the table's end.
        """
        left, right = np.asarray(left), np.asarray(right)
        if left.shape != right.shape or left.ndim != 1:
            raise ArgumentError(f"left has shape {left.shape}, right {right.shape}, expected (m,)")
        scores = np.empty(len(left), dtype=np.float32)
        with ThreadPoolExecutor(self.threads, thread_name_prefix="fastpair") as pool:
            _wait(self._submit(pool, left, right, scores))
        return scores

    def stream(self, blocks: Iterable[AnyBlock]) -> Iterator[tuple[AnyBlock, np.ndarray]]:
        """Yield each block with its scores, in order; the next ones are under way meanwhile.

        Row numbers are checked as they are scored.
        """
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="fastpair")
        waiting: deque[tuple[AnyBlock, np.ndarray, list[Future[None]]]] = deque()
        try:
            for block in read_ahead(blocks):
                scores = np.empty(len(block.left), dtype=np.float32)
                tasks = self._submit(pool, block.left, block.right, scores)
                waiting.append((block, scores, tasks))
                if len(waiting) > 1:
                    yield _scored(*waiting.popleft())
            while waiting:
                yield _scored(*waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _submit(
        self, pool: ThreadPoolExecutor, left: np.ndarray, right: np.ndarray, scores: np.ndarray
    ) -> list[Future[None]]:
        """Score pairs in tasks; one that meets a row number out of range fails with a DataError."""
        for rows, side in ((left, "left"), (right, "right")):
            check_kind(rows, side)

        def score(start: int) -> None:
            part = slice(start, start + PAIRS_A_TASK)
            if not self._score(left[part], right[part], scores[part]):
                check_rows(left[part], self.left_count, "left", start)
                check_rows(right[part], self.right_count, "right", start)

        return [pool.submit(score, start) for start in range(0, len(scores), PAIRS_A_TASK)]


RowScorer = Callable[[np.ndarray, np.ndarray, np.ndarray], bool]
"""Fills the scores (m,) of left and right row numbers (m,), in any thread.

It returns False, and has read no such row, if it met a row number out of range.
"""


def row_scorer(
    left_rows: np.ndarray,
    right_rows: np.ndarray,
    plan: Plan,
    fields: tuple[np.ndarray | None, np.ndarray | None] | None = None,
) -> tuple[RowScorer, object]:
    """Return what scores rows of two tables, and what must be kept as long.

    Kernels know addresses only. `fields` are those of both tables, as `separate_fields` gives them,
    where the caller has them already.
    """
    if plan.network is not None:
        tables = NetworkTables(left_rows, right_rows, plan)
        counts = len(left_rows), len(right_rows)

        def score_network(left: np.ndarray, right: np.ndarray, scores: np.ndarray) -> bool:
            if not (_in_range(left, counts[0]) and _in_range(right, counts[1])):
                return False
            with one_blas_thread():
                tables.score(left, right, scores)
            return True

        return score_network, tables
    from fastpair.kernels import pairs  # Numba: only those who score wait for it

    if fields is None:
        left_fields = pairs.separate_fields(left_rows, plan)
        same = right_rows is left_rows
        fields = left_fields, left_fields if same else pairs.separate_fields(right_rows, plan)
    rows, both = (left_rows, right_rows), None
    if fields[0] is not None and fields[1] is not None:
        both = fields[0], fields[1]
    table = pairs.table_arguments(*rows, plan, both)

    def score(left: np.ndarray, right: np.ndarray, scores: np.ndarray) -> bool:
        return pairs.score_pairs(table, left, right, scores) < 0

    return score, (rows, both)


def _wait(tasks: list[Future[None]]) -> None:
    for task in tasks:
        task.result()


def _scored(
    block: AnyBlock, scores: np.ndarray, tasks: list[Future[None]]
) -> tuple[AnyBlock, np.ndarray]:
    _wait(tasks)
    return block, scores


def check_kind(rows: np.ndarray, side: str) -> None:
    """Refuse row numbers that are not integers."""
    if rows.dtype.kind not in "iu":
        raise DataError(f"{side} row numbers are {rows.dtype}, expected integers")


def _in_range(rows: np.ndarray, count: int) -> bool:
    return not len(rows) or (int(rows.min()) >= 0 and int(rows.max()) < count)


def check_rows(rows: np.ndarray, count: int, side: str, first: int = 0) -> None:
    """Refuse row numbers that are not in 0 to count - 1; `first` is the first pair's number."""
    if not _in_range(rows, count):
        bad = int(np.flatnonzero((rows < 0) | (rows >= count))[0])
        raise DataError(
            f"pair {first + bad} has the {side} row number {rows[bad]}, expected 0 to {count - 1}"
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
    plan = common_plan(left_plan, right_plan)
    scales = plan.segment_scales
    tables = ((left_rows, left_plan), (right_rows, right_plan))
    left, right = (
        common_scales(rows, own, scales, rows if in_place else None) for rows, own in tables
    )
    return left, right, plan


def common_plan(left_plan: Plan, right_plan: Plan) -> Plan:
    """Return the plan of two tables that meet: the larger of each of their int8 scales.

    Raises
    ------
    MismatchError : the plans differ in anything else.
    """
    scales = tuple(
        max(pair) for pair in zip(left_plan.segment_scales, right_plan.segment_scales, strict=True)
    )
    plan = replace(left_plan, segment_scales=scales)
    if plan != replace(right_plan, segment_scales=scales):
        raise MismatchError(
            "the two tables were not made by one model in one precision: project both again"
        )
    return plan


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
