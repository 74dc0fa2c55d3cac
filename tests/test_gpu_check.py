"""The script for machines with a GPU runs, tiny, on a simulated one, and finds what is wrong."""

import json
from dataclasses import replace

import numpy as np
import pytest
from simulated_gpu import SimulatedRuntime, needs_compiler

from fastpair import device

gpu_check = pytest.importorskip("gpu_check", reason="the benchmarks are not beside the tests")
pytestmark = needs_compiler

SIZES = replace(gpu_check.SMALL, fresh="1")


def test_the_check_measures_everything_and_finds_nothing_wrong(monkeypatch, tmp_path, capsys):
    device.open_gpu.cache_clear()
    monkeypatch.setattr(device, "find_gpus", lambda: 1)
    monkeypatch.setattr(device, "_start", lambda number: SimulatedRuntime(number=number))
    monkeypatch.setattr(gpu_check, "SMALL", SIZES)
    output = tmp_path / "found.json"
    try:
        assert gpu_check.main(["--small", "--seconds", "9999", "--output", str(output)]) == 0
    finally:
        device.open_gpu.cache_clear()
    found = json.loads(output.read_text())
    assert found["skipped"] == []
    assert found["machine"]["gpus"][0]["name"] == "simulated"
    kinds = {"compile": 2, "bits": 4, "agreement": 16, "streamed": 4, "all_pairs": 3}
    assert {name: len(found[name]) for name in kinds} == kinds
    assert len(found["pairs"]) == 2 * 2 * (1 + 2 + 1)  # precisions, lanes; random, sorted, cache
    for row in (*found["pairs"], *found["streamed"], *found["all_pairs"]):
        assert row["pairs_per_second"]["median"] > 0
        assert row["share"] > 0
    shown = capsys.readouterr().out
    assert "gpu:0 simulated" in shown
    assert "0 wrong results in 20 comparisons" in shown


def test_wrong_bits_are_counted(monkeypatch):
    from fastpair.gpu_scoring import GpuPairScorer

    right = GpuPairScorer.__call__

    def wrong(self, left, other):
        scores = right(self, left, other)
        scores[7] = np.nextafter(scores[7], np.float32(np.inf))
        return scores

    monkeypatch.setattr(GpuPairScorer, "__call__", wrong)
    check = gpu_check.Check((SimulatedRuntime(),), replace(SIZES, heads=("dot",)), 600)
    assert [row["wrong"] for row in check._bits()] == [2] * 2


def test_what_there_is_no_time_for_is_named():
    check = gpu_check.Check((SimulatedRuntime(),), SIZES, 0)
    found = check.run()
    assert any("bits, after dot" in sentence for sentence in found["skipped"])
    assert found["aims"][0]["measured"] is None
    assert any(line.startswith("skipped: ") for line in gpu_check.table(found))


def test_a_machine_without_a_gpu_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(device, "_driver", lambda: None)
    assert gpu_check.main([]) == 2
    assert "no NVIDIA driver" in capsys.readouterr().err


def test_steps_between_numbers_are_counted_across_zero():
    numbers = np.array([1.0, -1.0, 0.0, np.nan], np.float32)
    above = np.nextafter(numbers, np.float32(np.inf))
    assert gpu_check.steps_apart(numbers, numbers).tolist() == [0] * 4
    assert gpu_check.steps_apart(above, numbers).tolist() == [1, 1, 1, 0]
    assert gpu_check.steps_apart(np.float32([-0.0, np.nan]), np.float32([0, 1])).tolist() == [
        0,
        2**32,
    ]
