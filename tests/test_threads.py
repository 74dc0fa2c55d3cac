"""Threads change the time that work takes and nothing else, and Ctrl-C ends it at once."""

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock

import numpy as np
import pytest
from test_folding import random_model
from test_training import groups_in_noise
from threadpoolctl import threadpool_info, threadpool_limits

from fastpair.backend import one_blas_thread
from fastpair.files import write_embeddings, write_model, write_pairs
from fastpair.folding import fold
from fastpair.matrix import AllPairs
from fastpair.model import Branch, Model, Preparation, fit_density
from fastpair.scoring import PairScorer
from fastpair.towers import Linear
from fastpair.training import train

THREADS = [1, 2, 3, 7]
FASTPAIR = [sys.executable, "-c", "from fastpair.cli import main; main()"]
SECONDS_TO_STOP = 5.0
"""It is about one; this leaves room for a machine that is busy with other tests."""


def work(threads: int) -> list[bytes]:
    """Fold, score pairs and take the best of all pairs; return the bits of all of it."""
    rng = np.random.default_rng(0)
    model = random_model(rng, ["cosine", "absdiff", "bilinear"])
    rows, plan = fold(model, rng.normal(size=(2500, 12)), threads=threads)
    left, right = rng.integers(0, 2500, (2, 200_000))
    scores = PairScorer(rows, plan, threads=threads)(left, right)
    best = list(AllPairs(rows, None, plan, threads=threads).top_k(3))
    return [rows.tobytes(), scores.tobytes(), *(a.tobytes() for part in best for a in part[1:])]


def networks(threads: int) -> list[bytes]:
    rng = np.random.default_rng(1)
    rows, plan = fold(random_model(rng, ["mlp"]), rng.normal(size=(900, 12)), threads=threads)
    left, right = rng.integers(0, 900, (2, 150_000))
    return [PairScorer(rows, plan, threads=threads)(left, right).tobytes()]


def learned(threads: int) -> list[bytes]:
    rows, *pairs = groups_in_noise(11)
    model = train(rows, *pairs, epochs=2, threads=threads).model
    return [model.fingerprint().encode()]


JOBS = [work, networks, learned]


@pytest.mark.parametrize("job", JOBS)
def test_results_are_the_same_bits_for_any_number_of_threads(job):
    alone = job(1)
    for threads in THREADS[1:]:
        assert job(threads) == alone, threads


@pytest.mark.parametrize("job", JOBS)
def test_blas_threads_of_the_process_change_no_bits(job):
    with threadpool_limits(1, "blas"):
        alone = job(2)
    with threadpool_limits(4, "blas"):
        assert job(2) == alone


def test_several_python_threads_at_once_get_the_bits_that_each_gets_alone():
    alone = [job(2) for job in JOBS]
    begin = Barrier(6)

    def together(number: int) -> bool:
        begin.wait()
        which = number % len(JOBS)
        return all(JOBS[which](1 + number % 3) == alone[which] for _ in range(3))

    before = blas_threads()
    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(together, range(6)))
    assert blas_threads() == before


def blas_threads() -> list[int]:
    return [part["num_threads"] for part in threadpool_info() if part["user_api"] == "blas"]


TYPES_ADDED_LATER = """
from numba.core.typing.typeof import typeof_impl
from fastpair.kernels import simd
known = set(typeof_impl.registry)
import numpy as np
from fastpair import fold, score_pairs
table = fold(np.eye(4, dtype=np.float32))
score_pairs(table, [[0, 1]])
print(sorted(map(str, set(typeof_impl.registry) - known)))
"""


def test_numba_knows_all_types_once_a_kernel_is_imported():
    """What is added later, other threads may be going through: a command then ends by chance."""
    found = subprocess.run(
        [sys.executable, "-c", TYPES_ADDED_LATER], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_blas_stays_in_one_thread_until_its_last_user_is_done():
    with threadpool_limits(2, "blas"):
        before = blas_threads()
        first, second = one_blas_thread(), one_blas_thread()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert set(blas_threads()) == {1}
        second.__exit__(None, None, None)
        assert blas_threads() == before
        assert set(before) != {1}


class Watch:
    """Counts how many threads are in a method at once, and the threads of BLAS meanwhile."""

    def __init__(self, monkeypatch, owner: type, name: str) -> None:
        self.most, self.blas = 0, set()
        self._now, self._lock, self._method = 0, Lock(), getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments: self._call(*arguments))

    def _call(self, owner, rows, *rest):
        if len(rows) == 1:  # only looks at the shape of what comes out
            return self._method(owner, rows, *rest)
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
            self.blas.update(blas_threads())
        try:
            return self._method(owner, rows, *rest)
        finally:
            with self._lock:
                self._now -= 1


@pytest.mark.parametrize("threads", [1, 3])
def test_folding_computes_in_no_more_threads_than_were_asked_for(monkeypatch, threads):
    rng = np.random.default_rng(2)
    model = random_model(rng, ["cosine", "absdiff"])
    watch = Watch(monkeypatch, Model, "fold")
    with threadpool_limits(4, "blas"):
        fold(model, rng.normal(size=(20_000, 12)), threads=threads)
    assert 1 <= watch.most <= threads
    assert watch.blas == {1}


@pytest.mark.parametrize("threads", [1, 3])
def test_training_computes_in_no_more_threads_than_were_asked_for(monkeypatch, threads):
    watch = Watch(monkeypatch, Linear, "_map")
    rows, *pairs = groups_in_noise(12)
    with threadpool_limits(4, "blas"):
        train(rows, *pairs, epochs=1, threads=threads)
    assert 1 <= watch.most <= threads
    assert watch.blas == {1}


@pytest.fixture(scope="module")
def long_jobs(tmp_path_factory):
    """Files whose every command takes far longer than a test waits."""
    folder = tmp_path_factory.mktemp("long")
    rng = np.random.default_rng(0)
    count, columns = 60_000, 128
    embeddings = rng.standard_normal((count, columns), dtype=np.float32)
    write_embeddings(folder / "e.h5", [(0, embeddings)], embeddings.shape)
    density, _ = fit_density(embeddings[:5000], Preparation(unit_rows=True), rng)
    branches = [Branch("cosine", {"scale": np.ones(1)})]
    model = Model(branches, columns, Preparation(unit_rows=True), density)
    write_model(folder / "m.h5", model)
    left, right = rng.integers(0, count, (2, 40_000))
    same = rng.integers(0, 2, 40_000).astype(float)
    write_pairs(folder / "p.h5", [(left, right, same)], len(left), label=True)
    lines = "".join(f"{a},{b}\n" for a, b in zip(left, right, strict=True))
    (folder / "many.csv").write_text("left,right\n" + lines * 300)
    command = [*FASTPAIR, "project", "cosine", "e.h5", "-o", "t.h5"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


LONG = {
    "score": ["t.h5", "many.csv", "-o", "out.csv"],
    "matrix": ["t.h5", "--histogram", "--bins", "1000", "-o", "out.h5"],
    "project": ["m.h5", "e.h5", "-o", "out.h5"],
    "train": ["e.h5", "p.h5", "--epochs", "1000", "-o", "out.h5"],
    "evaluate": ["m.h5", "e.h5", "p.h5", "--bootstrap", "100000"],
}


@pytest.mark.parametrize("command", LONG)
def test_ctrl_c_stops_a_command_and_leaves_no_output(long_jobs, command, record_property):
    before = set(long_jobs.iterdir())
    process = subprocess.Popen(
        [*FASTPAIR, command, *LONG[command]],
        cwd=long_jobs,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(3)
    if process.poll() is not None:
        pytest.skip(f"{command} was over before it could be interrupted")
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    words = process.communicate(timeout=60)[1]
    seconds = time.monotonic() - begun
    record_property("seconds to stop", seconds)
    print(f"{command} stopped after {seconds:.2f} s")
    left = {path.name for path in set(long_jobs.iterdir()) - before}
    for name in left:
        (long_jobs / name).unlink()
    assert process.returncode == 130, words
    assert "Traceback" not in words
    assert words.strip().splitlines()[-1].startswith("fastpair: interrupted")
    assert not {"out.h5", "out.csv"} & left
    assert left <= {"out.csv.partial", "out.h5.training"}
    assert seconds < SECONDS_TO_STOP
