"""What ``fastpair bench`` measures: this machine, its ceilings, our rates, and agreement.

Every rate stands beside the ceiling that binds it: the time in which the machine could at best
move the bytes, or do the arithmetic, that the work needs. Rows are shortened to fit the time.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastpair import jobs
from fastpair.agreement import Backend, Case, agreement, backends, cases
from fastpair.backend import thread_count
from fastpair.device import Choice, pick
from fastpair.errors import ArgumentError, FileError
from fastpair.files import Table, TableWriter, read_table, write_embeddings, write_pairs
from fastpair.kernels import PRECISIONS, Plan
from fastpair.machine import (
    describe_machine,
    measure_disk,
    measure_limits,
    random_bandwidth,
    read_bandwidth,
    spread,
)
from fastpair.refolding import refold
from fastpair.staging import writing

Summary = dict[str, Any]
Say = Callable[[str], None]

WORKS = ("pairs", "stream", "top-k", "threshold", "dense")
"""What is measured of each table: pairs in memory, pairs from HDF5 to HDF5, and all pairs."""

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

PLANNED_SHARE = 0.85
"""Share of the seconds that is planned for: the rest is for what takes longer than it looked."""

AGREEMENT_SHARE = 0.75
"""Share of those after which no further case of agreement begins."""

MOST_REFOLDED = 1 << 28
"""Bytes of a given table that are folded again in other precisions."""

SHORTEST_ROW = 0.3
"""Seconds that must be left for a row to begin."""

LONGEST_ROW = 1.5
"""Seconds that a row takes, about, where there is more time."""

INDEX_BYTES, SCORE_BYTES = 8, 4
"""Bytes of a pair's two int32 row numbers, and of its score."""


def bench(
    table: Path | None = None,
    *,
    entities: int = 100_000,
    columns: int = 128,
    pairs: int = 4_000_000,
    threads: int | None = None,
    device: str = "auto",
    seconds: float = 60.0,
    seed: int = 0,
    say: Say = lambda step: None,
) -> Summary:
    """Measure this machine and what fastpair does on it.

    Parameters
    ----------
    table : a table file; one of float32 is measured in every precision, others in their own.
        Default: random embeddings are folded by the cosine, in every precision.
    entities, columns : of the generated table.
    pairs : random pairs to score, at most.
    threads : default one for each processor.
    device : "auto": the CPU, and the first GPU if there is one; "cpu", "gpu", "gpu:1": the GPU that
        is measured beside the CPU. One GPU is measured; all that are chosen are compared.
    seconds : all of it may take, compilation included; most of them are planned for.
    seed : of the embeddings and pairs.
    say : called with what is done next.

    Returns
    -------
    summary : ``machine``, ``limits`` (those of the machine, of its disk, and the ``start`` of a
        process), ``gpu`` (its machine and limits, None without one),
        ``rows`` (work x precision x device), ``agreement`` (head x precision x backend),
        ``backends``, ``skipped`` (what there was no time for), ``settings``.

    Raises
    ------
    ArgumentError : a size is too small.
    FileError : the table cannot be read, or the temporary folder cannot hold the files.
    DeviceError : a GPU was asked for that is not there.
    """
    begun = time.perf_counter()
    planned = PLANNED_SHARE * seconds
    _check_sizes(entities, columns, pairs, seconds)
    given = None if table is None else _read_given(table)
    count = thread_count(threads)
    choice = pick(device)
    machine = describe_machine()
    say("measuring what the machine can do")
    limits = measure_limits(count)
    gpu = _measure_gpu(choice)
    compared_device = "gpu" if device == "auto" and not choice.runtimes else choice.name
    those = backends(compared_device)
    skipped: list[str] = []
    say("comparing with the reference (kernels are compiled on the first run)")
    compared = _agree(those, given, begun + AGREEMENT_SHARE * planned, skipped)
    task = _Task(limits, count, pairs, begun + planned, seed, say, skipped, choice, gpu)
    with _temporary_folder() as folder:
        say("measuring the disk and the start of a process")
        limits["disk"] = measure_disk(folder)
        limits["start"] = _measure_start(folder, count)
        if table is not None and given is not None:
            rows = _refolded(task, table, given, folder)
        else:
            rows = _generated(task, (entities, columns), folder)
    return {
        "machine": machine,
        "limits": limits,
        "gpu": gpu,
        "rows": rows,
        "agreement": compared,
        "backends": [{"name": one.name, "missing": one.missing or None} for one in those],
        "skipped": skipped,
        "settings": {
            "table": None if table is None else str(table),
            "entities": entities if given is None else len(given.rows),
            "columns": columns if given is None else _true_columns(given.plan),
            "pairs": pairs,
            "threads": count,
            "device": choice.name,
            "device_note": choice.note,
            "seconds": seconds,
            "seed": seed,
            "k": BEST,
            "kept_share": KEPT,
        },
        "seconds": time.perf_counter() - begun,
    }


def _measure_start(folder: Path, threads: int) -> Summary:
    """Return the `spread` of the seconds of a process that scores next to nothing."""
    _check_room(folder, 1 << 20)
    ends = np.arange(1000, dtype=np.int32)
    embeddings = np.random.default_rng(0).standard_normal((1000, 16), dtype=np.float32)
    files = [folder / f"start-{name}.h5" for name in ("embeddings", "table", "pairs", "scores")]
    write_embeddings(files[0], [(0, embeddings)], embeddings.shape)
    jobs.project("cosine", files[0], files[1], threads=threads)
    write_pairs(files[2], [(ends, ends[::-1], None)], len(ends), dtype="int32")
    program = [sys.executable, "-c", "from fastpair.cli import main; main()", "score"]
    given = [str(path) for path in files[1:3]]
    options = ["-o", str(files[3]), "--overwrite", "--device", "cpu", "--threads", str(threads)]
    seconds = []
    for _ in range(LEAST_REPEATS):
        begun = time.perf_counter()
        done = subprocess.run([*program, *given, *options], capture_output=True, text=True)
        seconds.append(time.perf_counter() - begun)
        if done.returncode:
            raise FileError(f"a small fastpair score failed: {done.stderr.strip()}")
    for path in files:
        path.unlink()
    return spread(seconds)


def _check_sizes(entities: int, columns: int, pairs: int, seconds: float) -> None:
    for name, value, least in (
        ("entities", entities, 2),
        ("columns", columns, 1),
        ("pairs", pairs, 1),
    ):
        if value < least:
            raise ArgumentError(f"{name} is {value}, expected at least {least}")
    if not seconds > 0:
        raise ArgumentError(f"seconds is {seconds}, expected a number above 0")


def _read_given(path: Path) -> Table:
    table = read_table(path)
    if len(table.rows) < 2:
        raise ArgumentError(f"{path} has {len(table.rows)} rows, pairs need at least 2")
    if table.side != "both":
        raise ArgumentError(
            f"{path} holds the {table.side} side of an asymmetric model, whose rows are not "
            "compared with each other: give the table of a symmetric one"
        )
    return table


def _true_columns(plan: Plan) -> int:
    return sum(map(sum, plan.layout.columns))


def _measure_gpu(choice: Choice) -> Summary | None:
    if not choice.runtimes:
        return None
    from fastpair.gpu_machine import describe_gpu, measure_gpu_limits

    runtime = choice.runtimes[0]
    return {"machine": describe_gpu(runtime), "limits": measure_gpu_limits(runtime)}


def _agree(
    those: list[Backend], given: Table | None, deadline: float, skipped: list[str]
) -> list[Summary]:
    """Compare all backends until the deadline; the given table's first rows are a case too."""

    def all_cases() -> Iterator[Case]:
        if given is not None:
            yield Case("the table", given.rows[:80], given.plan)
        for case in cases():
            if time.perf_counter() > deadline:
                skipped.append(
                    f"agreement from {case.plan.precision} {case.head} on: the time was up; "
                    "kernels that are compiled now need not be the next time"
                )
                return
            yield case

    return agreement(those, all_cases())


# --- tables --------------------------------------------------------------------------------------


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    with writing(Path(os.environ.get("TMPDIR") or "/tmp")):
        made = tempfile.TemporaryDirectory(prefix="fastpair-")
    with made as name:
        yield Path(name)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise FileError(
            f"the temporary folder {folder.parent} has {free >> 20} MiB free, this benchmark needs "
            f"{(needed >> 20) + 1} MiB: set TMPDIR to another folder, or give smaller --entities, "
            "--columns or --pairs"
        )


def _generated(task: _Task, shape: tuple[int, int], folder: Path) -> list[Summary]:
    """Fold random embeddings in every precision and measure each table."""
    embeddings, table = folder / "embeddings.h5", folder / "table.h5"
    row = 4 * (shape[1] + 32)
    _check_room(folder, 2 * shape[0] * row + task.pairs * (INDEX_BYTES + SCORE_BYTES))
    rng = np.random.default_rng(task.seed)

    def blocks() -> Iterator[tuple[int, np.ndarray]]:
        step = max(1, (1 << 24) // shape[1])
        for start in range(0, shape[0], step):
            size = min(step, shape[0] - start), shape[1]
            yield start, rng.standard_normal(size, dtype=np.float32)

    write_embeddings(embeddings, blocks(), shape)
    rows = []
    for number, precision in enumerate(PRECISIONS):
        if task.left() < SHORTEST_ROW:
            task.skipped.append(f"all rows of {precision}: the time was up")
            continue
        task.say(f"folding a table in {precision}")
        options: Summary = {"precision": precision, "threads": task.threads, "overwrite": True}
        jobs.project("cosine", embeddings, table, **options)
        share = 1 / (len(PRECISIONS) - number)
        rows += task.rows_of(table, read_table(table), folder, share)
    return rows


def _refolded(task: _Task, path: Path, given: Table, folder: Path) -> list[Summary]:
    """Measure a given table and, if it is float32, its first rows in the other precisions."""
    rows, plan, others = given.rows, given.plan, [name for name in PRECISIONS if name != "float32"]
    if plan.precision != "float32" or plan.network is not None:
        return task.rows_of(path, given, folder, 1.0)
    found = task.rows_of(path, given, folder, 1 / len(PRECISIONS))
    some = rows[: max(2, MOST_REFOLDED // plan.layout.row_bytes)]
    _check_room(folder, some.nbytes)
    for number, precision in enumerate(others):
        if task.left() < SHORTEST_ROW:
            task.skipped.append(f"all rows of {precision}: the time was up")
            continue
        task.say(f"folding the table in {precision}")
        again, new = refold(some, plan, precision, threads=task.threads)
        about: Summary = {"fingerprint": given.fingerprint, "model_name": given.model_name}
        table = folder / "table.h5"
        with TableWriter(
            table, len(again), new, unit=given.unit, overwrite=True, **about
        ) as writer:
            writer.write(0, again.view(new.layout.dtype)[:, 0])
        share = 1 / (len(others) - number)
        found += task.rows_of(table, read_table(table), folder, share)
    return found


# --- rows ----------------------------------------------------------------------------------------


@dataclass
class _Task:
    """What all rows of a run share."""

    limits: Summary
    threads: int
    pairs: int
    deadline: float
    seed: int
    say: Say
    skipped: list[str]
    choice: Choice
    gpu: Summary | None

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.deadline - time.perf_counter()

    def rows_of(self, path: Path, table: Table, folder: Path, share: float) -> list[Summary]:
        """Measure every work on one table in a share of the time that is left."""
        _check_room(folder, min(self.pairs, 1 << 26) * (INDEX_BYTES + SCORE_BYTES))
        end = time.perf_counter() + share * self.left()
        devices = [Works(path, table, folder, self)]
        if self.gpu is not None:
            from fastpair.gpu_bench import GpuWorks

            devices.append(GpuWorks(path, table, folder, self))
        todo = [(works, name) for works in devices for name in WORKS]
        rows = []
        for number, (works, name) in enumerate(todo):
            what = f"{name} in {table.plan.precision} on the {works.device}"
            slot = min(LONGEST_ROW, (end - time.perf_counter()) / (len(todo) - number))
            if self.left() < SHORTEST_ROW:
                self.skipped.append(f"{what}: the time was up")
                continue
            self.say(f"measuring {what}")
            rows.append(works.row(name, slot))
        return rows


class Works:
    """The works on one table on the CPU: each takes a size and returns its seconds."""

    device = "cpu"

    def __init__(self, path: Path, table: Table, folder: Path, task: _Task) -> None:
        self.path, self.table, self.folder, self.task = path, table, folder, task
        rng = np.random.default_rng(task.seed)
        most = min(task.pairs, 1 << 26)
        self.left, self.right = rng.integers(0, len(table.rows), (2, most), dtype=np.int32)
        self.prepare()
        self.threshold = self._threshold()
        self.scan: str | None = None
        self.kept: int | None = None

    def prepare(self) -> None:
        """Have what scores pairs, and the bandwidth of the table."""
        from fastpair.scoring import PairScorer

        data, threads = self.table.rows.reshape(-1), self.task.threads
        self.scorer: Any = PairScorer(self.table.rows, self.table.plan, threads=threads)
        self.bandwidth = {
            "in_order": read_bandwidth(data, threads),
            "at_random": random_bandwidth(data, self.table.rows.shape[1], threads),
        }

    def _threshold(self) -> float:
        """Return a score that about `KEPT` of the pairs reach."""
        left, right = self.left[:SAMPLE], self.right[:SAMPLE]
        apart = left != right
        scores = self.scorer(left[apart], right[apart])
        return float(np.quantile(scores, 1 - KEPT)) if len(scores) else 0.0

    def row(self, name: str, slot: float) -> Summary:
        """Measure one work in about `slot` seconds and put it beside its ceiling."""
        of_pairs = name in ("pairs", "stream")
        work: Callable[[int], float] = {
            "pairs": self._pairs,
            "stream": self._stream,
            "top-k": lambda n: self._walk(n, lambda walk: walk.top_k(BEST)),
            "threshold": self._above,
            "dense": lambda n: self._walk(n, lambda walk: walk.dense()),
        }[name]
        least = PILOT_PAIRS if of_pairs else PILOT_ENTITIES
        most = self.most_pairs(name) if of_pairs else len(self.table.rows)
        self.scan = self.kept = None
        size, seconds = _measure(work, min(least, most), most, slot, 1 if of_pairs else 2)
        count = size if of_pairs else size * size
        needs, ceiling, binds = self.ceiling(name, size)
        rate = count / statistics.median(seconds)
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


def _measure(
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
    if work in ("pairs", "stream"):
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
