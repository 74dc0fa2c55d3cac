"""Whether a similarity is symmetric, reflexive and transitive, measured on its own entities."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastpair.comparison import Similarity
from fastpair.heads import find_head
from fastpair.model import Branch, Model
from fastpair.scoring import distance_form

Summary = dict[str, Any]

SAMPLED_ENTITIES = 2_000
"""Entities that properties are measured on, at most."""

SAMPLED_PAIRS = 20_000
"""Pairs whose scores are compared with those of the swapped pairs."""

SAMPLED_TRIPLES = 20_000
"""Triples of each of the two kinds, at random and among near entities."""

NEAREST = 10
"""How many best partners of an entity count as near."""

TOLERANCE = 1e-5
"""What float32 scores may be off, relative to the largest score at hand."""


def measure_properties(similarity: Similarity, *, seed: int = 0) -> Summary:
    """Measure a similarity's properties on a sample of its entities.

    Parameters
    ----------
    similarity : the folded entities.
    seed : of the sample.

    Returns
    -------
    properties : ``symmetry``, ``reflexivity``, ``transitivity`` (of probabilities) and ``triangle``
        (of distances), each a dict of counts and shares, or None where it is not defined.
    """
    rng = np.random.default_rng(seed)
    count = len(similarity.rows)
    some = rng.choice(count, min(count, SAMPLED_ENTITIES), replace=False)
    best, top = similarity.top_k(some, some, min(NEAREST + 1, len(some)))
    triples = {
        "random": rng.integers(0, len(some), (3, SAMPLED_TRIPLES)),
        "near": _near_triples(best, rng),
    }
    triples = {name: _distinct(some[triple]) for name, triple in triples.items()}
    return {
        "symmetry": _symmetry(similarity, rng),
        "reflexivity": {
            **_reflexivity(similarity, some, top),
            "guaranteed": guarantees_reflexivity(similarity.model),
        },
        "transitivity": _transitivity(similarity, triples),
        "triangle": _triangle(similarity, some, triples),
    }


def guarantees_reflexivity(model: Model) -> bool:
    """Whether by its formula no entity scores higher with another one than with itself.

    It does if each head says so for the weights at hand (a cosine above 0, differences of which
    none counts in favour, the heads rbf and hyperbolic) and nothing of a single entity is added.
    Rounding may still let two entities of the same direction change places.
    """
    if model.asymmetric or (model.density is not None and model.density.weights.any()):
        return False
    return all(_reflexive(branch) for branch in model.branches)


def _reflexive(branch: Branch) -> bool:
    said = find_head(branch.head).reflexive
    values = [np.asarray(value) for value in branch.weights.values()]
    if said == "if the scale is above 0":
        return all((value >= 0).all() for value in values)
    if said == "if no weight is above 0":
        return all((value <= 0).all() for value in values)
    return said == "always"


def _near_triples(best: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw (a, b, c) with a and c among the best partners of b, (3, count)."""
    b = rng.integers(0, len(best), SAMPLED_TRIPLES)
    a, c = (best[b, rng.integers(0, best.shape[1], SAMPLED_TRIPLES)] for _ in range(2))
    return np.stack([a, b, c])


def _distinct(triples: np.ndarray) -> np.ndarray:
    a, b, c = triples
    return triples[:, (a != b) & (b != c) & (a != c)]


def _symmetry(similarity: Similarity, rng: np.random.Generator) -> Summary | None:
    """Count sampled pairs whose score differs in any bit from that of the swapped pair."""
    from fastpair.kernels import reference

    if similarity.model.asymmetric:
        return None
    left, right = rng.integers(0, len(similarity.rows), (2, SAMPLED_PAIRS))
    few = slice(0, 1000)  # the reference computes all columns of all pairs at once
    rows, plan = similarity.rows, similarity.plan
    both = {
        "cpu": (similarity(left, right), similarity(right, left)),
        "reference": tuple(
            reference.score_pairs(rows, rows, a[few], b[few], plan)
            for a, b in ((left, right), (right, left))
        ),
    }
    return {
        backend: {"pairs": len(one), "different": int((_bits(one) != _bits(other)).sum())}
        for backend, (one, other) in both.items()
    }


def _bits(scores: np.ndarray) -> np.ndarray:
    return scores.view(np.uint32 if scores.dtype == np.float32 else np.uint64)


def _reflexivity(similarity: Similarity, some: np.ndarray, top: np.ndarray) -> Summary:
    """Share of the sampled entities for which another one scores higher than they themselves."""
    itself = similarity(some, some)
    return {"entities": len(some), "beaten": float((top[:, 0] > itself).mean())}


def _transitivity(similarity: Similarity, triples: dict[str, np.ndarray]) -> Summary | None:
    """Share of triples with p(a, c) < p(a, b) + p(b, c) - 1, which no real probabilities have."""
    model = similarity.model
    if model.unit != "log-odds" and model.calibration is None:
        return None
    found: Summary = {}
    for name, (a, b, c) in triples.items():
        ab, bc, ac = (model.probability(similarity(*p)) for p in ((a, b), (b, c), (a, c)))
        least = ab + bc - 1
        found[name] = {
            "triples": len(a),
            "bound": int((least > 0).sum()),
            "violated": float((ac < least - TOLERANCE).mean()) if len(a) else None,
        }
    return found


def _triangle(
    similarity: Similarity, some: np.ndarray, triples: dict[str, np.ndarray]
) -> Summary | None:
    """Share of triples with d(a, c) > d(a, b) + d(b, c).

    d is the distance of the scores where they have one, else how far a score falls; ``of`` says it.
    """
    model = similarity.model
    if model.density is not None or any(find_head(h).kind != "distance" for h in model.heads):
        return None
    # A distance scores every entity with itself the same, at the top.
    zero = float(similarity(some, some).astype(np.float64).max())
    form, what = distance_form(similarity.plan), "distances"
    if form is None:
        form, what = (lambda scores: zero - scores), "falls of scores"
    found: Summary = {}
    for name, (a, b, c) in triples.items():
        ab, bc, ac = (similarity(*p).astype(np.float64) for p in ((a, b), (b, c), (a, c)))
        # Scores may be off; a root makes the more of it the nearer two entities are.
        off = [TOLERANCE * (abs(zero) + np.abs(scores)) for scores in (ab, bc, ac)]
        violated = form(ac + off[2]) > form(ab - off[0]) + form(bc - off[1])
        found[name] = {
            "triples": len(a),
            "of": what,
            "violated": float(violated.mean()) if len(a) else None,
        }
    return found
