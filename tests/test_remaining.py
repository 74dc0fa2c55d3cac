"""All pairs from a row on: what was done is not walked again, and the whole is what it would be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import products_only, random_plan, random_table

from fastpair.matrix import all_pairs
from fastpair.remaining import RemainingPairs

PLAN = random_plan(np.random.default_rng(0), products_only(5, 3))


def table(count, seed=0):
    rows = random_table(np.random.default_rng(seed), count, PLAN)
    rows[count // 2 :: 3] = rows[0]  # ties, which are decided by the lower row
    return rows


def walk(left, right, start, walked=None):
    def make(rows, others, memory):
        def progress(pairs):
            if walked is not None:
                walked.append(pairs)

        return all_pairs(rows, others, PLAN, threads=2, memory=memory, progress=progress)

    return RemainingPairs(make, left, right, 1 << 28, start)


def collect(parts):
    """Numbers of first rows, and everything else joined."""
    firsts, *arrays = zip(*parts, strict=True)
    return firsts, [np.concatenate(array) for array in arrays]


@settings(max_examples=25)
@given(
    count=st.integers(2, 200), share=st.floats(0.01, 0.99), other=st.booleans(), k=st.integers(1, 9)
)
def test_the_rest_is_what_it_is_in_the_whole(count, share, other, k):
    start = max(1, int(count * share))
    left, right = table(count), table(60, 1) if other else None
    whole, rest = walk(left, right, 0), walk(left, right, start)
    _, (scores, indices) = collect(whole.top_k(k))
    firsts, (rest_scores, rest_indices) = collect(rest.top_k(k))
    assert firsts[0] == start
    assert rest_scores.tobytes() == scores[start:].tobytes()
    assert rest_indices.tolist() == indices[start:].tolist()
    threshold = float(np.nanmedian(scores))
    _, (counts, columns, values) = collect(whole.above(threshold))
    firsts, found = collect(rest.above(threshold))
    skipped = counts[:start].sum()
    assert firsts[0] == start
    for ours, theirs in zip(
        found, (counts[start:], columns[skipped:], values[skipped:]), strict=True
    ):
        assert ours.tolist() == theirs.tolist()
    _, (matrix,) = collect(whole.dense())
    firsts, (rows,) = collect(rest.dense())
    assert firsts[0] == start
    assert rows.tobytes() == matrix[start:].tobytes()


@pytest.mark.parametrize("other", [False, True])
def test_finished_rows_are_not_walked_again(other):
    left, right = table(400), table(300, 1) if other else None
    width = 300 if other else 400
    for reduce in (lambda w: w.top_k(3), lambda w: w.above(1.0), lambda w: w.dense()):
        walked = []
        for _ in reduce(walk(left, right, 300, walked)):
            pass
        assert sum(walked) == 100 * width
