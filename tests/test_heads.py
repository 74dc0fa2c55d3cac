"""Heads are symmetric, know their own gradient, and fold into the formula of the kernels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fastpair import kernels
from fastpair.errors import ArgumentError
from fastpair.heads import HEADS, Folded, find_head, unit_rows

NAMES = sorted(HEADS)


def random_weights(name: str, columns: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    start = find_head(name).initial(columns, rng)
    return {key: rng.normal(size=value.shape) for key, value in start.items()}


def formula(folded: Folded, i: int, j: int) -> float:
    """Evaluate the formula of `fastpair.kernels` on folded rows i and j, term by term."""
    raw = 0.0 if folded.bias is None else folded.bias[i] + folded.bias[j]
    for columns in folded.segments:
        for k, sign in enumerate(columns.signs):
            a, b = columns.values[i][..., k], columns.values[j][..., k]
            if columns.kind == "product":
                raw += sign * (a * b)
            elif columns.kind == "maximum":
                raw += sign * max(a, b)
            elif columns.kind == "absolute":
                raw += sign * abs(a - b)
            elif columns.kind == "squared":
                raw += sign * (a - b) ** 2
            else:
                raise AssertionError(f"no head of now folds into {columns.kind}")
    return float(raw)


@pytest.mark.parametrize("name", NAMES)
def test_forward_is_what_the_name_says(name):
    plain = {
        "cosine": lambda a, b, w: w[0] * (a @ b) / np.sqrt((a @ a) * (b @ b)),
        "dot": lambda a, b, w: w[0] * (a @ b),
        "product": lambda a, b, w: sum(w * a * b),
        "absdiff": lambda a, b, w: sum(w * abs(a - b)),
        "sqdiff": lambda a, b, w: sum(w * (a - b) ** 2),
        "sum": lambda a, b, w: sum(w * (a + b)),
        "max": lambda a, b, w: sum(w * np.where(a > b, a, b)),
        "min": lambda a, b, w: sum(w * np.where(a < b, a, b)),
    }[name]
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(2, 6, 5))
    weights = random_weights(name, 5, rng)
    (weight,) = weights.values()
    raw, _ = find_head(name).forward(left, right, weights)
    expected = [plain(a, b, weight) for a, b in zip(left, right, strict=True)]
    np.testing.assert_allclose(raw, expected, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_agree_with_finite_differences(name):
    rng = np.random.default_rng(1)
    head = find_head(name)
    inputs = {"left": rng.normal(size=(7, 4)), "right": rng.normal(size=(7, 4))}
    weights = random_weights(name, 4, rng)
    upstream = rng.normal(size=7)

    def value() -> float:
        return float(upstream @ head.forward(inputs["left"], inputs["right"], weights)[0])

    _, cache = head.forward(inputs["left"], inputs["right"], weights)
    d_left, d_right, d_weights = head.backward(upstream, cache, weights)
    gradients = {"left": d_left, "right": d_right, **d_weights}
    for key, array in {**inputs, **weights}.items():
        assert gradients[key].shape == array.shape
        for index in np.ndindex(array.shape):
            kept = array[index]
            array[index] = kept + 1e-6
            above = value()
            array[index] = kept - 1e-6
            below = value()
            array[index] = kept
            assert gradients[key][index] == pytest.approx((above - below) / 2e-6, abs=1e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_swapped_pairs_score_the_same_and_types_are_kept(name, dtype):
    rng = np.random.default_rng(2)
    head = find_head(name)
    left, right = rng.normal(size=(2, 20, 9)).astype(dtype)
    weights = {k: v.astype(dtype) for k, v in random_weights(name, 9, rng).items()}
    raw, cache = head.forward(left, right, weights)
    swapped, _ = head.forward(right, left, weights)
    np.testing.assert_array_equal(raw, swapped)
    d_left, d_right, d_weights = head.backward(raw, cache, weights)
    assert {a.dtype for a in (raw, d_left, d_right, *d_weights.values())} == {np.dtype(dtype)}
    scaled, _ = head.forward(left, right, head.scaled(weights, -2.5))
    np.testing.assert_allclose(scaled, -2.5 * raw, rtol=1e-4)


@given(
    name=st.sampled_from(NAMES),
    z=arrays(np.float64, st.tuples(st.just(3), st.integers(1, 6)), elements=st.floats(-9, 9)),
    seed=st.integers(0, 99),
    zeroed=st.booleans(),
)
def test_fold_equals_forward(name, z, seed, zeroed):
    weights = random_weights(name, z.shape[1], np.random.default_rng(seed))
    if zeroed:
        weights = {key: value * (np.arange(len(value)) % 2) for key, value in weights.items()}
    head = find_head(name)
    folded = head.fold(z, weights)
    for columns in folded.segments:
        assert columns.kind in kernels.SEGMENTS
        assert columns.signs.dtype == np.int8
        assert columns.values.shape == (3, len(columns.signs))
        assert columns.values.dtype == np.float64
    left, right = np.divmod(np.arange(9), 3)
    raw, _ = head.forward(z[left], z[right], weights)
    expected = [formula(folded, i, j) for i, j in zip(left, right, strict=True)]
    np.testing.assert_allclose(raw, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_of_a_fold_depends_on_weights_only(name):
    rng = np.random.default_rng(3)
    weights = random_weights(name, 5, rng)
    head = find_head(name)
    some, zeros = head.fold(rng.normal(size=(4, 5)), weights), head.fold(np.zeros((2, 5)), weights)
    assert [c.kind for c in some.segments] == [c.kind for c in zeros.segments]
    for one, other in zip(some.segments, zeros.segments, strict=True):
        np.testing.assert_array_equal(one.signs, other.signs)


def test_the_zero_vector_has_cosine_0_with_everything():
    head, weights = find_head("cosine"), {"scale": np.ones(1)}
    zero, other = np.zeros((1, 3)), np.ones((1, 3))
    for left, right in [(zero, other), (other, zero), (zero, zero)]:
        raw, cache = head.forward(left, right, weights)
        assert raw[0] == 0
        assert all(np.isfinite(g).all() for g in head.backward(np.ones(1), cache, weights)[:2])


@pytest.mark.parametrize("size", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_rows_of_any_length_become_unit_rows(size):
    rows, inverse = unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]]) * size)
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0]], rtol=1e-15)
    np.testing.assert_allclose(inverse * size, [[0.2], [0]], rtol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_weights_do_not_fit(name):
    head = find_head(name)
    start = head.initial(4, np.random.default_rng(0))
    assert head.fits(start, 4)
    assert not head.fits({}, 4)
    assert not head.fits({key: np.ones((4, 4)) for key in start}, 4)
    assert not head.fits({**start, "more": np.ones(1)}, 4)


def test_an_unknown_head_is_refused_with_the_known_ones():
    with pytest.raises(ArgumentError, match="no head 'cosin': choose from cosine, dot"):
        find_head("cosin")
