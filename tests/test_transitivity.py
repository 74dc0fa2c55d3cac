"""What good pairs imply: a penalty on triples, and implied pairs, of this training alone."""

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_objectives import (
    COLUMNS,
    ROWS,
    assert_gradients_are_those_of,
    some_batch,
    some_score,
)

from fastpair import jobs
from fastpair.comparison import Similarity
from fastpair.errors import ArgumentError, DataError
from fastpair.learner import Entities, Pairs, batch_gradients
from fastpair.model import Branch, Density, Model, Preparation, builtin
from fastpair.objectives import find_losses, transitivity
from fastpair.properties import guarantees_reflexivity, measure_properties
from fastpair.training import train
from fastpair.transitivity import Triples, close_pairs, pair_codes


@pytest.mark.parametrize("reflexive", [0.0, 0.4])
@pytest.mark.parametrize("heads", [["concat"], ["cosine", "absdiff"], ["rbf"], ["mlp"]])
def test_the_penalty_on_triples_knows_its_gradient(heads, reflexive):
    rng = np.random.default_rng(8)
    score, batch = some_score(heads, "linear", rng), some_batch(rng)
    triples = np.array([[0, 1, 2, 3, 7], [1, 2, 3, 6, 0], [4, 5, 6, 2, 1]])
    entities = Entities(rng.normal(size=(ROWS, COLUMNS)), batch.left, batch.right, triples)
    densities = {
        "density": rng.normal(size=(2, ROWS, 3)),
        "triple_density": rng.normal(size=(3, 5, 3)),
    }
    losses = find_losses("ranking")

    def both(transitive=0.7):
        penalties = {"transitive": transitive, "reflexive": reflexive}
        return batch_gradients(score, entities, batch, losses, **densities, **penalties)

    assert both()[0] > both(0.0)[0]  # else nothing of it is tested
    assert_gradients_are_those_of(lambda: both()[0], score, both()[1])


@given(st.lists(st.tuples(*[st.floats(-50, 50)] * 3), min_size=1, max_size=9))
def test_scores_without_penalty_are_transitive_in_probability_too(triples):
    one, other, closing = np.array(triples).T
    value, *_ = transitivity(one, other, closing)
    expected = [max(min(a, b) - c, 0) for a, b, c in triples]
    assert value == pytest.approx(np.mean(expected))
    p, q, r = (1 / (1 + np.exp(-s)) for s in (one, other, closing))
    if value == 0:
        assert (r >= p + q - 1 - 1e-12).all()


def some_pairs(rng, entities, count):
    left, right = rng.integers(0, entities, (2, count))
    labels = (rng.random(count) < 0.5).astype(float)
    codes = pair_codes(left, right, entities)
    first = np.unique(codes, return_index=True)[1]
    return Pairs(left[first], right[first], labels[first], rng.uniform(0.5, 2, len(first)))


@given(seed=st.integers(0, 2**32 - 1), entities=st.integers(2, 9), count=st.integers(1, 25))
def test_triples_are_all_those_of_the_good_pairs_and_no_others(seed, entities, count):
    rng = np.random.default_rng(seed)
    pairs = some_pairs(rng, entities, count)
    labels = {frozenset(p): y for *p, y in zip(pairs.left, pairs.right, pairs.labels, strict=True)}
    good = {p for p, y in labels.items() if y == 1 and len(p) == 2}
    expected = {
        (x, y, z)
        for x, y, z in itertools.permutations(range(entities), 3)
        if {frozenset((x, y)), frozenset((y, z))} <= good and labels.get(frozenset((x, z))) != 0
    }
    triples = Triples(pairs)
    drawn = triples.draw(3000, rng)
    assert set(map(tuple, drawn.T.tolist())) == expected
    assert (len(triples) == 0) <= (not expected)


@given(seed=st.integers(0, 2**32 - 1), entities=st.integers(2, 12), count=st.integers(1, 25))
def test_implied_pairs_are_those_of_connected_entities(seed, entities, count):
    rng = np.random.default_rng(seed)
    pairs = some_pairs(rng, entities, count)
    if not pairs.labels.any():
        pairs.labels[0] = 1
    apart = pair_codes(*rng.integers(0, entities, (2, 5)), entities)
    closed, counts = close_pairs(pairs, apart, entities, largest=6)
    group = np.arange(entities)
    for _ in range(entities):
        for a, b, label in zip(pairs.left, pairs.right, pairs.labels, strict=True):
            if label:
                group[[a, b]] = min(group[a], group[b])
    size = np.bincount(group, minlength=entities)
    implied = {
        a * entities + b
        for a, b in itertools.combinations(range(entities), 2)
        if group[a] == group[b] and size[group[a]] <= 6
    }
    codes = pair_codes(pairs.left, pairs.right, entities)
    good, bad = set(codes[pairs.labels == 1].tolist()), set(codes[pairs.labels == 0].tolist())
    added = slice(len(pairs), None)
    found = pair_codes(closed.left[added], closed.right[added], entities)
    assert set(found.tolist()) == implied - good - bad - set(apart.tolist())
    assert len(found) == counts["added"] == len(set(found.tolist()))
    assert (closed.labels[added] == 1).all()
    assert counts["bad"] == len((implied - good) & bad)
    assert counts["apart"] == len(((implied - good) - bad) & set(apart.tolist()))
    assert counts["groups"] == int((size > 6).sum())
    assert (closed.left[: len(pairs)] == pairs.left).all()
    assert (closed.labels[: len(pairs)] == pairs.labels).all()
    assert closed.weights[added] == pytest.approx(pairs.weights[pairs.labels == 1].mean())


@pytest.fixture(scope="module")
def chains():
    """Groups of 4 along a direction that matters to no label; only neighbours are labelled."""
    rng = np.random.default_rng(0)
    groups, length, columns = 120, 4, 12
    centres = rng.normal(size=(groups, 1, columns))
    centres[..., :4] = 0
    steps = 0.5 * rng.normal(size=(groups, length, columns))
    steps[..., :4] += rng.normal(size=(groups, 1, 4)) * (2 * np.arange(length)[:, None] - 3)
    vectors = (centres + steps).reshape(-1, columns)
    first = (np.arange(groups)[:, None] * length + np.arange(length - 1)).ravel()
    bad = rng.integers(0, len(vectors), (2, 3 * len(first)))
    bad = bad[:, bad[0] // length != bad[1] // length]
    left = np.concatenate([first, bad[0]])
    right = np.concatenate([first + 1, bad[1]])
    labels = (np.arange(len(left)) < len(first)).astype(float)
    return vectors.astype(np.float32), left, right, labels


def learned(chains, **options):
    fast = {"epochs": 10, "pull": 0, "learning_rate": 0.01, "batch": 64}
    return train(*chains, arms="A", head="cosine", density=False, **fast, **options)


def missing(model, chains):
    """Mean of what labelled triples lack, in calibrated log-odds."""
    vectors, left, right, labels = chains
    x, y, z = Triples(Pairs(left, right, labels)).draw(4000, np.random.default_rng(1))
    scores = [model.score(vectors[a], vectors[b]) for a, b in ((x, y), (y, z), (x, z))]
    return transitivity(*scores)[0]


def test_the_penalty_makes_good_triples_more_transitive(chains):
    plain, penalised = learned(chains).model, learned(chains, transitive=1.0).model
    assert missing(penalised, chains) < 0.4 * missing(plain, chains)


def test_equal_seeds_give_equal_models_whatever_the_threads(chains):
    one, two = (learned(chains, transitive=1.0, threads=n).model for n in (1, 2))
    assert one.fingerprint() == two.fingerprint()


def test_implied_pairs_are_added_and_counted(chains):
    vectors, left, right, labels = chains
    valid = (
        np.array([0, 2, 4, 6, 5, 9, 11, 20]),
        np.array([2, 0, 6, 4, 30, 70, 80, 90]),
        np.array([1.0, 1, 1, 1, 0, 0, 0, 0]),
    )
    apart = np.array([8, 13]), np.array([10, 15])
    result = train(
        vectors,
        left,
        right,
        labels,
        valid=valid,
        arms="A",
        epochs=1,
        close_positives=True,
        apart=apart,
    )
    # A chain of 4 implies 3 more pairs; 2 of them all are validation pairs, 2 are kept apart.
    assert any(f"{120 * 3 - 4} implied good pairs were added" in note for note in result.notes)
    assert any("4 more are validation or test pairs" in note for note in result.notes)
    assert result.model.description["pairs"] == len(labels) + 120 * 3 - 4


def test_the_command_takes_test_pairs_that_are_not_added(chains, tmp_path):
    vectors, left, right, labels = chains
    np.save(tmp_path / "e.npy", vectors)
    columns = {"left": left, "right": right, "label": labels.astype(int)}
    pa.csv.write_csv(pa.table(columns), tmp_path / "p.csv")
    pa.csv.write_csv(pa.table({"left": [0], "right": [2]}), tmp_path / "test.csv")
    files = tmp_path / "e.npy", tmp_path / "p.csv", tmp_path / "m.h5"
    options = {"arms": "A", "epochs": 1, "close_positives": True, "transitive": 0.5}
    summary = jobs.train(*files, apart=tmp_path / "test.csv", **options)
    assert any("implied good pairs were added" in note for note in summary["notes"])


@pytest.mark.parametrize("option", [{"transitive": 1.0}, {"close_positives": True}])
def test_grades_and_two_kinds_of_entity_imply_nothing(chains, option):
    for changes in ({"graded": True}, {"asymmetric": True}):
        with pytest.raises(ArgumentError, match="of one kind of entity"):
            learned(chains, **option, **changes)


def test_pairs_that_share_no_entity_have_no_triples(chains):
    vectors = chains[0]
    rows = np.arange(400).reshape(2, 200)
    with pytest.raises(DataError, match="no triple"):
        train(vectors, *rows, np.arange(200) % 2.0, transitive=1.0)
    with pytest.raises(ArgumentError, match="apart says"):
        train(vectors, *rows, np.arange(200) % 2.0, apart=(rows[0], rows[1]))
    with pytest.raises(ArgumentError, match="transitive is"):
        train(vectors, *rows, np.arange(200) % 2.0, transitive=-1.0)


def test_which_formulas_guarantee_that_nothing_beats_oneself():
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(40, 3))
    weights = {"weight": np.array([1.0, 2.0, 0.5])}
    for head, own, sure in (
        ("cosine", {"scale": np.ones(1)}, True),
        ("cosine", {"scale": -np.ones(1)}, False),
        ("sqdiff", {"weight": -weights["weight"]}, True),
        ("sqdiff", weights, False),
        ("product", weights, False),
    ):
        model = Model([Branch(head, own)], 3, Preparation())
        assert guarantees_reflexivity(model) == sure
        beaten = measure_properties(Similarity(model, rows))["reflexivity"]
        assert beaten["guaranteed"] == sure
        assert (beaten["beaten"] > 0) != sure
    assert guarantees_reflexivity(builtin("euclidean"))
    ones = np.ones(3)
    dense = Density(rows.astype(np.float32), ones, ones, ones)
    added = Model([Branch("cosine", {"scale": np.ones(1)})], 3, Preparation(), dense)
    assert not guarantees_reflexivity(added)
