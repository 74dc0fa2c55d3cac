"""The pair kernel on a CPU: two rows are gathered, their terms added, the link taken.

It fills given arrays serially and may run side by side in threads. Tables come as `Table`, whose
numbers and addresses are plain scalars: reading an array out of a tuple costs two atomic reference
counts, as much as a short pair. Whoever makes one keeps the arrays alive.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba.core import types
from numba.extending import overload

from fastpair.kernels import Plan, aligned_empty, raw_floor
from fastpair.kernels.simd import (
    add,
    add_products,
    fma,
    integer_zeros,
    jit,
    jit_inline,
    load,
    load_bytes,
    load_float32,
    load_integer,
    load_last_bytes,
    maximum,
    ones,
    prefetch_far,
    store_float32,
    subtract,
    total,
    zeros,
)

_AHEAD_BYTES = 6144
"""Bytes of rows that are asked for ahead of use, a side.

Measured for rows of 128 to 512 bytes: half of it is slower, twice as much makes no difference.
"""

_LIST_AHEAD_BYTES = 1024
"""Bytes of the list of pairs that are asked for ahead of the rows, a side.

No processor foresees the list among so many random rows, and whoever waits for a row number asks
for no rows meanwhile.
"""

_FIELD_BYTES = 16 << 20
"""Largest copy of the biases and scales of a table: more would not stay in a cache."""

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
    """What kernels need to score a pair exactly: addresses of both tables, layout, constants.

    Bias and scale of row n are found at ``fields + n * field_step + bias_at`` (or ``scale_at``).
    An offset of -1 stands for a field that rows do not have.
    """

    left: int
    right: int
    left_count: int
    right_count: int
    row_bytes: int
    asked_bytes: int  # of a row, asked for ahead
    ahead: int  # pairs
    left_fields: int
    right_fields: int
    field_step: int
    bias_at: int
    scale_at: int
    element: Any
    layout: tuple[int, ...]
    constants: tuple[np.float32, ...]
    link: int


def table_arguments(
    left_rows: np.ndarray,
    right_rows: np.ndarray,
    plan: Plan,
    fields: tuple[np.ndarray, np.ndarray] | None = None,
) -> Table:
    """Return the pair kernel's arguments for two tables (rows, row_bytes) uint8 of one plan.

    They hold addresses: the tables, and `fields` of both as `separate_fields` gives them, must
    live as long as they are used.
    """
    layout = plan.layout
    for rows in (left_rows, right_rows):
        if not rows.flags.c_contiguous or rows.shape[1] != layout.row_bytes:
            raise ValueError(f"rows {rows.shape} are not contiguous or not of {layout}")
    *runs, bias_at, scale_at = layout.kernel_arguments()
    held, step, asked = (left_rows, right_rows), layout.row_bytes, layout.row_bytes
    if fields is not None:
        asked = _field_offsets(plan)[0]
        held, step = fields, fields[0].strides[0]
        bias_at, scale_at = (at - asked if at >= 0 else at for at in (bias_at, scale_at))
    return Table(
        left_rows.ctypes.data,
        right_rows.ctypes.data,
        len(left_rows),
        len(right_rows),
        layout.row_bytes,
        asked,
        max(2, _AHEAD_BYTES // max(1, asked)),
        held[0].ctypes.data,
        held[1].ctypes.data,
        step,
        bias_at,
        scale_at,
        _ELEMENTS[plan.precision],
        tuple(runs),
        plan.kernel_constants(),
        plan.link_code,
    )


def _field_offsets(plan: Plan) -> list[int]:
    return [at for at in plan.layout.kernel_arguments()[-2:] if at >= 0]


def separate_fields(rows: np.ndarray, plan: Plan) -> np.ndarray | None:
    """Return a copy (n, bias and scale) of what follows the columns, where that saves a cache line.

    It does if columns end with a line, and if the copy is small enough to stay in a cache. None:
    the fields are best read from the rows.
    """
    offsets = _field_offsets(plan)
    if not offsets or offsets[0] % 64 or 4 * len(offsets) * len(rows) > _FIELD_BYTES:
        return None
    fields = aligned_empty((len(rows), len(offsets)), np.float32)
    fields[:] = rows.view(np.float32)[:, [at // 4 for at in offsets]]
    return fields


# --- one pair ------------------------------------------------------------------------------------


def _itemsize(element):
    """Bytes of a stored column."""


@overload(_itemsize, inline="always")
def _pick_itemsize(element):
    size = element.bitwidth // 8
    return lambda element: size


@jit_inline
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


@jit_inline
def _product_run(lanes, left, right, element, vectors, plus):
    """Lanes plus (or minus) the products of one run; eight or four vectors without a branch."""
    step = 16 * _itemsize(element)
    for _ in range(vectors // 8):
        lanes = _products(lanes, left, right, element, 8, plus)
        left, right = left + 8 * step, right + 8 * step
    if vectors & 4:
        lanes = _products(lanes, left, right, element, 4, plus)
        left, right = left + 4 * step, right + 4 * step
    for _ in range(vectors & 3):
        lanes = _products(lanes, left, right, element, 1, plus)
        left, right = left + step, right + step
    return lanes


@jit_inline
def _products(lanes, left, right, element, vectors, plus):
    step = 16 * _itemsize(element)
    for v in range(vectors):
        x = load(left + step * v, element)
        x = x if plus else subtract(zeros(), x)
        lanes = fma(x, load(right + step * v, element), lanes)
    return lanes


@jit_inline
def _float_products(left, right, element, layout):
    """`_float_sum` of rows that hold nothing but products."""
    lanes = _product_run(zeros(), left, right, element, layout[0], True)
    shift = 16 * _itemsize(element) * layout[0]
    return total(_product_run(lanes, left + shift, right + shift, element, layout[1], False))


@jit_inline
def _byte_columns(where, whole):
    return load_bytes(where) if whole else load_last_bytes(where)


@jit_inline
def _integer_terms(lanes, left, right, half, segment, whole):
    """Lanes plus the terms of 32 int8 columns, or of 16; exact: int16, their products int32."""
    x, y = _byte_columns(left, whole), _byte_columns(right, whole)
    if segment == 0:
        return add_products(x, y, lanes)
    if segment == 4:
        return add_products(subtract(x, y), subtract(x, y), lanes)
    if segment == 1:
        term = maximum(x, y)
    elif segment == 2:
        term = add(
            maximum(x, _byte_columns(right + half, whole)),
            maximum(_byte_columns(left + half, whole), y),
        )
    else:
        term = maximum(subtract(x, y), subtract(y, x))
    return add_products(term, ones(), lanes)


@jit_inline
def _integer_run(left, right, vectors, segment):
    """Exact integer sum of the terms of one run of an int8 row; mirrored takes both halves."""
    lanes = integer_zeros()
    half = 16 * vectors
    for _ in range(vectors // 8):
        for n in range(4):
            at = 32 * n
            lanes = _integer_terms(lanes, left + at, right + at, half, segment, True)
        left, right = left + 128, right + 128
    for _ in range(vectors % 8 // 2):
        lanes = _integer_terms(lanes, left, right, half, segment, True)
        left, right = left + 32, right + 32
    if vectors % 2:
        lanes = _integer_terms(lanes, left, right, half, segment, False)
    return total(lanes)


@jit_inline
def _integer_sum(left, right, layout, scales, constants):
    """Sum of all terms of two int8 rows: exact integers, scaled once a segment."""
    result = np.float32(0.0)
    for segment in range(5):
        width = 32 if segment == 2 else 16
        plus, minus = layout[2 * segment], layout[2 * segment + 1]
        value = _integer_run(left, right, plus, segment)
        left, right = left + width * plus, right + width * plus
        value -= _integer_run(left, right, minus, segment)
        left, right = left + width * minus, right + width * minus
        scale = constants[3 + segment]
        if segment == 0:
            scale = scales
        elif segment == 4:
            scale = scale * scale
        result = result + np.float32(value) * scale
    return result


@jit_inline
def _integer_products(left, right, layout, scales):
    """`_integer_sum` of rows that hold nothing but products."""
    value = _integer_run(left, right, layout[0], 0)
    shift = 16 * layout[0]
    value -= _integer_run(left + shift, right + shift, layout[1], 0)
    return np.float32(0.0) + np.float32(value) * scales


def _terms(left, right, scales, element, table, straight):
    """Sum of all terms of two rows at addresses; the stored type picks the loops.

    `straight` says that the rows hold products only: one loop instead of ten.
    """


@overload(_terms, inline="always")
def _pick_terms(left, right, scales, element, table, straight):
    if element == types.int8:

        def terms(left, right, scales, element, table, straight):
            if straight:
                return _integer_products(left, right, table.layout, scales)
            return _integer_sum(left, right, table.layout, scales, table.constants)

    else:

        def terms(left, right, scales, element, table, straight):
            if straight:
                return _float_products(left, right, element, table.layout)
            return _float_sum(left, right, element, table.layout)

    return terms


@jit_inline
def _raw(table, row, column, straight):
    """Raw score of two row numbers."""
    left_fields = table.left_fields + row * table.field_step
    right_fields = table.right_fields + column * table.field_step
    bias, scales = np.float32(0.0), np.float32(0.0)
    if table.bias_at >= 0:
        at = table.bias_at
        bias = load_float32(left_fields + at) + load_float32(right_fields + at)
    if table.scale_at >= 0:
        at = table.scale_at
        scales = load_float32(left_fields + at) * load_float32(right_fields + at)
    left, right = table.left + row * table.row_bytes, table.right + column * table.row_bytes
    start = table.constants[0] + bias
    return start + _terms(left, right, scales, table.element, table, straight)


@jit
def exact_raw(table, row, column):
    """Raw score by the pair kernel of two row numbers."""
    return _raw(table, row, column, False)


@jit_inline
def apply_link(raw, table):
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
def link_ceiling(table):
    """Raw score from which on the link rises no more."""
    return np.float32(0.0) if table.link > 0 else np.float32(np.inf)


raw_floor_of = jit(raw_floor)


@jit
def tie_level(raw, table):
    """A raw score that is not above any whose score may equal that of `raw`.

    Links and the rounding of slope and offset make many raw scores one score.
    """
    slope, offset = np.float64(table.constants[1]), np.float64(table.constants[2])
    floor = raw_floor_of(np.float64(apply_link(raw, table)), table.link, slope, offset)
    return min(raw, np.float32(max(floor, np.float64(LOWEST))))


# --- pairs of random rows ------------------------------------------------------------------------


@jit_inline
def _ask(table, row, column):
    """Ask for the cache lines of a pair; False if one of its row numbers is out of range."""
    if np.uint64(row) >= np.uint64(table.left_count):
        return False
    if np.uint64(column) >= np.uint64(table.right_count):
        return False
    left, right = table.left + row * table.row_bytes, table.right + column * table.row_bytes
    lines = table.asked_bytes // 64
    for _ in range(lines // 4):
        for n in range(4):
            prefetch_far(left + 64 * n)
            prefetch_far(right + 64 * n)
        left, right = left + 256, right + 256
    for n in range(lines % 4):
        prefetch_far(left + 64 * n)
        prefetch_far(right + 64 * n)
    if table.asked_bytes < table.row_bytes:
        prefetch_far(table.left_fields + row * table.field_step)
        prefetch_far(table.right_fields + column * table.field_step)
    return True


@jit_inline
def _score_list(table, left, right, kind, scores, count, straight):
    """Score `count` pairs; row numbers and scores are given by their addresses.

    Every row number is checked when its row is asked for, so nothing else reads the list before.
    Returns the first pair with a number out of range, at which it stops, or -1.
    """
    size = _itemsize(kind)
    ahead = table.ahead
    for pair in range(min(ahead, count)):
        row, column = (
            load_integer(left + size * pair, kind),
            load_integer(right + size * pair, kind),
        )
        if not _ask(table, row, column):
            return pair
    for pair in range(count):
        prefetch_far(left + size * (pair + ahead) + _LIST_AHEAD_BYTES)
        prefetch_far(right + size * (pair + ahead) + _LIST_AHEAD_BYTES)
        at = size * min(pair + ahead, count - 1)
        row, column = load_integer(left + at, kind), load_integer(right + at, kind)
        if not _ask(table, row, column):
            return pair + ahead
        at = size * pair
        row, column = load_integer(left + at, kind), load_integer(right + at, kind)
        score = apply_link(_raw(table, row, column, straight), table)
        store_float32(scores + 4 * pair, score)
    return -1


@jit
def _score_products(table, left, right, kind, scores, count):
    return _score_list(table, left, right, kind, scores, count, True)


@jit
def _score_any(table, left, right, kind, scores, count):
    return _score_list(table, left, right, kind, scores, count, False)


def score_pairs(table: Table, left: np.ndarray, right: np.ndarray, scores: np.ndarray) -> int:
    """Fill `scores` (m,) float32 for pairs of row numbers, `left` and `right` (m,) integers.

    Contiguous int32 and int64 are read as they are. Returns -1, or the number of the first pair
    of which a row number is out of range; no row out of range is ever read.
    """
    kind = np.result_type(left, right, np.int32)
    if kind != np.int32:
        kind = np.dtype(np.int64)
    left, right = (_as_stored(rows, kind) for rows in (left, right))
    if not (len(left) == len(right) == len(scores) and scores.dtype == np.float32):
        raise ValueError(f"{len(left)} and {len(right)} row numbers for {len(scores)} scores")
    if not (scores.flags.c_contiguous and scores.flags.writeable):
        raise ValueError("scores are not contiguous or cannot be written")
    arrays = (rows.ctypes.data for rows in (left, right))
    score = _score_any if any(table.layout[2:]) else _score_products
    return int(score(table, *arrays, kind.type(0), scores.ctypes.data, len(scores)))


def _as_stored(rows: np.ndarray, kind: np.dtype) -> np.ndarray:
    """Row numbers as contiguous int32 or int64; what int64 cannot hold becomes negative."""
    if rows.dtype == np.uint64:
        rows = rows.astype(np.int64)
    return np.ascontiguousarray(rows, dtype=kind)
