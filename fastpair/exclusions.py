"""The best right rows of each left row, without pairs that are known already."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastpair.backend import LEAST_MEMORY
from fastpair.errors import MemoryBudgetError
from fastpair.files import Table
from fastpair.kernels import aligned_empty
from fastpair.pairs import open_pairs
from fastpair.remaining import Make
from fastpair.results import SCORE_BLOCK

ROWS_AT_ONCE = 1 << 16
"""Left rows whose best are held at once, at most."""

KEY_BYTES = 24
"""Bytes that a pair needs while exclusions are read and sorted."""


class Exclusions:
    """Pairs that are left out, each once.

    Parameters
    ----------
    left, right : (m,) integer rows.
    shape : rows of the left and of the right table.
    """

    def __init__(self, left: np.ndarray, right: np.ndarray, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.keys = np.unique(left.astype(np.int64) * shape[1] + right)

    def among_kept(self, kept: tuple[np.ndarray | None, np.ndarray | None]) -> Exclusions:
        """Return the pairs as they are numbered when only the kept rows of both tables are there.

        Parameters
        ----------
        kept : (N,) bool of the left and of the right table; None: all rows are kept.
        """
        rows = list(np.divmod(self.keys, self.shape[1]))
        masks = [
            np.ones(count, bool) if mask is None else mask
            for mask, count in zip(kept, self.shape, strict=True)
        ]
        both = masks[0][rows[0]] & masks[1][rows[1]]
        left, right = (
            (np.cumsum(mask) - 1)[side[both]] for mask, side in zip(masks, rows, strict=True)
        )
        return Exclusions(left, right, (int(masks[0].sum()), int(masks[1].sum())))

    def counts(self, first: int, last: int) -> np.ndarray:
        """Return how many pairs each left row from `first` to `last` has."""
        ends = np.arange(first, last + 1, dtype=np.int64) * self.shape[1]
        return np.diff(np.searchsorted(self.keys, ends))

    def among(self, rows: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Return which right rows `indices` (b, k) of left rows (b,) are left out, bool."""
        if not len(self.keys):
            return np.zeros(indices.shape, bool)
        keys = rows[:, None].astype(np.int64) * self.shape[1] + indices
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return (self.keys[places] == keys) & (indices >= 0)


def read_exclusions(
    path: Path, left: Table, right: Table | None, budget: int, **columns: Any
) -> tuple[Exclusions, list[str]]:
    """Read pairs to leave out; those with ids that no table knows need none.

    Parameters
    ----------
    path : a pair file of any accepted format. Where `left` is the right side of a model of two
        sides, its pairs still name the model's left side first.
    left, right : the tables; None: one table, in which pairs are left out both ways round, and
        each row with itself.
    budget : bytes that may be used.
    columns : `left_column`, `right_column`, `keys` and `options` of `open_pairs`.

    Raises
    ------
    MemoryBudgetError : there are too many pairs.
    """
    turned = right is not None and (left.side, right.side) == ("right", "left")
    sides = (left, right or left)
    one, other = sides[::-1] if turned else sides
    pairs = open_pairs(
        path,
        ids=one.ids,
        count=one.count,
        right_ids=other.ids,
        right_count=other.count,
        unknown_rows=(-1, -1),
        **columns,
    )
    needed = KEY_BYTES * pairs.count * (1 if right is not None else 2)
    if needed > budget // 2:
        raise MemoryBudgetError(
            f"the {pairs.count} pairs of --exclude need {needed} bytes, more than half of the "
            f"{budget} that --memory leaves beside the tables: allow more"
        )
    rows = [np.empty(pairs.count, np.int64) for _ in range(2)]
    for block in pairs.blocks(SCORE_BLOCK):
        part = slice(block.start, block.start + len(block.left))
        rows[0][part], rows[1][part] = block.left, block.right
    known = (rows[0] >= 0) & (rows[1] >= 0)
    first, second = (side[known] for side in (rows[::-1] if turned else rows))
    if right is None:
        own = np.arange(left.count)
        first, second = np.r_[first, second, own], np.r_[second, first, own]
    notes = [pairs.assumed] if pairs.assumed else []
    if not known.all():
        notes.append(f"{np.sum(~known)} pairs of --exclude have ids that the tables do not know")
    return Exclusions(first, second, (sides[0].count, sides[1].count)), notes


class PairsWithoutExcluded:
    """All pairs from a left row on, without those that are left out; only the best of each row.

    Rows are searched in groups of about equal numbers of exclusions: for k and the most exclusions
    of the group, of which the rest is taken. So one row with very many does not cost the others.

    Parameters
    ----------
    make : gives what walks tables, as `fastpair.remaining.RemainingPairs` has it.
    left, right : rows of the tables; of one table, it is both.
    excluded : pairs of them, of one table each row with itself too.
    memory : bytes, 64 MiB or more; a quarter of it holds left rows and their best.
    start : the first left row that is wanted.
    """

    def __init__(
        self,
        make: Make,
        left: np.ndarray,
        right: np.ndarray,
        excluded: Exclusions,
        memory: int,
        start: int = 0,
    ) -> None:
        self._make, self._left, self._right = make, left, right
        self._excluded, self._memory, self.start = excluded, memory, start
        self._walk: Any = None

    @property
    def about(self) -> dict[str, Any]:
        """How it was walked last, see `fastpair.remaining.RemainingPairs`."""
        if self._walk is None:
            return {"threads": 0, "scan": None, "triangle": False}
        return {"threads": self._walk.threads, "scan": self._walk.scan, "triangle": False}

    def top_k(self, k: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield the k best of each left row that are not left out.

        Yields
        ------
        first, scores, indices : as `fastpair.matrix.AllPairs.top_k`; short rows end in NaN and -1.
        """
        row_bytes = 12 * k + 2 * self._left.shape[1]
        step = int(min(ROWS_AT_ONCE, max(1, self._memory // 4 // row_bytes)))
        for first in range(self.start, len(self._left), step):
            last = min(first + step, len(self._left))
            group = self._left[first:last]  # a copy where rows stay in their file
            counts = self._excluded.counts(first, last)
            levels = np.ceil(np.log2(counts + 1)).astype(np.int64)
            scores = np.full((last - first, k), np.nan, np.float32)
            indices = np.full((last - first, k), -1, np.int64)
            for level in np.unique(levels):
                rows = np.flatnonzero(levels == level)
                asked = int(min(k + counts[rows].max(), len(self._right)))
                for own, *best in self._best(group, first, rows, asked, k):
                    width = best[0].shape[1]
                    scores[own, :width], indices[own, :width] = best
            yield first, scores, indices

    def _best(
        self, group: np.ndarray, first: int, rows: np.ndarray, asked: int, k: int
    ) -> Iterator[Any]:
        """Yield rows of a group (from `first` on) and the best of each, from `asked` best ones."""
        subset = aligned_empty((len(rows), self._left.shape[1]), np.uint8)
        np.take(group, rows, axis=0, out=subset)
        room = max(LEAST_MEMORY, self._memory - self._memory // 4)
        self._walk = self._make(subset, self._right, room)
        for start, found, places in self._walk.top_k(asked):
            own = rows[start : start + len(found)]
            yield own, *_without(self._excluded, first + own, found, places, k)


def _without(
    excluded: Exclusions, rows: np.ndarray, scores: np.ndarray, indices: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the first k of each row that are not left out, in order; then NaN and -1."""
    out = excluded.among(rows, indices) | (indices < 0)
    order = np.argsort(out, axis=1, kind="stable")[:, :k]
    gone = np.take_along_axis(out, order, 1)
    best = np.where(gone, np.float32(np.nan), np.take_along_axis(scores, order, 1))
    return best, np.where(gone, -1, np.take_along_axis(indices, order, 1))
