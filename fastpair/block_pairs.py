"""All pairs of tables that do not fit into memory: blocks of left rows stay, right rows stream.

Every block of left rows meets ranges of right rows in rising order, the next of which is read while
this one is walked; of one table one of them is the block itself. What walks tables in memory walks
each meeting, and results are merged: the best of a row and its pairs above a threshold are those of
the pair kernel, whatever parts they were found in, and what dense values and the ends of a
histogram depend on beside their two rows is taken from the whole tables first (one more pass).
A histogram of one table walks each meeting of two blocks once. Left rows come out in order, so that
a resume begins with the first that is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from fastpair.backend import LEAST_MEMORY, read_ahead
from fastpair.errors import ArgumentError, MemoryBudgetError
from fastpair.files import page_aligned
from fastpair.kernels import Plan
from fastpair.matrix import at_least_one_pair, check_bins, pairs_by_row
from fastpair.stored_rows import StoredRows

Rows = Any
"""Rows in memory, (n, row_bytes) uint8, or `fastpair.stored_rows.StoredRows`, or some of them."""

HIT_BYTES = 2 * (8 + 8 + 4)
"""Bytes of a pair above a threshold while it is brought into order."""

MERGED_ROWS = 1 << 12
"""Rows whose best are merged together."""

LEAST_ROWS = 64
"""Left rows that are walked for a threshold together, at least."""


@dataclass(frozen=True)
class Meeting:
    """A range of right rows; of one table, those of the left block itself are told."""

    start: int
    stop: int
    itself: bool = False


class BlockPairs:
    """All pairs from a left row on; what `fastpair.remaining.RemainingPairs` is in memory.

    Parameters
    ----------
    make : gives what walks rows in memory: ``make(left, right, memory, **more)``; `right` is None
        where it is left.
    left, right : rows of the tables, stored or in memory; right is None where they are one.
    plan : the plan of both.
    memory : bytes that may be allocated.
    start : the first left row that is wanted.
    progress : called with numbers of pairs that need not be walked.

    Attributes
    ----------
    threads, scan, triangle : how it was walked last.

    Raises
    ------
    MemoryBudgetError : not even a few rows fit.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        left: Rows,
        right: Rows | None,
        plan: Plan,
        memory: int,
        start: int = 0,
        progress: Callable[[int], None] = lambda pairs: None,
    ) -> None:
        self._make, self._plan, self.start = make, plan, start
        self._left, self._right = left, left if right is None else right
        self._one_table, self._progress = right is None, progress
        self.threads, self.scan, self.triangle = 0, None, False
        width = left.shape[1]
        self._walk_memory, self._room = max(LEAST_MEMORY, memory * 3 // 8), memory // 8
        share = max(0, memory - self._walk_memory - self._room)
        self._held, self._chunk = share // 2 // width, share // 4 // width
        steps = [getattr(rows, "step", 1) for rows in (self._left, self._right)]
        if self._chunk > steps[1]:
            self._chunk -= self._chunk % steps[1]
        if self._held > steps[0]:
            self._held -= self._held % steps[0]
        self._chunk, self._held = min(self._chunk, len(self._right)), min(self._held, len(left))
        self._memory: dict[str, np.ndarray] = {}
        if self._chunk < 1 or self._held < 1:
            raise MemoryBudgetError(
                f"--memory leaves {share} bytes for blocks of rows of {width} bytes beside the "
                f"{self._walk_memory} in which they are walked: allow more"
            )

    @property
    def about(self) -> dict[str, Any]:
        """How it was walked last: `threads`, `scan` and `triangle`."""
        return {"threads": self.threads, "scan": self.scan, "triangle": self.triangle}

    # --- how rows come ---

    def rows_read(self, form: str, k: int = 0) -> int:
        """Return how many rows of files a whole run reads, at most, if nothing is split."""
        passes = self._groups(self._held_rows(form, k))
        total = sum(len(own) for own in passes) * isinstance(self._left, StoredRows)
        for own in passes:
            meetings = self._meetings(own, form)
            total += sum(m.stop - m.start for m in meetings if not m.itself)
        total *= 2 if form == "histogram" else 1
        if self._needs_shared(form):
            total += len(self._right)
        return total + self._read_to_be_checked()

    def _read_to_be_checked(self) -> int:
        """Rows that are read once more because blocks and chunks are no whole checked pieces."""
        sides = ((self._left, self._held), (self._right, self._chunk))
        return sum(len(rows) for rows, size in sides if size % getattr(rows, "step", 1))

    def shape(self, form: str, k: int = 0) -> dict[str, int]:
        """Return how many blocks there are, and into how many chunks the right rows are cut."""
        groups = self._groups(self._held_rows(form, k))
        return {"blocks": len(groups), "chunks": len(self._ranges(0, len(self._right)))}

    def _held_rows(self, form: str, k: int = 0) -> int:
        """Left rows of a block, as many as their results leave room for."""
        row_bytes = {"top-k": 24 * k, "dense": 4 * len(self._right)}.get(form, 0)
        most = max(1, self._room // row_bytes) if row_bytes else self._held
        return max(1, min(self._held, most))

    def _groups(self, rows: int) -> list[range]:
        starts = range(self.start, len(self._left), max(1, rows))
        return [range(start, min(start + rows, len(self._left))) for start in starts]

    def _meetings(self, own: range, form: str) -> list[Meeting]:
        """The right rows that a block of left rows meets, in rising order."""
        if not self._one_table or form == "dense":
            return self._ranges(0, len(self._right))
        before = [] if form == "histogram" else self._ranges(0, own.start)
        itself = Meeting(own.start, own.stop, True)
        return [*before, itself, *self._ranges(own.stop, len(self._right))]

    def _ranges(self, start: int, stop: int) -> list[Meeting]:
        """Ranges of at most a chunk, which begin at multiples of it where they can."""
        cuts = [start, *range((start // self._chunk + 1) * self._chunk, stop, self._chunk), stop]
        return [Meeting(a, b) for a, b in pairwise(cuts) if a < b]

    def _load(self, rows: Rows, start: int, stop: int, place: str) -> np.ndarray:
        """Rows of a side: a part of what is in memory, or read into the memory of that name."""
        if isinstance(rows, np.ndarray):
            return rows[start:stop]
        needed = self._chunk if place.startswith("chunk") else max(self._held, stop - start)
        if place not in self._memory:
            self._memory[place] = page_aligned((needed, rows.shape[1]))
        return rows.load(start, stop, self._memory[place])

    def _walks(self, own: range, form: str) -> Iterator[tuple[Meeting, np.ndarray, Any]]:
        """Yield what a block meets, with its own rows and those of the range (None: itself)."""
        held = self._load(self._left, own.start, own.stop, "held")

        def loads() -> Iterator[tuple[Meeting, np.ndarray | None]]:
            place = 0
            for meeting in self._meetings(own, form):
                if meeting.itself:
                    yield meeting, None
                    continue
                place = 1 - place
                yield meeting, self._load(self._right, meeting.start, meeting.stop, f"chunk{place}")

        with closing(read_ahead(loads(), depth=0)) as ready:
            for meeting, rows in ready:
                yield meeting, held, rows

    def _walk(self, held: np.ndarray, rows: np.ndarray | None, **more: Any) -> Any:
        walk = self._make(held, rows, self._walk_memory, **more)
        self.threads, self.scan = walk.threads, walk.scan
        return walk

    # --- results ---

    def top_k(self, k: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield the k best of each left row, as `fastpair.matrix.AllPairs.top_k`."""
        if k < 1:
            raise ArgumentError(f"k is {k}, expected at least 1")
        for own in self._groups(self._held_rows("top-k", k)):
            scores = np.full((len(own), k), np.nan, np.float32)
            indices = np.full((len(own), k), -1, np.int64)
            for meeting, held, rows in self._walks(own, "top-k"):
                for first, *part in self._walk(held, rows).top_k(k):
                    part[1] = part[1] + meeting.start * (part[1] >= 0)
                    for at in range(0, len(part[0]), MERGED_ROWS):
                        here = slice(first + at, first + min(at + MERGED_ROWS, len(part[0])))
                        there = slice(at, at + MERGED_ROWS)
                        merged = merge_best(
                            (scores[here], indices[here]), (part[0][there], part[1][there]), k
                        )
                        scores[here], indices[here] = merged
            yield own.start, scores, indices

    def above(self, threshold: float) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """Yield every pair from `threshold` on, as `fastpair.matrix.AllPairs.above`."""
        waiting = self._groups(self._held)[::-1]
        while waiting:
            own = waiting.pop()
            try:
                hits = self._hits(own, threshold)
            except MemoryBudgetError:
                if len(own) <= LEAST_ROWS:
                    raise
                half = own.start + len(own) // 2
                waiting += [range(half, own.stop), range(own.start, half)]
                continue
            yield (own.start, *hits)

    def _hits(self, own: range, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Counts, columns and scores of a block's pairs.

        Raises
        ------
        MemoryBudgetError : they are too many to be held at once.
        """
        parts = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
        room = self._room // HIT_BYTES
        for meeting, held, rows in self._walks(own, "threshold"):
            for first, counts, indices, scores in self._walk(held, rows).above(threshold):
                owners = np.repeat(np.arange(first, first + len(counts)), counts)
                parts.append((owners, indices + meeting.start, scores))
                room -= len(owners)
                if room < 0:
                    raise MemoryBudgetError(
                        f"the threshold keeps more pairs of {len(own)} rows than the memory holds: "
                        "raise the threshold or allow more memory"
                    )
        return pairs_by_row(parts, 0, len(own))

    def dense(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the scores of every pair, as `fastpair.matrix.AllPairs.dense`."""
        more = self._shared("dense")
        for own in self._groups(self._held_rows("dense")):
            scores = np.empty((len(own), len(self._right)), np.float32)
            for meeting, held, rows in self._walks(own, "dense"):
                for first, part in self._walk(held, rows, **more).dense():
                    here = slice(first, first + len(part))
                    scores[here, meeting.start : meeting.stop] = part
            yield own.start, scores

    def histogram(self, bins: int = 100) -> tuple[np.ndarray, np.ndarray]:
        """Count all scores, as `fastpair.matrix.AllPairs.histogram`."""
        check_bins(bins)
        more = self._shared("histogram")
        least, greatest, walk = np.inf, -np.inf, None
        for own in self._groups(self._held):
            for meeting, held, rows in self._walks(own, "histogram"):
                walk = self._walk(held, rows, **more)
                low, high = walk.ends()
                least, greatest = min(least, low), max(greatest, high)
                self._count_twice(own, meeting)
        ends = at_least_one_pair((least, greatest))
        assert walk is not None
        edges = walk.edges(ends, bins)
        counts = np.zeros(bins, np.int64)
        for own in self._groups(self._held):
            for meeting, held, rows in self._walks(own, "histogram"):
                found = self._walk(held, rows, **more).count(edges, ends)
                counts += found * (2 if self._count_twice(own, meeting) else 1)
        return edges, counts

    def _count_twice(self, own: range, meeting: Meeting) -> bool:
        """Whether a meeting stands for both orders of its pairs."""
        twice = self._one_table and not meeting.itself
        if twice:
            self._progress(len(own) * (meeting.stop - meeting.start))
        return twice

    # --- what parts share ---

    def _needs_shared(self, form: str) -> bool:
        return form in ("dense", "histogram") and self._plan.network is None

    def _shared(self, form: str) -> dict[str, Any]:
        """What the walks of parts need to have the tiles of one walk over all."""
        if not self._needs_shared(form):
            return {}
        from fastpair.kernels.operands import make_frame
        from fastpair.walk import Shared, Sides, greatest_of

        frame = make_frame(self._left, self._right, self._plan)
        parts = []
        nothing = np.empty((0, self._left.shape[1]), np.uint8)
        for meeting in self._ranges(0, len(self._right)):
            rows = self._load(self._right, meeting.start, meeting.stop, "chunk0")
            options = self._plan, "float32", 1, self._walk_memory
            parts.append(Sides(nothing, rows, *options, frame=frame).greatest())
        return {"shared": Shared(frame, greatest_of(parts), self._one_table)}


def merge_best(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], k: int
) -> list[np.ndarray]:
    """Return the k best scores and indices of each row of two parts.

    Indices of the first part are lower: equal scores stay by lower index. NaN, where there is no
    pair, comes last.
    """
    both = [np.concatenate(pair, axis=1) for pair in zip(first, second, strict=True)]
    order = np.argsort(-both[0], axis=1, kind="stable")[:, :k]
    return [np.take_along_axis(array, order, axis=1) for array in both]
