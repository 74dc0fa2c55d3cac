"""Learns tables from pairs of row numbers under any head of the catalogue."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastpair.errors import ArgumentError
from fastpair.heads import Head, link_slope
from fastpair.id_learners import (
    BIAS_SQUARES_START,
    FIRST_SQUARES,
    FactorLearner,
    IdLearner,
    IdPairs,
    IdSettings,
    Learned,
    State,
    bias_branch,
    selection,
)
from fastpair.model import Branch
from fastpair.objectives import sigmoid

HEAD_RATE = 0.5
"""Adagrad's rate where nothing else is asked for: rows step once a batch, not once a pair."""

NUMBER_RATE = 0.01
"""Adam's rate for weights of the head: slow, so that vectors are learned before their scale."""


class HeadLearner:
    """Learns tables under any head, and the head's own weights, batch by batch in NumPy.

    Rows take steps of row-wise Adagrad, weights of Adam. With heads that have a link or a
    network of their own, entities have no biases.

    Parameters
    ----------
    pairs : what to learn from.
    settings : see there; `implicit` is for the dot product alone.
    head : the head.
    rng : source of chance.
    """

    def __init__(
        self, pairs: IdPairs, settings: IdSettings, head: Head, rng: np.random.Generator
    ) -> None:
        from fastpair.kernels import sparse_updates as kernels

        self.kernels, self.pairs, self.settings, self.head = kernels, pairs, settings, head
        counts = [count for count in pairs.counts if count is not None]
        spread = 1 / np.sqrt(settings.dim)
        self.vectors = [spread * rng.standard_normal((n, settings.dim)) for n in counts]
        self.squares = [np.full(n, FIRST_SQUARES) for n in counts]
        self.biases = [np.zeros((n, 1)) for n in counts]
        self.bias_squares = [np.full(n, BIAS_SQUARES_START) for n in counts]
        weights = head.initial(settings.dim, rng)
        self.weights = {name: np.array(value, np.float64) for name, value in weights.items()}
        self.branch = Branch(head.name, self.weights)
        self.with_biases = settings.biases and not self.branch.stands_alone
        self.numbers = {**self.branch.weights, "constant": np.zeros(1), "slope": np.ones(1)}
        self.moments = {
            name: (np.zeros_like(value), np.zeros_like(value))
            for name, value in self.numbers.items()
        }
        self.steps = 0

    def epoch(self, height: float, rng: np.random.Generator) -> float:
        """Learn from every pair once; see `IdLearner`."""
        order, batch = rng.permutation(len(self.pairs.left)), self.settings.batch
        starts = range(0, len(order), batch)
        lost = [self._step(order[start : start + batch], height, rng) for start in starts]
        return float(np.sum(lost) / len(order))

    def _step(self, chosen: np.ndarray, height: float, rng: np.random.Generator) -> float:
        """Take one step for some pairs; return the sum of their losses."""
        left, right = self.pairs.left[chosen], self.pairs.right[chosen]
        if self.settings.rankwise:
            drawn = rng.integers(0, len(self.vectors[-1]), (len(left), self.settings.negatives))
            rows = np.column_stack([right, drawn])
            left = np.repeat(left, rows.shape[1])
            raw, cache = self._forward(left, rows.reshape(-1))
            lost, slope = self._rank_slopes(raw.reshape(rows.shape), rows, left)
            right = rows.reshape(-1)
        else:
            raw, cache = self._forward(left, right)
            lost, slope = self._pair_slopes(raw, self.pairs.target[chosen])
        self._backward(left, right, slope, cache, height)
        return lost

    def _pair_slopes(self, raw: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
        if self.settings.loss == "squared":
            return float(0.5 * ((raw - target) ** 2).sum()), raw - target
        return float((np.logaddexp(0, raw) - target * raw).sum()), sigmoid(raw) - target

    def _rank_slopes(
        self, raw: np.ndarray, rows: np.ndarray, left: np.ndarray
    ) -> tuple[float, np.ndarray]:
        """Return the loss and its slopes of good pairs (first column) beside drawn ones."""
        counted = rows != rows[:, :1]
        if self.pairs.alone:
            counted &= rows != left.reshape(rows.shape)
        counted[:, 0] = False
        slopes = np.zeros_like(raw)
        if self.settings.loss == "bpr":
            behind = raw - raw[:, :1]
            share = counted / np.maximum(counted.sum(1, keepdims=True), 1)
            slopes = share * sigmoid(behind)
            slopes[:, 0] = -slopes.sum(1)
            return float((share * np.logaddexp(0, behind)).sum()), slopes.reshape(-1)
        counted[:, 0] = True
        shifted = np.where(counted, raw - raw.max(1, keepdims=True), -np.inf)
        grown = np.exp(shifted)
        slopes = grown / grown.sum(1, keepdims=True)
        lost = float((np.log(grown.sum(1)) - shifted[:, 0]).sum())
        slopes[:, 0] -= 1
        return lost, slopes.reshape(-1)

    def _forward(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, Any]:
        z, other = self.vectors[0][left], self.vectors[-1][right]
        raw, cache = self.head.forward(z, other, self.branch.weights)
        linked, slope = raw, np.ones(1)
        if self.head.link != "identity":
            linked, slope = link_slope(raw, self.head.link)
        score = self.numbers["constant"] + self.numbers["slope"] * linked
        if self.with_biases:
            score = score + self.biases[0][left, 0] + self.biases[-1][right, 0]
        return score, (cache, linked, slope)

    def _backward(
        self, left: np.ndarray, right: np.ndarray, slope: np.ndarray, cache: Any, height: float
    ) -> None:
        head_cache, linked, link_slopes = cache
        rate, count = self.settings.rate * height, len(slope)
        upstream = slope * self.numbers["slope"] * link_slopes
        d_left, d_right, gradients = self.head.backward(upstream, head_cache, self.branch.weights)
        gradients["constant"] = slope.sum(keepdims=True)
        if self.head.link != "identity":
            gradients["slope"] = np.array([slope @ linked])
        self._step_numbers({name: value / count for name, value in gradients.items()}, height)
        self.numbers["slope"][:] = np.maximum(self.numbers["slope"], 1e-3)
        sides = (
            [(left, d_left)]
            if not self.pairs.alone
            else [(np.concatenate([left, right]), np.concatenate([d_left, d_right]))]
        )
        slopes = [slope] if not self.pairs.alone else [np.concatenate([slope, slope])]
        if not self.pairs.alone:
            sides.append((right, d_right))
            slopes.append(slope)
        for side, ((rows, gradient), own) in enumerate(zip(sides, slopes, strict=True)):
            self._step_side(side, rows, gradient, own, rate)

    def _step_numbers(self, gradients: dict[str, np.ndarray], height: float) -> None:
        """Take one step of Adam for weights of the head, constant and slope."""
        self.steps += 1
        correction = NUMBER_RATE * height * np.sqrt(1 - 0.999**self.steps) / (1 - 0.9**self.steps)
        for name, gradient in gradients.items():
            mean, square = self.moments[name]
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient**2 - square)
            self.numbers[name] -= correction * mean / (np.sqrt(square) + 1e-8)

    def _step_side(
        self, side: int, rows: np.ndarray, gradient: np.ndarray, slope: np.ndarray, rate: float
    ) -> None:
        """Add gradients up by row and step each row that is in the batch once."""
        used, places = np.unique(rows, return_inverse=True)
        summed = np.zeros((len(used), gradient.shape[1]))
        self.kernels.add_rows(summed, places, gradient)
        decay, bias_decay = self.settings.decay, self.settings.bias_decay
        step = self.kernels.step_rows
        step(used, summed, self.vectors[side], self.squares[side], rate, decay)
        if self.with_biases:
            slopes = np.bincount(places, slope, len(used))[:, None]
            step(used, slopes, self.biases[side], self.bias_squares[side], rate, bias_decay)

    def raw(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return the raw scores (m,) float64 of pairs of rows."""
        step = 1 << 14
        parts = [
            self._forward(left[start : start + step], right[start : start + step])[0]
            for start in range(0, len(left), step)
        ]
        return np.concatenate(parts)

    @property
    def _arrays(self) -> dict[str, np.ndarray]:
        sides = {f"vectors_{n}": value for n, value in enumerate(self.vectors)}
        return {**sides, **{f"biases_{n}": v for n, v in enumerate(self.biases)}, **self.numbers}

    def state(self) -> State:
        """Copy all that is learned."""
        return {name: value.copy() for name, value in self._arrays.items()}

    def restore(self, state: State) -> None:
        """Go back to what `state` gave."""
        for name, value in self._arrays.items():
            value[...] = state[name]

    def learned(self) -> Learned:
        """Return what a model is made of."""
        columns = self.settings.dim + 1
        tables = [
            np.column_stack(both).astype(np.float32)
            for both in zip(self.vectors, self.biases, strict=True)
        ]
        weights = {name: self.numbers[name] for name in self.branch.weights}
        branches = [Branch(self.head.name, weights, selection(columns, 0, columns - 1))]
        if self.with_biases:
            branches.append(bias_branch(columns))
        right = None if self.pairs.alone else tables[1]
        constant, slope = (float(self.numbers[name][0]) for name in ("constant", "slope"))
        return Learned(tables[0], right, branches, constant, self.head.link, slope)


def start_id_learner(
    pairs: IdPairs,
    settings: IdSettings,
    heads: list[Head],
    rng: np.random.Generator,
    threads: int,
) -> IdLearner:
    """Return what learns tables under these heads."""
    if len(heads) > 1:
        names = "+".join(head.name for head in heads)
        raise ArgumentError(f"tables are learned under one head, not {names}: choose one of them")
    if heads[0].name == "dot":
        return FactorLearner(pairs, settings, rng, threads)
    return HeadLearner(pairs, settings, heads[0], rng)
