"""Text files of columns, CSV and TSV, perhaps compressed: separators, first lines, rows counted.

Arrow parses; what Arrow does not say beforehand (separator, compression, number of rows) is found
here.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from fastpair.errors import ArgumentError, DataError, FastpairError, FileError
from fastpair.hdf5 import reading
from fastpair.kernels import lines

SAMPLE_BYTES = 1 << 20
"""Bytes of a text file that are looked at to see how it is made."""

SAMPLE_ROWS = 20
"""Rows of a text file that are looked at to find its separator."""

SEPARATORS = ",\t;|"
"""Separators of text files, the likeliest first; a space is tried where none of them is one."""

COUNTED_BYTES = 1 << 20
"""Bytes whose lines are counted together."""

COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bz2",
    b"\x04\x22\x4d\x18": "lz4",
}
"""First bytes of compressed files, and what Arrow calls their compression."""

OTHER_FORMATS = {
    b"\x80": "a Python pickle, which is never loaded because it can run code",
    b"PK\x03\x04": "a zip archive without arrays of NumPy; unpack it",
    b"\xfd7zXZ": "compressed by xz; decompress it",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"FEA1": "Feather of version 1; write version 2 or Parquet",
    b"SQLite format 3": "an SQLite database; export a table from it",
    b"%PDF": "a PDF document; export the data behind it",
    b"\xff\xfe": "text in UTF-16; save it as UTF-8",
    b"\xfe\xff": "text in UTF-16; save it as UTF-8",
}
"""First bytes of files that are not read, and what to say of them."""

OTHER_SUFFIXES = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "JSON; write its records as CSV or Parquet"),
    **dict.fromkeys((".html", ".htm", ".xml"), "a document; export the data behind it as CSV"),
}
"""Ends of names of text files that hold no columns, and what to say of them."""

KNOWN = "CSV, TSV, Parquet, Arrow, npy, npz, HDF5, h5ad, safetensors, word2vec, GloVe, fvecs, fbin"
"""The formats that are read, for messages."""


class TextColumns:
    """CSV or TSV, perhaps compressed by gzip, zstd, bz2 or lz4.

    Parameters
    ----------
    path : the file.
    separator : between fields, one character or "tab"; default: found by looking.

    Attributes
    ----------
    names : from the first line, or others once `without_header` was called.
    first : the fields of the first line.
    second : the fields of the second line, none if there is none.
    """

    format_name = "text columns (CSV, TSV)"

    def __init__(self, path: Path, separator: str | None = None) -> None:
        self.path = path
        self.compression = compression_of(path)
        with self._errors(), self._stream() as stream:
            sample = stream.read(SAMPLE_BYTES)
        tabs = path.name.lower().partition(".")[2].startswith(("tsv", "tab"))
        asked = None if separator is None else _one_character(separator)
        self._separator, rows = self._sniff(sample, asked or ("\t" if tabs else None))
        filled = [number for number, row in enumerate(rows) if row]
        if not filled:
            raise FileError(f"{path} is empty: it holds no rows; give a file that has some.")
        self._skip, self._header = filled[0] + 1, 1  # lines that Arrow skips; rows that are none
        self.first = rows[filled[0]]
        self.second = rows[filled[1]] if len(filled) > 1 else []
        self.names = list(self.first)

    def _stream(self) -> pa.NativeFile:
        return pa.input_stream(str(self.path), compression=self.compression)

    def _sniff(self, sample: bytes, separator: str | None) -> tuple[str, list[list[str]]]:
        """The separator that cuts all first lines into the same number of fields, most of all."""
        for beginning, what in OTHER_FORMATS.items():
            if sample.startswith(beginning):
                raise FileError(f"{self.path} is {what}; fastpair reads {KNOWN}.")
        if what := OTHER_SUFFIXES.get(self.path.suffix.lower(), ""):
            raise FileError(f"{self.path} is {what}; fastpair reads {KNOWN}.")
        if sample.startswith((b"PAR1", b"\x93NUMPY", b"\x89HDF", b"ARROW1")):
            raise FileError(
                f"{self.path} is a compressed file of a format that is read only as it is; "
                "decompress it first."
            )
        if b"\0" in sample:
            raise FileError(
                f"{self.path} is in no format that fastpair reads ({KNOWN}) or its text is not "
                "UTF-8; convert it to one of these."
            )
        text = sample.decode("utf-8-sig", errors="replace")
        if len(sample) == SAMPLE_BYTES:
            text = text[: text.rfind("\n") + 1] or text
        if separator is not None:
            return separator, _first_rows(text, separator)
        found = [(*_rank(rows := _first_rows(text, one)), one, rows) for one in SEPARATORS]
        best = max(found, key=lambda entry: entry[0])  # of equal ones the first
        if best[1] < 2:
            rows = _first_rows(text, " ")
            rank, width = _rank(rows)
            if width > 1 and rank >= 1000:
                return " ", rows
        return best[2], best[3]

    def without_header(self, names: Sequence[str] = ()) -> None:
        """Take the first line for data; the columns are then called by these names."""
        numbered = [f"column{number + 1}" for number in range(len(self.first))]
        self.names = [*names[: len(self.first)], *numbered[len(names) :]]
        self._skip, self._header = self._skip - 1, 0

    def type_of(self, name: str) -> pa.DataType:
        """Text, whatever is in the column."""
        return pa.string()

    def count_rows(self, names: Sequence[str]) -> int:
        """The number of rows; runs through the whole file, but does not parse it."""
        counter = LineCounter(self._separator)
        with self._errors(), self._stream() as stream:
            while block := stream.read(COUNTED_BYTES):
                counter.add(block)
        return max(0, counter.total() - self._header)

    def batches(
        self, names: Sequence[str], start: int = 0, numbers: Sequence[str] = ()
    ) -> Iterator[pa.RecordBatch]:
        """These columns, as text or as float64 `numbers`, from row `start`."""
        # Arrow knows the columns by their position: names may be empty or occur twice.
        wanted = [str(self.names.index(name)) for name in names]
        types = {at: pa.string() for at in wanted}
        types.update({str(self.names.index(name)): pa.float64() for name in numbers})
        with self._errors():
            reader = pacsv.open_csv(
                self._stream(),
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
    def _errors(self) -> Iterator[None]:
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
            if "UTF8" in words:
                raise DataError(
                    f"{self.path} holds text that is not UTF-8 ({words}); rows are counted from 1 "
                    "and with the header here: save it as UTF-8."
                ) from error
            malformed = "CSV parse error" in words
            kind = DataError if malformed else FileError  # such a file is whole
            raise kind(
                f"{self.path} is not whole or not well formed ({words}); rows are counted from 1 "
                "and with the header here: mend that place."
            ) from error


def compression_of(path: Path) -> str | None:
    """What Arrow calls the compression of a file, None if it has none."""
    with reading(path), open(path, "rb") as file:
        beginning = file.read(4)
    found = (name for magic, name in COMPRESSIONS.items() if beginning.startswith(magic))
    return next(found, None)


def _one_character(separator: str) -> str:
    character = {"tab": "\t", "\\t": "\t", "space": " "}.get(separator.lower(), separator)
    if len(character) != 1 or not character.isascii() or character in '\r\n"\0':
        raise ArgumentError(
            f"the separator is {separator!r}, expected one ASCII character, or tab or space."
        )
    return character


def _rank(rows: list[list[str]]) -> tuple[int, int]:
    """How well a separator cuts lines, and into how many fields the first one."""
    widths = {len(row) for row in rows if row}
    # Lines of different width: malformed, or cut by another separator; then the first line alone
    # says how good this one is.
    width = next((len(row) for row in rows if row), 0)
    return (1000 * width if len(widths) == 1 and width > 1 else width), width


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


class LineCounter:
    """Counts the rows of a text file as Arrow cuts them: no empty lines, no newlines in quotes.

    Parameters
    ----------
    separator : between fields, one ASCII character.
    """

    def __init__(self, separator: str) -> None:
        self._separator = ord(separator)
        self._state = np.zeros(1, np.int64)
        self._rows, self._begun = 0, False

    def add(self, block: bytes) -> None:
        """Count the rows that end in the next bytes."""
        if not self._begun:
            block, self._begun = block.removeprefix(b"\xef\xbb\xbf"), True
        if not block:
            return
        text = np.frombuffer(block, np.uint8)
        if self._state[0] == lines.QUOTED or b'"' in block:
            self._rows += int(lines.row_counter()(text, self._separator, self._state))
        else:
            self._rows += self._without_quotes(text, b"\r" in block)

    def _without_quotes(self, text: np.ndarray, returns: bool) -> int:
        """The same for bytes without quotes, at the speed of memory."""
        ends = text == ord("\n")
        if returns:
            ends |= text == ord("\r")
        rows = int(np.count_nonzero(ends[1:] > ends[:-1]))
        rows += int(ends[0] and self._state[0] != lines.LINE_START)
        within = lines.FIELD_START if text[-1] == self._separator else lines.UNQUOTED
        self._state[0] = lines.LINE_START if ends[-1] else within
        return rows

    def total(self) -> int:
        """The number of rows, one without a newline at its end included."""
        return self._rows + int(self._state[0] != lines.LINE_START)
