"""Full disks, closed doors, closed pipes, signals and little memory: one sentence, nothing lost."""

import json
import os
import resource
import shutil
import signal
import subprocess
import time

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pytest
from test_cli import FASTPAIR, INTERPRETER, peak_memory, run, run_json

PAIRS, ENTITIES = 3_000_000, 30_000


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A table with ids and pairs as gzip HDF5 and as CSV of ids."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    names = [f"entity number {number:08d}" for number in range(ENTITIES)]
    with h5py.File(folder / "e.h5", "w") as file:
        file["embeddings"] = rng.standard_normal((ENTITIES, 64), dtype=np.float32)
        file["ids"] = names
    run("project", "cosine", "e.h5", "-o", "t.h5", cwd=folder)
    pairs = rng.integers(0, ENTITIES, (PAIRS, 2), dtype=np.int32)
    with h5py.File(folder / "p.h5", "w") as file:
        shape = {"chunks": (1 << 16, 2), "compression": "gzip", "shuffle": True}
        file.create_dataset("pairs", data=pairs, **shape)
    ids = pa.array(names)
    columns = [ids.take(pa.array(pairs[:, side])) for side in (0, 1)]
    pacsv.write_csv(pa.table(columns, ["left", "right"]), folder / "p.csv")
    run("score", "t.h5", "p.h5", "-o", "warm.h5", cwd=folder)
    run("matrix", "t.h5", "--top-k", "3", "-o", "warm_best.h5", cwd=folder)
    return folder


OUTPUTS = {
    "s.h5": ["score", "t.h5", "p.h5"],
    "s.csv": ["score", "t.h5", "p.h5"],
    "s.parquet": ["score", "t.h5", "p.h5"],
    "best.h5": ["matrix", "t.h5", "--top-k", "20"],
    "above.npz": ["matrix", "t.h5", "--threshold", "0.4"],
    "all.npy": ["matrix", "t.h5", "--dense"],
}


def one_sentence(done):
    lines = [line for line in done.stderr.strip().splitlines() if line.startswith("fastpair: ")]
    assert done.returncode == 1, done.stderr
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(inputs, name):
    before = set(os.listdir(inputs))
    limit = 5_000_000

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [*FASTPAIR, *OUTPUTS[name], "-o", name]
    done = subprocess.run(command, cwd=inputs, capture_output=True, text=True, preexec_fn=full)
    assert "could not be written (File too large)" in one_sentence(done)
    assert set(os.listdir(inputs)) <= before | {f"{name}.partial"}
    if name == "all.npy":  # 3.6 GB: that it is refused is enough
        (inputs / f"{name}.partial").unlink(missing_ok=True)
        return
    run(*OUTPUTS[name], "-o", name, "--resume", cwd=inputs)
    assert set(os.listdir(inputs)) == before | {name}
    resumed = (inputs / name).read_bytes()
    run(*OUTPUTS[name], "-o", name, "--overwrite", cwd=inputs)
    assert (inputs / name).read_bytes() == resumed
    (inputs / name).unlink()


def test_a_small_disk_that_fills_up_is_one_sentence(inputs, tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", tmp_path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        done = run("score", "t.h5", "p.h5", "-o", tmp_path / "s.csv", cwd=inputs, code=1)
        assert "No space left on device" in one_sentence(done)
        assert os.listdir(tmp_path) == ["s.csv.partial"]
        subprocess.run(["mount", "-o", "remount,size=400m", tmp_path], check=True)
        assert (
            run_json("score", "t.h5", "p.h5", "-o", tmp_path / "s.csv", "--resume", cwd=inputs)[
                "resumed_from"
            ]
            == PAIRS
        )
        assert os.listdir(tmp_path) == ["s.csv"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_folder_that_may_not_be_written_is_one_sentence(inputs, tmp_path):
    folder = tmp_path
    tmp_path.chmod(0o500)
    if os.geteuid() == 0:  # the superuser may write everywhere but here
        folder = "/sys"
    done = run("score", "t.h5", "p.h5", "-o", f"{folder}/s.h5", cwd=inputs, code=1)
    assert "could not be written" in one_sentence(done)
    tmp_path.chmod(0o700)
    assert os.listdir(tmp_path) == []


def test_a_second_process_is_refused_and_the_first_goes_on(inputs, tmp_path):
    command = [*FASTPAIR, "matrix", inputs / "t.h5", "--top-k", "9", "-o", tmp_path / "b.h5"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not (tmp_path / "b.h5.partial").exists() and first.poll() is None:
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)
    for more in ([], ["--overwrite"], ["--resume"]):
        done = subprocess.run([*command, *more], capture_output=True, text=True)
        assert "another process" in one_sentence(done)
    first.send_signal(signal.SIGCONT)
    first.communicate()
    assert first.returncode == 0
    assert os.listdir(tmp_path) == ["b.h5"]


@pytest.mark.parametrize("name", ["s.csv", "best.h5"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_leaves_what_a_resume_needs(inputs, tmp_path, name, number, code):
    shutil.copytree(inputs, tmp_path / "work", ignore=shutil.ignore_patterns("warm*"))
    before = set(os.listdir(tmp_path / "work"))
    process = subprocess.Popen(
        [*FASTPAIR, *OUTPUTS[name], "-o", name],
        cwd=tmp_path / "work",
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = f"{name}.writing" if name == "s.csv" else f"{name}.partial"
    while not (tmp_path / "work" / seen).exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(number)
    words = process.communicate(timeout=60)[1].strip().splitlines()
    if (tmp_path / "work" / name).exists():
        pytest.skip("the run was over before it could be interrupted")
    assert process.returncode == code
    assert words[-1] == "fastpair: interrupted; --resume goes on where it stopped"
    assert set(os.listdir(tmp_path / "work")) == before | {f"{name}.partial"}


def test_a_closed_pipe_is_one_sentence(inputs):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*FASTPAIR, "info", "t.h5"], cwd=inputs, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert "standard output was closed" in one_sentence(done)


MEMORY = {
    "gzip HDF5": ["score", "t.h5", "p.h5"],
    "CSV of ids": ["score", "t.h5", "p.csv"],
    "into CSV": ["score", "t.h5", "p.csv"],
    "top-k": ["matrix", "t.h5", "--top-k", "50"],
    "threshold": ["matrix", "t.h5", "--threshold", "0.3"],
}


@pytest.mark.parametrize("name", MEMORY)
def test_a_quarter_of_a_gigabyte_is_enough_and_is_kept(inputs, tmp_path, name):
    output = tmp_path / ("o.csv" if name == "into CSV" else "o.h5")
    job = [*MEMORY[name], "-o", output, "--memory", "256MiB"]
    peak = peak_memory(*job, cwd=inputs)
    print(f"{name}: {peak / 2**20:.0f} MiB")
    assert peak < 256 * 2**20 + INTERPRETER
    assert json.loads(run("info", output, "--json", "--verify").stdout)["damaged"] == []
