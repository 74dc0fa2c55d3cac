"""Arms: the settings that training tries, what they learn from, and where each starts."""

from __future__ import annotations

import copy
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from fastpair.errors import ArgumentError, DataError
from fastpair.heads import find_head, parse_heads, unit_rows
from fastpair.learner import Entities, Learner, Pairs, Rates, RawScore, Rows, blocks
from fastpair.model import (
    FEWEST_REFERENCE_ROWS,
    FOLDED_TOGETHER,
    MOST_REFERENCE_ROWS,
    NEAREST,
    PREPARATIONS,
    Branch,
    Density,
    fit_preparation,
    nearest_means,
)
from fastpair.objectives import SPREAD, find_losses
from fastpair.towers import STARTS, Tower, parse_tower, principal_directions, start_tower
from fastpair.transitivity import Triples

FEWEST_STEPS = 150
"""With few pairs there are more epochs than an arm says, up to about this many batches."""

MOST_STEPS = 20_000
"""With very many pairs there are fewer epochs, down to one, so that an arm takes minutes."""

MANY_PAIRS = 20_000
"""Above this, a third of an arm's epochs is enough, yet at least 4."""

ROWS_LOOKED_AT = 50_000
"""A preparation and the unlabelled PCA are fitted to so many random rows where there are more."""


@dataclass(frozen=True)
class Arm:
    """Settings of one attempt.

    Parameters
    ----------
    name : what the comparison calls it.
    head : names of `fastpair.heads.HEADS` joined by "+", each over a tower of its own.
    tower : the towers, see `fastpair.towers.parse_tower`.
    dim, start : see `fastpair.towers.start_tower`.
    loss : see `fastpair.objectives.find_losses`.
    preparation : a name of `fastpair.model.PREPARATIONS`.
    density : whether the density of entities takes part in learning.
    dropout : share of the numbers of each input row that a step does not see.
    learning_rate : Adam's rate for towers at its height, for 384 columns; for others times the
        root of 384 / columns, so that a step moves a tower's output by about the same.
    pace : weights that heads have for each column move 5 * pace times as fast as towers.
    pull : see `fastpair.learner.Rates`.
    epochs : passes over the pairs.
    epochs_as_given : whether there are so many passes whatever the number of pairs.
    """

    name: str
    head: str = "cosine+absdiff"
    tower: str = "linear"
    dim: int | None = None
    start: str | None = None
    loss: str = "cross-entropy+ranking"
    preparation: str = "half-whitening"
    density: bool = True
    dropout: float = 0.0
    learning_rate: float = 2e-3
    pace: float = 2.0
    pull: float = 30.0
    epochs: int = 8
    epochs_as_given: bool = False


ARMS = {
    "A": Arm("A"),
    "B": Arm("B", dropout=0.3, learning_rate=1e-3, pace=1.0, pull=0.0, epochs=14),
    "D": Arm(
        "D",
        loss="ranking:2",
        preparation="none",
        density=False,
        learning_rate=5e-4,
        pace=1.0,
        pull=0.0,
    ),
}
"""What is tried by default, by name."""

_NO_OPTIONS = ("name", "pace", "epochs_as_given")
OPTIONS = tuple(field.name for field in fields(Arm) if field.name not in _NO_OPTIONS)
"""Settings of an arm that `train` takes; each replaces that setting in every arm."""


MAY_BE_0 = ("pull", "reflexive", "transitive", "consistency")
"""Numbers that may be 0 where others must be above it."""


def choose_arms(names: str | None, options: dict[str, Any], columns: int) -> list[Arm]:
    """Return the arms that are tried, with the settings of the user in them."""
    unknown = set(options) - set(OPTIONS)
    if unknown:
        raise TypeError(f"train() got an unexpected setting {min(unknown)!r}")
    given = {name: value for name, value in options.items() if value is not None}
    listed = list(ARMS) if names is None else [name.strip() for name in names.split(",")]
    for name in listed:
        if name not in ARMS:
            raise ArgumentError(f"there is no arm {name!r}: choose from {', '.join(ARMS)}")
    chosen = [ARMS[name] for name in dict.fromkeys(listed)]
    if "epochs" in given:
        given["epochs_as_given"] = True
    rate = given.pop("learning_rate", None)
    if rate is not None:  # as Adam takes it, whatever the number of columns
        check_numbers(learning_rate=rate)
        given["learning_rate"] = rate / (384 / columns) ** 0.5
    arms: list[Arm] = []
    for arm in (replace(arm, **given) for arm in chosen):
        _check_arm(arm, columns)
        _check_effect(arm, given)
        if parse_heads(arm.head)[0].stands_alone:
            arm = replace(arm, density=False)  # it would be added within the link or the network
        if all(replace(arm, name=other.name) != other for other in arms):
            arms.append(arm)
    return arms


def check_numbers(**numbers: float) -> None:
    """Refuse settings that are not numbers above 0; some may be 0."""
    for name, value in numbers.items():
        least = (
            0 if name in ("pull", "reflexive", "transitive", "consistency") else np.nextafter(0, 1)
        )
        if not least <= value < np.inf:
            raise ArgumentError(f"{name} is {value}, expected a number above 0")


def _check_arm(arm: Arm, columns: int) -> None:
    parse_heads(arm.head)
    find_losses(arm.loss)
    check_numbers(epochs=arm.epochs, pull=arm.pull)
    if not 0 <= arm.dropout < 1:
        raise ArgumentError(f"dropout is {arm.dropout}, expected a share from 0 to below 1")
    _check_dim(arm, columns)
    for name, value, known in (
        ("preparation", arm.preparation, PREPARATIONS),
        ("start", arm.start, (None, *STARTS)),
    ):
        if value not in known:
            choices = ", ".join(str(choice) for choice in known if choice)
            raise ArgumentError(f"{name} is {value!r}, expected one of {choices}")


def _check_dim(arm: Arm, columns: int) -> None:
    kind, settings = parse_tower(arm.tower)
    dim = columns if arm.dim is None else arm.dim
    if dim < 1:
        raise ArgumentError(f"dim is {dim}, expected 1 or more columns")
    if dim != columns and (kind == "identity" or settings.get("residual")):
        kept = "a residual tower" if settings.get("residual") else "an identity tower"
        raise ArgumentError(f"dim is {dim} but {kept} keeps all {columns} columns")
    if arm.start == "pca" and dim > columns:
        raise ArgumentError(f"dim is {dim} but there are only {columns} principal directions")


def _check_effect(arm: Arm, given: dict[str, Any]) -> None:
    """Refuse settings of the user that change nothing in this arm."""
    kind, _ = parse_tower(arm.tower)
    for name in ("start", "pull"):
        if name in given and kind != "linear":
            raise ArgumentError(
                f"{name} is for the projection of a linear tower: the tower {kind} has none"
            )
    if given.get("density") and parse_heads(arm.head)[0].stands_alone:
        raise ArgumentError(f"density is not for the head {arm.head}, to which nothing is added")


def learns_a_metric(arms: list[Arm]) -> bool:
    """Whether all arms learn a metric whatever their weights."""
    return all(parse_heads(arm.head)[0].name == "mahalanobis" for arm in arms)


def check_symmetry(arm: Arm, *, asymmetric: bool, reflexive: float) -> None:
    """Refuse what tells left from right, or others from oneself, where the arm cannot."""
    kind, _ = parse_tower(arm.tower)
    if asymmetric and kind == "identity":
        raise ArgumentError(
            "asymmetric learns a tower for either side, of which the tower identity has nothing to "
            "learn: choose linear or mlp"
        )
    head = parse_heads(arm.head)[0]
    if reflexive > 0 and head.reflexive == "always" and not asymmetric:
        raise ArgumentError(
            f"reflexive is {reflexive:g} but nothing scores higher than oneself with the head "
            f"{head.name}: leave it away"
        )


class Task:
    """What every arm learns from: rows of the pairs, prepared in one way or another.

    Parameters
    ----------
    embeddings : (N, n) float.
    given, held : pairs to learn from and validation pairs.
    settings : those of `fastpair.training.train` that are not settings of an arm.
    pool : threads to learn in; None: only this one.
    """

    def __init__(
        self,
        embeddings: np.ndarray,
        given: Pairs,
        held: Pairs,
        settings: dict[str, Any],
        pool: ThreadPoolExecutor | None = None,
    ):
        self.embeddings, self.settings, self.pool = embeddings, settings, pool
        self.graded: bool = settings["graded"]
        sides = (given.left, given.right, held.left, held.right)
        mask = np.zeros(len(embeddings), bool)
        for side in sides:
            mask[side] = True
        self.used = np.flatnonzero(mask)
        self.plain_held = held
        renumbered = [np.searchsorted(self.used, side).astype(side.dtype) for side in sides]
        self.given = replace(given, left=renumbered[0], right=renumbered[1])
        self.held = replace(held, left=renumbered[2], right=renumbered[3])
        self.triples = Triples(self.given) if settings["transitive"] > 0 else None
        rng = np.random.default_rng([settings["seed"], 1])
        self.sample = sample_rows(embeddings, ROWS_LOOKED_AT, rng)
        self.reference = np.array(sample_rows(embeddings, MOST_REFERENCE_ROWS, rng), np.float32)
        _check_finite(embeddings, self.used)
        self._prepared: dict[str, Rows] = {}
        self._densities: dict[str, tuple[Density, np.ndarray] | None] = {}

    def rows(self, preparation: str) -> Rows:
        """Return the rows of the pairs under a preparation; only the last one asked for is kept."""
        if preparation not in self._prepared:
            fitted = fit_preparation(self.sample, preparation)
            self._prepared = {preparation: Rows(self.embeddings, self.used, fitted)}
        return self._prepared[preparation]

    def density(self, preparation: str) -> tuple[Density, np.ndarray] | None:
        """Return the density among prepared rows, and its standardised values (U, 3) float32."""
        if preparation not in self._densities:
            self._densities[preparation] = self.measured_density(self.rows(preparation), None)
        return self._densities[preparation]

    def measured_density(
        self, rows: Rows, tower: Tower | None
    ) -> tuple[Density, np.ndarray] | None:
        """Measure density among prepared rows or the outputs of a tower; weights are 0."""
        if len(self.reference) < FEWEST_REFERENCE_ROWS:
            return None

        def space(prepared: np.ndarray) -> np.ndarray:
            prepared = prepared.astype(np.float32)
            return unit_rows(prepared if tower is None else tower.forward(prepared)[0])[0]

        reference = space(rows.preparation(self.reference))

        def measured(block: slice) -> np.ndarray:
            return nearest_means(space(rows[np.arange(block.start, block.stop)]), reference)

        each = map if self.pool is None else self.pool.map
        means = np.concatenate(list(each(measured, blocks(len(rows), FOLDED_TOGETHER))))
        spread = means.std(axis=0)
        std = np.where(spread > 0, spread, 1.0)
        density = Density(
            self.reference, means.mean(axis=0), std, np.zeros(len(NEAREST)), tower is not None
        )
        return density, density.standardised(means).astype(np.float32)

    def fingerprint(self, arms: list[Arm]) -> dict[str, str]:
        """Return what must be the same for a training to be continued."""

        def digest(*arrays: np.ndarray) -> str:
            found = hashlib.sha256()
            for array in arrays:
                found.update(np.ascontiguousarray(array).data)
            return found.hexdigest()[:16]

        weights = self.given.weights
        given = (self.given.left, self.given.right, self.given.labels)
        return {
            "options": json.dumps([self.settings, [asdict(arm) for arm in arms]], sort_keys=True),
            "embeddings": f"{self.embeddings.shape} {digest(self.reference)}",
            "pairs": digest(*given, *([] if weights is None else [weights])),
            "validation pairs": digest(self.held.left, self.held.right, self.held.labels),
        }


def sample_rows(embeddings: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return up to `count` random rows, all of them finite."""
    if len(embeddings) <= count:
        chosen = np.arange(len(embeddings))
    else:
        chosen = np.sort(rng.choice(len(embeddings), count, replace=False))
    _check_finite(embeddings, chosen)
    return embeddings[chosen]


def _check_finite(embeddings: np.ndarray, numbers: np.ndarray) -> None:
    for block in blocks(len(numbers), 1 << 14):
        finite = np.isfinite(embeddings[numbers[block]]).all(axis=1)
        if not finite.all():
            row = numbers[block][np.argmin(finite)]
            raise DataError(f"row {row} of the embeddings holds NaN or infinity")


def start_learner(arm: Arm, task: Task, rng: np.random.Generator) -> Learner:
    """Return an arm's learner at its start.

    Raw scores then have the mean and the spread of ``5 cosine - 2.5``, whatever the first head.
    """
    rows = task.rows(arm.preparation)
    columns = rows.shape[1]
    dim = arm.dim or columns
    kind, settings = parse_tower(arm.tower)
    settings = {"residual": kind == "mlp" and dim == columns, **settings}
    looked_at = rows[np.sort(rng.permutation(len(rows))[: 1 << 14])]

    def tower() -> Tower:
        return start_tower(kind, looked_at, arm.dim, start=arm.start, rng=rng, **settings)

    branches: list[Branch] = []
    for head in parse_heads(arm.head):
        first = tower()
        weights = {k: v.astype(np.float32) for k, v in head.initial(dim, rng).items()}
        if head.name == "bilinear" and "factor" in weights:  # of low rank
            rank = len(weights["factor"])
            directions = principal_directions(first.forward(looked_at)[0], rank)
            weights["factor"] += (directions - np.eye(rank, dim)).astype(np.float32)
        if branches:
            weights = head.scaled(weights, 0.0)
        right = copy.deepcopy(first) if task.settings["asymmetric"] else None
        branches.append(Branch(head.name, weights, first, right))
    some = task.given[np.sort(rng.permutation(len(task.given))[:4096])]
    density = task.density(arm.preparation) if arm.density else None
    score_link = find_head(branches[0].head).link
    score = RawScore(
        branches,
        np.zeros(1, np.float32),
        None if density is None else np.zeros(len(NEAREST), np.float32),
        np.ones(1, np.float32) if score_link != "identity" else None,
        pool=task.pool,
    )
    _scale_start(score, rows[some.left], rows[some.right])
    rate = arm.learning_rate * (384 / columns) ** 0.5
    return Learner(
        score,
        rows,
        task.given,
        find_losses(arm.loss),
        Rates(rate, 5 * rate * arm.pace, arm.pull),
        density=None if density is None else density[1],
        dropout=arm.dropout,
        reflexive=task.settings["reflexive"],
        transitive=task.settings["transitive"],
        triples=task.triples,
        consistency=task.settings["consistency"],
        anchored="triplet" in arm.loss,
    )


def _scale_start(score: RawScore, left: np.ndarray, right: np.ndarray) -> None:
    """Give the raw scores of these pairs the mean and spread of ``SPREAD (cosine - 1/2)``."""
    cosine = np.einsum("ij,ij->i", unit_rows(left)[0], unit_rows(right)[0])
    numbers = np.arange(2 * len(left))
    entities = Entities(np.concatenate([left, right]), *np.split(numbers, 2))
    raw = score.forward(entities)[0]
    spread = float(raw.std())
    factor = SPREAD * float(cosine.std()) / spread if spread > 1e-9 else 1.0
    turned = find_head(score.branches[0].head).reflexive != "always"
    if turned and score.slope is None and float((cosine - cosine.mean()) @ (raw - raw.mean())) < 0:
        factor = -factor  # max and their like begin as dissimilarities
    if score.slope is not None:
        score.slope *= np.float32(factor)
    else:
        score.branches[0] = score.branches[0].scaled(factor)
    centre = SPREAD * (float(cosine.mean()) - 0.5)
    score.constant += np.float32(centre - factor * float(raw.mean()))


def epochs_of(arm: Arm, pairs: int, batch: int) -> int:
    """Return how many times an arm goes through its pairs, in batches of `batch`."""
    if arm.epochs_as_given:
        return arm.epochs
    batches = -(-pairs // batch)
    epochs = arm.epochs if pairs <= MANY_PAIRS else max(4, arm.epochs // 3)
    fewest, most = min(-(-FEWEST_STEPS // batches), 100), max(MOST_STEPS // batches, 1)
    return min(max(epochs, fewest), most)
