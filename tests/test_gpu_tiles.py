"""Tiles, candidates and lists of a simulated GPU, each by itself."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_gpu import SimulatedRuntime, needs_compiler
from tables import products_only, random_plan, random_table, some_layout

from fastpair.gpu_walk import DeviceWalk, HostSides
from fastpair.kernels import reference
from fastpair.kernels.gpu_tiles import (
    CAPACITIES,
    FORMS,
    Candidates,
    launch_select,
    pack_operands,
    sort_rows,
    split_keys,
    split_tile_bound,
    values_of,
    variants,
)

pytestmark = needs_compiler


def walk_over(left, right, plan, form="float32", raised=False, order=0):
    """A walk whose groups and chunks are whole."""
    sides = HostSides(left, right, plan, form, 1, 1 << 28)
    return DeviceWalk(SimulatedRuntime(order=order), sides, raised=raised, memory=1 << 26)


def tile_values(walk):
    """Every value of the tiles (n, n'), by way of candidates; NaN where a pair is not offered."""

    def collect(group):
        best = Candidates(walk.runtime, walk.stream, group.count, CAPACITIES[0])
        (right,) = walk.chunks()
        best.clear_overflow()
        walk.tiles.best(walk.block(group, right), best)
        assert walk.fetch(best.overflow)[0] == 0
        keys, counts = walk.fetch(best.keys), walk.fetch(best.counts)
        values = np.full((group.count, right.count), np.nan, np.float32)
        for row, count in enumerate(counts):
            scores, columns = split_keys(keys[row, :count])
            assert len(set(columns.tolist())) == count
            values[row, columns] = scores
        return values

    (values,) = walk.run(0, len(walk.sides.left.rows), collect)
    return values


def raw_of(left, right, plan):
    return reference.score_matrix(left, right, plan)


@pytest.mark.parametrize("order", [0, 1, 9])
@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_values_are_those_of_float64_within_the_bound(form, precision, order):
    rng = np.random.default_rng(order)
    plan = random_plan(rng, some_layout(precision))
    left, right = random_table(rng, 131, plan), random_table(rng, 150, plan)
    walk = walk_over(left, right, plan, form, order=order)
    values, exact = tile_values(walk), raw_of(left, right, plan)
    bounds = [side.pack(0, len(side.rows)).bounds for side in (walk.sides.left, walk.sides.right)]
    own, others = split_tile_bound(*bounds, plan)
    error = np.abs(values - exact)
    assert (error <= own[:, None] + others).all()
    assert error.max() > 0
    raised = tile_values(walk_over(left, right, plan, form, raised=True, order=order))
    assert (raised > exact).all()


@pytest.mark.parametrize("columns", [16, 48, 300])
def test_tensor_cores_multiply_rounded_columns(columns):
    """Exact products, added with no more error than the hardware's truncation."""
    rng = np.random.default_rng(columns)
    plan = random_plan(rng, products_only(columns, minus=7))
    left, right = random_table(rng, 40, plan), random_table(rng, 140, plan)
    walk = walk_over(left, right, plan, "bfloat16")
    values = tile_values(walk)
    rounded = []
    for side in (walk.sides.left, walk.sides.right):
        operands = side.pack(0, len(side.rows))
        halves = operands.words.view(np.uint16).astype(np.uint32) << 16
        rounded.append((halves.view(np.float32).astype(np.float64), operands.bias))
    (x, left_bias), (y, right_bias) = rounded
    start = np.float32(plan.constant) + (left_bias[:, None].astype(float) + right_bias)
    sizes = np.abs(x) @ np.abs(y).T + np.abs(start)
    assert (np.abs(values - (x @ y.T + start)) <= 2.5 * (columns + 40) * 2.0**-24 * sizes).all()


def test_a_row_of_each_side_is_found_at_its_place():
    """One-hot rows: a fragment or a tile that is laid out wrongly gives another matrix."""
    plan = random_plan(np.random.default_rng(0), products_only(64, bias=False))
    left, right = (random_table(np.random.default_rng(n), 130, plan) for n in (1, 2))
    values = np.arange(1, 131)[:, None] * np.eye(130, 64)
    left.view(plan.layout.dtype)[:, 0]["product"][:] = values
    right.view(plan.layout.dtype)[:, 0]["product"][:] = values[::-1]
    expected = raw_of(left, right, plan).astype(np.float32)
    for form in FORMS:
        np.testing.assert_allclose(tile_values(walk_over(left, right, plan, form)), expected, 1e-6)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_hits_are_counted_past_the_room_of_their_list(form):
    rng = np.random.default_rng(3)
    plan = random_plan(rng, products_only(20))
    rows = random_table(rng, 140, plan)
    walk = walk_over(rows, None, plan, form)
    values = tile_values(walk_over(rows, rows.copy(), plan, form))
    floor = np.float32(np.quantile(values, 0.9))
    walk._listed = 100

    def search(group):
        (right,) = walk.chunks()
        found = {}
        for triangle in (False, True):
            walk.runtime.fill(walk.pairs.count, 0, walk.stream)
            block = walk.block(group, right, triangle)
            walk.tiles.hits(block, floor, walk.pairs)
            count = int(walk.fetch(walk.pairs.count)[0])
            listed = (walk.fetch(part) for part in (walk.pairs.rows, walk.pairs.columns))
            first = set(zip(*(part.tolist() for part in listed), strict=True))
            every = set()
            for _, number in walk.listed(block, lambda b: walk.tiles.hits(b, floor, walk.pairs)):
                parts = (walk.pairs.rows[:number], walk.pairs.columns[:number])
                every |= set(zip(*(walk.fetch(part).tolist() for part in parts), strict=True))
            found[triangle] = count, first, every
        return found

    (found,) = walk.run(0, 140, search)
    reached = {(int(i), int(j)) for i, j in np.argwhere(values >= floor) if i != j}
    for triangle, (count, first, every) in found.items():
        expected = {(i, j) for i, j in reached if i < j or not triangle}
        assert count == len(expected) > 100
        assert every == expected
        assert len(first) == 100
        assert first < expected


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 9),
    keep=st.integers(1, 64),
    capacity=st.sampled_from([64, 256, 1024]),
    order=st.integers(0, 2**20),
)
def test_the_best_are_kept_by_value_then_by_lower_column(seed, rows, keep, capacity, order):
    rng = np.random.default_rng(seed)
    runtime = SimulatedRuntime(order=order)
    stream = runtime.stream()
    best = Candidates(runtime, stream, rows, capacity)
    counts = rng.integers(0, capacity + 1, rows).astype(np.uint32)
    keys = np.full((rows, capacity), 7, np.uint64)
    values, columns = [], []
    for row, count in enumerate(counts):
        values.append(np.round(rng.normal(size=count), 1).astype(np.float32))
        columns.append(rng.permutation(capacity)[:count].astype(np.uint32))
        keys[row, :count] = keys_of(values[-1], columns[-1])
    runtime.upload(best.keys, keys, stream)
    runtime.upload(best.counts, counts, stream)
    best.keep(keep)
    got = [np.empty(a.shape, a.dtype) for a in (best.keys, best.counts, best.kept, best.floors)]
    for target, source in zip(got, (best.keys, best.counts, best.kept, best.floors), strict=True):
        runtime.download(target, source, stream)
    runtime.synchronize(stream)
    kept_keys, kept_counts, kept, floors = got
    assert (kept_counts == np.minimum(counts, keep)).all()
    assert (kept == kept_counts).all()
    for row, count in enumerate(counts):
        if count < keep:
            assert (kept_keys[row] == keys[row]).all()
            assert np.isneginf(floors[row])
            continue
        order_of = np.lexsort((columns[row], -values[row]))[:keep]
        scores, found = split_keys(kept_keys[row, :keep])
        assert found.tolist() == columns[row][order_of].tolist()
        assert (scores == values[row][order_of]).all()
        assert floors[row] == scores[-1]


def keys_of(values, columns):
    bits = (values + np.float32(0)).view(np.uint32)
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.uint64)
    return ordered << np.uint64(32) | (~columns.astype(np.uint32)).astype(np.uint64)


def test_what_was_added_is_forgotten():
    runtime = SimulatedRuntime()
    stream = runtime.stream()
    best = Candidates(runtime, stream, 300, 64)
    counts = np.arange(300, dtype=np.uint32) % 40
    runtime.upload(best.counts, counts, stream)
    best.keep(40)
    runtime.upload(best.counts, counts + np.uint32(50), stream)
    best.cut(10, 300).forget()
    found = np.empty(300, np.uint32)
    runtime.download(found, best.counts, stream)
    runtime.synchronize(stream)
    assert (found[:10] == counts[:10] + 50).all()
    assert (found[10:] == counts[10:]).all()


@pytest.mark.parametrize("length", [2, 8, 64, 1024])
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_any_power_of_two_are_sorted(rows, length):
    runtime = SimulatedRuntime(order=5)
    stream = runtime.stream()
    keys = np.random.default_rng(length).integers(0, 50, (rows, length)).astype(np.uint64)
    on_device, found = runtime.empty(keys.shape, np.uint64), np.empty_like(keys)
    runtime.upload(on_device, keys, stream)
    sort_rows(runtime, stream, on_device)
    runtime.download(found, on_device, stream)
    runtime.synchronize(stream)
    assert (found == -np.sort(-keys.astype(np.int64), axis=1)).all()


def test_keys_hold_every_float_and_column():
    values = np.array([-np.inf, -1e38, -1.5, -1e-45, 0, 1e-45, 2.5, 1e38, np.inf], np.float32)
    columns = np.array([0, 2**32 - 2, 5, 7, 2**31, 1, 2, 3, 4], np.uint32)
    keys = keys_of(values, columns)
    assert (np.diff(keys.astype(object)) > 0).all()
    assert (values_of((keys >> np.uint64(32)).astype(np.uint32)) == values).all()
    scores, found = split_keys(keys)
    assert (scores == values).all()
    assert (found == columns).all()
    assert np.isnan(split_keys(np.zeros(1, np.uint64))[0]).all()


def test_rows_whose_bound_is_infinite_reach_every_floor():
    rng = np.random.default_rng(1)
    plan = random_plan(rng, products_only(9))
    rows = random_table(rng, 12, plan)
    sides = HostSides(rows, None, plan, "float32", 1, 1 << 28)
    operands = sides.left.pack(0, 12)
    bound = np.full(12, 0.5, np.float32)
    bound[3] = np.inf
    bias = operands.bias.copy()
    operands.raise_biases(bound)
    assert np.isposinf(operands.bias[3])
    assert (operands.words[3] == 0).all()
    others = np.arange(12) != 3
    assert (operands.bias[others] > bias[others] + bound[others]).all()


def test_operands_do_not_depend_on_pieces():
    rng = np.random.default_rng(2)
    plan = random_plan(rng, some_layout())
    rows = random_table(rng, 50, plan)
    sides = HostSides(rows, None, plan, "bfloat16", 1, 1 << 28)
    whole, parts = sides.left.pack(0, 50), sides.left.pack(0, 50)
    for first in range(0, 50, 20):
        some = rows[first : first + 20]
        pack_operands(parts, first, some, plan, sides.left.shifts)
    assert whole.words.tobytes() == parts.words.tobytes()
    assert whole.bias.tobytes() == parts.bias.tobytes()


def test_every_variant_is_named_once():
    found = list(variants())
    assert len(set(found)) == len(found)
    assert {file for file, _, _ in found} == {"tiles.cu", "select.cu"}


def test_nothing_is_launched_for_nothing():
    runtime = SimulatedRuntime()
    launch_select(runtime, runtime.stream(), "forget_appended", 0)
