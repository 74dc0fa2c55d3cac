"""Pair lists over tables that do not fit into memory: scored bucket by bucket, in file order again.

Three passes, each of which reads and writes in order. First the pairs of the file are sorted into
buckets (`fastpair.buckets`), a round of them at a time. Then each block of rows is held while the
chunks of the other side are read past it, the next one while pairs of this one are scored. At last
the scores of each round are brought back into file order and become blocks of the staged output.

The pair kernel sees the same rows as in memory, so scores have the same bits. What is isolated or
unknown has no bucket. A resume does no round, no bucket and no block again that is whole.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fastpair.backend import read_ahead, run_ordered, thread_count
from fastpair.blocks import BlockFile
from fastpair.buckets import (
    BucketFile,
    Cut,
    Rounds,
    cut_tables,
    discard_buckets,
    earlier_cut,
)
from fastpair.errors import DataError, FileError, MemoryBudgetError
from fastpair.files import page_aligned
from fastpair.isolation import isolated_pairs
from fastpair.pairs import PairBlock, PairSource
from fastpair.scoring import RowScorer, row_scorer
from fastpair.staging import writing
from fastpair.stored_rows import StoredRows

PIECE = 1 << 17
"""Pairs that a thread reads, scores and writes together."""

PIECE_BYTES = 8 + 3 * 4
"""Bytes of a pair in a piece, at most: a record, two row numbers, a score."""

SPARE = 1 << 26
"""Bytes, at most, left to the allocator, which keeps some of what was given back, and to libraries
that come unasked: Arrow imports pandas where it is installed."""

MOST_SORTERS = 8
"""Threads that sort pairs; more would find nothing to do and hold blocks of pairs."""

Written = Callable[[np.ndarray], np.ndarray]
Masks = tuple[np.ndarray | None, np.ndarray | None]
Stored = tuple[StoredRows, StoredRows | None]


@dataclass(frozen=True)
class BlockPlan:
    """What scoring by blocks will do.

    Parameters
    ----------
    cut : how the tables are cut.
    rounds : how the pairs are.
    pair_bytes : bytes of the pair file.
    """

    cut: Cut
    rounds: Rounds
    pair_bytes: int

    @property
    def told(self) -> dict[str, Any]:
        """What a person wants to know, by name; bytes read are the most there can be."""
        cut, pairs = self.cut, self.rounds.count - self.rounds.first
        sides = cut.held if cut.one_table else cut.held + cut.streamed
        sorting = (2 + cut.record_bytes + 4) * pairs
        return {
            "in_memory": False,
            "pairs": self.rounds.count,
            "table_bytes": sides * cut.row_bytes,
            "blocks": cut.blocks,
            "chunks": cut.chunks,
            "passes": round(cut.rows_read / max(1, sides), 2),
            "rounds": self.rounds.rounds,
            "table_bytes_read": cut.rows_read * cut.row_bytes,
            "pair_bytes_read": self.pair_bytes,
            "sorting_bytes_read": sorting,
            "bytes_read": cut.rows_read * cut.row_bytes + self.pair_bytes + sorting,
            "bytes_written": sorting + 4 * self.rounds.count,
            "disk": sorting + 4 * self.rounds.count,
        }


_COUNTED = 24
"""Bytes for what a round has in a bucket: how many pairs, where they stand, and a copy."""


def _greater_root(a: int, b: int, c: int) -> int:
    """Return the greatest whole x with a x + c / x <= b, 0 if there is none."""
    under = b * b - 4 * a * c
    return (b + math.isqrt(under)) // (2 * a) if b > 0 and under >= 0 else 0


class BlockwiseScorer:
    """Scores pairs of tables whose rows stay in their files.

    Parameters
    ----------
    tables : rows of the left table and of the right one; None: one table.
    memory : bytes that may be allocated.
    threads : number of threads; default one for each processor.

    Attributes
    ----------
    threads : how many there are.
    """

    def __init__(self, tables: Stored, *, memory: int, threads: int | None = None) -> None:
        self.threads, self.memory = thread_count(threads), memory
        self.tables, self.plan = tables, tables[0].plan
        self._loaded: tuple[int, int] = (-1, 0)
        self._sorters = min(self.threads, MOST_SORTERS)

    # --- the plan ---

    def make_plan(self, source: PairSource, block: int, first: int = 0) -> BlockPlan:
        """Return what a run will do that begins with the pair `first`.

        Parameters
        ----------
        source : the pairs.
        block : pairs of a block of the output.

        Raises
        ------
        MemoryBudgetError : the memory is too small for it.
        """
        left, right = self.tables
        steps = left.step, (right or left).step
        counts = len(left), None if right is None else len(right)
        cut = cut_tables(counts, left.shape[1], steps, self._row_memory(source))
        pair_bytes = 2 + 8 + cut.record_bytes
        room = self.memory - self._reading(source, block)
        most = max(1, -(-(source.count - first) // block))
        a_block, counts_of_all = block * pair_bytes + 8 * cut.buckets, _COUNTED * cut.buckets * most
        # as many blocks a round as there is room for, with what all rounds count in each bucket
        least = a_block + counts_of_all if most == 1 else 2 * math.isqrt(a_block * counts_of_all)
        blocks = _greater_root(a_block, room, counts_of_all)
        if blocks < 1:
            raise MemoryBudgetError(
                f"sorting pairs needs at least {self.memory - room + max(least, a_block)} bytes, "
                f"but --memory leaves {self.memory}: allow more"
            )
        rounds = Rounds(first, source.count, block * min(blocks, most))
        return BlockPlan(cut, rounds, source.path.stat().st_size)

    def _row_memory(self, source: PairSource) -> int:
        """Bytes for rows beside the pieces that are scored and what the source holds of ids."""
        pieces = 2 * self.threads * PIECE * PIECE_BYTES
        return self.memory - pieces - source.reading_bytes(1) - min(self.memory // 3, SPARE)

    def _reading(self, source: PairSource, block: int) -> int:
        """Bytes of pairs on their way into a round."""
        block = min(block, source.count)
        under_way = (3 + self._sorters) * source.bytes_a_pair() + 16 * self._sorters
        return block * under_way + source.reading_bytes(self._sorters)

    def _fits(self, plan: BlockPlan, source: PairSource, block: int) -> bool:
        """Whether an earlier plan needs no more memory than there is now."""
        cut, rounds = plan.cut, plan.rounds
        rows = (cut.held_rows + 2 * cut.chunk_rows) * cut.row_bytes
        sorting = rounds.round_pairs * (2 + 8 + cut.record_bytes)
        sorting += _COUNTED * cut.buckets * rounds.rounds
        return (
            rows <= self._row_memory(source)
            and sorting + self._reading(source, block) <= self.memory
        )

    # --- a run ---

    def fill(
        self,
        file: BlockFile,
        source: PairSource,
        written: Written,
        *,
        output: Path,
        identity: Mapping[str, str],
        resume: bool,
        progress: Callable[[int], None],
        isolated: Masks,
        unknown_rows: tuple[int | None, int | None],
    ) -> tuple[int, int, dict[str, Any]]:
        """Write all blocks of scores that are not done.

        Parameters
        ----------
        file : the scores, staged.
        source : the pairs.
        written : turns scores into what is written.
        output : where the finished output shall stand.
        identity : what the run is made of, by name.
        resume : whether to go on with what an interrupted run left.
        progress : called with numbers of pairs that are scored.
        isolated : masks of rows that score NaN.
        unknown_rows : rows that stand for unknown ids.

        Returns
        -------
        resumed, strange : pairs whose scores were there, pairs with the row of an unknown id among
            those that were sorted.
        told : the plan, and how many bytes were read.
        """
        undone = np.flatnonzero(~file.done)
        if not len(undone):
            discard_buckets(output)  # the run was stopped before it could
            progress(source.count)
            return source.count, 0, {}
        size = file.content.block_rows
        plan = self.make_plan(source, size, int(undone[0]) * size)
        earlier = earlier_cut(output, identity) if resume else None
        if earlier is not None and earlier[1].first <= plan.rounds.first:
            then = BlockPlan(*earlier, plan.pair_bytes)
            resume = self._fits(then, source, size)
            plan = then if resume else plan
        with BucketFile(output, plan.cut, plan.rounds, identity, resume=resume) as buckets:
            try:
                strange = self._sort(source, buckets, size, isolated, unknown_rows)
            except DataError:
                buckets.discard()  # no resume can mend the pair file
                raise
            resumed = plan.rounds.first + int(buckets.records[buckets.scored].sum())
            progress(resumed)
            scored = self._score(buckets, progress)
            progress(source.count - resumed - scored)  # those without a bucket
            self._collect(file, buckets, written)
            with writing(file.path):
                file.staging.flush()  # from here on the buckets are not needed
            buckets.discard()
        read = {
            "table_bytes_read": sum(table.bytes_read for table in self.tables if table is not None),
            "sorting_bytes_read": buckets.bytes_read,
            "bytes_written": buckets.bytes_written + 4 * source.count,
        }
        return resumed, strange, {**plan.told, **read}

    # --- pairs into buckets ---

    def _sort(
        self,
        source: PairSource,
        buckets: BucketFile,
        size: int,
        isolated: Masks,
        unknown_rows: tuple[int | None, int | None],
    ) -> int:
        """Bring all rounds into the file that are not there; return how many pairs are strange."""
        missing = np.flatnonzero(~buckets.there)
        if not len(missing):
            return 0
        rounds = buckets.rounds
        start = rounds.first + rounds.pairs(int(missing[0])).start
        sorting = _Sorting(buckets, self._sorters, isolated, unknown_rows)
        stream = closing(source.blocks(size, start, threads=self._sorters))
        with stream as pairs, closing(read_ahead(pairs)) as blocks:
            for number in range(int(missing[0]), rounds.rounds):
                count = -(-len(rounds.pairs(number)) // size)
                sorting.sort(number, islice(blocks, count), count)
            next(iter(blocks), None)  # the source ends, and says so if the file goes on
        return sorting.strange

    # --- buckets are scored ---

    def _score(self, buckets: BucketFile, progress: Callable[[int], None]) -> int:
        """Score all buckets that are not; return how many pairs that were."""
        cut, records = buckets.cut, buckets.records
        firsts, total = cut.first_buckets(), 0
        held, streamed = self.tables[0], self.tables[1] or self.tables[0]
        if cut.turned:
            held, streamed = streamed, held
        held_memory: np.ndarray | None = None
        self._loaded = (-1, 0)
        memory: list[np.ndarray] = []
        for block in range(cut.blocks):
            chunks = [
                chunk
                for chunk in cut.cells(block)
                if records[firsts[block] + chunk] and not buckets.scored[firsts[block] + chunk]
            ]
            if not chunks:
                continue
            if held_memory is None:
                held_memory = page_aligned((min(cut.held_rows, cut.held), cut.row_bytes))
                rows = min(cut.chunk_rows, cut.streamed)
                memory = [page_aligned((rows, cut.row_bytes)) for _ in range(2)]
            own = cut.block(block)
            rows_held = held.load(own.start, own.stop, held_memory)
            loads = self._loads(cut, block, rows_held, chunks, streamed, memory)
            fields = self._fields(rows_held)
            with closing(read_ahead(loads, depth=0)) as ready:
                for chunk, rows_streamed in ready:
                    scorer, kept = self._scorer(cut, rows_held, rows_streamed, fields)
                    bucket = int(firsts[block]) + chunk
                    total += self._score_bucket(buckets, bucket, scorer, progress)
                    del kept
        return total

    def _fields(self, rows: np.ndarray) -> np.ndarray | None:
        if self.plan.network is not None:
            return None
        from fastpair.kernels import pairs

        return pairs.separate_fields(rows, self.plan)

    def _scorer(
        self, cut: Cut, held: np.ndarray, streamed: np.ndarray, fields: np.ndarray | None
    ) -> tuple[RowScorer, object]:
        """Return what scores (held rows, streamed rows), whichever side the held table is."""
        both = fields, None if fields is None else self._fields(streamed)
        if not cut.turned:
            return row_scorer(held, streamed, self.plan, both)
        score, kept = row_scorer(streamed, held, self.plan, both[::-1])
        return lambda own, other, scores: score(other, own, scores), kept

    def _loads(
        self,
        cut: Cut,
        block: int,
        held: np.ndarray,
        chunks: list[int],
        streamed: StoredRows,
        memory: list[np.ndarray],
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield chunks and their rows; the two last ones that were loaded stay where they are."""
        for chunk in chunks:
            rows = cut.chunk(chunk)
            if cut.is_held(block, chunk):
                start = cut.block(block).start
                yield chunk, held[rows.start - start : rows.stop - start]
                continue
            number, place = self._loaded
            if number != chunk:
                place = 1 - place
                streamed.load(rows.start, rows.stop, memory[place])
                self._loaded = chunk, place
            yield chunk, memory[place][: len(rows)]

    def _score_bucket(
        self,
        buckets: BucketFile,
        bucket: int,
        score: RowScorer,
        progress: Callable[[int], None],
    ) -> int:
        """Score one bucket; return its number of pairs."""
        cut, total = buckets.cut, 0
        runs = list(buckets.runs(bucket))
        checksums = [0] * len(runs)

        def score_piece(piece: _Piece) -> tuple[_Piece, np.ndarray]:
            from fastpair.kernels import partition

            count = sum(part[2] for part in piece)
            records = np.empty(count * cut.record_bytes, np.uint8)
            held, streamed = np.empty(count, np.int32), np.empty(count, np.int32)
            scores = np.empty(count, np.float32)
            for part, at, begin in _parts(piece):
                place = slice(begin * cut.record_bytes, (begin + part) * cut.record_bytes)
                buckets.read_records(at, records[place])
            partition.read_places(records, cut.record_bytes, cut.bits, held, streamed)
            if not score(held, streamed, scores):
                raise FileError(
                    f"{buckets.path} does not read back as it was written: the disk is damaged."
                )
            for part, at, begin in _parts(piece):
                buckets.write_scores(at, scores[begin : begin + part])
            return piece, scores

        for piece, scores in run_ordered(score_piece, _pieces(runs), self.threads):
            for (number, _, _), (part, _, begin) in zip(piece, _parts(piece), strict=True):
                own = scores[begin : begin + part].data
                checksums[number] = zlib.crc32(own, checksums[number])
            total += len(scores)
            progress(len(scores))
        buckets.close_bucket(bucket, checksums)
        return total

    # --- scores in file order ---

    def _collect(self, file: BlockFile, buckets: BucketFile, written: Written) -> None:
        """Write the blocks that are not done, from the scores of the buckets."""
        from fastpair.kernels import partition

        rounds, size = buckets.rounds, file.content.block_rows
        for number in range(rounds.rounds):
            pairs = rounds.pairs(number)
            block = (rounds.first + pairs.start) // size
            starts = range(0, len(pairs), size)
            if file.done[block : block + len(starts)].all():
                continue
            numbers, sorted_scores = buckets.read_round(number)
            ends = np.cumsum(buckets.counts[number])
            counts = np.zeros((len(starts), buckets.cut.buckets), np.int64)

            def count(at: int, numbers: np.ndarray = numbers, counts: np.ndarray = counts) -> None:
                partition.count_buckets(numbers[at : at + size], counts[at // size])

            for _ in run_ordered(count, starts, self._sorters):
                pass
            cursors = ends - buckets.counts[number] + np.cumsum(counts, axis=0) - counts

            def collect(
                at: int,
                numbers: np.ndarray = numbers,
                cursors: np.ndarray = cursors,
                sorted_scores: np.ndarray = sorted_scores,
            ) -> np.ndarray:
                own = numbers[at : at + size]
                scores = np.empty(len(own), np.float32)
                partition.collect_scores(own, cursors[at // size], sorted_scores, scores)
                values = written(scores)
                spoiled = own == partition.SPOILED
                return np.where(spoiled, np.float32(np.nan), values) if spoiled.any() else values

            for place, values in enumerate(run_ordered(collect, starts, self._sorters, ahead=1)):
                if not file.done[block + place]:
                    file.write_block(block + place, values)


class _Sorting:
    """Sorts rounds of pairs into a file of buckets, in arrays that all rounds share."""

    def __init__(
        self,
        buckets: BucketFile,
        threads: int,
        isolated: Masks,
        unknown_rows: tuple[int | None, int | None],
    ) -> None:
        self.buckets, self.threads, self.strange = buckets, threads, 0
        self._isolated, self._unknown_rows = isolated, unknown_rows
        self._firsts = buckets.cut.first_buckets()
        pairs = min(buckets.rounds.round_pairs, buckets.rounds.count - buckets.rounds.first)
        self._numbers = np.empty(pairs, np.uint16)
        self._places = np.empty(pairs, np.int64)
        self._records = np.empty(pairs * buckets.cut.record_bytes, np.uint8)

    def sort(self, number: int, blocks: Iterable[PairBlock], count: int) -> None:
        """Bring one round, which is so many blocks of pairs, into the file."""
        start = self.buckets.rounds.first + self.buckets.rounds.pairs(number).start
        counts = np.zeros((count, self.buckets.cut.buckets), np.int64)
        sizes: list[range] = []

        def locate(item: tuple[int, PairBlock]) -> tuple[range, int]:
            place, block = item
            return self._locate(block, start, counts[place])

        for own, strange in run_ordered(locate, enumerate(blocks), self.threads, ahead=1):
            sizes.append(own)
            self.strange += strange
        total = counts.sum(axis=0)
        cursors = np.cumsum(total) - total + np.cumsum(counts, axis=0) - counts

        def place(item: tuple[int, range]) -> None:
            from fastpair.kernels import partition

            own = slice(item[1].start, item[1].stop)
            width = self.buckets.cut.record_bytes
            numbers, places = self._numbers[own], self._places[own]
            partition.sort_places(numbers, places, cursors[item[0]], width, self._records)

        for _ in run_ordered(place, enumerate(sizes), self.threads):
            pass
        numbers = self._numbers[: len(self.buckets.rounds.pairs(number))]
        records = self._records[: int(total.sum()) * self.buckets.cut.record_bytes]
        with ThreadPoolExecutor(2, thread_name_prefix="fastpair-write") as pool:
            first = pool.submit(self.buckets.write_numbers, number, numbers)
            second = pool.submit(self.buckets.write_records, number, records)
            self.buckets.close_round(number, total, (first.result(), second.result()))

    def _locate(self, block: PairBlock, start: int, counts: np.ndarray) -> tuple[range, int]:
        """Find buckets; return where the pairs are in the round, how many are strange."""
        from fastpair.kernels import partition

        cut, strange = self.buckets.cut, 0
        own = range(block.start - start, block.start - start + len(block.left))
        sides = [np.ascontiguousarray(rows, np.int64) for rows in (block.left, block.right)]
        if self._unknown_rows != (None, None):
            of_unknown = (sides[0] == self._unknown_rows[0]) | (sides[1] == self._unknown_rows[1])
            strange = int(np.sum(of_unknown))
        masks = [
            mask
            for mask in (block.unknown, isolated_pairs(block.left, block.right, self._isolated))
            if mask is not None
        ]
        spoiled = np.logical_or.reduce(masks) if masks else np.zeros(0, bool)
        part = slice(own.start, own.stop)
        partition.locate(
            *(sides[::-1] if cut.turned else sides),
            spoiled,
            cut.one_table,
            cut.held_rows,
            cut.chunk_rows,
            self._firsts,
            cut.bits,
            (self._numbers[part], self._places[part], counts),
        )
        return own, strange


_Piece = list[tuple[int, int, int]]
"""Parts of runs: number of the run, place of its first record, how many there are."""


def _pieces(runs: list[tuple[int, int]]) -> Iterator[_Piece]:
    """Parts of runs in order, about `PIECE` pairs together."""
    piece: _Piece = []
    held = 0
    for number, (at, count) in enumerate(runs):
        while count:
            part = min(count, PIECE - held)
            piece.append((number, at, part))
            at, count, held = at + part, count - part, held + part
            if held == PIECE:
                yield piece
                piece, held = [], 0
    if piece:
        yield piece


def _parts(piece: _Piece) -> Iterator[tuple[int, int, int]]:
    """How many records each part has, the place of its first one, and where they go."""
    begin = 0
    for _, at, part in piece:
        yield part, at, begin
        begin += part
