"""Precisions: how far each is from float64, and that no scale of embeddings makes a NaN."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_heads import random_weights

from fastpair.errors import DataError
from fastpair.folding import Folder
from fastpair.heads import find_head
from fastpair.kernels import PRECISIONS, reference
from fastpair.model import BUILTINS, Branch, Model, builtin
from fastpair.scoring import PairScorer

LARGEST_ERROR = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2, "int8": 0.4}
"""Of a raw score, in standard deviations of the scores; the README's are from more pairs."""

HEADS = ["cosine", "dot", "product", "max", "min", "absdiff", "sqdiff", "mirrored", "plda"]


def a_model(name, columns, seed=0):
    if name in BUILTINS:
        return builtin(name)
    weights = random_weights(name, columns, np.random.default_rng(seed))
    head = find_head(name)
    return Model([Branch(head.name, weights)], columns, link=head.link)


def folded(model, embeddings, precision):
    folder = Folder(model, embeddings.shape[1], precision)
    if folder.needs_survey:
        folder.survey(embeddings)
    rows = folder.fold(embeddings).view(np.uint8).reshape(len(embeddings), -1)
    return rows, folder


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("head", ["cosine", "max", "absdiff", "sqdiff"])
def test_errors_stay_within_what_the_readme_says(precision, head):
    embeddings = np.random.default_rng(0).normal(size=(60, 300))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    model = a_model(head, 300)
    rows, folder = folded(model, embeddings, precision)
    left, right = np.triu_indices(60, 1)
    truth = model.score(embeddings[left], embeddings[right])
    error = np.abs(PairScorer(rows, folder.plan)(left, right) - truth)
    assert error.max() <= LARGEST_ERROR[precision] * truth.std()


@pytest.mark.parametrize("head", ["cosine", "max", "absdiff", "sqdiff"])
def test_float32_is_as_good_as_numpys_float32(head):
    embeddings = np.random.default_rng(3).normal(size=(80, 300))
    model = a_model(head, 300)
    rows, folder = folded(model, embeddings, "float32")
    left, right = np.triu_indices(80, 1)
    truth = model.score(embeddings[left], embeddings[right])
    values = reference.unpack_rows(rows, folder.plan)
    plain = np.float32(folder.plan.constant)
    plain = plain + (values["bias"][left] + values["bias"][right]).astype(np.float32)
    for name, sign, columns in reference.signed_runs(folder.plan):
        part = values[name][:, columns].astype(np.float32)
        terms = reference.terms(name, part[left], part[right])
        plain = plain + np.float32(sign) * terms.sum(-1)
    ours = PairScorer(rows, folder.plan)(left, right)
    assert np.square(ours - truth).mean() <= 4 * np.square(plain - truth).mean()


sizes = st.sampled_from([1e-320, 1e-45, 1e-38, 1e-30, 1e-15, 1.0, 1e15, 1e18, 1e30, 1e38, 1e150])


@settings(max_examples=150)
@given(
    name=st.sampled_from([*BUILTINS, *HEADS, "rbf", "hyperbolic"]),
    precision=st.sampled_from(sorted(PRECISIONS)),
    by_row=st.lists(sizes, min_size=6, max_size=6),
    by_column=st.lists(sizes, min_size=5, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_scale_scores_right_or_is_refused_at_the_fold(name, precision, by_row, by_column, seed):
    embeddings = np.random.default_rng(seed).normal(size=(6, 5))
    with np.errstate(over="ignore", under="ignore"):
        embeddings *= np.outer(by_row, by_column)
    check_scale(name, precision, embeddings, seed)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", [*BUILTINS, *HEADS])
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_columns_of_one_extreme_size_score_right_or_are_refused(name, precision, scale):
    embeddings = np.random.default_rng(1).normal(size=(6, 5)) * scale
    check_scale(name, precision, embeddings, 1)
    mixed = embeddings.copy()
    mixed[:, ::2] /= scale**2
    check_scale(name, precision, mixed, 1)


def check_scale(name, precision, embeddings, seed):
    """Scores are finite and within the stated bound, or the fold refuses, in one sentence."""
    model = a_model(name, embeddings.shape[1], seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            rows, folder = folded(model, embeddings, precision)
        except DataError as error:
            refusal = str(error)
        else:
            refusal = ""
        if refusal:
            assert "\n" not in refusal
            return
        left, right = np.divmod(np.arange(len(rows) ** 2), len(rows))
        scores = PairScorer(rows, folder.plan)(left, right)
    assert np.isfinite(scores).all()
    truth = model.score(embeddings[left], embeddings[right])
    if model.link == "negative_root":
        scores, truth = -(scores.astype(float) ** 2), -(truth**2)
    elif model.link != "identity":
        return
    size = reference.magnitudes(rows, rows, left, right, folder.plan)
    bound = folder.raw_error_bound() + 1e-5 * size + 1e-5 * np.abs(truth) + 1e-40
    assert (np.abs(scores - truth) <= bound).all()
