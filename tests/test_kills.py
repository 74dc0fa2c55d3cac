"""Real processes, killed at random moments: each resumes to the bytes of an undisturbed run.

``make kill-check`` kills every output 25 times; the fast tests kill each once. Processes are forks
of this one, which has compiled the kernels, so that they are killed at work and not at their start.
"""

import os
import signal
import time
from contextlib import nullcontext

import h5py
import numpy as np
import pytest
from test_out_of_core import little_memory

from fastpair import attention, jobs, results
from fastpair.jobs import scoring
from fastpair.kernels import cpu, pairs, simd  # noqa: F401  the forks find them loaded
from fastpair.soft_lookup import soft_lookup

KILLS = int(os.environ.get("FASTPAIR_KILLS", "1"))
PAIRS, ENTITIES = 1_500_000, 12_000
SIGNALS = (signal.SIGKILL, signal.SIGTERM)

LISTED = {"table": "t.h5", "pairs": "p.h5"}
HELD = {"table": "t.h5", "values": "ids.h5"}
JOBS = {
    "s.h5": (jobs.score, LISTED),
    "packed.h5": (jobs.score, {**LISTED, "compression": "gzip"}),
    "kept.h5": (jobs.score, {**LISTED, "min_score": 0.1}),
    "s.csv": (jobs.score, LISTED),
    "s.csv.gz": (jobs.score, LISTED),
    "s.parquet": (jobs.score, LISTED),
    "best.h5": (jobs.matrix, {"table": "t.h5", "top_k": 10}),
    "best.csv": (jobs.matrix, {"table": "t.h5", "top_k": 10}),
    "above.h5": (jobs.matrix, {"table": "t.h5", "threshold": 0.35}),
    "above.npz": (jobs.matrix, {"table": "t.h5", "threshold": 0.35}),
    "dense.npy": (jobs.matrix, {"table": "t.h5", "dense": True, "against": "few.h5"}),
    "averages.h5": (soft_lookup, HELD),
    "packed averages.h5": (soft_lookup, {**HELD, "compression": "gzip"}),
    "few averages.h5": (soft_lookup, {**HELD, "top_k": 10}),
    "s by blocks.h5": (jobs.score, LISTED),
    "s by blocks.csv": (jobs.score, LISTED),
    "best by blocks.h5": (jobs.matrix, {"table": "t.h5", "top_k": 10}),
    "above by blocks.h5": (jobs.matrix, {"table": "t.h5", "threshold": 0.35}),
}
QUICK = ("s.h5", "s.csv", "s.parquet", "best.h5", "above.h5", "averages.h5", "s by blocks.h5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    rng = np.random.default_rng(0)
    with h5py.File(folder / "ids.h5", "w") as file:
        file["embeddings"] = rng.standard_normal((ENTITIES, 48), dtype=np.float32)
        file["ids"] = [f"entity {number}" for number in range(ENTITIES)]
    with h5py.File(folder / "others.h5", "w") as file:
        file["embeddings"] = rng.standard_normal((2000, 48), dtype=np.float32)
    with h5py.File(folder / "p.h5", "w") as file:
        file["pairs"] = rng.integers(0, ENTITIES, (PAIRS, 2), dtype=np.int32)
    jobs.project("cosine", folder / "ids.h5", folder / "t.h5")
    jobs.project("cosine", folder / "others.h5", folder / "few.h5")
    return folder


def begin(name, folder, **options):
    """Start a job in a process of its own; return its number.

    Its exit code is 0 where the job was done, 2 where it had found work of an earlier process.
    """
    child = os.fork()
    if child:
        return child
    try:
        function, given = JOBS[name]
        paths = {
            key: folder / value if isinstance(value, str) and value.endswith(".h5") else value
            for key, value in given.items()
        }
        results.SCORE_BLOCK = scoring.SCORE_BLOCK = 1 << 16
        scoring.EXPORTED_AT_ONCE = 1 << 13
        results.ROWS_AT_ONCE, attention._PAIRS_A_GROUP = 1 << 10, 1 << 24
        with little_memory(ENTITIES // 3) if "by blocks" in name else nullcontext():
            summary = function(output=folder / name, **paths, **options)
        os._exit(2 if summary["resumed_from"] else 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(1)


def code_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("name", JOBS if KILLS > 1 else QUICK)
def test_killed_runs_resume_to_the_same_bytes(folder, name):
    rng = np.random.default_rng(sorted(JOBS).index(name))
    for _ in range(2):  # the second time nothing is compiled
        (folder / name).unlink(missing_ok=True)
        begun = time.monotonic()
        assert code_of(begin(name, folder)) == 0
        took = time.monotonic() - begun
    expected = (folder / name).read_bytes()
    before = set(os.listdir(folder))
    kills = found = 0
    while kills < KILLS:
        (folder / name).unlink()
        child = begin(name, folder)
        while True:
            time.sleep(rng.random() * took)
            os.kill(child, SIGNALS[int(rng.integers(len(SIGNALS)))])
            kills += code_of(child) < 0
            if (folder / name).exists():
                (folder / f"{name}.partial").unlink(missing_ok=True)  # killed between the two
                break
            if rng.random() < 0.7:
                code = code_of(begin(name, folder, resume=True))
                assert code in (0, 2)
                found += code == 2
                break
            child = begin(name, folder, resume=True)  # to be killed as well
        assert (folder / name).read_bytes() == expected
        assert set(os.listdir(folder)) == before
    (folder / name).unlink()
    print(f"{name}: {kills} kills, {found} resumed runs found work that was done")
