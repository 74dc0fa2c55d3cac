"""All pairs of one or two tables: which tiles are walked, and what is kept of them.

Left rows are taken in groups, right rows in chunks, as large as the memory allows. For each chunk
threads walk blocks of left panels; a reduction (top-k, threshold, dense, histogram) keeps what it
wants and hands on finished left rows in order. Results do not depend on groups, chunks or threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from fastpair.backend import memory_budget, run_ordered, thread_count
from fastpair.errors import ArgumentError, MemoryBudgetError
from fastpair.kernels import Plan, aligned_empty, cpu
from fastpair.kernels.operands import (
    Operand,
    column_shifts,
    make_operand,
    operand_counts,
    pack_panels,
    tile_bound,
)
from fastpair.kernels.simd import TILE_COLUMNS, TILE_ROWS
from fastpair.scoring import PairScorer

Progress = Callable[[int], None]
"""Called with the number of pairs that have been walked since the last call."""

_Result = TypeVar("_Result")
_RowHits = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Counts of some rows, then indices and scores of their pairs above a threshold."""
_Hits = tuple[int, np.ndarray, np.ndarray, np.ndarray]
"""The same behind the number of the first row."""

_PANELS_A_TASK = 16
_ROWS_PACKED_AT_ONCE = 1024
_HITS_A_TASK = 1 << 16
_HIT_BYTES = 8 + 8 + 4 + 8 + 4


@dataclass
class _Side:
    """Packed panels of one side and what bounds their error."""

    columns: np.ndarray
    bias: np.ndarray
    size: np.ndarray
    length: np.ndarray


def _pack(
    rows: np.ndarray, plan: Plan, side: str, shifts: dict[str, np.ndarray], threads: int
) -> _Side:
    width = TILE_ROWS if side == "left" else TILE_COLUMNS
    panels = -(-len(rows) // width)
    packed = _Side(
        aligned_empty((panels, sum(operand_counts(plan)), width), np.float32),
        aligned_empty((panels, width), np.float32),
        np.empty(len(rows)),
        np.empty(len(rows)),
    )
    step = max(1, _ROWS_PACKED_AT_ONCE // width)

    def fill(first: int) -> None:
        here = slice(first * width, min((first + step) * width, len(rows)))
        operand = make_operand(rows[here], plan, side, shifts)
        last = min(first + step, panels)
        pack_panels(operand, width, packed.columns[first:last], packed.bias[first:last], -np.inf)
        packed.size[here], packed.length[here] = operand.size, operand.length

    for _ in run_ordered(fill, range(0, panels, step), threads):
        pass
    return packed


class AllPairs:
    """All pairs of the rows of one table, or of a left and a right table.

    Parameters
    ----------
    left : (n, row_bytes) uint8 rows of a table.
    right : (n', row_bytes) uint8 rows of a table with the same plan, or None: one table, whose
        pairs (i, i) are left out of every result but the dense one.
    plan : the plan of both.
    threads : number of threads; default one for each processor.
    memory : bytes, or a text such as "2GiB", that may be allocated beside the tables.
    progress : called with numbers of pairs walked.
    """

    def __init__(
        self,
        left: np.ndarray,
        right: np.ndarray | None,
        plan: Plan,
        *,
        threads: int | None = None,
        memory: int | str | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.left, self.right = left, left if right is None else right
        self.distinct = right is not None
        self.plan = plan
        self.threads = thread_count(threads)
        self.memory = memory_budget(memory)
        self.progress = progress or (lambda pairs: None)
        self.table = cpu.table_arguments(self.left, self.right, plan)
        self._column_bytes = 4 * max(1, sum(operand_counts(plan))) + 4 + 16
        self._chunk = self._rows_within(self.memory // 2, self._column_bytes, TILE_COLUMNS)
        self._chunks = range(0, max(1, len(self.right)), self._chunk)
        self._shifts = column_shifts(self.right, plan)
        self._kept: _Side | None = None
        self._greatest: tuple[float, float] | None = None

    # --- the walk ---

    def _rows_within(self, memory: int, row_bytes: int, width: int) -> int:
        return max(width, memory // row_bytes // width * width)

    def _groups(self, result_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield (first, last) left rows that are finished together."""
        share = self.memory - min(len(self.right), self._chunk) * self._column_bytes
        step = self._rows_within(share * 3 // 4, self._column_bytes + result_bytes, TILE_ROWS)
        if TILE_ROWS * (self._column_bytes + result_bytes) > share:
            raise MemoryBudgetError(
                f"a few rows of the result need {TILE_ROWS * result_bytes} bytes, more than the "
                f"{max(share, 0)} that the memory leaves: allow more memory"
            )
        for first in range(0, len(self.left), step):
            yield first, min(first + step, len(self.left))

    def _right_side(self, chunk: int) -> _Side:
        if self._kept is not None:
            return self._kept
        rows = self.right[chunk : chunk + self._chunk]
        packed = _pack(rows, self.plan, "right", self._shifts, self.threads)
        if len(self._chunks) == 1:
            self._kept = packed
        return packed

    def _right_greatest(self) -> tuple[float, float]:
        """Greatest size and length over all right rows: they bound every tile of a left row."""
        if self._greatest is None:
            sizes = []
            for chunk in self._chunks:
                side = self._right_side(chunk)
                sizes.append((side.size.max(initial=0), side.length.max(initial=0)))
            self._greatest = tuple(np.max(sizes, axis=0).tolist())  # type: ignore[assignment]
        assert self._greatest is not None
        return self._greatest

    def _left_side(self, first: int, last: int) -> tuple[_Side, np.ndarray]:
        """Pack a group; return it and how far its tiles can be from the pair kernel, per row."""
        side = _pack(self.left[first:last], self.plan, "left", self._shifts, self.threads)
        operand = Operand(
            np.empty((0, 0)), np.empty(0), operand_counts(self.plan), side.size, side.length
        )
        return side, tile_bound(operand, *self._right_greatest(), self.plan)

    def _panels(self, left: _Side, first: int, last: int) -> Iterator[cpu.Panels]:
        """Yield what kernels walk: a group of left rows with each chunk of right rows."""
        for chunk in self._chunks:
            right = self._right_side(chunk)
            yield cpu.make_panels(
                (left.columns, left.bias),
                (right.columns, right.bias),
                operand_counts(self.plan),
                self.plan.constant,
                (first, chunk),
                (last - first, len(right.size)),
                self.distinct,
            )

    def _walk(
        self, left: _Side, first: int, last: int, work: Callable[[cpu.Panels, int, int], _Result]
    ) -> Iterator[tuple[int, _Result]]:
        """Run ``work(panels, low, high)`` in threads over blocks of left panels of one group.

        Yield the first row of each block, counted from the group, and what work returned; for
        every chunk of right rows again.
        """
        for panels in self._panels(left, first, last):
            for low, high, result in self._run(panels, _PANELS_A_TASK, 0, work):
                rows = min(high * TILE_ROWS, panels.left_count) - low * TILE_ROWS
                if isinstance(result, _TooMany):
                    for piece, _, part in self._run(panels, 1, low, work, high):
                        yield piece * TILE_ROWS, part
                else:
                    yield low * TILE_ROWS, result
                self.progress(rows * panels.right_count)

    def _run(
        self,
        panels: cpu.Panels,
        size: int,
        first: int,
        work: Callable[[cpu.Panels, int, int], _Result],
        last: int | None = None,
    ) -> Iterator[tuple[int, int, _Result]]:
        """Yield (low, high, result) for blocks of `size` left panels, in order."""
        end = panels.left_panels if last is None else last
        tasks = [(panels, low, min(low + size, end)) for low in range(first, end, size)]
        # Kernels know the panels by address: they must be done before the panels go.
        with closing(run_ordered(lambda task: work(*task), tasks, self.threads)) as results:
            for (_, low, high), result in zip(tasks, results, strict=True):
                yield low, high, result

    # --- the reductions ---

    def top_k(self, k: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield the k best right rows of each left row.

        Yields
        ------
        first : number of the first left row.
        scores : (rows, k) float32 by the pair kernel, falling; NaN where there are fewer than k.
        indices : (rows, k) int64; equal scores by lower index; -1 where there are fewer than k.

        Raises
        ------
        ArgumentError : k is below 1.
        """
        if k < 1:
            raise ArgumentError(f"k is {k}, expected at least 1")
        kept = max(1, min(k, len(self.right)))
        capacity = min(2 * kept + 16, len(self.right) + 1)
        for first, last in self._groups(capacity * 12 + k * 12 + 24):
            yield (first, *self._top_k_of(first, last, k, kept, capacity))

    def _top_k_of(
        self, first: int, last: int, k: int, kept: int, capacity: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the `kept` best of a group among candidates; columns past `kept` stay empty."""
        rows = last - first
        left, slack = self._left_side(first, last)
        floor, filled = np.full(rows, cpu.LOWEST), np.zeros(rows, dtype=np.int64)
        values = np.empty((rows, capacity), dtype=np.float32)
        columns = np.empty((rows, capacity), dtype=np.int64)
        scores = np.full((rows, k), np.nan, dtype=np.float32)
        indices = np.full((rows, k), -1, dtype=np.int64)

        def scan(panels: cpu.Panels, low: int, high: int) -> None:
            cpu.scan_top_k(
                self.table, panels, low, high, kept, slack, floor, filled, values, columns
            )

        def finish(low: int) -> None:
            high = min(low + step, rows)
            cpu.finish_top_k(
                self.table, first, low, high, kept, slack, filled, values, columns, scores, indices
            )

        _exhaust(self._walk(left, first, last, scan))
        step = _PANELS_A_TASK * TILE_ROWS
        _exhaust(run_ordered(finish, range(0, rows, step), self.threads))
        return scores, indices

    def above(self, threshold: float) -> Iterator[_Hits]:
        """Yield every pair that scores at least `threshold`, left rows in order.

        Yields
        ------
        first : number of the first left row.
        counts : (rows,) int64, pairs of each row.
        indices : int64, the right rows, rising within a row.
        scores : float32 by the pair kernel, like `indices`.
        """
        if not np.isfinite(threshold):
            raise ArgumentError(f"threshold is {threshold}, expected a finite number")
        single = len(self._chunks) == 1
        for first, last in self._groups(0 if single else _HIT_BYTES):
            left, slack = self._left_side(first, last)
            floor = self.plan.raw_floor(threshold) - slack.astype(np.float64)
            floor = np.clip(floor, cpu.LOWEST, -cpu.LOWEST).astype(np.float32)
            floor = np.nextafter(floor, cpu.LOWEST)
            work = _ThresholdTask(self, _at_least(threshold), floor)
            found = self._walk(left, first, last, work)
            if single:
                yield from ((first + low, *hits) for low, hits in found)
            else:
                yield (first, *_merge(self._bounded(found), last - first))

    def _bounded(self, parts: Iterator[tuple[int, _RowHits]]) -> list[_Hits]:
        """Collect hits of a group as long as they stay within a quarter of the memory."""
        collected: list[_Hits] = []
        held = 0
        for low, hits in parts:
            collected.append((low, *hits))
            held += hits[1].nbytes + hits[2].nbytes
            if 4 * held > self.memory:
                raise MemoryBudgetError(
                    f"the threshold keeps {held} bytes of pairs at once, more than a quarter of "
                    "the memory: raise the threshold or allow more memory"
                )
        return collected

    def dense(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, (rows, n') float32): the tiles' scores of every pair."""
        for first, last in self._groups(2 * 4 * len(self.right)):  # one is used, one is filled
            scores = np.empty((last - first, len(self.right)), dtype=np.float32)
            left, slack = self._left_side(first, last)

            def scan(
                panels: cpu.Panels,
                low: int,
                high: int,
                slack: np.ndarray = slack,
                out: np.ndarray = scores,
            ) -> None:
                chunk = slice(panels.first_right, panels.first_right + panels.right_count)
                cpu.scan_dense(self.table, panels, low, high, slack, out[:, chunk])

            _exhaust(self._walk(left, first, last, scan))
            yield first, scores

    def histogram(self, bins: int = 100) -> tuple[np.ndarray, np.ndarray]:
        """Count all scores, exactly, in equal bins between the least and the greatest.

        In one table each pair counts twice, as (i, j) and (j, i), as in the result of a threshold.

        Returns
        -------
        edges : (bins + 1,) float32; a bin holds its lower edge, the last one both.
        counts : (bins,) int64; what rounding leaves outside the edges is in the outer bins.

        Raises
        ------
        ArgumentError : bins is below 1, or there is no pair.
        """
        if bins < 1:
            raise ArgumentError(f"bins is {bins}, expected at least 1")
        least, greatest = self._score_range()
        edges = np.linspace(least, greatest, bins + 1, dtype=np.float64).astype(np.float32)
        counts = np.zeros(bins, dtype=np.int64)
        for first, last in self._groups(8):
            left, slack = self._left_side(first, last)

            def count(
                panels: cpu.Panels, low: int, high: int, slack: np.ndarray = slack
            ) -> np.ndarray:
                own = np.zeros(bins, dtype=np.int64)
                cpu.scan_histogram(self.table, panels, low, high, edges, slack, own)
                return own

            for _, own in self._walk(left, first, last, count):
                counts += own
        return edges, counts

    def _score_range(self) -> tuple[float, float]:
        least, greatest = np.float32(np.inf), np.float32(-np.inf)
        for first, last in self._groups(8):
            left, _ = self._left_side(first, last)
            for _, (low, high) in self._walk(left, first, last, cpu.scan_range):
                least, greatest = min(least, low), max(greatest, high)
        if least > greatest:
            raise ArgumentError("there is no pair to count: the table has fewer than two rows")
        scores = cpu.link_scores(np.array([least, greatest], dtype=np.float32), self.table)
        return float(scores[0]), float(scores[1])


class NetworkPairs:
    """All pairs where a network compares them: every pair is gathered and multiplied, slowly.

    Parameters and results are those of `AllPairs`.
    """

    def __init__(
        self,
        left: np.ndarray,
        right: np.ndarray | None,
        plan: Plan,
        *,
        threads: int | None = None,
        memory: int | str | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.left, self.right = left, left if right is None else right
        self.distinct = right is not None
        self.scorer = PairScorer(self.left, plan, self.right, plan, threads=threads)
        self.threads, self.memory = self.scorer.threads, memory_budget(memory)
        self.progress = progress or (lambda pairs: None)

    def _scores(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, scores (rows, n') float32) of groups of left rows."""
        width = max(len(self.right), 1)
        bytes_a_pair = 4 * 8 + 2 * 4 + 3 * 8  # row numbers, scores, and what a reduction sorts
        step = self.memory // 2 // (width * bytes_a_pair)
        if step < 1:
            raise MemoryBudgetError(
                f"a row of the result needs {width * bytes_a_pair} bytes, more than half of the "
                "memory: allow more memory"
            )
        step = min(step, max(1, (1 << 22) // width))
        for first in range(0, len(self.left), step):
            rows = np.arange(first, min(first + step, len(self.left)))
            left, right = np.repeat(rows, len(self.right)), np.tile(np.arange(width), len(rows))
            scores = self.scorer(left, right[: len(left)]).reshape(len(rows), len(self.right))
            self.progress(scores.size)
            yield first, scores

    def _off_diagonal(self, first: int, shape: tuple[int, int]) -> np.ndarray:
        """Return which pairs count: in one table, all but those of a row with itself."""
        rows = np.arange(first, first + shape[0])[:, None]
        return np.full(shape, True) if self.distinct else rows != np.arange(shape[1])

    def top_k(self, k: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield the k best right rows of each left row, as `AllPairs.top_k`."""
        if k < 1:
            raise ArgumentError(f"k is {k}, expected at least 1")
        for first, scores in self._scores():
            scores[~self._off_diagonal(first, scores.shape)] = -np.inf
            best = np.full((len(scores), k), np.nan, np.float32)
            indices = np.full((len(scores), k), -1, np.int64)
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            count = min(k, scores.shape[1] - (not self.distinct))
            indices[:, :count] = order[:, :count]
            best[:, :count] = np.take_along_axis(scores, order[:, :count], axis=1)
            yield first, best, indices

    def above(self, threshold: float) -> Iterator[_Hits]:
        """Yield every pair that scores at least `threshold`, as `AllPairs.above`."""
        if not np.isfinite(threshold):
            raise ArgumentError(f"threshold is {threshold}, expected a finite number")
        for first, scores in self._scores():
            hits = (scores >= _at_least(threshold)) & self._off_diagonal(first, scores.shape)
            rows, columns = np.nonzero(hits)
            yield first, np.bincount(rows, minlength=len(scores)), columns, scores[rows, columns]

    def dense(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, (rows, n') float32), as `AllPairs.dense`."""
        return self._scores()

    def histogram(self, bins: int = 100) -> tuple[np.ndarray, np.ndarray]:
        """Count all scores in equal bins, as `AllPairs.histogram`."""
        if bins < 1:
            raise ArgumentError(f"bins is {bins}, expected at least 1")
        least, greatest = np.inf, -np.inf
        for first, scores in self._scores():
            chosen = scores[self._off_diagonal(first, scores.shape)]
            least = min(least, chosen.min(initial=np.inf))
            greatest = max(greatest, chosen.max(initial=-np.inf))
        if least > greatest:
            raise ArgumentError("there is no pair to count: the table has fewer than two rows")
        edges = np.linspace(least, greatest, bins + 1).astype(np.float32)
        counts = np.zeros(bins, dtype=np.int64)
        for first, scores in self._scores():
            chosen = scores[self._off_diagonal(first, scores.shape)]
            inner = np.searchsorted(edges[1:-1], chosen, side="right")
            counts += np.bincount(inner, minlength=bins)
        return edges, counts


def all_pairs(
    left: np.ndarray, right: np.ndarray | None, plan: Plan, **options: Any
) -> AllPairs | NetworkPairs:
    """Return what walks all pairs of tables of this plan; see `AllPairs` for the parameters."""
    walk = AllPairs if plan.network is None else NetworkPairs
    return walk(left, right, plan, **options)


class _TooMany:
    """What a task returns whose hits do not fit: its panels are then taken one at a time."""


class _ThresholdTask:
    """Collects one block's hits, row by row."""

    def __init__(self, pairs: AllPairs, minimum: np.float32, floor: np.ndarray) -> None:
        self.table = pairs.table
        self.minimum, self.floor = minimum, floor
        self.most = max(_HITS_A_TASK, pairs.memory // (8 * pairs.threads * _HIT_BYTES))

    def __call__(self, panels: cpu.Panels, first: int, last: int) -> Any:
        """Return the hits, or `_TooMany` where several panels have more than the memory bears."""
        room = _HITS_A_TASK
        found, hits = self._scan(panels, first, last, room)
        if found > room:
            if found > self.most and last - first > 1:
                return _TooMany()
            found, hits = self._scan(panels, first, last, found)
        rows, columns, scores = (part[:found] for part in hits)
        low = first * TILE_ROWS
        counts = np.empty(min(last * TILE_ROWS, panels.left_count) - low, dtype=np.int64)
        indices, values = np.empty_like(columns), np.empty_like(scores)
        cpu.group_by_row(rows - low, counts, columns, scores, indices, values)
        return counts, indices, values

    def _scan(
        self, panels: cpu.Panels, first: int, last: int, room: int
    ) -> tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        rows, columns = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int64)
        scores = np.empty(room, dtype=np.float32)
        found = cpu.scan_threshold(
            self.table, panels, first, last, self.minimum, self.floor, rows, columns, scores
        )
        return found, (rows, columns, scores)


def _at_least(threshold: float) -> np.float32:
    """Return the least float32 that is not below a threshold."""
    with np.errstate(over="ignore"):  # infinity is right for what no float32 reaches
        nearest = np.float32(threshold)
    return nearest if float(nearest) >= threshold else np.nextafter(nearest, np.float32(np.inf))


def _exhaust(results: Iterable[object]) -> None:
    for _ in results:
        pass


def _merge(parts: list[_Hits], rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bring hits of several chunks into row order; chunks come in rising columns."""
    counts = np.zeros(rows, dtype=np.int64)
    owners = []
    for low, own, _, _ in parts:
        counts[low : low + len(own)] += own
        owners.append(np.repeat(np.arange(low, low + len(own)), own))
    owner = np.concatenate(owners)
    order = np.argsort(owner, kind="stable")
    indices = np.concatenate([part[2] for part in parts])[order]
    return counts, indices, np.concatenate([part[3] for part in parts])[order]
