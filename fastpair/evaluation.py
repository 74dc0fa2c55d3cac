"""How good scores are: metrics from scikit-learn and SciPy, with intervals, beside baselines.

Intervals come from a bootstrap over entities, because pairs that share an entity are not
independent of each other; see `entity_weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastpair.errors import ArgumentError, DataError
from fastpair.heads import unit_rows
from fastpair.model import sigmoid

if TYPE_CHECKING:
    from fastpair.model import Model

PCA_COLUMNS = 64
"""Columns of the unlabelled PCA that a learned similarity is compared with."""

PROBABILITY_BINS = 10
"""Equal bins of the expected calibration error."""

CONFIDENCE = 0.95
"""Share of the bootstrap draws that lie within an interval."""

LEAST_DEFINED = 0.25
"""Share of the draws in which a metric must be defined to have an interval."""

SHARE_DRAWN = 0.25
"""How often a draw of the bootstrap takes an entity, on average; see `entity_weights`."""

MOST_STEPS = 1 << 16
"""Scores that the bootstrap tells apart: more are taken together in equal numbers."""

LEAST_PROBABILITY = float(np.finfo(np.float64).eps)
"""What probabilities of 0 count as in the log loss, as scikit-learn does."""


def evaluate_scores(
    scores: np.ndarray,
    labels: np.ndarray,
    *,
    threshold: float | None = None,
    good: float | None = None,
    graded: bool = False,
    unit: str = "similarity",
    probability: np.ndarray | None = None,
) -> dict[str, Any]:
    """Measure scores of pairs against their labels.

    Parameters
    ----------
    scores : (M,) float; higher means more similar.
    labels : (M,) float; 0 or 1, or grades.
    threshold : pairs of at least this score count as taken; adds f1, precision and recall.
    good : a label of at least this counts as a good pair; default: 1 where labels are 0 or 1.
    graded : whether labels are grades; then only `good` makes pairs good or bad.
    unit : what a score means; "log-odds" adds log_loss, brier and ece (expected calibration error),
        "grade" adds rmse and mae (root mean square and mean absolute error).
    probability : (M,) float, of being good; default the sigmoid of scores that are log-odds.

    Returns
    -------
    metrics : numbers by name, None where the labels do not define one; ``notes`` says why.

    Raises
    ------
    DataError : a score or label is NaN, or labels are neither 0/1 nor told apart by `good`.
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn import metrics

    scores, labels = _checked(scores, labels)
    result: dict[str, Any] = dict.fromkeys(("auc", "average_precision", "eer"))
    result |= {"spearman": None, "pearson": None}
    if unit == "grade" and len(scores):
        result["rmse"] = float(np.sqrt(np.mean((scores - labels) ** 2)))
        result["mae"] = float(np.mean(np.abs(scores - labels)))
    notes: list[str] = []
    if scores.size and np.ptp(scores) > 0 and np.ptp(labels) > 0:
        result["spearman"] = float(spearmanr(scores, labels).statistic)
        result["pearson"] = float(pearsonr(scores, labels).statistic)
    else:
        notes.append("spearman and pearson are not defined: all scores or all labels are the same")
    result["n_pairs"] = len(scores)
    result["n_good"] = None
    result["notes"] = notes
    truth = good_pairs(labels, good, graded)
    if truth is None:
        notes.append("auc and average_precision need to know from which grade on a pair is good")
        return result
    n_good = result["n_good"] = int(truth.sum())
    if 0 < n_good < len(truth):
        result["auc"] = float(metrics.roc_auc_score(truth, scores))
        result["average_precision"] = float(metrics.average_precision_score(truth, scores))
        false, true, _ = metrics.roc_curve(truth, scores, drop_intermediate=False)
        result["eer"] = _equal_error(false, 1 - true)
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
    if (unit == "log-odds" or probability is not None) and len(scores):
        chance, loss = _probabilities(scores, truth, probability)
        result["log_loss"] = float(loss.mean())
        result["brier"] = float(((chance - truth) ** 2).mean())
        result["ece"] = _calibration_error(_bins(chance), chance - truth, np.ones(len(chance)))
    return result


def _equal_error(false: np.ndarray, missed: np.ndarray) -> float:
    """Where shares of bad pairs taken (rising) and of good pairs missed (falling) are equal."""
    at = int(np.argmax(false >= missed))
    if at == 0:
        return float(false[0])
    # On the line between two corners of the curve.
    before, after = missed[at - 1] - false[at - 1], missed[at] - false[at]
    share = before / (before - after)
    return float(false[at - 1] + share * (false[at] - false[at - 1]))


def _probabilities(
    scores: np.ndarray, truth: np.ndarray, probability: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the probability of being good and the logarithmic loss of each pair, (M,) each."""
    if probability is None:
        # log(1 + exp(.)) directly: probabilities would round to 0 or 1 for confident scores.
        loss = np.logaddexp(0, np.where(truth, -scores, scores))
        return sigmoid(scores), loss
    chance = np.asarray(probability, np.float64)
    of_truth = np.where(truth, chance, 1 - chance)
    return chance, -np.log(np.maximum(of_truth, LEAST_PROBABILITY))


def _bins(chance: np.ndarray) -> np.ndarray:
    return np.minimum((chance * PROBABILITY_BINS).astype(np.int64), PROBABILITY_BINS - 1)


def _calibration_error(bins: np.ndarray, excess: np.ndarray, weights: np.ndarray) -> float:
    """Mean over pairs of how far their bin's mean probability is from its share of good pairs."""
    apart = np.bincount(bins, weights * excess, PROBABILITY_BINS)
    return float(np.abs(apart).sum() / weights.sum())


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


def good_pairs(labels: np.ndarray, good: float | None, graded: bool) -> np.ndarray | None:
    """Return which pairs are good, (M,) bool, or None where grades do not say it.

    Raises
    ------
    DataError : labels are not 0 or 1, and neither `good` nor `graded` says what they are.
    """
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


# --- what needs no labels -------------------------------------------------------------------------


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


def pca_model(embeddings: np.ndarray, columns: int = PCA_COLUMNS) -> Model:
    """Return the similarity of the unlabelled PCA: minus the distance in principal components.

    Parameters
    ----------
    embeddings : (N, n) float; all of them, brought to unit length and centred first.
    columns : principal components to keep, at most n.
    """
    from fastpair.model import Branch, Model, Preparation
    from fastpair.towers import Linear

    total, moment = np.zeros(embeddings.shape[1]), np.zeros((embeddings.shape[1],) * 2)
    for start in range(0, len(embeddings), 65536):
        rows, _ = unit_rows(np.asarray(embeddings[start : start + 65536], np.float64))
        total += rows.sum(axis=0)
        moment += rows.T @ rows
    mean = total / max(len(embeddings), 1)
    _, directions = np.linalg.eigh(moment / max(len(embeddings), 1) - np.outer(mean, mean))
    # No mean is taken off: it makes no difference to differences.
    tower = Linear(np.ascontiguousarray(directions[:, ::-1][:, :columns].T))
    return Model(
        [Branch("sqdiff", {"weight": -np.ones(1)}, tower)],
        embeddings.shape[1],
        Preparation(unit_rows=True),
        link="negative_root",
        description={"pca": columns, "learned": False},
    )


# --- intervals ------------------------------------------------------------------------------------


def entity_weights(
    left: np.ndarray, right: np.ndarray, draws: int, seed: int = 0
) -> Iterator[np.ndarray]:
    """Yield how often each pair counts in a draw of the bootstrap over entities.

    A draw takes entities with replacement, each with all of its pairs; a pair can come with
    either of its ends. Of the entities only `SHARE_DRAWN` are drawn: two pairs that share an
    entity then vary together as much as each varies by itself, which is what one knows without
    assuming more (with as many draws as entities it would be a quarter). An entity of only one
    pair shares nothing and is not drawn by itself; a pair of two such entities is drawn alone.

    Parameters
    ----------
    left, right : (M,) integer row numbers of the entities.
    draws : how many.
    seed : of all chance.

    Yields
    ------
    weights : (M,) float64, not negative, about 1 in the mean.
    """
    rng = np.random.default_rng(seed)
    entities, numbers = np.unique(np.concatenate([left, right]), return_inverse=True)
    a, b = numbers[: len(left)], numbers[len(left) :]
    pairs_of = np.bincount(a, minlength=len(entities)) + np.bincount(b, minlength=len(entities))
    pairs_of -= np.bincount(a[a == b], minlength=len(entities))
    shared = pairs_of > 1
    alone = np.flatnonzero(~shared[a] & ~shared[b])
    for _ in range(draws):
        drawn = np.where(shared, rng.poisson(SHARE_DRAWN, len(entities)) / SHARE_DRAWN, 1)
        weights = 0.5 * (drawn[a] + drawn[b])
        weights[alone] = rng.poisson(1, len(alone))
        yield weights


@dataclass(frozen=True)
class Scored:
    """Pairs under one similarity.

    Parameters
    ----------
    scores : (M,) float.
    threshold, unit, probability : as `evaluate_scores` takes them.
    """

    scores: np.ndarray
    threshold: float | None = None
    unit: str = "similarity"
    probability: np.ndarray | None = None

    def part(self, rows: np.ndarray) -> Scored:
        """Return the same for some of the pairs."""
        probability = None if self.probability is None else self.probability[rows]
        return Scored(self.scores[rows], self.threshold, self.unit, probability)


class WeightedMetrics:
    """The metrics of `evaluate_scores` when pairs count differently often, made for many draws.

    What does not depend on the weights is done once; weights of ones give the plain metrics.
    Correlations are there for grades alone.

    Parameters
    ----------
    scored : the pairs.
    labels : (M,) float.
    truth : (M,) bool, which pairs are good, or None.
    """

    def __init__(self, scored: Scored, labels: np.ndarray, truth: np.ndarray | None) -> None:
        scores, labels = _checked(scored.scores, labels)
        self.truth = truth
        self._scores, self._labels = scores, labels
        self._score_steps, self._label_steps = _steps(-scores), _steps(-labels)
        # Correlations with labels of two values say nothing that ranking metrics do not.
        self._graded = self._label_steps.max(initial=0) > 1
        self._taken = None if scored.threshold is None else scores >= scored.threshold
        self._loss: np.ndarray | None = None
        if truth is not None and (scored.unit == "log-odds" or scored.probability is not None):
            chance, self._loss = _probabilities(scores, truth, scored.probability)
            self._excess, self._bins = chance - truth, _bins(chance)

    def __call__(self, weights: np.ndarray) -> dict[str, float]:
        """Return metrics by name under weights (M,); those not defined are left out."""
        found: dict[str, float] = {}
        total = weights.sum()
        if total <= 0:
            return found
        if self._graded:
            found |= self._correlations(weights)
        if self.truth is None:
            return found
        good = weights * self.truth
        if 0 < good.sum() < total:
            found |= self._ranking(weights, good)
        if self._taken is not None:
            hits, taken = good @ self._taken, weights @ self._taken
            found["f1"] = 2 * hits / max(taken + good.sum(), 1e-300)
            if taken > 0:
                found["precision"] = hits / taken
            if good.sum() > 0:
                found["recall"] = hits / good.sum()
        if self._loss is not None:
            found["log_loss"] = weights @ self._loss / total
            found["brier"] = weights @ self._excess**2 / total
            found["ece"] = _calibration_error(self._bins, self._excess, weights)
        return {name: float(value) for name, value in found.items()}

    def _correlations(self, weights: np.ndarray) -> dict[str, float]:
        ranks = (
            _middle_ranks(weights, self._score_steps),
            _middle_ranks(weights, self._label_steps),
        )
        both = {
            "spearman": _correlation(*ranks, weights),
            "pearson": _correlation(self._scores, self._labels, weights),
        }
        return {name: value for name, value in both.items() if value is not None}

    def _ranking(self, weights: np.ndarray, good: np.ndarray) -> dict[str, float]:
        """Return auc, average precision and equal error rate from the counts above each score."""
        hits = np.cumsum(np.bincount(self._score_steps, good))
        wrong = np.cumsum(np.bincount(self._score_steps, weights - good))
        false, true = wrong / wrong[-1], hits / hits[-1]
        above, gained = np.concatenate([[0.0], false]), np.concatenate([[0.0], true])
        taken = hits + wrong
        precision = np.divide(hits, taken, out=np.zeros_like(hits), where=taken > 0)
        return {
            "auc": float(np.trapezoid(gained, above)),
            "average_precision": float(np.diff(gained) @ precision),
            "eer": _equal_error(above, 1 - gained),
        }


def _steps(values: np.ndarray) -> np.ndarray:
    """Number values (M,) from the least on, equal ones alike; `MOST_STEPS` numbers at most."""
    different, numbers = np.unique(values, return_inverse=True)
    return numbers // max(1, -(-len(different) // MOST_STEPS))


def _middle_ranks(weights: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return ranks of weighted values; those on one step share the middle of theirs."""
    counts = np.bincount(steps, weights)
    return (np.cumsum(counts) - 0.5 * counts)[steps]


def _correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float | None:
    total = weights.sum()
    x, y = x - weights @ x / total, y - weights @ y / total
    spread = (weights @ (x * x)) * (weights @ (y * y))
    return float((weights @ (x * y)) / spread**0.5) if spread > 0 else None


def measure(
    similarities: dict[str, Scored],
    labels: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    *,
    good: float | None = None,
    graded: bool = False,
    draws: int = 0,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Measure similarities on the same pairs, with intervals from the bootstrap over entities.

    Parameters
    ----------
    similarities : the pairs' scores by the name of the similarity; the first is what is compared.
    labels, good, graded : as `evaluate_scores` takes them.
    left, right : (M,) integer row numbers of the entities.
    draws : of the bootstrap; 0: no intervals.
    seed : of the bootstrap.

    Returns
    -------
    metrics : those of `evaluate_scores` by the name of the similarity. With draws, ``intervals``
        has [low, high] by the name of the metric, of those that at least `LEAST_DEFINED` of the
        draws define; in all similarities but the first, ``gain`` has ``value`` and ``interval`` of
        what the first one has more, draw by draw.
    """
    found = {
        name: evaluate_scores(
            scored.scores,
            labels,
            threshold=scored.threshold,
            unit=scored.unit,
            probability=scored.probability,
            good=good,
            graded=graded,
        )
        for name, scored in similarities.items()
    }
    if not draws or not len(labels):
        return found
    labels = np.asarray(labels, np.float64)
    truth = good_pairs(labels, good, graded)
    metrics = [WeightedMetrics(scored, labels, truth) for scored in similarities.values()]
    drawn: list[list[dict[str, float]]] = [[] for _ in metrics]
    for weights in entity_weights(left, right, draws, seed):
        for values, metric in zip(drawn, metrics, strict=True):
            values.append(metric(weights))
    first = next(iter(similarities))
    for (name, result), values in zip(found.items(), drawn, strict=True):
        result["intervals"] = {
            key: _interval_of(key, result[key], own)
            for key, own in _by_metric(values).items()
            if result.get(key) is not None
        }
        if name != first:
            pairs = zip(drawn[0], values, strict=True)
            gains = _by_metric([{k: a[k] - b[k] for k in a if k in b} for a, b in pairs])
            result["gain"] = {
                key: {"value": found[first][key] - result[key], "interval": interval(own)}
                for key, own in gains.items()
                if found[first].get(key) is not None and result.get(key) is not None
            }
    return found


def _by_metric(drawn: list[dict[str, float]]) -> dict[str, list[float]]:
    """Return the values of each metric that `LEAST_DEFINED` of the draws define, by its name."""
    names = dict.fromkeys(name for one in drawn for name in one)
    found = {name: [one[name] for one in drawn if name in one] for name in names}
    return {name: own for name, own in found.items() if len(own) >= LEAST_DEFINED * len(drawn)}


def _interval_of(key: str, estimate: float, values: list[float]) -> list[float]:
    if key != "ece":
        return interval(values)
    # Every draw adds chance to a mean of absolute differences: that much is taken off again.
    return interval(np.maximum(np.array(values) - np.mean(values) + estimate, 0))


def interval(values: list[float] | np.ndarray) -> list[float]:
    """Return [low, high] between which `CONFIDENCE` of the values lie."""
    rest = 0.5 * (1 - CONFIDENCE)
    return np.quantile(values, [rest, 1 - rest]).tolist()


# --- parts of the pairs ---------------------------------------------------------------------------


def seen_groups(
    left: np.ndarray, right: np.ndarray, seen: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the pairs with both, one or no entity seen in training, as a name and row numbers.

    Parameters
    ----------
    left, right : (M,) integer row numbers.
    seen : (N,) bool, which entities were in a training pair.
    """
    count = seen[left].astype(np.int64) + seen[right]
    for number, name in ((2, "both seen"), (1, "one seen"), (0, "none seen")):
        yield name, np.flatnonzero(count == number)


def complete_group(rows: np.ndarray, truth: np.ndarray | None) -> tuple[np.ndarray, str | None]:
    """Add all pairs of the kind, good or bad, that a group of pairs lacks.

    Parameters
    ----------
    rows : numbers of the group's pairs.
    truth : (M,) bool, which pairs are good, or None.

    Returns
    -------
    rows : the pairs to measure.
    added : "good" or "bad", the kind of the pairs that were added, or None.
    """
    if truth is None or not len(rows) or (truth[rows].any() and not truth[rows].all()):
        return rows, None
    lacking = not truth[rows[0]]
    others = np.flatnonzero(truth == lacking)
    if not len(others):
        return rows, None
    return np.concatenate([rows, others]), "good" if lacking else "bad"


def measure_mean(
    values: np.ndarray, left: np.ndarray, right: np.ndarray, draws: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Return the mean of each column of values (M, c), with its interval over entities."""
    found: list[dict[str, Any]] = [{"value": float(mean)} for mean in values.mean(axis=0)]
    if draws:
        means = [
            weights @ values / weights.sum()
            for weights in entity_weights(left, right, draws, seed)
            if weights.any()
        ]
        for result, column in zip(found, np.transpose(means), strict=True):
            result["interval"] = interval(column)
    return found


TopK = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""(query rows, candidate rows, k) -> places among the candidates, best first, or -1, and scores,
(queries, k) each."""


def partner_ranks(
    left: np.ndarray,
    right: np.ndarray,
    candidates: np.ndarray,
    most: int,
    top_k: TopK,
) -> np.ndarray:
    """Return which place the right entity of each pair has among all candidates for the left one.

    Parameters
    ----------
    left, right : (M,) integer row numbers of pairs, usually of the good ones.
    candidates : sorted row numbers; a left entity is no candidate for itself.
    most : places that are looked at.
    top_k : finds the best candidates.

    Returns
    -------
    places : (M,) int64, from 0 (the best) on; `most` for all that are further down.
    """
    queries, numbers = np.unique(left, return_inverse=True)
    best, _ = top_k(queries, candidates, most + 1)
    found = np.where(best < 0, -1, candidates[np.maximum(best, 0)])
    itself = found == queries[:, None]
    # Without the entity itself, what stood behind it moves up by one.
    place = np.arange(found.shape[1]) - (np.cumsum(itself, axis=1) > 0)
    match = (found[numbers] == right[:, None]) & ~itself[numbers]
    at = np.argmax(match, axis=1)
    places = place[numbers, at]
    return np.where(match.any(axis=1) & (places < most), places, most)
