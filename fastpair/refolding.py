"""A float32 table folded again in another precision, without its model or its embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np

from fastpair.errors import ArgumentError
from fastpair.folding import Folder
from fastpair.heads import Columns, Folded
from fastpair.kernels import SEGMENTS, Plan, aligned_empty
from fastpair.kernels.reference import unpack_rows
from fastpair.model import Model

ROWS_AT_ONCE = 1 << 14


class _Stored:
    """What stands for the model: its "embeddings" are the true columns of a table's rows."""

    network = None

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.constant, self.link = plan.constant, plan.link
        self.slope, self.offset = plan.slope, plan.offset

    def check_embeddings(self, columns: int) -> None:
        """Any number is right."""

    def values(self, rows: np.ndarray) -> np.ndarray:
        """Return the true columns of rows, then the bias: (n, columns) float64."""
        unpacked = unpack_rows(rows, self.plan)
        parts = [unpacked[name][:, place] for name, _, places in self._runs() for place in places]
        return np.concatenate([*parts, unpacked["bias"][:, None]], axis=1)

    def fold(self, values: np.ndarray, side: str) -> Folded:
        """Give each run its columns back."""
        segments, start = [], 0
        for name, sign, places in self._runs():
            width = places[0].stop - places[0].start
            part = values[:, start : start + len(places) * width]
            start += part.shape[1]
            if name == "mirrored":
                part = part.reshape(len(part), 2, width)
            segments.append(Columns(name, part, np.full(width, sign, np.int8)))
        return Folded(segments, values[:, -1] if self.plan.layout.bias else None)

    def _runs(self) -> Iterator[tuple[str, int, list[slice]]]:
        """Yield (segment, sign, places of the true columns): two places of a mirrored run."""
        layout = self.plan.layout
        for number, name in enumerate(SEGMENTS):
            start, halves = 0, 2 if name == "mirrored" else 1
            padded = layout.runs[2 * number : 2 * number + 2]
            for sign, true, width in zip((1, -1), layout.columns[number], padded, strict=True):
                places = [slice(start + h * width, start + h * width + true) for h in range(halves)]
                start += halves * width
                if true:
                    yield name, sign, places


def refold(
    rows: np.ndarray, plan: Plan, precision: str, *, threads: int | None = None
) -> tuple[np.ndarray, Plan]:
    """Fold the rows of a float32 table again.

    Parameters
    ----------
    rows : (n, row_bytes) uint8.
    plan : its plan, of precision float32 and without a network.
    precision : "float32", "float16", "bfloat16" or "int8".
    threads : number of threads; default one for each processor.

    Returns
    -------
    rows : (n, row_bytes) uint8 of the new layout.
    plan : the new plan.

    Raises
    ------
    ArgumentError : the table is not float32 or has a network.
    DataError : a row holds a number that the precision cannot hold.
    """
    if plan.precision != "float32" or plan.network is not None:
        raise ArgumentError(f"only float32 tables are folded again, this one is {plan.precision}")
    stored = _Stored(plan)
    columns = stored.values(rows[:0]).shape[1]
    folder = Folder(cast(Model, stored), columns, precision, threads=threads)
    starts = range(0, len(rows), ROWS_AT_ONCE)
    if folder.needs_survey:
        for start in starts:
            folder.survey(stored.values(rows[start : start + ROWS_AT_ONCE]))
    again = aligned_empty((len(rows), folder.plan.layout.row_bytes), np.uint8)
    for start in starts:
        part = folder.fold(stored.values(rows[start : start + ROWS_AT_ONCE]), start)
        again[start : start + len(part)] = part.view(np.uint8).reshape(len(part), -1)
    return again, folder.plan
