"""What ids are: text that names rows. Checked, converted and looked up here, never altered."""

from __future__ import annotations

import threading

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpair.errors import DataError


def check_ids(ids: pa.Array, name: str, count: int | None = None) -> pa.Array:
    """Ids as text, if they can name rows: none missing, none twice, no NUL.

    Parameters
    ----------
    ids : text, (N,).
    name : the file or argument they came from, for the message.
    count : the number of rows they must name, default any.

    Returns
    -------
    pa.Array
        The ids as one `pa.string()` array, (N,).

    Raises
    ------
    DataError
        The ids cannot name rows.
    """
    ids = text_array(ids)
    if count is not None and len(ids) != count:
        raise DataError(
            f"{name} holds {len(ids)} ids for {count} rows; there must be one id for every row."
        )
    if ids.null_count:
        row = pc.index(pc.is_null(ids), True).as_py()
        raise DataError(
            f"{name} has no id in row {row} (counted from 0), and {ids.null_count} ids are missing "
            "in all; give every row an id."
        )
    if len(pc.unique(ids)) < len(ids):
        counts = pc.value_counts(ids)
        repeats = counts.filter(pc.greater(counts.field("counts"), 1))
        example = repeats[0].as_py()
        raise DataError(
            f"{name} holds ids that stand for several rows, {len(repeats)} of them, such as "
            f"{example['values']!r} ({example['counts']} times); give every row its own id."
        )
    if pc.any(pc.match_substring(ids, "\0")).as_py():
        row = pc.index(pc.match_substring(ids, "\0"), True).as_py()
        raise DataError(
            f"{name} has a NUL character in the id of row {row}; take it out of the id."
        )
    return ids


def text_array(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Text, integers or dictionaries of them as one `pa.string()` array; text is not altered."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks)
    return values if values.type == pa.string() else values.cast(pa.string())


def text_parts(text: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Offsets (N + 1,) int32 and bytes uint8 of a `pa.string()` array."""
    _, offsets, data = text.buffers()
    if not len(text) or offsets is None:
        return np.zeros(1, np.int32), np.empty(0, np.uint8)
    positions = np.frombuffer(offsets, np.int32)[text.offset : text.offset + len(text) + 1]
    return positions, np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8)


def longest(text: pa.Array) -> int:
    """Bytes of the longest text, 0 if there is none."""
    positions, _ = text_parts(text)
    return int(np.diff(positions).max(initial=0))


def fixed_length(text: pa.Array, width: int) -> np.ndarray:
    """Text as a NumPy array of `width` bytes each, filled up with NUL."""
    positions, data = text_parts(text)
    matrix = np.zeros((len(text), width), np.uint8)
    matrix[np.arange(width) < np.diff(positions)[:, None]] = data[positions[0] : positions[-1]]
    return matrix.reshape(-1).view(f"S{width}")


def text_from_numpy(values: np.ndarray) -> pa.Array:
    """Text that HDF5 or NumPy gave, or integers, as a `pa.string()` array.

    Raises
    ------
    ValueError
        The values are neither, or the bytes are not UTF-8.
    """
    values = np.ascontiguousarray(values)
    if values.dtype.kind == "S":
        matrix = values.view(np.uint8).reshape(len(values), values.dtype.itemsize)
        used = matrix != 0
        offsets = np.concatenate([[0], np.cumsum(used.sum(axis=1))]).astype(np.int32)
        text = pa.StringArray.from_buffers(
            len(values), pa.py_buffer(offsets), pa.py_buffer(matrix[used])
        )
        text.validate(full=True)
        return text
    if values.dtype.kind in "iu":
        return pa.array(values).cast(pa.string())
    if values.dtype.kind == "U":
        return pa.array(values, pa.string())
    if values.dtype.kind == "O" and all(isinstance(value, bytes) for value in values):
        return pa.array(values.tolist(), pa.binary()).cast(pa.string())
    raise ValueError(f"values of type {values.dtype} are not ids")


def all_integers(ids: pa.Array) -> bool:
    """Whether every id is the decimal text of an integer, such as "7" but not "007"."""
    return bool(pc.all(pc.match_substring_regex(ids, r"^(0|-?[1-9][0-9]{0,17})$")).as_py())


def share_of_integers(ids: pa.Array) -> float:
    """How many of the ids are decimal texts of integers, from 0 to 1; 0 if there are none."""
    whole = pc.match_substring_regex(ids, r"^(0|-?[1-9][0-9]{0,17})$")
    return float(pc.mean(whole.cast(pa.float64())).as_py() or 0)


class RowsOfIds:
    """Says which rows ids name; it prepares itself once, at the first call, for all threads.

    Parameters
    ----------
    ids : `pa.string()` without nulls, (N,); of equal ids the first counts.
    """

    def __init__(self, ids: pa.Array) -> None:
        self._ids, self._preparing = ids, threading.Lock()
        self._slots: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that it needs besides the ids, at most."""
        return 32 * len(self._ids)

    def __call__(self, texts: pa.Array) -> np.ndarray:
        """Rows of texts, a `pa.string()` without nulls, (b,): (b,) int64, -1 where unknown."""
        from fastpair.kernels import lookup  # Numba: only those who have ids wait for it

        with self._preparing:
            if self._slots is None:
                self._parts = text_parts(self._ids)
                self._known = lookup.texts_at(*self._parts)
                slots = lookup.empty_slots(len(self._ids))
                lookup.fill_slots(slots, self._known)
                self._slots = slots
        rows = np.empty(len(texts), np.int64)
        parts = text_parts(texts)
        lookup.find_rows(self._slots, self._known, lookup.texts_at(*parts), rows)
        return rows
