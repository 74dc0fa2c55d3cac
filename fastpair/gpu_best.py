"""The k best of each row on one GPU: candidates by tiles, proven, or every pair of a row scored."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from fastpair.errors import MemoryBudgetError
from fastpair.gpu_walk import DeviceWalk, Portion
from fastpair.kernels import cpu
from fastpair.kernels.gpu_tiles import (
    CAPACITIES,
    MOST_KEPT,
    Block,
    Candidates,
    sort_rows,
    split_keys,
)

_Best = tuple[np.ndarray, np.ndarray]
"""Scores (rows, k) float32 and columns (rows, k) int64 of the best."""

_ROWS_SCORED_TOGETHER = 1024
_LEAST_WIDTH = 1 << 11
"""Right rows that are scored at once for each row, at least, where whole rows are scored."""


def most_kept(k: int) -> tuple[int, int]:
    """Return a row's capacity, and how many candidates are kept of it by their upper bounds.

    As many more than k are kept as bounds may leave undecided, and at least as much room is left
    for what a launch adds.
    """
    for capacity in CAPACITIES:
        if 4 * k <= capacity:
            break
    return capacity, min(max(2 * k, capacity // 4), capacity // 2)


def find_best(walk: DeviceWalk, group: Portion, k: int, triangle: bool) -> _Best:
    """Return the k best right rows of each row of a group; there are at least k.

    Candidates are kept by the upper bounds that tiles tell, then scored by the pair kernel. What
    was dropped is no better than the row's floor. So where the k-th score says that a raw score
    must be above the floor, no dropped one is among the best; other rows are scored in full.
    """
    rows = group.count
    if k < 1 or 4 * k > CAPACITIES[-1]:
        return _score_rows(walk, group, np.arange(rows, dtype=np.int32), k)
    capacity, kept = most_kept(k)
    best = Candidates(walk.runtime, walk.stream, rows, capacity)
    if triangle:
        _walk_triangle(walk, group, best, kept)
    else:
        _walk_rows(walk, group, best, kept)
    floors = walk.fetch(best.floors)
    scores, columns = _rescore(walk, group, best, k, kept)
    unproven = floors >= cpu.raw_floors(scores[:, -1], walk.plan)
    chosen = np.flatnonzero(unproven & ~np.isneginf(floors)).astype(np.int32)
    del best
    if len(chosen):
        scores[chosen], columns[chosen] = _score_rows(walk, group, chosen, k)
    return scores, columns


# --- candidates by tiles -------------------------------------------------------------------------


def _offer(
    best: Candidates,
    launch: Callable[[], None],
    walk: DeviceWalk,
    parts: list[Candidates],
    kept: int,
) -> bool:
    """Launch what adds candidates; keep the best of the `parts`, or forget them: no room."""
    best.clear_overflow()
    launch()
    if walk.fetch(best.overflow)[0]:
        for part in parts:
            part.forget()
        return False
    for part in parts:
        part.keep(kept)
    return True


def _walk_rows(walk: DeviceWalk, group: Portion, best: Candidates, kept: int) -> None:
    """Offer all right rows to each row of a group.

    As many columns at once as have been seen: of columns in no order of merit, about as many as
    are kept then reach the floor. Where more come than there is room for, fewer columns are taken,
    at last no more than always fit.
    """
    free = best.capacity - kept
    seen, most = 0, 1 << 62
    for right in walk.chunks():
        whole, start = walk.block(group, right), 0
        while start < right.count:
            width = min(max(free, min(seen, most)), right.count - start)
            block = whole.cut((0, group.count), (start, start + width))
            launch = partial(walk.tiles.best, block, best)
            if _offer(best, launch, walk, [best], kept):
                start, seen, most = start + width, seen + width, max(2 * width, most)
            else:
                most = width // 2


def _walk_triangle(walk: DeviceWalk, group: Portion, best: Candidates, kept: int) -> None:
    """Offer each pair of one table to both of its rows.

    Rows enter in steps that double. Those that are there meet the new ones in slices that double
    too, so that the floors of the new ones rise before many partners come.
    """
    (right,) = walk.chunks()
    whole = walk.block(group, right, triangle=True)
    free = (best.capacity - kept) // 2
    known = 0
    while known < group.count:
        last = min(known + max(free, known), group.count)
        low = 0
        while low < known:
            high = min(low + max(free, low), known)
            block = whole.cut((low, high), (known, last))
            _offer_both(walk, block, best, kept, free)
            low = high
        block = whole.cut((known, last), (known, last))
        _offer_both(walk, block, best, kept, free)
        known = last


def _offer_both(walk: DeviceWalk, block: Block, best: Candidates, kept: int, free: int) -> None:
    """Offer the pairs of a block of a triangle to both rows; in halves where rows have no room."""
    if block.empty:
        return
    parts = [best.cut(block.low, block.high)]
    if (block.start, block.stop) != (block.low, block.high):
        parts.append(best.cut(block.start, block.stop))
    if not _offer(best, partial(walk.tiles.best, block, best), walk, parts, kept):
        for half in block.halves():
            _offer_both(walk, half, best, kept, free)


def _rescore(walk: DeviceWalk, group: Portion, best: Candidates, k: int, kept: int) -> _Best:
    """Score all candidates by the pair kernel; return the k best of each row."""
    step = max(1, walk.pairs.capacity // kept)
    for right in walk.chunks():
        columns = range(right.first, right.last)
        for first in range(0, group.count, step):
            last = min(first + step, group.count)
            part = best.cut(first, last)
            part.list(kept, first, columns, walk.pairs)
            walk.score(group, right, part.rows * kept, runs=True)
            part.rescore(kept, columns, walk.pairs)
    best.keep(k, every=True)
    return _fetch_best(walk, best, k)


def _fetch_best(walk: DeviceWalk, best: Candidates, k: int) -> _Best:
    """Return the k best candidates of each row, which are sorted."""
    scores, columns = np.empty((best.rows, k), np.float32), np.empty((best.rows, k), np.int64)
    step = max(1, min(best.rows, (1 << 24) // k))
    keys = walk.runtime.empty((step, k), np.uint64)
    for first in range(0, best.rows, step):
        last = min(first + step, best.rows)
        best.cut(first, last).gather(k, keys)
        scores[first:last], columns[first:last] = split_keys(walk.fetch(keys[: last - first]))
    return scores, columns


# --- every pair of some rows ---------------------------------------------------------------------


def _score_rows(walk: DeviceWalk, group: Portion, chosen: np.ndarray, k: int) -> _Best:
    """Return the k best of some rows of a group, all of whose pairs the pair kernel scores."""
    scores = np.empty((len(chosen), k), np.float32)
    columns = np.empty((len(chosen), k), np.int64)
    if k < 1:
        return scores, columns
    few = k <= MOST_KEPT
    step = min(_ROWS_SCORED_TOGETHER, max(1, walk.pairs.capacity // _LEAST_WIDTH))
    if not few:
        step = min(step, _rows_to_sort(walk))
    for first in range(0, len(chosen), step):
        here = slice(first, first + step)
        find = _best_of_scores if few else _sorted_scores
        scores[here], columns[here] = find(walk, group, chosen[here], k)
    return scores, columns


def _score_columns(
    walk: DeviceWalk,
    group: Portion,
    right: Portion,
    chosen: object,
    rows: int,
    start: int,
    width: int,
) -> None:
    """Score some rows against `width` right rows from `start` on."""
    pairs = walk.pairs
    numbers = np.int64(rows), np.int32(start), np.int32(width)
    walk.select("list_rows", rows * width, chosen, *numbers, pairs.rows, pairs.columns)
    walk.score(group, right, rows * width, runs=True)


def _best_of_scores(walk: DeviceWalk, group: Portion, chosen: np.ndarray, k: int) -> _Best:
    """Return the best of some rows, for a k that candidates have room for."""
    rows, capacity = len(chosen), CAPACITIES[-1]
    best = Candidates(walk.runtime, walk.stream, rows, capacity)
    numbers = walk.put(chosen)
    free, seen, most = capacity - k, 0, walk.pairs.capacity // rows
    for right in walk.chunks():
        start = 0
        while start < right.count:
            width = min(max(1, min(max(free, seen), most)), right.count - start)

            def launch(right: Portion = right, start: int = start, width: int = width) -> None:
                _score_columns(walk, group, right, numbers, rows, start, width)
                columns = np.int64(right.first + start), walk.itself(group)
                shape = np.int64(rows), np.int32(width)
                state = best.floors, best.counts, best.keys, np.int32(capacity), best.overflow
                arrays = walk.pairs.scores, numbers
                walk.select("offer_scores", rows * width, *arrays, *shape, *columns, *state)

            if _offer(best, launch, walk, [best], k):
                start, seen = start + width, seen + width
            else:
                most = width // 2
    best.keep(k, every=True)
    return _fetch_best(walk, best, k)


def _sorted_length(walk: DeviceWalk) -> int:
    return 1 << max(1, (len(walk.sides.right.rows) - 1).bit_length())


def _rows_to_sort(walk: DeviceWalk) -> int:
    """Rows whose keys fit into what the device has free, all columns of each."""
    row_bytes = 8 * 2 * _sorted_length(walk)
    rows = walk.runtime.free_memory() * 3 // 4 // row_bytes
    if rows < 1:
        raise MemoryBudgetError(
            f"a row of so many best needs {row_bytes} bytes on the GPU, more than it has free: ask "
            "for fewer, or use --device cpu"
        )
    return int(rows)


def _sorted_scores(walk: DeviceWalk, group: Portion, chosen: np.ndarray, k: int) -> _Best:
    """Return the best of some rows for any k: keys of all columns are sorted."""
    rows, length = len(chosen), _sorted_length(walk)
    keys = walk.runtime.empty((rows, length), np.uint64)
    best = walk.runtime.empty((rows, k), np.uint64)
    counts, numbers = walk.put(np.full(rows, k, np.uint32)), walk.put(chosen)
    walk.runtime.fill(keys, 0, walk.stream)
    most = walk.pairs.capacity // rows
    for right in walk.chunks():
        for start in range(0, right.count, most):
            width = min(most, right.count - start)
            _score_columns(walk, group, right, numbers, rows, start, width)
            columns = np.int64(right.first + start), walk.itself(group)
            shape = np.int64(rows), np.int32(width)
            arrays = walk.pairs.scores, numbers
            walk.select("lay_keys", rows * width, *arrays, *shape, *columns, keys, np.int64(length))
    sort_rows(walk.runtime, walk.stream, keys)
    numbers_of = np.int64(rows), np.int32(length), np.int32(k)
    walk.select("gather_best", rows * k, keys, counts, *numbers_of, best)
    return split_keys(walk.fetch(best))
