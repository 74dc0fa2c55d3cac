"""Heaps of HDF5, where texts of variable length lie, looked through before the library does.

At a damaged heap the library may run in a circle for ever (an object of size 0 leads to itself) or
read what is not there (a length that is not the object's). A
reference to a text is 16 bytes: its length, the address of a heap, its number there. A heap is
`GCOL`, a version, its size, then objects: number, references, padding, size, content in steps of 8
(HDF5 file format specification, version 3, III.E and VIII.C).
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator

import h5py
import numpy as np

REFERENCE = np.dtype([("length", "<u4"), ("address", "<u8"), ("number", "<u4")])
_HEAP, _OBJECT = struct.Struct("<4sB3xQ"), struct.Struct("<HHIQ")
_SHUFFLE, _DEFLATE = h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE

REFERENCES_AT_ONCE = 1 << 18
"""References that are looked at together."""


def check_heaps(dataset: h5py.Dataset, descriptor: int) -> None:
    """Look through all heaps that a data set of texts refers to.

    What is stored in a way that this room does not know (other filters, compact layout) is left to
    the library.

    Parameters
    ----------
    dataset : texts of variable length, of an open file.
    descriptor : the same file, open for reading.

    Raises
    ------
    ValueError
        A heap is damaged, or is none.
    """
    if dataset.file.id.get_create_plist().get_sizes() != (8, 8):
        return
    base, end = dataset.file.userblock_size, os.fstat(descriptor).st_size
    address, sizes = -1, np.empty(0, np.int64)
    for references in _references(dataset, descriptor, base):
        references = references[np.argsort(references["address"], kind="stable")]
        places = references["address"]
        starts = np.flatnonzero(np.concatenate([[True], places[1:] != places[:-1]]))
        for start, stop in zip(starts, [*starts[1:], len(places)], strict=True):
            if places[start] == 0:
                continue  # an empty text lies nowhere
            if places[start] != address:
                address = int(places[start])
                sizes = _object_sizes(descriptor, base + address, end)
            texts = references[start:stop]
            numbers = np.minimum(texts["number"], len(sizes) - 1)
            if (sizes[numbers] != texts["length"]).any() or (numbers != texts["number"]).any():
                raise ValueError("a text is not as long as its place in its heap")


def _references(dataset: h5py.Dataset, descriptor: int, base: int) -> Iterator[np.ndarray]:
    width = REFERENCE.itemsize
    offset = dataset.id.get_offset()
    if offset is not None:
        for start in range(0, dataset.size, REFERENCES_AT_ONCE):
            count = min(REFERENCES_AT_ONCE, dataset.size - start)
            yield _as_references(os.pread(descriptor, count * width, offset + start * width))
    elif dataset.chunks is not None:
        for number in range(dataset.id.get_num_chunks()):
            about = dataset.id.get_chunk_info(number)
            stored = os.pread(descriptor, about.size, about.byte_offset)
            plain = _unfiltered(dataset, stored, about.filter_mask)
            if plain is not None:
                yield _as_references(plain)


def _as_references(content: bytes) -> np.ndarray:
    return np.frombuffer(content, REFERENCE, len(content) // REFERENCE.itemsize)


def _unfiltered(dataset: h5py.Dataset, stored: bytes, mask: int) -> bytes | None:
    """The content of a chunk, None if it was filtered in a way that is not known here."""
    settings = dataset.id.get_create_plist()
    filters = [settings.get_filter(number)[0] for number in range(settings.get_nfilters())]
    if mask or not set(filters) <= {_SHUFFLE, _DEFLATE}:
        return stored if mask == (1 << len(filters)) - 1 else None
    count = int(np.prod(dataset.chunks))
    for applied in reversed(filters):
        if applied == _DEFLATE:
            stored = zlib.decompressobj().decompress(stored, count * REFERENCE.itemsize)
        elif len(stored) == count * REFERENCE.itemsize:
            planes = np.frombuffer(stored, np.uint8).reshape(REFERENCE.itemsize, count)
            stored = planes.T.tobytes()
    return stored


def _object_sizes(descriptor: int, address: int, end: int) -> np.ndarray:
    """Sizes of the objects of a heap by their numbers, -1 for those that it does not have."""
    head = os.pread(descriptor, _HEAP.size, address) if address < end else b""
    if len(head) < _HEAP.size or not head.startswith(b"GCOL"):
        raise ValueError("a text lies in no heap")
    size = _HEAP.unpack(head)[2]
    if size > end - address:
        raise ValueError("a heap of texts goes on after the end of the file")
    content = os.pread(descriptor, size, address)
    found: dict[int, int] = {0: -1}
    at = _HEAP.size
    while at + _OBJECT.size <= size:
        number, _, _, length = _OBJECT.unpack_from(content, at)
        step = _OBJECT.size + -(-length // 8) * 8 if number else length
        if step < _OBJECT.size or at + step > size:
            raise ValueError("a heap of texts is damaged")
        if number:
            found[number] = length
        at += step
    sizes = np.full(max(found) + 1, -1, np.int64)
    sizes[list(found)] = list(found.values())
    return sizes
