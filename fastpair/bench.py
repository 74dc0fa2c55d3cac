"""What ``fastpair bench`` measures: this machine, its ceilings, our rates, and agreement.

Every rate stands beside the ceiling that binds it: the time in which the machine could at best
move the bytes, or do the arithmetic, that the work needs. Rows are shortened to fit the time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastpair import jobs
from fastpair.agreement import Backend, Case, agreement, backends, cases
from fastpair.backend import thread_count
from fastpair.bench_compile import compile_kernels, compiled
from fastpair.bench_figures import PRECISION_HEADS, measure_figures
from fastpair.bench_given import Deciding, given_pairs, open_given, read_given, refolded
from fastpair.bench_works import (
    BEST,
    FILE,
    INDEX_BYTES,
    KEPT,
    LEAST_REPEATS,
    SCORE_BYTES,
    WORKS,
    Works,
)
from fastpair.device import Choice, pick
from fastpair.energy import Counter, cpu_counters, gpu_counter
from fastpair.errors import ArgumentError, FileError
from fastpair.files import Table, read_table, write_embeddings, write_pairs
from fastpair.kernels import PRECISIONS, Plan
from fastpair.machine import (
    describe_machine,
    measure_disk,
    measure_limits,
    spread,
)
from fastpair.pairs import PairSource
from fastpair.staging import writing

Summary = dict[str, Any]
Say = Callable[[str], None]

PLANNED_SHARE = 0.87
"""Share of the seconds that is planned for: the rest is for what takes longer than it looked."""

COMPILED_SHARE = 0.42
"""Share of the seconds that compiling takes, at most, before anything is measured."""

AGREEMENT_SHARE = 0.6
"""Share of the time before rows after which no further case of agreement begins."""

LONGEST_COMPILING = 30.0
"""Seconds that a case of agreement takes whose kernels are not compiled, at most."""

SHORTEST_ROW = 0.3
"""Seconds that must be left for a row to begin."""

LONGEST_START = 3.0
"""Seconds after which a process is not started again to measure its start."""

LONGEST_ROW = 0.9
"""Seconds that a row takes, about, where there is more time."""


def bench(
    table: Path | None = None,
    *,
    pair_file: Path | None = None,
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
    pair_file : pairs of the table, of any accepted format: they are scored as they are read, and
        the first of them take the place of random pairs. Reading ends with the time that there is,
        but a text file is counted first, as `fastpair.jobs.score` does. Default: random pairs.
    entities, columns : of the generated table.
    pairs : pairs to score in memory, at most.
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
        ``rows`` (work x precision x device), ``figures`` (see `bench_figures.measure_figures`,
        None where a table is given), ``energy`` (the counters, and notes on those that cannot be
        read), ``agreement`` (head x precision x backend), ``backends``, ``skipped`` (what there was
        no time for), ``settings``.

    Raises
    ------
    ArgumentError : a size is too small, or a pair file is given without its table.
    FileError : the table or pairs cannot be read, or the temporary folder cannot hold the files.
    DeviceError : a GPU was asked for that is not there.
    """
    begun = time.perf_counter()
    planned = PLANNED_SHARE * seconds
    _check_sizes(entities, columns, pairs, seconds)
    if pair_file is not None and table is None:
        raise ArgumentError(
            f"--pairs {pair_file} goes with --table FILE, whose rows its pairs are: give the table "
            "that they are scored with, or a number of random pairs"
        )
    given = None if table is None else read_given(table)
    source = None if given is None or pair_file is None else open_given(pair_file, given)
    count = thread_count(threads)
    choice = pick(device)
    machine = describe_machine()
    say("compiling kernels that are not in the cache")
    complete = compile_kernels(begun + COMPILED_SHARE * seconds)
    say("measuring what the machine can do")
    limits = measure_limits(count)
    gpu = _measure_gpu(choice)
    compared_device = "gpu" if device == "auto" and not choice.runtimes else choice.name
    those = backends(compared_device)
    skipped: list[str] = []
    deciding = None if given is None else Deciding(given, count)
    counters, notes = _counters(choice)
    task = Task(limits, count, pairs, begun + planned, seed, say, skipped, choice, gpu, *counters)
    task.those, task.source, task.spare = those, source, seconds - planned
    task.given_pairs = None if source is None else given_pairs(source, pairs, count)
    with _temporary_folder() as folder:
        say("measuring the disk and the start of a process")
        limits["disk"] = measure_disk(folder)
        limits["start"] = _measure_start(folder, count)
        figures = None
        if given is None:
            _check_room(folder, _generated_bytes(task, entities, columns))
            ready = [head for head in PRECISION_HEADS if compiled(head)]
            figures = measure_figures(task, entities, columns, ready)
        compared = _agree(task, deciding, complete)
        if table is not None and given is not None and deciding is not None:
            rows = _given_rows(task, table, given, folder, deciding, compared)
        else:
            rows = _generated(task, (entities, columns), folder)
    return {
        "machine": machine,
        "limits": limits,
        "gpu": gpu,
        "rows": rows,
        "figures": figures,
        "energy": {"counters": [one.name for side in counters for one in side], "notes": notes},
        "agreement": compared,
        "backends": [{"name": one.name, "missing": one.missing or None} for one in those],
        "skipped": skipped,
        "settings": {
            "table": None if table is None else str(table),
            "pair_file": None if pair_file is None else str(pair_file),
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
            "threshold": None if given is None else given.threshold,
        },
        "seconds": time.perf_counter() - begun,
    }


def _counters(choice: Choice) -> tuple[tuple[list[Counter], list[Counter]], list[str]]:
    """Return the counters of the processors and of the GPU that is measured, and notes on them."""
    counters, note = cpu_counters()
    found: tuple[list[Counter], list[Counter]] = (counters, [])
    notes = [note]
    for runtime in choice.runtimes[:1]:
        counter, note = gpu_counter(runtime.number)
        notes.append(note)
        if counter is not None:
            found[1].append(counter)
    return found, [note for note in notes if note]


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
    seconds: list[float] = []
    while len(seconds) < LEAST_REPEATS and sum(seconds) < LONGEST_START:
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


def _true_columns(plan: Plan) -> int:
    return sum(map(sum, plan.layout.columns))


def _measure_gpu(choice: Choice) -> Summary | None:
    if not choice.runtimes:
        return None
    from fastpair.gpu_machine import describe_gpu, measure_gpu_limits

    runtime = choice.runtimes[0]
    return {"machine": describe_gpu(runtime), "limits": measure_gpu_limits(runtime)}


def _agree(task: Task, deciding: Deciding | None, complete: bool) -> list[Summary]:
    """Compare all backends while there is time; some rows of the given table are a case too."""
    task.say("comparing with the reference")
    task.kept = (1 - AGREEMENT_SHARE) * max(0.0, task.left())

    def all_cases() -> Iterator[Case]:
        if deciding is not None:
            yield deciding.case(deciding.table)
        for case in cases():
            least = 0.0 if complete else LONGEST_COMPILING
            if not task.fits(f"agreement from {case.plan.precision} {case.head} on", least):
                return
            with task.step():  # the caller compares it before it asks for the next
                yield case

    compared = agreement(task.those, all_cases())
    task.kept = task.slowest = 0.0  # rows call what was compiled for this
    return compared


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


def _generated_bytes(task: Task, entities: int, columns: int) -> int:
    """Return the bytes on disk of generated embeddings, their table, pairs and scores, at most."""
    row = 4 * (columns + 32)
    return 2 * entities * row + task.pairs * (INDEX_BYTES + SCORE_BYTES)


def _generated(task: Task, shape: tuple[int, int], folder: Path) -> list[Summary]:
    """Fold random embeddings in every precision and measure each table."""
    embeddings, table = folder / "embeddings.h5", folder / "table.h5"
    rng = np.random.default_rng(task.seed)

    def blocks() -> Iterator[tuple[int, np.ndarray]]:
        step = max(1, (1 << 24) // shape[1])
        for start in range(0, shape[0], step):
            size = min(step, shape[0] - start), shape[1]
            yield start, rng.standard_normal(size, dtype=np.float32)

    write_embeddings(embeddings, blocks(), shape)
    rows = []
    for number, precision in enumerate(PRECISIONS):
        if not task.fits(f"all rows of {precision}", SHORTEST_ROW):
            continue
        task.say(f"folding a table in {precision}")
        options: Summary = {"precision": precision, "threads": task.threads, "overwrite": True}
        jobs.project("cosine", embeddings, table, **options)
        share = 1 / (len(PRECISIONS) - number)
        rows += task.rows_of(table, read_table(table), folder, share)
    return rows


def _given_rows(
    task: Task, path: Path, given: Table, folder: Path, deciding: Deciding, compared: list[Summary]
) -> list[Summary]:
    """Measure a given table and, if it is float32, its first rows in the other precisions.

    What becomes of decisions in those is added to what was compared.
    """
    others = [name for name in PRECISIONS if name != "float32"]
    alone = given.plan.precision != "float32" or given.plan.network is not None
    found = task.rows_of(path, given, folder, 1.0 if alone else 1 / len(PRECISIONS))
    if alone:
        return found
    _check_room(folder, deciding.refolded_bytes)
    for number, precision in enumerate(others):
        if not task.fits(f"all rows of {precision}", SHORTEST_ROW):
            continue
        task.say(f"folding the table in {precision}")
        table = refolded(given, precision, folder / "table.h5", task.threads)
        compared += agreement(task.those, [deciding.case(table)])
        share = 1 / (len(others) - number)
        found += task.rows_of(folder / "table.h5", table, folder, share)
    return found


# --- rows ----------------------------------------------------------------------------------------


@dataclass
class Task:
    """What all rows of a run share.

    Parameters
    ----------
    deadline : the time, of `time.perf_counter`, at which no row begins any more.
    counters, gpu_counters : what counts energy, see `fastpair.energy`.
    kept : seconds before the deadline that are kept for something else.
    spare : seconds after the deadline that a step may take that has begun.
    slowest : seconds of the slowest step so far.
    those : the backends that are compared.
    source : the given pair file.
    given_pairs : row numbers (m,) twice, the first pairs of that file.
    """

    limits: Summary
    threads: int
    pairs: int
    deadline: float
    seed: int
    say: Say
    skipped: list[str]
    choice: Choice
    gpu: Summary | None
    counters: list[Counter] = field(default_factory=list)
    gpu_counters: list[Counter] = field(default_factory=list)
    kept: float = 0.0
    spare: float = 0.0
    slowest: float = 0.0
    those: list[Backend] = field(default_factory=list)
    source: PairSource | None = None
    given_pairs: tuple[np.ndarray, np.ndarray] | None = None

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.deadline - self.kept - time.perf_counter()

    def fits(self, what: str, least: float) -> bool:
        """Return whether a step may begin that takes `least` seconds; else name it as skipped.

        It may take as long as the slowest before it, since a kernel may have to be compiled first;
        so much must be left together with what was not planned for.
        """
        if self.left() >= max(least, self.slowest - self.spare):
            return True
        self.skipped.append(f"{what}: the time was up")
        return False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Remember how long a step takes."""
        begun = time.perf_counter()
        yield
        self.slowest = max(self.slowest, time.perf_counter() - begun)

    def rows_of(self, path: Path, table: Table, folder: Path, share: float) -> list[Summary]:
        """Measure every work on one table in a share of the time that is left."""
        _check_room(folder, min(self.pairs, 1 << 26) * (INDEX_BYTES + SCORE_BYTES))
        end = time.perf_counter() + share * self.left()
        devices = [Works(path, table, folder, self)]
        if self.gpu is not None:
            from fastpair.gpu_bench import GpuWorks

            devices.append(GpuWorks(path, table, folder, self))
        todo = [(works, name) for works in devices for name in WORKS]
        if self.source is not None and path.parent != folder:  # other tables have no ids
            todo.insert(2, (devices[0], FILE))
        rows = []
        for number, (works, name) in enumerate(todo):
            what = f"{name} in {table.plan.precision} on the {works.device}"
            slot = min(LONGEST_ROW, (end - time.perf_counter()) / (len(todo) - number))
            if self.fits(what, SHORTEST_ROW):
                self.say(f"measuring {what}")
                with self.step():
                    rows.append(works.row(name, slot))
        return rows
