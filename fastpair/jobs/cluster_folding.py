"""`project` on a cluster: workers fold ranges of the embeddings; the table is always one file.

A table is read as a whole and checked by its own sums, so that its rows are brought into the file
that a run without a cluster writes, byte for byte. Int8 tables take a first pass for the greatest
numbers of their segments, of which the client keeps the maximum; a resume takes it again. Workers
must multiply matrices as the client does, or rows would differ in last bits: another one is
refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fastpair.blocks import Column, Content, fitting_rows
from fastpair.compression import write_rows
from fastpair.distributed import as_cluster
from fastpair.errors import DataError, FileError
from fastpair.heads import import_head
from fastpair.ingest import NUMBERS_AT_ONCE
from fastpair.jobs.folding import FOLDED_AT_ONCE, open_projection, summary_of, table_writer
from fastpair.jobs.inputs import Count, Summary, file_time, load_model
from fastpair.jobs.on_cluster import (
    GoingOn,
    Job,
    Making,
    check_matrix_products,
    cut,
    found_or_made,
    job_for,
    matrix_products,
    opened_once,
    shared_paths,
    software,
)
from fastpair.model import BUILTINS
from fastpair.parts import Part, PartsFolder, Told

FEW_PARTS, PART_BYTES = 16, 1 << 26
"""A job has at least so many parts where it has the rows, and parts of a table have so many bytes,
about."""

MOST_TOGETHER = 1 << 12
"""Rows that are read together, at most."""

BYTES_A_NUMBER = 64
"""What a number of embeddings takes while it is folded, at most."""


def project_on_cluster(
    given: Any,
    asked: Summary,
    output: Path,
    progress: Count,
    expect: Callable[[int | None], None] | None,
    *,
    overwrite: bool,
    resume: bool,
    **limits: Any,
) -> Summary:
    """Fold on a cluster; parameters and summary are those of `fastpair.jobs.project`."""
    begun = time.perf_counter()
    cluster = as_cluster(given)
    named = [] if str(asked["model"]) in BUILTINS else ["model"]
    asked = shared_paths(asked, "embeddings", *named)
    similarity = load_model(asked["model"])
    source, folder, made_from = open_projection(similarity, threads=limits["threads"], **asked)
    count, columns = source.shape
    if expect is not None:
        expect(count * (2 if folder.needs_survey else 1))
    step = rows_together(columns, folder.plan.layout.row_bytes)
    part_rows = step * max(1, PART_BYTES // (step * folder.plan.layout.row_bytes))
    while part_rows > step and part_rows * FEW_PARTS > count:
        part_rows -= step
    identity = {
        "model": similarity.fingerprint(),
        "precision": folder.plan.precision,
        "side": str(asked["side"]),
        "nonfinite": str(asked["nonfinite"]),
        "reading": f"{asked['reading']}, dataset: {asked['dataset']}",
        **(made_from or {}),
    }
    facts = {"software": software(), "products": matrix_products(), **identity, "form": "table"}
    if asked["embeddings"] is not None:
        facts["time of the embeddings"] = file_time(asked["embeddings"])
    with PartsFolder(output, facts, overwrite=overwrite, resume=resume) as parts_folder:
        more: Summary = {"products": matrix_products(), "step": step}
        more["heads"] = [name for name in similarity.heads if ":" in name]
        limits |= {"run": parts_folder.run, "device": "cpu", "device_memory": None}
        parts = cut(parts_folder, count, part_rows)
        job = job_for(cluster, asked, identity, more=more, **limits)
        try:
            if folder.needs_survey:
                job.more["peaks"] = _survey(cluster, job, parts, progress)
                folder.settle(np.array(job.more["peaks"]))
            making = Making(cluster, job, fold_part, "rows", progress)
            _write(making, parts, similarity, asked, source, folder, made_from, output, overwrite)
        except DataError:
            parts_folder.give_up()
            raise
        finally:
            Making(cluster, job, fold_part, "rows", progress).forget()
        parts_folder.remove()
    return summary_of(similarity, source, folder, output, begun)


def rows_together(columns: int, row_bytes: int) -> int:
    """Rows that are read together, a power of 2: it depends on the job alone."""
    width = max(columns, row_bytes // 4)
    most = max(1, min(MOST_TOGETHER, FOLDED_AT_ONCE // width, NUMBERS_AT_ONCE // columns))
    return 1 << (most.bit_length() - 1)


def _survey(cluster: Any, job: Job, parts: list[Part], progress: Count) -> list[float]:
    """Have all rows looked at; return the greatest number of each segment."""
    peaks = np.zeros(0)
    calls = [(job, part.first, part.last) for part in parts]

    def told(number: int) -> str:
        return f"rows {parts[number].first} to {parts[number].last - 1}"

    for number, found in cluster.results(survey_rows, calls, told):
        own = np.array(found["peaks"])
        peaks = np.maximum(peaks, own) if len(peaks) else own
        progress(parts[number].last - parts[number].first)
    return [float(peak) for peak in peaks]


def _write(
    making: Making,
    parts: list[Part],
    similarity: Any,
    asked: Summary,
    source: Any,
    folder: Any,
    made_from: dict[str, str] | None,
    output: Path,
    overwrite: bool,
) -> None:
    """Bring parts into a table."""
    told = (similarity, asked, source, folder, made_from, output)
    with table_writer(*told, overwrite=overwrite) as table:
        for part in making.in_order(parts):
            first = part.first
            for (rows,) in making.blocks(part, ["rows"]):
                table.write(first, rows.view(folder.plan.layout.dtype)[:, 0])
                first += len(rows)
        isolated: list[int] = sorted(row for note in making.notes for row in note["isolated"])
        if isolated:
            source.mark_isolated(isolated)
            table.isolate(np.array(isolated))
        if similarity.tables is not None:
            unknown = similarity.tables.of(asked["side"]).unknown
            table.write_unknown(folder.fold(unknown[None]))
    for note in making.notes:
        folder.note_norms(note["norms"])


# --- what runs in a worker ------------------------------------------------------------------------


def survey_rows(job: Job, first: int, last: int) -> Summary:
    """Return the greatest number of each segment in a range of rows."""
    return {"peaks": opened_once(job, _Folding).survey(first, last)}


def fold_part(job: Job, part: Part) -> Told:
    """Fold the rows of a range into a part file, if they are not there; return its note."""
    return found_or_made(part, lambda attempt: opened_once(job, _Folding).write(job, attempt, part))


class _Folding:
    """What a worker process has opened to fold embeddings."""

    def __init__(self, job: Job) -> None:
        check_matrix_products(job.more["products"])
        for name in job.more["heads"]:
            import_head(name)  # the client has imported it as its user said
        asked, step = job.asked, job.more["step"]
        similarity = load_model(asked["model"])
        opened = open_projection(similarity, threads=job.own_threads, **asked)
        self.source, self.folder, made_from = opened
        job.check({**job.identity, **(made_from or {}), "model": similarity.fingerprint()})
        least = BYTES_A_NUMBER * max(self.source.shape[1], self.folder.plan.layout.row_bytes // 4)
        while step > 1 and step * least > job.budget:
            step //= 2
        self.step = step
        self._in_order = GoingOn(self._from, step)

    def _from(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
        return self.source.blocks(self.step, start)

    def _blocks(self, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
        if self.source.seek is None:
            return self._in_order.read(first, last)
        return islice(self._from(first), -(-(last - first) // self.step))

    def survey(self, first: int, last: int) -> list[float]:
        """Look at rows; return the greatest numbers so far."""
        for _, block in self._blocks(first, last):
            self.folder.survey(block)
        return [float(peak) for peak in self.folder.peaks]

    def write(self, job: Job, attempt: Path, part: Part) -> Told:
        """Fold rows into a file; return what is told of them."""
        if "peaks" in job.more:
            self.folder.settle(np.array(job.more["peaks"]))
        width = self.folder.plan.layout.row_bytes
        columns = [Column("rows", "|u1", width)]
        content = Content("rows", part.last - part.first, columns, fitting_rows(columns), {})

        def folded() -> Iterator[tuple[np.ndarray]]:
            done = part.first
            for start, block in self._blocks(part.first, part.last):
                if start != done:
                    raise FileError(f"{self.source.path} changed while it was read.")
                rows = self.folder.fold(block, start)
                done += len(rows)
                yield (rows.view(np.uint8).reshape(len(rows), width),)

        identity = {"run": part.run, "rows": f"{part.first} to {part.last - 1}"}
        write_rows(attempt, content, identity, folded())
        mask = self.source.isolated
        found = np.empty(0) if mask is None else np.flatnonzero(mask[part.first : part.last])
        return {
            "rows": part.last - part.first,
            "norms": self.folder.norms,
            "isolated": [part.first + int(row) for row in found],
        }
