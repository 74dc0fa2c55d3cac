"""Text to row numbers: a hash table of slots, filled once, then read by many threads.

Text comes as Arrow keeps it: int32 offsets and the bytes that they cut, by address, as in `pairs`.
A slot of 8 bytes holds half of an id's hash and its row + 1; 0 is an empty one. What a hash finds
is compared byte by byte, so that answers are exact. A look-up of one id waits three times for
memory (slot, offset, bytes); ids are therefore taken in groups, asking for all of it ahead.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from fastpair.kernels.simd import jit, prefetch

_GROUP = 32
"""Ids that are looked up together."""

_MIX, _FINISH = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
"""Odd numbers whose bits are spread well: the golden ratio, and one for the finishing step."""

_LOW = np.uint64(0xFFFFFFFF)


def _reader(bits, result):
    """An intrinsic that reads an unsigned number of so many bits at an address."""

    @intrinsic
    def read(typingctx, where):
        def codegen(context, builder, signature, args):
            kind = ir.IntType(bits)
            value = builder.load(builder.inttoptr(args[0], kind.as_pointer()), align=1)
            return value if bits == 64 else builder.zext(value, ir.IntType(64))

        return result(where), codegen

    return read


_read_8_bytes = _reader(64, types.uint64)
_read_byte = _reader(8, types.uint64)
_read_offset = _reader(32, types.int64)  # offsets are never negative


class Texts(NamedTuple):
    """Text by address: `offsets` of length + 1 int32 and `data`, the bytes that they cut."""

    offsets: int
    data: int
    length: int


def texts_at(offsets: np.ndarray, data: np.ndarray) -> Texts:
    """Return the arguments for offsets (N + 1,) int32 and bytes, which must live while used."""
    if offsets.dtype != np.int32 or data.dtype != np.uint8 or not offsets.flags.c_contiguous:
        raise ValueError(f"offsets are {offsets.dtype}, data {data.dtype}: int32 and uint8 needed")
    return Texts(offsets.ctypes.data, data.ctypes.data, len(offsets) - 1)


def empty_slots(count: int) -> np.ndarray:
    """Return slots for this many ids, at most half full, all empty: a power of two, uint64."""
    return np.zeros(1 << max(1, int(2 * count - 1).bit_length()), np.uint64)


@jit
def _hash(where, length):
    """64 bits that depend on every byte; only equality of texts needs them, not security."""
    value = np.uint64(length) * _MIX
    if length >= 8:
        for at in range(0, length - 8, 8):
            value = (value ^ _read_8_bytes(where + at)) * _MIX
            value ^= value >> np.uint64(32)
        value = (value ^ _read_8_bytes(where + length - 8)) * _MIX
    else:
        rest = np.uint64(0)
        for at in range(length):
            rest = (rest << np.uint64(8)) | _read_byte(where + at)
        value = (value ^ rest) * _MIX
    value = (value ^ (value >> np.uint64(32))) * _FINISH
    return value ^ (value >> np.uint64(29))


@jit
def _equal(here, there, length):
    """Whether so many bytes are the same at two addresses."""
    at = 0
    while at + 8 <= length:
        if _read_8_bytes(here + at) != _read_8_bytes(there + at):
            return False
        at += 8
    while at < length:
        if _read_byte(here + at) != _read_byte(there + at):
            return False
        at += 1
    return True


@jit
def _candidate(slots, position, value):
    """The next slot from a position on that is empty or has this hash."""
    mask = np.uint64(len(slots) - 1)
    while True:
        slot = slots[position & mask]
        if slot == np.uint64(0) or (slot >> np.uint64(32)) == (value >> np.uint64(32)):
            return position & mask
        position += np.uint64(1)


@jit
def _find(slots, ids, position, value, where, length):
    """The row of a text, from a position of the slots on, or -1."""
    while True:
        position = _candidate(slots, position, value)
        row = np.int64(slots[position] & _LOW) - 1
        if row < 0:
            return row
        start = _read_offset(ids.offsets + 4 * row)
        if _read_offset(ids.offsets + 4 * row + 4) - start == length and _equal(
            ids.data + start, where, length
        ):
            return row
        position += np.uint64(1)


@jit
def fill_slots(slots, ids):
    """Enter all ids into empty slots; of equal ones the first is found."""
    mask = np.uint64(len(slots) - 1)
    values = np.empty(_GROUP, np.uint64)
    for first in range(0, ids.length, _GROUP):
        together = min(_GROUP, ids.length - first)
        for n in range(together):
            start = _read_offset(ids.offsets + 4 * (first + n))
            length = _read_offset(ids.offsets + 4 * (first + n) + 4) - start
            values[n] = _hash(ids.data + start, length)
            prefetch(np.int64(slots.ctypes.data) + np.int64(values[n] & mask) * 8)
        for n in range(together):
            position = values[n] & mask
            while slots[position] != np.uint64(0):
                position = (position + np.uint64(1)) & mask
            tag = values[n] & ~_LOW
            slots[position] = tag | np.uint64(first + n + 1)


@jit
def find_rows(slots, ids, texts, rows):
    """Fill `rows` (texts.length,) int64 with the rows of texts, -1 for those that are no ids.

    Returns how many are -1.
    """
    mask = np.uint64(len(slots) - 1)
    table = np.int64(slots.ctypes.data)
    values, places = np.empty(_GROUP, np.uint64), np.empty(_GROUP, np.uint64)
    unknown = 0
    for first in range(0, texts.length, _GROUP):
        together = min(_GROUP, texts.length - first)
        for n in range(together):
            start = _read_offset(texts.offsets + 4 * (first + n))
            length = _read_offset(texts.offsets + 4 * (first + n) + 4) - start
            values[n] = _hash(texts.data + start, length)
            prefetch(table + np.int64(values[n] & mask) * 8)
        for n in range(together):
            places[n] = _candidate(slots, values[n] & mask, values[n])
            row = np.int64(slots[places[n]] & _LOW) - 1
            rows[first + n] = row
            prefetch(ids.offsets + 4 * max(row, 0))
        for n in range(together):
            row = max(rows[first + n], 0)
            prefetch(ids.data + _read_offset(ids.offsets + 4 * row))
        for n in range(together):
            start = _read_offset(texts.offsets + 4 * (first + n))
            length = _read_offset(texts.offsets + 4 * (first + n) + 4) - start
            row = _find(slots, ids, places[n], values[n], texts.data + start, length)
            rows[first + n] = row
            unknown += row < 0
    return unknown
