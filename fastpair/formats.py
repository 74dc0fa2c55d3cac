"""Files that others made, format by format: named columns or named arrays, in blocks of rows.

What the columns and arrays mean is `ingest`'s business. A new format is one class with the methods
of `Columns` or `Arrays`, and one line in `FORMATS`.
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from fastpair.errors import DataError, FastpairError, FileError
from fastpair.hdf5 import Hdf5Arrays, ReadRows, check_readable, reading
from fastpair.ids import text_from_numpy

SAMPLE_BYTES = 1 << 20
"""Bytes of a text file that are looked at to see how it is made."""

SAMPLE_ROWS = 20
"""Rows of a text file that are looked at to find its separator."""

SEPARATORS = ",\t;|"
"""Separators of text files, the likeliest first."""

BATCH_ROWS = 1 << 15
"""Rows that are read together from Parquet."""

BUFFERED_BYTES = 1 << 20
"""Bytes of a column of Parquet that are read together, however large its row groups are."""


class Columns(Protocol):
    """A file of named columns: CSV, Parquet."""

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
    """A file of named arrays: HDF5, npy, npz."""

    format_name: str
    path: Path
    entries: dict[str, tuple[tuple[int, ...], np.dtype | str]]

    def read(self, name: str, start: int, stop: int) -> np.ndarray | pa.Array:
        """Rows `start` to `stop` of an array; one column of text as `pa.string()`."""

    def opened(self) -> AbstractContextManager[ReadRows]:
        """What reads as `read` does, in several threads at once, from a file that stays open."""

    def rows_together(self, name: str, least: int) -> int:
        """Rows that are best read together: about `least`."""


# --- text ---------------------------------------------------------------------------------------


class TextColumns:
    """CSV or TSV, perhaps compressed by gzip.

    Parameters
    ----------
    path : the file.

    Attributes
    ----------
    names : from the first line, or others once `without_header` was called.
    first : the fields of the first line.
    """

    format_name = "text columns (CSV, TSV)"

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path), open(path, "rb") as file:
            self._compression = "gzip" if file.read(2) == b"\x1f\x8b" else None
        with (
            self._arrow_errors(),
            pa.input_stream(str(path), compression=self._compression) as stream,
        ):
            sample = stream.read(SAMPLE_BYTES)
        tabs = path.name.lower().removesuffix(".gz").endswith((".tsv", ".tab"))
        self._separator, rows = self._sniff(sample, "\t" if tabs else SEPARATORS)
        filled = [number for number, row in enumerate(rows) if row]
        if not filled:
            raise FileError(f"{path} is empty: it holds no rows; give a file that has some.")
        self._skip = filled[0] + 1
        self.first = rows[filled[0]]
        self.names = list(self.first)

    def _sniff(self, sample: bytes, separators: str) -> tuple[str, list[list[str]]]:
        """The separator that cuts all first lines into the same number of fields, most of all."""
        if b"\0" in sample:
            raise FileError(
                f"{self.path} is in no format that fastpair reads (CSV, TSV, Parquet, npy, npz, "
                "HDF5) or its text is not UTF-8; convert it to one of these."
            )
        text = sample.decode("utf-8-sig", errors="replace")
        if len(sample) == SAMPLE_BYTES:
            text = text[: text.rfind("\n") + 1] or text
        best: tuple[int, str, list[list[str]]] | None = None
        for separator in separators:
            rows = _first_rows(text, separator)
            widths = {len(row) for row in rows if row}
            # Lines of different width: malformed, or cut by another separator; then the first
            # line alone says how good this one is.
            width = next((len(row) for row in rows if row), 0)
            rank = 1000 * width if len(widths) == 1 and width > 1 else width
            if best is None or rank > best[0]:
                best = rank, separator, rows
        assert best is not None
        return best[1], best[2]

    def without_header(self, names: Sequence[str] = ()) -> None:
        """Take the first line for data; the columns are then called by these names."""
        numbered = [f"column{number + 1}" for number in range(len(self.first))]
        self.names = [*names, *numbered[len(names) :]]
        self._skip -= 1

    def type_of(self, name: str) -> pa.DataType:
        """Text, whatever is in the column."""
        return pa.string()

    def count_rows(self, names: Sequence[str]) -> int:
        """The number of rows; reads the whole file."""
        return sum(batch.num_rows for batch in self.batches(names))

    def batches(
        self, names: Sequence[str], start: int = 0, numbers: Sequence[str] = ()
    ) -> Iterator[pa.RecordBatch]:
        """These columns, as text or as float64 `numbers`, from row `start`."""
        # Arrow knows the columns by their position: names may be empty or occur twice.
        wanted = [str(self.names.index(name)) for name in names]
        types = {at: pa.string() for at in wanted}
        types.update({str(self.names.index(name)): pa.float64() for name in numbers})
        with self._arrow_errors():
            reader = pacsv.open_csv(
                pa.input_stream(str(self.path), compression=self._compression),
                read_options=pacsv.ReadOptions(
                    use_threads=False,  # names the row of an error, and is as fast
                    column_names=[str(number) for number in range(len(self.names))],
                    skip_rows_after_names=self._skip,
                ),
                parse_options=pacsv.ParseOptions(
                    delimiter=self._separator, newlines_in_values=True
                ),
                convert_options=pacsv.ConvertOptions(
                    column_types=types,
                    include_columns=wanted,
                    strings_can_be_null=False,
                    null_values=[""],
                ),
            )
            for batch in reader:
                if start < batch.num_rows:
                    yield batch.slice(start).rename_columns(list(names))
                start = max(0, start - batch.num_rows)

    @contextmanager
    def _arrow_errors(self) -> Iterator[None]:
        try:
            yield
        except FastpairError:
            raise
        except (pa.ArrowException, OSError) as error:
            words = " ".join(str(error).split()).rstrip(".")
            if "conversion error to double" in words:
                raise DataError(
                    f"{self.path} holds text where a number should be ({words}); rows are counted "
                    "from 1 and with the header here: mend or remove that column."
                ) from error
            raise FileError(
                f"{self.path} is not whole or not well formed ({words}); rows are counted from 1 "
                "and with the header here: mend that place."
            ) from error


def _first_rows(text: str, separator: str) -> list[list[str]]:
    rows: list[list[str]] = []
    try:
        for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator):
            rows.append(row)
            if sum(map(bool, rows)) == SAMPLE_ROWS:
                break
    except csv.Error:
        pass  # Arrow will say what is wrong, and where
    return rows


# --- Parquet ------------------------------------------------------------------------------------


class ParquetColumns:
    """A Parquet file.

    Parameters
    ----------
    path : the file.
    """

    format_name = "Parquet columns"

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path), pq.ParquetFile(path) as file:
            self._schema = file.schema_arrow
            self._group_rows = [
                file.metadata.row_group(number).num_rows
                for number in range(file.metadata.num_row_groups)
            ]
        self.names = list(self._schema.names)

    def type_of(self, name: str) -> pa.DataType:
        """The type of a column; that of the values if it is a dictionary."""
        kind = self._schema.field(self.names.index(name)).type
        return kind.value_type if pa.types.is_dictionary(kind) else kind

    def count_rows(self, names: Sequence[str]) -> int:
        """The number of rows, which the file states."""
        return sum(self._group_rows)

    def batches(
        self, names: Sequence[str], start: int = 0, numbers: Sequence[str] = ()
    ) -> Iterator[pa.RecordBatch]:
        """These columns, dictionaries resolved, from row `start`; `numbers` are as they are."""
        skipped = 0
        while skipped < len(self._group_rows) and start >= self._group_rows[skipped]:
            start -= self._group_rows[skipped]
            skipped += 1
        groups = list(range(skipped, len(self._group_rows)))
        with (
            reading(self.path),
            pq.ParquetFile(self.path, buffer_size=BUFFERED_BYTES, pre_buffer=False) as file,
        ):
            for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=list(names)):
                if start < batch.num_rows:
                    plain = [_without_dictionary(batch.column(name)) for name in names]
                    yield pa.RecordBatch.from_arrays(plain, list(names)).slice(start)
                start = max(0, start - batch.num_rows)


def _without_dictionary(values: pa.Array) -> pa.Array:
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


# --- NumPy --------------------------------------------------------------------------------------


class NumpyArrays:
    """A .npy file, mapped, or a .npz file, read when it is used; nothing pickled is loaded.

    Parameters
    ----------
    path : the file.
    """

    format_name = "NumPy arrays"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._arrays: dict[str, np.ndarray] = {}
        with _numpy_errors(path):
            if zipfile.is_zipfile(path):
                with np.load(path, allow_pickle=False) as archive:
                    members = {name: archive[name] for name in archive.files}
                self._arrays = {n: a for n, a in members.items() if isinstance(a, np.ndarray)}
            else:
                self._arrays = {"array": np.load(path, mmap_mode="r", allow_pickle=False)}
        self.entries: dict[str, tuple[tuple[int, ...], np.dtype | str]] = {
            name: (array.shape, "text" if array.dtype.kind in "SU" else array.dtype)
            for name, array in self._arrays.items()
        }

    def read(self, name: str, start: int, stop: int) -> np.ndarray | pa.Array:
        """Rows `start` to `stop` of an array."""
        part = self._arrays[name][start:stop]
        if self.entries[name][1] == "text" and part.ndim == 1:
            return text_from_numpy(part)
        return np.asarray(part)

    def opened(self) -> AbstractContextManager[ReadRows]:
        """What reads as `read` does."""
        return nullcontext(self.read)

    def rows_together(self, name: str, least: int) -> int:
        """Rows that are read together: `least`."""
        return least


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
        except zipfile.BadZipFile as error:
            raise OSError(str(error)) from error


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


def _is_hdf5(path: Path, beginning: bytes) -> bool:
    import h5py

    return bool(h5py.is_hdf5(path))


FORMATS: tuple[tuple[Callable[[Path, bytes], bool], Callable[[Path], Columns | Arrays]], ...] = (
    (lambda path, beginning: beginning.startswith(b"PAR1"), ParquetColumns),
    (lambda path, beginning: beginning.startswith((b"\x93NUMPY", b"PK\x03\x04")), NumpyArrays),
    (_is_hdf5, Hdf5Arrays),
    (lambda path, beginning: True, TextColumns),
)
"""How a file is recognised by its content -> how it is read; the first that fits."""


def open_format(path: str | Path) -> Columns | Arrays:
    """Open any accepted file.

    Parameters
    ----------
    path : the file; its content says what format it has.

    Returns
    -------
    Columns or Arrays

    Raises
    ------
    FileError
        The file is missing, empty, damaged, or of no known format.
    """
    path = check_readable(path)
    with reading(path), open(path, "rb") as file:
        beginning = file.read(16)
    if not beginning:
        raise FileError(f"{path} is empty: it holds nothing; give a file that has rows.")
    return next(make(path) for fits, make in FORMATS if fits(path, beginning))
