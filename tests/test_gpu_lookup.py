"""Soft lookup on a simulated GPU: a softmax over all keys, however devices and memory cut it."""

import json
from unittest.mock import patch

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_gpu import SimulatedRuntime, needs_compiler
from tables import products_only, random_plan, random_table, some_layout
from test_attention import assert_close, collect, pair_scores, softmax_means

import fastpair
from fastpair import device, gpu_lookup, jobs
from fastpair.attention import SoftLookup
from fastpair.cli import commands
from fastpair.errors import DeviceError, MemoryBudgetError
from fastpair.folding import fold
from fastpair.kernels import (
    LINKS,
    PRECISIONS,
    Network,
    Plan,
    RowLayout,
    gpu_attention,
    reference,
)
from fastpair.kernels.gpu import OutOfDeviceMemory
from fastpair.model import builtin

pytestmark = needs_compiler

SMALL = 64 * 2**20


@pytest.fixture(autouse=True)
def short_spans(monkeypatch):
    """Several spans of few keys, so that tests stay quick."""
    monkeypatch.setattr(gpu_lookup, "SPAN", 128)


def on_gpu(queries, keys, plan, values, *, devices=1, order=0, memory=1 << 28, **options):
    runtimes = [SimulatedRuntime(memory=memory, order=order + n, number=n) for n in range(devices)]
    options = {"threads": 1, "memory": SMALL, **options}
    return SoftLookup(queries, keys, plan, values, runtimes=runtimes, **options)


@pytest.mark.parametrize("order", [0, 1, 9])
@pytest.mark.parametrize("link", LINKS)
def test_outputs_are_softmax_means_of_the_scores(link, order):
    rng = np.random.default_rng(order)
    plan = random_plan(rng, some_layout(), link)
    queries, keys = (random_table(rng, count, plan, 0.3) for count in (150, 300))
    values = rng.normal(size=(300, 70)).astype(np.float32)  # two tiles of columns
    found = collect(on_gpu(queries, keys, plan, values, order=order, temperature=2))
    scores = pair_scores(queries, keys, plan)
    assert_close(found, softmax_means(scores, values, 2), values, 1e-6)


@settings(max_examples=8)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.tuples(st.integers(1, 140), st.integers(1, 400)),
    columns=st.integers(1, 130),
    temperature=st.sampled_from([0.01, 0.3, 5.0]),
    order=st.integers(0, 2**20),
)
def test_any_shape_and_temperature(seed, sizes, columns, temperature, order):
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, products_only(20, 3))
    queries, keys = (random_table(rng, count, plan, 0.3) for count in sizes)
    values = rng.normal(size=(len(keys), columns)).astype(np.float32)
    found = collect(on_gpu(queries, keys, plan, values, order=order, temperature=temperature))
    scores = pair_scores(queries, keys, plan)
    # A tile's score is some 1e-6 of its terms from the pair kernel's, and 2 e / T of a mean.
    means = softmax_means(scores, values, temperature)
    assert_close(found, means, values, 1e-6 + 1e-5 / temperature)


@pytest.mark.parametrize("precision", sorted(PRECISIONS))
def test_a_root_near_its_end_is_that_of_the_pair_kernel(precision):
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(150, 40)) + 3
    vectors[75:] = vectors[:75] + 1e-3 * rng.normal(size=(75, 40))  # nearly as near as oneself
    rows, plan = fold(builtin("euclidean"), vectors, precision=precision)
    values = np.eye(150, dtype=np.float32)
    found = collect(on_gpu(rows, None, plan, values, temperature=0.5, order=7))
    scores = reference.score_matrix(rows, rows, plan)
    assert_close(found, softmax_means(scores, values, 0.5), values, 2e-5)


@pytest.mark.parametrize("itself", [True, False])
def test_in_one_table_a_query_is_its_own_key_unless_it_is_left_out(itself):
    rng = np.random.default_rng(2)
    rows, plan = fold(builtin("cosine"), rng.normal(size=(300, 12)))
    values = rng.normal(size=(300, 9)).astype(np.float32)
    scores, kept = pair_scores(rows, rows, plan), np.full((300, 300), True)
    if not itself:
        np.fill_diagonal(kept, False)
    soft = on_gpu(rows, None, plan, values, temperature=0.05, itself=itself)
    assert_close(collect(soft), softmax_means(scores, values, 0.05, kept), values)
    for options in ({"top_k": 7}, {"threshold": 0.1}):
        cpu = SoftLookup(rows, None, plan, values, temperature=0.05, itself=itself, threads=1)
        assert collect(soft, **options).tobytes() == collect(cpu, **options).tobytes()


@pytest.mark.parametrize("link", ["identity", "negative_root"])
def test_bits_do_not_depend_on_devices_memory_or_other_queries(link):
    rng = np.random.default_rng(3)
    plan = random_plan(rng, some_layout(), link)
    queries, keys = (random_table(rng, count, plan, 0.3) for count in (200, 500))
    values = rng.normal(size=(500, 7)).astype(np.float32)
    whole = collect(on_gpu(queries, keys, plan, values))
    assert_close(whole, softmax_means(pair_scores(queries, keys, plan), values, 1), values)
    few = on_gpu(queries, keys, plan, values, devices=2, order=5, device_memory=900_000)
    assert collect(few).tobytes() == whole.tobytes()
    walks = [
        gpu_lookup.LookupWalk(few.runtimes[0], _sides(few), few, memory=900_000),
        gpu_lookup.LookupWalk(few.runtimes[0], _sides(few), few, memory=1 << 27),
    ]
    assert walks[0].chunk < 500
    assert walks[0].group < 200
    assert (walks[1].chunk, walks[1].group) == (500, 200)
    with patch.object(gpu_lookup, "_FILLING_BLOCKS", 1), patch.object(gpu_lookup, "TILE", 64):
        assert collect(on_gpu(queries, keys, plan, values)).tobytes() == whole.tobytes()
    parts = list(on_gpu(queries, keys, plan, values)(start=77))
    assert parts[0][0] == 77
    assert np.concatenate([part for _, part in parts]).tobytes() == whole[77:].tobytes()


def _sides(soft):
    return gpu_lookup.HostSides(soft.queries, soft.keys, soft.plan, "float32", 1, SMALL)


def test_a_device_with_less_memory_than_it_says_gives_the_same():
    rng = np.random.default_rng(4)
    plan = random_plan(rng, products_only(30))
    queries, keys = (random_table(rng, count, plan) for count in (150, 700))
    values = rng.normal(size=(700, 20)).astype(np.float32)
    whole = collect(on_gpu(queries, keys, plan, values))
    soft = on_gpu(queries, keys, plan, values, memory=180_000)
    soft.runtimes[0].free_memory = lambda: 1_000_000
    memories, shrink = [], gpu_lookup.LookupWalk._shrink

    def told(walk):
        shrink(walk)
        memories.append(walk.memory)

    with patch.object(gpu_lookup.LookupWalk, "_shrink", told):
        soft.runtimes[0].empty = limited(soft.runtimes[0], 180_000)
        assert collect(soft).tobytes() == whole.tobytes()
    assert len(memories) > 1


def limited(runtime, most):
    """`empty` of a runtime that has so many bytes, whatever it says."""

    def empty(shape, dtype):
        array = type(runtime).empty(runtime, shape, dtype)
        if sum(allocation.count for allocation in runtime._allocations) > most:
            raise OutOfDeviceMemory("no room")
        return array

    return empty


@pytest.mark.parametrize("size", [0.0, 1.0, 2e17])
@pytest.mark.parametrize("temperature", [1e-30, 1.0, 1e30])
def test_extreme_scores_and_temperatures_give_means_and_no_nan(size, temperature):
    rng = np.random.default_rng(5)
    queries, keys = (rng.normal(size=(count, 8)) * size for count in (20, 150))
    values = rng.normal(size=(150, 3)).astype(np.float32)
    (rows, plan), (others, _) = (fold(builtin("dot"), part) for part in (queries, keys))
    found = collect(on_gpu(rows, others, plan, values, temperature=temperature))
    assert np.isfinite(found).all()
    scores = pair_scores(rows, others, plan).astype(np.float64)
    gap = np.sort(scores, axis=1)
    clear = (gap[:, -1] - gap[:, -2]) / temperature > 100
    assert_close(found[clear], values[scores[clear].argmax(1)], values)
    if size == 0:
        assert_close(found, np.broadcast_to(values.mean(0, dtype=float), found.shape), values)


def test_tiles_that_overflow_score_as_the_pair_kernel_does():
    """Rows on two far sides: their differences are right, a tile's sums of squares are not."""
    rng = np.random.default_rng(7)
    plan = Plan(RowLayout(((0, 0),) * 4 + ((0, 20),), False))
    rows = random_table(rng, 150, plan)
    sides = np.where(np.arange(150) % 2, 1e19, -1e19)[:, None]
    columns = rows.view(plan.layout.dtype)[:, 0]["squared"]
    columns[:, :20] = sides + rng.integers(-9, 9, (150, 20)) * 1e13
    values = np.eye(150, dtype=np.float32)
    found = collect(on_gpu(rows, None, plan, values, temperature=1e27))
    scores = pair_scores(rows, rows, plan)
    assert np.isneginf(scores).sum() == 150 * 75
    assert_close(found, softmax_means(scores, values, 1e27), values)


def test_values_near_the_end_of_float32_do_not_overflow():
    values = np.full((200, 2), 3e38, np.float32)
    values[:, 1] *= -1
    rows, plan = fold(builtin("cosine"), np.ones((200, 3)))
    found = collect(on_gpu(rows[:5], rows, plan, values))
    np.testing.assert_allclose(found, values[:5], rtol=1e-5)


def test_a_query_without_a_key_is_nan():
    rows, plan = fold(builtin("cosine"), np.eye(4))
    values = np.ones((4, 2), np.float32)
    assert np.isnan(collect(on_gpu(rows[:1], None, plan, values[:1], itself=False))).all()
    assert np.isnan(collect(on_gpu(rows, rows[:0], plan, values[:0]))).all()
    assert list(on_gpu(rows[:0], rows, plan, values)()) == []


def test_a_network_scores_every_key_too():
    rng = np.random.default_rng(6)
    layer = rng.normal(size=(5, 24)), rng.normal(size=5)
    network = Network("features", (layer,), rng.normal(size=5))
    plan = Plan(RowLayout(((8, 0),) + ((0, 0),) * 4), 0.5, network=network)
    rows = random_table(rng, 50, plan)
    values = rng.normal(size=(50, 3)).astype(np.float32)
    found = collect(on_gpu(rows, None, plan, values, temperature=5, itself=False))
    kept = ~np.eye(50, dtype=bool)
    means = softmax_means(pair_scores(rows, rows, plan), values, 5, kept)
    assert_close(found, means, values)


def test_too_little_memory_is_said_in_one_sentence():
    plan = random_plan(np.random.default_rng(8), products_only(16, bias=False))
    rows = random_table(np.random.default_rng(8), 400, plan)
    values = np.ones((400, 50), np.float32)
    with pytest.raises(MemoryBudgetError, match="allow more with --device-memory"):
        next(on_gpu(rows, None, plan, values, device_memory=20_000)())
    wide = np.ones((1, 1_200_000), np.float32)
    with pytest.raises(MemoryBudgetError, match="allow more memory"):
        next(on_gpu(rows[:1], None, plan, wide)())


# --- how it is asked for --------------------------------------------------------------------------


@pytest.fixture
def one_gpu(monkeypatch):
    device.open_gpu.cache_clear()
    monkeypatch.setattr(device, "find_gpus", lambda: 1)
    monkeypatch.setattr(device, "_start", lambda number: SimulatedRuntime(number=number))
    yield
    device.open_gpu.cache_clear()


def summary_of(*arguments):
    done = CliRunner().invoke(commands, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_python_and_the_command_take_a_device(one_gpu, tmp_path):
    rng = np.random.default_rng(9)
    vectors, values = rng.normal(size=(60, 5)), rng.normal(size=(60, 4)).astype(np.float32)
    here = fastpair.lookup(vectors, None, values, 0.5, device="cpu")
    there = fastpair.lookup(vectors, None, values, 0.5, device="gpu", device_memory="1MiB")
    assert_close(there, here, values, 1e-6)
    np.save(tmp_path / "v.npy", vectors)
    np.save(tmp_path / "held.npy", values)
    jobs.project("cosine", tmp_path / "v.npy", tmp_path / "t.h5")
    job = ["matrix", tmp_path / "t.h5", "--lookup", tmp_path / "held.npy", "--temperature", "0.5"]
    made = summary_of(*job, "-o", tmp_path / "o.h5", "--device", "gpu", "--device-memory", "1MiB")
    assert made["device"] == "gpu:0"
    with h5py.File(tmp_path / "o.h5") as file:
        assert file["output"][:].tobytes() == there.tobytes()
    few = summary_of(*job, "-o", tmp_path / "auto.h5")
    assert few["device"] == "cpu"
    assert "fewer than a GPU is started for" in few["device_note"]


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(DeviceError, match="or use the device cpu"):
        fastpair.lookup(np.eye(3), None, np.eye(3), device="gpu:7")


def test_every_variant_is_named_once():
    found = list(gpu_attention.variants())
    assert len(set(found)) == len(found)
    assert {file for file, _, _ in found} == {"attention.cu"}
