"""Learning tables from pairs of row numbers: each step touches the rows of one pair.

Tables are float32 arrays (rows, width), width a multiple of 16. A row is a header of 16 numbers,
then segments of `padded` columns, the true ones first, the rest zeros::

    header    BIAS, SQUARES (of the vector's gradients), BIAS_SQUARES, SHARE (see below)
    vector    p
    implied   x, in left tables with implied vectors: SHARE times the sum of the implied vectors y
              of all right rows that the left row is paired with (Koren 2008, SVD++)
    slope     in the same tables: what moved x would be moved by, summed since it was last used

The raw score of a pair is ``mean + BIAS_l + BIAS_r + <p_l + x_l, p_r>``. A step has the size
``rate / sqrt(SQUARES)``: the squares of a row's gradients so far, each the mean over its columns
(row-wise Adagrad). Pairs of a block are taken one after the other; blocks that share no row may
run at once.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from fastpair.kernels import LANES
from fastpair.kernels.simd import (
    add,
    address,
    float32x16,
    fma,
    get,
    jit,
    jit_inline,
    load_float32,
    prefetch,
    put,
    store_float32,
    total,
    zeros,
)

HEADER = LANES
"""Numbers of a row before its vector."""

BIAS, SQUARES, BIAS_SQUARES, SHARE = range(4)
"""Places in the header."""

SQUARED, CROSS_ENTROPY = 0, 1
"""Losses of one pair."""

BPR, SOFTMAX = 0, 1
"""Losses of a good pair beside pairs of the same left row with drawn right rows."""

_AHEAD = 8
"""Pairs whose rows are asked for ahead: they lie anywhere in memory."""

_STEP, _FIRST, _SECOND = (
    np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
"""Constants of splitmix64 (Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators,
2014)."""


@intrinsic
def _spread(typingctx, value):
    """Sixteen times one float32."""

    def codegen(context, builder, signature, args):
        undefined = ir.Constant(float32x16.llvm, ir.Undefined)
        first = builder.insert_element(undefined, args[0], ir.Constant(ir.IntType(32), 0))
        order = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        return builder.shuffle_vector(first, undefined, order)

    return float32x16(types.float32), codegen


@jit_inline
def _dot(x, y, padded):
    """Sum of products of two runs of columns, by address."""
    lanes = zeros()
    for column in range(0, padded, 16):
        lanes = fma(get(x + 4 * column, zeros()), get(y + 4 * column, zeros()), lanes)
    return total(lanes)


@jit_inline
def _blend(out, x, factor, padded):
    """Add `factor` times one run of columns to another."""
    wide = _spread(np.float32(factor))
    for column in range(0, padded, 16):
        at = out + 4 * column
        put(at, fma(wide, get(x + 4 * column, zeros()), get(at, zeros())))


@jit_inline
def _scale(out, factor, padded):
    """Multiply a run of columns."""
    wide = _spread(np.float32(factor))
    for column in range(0, padded, 16):
        at = out + 4 * column
        put(at, fma(wide, get(at, zeros()), zeros()))


@jit_inline
def _paced(row, place, rate, square):
    """Add a squared gradient to its sum in the header; return the rate of this step."""
    summed = load_float32(row + 4 * place) + np.float32(square)
    store_float32(row + 4 * place, summed)
    return np.float32(rate) / np.sqrt(summed)


@jit_inline
def _step_bias(row, slope, rate, decay):
    """Step one row's bias; a rate of 0 leaves it."""
    bias = load_float32(row + 4 * BIAS)
    slope = np.float32(slope + decay * bias)
    pace = _paced(row, BIAS_SQUARES, rate, slope * slope)
    store_float32(row + 4 * BIAS, bias - pace * slope)


@jit
def _chance(raw):
    """The logistic function of a number, without overflow."""
    if raw >= 0:
        return 1 / (1 + np.exp(-raw))
    grown = np.exp(raw)
    return grown / (1 + grown)


@jit
def _softplus(raw):
    """The logarithm of 1 + exp(raw), without overflow."""
    return max(raw, 0.0) + np.log1p(np.exp(-abs(raw)))


@jit
def score_pairs(lefts, rights, left, right, padded, implied, mean, out):
    """Fill `out` (m,) float64 with the raw scores of pairs of rows (m,)."""
    for pair in range(len(lefts)):
        one = address(left) + left.strides[0] * np.int64(lefts[pair])
        other = address(right) + right.strides[0] * np.int64(rights[pair])
        p, q = one + 4 * HEADER, other + 4 * HEADER
        raw = _dot(p, q, padded)
        if implied:
            raw += _dot(p + 4 * padded, q, padded)
        out[pair] = mean + raw + load_float32(one) + load_float32(other)


@jit
def learn_pairs(
    lefts, rights, targets, left, right, padded, columns, implied, loss, mean, rates, decays
):
    """Take one step for each pair, in order; return the sum of their losses.

    Parameters
    ----------
    lefts, rights : (m,) int32 rows.
    targets : (m,) float32; 0 to 1 for `CROSS_ENTROPY`.
    left, right : tables; one and the same where there is one.
    padded, columns : columns of a segment, with and without padding.
    implied : whether left rows have implied vectors.
    loss : `SQUARED` (half of the squared difference) or `CROSS_ENTROPY`.
    rates, decays : (vectors, biases) float32; `decays` are the weights of half the squares of a
        pair's vectors and biases in its loss.
    """
    lost = 0.0
    decay = np.float32(decays[0])
    for pair in range(len(lefts)):
        later = min(pair + _AHEAD, len(lefts) - 1)
        ahead = address(left) + left.strides[0] * np.int64(lefts[later])
        prefetch(ahead)
        prefetch(ahead + 64)
        ahead = address(right) + right.strides[0] * np.int64(rights[later])
        prefetch(ahead)
        prefetch(ahead + 64)
        one = address(left) + left.strides[0] * np.int64(lefts[pair])
        other = address(right) + right.strides[0] * np.int64(rights[pair])
        p, q = one + 4 * HEADER, other + 4 * HEADER
        x = p + 4 * padded
        pq, pp, qq, uq, uu = zeros(), zeros(), zeros(), zeros(), zeros()
        for column in range(0, padded, 16):
            a, b = get(p + 4 * column, zeros()), get(q + 4 * column, zeros())
            u = add(a, get(x + 4 * column, zeros())) if implied else a
            pq, pp, qq = fma(a, b, pq), fma(a, a, pp), fma(b, b, qq)
            uq, uu = fma(u, b, uq), fma(u, u, uu)
        raw = mean + total(uq) + load_float32(one) + load_float32(other)
        if loss == SQUARED:
            slope = np.float32(raw - targets[pair])
            lost += 0.5 * slope * slope
        else:
            slope = np.float32(_chance(raw) - targets[pair])
            lost += _softplus(raw) - targets[pair] * raw
        square = slope * slope * total(qq) + 2 * slope * decay * total(pq)
        left_pace = _paced(one, SQUARES, rates[0], (square + decay * decay * total(pp)) / columns)
        square = slope * slope * total(uu) + 2 * slope * decay * total(uq)
        right_pace = _paced(
            other, SQUARES, rates[0], (square + decay * decay * total(qq)) / columns
        )
        moved, shrunk = _spread(-left_pace * slope), _spread(1 - left_pace * decay)
        right_moved, right_shrunk = _spread(-right_pace * slope), _spread(1 - right_pace * decay)
        wide = _spread(slope)
        for column in range(0, padded, 16):
            a, b = get(p + 4 * column, zeros()), get(q + 4 * column, zeros())
            u = a
            if implied:
                u = add(a, get(x + 4 * column, zeros()))
                at = x + 4 * (padded + column)
                put(at, fma(wide, b, get(at, zeros())))
            put(p + 4 * column, fma(moved, b, fma(shrunk, a, zeros())))
            put(q + 4 * column, fma(right_moved, u, fma(right_shrunk, b, zeros())))
        if rates[1] > 0:
            _step_bias(one, slope, rates[1], decays[1])
            _step_bias(other, slope, rates[1], decays[1])
    return lost


@jit
def _drawn(state, count):
    """A number below `count` from 64 bits of state, spread by splitmix64."""
    value = (state ^ (state >> np.uint64(30))) * _FIRST
    value = (value ^ (value >> np.uint64(27))) * _SECOND
    value = value ^ (value >> np.uint64(31))
    return np.int64((value >> np.uint64(32)) * np.uint64(count) >> np.uint64(32))


@jit
def draw_rows(seed, members, out):
    """Fill `out` (m,) with members drawn at random with replacement."""
    for place in range(len(out)):
        seed += _STEP
        out[place] = members[_drawn(seed, len(members))]


@jit
def rank_slopes(raw, drawn, own, other, loss, slopes):
    """Return the loss of one good pair beside drawn ones, and fill its slopes.

    Parameters
    ----------
    raw : (1 + n,) scores of the good pair, then of the drawn ones.
    drawn : (1 + n,) right rows; those equal to `own` or `other` do not count.
    own : the left row where there is one table, else -1.
    other : the right row of the good pair.
    loss : `BPR`, the mean of ``log(1 + exp(raw_drawn - raw_good))``, or `SOFTMAX`,
        ``-raw_good + log sum exp raw``.
    slopes : (1 + n,) filled with the derivatives by `raw`.
    """
    counted = 0
    for place in range(1, len(raw)):
        counted += drawn[place] != own and drawn[place] != other
    slopes[:] = 0
    if counted == 0:
        return 0.0
    lost = 0.0
    if loss == BPR:
        for place in range(1, len(raw)):
            if drawn[place] != own and drawn[place] != other:
                behind = raw[place] - raw[0]
                slopes[place] = _chance(behind) / counted
                slopes[0] -= slopes[place]
                lost += _softplus(behind) / counted
        return lost
    most = raw[0]
    for place in range(1, len(raw)):
        most = max(most, raw[place])
    slopes[0] = np.exp(raw[0] - most)
    summed = slopes[0]
    for place in range(1, len(raw)):
        if drawn[place] != own and drawn[place] != other:
            slopes[place] = np.exp(raw[place] - most)
            summed += slopes[place]
    slopes /= summed
    lost = np.log(summed) + most - raw[0]
    slopes[0] -= 1
    return lost


@jit
def learn_ranks(
    lefts,
    rights,
    members,
    negatives,
    seed,
    left,
    right,
    padded,
    columns,
    implied,
    loss,
    rates,
    decays,
    scratch,
):
    """Take one step for each good pair beside drawn ones, in order; return the sum of losses.

    Parameters
    ----------
    lefts, rights : (m,) int32 rows of good pairs.
    members : right rows of the block, from which `negatives` are drawn for each pair.
    seed : uint64, the block's own.
    loss : `BPR` or `SOFTMAX`; see `rank_slopes`.
    left, right, padded, columns, implied, rates, decays : as in `learn_pairs`.
    scratch : (2 * padded + 16,) float32.
    """
    lost = 0.0
    alone = address(left) == address(right)
    raw, slopes = np.empty(1 + negatives), np.empty(1 + negatives)
    drawn = np.empty(1 + negatives, np.int64)
    gradient = (address(scratch) + 63) // 64 * 64
    own_vector = gradient + 4 * padded
    for pair in range(len(lefts)):
        one = address(left) + left.strides[0] * np.int64(lefts[pair])
        p = one + 4 * HEADER
        drawn[0] = rights[pair]
        draw_rows(seed, members, drawn[1:])
        seed += np.uint64(negatives) * _STEP
        for place in range(len(drawn)):
            prefetch(address(right) + right.strides[0] * drawn[place])
            prefetch(address(right) + right.strides[0] * drawn[place] + 64)
        for column in range(0, padded, 16):
            u = get(p + 4 * column, zeros())
            if implied:
                u = add(u, get(p + 4 * (padded + column), zeros()))
            put(own_vector + 4 * column, u)
            put(gradient + 4 * column, zeros())
        for place in range(len(drawn)):
            other = address(right) + right.strides[0] * drawn[place]
            raw[place] = load_float32(other) + _dot(own_vector, other + 4 * HEADER, padded)
        own = np.int64(lefts[pair]) if alone else np.int64(-1)
        lost += rank_slopes(raw, drawn, own, np.int64(rights[pair]), loss, slopes)
        for place in range(len(drawn)):
            if slopes[place] == 0:
                continue
            other = address(right) + right.strides[0] * drawn[place]
            q = other + 4 * HEADER
            slope = np.float32(slopes[place])
            _blend(gradient, q, slope, padded)
            decay = np.float32(decays[0] if place == 0 else decays[0] / negatives)
            square = slope * slope * _dot(own_vector, own_vector, padded)
            square += 2 * slope * decay * _dot(own_vector, q, padded)
            square += decay * decay * _dot(q, q, padded)
            pace = _paced(other, SQUARES, rates[0], square / columns)
            _scale(q, 1 - pace * decay, padded)
            _blend(q, own_vector, -pace * slope, padded)
            if rates[1] > 0:
                _step_bias(other, slope, rates[1], decays[1])
        if implied:
            _blend(p + 8 * padded, gradient, np.float32(1), padded)
        _blend(gradient, p, np.float32(decays[0]), padded)
        pace = _paced(one, SQUARES, rates[0], _dot(gradient, gradient, padded) / columns)
        _blend(p, gradient, -pace, padded)
    return lost


@jit
def sum_implied(first, last, starts, partners, left, vectors, padded):
    """Refresh the implied vectors of left rows from `first` to `last`, and clear their slopes.

    Parameters
    ----------
    starts, partners : the right rows of left row l are ``partners[starts[l]:starts[l + 1]]``.
    vectors : (right rows, `HEADER` + padded) float32: what each right row implies.
    """
    for row in range(first, last):
        x = address(left) + left.strides[0] * row + 4 * (HEADER + padded)
        for column in range(0, 2 * padded, 16):
            put(x + 4 * column, zeros())
        share = left[row, SHARE]
        for place in range(starts[row], starts[row + 1]):
            later = min(place + _AHEAD, starts[row + 1] - 1)
            prefetch(address(vectors) + vectors.strides[0] * np.int64(partners[later]) + 64)
            y = address(vectors) + vectors.strides[0] * np.int64(partners[place]) + 4 * HEADER
            _blend(x, y, share, padded)


@jit
def step_implied(
    first, last, starts, partners, left, vectors, padded, columns, rate, decay, scratch
):
    """Step what right rows from `first` to `last` imply, by the slopes of their left rows.

    Parameters
    ----------
    starts, partners : the left rows of each right row, as in `sum_implied`.
    rate, decay : as in `learn_pairs`; `decay` counts once for each left row.
    scratch : (padded + 16,) float32.
    """
    gradient = (address(scratch) + 63) // 64 * 64
    for row in range(first, last):
        begin, end = starts[row], starts[row + 1]
        if begin == end:
            continue
        one = address(vectors) + vectors.strides[0] * row
        y = one + 4 * HEADER
        for column in range(0, padded, 16):
            put(gradient + 4 * column, zeros())
        for place in range(begin, end):
            later = np.int64(partners[min(place + _AHEAD, end - 1)])
            prefetch(address(left) + left.strides[0] * later + 4 * (HEADER + 2 * padded))
            own = np.int64(partners[place])
            slope = address(left) + left.strides[0] * own + 4 * (HEADER + 2 * padded)
            _blend(gradient, slope, left[own, SHARE], padded)
        _blend(gradient, y, np.float32(decay * (end - begin)), padded)
        pace = _paced(one, SQUARES, rate, _dot(gradient, gradient, padded) / columns)
        _blend(y, gradient, -pace, padded)


@jit
def count_blocks(lefts, rights, left_groups, right_groups, groups, counts):
    """Add to `counts` (groups * groups,) int64 how many pairs are in each block of groups."""
    for pair in range(len(lefts)):
        block = groups * np.int64(left_groups[lefts[pair]]) + right_groups[rights[pair]]
        counts[block] += 1


@jit
def deal_blocks(
    lefts, rights, targets, left_groups, right_groups, groups, places, out_lefts, out_rights, out
):
    """Write pairs to the `places` (groups * groups,) int64 of their blocks, which move on."""
    for pair in range(len(lefts)):
        block = groups * np.int64(left_groups[lefts[pair]]) + right_groups[rights[pair]]
        place = places[block]
        places[block] = place + 1
        out_lefts[place], out_rights[place] = lefts[pair], rights[pair]
        out[place] = targets[pair]


@jit
def step_rows(rows, gradients, values, squares, rate, decay):
    """Row-wise Adagrad on some rows of a plain table, each named once.

    Parameters
    ----------
    rows : (m,) integers.
    gradients : (m, n) float64, of each row's own loss.
    values : (N, n) float64 table.
    squares : (N,) float64, sums of squared gradients.
    rate, decay : the rate, and the weight of half the squares of a row.
    """
    for place in range(len(rows)):
        row = rows[place]
        square = 0.0
        for column in range(values.shape[1]):
            gradient = gradients[place, column] + decay * values[row, column]
            square += gradient * gradient
        squares[row] += square / values.shape[1]
        pace = rate / np.sqrt(squares[row])
        for column in range(values.shape[1]):
            gradient = gradients[place, column] + decay * values[row, column]
            values[row, column] -= pace * gradient


@jit
def add_rows(out, places, rows):
    """Add each of `rows` (m, n) to the row of `out` that `places` (m,) names, in order."""
    for number in range(len(places)):
        for column in range(out.shape[1]):
            out[places[number], column] += rows[number, column]
