"""Networks, the one form that does not fold: bits, files, all pairs."""

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_folding import random_model
from test_matrix import collect_hits, collect_top_k, expected_hits

from fastpair import jobs
from fastpair.errors import ArgumentError, FileError, MemoryBudgetError
from fastpair.files import read_table, write_model
from fastpair.folding import Folder, fold
from fastpair.kernels import Network, reference
from fastpair.matrix import NetworkPairs, all_pairs
from fastpair.scoring import PairScorer, meet

HEADS = ["mlp(hidden=6x5)", "mlp(hidden=19)", "concat(hidden=8x3)"]


def network_table(name, count=40, seed=0):
    rng = np.random.default_rng(seed)
    model, embeddings = random_model(rng, [name]), rng.normal(size=(count, 12))
    return (model, embeddings, *fold(model, embeddings))


def pair_scores(rows, plan):
    count = len(rows)
    left, right = np.divmod(np.arange(count * count), count)
    return PairScorer(rows, plan)(left, right).reshape(count, count)


@settings(max_examples=20)
@given(
    name=st.sampled_from(HEADS),
    seed=st.integers(0, 99),
    cuts=st.lists(st.integers(0, 3000), max_size=4),
    threads=st.integers(1, 3),
)
def test_bits_do_not_depend_on_blocks_order_side_or_threads(name, seed, cuts, threads):
    _, _, rows, plan = network_table(name, seed=seed)
    rng = np.random.default_rng(seed)
    left, right = rng.integers(0, 40, (2, 3000))
    whole = PairScorer(rows, plan, threads=threads)(left, right)
    parts = np.split(np.arange(3000), sorted(cuts))
    pieces = [PairScorer(rows, plan)(left[part], right[part]) for part in parts]
    assert np.concatenate(pieces).tobytes() == whole.tobytes()
    order = rng.permutation(3000)
    swapped = PairScorer(rows, plan, threads=2)(right[order], left[order])
    assert swapped.tobytes() == whole[order].tobytes()


@pytest.mark.parametrize("name", HEADS)
def test_all_pairs_give_what_pairs_give(name):
    _, _, rows, plan = network_table(name)
    exact = pair_scores(rows, plan)
    pairs = all_pairs(rows, None, plan, threads=2)
    assert isinstance(pairs, NetworkPairs)
    scores, indices = collect_top_k(pairs, 5)
    assert indices.tolist() == naive.top_k(exact.tolist(), 5, skip_diagonal=True)
    assert scores.tobytes() == np.take_along_axis(exact, indices, axis=1).tobytes()
    threshold = float(np.quantile(exact, 0.8))
    assert collect_hits(pairs, threshold) == expected_hits(exact, threshold, True)
    assert np.concatenate([part for _, part in pairs.dense()]).tobytes() == exact.tobytes()
    edges, counts = pairs.histogram(7)
    others = exact[~np.eye(40, dtype=bool)]
    assert edges[[0, -1]].tolist() == [others.min(), others.max()]
    inner = np.searchsorted(edges[1:-1], others, side="right")
    assert counts.tolist() == np.bincount(inner, minlength=7).tolist()
    np.testing.assert_allclose(reference.score_matrix(rows, rows, plan), exact, 1e-3, 1e-3)


def test_all_pairs_of_two_tables_keep_the_diagonal_and_short_rows_are_filled():
    _, _, rows, plan = network_table(HEADS[0])
    exact = pair_scores(rows, plan)[:, :6]
    scores, indices = collect_top_k(all_pairs(rows, rows[:6], plan), 9)
    assert indices[:, :6].tolist() == naive.top_k(exact.tolist(), 6, skip_diagonal=False)
    assert (indices[:, 6:] == -1).all()
    assert np.isnan(scores[:, 6:]).all()


def test_what_all_pairs_cannot_do_is_refused():
    _, _, rows, plan = network_table(HEADS[0], 1)
    for call in (lambda p: list(p.top_k(0)), lambda p: p.histogram(), lambda p: p.histogram(0)):
        with pytest.raises(ArgumentError):
            call(all_pairs(rows, None, plan))
    with pytest.raises(ArgumentError, match="finite"):
        list(all_pairs(rows, None, plan).above(np.nan))
    many = np.zeros((10**7, plan.layout.row_bytes), dtype=np.uint8)  # never touched: no memory
    with pytest.raises(MemoryBudgetError, match="allow more memory"):
        list(all_pairs(rows, many, plan, memory="64MiB").dense())


@pytest.mark.parametrize("name", HEADS)
def test_a_table_carries_its_network(name, tmp_path):
    model, embeddings, rows, plan = network_table(name)
    np.save(tmp_path / "v.npy", embeddings)
    write_model(tmp_path / "m.h5", model)
    jobs.project(tmp_path / "m.h5", tmp_path / "v.npy", tmp_path / "t.h5")
    table = read_table(tmp_path / "t.h5")
    assert table.rows.tobytes() == rows.tobytes()
    assert table.plan == plan
    assert hash(table.plan.network) == hash(plan.network)
    assert meet(table.rows, table.plan, rows, plan)[2] == plan
    assert table.plan != network_table(name, seed=1)[3]
    found = jobs.matrix(tmp_path / "t.h5", tmp_path / "k.h5", top_k=3)
    assert "slow" in found["notes"][0]


def test_networks_are_stored_in_float32_alone():
    model = network_table(HEADS[0])[0]
    with pytest.raises(ArgumentError, match="table is float32"):
        Folder(model, 12, "int8")


@pytest.mark.parametrize("name", HEADS)
def test_the_stated_bound_holds(name):
    model, embeddings, _, _ = network_table(name)
    folder = Folder(model, 12)
    folder.fold(embeddings)
    assert 0 < folder.raw_error_bound() < 0.1


@pytest.mark.parametrize(
    "change",
    [
        {"output": np.ones(3)},
        {"bias_0": np.ones(3)},
        {"matrix_1": np.ones((5, 5))},
        {"direct": np.ones(1)},
    ],
)
def test_networks_whose_arrays_do_not_fit_are_refused(change):
    arrays = network_table(HEADS[0])[3].network.arrays
    with pytest.raises(ValueError, match="not those of a network"):
        Network.from_arrays("features", {**arrays, **change})
    assert issubclass(FileError, Exception)
