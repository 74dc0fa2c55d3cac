"""Heads: what turns two tower outputs into one number, its gradient, and its folded columns.

Every head is symmetric by construction and linear in its own weights. It computes in the type of
its inputs: float32 in training, float64 in a model and in gradient checks. ``fold`` says which
columns of the formula in `fastpair.kernels` an entity contributes, so that no kernel knows a head.
"""

# ruff: noqa: D102  (methods that a head overrides are described once, in Head and Columnwise)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fastpair.errors import ArgumentError

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
    inverse : (N, 1), one over the length, 0 for a row of zeros.
    """
    # Dividing by the largest number first keeps squares from overflowing and from vanishing.
    peak = np.abs(rows).max(axis=1, keepdims=True, initial=0)
    scaled = rows / np.where(peak > 0, peak, 1)
    length = np.sqrt(np.einsum("ij,ij->i", scaled, scaled))[:, None]
    inverse = np.zeros_like(length)
    np.divide(1, length * peak, out=inverse, where=peak > 0)
    return scaled / np.where(length > 0, length, 1), inverse


class Head:
    """One way to compare two tower outputs z and z'; subclasses register under their `name`."""

    name: ClassVar[str]
    link: ClassVar[str] = "identity"

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
        """Turn the gradient by the raw score (M,) into those by left, right and weights."""
        raise NotImplementedError

    def fold(self, z: np.ndarray, weights: Weights) -> Folded:
        """Fold the tower outputs (N, k) float64 and the weights into columns and a bias."""
        raise NotImplementedError

    def scaled(self, weights: Weights, factor: float) -> Weights:
        """Return weights whose raw score is `factor` times that of `weights`."""
        return {name: np.asarray(value * factor, value.dtype) for name, value in weights.items()}


class Cosine(Head):
    """``scale * cos(z, z')``; the zero vector has cosine 0 with everything."""

    name = "cosine"

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

    kind: ClassVar[str]
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
        return _columns(self.kind, z, weight, self.power)


def _columns(kind: str, z: np.ndarray, weight: np.ndarray, power: float) -> Folded:
    """Fold abs(weight) into the columns, its sign into `signs`; drop columns of weight 0."""
    keep = np.flatnonzero(weight)
    if not len(keep):
        return Folded([])
    values = z[:, keep] * np.abs(weight[keep]) ** power
    return Folded([Columns(kind, values, np.where(weight[keep] < 0, -1, 1).astype(np.int8))])


class Product(Columnwise):
    """``sum_k weight_k z_k z'_k``."""

    name, kind, power, start = "product", "product", 0.5, 1.0

    def terms(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return left * right

    def slopes(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return right, left


class Dot(Product):
    """``weight <z, z'>``: the product with one weight for all columns."""

    name = "dot"

    def initial(self, columns: int, rng: np.random.Generator) -> Weights:
        return {"weight": np.ones(1)}


class AbsoluteDifference(Columnwise):
    """``sum_k weight_k |z_k - z'_k|``."""

    name, kind, power, start = "absdiff", "absolute", 1.0, -1.0

    def terms(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.abs(left - right)

    def slopes(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sign = np.sign(left - right)
        return sign, -sign


class SquaredDifference(Columnwise):
    """``sum_k weight_k (z_k - z'_k)^2``."""

    name, kind, power, start = "sqdiff", "squared", 0.5, -1.0

    def terms(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return (left - right) ** 2

    def slopes(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        difference = 2 * (left - right)
        return difference, -difference


class Maximum(Columnwise):
    """``sum_k weight_k max(z_k, z'_k)``."""

    name, kind, power, start = "max", "maximum", 1.0, 1.0

    def terms(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.maximum(left, right)

    def slopes(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Equal columns share the slope, which keeps the gradient symmetric too.
        share = (0.5 + 0.5 * np.sign(left - right)).astype(left.dtype)
        return share, 1 - share


class Minimum(Maximum):
    """``sum_k weight_k min(z_k, z'_k)``, folded as ``-max(-z, -z')``."""

    name = "min"

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

    def terms(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return left + right

    def slopes(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ones = np.ones_like(left)
        return ones, ones

    def fold(self, z: np.ndarray, weights: Weights) -> Folded:
        return Folded([], z @ np.broadcast_to(weights["weight"], z.shape[1]))


HEADS: dict[str, type[Head]] = {
    head.name: head
    for head in (
        Cosine,
        Dot,
        Product,
        AbsoluteDifference,
        SquaredDifference,
        Sum,
        Maximum,
        Minimum,
    )
}
"""Every head by its name."""


def find_head(name: str) -> Head:
    """Return the head of this name, or refuse with the names that there are."""
    if name not in HEADS:
        raise ArgumentError(f"there is no head {name!r}: choose from {', '.join(HEADS)}")
    return HEADS[name]()
