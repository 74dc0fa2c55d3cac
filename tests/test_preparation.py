"""What is done to embeddings without labels: preparation, density; and sides of a model."""

import json

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpair import jobs
from fastpair.errors import ArgumentError, FileError, MismatchError
from fastpair.files import read_table, write_model
from fastpair.folding import fold
from fastpair.heads import unit_rows
from fastpair.model import (
    Branch,
    Isotonic,
    Model,
    Preparation,
    builtin,
    fit_density,
    fit_preparation,
    nearest_means,
)
from fastpair.scoring import PairScorer
from fastpair.towers import Linear


def skewed(count=300, columns=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, columns)) * np.arange(1, columns + 1) + 2


def test_unit_rows_are_all_that_is_done_by_default():
    rows = skewed()
    np.testing.assert_array_equal(fit_preparation(rows)(rows), unit_rows(rows)[0])
    np.testing.assert_array_equal(Preparation()(rows), rows)


def test_centred_rows_have_a_mean_near_zero():
    rows = skewed(20_000)
    before = np.linalg.norm(fit_preparation(rows)(rows).mean(axis=0))
    prepared = fit_preparation(rows, "centre")(rows)
    assert np.linalg.norm(prepared.mean(axis=0)) < 0.2 * before
    np.testing.assert_allclose(np.linalg.norm(prepared, axis=1), 1)


@pytest.mark.parametrize("together", [7, 1 << 14])
def test_scaling_keeps_directions_and_ratios_of_lengths(together, monkeypatch):
    monkeypatch.setattr("fastpair.model._ROWS_AT_ONCE", together)
    rows = skewed()
    preparation = fit_preparation(rows, "scaling")
    prepared = preparation(rows)
    np.testing.assert_allclose(prepared.mean(axis=0), 0, atol=1e-12)
    assert (prepared**2).sum(axis=1).mean() == pytest.approx(1)
    apart = rows - rows.mean(axis=0)
    np.testing.assert_allclose(prepared / prepared[0, 0], apart / apart[0, 0])
    same = fit_preparation(np.ones((4, 3)), "scaling")
    assert (same(np.ones((4, 3))) == 0).all()


def test_half_whitening_is_what_its_definition_says():
    rows = skewed()
    unit = unit_rows(rows)[0]
    covariance = np.cov(unit.T, bias=True)
    covariance += 1e-4 * np.trace(covariance) / 6 * np.eye(6)
    values, vectors = np.linalg.eigh(covariance)
    expected = (unit - unit.mean(axis=0)) @ vectors @ np.diag(values**-0.25) @ vectors.T
    preparation = fit_preparation(rows, "half-whitening")
    np.testing.assert_allclose(preparation(rows), unit_rows(expected)[0], atol=1e-9)
    same = fit_preparation(np.ones((4, 3)), "half-whitening")
    assert np.isfinite(same(np.ones((4, 3)))).all()


def test_an_unknown_preparation_is_refused():
    with pytest.raises(ArgumentError, match="half-whitening"):
        fit_preparation(skewed(), "whole")


def naive_means(row, reference):
    cosines = sorted((float(row @ other) for other in reference), reverse=True)
    others = [c for c in cosines if c < 1 - 1e-6]
    return [sum(others[:k]) / max(len(others[:k]), 1) for k in (1, 5, 20)]


@given(st.integers(0, 99), st.integers(1, 30), st.integers(1, 6))
def test_density_is_the_mean_cosine_to_the_nearest_others(seed, count, repeated):
    rng = np.random.default_rng(seed)
    reference = unit_rows(rng.normal(size=(count, 3)))[0]
    reference[: min(repeated, count)] = reference[0]  # itself, by content
    rows = np.concatenate([reference, unit_rows(rng.normal(size=(5, 3)))[0], np.zeros((1, 3))])
    expected = [naive_means(row, reference) for row in rows]
    np.testing.assert_allclose(nearest_means(rows, reference), expected, atol=1e-12)


def dense_model(rows, learned=False, heads=("cosine",), weights=(0.5, -1.0, 2.0)):
    rng = np.random.default_rng(1)
    preparation = fit_preparation(rows, "half-whitening")
    branches = [
        Branch(head, {"scale": np.ones(1)}, Linear(rng.normal(size=(4, rows.shape[1]))))
        for head in heads
    ]
    tower = branches[0].tower if learned else None
    density, standardised = fit_density(rows, preparation, rng, tower=tower)
    np.testing.assert_allclose(standardised.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(standardised.std(axis=0), 1)
    density.weights[:] = weights
    return Model(branches, rows.shape[1], preparation, density, constant=0.5), standardised


@pytest.mark.parametrize("learned", [False, True])
def test_density_adds_to_the_bias_of_each_entity(learned):
    rows = skewed().astype(np.float32)
    model, standardised = dense_model(rows, learned)
    bare = Model(model.branches, 6, model.preparation, constant=0.5)
    own = standardised @ model.density.weights
    expected = bare.score(rows[:-1], rows[1:]) + own[:-1] + own[1:]
    np.testing.assert_allclose(model.score(rows[:-1], rows[1:]), expected, atol=1e-9)
    table, plan = fold(model, rows)
    scores = PairScorer(table, plan)(np.arange(299), np.arange(1, 300))
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    scaled = model.calibrated(2.0, 1.0)
    np.testing.assert_allclose(scaled.score(rows[:-1], rows[1:]), 1 + 2 * expected, atol=1e-9)


def test_rows_with_density_do_not_depend_on_blocks_or_threads():
    rows = skewed(1500).astype(np.float32)
    model, _ = dense_model(rows)
    whole, _ = fold(model, rows, threads=1)
    parts = [fold(model, part, threads=2)[0] for part in np.array_split(rows, 4)]
    assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_density_needs_enough_rows_and_draws_from_many():
    rng = np.random.default_rng(2)
    assert fit_density(skewed(99), Preparation(unit_rows=True), rng) is None
    density, standardised = fit_density(skewed(5000), Preparation(unit_rows=True), rng)
    assert density.reference.shape == (4096, 6)
    assert density.reference.dtype == np.float32
    assert standardised.shape == (5000, 3)
    again, _ = fit_density(
        skewed(50), Preparation(unit_rows=True), rng, reference=density.reference
    )
    assert again.reference is density.reference


def test_every_part_of_a_model_survives_being_taken_apart():
    rows = skewed().astype(np.float32)
    model, _ = dense_model(rows)
    model.calibration = Isotonic(np.array([-1.0, 0, 2]), np.array([0.1, 0.4, 0.9]))
    config, arrays = model.to_parts()
    again = Model.from_parts(json.loads(json.dumps(config)), arrays)
    assert again.fingerprint() == model.fingerprint()
    np.testing.assert_array_equal(
        again.score(rows[:5], rows[5:10]), model.score(rows[:5], rows[5:10])
    )
    np.testing.assert_array_equal(again.calibration(np.array([1.0])), [0.65])
    assert again.density.reference.dtype == np.float32


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("preparation_mean", np.ones(5)),
        ("preparation_whitening", np.full((6, 6), np.nan)),
        ("density_reference", np.ones((4, 5))),
        ("density_std", np.zeros(3)),
        ("density_weights", np.ones(2)),
        ("calibration_scores", np.array([1.0, 0.0, 2.0])),
        ("calibration_probabilities", np.array([0.5, 0.4, 2.0])),
    ],
)
def test_unsound_parts_are_refused(name, value):
    model, _ = dense_model(skewed())
    model.calibration = Isotonic(np.array([-1.0, 0, 2]), np.array([0.1, 0.4, 0.9]))
    config, arrays = model.to_parts()
    with pytest.raises(FileError):
        Model.from_parts(config, {**arrays, name: value})


def test_a_model_of_the_first_version_can_still_be_read():
    config = {
        "branches": [
            {"head": "cosine", "arrays": ["projection", "scale"]},
            {"head": "absdiff", "arrays": ["weight"]},
        ],
        "input_columns": 3,
        "unit_rows": True,
        "constant": 1.0,
        "link": "identity",
        "slope": 1.0,
        "offset": 0.0,
        "threshold": 0.5,
        "unit": "log-odds",
        "description": {},
    }
    arrays = {
        "branch_0_projection": np.eye(3)[:2],
        "branch_0_scale": np.array([2.0]),
        "branch_1_weight": -np.ones(3),
    }
    model = Model.from_parts(config, arrays)
    a, b = unit_rows(np.array([[1.0, 2, 3], [3, -1, 2]]))[0]
    cosine = a[:2] @ b[:2] / np.linalg.norm(a[:2]) / np.linalg.norm(b[:2])
    expected = 1 + 2 * cosine - np.abs(a - b).sum()
    np.testing.assert_allclose(model.score(a[None], b[None]), [expected])


def test_probabilities_come_from_the_curve_or_from_log_odds():
    model = builtin("cosine")
    with pytest.raises(ArgumentError, match="no probability"):
        model.probability(np.zeros(1))
    odds = model.calibrated(1.0, 0.0, unit="log-odds")
    np.testing.assert_allclose(odds.probability(np.log([1, 3, 1 / 3])), [0.5, 0.75, 0.25])
    curve = Isotonic(np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    bent = model.calibrated(1.0, 0.0, calibration=curve)
    np.testing.assert_allclose(bent.probability(np.array([-1, 0.25, 3])), [0, 0.25, 1])


# --- sides ---


def two_towers(rng):
    left, right = (Linear(rng.normal(size=(4, 6))) for _ in range(2))
    branches = [
        Branch("cosine", {"scale": np.ones(1)}, left, right),
        Branch("absdiff", {"weight": rng.normal(size=4)}, right, left),
    ]
    return Model(branches, 6, Preparation(unit_rows=True))


def test_an_asymmetric_model_folds_into_a_left_and_a_right_table():
    rows = skewed(40)
    model = two_towers(np.random.default_rng(3))
    assert model.asymmetric
    (left, plan), (right, right_plan) = (fold(model, rows, side=s) for s in ("left", "right"))
    i, j = np.divmod(np.arange(1600), 40)
    scores = PairScorer(left, plan, right, right_plan)(i, j)
    np.testing.assert_allclose(scores, model.score(rows[i], rows[j]), atol=1e-4)
    config, arrays = model.to_parts()
    again = Model.from_parts(json.loads(json.dumps(config)), arrays)
    assert again.fingerprint() == model.fingerprint()


def test_gradients_of_two_towers_agree_with_finite_differences():
    rng = np.random.default_rng(4)
    left, right = rng.normal(size=(2, 5, 6))
    upstream = rng.normal(size=5)
    for branch in two_towers(rng).branches:
        gradients = branch.backward(upstream, branch.forward(left, right)[1])
        assert gradients.keys() == branch.parameters.keys()
        for name, array in branch.parameters.items():
            for index in np.ndindex(array.shape):
                kept, values = array[index], []
                for step in (1e-6, -1e-6):
                    array[index] = kept + step
                    values.append(upstream @ branch.forward(left, right)[0])
                array[index] = kept
                slope = (values[0] - values[1]) / 2e-6
                assert gradients[name][index] == pytest.approx(slope, abs=1e-6)


def test_tables_of_two_sides_are_scored_left_against_right(tmp_path):
    rows = skewed(40)
    np.save(tmp_path / "v.npy", rows)
    (tmp_path / "pairs.csv").write_text("left,right\n0,1\n1,0\n5,5\n")
    model = two_towers(np.random.default_rng(6)).calibrated(
        1.0, 0.0, calibration=Isotonic(np.array([-1.0, 1]), np.array([0.0, 1]))
    )
    write_model(tmp_path / "m.h5", model)
    for side in ("left", "right"):
        jobs.project(tmp_path / "m.h5", tmp_path / "v.npy", tmp_path / f"{side}.h5", side=side)
    left, right = tmp_path / "left.h5", tmp_path / "right.h5"
    jobs.score(left, tmp_path / "pairs.csv", tmp_path / "s.h5", against=right)
    with h5py.File(tmp_path / "s.h5") as file:
        scores = file["score"][:]
    i, j = np.array([0, 1, 5]), np.array([1, 0, 5])
    np.testing.assert_allclose(scores, model.score(rows[i], rows[j]), atol=1e-4)
    assert read_table(left).calibration(np.array([0.0])) == 0.5
    for wrong in ({}, {"against": left}):
        with pytest.raises(MismatchError, match="--side left --against"):
            jobs.score(left, tmp_path / "pairs.csv", tmp_path / "t.h5", **wrong)


def test_sides_that_a_model_does_not_have_are_refused():
    with pytest.raises(ArgumentError, match="one table serves both sides"):
        fold(builtin("dot"), np.ones((2, 3)), side="left")
    with pytest.raises(ArgumentError, match="--side left"):
        fold(two_towers(np.random.default_rng(5)), np.ones((2, 6)))
    with pytest.raises(ArgumentError, match="expected one of both, left, right"):
        fold(builtin("dot"), np.ones((2, 3)), side="up")
