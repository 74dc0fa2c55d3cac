"""Neighbours: those of the model's own score, of ids and of arithmetic on them."""

import json

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from test_preparation import two_towers

from fastpair.cli import commands
from fastpair.errors import ArgumentError, DataError
from fastpair.files import write_model
from fastpair.model import builtin
from fastpair.nearest import nearest

ROWS, COLUMNS = 60, 6


@pytest.fixture
def vectors():
    return np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(np.float32)


@pytest.fixture
def embeddings(tmp_path, vectors):
    path = tmp_path / "embeddings.h5"
    with h5py.File(path, "w") as file:
        file["embeddings"] = vectors
        file["ids"] = [f"e{n}" for n in range(ROWS - 1)] + ["New York"]
    return path


def best(question, vectors, k, similarity="cosine", without=()):
    """The k best rows by the model's own float64 formula."""
    model = builtin(similarity)
    scores = model.score(np.repeat(question[None], len(vectors), 0), vectors)
    scores[list(without)] = -np.inf
    order = np.argsort(-scores, kind="stable")[:k]
    return order.tolist(), scores[order]


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
def test_neighbours_are_the_best_of_the_models_own_score(embeddings, vectors, similarity):
    question = vectors[3].astype(float) - 2.0 * vectors[7] + vectors[59]
    answer = nearest(similarity, embeddings, ["e3 - 2 e7 + 'New York'"], k=5)["answers"][0]
    rows, scores = best(question, vectors.astype(float), 5, similarity, (3, 7, 59))
    assert [one["row"] for one in answer["neighbours"]] == rows
    assert [one["score"] for one in answer["neighbours"]] == pytest.approx(scores, rel=1e-5)
    assert answer["ids"] == ["e3", "e7", "New York"]


def test_the_ids_of_an_expression_are_among_its_neighbours_only_when_asked_for(embeddings):
    alone = nearest("cosine", embeddings, ["e3"], k=ROWS)["answers"][0]["neighbours"]
    assert len(alone) == ROWS - 1
    assert "e3" not in {one["id"] for one in alone}
    with_it = nearest("cosine", embeddings, ["e3"], k=1, include=True)["answers"][0]["neighbours"]
    assert with_it == [{"id": "e3", "row": 3, "score": pytest.approx(1)}]


def test_answers_do_not_depend_on_what_else_is_asked(embeddings, tmp_path):
    questions = tmp_path / "questions.txt"
    questions.write_bytes("e1 + e2\r\n\n  e4 * e5 \n".encode("utf-8-sig"))
    together = nearest("dot", embeddings, ["e9"], file=questions, k=3)["answers"]
    assert [one["expression"].strip() for one in together] == ["e9", "e1 + e2", "e4 * e5"]
    for one in together:
        assert nearest("dot", embeddings, [one["expression"]], k=3)["answers"] == [one]


def test_without_ids_row_numbers_are_ids(tmp_path, vectors):
    path = tmp_path / "plain.npy"
    np.save(path, vectors)
    answer = nearest("cosine", path, ["3 - 7"], k=2)["answers"][0]
    question = vectors[3].astype(float) - vectors[7]
    assert [one["row"] for one in answer["neighbours"]] == best(
        question, vectors, 2, without=(3, 7)
    )[0]
    assert answer["neighbours"][0]["id"] == str(answer["neighbours"][0]["row"])
    for wrong in ("60", "-1", "1.0", "٣"):
        with pytest.raises(ArgumentError, match="expression"):
            nearest("cosine", path, [wrong])


def test_an_asymmetric_model_asks_on_the_left_and_answers_on_the_right(
    embeddings, tmp_path, vectors
):
    model = two_towers(np.random.default_rng(3))
    write_model(tmp_path / "model.h5", model)
    answer = nearest(tmp_path / "model.h5", embeddings, ["e3 + e5"], k=4)["answers"][0]
    question = vectors[3].astype(float) + vectors[5]
    scores = model.score(np.repeat(question[None], ROWS, 0), vectors.astype(float))
    scores[[3, 5]] = -np.inf
    assert [one["row"] for one in answer["neighbours"]] == np.argsort(-scores)[:4].tolist()


def test_what_cannot_be_asked_is_refused(embeddings, tmp_path):
    with pytest.raises(ArgumentError, match="no expression"):
        nearest("cosine", embeddings)
    with pytest.raises(ArgumentError, match="k is 0"):
        nearest("cosine", embeddings, ["e1"], k=0)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        nearest("cosine", embeddings, file=binary)


def test_the_command_prints_a_list_an_expression(embeddings):
    done = CliRunner().invoke(
        commands, ["nearest", "cosine", str(embeddings), "e3 - e7", "e1", "--top-k", "2"]
    )
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert [lines[0], lines[3]] == ["e3 - e7", "e1"]
    assert len(lines) == 6
    done = CliRunner().invoke(commands, ["nearest", "cosine", str(embeddings), "e3", "--json"])
    assert len(json.loads(done.stdout)["answers"][0]["neighbours"]) == 10
    assert CliRunner().invoke(commands, ["nearest", "cosine", str(embeddings)]).exit_code == 2
