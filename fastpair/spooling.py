"""Standard input and pipes: copied to a file without a name, because files are read repeatedly.

The copy lies in the folder for temporary files (TMPDIR) and is gone when the process ends, however
it ends; but HDF5 opens files by their names, so that a copy of HDF5 has one, and a process that is
killed leaves it there.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import IO

from fastpair.errors import ArgumentError, FileError

COPIED_BYTES = 1 << 20
"""Bytes that are copied together."""

_copies: dict[str, tuple[str, IO[bytes]]] = {}
"""Path of a copy -> what it is a copy of, and the file, which lives as long as it is open."""


def is_stream(path: Path) -> bool:
    """Whether a path is standard input or a pipe, which can be read only once."""
    return str(path) in ("-", "/dev/stdin") or path.is_fifo()


def received(path: Path | None) -> Path:
    """The path of an input, or of a copy of it where it is standard input or a pipe.

    Raises
    ------
    ArgumentError
        Standard input is given twice.
    FileError
        There is no room for the copy.
    """
    assert path is not None
    path = Path(path)
    if not is_stream(path):
        return path
    standard = not path.is_fifo() or str(path) == "/dev/stdin"
    name = "standard input" if standard else str(path)
    if standard and any(name == copied for copied, _ in _copies.values()):
        raise ArgumentError(
            "standard input (-) is given twice, but it can be only one of the files"
        )
    folder = tempfile.gettempdir()
    try:
        with open(sys.stdin.fileno() if standard else path, "rb", closefd=not standard) as source:
            block = source.read(COPIED_BYTES)
            hdf5 = block.startswith(b"\x89HDF")
            make = tempfile.NamedTemporaryFile if hdf5 else tempfile.TemporaryFile
            copy: IO[bytes] = make(prefix="fastpair-", dir=folder)
            while block:
                copy.write(block)
                block = source.read(COPIED_BYTES)
        copy.flush()
    except OSError as error:
        raise FileError(
            f"{name} could not be copied to a file in {folder} ({error.strerror}): it is copied "
            "because it is read more than once; set TMPDIR to a folder with more room."
        ) from error
    place = copy.name if hdf5 else f"/proc/self/fd/{copy.fileno()}"
    _copies[place] = name, copy
    return Path(place)


def named(sentence: str) -> str:
    """A message that calls a copy by what it is a copy of."""
    for place, (name, _) in _copies.items():
        sentence = sentence.replace(place, name)
    return sentence
