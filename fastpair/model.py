"""The model: preparation, branches, density, constant, link, calibration and threshold.

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

from fastpair.backend import one_blas_thread
from fastpair.errors import ArgumentError, DataError, FastpairError, FileError, MismatchError
from fastpair.heads import Columns, Folded, MissingHeadError, Weights, find_head, unit_rows
from fastpair.id_tables import IdTables
from fastpair.kernels import LINKS, Network
from fastpair.kernels.reference import apply_link
from fastpair.towers import Identity, Tower

UNITS = ("log-odds", "grade", "similarity")
"""What a score can mean: calibrated log-odds, a predicted grade, or the similarity itself."""

SIDES = ("both", "left", "right")
"""What a table can hold: entities of either side, or of one side of an asymmetric model."""

BUILTINS = ("cosine", "dot", "euclidean", "manhattan")
"""Similarities that need no training."""


@dataclass
class Branch:
    """One tower with one head.

    Parameters
    ----------
    head : a name of `fastpair.heads.HEADS`.
    weights : the head's own weights by name.
    tower : what is applied to each prepared row before the head compares two.
    right_tower : the tower of right entities; None: both sides have the same, as in every
        symmetric model.
    """

    head: str
    weights: Weights
    tower: Tower = field(default_factory=Identity)
    right_tower: Tower | None = None
    _compiled: Weights | None = field(default=None, init=False, repr=False, compare=False)

    def outputs(self, rows: np.ndarray, side: str = "both") -> np.ndarray:
        """Map prepared rows (N, n) to the outputs (N, k) of the tower of a side."""
        tower = self.right_tower if side == "right" and self.right_tower else self.tower
        return tower.forward(rows)[0]

    def forward(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, Any]:
        """Compute the branch's raw scores (M,) of prepared rows, and what `backward` needs."""
        if self.right_tower is None:  # one matrix product for both sides
            z, cache = self.tower.forward(np.concatenate([left, right]))
            z_left, z_right, right_cache = z[: len(left)], z[len(left) :], None
        else:
            z_left, cache = self.tower.forward(left)
            z_right, right_cache = self.right_tower.forward(right)
        raw, head_cache = find_head(self.head).forward(z_left, z_right, self.weights)
        return raw, (cache, right_cache, head_cache)

    def backward(self, upstream: np.ndarray, cache: Any) -> dict[str, np.ndarray]:
        """Turn the gradient by the raw score (M,) into those by `parameters`, by name.

        A weight that is given and not learned has no gradient.
        """
        head = find_head(self.head)
        d_left, d_right, gradients = head.backward(upstream, cache[2], self.weights)
        return {**gradients, **self.backward_towers(d_left, d_right, cache)}

    def backward_towers(
        self, d_left: np.ndarray, d_right: np.ndarray, cache: Any
    ) -> dict[str, np.ndarray]:
        """Turn the gradients by the towers' outputs (M, k) into those by their arrays, by name."""
        tower_cache, right_cache, _ = cache
        if self.right_tower is None:
            tower = self.tower.backward(np.concatenate([d_left, d_right]), tower_cache)
            return _prefixed(TOWER, tower)
        left = _prefixed(TOWER, self.tower.backward(d_left, tower_cache))
        right = _prefixed(RIGHT_TOWER, self.right_tower.backward(d_right, right_cache))
        return {**left, **right}

    def fold(self, rows: np.ndarray, side: str = "both") -> Folded:
        """Fold prepared rows (N, n) float64 of a side."""
        head = find_head(self.head)
        if self._compiled is None:
            with one_blas_thread():  # the same bits for any number of threads
                self._compiled = head.compiled(self.weights)
        return head.fold(self.outputs(rows, side), self._compiled)

    @property
    def network(self) -> Network | None:
        """The layers that take the place of a sum over columns, or None."""
        return find_head(self.head).network(self.weights)

    @property
    def stands_alone(self) -> bool:
        """Whether no other branch and no density can be added: a link or network of its own."""
        return find_head(self.head).stands_alone or self.network is not None

    @property
    def parameters(self) -> dict[str, np.ndarray]:
        """Everything that can be learned, by name: the arrays themselves, no copies.

        Names of the tower's arrays begin with `TOWER`, those of the right tower with `RIGHT_TOWER`.
        """
        right = {} if self.right_tower is None else self.right_tower.parameters
        towers = {**_prefixed(TOWER, self.tower.parameters), **_prefixed(RIGHT_TOWER, right)}
        return {**self.weights, **towers}

    def scaled(self, factor: float) -> Branch:
        """Return a branch whose raw score is `factor` times this one's."""
        return replace(self, weights=find_head(self.head).scaled(self.weights, factor))

    def as_float64(self) -> Branch:
        """Return a copy of the branch with all its numbers in float64."""
        weights = {name: np.array(value, np.float64) for name, value in self.weights.items()}
        right = None if self.right_tower is None else self.right_tower.astype(np.float64)
        return Branch(self.head, weights, self.tower.astype(np.float64), right)

    def check(self, columns: int | None) -> None:
        """Refuse unknown heads, wrong shapes and numbers that are not finite."""
        head = find_head(self.head)
        for name, value in self.parameters.items():
            if not np.isfinite(value).all():
                raise ArgumentError(f"{name} of the {self.head} branch holds NaN or infinity")
        self.tower.check(columns)
        out = self.tower.columns_out or columns
        if self.right_tower is not None:
            self.right_tower.check(columns)
            if (self.right_tower.columns_out or columns) != out:
                raise ArgumentError(f"the two towers of the {self.head} branch differ in columns")
        if not head.fits(self.weights, out):
            shapes = {name: value.shape for name, value in self.weights.items()}
            raise ArgumentError(f"weights {shapes} do not fit {self.head} over {out} columns")

    def to_parts(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Take the branch apart into what JSON can hold and arrays by name."""
        config: dict[str, Any] = {"head": self.head, "weights": sorted(self.weights)}
        config["tower"] = self.tower.to_config()
        if self.right_tower is not None:
            config["right_tower"] = self.right_tower.to_config()
        return config, self.parameters

    @classmethod
    def from_parts(cls, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> Branch:
        """Put a branch together from what `to_parts` gave."""
        find_head(config["head"])
        rest = dict(arrays)
        weights = {name: rest.pop(name) for name in config["weights"]}
        tower, right = _group(TOWER, rest), _group(RIGHT_TOWER, rest)
        if len(tower) + len(right) < len(rest):
            raise ArgumentError(f"arrays {sorted(rest)} hold more than the towers' own")
        return cls(
            config["head"],
            weights,
            Tower.from_config(config["tower"], tower),
            Tower.from_config(config["right_tower"], right) if "right_tower" in config else None,
        )


TOWER, RIGHT_TOWER = "tower.", "right_tower."
"""What the names of a tower's arrays begin with among the parameters of a branch."""


def _prefixed(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {prefix + name: value for name, value in arrays.items()}


@dataclass(frozen=True)
class Preparation:
    """What is done to embeddings without labels, before any tower.

    Parameters
    ----------
    unit_rows : whether rows are divided by their length, first, and again at the end where they
        were centred or whitened.
    mean : (n,) float64 that is then subtracted, or None.
    whitening : (n, n) float64 that rows are then multiplied with, or None.
    """

    unit_rows: bool = False
    mean: np.ndarray | None = None
    whitening: np.ndarray | None = None

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Return prepared rows (N, n) float64 of finite rows (N, n)."""
        rows = np.asarray(rows, np.float64)
        if self.unit_rows:
            rows = unit_rows(rows)[0]
        if self.mean is not None:
            rows = rows - self.mean
        if self.whitening is not None:
            rows = rows @ self.whitening
        moved = self.mean is not None or self.whitening is not None
        return unit_rows(rows)[0] if self.unit_rows and moved else rows

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that there are, by name."""
        both = {"mean": self.mean, "whitening": self.whitening}
        return {name: value for name, value in both.items() if value is not None}

    def check(self, columns: int | None) -> None:
        """Refuse arrays that do not fit rows of `columns` columns or are not finite."""
        for name, value in self.arrays.items():
            shape = (columns, columns) if name == "whitening" else (columns,)
            if value.shape != shape or not np.isfinite(value).all():
                raise ArgumentError(
                    f"{name} of the preparation has shape {value.shape}, expected {shape} of "
                    "finite numbers"
                )


PREPARATIONS = ("none", "centre", "half-whitening", "scaling")
"""Preparations that `fit_preparation` knows; all but the last begin with unit rows."""


def fit_preparation(rows: np.ndarray, kind: str = "none") -> Preparation:
    """Fit a preparation to embeddings, without labels.

    "scaling" centres and divides all by one number, so that the mean square of a row's length is
    1: lengths count, and the map is affine, so that a linear tower behind it is affine in what
    came. Half whitening multiplies with the covariance C to the power -1/4, after 1e-4 of its mean
    diagonal was added to its diagonal: half the way from the rows as they are to equal spread.

    Parameters
    ----------
    rows : (N, n) finite float.
    kind : a name of `PREPARATIONS`.
    """
    if kind not in PREPARATIONS:
        raise ArgumentError(f"preparation is {kind!r}, expected one of {', '.join(PREPARATIONS)}")
    if kind == "none":
        return Preparation(unit_rows=True)
    if kind == "scaling":
        return _scaling(rows)
    columns = rows.shape[1]
    total, moment = np.zeros(columns), np.zeros((columns, columns))
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        unit = unit_rows(np.asarray(rows[start : start + _ROWS_AT_ONCE], np.float64))[0]
        total += unit.sum(axis=0)
        moment += unit.T @ unit
    mean = total / len(rows)
    if kind == "centre":
        return Preparation(unit_rows=True, mean=mean)
    covariance = moment / len(rows) - np.outer(mean, mean)
    ridge = 1e-4 * float(np.trace(covariance)) / columns or 1.0  # 1.0: all rows are the same
    values, vectors = np.linalg.eigh(covariance + ridge * np.eye(columns))
    powers = np.maximum(values, ridge) ** -0.25
    return Preparation(unit_rows=True, mean=mean, whitening=(vectors * powers) @ vectors.T)


def _scaling(rows: np.ndarray) -> Preparation:
    """Return what centres rows and divides them by the root of their mean squared length."""
    total, squares = np.zeros(rows.shape[1]), 0.0
    starts = range(0, len(rows), _ROWS_AT_ONCE)
    for start in starts:
        total += np.asarray(rows[start : start + _ROWS_AT_ONCE], np.float64).sum(axis=0)
    mean = total / len(rows)
    for start in starts:
        apart = np.asarray(rows[start : start + _ROWS_AT_ONCE], np.float64) - mean
        squares += float(np.einsum("ij,ij->", apart, apart))
    length = (squares / len(rows)) ** 0.5 or 1.0  # 1.0: all rows are the same
    return Preparation(mean=mean, whitening=np.eye(rows.shape[1]) / length)


_ROWS_AT_ONCE = 1 << 14

NEAREST = (1, 5, 20)
"""Density is the mean cosine to this many nearest other rows of the reference."""

MOST_REFERENCE_ROWS = 4096
FEWEST_REFERENCE_ROWS = 100
"""With fewer rows than this there is no density."""


def nearest_means(rows: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the mean cosine (N, 3) of each row to its 1, 5 and 20 nearest others of a reference.

    "Itself" is left out by content: a cosine of 1 - 1e-6 or more. Where fewer others remain, the
    mean is over those; where none, it is 0.

    Parameters
    ----------
    rows : (N, n) unit rows.
    reference : (R, n) unit rows.
    """
    most = min(NEAREST[-1], len(reference))
    result = np.zeros((len(rows), len(NEAREST)))
    for start in range(0, len(rows), FOLDED_TOGETHER):
        cosine = rows[start : start + FOLDED_TOGETHER] @ reference.T
        cosine[cosine >= 1 - 1e-6] = -np.inf
        best = -np.sort(np.partition(-cosine, most - 1, axis=1)[:, :most], axis=1)
        other = np.isfinite(best)
        best[~other] = 0
        for column, number in enumerate(NEAREST):
            count = np.maximum(other[:, :number].sum(axis=1), 1)
            result[start : start + len(cosine), column] = best[:, :number].sum(axis=1) / count
    return result


FOLDED_TOGETHER = 960
"""Rows of a matrix product when embeddings are folded, the last one filled up with zeros.

BLAS adds in an order that depends on the shape of a product, on its threads, and for the last rows
of a number that is not a multiple of its own blocks (of 4, 16, 24, 48 ... rows) also on the row.
Products of one such shape, each in one thread, make a row the same to the bit whatever block it
came in.
"""


@dataclass(frozen=True)
class Density:
    """A bias of each entity from how close its nearest others in a fixed reference are.

    The entity's bias is ``sum_k weights_k (r_k - mean_k) / std_k`` with r of `nearest_means`.

    Parameters
    ----------
    reference : (R, n) float32, embeddings as they came, before any preparation.
    mean, std : (3,) float64, what standardises r.
    weights : (3,) float64.
    learned : whether r is measured among outputs of the first branch's tower instead of among
        prepared rows.
    """

    reference: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    weights: np.ndarray
    learned: bool = False

    def standardised(self, means: np.ndarray) -> np.ndarray:
        """Standardise what `nearest_means` gave, (N, 3)."""
        return (means - self.mean) / self.std

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        names = ("reference", "mean", "std", "weights")
        return {name: getattr(self, name) for name in names}

    def check(self, columns: int | None) -> None:
        """Refuse arrays of wrong shapes and numbers that are not finite."""
        shapes: dict[str, tuple[int, ...]] = {
            name: (len(NEAREST),) for name in ("mean", "std", "weights")
        }
        shapes["reference"] = (len(self.reference), columns or 0)
        for name, value in self.arrays.items():
            if value.shape != shapes[name] or not np.isfinite(value).all() or not value.size:
                raise ArgumentError(
                    f"{name} of the density has shape {value.shape}, expected {shapes[name]} of "
                    "finite numbers"
                )
        if not (self.std > 0).all():
            raise ArgumentError("std of the density holds numbers that are not above 0")


def fit_density(
    embeddings: np.ndarray,
    preparation: Preparation,
    rng: np.random.Generator,
    *,
    tower: Tower | None = None,
    reference: np.ndarray | None = None,
) -> tuple[Density, np.ndarray] | None:
    """Choose the reference of a density and standardise it on the embeddings; weights are 0.

    Parameters
    ----------
    embeddings : (N, n) finite float as they came.
    preparation : what is applied to them first.
    rng : draws the reference where there are more than `MOST_REFERENCE_ROWS` rows.
    tower : measure among this tower's outputs (`Density.learned`).
    reference : (R, n) float32, the reference of an earlier fit, in place of a new one.

    Returns
    -------
    The density and the standardised (N, 3) float64 of all embeddings; None with fewer rows than
    `FEWEST_REFERENCE_ROWS`.
    """
    if reference is None:
        if len(embeddings) < FEWEST_REFERENCE_ROWS:
            return None
        chosen = np.arange(len(embeddings))
        if len(chosen) > MOST_REFERENCE_ROWS:
            chosen = np.sort(rng.choice(len(chosen), MOST_REFERENCE_ROWS, replace=False))
        reference = np.array(embeddings[chosen], np.float32)
    means = nearest_means(
        _density_space(embeddings, preparation, tower),
        _density_space(reference, preparation, tower),
    )
    spread = means.std(axis=0)
    std = np.where(spread > 0, spread, 1.0)
    density = Density(reference, means.mean(axis=0), std, np.zeros(3), tower is not None)
    return density, density.standardised(means)


def _density_space(
    rows: np.ndarray, preparation: Preparation, tower: Tower | None = None
) -> np.ndarray:
    """Return the unit rows among which density measures cosines, float64."""
    prepared = preparation(rows)
    return unit_rows(prepared if tower is None else tower.astype(np.float64).forward(prepared)[0])[
        0
    ]


@dataclass(frozen=True)
class Isotonic:
    """A rising curve from scores to probabilities, used by ``--probability`` alone.

    Parameters
    ----------
    scores : (K,) float64, rising, at least one; probabilities between two are interpolated.
    probabilities : (K,) float64 from 0 to 1, not falling.
    """

    scores: np.ndarray
    probabilities: np.ndarray

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Return the probabilities (M,) float64 of scores (M,)."""
        return np.interp(scores, self.scores, self.probabilities)

    def check(self) -> None:
        """Refuse a curve that falls or leaves 0 to 1."""
        x, y = self.scores, self.probabilities
        sound = x.ndim == 1 and x.shape == y.shape and len(x) and np.isfinite(x).all()
        if not sound or (np.diff(x) <= 0).any() or (np.diff(y) < 0).any() or y[0] < 0 or y[-1] > 1:
            raise ArgumentError("the calibration is not a rising curve from scores to 0..1")


def sigmoid(log_odds: np.ndarray) -> np.ndarray:
    """Return the probabilities (M,) float64 of log-odds (M,); tiny ones stay apart from 0."""
    return np.exp(-np.logaddexp(0, -np.asarray(log_odds, np.float64)))


def probabilities(scores: np.ndarray, unit: str, calibration: Isotonic | None = None) -> np.ndarray:
    """Return the probabilities (M,) float64 that pairs are good.

    Parameters
    ----------
    scores : (M,) float, in their `unit`.
    unit : a name of `UNITS`; only log-odds have probabilities without a calibration.
    calibration : the curve of the model or table; None: the sigmoid.

    Raises
    ------
    ArgumentError : scores are neither log-odds nor calibrated otherwise.
    """
    scores = np.asarray(scores, np.float64)
    if calibration is not None:
        return calibration(scores)
    if unit != "log-odds":
        raise ArgumentError(
            f"these scores are of the unit {unit}, which has no probability: train on good and bad "
            "pairs"
        )
    return sigmoid(scores)


@dataclass
class Model:
    """A similarity: ``score = offset + slope * link(constant + sum of branches)``.

    Parameters
    ----------
    branches : the branches that are summed, at least one.
    input_columns : columns of the embeddings that it takes; None: any number.
    preparation : what is done to embeddings first.
    density : a bias of each entity from its nearest others, or None.
    constant : the c of the formula.
    link : a name of `fastpair.kernels.LINKS`.
    slope, offset : what follows the link; slope > 0.
    threshold : pairs of at least this score are taken as good, in the unit of the score; or None.
    unit : what a score means, a name of `UNITS`.
    calibration : the curve from scores to probabilities; None: the sigmoid of log-odds.
    description : how the model came about; anything that JSON can hold.
    tables : what a model of ids learned in the place of embeddings, or None; not in `to_parts`.
    record : how learning went: `history`, `calibration` and what else a report shows of it; no
        part of what the model is, so neither in `to_parts` nor in the fingerprint.
    """

    branches: list[Branch]
    input_columns: int | None = None
    preparation: Preparation = field(default_factory=Preparation)
    density: Density | None = None
    constant: float = 0.0
    link: str = "identity"
    slope: float = 1.0
    offset: float = 0.0
    threshold: float | None = None
    unit: str = "similarity"
    calibration: Isotonic | None = None
    description: dict[str, Any] = field(default_factory=dict)
    tables: IdTables | None = None
    record: dict[str, Any] = field(default_factory=dict, compare=False)
    _reference: np.ndarray | None = field(default=None, init=False, repr=False, compare=False)

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
        self._check_links()
        self.preparation.check(columns)
        if self.calibration is not None:
            self.calibration.check()
        if self.tables is not None:
            self.tables.check(columns)
        if self.density is not None:
            self.density.check(columns)
            if self.network is not None:
                raise ArgumentError(f"the head {self.heads[0]} has no bias that density could be")
            if self.density.learned and self.asymmetric:
                raise ArgumentError("an asymmetric model has no one tower to measure density in")

    def _check_links(self) -> None:
        """Refuse a sum of heads one of which has a link of its own."""
        for branch in self.branches:
            link = find_head(branch.head).link
            if link != "identity" and self.link != link:
                raise ArgumentError(
                    f"the head {branch.head} needs the link {link}, not {self.link}"
                )
            if branch.stands_alone and len(self.branches) > 1:
                raise ArgumentError(f"the head {branch.head} stands alone, here are {self.heads}")

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the branches' heads, in order."""
        return tuple(branch.head for branch in self.branches)

    @property
    def network(self) -> Network | None:
        """The layers that take the place of a sum over columns, or None."""
        return self.branches[0].network

    @property
    def asymmetric(self) -> bool:
        """Whether left and right entities have different towers."""
        return any(branch.right_tower is not None for branch in self.branches)

    @property
    def is_distance(self) -> bool:
        """Whether every head is minus a distance between tower outputs."""
        return all(find_head(name).kind == "distance" for name in self.heads)

    def check_side(self, side: str) -> None:
        """Refuse a side that the model cannot fold: asymmetric ones fold "left" and "right"."""
        if side not in SIDES:
            raise ArgumentError(f"side is {side!r}, expected one of {', '.join(SIDES)}")
        if self.asymmetric and side == "both":
            raise ArgumentError(
                "this model is asymmetric: project left and right entities apart, with --side left "
                "and --side right"
            )
        if not self.asymmetric and side != "both":
            raise ArgumentError(
                f"side is {side!r} but this model is symmetric: one table serves both sides"
            )

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
        return self.preparation(rows)

    def _density_bias(self, prepared: np.ndarray) -> np.ndarray | None:
        """Return what density adds to each entity (N,), or None where the model has none."""
        if self.density is None:
            return None
        tower = self.branches[0].tower if self.density.learned else None
        if self._reference is None:
            with one_blas_thread():  # the same bits on every machine's threads
                reference = self.density.reference
                self._reference = _density_space(reference, self.preparation, tower)
        space = unit_rows(prepared if tower is None else tower.forward(prepared)[0])[0]
        means = nearest_means(space, self._reference)
        return self.density.standardised(means) @ self.density.weights

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
        for rows in (left, right):
            bias = self._density_bias(rows)
            raw = raw if bias is None else raw + bias
        return self.offset + self.slope * apply_link(raw, self.link)

    def probability(self, scores: np.ndarray) -> np.ndarray:
        """Return the probabilities (M,) float64 that pairs with these scores are good.

        Raises
        ------
        ArgumentError : scores are neither log-odds nor calibrated otherwise.
        """
        return probabilities(scores, self.unit, self.calibration)

    def fold(self, embeddings: np.ndarray, side: str = "both") -> Folded:
        """Fold a block of embeddings (N, n) into columns, branch by branch, and one bias.

        Parameters
        ----------
        embeddings : (N, n) finite float.
        side : "both"; "left" or "right" in asymmetric models.
        """
        self.check_side(side)
        rows = self.prepare(embeddings)
        segments: list[Columns] = []
        bias = self._density_bias(rows)
        for branch in self.branches:
            folded = branch.fold(rows, side)
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
        density = self.density
        if density is not None:
            density = replace(density, weights=density.weights * (slope * self.slope))
        return replace(
            self,
            branches=[branch.scaled(slope * self.slope) for branch in self.branches],
            density=density,
            constant=offset + slope * (self.offset + self.slope * self.constant),
            slope=1.0,
            offset=0.0,
            **changes,
        )

    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) over everything in the model: equal only for equal models."""
        config, arrays = self.to_parts()
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        if self.tables is not None:
            digest.update(self.tables.digest())
        for name in sorted(arrays):
            value = np.ascontiguousarray(arrays[name], "<f8")
            digest.update(f"{name}{value.shape}".encode())
            digest.update(value.tobytes())
        return digest.hexdigest()

    def to_parts(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Take the model apart into what JSON can hold and arrays by name."""
        names = ("input_columns", "constant", "link", "slope", "offset", "threshold", "unit")
        config = {name: getattr(self, name) for name in (*names, "description")}
        config["branches"] = []
        config["preparation"] = {"unit_rows": self.preparation.unit_rows}
        arrays = _prefixed("preparation_", self.preparation.arrays)
        for number, branch in enumerate(self.branches):
            part, own = branch.to_parts()
            config["branches"].append(part)
            arrays.update(_prefixed(f"branch_{number}_", own))
        if self.density is not None:
            config["density"] = {"learned": self.density.learned}
            arrays.update(_prefixed("density_", self.density.arrays))
        if self.calibration is not None:
            arrays["calibration_scores"] = self.calibration.scores
            arrays["calibration_probabilities"] = self.calibration.probabilities
        return config, arrays

    @classmethod
    def from_parts(cls, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> Model:
        """Put a model together from what `to_parts` gave.

        Raises
        ------
        FileError : anything unsound; as `MissingHeadError`, a head of a user's own that is not yet
            imported.
        """
        try:
            fields, arrays = _upgraded(config, arrays)
            groups = {
                name: _group(f"{name}_", arrays)
                for name in ("preparation", "density", "calibration")
            }
            branches = [
                Branch.from_parts(part, _group(f"branch_{number}_", arrays))
                for number, part in enumerate(fields.pop("branches"))
            ]
            preparation: dict[str, Any] = {**fields.pop("preparation"), **groups["preparation"]}
            if "density" in fields:
                density: dict[str, Any] = {**fields["density"], **groups["density"]}
                density["reference"] = density["reference"].astype(np.float32)
                fields["density"] = Density(**density)
            if groups["calibration"]:
                fields["calibration"] = Isotonic(**groups["calibration"])
            return cls(branches, preparation=Preparation(**preparation), **fields)
        except MissingHeadError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, FastpairError) as error:
            raise FileError(
                f"this is not a model that this version can use ({error}): train it again"
            ) from error


def _group(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays whose names begin so, by the rest of their names, in float64."""
    return {
        name[len(prefix) :]: np.array(value, np.float64)
        for name, value in arrays.items()
        if name.startswith(prefix)
    }


def _upgraded(
    config: dict[str, Any], arrays: dict[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the parts of a model as `Model.to_parts` gives them now.

    The first models had `unit_rows` in place of a preparation, and no towers but projections.
    """
    fields = dict(config)
    if "preparation" in fields:
        return fields, arrays
    fields["preparation"] = {"unit_rows": fields.pop("unit_rows")}
    branches = []
    for part in fields["branches"]:
        projected = "projection" in part["arrays"]
        weights = [name for name in part["arrays"] if name != "projection"]
        tower = {"kind": "linear" if projected else "identity", "normalise": False}
        branches.append({"head": part["head"], "weights": weights, "tower": tower})
    fields["branches"] = branches
    renamed = {name.replace("_projection", f"_{TOWER}projection"): v for name, v in arrays.items()}
    return fields, renamed


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
