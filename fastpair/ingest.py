"""Embeddings out of any accepted file, in blocks of finite numbers; pairs come from `pairs`.

Rows in messages are counted from 0, without a header.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpair.backend import memory_budget
from fastpair.errors import ArgumentError, DataError, MemoryBudgetError
from fastpair.formats import (
    AS_FOUND,
    Arrays,
    Columns,
    ReadOptions,
    TextColumns,
    arrays_listed,
    is_number,
    is_numeric_type,
    is_text_type,
    numpy_type,
    open_format,
)
from fastpair.ids import check_ids, text_array

EMBEDDING_ROWS = 8192
"""Rows of embeddings that are read together, unless another number is asked for."""

NUMBERS_AT_ONCE = 1 << 24
"""Numbers of embeddings that are read together at most, so that wide rows take no more memory."""

MOST_COLUMNS = 1 << 20
"""Columns of embeddings, at most; more come from files that are damaged or no embeddings."""

ID_ARRAYS = ("ids", "id", "keys", "names", "words")
"""Usual names of an array of ids beside the embeddings; the first one is believed in any case."""

ID_NAMES = frozenset(
    {"", "id", "ids", "_id", "key", "keys", "name", "names", "word", "words", "item", "token"}
    | {"entity", "text", "label", "index", "uid", "uuid", "unnamed: 0", "__index_level_0__"}
)
"""Usual names of the id column of embeddings, in lower case; pandas writes the last two."""

INDEX_NAMES = frozenset({"", "unnamed: 0", "__index_level_0__"})
"""What pandas calls its index, in lower case."""

ID_PATTERN = re.compile(r"(^|.*[_\-. ])(id|key|sku|uid|uuid)", re.IGNORECASE)
"""Other names of id columns, such as item_id; what they name is never a column of numbers."""

LEADING_ZEROS = r"^[+-]?0[0-9]+$"
"""Text that looks like a number but is none: 007."""

NUMBER = r"^[+-]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)([eE][+-]?[0-9]+)?$"
"""Any finite number as text."""


class EmbeddingSource:
    """Embeddings in a file, read block by block.

    Attributes
    ----------
    path : the file.
    shape : (N, n).
    dtype : float32, or float64 where the file holds that or integers of 4 bytes or more; smaller
        numbers are widened to float32.
    ids : text, (N,), or None.
    assumed : a sentence on what was taken for numbers and for ids.
    isolated : (N,) bool, rows that are not finite among those read so far, or None: they are
        refused.
    seek : gives blocks of so many rows from a row on, where the file can be entered there; None:
        it is read from its beginning.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int],
        dtype: np.dtype,
        ids: pa.Array | None,
        read: Callable[[int], Iterator[np.ndarray]],
        ids_from: str = "",
        remark: str = "",
    ) -> None:
        self.path, self.shape, self.dtype = path, shape, np.dtype(dtype)
        if not shape[0] or not shape[1]:
            raise DataError(
                f"{path} holds no embeddings: it has {shape[0]} rows and {shape[1]} columns of "
                "numbers; give a file that has some."
            )
        if shape[1] > MOST_COLUMNS:
            raise DataError(
                f"{path} has {shape[1]} columns of numbers, but embeddings have at most "
                f"{MOST_COLUMNS}; is it turned, so that it needs a transpose?"
            )
        self.ids = None if ids is None else check_ids(ids, str(path), shape[0])
        self._read = read
        columns = "1 column" if shape[1] == 1 else f"{shape[1]} columns"
        named = " and no ids" if ids is None else f", ids from {ids_from}"
        self.assumed = f"{columns} of numbers{named}{remark}"
        self.isolated: np.ndarray | None = None
        self.seek: Callable[[int, int], Iterator[np.ndarray]] | None = None

    def isolate(self) -> None:
        """From now on take rows that are not finite for zeros and mark them as `isolated`."""
        self.isolated = np.zeros(self.shape[0], bool)

    def mark_isolated(self, rows: Sequence[int]) -> None:
        """Mark rows that are not finite, as others found them."""
        if self.isolated is not None:
            self.isolated[rows] = True

    def isolated_note(self) -> str:
        """A sentence on the isolated rows that were met; empty if there are none."""
        if self.isolated is None or not self.isolated.any():
            return ""
        row = int(np.flatnonzero(self.isolated)[0])
        name = "" if self.ids is None else f", id {self.ids[row].as_py()!r}"
        return (
            f"{int(self.isolated.sum())} rows are not finite and take part in nothing, the first "
            f"of them row {row} (counted from 0{name})"
        )

    def blocks(
        self, rows: int = EMBEDDING_ROWS, start: int = 0
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The embeddings in order.

        Parameters
        ----------
        rows : rows a block, the last one may have fewer; wide rows come in smaller blocks.
        start : the row to begin with.

        Yields
        ------
        tuple
            The first row, and its block (b, n) of `dtype`, C-contiguous and finite.

        Raises
        ------
        DataError
            A number is missing, NaN or infinite.
        """
        rows = max(1, min(rows, NUMBERS_AT_ONCE // self.shape[1]))
        parts = self.seek(rows, start) if self.seek else _behind(self._read(rows), start)
        for block in _regroup(parts, rows):
            block = np.ascontiguousarray(block, self.dtype)
            yield start, self._finite(block, start)
            start += len(block)
        if start != self.shape[0]:
            raise DataError(f"{self.path} changed while it was read: {start} rows came.")

    def _finite(self, block: np.ndarray, start: int) -> np.ndarray:
        """A block whose numbers are all finite: as it is, with zeros for bad rows, or refused."""
        finite = np.isfinite(block)
        if finite.all():
            return block
        if self.isolated is not None:
            bad = ~finite.all(axis=1)
            self.isolated[start : start + len(block)] = bad
            return np.where(bad[:, None], block.dtype.type(0), block)
        row, column = (int(at) for at in np.argwhere(~finite)[0])
        name = "" if self.ids is None else f", id {self.ids[start + row].as_py()!r}"
        raise DataError(
            f"{self.path} has {block[row, column]} in row {start + row} (counted from 0"
            f"{name}), column {column}; every number of an embedding must be finite."
        )

    def read(self) -> np.ndarray:
        """All embeddings, (N, n) of `dtype`.

        Raises
        ------
        MemoryBudgetError
            They take more memory than there is.
        """
        size = self.shape[0] * self.shape[1] * self.dtype.itemsize
        if size > memory_budget():
            raise MemoryBudgetError(
                f"the embeddings of {self.path} take {size} bytes, more than this machine has "
                "free; give fewer rows or columns."
            )
        result = np.empty(self.shape, self.dtype)
        for start, block in self.blocks():
            result[start : start + len(block)] = block
        return result


def _behind(parts: Iterable[np.ndarray], start: int) -> Iterator[np.ndarray]:
    """The same rows without the first ones."""
    for part in parts:
        if start < len(part):
            yield part[start:]
        start = max(0, start - len(part))


def _regroup(parts: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same rows in blocks of exactly `size`, except the last."""
    waiting: list[np.ndarray] = []
    count = 0
    for part in parts:
        while count + len(part) >= size:
            block = [*waiting, part[: size - count]]
            part, waiting, count = part[size - count :], [], 0
            yield block[0] if len(block) == 1 else np.concatenate(block)
        if len(part):
            waiting.append(part)
            count += len(part)
    if waiting:
        yield np.concatenate(waiting)


def open_embeddings(
    path: str | Path,
    *,
    dataset: str | None = None,
    options: ReadOptions = AS_FOUND,
    nonfinite: str = "refuse",
) -> EmbeddingSource:
    """Open embeddings in any accepted format.

    Parameters
    ----------
    path : a file of any format in docs/formats.md.
    dataset : name of the array in HDF5 or .npz or of the list column in Parquet, default:
        `embeddings`, `data`, or the only one that can be meant. A group of HDF5 stands for the only
        array in it, or for its arrays if each is one row.
    options : what the file does not say itself.
    nonfinite : "refuse" (the default) rows that are not finite, or "nan": mark them as isolated.

    Returns
    -------
    EmbeddingSource

    Raises
    ------
    FileError
        The file is missing, damaged, or of no known format.
    DataError
        It holds no embeddings, or ids that cannot name rows.
    """
    if nonfinite not in ("refuse", "nan"):
        raise ArgumentError(f"nonfinite is {nonfinite!r}, but must be 'refuse' or 'nan'.")
    file = open_format(path, options)
    if isinstance(file, Arrays):
        source = _array_embeddings(file, dataset)
    elif isinstance(file, TextColumns):
        if dataset is not None:
            raise ArgumentError(f"--dataset {dataset} has no meaning for the text file {path}.")
        source = _text_embeddings(file, options.header)
    else:
        source = _column_embeddings(file, dataset)
    if nonfinite == "nan":
        source.isolate()
    return source


def _smallest_float(kinds: Iterable[Any]) -> np.dtype:
    # float32 holds integers of 24 bits
    sizes = [(np.dtype(kind).kind in "iu", np.dtype(kind).itemsize) for kind in kinds]
    wide = any(size > (2 if whole else 4) for whole, size in sizes)
    return np.dtype(np.float64 if wide else np.float32)


# --- arrays -------------------------------------------------------------------------------------


def _array_embeddings(file: Arrays, dataset: str | None) -> EmbeddingSource:
    rows = _one_row_arrays(file, dataset)
    if rows:
        return _gathered(file, rows)
    name = _embedding_array(file, dataset)
    shape, dtype = file.entries[name]
    if isinstance(dtype, str) or dtype.kind not in "fiu" or len(shape) != 2:
        raise DataError(
            f"{file.path}: {name!r} has shape {shape} and type {dtype}, but embeddings are real "
            "numbers (rows, columns); give another array with --dataset or convert it."
        )
    ids_name = _id_array(file, name, shape[0])
    ids = None if ids_name is None else _whole(file, ids_name, shape[0])

    def seek(rows: int, start: int) -> Iterator[np.ndarray]:
        with file.opened() as read_rows:
            for first in range(start, shape[0], rows):
                yield np.asarray(read_rows(name, first, min(first + rows, shape[0])))

    kind = _smallest_float([dtype])
    origin, whole = f"array {ids_name!r}", (shape[0], shape[1])
    source = EmbeddingSource(file.path, whole, kind, ids, lambda rows: seek(rows, 0), origin)
    source.seek = seek
    return source


def _embedding_array(file: Arrays, dataset: str | None) -> str:
    names = list(file.entries)
    if dataset is not None:
        inside = [name for name in names if name.startswith(dataset.strip("/") + "/")]
        if len(inside) == 1:
            return inside[0]
        for asked in (dataset, dataset.strip("/"), f"obsm/{dataset}"):
            if asked in file.entries:
                return asked
        raise DataError(f"{file.path} holds no array {dataset!r}; it holds {arrays_listed(file)}.")
    if getattr(file, "row_names", None) is not None:
        names = [name for name in names if name == "X" or name.startswith("obsm/")]
    for usual in ("embeddings", "data"):
        if usual in names and len(file.entries[usual][0]) == 2:
            return usual
    floats = []
    for name in names:
        shape, dtype = file.entries[name]
        if len(shape) == 2 and not isinstance(dtype, str) and dtype.kind == "f":
            floats.append(name)
    if len(floats) == 1:
        return floats[0]
    if len(names) == 1:
        return names[0]
    sparse = "; its X is sparse" if "X/indptr" in file.entries else ""
    raise DataError(
        f"{file.path} does not say which array holds the embeddings{sparse}; it holds "
        f"{arrays_listed(file)}: name one with --dataset."
    )


def _id_array(file: Arrays, name: str, count: int) -> str | None:
    """The array of ids beside an array of embeddings, None if there is none."""
    named = getattr(file, "row_names", None)
    if named is not None:
        return str(named)
    group = name[: name.rfind("/") + 1]
    for usual in ID_ARRAYS:
        for found in (group + usual, usual):
            if found == name or found not in file.entries:
                continue
            shape, dtype = file.entries[found]
            whole = isinstance(dtype, str) or dtype.kind in "iu"
            if usual == ID_ARRAYS[0] or (shape == (count,) and whole):
                return found
    return None


def _whole(file: Arrays, name: str, count: int) -> pa.Array:
    """A one-dimensional array of text or integers as text."""
    shape, dtype = file.entries[name]
    if len(shape) != 1 or not (isinstance(dtype, str) or dtype.kind in "iu"):
        raise DataError(
            f"{file.path}: {name!r} has shape {shape} and type {dtype}, but ids are text or "
            "integers, one for every row."
        )
    if shape[0] != count:
        raise DataError(
            f"{file.path} holds {shape[0]} ids for {count} rows; there must be one id for every "
            "row."
        )
    values = file.read(name, 0, shape[0])
    return text_array(pa.array(values) if isinstance(values, np.ndarray) else values)


def _one_row_arrays(file: Arrays, group: str | None) -> dict[str, str]:
    """Name by id of arrays that are one row each, as one data set an id is written.

    Nothing if the file, or the group that is asked for, holds anything else.
    """
    if group is None and not {"embeddings", "data"}.isdisjoint(file.entries):
        return {}
    prefix = "" if group is None else group.strip("/") + "/"
    names = [name for name in file.entries if name.startswith(prefix)]
    if (group is not None and group in file.entries) or len(names) < (1 if prefix else 2):
        return {}
    lengths = set()
    for name in names:
        shape, dtype = file.entries[name]
        row = shape and len(shape) <= 3 and all(length == 1 for length in shape[:-1])
        if not row or isinstance(dtype, str) or dtype.kind != "f":
            return {}
        lengths.add(shape[-1])
    if len(lengths) != 1:
        return {}
    parents = {name.rpartition("/")[0] for name in names}
    if len(parents) == 1:
        prefix = "".join(parent + "/" for parent in parents if parent)
    return {name[len(prefix) :]: name for name in names}


def _gathered(file: Arrays, names: dict[str, str]) -> EmbeddingSource:
    """Embeddings whose rows are an array each."""
    arrays = list(names.values())
    columns = file.entries[arrays[0]][0][-1]
    dtypes = {file.entries[name][1] for name in arrays}

    def read(rows: int) -> Iterator[np.ndarray]:
        with file.opened() as read_rows:
            for start in range(0, len(arrays), rows):
                block = []
                for name in arrays[start : start + rows]:
                    block.append(np.asarray(read_rows(name, 0, file.entries[name][0][0])))
                yield np.stack([row.reshape(columns) for row in block])

    shape, kind = (len(arrays), columns), _smallest_float(dtypes)
    ids_from = f"the names of {len(arrays)} arrays"
    return EmbeddingSource(file.path, shape, kind, pa.array(list(names)), read, ids_from)


# --- text ---------------------------------------------------------------------------------------


def _text_embeddings(file: TextColumns, header: bool | None) -> EmbeddingSource:
    remark = ""
    if not (_embedding_header(file.first) if header is None else header):
        file.without_header()
    elif header is None and any(map(is_number, file.first)):
        remark = ", the first line taken for a header (--no-header says other)"
    sample = next(file.batches(file.names), None)
    if sample is None or not sample.num_rows:
        raise DataError(f"{file.path} holds no embeddings, only a header; give a file with rows.")
    if len(set(file.names)) < len(file.names):
        raise DataError(f"{file.path} has columns of the same name; give each its own.")
    words = [
        name
        for number, name in enumerate(file.names)
        if not is_number(sample.column(number)[0].as_py()) and sample.column(number)[0].as_py()
    ]
    named = [name for name in file.names if names_ids(name)]
    sure = [name for name in named if ID_PATTERN.fullmatch(name)]
    key = next(iter(sure or words or named), None)
    if key is None:
        count, holds_ids = _look_for_ids(file)
        key = file.names[0] if holds_ids else None
    numbers = [name for name in file.names if name != key]
    _refuse_more_ids(file, key, [name for name in numbers if name in words])
    ids = None
    if key is not None:
        chunks = [batch.column(0) for batch in file.batches([key])]
        ids = text_array(pa.chunked_array(chunks, pa.string()))
        count = len(ids)

    def read(rows: int) -> Iterator[np.ndarray]:
        for batch in file.batches(numbers, numbers=numbers):
            yield _stack(batch, np.dtype(np.float64))

    shape, named_by = (count, len(numbers)), f"column {key!r}"
    return EmbeddingSource(file.path, shape, np.dtype(np.float64), ids, read, named_by, remark)


def _look_for_ids(file: TextColumns) -> tuple[int, bool]:
    """The number of rows, and whether the first column holds ids: integers, but not all proper."""
    count, strange, fractions = 0, False, False
    for batch in file.batches(file.names[:1]):
        texts = pc.utf8_trim_whitespace(batch.column(0))
        zeros = pc.match_substring_regex(texts, LEADING_ZEROS)
        numbers = pc.match_substring_regex(texts, NUMBER)
        blank = pc.match_substring_regex(texts, r"^([+-]?(nan|inf|infinity))?$", ignore_case=True)
        strange |= pc.any(pc.or_(zeros, pc.invert(pc.or_(numbers, blank)))).as_py() or False
        whole = pc.match_substring_regex(texts, r"^[+-]?[0-9]+$")
        fractions |= pc.any(pc.and_not(numbers, whole)).as_py() or False
        count += batch.num_rows
    return count, strange and not fractions


def _refuse_more_ids(file: Columns, key: str | None, words: Sequence[str]) -> None:
    """Refuse columns beside `key` that hold no numbers, or numbers that stand for something."""
    more = [
        name
        for name in file.names
        if name != key
        and (name in words or name.lower() in INDEX_NAMES or ID_PATTERN.fullmatch(name))
    ]
    if more:
        listed = _names_listed(more if key is None else [key, *more])
        raise DataError(
            f"{file.path} has columns that hold no numbers of embeddings: {listed}; "
            "keep one with ids, as text or integers, and the columns of numbers."
        )


def _names_listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:12]) + (" ..." if len(names) > 12 else "")


def names_ids(name: str) -> bool:
    """Whether a column is called as columns of ids usually are."""
    return name.lower() in ID_NAMES or ID_PATTERN.fullmatch(name) is not None


def _embedding_header(first: list[str]) -> bool:
    """Whether a first line is a header: not numbers (one id aside), or numbers 0, 1, 2 ...

    One word that is a usual name of ids before different whole numbers is a header too.
    """
    for fields in (first, first[1:]):
        if len(fields) > 1 and fields == [str(number) for number in range(len(fields))]:
            return True
    if any(is_number(field) and not field.strip().isdecimal() for field in first):
        return False  # 0.5 or nan names no column; what is missing beside it is no word
    words = [field for field in first if not is_number(field)]
    if len(words) == 1 and names_ids(words[0]):
        numbers = {field for field in first if field.isdecimal()}
        return len(numbers) == len(first) - 1
    return len(words) > 1 or len(words) == len(first)


def _stack(batch: pa.RecordBatch, dtype: np.dtype) -> np.ndarray:
    """Columns of numbers side by side; what is missing becomes NaN."""
    block = np.empty((batch.num_rows, batch.num_columns), dtype)
    for number, column in enumerate(batch.columns):
        wide = column.cast(pa.from_numpy_dtype(dtype), safe=False)
        block[:, number] = pc.fill_null(wide, np.nan).to_numpy(zero_copy_only=False)
    return block


# --- columns of Parquet and Arrow -----------------------------------------------------------------


def _is_list(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(kind) for test in lists) and is_numeric_type(kind.value_type)


def _column_embeddings(file: Columns, dataset: str | None) -> EmbeddingSource:
    kinds = {name: file.type_of(name) for name in file.names}
    if dataset is not None and dataset not in kinds:
        raise DataError(
            f"{file.path} has no column {dataset!r}; it has {_names_listed(file.names)}."
        )
    lists = [dataset] if dataset else [name for name in kinds if _is_list(kinds[name])]
    if len(lists) > 1 or (dataset and not _is_list(kinds[dataset])):
        raise DataError(
            f"{file.path} does not say which column holds the embeddings; it needs one column of "
            f"lists of numbers and has {_names_listed(file.names)}: name one with --dataset."
        )
    key = _id_column(file, kinds, lists)
    count = file.count_rows([])
    ids = None
    if key is not None:
        chunks = [text_array(batch.column(0)) for batch in file.batches([key])]
        ids = text_array(pa.chunked_array(chunks, pa.string()))
    named_by = f"column {key!r}"
    if lists:
        return _list_embeddings(file, lists[0], count, ids, named_by)
    _refuse_more_ids(file, key, [])
    numbers = [name for name in kinds if name != key]
    dtype = _smallest_float(numpy_type(kinds[name]) for name in numbers)

    def read(rows: int) -> Iterator[np.ndarray]:
        for batch in file.batches(numbers):
            yield _stack(batch, dtype)

    return EmbeddingSource(file.path, (count, len(numbers)), dtype, ids, read, named_by)


def _id_column(file: Columns, kinds: dict[str, pa.DataType], lists: Sequence[str]) -> str | None:
    """The column of ids: beside lists text or integers, beside columns of numbers only text."""
    texts = [name for name in kinds if is_text_type(kinds[name])]
    able = [
        n for n in kinds if n not in lists and (is_text_type(kinds[n]) or is_numeric_type(kinds[n]))
    ]
    named = sorted(filter(names_ids, able), key=lambda n: ID_PATTERN.fullmatch(n) is None)
    if lists:
        only = able if len(able) == 1 else texts if len(texts) == 1 else []
        return next(iter(named or only), None)
    strange = [n for n in kinds if not is_text_type(kinds[n]) and not is_numeric_type(kinds[n])]
    if strange or len(texts) > 1:
        raise DataError(
            f"{file.path} holds no embeddings: it needs one column of lists of numbers, or columns "
            f"of numbers and at most one of text, and has {_names_listed(file.names)}."
        )
    integers = [name for name in named if not pa.types.is_floating(kinds[name])]
    return next(iter(texts or integers), None)


def _list_embeddings(
    file: Columns, name: str, count: int, ids: pa.Array | None, named_by: str
) -> EmbeddingSource:
    dtype = _smallest_float([numpy_type(file.type_of(name).value_type)])
    first = next(file.batches([name]), None)
    columns = 0
    if first is not None and first.num_rows and first.column(0)[0].is_valid:
        columns = len(first.column(0)[0])

    def read(rows: int) -> Iterator[np.ndarray]:
        start = 0
        for batch in file.batches([name]):
            lengths = pc.fill_null(pc.list_value_length(batch.column(0)), 0).to_numpy()
            if (lengths != columns).any():
                row = int(np.flatnonzero(lengths != columns)[0])
                raise DataError(
                    f"{file.path} has {lengths[row]} numbers in row {start + row} (counted from 0) "
                    f"of column {name!r} and {columns} in row 0; all rows need the same."
                )
            values = pc.list_flatten(batch.column(0)).cast(pa.from_numpy_dtype(dtype), safe=False)
            flat = pc.fill_null(values, np.nan).to_numpy(zero_copy_only=False)
            yield flat.reshape(-1, columns)
            start += batch.num_rows

    return EmbeddingSource(file.path, (count, columns), dtype, ids, read, named_by)
