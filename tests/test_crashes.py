"""Power cuts and kills at every write: what is resumed is right, and what has a name is whole."""

import os

import h5py
import numpy as np
import pyarrow as pa
import pytest
from crashes import Disk, numbers

from fastpair import results
from fastpair.errors import FastpairError
from fastpair.listing import write_scored_pairs
from fastpair.results import DenseWriter, LookupWriter, ScoreFile, SparseWriter, TopKWriter
from fastpair.scipy_files import write_csr

ROWS, BLOCK = 150, 32
IDS = pa.array([f"id {number}" for number in range(ROWS)])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(results, "SCORE_BLOCK", BLOCK)
    monkeypatch.setattr(results, "fitting_rows", lambda columns: BLOCK)
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: None)  # whatever the disk gives


def score(path, run, **options):
    """Returns the blocks that had to be done."""
    with ScoreFile(path, ROWS, {"run": run}, watched={"time": run}, **options) as file:
        undone = np.flatnonzero(~file.done)
        for number in undone:
            rows = file.block(int(number))
            file.write_block(int(number), numbers(run, ROWS)[rows.start : rows.stop])
        file.finish()
    return len(undone)


def listed(path, run, **options):
    with ScoreFile(path, ROWS, {"run": run}, watched={"time": run}, **options) as file:
        undone = np.flatnonzero(~file.done)
        for number in undone:
            rows = file.block(int(number))
            file.write_block(int(number), numbers(run, ROWS)[rows.start : rows.stop])
        blocks = (
            (IDS[:BLOCK], IDS[:BLOCK], file.scores(n)[:BLOCK]) for n in range(file.blocks - 1)
        )
        write_scored_pairs(path, blocks, overwrite=True)
        file.discard()
    return len(undone)


def appended(make, *kinds):
    def job(path, run, **options):
        with make(path, run, **options) as file:
            begun = file.next_row
            for start in range(begun, ROWS, 20):  # parts that are no blocks
                rows = slice(start, min(start + 20, ROWS))
                file.append(*(numbers(run, (ROWS, 3), kind)[rows] for kind in kinds))
            file.finish()
        return ROWS - begun

    return job


def dense(path, run, **options):
    return DenseWriter(path, (ROWS, 3), {"run": run}, ids=IDS, **options)


def top_k(path, run, **options):
    return TopKWriter(path, (ROWS, 3), {"run": run}, **options)


def averages(path, run, **options):
    return LookupWriter(path, (ROWS, 3), {"run": run}, ids=IDS, **options)


def threshold(path, run, **options):
    counts = numbers(run, ROWS, np.int64) % 3
    ends = np.concatenate([[0], np.cumsum(counts)])
    with SparseWriter(path, (ROWS, 9), {"run": run}, **options) as file:
        begun = file.next_row
        for start in range(begun, ROWS, 20):
            rows = slice(start, min(start + 20, ROWS))
            part = slice(ends[rows.start], ends[rows.stop])
            columns, data = numbers(run, ends[-1], np.int64), numbers(run, ends[-1])
            file.append(counts[rows], columns[part], data[part])
        if path.suffix == ".npz":
            write_csr(path, file, overwrite=True)
            file.discard()
        else:
            file.finish(overwrite=True)
    return ROWS - begun


JOBS = {
    "scores.h5": score,
    "scores.csv": listed,
    "scores.parquet": listed,
    "dense.h5": appended(dense, np.float32),
    "best.h5": appended(top_k, np.int64, np.float32),
    "averages.h5": appended(averages, np.float32),
    "above.h5": threshold,
    "above.npz": threshold,
}


def interrupted(job, path, run, at):
    """Begin a job and let it die at its so many-th write."""
    real, count = os.pwrite, 0

    def pwrite(*arguments):
        nonlocal count
        count += 1
        if count > at:
            raise KeyboardInterrupt
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(KeyboardInterrupt):
            job(path, run)


@pytest.mark.parametrize("before", ["nothing", "another run"])
@pytest.mark.parametrize("name", JOBS)
def test_whatever_a_crash_leaves_resumes_to_the_same_bytes_or_is_refused(tmp_path, name, before):
    job, rng = JOBS[name], np.random.default_rng(0)
    (tmp_path / "whole").mkdir()
    job(tmp_path / "whole" / name, 1)
    expected = (tmp_path / "whole" / name).read_bytes()
    (tmp_path / "disk").mkdir()
    if before == "another run":
        interrupted(job, tmp_path / "disk" / name, 2, 6)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(tmp_path / "disk", patch)
        job(tmp_path / "disk" / name, 1, overwrite=True)
    assert (tmp_path / "disk" / name).read_bytes() == expected
    again = refused = resumed = 0
    for number, (cut, what, contents) in enumerate(disk.states(rng, choices=2)):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        for file, content in contents.items():
            (folder / file).write_bytes(content)
        told = f"cut at {cut} ({what}): {sorted(contents)}"
        assert contents.get(name, expected) == expected, told
        if name in contents:
            continue
        try:
            done = job(folder / name, 1, resume=True)
            resumed, again = resumed + 1, again + done
        except FastpairError:
            refused += 1
            assert before == "another run", told
            job(folder / name, 1, overwrite=True)
        assert (folder / name).read_bytes() == expected, told
        assert os.listdir(folder) == [name], told
    assert resumed > 20
    assert again < resumed * (5 if name.startswith("scores") else ROWS)  # some of it was there
    assert refused == 0 or before == "another run"


@pytest.mark.parametrize("name", JOBS)
def test_what_is_finished_is_not_done_again(tmp_path, name):
    job = JOBS[name]
    everything = 5 if name.startswith("scores") else ROWS
    total, left = [], everything
    for at in range(1, 30, 3):
        path = tmp_path / f"{at}-{name}"
        try:
            interrupted(job, path, 1, at)
        except BaseException:  # it was over before
            break
        total.append(job(path, 1, resume=True))
        assert total[-1] <= left  # later deaths leave less
        left = total[-1]
    assert total[0] == everything
    assert total[-1] < everything


@pytest.mark.parametrize("name", JOBS)
def test_the_run_that_a_resume_does_not_fit_is_told(tmp_path, name):
    interrupted(JOBS[name], tmp_path / name, 2, 9)
    left = (tmp_path / (name + ".partial")).read_bytes()
    with pytest.raises(FastpairError, match="its run is '2', now it is '1'"):
        JOBS[name](tmp_path / name, 1, resume=True)
    with pytest.raises(FastpairError, match="--resume to go on or --overwrite"):
        JOBS[name](tmp_path / name, 1)
    other = "best.h5" if name != "best.h5" else "dense.h5"
    os.rename(tmp_path / (name + ".partial"), tmp_path / (other + ".partial"))
    with pytest.raises(FastpairError, match="its kind is"):
        JOBS[other](tmp_path / other, 2, resume=True)
    assert (tmp_path / (other + ".partial")).read_bytes() == left


def test_a_structure_with_a_flipped_byte_is_made_anew(tmp_path):
    score(tmp_path / "whole.h5", 1)
    expected = (tmp_path / "whole.h5").read_bytes()
    interrupted(score, tmp_path / "s.h5", 1, 6)
    left = (tmp_path / "s.h5.partial").read_bytes()
    with h5py.File(tmp_path / "s.h5.partial") as file:
        first = file["score"].id.get_offset()
        texts = left.index(b"fastpair_kind"), left.index(b'{"run": "1"}')
    for place in [*texts, texts[0] + 4, *np.random.default_rng(0).integers(0, first, 30)]:
        damaged = bytearray(left)
        damaged[place] ^= 4
        (tmp_path / "s.h5.partial").write_bytes(damaged)
        assert score(tmp_path / "s.h5", 1, resume=True) == 5
        assert (tmp_path / "s.h5").read_bytes() == expected
        (tmp_path / "s.h5").unlink()
