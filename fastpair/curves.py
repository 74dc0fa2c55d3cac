"""What the figures of a report show: curves, counts and choices from scores and labels.

Arrays in, small arrays out: whatever the number of pairs, what comes back is a few hundred numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_FLOOR, Context, Decimal
from typing import Any

import numpy as np

from fastpair.evaluation import CONFIDENCE, PROBABILITY_BINS, entity_weights
from fastpair.model import Model, sigmoid

MOST_THRESHOLDS = 500
"""Thresholds that the slider of a report goes through."""

MOST_POINTS = 400
"""Points of a curve."""

MOST_EPOCHS = 2000
"""Epochs whose curves are drawn."""

MOST_DRAWS = 100
"""Draws of the bootstrap behind the band of a curve."""

BAND = np.linspace(0, 1, 101)
"""Where the band around a curve is taken."""

MOST_SHOWN = 25
"""Mistakes of each kind."""

PLANE_ENTITIES = 700
"""Entities of the learned projection in two dimensions, at most."""

PLANE_PAIRS = 90
"""Pairs of each kind that are drawn in it."""


# --- thresholds -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thresholds:
    """Counts of pairs at thresholds.

    Parameters
    ----------
    values : (T,) float64, rising: a pair is taken if it scores at least as much.
    hits, taken : (T,) int64, good pairs taken and pairs taken.
    good, pairs : good pairs and pairs in all.
    at : number of the threshold that is in use.
    """

    values: np.ndarray
    hits: np.ndarray
    taken: np.ndarray
    good: int
    pairs: int
    at: int

    def shown(self) -> list[str]:
        """Return six digits of each, or the more that tell it from the one below.

        They are rounded down, so that what is shown takes the pair that scores the threshold too.
        """
        texts = []
        for value, below in zip(self.values, np.append(-np.inf, self.values[:-1]), strict=True):
            known = Decimal(repr(float(value)))
            shorter = (
                Context(prec=digits, rounding=ROUND_FLOOR).plus(known) for digits in range(6, 18)
            )
            texts.append(f"{next(one for one in shorter if one > Decimal(float(below))):g}")
        return texts


def count_at_thresholds(
    scores: np.ndarray, truth: np.ndarray, threshold: float | None = None
) -> Thresholds:
    """Count the good pairs and all pairs that score at least each of some thresholds.

    They are all scores where these are few; else quantiles of all scores and of the good ones, so
    that the slider moves evenly through what matters, equal steps between them, and the best.

    Parameters
    ----------
    scores : (M,) finite float, M > 0.
    truth : (M,) bool, which pairs are good.
    threshold : the one in use, which is among them; default: the one with the largest F1.
    """
    scores = np.asarray(scores, np.float64)
    values = np.unique(scores)
    if len(values) > MOST_THRESHOLDS - 1:
        good = scores[truth] if truth.any() else scores
        values = np.unique(
            np.concatenate(
                [
                    np.quantile(scores, np.linspace(0, 1, MOST_THRESHOLDS // 2)),
                    np.quantile(good, np.linspace(0, 1, MOST_THRESHOLDS // 4)),
                    np.linspace(values[0], values[-1], MOST_THRESHOLDS // 4 - 2),
                    [_best_level(scores, truth)],
                ]
            )
        )
    if threshold is not None:
        values = np.unique(np.append(values, threshold))
    taken = len(scores) - np.searchsorted(np.sort(scores), values, side="left")
    n_good = int(truth.sum())
    hits = n_good - np.searchsorted(np.sort(scores[truth]), values, side="left")
    if threshold is None:
        at = int(np.argmax(2 * hits / np.maximum(taken + n_good, 1)))
    else:
        at = int(np.searchsorted(values, threshold))
    return Thresholds(values, hits, taken, n_good, len(scores), at)


def _best_level(scores: np.ndarray, truth: np.ndarray) -> float:
    """Return the score that as a threshold has the largest F1."""
    levels, numbers = np.unique(scores, return_inverse=True)
    taken, hits = (
        np.cumsum(np.bincount(numbers, weights, len(levels))[::-1])[::-1]
        for weights in (np.ones(len(scores)), truth)
    )
    return float(levels[np.argmax(2 * hits / (taken + max(1, truth.sum())))])


# --- curves ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A line, and the band in which `CONFIDENCE` of the draws of a bootstrap lie.

    Parameters
    ----------
    x, y : (P,) float64.
    low, high : (len(BAND),) float64 at the x of `BAND`, or None.
    """

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


class Ranking:
    """Pairs in the order of their scores, ready to be counted under any weights.

    Parameters
    ----------
    scores : (M,) float.
    truth : (M,) bool, both kinds present.
    """

    def __init__(self, scores: np.ndarray, truth: np.ndarray) -> None:
        self._order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
        ordered = np.asarray(scores, np.float64)[self._order]
        # A curve has corners only where the score changes.
        self._last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
        self._truth = truth[self._order]

    def rates(
        self, weights: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Return false positive rate, recall and precision from above down, or None.

        Each begins where nothing is taken; precision there is that of the first pairs.
        """
        weight = np.ones(len(self._order)) if weights is None else weights[self._order]
        taken = np.cumsum(weight)[self._last]
        hits = np.cumsum(weight * self._truth)[self._last]
        wrong = taken - hits
        if hits[-1] <= 0 or wrong[-1] <= 0:
            return None
        precision = np.divide(hits, taken, out=np.ones_like(hits), where=taken > 0)
        return (
            np.append(0.0, wrong / wrong[-1]),
            np.append(0.0, hits / hits[-1]),
            np.append(precision[0], precision),
        )


def ranking_curves(
    scores: np.ndarray,
    truth: np.ndarray,
    pairs: tuple[np.ndarray, np.ndarray],
    draws: int = 0,
    seed: int = 0,
) -> tuple[Curve, Curve]:
    """Return recall over the false positive rate (ROC) and precision over recall.

    Parameters
    ----------
    scores : (M,) float.
    truth : (M,) bool, both kinds present.
    pairs : left and right entities (M,), of the bootstrap.
    draws : of the bootstrap; 0: no band.
    seed : of the bootstrap.
    """
    ranking = Ranking(scores, truth)
    found = ranking.rates()
    assert found is not None
    false, recall, precision = found
    curves = [thinned(false, recall), thinned(recall, precision)]
    drawn: list[tuple[np.ndarray, np.ndarray]] = []
    for weights in entity_weights(*pairs, min(draws, MOST_DRAWS), seed):
        rates = ranking.rates(weights)
        if rates is not None:
            reached = np.minimum(np.searchsorted(rates[1], BAND), len(rates[1]) - 1)
            drawn.append((np.interp(BAND, rates[0], rates[1]), rates[2][reached]))
    if not drawn:
        return curves[0], curves[1]
    rest = 0.5 * (1 - CONFIDENCE)
    bands = [np.quantile(np.stack(one), [rest, 1 - rest], axis=0) for one in zip(*drawn)]  # noqa: B905
    first, second = (
        Curve(curve.x, curve.y, *band) for curve, band in zip(curves, bands, strict=True)
    )
    return first, second


def thinned(x: np.ndarray, y: np.ndarray) -> Curve:
    """Keep `MOST_POINTS` points of a curve, evenly along its length, its ends among them."""
    if len(x) <= MOST_POINTS:
        return Curve(x, y)
    length = np.append(0.0, np.cumsum(np.hypot(np.diff(x), np.diff(y))))
    at = np.searchsorted(length, np.linspace(0, length[-1], MOST_POINTS))
    kept = np.unique(np.append(np.minimum(at, len(x) - 1), [0, len(x) - 1]))
    return Curve(x[kept], y[kept])


@dataclass(frozen=True)
class Reliability:
    """Probabilities and how often they came true, in bins that hold pairs.

    Parameters
    ----------
    said : (B,) mean probability in each bin.
    came : (B,) share of good pairs.
    low, high : (B,) the Wilson interval of that share, of 95 %.
    pairs : (B,) int64 pairs in the bin.
    bins : (B,) int64 numbers of the bins, of `PROBABILITY_BINS` equal ones.
    """

    said: np.ndarray
    came: np.ndarray
    low: np.ndarray
    high: np.ndarray
    pairs: np.ndarray
    bins: np.ndarray


def reliability(chance: np.ndarray, truth: np.ndarray) -> Reliability:
    """Compare probabilities (M,) with the shares of good pairs in equal bins.

    The interval is Wilson's (Journal of the American Statistical Association 22, 1927).
    """
    bins = np.minimum((chance * PROBABILITY_BINS).astype(np.int64), PROBABILITY_BINS - 1)
    counts = np.bincount(bins, minlength=PROBABILITY_BINS)
    kept = counts > 0
    pairs = counts[kept]
    said = np.bincount(bins, chance, PROBABILITY_BINS)[kept] / pairs
    came = np.bincount(bins, truth, PROBABILITY_BINS)[kept] / pairs
    z = 1.96  # the normal quantile of 97.5 %
    middle = (came + z * z / (2 * pairs)) / (1 + z * z / pairs)
    half = z * np.sqrt(came * (1 - came) / pairs + z * z / (4 * pairs**2)) / (1 + z * z / pairs)
    return Reliability(said, came, middle - half, middle + half, pairs, np.flatnonzero(kept))


def chance_before(model: Model, scores: np.ndarray) -> np.ndarray | None:
    """Return the probabilities (M,) that scores said before calibration, or None if unknown.

    They are the sigmoid of what learning left, before calibration stretched and moved it.
    """
    fitted = model.record.get("calibration")
    if model.unit != "log-odds" or not isinstance(fitted, dict):
        return None
    slope, offset = fitted.get("slope"), fitted.get("offset")
    if not (isinstance(slope, float) and isinstance(offset, float) and slope > 0):
        return None
    return sigmoid((np.asarray(scores, np.float64) - offset) / slope)


# --- mistakes -------------------------------------------------------------------------------------


def worst_pairs(scores: np.ndarray, truth: np.ndarray, threshold: float) -> dict[str, np.ndarray]:
    """Return the numbers of the bad pairs that were taken and score highest, and of the good ones
    that were missed and score lowest, the worst first.
    """  # noqa: D205
    scores = np.asarray(scores, np.float64)
    order = np.argsort(scores, kind="stable")
    missed = order[truth[order] & (scores[order] < threshold)]
    taken = order[::-1][~truth[order[::-1]] & (scores[order[::-1]] >= threshold)]
    return {"bad": taken[:MOST_SHOWN], "good": missed[:MOST_SHOWN]}


def worst_grades(scores: np.ndarray, labels: np.ndarray, unit: str) -> dict[str, np.ndarray]:
    """Return the numbers of the pairs whose score is furthest above and below their grade.

    Scores that are no grades are compared by ranks.
    """
    if unit != "grade":
        from scipy.stats import rankdata

        scores, labels = rankdata(scores), rankdata(labels)
    order = np.argsort(np.asarray(scores, np.float64) - labels, kind="stable")
    return {"bad": order[::-1][:MOST_SHOWN], "good": order[:MOST_SHOWN]}


# --- the projection -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plane:
    """Entities in two dimensions.

    Parameters
    ----------
    left, right : (E, 2) float64, where an entity lies as a left and as a right one; the same array
        in symmetric models.
    share : of the variance of all columns that these two hold.
    ratio : median distance of good pairs over that of bad ones, in all columns; None where there
        are none of one kind.
    """

    left: np.ndarray
    right: np.ndarray
    share: float
    ratio: float | None = None


def plane_sample(
    pairs: tuple[np.ndarray, np.ndarray], truth: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Choose entities to draw, and pairs of them.

    Returns
    -------
    entities : (E,) numbers of entities, rising.
    lines : (L, 2) places among these by kind, "good" and "bad".
    """
    rng = np.random.default_rng(seed)
    left, right = pairs
    chosen = {}
    for kind, which in (("good", truth), ("bad", ~truth)):
        rows = np.flatnonzero(which & (left != right))
        chosen[kind] = np.sort(rng.permutation(rows)[:PLANE_PAIRS])
    ends = np.concatenate([side[rows] for rows in chosen.values() for side in pairs])
    others = np.setdiff1d(np.unique(np.concatenate(pairs)), ends)
    others = rng.permutation(others)[: max(0, PLANE_ENTITIES - len(np.unique(ends)))]
    entities = np.unique(np.concatenate([ends, others]))
    lines = {
        kind: np.stack([np.searchsorted(entities, side[rows]) for side in pairs], axis=1)
        for kind, rows in chosen.items()
    }
    return entities, lines


def learned_plane(model: Model, embeddings: np.ndarray, lines: dict[str, np.ndarray]) -> Plane:
    """Return the two main directions of what the towers of a model make of embeddings (E, n).

    Outputs of several towers stand side by side, each brought to the same mean square.
    """
    rows = model.prepare(embeddings)
    sides = ("left", "right") if model.asymmetric else ("both",)
    outputs = []
    for side in sides:
        parts = [branch.outputs(rows, side) for branch in model.branches]
        scaled = [part / (np.sqrt((part**2).sum(axis=1).mean()) or 1.0) for part in parts]
        outputs.append(np.concatenate(scaled, axis=1))
    return plane_of(outputs[0], outputs[1] if model.asymmetric else None, lines)


def plane_of(left: np.ndarray, right: np.ndarray | None, lines: dict[str, np.ndarray]) -> Plane:
    """Return the main directions of entities (E, n), as left and, if not None, as right ones.

    Parameters
    ----------
    lines : (L, 2) pairs of entities by kind, "good" and "bad".
    """
    both = left if right is None else np.concatenate([left, right])
    points, share = main_directions(both)
    other = left if right is None else right
    apart = {
        kind: np.linalg.norm(left[ends[:, 0]] - other[ends[:, 1]], axis=1)
        for kind, ends in lines.items()
    }
    middle = {kind: float(np.median(one)) for kind, one in apart.items() if len(one)}
    ratio = middle["good"] / middle["bad"] if len(middle) == 2 and middle["bad"] > 0 else None
    places = (points, points) if right is None else np.split(points, 2)
    return Plane(places[0], places[1], share, ratio)


def main_directions(rows: np.ndarray) -> tuple[np.ndarray, float]:
    """Project rows (E, n) onto their first two principal components.

    Returns
    -------
    points : (E, 2); of each direction the largest part is positive, so that equal rows give equal
        pictures.
    share : of the variance that they hold, from 0 to 1.
    """
    centred = np.asarray(rows, np.float64) - np.mean(rows, axis=0, dtype=np.float64)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2]
    axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]
    points = centred @ axes.T
    points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    total = float((sizes**2).sum())
    return points, float((sizes[:2] ** 2).sum() / total) if total else 0.0


def drawable_epochs(history: Any) -> list[dict[str, Any]]:
    """Return the epochs of a model's record that can be drawn; a file may hold anything."""
    if not isinstance(history, list):
        return []
    return [
        entry
        for entry in history[:MOST_EPOCHS]
        if isinstance(entry, dict)
        and isinstance(entry.get("epoch"), int)
        and isinstance(entry.get("loss"), int | float)
    ]
