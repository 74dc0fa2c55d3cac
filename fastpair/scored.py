"""Scored pairs out of what `score` and `matrix` wrote, or of any file with keys and a score.

Entities are numbered as nodes: rows of a table where there is one, else keys by first appearance.
Of two tables, the rows of the right one are numbered after those of the left one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpair.errors import ArgumentError, DataError, MismatchError
from fastpair.files import Table
from fastpair.formats import Arrays, open_format
from fastpair.hdf5 import fastpair_kind, open_hdf5, read_text
from fastpair.ids import text_array
from fastpair.pairs import RawPairs, open_pairs, open_raw_pairs

Block = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Left and right nodes (b,) int64 and scores (b,) float64 of some pairs."""

PAIRS_AT_ONCE = 1 << 20

SCORE_COLUMNS = ("score", "probability", "distance")
"""What columns of scores are called, by the unit that was written."""


@dataclass(frozen=True)
class ScoredPairs:
    """Pairs of nodes with scores, read block by block, as often as wanted.

    Parameters
    ----------
    path : the file.
    nodes : N, how many entities there are; of two tables, of both.
    ids : (N,) text, or None: nodes are row numbers.
    left_nodes : how many of them are of the left table; N where there is one table.
    unit : what scores are, "" where the file does not say.
    blocks : gives the pairs.
    """

    path: Path
    nodes: int
    ids: pa.Array | None
    left_nodes: int
    unit: str
    blocks: Callable[[], Iterator[Block]]


def open_scored(
    path: Path,
    *,
    pairs: Path | None = None,
    table: Table | None = None,
    left_column: str | None = None,
    right_column: str | None = None,
    score_column: str | None = None,
) -> ScoredPairs:
    """Open scored pairs.

    Parameters
    ----------
    path : HDF5 of `fastpair score` or `fastpair matrix` (threshold or top-k), or CSV, TSV or
        Parquet with two key columns and a score.
    pairs : the pair file that was scored, for scores that stand without keys.
    table : its rows are the entities, so that those without a pair count too and row numbers get
        ids; default: entities are what the pairs name.
    left_column, right_column : key columns, default found by their usual names.
    score_column : name of the score in CSV and Parquet; default: `score`, or what `fastpair score`
        calls it in the unit that it wrote.

    Raises
    ------
    FileError, DataError : the file cannot be read, or holds no scored pairs.
    """
    path = Path(path)
    columns = left_column, right_column
    found = open_format(path)
    if not isinstance(found, Arrays):
        if pairs is not None:
            raise ArgumentError(f"{path} has keys of its own: leave out --pairs {pairs}")
        known = [name for name in SCORE_COLUMNS if name in found.names]
        column = score_column or (known[0] if known else SCORE_COLUMNS[0])
        return _keyed(path, table, columns, column, column)
    with open_hdf5(path) as file:
        kind = fastpair_kind(file, path)
        form, unit = str(file.attrs.get("form")), str(file.attrs.get("unit", ""))
        keyed = "left" in file
        count = len(file["score"]) if kind == "scores" else 0
    if kind == "matrix":
        if pairs is not None or table is not None:
            raise ArgumentError(f"{path} is a matrix, which goes without --pairs and --table")
        return _matrix(path, form, unit)
    if kind != "scores":
        raise DataError(
            f"{path} is neither scores nor a matrix: give what score or matrix wrote, or CSV or "
            "Parquet with two key columns and a score"
        )
    if keyed:
        return _rows(path, table, unit)
    if pairs is None:
        raise ArgumentError(f"{path} holds scores without keys: name the pair file with --pairs")
    return _with_scores(_keyed(pairs, table, columns, None, unit), path, count)


# --- matrices and kept pairs ----------------------------------------------------------------------


def _matrix(path: Path, form: str, unit: str) -> ScoredPairs:
    """A threshold or a top-k matrix; each pair of one table comes once or twice."""
    if form not in ("threshold", "top_k"):
        raise DataError(
            f"{path} is a {form} matrix, expected one of --threshold or --top-k: those keep pairs"
        )
    with open_hdf5(path) as file:
        names = [name for name in ("ids", "ids_right") if name in file]
        texts = [read_text(file[name]) for name in names]
        left = len(file["indptr"]) - 1 if form == "threshold" else len(file["indices"])
        two = bool(file.attrs.get("two_tables", "ids_right" in file))
        right = int(file["shape"][1]) if "shape" in file else 0
        right = int(file.attrs["shape"][1]) if form == "threshold" else right
        if two and form == "top_k":
            right = _greatest(file["indices"]) + 1
            right = len(texts[-1]) if "ids_right" in names else right
    nodes = left + right if two else left
    ids = pa.concat_arrays(texts) if texts else None
    shift = left if two else 0
    blocks = _sparse_blocks if form == "threshold" else _top_k_blocks
    given = None if ids is None or len(ids) != nodes else ids
    return ScoredPairs(path, nodes, given, left, unit, lambda: blocks(path, shift))


def _greatest(dataset: h5py.Dataset) -> int:
    step = max(1, PAIRS_AT_ONCE // max(1, dataset.shape[1]))
    parts = (dataset[n : n + step] for n in range(0, len(dataset), step))
    return max((int(part.max(initial=-1)) for part in parts), default=-1)


def _sparse_blocks(path: Path, shift: int) -> Iterator[Block]:
    with open_hdf5(path) as file:
        ends, indices, data = file["indptr"][:], file["indices"], file["data"]
        for start in range(0, int(ends[-1]), PAIRS_AT_ONCE):
            stop = min(start + PAIRS_AT_ONCE, int(ends[-1]))
            left = np.searchsorted(ends, np.arange(start, stop), side="right") - 1
            right, scores = indices[start:stop].astype(np.int64), data[start:stop].astype(float)
            once = slice(None) if shift else left < right  # of one table both triangles are there
            yield left[once], right[once] + shift, scores[once]


def _top_k_blocks(path: Path, shift: int) -> Iterator[Block]:
    with open_hdf5(path) as file:
        indices, scores = file["indices"], file["scores"]
        step = max(1, PAIRS_AT_ONCE // max(1, indices.shape[1]))
        for start in range(0, len(indices), step):
            right = indices[start : start + step].astype(np.int64)
            given = right >= 0
            left = np.broadcast_to(np.arange(start, start + len(right))[:, None], right.shape)
            kept = scores[start : start + step].astype(float)
            yield left[given], right[given] + shift, kept[given]


def _rows(path: Path, table: Table | None, unit: str) -> ScoredPairs:
    """Scores that were kept, with the rows of their pairs."""
    with open_hdf5(path) as file:
        two = bool(file.attrs.get("two_tables", False))
        sizes = [_most(file[name]) + 1 for name in ("left", "right")]
    if two:
        if table is not None:
            raise ArgumentError(f"{path} holds pairs of two tables: leave out --table")
        return ScoredPairs(
            path, sum(sizes), None, sizes[0], unit, lambda: _row_blocks(path, sizes[0])
        )
    nodes, ids = max(sizes), None
    if table is not None:
        if nodes > len(table.rows):
            raise DataError(
                f"{path} has a pair with row {nodes - 1}, but the table has {len(table.rows)} rows:"
                " give the table that was scored"
            )
        nodes, ids = len(table.rows), table.ids
    return ScoredPairs(path, nodes, ids, nodes, unit, lambda: _row_blocks(path, 0))


def _most(dataset: h5py.Dataset) -> int:
    starts = range(0, len(dataset), PAIRS_AT_ONCE)
    return max((int(dataset[n : n + PAIRS_AT_ONCE].max()) for n in starts), default=-1)


def _row_blocks(path: Path, shift: int) -> Iterator[Block]:
    with open_hdf5(path) as file:
        for start in range(0, len(file["score"]), PAIRS_AT_ONCE):
            part = slice(start, start + PAIRS_AT_ONCE)
            left, right = (file[name][part].astype(np.int64) for name in ("left", "right"))
            yield left, right + shift, file["score"][part].astype(float)


# --- keys ---------------------------------------------------------------------------------------


def _keyed(
    path: Path,
    table: Table | None,
    columns: tuple[str | None, str | None],
    score: str | None,
    unit: str,
) -> ScoredPairs:
    """A file of keys; with `score`, the name of a column, also of scores (else they are NaN)."""
    extra = [] if score is None else [score]
    raw = open_raw_pairs(path, *columns, extra=extra)
    if table is None and raw.integers:
        nodes, ids = _most_key(raw) + 1, None
    elif table is None:
        ids = _distinct_keys(raw)
        nodes = len(ids)
    else:
        nodes, ids = len(table.rows), table.ids
    keys = "auto" if table is not None else "rows" if ids is None else "ids"

    def blocks() -> Iterator[Block]:
        source = open_pairs(
            path,
            ids=ids,
            count=nodes,
            left_column=columns[0],
            right_column=columns[1],
            keys=keys,
            extra=extra,
        )
        for block in source.blocks(PAIRS_AT_ONCE):
            scores = np.full(len(block.left), np.nan)
            if score is not None:
                scores = _numbers(block.extra[0], score, path)
            yield block.left.astype(np.int64), block.right.astype(np.int64), scores

    return ScoredPairs(path, nodes, ids, nodes, unit, blocks)


def _most_key(raw: RawPairs) -> int:
    batches = (column for batch in raw.read(0) for column in batch.columns[:2] if len(column))
    return max((int(pc.max(column).as_py() or 0) for column in batches), default=-1)


def _distinct_keys(raw: RawPairs) -> pa.Array:
    """Every key of a file once, by first appearance."""
    kept, waiting = pa.array([], pa.string()), 0
    parts = [kept]
    for batch in raw.read(0):
        keys = pa.concat_arrays([text_array(batch.column(0)), text_array(batch.column(1))])
        parts.append(pc.unique(keys.drop_null()))
        waiting += len(parts[-1])
        if waiting > len(kept):  # so that the work stays in proportion
            kept, waiting = pc.unique(pa.concat_arrays(parts)), 0
            parts = [kept]
    return pc.unique(pa.concat_arrays(parts))


def _numbers(values: Any, column: str, path: Path) -> np.ndarray:
    try:
        numbers = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid as error:
        raise DataError(f"the column {column} of {path} holds no numbers: {error}") from error
    return np.asarray(numbers, np.float64)


def _with_scores(keys: ScoredPairs, path: Path, count: int) -> ScoredPairs:
    """Pairs of a file with the scores of another one, which stand in its order."""

    def blocks() -> Iterator[Block]:
        done = 0
        with open_hdf5(path) as file:
            for left, right, _ in keys.blocks():
                scores = file["score"][done : done + len(left)].astype(float)
                done += len(left)
                if len(scores) < len(left):
                    break
                yield left, right, scores
        if done != count:
            raise MismatchError(
                f"{path} holds {count} scores, but {keys.path} another number of pairs: give the "
                "pair file that was scored"
            )

    return replace(keys, path=path, blocks=blocks)
