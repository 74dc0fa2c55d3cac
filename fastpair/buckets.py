"""Pairs cut into buckets by the blocks their rows lie in: how tables are cut, and the file of them.

One table, or one side of two, is held in blocks that nearly fill the memory; past each of them the
other side streams in small chunks. Every chunk is read once a block, so S bytes of table in a
memory of M cost about S (S / M + 1) / 2 bytes of reading; of one table a pair belongs to the lower
of its two blocks, because a score is the same for both orders, and the chunks below it are not
read.

NAME.buckets holds, for each pair in file order, its bucket (2 bytes), then round by round of pairs
the records of each bucket (the two rows within block and chunk, in as few bytes as they take), then
the scores in the order of the records. A position is never stored: the k-th pair of a bucket has
its k-th score. All places are known before the first pair is read.

Like everything that is staged (`fastpair.journal`) nothing in it is believed unseen: a round of
pairs counts if its entry and its content agree with their checksums, the scores of a bucket if they
do. What does not is done again, so that no order of writes matters.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np

from fastpair.errors import FileError, MemoryBudgetError
from fastpair.hdf5 import WRITTEN
from fastpair.journal import refuse_unfinished
from fastpair.staging import read_at, reserve, write_at, writing

BUCKETS = ".buckets"
"""What is appended to the name of the output."""

MOST_BUCKETS = 65535
"""Buckets, which are told by 2 bytes, the last number being kept for pairs that have none."""

GOOD_BUCKETS = 4096
"""Buckets up to which chunks are small: with more of them their records lie in small pieces."""

LEAST_CHUNK, MOST_CHUNK = 1 << 20, 1 << 26
"""Bytes of a chunk, about."""

MOST_HELD_ROWS = 1 << 28
"""Rows of a block: with those of a chunk they fit the 8 bytes of a record."""

_HEAD = struct.Struct("<16sII")
_MAGIC = b"fastpair buckets"


# --- how tables are cut --------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """Blocks of a held side, chunks of a streamed side.

    Parameters
    ----------
    held, streamed : rows of the two sides.
    held_rows, chunk_rows : rows of a block and of a chunk; of one table a block is whole chunks.
    one_table : whether both sides are one table.
    turned : whether the right table is the one that is held.
    row_bytes : bytes of a row.
    """

    held: int
    streamed: int
    held_rows: int
    chunk_rows: int
    one_table: bool
    turned: bool
    row_bytes: int

    @property
    def blocks(self) -> int:
        """Blocks of the held side."""
        return -(-self.held // self.held_rows)

    @property
    def chunks(self) -> int:
        """Chunks of the streamed side."""
        return -(-self.streamed // self.chunk_rows)

    def block(self, number: int) -> range:
        """The rows of a block."""
        return range(number * self.held_rows, min((number + 1) * self.held_rows, self.held))

    def chunk(self, number: int) -> range:
        """The rows of a chunk."""
        start = number * self.chunk_rows
        return range(start, min(start + self.chunk_rows, self.streamed))

    def first_chunk(self, block: int) -> int:
        """The first chunk that a block meets: of one table its own first."""
        return block * (self.held_rows // self.chunk_rows) if self.one_table else 0

    def is_held(self, block: int, chunk: int) -> bool:
        """Whether the rows of a chunk are among those of a block."""
        return self.one_table and chunk * self.chunk_rows < (block + 1) * self.held_rows

    def first_buckets(self) -> np.ndarray:
        """What is added to a chunk's number to give the bucket of a block and it, (blocks,)."""
        met = np.array([self.chunks - self.first_chunk(a) for a in range(self.blocks)], np.int64)
        firsts = np.array([self.first_chunk(a) for a in range(self.blocks)], np.int64)
        return np.cumsum(met) - met - firsts

    @property
    def buckets(self) -> int:
        """How many buckets there are."""
        return sum(self.chunks - self.first_chunk(block) for block in range(self.blocks))

    def cells(self, block: int) -> list[int]:
        """The chunks that meet a block, in the order in which they are read: there and back."""
        chunks = list(range(self.first_chunk(block), self.chunks))
        return chunks[::-1] if block % 2 else chunks

    @property
    def bits(self) -> int:
        """Bits of the row within a block."""
        return max(1, (self.held_rows - 1).bit_length())

    @property
    def record_bytes(self) -> int:
        """Bytes of the rows of a pair."""
        return -(-(self.bits + max(1, (self.chunk_rows - 1).bit_length())) // 8)

    @property
    def rows_read(self) -> int:
        """Rows that are read if every bucket has a pair."""
        rows = self.held
        loaded = -1
        for block in range(self.blocks):
            for chunk in self.cells(block):
                if not self.is_held(block, chunk) and chunk != loaded:
                    rows += len(self.chunk(chunk))
                    loaded = chunk
        return rows


def cut_tables(
    counts: tuple[int, int | None],
    row_bytes: int,
    steps: tuple[int, int],
    memory: int,
) -> Cut:
    """Return the cut that reads least within a memory: a block and two chunks fit into it.

    Parameters
    ----------
    counts : rows of the left and of the right table; None: one table.
    row_bytes : bytes of a row of both.
    steps : blocks and chunks of each table begin at multiples of so many rows.
    memory : bytes for rows.

    Raises
    ------
    MemoryBudgetError : the memory is too small for the tables.
    """
    left, right = counts
    if right is None:
        cuts = [_cut(left, left, row_bytes, (steps[0], steps[0]), memory, True, False)]
    else:
        cuts = [
            _cut(left, right, row_bytes, steps, memory, False, False),
            _cut(right, left, row_bytes, steps[::-1], memory, False, True),
        ]
    found = [cut for cut in cuts if cut is not None]
    if not found:
        raise MemoryBudgetError(
            f"{memory} bytes of memory are left for rows, too little for tables of "
            f"{row_bytes * (left + (right or 0))} bytes: allow more with --memory"
        )
    return min(found, key=lambda cut: cut.rows_read)


def _cut(
    held: int,
    streamed: int,
    row_bytes: int,
    steps: tuple[int, int],
    memory: int,
    one_table: bool,
    turned: bool,
) -> Cut | None:
    """The cut with the least chunks that leave few buckets; None where none fits."""
    size = max(LEAST_CHUNK, min(MOST_CHUNK, memory // 32))
    best = None
    while size <= memory // 3:
        chunk = max(1, size // (row_bytes * steps[1])) * steps[1]
        step = chunk if one_table else steps[0]
        room = memory - 2 * chunk * row_bytes
        rows = min(room // row_bytes, MOST_HELD_ROWS, held + step - 1) // step * step
        if rows >= step:
            cut = Cut(held, streamed, rows, chunk, one_table, turned, row_bytes)
            if cut.buckets <= GOOD_BUCKETS:
                return cut
            if cut.buckets < MOST_BUCKETS:
                best = best or cut
        size *= 2
    return best


# --- the file of buckets -------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounds:
    """How the pairs of a file go into rounds, and the rounds into NAME.buckets.

    Parameters
    ----------
    first, count : the first pair that goes into a bucket, and all pairs of the file.
    round_pairs : pairs that are brought into order together.
    """

    first: int
    count: int
    round_pairs: int

    @property
    def rounds(self) -> int:
        """How many rounds there are."""
        return -(-(self.count - self.first) // self.round_pairs)

    def pairs(self, number: int) -> range:
        """The pairs of a round, counted from `first`."""
        start = number * self.round_pairs
        return range(start, min(start + self.round_pairs, self.count - self.first))


def earlier_cut(output: Path, identity: Mapping[str, str]) -> tuple[Cut, Rounds] | None:
    """Return how an interrupted run of the same identity went about it; None if there is none."""
    try:
        content = bucket_path(output).open("rb")
    except OSError:
        return None
    with content as file:
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            return None
        magic, size, checksum = _HEAD.unpack(head)
        text = file.read(size) if magic == _MAGIC else b""
    if magic != _MAGIC or len(text) != size or zlib.crc32(text) != checksum:
        return None
    facts = json.loads(text)
    if facts["identity"] != dict(identity):
        return None
    return Cut(**facts["cut"]), Rounds(**facts["rounds"])


class BucketFile:
    """NAME.buckets under way; to be used in a `with` statement, which closes and keeps it.

    Parameters
    ----------
    output : where the finished output shall stand; whoever holds its lock owns this file.
    cut : how tables are cut.
    rounds : how the pairs are.
    identity : what the run is made of, by name.
    resume : whether to go on with a file that is there and fits.

    Attributes
    ----------
    counts : (rounds, buckets) int64, records of each; of rounds that are there.
    there : (rounds,) bool, rounds that are there.
    scored : (buckets,) bool, buckets whose scores are there.
    bytes_read, bytes_written : of this file, so far.

    Raises
    ------
    FileError : there is no room for the file.
    """

    def __init__(
        self, output: Path, cut: Cut, rounds: Rounds, identity: Mapping[str, str], *, resume: bool
    ) -> None:
        self.path, self.output = bucket_path(output), Path(output)
        self.cut, self.rounds = cut, rounds
        self.bytes_read = self.bytes_written = 0
        facts = {"cut": asdict(cut), "rounds": asdict(rounds), "identity": dict(identity)}
        self._facts = json.dumps(facts, sort_keys=True).encode()
        self._places(len(self._facts))
        self.counts = np.zeros((rounds.rounds, cut.buckets), np.int64)
        self.there = np.zeros(rounds.rounds, bool)
        self.scored = np.zeros(cut.buckets, bool)
        self._starts: np.ndarray | None = None
        with writing(self.path):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                if resume and self._fits():
                    self._look()
                else:
                    self._create()
            except BaseException:
                self.close()
                raise

    def _places(self, facts: int) -> None:
        """Where everything stands."""
        pairs, buckets = self.rounds.count - self.rounds.first, self.cut.buckets
        self._entries = _HEAD.size + facts
        self._entry_bytes = 8 * (buckets + 3)
        self._marks = self._entries + self._entry_bytes * self.rounds.rounds
        self._numbers = self._marks + 8 * buckets
        self._records = self._numbers + 2 * pairs
        self._scores = self._records + self.cut.record_bytes * pairs
        self.size = self._scores + 4 * pairs

    def _head(self) -> bytes:
        return _HEAD.pack(_MAGIC, len(self._facts), zlib.crc32(self._facts)) + self._facts

    def _fits(self) -> bool:
        if os.fstat(self._descriptor).st_size != self.size:
            return False
        head = np.empty(self._entries, np.uint8)
        read_at(self._descriptor, head, 0)
        return head.tobytes() == self._head()

    def _create(self) -> None:
        os.ftruncate(self._descriptor, 0)
        os.fsync(self._descriptor)  # nothing that stood here can come back
        try:
            reserve(self._descriptor, self.size)
            os.ftruncate(self._descriptor, self.size)
            write_at(self._descriptor, np.frombuffer(self._head(), np.uint8), 0)
        except OSError:
            free = shutil.disk_usage(self.path.parent).free
            self.discard()
            raise FileError(
                f"{self.output} could not be written: pairs are sorted in {self.path}, which needs "
                f"{self.size} bytes, and {free} are free; make room or allow more --memory"
            ) from None

    # --- what is there already ---

    def _look(self) -> None:
        """Find the rounds and the buckets that agree with their checksums."""
        for number in range(self.rounds.rounds):
            self.there[number] = self._is_whole(number)
        if not self.there.all():
            return
        marks = np.empty(self.cut.buckets, np.uint64)
        read_at(self._descriptor, marks, self._marks)
        for bucket in np.flatnonzero(marks).tolist():
            self.scored[bucket] = self._checksum_of_scores(bucket) == int(marks[bucket])

    def _is_whole(self, number: int) -> bool:
        entry = np.empty(self._entry_bytes // 8, np.int64)
        read_at(self._descriptor, entry, self._entries + number * self._entry_bytes)
        counts, pairs = entry[:-3], len(self.rounds.pairs(number))
        if int(entry[-1]) != WRITTEN | zlib.crc32(entry[:-1].data):
            return False
        if counts.min(initial=0) < 0 or counts.sum() > pairs:
            return False
        sums = []
        for start, size in (
            (self._numbers_at(number), 2 * pairs),
            (self._records_at(number), int(counts.sum()) * self.cut.record_bytes),
        ):
            sums.append(self._checksum_from(start, size))
        if sums != entry[-3:-1].tolist():
            return False
        self.counts[number] = counts
        return True

    def _checksum_from(self, start: int, size: int) -> int:
        checksum, part = 0, np.empty(min(size, 1 << 22), np.uint8)
        for at in range(0, size, len(part) or 1):
            piece = part[: size - at]
            read_at(self._descriptor, piece, start + at)
            checksum = zlib.crc32(piece.data, checksum)
        return checksum

    def _checksum_of_scores(self, bucket: int) -> int:
        checksum = bucket
        for at, count in self.runs(bucket):
            own = self._checksum_from(self._scores + 4 * at, 4 * count)
            checksum = zlib.crc32(struct.pack("<I", own), checksum)
        return WRITTEN | checksum

    # --- pairs come in ---

    def _numbers_at(self, number: int) -> int:
        return self._numbers + 2 * self.rounds.pairs(number).start

    def _records_at(self, number: int) -> int:
        return self._records + self.cut.record_bytes * self.rounds.pairs(number).start

    def write_numbers(self, number: int, buckets: np.ndarray) -> int:
        """Write the buckets of the pairs of a round, uint16; return what stands for them."""
        with writing(self.path):
            write_at(self._descriptor, buckets, self._numbers_at(number))
        return zlib.crc32(buckets.data)

    def write_records(self, number: int, records: np.ndarray) -> int:
        """Write the records of a round, uint8; return what stands for them."""
        with writing(self.path):
            write_at(self._descriptor, records, self._records_at(number))
        return zlib.crc32(records.data)

    def close_round(self, number: int, counts: np.ndarray, checksums: tuple[int, int]) -> None:
        """Say that a round is there: records of each bucket, checksums of both parts."""
        entry = np.empty(self._entry_bytes // 8, np.int64)
        entry[:-3], entry[-3:-1] = counts, checksums
        entry[-1] = WRITTEN | zlib.crc32(entry[:-1].data)
        with writing(self.path):
            place = self._entries + number * self._entry_bytes
            write_at(self._descriptor, entry, place)
        self.counts[number], self.there[number] = counts, True
        self.bytes_written += len(self.rounds.pairs(number)) * 2
        self.bytes_written += int(counts.sum()) * self.cut.record_bytes

    # --- scores are made ---

    @property
    def records(self) -> np.ndarray:
        """Records of each bucket, (buckets,) int64."""
        return self.counts.sum(axis=0)

    def runs(self, bucket: int) -> Iterator[tuple[int, int]]:
        """Where the records of a bucket stand: (place, how many), one run a round."""
        if self._starts is None:
            firsts = np.arange(self.rounds.rounds)[:, None] * self.rounds.round_pairs
            self._starts = firsts + np.cumsum(self.counts, axis=1) - self.counts
        for number in np.flatnonzero(self.counts[:, bucket]).tolist():
            yield int(self._starts[number, bucket]), int(self.counts[number, bucket])

    def read_records(self, at: int, out: np.ndarray) -> None:
        """Fill `out`, uint8, with the records from place `at` on."""
        with writing(self.path):
            read_at(self._descriptor, out, self._records + self.cut.record_bytes * at)

    def write_scores(self, at: int, scores: np.ndarray) -> None:
        """Write scores (m,) float32 of the records from place `at` on."""
        with writing(self.path):
            write_at(self._descriptor, scores, self._scores + 4 * at)

    def close_bucket(self, bucket: int, run_checksums: list[int]) -> None:
        """Say that the scores of a bucket are there, with the crc32 of each of its runs."""
        checksum = bucket
        for own in run_checksums:
            checksum = zlib.crc32(struct.pack("<I", own), checksum)
        mark = np.array([WRITTEN | checksum], np.uint64)
        with writing(self.path):
            write_at(self._descriptor, mark, self._marks + 8 * bucket)
        self.scored[bucket] = True
        count = int(self.counts[:, bucket].sum())
        self.bytes_read += count * self.cut.record_bytes
        self.bytes_written += 4 * count

    # --- scores go out ---

    def read_round(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The buckets, uint16, of the pairs of a round; its scores, float32, bucket by bucket."""
        buckets = np.empty(len(self.rounds.pairs(number)), np.uint16)
        scores = np.empty(int(self.counts[number].sum()), np.float32)
        with writing(self.path):
            read_at(self._descriptor, buckets, self._numbers_at(number))
            read_at(self._descriptor, scores, self._scores + 4 * self.rounds.pairs(number).start)
        self.bytes_read += buckets.nbytes + scores.nbytes
        return buckets, scores

    # --- ending ---

    def discard(self) -> None:
        """Remove the file."""
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; it stays for a resume."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def bucket_path(output: Path) -> Path:
    """Where the buckets of an output are."""
    return Path(output).with_name(Path(output).name + BUCKETS)


def check_buckets(output: Path, inputs: list[Path], *, resume: bool, overwrite: bool) -> None:
    """Refuse to lose the buckets of an interrupted run, or an input that has their name.

    Raises
    ------
    FileError : they are there and neither `resume` nor `overwrite` was said.
    """
    path = bucket_path(output)
    if not path.exists():
        return
    if any(source.exists() and path.samefile(source) for source in inputs):
        raise FileError(
            f"{output} cannot be the output, because {path} is read for it; choose another name."
        )
    if not (resume or overwrite):
        refuse_unfinished(path, Path(output))


def discard_buckets(output: Path) -> None:
    """Remove what an interrupted run left that is of no use any more."""
    bucket_path(output).unlink(missing_ok=True)
