"""HDF5 files that runs produce and that can be resumed: scores, and matrices of all pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from fastpair.blocks import BlockFile, Column, Content, fitting_rows
from fastpair.compression import write_rows
from fastpair.errors import ArgumentError, FileError
from fastpair.hdf5 import Output, expect_kind, open_hdf5, read_text, write_array
from fastpair.ids import check_ids
from fastpair.journal import Record, RowLog
from fastpair.staging import Staging, writing

SCORE_BLOCK = 1 << 20
"""Pairs whose scores are written, checked and resumed together."""
ROWS_AT_ONCE = 1 << 12
"""Rows that are resumed together, at most, where each has cost a walk over all: top-k, lookup."""


# --- scores -------------------------------------------------------------------------------------


class ScoreFile(BlockFile):
    """Scores under way, `score` (M,) float32, in blocks of `SCORE_BLOCK` pairs.

    Parameters
    ----------
    path : where the finished scores shall stand.
    count : M, the number of pairs.
    identity : what the run is made of, by name; a resumed run must have the same.
    watched : the same, but what the finished file must not tell, such as times.
    attributes : further attributes of the file, such as the unit.
    overwrite : whether an existing file (or unfinished work) may be replaced, default False.
    resume : whether to continue unfinished work if there is any, default False.

    Raises
    ------
    FileError
        The file cannot be made there, or unfinished work is there and neither `resume` nor
        `overwrite` was said.
    MismatchError
        The unfinished work belongs to another run.
    """

    def __init__(
        self,
        path: str | Path,
        count: int,
        identity: Mapping[str, str],
        *,
        watched: Mapping[str, str] | None = None,
        attributes: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        self.count = count
        content = Content("scores", count, [Column("score", "<f4")], SCORE_BLOCK, attributes or {})
        options: dict[str, Any] = {"overwrite": overwrite, "resume": resume}
        super().__init__(path, content, identity, watched=watched, **options)

    def scores(self, number: int) -> np.ndarray:
        """The scores of one block as they are on the disk, float32."""
        return self.read_block(number)[0]


FILTERED = [Column("row", "<i8"), Column("left", "<i8"), Column("right", "<i8")]
FILTERED.append(Column("score", "<f4"))


def write_filtered_scores(
    path: str | Path,
    count: int,
    blocks: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]],
    identity: Mapping[str, str],
    *,
    attributes: Mapping[str, Any] | None = None,
    compression: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the pairs that passed a limit: `row`, `left`, `right` int64 and `score` float32.

    Parameters
    ----------
    path : the file to make.
    count : how many passed.
    blocks : (row of the pair file, left row, right row, score), each (b,), in order of the row.
    identity : what the run is made of.
    attributes : attributes of the file, such as the unit and the limit.
    compression : name of a filter, default none.
    overwrite : whether an existing file may be replaced, default False.
    """
    content = Content("scores", count, FILTERED, fitting_rows(FILTERED), attributes or {})
    types = [column.dtype for column in FILTERED]
    parts = (list(map(np.asarray, block, types)) for block in blocks)
    options: dict[str, Any] = {"overwrite": overwrite, "compression": compression}
    write_rows(path, content, identity, parts, **options)


# --- matrices -----------------------------------------------------------------------------------


def _named(ids: pa.Array | None, ids_right: pa.Array | None) -> dict[str, pa.Array]:
    """Ids of rows and of columns as further data sets."""
    texts = {"ids": ids, "ids_right": ids_right}
    return {name: check_ids(t, name) for name, t in texts.items() if t is not None}


def dense_content(
    shape: tuple[int, int],
    ids: pa.Array | None = None,
    ids_right: pa.Array | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> Content:
    """What a file of all scores is; parameters as `DenseWriter` has them."""
    columns = [Column("matrix", "<f4", shape[1])]
    told = {"form": "dense", **(attributes or {})}
    texts = _named(ids, ids_right)
    return Content("matrix", shape[0], columns, fitting_rows(columns), told, texts)


def top_k_content(
    shape: tuple[int, int],
    ids: pa.Array | None = None,
    ids_right: pa.Array | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> Content:
    """What a file of the best of every row is; parameters as `TopKWriter` has them."""
    columns = [Column("indices", "<i8", shape[1]), Column("scores", "<f4", shape[1])]
    told = {"form": "top_k", **(attributes or {})}
    rows = min(fitting_rows(columns), ROWS_AT_ONCE)
    return Content("matrix", shape[0], columns, rows, told, _named(ids, ids_right))


class DenseWriter(BlockFile):
    """All scores under way, `matrix` (N, N') float32, from the first row to the last.

    Parameters
    ----------
    path : the file to make.
    shape : (N, N').
    identity : what the run is made of, by name; a resumed run must have the same.
    ids, ids_right : text that names rows and columns, default none.
    attributes : attributes of the file, such as the unit.
    overwrite, resume : as `ScoreFile` has them.
    """

    def __init__(
        self,
        path: str | Path,
        shape: tuple[int, int],
        identity: Mapping[str, str],
        *,
        ids: pa.Array | None = None,
        ids_right: pa.Array | None = None,
        attributes: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        content = dense_content(shape, ids, ids_right, attributes)
        super().__init__(path, content, identity, overwrite=overwrite, resume=resume)


class TopKWriter(BlockFile):
    """The best of every row under way: `indices` (N, k) int64 and `scores` (N, k) float32.

    Parameters
    ----------
    path : the file to make.
    shape : (N, k).
    identity : what the run is made of, by name; a resumed run must have the same.
    ids, ids_right : text that names rows and what `indices` point at, default none.
    attributes : attributes of the file, such as the unit.
    overwrite, resume : as `ScoreFile` has them.
    """

    def __init__(
        self,
        path: str | Path,
        shape: tuple[int, int],
        identity: Mapping[str, str],
        *,
        ids: pa.Array | None = None,
        ids_right: pa.Array | None = None,
        attributes: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        content = top_k_content(shape, ids, ids_right, attributes)
        super().__init__(path, content, identity, overwrite=overwrite, resume=resume)


class SparseWriter:
    """The pairs above a threshold under way: a log of rows, at the end CSR in HDF5.

    Parameters
    ----------
    path : the file to make.
    shape : (N, N'); kept as an attribute.
    identity : what the run is made of, by name; a resumed run must have the same.
    overwrite, resume : as `ScoreFile` has them.
    """

    def __init__(
        self,
        path: str | Path,
        shape: tuple[int, int],
        identity: Mapping[str, str],
        *,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        self.shape = shape
        self.staging = Staging(path, overwrite=overwrite)
        self.path = self.staging.path
        self.identity = {name: str(value) for name, value in sorted(identity.items())}
        facts = {
            "kind": "threshold matrix",
            "size": " x ".join(map(str, shape)),
            "software": f"fastpair {version('fastpair')}",
            **self.identity,
        }
        try:
            with writing(self.path):
                self._log = RowLog(self.staging, facts, overwrite=overwrite, resume=resume)
        except BaseException:
            self.close()
            raise

    @property
    def next_row(self) -> int:
        """The row that `append` goes on with."""
        return self._log.rows

    @property
    def pairs(self) -> int:
        """How many pairs were kept so far."""
        return self._log.pairs

    def append(self, row_counts: np.ndarray, indices: np.ndarray, data: np.ndarray) -> None:
        """Write the next rows: how many numbers each has, their columns, int64, and scores."""
        stop = self.next_row + len(row_counts)
        total = int(np.sum(row_counts))
        if stop > self.shape[0] or total != len(indices) or total != len(data):
            raise ArgumentError(
                f"rows {self.next_row} to {stop} with {total} numbers do not fit {len(indices)} "
                f"columns, {len(data)} scores and {self.shape[0]} rows."
            )
        if not len(row_counts):
            return
        with writing(self.path):
            self._log.append(Record(self.next_row, row_counts, indices, data))

    def ends(self) -> np.ndarray:
        """Where each row ends and the next one begins, (N + 1,) int64, called `indptr` in CSR.

        Raises
        ------
        ArgumentError
            Not all rows were written.
        """
        if self.next_row != self.shape[0]:
            raise ArgumentError(f"{self.next_row} of {self.shape[0]} rows were written.")
        ends = np.zeros(self.shape[0] + 1, np.int64)
        for record in self._log.records():
            ends[record.first + 1 : record.first + 1 + len(record.counts)] = record.counts
        return np.cumsum(ends, out=ends)

    def records(self) -> Iterator[Record]:
        """What was appended, from the first row on."""
        with writing(self.path):
            yield from self._log.records()

    def finish(
        self,
        *,
        ids: pa.Array | None = None,
        ids_right: pa.Array | None = None,
        attributes: Mapping[str, Any] | None = None,
        compression: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write `data`, `indices` and `indptr` as HDF5 and remove the log.

        Parameters
        ----------
        ids, ids_right : text that names rows and columns, default none.
        attributes : attributes of the file, such as the unit and the threshold.
        compression : name of a filter, default none.
        overwrite : whether an existing file may be replaced, default False.
        """
        ends = self.ends()
        columns = [Column("indices", "<i8"), Column("data", "<f4")]
        shape = {"shape": np.array(self.shape, np.int64)}
        told = {"form": "threshold", **shape, **(attributes or {})}
        texts, arrays = _named(ids, ids_right), {"indptr": ends}
        rows = fitting_rows(columns)
        content = Content("matrix", self.pairs, columns, rows, told, texts, arrays)
        parts = ((record.indices, record.data) for record in self.records())
        options: dict[str, Any] = {"overwrite": overwrite, "compression": compression}
        write_rows(self.path, content, self.identity, parts, **options)
        self.discard()

    def discard(self) -> None:
        """Remove the log."""
        self.staging.abandon()

    def close(self) -> None:
        """Lift the lock; the log stays for a later resume."""
        self.staging.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class LookupWriter(BlockFile):
    """What a lookup gave, under way: `output` (N, d) float32, from the first query to the last.

    Parameters
    ----------
    path : the file to make.
    shape : (N, d).
    identity : what the run is made of, by name; a resumed run must have the same.
    ids : text that names queries, default none.
    attributes : attributes of the file, such as the unit.
    overwrite, resume : as `ScoreFile` has them.
    """

    def __init__(
        self,
        path: str | Path,
        shape: tuple[int, int],
        identity: Mapping[str, str],
        *,
        ids: pa.Array | None = None,
        attributes: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        columns = [Column("output", "<f4", shape[1])]
        told = {"form": "lookup", **(attributes or {})}
        texts = _named(ids, None)
        rows = min(fitting_rows(columns), ROWS_AT_ONCE)
        content = Content("matrix", shape[0], columns, rows, told, texts)
        super().__init__(path, content, identity, overwrite=overwrite, resume=resume)


def write_histogram(
    path: str | Path,
    edges: ArrayLike,
    counts: ArrayLike,
    *,
    attributes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write how the scores of all pairs are spread: `edges` (B + 1,) and `counts` (B,) int64."""

    def lay_out(file: h5py.File) -> None:
        write_array(file, "edges", np.asarray(edges, np.float64))
        write_array(file, "counts", np.asarray(counts, np.int64))

    told = {"form": "histogram", **(attributes or {})}
    with Output(path, "matrix", told, overwrite=overwrite, lay_out=lay_out):
        pass


@dataclass(frozen=True)
class TopK:
    """The best of every row, as `TopKWriter` wrote them.

    Parameters
    ----------
    indices : (N, k) int64, -1 where a row has fewer than k.
    scores : (N, k) float32, NaN where a row has fewer than k.
    ids : text that names rows, (N,), or None.
    ids_right : text that names what `indices` point at; None: the rows themselves.
    """

    indices: np.ndarray
    scores: np.ndarray
    ids: pa.Array | None
    ids_right: pa.Array | None


def read_top_k(path: str | Path) -> TopK:
    """Read the best of every row.

    Raises
    ------
    FileError
        The file is missing, damaged, or not a top-k matrix.
    """
    path = Path(path)
    with open_hdf5(path) as file:
        expect_kind(file, path, "matrix")
        if file.attrs["form"] != "top_k":
            raise FileError(f"{path} is a {file.attrs['form']} matrix, expected a top_k one.")
        texts = {n: read_text(file[n]) if n in file else None for n in ("ids", "ids_right")}
        return TopK(file["indices"][:], file["scores"][:], **texts)
