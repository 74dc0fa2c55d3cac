"""How good scores are: ranking, decision and calibration metrics from scikit-learn and SciPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastpair.errors import ArgumentError, DataError
from fastpair.heads import unit_rows


def evaluate_scores(
    scores: np.ndarray,
    labels: np.ndarray,
    *,
    threshold: float | None = None,
    good: float | None = None,
    graded: bool = False,
    unit: str = "similarity",
) -> dict[str, Any]:
    """Measure scores of pairs against their labels.

    Parameters
    ----------
    scores : (M,) float; higher means more similar.
    labels : (M,) float; 0 or 1, or grades.
    threshold : pairs of at least this score count as taken; adds f1, precision and recall.
    good : a label of at least this counts as a good pair; default: 1 where labels are 0 or 1.
    graded : whether labels are grades; then only `good` makes pairs good or bad.
    unit : what a score means; "log-odds" adds log_loss and brier.

    Returns
    -------
    metrics : numbers by name, None where the labels do not define one; ``notes`` says why.

    Raises
    ------
    DataError : a score or label is NaN, or labels are neither 0/1 nor told apart by `good`.
    """
    from scipy.stats import spearmanr
    from sklearn import metrics

    scores, labels = _checked(scores, labels)
    result: dict[str, Any] = {"auc": None, "average_precision": None, "spearman": None}
    notes: list[str] = []
    if scores.size and np.ptp(scores) > 0 and np.ptp(labels) > 0:
        result["spearman"] = float(spearmanr(scores, labels).statistic)
    else:
        notes.append("spearman is not defined: all scores or all labels are the same")
    result["n_pairs"] = len(scores)
    result["n_good"] = None
    result["notes"] = notes
    truth = _good_pairs(labels, good, graded)
    if truth is None:
        notes.append("auc and average_precision need to know from which grade on a pair is good")
        return result
    n_good = result["n_good"] = int(truth.sum())
    if 0 < n_good < len(truth):
        result["auc"] = float(metrics.roc_auc_score(truth, scores))
        result["average_precision"] = float(metrics.average_precision_score(truth, scores))
    else:
        kind = "good" if n_good else "bad"
        notes.append(f"auc and average_precision are not defined: all pairs are {kind}")
    if threshold is not None:
        result["threshold"] = float(threshold)
        taken = scores >= threshold
        hits = int((taken & truth).sum())
        result["f1"] = 2 * hits / max(int(taken.sum()) + n_good, 1)
        result["precision"] = hits / int(taken.sum()) if taken.any() else None
        result["recall"] = hits / n_good if n_good else None
    if unit == "log-odds" and len(scores):
        # log(1 + exp(.)) directly: probabilities would round to 0 or 1 for confident scores.
        result["log_loss"] = float(np.logaddexp(0, np.where(truth, -scores, scores)).mean())
        probability = 0.5 * (1 + np.tanh(0.5 * scores))
        result["brier"] = float(((probability - truth) ** 2).mean())
    return result


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the threshold with the largest F1, half-way to the next score below it.

    Parameters
    ----------
    scores : (M,) float.
    labels : (M,) float or bool; above 0 is good; both kinds must occur.
    """
    scores, labels = _checked(scores, labels)
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    hits = np.cumsum(labels[order] > 0)
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + hits[-1])
    f1[:-1][ordered[:-1] == ordered[1:]] = -1  # a threshold cannot part equal scores
    last = int(np.argmax(f1))
    below = ordered[last + 1] if last + 1 < len(ordered) else ordered[last]
    return float(0.5 * (ordered[last] + below))


def raw_cosine(embeddings: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Compute the cosine of pairs of rows, the baseline that a learned similarity must beat.

    Parameters
    ----------
    embeddings : (N, n) float.
    left, right : (M,) integer row numbers.

    Returns
    -------
    cosine : (M,) float64; the zero vector has cosine 0 with everything.
    """
    used, number = np.unique(np.concatenate([left, right]), return_inverse=True)
    unit, _ = unit_rows(np.asarray(embeddings[used], np.float64))
    cosine = np.empty(len(left))
    for start in range(0, len(left), 65536):
        block = slice(start, min(start + 65536, len(left)))
        rows = unit[number[: len(left)][block]], unit[number[len(left) :][block]]
        cosine[block] = np.einsum("ij,ij->i", *rows)
    return cosine


def _checked(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ArgumentError(
            f"scores have shape {scores.shape} and labels {labels.shape}, expected one of each "
            "for every pair"
        )
    for name, values in (("score", scores), ("label", labels)):
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            raise DataError(
                f"the {name} of pair {wrong[0]} is {values[wrong[0]]}, expected a finite number "
                f"({len(wrong)} of {len(values)} pairs are like that)"
            )
    return scores, labels


def _good_pairs(labels: np.ndarray, good: float | None, graded: bool) -> np.ndarray | None:
    if good is not None:
        return labels >= good
    if graded:
        return None
    wrong = labels[(labels != 0) & (labels != 1)]
    if len(wrong):
        raise DataError(
            f"labels must be 0 (bad) or 1 (good) but {wrong[0]:g} came: for grades, say from "
            "which one on a pair is good"
        )
    return labels == 1
