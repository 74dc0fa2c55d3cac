"""All pairs: what comes out is decided by the pair kernel alone, however the walk is cut."""

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import layouts, random_plan, random_table, some_layout

import fastpair.matrix as matrix
from fastpair.errors import ArgumentError, MemoryBudgetError
from fastpair.folding import fold
from fastpair.kernels import LINKS, Plan, RowLayout, aligned_empty
from fastpair.kernels.operands import make_operand, tile_bound
from fastpair.matrix import AllPairs
from fastpair.model import builtin
from fastpair.scoring import PairScorer

seeds = st.integers(0, 2**32 - 1)
SMALL = 64 * 2**20


def pair_scores(left, right, plan):
    """The matrix of pair kernel scores."""
    n, m = len(left), len(right)
    rows, columns = np.repeat(np.arange(n), m), np.tile(np.arange(m), n)
    return PairScorer(left, plan, right, plan)(rows, columns).reshape(n, m)


def cut_small(monkeypatch):
    """Make groups, chunks and tasks so small that every loop runs several times."""
    monkeypatch.setattr(matrix, "_PANELS_A_TASK", 1)
    monkeypatch.setattr(matrix, "_HITS_A_TASK", 3)
    monkeypatch.setattr(AllPairs, "_rows_within", lambda self, memory, row_bytes, width: 2 * width)


def collect_top_k(pairs, k):
    parts = list(pairs.top_k(k))
    assert [first for first, _, _ in parts] == list(
        np.cumsum([0] + [len(scores) for _, scores, _ in parts[:-1]])
    )
    return np.concatenate([p[1] for p in parts]), np.concatenate([p[2] for p in parts])


def collect_hits(pairs, threshold):
    found, row = [], 0
    for first, counts, indices, scores in pairs.above(threshold):
        assert first == row
        row += len(counts)
        owners = np.repeat(np.arange(first, first + len(counts)), counts)
        found += zip(owners.tolist(), indices.tolist(), scores.tolist(), strict=True)
    return found


def expected_hits(scores, threshold, skip_diagonal):
    return [
        (i, j, float(scores[i, j]))
        for i in range(len(scores))
        for j in range(scores.shape[1])
        if scores[i, j] >= threshold and not (skip_diagonal and i == j)
    ]


@settings(max_examples=40, deadline=None)
@given(
    layout=layouts,
    link=st.sampled_from(LINKS),
    seed=seeds,
    count=st.integers(1, 70),
    k=st.integers(1, 80),
    threads=st.integers(1, 3),
)
def test_top_k_is_that_of_the_pair_kernel(layout, link, seed, count, k, threads):
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, layout, link)
    rows = random_table(rng, count, plan)
    exact = pair_scores(rows, rows, plan)
    scores, indices = collect_top_k(AllPairs(rows, None, plan, threads=threads), k)
    for i, best in enumerate(naive.top_k(exact.tolist(), k, skip_diagonal=True)):
        assert indices[i, : len(best)].tolist() == best
        assert scores[i, : len(best)].tobytes() == exact[i, best].tobytes()
        assert (indices[i, len(best) :] == -1).all()
        assert np.isnan(scores[i, len(best) :]).all()


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("size", [1e-4, 1.0, 8.0])
def test_links_that_make_scores_equal_leave_the_order_by_column(link, size):
    rng = np.random.default_rng(16)
    layout = RowLayout(((0, 0), (0, 0), (0, 0), (0, 0), (0, 6)))
    plan = Plan(layout, 0.0, link, 0.5, 0.25 if link != "identity" else 0.0)
    rows = random_table(rng, 150, plan, size)
    exact = pair_scores(rows, rows, plan)
    for k in (1, 4, 40):
        _scores, indices = collect_top_k(AllPairs(rows, None, plan), k)
        assert indices.tolist() == naive.top_k(exact.tolist(), k, skip_diagonal=True)
    for threshold in (exact.min(), np.median(exact), exact.max()):
        hits = collect_hits(AllPairs(rows, None, plan), float(threshold))
        assert hits == expected_hits(exact, float(threshold), True)
    _edges, counts = AllPairs(rows, None, plan).histogram(10)
    assert counts.sum() == 150 * 149


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_results_do_not_depend_on_how_the_walk_is_cut(monkeypatch, small, precision):
    rng = np.random.default_rng(11)
    plan = random_plan(rng, some_layout(precision))
    left, right = random_table(rng, 97, plan), random_table(rng, 203, plan)
    exact = pair_scores(left, right, plan)
    if small:
        cut_small(monkeypatch)
    pairs = AllPairs(left, right, plan, threads=2, memory=SMALL)
    _scores, indices = collect_top_k(pairs, 5)
    assert indices.tolist() == naive.top_k(exact.tolist(), 5, skip_diagonal=False)
    threshold = float(np.quantile(exact, 0.9))
    assert collect_hits(pairs, threshold) == expected_hits(exact, threshold, False)
    dense = np.concatenate([part for _, part in pairs.dense()])
    bound = tile_bound(
        make_operand(left, plan, "left"),
        make_operand(right, plan, "right").size.max(),
        make_operand(right, plan, "right").length.max(),
        plan,
    )
    assert (np.abs(dense.astype(float) - exact) <= bound[:, None]).all()
    edges, counts = pairs.histogram(20)
    assert counts.sum() == exact.size
    inner = np.searchsorted(edges[1:-1], exact.ravel(), side="right")
    assert counts.tolist() == np.bincount(inner, minlength=20).tolist()


def test_one_table_leaves_the_diagonal_out_and_gives_both_triangles():
    rng = np.random.default_rng(12)
    plan = random_plan(rng, some_layout())
    rows = random_table(rng, 75, plan)
    exact = pair_scores(rows, rows, plan)
    threshold = float(np.median(exact))
    hits = collect_hits(AllPairs(rows, None, plan), threshold)
    assert hits == expected_hits(exact, threshold, True)
    assert {(i, j) for i, j, _ in hits} == {(j, i) for i, j, _ in hits}
    _edges, counts = AllPairs(rows, None, plan).histogram(10)
    assert counts.sum() == 75 * 74


def test_a_threshold_keeps_pairs_that_score_it_exactly():
    plan = Plan(RowLayout(((3, 0), (0, 0), (0, 0), (0, 0), (0, 0))))
    rows = aligned_empty((20, plan.layout.row_bytes), np.uint8)
    rows[:] = 0
    rows.view(plan.layout.dtype)[:, 0]["product"][:, 0] = 1
    assert len(collect_hits(AllPairs(rows, None, plan), 1.0)) == 20 * 19
    assert (
        collect_hits(AllPairs(rows, None, plan), np.nextafter(np.float32(1), np.float32(2))) == []
    )
    assert collect_hits(AllPairs(rows, None, plan), 1 + 1e-12) == []


def test_ties_go_to_the_lower_index_even_when_all_pairs_are_equal():
    plan = Plan(RowLayout(((1, 0), (0, 0), (0, 0), (0, 0), (0, 0))))
    rows = aligned_empty((500, plan.layout.row_bytes), np.uint8)
    rows[:] = 0
    scores, indices = collect_top_k(AllPairs(rows, None, plan), 3)
    assert (scores == 0).all()
    assert indices[0].tolist() == [1, 2, 3]
    assert indices[1].tolist() == [0, 2, 3]
    assert (indices[4:] == [0, 1, 2]).all()


def test_near_ties_are_ranked_by_the_pair_kernel():
    """Equal rows but for the last bits: tiles and pairs round differently, the pair decides."""
    rng = np.random.default_rng(13)
    plan = Plan(RowLayout(((120, 0), (0, 0), (0, 0), (0, 0), (40, 0))))
    rows = random_table(rng, 1, plan)
    many = np.repeat(rows, 400, axis=0)
    records = np.ascontiguousarray(many).view(plan.layout.dtype)[:, 0]
    records["product"] *= (1 + rng.integers(0, 3, (400, 1)) * 2.0**-23).astype(np.float32)
    exact = pair_scores(many, many, plan)
    _scores, indices = collect_top_k(AllPairs(many, None, plan), 7)
    assert indices.tolist() == naive.top_k(exact.tolist(), 7, skip_diagonal=True)


def test_the_dense_matrix_of_one_table_is_symmetric_to_the_bit():
    layout = RowLayout(((50, 14), (3, 20), (0, 0), (17, 2), (9, 33)), True)
    rng = np.random.default_rng(14)
    plan = random_plan(rng, layout)
    rows = random_table(rng, 130, plan)
    ((_, dense),) = AllPairs(rows, None, plan).dense()
    assert dense.tobytes() == np.ascontiguousarray(dense.T).tobytes()


@pytest.mark.parametrize("name", ["euclidean", "manhattan"])
def test_dense_distances_are_right_far_from_the_origin(name):
    """Squares of numbers that are not centred cancel badly unless the tile shifts them."""
    rng = np.random.default_rng(16)
    x = rng.uniform(0, 255, (150, 300)) + 1000
    x[1] = x[0]
    x[2] = x[0] + np.eye(300)[0]
    rows, plan = fold(builtin(name), x)
    ((_, dense),) = AllPairs(rows, None, plan).dense()
    assert (np.diag(dense) == 0).all() or name == "manhattan"
    np.testing.assert_allclose(dense, pair_scores(rows, rows, plan), rtol=1e-5, atol=0.05)
    scores, indices = collect_top_k(AllPairs(rows, None, plan), 3)
    assert indices[0, :2].tolist() == [1, 2]
    assert scores[0, 0] == 0


def test_the_bound_of_a_tile_is_not_loose_by_more_than_it_must():
    """A bound that lets everything through would make every scan a rescoring."""
    plan = Plan(RowLayout(((128, 0), (0, 0), (0, 0), (0, 0), (0, 0))))
    rows = random_table(np.random.default_rng(15), 50, plan)
    operand = make_operand(rows, plan, "left")
    bound = tile_bound(operand, operand.size.max(), operand.length.max(), plan)
    assert (bound < 1e-4 * operand.length * operand.length.max()).all()


def test_refusals():
    plan = Plan(RowLayout(((3, 0), (0, 0), (0, 0), (0, 0), (0, 0))))
    rows = random_table(np.random.default_rng(0), 1, plan)
    with pytest.raises(ArgumentError, match="k is 0"):
        list(AllPairs(rows, None, plan).top_k(0))
    with pytest.raises(ArgumentError, match="finite"):
        list(AllPairs(rows, None, plan).above(float("nan")))
    with pytest.raises(ArgumentError, match="no pair"):
        AllPairs(rows, None, plan).histogram()
    many = np.zeros((10**8, plan.layout.row_bytes), dtype=np.uint8)  # never touched: no memory
    with pytest.raises(MemoryBudgetError, match="allow more memory"):
        list(AllPairs(rows, many, plan, memory=SMALL).dense())
