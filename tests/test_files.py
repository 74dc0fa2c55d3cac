"""What fastpair writes as HDF5: whole or absent, equal bytes for equal runs, readable by others."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpair.errors import ArgumentError, DataError, FileError, MismatchError
from fastpair.files import (
    TableWriter,
    describe,
    plan_from_json,
    plan_to_json,
    read_model,
    read_table,
    write_embeddings,
    write_model,
    write_pairs,
)
from fastpair.hdf5 import open_hdf5, read_text, write_text
from fastpair.ids import check_ids
from fastpair.kernels import Plan, RowLayout
from fastpair.results import (
    SCORE_BLOCK,
    DenseWriter,
    ScoreFile,
    SparseWriter,
    TopKWriter,
    write_filtered_scores,
    write_histogram,
)
from fastpair.scipy_files import write_csr
from fastpair.staging import WRITING, Staging, check_output, remove_exports

STRANGE_IDS = ["NA", "007", "null", " 7", "", "naïve", "a,b", 'q"uote', "two\nlines", "日本"]


def a_plan(precision="float32", bias=True):
    columns = ((20, 3), (0, 5), (2, 0), (0, 0), (1, 1))
    return Plan(RowLayout(columns, bias, precision), 0.1, "negative_root", 2.5, -1 / 3)


def some_rows(plan, count, seed=0):
    """Structured rows whose padding bytes are deliberately not zero."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 255, (count, plan.layout.row_bytes), np.uint8)
    rows = rows.reshape(-1).view(plan.layout.dtype).copy()
    for name in rows.dtype.names:
        rows[name] = rng.integers(-100, 100, rows[name].shape)
    return rows


def write_table(path, plan, rows, ids=None, **options):
    given = {"fingerprint": "f" * 64, "model_name": "m.h5", "unit": "log-odds", **options}
    with TableWriter(path, len(rows), plan, ids=ids, **given) as writer:
        for start in range(0, len(rows), 7):
            writer.write(start, rows[start : start + 7])


# --- tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("random_access", [True, False])
def test_a_table_reads_back_as_it_was_written(tmp_path, precision, random_access):
    plan = a_plan(precision)
    rows = some_rows(plan, 100)
    ids = pa.array([f"row {number}" for number in range(100)])
    write_table(tmp_path / "t.h5", plan, rows, ids, threshold=0.25, side="left")
    table = read_table(tmp_path / "t.h5", random_access=random_access)
    assert table.rows.shape == (100, plan.layout.row_bytes)
    assert table.rows.flags.c_contiguous
    assert table.rows.ctypes.data % 64 == 0
    back = table.rows.reshape(-1).view(plan.layout.dtype)
    for name in rows.dtype.names:
        assert np.array_equal(back[name], rows[name])
    assert table.plan == plan
    assert table.ids is not None
    assert table.ids.equals(ids)
    assert (table.side, table.unit, table.threshold) == ("left", "log-odds", 0.25)
    assert (table.fingerprint, table.model_name) == ("f" * 64, "m.h5")


def test_a_table_can_be_read_with_plain_h5py(tmp_path):
    plan = a_plan()
    rows = some_rows(plan, 50)
    write_table(tmp_path / "t.h5", plan, rows)
    with h5py.File(tmp_path / "t.h5") as file:
        assert file["rows"].id.get_offset() % 4096 == 0
        assert np.array_equal(file["rows"]["product"], rows["product"])
        assert file.attrs["precision"] == "float32"
        assert file.attrs["padded_lengths"].tolist()[0] == [32, 16]
        assert file.attrs["true_lengths"].tolist()[0] == [20, 3]
        raw = read_table(tmp_path / "t.h5").rows.reshape(-1).view(plan.layout.dtype)
        assert np.array_equal(file["rows"][:], raw)


def test_a_table_that_another_tool_compressed_is_still_read(tmp_path):
    plan = a_plan()
    write_table(tmp_path / "t.h5", plan, some_rows(plan, 50))
    expected = read_table(tmp_path / "t.h5").rows
    with h5py.File(tmp_path / "t.h5", "r+") as file:
        rows = file["rows"][:]
        del file["rows"]
        file.create_dataset("rows", data=rows, chunks=(10,), compression="gzip")
    assert np.array_equal(read_table(tmp_path / "t.h5").rows, expected)


def test_equal_tables_have_equal_bytes_at_another_time(tmp_path):
    plan = a_plan()
    rows = some_rows(plan, 30)
    ids = pa.array([str(number) for number in range(30)])
    write_table(tmp_path / "a.h5", plan, rows, ids)
    time.sleep(1.1)  # HDF5 keeps times in whole seconds
    rows[["product", "bias"]] = rows[["product", "bias"]].copy()
    write_table(tmp_path / "b.h5", plan, rows, ids)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_a_table_without_rows_reads_back(tmp_path):
    plan = a_plan()
    write_table(tmp_path / "t.h5", plan, some_rows(plan, 0))
    assert read_table(tmp_path / "t.h5").rows.shape == (0, plan.layout.row_bytes)


def test_a_table_that_misses_rows_is_not_left_behind(tmp_path):
    plan = a_plan()
    path = tmp_path / "t.h5"
    with (
        pytest.raises(ArgumentError, match="7 of 9 rows"),
        TableWriter(path, 9, plan, fingerprint="", model_name="", unit="grade") as writer,
    ):
        writer.write(0, some_rows(plan, 7))
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_bit_in_the_rows_is_noticed(tmp_path):
    plan = a_plan()
    write_table(tmp_path / "t.h5", plan, some_rows(plan, 100))
    with h5py.File(tmp_path / "t.h5") as file:
        place = file["rows"].id.get_offset() + 1000
    content = bytearray((tmp_path / "t.h5").read_bytes())
    content[place] ^= 1
    (tmp_path / "t.h5").write_bytes(content)
    with pytest.raises(FileError, match="checksum"):
        read_table(tmp_path / "t.h5")
    assert describe(tmp_path / "t.h5")["whole"] is False


def test_a_file_cut_at_any_length_is_refused_in_one_sentence(tmp_path):
    plan = a_plan()
    ids = pa.array([f"row {number}" for number in range(300)])
    write_table(tmp_path / "t.h5", plan, some_rows(plan, 300), ids)
    content = (tmp_path / "t.h5").read_bytes()
    cut = tmp_path / "cut.h5"
    for length in [0, 1, 7, 8, 50, 96, 500, 2048, 4096, 9000, len(content) // 2, len(content) - 1]:
        cut.write_bytes(content[:length])
        for read in (read_table, describe, read_model):
            with pytest.raises(FileError) as caught:
                read(cut)
            assert "cut.h5" in str(caught.value)
            assert "\n" not in str(caught.value)


def test_a_file_of_another_kind_or_a_newer_version_is_refused(tmp_path):
    write_pairs(tmp_path / "p.h5", [(np.array([0]), np.array([1]), None)], 1)
    with pytest.raises(FileError, match="of kind pairs, but a file of kind table"):
        read_table(tmp_path / "p.h5")
    with h5py.File(tmp_path / "p.h5", "r+") as file:
        file.attrs["format_version"] = 99
    with pytest.raises(FileError, match="format version 99"):
        read_table(tmp_path / "p.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = [1.0]
    with pytest.raises(FileError, match="not fastpair's"):
        read_table(tmp_path / "other.h5")


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 40), st.booleans())
def test_a_plan_survives_its_text(number, columns, bias):
    layout = RowLayout(((columns, 1), (0, 0), (3, columns), (0, 0), (0, 0)), bias, "int8")
    plan = Plan(layout, number, "identity", 1.5, number, (1.0, 0.1, 1 / 3, 2.0, 1e-9))
    assert plan_from_json(plan_to_json(plan)) == plan


# --- ids ----------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))))
def test_any_text_without_nul_survives_hdf5(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("ids") / "ids.h5"
    with h5py.File(path, "w") as file:
        write_text(file, "ids", pa.array(texts, pa.string()))
    with h5py.File(path) as file:
        assert read_text(file["ids"]).to_pylist() == texts


@pytest.mark.parametrize("longest", [1, 300])
def test_strange_ids_are_kept_and_others_can_read_them(tmp_path, longest):
    ids = [*STRANGE_IDS, "x" * longest]
    with h5py.File(tmp_path / "ids.h5", "w") as file:
        write_text(file, "ids", pa.array(ids).slice(0))
    with h5py.File(tmp_path / "ids.h5") as file:
        assert list(file["ids"].asstr()[:]) == ids
        assert read_text(file["ids"]).to_pylist() == ids
        assert read_text(file["ids"], 2, 4).to_pylist() == ["null", " 7"]


def test_ids_that_cannot_name_rows_are_refused_with_an_example():
    with pytest.raises(DataError, match="'b' \\(2 times\\)"):
        check_ids(pa.array(["a", "b", "b"]), "e.h5")
    with pytest.raises(DataError, match="no id in row 1"):
        check_ids(pa.array(["a", None]), "e.h5")
    with pytest.raises(DataError, match="2 ids for 3 rows"):
        check_ids(pa.array(["a", "b"]), "e.h5", 3)
    with pytest.raises(DataError, match="NUL"):
        check_ids(pa.array(["a\0b"]), "e.h5")


# --- outputs ------------------------------------------------------------------------------------


def test_an_existing_file_is_kept_unless_overwriting_is_allowed(tmp_path):
    write_histogram(tmp_path / "h.h5", [0.0, 1.0], [3])
    before = (tmp_path / "h.h5").read_bytes()
    with pytest.raises(FileError, match="exists already"):
        write_histogram(tmp_path / "h.h5", [0.0, 2.0], [4])
    assert (tmp_path / "h.h5").read_bytes() == before
    write_histogram(tmp_path / "h.h5", [0.0, 2.0], [4], overwrite=True)
    assert (tmp_path / "h.h5").read_bytes() != before
    assert not (tmp_path / "h.h5.partial").exists()


def test_places_where_nothing_can_be_written_are_named(tmp_path):
    with pytest.raises(FileError, match=r"folder .*nowhere does not exist"):
        write_histogram(tmp_path / "nowhere" / "h.h5", [0.0, 1.0], [3])
    with pytest.raises(FileError, match="is a folder"):
        write_histogram(tmp_path, [0.0, 1.0], [3])


def test_an_input_is_never_replaced_by_the_output(tmp_path):
    source = tmp_path / "in.h5"
    source.write_text("")
    (tmp_path / "link.h5").symlink_to(source)
    os.link(source, tmp_path / "out.h5.partial")
    for name in ("in.h5", "link.h5", "out.h5"):
        with pytest.raises(FileError, match="is read for it"):
            check_output(tmp_path / name, overwrite=True, inputs=[tmp_path / "no.h5", source])
    (tmp_path / "dangling.h5").symlink_to(tmp_path / "nowhere.h5")
    with pytest.raises(FileError, match="link to nothing"):
        check_output(tmp_path / "dangling.h5", overwrite=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(FileError, match="Permission denied"):
        write_histogram(tmp_path / "h.h5", [0.0, 1.0], [3])


def run_python(code, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_second_process_is_refused_while_the_first_writes(tmp_path):
    with ScoreFile(tmp_path / "s.h5", 10, {}):
        process = run_python(
            """
            import sys
            from fastpair.results import ScoreFile
            try:
                ScoreFile(sys.argv[1], 10, {})
            except Exception as error:
                print(type(error).__name__, error)
            """,
            tmp_path / "s.h5",
        )
        said = process.communicate()[0]
        assert said.startswith("FileError")
        assert "another process" in said
    with ScoreFile(tmp_path / "s.h5", 10, {}) as scores:
        scores.write_block(0, np.zeros(10, np.float32))
        scores.finish()


WRITERS = {
    "raw": "ScoreFile(sys.argv[1], 10_000_000, {})",
    "dense": "DenseWriter(sys.argv[1], (3000, 3000), {})",
    "hdf5": "write_embeddings(sys.argv[1], [(0, np.ones((9000, 400)))], (9000, 400))",
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, writer):
    process = run_python(
        f"""
        import resource, sys
        import numpy as np
        from fastpair.files import write_embeddings
        from fastpair.results import DenseWriter, ScoreFile
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        try:
            {WRITERS[writer]}
        except Exception as error:
            print(type(error).__name__, error)
        """,
        tmp_path / "out.h5",
    )
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert said.startswith("FileError")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_exception_in_the_middle_leaves_nothing_behind(tmp_path):
    def blocks():
        yield 0, np.zeros((5, 3), np.float32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_embeddings(tmp_path / "e.h5", blocks(), (10, 3))
    assert list(tmp_path.iterdir()) == []


# --- scores -------------------------------------------------------------------------------------

COUNT = 3 * SCORE_BLOCK + 12345
IDENTITY = {"table": "abc", "pairs": "def"}


def scores_of(number):
    size = min(SCORE_BLOCK, COUNT - number * SCORE_BLOCK)
    return np.random.default_rng(number).standard_normal(size, np.float32)


def finish_scores(path, order=range(4), **options):
    with ScoreFile(path, COUNT, IDENTITY, attributes={"unit": "log-odds"}, **options) as scores:
        before = scores.done.copy()
        for number in order:
            if not scores.done[number]:
                scores.write_block(number, scores_of(number))
        scores.finish()
    return before


KILLED_RUN = """
import sys, time
sys.path.insert(0, sys.argv[2])
from test_files import COUNT, IDENTITY, scores_of
from fastpair.results import ScoreFile
with ScoreFile(sys.argv[1], COUNT, IDENTITY, attributes={"unit": "log-odds"}) as scores:
    for number in (2, 0):
        scores.write_block(number, scores_of(number))
    print("written", flush=True)
    time.sleep(60)
"""


def test_a_killed_run_is_resumed_to_the_same_bytes(tmp_path):
    finish_scores(tmp_path / "whole.h5")
    process = run_python(KILLED_RUN, tmp_path / "s.h5", Path(__file__).parent)
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "s.h5").exists()
    found = describe(tmp_path / "s.h5.partial")
    assert (found["blocks_done"], found["blocks"]) == (2, 4)
    assert "unfinished" in found["summary"]
    assert finish_scores(tmp_path / "s.h5", resume=True).tolist() == [True, False, True, False]
    assert (tmp_path / "s.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert describe(tmp_path / "s.h5")["whole"] is True
    with h5py.File(tmp_path / "s.h5") as file:
        assert np.array_equal(file["score"][-12345:], scores_of(3))


def test_blocks_in_any_order_give_the_same_bytes(tmp_path):
    finish_scores(tmp_path / "a.h5")
    finish_scores(tmp_path / "b.h5", order=[3, 1, 0, 2])
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def begin_scores(path, *numbers):
    with ScoreFile(path, COUNT, IDENTITY, attributes={"unit": "log-odds"}) as scores:
        for number in numbers:
            scores.write_block(number, scores_of(number))


def test_a_block_that_reached_the_disk_only_partly_is_done_again(tmp_path):
    begin_scores(tmp_path / "s.h5", 0, 1)
    with h5py.File(tmp_path / "s.h5.partial") as file:
        place = file["score"].id.get_offset() + 4 * 5
    with open(tmp_path / "s.h5.partial", "r+b") as file:
        file.seek(place)
        file.write(b"1234")
    with ScoreFile(tmp_path / "s.h5", COUNT, IDENTITY, resume=True) as scores:
        assert scores.done.tolist() == [False, True, False, False]
        assert np.array_equal(scores.scores(1), scores_of(1))


@pytest.mark.parametrize("length", [0, 10, 800, 5000])
def test_a_run_killed_before_its_structure_was_whole_starts_anew(tmp_path, length):
    begin_scores(tmp_path / "s.h5")
    content = (tmp_path / "s.h5.partial").read_bytes()
    (tmp_path / "s.h5.partial").write_bytes(content[:length])
    assert not finish_scores(tmp_path / "s.h5", resume=True).any()


def test_unfinished_work_of_another_run_is_not_continued(tmp_path):
    begin_scores(tmp_path / "s.h5", 0)
    with pytest.raises(MismatchError, match="its pairs is 'def', now it is 'xyz'"):
        ScoreFile(tmp_path / "s.h5", COUNT, {**IDENTITY, "pairs": "xyz"}, resume=True)
    with pytest.raises(MismatchError, match="its size is 'score 3158073'"):
        ScoreFile(tmp_path / "s.h5", COUNT - 1, IDENTITY, resume=True)
    assert describe(tmp_path / "s.h5.partial")["blocks_done"] == 1


def test_unfinished_work_is_not_thrown_away_unasked(tmp_path):
    begin_scores(tmp_path / "s.h5", 0)
    with pytest.raises(FileError, match="--resume to go on"):
        ScoreFile(tmp_path / "s.h5", COUNT, IDENTITY)
    with ScoreFile(tmp_path / "s.h5", COUNT, IDENTITY, overwrite=True) as scores:
        assert not scores.done.any()


def test_scores_are_not_finished_with_holes_or_blocks_of_another_size(tmp_path):
    with ScoreFile(tmp_path / "s.h5", COUNT, IDENTITY) as scores:
        with pytest.raises(ArgumentError, match="block 0 of 4"):
            scores.finish()
        with pytest.raises(ArgumentError, match="\\(12345,\\) numbers"):
            scores.write_block(3, scores_of(0))
        scores.discard()
    assert list(tmp_path.iterdir()) == []


def test_scores_of_no_pairs_are_a_file_too(tmp_path):
    with ScoreFile(tmp_path / "s.h5", 0, {}) as scores:
        scores.finish()
    with h5py.File(tmp_path / "s.h5") as file:
        assert file["score"].shape == (0,)
    assert describe(tmp_path / "s.h5")["whole"] is True


def test_filtered_scores_hold_rows_and_scores(tmp_path):
    parts = [(np.arange(3), np.arange(3) + 1, np.arange(3) + 2, np.ones(3, np.float32))] * 2
    write_filtered_scores(tmp_path / "f.h5", 6, parts, {}, attributes={"unit": "grade"})
    with h5py.File(tmp_path / "f.h5") as file:
        assert file["row"][:].tolist() == [0, 1, 2, 0, 1, 2]
        assert file["score"].dtype == np.float32


# --- matrices -----------------------------------------------------------------------------------


def test_dense_rows_land_where_they_belong(tmp_path):
    expected = np.random.default_rng(0).standard_normal((50, 70)).astype(np.float32)
    ids = pa.array(map(str, range(50)))
    with DenseWriter(tmp_path / "m.h5", (50, 70), {}, ids=ids) as writer:
        writer.append(expected[:20])
        writer.append(expected[20:])
        with pytest.raises(ArgumentError):
            writer.append(expected[:20])
        writer.finish()
    with h5py.File(tmp_path / "m.h5") as file:
        assert np.array_equal(file["matrix"][:], expected)
        assert (file.attrs["fastpair_kind"], file.attrs["form"]) == ("matrix", "dense")
        assert file["ids"].asstr()[49] == "49"


def test_a_sparse_matrix_loads_into_scipy_as_it_is(tmp_path):
    sparse = pytest.importorskip("scipy.sparse")
    expected = sparse.random_array((200, 90), density=0.1, format="csr", dtype="f4", rng=0)
    expected.sort_indices()
    for name in ("m.h5", "m.npz"):
        with SparseWriter(tmp_path / name, (200, 90), {}) as writer:
            for start in range(0, 200, 64):
                part = expected[start : start + 64]
                writer.append(np.diff(part.indptr), part.indices.astype(np.int64), part.data)
            if name == "m.h5":
                writer.finish()
            else:
                write_csr(tmp_path / name, writer)
                writer.discard()
    with h5py.File(tmp_path / "m.h5") as file:
        parts = file["data"][:], file["indices"][:], file["indptr"][:]
        assert parts[2].dtype == np.int64
        back = sparse.csr_array(parts, shape=tuple(file.attrs["shape"]))
    assert (back != expected).nnz == 0
    assert (sparse.load_npz(tmp_path / "m.npz") != expected).nnz == 0
    assert sorted(os.listdir(tmp_path)) == ["m.h5", "m.npz"]


def test_equal_sparse_matrices_have_equal_bytes_for_any_blocks(tmp_path):
    counts = np.ones(100, np.int64)
    for name, size in (("a.h5", 100), ("b.h5", 30)):
        with SparseWriter(tmp_path / name, (100, 100), {}) as writer:
            for start in range(0, 100, size):
                rows = np.arange(start, min(start + size, 100))
                writer.append(counts[rows], rows, rows.astype(np.float32))
            writer.finish()
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_top_k_and_histogram_are_stored(tmp_path):
    with TopKWriter(tmp_path / "k.h5", (4, 2), {}, ids=pa.array(list("abcd"))) as writer:
        for start in (0, 2):
            writer.append(np.full((2, 2), start), np.full((2, 2), 0.5, np.float32))
        writer.finish()
    with h5py.File(tmp_path / "k.h5") as file:
        assert file["indices"][:, 0].tolist() == [0, 0, 2, 2]
        assert file["scores"].dtype == np.float32
    write_histogram(tmp_path / "h.h5", [0, 1, 2], [5, 6])
    assert describe(tmp_path / "h.h5")["attributes"]["form"] == "histogram"


# --- models and descriptions --------------------------------------------------------------------


def test_a_model_reads_back_and_a_changed_one_is_refused(tmp_path):
    from fastpair.model import builtin

    model = builtin("manhattan")
    write_model(tmp_path / "m.h5", model)
    write_model(tmp_path / "again.h5", model)
    assert (tmp_path / "m.h5").read_bytes() == (tmp_path / "again.h5").read_bytes()
    back = read_model(tmp_path / "m.h5")
    assert back.fingerprint() == model.fingerprint()
    with h5py.File(tmp_path / "m.h5", "r+") as file:
        config = json.loads(file.attrs["config"])
        file.attrs["config"] = json.dumps({**config, "slope": 2.0})
    with pytest.raises(FileError):
        read_model(tmp_path / "m.h5")


def test_describe_says_what_any_hdf5_file_is(tmp_path):
    plan = a_plan("int8")
    write_table(tmp_path / "t.h5", plan, some_rows(plan, 9), pa.array(list("abcdefghi")))
    found = describe(tmp_path / "t.h5")
    assert (found["kind"], found["ids"], found["whole"]) == ("table", True, True)
    assert found["attributes"]["plan"]["precision"] == "int8"
    assert "9 rows of int8" in found["summary"]
    json.dumps(found)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["group/x"] = np.zeros((3, 2), np.float32)
    found = describe(tmp_path / "other.h5")
    assert found["kind"] is None
    assert "group/x 3 x 2 float32" in found["summary"]
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(FileError, match="not an HDF5 file"):
        describe(tmp_path / "text.h5")
    with pytest.raises(FileError, match="does not exist"), open_hdf5(tmp_path / "missing.h5"):
        pass


def test_describe_tells_attributes_of_any_type(tmp_path):
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["x"] = [1.0]
        file.attrs["bytes"] = np.bytes_(b"abc")
        file.attrs["complex"] = 1 + 2j
        file.attrs["numbers"] = [np.nan, 1.0]
        file.attrs["long"] = np.longdouble(1)
        file.attrs["reference"] = file["x"].ref
        file.attrs["references"] = np.array([file["x"].ref], h5py.ref_dtype)
        file.attrs["texts"] = np.array([b"a", b"b"])
        file.attrs["json"] = '{"a": NaN}'
        file.attrs["empty"] = h5py.Empty("f4")
        file.attrs["record"] = np.array((1, 2.0), "i4,f8")
    found = describe(tmp_path / "f.h5")["attributes"]
    json.dumps(found, allow_nan=False)
    assert (found["bytes"], found["texts"]) == ("abc", ["a", "b"])
    assert (found["numbers"], found["json"]) == (["nan", 1.0], {"a": "nan"})
    assert found["record"] == [1, 2.0]


@pytest.mark.parametrize("missing", ["rows", "model_name", "precision", "block_checksum"])
def test_a_table_without_its_parts_is_one_sentence(tmp_path, missing):
    plan = a_plan()
    write_table(tmp_path / "t.h5", plan, some_rows(plan, 9))
    with h5py.File(tmp_path / "t.h5", "r+") as file:
        del (file if missing in file else file.attrs)[missing]
    if missing == "block_checksum":
        assert describe(tmp_path / "t.h5")["whole"] is None
        return
    with pytest.raises(FileError, match=missing):
        describe(tmp_path / "t.h5")


def test_files_that_are_being_written_can_be_described_but_not_read(tmp_path):
    code = """
    import sys
    from fastpair.{room} import {call}
    try:
        print(str({call}(sys.argv[1]){more})[:500])
    except Exception as error:
        print(type(error).__name__, error)
    """
    listing = {"room": "formats", "call": "open_format", "more": ".entries"}
    describing = {"room": "files", "call": "describe", "more": ""}
    with ScoreFile(tmp_path / "s.h5", 10, {}):
        for call in (listing, describing):
            said = run_python(code.format(**call), tmp_path / "s.h5.partial").communicate()[0]
            assert "score" in said
            assert "Error" not in said
    write_histogram(tmp_path / "h.h5", [0.0, 1.0], [3])
    with h5py.File(tmp_path / "h.h5", "r+"):
        said = run_python(code.format(**describing), tmp_path / "h.h5").communicate()[0]
        assert "histogram" in said
        reading = {"room": "files", "call": "read_table", "more": ""}
        said = run_python(code.format(**reading), tmp_path / "h.h5").communicate()[0]
        assert "locked by another process" in said


def test_an_export_that_was_interrupted_before_it_began_is_removed(tmp_path):
    staging = Staging(tmp_path / "s.csv", suffix=WRITING)  # as if a signal came right behind
    kept = Staging(tmp_path / "s.h5")
    remove_exports()
    assert [path.name for path in tmp_path.iterdir()] == ["s.h5.partial"]
    staging.release()
    kept.abandon()
