"""All pairs of one table: the best ten of each row, or all pairs above a threshold.

The rows are unit vectors, so that inner product, cosine and Euclidean distance rank alike and
everyone can use what is fastest there. Those who would take minutes do the first rows against all
others, and the time is scaled up.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from arrays import (
    CORES,
    blocks,
    check_top_k,
    halves,
    in_threads,
    sized,
    table,
    unit_vectors,
)
from race import Bar, Entry, Work, WrongAnswer

from fastpair.matrix import all_pairs
from fastpair.model import builtin

K = 10
MEMORY = "2GiB"
ROWS = 500
"""Rows of the matrix that a block of NumPy or torch computes."""

TIE = 1e-6
"""Pairs that are this close to the threshold may be in or out."""


@dataclass
class Job:
    """Entities of which all pairs are scored."""

    vectors: np.ndarray

    @property
    def sizes(self):
        count, columns = self.vectors.shape
        return {"entities": count, "columns": columns, "threads": CORES}

    @property
    def pairs(self):
        return float(len(self.vectors)) ** 2

    def first(self, share):
        """The first rows, and what share of all they are."""
        count = min(len(self.vectors), sized(len(self.vectors), share, 100))
        return self.vectors[:count], count / len(self.vectors)

    @cached_property
    def exact(self):
        """The rows in float64."""
        return self.vectors.astype(np.float64)

    def dots(self, row):
        return self.exact @ self.exact[row]

    @cached_property
    def threshold(self):
        """What 8 in 100,000 cosines of random directions are above: 1e5 pairs of 50,000 rows."""
        from scipy.stats import beta

        half = (self.vectors.shape[1] - 1) / 2
        return float(np.float32(2 * beta(half, half).isf(8e-5) - 1))

    @cached_property
    def kept(self):
        """All pairs (as row * rows + column, sorted) within a tie of the threshold or above it."""
        found = []
        for part in blocks(len(self.vectors), ROWS):
            scores = self.exact[part] @ self.exact.T
            places = np.flatnonzero(scores >= self.threshold - TIE)
            found.append((places + part.start * len(self.vectors), scores.ravel()[places]))
        places, scores = (np.concatenate(column) for column in zip(*found, strict=True))
        rows, columns = np.divmod(places, len(self.vectors))
        return places[rows != columns], scores[rows != columns]


def make(scale):
    return Job(unit_vectors(sized(50_000, scale), 128))


# --- the best ten -------------------------------------------------------------------------------


TOP_K = Work(
    "all pairs, 50,000 x 128, exact top 10, dot",
    make,
    check=lambda job, answer, tolerance: check_top_k(answer, job.dots, K, tolerance),
    bars=[Bar(8, ("faiss.knn",), aim=15)],
)


def ours(job, model):
    rows, plan = table(model, job.vectors)

    def run():
        return list(all_pairs(rows, None, plan, threads=CORES, memory=MEMORY).top_k(K))

    def read(parts):
        return tuple(np.concatenate([part[n] for part in parts]) for n in (2, 1))

    return Entry(run, read=read)


@TOP_K.contender("fastpair")
def fastpair_top_k(job):
    return ours(job, builtin("dot"))


@TOP_K.contender("faiss.knn", "faiss", remark="inner product")
def faiss_top_k(job):
    import faiss

    faiss.omp_set_num_threads(CORES)
    metric = faiss.METRIC_INNER_PRODUCT
    queries, share = job.first(0.25)

    def run():
        return faiss.knn(queries, job.vectors, K + 1, metric=metric)

    return Entry(run, share, lambda answer: (answer[1], answer[0]))


@TOP_K.contender("torch", "torch", remark="matmul + topk in blocks of 500 rows")
def torch_top_k(job):
    import torch

    torch.set_num_threads(CORES)
    queries, share = job.first(0.1)
    vectors = torch.from_numpy(job.vectors)
    scores = torch.empty((ROWS, len(vectors)))

    def run():
        best = []
        for part in blocks(len(queries), ROWS):
            product = scores[: part.stop - part.start]
            torch.mm(vectors[part], vectors.T, out=product)
            best.append(torch.topk(product, K + 1))
        return best

    def read(best):
        return tuple(torch.cat([block[n] for block in best]).numpy() for n in (1, 0))

    return Entry(run, share, read)


@TOP_K.contender("scikit-learn brute", "sklearn", remark="NearestNeighbors, euclidean")
def sklearn_top_k(job):
    from sklearn.neighbors import NearestNeighbors

    queries, share = job.first(0.1)
    search = NearestNeighbors(n_neighbors=K + 1, algorithm="brute", n_jobs=CORES).fit(job.vectors)

    def read(answer):
        return answer[1], 1 - answer[0] ** 2 / 2

    return Entry(lambda: search.kneighbors(queries), share, read, tolerance=2e-4)


def best_of(scores):
    """Columns and scores of the K + 1 best of each row, not in order."""
    columns = np.argpartition(scores, scores.shape[1] - K - 1, axis=1)[:, -K - 1 :]
    return columns, np.take_along_axis(scores, columns, axis=1)


def join(parts):
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


@TOP_K.contender("NumPy", remark="GEMM + argpartition in blocks of 500 rows, by all threads")
def numpy_top_k(job):
    queries, share = job.first(0.04)
    scores = np.empty((ROWS, len(job.vectors)), np.float32)

    def run():
        best = []
        with ThreadPoolExecutor(CORES) as pool:
            for part in blocks(len(queries), ROWS):
                product = scores[: part.stop - part.start]
                np.matmul(job.vectors[part], job.vectors.T, out=product)
                best += pool.map(best_of, [product[half] for half in halves(len(product))])
        return best

    return Entry(run, share, join)


@TOP_K.contender("usearch exact", "usearch.index", remark="inner product, float32")
def usearch_top_k(job):
    from usearch.index import MetricKind, search

    queries, share = job.first(0.01)

    def run():
        return search(
            job.vectors, queries, K + 1, MetricKind.IP, exact=True, threads=CORES, dtype="f32"
        )

    def read(matches):
        return np.asarray(matches.keys).astype(np.int64), 1 - np.asarray(matches.distances)

    return Entry(run, share, read)


@TOP_K.contender("chunkdot", "chunkdot", remark="normalize=False, 2 GB")
def chunkdot_top_k(job):
    from chunkdot import cosine_similarity_top_k

    queries, share = job.first(0.04)

    def run():
        return cosine_similarity_top_k(
            queries,
            embeddings_right=job.vectors,
            top_k=K + 1,
            normalize=False,
            max_memory=2_000_000_000,
        )

    def read(matrix):
        shape = (len(queries), K + 1)
        return matrix.indices.reshape(shape), matrix.data.reshape(shape)

    return Entry(run, share, read)


@TOP_K.contender(
    "NumKong dots_packed", "numkong", remark="+ NumPy argpartition, by all threads; float64 sums"
)
def numkong_top_k(job):
    import numkong

    queries, share = job.first(0.02)
    packed = numkong.dots_pack(job.vectors)

    def block(part):
        return best_of(np.asarray(numkong.dots_packed(queries[part], packed)))

    def run():
        with ThreadPoolExecutor(CORES) as pool:
            return list(pool.map(block, list(blocks(len(queries), 100))))

    return Entry(run, share, join)


@TOP_K.contender(
    "NumKong dots_symmetric",
    "numkong",
    remark="products alone, nothing is kept: a fifth of the rows with each other; float64 sums",
)
def numkong_symmetric(job):
    import numkong

    vectors, share = job.first(0.2)
    count = len(vectors)
    products = numkong.dots_symmetric(vectors)  # its own type of array
    # The upper triangle in bands of about equal area, twice as many as threads.
    edges = [round(count * (1 - (1 - n / (2 * CORES)) ** 0.5)) for n in range(2 * CORES + 1)]
    bands = list(pairwise(edges))

    def band(rows):
        numkong.dots_symmetric(vectors, out=products, start_row=rows[0], end_row=rows[1])

    def check(answer):
        for row in range(0, count, max(1, count // 20)):
            truth = vectors[row:].astype(np.float64) @ vectors[row].astype(np.float64)
            if np.abs(answer[row, row:] - truth).max() > 1e-6:
                raise WrongAnswer(f"row {row} of the products is wrong")

    return Entry(
        lambda: in_threads(band, bands),
        share**2,
        read=lambda answer: np.asarray(products),
        check=check,
    )


@TOP_K.contest
def test_top_k(race, contender):
    race(TOP_K, contender)


# --- above a threshold ----------------------------------------------------------------------------


def check_kept(job, answer, tolerance):
    """Compare the pairs of the first rows with all that float64 finds, but for ties."""
    queries, rows, columns = answer
    count = len(job.vectors)
    found = np.sort((rows * count + columns)[rows != columns])
    places, scores = job.kept
    early = places < queries * count
    places, scores = places[early], scores[early]
    lost = np.setdiff1d(places[scores > job.threshold + TIE], found)
    strange = np.setdiff1d(found, places)
    if len(lost) or len(strange) or len(np.unique(found)) != len(found):
        raise WrongAnswer(f"{len(lost)} pairs are lost, {len(strange)} do not belong")


ABOVE = Work(
    "all pairs, 50,000 x 128, dot above a threshold that keeps 1e5 pairs",
    make,
    check=check_kept,
    bars=[
        Bar(
            8,
            ("faiss range_search", "torch", "NumPy", "scikit-learn brute", "NumKong dots_packed"),
        )
    ],
    absent={
        "chunkdot": "keeps the best k only",
        "usearch exact": "has no search by distance",
    },
)


@ABOVE.contender("fastpair", remark="each pair from both of its rows, as in the CSR matrix")
def fastpair_above(job):
    rows, plan = table(builtin("dot"), job.vectors)

    def run():
        walk = all_pairs(rows, None, plan, threads=CORES, memory=MEMORY)
        return list(walk.above(job.threshold))

    def read(parts):
        owners = [np.repeat(np.arange(p[0], p[0] + len(p[1])), p[1]) for p in parts]
        return len(rows), np.concatenate(owners), np.concatenate([p[2] for p in parts])

    return Entry(run, read=read)


@ABOVE.contender("faiss range_search", "faiss", remark="IndexFlatIP")
def faiss_above(job):
    import faiss

    faiss.omp_set_num_threads(CORES)
    queries, share = job.first(0.15)
    index = faiss.IndexFlatIP(job.vectors.shape[1])
    index.add(job.vectors)

    def read(answer):
        limits, _, columns = answer
        rows = np.repeat(np.arange(len(queries)), np.diff(limits).astype(np.int64))
        return len(queries), rows, columns

    return Entry(lambda: index.range_search(queries, job.threshold), share, read)


@ABOVE.contender("torch", "torch", remark="matmul + nonzero in blocks of 500 rows")
def torch_above(job):
    import torch

    torch.set_num_threads(CORES)
    queries, share = job.first(0.1)
    vectors = torch.from_numpy(job.vectors)
    scores = torch.empty((ROWS, len(vectors)))

    def run():
        found = []
        for part in blocks(len(queries), ROWS):
            product = scores[: part.stop - part.start]
            torch.mm(vectors[part], vectors.T, out=product)
            places = (product >= job.threshold).nonzero()
            places[:, 0] += part.start
            found.append(places)
        return found

    def read(found):
        places = torch.cat(found).numpy()
        return len(queries), places[:, 0], places[:, 1]

    return Entry(run, share, read)


@ABOVE.contender("NumPy", remark="GEMM + nonzero in blocks of 500 rows, by all threads")
def numpy_above(job):
    queries, share = job.first(0.1)
    count = len(job.vectors)
    scores = np.empty((ROWS, count), np.float32)
    mask = np.empty((ROWS, count), np.bool_)

    def block(start, part):
        np.greater_equal(scores[part], np.float32(job.threshold), out=mask[part])
        return np.flatnonzero(mask[part]) + (start + part.start) * count

    def run():
        found = []
        with ThreadPoolExecutor(CORES) as pool:
            for part in blocks(len(queries), ROWS):
                size = part.stop - part.start
                np.matmul(job.vectors[part], job.vectors.T, out=scores[:size])
                found += pool.map(lambda half, at=part.start: block(at, half), halves(size))
        return found

    return Entry(run, share, lambda found: (len(queries), *np.divmod(np.concatenate(found), count)))


@ABOVE.contender("scikit-learn brute", "sklearn", remark="radius_neighbors, euclidean")
def sklearn_above(job):
    from sklearn.neighbors import NearestNeighbors

    queries, share = job.first(0.05)
    radius = (2 - 2 * job.threshold) ** 0.5
    search = NearestNeighbors(radius=radius, algorithm="brute", n_jobs=CORES).fit(job.vectors)

    def read(columns):
        rows = np.repeat(np.arange(len(queries)), [len(found) for found in columns])
        return len(queries), rows, np.concatenate(list(columns))

    return Entry(lambda: search.radius_neighbors(queries, return_distance=False), share, read)


@ABOVE.contender(
    "NumKong dots_packed", "numkong", remark="+ NumPy nonzero, by all threads; float64 sums"
)
def numkong_above(job):
    import numkong

    queries, share = job.first(0.04)
    count = len(job.vectors)
    packed = numkong.dots_pack(job.vectors)

    def block(part):
        scores = np.asarray(numkong.dots_packed(queries[part], packed))
        return np.flatnonzero(scores >= job.threshold) + part.start * count

    def run():
        with ThreadPoolExecutor(CORES) as pool:
            return list(pool.map(block, list(blocks(len(queries), 100))))

    return Entry(run, share, lambda found: (len(queries), *np.divmod(np.concatenate(found), count)))


@ABOVE.contest
def test_above(race, contender):
    race(ABOVE, contender)


# --- absolute differences ---------------------------------------------------------------------


def make_fewer(scale):
    return Job(unit_vectors(sized(20_000, scale), 128))


DIFFERENCES = Work(
    "all pairs, 20,000 x 128, exact top 10, absolute differences",
    make_fewer,
    check=lambda job, answer, tolerance: check_top_k(
        answer, lambda row: -np.abs(job.exact - job.exact[row]).sum(axis=1), K, tolerance
    ),
    bars=[
        Bar(6, ("faiss.knn L1",)),
        Bar(25, ("SciPy cdist", "scikit-learn brute", "torch cdist")),
    ],
)


@DIFFERENCES.contender("fastpair")
def fastpair_differences(job):
    return ours(job, builtin("manhattan"))


@DIFFERENCES.contender("faiss.knn L1", "faiss")
def faiss_differences(job):
    import faiss

    faiss.omp_set_num_threads(CORES)

    def run():
        return faiss.knn(job.vectors, job.vectors, K + 1, metric=faiss.METRIC_L1)

    return Entry(run, read=lambda answer: (answer[1], -answer[0]))


@DIFFERENCES.contender("torch cdist", "torch", remark="p=1, + topk in blocks of 500 rows")
def torch_differences(job):
    import torch

    torch.set_num_threads(CORES)
    queries, share = job.first(0.05)
    vectors = torch.from_numpy(job.vectors)

    def run():
        return [
            torch.topk(torch.cdist(vectors[part], vectors, p=1), K + 1, largest=False)
            for part in blocks(len(queries), ROWS)
        ]

    def read(best):
        indices, distances = (torch.cat([block[n] for block in best]).numpy() for n in (1, 0))
        return indices, -distances

    return Entry(run, share, read)


@DIFFERENCES.contender("scikit-learn brute", "sklearn", remark="NearestNeighbors, manhattan")
def sklearn_differences(job):
    from sklearn.neighbors import NearestNeighbors

    queries, share = job.first(0.05)
    search = NearestNeighbors(
        n_neighbors=K + 1, algorithm="brute", metric="manhattan", n_jobs=CORES
    ).fit(job.vectors)
    return Entry(lambda: search.kneighbors(queries), share, lambda answer: (answer[1], -answer[0]))


@DIFFERENCES.contender("SciPy cdist", "scipy", remark="+ argpartition, by all threads; float64")
def scipy_differences(job):
    from scipy.spatial.distance import cdist

    queries, share = job.first(0.03)

    def block(part):
        distances = cdist(job.exact[part], job.exact, "cityblock")  # it would make float64 itself
        return best_of(np.negative(distances, out=distances))

    def run():
        with ThreadPoolExecutor(CORES) as pool:
            return list(pool.map(block, list(blocks(len(queries), 100))))

    return Entry(run, share, join)


@DIFFERENCES.contest
def test_differences(race, contender):
    race(DIFFERENCES, contender)
