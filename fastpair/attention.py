"""Soft lookup: what keys hold, averaged by how similar each key is to a query.

``output(q) = sum_k w_k value_k`` with ``w = softmax(score(q, k) / temperature)`` over all keys, the
k best or those above a threshold. Scores of all keys are computed tile by tile and never kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np

from fastpair.backend import LEAST_MEMORY, memory_budget, run_ordered, thread_count
from fastpair.device import LEAST_WALKED, device_bytes, pick
from fastpair.errors import ArgumentError, MemoryBudgetError, MismatchError
from fastpair.frames import ArrayLike, as_array, check_out
from fastpair.kernels import Plan, aligned_empty, attention, cpu
from fastpair.kernels.operands import (
    Frame,
    Panels,
    column_shifts,
    row_words,
    tile_bound,
)
from fastpair.kernels.tile import HEADER, TILE_COLUMNS, TILE_ROWS
from fastpair.matrix import all_pairs
from fastpair.remaining import RemainingPairs
from fastpair.walk import pack_side

if TYPE_CHECKING:
    from fastpair.files import Table
    from fastpair.tables import ModelLike

Outputs = Iterator[tuple[int, np.ndarray]]
"""Number of the first query, and outputs (queries, d) float32."""

LEAST_TEMPERATURE, GREATEST_TEMPERATURE = 1e-30, 1e30

_PAIRS_A_GROUP = 1 << 32
"""Pairs after which outputs are handed out, about, where all keys stay in memory."""

_SPAN_BYTES = 8 << 20
"""Keys and values, about, that one task passes: its sums are then added to those before."""

_QUERIES_A_TASK = 256
_NUMBERS_BYTES = 8 * 5
"""What bounds a packed row's error."""
_LISTED_AT_ONCE = 256
_FLOATS = np.finfo(np.float32)


class SoftLookup:
    """Averages of values, weighed by a softmax of the scores of queries and keys.

    A query's output does not depend on other queries, nor on threads or memory, to the bit; with
    keys in another order, or all of them on another kind of device, outputs differ by
    rounding. Relative to the average of the values' sizes that is at most about ``2 e / t + 1e-6``,
    t being the temperature and e how far a tile's score is from the pair kernel's, some 1e-6 of the
    sizes of a score's terms.

    Parameters
    ----------
    queries : (q, row_bytes) uint8 rows of a table.
    keys : (m, row_bytes) uint8 rows of a table with the same plan, or None: the queries themselves.
    plan : the plan of both.
    values : (m, d) finite numbers, what the keys hold; float32 is read as it is.
    temperature : what scores are divided by, from 1e-30 to 1e30, in the unit of the score; the
        lower it is, the more the best key counts alone.
    itself : whether in one table a query is its own key, default True.
    threads : number of threads; default one for each processor.
    memory : bytes, or a text such as "2GiB", that may be allocated beside tables and values.
    progress : called with numbers of pairs scored.
    runtimes : the GPUs that score; none: the CPU does.
    device_memory : bytes that may be allocated on each GPU; default 90 % of what is free there.

    Raises
    ------
    ArgumentError : an argument cannot be used.
    """

    def __init__(
        self,
        queries: np.ndarray,
        keys: np.ndarray | None,
        plan: Plan,
        values: np.ndarray,
        *,
        temperature: float = 1.0,
        itself: bool = True,
        threads: int | None = None,
        memory: int | str | None = None,
        progress: Callable[[int], None] | None = None,
        runtimes: Sequence[Any] = (),
        device_memory: int | None = None,
    ) -> None:
        if not LEAST_TEMPERATURE <= temperature <= GREATEST_TEMPERATURE:
            raise ArgumentError(
                f"temperature is {temperature}, expected {LEAST_TEMPERATURE:g} to "
                f"{GREATEST_TEMPERATURE:g}"
            )
        if keys is not None and not itself:
            raise ArgumentError("itself is for one table: of two, no query is its own key")
        self.queries, self.keys = queries, queries if keys is None else keys
        self.itself = keys is None and not itself
        self.plan, self.temperature = plan, float(temperature)
        self.values, self.size = _checked_values(values, len(self.keys))
        self.threads, self.memory = thread_count(threads), memory_budget(memory)
        self.progress = progress or (lambda pairs: None)
        self.runtimes, self.device_memory = list(runtimes), device_memory

    @property
    def factor(self) -> np.float32:
        """What a linked score is multiplied by to become the exponent of a power of two."""
        factor = self.plan.slope / self.temperature * math.log2(math.e)
        return np.float32(min(max(factor, float(_FLOATS.tiny)), float(_FLOATS.max)))

    def __call__(
        self, top_k: int | None = None, threshold: float | None = None, *, start: int = 0
    ) -> Outputs:
        """Yield outputs of queries in order; NaN where a query has no key.

        Parameters
        ----------
        top_k : only the so many best keys of each query count, equal scores by lower row.
        threshold : only keys count that score at least this, in the unit of the score.
        start : the first query, default 0; outputs do not depend on it.

        Raises
        ------
        ArgumentError : both are given, or one cannot be used.
        MemoryBudgetError : the memory does not bear a block of keys.
        """
        if top_k is not None and threshold is not None:
            raise ArgumentError("choose one of top_k and threshold")
        if top_k is not None or threshold is not None or self.plan.network is not None:
            return self._listed(self._lists(top_k, threshold, start))
        if self.runtimes:
            from fastpair.gpu_lookup import averages

            return averages(self, self.runtimes, self.device_memory, start)
        return self._all(start)

    # --- all keys ---

    def _all(self, start: int) -> Outputs:
        if start >= len(self.queries):
            return
        walk = _Walk(self)
        for first, last in walk.groups(start):
            state = walk.empty_state(last - first)
            panels = pack_side(
                self.queries[first:last], "right", "float32", *walk.shared, self.memory // 4
            )
            for chunk in walk.chunks:
                keys, values = walk.key_side(chunk)
                for done in walk.run(panels, first, keys, values, chunk, state):
                    self.progress(done)
                del keys, values  # before the next ones are packed
            found = np.empty((last - first, self.values.shape[1]), np.float32)
            attention.finish(*state[1:], self.size, found)
            yield first, found

    # --- lists of keys ---

    def _lists(
        self, top_k: int | None, threshold: float | None, start: int
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """Yield first queries, counts of their keys, keys and scores, as `AllPairs.above`."""
        # Given twice, one table is two: a query is then its own key.
        right = None if self.itself else self.keys
        pairs = RemainingPairs(self._pairs, self.queries, right, self.memory, start)
        if threshold is not None:
            yield from pairs.above(threshold)
        elif top_k is not None:
            for first, scores, indices in pairs.top_k(top_k):
                there = indices >= 0
                yield first, there.sum(axis=1), indices[there], scores[there]
        else:
            yield from self._every(pairs)

    def _pairs(self, rows: np.ndarray, right_rows: np.ndarray | None, memory: int) -> Any:
        """Return what walks all pairs of rows on the chosen device, within a memory."""
        # A walk in two halves may be given less than the least that one asks for.
        options: dict[str, Any] = {"threads": self.threads, "memory": max(memory, LEAST_MEMORY)}
        options["progress"] = self.progress
        if not self.runtimes:
            return all_pairs(rows, right_rows, self.plan, **options)
        from fastpair import gpu_matrix

        # Walks that go on side by side share the device as they share the memory here.
        share = self.device_memory and max(1, self.device_memory * memory // self.memory)
        options |= {"runtimes": self.runtimes, "device_memory": share}
        return gpu_matrix.all_pairs(rows, right_rows, self.plan, **options)

    def _every(
        self, pairs: RemainingPairs
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """Every key of every query, by a network."""
        for first, scores in pairs.dense():
            kept = np.full(scores.shape, True)
            if self.itself:
                rows = np.arange(len(scores))
                kept[rows, first + rows] = False
            indices = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
            yield first, kept.sum(axis=1), indices[kept], scores[kept]

    def _listed(self, lists: Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]) -> Outputs:
        for first, counts, indices, scores in lists:
            ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
            found = np.empty((len(counts), self.values.shape[1]), np.float32)

            def part(
                start: int,
                ends: np.ndarray = ends,
                keys: tuple[np.ndarray, np.ndarray] = (indices, scores),
                found: np.ndarray = found,
            ) -> None:
                own = found[start : start + _LISTED_AT_ONCE]
                attention.attend_listed(ends, *keys, self.temperature, self.values, start, own)

            for _ in run_ordered(part, range(0, len(found), _LISTED_AT_ONCE), self.threads):
                pass
            yield first, np.multiply(found, self.size, out=found)


class _Walk:
    """How queries and keys are cut into groups, chunks, tasks and blocks."""

    def __init__(self, lookup: SoftLookup) -> None:
        self.lookup, plan = lookup, lookup.plan
        columns = lookup.values.shape[1]
        self.value_panels = -(-columns // TILE_ROWS)
        # All that is shared by both sides comes from the keys: other queries must not matter.
        frame = Frame(column_shifts(lookup.keys, plan), np.zeros(0), np.float32(1))
        self.shared = plan, frame, lookup.threads
        packed = 4 * (row_words(plan, "float32") + HEADER) + _NUMBERS_BYTES
        key_bytes = packed + 4 * TILE_ROWS * self.value_panels + 1
        self.state_bytes = 4 * (2 + TILE_ROWS * self.value_panels)
        self.query_bytes = packed + self.state_bytes + 2 * 4 * columns
        self.span = max(1, _SPAN_BYTES // (key_bytes * attention.KEYS))
        span_keys = self.span * attention.KEYS
        spans = lookup.memory // 2 // (key_bytes * span_keys)
        if spans < 1 and len(lookup.keys) * key_bytes > lookup.memory // 2:
            raise MemoryBudgetError(
                f"a block of keys needs {span_keys * key_bytes} bytes, more than half of the "
                f"{lookup.memory} that the memory leaves: allow more memory"
            )
        self.chunk = max(1, spans) * span_keys
        self.chunks = range(0, max(1, len(lookup.keys)), self.chunk)
        self.panels = max(1, _QUERIES_A_TASK // TILE_COLUMNS)
        self._kept: tuple[Panels, np.ndarray] | None = None
        self._greatest: Panels | None = None

    def groups(self, start: int = 0) -> Iterator[tuple[int, int]]:
        """Yield (first, last) queries, from `start` on, that are finished together."""
        under_way = 2 * (self.lookup.threads + 1) * self.panels * TILE_COLUMNS * self.state_bytes
        room = self.lookup.memory // 4 - under_way
        step = room // (self.query_bytes * TILE_COLUMNS) * TILE_COLUMNS
        if step < 1:
            raise MemoryBudgetError(
                f"outputs under way need {under_way} bytes, more than a quarter of the "
                f"{self.lookup.memory} that the memory leaves: allow more memory"
            )
        if len(self.chunks) == 1:  # else keys are packed for each group: better few of them
            pairs = max(1, _PAIRS_A_GROUP // max(1, len(self.lookup.keys)))
            step = min(step, -(-pairs // TILE_COLUMNS) * TILE_COLUMNS)
        for first in range(start, len(self.lookup.queries), step):
            yield first, min(first + step, len(self.lookup.queries))

    def empty_state(self, queries: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Greatest scores, sums of weights and of weighted values, as `attend` fills them."""
        panels = -(-queries // TILE_COLUMNS)
        return (
            np.full((panels, TILE_COLUMNS), cpu.LOWEST, np.float32),
            np.zeros((panels, TILE_COLUMNS), np.float32),
            np.zeros((panels, self.value_panels * TILE_ROWS, TILE_COLUMNS), np.float32),
        )

    def key_side(self, chunk: int) -> tuple[Panels, np.ndarray]:
        """Pack the keys of a chunk and their values."""
        if self._kept is not None:
            return self._kept
        rows = self.lookup.keys[chunk : chunk + self.chunk]
        packed = (
            pack_side(rows, "left", "float32", *self.shared, self.lookup.memory // 4),
            self._packed_values(chunk, len(rows)),
        )
        if len(self.chunks) == 1:
            self._kept = packed
        return packed

    def _packed_values(self, first: int, count: int) -> np.ndarray:
        """Values of keys in blocks: (blocks, panels, HEADER + KEYS, TILE_ROWS), headers zero."""
        shape = (-(-count // attention.KEYS), self.value_panels, HEADER + attention.KEYS, TILE_ROWS)
        packed = aligned_empty(shape, np.float32)
        given = self.lookup.values[first : first + count]

        def fill(block: int) -> None:
            own, start = packed[block], block * attention.KEYS
            part = given[start : start + attention.KEYS]
            rows = np.zeros((attention.KEYS, self.value_panels * TILE_ROWS), np.float32)
            rows[: len(part), : given.shape[1]] = part
            own[:, :HEADER] = 0
            own[:, HEADER:] = rows.reshape(attention.KEYS, -1, TILE_ROWS).swapaxes(0, 1)

        for _ in run_ordered(fill, range(len(packed)), self.lookup.threads):
            pass
        return packed

    def _keys_greatest(self) -> Panels:
        """The greatest sizes of all keys, as of one."""
        if self._greatest is None:
            names = ("size", "length", "norm", "error", "drift")
            greatest = np.zeros((len(names), 1))
            for chunk in self.chunks:
                side, _ = self.key_side(chunk)
                for own, name in zip(greatest, names, strict=True):
                    np.maximum(own, getattr(side, name).max(initial=0), out=own)
                del side
            self._greatest = Panels(np.empty((0, 0)), "float32", "left", *greatest)
        return self._greatest

    def _limits(self, queries: Panels) -> tuple[np.ndarray, bool]:
        """Raw scores above which the pair kernel decides, by panel, and whether there are any.

        Near its end a root makes much of a tile's error; and tiles may overflow where the pair
        kernel does not.
        """
        bound = tile_bound(queries, self._keys_greatest(), self.lookup.plan)
        limits = np.full((len(queries.words), TILE_COLUMNS), np.inf, np.float32)
        rooted = self.lookup.plan.link in ("negative_root", "negative_arcosh")
        own = -64 * bound if rooted else np.full(len(bound), np.inf, np.float32)
        own[np.isinf(bound)] = -np.inf
        limits.reshape(-1)[: len(own)] = own
        return limits, bool((own < np.inf).any())

    def run(
        self,
        queries: Panels,
        first: int,
        keys: Panels,
        values: np.ndarray,
        chunk: int,
        state: tuple[np.ndarray, np.ndarray, np.ndarray],
    ) -> Iterator[int]:
        """Add a chunk of keys to the state of a group of queries; yield numbers of pairs done."""
        lookup = self.lookup
        limits, near = self._limits(queries)
        walk = cpu.make_walk(
            keys, queries, lookup.plan, np.float32(1), (chunk, first), not lookup.itself
        )
        table = cpu.table_arguments(lookup.queries, lookup.keys, lookup.plan)
        factor = lookup.factor
        tasks = [
            (low, min(low + self.panels, len(queries.words)), block, block + self.span)
            for low in range(0, len(queries.words), self.panels)
            for block in range(0, len(values), self.span)
        ]

        def work(task: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            low, high, start, stop = task
            own = self.empty_state((high - low) * TILE_COLUMNS)
            task = low, high, start, min(stop, len(values))
            attention.attend(table, walk, task, values, factor, limits, near, *own)
            return own

        # Kernels know the panels by address: they must be done before the panels go.
        with closing(run_ordered(work, tasks, lookup.threads)) as results:
            for (low, high, start, stop), own in zip(tasks, results, strict=True):
                attention.merge(*(part[low:high] for part in state), *own, factor)
                found = min(high * TILE_COLUMNS, walk.right_count) - low * TILE_COLUMNS
                seen = min(stop * attention.KEYS, walk.left_count) - start * attention.KEYS
                yield found * seen


def _checked_values(values: np.ndarray, keys: int) -> tuple[np.ndarray, np.float32]:
    """Return values (m, d) float32 whose sums do not overflow, and what outputs are then times."""
    values = np.asarray(values)
    if values.ndim != 2 or values.shape[1] == 0 or values.dtype.kind not in "fiu":
        raise ArgumentError(
            f"values are {values.dtype} of shape {values.shape}, expected numbers (keys, columns)"
        )
    if len(values) != keys:
        raise MismatchError(f"there are {len(values)} values for {keys} keys: give a row a key")
    with np.errstate(over="ignore"):
        small = np.ascontiguousarray(values, np.float32)
    greatest = max(float(small.max(initial=0)), -float(small.min(initial=0)))
    if not np.isfinite(greatest) or np.isnan(small).any():
        raise ArgumentError("values hold NaN, infinity or what float32 cannot hold")
    if greatest < 2.0**64:
        return small, np.float32(1)
    return small * np.float32(2.0**-64), np.float32(2.0**64)


# --- embeddings or tables ------------------------------------------------------------------------


def lookup(
    queries: ArrayLike | Table,
    keys: ArrayLike | Table | None,
    values: ArrayLike,
    temperature: float = 1.0,
    *,
    head: ModelLike | None = None,
    top_k: int | None = None,
    threshold: float | None = None,
    itself: bool = True,
    out: np.ndarray | None = None,
    threads: int | None = None,
    memory: int | str | None = None,
    device: str = "auto",
    device_memory: int | str | None = None,
) -> np.ndarray:
    """Return averages of values, weighed by a softmax of how similar queries and keys are.

    Parameters
    ----------
    queries : (q, n) embeddings, or a table as `fastpair.fold` or `fastpair.files.read_table` gives
        it. Arrays may be of NumPy, CuPy, pandas, polars or Arrow (`fastpair.frames`).
    keys : (m, n) embeddings, or a table of the same model; None: the queries themselves.
    values : (m, d) finite numbers, what each key holds.
    temperature : what scores are divided by, from 1e-30 to 1e30, default 1.
    head : what scores embeddings: a model, a model file, a fitted `PairSimilarity` or the name of
        a built-in similarity, default cosine; tables bring their own. Asymmetric models see
        queries as left entities, and need keys.
    top_k : only the so many best keys of a query count; default all.
    threshold : only keys that score at least this count; default all.
    itself : whether, with keys None, a query is its own key, default True.
    out : (q, d) float32 to write into.
    threads : default one for each processor.
    memory : bytes, or a text such as "2GiB", for what is allocated beside tables and values.
    device : "auto", "cpu", "gpu", "gpu:1" or "gpu:0,1", see `fastpair.device.pick`; "auto" takes a
        GPU where there is one and enough pairs.
    device_memory : the same as `memory` for each GPU, default 90 % of what is free there.

    Returns
    -------
    output : (q, d) float32, `out` if that was given; NaN where a query has no key.

    Raises
    ------
    ArgumentError, DataError : an argument cannot be used.
    MismatchError : queries, keys and values do not belong together.
    DeviceError : the device is not there, or does not work.
    """
    on_device = device_bytes(device, device_memory)
    rows, others, plan = _sides(queries, keys, head, threads)
    pairs = len(rows) * len(rows if others is None else others)
    options: dict[str, Any] = {
        "temperature": temperature,
        "itself": itself,
        "threads": threads,
        "memory": memory,
        "runtimes": pick(device, pairs=pairs, least=LEAST_WALKED).runtimes,
        "device_memory": on_device,
    }
    soft = SoftLookup(rows, others, plan, as_array(values, "values"), **options)
    shape = len(rows), soft.values.shape[1]
    output = np.empty(shape, np.float32) if out is None else check_out(out, shape, np.float32)
    for first, found in soft(top_k, threshold):
        output[first : first + len(found)] = found
    return output


def _sides(
    queries: ArrayLike | Table,
    keys: ArrayLike | Table | None,
    head: ModelLike | None,
    threads: int | None,
) -> tuple[np.ndarray, np.ndarray | None, Plan]:
    """Return folded queries, folded keys or None, and their plan."""
    from fastpair.tables import as_model, both_tables

    if head is not None:
        head = as_model(head)
        if keys is None and head.asymmetric:
            raise ArgumentError("the model is asymmetric: give queries and keys apart")
    left, right = both_tables(
        queries, keys, head, None, threads, names=("queries", "keys"), option="head"
    )
    return left.rows, None if right is None else right.rows, left.plan
