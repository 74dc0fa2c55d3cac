"""A table of entities: what an id stands for, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastpair.errors import DataError
from fastpair.formats import Arrays, Columns, open_format

if TYPE_CHECKING:
    import pyarrow as pa

MOST_COLUMNS = 6
"""Columns of a table that are shown, the first ones."""


@dataclass(frozen=True)
class EntityTexts:
    """What a table says of some entities.

    Parameters
    ----------
    columns : names of the columns that are shown.
    rows : cells by id, in the order of the columns.
    """

    columns: list[str]
    rows: dict[str, list[str]]


def read_entities(path: str | Path, wanted: Sequence[str]) -> EntityTexts:
    """Read the rows of a table whose id is wanted, block by block.

    Parameters
    ----------
    path : CSV, TSV, Parquet or Arrow, whose first line or schema names the columns. The ids are in
        the column that has most of them in its first rows.
    wanted : ids.

    Raises
    ------
    DataError
        The file holds no columns, or none of the ids.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    file = open_format(path, pairs=True)
    if isinstance(file, Arrays) or len(file.names) < 2:
        raise DataError(
            f"{path} is no table of entities: it needs a column of ids and others with what they "
            "stand for."
        )
    ids = pa.array(list(dict.fromkeys(wanted)), pa.string())
    key = _id_column(file, ids)
    columns = [name for name in file.names if name != key and _plain(file.type_of(name))]
    columns = columns[:MOST_COLUMNS]
    rows: dict[str, list[str]] = {}
    for batch in file.batches([key, *columns]):
        texts = [column.cast(pa.string()) for column in batch.columns]
        found = pc.is_in(texts[0], value_set=ids)
        if not pc.any(found).as_py():
            continue
        for cells in zip(*(text.filter(found).to_pylist() for text in texts), strict=True):
            rows.setdefault(cells[0], ["" if cell is None else cell for cell in cells[1:]])
    if len(ids) and not rows:
        raise DataError(
            f"{path} has none of the ids in its column {key!r}, such as {ids[0].as_py()!r}: name "
            "the column of ids 'id'."
        )
    return EntityTexts(columns, rows)


def _id_column(file: Columns, ids: pa.Array) -> str:
    """Return the column that has most of the ids in the first rows; of equal ones the likeliest."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from fastpair.ingest import names_ids

    able = [name for name in file.names if _plain(file.type_of(name))]
    if not able:
        raise DataError(f"{file.path} has no column of texts or numbers that could be ids.")
    able.sort(key=lambda name: (name.lower() not in ("id", "ids"), not names_ids(name)))
    first = next(file.batches(able), None)
    if first is None:
        return able[0]
    found = [
        pc.sum(pc.is_in(one.cast(pa.string()), value_set=ids)).as_py() for one in first.columns
    ]
    return max(zip(found, range(0, -len(able), -1), able, strict=True))[2]


def _plain(kind: pa.DataType) -> bool:
    """Whether values of a type can be shown as a few words."""
    import pyarrow as pa

    return not (
        pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    )
