"""Files that others made: which format a file has, and named columns or arrays in blocks of rows.

What the columns and arrays mean is `ingest`'s and `pairs`' business. A new format is one class with
the methods of `Columns` or `Arrays`, and one line in `open_format`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from fastpair.arrays import (
    MATRIX_TYPES,
    VECTOR_TYPES,
    LengthFirstVectors,
    NumpyArchive,
    NumpyArray,
    Safetensors,
    SizeFirstMatrix,
    is_safetensors,
)
from fastpair.columnar import ArrowColumns, ParquetColumns
from fastpair.errors import FileError
from fastpair.hdf5 import check_readable, reading
from fastpair.hdf5_arrays import FOLLOW, REFUSE, Hdf5Arrays, ReadRows
from fastpair.text import TextColumns
from fastpair.word_vectors import WordVectors, find_layout


@dataclass(frozen=True)
class ReadOptions:
    """How a file is to be read where it does not say so itself.

    Parameters
    ----------
    separator : between the fields of a text file, one character, "tab" or "space"; default: found.
    header : whether the first line of a text file names its columns; default: found.
    follow_links : whether data of an HDF5 file may lie in other files, default False.
    """

    separator: str | None = None
    header: bool | None = None
    follow_links: bool = False

    @property
    def of_links(self) -> ReadOptions:
        """What of it concerns embeddings where the rest is meant for pairs."""
        return ReadOptions(follow_links=self.follow_links)


AS_FOUND = ReadOptions()
"""Nothing is said: all is found by looking."""


class Columns(Protocol):
    """A file of named columns: CSV, Parquet, Arrow."""

    format_name: str
    path: Path
    names: list[str]

    def type_of(self, name: str) -> pa.DataType:
        """The type of a column, `pa.string()` for all columns of text files."""

    def count_rows(self, names: Sequence[str]) -> int:
        """The number of rows; text files are read once to the end for it."""

    def batches(
        self, names: Sequence[str], start: int = 0, numbers: Sequence[str] = ()
    ) -> Iterator[pa.RecordBatch]:
        """These columns in this order, from row `start`; text files give text, or `numbers`."""


@runtime_checkable
class Arrays(Protocol):
    """A file of named arrays: HDF5, npy, npz, safetensors, word vectors, fvecs, fbin."""

    format_name: str
    path: Path
    entries: dict[str, tuple[tuple[int, ...], np.dtype | str]]
    in_threads: bool

    def read(self, name: str, start: int, stop: int) -> np.ndarray | pa.Array:
        """Rows `start` to `stop` of an array; one column of text as `pa.string()`."""

    def opened(self) -> AbstractContextManager[ReadRows]:
        """What reads as `read` does, from a file that stays open; see `in_threads`."""

    def rows_together(self, name: str, least: int) -> int:
        """Rows that are best read together: about `least`."""


# --- what they hold -----------------------------------------------------------------------------


def arrays_listed(file: Arrays) -> str:
    """What a file holds, for messages."""
    entries = list(file.entries.items())
    listed = ", ".join(f"{name!r} {shape} {dtype}" for name, (shape, dtype) in entries[:12])
    return f"{listed} and {len(entries) - 12} more" if len(entries) > 12 else listed or "nothing"


def is_number(text: str) -> bool:
    """Whether text can be read as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def is_numeric_type(kind: pa.DataType) -> bool:
    """Whether a column holds integers or floats."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def numpy_type(kind: pa.DataType) -> np.dtype:
    """The NumPy type of a column of numbers."""
    floats = {"halffloat": "float16", "float": "float32", "double": "float64"}
    return np.dtype(floats.get(str(kind), str(kind)))


def is_text_type(kind: pa.DataType) -> bool:
    """Whether a column holds text."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


# --- which format -------------------------------------------------------------------------------


def open_format(
    path: str | Path, options: ReadOptions = AS_FOUND, *, pairs: bool = False
) -> Columns | Arrays:
    """Open any accepted file.

    Parameters
    ----------
    path : the file; its content says what format it has, its suffix where content cannot.
    options : what the file does not say itself.
    pairs : whether pairs are meant, so that text holds columns and no word vectors; default False.

    Returns
    -------
    Columns or Arrays

    Raises
    ------
    FileError
        The file is missing, empty, damaged, or of no known format.
    """
    import h5py

    path = check_readable(path)
    with reading(path), open(path, "rb") as file:
        beginning = file.read(16)
    if not beginning:
        raise FileError(f"{path} is empty: it holds nothing; give a file that has rows.")
    if beginning.startswith(b"PAR1"):
        return ParquetColumns(path)
    if beginning.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return ArrowColumns(path)
    if beginning.startswith(b"\x93NUMPY"):
        return NumpyArray(path)
    if beginning.startswith(b"PK\x03\x04"):
        return NumpyArchive(path)
    if h5py.is_hdf5(path):
        return Hdf5Arrays(path, FOLLOW if options.follow_links else REFUSE)
    if path.suffix.lower() in VECTOR_TYPES:
        return LengthFirstVectors(path)
    if path.suffix.lower() in MATRIX_TYPES:
        return SizeFirstMatrix(path)
    if is_safetensors(path, beginning):
        return Safetensors(path)
    layout = None if pairs or options.separator or options.header else find_layout(path)
    return TextColumns(path, options.separator) if layout is None else WordVectors(path, layout)
