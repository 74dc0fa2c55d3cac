"""Random pairs of a table in memory, scored one by one.

A random pair costs two rows from memory, so the ceiling is the rate at which memory is read; it is
measured in the same rounds.
"""

from dataclasses import dataclass

import numpy as np
from arrays import (
    CORES,
    SAMPLE,
    blocks,
    check_close,
    halves,
    in_threads,
    sized,
    table,
    unit_vectors,
)
from ceilings import read_probe
from race import Bar, Entry, Work

from fastpair.model import Branch, Model, builtin
from fastpair.scoring import PairScorer

TOGETHER = 100_000
"""Pairs whose rows are gathered at once where NumPy and torch are used as most people do."""

GATHERED = 2_048
"""The same where they are used as well as they can be: what was gathered stays in cache."""


@dataclass
class Job:
    """Unit vectors and pairs of their row numbers."""

    vectors: np.ndarray
    left: np.ndarray
    right: np.ndarray

    @property
    def sizes(self):
        count, columns = self.vectors.shape
        return {"entities": count, "columns": columns, "pairs": len(self.left), "threads": CORES}

    @property
    def pairs(self):
        return float(len(self.left))

    def first(self, share):
        """The number of the first pairs, and what share of all they are."""
        count = min(len(self.left), sized(len(self.left), share))
        return count, count / len(self.left)


def make(columns):
    def arrays(scale):
        entities, pairs = sized(1_000_000, scale), sized(4_000_000, scale)
        rng = np.random.default_rng(0)
        left, right = rng.integers(0, entities, (2, pairs))
        return Job(unit_vectors(entities, columns), left, right)

    return arrays


def check(job, scores, tolerance, bias=None):
    """Compare some of the first scores with float64."""
    places = np.arange(0, len(scores), max(1, len(scores) // (100 * SAMPLE)))
    left, right = (job.vectors[rows[places]].astype(np.float64) for rows in (job.left, job.right))
    truth = np.einsum("ij,ij->i", left, right)
    if bias is not None:
        truth += (left + right) @ bias
    check_close(np.asarray(scores)[places].astype(np.float64), truth, tolerance)


def ours(job, model, precision, tolerance, bias=None):
    rows, plan = table(model, job.vectors, precision)
    scorer = PairScorer(rows, plan, threads=CORES)
    moved = job.pairs * (2 * rows.shape[1] + 2 * job.left.itemsize + 4)
    return Entry(
        lambda: scorer(job.left, job.right),
        tolerance=tolerance,
        amounts={"bytes": moved},
        check=lambda scores: check(job, scores, tolerance, bias),
    )


def faiss_pairs(job, vectors=None):
    import faiss

    faiss.omp_set_num_threads(CORES)
    vectors = job.vectors if vectors is None else vectors
    scores = np.empty(len(job.left), np.float32)
    at = faiss.swig_ptr

    def run():
        faiss.pairwise_indexed_inner_product(
            vectors.shape[1],
            len(scores),
            at(vectors),
            at(job.left),
            at(vectors),
            at(job.right),
            at(scores),
        )
        return scores

    return Entry(run)


def plain_numpy_pairs(job):
    count, share = job.first(0.25)
    scores = np.empty(count, np.float32)

    def run():
        for here in blocks(count, TOGETHER):
            left, right = job.vectors[job.left[here]], job.vectors[job.right[here]]
            scores[here] = np.einsum("ij,ij->i", left, right)
        return scores

    return Entry(run, share)


def plain_torch_pairs(job):
    import torch

    torch.set_num_threads(CORES)
    count, share = job.first(0.25)
    vectors, left, right = map(torch.from_numpy, (job.vectors, job.left, job.right))
    scores = torch.empty(count)

    def run():
        for here in blocks(count, TOGETHER):
            scores[here] = (vectors[left[here]] * vectors[right[here]]).sum(dim=1)
        return scores

    return Entry(run, share, read=lambda scores: scores.numpy())


def numpy_pairs(job):
    count, share = job.first(0.5)
    scores = np.empty(count, np.float32)

    def part_of(part):
        for block in blocks(part.stop - part.start, GATHERED):
            here = slice(part.start + block.start, part.start + block.stop)
            left, right = job.vectors[job.left[here]], job.vectors[job.right[here]]
            np.einsum("ij,ij->i", left, right, out=scores[here])

    def run():
        in_threads(part_of, halves(count))
        return scores

    return Entry(run, share)


def torch_pairs(job):
    import torch

    count, share = job.first(0.5)
    vectors, left, right = map(torch.from_numpy, (job.vectors, job.left, job.right))
    scores = torch.empty(count)

    def part_of(part):
        torch.set_num_threads(1)  # of this thread: the pool makes the others
        rows, others = (torch.empty((GATHERED, vectors.shape[1])) for _ in range(2))
        for block in blocks(part.stop - part.start, GATHERED):
            here = slice(part.start + block.start, part.start + block.stop)
            x, y = rows[: block.stop - block.start], others[: block.stop - block.start]
            torch.index_select(vectors, 0, left[here], out=x)
            torch.index_select(vectors, 0, right[here], out=y)
            torch.sum(x.mul_(y), dim=1, out=scores[here])

    def run():
        in_threads(part_of, halves(count))
        torch.set_num_threads(CORES)
        return scores

    return Entry(run, share, read=lambda scores: scores.numpy())


def sklearn_pairs(job):
    from sklearn.metrics.pairwise import paired_cosine_distances

    count, share = job.first(0.25)
    scores = np.empty(count, np.float32)

    def run():
        for here in blocks(count, TOGETHER):
            left, right = job.vectors[job.left[here]], job.vectors[job.right[here]]
            scores[here] = 1 - paired_cosine_distances(left, right)
        return scores

    return Entry(run, share)


def memory_read(job):
    run, size = read_probe(job.vectors.nbytes)
    return Entry(run, amounts={"pairs": 0, "bytes": size}, check=lambda answer: None)


PEERS = (
    ("faiss pairwise_indexed", "faiss", faiss_pairs, ""),
    ("NumPy", None, plain_numpy_pairs, f"gather + einsum in blocks of {TOGETHER:,} pairs"),
    ("torch", "torch", plain_torch_pairs, f"gather + mul + sum in blocks of {TOGETHER:,} pairs"),
    (
        "NumPy, tuned",
        None,
        numpy_pairs,
        f"gather + einsum in blocks of {GATHERED:,} pairs that stay in cache, by all threads",
    ),
    (
        "torch, tuned",
        "torch",
        torch_pairs,
        f"index_select + mul + sum into memory at hand, {GATHERED:,} pairs, by all threads",
    ),
    (
        "scikit-learn paired",
        "sklearn",
        sklearn_pairs,
        f"paired_cosine_distances of gathered blocks of {TOGETHER:,}",
    ),
    ("memory read", None, memory_read, "one array in order, by all threads: the ceiling"),
)


def enter_peers(work):
    for name, package, prepare, remark in PEERS:
        work.contender(name, package, remark=remark)(prepare)


# --- 128 columns ----------------------------------------------------------------------------------


PAIRS = Work(
    "4e6 random pairs of 1e6 x 128, dot",
    make(128),
    check,
    bars=[
        Bar(1.3, ("faiss pairwise_indexed",), aim=1.6),
        Bar(10, ("NumPy",)),
        Bar(15, ("torch",)),
        Bar(0, ("NumPy, tuned", "torch, tuned")),
        Bar(0, ("faiss, plain array",)),
        Bar(0, ("memory read",), by="bytes", aim=0.8),
        Bar(1.9, ("fastpair",), ours="fastpair bfloat16"),
        Bar(3, ("fastpair",), ours="fastpair int8"),
        Bar(1.7, ("fastpair, bias",), ours="fastpair bfloat16, bias"),
        Bar(2.5, ("fastpair, bias",), ours="fastpair int8, bias"),
    ],
)

TOLERANCES = {"float32": 2e-5, "bfloat16": 0.01, "int8": 0.02}


def enter_ours(precision, with_bias):
    name = "fastpair" + (f" {precision}" if precision != "float32" else "")

    def prepare(job):
        model, weight = builtin("dot"), None
        if with_bias:
            weight = np.linspace(-0.5, 0.5, job.vectors.shape[1])
            branches = [*model.branches, Branch("sum", {"weight": weight})]
            model = Model(branches, input_columns=len(weight))
        return ours(job, model, precision, TOLERANCES[precision], weight)

    PAIRS.contender(name + (", bias" if with_bias else ""))(prepare)


for _with_bias in (False, True):
    for _precision in TOLERANCES:
        enter_ours(_precision, _with_bias)
enter_peers(PAIRS)


@PAIRS.contender("faiss, plain array", "faiss", remark="an array as NumPy allocates it")
def faiss_plain_pairs(job):
    return faiss_pairs(job, job.vectors.copy())


@PAIRS.contender("DuckDB join", "duckdb", most_rounds=2, remark="array_inner_product of two joins")
def duckdb_pairs(job):
    import duckdb
    import pyarrow as pa

    count, share = job.first(0.25)
    columns = job.vectors.shape[1]
    rows = pa.FixedSizeListArray.from_arrays(pa.array(job.vectors.ravel()), columns)
    entities = pa.table({"id": np.arange(len(job.vectors)), "vector": rows})
    pairs = pa.table({"place": np.arange(count), "l": job.left[:count], "r": job.right[:count]})
    database = duckdb.connect(config={"threads": CORES})
    database.register("entities_given", entities)
    database.register("pairs_given", pairs)
    kind = f"FLOAT[{columns}]"
    database.execute(
        f"CREATE TABLE entities AS SELECT id, vector::{kind} AS vector FROM entities_given"
    )
    database.execute("CREATE TABLE pairs AS SELECT * FROM pairs_given")
    query = """
        SELECT place, array_inner_product(a.vector, b.vector) AS score FROM pairs
        JOIN entities a ON a.id = pairs.l JOIN entities b ON b.id = pairs.r"""

    def read(answer):
        return answer["score"][np.argsort(answer["place"])]

    return Entry(lambda: database.execute(query).fetchnumpy(), share, read)


@PAIRS.contest
def test_pairs(race, contender):
    race(PAIRS, contender)


# --- 300 columns ----------------------------------------------------------------------------------


COSINE = Work(
    "4e6 random pairs of 1e6 x 300, cosine",
    make(300),
    check,
    bars=[
        Bar(1.3, ("faiss pairwise_indexed",)),
        Bar(10, ("NumPy",)),
        Bar(0, ("NumPy, tuned", "torch, tuned")),
        Bar(0, ("memory read",), by="bytes", aim=0.8),
    ],
)


@COSINE.contender("fastpair")
def fastpair_cosine(job):
    return ours(job, builtin("cosine"), "float32", TOLERANCES["float32"])


enter_peers(COSINE)


@COSINE.contest
def test_cosine(race, contender):
    race(COSINE, contender)
