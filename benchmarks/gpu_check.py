"""Check a machine with a GPU in a few minutes: is it right, how fast is it, and beside which limit.

    pip install 'fastpair[cuda13]'                  (or cuda12, by what the driver knows)
    python benchmarks/gpu_check.py                  writes build/gpu-check.json, prints a table
    python benchmarks/gpu_check.py --seconds 120    shorter: what there is no time for is named

Every rate stands beside the limit that binds it, measured in the same run: bytes over the rate of a
copy on the device, bytes over the link to the host, operations over the rate of matrix products.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastpair.agreement import Case, agreement, cases, gpu_backends
from fastpair.device import pick
from fastpair.errors import FastpairError
from fastpair.gpu_machine import (
    TINY,
    Effort,
    describe_gpu,
    gather_bandwidth,
    measure_gpu_limits,
    seconds_of,
)
from fastpair.gpu_scoring import GpuPairScorer
from fastpair.heads import HEADS
from fastpair.kernels import PRECISIONS, Plan, RowLayout, aligned_empty
from fastpair.kernels.gpu import WIDE_LANES, DeviceTable, read_source, score_pairs, variants
from fastpair.machine import describe_machine, spread
from fastpair.scoring import PairScorer

Summary = dict[str, Any]

DISTINCT_ROWS = 1 << 16
"""Rows that are random; longer tables repeat them."""

CHECKED = 4096
"""Pairs whose bits are compared with the CPU's in every measurement."""

BY_LIBRARY = ("exponential", "negative_arcosh")
"""Links of which a device may give the next float32."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rows: int = 1_000_000
    rows_in_cache: int = 40_000
    columns: tuple[int, ...] = (64, 128, 300)
    pairs: int = 1 << 24
    streamed: int = 1 << 26
    block: int = 1 << 20
    all_rows: tuple[int, ...] = (100_000, 1_000_000)
    dense_rows: int = 30_000
    k: int = 100
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    lanes: tuple[int | None, ...] = (None, *WIDE_LANES)
    repeats: int = 20
    heads: tuple[str, ...] = tuple(HEADS)
    entities: int = 80
    effort: Effort | None = None
    fresh: str = ""


SMALL = Sizes(
    rows=300,
    rows_in_cache=50,
    columns=(20,),
    pairs=600,
    streamed=2000,
    block=700,
    all_rows=(100,),
    dense_rows=70,
    k=5,
    precisions=("float16", "int8"),
    lanes=(None, 16),
    repeats=1,
    heads=("dot", "absdiff"),
    entities=20,
    effort=TINY,
)
"""For simulated devices: what is measured means nothing."""


class Check:
    """One run on one GPU, or on several for what they share.

    Parameters
    ----------
    runtimes : of the GPUs.
    sizes : how much is measured.
    seconds : all of it may take, about; what there is no time for is in ``skipped``.
    say : called with what is done next.
    """

    def __init__(
        self,
        runtimes: tuple[Any, ...],
        sizes: Sizes,
        seconds: float,
        say: Callable[[str], None] = lambda step: None,
    ) -> None:
        self.runtimes, self.runtime, self.sizes, self.say = runtimes, runtimes[0], sizes, say
        self.begun, self.seconds = time.perf_counter(), seconds
        self.deadline = self.begun + seconds
        self.skipped: list[str] = []

    def run(self) -> Summary:
        """Do all of it."""
        self.say("limits")
        self.limits = measure_gpu_limits(self.runtime, self.sizes.effort)
        found: Summary = {
            "machine": {**describe_machine(), "gpus": [describe_gpu(r) for r in self.runtimes]},
            "limits": self.limits,
            "library": self._library(),
        }
        for name, until, work in (
            ("compile", 0.1, self._compile),
            ("bits", 0.3, self._bits),
            ("streamed", 0.4, self._streamed),
            ("all_pairs", 0.6, self._all_pairs),
            ("pairs", 0.8, self._pairs),
            ("agreement", 1.0, self._agreement),
        ):
            self.deadline = self.begun + until * self.seconds
            found[name] = list(self._in_time(name, work()))
        found["aims"] = aims(found)
        found["skipped"] = self.skipped
        found["seconds"] = time.perf_counter() - self.begun
        return found

    def _in_time(self, name: str, rows: Iterable[Summary]) -> Iterator[Summary]:
        """Yield what comes until the time is up."""
        self.say(name)
        for row in rows:
            yield row
            if time.perf_counter() > self.deadline:
                self.skipped.append(f"{name}, after {words(row)}: the time was up")
                return

    # --- is it right ---

    def _cases(self) -> Iterator[Case]:
        sizes = self.sizes
        return cases(sizes.heads, sizes.precisions, entities=sizes.entities, columns=40)

    def _bits(self) -> Iterator[Summary]:
        """Compare every head and precision with the bits of the CPU, in both kernels for pairs."""
        rng = np.random.default_rng(1)
        for case in self._cases():
            left, right = rng.integers(0, len(case.rows), (2, 3000))
            expected = PairScorer(case.rows, case.plan)
            scorer = GpuPairScorer(case.rows, case.plan, devices=self.runtimes)
            wrong = 0
            for ordered in (left, np.sort(left)):
                apart = steps_apart(scorer(ordered, right), expected(ordered, right))
                wrong += int((apart > (case.plan.link in BY_LIBRARY)).sum())
            yield {"head": case.head, "precision": case.plan.precision, "wrong": wrong}

    def _agreement(self) -> Iterator[Summary]:
        """Compare every way to score with the float64 reference, within the stated bound."""
        for case in self._cases():
            yield from agreement(gpu_backends(self.runtimes), [case])

    def _compile(self) -> Iterator[Summary]:
        """Compile a kernel of each precision anew."""
        for precision in self.sizes.precisions:
            number = tuple(PRECISIONS).index(precision)
            wanted = f"-DFP_PRECISION={number}"
            source, name, options = next(v for v in variants() if wanted in v[2])
            fresh = f"-DFP_FRESH={self.sizes.fresh or time.time_ns()}"
            begun = time.perf_counter()
            self.runtime.kernel(read_source(source), name, (*options, fresh))
            yield {
                "precision": precision,
                "options": list(options),
                "seconds": time.perf_counter() - begun,
            }

    # --- how fast is it ---

    def _pairs(self) -> Iterator[Summary]:
        """Pairs of a table on the device: widths, precisions, orders, threads a pair."""
        for columns in sorted(self.sizes.columns, key=lambda n: abs(n - 128)):
            for precision in self.sizes.precisions:
                for place, rows in (
                    ("memory", self.sizes.rows),
                    ("cache", self.sizes.rows_in_cache),
                ):
                    yield from self._pairs_of(*random_table(rows, columns, precision), place)

    def _pairs_of(self, rows: np.ndarray, plan: Plan, place: str) -> Iterator[Summary]:
        runtime, stream, count = self.runtime, self.runtime.stream(), self.sizes.pairs
        table = DeviceTable(runtime, rows, None, plan, stream)
        rng = np.random.default_rng(0)
        left, right = rng.integers(0, len(rows), (2, count), dtype=np.int32)
        expected = PairScorer(rows, plan)
        for order in ("random", "sorted") if place == "memory" else ("random",):
            numbers = np.sort(left) if order == "sorted" else left
            there = [self._there(array, stream) for array in (numbers, right)]
            gather = gather_bandwidth(runtime, table.left, there[1])
            some = np.linspace(0, count - 1, min(CHECKED, count)).astype(np.int64)
            bits = expected(numbers[some], right[some])
            for runs in (False, True) if order == "sorted" else (False,):
                for lanes in self.sizes.lanes:
                    seconds, scores = self._time_pairs(table, there, lanes, runs)
                    apart = steps_apart(scores[some], bits)
                    yield {
                        "columns": sum(plan.layout.columns[0]),
                        "precision": plan.precision,
                        "place": place,
                        "order": order,
                        "runs": runs,
                        "lanes": lanes or "natural",
                        "pairs": count,
                        "steps_apart": int(apart.max()),
                        **self._beside(seconds, plan, place, runs, gather),
                    }

    def _time_pairs(
        self, table: DeviceTable, there: list[Any], lanes: int | None, runs: bool
    ) -> tuple[list[float], np.ndarray]:
        """Return the seconds of each repeat, and the scores."""
        runtime, stream, count = self.runtime, self.runtime.stream(), len(there[0])
        scores, bad = runtime.empty((count,), np.float32), self._there(NONE_BAD, stream)

        def work() -> None:
            score_pairs(runtime, table, *there, scores, bad, stream, lanes=lanes, runs=runs)

        seconds = seconds_of(runtime, work, (stream,), self.sizes.repeats)
        found = np.empty(count, np.float32)
        runtime.download(found, scores, stream)
        runtime.synchronize(stream)
        return seconds, found

    def _beside(
        self, seconds: list[float], plan: Plan, place: str, runs: bool, gather: Summary
    ) -> Summary:
        """Return a rate beside its limit: rows from memory by a copy's, from the cache by reading.

        Kernels for runs need not read the left row again.
        """
        moved = (1 if runs else 2) * plan.layout.row_bytes + 12
        limit = (self.limits["copy"] if place == "memory" else gather)["greatest"]
        return self._rate(seconds, self.sizes.pairs, limit / moved, f"{moved} bytes")

    def _rate(self, seconds: list[float], count: float, limit: float, needs: str) -> Summary:
        rate = spread([count / s for s in seconds])
        return {
            "pairs_per_second": rate,
            "needs_per_pair": needs,
            "limit": limit,
            "share": rate["median"] / limit,
        }

    def _there(self, array: np.ndarray, stream: Any) -> Any:
        target = self.runtime.empty(array.shape, array.dtype)
        self.runtime.upload(target, array, stream)
        self.runtime.synchronize(stream)
        return target

    def _streamed(self) -> Iterator[Summary]:
        """Pairs from the memory of the host and back, beside the link: 8 bytes up, 4 down."""
        limit = min(self.limits["up"]["greatest"] / 8, self.limits["down"]["greatest"] / 4)
        rng = np.random.default_rng(0)
        for precision in self.sizes.precisions[:2]:
            rows, plan = random_table(self.sizes.rows, 128, precision)
            left, right = rng.integers(0, len(rows), (2, self.sizes.streamed), dtype=np.int32)
            scorer = GpuPairScorer(rows, plan, devices=self.runtimes)
            for dtype in (np.int32, np.int64):
                step = self.sizes.block
                numbers = left.astype(dtype), right.astype(dtype)
                blocks = [
                    Block(numbers[0][n : n + step], numbers[1][n : n + step])
                    for n in range(0, len(left), step)
                ]
                seconds = []
                for _ in range(4):
                    begun = time.perf_counter()
                    for _ in scorer.stream(blocks):
                        pass
                    seconds.append(time.perf_counter() - begun)
                yield {
                    "precision": precision,
                    "row_numbers": np.dtype(dtype).name,
                    "devices": len(self.runtimes),
                    **self._rate(seconds[1:], len(left), limit, "8 bytes up, 4 down"),
                }

    def _all_pairs(self) -> Iterator[Summary]:
        """All pairs of products: best k, a threshold, dense; beside the rate of matrix products."""
        from fastpair import gpu_matrix

        works: list[tuple[str, Callable[[Any], Iterable[Any]]]] = [
            (f"top-{self.sizes.k}", lambda walk: walk.top_k(self.sizes.k)),
            ("threshold", lambda walk: walk.above(5 * math.sqrt(128))),  # 3 pairs of 1e7
            ("dense", lambda walk: walk.dense()),
        ]
        for rows_asked in self.sizes.all_rows:
            table, plan = random_table(rows_asked, 128, "float32", distinct=True)
            for name, reduce in works:
                rows = table[: self.sizes.dense_rows] if name == "dense" else table
                seconds = []
                for _ in range(2):
                    begun = time.perf_counter()
                    walk = gpu_matrix.all_pairs(rows, None, plan, runtimes=list(self.runtimes))
                    for _ in reduce(walk):
                        pass
                    seconds.append(time.perf_counter() - begun)
                    if time.perf_counter() + seconds[-1] > self.deadline:
                        break
                count = len(rows) ** 2
                operations = 2 * 128
                limit, needs = self.limits["bfloat16"]["greatest"] / operations, "256 operations"
                if name == "dense":
                    limit, needs = self.limits["down"]["greatest"] / 4, "4 bytes down"
                yield {
                    "work": name,
                    "rows": len(rows),
                    "scan": walk.scan,
                    "devices": len(self.runtimes),
                    **self._rate(seconds[-1:], count, limit, needs),
                }

    def _library(self) -> Summary | None:
        """Return the rates of CuPy's own matrix products, if it and cuBLAS are here."""
        if type(self.runtime).__name__ != "CupyRuntime":
            return None
        import cupy

        found: Summary = {}
        for dtype in ("float16", "float32"):
            for inner in (128, 4096):
                try:
                    left = cupy.ones((8192, inner), dtype)
                    right = cupy.ones((inner, 8192), dtype)
                    stream = cupy.cuda.get_current_stream()
                    seconds = seconds_of(
                        self.runtime, lambda a=left, b=right: cupy.matmul(a, b), (stream,), 10
                    )
                except Exception as error:  # cuBLAS is optional
                    return {"missing": f"{type(error).__name__}: {error}"}
                operations = 2 * 8192 * 8192 * inner
                found[f"{dtype}, inner {inner}"] = spread([operations / s for s in seconds])
        return found


NONE_BAD = np.full(1, 2**64 - 1, np.uint64)


@dataclass(frozen=True)
class Block:
    """Pairs as a reader of files gives them."""

    left: np.ndarray
    right: np.ndarray


def random_table(
    rows: int, columns: int, precision: str, *, distinct: bool = False
) -> tuple[np.ndarray, Plan]:
    """Return a table of products of random numbers; its rows repeat unless they shall not."""
    plan = Plan(RowLayout(((columns, 0),) + ((0, 0),) * 4, False, precision))
    different = rows if distinct else min(rows, DISTINCT_ROWS)
    numbers = np.random.default_rng(0).standard_normal((different, columns), dtype=np.float32)
    table = aligned_empty((rows, plan.layout.row_bytes), np.uint8)
    table[:] = 0
    records = table.view(plan.layout.dtype)[:, 0]
    if precision == "int8":
        numbers = np.clip(np.rint(numbers * 32), -127, 127)
        records["scale"] = np.float32(1 / 32)
    if precision == "bfloat16":
        numbers = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    for start in range(0, rows, different):
        part = numbers[: rows - start]
        records["product"][start : start + len(part), :columns] = part
    return table, plan


def steps_apart(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return how many float32 numbers lie between each two; a NaN beside a number is very far."""
    places = []
    for scores in (found, expected):
        bits = scores.view(np.int32).astype(np.int64)
        places.append(np.where(bits < 0, -(2**31) - bits, bits))
    apart = np.abs(places[0] - places[1])
    return np.where(np.isnan(found) != np.isnan(expected), 2**32, apart)


def aims(found: Summary) -> list[Summary]:
    """Return what was aimed at beside what was measured."""
    rows: list[tuple[str, float, list[float]]] = []
    for precision in ("float32", "float16"):
        shares = [
            row["share"]
            for row in found["pairs"]
            if (row["precision"], row["columns"], row["place"], row["order"], row["lanes"])
            == (precision, 128, "memory", "random", "natural")
        ]
        rows.append((f"random pairs, 128 columns, {precision}, of a copy's rate", 0.6, shares))
    streamed = [row["share"] for row in found["streamed"]]
    rows.append(("streamed pairs, of the link's rate", 0.8, streamed))
    best = [
        row["share"]
        for row in found["all_pairs"]
        if row["work"].startswith("top") and row["rows"] >= 1_000_000
    ]
    rows.append(("best 100 of 1e6 x 128, of the bfloat16 rate", 0.25, best))
    return [
        {"aim": name, "at_least": least, "measured": max(shares, default=None)}
        for name, least, shares in rows
    ]


def words(row: Summary) -> str:
    """Return what a row is about."""
    return ", ".join(str(value) for value in row.values() if isinstance(value, (str, int)))


def wrong_results(found: Summary) -> int:
    """Return how many results are not what they must be."""
    wrong = sum(row["wrong"] for row in (*found["bits"], *found["agreement"]))
    exact = [
        row for row in found["pairs"] if row["lanes"] == "natural" or row["precision"] == "int8"
    ]
    return wrong + sum(row["steps_apart"] > 0 for row in exact)


def table(found: Summary) -> Iterator[str]:
    """Yield the lines of a short table."""
    for gpu in found["machine"]["gpus"]:
        versions = ", ".join(f"{name} {text}" for name, text in gpu["versions"].items())
        yield f"gpu:{gpu['number']} {gpu['name']}, driver for CUDA {gpu['driver_cuda']}, {versions}"
    for name, limit in found["limits"].items():
        yield f"  {name:<14} {limit['median'] / 1e9:10.4g} G/s"
    for name, limit in (found["library"] or {}).items():
        shown = limit if isinstance(limit, str) else f"{limit['median'] / 1e9:10.4g} G/s"
        yield f"  CuPy matmul {name}: {shown}"
    for kind in ("pairs", "streamed", "all_pairs"):
        yield f"{kind}: million pairs/s, share of the limit"
        for row in found[kind]:
            rate = row["pairs_per_second"]["median"] / 1e6
            about = {k: v for k, v in row.items() if k not in ("needs_per_pair", "pairs")}
            yield f"  {rate:10.4g} {row['share']:7.1%}  {words(about)}"
    seconds = [row["seconds"] for row in found["compile"]]
    yield f"compiling a kernel: {min(seconds, default=math.nan):.2f} s"
    for aim in found["aims"]:
        measured = "not measured" if aim["measured"] is None else f"{aim['measured']:.1%}"
        yield f"aim: {aim['aim']}: at least {aim['at_least']:.0%}, {measured}"
    for sentence in found["skipped"]:
        yield f"skipped: {sentence}"
    compared = len(found["bits"]) + len(found["agreement"])
    yield f"{wrong_results(found)} wrong results in {compared} comparisons"
    yield f"{found['seconds']:.0f} s"


def main(arguments: list[str] | None = None) -> int:
    """Run the check and write what it found; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--device", default="gpu:0", help="gpu:0; gpu: all that are there")
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--output", type=Path, default=Path("build/gpu-check.json"))
    parser.add_argument("--small", action="store_true", help="tiny sizes, in seconds")
    given = parser.parse_args(arguments)
    try:
        runtimes = pick(given.device).runtimes
    except FastpairError as error:
        print(error, file=sys.stderr)
        return 2
    sizes = replace(SMALL, repeats=3) if given.small else Sizes()
    run = Check(runtimes, sizes, given.seconds, lambda step: print(f"... {step}", flush=True))
    found = run.run()
    found["python"] = platform.python_version()
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(found, indent=1))
    print(*table(found), sep="\n")
    return 1 if wrong_results(found) else 0


if __name__ == "__main__":
    sys.exit(main())
