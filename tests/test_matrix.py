"""All pairs: what comes out is decided by the pair kernel alone, however the walk is cut."""

import threading
from contextlib import ExitStack
from unittest.mock import patch

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import layouts, products_only, random_plan, random_table, some_layout

from fastpair import matrix, walk
from fastpair.errors import ArgumentError, MemoryBudgetError
from fastpair.folding import fold
from fastpair.kernels import LINKS, Plan, RowLayout, aligned_empty
from fastpair.kernels.tile import FORMS
from fastpair.matrix import AllPairs
from fastpair.model import builtin
from fastpair.scoring import PairScorer
from fastpair.walk import Sides, choose_form, run_triangle

seeds = st.integers(0, 2**32 - 1)
SMALL = 64 * 2**20


def pair_scores(left, right, plan):
    """The matrix of pair kernel scores."""
    n, m = len(left), len(right)
    rows, columns = np.repeat(np.arange(n), m), np.tile(np.arange(m), n)
    return PairScorer(left, plan, right, plan)(rows, columns).reshape(n, m)


def cut_small():
    """Make groups, chunks, blocks and tasks so small that every loop runs several times."""
    stack = ExitStack()
    stack.enter_context(patch.multiple(walk, _PANELS_A_TASK=1, _LEAST_BLOCK=1, _BLOCK_BYTES=1))
    stack.enter_context(patch.object(matrix, "_HITS_A_TASK", 3))
    return stack


def cut_smaller():
    """Besides, leave no memory for the triangle, and none for more than two panels."""
    stack = cut_small()
    stack.enter_context(patch.object(Sides, "fits_triangle", lambda self, result_bytes: False))
    few = patch.object(walk, "_rows_within", lambda memory, row_bytes, width: 2 * width)
    stack.enter_context(few)
    return stack


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


@settings(max_examples=40)
@given(
    layout=layouts,
    link=st.sampled_from(LINKS),
    seed=seeds,
    count=st.integers(1, 170),
    k=st.integers(1, 80),
    threads=st.integers(1, 3),
    scan=st.sampled_from(sorted(FORMS)),
)
def test_top_k_is_that_of_the_pair_kernel(layout, link, seed, count, k, threads, scan):
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, layout, link)
    rows = random_table(rng, count, plan)
    exact = pair_scores(rows, rows, plan)
    with cut_small():
        pairs = AllPairs(rows, None, plan, threads=threads, scan=scan)
        scores, indices = collect_top_k(pairs, k)
    assert pairs.triangle
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


@settings(max_examples=30)
@given(
    layout=layouts,
    link=st.sampled_from(LINKS),
    seed=seeds,
    count=st.integers(1, 170),
    quantile=st.floats(0, 1),
    scan=st.sampled_from(sorted(FORMS)),
    cut=st.sampled_from([cut_small, cut_smaller]),
)
def test_a_threshold_keeps_what_the_pair_kernel_says(
    layout, link, seed, count, quantile, scan, cut
):
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, layout, link)
    rows = random_table(rng, count, plan)
    exact = pair_scores(rows, rows, plan)
    threshold = float(np.quantile(exact, quantile))
    with cut():
        hits = collect_hits(AllPairs(rows, None, plan, threads=2, scan=scan), threshold)
    assert hits == expected_hits(exact, threshold, True)


@pytest.mark.parametrize("cut", [ExitStack, cut_small, cut_smaller])
@pytest.mark.parametrize("scan", sorted(FORMS))
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_results_do_not_depend_on_how_the_walk_is_cut(cut, scan, precision):
    rng = np.random.default_rng(11)
    plan = random_plan(rng, some_layout(precision))
    left, right = random_table(rng, 97, plan), random_table(rng, 203, plan)
    for first, second in ((left, right), (right, None)):
        alone, others = second is None, first if second is None else second
        exact = pair_scores(first, others, plan)
        with cut():
            pairs = AllPairs(first, second, plan, threads=2, memory=SMALL, scan=scan)
            _scores, indices = collect_top_k(pairs, 5)
            assert pairs.scan == scan
            assert pairs.triangle == (alone and cut is not cut_smaller)
            assert indices.tolist() == naive.top_k(exact.tolist(), 5, skip_diagonal=alone)
            threshold = float(np.quantile(exact, 0.9))
            assert collect_hits(pairs, threshold) == expected_hits(exact, threshold, alone)
            dense = np.concatenate([part for _, part in pairs.dense()])
            edges, counts = pairs.histogram(20)
        sides = Sides(first, second, plan, "float32", 1, SMALL)
        _, bound = sides.left_side(0, len(first))
        raw_bound = abs(plan.slope) * bound[:, None] + 1e-6 * np.abs(exact)
        assert (np.abs(dense.astype(float) - exact) <= raw_bound).all()
        kept = exact[~np.eye(len(first), dtype=bool)] if alone else exact.ravel()
        inner = np.searchsorted(edges[1:-1], kept, side="right")
        assert counts.tolist() == np.bincount(inner, minlength=20).tolist()


@pytest.mark.parametrize("scan", sorted(FORMS))
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e15])
def test_scans_find_the_best_whatever_the_sizes_of_the_rows(scan, size):
    """Rows of one table that differ by many orders of magnitude, some of them zero."""
    rng = np.random.default_rng(17)
    plan = Plan(RowLayout(((37, 0), (0, 0), (0, 0), (0, 0), (0, 0)), bias=True))
    rows = random_table(rng, 120, plan)
    records = rows.view(plan.layout.dtype)[:, 0]
    records["product"][::3] *= np.float32(size)
    records["product"][5] = records["product"][9] = 0
    exact = pair_scores(rows, rows, plan)
    with cut_small():
        _scores, indices = collect_top_k(AllPairs(rows, None, plan, scan=scan), 7)
    assert indices.tolist() == naive.top_k(exact.tolist(), 7, skip_diagonal=True)


def _tables_at_the_ends_of_float32(case):
    """Two tables and their plan, whose scores are finite; what leads to them may not be."""
    precision = "int8" if case.endswith("scales") else "float32"
    constant = -2e38 if case == "constant" else 0.0
    plan = Plan(products_only(37, precision=precision, bias=case == "constant"), constant)
    rng = np.random.default_rng(20)
    left, right = random_table(rng, 60, plan), random_table(rng, 130, plan)
    first, second = (rows.view(plan.layout.dtype)[:, 0] for rows in (left, right))
    if case == "constant":
        first["bias"], second["bias"][::2] = 2e38, -1.9e38
    elif case == "small scales":
        first["scale"], second["scale"] = (10 ** rng.uniform(-23, -21, n) for n in (60, 130))
    elif case == "denormal scales":
        first["scale"], second["scale"] = 10 ** rng.uniform(-44, -40, 60), 1e30
    else:
        first["product"] *= np.float32(1e-10)
        second["product"] *= np.float32(1e37)
        if case == "no bfloat16":
            second["product"][9, :37] = np.finfo(np.float32).max
    return left, right, plan


@pytest.mark.parametrize("scan", sorted(FORMS))
@pytest.mark.parametrize(
    "case", ["far apart", "no bfloat16", "constant", "small scales", "denormal scales"]
)
def test_no_pair_is_lost_where_numbers_come_to_an_end(case, scan):
    left, right, plan = _tables_at_the_ends_of_float32(case)
    exact = pair_scores(left, right, plan)
    assert np.isfinite(exact).all()
    for k in (2, 130):
        _scores, indices = collect_top_k(AllPairs(left, right, plan, scan=scan), k)
        assert indices.tolist() == naive.top_k(exact.tolist(), k, skip_diagonal=False)
    for threshold in (float(exact.min()), 0.0, float(exact.max())):
        hits = collect_hits(AllPairs(left, right, plan, scan=scan), threshold)
        assert hits == expected_hits(exact, threshold, False)


@pytest.mark.parametrize("scan", sorted(FORMS))
def test_no_pair_is_lost_where_sums_nearly_overflow(scan):
    rng = np.random.default_rng(21)
    layout = RowLayout(((3, 2), (2, 2), (2, 2), (2, 2), (2, 2)), bias=True)
    plan = Plan(layout, 1e37)
    rows = random_table(rng, 100, plan)
    records = rows.view(layout.dtype)[:, 0]
    for name in layout.segment_lengths:
        records[name] *= np.float32(1e18 if name in ("product", "squared") else 3e36)
    exact = pair_scores(rows, rows, plan)
    assert np.isfinite(exact).all()
    _scores, indices = collect_top_k(AllPairs(rows, None, plan, scan=scan), 99)
    assert indices.tolist() == naive.top_k(exact.tolist(), 99, skip_diagonal=True)


def test_hits_that_outgrow_the_memory_are_found_row_by_row():
    """The triangle is left in the middle: what is done stays, the rest is walked in full."""
    rng = np.random.default_rng(18)
    plan = random_plan(rng, some_layout())
    rows = random_table(rng, 400, plan)
    exact = pair_scores(rows, rows, plan)
    threshold = float(np.quantile(exact, 0.7))
    expected = expected_hits(exact, threshold, True)
    starts = []

    def walk_on(pairs, sides, task, start, original=AllPairs._row_by_row):
        starts.append(start)
        return original(pairs, sides, task, start)

    for room in (0, 5_000, 20_000, 30_000, 40_000, 200_000):
        walked = []
        pairs = AllPairs(rows, None, plan, threads=2, memory=SMALL, progress=walked.append)
        few = patch.object(matrix, "_HIT_BYTES", SMALL // 4 // max(1, room))
        with cut_small(), few, patch.object(AllPairs, "_row_by_row", walk_on):
            assert collect_hits(pairs, threshold) == expected
        assert sum(walked) == 400 * 400
    assert starts[0] == 0
    assert starts[-1] == 400
    assert any(0 < start < 400 for start in starts)


@settings(max_examples=20)
@given(blocks=st.integers(0, 9), threads=st.integers(1, 5))
def test_a_triangle_brings_the_partners_of_a_block_one_by_one_in_rising_order(blocks, threads):
    lock, busy, seen, clashes = threading.Lock(), set(), [[] for _ in range(blocks)], []

    def work(i, j):
        with lock:
            clashes.extend(busy & {i, j})
            busy.update({i, j})
        with lock:
            busy.difference_update({i, j})
            for block, partner in {(i, j), (j, i)}:
                seen[block].append(partner)

    done = list(run_triangle(work, blocks, threads))
    assert sorted(done) == [(i, j) for i in range(blocks) for j in range(i, blocks)]
    assert seen == [list(range(blocks))] * blocks
    assert not clashes


def test_a_triangle_passes_on_errors_and_stops_when_it_is_left():
    def fail(i, j):
        raise ValueError(f"{i} {j}")

    with pytest.raises(ValueError, match="0 0"):
        list(run_triangle(fail, 4, 3))
    before = threading.active_count()
    tasks = run_triangle(lambda i, j: None, 50, 2)
    next(tasks)
    tasks.close()
    assert threading.active_count() == before


def test_the_form_of_a_scan_is_as_coarse_as_the_scores_allow():
    if len(FORMS) == 1:
        pytest.skip("this CPU has no instructions for low forms")
    plan = Plan(RowLayout(((64, 0), (0, 0), (0, 0), (0, 0), (0, 0))))
    rng = np.random.default_rng(19)
    rows = random_table(rng, 5000, plan)
    assert choose_form(rows, None, plan, k=10) == list(FORMS)[-1]
    vectors = rows.view(plan.layout.dtype)[:, 0]["product"]
    vectors[:] = 1 + 1e-4 * vectors  # all scores within what rounding to int8 may move
    assert choose_form(rows, None, plan, k=10) == "float32"
    assert choose_form(rows[:100], None, plan, k=10) == "float32"


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


@pytest.mark.parametrize("scan", sorted(FORMS))
def test_rows_of_rising_scores_are_all_weighed_as_they_come(scan):
    """Candidates come faster than they can be ruled out, so that room is made again and again."""
    rng = np.random.default_rng(13)
    plan = Plan(RowLayout(((30, 0), (0, 0), (0, 0), (0, 0), (0, 0))))
    left, right = random_table(rng, 40, plan), random_table(rng, 700, plan)
    records = right.view(plan.layout.dtype)[:, 0]["product"]
    records[:] = records[0] * (1 + 1e-3 * np.sort(rng.random((700, 1)), axis=0))
    exact = pair_scores(left, right, plan).tolist()
    for k in (1, 2, 3, 7, 20):
        _scores, indices = collect_top_k(AllPairs(left, right, plan, threads=1, scan=scan), k)
        assert indices.tolist() == naive.top_k(exact, k, skip_diagonal=False)


def test_the_dense_matrix_of_one_table_is_symmetric_to_the_bit():
    layout = RowLayout(((50, 14), (3, 20), (0, 0), (17, 2), (9, 33)), True)
    rng = np.random.default_rng(14)
    plan = random_plan(rng, layout)
    rows = random_table(rng, 130, plan)
    ((_, dense),) = AllPairs(rows, None, plan).dense()
    assert dense.tobytes() == np.ascontiguousarray(dense.T).tobytes()


@pytest.mark.parametrize("link", LINKS)
def test_dense_scores_of_rows_of_many_sizes_are_symmetric_whatever_the_link(link):
    """What is too near to a root for a tile does not hang on which row is the left one."""
    rng = np.random.default_rng(22)
    plan = random_plan(rng, products_only(60, 60, bias=False), link)
    rows = random_table(rng, 400, plan)
    records = rows.view(plan.layout.dtype)[:, 0]["product"]
    records *= (10.0 ** rng.uniform(-2, 0, (400, 1))).astype(np.float32)
    with cut_smaller():
        dense = np.concatenate([scores for _, scores in AllPairs(rows, None, plan).dense()])
    assert dense.tobytes() == np.ascontiguousarray(dense.T).tobytes()


@pytest.mark.parametrize("link", ["negative_root", "negative_arcosh"])
def test_dense_scores_are_right_where_a_root_is_steep(link):
    rng = np.random.default_rng(23)
    plan = Plan(RowLayout(((0, 0), (0, 0), (0, 0), (0, 0), (0, 30))), 0.0, link)
    rows = random_table(rng, 150, plan, 1e-5)
    rows.view(plan.layout.dtype)[:, 0]["squared"][:, :30] += rng.normal(size=30)
    ((_, dense),) = AllPairs(rows, None, plan).dense()
    np.testing.assert_allclose(dense, pair_scores(rows, rows, plan), rtol=1e-5)


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
    most = {"float32": 1e-4, "bfloat16": 5e-3, "int8": 3e-2}
    for form in FORMS:
        side, bound = Sides(rows, None, plan, form, 1, SMALL).left_side(0, 50)
        assert (bound < most[form] * side.length * side.length.max()).all()


def test_refusals():
    plan = Plan(RowLayout(((3, 0), (0, 0), (0, 0), (0, 0), (0, 0))))
    rows = random_table(np.random.default_rng(0), 1, plan)
    with pytest.raises(ArgumentError, match="k is 0"):
        list(AllPairs(rows, None, plan).top_k(0))
    with pytest.raises(ArgumentError, match="finite"):
        list(AllPairs(rows, None, plan).above(float("nan")))
    with pytest.raises(ArgumentError, match="scan is 'int4'"):
        AllPairs(rows, None, plan, scan="int4")
    if "int8" in FORMS:
        wide = Plan(RowLayout(((1 << 16, 0), (0, 0), (0, 0), (0, 0), (0, 0))))
        row = np.zeros((1, wide.layout.row_bytes), dtype=np.uint8)
        with pytest.raises(ArgumentError, match="65536 columns"):
            AllPairs(row, None, wide, scan="int8")
    with pytest.raises(ArgumentError, match="no pair"):
        AllPairs(rows, None, plan).histogram()
    many = np.zeros((10**8, plan.layout.row_bytes), dtype=np.uint8)  # never touched: no memory
    with pytest.raises(MemoryBudgetError, match="allow more memory"):
        list(AllPairs(rows, many, plan, memory=SMALL).dense())
