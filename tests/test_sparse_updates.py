"""Steps of the kernels that learn tables, against numerical gradients in float64."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpair.kernels import aligned_empty
from fastpair.kernels import sparse_updates as kernels

DIM, PADDED = 5, 16
RATES, DECAYS = np.array([0.3, 0.2], np.float32), np.array([0.07, 0.05], np.float32)
MEAN = 0.4


def random_table(rng, rows, segments=1):
    """A table whose true columns, biases and sums of squares are random."""
    table = aligned_empty((rows, kernels.HEADER + segments * PADDED), np.float32)
    table[:] = 0
    table[:, kernels.BIAS] = rng.normal(size=rows)
    table[:, kernels.SQUARES] = rng.uniform(0.5, 2, rows)
    table[:, kernels.BIAS_SQUARES] = rng.uniform(0.5, 2, rows)
    for segment in range(segments):
        start = kernels.HEADER + segment * PADDED
        table[:, start : start + DIM] = rng.normal(size=(rows, DIM))
    return table


def vector(row, segment=0):
    start = kernels.HEADER + segment * PADDED
    return row[start : start + DIM].astype(np.float64)


def numerical_gradient(function, at, step=1e-5):
    """Central differences of a function of a list of arrays."""
    gradients = [np.zeros_like(one) for one in at]
    for one, gradient in zip(at, gradients, strict=True):
        for place in np.ndindex(one.shape):
            kept = one[place]
            one[place] = kept + step
            above = function(*at)
            one[place] = kept - step
            below = function(*at)
            one[place] = kept
            gradient[place] = (above - below) / (2 * step)
    return gradients


def adagrad(value, gradient, squares, rate):
    """Return the value and the sum of squares after a step of row-wise Adagrad."""
    squares = squares + np.mean(gradient**2)
    return value - rate / np.sqrt(squares) * gradient, squares


def pair_loss(raw, target, loss):
    return 0.5 * (raw - target) ** 2 if loss == 0 else np.logaddexp(0, raw) - target * raw


@pytest.mark.parametrize("implied", [False, True])
@pytest.mark.parametrize("loss", [kernels.SQUARED, kernels.CROSS_ENTROPY])
def test_a_step_of_a_pair_follows_the_numerical_gradient(loss, implied):
    rng = np.random.default_rng(loss)
    left, right = random_table(rng, 3, 3 if implied else 1), random_table(rng, 4)
    before = left[1].copy(), right[2].copy()
    target = 0.3
    x = vector(before[0], 1) if implied else np.zeros(DIM)

    def objective(p, q, x, b, c):
        raw = MEAN + b[0] + c[0] + (p + x) @ q
        decayed = DECAYS[0] / 2 * (p @ p + q @ q) + DECAYS[1] / 2 * (b @ b + c @ c)
        return pair_loss(raw, target, loss) + decayed

    biases = [np.array([row[kernels.BIAS]], np.float64) for row in before]
    at = [vector(before[0]), vector(before[1]), x.copy(), *biases]
    by_p, by_q, by_x, by_b, by_c = numerical_gradient(objective, at)
    lost = kernels.learn_pairs(
        *(np.array([n], np.int32) for n in (1, 2)),
        np.array([target], np.float32),
        *(left, right, PADDED, DIM, implied, loss, MEAN, RATES, DECAYS),
    )
    raw = MEAN + biases[0][0] + biases[1][0] + (at[0] + x) @ at[1]
    assert lost == pytest.approx(pair_loss(raw, target, loss), rel=1e-5)
    for row, old, gradient, by_bias in (
        (left[1], before[0], by_p, by_b),
        (right[2], before[1], by_q, by_c),
    ):
        expected, squares = adagrad(vector(old), gradient, old[kernels.SQUARES], RATES[0])
        assert vector(row) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert row[kernels.SQUARES] == pytest.approx(squares, rel=1e-4)
        bias = old[[kernels.BIAS]].astype(np.float64)
        bias, squares = adagrad(bias, by_bias, old[kernels.BIAS_SQUARES], RATES[1])
        assert row[kernels.BIAS] == pytest.approx(bias[0], rel=1e-4, abs=1e-5)
        assert not row[kernels.HEADER + DIM : kernels.HEADER + PADDED].any()
    if implied:
        assert vector(left[1], 2) - vector(before[0], 2) == pytest.approx(by_x, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("loss", [kernels.BPR, kernels.SOFTMAX])
def test_a_step_of_a_good_pair_beside_drawn_ones_follows_the_numerical_gradient(loss):
    rng = np.random.default_rng(2)
    left, right = random_table(rng, 3), random_table(rng, 40)
    negatives, good, seed = 3, 39, np.uint64(5)
    members = np.arange(39, dtype=np.int32)
    drawn = np.empty(negatives, np.int64)
    kernels.draw_rows(seed, members, drawn)
    assert len(set(drawn)) == negatives
    rows = [good, *drawn]
    before = left[1].copy(), right[rows].copy()
    shares = DECAYS[0] * np.array([1, *[1 / negatives] * negatives])

    def objective(p, q, c):
        raw = q @ p + c
        if loss == kernels.BPR:
            value = np.mean(np.logaddexp(0, raw[1:] - raw[0]))
        else:
            value = np.log(np.exp(raw).sum()) - raw[0]
        decayed = DECAYS[0] / 2 * p @ p + shares / 2 @ (q**2).sum(1)
        return value + decayed + DECAYS[1] / 2 * c @ c

    biases = before[1][:, kernels.BIAS].astype(np.float64)
    at = [vector(before[0]), np.array([vector(row) for row in before[1]]), biases]
    by_p, by_q, by_c = numerical_gradient(objective, at)
    kernels.learn_ranks(
        *(np.array([n], np.int32) for n in (1, good)),
        *(members, negatives, seed, left, right, PADDED, DIM, False, loss, RATES, DECAYS),
        np.empty(2 * PADDED + 16, np.float32),
    )
    expected, _ = adagrad(at[0], by_p, before[0][kernels.SQUARES], RATES[0])
    assert vector(left[1]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for place, row in enumerate(rows):
        old = before[1][place]
        expected, _ = adagrad(at[1][place], by_q[place], old[kernels.SQUARES], RATES[0])
        assert vector(right[row]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        bias, _ = adagrad(biases[[place]], by_c[[place]], old[kernels.BIAS_SQUARES], RATES[1])
        assert right[row, kernels.BIAS] == pytest.approx(bias[0], rel=1e-4, abs=1e-5)


def test_drawn_rows_that_are_in_the_pair_do_not_count():
    raw, slopes = np.array([0.3, 2.0, -1.0, 0.5]), np.empty(4)
    drawn = np.array([7, 7, 4, 9])
    for loss in (kernels.BPR, kernels.SOFTMAX):
        kernels.rank_slopes(raw, drawn, 4, 7, loss, slopes)
        assert slopes[1] == slopes[2] == 0
        assert slopes[0] == pytest.approx(-slopes[3])
        assert slopes[3] > 0


def test_what_right_rows_imply_is_summed_and_stepped_as_in_float64():
    rng = np.random.default_rng(3)
    left, implied = random_table(rng, 3, 3), random_table(rng, 4)
    left[:, kernels.SHARE] = [0.5, 0.25, 1.0]
    starts, partners = np.array([0, 2, 3, 5], np.int32), np.array([0, 3, 3, 1, 3], np.int32)
    y = np.array([vector(row) for row in implied])
    slopes = np.array([vector(row, 2) for row in left])
    turned = np.array([0, 1, 2, 2, 5], np.int32), np.array([0, 2, 0, 1, 2], np.int32)
    squares = implied[:, kernels.SQUARES].copy()
    scratch = np.empty(PADDED + 16, np.float32)
    rest = (left, implied, PADDED, DIM, np.float32(0.3), np.float32(0.1), scratch)
    kernels.step_implied(0, 4, *turned, *rest)
    share = left[:, kernels.SHARE].astype(np.float64)
    for row in range(4):
        own = turned[1][turned[0][row] : turned[0][row + 1]]
        gradient = share[own] @ slopes[own] + 0.1 * len(own) * y[row]
        expected = adagrad(y[row], gradient, squares[row], 0.3)[0] if len(own) else y[row]
        assert vector(implied[row]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    kernels.sum_implied(0, 3, starts, partners, left, implied, PADDED)
    for row in range(3):
        own = partners[starts[row] : starts[row + 1]]
        expected = share[row] * sum(vector(implied[one]) for one in own)
        assert vector(left[row], 1) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert not vector(left[row], 2).any()


@given(st.integers(1, 50), st.integers(0, 2**63))
def test_drawn_rows_are_members(count, seed):
    members = np.arange(100, 100 + count, dtype=np.int32)
    drawn = np.empty(200, np.int64)
    kernels.draw_rows(np.uint64(seed), members, drawn)
    assert np.isin(drawn, members).all()
    assert len(np.unique(drawn)) >= min(count, 5) - 1
