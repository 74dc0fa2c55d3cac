"""Learned similarities: the default model's plan, and a learned Mahalanobis distance.

Peers are given what they need to be as fast as they can be: raw embeddings and weights for the
default model, whose formula is ``sum w x y + sum v |x - y|``, so that they gather half of what a
folded row holds; blocks that stay in cache; memory that was allocated before.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from arrays import (
    CORES,
    SAMPLE,
    blocks,
    check_close,
    check_top_k,
    halves,
    in_threads,
    sized,
    table,
)
from ceilings import read_probe
from race import Bar, Entry, Work

from fastpair.folding import fold
from fastpair.matrix import all_pairs
from fastpair.model import Branch, Model, builtin
from fastpair.scoring import PairScorer
from fastpair.towers import Linear

COLUMNS, K = 384, 10
LARGER = 5
"""Scores are sums of larger terms than a cosine's, and so are their errors."""

GATHERED = 512
"""Pairs at once: of 128 to 8,192 the fastest for NumPy and for torch."""

CACHED = 512
"""Rows whose differences from one row NumPy computes at once: of 64 to 512 the fastest; columns one
after another as an outer maximum is no faster."""


@dataclass
class Job:
    """Embeddings, the weights of the two sums, and pairs of row numbers."""

    embeddings: np.ndarray
    product: np.ndarray
    difference: np.ndarray
    left: np.ndarray
    right: np.ndarray

    @property
    def sizes(self):
        count, columns = self.embeddings.shape
        sizes = {"entities": count, "columns": 2 * columns, "threads": CORES}
        return {**sizes, "pairs": len(self.left)} if len(self.left) else sizes

    @property
    def pairs(self):
        return float(len(self.left)) or float(len(self.embeddings)) ** 2

    @property
    def model(self):
        return Model(
            [
                Branch("product", {"weight": self.product.astype(np.float64)}),
                Branch("absdiff", {"weight": self.difference.astype(np.float64)}),
            ],
            input_columns=self.embeddings.shape[1],
        )

    def exact(self, left, right):
        """Scores in float64 of embeddings (m, n) or (n,)."""
        left, right = left.astype(np.float64), right.astype(np.float64)
        return (left * right) @ self.product + np.abs(left - right) @ self.difference


def make(entities, pairs):
    def arrays(scale):
        rng = np.random.default_rng(0)
        count = sized(entities, scale)
        embeddings = rng.standard_normal((count, COLUMNS), dtype=np.float32)
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        # As training leaves them: about the plain similarity, some with the other sign.
        product = rng.normal(1, 1, COLUMNS).astype(np.float32)
        difference = -rng.normal(1, 1, COLUMNS).astype(np.float32)
        left, right = rng.integers(0, count, (2, sized(pairs, scale) if pairs else 0))
        return Job(embeddings, product, difference, left, right)

    return arrays


# --- pairs ----------------------------------------------------------------------------------------


def check_pairs(job, scores, tolerance):
    places = np.arange(0, len(scores), max(1, len(scores) // (100 * SAMPLE)))
    left, right = (job.embeddings[rows[places]] for rows in (job.left, job.right))
    scores = np.asarray(scores)[places].astype(np.float64)
    check_close(scores, job.exact(left, right), LARGER * tolerance)


PAIRS = Work(
    "default model (384 products + 384 absolute differences), 1e6 random pairs of 1e5",
    make(100_000, 1_000_000),
    check_pairs,
    bars=[
        Bar(8, ("NumPy", "torch", "torch.compile")),
        Bar(0, ("memory read",), by="bytes"),
        Bar(0, ("NumPy", "torch", "torch.compile"), ours="fastpair int8"),
    ],
)


def enter_ours(name, precision, tolerance):
    @PAIRS.contender(name)
    def fastpair_pairs(job):
        rows, plan = table(job.model, job.embeddings, precision)
        scorer = PairScorer(rows, plan, threads=CORES)
        moved = job.pairs * (2 * rows.shape[1] + 2 * job.left.itemsize + 4)
        return Entry(
            lambda: scorer(job.left, job.right), tolerance=tolerance, amounts={"bytes": moved}
        )


enter_ours("fastpair", "float32", 2e-5)
enter_ours("fastpair bfloat16", "bfloat16", 0.02)
# One scale for all differences of a table, set by the greatest weighted number, about 1: steps of
# 0.008, so the rounding of 384 of them adds up to 0.06 (one standard deviation).
enter_ours("fastpair int8", "int8", 0.1)


@PAIRS.contender("memory read", remark="one array in order, by all threads: the ceiling")
def memory_read(job):
    run, size = read_probe(4 * job.embeddings.nbytes)
    return Entry(run, amounts={"pairs": 0, "bytes": size}, check=lambda answer: None)


@PAIRS.contender("NumPy", remark="blocks of 512 pairs, preallocated, by all threads")
def numpy_pairs(job):
    from threadpoolctl import threadpool_limits

    scores = np.empty(len(job.left), np.float32)

    def part_of(part):
        rows, others, terms = (np.empty((GATHERED, COLUMNS), np.float32) for _ in range(3))
        second = np.empty(GATHERED, np.float32)
        for block in blocks(part.stop - part.start, GATHERED):
            here = slice(part.start + block.start, part.start + block.stop)
            size = here.stop - here.start
            x, y, term, rest = rows[:size], others[:size], terms[:size], second[:size]
            np.take(job.embeddings, job.left[here], axis=0, out=x, mode="clip")
            np.take(job.embeddings, job.right[here], axis=0, out=y, mode="clip")
            np.multiply(x, y, out=term)
            np.matmul(term, job.product, out=scores[here])
            np.subtract(x, y, out=term)
            np.abs(term, out=term)
            np.matmul(term, job.difference, out=rest)
            scores[here] += rest

    def run():
        with threadpool_limits(1, "blas"):
            in_threads(part_of, halves(len(scores)))
        return scores

    return Entry(run)


@PAIRS.contender("torch", "torch", remark="blocks of 512 pairs, preallocated, by all threads")
def torch_pairs(job):
    import torch

    arrays = (job.embeddings, job.product, job.difference, job.left, job.right)
    embeddings, product, difference, left, right = map(torch.from_numpy, arrays)
    scores = torch.empty(len(left))

    def part_of(part):
        torch.set_num_threads(1)  # of this thread: the pool makes the others
        rows, others, terms = (torch.empty((GATHERED, COLUMNS)) for _ in range(3))
        for block in blocks(part.stop - part.start, GATHERED):
            here = slice(part.start + block.start, part.start + block.stop)
            size = here.stop - here.start
            x, y, term = rows[:size], others[:size], terms[:size]
            torch.index_select(embeddings, 0, left[here], out=x)
            torch.index_select(embeddings, 0, right[here], out=y)
            torch.mul(x, y, out=term)
            torch.mv(term, product, out=scores[here])
            torch.sub(x, y, out=term)
            scores[here].addmv_(term.abs_(), difference)

    def run():
        in_threads(part_of, halves(len(scores)))
        torch.set_num_threads(CORES)
        return scores

    return Entry(run, read=lambda scores: scores.numpy())


@PAIRS.contender("torch.compile", "torch", remark="gather and both sums in one compiled loop")
def torch_compiled_pairs(job):
    import torch

    torch.set_num_threads(CORES)
    arrays = (job.embeddings, job.product, job.difference, job.left, job.right)
    arguments = tuple(map(torch.from_numpy, arrays))

    @torch.compile
    def score(embeddings, product, difference, left, right):
        x, y = embeddings[left], embeddings[right]
        return (x * y * product + (x - y).abs() * difference).sum(dim=1)

    return Entry(lambda: score(*arguments), read=lambda scores: scores.numpy())


@PAIRS.contest
def test_default_model_pairs(race, contender):
    race(PAIRS, contender)


# --- all pairs ------------------------------------------------------------------------------------


ALL_PAIRS = Work(
    "default model (384 products + 384 absolute differences), all pairs of 10,000, top 10",
    make(10_000, 0),
    check=lambda job, answer, tolerance: check_top_k(
        answer, lambda row: job.exact(job.embeddings, job.embeddings[row]), K, LARGER * tolerance
    ),
    bars=[Bar(8, ("NumPy", "torch", "torch.compile"))],
)


@ALL_PAIRS.contender("fastpair")
def fastpair_top_k(job):
    rows, plan = table(job.model, job.embeddings)

    def run():
        return list(all_pairs(rows, None, plan, threads=CORES, memory="2GiB").top_k(K))

    def read(parts):
        return tuple(np.concatenate([part[n] for part in parts]) for n in (2, 1))

    return Entry(run, read=read)


@ALL_PAIRS.contender("NumPy", remark="GEMM + broadcast differences in cache, by all threads")
def numpy_top_k(job):
    from threadpoolctl import threadpool_limits

    x = job.embeddings
    count = min(len(x), sized(len(x), 0.05, 100))
    weighted = x[:count] * job.product

    def block(part):
        scores = weighted[part] @ x.T
        terms = np.empty((CACHED, COLUMNS), np.float32)
        for row, of_row in zip(x[part], scores, strict=True):
            for others in blocks(len(x), CACHED):
                term = terms[: others.stop - others.start]
                np.subtract(x[others], row, out=term)
                np.abs(term, out=term)
                of_row[others] += term @ job.difference
        columns = np.argpartition(scores, len(x) - K - 1, axis=1)[:, -K - 1 :]
        return columns, np.take_along_axis(scores, columns, axis=1)

    def run():
        with threadpool_limits(1, "blas"), ThreadPoolExecutor(CORES) as pool:
            return list(pool.map(block, list(blocks(count, 50))))

    def read(parts):
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    return Entry(run, count / len(x), read)


@ALL_PAIRS.contender("torch", "torch", remark="mm, cdist (p=1) of each sign's columns, topk")
def torch_top_k(job):
    import torch

    torch.set_num_threads(CORES)
    x = torch.from_numpy(job.embeddings)
    count = min(len(x), sized(len(x), 0.1, 100))
    weighted = x[:count] * torch.from_numpy(job.product)
    scaled = x * torch.from_numpy(np.abs(job.difference))
    runs = [
        (sign, scaled[:, torch.from_numpy(job.difference * sign > 0)].contiguous())
        for sign in (1, -1)
    ]

    def run():
        best = []
        for part in blocks(count, 500):
            scores = weighted[part] @ x.T
            for sign, columns in runs:
                scores.add_(torch.cdist(columns[part], columns, p=1), alpha=sign)
            best.append(torch.topk(scores, K + 1))
        return best

    def read(best):
        return tuple(torch.cat([block[n] for block in best]).numpy() for n in (1, 0))

    return Entry(run, count / len(x), read)


@ALL_PAIRS.contender("torch.compile", "torch", remark="mm + differences in a compiled loop, topk")
def torch_compiled_top_k(job):
    import torch

    torch.set_num_threads(CORES)
    x, product, difference = map(torch.from_numpy, (job.embeddings, job.product, job.difference))
    count = min(len(x), sized(len(x), 0.1, 100))

    @torch.compile(dynamic=True)
    def differences(some, others, weights):
        return ((some[:, None, :] - others[None, :, :]).abs() * weights).sum(dim=2)

    def run():
        best = []
        for part in blocks(count, 100):
            scores = (x[part] * product) @ x.T + differences(x[part], x, difference)
            best.append(torch.topk(scores, K + 1))
        return best

    def read(best):
        return tuple(torch.cat([block[n] for block in best]).numpy() for n in (1, 0))

    return Entry(run, count / len(x), read)


@ALL_PAIRS.contest
def test_default_model_all_pairs(race, contender):
    race(ALL_PAIRS, contender)


# --- Mahalanobis ----------------------------------------------------------------------------------


@dataclass
class Mahalanobis:
    """Embeddings, a projection, and pairs of row numbers."""

    embeddings: np.ndarray
    projection: np.ndarray
    left: np.ndarray
    right: np.ndarray

    @property
    def sizes(self):
        count, columns = self.embeddings.shape
        sizes = {"entities": count, "columns": columns, "projected to": len(self.projection)}
        return {**sizes, "pairs": len(self.left), "threads": CORES}

    @property
    def pairs(self):
        return float(len(self.left))


def make_mahalanobis(scale):
    rng = np.random.default_rng(0)
    count = sized(50_000, scale)
    left, right = rng.integers(0, count, (2, sized(1_000_000, scale)))
    return Mahalanobis(
        rng.standard_normal((count, 300), dtype=np.float32),
        rng.standard_normal((64, 300)) / 300**0.5,
        left,
        right,
    )


def check_mahalanobis(job, scores, tolerance):
    places = np.arange(0, len(scores), max(1, len(scores) // (100 * SAMPLE)))
    left, right = (job.embeddings[rows[places]] for rows in (job.left, job.right))
    truth = -np.linalg.norm((left.astype(np.float64) - right) @ job.projection.T, axis=1)
    check_close(np.asarray(scores)[places].astype(np.float64), truth, 10 * tolerance)


MAHALANOBIS = Work(
    "learned Mahalanobis (300 to 64), 1e6 pairs of 5e4, projection counted",
    make_mahalanobis,
    check_mahalanobis,
    bars=[Bar(20, ("metric-learn pair_score",))],
)


@MAHALANOBIS.contender("fastpair", remark="fold, then score")
def fastpair_mahalanobis(job):
    euclidean = builtin("euclidean")
    model = Model(
        [Branch("sqdiff", {"weight": -np.ones(1)}, tower=Linear(job.projection))],
        input_columns=job.embeddings.shape[1],
        link=euclidean.link,
    )

    def run():
        rows, plan = fold(model, job.embeddings, threads=CORES)
        return PairScorer(rows, plan, threads=CORES)(job.left, job.right)

    return Entry(run)


@MAHALANOBIS.contender(
    "metric-learn pair_score", "metric_learn", remark="blocks of 20,000 pairs from its preprocessor"
)
def metric_learn_pairs(job):
    import metric_learn
    from metric_learn import _util
    from sklearn.utils import check_array

    def check_array_as_it_was(*arguments, force_all_finite=True, **options):
        # scikit-learn renamed the argument in 1.6; metric-learn 0.7 says the old name.
        return check_array(*arguments, ensure_all_finite=force_all_finite, **options)

    _util.check_array = check_array_as_it_was
    learner = metric_learn.MMC(preprocessor=job.embeddings)
    learner.components_ = job.projection
    learner._check_preprocessor()
    count = min(len(job.left), sized(len(job.left), 0.2))
    pairs = np.stack([job.left[:count], job.right[:count]], axis=1)

    def run():
        return [learner.pair_score(pairs[part]) for part in blocks(count, 20_000)]

    return Entry(run, count / len(job.left), np.concatenate)


@MAHALANOBIS.contender("NumPy", remark="projected once, then gather and norm in blocks of 2,048")
def numpy_mahalanobis(job):
    scores = np.empty(len(job.left), np.float32)

    def run():
        z = job.embeddings @ job.projection.T.astype(np.float32)

        def part_of(part):
            for block in blocks(part.stop - part.start, 2_048):
                here = slice(part.start + block.start, part.start + block.stop)
                difference = z[job.left[here]] - z[job.right[here]]
                np.sqrt(np.einsum("ij,ij->i", difference, difference), out=scores[here])

        in_threads(part_of, halves(len(scores)))
        return np.negative(scores, out=scores)

    return Entry(run)


@MAHALANOBIS.contest
def test_mahalanobis(race, contender):
    race(MAHALANOBIS, contender)
