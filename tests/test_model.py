"""A model scores what its formula says, folds into it, and survives being taken apart."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_heads import FOLDING, GIVEN, NAMES, formula, random_weights, sums

from fastpair.errors import ArgumentError, DataError, FileError, MismatchError
from fastpair.heads import find_head
from fastpair.kernels.reference import apply_link
from fastpair.model import BUILTINS, Branch, Model, Preparation, builtin
from fastpair.towers import Linear


def random_model(heads: list[str], seed: int = 0, **changes) -> Model:
    rng = np.random.default_rng(seed)
    branches = [
        Branch(find_head(head).name, random_weights(head, 3, rng), Linear(rng.normal(size=(3, 5))))
        for head in heads
    ]
    link = find_head(heads[0]).link
    constant = -0.7 if link == "identity" else 0.0
    fields = {
        "link": link,
        "preparation": Preparation(unit_rows=True),
        "constant": constant,
        "unit": "log-odds",
        "threshold": 0.25,
    }
    return Model(branches, input_columns=5, **{**fields, **changes})


@given(sums.filter(lambda heads: set(heads) <= set(FOLDING)), st.integers(0, 99))
def test_the_folded_formula_equals_the_score(heads, seed):
    model = random_model(heads, seed)
    embeddings = np.random.default_rng(seed).normal(size=(4, 5))
    left, right = np.divmod(np.arange(16), 4)
    folded = model.fold(embeddings)
    expected = [model.constant + formula(folded, i, j) for i, j in zip(left, right, strict=True)]
    scores = model.score(embeddings[left], embeddings[right])
    expected = apply_link(np.array(expected), model.link)
    if model.link == "negative_arcosh":  # its slope has no bound at 0
        scores, expected = np.cosh(scores), np.cosh(expected)
    np.testing.assert_allclose(scores, expected, rtol=1e-7, atol=1e-7)
    swapped = model.score(embeddings[right], embeddings[left])
    if model.link == "negative_arcosh":
        swapped = np.cosh(swapped)
    np.testing.assert_allclose(scores, swapped, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("head", NAMES)
def test_gradients_of_a_branch_with_projection_agree_with_finite_differences(head):
    rng = np.random.default_rng(5)
    branch = random_model([head]).branches[0]
    left, right = rng.normal(size=(2, 6, 5))
    upstream = rng.normal(size=6)
    gradients = branch.backward(upstream, branch.forward(left, right)[1])
    assert gradients.keys() == branch.parameters.keys() - GIVEN
    for name in gradients:
        array = branch.parameters[name]
        for index in np.ndindex(array.shape):
            kept, values = array[index], []
            for step in (1e-6, -1e-6):
                array[index] = kept + step
                values.append(upstream @ branch.forward(left, right)[0])
            array[index] = kept
            slope = (values[0] - values[1]) / 2e-6
            assert gradients[name][index] == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_builtin_similarities_equal_their_definitions():
    rng = np.random.default_rng(1)
    left, right = rng.normal(size=(2, 8, 6))
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    expected = {
        "cosine": (left * right).sum(axis=1) / lengths,
        "dot": (left * right).sum(axis=1),
        "euclidean": -np.linalg.norm(left - right, axis=1),
        "manhattan": -np.abs(left - right).sum(axis=1),
    }
    assert set(expected) == set(BUILTINS)
    for name, scores in expected.items():
        np.testing.assert_allclose(builtin(name).score(left, right), scores, rtol=1e-12)
        assert builtin(name).unit == "similarity"
    with pytest.raises(ArgumentError, match="no built-in similarity 'cosines'"):
        builtin("cosines")


@pytest.mark.parametrize(
    "model", [random_model(["cosine", "min"]), builtin("euclidean"), random_model(["rbf"])]
)
def test_calibration_moves_every_score_alike(model):
    rng = np.random.default_rng(2)
    left, right = rng.normal(size=(2, 8, 5))
    calibrated = model.calibrated(3.0, -1.5, unit="log-odds", threshold=0.5)
    expected = -1.5 + 3.0 * model.score(left, right)
    np.testing.assert_allclose(calibrated.score(left, right), expected, rtol=1e-12)
    assert (calibrated.unit, calibrated.threshold) == ("log-odds", 0.5)


@given(sums, st.integers(0, 9))
def test_parts_pass_through_json_and_give_the_same_model(heads, seed):
    model = random_model(heads, seed, description={"seed": seed})
    config, arrays = model.to_parts()
    again = Model.from_parts(json.loads(json.dumps(config)), arrays)
    assert again.fingerprint() == model.fingerprint()
    assert again.description == {"seed": seed}


def test_the_fingerprint_changes_with_anything_in_the_model():
    model = random_model(["cosine", "absdiff"])
    changed = [random_model(["cosine", "absdiff"], threshold=None)]
    changed += [random_model(["cosine", "sqdiff"]), random_model(["cosine", "absdiff"], constant=1)]
    config, arrays = model.to_parts()
    for name, value in arrays.items():
        other = value.copy()
        other.flat[0] += 1e-9
        changed.append(Model.from_parts(config, {**arrays, name: other}))
    prints = {model.fingerprint(), *(other.fingerprint() for other in changed)}
    assert len(prints) == len(changed) + 1


TOWERLESS = {"tower": {"kind": "identity", "normalise": False}}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"branches": [{**TOWERLESS, "head": "nonsense", "weights": []}]}, "no head 'nonsense'"),
        ({"branches": [{**TOWERLESS, "head": "cosine", "weights": ["lost"]}]}, "lost"),
        ({"branches": []}, "at least one branch"),
        ({"branches": 7}, "not a model"),
        ({"constant": float("nan")}, "constant is nan"),
        ({"constant": "high"}, "not a model"),
        ({"slope": 0.0}, "slope is 0"),
        ({"link": "cube"}, "link is 'cube'"),
        ({"unit": "metre"}, "unit is 'metre'"),
        ({"input_columns": 4}, r"expected \(any, 4\)"),
        ({"input_columns": 0}, "input_columns is 0"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_unsound_parts_are_refused(change, text):
    config, arrays = random_model(["cosine"]).to_parts()
    with pytest.raises(FileError, match=text):
        Model.from_parts({**config, **change}, arrays)


@pytest.mark.parametrize("value", [np.full((3, 5), np.nan), np.ones(5), np.ones((0, 5)), "text"])
def test_unsound_arrays_are_refused(value):
    config, arrays = random_model(["cosine"]).to_parts()
    with pytest.raises(FileError):
        Model.from_parts(config, {**arrays, "branch_0_tower.projection": value})


def test_heads_that_stand_alone_are_refused_in_a_sum():
    one = {"log_gamma": np.zeros(1)}
    with pytest.raises(ArgumentError, match="stands alone"):
        Model([Branch("rbf", one), Branch("rbf", one)], 3, link="exponential")
    with pytest.raises(ArgumentError, match="needs the link exponential, not identity"):
        Model([Branch("rbf", one)], 3)


def test_embeddings_that_cannot_be_used_are_refused():
    model = random_model(["cosine"])
    with pytest.raises(MismatchError, match="have 4 columns but the model was trained on 5"):
        model.fold(np.ones((2, 4)))
    with pytest.raises(DataError, match="row 1 of the embeddings holds NaN"):
        model.fold(np.array([[1.0] * 5, [np.nan] * 5]))
    with pytest.raises(ArgumentError, match=r"shape \(5,\)"):
        model.fold(np.ones(5))
    with pytest.raises(ArgumentError, match="expected the same"):
        model.score(np.ones((2, 5)), np.ones((3, 5)))
    builtin("cosine").check_embeddings(7)
