"""Keys and labels of any pair file as they stand in it: which columns, whether a header."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpair.backend import in_order
from fastpair.columnar import BATCH_ROWS
from fastpair.columns import (
    LABEL_WORDS,
    find_columns,
    has_usual_names,
    pair_candidates,
)
from fastpair.errors import ArgumentError, DataError
from fastpair.formats import (
    AS_FOUND,
    Arrays,
    Columns,
    ReadOptions,
    TextColumns,
    arrays_listed,
    is_number,
    open_format,
)
from fastpair.hdf5 import reading
from fastpair.ids import text_from_numpy

ARRAY_PAIRS = 1 << 18
"""Pairs of integers that are read together from arrays."""

ARRAY_TEXTS = 1 << 16
"""Pairs of text that are read together from arrays."""

SIDE_ARRAYS = (("left", "right"), ("lhs", "rhs"))
"""Usual names of two arrays that hold the keys of the two sides."""

Known = Callable[[str, str], int]
"""How many of two keys are ids of the left and of the right table."""


class ReadBatches(Protocol):
    """Gives left, right, perhaps label, then further columns from a row on, batch by batch."""

    def __call__(self, start: int, threads: int = 1) -> Iterator[pa.RecordBatch]:
        """Batches in order; arrays are read by so many threads."""


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
    assumed : what was taken for granted while the file was opened; empty if nothing.
    in_order : whether the file can be read only from its beginning on, as text can.
    """

    path: Path
    names: tuple[str, str]
    count: int
    label: str | None
    has_labels: bool
    integers: bool
    read: ReadBatches
    together: int
    assumed: str = ""
    in_order: bool = False


def known_ids(ids: pa.Array | None, right_ids: pa.Array | None) -> Known:
    """What counts how many of a left and a right key are ids of their tables."""

    def known(left: str, right: str) -> int:
        both = ((ids, left), (right_ids, right))
        return sum(table is not None and pc.index(table, key).as_py() >= 0 for table, key in both)

    return known


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
    options: ReadOptions = AS_FOUND,
) -> RawPairs:
    """Keys and labels of a pair file as they are; `known` tells a header from a first pair."""
    file = open_format(path, options, pairs=True)
    if isinstance(file, Arrays):
        raw = _array_pairs(file, dataset, (left, right, label), want_labels, extra)
    elif dataset is not None:
        raise ArgumentError(f"--dataset {dataset} has no meaning for the table of columns {path}.")
    else:
        asked = (left, right, label)
        raw = _column_pairs(file, asked, want_labels, extra, known, options.header)
    if not raw.count:
        raise DataError(f"{path} holds no pairs; give a file that has some.")
    return raw


def _column_pairs(
    file: Columns,
    asked: tuple[str | None, str | None, str | None],
    want_labels: bool,
    extra: Sequence[str],
    known: Known | None,
    header: bool | None,
) -> RawPairs:
    assumed = ""
    if isinstance(file, TextColumns):
        if header is None:
            header, assumed = _has_header(file, asked, known)
        if not header:
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
        assumed=assumed,
        in_order=isinstance(file, TextColumns),
    )


def _has_header(
    file: TextColumns, asked: tuple[str | None, str | None, str | None], known: Known | None
) -> tuple[bool, str]:
    """Whether a first line is a header, and a sentence on that where it is not plain.

    Raises
    ------
    DataError
        It may be a header as well as a pair.
    """
    first = file.first
    if asked != (None, None, None):
        return True, ""
    if len(first) in (2, 3) and all(map(is_number, first)):
        return False, ""
    if len(first) not in (2, 3):
        return True, ""
    shown = " and ".join(map(repr, first[:2]))
    matches = None if known is None else known(first[0], first[1])
    taken = f"the first line, {shown}, was taken for a header (--no-header says other)"
    if has_usual_names(first):
        return True, taken if matches == 2 else ""
    if len(first) == 3 and not (is_number(first[2]) or first[2].strip().lower() in LABEL_WORDS):
        return True, ""  # no label, so the name of one
    if matches == 2:
        return False, f"the first line is a pair, because {shown} are known ids"
    cut = len(file.second) == len(first)
    if not matches and cut and all(map(is_number, file.second)):
        return True, ""  # words above numbers
    alike = cut and any(map(_alike, first, file.second))
    if matches == 0 or (matches is None and pair_candidates(first) and not alike):
        return True, taken
    raise DataError(
        f"{file.path} begins with {shown}, which may be names of columns or a first pair; say "
        "--header or --no-header."
    )


def _alike(one: str, other: str) -> bool:
    """Whether two texts differ in nothing but their digits."""
    return re.sub(r"[0-9]+", "0", one) == re.sub(r"[0-9]+", "0", other)


def _array_pairs(
    file: Arrays,
    dataset: str | None,
    asked: tuple[str | None, str | None, str | None],
    want_labels: bool,
    extra: Sequence[str],
) -> RawPairs:
    if dataset is None and _is_neighbours(file):
        return _neighbour_pairs(file, want_labels, extra)
    sides = _side_arrays(file, asked[:2]) if dataset is None else None
    sources: list[tuple[str, int | None]]
    if sides is not None:
        left, right = sides
        sources = [(left, None), (right, None)]
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

            yield from in_order(batch, pairwise([start, *ends]), threads if file.in_threads else 1)

    return RawPairs(
        file.path, (left, right), count, label, len(names) == 3, integers, read, together
    )


def _side_arrays(file: Arrays, asked: tuple[str | None, str | None]) -> tuple[str, str] | None:
    """The arrays of left and of right keys, None if the file has no such two."""
    if asked != (None, None):
        missing = [name for name in asked if name is None or name not in file.entries]
        if missing:
            raise DataError(
                f"{file.path} holds no array {missing[0]!r}; it holds {arrays_listed(file)}."
            )
        found = [(str(asked[0]), str(asked[1]))]
    else:
        found = [couple for couple in SIDE_ARRAYS if set(couple) <= file.entries.keys()]
    if not found:
        return None
    for name in found[0]:
        shape, dtype = file.entries[name]
        if len(shape) != 1 or not is_key(dtype):
            raise DataError(
                f"{file.path}: {name!r} has shape {shape} and type {dtype}, but one side of pairs "
                "is integers or text, (pairs,)."
            )
    return found[0]


def _is_neighbours(file: Arrays) -> bool:
    """Whether a file holds nearest neighbours as ann-benchmarks keeps them."""
    shape, dtype = file.entries.get("neighbors", ((), "text"))
    return "pairs" not in file.entries and len(shape) == 2 and not isinstance(dtype, str)


def _neighbour_pairs(file: Arrays, want_labels: bool, extra: Sequence[str]) -> RawPairs:
    """Pairs of each row of `neighbors` (a row of `test`) with what stands in it (rows of `train`).

    They are numbered row by row; `distances`, which are there for one measure, are no labels.
    """
    (queries, width), dtype = file.entries["neighbors"]
    if not is_key(dtype) or want_labels or extra:
        raise DataError(
            f"{file.path} holds neighbours of type {dtype} without labels; labelled pairs of "
            "integers are needed here."
        )
    together = max(1, ARRAY_PAIRS // max(1, width))

    def read(start: int, threads: int = 1) -> Iterator[pa.RecordBatch]:
        with reading(file.path), file.opened() as read_rows:
            for first in range(start // max(1, width), queries, together):
                last = min(first + together, queries)
                right = np.asarray(read_rows("neighbors", first, last))
                left = np.repeat(np.arange(first, last), width)
                skipped = max(0, start - first * width)
                arrays = [_arrow(keys.reshape(-1)[skipped:], None) for keys in (left, right)]
                yield pa.RecordBatch.from_arrays(arrays, ["0", "1"])

    assumed = "pairs are each query (a row of 'test') with its neighbours (rows of 'train')"
    pairs = queries * width
    return RawPairs(
        file.path, ("left", "right"), pairs, None, False, True, read, together * width, assumed
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
        hint = "; transpose it, turn it with .T" if len(shape) == 2 and shape[0] == 2 else ""
        raise DataError(
            f"{file.path}: {names[0]!r} has shape {shape}, but pairs have shape (pairs, 2){hint}."
        )
    if not is_key(dtype):
        raise DataError(
            f"{file.path}: {names[0]!r} has type {dtype}, but pairs of row numbers are integers; "
            "convert it, for example with .astype('int64')."
        )
    return names[0]
