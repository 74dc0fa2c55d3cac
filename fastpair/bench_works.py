"""The works that ``fastpair bench`` measures on a table, each beside the ceiling that binds it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastpair import jobs
from fastpair.energy import EnergyMeter
from fastpair.files import Table, write_pairs
from fastpair.kernels import Plan
from fastpair.machine import random_bandwidth, read_bandwidth, spread

if TYPE_CHECKING:
    from fastpair.bench import Task
    from fastpair.pairs import PairBlock

Summary = dict[str, Any]

BEST = 10
"""The k of top-k."""

KEPT = 1e-4
"""Share of all pairs that the threshold keeps, about."""

SAMPLE = 1 << 18
"""Pairs that are scored to find the threshold."""

LEAST_REPEATS, MOST_REPEATS = 3, 7

PILOT_PAIRS, PILOT_ENTITIES = 1 << 15, 512
"""Sizes that are tried first, to know what fits the time."""

MEMORY = "512MiB"
"""What all pairs may allocate beside the table."""

INDEX_BYTES, SCORE_BYTES = 8, 4
"""Bytes of a pair's two int32 row numbers, and of its score."""

WORKS = ("pairs", "stream", "top-k", "threshold", "dense")
"""What is measured of each table: pairs in memory, pairs from HDF5 to HDF5, and all pairs."""

FILE = "file"
"""The work on a given table that reads its pairs from a given file."""

OF_PAIRS = ("pairs", "stream", FILE)
"""Works on a list of pairs; all others are on all pairs."""

FILE_BLOCK = 1 << 18
"""Pairs of a given file that are read together."""


class Works:
    """The works on one table on the CPU: each takes a size and returns its seconds."""

    device = "cpu"

    def __init__(self, path: Path, table: Table, folder: Path, task: Task) -> None:
        self.path, self.table, self.folder, self.task = path, table, folder, task
        self.left, self.right = self._some_pairs()
        self.energy = EnergyMeter(task.counters)
        self.prepare()
        self.scan: str | None = None
        self.kept: int | None = None

    def _some_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the given pairs that are rows of this table, or random ones; (m,) twice."""
        count = len(self.table.rows)
        if self.task.given_pairs is not None:
            left, right = self.task.given_pairs
            inside = (left < count) & (right < count)
            if inside.any():
                return left[inside], right[inside]
        most = min(self.task.pairs, 1 << 26)
        rng = np.random.default_rng(self.task.seed)
        left, right = rng.integers(0, count, (2, most), dtype=np.int32)
        return left, right

    def prepare(self) -> None:
        """Have what scores pairs, and the bandwidth of the table."""
        from fastpair.scoring import PairScorer

        data, threads = self.table.rows.reshape(-1), self.task.threads
        self.scorer: Any = PairScorer(self.table.rows, self.table.plan, threads=threads)
        self.bandwidth = {
            "in_order": read_bandwidth(data, threads),
            "at_random": random_bandwidth(data, self.table.rows.shape[1], threads),
        }

    @cached_property
    def threshold(self) -> float:
        """Return a score that about `KEPT` of the pairs reach."""
        left, right = self.left[:SAMPLE], self.right[:SAMPLE]
        apart = left != right
        scores = self.scorer(left[apart], right[apart])
        return float(np.quantile(scores, 1 - KEPT)) if len(scores) else 0.0

    def row(self, name: str, slot: float, size: int | None = None) -> Summary:
        """Measure one work in about `slot` seconds and put it beside its ceiling.

        `size` is that of the work (pairs, or rows of which all pairs are taken), where it is not
        chosen by the time that there is.
        """
        of_pairs = name in OF_PAIRS
        work: Callable[[int], float] = {
            "pairs": self._pairs,
            "stream": self._stream,
            FILE: self._stream_file,
            "top-k": lambda n: self._walk(n, lambda walk: walk.top_k(BEST)),
            "threshold": self._above,
            "dense": lambda n: self._walk(n, lambda walk: walk.dense()),
        }[name]
        least = PILOT_PAIRS if of_pairs else PILOT_ENTITIES
        most = self.most_pairs(name) if of_pairs else len(self.table.rows)
        self.scan = self.kept = None
        if name == "threshold":
            _ = self.threshold  # found before the clock
        joules: list[float | None] = []

        def metered(n: int) -> float:
            before = self.energy.now()
            seconds = work(n)
            joules.append(self.energy.since(before))
            return seconds

        if size is None:
            size, seconds = measure(metered, min(least, most), most, slot, 1 if of_pairs else 2)
        else:
            seconds = repeat(metered, min(least, size), size, slot)
        count = size if of_pairs else size * size
        needs, ceiling, binds = self.ceiling(name, size)
        rate = statistics.median(count / s for s in seconds)
        return {
            "work": name,
            "device": self.device,
            "precision": self.table.plan.precision,
            "row_bytes": self.table.plan.layout.row_bytes,
            "scan": self.scan,
            "entities": len(self.table.rows) if of_pairs else size,
            "pairs": count,
            "kept": self.kept,
            "pairs_per_second": spread([count / s for s in seconds]),
            "joules_per_million_pairs": _energy(joules[-len(seconds) :], count),
            "bytes_per_second": rate * sum(n for kind, n in needs.items() if kind in MOVED_KINDS),
            "operations_per_second": rate
            * sum(n for kind, n in needs.items() if kind not in MOVED_KINDS),
            "needs_per_pair": needs,
            "table_bandwidth": self.bandwidth,
            "limit": ceiling,
            "binds": binds,
            "share": rate / ceiling,
            "share_of_random": rate * needs["table"] / self.bandwidth["at_random"]["greatest"]
            if of_pairs
            else None,
        }

    def most_pairs(self, name: str) -> int:
        """Return how many pairs a work may take."""
        if name == FILE:
            assert self.task.source is not None
            return self.task.source.count
        return len(self.left)

    def ceiling(self, name: str, size: int) -> tuple[dict[str, float], float, str]:
        """Return what a pair needs, the pairs a second that are possible, and what binds them."""
        needs = needs_of(name, self.table, size, self.scan)
        rates = {**self.task.limits, "table": {"all": self.bandwidth["in_order"]}}
        return needs, *_ceiling(needs, rates)

    def _pairs(self, size: int) -> float:
        begun = time.perf_counter()
        self.scorer(self.left[:size], self.right[:size])
        return time.perf_counter() - begun

    def _stream(self, size: int) -> float:
        """Score a pair file into a score file; the files are in the page cache."""
        pairs = self.folder / f"pairs-{size}.h5"
        if not pairs.exists():
            for old in self.folder.glob("pairs-*.h5"):
                old.unlink()
            blocks = [(self.left[:size], self.right[:size], None)]
            write_pairs(pairs, blocks, size, dtype="int32")
        scored = jobs.score(
            self.path,
            pairs,
            self.folder / "scores.h5",
            keys="rows",
            threads=self.task.threads,
            device=self.device,
            overwrite=True,
        )
        return float(scored["scoring_seconds"])

    def _stream_file(self, size: int) -> float:
        """Score pairs of the given file as they are read; scores are dropped as they come."""
        assert self.task.source is not None
        begun = time.perf_counter()
        blocks = self.task.source.blocks(min(size, FILE_BLOCK), threads=self.task.threads)
        with closing(blocks):
            for _ in self.scorer.stream(first_pairs(blocks, size)):
                pass
        return time.perf_counter() - begun

    def _above(self, size: int) -> float:
        kept = 0

        def above(walk: Any) -> Iterator[None]:
            nonlocal kept
            for _, counts, _, _ in walk.above(self.threshold):
                kept += int(counts.sum())
                yield

        seconds = self._walk(size, above)
        self.kept = kept
        return seconds

    def _walk(self, size: int, reduce: Callable[[Any], Iterable[Any]]) -> float:
        """Walk all pairs of the first rows; results are dropped as they come."""
        begun = time.perf_counter()
        walk = self.all_pairs(self.table.rows[:size])
        for _ in reduce(walk):
            pass
        seconds = time.perf_counter() - begun
        scan = getattr(walk, "scan", None)  # in which precision candidates were looked for
        self.scan = None if scan is None else str(scan)
        return seconds

    def all_pairs(self, rows: np.ndarray) -> Any:
        """Return what walks all pairs of some rows."""
        from fastpair.matrix import all_pairs

        return all_pairs(rows, None, self.table.plan, threads=self.task.threads, memory=MEMORY)


def first_pairs(blocks: Iterable[PairBlock], count: int) -> Iterator[PairBlock]:
    """Yield blocks until they hold `count` pairs; the last one is cut."""
    for block in blocks:
        if len(block.left) >= count:
            yield replace(block, left=block.left[:count], right=block.right[:count])
            return
        count -= len(block.left)
        yield block


def repeat(work: Callable[[int], float], least: int, size: int, slot: float) -> list[float]:
    """Return the seconds of each repeat of a work of a given size, at least `LEAST_REPEATS`."""
    work(least)  # compiled
    seconds, begun = [work(size)], time.perf_counter()
    while len(seconds) < LEAST_REPEATS or (
        len(seconds) < MOST_REPEATS and time.perf_counter() - begun + max(seconds) < slot
    ):
        seconds.append(work(size))
    return seconds


def _energy(joules: Sequence[float | None], pairs: int) -> Summary | None:
    """Return the `spread` of joules for a million pairs, or None where they are not known."""
    known = [1e6 * used / pairs for used in joules if used is not None]
    return spread(known) if len(known) == len(joules) else None


def measure(
    work: Callable[[int], float], least: int, most: int, slot: float, power: int
) -> tuple[int, list[float]]:
    """Return a size whose repeats fit the slot, and the seconds of each repeat.

    ``work(size)`` returns its seconds, which grow with the size to the given power.
    """
    begun = time.perf_counter()
    work(least)  # compiled, and every page is there
    size = least
    while True:
        pilot = max(work(size), 1e-6)
        left = slot - (time.perf_counter() - begun)
        fits = int(size * max(1.0, left / (LEAST_REPEATS + 2) / pilot) ** (1 / power))
        # a small pilot says little about a large run: approach it in two steps
        size, before = min(most, fits, 16 * size), size
        if size < 2 * before or size == most or left <= 0:
            break
    seconds = [work(size) for _ in range(LEAST_REPEATS)]
    while len(seconds) < MOST_REPEATS:
        if time.perf_counter() - begun + 1.5 * max(seconds) > slot:
            break
        seconds.append(work(size))
    return size, seconds


# --- ceilings ------------------------------------------------------------------------------------

MEMORY_KINDS = ("table", "copy", "read")
"""Needs that are bytes of memory."""

MOVED_KINDS = (*MEMORY_KINDS, "up", "down")
"""Needs that are bytes, those that go to a GPU and back too; all others are operations."""

_SCAN_UNITS = {"float32": "fma", "bfloat16": "bfloat16", "int8": "int8"}
"""What multiplies in a scan, by its precision."""


def needs_of(work: str, table: Table, size: int, scan: str | None) -> dict[str, float]:
    """Return what one pair needs at least: bytes and operations by the limit that binds them.

    ``table``: bytes of the table; the limit reads them in order, which no list of random pairs
    can. ``copy``: bytes written, counted twice, as the copy that is measured. Arithmetic is
    counted once for (i, j) and (j, i), in one table.
    """
    plan = table.plan
    layout = plan.layout
    if work in OF_PAIRS:
        needs = {"table": 2.0 * layout.row_bytes + INDEX_BYTES + SCORE_BYTES}
        return {**needs, **_arithmetic(plan, _pair_columns(plan), 1.0, plan.precision == "int8")}
    from fastpair.kernels.operands import operand_counts

    product, plus, minus = operand_counts(plan)
    needs = {"copy": 2.0 * SCORE_BYTES} if work == "dense" else {"table": layout.row_bytes / size}
    unit = next(
        (u for name, u in _SCAN_UNITS.items() if (scan or "float32").startswith(name)), "fma"
    )
    found = _arithmetic(plan, (product, plus + minus), 0.5 * (size + 1) / size, unit == "int8")
    if unit == "bfloat16" and "fma" in found:
        found["bfloat16"] = found.pop("fma")
    return {**needs, **found}


def _pair_columns(plan: Plan) -> tuple[int, int]:
    """Return how many padded columns of a row are multiplied and added, and how many compared."""
    lengths = plan.layout.segment_lengths
    products = lengths.get("product", 0) + lengths.get("squared", 0)
    return products, sum(lengths.values()) - products


def _arithmetic(
    plan: Plan, columns: tuple[int, int], share: float, integers: bool
) -> dict[str, float]:
    """Return the operations of a pair: two a column, of the kind of its columns."""
    if plan.network is not None:
        both = 2 if plan.network.form == "orders" else 1
        weights = sum(matrix.size for matrix, _ in plan.network.layers)
        return {"fma": 2.0 * both * weights}
    products, maxima = columns
    kinds = {"int8" if integers else "fma": 2.0 * share * products, "maximum": 2.0 * share * maxima}
    return {kind: number for kind, number in kinds.items() if number}


def _ceiling(needs: dict[str, float], limits: Summary) -> tuple[float, str]:
    """Return the pairs a second that all threads can reach, and whether memory or arithmetic binds.

    An instruction set that the CPU lacks is done with float32 arithmetic.
    """
    seconds = {"memory": 0.0, "arithmetic": 0.0}
    for kind, number in needs.items():
        limit = limits.get(kind) or limits["fma"]
        side = "memory" if kind in MEMORY_KINDS else "arithmetic"
        seconds[side] += number / limit["all"]["greatest"]
    binds = max(seconds, key=lambda side: seconds[side])
    return 1 / seconds[binds], binds
