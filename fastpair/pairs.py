"""Pairs out of any accepted file: keys become rows of the tables, labels become numbers.

Row numbers that come out are inside the tables, ids are known. Rows in messages are counted from 0,
without a header.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpair.columns import find_columns, parse_labels
from fastpair.errors import ArgumentError, DataError
from fastpair.formats import (
    Arrays,
    Columns,
    TextColumns,
    arrays_listed,
    is_number,
    is_text_type,
    open_format,
)
from fastpair.ids import all_integers, text_array

ARRAY_PAIRS = 1 << 18
"""Pairs that are read together from arrays."""


@dataclass(frozen=True)
class PairBlock:
    """Some consecutive pairs.

    Parameters
    ----------
    start : the row of the file that the first pair stands in.
    left, right : rows of the tables, (b,) int64, C-contiguous, inside the tables.
    label : (b,) float64, or None.
    left_keys, right_keys : the keys as the file has them, (b,).
    """

    start: int
    left: np.ndarray
    right: np.ndarray
    label: np.ndarray | None
    left_keys: pa.Array
    right_keys: pa.Array


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
    integers : whether keys come from arrays of integers, which are rows unless ids say other.
    read : gives batches of left, right and perhaps label from a row on.
    """

    path: Path
    names: tuple[str, str]
    count: int
    label: str | None
    has_labels: bool
    integers: bool
    read: Callable[[int], Iterator[pa.RecordBatch]]


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
    ) -> None:
        self.path, self.names, self.count = raw.path, raw.names, raw.count
        self.keys, self.assumed, self.has_labels = keys, assumed, raw.has_labels
        self._raw, self._tables, self._signed = raw, tables, signed

    def blocks(self, size: int, start: int = 0) -> Iterator[PairBlock]:
        """The pairs in order.

        Parameters
        ----------
        size : pairs a block; the last one may have fewer.
        start : the pair to begin with, default 0.

        Yields
        ------
        PairBlock

        Raises
        ------
        DataError
            A row is outside the table, an id is unknown, or a label is not one.
        """
        for batch in regroup_batches(self._raw.read(start), size):
            left_keys, right_keys = batch.column(0), batch.column(1)
            left, right = self._rows(left_keys, right_keys, start)
            label = None
            if self.has_labels:
                label = parse_labels(batch.column(2), str(self.path), start)
                if self._signed:
                    label = (label + 1) / 2
            yield PairBlock(start, left, right, label, left_keys, right_keys)
            start += batch.num_rows

    def _rows(self, left: pa.Array, right: pa.Array, start: int) -> tuple[np.ndarray, np.ndarray]:
        (left_ids, left_count), (right_ids, right_count) = self._tables
        sides = [
            Side(str(self.path), self.names[0], left, start, left_count),
            Side(str(self.path), self.names[1], right, start, right_count),
        ]
        if self.keys == "rows":
            return sides[0].row_numbers(), sides[1].row_numbers()
        texts = [side.texts() for side in sides]
        if left_ids is right_ids:
            # One look-up for both sides: preparing it is what costs most.
            both = pc.index_in(pa.concat_arrays(texts), value_set=left_ids)
            found = [both.slice(0, len(left)), both.slice(len(left))]
        else:
            found = [
                pc.index_in(texts[0], value_set=left_ids),
                pc.index_in(texts[1], value_set=right_ids),
            ]
        return sides[0].known(texts[0], found[0]), sides[1].known(texts[1], found[1])


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
        """Keys as row numbers of the table, (b,) int64."""
        self._refuse_missing()
        rows = self._integers()
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

    def known(self, texts: pa.Array, found: pa.Array) -> np.ndarray:
        """Rows that were looked up, (b,) int64, unless an id is unknown."""
        if found.null_count:
            unknown = found.is_null()
            examples = pc.unique(texts.filter(unknown)).slice(0, 3).to_pylist()
            row = self.start + int(pc.index(unknown, True).as_py())
            shown = ", ".join(repr(example) for example in examples)
            raise DataError(
                f"{self.path} has unknown ids as {self.name}, {found.null_count} in this block, "
                f"such as {shown}, the first in row {row} (counted from 0); "
                "use ids that the embeddings carry."
            )
        return found.to_numpy().astype(np.int64)


def regroup_batches(batches: Iterable[pa.RecordBatch], size: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of exactly `size`, except the last."""
    waiting: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        while count + batch.num_rows >= size:
            part = batch.slice(0, size - count)
            yield _one_batch([*waiting, part])
            batch, waiting, count = batch.slice(size - count), [], 0
        if batch.num_rows:
            waiting.append(batch)
            count += batch.num_rows
    if waiting:
        yield _one_batch(waiting)


def _one_batch(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    if len(batches) == 1:
        return batches[0]
    columns = range(batches[0].num_columns)
    arrays = [pa.concat_arrays([batch.column(number) for batch in batches]) for number in columns]
    return pa.RecordBatch.from_arrays(arrays, schema=batches[0].schema)


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
    dataset: str | None = None,
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
    dataset : name of the (M, 2) array in HDF5 or .npz, default `pairs` or the only one.

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
    raw = open_raw_pairs(
        path, left_column, right_column, label_column, want_labels=want_labels, dataset=dataset
    )
    meaning, assumed = _meaning(raw, keys, left_table[0], right_table[0])
    signed = raw.has_labels and _signed_labels(raw)
    return PairSource(raw, meaning, assumed, (left_table, right_table), signed)


def open_raw_pairs(
    path: str | Path,
    left: str | None = None,
    right: str | None = None,
    label: str | None = None,
    *,
    want_labels: bool = False,
    dataset: str | None = None,
) -> RawPairs:
    """Keys and labels of a pair file as they are, without tables to look them up in."""
    file = open_format(path)
    if isinstance(file, Arrays):
        raw = _array_pairs(file, dataset, (left, right, label), want_labels)
    elif dataset is not None:
        raise ArgumentError(f"--dataset {dataset} has no meaning for the table of columns {path}.")
    else:
        raw = _column_pairs(file, (left, right, label), want_labels)
    if not raw.count:
        raise DataError(f"{path} holds no pairs; give a file that has some.")
    return raw


def _meaning(
    raw: RawPairs, keys: str, ids: pa.Array | None, right_ids: pa.Array | None
) -> tuple[str, str]:
    """What keys are, rows or ids, and a sentence on why."""
    have_ids = ids is not None and right_ids is not None
    if keys == "ids" and not have_ids:
        raise ArgumentError(
            f"the keys of {raw.path} shall be ids, but the embeddings carry none; "
            "use row numbers, or embeddings with ids."
        )
    if keys != "auto":
        return keys, ""
    if not have_ids:
        return "rows", "keys are row numbers, because the embeddings carry no ids"
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
    file: Columns, asked: tuple[str | None, str | None, str | None], want_labels: bool
) -> RawPairs:
    if (
        isinstance(file, TextColumns)
        and asked == (None, None, None)
        and len(file.first) in (2, 3)
        and all(map(is_number, file.first))
    ):
        file.without_header(("left", "right", "label")[: len(file.first)])
    left, right, label = find_columns(str(file.path), file.names, *asked, want_labels=want_labels)
    columns = [left, right] + ([label] if want_labels and label is not None else [])
    return RawPairs(
        path=file.path,
        names=(left, right),
        count=file.count_rows(columns),
        label=label,
        has_labels=len(columns) == 3,
        integers=False,
        read=lambda start: file.batches(columns, start),
    )


def _array_pairs(
    file: Arrays,
    dataset: str | None,
    asked: tuple[str | None, str | None, str | None],
    want_labels: bool,
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
    for name in names:
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

    def read(start: int) -> Iterator[pa.RecordBatch]:
        for at in range(start, count, ARRAY_PAIRS):
            parts = {name: file.read(name, at, min(at + ARRAY_PAIRS, count)) for name in set(names)}
            arrays = [_arrow(parts[name], column) for name, column in sources]
            arrays += [_arrow(parts[name], None) for name in names[2:]]
            yield pa.RecordBatch.from_arrays(arrays, ["left", "right", "label"][: len(arrays)])

    integers = all(not isinstance(file.entries[name][1], str) for name, _ in sources)
    return RawPairs(file.path, (left, right), count, label, len(names) == 3, integers, read)


def _arrow(values: np.ndarray | pa.Array, column: int | None) -> pa.Array:
    if not isinstance(values, np.ndarray):
        return values
    one = values if column is None else values[:, column]
    return pa.array(np.ascontiguousarray(one).astype(one.dtype.newbyteorder("="), copy=False))


def _pair_array(file: Arrays, dataset: str | None) -> str:
    entries = file.entries
    if dataset is not None and dataset not in entries:
        raise DataError(f"{file.path} has no array {dataset!r}; it holds {arrays_listed(file)}.")
    integers = [
        name
        for name, (shape, dtype) in entries.items()
        if len(shape) == 2 and not isinstance(dtype, str) and dtype.kind in "iu"
    ]
    usual = ["pairs"] if "pairs" in entries else integers if len(integers) == 1 else list(entries)
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
    if isinstance(dtype, str) or dtype.kind not in "iu":
        raise DataError(
            f"{file.path}: {names[0]!r} has type {dtype}, but pairs of row numbers are integers; "
            "convert it, for example with .astype('int64')."
        )
    return names[0]


def read_pairs(
    path: str | Path, **options: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Read all pairs into memory.

    Parameters
    ----------
    path : the file.
    options : those of `open_pairs`.

    Returns
    -------
    tuple
        left and right, (M,) int64, and the labels, (M,) float64 or None.
    """
    source = open_pairs(path, **options)
    blocks = list(source.blocks(ARRAY_PAIRS))
    left = np.concatenate([block.left for block in blocks])
    right = np.concatenate([block.right for block in blocks])
    labels = [block.label for block in blocks if block.label is not None]
    return left, right, np.concatenate(labels) if labels else None
