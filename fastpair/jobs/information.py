"""`info`: what a file is, and whether it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastpair.files import describe
from fastpair.formats import Arrays, Columns, open_format
from fastpair.hdf5_arrays import Hdf5Arrays
from fastpair.jobs.inputs import Summary
from fastpair.results import (
    SCORE_BLOCK,
)
from fastpair.verifying import describe_log
from fastpair.verifying import verify as verify_file

if TYPE_CHECKING:
    pass


def info(file: Path, *, verify: bool = False) -> Summary:
    """Say what a file is and whether it is whole.

    Parameters
    ----------
    verify : read everything in it, and say where it is damaged.

    Returns
    -------
    summary : ``summary`` (a sentence), ``kind`` (None for files of others), ``datasets`` (shape
        and type by name), ``attributes``, ``ids``, ``whole`` (None where nothing tells); with
        `verify` also ``damaged``, ``checked`` and ``unchecked``, see `fastpair.verifying.verify`.
    """
    logged = describe_log(file)
    if logged is not None:
        return logged
    found = open_format(file)
    if isinstance(found, Hdf5Arrays):
        return {**describe(file), **(verify_file(file) if verify else {})}
    checks = _read_through(found) if verify else {}
    if isinstance(found, Arrays):
        entries = {
            name: (list(shape), str(dtype)) for name, (shape, dtype) in found.entries.items()
        }
    else:
        rows = found.count_rows(found.names)
        entries = {name: ([rows], str(found.type_of(name))) for name in found.names}
    return {
        "path": str(file),
        "kind": None,
        "datasets": {name: {"shape": s, "dtype": t} for name, (s, t) in entries.items()},
        "attributes": {},
        "ids": False,
        "whole": None,
        "summary": f"a file of {found.format_name} with {', '.join(map(str, entries))}",
        **checks,
    }


def _read_through(file: Arrays | Columns) -> Summary:
    """Read all of a file that has no checksums of ours; a FileError if that cannot be done."""
    if isinstance(file, Arrays):
        names = list(file.entries)
        for name, (shape, _) in file.entries.items():
            for start in range(0, shape[0] if shape else 0, SCORE_BLOCK):
                file.read(name, start, min(start + SCORE_BLOCK, shape[0]))
    else:
        names = list(file.names)
        for _ in file.batches(names):
            pass
    return {"damaged": [], "checked": [], "unchecked": names}
