"""HDF5 files that runs produce: scores, which can be resumed, and matrices of all pairs."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from fastpair.errors import ArgumentError, FileError, MismatchError
from fastpair.hdf5 import (
    WRITTEN,
    Output,
    allocate,
    create_hdf5,
    expect_kind,
    open_hdf5,
    read_text,
    stamp,
    write_text,
)
from fastpair.ids import check_ids
from fastpair.staging import WRITING, Staging, read_at, reserve, write_at, writing

SCORE_BLOCK = 1 << 20
"""Pairs whose scores are written, checked and resumed together."""

CHUNK = 1 << 16
"""Numbers a chunk of data sets whose final length is not known when they are begun."""


# --- scores -------------------------------------------------------------------------------------


class ScoreFile:
    """Scores under way: NAME.partial, which can be killed at any instant and resumed.

    All of the file's structure is on the disk before the first score; after that bytes are only
    put in their places, a block of scores and then its checksum. The finished file therefore has
    the same bytes however often it was interrupted. In a `with` statement the file is closed at
    the end and kept for a later resume unless `finish` or `discard` came first.

    Parameters
    ----------
    path : where the finished scores shall stand.
    count : M, the number of pairs.
    identity : what the run is made of, by name; a resumed run must have the same.
    attributes : further attributes of the file, such as the unit.
    overwrite : whether an existing file (or unfinished work) may be replaced, default False.
    resume : whether to continue unfinished work if there is any, default False.

    Attributes
    ----------
    blocks : the number of blocks; each holds `SCORE_BLOCK` pairs, the last one what is left.
    done : (blocks,) bool, the blocks that are written and whole.

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
        attributes: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        self.staging = Staging(path, overwrite=overwrite)
        self.path, self.count = self.staging.path, count
        self.blocks = -(-count // SCORE_BLOCK)
        self.done = np.zeros(self.blocks, bool)
        self.identity = {name: str(value) for name, value in sorted(identity.items())}
        try:
            begun = self._unfinished()
            if begun is None:
                self._create(attributes or {})
            elif resume:
                self._continue(*begun)
            elif begun[2] and not overwrite:
                raise FileError(
                    f"{self.staging.partial} holds unfinished work for {self.path}; "
                    "say --resume to go on or --overwrite to begin again."
                )
            else:
                self._create(attributes or {})
        except BaseException:
            self.close()
            raise

    def _unfinished(self) -> tuple[dict[str, str], int, bool] | None:
        """Identity and length of what is staged, and whether a block is; None if not begun."""
        partial = self.staging.partial
        if not partial.stat().st_size:
            return None
        try:
            with open_hdf5(partial, locking=False) as file:
                expect_kind(file, partial, "scores")
                started = bool(np.any(file["block_checksum"][:]))
                return json.loads(file.attrs["identity"]), len(file["score"]), started
        except FileError:
            return None  # killed before its structure was whole, or left by another kind of output

    def _create(self, attributes: Mapping[str, Any]) -> None:
        with writing(self.path):
            with create_hdf5(self.staging.partial) as file:
                common = {"identity": json.dumps(self.identity), "checksum_rows": SCORE_BLOCK}
                stamp(file, "scores", {**common, **attributes})
                allocate(file, "score", (self.count,), "<f4")
                file.create_dataset("block_checksum", (self.blocks,), "u8", fillvalue=0)
                file["block_checksum"][...] = 0
            self._find_places()
            reserve(self.staging.descriptor, self._scores + 4 * self.count)

    def _find_places(self) -> None:
        with open_hdf5(self.staging.partial, locking=False) as file:
            self._scores = int(file["score"].id.get_offset() or 0)
            self._checksums = int(file["block_checksum"].id.get_offset() or 0)

    def _continue(self, identity: dict[str, str], count: int, started: bool) -> None:
        now = {**self.identity, "number of pairs": str(self.count)}
        then = {**identity, "number of pairs": str(count)}
        for name in sorted(now.keys() | then.keys()):
            if now.get(name) != then.get(name):
                raise MismatchError(
                    f"{self.staging.partial} belongs to another run: its {name} is "
                    f"{then.get(name)!r}, now it is {now.get(name)!r}; run with what it was "
                    "begun with, or say --overwrite."
                )
        self._find_places()
        sums = np.zeros(self.blocks, np.uint64)
        with writing(self.path):
            if started:
                read_at(self.staging.descriptor, sums, self._checksums)
            for number in np.flatnonzero(sums):
                checksum = WRITTEN | zlib.crc32(self.read_block(int(number)).data)
                self.done[number] = checksum == int(sums[number])

    def _block(self, number: int) -> range:
        if not 0 <= number < self.blocks:
            raise ArgumentError(f"block {number} does not exist; there are {self.blocks} blocks.")
        return range(number * SCORE_BLOCK, min((number + 1) * SCORE_BLOCK, self.count))

    def write_block(self, number: int, scores: np.ndarray) -> None:
        """Write the scores of one block, (its pairs,) float32; blocks may come in any order."""
        pairs = self._block(number)
        if scores.shape != (len(pairs),) or scores.dtype != np.float32:
            raise ArgumentError(
                f"block {number} needs {len(pairs)} float32 scores, "
                f"not {scores.shape} of type {scores.dtype}."
            )
        scores = np.ascontiguousarray(scores)
        checksum = np.array([WRITTEN | zlib.crc32(scores.data)], np.uint64)
        with writing(self.path):
            write_at(self.staging.descriptor, scores, self._scores + 4 * pairs.start)
            write_at(self.staging.descriptor, checksum, self._checksums + 8 * number)
            self.staging.flushing.wrote(scores.nbytes)
        self.done[number] = True

    def read_block(self, number: int) -> np.ndarray:
        """The scores of one block as they are on the disk, float32."""
        pairs = self._block(number)
        scores = np.empty(len(pairs), np.float32)
        with writing(self.path):
            read_at(self.staging.descriptor, scores, self._scores + 4 * pairs.start)
        return scores

    def finish(self) -> None:
        """Give the file its name.

        Raises
        ------
        ArgumentError
            Not all blocks were written.
        """
        if not self.done.all():
            missing = int(np.flatnonzero(~self.done)[0])
            raise ArgumentError(f"block {missing} of {self.blocks} was not written.")
        self.staging.finish()

    def discard(self) -> None:
        """Remove what was staged: the scores went into a file of another format."""
        self.staging.abandon()

    def close(self) -> None:
        """Lift the lock; what was written stays for a later resume."""
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


class _Growing:
    """A one-dimensional data set that grows in fixed chunks."""

    def __init__(self, file: h5py.File, name: str, dtype: str) -> None:
        self._dataset = file.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(CHUNK,))

    def append(self, values: np.ndarray) -> None:
        start = len(self._dataset)
        self._dataset.resize((start + len(values),))
        self._dataset[start:] = values


def write_filtered_scores(
    path: str | Path,
    blocks: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]],
    *,
    attributes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> int:
    """Write the pairs that passed a limit: `row`, `left`, `right` int64 and `score` float32.

    Parameters
    ----------
    path : the file to make.
    blocks : (row of the pair file, left row, right row, score), each (b,), in order of the row.
    attributes : attributes of the file, such as the unit and the limit.
    overwrite : whether an existing file may be replaced, default False.

    Returns
    -------
    int
        The number of pairs written.
    """
    columns: list[_Growing] = []
    count = 0

    def lay_out(file: h5py.File) -> None:
        for name, dtype in (("row", "i8"), ("left", "i8"), ("right", "i8"), ("score", "f4")):
            columns.append(_Growing(file, name, dtype))

    output = Output(
        path, "scores", attributes or {}, overwrite=overwrite, lay_out=lay_out, suffix=WRITING
    )
    with output:
        for block in blocks:
            with writing(output.path):
                for column, values in zip(columns, block, strict=True):
                    column.append(values)
            count += len(block[0])
    return count


# --- matrices -----------------------------------------------------------------------------------


class _Matrix(Output):
    """What the files of all pairs have in common: their form, and ids of rows and columns."""

    def __init__(
        self,
        path: str | Path,
        form: str,
        *,
        ids: pa.Array | None,
        ids_right: pa.Array | None,
        attributes: Mapping[str, Any] | None,
        overwrite: bool,
    ) -> None:
        texts = {"ids": ids, "ids_right": ids_right}
        checked = {name: check_ids(t, name) for name, t in texts.items() if t is not None}

        def lay_out(file: h5py.File) -> None:
            self.lay_out(file)
            for name, text in checked.items():
                write_text(file, name, text)

        super().__init__(
            path,
            "matrix",
            {"form": form, **(attributes or {})},
            overwrite=overwrite,
            lay_out=lay_out,
        )

    def lay_out(self, file: h5py.File) -> None:
        """Make the data sets of this form."""
        raise NotImplementedError


class DenseWriter(_Matrix):
    """Writes all scores, `matrix` (N, N') float32; to be used in a `with` statement.

    `LookupWriter` writes what a lookup gave, `output` (N, d), in the same way.

    Parameters
    ----------
    path : the file to make.
    shape : (N, N').
    ids, ids_right : text that names rows and columns, default none.
    attributes : attributes of the file, such as the unit.
    overwrite : whether an existing file may be replaced, default False.
    """

    form, dataset = "dense", "matrix"

    def __init__(
        self,
        path: str | Path,
        shape: tuple[int, int],
        *,
        ids: pa.Array | None = None,
        ids_right: pa.Array | None = None,
        attributes: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.shape = shape
        super().__init__(
            path,
            self.form,
            ids=ids,
            ids_right=ids_right,
            attributes=attributes,
            overwrite=overwrite,
        )
        self._start = self.place(self.dataset)
        try:
            with writing(self.path):
                self.file.flush()
                reserve(self.staging.descriptor, self._start + 4 * shape[0] * shape[1])
        except BaseException:
            self.abandon()
            raise

    def lay_out(self, file: h5py.File) -> None:
        """Make the data set, whose place is fixed from now on."""
        allocate(file, self.dataset, self.shape, "<f4")

    def write(self, row: int, column: int, tile: np.ndarray) -> None:
        """Write a tile (b, b') float32 whose first number belongs to (row, column)."""
        rows, columns = self.shape
        bottom, right = row + tile.shape[0], column + tile.shape[1]
        if row < 0 or column < 0 or bottom > rows or right > columns or tile.dtype != np.float32:
            raise ArgumentError(
                f"a tile {tile.shape} of type {tile.dtype} at ({row}, {column}) "
                f"does not fit into a float32 matrix {self.shape}."
            )
        tile = np.ascontiguousarray(tile)
        strips = [tile] if tile.shape[1] == columns else list(tile)
        with writing(self.path):
            for number, strip in enumerate(strips):
                place = self._start + 4 * ((row + number) * columns + column)
                write_at(self.staging.descriptor, strip, place)
            self.staging.flushing.wrote(tile.nbytes)


class LookupWriter(DenseWriter):
    """Writes what a lookup gave, `output` (N, d) float32, with the ids of the queries."""

    form, dataset = "lookup", "output"


class SparseWriter(_Matrix):
    """Writes the pairs above a threshold as CSR: `data`, `indices`, `indptr`.

    Parameters
    ----------
    path : the file to make.
    shape : (N, N'); kept as an attribute.
    ids, ids_right : text that names rows and columns, default none.
    attributes : attributes of the file, such as the unit and the threshold.
    overwrite : whether an existing file may be replaced, default False.
    """

    def __init__(
        self,
        path: str | Path,
        shape: tuple[int, int],
        *,
        ids: pa.Array | None = None,
        ids_right: pa.Array | None = None,
        attributes: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.shape = shape
        self._ends = np.zeros(shape[0] + 1, np.int64)
        self._rows = 0
        super().__init__(
            path,
            "threshold",
            ids=ids,
            ids_right=ids_right,
            attributes={"shape": np.array(shape, np.int64), **(attributes or {})},
            overwrite=overwrite,
        )

    def lay_out(self, file: h5py.File) -> None:
        """Make the data sets that grow."""
        self._indices = _Growing(file, "indices", "i8")
        self._data = _Growing(file, "data", "f4")

    def append(self, row_counts: np.ndarray, indices: np.ndarray, data: np.ndarray) -> None:
        """Write the next rows: how many numbers each has, their columns, int64, and scores."""
        stop = self._rows + len(row_counts)
        total = int(np.sum(row_counts))
        if stop > self.shape[0] or total != len(indices) or total != len(data):
            raise ArgumentError(
                f"rows {self._rows} to {stop} with {total} numbers do not fit {len(indices)} "
                f"columns, {len(data)} scores and {self.shape[0]} rows."
            )
        before = self._ends[self._rows]
        self._ends[self._rows + 1 : stop + 1] = before + np.cumsum(row_counts)
        self._rows = stop
        with writing(self.path):
            self._indices.append(indices)
            self._data.append(data)

    def finish(self) -> None:
        """Add `indptr` and give the file its name."""
        try:
            if self._rows != self.shape[0]:
                raise ArgumentError(f"{self._rows} of {self.shape[0]} rows were written.")
            with writing(self.path):
                self.file.create_dataset("indptr", data=self._ends)
        except BaseException:
            self.abandon()
            raise
        super().finish()


class TopKWriter(_Matrix):
    """Writes the best of every row: `indices` (N, k) int64 and `scores` (N, k) float32.

    Parameters
    ----------
    path : the file to make.
    shape : (N, k).
    ids, ids_right : text that names rows and what `indices` point at, default none.
    attributes : attributes of the file, such as the unit.
    overwrite : whether an existing file may be replaced, default False.
    """

    def __init__(
        self,
        path: str | Path,
        shape: tuple[int, int],
        *,
        ids: pa.Array | None = None,
        ids_right: pa.Array | None = None,
        attributes: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.shape, self._written = shape, 0
        super().__init__(
            path,
            "top_k",
            ids=ids,
            ids_right=ids_right,
            attributes=attributes,
            overwrite=overwrite,
        )

    def lay_out(self, file: h5py.File) -> None:
        """Make the two data sets."""
        file.create_dataset("indices", self.shape, "i8")
        file.create_dataset("scores", self.shape, "f4")

    def write(self, start: int, indices: np.ndarray, scores: np.ndarray) -> None:
        """Write rows from `start` on: (b, k) int64 and (b, k) float32."""
        stop = start + len(indices)
        with writing(self.path):
            self.file["indices"][start:stop] = indices
            self.file["scores"][start:stop] = scores
        self._written += len(indices)

    def finish(self) -> None:
        """Give the file its name."""
        if self._written != self.shape[0]:
            self.abandon()
            raise ArgumentError(f"{self._written} of {self.shape[0]} rows were written.")
        super().finish()


class _Histogram(_Matrix):
    def lay_out(self, file: h5py.File) -> None:
        """Nothing: both data sets are small and written at once."""


def write_histogram(
    path: str | Path,
    edges: ArrayLike,
    counts: ArrayLike,
    *,
    attributes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write how the scores of all pairs are spread: `edges` (B + 1,) and `counts` (B,) int64."""
    with (
        _Histogram(
            path, "histogram", ids=None, ids_right=None, attributes=attributes, overwrite=overwrite
        ) as output,
        writing(output.path),
    ):
        output.file.create_dataset("edges", data=np.asarray(edges, np.float64))
        output.file.create_dataset("counts", data=np.asarray(counts, np.int64))


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
