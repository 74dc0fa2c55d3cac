"""`score` on a cluster: workers score ranges of the pair file, each of whole score blocks.

HDF5 becomes a file over the parts (`fastpair.joining`), Parquet a folder of files that workers
write themselves, with the keys. With `--consolidate`, and for text, compressed and filtered
outputs, which have to be one file, scores are brought into the file that a run without a cluster
stages, and it is finished by the same code: its bytes are the same, and either kind of run goes on
with what the other left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fastpair.blocks import Column, Content
from fastpair.device import pick
from fastpair.distributed import as_cluster
from fastpair.errors import DataError
from fastpair.jobs.inputs import Count, Summary, device_bytes, file_time, prepare_kernels
from fastpair.jobs.on_cluster import (
    MOST_PARTS,
    GoingOn,
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
from fastpair.jobs.scoring import (
    COLUMNS_BY_UNIT,
    MEAN_NOTE,
    Finishing,
    Opened,
    check_room,
    open_scoring,
    pair_scorer,
)
from fastpair.joining import write_virtual
from fastpair.listing import export_format, write_scored_pairs
from fastpair.pairs import PairBlock
from fastpair.parts import Part, PartsFolder, Told
from fastpair.results import SCORE_BLOCK, ScoreFile

FEW_PARTS, MANY_PARTS, MOST_BLOCKS = 16, MOST_PARTS, 8
"""A job has at least so many parts where it has the blocks, parts are of at most so many blocks,
and there are at most so many parts, whatever that makes of their size."""

LISTED_BLOCK = SCORE_BLOCK // 8
"""Pairs that are scored together where their keys are held beside them."""


def blocks_a_part(blocks: int) -> int:
    """Score blocks of a part: it depends on the job alone, so that any cluster may resume."""
    return max(1, min(MOST_BLOCKS, blocks // FEW_PARTS), -(-blocks // MANY_PARTS))


@dataclass
class _Asked:
    """The options of an output, and what they make of it."""

    output: Path
    min_score: float | None
    compression: str | None
    consolidate: bool
    overwrite: bool
    resume: bool

    @property
    def folder(self) -> bool:
        """Whether workers write Parquet files."""
        return export_format(self.output) == ".parquet" and not self.consolidate

    @property
    def virtual(self) -> bool:
        """Whether the output is a file over parts."""
        plain = export_format(self.output) is None and self.compression is None
        return plain and self.min_score is None and not self.consolidate

    @property
    def again(self) -> Summary:
        """Whether what is there goes, or is gone on with."""
        return {"overwrite": self.overwrite, "resume": self.resume}


def score_on_cluster(
    given: Any,
    asked: Summary,
    output: Path,
    progress: Count,
    expect: Callable[[int | None], None] | None,
    *,
    min_score: float | None,
    compression: str | None,
    consolidate: bool,
    overwrite: bool,
    resume: bool,
    device: str,
    **limits: Any,
) -> Summary:
    """Score on a cluster; parameters and summary are those of `fastpair.jobs.score`."""
    begun, cluster = time.perf_counter(), as_cluster(given)
    kind = kind_of_device(device, limits["device_memory"])
    asked = shared_paths(asked, "table", "pairs", "against")
    form = _Asked(output, min_score, compression, consolidate, overwrite, resume)
    opened = open_scoring(**asked, rows="none")
    count, identity = opened.source.count, opened.identity(kind)
    watched = {"time of the pair file": file_time(opened.source.path)}
    listed = {"listed": f"parquet, from {min_score}"} if form.folder else {}
    facts = {"software": software(), **identity, **watched, **listed}
    if form.virtual or form.folder:
        refuse_partial(output, overwrite)
    if expect is not None:
        expect(count)
    more: Summary = {"listed": form.folder, "min_score": min_score}
    if opened.left.plan.network is not None:
        more["products"] = matrix_products()
    stands = (form.virtual or form.folder) and not cluster.local
    with PartsFolder(output, facts, flushed=stands, **form.again) as folder:
        limits |= {"run": folder.run, "device": kind, "more": more}
        job = job_for(cluster, asked, identity, **limits)
        making = Making(cluster, job, score_part, "pairs", progress)
        try:
            kept, resumed = _bring_together(making, folder, opened, form, watched)
        except DataError:
            folder.give_up()  # no resume can mend the pair file
            raise
        finally:
            making.forget()
    forget_unfinished(output)
    seconds = time.perf_counter() - begun
    return {
        "output": str(output),
        "pairs": count,
        "kept": kept,
        "resumed_from": resumed,
        "seconds": seconds,
        "scoring_seconds": seconds,
        "pairs_per_second": (count - resumed) / max(seconds, 1e-9),
        "threads": making.job.own_threads,
        "workers": cluster.workers,
        "parts": len(making.notes),
        "device": kind,
        "device_note": "",
        "unit": opened.unit,
        "keys": opened.source.keys,
        **_told_of(making, opened),
    }


def _told_of(making: Making, opened: Opened) -> Summary:
    """What workers found odd: how many pairs have unknown ids, and sentences for the reader."""
    source = opened.source
    source.unknown_pairs = making.total("unknown")
    source.examples = next((n["examples"] for n in making.notes if n.get("examples")), "")
    strange, notes = making.total("strange"), [source.assumed, source.unknown_note()]
    if strange and opened.unknown == "mean":
        notes.append(MEAN_NOTE.format(strange))
    unknown = strange + source.unknown_pairs
    return {"unknown": unknown, "notes": [note for note in notes if note]}


def _bring_together(
    making: Making, folder: PartsFolder, opened: Opened, form: _Asked, watched: dict[str, str]
) -> tuple[int, int]:
    """Have parts made and make the output of them.

    Returns
    -------
    kept : the pairs that were written.
    resumed : those that had been scored before.
    """
    count = opened.source.count
    step = SCORE_BLOCK * blocks_a_part(-(-count // SCORE_BLOCK))
    if form.folder:
        parts = cut(folder, count, step, ".parquet")
        making.all(parts, folder)
        kept, resumed = making.total("kept"), _found_pairs(making)
        folder.become(form.output, parts, overwrite=form.overwrite)
        return kept, resumed
    parts = cut(folder, count, step)
    if form.virtual:
        making.all(parts, folder)
        content = score_content(count, opened.attributes())
        identity = dict(sorted(making.job.identity.items()))
        write_virtual(form.output, content, identity, parts, overwrite=form.overwrite)
        folder.keep_only(parts)
        return count, _found_pairs(making)
    with ScoreFile(
        form.output,
        count,
        making.job.identity,
        watched=watched,
        attributes=opened.attributes(),
        **form.again,
    ) as file:
        done = int(file.done.sum()) * SCORE_BLOCK
        try:
            _fill(file, making, folder, parts)
        except DataError:
            file.discard()
            raise
        resumed = min(done, count) + _found_pairs(making)
        kept = _finish(file, opened, form)
    folder.remove()
    return kept, resumed


def score_content(count: int, attributes: Summary) -> Content:
    """What a file of scores is."""
    return Content("scores", count, [Column("score", "<f4")], SCORE_BLOCK, attributes)


def _found_pairs(making: Making) -> int:
    return sum(int(note["pairs"]) for note in making.notes if note.get("found"))


def _fill(file: ScoreFile, making: Making, folder: PartsFolder, parts: list[Part]) -> None:
    """Bring the blocks that are not done into a file; parts go as they come."""
    wanted = []
    for part in parts:
        blocks = slice(part.first // SCORE_BLOCK, -(-part.last // SCORE_BLOCK))
        if file.done[blocks].all():
            making.progress(part.last - part.first)
        else:
            wanted.append(part)
    for part in making.in_order(wanted):
        first = part.first // SCORE_BLOCK
        for number, (scores,) in enumerate(making.blocks(part, ["score"]), first):
            if not file.done[number]:
                file.write_block(number, scores)
        folder.drop(part)


def _finish(file: ScoreFile, opened: Opened, form: _Asked) -> int:
    """Make of staged scores what was asked for, as a run without a cluster does."""
    finishing = Finishing(
        file,
        opened.source,
        form.output,
        form.min_score,
        form.compression,
        form.overwrite,
        (opened.left.count, opened.both.count),
    )
    return finishing.hdf5() if export_format(form.output) is None else finishing.listed()


# --- what runs in a worker ------------------------------------------------------------------------


def score_part(job: Job, part: Part) -> Told:
    """Score the pairs of a range into a part file, if they are not there; return its note."""
    return found_or_made(part, lambda attempt: opened_once(job, _Scoring).write(attempt, part))


class _Scoring:
    """What a worker process has opened to score a job; tasks of several threads share it."""

    def __init__(self, job: Job) -> None:
        prepare_kernels()
        self.opened = open_scoring(**job.asked, memory=job.budget)
        choice = pick(job.own_device)
        job.check(self.opened.identity(choice.kind))
        if "products" in job.more:
            check_matrix_products(job.more["products"])
        self.job, source = job, self.opened.source
        room = check_room(self.opened.tables.budget, source, job.own_threads, len(choice.runtimes))
        on_device = device_bytes("auto", job.device_memory)
        self.scorer = pair_scorer(
            choice, self.opened.left, self.opened.right, job.own_threads, on_device, room
        )
        self._going_on: GoingOn | None = None

    def write(self, attempt: Path, part: Part) -> Told:
        """Score the pairs of a part into a file; return what is told of it."""
        told = {"pairs": part.last - part.first, "kept": 0, "strange": 0, "unknown": 0}
        if self.job.more["listed"]:
            self._list(attempt, part, told)
        else:
            self._store(attempt, part, told)
        examples = {"examples": self.opened.source.examples} if told["unknown"] else {}
        return {**told, **examples}

    def _store(self, attempt: Path, part: Part, told: Told) -> None:
        count = part.last - part.first
        identity = {"run": part.run, "pairs": f"{part.first} to {part.last - 1}"}
        attributes = self.opened.attributes()
        with ScoreFile(attempt, count, identity, attributes=attributes) as file:
            for number, (_, values) in enumerate(self._scored(part, SCORE_BLOCK, False, told)):
                file.write_block(number, values)
            file.finish()

    def _list(self, attempt: Path, part: Part, told: Told) -> None:
        """Write pairs and scores as Parquet."""
        least, names = self.job.more["min_score"], self.opened.source.names
        unit = self.opened.unit

        def rows() -> Iterator[Any]:
            for block, values in self._scored(part, LISTED_BLOCK, True, told):
                kept = np.arange(len(values))
                if least is not None:
                    kept = np.flatnonzero(values.astype(np.float64) >= least)
                if block.left_keys is not None and block.right_keys is not None:
                    yield block.left_keys.take(kept), block.right_keys.take(kept), values[kept]

        score = unit if unit in COLUMNS_BY_UNIT else "score"
        told["kept"] = write_scored_pairs(attempt, rows(), names=names, score=score)

    def _scored(
        self, part: Part, size: int, keep_keys: bool, told: Told
    ) -> Iterator[tuple[PairBlock, np.ndarray]]:
        """Yield the blocks of a part and what is written of them; count what is odd."""
        blocks = self._blocks(part, size, keep_keys)
        for block, scores in self.scorer.stream(blocks):
            told["strange"] += self.opened.strange(block)
            told["unknown"] += 0 if block.unknown is None else int(block.unknown.sum())
            yield block, self.opened.values(block, scores)

    def _blocks(self, part: Part, size: int, keep_keys: bool) -> Iterator[PairBlock]:
        """The blocks of a part; text, which begins at its beginning, goes on where it was left."""

        def blocks(start: int) -> Iterator[PairBlock]:
            threads = self.job.own_threads
            return self.opened.source.blocks(size, start, keep_keys=keep_keys, threads=threads)

        if not self.opened.source.in_order:
            return islice(blocks(part.first), -(-(part.last - part.first) // size))
        if self._going_on is None:
            self._going_on = GoingOn(blocks, size)
        return self._going_on.read(part.first, part.last)
