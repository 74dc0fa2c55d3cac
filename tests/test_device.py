"""Which device works: found without importing CuPy, told in a sentence, alike in all commands."""

import itertools
import json
import subprocess
import sys

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from simulated_gpu import SimulatedRuntime, needs_compiler

from fastpair import device, jobs
from fastpair.agreement import agreement, backends, cases, check_agreement
from fastpair.bench import bench
from fastpair.bench_report import print_bench
from fastpair.bench_works import WORKS
from fastpair.cli import commands
from fastpair.device import Missing, pick
from fastpair.energy import Counter
from fastpair.errors import (
    ArgumentError,
    DeviceError,
    FastpairError,
    MemoryBudgetError,
    MismatchError,
)
from fastpair.files import write_embeddings, write_pairs
from fastpair.gpu_machine import TINY
from fastpair.heads import HEADS
from fastpair.jobs import inputs
from fastpair.kernels import PRECISIONS
from fastpair.kernels.gpu import OutOfDeviceMemory
from fastpair.results import ScoreFile


class Driver:
    """A driver that knows a version of CUDA and lists some GPUs."""

    def __init__(self, cuda, gpus=1):
        self.cuda, self.gpus = cuda, gpus

    def cuDriverGetVersion(self, pointer):
        pointer._obj.value = self.cuda
        return 0

    def cuInit(self, flags):
        return 0 if self.gpus else 100

    def cuDeviceGetCount(self, pointer):
        pointer._obj.value = self.gpus
        return 0


@pytest.fixture
def machine(monkeypatch):
    """Sets what the machine has: a driver, CuPy, a wheel of it, and what starting a GPU does."""
    device.open_gpu.cache_clear()
    started = []

    def become(cuda=None, gpus=1, cupy=True, wheel=None, start=None):
        driver = None if cuda is None else Driver(cuda, gpus)
        monkeypatch.setattr(device, "_driver", lambda: driver)
        monkeypatch.setattr(device, "find_spec", lambda name: object() if cupy else None)
        monkeypatch.setattr(device, "_installed_wheel", lambda: wheel)

        def begin(number):
            started.append(number)
            return (start or (lambda n: SimulatedRuntime(number=n)))(number)

        monkeypatch.setattr(device, "_start", begin)
        return started

    yield become
    device.open_gpu.cache_clear()


# --- what is missing ---


def test_importing_the_commands_imports_no_cupy_and_no_numba():
    code = (
        "import sys, fastpair, fastpair.cli, fastpair.device, fastpair.jobs, fastpair.kernels\n"
        "print([name for name in ('cupy', 'numba') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_looking_for_a_gpu_where_there_is_none_imports_nothing():
    code = (
        "import sys\n"
        "from fastpair import device\n"
        "device._driver = lambda: None\n"
        "print(device.pick().kind, 'cupy' in sys.modules, 'numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["cpu", "False", "False"]


@pytest.mark.parametrize(
    ("has", "told"),
    [
        ({}, ["no NVIDIA driver", "install its driver", "pip install 'fastpair[cuda13]'"]),
        ({"cuda": 11080}, ["too old: it knows CUDA 11.8, not 12.0", "install a newer driver"]),
        ({"cuda": 12040, "cupy": False}, ["CuPy is not installed", "'fastpair[cuda12]'"]),
        ({"cuda": 13010, "cupy": False}, ["CuPy is not installed", "'fastpair[cuda13]'"]),
        ({"cuda": 14000, "cupy": False}, ["CuPy is not installed", "'fastpair[cuda13]'"]),
        (
            {"cuda": 12040, "wheel": 13},
            ["CuPy needs CUDA 13", "knows 12.4", "pip uninstall cupy-cuda13x", "[cuda12]"],
        ),
        ({"cuda": 13000, "gpus": 0}, ["lists no GPU (code 100)", "CUDA_VISIBLE_DEVICES"]),
    ],
)
def test_what_is_missing_is_named_with_the_line_that_installs_it(machine, has, told):
    started = machine(**has)
    with pytest.raises(DeviceError) as asked:
        pick("gpu")
    assert str(asked.value).startswith("device is 'gpu' but ")
    chosen = pick()
    assert chosen.name == chosen.kind == "cpu"
    assert chosen.note.startswith("on the CPU: ")
    for words in told:
        assert words in str(asked.value)
        assert words in chosen.note
    assert started == []


def test_a_wheel_for_an_older_driver_is_no_hindrance(machine):
    machine(cuda=13000, wheel=12, start=failing(RuntimeError("it was tried")))
    assert "it was tried" in pick().note


def failing(error):
    def start(number):
        raise error

    return start


def test_a_gpu_that_does_not_start_is_told_once_with_its_reason(machine):
    started = machine(cuda=13000, start=failing(OSError("out of\n  luck")))
    for _ in range(2):
        with pytest.raises(DeviceError, match=r"gpu:0 does not work \(OSError: out of luck\)"):
            pick("gpu:0")
    assert "does not work" in pick().note
    assert started == [0]


def test_a_gpu_without_bfloat16_products_is_too_old(machine):
    old = SimulatedRuntime()
    old.name, old.capability = "T4", "75"
    machine(cuda=13000, start=lambda number: old)
    with pytest.raises(DeviceError, match=r"gpu:0, T4, is too old: compute capability 7\.5, not 8"):
        pick("gpu")
    assert "too old" in pick().note


def test_errors_of_the_driver_are_told_as_one_sentence():
    class CUDARuntimeError(RuntimeError):
        __module__ = "cupy_backends.cuda.api.runtime"

    with (
        pytest.raises(DeviceError, match=r"gpu:2 failed \(CUDARuntimeError: no luck\): use the"),
        device.failures_told(2),
    ):
        raise CUDARuntimeError("no\nluck")
    with pytest.raises(MemoryBudgetError, match="gpu:2 has no room left"), device.failures_told(2):
        raise OutOfDeviceMemory("5 bytes")
    with pytest.raises(ZeroDivisionError) as own, device.failures_told(2):
        raise ZeroDivisionError
    assert own.value.__cause__ is None


def test_a_missing_compiler_is_named(machine):
    missing = RuntimeError("CuPy failed to load libnvrtc.so.12: OSError: cannot open")
    machine(cuda=12020, start=failing(missing))
    with pytest.raises(DeviceError, match=r"no NVRTC.*'fastpair\[cuda12\]'"):
        pick("gpu")


@pytest.mark.parametrize(
    "text", ["", "GPU", "gpu:", "gpu:x", "gpu:-1", "gpu:0,,1", "cuda", "gpu:0,0"]
)
def test_what_names_no_device_is_refused(text, machine):
    machine()
    with pytest.raises(ArgumentError, match=r"device is .*expected"):
        pick(text)


# --- what is there ---


@needs_compiler
def test_gpus_are_taken_by_number_or_all(machine):
    started = machine(cuda=13000, gpus=3)
    assert pick("cpu").name == "cpu"
    assert pick("gpu:2,0").name == "gpu:2,0"
    assert pick("gpu").name == "gpu:0,1,2"
    assert pick("gpu:1").note == ""
    assert sorted(started) == [0, 1, 2]
    with pytest.raises(DeviceError, match="there is no gpu:3: gpu:0 to gpu:2 can be used"):
        pick("gpu:1,3")
    machine(cuda=13000, gpus=1)
    with pytest.raises(DeviceError, match="there is no gpu:1: gpu:0 alone can be used"):
        pick("gpu:1")


@needs_compiler
def test_auto_takes_the_first_gpu_where_the_run_is_long_enough(machine):
    started = machine(cuda=13000, gpus=2)
    few = pick(pairs=device.LEAST_LISTED - 1)
    assert (few.kind, started) == ("cpu", [])
    assert "fewer than a GPU is started for" in few.note
    many = pick(pairs=device.LEAST_LISTED)
    assert many.name == "gpu:0"
    assert many.note == "on gpu:0, simulated"
    assert pick().name == "gpu:0"


@needs_compiler
def test_a_gpu_that_scores_wrong_is_not_used(machine, monkeypatch):
    machine(cuda=13000)
    from fastpair.kernels import gpu

    def wrong(runtime, table, left, right, scores, bad, stream, **_):
        runtime.fill(scores, 0, stream)

    monkeypatch.setattr(gpu, "score_pairs", wrong)
    with pytest.raises(DeviceError, match=r"gpu:0 scores 0\.0 where 32 is right; do not trust"):
        pick("gpu")
    assert "where 32 is right" in pick().note


# --- the commands ---


@pytest.fixture
def files(tmp_path):
    """A table of 60 rows, one of 25, and 3,000 pairs of both."""
    rng = np.random.default_rng(0)
    for name, rows in (("t", 60), ("u", 25)):
        embeddings = rng.normal(size=(rows, 20))
        write_embeddings(tmp_path / "e.h5", [(0, embeddings)], embeddings.shape, overwrite=True)
        jobs.project("cosine", tmp_path / "e.h5", tmp_path / f"{name}.h5")
    left, right = rng.integers(0, 60, 3000), rng.integers(0, 25, 3000)
    write_pairs(tmp_path / "p.h5", [(left, right, None)], 3000)
    return tmp_path


def command(*arguments):
    return CliRunner().invoke(commands, list(map(str, arguments)), standalone_mode=True)


def content(path):
    with h5py.File(path) as file:
        return {name: file[name][()].tobytes() for name in file}


@needs_compiler
@pytest.mark.parametrize("against", [False, True])
@pytest.mark.parametrize("memory", [None, "6kB"])
def test_score_writes_the_same_file_on_every_device(files, machine, against, memory, monkeypatch):
    machine(cuda=13000, gpus=2)
    monkeypatch.setattr("fastpair.gpu_worker.FEWEST_AT_ONCE", 64)
    monkeypatch.setattr("fastpair.gpu_worker.FEWEST_ROWS", 8)  # 6 kB do not hold the table
    table, pairs = files / "t.h5", files / "p.h5"
    more = ["--against", files / "u.h5"] if against else []
    for name, options in (
        ("cpu", []),
        ("gpu", ["--device-memory", memory] if memory else []),
        ("gpu:1", []),
    ):
        output = files / f"{name.replace(':', '')}.h5"
        options = [*more, *options, "--device", name, "--keys", "rows", "--json"]
        done = command("score", table, pairs, "-o", output, *options)
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert found["device"] == {"gpu": "gpu:0,1"}.get(name, name)
        assert found["device_note"] == ""
    assert (files / "cpu.h5").read_bytes() == (files / "gpu.h5").read_bytes()
    assert (files / "cpu.h5").read_bytes() == (files / "gpu1.h5").read_bytes()


def test_commands_say_why_no_gpu_is_used(files, machine, monkeypatch):
    machine(cuda=13000, cupy=False)
    done = command("score", files / "t.h5", files / "p.h5", "-o", files / "s.h5", "--keys", "rows")
    assert "on the CPU" not in done.stderr  # nobody wants to read that of every small run
    monkeypatch.setattr("fastpair.jobs.all_pairs.LEAST_WALKED", 10)
    found = jobs.matrix(files / "t.h5", files / "k.h5", top_k=3)
    assert found["device"] == "cpu"
    assert "CuPy is not installed" in found["device_note"]
    assert found["device_note"] in found["notes"]


@pytest.mark.parametrize(
    "arguments", [("score", "t.h5", "p.h5"), ("matrix", "t.h5", "--top-k", "2")]
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(
    tmp_path, machine, arguments
):
    machine(cuda=12040, cupy=False)
    rest = [tmp_path / "none.h5" if a.endswith(".h5") else a for a in arguments[1:]]
    for options, told in (
        (["--device", "gpu"], "pip install 'fastpair[cuda12]'"),
        (["--device", "tpu"], "expected auto, cpu, gpu"),
        (["--device", "cpu", "--device-memory", "1GiB"], "the device is the CPU"),
        (["--device-memory", "lots"], "expected a size such as"),
    ):
        done = command(arguments[0], *rest, "-o", tmp_path / "o.h5", *options)
        assert isinstance(done.exception, FastpairError)
        assert told in str(done.exception)


@needs_compiler
@pytest.mark.parametrize("against", [False, True])
def test_the_best_without_known_pairs_are_the_same_on_every_device(files, machine, against):
    machine(cuda=13000, gpus=2)
    more = ["--against", files / "u.h5"] if against else []
    pairs = np.random.default_rng(0).integers(0, 25, (300, 2))
    write_pairs(files / "known.h5", [(*pairs.T, None)], 300)
    for name in ("cpu", "gpu"):
        wanted = ["--top-k", 4, "--exclude", files / "known.h5", "--device", name]
        done = command("matrix", files / "t.h5", "-o", files / f"{name}.h5", *wanted, *more)
        assert done.exit_code == 0, done.output
    assert content(files / "cpu.h5") == content(files / "gpu.h5")


@needs_compiler
@pytest.mark.parametrize(
    "wanted", [["--top-k", 4], ["--threshold", 0.3], ["--histogram", "--bins", 7], ["--dense"]]
)
@pytest.mark.parametrize("against", [False, True])
def test_matrix_writes_the_same_file_on_every_device(files, machine, wanted, against):
    machine(cuda=13000, gpus=2)
    more = ["--against", files / "u.h5"] if against else []
    for name in ("cpu", "gpu"):
        output = files / f"{name}.h5"
        done = command("matrix", files / "t.h5", "-o", output, *wanted, *more, "--device", name)
        assert done.exit_code == 0, done.output
    of_tiles = {"--dense": "matrix", "--histogram": "edges"}.get(wanted[0])
    if of_tiles is None:
        assert content(files / "cpu.h5") == content(files / "gpu.h5")
        return
    with h5py.File(files / "cpu.h5") as cpu, h5py.File(files / "gpu.h5") as gpu:
        np.testing.assert_allclose(gpu[of_tiles], cpu[of_tiles], atol=1e-6)
        if of_tiles == "edges":
            assert (
                gpu["counts"][:].sum()
                == cpu["counts"][:].sum()
                == (60 * 25 if against else 60 * 59)
            )


# --- agreement and bench ---


@needs_compiler
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_way_to_score_on_a_gpu_agrees_with_the_reference(machine, precision):
    machine(cuda=13000)
    those = [one for one in backends("gpu") if one.name.startswith("GPU")]
    assert [one.missing for one in those] == [""] * 4
    rows = agreement(those, cases(precisions=[precision], entities=20, columns=12))
    check_agreement(rows)
    assert len(rows) == 4 * (len(HEADS) - (precision != "float32"))


def test_a_gpu_that_was_not_asked_for_is_missing():
    missing = {one.name: one.missing for one in backends("cpu")}
    assert missing["GPU pairs"] == "it was not asked for"
    assert missing["CPU pairs"] == ""


@needs_compiler
def test_bench_measures_a_gpu_beside_the_cpu(files, machine, monkeypatch, capsys):
    machine(cuda=13000)
    monkeypatch.setattr("fastpair.gpu_machine.Effort", lambda *_: TINY)
    monkeypatch.setattr("fastpair.gpu_bench.ALREADY_THERE", 500)
    monkeypatch.setattr("fastpair.bench._agree", lambda *_: [])
    monkeypatch.setattr("fastpair.bench.LONGEST_ROW", 0.0)
    monkeypatch.setattr("fastpair.machine.MOST_STREAM", 1 << 22)
    monkeypatch.setattr("fastpair.machine.SHORTEST", 1e-3)
    rising = Counter("gpu:0", itertools.count(0, 1_000_000).__next__)
    monkeypatch.setattr("fastpair.bench.gpu_counter", lambda number: (rising, ""))
    monkeypatch.setattr("fastpair.bench.cpu_counters", lambda: ([], "none"))
    jobs.project("cosine", files / "e.h5", files / "b.h5", precision="bfloat16")
    found = bench(files / "b.h5", pairs=600, seconds=600, device="gpu")
    assert found["skipped"] == []
    assert found["gpu"]["machine"]["name"] == "simulated"
    assert found["settings"]["device"] == "gpu:0"
    rows = [(row["device"], row["work"]) for row in found["rows"]]
    assert rows == [(device, work) for device in ("cpu", "gpu:0") for work in WORKS]
    for row in found["rows"]:
        assert row["share"] > 0
        assert row["binds"] in ("memory", "arithmetic", "link")
        used = row["joules_per_million_pairs"]
        assert (used is None) == (row["device"] == "cpu")
        assert used is None or used["median"] == pytest.approx(1e6 / row["pairs"])
    assert found["energy"] == {"counters": ["gpu:0"], "notes": ["none"]}
    on_gpu = {row["work"]: row for row in found["rows"] if row["device"] == "gpu:0"}
    assert on_gpu["stream"]["needs_per_pair"].items() >= {"up": 8.0, "down": 4.0}.items()
    json.dumps(found, allow_nan=False)
    compared = {**on_gpu["pairs"], "head": "dot", "backend": "GPU pairs", "difference": 0.0}
    compared |= {"ulp": 0.0, "bound": 0.0, "flipped": 0, "other_sets": None, "wrong": 0}
    compared |= {"flipped_in_all": None}
    print_bench({**found, "agreement": [compared]})
    shown = capsys.readouterr().out
    for words in ("gpu:0, simulated", "host to device", "gpu:0", "link"):
        assert words in shown


def test_walks_side_by_side_share_the_memory_of_a_device(files, machine, monkeypatch):
    machine(cuda=13000)
    asked = []

    class Enough(Exception):
        pass

    def walks(make, left, right, memory, start):
        make(left, right, memory)
        make(left, right, memory // 2)
        raise Enough

    monkeypatch.setattr("fastpair.jobs.all_pairs.RemainingPairs", walks)
    monkeypatch.setattr(
        "fastpair.jobs.all_pairs.all_pairs_on", lambda *given, **options: asked.append(given[4])
    )
    with pytest.raises(Enough):
        jobs.matrix(files / "t.h5", files / "k.h5", top_k=3, device="gpu", device_memory=10**6)
    assert asked[0] == 10**6
    assert asked[1] in (10**6 // 2 - 1, 10**6 // 2)


# --- resuming ---


def stopped(files, table, output, **options):
    """Run a scoring that is interrupted after its first block."""
    write = ScoreFile.write_block

    def interrupted(self, number, scores):
        if number == 1:
            raise KeyboardInterrupt
        write(self, number, scores)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScoreFile, "write_block", interrupted)
        with pytest.raises(KeyboardInterrupt):
            jobs.score(table, files / "p.h5", output, keys="rows", **options)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr("fastpair.jobs.scoring.SCORE_BLOCK", 700)
    monkeypatch.setattr("fastpair.results.SCORE_BLOCK", 700)


@needs_compiler
def test_a_run_may_be_resumed_on_another_device(files, machine, small_blocks):
    machine(cuda=13000)
    table, whole, output = files / "t.h5", files / "whole.h5", files / "parts.h5"
    jobs.score(table, files / "p.h5", whole, keys="rows", device="cpu")
    for first, then in (("cpu", "gpu"), ("gpu", "cpu")):
        stopped(files, table, output, device=first)
        found = jobs.score(table, files / "p.h5", output, keys="rows", device=then, resume=True)
        assert found["resumed_from"] == 700
        assert output.read_bytes() == whole.read_bytes()
        output.unlink()


@needs_compiler
def test_a_link_of_a_library_is_resumed_on_the_same_kind_of_device_alone(
    files, machine, small_blocks, monkeypatch
):
    machine(cuda=13000)
    monkeypatch.setattr("fastpair.jobs.scoring.LINKS_BY_DEVICE", ("identity",))
    stopped(files, files / "t.h5", files / "s.h5", device="cpu")
    with pytest.raises(MismatchError, match="its device is 'cpu', now it is 'gpu'"):
        jobs.score(
            files / "t.h5", files / "p.h5", files / "s.h5", keys="rows", device="gpu", resume=True
        )


def test_the_identity_of_a_run_holds_the_sources_of_every_device(monkeypatch, tmp_path):
    from fastpair import kernels

    before = inputs.digest_of_kernels()
    for name in ("__init__.py", "pairs.cu"):
        (tmp_path / name).write_text("other")
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "__init__.py"))
    other = inputs.digest_of_kernels()
    (tmp_path / "pairs.cu").write_text("changed")
    assert len({before, other, inputs.digest_of_kernels()}) == 3


def test_what_is_missing_is_a_sentence():
    assert str(Missing("CuPy is not installed", "do this")) == "CuPy is not installed; do this"
