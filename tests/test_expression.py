"""Expressions: what arithmetic on ids comes to, and where a wrong one is pointed at."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpair.errors import ArgumentError, FastpairError
from fastpair.expression import OPERATORS, evaluate

VECTORS = {
    name: np.random.default_rng(number).normal(size=5)
    for number, name in enumerate(
        ["king", "man", "woman", "New York", "well-known", "12", "x'y", "(odd)", "+", 'a"b']
    )
}
KING, MAN, WOMAN = (VECTORS[name] for name in ("king", "man", "woman"))


def value(text):
    return evaluate(text, VECTORS.get)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("king", KING),
        ("king - man + woman", KING - MAN + WOMAN),
        ("king * man", KING * MAN),
        ("king + man * woman", KING + MAN * WOMAN),
        ("(king + man) * woman", (KING + MAN) * WOMAN),
        ("0.7 king + 0.3 man", 0.7 * KING + 0.3 * MAN),
        ("2 (king - man)", 2 * (KING - MAN)),
        ("king * 2 / 4", KING / 2),
        ("- king", -KING),
        ("-1.5e1 king", -15 * KING),
        ("king - - man", KING + MAN),
        ("'New York' - \"New York\" + king", KING),
        ("well-known", VECTORS["well-known"]),
        ("12", VECTORS["12"]),
        ("12 king", 12 * KING),
        ("king + 12", KING + VECTORS["12"]),
        ("2 '12'", 2 * VECTORS["12"]),
        ("x'y", VECTORS["x'y"]),
        ('"(odd)"', VECTORS["(odd)"]),
        ('king + "+"', KING + VECTORS["+"]),
        ('"a\\"b"', VECTORS['a"b']),
        ("((king))", KING),
        ("(2 + 3) * king", 5 * KING),
    ],
)
def test_an_expression_is_read_as_people_write_it(text, expected):
    np.testing.assert_allclose(value(text).vector, expected, rtol=1e-13, atol=1e-13)


def test_ids_are_told_once_in_order():
    assert value("king - man + king * 'New York'").ids == ("king", "man", "New York")


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("king - queen", 8, "'queen' is not an id"),
        ("king-man", 1, "operators need spaces"),
        ("king man", 6, "follows an id"),
        ("king -", 7, "ends where an id is expected"),
        ("", 1, "ends where an id is expected"),
        ("king + * man", 8, "stands where an id"),
        ("(king", 1, "is not closed"),
        ("king )", 6, "closes nothing"),
        ("king / man", 6, "only numbers divide"),
        ("king / 0", 6, "divides by zero"),
        ("king + 3", 6, "adds a number and an embedding"),
        ('king + "man', 8, "not closed"),
        ("(" * 200 + "king", 101, "deep"),
    ],
)
def test_a_wrong_expression_is_pointed_at(text, place, what):
    with pytest.raises(ArgumentError, match=rf"^at character {place} .*{what}") as error:
        value(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["3", "1 / 2", "1e308 king * 1e308"])
def test_what_is_no_embedding_is_refused(text):
    with pytest.raises(ArgumentError, match="expression"):
        value(text)


def test_nothing_is_executed():
    with pytest.raises(ArgumentError, match="is not an id"):
        value("__import__('os').system('true')")


@given(st.lists(st.sampled_from([*OPERATORS, *VECTORS, "2", "'", '"', "\\", " ", "é", "\0", "\n"])))
def test_any_text_is_a_vector_or_refused_in_one_sentence(words):
    text, refusal = " ".join(words), ""
    try:
        result = value(text)
    except FastpairError as error:
        refusal = str(error)
    assert "\n" not in refusal
    if not refusal:
        assert np.isfinite(result.vector).all()
        assert set(result.ids) <= set(VECTORS)
