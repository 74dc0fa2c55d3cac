"""The best of each row without known pairs, against a search through all pairs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import products_only, random_plan, random_table

from fastpair.exclusions import Exclusions, PairsWithoutExcluded
from fastpair.matrix import AllPairs, all_pairs
from fastpair.scoring import PairScorer

MEMORY = 1 << 26


def top_k_without(rows, others, plan, k, excluded, start=0):
    """The best of each row, as a matrix is walked on two threads."""

    def walk(left, right, memory):
        return all_pairs(left, right, plan, memory=memory, threads=2)

    return PairsWithoutExcluded(walk, rows, others, excluded, MEMORY, start).top_k(k)


def by_search(rows, others, plan, k, excluded):
    """Best k of each row by the pair kernel, excluded pairs left out."""
    left, right = np.indices((len(rows), len(others))).reshape(2, -1)
    scores = PairScorer(rows, plan, others, plan)(left, right).reshape(len(rows), -1)
    scores = scores.astype(np.float64)
    for i, j in excluded:
        scores[i, j] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(scores, order, 1)
    order = np.where(np.isfinite(best), order, -1)
    short = k - order.shape[1]
    return np.pad(order, ((0, 0), (0, max(short, 0))), constant_values=-1)


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(1, 300))
def test_the_best_without_known_pairs_are_those_of_a_whole_search(seed, k, many):
    rng = np.random.default_rng(seed)
    layout = products_only(6)
    plan = random_plan(rng, layout)
    rows, others = random_table(rng, 23, plan), random_table(rng, 17, plan)
    left = (23 * rng.random(many) ** 3).astype(int)  # a few rows have most of the exclusions
    right = rng.integers(0, 17, many)
    excluded = Exclusions(left, right, (23, 17))
    found = list(top_k_without(rows, others, plan, k, excluded))
    indices = np.concatenate([part[2] for part in found])
    scores = np.concatenate([part[1] for part in found])
    expected = by_search(rows, others, plan, k, set(zip(left, right, strict=True)))
    assert np.array_equal(indices, expected)
    assert np.array_equal(np.isnan(scores), indices < 0)


def test_without_exclusions_the_best_are_those_of_the_plain_search():
    rng = np.random.default_rng(0)
    plan = random_plan(rng, products_only(20))
    rows, others = random_table(rng, 60, plan), random_table(rng, 45, plan)
    none = Exclusions(np.empty(0, int), np.empty(0, int), (60, 45))
    (first, scores, indices), *rest = top_k_without(rows, others, plan, 7, none)
    plain = next(AllPairs(rows, others, plan).top_k(7))
    assert (first, rest) == (0, [])
    assert np.array_equal(scores, plain[1])
    assert np.array_equal(indices, plain[2])


def test_how_many_rows_are_held_at_once_changes_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    plan = random_plan(rng, products_only(20))
    rows, others = random_table(rng, 60, plan), random_table(rng, 45, plan)
    excluded = Exclusions(rng.integers(0, 60, 500), rng.integers(0, 45, 500), (60, 45))
    whole = list(top_k_without(rows, others, plan, 5, excluded))
    monkeypatch.setattr("fastpair.exclusions.ROWS_AT_ONCE", 7)
    cut = list(top_k_without(rows, others, plan, 5, excluded))
    assert len(whole) == 1
    assert [part[0] for part in cut] == list(range(0, 60, 7))
    assert np.array_equal(np.concatenate([part[2] for part in cut]), whole[0][2])


@given(st.integers(0, 2**32), st.integers(0, 29))
def test_from_any_row_on_the_best_are_those_of_the_whole(seed, start):
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, products_only(6))
    rows, others = random_table(rng, 30, plan), random_table(rng, 17, plan)
    excluded = Exclusions(rng.integers(0, 30, 90), rng.integers(0, 17, 90), (30, 17))
    ((_, scores, indices),) = top_k_without(rows, others, plan, 4, excluded)
    ((first, later_scores, later),) = top_k_without(rows, others, plan, 4, excluded, start)
    assert first == start
    assert np.array_equal(later, indices[start:])
    assert np.array_equal(later_scores, scores[start:], equal_nan=True)


@given(st.data())
def test_pairs_of_rows_that_are_kept_are_numbered_as_these(data):
    pairs = data.draw(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), max_size=30))
    masks = [np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) for n in (7, 5)]
    left, right = np.array(pairs, np.int64).reshape(-1, 2).T
    kept = data.draw(st.sampled_from([tuple(masks), (None, masks[1]), (masks[0], None)]))
    found = Exclusions(left, right, (7, 5)).among_kept(kept)
    numbers = [
        np.arange(n) if mask is None else np.flatnonzero(mask)
        for mask, n in zip(kept, (7, 5), strict=True)
    ]
    places = np.divmod(found.keys, found.shape[1]) if found.shape[1] else ([], [])
    named = {(numbers[0][i], numbers[1][j]) for i, j in zip(*places, strict=True)}
    assert named == {(i, j) for i, j in pairs if i in numbers[0] and j in numbers[1]}


@pytest.mark.parametrize("repeated", [1, 3])
def test_a_pair_that_is_named_twice_counts_once(repeated):
    left, right = np.array([0, 1, 1] * repeated), np.array([3, 2, 4] * repeated)
    excluded = Exclusions(left, right, (3, 5))
    assert excluded.counts(0, 3).tolist() == [1, 2, 0]
    assert excluded.among(np.array([1]), np.array([[2, 3, 4, -1]])).tolist() == [
        [True, False, True, False]
    ]
