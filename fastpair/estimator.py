"""The scikit-learn face: learn from pairs, score and predict pairs, project points.

Conventions are those of scikit-learn, and those of metric-learn for estimators that take pairs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import RegressorTags, TransformerTags, check_random_state
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d

from fastpair.arms import choose_arms, learns_a_metric
from fastpair.calibration import best_cut, check_cut
from fastpair.errors import ArgumentError, DataError
from fastpair.frames import ArrayLike, as_array, as_matrix, as_numbers, as_row_numbers
from fastpair.functions import distinct_rows, score_pairs
from fastpair.learner import rank_quality
from fastpair.metric import Metric, find_metric, mahalanobis, projected
from fastpair.model import Model
from fastpair.training import train

PAIRS_AT_ONCE = 1 << 14
"""Pairs whose embeddings are folded together where pairs come as embeddings."""

_SETTINGS = (
    *("head", "dim", "tower", "start", "loss", "preparation", "density", "dropout"),
    *("learning_rate", "pull", "epochs", "arms", "batch", "balance", "reflexive", "transitive"),
    *("close_positives", "consistency", "calibrate", "threshold_by", "prior", "graded", "threads"),
)
"""Parameters that go to `fastpair.training.train` under their own names."""


class PairSimilarity(ClassifierMixin, BaseEstimator):
    """Learn how similar two things are from good and bad pairs of embeddings.

    It is fitted to pairs, (n, 2, d) embeddings or (n, 2) row numbers of a `preprocessor`, with a
    label each; of two labels the greater one says similar. Scores are calibrated log-odds: higher
    is more similar. With `graded`, labels are grades and so are scores.

    Parameters
    ----------
    head : what compares two projected embeddings, names of `fastpair.heads.HEADS` joined by "+";
        default "cosine+absdiff". "mahalanobis" always learns a metric.
    dim : columns that embeddings are projected to; default as many as there are.
    tower : "linear" (the default), "identity" or "mlp", see `fastpair.towers.parse_tower`.
    start, loss, preparation, density, dropout, learning_rate, pull, epochs : settings of
        `fastpair.arms.Arm`; None, the default, keeps those of every arm. For the head mahalanobis
        the default preparation is "scaling", so that the metric is one of embeddings as they are.
    arms : names of `fastpair.arms.ARMS` joined by ","; default all, of which the best is kept.
    batch, balance, reflexive, transitive, close_positives, consistency : see
        `fastpair.training.train`.
    calibrate : "platt" (the default), "isotonic" or "temperature".
    threshold_by : what the threshold is chosen by: "f1" (the default), "accuracy", "f0.5",
        "precision=0.9" or "recall=0.9".
    prior : share of good pairs where scores will be used; default as in the validation pairs.
    graded : labels are grades, to be predicted.
    preprocessor : (N, d) embeddings that pairs are row numbers of; or a function that takes a
        column of indicators (n,) and returns their embeddings (n, d).
    random_state : int from 0 on, a RandomState or None; default 0.
    threads : number of threads; default one for each processor. It changes no result.

    Attributes
    ----------
    model_ : the `fastpair.model.Model`.
    classes_ : (2,) the labels, the one for similar last; not with `graded`.
    threshold_ : score from which on a pair is predicted to be similar; not with `graded`.
    n_features_in_ : d.
    history_, arms_, notes_ : what was learned and decided, see `fastpair.training.TrainingResult`.
    components_ : (k, d) L of a Mahalanobis metric, d(x, y) = abs(L (x - y)); where there is one.
    """

    model_: Model
    classes_: np.ndarray
    n_features_in_: int

    def __init__(
        self,
        head: str = "cosine+absdiff",
        dim: int | None = None,
        *,
        tower: str = "linear",
        start: str | None = None,
        loss: str | None = None,
        preparation: str | None = None,
        density: bool | None = None,
        dropout: float | None = None,
        learning_rate: float | None = None,
        pull: float | None = None,
        epochs: int | None = None,
        arms: str | None = None,
        batch: int = 256,
        balance: bool = False,
        reflexive: float = 0.0,
        transitive: float = 0.0,
        close_positives: bool = False,
        consistency: float | None = None,
        calibrate: str = "platt",
        threshold_by: str = "f1",
        prior: float | None = None,
        graded: bool = False,
        preprocessor: ArrayLike | Callable[[np.ndarray], ArrayLike] | None = None,
        random_state: Any = 0,
        threads: int | None = None,
    ) -> None:
        self.head = head
        self.dim = dim
        self.tower = tower
        self.start = start
        self.loss = loss
        self.preparation = preparation
        self.density = density
        self.dropout = dropout
        self.learning_rate = learning_rate
        self.pull = pull
        self.epochs = epochs
        self.arms = arms
        self.batch = batch
        self.balance = balance
        self.reflexive = reflexive
        self.transitive = transitive
        self.close_positives = close_positives
        self.consistency = consistency
        self.calibrate = calibrate
        self.threshold_by = threshold_by
        self.prior = prior
        self.graded = graded
        self.preprocessor = preprocessor
        self.random_state = random_state
        self.threads = threads

    # --- fitting ---

    def fit(
        self,
        pairs: ArrayLike,
        y: ArrayLike = None,
        sample_weight: ArrayLike = None,
        *,
        pairs_valid: ArrayLike = None,
        y_valid: ArrayLike = None,
        calibration_params: dict[str, Any] | None = None,
    ) -> PairSimilarity:
        """Learn from labelled pairs.

        Parameters
        ----------
        pairs : (n, 2, d) embeddings; or (n, 2) indicators where there is a `preprocessor`.
        y : (n,) +1 and -1, 1 and 0, or another two numbers of which the greater says similar;
            grades with `graded`.
        sample_weight : (n,) how much each pair counts in learning, at least 0; default the same.
        pairs_valid, y_valid : validation pairs and labels; default: some pairs are set aside, by
            entity where that can be.
        calibration_params : arguments of `calibrate_threshold`, which is then called with `pairs`
            and `y`; better call it yourself with pairs that were not learned from.

        Raises
        ------
        ArgumentError, DataError : a parameter, pairs or labels cannot be used.
        """
        if (pairs_valid is None) != (y_valid is None):
            raise ArgumentError("pairs_valid and y_valid go together: give both or none")
        if calibration_params is not None and self.graded:
            raise ArgumentError("calibration_params are for a threshold, which grades do not have")
        check_cut(**(calibration_params or {}))
        rows, left, right = self._entities(pairs)
        (labels, classes), held = self._fit_labels(y, len(left)), None
        if calibration_params is not None and np.ptp(labels) == 0:
            raise DataError("y has one class alone: calibration_params need good and bad pairs")
        if pairs_valid is not None:
            more, *ends = self._entities(pairs_valid, rows.shape[1])
            known = self._known_labels(y_valid, len(ends[0]), classes)
            held = ends[0] + len(rows), ends[1] + len(rows), known
            rows = np.concatenate([rows, more])
        first, same = distinct_rows(rows)  # what is equal is one entity, wherever it stands
        rows, left, right = rows[first], same[left], same[right]
        if held is not None:
            held = same[held[0]], same[held[1]], held[2]
        weights = self._weights(sample_weight, labels)
        result = train(
            rows,
            left,
            right,
            labels,
            valid=held,
            weights=weights,
            seed=self._seed(),
            **self._settings(rows.shape[1]),
        )
        if classes is not None:
            self.classes_ = classes
        elif hasattr(self, "classes_"):
            del self.classes_  # of an earlier fit
        self.model_, self.n_features_in_ = result.model, rows.shape[1]
        self.history_, self.arms_, self.notes_ = result.history, result.arms, result.notes
        if calibration_params is not None:
            self.calibrate_threshold(pairs, y, **calibration_params)
        return self

    def _settings(self, columns: int) -> dict[str, Any]:
        """Return what `train` takes of the parameters."""
        settings = {name: getattr(self, name) for name in _SETTINGS}
        if settings["preparation"] is None:
            named = {"head": self.head, "tower": self.tower, "dim": self.dim}
            if learns_a_metric(choose_arms(self.arms, named, columns)):
                settings["preparation"] = "scaling"
        return settings

    def _seed(self) -> int:
        if isinstance(self.random_state, (int, np.integer)):
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _fit_labels(self, y: ArrayLike, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return labels (n,) float64 as they are learned, and classes (2,) or None for grades."""
        if y is None:
            raise ArgumentError(
                "PairSimilarity requires y to be passed, but the target y is None: a label a pair"
            )
        labels = column_or_1d(as_array(y, "y"), warn=True)
        check_consistent_length(labels, np.empty(count))
        if self.graded:
            return as_numbers(labels, "y").astype(np.float64), None
        check_classification_targets(labels)
        if labels.dtype.kind not in "fiub":
            raise ArgumentError(
                f"y is {labels.dtype}, expected numbers, of which the greater says similar: 1 and "
                "-1, or 1 and 0"
            )
        classes = np.unique(labels)
        if len(classes) > 2:
            raise ArgumentError(
                "Only binary classification is supported. The type of the target is "
                f"{type_of_target(labels)}: for grades, say graded=True"
            )
        if len(classes) < 2:
            if self.loss != "sampled" or classes[0] != 1:
                raise DataError(
                    f"y has one class alone, {classes[0]}: a similarity is learned from good and "
                    "bad pairs; from good ones alone, labelled 1, with loss='sampled'"
                )
            classes = np.array([-1, 1], labels.dtype if labels.dtype.kind in "fi" else np.int64)
        return (labels == classes[1]).astype(np.float64), classes

    def _weights(self, sample_weight: ArrayLike, labels: np.ndarray) -> np.ndarray | None:
        """Return weights (n,) or None; refuse those of which nothing or one class is left."""
        if sample_weight is None:
            return None
        weights = as_array(sample_weight, "sample_weight")
        if weights.shape != labels.shape:
            raise ArgumentError(
                f"sample_weight has shape {weights.shape}, expected one a pair: {labels.shape}"
            )
        weights = as_numbers(weights, "sample_weight")
        if (weights < 0).any():
            first = int(np.argmax(weights < 0))
            raise DataError(f"sample_weight {first} is {weights[first]:g}, expected 0 or more")
        if not weights.any():
            raise DataError("every sample_weight is zero: nothing counts")
        if not self.graded and self.loss != "sampled" and np.ptp(labels[weights > 0]) == 0:
            raise DataError(
                "pairs with a sample_weight above zero have one class alone: weigh others too"
            )
        return weights

    def _known_labels(
        self, y: ArrayLike, count: int, classes: np.ndarray | None = None
    ) -> np.ndarray:
        """Return labels (n,) float64 of pairs that are not learned from; by default as fitted."""
        labels = column_or_1d(as_array(y, "y"), warn=True)
        check_consistent_length(labels, np.empty(count))
        if self.graded:
            return as_numbers(labels, "y").astype(np.float64)
        low, high = classes = self.classes_ if classes is None else classes
        strange = ~np.isin(labels, classes)
        if strange.any():
            raise DataError(
                f"y holds the label {labels[strange][0]}, expected {low} or {high} as in fit"
            )
        return (labels == high).astype(np.float64)

    # --- pairs and points ---

    def _entities(
        self, pairs: ArrayLike, columns: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return embeddings (N, d) and the rows (n,) of both sides of pairs among them."""
        array = as_array(pairs, "pairs")
        if self._are_row_numbers(array):
            numbers = as_row_numbers(array, "pairs", len(self._known_points()))
            used, places = np.unique(numbers, return_inverse=True)
            rows, places = self._fetched(used), places.reshape(-1, 2)
            self._check_columns(rows.shape[1], columns)
            return rows, places[:, 0], places[:, 1]
        left, right = self._sides(array, columns)
        places = np.arange(2 * len(left))
        return np.concatenate([left, right]), places[: len(left)], places[len(left) :]

    def _are_row_numbers(self, array: np.ndarray) -> bool:
        """Whether pairs name rows of an array, each of which is then looked at once."""
        shared = self.preprocessor is not None and not callable(self.preprocessor)
        return shared and array.ndim == 2 and array.shape[1] == 2 and len(array) > 0

    def _sides(self, pairs: ArrayLike, columns: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the embeddings (n, d) of both sides of pairs."""
        array = as_array(pairs, "pairs")
        if array.ndim == 3 and array.shape[1] == 2:
            if array.shape[2] == 0:
                raise ArgumentError(
                    f"pairs have 0 feature(s) (shape={array.shape}) while a minimum of 1 is "
                    "required."
                )
            array = as_numbers(array, "pairs")
            sides = array[:, 0], array[:, 1]
        elif array.ndim == 2 and array.shape[1] == 2 and self.preprocessor is not None:
            sides = self._fetched(array[:, 0]), self._fetched(array[:, 1])
        else:
            without = " with a preprocessor" if self.preprocessor is None else ""
            hint = ". Reshape your data"
            if array.ndim > 1 and array.shape[1] in (3, 4):
                hint += "; of a triplet, (a, b) is a good pair and (a, c) a bad one"
            raise ArgumentError(
                f"pairs have shape {array.shape}, expected (n, 2, d), or (n, 2) indicators{without}"
                f"{hint}"
            )
        if not len(sides[0]):
            raise DataError("there are 0 sample(s) of pairs, expected at least 1")
        self._check_columns(sides[0].shape[1], columns)
        return sides

    def _check_columns(self, found: int, expected: int | None = None) -> None:
        if expected is not None and found != expected:
            name = type(self).__name__
            raise ArgumentError(
                f"X has {found} features, but {name} is expecting {expected} features as input"
            )

    def _fetched(self, indicators: np.ndarray, name: str = "pairs") -> np.ndarray:
        """Return the embeddings (n, d) of indicators (n,), by way of the preprocessor."""
        if callable(self.preprocessor):
            found = as_matrix(self.preprocessor(indicators), "embeddings of the preprocessor")
            if len(found) != len(indicators):
                raise ArgumentError(
                    f"the preprocessor returned {len(found)} rows for {len(indicators)} indicators"
                )
            return found
        rows = self._known_points()
        return as_matrix(rows[as_row_numbers(indicators, name, len(rows))], "preprocessor")

    def _known_points(self) -> np.ndarray:
        """Return the preprocessor's embeddings (N, d)."""
        rows = as_array(self.preprocessor, "preprocessor")
        if rows.ndim != 2:
            raise ArgumentError(f"preprocessor has shape {rows.shape}, expected (rows, columns)")
        return rows

    def _points(self, X: ArrayLike) -> np.ndarray:
        """Return embeddings (n, d) that come as they are or as indicators (n,)."""
        array = as_array(X, "X")
        if array.ndim == 1 and self.preprocessor is not None:
            array = self._fetched(array, "X")
        if array.ndim == 1:
            raise ArgumentError(
                f"X has shape {array.shape}, expected (n, d) embeddings. Reshape your data"
            )
        points = np.ascontiguousarray(as_matrix(array, "X"))  # BLAS rounds by the order in memory
        self._check_columns(points.shape[1], self.n_features_in_)
        return points

    # --- what was learned ---

    def decision_function(self, pairs: ArrayLike) -> np.ndarray:
        """Return the scores (n,) float32 of pairs, higher for more similar ones.

        They are calibrated log-odds, or grades with `graded`: what the command line writes for the
        same model, to the bit, whichever the order of a pair. A pair is predicted to be similar
        from `threshold_` on.
        """
        check_is_fitted(self, "model_")
        array = as_array(pairs, "pairs")
        options: dict[str, Any] = {"model": self.model_, "threads": self.threads}
        if self._are_row_numbers(array):  # entities of several pairs are folded once
            rows, *ends = self._entities(array, self.n_features_in_)
            return score_pairs(rows, tuple(ends), **options)
        left, right = self._sides(array)
        self._check_columns(left.shape[1], self.n_features_in_)
        scores = np.empty(len(left), np.float32)
        for start in range(0, len(left), PAIRS_AT_ONCE):
            block = slice(start, start + PAIRS_AT_ONCE)
            own = scores[block]
            rows = np.concatenate([left[block], right[block]])  # one fold takes less than two
            sides = np.arange(len(own)), np.arange(len(own), 2 * len(own))
            score_pairs(rows, sides, out=own, **options)
        return scores

    def pair_score(self, pairs: ArrayLike) -> np.ndarray:
        """Return the scores (n,) float32 of pairs: what `decision_function` returns."""
        return self.decision_function(pairs)

    def pair_distance(self, pairs: ArrayLike) -> np.ndarray:
        """Return the distances (n,) float64 of pairs, of heads that learn a metric.

        Raises
        ------
        ArgumentError : there is none; the message says why.
        """
        metric = self._metric()
        left, right = self._sides(pairs)
        self._check_columns(left.shape[1], self.n_features_in_)
        return metric.between(metric.points(left), metric.points(right))

    def predict(self, pairs: ArrayLike) -> np.ndarray:
        """Return a label of `classes_` for each pair (n,), or its grade with `graded`."""
        scores = self.decision_function(pairs)
        if self.graded:
            return scores
        return self.classes_[(scores >= np.float64(self.threshold_)).astype(np.intp)]

    def predict_proba(self, pairs: ArrayLike) -> np.ndarray:
        """Return the probabilities (n, 2) float64 of both labels, in the order of `classes_`."""
        scores = self.decision_function(pairs).astype(np.float64)
        if self.graded:
            raise ArgumentError("grades have no probability: use predict")
        good = self.model_.probability(scores)
        return np.stack([1 - good, good], axis=1)

    def score(self, pairs: ArrayLike, y: ArrayLike, sample_weight: ArrayLike = None) -> float:
        """Return the area under the ROC curve of pairs, or Spearman's rho with `graded`.

        Raises
        ------
        ArgumentError : `sample_weight` beside grades.
        """
        scores = self.decision_function(pairs).astype(np.float64)
        labels = self._known_labels(y, len(scores))
        if self.graded:
            if sample_weight is not None:
                raise ArgumentError("Spearman's rho of grades knows no sample_weight")
            return rank_quality(scores, labels, True)
        from sklearn.metrics import roc_auc_score

        return float(roc_auc_score(labels, scores, sample_weight=sample_weight))

    def transform(self, X: ArrayLike) -> np.ndarray:
        """Return the projected embeddings (n, k) float64 that the head compares.

        Parameters
        ----------
        X : (n, d) embeddings, or (n,) indicators where there is a `preprocessor`.

        Returns
        -------
        projected : (n, k) float64. Of a metric, points whose (Euclidean, for absdiff Manhattan)
            distances are those of `pair_distance`; of the head cosine, rows of length 1; of a sum
            of heads, the outputs of their towers side by side.
        """
        check_is_fitted(self, "model_")
        return projected(self.model_, self._points(X))

    # --- threshold ---

    @property
    def threshold_(self) -> float:
        """Score from which on a pair is predicted to be similar."""
        model = vars(self).get("model_")
        if model is None or model.threshold is None:
            raise AttributeError("PairSimilarity has no threshold_: it is not fitted, or to grades")
        return model.threshold

    def set_threshold(self, threshold: float, *, unit: str = "score") -> PairSimilarity:
        """Set the threshold by hand.

        Parameters
        ----------
        threshold : what a pair must reach, or with "distance" must not exceed, to be similar.
        unit : "score" (the default), "probability" or "distance" (of `pair_distance`).

        Raises
        ------
        ArgumentError : no finite number, or a unit that the scores do not have.
        """
        check_is_fitted(self, "model_")
        if self.graded:
            raise ArgumentError("grades have no threshold")
        try:
            value = float(threshold)
        except (TypeError, ValueError):
            value = np.nan
        if not np.isfinite(value):
            raise ArgumentError(f"threshold is {threshold!r}, expected a finite number")
        if unit == "probability":
            if not 0 < value < 1:
                raise ArgumentError(f"threshold is {value}, expected a probability within 0 and 1")
            if self.model_.calibration is not None:
                raise ArgumentError("isotonic probabilities have steps: set a score")
            value = float(np.log(value / (1 - value)))
        elif unit == "distance":
            value = self._metric().score_at(value)
        elif unit != "score":
            raise ArgumentError(f"unit is {unit!r}, expected score, probability or distance")
        self.model_ = replace(self.model_, threshold=value)
        return self

    def calibrate_threshold(
        self,
        pairs_valid: ArrayLike,
        y_valid: ArrayLike,
        strategy: str = "accuracy",
        min_rate: float | None = None,
        beta: float = 1.0,
    ) -> PairSimilarity:
        """Choose the threshold by validation pairs.

        Parameters
        ----------
        pairs_valid, y_valid : pairs and labels as in `fit`, which were better not learned from.
        strategy : what is to be as large as possible: "accuracy"; "f_beta"; "max_tpr", the rate of
            good pairs that are found, where the rate of bad ones that are kept out is at least
            `min_rate`; or "max_tnr", the other way round.
        min_rate : from 0 to 1, for the last two.
        beta : above 0, for "f_beta".

        Raises
        ------
        ArgumentError : a parameter cannot be used; DataError : labels of one class alone.
        """
        check_is_fitted(self, "model_")
        if self.graded:
            raise ArgumentError("grades have no threshold")
        scores = self.decision_function(pairs_valid).astype(np.float64)
        labels = self._known_labels(y_valid, len(scores))
        return self.set_threshold(best_cut(scores, labels, strategy, min_rate, beta))

    # --- metric ---

    def _metric(self) -> Metric:
        check_is_fitted(self, "model_")
        return find_metric(self.model_)

    def get_metric(self) -> Callable[..., float]:
        """Return the metric as a function of two embeddings (d,); refitting does not change it.

        Its argument ``squared=True`` gives the square. It fits the argument `metric` of estimators
        of scikit-learn, and can be pickled.

        Raises
        ------
        ArgumentError : the head learns none; the message says why.
        """
        return _MetricFunction(self._metric())

    @property
    def components_(self) -> np.ndarray:
        """L (k, d) float64 of the Mahalanobis metric."""
        if "model_" not in vars(self):
            raise AttributeError("PairSimilarity has no components_: it is not fitted")
        try:
            return mahalanobis(self.model_)
        except ArgumentError as error:
            raise AttributeError(str(error)) from error

    def get_mahalanobis_matrix(self) -> np.ndarray:
        """Return M = L'L (d, d) float64 with d(x, y)^2 = (x - y)' M (x - y).

        Raises
        ------
        ArgumentError : there is no such metric; the message says why.
        """
        check_is_fitted(self, "model_")
        components = mahalanobis(self.model_)
        return components.T @ components

    # --- what scikit-learn and pickle ask ---

    def __sklearn_tags__(self) -> Any:
        """Say what pairs and labels may be."""
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = self.preprocessor is not None
        tags.input_tags.three_d_array = True
        tags.target_tags.required = True
        tags.transformer_tags = TransformerTags()
        if self.graded:
            tags.estimator_type, tags.classifier_tags = "regressor", None
            tags.regressor_tags = RegressorTags()
        else:
            tags.classifier_tags.multi_class = False
        return tags

    def __getstate__(self) -> dict[str, Any]:
        """Return the parameters and, of a model, text and arrays."""
        state = dict(super().__getstate__())
        if "model_" in state:
            config, arrays = state["model_"].to_parts()
            state["model_"] = json.dumps(config), arrays, json.dumps(state["model_"].record)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Put an estimator together from what `__getstate__` gave."""
        state = dict(state)
        if "model_" in state:
            config, arrays, record = state["model_"]
            model = Model.from_parts(json.loads(config), arrays)
            state["model_"] = replace(model, record=json.loads(record))
        super().__setstate__(state)


class _MetricFunction:
    """A metric of two embeddings (d,)."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric

    def __call__(self, u: ArrayLike, v: ArrayLike, squared: bool = False) -> float:
        """Return the distance of u and v, or its square."""
        rows = np.stack([as_array(u, "u"), as_array(v, "v")])
        if rows.ndim != 2:
            raise ArgumentError(f"u and v have shape {rows.shape[1:]}, expected (d,) each")
        points = self.metric.points(as_numbers(rows, "u and v"))
        distance = float(self.metric.between(points[:1], points[1:])[0])
        return distance * distance if squared else distance
