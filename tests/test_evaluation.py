"""Metrics equal scikit-learn's and SciPy's, and say so when they are not defined."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn import metrics

from fastpair.errors import ArgumentError, DataError
from fastpair.evaluation import (
    Scored,
    WeightedMetrics,
    best_threshold,
    complete_group,
    entity_weights,
    evaluate_scores,
    measure,
    measure_mean,
    partner_ranks,
    pca_model,
    raw_cosine,
    seen_groups,
)

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
    assert result["ece"] == pytest.approx(calibration_error(labels, probability))
    if len(set(scores)) > 1:
        assert result["pearson"] == pytest.approx(pearsonr(scores, labels).statistic)
        assert result["spearman"] == pytest.approx(spearmanr(scores, labels).statistic)
    json.dumps(result, allow_nan=False)


def calibration_error(labels, probability):
    """In ten equal bins: mean over pairs of | share of good pairs - mean probability |."""
    bins = np.minimum(np.floor(probability * 10), 9)
    return sum(
        (bins == b).mean() * abs(labels[bins == b].mean() - probability[bins == b].mean())
        for b in set(bins)
    )


def test_the_equal_error_rate_is_where_both_errors_meet():
    labels = np.array([1, 1, 0, 1, 0, 0], float)
    perfect = evaluate_scores(labels, labels)
    assert perfect["eer"] == 0.0
    # Taking the best three accepts 1 of 3 bad pairs and misses 1 of 3 good ones.
    assert evaluate_scores(np.arange(6.0)[::-1], labels)["eer"] == pytest.approx(1 / 3)
    assert evaluate_scores(np.zeros(6), labels)["eer"] == pytest.approx(0.5)
    assert evaluate_scores(-labels, labels)["eer"] == pytest.approx(1.0)


def test_given_probabilities_take_the_place_of_the_sigmoid():
    labels, probability = np.array([1.0, 0.0, 1.0]), np.array([1.0, 0.25, 0.5])
    result = evaluate_scores(np.arange(3.0), labels, unit="similarity", probability=probability)
    assert result["brier"] == pytest.approx((0 + 0.0625 + 0.25) / 3)
    assert result["log_loss"] == pytest.approx(metrics.log_loss(labels, probability))
    assert result["ece"] == pytest.approx((0 + 0.25 + 0.5) / 3)


@given(scored_pairs, st.data())
def test_pairs_that_count_twice_count_as_if_they_were_there_twice(pairs, data):
    scores, labels = np.array(pairs).T
    counts = st.lists(st.integers(0, 3), min_size=len(scores), max_size=len(scores))
    weights = np.array(data.draw(counts))
    repeated = np.repeat(np.arange(len(scores)), weights)
    scored = Scored(scores, 0.5, "log-odds")
    found = WeightedMetrics(scored, labels, labels == 1)(weights.astype(float))
    expected = {}
    if len(repeated):
        options = {"threshold": 0.5, "unit": "log-odds"}
        expected = evaluate_scores(scores[repeated], labels[repeated], **options)
    for name in ("auc", "average_precision", "eer", "f1", "precision", "recall", "brier", "ece"):
        if expected.get(name) is None:
            assert name not in found
        else:
            assert found[name] == pytest.approx(expected[name], abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 3)), min_size=4))
def test_weighted_correlations_are_those_of_repeated_pairs(rows):
    scores, grades, weights = np.array(rows).T
    repeated = np.repeat(np.arange(len(rows)), weights)
    found = WeightedMetrics(Scored(scores), grades, None)(weights.astype(float))
    few = len(set(grades)) < 3 or min(len(set(x[repeated])) for x in (scores, grades)) < 2
    if few:
        assert len(set(grades)) > 2 or not found
    else:
        x, y = scores[repeated], grades[repeated]
        assert found["spearman"] == pytest.approx(spearmanr(x, y).statistic)
        assert found["pearson"] == pytest.approx(pearsonr(x, y).statistic)


def test_weights_of_any_size_give_what_scikit_learn_gives():
    rng = np.random.default_rng(0)
    scores, weights = rng.normal(size=500).round(1), rng.exponential(size=500)
    truth = rng.random(500) < 0.3
    found = WeightedMetrics(Scored(scores), truth.astype(float), truth)(weights)
    auc = metrics.roc_auc_score(truth, scores, sample_weight=weights)
    precision = metrics.average_precision_score(truth, scores, sample_weight=weights)
    assert found["auc"] == pytest.approx(auc)
    assert found["average_precision"] == pytest.approx(precision)


def test_pairs_that_share_an_entity_are_drawn_together():
    # 0 - 1, 0 - 2 and 3 - 4 share entities; 5 - 6 stands alone; 1, 2 and 4 are in one pair only.
    left, right = np.array([0, 0, 3, 3, 5]), np.array([1, 2, 4, 8, 6])
    weights = np.array(list(entity_weights(left, right, 40_000, seed=1)))
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.03)
    expected = np.zeros((5, 5))
    expected[:2, :2] = expected[2:4, 2:4] = 1
    expected[4, 4] = 1
    np.testing.assert_allclose(np.cov(weights.T), expected, atol=0.05)


def test_intervals_are_as_wide_as_the_estimates_spread():
    """Pairs without common entities: the half width is 1.96 standard deviations."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(60):
        labels = (rng.random(300) < 0.4).astype(float)
        scored = {"model": Scored(rng.normal(size=300) + labels)}
        pairs = np.arange(300), np.arange(300, 600)
        result = measure(scored, labels, *pairs, draws=60)["model"]
        found.append((result["auc"], *result["intervals"]["auc"]))
    estimate, low, high = np.array(found).T
    assert ((high - low) / 2).mean() == pytest.approx(1.96 * estimate.std(), rel=0.3)


def test_similarities_are_compared_draw_by_draw():
    rng = np.random.default_rng(0)
    labels = (rng.random(400) < 0.5).astype(float)
    left, right = rng.integers(0, 60, (2, 400))
    noise = rng.normal(size=400)
    scored = {
        "model": Scored(labels + noise),
        "same": Scored(2 * (labels + noise)),
        "worse": Scored(0.5 * labels + noise),
    }
    found = measure(scored, labels, left, right, draws=100, seed=3)
    assert found["same"]["gain"]["auc"] == {"value": 0.0, "interval": [0.0, 0.0]}
    gain = found["worse"]["gain"]["auc"]
    assert 0 < gain["interval"][0] < gain["value"] < gain["interval"][1]
    assert "gain" not in found["model"]
    assert found == measure(scored, labels, left, right, draws=100, seed=3)
    assert "intervals" not in measure(scored, labels, left, right)["model"]
    json.dumps(found, allow_nan=False)


def test_few_good_pairs_have_intervals_though_some_draws_have_none():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        labels = np.arange(12) < 3
        scored = {name: Scored(rng.normal(size=12)) for name in ("one", "other")}
        left, right = rng.integers(0, 6, (2, 12))
        found = measure(scored, labels, left, right, draws=40, seed=seed)
        for result in found.values():
            low, high = result["intervals"]["auc"]
            assert 0 <= low <= high <= 1
        assert {"auc", "average_precision", "eer"} <= set(found["other"]["gain"])


def test_what_few_draws_define_has_no_interval():
    # Above the threshold is entity 0 alone, which 22 of 100 draws take.
    left, right = np.array([0, 0, *range(1, 20)]), np.array([0, 0, *[30] * 19])
    labels, scored = np.arange(21) % 2, Scored(np.where(left == 0, 1.0, 0.0), 0.5)
    found = measure({"one": scored}, labels, left, right, draws=500)["one"]
    assert found["precision"] == 0.5
    assert "precision" not in found["intervals"]
    assert "recall" in found["intervals"]


def test_means_have_intervals_too():
    hits = np.stack([np.ones(200), np.arange(200) % 2], axis=1)
    always, half = measure_mean(hits, np.arange(200), np.arange(200, 400), 200)
    assert always == {"value": 1.0, "interval": [1.0, 1.0]}
    low, high = half["interval"]
    assert half["value"] == 0.5
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 200**0.5, rel=0.3)
    assert measure_mean(hits, np.arange(200), np.arange(200), 0) == [{"value": 1}, {"value": 0.5}]


def test_pairs_are_told_apart_by_how_many_entities_were_seen():
    seen = np.array([True, True, False, False])
    left, right = np.array([0, 0, 2, 3]), np.array([1, 2, 1, 2])
    groups = {name: rows.tolist() for name, rows in seen_groups(left, right, seen)}
    assert groups == {"both seen": [0], "one seen": [1, 2], "none seen": [3]}


def test_a_group_of_one_kind_is_measured_against_all_of_the_other():
    truth = np.array([True, True, False, False, False])
    rows, added = complete_group(np.array([3, 4]), truth)
    assert (rows.tolist(), added) == ([3, 4, 0, 1], "good")
    rows, added = complete_group(np.array([0]), truth)
    assert (rows.tolist(), added) == ([0, 2, 3, 4], "bad")
    rows, added = complete_group(np.array([0, 3]), truth)
    assert (rows.tolist(), added) == ([0, 3], None)
    assert complete_group(np.array([0]), None)[1] is None
    assert complete_group(np.array([0]), np.array([True]))[1] is None


@pytest.mark.parametrize("apart", [True, False])
def test_the_place_of_a_partner_is_counted_among_all_candidates(apart):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, 40))
    left, right = rng.integers(0, 20, 30), rng.integers(20, 40, 30)
    candidates = np.arange(20, 40) if apart else np.arange(40)

    def top_k(queries, candidates, k):
        order = np.argsort(-scores[np.ix_(queries, candidates)], axis=1)[:, :k]
        padded = np.pad(order, ((0, 0), (0, k - order.shape[1])), constant_values=-1)
        return padded, np.zeros(padded.shape)

    places = partner_ranks(left, right, candidates, 10, top_k)
    for i, j, place in zip(left, right, places, strict=True):
        others = candidates[candidates != i]
        better = int((scores[i, others] > scores[i, j]).sum())
        assert place == min(better, 10)
    assert partner_ranks(left, right, candidates, 50, top_k).max() < 40


def test_an_entity_is_no_partner_of_itself():
    def top_k(queries, candidates, k):
        best = np.tile(np.arange(3)[:k], (len(queries), 1))
        return best, np.zeros(best.shape)

    places = partner_ranks(np.array([1, 1]), np.array([1, 2]), np.arange(3), 2, top_k)
    assert places.tolist() == [2, 1]


def test_the_unlabelled_pca_is_that_of_scikit_learn():
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 12)) * np.arange(1, 13) + 3
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    reduced = PCA(4, svd_solver="full").fit_transform(unit)
    left, right = rng.integers(0, 50, (2, 30))
    expected = -np.linalg.norm(reduced[left] - reduced[right], axis=1)
    model = pca_model(rows, 4)
    np.testing.assert_allclose(model.score(rows[left], rows[right]), expected, atol=1e-12)


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


def test_very_many_scores_are_told_apart_finely_enough():
    rng = np.random.default_rng(0)
    labels = (rng.random(150_000) < 0.1).astype(float)
    scores = rng.normal(size=len(labels)) + labels
    found = WeightedMetrics(Scored(scores), labels, labels == 1)(np.ones(len(labels)))
    exact = evaluate_scores(scores, labels)
    assert found["auc"] == pytest.approx(exact["auc"], abs=1e-5)
    assert found["average_precision"] == pytest.approx(exact["average_precision"], abs=1e-3)


def test_the_interval_of_the_calibration_error_is_around_it():
    """A draw is always further from calibrated than what it is drawn from."""
    rng = np.random.default_rng(0)
    scores = 2 * rng.normal(size=2000)
    labels = (rng.random(2000) < 1 / (1 + np.exp(-scores))).astype(float)
    pairs = np.arange(2000), np.arange(2000, 4000)
    scored = {"model": Scored(scores, unit="log-odds")}
    found = measure(scored, labels, *pairs, draws=100)["model"]
    low, high = found["intervals"]["ece"]
    assert 0 <= low < found["ece"] < high < 0.05
