"""The contract that every backend keeps: the formula, the row, the names, the bits.

The formula
-----------
Training ends, and everything else begins, with a table: one folded row an entity. A row is a bias
``b`` and up to five segments of columns, each cut into a positive and a negative run; the plan
holds what is not per entity. With ``s`` the sign of a column's run::

    raw(i, j) = c + (b_i + b_j) + sum s p_i p_j                                  product
                                + sum s max(m_i, m_j)                            maximum
                                + sum s [max(u_i, v_j) + max(v_i, u_j)]          mirrored
                                + sum s |a_i - a_j|                              absolute
                                + sum s (e_i - e_j)^2                            squared
    score     = offset + slope * link(raw)          slope > 0, link increasing

``mirrored`` is the maximum of a row with the half-swap of another; it stores two numbers a column,
``u`` and ``v``. Left and right rows may come from one table or from two of the same layout.

The row (`RowLayout`)
---------------------
Segments lie in the order of `SEGMENTS`, each as its positive, then its negative run (mirrored:
u+, v+, u-, v-), every run padded with zeros to a multiple of 16 columns, so that a run is read in
whole vectors of 16 lanes. The bias and, in int8 tables with products, the scale follow the
segments: the columns then start on a cache line. Rows are padded to a multiple of 64 bytes.

Kernels receive tables as ``uint8`` arrays of shape (rows, row_bytes), C-contiguous, and never see
an index out of range: callers have checked. The pair kernel alone checks its list itself, on the
way, and stops. Callers allocate; kernels fill. NaN and infinities
are refused before a table is made. The zero vector has cosine 0 with everything.

The bits
--------
The pair kernel defines the float32 score. Sixteen lanes of float32 start at +0; column ``k`` of a
run goes to lane ``k mod 16``; runs follow each other in the order of the row::

    product     lane = fma(+-l, r, lane)
    maximum     lane = lane +- max(l, r)
    mirrored    lane = lane +- (max(u_l, v_r) + max(v_l, u_r))
    absolute    lane = lane +- |l - r|
    squared     lane = fma(+-(l - r), l - r, lane)

float16 and bfloat16 columns are widened exactly first. The lanes are added as a tree: lane q with
q + 8, then with q + 4, q + 2, q + 1. ``raw = (c + (b_i + b_j)) + sum``, in float32. In an int8
table, integer sums are exact and become float32 once each::

    raw = (c + (b_i + b_j)) + ((((P (s_i s_j) + M t_m) + V t_v) + A t_a) + E (t_e t_e))

with P, M, V, A, E the signed integer sums of the five segments, s the scale in the row, t the
scale of a segment in the plan. So the bits are the same on every CPU, for any block size, tile
size, thread count or order, and for (i, j) and (j, i).

Tiles (all pairs) compute the same raw score in another order, and where a CPU has the instructions
from columns rounded to bfloat16 or int8. They only find candidates: `operands.split_bound` says how
far they can be from the pair kernel. Top-k and threshold results carry pair kernel scores; ties go
to the lower index. Dense output carries the float32 tile's own values, the same bits for (i, j) and
(j, i); where a root would magnify a tile's error, the pair kernel's.

A `Network` in the plan takes the place of the sum over columns. A hidden unit starts at its bias
and is one chain of fused multiply-adds over its inputs in order; what ``output`` and ``direct``
weigh is multiplied, then added one after another, and c is added last. So here too a pair's bits
depend on nothing but its rows, and both forms of network are symmetric to the bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing

LANES = 16
"""Columns that are read together; every run is padded to a multiple of this."""

ROW_ALIGNMENT = 64
"""Bytes: a row's length is a multiple of this, and a table starts at a multiple of it."""

SEGMENTS = ("product", "maximum", "mirrored", "absolute", "squared")
"""The kinds of segment, in the order in which they lie in a row and are summed."""

PRECISIONS = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int8": "|i1"}
"""Precision of the stored columns -> NumPy type (bfloat16 is kept as its 16 bits)."""

LINKS = ("identity", "negative_root", "exponential", "negative_arcosh")
"""Links by code, with t = min(raw, 0) in all but the first.

identity: raw. negative_root: -sqrt(-t). exponential: exp(t). negative_arcosh: -arcosh(1 - t),
computed as -log1p(-t + sqrt(t (t - 2))). The last two are computed in float64 and rounded once, so
that their bits do not hang on a library of vector functions.
"""


def raw_floor(score: float, link: int, slope: float, offset: float) -> float:
    """Return a raw score that is not above any raw score whose score is at least `score`.

    Margins cover the rounding of the link, of slope and offset, and of the score itself to
    float32. `link` is the place in `LINKS`. Numba compiles this function too.
    """
    value = (score - offset) / slope
    if link == 0 and slope == 1.0 and offset == 0.0:
        return value
    value -= 1e-6 * (abs(value) + abs(offset / slope)) + 1e-44 * (1 + 1 / slope)
    if link == 0:
        return value
    if link == 1:
        return -(value * value) * (1 + 1e-6) if value < 0 else 0.0
    if link == 2:
        if value <= 0:
            return -math.inf
        return math.log(value) - 1e-6 if value < 1 else 0.0
    if value >= 0:
        return 0.0
    return -2 * math.sinh(-value / 2) ** 2 * (1 + 1e-6) if value > -80 else -math.inf


def aligned_empty(shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
    """Return an uninitialised C-contiguous array that starts on a `ROW_ALIGNMENT` boundary."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.empty(count + ROW_ALIGNMENT, dtype=np.uint8)
    start = -buffer.ctypes.data % ROW_ALIGNMENT
    return buffer[start : start + count].view(dtype).reshape(shape)


def _padded(columns: int) -> int:
    return -(-columns // LANES) * LANES


@dataclass(frozen=True)
class RowLayout:
    """How a folded row lies in memory.

    Parameters
    ----------
    columns : one (positive, negative) count a segment, in the order of `SEGMENTS`; for
        ``mirrored`` the count of (u, v) couples.
    bias : whether rows carry a bias.
    precision : a key of `PRECISIONS`.
    """

    columns: tuple[tuple[int, int], ...]
    bias: bool = False
    precision: str = "float32"

    @property
    def scale(self) -> bool:
        """Whether rows carry a scale: int8 tables with products."""
        return self.precision == "int8" and any(self.columns[0])

    @property
    def itemsize(self) -> int:
        """Bytes of one column."""
        return np.dtype(PRECISIONS[self.precision]).itemsize

    @property
    def runs(self) -> tuple[int, ...]:
        """Padded columns of the ten runs: positive and negative of each segment.

        A mirrored run counts its couples; it takes twice as many columns in the row.
        """
        return tuple(_padded(count) for pair in self.columns for count in pair)

    @property
    def segment_lengths(self) -> dict[str, int]:
        """Padded columns that each segment takes in a row, segments without columns left out."""
        lengths = {}
        for number, name in enumerate(SEGMENTS):
            length = sum(self.runs[2 * number : 2 * number + 2])
            if length:
                lengths[name] = 2 * length if name == "mirrored" else length
        return lengths

    @property
    def dtype(self) -> np.dtype:
        """The compound type of one row, as kept in the file and in memory."""
        element = np.dtype(PRECISIONS[self.precision])
        names: list[str] = []
        formats: list[object] = []
        offsets: list[int] = []
        position = 0
        for name, length in self.segment_lengths.items():
            names.append(name)
            formats.append((element, (length,)))
            offsets.append(position)
            position += length * element.itemsize
        for name in [n for n in ("bias", "scale") if getattr(self, n)]:
            names.append(name)
            formats.append(np.dtype("<f4"))
            offsets.append(position)
            position += 4
        itemsize = max(ROW_ALIGNMENT, -(-position // ROW_ALIGNMENT) * ROW_ALIGNMENT)
        return np.dtype(
            {"names": names, "formats": formats, "offsets": offsets, "itemsize": itemsize}
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize

    def kernel_arguments(self) -> tuple[int, ...]:
        """The layout as kernels take it: vectors in the ten runs, offsets of bias and scale.

        An offset of -1 stands for a field that rows do not have.
        """
        fields = dict(self.dtype.fields or {})
        offsets = [int(fields[n][1]) if n in fields else -1 for n in ("bias", "scale")]
        return (*(run // LANES for run in self.runs), *offsets)


NETWORK_FORMS = ("features", "orders")
"""What a network's first layer sees: see `Network`."""


@dataclass(frozen=True, eq=False)
class Network:
    """Layers that compare two rows where no sum over columns does.

    The rows' product columns are then not multiplied; they are what the network sees. With x and y
    those of a pair and net(f) = output . h + direct . f, h the last of the layers
    ``h = max(matrix h + bias, 0)`` that begin with h = f::

        features    raw = c + net([x y, |x - y|, x + y])
        orders      raw = c + (net([x, y]) + net([y, x])) / 2

    Parameters
    ----------
    form : a name of `NETWORK_FORMS`.
    layers : (matrix (h, f), bias (h,)) of each hidden layer, at least one.
    output : (h,).
    direct : (f,), or None for zeros.
    """

    form: str
    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    output: np.ndarray
    direct: np.ndarray | None = None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name."""
        arrays = {"output": self.output}
        if self.direct is not None:
            arrays["direct"] = self.direct
        for number, (matrix, bias) in enumerate(self.layers):
            arrays[f"matrix_{number}"], arrays[f"bias_{number}"] = matrix, bias
        return arrays

    @classmethod
    def from_arrays(cls, form: str, arrays: dict[str, np.ndarray]) -> Network:
        """Return the network of what `arrays` gave; shapes that do not fit are a ValueError."""
        count = sum(name.startswith("matrix_") for name in arrays)
        layers = tuple((arrays[f"matrix_{n}"], arrays[f"bias_{n}"]) for n in range(count))
        network = cls(form, layers, arrays["output"], arrays.get("direct"))
        widths = [matrix.shape[1] for matrix, _ in layers] + [len(network.output)]
        fits = all(
            matrix.shape == (after, before) and bias.shape == (after,)
            for (matrix, bias), before, after in zip(layers, widths, widths[1:], strict=False)
        )
        direct = network.direct is None or network.direct.shape == (widths[0],)
        if form not in NETWORK_FORMS or not count or not fits or not direct:
            raise ValueError(f"arrays {sorted(arrays)} are not those of a network of form {form!r}")
        return network

    @property
    def columns(self) -> int:
        """Product columns of a row that it sees."""
        return self.layers[0][0].shape[1] // (3 if self.form == "features" else 2)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Network) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[object, ...]:
        parts = sorted(self.arrays.items())
        return self.form, *((name, a.shape, a.dtype.str, a.tobytes()) for name, a in parts)


@dataclass(frozen=True)
class Plan:
    """What is not per entity: the layout, the constant, the link, the int8 segment scales.

    Parameters
    ----------
    layout : how rows lie in memory.
    constant : float, the c of the formula; rounded to float32 by the kernels.
    link : a name of `LINKS`.
    slope, offset : floats of ``score = offset + slope * link(raw)``; slope > 0.
    segment_scales : one float a segment, used by int8 tables only (product: unused).
    network : layers that take the place of the sum over columns, or None.
    """

    layout: RowLayout
    constant: float = 0.0
    link: str = "identity"
    slope: float = 1.0
    offset: float = 0.0
    segment_scales: tuple[float, ...] = field(default=(1.0,) * len(SEGMENTS))
    network: Network | None = None

    @property
    def precision(self) -> str:
        """Precision of the stored columns."""
        return self.layout.precision

    @property
    def link_code(self) -> int:
        """Number of the link, for kernels."""
        return LINKS.index(self.link)

    def kernel_constants(self) -> tuple[np.float32, ...]:
        """The plan's numbers as kernels take them: c, slope, offset, then the segment scales."""
        numbers = (self.constant, self.slope, self.offset, *self.segment_scales)
        return tuple(np.float32(number) for number in numbers)

    def with_scales(self, scales: tuple[float, ...]) -> Plan:
        """The same plan with other int8 segment scales."""
        return replace(self, segment_scales=scales)

    def raw_floor(self, score: float) -> float:
        """A raw score that is not above any raw score whose link is at least `score`.

        Scans use it to turn a threshold on scores into one on raw scores; what passes is checked
        again on the score itself.
        """
        return raw_floor(float(score), self.link_code, self.slope, self.offset)
