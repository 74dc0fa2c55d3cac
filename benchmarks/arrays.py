"""Arrays that the suites share, and how answers are compared with float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from race import WrongAnswer

from fastpair.backend import thread_count
from fastpair.files import page_aligned
from fastpair.folding import Folder
from fastpair.kernels import Plan
from fastpair.model import Model

_Item = TypeVar("_Item")

CORES = thread_count()
"""Threads that everyone gets."""

BLOCK = 65_536
"""Rows that are made or folded at once."""

SAMPLE = 50
"""Rows, or times a hundred pairs, whose answers are compared with float64."""


def sized(number: int, scale: float, least: int = 200) -> int:
    """Return a number of entities or pairs at this scale."""
    return max(least, round(number * scale))


def blocks(count: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` that cover `count`."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def unit_vectors(count: int, columns: int, seed: int = 0) -> np.ndarray:
    """Return random unit rows (count, columns) float32, on a page and in huge pages.

    Everyone gets them: rows that start on a cache line are read faster by all.
    """
    rng = np.random.default_rng(seed)
    vectors = page_aligned((count, 4 * columns)).view(np.float32)
    for part in blocks(count, BLOCK):
        rows = rng.standard_normal(vectors[part].shape, dtype=np.float32)
        vectors[part] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return vectors


def table(model: Model, vectors: np.ndarray, precision: str = "float32") -> tuple[np.ndarray, Plan]:
    """Fold vectors as ``fastpair project`` does, into memory as ``fastpair score`` takes it."""
    folder = Folder(model, vectors.shape[1], precision)
    if folder.needs_survey:
        folder.survey(vectors)
    rows = page_aligned((len(vectors), folder.plan.layout.row_bytes))
    for part in blocks(len(vectors), BLOCK):
        rows[part] = folder.fold(vectors[part], part.start).view(np.uint8).reshape(rows[part].shape)
    return rows, folder.plan


def in_threads(work: Callable[[_Item], Any], items: list[_Item]) -> None:
    """Run ``work(item)`` for all items on all cores; NumPy lets go of the interpreter meanwhile."""
    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(work, items))


def halves(count: int) -> list[slice]:
    """Return a slice of equal size for each core."""
    return list(blocks(count, -(-count // CORES)))


def check_close(answer: np.ndarray, truth: np.ndarray, tolerance: float) -> None:
    """Refuse scores that are farther than `tolerance` from the truth."""
    if answer.shape != truth.shape:
        raise WrongAnswer(f"scores have shape {answer.shape}, expected {truth.shape}")
    worst = float(np.abs(answer - truth).max(initial=0))
    if not worst <= tolerance:
        raise WrongAnswer(f"a score is {worst:.3g} from float64, expected at most {tolerance}")


def check_top_k(
    answer: tuple[np.ndarray, np.ndarray],
    score: Callable[[int], np.ndarray],
    k: int,
    tolerance: float,
) -> None:
    """Compare the best of some queries with all scores in float64.

    Parameters
    ----------
    answer : indices and scores, (queries, k), or (queries, k + 1) with the query itself; those of
        the first rows.
    score : gives the float64 scores of a row number with all rows.
    k : how many.
    tolerance : how far a score, and a rank by scores, may be from float64.
    """
    indices, scores = (np.asarray(part) for part in answer)
    step = max(1, len(indices) // SAMPLE)
    for query in range(0, len(indices), step):
        truth = score(query)
        truth[query] = -np.inf
        others = indices[query] != query
        found, own = indices[query][others], scores[query][others]
        order = np.argsort(-own, kind="stable")[:k]
        best = np.sort(truth)[::-1][:k]
        if len(set(found[order].tolist())) != len(best):
            raise WrongAnswer(f"row {query} has {len(order)} different neighbours, expected {k}")
        check_close(own[order].astype(np.float64), best, tolerance)
        check_close(truth[found[order]], best, tolerance)
