"""Calibration: scores into log-odds, probabilities or grades, and the threshold of a decision."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastpair.errors import ArgumentError, DataError
from fastpair.model import Isotonic, Model
from fastpair.objectives import sigmoid

CALIBRATIONS = ("platt", "isotonic", "temperature")
"""How scores become probabilities. All keep the order of scores; `isotonic` may make ties."""


@dataclass(frozen=True)
class Calibration:
    """How scores are calibrated and the threshold is chosen.

    Parameters
    ----------
    graded : scores become grades, and the rest keeps its defaults.
    calibrate : a name of `CALIBRATIONS`.
    threshold_by : see `find_threshold`.
    prior : share of good pairs where the scores will be used, or None.
    """

    graded: bool = False
    calibrate: str = "platt"
    threshold_by: str = "f1"
    prior: float | None = None

    def check(self) -> None:
        """Refuse what cannot be done."""
        if self.calibrate not in CALIBRATIONS:
            known = ", ".join(CALIBRATIONS)
            raise ArgumentError(f"calibrate is {self.calibrate!r}, expected one of {known}")
        _goal(self.threshold_by)
        if self.prior is not None and not 0 < self.prior < 1:
            raise ArgumentError(f"prior is {self.prior}, expected a share between 0 and 1")
        changed = self.calibrate != "platt" or self.threshold_by != "f1" or self.prior is not None
        if self.graded and changed:
            raise ArgumentError(
                "grades have no probability and no threshold: leave out calibrate, threshold_by "
                "and prior, or say from which grade on a pair is good"
            )


def calibrated(
    model: Model, scores: np.ndarray, labels: np.ndarray, calibration: Calibration
) -> tuple[Model, list[str]]:
    """Bring scores into log-odds with a threshold, or into grades; return the model and notes.

    Parameters
    ----------
    model : a model of any unit.
    scores : (M,) its scores of validation pairs.
    labels : (M,) of the same pairs.
    calibration : what is asked for.
    """
    notes = []
    if calibration.graded:
        slope, offset = fit_grade(scores, labels)
    else:
        alone = calibration.calibrate == "temperature"
        slope, offset = fit_log_odds(scores, labels, temperature=alone)
    if slope <= 0:
        notes.append("higher scores do not go with higher labels, so all scores come out alike")
        slope, mean = 1e-3 / max(float(scores.std()), 1e-9), float(labels.mean())
        level = mean if calibration.graded else float(np.log(mean / (1 - mean)))
        offset = level - slope * float(scores.mean())
    fitted = {"slope": float(slope), "offset": float(offset)}
    record = {**model.record, "calibration": fitted}
    if calibration.graded:
        return model.calibrated(slope, offset, unit="grade", record=record), notes
    weights = None
    if calibration.prior is not None:
        shift, weights = prior_shift(labels, calibration.prior)
        offset += shift
        fitted["offset"] = float(offset)
    final = slope * scores + offset
    changes: dict[str, Any] = {"unit": "log-odds", "record": record}
    changes["threshold"] = find_threshold(final, labels, calibration.threshold_by, weights)
    if calibration.calibrate == "isotonic":
        changes["calibration"] = fit_isotonic(final, labels, weights)
    return model.calibrated(slope, offset, **changes), notes


def fit_log_odds(
    scores: np.ndarray, labels: np.ndarray, *, temperature: bool = False
) -> tuple[float, float]:
    """Fit the log-odds of a good pair as ``slope * score + offset`` (Platt).

    Parameters
    ----------
    scores : (M,) float64.
    labels : (M,) 0 or 1, both present.
    temperature : fit the slope alone; the offset is then 0.
    """
    mean, spread = (0.0 if temperature else scores.mean()), scores.std() or 1.0
    x = np.stack([(scores - mean) / spread, np.full_like(scores, not temperature)])
    n_good, n_bad = labels.sum(), (1 - labels).sum()
    # Platt's targets: slightly inside 0 and 1, so that separable pairs keep finite odds.
    target = np.where(labels == 1, (n_good + 1) / (n_good + 2), 1 / (n_bad + 2))
    found = np.array([0.0, 0.0 if temperature else np.log(n_good / n_bad)])
    found = _logistic(x, target, found, ridge=1e-9)
    return float(found[0] / spread), float(found[1] - found[0] * mean / spread)


def _logistic(
    x: np.ndarray, target: np.ndarray, start: np.ndarray, ridge: float | np.ndarray
) -> np.ndarray:
    """Minimise the sum of cross-entropies of ``found @ x`` plus half `ridge` times the squares.

    Parameters
    ----------
    x : (k, M) columns, one of them of ones.
    target : (M,) from 0 to 1.
    start : (k,) where Newton's method begins.
    ridge : (k,) or one number above 0.
    """

    def value(found: np.ndarray) -> float:
        raw = found @ x
        return float(np.sum(np.logaddexp(0, raw) - target * raw) + 0.5 * np.sum(ridge * found**2))

    found, before = start, value(start)
    for _ in range(100):
        probability = sigmoid(found @ x)
        gradient = x @ (probability - target) + ridge * found
        curvature = (x * (probability * (1 - probability))) @ x.T
        curvature += np.diag(np.broadcast_to(ridge, len(x)))
        step = np.linalg.solve(curvature, gradient)
        while (after := value(found - step)) > before and abs(step).max() > 0:
            step = step / 2
        found, gain, before = found - step, before - after, after
        if gain < 1e-12 * max(before, 1):
            break
    return found


def fit_combination(features: np.ndarray, labels: np.ndarray, graded: bool) -> np.ndarray:
    """Fit log-odds, or grades, as ``coefficients[:-1] @ features + coefficients[-1]``.

    Logistic or ridge regression on standardised features, with a penalty that only matters for
    few pairs.

    Parameters
    ----------
    features : (k, M) float64.
    labels : (M,) 0 or 1, both present; or grades.
    graded : which of the two they are.

    Returns
    -------
    coefficients : (k + 1,) float64.
    """
    mean, spread = features.mean(axis=1), features.std(axis=1)
    spread = np.where(spread > 0, spread, 1.0)
    x = np.vstack([(features - mean[:, None]) / spread[:, None], np.ones(len(labels))])
    ridge = np.r_[np.ones(len(features)), 1e-9]
    if graded:
        found = np.linalg.solve(x @ x.T + np.diag(ridge), x @ labels)
    else:
        share = labels.mean()
        start = np.r_[np.zeros(len(features)), np.log(share / (1 - share))]
        found = _logistic(x, labels, start, ridge)
    found[:-1] /= spread
    found[-1] -= found[:-1] @ mean
    return found


def fit_grade(scores: np.ndarray, grades: np.ndarray) -> tuple[float, float]:
    """Fit the grade as ``slope * score + offset`` by least squares."""
    centred = scores - scores.mean()
    slope = float(centred @ grades / max(centred @ centred, 1e-300))
    return slope, float(grades.mean() - slope * scores.mean())


def fit_isotonic(
    scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> Isotonic:
    """Fit the rising curve of probabilities that is closest to the labels.

    Parameters
    ----------
    scores : (M,) float64.
    labels : (M,) 0 or 1.
    weights : (M,) how much a pair counts; default all the same.
    """
    from sklearn.isotonic import IsotonicRegression

    curve = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip")
    curve.fit(scores, labels, sample_weight=weights)
    return Isotonic(
        np.asarray(curve.X_thresholds_, np.float64), np.asarray(curve.y_thresholds_, np.float64)
    )


def prior_shift(labels: np.ndarray, prior: float) -> tuple[float, np.ndarray]:
    """Return what turns log-odds among these pairs into log-odds where `prior` of all are good.

    Parameters
    ----------
    labels : (M,) 0 or 1, both present.
    prior : share of good pairs where the scores will be used.

    Returns
    -------
    shift : what is added to log-odds.
    weights : (M,) under which `prior` of the pairs are good, mean 1.

    Raises
    ------
    ArgumentError : `prior` is not between 0 and 1.
    """
    if not 0 < prior < 1:
        raise ArgumentError(f"prior is {prior}, expected a share between 0 and 1")
    share = float(labels.mean())
    shift = np.log(prior / (1 - prior)) - np.log(share / (1 - share))
    return float(shift), np.where(labels == 1, prior / share, (1 - prior) / (1 - share))


def find_threshold(
    scores: np.ndarray,
    labels: np.ndarray,
    by: str = "f1",
    weights: np.ndarray | None = None,
) -> float:
    """Return the best threshold, half-way between two scores.

    Parameters
    ----------
    scores : (M,) float.
    labels : (M,) 0 or 1, at least one good.
    by : what is to be as large as possible: ``f1``, ``f0.5`` or another F-beta, or ``accuracy``;
        or ``precision=0.9``: the largest recall with a precision of at least 0.9; or
        ``recall=0.9``: the largest precision with a recall of at least 0.9.
    weights : (M,) how much a pair counts; default all the same.

    Raises
    ------
    ArgumentError : `by` is none of these.
    DataError : no threshold reaches the precision that is asked for.
    """
    goal = _goal(by)
    scores = np.asarray(scores, np.float64)
    weights = np.ones(len(scores)) if weights is None else weights
    order = np.argsort(-scores, kind="stable")
    ordered, good = scores[order], labels[order] > 0
    hits = np.cumsum(weights[order] * good)
    taken = np.cumsum(weights[order])
    value = goal(hits, taken, hits[-1], taken[-1])
    value[:-1][ordered[:-1] == ordered[1:]] = -1  # a threshold cannot part equal scores
    last = int(np.argmax(value))
    if value[last] < 0:
        raise DataError(f"no threshold reaches {by} on the {len(scores)} validation pairs")
    below = ordered[last + 1] if last + 1 < len(ordered) else ordered[last]
    return float(0.5 * (ordered[last] + below))


STRATEGIES = ("accuracy", "f_beta", "max_tpr", "max_tnr")
"""What `best_cut` can choose by, in metric-learn's names."""


def best_cut(
    scores: np.ndarray,
    labels: np.ndarray,
    strategy: str = "accuracy",
    min_rate: float | None = None,
    beta: float = 1.0,
) -> float:
    """Return the best threshold, half-way between two scores, or beyond all of them.

    Of equally good ones it is the highest. With `find_threshold` it differs in that no pair at all
    may be taken.

    Parameters
    ----------
    scores : (M,) float.
    labels : (M,) 0 or 1, both present.
    strategy : "accuracy"; "f_beta"; "max_tpr", the highest rate of good pairs taken where at least
        `min_rate` of the bad ones are not; "max_tnr", the highest rate of bad pairs not taken
        where at least `min_rate` of the good ones are.
    min_rate : from 0 to 1, for the last two alone.
    beta : above 0, for "f_beta".

    Raises
    ------
    ArgumentError : a parameter cannot be used.
    DataError : labels of one kind.
    """
    check_cut(strategy, min_rate, beta)
    labels = np.asarray(labels) > 0
    if labels.all() or not labels.any():
        raise DataError("all validation pairs have one label: a threshold needs good and bad ones")
    scores = np.asarray(scores, np.float64)
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    hits = np.concatenate([[0], np.cumsum(labels[order])])  # of the first 0, 1, 2 ... pairs
    taken = np.arange(len(scores) + 1)
    good, bad = hits[-1], len(scores) - hits[-1]
    kept_out = bad - (taken - hits)
    if strategy == "accuracy":
        value = (hits + kept_out).astype(np.float64)
    elif strategy == "f_beta":
        value = (1 + beta**2) * hits / (beta**2 * good + taken)
    else:
        rates = hits / good, kept_out / bad
        wanted, floor = rates if strategy == "max_tpr" else rates[::-1]
        value = np.where(floor >= min_rate, wanted, -1.0)
    value[1:-1][ordered[:-1] == ordered[1:]] = -1  # a threshold cannot part equal scores
    best = int(np.argmax(value))
    if best == 0:
        return float(np.nextafter(ordered[0], np.inf))
    if best == len(scores):
        return float(ordered[-1])
    return float(0.5 * (ordered[best - 1] + ordered[best]))


def check_cut(strategy: str = "accuracy", min_rate: float | None = None, beta: float = 1) -> None:
    """Refuse parameters that `best_cut` cannot use."""
    if strategy not in STRATEGIES:
        raise ArgumentError(f"strategy is {strategy!r}, expected one of {', '.join(STRATEGIES)}")
    rated = strategy in ("max_tpr", "max_tnr")
    if rated and (min_rate is None or not 0 <= min_rate <= 1):
        raise ArgumentError(f"min_rate is {min_rate!r}, expected a rate from 0 to 1 for {strategy}")
    if not rated and min_rate is not None:
        raise ArgumentError(f"min_rate is for max_tpr and max_tnr, not for {strategy}")
    if not 0 < beta < np.inf or (beta != 1 and strategy != "f_beta"):
        raise ArgumentError(f"beta is {beta!r}, expected a number above 0, for f_beta alone")


Goal = Callable[[np.ndarray, np.ndarray, float, float], np.ndarray]


def _goal(by: str) -> Goal:
    """Return how good it is to take pairs: (good ones taken, taken, good ones, all) -> (M,)."""
    beta = re.fullmatch(r"f(\d+(?:\.\d+)?)", by)
    floor = re.fullmatch(r"(precision|recall)=(0?\.\d+|0|1(?:\.0+)?)", by)
    if by == "accuracy":
        return lambda hits, taken, good, count: (count - taken - good + 2 * hits) / count
    if beta and float(beta[1]) > 0:
        square = float(beta[1]) ** 2
        return lambda hits, taken, good, _: (1 + square) * hits / (square * good + taken)
    if floor:
        least = float(floor[2])

        def above(hits: np.ndarray, taken: np.ndarray, good: float, _: float) -> np.ndarray:
            precision, recall = hits / np.maximum(taken, 1e-300), hits / good
            kept, wanted = (precision, recall) if floor[1] == "precision" else (recall, precision)
            return np.where(kept >= least * (1 - 1e-12), wanted, -1.0)

        return above
    raise ArgumentError(
        f"threshold-by is {by!r}, expected f1, f0.5, accuracy, precision=0.9 or recall=0.9"
    )
