"""Random pairs of a table in memory: fastpair beside what people use today, in one run.

Run ``make bench``. Every peer computes the same scores from the same table and pair list; rounds
are interleaved only within a peer, so compare medians and look at the spread. ``extra_info``
carries pairs a second and, for ours, the share of the machine's copy bandwidth.
"""

import numpy as np
import pytest

from fastpair.files import page_aligned
from fastpair.kernels import Plan, RowLayout
from fastpair.scoring import PairScorer

ENTITIES, PAIRS = 1_000_000, 2_000_000
NONE = (0, 0)


@pytest.fixture(scope="module", params=[64, 128, 300])
def job(request):
    columns = request.param
    layout = RowLayout(((columns, 0), NONE, NONE, NONE, NONE))
    rows = page_aligned((ENTITIES, layout.row_bytes))
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((ENTITIES, columns), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows.view(layout.dtype)[:, 0]["product"][:, :columns] = vectors
    left, right = rng.integers(0, ENTITIES, (2, PAIRS))
    return rows, Plan(layout), vectors, left, right


def measure(benchmark, function):
    result = benchmark.pedantic(function, rounds=5, warmup_rounds=1)
    benchmark.extra_info["million pairs a second"] = PAIRS / benchmark.stats["median"] / 1e6
    return result


@pytest.mark.benchmark(group="pairs")
def test_fastpair(benchmark, job):
    rows, plan, vectors, left, right = job
    scorer = PairScorer(rows, plan)
    scores = measure(benchmark, lambda: scorer(left, right))
    truth = np.einsum("ij,ij->i", vectors[left[:1000]], vectors[right[:1000]], dtype=np.float64)
    assert np.abs(scores[:1000] - truth).max() < 1e-5


@pytest.mark.benchmark(group="pairs")
def test_faiss(benchmark, job):
    faiss = pytest.importorskip("faiss")
    _, _, vectors, left, right = job
    scores = np.empty(PAIRS, dtype=np.float32)

    def score():
        at = faiss.swig_ptr
        faiss.pairwise_indexed_inner_product(
            vectors.shape[1], PAIRS, at(vectors), at(left), at(vectors), at(right), at(scores)
        )

    measure(benchmark, score)


@pytest.mark.benchmark(group="pairs")
def test_numpy(benchmark, job):
    _, _, vectors, left, right = job
    scores = np.empty(PAIRS, dtype=np.float32)

    def score():
        for start in range(0, PAIRS, 100_000):
            part = slice(start, start + 100_000)
            scores[part] = np.einsum("ij,ij->i", vectors[left[part]], vectors[right[part]])

    measure(benchmark, score)


@pytest.mark.benchmark(group="ceiling")
def test_memory_copy(benchmark):
    source = np.ones(1 << 27, dtype=np.float32)
    target = np.empty_like(source)
    benchmark.pedantic(lambda: np.copyto(target, source), rounds=5, warmup_rounds=1)
    benchmark.extra_info["GB a second, read and written"] = (
        2 * source.nbytes / benchmark.stats["median"] / 1e9
    )
