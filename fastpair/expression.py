"""Arithmetic on ids: "king - man + woman" -> what to do with whose embeddings.

The grammar, words apart by spaces or parentheses::

    sum     = product (("+" | "-") product)*
    product = factor (("*" | "/") factor)*
    factor  = ("+" | "-") factor | weight factor | "(" sum ")" | id | number
    id      = a word | "any words" | 'any words'

An operator stands alone: ``well-known`` is an id, ``well - known`` a difference. A number in front
of an id or a parenthesis is its weight, elsewhere it is a number, unless an id is written that way.
Products of two embeddings are taken column by column. Nothing is ever evaluated but this.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from fastpair.errors import ArgumentError

OPERATORS = ("+", "-", "*", "/", "(", ")")

DEEPEST = 100
"""Parentheses and signs that may be open at once."""

_WORDS = re.compile(
    r"""\s*(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'(?=[\s()]|$)|([()])|([^\s()]+))"""
)

Value = float | np.ndarray


@dataclass(frozen=True)
class _Word:
    """A word of an expression: where it stands, and whether it was quoted."""

    text: str
    place: int
    quoted: bool

    @property
    def operator(self) -> bool:
        return not self.quoted and self.text in OPERATORS

    @property
    def number(self) -> float | None:
        """The number that the word is, if it is one."""
        if self.quoted or not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", self.text, re.I):
            return None
        return float(self.text)


@dataclass(frozen=True)
class Result:
    """What an expression comes to.

    Parameters
    ----------
    vector : (n,) float64.
    ids : the ids that it names, in order, each once.
    """

    vector: np.ndarray
    ids: tuple[str, ...]


def evaluate(text: str, embedding: Callable[[str], np.ndarray | None]) -> Result:
    """Return the vector that an expression on ids names.

    Parameters
    ----------
    text : such as ``king - man + woman``, ``0.7 paris + 0.3 france``, ``"New York" * 2``.
    embedding : returns the embedding (n,) of an id, or None where it is unknown.

    Raises
    ------
    ArgumentError : the expression cannot be read, an id is unknown, or the result is a number or
        not finite; the message points at the word.
    """
    text = re.sub(r"\s", " ", text)
    parser = _Parser(text, embedding)
    with np.errstate(all="ignore"):
        value = parser.whole()
    if not isinstance(value, np.ndarray):
        raise ArgumentError(f"the expression {text!r} comes to the number {value:g}: name an id")
    if not np.isfinite(value).all():
        raise ArgumentError(
            f"the expression {text!r} does not come to finite numbers: look for a division by "
            "zero or a weight that is too large"
        )
    return Result(value, tuple(dict.fromkeys(parser.ids)))


class _Parser:
    """Reads words from left to right and evaluates as it goes."""

    def __init__(self, text: str, embedding: Callable[[str], np.ndarray | None]) -> None:
        self.text, self.embedding = text, embedding
        self.words = list(_split(text))
        self.next, self.depth = 0, 0
        self.ids: list[str] = []

    def whole(self) -> Value:
        value = self._sum()
        if self.next < len(self.words):
            word = self.words[self.next]
            if word.operator:
                raise self._error(word, "closes nothing" if word.text == ")" else "is out of place")
            raise self._error(word, "follows an id: put + - * or / between, or quote ids of words")
        return value

    def _peek(self, *operators: str) -> _Word | None:
        """The next word, if it is one of these operators."""
        if self.next < len(self.words):
            word = self.words[self.next]
            if word.operator and word.text in operators:
                return word
        return None

    def _sum(self) -> Value:
        value = self._product()
        while word := self._peek("+", "-"):
            self.next += 1
            other = self._product()
            if isinstance(value, np.ndarray) != isinstance(other, np.ndarray):
                raise self._error(word, "adds a number and an embedding: a weight goes in front")
            value = value + other if word.text == "+" else value - other
        return value

    def _product(self) -> Value:
        value = self._factor()
        while word := self._peek("*", "/"):
            self.next += 1
            other = self._factor()
            if word.text == "*":
                value = value * other
            elif isinstance(other, np.ndarray):
                raise self._error(word, "divides by an embedding: only numbers divide")
            elif other == 0:
                raise self._error(word, "divides by zero")
            else:
                value = value / other
        return value

    def _factor(self) -> Value:
        if self.next == len(self.words):
            raise ArgumentError(_pointed(self.text, len(self.text), "ends where an id is expected"))
        word = self.words[self.next]
        self.next += 1
        self.depth += 1
        if self.depth > DEEPEST:
            raise self._error(word, f"is more than {DEEPEST} parentheses and signs deep")
        value = self._inner(word)
        self.depth -= 1
        return value

    def _inner(self, word: _Word) -> Value:
        if word.operator and word.text in "+-":
            value = self._factor()
            return value if word.text == "+" else -value
        if word.operator and word.text == "(":
            value = self._sum()
            if self._peek(")") is None:
                raise self._error(word, "is not closed")
            self.next += 1
            return value
        if word.operator:
            raise self._error(word, "stands where an id is expected")
        number = word.number
        if number is not None and self._weighs():
            return number * self._factor()
        found = self.embedding(word.text)
        if found is not None:
            self.ids.append(word.text)
            return np.asarray(found, dtype=np.float64)
        if number is not None:
            return number
        raise self._error(word, self._unknown(word))

    def _weighs(self) -> bool:
        """Whether what follows a number is an operand without an operator between."""
        if self.next == len(self.words):
            return False
        word = self.words[self.next]
        return not word.operator or word.text == "("

    def _unknown(self, word: _Word) -> str:
        if not word.quoted and len(word.text) > 1 and re.search(r"[+*/-]", word.text):
            return "is not an id of the embeddings: operators need spaces around them"
        return "is not an id of the embeddings"

    def _error(self, word: _Word, what: str) -> ArgumentError:
        return ArgumentError(_pointed(self.text, word.place, f"{word.text!r} {what}"))


def _split(text: str) -> Iterator[_Word]:
    """Yield the words of an expression; in quotes, a backslash keeps the next character."""
    place, end = 0, len(text.rstrip())
    while place < end:
        match = _WORDS.match(text, place)
        if match is None:
            raise ArgumentError(_pointed(text, place, "cannot be read"))
        double, single, parenthesis, plain = match.groups()
        start = match.end() - len((match[0]).lstrip())
        quoted = double if double is not None else single
        if quoted is not None:
            yield _Word(re.sub(r"\\(.)", r"\1", quoted), start, True)
        else:
            word = parenthesis or plain
            if word.startswith('"'):
                raise ArgumentError(_pointed(text, start, "a quote is not closed"))
            yield _Word(word, start, False)
        place = match.end()


def _pointed(text: str, place: int, what: str) -> str:
    """One sentence that says what is wrong and shows the expression up to there."""
    before, after = text[:place], text[place:]
    mark = f"{before}>>> {after}".rstrip() if after else f"{before} >>>"
    return f"at character {place + 1} of the expression {what}: {mark}"
