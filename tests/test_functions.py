"""The functions on arrays: what the command line computes, without files."""

import inspect
import subprocess
import sys
from importlib.resources import files

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from simulated_gpu import SimulatedRuntime
from test_folding import random_model
from test_frames import FakeCupy
from test_gpu_scoring import OnDevice

import fastpair
from fastpair import functions, jobs
from fastpair.device import Choice
from fastpair.errors import (
    ArgumentError,
    DataError,
    DeviceError,
    FastpairError,
    FileError,
    MismatchError,
)
from fastpair.files import read_table, write_model
from fastpair.kernels import reference
from fastpair.model import BUILTINS, Branch, Model
from fastpair.towers import Linear

COUNT, COLUMNS = 60, 12


def some_model(seed=0, heads=("cosine", "absdiff"), **fields):
    from dataclasses import replace

    model = random_model(np.random.default_rng(seed), list(heads))
    return replace(model, **{"unit": "log-odds", "threshold": 0.1, **fields})


def asymmetric_model():
    rng = np.random.default_rng(5)
    towers = [Linear(rng.normal(size=(7, COLUMNS))) for _ in range(2)]
    branch = Branch("product", {"weight": rng.normal(size=7)}, *towers)
    return Model([branch], COLUMNS, unit="log-odds", threshold=0.0)


@pytest.fixture(scope="module")
def X():
    return np.random.default_rng(1).normal(size=(COUNT, COLUMNS))


@pytest.fixture(scope="module")
def pairs():
    return np.random.default_rng(2).integers(0, COUNT, (500, 2))


@pytest.fixture
def on_a_simulated_gpu(monkeypatch):
    """Whatever device is asked for, a simulated one is there."""
    asked = []

    def pick(device, **_):
        asked.append(device)
        return Choice() if device == "cpu" else Choice((SimulatedRuntime(),))

    monkeypatch.setattr(functions, "pick", pick)
    return asked


# --- what comes out -------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16", "int8"])
def test_pairs_score_what_the_formula_says(X, pairs, precision):
    model = some_model()
    scores = fastpair.score_pairs(X, pairs, model=model, precision=precision)
    table = fastpair.fold(X, model, precision=precision)
    left, right = pairs.T
    exact = reference.score_pairs(table.rows, table.rows, left, right, table.plan)
    np.testing.assert_allclose(scores, exact, rtol=1e-4, atol=1e-4)
    assert (scores.dtype, scores.shape) == (np.float32, (500,))
    assert scores.tobytes() == fastpair.score_pairs(table, pairs).tobytes()
    if precision == "float32":
        np.testing.assert_allclose(scores, model.score(X[left], X[right]), rtol=1e-3, atol=1e-4)


def test_the_same_bits_swapped_in_blocks_in_threads_and_side_by_side(X, pairs, monkeypatch):
    model = some_model()
    scores = fastpair.score_pairs(X, pairs, model=model).tobytes()
    assert fastpair.score_pairs(X, pairs[:, ::-1], model=model, threads=2).tobytes() == scores
    assert fastpair.score_pairs(X, (pairs[:, 0], pairs[:, 1]), model=model).tobytes() == scores
    left, right = X[pairs[:, 0]], X[pairs[:, 1]]
    assert fastpair.score_pairs(left, against=right, model=model).tobytes() == scores
    assert fastpair.score_pairs(X, pairs, against=X, model=model).tobytes() == scores
    monkeypatch.setattr(functions, "PAIRS_AT_ONCE", 33)
    assert fastpair.score_pairs(X, pairs, model=model).tobytes() == scores


@pytest.mark.parametrize("kind", ["u1", "i2", "u4", "u8", ">i4", ">i8", "i4"])
def test_row_numbers_may_be_integers_of_any_type(X, pairs, kind):
    expected = fastpair.score_pairs(X, pairs).tobytes()
    assert fastpair.score_pairs(X, pairs.astype(kind)).tobytes() == expected
    assert fastpair.score_pairs(X, np.asfortranarray(pairs.astype(kind))).tobytes() == expected


def test_without_a_model_it_is_cosine(X, pairs):
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    expected = (unit[pairs[:, 0]] * unit[pairs[:, 1]]).sum(axis=1)
    np.testing.assert_allclose(fastpair.score_pairs(X, pairs), expected, atol=1e-6)
    np.testing.assert_allclose(fastpair.pairwise(X), unit @ unit.T, atol=1e-5)


@settings(max_examples=25)
@given(
    k=st.integers(1, 70),
    seed=st.integers(0, 5),
    two=st.booleans(),
    heads=st.sampled_from([("cosine", "absdiff"), ("max",), ("mlp",), ("rbf",)]),
)
def test_the_best_are_those_of_all_pairs(k, seed, two, heads):
    rng = np.random.default_rng(seed)
    X, Y = rng.normal(size=(40, COLUMNS)), rng.normal(size=(33, COLUMNS))
    model = some_model(seed, heads)
    against = Y if two else None
    other = Y if two else X
    rows = np.arange(len(X))
    every = np.stack(np.meshgrid(rows, np.arange(len(other)), indexing="ij"), -1).reshape(-1, 2)
    exact = fastpair.score_pairs(X, every, against=against, model=model).reshape(len(X), -1)
    if not two:
        exact[rows, rows] = -np.inf
    indices, scores = fastpair.top_k(X, k, against, model=model)
    there = min(k, len(other) - (not two))
    order = np.argsort(-exact, axis=1, kind="stable")[:, :there]
    np.testing.assert_array_equal(indices[:, :there], order)
    np.testing.assert_array_equal(scores[:, :there], np.take_along_axis(exact, order, axis=1))
    assert (indices[:, there:] == -1).all()
    assert np.isnan(scores[:, there:]).all()
    matrix = fastpair.top_k(X, k, against, model=model, sparse=True)
    assert isinstance(matrix, csr_array)
    assert matrix.shape == exact.shape
    assert matrix.has_sorted_indices
    np.testing.assert_array_equal(np.diff(matrix.indptr), there)
    held = np.full(exact.shape, -np.inf, np.float32)
    held[np.repeat(rows, there), matrix.indices] = matrix.data
    np.testing.assert_array_equal(np.sort(held, axis=1)[:, ::-1][:, :there], scores[:, :there])
    threshold = float(np.median(exact))
    above = fastpair.above_threshold(X, threshold, against, model=model)
    assert above.shape == exact.shape
    found = np.zeros(exact.shape, bool)
    found[np.repeat(rows, np.diff(above.indptr)), above.indices] = True
    np.testing.assert_array_equal(found, exact >= threshold)
    np.testing.assert_array_equal(above.data, exact[found])
    dense = fastpair.pairwise(X, against, model=model)
    finite = np.isfinite(exact)
    np.testing.assert_allclose(dense[finite], exact[finite], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("unit", ["probability", "decision", "distance"])
def test_units_are_those_of_the_command_line(X, pairs, unit, tmp_path):
    model = some_model()
    if unit == "distance":
        model = Model([Branch("mahalanobis", {"log_weight": np.ones(1)})], COLUMNS)
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "pairs.npy", pairs)
    write_model(tmp_path / "model.h5", model)
    jobs.project(tmp_path / "model.h5", tmp_path / "x.npy", tmp_path / "table.h5")
    out = tmp_path / "scores.h5"
    jobs.score(tmp_path / "table.h5", tmp_path / "pairs.npy", out, **{unit: True})
    with h5py.File(out) as file:
        expected = file["score"][:]
    for source in ({"model": tmp_path / "model.h5"}, {"model": str(tmp_path / "model.h5")}):
        assert fastpair.score_pairs(X, pairs, unit=unit, **source).tobytes() == expected.tobytes()
    table = read_table(tmp_path / "table.h5")
    assert fastpair.score_pairs(table, pairs, unit=unit).tobytes() == expected.tobytes()
    indices, values = fastpair.top_k(table, COUNT, unit=unit)
    assert np.isnan(values[:, -1]).all()
    rows = np.repeat(np.arange(COUNT), COUNT - 1)
    ranked = np.stack([rows, indices[:, :-1].ravel()], axis=1)
    again = fastpair.score_pairs(table, ranked, unit=unit)
    assert values[:, :-1].tobytes() == again.tobytes()
    dense = fastpair.pairwise(table, unit=unit)[tuple(pairs.T)]
    if unit == "decision":
        assert (dense == expected).mean() > 0.99
    else:
        apart = pairs[:, 0] != pairs[:, 1]
        np.testing.assert_allclose(dense[apart], expected[apart], rtol=1e-3)


def test_results_are_those_of_the_command_line(X, tmp_path):
    model = some_model()
    np.save(tmp_path / "x.npy", X)
    write_model(tmp_path / "model.h5", model)
    jobs.project(tmp_path / "model.h5", tmp_path / "x.npy", tmp_path / "t.h5", precision="int8")
    folded = fastpair.fold(X, model, precision="int8")
    table = read_table(tmp_path / "t.h5")
    assert folded.rows.tobytes() == table.rows.tobytes()
    assert (folded.plan, folded.unit, folded.threshold) == (
        table.plan,
        table.unit,
        table.threshold,
    )
    jobs.matrix(tmp_path / "t.h5", tmp_path / "top.h5", top_k=7)
    jobs.matrix(tmp_path / "t.h5", tmp_path / "above.h5", threshold=0.1)
    jobs.matrix(tmp_path / "t.h5", tmp_path / "dense.h5", dense=True)
    indices, scores = fastpair.top_k(folded, 7)
    with h5py.File(tmp_path / "top.h5") as file:
        assert indices.tobytes() == file["indices"][:].tobytes()
        assert scores.tobytes() == file["scores"][:].tobytes()
    above = fastpair.above_threshold(folded)  # the model's own threshold
    with h5py.File(tmp_path / "above.h5") as file:
        np.testing.assert_array_equal(above.indptr, file["indptr"][:])
        np.testing.assert_array_equal(above.indices, file["indices"][:])
        assert above.data.tobytes() == file["data"][:].tobytes()
    with h5py.File(tmp_path / "dense.h5") as file:
        assert fastpair.pairwise(folded).tobytes() == file["matrix"][:].tobytes()


def test_an_asymmetric_model_folds_either_side(X, pairs):
    model = asymmetric_model()
    scores = fastpair.score_pairs(X, pairs, model=model)
    np.testing.assert_allclose(
        scores, model.score(X[pairs[:, 0]], X[pairs[:, 1]]), rtol=1e-3, atol=1e-4
    )
    left, right = (fastpair.fold(X, model, side=side) for side in ("left", "right"))
    assert fastpair.score_pairs(left, pairs, against=right).tobytes() == scores.tobytes()
    assert fastpair.pairwise(X, model=model).shape == (COUNT, COUNT)
    with pytest.raises(ArgumentError, match="holds left entities: give the others too"):
        fastpair.pairwise(left)
    with pytest.raises(MismatchError, match="right and left entities"):
        fastpair.pairwise(right, left)
    with pytest.raises(ArgumentError, match="asymmetric"):
        fastpair.fold(X, model)


def test_no_row_is_its_own_neighbour_in_an_asymmetric_model_either(X):
    model = asymmetric_model()
    scores = fastpair.pairwise(X, model=model)
    others = ~np.eye(COUNT, dtype=bool)
    for k in (3, COUNT + 2):
        places, best = fastpair.top_k(X, k, model=model)
        assert places.shape == best.shape == (COUNT, k)
        kept = np.where(others, scores, -np.inf)
        expected = np.argsort(-kept, axis=1, kind="stable")[:, : min(k, COUNT - 1)]
        np.testing.assert_array_equal(places[:, : COUNT - 1], expected)
        assert (places[:, COUNT - 1 :] == -1).all()
        assert np.isnan(best[:, COUNT - 1 :]).all()
    above = fastpair.above_threshold(X, 0.0, model=model)
    assert not above.diagonal().any()
    assert above.nnz == (others & (scores >= 0)).sum() < (scores >= 0).sum()
    # Against themselves as others, they are.
    assert fastpair.above_threshold(X, 0.0, X, model=model).nnz == (scores >= 0).sum()
    assert (fastpair.top_k(X, COUNT, X, model=model)[0] >= 0).all()


def test_a_fitted_estimator_is_a_model_too(X, pairs):
    y = np.where(np.arange(500) % 3, -1, 1)
    learned = fastpair.PairSimilarity(epochs=1, preprocessor=X).fit(pairs, y)
    own = learned.pair_score(pairs).tobytes()
    assert fastpair.score_pairs(X, pairs, model=learned).tobytes() == own
    assert fastpair.score_pairs(fastpair.fold(X, learned), pairs).tobytes() == own
    looked_up = fastpair.lookup(X, None, X, head=learned)
    assert looked_up.tobytes() == fastpair.lookup(X, None, X, head=learned.model_).tobytes()
    table = fastpair.fold(X, learned)
    assert looked_up.tobytes() == fastpair.lookup(table, None, X).tobytes()


def test_a_model_of_ids_brings_its_own_embeddings(X, pairs):
    import pyarrow as pa

    from fastpair.id_tables import IdTable, IdTables

    ids = IdTable(pa.array([str(row) for row in range(COUNT)]), X.astype(np.float32))
    model = some_model(tables=IdTables(ids))
    with pytest.raises(ArgumentError, match="learned ids and has tables of its own"):
        fastpair.score_pairs(X, pairs, model=model)


def test_int8_tables_of_two_scales_meet(X):
    model = some_model(heads=("absdiff",))
    left, right = fastpair.fold(X, model, precision="int8"), X[:9] ** 3
    with pytest.raises(ArgumentError, match="give both in one form"):
        fastpair.top_k(left, 3, right)
    other = fastpair.fold(right, model, precision="int8")
    assert other.plan != left.plan
    every = np.stack(np.divmod(np.arange(COUNT * 9), 9), axis=1)
    exact = fastpair.score_pairs(left, every, against=other).reshape(COUNT, 9)
    truth = fastpair.score_pairs(X, every, against=right, model=model).reshape(COUNT, 9)
    np.testing.assert_allclose(exact, truth, atol=0.15 * np.ptp(truth))
    indices, scores = fastpair.top_k(left, 9, other)
    np.testing.assert_array_equal(scores, np.take_along_axis(exact, indices, axis=1))
    assert fastpair.top_k(left, 3)[0].shape == (COUNT, 3)


# --- out ------------------------------------------------------------------------------------------


def test_out_is_filled_and_returned(X, pairs, tmp_path):
    out = np.full(500, np.nan, np.float32)
    assert fastpair.score_pairs(X, pairs, out=out) is out
    assert out.tobytes() == fastpair.score_pairs(X, pairs).tobytes()
    strided = np.full((500, 2), np.nan, np.float32)
    fastpair.score_pairs(X, pairs, out=strided[:, 1])
    np.testing.assert_array_equal(strided[:, 1], out)
    assert np.isnan(strided[:, 0]).all()
    held = np.lib.format.open_memmap(
        tmp_path / "dense.npy", "w+", dtype=np.float32, shape=(COUNT, COUNT)
    )
    assert fastpair.pairwise(X, out=held) is held
    held.flush()
    assert np.load(tmp_path / "dense.npy").tobytes() == fastpair.pairwise(X).tobytes()
    best = np.empty((COUNT, 4), np.int64), np.empty((COUNT, 4), np.float32)
    found = fastpair.top_k(X, 4, out=best)
    assert found[0] is best[0]
    assert found[1] is best[1]
    assert all(a.tobytes() == b.tobytes() for a, b in zip(best, fastpair.top_k(X, 4), strict=True))
    output = np.empty((COUNT, 3), np.float32)
    assert fastpair.lookup(X, None, X[:, :3], out=output) is output
    assert output.tobytes() == fastpair.lookup(X, None, X[:, :3]).tobytes()


def test_an_out_that_does_not_fit_is_refused(X, pairs):
    frozen = np.empty(500, np.float32)
    frozen.flags.writeable = False
    wrong = [np.empty(499, np.float32), np.empty(500), np.empty((500, 1), np.float32), frozen, [0]]
    for out in wrong:
        with pytest.raises(ArgumentError, match="writable NumPy array of float32 and shape"):
            fastpair.score_pairs(X, pairs, out=out)
    with pytest.raises(ArgumentError, match=r"shape \(60, 60\)"):
        fastpair.pairwise(X, out=frozen)
    with pytest.raises(ArgumentError, match=r"out\[0\] is float32"):
        fastpair.top_k(X, 4, out=(np.empty((COUNT, 4), np.float32),) * 2)
    with pytest.raises(ArgumentError, match="a tuple"):
        fastpair.top_k(X, 4, out=np.empty((COUNT, 4)))
    with pytest.raises(ArgumentError, match="not with sparse"):
        fastpair.top_k(X, 4, sparse=True, out=())
    with pytest.raises(ArgumentError, match=r"shape \(60, 3\)"):
        fastpair.lookup(X, None, X[:, :3], out=frozen)


# --- what is refused ------------------------------------------------------------------------------


def nan_at(array, row):
    spoiled = array.copy()
    spoiled[row, 0] = np.nan
    return spoiled


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda X, p: fastpair.score_pairs(X), MismatchError, "pairs are left out"),
        (lambda X, p: fastpair.score_pairs(X, against=X[:9]), MismatchError, "60 .* against 9"),
        (lambda X, p: fastpair.score_pairs(X, p + 50), DataError, "left pairs hold the row number"),
        (lambda X, p: fastpair.score_pairs(X, -p), DataError, "row number -"),
        (lambda X, p: fastpair.score_pairs(X, p, against=X[:5]), DataError, "expected 0 to 4"),
        (lambda X, p: fastpair.score_pairs(X, p / 2), ArgumentError, "expected row numbers"),
        (lambda X, p: fastpair.score_pairs(X, p > 3), ArgumentError, "bool, expected row numbers"),
        (lambda X, p: fastpair.score_pairs(X, p[:, 0]), ArgumentError, r"expected \(M, 2\)"),
        (lambda X, p: fastpair.score_pairs(X, (p[:, 0], p[1:, 0])), ArgumentError, "two sides"),
        (lambda X, p: fastpair.score_pairs(X[0], p), ArgumentError, "expected .rows, columns."),
        (lambda X, p: fastpair.score_pairs(X[:, :0], p), ArgumentError, "expected .rows, columns."),
        (lambda X, p: fastpair.score_pairs(nan_at(X, 7), p), DataError, "row 7 of the embeddings"),
        (lambda X, p: fastpair.score_pairs(X * 1j, p), ArgumentError, "Complex"),
        (lambda X, p: fastpair.score_pairs(X.astype(str), p), ArgumentError, "real numbers"),
        (lambda X, p: fastpair.score_pairs(X, p, unit="metres"), ArgumentError, "unit is 'metres'"),
        (lambda X, p: fastpair.score_pairs(X, p, unit="probability"), ArgumentError, "no probab"),
        (lambda X, p: fastpair.score_pairs(X, p, unit="decision"), ArgumentError, "no threshold"),
        (lambda X, p: fastpair.score_pairs(X, p, unit="distance"), ArgumentError, "no distance"),
        (lambda X, p: fastpair.score_pairs(X, p, precision="f8"), ArgumentError, "precision is"),
        (lambda X, p: fastpair.score_pairs(X, p, threads=0), ArgumentError, "threads is 0"),
        (lambda X, p: fastpair.score_pairs(X, p, device="tpu"), ArgumentError, "device is 'tpu'"),
        (lambda X, p: fastpair.score_pairs(X, p, model="cosin"), ArgumentError, "neither a model"),
        (lambda X, p: fastpair.score_pairs(X, p, model="no.h5"), FileError, "no.h5"),
        (lambda X, p: fastpair.score_pairs(X, p, model=3), ArgumentError, "model is a int"),
        (lambda X, p: fastpair.score_pairs(X, p, model=fastpair.PairSimilarity()), ArgumentError,
         "not fitted: call fit"),
        (lambda X, p: fastpair.score_pairs(X[:, :3], p, model=some_model()), MismatchError, "3 c"),
        (lambda X, p: fastpair.score_pairs(X, p, against=X[:, :3]), MismatchError, "and against 3"),
        (lambda X, p: fastpair.fold(fastpair.fold(X)), ArgumentError, "folded already"),
        (lambda X, p: fastpair.fold(X, side="up"), ArgumentError, "side is 'up'"),
        (lambda X, p: fastpair.fold(X, side="left"), ArgumentError, "symmetric"),
        (lambda X, p: fastpair.score_pairs(fastpair.fold(X), p, model="dot"), ArgumentError,
         "model is given but embeddings are a table"),
        (lambda X, p: fastpair.top_k(fastpair.fold(X), precision="int8"), ArgumentError,
         "precision is given"),
        (lambda X, p: fastpair.pairwise(fastpair.fold(X), fastpair.fold(X, "dot")), MismatchError,
         "two models"),
        (lambda X, p: fastpair.top_k(X, 0), ArgumentError, "k is 0"),
        (lambda X, p: fastpair.top_k(X, 2.5), ArgumentError, "k is 2.5"),
        (lambda X, p: fastpair.top_k(X, True), ArgumentError, "k is True"),
        (lambda X, p: fastpair.above_threshold(X), ArgumentError, "the model has none"),
        (lambda X, p: fastpair.above_threshold(X, np.nan), ArgumentError, "finite number"),
        (lambda X, p: fastpair.above_threshold(X, "high"), ArgumentError, "finite number"),
        (lambda X, p: fastpair.pairwise(X, memory="1"), FastpairError, "memory is 1"),
        (lambda X, p: fastpair.entity_groups(X), ArgumentError, "expected .M, 2."),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_in_one_sentence(X, pairs, call, kind, message):
    with pytest.raises(kind, match=message) as refused:
        call(X, pairs)
    assert "\n" not in str(refused.value)


def test_nothing_at_all_is_scored_too(X):
    assert fastpair.score_pairs(X, []).shape == (0,)
    assert fastpair.score_pairs(X, np.empty((0, 2), int)).shape == (0,)
    assert fastpair.top_k(X[:1], 2)[0].tolist() == [[-1, -1]]
    assert fastpair.above_threshold(X[:1], 0).nnz == 0
    assert fastpair.entity_groups(np.empty((0, 2), int)).shape == (0,)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=12))
def test_groups_of_pairs_are_what_chains_connect(listed):
    pairs = np.array(listed)
    groups = fastpair.entity_groups(pairs)
    merged = [set(pair) for pair in listed]
    for _ in listed:
        merged = [set().union(*(other for other in merged if other & own)) for own in merged]
    for a, own in enumerate(merged):
        for b in range(len(merged)):
            assert (groups[a] == groups[b]) == bool(own & merged[b])
    firsts = [groups.tolist().index(group) for group in range(groups.max() + 1)]
    assert firsts == sorted(firsts)


def test_equal_embeddings_are_one_entity(X):
    zeros = np.zeros((2, 2, 3))
    zeros[1] = -0.0
    zeros[0, 1], zeros[1, 1] = 1, 2
    assert fastpair.entity_groups(zeros).tolist() == [0, 0]
    zeros[1, 0, 0] = 1e-300
    assert fastpair.entity_groups(zeros).tolist() == [0, 1]


# --- GPUs, simulated ------------------------------------------------------------------------------


def test_row_numbers_on_a_gpu_stay_there(X, pairs, on_a_simulated_gpu):
    expected = fastpair.score_pairs(X, pairs, device="cpu")
    left, right = (OnDevice(np.ascontiguousarray(side)) for side in pairs.T)
    scores = np.zeros(500, np.float32)
    out = OnDevice(scores)
    assert fastpair.score_pairs(X, (left, right), out=out) is out
    assert scores.tobytes() == expected.tobytes()
    assert on_a_simulated_gpu == ["cpu", "gpu"]
    with pytest.raises(ArgumentError, match="a GPU returns scores alone"):
        fastpair.score_pairs(X, (left, right), out=out, unit="decision", model=some_model())
    with pytest.raises(ArgumentError, match="row numbers that are there too"):
        fastpair.score_pairs(X, pairs, out=out)


def test_scores_of_row_numbers_on_a_gpu_come_here_without_an_out(X, pairs, monkeypatch):
    expected = fastpair.score_pairs(X, pairs)

    class Scorer:
        def score_device(self, left, right, out):
            assert left.array.tolist() == pairs[:, 0].tolist()
            assert out is None
            return FakeCupy(expected)

    monkeypatch.setattr(functions, "pick", lambda device, **_: device)
    monkeypatch.setattr(functions, "_pair_scorer", lambda *_: Scorer())
    found = fastpair.score_pairs(X, FakeCupy(pairs))
    assert type(found) is np.ndarray
    out = np.zeros(500, np.float32)
    assert fastpair.score_pairs(X, FakeCupy(pairs), out=out) is out
    assert found.tobytes() == out.tobytes() == expected.tobytes()
    with pytest.raises(ArgumentError, match=r"shape \(500,\)"):
        fastpair.score_pairs(X, FakeCupy(pairs), out=out[1:])


def test_a_device_that_is_asked_for_does_the_work(X, pairs, on_a_simulated_gpu):
    options = {"model": some_model()}
    on_cpu, on_gpu = (
        (
            fastpair.score_pairs(X, pairs, device=device, **options),
            *fastpair.top_k(X, 3, device=device, **options),
            fastpair.above_threshold(X, device=device, **options).data,
            fastpair.pairwise(X, device=device, **options),
        )
        for device in ("cpu", "gpu")
    )
    for mine, yours in zip(on_cpu[:-1], on_gpu[:-1], strict=True):
        assert mine.tobytes() == yours.tobytes()
    np.testing.assert_allclose(on_cpu[-1], on_gpu[-1], rtol=1e-3, atol=1e-4)
    assert on_a_simulated_gpu == ["cpu"] * 4 + ["gpu"] * 4


def test_a_gpu_that_is_not_there_is_missed_in_one_sentence(X, pairs):
    if fastpair_has_gpu():
        pytest.skip("there is a GPU here")
    for call in (fastpair.score_pairs, fastpair.top_k):
        arguments = (X, pairs) if call is fastpair.score_pairs else (X, 3)
        with pytest.raises(DeviceError, match="use the device cpu"):
            call(*arguments, device="gpu")


def fastpair_has_gpu():
    from fastpair.device import find_gpus

    return isinstance(find_gpus(), int)


# --- the package ----------------------------------------------------------------------------------


def test_importing_fastpair_imports_nothing_heavy():
    program = (
        "import sys, fastpair\n"
        "heavy = ('numpy', 'numba', 'sklearn', 'scipy', 'pyarrow', 'h5py', 'pandas', 'cupy')\n"
        "assert not [name for name in heavy if name in sys.modules]\n"
        "assert set(fastpair.__all__) <= set(dir(fastpair))\n"
        "fastpair.score_pairs\n"
        "assert 'sklearn' not in sys.modules and 'numba' not in sys.modules\n"
        "assert 'pandas' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("name", fastpair.__all__)
def test_what_is_exported_is_typed_and_described(name):
    found = getattr(fastpair, name)
    assert found.__doc__
    calls = [found]
    if inspect.isclass(found):
        calls = [getattr(found, method) for method in vars(found) if not method.startswith("__")]
        calls = [call for call in calls if getattr(call, "__module__", "").startswith("fastpair")]
        assert len(calls) > 10
    for call in calls:
        parameters = inspect.signature(call).parameters.values()
        missing = [p.name for p in parameters if p.annotation is p.empty and p.name != "self"]
        assert not missing, call
        assert "return" in call.__annotations__
    assert files("fastpair").joinpath("py.typed").is_file()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastpair.nothing


@pytest.mark.parametrize("name", BUILTINS)
def test_built_in_names_fold(X, name):
    assert fastpair.fold(X, name).model_name == name
