"""What is left of all pairs when the results of the first rows are there already.

Of one table, the rows that are left are walked against the finished ones and among themselves, each
of which a backend does as it does all pairs of tables; what it did before is not walked again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Hits = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Counts of some rows, then columns and scores of their pairs."""


Make = Callable[[np.ndarray, np.ndarray | None, int], Any]
"""Gives what walks left rows against right rows (None: one table) within so many bytes."""


class RemainingPairs:
    """All pairs from a left row on.

    Parameters
    ----------
    make : gives what walks tables.
    left, right : rows of the tables; `right` is None where they are one.
    memory : bytes that may be allocated beside the tables.
    start : the first left row that is wanted.
    """

    def __init__(
        self, make: Make, left: np.ndarray, right: np.ndarray | None, memory: int, start: int
    ) -> None:
        self.start, self._whole = start, lambda: make(left, right, memory)
        self._walks: list[Any]
        if not start:
            self._walks = [self._whole()]
        elif right is not None:
            self._walks = [make(left[start:], right, memory)]
        else:
            halves = (left[:start], None)
            self._walks = [make(left[start:], half, memory // 2) for half in halves]

    @property
    def about(self) -> dict[str, Any]:
        """How it was walked: `threads`, `scan` and `triangle`."""
        last = self._walks[-1]
        return {"threads": last.threads, "scan": last.scan, "triangle": last.triangle}

    def top_k(self, k: int) -> Iterator[Any]:
        """Yield the k best of each left row, as `fastpair.matrix.AllPairs.top_k`."""
        parts = [walk.top_k(k) for walk in self._walks]
        if len(parts) == 1:
            yield from ((self.start + first, *rest) for first, *rest in parts[0])
            return
        first = self.start
        for earlier, later in _together([_rows(part) for part in parts], _cut_rows):
            found = later[1] + self.start * (later[1] >= 0)
            scores = np.concatenate([earlier[0], later[0]], axis=1)
            indices = np.concatenate([earlier[1], found], axis=1)
            # Equal scores stay by lower index; NaN, where there is no pair, comes last.
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            best = [np.take_along_axis(array, order, axis=1) for array in (scores, indices)]
            yield (first, *best)
            first += len(order)

    def above(self, threshold: float) -> Iterator[Any]:
        """Yield every pair from `threshold` on, as `fastpair.matrix.AllPairs.above`."""
        parts = [walk.above(threshold) for walk in self._walks]
        if len(parts) == 1:
            yield from ((self.start + first, *rest) for first, *rest in parts[0])
            return
        first = self.start
        for earlier, later in _together([_rows(part) for part in parts], _cut_hits):
            hits = _side_by_side(earlier, (later[0], later[1] + self.start, later[2]))
            yield (first, *hits)
            first += len(hits[0])

    def dense(self) -> Iterator[Any]:
        """Yield the scores of every pair, as `fastpair.matrix.AllPairs.dense`."""
        # A matrix of one table is symmetric to the last bit only if it is walked as one.
        return self._whole().dense(self.start) if self.start else self._walks[0].dense()

    def histogram(self, bins: int) -> tuple[np.ndarray, np.ndarray]:
        """Count all scores, as `fastpair.matrix.AllPairs.histogram`; of all rows alone."""
        return self._walks[0].histogram(bins)


def _rows(parts: Iterator[Any]) -> Iterator[tuple[np.ndarray, ...]]:
    """Parts without the number of their first row."""
    return (tuple(part[1:]) for part in parts)


Cut = Callable[[Any, int], tuple[Any, Any]]


def _together(sides: Sequence[Iterator[Any]], cut: Cut) -> Iterator[tuple[Any, ...]]:
    """Yield parts of both sides that hold the same rows, whatever the sides' own parts are."""
    held: list[Any] = [None] * len(sides)
    while True:
        for number, side in enumerate(sides):
            while held[number] is None or not len(held[number][0]):
                held[number] = next(side, None)
                if held[number] is None:
                    for other in sides:  # all end here, and tell so
                        next(other, None)
                    return
        count = min(len(part[0]) for part in held)
        pieces = [cut(part, count) for part in held]
        yield tuple(head for head, _ in pieces)
        held = [tail for _, tail in pieces]


def _cut_rows(part: tuple[np.ndarray, ...], count: int) -> tuple[Any, Any]:
    return tuple(a[:count] for a in part), tuple(a[count:] for a in part)


def _cut_hits(part: Hits, count: int) -> tuple[Hits, Hits]:
    counts, indices, scores = part
    at = int(counts[:count].sum())
    return (counts[:count], indices[:at], scores[:at]), (counts[count:], indices[at:], scores[at:])


def _side_by_side(left: Hits, right: Hits) -> Hits:
    """The pairs of each row of both, those of the left one first."""
    counts = left[0] + right[0]
    ends = np.cumsum(counts) - counts
    indices, scores = np.empty(counts.sum(), np.int64), np.empty(counts.sum(), np.float32)
    for begin, (own, found, values) in ((ends, left), (ends + left[0], right)):
        places = np.repeat(begin - (np.cumsum(own) - own), own) + np.arange(len(found))
        indices[places], scores[places] = found, values
    return counts, indices, scores
