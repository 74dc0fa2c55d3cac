"""Deflated chunks of HDF5, inflated here: HDF5 itself does that under one lock, one at a time.

Only what is plain is read past the library: whole numbers or floats whose chunks are deflated,
perhaps shuffled before. All else goes through HDF5, and so does a chunk with any peculiarity. The
numbers are the same either way.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from itertools import product

import h5py
import numpy as np

LEAST_CHUNK = 1 << 13
"""Bytes: smaller chunks are read faster by the library."""

LARGEST_CHUNK = 1 << 24
"""Bytes: several chunks are inflated at once, so larger ones are left to the library."""

_SHUFFLED, _PLAIN = [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE], [h5py.h5z.FILTER_DEFLATE]


def rows_together(dataset: h5py.Dataset, least: int) -> int:
    """Rows to read together: about `least`, and whole chunks where these are inflated here."""
    if not inflates(dataset):
        return least
    rows = int(dataset.chunks[0])
    return rows * max(1, least // rows)


def inflates(dataset: h5py.Dataset) -> bool:
    """Whether this file knows how the chunks of a data set are made."""
    if dataset.chunks is None or dataset.ndim not in (1, 2) or dataset.dtype.kind not in "iuf":
        return False
    size = int(np.prod(dataset.chunks)) * dataset.dtype.itemsize
    settings = dataset.id.get_create_plist()
    filters = [settings.get_filter(number)[0] for number in range(settings.get_nfilters())]
    return (
        filters in (_SHUFFLED, _PLAIN)
        and LEAST_CHUNK <= size <= LARGEST_CHUNK
        and dataset.id.get_type().equal(h5py.h5t.py_create(dataset.dtype))
        and dataset.file.userblock_size == 0
        and dataset.file.driver == "sec2"
    )


class ChunkReader:
    """Rows of one data set that `inflates`; several threads may read at once.

    Parameters
    ----------
    dataset : of an open file, (M,) or (M, n).
    descriptor : the same file, open for reading.
    """

    def __init__(self, dataset: h5py.Dataset, descriptor: int) -> None:
        self._dataset, self._descriptor = dataset, descriptor
        self._shape, self._chunks, self._dtype = dataset.shape, dataset.chunks, dataset.dtype
        self._shuffled = dataset.shuffle

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`, in the type and the byte order of the file."""
        rows = np.empty((stop - start, *self._shape[1:]), self._dtype)
        if all(self._place(corner, start, rows) for corner in self._corners(start, stop)):
            return rows
        return self._dataset[start:stop]

    def _corners(self, start: int, stop: int) -> Iterator[tuple[int, ...]]:
        high = self._chunks[0]
        across = [
            range(0, n, width) for n, width in zip(self._shape[1:], self._chunks[1:], strict=True)
        ]
        return product(range(start // high * high, stop, high), *across)

    def _place(self, corner: tuple[int, ...], start: int, rows: np.ndarray) -> bool:
        """Put what a chunk has of these rows into its place, unless it needs the library."""
        data = self._inflated(corner)
        if data is None:
            return False
        high, size = self._chunks[0], self._dtype.itemsize
        first, last = max(corner[0], start), min(corner[0] + high, start + len(rows))
        columns = tuple(
            slice(at, at + n) for at, n in zip(corner[1:], self._chunks[1:], strict=True)
        )
        part = rows[(slice(first - start, last - start), *columns)]
        inside = (slice(first - corner[0], last - corner[0]), *(slice(n) for n in part.shape[1:]))
        if not self._shuffled:
            part[...] = data.view(self._dtype).reshape(self._chunks)[inside]
            return True
        # A plane for each byte of a number: its place is one number in `size` bytes.
        planes = data.reshape(size, *self._chunks)
        bytes_of = part[..., None].view(np.uint8)
        for byte in range(size):
            bytes_of[..., byte] = planes[byte][inside]
        return True

    def _inflated(self, corner: tuple[int, ...]) -> np.ndarray | None:
        """The bytes of a whole chunk; None if it is missing, damaged or made in another way."""
        expected = int(np.prod(self._chunks)) * self._dtype.itemsize
        try:
            about = self._dataset.id.get_chunk_info_by_coord(corner)
            if about.byte_offset is None or about.filter_mask:
                return None
            stored = os.pread(self._descriptor, about.size, about.byte_offset)
            inflating = zlib.decompressobj()
            data = inflating.decompress(stored, expected + 1)  # never more, whatever it claims
        except (zlib.error, RuntimeError, OSError, ValueError):
            return None
        if len(data) != expected or not inflating.eof:
            return None
        return np.frombuffer(data, np.uint8)
