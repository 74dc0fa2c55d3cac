"""HDF5 outputs of known size: blocks of rows are put in their places, a checksum for each block.

All structure of the file is made before its first number; after that bytes are only put where they
belong, so that the finished file is the same however often its making was interrupted, and HDF5's
own bookkeeping is never half done.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
import pyarrow as pa

from fastpair.errors import ArgumentError, FileError
from fastpair.hdf5 import WRITTEN, allocate, create_hdf5, open_hdf5, stamp, write_array, write_text
from fastpair.journal import (
    Facts,
    Note,
    checksum_around,
    read_log_facts,
    read_note,
    refuse_another,
    refuse_unfinished,
)
from fastpair.staging import PARTIAL, Staging, read_at, reserve, write_at, writing

BLOCK_BYTES = 1 << 22
"""Bytes of a row block, about, where nothing else decides how many rows it has."""

MOST_CHECKERS = 8
"""Threads that compare blocks with their checksums."""


@dataclass(frozen=True)
class Column:
    """A data set of a file, a row for each row of the others.

    Parameters
    ----------
    name : of the data set.
    dtype : of its numbers.
    width : numbers of a row; None: the data set has one dimension.
    """

    name: str
    dtype: str
    width: int | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return np.dtype(self.dtype).itemsize * (1 if self.width is None else self.width)

    def shape(self, rows: int) -> tuple[int, ...]:
        """Shape of so many rows."""
        return (rows,) if self.width is None else (rows, self.width)


@dataclass(frozen=True)
class Content:
    """What a file of blocks is, but for its numbers.

    Parameters
    ----------
    kind : its `fastpair_kind`.
    rows : rows of every column.
    columns : its data sets.
    block_rows : rows that are written, checked and resumed together.
    attributes : of the file; those that are None are left out.
    texts : further data sets of text, such as ids, by name.
    arrays : further data sets that are known when the file is begun.
    """

    kind: str
    rows: int
    columns: Sequence[Column]
    block_rows: int
    attributes: Mapping[str, Any]
    texts: Mapping[str, pa.Array] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return -(-self.rows // self.block_rows)

    def lay_out(
        self,
        file: h5py.File,
        identity: Mapping[str, str],
        make: Callable[[h5py.File, str, Sequence[int], str], None] = allocate,
    ) -> None:
        """Make everything but the numbers, each column and the checksums by `make`."""
        told = {
            "checksum_rows": self.block_rows,
            "checksum_columns": " ".join(column.name for column in self.columns),
            "identity": as_text(identity),
        }
        stamp(file, self.kind, {**told, **self.attributes})
        for column in self.columns:
            make(file, column.name, column.shape(self.rows), column.dtype)
        make(file, "block_checksum", (self.blocks,), "<u8")
        for name, text in self.texts.items():
            write_text(file, name, text)
        for name, array in self.arrays.items():
            write_array(file, name, array)


@dataclass(frozen=True)
class _Begun:
    """Staged work: what its run is made of, if any is done, if a note tells what is watched."""

    facts: Facts
    started: bool
    noted: bool = True


def as_text(identity: Mapping[str, str]) -> str:
    """What a run is made of, as an attribute of its file."""
    told = {name: str(value) for name, value in identity.items()}
    return json.dumps(told, ensure_ascii=False, sort_keys=True)


def fitting_rows(columns: Sequence[Column]) -> int:
    """Rows of a block of about `BLOCK_BYTES`."""
    return max(1, BLOCK_BYTES // max(1, sum(column.row_bytes for column in columns)))


class BlockFile:
    """A file of blocks under way: NAME.partial, which can be killed at any instant and resumed.

    In a `with` statement the file is closed at the end and kept for a later resume unless `finish`
    or `discard` came first.

    Parameters
    ----------
    path : where the finished file shall stand.
    content : what it is.
    identity : what the run is made of, by name; a resumed run must have the same. The file tells it
        in its attribute `identity`.
    watched : the same, but what the finished file must not tell, such as times.
    overwrite : whether an existing file (or unfinished work) may be replaced, default False.
    resume : whether to continue unfinished work if there is any, default False.
    suffix : what is appended to the name meanwhile.

    Attributes
    ----------
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
        content: Content,
        identity: Mapping[str, str],
        *,
        watched: Mapping[str, str] | None = None,
        overwrite: bool = False,
        resume: bool = False,
        suffix: str = PARTIAL,
    ) -> None:
        self.staging = Staging(path, overwrite=overwrite, suffix=suffix)
        self.path, self.content = self.staging.path, content
        self.rows, self.blocks = content.rows, content.blocks
        self.done = np.zeros(self.blocks, bool)
        self._row, self._running = 0, 0
        self._size = 0
        told = {name: str(value) for name, value in sorted(identity.items())}
        kept = {name: str(value) for name, value in sorted((watched or {}).items())}
        self.identity, self.watched = told, kept
        try:
            with writing(self.path):
                begun = self._unfinished() if suffix == PARTIAL else None
                if begun is not None and resume:
                    now = self._facts(told, kept if begun.noted else {})
                    refuse_another(self.staging.partial, begun.facts, now)
                    self._continue()
                elif begun is not None and begun.started and not overwrite:
                    refuse_unfinished(self.staging.partial, self.path)
                else:
                    try:
                        self._create(told, kept)
                    except BaseException:
                        self.staging.abandon()  # there is nothing yet to go on with
                        raise
        except BaseException:
            self.close()
            raise

    # --- beginning and going on ---

    def _create(self, identity: Facts, watched: Facts) -> None:
        self.staging.empty()
        with create_hdf5(self.staging.partial) as file:
            self.content.lay_out(file, identity)
        descriptor = self.staging.descriptor
        self._size = os.fstat(descriptor).st_size
        self._find_places()
        reserve(descriptor, self._size)
        structure = checksum_around(descriptor, self._size, self._holes())
        Note(self._size, structure, self._facts(identity, watched)).write(descriptor)
        self.staging.flush()  # behind this, nothing of another run can come back

    def _facts(self, identity: Facts, watched: Facts) -> Facts:
        """What the run is made of, with what decides on the bytes and is no option of anybody."""
        shapes = {c.name: "x".join(map(str, c.shape(self.rows))) for c in self.content.columns}
        form = self.content.attributes.get("form")
        return {
            "kind": self.content.kind if form is None else f"{form} {self.content.kind}",
            "size": ", ".join(f"{name} {shape}" for name, shape in shapes.items()),
            "software": f"fastpair {version('fastpair')}, HDF5 {h5py.version.hdf5_version}",
            **identity,
            **watched,
        }

    def _find_places(self) -> None:
        with open_hdf5(self.staging.partial, locking=False) as file:
            names = [*(column.name for column in self.content.columns), "block_checksum"]
            self._places = {name: int(file[name].id.get_offset() or 0) for name in names}

    def _holes(self) -> list[tuple[int, int]]:
        """First byte and bytes of everything that is written after the structure."""
        holes = [(self._places[c.name], c.row_bytes * self.rows) for c in self.content.columns]
        return [*holes, (self._places["block_checksum"], 8 * self.blocks)]

    def _unfinished(self) -> _Begun | None:
        """What is staged, if a resume could go on with it; None if there is nothing of worth.

        A file without a note was killed before its structure was whole, or it is complete and was
        killed before it got its name.
        """
        descriptor = self.staging.descriptor
        note, logged = read_note(descriptor), read_log_facts(descriptor)
        if logged is not None:
            return _Begun(logged, True)
        own = self._facts({}, {})
        if note is not None and any(note.facts.get(name) != own[name] for name in own):
            return _Begun(note.facts, True)  # of another form: nothing else can be told
        try:
            self._find_places()
            if note is not None:
                self._size = note.size
                whole = checksum_around(descriptor, note.size, self._holes()) == note.structure
                return _Begun(note.facts, self._started()) if whole else None
            self._size = os.fstat(descriptor).st_size
            with open_hdf5(self.staging.partial, locking=False) as file:
                told = json.loads(file.attrs["identity"])
            self._check_blocks()
        except (FileError, LookupError, ValueError, EOFError):
            return None
        complete = self.blocks > 0 and bool(self.done.all())
        return _Begun({**own, **told}, True, noted=False) if complete else None

    def _started(self) -> bool:
        return bool(self._stored_checksums().any())

    def _stored_checksums(self) -> np.ndarray:
        sums = np.zeros(self.blocks, np.uint64)
        if self.blocks:
            read_at(self.staging.descriptor, sums, self._places["block_checksum"])
        return sums

    def _continue(self) -> None:
        self._check_blocks()
        undone = np.flatnonzero(~self.done)
        self._row = min(
            int(undone[0]) * self.content.block_rows if len(undone) else self.rows, self.rows
        )

    def _check_blocks(self) -> None:
        """Compare all blocks that were written with their checksums."""
        sums = self._stored_checksums()
        numbers = np.flatnonzero(sums).tolist()

        def is_whole(number: int) -> bool:
            return checksum_of(self.read_block(number)) == int(sums[number])

        with ThreadPoolExecutor(min(MOST_CHECKERS, os.cpu_count() or 1)) as pool:
            self.done[numbers] = list(pool.map(is_whole, numbers))

    # --- writing ---

    @property
    def next_row(self) -> int:
        """The row that `append` goes on with: the first one of the first block not done."""
        return self._row

    def block(self, number: int) -> range:
        """The rows of a block."""
        if not 0 <= number < self.blocks:
            raise ArgumentError(f"block {number} does not exist; there are {self.blocks} blocks.")
        size = self.content.block_rows
        return range(number * size, min((number + 1) * size, self.rows))

    def _checked(self, rows: int, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        for column, array in zip(self.content.columns, arrays, strict=True):
            if array.shape != column.shape(rows) or array.dtype != np.dtype(column.dtype):
                raise ArgumentError(
                    f"{column.name} needs {column.shape(rows)} numbers of type {column.dtype} "
                    f"here, not {array.shape} of type {array.dtype}."
                )
        return [np.ascontiguousarray(array) for array in arrays]

    def _put(self, row: int, arrays: Sequence[np.ndarray]) -> None:
        for column, array in zip(self.content.columns, arrays, strict=True):
            place = self._places[column.name] + row * column.row_bytes
            write_at(self.staging.descriptor, array, place)
        self.staging.flushing.wrote(sum(array.nbytes for array in arrays))

    def _mark(self, number: int, checksum: int) -> None:
        place = self._places["block_checksum"] + 8 * number
        mark = np.array([checksum], np.uint64)
        write_at(self.staging.descriptor, mark, place)
        self.done[number] = True

    def write_block(self, number: int, *arrays: np.ndarray) -> None:
        """Write a whole block, an array for each column; blocks may come in any order."""
        rows = self.block(number)
        arrays = tuple(self._checked(len(rows), arrays))
        checksum = checksum_of(arrays)
        with writing(self.path):
            self._put(rows.start, arrays)
            self._mark(number, checksum)

    def append(self, *arrays: np.ndarray) -> None:
        """Write any number of rows from `next_row` on, an array for each column."""
        count = len(arrays[0])
        if self._row + count > self.rows:
            raise ArgumentError(
                f"rows {self._row} to {self._row + count} do not fit into {self.rows} rows."
            )
        arrays = tuple(self._checked(count, arrays))
        with writing(self.path):
            self._put(self._row, arrays)
            at = 0
            while at < count:
                rows = self.block(self._row // self.content.block_rows)
                step = min(count - at, rows.stop - self._row)
                self._take(rows, [array[at : at + step] for array in arrays])
                at += step

    def _take(self, rows: range, arrays: list[np.ndarray]) -> None:
        """Bring rows that stand in the file already into the checksum of their block."""
        whole = self._row == rows.start and len(arrays[0]) == len(rows)
        if len(arrays) == 1 or whole:
            self._running = checksum_of(arrays, self._running)
        self._row += len(arrays[0])
        if self._row < rows.stop:
            return
        number = rows.start // self.content.block_rows
        if len(arrays) > 1 and not whole:  # the columns of a block come one after another
            self._running = checksum_of(self.read_block(number))
        self._mark(number, self._running)
        self._running = 0

    def read_block(self, number: int) -> list[np.ndarray]:
        """One block as it is on the disk, an array for each column."""
        rows = self.block(number)
        arrays = []
        for column in self.content.columns:
            array = np.empty(column.shape(len(rows)), column.dtype)
            with writing(self.path):
                place = self._places[column.name] + rows.start * column.row_bytes
                read_at(self.staging.descriptor, array, place)
            arrays.append(array)
        return arrays

    def read_blocks(self) -> Iterator[list[np.ndarray]]:
        """All blocks in order."""
        return map(self.read_block, range(self.blocks))

    # --- ending ---

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
        self.staging.finish(self._size)

    def discard(self) -> None:
        """Remove what was staged, for example because it went into a file of another format."""
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


def checksum_of(arrays: Sequence[np.ndarray], before: int = 0) -> int:
    """What stands for a block, its C-contiguous arrays one after another: a crc32, never 0."""
    for array in arrays:
        before = zlib.crc32(array.data, before & (WRITTEN - 1))
    return WRITTEN | before
