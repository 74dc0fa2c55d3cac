"""Training of id models: what is learned, when it ends, and that threads do not matter."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from fastpair.errors import ArgumentError, DataError
from fastpair.id_learners import group_count, rounds_of_blocks
from fastpair.training_ids import _Search, train_ids

LEFT, RIGHT, PAIRS = 150, 200, 6000


def planted(seed=0, alone=False):
    """Pairs, their true scores, and the true scores of all pairs, from planted vectors."""
    rng = np.random.default_rng(seed)
    p = rng.normal(size=(LEFT, 3))
    q = p if alone else rng.normal(size=(RIGHT, 3))
    b, c = rng.normal(size=len(p)), rng.normal(size=len(q))
    c = b if alone else c
    truth = p @ q.T + b[:, None] + c
    cells = rng.permutation(truth.size)[:PAIRS]
    left, right = np.unravel_index(cells, truth.shape)
    return left, right, truth


def counts(alone):
    return (LEFT, None) if alone else (LEFT, RIGHT)


def score(result, left, right):
    others = result.left if result.right is None else result.right
    return result.model.score(result.left[left], others[right])


def ranked_right(result, truth):
    """Mean over left rows of the AUC of what is good among all right rows."""
    columns = np.arange(truth.shape[1])
    return np.mean(
        [
            roc_auc_score(row > 1, score(result, np.full(len(row), n), columns))
            for n, row in enumerate(truth)
            if 0 < np.sum(row > 1) < len(row)
        ]
    )


def everything(truth):
    return np.indices(truth.shape).reshape(2, -1)


@pytest.mark.parametrize("alone", [False, True])
def test_grades_of_pairs_that_were_not_seen_are_predicted(alone):
    left, right, truth = planted(alone=alone)
    grades = 50 + 10 * truth[left, right]
    result = train_ids(left, right, grades, counts(alone), graded=True, dim=8, decay=0.01)
    error = score(result, *everything(truth)) - (50 + 10 * truth.reshape(-1))
    assert np.sqrt(np.mean(error**2)) < 0.45 * 10 * truth.std()
    assert result.model.unit == "grade"
    assert result.metric == "rmse"


@pytest.mark.parametrize("alone", [False, True])
def test_log_odds_of_labels_rank_unseen_pairs_and_have_the_right_sign(alone):
    left, right, truth = planted(alone=alone)
    labels = (truth[left, right] > 0).astype(float)
    result = train_ids(left, right, labels, counts(alone), dim=8)
    scores = score(result, *everything(truth))
    assert roc_auc_score(truth.reshape(-1) > 0, scores) > 0.88
    assert np.mean((scores > 0) == (truth.reshape(-1) > 0)) > 0.75
    assert result.model.unit == "log-odds"
    assert result.model.threshold is not None


@pytest.mark.parametrize("loss", ["bpr", "softmax"])
@pytest.mark.parametrize("alone", [False, True])
def test_good_pairs_alone_beat_chance_clearly(alone, loss):
    left, right, truth = planted(alone=alone)
    good = truth[left, right] > 1
    result = train_ids(left[good], right[good], None, counts(alone), loss=loss, dim=8)
    assert ranked_right(result, truth) > 0.75  # chance: 0.5
    assert any("drawn at random" in note for note in result.notes)


@pytest.mark.parametrize("loss", ["squared", "cross-entropy", "bpr", "softmax"])
@pytest.mark.parametrize("alone", [False, True])
def test_tables_do_not_depend_on_the_number_of_threads_but_on_the_seed(alone, loss):
    left, right, truth = planted(alone=alone)
    labels = truth[left, right] if loss == "squared" else (truth[left, right] > 0) * 1.0
    options = {"graded": loss == "squared", "loss": loss, "epochs": 2, "dim": 5}

    def learned(threads, seed=0):
        result = train_ids(
            left, right, labels, counts(alone), threads=threads, seed=seed, **options
        )
        return result.left if alone else np.concatenate([result.left, result.right])

    one = learned(1)
    assert np.array_equal(one, learned(3))
    assert not np.array_equal(one, learned(1, seed=1))


def test_learning_stops_where_validation_pairs_say_so_and_keeps_the_best_epoch():
    left, right, _ = planted()
    grades = np.random.default_rng(1).normal(size=PAIRS)  # nothing to learn
    seen = []
    result = train_ids(
        left, right, grades, counts(False), graded=True, decay=0.0, on_epoch=seen.append
    )
    values = [entry["rmse"] for entry in result.history]
    assert len(values) < 30
    assert seen == result.history
    assert result.best == min(values)
    assert result.model.description["epochs"] == 1 + values.index(min(values))
    assert result.history[-1]["epochs_left"] == 0
    again = train_ids(left, right, grades, counts(False), graded=True, decay=0.0)
    assert np.array_equal(again.left, result.left)


class Wandering:
    """A learner whose error in each epoch is given."""

    def __init__(self, errors):
        self.errors, self.done = errors, 0

    def epoch(self, height, rng):
        self.done += 1
        return 0.0

    def raw(self, left, right):
        return np.full(len(left), self.errors[self.done - 1])

    def state(self):
        return {"epoch": self.done}

    def restore(self, state):
        self.done = state["epoch"]


def test_the_best_epoch_is_put_back():
    learner = Wandering([3.0, 1.0, 2.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 0.1])
    held = (np.zeros(2, np.int32), np.zeros(2, np.int32), np.zeros(2))
    search = _Search(learner, held, "rmse", 0.0, 1.0)
    search.run(10, np.random.default_rng(0), lambda entry: None)
    assert (learner.done, search.best_epoch, search.best) == (4, 4, 0.5)
    assert len(search.history) == 9  # five without a better one: the tenth is not tried


def test_validation_pairs_of_unknown_ids_are_left_out_with_a_note():
    left, right, truth = planted()
    grades = truth[left, right]
    held = (np.r_[left[:500], -1, 3], np.r_[right[:500], 4, -1], np.r_[grades[:500], 9, 9])
    rest = (left[500:], right[500:], grades[500:], counts(False))
    result = train_ids(*rest, valid=held, graded=True, epochs=1)
    assert any(note.startswith("2 validation pairs have ids") for note in result.notes)


def test_the_parts_of_implicit_feedback_end_in_the_left_vectors():
    left, right, truth = planted()
    args = (left, right, truth[left, right], counts(False))
    plain = train_ids(*args, graded=True, implicit=False, epochs=3)
    implied = train_ids(*args, graded=True, implicit=True, epochs=3)
    assert plain.left.shape == implied.left.shape
    assert not np.array_equal(plain.left, implied.left)


HEADS = ["cosine", "product", "sqdiff", "absdiff", "max", "bilinear", "mean-interaction"]


@pytest.mark.parametrize(
    "head", [*HEADS, "mahalanobis", "rbf", "hyperbolic", "mirrored", "mlp(hidden=8)"]
)
def test_any_head_learns_and_the_model_scores_what_was_learned(head):
    left, right, truth = planted(alone=True)
    labels = (truth[left, right] > 0).astype(float)
    result = train_ids(left, right, labels, counts(True), head=head, dim=4, epochs=6)
    scores = score(result, *everything(truth))
    assert roc_auc_score(truth.reshape(-1) > 0, scores) > 0.6
    swapped = score(result, *everything(truth)[::-1])
    assert np.allclose(scores, swapped)
    assert result.history[-1]["log_loss"] < 0.69


@pytest.mark.parametrize("loss", ["bpr", "softmax"])
def test_other_heads_learn_from_good_pairs_alone(loss):
    left, right, truth = planted()
    good = truth[left, right] > 1
    args = (left[good], right[good], None, counts(False))
    result = train_ids(*args, head="cosine", loss=loss, dim=8, epochs=15)
    assert ranked_right(result, truth) > 0.7


@given(st.sampled_from([1, 2, 4, 8, 16]), st.booleans())
def test_blocks_of_a_round_share_no_group_and_each_block_comes_once(groups, alone):
    rounds = rounds_of_blocks(groups, alone)
    blocks = [block for tasks in rounds for task in tasks for block in task]
    assert sorted(blocks) == list(range(groups**2))
    for tasks in rounds:
        used = []
        for task in tasks:
            sides = [(block // groups, block % groups) for block in task]
            lefts, rights = {g for g, _ in sides}, {h for _, h in sides}
            used += [*(lefts | rights)] if alone else [("l", *lefts), ("r", *rights)]
        assert len(used) == len(set(used))


def test_small_tables_have_fewer_groups_to_draw_from():
    assert group_count((10_000, 10_000), True) == 16
    assert group_count((10_000, 100), True) == 1
    assert group_count((3, None), False) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "triplet"}, "loss is 'triplet'"),
        ({"loss": "bpr", "graded": True}, "grades are learned with the loss squared"),
        ({"loss": "squared"}, "say --graded"),
        ({"negatives": 3}, "negatives are drawn"),
        ({"batch": 64}, "batch is for other heads"),
        ({"head": "cosine", "implicit": True}, "implicit is for the head dot"),
        ({"head": "cosine+dot"}, "under one head"),
        ({"dim": 0}, "dim is 0"),
        ({"rate": 0.0}, "learning rate is 0.0"),
        ({"decay": -1.0}, "weight decay -1.0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"prior": 2.0}, "prior is 2.0"),
    ],
)
def test_options_that_cannot_be_used_are_refused_in_one_sentence(options, words):
    left, right, truth = planted()
    labels = (truth[left, right] > 0).astype(float)
    with pytest.raises(ArgumentError, match=words):
        train_ids(left, right, labels, counts(False), **options)


def test_pairs_that_cannot_be_learned_from_are_refused_in_one_sentence():
    left, right, _ = planted()
    ones = np.ones(PAIRS)
    with pytest.raises(DataError, match="have the label 1: give pairs of other labels"):
        train_ids(left, right, ones, counts(False))
    with pytest.raises(DataError, match="label 3 came"):
        train_ids(left, right, 3 * ones, counts(False))
    with pytest.raises(DataError, match="there are 20 pairs to learn from, expected 30"):
        train_ids(left[:20], right[:20], None, counts(False))
    with pytest.raises(DataError, match="outside the 150 rows"):
        train_ids(left + 1, right, None, counts(False))
    with pytest.raises(DataError, match="two different ids"):
        train_ids(left, left, None, counts(True))
    with pytest.raises(ArgumentError, match="needs labels"):
        train_ids(left, right, None, counts(False), loss="cross-entropy")
