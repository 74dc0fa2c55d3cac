"""Files of plain arrays: npy, npz, safetensors, fvecs and its kin, fbin and its kin.

Shapes and sizes that a file states are compared with its length before anything is read.
"""

from __future__ import annotations

import json
import math
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from fastpair.backend import memory_budget
from fastpair.errors import DataError, FastpairError, FileError
from fastpair.hdf5 import reading
from fastpair.hdf5_arrays import MOST_TEXT_BYTES, ReadRows
from fastpair.ids import text_from_numpy

LONGEST_HEADER = 100 << 20
"""Bytes of the header of a safetensors file, at most; its own library has the same limit."""

MEMBER_ROWS = 1 << 13
"""Rows of a compressed array that are read together while others are passed over."""

SAFETENSORS_TYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?"},
    **{"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1"},
    **{"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1"},
}
"""Names of types in safetensors, and how they are stored."""

VECTOR_TYPES = {".fvecs": "<f4", ".bvecs": "u1", ".ivecs": "<i4"}
"""Suffixes of files whose rows begin with their length, int32, and the type of what follows."""

MATRIX_TYPES = {".fbin": "<f4", ".f16bin": "<f2", ".u8bin": "u1", ".i8bin": "i1", ".ibin": "<i4"}
"""Suffixes of files that begin with rows and columns, uint32, and the type of what follows."""


class MappedArrays:
    """Arrays that are mapped into memory; what stands in the file is what is read.

    Parameters
    ----------
    path : the file.
    arrays : by name.
    """

    format_name = "plain arrays"
    in_threads = True

    def __init__(self, path: Path, arrays: dict[str, np.ndarray]) -> None:
        self.path, self._arrays = path, arrays
        self.entries = {name: (a.shape, stored_type(path, a.dtype)) for name, a in arrays.items()}

    def read(self, name: str, start: int, stop: int) -> np.ndarray | pa.Array:
        """Rows `start` to `stop` of an array."""
        return _rows(self._arrays[name][start:stop], self.entries[name][1])

    def opened(self) -> AbstractContextManager[ReadRows]:
        """What reads as `read` does."""
        return nullcontext(self.read)

    def rows_together(self, name: str, least: int) -> int:
        """Rows that are read together: `least`."""
        return least


def stored_type(path: Path, dtype: np.dtype) -> np.dtype | str:
    """A type as `entries` have it: "text" for text, unless its values are unreasonably long."""
    if dtype.kind not in "SU":
        return dtype
    if dtype.itemsize > MOST_TEXT_BYTES or not dtype.itemsize:
        raise DataError(
            f"{path} holds text of {dtype.itemsize} bytes a value, but 1 to {MOST_TEXT_BYTES} are "
            "read; store shorter ids."
        )
    return "text"


def _rows(part: np.ndarray, kind: np.dtype | str) -> np.ndarray | pa.Array:
    return text_from_numpy(part) if kind == "text" and part.ndim == 1 else np.asarray(part)


# --- NumPy --------------------------------------------------------------------------------------


class NumpyArray(MappedArrays):
    """A .npy file, mapped; nothing pickled is loaded.

    Parameters
    ----------
    path : the file.
    """

    format_name = "NumPy arrays"

    def __init__(self, path: Path) -> None:
        with _numpy_errors(path):
            super().__init__(path, {"array": np.load(path, mmap_mode="r", allow_pickle=False)})


@contextmanager
def _numpy_errors(path: Path) -> Iterator[None]:
    with reading(path):
        try:
            yield
        except ValueError as error:
            if "allow_pickle" not in str(error) and "Python objects" not in str(error):
                raise
            raise DataError(
                f"{path} holds pickled Python objects, which are never loaded; "
                "save plain numbers or text with numpy.save instead."
            ) from error
        except FastpairError:
            raise
        except (
            Exception
        ) as error:  # the header is parsed as Python's literals, which fail in many ways
            raise OSError(str(error)) from error


class NumpyArchive:
    """A .npz file, compressed or not, read in order and never as a whole.

    Parameters
    ----------
    path : the file.
    """

    format_name = "NumPy arrays"
    in_threads = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, tuple[tuple[int, ...], np.dtype | str]] = {}
        self._members: dict[str, RowsInOrder] = {}
        with _numpy_errors(path), zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.filename.endswith(".npy"):
                    self._add(archive, member)
            workbook = "xl/workbook.xml" in archive.namelist()
        if not self.entries and workbook:
            raise FileError(f"{path} is an Excel workbook; save its sheet as CSV in UTF-8.")
        if not self.entries:
            raise FileError(
                f"{path} is a zip archive without arrays of NumPy; unpack it, or write the arrays "
                "with numpy.savez."
            )

    def _add(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
        with archive.open(member) as stream:
            shape, fortran, dtype = _read_header(stream)
            begin = stream.tell()
        if dtype.hasobject:
            raise ValueError("Python objects")
        if begin + math.prod(shape) * dtype.itemsize != member.file_size:
            raise ValueError(f"{member.filename} has another size than its shape {shape} says")
        name = member.filename.removesuffix(".npy")
        self.entries[name] = (shape, stored_type(self.path, dtype))
        read = _columns_first if fortran and len(shape) > 1 else _rows_first
        self._members[name] = RowsInOrder(
            lambda: read(self.path, member.filename, shape, dtype), dtype, shape[1:]
        )

    def read(self, name: str, start: int, stop: int) -> np.ndarray | pa.Array:
        """Rows `start` to `stop` of an array."""
        with _numpy_errors(self.path):
            return _rows(self._members[name].read(start, stop), self.entries[name][1])

    def opened(self) -> AbstractContextManager[ReadRows]:
        """What reads as `read` does."""
        return nullcontext(self.read)

    def rows_together(self, name: str, least: int) -> int:
        """Rows that are read together: `least`."""
        return least


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, and type, as the header of an array states them."""
    versions: dict[tuple[int, int], Callable[..., Any]] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(stream)
    if version not in versions:
        raise ValueError(f"version {version} of the npy format is not read")
    shape, fortran, dtype = versions[version](stream)
    if min(shape, default=0) < 0:
        raise ValueError(f"the shape {shape} is negative")
    return shape, fortran, dtype


def _rows_first(
    path: Path, member: str, shape: tuple[int, ...], dtype: np.dtype
) -> Iterator[np.ndarray]:
    """A member of an archive in blocks of rows; the archive notices a wrong checksum at the end."""
    width = math.prod(shape[1:]) * dtype.itemsize
    step = max(1, min(MEMBER_ROWS, (1 << 24) // max(1, width)))
    with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
        _read_header(stream)
        for start in range(0, shape[0] if shape else 1, step):
            count = min(step, shape[0] - start) if shape else 1
            block = stream.read(count * width)
            if len(block) < count * width:
                raise EOFError(f"{member} ends early")
            yield np.frombuffer(block, dtype).reshape(count, *shape[1:])
        if stream.read(1):
            raise ValueError(f"{member} is longer than its shape says")


def _columns_first(
    path: Path, member: str, shape: tuple[int, ...], dtype: np.dtype
) -> Iterator[np.ndarray]:
    """The same in Fortran order, whose rows are whole only when all is read."""
    size = math.prod(shape) * dtype.itemsize
    if size > memory_budget():
        raise DataError(
            f"{path}: {member} is in Fortran order and takes {size} bytes, more than there is; "
            "save it with numpy.ascontiguousarray."
        )
    with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
        _read_header(stream)
        content = stream.read()
    yield np.frombuffer(content, dtype).reshape(shape, order="F")


class RowsInOrder:
    """Rows of what can be read only from its beginning on; going back begins anew.

    Parameters
    ----------
    blocks : gives all rows in order, block by block.
    dtype : type of the rows.
    width : shape of a row.
    """

    def __init__(
        self,
        blocks: Callable[[], Iterator[np.ndarray]],
        dtype: np.dtype,
        width: tuple[int, ...],
    ) -> None:
        self._blocks, self._dtype, self._width = blocks, dtype, width
        self._coming: Iterator[np.ndarray] = iter(())
        self._block = np.empty((0, *width), dtype)
        self._first = -1  # row of the file in which the block begins; -1 before the first one
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`."""
        with self._lock:
            if self._first < 0 or start < self._first:
                self._coming, self._first = self._blocks(), 0
                self._block = np.empty((0, *self._width), self._dtype)
            rows = np.empty((stop - start, *self._width), self._dtype)
            at = start
            while at < stop:
                if at >= self._first + len(self._block):
                    self._first += len(self._block)
                    self._block = next(self._coming, self._block[:0])
                    if not len(self._block):
                        raise EOFError(f"it ends before row {stop}")
                    continue
                part = self._block[at - self._first : stop - self._first]
                rows[at - start : at - start + len(part)] = part
                at += len(part)
            if stop == self._first + len(self._block):
                self._finish()
            return rows

    def _finish(self) -> None:
        """Look at the next block, so that what is wrong at the very end is noticed."""
        following = next(self._coming, None)
        if following is not None:
            self._first += len(self._block)
            self._block = following


# --- safetensors --------------------------------------------------------------------------------


class Safetensors(MappedArrays):
    """A safetensors file: a header in JSON, then numbers; mapped.

    Parameters
    ----------
    path : the file.
    """

    format_name = "safetensors arrays"

    def __init__(self, path: Path) -> None:
        with reading(path):
            header, begin = _safetensors_header(path)
            content = np.memmap(path, np.uint8, "r")[begin:]
            self._short: set[str] = set()
            arrays = {}
            for name, about in header.items():
                if name != "__metadata__":
                    arrays[name] = self._array(name, about, content)
        super().__init__(path, arrays)
        for name in self._short:
            self.entries[name] = (arrays[name].shape, np.dtype(np.float32))

    def _array(self, name: str, about: dict[str, Any], content: np.ndarray) -> np.ndarray:
        shape, (begin, end) = tuple(about["shape"]), about["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise ValueError(f"the shape or the place of {name!r} is no number")
        if about["dtype"] not in SAFETENSORS_TYPES:
            return np.broadcast_to(np.zeros((), "V1"), shape)  # listed, but cannot be read
        kind = np.dtype(SAFETENSORS_TYPES[about["dtype"]])
        if end > len(content) or end - begin != math.prod(shape) * kind.itemsize:
            raise ValueError(f"{name!r} lies outside the file or has another size than its shape")
        if about["dtype"] == "BF16":
            self._short.add(name)
        return content[begin:end].view(kind).reshape(shape)

    def read(self, name: str, start: int, stop: int) -> np.ndarray | pa.Array:
        """Rows `start` to `stop` of an array; bfloat16 becomes float32, which holds it exactly."""
        rows = np.asarray(super().read(name, start, stop))
        if name in self._short:
            return (rows.astype(np.uint32) << 16).view(np.float32)
        return rows


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LONGEST_HEADER:
            raise ValueError(f"a header of {length} bytes is too long")
        text = file.read(length)
    header = json.loads(text)
    if len(text) < length or not isinstance(header, dict):
        raise ValueError("its header is cut short or no table")
    return header, 8 + length


def is_safetensors(path: Path, beginning: bytes) -> bool:
    """Whether a file begins with the length of a JSON header that fits into it."""
    length = int.from_bytes(beginning[:8], "little")
    return len(beginning) > 8 and beginning[8:9] == b"{" and 2 <= length < path.stat().st_size


# --- vectors as the benchmarks of nearest neighbours keep them ------------------------------------


class LengthFirstVectors(MappedArrays):
    """Vectors that each begin with their length: .fvecs, .bvecs, .ivecs.

    Parameters
    ----------
    path : the file; its suffix says the type.
    """

    format_name = "vectors (fvecs)"

    def __init__(self, path: Path) -> None:
        kind = np.dtype(VECTOR_TYPES[path.suffix.lower()])
        size = path.stat().st_size
        with reading(path), open(path, "rb") as file:
            columns = int.from_bytes(file.read(4), "little", signed=True)
        width = 4 + columns * kind.itemsize
        if columns < 1 or size % width:
            raise FileError(
                f"{path} is damaged or cut short: its first vector has {columns} numbers, which "
                f"does not fit its {size} bytes; make or fetch it again."
            )
        fields = np.dtype([("length", "<i4"), ("values", kind, (columns,))])
        self._records = np.memmap(path, fields, "r")
        super().__init__(path, {"vectors": self._records["values"]})

    def read(self, name: str, start: int, stop: int) -> np.ndarray | pa.Array:
        """Rows `start` to `stop`."""
        rows = super().read(name, start, stop)
        other = self._records["length"][start:stop] != rows.shape[1]
        if other.any():
            row = start + int(np.flatnonzero(other)[0])
            raise DataError(
                f"{self.path} has {self._records['length'][row]} numbers in row {row} (counted "
                f"from 0) and {rows.shape[1]} in row 0; all rows need the same."
            )
        return rows


class SizeFirstMatrix(MappedArrays):
    """A matrix after its numbers of rows and columns: .fbin, .u8bin, .i8bin, .ibin, .f16bin.

    Parameters
    ----------
    path : the file; its suffix says the type.
    """

    format_name = "a matrix (fbin)"

    def __init__(self, path: Path) -> None:
        kind = np.dtype(MATRIX_TYPES[path.suffix.lower()])
        size = path.stat().st_size
        with reading(path), open(path, "rb") as file:
            rows, columns = (int.from_bytes(file.read(4), "little") for _ in range(2))
        if size != 8 + rows * columns * kind.itemsize:
            raise FileError(
                f"{path} is damaged or cut short: {rows} rows of {columns} numbers do not make its "
                f"{size} bytes; make or fetch it again."
            )
        if not rows or not columns:
            raise DataError(f"{path} holds {rows} rows of {columns} numbers: nothing to read.")
        matrix = np.memmap(path, kind, "r", 8, (rows, columns))
        super().__init__(path, {"vectors": matrix})
