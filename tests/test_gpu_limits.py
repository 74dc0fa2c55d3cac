"""The probes of a GPU do what they say; how fast a simulated one is means nothing."""

import numpy as np
import pytest
from simulated_gpu import SimulatedRuntime, needs_compiler

from fastpair.gpu_machine import TINY, describe_gpu, gather_bandwidth, measure_gpu_limits
from fastpair.kernels import gpu_limits

pytestmark = needs_compiler


@pytest.mark.parametrize("count", [16, 48, 4096, 100_000 * 16])
def test_every_byte_is_copied(count):
    runtime = SimulatedRuntime(order=3)
    bytes_ = np.random.default_rng(0).integers(0, 256, count).astype(np.uint8)
    stream, found = runtime.stream(), np.empty_like(bytes_)
    source, target = (runtime.empty((count,), np.uint8) for _ in range(2))
    runtime.upload(source, bytes_, stream)
    gpu_limits.copy_vectors(runtime, source, target, stream, blocks=3)
    runtime.download(found, target, stream)
    runtime.synchronize(stream)
    assert found.tobytes() == bytes_.tobytes()


def test_every_byte_of_the_rows_is_read_and_no_other():
    runtime = SimulatedRuntime()
    rows = np.zeros((7, 128), np.uint32).view(np.uint8)
    order = np.array([6, 0, 3, 6], np.int32)
    sums = np.zeros(1, np.uint32)
    for place in (0, 5, 127):  # a thread that sums up the number that is kept
        marked = rows.view(np.uint32).copy()
        marked[3, place] = 0x9E3779B9
        stream = runtime.stream()
        there = runtime.empty((7, 512), np.uint8)
        runtime.upload(there, marked.view(np.uint8), stream)
        numbers, sink = runtime.empty((4,), np.int32), runtime.empty((1,), np.uint32)
        runtime.upload(numbers, order, stream)
        runtime.fill(sink, 0, stream)
        gpu_limits.gather_rows(runtime, there, numbers, sink, stream, blocks=2)
        runtime.download(sums, sink, stream)
        runtime.synchronize(stream)
        assert sums[0] == 0x9E3779B9
    assert gather_bandwidth(runtime, there, numbers, blocks=1)["median"] > 0


def test_all_limits_are_measured():
    runtime = SimulatedRuntime()
    limits = measure_gpu_limits(runtime, TINY)
    names = ["copy", "up", "down", "up_pageable", "down_pageable", "both", "fma", "bfloat16"]
    assert sorted(limits) == sorted(names)
    assert all(limit["median"] > 0 and limit["repeats"] == 2 for limit in limits.values())
    assert describe_gpu(runtime)["name"] == "simulated"
    assert runtime.free_memory() == runtime.memory  # nothing stays there


def test_all_probes_are_listed_for_the_compiler():
    assert {name for _, name, _ in gpu_limits.variants()} == set(gpu_limits.NAMES)
