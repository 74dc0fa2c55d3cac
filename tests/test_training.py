"""Training learns from pairs, says what it assumed, and refuses what it cannot learn from."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_heads import random_weights

from fastpair.errors import ArgumentError, DataError
from fastpair.evaluation import evaluate_scores, raw_cosine
from fastpair.heads import HEADS
from fastpair.model import Branch
from fastpair.training import (
    LOSSES,
    Pairs,
    batch_gradients,
    fit_grade,
    fit_log_odds,
    split_pairs,
    train,
)

REAL_DATA = Path(__file__).parents[2] / "shared" / "data" / "amazon-google"


def groups_in_noise(seed: int, count: int = 600, columns: int = 12):
    """Embeddings whose first columns tell the group and whose other, larger columns are noise."""
    rng = np.random.default_rng(seed)
    group = np.arange(60) % 6
    rows = rng.normal(size=(60, columns)) * 1.5
    rows[:, :6] = np.eye(6)[group] + 0.1 * rng.normal(size=(60, 6))
    left, right = rng.integers(0, 60, (2, count))
    return rows.astype(np.float32), left, right, (group[left] == group[right]).astype(float)


def pairs_of_pairs(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs in which no entity occurs twice, every other one good."""
    return np.arange(count) * 2, np.arange(count) * 2 + 1, np.arange(count) % 2.0


@pytest.mark.parametrize("loss", [*LOSSES, "+".join(LOSSES)])
@pytest.mark.parametrize("heads", [[head] for head in HEADS] + [["cosine", "absdiff"]])
def test_gradients_of_loss_and_branches_agree_with_finite_differences(heads, loss):
    rng = np.random.default_rng(0)
    branches = [Branch(h, random_weights(h, 3, rng), rng.normal(size=(3, 4))) for h in heads]
    constant = rng.normal(size=1)
    left, right = rng.normal(size=(2, 8, 4))
    target = np.array([0, 1, 0.3, 0.3, 1, 0, 0.7, 1])
    losses = [LOSSES[name] for name in loss.split("+")]

    def value() -> float:
        return batch_gradients(branches, constant, left, right, target, losses)[0]

    _, gradients = batch_gradients(branches, constant, left, right, target, losses)
    parameters = {(-1, "constant"): constant}
    for number, branch in enumerate(branches):
        parameters.update({(number, name): v for name, v in branch.parameters.items()})
    assert gradients.keys() == parameters.keys()
    for key, array in parameters.items():
        for index in np.ndindex(array.shape):
            kept = array[index]
            array[index] = kept + 1e-6
            above = value()
            array[index] = kept - 1e-6
            below = value()
            array[index] = kept
            assert gradients[key][index] == pytest.approx((above - below) / 2e-6, abs=1e-7)


def test_losses_are_their_formulas():
    raw, target = np.array([0.5, -1.0, 2.0]), np.array([1.0, 0.0, 0.5])
    odds = 1 / (1 + np.exp(-raw))
    entropy = -np.mean(target * np.log(odds) + (1 - target) * np.log(1 - odds))
    assert LOSSES["cross-entropy"](raw, target)[0] == pytest.approx(entropy)
    behind = [raw[q] - raw[p] for p in range(3) for q in range(3) if target[p] > target[q]]
    ranking = LOSSES["ranking"](raw, target)[0]
    assert ranking == pytest.approx(np.mean(np.log1p(np.exp(behind))))
    assert LOSSES["ranking"](raw, np.ones(3))[0] == 0


@pytest.mark.parametrize("head", ["cosine+absdiff", "cosine", "sqdiff", "product+sum", "dot+max"])
def test_a_learned_similarity_beats_raw_cosine_on_pairs_it_has_not_seen(head):
    rows, left, right, labels = groups_in_noise(0)
    seen = slice(0, 400)
    result = train(rows, left[seen], right[seen], labels[seen], head=head, batch=64)
    left, right, labels = left[400:], right[400:], labels[400:]
    learned = evaluate_scores(result.model.score(rows[left], rows[right]), labels)
    raw = evaluate_scores(raw_cosine(rows, left, right), labels)
    assert learned["average_precision"] > raw["average_precision"] + 0.1
    assert (result.model.unit, result.model.description["learned"]) == ("log-odds", True)
    json.dumps(result.model.description)


def test_equal_seeds_give_equal_models_and_others_do_not():
    rows, *pairs = groups_in_noise(1)
    first, again, other = (train(rows, *pairs, seed=seed, epochs=3) for seed in (7, 7, 8))
    assert first.model.fingerprint() == again.model.fingerprint()
    assert first.model.fingerprint() != other.model.fingerprint()


def test_scores_are_calibrated_log_odds_and_the_threshold_is_in_their_unit():
    rows, *pairs = groups_in_noise(2)
    valid = groups_in_noise(2, count=601)[1:]
    model = train(rows, *pairs, valid=valid, epochs=10).model
    left, right, labels = valid
    scores = model.score(rows[left], rows[right])
    assert np.mean(1 / (1 + np.exp(-scores))) == pytest.approx(labels.mean(), abs=0.02)
    slope, offset = fit_log_odds(scores, labels)
    assert (slope, offset) == pytest.approx((1, 0), abs=1e-4)
    assert scores.min() < model.threshold < scores.max()


def test_grades_are_learned_in_their_own_unit():
    rows, left, right, labels = groups_in_noise(3)
    grades = 2 + 3 * labels
    model = train(rows, left, right, grades, graded=True, batch=64).model
    scores = model.score(rows[left], rows[right])
    assert (model.unit, model.threshold) == ("grade", None)
    assert abs(scores - grades).mean() < 0.6
    assert fit_grade(np.array([1.0, 2.0]), np.array([5.0, 8.0])) == pytest.approx((3, 2))


@pytest.mark.parametrize("dim", [1, 5, 12])
def test_dim_is_the_number_of_columns_of_a_projection(dim):
    rows, *pairs = groups_in_noise(4)
    model = train(rows, *pairs, dim=dim, epochs=8, head="cosine").model
    assert model.description["dim"] == dim
    if model.description["learned"]:
        assert model.branches[0].projection.shape == (dim, 12)


def test_each_epoch_is_reported_and_the_best_one_is_kept():
    rows, *pairs = groups_in_noise(5)
    seen = []
    result = train(rows, *pairs, valid=pairs, epochs=5, on_epoch=seen.append)
    assert seen == result.history
    assert [entry["epoch"] for entry in seen] == [1, 2, 3, 4, 5]
    left, right, labels = pairs
    reached = evaluate_scores(result.model.score(rows[left], rows[right]), labels)
    best = max(entry["average_precision"] for entry in seen)
    assert reached["average_precision"] == pytest.approx(best, abs=1e-3)


def test_where_learning_does_not_help_the_raw_cosine_is_kept_and_said():
    rows, left, right, _ = groups_in_noise(6)
    good = (raw_cosine(rows, left, right) > 0.2).astype(float)  # cosine is the truth itself
    shuffled = np.random.default_rng(0).permutation(good)
    result = train(rows, left, right, shuffled, valid=(left, right, good), epochs=2)
    assert result.model.branches[0].projection is None
    assert any("raw cosine was kept" in note for note in result.notes)
    assert result.model.description["learned"] is False
    np.testing.assert_array_equal(
        np.argsort(result.model.score(rows[left[:50]], rows[right[:50]])),
        np.argsort(raw_cosine(rows, left[:50], right[:50])),
    )


@pytest.mark.parametrize("graded", [False, True])
def test_few_pairs_only_calibrate_the_raw_cosine(graded):
    rows, left, right, labels = groups_in_noise(7, count=20)
    result = train(rows, left, right, labels, graded=graded)
    assert "the 20 pairs are too few to learn from" in result.notes[0]
    assert result.model.branches[0].projection is None
    assert result.model.unit == ("grade" if graded else "log-odds")
    assert (result.model.threshold is None) == graded


def test_scores_that_rise_against_the_labels_are_said_to_tell_nothing():
    rows, left, right, labels = groups_in_noise(8, count=25)
    cosine = raw_cosine(rows, left, right)
    labels = (cosine < np.median(cosine)).astype(float)
    result = train(rows, left, right, labels)
    assert any("higher scores do not go with higher labels" in note for note in result.notes)
    assert np.isfinite(result.model.score(rows[left], rows[right])).all()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"labels": np.ones(600)}, DataError, "all 600 pairs are good"),
        ({"labels": np.zeros(600)}, DataError, "all 600 pairs are bad"),
        ({"labels": np.full(600, 2.5)}, DataError, r"label 2\.5 came in the pairs, expected 0"),
        ({"labels": np.full(600, np.nan), "graded": True}, DataError, "label nan"),
        ({"labels": np.full(600, 3.0), "graded": True}, DataError, "of grade 3"),
        ({"labels": np.ones(599)}, ArgumentError, "same length"),
        ({"left": np.full(600, 60)}, DataError, "row 60 in the pairs is not one of the 60"),
        ({"left": np.full(600, -1)}, DataError, "row -1"),
        ({"left": np.full(600, 0.5)}, ArgumentError, "expected integers"),
        ({"valid": (np.array([1]), np.array([2]), np.array([1.0]))}, DataError, "all 1 validation"),
        ({"valid": (np.empty(0, int), np.empty(0, int), np.empty(0))}, DataError, "no validation"),
        ({"head": "cosine+magic"}, ArgumentError, "no head 'magic'"),
        ({"loss": "hinge"}, ArgumentError, "no loss 'hinge'"),
        ({"dim": 13}, ArgumentError, "dim is 13, expected 1 to 12"),
        ({"epochs": 0}, ArgumentError, "epochs is 0"),
        ({"batch": -1}, ArgumentError, "batch is -1"),
        ({"learning_rate": float("nan")}, ArgumentError, "learning_rate is nan"),
        ({"embeddings": np.full((60, 12), np.inf)}, DataError, "row 0 of the embeddings"),
        ({"embeddings": np.ones(60)}, ArgumentError, r"shape \(60,\)"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(change, error, text):
    names = ("embeddings", "left", "right", "labels")
    arguments = dict(zip(names, groups_in_noise(9), strict=True))
    with pytest.raises(error, match=text):
        train(**{**arguments, **change})


def test_validation_pairs_share_no_entity_where_the_graph_of_pairs_allows():
    pairs = Pairs(*pairs_of_pairs(100))
    learn, held, how = split_pairs(pairs, np.random.default_rng(0))
    assert "by entity" in how
    assert len(learn) + len(held) == 100
    assert 10 <= len(held) <= 35
    assert not {*learn.left, *learn.right} & {*held.left, *held.right}


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_repeats_and_swapped_repeats_stay_on_one_side(seed):
    rng = np.random.default_rng(seed)
    left, right = rng.integers(0, 12, (2, 200))
    pairs = Pairs(left, right, rng.integers(0, 2, 200).astype(float))
    learn, held, how = split_pairs(pairs, rng)
    assert "by pair" in how
    sides = [{frozenset(p) for p in zip(s.left, s.right, strict=True)} for s in (learn, held)]
    assert not sides[0] & sides[1]
    assert np.ptp(learn.labels) > 0 < np.ptp(held.labels)


def test_one_good_pair_cannot_be_on_both_sides_and_that_is_said():
    left, right, labels = pairs_of_pairs(40)
    labels = (labels * 0) + (np.arange(40) == 3)
    assert split_pairs(Pairs(left, right, labels), np.random.default_rng(0)) is None
    rows = np.random.default_rng(0).normal(size=(80, 4))
    assert "too few of one kind" in train(rows, left, right, labels).notes[0]


@given(
    st.lists(st.tuples(st.floats(-50, 50), st.integers(0, 1)), min_size=2).filter(
        lambda pairs: len({label for _, label in pairs}) == 2
    )
)
def test_calibration_of_any_scores_is_finite(pairs):
    scores, labels = np.array(pairs).T
    assert np.isfinite(fit_log_odds(scores, labels)).all()


def test_calibration_equals_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    scores = rng.normal(size=3000)
    labels = (rng.random(3000) < 1 / (1 + np.exp(1 - 2 * scores))).astype(float)
    model = LogisticRegression(C=1e9).fit(scores[:, None], labels)
    expected = (model.coef_[0, 0], model.intercept_[0])
    assert fit_log_odds(scores, labels) == pytest.approx(expected, abs=0.02)


def digit_pairs() -> tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    from sklearn.datasets import load_digits

    data = load_digits()
    rng = np.random.default_rng(0)
    parts = np.split(rng.permutation(len(data.data)), [1078, 1347])
    pairs = {}
    for name, part, count in zip(("train", "valid", "test"), parts, (20000, 5000, 0), strict=True):
        left, right = (part[side] for side in np.triu_indices(len(part), 1))
        if count:
            chosen = rng.choice(len(left), count, replace=False)
            left, right = left[chosen], right[chosen]
        pairs[name] = (left, right, (data.target[left] == data.target[right]).astype(float))
    return data.data, pairs


def test_digits_of_unseen_images_are_told_apart():
    rows, pairs = digit_pairs()
    model = train(rows, *pairs["train"], valid=pairs["valid"]).model
    left, right, labels = pairs["test"]
    assert evaluate_scores(model.score(rows[left], rows[right]), labels)["auc"] > 0.975
    assert evaluate_scores(raw_cosine(rows, left, right), labels)["auc"] < 0.88


@pytest.mark.skipif(not REAL_DATA.exists(), reason="needs the project's shared data folder")
def test_the_default_reaches_its_bar_on_amazon_google():
    h5py = pytest.importorskip("h5py")
    csv = pytest.importorskip("pyarrow.csv")
    with h5py.File(REAL_DATA / "embeddings.h5") as file:
        rows = file["embeddings"][:]
        number = {key.decode(): i for i, key in enumerate(file["ids"][:])}
    pairs = {}
    for name in ("train", "valid", "test"):
        table = csv.read_csv(REAL_DATA / f"pairs_{name}.csv").to_pydict()
        sides = [np.array([number[key] for key in table[side]]) for side in ("id_a", "id_b")]
        pairs[name] = (*sides, np.array(table["label"], float))
    model = train(rows, *pairs["train"], valid=pairs["valid"]).model
    left, right, labels = pairs["test"]
    metrics = evaluate_scores(model.score(rows[left], rows[right]), labels)
    assert metrics["average_precision"] >= 0.71
