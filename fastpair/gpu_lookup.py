"""Soft lookup on GPUs: averages over all keys, in groups of queries and chunks of keys.

Spans of `gpu_attention.SPAN` keys are added up by themselves and then in their order, whatever
lies on a device together: a query's output depends on itself, keys and values alone, not on
devices, their memory or other queries. Queries are shared out in order; each device has a thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastpair.errors import MemoryBudgetError
from fastpair.gpu_matrix import _FREE_SHARE, _SHARES_A_DEVICE, _Devices
from fastpair.gpu_walk import DeviceWalk, HostSides, Portion
from fastpair.kernels.gpu import Runtime
from fastpair.kernels.gpu_attention import ROOTED, SPAN, AttentionKernels, Sums
from fastpair.kernels.gpu_tiles import TILE, Block

if TYPE_CHECKING:
    from fastpair.attention import SoftLookup

_PAIRS_A_SHARE = 1 << 38
"""Pairs after which outputs are handed out, about, where all keys stay on the device."""

_FILLING_BLOCKS = 2112
"""Blocks of threads that keep a large device busy: with fewer queries, more spans at once."""


class LookupWalk(DeviceWalk):
    """A soft lookup on one device: groups of queries, chunks of keys with their values.

    Parameters
    ----------
    runtime : the device.
    sides : queries as left and keys as right rows, two tables.
    lookup : what is looked up.
    memory : bytes that may be used there.
    """

    def __init__(
        self, runtime: Runtime, sides: HostSides, lookup: SoftLookup, *, memory: int
    ) -> None:
        self.lookup, self.width = lookup, lookup.values.shape[1]
        self._values: tuple[int, int, Any] | None = None
        super().__init__(runtime, sides, raised=False, memory=memory)
        self.kernels = AttentionKernels(
            *(runtime, self.stream, self.plan),
            factor=lookup.factor,
            width=self.width,
            span=SPAN,
        )

    # --- memory

    def _divide(self) -> None:
        """Divide the memory between keys with their values, queries, and sums."""
        self._listed = 1
        keys, key = len(self.sides.right.rows), self._side_bytes + 4 * self.width
        room = self.memory // 2 // key
        self.chunk = max(1, keys) if keys <= room else room // SPAN * SPAN
        self._query_bytes = Sums.query_bytes(self.width)
        left = self.memory - 4096 - self.chunk * key
        row = self._side_bytes + 2 * self._query_bytes
        self.group = min(max(1, len(self.sides.left.rows)), left // row)
        if self.chunk < 1 or self.group < 1:
            raise MemoryBudgetError(
                f"{SPAN} keys with their values need {SPAN * key} bytes on the GPU and a query "
                f"{row}, more than the {self.memory} of its memory: allow more with "
                "--device-memory, or use --device cpu"
            )

    def _shrink(self) -> None:
        self._values = None
        super()._shrink()

    def _spans_at_once(self, queries: int) -> int:
        """Spans of keys whose sums lie on the device together."""
        tiles = -(-queries // TILE) * self.kernels.column_tiles
        keys = self.chunk * (self._side_bytes + 4 * self.width)
        left = self.memory - 4096 - keys - queries * (self._side_bytes + self._query_bytes)
        fitting = left // (queries * self._query_bytes)
        return max(1, min(_FILLING_BLOCKS // tiles, fitting, -(-self.chunk // SPAN)))

    def _values_of(self, keys: Portion) -> Any:
        """Values of a chunk of keys; those that are there are not loaded again."""
        if self._values is None or self._values[:2] != (keys.first, keys.last):
            self._values = None
            values = self.put(self.lookup.values[keys.first : keys.last])
            self._values = keys.first, keys.last, values
        return self._values[2]

    # --- the walk

    def averages(self, group: Portion) -> np.ndarray:
        """Return the outputs (queries, columns) float32 of a group."""
        queries, spans = group.count, self._spans_at_once(group.count)
        state = Sums(self.runtime, (queries,), self.width)
        found = Sums(self.runtime, (spans, queries), self.width)
        step, begin = spans * SPAN, True
        near = self.plan.link in ROOTED or not np.isfinite(group.most)
        for keys in self.chunks():
            values = self._values_of(keys)
            for start in range(0, keys.count, step):
                stop = min(start + step, keys.count)
                itself = int(self.lookup.itself)
                block = Block(group.side, keys.side, 0, queries, start, stop, itself)
                rows = group.rows, keys.rows
                self.kernels.attend(block, rows, group.slack, values, near, found)
                self.kernels.combine(found, -(-(stop - start) // SPAN), queries, begin, state)
                begin = False
        self.kernels.finish(state, queries, self.lookup.size)
        return self.fetch(state.outputs)


def averages(
    lookup: SoftLookup, runtimes: Sequence[Runtime], device_memory: int | None, start: int = 0
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield outputs over all keys, of queries in order from `start` on, as `SoftLookup` does.

    Parameters
    ----------
    lookup : what is looked up; its plan has no network.
    runtimes : the devices.
    device_memory : bytes that may be allocated on each; None: 90 % of what is free there.
    start : the first query.

    Raises
    ------
    MemoryBudgetError : the memory of the host or of a device does not bear a part of it.
    """
    width, keys = lookup.values.shape[1], len(lookup.keys)
    sides = HostSides(
        lookup.queries, lookup.keys, lookup.plan, "float32", lookup.threads, lookup.memory
    )
    walks = [
        LookupWalk(runtime, sides, lookup, memory=_memory_of(runtime, device_memory))
        for runtime in runtimes
    ]
    devices = _Devices(list(walks))
    most = None if any(walk.chunk < keys for walk in walks) else _PAIRS_A_SHARE // max(1, keys)
    shares = _shares(lookup, start, len(walks), most)

    def work(walk: Any, share: tuple[int, int]) -> list[np.ndarray]:
        return walk.run(*share, walk.averages)

    for (first, last), parts in zip(shares, devices.run(work, shares), strict=True):
        if keys:
            yield first, parts[0] if len(parts) == 1 else np.concatenate(parts)
        else:
            yield first, np.full((last - first, width), np.nan, np.float32)
        lookup.progress((last - first) * keys)


def _memory_of(runtime: Runtime, device_memory: int | None) -> int:
    free = int(_FREE_SHARE * runtime.free_memory())
    return free if device_memory is None else min(free, device_memory)


def _shares(
    lookup: SoftLookup, start: int, devices: int, most: int | None
) -> list[tuple[int, int]]:
    """Return (first, last) queries that are handed out together, whole tiles of about `most`."""
    queries, row = len(lookup.queries), 2 * 4 * lookup.values.shape[1]
    step = lookup.memory // (4 * (devices + 1)) // row
    if step < 1:
        raise MemoryBudgetError(
            f"an output takes {row} bytes on its way, more than a part of the {lookup.memory} "
            "that the memory leaves: allow more memory"
        )
    if devices > 1:
        step = min(step, -(-(queries - start) // (_SHARES_A_DEVICE * devices)))
    if most is not None:
        step = min(step, max(TILE, most // TILE * TILE))
    return [(first, min(first + step, queries)) for first in range(start, queries, max(1, step))]
