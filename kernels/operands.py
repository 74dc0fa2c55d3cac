"""Table rows -> the operands of an all-pairs tile, and how far a tile can be from the pair kernel.

A tile knows two inner loops only, a sum of products and a sum of maxima. Differences become those
when the operand is made, the parts that belong to one entity going to its bias::

    s (e - e')^2 = s e^2 + s e'^2 + (-2 s e) e'            |  left column -2 s e, right column e
    s |a - a'|   = s max(2 a, 2 a') - s a - s a'           |  column 2 a on both sides

Differences do not change when one number is taken from a column on both sides. Taking about the
column's mean keeps what cancels small.

In a low form (`fastpair.kernels.tile`) the product columns are rounded. With x' and y' what two
rows became, the Cauchy-Schwarz inequality says how far that moves a pair::

    |x y - x' y'| <= |x - x'| |y| + |x'| |y - y'|

so a scan of rounded columns finds every pair that matters, and the pair kernel decides among them.
In the int8 form maxima become sums of absolute differences of bytes, in equal steps from a center
of each column that both sides share, the rest going to the biases::

    max(m, m') = (m + m') / 2 + |m - m'| / 2      | |m - m'| - |q - q'| | <= |m - q| + |m' - q'|
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fastpair.kernels import LANES, Plan, aligned_empty
from fastpair.kernels.reference import signed_runs, unpack_rows
from fastpair.kernels.tile import FORMS, HEADER, TILE_COLUMNS, TILE_ROWS

_UNIT_ROUNDOFF = 2.0**-24
_SMALLEST = 2.0**-149
_SMALLEST_NORMAL = 2.0**-126
_BYTE_STEPS = 127
_GREATEST_SIZE = 2.0**120
"""Sizes of pairs up to which no sum on the way of a tile, bound included, can overflow."""
_GREATEST_REACH = 2.0**110
"""How far from its center a column of maxima is told by bytes, so that no sum of them overflows."""
_GREATEST_MAXIMUM = np.float32(2.0**126)
_GREATEST = np.finfo(np.float32).max
_GREATEST_BFLOAT16 = np.float32(2.0**128 - 2.0**120)
_GREATEST_SCALE = np.float32(2.0**90)
"""Scale of an int8 row that no integer sum of 32 bits takes out of float32."""
MOST_BYTE_COLUMNS = 1 << 15
"""Product columns whose int8 sums stay within 32 bits."""


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


def _unpack(rows: np.ndarray, plan: Plan) -> dict[str, np.ndarray]:
    """What rows hold, as `unpack_rows`; where that is all, products stay float32."""
    lengths = plan.layout.segment_lengths
    if plan.precision != "float32" or set(lengths) != {"product"}:
        return unpack_rows(rows, plan)
    records = rows.view(plan.layout.dtype)[:, 0]
    bias = records["bias"] if plan.layout.bias else np.zeros(len(rows))
    return {"bias": np.asarray(bias, np.float64), "product": records["product"]}


@dataclass(frozen=True)
class Frame:
    """What both sides of a walk share.

    Parameters
    ----------
    shifts : what is taken from columns of differences, see `column_shifts`.
    centers, step : (M,) float64 and a float32, where the bytes of maxima begin and how far apart
        they are.
    """

    shifts: dict[str, np.ndarray]
    centers: np.ndarray
    step: np.float32


def make_frame(left_rows: np.ndarray, right_rows: np.ndarray, plan: Plan) -> Frame:
    """Return the frame of two tables, from a sample of both."""
    shifts = column_shifts(right_rows, plan)
    products, *maxima = operand_counts(plan)
    if not sum(maxima) or not len(left_rows) or not len(right_rows):
        return Frame(shifts, np.zeros(sum(maxima)), np.float32(1))
    sides = [
        make_operand(rows[:: max(1, len(rows) // 512)], plan, side, shifts).columns[:, products:]
        for rows, side in ((left_rows, "left"), (right_rows, "right"))
    ]
    centers = np.mean([side.mean(axis=0, dtype=np.float64) for side in sides], axis=0)
    reach = min(max(np.abs(side - centers).max() for side in sides), _GREATEST_REACH)
    return Frame(shifts, centers, np.float32(reach / _BYTE_STEPS) or np.float32(1))


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
    values = _unpack(rows, plan)
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
            products.append(-part if sign < 0 and side == "left" else part)
            squares += row_norms(part) ** 2
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
            elif name == "mirrored":
                halves = part.reshape(len(rows), 2, -1)[:, :: 1 if side == "left" else -1]
                part = halves.swapaxes(1, 2).reshape(len(rows), -1)
            size += own
            (plus if sign > 0 else minus).append(part)
    groups = products + plus + minus
    counts, empty = operand_counts(plan), np.zeros((len(rows), 0), np.float32)
    with np.errstate(over="ignore"):
        columns32 = np.concatenate([empty, *groups], axis=1, dtype=np.float32, casting="same_kind")
        bias32 = bias.astype(np.float32)
    if size.max(initial=0) > _GREATEST_SIZE:  # such a row's bound is infinite, its tile must be too
        for part, most in ((columns32[:, : counts[0]], _GREATEST), (bias32, _GREATEST)):
            np.clip(part, -most, most, out=part)
        maxima = columns32[:, counts[0] :]
        np.clip(maxima, -_GREATEST_MAXIMUM, _GREATEST_MAXIMUM, out=maxima)
    return Operand(columns32, bias32, counts, size, np.sqrt(squares))


@dataclass
class Panels:
    """One side of a walk, packed, and what bounds its error.

    Parameters
    ----------
    words : (panels, words of a panel) float32, on a `ROW_ALIGNMENT` boundary; see `tile`.
    form : a name of `fastpair.kernels.tile.FORMS`.
    side : "left" or "right".
    size, length : (n,) float64 of the operand's rows.
    norm, error : (n,) float64, 2-norms of a row's product columns and of what packing took from
        them; zeros in float32, which takes nothing.
    drift : (n,) float64, half the sum of what packing took from a row's columns of maxima.
    """

    words: np.ndarray
    form: str
    side: str
    size: np.ndarray
    length: np.ndarray
    norm: np.ndarray
    error: np.ndarray
    drift: np.ndarray

    @property
    def width(self) -> int:
        """Rows of a panel."""
        return TILE_ROWS if self.side == "left" else TILE_COLUMNS


def word_counts(plan: Plan, form: str) -> tuple[int, int, int]:
    """Return the steps of a tile: words of products, couples of words of added and other maxima."""
    products, plus, minus = operand_counts(plan)
    couple = 8 if form == "int8" else 2
    return -(-products // FORMS[form]), plus // couple, minus // couple


def row_words(plan: Plan, form: str) -> int:
    """Return the words that a row takes in a panel, headers left out."""
    products, plus, minus = word_counts(plan, form)
    return products + 2 * plus + 2 * minus


def empty_panels(count: int, plan: Plan, form: str, side: str) -> Panels:
    """Return panels for `count` rows, to be filled by `pack_rows`."""
    width = TILE_ROWS if side == "left" else TILE_COLUMNS
    words = (HEADER + row_words(plan, form)) * width
    panels = aligned_empty((-(-count // width), words), np.float32)
    return Panels(panels, form, side, *np.zeros((5, count)))


def pack_rows(panels: Panels, first: int, rows: np.ndarray, plan: Plan, frame: Frame) -> None:
    """Fill panels from row `first` on, a multiple of their width, with rows of a table.

    Where the rows end within a panel, the rest of it scores -inf.
    """
    operand = make_operand(rows, plan, panels.side, frame.shifts)
    here = slice(first, first + len(rows))
    panels.size[here], panels.length[here] = operand.size, operand.length
    products, maxima = np.split(operand.columns, [operand.counts[0]], axis=1)
    words, scale, start, panels.error[here] = _PACKERS[panels.form](products, panels.side)
    if panels.form != "float32":
        panels.norm[here] = row_norms(products)
        panels.error[here] += 4 * _UNIT_ROUNDOFF * panels.norm[here]  # that of finding the error
    bias = operand.bias
    if panels.form == "int8":
        signs = np.repeat([0.5, -0.5], operand.counts[1:])
        bias = (bias + maxima.astype(np.float64) @ signs).astype(np.float32)
        maxima, panels.drift[here] = _bytes_of(maxima, frame)
    header = np.zeros((HEADER, -(-len(rows) // panels.width) * panels.width), np.float32)
    header[0, : len(rows)], header[0, len(rows) :] = bias, -np.inf
    header[1, : len(rows)], header[2].view(np.int32)[: len(rows)] = scale, start
    own = panels.words[first // panels.width :][: header.shape[1] // panels.width].view(np.uint32)
    own = own.reshape(len(own), -1, panels.width)
    own[:, :HEADER] = header.view(np.uint32).reshape(HEADER, -1, panels.width).swapaxes(0, 1)
    end = HEADER + words.shape[1]
    _place(own[:, HEADER:end], words)
    if panels.form == "int8":
        eights = own[:, end:].reshape(len(own), -1, panels.width, 2).view(np.uint64)[..., 0]
        _place(eights, maxima.view(np.uint64))
    else:
        _place(own[:, end:], np.ascontiguousarray(maxima).view(np.uint32))


def _place(body: np.ndarray, words: np.ndarray) -> None:
    """Lay rows (n, words) side by side: `body` (panels, words, width); what is left is zero."""
    (count, number), width = words.shape, body.shape[2]
    whole = count // width
    body[:whole] = words[: whole * width].reshape(whole, width, number).swapaxes(1, 2)
    if whole < len(body):
        body[whole] = 0
        body[whole, :, : count - whole * width] = words[whole * width :].T


def _bytes_of(maxima: np.ndarray, frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    """Return columns of maxima as bytes (n, M) and half of what that took from each row (n,)."""
    step = float(frame.step)
    exact = maxima - frame.centers
    steps = np.clip(np.rint(exact / step), -_BYTE_STEPS, _BYTE_STEPS)
    drift = 0.5 * np.abs(exact - steps * step).sum(axis=1) * (1 + 1e-9)
    drift += 1e-15 * np.abs(maxima).sum(axis=1)
    return (steps + 128).astype(np.uint8), drift


_Packed = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Words (n, words) uint32, scales (n,) float32, starts (n,) int32, errors (n,) float64."""


def _unscaled(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales and starts where there are none."""
    return np.zeros(rows, np.float32), np.zeros(rows, np.int32)


def _pack_float32(columns: np.ndarray, side: str) -> _Packed:
    words = np.ascontiguousarray(columns).view(np.uint32)
    return words, *_unscaled(len(columns)), np.zeros(len(columns))


def pack_bfloat16(columns: np.ndarray, side: str) -> _Packed:
    """Round to nearest, ties to even; what the instructions take for zero becomes zero."""
    stored = np.clip(columns, -_GREATEST_BFLOAT16, _GREATEST_BFLOAT16).view(np.uint32)
    bits = ((stored + 0x7FFF + ((stored >> 16) & 1)) & 0xFFFF0000).astype(np.uint32)
    bits[np.abs(columns) < _SMALLEST_NORMAL] = 0
    error = row_norms(columns - bits.view(np.float32))
    halves = np.zeros((len(columns), -(-columns.shape[1] // 2) * 2), np.uint16)
    halves[:, : columns.shape[1]] = bits >> 16
    return halves.view(np.uint32), *_unscaled(len(columns)), error


def _pack_int8(columns: np.ndarray, side: str) -> _Packed:
    """Round to 127 steps of the row's greatest; left columns carry 128 more, starts take it off.

    Rows whose scale would be too great become zero: all of them is error.
    """
    scale = _greatest(columns) / np.float32(127)
    scale[scale > _GREATEST_SCALE] = 0
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        steps = columns * np.where(scale > 0, 1 / scale, np.float32(0))[:, None]
        if scale.min(initial=1) < 1e-30:  # its inverse may be infinite
            np.nan_to_num(steps, copy=False)
            np.clip(steps, -127, 127, out=steps)
    np.rint(steps, out=steps)
    integers = np.zeros((len(columns), -(-columns.shape[1] // 4) * 4), np.int8)
    integers[:, : columns.shape[1]] = steps
    steps *= scale[:, None]
    error = row_norms(np.subtract(columns, steps, out=steps))
    start = np.multiply(-128, integers.sum(axis=1, dtype=np.int32), dtype=np.int32)
    if side == "left":
        integers = (integers.view(np.uint8) ^ np.uint8(128)).view(np.int8)
    return integers.view(np.uint32), scale, start, error


def _greatest(rows: np.ndarray) -> np.ndarray:
    return np.maximum(rows.max(axis=1, initial=0), -rows.min(axis=1, initial=0))


def row_norms(rows: np.ndarray) -> np.ndarray:
    """Return upper bounds of the 2-norms (n,) float64 of rows (n, K) float32 or float64."""
    with np.errstate(over="ignore"):
        norms = np.sqrt(np.einsum("ij,ij->i", rows, rows).astype(np.float64))
    lost = (norms < 1e-15) | ~np.isfinite(norms)  # squares under- or overflowed
    if lost.any():
        norms[lost] = _greatest(rows[lost]).astype(np.float64) * np.sqrt(rows.shape[1])
    return norms * (1 + 1e-4 + rows.shape[1] * _UNIT_ROUNDOFF)


_PACKERS = {"float32": _pack_float32, "bfloat16": pack_bfloat16, "int8": _pack_int8}


def tile_bound(side: Panels, other: Panels, plan: Plan) -> np.ndarray:
    """Return (n,) float32: how far a raw score of a row's tiles can be from the pair kernel's.

    Both kernels sum the same numbers in float32 and differ from the exact sum by at most the
    number of roundings on the way to a result, times the unit roundoff, times the sum of the
    terms' sizes (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 4.2);
    the operand's columns and bias were rounded once or twice more. The bound is doubled for
    second-order terms. To it comes what the rounding of product columns moved, and what
    denormal numbers lose. It is infinite where a tile may overflow.
    """
    own, others = split_bound(side, other, plan)
    return np.nextafter(own + others.max(initial=0), np.float32(np.inf))


def split_bound(side: Panels, other: Panels, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Return (n,) and (n',) float32 whose sums bound the pairs of two sides as `tile_bound` does.

    What a row adds by itself stays with it, so that one row of large error does not blur all.
    """
    terms = sum(operand_counts(plan))
    roundings = (terms + 8) + (terms / LANES + 12)
    smallest = _SMALLEST_NORMAL if side.form == "bfloat16" else _SMALLEST
    if plan.precision == "int8":
        smallest *= 1 << 16  # what a scale of a pair loses counts for each step of a term
    unit = 2 * _UNIT_ROUNDOFF * roundings
    length, norm = other.length.max(initial=0), other.norm.max(initial=0)
    size = abs(plan.constant) + side.size + side.length * length
    own = unit * size + 4 * roundings * smallest
    own += (1 + unit) * (side.error * norm + side.drift)
    rounded = (side.norm + side.error).max(initial=0)
    others = unit * other.size + (1 + unit) * (rounded * other.error + other.drift)
    if plan.precision == "int8":  # columns, products with their scale, may have become denormal
        own += _SMALLEST * math.sqrt(terms) * (side.length + length)
    own[size > _GREATEST_SIZE] = others[other.size > _GREATEST_SIZE] = np.inf
    with np.errstate(over="ignore"):
        return tuple(  # type: ignore[return-value]
            np.nextafter(part.astype(np.float32), np.float32(np.inf)) for part in (own, others)
        )


def raise_biases(panels: Panels, bound: np.ndarray) -> None:
    """Add a bound (n,) to the biases of real rows, rounded up: tiles then tell upper bounds.

    Rows whose bound is infinite lose their columns, which might take that infinity off again.
    """
    words = panels.words.reshape(len(panels.words), -1, panels.width)
    biases = np.full(len(panels.words) * panels.width, -np.inf, np.float32)
    with np.errstate(over="ignore"):
        raised = words[:, 0].reshape(-1)[: len(bound)] + bound
    biases[: len(bound)] = np.nextafter(raised, np.float32(np.inf))
    words[:, 0] = biases.reshape(-1, panels.width)
    panel, place = np.divmod(np.flatnonzero(np.isposinf(biases)), panels.width)
    words[panel, 1:, place] = 0
