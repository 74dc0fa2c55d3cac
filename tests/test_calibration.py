"""Scores become log-odds or probabilities, and thresholds what was asked for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpair.calibration import (
    Calibration,
    calibrated,
    find_threshold,
    fit_combination,
    fit_grade,
    fit_isotonic,
    fit_log_odds,
    prior_shift,
)
from fastpair.errors import ArgumentError, DataError
from fastpair.model import builtin

mixed_pairs = st.lists(
    st.tuples(st.floats(-50, 50), st.integers(0, 1)), min_size=2, max_size=40
).filter(lambda pairs: len({label for _, label in pairs}) == 2)


def noisy(count: int = 3000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores whose true log-odds are 2 * score - 1."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=count)
    return scores, (rng.random(count) < 1 / (1 + np.exp(1 - 2 * scores))).astype(float)


@pytest.mark.parametrize("temperature", [False, True])
@given(mixed_pairs)
def test_calibration_of_any_scores_is_finite(temperature, pairs):
    scores, labels = np.array(pairs).T
    slope, offset = fit_log_odds(scores, labels, temperature=temperature)
    assert np.isfinite((slope, offset)).all()
    assert offset == 0 or not temperature


def test_calibration_equals_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    scores, labels = noisy()
    model = LogisticRegression(C=1e9).fit(scores[:, None], labels)
    expected = (model.coef_[0, 0], model.intercept_[0])
    assert fit_log_odds(scores, labels) == pytest.approx(expected, abs=0.02)
    alone = LogisticRegression(C=1e9, fit_intercept=False).fit(scores[:, None], labels)
    found = fit_log_odds(scores, labels, temperature=True)
    assert found == pytest.approx((alone.coef_[0, 0], 0), abs=0.02)


@pytest.mark.parametrize("graded", [False, True])
def test_a_combination_is_penalised_regression_on_standardised_features(graded):
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(1)
    features = rng.normal(size=(3, 400)) * [[1], [10], [0.1]] + 5
    labels = features[0] + 0.1 * features[1] + rng.normal(size=400) * 0.5
    if not graded:
        labels = (labels > np.median(labels)).astype(float)
    estimator = make_pipeline(StandardScaler(), Ridge() if graded else LogisticRegression(tol=1e-9))
    estimator.fit(features.T, labels)
    predict = estimator.predict if graded else estimator.decision_function
    found = fit_combination(features, labels, graded)
    np.testing.assert_allclose(found[:-1] @ features + found[-1], predict(features.T), atol=1e-3)


def test_a_grade_is_fitted_by_least_squares():
    assert fit_grade(np.array([1.0, 2.0]), np.array([5.0, 8.0])) == pytest.approx((3, 2))


def test_an_isotonic_curve_rises_and_is_calibrated():
    scores, labels = noisy()
    curve = fit_isotonic(scores, labels)
    curve.check()
    chances = curve(scores)
    assert chances.mean() == pytest.approx(labels.mean(), abs=1e-6)
    sure = chances > 0.8
    assert labels[sure].mean() == pytest.approx(chances[sure].mean(), abs=0.02)


def counts(scores, labels, threshold, weights=None):
    weights = np.ones(len(scores)) if weights is None else weights
    taken = scores >= threshold
    hits = weights[taken & (labels == 1)].sum()
    return hits, weights[taken].sum(), weights[labels == 1].sum(), weights.sum()


def measured(by: str, scores, labels, threshold, weights=None) -> float:
    hits, taken, good, total = counts(scores, labels, threshold, weights)
    if by == "accuracy":
        return (total - taken - good + 2 * hits) / total
    beta = float(by[1:]) ** 2
    return (1 + beta) * hits / (beta * good + taken)


@pytest.mark.parametrize("by", ["f1", "f0.5", "f2", "accuracy"])
@given(mixed_pairs, st.booleans())
def test_no_other_threshold_is_better(by, pairs, weighted):
    scores, labels = np.array(pairs).T
    scores = np.round(scores)  # so that there are ties
    weights = 0.5 + np.arange(len(scores)) % 3 if weighted else None
    found = find_threshold(scores, labels, by, weights)
    best = max(measured(by, scores, labels, at, weights) for at in scores)
    assert measured(by, scores, labels, found, weights) == pytest.approx(best)


@pytest.mark.parametrize("floor", ["precision=0.9", "recall=0.9", "recall=1"])
def test_a_floor_is_kept_and_the_rest_is_as_good_as_can_be(floor):
    scores, labels = noisy()
    found = find_threshold(scores, labels, floor)

    def both(at):
        hits, taken, good, _ = counts(scores, labels, at)
        return (hits / taken, hits / good)[:: 1 if floor.startswith("precision") else -1]

    kept, wanted = both(found)
    least = float(floor.split("=")[1])
    assert kept >= least
    assert wanted == max(w for k, w in map(both, scores) if k >= least)


@pytest.mark.parametrize("by", ["f", "f0", "g1", "precision", "precision=2", "recall=x", "=0.5"])
def test_what_a_threshold_cannot_be_chosen_by_is_refused(by):
    with pytest.raises(ArgumentError, match="threshold-by"):
        find_threshold(np.array([1.0, 2.0]), np.array([0.0, 1.0]), by)


def test_a_precision_that_is_never_reached_is_said():
    with pytest.raises(DataError, match=r"no threshold reaches precision=0\.9"):
        find_threshold(np.array([1.0, 2.0]), np.array([1.0, 0.0]), "precision=0.9")


def test_a_prior_shifts_log_odds_by_its_odds():
    labels = np.array([1.0, 0, 0, 0])
    shift, weights = prior_shift(labels, 0.5)
    assert shift == pytest.approx(np.log(3))
    assert weights @ labels / weights.sum() == pytest.approx(0.5)
    with pytest.raises(ArgumentError, match="prior is 1"):
        prior_shift(labels, 1)


def test_a_calibrated_model_holds_what_was_asked_for():
    scores, labels = noisy()
    wanted = Calibration(calibrate="isotonic", threshold_by="precision=0.9", prior=0.1)
    wanted.check()
    model, notes = calibrated(builtin("cosine"), scores, labels, wanted)
    slope, offset = fit_log_odds(scores, labels)
    shift, weights = prior_shift(labels, 0.1)
    final = slope * scores + offset + shift
    assert (model.unit, notes) == ("log-odds", [])
    assert model.constant == pytest.approx(offset + shift)
    assert np.average(model.probability(final), weights=weights) == pytest.approx(0.1, abs=0.02)
    hits, taken, _, _ = counts(final, labels, model.threshold, weights)
    assert hits / taken >= 0.9


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"calibrate": "magic"}, "calibrate is 'magic'"),
        ({"threshold_by": "luck"}, "threshold-by is 'luck'"),
        ({"prior": 0.0}, "prior is 0"),
        ({"graded": True, "prior": 0.1}, "grades have no probability"),
    ],
)
def test_calibrations_that_cannot_be_are_refused(wrong, text):
    with pytest.raises(ArgumentError, match=text):
        Calibration(**wrong).check()
