"""Files of typed columns, Parquet and Arrow; text of any kind becomes text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from fastpair.errors import DataError
from fastpair.hdf5 import reading

BATCH_ROWS = 1 << 15
"""Rows that are read together."""

BUFFERED_BYTES = 1 << 20
"""Bytes of a column of Parquet that are read together, however large its row groups are."""


MOST_DECODED_BYTES = 1 << 30
"""Bytes, at most, that the texts of a batch may take when its dictionary is resolved."""


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
        """The type of a column: that of the values if it is a dictionary, `pa.string()` of text."""
        return plain_type(self._schema.field(self.names.index(name)).type)

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
                    yield plain_batch(self.path, batch, names).slice(start)
                start = max(0, start - batch.num_rows)


class ArrowColumns:
    """An Arrow file (Feather of version 2) or stream, mapped into memory.

    Parameters
    ----------
    path : the file.
    """

    format_name = "Arrow columns"

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path), open(path, "rb") as file:
            self._stream = not file.read(6).startswith(b"ARROW1")
        with self._opened(None) as reader:
            self._schema = reader.schema
        self.names = list(self._schema.names)

    @contextmanager
    def _opened(
        self, columns: Sequence[int] | None
    ) -> Iterator[pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader]:
        options = pa.ipc.IpcReadOptions(
            included_fields=None if columns is None else sorted(set(columns)), use_threads=False
        )
        make = pa.ipc.open_stream if self._stream else pa.ipc.open_file
        with (
            reading(self.path),
            pa.memory_map(str(self.path)) as source,
            make(source, options=options) as reader,
        ):
            yield reader

    def _record_batches(self, columns: Sequence[int]) -> Iterator[pa.RecordBatch]:
        with self._opened(columns) as reader:
            if self._stream:
                yield from reader
            else:
                for number in range(reader.num_record_batches):
                    yield reader.get_batch(number)

    def type_of(self, name: str) -> pa.DataType:
        """The type of a column: that of the values if it is a dictionary, `pa.string()` of text."""
        return plain_type(self._schema.field(self.names.index(name)).type)

    def count_rows(self, names: Sequence[str]) -> int:
        """The number of rows, the sum of what all batches of the file state."""
        one = [self.names.index(name) for name in [*names, *self.names][:1]]
        return sum(batch.num_rows for batch in self._record_batches(one))

    def batches(
        self, names: Sequence[str], start: int = 0, numbers: Sequence[str] = ()
    ) -> Iterator[pa.RecordBatch]:
        """These columns, dictionaries resolved, from row `start`; `numbers` are as they are."""
        for batch in self._record_batches([self.names.index(name) for name in names]):
            if start >= batch.num_rows:
                start -= batch.num_rows
                continue
            with reading(self.path):
                batch.validate(full=True)  # offsets come from the file
            for at in range(start, batch.num_rows, BATCH_ROWS):
                yield plain_batch(self.path, batch.slice(at, BATCH_ROWS), names)
            start = 0


def plain_type(kind: pa.DataType) -> pa.DataType:
    """What values of a type become when they are read."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    return pa.string() if _is_odd_text(kind) else kind


def plain_batch(path: Path, batch: pa.RecordBatch, names: Sequence[str]) -> pa.RecordBatch:
    """These columns of a batch, dictionaries resolved and text of odd types as `pa.string()`."""
    plain = [_plain(path, name, batch.column(name)) for name in names]
    return pa.RecordBatch.from_arrays(plain, list(names))


def _plain(path: Path, name: str, values: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        _check_decoded(path, name, values)
        values = values.dictionary_decode()
    if not _is_odd_text(values.type):
        return values
    try:
        return values.cast(pa.string())
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{path} holds bytes in column {name!r} that are no text in UTF-8; store ids as text."
        ) from error


def _check_decoded(path: Path, name: str, values: pa.DictionaryArray) -> None:
    """Refuse a few long texts that stand in many rows: decoded they would take the memory."""
    texts = plain_type(values.type) == pa.string()
    longest = len(values.dictionary) and texts and pc.max(pc.binary_length(values.dictionary))
    if longest and (longest.as_py() or 0) * len(values) > MOST_DECODED_BYTES:
        raise DataError(
            f"{path} repeats texts of up to {longest.as_py()} bytes in column {name!r}, which "
            "would take too much memory; store shorter ids."
        )


def _is_odd_text(kind: pa.DataType) -> bool:
    """Whether a type holds text, or bytes that may be text, in another way than a string."""
    tests = (
        *(pa.types.is_string_view, pa.types.is_binary_view, pa.types.is_binary),
        *(pa.types.is_large_binary, pa.types.is_fixed_size_binary),
    )
    return any(test(kind) for test in tests)
