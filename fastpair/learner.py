"""The learner: a raw score with its gradient, and Adam over batches of pairs, in NumPy.

Everything is float32 and learned in place. What chance decides comes from one generator, so that
a learner that was taken apart after an epoch and put together again goes on to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np

from fastpair.heads import Concat, find_head, link_slope
from fastpair.model import RIGHT_TOWER, TOWER, Branch, Preparation
from fastpair.objectives import Batch, Loss, reflexivity, transitivity

Key = tuple[int, str]  # number of the branch, `SUM` for what belongs to none, and a name
SUM = -1

ROWS_KEPT = 1 << 30
"""Prepared rows of up to this many bytes are kept; beyond, each batch prepares its own again."""

NUMBER_RATE = 0.02
"""Adam's rate for single numbers: the constant, scales, weights of the density."""

PATIENCE = 10
"""Learning stops early after this many epochs, or a quarter of all where that is more, without a
better ranking of the validation pairs."""


@dataclass(frozen=True)
class Pairs:
    """Labelled pairs of rows.

    Parameters
    ----------
    left, right : (M,) integer row numbers.
    labels : (M,) float64: 0 for bad, 1 for good; or grades.
    weights : (M,) float64, at least 0: how much a pair counts; or None: all the same.
    """

    left: np.ndarray
    right: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: np.ndarray | slice) -> Pairs:
        weights = None if self.weights is None else self.weights[chosen]
        return Pairs(self.left[chosen], self.right[chosen], self.labels[chosen], weights)


class Rows:
    """Prepared rows of embeddings, float32.

    Parameters
    ----------
    embeddings : (N, n) float as they came.
    used : (U,) the row numbers that are used; rows are then numbered in this order.
    preparation : what is applied to them.
    """

    def __init__(self, embeddings: np.ndarray, used: np.ndarray, preparation: Preparation):
        self.embeddings, self.used, self.preparation = embeddings, used, preparation
        self.shape = (len(used), embeddings.shape[1])
        self._kept: np.ndarray | None = None
        if 4 * self.shape[0] * self.shape[1] <= ROWS_KEPT:
            kept = np.empty(self.shape, np.float32)
            for block in blocks(len(used), 1 << 14):
                kept[block] = self._prepared(np.arange(block.start, block.stop))
            self._kept = kept

    def _prepared(self, numbers: np.ndarray) -> np.ndarray:
        return self.preparation(self.embeddings[self.used[numbers]]).astype(np.float32)

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        return self._prepared(numbers) if self._kept is None else self._kept[numbers]

    def __len__(self) -> int:
        return self.shape[0]


def blocks(count: int, size: int) -> Iterator[slice]:
    """Yield slices that cut `count` items into blocks of `size`."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


class Entities:
    """Distinct rows of a batch, and which of them its pairs compare.

    Parameters
    ----------
    rows : (U, n) prepared rows.
    left, right : (M,) numbers of these rows.
    triples : (3, T) numbers of these rows x, y and z, of which x and z shall be similar because
        both are similar to y; default none.
    """

    def __init__(
        self,
        rows: np.ndarray,
        left: np.ndarray,
        right: np.ndarray,
        triples: np.ndarray | None = None,
    ):
        self.rows, self.left, self.right, self.triples = rows, left, right, triples

    @cached_property
    def _sides(self) -> tuple[_Chosen, _Chosen]:
        return _Chosen(self.left), _Chosen(self.right)

    @cached_property
    def _both(self) -> Any:
        return _adding_up(np.concatenate([self.left, self.right]), len(self.rows))

    def forward(self, branch: Branch) -> tuple[np.ndarray, Any]:
        """Compute a branch's raw scores (M,) of the pairs, and what `backward` needs.

        A tower sees each row once, however many pairs it is in.
        """
        if branch.right_tower is None:
            z, towers = branch.tower.forward(self.rows)
            z_left, z_right = z[self.left], z[self.right]
        else:
            left, right = self._sides
            z, cache = branch.tower.forward(self.rows[left.used])
            z_left = z[left.numbers]
            z, right_cache = branch.right_tower.forward(self.rows[right.used])
            z_right, towers = z[right.numbers], (cache, right_cache)
        raw, head = find_head(branch.head).forward(z_left, z_right, branch.weights)
        return raw, (towers, head)

    def backward(self, branch: Branch, upstream: np.ndarray, cache: Any) -> dict[str, np.ndarray]:
        """Turn the gradient by the raw score (M,) into those by a branch's parameters, by name."""
        head = find_head(branch.head)
        d_left, d_right, gradients = head.backward(upstream, cache[1], branch.weights)
        return {**gradients, **self.backward_towers(branch, d_left, d_right, cache)}

    def backward_towers(
        self, branch: Branch, d_left: np.ndarray, d_right: np.ndarray, cache: Any
    ) -> dict[str, np.ndarray]:
        """Turn the gradients by the pairs' tower outputs (M, k) into those by the towers' arrays.

        What the pairs of one row say of its output is added up before it goes through the tower.
        """
        towers = cache[0]
        if branch.right_tower is None:
            if not branch.tower.parameters:
                return {}
            found = branch.tower.backward(self._both @ np.concatenate([d_left, d_right]), towers)
            return {TOWER + name: value for name, value in found.items()}
        left, right = self._sides
        by_left = branch.tower.backward(left.added_up(d_left), towers[0])
        by_right = branch.right_tower.backward(right.added_up(d_right), towers[1])
        gradients = {TOWER + name: value for name, value in by_left.items()}
        return gradients | {RIGHT_TOWER + name: value for name, value in by_right.items()}


class _Chosen:
    """Numbers of rows, perhaps repeated, as numbers of the distinct ones."""

    def __init__(self, numbers: np.ndarray):
        self.used, self.numbers = np.unique(numbers, return_inverse=True)

    def added_up(self, values: np.ndarray) -> np.ndarray:
        """Add up the values (M, k) of each distinct row, (U, k)."""
        return _adding_up(self.numbers, len(self.used)) @ values


def _adding_up(numbers: np.ndarray, count: int) -> Any:
    """Return the sparse (count, M) that adds up values (M, k) by the numbers (M,) of their rows."""
    from scipy.sparse import csr_array

    starts = np.zeros(count + 1, np.int32)
    np.cumsum(np.bincount(numbers, minlength=count), out=starts[1:])
    order = np.argsort(numbers, kind="stable").astype(np.int32)
    return csr_array((np.ones(len(numbers), np.float32), order, starts), (count, len(numbers)))


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class RawScore:
    """The raw score of pairs while it is learned.

    ``constant + slope link(sum of branches) + density . (r + r')``, with a slope of 1 where the
    link is the identity.

    Parameters
    ----------
    branches : the branches that are summed.
    constant : (1,) float.
    density : (3,) weights of the density, or None.
    slope : (1,) float for a head with a link of its own, or None.
    pool : threads in which the branches are computed side by side, each as it would be alone, so
        that results do not depend on their number; None: one after the other.
    """

    def __init__(
        self,
        branches: list[Branch],
        constant: np.ndarray,
        density: np.ndarray | None = None,
        slope: np.ndarray | None = None,
        pool: ThreadPoolExecutor | None = None,
    ):
        self.branches, self.constant = branches, constant
        self.density, self.slope, self.pool = density, slope, pool
        self.link = find_head(branches[0].head).link

    def each(self, function: Callable[[_Item], _Result], branches: list[_Item]) -> list[_Result]:
        """Return what a function makes of each branch, side by side where there is a pool."""
        if self.pool is None or len(branches) < 2:
            return [function(branch) for branch in branches]
        return list(self.pool.map(function, branches))

    @property
    def parameters(self) -> dict[Key, np.ndarray]:
        """Everything that is learned: the arrays themselves."""
        found: dict[Key, np.ndarray] = {(SUM, "constant"): self.constant}
        for name, value in (("density", self.density), ("slope", self.slope)):
            if value is not None:
                found[SUM, name] = value
        for number, branch in enumerate(self.branches):
            for name, value in branch.parameters.items():
                found[number, name] = value
        return found

    def forward(
        self, entities: Entities, density: np.ndarray | None = None
    ) -> tuple[np.ndarray, Any]:
        """Score the pairs of some entities with their summed densities (M, 3) or None.

        Returns
        -------
        raw : (M,), and what `backward` wants to see again.
        """
        parts = self.each(entities.forward, self.branches)
        raw = np.sum([part[0] for part in parts], axis=0)
        linked = None
        if self.slope is not None:
            linked = link_slope(raw, self.link)
            raw = self.slope * linked[0]
        raw = self.constant + raw
        if self.density is not None and density is not None:
            raw = raw + density @ self.density
        return raw, (entities, [part[1] for part in parts], density, linked)

    def consistency(self, cache: Any, share: np.ndarray) -> tuple[float, dict[Key, np.ndarray]]:
        """Compute the mean squared difference of the two orders of concat heads and its gradient.

        Parameters
        ----------
        cache : what `forward` gave.
        share : (M,) weights of the first M pairs, that add up to 1.
        """
        entities, caches, *_ = cache
        value, gradients = 0.0, {}
        for number, (branch, own) in enumerate(zip(self.branches, caches, strict=True)):
            head = find_head(branch.head)
            if not isinstance(head, Concat):
                continue
            one, other = head.scores_of_orders(own[1], branch.weights)
            apart = np.zeros_like(one)
            apart[: len(share)] = (one - other)[: len(share)]
            value += float(share @ apart[: len(share)] ** 2)
            apart[: len(share)] *= 2 * share
            d_left, d_right, found = head.backward_orders(apart, -apart, own[1], branch.weights)
            found = {**found, **entities.backward_towers(branch, d_left, d_right, own)}
            gradients.update({(number, name): array for name, array in found.items()})
        return value, gradients

    def backward(self, upstream: np.ndarray, cache: Any) -> dict[Key, np.ndarray]:
        """Turn the gradient by the raw score (M,) into those by the parameters."""
        entities, caches, density, linked = cache
        gradients: dict[Key, np.ndarray] = {(SUM, "constant"): upstream.sum(keepdims=True)}
        if self.density is not None and density is not None:
            gradients[SUM, "density"] = upstream @ density
        if self.slope is not None:
            gradients[SUM, "slope"] = np.array([upstream @ linked[0]])
            upstream = upstream * self.slope * linked[1]
        found = self.each(
            lambda part: entities.backward(part[0], upstream, part[1]),
            list(zip(self.branches, caches, strict=True)),
        )
        for number, by_name in enumerate(found):
            gradients.update({(number, name): gradient for name, gradient in by_name.items()})
        return gradients


def batch_gradients(
    score: RawScore,
    entities: Entities,
    batch: Batch,
    losses: list[Loss],
    *,
    density: tuple[np.ndarray, np.ndarray] | None = None,
    triple_density: np.ndarray | None = None,
    reflexive: float = 0.0,
    transitive: float = 0.0,
    consistency: float = 0.0,
    meanwhile: Callable[[], None] | None = None,
) -> tuple[float, dict[Key, np.ndarray]]:
    """Compute the sum of the losses over a batch and its gradient by every parameter.

    Parameters
    ----------
    score : the raw score.
    entities : prepared rows, the M pairs of them and, for `transitive`, T triples.
    batch : targets, weights and entities of the pairs.
    losses : as `fastpair.objectives.find_losses` gives them.
    density : (M, 3) of the left and of the right entities, or None.
    triple_density : (3, T, 3) of the entities of triples, or None.
    reflexive : weight of the penalty on entities that score higher with others than with
        themselves.
    transitive : weight of the penalty on triples, see `fastpair.objectives.transitivity`.
    consistency : weight of the mean squared difference of the two orders of concat heads.
    meanwhile : called when the branches wait for the losses, to give the pool other work.

    Returns
    -------
    The loss, and gradients by (number of the branch, name).
    """
    left, right = entities.left, entities.right
    count = len(left)
    pairs = [(left, right)]
    summed = [] if density is None else [density[0] + density[1]]
    if reflexive > 0:  # the pairs of left and of right entities with themselves follow
        pairs += [(left, left), (right, right)]
        summed += [] if density is None else [2 * density[0], 2 * density[1]]
    if transitive > 0 and entities.triples is not None:  # then the three pairs of each triple
        x, y, z = entities.triples
        pairs += [(x, y), (y, z), (x, z)]
        if triple_density is not None:
            a, b, c = triple_density
            summed += [a + b, b + c, a + c]
    if len(pairs) > 1:
        lefts, rights = (np.concatenate(side) for side in zip(*pairs, strict=True))
        entities = Entities(entities.rows, lefts, rights, entities.triples)
    raw, cache = score.forward(entities, np.concatenate(summed) if summed else None)
    if meanwhile is not None:
        meanwhile()
    value, upstream = 0.0, np.zeros_like(raw)
    for loss in losses:
        one, slope = loss(raw[:count], batch)
        value += one
        upstream[:count] += slope
    done = count
    if reflexive > 0:
        done = 3 * count
        own_left, own_right = raw[count : 2 * count], raw[2 * count : done]
        one, *slopes = reflexivity(raw[:count], own_left, own_right, batch.share)
        value += reflexive * one
        upstream[:done] += reflexive * np.concatenate(slopes)
    if len(raw) > done:
        one, *slopes = transitivity(*np.split(raw[done:], 3))
        value += transitive * one
        upstream[done:] += transitive * np.concatenate(slopes)
    gradients = score.backward(upstream, cache)
    if consistency > 0:
        one, more = score.consistency(cache, batch.share)
        value += consistency * one
        for key, gradient in more.items():
            gradients[key] = gradients[key] + consistency * gradient
    return value, gradients


@dataclass(frozen=True)
class Rates:
    """How fast what is learned moves; all rates end at 0 along half a cosine.

    Parameters
    ----------
    towers : Adam's rate for towers and matrices of heads at its height.
    columns : the same for weights that heads have for each column.
    pull : each step draws projections of the first branch back to their start by
        rate * pull of the way (L2-SP).
    """

    towers: float
    columns: float
    pull: float = 0.0


class Drawn(Protocol):
    """What triples are drawn from, such as `fastpair.transitivity.Triples`."""

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Return up to `count` triples (3, T) of row numbers."""


_Step = tuple[np.ndarray, np.ndarray | None]
"""Numbers of some pairs, and triples (3, T) of rows or None."""


class Learner:
    """A raw score while it is learned, and the state of Adam.

    Parameters
    ----------
    score : the raw score at its start, float32, learned in place.
    rows : prepared rows.
    pairs : pairs of them to learn from.
    losses : as `fastpair.objectives.find_losses` gives them.
    rates : see there.
    density : (U, 3) float32 density of each row, or None.
    dropout : share of the numbers of each input row that a step does not see.
    reflexive, transitive, consistency : weights of these penalties, see `batch_gradients`.
    triples : where triples for `transitive` are drawn from.
    anchored : whether pairs of one left entity shall come into one batch.
    """

    def __init__(
        self,
        score: RawScore,
        rows: Rows,
        pairs: Pairs,
        losses: list[Loss],
        rates: Rates,
        *,
        density: np.ndarray | None = None,
        dropout: float = 0.0,
        reflexive: float = 0.0,
        transitive: float = 0.0,
        consistency: float = 0.0,
        triples: Drawn | None = None,
        anchored: bool = False,
    ):
        self.score, self.rows, self.pairs = score, rows, pairs
        self.losses, self.rates = losses, rates
        self.density, self.dropout, self.anchored = density, dropout, anchored
        self.triples = triples if transitive > 0 else None
        self.penalties = {
            "reflexive": reflexive,
            "transitive": transitive,
            "consistency": consistency,
        }
        low, spread = pairs.labels.min(), np.ptp(pairs.labels)
        self.targets = ((pairs.labels - low) / (spread or 1)).astype(np.float32)
        weights = np.ones(len(pairs)) if pairs.weights is None else pairs.weights
        self.weights = (weights / weights.mean()).astype(np.float32)
        self.parameters = score.parameters
        self.start = {
            key: value.copy() for key, value in self.parameters.items() if _is_pulled(key)
        }
        self.mean = {key: np.zeros_like(value) for key, value in self.parameters.items()}
        self.square = {key: np.zeros_like(value) for key, value in self.parameters.items()}
        self._scratch = {key: np.empty_like(value) for key, value in self.parameters.items()}
        self.steps = 0

    def epoch(self, epochs: int, batch: int, rng: np.random.Generator) -> float:
        """Learn from each pair once, as one of `epochs` times; return the mean loss."""
        dealt = [self._step_of(chosen, rng) for chosen in self._batches(batch, rng)]
        losses, fetched = [], None
        for number, step in enumerate(dealt):
            entities = self._entities(step) if fetched is None else fetched.result()
            fetched, following = None, dealt[number + 1 : number + 2]

            def fetch(following: list[_Step] = following) -> None:
                nonlocal fetched
                if self.score.pool is not None and following:
                    fetched = self.score.pool.submit(self._entities, following[0])

            done = self.steps / (epochs * len(dealt))
            losses.append(self._learn_from(step, entities, done, rng, fetch))
        return float(np.mean(losses))

    def seconds_a_step(self, batch: int, rng: np.random.Generator) -> float:
        """Take a few steps to see how long one takes; what was learned is of no use then."""
        seconds = []
        for _ in range(4):
            begun = time.perf_counter()
            step = self._step_of(rng.permutation(len(self.pairs))[:batch], rng)
            self._learn_from(step, self._entities(step), 0.0, rng)
            seconds.append(time.perf_counter() - begun)
        return min(seconds)

    def _step_of(self, chosen: np.ndarray, rng: np.random.Generator) -> _Step:
        """Return what a step learns from: some of the pairs and half as many triples, if any."""
        if self.triples is None:
            return chosen, None
        return chosen, self.triples.draw(max(1, len(chosen) // 2), rng)

    def _learn_from(
        self,
        step: _Step,
        entities: Entities,
        done: float,
        rng: np.random.Generator,
        meanwhile: Callable[[], None] | None = None,
    ) -> float:
        chosen, triples = step
        numbers = self.pairs.left[chosen], self.pairs.right[chosen]
        entities.rows = self._dropped(entities.rows, rng)
        density, triple_density = None, None
        if self.density is not None:
            density = (self.density[numbers[0]], self.density[numbers[1]])
            triple_density = None if triples is None else self.density[triples]
        batch = Batch(self.targets[chosen], self.weights[chosen], *numbers)
        if not batch.weight.any():
            self.steps += 1
            return 0.0
        value, gradients = batch_gradients(
            self.score,
            entities,
            batch,
            self.losses,
            density=density,
            triple_density=triple_density,
            meanwhile=meanwhile,
            **self.penalties,
        )
        self._step(gradients, 0.5 * (1 + np.cos(np.pi * done)))
        return value

    def _entities(self, step: _Step) -> Entities:
        """Return the distinct rows that a step learns from."""
        chosen, triples = step
        return self._distinct(self.pairs.left[chosen], self.pairs.right[chosen], triples)

    def _distinct(
        self, left: np.ndarray, right: np.ndarray, triples: np.ndarray | None = None
    ) -> Entities:
        more = [] if triples is None else [triples.ravel()]
        used, numbers = np.unique(np.concatenate([left, right, *more]), return_inverse=True)
        first, second, rest = np.split(numbers, [len(left), 2 * len(left)])
        return Entities(
            self.rows[used], first, second, None if triples is None else rest.reshape(3, -1)
        )

    def _dropped(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if not self.dropout:
            return rows
        # 16 bits a number: four of them from each draw of the generator.
        kept = rng.integers(0, 1 << 16, rows.shape, np.uint16) >= round(self.dropout * (1 << 16))
        rows *= kept
        rows *= np.float32(1 / (1 - self.dropout))
        return rows

    def _batches(self, batch: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Deal the shuffled pairs out so that every batch has its share of low and high labels."""
        count = -(-len(self.pairs) // batch)
        order = rng.permutation(len(self.pairs))
        if self.anchored:
            lottery = rng.permutation(int(self.pairs.left.max()) + 1)
            order = order[np.argsort(lottery[self.pairs.left[order]], kind="stable")]
            return np.array_split(order, count)
        order = order[np.argsort(self.targets[order], kind="stable")]
        # Neighbours in label, as many as there are batches, go to the batches in random order.
        order = order[np.argsort(np.arange(len(order)) // count + rng.random(len(order)))]
        return [order[first::count] for first in range(count)]

    def _step(self, gradients: dict[Key, np.ndarray], height: float) -> None:
        """Take one step of Adam; pulled projections are also drawn back towards their start."""
        self.steps += 1
        correction = np.sqrt(1 - 0.999**self.steps) / (1 - 0.9**self.steps)
        pulled = float(min(self.rates.towers * self.rates.pull * height, 1))

        def step(keys: list[Key]) -> None:
            for key in keys:
                value = self.parameters[key]
                rate = float(self._rate(key, value) * height * correction)
                start = self.start.get(key) if pulled else None
                moments = self.mean[key], self.square[key]
                _adam(value, gradients[key], *moments, rate, start, pulled, self._scratch[key])

        parts: dict[int, list[Key]] = {}
        for key in gradients:
            parts.setdefault(max(key[0], 0), []).append(key)
        self.score.each(step, list(parts.values()))
        if self.score.slope is not None:  # scores rise with the link, whatever a step says
            np.maximum(self.score.slope, 1e-3, out=self.score.slope)

    def _rate(self, key: Key, value: np.ndarray) -> float:
        if key[1].startswith((TOWER, RIGHT_TOWER)) or value.ndim > 1:
            return self.rates.towers
        return NUMBER_RATE if key[0] == SUM or len(value) == 1 else self.rates.columns

    def scores(self, pairs: Pairs) -> np.ndarray:
        """Compute raw scores of pairs of the learner's rows, (M,) float64."""
        scores = np.empty(len(pairs))
        for block in blocks(len(pairs), 4096):
            left, right = pairs.left[block], pairs.right[block]
            density = None if self.density is None else self.density[left] + self.density[right]
            scores[block] = self.score.forward(self._distinct(left, right), density)[0]
        return scores

    def state(self) -> dict[str, np.ndarray]:
        """Copy everything that changes while learning, by name."""
        found = {"steps": np.array([self.steps])}
        for group, arrays in (
            ("value", self.parameters),
            ("mean", self.mean),
            ("square", self.square),
        ):
            for (number, name), value in arrays.items():
                found[f"{group}/{number}/{name}"] = value.copy()
        return found

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Go on from what `state` gave."""
        self.steps = int(state["steps"][0])
        for name, value in state.items():
            group, _, rest = name.partition("/")
            if group in ("value", "mean", "square"):
                number, _, own = rest.partition("/")
                arrays = {"value": self.parameters, "mean": self.mean, "square": self.square}
                arrays[group][int(number), own][...] = value


def _adam(
    value: np.ndarray,
    gradient: np.ndarray,
    mean: np.ndarray,
    square: np.ndarray,
    rate: float,
    start: np.ndarray | None,
    pulled: float,
    scratch: np.ndarray,
) -> None:
    """Move `value` by one step of Adam, and by the share `pulled` of its way back to `start`.

    All in place, with `scratch` of the same shape, so that nothing is allocated.
    """
    np.subtract(gradient, mean, out=scratch)
    scratch *= 0.1
    mean += scratch
    np.multiply(gradient, gradient, out=scratch)
    scratch -= square
    scratch *= 0.001
    square += scratch
    np.sqrt(square, out=scratch)
    scratch += 1e-8
    np.divide(mean, scratch, out=scratch)
    scratch *= rate
    value -= scratch
    if start is not None:
        np.subtract(value, start, out=scratch)
        scratch *= pulled
        value -= scratch


def _is_pulled(key: Key) -> bool:
    return key[0] == 0 and key[1] in (TOWER + "projection", RIGHT_TOWER + "projection")


@dataclass
class Progress:
    """How far learning came, and the best epoch of it.

    Parameters
    ----------
    history : one entry an epoch.
    best, best_epoch : the highest validation metric and its epoch.
    kept : the parameters after that epoch.
    """

    history: list[dict[str, Any]]
    best: float
    best_epoch: int
    kept: dict[Key, np.ndarray]

    @classmethod
    def begin(cls, learner: Learner) -> Progress:
        """Return the progress of a learner that has learned nothing."""
        kept = {key: value.copy() for key, value in learner.parameters.items()}
        return cls([], -np.inf, 0, kept)


def learn(
    learner: Learner,
    held: Pairs,
    *,
    graded: bool,
    epochs: int,
    batch: int,
    rng: np.random.Generator,
    progress: Progress,
    on_epoch: Callable[[dict[str, Any]], None],
) -> None:
    """Learn until the epochs are over or `PATIENCE` is, and put the best epoch back.

    Parameters
    ----------
    learner : what learns.
    held : validation pairs of its rows.
    graded : whether labels are grades.
    epochs : passes over the pairs in all.
    batch : pairs in a step.
    rng : source of chance.
    progress : how far it came; kept up to date.
    on_epoch : called with each entry of the history, when `progress` holds it.
    """
    metric = metric_name(graded)
    while len(progress.history) < epochs:
        epoch = len(progress.history) + 1
        if epoch - 1 - progress.best_epoch >= max(PATIENCE, epochs // 4):
            break
        begun = time.perf_counter()
        loss = learner.epoch(epochs, batch, rng)
        value = rank_quality(learner.scores(held), held.labels, graded)
        if value > progress.best:
            progress.best, progress.best_epoch = value, epoch
            progress.kept = {key: array.copy() for key, array in learner.parameters.items()}
        entry = {"epoch": epoch, "epochs": epochs, "loss": loss, metric: value}
        progress.history.append({**entry, "seconds": time.perf_counter() - begun})
        on_epoch(progress.history[-1])
    for key, array in progress.kept.items():
        learner.parameters[key][...] = array


def metric_name(graded: bool) -> str:
    """Name what decides between epochs and between arms."""
    return "spearman" if graded else "average_precision"


def learning_record(
    history: list[dict[str, Any]], metric: str, kept: dict[str, Any]
) -> dict[str, Any]:
    """Return what a model keeps of its learning: nothing of clocks, so that equal runs are equal.

    Parameters
    ----------
    history : one entry an epoch.
    metric : name of what decided between epochs.
    kept : what was kept: `arm` and `epoch`, where there are any.
    """
    told = ("arm", "epoch", "loss", metric)
    epochs = [{name: entry[name] for name in told if name in entry} for entry in history]
    return {
        "metric": metric,
        "kept": {name: kept[name] for name in ("arm", "epoch") if name in kept},
        "history": epochs,
    }


def rank_quality(scores: np.ndarray, labels: np.ndarray, graded: bool) -> float:
    """Return what decides between epochs and arms: average precision, Spearman's rho for grades."""
    from scipy.stats import spearmanr
    from sklearn.metrics import average_precision_score

    if not np.ptp(scores) > 0:
        return -1.0
    if graded:
        return float(spearmanr(scores, labels).statistic)
    return float(average_precision_score(labels, scores))
