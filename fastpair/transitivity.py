"""What good pairs imply of others: triples for a penalty, and pairs of connected entities.

If x is similar to y and y to z, then x to z: a relation R of values in [0, 1] is T-transitive if
``T(R(x, y), R(y, z)) <= R(x, z)`` for a t-norm T (Klement, Mesiar and Pap, Triangular Norms, 2000).
"""

from __future__ import annotations

import numpy as np

from fastpair.learner import Pairs

LARGEST_CLOSED = 100
"""Entities of the largest group whose pairs are added: a larger one may hang on one wrong pair."""


def pair_codes(left: np.ndarray, right: np.ndarray, count: int) -> np.ndarray:
    """Return one number a pair of rows below `count`, the same for either order, (M,) int64."""
    left, right = np.asarray(left, np.int64), np.asarray(right, np.int64)
    return np.minimum(left, right) * count + np.maximum(left, right)


class Triples:
    """Triples x, y, z of the labelled graph: x and y are a good pair, so are y and z, x is not z.

    Triples of which x and z are a bad pair are left out: labels say that they are no exception.

    Parameters
    ----------
    pairs : labelled 0 and 1.
    """

    def __init__(self, pairs: Pairs) -> None:
        self._rows = int(max(pairs.left.max(initial=0), pairs.right.max(initial=0))) + 1
        codes = pair_codes(pairs.left, pairs.right, self._rows)
        good = np.unique(codes[pairs.labels == 1])
        self._bad = np.setdiff1d(codes[pairs.labels == 0], good)
        a, b = np.divmod(good, self._rows)
        a, b = a[a != b], b[a != b]
        owner, other = np.concatenate([a, b]), np.concatenate([b, a])
        order = np.argsort(owner, kind="stable")
        self._owner, self._other = owner[order], other[order]
        self._degree = np.bincount(owner, minlength=self._rows)
        self._starts = np.cumsum(self._degree) - self._degree
        self._edges = np.flatnonzero(self._degree[self._owner] > 1)

    def __len__(self) -> int:
        """How many triples there are, those with a bad pair included."""
        return int((self._degree * (self._degree - 1) // 2).sum())

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Return up to `count` random triples (3, T) int64: x, y and z.

        A good pair is drawn, then another partner of one of its two; those of which x and z are a
        bad pair are dropped.
        """
        if not len(self._edges):
            return np.empty((3, 0), np.int64)
        edge = self._edges[rng.integers(0, len(self._edges), count)]
        y = self._owner[edge]
        place = self._starts[y] + rng.integers(0, self._degree[y] - 1)
        z = self._other[place + (place >= edge)]
        triples = np.stack([self._other[edge], y, z])
        return triples[:, ~np.isin(pair_codes(triples[0], z, self._rows), self._bad)]


def close_pairs(
    pairs: Pairs, apart: np.ndarray, count: int, largest: int = LARGEST_CLOSED
) -> tuple[Pairs, dict[str, int]]:
    """Add the implied good pairs: those of entities that a chain of good pairs connects.

    Parameters
    ----------
    pairs : labelled 0 and 1.
    apart : codes (as `pair_codes` gives them) of pairs that must not be added, whatever is implied:
        those of validation and of tests.
    count : rows that there are.
    largest : groups of more entities are left as they are.

    Returns
    -------
    closed : the pairs, then the implied ones; their weight is the mean one of good pairs.
    counts : ``added``; ``bad``, implied pairs that are labelled bad, which they stay; ``apart``,
        implied pairs that were kept apart; ``groups`` that were too large.
    """
    codes = pair_codes(pairs.left, pairs.right, count)
    good = pairs.labels == 1
    implied, too_large = _implied(pairs.left[good], pairs.right[good], count, largest)
    implied = np.setdiff1d(implied, codes[good])
    bad, kept_apart = np.isin(implied, codes[~good]), np.isin(implied, apart)
    counts = {"bad": int(bad.sum()), "apart": int((kept_apart & ~bad).sum()), "groups": too_large}
    left, right = np.divmod(implied[~bad & ~kept_apart], count)
    counts["added"] = len(left)
    weights = pairs.weights
    if weights is not None:
        weights = np.concatenate([weights, np.full(len(left), weights[good].mean())])
    closed = Pairs(
        np.concatenate([pairs.left, left.astype(pairs.left.dtype)]),
        np.concatenate([pairs.right, right.astype(pairs.right.dtype)]),
        np.concatenate([pairs.labels, np.ones(len(left))]),
        weights,
    )
    return closed, counts


def _implied(
    left: np.ndarray, right: np.ndarray, count: int, largest: int
) -> tuple[np.ndarray, int]:
    """Return the sorted codes of all pairs within a group, and how many groups are too large."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    entities, numbers = np.unique(np.stack([left, right]), return_inverse=True)
    a, b = numbers.reshape(2, -1)
    graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(len(entities),) * 2)
    group = connected_components(graph, directed=False)[1]
    members = np.split(entities[np.argsort(group, kind="stable")], np.cumsum(np.bincount(group)))
    found = [np.empty(0, np.int64)]
    for rows in members[:-1]:
        if len(rows) <= largest:
            first, second = np.triu_indices(len(rows), 1)
            found.append(pair_codes(rows[first], rows[second], count))
    sizes = np.bincount(group)
    return np.sort(np.concatenate(found)), int((sizes > largest).sum())


def closing_note(counts: dict[str, int]) -> str:
    """Say what `close_pairs` did."""
    parts = [f"{counts['added']} implied good pairs were added"]
    if counts["bad"]:
        parts.append(f"{counts['bad']} more are labelled bad, and stay so")
    if counts["apart"]:
        parts.append(f"{counts['apart']} more are validation or test pairs, and were left out")
    if counts["groups"]:
        parts.append(f"{counts['groups']} groups of more than {LARGEST_CLOSED} were left as is")
    return "; ".join(parts)
