"""Neighbours of an id, or of arithmetic on ids, by a model's own score.

Expressions are evaluated in the space of the embeddings as they are in the file; what they come to
is then prepared, projected and scored like any embedding.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastpair import expression
from fastpair.errors import ArgumentError, DataError
from fastpair.folding import Folder
from fastpair.hdf5 import reading
from fastpair.ingest import EmbeddingSource, open_embeddings
from fastpair.jobs.inputs import load_model, own_source, refuse_embeddings
from fastpair.kernels import aligned_empty
from fastpair.model import Model

Summary = dict[str, Any]

FOLDED_AT_ONCE = 1 << 22
"""Numbers of embeddings that are folded together: 32 MiB in float64."""


class Neighbours:
    """Embeddings under a model, ready to be asked for neighbours.

    Parameters
    ----------
    model : what scores; of an asymmetric one, questions are the left side, embeddings the right.
    source : the embeddings, with ids or without: then row numbers are ids.
    threads : default one for each processor.
    answers : where neighbours are looked for; default `source`.
    """

    def __init__(
        self,
        model: Model,
        source: EmbeddingSource,
        threads: int | None = None,
        answers: EmbeddingSource | None = None,
    ) -> None:
        self.threads = threads
        self.embeddings = source.read()
        self._rows = None
        if source.ids is not None:
            self._rows = {name: row for row, name in enumerate(source.ids.to_pylist())}
        self.apart = answers is not None
        found, ids = self.embeddings, source.ids
        if answers is not None:
            found, ids = answers.read(), answers.ids
        self.names = None if ids is None else ids.to_pylist()
        sides = ("left", "right") if model.asymmetric else ("both", "both")
        columns = self.embeddings.shape[1]
        self._asking, folder = (Folder(model, columns, side=s, threads=threads) for s in sides)
        self.plan = folder.plan
        self.table = aligned_empty((len(found), self.plan.layout.row_bytes), np.uint8)
        step = max(1, FOLDED_AT_ONCE // columns)
        for start in range(0, len(found), step):
            block = folder.fold(found[start : start + step], start)
            self.table[start : start + len(block)] = _bytes(block)

    def row(self, name: str) -> int | None:
        """Return the row of an id among those that are asked, None where it is unknown."""
        if self._rows is not None:
            return self._rows.get(name)
        known = name.isascii() and name.isdigit() and int(name) < len(self.embeddings)
        return int(name) if known else None

    def name(self, row: int) -> str:
        """Return the id of a row among those that answer."""
        return str(row) if self.names is None else self.names[row]

    def evaluate(self, text: str) -> expression.Result:
        """Return what an expression on ids comes to; see `expression.evaluate`."""

        def embedding(name: str) -> np.ndarray | None:
            row = self.row(name)
            return None if row is None else self.embeddings[row]

        return expression.evaluate(text, embedding)

    def of(
        self, vectors: np.ndarray, k: int, left_out: Sequence[Sequence[int]] | None = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the k best rows of each vector.

        Parameters
        ----------
        vectors : (q, n), in the space of the embeddings.
        k : how many, at least 1; fewer where there are not so many.
        left_out : rows that are not among the best of each vector; default none.

        Returns
        -------
        best : for each vector, rows (k,) int64 and scores (k,) float32, falling.
        """
        from fastpair.matrix import all_pairs

        if k < 1:
            raise ArgumentError(f"k is {k}, expected at least 1")
        without = left_out or [[]] * len(vectors)
        asked = _bytes(self._asking.fold(vectors))
        most = min(k + max((len(set(rows)) for rows in without), default=0), len(self.table))
        best: list[tuple[np.ndarray, np.ndarray]] = []
        pairs = all_pairs(asked, self.table, self.plan, threads=self.threads)
        for first, scores, rows in pairs.top_k(most):
            for own, numbers, exact in zip(without[first:], rows, scores, strict=False):
                kept = np.flatnonzero((numbers >= 0) & ~np.isin(numbers, list(own)))[:k]
                best.append((numbers[kept], exact[kept]))
        return best


def _bytes(rows: np.ndarray) -> np.ndarray:
    """Return folded rows as kernels take them: (n, row_bytes) uint8 on their boundary."""
    plain = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)
    aligned = aligned_empty(plain.shape, np.uint8)
    aligned[:] = plain
    return aligned


def nearest(
    model: str | Path,
    embeddings: Path | None,
    expressions: Sequence[str] = (),
    *,
    file: Path | None = None,
    k: int = 10,
    include: bool = False,
    dataset: str | None = None,
    threads: int | None = None,
) -> Summary:
    """Find the entities most similar to an id or to arithmetic on ids.

    Parameters
    ----------
    model : a model file or the name of a built-in similarity.
    embeddings : a file of any accepted format; without ids, row numbers are ids. None: the tables
        that the model learned itself; of two, ids of the left one are asked and ids of the right
        one answer.
    expressions : such as ``king - man + woman``; see `fastpair.expression`.
    file : text with one more expression a line; empty lines are passed over.
    k : neighbours of each, default 10.
    include : whether ids of an expression may be among its own neighbours, default False.

    Returns
    -------
    summary : ``answers``, for each expression its ``expression``, ``ids`` (those that it names)
        and ``neighbours`` (``id``, ``row``, ``score``, best first); ``unit``; ``notes``.

    Raises
    ------
    ArgumentError : an expression cannot be read or names an unknown id; nothing is answered.
    """
    begun = time.perf_counter()
    asked = [*expressions, *([] if file is None else _lines(file))]
    if not asked:
        raise ArgumentError("there is no expression: give one, or a --file of them")
    similarity = load_model(model)
    right: EmbeddingSource | None = None
    if embeddings is None:
        two = similarity.tables is not None and similarity.tables.right is not None
        source = own_source(similarity, model, "left" if two else "both")
        right = own_source(similarity, model, "right") if two else None
    else:
        refuse_embeddings(similarity, model)
        source = open_embeddings(embeddings, dataset=dataset)
    similarity.check_embeddings(source.shape[1])
    neighbours = Neighbours(similarity, source, threads, right)
    found = [neighbours.evaluate(text) for text in asked]
    kept = include or neighbours.apart
    left_out = [[] if kept else [neighbours.row(name) for name in one.ids] for one in found]
    vectors = np.array([one.vector for one in found])
    best = neighbours.of(vectors, k, left_out)  # type: ignore[arg-type]
    answers = [
        {
            "expression": text,
            "ids": list(one.ids),
            "neighbours": [
                {"id": neighbours.name(int(row)), "row": int(row), "score": float(score)}
                for row, score in zip(*pair, strict=True)
            ],
        }
        for text, one, pair in zip(asked, found, best, strict=True)
    ]
    return {
        "answers": answers,
        "unit": similarity.unit,
        "rows": len(neighbours.table),
        "seconds": time.perf_counter() - begun,
        "notes": [source.assumed] if source.assumed else [],
    }


def _lines(file: Path) -> list[str]:
    with reading(Path(file)):
        content = Path(file).read_bytes()
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text, expected one expression a line") from error
    return [line for line in lines if line.strip()]
