"""What a run will cost before it is begun: bytes, memory, hours, and what binds them.

A run is priced as each of its workers spends it: a start, the tables read once, then the pairs,
whose reading, scoring and writing go on side by side, so that the slowest of the three counts:

    seconds = start + tables / read + max(pairs / rate, read bytes / read, written bytes / write)

Tables that do not fit into the memory of a worker are read by blocks (docs/scaling.md): S bytes of
one table in a memory of M about (S / M + 1) / 2 times for a list of pairs, whose sorted copy is
written and read as well, and once for each block of left rows for all pairs, which are walked in
both orders then, unless they are counted for a histogram. Workers of a cluster do not do that: a
job of several workers whose tables do not fit is as many runs, each on its own share of the pairs.
Where they fit, such workers walk rows of one table against all of it for the best of each row and
for a histogram, which one process walks once a pair (docs/cluster.md).

Rates come from what ``fastpair bench`` measured, or from real runs of the same work: each says
``seconds = start + tables / read + pairs / rate``, and the start and the rate that explain them
best, relative to their length, are taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastpair.backend import parse_size
from fastpair.errors import ArgumentError, DataError, FileError
from fastpair.kernels import LANES, PRECISIONS, ROW_ALIGNMENT

Summary = dict[str, Any]

WORKS = ("score", "top-k", "threshold", "dense", "histogram")
"""What can be priced: a pair file, and the forms of all pairs."""

BENCH_WORKS = {"score": "stream", "histogram": "threshold"}
"""Works that `bench` measures under another name; a histogram is walked twice."""

PAIR_BYTES, SCORE_BYTES, INDEX_BYTES = 8, 4, 8
"""Bytes of a pair of int32 row numbers, of a score, and of the index of a kept pair."""

SORTED_BYTES = 11
"""Bytes of a pair among the sorted ones, about; they are written once and read once."""

BLOCK_BYTES = 1 << 28
"""Bytes of the blocks of pairs and results that are under way in a worker, about."""

HELD_SHARE, RESULT_SHARE = 1 / 4, 1 / 8
"""Of the memory, what left rows take that are held while right ones stream, and their results."""


@dataclass(frozen=True)
class Job:
    """What is to be run.

    Parameters
    ----------
    work : one of `WORKS`.
    entities : rows of the left table.
    others : rows of the right table, None: pairs are of one table.
    row_bytes : bytes of a row of a table.
    pairs : pairs of the file, with the work score; otherwise all pairs, and left None.
    k : of top-k.
    kept : share of pairs that a threshold keeps.
    workers : processes that share the work, each on a machine of its own.
    memory : bytes that a worker may use; None: as much as it needs.
    """

    work: str
    entities: int
    row_bytes: int
    others: int | None = None
    pairs: int | None = None
    k: int = 10
    kept: float = 1e-4
    workers: int = 1
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.work not in WORKS:
            raise ArgumentError(f"work is {self.work!r}, expected one of {', '.join(WORKS)}")
        for name in ("entities", "row_bytes", "others", "pairs", "k", "workers", "memory"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentError(f"{name} is {value}, expected at least 1")
        if (self.pairs is None) == (self.work == "score"):
            raise ArgumentError(
                "the work score needs the number of pairs"
                if self.work == "score"
                else f"the work {self.work} is of all pairs: leave their number out"
            )
        if not 0 <= self.kept <= 1:
            raise ArgumentError(f"kept is {self.kept}, expected a share from 0 to 1")

    @property
    def table_bytes(self) -> int:
        """Bytes of all tables."""
        return (self.entities + (self.others or 0)) * self.row_bytes

    @property
    def scored(self) -> int:
        """Pairs that are scored in all."""
        return self.pairs or self.entities * (self.others or self.entities)

    @property
    def read_bytes(self) -> int:
        """Bytes that are read beside the tables."""
        return self.scored * PAIR_BYTES if self.work == "score" else 0

    @property
    def written_bytes(self) -> int:
        """Bytes of the result."""
        if self.work in ("score", "dense"):
            return self.scored * SCORE_BYTES
        if self.work == "top-k":
            return self.entities * self.k * (SCORE_BYTES + INDEX_BYTES)
        if self.work == "threshold":
            found = self.kept * self.scored * (SCORE_BYTES + INDEX_BYTES)
            return int(found) + self.entities * INDEX_BYTES
        return 0


@dataclass(frozen=True)
class Rates:
    """What one worker can do.

    Parameters
    ----------
    pairs_per_second : of the work, all threads together, on tables in memory.
    start : seconds before the first table is read.
    read, write : bytes a second of the storage as one worker sees it alone.
    network : bytes a second of a worker's link to the storage; None: it does not bind.
    storage : bytes a second that the storage gives to all workers together; None: it does not bind.
    """

    pairs_per_second: float
    start: float = 0.0
    read: float = math.inf
    write: float = math.inf
    network: float | None = None
    storage: float | None = None

    def __post_init__(self) -> None:
        for name in ("pairs_per_second", "read", "write", "network", "storage"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ArgumentError(f"{name} is {value}, expected a number above 0")
        if not self.start >= 0:
            raise ArgumentError(f"start is {self.start}, expected at least 0 seconds")

    def reading(self, workers: int) -> tuple[float, str]:
        """Bytes a second that each of some workers can read, and what sets that."""
        return self._moved(self.read, workers)

    def writing(self, workers: int) -> tuple[float, str]:
        """Bytes a second that each of some workers can write, and what sets that."""
        return self._moved(self.write, workers)

    def _moved(self, own: float, workers: int) -> tuple[float, str]:
        rates = {"disk": own}
        if self.network is not None:
            rates["network"] = self.network
        if self.storage is not None:
            rates["storage"] = self.storage / workers
        slowest = min(rates, key=lambda name: rates[name])
        return rates[slowest], slowest


def row_bytes_of(columns: int, precision: str = "float32") -> int:
    """Return the bytes of a row of one segment of products, such as that of the cosine."""
    if precision not in PRECISIONS:
        raise ArgumentError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if columns < 1:
        raise ArgumentError(f"columns is {columns}, expected at least 1")
    numbers = -(-columns // LANES) * LANES * np.dtype(PRECISIONS[precision]).itemsize
    scale = 4 if precision == "int8" else 0
    return -(-(numbers + scale) // ROW_ALIGNMENT) * ROW_ALIGNMENT


# --- where rates come from ------------------------------------------------------------------------


def rates_of_bench(found: Summary, job: Job, precision: str = "float32") -> Rates:
    """Return the rates of a work from what `bench.bench` returned.

    Pairs of a list are bound by the bytes of their rows, all pairs by the columns of a row: rates
    are brought from the measured rows to those of the job in proportion. Where the table is larger
    than the one that was measured, random rows come as fast as the machine reads blocks at random
    from a memory far beyond its caches.

    Raises
    ------
    DataError : the work was not measured in this precision.
    """
    wanted = BENCH_WORKS.get(job.work, job.work)
    measured = found.get("rows")
    rows = [
        row
        for row in (measured if isinstance(measured, list) else [])
        if (row["work"], row["precision"], row["device"]) == (wanted, precision, "cpu")
    ]
    if not rows or "disk" not in found.get("limits", {}):
        raise DataError(
            f"the rates hold no {wanted} in {precision}: run fastpair bench --json anew, with more "
            "--seconds"
        )
    row, limits = rows[0], found["limits"]
    rate = row["pairs_per_second"]["median"]
    if job.work == "score":
        needed = row["needs_per_pair"]["table"]
        rate *= needed / (2 * job.row_bytes + PAIR_BYTES + SCORE_BYTES)
        if job.table_bytes > row["entities"] * row["row_bytes"]:
            far = limits["random"]["all"]["median"]
            rate *= min(1.0, far / row["table_bandwidth"]["at_random"]["median"])
    else:
        rate *= row["row_bytes"] / job.row_bytes
    if job.work == "histogram":
        rate /= 2
    return Rates(
        rate,
        start=limits["start"]["median"],
        read=limits["disk"]["read"]["median"],
        write=limits["disk"]["write"]["median"],
    )


def rates_of_runs(runs: Sequence[Summary], job: Job, read: float = math.inf) -> Rates:
    """Return the start and the rate that explain real runs of one work best.

    Parameters
    ----------
    runs : summaries of `jobs.score` or `jobs.matrix`, of two sizes at least.
    job : what will be priced; the runs must be of the same work and of rows as long.
    read : bytes a second at which their tables were read; from the page cache about a memory copy.

    Raises
    ------
    DataError : the runs are of another work, of other rows, or of one size.
    """
    for run in runs:
        if "workers" in run:
            raise DataError(
                f"a run was made by {run['workers']} workers of a cluster, but rates are "
                "those of one process: leave out --workers and --scheduler in it"
            )
        missing = [name for name in ("work", "row_bytes", "pairs", "seconds") if name not in run]
        if missing:
            raise DataError(
                f"a run says nothing of {', '.join(missing)}: it must be what fastpair score or "
                "fastpair matrix print with --json"
            )
        for name in ("pairs", "seconds"):
            if not isinstance(run[name], (int, float)) or not run[name] > 0:
                raise DataError(f"{name} of a run is {run[name]!r}, expected a number above 0")
        if run["work"] != job.work:
            raise DataError(f"a run is of the work {run['work']}, expected {job.work}")
        if run["row_bytes"] != job.row_bytes:
            raise DataError(
                f"a run has rows of {run['row_bytes']} bytes, expected {job.row_bytes}: rates of "
                "real runs are taken as they are"
            )
        if run.get("resumed_from"):
            raise DataError("a run was resumed: its seconds are those of a part")
    pairs = np.array([run["pairs"] for run in runs], float)
    if len(set(pairs.tolist())) < 2:
        raise DataError("runs of two sizes are needed to tell the start from the rate")
    from scipy.optimize import nnls

    seconds = np.array([run["seconds"] for run in runs], float)
    tables = np.array([run.get("table_bytes", 0) for run in runs], float)
    rest = np.maximum(seconds - tables / read, 0.0)
    weights = 1 / seconds  # each run counts by its relative error
    (start, per_pair), _ = nnls(np.stack([weights, pairs * weights], 1), rest * weights)
    if per_pair <= 0:
        raise DataError("the longer runs took no more time than the shorter: run larger ones")
    return Rates(1 / per_pair, start=start, read=read)


def read_summary(path: Path) -> Summary:
    """Return what a file of JSON holds, an object.

    Raises
    ------
    FileError : it cannot be read, or holds something else.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileError(f"{path} does not exist; check the name and the folder.") from error
    except (OSError, ValueError) as error:
        raise FileError(f"{path} is no JSON: {error}; give what --json printed.") from error
    if not isinstance(found, dict):
        raise FileError(f"{path} holds no JSON object; give what --json printed.")
    return found


# --- the price ------------------------------------------------------------------------------------


SHARES = (
    "workers of a cluster hold the tables whole, which do not fit: this is the price of {} runs, "
    "one on each machine, each with its own share of the pairs (of the left rows, for all pairs)"
)


def price(job: Job, rates: Rates) -> Summary:
    """Say what a job costs at some rates.

    Returns
    -------
    summary : ``seconds`` in all; ``stages``, the seconds of each that follow one another;
        ``pairs`` the seconds of what goes on side by side during the pairs; ``binds``, what the
        longest part of the run is spent on; ``bytes``, moved by all workers; ``memory``, needed by
        each to hold the tables; ``fits``, whether they have it; ``passes``, how often each reads
        the tables; ``notes`` for the reader.
    """
    share = 1 / job.workers
    read, reader = rates.reading(job.workers)
    write, writer = rates.writing(job.workers)
    beside = BLOCK_BYTES if job.memory is None else min(BLOCK_BYTES, job.memory // 2)
    needed = job.table_bytes + beside
    fits = job.memory is None or needed <= job.memory
    passes = 1.0 if fits else _passes(job, job.memory or 0, beside)
    pairs = {
        "scoring": job.scored * share * _walks(job, fits) / rates.pairs_per_second,
        f"reading pairs from the {reader}": job.read_bytes * share / read,
        f"writing to the {writer}": job.written_bytes * share / write,
    }
    slowest = max(pairs, key=lambda name: pairs[name])
    tables = f"reading tables from the {reader}"
    stages = {"starting": rates.start, tables: passes * job.table_bytes / read}
    moved = 0 if fits or job.work != "score" else SORTED_BYTES * job.scored
    if moved:
        stages["sorting pairs by block"] = moved * share * (1 / read + 1 / write)
    stages[slowest] = pairs[slowest]
    seconds = sum(stages.values())
    return {
        "work": job.work,
        "workers": job.workers,
        "seconds": seconds,
        "hours": seconds / 3600,
        "worker_hours": job.workers * seconds / 3600,
        "stages": stages,
        "pairs": pairs,
        "binds": max(stages, key=lambda name: stages[name]),
        "scored": job.scored,
        "bytes": {
            "tables": job.table_bytes,
            "read": int(passes * job.workers * job.table_bytes) + job.read_bytes + moved,
            "written": job.written_bytes + moved,
        },
        "memory": needed,
        "fits": fits,
        "notes": _notes(job, rates, fits),
        "passes": passes,
        "rates": {
            "pairs_per_second": rates.pairs_per_second,
            "start": rates.start,
            "read": _finite(read),
            "write": _finite(write),
        },
    }


def _notes(job: Job, rates: Rates, fits: bool) -> list[str]:
    """What a reader has to know of a price."""
    notes = [] if fits or job.workers == 1 else [SHARES.format(job.workers)]
    free = [name for name in ("read", "write") if math.isinf(getattr(rates, name))]
    if free:
        options = " and ".join(f"--{name}" for name in free)
        notes.append(
            f"no rate of the disk is known: its time is left out, but for what runs had of it in "
            f"them; give {options}"
        )
    return notes


def _walks(job: Job, fits: bool) -> int:
    """How often a pair is walked beside a run of one process in memory, which rates are of."""
    if job.others is not None or job.work in ("score", "dense") or (fits and job.workers == 1):
        return 1
    # a cluster cuts a threshold into squares of the triangle, blocks do so for a histogram
    once = "threshold" if fits else "histogram" if job.workers == 1 else ""
    return 1 if job.work == once else 2


def _passes(job: Job, memory: int, beside: int) -> float:
    """How often a worker reads tables that do not fit into its memory."""
    left = job.entities * job.row_bytes
    if job.work != "score":
        return _rows_walked(job, memory) * job.row_bytes / job.table_bytes
    room = memory - beside
    if job.others is None:
        return (left / room + 1) / 2
    sides = left, job.table_bytes - left
    both = (sides, sides[::-1])  # the side is held that costs less
    return min(held + other * math.ceil(held / room) for held, other in both) / job.table_bytes


def _rows_walked(job: Job, memory: int) -> float:
    """Rows that a walk of all pairs by blocks reads, see `fastpair.block_pairs`."""
    rows, others = math.ceil(job.entities / job.workers), job.others or job.entities
    result = {"top-k": 24 * job.k, "dense": SCORE_BYTES * others}.get(job.work, 0)
    held = int(memory * HELD_SHARE) // job.row_bytes
    if result:
        held = min(held, int(memory * RESULT_SHARE) // result)
    blocks = math.ceil(rows / max(1, held))
    if job.work == "dense" or job.others is not None or job.workers > 1:
        read: float = rows + others * blocks
    else:  # a block meets itself without being read again, and for a histogram those behind it
        read = rows * (blocks + 1) / 2 if job.work == "histogram" else rows * blocks
    if job.work == "histogram":
        read *= 2  # the ends first
    return read + (others if job.work in ("dense", "histogram") else 0)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def parse_rate(text: str, name: str) -> float:
    """Return the bytes a second that a text such as ``500MB`` or ``1.2GB/s`` names."""
    try:
        return float(parse_size(text.strip().removesuffix("/s")))
    except ArgumentError:
        raise ArgumentError(
            f"{name} is {text!r}, expected bytes a second such as 500MB/s"
        ) from None
