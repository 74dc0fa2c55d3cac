"""Training: from embeddings and labelled pairs to a calibrated model, in NumPy.

Every branch has its own linear projection. The first branch starts as its plain similarity over
the embeddings, the others at weight zero, so training starts at what the embeddings already know.
Mini-batches are learned by Adam under a half-cosine rate. The epoch that ranks the validation
pairs best is calibrated on them, and kept only if it ranks them at least as well as raw cosine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fastpair.errors import ArgumentError, DataError
from fastpair.evaluation import best_threshold, evaluate_scores, raw_cosine
from fastpair.heads import find_head, unit_rows
from fastpair.model import Branch, Model, builtin

Loss = Callable[[np.ndarray, np.ndarray], tuple[float, np.ndarray]]
Key = tuple[int, str]  # number of the branch and name of a parameter of it

DEFAULT_HEAD = "cosine+absdiff"
DEFAULT_LOSS = "cross-entropy+ranking"

FEWEST_PAIRS = 30
"""Below this, only threshold and calibration of the raw cosine are fitted."""

LEARNING_RATE = 0.04
"""Adam's rate for projections at its height is this over the root of the embeddings' columns: a
step then moves a tower output by about the same, however many columns there are."""

PACE = 5.0
"""How many times faster than projections the heads' own weights and the constant move."""

STEPS = 1000
"""Batches to learn from, about, when no number of epochs is given."""

PATIENCE = 10
"""Learning stops early after this many epochs, or a quarter of all where that is more, without a
better ranking of the validation pairs."""

PULL = 1.0
"""Each step draws projections back to their start by rate * PULL of the way (L2-SP)."""

START_SCALE = 5.0
"""What the first branch is multiplied with at the start, and twice minus the constant."""

VALIDATION_SHARE = 0.15
"""Share of the pairs that is set aside when no validation pairs are given."""


@dataclass(frozen=True)
class Pairs:
    """Labelled pairs of rows.

    Parameters
    ----------
    left, right : (M,) int64 row numbers.
    labels : (M,) float64: 0 for bad, 1 for good; or grades.
    """

    left: np.ndarray
    right: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: np.ndarray | slice) -> Pairs:
        return Pairs(self.left[chosen], self.right[chosen], self.labels[chosen])


@dataclass(frozen=True)
class TrainingResult:
    """What training produced.

    Parameters
    ----------
    model : the calibrated model.
    history : one entry an epoch: epoch, epochs, loss, and the validation metric by its name.
    notes : sentences for the user about what was assumed or decided.
    validation : how the model ranks the validation pairs, by the metric's name; empty without any.
    """

    model: Model
    history: list[dict[str, Any]]
    notes: list[str]
    validation: dict[str, float] = field(default_factory=dict)


def train(
    embeddings: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    labels: np.ndarray,
    *,
    valid: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    head: str = DEFAULT_HEAD,
    dim: int | None = None,
    loss: str = DEFAULT_LOSS,
    graded: bool = False,
    epochs: int | None = None,
    batch: int = 256,
    learning_rate: float | None = None,
    seed: int = 0,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> TrainingResult:
    """Learn a similarity from labelled pairs of embeddings.

    Parameters
    ----------
    embeddings : (N, n) float; rows are brought to unit length first.
    left, right : (M,) integer row numbers.
    labels : (M,) float, 0 (bad) or 1 (good); any finite numbers with `graded`.
    valid : left, right and labels of validation pairs; default: some of the pairs are set aside.
    head : names of `fastpair.heads.HEADS` joined by "+", each over its own projection.
    dim : columns of a projection; default: as many as the embeddings have. Then the projection
        starts as the identity, with fewer columns as the leading principal directions.
    loss : names of `LOSSES` joined by "+".
    graded : learn the grade itself; scores are then predicted grades, without a threshold.
    epochs : passes over the pairs; default: the fewer the more pairs there are.
    batch : pairs in a step.
    learning_rate : Adam's rate for projections at its height; default: see `LEARNING_RATE`.
    seed : of everything random; with the same number of threads, equal seeds give equal models.
    on_epoch : called with each entry of the history as it is made.

    Raises
    ------
    ArgumentError : an option has a value that cannot be used.
    DataError : the pairs or the embeddings cannot be learned from.
    """
    from threadpoolctl import threadpool_limits

    heads = [find_head(name.strip()).name for name in head.split("+")]
    losses = [_find_loss(name.strip()) for name in loss.split("+")]
    if embeddings.ndim != 2 or embeddings.shape[1] == 0:
        raise ArgumentError(f"embeddings have shape {embeddings.shape}, expected (rows, columns)")
    columns = embeddings.shape[1]
    for name, value in (("epochs", epochs), ("batch", batch), ("learning_rate", learning_rate)):
        if value is not None and not value > 0:
            raise ArgumentError(f"{name} is {value}, expected a number above 0")
    if dim is not None and not 1 <= dim <= columns:
        raise ArgumentError(f"dim is {dim}, expected 1 to {columns}, the embeddings' columns")
    given = _checked_pairs(embeddings, (left, right, labels), graded, "pairs")
    held = None if valid is None else _checked_pairs(embeddings, valid, graded, "validation pairs")
    if len(given) < FEWEST_PAIRS:
        return _cosine_alone(embeddings, given, held, graded, "are too few to learn from")
    rng = np.random.default_rng(seed)
    split = split_pairs(given, rng) if held is None else (given, held, "given apart")
    if split is None:
        why = "have too few of one kind to set validation pairs aside"
        return _cosine_alone(embeddings, given, held, graded, why)
    given, held, origin = split

    settings: dict[str, Any] = {
        "head": head,
        "loss": loss,
        "dim": dim or columns,
        "epochs": epochs or int(np.clip(STEPS // -(-len(given) // batch), 4, 100)),
        "batch": batch,
        "learning_rate": learning_rate or LEARNING_RATE / columns**0.5,
        "seed": seed,
    }
    rows, given_rows, held_rows = _unit_rows_in_use(embeddings, given, held)
    learner = _Learner(_start(heads, settings["dim"], rows, rng), rows, given_rows, losses)
    # On small matrices threads gain nothing and, on a busy machine, lose much by waiting.
    with threadpool_limits(1 if columns <= 128 else None):
        branches, constant, history = _learn(learner, held_rows, graded, settings, rng, on_epoch)
    description = {**settings, "graded": graded, "pairs": len(given), "validation_pairs": len(held)}
    model = Model(branches, columns, unit_rows=True, constant=constant, description=description)
    return _finish(embeddings, model, held, origin, graded, history)


def _checked_pairs(
    embeddings: np.ndarray,
    pairs: tuple[np.ndarray, np.ndarray, np.ndarray],
    graded: bool,
    name: str,
) -> Pairs:
    """Refuse pairs that cannot be learned from; `name` says in messages which ones they are."""
    sides = [np.asarray(side) for side in pairs[:2]]
    labels = np.asarray(pairs[2], np.float64)
    if len({array.shape for array in (*sides, labels)}) > 1 or labels.ndim != 1:
        raise ArgumentError(f"left, right and labels of the {name} do not have the same length")
    if not len(labels):
        raise DataError(f"there are no {name} to learn from")
    for side in sides:
        if side.dtype.kind not in "iu":
            raise ArgumentError(f"row numbers of the {name} are {side.dtype}, expected integers")
        if side.min() < 0 or side.max() >= len(embeddings):
            wrong = side.min() if side.min() < 0 else side.max()
            raise DataError(
                f"row {wrong} in the {name} is not one of the {len(embeddings)} embeddings"
            )
    wrong_labels = ~np.isfinite(labels) if graded else (labels != 0) & (labels != 1)
    if wrong_labels.any():
        first = int(np.argmax(wrong_labels))
        expected = "a finite grade" if graded else "0 (bad) or 1 (good): for grades, say graded"
        raise DataError(f"label {labels[first]:g} came in the {name}, expected {expected}")
    if np.ptp(labels) == 0:
        kind = f"of grade {labels[0]:g}" if graded else ("good" if labels[0] else "bad")
        raise DataError(
            f"all {len(labels)} {name} are {kind}: a similarity is learned from both good and bad"
        )
    return Pairs(sides[0].astype(np.int64), sides[1].astype(np.int64), labels)


def split_pairs(pairs: Pairs, rng: np.random.Generator) -> tuple[Pairs, Pairs, str] | None:
    """Set validation pairs aside, by entity where the graph of pairs allows it, else by pair.

    Parameters
    ----------
    pairs : all pairs.
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
    small = np.flatnonzero(sizes <= max(0.2 * len(group), 1))
    for _ in range(20):
        order = rng.permutation(small)
        enough = np.searchsorted(np.cumsum(sizes[order]), VALIDATION_SHARE * len(group)) + 1
        taken = np.zeros(len(sizes), bool)
        taken[order[:enough]] = True
        chosen = taken[group]
        if chosen.mean() >= 0.1 and min(np.ptp(labels[chosen]), np.ptp(labels[~chosen])) > 0:
            return chosen
    return None


def cross_entropy(raw: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
    """Compute the mean of ``log(1 + exp(raw)) - target * raw`` and its gradient by raw.

    Parameters
    ----------
    raw : (M,) log-odds.
    target : (M,) from 0 to 1.
    """
    value = np.mean(np.logaddexp(0, raw) - target * raw)
    return float(value), (_sigmoid(raw) - target) / len(raw)


def ranking(raw: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
    """Compute the mean of ``log(1 + exp(raw_q - raw_p))`` over all p, q with target p > target q.

    Parameters
    ----------
    raw : (M,) log-odds.
    target : (M,) from 0 to 1.
    """
    better, worse = np.flatnonzero(target > target.min()), np.flatnonzero(target < target.max())
    ordered = target[better][:, None] > target[worse]
    count = max(np.count_nonzero(ordered), 1)
    behind = raw[worse] - raw[better][:, None]
    value = np.sum(np.logaddexp(0, behind), where=ordered) / count
    slope = np.where(ordered, _sigmoid(behind), 0) / count
    gradient = np.zeros_like(raw)
    gradient[worse] += slope.sum(axis=0)
    gradient[better] -= slope.sum(axis=1)
    return float(value), gradient


LOSSES: dict[str, Loss] = {"cross-entropy": cross_entropy, "ranking": ranking}
"""Losses by name: (raw, target) -> (mean, gradient by raw)."""


def _find_loss(name: str) -> Loss:
    if name not in LOSSES:
        raise ArgumentError(f"there is no loss {name!r}: choose from {', '.join(LOSSES)}")
    return LOSSES[name]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * x)  # never overflows


def batch_gradients(
    branches: list[Branch],
    constant: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    target: np.ndarray,
    losses: list[Loss],
) -> tuple[float, dict[Key, np.ndarray]]:
    """Compute the sum of the losses over a batch and its gradient by every parameter.

    Parameters
    ----------
    branches, constant : the raw score; the constant has shape (1,).
    left, right : (M, n) prepared rows.
    target : (M,) from 0 to 1.
    losses : values of `LOSSES`.

    Returns
    -------
    The loss, and gradients by (number of the branch, name), (-1, "constant") for the constant.
    """
    parts = [branch.forward(left, right) for branch in branches]
    raw = constant + sum(part[0] for part in parts)
    value, upstream = 0.0, np.zeros_like(raw)
    for loss in losses:
        one, slope = loss(raw, target)
        value += one
        upstream += slope
    gradients: dict[Key, np.ndarray] = {(-1, "constant"): upstream.sum(keepdims=True)}
    for number, (branch, (_, cache)) in enumerate(zip(branches, parts, strict=True)):
        for name, gradient in branch.backward(upstream, cache).items():
            gradients[number, name] = gradient
    return value, gradients


def _unit_rows_in_use(
    embeddings: np.ndarray, given: Pairs, held: Pairs
) -> tuple[np.ndarray, Pairs, Pairs]:
    """Bring the rows that occur in pairs to unit length, float32, and renumber the pairs."""
    sides = (given.left, given.right, held.left, held.right)
    used, numbers = np.unique(np.concatenate(sides), return_inverse=True)
    rows = np.asarray(embeddings[used], np.float64)
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise DataError(f"row {used[np.argmin(finite)]} of the embeddings holds NaN or infinity")
    parts = np.split(numbers, np.cumsum([len(side) for side in sides])[:-1])
    return (
        unit_rows(rows)[0].astype(np.float32),
        Pairs(parts[0], parts[1], given.labels),
        Pairs(parts[2], parts[3], held.labels),
    )


def _start(heads: list[str], dim: int, rows: np.ndarray, rng: np.random.Generator) -> list[Branch]:
    """Make the branches at their start: the first as it is, the others at weight zero."""
    columns = rows.shape[1]
    projection = np.eye(columns, dtype=np.float32)
    if dim < columns:
        # Directions of the second moment, not centred: they keep the cosine best.
        _, vectors = np.linalg.eigh(rows.T @ rows)
        projection = np.ascontiguousarray(vectors[:, ::-1][:, :dim].T, np.float32)
    branches: list[Branch] = []
    for name in heads:
        head = find_head(name)
        weights = {k: v.astype(np.float32) for k, v in head.initial(dim, rng).items()}
        weights = head.scaled(weights, 0.0 if branches else START_SCALE)
        branches.append(Branch(name, weights, projection.copy()))
    return branches


class _Learner:
    """The branches while they are learned, in place and in float32, and the state of Adam."""

    def __init__(self, branches: list[Branch], rows: np.ndarray, pairs: Pairs, losses: list[Loss]):
        self.branches, self.rows, self.pairs, self.losses = branches, rows, pairs, losses
        low = pairs.labels.min()
        self.targets = ((pairs.labels - low) / np.ptp(pairs.labels)).astype(np.float32)
        self.constant = np.full(1, -START_SCALE / 2, np.float32)
        self.parameters: dict[Key, np.ndarray] = {(-1, "constant"): self.constant}
        for number, branch in enumerate(branches):
            for name, value in branch.parameters.items():
                self.parameters[number, name] = value
        self.start = {key: value.copy() for key, value in self.parameters.items()}
        self.mean = {key: np.zeros_like(value) for key, value in self.parameters.items()}
        self.square = {key: np.zeros_like(value) for key, value in self.parameters.items()}
        self.steps = 0

    def epochs(
        self, epochs: int, batch: int, rate: float, rng: np.random.Generator
    ) -> Iterator[float]:
        """Learn for a number of epochs; give the mean loss of each."""
        total = epochs * -(-len(self.pairs) // batch)
        for _ in range(epochs):
            losses = []
            for chosen in self._batches(batch, rng):
                left = self.rows[self.pairs.left[chosen]]
                right = self.rows[self.pairs.right[chosen]]
                value, gradients = batch_gradients(
                    self.branches, self.constant, left, right, self.targets[chosen], self.losses
                )
                losses.append(value)
                self._step(gradients, rate * 0.5 * (1 + np.cos(np.pi * self.steps / total)))
            yield float(np.mean(losses))

    def _batches(self, batch: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Deal the shuffled pairs out so that every batch has its share of low and high labels."""
        count = -(-len(self.pairs) // batch)
        order = rng.permutation(len(self.pairs))
        order = order[np.argsort(self.targets[order], kind="stable")]
        # Neighbours in label, as many as there are batches, go to the batches in random order.
        order = order[np.argsort(np.arange(len(order)) // count + rng.random(len(order)))]
        return [order[first::count] for first in range(count)]

    def _step(self, gradients: dict[Key, np.ndarray], rate: float) -> None:
        """Take one step of Adam; projections are also drawn back towards their start."""
        self.steps += 1
        correction = np.sqrt(1 - 0.999**self.steps) / (1 - 0.9**self.steps)
        for key, gradient in gradients.items():
            value, mean, square = self.parameters[key], self.mean[key], self.square[key]
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient * gradient - square)
            step = mean / (np.sqrt(square) + 1e-8)
            if key[1] == "projection":
                value -= rate * correction * step + min(rate * PULL, 1) * (value - self.start[key])
            else:
                value -= PACE * rate * correction * step

    def scores(self, pairs: Pairs) -> np.ndarray:
        """Compute raw scores of pairs of the learner's rows, (M,) float32."""
        blocks = [slice(start, start + 4096) for start in range(0, len(pairs), 4096)]
        scores = []
        for block in blocks:
            left, right = self.rows[pairs.left[block]], self.rows[pairs.right[block]]
            scores.append(sum(branch.forward(left, right)[0] for branch in self.branches))
        return np.concatenate(scores) + self.constant

    def snapshot(self) -> tuple[list[Branch], float]:
        """Copy what was learned so far: branches and constant."""
        return [branch.as_float64() for branch in self.branches], float(self.constant[0])


def _learn(
    learner: _Learner,
    held: Pairs,
    graded: bool,
    settings: dict[str, Any],
    rng: np.random.Generator,
    on_epoch: Callable[[dict[str, Any]], None] | None,
) -> tuple[list[Branch], float, list[dict[str, Any]]]:
    """Learn until the epochs are over or `PATIENCE` is; return the best epoch and the history."""
    metric = "spearman" if graded else "average_precision"
    history: list[dict[str, Any]] = []
    best, best_epoch, kept = -np.inf, 0, learner.snapshot()
    for loss in learner.epochs(
        settings["epochs"], settings["batch"], settings["learning_rate"], rng
    ):
        epoch = len(history) + 1
        if not np.isfinite(loss):
            raise ArgumentError(
                f"learning diverged in epoch {epoch}: use a smaller learning rate than "
                f"{settings['learning_rate']:g}"
            )
        value = _rank_quality(learner.scores(held), held.labels, graded)
        history.append({"epoch": epoch, "epochs": settings["epochs"], "loss": loss, metric: value})
        if on_epoch is not None:
            on_epoch(history[-1])
        if value > best:
            best, best_epoch, kept = value, epoch, learner.snapshot()
        elif epoch - best_epoch >= max(PATIENCE, settings["epochs"] // 4):
            break
    return *kept, history


def _rank_quality(scores: np.ndarray, labels: np.ndarray, graded: bool) -> float:
    """Return what decides between epochs: average precision, Spearman's rho for grades."""
    metrics = evaluate_scores(scores, labels, graded=graded)
    value = metrics["spearman" if graded else "average_precision"]
    return -1.0 if value is None else value  # all scores the same


def _score_pairs(embeddings: np.ndarray, model: Model, pairs: Pairs) -> np.ndarray:
    scores = np.empty(len(pairs))
    for start in range(0, len(pairs), 4096):
        block = slice(start, start + 4096)
        left, right = embeddings[pairs.left[block]], embeddings[pairs.right[block]]
        scores[block] = model.score(left, right)
    return scores


def fit_log_odds(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Fit the log-odds of a good pair as ``slope * score + offset`` (Platt).

    Parameters
    ----------
    scores : (M,) float64.
    labels : (M,) 0 or 1, both present.
    """
    mean, spread = scores.mean(), scores.std() or 1.0
    x = np.stack([(scores - mean) / spread, np.ones_like(scores)])
    n_good, n_bad = labels.sum(), (1 - labels).sum()
    # Platt's targets: slightly inside 0 and 1, so that separable pairs keep finite odds.
    target = np.where(labels == 1, (n_good + 1) / (n_good + 2), 1 / (n_bad + 2))
    found = np.array([0.0, np.log(n_good / n_bad)])
    value = cross_entropy(found @ x, target)[0]
    for _ in range(100):
        probability = _sigmoid(found @ x)
        gradient = x @ (probability - target)
        curvature = (x * (probability * (1 - probability))) @ x.T + 1e-9 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        while (new := cross_entropy((found - step) @ x, target)[0]) > value and abs(step).max() > 0:
            step = step / 2
        found, gain, value = found - step, value - new, new
        if gain < 1e-12:
            break
    return float(found[0] / spread), float(found[1] - found[0] * mean / spread)


def fit_grade(scores: np.ndarray, grades: np.ndarray) -> tuple[float, float]:
    """Fit the grade as ``slope * score + offset`` by least squares."""
    centred = scores - scores.mean()
    slope = float(centred @ grades / max(centred @ centred, 1e-300))
    return slope, float(grades.mean() - slope * scores.mean())


def _cosine_alone(
    embeddings: np.ndarray, given: Pairs, held: Pairs | None, graded: bool, why: str
) -> TrainingResult:
    """Fit only calibration and threshold of the raw cosine, on all pairs that came."""
    parts = [given] if held is None else [given, held]
    sides = [np.concatenate([getattr(p, f) for p in parts]) for f in ("left", "right", "labels")]
    fitted = "calibration" if graded else "calibration and threshold"
    notes = [f"the {len(given)} pairs {why}: only {fitted} of the raw cosine were fitted"]
    description = {"head": "cosine", "learned": False, "graded": graded, "pairs": len(sides[0])}
    return _result(embeddings, _raw_cosine_model(embeddings), Pairs(*sides), description, [], notes)


def _finish(
    embeddings: np.ndarray,
    model: Model,
    held: Pairs,
    origin: str,
    graded: bool,
    history: list[dict[str, Any]],
) -> TrainingResult:
    """Keep the learned model, or raw cosine where that ranks better, and calibrate it."""
    cosine = raw_cosine(embeddings, held.left, held.right)
    learned = _score_pairs(embeddings, model, held)
    before, after = (_rank_quality(scores, held.labels, graded) for scores in (cosine, learned))
    name = "Spearman's rho" if graded else "average precision"
    notes = [
        f"{len(held)} validation pairs, {origin}",
        f"{name} on the validation pairs: raw cosine {before:.3f}, learned {after:.3f}",
    ]
    description = {**model.description, "learned": after >= before}
    if after < before:
        notes.append("learning did not help there, so the raw cosine was kept and calibrated")
        model = _raw_cosine_model(embeddings)
    result = _result(embeddings, model, held, description, history, notes)
    metric = "spearman" if graded else "average_precision"
    return replace(result, validation={metric: max(before, after)})


def _raw_cosine_model(embeddings: np.ndarray) -> Model:
    return replace(builtin("cosine"), input_columns=embeddings.shape[1])


def _result(
    embeddings: np.ndarray,
    model: Model,
    pairs: Pairs,
    description: dict[str, Any],
    history: list[dict[str, Any]],
    notes: list[str],
) -> TrainingResult:
    """Bring scores into log-odds with the threshold of the best F1, or into grades."""
    scores = _score_pairs(embeddings, model, pairs)
    graded = description["graded"]
    slope, offset = (fit_grade if graded else fit_log_odds)(scores, pairs.labels)
    if slope <= 0:
        notes.append("higher scores do not go with higher labels, so all scores come out alike")
        slope, mean = 1e-3 / max(float(scores.std()), 1e-9), float(pairs.labels.mean())
        level = mean if graded else float(np.log(mean / (1 - mean)))
        offset = level - slope * float(scores.mean())
    changes: dict[str, Any] = {"unit": "grade"}
    if not graded:
        threshold = best_threshold(offset + slope * scores, pairs.labels)
        changes = {"unit": "log-odds", "threshold": threshold}
    description = {**description, "notes": notes}
    model = model.calibrated(slope, offset, description=description, **changes)
    return TrainingResult(model, history, notes)
