"""``fastpair plan``: prices follow from rates, and rates from what was measured."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from fastpair import jobs
from fastpair.block_pairs import BlockPairs
from fastpair.buckets import cut_tables
from fastpair.cli import commands
from fastpair.errors import ArgumentError, DataError, FileError
from fastpair.files import write_embeddings, write_pairs
from fastpair.folding import fold
from fastpair.kernels import PRECISIONS
from fastpair.model import builtin
from fastpair.planning import (
    BLOCK_BYTES,
    WORKS,
    Job,
    Rates,
    price,
    rates_of_bench,
    rates_of_runs,
    read_summary,
    row_bytes_of,
)
from fastpair.stored_rows import StoredRows

SIZES = st.integers(1, 10**12)
POSITIVE = st.floats(1e-3, 1e12)


def some_job(work="score", **changes):
    given = {"entities": 10**6, "row_bytes": 256, "pairs": 10**9 if work == "score" else None}
    return Job(work, **{**given, **changes})


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("columns", [1, 16, 17, 60, 64, 128, 300])
def test_row_bytes_are_those_of_a_cosine_table(columns, precision):
    rows, plan = fold(builtin("cosine"), np.eye(3, columns, dtype=np.float32) + 1, precision)[:2]
    assert row_bytes_of(columns, precision) == plan.layout.row_bytes == rows.shape[1]


@given(SIZES, SIZES, POSITIVE, POSITIVE, POSITIVE, st.floats(0, 100))
def test_a_run_takes_its_start_its_tables_and_the_slowest_of_what_goes_side_by_side(
    entities, pairs, rate, read, write, start
):
    job = some_job(entities=entities, pairs=pairs)
    found = price(job, Rates(rate, start, read, write))
    slowest = max(pairs / rate, 8 * pairs / read, 4 * pairs / write)
    assert found["seconds"] == pytest.approx(start + 256 * entities / read + slowest)
    assert found["seconds"] == pytest.approx(sum(found["stages"].values()))
    assert found["stages"][found["binds"]] == max(found["stages"].values())


@given(st.sampled_from(WORKS), st.integers(1, 1000), st.integers(1, 10**9))
def test_workers_share_the_pairs_and_each_reads_the_tables(work, workers, entities):
    rates = Rates(1e6, 1.0, 1e9, 1e9)
    one = price(some_job(work, entities=entities), rates)
    many = price(some_job(work, entities=entities, workers=workers), rates)
    # the best of rows and a histogram of one table are walked in both orders by a cluster
    twice = 2 if work in ("top-k", "histogram") and workers > 1 else 1
    for name, seconds in many["pairs"].items():
        walked = twice if name == "scoring" else 1
        assert seconds == pytest.approx(walked * one["pairs"][name] / workers)
    tables = "reading tables from the disk"
    assert many["stages"][tables] == one["stages"][tables]
    assert many["seconds"] <= twice * one["seconds"] * (1 + 1e-9)
    more = many["bytes"]["read"] - one["bytes"]["read"]
    assert more == (workers - 1) * 256 * entities


def test_what_is_shared_or_slow_binds():
    job = some_job(entities=10**8, workers=64)
    rates = Rates(1e9, 1.0, read=1e9, write=1e9)
    assert "disk" in price(job, rates)["binds"]
    shared = price(job, Rates(1e9, 1.0, 1e9, 1e9, storage=1e9))
    assert shared["binds"] == "reading tables from the storage"
    assert shared["rates"]["read"] == pytest.approx(1e9 / 64)
    assert "network" in price(job, Rates(1e9, 1.0, 1e9, 1e9, network=1e6))["binds"]
    assert price(job, Rates(1.0))["binds"] == "scoring"


def test_memory_is_that_of_the_tables_and_what_is_under_way():
    job = some_job(entities=10**8, others=10**7, memory=16 << 30)
    found = price(job, Rates(1e6))
    assert 0 < found["memory"] - 110_000_000 * 256 <= 1 << 29
    assert not found["fits"]
    assert price(some_job(memory=16 << 30), Rates(1e6))["fits"]


@pytest.mark.parametrize(
    ("work", "others", "read", "walked"),
    [
        ("score", None, 8 * 4.5, 1),  # each pair of blocks once, in the order of the table
        ("score", 1 << 21, 2 + 2 * 8, 1),  # the smaller table is held
        ("top-k", None, 16 * 8, 2),  # a quarter of the memory holds left rows
        ("threshold", 1 << 21, 8 + 16 * 2, 1),
        ("histogram", None, 17 * 8 + 8, 1),
    ],
)
def test_tables_that_do_not_fit_are_read_by_blocks(work, others, read, walked):
    block = 1 << 28  # eight of them hold the left table, two the right one
    rows = 8 * block // 256
    job = some_job(work, entities=rows, others=others, memory=2 * block, k=1)
    found = price(job, Rates(1e6, 0.0, read=1e9, write=5e8))
    assert not found["fits"]
    assert found["passes"] == pytest.approx(read * block / job.table_bytes)
    assert found["stages"]["reading tables from the disk"] == pytest.approx(read * block / 1e9)
    assert found["pairs"]["scoring"] == pytest.approx(walked * job.scored / 1e6)
    if work == "score":
        sorting = found["stages"]["sorting pairs by block"]
        assert sorting == pytest.approx(11 * 10**9 * (1 / 1e9 + 1 / 5e8))
        whole = price(some_job(entities=rows, others=others), Rates(1e6))["bytes"]
        assert found["bytes"]["written"] - whole["written"] == 11 * 10**9


@pytest.mark.parametrize("work", WORKS[1:])
@pytest.mark.parametrize("others", [None, 3000, 50_000])
@pytest.mark.parametrize("memory", [1 << 28, 1 << 29])
def test_a_walk_by_blocks_is_priced_with_the_rows_that_it_reads(work, others, memory):
    def stored(rows):
        made = StoredRows.__new__(StoredRows)
        made.shape, made.step = (rows, 1 << 15), 1
        return made

    rows = 20_000
    plan = SimpleNamespace(network=None)
    right = None if others is None else stored(others)
    walk = BlockPairs(lambda *_: None, stored(rows), right, plan, memory)
    job = some_job(work, entities=rows, others=others, row_bytes=1 << 15, k=400, memory=memory)
    found = price(job, Rates(1e6, read=1e9))
    assert not found["fits"]
    read = walk.rows_read(work, 400)
    assert found["passes"] * (rows + (others or 0)) == pytest.approx(read, rel=0.05)


@pytest.mark.parametrize("counts", [(10**7, None), (10**7, 10**6), (10**6, 10**7), (9**7, 9**7)])
def test_pairs_by_blocks_are_priced_with_the_rows_that_they_read(counts):
    memory = 1 << 30
    rows = cut_tables(counts, 512, (1, 1), memory - BLOCK_BYTES).rows_read
    job = some_job(entities=counts[0], others=counts[1], row_bytes=512, memory=memory)
    found = price(job, Rates(1e6, read=1e9))
    assert found["passes"] * (counts[0] + (counts[1] or 0)) == pytest.approx(rows, rel=0.2)


def test_machines_that_share_left_rows_read_them_in_fewer_blocks():
    rates = Rates(1e6, read=1e9)
    one, many = (
        price(some_job("top-k", entities=10**8, workers=n, memory=1 << 30), rates) for n in (1, 64)
    )
    assert many["passes"] < one["passes"] / 32
    assert many["pairs"]["scoring"] == pytest.approx(one["pairs"]["scoring"] / 64)


def test_what_is_not_priced_is_said():
    free = price(some_job(), Rates(1e6))["notes"]
    assert "give --read and --write" in free[0]
    assert "give --write" in price(some_job(), Rates(1e6, read=1e9))["notes"][0]
    assert price(some_job(), Rates(1e6, 0.0, 1e9, 1e9))["notes"] == []


@pytest.mark.parametrize(
    ("work", "changes", "written"),
    [
        ("score", {"pairs": 1000}, 4000),
        ("dense", {"entities": 100, "others": 50}, 20_000),
        ("top-k", {"entities": 100, "k": 7}, 8400),
        ("threshold", {"entities": 1000, "kept": 0.01}, 10_000 * 12 + 8000),
        ("histogram", {}, 0),
    ],
)
def test_written_bytes_are_those_of_the_result(work, changes, written):
    assert some_job(work, **changes).written_bytes == written


@given(st.floats(0, 10), st.floats(1e3, 1e9), st.integers(10**3, 10**8), st.integers(2, 100))
def test_two_runs_tell_the_start_from_the_rate(start, rate, pairs, more):
    sizes = [pairs, pairs * more]
    job = some_job()
    runs = [
        {"work": "score", "row_bytes": 256, "pairs": n, "seconds": start + n / rate + 0.5}
        | {"table_bytes": 5 * 10**11}
        for n in sizes
    ]
    found = rates_of_runs(runs, job, read=1e12)
    predicted = price(some_job(pairs=10 * sizes[1], entities=1), found)["stages"]
    assert predicted["scoring"] == pytest.approx(10 * sizes[1] / rate, rel=1e-3)
    assert predicted["starting"] == pytest.approx(start, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"work": "dense"}, "of the work dense"),
        ({"row_bytes": 128}, "rows of 128 bytes"),
        ({"resumed_from": 5}, "resumed"),
        ({"seconds": 0}, "seconds of a run is 0"),
        ({"pairs": "x"}, "pairs of a run is 'x'"),
        ({"workers": 2}, "made by 2 workers of a cluster"),
        ({"pairs": 10}, "two sizes"),
        ({"seconds": 0.01}, "no more time"),
    ],
)
def test_runs_that_tell_nothing_are_refused(change, words):
    first = {"work": "score", "row_bytes": 256, "pairs": 10, "seconds": 2.0}
    with pytest.raises(DataError, match=words):
        rates_of_runs([first, {**first, "pairs": 1000, "seconds": 3.0, **change}], some_job())
    with pytest.raises(DataError, match="seconds"):
        rates_of_runs([first, {}], some_job())


def bench_like(**changes):
    half = {"median": 5e9}
    row = {
        "work": "stream",
        "precision": "float32",
        "device": "cpu",
        "entities": 1000,
        "row_bytes": 512,
        "pairs_per_second": {"median": 1e7},
        "needs_per_pair": {"table": 2 * 512 + 12.0},
        "table_bandwidth": {"at_random": {"median": 1e10}},
    }
    limits = {
        "random": {"all": half},
        "start": {"median": 0.5},
        "disk": {"read": {"median": 2e9}, "write": {"median": 1e9}},
    }
    return {"rows": [{**row, **changes}], "limits": limits}


def test_rates_of_a_bench_are_brought_to_other_rows():
    small = some_job(entities=1000, row_bytes=512)
    assert rates_of_bench(bench_like(), small) == Rates(1e7, 0.5, 2e9, 1e9)
    half = rates_of_bench(bench_like(), some_job(entities=500, row_bytes=1024))
    assert half.pairs_per_second == pytest.approx(1e7 * 1036 / 2060)
    far = rates_of_bench(bench_like(), some_job(entities=10**6, row_bytes=512))
    assert far.pairs_per_second == pytest.approx(5e6)
    walk = bench_like(work="top-k")
    wide = rates_of_bench(walk, some_job("top-k", row_bytes=1024))
    assert wide.pairs_per_second == pytest.approx(5e6)
    above = bench_like(work="threshold")
    twice = rates_of_bench(above, some_job("histogram", row_bytes=512))
    assert twice.pairs_per_second == pytest.approx(5e6)
    with pytest.raises(DataError, match="no top-k in int8"):
        rates_of_bench(walk, some_job("top-k"), "int8")
    for others in ({}, {"rows": 300_000}, {"rows": []}):  # what other commands print
        with pytest.raises(DataError, match="no stream"):
            rates_of_bench(others, small)
    with pytest.raises(DataError, match="no stream"):
        rates_of_bench({**bench_like(), "limits": {}}, small)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"work": "guess"}, "expected one of"),
        ({"entities": 0}, "entities is 0"),
        ({"pairs": None}, "needs the number of pairs"),
        ({"work": "dense"}, "leave their number out"),
        ({"kept": 2.0}, "kept is 2.0"),
    ],
)
def test_jobs_that_cannot_be_are_refused(change, words):
    with pytest.raises(ArgumentError, match=words):
        Job(**{"work": "score", "entities": 5, "row_bytes": 64, "pairs": 9, **change})


def test_rates_that_cannot_be_are_refused():
    for change in ({"pairs_per_second": 0.0}, {"read": math.nan}, {"start": -1.0}):
        with pytest.raises(ArgumentError, match=next(iter(change))):
            Rates(**{"pairs_per_second": 1.0, **change})


# --- the command ---


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What two real runs of score and of matrix said, as files."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((300, 20), dtype=np.float32)
    write_embeddings(folder / "e.h5", [(0, vectors)], vectors.shape)
    jobs.project("cosine", folder / "e.h5", folder / "t.h5")
    for count in (100, 900):
        left, right = rng.integers(0, 300, (2, count), dtype=np.int32)
        write_pairs(folder / "p.h5", [(left, right, None)], count, dtype="int32", overwrite=True)
        files = (folder / "t.h5", folder / "p.h5", folder / "s.h5")
        found = jobs.score(*files, keys="rows", device="cpu", overwrite=True)
        found["seconds"] = 1 + count / 1000  # what is priced does not hang on this machine
        (folder / f"score-{count}.json").write_text(json.dumps(found))
    found = jobs.matrix(folder / "t.h5", folder / "k.h5", top_k=3, device="cpu")
    (folder / "matrix.json").write_text(json.dumps(found))
    return folder


def run(*words, code=0):
    done = CliRunner().invoke(commands, ["plan", *map(str, words)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


def test_the_command_prices_from_real_runs(runs):
    given = [part for n in (100, 900) for part in ("--run", runs / f"score-{n}.json")]
    words = ("--entities", 300, "--columns", 20, "--pairs", "1e4", *given)
    found = json.loads(run(*words, "--json"))
    assert found["seconds"] == pytest.approx(1 + 10, rel=0.01)
    assert found["binds"] == "scoring"
    shown = run(*words, "--workers", 4, "--memory", "64MiB")
    assert "4 workers" in shown
    assert "bound by scoring" in shown
    assert "more than" not in shown
    large = ("--entities", "1e9", "--pairs", "1e9", "--pairs-per-second", "1e7")
    assert "more than the 64MiB that it has: it reads the tables by blocks" in run(
        *large, "--memory", "64MiB"
    )


def test_summaries_of_all_pairs_say_what_is_priced(runs):
    found = read_summary(runs / "matrix.json")
    assert found["work"] == "top-k"
    assert found["row_bytes"] == row_bytes_of(20)
    assert found["table_bytes"] == 300 * row_bytes_of(20)
    assert found["pairs"] == 300 * 300


def test_given_rates_replace_measured_ones(runs):
    words = ("--entities", "1e9", "--pairs", "1e12", "--workers", 64, "--json")
    found = json.loads(run(*words, "--pairs-per-second", 1e7, "--read", "2GB/s"))
    assert found["stages"]["scoring"] == pytest.approx(1e12 / 64 / 1e7)
    assert found["stages"]["reading tables from the disk"] == pytest.approx(512e9 / 2e9)
    given = [part for n in (100, 900) for part in ("--run", runs / f"score-{n}.json")]
    words = ("--entities", 300, "--columns", 20, "--pairs", "1e4", *given, "--json")
    found = json.loads(run(*words, "--pairs-per-second", 10))
    assert found["stages"]["scoring"] == pytest.approx(1000)
    assert found["stages"]["starting"] == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--pairs", "1e9"], "give rates"),
        (["--pairs", "1e9", "--dense"], "choose one of --pairs"),
        (["--pairs", "1.5", "--pairs-per-second", "1"], "no whole number"),
        (["--pairs", "many", "--pairs-per-second", "1"], "no number"),
        (["--dense", "--kept", "0.1", "--pairs-per-second", "1"], "--kept goes with"),
        (["--dense", "--columns", "9", "--row-bytes", "64"], "choose one of --columns"),
        (["--dense", "--rates", "a.json", "--run", "b.json"], "choose one of --rates"),
    ],
)
def test_the_command_refuses_what_cannot_be_priced(words, told):
    assert told in run("--entities", "1e6", *words, code=2)


def test_files_that_are_no_summaries_are_refused(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    (tmp_path / "b.json").write_text("{")
    for name, words in (("a", "no JSON object"), ("b", "no JSON"), ("c", "does not exist")):
        with pytest.raises(FileError, match=words):
            read_summary(tmp_path / f"{name}.json")
    with pytest.raises(ArgumentError, match="--read is 'quick'"):
        run("--entities", "9", "--dense", "--pairs-per-second", "1", "--read", "quick")
