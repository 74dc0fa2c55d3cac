"""The commands as functions on arrays: fold, score pairs, all pairs; arrays in, arrays out.

Embeddings and pairs may come as NumPy, CuPy, pandas, polars or Arrow (`fastpair.frames`); what
comes back is NumPy or scipy.sparse. Embeddings that were folded once (`fold`) can be given in
their place to every function. Bits are those that the command line writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat, TypedDict, Unpack, overload

import numpy as np

from fastpair.device import LEAST_WALKED, Choice, pick
from fastpair.errors import ArgumentError, MismatchError
from fastpair.files import Table
from fastpair.frames import (
    ArrayLike,
    as_array,
    as_columns,
    as_numbers,
    as_row_numbers,
    check_out,
    on_device,
)
from fastpair.model import SIDES
from fastpair.scoring import PairScorer
from fastpair.tables import ModelLike, as_model, as_table, both_tables, form_of

if TYPE_CHECKING:
    from scipy.sparse import csr_array

PAIRS_AT_ONCE = 1 << 22
"""Pairs whose row numbers and scores are held beside what was given and what is returned."""


def fold(
    embeddings: ArrayLike,
    model: ModelLike = "cosine",
    *,
    precision: str = "float32",
    side: str = "both",
    threads: int | None = None,
) -> Table:
    """Fold embeddings, so that several functions can use them without doing it again.

    Parameters
    ----------
    embeddings : (N, n) finite numbers.
    model : a model, the path of one, a fitted `PairSimilarity`, or "cosine" (the default), "dot",
        "euclidean" or "manhattan".
    precision : "float32" (the default), "float16", "bfloat16" or "int8".
    side : "both"; "left" or "right" in asymmetric models.
    threads : number of threads; default one for each processor.

    Returns
    -------
    Table : ``rows`` (N, row_bytes) uint8 as kernels read them, ``plan``, ``unit``, ``threshold``.

    Raises
    ------
    ArgumentError, DataError, MismatchError : the embeddings cannot be used, or not by this model.
    """
    if isinstance(embeddings, Table):
        raise ArgumentError("embeddings are a table, which is folded already")
    if side not in SIDES:
        raise ArgumentError(f"side is {side!r}, expected one of {', '.join(SIDES)}")
    return as_table(embeddings, "embeddings", as_model(model), precision, side, threads)


def score_pairs(
    embeddings: ArrayLike | Table,
    pairs: ArrayLike | None = None,
    *,
    against: ArrayLike | Table | None = None,
    model: ModelLike | None = None,
    unit: str = "score",
    precision: str | None = None,
    out: Any = None,
    device: str = "auto",
    threads: int | None = None,
) -> np.ndarray:
    """Score pairs.

    Parameters
    ----------
    embeddings : (N, n) finite numbers, or what `fold` returned.
    pairs : (M, 2) row numbers, or a tuple of two (M,); the second ones are rows of `against` where
        that is given. None: each row with the same row of `against`.
    against : right entities, in the form of `embeddings`; default the same.
    model : see `fold`; a table brings its own.
    unit : "score" (the default), "probability", "distance" or "decision" (1 from the model's
        threshold on, else 0), where the model has it.
    precision : see `fold`; a table brings its own.
    out : (M,) float32 to write into. Where row numbers are on a GPU, it may be there as well: then
        nothing is copied.
    device : "auto", "cpu", "gpu", "gpu:1" or "gpu:0,1"; row numbers that are on a GPU are scored
        there unless it is "cpu".
    threads : number of threads; default one for each processor.

    Returns
    -------
    scores : (M,) float32, `out` if that was given. Swapped pairs have the same bits, but
        of asymmetric models.

    Raises
    ------
    ArgumentError, DataError : an argument cannot be used; a row number is out of range.
    MismatchError : embeddings, `against` and model do not belong together.
    DeviceError : the device is not there.
    """
    left, right = both_tables(embeddings, against, model, precision, threads)
    counts = left.count, (right or left).count
    form = form_of(left, unit)
    rows: tuple[Any, Any]
    if pairs is None:
        if against is None or counts[0] != counts[1]:
            raise MismatchError(
                f"pairs are left out and there are {counts[0]} embeddings against "
                f"{counts[1] if against is not None else 'none'}: give pairs, or as many of both"
            )
        rows = np.arange(counts[0]), np.arange(counts[0])
    else:
        rows = as_columns(pairs, "pairs")
    if on_device(out) or (on_device(rows[0]) and device != "cpu"):
        return _score_on_device(left, right, rows, out, unit, device, threads)
    numbers = [
        as_row_numbers(column, f"{side} pairs", count)
        for column, side, count in zip(rows, ("left", "right"), counts, strict=True)
    ]
    scores = _made((len(numbers[0]),), np.float32, out)
    score = _pair_scorer(pick(device, pairs=len(scores)), left, right, threads)
    for start in range(0, len(scores), PAIRS_AT_ONCE):
        block = slice(start, start + PAIRS_AT_ONCE)
        scores[block] = form(score(numbers[0][block], numbers[1][block]))
    return scores


def pairwise(
    embeddings: ArrayLike | Table,
    against: ArrayLike | Table | None = None,
    *,
    model: ModelLike | None = None,
    unit: str = "score",
    precision: str | None = None,
    out: np.ndarray | None = None,
    device: str = "auto",
    threads: int | None = None,
    memory: int | str | None = None,
) -> np.ndarray:
    """Score every pair of two sets, or of one.

    Parameters
    ----------
    embeddings, against, model, unit, precision, device, threads : see `score_pairs`.
    out : (N, N') float32 to write into, such as a memory map.
    memory : bytes, or a text such as "2GiB", that may be allocated beside tables and result.

    Returns
    -------
    scores : (N, N') float32, `out` if that was given. They are the tiles' values, within the
        rounding of float32 sums of those of `score_pairs`; of one set, symmetric to the bit where
        the model is.

    Raises
    ------
    FastpairError : as `score_pairs`.
    """
    left, right = both_tables(embeddings, against, model, precision, threads)
    form = form_of(left, unit)
    scores = _made((left.count, (right or left).count), np.float32, out)
    for first, found in _walk(left, right, device, threads, memory).dense():
        scores[first : first + len(found)] = form(found)
    return scores


class _Options(TypedDict, total=False):
    """What every form of `top_k` takes."""

    model: ModelLike | None
    unit: str
    precision: str | None
    out: tuple[np.ndarray, np.ndarray] | None
    device: str
    threads: int | None
    memory: int | str | None


@overload
def top_k(
    embeddings: ArrayLike | Table,
    k: int = ...,
    against: ArrayLike | Table | None = ...,
    *,
    sparse: Literal[False] = ...,
    **options: Unpack[_Options],
) -> tuple[np.ndarray, np.ndarray]: ...


@overload
def top_k(
    embeddings: ArrayLike | Table,
    k: int = ...,
    against: ArrayLike | Table | None = ...,
    *,
    sparse: Literal[True],
    **options: Unpack[_Options],
) -> csr_array: ...


def top_k(
    embeddings: ArrayLike | Table,
    k: int = 10,
    against: ArrayLike | Table | None = None,
    *,
    model: ModelLike | None = None,
    unit: str = "score",
    precision: str | None = None,
    sparse: bool = False,
    out: tuple[np.ndarray, np.ndarray] | None = None,
    device: str = "auto",
    threads: int | None = None,
    memory: int | str | None = None,
) -> Any:
    """Find the k best of each row, exactly.

    Parameters
    ----------
    embeddings, against, model, unit, precision, device, threads : see `score_pairs`.
    k : how many of each row, from 1 on. Of one set, a row is not its own neighbour.
    sparse : return a matrix in place of two arrays.
    out : arrays to write indices and scores into.
    memory : see `pairwise`.

    Returns
    -------
    indices : (N, k) int64, by falling score, equal ones by lower index; -1 where there are fewer.
    scores : (N, k) float32; NaN where there are fewer.

    With `sparse`, a `scipy.sparse.csr_array` (N, N') of the same scores, indices rising in a row.

    Raises
    ------
    FastpairError : as `score_pairs`; ArgumentError also where k is below 1.
    """
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise ArgumentError(f"k is {k!r}, expected a whole number from 1 on")
    if sparse and out is not None:
        raise ArgumentError("out goes with two arrays, not with sparse")
    left, right = both_tables(embeddings, against, model, precision, threads)
    form = form_of(left, unit)
    if out is not None and (not isinstance(out, tuple) or len(out) != 2):
        raise ArgumentError(f"out is {type(out).__name__}, expected a tuple (indices, scores)")
    shape = left.count, int(k)
    indices = _made(shape, np.int64, None if out is None else out[0], "out[0]")
    scores = _made(shape, np.float32, None if out is None else out[1], "out[1]")
    walk = _walk(left, right, device, threads, memory, itself=against is not None)
    for first, found, places in walk.top_k(int(k)):
        rows = slice(first, first + len(found))
        indices[rows] = places
        there, found = places >= 0, found.copy()
        found[there] = form(found[there])
        scores[rows] = found
    if not sparse:
        return indices, scores
    there = indices >= 0
    counts = there.sum(axis=1)
    matrix = _csr(counts, indices[there], scores[there], (left.count, (right or left).count))
    matrix.sort_indices()
    return matrix


def above_threshold(
    embeddings: ArrayLike | Table,
    threshold: float | None = None,
    against: ArrayLike | Table | None = None,
    *,
    model: ModelLike | None = None,
    precision: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    memory: int | str | None = None,
) -> csr_array:
    """Find every pair that scores at least a threshold, exactly.

    There is no `out`: how many pairs there are shows only at the end.

    Parameters
    ----------
    embeddings, against, model, precision, device, threads : see `score_pairs`.
    threshold : a score; default the model's own threshold.
    memory : see `pairwise`.

    Returns
    -------
    scores : `scipy.sparse.csr_array` (N, N') float32, indices rising in a row; of one set both
        triangles without the diagonal.

    Raises
    ------
    FastpairError : as `score_pairs`; ArgumentError also where there is no threshold.
    """
    left, right = both_tables(embeddings, against, model, precision, threads)
    least = left.threshold if threshold is None else threshold
    if least is None:
        raise ArgumentError("threshold is left out and the model has none: give one")
    if isinstance(least, bool) or not isinstance(least, SupportsFloat) or not np.isfinite(least):
        raise ArgumentError(f"threshold is {least!r}, expected a finite number")
    counts, indices, scores = [np.empty(0, np.int64)], [np.empty(0, np.int64)], []
    scores.append(np.empty(0, np.float32))
    walk = _walk(left, right, device, threads, memory, itself=against is not None)
    for _, own, places, found in walk.above(float(least)):
        counts.append(own)
        indices.append(places)
        scores.append(found)
    shape = left.count, (right or left).count
    return _csr(np.concatenate(counts), np.concatenate(indices), np.concatenate(scores), shape)


def entity_groups(pairs: ArrayLike) -> np.ndarray:
    """Return numbers of groups of pairs that share no entity, for `GroupKFold` and its like.

    Pairs are in one group where a chain of pairs connects them.

    Parameters
    ----------
    pairs : (M, 2) row numbers or ids, or (M, 2, n) embeddings, equal ones being one entity.

    Returns
    -------
    groups : (M,) int64, numbered from 0 in the order of their first pairs.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    array = as_array(pairs, "pairs")
    if array.ndim not in (2, 3) or array.shape[1] != 2:
        raise ArgumentError(f"pairs have shape {array.shape}, expected (M, 2) or (M, 2, n)")
    if array.ndim == 3 and array.size:
        entities = distinct_rows(as_numbers(array, "pairs").reshape(-1, array.shape[2]))[1]
    else:
        entities = np.unique(array, return_inverse=True)[1]
    left, right = entities.reshape(-1, 2).T
    if not len(left):
        return np.empty(0, np.int64)
    size = int(entities.max()) + 1
    graph = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(size, size))
    found = connected_components(graph, directed=False)[1][left]
    _, first, inverse = np.unique(found, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int64)


def distinct_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which rows (N, n) float are the first of their kind, and of which kind each is.

    Rows are equal if all their numbers are. Kinds are numbered in an order that depends on the
    rows alone, not on how often or where they occur.

    Returns
    -------
    first : (K,) where each kind occurs first.
    kinds : (N,) from 0 to K - 1.
    """
    rows = np.ascontiguousarray(rows) + 0.0  # no -0.0
    keys = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1])))[:, 0]
    _, first, kinds = np.unique(keys, return_index=True, return_inverse=True)
    return first, kinds.reshape(-1)


# --- what they share ------------------------------------------------------------------------------


def _made(shape: tuple[int, ...], dtype: Any, out: Any, name: str = "out") -> np.ndarray:
    """Return `out` if it can hold the result, or a new array if it is None."""
    return np.empty(shape, dtype) if out is None else check_out(out, shape, dtype, name)


def _csr(
    counts: np.ndarray, indices: np.ndarray, scores: np.ndarray, shape: tuple[int, int]
) -> csr_array:
    from scipy.sparse import csr_array

    pointers = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
    return csr_array((scores, indices, pointers), shape=shape)


def _pair_scorer(choice: Choice, left: Table, right: Table | None, threads: int | None) -> Any:
    """Return what scores pairs of the tables on the chosen device."""
    tables = left.rows, left.plan, *((None, None) if right is None else (right.rows, right.plan))
    if not choice.runtimes:
        return PairScorer(*tables, threads=threads)
    from fastpair.gpu_scoring import GpuPairScorer

    return GpuPairScorer(*tables, devices=choice.runtimes, threads=threads)


def _score_on_device(
    left: Table,
    right: Table | None,
    rows: tuple[Any, Any],
    out: Any,
    unit: str,
    device: str,
    threads: int | None,
) -> Any:
    """Score row numbers that are on a GPU; only the scores come here, or nothing with `out`."""
    if not all(on_device(column) for column in rows):
        raise ArgumentError("out is on a GPU, which takes scores of row numbers that are there too")
    if unit != "score":
        raise ArgumentError(
            f"unit is {unit!r}, but a GPU returns scores alone: give row numbers in NumPy arrays"
        )
    choice = pick("gpu" if device == "auto" else device)
    scorer = _pair_scorer(choice, left, right, threads)
    scores = scorer.score_device(rows[0], rows[1], out if on_device(out) else None)
    if on_device(out):
        return out
    found = as_array(scores, "scores")
    host = _made(found.shape, np.float32, out)
    host[...] = found
    return host


def _walk(
    left: Table,
    right: Table | None,
    device: str,
    threads: int | None,
    memory: int | str | None,
    itself: bool = True,
) -> Any:
    """Return what walks all pairs of the tables on the chosen device.

    Without `itself`, two tables are both sides of one set, in which no row meets itself.
    """
    pairs = left.count * (right or left).count
    choice = pick(device, pairs=pairs, least=LEAST_WALKED)
    rows = left.rows, None if right is None else right.rows, left.plan
    walk: Any
    if not choice.runtimes:
        from fastpair.matrix import all_pairs

        walk = all_pairs(*rows, threads=threads, memory=memory)
    else:
        from fastpair import gpu_matrix

        options: dict[str, Any] = {"threads": threads, "memory": memory}
        walk = gpu_matrix.all_pairs(*rows, **options, runtimes=list(choice.runtimes))
    return walk if itself or right is None else _WithoutDiagonal(walk)


class _WithoutDiagonal:
    """All pairs of two tables but those of a row with the same row, as `AllPairs` yields them."""

    def __init__(self, walk: Any) -> None:
        self._walk = walk

    def top_k(self, k: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        for first, scores, places in self._walk.top_k(k + 1):
            itself = places == np.arange(first, first + len(places))[:, None]
            order = np.argsort(itself, axis=1, kind="stable")[:, :k]
            best = [np.take_along_axis(array, order, 1) for array in (scores, places)]
            yield first, best[0], best[1]

    def above(self, threshold: float) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        for first, counts, places, scores in self._walk.above(threshold):
            rows = np.repeat(np.arange(len(counts)), counts)
            others = places != first + rows
            counts = np.bincount(rows[others], minlength=len(counts))
            yield first, counts, places[others], scores[others]
