"""Towers know their own gradient, keep the type of their input, and survive being taken apart."""

import json

import numpy as np
import pytest
from test_heads import GIVEN, NAMES, random_weights

from fastpair.errors import ArgumentError
from fastpair.heads import find_head
from fastpair.model import Branch
from fastpair.towers import ACTIVATIONS, Identity, Linear, Mlp, Tower, parse_tower, start_tower


def some_tower(kind, rng, columns=4, dim=3, normalise=False, dtype=np.float64):
    """A tower of random arrays; kind is a name, for mlp towers with activation and residual."""

    def random(*shape):
        return rng.normal(size=shape).astype(dtype)

    if kind == "identity":
        return Identity(normalise=normalise)
    if kind.startswith("linear"):
        bias = random(dim) if kind == "linear with bias" else None
        return Linear(random(dim, columns), bias, normalise=normalise)
    residual = kind.endswith("residual")
    dim = columns if residual else dim
    layers = [
        (random(5, columns), random(5)),
        (random(6, 5), random(6)),
        (random(dim, 6), random(dim)),
    ]
    return Mlp(layers, kind.split()[0], residual, normalise=normalise)


KINDS = ["identity", "linear", "linear with bias", "relu", "tanh", "gelu", "tanh residual"]


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_agree_with_finite_differences(kind, normalise):
    rng = np.random.default_rng(0)
    tower = some_tower(kind, rng, normalise=normalise)
    rows = rng.normal(size=(6, 4))
    z, cache = tower.forward(rows)
    upstream = rng.normal(size=z.shape)
    gradients = tower.backward(upstream, cache)
    assert gradients.keys() == tower.parameters.keys()
    for name, array in tower.parameters.items():
        for index in np.ndindex(array.shape):
            kept, values = array[index], []
            for step in (1e-6, -1e-6):
                array[index] = kept + step
                values.append(float((upstream * tower.forward(rows)[0]).sum()))
            array[index] = kept
            slope = (values[0] - values[1]) / 2e-6
            assert gradients[name][index] == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("kind", ["identity", "linear with bias", "gelu", "tanh residual"])
@pytest.mark.parametrize("head", NAMES)
def test_gradients_through_every_head_agree_with_finite_differences(head, kind, normalise):
    rng = np.random.default_rng(5)
    tower = some_tower(kind, rng, normalise=normalise)
    weights = random_weights(head, tower.columns_out or 4, rng)
    branch = Branch(find_head(head).name, weights, tower)
    left, right = rng.normal(size=(2, 5, 4))
    upstream = rng.normal(size=5)
    gradients = branch.backward(upstream, branch.forward(left, right)[1])
    assert gradients.keys() == branch.parameters.keys() - GIVEN
    for name, gradient in gradients.items():
        array = branch.parameters[name]
        toward = rng.normal(size=array.shape)
        values = []
        for step in (1e-6, -2e-6):
            array += step * toward
            values.append(float(upstream @ branch.forward(left, right)[0]))
        array += 1e-6 * toward
        slope = (values[0] - values[1]) / 2e-6
        assert (gradient * toward).sum() == pytest.approx(slope, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_types_are_kept_and_normalised_outputs_have_length_1(kind, dtype):
    rng = np.random.default_rng(1)
    tower = some_tower(kind, rng, normalise=True, dtype=dtype)
    z, cache = tower.forward(rng.normal(size=(6, 4)).astype(dtype))
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-6)
    assert {a.dtype for a in (z, *tower.backward(z, cache).values())} == {np.dtype(dtype)}


def test_an_output_of_zeros_stays_zero_and_has_a_gradient():
    tower = Linear(np.eye(3), normalise=True)
    z, cache = tower.forward(np.zeros((2, 3)))
    assert (z == 0).all()
    assert (tower.backward(np.ones((2, 3)), cache)["projection"] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_parts_give_the_same_tower(kind):
    rng = np.random.default_rng(2)
    tower = some_tower(kind, rng, normalise=True)
    config = json.loads(json.dumps(tower.to_config()))
    again = Tower.from_config(config, tower.parameters)
    rows = rng.normal(size=(5, 4))
    np.testing.assert_array_equal(tower.forward(rows)[0], again.forward(rows)[0])
    tower.check(4)
    assert (again.columns_out or 4) == tower.forward(rows)[0].shape[1]


@pytest.mark.parametrize(
    ("config", "arrays", "text"),
    [
        ({"kind": "cube"}, {}, "no tower 'cube'"),
        ({"kind": "linear"}, {}, "do not fit a tower of kind linear"),
        ({"kind": "identity"}, {"projection": np.eye(2)}, "do not fit"),
        ({"kind": "mlp"}, {"matrix_0": np.eye(2)}, "do not fit a tower of kind mlp"),
    ],
)
def test_unsound_parts_are_refused(config, arrays, text):
    with pytest.raises(ArgumentError, match=text):
        Tower.from_config(config, arrays)


@pytest.mark.parametrize(
    ("tower", "text"),
    [
        (Linear(np.ones((2, 3))), r"expected \(any, 4\)"),
        (Linear(np.ones((2, 4)), np.ones(3)), "bias"),
        (Mlp([(np.ones((3, 4)), np.ones(3))]), "2 or more"),
        (Mlp([(np.ones((3, 4)), np.ones(3)), (np.ones((2, 5)), np.ones(2))]), "layer 1"),
        (
            Mlp([(np.ones((3, 4)), np.ones(3)), (np.ones((2, 3)), np.ones(2))], "relu", True),
            "resid",
        ),
        (Mlp([(np.ones((3, 4)), np.ones(3)), (np.ones((2, 3)), np.ones(2))], "sine"), "activation"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tower, text):
    with pytest.raises(ArgumentError, match=text):
        tower.check(4)


def test_linear_towers_start_where_they_are_told():
    rng = np.random.default_rng(3)
    rows = (rng.normal(size=(200, 6)) * [5, 4, 0.1, 0.1, 3, 0.1]).astype(np.float32)
    same = start_tower("linear", rows, rng=rng)
    np.testing.assert_array_equal(same.forward(rows)[0], rows)
    fewer = start_tower("linear", rows, 3, bias=True, rng=rng)
    z = fewer.forward(rows)[0].astype(float)
    np.testing.assert_allclose(np.linalg.norm(z), np.linalg.norm(rows), rtol=1e-2)
    first = start_tower("linear", rows, 2, start="identity", rng=rng).forward(rows)[0]
    np.testing.assert_array_equal(first, rows[:, :2])
    more = start_tower("linear", rows, 9, rng=rng).forward(rows)[0]
    np.testing.assert_array_equal(more[:, :6], rows)
    assert more[:, 6:].any(axis=0).all()
    assert start_tower("linear", rows, 9, start="random", rng=rng).columns_out == 9


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_residual_tower_starts_as_the_identity(activation):
    rng = np.random.default_rng(4)
    rows = rng.normal(size=(10, 6)).astype(np.float32)
    tower = start_tower("mlp", rows, activation=activation, residual=True, rng=rng)
    np.testing.assert_array_equal(tower.forward(rows)[0], rows)
    plain = start_tower("mlp", rows, 3, hidden=(8, 5), activation=activation, rng=rng)
    assert [len(matrix) for matrix, _ in plain.layers] == [8, 5, 3]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"kind": "cube"}, "no tower 'cube'"),
        ({"kind": "identity", "dim": 2}, "keeps all 4"),
        ({"kind": "linear", "start": "zero"}, "start is 'zero'"),
        ({"kind": "linear", "start": "pca", "dim": 5}, "only 4"),
        ({"kind": "mlp", "start": "pca"}, "at random"),
        ({"kind": "mlp", "residual": True, "dim": 3}, "residual"),
        ({"kind": "mlp", "activation": "sine"}, "activation"),
    ],
)
def test_a_start_that_cannot_be_is_refused(settings, text):
    with pytest.raises(ArgumentError, match=text):
        start_tower(rows=np.ones((3, 4)), rng=np.random.default_rng(0), **settings)


def test_options_of_towers_are_read_as_text():
    found = parse_tower("mlp(hidden=128x64, activation=gelu,residual=0,normalise=1)")
    settings = {"hidden": (128, 64), "activation": "gelu", "residual": False, "normalise": True}
    assert found == ("mlp", settings)
    assert parse_tower("linear(bias=1)") == ("linear", {"bias": True})
    assert parse_tower("identity") == ("identity", {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("babel", "expected one of identity"),
        ("linear(hidden=3)", "no option 'hidden'"),
        ("linear(bias=2)", "expected 0 or 1"),
        ("mlp(hidden=0)", "expected widths"),
        ("mlp(activation=sine)", "activation"),
    ],
)
def test_unknown_options_of_towers_are_refused(text, said):
    with pytest.raises(ArgumentError, match=said):
        parse_tower(text)
