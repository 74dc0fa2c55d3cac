"""Groups: those of SciPy's graphs and trees, whatever the file the pairs stand in."""

import json
from itertools import combinations

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform

from fastpair import jobs
from fastpair.cli import commands
from fastpair.errors import (
    ArgumentError,
    DataError,
    FastpairError,
    MemoryBudgetError,
    MismatchError,
)
from fastpair.grouping import _distinct, cluster
from fastpair.kernels.groups import count_violating, join, number_groups


def numbered(groups):
    """Group numbers by first member."""
    seen = {}
    return [seen.setdefault(group, len(seen)) for group in groups]


some_pairs = st.integers(1, 30).flatmap(
    lambda n: st.tuples(
        st.just(n), st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)))
    )
)


@given(some_pairs)
def test_the_closure_is_that_of_a_graphs_components(case):
    count, pairs = case
    left, right = np.array(pairs, np.int64).reshape(-1, 2).T
    parents, groups = np.arange(count), np.empty(count, np.int64)
    middle = len(left) // 2
    join(parents, left[:middle], right[:middle])
    join(parents, left[middle:].astype(np.int32), right[middle:].astype(np.int32))
    found = number_groups(parents, groups)
    graph = coo_array((np.ones(len(left)), (left, right)), (count, count))
    expected, labels = connected_components(graph, directed=False)
    assert found == expected
    assert groups.tolist() == numbered(labels)


@given(some_pairs)
def test_a_pair_violates_transitivity_if_a_third_entity_pairs_with_one_of_the_two(case):
    count, pairs = case
    unlike = {(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]}
    partners = [{m for m in range(count) if (min(n, m), max(n, m)) in unlike} for n in range(count)]
    expected = sum(partners[i] - {j} != partners[j] - {i} for i, j in unlike)
    keys = _distinct([np.array([min(p) * count + max(p) for p in pairs if p[0] != p[1]], np.int64)])
    assert len(keys) == len(unlike)
    assert count_violating(keys, count, np.empty(count, np.uint64)) == expected


# --- files ----------------------------------------------------------------------------------------

LEFT, RIGHT = [0, 1, 3, 5, 4, 2, 0], [1, 2, 4, 6, 3, 7, 2]
SCORES = [0.9, 0.8, 0.7, 0.95, 0.6, 0.1, 0.2]
NAMES = ["a", "b", "NA", "d d", "007", "f", 'g"', "h"]
AT_HALF = [0, 0, 0, 1, 1, 2, 2, 3]
"""Groups at 0.5: a-b-NA, d d-007, f-g", h."""


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "embeddings.h5"
    with h5py.File(path, "w") as file:
        file["embeddings"] = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
        file["ids"] = NAMES
    jobs.project("cosine", path, tmp_path / "table.h5")
    return tmp_path / "table.h5"


def as_columns(folder, suffix):
    path = folder / f"scored{suffix}"
    columns = {
        "left": [NAMES[n] for n in LEFT],
        "right": [NAMES[n] for n in RIGHT],
        "score": SCORES,
    }
    if suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    else:
        pc.write_csv(pa.table(columns), path)
    return path


def groups_by_id(path):
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            return dict(zip(file["ids"].asstr()[:], file["group"][:].tolist(), strict=True))
    read = pq.read_table(path) if path.suffix == ".parquet" else read_text(path)
    return dict(zip(read["id"].to_pylist(), read["group"].to_pylist(), strict=True))


def read_text(path):
    kinds = {"id": pa.string(), "group": pa.int64()}
    separator = "\t" if ".tsv" in path.name else ","
    options = pc.ConvertOptions(column_types=kinds, strings_can_be_null=False)
    return pc.read_csv(path, pc.ReadOptions(), pc.ParseOptions(delimiter=separator), options)


@pytest.mark.parametrize("output", ["o.h5", "o.parquet", "o.csv", "o.tsv", "o.csv.gz"])
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_keys_and_scores_become_groups_of_keys(tmp_path, suffix, output):
    found = cluster(as_columns(tmp_path, suffix), tmp_path / output, threshold=0.5)
    groups = groups_by_id(tmp_path / output)
    order = ["a", "d d", "007", "f", "NA", 'g"', "b", "h"]
    assert set(groups) == set(order)
    together = {frozenset(n for n in groups if groups[n] == g) for g in groups.values()}
    assert together == {
        frozenset(s) for s in (["a", "b", "NA"], ["d d", "007"], ["f", 'g"'], ["h"])
    }
    assert (found["groups"], found["grouped"], found["accepted"]) == (4, 7, 5)
    assert found["sizes"] == {1: 1, 2: 2, 3: 1}
    assert found["largest"][0]["size"] == 3
    assert (found["violating"], found["implied"]) == (2, 1)


def test_a_table_brings_the_entities_that_no_pair_names(tmp_path, table):
    for path in (as_columns(tmp_path, ".csv"), kept_scores(tmp_path)):
        cluster(path, tmp_path / "o.h5", threshold=0.15, table=table, overwrite=True)
        groups = groups_by_id(tmp_path / "o.h5")
        assert list(groups) == NAMES
        assert list(groups.values()) == [0, 0, 0, 1, 1, 2, 2, 3]


def kept_scores(folder):
    path = folder / "kept.h5"
    with h5py.File(path, "w") as file:
        file.attrs.update(fastpair_kind="scores", format_version=1, unit="score")
        file["left"], file["right"], file["score"] = LEFT, RIGHT, np.float32(SCORES)
    return path


def test_scores_without_keys_need_their_pair_file(tmp_path, table):
    pairs, scores = tmp_path / "pairs.csv", tmp_path / "scores.h5"
    lines = [f"{i},{j}\n" for i, j in combinations(range(8), 2)]
    pairs.write_text("left,right\n" + "".join(lines))
    jobs.score(table, pairs, scores, keys="rows")
    with pytest.raises(ArgumentError, match="--pairs"):
        cluster(scores, tmp_path / "o.h5", threshold=0)
    found = cluster(scores, tmp_path / "o.csv", threshold=0.3, pairs=pairs)
    with h5py.File(scores) as file:
        accepted = file["score"][:] >= 0.3
    assert found["accepted"] == accepted.sum()
    left, right = np.array(list(combinations(range(8), 2))).T[:, accepted]
    expected = connected_components(coo_array((np.ones(len(left)), (left, right)), (8, 8)), False)
    assert found["groups"] == expected[0]
    pairs.write_text("left,right\n" + "".join(lines[:-1]))
    with pytest.raises(MismatchError, match="another number of pairs"):
        cluster(scores, tmp_path / "p.csv", threshold=0.3, pairs=pairs)
    assert not (tmp_path / "p.csv").exists()


@pytest.mark.parametrize("name", ["pairs.h5", "pairs.npy", "pairs.parquet", "named.csv"])
def test_keys_come_from_a_pair_file_of_any_format(tmp_path, table, name):
    rows, pairs, scores = (
        np.array(list(combinations(range(8), 2))),
        tmp_path / name,
        tmp_path / "s.h5",
    )
    columns = {}
    if name.endswith("h5"):
        with h5py.File(pairs, "w") as file:
            file["pairs"] = rows
    elif name.endswith("npy"):
        np.save(pairs, rows)
    elif name.endswith("parquet"):
        pq.write_table(pa.table({"id_a": rows[:, 0], "id_b": rows[:, 1]}), pairs)
    else:
        pairs.write_text("x,y\n" + "".join(f"{i},{j}\n" for i, j in rows))
        columns = {"left_column": "x", "right_column": "y"}
    jobs.score(table, pairs, scores, keys="rows", **columns)
    found = cluster(scores, tmp_path / "o.csv", threshold=0.3, pairs=pairs, **columns)
    with h5py.File(scores) as file:
        assert found["accepted"] == (file["score"][:] >= 0.3).sum()


@pytest.mark.parametrize("form", [{"threshold": 0.1}, {"top_k": 7}])
def test_a_matrix_gives_the_groups_of_its_pairs(tmp_path, table, form):
    jobs.matrix(table, tmp_path / "m.h5", **form)
    found = cluster(tmp_path / "m.h5", tmp_path / "o.h5", threshold=0.3)
    jobs.matrix(table, tmp_path / "dense.h5", dense=True)
    with h5py.File(tmp_path / "dense.h5") as file:
        graph = np.triu(file["matrix"][:] >= 0.3, 1)
    assert found["groups"] == connected_components(graph, directed=False)[0]
    expected = numbered(connected_components(graph, directed=False)[1])
    assert list(groups_by_id(tmp_path / "o.h5").values()) == expected
    if "threshold" in form:
        assert found["accepted"] == graph.sum()


def test_two_tables_have_groups_of_both(tmp_path, table):
    jobs.matrix(table, tmp_path / "m.h5", threshold=0.3, against=table)
    cluster(tmp_path / "m.h5", tmp_path / "o.h5", threshold=0.3)
    with h5py.File(tmp_path / "o.h5") as file:
        left, right = file["group"][:], file["group_right"][:]
        assert file["ids_right"].asstr()[:].tolist() == NAMES
    assert (left == right).all()  # every entity is itself in both tables
    cluster(tmp_path / "m.h5", tmp_path / "o.csv", threshold=0.3)
    text = (tmp_path / "o.csv").read_text().splitlines()
    assert text[0] == "id,group,side"
    assert [line.rsplit(",", 1)[1] for line in text[1:]] == ["left"] * 8 + ["right"] * 8


# --- linkage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["average", "complete"])
@given(seed=st.integers(0, 2**32 - 1))
def test_linkage_is_scipys_where_all_scores_are_known(tmp_path_factory, link, seed):
    folder = tmp_path_factory.mktemp("linkage")
    rng = np.random.default_rng(seed)
    count, threshold = int(rng.integers(2, 12)), 0.6
    full = rng.uniform(size=(count, count))
    full = (full + full.T) / 2
    left, right = np.triu_indices(count, 1)
    names = {"left": left.astype(str), "right": right.astype(str), "score": full[left, right]}
    pq.write_table(pa.table(names), folder / "s.parquet")
    cluster(folder / "s.parquet", folder / "o.csv", threshold=threshold, link=link)
    groups = {int(name): group for name, group in groups_by_id(folder / "o.csv").items()}
    components = connected_components(full >= threshold, directed=False)[1]
    expected = np.empty(count, object)
    for component in set(components):
        rows = np.flatnonzero(components == component)
        parts = [1]
        if len(rows) > 1:
            apart = squareform(1 - full[np.ix_(rows, rows)], checks=False)
            tree = linkage(apart, link)
            parts = fcluster(tree, np.nextafter(1 - threshold, 2), "distance")
        expected[rows] = [(component, part) for part in parts]
    assert numbered(groups[n] for n in range(count)) == numbered(expected)


def chain(folder, rows=(("a", "b", 0.9), ("b", "c", 0.8))):
    path = folder / "chain.csv"
    path.write_text("left,right,score\n" + "".join(f"{i},{j},{score}\n" for i, j, score in rows))
    return path


def test_a_chain_is_split_where_its_ends_are_not_a_pair(tmp_path):
    path, out = chain(tmp_path), tmp_path / "o.csv"
    assert cluster(path, out, threshold=0.5)["groups"] == 1
    found = cluster(path, out, threshold=0.5, link="complete", overwrite=True)
    assert (found["groups"], found["split"]) == (2, 1)
    assert groups_by_id(out) == {"a": 0, "b": 0, "c": 1}
    for missing, groups in ((0.5, 1), (0.1, 2)):
        found = cluster(path, out, threshold=0.5, link="average", missing=missing, overwrite=True)
        assert found["groups"] == groups


def test_a_table_scores_the_pairs_that_the_file_does_not_have(tmp_path, table):
    jobs.matrix(table, tmp_path / "dense.h5", dense=True)
    with h5py.File(tmp_path / "dense.h5") as file:
        full = file["matrix"][:].astype(float)
    left, right = np.triu_indices(8, 1)
    few = full[left, right] >= 0.2
    names = {"left": np.array(NAMES)[left[few]], "right": np.array(NAMES)[right[few]]}
    pq.write_table(pa.table({**names, "score": full[left, right][few]}), tmp_path / "s.parquet")
    options = {"threshold": 0.2, "table": table, "link": "average"}
    cluster(tmp_path / "s.parquet", tmp_path / "o.h5", **options)
    every = {"left": np.array(NAMES)[left], "right": np.array(NAMES)[right]}
    pq.write_table(pa.table({**every, "score": full[left, right]}), tmp_path / "all.parquet")
    cluster(tmp_path / "all.parquet", tmp_path / "all.h5", threshold=0.2, link="average")
    assert groups_by_id(tmp_path / "o.h5") == groups_by_id(tmp_path / "all.h5")


def test_the_scores_of_another_table_are_noticed(tmp_path, table):
    options = {"threshold": 0.5, "table": table, "link": "complete"}
    with pytest.raises(MismatchError, match="not those of"):
        cluster(as_columns(tmp_path, ".csv"), tmp_path / "o.csv", **options)


def test_linkage_is_in_the_unit_of_the_file(tmp_path, table):
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("left,right\n" + "".join(f"{i},{j}\n" for i, j in combinations(range(8), 2)))
    jobs.project("euclidean", tmp_path / "embeddings.h5", tmp_path / "euclidean.h5")
    for form, threshold in (({"distance": True}, 2.5), ({}, -2.5)):
        jobs.score(tmp_path / "euclidean.h5", pairs, tmp_path / "s.csv", keys="rows", **form)
        options = {"table": tmp_path / "euclidean.h5", "link": "complete"}
        out = tmp_path / f"o{threshold}.csv"
        scores = pc.read_csv(tmp_path / "s.csv")
        named = [[NAMES[n] for n in scores[side].to_pylist()] for side in ("left", "right")]
        assert scores.column_names[2] == ("distance" if form else "score")
        columns = pa.table([*named, scores.column(2)], scores.column_names)
        pq.write_table(columns, tmp_path / "s.parquet")
        cluster(tmp_path / "s.parquet", out, threshold=threshold, **options)
        (tmp_path / "s.csv").unlink()
    found = [groups_by_id(tmp_path / f"o{threshold}.csv") for threshold in (2.5, -2.5)]
    assert found[0] == found[1]
    assert 1 < len(set(found[0].values())) < 8


def test_a_group_too_large_for_the_memory_is_left_whole_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr("fastpair.grouping.LINKED_BYTES", 2**26)
    options = {"threshold": 0.5, "link": "complete", "memory": "64MiB"}
    found = cluster(chain(tmp_path), tmp_path / "o.csv", **options)
    assert (found["groups"], found["split"]) == (1, 0)
    assert "left whole" in found["notes"][0]


def test_pairs_that_outgrow_the_memory_still_connect(tmp_path, monkeypatch):
    monkeypatch.setattr("fastpair.grouping.PAIR_BYTES", 2**26)
    found = cluster(chain(tmp_path), tmp_path / "o.csv", threshold=0.5, memory="64MiB")
    assert (found["groups"], found["violating"], found["implied"]) == (1, None, None)
    assert "not counted" in found["notes"][0]
    with pytest.raises(MemoryBudgetError, match="--link single"):
        cluster(chain(tmp_path), tmp_path / "p.csv", threshold=0.5, link="complete", memory="64MiB")


# --- the rest -------------------------------------------------------------------------------------


def test_of_distances_the_small_ones_are_accepted(tmp_path):
    found = cluster(chain(tmp_path), tmp_path / "o.csv", threshold=0.85, distance=True)
    assert groups_by_id(tmp_path / "o.csv") == {"a": 0, "b": 1, "c": 1}
    assert found["accepted"] == 1


def test_repeats_and_both_directions_count_once(tmp_path):
    rows = [("a", "b", 0.9), ("b", "a", 0.9), ("a", "b", 0.7), ("c", "c", 1.0)]
    found = cluster(chain(tmp_path, rows), tmp_path / "o.csv", threshold=0.5)
    assert (found["groups"], found["implied"], found["violating"]) == (2, 0, 0)


def test_labelled_pairs_say_how_right_the_groups_are(tmp_path):
    truth = tmp_path / "truth.csv"
    truth.write_text("left,right,label\na,b,1\na,c,1\nb,c,0\nd,a,1\nd,b,0\n")
    rows = [("a", "b", 0.9), ("b", "c", 0.8), ("d", "d", 0.1)]
    found = cluster(chain(tmp_path, rows), tmp_path / "o.csv", threshold=0.5, truth=truth)
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx(2 / 3)


def test_what_cannot_be_grouped_is_refused(tmp_path, table):
    path, out = chain(tmp_path), tmp_path / "o.csv"
    jobs.matrix(table, tmp_path / "dense.h5", dense=True)
    for error, options in (
        (ArgumentError, {"threshold": np.nan}),
        (ArgumentError, {"threshold": 0.5, "link": "ward"}),
        (ArgumentError, {"threshold": 0.5, "missing": 0.1}),
        (ArgumentError, {"threshold": 0.5, "pairs": path}),
        (DataError, {"threshold": 0.5, "score_column": "left"}),
        (DataError, {"threshold": 0.5, "score_column": "other"}),
        (DataError, {"threshold": 0.5, "file": tmp_path / "dense.h5"}),
        (DataError, {"threshold": 0.5, "file": table}),
        (FastpairError, {"threshold": 0.5, "table": table}),
    ):
        with pytest.raises(error):
            cluster(**{"file": path, "output": out, **options})
        assert not out.exists()


def test_the_command_prints_what_was_found(tmp_path):
    path, out = chain(tmp_path), tmp_path / "o.csv"
    done = CliRunner().invoke(
        commands, ["cluster", str(path), "-o", str(out), "--threshold", "0.5"]
    )
    assert done.exit_code == 0, done.output
    assert "2 accepted pairs, 3 entities: 1 groups" in done.stdout
    assert "3: a, b, c" in done.stdout
    arguments = [
        "cluster",
        str(path),
        "-o",
        str(out),
        "--threshold",
        "0.5",
        "--overwrite",
        "--json",
    ]
    assert json.loads(CliRunner().invoke(commands, arguments).stdout)["groups"] == 1
