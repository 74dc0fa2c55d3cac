"""Pairs out of any accepted file: keys become rows of the tables, labels become numbers.

Row numbers that come out are inside the tables, ids are known. Rows in messages are counted from 0,
without a header.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpair.backend import in_order
from fastpair.columns import parse_labels
from fastpair.errors import ArgumentError, DataError, FileError
from fastpair.formats import AS_FOUND, ReadOptions, is_text_type
from fastpair.ids import RowsOfIds, all_integers, share_of_integers, text_array
from fastpair.raw_pairs import RawPairs, known_ids, open_raw_pairs

KEY_BYTES = 1 << 22
"""Bytes of keys that a thread turns into rows together; it needs a few times as much for that."""


MOST_NUMBER_WORDS = 0.1
"""Share of integers among ids that are words, at most: a vocabulary holds a few numbers too."""

MOST_READERS = 8
"""Threads that read and look up keys; more would take memory and find nothing to do."""


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
    unknown : which pairs have an unknown id, (b,) bool; None if there are none. Their rows are 0.
    """

    start: int
    left: np.ndarray
    right: np.ndarray
    label: np.ndarray | None
    left_keys: pa.Array | None
    right_keys: pa.Array | None
    extra: tuple[pa.Array, ...] = ()
    unknown: np.ndarray | None = None


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
    in_order : whether the file can be read only from its beginning on, as text can.
    unknown_pairs : pairs with unknown ids among the blocks that were given.
    examples : some of those ids, for messages.
    """

    def __init__(
        self,
        raw: RawPairs,
        keys: str,
        assumed: str,
        tables: tuple[tuple[pa.Array | None, int], tuple[pa.Array | None, int]],
        signed: bool,
        unknown: str = "refuse",
        unknown_rows: tuple[int | None, int | None] = (None, None),
    ) -> None:
        self.path, self.names, self.count = raw.path, raw.names, raw.count
        self.keys, self.assumed, self.has_labels = keys, assumed, raw.has_labels
        self._raw, self._signed, self.in_order = raw, signed, raw.in_order
        self._keep_unknown, self._unknown_rows = unknown == "nan", unknown_rows
        self.unknown_pairs, self.examples = 0, ""
        self._counts = tables[0][1], tables[1][1]
        if keys == "ids":
            left = RowsOfIds(tables[0][0])
            same = tables[0][0] is tables[1][0]
            self._rows_of = left, left if same else RowsOfIds(tables[1][0])

    def blocks(
        self, size: int, start: int = 0, *, keep_keys: bool = False, threads: int = 1
    ) -> Generator[PairBlock, None, None]:
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
        waiting, left = 0, max(0, self.count - start)
        for part in in_order(lambda piece: self._block(*piece, keep_keys), pieces, threads):
            parts.append(part)
            waiting += len(part.left)
            left -= len(part.left)
            self.unknown_pairs += 0 if part.unknown is None else int(part.unknown.sum())
            if left < 0:
                break
            if waiting == size:
                yield _one_block(parts)
                parts, waiting = [], 0
        if left:
            raise FileError(
                f"{self.path} does not hold the {self.count} pairs that it should; it is damaged, "
                "or changed while it was read."
            )
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

    def unknown_note(self) -> str:
        """A sentence on the pairs whose ids are unknown; empty if there are none."""
        if not self.unknown_pairs:
            return ""
        return f"{self.unknown_pairs} pairs have unknown ids, such as {self.examples}"

    def _block(self, batch: pa.RecordBatch, start: int, keep_keys: bool) -> PairBlock:
        left, right, unknown = self._rows(batch.column(0), batch.column(1), start)
        label = None
        if self.has_labels:
            label = parse_labels(batch.column(2), str(self.path), start, self._raw.label or "label")
            if self._signed:
                label = (label + 1) / 2
        kept = (batch.column(0), batch.column(1)) if keep_keys else (None, None)
        extra = tuple(batch.columns[3 if self.has_labels else 2 :])
        return PairBlock(start, left, right, label, kept[0], kept[1], extra, unknown)

    def _rows(
        self, left: pa.Array, right: pa.Array, start: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        sides = [
            Side(str(self.path), self.names[number], keys, start, self._counts[number])
            for number, keys in enumerate((left, right))
        ]
        if self.keys == "rows":
            return sides[0].row_numbers(), sides[1].row_numbers(), None
        texts = [side.texts() for side in sides]
        found = [rows_of(text) for rows_of, text in zip(self._rows_of, texts, strict=True)]
        if self._keep_unknown and min(rows.min(initial=0) for rows in found) < 0:
            unknown = (found[0] < 0) | (found[1] < 0)
            for text, rows in zip(texts, found, strict=True):
                self.examples = self.examples or unknown_examples(text, rows)
            return np.maximum(found[0], 0), np.maximum(found[1], 0), unknown
        known = [
            side.known(text, rows, instead)
            for side, text, rows, instead in zip(
                sides, texts, found, self._unknown_rows, strict=True
            )
        ]
        return known[0], known[1], None


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
            row = self.start + int(np.flatnonzero(unknown)[0])
            shown = unknown_examples(texts, found)
            rows = " or say --keys rows if they are row numbers" if all_integers(texts) else ""
            raise DataError(
                f"{self.path} has unknown ids as {self.name}, {unknown.sum()} in this block, "
                f"such as {shown}, the first in row {row} (counted from 0); "
                f"use ids that the embeddings carry{rows} (`score --unknown nan` keeps such pairs)."
            )
        return found


def unknown_examples(texts: pa.Array, found: np.ndarray) -> str:
    """The first of the texts that were not found (row -1), for messages."""
    examples = pc.unique(texts.filter(pa.array(found < 0))).slice(0, 3).to_pylist()
    return ", ".join(map(repr, examples))


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
    unknown = None
    if any(part.unknown is not None for part in parts):
        masks = [np.zeros(len(p.left), bool) if p.unknown is None else p.unknown for p in parts]
        unknown = np.concatenate(masks)
    return PairBlock(
        start=parts[0].start,
        left=np.concatenate([part.left for part in parts], dtype=kind),
        right=np.concatenate([part.right for part in parts], dtype=kind),
        label=np.concatenate(labels) if labels else None,
        left_keys=pa.concat_arrays(left_keys) if left_keys else None,
        right_keys=pa.concat_arrays(right_keys) if right_keys else None,
        extra=tuple(pa.concat_arrays(list(c)) for c in zip(*(p.extra for p in parts), strict=True)),
        unknown=unknown,
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
    unknown: str = "refuse",
    unknown_rows: tuple[int | None, int | None] = (None, None),
    options: ReadOptions = AS_FOUND,
) -> PairSource:
    """Open pairs in any accepted format.

    Parameters
    ----------
    path : a file of any format in docs/formats.md.
    ids, count : ids (unique text, or None) and number of rows of the left table.
    right_ids, right_count : of the right table, default the same table.
    left_column, right_column, label_column : names of columns, default found by their usual names.
    want_labels : whether blocks carry labels, default False.
    keys : "rows", "ids", or "auto": ids where the table has them and the keys may be ids.
    signed_labels : whether labels that are all -1 or 1 become 0 and 1, default True.
    dataset : name of the (M, 2) array in HDF5 or .npz, default `pairs` or the only one.
    extra : names of further columns (or arrays) that blocks carry, default none.
    unknown : "refuse" (the default) unknown ids, or "nan": keep their pairs, marked as unknown.
    unknown_rows : the rows that stand for unknown ids of the left and of the right table, which
        are not refused then; default none; "nan" does not use them.
    options : what the file does not say itself.

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
    if unknown not in ("refuse", "nan"):
        raise ArgumentError(f"unknown is {unknown!r}, but must be 'refuse' or 'nan'.")
    left_table = (ids, count)
    right_table = left_table if right_count is None else (right_ids, right_count)

    raw = open_raw_pairs(
        path,
        left_column,
        right_column,
        label_column,
        want_labels=want_labels,
        dataset=dataset,
        extra=extra,
        known=known_ids(left_table[0], right_table[0]),
        options=options,
    )
    meaning, assumed = _meaning(raw, keys, left_table[0], right_table[0])
    assumed = "; ".join(filter(None, [raw.assumed, assumed]))
    signed = signed_labels and raw.has_labels and _signed_labels(raw)
    given = (left_table, right_table)
    return PairSource(raw, meaning, assumed, given, signed, unknown, unknown_rows)


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
    if max(share_of_integers(ids), share_of_integers(right_ids)) > MOST_NUMBER_WORDS:
        raise DataError(
            f"{raw.path} has integers for keys, and the embeddings carry integers as well as words "
            "for ids: say --keys ids or --keys rows."
        )
    return "rows", "integers are row numbers, because the ids of the embeddings are text"


def _signed_labels(raw: RawPairs) -> bool:
    """Whether all labels are -1 or 1 and some are -1; reads the labels once, and so checks them."""
    start, negative, others = 0, False, False
    for batch in raw.read(0):
        labels = parse_labels(batch.column(2), str(raw.path), start, raw.label or "label")
        negative |= bool((labels == -1).any())
        others |= bool((np.abs(labels) != 1).any())
        start += batch.num_rows
    return negative and not others


def repeats_note(left: np.ndarray, right: np.ndarray, labels: np.ndarray) -> str:
    """A sentence on pairs (M,) that occur repeatedly, in either order; empty if none does."""
    rows = np.maximum(left, right).max(initial=0) + 1
    codes = np.minimum(left, right).astype(np.int64) * np.int64(rows) + np.maximum(left, right)
    order = np.argsort(codes, kind="stable")
    codes, labels = codes[order], labels[order]
    starts = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]]))
    repeated = int((np.diff([*starts, len(codes)]) > 1).sum())
    if not repeated:
        return ""
    lowest, highest = np.minimum.reduceat(labels, starts), np.maximum.reduceat(labels, starts)
    conflicts = int((lowest != highest).sum())
    return f"{repeated} pairs occur more than once, {conflicts} of them with different labels"
