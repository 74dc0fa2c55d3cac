"""Heads: what turns two tower outputs into one number, its gradient, and its folded columns.

Every head is symmetric by construction. It computes in the type of its inputs: float32 in
training, float64 in a model and in gradient checks. ``fold`` says which columns of the formula in
`fastpair.kernels` an entity contributes, so that no kernel knows a head.
"""

# ruff: noqa: D102  (methods that a head overrides are described once, in Head and Columnwise)

from __future__ import annotations

import importlib
import os
import re
import sys
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from fastpair.errors import ArgumentError, FileError
from fastpair.kernels import Network
from fastpair.kernels.network import features
from fastpair.kernels.reference import apply_link, terms

Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Columns:
    """What a head contributes to one segment.

    Parameters
    ----------
    kind : a name of `fastpair.kernels.SEGMENTS`.
    values : (N, m) float64; for "mirrored" (N, 2, m).
    signs : (m,) int8, +1 or -1; depends on weights only, so every block of entities has the same.
    """

    kind: str
    values: np.ndarray
    signs: np.ndarray


@dataclass(frozen=True)
class Folded:
    """What a head or a model makes of a block of entities.

    Parameters
    ----------
    segments : columns in the order in which the branches gave them; a kind may occur repeatedly.
    bias : (N,) float64, only what is linear or per entity, or None.
    """

    segments: list[Columns]
    bias: np.ndarray | None = None


def unit_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Divide each row by its length; a row of zeros stays as it is.

    Parameters
    ----------
    rows : (N, n) float32 or float64.

    Returns
    -------
    unit : (N, n), the type of `rows`.
    inverse : (N, 1), one over the length, 0 for a row of zeros; a length below the smallest
        normal number counts as that number, for its inverse would overflow.
    """
    with np.errstate(over="ignore", under="ignore"):
        squares = np.einsum("ij,ij->i", rows, rows)[:, None]
    limits = np.finfo(rows.dtype)
    plain = (squares > limits.tiny / limits.eps**2) & (squares < limits.max)
    length = np.sqrt(np.where(plain, squares, 1))
    unit, inverse = rows / length, 1 / length
    if not plain.all():
        rest = np.flatnonzero(~plain)
        unit[rest], inverse[rest] = _unit_rows_of_any_size(rows[rest])
    return unit, inverse


def _unit_rows_of_any_size(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Do what `unit_rows` does, for rows whose squares overflow or vanish and for zeros."""
    # Dividing by the largest number first keeps squares from overflowing and from vanishing.
    peak = np.abs(rows).max(axis=1, keepdims=True, initial=0)
    scaled = rows / np.where(peak > 0, peak, 1)
    length = np.sqrt(np.einsum("ij,ij->i", scaled, scaled))[:, None]
    inverse = np.zeros_like(length)
    # The inverse of a length below the smallest normal number would overflow.
    true_length = np.maximum(length * peak, np.finfo(rows.dtype).tiny)
    np.divide(1, true_length, out=inverse, where=peak > 0)
    return scaled / np.where(length > 0, length, 1), inverse


def _check_setting(head: str, name: str, value: Any) -> None:
    """Refuse a value that an option of a built-in head cannot have."""
    if value is None:
        return
    sizes = value if isinstance(value, tuple) else (value,)
    whole = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
    if name == "rank" and (not whole or isinstance(value, tuple)):
        raise ArgumentError(f"rank is {value!r} in {head}, expected a whole number from 1 on")
    if name == "hidden" and not whole:
        raise ArgumentError(
            f"hidden of the head {head} is {value!r}, expected sizes such as 128x64"
        )
    if name == "gamma" and (isinstance(value, (tuple, str)) or not 0 < value <= 1e6):
        raise ArgumentError(f"gamma is {value!r} in {head}, expected a number above 0 up to 1e6")


class Head:
    """One way to compare two tower outputs z and z'; `HEADS` has them by name.

    A head of your own is a subclass in a module of yours, named as ``--head module:Class``. Scoring
    a table needs none of its code, training and folding do. A whole one::

        import numpy as np
        from fastpair.heads import Columns, Folded, Head

        class Chord(Head):
            formula = "weight sum_k |z_k - z'_k|"

            def initial(self, columns, rng):
                return {"weight": -np.ones(1)}

            def fits(self, weights, columns):
                return set(weights) == {"weight"} and weights["weight"].shape == (1,)

            def forward(self, left, right, weights):
                distance = np.abs(left - right).sum(axis=1)
                return weights["weight"] * distance, (np.sign(left - right), distance)

            def backward(self, upstream, cache, weights):
                sign, distance = cache
                d_left = (upstream * weights["weight"])[:, None] * sign
                return d_left, -d_left, {"weight": np.array([upstream @ distance])}

            def fold(self, z, weights):
                sign = np.full(z.shape[1], np.sign(weights["weight"][0]) or 1, np.int8)
                return Folded([Columns("absolute", z * np.abs(weights["weight"]), sign)])

    Parameters
    ----------
    settings : values for `options`, as ``bilinear(rank=32)`` gives them; they shape `initial`.

    Raises
    ------
    ArgumentError : an option that the head does not have.
    """

    name: ClassVar[str]
    link: ClassVar[str] = "identity"
    """A name of `fastpair.kernels.LINKS`; heads with another link than the identity stand alone."""
    kind: ClassVar[str] = "similarity"
    """What a score is before calibration: a "similarity", or minus a "distance"."""
    reflexive: ClassVar[str] = "no"
    """Whether nothing is more similar to x than x itself."""
    metric: ClassVar[str] = "no"
    """Which function of the score is a metric over tower outputs, if one is."""
    formula: ClassVar[str] = ""
    """The raw score in a line."""
    linear: ClassVar[tuple[str, ...] | None] = None
    """Weights that the raw score is proportional to when all of them change alike; None: all."""
    options: ClassVar[dict[str, Any]] = {}
    """Settings by name, with their defaults."""

    def __init__(self, **settings: Any) -> None:
        for name in settings:
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise ArgumentError(f"the head {self.name} has no option {name!r}, it has {known}")
            _check_setting(self.name, name, settings[name])
        self.settings = {**self.options, **settings}

    def initial(self, columns: int, rng: np.random.Generator) -> Weights:
        """Return the head's own weights at the start of training: the plain similarity.

        Parameters
        ----------
        columns : number of columns of a tower output.
        rng : source of chance, for heads that do not start at a fixed point.
        """
        raise NotImplementedError

    def fits(self, weights: Weights, columns: int | None) -> bool:
        """Whether `weights` have the names and shapes for this many columns (None: any number)."""
        raise NotImplementedError

    def forward(
        self, left: np.ndarray, right: np.ndarray, weights: Weights
    ) -> tuple[np.ndarray, Any]:
        """Compute the raw score (M,) of each row of `left` (M, k) with its row of `right` (M, k).

        The second thing returned is what `backward` wants to see again.
        """
        raise NotImplementedError

    def backward(
        self, upstream: np.ndarray, cache: Any, weights: Weights
    ) -> tuple[np.ndarray, np.ndarray, Weights]:
        """Turn the gradient by the raw score (M,) into those by left, right and weights.

        A weight that is given and not learned has none.
        """
        raise NotImplementedError

    def compiled(self, weights: Weights) -> Weights:
        """Return the weights as `fold` takes them: what is costly in them is computed once."""
        return weights

    def fold(self, z: np.ndarray, weights: Weights) -> Folded:
        """Fold the tower outputs (N, k) float64 and `compiled` weights into columns and a bias."""
        raise NotImplementedError

    def network(self, weights: Weights) -> Network | None:
        """Return the layers that take the place of a sum, for weights that do not fold; else None.

        The columns that such a head folds into are its tower outputs, as a product segment.
        """
        return None

    @property
    def stands_alone(self) -> bool:
        """Whether the head cannot be summed with others: it has a link or a network of its own."""
        return self.link != "identity"

    def scaled(self, weights: Weights, factor: float) -> Weights:
        """Return weights whose raw score is `factor` times that of `weights`."""
        linear = weights if self.linear is None else self.linear
        return {
            name: np.asarray(value * factor, value.dtype) if name in linear else value.copy()
            for name, value in weights.items()
        }


class Cosine(Head):
    """``scale * cos(z, z')``; the zero vector has cosine 0 with everything."""

    name = "cosine"
    reflexive = "if the scale is above 0"
    metric = "the angle"
    formula = "w cos(z, z')"

    def initial(self, columns: int, rng: np.random.Generator) -> Weights:
        return {"scale": np.ones(1)}

    def fits(self, weights: Weights, columns: int | None) -> bool:
        return set(weights) == {"scale"} and weights["scale"].shape == (1,)

    def forward(
        self, left: np.ndarray, right: np.ndarray, weights: Weights
    ) -> tuple[np.ndarray, Any]:
        unit_left, inverse_left = unit_rows(left)
        unit_right, inverse_right = unit_rows(right)
        cosine = np.einsum("ij,ij->i", unit_left, unit_right)
        cache = (unit_left, inverse_left, unit_right, inverse_right, cosine)
        return weights["scale"] * cosine, cache

    def backward(
        self, upstream: np.ndarray, cache: Any, weights: Weights
    ) -> tuple[np.ndarray, np.ndarray, Weights]:
        unit_left, inverse_left, unit_right, inverse_right, cosine = cache
        slope = (upstream * weights["scale"])[:, None]
        column = cosine[:, None]
        d_left = slope * inverse_left * (unit_right - column * unit_left)
        d_right = slope * inverse_right * (unit_left - column * unit_right)
        return d_left, d_right, {"scale": np.array([upstream @ cosine])}

    def fold(self, z: np.ndarray, weights: Weights) -> Folded:
        unit, _ = unit_rows(z)
        return _columns("product", unit, np.broadcast_to(weights["scale"], z.shape[1]), power=0.5)


class Columnwise(Head):
    """``sum_k weight_k f(z_k, z'_k)``: a column alone decides its own term.

    The one weight array is (k,), or (1,) for the same weight in every column.
    """

    segment: ClassVar[str]
    power: ClassVar[float]  # f(t z, t z') = t ** (1 / power) f(z, z') for t >= 0
    start: ClassVar[float]  # +1 for similarities, -1 for dissimilarities

    def initial(self, columns: int, rng: np.random.Generator) -> Weights:
        return {"weight": np.full(columns, self.start)}

    def fits(self, weights: Weights, columns: int | None) -> bool:
        return set(weights) == {"weight"} and weights["weight"].shape in {(1,), (columns,)}

    def terms(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return f(z_k, z'_k) for each pair and column, (M, k)."""
        raise NotImplementedError

    def slopes(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the derivatives of f by its first and by its second argument, each (M, k)."""
        raise NotImplementedError

    def forward(
        self, left: np.ndarray, right: np.ndarray, weights: Weights
    ) -> tuple[np.ndarray, Any]:
        terms = self.terms(left, right)
        weight = np.broadcast_to(weights["weight"], left.shape[1])
        return terms @ weight, (left, right, terms)

    def backward(
        self, upstream: np.ndarray, cache: Any, weights: Weights
    ) -> tuple[np.ndarray, np.ndarray, Weights]:
        left, right, terms = cache
        by_left, by_right = self.slopes(left, right)
        outer = upstream[:, None] * weights["weight"]
        by_weight = upstream @ terms
        if weights["weight"].shape != by_weight.shape:
            by_weight = by_weight.sum(keepdims=True)
        return outer * by_left, outer * by_right, {"weight": by_weight}

    def fold(self, z: np.ndarray, weights: Weights) -> Folded:
        weight = np.broadcast_to(weights["weight"], z.shape[1])
        return _columns(self.segment, z, weight, self.power)


def _columns(kind: str, z: np.ndarray, weight: np.ndarray, power: float) -> Folded:
    """Fold abs(weight) into the columns, its sign into `signs`; drop columns of weight 0."""
    keep = np.flatnonzero(weight)
    if not len(keep):
        return Folded([])
    values = z[:, keep] * np.abs(weight[keep]) ** power
    return Folded([Columns(kind, values, np.where(weight[keep] < 0, -1, 1).astype(np.int8))])


class Product(Columnwise):
    """``sum_k weight_k z_k z'_k``."""

    name, segment, power, start = "product", "product", 0.5, 1.0
    formula = "sum_k w_k z_k z'_k"

    def terms(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return left * right

    def slopes(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return right, left


class Dot(Product):
    """``weight <z, z'>``: the product with one weight for all columns."""

    name = "dot"
    formula = "w <z, z'>"

    def initial(self, columns: int, rng: np.random.Generator) -> Weights:
        return {"weight": np.ones(1)}


class AbsoluteDifference(Columnwise):
    """``sum_k weight_k |z_k - z'_k|``."""

    name, segment, power, start = "absdiff", "absolute", 1.0, -1.0
    kind = "distance"
    reflexive = "if no weight is above 0"
    metric = "minus the score, if no weight is above 0"
    formula = "sum_k w_k |z_k - z'_k|"

    def terms(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.abs(left - right)

    def slopes(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sign = np.sign(left - right)
        return sign, -sign


class SquaredDifference(Columnwise):
    """``sum_k weight_k (z_k - z'_k)^2``."""

    name, segment, power, start = "sqdiff", "squared", 0.5, -1.0
    kind = "distance"
    reflexive = "if no weight is above 0"
    metric = "the root of minus the score (Mahalanobis), if no weight is above 0"
    formula = "sum_k w_k (z_k - z'_k)^2"

    def terms(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return (left - right) ** 2

    def slopes(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        difference = 2 * (left - right)
        return difference, -difference


class Maximum(Columnwise):
    """``sum_k weight_k max(z_k, z'_k)``."""

    name, segment, power, start = "max", "maximum", 1.0, 1.0
    formula = "sum_k w_k max(z_k, z'_k)"

    def terms(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.maximum(left, right)

    def slopes(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Equal columns share the slope, which keeps the gradient symmetric too.
        share = (0.5 + 0.5 * np.sign(left - right)).astype(left.dtype)
        return share, 1 - share


class Minimum(Maximum):
    """``sum_k weight_k min(z_k, z'_k)``, folded as ``-max(-z, -z')``."""

    name = "min"
    formula = "sum_k w_k min(z_k, z'_k)"

    def terms(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.minimum(left, right)

    def slopes(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        share, rest = super().slopes(left, right)
        return rest, share

    def fold(self, z: np.ndarray, weights: Weights) -> Folded:
        return super().fold(-z, {"weight": -weights["weight"]})


class Sum(Columnwise):
    """``sum_k weight_k (z_k + z'_k)``: each entity's own part, folded into its bias."""

    name, start = "sum", 1.0
    formula = "sum_k w_k (z_k + z'_k)"

    def terms(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return left + right

    def slopes(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ones = np.ones_like(left)
        return ones, ones

    def fold(self, z: np.ndarray, weights: Weights) -> Folded:
        return Folded([], z @ np.broadcast_to(weights["weight"], z.shape[1]))


class MeanInteraction(Columnwise):
    """``sum_k weight_k 0.5 (z_k z'_k + z_k + z'_k)``: mean and product of the two."""

    name, start = "mean-interaction", 1.0
    formula = "sum_k w_k (z_k z'_k + z_k + z'_k) / 2"

    def terms(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return (left * right + (left + right)) / 2

    def slopes(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (right + 1) / 2, (left + 1) / 2

    def fold(self, z: np.ndarray, weights: Weights) -> Folded:
        weight = np.broadcast_to(weights["weight"] / 2, z.shape[1])
        return Folded(_columns("product", z, weight, 0.5).segments, z @ weight)


# --- quadratic forms ------------------------------------------------------------------------------

SMALLEST_EIGENVALUE = 2.0**-24
"""Relative to the greatest: what is below cannot be seen in float32 sums."""


def _eigencolumns(matrix: np.ndarray) -> Weights:
    """Return a symmetrised matrix M as ``columns`` (k, r) and ``signs`` (r,).

    ``z @ columns`` times itself, with these signs, is ``z' M z``.
    """
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    size = np.abs(values)
    keep = size > SMALLEST_EIGENVALUE * size.max(initial=0)
    return {"columns": vectors[:, keep] * np.sqrt(size[keep]), "signs": np.sign(values[keep])}


def _product_of(z: np.ndarray, weights: Weights) -> list[Columns]:
    """Return the product segment of columns that `_eigencolumns` made."""
    if not len(weights["signs"]):
        return []
    return [Columns("product", z @ weights["columns"], weights["signs"].astype(np.int8))]


def _form(left: np.ndarray, right: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return np.einsum("ij,ij->i", left @ matrix, right)


class Bilinear(Head):
    """``z' M z'`` with M symmetrised: weights on the whole outer product of z and z'.

    M is a (k, k) ``matrix``, or with the option `rank` the low-rank
    ``factor.T diag(weight) factor``, factor (r, k).
    """

    name = "bilinear"
    formula = "z^T (M + M^T)/2 z', M full or of low rank"
    linear = ("matrix", "weight")
    options: ClassVar[dict[str, Any]] = {"rank": None}

    def initial(self, columns: int, rng: np.random.Generator) -> Weights:
        rank = self.settings["rank"]
        if rank is None:
            return {"matrix": np.eye(columns)}
        if not 1 <= rank <= columns:
            raise ArgumentError(f"rank is {rank}, expected 1 to {columns}, the tower's columns")
        noise = rng.normal(size=(rank, columns)) * 0.1 / columns**0.5
        return {"factor": np.eye(rank, columns) + noise, "weight": np.ones(rank)}

    def fits(self, weights: Weights, columns: int | None) -> bool:
        if set(weights) == {"matrix"}:
            return weights["matrix"].shape == (columns, columns)
        if set(weights) != {"factor", "weight"} or weights["weight"].ndim != 1:
            return False
        return weights["factor"].shape == (len(weights["weight"]), columns)

    def forward(
        self, left: np.ndarray, right: np.ndarray, weights: Weights
    ) -> tuple[np.ndarray, Any]:
        if "matrix" in weights:
            matrix = weights["matrix"]
            raw = (_form(left, right, matrix) + _form(right, left, matrix)) / 2
            return raw, (left, right)
        first, second = left @ weights["factor"].T, right @ weights["factor"].T
        return (first * second) @ weights["weight"], (left, right, first, second)

    def backward(
        self, upstream: np.ndarray, cache: Any, weights: Weights
    ) -> tuple[np.ndarray, np.ndarray, Weights]:
        left, right = cache[:2]
        column = upstream[:, None]
        if "matrix" in weights:
            symmetric = (weights["matrix"] + weights["matrix"].T) / 2
            outer = (column * left).T @ right
            d_left, d_right = column * (right @ symmetric), column * (left @ symmetric)
            return d_left, d_right, {"matrix": (outer + outer.T) / 2}
        first, second = cache[2:]
        d_first = column * second * weights["weight"]
        d_second = column * first * weights["weight"]
        factor = weights["factor"]
        gradients = {
            "factor": d_first.T @ left + d_second.T @ right,
            "weight": upstream @ (first * second),
        }
        return d_first @ factor, d_second @ factor, gradients

    def compiled(self, weights: Weights) -> Weights:
        if "matrix" in weights:
            return _eigencolumns(weights["matrix"])
        weight = weights["weight"]
        columns = weights["factor"].T * np.sqrt(np.abs(weight))
        return {"columns": columns[:, weight != 0], "signs": np.sign(weight[weight != 0])}

    def fold(self, z: np.ndarray, weights: Weights) -> Folded:
        return Folded(_product_of(z, weights))


class Plda(Head):
    """``z'Lz + z''Lz' + z'Gz' + c'(z + z')``: the symmetric quadratic form of PLDA.

    The constant of the usual form is the model's. ``own`` is L, ``cross`` G, ``linear`` c.
    """

    name = "plda"
    formula = "z^T L z + z'^T L z' + z^T (G + G^T)/2 z' + c^T (z + z')"

    def initial(self, columns: int, rng: np.random.Generator) -> Weights:
        own = np.zeros((columns, columns))
        return {"own": own, "cross": np.eye(columns), "linear": np.zeros(columns)}

    def fits(self, weights: Weights, columns: int | None) -> bool:
        shapes = {name: value.shape for name, value in weights.items()}
        square = (columns, columns)
        return shapes == {"own": square, "cross": square, "linear": (columns,)}

    def forward(
        self, left: np.ndarray, right: np.ndarray, weights: Weights
    ) -> tuple[np.ndarray, Any]:
        own, cross = weights["own"], weights["cross"]
        raw = _form(left, left, own) + _form(right, right, own)
        raw += (_form(left, right, cross) + _form(right, left, cross)) / 2
        return raw + (left + right) @ weights["linear"], (left, right)

    def backward(
        self, upstream: np.ndarray, cache: Any, weights: Weights
    ) -> tuple[np.ndarray, np.ndarray, Weights]:
        left, right = cache
        column = upstream[:, None]
        own = weights["own"] + weights["own"].T
        cross = (weights["cross"] + weights["cross"].T) / 2
        outer = (column * left).T @ right
        gradients = {
            "own": (column * left).T @ left + (column * right).T @ right,
            "cross": (outer + outer.T) / 2,
            "linear": upstream @ (left + right),
        }
        d_left = column * (left @ own + right @ cross + weights["linear"])
        d_right = column * (right @ own + left @ cross + weights["linear"])
        return d_left, d_right, gradients

    def compiled(self, weights: Weights) -> Weights:
        return {**weights, **_eigencolumns(weights["cross"])}

    def fold(self, z: np.ndarray, weights: Weights) -> Folded:
        bias = _form(z, z, weights["own"]) + z @ weights["linear"]
        return Folded(_product_of(z, weights), bias)


class Mahalanobis(Head):
    """``-w |z - z'|^2`` with w above 0: over a linear tower Q the Mahalanobis matrix is w Q^T Q.

    Nothing is added to it, no other head and no density, so that the root of what it takes from
    the constant is a metric over tower outputs whatever was learned.
    """

    name, kind = "mahalanobis", "distance"
    reflexive = "always"
    metric = "the root of what is missing to the score of a thing with itself"
    formula = "-w |z - z'|^2, w above 0"

    @property
    def stands_alone(self) -> bool:
        return True

    def initial(self, columns: int, rng: np.random.Generator) -> Weights:
        return {"log_weight": np.zeros(1)}

    def fits(self, weights: Weights, columns: int | None) -> bool:
        return set(weights) == {"log_weight"} and _one_number(weights)

    def forward(
        self, left: np.ndarray, right: np.ndarray, weights: Weights
    ) -> tuple[np.ndarray, Any]:
        apart = left - right
        raw = -np.exp(weights["log_weight"]) * np.einsum("ij,ij->i", apart, apart)
        return raw, (apart, raw)

    def backward(
        self, upstream: np.ndarray, cache: Any, weights: Weights
    ) -> tuple[np.ndarray, np.ndarray, Weights]:
        apart, raw = cache
        d_left = (-2 * np.exp(weights["log_weight"]) * upstream)[:, None] * apart
        return d_left, -d_left, {"log_weight": np.array([upstream @ raw])}

    def fold(self, z: np.ndarray, weights: Weights) -> Folded:
        weight = np.broadcast_to(-np.exp(weights["log_weight"]), z.shape[1])
        return _columns("squared", z, weight, power=0.5)

    def scaled(self, weights: Weights, factor: float) -> Weights:
        _above_0(self.name, factor)
        weight = weights["log_weight"]
        return {"log_weight": weight + weight.dtype.type(np.log(factor))}


# --- distances with a link ------------------------------------------------------------------------


def link_slope(raw: np.ndarray, link: str) -> tuple[np.ndarray, np.ndarray]:
    """Return link(raw) and its derivative by raw, both (M,) in the type of `raw`.

    Parameters
    ----------
    raw : (M,) float.
    link : a name of `fastpair.kernels.LINKS`. Those with a pole at 0 are taken a little below it.
    """
    value = apply_link(raw, link)
    if link == "identity":
        return value, np.ones_like(raw)
    below = np.minimum(raw, 0)
    if link == "exponential":
        return value, value * (raw <= 0)
    apart = np.maximum(-below, raw.dtype.type(1e-6))
    if link == "negative_root":
        return value, 0.5 / np.sqrt(apart)
    return value, 1 / np.sqrt(apart * (apart + 2))


class Rbf(Head):
    """``exp(-gamma |z - z'|^2)``; gamma is learned, or given with the option `gamma`."""

    name, link = "rbf", "exponential"
    reflexive = "always"
    metric = "the root of -log(score); 1 - score is the dissimilarity"
    formula = "exp(-gamma |z - z'|^2), gamma learned or given"
    options: ClassVar[dict[str, Any]] = {"gamma": None}

    def initial(self, columns: int, rng: np.random.Generator) -> Weights:
        gamma = self.settings["gamma"]
        if gamma is None:
            return {"log_gamma": np.zeros(1)}
        if not gamma > 0:
            raise ArgumentError(f"gamma is {gamma}, expected a number above 0")
        return {"gamma": np.full(1, float(gamma))}

    def fits(self, weights: Weights, columns: int | None) -> bool:
        if set(weights) == {"gamma"} and not (weights["gamma"] > 0).all():
            return False
        return set(weights) in ({"gamma"}, {"log_gamma"}) and _one_number(weights)

    def forward(
        self, left: np.ndarray, right: np.ndarray, weights: Weights
    ) -> tuple[np.ndarray, Any]:
        apart = left - right
        raw = -_gamma(weights) * np.einsum("ij,ij->i", apart, apart)
        return raw, (apart, raw)

    def backward(
        self, upstream: np.ndarray, cache: Any, weights: Weights
    ) -> tuple[np.ndarray, np.ndarray, Weights]:
        apart, raw = cache
        d_left = (-2 * _gamma(weights) * upstream)[:, None] * apart
        learned = {"log_gamma": np.array([upstream @ raw])} if "log_gamma" in weights else {}
        return d_left, -d_left, learned

    def fold(self, z: np.ndarray, weights: Weights) -> Folded:
        return _columns("squared", z, np.broadcast_to(-_gamma(weights), z.shape[1]), power=0.5)

    def scaled(self, weights: Weights, factor: float) -> Weights:
        _above_0(self.name, factor)
        if "gamma" in weights:
            return super().scaled(weights, factor)
        return {"log_gamma": weights["log_gamma"] + weights["log_gamma"].dtype.type(np.log(factor))}


def _gamma(weights: Weights) -> np.ndarray:
    return weights["gamma"] if "gamma" in weights else np.exp(weights["log_gamma"])


def _one_number(weights: Weights) -> bool:
    return all(value.shape == (1,) for value in weights.values())


def _above_0(name: str, factor: float) -> None:
    if not factor > 0:
        raise ArgumentError(f"the head {name} cannot be scaled by {factor}, only by more than 0")


class Hyperbolic(Head):
    """Minus the distance of ``scale z`` and ``scale z'`` lifted onto the Lorentz hyperboloid.

    With x = scale z and x_0 = sqrt(1 + x.x), the raw score is minus
    ``v = (|x - x'|^2 - (x_0 - x'_0)^2) / 2``, which is the cosh of the distance, less 1, but
    subtracts nothing of its size; the link turns it into minus the distance.
    """

    name, link, kind = "hyperbolic", "negative_arcosh", "distance"
    reflexive = "always"
    metric = "minus the score"
    formula = "-arcosh(1 + v), v = (|x - x'|^2 - (x_0 - x'_0)^2) / 2, x_0 = sqrt(1 + x.x)"

    def initial(self, columns: int, rng: np.random.Generator) -> Weights:
        return {"log_scale": np.zeros(1)}

    def fits(self, weights: Weights, columns: int | None) -> bool:
        return set(weights) == {"log_scale"} and _one_number(weights)

    def forward(
        self, left: np.ndarray, right: np.ndarray, weights: Weights
    ) -> tuple[np.ndarray, Any]:
        scale = np.exp(weights["log_scale"])
        x, y = scale * left, scale * right
        apart = x - y
        time_x, time_y = _time(x), _time(y)
        lag = time_x - time_y
        v = (np.einsum("ij,ij->i", apart, apart) - lag * lag) / 2
        return -np.maximum(v, 0), (x, y, time_x, time_y, scale, v > 0)

    def backward(
        self, upstream: np.ndarray, cache: Any, weights: Weights
    ) -> tuple[np.ndarray, np.ndarray, Weights]:
        x, y, time_x, time_y, scale, inside = cache
        slope = np.where(inside, -upstream, 0)[:, None].astype(x.dtype)
        apart, lag = x - y, (time_x - time_y)[:, None]
        d_x = slope * (apart - lag * x / time_x[:, None])
        d_y = -slope * (apart - lag * y / time_y[:, None])
        by_scale = np.einsum("ij,ij->", d_x, x) + np.einsum("ij,ij->", d_y, y)
        return scale * d_x, scale * d_y, {"log_scale": np.array([by_scale])}

    def fold(self, z: np.ndarray, weights: Weights) -> Folded:
        x = np.exp(weights["log_scale"]) * z
        values = np.concatenate([x, _time(x)[:, None]], axis=1) / 2**0.5
        signs = np.full(values.shape[1], -1, np.int8)
        signs[-1] = 1
        return Folded([Columns("squared", values, signs)])

    def scaled(self, weights: Weights, factor: float) -> Weights:
        """Refuse all factors but 1: no weight of this head multiplies its raw score."""
        if factor != 1:
            raise ArgumentError("the head hyperbolic cannot be scaled: give the model a slope")
        return {name: value.copy() for name, value in weights.items()}


def _time(x: np.ndarray) -> np.ndarray:
    return np.sqrt(1 + np.einsum("ij,ij->i", x, x))


# --- networks -------------------------------------------------------------------------------------

NOISE = 0.05
"""Size of what makes hidden units differ at the start, relative to the usual random start."""


def _relu_layers(inputs: np.ndarray, weights: Weights) -> list[np.ndarray]:
    """Return the inputs (M, f) and what each hidden layer makes of them; the layers' own order."""
    values = [inputs]
    for number in range(_depth(weights)):
        matrix, bias = weights[f"matrix_{number}"], weights[f"bias_{number}"]
        values.append(np.maximum(values[-1] @ matrix.T + bias, 0))
    return values


def _relu_gradients(
    d_last: np.ndarray, values: list[np.ndarray], weights: Weights
) -> tuple[np.ndarray, Weights]:
    """Turn the gradient by the last hidden layer into those by the inputs and by the layers."""
    gradients: Weights = {}
    slope = d_last
    for number in range(len(values) - 2, -1, -1):
        slope = slope * (values[number + 1] > 0)
        gradients[f"matrix_{number}"] = slope.T @ values[number]
        gradients[f"bias_{number}"] = slope.sum(axis=0)
        slope = slope @ weights[f"matrix_{number}"]
    return slope, gradients


def _depth(weights: Weights) -> int:
    return sum(name.startswith("matrix_") for name in weights)


def _layers_fit(weights: Weights, inputs: int | None, others: set[str]) -> bool:
    """Whether there are `others` and hidden layers that fit each other, inputs and output."""
    names = {f"{part}_{n}" for part in ("matrix", "bias") for n in range(_depth(weights))}
    if set(weights) != names | {"output"} | others or not names or inputs is None:
        return False
    for number in range(_depth(weights)):
        matrix, bias = weights[f"matrix_{number}"], weights[f"bias_{number}"]
        if matrix.ndim != 2 or matrix.shape[1] != inputs or bias.shape != (len(matrix),):
            return False
        inputs = len(matrix)
    return inputs > 0 and weights["output"].shape == (inputs,)


def _hidden(settings: dict[str, Any], default: int) -> tuple[int, ...]:
    """Return the widths of the hidden layers, from the option `hidden`."""
    hidden = default if settings["hidden"] is None else settings["hidden"]
    widths = hidden if isinstance(hidden, tuple) else (hidden,)
    if not all(isinstance(width, int) and width > 0 for width in widths):
        raise ArgumentError(f"hidden is {hidden}, expected widths such as 64 or 128x32")
    return widths


def _network_of(form: str, weights: Weights, direct: np.ndarray | None) -> Network:
    layers = [(weights[f"matrix_{n}"], weights[f"bias_{n}"]) for n in range(_depth(weights))]
    return Network(form, tuple(layers), weights["output"], direct)


def _as_features(z: np.ndarray) -> Folded:
    return Folded([Columns("product", z, np.ones(z.shape[1], np.int8))])


def _fold_mirrored(
    z: np.ndarray, first: np.ndarray, second: np.ndarray, bias: np.ndarray, weight: np.ndarray
) -> Folded:
    """Fold ``sum_h weight_h [relu(A x + B y + b) + relu(B x + A y + b)]``, A first, B second.

    relu(s + t) = max(s, -t) + t with s = A x + b and t = B y: the maximum goes into the segment
    "mirrored" as [s, -t], what is left over into the bias.
    """
    s, t = z @ first.T + bias, z @ second.T
    keep = np.flatnonzero(weight)
    values = np.stack([s, -t], axis=1)[:, :, keep] * np.abs(weight[keep])
    signs = np.where(weight[keep] < 0, -1, 1).astype(np.int8)
    return Folded([Columns("mirrored", values, signs)] if len(keep) else [], t @ weight)


class Mirrored(Head):
    """``sum_h w_h [relu(A z + B z' + b) + relu(B z + A z' + b)]``, mirrored weights.

    It starts as minus the absolute difference, one hidden unit a column; more units, where the
    option `hidden` asks for them, start at random.
    """

    name = "mirrored"
    formula = "sum_h w_h [relu(A z + B z' + b)_h + relu(B z + A z' + b)_h]"
    linear = ("output",)
    options: ClassVar[dict[str, Any]] = {"hidden": None}

    def initial(self, columns: int, rng: np.random.Generator) -> Weights:
        (hidden, *more) = _hidden(self.settings, columns)
        if more:
            raise ArgumentError("the head mirrored has one hidden layer: use concat for more")
        noise = rng.normal(size=(2, hidden, columns)) / columns**0.5
        noise[:, :columns] *= NOISE
        difference = np.eye(hidden, columns)
        output = np.where(np.arange(hidden) < columns, -1.0, 0.1 / hidden**0.5)
        first, second = difference + noise[0], -difference + noise[1]
        return {"first": first, "second": second, "bias": np.zeros(hidden), "output": output}

    def fits(self, weights: Weights, columns: int | None) -> bool:
        if set(weights) != {"first", "second", "bias", "output"} or weights["bias"].ndim != 1:
            return False
        hidden = len(weights["bias"])
        return weights["output"].shape == (hidden,) and all(
            weights[name].shape == (hidden, columns) for name in ("first", "second")
        )

    def forward(
        self, left: np.ndarray, right: np.ndarray, weights: Weights
    ) -> tuple[np.ndarray, Any]:
        first, second, bias = weights["first"].T, weights["second"].T, weights["bias"]
        one = np.maximum((left @ first + right @ second) + bias, 0)
        other = np.maximum((right @ first + left @ second) + bias, 0)
        return (one + other) @ weights["output"], (left, right, one, other)

    def backward(
        self, upstream: np.ndarray, cache: Any, weights: Weights
    ) -> tuple[np.ndarray, np.ndarray, Weights]:
        left, right, one, other = cache
        outer = upstream[:, None] * weights["output"]
        d_one, d_other = outer * (one > 0), outer * (other > 0)
        first, second = weights["first"], weights["second"]
        gradients = {
            "first": d_one.T @ left + d_other.T @ right,
            "second": d_one.T @ right + d_other.T @ left,
            "bias": d_one.sum(axis=0) + d_other.sum(axis=0),
            "output": upstream @ (one + other),
        }
        d_left = d_one @ first + d_other @ second
        return d_left, d_one @ second + d_other @ first, gradients

    def fold(self, z: np.ndarray, weights: Weights) -> Folded:
        parts = (weights[name] for name in ("first", "second", "bias", "output"))
        return _fold_mirrored(z, *parts)


class Concat(Head):
    """The mean over both orders of an ordinary network on [z, z'], with ReLU layers.

    With one hidden layer it folds, as `Mirrored` does. It starts as minus the absolute difference
    in either order, where the option `hidden` leaves room for two units a column.
    """

    name = "concat"
    formula = "[net(z, z') + net(z', z)] / 2, net a ReLU network on the concatenation"
    linear = ("output",)
    options: ClassVar[dict[str, Any]] = {"hidden": None}

    @property
    def stands_alone(self) -> bool:
        return isinstance(self.settings["hidden"], tuple) and len(self.settings["hidden"]) > 1

    def initial(self, columns: int, rng: np.random.Generator) -> Weights:
        widths = (2 * columns, *_hidden(self.settings, 2 * columns))
        weights: Weights = {}
        for number, (before, after) in enumerate(pairwise(widths)):
            matrix = np.eye(after, before)  # passes what is above 0 on, as it is
            if number == 0:
                apart = np.concatenate([np.eye(columns), -np.eye(columns)], axis=1)
                both = np.concatenate([apart, -apart])[:after]
                matrix = np.pad(both, ((0, after - len(both)), (0, 0)))
            noise = rng.normal(size=(after, before)) * (2 / before) ** 0.5
            noise[: min(after, before)] *= NOISE
            weights[f"matrix_{number}"] = matrix + noise
            weights[f"bias_{number}"] = np.zeros(after)
        known = np.arange(widths[-1]) < 2 * columns
        return {**weights, "output": np.where(known, -1.0, 0.1 / widths[-1] ** 0.5)}

    def fits(self, weights: Weights, columns: int | None) -> bool:
        return _layers_fit(weights, None if columns is None else 2 * columns, set())

    def orders(
        self, left: np.ndarray, right: np.ndarray, weights: Weights
    ) -> tuple[np.ndarray, np.ndarray, Any]:
        """Compute net(z, z') and net(z', z), (M,) each, and what `backward_orders` needs."""
        both = [
            _relu_layers(np.concatenate(pair, axis=1), weights)
            for pair in ((left, right), (right, left))
        ]
        return *self.scores_of_orders(both, weights), both

    def scores_of_orders(self, cache: Any, weights: Weights) -> tuple[np.ndarray, np.ndarray]:
        """Return net(z, z') and net(z', z), (M,) each, from what `forward` has computed."""
        one, other = (values[-1] @ weights["output"] for values in cache)
        return one, other

    def backward_orders(
        self, d_one: np.ndarray, d_other: np.ndarray, cache: Any, weights: Weights
    ) -> tuple[np.ndarray, np.ndarray, Weights]:
        """Turn gradients by the scores of both orders into those by left, right and weights."""
        sums: Weights = {}
        inputs = []
        for upstream, values in zip((d_one, d_other), cache, strict=True):
            d_last = upstream[:, None] * weights["output"]
            d_inputs, gradients = _relu_gradients(d_last, values, weights)
            gradients["output"] = upstream @ values[-1]
            inputs.append(np.split(d_inputs, 2, axis=1))
            sums = {name: sums.get(name, 0) + gradients[name] for name in gradients}
        (one_left, one_right), (other_right, other_left) = inputs
        return one_left + other_left, one_right + other_right, sums

    def forward(
        self, left: np.ndarray, right: np.ndarray, weights: Weights
    ) -> tuple[np.ndarray, Any]:
        one, other, cache = self.orders(left, right, weights)
        return (one + other) / 2, cache

    def backward(
        self, upstream: np.ndarray, cache: Any, weights: Weights
    ) -> tuple[np.ndarray, np.ndarray, Weights]:
        return self.backward_orders(upstream / 2, upstream / 2, cache, weights)

    def fold(self, z: np.ndarray, weights: Weights) -> Folded:
        if _depth(weights) > 1:
            return _as_features(z)
        first, second = np.split(weights["matrix_0"], 2, axis=1)
        return _fold_mirrored(z, first, second, weights["bias_0"], weights["output"] / 2)

    def network(self, weights: Weights) -> Network | None:
        return _network_of("orders", weights, None) if _depth(weights) > 1 else None


class PairNetwork(Head):
    """ReLU layers over [z z', |z - z'|, z + z'], beside a weighted sum of these features.

    The one form that does not fold: its table holds z, and pairs are gathered and multiplied. It
    starts as the product.
    """

    name = "mlp"
    formula = "net(f) + d^T f, f = [z z', |z - z'|, z + z'], net a ReLU network"
    linear = ("output", "direct")
    options: ClassVar[dict[str, Any]] = {"hidden": None}

    @property
    def stands_alone(self) -> bool:
        return True

    def initial(self, columns: int, rng: np.random.Generator) -> Weights:
        widths = (3 * columns, *_hidden(self.settings, 128))
        weights: Weights = {"direct": np.repeat([1.0, 0.0, 0.0], columns)}
        for number, (before, after) in enumerate(pairwise(widths)):
            weights[f"matrix_{number}"] = rng.normal(size=(after, before)) * (2 / before) ** 0.5
            weights[f"bias_{number}"] = np.zeros(after)
        return {**weights, "output": rng.normal(size=widths[-1]) * 0.1 / widths[-1] ** 0.5}

    def fits(self, weights: Weights, columns: int | None) -> bool:
        inputs = None if columns is None else 3 * columns
        if not _layers_fit(weights, inputs, {"direct"}):
            return False
        return weights["direct"].shape == (inputs,)

    def forward(
        self, left: np.ndarray, right: np.ndarray, weights: Weights
    ) -> tuple[np.ndarray, Any]:
        (inputs,) = features(left, right, "features")
        values = _relu_layers(inputs, weights)
        raw = values[-1] @ weights["output"] + inputs @ weights["direct"]
        return raw, (left, right, values)

    def backward(
        self, upstream: np.ndarray, cache: Any, weights: Weights
    ) -> tuple[np.ndarray, np.ndarray, Weights]:
        left, right, values = cache
        column = upstream[:, None]
        d_inputs, gradients = _relu_gradients(column * weights["output"], values, weights)
        gradients["output"] = upstream @ values[-1]
        gradients["direct"] = upstream @ values[0]
        product, apart, both = np.split(d_inputs + column * weights["direct"], 3, axis=1)
        apart = apart * np.sign(left - right)
        return product * right + apart + both, product * left - apart + both, gradients

    def fold(self, z: np.ndarray, weights: Weights) -> Folded:
        return _as_features(z)

    def network(self, weights: Weights) -> Network | None:
        return _network_of("features", weights, weights["direct"])


HEADS: dict[str, type[Head]] = {
    head.name: head
    for head in (
        Cosine,
        Dot,
        Product,
        AbsoluteDifference,
        SquaredDifference,
        Mahalanobis,
        Sum,
        Maximum,
        Minimum,
        MeanInteraction,
        Bilinear,
        Plda,
        Rbf,
        Hyperbolic,
        Mirrored,
        Concat,
        PairNetwork,
    )
}
"""Every head by its name."""


class MissingHeadError(FileError, ArgumentError):
    """A user's own head that nobody has imported, as the one of a model that was just read."""


def find_head(text: str) -> Head:
    """Return the head of this name, with its options: ``cosine``, ``bilinear(rank=32)``.

    Raises
    ------
    ArgumentError : there is no head of this name, or it does not have such an option.
    MissingHeadError : the name is that of a user's own head, which has not been imported.
    """
    match = re.fullmatch(r"\s*([^()]+?)\s*(?:\((.*)\))?\s*", text)
    name = match[1] if match else text
    if name not in HEADS:
        if ":" in name:
            raise MissingHeadError(
                f"the head {name!r} is a user's own: name its head with --head {name} where its "
                "module can be imported"
            )
        raise ArgumentError(f"there is no head {name!r}: choose from {', '.join(HEADS)}")
    settings = match[2] if match else None
    return HEADS[name](**_parsed_settings(name, settings)) if settings else HEADS[name]()


def _parsed_settings(head: str, text: str) -> dict[str, Any]:
    """Turn ``rank=32, hidden=64x32, gamma=0.5`` into whole numbers, tuples of them, or floats."""
    settings: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        try:
            if re.fullmatch(r"\d+(x\d+)+", value):
                settings[name] = tuple(int(size) for size in value.split("x"))
            else:
                settings[name] = int(value) if value.isdigit() else float(value)
        except ValueError:
            raise ArgumentError(
                f"the option {part.strip()!r} of the head {head} is not of the form name=number"
            ) from None
    return settings


def parse_heads(text: str) -> list[Head]:
    """Return the heads of a sum, such as ``cosine+absdiff``; ``module:Class`` is imported.

    Only what a user names is ever imported, never what a file says.

    Raises
    ------
    ArgumentError : an unknown head, or one that stands alone in a sum.
    """
    names = re.split(r"\+(?![^(]*\))", text)
    for name in names:
        if ":" in name:
            import_head(re.sub(r"\(.*", "", name).strip())
    heads = [find_head(name) for name in names]
    for head in heads:
        if len(heads) > 1 and head.stands_alone:
            raise ArgumentError(
                f"the head {head.name} cannot be summed with others ({text}): it stands alone"
            )
    return heads


def import_head(name: str) -> type[Head]:
    """Import a user's own head ``module:Class`` and give it its place in `HEADS`.

    Modules are also looked for in the current folder.

    Raises
    ------
    ArgumentError : it cannot be imported or is not a `Head`.
    """
    if name in HEADS:
        return HEADS[name]
    module, _, attribute = name.partition(":")
    before = sys.path
    sys.path = [*before, os.getcwd()]
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a user's module raises
        raise ArgumentError(f"the head {name!r} cannot be imported: {error!r}") from error
    finally:
        sys.path = before
    if not (isinstance(found, type) and issubclass(found, Head)):
        raise ArgumentError(f"{name!r} is no subclass of fastpair.heads.Head")
    if found.__module__ == __name__:
        raise ArgumentError(f"{name!r} is a head of fastpair's own: say --head {found.name}")
    found.name = name
    _check_own_head(found)
    HEADS[name] = found
    return found


def _check_own_head(kind: type[Head]) -> None:
    """Refuse a user's head whose forward, gradient and fold do not belong together.

    Pairs are random; so are the learned weights, about their start, where the head allows it.
    """
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(2, 64, 6))
    upstream = rng.normal(size=64)
    try:
        head = kind()
        weights = {
            name: np.array(value, np.float64) for name, value in head.initial(6, rng).items()
        }
        learned = head.backward(upstream, head.forward(left, right, weights)[1], weights)[2]
        others = {
            name: value + 0.1 * rng.normal(size=value.shape) if name in learned else value
            for name, value in weights.items()
        }
        weights = others if head.fits(others, 6) else weights
        raw, cache = head.forward(left, right, weights)
        swapped = head.forward(right, left, weights)[0]
        gradients = head.backward(upstream, cache, weights)
        steps = [rng.normal(size=side.shape) for side in (left, right)]
        ways = {
            name: rng.normal(size=value.shape) * (name in learned)
            for name, value in weights.items()
        }

        def moved(step: float) -> float:
            shifted = {name: value + step * ways[name] for name, value in weights.items()}
            sides = (left + step * steps[0], right + step * steps[1])
            return float(upstream @ head.forward(*sides, shifted)[0])

        slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
        given = sum(float((g * s).sum()) for g, s in zip(gradients[:2], steps, strict=True))
        given += sum(float((gradients[2][name] * ways[name]).sum()) for name in learned)
        folded = raw
        if head.network(weights) is None:  # networks fold to features alone
            compiled = head.compiled(weights)
            # Apart from each other: a row's columns may depend on that row alone.
            folded = _raw_of_fold(head.fold(left, compiled), head.fold(right, compiled))
    except Exception as error:  # whatever a user's head raises
        raise ArgumentError(f"the head {kind.name} fails on random numbers: {error!r}") from error
    size = np.abs(raw).max() + 1e-9
    if np.abs(raw - swapped).max() > 1e-9 * size:
        raise ArgumentError(f"the head {kind.name} is not symmetric: swapped pairs score otherwise")
    if abs(slope - given) > 1e-3 * (abs(slope) + abs(given) + size):
        raise ArgumentError(f"backward of the head {kind.name} is not the gradient of its forward")
    if np.abs(raw - folded).max() > 1e-6 * size:
        raise ArgumentError(
            f"the fold of the head {kind.name} does not score what its forward does"
        )


def _raw_of_fold(left: Folded, right: Folded) -> np.ndarray:
    """Raw scores of folded rows with folded rows, by the kernels' formula."""
    raw = np.zeros(())
    for folded in (left, right):
        raw = raw if folded.bias is None else raw + folded.bias
    for one, other in zip(left.segments, right.segments, strict=True):
        halves = 2 if one.kind == "mirrored" else 1
        columns = (part.values.reshape(len(part.values), -1) for part in (one, other))
        raw = raw + terms(one.kind, *columns) @ np.tile(one.signs, halves).astype(np.float64)
    return raw


def catalogue() -> list[dict[str, str]]:
    """Return a row for each head: name, formula, kind, reflexive, metric, link and options."""
    return [
        {
            "name": name,
            "formula": head.formula,
            "kind": head.kind,
            "symmetric": "always",
            "reflexive": head.reflexive,
            "metric": head.metric,
            "link": head.link,
            "options": ", ".join(head.options),
        }
        for name, head in HEADS.items()
    ]
