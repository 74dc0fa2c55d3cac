"""`matrix` on a cluster: workers walk ranges of left rows, or squares of the triangle.

Threshold of one table: rows are cut into blocks, and each pair of blocks is walked once, as a run
without a cluster does. Top-k and histogram of one table are cut by rows, each walked against all
columns: every pair is walked twice, in both directions, which costs up to twice the work of a run
without a cluster. Dense matrices and two tables lose nothing. Every task packs the right side anew.

What is kept does not depend on how pairs were walked. Parts are read back in order where a run
without a cluster would walk, so that every format is written by the same code: CSR always, since
its row ends are known last, and with `--consolidate` all. Otherwise the best of rows and dense
matrices in HDF5 are a file over the parts. A histogram leaves no parts: it is summed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastpair.backend import LEAST_MEMORY
from fastpair.blocks import Column, Content, fitting_rows
from fastpair.compression import write_rows
from fastpair.device import pick
from fastpair.distributed import as_cluster
from fastpair.errors import ArgumentError, DataError, MemoryBudgetError
from fastpair.files import Table
from fastpair.hdf5 import open_hdf5
from fastpair.isolation import PairsWithoutIsolated, pack_rows
from fastpair.jobs.all_pairs import NETWORK_NOTE, all_pairs_on, attributes_of, identity_of
from fastpair.jobs.inputs import Count, Summary, device_bytes, ignore, load_tables
from fastpair.jobs.on_cluster import (
    MOST_PARTS,
    Job,
    Making,
    check_matrix_products,
    cut,
    forget_unfinished,
    found_or_made,
    job_for,
    kind_of_device,
    matrix_products,
    opened_once,
    refuse_partial,
    shared_paths,
    software,
)
from fastpair.joining import write_virtual
from fastpair.matrix_output import HDF5, MatrixOutput
from fastpair.parts import Part, PartsFolder, Told
from fastpair.results import DenseWriter, TopKWriter, dense_content, top_k_content

FEW_PARTS = 16
"""Parts that a job has at least, where it has the rows."""

LEAST_ROWS, PAIRS_A_PART = 1 << 14, 1 << 30
"""Rows of a part where there are more than few parts: a task packs all right rows first. And pairs
of a part, where that makes more rows."""

DENSE_BYTES = 1 << 28
"""Bytes of a part of a dense matrix, about."""

LEAST_SQUARE, MOST_SQUARE, SQUARES = 1 << 10, 1 << 15, 8
"""Rows of a block of the triangle, and about how many blocks there are at least."""

HITS = [Column("rows", "<i8"), Column("indices", "<i8"), Column("data", "<f4")]
"""What a part of a threshold holds."""

HITS_AT_ONCE = 1 << 22
"""Hits that a worker holds to store them, and that are held, three times, to bring them in order,
unless a single row has more."""


def matrix_on_cluster(
    given: Any,
    asked: Summary,
    output: Path,
    progress: Count,
    expect: Callable[[int | None], None] | None,
    *,
    compression: str | None,
    consolidate: bool,
    overwrite: bool,
    resume: bool,
    device: str,
    **limits: Any,
) -> Summary:
    """Walk all pairs on a cluster; parameters and summary are those of `fastpair.jobs.matrix`."""
    begun, cluster, form = time.perf_counter(), as_cluster(given), str(asked["form"])
    kind = kind_of_device(device, limits["device_memory"])
    if form == "histogram" and kind == "gpu":
        raise ArgumentError("a histogram is counted on the CPU of a cluster: leave out --device")
    asked = shared_paths(asked, "table", "against", "exclude")
    left, right, _ = load_tables(
        asked["table"], asked["against"], None, either_way=True, without_rows=True
    )
    options = {"compression": compression, "overwrite": overwrite, "resume": resume}
    target = _target(output, form, left, right, _identity(asked, left, right, kind), options)
    walked = target.shape[0] * target.shape[1]
    if expect is not None:
        expect(walked * (2 if form == "histogram" else 1))
    virtual = not consolidate and _may_be_virtual(target, left, right)
    if virtual:
        refuse_partial(target.path, overwrite)
    limits |= {"more": {"products": matrix_products()} if left.plan.network is not None else {}}
    facts = {"software": software(), **target.identity, **_numbers(asked)}
    again = {"overwrite": overwrite, "resume": resume}
    with PartsFolder(output, facts, flushed=virtual and not cluster.local, **again) as folder:
        job = job_for(cluster, asked, target.identity, run=folder.run, device=kind, **limits)
        joining = _Joining(Making(cluster, job, matrix_part, "rows", progress), folder, target)
        try:
            found = joining.virtual() if virtual else joining.consolidated(left, right)
        except DataError:
            folder.give_up()
            raise
        finally:
            joining.making.forget()
    forget_unfinished(output)
    seconds = time.perf_counter() - begun
    rest = walked - found["resumed_from"] * target.shape[1]
    return {
        "output": str(output),
        "pairs": walked,
        **found,
        "seconds": seconds,
        "pairs_per_second": rest / max(seconds, 1e-9),
        "workers": cluster.workers,
        "parts": len(joining.making.notes),
        "device": kind,
        "device_note": "",
        "unit": left.unit,
        "notes": [*([NETWORK_NOTE] if left.plan.network is not None else []), *joining.notes],
    }


def _target(
    output: Path,
    form: str,
    left: Table,
    right: Table | None,
    identity: dict[str, str],
    options: Summary,
) -> MatrixOutput:
    """Return where the result goes, as a run without a cluster has it."""
    return MatrixOutput(
        path=output,
        form=form,
        shape=(len(left.rows), len((right or left).rows)),
        ids=left.ids,
        ids_right=None if right is None else right.ids,
        distinct=right is not None,
        identity=identity,
        attributes=attributes_of(left, right),
        **options,
    )


def _identity(asked: Summary, left: Table, right: Table | None, kind: str) -> dict[str, str]:
    read = {name: asked[name] for name in ("left_column", "right_column", "keys", "reading")}
    return identity_of(left, right, kind, asked["form"], asked["exclude"], read)


def _numbers(asked: Summary) -> dict[str, str]:
    """What parts depend on beside the identity."""
    numbers = {"top-k": ("top_k",), "threshold": ("threshold",), "histogram": ("bins",)}
    return {name: repr(asked[name]) for name in ("form", *numbers.get(asked["form"], ()))}


def _may_be_virtual(target: MatrixOutput, left: Table, right: Table | None) -> bool:
    """Whether an output can be a file over parts."""
    finite = left.isolated is None and (right or left).isolated is None
    plain = target.path.suffix.lower() in HDF5 and target.compression is None
    return target.form in ("top-k", "dense") and plain and finite


def rows_a_part(rows: int, columns: int) -> int:
    """Left rows of a part, where nothing else decides."""
    return max(1, min(max(LEAST_ROWS, PAIRS_A_PART // max(1, columns)), -(-rows // FEW_PARTS)))


class _Joining:
    """Makes an output of parts.

    Parameters
    ----------
    making : has parts made.
    folder : where.
    target : the output.

    Attributes
    ----------
    notes : sentences of workers for the reader.
    """

    def __init__(self, making: Making, folder: PartsFolder, target: MatrixOutput) -> None:
        self.making, self.folder, self.target = making, folder, target
        columns = target.shape[1]
        making.size = lambda part: (part.last - part.first) * columns
        self.notes: list[str] = []

    @property
    def _asked(self) -> Summary:
        return self.making.job.asked

    def virtual(self) -> Summary:
        """Write HDF5 over the parts of a top-k or a dense matrix."""
        target = self.target
        told = (target.ids, target.ids_right, target.attributes)
        identity = dict(target.identity)
        if target.form == "top-k":
            identity["k"] = str(self._asked["top_k"])
            content = top_k_content((target.shape[0], self._asked["top_k"]), *told)
        else:
            content = dense_content(target.shape, *told)
        parts = row_parts(self.folder, self._asked, target.shape)
        self.making.all(parts, self.folder)
        identity = dict(sorted(identity.items()))
        write_virtual(target.path, content, identity, parts, overwrite=target.overwrite)
        self.folder.keep_only(parts)
        rows = sum(note["rows"] for note in self.making.notes if note.get("found"))
        found = {"k": self._asked["top_k"]} if target.form == "top-k" else {}
        return {**found, "resumed_from": rows, **self._about()}

    def consolidated(self, left: Table, right: Table | None) -> Summary:
        """Write what a run without a cluster writes."""
        if self.target.form == "histogram":
            return self._histogram(left, right)
        pairs: list[PairsOfParts] = []

        def from_row(rows: np.ndarray, right_rows: np.ndarray | None, start: int) -> Any:
            shape = len(rows), len(rows if right_rows is None else right_rows)
            pairs.append(PairsOfParts(self.making, self.folder, shape, right_rows is None, start))
            return pairs[-1]

        others = None if right is None else right.rows
        isolated = (left.isolated, left.isolated if right is None else right.isolated)

        def remaining(start: int) -> Any:
            self.making.progress(start * self.target.shape[1])
            if all(mask is None for mask in isolated):
                return from_row(left.rows, others, start)
            return PairsWithoutIsolated(from_row, left.rows, others, isolated, start)

        if self.target.form == "top-k":
            found = self.target.top_k(remaining, self._asked["top_k"])
        elif self.target.form == "threshold":
            found = self.target.threshold(remaining, self._asked["threshold"])
        else:
            found = self.target.dense(remaining)
        self.folder.remove()
        return {**found, **self._about()}

    def _histogram(self, left: Table, right: Table | None) -> Summary:
        counts = [
            len(table.rows) - (0 if table.isolated is None else int(table.isolated.sum()))
            for table in (left, right or left)
        ]
        counted = PartsHistogram(self.making, (counts[0], counts[1]))
        found = self.target.histogram(lambda start: counted, self._asked["bins"])
        self.folder.remove()
        return {**found, **self._about()}

    def _about(self) -> Summary:
        scans = {note.get("scan") for note in self.making.notes}
        found: Summary = {"threads": self.making.job.threads or 1, "triangle": False}
        found["scan"] = scans.pop() if len(scans) == 1 else None
        excluded = [note["excluded"] for note in self.making.notes if "excluded" in note]
        told = (sentence for note in self.making.notes for sentence in note.get("sentences", []))
        self.notes = list(dict.fromkeys(told))
        return {**found, **({"excluded": excluded[0]} if excluded else {})}


def row_parts(folder: PartsFolder, asked: Summary, shape: tuple[int, int]) -> list[Part]:
    """The parts of a top-k, a dense or a two-table threshold matrix, of whole blocks."""
    wanted, together, least = rows_a_part(*shape), 1, -(-shape[0] // MOST_PARTS)
    if asked["form"] == "top-k":
        wanted = max(wanted, least)
        together = top_k_content((1, asked["top_k"])).block_rows
    elif asked["form"] == "dense":
        fitting = max(1, DENSE_BYTES // max(1, 4 * shape[1]))
        wanted = max(min(fitting, -(-shape[0] // FEW_PARTS)), least)
        together = dense_content((1, shape[1])).block_rows
    return cut(folder, shape[0], max(1, -(-wanted // together)) * together)


class PairsOfParts:
    """All pairs from a left row on, as workers walk them: what `RemainingPairs` is elsewhere.

    Parameters
    ----------
    making : has parts made.
    folder : where.
    shape : rows of the left and of the right table, isolated ones left out.
    one_table : whether they are one.
    start : the first left row that is wanted.
    """

    def __init__(
        self,
        making: Making,
        folder: PartsFolder,
        shape: tuple[int, int],
        one_table: bool,
        start: int,
    ) -> None:
        self.making, self.folder, self.shape = making, folder, shape
        self.one_table, self.start = one_table, start

    @property
    def about(self) -> Summary:
        """How it was walked; `_Joining` knows it better."""
        return {"threads": 0, "scan": None, "triangle": False}

    def _blocks(self, columns: list[str]) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Yield (first row, arrays) of rows from `start` on, in order; parts go as they come."""
        parts = row_parts(self.folder, self.making.job.asked, self.shape)
        for part in self.making.in_order([part for part in parts if part.last > self.start]):
            row = part.first
            for arrays in self.making.blocks(part, columns):
                begin, row = row, row + len(arrays[0])
                if row > self.start:
                    skipped = max(0, self.start - begin)
                    yield begin + skipped, [array[skipped:] for array in arrays]
            self.folder.drop(part)

    def top_k(self, k: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield the k best of each left row, as `fastpair.matrix.AllPairs.top_k`."""
        for first, (indices, scores) in self._blocks(["indices", "scores"]):
            yield first, scores, indices

    def dense(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the scores of every pair, as `fastpair.matrix.AllPairs.dense`."""
        for first, (scores,) in self._blocks(["matrix"]):
            yield first, scores

    def above(self, threshold: float) -> Iterator[Any]:
        """Yield every pair from `threshold` on, as `fastpair.matrix.AllPairs.above`."""
        if self.one_table:
            yield from self._above_squares()
            return
        parts = row_parts(self.folder, self.making.job.asked, self.shape)
        for part in self.making.in_order([part for part in parts if part.last > self.start]):
            yield from self._by_row([(part, False)], part.first, part.last)
            self.folder.drop(part)

    def _above_squares(self) -> Iterator[Any]:
        """The same of one table: a row's pairs lie in the squares of its block, either way."""
        squares = Squares(self.shape[0])
        rows = [block for block in range(squares.blocks) if squares.rows(block)[1] > self.start]
        wanted = [n for n in range(squares.count) if squares.place(n)[1] in rows]
        self.making.told = lambda part: squares.told(part.first)  # type: ignore[method-assign]
        self.making.size = lambda part: squares.pairs(part.first)
        made = {n: self.folder.part(n, n + 1) for n in wanted}
        coming, there = self.making.in_order(list(made.values())), -1
        for block in rows:
            last = squares.number(block, squares.blocks - 1)
            while there < last:
                there = next(coming).first
            across = [  # those before this block were found as (other, block): the same pairs
                (made[squares.number(min(block, other), max(block, other))], other < block)
                for other in range(squares.blocks)
            ]
            yield from self._by_row(across, *squares.rows(block))
        for _ in coming:
            pass

    def _by_row(self, parts: list[tuple[Part, bool]], first: int, last: int) -> Iterator[Any]:
        """Yield the hits of rows in their order, from `start` on, as many rows as may be held.

        Parts are read once for each group of rows; those with True have rows and columns the other
        way round.
        """
        from fastpair.matrix import pairs_by_row

        first = max(first, self.start)
        groups = max(1, -(-sum(_hits_in(part) for part, _ in parts) // HITS_AT_ONCE))
        step = max(1, -(-(last - first) // groups))
        for begin in range(first, last, step):
            end = min(begin + step, last)
            hits = [hits for part, turned in parts for hits in self._hits(part, turned, begin, end)]
            hits.append((np.empty(0, "<i8"), np.empty(0, "<i8"), np.empty(0, "<f4")))
            yield begin, *pairs_by_row(hits, begin, end - begin)

    def _hits(self, part: Part, turned: bool, begin: int, end: int) -> Iterator[Any]:
        """Yield rows, columns and scores of the hits of some rows in a part."""
        for rows, columns, scores in self.making.blocks(part, [column.name for column in HITS]):
            if turned:
                rows, columns = columns, rows
            wanted = (rows >= begin) & (rows < end)
            yield rows[wanted], columns[wanted], scores[wanted]


class Squares:
    """The triangle of one table, cut into squares of blocks of rows, numbered row by row.

    Parameters
    ----------
    count : rows of the table.
    """

    def __init__(self, count: int) -> None:
        self._rows = count
        self.size = min(MOST_SQUARE, max(LEAST_SQUARE, -(-count // SQUARES)))
        self.blocks = -(-count // self.size)
        self.count = self.blocks * (self.blocks + 1) // 2

    def number(self, row: int, column: int) -> int:
        """The square of a row block and a column block, row <= column."""
        return row * self.blocks - row * (row - 1) // 2 + column - row

    def place(self, number: int) -> tuple[int, int]:
        """The row block and the column block of a square."""
        row = 0
        while number >= self.blocks - row:
            number -= self.blocks - row
            row += 1
        return row, row + number

    def rows(self, block: int) -> tuple[int, int]:
        """First and last row of a block."""
        return block * self.size, min((block + 1) * self.size, self._rows)

    def pairs(self, number: int) -> int:
        """Pairs that a square answers for, each in both directions."""
        row, column = ((last - first) for first, last in map(self.rows, self.place(number)))
        return row * column * (1 if self.place(number)[0] == self.place(number)[1] else 2)

    def told(self, number: int) -> str:
        """What a square is of, for messages."""
        (first, last), (low, high) = map(self.rows, self.place(number))
        return f"rows {first} to {last - 1} and {low} to {high - 1}"


class PartsHistogram:
    """How scores are spread, counted by workers: what `RemainingPairs` is elsewhere.

    Parameters
    ----------
    making : has tasks done.
    shape : rows of the left and of the right table, isolated ones left out.
    """

    def __init__(self, making: Making, shape: tuple[int, int]) -> None:
        self.making, self.shape = making, shape

    @property
    def about(self) -> Summary:
        """How it was walked; `_Joining` knows it better."""
        return {"threads": 0, "scan": None, "triangle": False}

    def histogram(self, bins: int) -> tuple[np.ndarray, np.ndarray]:
        """Count all scores, as `fastpair.matrix.AllPairs.histogram`: extremes first, then bins."""
        job, step = self.making.job, rows_a_part(*self.shape)
        ranges = [
            (first, min(first + step, self.shape[0])) for first in range(0, self.shape[0], step)
        ]

        def told(number: int) -> str:
            return f"rows {ranges[number][0]} to {ranges[number][1] - 1}"

        def results(task: Callable[..., Summary], *more: Any) -> Iterator[Summary]:
            calls = [(job, rows, *more) for rows in ranges]
            for number, found in self.making.cluster.results(task, calls, told):
                first, last = ranges[number]
                self.making.progress((last - first) * self.shape[1])
                self.making.notes.append(found)
                yield found

        ends = [(found["least"], found["greatest"]) for found in results(extremes_of_rows)]
        least, greatest = min(low for low, _ in ends), max(high for _, high in ends)
        counts, edges = np.zeros(bins, np.int64), np.empty(0, np.float32)
        for found in results(count_rows, least, greatest):
            counts += np.array(found["counts"], np.int64)
            edges = np.array(found["edges"], np.float32)
        return edges, counts


# --- what runs in a worker ------------------------------------------------------------------------


def matrix_part(job: Job, part: Part) -> Told:
    """Walk the pairs of a part into its file, if they are not there; return its note."""
    return found_or_made(part, lambda attempt: opened_once(job, _Walking).write(attempt, part))


def extremes_of_rows(job: Job, rows: tuple[int, int]) -> Summary:
    """Return the least and the greatest raw score of the pairs of some left rows."""
    walk = opened_once(job, _Walking).whole()
    least, greatest = walk.ends(rows=rows)
    return {"least": least, "greatest": greatest, "scan": walk.scan}


def count_rows(job: Job, rows: tuple[int, int], least: float, greatest: float) -> Summary:
    """Return the edges of a histogram, and the counts of the pairs of some left rows."""
    walk = opened_once(job, _Walking).whole()
    edges = walk.edges((least, greatest), job.asked["bins"])
    counts = walk.count(edges, (least, greatest), rows=rows)
    return {"edges": edges.tolist(), "counts": counts.tolist(), "scan": walk.scan}


class _Walking:
    """What a worker process has opened to walk pairs; isolated rows are left out from the start."""

    def __init__(self, job: Job) -> None:
        asked, budget = job.asked, job.budget
        left, right, room = load_tables(asked["table"], asked["against"], budget, either_way=True)
        self.choice = pick(job.own_device)
        job.check(_identity(asked, left, right, self.choice.kind))
        if "products" in job.more:
            check_matrix_products(job.more["products"])
        if room < LEAST_MEMORY:
            raise MemoryBudgetError(
                f"--memory leaves a worker {room} bytes beside the tables, but all pairs need at "
                f"least {LEAST_MEMORY}: allow more, or fewer workers"
            )
        self.job, self.plan, self.told = job, left.plan, _told_of(asked, left, right, room)
        excluded = self.told.pop("exclusions", None)
        masks = [left.isolated, None if right is None else right.isolated]
        self.left = _without(left.rows, masks[0])
        self.right = None if right is None else _without(right.rows, masks[1])
        if not len(self.left) or (self.right is not None and not len(self.right)):
            raise DataError("no embedding of a table is finite; there is no pair to score.")
        if excluded is not None:
            room = max(LEAST_MEMORY, room - excluded.keys.nbytes)
            kept = [None if mask is None else ~mask for mask in masks]
            excluded = excluded.among_kept((kept[0], kept[0] if right is None else kept[1]))
        self.excluded, self.room = excluded, room
        self.on_device = device_bytes("auto", job.device_memory)

    def walk(self, rows: np.ndarray, right_rows: np.ndarray | None, room: int) -> Any:
        """What walks rows against others (None: among themselves) within so many bytes."""
        options: Summary = {"threads": self.job.own_threads, "memory": room, "progress": ignore}
        return all_pairs_on(self.choice, rows, right_rows, self.plan, self.on_device, **options)

    def whole(self) -> Any:
        """What walks all rows."""
        return self.walk(self.left, self.right, self.room)

    def write(self, attempt: Path, part: Part) -> Told:
        """Walk the pairs of a part into a file; return what is told of it."""
        identity = {"run": part.run, "rows": f"{part.first} to {part.last - 1}"}
        form = self.job.asked["form"]
        make = {"top-k": self._top_k, "dense": self._dense, "threshold": self._above}[form]
        scan = make(attempt, part, identity)
        return {"rows": part.last - part.first, "scan": scan, **self.told}

    def _top_k(self, attempt: Path, part: Part, identity: dict[str, str]) -> str | None:
        from fastpair.exclusions import Exclusions, PairsWithoutExcluded

        k, rows = self.job.asked["top_k"], (part.first, part.last)
        excluded = self.excluded
        walk: Any
        best: Iterator[Any]
        if excluded is None and self.right is None:  # nobody is among his own best
            own = np.arange(len(self.left))
            excluded = Exclusions(own, own, (len(own), len(own)))
        every = self.left if self.right is None else self.right
        if excluded is None:
            walk = self.walk(self.left[slice(*rows)], every, self.room)
            best = ((rows[0] + first, *found) for first, *found in walk.top_k(k))
        else:
            left = self.left[: rows[1]]
            walk = PairsWithoutExcluded(self.walk, left, every, excluded, self.room, rows[0])
            best = walk.top_k(k)
        with TopKWriter(attempt, (rows[1] - rows[0], k), identity) as file:
            for _, scores, indices in best:
                file.append(indices, scores)
            file.finish()
        return walk.about["scan"] if excluded is not None else walk.scan

    def _dense(self, attempt: Path, part: Part, identity: dict[str, str]) -> str | None:
        walk = self.whole()
        columns = len(self.left if self.right is None else self.right)
        with DenseWriter(attempt, (part.last - part.first, columns), identity) as file:
            for _, scores in walk.dense(part.first, part.last):
                file.append(scores)
            file.finish()
        return walk.scan

    def _above(self, attempt: Path, part: Part, identity: dict[str, str]) -> str | None:
        if self.right is not None:
            first, low = part.first, 0
            walk = self.walk(self.left[part.first : part.last], self.right, self.room)
        else:
            squares = Squares(len(self.left))
            (first, last), (low, high) = map(squares.rows, squares.place(part.first))
            others = None if first == low else self.left[low:high]
            walk = self.walk(self.left[first:last], others, self.room)
        with open(attempt.with_name(attempt.name + ".hits"), "w+b") as found:
            for begin, counts, indices, scores in walk.above(self.job.asked["threshold"]):
                hits = np.empty(len(scores), _HIT)
                hits["rows"] = first + begin + np.repeat(np.arange(len(counts)), counts)
                hits["indices"], hits["data"] = indices + low, scores
                hits.tofile(found)
            count = found.tell() // _HIT.itemsize
            found.seek(0)
            content = Content("matrix", count, HITS, fitting_rows(HITS), {"form": "hits"})
            write_rows(attempt, content, identity, _read_hits(found))
        return walk.scan


_HIT = np.dtype([(column.name, column.dtype) for column in HITS])


def _read_hits(file: Any) -> Iterator[list[np.ndarray]]:
    """Yield the columns of hits in a file, some at a time."""
    while len(hits := np.fromfile(file, _HIT, HITS_AT_ONCE)):
        yield [np.ascontiguousarray(hits[column.name]) for column in HITS]


def _hits_in(part: Part) -> int:
    part.await_sight()
    with open_hdf5(part.path) as file:
        return len(file["rows"])


def _told_of(asked: Summary, left: Table, right: Table | None, room: int) -> Told:
    """Read the pairs to leave out, and what the reader is to know of them."""
    if asked["exclude"] is None:
        return {}
    from fastpair.exclusions import read_exclusions

    named = {name: asked[name] for name in ("left_column", "right_column", "keys")}
    excluded, notes = read_exclusions(
        asked["exclude"], left, right, room, options=asked["reading"], **named
    )
    return {"excluded": len(excluded.keys), "sentences": notes, "exclusions": excluded}


def _without(rows: np.ndarray, isolated: np.ndarray | None) -> np.ndarray:
    return rows if isolated is None else pack_rows(rows, np.flatnonzero(~isolated))
