"""Every loss is its formula and knows its gradient, through every head, tower and penalty."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_heads import random_weights

from fastpair.errors import ArgumentError, DataError
from fastpair.heads import HEADS, find_head
from fastpair.learner import Entities, RawScore, batch_gradients
from fastpair.model import Branch
from fastpair.objectives import LOSSES, SPREAD, Batch, balanced, find_losses, reflexivity
from fastpair.towers import Identity, Linear, Mlp, Tower

ROWS, COLUMNS = 8, 4


def some_batch(rng: np.random.Generator) -> Batch:
    return Batch(
        np.array([0, 1, 0.3, 0.3, 1, 0, 0.7, 1]),
        rng.uniform(0.2, 2, ROWS),
        np.array([0, 0, 1, 1, 2, 2, 3, 3]),
        np.array([4, 5, 4, 6, 7, 5, 2, 0]),
    )


def some_tower(kind: str, rng: np.random.Generator) -> Tower:
    if kind == "identity":
        return Identity()
    if kind == "linear":
        return Linear(rng.normal(size=(3, COLUMNS)), rng.normal(size=3), normalise=True)
    layers = [(rng.normal(size=(5, COLUMNS)), rng.normal(size=5))]
    layers += [(rng.normal(size=(COLUMNS, 5)), rng.normal(size=COLUMNS))]
    return Mlp(layers, kind, residual=True)


def some_score(heads: list[str], tower: str, rng: np.random.Generator, *, asymmetric: bool = False):
    branches = []
    for head in heads:
        left = some_tower(tower, rng)
        weights = random_weights(head, left.columns_out or COLUMNS, rng)
        branches.append(Branch(head, weights, left, some_tower(tower, rng) if asymmetric else None))
    linked = find_head(heads[0]).link != "identity"
    slope = rng.uniform(0.5, 2, 1) if linked else None
    return RawScore(branches, rng.normal(size=1), rng.normal(size=3), slope)


def assert_gradients_are_those_of(value, score: RawScore, gradients, tolerance: float = 2e-6):
    for key, array in score.parameters.items():
        if key not in gradients:
            assert key[1] == "gamma"  # given, not learned
            continue
        assert gradients[key].shape == array.shape, key
        for index in np.ndindex(array.shape):
            kept = array[index]
            array[index] = kept + 1e-6
            above = value()
            array[index] = kept - 1e-6
            below = value()
            array[index] = kept
            expected = (above - below) / 2e-6
            assert gradients[key][index] == pytest.approx(expected, abs=tolerance, rel=1e-5), key


@pytest.mark.parametrize("loss", [*LOSSES, "cross-entropy+ranking:2"])
@pytest.mark.parametrize("tower", ["identity", "linear", "tanh"])
@pytest.mark.parametrize("heads", [[head] for head in HEADS] + [["cosine", "absdiff"]])
def test_gradients_agree_with_finite_differences(heads, tower, loss):
    rng = np.random.default_rng(len(tower))
    score, batch = some_score(heads, tower, rng), some_batch(rng)
    entities = Entities(rng.normal(size=(ROWS, COLUMNS)), batch.left, batch.right)
    densities = rng.normal(size=(2, ROWS, 3))
    losses = find_losses(loss)

    def value() -> float:
        return batch_gradients(score, entities, batch, losses, density=densities)[0]

    _, gradients = batch_gradients(score, entities, batch, losses, density=densities)
    assert_gradients_are_those_of(value, score, gradients)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("penalties", [{"reflexive": 0.7}, {"consistency": 0.6}])
@pytest.mark.parametrize("heads", [["concat"], ["cosine", "concat"], ["rbf"]])
def test_penalties_know_their_gradient_too(heads, penalties, asymmetric):
    rng = np.random.default_rng(3)
    score, batch = some_score(heads, "linear", rng, asymmetric=asymmetric), some_batch(rng)
    entities = Entities(rng.normal(size=(ROWS, COLUMNS)), batch.left, batch.right)
    densities = rng.normal(size=(2, ROWS, 3))
    losses = find_losses("ranking")

    def both():
        return batch_gradients(score, entities, batch, losses, density=densities, **penalties)

    assert_gradients_are_those_of(lambda: both()[0], score, both()[1])


def test_losses_are_their_formulas():
    raw, weight = np.array([0.5, -1.0, 2.0]), np.array([1.0, 2.0, 3.0])
    target = np.array([1.0, 0.0, 0.5])
    batch = Batch(target, weight, np.array([0, 1, 0]), np.array([2, 3, 4]))

    def mean(values):
        return np.average(values, weights=weight)

    def pairs(function, anchored=False):
        chosen = [(p, q) for p in range(3) for q in range(3) if target[p] > target[q]]
        if anchored:
            chosen = [(0, 2)]  # the only two that share an entity
        weights = [weight[p] * weight[q] for p, q in chosen]
        return np.average([function(raw[q] - raw[p]) for p, q in chosen], weights=weights)

    odds = 1 / (1 + np.exp(-raw))
    entropy = -(target * np.log(odds) + (1 - target) * np.log(1 - odds))
    centred = raw - mean(raw), target - mean(target)
    pearson = mean(centred[0] * centred[1]) / np.sqrt(mean(centred[0] ** 2) * mean(centred[1] ** 2))
    expected = {
        "cross-entropy": mean(entropy),
        "cross-entropy:3": 3 * mean(entropy),
        "ranking": pairs(lambda behind: np.log1p(np.exp(behind))),
        "ranking:2": pairs(lambda behind: np.log1p(np.exp(2 * behind))),
        "contrastive:1.5": mean(
            target * np.maximum(1.5 - raw, 0) ** 2 + (1 - target) * np.maximum(1.5 + raw, 0) ** 2
        ),
        "triplet:1": pairs(lambda behind: max(1 + behind, 0), anchored=True),
        "squared": mean((raw - SPREAD * (target - 0.5)) ** 2),
        "correlation": 1 - pearson,
    }
    for name, value in expected.items():
        (loss,) = find_losses(name)
        assert loss(raw, batch)[0] == pytest.approx(value), name


@pytest.mark.parametrize("name", ["ranking", "triplet", "correlation"])
def test_where_nothing_is_to_be_ranked_there_is_no_gradient(name):
    (loss,) = find_losses(name)
    batch = Batch(np.ones(3), np.ones(3), np.arange(3), np.arange(3))
    assert not loss(np.array([1.0, 2.0, 3.0]), batch)[1].any()


@pytest.mark.parametrize("name", LOSSES)
@given(st.lists(st.tuples(st.floats(-1e4, 1e4), st.floats(0, 1)), min_size=2, max_size=20))
def test_losses_of_any_scores_are_finite(name, pairs):
    raw, target = np.array(pairs).T
    batch = Batch(target, np.ones(len(raw)), np.zeros(len(raw), int), np.arange(len(raw)))
    value, gradient = LOSSES[name](raw, batch)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["hinge", "ranking:0", "ranking:x", "triplet:-1", "squared:nan"])
def test_losses_that_there_are_not_are_refused(name):
    with pytest.raises(ArgumentError, match="loss"):
        find_losses(name)


def test_reflexivity_is_0_where_everyone_is_most_similar_to_itself():
    share = np.array([0.5, 0.5])
    value, *_ = reflexivity(np.array([0.0, -1.0]), np.full(2, 50.0), np.full(2, 60.0), share)
    assert value == pytest.approx(0, abs=1e-20)
    value, *_ = reflexivity(np.zeros(2), np.zeros(2), np.zeros(2), share)
    assert value == pytest.approx(np.log(2))


def test_balanced_kinds_count_the_same():
    labels = np.array([1.0, 0, 0, 0, 0, 1])
    weights = balanced(labels, np.array([1.0, 2, 1, 1, 4, 3]))
    assert weights[labels == 1].sum() == pytest.approx(weights[labels == 0].sum())
    assert weights.mean() == pytest.approx(1)
    assert weights[5] == pytest.approx(3 * weights[0])
    with pytest.raises(DataError, match="no good pair has a weight above 0"):
        balanced(labels, np.array([0.0, 1, 1, 1, 1, 0]))
