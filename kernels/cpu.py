"""Numba kernels: serial workers that fill given arrays and may run side by side in threads.

The pair kernel gathers two rows and adds their terms; the tile kernels walk a block of left rows
over packed right panels and keep what a reduction wants. What they read comes as `Table` and
`Panels`, whose numbers and addresses are plain scalars: reading an array out of a tuple costs two
atomic reference counts, as much as a short pair. Whoever makes them keeps the arrays alive.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba.core import types
from numba.extending import overload

from fastpair.kernels import Plan, raw_floor
from fastpair.kernels.simd import (
    TILE_COLUMNS,
    TILE_ROWS,
    add,
    address,
    fma,
    integer_zeros,
    jit,
    jit_generator,
    load,
    load_float32,
    lowest_bit,
    maximum,
    prefetch,
    register_tile,
    row_mask,
    subtract,
    total,
    zeros,
)

_AHEAD_BYTES = 4608
"""Bytes of rows that are asked for ahead of use, a side: measured best for rows of 128 to 512."""

_ELEMENTS = {
    "float32": np.float32(0),
    "float16": np.int16(0),
    "bfloat16": np.uint16(0),
    "int8": np.int8(0),
}
"""A number whose type tells kernels how columns are stored."""

LOWEST = np.float32(np.finfo(np.float32).min)
"""Threshold that every finite score passes; -inf, which padding scores, does not."""


class Table(NamedTuple):
    """What kernels need to score a pair exactly: addresses of both tables, layout, constants."""

    left: int
    right: int
    row_bytes: int
    element: Any
    layout: tuple[int, ...]
    constants: tuple[np.float32, ...]
    link: int


def table_arguments(left_rows: np.ndarray, right_rows: np.ndarray, plan: Plan) -> Table:
    """Return the pair kernel's arguments for two tables (rows, row_bytes) uint8 of one plan.

    They hold addresses: the tables must live as long as they are used.
    """
    for rows in (left_rows, right_rows):
        if not rows.flags.c_contiguous or rows.shape[1] != plan.layout.row_bytes:
            raise ValueError(f"rows {rows.shape} are not contiguous or not of {plan.layout}")
    return Table(
        left_rows.ctypes.data,
        right_rows.ctypes.data,
        plan.layout.row_bytes,
        _ELEMENTS[plan.precision],
        plan.layout.kernel_arguments(),
        plan.kernel_constants(),
        plan.link_code,
    )


# --- one pair ------------------------------------------------------------------------------------


def _itemsize(element):
    """Bytes of a stored column."""


@overload(_itemsize, inline="always")
def _pick_itemsize(element):
    size = element.bitwidth // 8
    return lambda element: size


@jit
def _float_sum(left, right, element, layout):
    """Sum of all terms of two float rows, as the contract defines its bits."""
    step = 16 * _itemsize(element)
    lanes, nothing = zeros(), zeros()
    for _ in range(layout[0]):
        lanes = fma(load(left, element), load(right, element), lanes)
        left, right = left + step, right + step
    for _ in range(layout[1]):
        lanes = fma(subtract(nothing, load(left, element)), load(right, element), lanes)
        left, right = left + step, right + step
    for _ in range(layout[2]):
        lanes = add(lanes, maximum(load(left, element), load(right, element)))
        left, right = left + step, right + step
    for _ in range(layout[3]):
        lanes = subtract(lanes, maximum(load(left, element), load(right, element)))
        left, right = left + step, right + step
    for sign in range(2):
        half = layout[4 + sign] * step
        for _ in range(layout[4 + sign]):
            pair = add(
                maximum(load(left, element), load(right + half, element)),
                maximum(load(left + half, element), load(right, element)),
            )
            lanes = add(lanes, pair) if sign == 0 else subtract(lanes, pair)
            left, right = left + step, right + step
        left, right = left + half, right + half
    for _ in range(layout[6]):
        apart = subtract(load(left, element), load(right, element))
        lanes = add(lanes, maximum(apart, subtract(nothing, apart)))
        left, right = left + step, right + step
    for _ in range(layout[7]):
        apart = subtract(load(left, element), load(right, element))
        lanes = subtract(lanes, maximum(apart, subtract(nothing, apart)))
        left, right = left + step, right + step
    for _ in range(layout[8]):
        apart = subtract(load(left, element), load(right, element))
        lanes = fma(apart, apart, lanes)
        left, right = left + step, right + step
    for _ in range(layout[9]):
        apart = subtract(load(left, element), load(right, element))
        lanes = fma(subtract(nothing, apart), apart, lanes)
        left, right = left + step, right + step
    return total(lanes)


@jit
def _integer_run(left, right, element, vectors, segment):
    """Exact integer sum of the terms of one run of an int8 row; mirrored takes both halves."""
    lanes = integer_zeros()
    half = 16 * vectors
    for number in range(vectors):
        here, there = left + 16 * number, right + 16 * number
        x, y = load(here, element), load(there, element)
        if segment == 0:
            lanes = fma(x, y, lanes)
        elif segment == 1:
            lanes = add(lanes, maximum(x, y))
        elif segment == 2:
            pair = add(
                maximum(x, load(there + half, element)), maximum(load(here + half, element), y)
            )
            lanes = add(lanes, pair)
        elif segment == 3:
            lanes = add(lanes, maximum(subtract(x, y), subtract(y, x)))
        else:
            lanes = fma(subtract(x, y), subtract(x, y), lanes)
    return total(lanes)


@jit
def _scale(row, layout):
    return load_float32(row + layout[11]) if layout[11] >= 0 else np.float32(0.0)


@jit
def _integer_sum(left, right, element, layout, constants):
    """Sum of all terms of two int8 rows: exact integers, scaled once a segment."""
    scales = _scale(left, layout) * _scale(right, layout)
    result = np.float32(0.0)
    for segment in range(5):
        width = 32 if segment == 2 else 16
        plus, minus = layout[2 * segment], layout[2 * segment + 1]
        value = _integer_run(left, right, element, plus, segment)
        left, right = left + width * plus, right + width * plus
        value -= _integer_run(left, right, element, minus, segment)
        left, right = left + width * minus, right + width * minus
        scale = constants[3 + segment]
        if segment == 0:
            scale = scales
        elif segment == 4:
            scale = scale * scale
        result = result + np.float32(value) * scale
    return result


def _terms(left, right, element, layout, constants):
    """Sum of all terms of two rows at addresses; the stored type picks the loops."""


@overload(_terms, inline="always")
def _pick_terms(left, right, element, layout, constants):
    if element == types.int8:
        return lambda left, right, element, layout, constants: _integer_sum(
            left, right, element, layout, constants
        )
    return lambda left, right, element, layout, constants: _float_sum(left, right, element, layout)


@jit
def _raw(table, left, right):
    """Raw score of the rows at two addresses."""
    layout = table.layout
    bias = np.float32(0.0)
    if layout[10] >= 0:
        bias = load_float32(left + layout[10]) + load_float32(right + layout[10])
    start = table.constants[0] + bias
    return start + _terms(left, right, table.element, layout, table.constants)


@jit
def _link(raw, table):
    """offset + slope * link(raw), in float32; exp and log1p in float64, rounded once."""
    value = raw
    if table.link > 0:
        below = min(raw, np.float32(0.0))
        if table.link == 1:
            value = -np.sqrt(-below)
        elif table.link == 2:
            value = np.float32(math.exp(np.float64(below)))
        else:
            t = np.float64(below)
            value = np.float32(-math.log1p(-t + math.sqrt(t * (t - 2.0))))
    return table.constants[2] + table.constants[1] * value


@jit
def _ceiling(table):
    """Raw score from which on the link rises no more."""
    return np.float32(0.0) if table.link > 0 else np.float32(np.inf)


_raw_floor = jit(raw_floor)


@jit
def _level(raw, table):
    """A raw score that is not above any whose score may equal that of `raw`.

    Links and the rounding of slope and offset make many raw scores one score.
    """
    slope, offset = np.float64(table.constants[1]), np.float64(table.constants[2])
    floor = _raw_floor(np.float64(_link(raw, table)), table.link, slope, offset)
    return min(raw, np.float32(max(floor, np.float64(LOWEST))))


@jit
def score_pairs(table, left, right, scores):
    """Fill `scores` (m,) float32 for pairs of row numbers, `left` and `right` (m,) integers."""
    left_base, right_base, row_bytes = table.left, table.right, table.row_bytes
    ahead = max(2, _AHEAD_BYTES // row_bytes)
    last = len(scores) - 1
    for pair in range(len(scores)):
        following = min(pair + ahead, last)
        next_left = left_base + np.int64(left[following]) * row_bytes
        next_right = right_base + np.int64(right[following]) * row_bytes
        for line in range(0, row_bytes, 64):
            prefetch(next_left + line)
            prefetch(next_right + line)
        here = left_base + np.int64(left[pair]) * row_bytes
        there = right_base + np.int64(right[pair]) * row_bytes
        scores[pair] = _link(_raw(table, here, there), table)


# --- one pair: networks --------------------------------------------------------------------------

_GROUPS_TOGETHER = 8
"""Groups of TILE_ROWS pairs that pass a layer together, so that its weights are read for all."""


def pack_layer(matrix: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a layer's weights (panels, f, TILE_COLUMNS) and biases (panels, TILE_COLUMNS)."""
    units, inputs = matrix.shape
    panels = -(-units // TILE_COLUMNS)
    weights = np.zeros((panels * TILE_COLUMNS, inputs), np.float32)
    biases = np.zeros(panels * TILE_COLUMNS, np.float32)
    weights[:units], biases[:units] = matrix, bias
    turned = weights.reshape(panels, TILE_COLUMNS, inputs).swapaxes(1, 2)
    return np.ascontiguousarray(turned), biases.reshape(panels, TILE_COLUMNS)


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
def _network_layer(inputs, weights, biases, units, groups, outputs):
    """Fill `outputs` (groups, units, TILE_ROWS) with max(weights inputs + biases, 0)."""
    tile = np.empty((TILE_ROWS, TILE_COLUMNS), np.float32)
    nothing = np.zeros(TILE_ROWS, np.float32)
    count = weights.shape[1]
    for panel in range(len(weights)):
        first = panel * TILE_COLUMNS
        for group in range(groups):
            register_tile(
                address(inputs) + group * inputs.shape[1] * TILE_ROWS * 4,
                address(weights) + panel * count * TILE_COLUMNS * 4,
                address(nothing),
                address(biases) + panel * TILE_COLUMNS * 4,
                count,
                0,
                0,
                np.float32(0.0),
                -np.float32(np.inf),
                address(tile),
            )
            for n in range(min(TILE_COLUMNS, units - first)):
                for pair in range(TILE_ROWS):
                    outputs[group, first + n, pair] = max(tile[pair, n], np.float32(0.0))


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
    weights, biases, widths, output, direct, orders, constants = network
    columns = widths[0] // (2 if orders else 3)
    together = _GROUPS_TOGETHER * TILE_ROWS
    inputs = np.zeros((_GROUPS_TOGETHER, widths[0], TILE_ROWS), np.float32)
    widest = widths[1:].max()
    hidden = np.empty((2, _GROUPS_TOGETHER, widest, TILE_ROWS), np.float32)
    sums = np.empty((_GROUPS_TOGETHER, 2, TILE_ROWS), np.float32)
    for start in range(0, len(scores), together):
        count = min(together, len(scores) - start)
        groups = (count + TILE_ROWS - 1) // TILE_ROWS
        for order in range(2 if orders else 1):
            for n in range(count):
                x, y = left_columns[left[start + n]], right_columns[right[start + n]]
                if order == 1:
                    x, y = y, x
                _network_inputs(x, y, columns, orders, inputs[n // TILE_ROWS], n % TILE_ROWS)
            _network_layer(inputs, weights[0], biases[0], widths[1], groups, hidden[0])
            for layer in range(1, len(weights)):
                _network_layer(
                    hidden[(layer - 1) % 2],
                    weights[layer],
                    biases[layer],
                    widths[layer + 1],
                    groups,
                    hidden[layer % 2],
                )
            for group in range(groups):
                own = sums[group, order]
                own[:] = 0
                _weighted_sum(hidden[(len(weights) - 1) % 2, group], output, len(output), own)
                _weighted_sum(inputs[group], direct, len(direct), own)
        for n in range(count):
            own = sums[n // TILE_ROWS, :, n % TILE_ROWS]
            raw = (own[0] + own[1]) * np.float32(0.5) if orders else own[0]
            scores[start + n] = constants[2] + constants[1] * (constants[0] + raw)


# --- all pairs: the walk -------------------------------------------------------------------------


class Panels(NamedTuple):
    """Packed operands of a walk, by address, and what its tiles share.

    A panel holds, for each of `columns` columns, TILE_ROWS left or TILE_COLUMNS right rows;
    products, plus and minus are the numbers of the three kinds of column. first_left and
    first_right are the table rows of the first panels, left_count and right_count the rows that
    are real. distinct is False where left and right are one table: its diagonal is left out.
    """

    left: int
    left_bias: int
    right: int
    right_bias: int
    left_panels: int
    right_panels: int
    columns: int
    products: int
    plus: int
    minus: int
    constant: np.float32
    first_left: int
    first_right: int
    left_count: int
    right_count: int
    distinct: bool


def make_panels(
    left: tuple[np.ndarray, np.ndarray],
    right: tuple[np.ndarray, np.ndarray],
    counts: tuple[int, int, int],
    constant: float,
    first: tuple[int, int],
    real: tuple[int, int],
    distinct: bool,
) -> Panels:
    """Return the arguments of a walk; the arrays must live as long as they are used.

    Parameters
    ----------
    left, right : columns (panels, K, width) and biases (panels, width), contiguous float32.
    counts : numbers of product, added-maximum and subtracted-maximum columns; they sum to K.
    constant : the c of the formula.
    first : table rows of the first left and the first right panel.
    real : rows that are not padding, left and right.
    distinct : whether left and right are two tables.
    """
    for array in (*left, *right):
        if not array.flags.c_contiguous or array.dtype != np.float32:
            raise ValueError("panels must be contiguous float32")
    return Panels(
        left[0].ctypes.data,
        left[1].ctypes.data,
        right[0].ctypes.data,
        right[1].ctypes.data,
        len(left[0]),
        len(right[0]),
        left[0].shape[1],
        *counts,
        np.float32(constant),
        *first,
        *real,
        distinct,
    )


_BLOCK_BYTES = 512 * 1024
"""Right panels that are walked together: half of a usual second-level cache."""

_BLOCK_ROWS = 16
"""Left panels that share a block of right panels."""


@jit_generator
def _walk(panels, first, last):
    """Yield (left panel, right panel) so that a block of right panels stays in cache.

    For one left panel, right panels come in increasing order.
    """
    number = panels.right_panels
    block = max(1, _BLOCK_BYTES // max(1, panels.columns * TILE_COLUMNS * 4))
    for group in range(first, last, _BLOCK_ROWS):
        for start in range(0, number, block):
            for i in range(group, min(group + _BLOCK_ROWS, last)):
                for j in range(start, min(start + block, number)):
                    yield i, j


@jit
def _tile(panels, i, j, threshold, tile):
    """Compute one tile into an address; return whether it reaches the threshold and was stored."""
    best = register_tile(
        panels.left + i * panels.columns * TILE_ROWS * 4,
        panels.right + j * panels.columns * TILE_COLUMNS * 4,
        panels.left_bias + i * TILE_ROWS * 4,
        panels.right_bias + j * TILE_COLUMNS * 4,
        panels.products,
        panels.plus,
        panels.minus,
        panels.constant,
        threshold,
        tile,
    )
    return best >= threshold


@jit
def _exact(table, row, column):
    """Raw score by the pair kernel of two row numbers."""
    here, there = table.left + row * table.row_bytes, table.right + column * table.row_bytes
    return _raw(table, here, there)


@jit
def _lowest_floor(floor, low, high):
    """The floor that a tile of these rows must reach to matter."""
    least = floor[low]
    for row in range(low + 1, high):
        least = min(least, floor[row])
    return least


@jit
def _row_hits(panels, row, j, tile, floor):
    """Bits of a tile's columns that reach a row's floor, without padding and the diagonal."""
    mask = row_mask(tile + (row % TILE_ROWS) * TILE_COLUMNS * 4, floor)
    if not panels.distinct:
        itself = panels.first_left + row - panels.first_right - j * TILE_COLUMNS
        if 0 <= itself < TILE_COLUMNS:
            mask &= ~(np.int64(1) << itself)
    return mask


# --- all pairs: top-k ----------------------------------------------------------------------------


@jit
def _comes_later(values, columns, a, b):
    """Whether candidate a ranks behind b: a lower value, or the same and a higher column."""
    return values[a] < values[b] or (values[a] == values[b] and columns[a] > columns[b])


@jit
def _sink(values, columns, root, count):
    """Restore a heap, whose root ranks last, below one place."""
    while 2 * root + 1 < count:
        child = 2 * root + 1
        if child + 1 < count and _comes_later(values, columns, child + 1, child):
            child += 1
        if not _comes_later(values, columns, child, root):
            return
        values[root], values[child] = values[child], values[root]
        columns[root], columns[child] = columns[child], columns[root]
        root = child


@jit
def _rank(values, columns, count):
    """Sort candidates in place by value, then by lower column (heapsort)."""
    for root in range(count // 2 - 1, -1, -1):
        _sink(values, columns, root, count)
    for last in range(count - 1, 0, -1):
        values[0], values[last] = values[last], values[0]
        columns[0], columns[last] = columns[last], columns[0]
        _sink(values, columns, 0, last)


@jit
def _select(values, columns, count, k):
    """Bring the k greatest values to the front, in any order (Hoare's selection)."""
    low, high = 0, count - 1
    while low < high:
        pivot = values[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while values[i] > pivot:
                i += 1
            while values[j] < pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                columns[i], columns[j] = columns[j], columns[i]
                i, j = i + 1, j - 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            return


@jit
def _drop_hopeless(table, values, columns, count, k, slack):
    """Drop candidates that cannot be among the best k; return how many stay and the new floor.

    Each value is within `slack` of the pair kernel's. The k best values therefore prove that a
    candidate more than twice the slack below the k-th is not among the k best pairs, unless its
    score is the same and its column lower: that does not happen to candidates that are still to
    come, whose columns are higher.
    """
    if count <= k:
        return count, LOWEST
    _select(values, columns, count, k)
    floor = values[0]
    for n in range(1, k):
        floor = min(floor, values[n])
    floor -= 2 * slack
    level = _level(floor, table)
    kept = k
    for n in range(k, count):
        if values[n] >= level:
            values[kept], columns[kept] = values[n], columns[n]
            kept += 1
    return kept, floor


@jit
def _shrink(table, row, k, slack, values, columns):
    """Make room among a row's candidates; return how many stay and the new floor.

    Where ties keep too many, the pair kernel decides and exactly k stay: the best by score, which
    rounding or a link's end may make equal where raw scores are not.
    """
    count = len(values)
    kept, floor = _drop_hopeless(table, values, columns, count, k, slack)
    if kept <= count - (count - k) // 4:
        return kept, floor
    for n in range(kept):
        values[n] = _link(_exact(table, row, columns[n]), table)
    _rank(values, columns, kept)
    for n in range(k):
        values[n] = min(_exact(table, row, columns[n]), _ceiling(table))
    return k, values[:k].min() - 2 * slack


@jit
def scan_top_k(table, panels, first, last, k, slack, floor, filled, values, columns):
    """Add to each row's candidates every column that may be among its k best.

    Left panels `first` to `last` are walked over all right panels. Candidates live in `values`
    float32 and `columns` int64, both (rows, capacity) with capacity > k, `filled` (rows,) int64 of
    them in use; `floor` (rows,) float32 is what a tile must reach to matter, `slack` (rows,) its
    bound. All count rows from the first left panel and go on from call to call.
    """
    memory = np.empty((TILE_ROWS, TILE_COLUMNS), np.float32)
    tile = address(memory)
    capacity, ceiling = values.shape[1], _ceiling(table)
    for i, j in _walk(panels, first, last):
        low, high = i * TILE_ROWS, min((i + 1) * TILE_ROWS, panels.left_count)
        if not _tile(panels, i, j, _lowest_floor(floor, low, high), tile):
            continue
        for row in range(low, high):
            mask = _row_hits(panels, row, j, tile, floor[row])
            while mask:
                n = lowest_bit(mask)
                mask &= mask - 1
                value = min(memory[row - low, n], ceiling)
                if value < floor[row]:  # it rose meanwhile
                    continue
                values[row, filled[row]] = value
                columns[row, filled[row]] = panels.first_right + j * TILE_COLUMNS + n
                filled[row] += 1
                if filled[row] == capacity:
                    filled[row], floor[row] = _shrink(
                        table, panels.first_left + row, k, slack[row], values[row], columns[row]
                    )


@jit
def finish_top_k(table, first_row, low, high, k, slack, filled, values, columns, scores, indices):
    """Score the candidates of rows `low` to `high` by the pair kernel and write the best k.

    Rows count from the table's row `first_row`.

    `scores` (rows, k) float32 and `indices` (rows, k) int64 are filled: by score, then by lower
    index; rows with fewer columns than k end with NaN and -1.
    """
    for row in range(low, high):
        value, column = values[row], columns[row]
        count, _ = _drop_hopeless(table, value, column, filled[row], k, slack[row])
        for n in range(count):
            value[n] = _link(_exact(table, first_row + row, column[n]), table)
        _rank(value, column, count)
        count = min(count, k)
        scores[row, :count], indices[row, :count] = value[:count], column[:count]
        scores[row, count:], indices[row, count:] = np.nan, -1


# --- all pairs: threshold, dense, histogram ------------------------------------------------------


@jit
def scan_threshold(table, panels, first, last, minimum, floor, rows, columns, scores):
    """Collect every pair whose score by the pair kernel is at least `minimum`.

    `floor` (rows,) float32 is what a tile must reach to matter. Hits go to `rows` int64 (counted
    from the first left panel), `columns` int64 and `scores` float32; of one row in increasing
    column. Return the number of hits, which may exceed the room: then nothing more was written.
    """
    memory = np.empty((TILE_ROWS, TILE_COLUMNS), np.float32)
    tile = address(memory)
    found = 0
    for i, j in _walk(panels, first, last):
        low, high = i * TILE_ROWS, min((i + 1) * TILE_ROWS, panels.left_count)
        if not _tile(panels, i, j, _lowest_floor(floor, low, high), tile):
            continue
        for row in range(low, high):
            mask = _row_hits(panels, row, j, tile, floor[row])
            while mask:
                column = panels.first_right + j * TILE_COLUMNS + lowest_bit(mask)
                mask &= mask - 1
                score = _link(_exact(table, panels.first_left + row, column), table)
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
def scan_dense(table, panels, first, last, slack, scores):
    """Fill `scores` (rows, columns) float32 with the tiles' scores, both from the first panels.

    Where a root would make much of a tile's error, the pair kernel decides: raw scores within 64
    times the row's `slack` (rows,) float32 of 0.
    """
    tile = np.empty((TILE_ROWS, TILE_COLUMNS), np.float32)
    for i, j in _walk(panels, first, last):
        _tile(panels, i, j, -np.float32(np.inf), address(tile))
        low, high = i * TILE_ROWS, min((i + 1) * TILE_ROWS, panels.left_count)
        start = j * TILE_COLUMNS
        width = min(TILE_COLUMNS, panels.right_count - start)
        for row in range(low, high):
            near = -64 * slack[row] if table.link == 1 else np.float32(np.inf)
            for n in range(width):
                raw = tile[row - low, n]
                if raw > near:
                    raw = _exact(table, panels.first_left + row, panels.first_right + start + n)
                scores[row, start + n] = _link(raw, table)


@jit
def scan_range(panels, first, last):
    """Return the least and the greatest raw score of the tiles, the diagonal left out."""
    tile = np.empty((TILE_ROWS, TILE_COLUMNS), np.float32)
    least, greatest = np.float32(np.inf), -np.float32(np.inf)
    for i, j in _walk(panels, first, last):
        _tile(panels, i, j, -np.float32(np.inf), address(tile))
        low, high = i * TILE_ROWS, min((i + 1) * TILE_ROWS, panels.left_count)
        start = j * TILE_COLUMNS
        width = min(TILE_COLUMNS, panels.right_count - start)
        for row in range(low, high):
            itself = -1 if panels.distinct else panels.first_left + row
            for n in range(width):
                if panels.first_right + start + n != itself:
                    least = min(least, tile[row - low, n])
                    greatest = max(greatest, tile[row - low, n])
    return least, greatest


@jit
def scan_histogram(table, panels, first, last, edges, slack, counts):
    """Count scores into bins [edges[b], edges[b + 1]), the last one closed, exactly.

    `edges` (bins + 1,) float32 are equally spaced scores; `counts` (bins,) int64 grows. A tile's
    score that lies within the row's `slack`, in units of the score, of an edge is decided by the
    pair kernel. Scores outside the edges go to the first and the last bin.
    """
    tile = np.empty((TILE_ROWS, TILE_COLUMNS), np.float32)
    bins = len(counts)
    for i, j in _walk(panels, first, last):
        _tile(panels, i, j, -np.float32(np.inf), address(tile))
        low, high = i * TILE_ROWS, min((i + 1) * TILE_ROWS, panels.left_count)
        start = j * TILE_COLUMNS
        width = min(TILE_COLUMNS, panels.right_count - start)
        for row in range(low, high):
            itself = -1 if panels.distinct else panels.first_left + row
            for n in range(width):
                column = panels.first_right + start + n
                if column == itself:
                    continue
                value = _link(tile[row - low, n], table)
                least = _link(tile[row - low, n] - slack[row], table)
                most = _link(tile[row - low, n] + slack[row], table)
                place = _bin_of(value, edges, bins)
                if place != _bin_of(least, edges, bins) or place != _bin_of(most, edges, bins):
                    exact = _link(_exact(table, panels.first_left + row, column), table)
                    place = _bin_of(exact, edges, bins)
                counts[place] += 1


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
        scores[n] = _link(raw[n], table)


def link_scores(raw: np.ndarray, table: Table) -> np.ndarray:
    """Return the scores (m,) float32 of raw scores (m,) float32."""
    scores = np.empty_like(raw)
    _link_all(raw, table, scores)
    return scores
