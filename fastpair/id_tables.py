"""Tables of ids that a model learned itself: what takes the place of a file of embeddings."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastpair.errors import ArgumentError

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, eq=False)
class IdTable:
    """What was learned of the ids of one side.

    Parameters
    ----------
    ids : text, (N,), each once.
    columns : (N, n) float32, which go through the model like embeddings.
    """

    ids: pa.Array
    columns: np.ndarray

    @property
    def unknown(self) -> np.ndarray:
        """What stands for an id that is not here: the mean of all rows, (n,) float32."""
        return self.columns.mean(axis=0, dtype=np.float64).astype(np.float32)

    def with_unknown(self) -> np.ndarray:
        """Return (N + 1, n) float32: all rows, then the one of unknown ids."""
        return np.concatenate([self.columns, self.unknown[None]])


@dataclass(frozen=True, eq=False)
class IdTables:
    """The tables of a model that learned ids.

    Parameters
    ----------
    left : of left ids, or of all ids.
    right : of right ids; None: one table serves both sides.
    """

    left: IdTable
    right: IdTable | None = None

    @property
    def sides(self) -> dict[str, IdTable]:
        """The tables by side: "both", or "left" and "right"."""
        if self.right is None:
            return {"both": self.left}
        return {"left": self.left, "right": self.right}

    def of(self, side: str) -> IdTable:
        """Return the table of a side.

        Raises
        ------
        ArgumentError : there is no such side.
        """
        if side not in self.sides:
            kind = "two tables" if self.right is not None else "one table for both sides"
            raise ArgumentError(
                f"side is {side!r} but this model learned {kind}: use --side "
                + " or --side ".join(self.sides)
            )
        return self.sides[side]

    def check(self, columns: int | None) -> None:
        """Refuse tables that do not fit a model of so many columns, or are not finite."""
        for side, table in self.sides.items():
            values = table.columns
            if values.ndim != 2 or values.shape[1] != columns or len(values) != len(table.ids):
                raise ArgumentError(
                    f"the {side} table has shape {values.shape} and {len(table.ids)} ids, expected "
                    f"a row an id of {columns} columns"
                )
            if not len(values) or not np.isfinite(values).all():
                raise ArgumentError(f"the {side} table is empty or holds NaN or infinity")

    def digest(self) -> bytes:
        """Return a SHA-256 over all ids and columns."""
        from fastpair.ids import text_parts

        digest = hashlib.sha256()
        for side, table in self.sides.items():
            positions, data = text_parts(table.ids)
            digest.update(f"{side}{table.columns.shape}".encode())
            digest.update(np.diff(positions).tobytes())
            digest.update(data[positions[0] : positions[-1]].tobytes())
            digest.update(np.ascontiguousarray(table.columns, "<f4").tobytes())
        return digest.digest()
