"""Numba kernels: serial workers that fill given arrays and may run side by side in threads.

The pair kernel is that of `pairs`; here are the networks, and the tile kernels, which walk a block
of left rows over packed right panels and keep what a reduction wants. Panels come as a `Walk`, of
plain scalars like `Table`. Whoever makes one keeps the arrays alive.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastpair.kernels import Plan
from fastpair.kernels.operands import Panels, word_counts
from fastpair.kernels.pairs import (
    LOWEST,
    Table,
    apply_link,
    exact_raw,
    link_ceiling,
    raw_floor_of,
    score_pairs,
    separate_fields,
    table_arguments,
    tie_level,
)
from fastpair.kernels.simd import (
    address,
    bits_of,
    float_of,
    get,
    jit,
    jit_generator,
    load_float32,
    lowest_bit,
    prefetch,
    put,
)
from fastpair.kernels.tile import FORM_TAGS, HEADER, TILE_COLUMNS, TILE_ROWS, register_tile

__all__ = ["LOWEST", "Table", "score_pairs", "separate_fields", "table_arguments"]

# --- one pair: networks --------------------------------------------------------------------------

_GROUPS_TOGETHER = 8
"""Groups of TILE_ROWS pairs that pass a layer together, so that its weights are read for all."""


def pack_layer(matrix: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Return a layer as panels of the register tile: (panels, HEADER + f, TILE_COLUMNS)."""
    units, inputs = matrix.shape
    number = -(-units // TILE_COLUMNS)
    weights = np.zeros((HEADER + inputs, number * TILE_COLUMNS), np.float32)
    weights[0, :units], weights[HEADER:, :units] = bias, matrix.T
    turned = weights.reshape(HEADER + inputs, number, TILE_COLUMNS).swapaxes(0, 1)
    return np.ascontiguousarray(turned)


@jit
def _no_floors():
    """Floors of rows that every number reaches, and of columns that none does."""
    return np.full(TILE_ROWS, -np.inf, np.float32), np.full(TILE_COLUMNS, np.inf, np.float32)


@jit
def _network_inputs(x, y, columns, orders, inputs, pair):
    """Write what the first layer sees of one pair of rows into its place in a group."""
    for c in range(columns):
        if orders:
            inputs[c, pair], inputs[columns + c, pair] = x[c], y[c]
        else:
            inputs[c, pair] = x[c] * y[c]
            inputs[columns + c, pair] = abs(x[c] - y[c])
            inputs[2 * columns + c, pair] = x[c] + y[c]


@jit
def _network_layer(inputs, weights, units, groups, outputs):
    """Fill the columns of `outputs`, panels of TILE_ROWS, with max(weights inputs + biases, 0)."""
    tile, masks = np.empty((TILE_ROWS, TILE_COLUMNS), np.float32), np.empty(TILE_ROWS, np.int64)
    floors, nothing = _no_floors()
    for panel in range(len(weights)):
        first = panel * TILE_COLUMNS
        for group in range(groups):
            register_tile(
                np.float32(0.0),
                address(inputs) + group * inputs.shape[1] * TILE_ROWS * 4,
                address(weights) + panel * weights.shape[1] * TILE_COLUMNS * 4,
                weights.shape[1] - HEADER,
                0,
                0,
                np.float32(0.0),
                np.float32(0.0),
                address(floors),
                address(nothing),
                address(tile),
                address(masks),
            )
            for n in range(min(TILE_COLUMNS, units - first)):
                for pair in range(TILE_ROWS):
                    outputs[group, HEADER + first + n, pair] = max(tile[pair, n], np.float32(0.0))


@jit
def _weighted_sum(values, weights, count, sums):
    """Add ``weights . values`` to the sums (TILE_ROWS,), one term after another."""
    for n in range(count):
        for pair in range(TILE_ROWS):
            sums[pair] += weights[n] * values[n, pair]


@jit
def score_network(left_columns, right_columns, network, left, right, scores):
    """Fill `scores` (m,) float32 for pairs of row numbers by a network.

    `left_columns` and `right_columns` (n, padded columns) are float32; `network` is what
    `fastpair.kernels.network.NetworkTables` makes of a plan.
    """
    weights, widths, output, direct, orders, constants = network
    columns = widths[0] // (2 if orders else 3)
    together = _GROUPS_TOGETHER * TILE_ROWS
    inputs = np.zeros((_GROUPS_TOGETHER, HEADER + widths[0], TILE_ROWS), np.float32)
    hidden = np.zeros((2, _GROUPS_TOGETHER, HEADER + widths[1:].max(), TILE_ROWS), np.float32)
    sums = np.empty((_GROUPS_TOGETHER, 2, TILE_ROWS), np.float32)
    for start in range(0, len(scores), together):
        count = min(together, len(scores) - start)
        groups = (count + TILE_ROWS - 1) // TILE_ROWS
        for order in range(2 if orders else 1):
            for n in range(count):
                x, y = left_columns[left[start + n]], right_columns[right[start + n]]
                if order == 1:
                    x, y = y, x
                own = inputs[n // TILE_ROWS, HEADER:]
                _network_inputs(x, y, columns, orders, own, n % TILE_ROWS)
            _network_layer(inputs, weights[0], widths[1], groups, hidden[0])
            for layer in range(1, len(weights)):
                here, there = hidden[(layer - 1) % 2], hidden[layer % 2]
                _network_layer(here, weights[layer], widths[layer + 1], groups, there)
            for group in range(groups):
                own = sums[group, order]
                own[:] = 0
                last = hidden[(len(weights) - 1) % 2, group, HEADER:]
                _weighted_sum(last, output, len(output), own)
                _weighted_sum(inputs[group, HEADER:], direct, len(direct), own)
        for n in range(count):
            own = sums[n // TILE_ROWS, :, n % TILE_ROWS]
            raw = (own[0] + own[1]) * np.float32(0.5) if orders else own[0]
            scores[start + n] = constants[2] + constants[1] * (constants[0] + raw)


# --- all pairs: the walk -------------------------------------------------------------------------


class Walk(NamedTuple):
    """Packed operands of a walk, by address, and what its tiles share.

    form is a number of `FORM_TAGS`; left_bytes and right_bytes are those of a panel; products,
    plus and minus the steps of a tile; step is what a difference of bytes counts. first_left and
    first_right are the table rows of the first panels, left_count and right_count the rows that
    are real. distinct is False where left and right are one table: its diagonal is left out.
    triangle is True where of one table, walked whole, only pairs of a row with a higher one are
    wanted.
    """

    form: Any
    left: int
    right: int
    left_bytes: int
    right_bytes: int
    left_panels: int
    right_panels: int
    products: int
    plus: int
    minus: int
    constant: np.float32
    step: np.float32
    first_left: int
    first_right: int
    left_count: int
    right_count: int
    distinct: bool
    triangle: bool


def make_walk(
    left: Panels,
    right: Panels,
    plan: Plan,
    step: np.float32,
    first: tuple[int, int],
    distinct: bool,
    triangle: bool = False,
) -> Walk:
    """Return the arguments of a walk; the panels must live as long as they are used.

    Parameters
    ----------
    left, right : panels of one form.
    step : that of the frame in which both were packed.
    first : table rows of the first left and the first right panel.
    distinct : whether left and right are two tables.
    triangle : whether only pairs (i, j) with i < j of one table are wanted; `first` is then (0, 0).
    """
    if left.form != right.form or (left.side, right.side) != ("left", "right"):
        raise ValueError(f"panels {left.form} {left.side} do not meet {right.form} {right.side}")
    return Walk(
        FORM_TAGS[left.form],
        left.words.ctypes.data,
        right.words.ctypes.data,
        left.words.shape[1] * 4,
        right.words.shape[1] * 4,
        len(left.words),
        len(right.words),
        *word_counts(plan, left.form),
        np.float32(plan.constant),
        step / 2,
        *first,
        len(left.size),
        len(right.size),
        distinct,
        triangle,
    )


_GROUP_BYTES, _GROUP_PANELS = 128 * 1024, 32
"""Left panels that are walked together: they, and what is kept of their rows, stay in cache."""


@jit_generator
def _tiles(walk, task):
    """Yield the (left panel, right panel) of a task: first and last left, then right, panel.

    A group of left panels stays in cache while right panels pass once. For one left panel right
    panels come in increasing order, and the other way round.
    """
    first, last, start, stop = task
    group = max(1, min(_GROUP_PANELS, _GROUP_BYTES // walk.left_bytes))
    for low in range(first, last, group):
        for j in range(start, stop):
            high = min(low + group, last)
            if walk.triangle:
                high = min(high, (j * TILE_COLUMNS + TILE_COLUMNS - 2) // TILE_ROWS + 1)
            for i in range(low, high):
                yield i, j


@jit_generator
def _strips(walk, task):
    """Yield the panels of a task like `_tiles`, in strips along left panels: for dense results.

    What is written then lies together; a block of right panels stays in cache.
    """
    first, last, start, stop = task
    block = max(1, 4 * _GROUP_BYTES // walk.right_bytes)
    for left in range(start, stop, block):
        for i in range(first, last):
            for j in range(left, min(left + block, stop)):
                yield i, j


@jit
def _tile(walk, i, j, floors, others, tile, masks):
    """Compute one tile; return whether it reaches a floor and was stored, see `register_tile`."""
    return register_tile(
        walk.form,
        walk.left + i * walk.left_bytes,
        walk.right + j * walk.right_bytes,
        walk.products,
        walk.plus,
        walk.minus,
        walk.constant,
        walk.step,
        floors,
        others,
        tile,
        masks,
    )


@jit
def _wanted(walk, row, j):
    """Bits of a tile's columns that count for a row: not itself, in a triangle only later ones."""
    itself = walk.first_left + row - walk.first_right - j * TILE_COLUMNS
    if walk.distinct or itself < 0 or (itself >= TILE_COLUMNS and not walk.triangle):
        return np.int64(-1)
    if walk.triangle:
        return np.int64(-2) << itself
    return ~(np.int64(1) << itself)


# --- all pairs: top-k ----------------------------------------------------------------------------


_MOST_COUNTED = 256
"""Candidates whose places are found by counting, which is quadratic, but has no branch."""


@jit
def _key(value, column):
    """One integer of a candidate, greater for a greater value, then for a lower column."""
    bits = bits_of(value + np.float32(0.0))  # -0 becomes +0: they are ties
    if bits < 0:
        bits ^= 0x7FFFFFFF
    return (np.int64(bits) << 32) | (np.int64(0xFFFFFFFF) - np.int64(column))


@jit
def _value_of(key):
    bits = np.int32(key >> 32)
    if bits < 0:
        bits ^= 0x7FFFFFFF
    return float_of(bits)


@jit
def _column_of(key):
    return np.int64(0xFFFFFFFF) - (key & np.int64(0xFFFFFFFF))


@jit
def _raise(heap, count, value):
    """Replace the least of the `count` numbers of a heap, its root, at an address, by a greater."""
    root = 0
    while 2 * root + 1 < count:
        child = 2 * root + 1
        least = load_float32(heap + 4 * child)
        if child + 1 < count:
            other = load_float32(heap + 4 * child + 4)
            if other < least:
                child, least = child + 1, other
        if least >= value:
            break
        put(heap + 4 * root, least)
        root = child
    put(heap + 4 * root, value)


@jit
def _sink(keys, root, count):
    """Restore a heap, whose root is the least, below one place."""
    while 2 * root + 1 < count:
        child = 2 * root + 1
        if child + 1 < count and keys[child + 1] < keys[child]:
            child += 1
        if keys[child] >= keys[root]:
            return
        keys[root], keys[child] = keys[child], keys[root]
        root = child


@jit
def _rank(keys, count):
    """Sort keys in place, the greatest first. They differ, as columns do."""
    if count > _MOST_COUNTED:  # heapsort
        for root in range(count // 2 - 1, -1, -1):
            _sink(keys, root, count)
        for last in range(count - 1, 0, -1):
            keys[0], keys[last] = keys[last], keys[0]
            _sink(keys, 0, last)
        return
    before = keys[:count].copy()
    for n in range(count):
        place = 0
        for other in before:  # whole vectors are compared at once
            place += other > before[n]
        keys[place] = before[n]


@jit
def _drop_below(keys, first, count, level):
    """Drop keys from place `first` on whose value is below a level; return how many stay."""
    least, kept = _key(level, np.int64(0xFFFFFFFF)), first
    for n in range(first, count):
        if keys[n] >= least:
            keys[kept] = keys[n]
            kept += 1
    return kept


@jit
def _rescore(table, row, keys, first, count):
    """Put the pair kernel's scores into keys of a row; return the least raw score among them."""
    for n in range(first, count):
        start = table.right + _column_of(keys[n]) * table.row_bytes
        for line in range(0, table.row_bytes, 64):
            prefetch(start + line)
    least = np.float32(np.inf)
    for n in range(first, count):
        column = _column_of(keys[n])
        raw = exact_raw(table, row, column)
        least = min(least, raw)
        keys[n] = _key(apply_link(raw, table), column)
    return min(least, link_ceiling(table))


@jit
def _settle(table, row, k, floor, keys, count):
    """Bring a row's best k of `count` candidates to the front, scored; return how many there are.

    Once the k candidates of the greatest upper bounds are scored, one whose bound is below the
    least of them is not among the k best.
    """
    count = _drop_below(keys, 0, count, tie_level(floor, table))
    _rank(keys, count)
    front = min(k, count)
    least = _rescore(table, row, keys, 0, front)
    count = _drop_below(keys, front, count, tie_level(least, table))
    _rescore(table, row, keys, front, count)
    _rank(keys, count)
    return front


@jit
def _make_room(table, first_row, row, k, floor, filled, heap, keys):
    """Drop what is hopeless among a row's candidates, and raise its floor where that is too little.

    k pairs reach the floor. So a candidate whose upper bound is below it is not among the k best,
    unless its score is the same and its column lower: that does not happen to candidates that are
    still to come, whose columns are higher. Where ties keep too many, the pair kernel decides and
    exactly k stay: the best by score, which rounding or a link's end may make equal where raw
    scores are not.
    """
    own, count = keys[row], keys.shape[1]
    filled[row] = _drop_below(own, 0, count, tie_level(floor[row], table))
    if filled[row] <= count - (count - k) // 4:
        return
    filled[row] = _settle(table, first_row + row, k, floor[row], own, filled[row])
    least = np.float32(np.inf)
    for n in range(k):
        column = _column_of(own[n])
        raw = min(exact_raw(table, first_row + row, column), link_ceiling(table))
        own[n] = _key(raw, column)
        least = min(least, raw)
    if least > heap[row, 0]:
        heap[row] = LOWEST
        for n in range(k):
            _raise(address(heap) + row * k * 4, k, _value_of(own[n]))
    floor[row] = max(floor[row], heap[row, 0])


class _Candidates(NamedTuple):
    """Addresses of the arrays of `scan_top_k`: as arrays they would cost reference counts."""

    floor: int
    filled: int
    heap: int
    keys: int
    k: int
    capacity: int


@jit
def _offer(state, row, column, most, least):
    """Add a column to a row's candidates if `most`, its upper bound, reaches the row's floor.

    Return whether the row has no more room.
    """
    if most < load_float32(state.floor + 4 * row):
        return False
    place = get(state.filled + 8 * row, np.int64(0))
    put(state.keys + 8 * (row * state.capacity + place), _key(most, column))
    put(state.filled + 8 * row, place + 1)
    heap = state.heap + 4 * row * state.k
    if least > load_float32(heap):
        _raise(heap, state.k, least)
        put(state.floor + 4 * row, load_float32(heap))
    return place + 1 == state.capacity


@jit
def scan_top_k(table, walk, task, k, left_bound, right_bound, floor, filled, heap, keys):
    """Add to each row's candidates every column that may be among its k best.

    `task` is the first and last left, then right, panel to walk; in a triangle both rows of a pair
    become each other's candidates. The panels' biases were raised by `left_bound` (left rows,) and
    `right_bound` (right rows,) float32, whose sum bounds a pair's error: tiles tell upper bounds.

    Candidates live in `keys` (rows, capacity) int64, capacity > k, `filled` (rows,) int64 of them
    in use; `heap` (rows, k) float32 holds the k greatest lower bounds, `LOWEST` at first; `floor`,
    float32 of as many rows as whole panels of either side hold, is what an upper bound must reach
    to matter, `LOWEST` at first and infinite past the real rows. All count rows from the first
    left panel and go on from call to call; tasks must bring a row's partners in rising order.
    """
    tile, masks = np.empty((TILE_ROWS, TILE_COLUMNS), np.float32), np.empty(TILE_ROWS, np.int64)
    nothing = np.full(TILE_COLUMNS, np.inf, np.float32)
    arrays = address(floor), address(filled), address(heap), address(keys)
    state = _Candidates(*arrays, k, keys.shape[1])
    top, first = link_ceiling(table), walk.first_left
    for i, j in _tiles(walk, task):
        low = i * TILE_ROWS
        # Numba frees an array after its last use, so addresses are taken where they are used.
        others = state.floor + j * TILE_COLUMNS * 4 if walk.triangle else address(nothing)
        if not _tile(walk, i, j, state.floor + low * 4, others, address(tile), address(masks)):
            continue
        for row in range(low, min(low + TILE_ROWS, walk.left_count)):
            mask = masks[row - low] & _wanted(walk, row, j)
            while mask:
                n = lowest_bit(mask)
                mask &= mask - 1
                most, other = min(tile[row - low, n], top), j * TILE_COLUMNS + n
                bound = left_bound[row] + right_bound[other]
                least = max(most - bound - bound, LOWEST)
                if _offer(state, row, walk.first_right + other, most, least):
                    _make_room(table, first, row, k, floor, filled, heap, keys)
                if walk.triangle and _offer(state, other, row, most, least):
                    _make_room(table, first, other, k, floor, filled, heap, keys)


@jit
def finish_top_k(table, first_row, low, high, k, floor, filled, keys, scores, indices):
    """Score the candidates of rows `low` to `high` by the pair kernel and write the best k.

    Rows count from the table's row `first_row`.

    `scores` (rows, k) float32 and `indices` (rows, k) int64 are filled: by score, then by lower
    index; rows with fewer columns than k end with NaN and -1.
    """
    for row in range(low, high):
        own = keys[row]
        count = _settle(table, first_row + row, k, floor[row], own, filled[row])
        for n in range(count):
            scores[row, n], indices[row, n] = _value_of(own[n]), _column_of(own[n])
        for n in range(count, scores.shape[1]):
            scores[row, n], indices[row, n] = np.nan, -1


# --- all pairs: threshold, dense, histogram ------------------------------------------------------


@jit
def scan_threshold(table, walk, task, minimum, floor, rows, columns, scores):
    """Collect every pair of a task whose score by the pair kernel is at least `minimum`.

    `task` and the biases are as in `scan_top_k`; `floor` is the raw score that an upper bound must
    reach to matter. Hits go to `rows` int64 (counted from the first left panel),
    `columns` int64 and `scores` float32, of one row in rising column, of one column in rising row.
    Return the number of hits, which may exceed the room: then nothing more was written.
    """
    tile, masks = np.empty((TILE_ROWS, TILE_COLUMNS), np.float32), np.empty(TILE_ROWS, np.int64)
    floors = np.full(TILE_ROWS, floor, np.float32)
    nothing = np.full(TILE_COLUMNS, np.inf, np.float32)
    found = 0
    for i, j in _tiles(walk, task):
        low = i * TILE_ROWS
        if not _tile(walk, i, j, address(floors), address(nothing), address(tile), address(masks)):
            continue
        for row in range(low, min(low + TILE_ROWS, walk.left_count)):
            mask = masks[row - low] & _wanted(walk, row, j)
            while mask:
                column = walk.first_right + j * TILE_COLUMNS + lowest_bit(mask)
                mask &= mask - 1
                score = apply_link(exact_raw(table, walk.first_left + row, column), table)
                if score < minimum:
                    continue
                if found < len(rows):
                    rows[found], columns[found], scores[found] = row, column, score
                found += 1
    return found


@jit
def group_by_row(rows, counts, columns, scores, sorted_columns, sorted_scores):
    """Bring hits of `scan_threshold` into row order, keeping the order within a row.

    `counts` (rows,) int64 is filled with the hits of each row.
    """
    counts[:] = 0
    for row in rows:
        counts[row] += 1
    place = np.cumsum(counts) - counts
    for n in range(len(rows)):
        target = place[rows[n]]
        sorted_columns[target], sorted_scores[target] = columns[n], scores[n]
        place[rows[n]] += 1


@jit
def scan_dense(table, walk, task, slack, others, scores):
    """Fill `scores` (rows, columns) float32 with the tiles' scores, both from the first panels.

    Where a root would make much of a tile's error, the pair kernel decides: raw scores within 64
    times the row's `slack` (rows,) or the column's, `others` (columns,), float32, of 0.
    """
    tile, masks = np.empty((TILE_ROWS, TILE_COLUMNS), np.float32), np.empty(TILE_ROWS, np.int64)
    floors, nothing = _no_floors()
    for i, j in _strips(walk, task):
        _tile(walk, i, j, address(floors), address(nothing), address(tile), address(masks))
        low, start = i * TILE_ROWS, j * TILE_COLUMNS
        width = min(TILE_COLUMNS, walk.right_count - start)
        for row in range(low, min(low + TILE_ROWS, walk.left_count)):
            if table.link == 0:  # the usual case, without a branch: whole vectors
                found, wanted = tile[row - low], scores[row, start : start + width]
                for n in range(width):
                    wanted[n] = table.constants[2] + table.constants[1] * found[n]
                continue
            rooted = table.link == 1 or table.link == 3
            for n in range(width):
                raw = tile[row - low, n]
                if rooted and raw > -64 * max(slack[row], others[start + n]):
                    raw = exact_raw(table, walk.first_left + row, walk.first_right + start + n)
                scores[row, start + n] = apply_link(raw, table)


@jit
def scan_range(walk, task):
    """Return the least and the greatest raw score of the tiles of a task, the diagonal left out."""
    tile, masks = np.empty((TILE_ROWS, TILE_COLUMNS), np.float32), np.empty(TILE_ROWS, np.int64)
    floors, nothing = _no_floors()
    least, greatest = np.float32(np.inf), -np.float32(np.inf)
    for i, j in _tiles(walk, task):
        _tile(walk, i, j, address(floors), address(nothing), address(tile), address(masks))
        low, width = i * TILE_ROWS, min(TILE_COLUMNS, walk.right_count - j * TILE_COLUMNS)
        for row in range(low, min(low + TILE_ROWS, walk.left_count)):
            wanted, found = _wanted(walk, row, j), tile[row - low]
            if wanted == -1:  # the usual case, without a branch: whole vectors
                for n in range(width):
                    least, greatest = min(least, found[n]), max(greatest, found[n])
                continue
            for n in range(width):
                if (wanted >> n) & 1:
                    least, greatest = min(least, found[n]), max(greatest, found[n])
    return least, greatest


@jit
def scan_histogram(table, walk, task, edges, slack, grid, cells, counts):
    """Count the scores of a task into bins [edges[b], edges[b + 1]), the last one closed, exactly.

    `edges` (bins + 1,) float32 are equally spaced scores; `counts` (bins,) int64 grows. Raw scores
    are looked up in `cells`, int32 bins of equal steps of the raw score, -1 where a step with the
    tile's error reaches over an edge; `grid` is the start of the first and how many there are to
    one. Such a score is decided by the pair kernel, if within the row's `slack`, in units of the
    raw score, there is an edge. Scores outside the edges go to the first and the last bin.
    """
    tile, masks = np.empty((TILE_ROWS, TILE_COLUMNS), np.float32), np.empty(TILE_ROWS, np.int64)
    floors, nothing = _no_floors()
    start, steps = grid
    last = np.float32(len(cells) - 1)
    for i, j in _tiles(walk, task):
        _tile(walk, i, j, address(floors), address(nothing), address(tile), address(masks))
        low, width = i * TILE_ROWS, min(TILE_COLUMNS, walk.right_count - j * TILE_COLUMNS)
        for row in range(low, min(low + TILE_ROWS, walk.left_count)):
            wanted = _wanted(walk, row, j)
            for n in range(width):
                raw = tile[row - low, n]
                cell = min(max((raw - start) * steps, np.float32(0)), last)
                place = cells[np.int32(cell)]
                if not (wanted >> n) & 1:
                    continue
                if place < 0:
                    column = walk.first_right + j * TILE_COLUMNS + n
                    here = walk.first_left + row
                    place = _exact_bin(table, here, column, raw, slack[row], edges, len(counts))
                counts[place] += 1


@jit
def _exact_bin(table, row, column, raw, slack, edges, bins):
    """The bin of a pair whose raw score is within the slack of a given one."""
    place = _bin_of(apply_link(raw - slack, table), edges, bins)
    if place == _bin_of(apply_link(raw + slack, table), edges, bins):
        return place
    return _bin_of(apply_link(exact_raw(table, row, column), table), edges, bins)


@jit
def _bin_of(score, edges, bins):
    width = (edges[bins] - edges[0]) / bins
    place = min(max(int((score - edges[0]) / width), 0), bins - 1) if width > 0 else 0
    while place > 0 and score < edges[place]:
        place -= 1
    while place < bins - 1 and score >= edges[place + 1]:
        place += 1
    return place


@jit
def _link_all(raw, table, scores):
    for n in range(len(raw)):
        scores[n] = apply_link(raw[n], table)


def link_scores(raw: np.ndarray, table: Table) -> np.ndarray:
    """Return the scores (m,) float32 of raw scores (m,) float32."""
    scores = np.empty_like(raw)
    _link_all(raw, table, scores)
    return scores


@jit
def _floor_all(scores, link, slope, offset, floors):
    for n in range(len(scores)):
        floors[n] = raw_floor_of(np.float64(scores[n]), link, slope, offset)


def raw_floors(scores: np.ndarray, plan: Plan) -> np.ndarray:
    """Return `Plan.raw_floor` (m,) float64 of scores (m,) float32."""
    floors = np.empty(len(scores))
    _floor_all(scores, plan.link_code, plan.slope, plan.offset, floors)
    return floors
