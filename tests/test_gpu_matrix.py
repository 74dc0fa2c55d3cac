"""All pairs on a simulated GPU: what comes out is the CPU's to the bit, however it is walked."""

from contextlib import ExitStack
from unittest.mock import patch

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_gpu import SimulatedRuntime, needs_compiler
from tables import counts, products_only, random_plan, random_table, some_layout
from test_matrix import collect_hits, collect_top_k, expected_hits, pair_scores
from test_precision import HEADS, a_model, folded

from fastpair import gpu_best, gpu_matrix, gpu_walk
from fastpair.errors import ArgumentError, DeviceError, MemoryBudgetError
from fastpair.gpu_matrix import GpuNetworkPairs, GpuPairs, all_pairs
from fastpair.kernels import LINKS, PRECISIONS, Network, Plan, RowLayout, aligned_empty
from fastpair.kernels.gpu import OutOfDeviceMemory
from fastpair.kernels.gpu_tiles import FORMS
from fastpair.matrix import AllPairs, NetworkPairs

pytestmark = needs_compiler

SMALL = 64 * 2**20
seeds = st.integers(0, 2**32 - 1)
float32_layouts = st.builds(RowLayout, counts, st.booleans())


def on_gpu(left, right, plan, *, devices=1, order=0, memory=1 << 28, **options):
    """All pairs on simulated devices; one thread packs, so that tests stay quick."""
    runtimes = [SimulatedRuntime(memory=memory, order=order + n, number=n) for n in range(devices)]
    return GpuPairs(left, right, plan, runtimes=runtimes, threads=1, **{"memory": SMALL, **options})


def few_candidates():
    """Room for so few candidates of a row that it is short again and again; quicker to sort."""
    return patch.multiple(gpu_best, CAPACITIES=(64, 128, 256), MOST_KEPT=128)


def short_lists(length=256):
    """Lists of pairs so short that blocks are walked again in parts."""
    return patch.multiple(gpu_walk, _LEAST_LISTED=length, _MOST_LISTED=length)


def same_hits(pairs, others, threshold):
    found = collect_hits(pairs, threshold)
    assert found == collect_hits(others, threshold)
    return found


def same_best(pairs, others, k):
    scores, indices = collect_top_k(pairs, k)
    expected_scores, expected = collect_top_k(others, k)
    np.testing.assert_array_equal(indices, expected)
    assert scores.tobytes() == expected_scores.tobytes()
    return scores


@settings(max_examples=8)
@given(
    layout=float32_layouts,
    link=st.sampled_from(["identity", "negative_root"]),
    seed=seeds,
    count=st.integers(1, 170),
    others=st.none() | st.integers(1, 300),
    k=st.integers(1, 80),
    order=st.integers(0, 2**20),
    scan=st.sampled_from(sorted(FORMS)),
)
def test_top_k_is_the_cpus(layout, link, seed, count, others, k, order, scan):
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, layout, link)
    left = random_table(rng, count, plan)
    right = None if others is None else random_table(rng, others, plan)
    with few_candidates():
        pairs = on_gpu(left, right, plan, order=order, scan=scan)
        same_best(pairs, AllPairs(left, right, plan, threads=1), k)
    assert pairs.scan == scan
    assert pairs.triangle == (right is None)


@settings(max_examples=8)
@given(
    layout=float32_layouts,
    link=st.sampled_from(["identity", "negative_root"]),
    seed=seeds,
    count=st.integers(1, 170),
    others=st.none() | st.integers(1, 200),
    quantile=st.floats(0, 1),
    order=st.integers(0, 2**20),
    scan=st.sampled_from(sorted(FORMS)),
    cut=st.sampled_from([ExitStack, short_lists]),
)
def test_a_threshold_keeps_what_the_cpu_keeps(
    layout, link, seed, count, others, quantile, order, scan, cut
):
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, layout, link)
    left = random_table(rng, count, plan)
    right = None if others is None else random_table(rng, others, plan)
    exact = pair_scores(left, left if right is None else right, plan)
    with cut():
        pairs = on_gpu(left, right, plan, order=order, scan=scan)
        threshold = float(np.quantile(exact, quantile))
        same_hits(pairs, AllPairs(left, right, plan, threads=1), threshold)


@pytest.mark.parametrize("precision", sorted(PRECISIONS))
@pytest.mark.parametrize("head", HEADS)
def test_every_head_in_every_precision(head, precision):
    embeddings = np.random.default_rng(5).normal(size=(60, 24))
    rows, folder = folded(a_model(head, 24), embeddings, precision)
    table = aligned_empty(rows.shape, np.uint8)
    table[:] = rows
    cpu = AllPairs(table, None, folder.plan, threads=1)
    with few_candidates():
        pairs = on_gpu(table, None, folder.plan)
        scores = same_best(pairs, cpu, 4)
    same_hits(pairs, cpu, float(np.median(scores)))
    dense, expected = (np.concatenate([part for _, part in p.dense()]) for p in (pairs, cpu))
    assert dense.tobytes() == expected.tobytes()
    assert (dense == dense.T).all()


@pytest.mark.parametrize("link", LINKS)
def test_every_link_and_every_result(link):
    rng = np.random.default_rng(6)
    plan = random_plan(rng, some_layout(), link)
    left, right = random_table(rng, 70, plan), random_table(rng, 140, plan)
    records = left.view(plan.layout.dtype)[:, 0]
    records["bias"] -= 3  # on both sides of 0, where links end
    for first, second in ((left, right), (right, None)):
        cpu, pairs = AllPairs(first, second, plan, threads=1), on_gpu(first, second, plan)
        with few_candidates():
            scores = same_best(pairs, cpu, 7)
        same_hits(pairs, cpu, float(np.quantile(scores, 0.9)))
        dense, expected = (np.concatenate([part for _, part in p.dense()]) for p in (pairs, cpu))
        assert dense.tobytes() == expected.tobytes()
        for own, wanted in zip(pairs.histogram(30), cpu.histogram(30), strict=True):
            np.testing.assert_array_equal(own, wanted)


def test_the_ends_of_a_histogram_are_found_whoever_meets_them():
    plan = random_plan(np.random.default_rng(3), products_only(4, bias=False))
    rows = random_table(np.random.default_rng(4), 48, plan)
    columns = rows.view(plan.layout.dtype)[:, 0]["product"]
    for other in range(1, 48, 4):  # one pair is far above all others, another far below
        columns[:, :2] = 0
        columns[[0, other], 0] = 100
        columns[[47 - other // 2, 47], 1] = 100, -100
        walks = on_gpu(rows, None, plan), AllPairs(rows, None, plan)
        found, wanted = (walk.histogram(5)[0] for walk in walks)
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("order", "devices"), [(0, 1), (1, 2), (77, 2)])
def test_results_do_not_depend_on_portions_orders_or_devices(order, devices):
    rng = np.random.default_rng(11)
    plan = random_plan(rng, some_layout())
    left, right = random_table(rng, 90, plan), random_table(rng, 140, plan)
    portions = {"device_memory": 400_000, "devices": devices, "order": order}
    for first, second in ((left, right), (right, None)):
        cpu = AllPairs(first, second, plan, threads=1)
        exact = pair_scores(first, first if second is None else second, plan)
        with few_candidates(), short_lists(), patch.object(gpu_matrix, "TILE", 64):
            pairs = on_gpu(first, second, plan, **portions)
            walk = pairs._devices("float32", raised=True, row_bytes=2000).walks[0]
            assert walk.group < len(first)
            assert walk.chunk < len(pairs.right)
            same_best(pairs, cpu, 5)
            assert not pairs.triangle
            same_hits(pairs, cpu, float(np.quantile(exact, 0.9)))
            dense = np.concatenate([part for _, part in pairs.dense()])
            edges, counts = pairs.histogram(20)
        assert dense.tobytes() == b"".join(part.tobytes() for _, part in cpu.dense())
        kept = exact[~np.eye(len(first), dtype=bool)] if second is None else exact.ravel()
        inner = np.searchsorted(edges[1:-1], kept, side="right")
        assert counts.tolist() == np.bincount(inner, minlength=20).tolist()


def _tied_tables():
    rng = np.random.default_rng(3)
    plan = Plan(products_only(5))
    few = random_table(rng, 150, plan)
    values = few.view(plan.layout.dtype)[:, 0]["product"]
    values[:] = np.rint(values)
    yield "rounded", few, plan
    twice = random_table(rng, 150, plan)
    twice[75:] = twice[:75]
    yield "duplicates", twice, plan
    equal = random_table(rng, 150, plan)
    equal[:] = equal[0]
    yield "equal", equal, plan
    sorted_rows = random_table(rng, 150, plan)  # each row better than all before
    records = sorted_rows.view(plan.layout.dtype)[:, 0]
    records["product"] = 0
    records["bias"] = np.arange(150)
    yield "rising", sorted_rows, plan


@pytest.mark.parametrize("k", [1, 9, 40, 500])
@pytest.mark.parametrize("tied", list(_tied_tables()), ids=lambda tied: tied[0])
def test_ties_go_to_the_lower_index(tied, k):
    _, rows, plan = tied
    for scan in FORMS:
        with few_candidates():
            pairs = on_gpu(rows, None, plan, scan=scan, order=k)
            same_best(pairs, AllPairs(rows, None, plan, threads=1), k)
            other = on_gpu(rows[:9], rows, plan, scan=scan)
            same_best(other, AllPairs(rows[:9], rows, plan, threads=1), k)


def test_rows_that_are_not_proven_are_scored_in_full():
    _, rows, plan = next(tied for tied in _tied_tables() if tied[0] == "equal")
    chosen = []

    def score_rows(walk, group, rows, k, original=gpu_best._score_rows):
        chosen.append(len(rows))
        return original(walk, group, rows, k)

    with few_candidates(), patch.object(gpu_best, "_score_rows", score_rows):
        same_best(on_gpu(rows, None, plan), AllPairs(rows, None, plan, threads=1), 5)
        assert chosen == [150]
        rng = np.random.default_rng(1)
        plain = random_table(rng, 150, plan)
        same_best(on_gpu(plain, None, plan), AllPairs(plain, None, plan, threads=1), 5)
    assert chosen == [150]


@pytest.mark.parametrize("capacities", [(64, 128, 256), (1024, 2048, 4096)])
@pytest.mark.parametrize("k", [17, 40, 200, 349])
def test_k_beyond_the_capacities_is_found_too(k, capacities):
    rng = np.random.default_rng(k)
    plan = Plan(products_only(5))
    rows, others = random_table(rng, 6, plan), random_table(rng, 350, plan)
    few = patch.multiple(gpu_best, CAPACITIES=capacities, MOST_KEPT=capacities[-1] // 2)
    with few, short_lists(capacities[-1]):
        same_best(on_gpu(rows, others, plan), AllPairs(rows, others, plan, threads=1), k)
        same_best(on_gpu(others[:9], None, plan), AllPairs(others[:9], None, plan), k)


def test_thresholds_that_keep_nothing_or_everything():
    rng = np.random.default_rng(9)
    plan = Plan(products_only(12))
    rows = random_table(rng, 140, plan)
    exact = pair_scores(rows, rows, plan)
    for right in (None, rows.copy()):
        pairs = on_gpu(rows, right, plan)
        assert collect_hits(pairs, float(exact.max()) + 1) == []
        for threshold in (float(exact.min()), float(exact.max())):
            expected = expected_hits(exact, threshold, right is None)
            assert collect_hits(pairs, threshold) == expected


def test_hits_that_outgrow_the_memory_are_found_in_halves_of_the_rows():
    rng = np.random.default_rng(18)
    plan = Plan(products_only(12))
    rows = random_table(rng, 300, plan)
    rows.view(plan.layout.dtype)[:, 0]["bias"][100:] += 50  # the first blocks have no hit
    exact = pair_scores(rows, rows, plan)
    threshold = 90.0
    expected = expected_hits(exact, threshold, True)
    starts = []

    def walk_on(pairs, devices, search, start, original=GpuPairs._row_by_row):
        starts.append(start)
        return original(pairs, devices, search, start)

    for room in (4_000, 2_000_000):
        walked = []
        pairs = on_gpu(rows, None, plan, devices=2, progress=walked.append)
        few = patch.object(gpu_matrix, "_HIT_BYTES", SMALL // 4 // room)
        small_blocks = patch.object(gpu_matrix, "TILE", 32)
        with few, small_blocks, patch.object(GpuPairs, "_row_by_row", walk_on):
            assert collect_hits(pairs, threshold) == expected
        assert sum(walked) == 300 * 300
    assert starts == [96, 300]


@pytest.mark.parametrize("scan", sorted(FORMS))
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e15, 1e18])
def test_the_best_are_found_whatever_the_sizes_of_the_rows(scan, size):
    rng = np.random.default_rng(17)
    plan = Plan(products_only(37))
    rows = random_table(rng, 120, plan)
    records = rows.view(plan.layout.dtype)[:, 0]
    records["product"][::3] *= np.float32(size)
    records["product"][5] = records["product"][9] = 0
    exact = pair_scores(rows, rows, plan)
    with few_candidates():
        _scores, indices = collect_top_k(on_gpu(rows, None, plan, scan=scan), 7)
    assert indices.tolist() == naive.top_k(exact.tolist(), 7, skip_diagonal=True)


def test_less_device_memory_than_it_seemed_is_met_by_smaller_portions():
    rng = np.random.default_rng(4)
    plan = Plan(products_only(40))
    rows = random_table(rng, 260, plan)
    cpu = AllPairs(rows, None, plan, threads=1)
    taken = []

    def shrink(walk, original=gpu_walk.DeviceWalk._shrink):
        taken.append(walk.memory)
        original(walk)

    claims_more = patch.object(GpuPairs, "_memory_of", lambda self, runtime: 1 << 20)
    with claims_more, few_candidates(), short_lists():
        with patch.object(gpu_walk.DeviceWalk, "_shrink", shrink):
            pairs = on_gpu(rows, None, plan, memory=200_000)
            same_best(pairs, cpu, 5)
            assert len(taken) > 1
            same_hits(pairs, cpu, 3.0)
            assert np.concatenate([part for _, part in pairs.dense()]).shape == (260, 260)
        with pytest.raises(MemoryBudgetError, match="--device-memory"):
            list(on_gpu(rows, None, plan, memory=5_000).top_k(3))


def test_one_row_and_no_row():
    rng = np.random.default_rng(2)
    plan = Plan(products_only(3))
    rows, others = random_table(rng, 1, plan), random_table(rng, 40, plan)
    scores, indices = collect_top_k(on_gpu(rows, None, plan), 3)
    assert np.isnan(scores).all()
    assert (indices == -1).all()
    assert collect_hits(on_gpu(rows, None, plan), -1e30) == []
    same_best(on_gpu(rows, others, plan), AllPairs(rows, others, plan), 3)
    same_best(on_gpu(others, rows, plan), AllPairs(others, rows, plan), 3)
    assert list(on_gpu(rows[:0], others, plan).top_k(2)) == []
    assert list(on_gpu(rows[:0], others, plan).above(0.0)) == []
    ((_, dense),) = on_gpu(rows, None, plan).dense()
    assert dense.shape == (1, 1)


def test_a_root_is_taken_of_what_the_pair_kernel_says_near_zero():
    rng = np.random.default_rng(13)
    layout = RowLayout(((0, 0), (0, 0), (0, 0), (0, 0), (30, 0)))
    plan = Plan(layout, 0.0, "negative_root")
    rows = random_table(rng, 150, plan, 1e-5)
    rows.view(layout.dtype)[:, 0]["squared"][:, :30] += rng.normal(size=30)
    for scan in (ExitStack, short_lists):
        with scan():
            ((_, dense),) = on_gpu(rows, None, plan).dense()
        ((_, expected),) = AllPairs(rows, None, plan, threads=1).dense()
        assert dense.tobytes() == expected.tobytes()


def test_a_network_is_scored_on_the_device_and_reduced_alike():
    rng = np.random.default_rng(8)
    layers = ((rng.normal(size=(7, 15)).astype("f4"), rng.normal(size=7).astype("f4")),)
    network = Network("features", layers, rng.normal(size=7).astype("f4"))
    plan = Plan(products_only(5, bias=False), 0.5, network=network)
    rows = random_table(rng, 30, plan)
    pairs = all_pairs(rows, None, plan, runtimes=[SimulatedRuntime()], memory=SMALL)
    assert isinstance(pairs, GpuNetworkPairs)
    same_best(pairs, NetworkPairs(rows, None, plan, memory=SMALL), 4)
    same_hits(pairs, NetworkPairs(rows, None, plan, memory=SMALL), 0.5)
    with pytest.raises(MemoryBudgetError, match="do not fit the GPU"):
        all_pairs(rows, None, plan, runtimes=[SimulatedRuntime(memory=1000)], memory=SMALL)

    def score(few, left, right, scores, original=GpuNetworkPairs._score):
        if len(left) > 200:
            raise OutOfDeviceMemory
        original(few, left, right, scores)

    with patch.object(GpuNetworkPairs, "_score", score):
        few = all_pairs(rows, None, plan, runtimes=[SimulatedRuntime()], memory=SMALL)
        few._pairs_at_once = 800
        same_best(few, NetworkPairs(rows, None, plan, memory=SMALL), 4)
    assert few._pairs_at_once == 200


def test_the_form_is_as_coarse_as_the_scores_allow():
    plan = Plan(products_only(64, bias=False))
    rng = np.random.default_rng(19)
    rows = random_table(rng, 3000, plan)
    assert gpu_walk.choose_form(rows, None, plan, k=10, room=256) == "bfloat16"
    assert gpu_walk.choose_form(rows, None, plan, floor=40.0) == "bfloat16"
    assert gpu_walk.choose_form(rows, None, plan, floor=0.0) == "float32"
    vectors = rows.view(plan.layout.dtype)[:, 0]["product"]
    vectors[:] = 1 + 1e-4 * vectors  # all scores within what rounding may move
    assert gpu_walk.choose_form(rows, None, plan, k=10, room=256) == "float32"
    maxima = Plan(RowLayout(((0, 0), (9, 0), (0, 0), (0, 0), (0, 0))))
    table = random_table(rng, 50, maxima)
    assert gpu_walk.choose_form(table, None, maxima, k=1, room=256) == "float32"


def test_refusals():
    plan = Plan(products_only(3))
    rows = random_table(np.random.default_rng(0), 1, plan)
    with pytest.raises(ArgumentError, match="k is 0"):
        list(on_gpu(rows, None, plan).top_k(0))
    with pytest.raises(ArgumentError, match="finite"):
        list(on_gpu(rows, None, plan).above(float("nan")))
    with pytest.raises(ArgumentError, match="scan is 'int8'"):
        on_gpu(rows, None, plan, scan="int8")
    with pytest.raises(ArgumentError, match="no pair"):
        on_gpu(rows, None, plan).histogram()
    with pytest.raises(ArgumentError, match="bins is 0"):
        on_gpu(rows, None, plan).histogram(0)
    with pytest.raises(ArgumentError, match="at least one device"):
        on_gpu(rows, None, plan, devices=0)


def test_an_error_of_the_driver_is_one_sentence():
    class CUDARuntimeError(RuntimeError):
        __module__ = "cupy_backends.cuda.api.runtime"

    class Broken(SimulatedRuntime):
        def fill(self, *_):
            raise CUDARuntimeError("cudaErrorIllegalAddress")

    rng = np.random.default_rng(0)
    plan = random_plan(rng, products_only(20, 4, "float32"))
    rows = random_table(rng, 30, plan)
    for walk in (lambda pairs: list(pairs.top_k(2)), lambda pairs: list(pairs.above(0.0))):
        with pytest.raises(DeviceError, match=r"gpu:0 failed \(CUDARuntimeError: cudaErrorIllegal"):
            walk(GpuPairs(rows, None, plan, runtimes=[Broken()]))
