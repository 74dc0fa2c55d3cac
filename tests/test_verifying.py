"""A flipped byte anywhere in what fastpair writes is found, and told by its block and rows."""

import json

import h5py
import numpy as np
import pyarrow as pa
import pytest
from test_cli import run
from test_files import a_plan, some_rows, write_table

from fastpair import results
from fastpair.compression import FILTERS, write_compressed
from fastpair.errors import ArgumentError, FileError
from fastpair.files import describe, read_table, write_model
from fastpair.jobs import info
from fastpair.results import DenseWriter, ScoreFile, SparseWriter, TopKWriter
from fastpair.verifying import verify

IDS = pa.array([f"row {number}" for number in range(40)])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(results, "SCORE_BLOCK", 16)
    monkeypatch.setattr(results, "fitting_rows", lambda columns: 16)


def make(kind, path):
    numbers = np.random.default_rng(0).random((40, 3), np.float32)
    made = {"identity": {"table": "abc"}, "ids": IDS}
    if kind == "scores":
        with ScoreFile(path, 40, {"table": "abc"}) as file:
            for number in range(3):
                file.write_block(number, numbers[file.block(number), 0])
            file.finish()
    elif kind == "dense":
        with DenseWriter(path, (40, 3), **made) as file:
            file.append(numbers)
            file.finish()
    elif kind == "top_k":
        with TopKWriter(path, (40, 3), **made) as file:
            file.append(numbers.view(np.int32).astype(np.int64), numbers)
            file.finish()
    elif kind == "threshold":
        with SparseWriter(path, (40, 9), {"table": "abc"}) as file:
            file.append(np.ones(40, np.int64), np.arange(40), numbers[:, 0])
            file.finish(ids=IDS)
    else:
        plan = a_plan()
        write_table(path, plan, some_rows(plan, 40), IDS)


KINDS = ["scores", "dense", "top_k", "threshold", "table"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_in_any_number_or_id_is_found(tmp_path, kind):
    path = tmp_path / "f.h5"
    make(kind, path)
    found = verify(path)
    assert (found["whole"], found["damaged"], found["unchecked"]) == (True, [], [])
    content = path.read_bytes()
    with h5py.File(path) as file:
        sets = {name: item for name, item in file.items() if item.size}
        places = {
            name: (item.id.get_offset(), item.id.get_storage_size()) for name, item in sets.items()
        }
    for name, (start, size) in places.items():
        for place in (start, start + size // 2, start + size - 1):
            damaged = bytearray(content)
            damaged[place] ^= 16
            path.write_bytes(damaged)
            assert verify(path)["whole"] is False, (name, place - start)


def test_damage_is_told_by_its_rows_and_exits_with_1(tmp_path):
    make("dense", tmp_path / "d.h5")
    with h5py.File(tmp_path / "d.h5", "r+") as file:
        file["matrix"][20, 1] += 1
    found = run("info", tmp_path / "d.h5", "--verify", code=1)
    assert "is damaged: rows 16 to 31 of matrix (block 1) do not agree" in found.stderr
    told = json.loads(run("info", tmp_path / "d.h5", "--verify", "--json", code=1).stdout)
    assert [(d["block"], d["first"], d["last"]) for d in told["damaged"]] == [(1, 16, 31)]
    assert describe(tmp_path / "d.h5")["whole"] is False


def test_a_changed_attribute_or_id_is_found(tmp_path):
    make("table", tmp_path / "t.h5")
    with h5py.File(tmp_path / "t.h5", "r+") as file:
        file.attrs["unit"] = "grade"
    assert [d["where"] for d in verify(tmp_path / "t.h5")["damaged"]] == ["attributes"]
    with h5py.File(tmp_path / "t.h5", "r+") as file:
        file["ids"][3] = "row 4"
    assert "ids" in [d["where"] for d in verify(tmp_path / "t.h5")["damaged"]]
    with pytest.raises(FileError, match="ids do not agree with their checksum"):
        read_table(tmp_path / "t.h5")


def test_models_and_files_of_others_are_read_through(tmp_path):
    from fastpair.model import builtin

    write_model(tmp_path / "m.h5", builtin("cosine"))
    assert verify(tmp_path / "m.h5")["whole"]
    with h5py.File(tmp_path / "o.h5", "w") as file:
        file.create_dataset("x", data=np.arange(10**4), chunks=(1000,), fletcher32=True)
        place = file["x"].id.get_chunk_info(3).byte_offset
    assert verify(tmp_path / "o.h5")["unchecked"] == ["x"]
    content = bytearray((tmp_path / "o.h5").read_bytes())
    content[place] ^= 1
    (tmp_path / "o.h5").write_bytes(content)
    assert verify(tmp_path / "o.h5")["damaged"][0]["where"] == "x"
    (tmp_path / "p.csv").write_text("left,right\na,b\nc,d\n")
    assert info(tmp_path / "p.csv", verify=True)["damaged"] == []


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("kind", ["scores", "top_k"])
def test_compressed_files_hold_the_same_and_can_be_verified(tmp_path, name, kind):
    numbers = np.round(np.random.default_rng(0).random((40, 3), np.float32), 1)
    columns = [numbers[:, 0]] if kind == "scores" else [np.argsort(numbers, 1), numbers]
    for path in (tmp_path / "a.h5", tmp_path / "b.h5"):
        args = (40, {}) if kind == "scores" else ((40, 3), {})
        with (ScoreFile if kind == "scores" else TopKWriter)(path, *args) as file:
            file.append(*columns)
            write_compressed(file, name)
            file.discard()
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    with h5py.File(tmp_path / "a.h5") as file:
        for column, expected in zip(file.attrs["checksum_columns"].split(), columns, strict=True):
            assert np.array_equal(file[column][:], expected)
            assert file[column].id.get_create_plist().get_nfilters() > 0
    assert verify(tmp_path / "a.h5")["whole"]
    if name == "blosc2":
        run("info", tmp_path / "a.h5", "--verify")  # in a process that knows no plugin yet
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "b.h5"]


def test_a_file_that_its_writer_did_not_close_is_told(tmp_path):
    import os

    if not os.fork():
        file = h5py.File(tmp_path / "e.h5", "w", libver="latest")
        file["embeddings"] = np.zeros((9, 3), np.float32)
        file.flush()
        os._exit(0)
    os.wait()
    with pytest.raises(FileError, match="was not closed by the program that wrote it"):
        describe(tmp_path / "e.h5")


def test_unknown_filters_are_refused(tmp_path):
    with (
        ScoreFile(tmp_path / "s.h5", 0, {}) as file,
        pytest.raises(ArgumentError, match="expected one of gzip"),
    ):
        write_compressed(file, "zip")
