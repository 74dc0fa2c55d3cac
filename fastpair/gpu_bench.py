"""What ``fastpair bench`` measures on a GPU: the works of `bench` beside the GPU's own ceilings."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from fastpair.bench_works import INDEX_BYTES, MEMORY, SCORE_BYTES, Works, needs_of
from fastpair.energy import EnergyMeter

ALREADY_THERE = 1 << 24
"""Pairs whose numbers are put on the device before the clock, at most."""

_SIDES = {"table": "memory", "copy": "memory", "up": "link", "down": "link"}
"""Kinds of needs that are bytes, and what moves them; all others are arithmetic."""


class GpuWorks(Works):
    """The works on one table on the first chosen GPU.

    Pairs are scored from numbers that are on the device, and their scores stay there; all other
    works bring results to the host.
    """

    def prepare(self) -> None:
        """Have the table, the pairs and room for scores on the device, and its bandwidth."""
        from fastpair.gpu_machine import gather_bandwidth
        from fastpair.gpu_scoring import GpuPairScorer

        self.runtime = runtime = self.task.choice.runtimes[0]
        self.device = f"gpu:{runtime.number}"
        self.energy = EnergyMeter([*self.task.counters, *self.task.gpu_counters])
        plan, threads = self.table.plan, self.task.threads
        self.scorer = GpuPairScorer(self.table.rows, plan, devices=(runtime,), threads=threads)
        count = min(len(self.left), ALREADY_THERE)
        stream = runtime.stream()
        self.there = [runtime.empty((count,), np.int32) for _ in range(2)]
        for array, rows in zip(self.there, (self.left, self.right), strict=True):
            runtime.upload(array, rows[:count], stream)
        self.scores = runtime.empty((count,), np.float32)
        rows = runtime.empty(self.table.rows.shape, np.uint8)
        runtime.upload(rows, np.ascontiguousarray(self.table.rows), stream)
        runtime.synchronize(stream)
        assert self.task.gpu is not None
        self.bandwidth = {
            "in_order": self.task.gpu["limits"]["copy"],
            "at_random": gather_bandwidth(runtime, rows, self.there[0]),
        }

    def ceiling(self, name: str, size: int) -> tuple[dict[str, float], float, str]:
        """Return what a pair needs, the pairs a second that are possible, and what binds them.

        Copies, kernels and the link work at the same time, up and down too: the slowest binds.
        """
        assert self.task.gpu is not None
        needs = needs_of(name, self.table, size, self.scan)
        if name == "stream":
            needs |= {"up": float(INDEX_BYTES), "down": float(SCORE_BYTES)}
        if name == "dense":
            needs["down"] = float(SCORE_BYTES)
        limits = {**self.task.gpu["limits"], "table": self.bandwidth["in_order"]}
        seconds: dict[str, float] = {}
        for kind, number in needs.items():
            limit = limits.get(kind) or limits["fma"]
            side = _SIDES.get(kind, "arithmetic")
            took = number / limit["greatest"]
            if side == "link":  # both ways at once
                seconds[side] = max(seconds.get(side, 0.0), took)
            else:
                seconds[side] = seconds.get(side, 0.0) + took
        binds = max(seconds, key=lambda side: seconds[side])
        return needs, 1 / seconds[binds], binds

    def most_pairs(self, name: str) -> int:
        """Return how many pairs a work may take."""
        return len(self.scores) if name == "pairs" else len(self.left)

    def _pairs(self, size: int) -> float:
        left, right = (array[:size] for array in self.there)
        begun = time.perf_counter()
        self.scorer.score_device(left, right, self.scores[:size])
        return time.perf_counter() - begun

    def all_pairs(self, rows: np.ndarray) -> Any:
        """Return what walks all pairs of some rows on the GPU."""
        from fastpair import gpu_matrix

        return gpu_matrix.all_pairs(
            rows,
            None,
            self.table.plan,
            runtimes=[self.runtime],
            threads=self.task.threads,
            memory=MEMORY,
        )
