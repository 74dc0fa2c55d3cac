"""What an interrupted run leaves for its resume, in NAME.partial: nothing in it is believed unseen.

An output whose size is known is staged in place, and a `Note` stands behind it; one whose size is
not known is staged as a log of `Record`s. Both begin with what the run is made of, so that only the
same run goes on. Whatever a crash leaves half written disagrees with a checksum and is done again;
no order of writes is relied on but this: what stood there before is gone from the disk before the
first result is written (`Staging.empty`, and a flush behind the note or the head of the log).
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastpair.errors import FileError, MismatchError
from fastpair.staging import Staging, read_at, write_at

Facts = dict[str, str]
"""What a run is made of, by the name that a user knows it by."""

CHECKED_AT_ONCE = 1 << 22
"""Bytes that are read together to be checked."""

_NOTE_END = struct.Struct("<QII16s")
_NOTE_MAGIC = b"fastpair note 1\n"
_LOG_HEAD = struct.Struct("<16sII")
_LOG_MAGIC = b"fastpair log 1\n\0"
_RECORD = struct.Struct("<4sIQQQ")
_RECORD_MAGIC = b"rows"


def refuse_another(path: Path, then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to go on with what another run left.

    Raises
    ------
    MismatchError
        Something that both know differs, or only one of them knows it.
    """
    for name in sorted(now.keys() | then.keys()):
        if now.get(name) != then.get(name):
            raise MismatchError(
                f"{path} belongs to another run: its {name} is {then.get(name)!r}, now it is "
                f"{now.get(name)!r}; run with what it was begun with, or say --overwrite."
            )


def refuse_unfinished(partial: Path, path: Path) -> None:
    """Say what to do about work that can be resumed and that nobody spoke of."""
    raise FileError(
        f"{partial} holds unfinished work for {path}; "
        "say --resume to go on or --overwrite to begin again."
    )


# --- a note behind a file of fixed size ---------------------------------------------------------


@dataclass(frozen=True)
class Note:
    """What stands behind a file under way until it is complete.

    Parameters
    ----------
    size : bytes of the file without the note.
    structure : checksum of the bytes that are there before the first result.
    facts : what the run is made of.
    """

    size: int
    structure: int
    facts: Facts

    def write(self, descriptor: int) -> None:
        """Put the note behind the file."""
        text = json.dumps({"structure": self.structure, "facts": self.facts}).encode()
        end = _NOTE_END.pack(self.size, len(text), zlib.crc32(text), _NOTE_MAGIC)
        write_at(descriptor, np.frombuffer(text + end, np.uint8), self.size)


def read_note(descriptor: int) -> Note | None:
    """The note behind a file; None where there is none that is whole."""
    length = os.fstat(descriptor).st_size
    if length < _NOTE_END.size:
        return None
    size, count, checksum, magic = _NOTE_END.unpack(
        _bytes_at(descriptor, length - _NOTE_END.size, _NOTE_END.size)
    )
    if magic != _NOTE_MAGIC or size + count + _NOTE_END.size != length:
        return None
    text = _bytes_at(descriptor, size, count)
    if zlib.crc32(text) != checksum:
        return None
    content = json.loads(text)
    return Note(size, content["structure"], content["facts"])


def checksum_around(descriptor: int, size: int, holes: Sequence[tuple[int, int]]) -> int:
    """Checksum of the first `size` bytes without the `holes`, each (first byte, bytes)."""
    checksum, at = 0, 0
    for start, length in sorted((*holes, (size, 0))):
        while at < start:
            part = _bytes_at(descriptor, at, min(CHECKED_AT_ONCE, start - at))
            checksum = zlib.crc32(part, checksum)
            at += len(part)
        at = max(at, start + length)
    return checksum


def _bytes_at(descriptor: int, offset: int, count: int) -> bytes:
    data = np.empty(count, np.uint8)
    read_at(descriptor, data, offset)
    return data.tobytes()


# --- a log of rows ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """The pairs of some consecutive rows.

    Parameters
    ----------
    first : number of the first row.
    counts : (rows,) int64, pairs of each row.
    indices : (pairs,) int64, their columns.
    data : (pairs,) float32, their scores.
    """

    first: int
    counts: np.ndarray
    indices: np.ndarray
    data: np.ndarray


class RowLog:
    """Rows of any number of pairs, appended to NAME.partial; a log that is cut loses its end only.

    Parameters
    ----------
    staging : of the output.
    facts : what the run is made of; a resumed run must have the same.
    overwrite : whether unfinished work may be replaced.
    resume : whether to go on with unfinished work, if there is any.

    Attributes
    ----------
    rows : rows that are in the log.
    pairs : pairs that are in the log.

    Raises
    ------
    FileError
        Unfinished work is there and neither `resume` nor `overwrite` was said.
    MismatchError
        It belongs to another run.
    """

    def __init__(self, staging: Staging, facts: Facts, *, overwrite: bool, resume: bool) -> None:
        self.staging, self.rows, self.pairs = staging, 0, 0
        text = json.dumps(facts, sort_keys=True).encode()
        self._begin = _LOG_HEAD.size + len(text)
        self._end = self._begin
        note = read_note(staging.descriptor)
        found = read_log_facts(staging.descriptor) if note is None else note.facts
        if found is not None and resume:
            refuse_another(staging.partial, found, facts)
            for record in self._whole():
                self.rows += len(record.counts)
                self.pairs += len(record.indices)
            os.ftruncate(staging.descriptor, self._end)
        else:
            if found is not None and not overwrite:
                refuse_unfinished(staging.partial, staging.path)
            staging.empty()
            head = _LOG_HEAD.pack(_LOG_MAGIC, len(text), zlib.crc32(text))
            write_at(staging.descriptor, np.frombuffer(head + text, np.uint8), 0)
        staging.flush()

    def append(self, record: Record) -> None:
        """Write the next rows."""
        parts = [
            np.ascontiguousarray(part, kind)
            for part, kind in (
                (record.counts, np.int64),
                (record.indices, np.int64),
                (record.data, np.float32),
            )
        ]
        sizes = record.first, len(record.counts), len(record.indices)
        checksum = zlib.crc32(struct.pack("<QQQ", *sizes))
        for part in parts:
            checksum = zlib.crc32(part.data, checksum)
        head = _RECORD.pack(_RECORD_MAGIC, checksum, *sizes)
        for part in (np.frombuffer(head, np.uint8), *parts):
            write_at(self.staging.descriptor, part, self._end)
            self._end += part.nbytes
        self.staging.flushing.wrote(len(head) + sum(part.nbytes for part in parts))
        self.rows += len(record.counts)
        self.pairs += len(record.indices)

    def records(self) -> Iterator[Record]:
        """What was appended, from the first row on."""
        end, self._end = self._end, self._begin
        yield from self._whole(end)
        if self._end != end:
            raise FileError(
                f"{self.staging.partial} does not read back as it was written: the disk is damaged."
            )

    def _whole(self, stop: int | None = None) -> Iterator[Record]:
        """Records that agree with their checksums, in order; `_end` moves behind each of them."""
        row = 0
        while self._end != stop and (record := self._read(self._end)) and record.first == row:
            row += len(record.counts)
            parts = record.counts, record.indices, record.data
            self._end += _RECORD.size + sum(part.nbytes for part in parts)
            yield record

    def _read(self, at: int) -> Record | None:
        descriptor = self.staging.descriptor
        length = os.fstat(descriptor).st_size
        if at + _RECORD.size > length:
            return None
        magic, checksum, first, rows, pairs = _RECORD.unpack(
            _bytes_at(descriptor, at, _RECORD.size)
        )
        at += _RECORD.size
        if magic != _RECORD_MAGIC or not rows or at + 8 * rows + 12 * pairs > length:
            return None
        parts = []
        found = zlib.crc32(struct.pack("<QQQ", first, rows, pairs))
        for count, kind in ((rows, np.int64), (pairs, np.int64), (pairs, np.float32)):
            part = np.empty(count, kind)
            read_at(descriptor, part, at)
            at += part.nbytes
            found = zlib.crc32(part.data, found)
            parts.append(part)
        return Record(first, *parts) if found == checksum else None


def read_log_facts(descriptor: int) -> Facts | None:
    """What the run of a log is made of; None if this is no log, or not even its head is whole."""
    length = os.fstat(descriptor).st_size
    if length < _LOG_HEAD.size:
        return None
    magic, count, checksum = _LOG_HEAD.unpack(_bytes_at(descriptor, 0, _LOG_HEAD.size))
    if magic != _LOG_MAGIC or _LOG_HEAD.size + count > length:
        return None
    text = _bytes_at(descriptor, _LOG_HEAD.size, count)
    return json.loads(text) if zlib.crc32(text) == checksum else None
