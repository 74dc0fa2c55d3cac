"""Real worker processes: what they write is what one process writes, whatever befalls them."""

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import ClassVar

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

pytest.importorskip("distributed")

from fastpair import distributed, errors, jobs
from fastpair.cli import main
from fastpair.grouping import cluster as group
from fastpair.jobs import cluster_matrix, cluster_scoring, on_cluster
from fastpair.parts import PARTS, Part, PartsFolder
from fastpair.results import SCORE_BLOCK

ENTITIES, PAIRS, MANY = 6000, 2_300_000, 9_500_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((ENTITIES, 24), dtype=np.float32)
    with h5py.File(folder / "e.h5", "w") as file:
        file["embeddings"] = vectors
        file["ids"] = [f"e{number}" for number in range(ENTITIES)]
    with h5py.File(folder / "others.h5", "w") as file:
        file["embeddings"] = rng.standard_normal((1500, 24), dtype=np.float32)
    vectors[::7] = np.nan
    with h5py.File(folder / "holes.h5", "w") as file:
        file["embeddings"] = vectors
    for name, count in (("p", PAIRS), ("many", MANY)):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["pairs"] = rng.integers(0, 1500, (count, 2), dtype=np.int32)
    jobs.project("cosine", folder / "e.h5", folder / "t.h5")
    jobs.project("cosine", folder / "others.h5", folder / "right.h5")
    jobs.project("cosine", folder / "holes.h5", folder / "gaps.h5", nonfinite="nan")
    return folder


@pytest.fixture(scope="module")
def workers():
    with distributed.connected(workers=2, threads=2, memory="2GiB") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def plain_many(folder):
    """The scores of the longer pair file, by one process."""
    jobs.score(folder / "t.h5", folder / "many.h5", folder / "plain-many.h5")
    return folder / "plain-many.h5"


@pytest.fixture
def places(folder, tmp_path):
    """The inputs, and a folder for outputs."""
    return folder, tmp_path


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# --- score ----------------------------------------------------------------------------------------

SCORED = {
    "s.h5": {},
    "packed.h5": {"compression": "gzip"},
    "kept.h5": {"min_score": 0.3},
    "kept.parquet": {"min_score": 0.3},
    "kept.csv": {"min_score": 0.3},
    "kept.tsv.gz": {"min_score": 0.3},
    "two.h5": {"against": "right.h5"},
    "distance.h5": {"distance": True, "table": "gaps.h5"},
}


@pytest.mark.parametrize("name", SCORED)
def test_scores_are_those_of_one_process_byte_for_byte(places, workers, name):
    folder, out = places
    options = {"table": "t.h5", "pairs": "p.h5", **SCORED[name]}
    if options["table"] == "gaps.h5":
        jobs.project("euclidean", folder / "holes.h5", out / "gaps.h5", nonfinite="nan")
    for key in ("table", "pairs", "against"):
        if key in options:
            place = out if options[key] == "gaps.h5" else folder
            options[key] = place / options[key]
    plain = jobs.score(output=out / f"plain-{name}", **options)
    done = []
    shared = jobs.score(
        output=out / name, **options, cluster=workers, consolidate=True, progress=done.append
    )
    assert (out / name).read_bytes() == (out / f"plain-{name}").read_bytes()
    assert sum(done) == PAIRS
    same = ("pairs", "kept", "unit", "keys", "unknown", "notes", "resumed_from")
    assert {key: shared[key] for key in same} == {key: plain[key] for key in same}
    assert shared["parts"] == 3
    assert not any(file.endswith(PARTS) for file in files(out))


def test_a_client_of_dask_is_taken_as_well(places, workers):
    folder, out = places
    inputs = folder / "t.h5", folder / "p.h5"
    jobs.score(*inputs, out / "plain.h5")
    jobs.score(*inputs, out / "s.h5", cluster=workers.client, consolidate=True, memory="1GiB")
    assert (out / "s.h5").read_bytes() == (out / "plain.h5").read_bytes()
    with pytest.raises(errors.ArgumentError, match=r"expected a distributed\.Client"):
        jobs.score(*inputs, out / "no.h5", cluster="tcp://127.0.0.1:1")


def test_without_consolidate_scores_are_a_file_over_parts(places, workers):
    folder, out = places
    inputs = folder / "t.h5", folder / "p.h5"
    jobs.score(*inputs, out / "plain.h5")
    summary = jobs.score(*inputs, out / "s.h5", cluster=workers)
    assert summary["kept"] == PAIRS
    with h5py.File(out / "plain.h5") as plain, h5py.File(out / "s.h5") as shared:
        assert shared["score"].is_virtual
        for name in ("score", "block_checksum"):
            np.testing.assert_array_equal(plain[name][:], shared[name][:])
        assert {k: v for k, v in shared.attrs.items() if k not in ("parts", CHECK)} == {
            k: v for k, v in plain.attrs.items() if k != CHECK
        }
    assert all(re.fullmatch(r"part-\d{15}-\d{15}-\w{16}\.h5", n) for n in files(out / "s.h5.parts"))
    found = jobs.info(out / "s.h5", verify=True)
    assert found["whole"] is True
    assert found["unchecked"] == []
    with h5py.File(folder / "p.h5") as file:
        keys = file["pairs"][:]
    pq.write_table(pa.table({"left": keys[:, 0], "right": keys[:, 1]}), out / "p.parquet")
    named = {"pairs": out / "p.parquet", "threshold": 0.6}
    groups = [group(out / n, output=out / f"g-{n}", **named) for n in ("plain.h5", "s.h5")]
    assert groups[0]["groups"] == groups[1]["groups"] > 1
    (out / "moved").mkdir()
    for name in ("s.h5", "s.h5.parts"):
        (out / name).rename(out / "moved" / name)
    assert jobs.info(out / "moved" / "s.h5", verify=True)["whole"] is True


CHECK = "attributes_checksum"


def test_a_file_over_parts_tells_what_is_missing_or_damaged(places, workers):
    folder, out = places
    jobs.score(folder / "t.h5", folder / "p.h5", out / "s.h5", cluster=workers)
    parts = sorted((out / "s.h5.parts").iterdir())
    damage(parts[1])
    found = jobs.info(out / "s.h5", verify=True)
    assert [one["block"] for one in found["damaged"]] == [1]
    parts[2].unlink()
    with pytest.raises(errors.FileError, match=rf"lacks its part s\.h5\.parts/{parts[2].name}"):
        jobs.info(out / "s.h5")


def test_parts_that_lead_elsewhere_are_data_of_other_files(places, workers):
    folder, out = places
    jobs.score(folder / "t.h5", folder / "p.h5", out / "s.h5", cluster=workers)
    part = min((out / "s.h5.parts").iterdir())
    part.rename(out / "secret.h5")
    for harm in ("symbolic link", "external link", "virtual", "external storage"):
        lead(part, out / "secret.h5", harm)
        with pytest.raises(errors.FileError, match="outside this file"):
            jobs.info(out / "s.h5")
        part.unlink()


def lead(part, secret, harm):
    """Make a part that is whole to look at, but whose numbers stand in another file."""
    if harm == "symbolic link":
        part.symlink_to(secret)
        return
    with h5py.File(part, "w", libver="latest") as file:
        if harm == "external link":
            file["score"] = h5py.ExternalLink(secret, "score")
        elif harm == "virtual":
            layout = h5py.VirtualLayout((SCORE_BLOCK,), "<f4")
            layout[:] = h5py.VirtualSource(secret, "score", (SCORE_BLOCK,))
            file.create_virtual_dataset("score", layout)
        else:
            place = [(str(secret), 0, 4 * SCORE_BLOCK)]
            file.create_dataset("score", (SCORE_BLOCK,), "<f4", external=place)


def test_parquet_is_left_as_a_folder_of_parts(places, workers):
    folder, out = places
    for name, options in (("all", {}), ("kept", {"min_score": 0.3})):
        inputs = folder / "t.h5", folder / "p.h5"
        plain = jobs.score(*inputs, out / f"{name}-plain.parquet", **options)
        shared = jobs.score(*inputs, out / f"{name}.parquet", **options, cluster=workers)
        assert plain["kept"] == shared["kept"]
        table = pa.dataset.dataset(out / f"{name}.parquet").to_table()
        assert table.equals(pq.read_table(out / f"{name}-plain.parquet"))
        assert all(file.startswith("part-") for file in files(out / f"{name}.parquet"))
    with pytest.raises(errors.FileError, match="is a folder"):
        jobs.score(*inputs, out / "all.parquet", cluster=workers, overwrite=True)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_text_with_ids_is_read_from_where_a_worker_left_it(places, workers, suffix):
    folder, out = places
    rng = np.random.default_rng(2)
    names = pa.array([f"e{number}" for number in range(ENTITIES + 5)])
    sides = [names.take(pa.array(rng.integers(0, len(names), PAIRS))) for _ in range(2)]
    listed = pa.table(sides, ["left", "right"])
    if suffix == "csv":
        pa.csv.write_csv(listed, out / "p.csv")
    else:
        pq.write_table(listed, out / "p.parquet", row_group_size=100_000)
    inputs = folder / "t.h5", out / f"p.{suffix}"
    plain = jobs.score(*inputs, out / "plain.h5", unknown="nan")
    shared = jobs.score(*inputs, out / "s.h5", unknown="nan", cluster=workers, consolidate=True)
    assert (out / "s.h5").read_bytes() == (out / "plain.h5").read_bytes()
    assert plain["unknown"] == shared["unknown"] > 0
    assert len(shared["notes"]) == len(plain["notes"])
    jobs.score(*inputs, out / "s.parquet", unknown="nan", cluster=workers)
    with h5py.File(out / "plain.h5") as file:
        folded = pa.dataset.dataset(out / "s.parquet").to_table()
        np.testing.assert_array_equal(folded["score"].to_numpy(), file["score"][:])
        assert folded.select(["left", "right"]).equals(listed)


# --- matrix and project ---------------------------------------------------------------------------

WALKED = {
    "best.h5": {"top_k": 7},
    "best.csv": {"top_k": 7},
    "best.parquet": {"top_k": 7, "table": "gaps.h5"},
    "known.h5": {"top_k": 7, "exclude": "few.csv"},
    "right.h5": {"top_k": 7, "against": "right.h5", "exclude": "few.csv"},
    "above.h5": {"threshold": 0.55},
    "above.npz": {"threshold": 0.55, "table": "gaps.h5"},
    "above2.h5": {"threshold": 0.55, "against": "right.h5"},
    "packed.h5": {"dense": True, "against": "right.h5", "compression": "lzf"},
    "dense.npy": {"dense": True, "table": "right.h5"},
    "gaps.h5": {"dense": True, "table": "right.h5", "against": "gaps.h5"},
    "counts.h5": {"histogram": True, "bins": 30},
    "counts.csv": {"histogram": True, "against": "gaps.h5"},
}


@pytest.mark.parametrize("name", WALKED)
def test_all_pairs_are_those_of_one_process_byte_for_byte(places, workers, name):
    folder, out = places
    options = {"table": "t.h5", **WALKED[name]}
    if "exclude" in options:
        known = np.random.default_rng(1).integers(0, 1500, (3000, 2))
        np.savetxt(out / "few.csv", known, "%d", ",", header="left,right", comments="")
        options |= {"exclude": out / "few.csv", "keys": "rows"}
    for key in ("table", "against"):
        if key in options:
            options[key] = folder / options[key]
    plain = jobs.matrix(output=out / f"plain-{name}", **options)
    shared = jobs.matrix(output=out / name, **options, cluster=workers, consolidate=True)
    assert (out / name).read_bytes() == (out / f"plain-{name}").read_bytes()
    same = {"pairs", "kept", "k", "counts", "excluded", "notes", "unit", "resumed_from"}
    assert {k: shared[k] for k in same & plain.keys()} == {k: plain[k] for k in same & plain.keys()}
    assert shared["parts"] > 1
    assert not any(file.endswith(PARTS) for file in files(out))


@pytest.mark.parametrize("against", [None, "right.h5"])
def test_hits_that_are_too_many_to_be_held_are_brought_in_order_by_groups_of_rows(
    places, workers, monkeypatch, against
):
    folder, out = places
    options = {"threshold": 0.5, "against": against and folder / against}
    monkeypatch.setattr(cluster_matrix, "HITS_AT_ONCE", 1000)
    plain = jobs.matrix(folder / "t.h5", out / "plain.h5", **options)
    assert plain["kept"] > 10_000
    jobs.matrix(folder / "t.h5", out / "m.h5", **options, cluster=workers, consolidate=True)
    assert (out / "m.h5").read_bytes() == (out / "plain.h5").read_bytes()


@pytest.mark.parametrize("options", [{"top_k": 3}, {"dense": True}])
def test_best_of_rows_and_dense_matrices_are_files_over_parts(places, workers, options):
    folder, out = places
    jobs.matrix(folder / "t.h5", out / "plain.h5", **options)
    jobs.matrix(folder / "t.h5", out / "m.h5", **options, cluster=workers)
    with h5py.File(out / "plain.h5") as plain, h5py.File(out / "m.h5") as shared:
        assert set(plain) == set(shared)
        for name in plain:
            np.testing.assert_array_equal(plain[name][()], shared[name][()])
        assert shared.attrs["identity"] == plain.attrs["identity"]
    assert jobs.info(out / "m.h5", verify=True)["whole"] is True


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 9000, 40_000])
def test_the_squares_of_a_triangle_hold_every_pair_of_blocks_once(count):
    squares = cluster_matrix.Squares(count)
    places = [squares.place(number) for number in range(squares.count)]
    assert places == [(i, j) for i in range(squares.blocks) for j in range(i, squares.blocks)]
    assert [squares.number(*place) for place in places] == list(range(squares.count))
    assert sum(squares.pairs(number) for number in range(squares.count)) == count**2
    assert squares.rows(squares.blocks - 1)[1] == count


@pytest.mark.parametrize(
    ("model", "source", "options"),
    [
        ("cosine", "e.h5", {}),
        ("manhattan", "holes.h5", {"precision": "int8", "nonfinite": "nan"}),
        ("euclidean", "e.csv", {"precision": "bfloat16"}),
    ],
)
def test_a_table_is_that_of_one_process_byte_for_byte(places, workers, model, source, options):
    folder, out = places
    if source.endswith("csv"):
        numbers = np.random.default_rng(3).standard_normal((9000, 6))
        np.savetxt(out / source, numbers, delimiter=",")
    place = (out if source.endswith("csv") else folder) / source
    plain = jobs.project(model, place, out / "plain.h5", **options)
    shared = jobs.project(model, place, out / "t.h5", **options, cluster=workers)
    assert (out / "t.h5").read_bytes() == (out / "plain.h5").read_bytes()
    assert {**shared, "output": "", "seconds": 0} == {**plain, "output": "", "seconds": 0}
    assert "t.h5.parts" not in files(out)


# --- what may befall a run ------------------------------------------------------------------------


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class Stopped(Exception):
    """Stands for what ends a run."""


def interrupted(workers, places, name="s.h5", **options):
    """Run until the first part is there; leave what such a run leaves."""
    folder, out = places

    def stop(pairs):
        raise Stopped

    with pytest.raises(Stopped):
        jobs.score(
            folder / "t.h5",
            folder / "p.h5",
            out / name,
            cluster=workers,
            progress=lambda pairs: stop(pairs) if pairs else None,
            **options,
        )
    return out / name


def whole_notes(parts):
    return sorted(parts.glob("_part-*.json"))


def test_a_later_run_goes_on_with_what_is_there(places, workers):
    folder, out = places
    inputs = folder / "t.h5", folder / "p.h5"
    output = interrupted(workers, places)
    parts = out / f"output{PARTS}".replace("output", output.name)
    notes = whole_notes(parts)
    assert notes
    with pytest.raises(errors.FileError, match="--resume to go on or --overwrite"):
        jobs.score(*inputs, output, cluster=workers)
    with pytest.raises(errors.MismatchError, match="its right table is 'the same'"):
        jobs.score(*inputs, output, cluster=workers, resume=True, against=folder / "right.h5")
    there = {note.name[1:-5] for note in notes}
    before = {name: (parts / name).stat().st_mtime_ns for name in there}
    summary = jobs.score(*inputs, output, cluster=workers, resume=True)
    assert summary["resumed_from"] >= SCORE_BLOCK
    assert {name: (parts / name).stat().st_mtime_ns for name in there} == before
    jobs.score(*inputs, out / "plain.h5")
    with h5py.File(output) as file, h5py.File(out / "plain.h5") as plain:
        np.testing.assert_array_equal(file["score"][:], plain["score"][:])


@pytest.mark.parametrize("harm", ["part", "note", "cut", "foreign"])
def test_a_part_that_is_not_what_its_note_says_is_made_again(places, workers, harm):
    folder, out = places
    output = interrupted(workers, places)
    note = whole_notes(out / f"s.h5{PARTS}")[0]
    part = note.with_name(note.name[1:-5])
    if harm == "part":
        damage(part)
    elif harm == "note":
        note.write_text("{")
    elif harm == "cut":
        os.truncate(part, 100)
    else:
        told = json.loads(note.read_text())
        note.write_text(json.dumps({**told, "run": "0" * 16}))
    inputs, made = (folder / "t.h5", folder / "p.h5"), part.stat().st_mtime_ns
    jobs.score(*inputs, output, cluster=workers, resume=True)
    assert part.stat().st_mtime_ns > made
    jobs.score(*inputs, out / "plain.h5")
    with h5py.File(output) as file, h5py.File(out / "plain.h5") as plain:
        np.testing.assert_array_equal(file["score"][:], plain["score"][:])


def test_a_part_that_is_damaged_while_it_waits_is_made_again(places, workers, monkeypatch):
    folder, out = places
    read, seen = on_cluster.part_blocks, []

    def harmed(part, columns):
        if part.first and part.first not in seen:
            seen.append(part.first)
            damage(part.path)
        return read(part, columns)

    monkeypatch.setattr(on_cluster, "part_blocks", harmed)
    inputs = folder / "t.h5", folder / "p.h5"
    jobs.score(*inputs, out / "s.h5", cluster=workers, consolidate=True)
    monkeypatch.undo()
    jobs.score(*inputs, out / "plain.h5")
    assert (out / "s.h5").read_bytes() == (out / "plain.h5").read_bytes()
    assert len(seen) == 2


def test_one_process_and_a_cluster_go_on_with_each_others_work(places, workers):
    folder, out = places
    inputs = folder / "t.h5", folder / "p.h5"
    jobs.score(*inputs, out / "plain.h5")
    seen = []

    def stop(pairs):
        seen.append(pairs)
        if sum(seen) >= SCORE_BLOCK:
            raise Stopped

    with pytest.raises(Stopped):
        jobs.score(*inputs, out / "s.h5", progress=stop)
    for resume in (False, True):
        with pytest.raises(errors.FileError, match="say --resume with --consolidate"):
            jobs.score(*inputs, out / "s.h5", cluster=workers, resume=resume)
    summary = jobs.score(*inputs, out / "s.h5", cluster=workers, consolidate=True, resume=True)
    assert summary["resumed_from"] == SCORE_BLOCK
    assert (out / "s.h5").read_bytes() == (out / "plain.h5").read_bytes()


@pytest.mark.parametrize("work", ["score", "top-k"])
def test_parts_that_a_run_without_a_cluster_does_not_go_on_with_are_told(places, workers, work):
    folder, out = places

    def run(**options):
        if work == "score":
            return jobs.score(folder / "t.h5", folder / "p.h5", out / "s.h5", **options)
        return jobs.matrix(folder / "t.h5", out / "s.h5", top_k=3, **options)

    def stop(count):
        raise Stopped

    with pytest.raises(Stopped):
        run(cluster=workers, progress=stop)
    assert (out / "s.h5.parts").exists()
    assert [note for note in run(resume=True)["notes"] if "with --workers" in note]
    assert not [note for note in run(overwrite=True)["notes"] if "with --workers" in note]


def test_a_task_that_runs_twice_at_once_leaves_one_part(places, workers, monkeypatch):
    folder, out = places
    given = {}

    def capture(self, task, calls, told):
        given.update(task=task, calls=list(calls))
        raise Stopped

    monkeypatch.setattr(distributed.Cluster, "results", capture)
    with pytest.raises(Stopped):
        jobs.score(folder / "t.h5", folder / "p.h5", out / "s.h5", cluster=workers)
    monkeypatch.undo()
    job, part = given["calls"][0]
    part.folder.mkdir(exist_ok=True)
    futures = [workers.client.submit(given["task"], job, part, pure=False) for _ in range(6)]
    notes = [future.result() for future in futures]
    assert len({(note["size"], note["crc32"]) for note in notes}) == 1
    assert files(part.folder) == sorted([part.path.name, part.note.name])
    assert part.find() is not None


def test_what_is_wrong_with_the_pairs_is_one_sentence_with_its_range(places, workers):
    folder, out = places
    with h5py.File(folder / "p.h5") as file:
        pairs = file["pairs"][:]
    pairs[SCORE_BLOCK + 5, 1] = ENTITIES
    with h5py.File(out / "bad.h5", "w") as file:
        file["pairs"] = pairs
    with pytest.raises(errors.DataError) as caught:
        jobs.score(folder / "t.h5", out / "bad.h5", out / "s.h5", cluster=workers)
    said = str(caught.value)
    assert re.search(rf"\(pairs {SCORE_BLOCK} to {2 * SCORE_BLOCK - 1}, worker tcp://127", said)
    assert f"has {ENTITIES} as right in row {SCORE_BLOCK + 5}" in said
    assert "\n" not in said
    assert files(out) == ["bad.h5"]


def test_a_worker_of_another_release_is_refused(places, workers, monkeypatch):
    folder, out = places
    monkeypatch.setattr(cluster_scoring, "software", lambda: "fastpair 0.0.1, kernels 0")
    monkeypatch.setattr(on_cluster, "software", lambda: "fastpair 0.0.1, kernels 0")
    with pytest.raises(errors.MismatchError, match=r"the run fastpair 0\.0\.1, kernels 0: i"):
        jobs.score(folder / "t.h5", folder / "p.h5", out / "s.h5", cluster=workers)


def test_inputs_that_differ_on_a_worker_are_refused():
    job = on_cluster.Job({}, {"table": "a"}, "", "", None, None, "cpu", None, {})
    with pytest.raises(errors.MismatchError, match="the worker's table is 'b', that of the run"):
        job.check({"table": "b"})
    with pytest.raises(errors.MismatchError, match="start workers with OPENBLAS_CORETYPE=Other"):
        on_cluster.check_matrix_products("openblas for Other")


def test_workers_of_another_release_are_refused_before_they_are_sent_anything(workers, monkeypatch):
    distributed.check_workers(workers.client)
    for found, said in (("99", "fastpair 99"), (PackageNotFoundError("fastpair"), "no fastpair")):
        monkeypatch.setattr(workers.client, "run", lambda *_, found=found, **options: {"a": found})
        with pytest.raises(errors.ClusterError, match=f"the worker a has {said}, this process"):
            list(workers.results(json.loads, [("{}",)], str))


def test_a_worker_that_is_lost_while_it_is_asked_is_no_worker_without_fastpair():
    class Client:
        found: ClassVar = {"a": errors.FastpairError("lost"), "b": distributed.version("fastpair")}

        def run(self, *words, **options):
            if isinstance(self.found, Exception):
                raise self.found
            return self.found

    client = Client()
    distributed.check_workers(client)
    client.found = {"a": PackageNotFoundError("fastpair")}
    with pytest.raises(errors.ClusterError, match="has no fastpair"):
        distributed.check_workers(client)
    client.found, client.scheduler = OSError("closed"), None
    with pytest.raises(errors.ClusterError, match="is gone"):
        distributed.check_workers(client)


def test_limits_beside_workers_that_have_their_own_are_refused(places, workers):
    folder, out = places
    for limit in ({"threads": 1}, {"memory": "1GiB"}):
        with pytest.raises(errors.ArgumentError, match="where they are started"):
            jobs.score(folder / "t.h5", folder / "p.h5", out / "s.h5", cluster=workers, **limit)
    assert files(out) == []


def test_a_failure_that_is_none_of_ours_names_its_range(workers):
    with pytest.raises(errors.ClusterError, match=r"rows 3 failed on the cluster \(JSONDecodeErr"):
        list(workers.results(json.loads, [("{",)], lambda number: "rows 3"))


def test_options_that_a_cluster_does_not_have_are_refused(places, workers):
    folder, out = places
    inputs = folder / "t.h5", folder / "p.h5"
    with pytest.raises(errors.ArgumentError, match="--consolidate goes with"):
        jobs.score(*inputs, out / "s.h5", consolidate=True)
    with pytest.raises(errors.ArgumentError, match="--resume of a projection goes with"):
        jobs.project("cosine", folder / "e.h5", out / "t.h5", resume=True)
    with pytest.raises(errors.ArgumentError, match="on a cluster it is cpu or gpu"):
        jobs.score(*inputs, out / "s.h5", cluster=workers, device="gpu:1")
    with pytest.raises(errors.ArgumentError, match="--device-memory is 1GiB, which goes with"):
        jobs.score(*inputs, out / "s.h5", cluster=workers, device_memory="1GiB")
    with pytest.raises(errors.ArgumentError, match="workers of a cluster cannot read -"):
        jobs.score(folder / "t.h5", Path("-"), out / "s.h5", cluster=workers)
    with (
        pytest.raises(errors.ArgumentError, match="choose one of --scheduler and --workers"),
        distributed.connected("tcp://127.0.0.1:1", 2),
    ):
        pass
    assert files(out) == []


def test_without_dask_the_line_that_installs_it_is_told(monkeypatch):
    monkeypatch.setattr(distributed, "find_spec", lambda name: None)
    with (
        pytest.raises(errors.ClusterError, match=re.escape("pip install 'fastpair[cluster]'")),
        distributed.connected(workers=2),
    ):
        pass


def test_a_scheduler_that_does_not_answer_is_one_sentence(monkeypatch):
    monkeypatch.setattr(distributed, "CONNECTED_WITHIN", 1.0)
    with (
        pytest.raises(errors.ClusterError, match=r"no scheduler answers at tcp://127\.0\.0\.1:9"),
        distributed.connected("tcp://127.0.0.1:9"),
    ):
        pass


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("nonsense", "missing port"),
        ("", "missing port"),
        ("http://127.0.0.1:80", "unknown address scheme"),
        ("tls://127.0.0.1:8786", "no certificates"),
    ],
)
def test_an_address_that_is_none_is_told_before_a_client_tries_it(monkeypatch, address, said):
    monkeypatch.setattr("distributed.Client", None)
    with pytest.raises(errors.ClusterError, match=said), distributed.connected(address):
        pass


def test_what_dask_logs_at_the_end_does_not_reach_the_terminal(monkeypatch):
    import distributed as dask_distributed

    shown, logger = io.StringIO(), logging.getLogger("distributed")
    handler = logging.StreamHandler(shown)
    logger.addHandler(handler)
    real = dask_distributed.LocalCluster.close

    def close(cluster, timeout=None):
        found = real(cluster, timeout)
        logging.getLogger("distributed.batched").error("a connection was closed")
        return found

    monkeypatch.setattr(dask_distributed.LocalCluster, "close", close)
    try:
        with pytest.raises(Stopped), distributed.connected(workers=1):
            raise Stopped
        with (
            distributed.connected(workers=1) as local,
            distributed.connected(local.client.scheduler.address),
        ):
            logger.error("the scheduler does not answer")
        assert shown.getvalue() == ""
        logger.error("of somebody else")
        assert "of somebody else" in shown.getvalue()
    finally:
        logger.removeHandler(handler)


def test_workers_that_would_have_too_little_memory_are_not_started():
    with (
        pytest.raises(errors.ArgumentError, match="for 2 workers together"),
        distributed.connected(workers=2, memory="127MiB"),
    ):
        pass


def test_two_runs_do_not_write_one_output(places):
    _, out = places
    with (
        PartsFolder(out / "s.h5", {"a": "b"}),
        pytest.raises(errors.FileError, match="is being written by another process"),
    ):
        PartsFolder(out / "s.h5", {"a": "b"})
    assert files(out) == []


def test_what_an_attempt_leaves_is_removed(places):
    _, out = places
    with PartsFolder(out / "s.h5", {"a": "b"}) as folder:
        part = folder.part(0, 5)
        with suppress(Stopped), part.attempt() as attempt:
            attempt.write_text("half")
            raise Stopped
        assert files(folder.path) == ["_run.json"]
        with part.attempt() as attempt:
            attempt.write_text("whole")
            part.keep(attempt, {"rows": 5})
        assert part.find()["rows"] == 5
        assert Part(part.folder, part.run, 0, 6).find() is None
        left = folder.path / f"_attempt-{'0' * 32}-{part.path.name}"
        left.write_text("of a worker that was killed")
    with PartsFolder(out / "s.h5", {"a": "b"}, resume=True) as folder:
        assert files(folder.path) == sorted(["_run.json", part.path.name, part.note.name])


# --- what is there already ------------------------------------------------------------------------


def scores_of(path):
    with h5py.File(path) as file:
        return file["score"][:]


def test_a_run_that_fails_leaves_the_output_over_parts_as_it_was(places, workers):
    folder, out = places
    jobs.score(folder / "t.h5", folder / "p.h5", out / "s.h5", cluster=workers)
    before, parts = scores_of(out / "s.h5"), files(out / "s.h5.parts")
    with h5py.File(out / "wrong.h5", "w") as file:
        file["pairs"] = np.full((3 * SCORE_BLOCK, 2), ENTITIES, np.int32)
    with pytest.raises(errors.DataError):
        jobs.score(folder / "t.h5", out / "wrong.h5", out / "s.h5", cluster=workers, overwrite=True)
    end = time.monotonic() + 60  # another worker has yet to find that its pairs are wrong too
    while any(name.startswith("_attempt") for name in files(out / "s.h5.parts")):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert files(out / "s.h5.parts") == parts
    assert jobs.info(out / "s.h5", verify=True)["whole"] is True
    np.testing.assert_array_equal(scores_of(out / "s.h5"), before)


def test_a_run_that_is_stopped_leaves_the_output_over_the_same_parts(places, workers):
    folder, out = places
    jobs.score(folder / "t.h5", folder / "p.h5", out / "s.h5", cluster=workers)
    before = scores_of(out / "s.h5")
    output = interrupted(workers, places, overwrite=True, consolidate=True)
    assert jobs.info(output, verify=True)["whole"] is True
    np.testing.assert_array_equal(scores_of(output), before)
    inputs = folder / "t.h5", folder / "p.h5"
    jobs.score(*inputs, output, cluster=workers, overwrite=True, resume=True, consolidate=True)
    np.testing.assert_array_equal(scores_of(output), before)
    assert files(out) == ["s.h5"]


def test_a_finished_run_leaves_nothing_of_unfinished_ones(places, workers):
    folder, out = places
    inputs = folder / "t.h5", folder / "p.h5"
    with pytest.raises(Stopped):
        jobs.score(*inputs, out / "s.h5", progress=stop_at_once)
    (out / "s.h5.buckets").write_bytes(b"of a run by blocks")
    jobs.score(*inputs, out / "s.h5", cluster=workers, overwrite=True)
    (out / "m.h5.partial").write_bytes(b"of a run in one process")
    jobs.matrix(folder / "right.h5", out / "m.h5", top_k=2, cluster=workers, overwrite=True)
    assert files(out) == ["m.h5", "m.h5.parts", "s.h5", "s.h5.parts"]


def stop_at_once(pairs):
    if pairs:
        raise Stopped


def test_parquet_does_not_replace_what_came_under_its_name_meanwhile(places, workers):
    folder, out = places
    inputs = folder / "t.h5", folder / "p.h5"

    def occupy(pairs):
        (out / "s.parquet").write_text("of somebody else")

    with pytest.raises(errors.FileError, match="exists already"):
        jobs.score(*inputs, out / "s.parquet", cluster=workers, progress=occupy)
    assert (out / "s.parquet").read_text() == "of somebody else"
    (out / "s.parquet").unlink()
    found = jobs.score(*inputs, out / "s.parquet", cluster=workers, resume=True)
    assert found["resumed_from"] == PAIRS


def test_names_that_hdf5_takes_for_formats_are_names(places, workers):
    folder, out = places
    for name in ("50%.h5", "a%%b.h5", "%d.h5"):
        jobs.score(folder / "t.h5", folder / "p.h5", out / name, cluster=workers)
        assert jobs.info(out / name, verify=True)["whole"] is True


def test_who_makes_a_part_brings_it_to_the_disk_where_an_output_stands_on_it(places, monkeypatch):
    _, out = places
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)

    def kept(part):
        flushed.clear()
        with part.attempt() as attempt:
            attempt.write_text("whole")
            part.keep(attempt, {})
        return len(flushed)

    with PartsFolder(out / "s.h5", {}) as folder:
        part = folder.part(0, 1)
        assert kept(part) == 0
        part.flush()
        assert len(flushed) == 1
        assert kept(part) == 0  # the one that came first stays
        part.note.unlink()  # as when a run is complete, and a slow worker is not
        assert kept(part) == 1
    with PartsFolder(out / "r.h5", {}, flushed=True) as folder:
        assert kept(folder.part(0, 1)) == 1
    with PartsFolder(out / "q.h5", {}) as folder:
        assert kept(folder.part(0, 1)) == 0
    flushed.clear()
    with PartsFolder(out / "q.h5", {}, resume=True, flushed=True) as folder:
        assert folder.part(0, 1).find() is not None
        assert len(flushed) == 1


def test_outputs_over_parts_have_few_of_them():
    for blocks in (1, 100, 10_000, 10**6):
        assert -(-blocks // cluster_scoring.blocks_a_part(blocks)) <= on_cluster.MOST_PARTS
    folder = types.SimpleNamespace(part=lambda first, last, suffix: (first, last))
    for form in ({"form": "top-k", "top_k": 10}, {"form": "dense"}):
        for rows in (10, 10**5, 10**7):
            parts = cluster_matrix.row_parts(folder, form, (rows, rows))
            assert len(parts) <= on_cluster.MOST_PARTS
            assert parts[-1][1] == rows


OPENS = """
import resource, sys
from fastpair.hdf5 import open_hdf5
resource.setrlimit(resource.RLIMIT_NOFILE, (40, int(sys.argv[2])))
with open_hdf5(sys.argv[1]) as file:
    assert (file["score"][:] == 1).all(), file["score"][:]
"""


def test_a_file_over_more_parts_than_may_be_open_is_read_or_refused(tmp_path):
    (tmp_path / "s.h5.parts").mkdir()
    layout = h5py.VirtualLayout((80,), "<f4")
    for number in range(80):
        name = f"s.h5.parts/part-{number:015d}-{number + 1:015d}-{'0' * 16}.h5"
        with h5py.File(tmp_path / name, "w") as file:
            file["score"] = np.ones(1, np.float32)
        layout[number] = h5py.VirtualSource(name, "score", (1,))[0]
    with h5py.File(tmp_path / "s.h5", "w", libver="latest") as file:
        file.attrs.update({"fastpair_kind": "scores", "parts": 80})
        file.create_virtual_dataset("score", layout, fillvalue=np.nan)
    for most, refused in (("4096", False), ("60", True)):
        words = [sys.executable, "-c", OPENS, str(tmp_path / "s.h5"), most]
        done = subprocess.run(words, capture_output=True, text=True)
        assert (done.returncode != 0) == refused, done.stderr
        assert ("has 80 parts, which HDF5 holds open together" in done.stderr) == refused


# --- processes that die ---------------------------------------------------------------------------


def test_the_local_cluster_listens_on_loopback_alone(workers):
    own = {os.getpid(), *(worker.pid for worker in local_workers(workers))}
    inodes = set()
    for pid in own:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link))
            except OSError:
                continue
            inodes |= {found[1]} if found else set()
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:
                listening.append(words[1].split(":")[0])
    assert len(listening) >= 3
    assert set(listening) == {"0100007F"}


def local_workers(cluster):
    return list(cluster.client.cluster.workers.values())


@pytest.mark.parametrize("consolidate", [True, False])
def test_a_worker_that_is_killed_costs_nothing_but_time(places, workers, plain_many, consolidate):
    folder, out = places
    inputs = folder / "t.h5", folder / "many.h5"
    output, killed = out / "s.h5", []

    def kill():
        parts = output.with_name(output.name + PARTS)
        while not (parts.exists() and any(parts.glob("_attempt-*"))) and not output.exists():
            time.sleep(0.001)
        if not output.exists():
            killed.append(local_workers(workers)[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    jobs.score(*inputs, output, cluster=workers, consolidate=consolidate)
    killer.join()
    assert killed
    if consolidate:
        assert output.read_bytes() == plain_many.read_bytes()
    with h5py.File(output) as file, h5py.File(plain_many) as plain:
        np.testing.assert_array_equal(file["score"][:], plain["score"][:])
    assert jobs.info(output, verify=True)["whole"] is True


def test_a_task_that_kills_its_workers_is_told_with_its_range():
    import dask

    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        distributed.connected(workers=1) as cluster,
        pytest.raises(errors.ClusterError, match="every worker that took rows 0 to 9 died, 1"),
    ):
        list(cluster.results(os._exit, [(9,)], lambda number: "rows 0 to 9"))


def begin(*words, **options):
    environment = {**os.environ, "OPENBLAS_CORETYPE": os.environ.get("OPENBLAS_CORETYPE", "")}
    environment = {name: value for name, value in environment.items() if value}
    return subprocess.Popen(
        [sys.executable, "-m", *words], env=environment, stderr=subprocess.PIPE, **options
    )


class OwnCluster:
    """A scheduler and workers that are processes of their own, on loopback."""

    def __init__(self, folder):
        self.file, self.folder, self.all = folder / "scheduler.json", folder, []
        (folder / "scratch").mkdir(exist_ok=True)

    def start(self, workers=2):
        self.file.unlink(missing_ok=True)
        ends = ("--host", "127.0.0.1", "--scheduler-file", str(self.file))
        self.scheduler = self.begin("dask_scheduler", "--port", "0", "--no-dashboard", *ends)
        while not self.file.exists():
            assert self.scheduler.poll() is None
            time.sleep(0.02)
        here = ("--nworkers", "1", "--nthreads", "1", "--no-dashboard", "--memory-limit", "0")
        scratch = ("--local-directory", str(self.folder / "scratch"), "--death-timeout", "20")
        ends = ("--host", "127.0.0.1", self.address, "--no-nanny")
        self.workers = [self.begin("dask_worker", *here, *scratch, *ends) for _ in range(workers)]

    def begin(self, name, *words):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        words = [sys.executable, "-m", f"distributed.cli.{name}", *words]
        self.all.append(subprocess.Popen(words, **quiet))
        return self.all[-1]

    @property
    def address(self):
        return json.loads(self.file.read_text())["address"]

    def end(self):
        for process in self.all:
            process.kill()
            process.wait()
        self.all = []


@pytest.fixture
def own_cluster(tmp_path):
    cluster = OwnCluster(tmp_path)
    try:
        yield cluster
    finally:
        cluster.end()


def test_a_run_goes_on_after_its_scheduler_was_killed(places, own_cluster, plain_many):
    folder, out = places
    inputs = folder / "t.h5", folder / "many.h5"
    own_cluster.start()

    def kill(pairs):
        if pairs and own_cluster.scheduler.poll() is None:
            own_cluster.scheduler.kill()

    with (
        pytest.raises(errors.ClusterError, match="is gone: start it and its workers again"),
        distributed.connected(own_cluster.address) as cluster,
    ):
        jobs.score(*inputs, out / "s.h5", cluster=cluster, progress=kill)
    assert not (out / "s.h5").exists()
    own_cluster.end()
    own_cluster.start()
    with distributed.connected(own_cluster.address) as cluster:
        summary = jobs.score(*inputs, out / "s.h5", cluster=cluster, resume=True, consolidate=True)
    assert summary["resumed_from"] >= SCORE_BLOCK
    assert (out / "s.h5").read_bytes() == plain_many.read_bytes()


def test_a_scheduler_without_workers_is_told(places, own_cluster, monkeypatch):
    folder, out = places
    monkeypatch.setattr(distributed, "WORKERS_WITHIN", 0.5)
    own_cluster.start(workers=0)
    with (
        pytest.raises(errors.ClusterError, match="has had no workers for"),
        distributed.connected(own_cluster.address) as cluster,
    ):
        jobs.score(folder / "t.h5", folder / "p.h5", out / "s.h5", cluster=cluster)


def children(pid):
    """All processes below one, by number."""
    below = {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            below.setdefault(parent, []).append(int(place.name))
    found, waiting = [], [pid]
    while waiting:
        own = below.get(waiting.pop(), [])
        found += own
        waiting += own
    return found


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_end_by_a_signal_leaves_no_process(places, workers, plain_many, number):
    folder, out = places
    options = ("--workers", "2", "--threads", "2", "--consolidate", "-o", str(out / "s.h5"))
    words = ("fastpair", "score", str(folder / "t.h5"), str(folder / "many.h5"), *options)
    code = "from fastpair.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words[1:]],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    parts = out / f"s.h5{PARTS}"
    while not (parts.exists() and any(parts.glob("_attempt-*"))):
        assert process.poll() is None
        time.sleep(0.002)
    below = children(process.pid)
    assert len(below) >= 2
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    begun = time.monotonic()
    said = process.communicate(timeout=30)[1].decode()
    while any(map(alive, below)):
        assert time.monotonic() - begun < 20, [pid for pid in below if alive(pid)]
        time.sleep(0.05)
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert said.strip().splitlines()[-1].startswith("fastpair: interrupted; --resume goes on")
        assert "Traceback" not in said
    again = {"cluster": workers, "consolidate": True, "resume": True}
    jobs.score(folder / "t.h5", folder / "many.h5", out / "s.h5", **again)
    assert (out / "s.h5").read_bytes() == plain_many.read_bytes()
    assert files(out) == ["s.h5"]


def test_the_command_starts_workers_or_takes_those_there_are(places, workers, monkeypatch, capsys):
    folder, out = places
    ends = ["--workers", "2", "--threads", "2", "--memory", "1GiB", "--json"]
    words = ["score", str(folder / "t.h5"), str(folder / "p.h5"), "-o", str(out / "s.h5"), *ends]
    monkeypatch.setattr(sys, "argv", ["fastpair", *words])
    main()
    summary = json.loads(capsys.readouterr().out)
    assert (summary["workers"], summary["threads"], summary["pairs"]) == (2, 1, PAIRS)
    ends = ["--scheduler", workers.client.scheduler.address]
    words = ["project", "dot", str(folder / "e.h5"), "-o", str(out / "t.h5"), *ends]
    monkeypatch.setattr(sys, "argv", ["fastpair", *words])
    main()
    words = ["matrix", str(out / "t.h5"), "--top-k", "3", "-o", str(out / "m.h5"), *ends]
    monkeypatch.setattr(sys, "argv", ["fastpair", *words])
    main()
    assert files(out) == ["m.h5", "m.h5.parts", "s.h5", "s.h5.parts", "t.h5"]
