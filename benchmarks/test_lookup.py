"""Soft lookup: a softmax over all keys, times values, beside attention in blocks by others.

Scores are small enough that nobody must take the greatest one off before the exponential; NumPy and
torch's plain form are spared that. NumPy's exponentials run in one thread, its products in all.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from arrays import CORES, blocks, sized, table
from race import Bar, Entry, Work, WrongAnswer

from fastpair.attention import SoftLookup
from fastpair.model import builtin

ROWS = (50, 100, 200, 500, 1000)
"""Rows of a block of scores; NumPy takes what is fastest on this machine."""


@dataclass
class Job:
    """Queries, keys and what keys hold."""

    queries: np.ndarray
    keys: np.ndarray
    values: np.ndarray

    @property
    def sizes(self):
        (count, columns), width = self.queries.shape, self.values.shape[1]
        sizes = {"queries": count, "keys": len(self.keys), "columns": columns}
        return {**sizes, "values": width, "threads": CORES}

    @property
    def pairs(self):
        return float(len(self.queries)) * len(self.keys)

    @cached_property
    def some(self):
        """Some queries and their outputs in float64."""
        rows = np.linspace(0, len(self.queries) - 1, 200).astype(int)
        weights = np.exp(self.queries[rows].astype(np.float64) @ self.keys.T.astype(np.float64))
        exact = weights @ self.values.astype(np.float64) / weights.sum(axis=1, keepdims=True)
        return rows, exact


def make(scale):
    rng = np.random.default_rng(11)
    count = sized(20_000, scale, 100)
    shape = 3, count, 64
    queries, keys, values = rng.normal(size=shape).astype(np.float32)
    return Job(queries / 4, keys / 4, values)


def check(job, found, tolerance):
    rows, exact = job.some
    apart = np.abs(found[rows] - exact).max() / np.abs(exact).max()
    if not apart <= tolerance:
        raise WrongAnswer(f"an output is {apart:.2g} of the greatest one away from float64")


LOOKUP = Work(
    "soft lookup, 20,000 queries x 20,000 keys x 64, 64 values a key",
    make,
    check=check,
    bars=[Bar(2, ("NumPy",), aim=3)],
)


@LOOKUP.contender("fastpair")
def fastpair_lookup(job):
    (rows, plan), (keys, _) = (table(builtin("dot"), part) for part in (job.queries, job.keys))

    def run():
        found = np.empty((len(rows), job.values.shape[1]), np.float32)
        for first, part in SoftLookup(rows, keys, plan, job.values, threads=CORES)():
            found[first : first + len(part)] = part
        return found

    return Entry(run, tolerance=1e-5)


def numpy_lookup(job, rows, queries):
    """Outputs of some queries: product, exponential, product."""
    scores = np.empty((rows, len(job.keys)), np.float32)
    found = np.empty((len(queries), job.values.shape[1]), np.float32)
    for part in blocks(len(queries), rows):
        own = scores[: len(queries[part])]
        np.matmul(queries[part], job.keys.T, out=own)
        np.exp(own, out=own)
        np.matmul(own, job.values, out=found[part])
        found[part] /= own.sum(axis=1, keepdims=True)
    return found


@LOOKUP.contender("NumPy", remark="blocks of the fastest size")
def numpy_blocks(job):
    from time import perf_counter

    def seconds(rows):
        begun = perf_counter()
        numpy_lookup(job, rows, job.queries[:1000])
        return perf_counter() - begun

    best = min(ROWS, key=lambda rows: min(seconds(rows) for _ in range(3)))
    return Entry(lambda: numpy_lookup(job, best, job.queries), tolerance=1e-5)


@LOOKUP.contender("torch", "torch", remark="scaled_dot_product_attention")
def torch_attention(job):
    import torch

    torch.set_num_threads(CORES)
    parts = [torch.from_numpy(a)[None, None] for a in (job.queries, job.keys, job.values)]

    def run():
        return torch.nn.functional.scaled_dot_product_attention(*parts, scale=1.0)

    return Entry(run, read=lambda found: found[0, 0].numpy(), tolerance=1e-5)


@LOOKUP.contest
def test_soft_lookup(race, contender):
    race(LOOKUP, contender)
