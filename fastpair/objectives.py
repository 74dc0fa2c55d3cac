"""Objectives: what training makes small, each with its gradient by the raw scores of a batch.

Raw scores are log-odds that still await calibration; targets are labels brought to 0..1. Every
loss is a mean in which a pair counts as much as its weight says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fastpair.errors import ArgumentError, DataError

SPREAD = 5.0
"""Raw scores of the worst and of the best target lie about this far apart, evenly about 0."""


@dataclass(frozen=True)
class Batch:
    """What a loss may know of the pairs of a batch.

    Parameters
    ----------
    target : (M,) float from 0 to 1; 1 is the most similar.
    weight : (M,) float, at least 0, not all 0; how much a pair counts.
    left, right : (M,) integers that tell entities apart.
    """

    target: np.ndarray
    weight: np.ndarray
    left: np.ndarray
    right: np.ndarray

    @property
    def share(self) -> np.ndarray:
        """Weights that add up to 1."""
        return self.weight / self.weight.sum()


Loss = Callable[[np.ndarray, Batch], tuple[float, np.ndarray]]
"""(raw (M,), batch) -> (value, gradient by raw (M,))."""


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-x)), without overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * x)


def cross_entropy(raw: np.ndarray, batch: Batch, factor: float = 1.0) -> tuple[float, np.ndarray]:
    """Compute `factor` times the mean of ``log(1 + exp(raw)) - target * raw``."""
    share = factor * batch.share
    value = share @ (np.logaddexp(0, raw) - batch.target * raw)
    return float(value), share * (sigmoid(raw) - batch.target)


def ranking(raw: np.ndarray, batch: Batch, sharpness: float = 1.0) -> tuple[float, np.ndarray]:
    """Compute the mean of ``log(1 + exp(sharpness (raw_q - raw_p)))`` over target p > target q."""
    better, worse, share = _ordered(batch)
    behind = sharpness * (raw[worse] - raw[better][:, None])
    value = np.sum(share * np.logaddexp(0, behind))
    return float(value), _by_pair(raw, better, worse, share * sharpness * sigmoid(behind))


def contrastive(raw: np.ndarray, batch: Batch, margin: float = 2.0) -> tuple[float, np.ndarray]:
    """Compute the mean of ``target max(margin - raw, 0)^2 + (1 - target) max(margin + raw, 0)^2``.

    Good pairs are pulled above `margin` and bad ones pushed below minus `margin`.
    """
    missing, excess = np.maximum(margin - raw, 0), np.maximum(margin + raw, 0)
    share = batch.share
    value = share @ (batch.target * missing**2 + (1 - batch.target) * excess**2)
    return float(value), share * 2 * ((1 - batch.target) * excess - batch.target * missing)


def triplet(raw: np.ndarray, batch: Batch, margin: float = 2.0) -> tuple[float, np.ndarray]:
    """Compute the mean of ``max(margin + raw_q - raw_p, 0)`` over target p > target q.

    Only pairs p and q with an entity in common, the anchor, are compared; 0 where there are none.
    """
    better, worse, share = _ordered(batch, anchored=True)
    behind = margin + raw[worse] - raw[better][:, None]
    value = np.sum(share * np.maximum(behind, 0))
    return float(value), _by_pair(raw, better, worse, share * (behind > 0))


def squared(raw: np.ndarray, batch: Batch, factor: float = 1.0) -> tuple[float, np.ndarray]:
    """Compute `factor` times the mean of ``(raw - SPREAD (target - 1/2))^2``."""
    residual = raw - SPREAD * (batch.target - 0.5)
    share = factor * batch.share
    return float(share @ residual**2), 2 * share * residual


def correlation(raw: np.ndarray, batch: Batch, factor: float = 1.0) -> tuple[float, np.ndarray]:
    """Compute `factor` times one minus Pearson's correlation of raw scores and targets."""
    share = batch.share
    x, y = raw - share @ raw, batch.target - share @ batch.target
    xx, yy, xy = (float(share @ (a * b)) for a, b in ((x, x), (y, y), (x, y)))
    if not xx * yy > 0:
        return factor, np.zeros_like(raw)
    root = (xx * yy) ** 0.5
    return factor * (1 - xy / root), (-factor / root) * share * (y - xy / xx * x)


def _ordered(batch: Batch, anchored: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """List who is to be above whom: numbers (B,) and (W,), and shares (B, W) that add up to 1.

    Shares are 0 where the target is not higher or, if `anchored`, no entity is in common; all are
    0 where nothing is left.
    """
    target = batch.target
    better, worse = np.flatnonzero(target > target.min()), np.flatnonzero(target < target.max())
    counts = target[better][:, None] > target[worse]
    if anchored:
        common = np.zeros_like(counts)
        for one in (batch.left, batch.right):
            for other in (batch.left, batch.right):
                common |= one[better][:, None] == other[worse]
        counts &= common
    share = np.where(counts, batch.weight[better][:, None] * batch.weight[worse], 0)
    total = share.sum()
    return better, worse, share / total if total > 0 else share


def _by_pair(
    raw: np.ndarray, better: np.ndarray, worse: np.ndarray, slope: np.ndarray
) -> np.ndarray:
    gradient = np.zeros_like(raw)
    gradient[worse] += slope.sum(axis=0)
    gradient[better] -= slope.sum(axis=1)
    return gradient


LOSSES: dict[str, Callable[..., tuple[float, np.ndarray]]] = {
    "cross-entropy": cross_entropy,
    "ranking": ranking,
    "contrastive": contrastive,
    "triplet": triplet,
    "squared": squared,
    "correlation": correlation,
}
"""Losses by name. One number can be given to each: a factor, a sharpness or a margin."""


def find_losses(names: str) -> list[Loss]:
    """Return the losses that are named, such as ``cross-entropy+ranking:2``.

    Parameters
    ----------
    names : names of `LOSSES` joined by "+"; after a colon the number that a loss takes.

    Raises
    ------
    ArgumentError : there is no such loss, or its number is not above 0.
    """
    return [_find_loss(name.strip()) for name in names.split("+")]


def _find_loss(text: str) -> Loss:
    name, _, number = text.partition(":")
    if name == "sampled":
        raise ArgumentError(
            "the loss 'sampled' cannot be joined with others and takes no number: it is the "
            "default loss after bad pairs were sampled"
        )
    if name not in LOSSES:
        raise ArgumentError(f"there is no loss {name!r}: choose from {', '.join(LOSSES)}")
    function = LOSSES[name]
    if not number:
        return function
    try:
        value = float(number)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise ArgumentError(f"the number of the loss {text!r} is not one above 0")
    return lambda raw, batch: function(raw, batch, value)


def reflexivity(
    raw: np.ndarray, raw_left: np.ndarray, raw_right: np.ndarray, share: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Compute the mean of ``log(1 + exp(raw - s))`` with s the scores of either one with itself.

    Parameters
    ----------
    raw : (M,) scores of pairs.
    raw_left, raw_right : (M,) scores of their left and of their right entities with themselves.
    share : (M,) weights that add up to 1.

    Returns
    -------
    The value and its gradients by `raw`, `raw_left` and `raw_right`.
    """
    value, by_raw, by_self = 0.0, np.zeros_like(raw), []
    for own in (raw_left, raw_right):
        value += float(0.5 * share @ np.logaddexp(0, raw - own))
        slope = 0.5 * share * sigmoid(raw - own)
        by_raw += slope
        by_self.append(-slope)
    return value, by_raw, by_self[0], by_self[1]


def transitivity(
    one: np.ndarray, other: np.ndarray, closing: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Compute the mean of ``max(min(s(x, y), s(y, z)) - s(x, z), 0)`` over triples x, y, z.

    It is 0 where the scores are transitive under the minimum, the greatest t-norm; probabilities,
    which rise with scores, then are so under every other, such as that of Lukasiewicz:
    ``p(x, z) >= p(x, y) + p(y, z) - 1`` (Klement, Mesiar and Pap, Triangular Norms, 2000).

    Parameters
    ----------
    one, other, closing : (T,) raw scores of (x, y), (y, z) and (x, z).

    Returns
    -------
    The value and its gradients by the three.
    """
    missing = np.minimum(one, other) - closing
    slope = (missing > 0) / max(len(missing), 1)
    first = one <= other
    value = float(np.maximum(missing, 0).sum() / max(len(missing), 1))
    return value, slope * first, slope * ~first, -slope


def balanced(labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return weights under which good and bad pairs count the same in all, mean 1.

    Parameters
    ----------
    labels : (M,) 0 or 1.
    weights : (M,) how much a pair counts among its own kind.

    Raises
    ------
    DataError : one kind has no weight at all.
    """
    result = np.array(weights, np.float64)
    for kind in (0, 1):
        of_kind = labels == kind
        total = result[of_kind].sum()
        if not total > 0:
            raise DataError(f"no {'good' if kind else 'bad'} pair has a weight above 0")
        result[of_kind] *= 0.5 * len(labels) / total
    return result
