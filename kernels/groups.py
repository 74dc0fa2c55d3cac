"""Groups of rows that pairs connect: union-find, and whether accepted pairs are transitive.

`parents` (N,) int64 holds for each row a row of its group that is not above it; a root is its own
parent. The root of a group is its least row, whatever the order of the pairs.
"""

from __future__ import annotations

import numpy as np

from fastpair.kernels.simd import address, jit, prefetch

_AHEAD = 16
"""Pairs whose parents are asked for ahead: they lie anywhere in memory."""

_STEP, _FIRST, _SECOND = (
    np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
"""Constants of splitmix64 (Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators,
2014), which spreads the bits of a row's number."""


@jit
def _root(parents, row):
    """The root of a row; what lies on the way is brought half as far from it."""
    while parents[row] != row:
        parents[row] = parents[parents[row]]
        row = parents[row]
    return row


@jit
def join(parents, left, right):
    """Unite the groups of the rows `left` and `right`, (m,) integers, pair by pair."""
    for pair in range(len(left)):
        later = min(pair + _AHEAD, len(left) - 1)
        prefetch(address(parents) + 8 * left[later])
        prefetch(address(parents) + 8 * right[later])
        first, second = _root(parents, left[pair]), _root(parents, right[pair])
        if first < second:
            parents[second] = first
        else:
            parents[first] = second


@jit
def number_groups(parents, groups):
    """Fill `groups` (N,) int64 with the number of each row's group, by first row; return how many.

    A root is the least row of its group, so that it is met before the others.
    """
    count = 0
    for row in range(len(parents)):
        parents[row] = parents[parents[row]]
        if parents[row] == row:
            groups[row] = count
            count += 1
        else:
            groups[row] = groups[parents[row]]
    return count


@jit
def _token(row):
    """64 bits that stand for a row."""
    value = np.uint64(row + 1) * _STEP
    value = (value ^ (value >> np.uint64(30))) * _FIRST
    value = (value ^ (value >> np.uint64(27))) * _SECOND
    return value ^ (value >> np.uint64(31))


@jit
def count_violating(keys, rows, sums):
    """Return how many pairs have a third row that is paired with just one of their two.

    Two rows have the same partners, each other counted, if the sums of their partners' tokens are
    equal: they are so by chance about once in 2^64 pairs.

    Parameters
    ----------
    keys : (m,) int64, ``least * rows + greatest`` of each pair, no pair twice.
    rows : N.
    sums : (N,) uint64, overwritten.
    """
    for row in range(rows):
        sums[row] = _token(row)
    for pair in range(len(keys)):
        left, right = keys[pair] // rows, keys[pair] % rows
        sums[left] += _token(right)
        sums[right] += _token(left)
    count = 0
    for pair in range(len(keys)):
        count += sums[keys[pair] // rows] != sums[keys[pair] % rows]
    return count
