"""Training learns from pairs, says what it assumed, and refuses what it cannot learn from."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpair.arms import ARMS
from fastpair.calibration import fit_grade, fit_log_odds
from fastpair.errors import ArgumentError, DataError, MismatchError
from fastpair.evaluation import evaluate_scores, pca_model, raw_cosine
from fastpair.heads import HEADS
from fastpair.learner import Pairs
from fastpair.splitting import split_pairs, with_bad_pairs
from fastpair.training import train

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
    valid = (left[:200], right[:200], grades[:200])
    model = train(rows, left, right, grades, valid=valid, graded=True, batch=64).model
    scores = model.score(rows[left], rows[right])
    assert (model.unit, model.threshold) == ("grade", None)
    assert abs(scores - grades).mean() < 0.6
    assert fit_grade(scores[:200], grades[:200]) == pytest.approx((1, 0), abs=1e-4)


@pytest.mark.parametrize("dim", [1, 5, 12])
def test_dim_is_the_number_of_columns_of_a_projection(dim):
    rows, *pairs = groups_in_noise(4)
    model = train(rows, *pairs, dim=dim, epochs=8, head="cosine").model
    if model.description["learned"]:
        assert model.description["dim"] == dim
        assert model.branches[0].tower.projection.shape == (dim, 12)


def test_each_epoch_is_reported_and_the_best_one_is_kept():
    rows, *pairs = groups_in_noise(5)
    seen = []
    said = []
    reports = {"on_epoch": seen.append, "on_estimate": said.append}
    result = train(rows, *pairs, valid=pairs, epochs=5, arms="D", **reports)
    assert 0 < said[0] < 60
    assert seen == result.history
    assert [entry["epoch"] for entry in seen][:2] == [1, 2]
    assert seen[-1]["epoch"] + seen[-1]["epochs_left"] == seen[-1]["epochs"]
    left, right, labels = pairs
    reached = evaluate_scores(result.model.score(rows[left], rows[right]), labels)
    best = max(entry["average_precision"] for entry in seen)
    assert reached["average_precision"] == pytest.approx(best, abs=1e-3)


def test_where_learning_does_not_help_the_raw_cosine_is_kept_and_said():
    rows, left, right, _ = groups_in_noise(6)
    good = (raw_cosine(rows, left, right) > 0.2).astype(float)  # cosine is the truth itself
    shuffled = np.random.default_rng(0).permutation(good)
    result = train(rows, left, right, shuffled, valid=(left, right, good), epochs=2)
    assert result.model.branches[0].tower.kind == "identity"
    assert any("raw cosine was kept" in note for note in result.notes)
    assert result.model.description["learned"] is False
    np.testing.assert_array_equal(
        np.argsort(result.model.score(rows[left[:50]], rows[right[:50]])),
        np.argsort(raw_cosine(rows, left[:50], right[:50])),
    )


def test_the_best_of_the_arms_and_the_simple_similarities_is_kept():
    rows, *pairs = groups_in_noise(10)
    result = train(rows, *pairs, epochs=5)
    names = [entry["arm"] for entry in result.arms]
    assert names == ["raw cosine", "unlabelled PCA", *ARMS]
    (kept,) = (entry for entry in result.arms if entry["kept"])
    assert kept["average_precision"] == max(e["average_precision"] for e in result.arms)
    assert result.model.description["arm"] == kept["arm"]
    assert {entry["arm"] for entry in result.history} == set(ARMS)
    json.dumps([result.arms, result.history])


def test_an_unlabelled_pca_that_ranks_better_is_kept_and_said():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 90)) * np.r_[np.ones(64), np.full(26, 0.5)] + 2
    left, right = rng.integers(0, 300, (2, 500))
    scores = pca_model(rows).score(rows[left], rows[right])
    good = (scores > np.quantile(scores, 0.7)).astype(float)  # the PCA is the truth itself
    shuffled = rng.permutation(good)
    result = train(rows, left, right, shuffled, valid=(left, right, good), epochs=1)
    assert result.model.description["learned"] is False
    assert any("the unlabelled PCA was kept" in note for note in result.notes)
    again = result.model.score(rows[left], rows[right])
    np.testing.assert_array_equal(np.argsort(again), np.argsort(scores))


def test_options_replace_those_of_every_arm_and_equal_arms_learn_once():
    rows, *pairs = groups_in_noise(11)
    same = {"loss": "ranking", "preparation": "centre", "density": False, "dropout": 0.1}
    same |= {"learning_rate": 0.01, "pull": 0.0, "epochs": 2}
    result = train(rows, *pairs, **same)
    assert [entry["arm"] for entry in result.arms][2:] == ["A", "B"]  # they differ in pace
    assert train(rows, *pairs, **same, arms="B,D").arms[-1]["arm"] == "B"
    for entry in result.arms[2:]:
        assert same.items() - {("learning_rate", 0.01)} <= entry["settings"].items()


@pytest.mark.parametrize("head", sorted({*HEADS} - {"sum"}))  # a sum knows no groups
def test_every_head_learns(head):
    rows, *pairs = groups_in_noise(12)
    valid = groups_in_noise(12, count=300)[1:]
    entry = train(rows, *pairs, valid=valid, head=head, arms="B", epochs=20, batch=64).arms[-1]
    assert entry["average_precision"] > 0.6


@pytest.mark.parametrize("tower", ["identity", "linear", "mlp"])
def test_every_tower_learns(tower):
    rows, *pairs = groups_in_noise(13)
    head = {"identity": "product", "linear": "cosine", "mlp": "cosine"}[tower]
    result = train(rows, *pairs, valid=pairs, head=head, tower=tower, arms="B", epochs=20, batch=64)
    raw, _, learned = (entry["average_precision"] for entry in result.arms)
    assert learned > raw + 0.1


def test_pairs_without_weight_are_not_learned_from():
    rows, left, right, labels = groups_in_noise(14)
    valid = groups_in_noise(14, count=300)[1:]
    lies = np.arange(600) % 2
    told = np.where(lies, 1 - labels, labels)
    ignored, believed = (
        train(rows, left, right, told, valid=valid, weights=weights, arms="B", epochs=15, batch=64)
        for weights in (1.0 - lies, None)
    )
    assert ignored.arms[-1]["average_precision"] > believed.arms[-1]["average_precision"] + 0.1


def test_good_pairs_alone_are_enough_where_bad_ones_are_sampled():
    rows, left, right, labels = groups_in_noise(15, count=1500)
    good = labels == 1
    model = train(rows, left[good], right[good], labels[good], loss="sampled", batch=64).model
    unseen = groups_in_noise(15, count=1600)[1:]
    learned = evaluate_scores(model.score(rows[unseen[0]], rows[unseen[1]]), unseen[2])
    raw = evaluate_scores(raw_cosine(rows, *unseen[:2]), unseen[2])
    assert learned["average_precision"] > raw["average_precision"] + 0.1


def test_sampled_bad_pairs_are_new_and_none_is_known_to_be_good():
    rows, left, right, labels = groups_in_noise(16, count=200)
    good = Pairs(left, right, labels)[labels == 1]
    given, held = with_bad_pairs(rows, good[:20], good[20:], np.random.default_rng(0))
    known = {frozenset(pair) for pair in zip(good.left, good.right, strict=True)}
    for before, after in ((good[:20], given), (good[20:], held)):
        bad = after[after.labels == 0]
        assert len(after[after.labels == 1]) == len(before)
        assert len(bad) > len(before)
        assert not known & {frozenset(pair) for pair in zip(bad.left, bad.right, strict=True)}
        assert len({*zip(bad.left, bad.right, strict=True)}) == len(bad)


def test_an_asymmetric_model_is_said_to_be_one():
    rows, *pairs = groups_in_noise(17)
    result = train(rows, *pairs, valid=pairs, asymmetric=True, epochs=20, arms="B", batch=64)
    assert any("THE MODEL IS ASYMMETRIC" in note for note in result.notes)
    assert result.model.asymmetric
    one, other = rows[pairs[0]], rows[pairs[1]]
    assert abs(result.model.score(one, other) - result.model.score(other, one)).max() > 0.01


def test_the_reflexivity_penalty_brings_entities_closer_to_themselves():
    rows, *pairs = groups_in_noise(18)
    shares = []
    for weight in (0.0, 5.0):
        options = {"head": "product+sum", "arms": "B", "epochs": 20, "batch": 64}
        model = train(rows, *pairs, valid=pairs, reflexive=weight, **options).model
        left, right = rows[pairs[0]], rows[pairs[1]]
        shares.append(np.mean(model.score(left, right) > model.score(left, left)))
    assert shares[1] < shares[0]


def test_balance_changes_what_is_learned_but_not_what_scores_mean():
    rows, *pairs = groups_in_noise(19)
    plain, even = (
        train(rows, *pairs, valid=pairs, balance=balance, arms="B", epochs=10).model
        for balance in (False, True)
    )
    assert plain.fingerprint() != even.fingerprint()
    chance = even.probability(even.score(rows[pairs[0]], rows[pairs[1]]))
    assert chance.mean() == pytest.approx(pairs[2].mean(), abs=0.02)


def test_rows_that_are_not_kept_in_memory_give_the_same_model(monkeypatch):
    rows, *pairs = groups_in_noise(20)
    kept = train(rows, *pairs, epochs=3, arms="A")
    monkeypatch.setattr("fastpair.learner.ROWS_KEPT", 0)
    again = train(rows, *pairs, epochs=3, arms="A")
    for one, other in zip(kept.history, again.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_density_takes_part_where_there_are_rows_enough():
    rng = np.random.default_rng(21)
    rows = rng.normal(size=(400, 8))
    rows[:200] += 4  # close to each other, and yet no good pairs
    left, right = rng.integers(0, 400, (2, 2000))
    labels = ((left >= 200) & (right >= 200) & (rng.random(2000) < 0.7)).astype(float)
    model = train(rows, left, right, labels, arms="A").model
    assert model.density is not None
    assert train(rows, left, right, labels, arms="A", density=False).model.density is None
    few = rows[200:290].astype(np.float32)
    left, right = left % 90, right % 90
    assert train(few, left, right, labels, arms="A", epochs=2).model.density is None


def test_epochs_that_are_given_are_kept_in_every_arm():
    rows, *pairs = groups_in_noise(24)
    result = train(rows, *pairs, epochs=2)
    assert [entry["epochs"] for entry in result.arms[2:]] == [2] * len(ARMS)
    assert len(result.history) == 2 * len(ARMS)
    assert train(rows, *pairs, arms="A").arms[-1]["epochs"] > 8  # few pairs, more epochs


@pytest.mark.parametrize(
    "tower", ["linear(bias=1,normalise=1)", "mlp(hidden=16x8,activation=gelu,residual=0)"]
)
def test_towers_take_options_and_more_columns_than_the_embeddings(tower):
    rows, *pairs = groups_in_noise(25)
    entry = train(rows, *pairs, tower=tower, dim=15, arms="B", epochs=3).arms[-1]
    assert entry["settings"]["tower"] == tower


def test_where_a_symmetric_model_is_kept_nothing_claims_the_contrary():
    rows, left, right, _ = groups_in_noise(6)
    good = (raw_cosine(rows, left, right) > 0.2).astype(float)
    shuffled = np.random.default_rng(0).permutation(good)
    valid = (left, right, good)
    result = train(rows, left, right, shuffled, valid=valid, epochs=1, asymmetric=True)
    assert result.model.description["asymmetric"] is False
    assert not any("ASYMMETRIC" in note for note in result.notes)


def test_a_bilinear_head_of_low_rank_starts_at_principal_directions():
    rows, *pairs = groups_in_noise(26)
    assert train(rows, *pairs, head="bilinear(rank=3)", arms="A", epochs=2).history


class Memory:
    """A checkpoint in memory, after which training may be interrupted."""

    def __init__(self, epochs: int) -> None:
        self.left, self.state = epochs, None

    def load(self):
        return self.state

    def save(self, config, arrays):
        self.state = json.loads(json.dumps(config)), {k: v.copy() for k, v in arrays.items()}
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 3, 4, 7, 11])
def test_a_training_that_was_interrupted_ends_as_if_it_had_not_been(after):
    rows, *pairs = groups_in_noise(22)
    options = {"epochs": 4, "dropout": 0.2}
    whole = train(rows, *pairs, **options)
    memory = Memory(after)
    with pytest.raises(KeyboardInterrupt):
        train(rows, *pairs, checkpoint=memory, **options)
    resumed = train(rows, *pairs, checkpoint=memory, **options)
    assert resumed.model.fingerprint() == whole.model.fingerprint()
    assert resumed.notes == [f"continued after {after} epochs", *whole.notes]
    assert [e["loss"] for e in resumed.history] == [e["loss"] for e in whole.history]


def test_another_training_cannot_be_continued():
    rows, *pairs = groups_in_noise(23)
    memory = Memory(2)
    with pytest.raises(KeyboardInterrupt):
        train(rows, *pairs, checkpoint=memory, epochs=4)
    with pytest.raises(MismatchError, match="had other options"):
        train(rows, *pairs, checkpoint=memory, epochs=5)
    with pytest.raises(MismatchError, match="had other embeddings"):
        train(rows * 2 + 1, *pairs, checkpoint=memory, epochs=4)
    with pytest.raises(MismatchError, match="had other pairs"):
        train(rows, pairs[0], pairs[1], 1 - pairs[2], checkpoint=memory, epochs=4)


@pytest.mark.parametrize("graded", [False, True])
def test_few_pairs_only_calibrate_the_raw_cosine(graded):
    rows, left, right, labels = groups_in_noise(7, count=20)
    result = train(rows, left, right, labels, graded=graded)
    assert "the 20 pairs are too few to learn from" in result.notes[0]
    assert result.model.branches[0].tower.kind == "identity"
    assert result.model.unit == ("grade" if graded else "log-odds")
    assert (result.model.threshold is None) == graded


@pytest.mark.parametrize("preparation", [None, "scaling"])
@pytest.mark.parametrize("count", [20, 600])
@pytest.mark.parametrize("dim", [None, 5])
def test_the_head_mahalanobis_gives_a_metric_in_any_case(preparation, count, dim):
    rows, left, right, labels = groups_in_noise(7, count=count)
    labels = np.random.default_rng(1).permutation(labels)  # there is nothing to be learned
    settings = {"head": "mahalanobis", "preparation": preparation, "epochs": 2, "dim": dim}
    result = train(rows, left, right, labels, **settings)
    assert result.model.heads == ("mahalanobis",)
    assert result.model.density is None
    assert result.model.branches[0].outputs(result.model.prepare(rows)).shape[1] == (dim or 12)
    scores = result.model.score(rows[left], rows[right])
    itself = result.model.score(rows[:1], rows[:1])[0]
    assert (scores <= itself).all()
    if count == 20:
        assert "calibration and threshold of the plain distance" in result.notes[0]
    else:
        plain = [entry["arm"] for entry in result.arms if entry["arm"].startswith("distance")]
        assert plain[0] == f"distance ({preparation or 'half-whitening'})"
        assert not {"raw cosine", "unlabelled PCA"} & {entry["arm"] for entry in result.arms}


def test_a_learned_metric_beats_the_plain_distance():
    rows, left, right, labels = groups_in_noise(0)
    seen, unseen = slice(0, 400), slice(400, 600)
    pairs = left[seen], right[seen], labels[seen]
    result = train(rows, *pairs, head="mahalanobis", preparation="scaling", batch=64)
    learned = result.model.score(rows[left[unseen]], rows[right[unseen]])
    plain = -np.linalg.norm(rows[left[unseen]] - rows[right[unseen]], axis=1)
    precision = [
        evaluate_scores(scores, labels[unseen])["average_precision"] for scores in (learned, plain)
    ]
    assert precision[0] > precision[1] + 0.1


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
        ({"arms": "A,Z"}, ArgumentError, "no arm 'Z'"),
        ({"tower": "babel"}, ArgumentError, "tower is 'babel', expected one of identity"),
        ({"preparation": "full"}, ArgumentError, "preparation is 'full', expected one of none"),
        ({"start": "nowhere"}, ArgumentError, "start is 'nowhere'"),
        ({"head": "cosine+rbf"}, ArgumentError, "rbf"),
        ({"dropout": 1.0}, ArgumentError, "dropout is 1"),
        ({"pull": -1.0}, ArgumentError, "pull is -1"),
        ({"reflexive": -1.0}, ArgumentError, "reflexive is -1"),
        ({"consistency": 1.0}, ArgumentError, "consistency is for the head concat"),
        ({"calibrate": "magic"}, ArgumentError, "calibrate is 'magic'"),
        ({"threshold_by": "luck"}, ArgumentError, "threshold-by is 'luck'"),
        ({"prior": 1.0}, ArgumentError, "prior is 1"),
        ({"graded": True, "loss": "sampled"}, ArgumentError, "takes good pairs, not grades"),
        ({"graded": True, "balance": True}, ArgumentError, "not for grades"),
        ({"weights": np.ones(3)}, ArgumentError, r"weights have shape \(3,\)"),
        ({"weights": np.full(600, -1.0)}, DataError, "weight of pair 0 is -1"),
        ({"weights": np.zeros(600)}, DataError, "all 600 weights are 0"),
        ({"labels": np.zeros(600), "loss": "sampled"}, DataError, "needs good ones"),
        (
            {"weights": np.tile([1.0, 0.0], 300), "labels": np.tile([1.0, 0.0], 300)},
            DataError,
            "all have the same label",
        ),
        ({"dim": 0}, ArgumentError, "dim is 0"),
        ({"dim": 13, "tower": "identity"}, ArgumentError, "keeps all 12"),
        ({"dim": 13, "tower": "mlp(residual=1)"}, ArgumentError, "keeps all 12"),
        ({"tower": "mlp(size=3)"}, ArgumentError, "no option 'size', it has hidden"),
        ({"asymmetric": True, "tower": "identity"}, ArgumentError, "asymmetric"),
        ({"density": True, "head": "rbf"}, ArgumentError, "density is not for the head rbf"),
        ({"head": "mahalanobis+cosine"}, ArgumentError, "mahalanobis"),
        ({"start": "random", "tower": "mlp"}, ArgumentError, "start is for the projection"),
        ({"pull": 1.0, "tower": "identity"}, ArgumentError, "pull is for the projection"),
        ({"reflexive": 1.0, "head": "hyperbolic"}, ArgumentError, "nothing scores higher"),
        ({"loss": "sampled+ranking"}, ArgumentError, "cannot be joined"),
        ({"seed": -1}, ArgumentError, "seed is -1"),
        ({"batch": 1}, ArgumentError, "batch is 1"),
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
    assert metrics["average_precision"] >= 0.74
