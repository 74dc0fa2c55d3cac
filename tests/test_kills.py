"""Real processes, killed at random moments: each resumes to the bytes of an undisturbed run.

``make kill-check`` kills every output 25 times; the fast tests kill each once.
"""

import os
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest

KILLS = int(os.environ.get("FASTPAIR_KILLS", "1"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
FASTPAIR = [sys.executable, "-c", "from fastpair.cli import main; main()"]
PAIRS, ENTITIES = (4_500_000, 20_000) if KILLS == 1 else (12_000_000, 40_000)
INPUTS = ["ids.h5", "p.h5", "t.h5"]

JOBS = {
    "s.h5": ["score", "t.h5", "p.h5"],
    "packed.h5": ["score", "t.h5", "p.h5", "--compression", "gzip"],
    "s.csv": ["score", "t.h5", "p.h5"],
    "s.parquet": ["score", "t.h5", "p.h5"],
    "best.h5": ["matrix", "t.h5", "--top-k", "10"],
    "best.csv": ["matrix", "t.h5", "--top-k", "10"],
    "above.h5": ["matrix", "t.h5", "--threshold", "0.35"],
    "above.npz": ["matrix", "t.h5", "--threshold", "0.35"],
    "dense.npy": ["matrix", "t.h5", "--dense", "--against", "few.h5"],
}
QUICK = ("s.h5", "s.csv", "s.parquet", "best.h5", "above.h5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    rng = np.random.default_rng(0)
    with h5py.File(folder / "ids.h5", "w") as file:
        file["embeddings"] = rng.standard_normal((ENTITIES, 48), dtype=np.float32)
        file["ids"] = [f"entity {number}" for number in range(ENTITIES)]
    with h5py.File(folder / "few.h5.in", "w") as file:
        file["embeddings"] = rng.standard_normal((2000, 48), dtype=np.float32)
    with h5py.File(folder / "p.h5", "w") as file:
        file["pairs"] = rng.integers(0, ENTITIES, (PAIRS, 2), dtype=np.int32)
    for source, table in (("ids.h5", "t.h5"), ("few.h5.in", "few.h5")):
        command = [*FASTPAIR, "project", "cosine", source, "-o", table]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


def command_of(name, *more):
    return [*FASTPAIR, *JOBS[name], "-o", name, *more]


def begin(name, folder, *more):
    """Start a job; return the process and when its first bytes were staged."""
    process = subprocess.Popen(
        command_of(name, *more), cwd=folder, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    while not (folder / f"{name}.partial").exists() and process.poll() is None:
        time.sleep(0.001)
    return process, time.monotonic()


@pytest.mark.parametrize("name", JOBS if KILLS > 1 else QUICK)
def test_killed_runs_resume_to_the_same_bytes(folder, name):
    rng = np.random.default_rng(sorted(JOBS).index(name))
    begin(name, folder)[0].wait()  # compiled now
    (folder / name).unlink()
    process, begun = begin(name, folder)
    process.wait()
    took = time.monotonic() - begun
    expected = (folder / name).read_bytes()
    before = set(os.listdir(folder))
    kills = resumed = 0
    while kills < KILLS:
        (folder / name).unlink()
        process, _ = begin(name, folder)
        while True:  # a resumed run may be killed as well
            time.sleep(rng.random() * took)
            process.send_signal(SIGNALS[int(rng.integers(len(SIGNALS)))])
            if process.wait() != 0:
                kills += 1
            if (folder / name).exists():
                assert (folder / name).read_bytes() == expected
                (folder / f"{name}.partial").unlink(missing_ok=True)  # killed between the two
                break
            if rng.random() < 0.5:
                done = subprocess.run(
                    command_of(name, "--resume", "--json"),
                    cwd=folder,
                    capture_output=True,
                    text=True,
                )
                assert done.returncode == 0, done.stderr
                resumed += '"resumed_from": 0' not in done.stdout
                break
            process, _ = begin(name, folder, "--resume")
        assert (folder / name).read_bytes() == expected
        assert set(os.listdir(folder)) == before
    print(f"{name}: {kills} kills, {resumed} resumed runs found work that was done")
