"""Entities whose embeddings are not finite, kept out of everything: NaN is their only score.

Their rows are stored as zeros, so that no kernel ever sees a NaN; which they are stands beside the
rows, and what a kernel would make of the zeros is taken away here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from fastpair.errors import DataError

ROWS_MOVED = 1 << 14
"""Rows of a table that are moved together."""


def isolated_pairs(
    left: np.ndarray, right: np.ndarray, isolated: Sequence[np.ndarray | None]
) -> np.ndarray | None:
    """Which pairs of row numbers (m,) meet an isolated row of their side; None if none can."""
    masks = [
        mask[rows] for mask, rows in zip(isolated, (left, right), strict=True) if mask is not None
    ]
    return np.logical_or.reduce(masks) if masks else None


def without_isolated(
    vectors: np.ndarray, isolated: np.ndarray, columns: Sequence[np.ndarray | None]
) -> tuple[np.ndarray, list[Any]]:
    """Embeddings without isolated rows, and pairs without those that meet one.

    Parameters
    ----------
    vectors : (N, n).
    isolated : (N,) bool.
    columns : left and right rows (M,), then what else belongs to the pairs, (M,) or None.

    Returns
    -------
    tuple
        The embeddings (N', n), and the columns (M',) with rows counted anew.

    Raises
    ------
    DataError
        No pair is left.
    """
    left, right = columns[0], columns[1]
    assert left is not None
    assert right is not None
    kept = ~(isolated[left] | isolated[right])
    if not kept.any():
        raise DataError("every pair has an embedding that is not finite; nothing is left.")
    numbers = np.cumsum(~isolated) - 1
    ends = [numbers[rows[kept]].astype(rows.dtype) for rows in (left, right)]
    rest = [None if column is None else column[kept] for column in columns[2:]]
    return vectors[~isolated], [*ends, *rest]


def pack_rows(rows: np.ndarray, good: np.ndarray) -> np.ndarray:
    """Move the good rows (numbers, rising) of a table to its beginning; return that part of it.

    Of rows that stay in their file the good ones are told.
    """
    if not isinstance(rows, np.ndarray):
        return rows.only(good)
    for start in range(0, len(good), ROWS_MOVED):
        part = good[start : start + ROWS_MOVED]
        rows[start : start + len(part)] = rows[part]
    return rows[: len(good)]


FromRow = Callable[[np.ndarray, np.ndarray | None, int], Any]
"""Gives the walk of left rows, from one of them on, against right rows (None: one table):
a `RemainingPairs`, or one that only has what is asked of it."""


class PairsWithoutIsolated:
    """All pairs of tables with isolated rows, which find nobody and are found by nobody.

    Parameters
    ----------
    from_row : gives what walks the rows that are not isolated.
    left, right : rows of the tables, which are changed; right is None where it is left.
    isolated : of the left and of the right table, (N,) bool or None.
    start : the first left row that is wanted.
    """

    def __init__(
        self,
        from_row: FromRow,
        left: np.ndarray,
        right: np.ndarray | None,
        isolated: tuple[np.ndarray | None, np.ndarray | None],
        start: int = 0,
    ) -> None:
        tables = (left, left if right is None else right)
        self.start = start
        self._counts = [len(rows) for rows in tables]
        self._good = [
            np.arange(len(rows)) if mask is None else np.flatnonzero(~mask)
            for rows, mask in zip(tables, isolated, strict=True)
        ]
        packed = [pack_rows(left, self._good[0])]
        if right is not None:
            packed.append(pack_rows(right, self._good[1]))
        if not len(self._good[0]) or not len(self._good[1]):
            raise DataError("no embedding of a table is finite; there is no pair to score.")
        self._first = int(np.searchsorted(self._good[0], start))
        first = min(self._first, len(self._good[0]) - 1)
        self._pairs = from_row(packed[0], None if right is None else packed[1], first)

    @property
    def about(self) -> dict[str, Any]:
        """How it was walked, see `RemainingPairs`."""
        return self._pairs.about

    def _places(self, first: int, count: int) -> tuple[int, int, np.ndarray]:
        """First row, number of rows, and where the good ones stand among them."""
        good = self._good[0]
        start = max(self.start, int(good[first - 1]) + 1 if first else 0)
        last = first + count == len(good)
        stop = self._counts[0] if last else int(good[first + count - 1]) + 1
        return start, stop - start, good[first : first + count] - start

    def _parts(self, parts: Iterator[Any], *nothing: np.ndarray) -> Iterator[Any]:
        """The parts, or what stands for no row where isolated rows alone are left."""
        if self._first < len(self._good[0]):
            yield from parts
        elif self.start < self._counts[0]:
            yield self._first, *nothing

    def top_k(self, k: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """The best of each left row; isolated ones have none."""
        nothing = np.empty((0, k), np.float32), np.empty((0, k), np.int64)
        for first, scores, indices in self._parts(self._pairs.top_k(k), *nothing):
            start, count, places = self._places(first, len(scores))
            best = np.full((count, k), np.nan, np.float32)
            found = np.full((count, k), -1, np.int64)
            best[places] = scores
            found[places] = np.where(indices < 0, -1, self._good[1][indices])
            yield start, best, found

    def above(self, threshold: float) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """Every pair that scores at least `threshold`, isolated rows left out."""
        nothing = *np.empty((2, 0), np.int64), np.empty(0, np.float32)
        for first, counts, indices, scores in self._parts(self._pairs.above(threshold), *nothing):
            start, count, places = self._places(first, len(counts))
            all_counts = np.zeros(count, np.int64)
            all_counts[places] = counts
            yield start, all_counts, self._good[1][indices], scores

    def dense(self) -> Iterator[tuple[int, np.ndarray]]:
        """All scores, NaN in the rows and columns of isolated entities."""
        nothing = np.empty((0, len(self._good[1])), np.float32)
        for first, scores in self._parts(self._pairs.dense(), nothing):
            start, count, places = self._places(first, len(scores))
            full = np.full((count, self._counts[1]), np.nan, np.float32)
            full[np.ix_(places, self._good[1])] = scores
            yield start, full

    def histogram(self, bins: int = 100) -> tuple[np.ndarray, np.ndarray]:
        """Scores of all pairs without isolated rows, counted in equal bins."""
        return self._pairs.histogram(bins)
