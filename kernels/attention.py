"""Soft lookup on a CPU: scores of a block of keys, their softmax and its product with values.

Both products are those of the register tile. Keys take its left side and queries its right one, so
that the scores of a block come to lie, key by key, as the right panel that the second product
reads, and a softmax goes along columns, in whole vectors, without any exchange between lanes. A
query's weights are kept as powers of two of the distance to its greatest score so far; where a
block brings a greater one, what was summed before is scaled down (Milakov and Gimelshein, Online
normalizer calculation for softmax, 2018; Dao et al., FlashAttention, 2022).

Blocks have `KEYS` keys on every CPU and begin at multiples of that, and keys are summed in order
within a block, then block by block: a query's result depends on itself, keys and values alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from fastpair.kernels.cpu import LOWEST, _no_floors
from fastpair.kernels.pairs import exact_raw
from fastpair.kernels.simd import _fma, _greater, address, jit, power_of_two
from fastpair.kernels.tile import (
    _FLOATS,
    _LANES,
    _VECTORS,
    HEADER,
    TILE_COLUMNS,
    TILE_ROWS,
    _number,
    _repeat,
    register_tile,
)

KEYS = 240
"""Keys of a block, whole panels of every CPU: their weights for a panel of queries fit into L1."""

_LOG2_E = math.log2(math.e)

# --- columns of scores ---------------------------------------------------------------------------


def _pointer(builder: ir.IRBuilder, where: ir.Value) -> ir.Value:
    return builder.inttoptr(where, ir.FloatType().as_pointer())


def _vectors(builder: ir.IRBuilder, pointer: ir.Value) -> list[ir.Value]:
    """Where the vectors of a row of TILE_COLUMNS are."""
    places = [builder.gep(pointer, [_number(v * _LANES)]) for v in range(_VECTORS)]
    return [builder.bitcast(place, _FLOATS.as_pointer()) for place in places]


def _load(builder: ir.IRBuilder, pointer: ir.Value) -> list[ir.Value]:
    return [builder.load(place, align=4) for place in _vectors(builder, pointer)]


def _store(builder: ir.IRBuilder, pointer: ir.Value, values: list[ir.Value]) -> None:
    for place, value in zip(_vectors(builder, pointer), values, strict=True):
        builder.store(value, place, align=4)


def _each(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [value] * _LANES)


def _spread(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    order = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES)
    return builder.shuffle_vector(first, undefined, order)


def _rows(
    builder: ir.IRBuilder,
    where: ir.Value,
    count: ir.Value,
    starts: list[ir.Value],
    step: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
) -> list[ir.Value]:
    """Emit a loop over rows of TILE_COLUMNS: ``step(pointer, values)`` turns a vector each."""

    def body(pointer: ir.Value, *values: ir.Value) -> list[ir.Value]:
        return [builder.gep(pointer, [_number(TILE_COLUMNS)]), *step(pointer, list(values))]

    return _repeat(builder, count, [_pointer(builder, where), *starts], body)[1:]


@intrinsic
def raise_greatest(typingctx, rows, count, greatest):
    """Raise TILE_COLUMNS float32 at an address to the greatest of each column of `count` rows."""

    def codegen(context, builder, signature, args):
        kept = _pointer(builder, args[2])

        def step(pointer, values):
            own = _load(builder, pointer)
            return [_greater(builder, x, most) for x, most in zip(own, values, strict=True)]

        _store(builder, kept, _rows(builder, args[0], args[1], _load(builder, kept), step))
        return context.get_dummy_value()

    return types.none(rows, count, greatest), codegen


@intrinsic
def soften(typingctx, rows, count, greatest, factor, sums):
    """Turn `count` rows at an address into 2^((row - greatest) factor), and store their sums."""

    def codegen(context, builder, signature, args):
        most = _load(builder, _pointer(builder, args[2]))
        scale = _spread(builder, args[3])

        def step(pointer, values):
            weights = [
                power_of_two(builder, builder.fmul(builder.fsub(x, top), scale))
                for x, top in zip(_load(builder, pointer), most, strict=True)
            ]
            _store(builder, pointer, weights)
            return [builder.fadd(a, b) for a, b in zip(values, weights, strict=True)]

        found = _rows(builder, args[0], args[1], [_each(0.0)] * _VECTORS, step)
        _store(builder, _pointer(builder, args[4]), found)
        return context.get_dummy_value()

    return types.none(rows, count, greatest, types.float32, sums), codegen


@intrinsic
def add_scaled(typingctx, sums, count, scales, more):
    """Turn `count` rows of sums into ``sums scales + more``, each rounded once; by addresses."""

    def codegen(context, builder, signature, args):
        scale = _load(builder, _pointer(builder, args[2]))

        def body(one, other):
            grown = [
                builder.call(_fma(builder, _FLOATS), [x, s, y])
                for x, s, y in zip(_load(builder, one), scale, _load(builder, other), strict=True)
            ]
            _store(builder, one, grown)
            return [builder.gep(place, [_number(TILE_COLUMNS)]) for place in (one, other)]

        _repeat(builder, args[1], [_pointer(builder, args[0]), _pointer(builder, args[3])], body)
        return context.get_dummy_value()

    return types.none(sums, count, scales, more), codegen


def _linked(name: str, link: Callable[[ir.IRBuilder, ir.Value], ir.Value], meaning: str):
    def operation(typingctx, rows, count):
        def codegen(context, builder, signature, args):
            def step(pointer, values):
                found = [link(builder, x) for x in _load(builder, pointer)]
                _store(builder, pointer, found)
                return values

            _rows(builder, args[0], args[1], [], step)
            return context.get_dummy_value()

        return types.none(rows, count), codegen

    operation.__name__, operation.__doc__ = name, meaning
    return intrinsic(operation)


def _below(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """-min(x, 0)."""
    return _greater(builder, builder.fsub(_each(0.0), x), _each(0.0))


def _negative_root(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    kind = ir.FunctionType(_FLOATS, [_FLOATS])
    name = f"llvm.sqrt.v{_LANES}f32"
    root = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.fsub(_each(0.0), builder.call(root, [_below(builder, x)]))


def _exponential(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return power_of_two(builder, builder.fmul(_below(builder, x), _each(-_LOG2_E)))


negative_roots = _linked(
    "negative_roots", _negative_root, "Turn `count` rows at an address into -sqrt(-min(row, 0))."
)
exponentials = _linked(
    "exponentials", _exponential, "Turn `count` rows at an address into exp(min(row, 0))."
)


# --- a block of keys -----------------------------------------------------------------------------


@jit
def _block_scores(table, walk, panel, first, keys, limits, near, floors, nothing, masks, weights):
    """Fill rows HEADER on of `weights` with a panel of queries' linked scores of `keys` keys."""
    for n in range((keys + TILE_ROWS - 1) // TILE_ROWS):
        register_tile(
            walk.form,
            walk.left + (first // TILE_ROWS + n) * walk.left_bytes,
            walk.right + panel * walk.right_bytes,
            walk.products,
            walk.plus,
            walk.minus,
            walk.constant,
            walk.step,
            address(floors),
            address(nothing),
            address(weights) + (HEADER + n * TILE_ROWS) * TILE_COLUMNS * 4,
            address(masks),
        )
    if near:
        _decide_exactly(table, walk, panel, first, keys, limits[panel], weights)
    if table.link == 1:
        negative_roots(address(weights) + HEADER * TILE_COLUMNS * 4, keys)
    elif table.link == 2:
        exponentials(address(weights) + HEADER * TILE_COLUMNS * 4, keys)
    elif table.link == 3:
        for n in range(HEADER, HEADER + keys):
            for column in range(TILE_COLUMNS):
                t = min(np.float64(weights[n, column]), 0.0)
                weights[n, column] = -math.log1p(-t + math.sqrt(t * (t - 2.0)))


@jit
def _decide_exactly(table, walk, panel, first, keys, limits, weights):
    """Put the pair kernel's raw scores where a tile's is above its query's limit, or is NaN."""
    start = panel * TILE_COLUMNS
    queries = min(TILE_COLUMNS, walk.right_count - start)
    for n in range(keys):
        own, some = weights[HEADER + n], False
        for column in range(queries):
            some |= not own[column] <= limits[column]
            some |= limits[column] == -np.inf
        if not some:
            continue
        for column in range(queries):
            if limits[column] == -np.inf or not own[column] <= limits[column]:
                row = walk.first_right + start + column
                own[column] = exact_raw(table, row, walk.first_left + first + n)


@jit
def attend(table, walk, task, values, factor, limits, near, greatest, sums, outputs):
    """Fill one task's greatest scores, sums of weights and sums of weighted values.

    `walk` has keys on its left and queries on its right side; `table` knows queries as left and
    keys as right rows. `task` is the first and last panel of queries, then the first and last
    block of keys. `values` (blocks, panels, HEADER + KEYS, TILE_ROWS) float32 are the blocks'
    values, headers zero. A weight is 2^(factor (score - greatest)), score without offset and slope.
    Raw scores above `limits` (panels, TILE_COLUMNS) are the pair kernel's if `near`. Where
    queries and keys are one table and `walk.distinct` is False, a query is not its own key.

    `greatest` and `sums` (panels of the task, TILE_COLUMNS) and `outputs` (panels of the task,
    values, TILE_COLUMNS) float32 are filled; without a key they are LOWEST and zeros.
    """
    first, last, start, stop = task
    greatest[:], sums[:], outputs[:] = LOWEST, 0, 0
    weights = np.zeros((HEADER + KEYS, TILE_COLUMNS), np.float32)
    before, own = np.empty((1, TILE_COLUMNS), np.float32), np.empty((1, TILE_COLUMNS), np.float32)
    rest = np.empty(TILE_COLUMNS, np.float32)
    tile, masks = np.empty((TILE_ROWS, TILE_COLUMNS), np.float32), np.empty(TILE_ROWS, np.int64)
    floors, nothing = _no_floors()
    for block in range(start, stop):
        low = block * KEYS
        keys = min(KEYS, walk.left_count - low)
        for panel in range(first, last):
            n = panel - first
            _block_scores(
                table, walk, panel, low, keys, limits, near, floors, nothing, masks, weights
            )
            if not walk.distinct:
                _leave_out_itself(walk, panel, low, keys, weights)
            before[0] = greatest[n]
            most = address(greatest) + n * TILE_COLUMNS * 4
            raise_greatest(address(weights) + HEADER * TILE_COLUMNS * 4, keys, most)
            soften(address(before), 1, most, factor, address(rest))  # how much what was counts now
            body = address(weights) + HEADER * TILE_COLUMNS * 4
            soften(body, keys, most, factor, address(own))
            add_scaled(address(sums) + n * TILE_COLUMNS * 4, 1, address(before), address(own))
            for part in range(values.shape[1]):
                place = (block * values.shape[1] + part) * (HEADER + KEYS) * TILE_ROWS
                register_tile(
                    walk.form,
                    address(values) + place * 4,
                    address(weights),
                    keys,
                    0,
                    0,
                    np.float32(0.0),
                    np.float32(0.0),
                    address(floors),
                    address(nothing),
                    address(tile),
                    address(masks),
                )
                row = n * outputs.shape[1] + part * TILE_ROWS
                there = address(outputs) + row * TILE_COLUMNS * 4
                add_scaled(there, TILE_ROWS, address(before), address(tile))


@jit
def _leave_out_itself(walk, panel, first, keys, weights):
    """Let no query of a panel have itself among the keys of a block."""
    start = walk.first_right + panel * TILE_COLUMNS
    for column in range(TILE_COLUMNS):
        n = start + column - walk.first_left - first
        if 0 <= n < keys:
            weights[HEADER + n, column] = -np.inf


@jit
def merge(greatest, sums, outputs, more_greatest, more_sums, more_outputs, factor):
    """Add what `attend` found among later keys to what it found before; all as it fills them."""
    scale = np.empty((2, TILE_COLUMNS), np.float32)
    rest = np.empty(TILE_COLUMNS, np.float32)
    count = outputs.shape[1]
    for n in range(len(sums)):
        scale[0], scale[1] = greatest[n], more_greatest[n]
        most = address(greatest) + n * TILE_COLUMNS * 4
        raise_greatest(address(more_greatest) + n * TILE_COLUMNS * 4, 1, most)
        soften(address(scale), 2, most, factor, address(rest))
        for column in range(TILE_COLUMNS):
            own = more_sums[n, column] * scale[1, column]
            sums[n, column] = sums[n, column] * scale[0, column] + own
        for row in range(count):
            for column in range(TILE_COLUMNS):
                own = more_outputs[n, row, column] * scale[1, column]
                outputs[n, row, column] = outputs[n, row, column] * scale[0, column] + own


@jit
def finish(sums, outputs, scale, found):
    """Fill `found` (queries, columns) float32 with the means; NaN where a query has no key."""
    for query in range(len(found)):
        panel, lane = query // TILE_COLUMNS, query % TILE_COLUMNS
        total = sums[panel, lane]
        for column in range(found.shape[1]):
            mean = outputs[panel, column, lane] / total if total > 0 else np.float32(np.nan)
            found[query, column] = mean * scale


# --- lists of keys -------------------------------------------------------------------------------


@jit
def attend_listed(ends, indices, scores, temperature, values, first, found):
    """Fill `found` (queries, columns) float32 with softmax means over lists of keys, in float64.

    Keys of query q are `indices` and `scores` from ``ends[first + q]`` to ``ends[first + q + 1]``.
    A query without any becomes NaN.
    """
    sums = np.empty(found.shape[1], np.float64)
    for query in range(len(found)):
        start, stop = ends[first + query], ends[first + query + 1]
        if start == stop:
            found[query] = np.nan
            continue
        most = np.float64(scores[start:stop].max())
        total = 0.0
        sums[:] = 0
        for n in range(start, stop):
            weight = math.exp((np.float64(scores[n]) - most) / temperature)
            total += weight
            own = values[indices[n]]
            for column in range(len(sums)):
                sums[column] += weight * np.float64(own[column])
        for column in range(len(sums)):
            found[query, column] = np.float32(sums[column] / total)
