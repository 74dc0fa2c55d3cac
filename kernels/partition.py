"""Pairs -> buckets of pairs whose rows lie together, and scores back into the order of the pairs.

Rows of the held side are cut into blocks of `held_rows`, those of the streamed side into chunks of
`chunk_rows`. The pairs of block a and chunk c are one bucket, ``first_bucket[a] + c``. Within it
pairs keep their order, so that the number of a pair's bucket says where its score is found again.
Like the pair kernel these fill given arrays serially and run side by side in threads.
"""

from __future__ import annotations

import numpy as np

from fastpair.kernels.simd import jit

SPOILED = 65535
"""The bucket of pairs that are not scored; others have lower numbers."""


@jit
def locate(left, right, spoiled, one_table, held_rows, chunk_rows, first_bucket, bits, found):
    """Fill in the bucket of each pair and where its rows lie in block and chunk.

    Parameters
    ----------
    left, right : (m,) int64, rows of the held and of the streamed side, inside the tables.
    spoiled : (m,) bool, pairs that go to `SPOILED`, or (0,): none.
    one_table : whether both sides are one table; then the row of the lower block is held, whichever
        it is: a score is the same for both orders.
    held_rows, chunk_rows : rows of a block and of a chunk.
    first_bucket : (blocks,) int64.
    bits : how many bits the row within the block takes; the one within the chunk follows.
    found : buckets (m,) uint16, places (m,) int64, counts (buckets,) int64 that grow.
    """
    buckets, places, counts = found
    for pair in range(len(left)):
        if len(spoiled) and spoiled[pair]:
            buckets[pair] = SPOILED
            continue
        held, other = left[pair], right[pair]
        block = held // held_rows
        if one_table and other // held_rows < block:
            held, other = other, held
            block = held // held_rows
        chunk = other // chunk_rows
        bucket = first_bucket[block] + chunk
        buckets[pair] = bucket
        places[pair] = (held - block * held_rows) | ((other - chunk * chunk_rows) << bits)
        counts[bucket] += 1


@jit
def count_buckets(buckets, counts):
    """Add the pairs of each bucket (m,) uint16 to `counts` (buckets,) int64."""
    for bucket in buckets:
        if bucket != SPOILED:
            counts[bucket] += 1


@jit
def sort_places(buckets, places, cursors, width, records):
    """Write each place, (m,) int64, as `width` bytes to where its bucket goes on.

    `cursors` (buckets,) int64 count records and move; `records` is uint8.
    """
    for pair in range(len(buckets)):
        bucket = buckets[pair]
        if bucket == SPOILED:
            continue
        at, place = cursors[bucket] * width, places[pair]
        cursors[bucket] += 1
        for byte in range(width):
            records[at + byte] = place & 255
            place >>= 8


@jit
def read_places(records, width, bits, held, streamed):
    """Fill `held` and `streamed` (m,) int32 with the rows of records of `width` bytes, uint8."""
    mask = (np.int64(1) << bits) - 1
    for pair in range(len(held)):
        place, at = np.int64(0), pair * width
        for byte in range(width):
            place |= np.int64(records[at + byte]) << (8 * byte)
        held[pair], streamed[pair] = place & mask, place >> bits


@jit
def collect_scores(buckets, cursors, sorted_scores, scores):
    """Fill `scores` (m,) float32 from `sorted_scores`, where each bucket goes on at its cursor.

    Pairs of `SPOILED` score NaN.
    """
    for pair in range(len(buckets)):
        bucket = buckets[pair]
        if bucket == SPOILED:
            scores[pair] = np.nan
            continue
        scores[pair] = sorted_scores[cursors[bucket]]
        cursors[bucket] += 1
