"""Training of id models: from pairs of ids to the tables themselves.

Each id has a vector and a bias, learned from labels, from grades or from good pairs alone. The
epoch that does best on validation pairs is kept and its scores are calibrated, so that they mean
what those of other models mean: log-odds, or grades.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastpair.backend import one_blas_thread, thread_count
from fastpair.calibration import Calibration, calibrated
from fastpair.errors import ArgumentError, DataError
from fastpair.heads import parse_heads
from fastpair.id_heads import HEAD_RATE, start_id_learner
from fastpair.id_learners import (
    POINTWISE,
    RANKWISE,
    IdLearner,
    IdPairs,
    IdSettings,
    Learned,
)
from fastpair.learner import learning_record
from fastpair.model import Model

FEWEST_PAIRS = 30
"""Fewer pairs are refused."""

HELD_SHARE = 0.1
"""Share of the pairs that are set aside for validation where none are given."""

MOST_HELD = 200_000
"""No more pairs than this are set aside."""

PATIENCE = 5
"""Epochs without a better one after which learning ends."""

DEFAULTS = {
    "squared": IdSettings(loss="squared"),
    "cross-entropy": IdSettings(loss="cross-entropy", decay=0.03, bias_decay=0.01),
    "bpr": IdSettings(loss="bpr", rate=0.1, decay=0.01, bias_decay=0.01, negatives=4),
    "softmax": IdSettings(loss="softmax", decay=0.03, bias_decay=0.01, negatives=16),
}
"""Settings of each loss where the user says nothing."""

METRICS = {"squared": "rmse", "cross-entropy": "log_loss", "bpr": "auc", "softmax": "auc"}
"""What decides between epochs, by loss: rmse and log_loss are to be small; auc is to be large, the
share of good pairs that score above one with the same left side and a drawn right one."""

OPTIONS = ("dim", "negatives", "rate", "decay", "biases", "implicit", "batch")
"""Settings that `train_ids` takes."""

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class IdTrainingResult:
    """What training produced.

    Parameters
    ----------
    model : the calibrated model, still without its tables.
    left, right : (n, dim + 1) float32 columns of each row; right is None where there is one table.
    history : one entry an epoch: epoch, epochs, loss, the validation metric by its name, seconds,
        and how many epochs are left.
    notes : sentences for the user.
    metric, best : the name of the validation metric and its best value.
    """

    model: Model
    left: np.ndarray
    right: np.ndarray | None
    history: list[dict[str, Any]]
    notes: list[str]
    metric: str
    best: float


def train_ids(
    left: np.ndarray,
    right: np.ndarray,
    labels: np.ndarray | None,
    counts: tuple[int, int | None],
    *,
    valid: tuple[np.ndarray, np.ndarray, np.ndarray | None] | None = None,
    graded: bool = False,
    head: str = "dot",
    loss: str | None = None,
    epochs: int = 30,
    calibrate: str = "platt",
    threshold_by: str = "f1",
    prior: float | None = None,
    seed: int = 0,
    threads: int | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> IdTrainingResult:
    """Learn a vector and a bias for each row of one or two tables.

    Parameters
    ----------
    left, right : (M,) integer row numbers.
    labels : (M,) float, 0 (bad) or 1 (good); any finite numbers with `graded`; None: all good.
    counts : rows of the left and of the right table; (n, None): one table for both sides.
    valid : the same of validation pairs, -1 for rows that are not in the tables, which are left
        out; default: a tenth of the pairs is set aside.
    graded : learn the grade itself.
    head : a name of `fastpair.heads.HEADS`; default "dot", learned fastest.
    loss : "cross-entropy" or "squared" of labels; "bpr" or "softmax" of good pairs alone beside
        drawn ones (Rendle et al. 2009; sampled softmax). Default: squared for grades,
        cross-entropy for labels, softmax for good pairs alone.
    epochs : passes over the pairs, at most; learning ends early where validation pairs say so.
    calibrate, threshold_by, prior : see `fastpair.training.train`.
    seed : of everything random, 0 or more; equal seeds give equal tables, whatever the threads.
    threads : number of threads; default one for each processor.
    on_epoch : called with each entry of the history as it is made.
    options : `OPTIONS`, see `fastpair.id_learners.IdSettings`; None keeps the default of the loss.

    Raises
    ------
    ArgumentError : an option has a value that cannot be used.
    DataError : the pairs cannot be learned from.
    """
    loss = loss or ("squared" if graded else "softmax" if labels is None else "cross-entropy")
    settings = _settings(loss, labels is not None, graded, head, counts, options)
    if not epochs >= 1 or seed < 0:
        raise ArgumentError(f"epochs is {epochs} and seed is {seed}, expected 1 and 0 or more")
    calibration = Calibration(graded, calibrate, threshold_by, prior)
    calibration.check()
    heads = parse_heads(head)
    rng = np.random.default_rng(seed)
    notes: list[str] = []
    given = _checked(left, right, labels, counts, graded, "pairs", notes)
    if len(given[0]) < FEWEST_PAIRS:
        raise DataError(
            f"there are {len(given[0])} pairs to learn from, expected {FEWEST_PAIRS} or more"
        )
    if valid is None:
        given, held = _set_aside(given, rng)
        notes.append(f"{len(held[0])} validation pairs, set aside at random")
    else:
        held = _checked(*valid, counts, graded, "validation pairs", notes)
        notes.append(f"{len(held[0])} validation pairs, given apart")
    if settings.rankwise:
        given, held = _good_alone(given, notes), _beside_drawn(_good_alone(held, []), counts, rng)
        notes.append(
            "log-odds are those among good pairs and as many with a right side drawn at random"
        )
    _check_both(given[2], "pairs", settings.rankwise)
    _check_both(held[2], "validation pairs", False)
    centre, spread = 0.0, 1.0
    if loss == "squared":
        centre, spread = float(given[2].mean()), float(given[2].std())
    target = ((given[2] - centre) / spread).astype(np.float32)
    pairs = IdPairs(given[0], given[1], target, counts)
    with one_blas_thread():
        learner = start_id_learner(pairs, settings, heads, rng, thread_count(threads))
        search = _Search(learner, held, METRICS[loss], centre, spread)
        search.run(epochs, rng, on_epoch or (lambda entry: None))
        found = learner.learned()
        model, more = _finished(found, held, calibration, centre, spread)
    notes += [f"the best of {len(search.history)} epochs was {search.best_epoch}", *more]
    model = replace(
        model,
        description={
            "ids": "one table" if counts[1] is None else "two tables",
            "loss": loss,
            "dim": settings.dim,
            "seed": seed,
            "epochs": search.best_epoch,
            search.metric: search.best,
        },
        record={
            **model.record,
            **learning_record(search.history, search.metric, {"epoch": search.best_epoch}),
        },
    )
    return IdTrainingResult(
        model, found.left, found.right, search.history, notes, search.metric, search.best
    )


# --- what is asked for, and of what ---------------------------------------------------------------


def _settings(
    loss: str,
    labelled: bool,
    graded: bool,
    head: str,
    counts: tuple[int, int | None],
    options: dict[str, Any],
) -> IdSettings:
    """Return the settings of a loss with those of the user in them."""
    if loss not in DEFAULTS:
        raise ArgumentError(f"loss is {loss!r}, expected one of {', '.join(DEFAULTS)} here")
    if loss in POINTWISE and not labelled:
        raise ArgumentError(
            f"the loss {loss} needs labels or grades and there are none: name their column with "
            "--label, or learn from good pairs alone with bpr or softmax"
        )
    if graded and loss != "squared":
        raise ArgumentError(f"grades are learned with the loss squared, not with {loss}")
    if loss == "squared" and not graded:
        raise ArgumentError("the loss squared is for grades: say --graded, or use cross-entropy")
    unknown = set(options) - set(OPTIONS)
    if unknown:
        raise TypeError(f"train_ids() got an unexpected setting {min(unknown)!r}")
    given = {name: value for name, value in options.items() if value is not None}
    if "negatives" in given and loss not in RANKWISE:
        raise ArgumentError(f"negatives are drawn for the losses bpr and softmax, not for {loss}")
    plain = head == "dot"
    if "batch" in given and plain:
        raise ArgumentError("batch is for other heads than dot, which is learned pair by pair")
    if given.get("implicit") and (not plain or counts[1] is None):
        raise ArgumentError("implicit is for the head dot over two tables")
    if given.get("biases") is False and plain and loss in POINTWISE:
        given["bias_decay"] = 0.0
    implicit = plain and counts[1] is not None and loss in POINTWISE
    rate = DEFAULTS[loss].rate if plain else HEAD_RATE
    settings = replace(DEFAULTS[loss], **{"implicit": implicit, "rate": rate, **given})
    for name, least in (("dim", 1), ("negatives", 1), ("batch", 2)):
        if getattr(settings, name) < least:
            raise ArgumentError(f"{name} is {getattr(settings, name)}, expected {least} or more")
    if not 0 < settings.rate < np.inf or not 0 <= settings.decay < np.inf:
        raise ArgumentError(
            f"the learning rate is {settings.rate} and the weight decay {settings.decay}, expected "
            "a number above 0 and one of at least 0"
        )
    return settings


def _checked(
    left: np.ndarray,
    right: np.ndarray,
    labels: np.ndarray | None,
    counts: tuple[int, int | None],
    graded: bool,
    name: str,
    notes: list[str],
) -> Pairs:
    """Refuse pairs that cannot be learned from; leave out those that tell nothing."""
    labels = np.ones(len(left)) if labels is None else np.asarray(labels, np.float64)
    if not len(left) == len(right) == len(labels):
        raise ArgumentError(f"left, right and labels of the {name} do not have the same length")
    if not len(left):
        raise DataError(f"there are no {name} to learn from")
    wrong = ~np.isfinite(labels) if graded else (labels != 0) & (labels != 1)
    if wrong.any():
        expected = "a finite grade" if graded else "0 (bad) or 1 (good): for grades, say graded"
        raise DataError(
            f"label {labels[np.argmax(wrong)]:g} came in the {name}, expected {expected}"
        )
    least = -1 if name.startswith("validation") else 0
    for side, count in ((left, counts[0]), (right, counts[1] or counts[0])):
        if side.min() < least or side.max() >= count:
            raise DataError(f"a row number of the {name} is outside the {count} rows of its table")
    known = (left >= 0) & (right >= 0)
    if not known.all():
        notes.append(f"{np.sum(~known)} {name} have ids that no pair to learn from has: left out")
    if counts[1] is None:
        itself = known & (left == right)
        if itself.any():
            notes.append(f"{itself.sum()} {name} of an id with itself tell nothing: left out")
        known &= ~itself
    if not known.any():
        raise DataError(f"none of the {name} has two different ids to learn from")
    return left[known].astype(np.int32), right[known].astype(np.int32), labels[known]


def _check_both(labels: np.ndarray, name: str, one_kind: bool) -> None:
    if np.ptp(labels) == 0 and not one_kind:
        raise DataError(
            f"all {len(labels)} {name} have the label {labels[0]:g}: give pairs of other labels "
            "too, or learn from good pairs alone with the loss softmax or bpr"
        )


def _set_aside(pairs: Pairs, rng: np.random.Generator) -> tuple[Pairs, Pairs]:
    """Set a tenth of the pairs aside for validation."""
    count = len(pairs[0])
    order = rng.permutation(count)
    held = min(MOST_HELD, max(1, round(HELD_SHARE * count)))
    parts = np.sort(order[held:]), np.sort(order[:held])
    rest, aside = (tuple(array[part] for array in pairs) for part in parts)
    return rest, aside  # type: ignore[return-value]


def _good_alone(pairs: Pairs, notes: list[str]) -> Pairs:
    good = pairs[2] > 0
    if not good.any():
        raise DataError(f"all {len(good)} pairs are bad: bpr and softmax learn from good ones")
    if not good.all():
        notes.append(f"{np.sum(~good)} bad pairs were left out: the loss is of good pairs alone")
    return pairs[0][good], pairs[1][good], pairs[2][good]


def _beside_drawn(pairs: Pairs, counts: tuple[int, int | None], rng: np.random.Generator) -> Pairs:
    """Return good pairs, then each with a right side that was drawn at random, as bad ones."""
    left, right, labels = pairs
    drawn = rng.integers(0, counts[1] or counts[0], len(right)).astype(np.int32)
    apart = drawn != right if counts[1] is not None else (drawn != right) & (drawn != left)
    left, right, labels = left[apart], right[apart], labels[apart]
    both = np.concatenate([right, drawn[apart]])
    return np.tile(left, 2), both, np.concatenate([labels, np.zeros_like(labels)])


# --- epochs ---------------------------------------------------------------------------------------


class _Search:
    """The epochs of a learner, and the best of them."""

    def __init__(
        self, learner: IdLearner, held: Pairs, metric: str, centre: float, spread: float
    ) -> None:
        self.learner, self.held, self.metric = learner, held, metric
        self.centre, self.spread = centre, spread
        self.history: list[dict[str, Any]] = []
        self.best, self.best_epoch = np.nan, 0

    def run(
        self, epochs: int, rng: np.random.Generator, on_epoch: Callable[[dict[str, Any]], None]
    ) -> None:
        """Learn until the epochs or the patience are over, and put the best epoch back."""
        kept: dict[str, Any] = {}
        sign = 1 if self.metric == "auc" else -1
        for epoch in range(1, epochs + 1):
            begun = time.perf_counter()
            lost = self.learner.epoch(0.5 * (1 + np.cos(np.pi * (epoch - 1) / epochs)), rng)
            value = self._measure()
            if not np.isfinite(lost) or not np.isfinite(value):
                raise DataError(
                    f"learning diverged in epoch {epoch}: give a smaller --learning-rate"
                )
            if not kept or sign * value > sign * self.best:
                self.best, self.best_epoch, kept = value, epoch, self.learner.state()
            over = epoch - self.best_epoch >= PATIENCE
            entry = {"epoch": epoch, "epochs": epochs, "loss": lost, self.metric: value}
            entry["seconds"] = time.perf_counter() - begun
            entry["epochs_left"] = 0 if over else epochs - epoch
            self.history.append(entry)
            on_epoch(entry)
            if over:
                break
        self.learner.restore(kept)

    def _measure(self) -> float:
        left, right, labels = self.held
        raw = self.learner.raw(left, right)
        if self.metric == "rmse":
            return float(np.sqrt(np.mean((self.centre + self.spread * raw - labels) ** 2)))
        if self.metric == "log_loss":
            return float(np.mean(np.logaddexp(0, raw) - labels * raw))
        good, drawn = np.split(raw, 2)  # of the same left rows: see `_beside_drawn`
        return float(np.mean(good > drawn) + 0.5 * np.mean(good == drawn))


def _finished(
    found: Learned, held: Pairs, calibration: Calibration, centre: float, spread: float
) -> tuple[Model, list[str]]:
    """Make a model of what was learned and calibrate it on the validation pairs."""
    linked = found.link != "identity"
    model = Model(
        found.branches,
        input_columns=found.left.shape[1],
        constant=0.0 if linked else found.constant,
        link=found.link,
        slope=found.slope if linked else 1.0,
        offset=found.constant if linked else 0.0,
    ).calibrated(spread, centre)
    right = found.left if found.right is None else found.right
    step = max(1, (1 << 22) // found.left.shape[1])
    scores = np.concatenate(
        [
            model.score(found.left[rows], right[others])
            for rows, others in zip(_cut(held[0], step), _cut(held[1], step), strict=True)
        ]
    )
    return calibrated(model, scores, held[2], calibration)


def _cut(rows: np.ndarray, step: int) -> list[np.ndarray]:
    return [rows[start : start + step] for start in range(0, len(rows), step)]
