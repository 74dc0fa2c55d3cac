"""The program as people run it: a subprocess, real files, exit codes and one sentence."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

FASTPAIR = [sys.executable, "-c", "from fastpair.cli import main; main()"]
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def run(*arguments, cwd=None, code=0, **options):
    done = subprocess.run(
        [*FASTPAIR, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, **options
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def run_json(*arguments, cwd=None):
    return json.loads(run(*arguments, "--json", cwd=cwd).stdout)


def refused(*arguments, cwd=None):
    """Run what must be refused: exit code 1, one sentence, nothing on standard output."""
    done = run(*arguments, cwd=cwd, code=1)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("fastpair: ")
    assert done.stdout == ""
    return lines[0]


ODD_IDS = ["NA", "007", "7", "null", " 7", "None", "é,ü", 'say "hi"', "nan", "1e5", "true", "-0"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """200 entities in ten groups, pairs as CSV; some ids are what readers love to alter."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    groups = np.arange(200) % 10
    centres = rng.normal(size=(10, 24))
    embeddings = centres[groups] + 0.8 * rng.normal(size=(200, 24))
    embeddings[:, :6] += 4 * rng.normal(size=(200, 6))  # what cosine sees and should not
    ids = [*ODD_IDS, *(f"e{n}" for n in range(200 - len(ODD_IDS)))]
    with h5py.File(folder / "embeddings.h5", "w") as file:
        file["embeddings"] = embeddings.astype(np.float32)
        file["ids"] = ids
    for name, count in (("train", 3000), ("valid", 800), ("test", 1000)):
        left, right = rng.integers(0, 200, (2, count))
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["id_a", "id_b", "label"])
            for i, j in zip(left, right, strict=True):
                writer.writerow([ids[i], ids[j], int(groups[i] == groups[j])])
    run("train", "embeddings.h5", "train.csv", "--valid", "valid.csv", "-o", "model.h5", cwd=folder)
    run("project", "model.h5", "embeddings.h5", "-o", "table.h5", cwd=folder)
    return folder


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_help_answers_at_once_and_imports_nothing_heavy():
    code = (
        "import sys; from fastpair.cli import commands\n"
        "commands(['--help'], standalone_mode=False)\n"
        "heavy = ('numpy', 'numba', 'pyarrow', 'h5py', 'scipy', 'rich')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    for command in (
        "demo",
        "convert",
        "train",
        "evaluate",
        "project",
        "features",
        "score",
        "matrix",
        "info",
    ):
        assert f"\n  {command} " in done.stdout


def test_the_whole_chain_from_labelled_pairs_to_scores(world, tmp_path):
    labels = [int(row["label"]) for row in read_csv(world / "test.csv")]
    measured = run_json("evaluate", "model.h5", "embeddings.h5", "test.csv", cwd=world)
    assert measured["n_pairs"] == len(labels)
    assert measured["average_precision"] > measured["raw_cosine"]["average_precision"] + 0.2
    outputs = {}
    for suffix in ("h5", "csv", "parquet", "tsv.gz"):
        path = tmp_path / f"scores.{suffix}"
        summary = run_json("score", "table.h5", "test.csv", "-o", path, cwd=world)
        assert summary["pairs"] == summary["kept"] == len(labels)
        outputs[suffix] = path
    with h5py.File(outputs["h5"]) as file:
        scores = file["score"][:]
    rows = read_csv(outputs["csv"])
    assert [(row["id_a"], row["id_b"]) for row in rows] == [
        (row["id_a"], row["id_b"]) for row in read_csv(world / "test.csv")
    ]
    assert np.array([row["score"] for row in rows], np.float32).tobytes() == scores.tobytes()
    table = pq.read_table(outputs["parquet"])
    assert table["score"].to_numpy().tobytes() == scores.tobytes()
    assert table["id_a"].to_pylist() == [row["id_a"] for row in rows]
    assert roc_auc_score(labels, scores) == pytest.approx(measured["auc"], abs=1e-12)
    assert average_precision_score(labels, scores) == pytest.approx(
        measured["average_precision"], abs=1e-12
    )


def test_min_score_keeps_rows_and_their_places(world, tmp_path):
    run("score", "table.h5", "test.csv", "-o", tmp_path / "all.h5", cwd=world)
    with h5py.File(tmp_path / "all.h5") as file:
        scores = file["score"][:]
    summary = run_json(
        "score", "table.h5", "test.csv", "--min-score", "0.5", "-o", tmp_path / "some.h5", cwd=world
    )
    kept = np.flatnonzero(scores >= 0.5)
    assert 0 < len(kept) < len(scores)
    with h5py.File(tmp_path / "some.h5") as file:
        assert file["row"][:].tolist() == kept.tolist()
        assert file["score"][:].tobytes() == scores[kept].tobytes()
    assert summary["kept"] == len(kept)
    run(
        "score",
        "table.h5",
        "test.csv",
        "--min-score",
        "0.5",
        "-o",
        tmp_path / "some.csv",
        cwd=world,
    )
    assert len(read_csv(tmp_path / "some.csv")) == len(kept)
    assert sorted(os.listdir(tmp_path)) == ["all.h5", "some.csv", "some.h5"]


def test_all_pairs_in_every_form_agree(world, tmp_path):
    forms = {
        "best": ["--top-k", "4"],
        "above": ["--threshold", "0"],
        "full": ["--dense"],
        "spread": ["--histogram", "--bins", "30"],
    }
    for name, options in forms.items():
        run("matrix", "table.h5", *options, "-o", tmp_path / f"{name}.h5", cwd=world)
    with h5py.File(tmp_path / "full.h5") as file:
        full = file["matrix"][:]
        assert file["ids"].asstr()[:12].tolist() == ODD_IDS
    np.fill_diagonal(full, -np.inf)
    with h5py.File(tmp_path / "best.h5") as file:
        np.testing.assert_allclose(file["scores"][:], -np.sort(-full, axis=1)[:, :4], atol=1e-3)
    from scipy.sparse import csr_matrix

    with h5py.File(tmp_path / "above.h5") as file:
        sparse = csr_matrix((file["data"][:], file["indices"][:], file["indptr"][:]), (200, 200))
    clear = np.abs(full) > 1e-3
    assert ((sparse.toarray() != 0) == (full >= 0))[clear].all()
    with h5py.File(tmp_path / "spread.h5") as file:
        assert file["counts"][:].sum() == 200 * 199


def test_a_built_in_similarity_stands_where_a_model_does(world, tmp_path):
    np.save(tmp_path / "vectors.npy", np.eye(5, dtype=np.float16))
    np.save(tmp_path / "pairs.npy", np.array([[0, 0], [0, 4]]))
    run("project", "cosine", tmp_path / "vectors.npy", "-o", tmp_path / "table.h5")
    run("score", tmp_path / "table.h5", tmp_path / "pairs.npy", "-o", tmp_path / "scores.csv")
    assert [row["score"] for row in read_csv(tmp_path / "scores.csv")] == ["1", "0"]
    measured = run_json("evaluate", "cosine", "embeddings.h5", "test.csv", cwd=world)
    assert measured["auc"] == pytest.approx(measured["raw_cosine"]["auc"], abs=1e-6)


@pytest.mark.parametrize("name", ["euclidean", "manhattan"])
def test_distances_are_written_where_a_model_is_one(tmp_path, name):
    vectors = np.random.default_rng(6).normal(size=(9, 5))
    np.save(tmp_path / "v.npy", vectors)
    np.save(tmp_path / "p.npy", np.array([[0, 1], [2, 2], [8, 3]]))
    run("project", name, "v.npy", "-o", "t.h5", cwd=tmp_path)
    run("score", "t.h5", "p.npy", "-o", "d.h5", "--distance", cwd=tmp_path)
    apart = vectors[[0, 2, 8]] - vectors[[1, 2, 3]]
    expected = np.linalg.norm(apart, 2 if name == "euclidean" else 1, axis=1)
    with h5py.File(tmp_path / "d.h5") as file:
        assert file.attrs["unit"] == "distance"
        np.testing.assert_allclose(file["score"][:], expected, rtol=1e-5, atol=1e-6)
    run("project", "cosine", "v.npy", "-o", "c.h5", cwd=tmp_path)
    assert "no distance" in refused(
        "score", "c.h5", "p.npy", "-o", "x.h5", "--distance", cwd=tmp_path
    )
    assert "--min-score" in refused(
        "score", "t.h5", "p.npy", "-o", "x.h5", "--distance", "--min-score", "1", cwd=tmp_path
    )


@pytest.mark.parametrize("head", ["rbf", "hyperbolic"])
def test_learned_distances_do_not_depend_on_calibration(world, tmp_path, head):
    train = ["embeddings.h5", "train.csv", "--valid", "valid.csv", "--epochs", "2", "--head", head]
    run("train", *train, "-o", tmp_path / "m.h5", cwd=world)
    run("project", tmp_path / "m.h5", "embeddings.h5", "-o", tmp_path / "t.h5", cwd=world)
    for form in (["--distance"], []):
        output = tmp_path / f"{len(form)}.h5"
        run("score", tmp_path / "t.h5", "test.csv", *form, "-o", output, cwd=world)
    with h5py.File(tmp_path / "1.h5") as distances, h5py.File(tmp_path / "0.h5") as scores:
        apart, score = distances["score"][:], scores["score"][:]
    assert apart.min() >= -1e-6
    assert (np.diff(apart[np.argsort(-score)]) >= -1e-5).all()
    if head == "rbf":
        assert apart.max() <= 1


def test_two_tables_are_scored_against_each_other(world, tmp_path):
    rng = np.random.default_rng(5)
    for name, count in (("left", 30), ("right", 20)):
        np.save(tmp_path / f"{name}.npy", rng.normal(size=(count, 24)))
        run("project", world / "model.h5", tmp_path / f"{name}.npy", "-o", tmp_path / f"{name}.h5")
    np.save(tmp_path / "pairs.npy", np.array([[29, 19], [0, 0]]))
    both = [tmp_path / "left.h5", "--against", tmp_path / "right.h5"]
    run("score", both[0], tmp_path / "pairs.npy", *both[1:], "-o", tmp_path / "s.h5")
    run("matrix", *both, "--dense", "-o", tmp_path / "m.h5")
    with h5py.File(tmp_path / "s.h5") as scores, h5py.File(tmp_path / "m.h5") as matrix:
        np.testing.assert_allclose(
            scores["score"][:], [matrix["matrix"][29, 19], matrix["matrix"][0, 0]], atol=1e-3
        )
    np.save(tmp_path / "swapped.npy", np.array([[19, 29]]))
    sentence = refused(
        "score", both[0], tmp_path / "swapped.npy", *both[1:], "-o", tmp_path / "t.h5"
    )
    assert "29" in sentence


def test_equal_runs_give_equal_bytes(world, tmp_path):
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        for made in ("train", "valid"):
            shutil.copy(world / f"{made}.csv", folder)
        shutil.copy(world / "embeddings.h5", folder)
        run("train", "embeddings.h5", "train.csv", "--valid", "valid.csv", "-o", "m.h5", cwd=folder)
        run("project", "m.h5", "embeddings.h5", "-o", "t.h5", cwd=folder)
        run("score", "t.h5", "train.csv", "-o", "s.parquet", cwd=folder)
        run("matrix", "t.h5", "--top-k", "5", "-o", "k.h5", cwd=folder)
        time.sleep(1.1)
    for made in ("m.h5", "t.h5", "s.parquet", "k.h5"):
        assert (tmp_path / "one" / made).read_bytes() == (tmp_path / "two" / made).read_bytes()


def test_convert_brings_files_into_hdf5(world, tmp_path):
    table = pa.table({"name": ["NA", "007"], "v": pa.array([[1.0, 2.0], [3.0, 4.0]])})
    pq.write_table(table, tmp_path / "e.parquet")
    run("convert", tmp_path / "e.parquet", tmp_path / "e.h5")
    with h5py.File(tmp_path / "e.h5") as file:
        assert file["ids"].asstr()[:].tolist() == ["NA", "007"]
        assert file["embeddings"][:].tolist() == [[1, 2], [3, 4]]
    summary = run_json("convert", world / "train.csv", tmp_path / "p.h5")
    assert summary["kind"] == "pairs"
    run("score", world / "table.h5", tmp_path / "p.h5", "-o", tmp_path / "s.h5")
    assert "pairs" in run("info", tmp_path / "p.h5").stdout


def test_info_tells_what_a_file_is_and_whether_it_is_whole(world, tmp_path):
    assert run_json("info", world / "table.h5")["whole"] is True
    shutil.copy(world / "table.h5", tmp_path / "bad.h5")
    with h5py.File(tmp_path / "bad.h5") as file:
        place = file["rows"].id.get_offset()
    with open(tmp_path / "bad.h5", "r+b") as file:
        file.seek(place + 1000)
        file.write(b"oops")
    assert run_json("info", tmp_path / "bad.h5")["whole"] is False
    assert "bad.h5" in refused("score", tmp_path / "bad.h5", world / "test.csv", "-o", "x.h5")


# --- what is refused ---


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("id_a,id_b\nNA,who?\n", "who?"),
        ("", "empty"),
        ("id_a,id_b\n", "no pairs"),
        ("x,y,z\n1,2,3\n", "x"),
        ("id_a,id_b\nNA\n", "pairs.csv"),
    ],
)
def test_a_bad_pair_file_is_one_sentence_and_no_output(world, tmp_path, text, told):
    pairs = write(tmp_path / "pairs.csv", text)
    assert told in refused("score", world / "table.h5", pairs, "-o", tmp_path / "s.h5")
    assert os.listdir(tmp_path) == ["pairs.csv"]


@pytest.mark.parametrize("bad", [5, -1, 2**32])
def test_a_row_number_out_of_range_is_named(tmp_path, bad):
    np.save(tmp_path / "v.npy", np.eye(5))
    np.save(tmp_path / "p.npy", np.array([[0, 1], [2, bad]]))
    run("project", "dot", tmp_path / "v.npy", "-o", tmp_path / "t.h5")
    sentence = refused("score", tmp_path / "t.h5", tmp_path / "p.npy", "-o", tmp_path / "s.h5")
    assert str(bad) in sentence
    assert not (tmp_path / "s.h5").exists()


def test_a_late_bad_row_leaves_no_output(tmp_path):
    np.save(tmp_path / "v.npy", np.eye(5))
    pairs = np.zeros((3_000_000, 2), np.int32)
    pairs[-1] = 5
    np.save(tmp_path / "p.npy", pairs)
    run("project", "dot", tmp_path / "v.npy", "-o", tmp_path / "t.h5")
    sentence = refused("score", tmp_path / "t.h5", tmp_path / "p.npy", "-o", tmp_path / "s.h5")
    assert "2999999" in sentence
    assert not (tmp_path / "s.h5").exists()


def test_a_nan_in_an_embedding_is_named_by_its_row(tmp_path):
    vectors = np.ones((9, 4), np.float32)
    vectors[6, 2] = np.nan
    np.save(tmp_path / "v.npy", vectors)
    sentence = refused("project", "cosine", tmp_path / "v.npy", "-o", tmp_path / "t.h5")
    assert "row 6" in sentence
    assert os.listdir(tmp_path) == ["v.npy"]


def test_files_that_do_not_fit_are_refused(world, tmp_path):
    np.save(tmp_path / "v.npy", np.ones((9, 4)))
    run("project", "cosine", tmp_path / "v.npy", "-o", tmp_path / "other.h5")
    table, pairs, output = world / "table.h5", world / "test.csv", tmp_path / "s.h5"
    assert "model" in refused(
        "score", table, pairs, "--against", tmp_path / "other.h5", "-o", output
    )
    assert "24" in refused("project", world / "model.h5", tmp_path / "v.npy", "-o", output)
    assert "table" in refused("score", world / "model.h5", pairs, "-o", output)
    assert "missing.h5" in refused("score", tmp_path / "missing.h5", pairs, "-o", output)
    assert "overwrite" in refused("score", table, pairs, "-o", tmp_path / "other.h5")
    assert "folder" in refused("score", table, pairs, "-o", tmp_path / "no" / "s.h5")
    assert ".xlsx" in refused("score", table, pairs, "-o", tmp_path / "s.xlsx")
    assert "memory" in refused("score", table, pairs, "-o", output, "--memory", "lots")
    assert "label" in refused(
        "evaluate", world / "model.h5", world / "embeddings.h5", world / "test.csv", "--label", "x"
    )
    assert "euclidean" in refused("project", "cosin", tmp_path / "v.npy", "-o", output)
    assert "finite" in refused("score", table, pairs, "-o", output, "--min-score", "nan")
    short = tmp_path / "short.h5"
    short.write_bytes(table.read_bytes()[:5000])
    assert "short.h5" in refused("score", short, pairs, "-o", output)
    assert not output.exists()


def test_wrong_usage_is_clicks_own_exit_code(world, tmp_path):
    run("score", code=2)
    run("matrix", world / "table.h5", "-o", tmp_path / "m.h5", code=2)
    run("matrix", world / "table.h5", "--dense", "--top-k", "3", "-o", tmp_path / "m.h5", code=2)
    run("nonsense", code=2)


def test_training_refuses_what_it_cannot_learn_from(world, tmp_path):
    one = write(tmp_path / "one.csv", "id_a,id_b,label\n" + "NA,007,1\n" * 40)
    arguments = ["train", world / "embeddings.h5", one, "-o", tmp_path / "m.h5"]
    assert "good" in refused(*arguments)
    graded = write(tmp_path / "graded.csv", "id_a,id_b,label\n" + "NA,007,3.5\n7,null,1\n" * 40)
    assert "--graded" in refused("train", world / "embeddings.h5", graded, "-o", tmp_path / "m.h5")
    assert not (tmp_path / "m.h5").exists()


# --- interruption, memory ---


def big_job(folder, pairs=20_000_000, entities=200_000, columns=64):
    rng = np.random.default_rng(0)
    np.save(folder / "v.npy", rng.standard_normal((entities, columns), dtype=np.float32))
    with h5py.File(folder / "p.h5", "w") as file:
        data = file.create_dataset("pairs", (pairs, 2), "i4")
        for start in range(0, pairs, 1 << 20):
            stop = min(start + (1 << 20), pairs)
            data[start:stop] = rng.integers(0, entities, (stop - start, 2))
    run("project", "cosine", folder / "v.npy", "-o", folder / "t.h5")


def peak_memory(*arguments, cwd):
    """Run a command in a process of its own; return its greatest resident memory in bytes.

    Linux counts it in VmHWM; getrusage would count the memory of the process that forked, too.
    """
    code = (
        "import re; from fastpair.cli import main\n"
        f"import sys; sys.argv = {['fastpair', *map(str, arguments)]!r}; main()\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True
    )
    return int(done.stdout) * 1024


INTERPRETER = 200 * 2**20
"""Bytes that the interpreter and the libraries may use beside --memory."""


def test_twenty_million_pairs_stay_within_their_memory(tmp_path):
    big_job(tmp_path)
    job = ["score", "t.h5", "p.h5", "-o", "s.h5", "--memory", "512MiB"]
    assert peak_memory(*job, cwd=tmp_path) < 512 * 2**20 + INTERPRETER
    with h5py.File(tmp_path / "s.h5") as file:
        assert file["score"].shape == (20_000_000,)


def test_a_matrix_larger_than_its_memory_stays_within_it(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "v.npy", rng.standard_normal((8000, 32), dtype=np.float32))
    run("project", "cosine", "v.npy", "-o", "t.h5", cwd=tmp_path)
    for form in (["--dense"], ["--threshold", "-0.2"]):
        run("matrix", "t.h5", *form, "-o", "m.h5", "--overwrite", cwd=tmp_path)  # now compiled
        job = ["matrix", "t.h5", *form, "-o", "m.h5", "--overwrite", "--memory", "100MiB"]
        assert peak_memory(*job, cwd=tmp_path) < 100 * 2**20 + INTERPRETER
    assert "--memory" in refused(
        "matrix", "t.h5", "--dense", "-o", "n.h5", "--memory", "64MiB", cwd=tmp_path
    )


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path):
    big_job(tmp_path, pairs=12_000_000)
    run("score", "t.h5", "p.h5", "-o", "whole.h5", cwd=tmp_path)
    command = [*FASTPAIR, "score", "t.h5", "p.h5", "-o", "s.h5"]
    process = subprocess.Popen([*command, "--threads", "1"], cwd=tmp_path)
    partial = tmp_path / "s.h5.partial"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not _blocks_done(partial):
        time.sleep(0.005)
    process.kill()
    process.wait()
    if (tmp_path / "s.h5").exists():
        pytest.skip("the run was over before it could be killed")
    assert "resume" in refused("score", "t.h5", "p.h5", "-o", "s.h5", cwd=tmp_path)
    summary = run_json("score", "t.h5", "p.h5", "-o", "s.h5", "--resume", cwd=tmp_path)
    assert summary["resumed_from"] > 0
    assert (tmp_path / "s.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert not partial.exists()


def test_ctrl_c_ends_with_one_sentence_and_exit_code_130(tmp_path):
    big_job(tmp_path, pairs=12_000_000)
    command = [*FASTPAIR, "score", "t.h5", "p.h5", "-o", "s.h5", "--threads", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not _blocks_done(tmp_path / "s.h5.partial"):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    words = process.communicate(timeout=60)[1].strip().splitlines()
    if (tmp_path / "s.h5").exists():
        pytest.skip("the run was over before it could be interrupted")
    assert process.returncode == 130
    assert words[-1] == "fastpair: interrupted; --resume goes on where it stopped"
    assert sorted(os.listdir(tmp_path)) == ["p.h5", "s.h5.partial", "t.h5", "v.npy"]


def test_resuming_with_other_pairs_of_the_same_file_is_refused(tmp_path):
    big_job(tmp_path, pairs=12_000_000, entities=1000, columns=8)
    with h5py.File(tmp_path / "p.h5", "r+") as file:
        file["other"] = np.zeros((12_000_000, 2), np.int32)
    command = [*FASTPAIR, "score", "t.h5", "p.h5", "-o", "s.h5", "--threads", "1"]
    process = subprocess.Popen(command, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not _blocks_done(tmp_path / "s.h5.partial"):
        time.sleep(0.001)
    process.kill()
    process.wait()
    if (tmp_path / "s.h5").exists():
        pytest.skip("the run was over before it could be killed")
    sentence = refused(
        "score", "t.h5", "p.h5", "--dataset", "other", "-o", "s.h5", "--resume", cwd=tmp_path
    )
    assert "dataset" in sentence


def _blocks_done(partial):
    try:
        with h5py.File(partial, locking=False) as file:
            return np.count_nonzero(file["block_checksum"][:]) > 1
    except (OSError, KeyError):
        return False


# --- real data, where it is at hand ---

needs_shared_data = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the shared data sets are not beside this checkout"
)


@needs_shared_data
def test_entity_matching_on_amazon_google(tmp_path):
    data = SHARED / "amazon-google"
    run(
        "train", data / "embeddings.h5", data / "pairs_train.csv", "--valid",
        data / "pairs_valid.csv", "-o", tmp_path / "m.h5",
    )  # fmt: skip
    measured = run_json(
        "evaluate", tmp_path / "m.h5", data / "embeddings.h5", data / "pairs_test.csv"
    )
    assert measured["average_precision"] >= 0.70
    assert {"auc", "average_precision", "spearman", "n_pairs"} <= measured.keys()
    run("project", tmp_path / "m.h5", data / "embeddings.h5", "-o", tmp_path / "t.h5")
    run("score", tmp_path / "t.h5", data / "pairs_test.parquet", "-o", tmp_path / "s.parquet")
    scored = pq.read_table(tmp_path / "s.parquet")
    truth = pq.read_table(data / "pairs_test.parquet")
    ap = average_precision_score(truth["label"].to_numpy(), scored["score"].to_numpy())
    assert ap == pytest.approx(measured["average_precision"], abs=1e-12)
