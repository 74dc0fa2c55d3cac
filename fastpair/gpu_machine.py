"""What GPU this is, and what it can do at most: the ceilings that its rates are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from fastpair.kernels import gpu_limits
from fastpair.machine import spread

Summary = dict[str, Any]


@dataclass(frozen=True)
class Effort:
    """How much is done to measure a ceiling.

    Parameters
    ----------
    device_bytes : of each of the two arrays that are copied on the device.
    link_bytes : of each of the arrays that go up and down.
    rounds : multiply-adds of a chain.
    blocks : of threads.
    repeats : of each measurement.
    """

    device_bytes: int = 1 << 30
    link_bytes: int = 1 << 28
    rounds: int = 1 << 14
    blocks: int = gpu_limits.BLOCKS
    repeats: int = 5


TINY = Effort(1 << 12, 1 << 12, 2, 2, 2)
"""For simulated devices: what is measured means nothing."""


def describe_gpu(runtime: Any) -> Summary:
    """Return what is known of a GPU and of the software that drives it."""
    from fastpair.device import driver_cuda

    known = driver_cuda()
    return {
        "number": runtime.number,
        "name": runtime.name,
        "free_bytes": runtime.free_memory(),
        "driver_cuda": known,
        "versions": {name: _version(name) for name in _PACKAGES if _version(name)},
    }


_PACKAGES = ("cupy-cuda12x", "cupy-cuda13x", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def seconds_of(
    runtime: Any, work: Callable[[], object], streams: tuple[Any, ...], repeats: int
) -> list[float]:
    """Return the seconds of each repeat of work on streams, after one that does not count."""
    seconds = []
    for repeat in range(repeats + 1):
        begun = time.perf_counter()
        work()
        for stream in streams:
            runtime.synchronize(stream)
        if repeat:
            seconds.append(max(time.perf_counter() - begun, 1e-9))
    return seconds


def measure_gpu_limits(runtime: Any, effort: Effort | None = None) -> Summary:
    """Measure the ceilings of a GPU.

    Returns
    -------
    limits : the `machine.spread` of bytes or operations a second by name: ``copy`` (on the device;
        a byte counts twice, read and written), ``up``, ``down`` (page-locked memory of the host),
        ``up_pageable``, ``down_pageable``, ``both`` (up and down at once, bytes of both together),
        ``fma`` (float32) and ``bfloat16`` (matrix products by ``mma.sync``, which newer devices
        can exceed with other instructions).
    """
    effort = effort or Effort()
    if effort.device_bytes * 3 > runtime.free_memory():
        effort = Effort(runtime.free_memory() // 4 // 4096 * 4096, 1 << 24)
    return {**_copies(runtime, effort), **_link(runtime, effort), **_arithmetic(runtime, effort)}


def _copies(runtime: Any, effort: Effort) -> Summary:
    stream = runtime.stream()
    source, target = (runtime.empty((effort.device_bytes,), np.uint8) for _ in range(2))
    for array in (source, target):
        runtime.fill(array, 0, stream)
    seconds = seconds_of(
        runtime,
        lambda: gpu_limits.copy_vectors(runtime, source, target, stream, blocks=effort.blocks),
        (stream,),
        effort.repeats,
    )
    return {"copy": spread([2 * effort.device_bytes / s for s in seconds])}


def _link(runtime: Any, effort: Effort) -> Summary:
    """Measure the way between host and device, from and to page-locked memory and other."""
    up, down = runtime.stream(), runtime.stream()
    size = effort.link_bytes
    there = [runtime.empty((size,), np.uint8) for _ in range(2)]
    locked = [runtime.pinned((size,), np.uint8) for _ in range(2)]
    plain = [np.zeros(size, np.uint8) for _ in range(2)]
    for array in (*locked, *plain):
        array[:] = 0  # each page is there before the clock
    for array in there:
        runtime.fill(array, 0, up)
    runtime.synchronize(up)

    def both() -> None:
        runtime.upload(there[0], locked[0], up)
        runtime.download(locked[1], there[1], down)

    works: dict[str, tuple[Callable[[], object], int]] = {
        "up": (lambda: runtime.upload(there[0], locked[0], up), size),
        "down": (lambda: runtime.download(locked[1], there[1], down), size),
        "up_pageable": (lambda: runtime.upload(there[0], plain[0], up), size),
        "down_pageable": (lambda: runtime.download(plain[1], there[1], down), size),
        "both": (both, 2 * size),
    }
    return {
        name: spread([moved / s for s in seconds_of(runtime, work, (up, down), effort.repeats)])
        for name, (work, moved) in works.items()
    }


def _arithmetic(runtime: Any, effort: Effort) -> Summary:
    stream, sink = runtime.stream(), runtime.empty((1,), np.float32)
    found = {}
    for name, probe in (
        ("fma", gpu_limits.multiply_add),
        ("bfloat16", gpu_limits.matrix_product),
    ):
        done: list[int] = []

        def work(probe: Any = probe, done: list[int] = done) -> None:
            done.append(probe(runtime, sink, effort.rounds, stream, blocks=effort.blocks))

        seconds = seconds_of(runtime, work, (stream,), effort.repeats)
        found[name] = spread([done[0] / s for s in seconds])
    return found


def gather_bandwidth(
    runtime: Any, rows: Any, order: Any, blocks: int = gpu_limits.BLOCKS
) -> Summary:
    """Return the `spread` of bytes a second at which rows (n, row_bytes) on the device are read.

    `order` (m,) int32 is on the device too. Rows of a small table come from the device's cache.
    """
    stream, sink = runtime.stream(), runtime.empty((1,), np.uint32)
    seconds = seconds_of(
        runtime,
        lambda: gpu_limits.gather_rows(runtime, rows, order, sink, stream, blocks=blocks),
        (stream,),
        5,
    )
    return spread([len(order) * rows.shape[1] / s for s in seconds])
