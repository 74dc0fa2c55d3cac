"""What learns tables from pairs of row numbers, and the one that does so by the dot product.

Learners know a left and a right side, which are one and the same table where there is one, and give
what a model is made of: columns of each entity, the last of them its bias, and branches over them.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fastpair.kernels import LANES, aligned_empty
from fastpair.model import Branch
from fastpair.towers import Linear

POINTWISE = ("squared", "cross-entropy")
"""Losses of single pairs; their order is that of the kernels' codes."""

RANKWISE = ("bpr", "softmax")
"""Losses of good pairs beside drawn ones; their order is that of the kernels' codes."""

MOST_GROUPS = 16
"""Groups that the rows of a side are dealt into: as many blocks of pairs can be learned at once."""

FEWEST_DRAWN = 64
"""Drawn rows come from one group, which holds about so many rows at least."""

IMPLIED_STEPS = 8
"""How often in an epoch what right rows imply is learned: each time takes two passes over pairs."""

MANY_PAIRS, FEW_IMPLIED_STEPS = 2_000_000, 2
"""Above so many pairs, it is learned so often."""

CHUNKS = 16
"""Parts of the pairs that are dealt into blocks at once."""

FIRST_SQUARES = 0.1
"""Where the sums of squared gradients start: first steps are about 3 times the rate."""

BIAS_SQUARES_START = 1.0
IMPLIED_SQUARES_START = 100.0
"""The same for biases and for what right rows imply; a high start keeps rare rows near zero."""

State = dict[str, Any]


@dataclass(frozen=True)
class IdPairs:
    """Pairs of row numbers to learn from.

    Parameters
    ----------
    left, right : (M,) int32.
    target : (M,) float32: 1 and 0, or standardised grades; unused by rankwise losses.
    counts : rows of the left and of the right table; (n, None): one table.
    """

    left: np.ndarray
    right: np.ndarray
    target: np.ndarray
    counts: tuple[int, int | None]

    @property
    def alone(self) -> bool:
        """Whether left and right rows come from one table."""
        return self.counts[1] is None


@dataclass(frozen=True)
class IdSettings:
    """How tables are learned.

    Parameters
    ----------
    dim : columns of a vector.
    loss : a name of `POINTWISE` or `RANKWISE`.
    negatives : right rows that are drawn for each good pair of a rankwise loss.
    rate : of Adagrad.
    decay, bias_decay : weight of half the squares of a pair's vectors and biases in its loss.
    biases : whether entities have biases.
    implicit : whether a left row's vector also holds what its right rows imply.
    size : spread of the vectors at the start.
    batch : pairs of a step of `HeadLearner`.
    """

    dim: int = 32
    loss: str = "squared"
    negatives: int = 1
    rate: float = 0.05
    decay: float = 0.1
    bias_decay: float = 0.02
    biases: bool = True
    implicit: bool = False
    size: float = 0.05
    batch: int = 256

    @property
    def rankwise(self) -> bool:
        """Whether the loss compares good pairs with drawn ones."""
        return self.loss in RANKWISE


@dataclass(frozen=True)
class Learned:
    """What a learner gives to a model.

    Parameters
    ----------
    left, right : (n, dim + 1) float32 columns of each row, the last its bias; right is None where
        there is one table.
    branches, constant, link, slope : as in `fastpair.model.Model`; of a link that is not the
        identity, `constant` is the offset.
    """

    left: np.ndarray
    right: np.ndarray | None
    branches: list[Branch]
    constant: float
    link: str = "identity"
    slope: float = 1.0


class IdLearner(Protocol):
    """Learns epoch by epoch."""

    def epoch(self, height: float, rng: np.random.Generator) -> float:
        """Learn from every pair once at `height` times the rate; return the mean loss."""

    def raw(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return the raw scores (m,) float64 of pairs of rows."""

    def state(self) -> State:
        """Copy all that is learned."""

    def restore(self, state: State) -> None:
        """Go back to what `state` gave."""

    def learned(self) -> Learned:
        """Return what a model is made of."""


def selection(columns: int, first: int, last: int) -> Linear:
    """Return the tower that takes columns `first` to `last` of rows of `columns` columns."""
    return Linear(np.eye(columns)[first:last])


def bias_branch(columns: int) -> Branch:
    """Return the branch that adds the last of `columns` columns of both rows."""
    return Branch("sum", {"weight": np.ones(1)}, selection(columns, columns - 1, columns))


# --- the schedule ---------------------------------------------------------------------------------


def rounds_of_blocks(groups: int, alone: bool) -> list[list[list[int]]]:
    """Return rounds of tasks of blocks, each block once; tasks of a round share no group.

    A block holds the pairs of a left group g and a right group h and has the number
    ``groups * g + h``. With one table, a task is a match of two groups in both orders, as in a
    round-robin tournament, and the first round has the pairs within the groups.

    Parameters
    ----------
    groups : how many there are on each side; even or 1.
    alone : whether left and right rows come from one table.
    """
    everyone = range(groups)
    if not alone:
        return [[[groups * g + (g + r) % groups] for g in everyone] for r in everyone]
    rounds = [[[groups * g + g] for g in everyone]]
    circle = list(everyone)
    for _ in range(groups - 1):
        matches = [(circle[n], circle[-1 - n]) for n in range(groups // 2)]
        rounds.append([[groups * g + h, groups * h + g] for g, h in matches])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def group_count(counts: tuple[int, int | None], rankwise: bool) -> int:
    """Return the number of groups for tables of so many rows; it hangs on nothing else."""
    least = min(counts[0], counts[0] if counts[1] is None else counts[1])
    wanted = least // FEWEST_DRAWN if rankwise else least // 2
    return max([n for n in (1, 2, 4, 8, MOST_GROUPS) if n <= wanted], default=1)


# --- the dot product ------------------------------------------------------------------------------


class FactorLearner:
    """Learns a dot product and biases, pair by pair, with row-wise Adagrad (see the kernels).

    The rows of each side are dealt into groups anew in every epoch, and pairs into the blocks of
    their groups. Blocks without a common group are learned at the same time. What is learned does
    not depend on the number of threads.

    Parameters
    ----------
    pairs : what to learn from.
    settings : see there.
    rng : source of chance.
    threads : number of threads.
    """

    def __init__(
        self, pairs: IdPairs, settings: IdSettings, rng: np.random.Generator, threads: int
    ) -> None:
        from fastpair.kernels import sparse_updates as kernels

        self.kernels, self.settings, self.threads = kernels, settings, threads
        order = rng.permutation(len(pairs.left))
        self.pairs = IdPairs(
            pairs.left[order], pairs.right[order], pairs.target[order], pairs.counts
        )
        self.padded = -(-settings.dim // LANES) * LANES
        self.mean = float(pairs.target.mean(dtype=np.float64)) if not settings.rankwise else 0.0
        if settings.loss == "cross-entropy":
            self.mean = float(np.log(self.mean / (1 - self.mean)))
        self.left = self._table(pairs.counts[0], 3 if settings.implicit else 1, rng)
        self.right = self.left
        if pairs.counts[1] is not None:
            self.right = self._table(pairs.counts[1], 1, rng)
        self.groups = group_count(pairs.counts, settings.rankwise)
        self.rounds = rounds_of_blocks(self.groups, pairs.alone)
        if settings.implicit:
            self._start_implied(rng)

    def _table(self, rows: int, segments: int, rng: np.random.Generator) -> np.ndarray:
        header, dim = self.kernels.HEADER, self.settings.dim
        table = aligned_empty((rows, header + segments * self.padded), np.float32)
        table[:] = 0
        table[:, self.kernels.SQUARES] = FIRST_SQUARES
        table[:, self.kernels.BIAS_SQUARES] = BIAS_SQUARES_START
        start = rng.standard_normal((rows, dim), np.float32)
        table[:, header : header + dim] = np.float32(self.settings.size) * start
        return table

    def _start_implied(self, rng: np.random.Generator) -> None:
        """Set up what right rows imply, and who is paired with whom."""
        from scipy.sparse import csr_array

        left, right, (rows, columns) = self.pairs.left, self.pairs.right, self.pairs.counts
        ones = np.ones(len(left), np.int8)
        matrix = csr_array((ones, (left, right)), shape=(rows, columns))
        turned = matrix.T.tocsr()
        self.partners = (matrix.indptr, matrix.indices), (turned.indptr, turned.indices)
        counts = np.maximum(np.diff(matrix.indptr), 1)
        self.left[:, self.kernels.SHARE] = 1 / np.sqrt(counts)
        assert columns is not None
        self.implied = self._table(columns, 1, rng)
        self.implied[:, self.kernels.HEADER :] *= 0.1
        self.implied[:, self.kernels.SQUARES] = IMPLIED_SQUARES_START
        with ThreadPoolExecutor(self.threads) as pool:
            self._refresh_implied(pool)

    # --- an epoch ---

    def epoch(self, height: float, rng: np.random.Generator) -> float:
        """Learn from every pair once; see `IdLearner`."""
        groups = self._deal_groups(rng)
        seeds = rng.integers(0, 1 << 63, self.groups**2, np.uint64)
        lost = np.zeros(self.groups**2)
        wanted = FEW_IMPLIED_STEPS if len(self.pairs.left) > MANY_PAIRS else IMPLIED_STEPS
        steps = min(wanted, self.groups)
        with ThreadPoolExecutor(self.threads, thread_name_prefix="fastpair") as pool:
            dealt, starts = self._deal_pairs(groups, pool)
            members = _members(groups[1], self.groups)

            def learn(task: list[int]) -> None:
                for block in task:
                    part = slice(starts[block], starts[block + 1])
                    those = members[block % self.groups]
                    lost[block] = self._learn(dealt, part, those, seeds[block], height)

            for number, tasks in enumerate(self.rounds):
                _side_by_side(learn, tasks, pool, self.threads)
                if self.settings.implicit and (number + 1) % (self.groups // steps) == 0:
                    self._step_implied(pool, height, steps)
        return float(lost.sum() / len(self.pairs.left))

    def _learn(
        self,
        dealt: tuple[np.ndarray, ...],
        part: slice,
        members: np.ndarray,
        seed: np.uint64,
        height: float,
    ) -> float:
        """Learn from the pairs of one block."""
        settings, kernels = self.settings, self.kernels
        left, right, target = (array[part] for array in dealt)
        tables = (self.left, self.right, self.padded, settings.dim, settings.implicit)
        rate = np.float32(settings.rate * height)
        rates = np.array([rate, rate if settings.biases else 0], np.float32)
        decays = np.array([settings.decay, settings.bias_decay], np.float32)
        if not settings.rankwise:
            loss = POINTWISE.index(settings.loss)
            return float(
                kernels.learn_pairs(left, right, target, *tables, loss, self.mean, rates, decays)
            )
        if not len(members):
            return 0.0
        scratch = np.empty(2 * self.padded + LANES, np.float32)
        drawing = (members, settings.negatives, seed)
        loss = RANKWISE.index(settings.loss)
        return float(
            kernels.learn_ranks(left, right, *drawing, *tables, loss, rates, decays, scratch)
        )

    def _deal_groups(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Deal the rows of both sides into groups of equal size, at random."""
        left = _dealt(self.pairs.counts[0], self.groups, rng)
        if self.pairs.counts[1] is None:
            return left, left
        return left, _dealt(self.pairs.counts[1], self.groups, rng)

    def _deal_pairs(
        self, groups: tuple[np.ndarray, np.ndarray], pool: ThreadPoolExecutor
    ) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """Bring pairs into the order of their blocks; return them and where blocks begin."""
        pairs, kernels, count = self.pairs, self.kernels, len(self.pairs.left)
        left, right = pairs.left, pairs.right
        chunks = [slice(count * n // CHUNKS, count * (n + 1) // CHUNKS) for n in range(CHUNKS)]
        counts = np.zeros((CHUNKS, self.groups**2), np.int64)

        def count_chunk(number: int) -> None:
            part = chunks[number]
            kernels.count_blocks(left[part], right[part], *groups, self.groups, counts[number])

        _side_by_side(count_chunk, range(CHUNKS), pool, self.threads)
        places = np.cumsum(counts.T.reshape(-1)).reshape(-1, CHUNKS).T - counts
        starts = np.append(places[0], count)
        places = np.ascontiguousarray(places)
        dealt = tuple(np.empty_like(array) for array in (left, right, pairs.target))

        def deal_chunk(number: int) -> None:
            part = chunks[number]
            given = left[part], right[part], pairs.target[part]
            kernels.deal_blocks(*given, *groups, self.groups, places[number], *dealt)

        _side_by_side(deal_chunk, range(CHUNKS), pool, self.threads)
        return dealt, starts

    def _step_implied(self, pool: ThreadPoolExecutor, height: float, steps: int) -> None:
        rate = np.float32(self.settings.rate * height)
        decay = np.float32(self.settings.decay / steps)
        rest = (self.left, self.implied, self.padded, self.settings.dim, rate, decay)

        def step(part: range) -> None:
            scratch = np.empty(self.padded + LANES, np.float32)
            self.kernels.step_implied(part.start, part.stop, *self.partners[1], *rest, scratch)

        _side_by_side(step, _parts(len(self.implied)), pool, self.threads)
        self._refresh_implied(pool)

    def _refresh_implied(self, pool: ThreadPoolExecutor) -> None:
        def refresh(part: range) -> None:
            rest = (self.left, self.implied, self.padded)
            self.kernels.sum_implied(part.start, part.stop, *self.partners[0], *rest)

        _side_by_side(refresh, _parts(len(self.left)), pool, self.threads)

    # --- what was learned ---

    def raw(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return the raw scores (m,) float64 of pairs of rows."""
        scores = np.empty(len(left))
        tables = (self.left, self.right, self.padded, self.settings.implicit, self.mean)
        self.kernels.score_pairs(left, right, *tables, scores)
        return scores

    def state(self) -> State:
        """Copy all that is learned."""
        return {"left": self._columns(self.left), "right": self._columns(self.right)}

    def restore(self, state: State) -> None:
        """Put the vectors and biases back; what rows imply is then part of their vectors."""
        header = self.kernels.HEADER
        for table, columns in ((self.left, state["left"]), (self.right, state["right"])):
            table[:, header:] = 0
            table[:, header : header + self.settings.dim] = columns[:, :-1]
            table[:, self.kernels.BIAS] = columns[:, -1]

    def _columns(self, table: np.ndarray) -> np.ndarray:
        """Return the vectors of a table with what they are implied, then the biases."""
        header, dim = self.kernels.HEADER, self.settings.dim
        found = np.empty((len(table), dim + 1), np.float32)
        found[:, :dim] = table[:, header : header + dim]
        if self.settings.implicit and table is self.left:
            found[:, :dim] += table[:, header + self.padded : header + self.padded + dim]
        found[:, dim] = table[:, self.kernels.BIAS]
        return found

    def learned(self) -> Learned:
        """Return what a model is made of."""
        columns = self.settings.dim + 1
        dot = Branch("dot", {"weight": np.ones(1)}, selection(columns, 0, columns - 1))
        right = None if self.pairs.alone else self._columns(self.right)
        branches = [dot, bias_branch(columns)]
        return Learned(self._columns(self.left), right, branches, self.mean)


def _dealt(rows: int, groups: int, rng: np.random.Generator) -> np.ndarray:
    dealt = np.empty(rows, np.uint8)
    dealt[rng.permutation(rows)] = np.arange(rows) % groups
    return dealt


def _members(dealt: np.ndarray, groups: int) -> list[np.ndarray]:
    """Return the rows (m,) int32 of each group."""
    order = np.argsort(dealt, kind="stable").astype(np.int32)
    ends = np.searchsorted(dealt[order], np.arange(groups + 1))
    return [order[ends[n] : ends[n + 1]] for n in range(groups)]


def _parts(rows: int) -> list[range]:
    """Cut rows into parts whose number does not hang on the threads."""
    ends = [rows * n // CHUNKS for n in range(CHUNKS + 1)]
    return [range(ends[n], ends[n + 1]) for n in range(CHUNKS)]


def _side_by_side(
    work: Callable[[Any], None], items: Any, pool: ThreadPoolExecutor, threads: int
) -> None:
    """Call ``work(item)`` for each item, every thread with its share; wait for all."""
    listed = list(items)

    def share(first: int) -> None:
        for item in listed[first::threads]:
            work(item)

    for done in [pool.submit(share, first) for first in range(min(threads, len(listed)))]:
        done.result()
