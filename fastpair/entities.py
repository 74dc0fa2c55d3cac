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
    rows : cells by id, in the order of the columns; ids that the table does not have are not there.
    key : the column of ids.
    """

    columns: list[str]
    rows: dict[str, list[str]]
    key: str


def open_entities(path: str | Path) -> Columns:
    """Open a table of entities: CSV, TSV, Parquet or Arrow with the names of its columns.

    Raises
    ------
    DataError
        The file holds no columns, or none that could be ids.
    """
    file = open_format(path, pairs=True)
    if isinstance(file, Arrays) or len(file.names) < 2:
        raise DataError(
            f"{path} is no table of entities: it needs a column of ids and others with what they "
            "stand for."
        )
    if not _able(file):
        raise DataError(f"{path} has no column of texts or numbers that could be ids.")
    return file


def read_entities(path: str | Path, wanted: Sequence[str]) -> EntityTexts:
    """Read the rows of a table whose id is wanted, block by block, twice.

    Parameters
    ----------
    path : as `open_entities` takes it. The ids are in the column that has most of them; see
        `_id_column`.
    wanted : ids.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    file = open_entities(path)
    ids = pa.array(list(dict.fromkeys(wanted)), pa.string())
    key = _id_column(file, ids)
    columns = [name for name in _able(file) if name != key][:MOST_COLUMNS]
    rows: dict[str, list[str]] = {}
    for batch in file.batches([key, *columns]):
        texts = [column.cast(pa.string()) for column in batch.columns]
        found = pc.is_in(texts[0], value_set=ids)
        if not pc.any(found).as_py():
            continue
        for cells in zip(*(text.filter(found).to_pylist() for text in texts), strict=True):
            rows.setdefault(cells[0], ["" if cell is None else cell for cell in cells[1:]])
    return EntityTexts(columns, rows, key)


def _id_column(file: Columns, ids: pa.Array) -> str:
    """Return the column that has most different ids, or one named like ids if it has half as many.

    Of columns with as many ids that is the likeliest by its name, then the one with fewer repeats.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    from fastpair.ingest import names_ids

    able = _able(file)
    found: list[set[str]] = [set() for _ in able]
    rows = [0] * len(able)
    for batch in file.batches(able):
        for number, column in enumerate(batch.columns):
            text = column.cast(pa.string())
            text = text.filter(pc.is_in(text, value_set=ids))
            found[number].update(text.unique().to_pylist())
            rows[number] += len(text)

    def rank(number: int) -> tuple[bool, int, bool, int]:
        name, count = able[number], len(found[number])
        clear = 2 * count >= max(map(len, found))
        return clear and names_ids(name), count, name.lower() in ("id", "ids"), -rows[number]

    return able[max(range(len(able)), key=rank)]


def _able(file: Columns) -> list[str]:
    """Return the columns that can be ids or be shown."""
    return [name for name in file.names if _plain(file.type_of(name))]


def _plain(kind: pa.DataType) -> bool:
    """Whether values of a type can be shown as a few words."""
    import pyarrow as pa

    return not (
        pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    )
