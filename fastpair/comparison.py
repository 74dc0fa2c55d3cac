"""A model on labelled pairs, beside what needs no labels: through the fold and the kernels.

What is measured is therefore what ``score`` and ``matrix`` write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastpair.calibration import fit_combination
from fastpair.evaluation import (
    Scored,
    complete_group,
    good_pairs,
    measure,
    measure_mean,
    partner_ranks,
    pca_model,
    raw_cosine,
    seen_groups,
)
from fastpair.folding import fold
from fastpair.model import Model, builtin
from fastpair.scoring import PairScorer

Summary = dict[str, Any]

RECALL_AT = (1, 10, 50)
"""Places at which the recall of good pairs is measured."""

MOST_RECALL_PAIRS = 2_000_000_000
"""Left times right entities that recall looks at; above it takes fewer left entities."""

MOST_NETWORK_PAIRS = 20_000_000
"""The same for models that are networks, whose all-pairs are slow."""

MOST_GROUPS = 20
"""Values of a column that get a breakdown of their own, the most frequent ones."""


class Similarity:
    """A model over entities in memory, folded.

    Parameters
    ----------
    model : the model.
    embeddings : (N, n) float, as they came.
    threads : number of threads; default one for each processor.
    """

    def __init__(self, model: Model, embeddings: np.ndarray, threads: int | None = None) -> None:
        self.model, self.embeddings, self.threads = model, embeddings, threads
        self.right_rows: np.ndarray | None = None
        if model.asymmetric:
            self.rows, self.plan = fold(model, embeddings, side="left", threads=threads)
            self.right_rows, plan = fold(model, embeddings, side="right", threads=threads)
            self._score = PairScorer(self.rows, self.plan, self.right_rows, plan, threads=threads)
        else:
            self.rows, self.plan = fold(model, embeddings, threads=threads)
            self._score = PairScorer(self.rows, self.plan, threads=threads)

    def __call__(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return the scores (M,) float32 of pairs of row numbers."""
        return self._score(left, right)

    def top_k(
        self, queries: np.ndarray, candidates: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the k best candidates of each query.

        Parameters
        ----------
        queries, candidates : row numbers; a query is no stranger to itself.
        k : how many.

        Returns
        -------
        places : (queries, k) int64 among the candidates, best first; -1 where there are fewer.
        scores : (queries, k) float32; NaN where there are fewer.
        """
        from fastpair.matrix import all_pairs

        right = self.rows if self.right_rows is None else self.right_rows
        tables = self.rows[queries], right[candidates]
        found = list(all_pairs(*tables, self.plan, threads=self.threads).top_k(k))
        return np.concatenate([f[2] for f in found]), np.concatenate([f[1] for f in found])

    def recalibrated(self, slope: float, offset: float) -> Similarity:
        """Return the same similarity in log-odds ``offset + slope * score``."""
        model = self.model.calibrated(slope, offset, unit="log-odds")
        return Similarity(model, self.embeddings, self.threads)

    @property
    def most_recall_pairs(self) -> int:
        """Pairs of queries and candidates that are looked at within seconds."""
        return MOST_RECALL_PAIRS if self.plan.network is None else MOST_NETWORK_PAIRS


@dataclass(frozen=True)
class Comparison:
    """Labelled pairs under a model and under its baselines.

    Parameters
    ----------
    pairs : left and right, (M,) each: numbers of `similarities`' rows.
    labels : (M,) float.
    scored : the pairs' scores by the name of the similarity; the first is the model.
    similarities : what can find best partners, by the same names.
    options : `good`, `graded`, `draws` and `seed` of `evaluation.measure`.
    """

    pairs: tuple[np.ndarray, np.ndarray]
    labels: np.ndarray
    scored: dict[str, Scored]
    similarities: dict[str, Similarity]
    options: Summary

    @property
    def truth(self) -> np.ndarray | None:
        """Which pairs are good, (M,) bool, or None where grades do not say it."""
        return good_pairs(self.labels, self.options["good"], self.options["graded"])

    def all_pairs(self) -> Summary:
        """Return the model's metrics, those of each baseline inside under its name.

        ``graded`` is whether labels are more than good and bad, so that correlations say something.
        """
        graded = self.truth is None or len(np.unique(self.labels)) > 2
        return {**self._measured(np.arange(len(self.labels))), "graded": graded}

    def group(self, rows: np.ndarray) -> Summary:
        """Return the same for some of the pairs; `n_pairs` and `n_good` count just them.

        Where all of them are good (or bad), they are measured against all bad (good) pairs, which
        ``against`` then says.
        """
        if not len(rows):
            return {"n_pairs": 0, "n_good": 0 if self.truth is not None else None}
        measured, added = complete_group(rows, self.truth)
        result = self._measured(measured)
        result["n_pairs"] = len(rows)
        result["n_good"] = None if self.truth is None else int(self.truth[rows].sum())
        if added:
            result["against"] = f"all {added} pairs"
        return result

    def _measured(self, rows: np.ndarray) -> Summary:
        left, right = (side[rows] for side in self.pairs)
        scored = {name: one.part(rows) for name, one in self.scored.items()}
        (_, result), *others = measure(
            scored, self.labels[rows], left, right, **self.options
        ).items()
        return {**result, **dict(others)}

    def recall(self) -> Summary:
        """Return how many good pairs have their right entity among the best for the left one.

        Candidates are all right entities, or all entities where one stands on both sides.

        Returns
        -------
        recall : `queries`, `candidates`, `n_good` and, by the name of the similarity, mean and
            interval for each of `RECALL_AT`; empty where no pair is known to be good.
        """
        if self.truth is None or not self.truth.any():
            return {}
        left, right = (side[self.truth] for side in self.pairs)
        candidates = np.unique(self.pairs[1])
        if np.isin(self.pairs[0], candidates).any():
            candidates = np.unique(np.concatenate(self.pairs))
        queries = np.unique(left)
        limit = min(one.most_recall_pairs for one in self.similarities.values())
        few = max(1, limit // len(candidates))
        if few < len(queries):
            rng = np.random.default_rng(self.options["seed"])
            queries = np.sort(rng.choice(queries, few, replace=False))
            kept = np.isin(left, queries)
            left, right = left[kept], right[kept]
        found: Summary = {"queries": len(queries), "candidates": len(candidates)}
        found["n_good"] = len(left)
        for name, similarity in self.similarities.items():
            places = partner_ranks(left, right, candidates, max(RECALL_AT), similarity.top_k)
            hits = (places[:, None] < np.array(RECALL_AT)).astype(np.float64)
            means = measure_mean(hits, left, right, self.options["draws"], self.options["seed"])
            found[name] = {str(k): mean for k, mean in zip(RECALL_AT, means, strict=True)}
        return found


def compare(
    model: Model,
    embeddings: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    labels: np.ndarray,
    *,
    good: float | None = None,
    graded: bool = False,
    draws: int = 0,
    seed: int = 0,
    threads: int | None = None,
) -> Comparison:
    """Score labelled pairs by a model, by the raw cosine and by the unlabelled PCA.

    Parameters
    ----------
    model : the model; its threshold, unit and calibration are what is measured.
    embeddings : (N, n) float; the PCA is fitted on all of them.
    left, right : (M,) integer row numbers.
    labels : (M,) float: 0 and 1, or grades.
    good, graded, draws, seed : as in `evaluation.measure`.
    threads : number of threads; default one for each processor.
    """
    used, places = np.unique(np.concatenate([left, right]), return_inverse=True)
    a, b = places[: len(left)], places[len(left) :]
    vectors = embeddings[used]
    models = {
        "model": model,
        "raw_cosine": builtin("cosine"),
        "unlabelled_pca": pca_model(embeddings),
    }
    similarities = {name: Similarity(one, vectors, threads) for name, one in models.items()}
    scores = similarities["model"](a, b)
    probability = None if model.calibration is None else model.probability(scores)
    scored = {
        "model": Scored(scores, model.threshold, model.unit, probability),
        "raw_cosine": Scored(raw_cosine(embeddings, left, right)),
        "unlabelled_pca": Scored(similarities["unlabelled_pca"](a, b)),
    }
    options: Summary = {"good": good, "graded": graded, "draws": draws, "seed": seed}
    return Comparison((a, b), labels, scored, similarities, options)


def calibrated_cosine(comparison: Comparison) -> Similarity:
    """Return the raw cosine over the same entities, in log-odds if that can be fitted.

    It is fitted to the comparison's own pairs, as probabilities are needed to tell how transitive
    the raw cosine is; its ranking does not change.
    """
    plain, truth = comparison.similarities["raw_cosine"], comparison.truth
    if truth is None or truth.all() or not truth.any():
        return plain
    scores = comparison.scored["raw_cosine"].scores.astype(np.float64)
    slope, offset = fit_combination(scores[None], truth.astype(np.float64), False)
    if slope <= 0:
        return plain
    return plain.recalibrated(float(slope), float(offset))


def seen_breakdown(comparison: Comparison, seen: np.ndarray) -> Summary:
    """Measure pairs with both, one and no entity seen in training apart.

    Parameters
    ----------
    seen : bool, for each of the comparison's entities.
    """
    groups = seen_groups(*comparison.pairs, seen)
    return {name: comparison.group(rows) for name, rows in groups}


def breakdown(comparison: Comparison, values: Sequence[str] | np.ndarray) -> tuple[Summary, int]:
    """Measure the pairs of each value of a column apart.

    Parameters
    ----------
    values : one text for each pair, (M,).

    Returns
    -------
    metrics : by value, the most frequent first.
    left_out : the number of rarer values beyond `MOST_GROUPS`.
    """
    names, numbers, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    kept = order[:MOST_GROUPS]
    found = {str(names[at]): comparison.group(np.flatnonzero(numbers == at)) for at in kept}
    return found, len(order) - len(kept)
