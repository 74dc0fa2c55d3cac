"""Training: from embeddings and labelled pairs to a calibrated model, in NumPy.

A few arms, each one set of settings, learn from the same pairs. In every arm the first branch
starts as its plain similarity over the embeddings and the others at weight zero, so training
starts at what the embeddings already know. The arm that ranks the validation pairs best is kept,
unless raw cosine or an unlabelled PCA ranks them better; then density is measured once more among
what the arm learned, and scores are calibrated. Where the head is mahalanobis, the plain distance
stands in for cosine and PCA, so that a metric comes out in any case.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from fastpair.arms import (
    ROWS_LOOKED_AT,
    Arm,
    Task,
    check_numbers,
    check_symmetry,
    choose_arms,
    epochs_of,
    learns_a_metric,
    sample_rows,
    start_learner,
)
from fastpair.backend import one_blas_thread, thread_count
from fastpair.calibration import Calibration, calibrated, fit_combination
from fastpair.errors import ArgumentError, DataError, MismatchError
from fastpair.evaluation import pca_model, raw_cosine
from fastpair.learner import (
    Learner,
    Pairs,
    Progress,
    blocks,
    learn,
    learning_record,
    metric_name,
    rank_quality,
)
from fastpair.model import Branch, Model, builtin, fit_preparation
from fastpair.objectives import balanced
from fastpair.properties import guarantees_reflexivity
from fastpair.splitting import split_pairs, with_bad_pairs
from fastpair.towers import Identity, Linear, Tower, principal_directions
from fastpair.transitivity import close_pairs, closing_note, pair_codes

FEWEST_PAIRS = 30
"""Below this, only threshold and calibration of the raw cosine are fitted."""

LEAST_GAIN = 0.002
"""Density among what was learned is kept if cross-fitting gains more than this in the metric."""


class Checkpoint(Protocol):
    """Where training keeps its state so that it can be continued; see `fastpair.checkpoints`."""

    def load(self) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """Return the state that was saved last, or None."""

    def save(self, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Keep this state in place of the one before."""


@dataclass(frozen=True)
class TrainingResult:
    """What training produced.

    Parameters
    ----------
    model : the calibrated model.
    history : one entry an epoch: arm, epoch, epochs, loss, the validation metric by its name,
        seconds, and about how many epochs and seconds are left for all arms.
    notes : sentences for the user about what was assumed or decided.
    arms : one entry for raw cosine, the unlabelled PCA and each arm: name, the validation metric,
        best epoch, seconds, and whether it was kept; settings of arms.
    """

    model: Model
    history: list[dict[str, Any]]
    notes: list[str]
    arms: list[dict[str, Any]]


def train(
    embeddings: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    labels: np.ndarray,
    *,
    valid: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    weights: np.ndarray | None = None,
    arms: str | None = None,
    graded: bool = False,
    asymmetric: bool = False,
    balance: bool = False,
    reflexive: float = 0.0,
    transitive: float = 0.0,
    close_positives: bool = False,
    apart: tuple[np.ndarray, np.ndarray] | None = None,
    consistency: float | None = None,
    calibrate: str = "platt",
    threshold_by: str = "f1",
    prior: float | None = None,
    batch: int = 256,
    seed: int = 0,
    threads: int | None = None,
    on_estimate: Callable[[float], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    checkpoint: Checkpoint | None = None,
    **options: Any,
) -> TrainingResult:
    """Learn a similarity from labelled pairs of embeddings.

    Parameters
    ----------
    embeddings : (N, n) float.
    left, right : (M,) integer row numbers.
    labels : (M,) float, 0 (bad) or 1 (good); any finite numbers with `graded`.
    valid : left, right and labels of validation pairs; default: some of the pairs are set aside.
    weights : (M,) float, at least 0: how much each pair counts in learning; default all the same.
    arms : names of `ARMS` joined by ","; default all of them.
    graded : learn the grade itself; scores are then predicted grades, without a threshold.
    asymmetric : learn one tower for left and another for right entities.
    balance : good and bad pairs count the same in all; scores stay calibrated for the pairs as
        they are.
    reflexive : weight of a penalty on entities that score higher with others than with themselves.
    transitive : weight of a penalty on triples x, y, z of which (x, y) and (y, z) are good pairs
        and (x, z) scores lower than both; see `fastpair.objectives.transitivity`.
    close_positives : add the good pairs that others imply: those of entities that a chain of good
        pairs connects, if they are neither labelled nor validation pairs nor `apart`.
    apart : left and right rows of pairs that must not be added, such as those of tests.
    consistency : weight of the squared difference of the two orders of concat heads; default 1.
    calibrate : "platt"; "isotonic" adds a curve of probabilities; "temperature" fits no offset.
    threshold_by : see `fastpair.calibration.find_threshold`.
    prior : share of good pairs where the scores will be used; default as in the validation pairs.
    batch : pairs in a step, 2 or more.
    seed : of everything random, 0 or more; equal seeds give equal models, whatever the threads.
    threads : number of threads; default one for each processor. Each branch of a model learns in
        a thread of its own, so that more than there are branches gain little.
    on_estimate : called with about how many seconds all arms will take, before they begin.
    on_epoch : called with each entry of the history as it is made.
    checkpoint : keeps the state after every epoch, and is asked for an earlier one first.
    options : settings of `Arm` (`OPTIONS`) that replace those of every arm; None keeps them. The
        loss "sampled" is the default one after bad pairs were sampled for the good ones, half of
        them hard. ``density=False`` also keeps density out of the end.

    Raises
    ------
    ArgumentError : an option has a value that cannot be used.
    DataError : the pairs or the embeddings cannot be learned from.
    MismatchError : the checkpoint belongs to another training.
    """
    if embeddings.ndim != 2 or embeddings.shape[1] == 0:
        raise ArgumentError(f"embeddings have shape {embeddings.shape}, expected (rows, columns)")
    columns = embeddings.shape[1]
    sampled = options.get("loss") == "sampled"
    tried = choose_arms(arms, {**options, "loss": None} if sampled else options, columns)
    if consistency is not None and "concat" not in tried[0].head:
        raise ArgumentError(f"consistency is for the head concat, not for {tried[0].head}")
    consistency = 1.0 if consistency is None else consistency
    check_numbers(reflexive=reflexive, transitive=transitive, consistency=consistency)
    _check_closing(transitive, close_positives, apart, graded or asymmetric)
    if not batch >= 2:
        raise ArgumentError(f"batch is {batch}, expected 2 pairs or more in a step")
    if seed < 0:
        raise ArgumentError(f"seed is {seed}, expected 0 or more")
    for arm in tried:
        check_symmetry(arm, asymmetric=asymmetric, reflexive=reflexive)
    calibration = Calibration(graded, calibrate, threshold_by, prior)
    calibration.check()
    if sampled and graded:
        raise ArgumentError("the loss 'sampled' takes good pairs, not grades")
    if balance and graded:
        raise ArgumentError("balance is for good and bad pairs, not for grades")
    data = (left, right, labels)
    given = _checked_pairs(embeddings, data, "pairs", graded, weights=weights, one_kind=sampled)
    held = None
    if valid is not None:
        name = "validation pairs"
        held = _checked_pairs(embeddings, valid, name, graded, one_kind=sampled)
    if len(given) < FEWEST_PAIRS and not sampled:
        why = "are too few to learn from"
        return _plain_alone(embeddings, tried[0], given, held, calibration, why)
    rng = np.random.default_rng(seed)
    split = split_pairs(given, rng) if held is None else (given, held, "given apart")
    if split is None:
        why = "have too few of one kind to set validation pairs aside"
        return _plain_alone(embeddings, tried[0], given, held, calibration, why)
    given, held, origin = split
    notes = [f"{len(held)} validation pairs, {origin}"]
    if close_positives:
        count = len(embeddings)
        kept_apart = [pair_codes(held.left, held.right, count)]
        kept_apart += [] if apart is None else [pair_codes(*apart, count)]
        given, counts = close_pairs(given, np.concatenate(kept_apart), count)
        notes.append(closing_note(counts))
    if sampled:
        given, held = with_bad_pairs(embeddings, given, held, rng)
        notes.append(
            f"{len(given) + len(held)} pairs after bad ones were sampled, half of them hard: "
            "log-odds are those among such pairs"
        )
    _check_both_weighted(given, "pairs to learn from")
    if balance:
        weights = np.ones(len(given)) if given.weights is None else given.weights
        given = replace(given, weights=balanced(given.labels, weights))
    settings = {
        "seed": seed,
        "batch": batch,
        "asymmetric": asymmetric,
        "reflexive": reflexive,
        "transitive": transitive,
        "close_positives": close_positives,
        "consistency": consistency,
        "balance": balance,
        "graded": graded,
    }
    # BLAS in several threads would make the sums, and so the model, depend on their number.
    count = thread_count(threads)
    with (
        one_blas_thread(),
        ThreadPoolExecutor(count, thread_name_prefix="fastpair") as pool,
    ):
        task = Task(embeddings, given, held, settings, pool if count > 1 else None)
        if task.triples is not None and not len(task.triples):
            raise DataError(
                "no entity is in two good pairs, so there is no triple to be transitive: leave "
                "transitive away"
            )
        tournament = _Tournament(task, tried, notes, on_epoch, checkpoint)
        return tournament.run(calibration, options.get("density") is not False, on_estimate)


def _check_closing(
    transitive: float, close_positives: bool, apart: object | None, elsewhere: bool
) -> None:
    """Refuse what needs good pairs of entities of one kind where there are none."""
    for name, given in (("transitive", transitive > 0), ("close_positives", close_positives)):
        if given and elsewhere:
            raise ArgumentError(
                f"{name} is for good and bad pairs of one kind of entity, neither for grades nor "
                "for asymmetric models"
            )
    if apart is not None and not close_positives:
        raise ArgumentError("apart says which pairs close_positives must not add: give both")


def _checked_pairs(
    embeddings: np.ndarray,
    pairs: tuple[np.ndarray, np.ndarray, np.ndarray],
    name: str,
    graded: bool,
    *,
    weights: np.ndarray | None = None,
    one_kind: bool = False,
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
    if one_kind and not labels.any():
        raise DataError(f"all {len(labels)} {name} are bad: the loss 'sampled' needs good ones")
    if np.ptp(labels) == 0 and not one_kind:
        kind = f"of grade {labels[0]:g}" if graded else ("good" if labels[0] else "bad")
        hint = "; for good pairs alone there is the loss 'sampled'" if kind == "good" else ""
        raise DataError(
            f"all {len(labels)} {name} are {kind}: a similarity is learned from both good and bad"
            + hint
        )
    small = np.int32 if len(embeddings) < 2**31 else np.int64
    left, right = (side.astype(small) for side in sides)
    checked = Pairs(left, right, labels, _checked_weights(weights, len(labels)))
    if not one_kind:
        _check_both_weighted(checked, name)
    return checked


def _checked_weights(weights: np.ndarray | None, count: int) -> np.ndarray | None:
    if weights is None:
        return None
    weights = np.asarray(weights, np.float64)
    if weights.shape != (count,):
        raise ArgumentError(f"weights have shape {weights.shape}, expected one a pair: ({count},)")
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    if wrong.any():
        first = int(np.argmax(wrong))
        raise DataError(f"the weight of pair {first} is {weights[first]}, expected 0 or more")
    if not weights.any():
        raise DataError(f"all {count} weights are 0: nothing counts")
    return weights


def _check_both_weighted(pairs: Pairs, name: str) -> None:
    """Refuse pairs of which only one label counts."""
    if pairs.weights is None or len(np.unique(pairs.labels[pairs.weights > 0])) > 1:
        return
    raise DataError(
        f"the {name} with a weight above 0 all have the same label: give pairs of another label "
        "some weight too"
    )


# --- arms -----------------------------------------------------------------------------------------


class _Tournament:
    """The arms one after the other, and what came of each."""

    def __init__(
        self,
        task: Task,
        arms: list[Arm],
        notes: list[str],
        on_epoch: Callable[[dict[str, Any]], None] | None,
        checkpoint: Checkpoint | None,
    ):
        self.task, self.arms, self.notes = task, arms, notes
        self.on_epoch, self.checkpoint = on_epoch, checkpoint
        self.metric = metric_name(task.graded)
        self.identity = task.fingerprint(arms)
        batch = task.settings["batch"]
        self.epochs = [epochs_of(arm, len(task.given), batch) for arm in arms]
        self.entries: list[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, np.ndarray] = {}  # the parameters of the best arm so far
        self.resumed: list[str] = []  # for the reader, not for the model

    def run(
        self,
        calibration: Calibration,
        density_at_end: bool,
        on_estimate: Callable[[float], None] | None,
    ) -> TrainingResult:
        """Let every arm learn, keep the best of all and calibrate it."""
        baselines = self._baselines()
        resumed = self._resume()
        if on_estimate is not None:
            on_estimate(self._estimate())
        for number in range(len(self.entries), len(self.arms)):
            self._learn(number, resumed)
            resumed = None
        best = max(self.entries, key=lambda entry: entry[self.metric])
        simple = max(baselines, key=lambda entry: entry[self.metric])
        kept = best if best[self.metric] >= simple[self.metric] else simple
        arms = [
            {**{k: v for k, v in entry.items() if k != "model"}, "kept": entry is kept}
            for entry in (*baselines, *self.entries)
        ]
        self.notes.append(_comparison(arms, self.metric, self.task.graded))
        if kept is simple:
            self.notes.append(
                f"learning did not help there, so the {simple['arm']} was kept and calibrated"
            )
            model = simple["model"]
            scores = model_scores(self.task.embeddings, model, self.task.plain_held)
        else:
            model, scores = self._final(best, density_at_end)
        if model.asymmetric:
            self.notes.append(
                "THE MODEL IS ASYMMETRIC: score(a, b) is not score(b, a), and left and right "
                "entities are projected apart"
            )
        elif self.task.settings["asymmetric"]:
            self.notes.append("the model is symmetric, though an asymmetric one was asked for")
        description = {
            **self.task.settings,
            "asymmetric": model.asymmetric,
            **self._described(kept),
            "learned": kept is best,
            "pairs": len(self.task.given),
            "validation_pairs": len(self.task.held),
        }
        model, notes = calibrated(model, scores, self.task.held.labels, calibration)
        self.notes += notes
        if self.task.settings["reflexive"] > 0:
            self.notes.append(_guarantee_note(model))
        record = {**model.record, **learning_record(self.history, self.metric, kept)}
        model = replace(model, description={**description, "notes": self.notes}, record=record)
        return TrainingResult(model, self.history, [*self.resumed, *self.notes], arms)

    def _estimate(self) -> float:
        """Estimate the seconds that all arms take from a few steps of the first."""
        batch, pairs = self.task.settings["batch"], len(self.task.given)
        learner = start_learner(self.arms[0], self.task, self._rng(0))
        each = learner.seconds_a_step(min(batch, pairs), self._rng(0))
        return each * -(-pairs // batch) * (sum(self.epochs) - len(self.history))

    def _learn(self, number: int, resumed: dict[str, np.ndarray] | None) -> None:
        """Let one arm learn, from where it was left if that is known."""
        arm, task = self.arms[number], self.task
        rng = self._rng(number)
        learner = start_learner(arm, task, rng)
        progress = Progress.begin(learner)
        if resumed is not None:
            self._continue(learner, progress, rng, resumed)

        def on_epoch(entry: dict[str, Any]) -> None:
            entry["arm"] = arm.name
            left = sum(self.epochs[number:]) - len(progress.history)
            entry["epochs_left"] = left
            each = float(np.median([entry["seconds"] for entry in progress.history]))
            entry["seconds_left"] = left * each
            self.history.append(entry)
            self._save(learner, progress, rng)
            if self.on_epoch is not None:
                self.on_epoch(entry)

        learn(
            learner,
            task.held,
            graded=task.graded,
            epochs=self.epochs[number],
            batch=task.settings["batch"],
            rng=rng,
            progress=progress,
            on_epoch=on_epoch,
        )
        entry = {
            "arm": arm.name,
            self.metric: progress.best,
            "epoch": progress.best_epoch,
            "epochs": self.epochs[number],
            "seconds": sum(epoch["seconds"] for epoch in progress.history),
            "settings": asdict(arm),
        }
        if all(progress.best > other[self.metric] for other in self.entries):
            self.best = {key: v for key, v in learner.state().items() if key.startswith("value/")}
        self.entries.append(entry)

    def _rng(self, number: int) -> np.random.Generator:
        """Return an arm's own source of chance, so that arms do not hang on each other."""
        return np.random.default_rng([self.task.settings["seed"], 2, number])

    def _baselines(self) -> list[dict[str, Any]]:
        """Measure raw cosine and the unlabelled PCA, or plain distances, on validation pairs."""
        task = self.task
        found = []
        if learns_a_metric(self.arms):
            plain = {
                f"distance ({arm.preparation})": plain_distance(task.sample, arm)
                for arm in self.arms
            }
        else:
            plain = {
                "raw cosine": raw_cosine_model(task.embeddings),
                "unlabelled PCA": pca_model(task.sample),
            }
        for name, model in plain.items():
            scores = model_scores(task.embeddings, model, task.plain_held)
            quality = rank_quality(scores, task.held.labels, task.graded)
            found.append({"arm": name, self.metric: quality, "model": model})
        return found

    def _described(self, kept: dict[str, Any]) -> dict[str, Any]:
        if "settings" in kept:
            return {"arm": kept["arm"], **kept["settings"], "epochs": kept["epochs"]}
        return {"arm": kept["arm"], "head": kept["model"].branches[0].head}

    def _final(self, best: dict[str, Any], density_at_end: bool) -> tuple[Model, np.ndarray]:
        """Return the best arm's model and its raw scores of the validation pairs."""
        task = self.task
        number = self.entries.index(best)
        learner = start_learner(self.arms[number], task, self._rng(number))
        learner.restore({"steps": np.zeros(1), **self.best})
        score, preparation = learner.score, self.arms[number].preparation
        raw = learner.scores(task.held)
        density, own = None, np.zeros(len(raw))
        fitted = task.density(preparation)
        if score.density is not None and fitted is not None:
            weights = score.density.astype(np.float64)
            density = replace(fitted[0], weights=weights)
            own = _both(fitted[1], task.held).T @ weights
        constant = float(score.constant[0])
        after_link = score.slope is not None
        model = Model(
            score.branches,
            learner.rows.shape[1],
            learner.rows.preparation,
            density,
            constant=0.0 if after_link else constant,
            link=score.link,
            slope=1.0 if score.slope is None else float(score.slope[0]),
            offset=constant if after_link else 0.0,
        )
        alone = score.branches[0].stands_alone
        if not density_at_end or alone or model.asymmetric:
            return model, raw
        return self._with_density(model, learner, raw, raw - own)

    def _with_density(
        self, model: Model, learner: Learner, raw: np.ndarray, without: np.ndarray
    ) -> tuple[Model, np.ndarray]:
        """Measure density among the outputs of the learned tower, in place of any other.

        It is kept if cross-fitting on the validation pairs says that this gains.

        Parameters
        ----------
        model : the model so far.
        learner : what its arm learned.
        raw, without : (M,) its scores of the validation pairs, with density and without.
        """
        held, graded = self.task.held, self.task.graded
        again = self.task.measured_density(learner.rows, learner.score.branches[0].tower)
        if again is None:
            return model, raw
        features = np.concatenate([without[None], _both(again[1], held)])
        gain = _cross_fitted_gain(features, raw, held.labels, graded)
        found = fit_combination(features, held.labels, graded)
        if gain <= LEAST_GAIN or found[0] <= 0:
            return model, raw
        self.notes.append(
            f"density among what was learned gains {gain:.3f} on the validation pairs: kept"
        )
        model = replace(model, density=None).calibrated(found[0], found[-1])
        density = replace(again[0], weights=found[1:-1])
        return replace(model, density=density), found[:-1] @ features + found[-1]

    # --- state ---

    def _save(self, learner: Learner, progress: Progress, rng: np.random.Generator) -> None:
        if self.checkpoint is None:
            return
        config = {
            "identity": self.identity,
            "entries": self.entries,
            "history": self.history,
            "epochs_done": len(progress.history),
            "best": progress.best,
            "best_epoch": progress.best_epoch,
            "rng": rng.bit_generator.state,
        }
        arrays = {f"learner/{name}": value for name, value in learner.state().items()}
        for (number, name), value in progress.kept.items():
            arrays[f"kept/{number}/{name}"] = value
        arrays.update({f"best/{name}": value for name, value in self.best.items()})
        self.checkpoint.save(config, arrays)

    def _resume(self) -> dict[str, np.ndarray] | None:
        """Take over a saved state; return the arrays of the arm that was learning."""
        loaded = None if self.checkpoint is None else self.checkpoint.load()
        if loaded is None:
            return None
        config, arrays = loaded
        for name, identity in self.identity.items():
            if config["identity"].get(name) != identity:
                raise MismatchError(
                    f"the training to be continued had other {name}: give the same or start anew"
                )
        self.entries, self.history = config["entries"], config["history"]
        self._saved = config
        groups: dict[str, dict[str, np.ndarray]] = {"learner": {}, "kept": {}, "best": {}}
        for name, value in arrays.items():
            group, _, rest = name.partition("/")
            groups[group][rest] = value
        self.best = groups["best"]
        self._kept = groups["kept"]
        self.resumed = [f"continued after {len(self.history)} epochs"]
        return groups["learner"]

    def _continue(
        self,
        learner: Learner,
        progress: Progress,
        rng: np.random.Generator,
        arrays: dict[str, np.ndarray],
    ) -> None:
        """Put a learner back to where it was when its state was saved."""
        config = self._saved
        learner.restore(arrays)
        progress.history = self.history[len(self.history) - config["epochs_done"] :]
        progress.best, progress.best_epoch = config["best"], config["best_epoch"]
        for name, value in self._kept.items():
            number, _, own = name.partition("/")
            progress.kept[int(number), own] = value
        rng.bit_generator.state = config["rng"]


def _both(density: np.ndarray, pairs: Pairs) -> np.ndarray:
    """Return the densities of both sides of pairs, summed, (3, M) float64."""
    return (density[pairs.left] + density[pairs.right]).T.astype(np.float64)


def _cross_fitted_gain(
    features: np.ndarray, raw: np.ndarray, labels: np.ndarray, graded: bool
) -> float:
    """Return what a combination of features gains over raw scores on pairs it was not fitted to."""
    rng = np.random.default_rng(0)
    gains = []
    for _ in range(5):
        half = rng.permutation(len(labels)) % 2 == 0
        for fitted in (half, ~half):
            if np.ptp(labels[fitted]) == 0 or np.ptp(labels[~fitted]) == 0:
                return 0.0
            found = fit_combination(features[:, fitted], labels[fitted], graded)
            combined = found[:-1] @ features[:, ~fitted]
            before, after = (
                rank_quality(scores, labels[~fitted], graded) for scores in (raw[~fitted], combined)
            )
            gains.append(after - before)
    return float(np.mean(gains))


# --- what follows the choice ----------------------------------------------------------------------


def _comparison(arms: list[dict[str, Any]], metric: str, graded: bool) -> str:
    name = "Spearman's rho" if graded else "average precision"
    values = ", ".join(f"{entry['arm']} {entry[metric]:.3f}" for entry in arms)
    return f"{name} on the validation pairs: {values}"


def _guarantee_note(model: Model) -> str:
    heads = "+".join(model.heads)
    if guarantees_reflexivity(model):
        return f"by the formula of {heads}, nothing scores higher with an entity than it itself"
    added = " with density" if model.density is not None else ""
    return (
        f"the formula of {heads}{added} does not keep others from scoring higher than oneself; "
        "evaluate --properties counts how many do"
    )


def raw_cosine_model(embeddings: np.ndarray) -> Model:
    """Return the built-in cosine for embeddings of these columns alone."""
    return replace(builtin("cosine"), input_columns=embeddings.shape[1])


def model_scores(embeddings: np.ndarray, model: Model, pairs: Pairs) -> np.ndarray:
    """Score pairs of rows by the model's own formula, block by block, (M,) float64."""
    scores = np.empty(len(pairs))
    for block in blocks(len(pairs), 4096):
        left, right = embeddings[pairs.left[block]], embeddings[pairs.right[block]]
        scores[block] = model.score(left, right)
    return scores


def plain_distance(rows: np.ndarray, arm: Arm) -> Model:
    """Return minus the squared distance of prepared rows, where nothing was learned.

    It is measured among as many principal components as the arm projects to.
    """
    columns = rows.shape[1]
    tower: Tower
    preparation, tower = fit_preparation(rows, arm.preparation), Identity()
    if arm.dim is not None and arm.dim < columns:
        tower = Linear(principal_directions(preparation(rows), arm.dim))
    branch = Branch("mahalanobis", {"log_weight": np.zeros(1)}, tower)
    return Model([branch], columns, preparation)


def _plain_alone(
    embeddings: np.ndarray,
    arm: Arm,
    given: Pairs,
    held: Pairs | None,
    calibration: Calibration,
    why: str,
) -> TrainingResult:
    """Fit calibration and threshold of the raw cosine, or a plain distance, on all that came."""
    parts = [given] if held is None else [given, held]
    pairs = Pairs(*(np.concatenate([getattr(p, f) for p in parts]) for f in _FIELDS))
    if learns_a_metric([arm]):
        sample = sample_rows(embeddings, ROWS_LOOKED_AT, np.random.default_rng(0))
        name, plain = "plain distance", plain_distance(sample, arm)
        scores = model_scores(embeddings, plain, pairs)
    else:
        name, plain = "raw cosine", raw_cosine_model(embeddings)
        scores = raw_cosine(embeddings, pairs.left, pairs.right)
    fitted = "calibration" if calibration.graded else "calibration and threshold"
    notes = [f"the {len(given)} pairs {why}: only {fitted} of the {name} were fitted"]
    model, more = calibrated(plain, scores, pairs.labels, calibration)
    notes += more
    description = {
        "head": plain.branches[0].head,
        "learned": False,
        "graded": calibration.graded,
        "pairs": len(pairs),
        "notes": notes,
    }
    return TrainingResult(replace(model, description=description), [], notes, [])


_FIELDS = ("left", "right", "labels")
