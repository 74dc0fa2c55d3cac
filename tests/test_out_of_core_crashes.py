"""Tables larger than memory: kills, power cuts, full disks, bad input; plans; little memory."""

import errno
import json
import os
from types import SimpleNamespace

import h5py
import numpy as np
import pyarrow as pa
import pytest
from crashes import Disk
from tables import products_only, random_plan, random_table
from test_cli import INTERPRETER, peak_memory, run, run_json
from test_out_of_core import little_memory, small_blocks, write_pairs, write_table

from fastpair import jobs
from fastpair.blockwise import BlockwiseScorer
from fastpair.buckets import BUCKETS
from fastpair.errors import DataError, FileError, MemoryBudgetError
from fastpair.files import TableWriter
from fastpair.jobs import all_pairs, by_blocks, inputs, scoring
from fastpair.kernels import aligned_empty
from fastpair.stored_rows import StoredRows

ROWS, PAIRS = 40, 500


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A table, pairs that fill every bucket, and what the run in memory makes of them."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    plan = random_plan(rng, products_only(20))
    rows = random_table(rng, ROWS, plan)
    write_pairs(folder / "p.h5", rng.integers(0, ROWS, (PAIRS, 2)))
    with pytest.MonkeyPatch.context() as patch:
        small_blocks.__wrapped__(patch)
        write_table(folder / "t.h5", rows, plan)
        jobs.score(folder / "t.h5", folder / "p.h5", folder / "s.h5")
    return folder, (folder / "s.h5").read_bytes()


def score(world, output, **options):
    folder = world[0]
    return jobs.score(folder / "t.h5", folder / "p.h5", output, threads=1, **options)


def stopped_after(writes, world, output, error=KeyboardInterrupt, **options):
    """Run until so many writes were made; return whether it came to its end before."""
    real, count = os.pwrite, 0

    def pwrite(*arguments):
        nonlocal count
        count += 1
        if count > writes:
            raise error
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        try:
            score(world, output, **options)
        except error:
            return False
    return True


def test_a_run_that_was_stopped_anywhere_goes_on_to_the_same_bytes(world, tmp_path):
    path, resumed, writes = tmp_path / "s.h5", [], 0
    with little_memory(20):
        while not stopped_after(writes, world, path):
            assert "s.h5" not in os.listdir(tmp_path)
            resumed.append(score(world, path, resume=True)["resumed_from"])
            assert path.read_bytes() == world[1]
            assert os.listdir(tmp_path) == ["s.h5"]
            path.unlink()
            writes += 2
    assert writes > 60
    assert resumed == sorted(resumed)  # later deaths leave less
    assert resumed[0] == 0
    assert resumed[-1] == PAIRS
    assert len(set(resumed)) > 10  # bucket by bucket


def test_whatever_a_power_cut_leaves_goes_on_to_the_same_bytes(world, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: None)  # whatever the disk gives
    (tmp_path / "disk").mkdir()
    with little_memory(20):
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(tmp_path / "disk", patch)
            score(world, tmp_path / "disk" / "s.h5")
        found = 0
        for number, (cut, what, contents) in enumerate(disk.states(np.random.default_rng(0), 1)):
            if number % 7:
                continue
            folder = tmp_path / f"{number}"
            folder.mkdir()
            for name, content in contents.items():
                (folder / name).write_bytes(content)
            told = f"cut at {cut} ({what}): {sorted(contents)}"
            if "s.h5" in contents:
                assert contents["s.h5"] == world[1], told
                continue
            found += score(world, folder / "s.h5", resume=True)["resumed_from"] > 0
            assert (folder / "s.h5").read_bytes() == world[1], told
            assert os.listdir(folder) == ["s.h5"], told
    assert found > 5


def test_buckets_that_were_damaged_are_made_again(world, tmp_path):
    path, rng = tmp_path / "s.h5", np.random.default_rng(0)
    with little_memory(20):
        for _ in range(20):
            assert not stopped_after(35, world, path)
            left = bytearray((tmp_path / f"s.h5{BUCKETS}").read_bytes())
            for place in rng.integers(0, len(left), 8):
                left[place] ^= 16
            (tmp_path / f"s.h5{BUCKETS}").write_bytes(left)
            score(world, path, resume=True)
            assert path.read_bytes() == world[1]
            path.unlink()


def test_a_resume_may_have_more_memory_or_less(world, tmp_path):
    path = tmp_path / "s.h5"
    for memory, resumes in ((20, True), (38, True), (12, False), (None, False)):
        with little_memory(20):
            assert not stopped_after(40, world, path)
            kept = score(world, path, resume=True, plan=True)  # changes nothing
            assert not kept["in_memory"]
        if memory is None:
            score(world, path, resume=True)
        else:
            with little_memory(memory) as patch:
                fits = memory >= 20
                patch.setattr(
                    "fastpair.blockwise.BlockwiseScorer._fits", lambda *_, fits=fits: fits
                )
                assert (score(world, path, resume=True)["resumed_from"] > 0) == resumes
        assert path.read_bytes() == world[1]
        assert os.listdir(tmp_path) == ["s.h5"]
        path.unlink()


def test_a_plan_fits_into_the_memory_it_was_made_for_and_not_into_much_less(named_plan):
    scorer, source, plan = named_plan
    assert scorer(MEMORY)._fits(plan, source, 1 << 20)
    assert scorer(MEMORY + (1 << 20))._fits(plan, source, 1 << 20)
    assert not scorer(MEMORY * 3 // 4)._fits(plan, source, 1 << 20)


MEMORY = 256 << 20


@pytest.fixture(params=[10**7, 10**9])
def named_plan(request):
    """What makes scorers of a memory, pairs, and the plan that one of them makes."""

    class Rows:
        step, shape, plan = 1 << 13, (10**7, 512), None

        def __len__(self):
            return self.shape[0]

    rows = Rows()
    source = SimpleNamespace(
        count=request.param,
        path=SimpleNamespace(stat=lambda: SimpleNamespace(st_size=0)),
        bytes_a_pair=lambda: 16,
        reading_bytes=lambda threads: 0,
    )

    def scorer(memory):
        return BlockwiseScorer((rows, None), memory=memory, threads=2)

    plan = scorer(MEMORY).make_plan(source, 1 << 20)
    rounds, cut = plan.rounds, plan.cut
    sorted_pairs = rounds.round_pairs * (10 + cut.record_bytes)
    assert sorted_pairs + 24 * rounds.rounds * cut.buckets <= MEMORY
    return scorer, source, plan


def test_ids_that_do_not_fit_are_refused_before_they_are_read(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "e.h5", "w") as file:
        file["embeddings"] = np.ones((1000, 2), np.float32)
        file["ids"] = [f"a rather long name of an entity, number {n}" for n in range(1000)]
    jobs.project("dot", tmp_path / "e.h5", tmp_path / "t.h5")
    write_pairs(tmp_path / "p.h5", np.zeros((3, 2), np.int64))
    monkeypatch.setattr(by_blocks, "memory_budget", lambda memory: 70_000)
    monkeypatch.setattr(by_blocks, "read_table", None)
    with pytest.raises(MemoryBudgetError, match="the ids of the tables take"):
        jobs.score(tmp_path / "t.h5", tmp_path / "p.h5", tmp_path / "s.h5")


def test_unfinished_buckets_are_not_lost_without_a_word(world, tmp_path):
    path = tmp_path / "s.h5"
    with little_memory(20):
        assert not stopped_after(30, world, path)
        before = (tmp_path / f"s.h5{BUCKETS}").read_bytes()
        with pytest.raises(FileError, match="--resume to go on or --overwrite"):
            score(world, path)
        assert (tmp_path / f"s.h5{BUCKETS}").read_bytes() == before
        score(world, path, overwrite=True)
    assert os.listdir(tmp_path) == ["s.h5"]


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(world, tmp_path, monkeypatch):
    path = tmp_path / "s.h5"

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    with little_memory(20):
        real = os.posix_fallocate

        def fallocate(descriptor, *arguments):
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith(BUCKETS):
                full()
            return real(descriptor, *arguments)

        monkeypatch.setattr(os, "posix_fallocate", fallocate)
        with pytest.raises(FileError, match=r"and [0-9]+ are free"):
            score(world, path)
        monkeypatch.setattr(os, "posix_fallocate", real)
        assert not (tmp_path / f"s.h5{BUCKETS}").exists()
        for writes in (8, 20, 60):
            with pytest.raises(FileError, match="could not be written"):
                stopped_after(writes, world, path, OSError, resume=True)
        score(world, path, resume=True)
    assert path.read_bytes() == world[1]
    assert os.listdir(tmp_path) == ["s.h5"]


def test_bad_pairs_leave_nothing_behind(world, tmp_path):
    write_pairs(tmp_path / "bad.h5", np.array([[0, 1]] * 200 + [[3, ROWS]]))
    with little_memory(20), pytest.raises(DataError, match="row numbers go from 0 to 39"):
        jobs.score(world[0] / "t.h5", tmp_path / "bad.h5", tmp_path / "s.h5")
    assert os.listdir(tmp_path) == ["bad.h5"]


@pytest.mark.parametrize("row", [0, 11, 25, ROWS - 1])
@pytest.mark.parametrize("gaps", [False, True])
def test_damaged_rows_are_told_however_they_are_read(world, tmp_path, row, gaps):
    source = world[0] / "t.h5"
    if gaps:
        rng = np.random.default_rng(1)
        vectors = rng.standard_normal((ROWS, 20), dtype=np.float32)
        vectors[[1, 10, 24, 26]] = np.nan
        np.save(tmp_path / "e.npy", vectors)
        source = tmp_path / "e.h5"
        jobs.project("dot", tmp_path / "e.npy", source, nonfinite="nan")
    table = bytearray(source.read_bytes())
    with h5py.File(source) as file:
        table[file["rows"].id.get_offset() + row * file["rows"].dtype.itemsize + 70] ^= 1
    (tmp_path / "t.h5").write_bytes(table)
    damaged = pytest.raises(FileError, match="do not agree with their checksums")
    with little_memory(20), damaged:
        jobs.score(tmp_path / "t.h5", world[0] / "p.h5", tmp_path / "s.h5")
    for form in ({"top_k": 3}, {"threshold": 0.1}, {"dense": True}, {"histogram": True}):
        with little_memory(20), damaged:
            jobs.matrix(tmp_path / "t.h5", tmp_path / "m.h5", **form, overwrite=True)


def test_a_plan_tells_what_the_run_reads_and_runs_nothing(world, tmp_path):
    with little_memory(20):
        plan = score(world, tmp_path / "s.h5", plan=True)
        assert os.listdir(tmp_path) == []
        told = score(world, tmp_path / "s.h5")["by_blocks"]
    assert plan["blocks"] > 1
    assert plan["chunks"] > plan["blocks"]
    for name in ("table_bytes_read", "sorting_bytes_read", "bytes_written"):
        assert told[name] == plan[name], name
    parts = ("table_bytes_read", "pair_bytes_read", "sorting_bytes_read")
    assert plan["bytes_read"] == sum(plan[name] for name in parts)


@pytest.mark.parametrize(
    "form", [{"top_k": 3}, {"threshold": 0.1}, {"dense": True}, {"histogram": True}]
)
def test_a_plan_of_all_pairs_tells_what_the_run_reads(world, tmp_path, form):
    read, real = [], StoredRows.load

    def samples(rows, wanted):
        return real(rows, 0, len(rows), aligned_empty(rows.shape, np.uint8))[wanted]

    def load(rows, start, stop, out, **more):
        had = rows.bytes_read
        found = real(rows, start, stop, out, **more)
        read.append(rows.bytes_read - had)
        return found

    with little_memory(20) as patch:
        plan = jobs.matrix(world[0] / "t.h5", tmp_path / "m.h5", plan=True, **form)
        patch.setattr(StoredRows, "load", load)
        patch.setattr(StoredRows, "__getitem__", samples)  # not told: a thousand rows at most
        jobs.matrix(world[0] / "t.h5", tmp_path / "m.h5", **form)
    assert plan["table_bytes_read"] == sum(read)


def test_rows_of_unknown_ids_stand_in_for_them(tmp_path):
    rng = np.random.default_rng(5)
    plan = random_plan(rng, products_only(9))
    rows = random_table(rng, ROWS + 1, plan).view(plan.layout.dtype)[:, 0]
    about = {"fingerprint": "f", "model_name": "m", "unit": "similarity"}
    ids = pa.array([f"n{number}" for number in range(ROWS)])
    with TableWriter(tmp_path / "t.h5", ROWS, plan, ids=ids, **about) as table:
        table.write(0, rows[:ROWS])
        table.write_unknown(rows[ROWS:])
    lines = [f"n{a},n{b}" for a, b in rng.integers(0, ROWS + 3, (300, 2))]
    (tmp_path / "p.csv").write_text("left,right\n" + "\n".join(lines) + "\n")
    expected = jobs.score(tmp_path / "t.h5", tmp_path / "p.csv", tmp_path / "memory.h5")
    with little_memory(20):
        found = jobs.score(tmp_path / "t.h5", tmp_path / "p.csv", tmp_path / "s.h5")
    assert found["unknown"] == expected["unknown"] > 0
    assert (tmp_path / "s.h5").read_bytes() == (tmp_path / "memory.h5").read_bytes()


def test_a_gpu_is_refused_for_tables_that_stay_on_the_disk(world, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "device_bytes", lambda *_: None)
    monkeypatch.setattr(inputs, "device_bytes", lambda *_: None)
    monkeypatch.setattr(all_pairs, "device_bytes", lambda *_: None)
    for plan in (False, True):
        refused = pytest.raises(MemoryBudgetError, match="scored on the CPU")
        with little_memory(20), refused:
            score(world, tmp_path / "s.h5", device="gpu", plan=plan)
        with little_memory(20), refused:
            jobs.matrix(world[0] / "t.h5", tmp_path / "m.h5", top_k=2, device="gpu", plan=plan)
    assert os.listdir(tmp_path) == []


def test_a_run_that_is_refused_for_its_memory_leaves_nothing_new(world, tmp_path):
    path = tmp_path / "s.h5"
    with little_memory(20) as patch:
        real = BlockwiseScorer.make_plan

        def refuse(*_):
            raise MemoryBudgetError("sorting pairs needs more")

        patch.setattr(BlockwiseScorer, "make_plan", refuse)
        with pytest.raises(MemoryBudgetError):
            score(world, path)
        assert os.listdir(tmp_path) == []
        patch.setattr(BlockwiseScorer, "make_plan", real)
        assert not stopped_after(70, world, path)
        left = sorted(os.listdir(tmp_path))
        patch.setattr(BlockwiseScorer, "make_plan", refuse)
        with pytest.raises(MemoryBudgetError):
            score(world, path, resume=True)
        assert f"s.h5{BUCKETS}" in left
        assert f"s.h5{BUCKETS}" in os.listdir(tmp_path)
        patch.setattr(BlockwiseScorer, "make_plan", real)
        assert score(world, path, resume=True)["resumed_from"] > 0
    assert path.read_bytes() == world[1]
    assert os.listdir(tmp_path) == ["s.h5"]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A table of 160 MiB and pairs of it, and one of 40 MiB whose rows are long."""
    folder = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)
    for name, count, columns in (("t.h5", 320_000, 128), ("wide.h5", 5120, 1 << 11)):
        plan = random_plan(rng, products_only(columns, bias=False))
        about = {"fingerprint": "f", "model_name": "m", "unit": "similarity"}
        with TableWriter(folder / name, count, plan, **about) as table:
            step = count // 8
            for start in range(0, count, step):
                rows = np.zeros(step, plan.layout.dtype)
                rows["product"] = rng.random(rows["product"].shape, dtype=np.float32) - 0.5
                table.write(start, rows)
    with h5py.File(folder / "p.h5", "w") as file:
        file["pairs"] = rng.integers(0, 320_000, (300_000, 2), dtype=np.int32)
    return folder


LARGE = {
    "score": (144, "t.h5", "p.h5"),
    "matrix": (96, "wide.h5", "--top-k", "5"),
}
"""Command -> MiB of memory, and what follows it."""


@pytest.mark.parametrize("name", LARGE)
def test_a_table_larger_than_memory_stays_within_it(large, tmp_path, name):
    memory, *words = LARGE[name]
    words = [name, *words]
    run(*words, "-o", tmp_path / "memory.h5", cwd=large)
    plan = run_json(
        *words, "-o", tmp_path / "b.h5", "--memory", f"{memory}MiB", "--plan", cwd=large
    )
    assert not plan["in_memory"]
    assert os.listdir(tmp_path) == ["memory.h5"]
    job = [*words, "-o", tmp_path / "blocks.h5", "--memory", f"{memory}MiB"]
    run(*job, "--overwrite", cwd=large)  # now compiled
    peak = peak_memory(*job, "--overwrite", cwd=large)
    print(f"{name}: {peak / 2**20:.0f} MiB")
    assert peak < memory * 2**20 + INTERPRETER
    assert (tmp_path / "blocks.h5").read_bytes() == (tmp_path / "memory.h5").read_bytes()
    assert json.loads(run("info", tmp_path / "blocks.h5", "--json").stdout)["whole"]
