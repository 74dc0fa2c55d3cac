"""`score`: a pair file in, its scores out."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastpair.backend import LEAST_MEMORY, thread_count
from fastpair.blockwise import BlockwiseScorer
from fastpair.buckets import check_buckets, discard_buckets
from fastpair.compression import check_filter, write_compressed
from fastpair.device import Choice, pick
from fastpair.errors import ArgumentError, DataError, MemoryBudgetError
from fastpair.files import Table
from fastpair.formats import AS_FOUND, ReadOptions
from fastpair.jobs.by_blocks import Tables, read_or_leave, run_identity, scoring_plan
from fastpair.jobs.inputs import (
    LINKS_BY_DEVICE,
    Count,
    Summary,
    device_bytes,
    digest_of_kernels,
    expect_hdf5,
    file_fingerprint,
    file_time,
    ignore,
    load_tables,
    parts_left,
    prepare_kernels,
    table_sizes,
)
from fastpair.listing import export_format, write_scored_pairs
from fastpair.model import sigmoid
from fastpair.pairs import PairBlock, PairSource, open_pairs
from fastpair.results import (
    SCORE_BLOCK,
    ScoreFile,
    write_filtered_scores,
)
from fastpair.scoring import PairScorer, distance_form
from fastpair.spooling import is_stream, received
from fastpair.staging import check_output

if TYPE_CHECKING:
    from fastpair.gpu_scoring import GpuPairScorer

EXPORTED_AT_ONCE = SCORE_BLOCK // 8
"""Pairs whose keys are held while scores are written as CSV or Parquet."""

BLOCKS_UNDER_WAY = 4
"""Blocks of pairs in memory at once: one read, one waiting, one scored, one written."""

BLOCKS_A_GPU = 6
"""Blocks more for each GPU: three under way, and as many page-locked copies."""


def score(
    table: Path,
    pairs: Path,
    output: Path,
    *,
    against: Path | None = None,
    probability: bool = False,
    decision: bool = False,
    distance: bool = False,
    min_score: float | None = None,
    left_column: str | None = None,
    right_column: str | None = None,
    keys: str = "auto",
    dataset: str | None = None,
    reading: ReadOptions = AS_FOUND,
    unknown: str | None = None,
    threads: int | None = None,
    memory: str | int | None = None,
    compression: str | None = None,
    device: str = "auto",
    device_memory: str | int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    plan: bool = False,
    cluster: Any = None,
    consolidate: bool = False,
    progress: Count = ignore,
    expect: Callable[[int | None], None] | None = None,
) -> Summary:
    """Score the pairs of a file and write the scores in its order.

    Parameters
    ----------
    table : table of the left entities, and of the right ones unless `against` is given.
    pairs : file of any accepted format.
    output : ``.h5`` / ``.hdf5``, ``.parquet``, ``.csv`` or ``.tsv`` (also ``.gz`` and ``.zst``).
    probability : write probabilities of being good in place of scores.
    decision : write 1 for pairs that score at least the model's threshold and 0 for others.
    distance : write distances, for models that are minus a distance; see `distance_form`.
    min_score : keep only pairs of at least this, in what is written; default: all.
    reading : what the pair file does not say itself.
    unknown : "refuse" unknown ids, write "nan" as the scores of their pairs, or "mean": they score
        as the mean of their side, which tables of a model that learned ids have; default: "mean"
        for such tables, "refuse" for others.
    memory : what may be allocated, the tables included.
    compression : name of a filter for an HDF5 output; see `fastpair.compression.FILTERS`.
    device : "auto", "cpu", "gpu", "gpu:1" or "gpu:0,1"; see `fastpair.device.pick`.
    device_memory : what may be allocated on each GPU; default 90 % of what is free there.
    resume : go on with what an interrupted run left. It may go on with another device: a pair has
        the same bits on all of them, except under the links exponential and negative_arcosh, whose
        library functions differ; there the kind of device is part of what a run is.
    plan : return what the run would do, see `fastpair.jobs.by_blocks.scoring_plan`; nothing is
        scored or written.
    cluster : a ``distributed.Client``, or what `fastpair.distributed.connected` gives: its workers
        score, `threads` and `memory` are those of each task; see `fastpair.jobs.cluster_scoring`.
    consolidate : write one file, equal to that of a run without a cluster, byte for byte; default:
        HDF5 over part files beside it, and for ``.parquet`` a folder of files.

    Returns
    -------
    summary : with ``device``, such as "cpu" or "gpu:0", and ``device_note``, why it was chosen;
        empty where it was asked for.

    Raises
    ------
    FastpairError : anything that cannot be used; an existing output is left as it was.
    """
    if min_score is not None and not np.isfinite(min_score):
        raise ArgumentError(f"min_score is {min_score}, expected a finite number")
    if min_score is not None and distance:
        raise ArgumentError(
            "--min-score keeps high scores, but a --distance is small for good pairs"
        )
    output = Path(output)
    suffix = export_format(output)
    if suffix is None:
        expect_hdf5(output)
    if compression is not None:
        check_filter(compression)
        if suffix is not None:
            raise ArgumentError(f"--compression {compression} is for HDF5, and {output} is none")
    inputs = [Path(path) for path in (table, pairs, against) if path is not None]
    check_output(output, overwrite=overwrite, inputs=inputs)
    check_buckets(output, inputs, resume=resume, overwrite=overwrite or plan)
    if consolidate and cluster is None:
        raise ArgumentError("--consolidate goes with --scheduler or --workers")
    if plan and cluster is not None:
        raise ArgumentError("--plan is of a run on this machine: leave out --scheduler, --workers")
    if resume and is_stream(Path(pairs)):
        raise ArgumentError(f"--resume needs a pair file, but {pairs} can be read only once")
    asked: Summary = {
        "table": table,
        "pairs": pairs,
        "against": against,
        "probability": probability,
        "decision": decision,
        "distance": distance,
        "left_column": left_column,
        "right_column": right_column,
        "keys": keys,
        "dataset": dataset,
        "reading": reading,
        "unknown": unknown,
    }
    if cluster is not None:
        from fastpair.jobs.cluster_scoring import score_on_cluster

        options: Summary = {"threads": threads, "memory": memory, "device": device}
        options |= {"device_memory": device_memory, "resume": resume, "overwrite": overwrite}
        options |= {"min_score": min_score, "compression": compression, "consolidate": consolidate}
        return score_on_cluster(cluster, asked, output, progress, expect, **options)
    on_device = device_bytes(device, device_memory)
    begun = time.perf_counter()
    asked["pairs"] = pairs = received(pairs)
    preparing = threading.Thread(target=prepare_kernels, name="fastpair-prepare")
    preparing.start()  # takes the interpreter half a second, in which tables are read
    opened = open_scoring(**asked, memory=memory, device=device, rows="file" if plan else "either")
    source = opened.source
    if plan:
        again = suffix is not None or min_score is not None
        return scoring_plan(opened.tables, source, memory, threads, device, again=again)
    choice = Choice() if opened.tables.stored else pick(device, pairs=source.count)
    counted = thread_count(threads), len(choice.runtimes)
    short = bytes_beside(source, *counted) > opened.tables.budget
    if opened.tables.stored is None and short and device in ("auto", "cpu"):
        opened, choice = opened.without_rows(memory), Choice()  # the tables alone would fit
    room = opened.tables.budget
    if opened.tables.stored is None:
        room = check_room(room, source, *counted)
    left, right, both = opened.left, opened.right, opened.both
    if expect is not None:
        expect(source.count)
    scorer: PairScorer | GpuPairScorer | BlockwiseScorer
    if opened.tables.stored is not None:
        scorer = BlockwiseScorer(opened.tables.stored, memory=room, threads=threads)
    else:
        scorer = pair_scorer(choice, left, right, threads, on_device, room)
    identity, attributes = opened.identity(choice.kind), opened.attributes()
    scoring_begun = time.perf_counter()
    with ScoreFile(
        output,
        source.count,
        identity,
        watched={"time of the pair file": file_time(pairs)},
        attributes=attributes,
        overwrite=overwrite,
        resume=resume,
    ) as file:
        try:
            if isinstance(scorer, BlockwiseScorer):
                run: Summary = {"output": output, "identity": run_identity(file), "resume": resume}
                resumed, strange, told = scorer.fill(
                    file,
                    source,
                    opened.written,
                    progress=progress,
                    isolated=opened.isolated,
                    unknown_rows=opened.unknown_rows,
                    **run,
                )
            else:
                discard_buckets(output)  # of a run that began with less memory
                resumed, strange = _score_blocks(file, opened, scorer, progress)
                told = {}
        except DataError:
            file.discard()  # no resume can mend the pair file
            raise
        except MemoryBudgetError:
            if not file.done.any():
                file.discard()  # there is nothing yet to go on with
            raise
        scoring_seconds = time.perf_counter() - scoring_begun
        notes = [source.assumed, source.unknown_note(), choice.told]
        notes += parts_left(output, resume, resumed)
        strange += source.unknown_pairs
        counts = (left.count, both.count)
        finishing = Finishing(file, source, output, min_score, compression, overwrite, counts)
        kept = finishing.listed() if suffix is not None else finishing.hdf5()
    if strange and opened.unknown == "mean":
        notes.append(MEAN_NOTE.format(strange))
    return {
        "work": "score",
        "output": str(output),
        **table_sizes(left, right),
        "pairs": source.count,
        "kept": kept,
        "resumed_from": resumed,
        "seconds": time.perf_counter() - begun,
        "scoring_seconds": scoring_seconds,
        "pairs_per_second": (source.count - resumed) / max(scoring_seconds, 1e-9),
        "threads": scorer.threads,
        "device": choice.name,
        "device_note": choice.note,
        "unit": opened.unit,
        "keys": source.keys,
        "unknown": strange,
        **({"by_blocks": told} if told else {}),
        "notes": [note for note in notes if note],
    }


MEAN_NOTE = "{} pairs have unknown ids, which score as the mean of their side"


@dataclass(frozen=True)
class Opened:
    """What a run scores.

    Parameters
    ----------
    tables : those of the two sides, in memory or in their files.
    source : the pairs.
    unknown, unknown_rows : what becomes of unknown ids, and the rows that stand for them.
    unit, written : what is written, and what turns scores (m,) float32 into it.
    asked : the options that say what the run is.
    """

    tables: Tables
    source: PairSource
    unknown: str
    unknown_rows: tuple[int | None, int | None]
    unit: str
    written: Callable[[np.ndarray], np.ndarray]
    asked: Summary

    @property
    def left(self) -> Table:
        """The table of the left entities."""
        return self.tables.left

    @property
    def right(self) -> Table | None:
        """The table of the right entities, None where it is the left one."""
        return self.tables.right

    @property
    def both(self) -> Table:
        """The table of the right entities."""
        return self.right or self.left

    @property
    def isolated(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The isolated rows of both sides."""
        return self.left.isolated, self.both.isolated

    def without_rows(self, memory: str | int | None) -> Opened:
        """The same, with the rows of the tables left in their files."""
        options: Summary = {"unknown": self.asked["unknown"] in (None, "mean"), "leave": True}
        tables = read_or_leave(self.asked["table"], self.asked["against"], memory, "cpu", **options)
        return replace(self, tables=tables)

    def identity(self, device: str) -> dict[str, str]:
        """What the run is made of, by name, on a kind of device."""
        source = self.source
        return {
            "table": self.left.digest,
            "right table": "the same" if self.right is None else self.right.digest,
            "pair file": file_fingerprint(source.path),
            "columns": f"{source.names[0]}, {source.names[1]}, {source.keys}",
            "unit": self.unit,
            "dataset": str(self.asked["dataset"]),
            "reading": f"{self.asked['reading']}, unknown: {self.unknown}",
            "kernels": digest_of_kernels(),
            "device": device if self.left.plan.link in LINKS_BY_DEVICE else "any",
        }

    def attributes(self) -> Summary:
        """The attributes of a file of its scores."""
        told: Summary = {
            "unit": self.unit,
            "model_fingerprint": self.left.fingerprint,
            "two_tables": self.right is not None,
        }
        return told | ({"threshold": self.left.threshold} if self.asked["decision"] else {})

    def values(self, block: PairBlock, scores: np.ndarray) -> np.ndarray:
        """What is written of the scores (m,) of a block: NaN where a key stands for nothing."""
        from fastpair.isolation import isolated_pairs

        values = self.written(scores)
        for spoiled in (block.unknown, isolated_pairs(block.left, block.right, self.isolated)):
            if spoiled is not None:
                values = np.where(spoiled, np.float32(np.nan), values)
        return values

    def strange(self, block: PairBlock) -> int:
        """How many pairs of a block have the row of an unknown id."""
        if self.unknown_rows == (None, None):
            return 0
        left, right = self.unknown_rows
        return int(np.sum((block.left == left) | (block.right == right)))


def open_scoring(
    *,
    rows: str = "memory",
    memory: str | int | None = None,
    device: str = "cpu",
    **asked: Any,
) -> Opened:
    """Open what a run scores.

    Parameters
    ----------
    rows : where those of the tables are to be: in "memory", in the "file", in "either" as they fit,
        or in "none", because others score them.
    memory, device : as `read_or_leave` takes them.
    asked : options of `score`.
    """
    table, against, unknown = asked["table"], asked["against"], asked["unknown"]
    options: Summary = {"unknown": unknown in (None, "mean")}
    if rows in ("memory", "none"):
        tables = Tables(
            *load_tables(table, against, memory, without_rows=rows == "none", **options)
        )
    else:
        tables = read_or_leave(table, against, memory, device, leave=rows == "file", **options)
    left, both = tables.left, tables.right or tables.left
    unknown, unknown_rows = _unknown_ids(unknown, left, both)
    forms = (asked["probability"], asked["decision"], asked["distance"])
    unit, written = _written_as(table, left, *forms)
    source = open_pairs(
        asked["pairs"],
        ids=left.ids,
        count=left.count,
        right_ids=both.ids,
        right_count=both.count,
        left_column=asked["left_column"],
        right_column=asked["right_column"],
        keys=asked["keys"],
        dataset=asked["dataset"],
        unknown="nan" if unknown == "nan" else "refuse",
        unknown_rows=unknown_rows,
        options=asked["reading"],
    )
    return Opened(tables, source, unknown, unknown_rows, unit, written, asked)


def _unknown_ids(
    unknown: str | None, left: Table, right: Table
) -> tuple[str, tuple[int | None, int | None]]:
    """Return what becomes of unknown ids, and the rows that stand for them."""
    if unknown not in (None, "refuse", "nan", "mean"):
        raise ArgumentError(f"unknown is {unknown!r}, but must be 'refuse', 'nan' or 'mean'")
    rows = left.unknown_row, right.unknown_row
    if None not in rows:
        return "mean", rows
    if unknown == "mean":
        raise ArgumentError(
            "--unknown mean is for tables of a model that learned ids: leave it out here"
        )
    return unknown or "refuse", (None, None)


def pair_scorer(
    choice: Choice,
    left: Table,
    right: Table | None,
    threads: int | None,
    device_memory: int | None,
    room: int,
) -> PairScorer | GpuPairScorer:
    """Return what scores pairs on the chosen device; on GPUs, `room` bytes may sort pairs."""
    rows = (
        left.rows,
        left.plan,
        None if right is None else right.rows,
        None if right is None else right.plan,
    )
    if not choice.runtimes:
        return PairScorer(*rows, threads=threads)
    from fastpair.gpu_scoring import GpuPairScorer

    return GpuPairScorer(
        *rows,
        devices=choice.runtimes,
        device_memory=device_memory,
        memory=max(LEAST_MEMORY, room),
        threads=threads,
    )


def _written_as(
    path: Path, table: Table, probability: bool, decision: bool, distance: bool
) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
    """Return the unit that is written and what turns scores (m,) float32 into it.

    Raises
    ------
    ArgumentError : several forms are asked for, or the model's scores have no such form.
    """
    if probability + decision + distance > 1:
        raise ArgumentError("choose one of --probability, --decision and --distance")
    if distance:
        form = distance_form(table.plan)
        if form is None:
            raise ArgumentError(
                f"the model {table.model_name!r} of {path} is no distance: use euclidean, "
                "manhattan, or a model trained with the head rbf or hyperbolic, or with sqdiff or "
                "absdiff and --no-density whose weights are all below 0"
            )
        return "distance", lambda scores: form(scores).astype(np.float32)
    threshold, calibration = table.threshold, table.calibration
    if decision:
        if threshold is None:
            raise ArgumentError(
                f"the model {table.model_name!r} of {path} has no threshold to decide by: use "
                "--min-score, or a model that was trained on good and bad pairs"
            )
        return "decision", lambda scores: (scores >= np.float64(threshold)).astype(np.float32)
    if not probability:
        return table.unit, lambda scores: scores
    if calibration is None and table.unit != "log-odds":
        raise ArgumentError(
            f"scores of {path} are of the unit {table.unit}, which has no probability: use a model "
            "that was trained on good and bad pairs"
        )
    curve = calibration or sigmoid
    return "probability", lambda scores: curve(scores.astype(np.float64)).astype(np.float32)


def score_forms(path: Path, table: Table) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    """Yield what turns a table's scores (m,) float32 into each graded form that they have."""
    for probability, distance in ((False, False), (True, False), (False, True)):
        with contextlib.suppress(ArgumentError):
            yield _written_as(path, table, probability, False, distance)[1]


def bytes_beside(source: PairSource, threads: int, gpus: int = 0) -> int:
    """Return the bytes that blocks of pairs need beside tables in memory."""
    # each GPU has three blocks in its buffers, and those of the next ones wait
    blocks = BLOCKS_UNDER_WAY + BLOCKS_A_GPU * gpus
    needed = min(source.count, SCORE_BLOCK) * (source.bytes_a_pair() + 4) * blocks
    return needed + source.reading_bytes(threads)


def check_room(budget: int, source: PairSource, threads: int, gpus: int = 0) -> int:
    """Return the bytes left beside the tables and blocks of pairs, or refuse the run."""
    needed = bytes_beside(source, threads, gpus)
    if needed > budget:
        raise MemoryBudgetError(
            f"blocks of pairs need {needed} bytes beside the tables, but --memory leaves {budget}: "
            f"allow {needed - budget} more"
        )
    return budget - needed


def _score_blocks(
    file: ScoreFile, opened: Opened, scorer: PairScorer | GpuPairScorer, progress: Count
) -> tuple[int, int]:
    """Score all blocks that are not done.

    Returns
    -------
    start : the pair at which that began.
    strange : pairs with the row of an unknown id among those that were scored.
    """
    source, undone, strange = opened.source, np.flatnonzero(~file.done), 0
    if not len(undone):
        progress(source.count)
        return source.count, 0
    start = int(undone[0]) * SCORE_BLOCK
    progress(start)
    blocks = source.blocks(SCORE_BLOCK, start, threads=scorer.threads)
    wanted = (block for block in blocks if not file.done[block.start // SCORE_BLOCK])
    for block, scores in scorer.stream(wanted):
        file.write_block(block.start // SCORE_BLOCK, opened.values(block, scores))
        strange += opened.strange(block)
        progress(len(scores))
    return start, strange


class Finishing:
    """Turns staged scores, all of which are done, into what was asked for.

    Parameters
    ----------
    file : the staged scores.
    source : the pairs, for their keys.
    output : the file to make.
    min_score : keep only pairs of at least this; None: all.
    compression : name of a filter, or None.
    overwrite : whether an existing file may be replaced.
    counts : rows of the left and of the right table; those beyond, of unknown ids, become -1.
    """

    def __init__(
        self,
        file: ScoreFile,
        source: PairSource,
        output: Path,
        min_score: float | None,
        compression: str | None,
        overwrite: bool,
        counts: tuple[int, int],
    ) -> None:
        self.counts = counts
        self.file, self.source, self.output = file, source, output
        self.min_score, self.compression, self.overwrite = min_score, compression, overwrite

    def hdf5(self) -> int:
        """Give the scores their name, or write those that are kept; return how many."""
        if self.min_score is not None:
            return self._filtered(self.min_score)
        if self.compression is None:
            self.file.finish()
        else:
            write_compressed(self.file, self.compression, overwrite=self.overwrite)
            self.file.discard()
        return self.source.count

    def _filtered(self, least: float) -> int:
        kept = sum(
            int(np.count_nonzero(self.file.scores(number).astype(np.float64) >= least))
            for number in range(self.file.blocks)
        )
        write_filtered_scores(
            self.output,
            kept,
            (
                (
                    block.start + kept,
                    _known_rows(block.left[kept], self.counts[0]),
                    _known_rows(block.right[kept], self.counts[1]),
                    scores[kept],
                )
                for block, scores, kept in self._scored(keep_keys=False)
            ),
            self.file.identity,
            attributes={**self.file.content.attributes, "min_score": least},
            compression=self.compression,
            overwrite=self.overwrite,
        )
        self.file.discard()
        return kept

    def listed(self) -> int:
        """Write scores beside the keys as they came; return how many."""
        unit = str(self.file.content.attributes["unit"])
        kept = write_scored_pairs(
            self.output,
            (
                (block.left_keys.take(kept), block.right_keys.take(kept), scores[kept])
                for block, scores, kept in self._scored(keep_keys=True)
                if block.left_keys is not None and block.right_keys is not None
            ),
            names=self.source.names,
            score=unit if unit in COLUMNS_BY_UNIT else "score",
            overwrite=self.overwrite,
        )
        self.file.discard()
        return kept

    def _scored(self, keep_keys: bool) -> Iterator[tuple[PairBlock, np.ndarray, np.ndarray]]:
        """Blocks of pairs, their scores, and which of them are kept."""
        of_block, scores = -1, np.empty(0, dtype=np.float32)
        for block in self.source.blocks(EXPORTED_AT_ONCE, keep_keys=keep_keys):
            number, first = divmod(block.start, SCORE_BLOCK)
            if number != of_block:
                of_block, scores = number, self.file.scores(number)
            part = scores[first : first + len(block.left)]
            kept = np.arange(len(part))
            if self.min_score is not None:
                kept = np.flatnonzero(part.astype(np.float64) >= self.min_score)
            yield block, part, kept


COLUMNS_BY_UNIT = ("probability", "decision", "distance")
"""What a column of CSV or Parquet is called by the unit that is written; others: score."""


def _known_rows(rows: np.ndarray, count: int) -> np.ndarray:
    return np.where(rows < count, rows, -1)
