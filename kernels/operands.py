"""Table rows -> the operands of an all-pairs tile, and how far a tile can be from the pair kernel.

A tile knows two inner loops only, a sum of products and a sum of maxima. Differences become those
when the operand is made, the parts that belong to one entity going to its bias::

    s (e - e')^2 = s e^2 + s e'^2 + (-2 s e) e'            |  left column -2 s e, right column e
    s |a - a'|   = s max(2 a, 2 a') - s a - s a'           |  column 2 a on both sides

Differences do not change when one number is taken from a column on both sides. Taking about the
column's mean keeps what cancels small.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastpair.kernels import LANES, Plan
from fastpair.kernels.reference import signed_runs, unpack_rows

_UNIT_ROUNDOFF = 2.0**-24
_SMALLEST = 2.0**-149


@dataclass(frozen=True)
class Operand:
    """One side of a tile, rows still one after another.

    Parameters
    ----------
    columns : (n, K) float32: products, then maxima to add, then maxima to subtract.
    bias : (n,) float32, the row's own part of the raw score.
    counts : numbers of the three kinds of column; they sum to K.
    size, length : (n,) float64; |terms| of a pair sum to at most
        ``size_i + size_j + length_i * length_j``, in the tile as in the pair kernel.
    """

    columns: np.ndarray
    bias: np.ndarray
    counts: tuple[int, int, int]
    size: np.ndarray
    length: np.ndarray


def operand_counts(plan: Plan) -> tuple[int, int, int]:
    """Return the numbers of product, added-maximum and subtracted-maximum columns of a plan."""
    counts = {"product": 0, "plus": 0, "minus": 0}
    for name, sign, columns in signed_runs(plan):
        kind = "product" if name in ("product", "squared") else "plus" if sign > 0 else "minus"
        counts[kind] += columns.stop - columns.start
    return counts["product"], counts["plus"], counts["minus"]


def column_shifts(rows: np.ndarray, plan: Plan) -> dict[str, np.ndarray]:
    """Return what to take from the columns of differences: their means over some of the rows."""
    some = rows[:: max(1, len(rows) // 1024)]
    values = unpack_rows(some, plan) if len(some) else {}
    return {name: values[name].mean(axis=0) for name in ("absolute", "squared") if name in values}


def make_operand(
    rows: np.ndarray, plan: Plan, side: str, shifts: dict[str, np.ndarray] | None = None
) -> Operand:
    """Return the operand of some rows of a table.

    Parameters
    ----------
    rows : (n, row_bytes) uint8.
    side : "left" or "right"; the sides differ in signs and in the order of mirrored halves.
    shifts : as `column_shifts` gives them, the same for both sides; default none.
    """
    values = unpack_rows(rows, plan)
    for name, shift in (shifts or {}).items():
        values[name] -= shift
    bias = values["bias"].copy()
    size = np.abs(values["bias"])
    squares = np.zeros(len(rows))
    products: list[np.ndarray] = []
    plus: list[np.ndarray] = []
    minus: list[np.ndarray] = []
    for name, sign, columns in signed_runs(plan):
        part = values[name][:, columns]
        if name == "product":
            products.append(sign * part if side == "left" else part)
            squares += (part**2).sum(1)
        elif name == "squared":
            products.append(-2 * sign * part if side == "left" else part)
            own = (part**2).sum(1)
            bias += sign * own
            size += 2 * own  # own and half of |2 e e'|; the pair kernel's (e - e')^2 is no larger
        else:
            own = np.abs(part).sum(1)
            if name == "absolute":
                bias -= sign * part.sum(1)
                part, own = 2 * part, 3 * own
            elif name == "mirrored" and side == "right":
                half = part.shape[1] // 2
                part = np.concatenate([part[:, half:], part[:, :half]], axis=1)
            size += own
            (plus if sign > 0 else minus).append(part)
    groups = products + plus + minus
    columns32 = np.concatenate(groups, axis=1) if groups else np.zeros((len(rows), 0))
    return Operand(
        columns=columns32.astype(np.float32),
        bias=bias.astype(np.float32),
        counts=operand_counts(plan),
        size=size,
        length=np.sqrt(squares),
    )


def tile_bound(left: Operand, right_size: float, right_length: float, plan: Plan) -> np.ndarray:
    """Return (n,) float32: how far a raw score of a tile can be from the pair kernel's.

    `right_size` and `right_length` are the greatest of the right operand. Both kernels sum the
    same numbers in float32 and differ from the exact sum by at most the number of roundings on
    the way to a result, times the unit roundoff, times the sum of the terms' sizes (Higham,
    Accuracy and Stability of Numerical Algorithms, 2nd ed., section 4.2); the operand's columns
    and bias were rounded once or twice more. The bound is doubled for second-order terms.
    """
    terms = sum(left.counts)
    roundings = (terms + 8) + (terms / LANES + 12)
    sizes = abs(plan.constant) + left.size + right_size + left.length * right_length
    bound = 2 * _UNIT_ROUNDOFF * roundings * sizes + 4 * roundings * _SMALLEST
    return np.nextafter(bound.astype(np.float32), np.float32(np.inf))


def pack_panels(
    operand: Operand, width: int, columns: np.ndarray, bias: np.ndarray, padding: float
) -> None:
    """Fill the panels of a register tile: for each column, `width` rows side by side.

    Parameters
    ----------
    operand : n rows of K columns.
    width : rows of a panel.
    columns : (panels, K, width) float32, filled; rows past n are zero.
    bias : (panels, width) float32, filled; rows past n are `padding`.
    """
    count, number = operand.columns.shape
    whole = count // width
    columns[:whole] = operand.columns[: whole * width].reshape(whole, width, number).swapaxes(1, 2)
    bias.reshape(-1)[:count] = operand.bias
    bias.reshape(-1)[count:] = padding
    if whole < len(columns):
        columns[whole] = 0
        columns[whole, :, : count - whole * width] = operand.columns[whole * width :].T
