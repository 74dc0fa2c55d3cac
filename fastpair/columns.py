"""Which columns of a file are the two keys of a pair and its label, and what a label means."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpair.errors import ArgumentError, DataError

PAIR_NAMES = [
    ("left", "right"),
    ("left_id", "right_id"),
    ("id_left", "id_right"),
    ("id_a", "id_b"),
    ("ida", "idb"),
    ("id1", "id2"),
    ("id_1", "id_2"),
    ("id_l", "id_r"),
    ("id_x", "id_y"),
    ("ltable_id", "rtable_id"),
    ("unique_id_l", "unique_id_r"),
    ("qid1", "qid2"),
    ("#1 id", "#2 id"),
    ("lhs", "rhs"),
    ("source", "target"),
    ("source_id", "target_id"),
    ("src", "dst"),
    ("u", "v"),
    ("from", "to"),
    ("head", "tail"),
    ("i", "j"),
    ("a", "b"),
    ("query-id", "corpus-id"),
    ("query_id", "corpus_id"),
    ("query_id", "document_id"),
    ("query_id", "doc_id"),
    ("query_id", "passage_id"),
    ("query", "document"),
    ("user_id", "item_id"),
    ("user", "item"),
    ("word_a", "word_b"),
    ("word1", "word2"),
    ("sentence1", "sentence2"),
]
"""Usual names of the two key columns, in any case; they are taken before other patterns."""

PAIR_PATTERNS = [
    (r"(.+)[_\-. ]a", r"(.+)[_\-. ]b"),
    (r"(.+?)[_\-. ]?1", r"(.+?)[_\-. ]?2"),
    (r"(.+)[_\-. ]left", r"(.+)[_\-. ]right"),
    (r"left[_\-. ](.+)", r"right[_\-. ](.+)"),
    (r"(.+)[_\-. ]l", r"(.+)[_\-. ]r"),
    (r"(.+)[_\-. ]lhs", r"(.+)[_\-. ]rhs"),
]
"""Other names of two key columns: what is in brackets is the same in both."""

LABEL_NAMES = [
    *("label", "labels", "y", "good", "is_match", "match", "is_duplicate", "duplicate"),
    *("gold", "target", "score", "grade", "rating", "similarity", "relevance"),
]
"""Usual names of the label column, in any case; the first two decide where several are there."""

INDEX_NAMES = frozenset({"", "unnamed: 0", "__index_level_0__"})
"""What pandas calls its index, in lower case: no key where others could be."""

LABEL_WORDS = {
    **{"true": 1, "false": 0, "t": 1, "f": 0, "yes": 1, "no": 0, "y": 1, "n": 0},
    **{"good": 1, "bad": 0, "positive": 1, "negative": 0, "similar": 1, "dissimilar": 0},
    **{"match": 1, "non-match": 0, "nonmatch": 0, "non_match": 0, "no match": 0, "no-match": 0},
    **{"non match": 0, "unmatch": 0, "duplicate": 1, "distinct": 0, "same": 1, "different": 0},
}
"""Labels that are words, in any case."""


def has_usual_names(names: Sequence[str]) -> bool:
    """Whether two of these are usual names of the two keys."""
    lower = {name.lower() for name in names}
    return any(left in lower and right in lower for left, right in PAIR_NAMES)


def pair_candidates(names: Sequence[str]) -> list[tuple[str, str]]:
    """All couples of columns whose names look like the two keys of a pair.

    Usual names come alone: where there are some, other patterns are not tried.
    """
    lower = {name.lower(): name for name in names}
    usual = [(lower[a], lower[b]) for a, b in PAIR_NAMES if a in lower and b in lower]
    if usual:
        ids = [couple for couple in usual if all("id" in name.lower() for name in couple)]
        return ids if len(ids) == 1 else usual  # beside ids stand the texts that they name
    found: list[tuple[str, str]] = []
    for left_pattern, right_pattern in PAIR_PATTERNS:
        lefts, rights = _stems(left_pattern, names), _stems(right_pattern, names)
        found += [(lefts[stem], rights[stem]) for stem in lefts if stem in rights]
    # x1 and x2 beside x0 or x3 are columns of numbers, not keys.
    series = _stems(r"(.+?)[_\-. ]?[03]", names)
    return [
        (left, right) for left, right in found if left[:-1].rstrip("_-. ").lower() not in series
    ]


def _stems(pattern: str, names: Sequence[str]) -> dict[str, str]:
    matches = [(re.fullmatch(pattern, name, re.IGNORECASE), name) for name in names]
    return {match.group(1).lower(): name for match, name in matches if match}


def find_columns(
    file: str,
    names: Sequence[str],
    left: str | None,
    right: str | None,
    label: str | None,
    *,
    want_labels: bool,
) -> tuple[str, str, str | None]:
    """The names of the two key columns and of the label column.

    Parameters
    ----------
    file : for messages.
    names : the columns that the file has.
    left, right, label : names that were asked for, or None.
    want_labels : whether a label column must be found.

    Returns
    -------
    tuple
        Names of the left, the right and the label column; the last may be None unless wanted.

    Raises
    ------
    DataError
        The columns are absent, or cannot be told from others.
    """
    for asked in (left, right, label):
        if asked is not None and list(names).count(asked) != 1:
            _refuse_repeated(file, names, asked)
            raise DataError(f"{file} has no column named {asked!r}; it has {_listed(names)}.")
    if (left is None) != (right is None):
        raise ArgumentError("name both key columns, left and right, or none of them.")
    if left is None or right is None:
        left, right = _find_keys(file, names, label)
    if left == right and list(names).count(left) == 1:
        raise ArgumentError(f"left and right are both column {left!r}; a pair needs two columns.")
    for key in (left, right):
        _refuse_repeated(file, names, key)
    if label is None:
        label = _find_label(file, names, left, right, want_labels)
    if want_labels:
        _refuse_repeated(file, names, label)
    if label in (left, right):
        raise ArgumentError(f"column {label!r} cannot be a key and the label at once.")
    return left, right, label


def _refuse_repeated(file: str, names: Sequence[str], name: str | None) -> None:
    if name is not None and list(names).count(name) > 1:
        raise DataError(
            f"{file} has several columns named {name!r}; it has {_listed(names)}: "
            "give them different names."
        )


def _find_keys(file: str, names: Sequence[str], label: str | None) -> tuple[str, str]:
    found = pair_candidates(names)
    if len(found) == 1:
        return found[0]
    rest = [name for name in names if name != label and name.lower() not in INDEX_NAMES]
    if not found and len(rest) == 3 and label is None:
        rest = [name for name in rest if name.lower() not in LABEL_NAMES]
    if not found and len(rest) == 2:
        return rest[0], rest[1]
    problem = (
        "more than one couple of columns that could be" if found else "no columns that look like"
    )
    raise DataError(
        f"{file} has {problem} the two keys of a pair; it has {_listed(names)}: "
        "name them with --left and --right."
    )


def _find_label(
    file: str, names: Sequence[str], left: str, right: str, want_labels: bool
) -> str | None:
    rest = [name for name in names if name not in (left, right)]
    lower = {name.lower(): name for name in rest}
    found = [lower[name] for name in LABEL_NAMES if name in lower]
    if len(found) == 1 or (found and found[0].lower() in LABEL_NAMES[:2]):
        return found[0]
    rest = [name for name in rest if name.lower() not in INDEX_NAMES]
    if not found and len(rest) == 1 and len(names) <= 4:
        return rest[0]
    if not want_labels:
        return None
    problem = (
        f"several columns that could be labels ({_listed(found)})" if found else "no label column"
    )
    raise DataError(
        f"{file} has {problem} but labels are needed; it has {_listed(names)}: "
        "name the one with labels with --label."
    )


def _listed(names: Sequence[str]) -> str:
    """Names for a message, the first of them if they are many."""
    listed = ", ".join(repr(name) for name in names[:12])
    return f"{listed} and {len(names) - 12} more" if len(names) > 12 else listed or "no columns"


def parse_labels(labels: pa.Array, file: str, first_row: int, column: str = "label") -> np.ndarray:
    """Labels as numbers: words become 1 and 0, numbers stay what they are.

    Parameters
    ----------
    labels : numbers, truth values or text, (b,).
    file : for messages.
    first_row : the row of the file that the first label belongs to, for messages.
    column : name of the column, for messages.

    Returns
    -------
    np.ndarray
        (b,) float64, finite.

    Raises
    ------
    DataError
        A label is missing, not finite, or neither a number nor one of the words.
    """
    kind = labels.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        values = _text_labels(labels.cast(pa.string()))
    elif pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        values = labels.cast(pa.float64(), safe=False)
    else:
        raise DataError(f"{file} has labels of type {kind}; numbers or words like good are needed.")
    result = pc.fill_null(values, np.nan).to_numpy(zero_copy_only=False)
    if not np.isfinite(result).all():
        row = int(np.flatnonzero(~np.isfinite(result))[0])
        raise DataError(
            f"{file} has the label {labels[row].as_py()!r} in row {first_row + row} "
            f"(counted from 0) of column {column!r}; a label is 0 or 1, -1 or 1, true or false, "
            "good or bad, yes or no, match or non-match, or a grade."
        )
    return result


def _text_labels(labels: pa.Array) -> pa.Array:
    words = pc.utf8_lower(pc.utf8_trim_whitespace(labels))
    known = pc.index_in(words, value_set=pa.array(list(LABEL_WORDS)))
    meaning = pa.array([float(value) for value in LABEL_WORDS.values()])
    numeric = pc.match_substring_regex(words, r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?$")
    numbers = pc.if_else(numeric, pc.utf8_ltrim(words, "+"), None).cast(pa.float64())
    return pc.coalesce(meaning.take(known), numbers)
