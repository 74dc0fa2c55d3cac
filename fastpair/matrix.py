"""All pairs of one or two tables, and what is kept of them: top-k, threshold, dense, histogram.

The walk (`fastpair.walk`) brings tiles of pairs; a reduction keeps what it wants and hands on
finished left rows in order. Results are those of the pair kernel and do not depend on how the
pairs were walked; dense values are the tiles' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from fastpair.backend import memory_budget, run_ordered, thread_count
from fastpair.errors import ArgumentError, MemoryBudgetError
from fastpair.kernels import Plan, cpu
from fastpair.kernels.operands import MOST_BYTE_COLUMNS, Panels, operand_counts
from fastpair.kernels.tile import FORMS, TILE_COLUMNS, TILE_ROWS
from fastpair.scoring import PairScorer
from fastpair.walk import Shared, Sides, Task, Triangle, choose_form

Progress = Callable[[int], None]
"""Called with the number of pairs that have been walked since the last call."""

_RowHits = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Counts of some rows, then indices and scores of their pairs above a threshold."""
_Hits = tuple[int, np.ndarray, np.ndarray, np.ndarray]
"""The same behind the number of the first row."""
_Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Rows, columns and scores of pairs, as a scan finds them."""

_ROWS_FINISHED_AT_ONCE = 1024
_ROWS_YIELDED, _PARTS_YIELDED = 4096, 64
"""The k best of a triangle come in parts of at least so many rows, at most so many of them."""
_HITS_A_TASK = 1 << 16
_CELLS = 1 << 13
"""Steps of the raw score in which a histogram looks bins up: they fit the first-level cache."""
_DENSE_BYTES = 1 << 27
"""Bytes of two groups of dense scores: enough rows to keep all threads busy."""

_HIT_BYTES = 8 + 8 + 4 + 8 + 4


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
    scan : how `top_k` and `above` find what they rescore: "float32", "bfloat16", "int8", or None,
        the one that costs least on this machine. The result is the same.
    shared : where these are parts of tables, what their dense values and the ends of their
        histogram share with the other parts.

    Attributes
    ----------
    scan : the form that the last reduction ran in.
    triangle : whether it walked each pair of one table once.
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
        scan: str | None = None,
        shared: Shared | None = None,
    ) -> None:
        if scan is not None and scan not in FORMS:
            raise ArgumentError(f"scan is {scan!r}, expected one of {', '.join(FORMS)} here")
        if scan == "int8" and operand_counts(plan)[0] > MOST_BYTE_COLUMNS:
            raise ArgumentError(
                f"scan is 'int8' for {operand_counts(plan)[0]} columns of products, expected at "
                f"most {MOST_BYTE_COLUMNS}: their sums do not fit 32 bits; leave scan out"
            )
        self.left, self.right = left, left if right is None else right
        self.distinct = right is not None
        self.plan = plan
        self.threads = thread_count(threads)
        self.memory = memory_budget(memory)
        self.progress = progress or (lambda pairs: None)
        self.table = cpu.table_arguments(self.left, self.right, plan)
        self._wanted_scan, self._shared = scan, shared
        self.scan, self.triangle = scan or "float32", False

    def _sides(self, **wanted: Any) -> Sides:
        """Return the sides of a walk in the form that finds what is wanted at least cost."""
        right = self.right if self.distinct else None
        self.triangle = False
        if wanted:
            self.scan = self._wanted_scan or choose_form(self.left, right, self.plan, **wanted)
        else:
            self.scan = "float32"
        options = self.scan, self.threads, self.memory, None if wanted else self._shared
        return Sides(self.left, right, self.plan, *options)

    def _walk(
        self, sides: Sides, first: int, last: int, work: Callable[[cpu.Walk, Task, np.ndarray], Any]
    ) -> Iterator[Any]:
        """Run ``work(walk, task, slack)`` over a group of left rows; yield what it returned."""
        left, slack = sides.left_side(first, last)
        for walk, task, result in sides.run(left, first, lambda w, task: work(w, task, slack)):
            yield result
            self.progress(_rows_of(walk, task) * walk.right_count)

    # --- top-k ---

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
        sides = self._sides(k=k)
        kept = max(1, min(k, len(self.right)))
        row_bytes = _Candidates.row_bytes(kept) + k * 12 + 4
        if sides.fits_triangle(row_bytes):
            self.triangle = True
            triangle = sides.triangle(raised=True)
            best = _Candidates(self, 0, len(self.left), kept)
            step, done = max(_ROWS_YIELDED, -(-len(self.left) // _PARTS_YIELDED)), 0
            for i, j in triangle.run(lambda task: best.scan(triangle.walk, task, *triangle.bounds)):
                self.progress(triangle.pairs(i, j))
                ready = triangle.rows(i).stop  # behind a row's last block, all above it is done
                if j == triangle.blocks - 1 and (ready - done >= step or ready == len(self.left)):
                    yield (done, *best.finish(k, done, ready))
                    done = ready
            return
        for first, last in sides.groups(row_bytes):
            left, bound = sides.left_side(first, last, raised=True)
            best = _Candidates(self, first, last - first, kept)
            nothing = np.zeros(min(len(self.right), sides.chunk), dtype=np.float32)

            def scan(
                walk: cpu.Walk,
                task: Task,
                best: _Candidates = best,
                bounds: tuple[np.ndarray, np.ndarray] = (bound, nothing),
            ) -> None:
                best.scan(walk, task, *bounds)

            for walk, task, _ in sides.run(left, first, scan):
                self.progress(_rows_of(walk, task) * walk.right_count)
            yield (first, *best.finish(k, 0, last - first))

    # --- threshold ---

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
        sides = self._sides(floor=self.plan.raw_floor(threshold))
        task = _ThresholdTask(self, threshold)
        done = 0
        if sides.fits_triangle(4):
            self.triangle = True
            for hits in self._mirrored(sides.triangle(raised=True), task):
                yield hits
                done = hits[0] + len(hits[1])
        yield from self._row_by_row(sides, task, done)

    def _mirrored(self, triangle: Triangle, task: _ThresholdTask) -> Iterator[_Hits]:
        """Yield the hits of blocks of rows; end early where they outgrow the memory.

        A pair found in the upper triangle waits for the block of its later row.
        """
        waiting: list[list[_Pairs]] = [[] for _ in range(triangle.blocks)]
        room = self.memory // 4 // _HIT_BYTES
        cells = [(i, j) for i in range(triangle.blocks) for j in range(i, triangle.blocks)]

        def search(cell: tuple[int, int]) -> _Pairs | None:
            most = room // (4 * self.threads)
            return task.search(triangle.walk, triangle.task(*cell), most)

        found = run_ordered(search, cells, self.threads)
        own: list[_Pairs] = []
        try:
            for (i, j), pairs in zip(cells, found, strict=True):
                room -= 0 if pairs is None else 2 * len(pairs[0])
                if pairs is None or room < 0:
                    return
                rows, columns, scores = pairs
                waiting[j].append((columns, rows, scores))
                own.append(pairs)
                if j == triangle.blocks - 1:
                    block = triangle.rows(i)
                    hits = pairs_by_row(waiting[i] + own, block.start, len(block))
                    room += len(hits[1])
                    waiting[i], own = [], []
                    yield (block.start, *hits)
                    self.progress(len(block) * triangle.walk.right_count)
        finally:
            found.close()

    def _row_by_row(self, sides: Sides, task: _ThresholdTask, start: int) -> Iterator[_Hits]:
        """Yield the hits of left rows from `start` on, each row walked against all right rows."""
        single = len(sides.chunks) == 1
        for first, last in sides.groups(0 if single else _HIT_BYTES, start):
            left, _ = sides.left_side(first, last, raised=True)
            found = self._row_hits(sides, left, first, task)
            if single:
                yield from ((first + low, *hits) for low, hits in found)
            else:
                yield (first, *_merge(self._bounded(found), last - first))

    def _row_hits(
        self, sides: Sides, left: Panels, first: int, task: _ThresholdTask
    ) -> Iterator[tuple[int, Any]]:
        """Yield (first row of the group, hits); where a task has too many, panel by panel."""
        for walk, cell, hits in sides.run(left, first, task.collect):
            if hits is None:
                panels = range(cell[0], cell[1])
                for _, small, part in sides.run_blocks(walk, panels, 1, task.collect):
                    yield small[0] * TILE_ROWS, part
            else:
                yield cell[0] * TILE_ROWS, hits
            self.progress(_rows_of(walk, cell) * walk.right_count)

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

    # --- dense and histogram ---

    def dense(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, (rows, n') float32): the tiles' scores of every pair.

        Those of one table are symmetric to the last bit. Rows go from `start` to `stop`, or to the
        last one.
        """
        sides = self._sides()
        # A pair of one table is decided alike both ways round.
        alike = not self.distinct or (self._shared is not None and self._shared.one_table)
        others = sides.right_slack() if alike else np.zeros(len(self.right), np.float32)
        # One group is used, one is filled; they are small, so that there is always one to write.
        for first, last in sides.groups(2 * 4 * len(self.right), start, _DENSE_BYTES, stop):
            scores = np.empty((last - first, len(self.right)), dtype=np.float32)

            def scan(
                walk: cpu.Walk, task: Task, slack: np.ndarray, out: np.ndarray = scores
            ) -> None:
                chunk = slice(walk.first_right, walk.first_right + walk.right_count)
                cpu.scan_dense(self.table, walk, task, slack, others[chunk], out[:, chunk])

            _exhaust(self._walk(sides, first, last, scan))
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
        check_bins(bins)
        sides = self._sides()
        ends = self.ends(sides)
        edges = self.edges(ends, bins)
        return edges, self.count(edges, ends, sides)

    def ends(
        self, sides: Sides | None = None, rows: tuple[int, int] | None = None
    ) -> tuple[float, float]:
        """Return the least and the greatest raw score of a tile; infinite if there is no pair.

        Parameters
        ----------
        sides : what `_sides` gave before, so that it is not packed again.
        rows : first and last of the left rows that count; None: all of them.
        """
        sides = sides or self._sides()
        ranges = self._parts(sides, lambda walk, task, slack: cpu.scan_range(walk, task), rows)
        least, greatest = np.float32(np.inf), np.float32(-np.inf)
        for low, high in ranges:
            least, greatest = min(least, low), max(greatest, high)
        return float(least), float(greatest)

    def edges(self, ends: tuple[float, float], bins: int) -> np.ndarray:
        """Return the edges (bins + 1,) float32 of equal bins between two raw scores."""
        scores = cpu.link_scores(np.array(at_least_one_pair(ends), dtype=np.float32), self.table)
        return np.linspace(float(scores[0]), float(scores[1]), bins + 1).astype(np.float32)

    def count(
        self,
        edges: np.ndarray,
        ends: tuple[float, float],
        sides: Sides | None = None,
        rows: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Count all scores in bins of these edges, as `histogram` does: (bins,) int64.

        `sides` and `rows` are those of `ends`.
        """
        sides, bins = sides or self._sides(), len(edges) - 1
        looked_up: dict[float, tuple[tuple[np.float32, np.float32], np.ndarray]] = {}

        def count(walk: cpu.Walk, task: Task, slack: np.ndarray) -> np.ndarray:
            own, most = np.zeros(bins, dtype=np.int64), float(slack.max())
            if most not in looked_up:
                looked_up[most] = histogram_cells(*ends, edges, most, self.table, _CELLS)
            cpu.scan_histogram(self.table, walk, task, edges, slack, *looked_up[most], own)
            return own

        counts = np.zeros(bins, dtype=np.int64)
        for own in self._parts(sides, count, rows):
            counts += own
        return counts * 2 if self.triangle else counts

    def _parts(
        self,
        sides: Sides,
        work: Callable[[cpu.Walk, Task, np.ndarray], Any],
        rows: tuple[int, int] | None,
    ) -> Iterator[Any]:
        """Yield ``work(walk, task, slack)`` over all pairs; of one table, where it fits, once.

        With `rows`, over the pairs of those left rows.
        """
        self.triangle = rows is None and sides.fits_triangle(4)
        if not self.triangle:
            begin, end = rows or (0, None)
            for first, last in sides.groups(8, begin, stop=end):
                yield from self._walk(sides, first, last, work)
            return
        triangle = sides.triangle()
        bound = triangle.bounds[0] + triangle.bounds[1].max()
        cells = [(i, j) for i in range(triangle.blocks) for j in range(i, triangle.blocks)]

        def part(cell: tuple[int, int]) -> Any:
            return work(triangle.walk, triangle.task(*cell), bound)

        results = run_ordered(part, cells, self.threads)
        try:
            for cell, result in zip(cells, results, strict=True):
                yield result
                self.progress(triangle.pairs(*cell))
        finally:
            results.close()


def histogram_cells(
    least: float, greatest: float, edges: np.ndarray, slack: float, table: cpu.Table, count: int
) -> tuple[tuple[np.float32, np.float32], np.ndarray]:
    """Return the grid and the `count` cells by which `scan_histogram` looks bins up.

    A cell has a bin if all scores have it whose tile's raw score falls into the cell, with what
    finding the cell in float32 and the link may round.
    """
    steps = np.float32(min(count / max(greatest - least, 1e-30), 1e30))
    starts = least + np.arange(count + 1) / float(steps)
    beyond = slack + 4e-7 * (abs(least) + abs(greatest)) + 1e-2 / float(steps)
    ends = [
        cpu.link_scores(raw.astype(np.float32), table)
        for raw in (starts[:-1] - beyond, starts[1:] + beyond)
    ]
    rounded = 1e-6 * float(np.abs(edges).max())
    low, high = (
        np.searchsorted(edges[1:-1], part.astype(np.float64) + shift, side="right")
        for part, shift in zip(ends, (-rounded, rounded), strict=True)
    )
    return (np.float32(least), steps), np.where(low == high, low, -1).astype(np.int32)


class _Candidates:
    """What may be among the k best of some left rows, and the best of it."""

    def __init__(self, pairs: AllPairs, first: int, rows: int, k: int) -> None:
        capacity = self._capacity(k)
        padded = -(-rows // TILE_ROWS) * TILE_ROWS + TILE_COLUMNS
        self.table, self.threads, self.first = pairs.table, pairs.threads, first
        self.k, self.rows = k, rows
        self.floor = np.full(padded, np.inf, dtype=np.float32)
        self.floor[:rows] = cpu.LOWEST
        self.filled = np.zeros(rows, dtype=np.int64)
        self.heap = np.full((rows, k), cpu.LOWEST, dtype=np.float32)
        self.keys = np.empty((rows, capacity), dtype=np.int64)

    @staticmethod
    def _capacity(k: int) -> int:
        return 3 * k + 64

    @classmethod
    def row_bytes(cls, k: int) -> int:
        """Bytes that a row's candidates take."""
        return cls._capacity(k) * 8 + k * 4 + 16

    def scan(
        self, walk: cpu.Walk, task: Task, left_bound: np.ndarray, right_bound: np.ndarray
    ) -> None:
        """Add the candidates of a task, whose biases were raised by bounds of both sides."""
        state = self.floor, self.filled, self.heap, self.keys
        cpu.scan_top_k(self.table, walk, task, self.k, left_bound, right_bound, *state)

    def finish(self, k: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and indices (rows, k) of the best of rows `begin` to `end`.

        Columns past those there are stay empty.
        """
        scores = np.full((end - begin, k), np.nan, dtype=np.float32)
        indices = np.full((end - begin, k), -1, dtype=np.int64)
        state = self.floor[begin:], self.filled[begin:], self.keys[begin:], scores, indices

        def part(low: int) -> None:
            high = min(low + _ROWS_FINISHED_AT_ONCE, end - begin)
            cpu.finish_top_k(self.table, self.first + begin, low, high, self.k, *state)

        _exhaust(run_ordered(part, range(0, end - begin, _ROWS_FINISHED_AT_ONCE), self.threads))
        return scores, indices


class _ThresholdTask:
    """Collects the pairs of a block that reach a threshold."""

    def __init__(self, pairs: AllPairs, threshold: float) -> None:
        self.table = pairs.table
        floor = np.clip(pairs.plan.raw_floor(threshold), cpu.LOWEST, -cpu.LOWEST)
        self.floor = np.nextafter(np.float32(floor), cpu.LOWEST)
        self.minimum = at_least(threshold)
        self.most = max(_HITS_A_TASK, pairs.memory // (8 * pairs.threads * _HIT_BYTES))

    def search(self, walk: cpu.Walk, task: Task, most: int) -> _Pairs | None:
        """Return rows, columns and scores of the hits, or None where there are more than `most`."""
        room = min(_HITS_A_TASK, most)
        found, hits = self._scan(walk, task, room)
        if found > most:
            return None
        if found > room:
            found, hits = self._scan(walk, task, found)
        rows, columns, scores = (part[:found].copy() for part in hits)
        return rows, columns, scores

    def collect(self, walk: cpu.Walk, task: Task) -> _RowHits | None:
        """Return the hits by row, or None where several panels have more than the memory bears."""
        pairs = self.search(walk, task, self.most if task[1] - task[0] > 1 else 1 << 62)
        return (
            None
            if pairs is None
            else pairs_by_row([pairs], task[0] * TILE_ROWS, _rows_of(walk, task))
        )

    def _scan(self, walk: cpu.Walk, task: Task, room: int) -> tuple[int, _Pairs]:
        rows, columns = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int64)
        scores = np.empty(room, dtype=np.float32)
        found = cpu.scan_threshold(
            self.table, walk, task, self.minimum, self.floor, rows, columns, scores
        )
        return found, (rows, columns, scores)


def _rows_of(walk: cpu.Walk, task: Task) -> int:
    """Left rows of a task."""
    return min(task[1] * TILE_ROWS, walk.left_count) - task[0] * TILE_ROWS


def pairs_by_row(parts: list[_Pairs], first: int, rows: int) -> _RowHits:
    """Bring pairs of rows `first` on into row order, keeping the order within a row."""
    owners, columns, scores = (np.concatenate(part) for part in zip(*parts, strict=True))
    counts = np.empty(rows, dtype=np.int64)
    indices, values = np.empty_like(columns), np.empty_like(scores)
    cpu.group_by_row(owners - first, counts, columns, scores, indices, values)
    return counts, indices, values


class NetworkPairs:
    """All pairs where a network compares them: every pair is gathered and multiplied, slowly.

    Parameters and results are those of `AllPairs`. There is no `scan` to choose: it is None.
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
        self.scan, self.triangle = None, False

    def _scores(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
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
        end = len(self.left) if stop is None else stop
        for first in range(start, end, step):
            rows = np.arange(first, min(first + step, end))
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
            hits = (scores >= at_least(threshold)) & self._off_diagonal(first, scores.shape)
            rows, columns = np.nonzero(hits)
            yield first, np.bincount(rows, minlength=len(scores)), columns, scores[rows, columns]

    def dense(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, (rows, n') float32), as `AllPairs.dense`."""
        return self._scores(start, stop)

    def histogram(self, bins: int = 100) -> tuple[np.ndarray, np.ndarray]:
        """Count all scores in equal bins, as `AllPairs.histogram`."""
        check_bins(bins)
        ends = self.ends()
        edges = self.edges(ends, bins)
        return edges, self.count(edges, ends)

    def ends(self, *, rows: tuple[int, int] | None = None) -> tuple[float, float]:
        """Return the least and the greatest score."""
        least, greatest = np.inf, -np.inf
        for first, scores in self._scores(*(rows or ())):
            chosen = scores[self._off_diagonal(first, scores.shape)]
            least = min(least, chosen.min(initial=np.inf))
            greatest = max(greatest, chosen.max(initial=-np.inf))
        return float(least), float(greatest)

    def edges(self, ends: tuple[float, float], bins: int) -> np.ndarray:
        """Return the edges of equal bins between two scores, as `AllPairs.edges`."""
        least, greatest = map(np.float32, at_least_one_pair(ends))
        return np.linspace(least, greatest, bins + 1).astype(np.float32)

    def count(
        self,
        edges: np.ndarray,
        ends: tuple[float, float],
        *,
        rows: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Count all scores in bins of these edges, as `AllPairs.count`."""
        counts = np.zeros(len(edges) - 1, dtype=np.int64)
        for first, scores in self._scores(*(rows or ())):
            chosen = scores[self._off_diagonal(first, scores.shape)]
            inner = np.searchsorted(edges[1:-1], chosen, side="right")
            counts += np.bincount(inner, minlength=len(counts))
        return counts


def check_bins(bins: int) -> None:
    """Refuse a number of bins that is none."""
    if bins < 1:
        raise ArgumentError(f"bins is {bins}, expected at least 1")


def at_least_one_pair(ends: tuple[float, float]) -> tuple[float, float]:
    """Return the ends of scores, or refuse to spread scores of which there is none."""
    if ends[0] > ends[1]:
        raise ArgumentError("there is no pair to count: the table has fewer than two rows")
    return ends


def all_pairs(
    left: np.ndarray, right: np.ndarray | None, plan: Plan, **options: Any
) -> AllPairs | NetworkPairs:
    """Return what walks all pairs of tables of this plan; see `AllPairs` for the parameters."""
    walk = AllPairs if plan.network is None else NetworkPairs
    return walk(left, right, plan, **options)


def at_least(threshold: float) -> np.float32:
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
