"""Which pairs are learned from: validation pairs set aside, bad pairs sampled."""

from __future__ import annotations

import numpy as np

from fastpair.errors import DataError
from fastpair.learner import Pairs
from fastpair.model import builtin

VALIDATION_SHARE = 0.15
"""Share of the pairs that is set aside when no validation pairs are given."""

MOST_VALIDATION_PAIRS = 50_000
"""No more than about this many are set aside: more would only take time after each epoch."""


def split_pairs(pairs: Pairs, rng: np.random.Generator) -> tuple[Pairs, Pairs, str] | None:
    """Set validation pairs aside, by entity where the graph of pairs allows it, else by pair.

    Parameters
    ----------
    pairs : all pairs; where all have the same label, labels do not matter.
    rng : decides which groups are set aside.

    Returns
    -------
    The pairs to learn from, the validation pairs and how they were chosen; None if no choice
    leaves different labels on both sides.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    entities, numbers = np.unique(np.stack([pairs.left, pairs.right]), return_inverse=True)
    a, b = numbers.reshape(2, -1)
    graph = coo_array((np.ones(len(pairs), np.int8), (a, b)), shape=(len(entities),) * 2)
    component = connected_components(graph, directed=False)[1][a]
    unordered = np.minimum(a, b) * len(entities) + np.maximum(a, b)
    for group, how in (
        (component, "set aside by entity (no entity of theirs is in a training pair)"),
        (unordered, "set aside by pair (too many entities are connected to keep them apart)"),
    ):
        chosen = _some_groups(np.unique(group, return_inverse=True)[1], pairs.labels, rng)
        if chosen is not None:
            return pairs[~chosen], pairs[chosen], how
    return None


def _some_groups(
    group: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> np.ndarray | None:
    """Choose random whole groups that hold about `VALIDATION_SHARE` of the pairs: a mask (M,)."""
    sizes = np.bincount(group)
    wanted = min(VALIDATION_SHARE * len(group), MOST_VALIDATION_PAIRS)
    small = np.flatnonzero(sizes <= max(4 / 3 * wanted, 1))
    one_kind = np.ptp(labels) == 0
    for _ in range(20):
        order = rng.permutation(small)
        enough = np.searchsorted(np.cumsum(sizes[order]), wanted) + 1
        taken = np.zeros(len(sizes), bool)
        taken[order[:enough]] = True
        chosen = taken[group]
        if not 2 / 3 * wanted <= chosen.sum() < len(group):
            continue
        if one_kind or min(np.ptp(labels[chosen]), np.ptp(labels[~chosen])) > 0:
            return chosen
    return None


BAD_FOR_GOOD = 4
"""Bad pairs that are sampled for a good one, half of them hard."""

HARD_AMONG = 20
"""A hard bad pair goes to one of so many nearest right entities."""


def with_bad_pairs(
    embeddings: np.ndarray, given: Pairs, held: Pairs, rng: np.random.Generator
) -> tuple[Pairs, Pairs]:
    """Sample bad pairs for the good ones: of known good pairs, none is taken for a bad one."""
    known = np.concatenate([_codes(part, len(embeddings)) for part in (given, held)])
    return (
        _one_with_bad_pairs(embeddings, given, known, rng),
        _one_with_bad_pairs(embeddings, held, known, rng),
    )


def _codes(pairs: Pairs, count: int) -> np.ndarray:
    """Return numbers (2 M,) that stand for the pairs, in either order."""
    left, right = pairs.left.astype(np.int64), pairs.right.astype(np.int64)
    return np.concatenate([left * count + right, right * count + left])


def _one_with_bad_pairs(
    embeddings: np.ndarray, pairs: Pairs, known: np.ndarray, rng: np.random.Generator
) -> Pairs:
    """Add sampled bad pairs to the good ones of `pairs`; bad ones that were there stay."""
    from fastpair.folding import fold
    from fastpair.matrix import all_pairs

    good = pairs[pairs.labels == 1]
    candidates, anchors = np.unique(good.right), np.unique(good.left)
    cosine = builtin("cosine")
    rows, plan = fold(cosine, embeddings[anchors])
    others, _ = fold(cosine, embeddings[candidates])
    nearest = np.concatenate([i for _, _, i in all_pairs(rows, others, plan).top_k(HARD_AMONG)])
    at = np.searchsorted(anchors, good.left)
    found_left, found_right = [], []
    for number in range(BAD_FOR_GOOD):
        if number % 2:
            right = candidates[rng.integers(0, len(candidates), len(good))]
        else:
            ranks = rng.integers(0, min(HARD_AMONG, len(candidates)), len(good))
            right = candidates[nearest[at, ranks]]
        found_left.append(good.left)
        found_right.append(right)
    left, right = np.concatenate(found_left), np.concatenate(found_right)
    codes = left.astype(np.int64) * len(embeddings) + right
    new = np.zeros(len(codes), bool)
    new[np.unique(codes, return_index=True)[1]] = True
    new &= ~np.isin(codes, known) & (left != right)
    if not new.any():
        raise DataError(
            "no bad pair could be sampled: every right entity goes with every left one, so add "
            "pairs that are bad"
        )
    weights = None
    if pairs.weights is not None and good.weights is not None:
        weights = np.concatenate([pairs.weights, np.tile(good.weights, BAD_FOR_GOOD)[new]])
    return Pairs(
        np.concatenate([pairs.left, left[new]]),
        np.concatenate([pairs.right, right[new]]),
        np.concatenate([pairs.labels, np.zeros(int(new.sum()))]),
        weights,
    )
