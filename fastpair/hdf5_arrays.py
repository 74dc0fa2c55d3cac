"""Data sets of any HDF5 file, whoever wrote it: found, checked before they are read, and read.

What a file says of itself is checked first: data sets that lie in other files, chunks and texts
that would take more memory than any sensible file does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa

from fastpair.chunks import ChunkReader, inflates, rows_together
from fastpair.errors import DataError, FileError
from fastpair.hdf5 import (
    OWN_PART,
    READING_ERRORS,
    check_readable,
    fastpair_kind,
    file_named,
    open_hdf5,
    read_text,
)
from fastpair.heaps import check_heaps

ReadRows = Callable[[str, int, int], np.ndarray | pa.Array]
"""Gives rows of an array by its name, from one row to another."""

MOST_CHUNK_BYTES = 1 << 30
"""Bytes of a chunk, inflated, that are read at most: a chunk is in memory as a whole."""

MOST_TEXT_BYTES = 1 << 16
"""Bytes of a text of fixed length that are read at most."""

OPEN_DATASETS = 64
"""Data sets that are kept open while rows are read."""

LEAVE, REFUSE, FOLLOW = "leave", "refuse", "follow"
"""What to do with data that lie in other files: not list them, refuse the file, read them."""


class Hdf5Arrays:
    """The data sets of any HDF5 file, read in blocks of rows.

    Parameters
    ----------
    path : the file.
    outside : what to do with external links, external storage and virtual data sets of other
        files: "refuse" (the default), "follow" or "leave".

    Attributes
    ----------
    kind : what the file says that it is, None if fastpair did not write it.
    entries : shape and type of every data set, by name; the type is "text" for strings.
    row_names : of an h5ad file: the data set that names its observations; otherwise None.
    in_threads : several threads may read at once.
    """

    format_name = "HDF5 data sets"
    in_threads = True

    def __init__(self, path: str | Path, outside: str = REFUSE) -> None:
        self.path = check_readable(path)
        self.entries: dict[str, tuple[tuple[int, ...], np.dtype | str]] = {}
        self.row_names: str | None = None
        self._outside = outside
        # What it is may be told while it is written; what is in it is read under a lock.
        with open_hdf5(self.path, locking=False) as file:
            self.kind = fastpair_kind(file, self.path)
            for name, dataset in self._datasets(file):
                self.entries[name] = (dataset.shape or (), _type(dataset))
            if "encoding-type" in file.attrs and file.attrs["encoding-type"] == "anndata":
                self.row_names = _observations(file)

    def _datasets(self, file: h5py.File) -> Iterator[tuple[str, h5py.Dataset]]:
        """All data sets with their names; each group once, however many ways lead to it."""
        seen = {_place(file)}
        waiting: list[tuple[str, h5py.Group]] = [("", file)]
        while waiting:
            prefix, group = waiting.pop()
            for key in group:
                name = prefix + key
                item = self._linked(file, group, key, name)
                if isinstance(item, h5py.Dataset):
                    if self._is_inside(item, name):
                        yield name, item
                elif isinstance(item, h5py.Group) and _place(item) not in seen:
                    seen.add(_place(item))
                    waiting.append((name + "/", item))

    def _linked(self, file: h5py.File, group: h5py.Group, key: str, name: str) -> Any:
        """What a link leads to, None where that is nothing or may not be read."""
        link = group.get(key, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            return group[key] if self._may_leave(name, f"a link to {link.filename}") else None
        if isinstance(link, h5py.SoftLink):
            other = _external_on_the_way(file, group, link.path)
            if other is not None and not self._may_leave(name, f"a link to {other}"):
                return None
            try:
                return group[key]
            except (KeyError, OSError, RuntimeError):
                return None  # it leads nowhere, or in a circle
        return group[key]

    def _is_inside(self, dataset: h5py.Dataset, name: str) -> bool:
        settings = dataset.id.get_create_plist()
        if settings.get_external_count():
            return self._may_leave(name, "stored in other files")
        if dataset.is_virtual:
            sources = [(file_named(part), part.dset_name) for part in dataset.virtual_sources()]
            files = {name for name, _ in sources} - {"."}
            if files and not (self.kind and all(self._is_part(*part) for part in sources)):
                return self._may_leave(name, f"made of other files, such as {min(files)}")
        return True

    def _is_part(self, name: str, dataset: str) -> bool:
        """Whether a source is a part in the folder beside this file, which holds its own data."""
        place = self.path.parent / name
        if not OWN_PART.fullmatch(name) or place.is_symlink() or place.parent.is_symlink():
            return False
        with open_hdf5(place, locking=False) as part:
            if not isinstance(part.get(dataset, getlink=True), h5py.HardLink):
                return False
            found = part[dataset]
            plain = isinstance(found, h5py.Dataset) and not found.is_virtual
            return plain and not found.id.get_create_plist().get_external_count()

    def _may_leave(self, name: str, what: str) -> bool:
        if self._outside == REFUSE:
            raise FileError(
                f"{self.path}: {name!r} is {what}, so its data are outside this file; say "
                "--follow-links if they shall be read."
            )
        return self._outside == FOLLOW

    def read(self, name: str, start: int, stop: int) -> np.ndarray | pa.Array:
        """Rows `start` to `stop` of a data set; one column of strings as `pa.string()`."""
        with self.opened() as read_rows:
            return read_rows(name, start, stop)

    @contextmanager
    def opened(self) -> Iterator[ReadRows]:
        """What reads as `read` does, in several threads at once, from a file that stays open."""
        with open_hdf5(self.path) as file, open(self.path, "rb") as raw:
            readers: dict[str, Callable[[int, int], np.ndarray | pa.Array]] = {}

            def read_rows(name: str, start: int, stop: int) -> np.ndarray | pa.Array:
                reader = readers.get(name)
                if reader is None:
                    if len(readers) == OPEN_DATASETS:
                        readers.clear()
                    reader = readers[name] = self._reader(file[name], raw.fileno())
                return reader(start, stop)

            yield read_rows

    def _reader(
        self, dataset: h5py.Dataset, descriptor: int
    ) -> Callable[[int, int], np.ndarray | pa.Array]:
        """What reads rows of a data set, in the way that suits how it is stored."""
        self._check_size(dataset)
        if dataset.chunks and dataset.id.get_create_plist().get_nfilters():
            import hdf5plugin  # noqa: F401  registers the compressions of other writers
        if h5py.check_string_dtype(dataset.dtype) is not None and dataset.ndim == 1:
            if h5py.check_string_dtype(dataset.dtype).length is None:
                check_heaps(dataset, descriptor)
            return lambda start, stop: read_text(dataset, start, stop)
        if inflates(dataset) and dataset.file.filename == str(self.path):
            return ChunkReader(dataset, descriptor).read
        return lambda start, stop: dataset[start:stop]

    def _check_size(self, dataset: h5py.Dataset) -> None:
        """Refuse what would take far more memory than its rows do."""
        if dataset.chunks is not None:
            size = dataset.dtype.itemsize
            for length in dataset.chunks:
                size *= int(length)
            if size > MOST_CHUNK_BYTES:
                raise DataError(
                    f"{self.path}: {dataset.name!r} has chunks of {size} bytes, but at most "
                    f"{MOST_CHUNK_BYTES} are read at once; store it in smaller chunks."
                )
        if dataset.dtype.itemsize > MOST_TEXT_BYTES:
            raise DataError(
                f"{self.path}: {dataset.name!r} holds values of {dataset.dtype.itemsize} bytes, "
                f"but at most {MOST_TEXT_BYTES} are read; store shorter ids."
            )

    def rows_together(self, name: str, least: int) -> int:
        """Rows that are best read together: about `least`, and whole chunks if these allow it."""
        with open_hdf5(self.path) as file:
            self._check_size(file[name])
            return rows_together(file[name], least)


def _type(dataset: h5py.Dataset) -> np.dtype | str:
    """The type of a data set as `entries` have it; a void type stands for what NumPy has not."""
    try:
        kind = dataset.dtype
    except READING_ERRORS:
        return np.dtype("V1")
    return "text" if h5py.check_string_dtype(kind) is not None else kind


def _place(group: h5py.Group) -> tuple[int, bytes]:
    about = h5py.h5o.get_info(group.id)
    return about.fileno, bytes(str(about.addr), "ascii")


def _external_on_the_way(
    file: h5py.File, group: h5py.Group, path: str, steps: int = 16
) -> str | None:
    """The other file that a path inside a file leads through, None if there is none."""
    at: Any = file if path.startswith("/") else group
    parts = [part for part in path.split("/") if part not in ("", ".")]
    for number, part in enumerate(parts):
        if not isinstance(at, h5py.Group) or steps == 0:
            return None
        link = at.get(part, getlink=True, default=None)
        if isinstance(link, h5py.ExternalLink):
            return str(link.filename)
        if isinstance(link, h5py.SoftLink):
            rest = "/".join([link.path, *parts[number + 1 :]])
            return _external_on_the_way(file, at, rest, steps - 1)
        at = at.get(part)
    return None


def _observations(file: h5py.File) -> str | None:
    """The data set with the names of the observations of an AnnData file."""
    observations = file.get("obs")
    if not isinstance(observations, h5py.Group):
        return None
    index = observations.attrs.get("_index", "_index")
    index = index.decode() if isinstance(index, bytes) else str(index)
    found = observations.get(index)
    if isinstance(found, h5py.Group) and "values" in found:
        return f"obs/{index}/values"  # text of which some may be missing
    return f"obs/{index}" if isinstance(found, h5py.Dataset) else None
