"""Metrics equal scikit-learn's and SciPy's, and say so when they are not defined."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn import metrics

from fastpair.errors import ArgumentError, DataError
from fastpair.evaluation import best_threshold, evaluate_scores, raw_cosine

scored_pairs = st.lists(
    st.tuples(st.floats(-5, 5).map(lambda x: round(x, 1)), st.integers(0, 1)), min_size=2
).filter(lambda pairs: len({label for _, label in pairs}) == 2)


@given(scored_pairs)
def test_metrics_equal_those_of_scikit_learn(pairs):
    scores, labels = np.array(pairs).T
    result = evaluate_scores(scores, labels, threshold=0.5, unit="log-odds")
    assert result["auc"] == pytest.approx(metrics.roc_auc_score(labels, scores))
    assert result["average_precision"] == metrics.average_precision_score(labels, scores)
    assert (result["n_pairs"], result["n_good"]) == (len(pairs), labels.sum())
    taken = scores >= 0.5
    assert result["f1"] == pytest.approx(metrics.f1_score(labels, taken))
    assert result["recall"] == pytest.approx(metrics.recall_score(labels, taken))
    if taken.any():
        assert result["precision"] == pytest.approx(metrics.precision_score(labels, taken))
    probability = 1 / (1 + np.exp(-scores))
    assert result["log_loss"] == pytest.approx(metrics.log_loss(labels, probability))
    assert result["brier"] == pytest.approx(np.mean((labels - probability) ** 2))
    if len(set(scores)) > 1:
        assert result["spearman"] == pytest.approx(spearmanr(scores, labels).statistic)
    json.dumps(result, allow_nan=False)


@given(scored_pairs)
def test_no_threshold_has_a_larger_f1_than_the_best(pairs):
    scores, labels = np.array(pairs).T
    reached = metrics.f1_score(labels, scores >= best_threshold(scores, labels))
    assert reached == pytest.approx(max(metrics.f1_score(labels, scores >= t) for t in scores))


@pytest.mark.parametrize(("label", "kind"), [(0, "bad"), (1, "good")])
def test_one_class_only_gives_none_and_a_note(label, kind):
    result = evaluate_scores(np.array([0.1, 0.2]), np.full(2, label), threshold=0.0)
    assert result["auc"] is None
    assert result["average_precision"] is None
    assert result["spearman"] is None
    assert any(f"all pairs are {kind}" in note for note in result["notes"])
    json.dumps(result, allow_nan=False)


def test_grades_need_a_good_grade_for_the_metrics_of_good_and_bad():
    scores, grades = np.array([0.1, 0.3, 0.2, 0.9]), np.array([0.0, 4.0, 2.5, 5.0])
    graded = evaluate_scores(scores, grades, graded=True)
    assert graded["auc"] is None
    assert graded["spearman"] == pytest.approx(1.0)
    assert evaluate_scores(scores, grades, graded=True, good=4)["auc"] == 1.0
    with pytest.raises(DataError, match=r"0 \(bad\) or 1 \(good\) but 4 came"):
        evaluate_scores(scores, grades)


def test_an_empty_list_of_pairs_has_no_metrics():
    result = evaluate_scores(np.empty(0), np.empty(0), threshold=0.0, unit="log-odds")
    assert (result["n_pairs"], result["auc"], result["spearman"]) == (0, None, None)


def test_what_is_not_a_number_is_never_silent():
    with pytest.raises(DataError, match=r"score of pair 1 is nan.*1 of 2"):
        evaluate_scores(np.array([0.0, np.nan]), np.array([0, 1]))
    with pytest.raises(DataError, match="label of pair 0 is inf"):
        evaluate_scores(np.array([0.0, 1.0]), np.array([np.inf, 1]))
    with pytest.raises(ArgumentError, match=r"shape \(2,\) and labels \(3,\)"):
        evaluate_scores(np.zeros(2), np.zeros(3))


def test_raw_cosine_of_zero_rows_is_0_and_of_any_type_is_float64():
    embeddings = np.array([[3, 4], [0, 0], [4, 3]], np.float32)
    cosine = raw_cosine(embeddings, np.array([0, 0, 2]), np.array([2, 1, 2]))
    np.testing.assert_allclose(cosine, [0.96, 0, 1], rtol=1e-15)
    assert cosine.dtype == np.float64
