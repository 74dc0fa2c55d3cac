"""Lists of pairs for others: rows of keys and numbers as CSV, TSV (also compressed) or Parquet.

Keys are written as they came. A float32 is written as the shortest number that reads back to it.
Equal content gives equal bytes, whatever the sizes of the blocks.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastpair.errors import ArgumentError
from fastpair.ids import text_array
from fastpair.pairs import regroup_batches
from fastpair.staging import WRITING, Staging, writing

EXPORTED_PAIRS = 1 << 17
"""Pairs that are written together, and the row group of Parquet: equal content, equal bytes."""

SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""Suffixes of text files and the separators that they mean."""

TEXT_FORMATS = {
    suffix + packed: separator
    for packed in ("", ".gz", ".zst")
    for suffix, separator in SEPARATORS.items()
}
"""The same for compressed text files, too."""

GZIP_LEVEL = 4
"""How hard text is compressed: about half the time of the usual 6 for a few per cent more bytes."""

ScoredBlock = tuple[pa.Array, pa.Array, np.ndarray]
"""Left keys and right keys as they came, and their float32 scores, each (b,)."""


def export_format(path: str | Path) -> str | None:
    """The format that a suffix means: a suffix of text files, ".parquet", or None for others."""
    name = Path(path).name.lower()
    suffixes = [*TEXT_FORMATS, ".parquet"]
    return next((suffix for suffix in suffixes if name.endswith(suffix)), None)


def write_scored_pairs(
    path: str | Path,
    blocks: Iterable[ScoredBlock],
    *,
    names: tuple[str, str] = ("left", "right"),
    score: str = "score",
    overwrite: bool = False,
) -> int:
    """Write pairs and their scores as CSV, TSV (also .gz and .zst) or Parquet.

    Parameters
    ----------
    path : the file to make; its suffix says the format.
    blocks : keys and scores in order; only some of them are in memory at once.
    names : names of the key columns, default ("left", "right").
    score : name of the third column; with an underscore if a key has that name.
    overwrite : whether an existing file may be replaced, default False.

    Returns
    -------
    int
        The number of pairs written.

    Raises
    ------
    ArgumentError
        The suffix means none of these formats.
    FileError
        The file cannot be written.
    """
    while score in names:
        score += "_"
    empty = pa.array([], pa.string()), pa.array([], pa.string()), pa.array([], pa.float32())
    listed = ((left, right, pa.array(scores, pa.float32())) for left, right, scores in blocks)
    return write_listing(path, [*names, score], listed, empty, overwrite=overwrite)


def write_listing(
    path: str | Path,
    header: Sequence[str],
    blocks: Iterable[Sequence[pa.Array]],
    empty: Sequence[pa.Array],
    *,
    overwrite: bool = False,
) -> int:
    """Write rows as CSV, TSV (also .gz and .zst) or Parquet.

    Parameters
    ----------
    path : the file to make; its suffix says the format.
    header : names of the columns.
    blocks : the columns of some rows, all of one length; only some of them are in memory at once.
    empty : columns of no rows, which tell the types where there are no blocks.
    overwrite : whether an existing file may be replaced, default False.

    Returns
    -------
    int
        The number of rows written.

    Raises
    ------
    ArgumentError
        The suffix means none of these formats.
    FileError
        The file cannot be written.
    """
    suffix = export_format(path)
    if suffix is None:
        known = ", ".join([*TEXT_FORMATS, ".parquet"])
        raise ArgumentError(f"{path} has none of the suffixes of these formats: {known}.")
    batches = (pa.RecordBatch.from_arrays(list(block), list(header)) for block in blocks)
    nothing = pa.RecordBatch.from_arrays(list(empty), list(header))
    with Staging(path, overwrite=overwrite, suffix=WRITING) as staging:
        if suffix == ".parquet":
            return _write_parquet(staging, batches, nothing)
        with _text_output(staging, suffix) as file:
            return _write_text(file, header, batches, TEXT_FORMATS[suffix])


# --- text ---------------------------------------------------------------------------------------


@contextmanager
def _text_output(staging: Staging, suffix: str) -> Iterator[IO[bytes] | Any]:
    """The staged file, emptied, perhaps compressed; without name or time inside."""
    with writing(staging.path), ExitStack() as stack:
        file = stack.enter_context(open(staging.partial, "wb"))
        if suffix.endswith(".gz"):
            yield stack.enter_context(gzip.GzipFile("", "wb", GZIP_LEVEL, file, mtime=0))
        elif suffix.endswith(".zst"):
            yield stack.enter_context(pa.CompressedOutputStream(file, "zstd"))
        else:
            yield file


def _write_text(
    file: IO[bytes] | Any, header: Sequence[str], batches: Iterable[pa.RecordBatch], separator: str
) -> int:
    names = _quoted(pa.array(header), separator).to_pylist()
    file.write((separator.join(names) + "\n").encode())
    count = 0
    for batch in batches:
        for start in range(0, batch.num_rows, EXPORTED_PAIRS):
            lines = _lines(batch.slice(start, EXPORTED_PAIRS), separator)
            offsets = np.frombuffer(lines.buffers()[1], np.int32)[lines.offset :]
            file.write(lines.buffers()[2][int(offsets[0]) : int(offsets[len(lines)])])
        count += batch.num_rows
    return count


def _lines(batch: pa.RecordBatch, separator: str) -> pa.Array:
    """One text a row, with a newline at its end."""
    fields = []
    for column in batch.columns:
        if pa.types.is_floating(column.type):
            fields.append(pc.cast(column, pa.string()))
        else:
            fields.append(_quoted(text_array(column), separator))
    fields[-1] = pc.binary_join_element_wise(fields[-1], "", "\n")
    return pc.binary_join_element_wise(*fields, separator)


def _quoted(text: pa.Array, separator: str) -> pa.Array:
    """Text in quotes where CSV needs them."""
    special = pc.match_substring_regex(text, f'[{separator}"\r\n]')
    if not pc.any(special).as_py():
        return text
    doubled = pc.replace_substring(text, '"', '""')
    return pc.if_else(special, pc.binary_join_element_wise('"', doubled, '"', ""), text)


# --- Parquet ------------------------------------------------------------------------------------


def _write_parquet(
    staging: Staging, batches: Iterator[pa.RecordBatch], nothing: pa.RecordBatch
) -> int:
    first = next(batches, nothing)
    count = 0
    with ExitStack() as stack:
        with writing(staging.path):
            writer = stack.enter_context(pq.ParquetWriter(staging.partial, first.schema))
        for batch in regroup_batches(chain([first], batches), EXPORTED_PAIRS):
            with writing(staging.path):
                writer.write_batch(batch, row_group_size=EXPORTED_PAIRS)
            count += batch.num_rows
        with writing(staging.path):
            stack.close()
    return count
