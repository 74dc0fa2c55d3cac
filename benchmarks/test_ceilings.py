"""The tile kernel beside the machine's rate of multiply-adds, on one core."""

from dataclasses import dataclass

import numpy as np
from arrays import check_close, sized, table, unit_vectors
from ceilings import multiply_add_probe
from race import Bar, Entry, Work

from fastpair.matrix import all_pairs
from fastpair.model import builtin

OUT_OF_REACH = 1.5
"""No cosine gets there: tiles are computed and nothing is kept."""


@dataclass
class Job:
    vectors: np.ndarray
    others: np.ndarray

    @property
    def pairs(self):
        return float(len(self.vectors)) * len(self.others)

    @property
    def sizes(self):
        return {"entities": len(self.vectors), "columns": self.vectors.shape[1], "threads": 1}

    @property
    def operations(self):
        return 2 * self.pairs * self.vectors.shape[1]


def make(scale):
    count = sized(8_192, scale)
    return Job(unit_vectors(count, 128, 0), unit_vectors(count, 128, 1))


TILES = Work(
    "float32 tiles of products, 8,192 x 8,192 x 128, one core",
    make,
    check=lambda job, answer, tolerance: None,
    bars=[Bar(0.75, ("multiply-adds",), by="operations")],
)


@TILES.contender("fastpair", remark="packing included, two tables, nothing above the threshold")
def fastpair_tiles(job):
    left, plan = table(builtin("dot"), job.vectors)
    right, _ = table(builtin("dot"), job.others)

    def run():
        return sum(
            len(hits[2])
            for hits in all_pairs(left, right, plan, threads=1, scan="float32").above(OUT_OF_REACH)
        )

    def check(found):
        assert found == 0

    return Entry(run, amounts={"operations": job.operations}, check=check)


@TILES.contender("NumPy GEMM", remark="one thread, blocks that stay in cache")
def numpy_tiles(job):
    from threadpoolctl import threadpool_limits

    product = np.empty((512, len(job.others)), np.float32)

    def run():
        with threadpool_limits(1, "blas"):
            for start in range(0, len(job.vectors), 512):
                rows = job.vectors[start : start + 512]
                np.matmul(rows, job.others.T, out=product[: len(rows)])
        return product[:1]

    def check(answer):
        first = (len(job.vectors) - 1) // 512 * 512
        truth = job.vectors[first].astype(np.float64) @ job.others.T.astype(np.float64)
        check_close(answer[0], truth, 2e-5)

    return Entry(run, amounts={"operations": job.operations}, check=check)


@TILES.contender("multiply-adds", remark="registers only: the ceiling")
def multiply_adds(job):
    run, operations = multiply_add_probe()
    return Entry(run, amounts={"pairs": 0, "operations": operations}, check=lambda answer: None)


@TILES.contest
def test_tiles(race, contender):
    race(TILES, contender)
