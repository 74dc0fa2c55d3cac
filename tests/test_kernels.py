"""The pair kernel: right against the oracle, its bits as the contract defines them."""

import json
import os
import subprocess
import sys
from fractions import Fraction

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import (
    entities,
    layouts,
    products_only,
    random_plan,
    random_table,
    run_places,
    some_layout,
)

from fastpair.errors import DataError
from fastpair.folding import common_scales
from fastpair.kernels import LINKS, PRECISIONS, SEGMENTS, Plan, RowLayout, cpu, pairs, reference
from fastpair.scoring import PairScorer, meet

seeds = st.integers(0, 2**32 - 1)


def all_pairs(count):
    return [part.reshape(-1) for part in np.meshgrid(range(count), range(count), indexing="ij")]


def scores_of(rows, plan, left, right):
    scores = np.full(len(left), np.nan, dtype=np.float32)
    cpu.score_pairs(cpu.table_arguments(rows, rows, plan), left, right, scores)
    return scores


@settings(max_examples=40)
@given(layout=layouts, link=st.sampled_from(LINKS), seed=seeds)
def test_reference_and_cpu_agree_with_the_oracle(layout, link, seed):
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, layout, link)
    rows = random_table(rng, 6, plan)
    left, right = all_pairs(6)
    plain = entities(rows, plan)
    couples = [(plain[i], plain[j]) for i, j in zip(left, right, strict=True)]
    raws = [naive.raw_score(*couple, plan.constant) for couple in couples]
    sizes = [naive.magnitude(*couple, plan.constant) for couple in couples]
    expected = [
        naive.score(*couple, plan.constant, link, plan.slope, plan.offset) for couple in couples
    ]
    bound = 1e-5 * np.array(sizes)
    if link in ("negative_root", "negative_arcosh"):
        # |sqrt(a) - sqrt(b)| <= |a - b| / sqrt(a), and <= sqrt(|a - b|); the other: at most twice
        root = np.sqrt(np.maximum(-np.array(raws), 1e-30))
        bound = 2 * np.minimum(bound / root, np.sqrt(bound)) + 1e-6 * (root + 1)
    elif link == "exponential":  # its slope is at most 1
        bound += 1e-6
    np.testing.assert_allclose(
        reference.score_pairs(rows, rows, left, right, plan), expected, rtol=1e-11, atol=1e-11
    )
    np.testing.assert_allclose(
        reference.score_matrix(rows, rows, plan).ravel(), expected, 1e-9, 1e-9
    )
    np.testing.assert_allclose(reference.magnitudes(rows, rows, left, right, plan), sizes)
    assert (np.abs(scores_of(rows, plan, left, right) - expected) <= bound).all()


@settings(max_examples=40)
@given(layout=layouts, seed=seeds)
def test_swapped_pairs_have_the_same_bits(layout, seed):
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, layout)
    rows = random_table(rng, 9, plan)
    left, right = all_pairs(9)
    assert (
        scores_of(rows, plan, left, right).tobytes() == scores_of(rows, plan, right, left).tobytes()
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_entity_has_no_distance_to_itself(precision):
    layout = RowLayout(((0, 0), (0, 0), (0, 0), (21, 7), (5, 40)), False, precision)
    plan = Plan(layout, segment_scales=(0.01,) * 5)
    rows = random_table(np.random.default_rng(0), 20, plan)
    own = np.arange(20)
    assert (scores_of(rows, plan, own, own) == 0).all()


@settings(max_examples=25)
@given(
    layout=layouts,
    seed=seeds,
    cuts=st.lists(st.integers(0, 300), max_size=6),
    threads=st.integers(1, 4),
)
def test_bits_do_not_depend_on_blocks_order_or_threads(layout, seed, cuts, threads):
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, layout)
    rows = random_table(rng, 30, plan)
    left, right = rng.integers(0, 30, 300), rng.integers(0, 30, 300)
    whole = scores_of(rows, plan, left, right)
    pieces = np.split(np.arange(300), sorted(cuts))
    parts = [scores_of(rows, plan, left[part], right[part]) for part in pieces]
    assert np.concatenate(parts).tobytes() == whole.tobytes()
    order = rng.permutation(300)
    assert scores_of(rows, plan, left[order], right[order]).tobytes() == whole[order].tobytes()
    assert PairScorer(rows, plan, threads=threads)(left, right).tobytes() == whole.tobytes()
    narrow = scores_of(rows, plan, left.astype(np.int32), right.astype(np.int32))
    assert narrow.tobytes() == whole.tobytes()


# --- the bits, once more from the contract, in exact arithmetic ---


def rounded(value):
    """The float32 nearest to an exact number, ties to even, as an exact number."""
    nearest = np.float32(float(value))  # may be off by one: double rounding
    candidates = [np.nextafter(nearest, np.float32(s)) for s in (-np.inf, np.inf)] + [nearest]
    return min(
        (Fraction(float(c)) for c in candidates),
        key=lambda c: (abs(c - value), int(np.float32(float(c)).view(np.uint32)) & 1),
    )


def contract_sum(segments, runs, left, right):
    """The sum of the lanes as kernels/__init__.py words it; columns are exact numbers."""
    lanes = [Fraction(0)] * 16
    for name, sign, columns in runs:
        x, y = left[name][columns], right[name][columns]
        half = len(x) // 2
        for k in range(half if name == "mirrored" else len(x)):
            lane = k % 16
            if name == "product":
                lanes[lane] = rounded(sign * x[k] * y[k] + lanes[lane])
            elif name == "squared":
                apart = rounded(x[k] - y[k])
                lanes[lane] = rounded(sign * apart * apart + lanes[lane])
            elif name == "maximum":
                lanes[lane] = rounded(lanes[lane] + sign * max(x[k], y[k]))
            elif name == "absolute":
                lanes[lane] = rounded(lanes[lane] + sign * abs(rounded(x[k] - y[k])))
            else:
                both = rounded(max(x[k], y[half + k]) + max(x[half + k], y[k]))
                lanes[lane] = rounded(lanes[lane] + sign * both)
    for width in (8, 4, 2, 1):
        lanes = [rounded(lanes[q] + lanes[q + width]) for q in range(width)]
    return lanes[0]


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", [some_layout, lambda p: products_only(300, 37, p)])
def test_the_bits_are_those_of_the_contract(layout, precision):
    rng = np.random.default_rng(7)
    plan = random_plan(rng, layout(precision))
    rows = random_table(rng, 4, plan)
    unpacked = reference.unpack_rows(rows, plan)
    exact = [
        {name: [Fraction(x) for x in np.atleast_1d(values[i])] for name, values in unpacked.items()}
        for i in range(4)
    ]
    runs = list(reference.signed_runs(plan))
    left, right = all_pairs(4)
    for i, j, score in zip(left, right, scores_of(rows, plan, left, right), strict=True):
        bias = rounded(exact[i]["bias"][0] + exact[j]["bias"][0])
        start = rounded(Fraction(plan.constant) + bias)
        total = contract_sum(SEGMENTS, runs, exact[i], exact[j])
        assert float(rounded(start + total)) == float(score)


@pytest.mark.parametrize("layout", [some_layout, lambda p: products_only(300, 37, p)])
def test_the_bits_of_int8_are_those_of_the_contract(layout):
    rng = np.random.default_rng(8)
    plan = random_plan(rng, layout("int8"))
    rows = random_table(rng, 4, plan)
    records = rows.view(plan.layout.dtype)[:, 0]
    left, right = all_pairs(4)
    f4 = np.float32
    for i, j, score in zip(left, right, scores_of(rows, plan, left, right), strict=True):
        value = f4(0)
        for number, name in enumerate(SEGMENTS):
            whole = 0
            for segment, sign, columns in reference.signed_runs(plan):
                if segment == name:
                    x, y = (records[r][name][columns].astype(np.int64) for r in (i, j))
                    whole += sign * int(reference.terms(name, x, y).sum())
            scale = f4(plan.segment_scales[number])
            if name == "product":
                scale = records[i]["scale"] * records[j]["scale"]
            elif name == "squared":
                scale = scale * scale
            value = value + f4(whole) * scale
        start = f4(plan.constant) + (records[i]["bias"] + records[j]["bias"])
        assert start + value == score


# --- the paths of the pair kernel ---


@settings(max_examples=60)
@given(
    plus=st.integers(1, 330),
    minus=st.integers(0, 150),
    bias=st.booleans(),
    precision=st.sampled_from(sorted(PRECISIONS)),
    link=st.sampled_from(LINKS),
    seed=seeds,
)
def test_rows_of_products_have_the_bits_of_the_general_loops(
    plus, minus, bias, precision, link, seed
):
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, products_only(plus, minus, precision, bias), link)
    rows = random_table(rng, 8, plan)
    left, right = all_pairs(8)
    table = cpu.table_arguments(rows, rows, plan)
    raw = np.array(
        [pairs.exact_raw(table, i, j) for i, j in zip(left, right, strict=True)], np.float32
    )
    scores = scores_of(rows, plan, left, right)
    assert cpu.link_scores(raw, table).tobytes() == scores.tobytes()
    assert scores_of(rows, plan, right, left).tobytes() == scores.tobytes()
    expected = reference.score_pairs(rows, rows, left, right, plan)
    if link == "identity":
        size = reference.magnitudes(rows, rows, left, right, plan)
        assert (np.abs(scores - expected) <= 1e-5 * size).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("columns", [64, 128, 304])
def test_biases_and_scales_that_lie_apart_change_nothing(precision, columns):
    rng = np.random.default_rng(columns)
    plan = random_plan(rng, products_only(columns, 0, precision))
    rows = random_table(rng, 30, plan)
    left, right = all_pairs(30)
    apart = cpu.separate_fields(rows, plan)
    end = columns * plan.layout.itemsize
    assert (apart is None) == (end % 64 != 0)
    if apart is None:
        return
    assert apart.tobytes() == rows[:, end : end + 4 * apart.shape[1]].tobytes()
    scores = np.empty(len(left), np.float32)
    table = cpu.table_arguments(rows, rows, plan, (apart, apart))
    assert cpu.score_pairs(table, left, right, scores) == -1
    assert scores.tobytes() == scores_of(rows, plan, left, right).tobytes()
    assert scores.tobytes() == PairScorer(rows, plan)(left, right).tobytes()


def test_int8_sums_are_exact_to_the_last_number():
    columns = 16_384
    plan = Plan(products_only(columns, 0, "int8", bias=False))
    rows = random_table(np.random.default_rng(0), 3, plan)
    records = rows.view(plan.layout.dtype)[:, 0]
    records["scale"] = 1
    for row, value in enumerate((-128, 127, -127)):
        records["product"][row] = value
    left, right = all_pairs(3)
    values = np.array([-128.0, 127.0, -127.0])
    assert (scores_of(rows, plan, left, right) == columns * values[left] * values[right]).all()


@pytest.mark.parametrize("kind", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i4", ">i8"])
def test_row_numbers_of_every_kind_score_alike(kind):
    rng = np.random.default_rng(1)
    plan = random_plan(rng, some_layout())
    rows = random_table(rng, 100, plan)
    left, right = rng.integers(0, 100, (2, 777))
    whole = scores_of(rows, plan, left, right)
    pair_list = np.stack([left, right], axis=1).astype(kind)
    pair_list.flags.writeable = False
    assert scores_of(rows, plan, *pair_list.T).tobytes() == whole.tobytes()
    assert scores_of(rows, plan, pair_list[:, 0], right).tobytes() == whole.tobytes()
    assert PairScorer(rows, plan)(*pair_list.T).tobytes() == whole.tobytes()


@settings(max_examples=50)
@given(
    count=st.integers(1, 40),
    place=st.integers(0, 39),
    bad=st.sampled_from([-1, 20, 2**31, -(2**31), 2**32, 2**63 - 1, 2**63]),
    swap=st.booleans(),
)
def test_the_kernel_stops_at_a_row_out_of_range(count, place, bad, swap):
    plan = Plan(some_layout())
    rows = random_table(np.random.default_rng(0), 20, plan)
    place = min(place, count - 1)
    good = np.arange(count) % 20
    numbers = good.astype(np.uint64 if bad == 2**63 else np.int64)
    numbers[place] = bad
    left, right = (good, numbers) if swap else (numbers, good)
    scores = np.empty(count, np.float32)
    assert cpu.score_pairs(cpu.table_arguments(rows, rows, plan), left, right, scores) == place
    with pytest.raises(DataError, match=f"pair {place} has the .* row number {bad}, expected"):
        PairScorer(rows, plan)(left, right)


_BITS_SCRIPT = """
import hashlib, json
import numpy as np
from fastpair.kernels import PRECISIONS, tile
from fastpair.matrix import AllPairs
from fastpair.scoring import PairScorer
from tables import products_only, random_plan, random_table, some_layout
digests = {}
for precision in PRECISIONS:
    rng = np.random.default_rng(5)
    left, right = rng.integers(0, 60, 500), rng.integers(0, 60, 500)
    for layout in (some_layout(precision), products_only(211, 99, precision)):
        plan = random_plan(rng, layout)
        rows = random_table(rng, 60, plan)
        scores = PairScorer(rows, plan)(left, right)
        digests[str(layout)] = hashlib.sha256(scores.tobytes()).hexdigest()
    plan = random_plan(rng, some_layout(precision))
    rows = random_table(rng, 60, plan)
    (_, dense), = AllPairs(rows, None, plan).dense()
    digests[precision + " tiles"] = hashlib.sha256(dense.tobytes()).hexdigest()
print(json.dumps({"tile": tile.TILE_COLUMNS, "digests": digests}))
"""


def _bits(**environment):
    here = os.path.dirname(__file__)
    env = {**os.environ, **environment, "PYTHONPATH": here}
    done = subprocess.run(
        [sys.executable, "-c", _BITS_SCRIPT], env=env, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_a_smaller_cpu_gives_the_same_bits():
    here = _bits()
    smaller = _bits(NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="")
    assert smaller["tile"] == 16
    assert smaller["digests"] == here["digests"]


# --- links ---


@given(
    raw=st.floats(-200, 1, width=32),
    link=st.sampled_from(LINKS),
    slope=st.floats(0.01, 100),
    offset=st.floats(-10, 10),
)
def test_a_floor_is_not_above_what_scores_as_much(raw, link, slope, offset):
    plan = Plan(some_layout(), 0.0, link, slope, offset)
    rows = random_table(np.random.default_rng(0), 1, plan)
    score = cpu.link_scores(np.array([raw], np.float32), cpu.table_arguments(rows, rows, plan))[0]
    assert plan.raw_floor(float(score)) <= min(raw, 0 if link != "identity" else raw)
    assert plan.raw_floor(float(score)) >= -np.inf
    assert plan.raw_floor(slope * 1e3 + offset) >= plan.raw_floor(float(score))


@pytest.mark.parametrize("link", LINKS)
def test_links_rise(link):
    plan = Plan(some_layout(), 0.0, link, 1.0, 0.0)
    rows = random_table(np.random.default_rng(0), 1, plan)
    raw = np.sort(-(np.random.default_rng(1).exponential(size=1000) ** 4)).astype(np.float32)
    scores = cpu.link_scores(raw, cpu.table_arguments(rows, rows, plan))
    assert (np.diff(scores) >= 0).all()
    np.testing.assert_allclose(scores, reference.finish(raw.astype(float), plan), 3e-7, 1e-44)


# --- two tables ---


def test_two_int8_tables_meet_at_the_larger_scale():
    layout = RowLayout(((0, 0), (0, 0), (0, 0), (20, 0), (0, 0)), False, "int8")
    rng = np.random.default_rng(3)
    fine, coarse = (Plan(layout, segment_scales=(1.0, 1.0, 1.0, s, 1.0)) for s in (0.01, 0.02))
    left, right = random_table(rng, 10, fine), random_table(rng, 10, coarse)
    new_left, new_right, plan = meet(left, fine, right, coarse)
    assert plan == coarse
    assert new_right.tobytes() == right.tobytes()
    before = reference.unpack_rows(left, fine)["absolute"]
    after = reference.unpack_rows(new_left, plan)["absolute"]
    assert np.abs(after - before).max() <= 0.01 + 1e-9
    assert common_scales(left, fine, fine.segment_scales).tobytes() == left.tobytes()


def test_every_true_column_has_its_place():
    layout = some_layout()
    for number, name in enumerate(SEGMENTS):
        places = np.concatenate(list(run_places(layout, number)))
        assert len(set(places)) == sum(layout.columns[number]) * (2 if name == "mirrored" else 1)
        assert places.max() < layout.segment_lengths[name]
