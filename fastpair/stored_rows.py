"""Rows of a table that stay in their file: read in order, in large pieces, into given memory.

Before any row of a piece is used the whole piece is compared with its checksum, once.

Where the system can, they go past its page cache: a table that does not fit into memory is gone
from there before it is read again, and would only drive out what is of use.
"""

from __future__ import annotations

import os
import threading
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np

from fastpair.errors import FileError
from fastpair.files import page_aligned, read_unknown
from fastpair.folding import common_scales
from fastpair.hdf5 import PAGE, WRITTEN, open_hdf5, reading
from fastpair.kernels import Plan, aligned_empty
from fastpair.staging import read_at

SOME_BYTES = 1 << 22
"""Bytes of rows that are read together where some of them are left out."""

READERS = 4
"""Threads that read side by side: a disk answers several questions sooner than one."""


class StoredRows:
    """The rows of a table, read part by part.

    The file is closed when nobody has them any more.

    Parameters
    ----------
    path : a table.
    plan : what its rows are brought to: its own plan, or that of two int8 tables that meet.
    own_plan : the plan of the file.
    unknown : whether the row of unknown ids, if there is one, follows the others.

    Attributes
    ----------
    shape : (rows, row_bytes), as of an array.
    step : rows that are checked together; parts should begin at a multiple of it, or the pieces at
        their ends are read twice the first time.
    bytes_read : bytes of rows that were read so far.
    """

    def __init__(self, path: str | Path, plan: Plan, own_plan: Plan, *, unknown: bool) -> None:
        self.path, self.plan, self._own_plan = Path(path), plan, own_plan
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._file: h5py.File | None = None
        with open_hdf5(self.path) as file:
            dataset, dtype = file["rows"], plan.layout.dtype
            self._offset = dataset.id.get_offset()
            self._count = len(dataset)
            self._last = read_unknown(file, dtype) if unknown else np.empty(0, dtype)
            self._sums = file["block_checksum"][:]
            self.step = int(file.attrs["checksum_rows"])
        self._checked = np.zeros(len(self._sums), bool)
        self.shape = (self._count + len(self._last), dtype.itemsize)
        if self._offset is None and self._count:  # repacked by some tool, perhaps compressed
            self._file = h5py.File(self.path, "r", locking="best-effort")
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self._direct = _open_direct(self.path)
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="fastpair-rows")
        weakref.finalize(self, _close, [self._descriptor, self._direct], self._file)

    def __len__(self) -> int:
        return self.shape[0]

    def load(self, start: int, stop: int, out: np.ndarray, *, checked: bool = True) -> np.ndarray:
        """Read rows `start` to `stop` into the beginning of `out`; return that part of it.

        Parameters
        ----------
        start, stop : row numbers.
        out : (at least stop - start, row_bytes) uint8, C-contiguous.
        checked : False leaves out the comparison, for samples of rows that are read again.

        Raises
        ------
        FileError : the file ends too early, or its rows do not agree with their checksums.
        """
        rows = out[: stop - start]
        stored = rows[: max(0, min(stop, self._count) - start)]
        if len(stored):
            with reading(self.path):
                self._read(start, stored, checked)
        if stop > self._count:
            rows[len(stored) :] = self._last.view(np.uint8).reshape(-1, self.shape[1])
        if self.plan != self._own_plan:
            common_scales(rows, self._own_plan, self.plan.segment_scales, rows)
        return rows

    def __getitem__(self, wanted: slice) -> np.ndarray:
        """Return a copy of some rows: of a range, or single ones that are apart."""
        return _copy(self, wanted)

    def only(self, numbers: np.ndarray) -> SomeRows:
        """Return the rows of these numbers (m,), which rise, as if there were no others."""
        return SomeRows(self, numbers)

    def _read(self, start: int, rows: np.ndarray, checked: bool) -> None:
        stop = start + len(rows)
        firsts = [start, *range(-(-(start + 1) // self.step) * self.step, stop, self.step)]
        pieces = [range(a, min(b, stop)) for a, b in zip(firsts, [*firsts[1:], stop], strict=True)]

        def read(piece: range) -> None:
            self._read_piece(piece, rows[piece.start - start : piece.stop - start], checked)

        if len(pieces) == 1 or self._file is not None:
            for piece in pieces:
                read(piece)
            return
        for _ in self._pool.map(read, pieces):
            pass

    def _read_piece(self, piece: range, rows: np.ndarray, checked: bool) -> None:
        """Read rows of one piece, and the first time all of it, to compare it."""
        number = piece.start // self.step
        if self._checked[number] or not checked:
            self._fetch(piece, rows)
            return
        whole = range(number * self.step, min((number + 1) * self.step, self._count))
        own = rows if whole == piece else page_aligned((len(whole), self.shape[1]))
        self._fetch(whole, own)
        if WRITTEN | zlib.crc32(own.data) != int(self._sums[number]):
            raise FileError(
                f"{self.path} cannot be read: its rows do not agree with their checksums; "
                "make or fetch it again."
            )
        self._checked[number] = True
        if own is not rows:
            rows[:] = own[piece.start - whole.start : piece.stop - whole.start]

    def _fetch(self, piece: range, rows: np.ndarray) -> None:
        """Read rows as they are on the disk."""
        self._count_bytes(rows.nbytes)
        if self._file is not None:
            dataset = self._file["rows"]
            dataset.read_direct(
                rows.reshape(-1).view(dataset.dtype), np.s_[piece.start : piece.stop]
            )
            return
        place = self._offset + piece.start * self.shape[1]
        aligned = not (place | rows.nbytes | rows.ctypes.data) % PAGE
        descriptor = self._direct if aligned and self._direct >= 0 else self._descriptor
        read_at(descriptor, rows, place)

    def _count_bytes(self, count: int) -> None:
        with self._lock:
            self.bytes_read += count


class SomeRows:
    """Rows of a table, the others left out.

    Parameters
    ----------
    rows : all rows.
    numbers : (m,) int64, which ones, rising.
    """

    def __init__(self, rows: StoredRows, numbers: np.ndarray) -> None:
        self.rows, self.numbers, self.step = rows, numbers, 1
        self.shape = len(numbers), rows.shape[1]

    def __len__(self) -> int:
        return self.shape[0]

    def load(self, start: int, stop: int, out: np.ndarray, *, checked: bool = True) -> np.ndarray:
        """Read rows `start` to `stop` of these into the beginning of `out`, as `StoredRows`."""
        step, done = max(1, SOME_BYTES // self.shape[1]), 0
        wanted = self.numbers[start:stop]
        while done < len(wanted):
            first = int(wanted[done])
            count = int(np.searchsorted(wanted, first + step)) - done
            own = wanted[done : done + count]
            memory = aligned_empty((int(own[-1]) + 1 - first, self.shape[1]), np.uint8)
            all_rows = self.rows.load(first, int(own[-1]) + 1, memory, checked=checked)
            np.take(all_rows, own - first, axis=0, out=out[done : done + count])
            done += count
        return out[: len(wanted)]

    def __getitem__(self, wanted: slice) -> np.ndarray:
        """Return a copy of some rows, as `StoredRows`."""
        return _copy(self, wanted)


def _copy(source: StoredRows | SomeRows, wanted: slice) -> np.ndarray:
    start, stop, step = wanted.indices(len(source))
    numbers = range(start, stop, step)
    rows = aligned_empty((len(numbers), source.shape[1]), np.uint8)
    if step == 1:
        return source.load(start, stop, rows)
    for place, number in enumerate(numbers):  # samples are few
        source.load(number, number + 1, rows[place : place + 1], checked=False)
    return rows


def _open_direct(path: Path) -> int:
    """Open a file so that reads go past the page cache; -1 where that cannot be."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except (OSError, AttributeError):
        return -1


def _close(descriptors: list[int], file: h5py.File | None) -> None:
    for descriptor in descriptors:
        if descriptor >= 0:
            os.close(descriptor)
    if file is not None:
        file.close()
