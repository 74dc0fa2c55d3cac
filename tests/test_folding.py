"""Folding: what kernels compute from a table is what the model says of the embeddings."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import cosine
from test_heads import random_weights, sums
from threadpoolctl import threadpool_limits

from fastpair.errors import ArgumentError, DataError, MismatchError
from fastpair.folding import Folder, fold
from fastpair.heads import find_head
from fastpair.kernels import PRECISIONS, reference
from fastpair.model import BUILTINS, FOLDED_TOGETHER, Branch, Model, Preparation, builtin
from fastpair.scoring import PairScorer
from fastpair.towers import Linear

seeds = st.integers(0, 2**32 - 1)


def random_model(rng, heads, columns=12, dim=7):
    """A model of several branches, each with a projection and weights of either sign."""
    branches = []
    for name in heads:
        weights = random_weights(name, dim, rng)
        branches.append(
            Branch(find_head(name).name, weights, Linear(rng.normal(size=(dim, columns))))
        )
    link = find_head(heads[0]).link
    constant = float(rng.normal()) if link == "identity" else 0.0
    return Model(branches, columns, Preparation(unit_rows=True), constant=constant, link=link)


@settings(max_examples=40)
@given(heads=sums, seed=seeds)
def test_formula_reference_and_kernels_agree_and_pairs_may_be_swapped(heads, seed):
    rng = np.random.default_rng(seed)
    model, embeddings = random_model(rng, heads), rng.normal(size=(9, 12))
    rows, plan = fold(model, embeddings)
    left, right = np.divmod(np.arange(81), 9)
    scores = PairScorer(rows, plan)(left, right)
    assert scores.tobytes() == PairScorer(rows, plan)(right, left).tobytes()
    truth = model.score(embeddings[left], embeddings[right])
    second = reference.score_pairs(rows, rows, left, right, plan)
    bound = 1e-5 * reference.magnitudes(rows, rows, left, right, plan)
    if model.link == "negative_arcosh":  # of what the link is taken of
        scores, truth, second = (np.cosh(part.astype(float)) for part in (scores, truth, second))
        bound += 1e-6 * truth
    assert (np.abs(scores - truth) <= bound).all()
    assert (np.abs(second - truth) <= bound).all()


@pytest.mark.parametrize("name", BUILTINS)
def test_built_in_similarities_are_what_their_names_say(name):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(20, 30))
    truth = {
        "cosine": lambda a, b: cosine(a, b),
        "dot": lambda a, b: float(a @ b),
        "euclidean": lambda a, b: -float(np.sqrt(((a - b) ** 2).sum())),
        "manhattan": lambda a, b: -float(np.abs(a - b).sum()),
    }[name]
    rows, plan = fold(builtin(name), x)
    left, right = np.divmod(np.arange(400), 20)
    scores = PairScorer(rows, plan)(left, right)
    expected = [truth(x[i], x[j]) for i, j in zip(left, right, strict=True)]
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)


def test_numbers_that_are_almost_nothing_become_zero_in_int8():
    rows, plan = fold(builtin("dot"), np.full((2, 3), 1e-45), "int8")
    assert PairScorer(rows, plan)(np.array([0]), np.array([1])).tolist() == [0]


def test_the_zero_vector_has_cosine_0_with_everything():
    x = np.array([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]])
    rows, plan = fold(builtin("cosine"), x)
    assert PairScorer(rows, plan)(np.array([0, 0, 0]), np.array([0, 1, 2])).tolist() == [0, 0, 0]


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize(
    "heads", [["cosine"], ["absdiff"], ["sqdiff"], ["max", "product", "sum"], ["plda"]]
)
def test_a_coarse_table_stays_within_its_stated_bound(precision, heads):
    rng = np.random.default_rng(2)
    embeddings = rng.normal(size=(40, 12))
    model = random_model(rng, heads)
    folder = Folder(model, 12, precision)
    if folder.needs_survey:
        folder.survey(embeddings)
    rows = folder.fold(embeddings).view(np.uint8).reshape(40, -1)
    left, right = np.divmod(np.arange(1600), 40)
    error = np.abs(
        PairScorer(rows, folder.plan)(left, right)
        - model.score(embeddings[left], embeddings[right])
    )
    size = reference.magnitudes(rows, rows, left, right, folder.plan)
    assert (error <= folder.raw_error_bound() + 1e-5 * size).all()
    assert error.max() > 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_do_not_depend_on_blocks_or_threads(precision):
    rng = np.random.default_rng(3)
    embeddings = rng.normal(size=(2500, 12))
    model = random_model(rng, ["cosine", "absdiff", "sum"])

    def folded(step, threads):
        folder = Folder(model, 12, precision, threads=threads)
        blocks = [embeddings[start : start + step] for start in range(0, 2500, step)]
        for block in blocks if folder.needs_survey else []:
            folder.survey(block)
        return np.concatenate([folder.fold(block) for block in blocks]).tobytes(), folder.plan

    assert folded(2500, 1) == folded(7, 2) == folded(1024, 3)


@pytest.mark.parametrize("dim", [7, 64, 187, 300, 384])
def test_the_place_in_a_block_does_not_change_a_row(dim):
    rng = np.random.default_rng(4)
    model = random_model(rng, ["cosine", "bilinear", "mirrored"], columns=50, dim=dim)
    same = np.repeat(rng.normal(size=(1, 50)), FOLDED_TOGETHER, axis=0)
    with threadpool_limits(1, "blas"):
        folded = model.fold(same)
    assert all((part.values == part.values[0]).all() for part in folded.segments)


def test_bfloat16_rounds_to_the_nearest_and_ties_to_even():
    step = 2.0**-7
    x = np.array([1 + step / 4, 1 + step / 2, 1 + 3 * step / 2, -1 - step * 0.6])[:, None]
    folder = Folder(builtin("dot"), 1, "bfloat16")
    stored = reference.widen(folder.fold(x)["product"][:, 0], "bfloat16")
    assert stored.tolist() == [1, 1, 1 + 2 * step, -1 - step]


def test_refusals():
    model = builtin("dot")
    with pytest.raises(ArgumentError, match="float8"):
        Folder(model, 3, "float8")
    with pytest.raises(DataError, match=r"row 1 .*float16"):
        fold(model, np.array([[1.0], [1e6]]), "float16")
    with pytest.raises(DataError, match="row 1"):
        fold(model, np.array([[1.0], [np.nan]]))
    with pytest.raises(MismatchError, match="3 columns"):
        fold(Model([Branch("cosine", {"scale": np.ones(1)})], 2), np.ones((4, 3)))
    with pytest.raises(ArgumentError, match="shape"):
        fold(model, np.ones(3))
    for name in ("dot", "euclidean"):
        with pytest.raises(DataError, match="scale them down"):
            fold(builtin(name), np.full((2, 3), 1e25))
    with pytest.raises(DataError, match=r"row 0 .*int8 cannot hold"):
        fold(model, np.full((2, 3), 1e45), "int8")
    with pytest.raises(ArgumentError, match="bfloat16"):
        Folder(model, 40_000, "int8")
