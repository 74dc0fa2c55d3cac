"""All pairs of one table: fastpair beside what people use today, in one run (``make bench``)."""

import numpy as np
import pytest

from fastpair.kernels import Plan, RowLayout
from fastpair.matrix import AllPairs

ENTITIES, COLUMNS, K = 20_000, 128, 10
NONE = (0, 0)


def table(layout, segment):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((ENTITIES, COLUMNS), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    records = np.zeros(ENTITIES, dtype=layout.dtype)
    records[segment] = vectors
    return records.view(np.uint8).reshape(ENTITIES, -1), vectors


def measure(benchmark, function):
    result = benchmark.pedantic(function, rounds=5, warmup_rounds=1)
    rate = ENTITIES**2 / benchmark.stats["median"] / 1e9
    benchmark.extra_info["thousand million pairs a second"] = rate
    return result


@pytest.mark.benchmark(group="all pairs, dot, top 10")
def test_fastpair_top_k(benchmark):
    layout = RowLayout(((COLUMNS, 0), NONE, NONE, NONE, NONE))
    rows, vectors = table(layout, "product")
    ((_, scores, _),) = measure(
        benchmark, lambda: list(AllPairs(rows, None, Plan(layout)).top_k(K))
    )
    truth = vectors[:50].astype(np.float64) @ vectors.T.astype(np.float64)
    truth[np.arange(50), np.arange(50)] = -2
    assert np.abs(scores[:50] + np.sort(-truth, axis=1)[:, :K]).max() < 1e-5


@pytest.mark.benchmark(group="all pairs, dot, top 10")
def test_faiss_top_k(benchmark):
    faiss = pytest.importorskip("faiss")
    vectors = table(RowLayout(((COLUMNS, 0), NONE, NONE, NONE, NONE)), "product")[1]
    measure(
        benchmark, lambda: faiss.knn(vectors, vectors, K + 1, metric=faiss.METRIC_INNER_PRODUCT)
    )


@pytest.mark.benchmark(group="all pairs, dot, above a threshold")
def test_fastpair_threshold(benchmark):
    layout = RowLayout(((COLUMNS, 0), NONE, NONE, NONE, NONE))
    rows, _ = table(layout, "product")
    measure(benchmark, lambda: list(AllPairs(rows, None, Plan(layout)).above(0.37)))


@pytest.mark.benchmark(group="all pairs, dot, above a threshold")
def test_numpy_threshold(benchmark):
    vectors = table(RowLayout(((COLUMNS, 0), NONE, NONE, NONE, NONE)), "product")[1]

    def above():
        return [
            np.nonzero(vectors[start : start + 1000] @ vectors.T >= 0.37)
            for start in range(0, ENTITIES, 1000)
        ]

    measure(benchmark, above)


@pytest.mark.benchmark(group="all pairs, absolute difference, top 10")
def test_fastpair_absolute_difference(benchmark):
    layout = RowLayout((NONE, NONE, NONE, (0, COLUMNS), NONE))
    rows, _ = table(layout, "absolute")
    measure(benchmark, lambda: list(AllPairs(rows, None, Plan(layout)).top_k(K)))


@pytest.mark.benchmark(group="all pairs, absolute difference, top 10")
def test_faiss_absolute_difference(benchmark):
    faiss = pytest.importorskip("faiss")
    vectors = table(RowLayout((NONE, NONE, NONE, (0, COLUMNS), NONE)), "absolute")[1]
    measure(benchmark, lambda: faiss.knn(vectors, vectors, K + 1, metric=faiss.METRIC_L1))
