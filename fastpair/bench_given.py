"""What users bring to ``fastpair bench``: their table, their pair file, and decisions by both."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from fastpair.agreement import Case
from fastpair.errors import ArgumentError
from fastpair.files import Table, TableWriter, read_table
from fastpair.kernels import aligned_empty, reference
from fastpair.pairs import PairSource, open_pairs
from fastpair.refolding import refold

MOST_REFOLDED = 1 << 28
"""Bytes of a given table that are folded again in other precisions."""

BLOCK = 1 << 16
"""Pairs of a given file that are read together for works in memory."""

LONGEST_READ = 3.0
"""Seconds after which no further pairs are read into memory."""

MOST_TERMS = 1 << 23
"""Numbers that the reference holds of all pairs of the rows that decisions are compared on."""

LEAST_ROWS, MOST_ROWS = 32, 256
"""How many such rows there are."""

PARTNERS = 15
"""Rows that are looked for near the threshold, for each row that is drawn."""

LOOKED_AT = 20_000
"""Rows among which they are looked for."""

TABLE_CASE = "the table"
"""What stands for the head where a given table is compared."""


def read_given(path: Path) -> Table:
    """Return the table to measure; one without pairs, or of one side, is refused."""
    table = read_table(path)
    if len(table.rows) < 2:
        raise ArgumentError(f"{path} has {len(table.rows)} rows, pairs need at least 2")
    if table.side != "both":
        raise ArgumentError(
            f"{path} holds the {table.side} side of an asymmetric model, whose rows are not "
            "compared with each other: give the table of a symmetric one"
        )
    return table


def open_given(path: Path, table: Table) -> PairSource:
    """Open a file of pairs of a table."""
    unknown = table.unknown_row
    return open_pairs(path, ids=table.ids, count=table.count, unknown_rows=(unknown, unknown))


def given_pairs(source: PairSource, count: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first pairs of a file, row numbers (m,) int32 twice, m at most `count`."""
    parts, waiting, begun = [], count, time.perf_counter()
    with closing(source.blocks(BLOCK, threads=threads)) as blocks:
        for block in blocks:
            parts.append((block.left[:waiting], block.right[:waiting]))
            waiting -= len(parts[-1][0])
            if not waiting or time.perf_counter() - begun > LONGEST_READ:
                break
    left, right = (np.concatenate(side).astype(np.int32) for side in zip(*parts, strict=True))
    return left, right


def refolded(given: Table, precision: str, path: Path, threads: int) -> Table:
    """Fold the first rows of a float32 table in another precision; the table lies at `path`."""
    rows, plan = refold(_first_rows(given), given.plan, precision, threads=threads)
    about: dict[str, Any] = {"fingerprint": given.fingerprint, "model_name": given.model_name}
    with TableWriter(path, len(rows), plan, unit=given.unit, overwrite=True, **about) as writer:
        writer.write(0, rows.view(plan.layout.dtype)[:, 0])
    return read_table(path)


def _first_rows(given: Table) -> np.ndarray:
    return given.rows[: max(2, MOST_REFOLDED // given.plan.layout.row_bytes)]


@dataclass
class Deciding:
    """Rows of a given table on which decisions are compared: many of their scores are near it.

    Of each row that is drawn, those of some thousand others come along whose scores are nearest to
    the threshold: among random pairs hardly any decision would be in doubt.

    Parameters
    ----------
    table : the given table.
    threads : that look for them.
    """

    table: Table
    threads: int

    @property
    def refolded_bytes(self) -> int:
        """Bytes of the rows that are folded again."""
        return _first_rows(self.table).nbytes

    @cached_property
    def chosen(self) -> np.ndarray:
        """The row numbers (n,), ascending."""
        rows, plan = self.table.rows, self.table.plan
        count = min(len(_first_rows(self.table)), self.table.count)
        there = np.arange(count)
        if self.table.isolated is not None:
            there = there[~self.table.isolated[:count]]
        width = max(1, sum(plan.layout.segment_lengths.values()))
        most = min(MOST_ROWS, max(LEAST_ROWS, isqrt(MOST_TERMS // width)))
        if len(there) <= most:
            return there
        from fastpair.scoring import PairScorer

        rng = np.random.default_rng(0)
        drawn = rng.choice(there, most // (PARTNERS + 1), replace=False)
        others = rng.choice(there, min(LOOKED_AT, len(there)), replace=False)
        left = np.repeat(drawn, len(others))
        scores = PairScorer(rows, plan, threads=self.threads)(left, np.tile(others, len(drawn)))
        threshold = self.table.threshold
        if threshold is None:
            threshold = float(np.nanquantile(scores, 0.9))
        apart = np.abs(scores.reshape(len(drawn), -1) - threshold)
        nearest = others[np.argsort(apart, axis=1, kind="stable")[:, :PARTNERS]]
        return np.unique(np.concatenate([drawn, nearest.reshape(-1)]))

    @cached_property
    def truth(self) -> np.ndarray:
        """The float64 scores (n, n) of these rows, link included."""
        some = self.table.rows[self.chosen]
        return reference.score_matrix(some, some, self.table.plan)

    @cached_property
    def _own(self) -> Case:
        some = np.ascontiguousarray(self.table.rows[self.chosen])
        return Case(TABLE_CASE, some, self.table.plan, self.table.threshold)

    def case(self, table: Table) -> Case:
        """Return these rows of the given table, or of the same one in another precision."""
        own = self._own
        decides = own.deciding_score(own.plan)
        return Case(TABLE_CASE, _aligned(table.rows[self.chosen]), table.plan, decides, self.truth)


def _aligned(rows: np.ndarray) -> np.ndarray:
    """Copy rows to where kernels read them."""
    copied = aligned_empty(rows.shape, np.uint8)
    copied[:] = rows
    return copied
