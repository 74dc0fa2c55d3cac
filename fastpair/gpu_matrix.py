"""All pairs on GPUs: what `fastpair.matrix` keeps of them, pair kernel scores to the bit.

Tiles on the device find candidates, the pair kernel decides there, and where what was kept does not
prove a row's best, whole rows are scored. So results are those of the CPU and do not depend on
devices, portions or the form of the tiles. Left rows are shared out in order; each device has a
thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np

from fastpair.backend import memory_budget, run_ordered, thread_count
from fastpair.device import failures_told
from fastpair.errors import ArgumentError, MemoryBudgetError
from fastpair.gpu_best import find_best, most_kept
from fastpair.gpu_walk import DeviceWalk, HostSides, Portion, choose_form
from fastpair.kernels import Plan, cpu
from fastpair.kernels.gpu import DeviceTable, OutOfDeviceMemory, Runtime, score_pairs
from fastpair.kernels.gpu_tiles import FORMS, TILE, Block, Candidates, values_of
from fastpair.matrix import (
    NetworkPairs,
    Progress,
    at_least,
    histogram_cells,
    pairs_by_row,
)

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_Hits = tuple[int, np.ndarray, np.ndarray, np.ndarray]
"""Number of the first row, counts of some rows, then indices and scores of their pairs."""
_Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Rows, columns and scores of pairs."""

_SHARES_A_DEVICE = 4
"""Shares of the left rows of each of several devices."""
_BLOCKS_A_DEVICE = 16
"""Blocks of rows of a triangle for each device: what is found is held until they are written."""

_HIT_BYTES = 8 + 8 + 4 + 8 + 4
_DENSE_BYTES = 1 << 27
_CELLS = 1 << 15
"""Steps of the raw score in which a histogram looks bins up; those of an edge are scored again."""
_FREE_SHARE = 0.9
"""Share of a device's free memory that is used unless a budget is given."""


class GpuPairs:
    """All pairs of the rows of one table, or of a left and a right table, on GPUs.

    Parameters
    ----------
    left : (n, row_bytes) uint8 rows of a table.
    right : (n', row_bytes) uint8 rows of a table with the same plan, or None: one table, whose
        pairs (i, i) are left out of every result but the dense one.
    plan : the plan of both; one without a network, see `all_pairs`.
    runtimes : the devices.
    threads : threads of the host that make operands; default one for each processor.
    memory : bytes, or a text such as "2GiB", that may be allocated on the host beside the tables.
    device_memory : bytes that may be allocated on each device; default 90 % of what is free.
    progress : called with numbers of pairs walked.
    scan : how `top_k` and `above` find what they rescore: "float32", "bfloat16", or None, chosen by
        the share of pairs that a form would leave undecided. The result is the same.

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
        runtimes: list[Runtime],
        threads: int | None = None,
        memory: int | str | None = None,
        device_memory: int | None = None,
        progress: Progress | None = None,
        scan: str | None = None,
    ) -> None:
        if scan is not None and scan not in FORMS:
            raise ArgumentError(f"scan is {scan!r}, expected one of {', '.join(FORMS)} on a GPU")
        if not runtimes:
            raise ArgumentError("runtimes is empty, expected at least one device")
        self.left, self.right = left, left if right is None else right
        self.distinct, self.plan = right is not None, plan
        self.runtimes, self.threads = list(runtimes), thread_count(threads)
        self.memory, self.device_memory = memory_budget(memory), device_memory
        self.progress = progress or (lambda pairs: None)
        self._wanted_scan = scan
        self.scan: str | None = scan or "float32"
        self.triangle = False

    # --- devices and shares

    def _devices(self, form: str, **options: Any) -> _Devices:
        """Return a walk on each device in one form; `options` as `DeviceWalk`."""
        self.scan, self.triangle = form, False
        right = self.right if self.distinct else None
        sides = HostSides(self.left, right, self.plan, form, self.threads, self.memory)
        return _Devices(
            [
                DeviceWalk(runtime, sides, memory=self._memory_of(runtime), **options)
                for runtime in self.runtimes
            ]
        )

    def _choose(self, **wanted: Any) -> str:
        """Return the form that is wanted, or that finds what is wanted at least cost."""
        if self._wanted_scan:
            return self._wanted_scan
        return choose_form(self.left, self.right if self.distinct else None, self.plan, **wanted)

    def _memory_of(self, runtime: Runtime) -> int:
        free = int(_FREE_SHARE * runtime.free_memory())
        return free if self.device_memory is None else min(free, self.device_memory)

    def _shares(
        self, result_bytes: int, most: int | None = None, start: int = 0
    ) -> list[tuple[int, int]]:
        """Return (first, last) left rows, from row `start` on, that are handed out together.

        Their results take `result_bytes` a row, together at most a part of the memory or `most`.
        """
        rows, devices = len(self.left), len(self.runtimes)
        share = min(self.memory // (4 * (devices + 1)), most or self.memory)
        if result_bytes > share:
            raise MemoryBudgetError(
                f"a row of the result needs {result_bytes} bytes, more than the {share} that the "
                "memory leaves: allow more memory"
            )
        step = share // max(1, result_bytes)
        if devices > 1:
            step = min(step, -(-rows // (_SHARES_A_DEVICE * devices)))
        step = max(1, step)
        return [(first, min(first + step, rows)) for first in range(start, rows, step)]

    def _advance(self, rows: int) -> None:
        self.progress(rows * len(self.right))

    # --- top-k

    def top_k(self, k: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield the k best right rows of each left row, as `AllPairs.top_k`."""
        if k < 1:
            raise ArgumentError(f"k is {k}, expected at least 1")
        kept = min(k, len(self.right) - (not self.distinct))
        capacity, room = most_kept(kept)
        form = self._choose(k=max(1, kept), room=room)
        row_bytes = Candidates.row_bytes(capacity) + 8 * k
        devices = self._devices(form, raised=True, row_bytes=row_bytes)
        shares = self._shares(k * 24)
        whole = len(shares) == len(devices.walks) == 1 and devices.walks[0].whole
        self.triangle = whole and not self.distinct

        def best(walk: DeviceWalk, rows: tuple[int, int]) -> list[tuple[np.ndarray, np.ndarray]]:
            def find(group: Portion) -> tuple[np.ndarray, np.ndarray]:
                return find_best(walk, group, kept, self.triangle and walk.whole)

            return walk.run(*rows, find)

        for (first, last), parts in zip(shares, devices.run(best, shares), strict=True):
            scores = np.full((last - first, k), np.nan, np.float32)
            indices = np.full((last - first, k), -1, np.int64)
            if kept > 0:
                scores[:, :kept] = np.concatenate([part[0] for part in parts])
                indices[:, :kept] = np.concatenate([part[1] for part in parts])
            yield first, scores, indices
            self._advance(last - first)

    # --- threshold

    def above(self, threshold: float) -> Iterator[_Hits]:
        """Yield every pair that scores at least `threshold`, as `AllPairs.above`."""
        if not np.isfinite(threshold):
            raise ArgumentError(f"threshold is {threshold}, expected a finite number")
        raw = self.plan.raw_floor(threshold)
        floor = np.nextafter(np.float32(np.clip(raw, cpu.LOWEST, -cpu.LOWEST)), cpu.LOWEST)
        devices = self._devices(self._choose(floor=raw), raised=True)
        search = _Search(floor, at_least(threshold))
        done = 0
        if not self.distinct:
            self.triangle = True
            for hits in self._mirrored(devices, search):
                yield hits
                done = hits[0] + len(hits[1])
        yield from self._row_by_row(devices, search, done)

    def _mirrored(self, devices: _Devices, search: _Search) -> Iterator[_Hits]:
        """Yield the hits of blocks of rows of one table; end early where they outgrow the memory.

        A pair found in the upper triangle waits for the block of its later row.
        """
        rows, number = len(self.left), len(devices.walks)
        room = self.memory // 4 // _HIT_BYTES
        most = room // (4 * number)
        blocks = self._blocks(_BLOCKS_A_DEVICE * number)
        waiting: list[_Pairs] = []

        def work(walk: DeviceWalk, block: tuple[int, int]) -> _Pairs | None:
            return _joined(walk.run(*block, lambda group: search(walk, group, True, most)))

        for (first, last), pairs in zip(blocks, devices.run(work, blocks), strict=True):
            room -= 0 if pairs is None else 2 * len(pairs[0])
            if pairs is None or room < 0:
                return
            waiting.append((pairs[1], pairs[0], pairs[2]))
            mine = [_between(part, first, last) for part in waiting]
            waiting = [_between(part, last, rows) for part in waiting]
            hits = pairs_by_row([*mine, pairs], first, last - first)
            room += len(hits[1])
            yield (first, *hits)
            self._advance(last - first)

    def _blocks(self, number: int) -> list[tuple[int, int]]:
        """Return (first, last) rows of about so many blocks, whole tiles."""
        rows = len(self.left)
        step = -(-rows // number // TILE) * TILE or TILE
        return [(first, min(first + step, rows)) for first in range(0, rows, step)]

    def _row_by_row(self, devices: _Devices, search: _Search, start: int) -> Iterator[_Hits]:
        """Yield the hits of left rows from `start` on, each against all right rows.

        Rows that have too many hits are taken in halves; a single row may have any number.
        """
        most = self.memory // (8 * len(devices.walks) * _HIT_BYTES)

        def work(walk: DeviceWalk, share: tuple[int, int]) -> _Pairs | None:
            bound = most if share[1] - share[0] > 1 else 1 << 62
            return _joined(walk.run(*share, lambda group: search(walk, group, False, bound)))

        def settled(share: tuple[int, int], found: _Pairs | None) -> Iterator[_Hits]:
            first, last = share
            if found is not None:
                yield (first, *pairs_by_row([found], first, last - first))
                return
            for half in ((first, (first + last) // 2), ((first + last) // 2, last)):
                yield from settled(half, devices.run_one(work, half))

        shares = [
            (max(first, start), last)
            for first, last in self._blocks(_BLOCKS_A_DEVICE * len(devices.walks))
            if last > start
        ]
        for share, found in zip(shares, devices.run(work, shares), strict=True):
            yield from settled(share, found)
            self._advance(share[1] - share[0])

    # --- dense and histogram

    def dense(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, (rows, n') float32): the tiles' scores, as `AllPairs.dense`."""
        width = len(self.right)
        devices = self._devices("float32", raised=False, pair_bytes=4)
        end = len(self.left) if stop is None else stop
        shares = self._shares(4 * width, _DENSE_BYTES, start)
        shares = [(first, min(last, end)) for first, last in shares if first < end]
        once = len(shares) == len(devices.walks) == 1 and not start and end == len(self.left)
        self.triangle = once and not self.distinct and devices.walks[0].whole

        def fill(walk: DeviceWalk, rows: tuple[int, int]) -> list[np.ndarray]:
            return walk.run(*rows, lambda group: self._scores(walk, group))

        for (first, last), parts in zip(shares, devices.run(fill, shares), strict=True):
            yield first, parts[0] if len(parts) == 1 else np.concatenate(parts)
            self._advance(last - first)

    def _scores(self, walk: DeviceWalk, group: Portion) -> np.ndarray:
        """Return the dense scores (rows, n') of a group."""
        scores = walk.runtime.pinned((group.count, len(self.right)), np.float32)
        rooted = self.plan.link in ("negative_root", "negative_arcosh")
        values = walk.runtime.empty(group.count * walk.chunk, np.float32)
        for right in walk.chunks():
            mirrored = self.triangle and group.count == right.count == len(self.right)
            pitch = right.count
            slack = group.slack, right.slack
            if self.distinct:  # the row's own slack decides, as on a CPU
                slack = group.slack, walk.put(np.zeros(right.count, np.float32))

            def launch(block: Block, slack: Any = slack, pitch: int = pitch) -> None:
                walk.tiles.dense(block, slack, values, pitch, walk.pairs)

            block = walk.block(group, right, triangle=mirrored)
            if not rooted:
                launch(block)
            for _, count in walk.listed(block, launch) if rooted else ():
                if count:
                    walk.score(group, right, count)
                    listed = walk.pairs.rows, walk.pairs.columns, walk.pairs.scores
                    numbers = np.int64(count), np.int32(mirrored)
                    walk.select("put_scores", count, *listed, *numbers, values, np.int64(pitch))
            if right.count == len(self.right):
                walk.fetch(values[: scores.size], scores.reshape(-1))
            else:
                part = walk.fetch(values[: group.count * pitch]).reshape(group.count, pitch)
                scores[:, right.first : right.last] = part
        return scores

    def histogram(self, bins: int = 100) -> tuple[np.ndarray, np.ndarray]:
        """Count all scores, exactly, in equal bins, as `AllPairs.histogram`."""
        if bins < 1:
            raise ArgumentError(f"bins is {bins}, expected at least 1")
        devices = self._devices("float32", raised=False)
        self.triangle = not self.distinct
        shares = self._blocks(_BLOCKS_A_DEVICE * len(devices.walks))

        def ends(walk: DeviceWalk, share: tuple[int, int]) -> list[np.ndarray]:
            return self._over_blocks(walk, share, lambda group, right, block: _range(walk, block))

        found = [part for parts in devices.run(ends, shares) for part in parts]
        least = min((part[0] for part in found), default=0xFFFFFFFF)
        greatest = max((part[1] for part in found), default=0)
        if least > greatest:
            raise ArgumentError("there is no pair to count: the table has fewer than two rows")
        raw = values_of(np.array([least, greatest], np.uint32))
        table = cpu.table_arguments(self.left, self.right, self.plan)
        linked = cpu.link_scores(raw, table)
        edges = np.linspace(float(linked[0]), float(linked[1]), bins + 1).astype(np.float32)

        def count(walk: DeviceWalk, share: tuple[int, int]) -> list[np.ndarray]:
            def one(group: Portion, right: Portion, block: Block) -> np.ndarray:
                grid, cells = histogram_cells(
                    float(raw[0]), float(raw[1]), edges, group.most, table, _CELLS
                )
                return _counts(walk, group, right, block, edges, grid, cells)

            return self._over_blocks(walk, share, one)

        counts = np.zeros(bins, dtype=np.int64)
        for share, parts in zip(shares, devices.run(count, shares), strict=True):
            counts += sum(parts, np.zeros(bins, np.int64))
            self._advance(share[1] - share[0])
        return edges, counts * 2 if self.triangle else counts

    def _over_blocks(
        self,
        walk: DeviceWalk,
        share: tuple[int, int],
        work: Callable[[Portion, Portion, Block], _Result],
    ) -> list[_Result]:
        """Return ``work(group, right, block)`` over the pairs of some rows; of one table, once."""

        def each(group: Portion) -> list[_Result]:
            return [
                work(group, right, walk.block(group, right, self.triangle))
                for right in walk.chunks()
            ]

        return [result for results in walk.run(*share, each) for result in results]


class _Devices:
    """Walks that take one piece of work after another, a thread for each.

    Parameters
    ----------
    walks : one for each device.
    """

    def __init__(self, walks: list[DeviceWalk]) -> None:
        self.walks = walks
        self._idle: SimpleQueue[DeviceWalk] = SimpleQueue()
        for walk in walks:
            self._idle.put(walk)

    def run_one(self, work: Callable[[DeviceWalk, _Item], _Result], item: _Item) -> _Result:
        """Return ``work(walk, item)`` of the next device that is idle."""
        walk = self._idle.get()
        try:
            with failures_told(walk.runtime.number):
                return work(walk, item)
        finally:
            self._idle.put(walk)

    def run(
        self, work: Callable[[DeviceWalk, _Item], _Result], items: list[_Item]
    ) -> Iterator[_Result]:
        """Yield ``work(walk, item)`` in the order of the items."""
        with closing(
            run_ordered(lambda item: self.run_one(work, item), items, len(self.walks))
        ) as results:
            yield from results


class _Search:
    """Finds the pairs of a group that reach a threshold.

    Parameters
    ----------
    floor : the raw score that an upper bound must reach to matter.
    minimum : the least score.
    """

    def __init__(self, floor: np.float32, minimum: np.float32) -> None:
        self.floor, self.minimum = floor, minimum

    def __call__(
        self, walk: DeviceWalk, group: Portion, triangle: bool, most: int
    ) -> _Pairs | None:
        """Return the hits by row, then column, or None where there are more than `most`.

        In a triangle, rows of one table meet higher columns only.
        """
        parts: list[_Pairs] = []
        held = 0
        for right in walk.chunks():
            block = walk.block(group, right, triangle)

            def launch(part: Block) -> None:
                walk.tiles.hits(part, self.floor, walk.pairs)

            for _, count in walk.listed(block, launch, 2 * most + 64):
                if count < 0:
                    return None
                if count:
                    parts.append(self._decide(walk, group, right, count))
                    held += len(parts[-1][0])
                if held > most:
                    return None
        rows, columns, scores = _concatenated(parts)
        order = np.lexsort((columns, rows))
        return rows[order], columns[order], scores[order]

    def _decide(self, walk: DeviceWalk, group: Portion, right: Portion, count: int) -> _Pairs:
        """Score listed pairs and return those that are at least the minimum, by table rows."""
        walk.score(group, right, count)
        pairs = walk.pairs
        rows, columns, scores = (
            walk.fetch(part[:count]) for part in (pairs.rows, pairs.columns, pairs.scores)
        )
        hit = scores >= self.minimum
        found = rows[hit].astype(np.int64), columns[hit].astype(np.int64), scores[hit]
        return found[0] + group.first, found[1] + right.first, found[2]


def _concatenated(parts: list[_Pairs]) -> _Pairs:
    nothing = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    rows, columns, scores = (np.concatenate(part) for part in zip(nothing, *parts, strict=True))
    return rows, columns, scores


def _joined(parts: list[_Pairs | None]) -> _Pairs | None:
    """The pairs of several groups; None where one of them has too many."""
    found = [part for part in parts if part is not None]
    return _concatenated(found) if len(found) == len(parts) else None


def _between(pairs: _Pairs, first: int, last: int) -> _Pairs:
    """Return the pairs whose first number is from `first` on and below `last`."""
    chosen = (pairs[0] >= first) & (pairs[0] < last)
    return pairs[0][chosen], pairs[1][chosen], pairs[2][chosen]


def _range(walk: DeviceWalk, block: Block) -> np.ndarray:
    """Return the least and the greatest raw score of a block, as `ordered` numbers."""
    ends = walk.put(np.array([0xFFFFFFFF, 0], np.uint32))
    walk.tiles.range(block, ends)
    return walk.fetch(ends)


def _counts(
    walk: DeviceWalk,
    group: Portion,
    right: Portion,
    block: Block,
    edges: np.ndarray,
    grid: tuple[np.float32, np.float32],
    cells: np.ndarray,
) -> np.ndarray:
    """Return how many scores of a block are in each bin."""
    total = np.zeros(len(edges) - 1, np.int64)
    device_cells = walk.put(cells)
    counts = walk.runtime.empty(len(total), np.uint64)

    def launch(part: Block) -> None:
        walk.runtime.fill(counts, 0, walk.stream)
        walk.tiles.histogram(part, device_cells, grid, counts, walk.pairs)

    for _, unclear in walk.listed(block, launch):
        total += walk.fetch(counts).astype(np.int64)
        if unclear:
            walk.score(group, right, unclear)
            scores = walk.fetch(walk.pairs.scores[:unclear])
            inner = np.searchsorted(edges[1:-1], scores, side="right")
            total += np.bincount(inner, minlength=len(total))
    return total


class GpuNetworkPairs(NetworkPairs):
    """All pairs where a network compares them, scored on one GPU and reduced on the host.

    Parameters and results are those of `GpuPairs`; only the first of the devices works.
    """

    def __init__(
        self,
        left: np.ndarray,
        right: np.ndarray | None,
        plan: Plan,
        *,
        runtimes: list[Runtime],
        threads: int | None = None,
        memory: int | str | None = None,
        device_memory: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(left, right, plan, threads=threads, memory=memory, progress=progress)
        self._runtime, self._stream = runtimes[0], runtimes[0].stream()
        try:
            self._table = DeviceTable(self._runtime, left, right, plan, self._stream)
        except OutOfDeviceMemory as error:
            raise MemoryBudgetError(
                f"tables of {left.nbytes} bytes a side do not fit the GPU, as all pairs by a "
                "network want them to: use --device cpu"
            ) from error
        free = int(_FREE_SHARE * self._runtime.free_memory())
        self._pairs_at_once = max(1, min(device_memory or free, free, 1 << 30) // 32)
        self.scorer = self._score_all  # type: ignore[assignment]

    def _score_all(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return the scores (m,) of pairs of row numbers (m,)."""
        scores = np.empty(len(left), np.float32)
        with failures_told(self._runtime.number):
            self._fill(left, right, scores)
        return scores

    def _fill(self, left: np.ndarray, right: np.ndarray, scores: np.ndarray) -> None:
        first = 0
        while first < len(left):
            here = slice(first, first + self._pairs_at_once)
            try:
                self._score(left[here], right[here], scores[here])
                first += self._pairs_at_once
            except OutOfDeviceMemory as error:
                self._runtime.synchronize(self._stream)
                if self._pairs_at_once == 1:
                    raise MemoryBudgetError(
                        "the GPU has no room for a single pair beside the tables: use --device cpu"
                    ) from error
                self._pairs_at_once //= 2

    def _score(self, left: np.ndarray, right: np.ndarray, scores: np.ndarray) -> None:
        runtime, stream = self._runtime, self._stream
        host = [np.ascontiguousarray(part, np.int64) for part in (left, right)]
        rows = [runtime.empty(len(scores), np.int64) for _ in host]
        result, first_bad = runtime.empty(len(scores), np.float32), runtime.empty(1, np.uint64)
        for target, source in zip(rows, host, strict=True):
            runtime.upload(target, source, stream)
        runtime.fill(first_bad, 0xFF, stream)
        score_pairs(runtime, self._table, rows[0], rows[1], result, first_bad, stream)
        runtime.download(scores, result, stream)
        runtime.synchronize(stream)


def all_pairs(
    left: np.ndarray, right: np.ndarray | None, plan: Plan, **options: Any
) -> GpuPairs | GpuNetworkPairs:
    """Return what walks all pairs of tables of this plan; see `GpuPairs` for the parameters."""
    if plan.network is None:
        return GpuPairs(left, right, plan, **options)
    options.pop("scan", None)
    return GpuNetworkPairs(left, right, plan, **options)
