"""Symmetric features of pairs, as input for any other prediction model.

Each branch gives, column by column, the product, the absolute and the squared difference and the
sum of its two tower outputs, and its own raw score. A boosted tree on them, for example::

    fastpair features model.h5 embeddings.h5 pairs.csv -o features.h5

    import h5py
    from sklearn.ensemble import HistGradientBoostingClassifier

    with h5py.File("features.h5") as file:
        tree = HistGradientBoostingClassifier().fit(file["features"][:], file["label"][:])
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastpair.backend import one_blas_thread, run_ordered, thread_count
from fastpair.errors import ArgumentError, DataError
from fastpair.heads import find_head
from fastpair.model import FOLDED_TOGETHER, Branch, Model

KINDS = ("product", "absdiff", "sqdiff", "sum", "raw")
"""What can be written of each branch: four numbers a column, and one for the branch."""


class PairFeatures:
    """The features of pairs of embeddings under a model.

    Swapped pairs have the same features to the bit, unless the model is asymmetric, whatever
    pairs they come with.

    Parameters
    ----------
    model : a trained model or ``model.builtin(name)``.
    columns : columns of the embeddings.
    kinds : names of `KINDS`, in the order in which they shall stand.
    threads : number of threads; default one for each processor.

    Attributes
    ----------
    names : of the features, ``BRANCH_KIND_COLUMN`` or ``BRANCH_raw``; a branch is called like its
        head, with a number where a head occurs repeatedly.

    Raises
    ------
    ArgumentError : no kind, an unknown one, or one twice.
    """

    def __init__(
        self,
        model: Model,
        columns: int,
        kinds: Sequence[str] = KINDS,
        *,
        threads: int | None = None,
    ) -> None:
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown or not kinds or len(set(kinds)) < len(kinds):
            raise ArgumentError(
                f"kinds are {', '.join(kinds) or 'none'}, expected some of {', '.join(KINDS)}, "
                "each once"
            )
        model.check_embeddings(columns)
        self.model, self.kinds, self.threads = model, tuple(kinds), thread_count(threads)
        self.sides = ("left", "right") if model.asymmetric else ("both", "both")
        self.names: list[str] = []
        heads = [find_head(head).name.split(":")[-1] for head in model.heads]
        for number, (name, branch) in enumerate(zip(heads, model.branches, strict=True)):
            if heads.count(name) > 1:
                name += str(heads[:number].count(name) + 1)
            outputs = branch.tower.columns_out or columns
            for kind in kinds:
                rest = [""] if kind == "raw" else [f"_{column}" for column in range(outputs)]
                self.names += [f"{name}_{kind}{end}" for end in rest]

    def __call__(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return the features (M, F) float32 of each row of `left` with its row of `right`.

        Parameters
        ----------
        left, right : (M, n) finite float, embeddings as they came.

        Raises
        ------
        DataError : a feature is too large for float32.
        """
        features = np.empty((len(left), len(self.names)), np.float32)

        def fill(start: int) -> None:
            # Products of one shape, each in one thread, do not depend on where a pair stands.
            stop = min(start + FOLDED_TOGETHER, len(left))
            pieces = np.zeros((2, FOLDED_TOGETHER, left.shape[1]))
            pieces[0, : stop - start] = left[start:stop]
            pieces[1, : stop - start] = right[start:stop]
            with np.errstate(over="ignore"):
                self._fill(features[start:stop], *map(self.model.prepare, pieces))

        with one_blas_thread():
            for _ in run_ordered(fill, range(0, len(left), FOLDED_TOGETHER), self.threads):
                pass
        bad = ~np.isfinite(features).all(axis=1)
        if bad.any():
            raise DataError(
                f"pair {int(np.argmax(bad))} of a block has a feature that float32 cannot hold: "
                "scale the embeddings down"
            )
        return features

    def _fill(self, features: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
        at = 0
        for branch in self.model.branches:
            z, other = (
                branch.outputs(rows, side)
                for rows, side in zip((left, right), self.sides, strict=True)
            )
            for kind in self.kinds:
                values = self._values(branch, kind, z, other)
                features[:, at : at + values.shape[1]] = values[: len(features)]
                at += values.shape[1]

    def _values(self, branch: Branch, kind: str, z: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Return one kind of features of a branch, (M, k) or (M, 1)."""
        if kind == "product":
            return z * other
        if kind == "absdiff":
            return np.abs(z - other)
        if kind == "sqdiff":
            return (z - other) ** 2
        if kind == "sum":
            return z + other
        head = find_head(branch.head)
        raw = head.forward(z, other, branch.weights)[0]
        if not self.model.asymmetric:
            # Both orders: some heads agree in them only up to rounding.
            raw = 0.5 * (raw + head.forward(other, z, branch.weights)[0])
        return raw[:, None]
