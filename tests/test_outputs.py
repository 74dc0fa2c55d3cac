"""The same results in every format: HDF5, CSV, TSV (.gz, .zst), Parquet, npy and npz."""

import os

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from fastpair import jobs
from fastpair.errors import ArgumentError, FileError, MismatchError
from fastpair.files import write_embeddings

IDS = ["007", " 7", "NA", "a,b", 'say "hi"', *(f"e{n}" for n in range(35))]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((40, 8)).astype(np.float32)
    write_embeddings(folder / "e.h5", [(0, vectors)], (40, 8), ids=pa.array(IDS))
    write_embeddings(folder / "few.h5", [(0, vectors[:6] + 1)], (6, 8))
    for model, source, name in (
        ("cosine", "e.h5", "t.h5"),
        ("euclidean", "e.h5", "d.h5"),
        ("cosine", "few.h5", "f.h5"),
    ):
        jobs.project(model, folder / source, folder / name)
    left, right = rng.integers(0, 40, (2, 300))
    names = pa.array(IDS)
    table = pa.table([names.take(pa.array(side)) for side in (left, right)], ["id_a", "id_b"])
    pq.write_table(table, folder / "p.parquet")
    return folder


def read_lines(path):
    """A list as a table whose keys are text."""
    if path.suffix == ".parquet":
        return pq.read_table(path)
    separator = "\t" if ".tsv" in path.name else ","
    types = {"left": pa.string(), "right": pa.string(), "id_a": pa.string(), "id_b": pa.string()}
    return pacsv.read_csv(
        pa.input_stream(path, compression={".gz": "gzip", ".zst": "zstd"}.get(path.suffix)),
        parse_options=pacsv.ParseOptions(delimiter=separator),
        convert_options=pacsv.ConvertOptions(column_types=types, strings_can_be_null=False),
    )


LISTS = ["o.csv", "o.tsv", "o.csv.gz", "o.tsv.zst", "o.parquet"]


@pytest.mark.parametrize("name", LISTS)
def test_scores_keep_their_ids_in_every_format(inputs, tmp_path, name):
    jobs.score(inputs / "t.h5", inputs / "p.parquet", tmp_path / "o.h5")
    jobs.score(inputs / "t.h5", inputs / "p.parquet", tmp_path / name)
    with h5py.File(tmp_path / "o.h5") as file:
        expected = file["score"][:]
    found, pairs = read_lines(tmp_path / name), pq.read_table(inputs / "p.parquet")
    assert found.column_names == ["id_a", "id_b", "score"]
    assert [found["id_a"].to_pylist(), found["id_b"].to_pylist()] == [
        pairs["id_a"].to_pylist(),
        pairs["id_b"].to_pylist(),
    ]
    assert np.array_equal(found["score"].to_numpy().astype(np.float32), expected)


def test_the_third_column_is_named_by_what_is_written(inputs, tmp_path):
    jobs.score(inputs / "d.h5", inputs / "p.parquet", tmp_path / "d.csv", distance=True)
    assert (tmp_path / "d.csv").read_text().startswith("id_a,id_b,distance\n")


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("against", [None, "f.h5"])
def test_the_best_of_each_row_are_listed_by_id_and_rank(inputs, tmp_path, name, against):
    other = None if against is None else inputs / against
    for path in (tmp_path / "o.h5", tmp_path / name):
        jobs.matrix(inputs / "t.h5", path, top_k=9, against=other)
    with h5py.File(tmp_path / "o.h5") as file:
        indices, scores = file["indices"][:], file["scores"][:]
    rows, places = np.nonzero(indices >= 0)
    found = read_lines(tmp_path / name)
    right = [IDS[i] if other is None else i for i in indices[rows, places]]
    assert found["left"].to_pylist() == [IDS[row] for row in rows]
    assert list(map(str, found["right"].to_pylist())) == list(map(str, right))
    assert found["rank"].to_pylist() == (places + 1).tolist()
    assert np.array_equal(found["score"].to_numpy().astype(np.float32), scores[rows, places])


def test_matrices_load_into_numpy_and_scipy(inputs, tmp_path):
    sparse = pytest.importorskip("scipy.sparse")
    forms = {"dense": {"dense": True}, "above": {"threshold": 0.2}}
    for name, options in forms.items():
        suffix = ".npy" if name == "dense" else ".npz"
        for path in (tmp_path / f"{name}.h5", tmp_path / f"{name}{suffix}"):
            jobs.matrix(inputs / "t.h5", path, against=inputs / "f.h5", **options)
    with h5py.File(tmp_path / "dense.h5") as file:
        mapped = np.load(tmp_path / "dense.npy", mmap_mode="r", allow_pickle=False)
        assert np.array_equal(mapped, file["matrix"][:])
    with h5py.File(tmp_path / "above.h5") as file:
        parts = file["data"][:], file["indices"][:], file["indptr"][:]
        kept = sparse.csr_array(parts, shape=(40, 6))
    assert (sparse.load_npz(tmp_path / "above.npz") != kept).nnz == 0
    assert kept.nnz > 5


@pytest.mark.parametrize("name", ["h.csv", "h.tsv.gz"])
def test_a_histogram_is_a_line_for_each_bin(inputs, tmp_path, name):
    found = jobs.matrix(inputs / "t.h5", tmp_path / name, histogram=True, bins=7)
    lines = read_lines(tmp_path / name)
    assert lines.column_names == ["from", "to", "count"]
    assert lines["count"].to_pylist() == found["counts"]


def test_what_a_form_cannot_be_written_as_is_told(inputs, tmp_path):
    with pytest.raises(ArgumentError, match=r"dense matrix is written as .h5, .hdf5, .npy"):
        jobs.matrix(inputs / "t.h5", tmp_path / "o.npz", dense=True)
    with pytest.raises(ArgumentError, match="--compression gzip is for HDF5"):
        jobs.score(inputs / "t.h5", inputs / "p.parquet", tmp_path / "o.csv", compression="gzip")
    with pytest.raises(ArgumentError, match="--compression gzip is for HDF5"):
        jobs.matrix(inputs / "t.h5", tmp_path / "o.npy", dense=True, compression="gzip")


@pytest.mark.parametrize("name", ["o.h5", "o.csv", "o.parquet"])
def test_an_existing_result_is_kept_unless_overwriting_is_allowed(inputs, tmp_path, name):
    (tmp_path / name).write_text("mine")
    for job in (
        lambda **o: jobs.matrix(inputs / "t.h5", tmp_path / name, top_k=2, **o),
        lambda **o: jobs.score(inputs / "t.h5", inputs / "p.parquet", tmp_path / name, **o),
    ):
        with pytest.raises(FileError, match="exists already"):
            job()
        assert (tmp_path / name).read_text() == "mine"
        job(overwrite=True)
        assert os.listdir(tmp_path) == [name]
        (tmp_path / name).write_text("mine")


def begun(inputs, output, monkeypatch, **options):
    """Leave a run that died behind its first block."""

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastpair.results.ScoreFile.finish", die)
        with pytest.raises(KeyboardInterrupt):
            jobs.score(inputs / "t.h5", inputs / "p.parquet", output, **options)


def test_what_differs_between_two_runs_is_told(inputs, tmp_path, monkeypatch):
    pairs = tmp_path / "p.parquet"
    pairs.write_bytes((inputs / "p.parquet").read_bytes())
    output = tmp_path / "s.h5"
    begun(inputs, output, monkeypatch)
    for told, table, file, options in (
        ("right table", "t.h5", inputs / "p.parquet", {"against": inputs / "t2.h5"}),
        ("time of the pair file", "t.h5", pairs, {}),
        ("unit", "d.h5", inputs / "p.parquet", {}),
    ):
        if told == "right table":
            vectors = np.ones((40, 8), np.float32)
            write_embeddings(inputs / "e2.h5", [(0, vectors)], (40, 8), ids=pa.array(IDS))
            jobs.project("cosine", inputs / "e2.h5", inputs / "t2.h5")
        with pytest.raises(MismatchError, match=f"its {told} is|its table is"):
            jobs.score(inputs / table, file, output, resume=True, **options)
    found = jobs.score(inputs / "t.h5", inputs / "p.parquet", output, resume=True)
    assert found["resumed_from"] == 300
    assert sorted(os.listdir(tmp_path)) == ["p.parquet", "s.h5"]


def test_copies_of_a_pair_file_give_equal_bytes(inputs, tmp_path):
    pairs = tmp_path / "p.parquet"
    pairs.write_bytes((inputs / "p.parquet").read_bytes())
    os.utime(pairs, (1, 1))
    jobs.score(inputs / "t.h5", inputs / "p.parquet", tmp_path / "a.h5")
    jobs.score(inputs / "t.h5", pairs, tmp_path / "b.h5")
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
