"""Embeddings that are not finite: refused, or kept apart so that they change nothing else."""

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cli import refused, run, run_json

from fastpair.folding import fold
from fastpair.ingest import open_embeddings
from fastpair.isolation import PairsWithoutIsolated, isolated_pairs
from fastpair.matrix import AllPairs
from fastpair.model import builtin
from fastpair.remaining import RemainingPairs

BAD = [0, 5, 11, 29]


def vectors(count=30):
    return np.random.default_rng(3).standard_normal((count, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    """The same table whole, and with four rows that are not finite."""
    folder = tmp_path_factory.mktemp("spoiled")
    numbers = vectors()
    np.save(folder / "good.npy", numbers)
    numbers[BAD, [0, 3, 7, 2]] = [np.nan, np.inf, -np.inf, np.nan]
    np.save(folder / "bad.npy", numbers)
    run("project", "cosine", "good.npy", "-o", "good.h5", cwd=folder)
    run("project", "cosine", "bad.npy", "--nonfinite", "nan", "-o", "bad.h5", cwd=folder)
    return folder


def test_it_is_said_which_rows_are_kept_apart(spoiled):
    assert "row 0" in refused("project", "cosine", "bad.npy", "-o", "no.h5", cwd=spoiled)
    words = ("project", "cosine", "bad.npy", "--nonfinite", "nan", "-o", "again.h5")
    (note,) = [n for n in run_json(*words, cwd=spoiled)["notes"] if "not finite" in n]
    assert note.startswith(
        "4 rows are not finite and take part in nothing, the first of them row 0"
    )
    assert (spoiled / "again.h5").read_bytes() == (spoiled / "bad.h5").read_bytes()
    source = open_embeddings(spoiled / "bad.npy", nonfinite="nan")
    numbers = np.concatenate([block for _, block in source.blocks(7)])
    assert np.flatnonzero(source.isolated).tolist() == BAD
    assert not numbers[BAD].any()


def score(folder, table, *words):
    run("score", table, "pairs.npy", "-o", "s.h5", "--overwrite", *words, cwd=folder)
    with h5py.File(folder / "s.h5") as file:
        return file["score"][:]


def test_scores_are_nan_where_a_row_is_bad_and_the_same_elsewhere(spoiled):
    pairs = np.random.default_rng(0).integers(0, 30, (500, 2))
    np.save(spoiled / "pairs.npy", pairs)
    good, bad = score(spoiled, "good.h5"), score(spoiled, "bad.h5")
    spoilt = np.isin(pairs, BAD).any(axis=1)
    assert np.isnan(bad).tolist() == spoilt.tolist()
    assert good[~spoilt].tobytes() == bad[~spoilt].tobytes()
    against = score(spoiled, "good.h5", "--against", "bad.h5")
    assert np.isnan(against).tolist() == np.isin(pairs[:, 1], BAD).tolist()


def test_a_bad_row_is_found_by_nobody_and_finds_nobody(spoiled):
    for words in (("--top-k", "3"), ("--threshold", "-2"), ("--dense",), ("--histogram",)):
        run("matrix", "bad.h5", *words, "-o", f"m{words[0]}.h5", cwd=spoiled)
    with h5py.File(spoiled / "m--top-k.h5") as file:
        indices, scores = file["indices"][:], file["scores"][:]
    good = np.setdiff1d(np.arange(30), BAD)
    assert not np.isin(indices, BAD).any()
    assert (indices[BAD] == -1).all()
    assert np.isnan(scores[BAD]).all()
    assert (indices[good] >= 0).all()
    with h5py.File(spoiled / "m--threshold.h5") as file:
        assert np.diff(file["indptr"][:]).tolist() == [0 if r in BAD else 25 for r in range(30)]
        assert not np.isin(file["indices"][:], BAD).any()
    with h5py.File(spoiled / "m--dense.h5") as file:
        full = file["matrix"][:]
    assert np.isnan(full[BAD]).all()
    assert np.isnan(full[:, BAD]).all()
    assert np.isfinite(full[np.ix_(good, good)]).all()
    with h5py.File(spoiled / "m--histogram.h5") as file:
        assert file["counts"][:].sum() == 26 * 25


@pytest.mark.parametrize("against", [False, True])
def test_exclusions_name_the_same_rows_where_bad_rows_are_kept_apart(spoiled, against):
    pairs = np.random.default_rng(1).integers(0, 30, (150, 2))
    np.save(spoiled / "known.npy", pairs)
    known = {tuple(pair) for pair in pairs.tolist()}
    known |= set() if against else {pair[::-1] for pair in known}
    more = ["--against", "bad.h5"] if against else []
    options = ("--top-k", "30", "--overwrite", *more)
    run("matrix", "bad.h5", *options, "-o", "every.h5", cwd=spoiled)
    run("matrix", "bad.h5", *options, "--exclude", "known.npy", "-o", "rest.h5", cwd=spoiled)
    with h5py.File(spoiled / "every.h5") as every, h5py.File(spoiled / "rest.h5") as rest:
        for row, (all_found, found) in enumerate(
            zip(every["indices"], rest["indices"], strict=True)
        ):
            expected = [j for j in all_found if j >= 0 and (row, j) not in known]
            assert found[found >= 0].tolist() == expected


@given(
    st.lists(st.booleans(), min_size=2, max_size=40),
    st.lists(st.booleans(), min_size=1, max_size=40),
    st.booleans(),
    st.integers(1, 5),
)
def test_all_pairs_are_those_of_the_good_rows(left, right, one_table, k):
    left, right = np.array(left), np.array(left if one_table else right)
    if left.all() or right.all() or (one_table and (~left).sum() < 2):
        return
    tables = [fold(builtin("dot"), vectors(40)[: len(mask)]) for mask in (left, right)]
    plan = tables[0][1]
    rows = [table[0] for table in tables]
    kept = [np.flatnonzero(~mask) for mask in (left, right)]
    options = {"threads": 1, "memory": 1 << 27}
    second = None if one_table else rows[1][kept[1]].copy()
    expected = AllPairs(rows[0][kept[0]].copy(), second, plan, **options)
    masks = (left if left.any() else None, right if right.any() else None)

    def pairs_from(start):
        def walk(some, others, room):
            return AllPairs(some, others, plan, threads=1, memory=room)

        def from_row(some, others, first):
            return RemainingPairs(walk, some, others, 1 << 28, first)

        other = None if one_table else rows[1].copy()
        return PairsWithoutIsolated(from_row, rows[0].copy(), other, masks, start)

    found = pairs_from(0)
    indices = np.concatenate([block[2] for block in found.top_k(k)])
    best = np.concatenate([block[2] for block in expected.top_k(k)])
    wanted = np.full((len(left), k), -1)
    wanted[kept[0]] = np.where(best < 0, -1, kept[1][best])
    assert np.array_equal(indices, wanted)
    dense = np.concatenate([block[1] for block in found.dense()])
    assert np.isfinite(dense).tolist() == (~left[:, None] & ~right).tolist()
    counts = np.concatenate([block[1] for block in found.above(0.0)])
    assert counts[left].sum() == 0
    assert counts.sum() == sum(block[1].sum() for block in expected.above(0.0))
    start = len(left) // 2  # what is left of a run that was interrupted there
    rest = pairs_from(start)
    assert np.array_equal(np.concatenate([b[2] for b in rest.top_k(k)]), indices[start:])
    some = np.concatenate([block[1] for block in rest.dense()])
    assert np.array_equal(some, dense[start:], equal_nan=True)
    assert np.concatenate([b[1] for b in rest.above(0.0)]).tolist() == counts[start:].tolist()


def test_pairs_of_bad_rows_are_marked_by_side():
    left, right = np.array([0, 1, 2]), np.array([2, 2, 0])
    mask = np.array([True, False, False])
    assert isolated_pairs(left, right, (None, None)) is None
    assert isolated_pairs(left, right, (mask, None)).tolist() == [True, False, False]
    assert isolated_pairs(left, right, (mask, mask)).tolist() == [True, False, True]


def test_training_is_that_without_the_bad_rows(tmp_path):
    rng = np.random.default_rng(0)
    numbers, groups = vectors(120), np.arange(120) % 6
    numbers += 2 * rng.standard_normal((6, 8)).astype(np.float32)[groups]
    pairs = rng.integers(0, 120, (1500, 2))
    labels = (groups[pairs[:, 0]] == groups[pairs[:, 1]]).astype(int)
    good = np.setdiff1d(np.arange(120), BAD)
    kept = ~np.isin(pairs, BAD).any(axis=1)
    np.save(tmp_path / "few.npy", numbers[good])
    numbers[BAD] = np.nan
    np.save(tmp_path / "all.npy", numbers)
    for name, rows, marks in (
        ("all", pairs, labels),
        ("few", np.searchsorted(good, pairs[kept]), labels[kept]),
    ):
        lines = "".join(f"{a},{b},{c}\n" for (a, b), c in zip(rows, marks, strict=True))
        (tmp_path / f"{name}.csv").write_text(lines)
    words = ("--head", "cosine", "--epochs", "3")
    assert "row 0" in refused("train", "all.npy", "all.csv", "-o", "a.h5", *words, cwd=tmp_path)
    found = run_json(
        *("train", "all.npy", "all.csv", "--nonfinite", "nan", "-o", "a.h5", *words), cwd=tmp_path
    )
    expected = run_json("train", "few.npy", "few.csv", "-o", "f.h5", *words, cwd=tmp_path)
    assert found["fingerprint"] == expected["fingerprint"]
    assert found["n_pairs"] == expected["n_pairs"] == kept.sum()


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Embeddings with bad rows and labelled pairs of them; the same without; what is kept."""
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(4)
    numbers, pairs = vectors(), rng.integers(0, 30, (200, 2))
    labels, kinds = rng.integers(0, 2, 200), rng.integers(0, 3, 200)
    good, kept = np.setdiff1d(np.arange(30), BAD), ~np.isin(pairs, BAD).any(axis=1)
    np.save(folder / "few.npy", numbers[good])
    numbers[BAD] = np.inf
    np.save(folder / "all.npy", numbers)
    for name, rows, some in (
        ("all", pairs, np.ones(200, bool)),
        ("few", np.searchsorted(good, pairs[kept]), kept),
    ):
        columns = zip(rows, labels[some], kinds[some], strict=True)
        lines = [f"{a},{b},{label},{kind}\n" for (a, b), label, kind in columns]
        (folder / f"{name}.csv").write_text("left,right,label,kind\n" + "".join(lines))
        (folder / f"{name}_train.csv").write_text(
            "left,right\n" + "".join(f"{a},{b}\n" for a, b in rows[:20])
        )
    return folder, kept


def test_measuring_leaves_out_the_pairs_of_bad_rows(labelled):
    folder, kept = labelled
    found = {}
    for name, more in (("all", ("--nonfinite", "nan")), ("few", ())):
        words = ("evaluate", "cosine", f"{name}.npy", f"{name}.csv", "--by", "kind", *more)
        found[name] = run_json(*words, cwd=folder)
        assert found[name].pop("seconds") > 0
    notes = found["all"].pop("notes")
    assert any(note.startswith("4 rows are not finite") for note in notes)
    assert found["few"].pop("notes") == [n for n in notes if "not finite" not in n]
    assert found["all"] == found["few"]
    assert found["all"]["n_pairs"] == kept.sum()
    refused("evaluate", "cosine", "all.npy", "all.csv", cwd=folder)


def test_seen_entities_are_told_apart_beside_bad_rows(labelled):
    folder, kept = labelled
    words = ("evaluate", "cosine", "all.npy", "all.csv", "--train", "all_train.csv")
    found = run_json(*words, "--nonfinite", "nan", cwd=folder)["entities"]
    pairs = np.loadtxt(folder / "all.csv", int, delimiter=",", skiprows=1)[:, :2]
    seen = np.isin(pairs, pairs[:20])
    counts = np.bincount(seen[kept].sum(axis=1), minlength=3)
    assert sum(one["n_pairs"] for one in found.values()) == kept.sum()
    assert {one["n_pairs"] for one in found.values()} == set(counts[counts > 0].tolist())


def test_features_of_bad_rows_are_not_numbers(labelled):
    folder, kept = labelled
    for name, more in (("all", ("--nonfinite", "nan")), ("few", ())):
        words = ("features", "cosine", f"{name}.npy", f"{name}.csv", "-o", f"{name}.h5", *more)
        run(*words, cwd=folder)
    with h5py.File(folder / "all.h5") as whole, h5py.File(folder / "few.h5") as few:
        assert np.isnan(whole["features"][:][~kept]).all()
        assert whole["features"][:][kept].tobytes() == few["features"][:].tobytes()
    assert "row 0" in refused("features", "cosine", "all.npy", "all.csv", "-o", "x.h5", cwd=folder)
