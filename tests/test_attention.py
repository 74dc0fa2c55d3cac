"""Soft lookup: a softmax over all keys, or some, however tiles, threads and memory cut the work."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import products_only, random_plan, random_table, some_layout

import fastpair
from fastpair import attention
from fastpair.attention import SoftLookup
from fastpair.errors import (
    ArgumentError,
    DataError,
    FastpairError,
    MemoryBudgetError,
    MismatchError,
)
from fastpair.folding import fold
from fastpair.id_tables import IdTable, IdTables
from fastpair.kernels import LINKS, Plan, RowLayout
from fastpair.kernels.attention import KEYS, soften
from fastpair.kernels.simd import address, jit
from fastpair.kernels.tile import TILE_COLUMNS, TILE_ROWS
from fastpair.model import Branch, Model, builtin
from fastpair.scoring import PairScorer
from fastpair.towers import Linear

SMALL = 64 * 2**20


def softmax_means(scores, values, temperature, kept=None):
    """The oracle, in float64; NaN where nothing is kept."""
    scores = np.array(scores, np.float64)
    kept = np.full(scores.shape, True) if kept is None else kept
    means = np.full((len(scores), values.shape[1]), np.nan)
    for row, own in enumerate(scores):
        if kept[row].any():
            logits = own[kept[row]] / temperature
            weights = np.exp(logits - logits.max())
            means[row] = weights @ values[kept[row]].astype(np.float64) / weights.sum()
    return means


def pair_scores(left, right, plan):
    rows, columns = np.indices((len(left), len(right))).reshape(2, -1)
    return PairScorer(left, plan, right, plan)(rows, columns).reshape(len(left), len(right))


def collect(soft, **options):
    parts = list(soft(**options))
    starts = np.cumsum([0] + [len(found) for _, found in parts])
    assert [first for first, _ in parts] == starts[:-1].tolist()
    return np.concatenate([found for _, found in parts])


def assert_close(found, expected, values, tolerance=1e-5):
    scale = np.abs(values).max(initial=1e-30)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


@settings(max_examples=25)
@given(
    link=st.sampled_from(LINKS),
    precision=st.sampled_from(["float32", "int8"]),
    seed=st.integers(0, 2**32 - 1),
    sizes=st.tuples(st.integers(1, 60), st.integers(1, 600)),
    columns=st.integers(1, 20),
    threads=st.integers(1, 3),
)
def test_outputs_are_softmax_means_of_the_scores(link, precision, seed, sizes, columns, threads):
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, some_layout(precision), link)
    queries, keys = (random_table(rng, count, plan, 0.3) for count in sizes)
    values = rng.normal(size=(len(keys), columns)).astype(np.float32)
    found = collect(SoftLookup(queries, keys, plan, values, temperature=2, threads=threads))
    scores = pair_scores(queries, keys, plan)
    assert_close(found, softmax_means(scores, values, 2), values)


def test_a_root_near_its_end_is_that_of_the_pair_kernel():
    vectors = np.random.default_rng(1).normal(size=(50, 40)) + 3
    rows, plan = fold(builtin("euclidean"), vectors)
    values = np.eye(50, dtype=np.float32)
    found = collect(SoftLookup(rows, None, plan, values, temperature=0.5))
    apart = np.sqrt(((vectors[:, None] - vectors) ** 2).sum(-1))
    assert_close(found, softmax_means(-apart, values, 0.5), values, 2e-5)


@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"threshold": 0.1}])
def test_in_one_table_a_query_is_its_own_key_unless_it_is_left_out(itself, options):
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(300, 12)).astype(np.float32)
    rows, plan = fold(builtin("cosine"), vectors)
    values = rng.normal(size=(300, 9)).astype(np.float32)
    soft = SoftLookup(rows, None, plan, values, temperature=0.2, itself=itself)
    scores = pair_scores(rows, rows, plan)
    kept = np.full(scores.shape, True)
    if not itself:
        np.fill_diagonal(kept, False)
    if "threshold" in options:
        kept &= scores >= 0.1
    if "top_k" in options:
        ranked = np.argsort(np.where(kept, -scores, np.inf), axis=1, kind="stable")
        best = np.zeros_like(kept)
        np.put_along_axis(best, ranked[:, :7], True, axis=1)
        kept &= best
    assert_close(collect(soft, **options), softmax_means(scores, values, 0.2, kept), values)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), link=st.sampled_from(LINKS))
def test_bits_do_not_depend_on_threads_tasks_memory_or_other_queries(seed, link):
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, some_layout(), link)
    queries = random_table(rng, 3 * TILE_COLUMNS + 5, plan, 0.3)
    keys = random_table(rng, 4 * KEYS + 7, plan, 0.3)
    values = rng.normal(size=(len(keys), 7)).astype(np.float32)
    with patch.multiple(attention, _SPAN_BYTES=1):
        whole = collect(SoftLookup(queries, keys, plan, values, threads=1))
        assert_close(whole, softmax_means(pair_scores(queries, keys, plan), values, 1), values)
        with patch.multiple(attention, _QUERIES_A_TASK=1):
            cut = SoftLookup(queries, keys, plan, values, threads=3)
            assert collect(cut).tobytes() == whole.tobytes()
            cut.memory = 2**20  # several chunks of keys
            walk = attention._Walk(cut)
            assert len(walk.chunks) > 1
            assert collect(cut).tobytes() == whole.tobytes()
        order = rng.permutation(len(queries))
        turned = collect(SoftLookup(queries[order[:40]].copy(), keys, plan, values))
        assert turned.tobytes() == whole[order[:40]].tobytes()


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"threshold": 0.3}])
@pytest.mark.parametrize("itself", [True, False])
def test_outputs_from_a_query_on_are_those_of_a_whole_run(options, itself):
    rng = np.random.default_rng(11)
    rows, plan = fold(builtin("cosine"), rng.normal(size=(150, 6)))
    values = rng.normal(size=(150, 3)).astype(np.float32)
    soft = SoftLookup(rows, None, plan, values, itself=itself, memory=SMALL, threads=2)
    whole = collect(soft, **options)
    for start in (1, 77, 150):
        parts = list(soft(**options, start=start))
        found = np.concatenate([whole[:0], *(part for _, part in parts)])
        assert found.tobytes() == whole[start:].tobytes()
        assert start == 150 or parts[0][0] == start
    with patch.multiple(attention, _PAIRS_A_GROUP=1):
        assert len(list(soft(**options))) > 1 or options
        assert collect(soft, **options).tobytes() == whole.tobytes()


def test_keys_in_another_order_change_nothing_but_rounding():
    rng = np.random.default_rng(3)
    queries, keys = rng.normal(size=(2, 900, 16))
    values = rng.normal(size=(900, 5)).astype(np.float32)
    order = rng.permutation(900)
    one = fastpair.lookup(queries, keys, values, head="dot")
    other = fastpair.lookup(queries, keys[order], values[order], head="dot")
    assert_close(one, other, values, 1e-6)
    assert one.tobytes() != other.tobytes()  # else the test above could not fail


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e15, 2e17])
@pytest.mark.parametrize("temperature", [1e-30, 1.0, 1e30])
def test_extreme_scores_and_temperatures_give_means_and_no_nan(size, temperature):
    rng = np.random.default_rng(4)
    queries, keys = rng.normal(size=(2, 300, 8)) * size
    values = rng.normal(size=(300, 3)).astype(np.float32)
    rows, plan = fold(builtin("dot"), queries)
    others, _ = fold(builtin("dot"), keys)
    found = collect(SoftLookup(rows, others, plan, values, temperature=temperature))
    assert np.isfinite(found).all()
    assert (found >= values.min(0) - 1e-5).all()
    assert (found <= values.max(0) + 1e-5).all()
    scores = pair_scores(rows, others, plan).astype(np.float64)
    gap = np.sort(scores, axis=1)
    clear = (gap[:, -1] - gap[:, -2]) / temperature > 100
    assert_close(found[clear], values[scores[clear].argmax(1)], values)
    if size in (0.0, 1e-30) and temperature == 1:
        assert_close(found, np.broadcast_to(values.mean(0, dtype=float), found.shape), values)


def test_one_key_that_dominates_is_all_there_is():
    keys = np.zeros((500, 4))
    keys[321] = 1e4
    values = np.random.default_rng(5).normal(size=(500, 6)).astype(np.float32)
    found = fastpair.lookup(np.ones((40, 4)), keys, values, head="dot")
    assert (found == values[321]).all()


def test_values_near_the_end_of_float32_do_not_overflow():
    values = np.full((1000, 2), 3e38, np.float32)
    values[:, 1] *= -1
    found = fastpair.lookup(np.ones((5, 3)), np.ones((1000, 3)), values)
    np.testing.assert_allclose(found, values[:5], rtol=1e-5)


@pytest.mark.parametrize("options", [{"top_k": 3}, {"threshold": 0.5}, {}])
def test_a_query_without_a_key_is_nan(options):
    vectors = np.eye(4)
    values = np.ones((4, 2), np.float32)
    rows, plan = fold(builtin("cosine"), vectors[:1])
    found = collect(SoftLookup(rows, None, plan, values[:1], itself=False), **options)
    assert np.isnan(found).all()
    above = fastpair.lookup(vectors, vectors[:3], values[:3], threshold=0.5)
    assert np.isnan(above).all(axis=1).tolist() == [False, False, False, True]


def test_a_network_scores_every_key_too():
    from fastpair.kernels import Network

    rng = np.random.default_rng(6)
    layer = rng.normal(size=(5, 24)), rng.normal(size=5)
    network = Network("features", (layer,), rng.normal(size=5))
    plan = Plan(RowLayout(((8, 0),) + ((0, 0),) * 4), 0.5, network=network)
    rows = random_table(rng, 50, plan)
    values = rng.normal(size=(50, 3)).astype(np.float32)
    scores, kept = pair_scores(rows, rows, plan), ~np.eye(50, dtype=bool)
    found = collect(SoftLookup(rows, None, plan, values, temperature=5, itself=False))
    assert_close(found, softmax_means(scores, values, 5, kept), values)


@jit
def _powers(x, sums):
    nothing = np.zeros(TILE_COLUMNS, np.float32)
    soften(address(x), x.size // TILE_COLUMNS, address(nothing), np.float32(1), address(sums))


def test_powers_of_two_are_within_one_unit_in_the_last_place():
    x = -np.linspace(0, 126, 48 * 40_000, dtype=np.float32)
    found = x.copy()
    _powers(found, np.zeros(TILE_COLUMNS, np.float32))
    exact = np.exp2(x.astype(np.float64))
    units = np.abs(found - exact) / np.spacing(exact.astype(np.float32))
    assert units.max() < 1
    assert found[0] == 1
    ends = np.full(48, -np.inf, np.float32)
    ends[:3] = -3e38, -127, np.nan
    _powers(ends, np.zeros(TILE_COLUMNS, np.float32))
    assert not ends.any()


def test_the_memory_bounds_keys_and_queries_under_way():
    plan = random_plan(np.random.default_rng(7), products_only(64, bias=False))
    rows = random_table(np.random.default_rng(7), 70_000, plan)
    soft = SoftLookup(rows, None, plan, np.ones((70_000, 64), np.float32), memory=SMALL, threads=2)
    walk = attention._Walk(soft)
    assert len(walk.chunks) > 1
    first, last = next(walk.groups())
    panels, values = walk.key_side(0)
    assert panels.words.nbytes + values.nbytes <= SMALL // 2
    assert sum(part.nbytes for part in walk.empty_state(last - first)) <= SMALL // 4
    assert (walk.chunk // KEYS) % walk.span == 0
    assert KEYS % TILE_ROWS == 0


def test_too_little_memory_is_said_in_one_sentence():
    plan = random_plan(np.random.default_rng(8), products_only(16, bias=False))
    rows = random_table(np.random.default_rng(8), 2000, plan)
    soft = SoftLookup(rows, None, plan, np.ones((2000, 100_000), np.float32), memory=SMALL)
    with pytest.raises(MemoryBudgetError, match="allow more memory"):
        next(soft())


def test_models_and_tables_give_the_same(tmp_path):
    from fastpair.files import read_table
    from fastpair.ingest import open_embeddings  # noqa: F401  reading needs nothing else
    from fastpair.jobs import project

    rng = np.random.default_rng(9)
    vectors = rng.normal(size=(2, 60, 5))
    values = rng.normal(size=(60, 4)).astype(np.float32)
    tables = []
    for name, part in zip(("q", "k"), vectors, strict=True):
        np.save(tmp_path / f"{name}.npy", part)
        project("euclidean", tmp_path / f"{name}.npy", tmp_path / f"{name}.h5")
        tables.append(read_table(tmp_path / f"{name}.h5"))
    from_tables = fastpair.lookup(*tables, values, 0.7)
    direct = fastpair.lookup(*vectors, values, 0.7, head=builtin("euclidean"))
    assert from_tables.tobytes() == direct.tobytes()
    assert fastpair.lookup(tables[0], None, values).shape == (60, 4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": -1}, "temperature is -1"),
        ({"values": np.ones((4, 2))}, "4 values for 5 keys"),
        ({"values": np.ones(5)}, "values are float64 of shape"),
        ({"values": np.full((5, 2), np.inf)}, "values hold NaN"),
        ({"values": np.full((5, 2), "x")}, "expected numbers"),
        ({"top_k": 2, "threshold": 0.5}, "choose one"),
        ({"top_k": 0}, "k is 0"),
        ({"itself": False}, "itself is for one table"),
        ({"head": "nothing.h5"}, "nothing.h5"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(changes, words):
    arguments = {"queries": np.eye(5), "keys": np.eye(5), "values": np.ones((5, 2)), **changes}
    with pytest.raises(FastpairError, match=words):
        fastpair.lookup(**arguments)


def test_tables_of_two_models_do_not_meet(tmp_path):
    from fastpair.files import read_table
    from fastpair.jobs import project

    np.save(tmp_path / "v.npy", np.eye(5))
    for name in ("cosine", "dot"):
        project(name, tmp_path / "v.npy", tmp_path / f"{name}.h5")
    one, other = (read_table(tmp_path / f"{name}.h5") for name in ("cosine", "dot"))
    with pytest.raises(MismatchError, match="two models"):
        fastpair.lookup(one, other, np.ones((5, 1)))
    with pytest.raises(ArgumentError, match="both in one form"):
        fastpair.lookup(one, np.eye(5), np.ones((5, 1)))


def asymmetric_model():
    rng = np.random.default_rng(5)
    towers = [Linear(rng.normal(size=(3, 5))) for _ in range(2)]
    return Model([Branch("product", {"weight": rng.normal(size=3)}, *towers)], 5)


def test_tables_of_an_asymmetric_model_are_queries_left_and_keys_right():
    model, vectors, values = (
        asymmetric_model(),
        np.random.default_rng(6).normal(size=(9, 5)),
        np.eye(9),
    )
    left, right = (fastpair.fold(vectors, model, side=side) for side in ("left", "right"))
    both = fastpair.lookup(left, right, values)
    assert both.tobytes() == fastpair.lookup(vectors, vectors, values, head=model).tobytes()
    with pytest.raises(ArgumentError, match="give queries and keys apart"):
        fastpair.lookup(vectors, None, values, head=model)
    with pytest.raises(ArgumentError, match="the table holds left entities: give the others too"):
        fastpair.lookup(left, None, values)
    for one, other in ((right, left), (left, left)):
        with pytest.raises(MismatchError, match="entities, expected left and right"):
            fastpair.lookup(one, other, values)


def test_rows_that_are_not_finite_are_no_keys_and_no_queries():
    table = fastpair.fold(np.eye(5))
    spoiled = replace(table, isolated=np.arange(5) == 2)
    for queries, keys, name in ((spoiled, None, "queries"), (table, spoiled, "keys")):
        with pytest.raises(DataError, match=f"{name} are a table with rows .* not finite"):
            fastpair.lookup(queries, keys, np.eye(5))


def test_a_lookup_ignores_no_model_that_is_given():
    with pytest.raises(ArgumentError, match="head is given but queries are a table"):
        fastpair.lookup(fastpair.fold(np.eye(5)), None, np.eye(5), head="dot")
    tables = IdTables(IdTable(pa.array(list("abc")), np.eye(3)))
    model = Model([Branch("product", {"weight": np.ones(3)})], 3, tables=tables)
    with pytest.raises(ArgumentError, match="learned ids and has tables of its own"):
        fastpair.lookup(np.eye(3), None, np.eye(3), head=model)


OTHER_SHAPE = """
import numpy as np
import llvmlite.binding as llvm
import fastpair.kernels.simd as simd

features, llvm.get_default_triple = {features!r}, lambda: {triple!r}
simd.cpu_features = lambda: features
import fastpair
from fastpair.kernels import tile

assert (tile.TILE_ROWS, tile.TILE_COLUMNS) == {shape}
found = fastpair.lookup(*np.load("inputs.npy"), temperature=0.5, head="euclidean")
np.save("found.npy", found)
"""
"""What a CPU with other registers computes; LLVM makes do with those of this one."""


def test_a_tile_of_another_shape_gives_the_same_bits(tmp_path):
    inputs = np.random.default_rng(10).normal(size=(3, 500, 10)).astype(np.float32)
    np.save(tmp_path / "inputs.npy", inputs)
    wide = TILE_COLUMNS == 48
    script = OTHER_SHAPE.format(
        features="" if wide else "+avx512f",
        triple="aarch64-linux" if wide else "x86_64-linux",
        shape=(8, 12) if wide else (8, 48),
    )
    own = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "NUMBA_CACHE_DIR": ""}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=own, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    here = fastpair.lookup(*inputs, temperature=0.5, head="euclidean")
    assert np.load(tmp_path / "found.npy").tobytes() == here.tobytes()
