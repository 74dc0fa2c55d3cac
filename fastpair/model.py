"""The model: preparation, branches, constant, link, calibration and threshold.

A model is what training produces and what folding reads; it holds plain numbers only. Its
``score`` is the formula in float64, written once more without any folding.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fastpair.errors import ArgumentError, DataError, FastpairError, FileError, MismatchError
from fastpair.heads import Columns, Folded, Weights, find_head, unit_rows
from fastpair.kernels import LINKS

UNITS = ("log-odds", "grade", "similarity")
"""What a score can mean: calibrated log-odds, a predicted grade, or the similarity itself."""

BUILTINS = ("cosine", "dot", "euclidean", "manhattan")
"""Similarities that need no training."""


@dataclass
class Branch:
    """One tower with one head.

    Parameters
    ----------
    head : a name of `fastpair.heads.HEADS`.
    weights : the head's own weights by name.
    projection : (k, n) float, the tower ``z = projection x``, or None for ``z = x``.
    """

    head: str
    weights: Weights
    projection: np.ndarray | None = None

    def tower(self, rows: np.ndarray) -> np.ndarray:
        """Map prepared rows (N, n) to tower outputs (N, k)."""
        return rows if self.projection is None else rows @ self.projection.T

    def forward(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, Any]:
        """Compute the branch's raw scores (M,) of prepared rows, and what `backward` needs."""
        rows = np.concatenate([left, right])  # one matrix product for both sides
        z = self.tower(rows)
        raw, cache = find_head(self.head).forward(z[: len(left)], z[len(left) :], self.weights)
        return raw, (rows, cache)

    def backward(self, upstream: np.ndarray, cache: Any) -> dict[str, np.ndarray]:
        """Turn the gradient by the raw score (M,) into those by `parameters`, by name."""
        rows, head_cache = cache
        head = find_head(self.head)
        d_left, d_right, gradients = head.backward(upstream, head_cache, self.weights)
        if self.projection is not None:
            gradients["projection"] = np.concatenate([d_left, d_right]).T @ rows
        return gradients

    @property
    def parameters(self) -> dict[str, np.ndarray]:
        """Everything that is learned, by name: the head's weights and the projection."""
        tower = {} if self.projection is None else {"projection": self.projection}
        return {**self.weights, **tower}

    def scaled(self, factor: float) -> Branch:
        """Return a branch whose raw score is `factor` times this one's."""
        return replace(self, weights=find_head(self.head).scaled(self.weights, factor))

    def as_float64(self) -> Branch:
        """Return the branch with all its numbers in float64."""
        projection = None if self.projection is None else np.array(self.projection, np.float64)
        weights = {name: np.array(value, np.float64) for name, value in self.weights.items()}
        return Branch(self.head, weights, projection)

    def check(self, columns: int | None) -> None:
        """Refuse unknown heads, wrong shapes and numbers that are not finite."""
        head = find_head(self.head)
        for name, value in self.parameters.items():
            if not np.isfinite(value).all():
                raise ArgumentError(f"{name} of the {self.head} branch holds NaN or infinity")
        if self.projection is not None:
            shape = self.projection.shape
            if len(shape) != 2 or 0 in shape or shape[1] != columns:
                raise ArgumentError(
                    f"the projection of the {self.head} branch has shape {shape}, "
                    f"expected (any, {columns})"
                )
            columns = shape[0]
        if not head.fits(self.weights, columns):
            shapes = {name: value.shape for name, value in self.weights.items()}
            raise ArgumentError(f"weights {shapes} do not fit {self.head} over {columns} columns")


@dataclass
class Model:
    """A similarity: ``score = offset + slope * link(constant + sum of branches)``.

    Parameters
    ----------
    branches : the branches that are summed, at least one.
    input_columns : columns of the embeddings that it takes; None: any number.
    unit_rows : whether embeddings are first divided by their length.
    constant : the c of the formula.
    link : a name of `fastpair.kernels.LINKS`.
    slope, offset : what follows the link; slope > 0.
    threshold : pairs of at least this score are taken as good, in the unit of the score; or None.
    unit : what a score means, a name of `UNITS`.
    description : how the model came about; anything that JSON can hold.
    """

    branches: list[Branch]
    input_columns: int | None = None
    unit_rows: bool = False
    constant: float = 0.0
    link: str = "identity"
    slope: float = 1.0
    offset: float = 0.0
    threshold: float | None = None
    unit: str = "similarity"
    description: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.branches:
            raise ArgumentError("a model needs at least one branch, none came")
        columns = self.input_columns
        if columns is not None and (not isinstance(columns, int) or columns < 1):
            raise ArgumentError(f"input_columns is {columns!r}, expected a whole number from 1 on")
        for name, value, known in (("link", self.link, LINKS), ("unit", self.unit, UNITS)):
            if value not in known:
                raise ArgumentError(f"{name} is {value!r}, expected one of {', '.join(known)}")
        for name in ("constant", "slope", "offset", "threshold"):
            value = getattr(self, name)
            if value is None and name == "threshold":
                continue
            if not math.isfinite(value):
                raise ArgumentError(f"{name} is {value}, expected a finite number")
            setattr(self, name, float(value))
        if self.slope <= 0:
            raise ArgumentError(f"slope is {self.slope}, expected a number above 0")
        self.branches = [branch.as_float64() for branch in self.branches]
        for branch in self.branches:
            branch.check(columns)

    def check_embeddings(self, columns: int) -> None:
        """Refuse embeddings with a number of columns that the model does not take."""
        if self.input_columns not in (None, columns):
            raise MismatchError(
                f"the embeddings have {columns} columns but the model was trained on "
                f"{self.input_columns}: use the embeddings that it was trained on"
            )

    def prepare(self, embeddings: np.ndarray) -> np.ndarray:
        """Check embeddings (N, n) and bring them into the form in which branches take them.

        Returns
        -------
        rows : (N, n) float64.

        Raises
        ------
        MismatchError : the number of columns is not the model's.
        DataError : a row holds NaN or infinity.
        """
        rows = np.asarray(embeddings, np.float64)
        if rows.ndim != 2 or rows.shape[1] == 0:
            raise ArgumentError(f"embeddings have shape {rows.shape}, expected (rows, columns)")
        self.check_embeddings(rows.shape[1])
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            raise DataError(f"row {int(np.argmin(finite))} of the embeddings holds NaN or infinity")
        return unit_rows(rows)[0] if self.unit_rows else rows

    def score(self, left_embeddings: np.ndarray, right_embeddings: np.ndarray) -> np.ndarray:
        """Score each row of `left_embeddings` with the same row of `right_embeddings`.

        Parameters
        ----------
        left_embeddings, right_embeddings : (M, n) float.

        Returns
        -------
        scores : (M,) float64, in the model's unit; higher is more similar.
        """
        left, right = self.prepare(left_embeddings), self.prepare(right_embeddings)
        if left.shape != right.shape:
            raise ArgumentError(
                f"left embeddings have shape {left.shape} and right ones {right.shape}, "
                "expected the same"
            )
        raw = np.full(len(left), self.constant)
        for branch in self.branches:
            raw += branch.forward(left, right)[0]
        if self.link == "negative_root":
            raw = -np.sqrt(np.maximum(-raw, 0))
        return self.offset + self.slope * raw

    def fold(self, embeddings: np.ndarray) -> Folded:
        """Fold a block of embeddings (N, n) into columns, branch by branch, and one bias."""
        rows = self.prepare(embeddings)
        segments: list[Columns] = []
        bias: np.ndarray | None = None
        for branch in self.branches:
            folded = find_head(branch.head).fold(branch.tower(rows), branch.weights)
            segments += folded.segments
            if folded.bias is not None:
                bias = folded.bias if bias is None else bias + folded.bias
        return Folded(segments, bias)

    def calibrated(self, slope: float, offset: float, **changes: Any) -> Model:
        """Return a model that scores ``offset + slope * score``, with `changes` to other fields.

        Without a non-linear link the factor goes into the branches and costs nothing per pair.
        """
        if self.link != "identity":
            after = {"slope": slope * self.slope, "offset": offset + slope * self.offset}
            return replace(self, **{**after, **changes})
        return replace(
            self,
            branches=[branch.scaled(slope * self.slope) for branch in self.branches],
            constant=offset + slope * (self.offset + self.slope * self.constant),
            slope=1.0,
            offset=0.0,
            **changes,
        )

    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) over everything in the model: equal only for equal models."""
        config, arrays = self.to_parts()
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name in sorted(arrays):
            value = np.ascontiguousarray(arrays[name], "<f8")
            digest.update(f"{name}{value.shape}".encode())
            digest.update(value.tobytes())
        return digest.hexdigest()

    def to_parts(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Take the model apart into what JSON can hold and arrays by name (float64)."""
        names = ("input_columns", "unit_rows", "constant", "link", "slope", "offset", "threshold")
        config = {name: getattr(self, name) for name in (*names, "unit", "description")}
        config["branches"] = [
            {"head": branch.head, "arrays": sorted(branch.parameters)} for branch in self.branches
        ]
        arrays = {
            f"branch_{number}_{name}": value
            for number, branch in enumerate(self.branches)
            for name, value in branch.parameters.items()
        }
        return config, arrays

    @classmethod
    def from_parts(cls, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> Model:
        """Put a model together from what `to_parts` gave; anything unsound is a FileError."""
        try:
            fields = dict(config)
            branches = []
            for number, part in enumerate(fields.pop("branches")):
                weights = {
                    name: np.array(arrays[f"branch_{number}_{name}"], np.float64)
                    for name in part["arrays"]
                }
                projection = weights.pop("projection", None)
                branches.append(Branch(part["head"], weights, projection))
            return cls(branches, **fields)
        except (KeyError, TypeError, AttributeError, ValueError, FastpairError) as error:
            raise FileError(
                f"this is not a model that this version can use ({error}): train it again"
            ) from error


def builtin(name: str) -> Model:
    """Return a built-in similarity, a model without any training.

    Parameters
    ----------
    name : "cosine", "dot", "euclidean" (minus the distance) or "manhattan" (minus the distance).
    """
    one = np.ones(1)
    parts: dict[str, tuple[Branch, str]] = {
        "cosine": (Branch("cosine", {"scale": one}), "identity"),
        "dot": (Branch("dot", {"weight": one}), "identity"),
        "euclidean": (Branch("sqdiff", {"weight": -one}), "negative_root"),
        "manhattan": (Branch("absdiff", {"weight": -one}), "identity"),
    }
    if name not in parts:
        raise ArgumentError(
            f"there is no built-in similarity {name!r}: choose from {', '.join(BUILTINS)}"
        )
    branch, link = parts[name]
    return Model([branch], link=link, description={"builtin": name})
