"""Two tables: users and items, old and new. Every result is right for both, with ids of both."""

from contextlib import contextmanager

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
from scipy.sparse import csr_matrix

from fastpair import attention, jobs, results
from fastpair.attention import SoftLookup
from fastpair.errors import DataError, FastpairError, MismatchError
from fastpair.files import read_table, write_embeddings
from fastpair.matrix_output import MatrixOutput
from fastpair.results import read_top_k
from fastpair.scored import open_scored
from fastpair.scoring import PairScorer
from fastpair.soft_lookup import soft_lookup

USERS, ITEMS, COLUMNS = 70, 45, 6


@pytest.fixture(scope="module", params=["cosine", "manhattan"])
def world(request, tmp_path_factory):
    """Tables of users and of items with ids of their own, some the same text on both sides."""
    folder = tmp_path_factory.mktemp("two")
    rng = np.random.default_rng(1)
    for name, count, first in (("users", USERS, 0), ("items", ITEMS, 30)):
        vectors = rng.normal(size=(count, COLUMNS)).astype(np.float32)
        ids = pa.array([f"n{first + n}" for n in range(count)])
        write_embeddings(folder / f"{name}.e.h5", [(0, vectors)], vectors.shape, vectors.dtype, ids)
        jobs.project(request.param, folder / f"{name}.e.h5", folder / f"{name}.h5")
    users, items = (read_table(folder / f"{name}.h5") for name in ("users", "items"))
    rows, columns = np.indices((USERS, ITEMS)).reshape(2, -1)
    scorer = PairScorer(users.rows, users.plan, items.rows, items.plan)
    return folder, scorer(rows, columns).reshape(USERS, ITEMS)


def both(folder, swapped=False):
    first, second = ("items", "users") if swapped else ("users", "items")
    return {"table": folder / f"{first}.h5", "against": folder / f"{second}.h5"}


def ids_in(path):
    with h5py.File(path) as file:
        assert bool(file.attrs["two_tables"])
        return [file[name].asstr()[:].tolist() for name in ("ids", "ids_right")]


USER_IDS = [f"n{n}" for n in range(USERS)]
ITEM_IDS = [f"n{30 + n}" for n in range(ITEMS)]


def test_dense_holds_every_left_and_right_entity(world, tmp_path):
    folder, exact = world
    jobs.matrix(**both(folder), output=tmp_path / "m.h5", dense=True)
    assert ids_in(tmp_path / "m.h5") == [USER_IDS, ITEM_IDS]
    with h5py.File(tmp_path / "m.h5") as file:
        np.testing.assert_allclose(file["matrix"][:], exact, atol=1e-5)


@pytest.mark.parametrize("swapped", [False, True])
def test_top_k_is_right_in_both_directions(world, tmp_path, swapped):
    folder, exact = world
    exact = exact.T if swapped else exact
    jobs.matrix(**both(folder, swapped), output=tmp_path / "k.h5", top_k=5)
    ids = [ITEM_IDS, USER_IDS] if swapped else [USER_IDS, ITEM_IDS]
    assert ids_in(tmp_path / "k.h5") == ids
    found = read_top_k(tmp_path / "k.h5")
    order = np.argsort(-exact, axis=1, kind="stable")[:, :5]
    assert found.indices.tolist() == order.tolist()
    assert found.scores.tobytes() == np.take_along_axis(exact, order, axis=1).tobytes()


def test_top_k_beyond_the_right_table_ends_with_nothing(world, tmp_path):
    folder, _ = world
    jobs.matrix(**both(folder), output=tmp_path / "k.h5", top_k=ITEMS + 2)
    found = read_top_k(tmp_path / "k.h5")
    assert (found.indices[:, ITEMS:] == -1).all()
    assert (np.sort(found.indices[:, :ITEMS], axis=1) == np.arange(ITEMS)).all()


@pytest.mark.parametrize("swapped", [False, True])
def test_a_threshold_keeps_pairs_whose_rows_have_the_same_number(world, tmp_path, swapped):
    folder, exact = world
    exact = exact.T if swapped else exact
    limit = float(np.quantile(exact, 0.8))
    jobs.matrix(**both(folder, swapped), output=tmp_path / "t.h5", threshold=limit)
    ids_in(tmp_path / "t.h5")
    with h5py.File(tmp_path / "t.h5") as file:
        parts = file["data"][:], file["indices"][:], file["indptr"][:]
    found = csr_matrix(parts, exact.shape).toarray()
    assert (found == np.where(exact >= limit, exact, 0)).all()
    assert np.diagonal(found).any()


def test_a_histogram_counts_every_pair_once(world, tmp_path):
    folder, exact = world
    summary = jobs.matrix(**both(folder), output=tmp_path / "h.h5", histogram=True, bins=7)
    assert sum(summary["counts"]) == exact.size
    assert summary["edges"][0] == pytest.approx(exact.min(), abs=1e-5)
    assert summary["edges"][-1] == pytest.approx(exact.max(), abs=1e-5)
    expected, _ = np.histogram(exact, np.array(summary["edges"]))
    assert abs(np.array(summary["counts"]) - expected).max() <= 1
    with h5py.File(tmp_path / "h.h5") as file:
        assert bool(file.attrs["two_tables"])


def test_pairs_name_entities_of_different_tables(world, tmp_path):
    folder, exact = world
    names = {"left": ["n0", "n69", "n35", "n35"], "right": ["n30", "n74", "n35", "n31"]}
    pa.csv.write_csv(pa.table(names), tmp_path / "p.csv")
    jobs.score(**both(folder), pairs=tmp_path / "p.csv", output=tmp_path / "s.csv")
    read = pa.csv.read_csv(tmp_path / "s.csv")
    assert read.column_names == ["left", "right", "score"]
    expected = exact[[0, 69, 35, 35], [0, 44, 5, 1]]
    assert np.array(read["score"], np.float32).tobytes() == expected.tobytes()
    turned = {"left": names["right"], "right": names["left"]}
    pa.csv.write_csv(pa.table(turned), tmp_path / "q.csv")
    with pytest.raises(DataError, match="n74"):
        jobs.score(**both(folder), pairs=tmp_path / "q.csv", output=tmp_path / "s.csv.gz")
    jobs.score(**both(folder, True), pairs=tmp_path / "q.csv", output=tmp_path / "u.csv")
    read = pa.csv.read_csv(tmp_path / "u.csv")
    assert np.array(read["score"], np.float32).tobytes() == expected.tobytes()


def test_kept_pairs_of_two_tables_are_known_as_such(world, tmp_path):
    folder, exact = world
    rows = np.array([[0, 0], [3, 3], [69, 44]])
    np.save(tmp_path / "p.npy", rows)
    options = {"pairs": tmp_path / "p.npy", "min_score": -1e9}
    jobs.score(**both(folder), output=tmp_path / "s.h5", **options)
    scored = open_scored(tmp_path / "s.h5")
    assert (scored.nodes, scored.left_nodes) == (70 + 45, 70)
    left, right, scores = (np.concatenate(part) for part in zip(*scored.blocks(), strict=True))
    assert (left.tolist(), (right - 70).tolist()) == (rows[:, 0].tolist(), rows[:, 1].tolist())
    assert scores.tolist() == exact[rows[:, 0], rows[:, 1]].tolist()
    alone = {"table": folder / "users.h5", "pairs": tmp_path / "q.npy", "min_score": -1e9}
    np.save(tmp_path / "q.npy", rows[:2])
    jobs.score(**alone, output=tmp_path / "one.h5")
    assert open_scored(tmp_path / "one.h5").nodes == 4


# --- lookup ---------------------------------------------------------------------------------------


def means(scores, values, temperature=1.0):
    weights = np.exp((scores - scores.max(1, keepdims=True)) / temperature)
    return weights @ values / weights.sum(1, keepdims=True)


def output_of(path):
    with h5py.File(path) as file:
        assert (file.attrs["fastpair_kind"], file.attrs["form"]) == ("matrix", "lookup")
        return file["output"][:], file["ids"].asstr()[:].tolist()


def test_a_lookup_writes_averages_with_the_ids_of_the_queries(world, tmp_path):
    folder, exact = world
    values = np.random.default_rng(2).normal(size=(ITEMS, 3))
    np.save(tmp_path / "v.npy", values)
    summary = soft_lookup(
        **both(folder), values=tmp_path / "v.npy", output=tmp_path / "o.h5", temperature=0.5
    )
    assert (summary["shape"], summary["without_key"]) == ([USERS, 3], 0)
    found, ids = output_of(tmp_path / "o.h5")
    assert ids == USER_IDS
    np.testing.assert_allclose(found, means(exact.astype(float), values, 0.5), atol=1e-5)


def test_values_find_their_keys_by_id(world, tmp_path):
    folder, exact = world
    values = np.random.default_rng(3).normal(size=(ITEMS, 2))
    order = np.random.default_rng(4).permutation(ITEMS)
    names = {"id": [ITEM_IDS[n] for n in order] + ["other"]}
    columns = {f"c{n}": [*values[order, n], 9.0] for n in range(2)}
    pa.csv.write_csv(pa.table(names | columns), tmp_path / "v.csv")
    soft_lookup(**both(folder), values=tmp_path / "v.csv", output=tmp_path / "o.h5")
    found, _ = output_of(tmp_path / "o.h5")
    np.testing.assert_allclose(found, means(exact.astype(float), values), atol=1e-5)
    names = {"id": ITEM_IDS[1:]}
    pa.csv.write_csv(pa.table({**names, "c": values[1:, 0]}), tmp_path / "w.csv")
    with pytest.raises(DataError, match="no row for the key 'n30'"):
        soft_lookup(**both(folder), values=tmp_path / "w.csv", output=tmp_path / "p.h5")


@pytest.fixture
def small_parts(monkeypatch):
    """Blocks and groups of few queries."""
    monkeypatch.setattr(results, "ROWS_AT_ONCE", 16)
    monkeypatch.setattr(attention, "_PAIRS_A_GROUP", 1)


def stop(job):
    """Run a lookup until some twenty queries are done."""
    found = MatrixOutput.lookup

    def lookup(target, averages):
        def first(start):
            for begin, outputs in averages(start):
                yield begin, outputs
                if begin + len(outputs) >= 20:
                    break
            raise KeyboardInterrupt

        return found(target, first)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MatrixOutput, "lookup", lookup)
        with pytest.raises(KeyboardInterrupt):
            soft_lookup(**job)


KEPT = [{}, {"top_k": 3}, {"threshold": 0.1}]


@pytest.mark.parametrize("options", [*KEPT, {"compression": "gzip"}])
def test_a_lookup_that_was_stopped_goes_on_to_the_same_bytes(world, tmp_path, small_parts, options):
    folder, _ = world
    np.save(tmp_path / "v.npy", np.random.default_rng(6).normal(size=(ITEMS, 3)))
    job = {**both(folder), "values": tmp_path / "v.npy", **options}
    whole = soft_lookup(**job, output=tmp_path / "whole.h5")
    assert whole["resumed_from"] == 0
    with patch_lists(options):
        stop({**job, "output": tmp_path / "o.h5"})
        with pytest.raises(FastpairError, match="--resume to go on or --overwrite"):
            soft_lookup(**job, output=tmp_path / "o.h5")
        again = soft_lookup(**job, output=tmp_path / "o.h5", resume=True)
    assert 0 < again["resumed_from"] < USERS
    assert again["resumed_from"] % 16 == 0
    assert again["without_key"] == whole["without_key"]
    assert (tmp_path / "o.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert not (tmp_path / "o.h5.partial").exists()


@contextmanager
def patch_lists(options):
    """Give lists of keys in parts of 20 queries; averages over all keys come in groups anyway."""
    if not {"top_k", "threshold"} & set(options):
        yield
        return
    listed = SoftLookup._lists

    def in_parts(soft, top_k, threshold, start):
        for first, counts, indices, scores in listed(soft, top_k, threshold, start):
            ends = np.concatenate([[0], np.cumsum(counts)])
            for at in range(0, len(counts), 20):
                stop = min(at + 20, len(counts))
                here = slice(ends[at], ends[stop])
                yield first + at, counts[at:stop], indices[here], scores[here]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SoftLookup, "_lists", in_parts)
        yield


def test_another_lookup_is_not_gone_on_with(world, tmp_path, small_parts):
    folder, _ = world
    rng = np.random.default_rng(7)
    np.save(tmp_path / "v.npy", rng.normal(size=(ITEMS, 3)))
    np.save(tmp_path / "w.npy", rng.normal(size=(ITEMS, 3)))
    job = {**both(folder), "values": tmp_path / "v.npy", "output": tmp_path / "o.h5"}
    stop(job)
    turned = {"table": job["against"], "against": job["table"]}
    np.save(tmp_path / "u.npy", rng.normal(size=(USERS, 3)))
    for changes, words in (
        ({"values": tmp_path / "w.npy"}, "its values is"),
        ({"temperature": 0.5}, "its temperature is '1.0', now it is '0.5'"),
        ({"top_k": 3}, "its top_k is 'None', now it is '3'|its device is"),
        ({"threshold": 0.5}, "its threshold is|its device is"),
        ({**turned, "values": tmp_path / "u.npy"}, "its (size|right table|table) is"),
    ):
        with pytest.raises(MismatchError, match=words):
            soft_lookup(**{**job, **changes}, resume=True)
    assert soft_lookup(**job, resume=True, memory="200MiB", threads=1)["resumed_from"] > 0


def test_lookups_that_cannot_be_are_refused(world, tmp_path):
    folder, _ = world
    np.save(tmp_path / "v.npy", np.ones((3, 2)))
    arguments = {**both(folder), "values": tmp_path / "v.npy", "output": tmp_path / "o.h5"}
    for changes, words in (
        ({}, "3 rows for 45 keys"),
        ({"itself": False}, "--no-self is for one table"),
        ({"output": tmp_path / "o.csv"}, "written as .h5"),
        ({"values": tmp_path / "none.npy"}, "none.npy"),
    ):
        with pytest.raises(FastpairError, match=words):
            soft_lookup(**{**arguments, **changes})
        assert not (tmp_path / "o.h5").exists()


def test_the_command_looks_up_in_one_table(world, tmp_path):
    from test_cli import run, run_json

    folder, _ = world
    np.save(tmp_path / "v.npy", np.random.default_rng(5).normal(size=(USERS, 2)))
    job = ["matrix", folder / "users.h5", "--lookup", tmp_path / "v.npy", "--overwrite"]
    job += ["-o", tmp_path / "o.h5"]
    found = {}
    for name, options in {
        "all": [],
        "others": ["--no-self"],
        "one": ["--top-k", "1"],
        "none": ["--threshold", "1e9"],
    }.items():
        summary = run_json(*job, "--temperature", "0.3", *options)
        found[name], _ = output_of(tmp_path / "o.h5")
        assert summary["without_key"] == (USERS if name == "none" else 0)
    assert (found["one"] == np.load(tmp_path / "v.npy").astype(np.float32)).all()
    assert np.isnan(found["none"]).all()
    assert np.abs(found["all"] - found["others"]).max() > 1e-3
    info = run("info", tmp_path / "o.h5").stdout
    assert "lookup matrix" in info
    for wrong in (["--dense"], ["--top-k", "1", "--threshold", "1"]):
        run(*job, *wrong, code=2)
    run("matrix", folder / "users.h5", "--dense", "--no-self", "-o", tmp_path / "d.h5", code=2)
