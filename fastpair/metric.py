"""The metric of a model whose one head is one: where its points are, and how far apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastpair.errors import ArgumentError
from fastpair.heads import find_head, unit_rows
from fastpair.kernels.reference import apply_link
from fastpair.model import Model
from fastpair.towers import Identity, Linear

METRIC_HEADS = ("mahalanobis", "sqdiff", "absdiff", "rbf", "hyperbolic")
"""Heads that are a function of a metric over tower outputs; differences if no weight is above 0."""

_AFFINE = "preparation 'scaling' and a linear tower"


@dataclass(frozen=True)
class Metric:
    """A distance between embeddings, by itself: no change of a model reaches it.

    Parameters
    ----------
    model : the model of one branch whose head it is.
    factors : (k,) float64 or (1,), what tower outputs are multiplied by.
    norm : "euclidean", "manhattan" or "lorentz".
    linear : (k, n) float64, L with ``d(x, y) = |L (x - y)|``, or None where there is none.
    """

    model: Model
    factors: np.ndarray
    norm: str
    linear: np.ndarray | None

    def points(self, embeddings: np.ndarray) -> np.ndarray:
        """Return the points (N, k) float64 between which the norm measures embeddings (N, n)."""
        if self.linear is not None:
            return np.asarray(embeddings, np.float64) @ self.linear.T
        rows = self.model.prepare(embeddings)
        return self.model.branches[0].outputs(rows) * self.factors

    def between(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return the distances (m,) float64 of points (m, k) of `points`, row by row."""
        apart = left - right
        if self.norm == "manhattan":
            return np.abs(apart).sum(axis=1)
        squares = np.einsum("ij,ij->i", apart, apart)
        if self.norm == "euclidean":
            return np.sqrt(squares)
        times = [np.sqrt(1 + np.einsum("ij,ij->i", side, side)) for side in (left, right)]
        lag = times[0] - times[1]
        return -apply_link(-(squares - lag * lag) / 2, "negative_arcosh")

    def score_at(self, distance: float) -> float:
        """Return the score of a pair at a distance, as the model's formula has it.

        Raises
        ------
        ArgumentError : the distance is below 0.
        """
        if not distance >= 0:
            raise ArgumentError(f"the distance {distance} is below 0")
        model = self.model
        if self.norm == "lorentz":
            return model.offset - model.slope * distance
        raw = model.constant - (distance if self.norm == "manhattan" else distance * distance)
        linked = apply_link(np.array([raw], np.float64), model.link)
        return float(model.offset + model.slope * linked[0])


def find_metric(model: Model) -> Metric:
    """Return the metric that a model's score is a falling function of.

    It is the root of a squared difference (mahalanobis, sqdiff, rbf) under the calibrated weights,
    an absolute difference, or the distance of the head hyperbolic.

    Raises
    ------
    ArgumentError : the score is no function of a metric alone; the message says why.
    """
    branch = model.branches[0]
    head = find_head(branch.head).name
    if len(model.branches) > 1 or head not in METRIC_HEADS:
        raise ArgumentError(
            f"the heads {'+'.join(model.heads)} are no metric{_kept(model)}: use one of "
            f"{', '.join(METRIC_HEADS)}, of which mahalanobis always learns one"
        )
    if model.asymmetric or model.density is not None:
        what = "two towers" if model.asymmetric else "density"
        raise ArgumentError(f"the score has {what} in it and is no metric: learn without")
    weights = branch.weights
    if head in ("sqdiff", "absdiff"):
        weight = -weights["weight"]
        if (weight < 0).any():
            raise ArgumentError(
                f"the head {head} learned weights above 0, with which it is no metric: use "
                "mahalanobis, which always learns one"
            )
    elif head == "mahalanobis":
        weight = np.exp(weights["log_weight"])
    elif head == "rbf":
        weight = weights["gamma"] if "gamma" in weights else np.exp(weights["log_gamma"])
    else:
        weight = np.exp(2 * weights["log_scale"])
    norm = {"absdiff": "manhattan", "hyperbolic": "lorentz"}.get(head, "euclidean")
    factors = weight if norm == "manhattan" else np.sqrt(weight)
    linear = None
    if norm == "euclidean" and (map_ := _linear_map(model)) is not None:
        linear = np.broadcast_to(factors, len(map_))[:, None] * map_
    return Metric(model, factors, norm, linear)


def _kept(model: Model) -> str:
    """Say where training kept a baseline in place of what it learned."""
    return "" if model.description.get("learned", True) else " (training kept a baseline)"


def _linear_map(model: Model) -> np.ndarray | None:
    """Return the matrix (k, n) of preparation and tower of the first branch, if both are affine."""
    tower, preparation = model.branches[0].tower, model.preparation
    if preparation.unit_rows or tower.normalise or model.input_columns is None:
        return None
    if isinstance(tower, Linear):
        matrix = np.asarray(tower.projection, np.float64)
    elif isinstance(tower, Identity):
        matrix = np.eye(model.input_columns)
    else:
        return None
    whitening = preparation.whitening
    return matrix if whitening is None else matrix @ whitening.T


def mahalanobis(model: Model) -> np.ndarray:
    """Return L (k, n) float64 with the distance ``|L (x - y)|``.

    Raises
    ------
    ArgumentError : the model has no such metric, or not over embeddings as they come.
    """
    found = find_metric(model)
    if found.linear is None:
        raise ArgumentError(
            f"the metric of the head {model.heads[0]} is not Mahalanobis over embeddings as they "
            f"come: that takes mahalanobis, sqdiff or rbf, {_AFFINE}"
        )
    return found.linear


def projected(model: Model, embeddings: np.ndarray) -> np.ndarray:
    """Return what the heads of a model compare, (N, k) float64.

    Of a metric, its points; of the head cosine, rows of length 1, whose products are the cosines;
    of a sum of heads, the outputs of their towers side by side.

    Parameters
    ----------
    model : a symmetric model.
    embeddings : (N, n) finite float.
    """
    rows = model.prepare(embeddings)
    try:
        return find_metric(model).points(embeddings)
    except ArgumentError:
        pass
    outputs = []
    for branch in model.branches:
        z = branch.outputs(rows)
        outputs.append(unit_rows(z)[0] if branch.head == "cosine" else z)
    return np.concatenate(outputs, axis=1)
