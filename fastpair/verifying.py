"""Whether a file is whole: everything in it is read and compared with the checksums that it has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from fastpair.blocks import MOST_CHECKERS, checksum_of
from fastpair.hdf5 import (
    READING_ERRORS,
    array_checksum,
    attributes_checksum,
    check_readable,
    fastpair_kind,
    open_hdf5,
    read_text,
    text_checksum,
)
from fastpair.journal import read_log_facts
from fastpair.staging import read_at

READ_AT_ONCE = 1 << 24
"""Bytes of a data set without checksums that are read together."""


@dataclass(frozen=True)
class Damage:
    """What is wrong with a file.

    Parameters
    ----------
    where : the data set or the columns, or "attributes".
    block : number of the damaged block, None where there are no blocks.
    first, last : its first and last row; None where it has none.
    what : what was found, in words.
    """

    where: str
    block: int | None
    first: int | None
    last: int | None
    what: str

    def __str__(self) -> str:
        rows = "" if self.first is None else f"rows {self.first} to {self.last} of "
        return f"{rows}{self.where} {self.what}"


def blocks_whole(path: Path, file: h5py.File) -> np.ndarray | None:
    """Which blocks of rows agree with their checksums, (blocks,) bool; None: no blocks here.

    A block that was never written has the checksum 0 and is not whole.
    """
    if "block_checksum" not in file or "checksum_rows" not in file.attrs:
        return None
    kind = str(file.attrs.get("fastpair_kind"))
    usual = {"table": "rows", "scores": "score"}.get(kind, "")
    names = str(file.attrs.get("checksum_columns", usual)).split()
    columns = [file[name] for name in names]
    size, rows = int(file.attrs["checksum_rows"]), len(columns[0])
    sums = file["block_checksum"][:]
    if len(sums) != -(-rows // size):
        raise ValueError(f"{len(sums)} checksums for {rows} rows in blocks of {size}")
    places = [column.id.get_offset() for column in columns]
    descriptor = os.open(path, os.O_RDONLY)

    def is_whole(number: int) -> bool:
        begin, end = number * size, min((number + 1) * size, rows)
        try:
            arrays = [
                _raw(column, descriptor, place, begin, end)
                for column, place in zip(columns, places, strict=True)
            ]
        except READING_ERRORS:
            return False
        return bool(sums[number]) and checksum_of(arrays) == int(sums[number])

    try:
        with ThreadPoolExecutor(min(MOST_CHECKERS, os.cpu_count() or 1)) as pool:
            return np.fromiter(pool.map(is_whole, range(len(sums))), bool, len(sums))
    finally:
        os.close(descriptor)


def _raw(
    column: h5py.Dataset, descriptor: int, place: int | None, begin: int, end: int
) -> np.ndarray:
    """Rows as bytes, from their place or, in compressed chunks, through HDF5."""
    shape = (end - begin, *column.shape[1:])
    if place is None:
        import hdf5plugin  # noqa: F401  registers the filters that `--compression` offers

        rows = np.zeros(shape, column.dtype)  # what pads a row stays zero
        if rows.size:
            column.read_direct(rows, np.s_[begin:end])
        return rows.reshape(-1).view(np.uint8)
    width = column.dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
    data = np.empty((end - begin) * width, np.uint8)
    read_at(descriptor, data, place + begin * width)
    return data


def verify(path: str | Path) -> dict[str, Any]:
    """Read a whole HDF5 file and compare everything with its checksums.

    Returns
    -------
    dict
        `whole`, `damaged` (a list of `where`, `block`, `first`, `last`, `what`), `checked` (names
        that have checksums) and `unchecked` (names that were read and have none).

    Raises
    ------
    FileError
        The file is missing, not HDF5, or so damaged that nothing in it can be told.
    """
    path = check_readable(path)
    damages: list[Damage] = []
    checked: list[str] = []
    unchecked: list[str] = []
    with open_hdf5(path, locking=False) as file:
        fastpair_kind(file, path)
        covered = _verify_blocks(path, file, damages)
        checked += covered
        stored = file.attrs.get("attributes_checksum")
        if stored is not None:
            checked.append("attributes")
            if attributes_checksum(file) != int(stored):
                what = "do not agree with their checksum"
                damages.append(Damage("attributes", None, None, None, what))

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset) and name not in covered:
                has = "checksum" in item.attrs
                (checked if has else unchecked).append(name)
                damages.extend(_verify_data_set(name, item))

        file.visititems(visit)
    return {
        "whole": not damages,
        "damaged": [vars(damage) | {"sentence": str(damage)} for damage in damages],
        "checked": checked,
        "unchecked": unchecked,
    }


def _verify_blocks(path: Path, file: h5py.File, damages: list[Damage]) -> list[str]:
    whole = blocks_whole(path, file)
    if whole is None:
        return []
    kind = str(file.attrs.get("fastpair_kind"))
    names = str(file.attrs.get("checksum_columns", "rows" if kind == "table" else "score"))
    size, rows = int(file.attrs["checksum_rows"]), len(file[names.split()[0]])
    for number in np.flatnonzero(~whole).tolist():
        first, last = number * size, min((number + 1) * size, rows) - 1
        where = names.replace(" ", ", ")
        what = f"(block {number}) do not agree with their checksum"
        damages.append(Damage(where, number, first, last, what))
    return [*names.split(), "block_checksum"]


def _verify_data_set(name: str, item: h5py.Dataset) -> Iterator[Damage]:
    """Read a data set in parts; compare it with its checksum if it has one."""
    stored = item.attrs.get("checksum")
    text = h5py.check_string_dtype(item.dtype) is not None
    try:
        if stored is not None:
            found = text_checksum(read_text(item)) if text else array_checksum(item[()])
            if found != int(stored):
                yield Damage(name, None, None, None, "does not agree with its checksum")
            return
    except READING_ERRORS as error:
        yield Damage(name, None, None, None, f"cannot be read ({_short(error)})")
        return
    if item.shape is None or item.ndim == 0:
        return
    row_bytes = max(1, item.dtype.itemsize * int(np.prod(item.shape[1:], dtype=np.int64)))
    step = max(1, READ_AT_ONCE // row_bytes)
    if item.chunks:
        step = -(-step // item.chunks[0]) * item.chunks[0]
        import hdf5plugin  # noqa: F401  registers the compressions of other writers
    for first in range(0, len(item), step):
        try:
            item[first : first + step]
        except READING_ERRORS as error:
            last = min(first + step, len(item)) - 1
            yield Damage(name, None, first, last, f"cannot be read ({_short(error)})")


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 100 else text[:97] + "..."


def describe_log(path: str | Path) -> dict[str, Any] | None:
    """What a log of an unfinished run is; None if the file is no such log."""
    path = check_readable(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        facts = read_log_facts(descriptor)
    finally:
        os.close(descriptor)
    if facts is None:
        return None
    return {
        "path": str(path),
        "kind": facts.get("kind"),
        "datasets": {},
        "attributes": dict(facts),
        "ids": False,
        "whole": None,
        "summary": f"a log of an unfinished {facts.get('kind')}; --resume goes on with it",
    }
