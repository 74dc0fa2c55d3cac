"""Pairs out of any accepted file: keys become rows of the tables, labels become numbers.

Row numbers that come out are inside the tables, ids are known. Rows in messages are counted from 0,
without a header.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpair.backend import in_order
from fastpair.columns import LABEL_WORDS, find_columns, has_usual_names, parse_labels
from fastpair.errors import ArgumentError, DataError
from fastpair.formats import (
    BATCH_ROWS,
    Arrays,
    Columns,
    TextColumns,
    arrays_listed,
    is_number,
    is_text_type,
    open_format,
)
from fastpair.hdf5 import reading
from fastpair.ids import RowsOfIds, all_integers, text_array, text_from_numpy

ARRAY_PAIRS = 1 << 18
"""Pairs of integers that are read together from arrays."""

ARRAY_TEXTS = 1 << 16
"""Pairs of text that are read together from arrays."""

KEY_BYTES = 1 << 22
"""Bytes of keys that a thread turns into rows together; it needs a few times as much for that."""

MOST_READERS = 8
"""Threads that read and look up keys; more would take memory and find nothing to do."""

Known = Callable[[str, str], bool]
"""Whether two keys are ids of the left and of the right table."""


class ReadBatches(Protocol):
    """Gives left, right, perhaps label, then further columns from a row on, batch by batch."""

    def __call__(self, start: int, threads: int = 1) -> Iterator[pa.RecordBatch]:
        """Batches in order; arrays are read by so many threads."""


@dataclass(frozen=True)
class PairBlock:
    """Some consecutive pairs.

    Parameters
    ----------
    start : the row of the file that the first pair stands in.
    left, right : rows of the tables, (b,) int32 or int64, C-contiguous, inside the tables.
    label : (b,) float64, or None.
    left_keys, right_keys : the keys as the file has them, (b,), or None if they were not kept.
    extra : further columns that were asked for, each (b,) as the file has it.
    """

    start: int
    left: np.ndarray
    right: np.ndarray
    label: np.ndarray | None
    left_keys: pa.Array | None
    right_keys: pa.Array | None
    extra: tuple[pa.Array, ...] = ()


@dataclass(frozen=True)
class RawPairs:
    """Keys as they stand in a file, before they are looked up.

    Parameters
    ----------
    path : the file.
    names : of the two key columns; ("left", "right") where there are none.
    count : M, the number of pairs.
    label : name of the label column, None if there is none.
    has_labels : whether batches have labels as a third column.
    integers : whether both keys are stored as integers, which are rows unless ids say other.
    read : gives batches of left, right, perhaps label, then further columns from a row on.
    together : pairs of the largest batch that `read` gives, or about so many.
    """

    path: Path
    names: tuple[str, str]
    count: int
    label: str | None
    has_labels: bool
    integers: bool
    read: ReadBatches
    together: int


class PairSource:
    """Pairs in a file, read block by block.

    Attributes
    ----------
    path : the file.
    names : the names of its key columns; ("left", "right") where it has none.
    count : M, the number of pairs.
    keys : "rows" or "ids", what the keys of the file are.
    assumed : a sentence on why they are taken for that; empty if it was asked for.
    has_labels : whether blocks carry labels.
    """

    def __init__(
        self,
        raw: RawPairs,
        keys: str,
        assumed: str,
        tables: tuple[tuple[pa.Array | None, int], tuple[pa.Array | None, int]],
        signed: bool,
        unknown: tuple[int | None, int | None] = (None, None),
    ) -> None:
        self._unknown = unknown
        self.path, self.names, self.count = raw.path, raw.names, raw.count
        self.keys, self.assumed, self.has_labels = keys, assumed, raw.has_labels
        self._raw, self._signed = raw, signed
        self._counts = tables[0][1], tables[1][1]
        if keys == "ids":
            left = RowsOfIds(tables[0][0])
            same = tables[0][0] is tables[1][0]
            self._rows_of = left, left if same else RowsOfIds(tables[1][0])

    def blocks(
        self, size: int, start: int = 0, *, keep_keys: bool = False, threads: int = 1
    ) -> Iterator[PairBlock]:
        """The pairs in order.

        Parameters
        ----------
        size : pairs a block; the last one may have fewer.
        start : the pair to begin with, default 0.
        keep_keys : whether blocks have the keys as the file has them, default False.
        threads : how many threads may read, decompress and look up, default 1: the caller's.

        Yields
        ------
        PairBlock

        Raises
        ------
        DataError
            A row is outside the table, an id is unknown, or a label is not one.
        """
        threads = min(threads, MOST_READERS)
        pieces = _pieces(self._raw.read(start, threads), start, size)
        parts: list[PairBlock] = []
        waiting = 0
        for part in in_order(lambda piece: self._block(*piece, keep_keys), pieces, threads):
            parts.append(part)
            waiting += len(part.left)
            if waiting == size:
                yield _one_block(parts)
                parts, waiting = [], 0
        if parts:
            yield _one_block(parts)

    def reading_bytes(self, threads: int = 1) -> int:
        """About how many bytes a reader of blocks needs besides, whatever the size of the blocks.

        Reads the first pairs if the keys are ids.
        """
        under_way = 1 if threads == 1 else 2 * min(threads, MOST_READERS) + 1
        ids = self.keys == "ids"
        batch = self.bytes_a_pair(keep_keys=ids) * min(self._raw.together, self.count)
        looking_up = sum(rows_of.nbytes for rows_of in set(self._rows_of)) if ids else 0
        return 2 * batch + under_way * (3 * min(batch, KEY_BYTES) if ids else batch) + looking_up

    def bytes_a_pair(self, *, keep_keys: bool = False) -> int:
        """About how many bytes a pair of a block takes; reads the first pairs for kept keys."""
        numbers = 2 * 8 + (8 if self.has_labels else 0)
        first = next(self._raw.read(0)) if keep_keys else None
        if first is None or not first.num_rows:
            return numbers
        return numbers + -(-(first.column(0).nbytes + first.column(1).nbytes) // first.num_rows)

    def _block(self, batch: pa.RecordBatch, start: int, keep_keys: bool) -> PairBlock:
        left, right = self._rows(batch.column(0), batch.column(1), start)
        label = None
        if self.has_labels:
            label = parse_labels(batch.column(2), str(self.path), start)
            if self._signed:
                label = (label + 1) / 2
        kept = (batch.column(0), batch.column(1)) if keep_keys else (None, None)
        extra = tuple(batch.columns[3 if self.has_labels else 2 :])
        return PairBlock(start, left, right, label, kept[0], kept[1], extra)

    def _rows(self, left: pa.Array, right: pa.Array, start: int) -> tuple[np.ndarray, np.ndarray]:
        sides = [
            Side(str(self.path), self.names[number], keys, start, self._counts[number])
            for number, keys in enumerate((left, right))
        ]
        if self.keys == "rows":
            return sides[0].row_numbers(), sides[1].row_numbers()
        texts = [side.texts() for side in sides]
        found = [rows_of(text) for rows_of, text in zip(self._rows_of, texts, strict=True)]
        left, right = (
            side.known(text, rows, instead)
            for side, text, rows, instead in zip(sides, texts, found, self._unknown, strict=True)
        )
        return left, right


@dataclass(frozen=True)
class Side:
    """The keys of one side of a block of pairs.

    Parameters
    ----------
    path, name : the file and its column, for messages.
    keys : as the file has them, (b,).
    start : the row of the file of the first key, for messages.
    count : rows of the table.
    """

    path: str
    name: str
    keys: pa.Array
    start: int
    count: int

    def where(self, bad: np.ndarray) -> str:
        """The first bad key and its place, for messages."""
        row = int(np.flatnonzero(bad)[0])
        key = self.keys[row].as_py()
        return f"{self.path} has {key!r} as {self.name} in row {self.start + row} (counted from 0)"

    def _refuse(self, bad: np.ndarray, rest: str) -> None:
        if bad.any():
            raise DataError(f"{self.where(bad)}{rest}")

    def _refuse_missing(self) -> None:
        if self.keys.null_count:
            missing = self.keys.is_null().to_numpy(zero_copy_only=False)
            self._refuse(missing, ", so the key is missing; every pair needs both keys.")

    def row_numbers(self) -> np.ndarray:
        """Keys as row numbers of the table, (b,) integers."""
        self._refuse_missing()
        signed = pa.types.is_signed_integer(self.keys.type)
        rows = self.keys.to_numpy() if signed else self._integers()
        if len(rows) and (rows.min() < 0 or rows.max() >= self.count):
            self._refuse(
                (rows < 0) | (rows >= self.count),
                f", but row numbers go from 0 to {self.count - 1}; use the rows of this table.",
            )
        return rows

    def _integers(self) -> np.ndarray:
        kind, rest = self.keys.type, ", which is no row number; whole numbers are needed, or ids"
        if is_text_type(kind):
            try:
                return np.ascontiguousarray(self.keys.cast(pa.int64()).to_numpy())
            except pa.ArrowInvalid:
                good = pc.match_substring_regex(self.keys, r"^-?[0-9]{1,18}$")
            bad = ~good.to_numpy(zero_copy_only=False)
            self._refuse(bad, f"{rest} together with embeddings that carry ids.")
        elif pa.types.is_floating(kind):
            numbers = self.keys.to_numpy(zero_copy_only=False).astype(np.float64)
            bad = ~((numbers == np.floor(numbers)) & (np.abs(numbers) < 2.0**53))
            self._refuse(bad, f"{rest}.")
        elif not pa.types.is_integer(kind):
            raise DataError(
                f"{self.path} has keys of type {kind} in {self.name}; "
                "keys are whole numbers (rows of the table) or text (ids)."
            )
        elif pa.types.is_uint64(kind):
            return np.minimum(self.keys.to_numpy(), np.uint64(2**63 - 1)).astype(np.int64)
        return np.ascontiguousarray(self.keys.cast(pa.int64()).to_numpy())

    def texts(self) -> pa.Array:
        """Keys as text to look up; integers become their decimal text."""
        self._refuse_missing()
        keys = pa.array(self._integers()) if pa.types.is_floating(self.keys.type) else self.keys
        if not is_text_type(keys.type) and not pa.types.is_integer(keys.type):
            self._integers()  # says what is wrong with the type
        texts = text_array(keys)
        empty = pc.equal(pc.binary_length(texts), 0)
        if pc.any(empty).as_py():
            self._refuse(
                empty.to_numpy(zero_copy_only=False),
                ", so the id is empty; every pair needs two ids.",
            )
        return texts

    def known(self, texts: pa.Array, found: np.ndarray, instead: int | None) -> np.ndarray:
        """Rows that were looked up, (b,) int64; an id that is unknown, -1, gets the row `instead`.

        Where that is None, it is refused.
        """
        if instead is not None:
            return np.where(found < 0, instead, found)
        if found.min(initial=0) < 0:
            unknown = found < 0
            examples = pc.unique(texts.filter(pa.array(unknown))).slice(0, 3).to_pylist()
            row = self.start + int(np.flatnonzero(unknown)[0])
            shown = ", ".join(repr(example) for example in examples)
            rows = " or say --keys rows if they are row numbers" if all_integers(texts) else ""
            raise DataError(
                f"{self.path} has unknown ids as {self.name}, {unknown.sum()} in this block, "
                f"such as {shown}, the first in row {row} (counted from 0); "
                f"use ids that the embeddings carry{rows}."
            )
        return found


def _pieces(
    batches: Iterable[pa.RecordBatch], start: int, size: int
) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Batches and their first rows, cut at every `size` rows and where keys come to `KEY_BYTES`."""
    begin = start
    for batch in batches:
        most = max(1, batch.num_rows * KEY_BYTES // max(batch.nbytes, 1))
        while batch.num_rows:
            piece = batch.slice(0, min(most, size - (start - begin) % size))
            yield piece, start
            batch = batch.slice(piece.num_rows)
            start += piece.num_rows


def regroup_batches(batches: Iterable[pa.RecordBatch], size: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches that end at every multiple of `size`."""
    waiting: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        while batch.num_rows:
            part = batch.slice(0, size - count)
            batch = batch.slice(part.num_rows)
            waiting.append(part)
            count += part.num_rows
            if count == size:
                yield _one_batch(waiting)
                waiting, count = [], 0
    if waiting:
        yield _one_batch(waiting)


def _one_batch(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    if len(batches) == 1:
        return batches[0]
    columns = range(batches[0].num_columns)
    arrays = [pa.concat_arrays([batch.column(number) for batch in batches]) for number in columns]
    return pa.RecordBatch.from_arrays(arrays, schema=batches[0].schema)


def _one_block(parts: list[PairBlock]) -> PairBlock:
    # Most files keep int32, and then half as much is copied here and read by who scores.
    small = all(side.dtype == np.int32 for part in parts for side in (part.left, part.right))
    kind = np.int32 if small else np.int64
    if len(parts) == 1:
        rows = [np.ascontiguousarray(side, kind) for side in (parts[0].left, parts[0].right)]
        return replace(parts[0], left=rows[0], right=rows[1])
    labels = [part.label for part in parts if part.label is not None]
    left_keys = [part.left_keys for part in parts if part.left_keys is not None]
    right_keys = [part.right_keys for part in parts if part.right_keys is not None]
    return PairBlock(
        start=parts[0].start,
        left=np.concatenate([part.left for part in parts], dtype=kind),
        right=np.concatenate([part.right for part in parts], dtype=kind),
        label=np.concatenate(labels) if labels else None,
        left_keys=pa.concat_arrays(left_keys) if left_keys else None,
        right_keys=pa.concat_arrays(right_keys) if right_keys else None,
        extra=tuple(pa.concat_arrays(list(c)) for c in zip(*(p.extra for p in parts), strict=True)),
    )


def open_pairs(
    path: str | Path,
    *,
    ids: pa.Array | None,
    count: int,
    right_ids: pa.Array | None = None,
    right_count: int | None = None,
    left_column: str | None = None,
    right_column: str | None = None,
    label_column: str | None = None,
    want_labels: bool = False,
    keys: str = "auto",
    signed_labels: bool = True,
    dataset: str | None = None,
    extra: Sequence[str] = (),
    unknown: tuple[int | None, int | None] = (None, None),
) -> PairSource:
    """Open pairs in any accepted format.

    Parameters
    ----------
    path : CSV, TSV (also .gz), Parquet, .npy, .npz or HDF5.
    ids, count : ids (unique text, or None) and number of rows of the left table.
    right_ids, right_count : of the right table, default the same table.
    left_column, right_column, label_column : names of columns, default found by their usual names.
    want_labels : whether blocks carry labels, default False.
    keys : "rows", "ids", or "auto": ids where the table has them and the keys may be ids.
    signed_labels : whether labels that are all -1 or 1 become 0 and 1, default True.
    dataset : name of the (M, 2) array in HDF5 or .npz, default `pairs` or the only one.
    extra : names of further columns (or arrays) that blocks carry, default none.
    unknown : the rows that stand for unknown ids of the left and of the right table; default
        None: unknown ids are refused.

    Returns
    -------
    PairSource

    Raises
    ------
    FileError
        The file is missing, damaged, malformed, or of no known format.
    DataError
        It holds no pairs, or its columns cannot be told from each other.
    """
    if keys not in ("auto", "rows", "ids"):
        raise ArgumentError(f"keys is {keys!r}, but must be 'auto', 'rows' or 'ids'.")
    left_table = (ids, count)
    right_table = left_table if right_count is None else (right_ids, right_count)

    def known(left: str, right: str) -> bool:
        both = ((left_table[0], left), (right_table[0], right))
        return all(table is not None and pc.index(table, key).as_py() >= 0 for table, key in both)

    raw = open_raw_pairs(
        path,
        left_column,
        right_column,
        label_column,
        want_labels=want_labels,
        dataset=dataset,
        extra=extra,
        known=known,
    )
    meaning, assumed = _meaning(raw, keys, left_table[0], right_table[0])
    signed = signed_labels and raw.has_labels and _signed_labels(raw)
    return PairSource(raw, meaning, assumed, (left_table, right_table), signed, unknown)


def open_raw_pairs(
    path: str | Path,
    left: str | None = None,
    right: str | None = None,
    label: str | None = None,
    *,
    want_labels: bool = False,
    dataset: str | None = None,
    extra: Sequence[str] = (),
    known: Known | None = None,
) -> RawPairs:
    """Keys and labels of a pair file as they are; `known` tells a header from a first pair."""
    file = open_format(path)
    if isinstance(file, Arrays):
        raw = _array_pairs(file, dataset, (left, right, label), want_labels, extra)
    elif dataset is not None:
        raise ArgumentError(f"--dataset {dataset} has no meaning for the table of columns {path}.")
    else:
        raw = _column_pairs(file, (left, right, label), want_labels, extra, known)
    if not raw.count:
        raise DataError(f"{path} holds no pairs; give a file that has some.")
    return raw


def _meaning(
    raw: RawPairs, keys: str, ids: pa.Array | None, right_ids: pa.Array | None
) -> tuple[str, str]:
    """What keys are, rows or ids, and a sentence on why."""
    without = "the embeddings carry" if ids is None else "the right table carries"
    if ids is None and right_ids is not None:
        without = "the left table carries"
    have_ids = ids is not None and right_ids is not None
    if keys == "ids" and not have_ids:
        raise ArgumentError(
            f"the keys of {raw.path} shall be ids, but {without} none; "
            "use row numbers, or embeddings with ids."
        )
    if keys != "auto":
        return keys, ""
    if not have_ids:
        return "rows", f"keys are row numbers, because {without} no ids"
    if not raw.integers:
        return "ids", "keys are ids, because the embeddings carry ids"
    if all_integers(ids) and all_integers(right_ids):
        return "ids", "integers are ids, because all ids of the embeddings are integers"
    return "rows", "integers are row numbers, because the ids of the embeddings are text"


def _signed_labels(raw: RawPairs) -> bool:
    """Whether all labels are -1 or 1 and some are -1; reads the labels once, and so checks them."""
    start, negative, others = 0, False, False
    for batch in raw.read(0):
        labels = parse_labels(batch.column(2), str(raw.path), start)
        negative |= bool((labels == -1).any())
        others |= bool((np.abs(labels) != 1).any())
        start += batch.num_rows
    return negative and not others


def _column_pairs(
    file: Columns,
    asked: tuple[str | None, str | None, str | None],
    want_labels: bool,
    extra: Sequence[str],
    known: Known | None,
) -> RawPairs:
    unnamed = asked == (None, None, None)
    if isinstance(file, TextColumns) and unnamed and _is_pair(file.first, known):
        file.without_header(("left", "right", "label")[: len(file.first)])
    left, right, label = find_columns(str(file.path), file.names, *asked, want_labels=want_labels)
    columns = [left, right] + ([label] if want_labels and label is not None else [])
    for name in extra:
        if list(file.names).count(name) != 1:
            raise DataError(
                f"{file.path} has no single column {name!r}; its columns are "
                f"{', '.join(map(repr, file.names))}."
            )
    read = list(dict.fromkeys([*columns, *extra]))  # a column may be asked for twice

    def batches(start: int, threads: int = 1) -> Iterator[pa.RecordBatch]:
        for batch in file.batches(read, start):
            yield batch.select([read.index(name) for name in [*columns, *extra]])

    return RawPairs(
        path=file.path,
        names=(left, right),
        count=file.count_rows(read),
        label=label,
        has_labels=len(columns) == 3,
        integers=all(pa.types.is_integer(file.type_of(name)) for name in (left, right)),
        read=batches,
        together=BATCH_ROWS,
    )


def _is_pair(first: Sequence[str], known: Known | None) -> bool:
    """Whether a first line is no header but a pair, of row numbers or of known ids."""
    if len(first) not in (2, 3):
        return False
    if all(map(is_number, first)):
        return True
    if known is None or has_usual_names(first) or not known(first[0], first[1]):
        return False
    return len(first) == 2 or is_number(first[2]) or first[2].strip().lower() in LABEL_WORDS


def _array_pairs(
    file: Arrays,
    dataset: str | None,
    asked: tuple[str | None, str | None, str | None],
    want_labels: bool,
    extra: Sequence[str],
) -> RawPairs:
    left, right = asked[0] or "left", asked[1] or "right"
    if dataset is None and left in file.entries and right in file.entries:
        sources: list[tuple[str, int | None]] = [(left, None), (right, None)]
    else:
        name = _pair_array(file, dataset)
        sources = [(name, 0), (name, 1)]
        left, right = "left", "right"
    count = file.entries[sources[0][0]][0][0]
    label = asked[2] or ("label" if "label" in file.entries else None)
    names = [name for name, _ in sources] + ([label] if want_labels and label else [])
    for name in [*names, *extra]:
        if name not in file.entries or file.entries[name][0][:1] != (count,):
            raise DataError(
                f"{file.path} has no array {name!r} of {count} rows; "
                f"it holds {arrays_listed(file)}."
            )
    if want_labels and label is None:
        raise DataError(
            f"{file.path} has no labels but labels are needed; it holds {arrays_listed(file)}: "
            "name the array with labels with --label."
        )

    integers = all(not isinstance(file.entries[name][1], str) for name, _ in sources)
    least = ARRAY_PAIRS if integers else ARRAY_TEXTS
    together = max(file.rows_together(name, least) for name in names) if integers else least

    def read(start: int, threads: int = 1) -> Iterator[pa.RecordBatch]:
        if start >= count:
            return
        ends = [*range(start // together * together + together, count, together), count]
        with reading(file.path), file.opened() as read_rows:

            def batch(part: tuple[int, int]) -> pa.RecordBatch:
                parts = {name: read_rows(name, *part) for name in {*names, *extra}}
                arrays = [_arrow(parts[name], column) for name, column in sources]
                arrays += [_arrow(parts[name], None) for name in [*names[2:], *extra]]
                return pa.RecordBatch.from_arrays(arrays, [str(n) for n in range(len(arrays))])

            yield from in_order(batch, pairwise([start, *ends]), threads)

    return RawPairs(
        file.path, (left, right), count, label, len(names) == 3, integers, read, together
    )


def is_key(dtype: np.dtype | str) -> bool:
    """Whether an array of this type may hold keys: text or integers."""
    return isinstance(dtype, str) or dtype.kind in "iu"


def _arrow(values: np.ndarray | pa.Array, column: int | None) -> pa.Array:
    if not isinstance(values, np.ndarray):
        return values
    one = values if column is None else values[:, column]
    if one.dtype.kind in "SUO":
        return text_from_numpy(one)
    return pa.array(np.ascontiguousarray(one).astype(one.dtype.newbyteorder("="), copy=False))


def _pair_array(file: Arrays, dataset: str | None) -> str:
    entries = file.entries
    if dataset is not None and dataset not in entries:
        raise DataError(f"{file.path} has no array {dataset!r}; it holds {arrays_listed(file)}.")
    keys = [name for name, (shape, dtype) in entries.items() if len(shape) == 2 and is_key(dtype)]
    usual = ["pairs"] if "pairs" in entries else keys if len(keys) == 1 else list(entries)
    names = [dataset] if dataset is not None else usual
    if len(names) != 1:
        raise DataError(
            f"{file.path} does not say which array holds the pairs; it holds "
            f"{arrays_listed(file)}: name one with --dataset."
        )
    shape, dtype = entries[names[0]]
    if len(shape) != 2 or shape[1] != 2:
        hint = "; turn it with .T" if len(shape) == 2 and shape[0] == 2 else ""
        raise DataError(
            f"{file.path}: {names[0]!r} has shape {shape}, but pairs have shape (pairs, 2){hint}."
        )
    if not is_key(dtype):
        raise DataError(
            f"{file.path}: {names[0]!r} has type {dtype}, but pairs of row numbers are integers; "
            "convert it, for example with .astype('int64')."
        )
    return names[0]
