"""The pair and network kernels of GPUs, run on a simulated one: the bits of the CPU."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from simulated_gpu import SimulatedRuntime, needs_compiler
from tables import layouts, products_only, random_plan, random_table, some_layout
from test_network import network_table

from fastpair.agreement import Case, cases
from fastpair.heads import HEADS
from fastpair.kernels import LINKS, PRECISIONS, Plan, RowLayout, gpu, network, pairs

pytestmark = needs_compiler

seeds = st.integers(0, 2**32 - 1)
orders = st.integers(0, 5)
VARIANTS = {(name, options) for _, name, options in gpu.variants()}


def device_scores(plan, rows, others, left, right, *, order=0, **choices):
    """Scores of pairs on a simulated device, and its first_bad; outputs are poisoned before."""
    runtime = SimulatedRuntime(order=order)
    stream = runtime.stream()
    table = gpu.DeviceTable(runtime, rows, others, plan, stream)
    first_bad = runtime.empty(1, np.uint64)
    runtime.fill(first_bad, 0xFF, stream)
    lists = [runtime.empty(len(numbers), numbers.dtype) for numbers in (left, right)]
    for target, numbers in zip(lists, (left, right), strict=True):
        runtime.upload(target, numbers, stream)
    scores = runtime.empty(len(left), np.float32)
    gpu.score_pairs(runtime, table, *lists, scores, first_bad, stream, **choices)
    found, bad = np.empty(len(left), np.float32), np.empty(1, np.uint64)
    runtime.download(found, scores, stream)
    runtime.download(bad, first_bad, stream)
    runtime.synchronize(stream)
    assert runtime.compiled <= VARIANTS
    return found, int(bad[0])


def cpu_scores(plan, rows, others, left, right):
    scores = np.empty(len(left), np.float32)
    if plan.network is not None:
        network.NetworkTables(rows, others, plan).score(left, right, scores)
    else:
        assert pairs.score_pairs(pairs.table_arguments(rows, others, plan), left, right, scores) < 0
    return scores


def assert_same_bits(plan, rows, others, left, right, **choices):
    found, bad = device_scores(plan, rows, others, left, right, **choices)
    assert found.tobytes() == cpu_scores(plan, rows, others, left, right).tobytes()
    assert bad == 2**64 - 1


def drawn_pairs(rng, count, left_count, right_count, index="i8", together=1):
    """Row numbers; each left one comes `together` times in a row, about."""
    left = np.repeat(rng.integers(0, left_count, count), together)[:count]
    return left.astype(index), rng.integers(0, right_count, count).astype(index)


# --- sums over columns ---------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    layout=layouts
    | st.builds(products_only, *[st.integers(0, 150)] * 2, st.sampled_from(sorted(PRECISIONS))),
    count=st.sampled_from([0, 1, 63, 64, 65, 300]),
    index=st.sampled_from(["i4", "i8"]),
    filling=st.sampled_from([64, 1000, gpu.FILLING_THREADS]),
    together=st.sampled_from([1, 7]),
    runs=st.booleans(),
    order=orders,
    seed=seeds,
)
def test_the_bits_are_those_of_the_cpu(layout, count, index, filling, together, runs, order, seed):
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, layout)
    rows, others = random_table(rng, 30, plan), random_table(rng, 20, plan)
    left, right = drawn_pairs(rng, count, 30, 20, index, together)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "FILLING_THREADS", filling)
        assert_same_bits(plan, rows, others, left, right, order=order, runs=runs)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_link_has_the_bits_of_the_cpu(precision, link):
    rng = np.random.default_rng(3)
    plan = random_plan(rng, some_layout(precision), link)
    rows = random_table(rng, 40, plan, size=0.3)
    left, right = drawn_pairs(rng, 500, 40, 40)
    unlinked = replace(plan, link="identity", slope=1.0, offset=0.0)
    middle = np.median(cpu_scores(unlinked, rows, rows, left, right))
    plan = replace(plan, constant=plan.constant - float(middle))  # raw scores of either sign
    assert_same_bits(plan, rows, rows, left, right, order=2)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_has_the_bits_of_the_cpu_and_keeps_to_the_bound(head):
    left, right = np.indices((17, 17)).reshape(2, -1)
    for case in cases([head], entities=17):
        assert_same_bits(case.plan, case.rows, case.rows, left, right)
        raw, _ = device_scores(case.unlinked, case.rows, None, left, right, order=1)
        assert (np.abs(raw.reshape(17, 17) - case.raw) <= case.pair_bound()).all()
        swapped, _ = device_scores(case.unlinked, case.rows, None, right, left)
        assert swapped.tobytes() == raw.tobytes()


@pytest.mark.parametrize("lanes", gpu.WIDE_LANES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", [some_layout, lambda p: products_only(150, 67, p)])
def test_wider_groups_keep_to_the_bound_and_to_the_order_of_a_pair(layout, precision, lanes):
    rng = np.random.default_rng(lanes)
    plan = random_plan(rng, layout(precision))
    case = Case("some", random_table(rng, 20, plan), plan)
    left, right = np.indices((20, 20)).reshape(2, -1)
    found, _ = device_scores(plan, case.rows, None, left, right, lanes=lanes, order=lanes)
    assert (np.abs(found.reshape(20, 20) - case.raw) <= case.pair_bound()).all()
    swapped, _ = device_scores(plan, case.rows, None, right, left, lanes=lanes, runs=True)
    assert swapped.tobytes() == found.tobytes()
    if precision == "int8":
        assert found.tobytes() == cpu_scores(plan, case.rows, case.rows, left, right).tobytes()


@pytest.mark.parametrize("lanes", [None, 32])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("columns", [(16, 0), (0, 16), (100, 28), (128, 0), (128, 1), (600, 600)])
def test_rows_of_every_length_are_held_or_read_again_with_the_same_bits(columns, precision, lanes):
    rng = np.random.default_rng(4)
    plan = random_plan(rng, products_only(*columns, precision))
    rows = random_table(rng, 12, plan)
    left, right = drawn_pairs(rng, 200, 12, 12, together=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "FILLING_THREADS", 64)
        held, _ = device_scores(plan, rows, None, left, right, runs=True, lanes=lanes, order=3)
        read, _ = device_scores(plan, rows, None, left, right, lanes=lanes)
    assert held.tobytes() == read.tobytes()
    if lanes is None:
        assert held.tobytes() == cpu_scores(plan, rows, rows, left, right).tobytes()


@pytest.mark.parametrize("segment", range(5))
@pytest.mark.parametrize("minus", [False, True])
def test_int8_sums_are_exact_to_the_last_number(segment, minus):
    columns = 32_768
    counts = [(0, 0)] * 5
    counts[segment] = (0, columns) if minus else (columns, 0)
    plan = Plan(RowLayout(tuple(counts), False, "int8"), segment_scales=(1.0,) * 5)
    rows = np.zeros((4, plan.layout.row_bytes), np.uint8)
    for row, value in enumerate((-128, 127, -127, 3)):
        records = rows.view(plan.layout.dtype)[:, 0]
        records[records.dtype.names[0]][row] = value
        if plan.layout.scale:
            records["scale"] = 1
    left, right = np.indices((4, 4)).reshape(2, -1)
    assert_same_bits(plan, rows, rows, left, right)


@settings(max_examples=40)
@given(
    count=st.integers(1, 90),
    places=st.sets(st.integers(0, 89), min_size=1, max_size=3),
    bad=st.sampled_from([-1, 20, 2**31 - 1, -(2**31), 2**32, 2**63 - 1, -(2**63)]),
    swap=st.booleans(),
    form=st.sampled_from(["float32", "int8", "network"]),
    order=orders,
)
@example(count=5, places={3}, bad=20, swap=True, form="float32", order=0)
@example(count=5, places={3}, bad=20, swap=False, form="network", order=0)
def test_rows_out_of_range_are_not_read_and_the_first_is_told(
    count, places, bad, swap, form, order
):
    if form == "network":
        _, _, rows, plan = network_table("concat(hidden=8x3)", count=20)
    else:
        plan = Plan(some_layout(form))
        rows = random_table(np.random.default_rng(0), 20, plan)
    good = np.arange(count) % 20
    places = [place % count for place in places]
    index = np.int32 if -(2**31) <= bad < 2**31 else np.int64
    numbers = good.astype(index)
    numbers[places] = bad
    left, right = (good.astype(index), numbers) if swap else (numbers, good.astype(index))
    found, first = device_scores(plan, rows, None, left, right, order=order)
    expected = cpu_scores(plan, rows, rows, good, good)
    expected[places] = np.nan
    assert first == min(places)
    assert np.array_equal(found, expected, equal_nan=True)


class HeldElsewhere:
    """Memory of another library, as CUDA libraries show it to each other."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, False),
            "strides": None,
            "version": 3,
        }


def test_tables_beyond_2_gigabytes_are_read_at_their_place():
    plan = Plan(products_only(5, 3), 0.25)
    count = 2**31 // plan.layout.row_bytes + 9
    rows = np.zeros((count, plan.layout.row_bytes), np.uint8)  # what is not touched takes no memory
    rows[-9:] = random_table(np.random.default_rng(0), 9, plan)
    runtime = SimulatedRuntime()
    stream = runtime.stream()
    table = gpu.DeviceTable(runtime, HeldElsewhere(rows), None, plan, stream)
    left, right = np.indices((9, 9)).reshape(2, -1) + count - 9
    lists = [runtime.empty(81, np.int64) for _ in range(2)]
    scores, first_bad = runtime.empty(81, np.float32), runtime.empty(1, np.uint64)
    for target, numbers in zip(lists, (left, right), strict=True):
        runtime.upload(target, numbers, stream)
    gpu.score_pairs(runtime, table, *lists, scores, first_bad, stream)
    found = np.empty(81, np.float32)
    runtime.download(found, scores, stream)
    runtime.synchronize(stream)
    last = rows[-9:]
    expected = cpu_scores(plan, last, last, left - count + 9, right - count + 9)
    assert found.tobytes() == expected.tobytes()


# --- networks ------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    name=st.sampled_from(
        ["mlp(hidden=6x5)", "mlp(hidden=19)", "concat(hidden=8x3)", "mlp(hidden=70x130)"]
    ),
    count=st.sampled_from([0, 1, 63, 64, 65, 300]),
    blocks=st.sampled_from([1, 2, 528]),
    index=st.sampled_from(["i4", "i8"]),
    order=orders,
    seed=st.integers(0, 9),
)
def test_networks_have_the_bits_of_the_cpu(name, count, blocks, index, order, seed):
    _, _, rows, plan = network_table(name, seed=seed)
    left, right = drawn_pairs(np.random.default_rng(seed), count, 40, 33, index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "_MOST_NETWORK_BLOCKS", blocks)
        assert_same_bits(plan, rows, rows[:33], left, right, order=order)
        assert_same_bits(plan, rows[:33], rows, right, left, order=order)


def test_two_streams_score_by_one_network_side_by_side():
    _, _, rows, plan = network_table("mlp(hidden=6x5)")
    left, right = drawn_pairs(np.random.default_rng(0), 200, 40, 40)
    runtime = SimulatedRuntime(order=4)
    streams = [runtime.stream(), runtime.stream()]
    table = gpu.DeviceTable(runtime, rows, None, plan, streams[0])
    runtime.wait(streams[1], runtime.record(streams[0]))
    scratch = [table.network.scratch(stream) for stream in streams]
    assert scratch[0] is not scratch[1]
    assert scratch[0] is table.network.scratch(streams[0])
    kept, found = [], [np.empty(200, np.float32) for _ in streams]
    for stream, result in zip(streams, found, strict=True):
        lists = [runtime.empty(200, np.int64) for _ in range(2)]
        scores, first_bad = runtime.empty(200, np.float32), runtime.empty(1, np.uint64)
        for target, numbers in zip(lists, (left, right), strict=True):
            runtime.upload(target, numbers, stream)
        gpu.score_pairs(runtime, table, *lists, scores, first_bad, stream)
        runtime.download(result, scores, stream)
        kept += [*lists, scores, first_bad]
    for stream in streams:
        runtime.synchronize(stream)
    expected = cpu_scores(plan, rows, rows, left, right).tobytes()
    assert [result.tobytes() for result in found] == [expected] * 2


# --- what is refused -----------------------------------------------------------------------------


def test_arrays_that_do_not_fit_are_refused():
    runtime, plan = SimulatedRuntime(), Plan(some_layout())
    stream = runtime.stream()
    rows = random_table(np.random.default_rng(0), 5, plan)
    for wrong in (rows[:, :-64], rows.view(np.int8), rows[0], np.asfortranarray(rows)):
        with pytest.raises(ValueError, match="rows"):
            gpu.DeviceTable(runtime, wrong, None, plan, stream)
    table = gpu.DeviceTable(runtime, rows, None, plan, stream)
    numbers, others = runtime.empty(4, np.int32), runtime.empty(4, np.int64)
    scores, bad = runtime.empty(4, np.float32), runtime.empty(1, np.uint64)
    for arguments in (
        (numbers, others, scores, bad),
        (scores, scores, scores, bad),
        (numbers, numbers, scores[:3], bad),
        (numbers, numbers, numbers, bad),
        (numbers, numbers, scores, others),
    ):
        with pytest.raises(ValueError, match=r"row numbers|scores"):
            gpu.score_pairs(runtime, table, *arguments, stream)
    with pytest.raises(ValueError, match="lanes 5, expected 4"):
        gpu.score_pairs(runtime, table, numbers, numbers, scores, bad, stream, lanes=5)
    _, _, rows, plan = network_table("mlp(hidden=19)")
    table = gpu.DeviceTable(runtime, rows, None, plan, stream)
    with pytest.raises(ValueError, match="for a network"):
        gpu.score_pairs(runtime, table, numbers, numbers, scores, bad, stream, lanes=8)
    with pytest.raises(ValueError, match="a network needs float32"):
        gpu.DeviceNetwork(runtime, Plan(some_layout()), stream)


def test_rows_that_lie_on_the_device_are_not_copied():
    runtime, plan = SimulatedRuntime(), Plan(some_layout())
    stream = runtime.stream()
    rows = runtime.empty((5, plan.layout.row_bytes), np.uint8)
    table = gpu.DeviceTable(runtime, rows, rows, plan, stream)
    assert table.left is rows
    assert (table.left_count, table.right_count) == (5, 5)
    assert runtime.free_memory() == runtime.memory - rows.nbytes


def test_a_table_too_large_for_the_device_is_told_apart():
    plan = Plan(some_layout())
    runtime = SimulatedRuntime(memory=1000)
    rows = random_table(np.random.default_rng(0), 5, plan)
    with pytest.raises(gpu.OutOfDeviceMemory):
        gpu.DeviceTable(runtime, rows, None, plan, runtime.stream())
