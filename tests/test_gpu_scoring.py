"""Pair streams on simulated GPUs: the CPU's bits, whatever the memory, devices and blocks."""

import threading
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_gpu import SimulatedRuntime, SimulationError, needs_compiler
from tables import layouts, products_only, random_plan, random_table, some_layout

from fastpair import gpu_scoring, gpu_worker
from fastpair.agreement import cases
from fastpair.errors import ArgumentError, DataError, DeviceError, MemoryBudgetError
from fastpair.gpu_scoring import GpuPairScorer
from fastpair.gpu_worker import in_runs, narrow
from fastpair.heads import HEADS
from fastpair.kernels import LINKS, PRECISIONS
from fastpair.scoring import PairScorer

pytestmark = needs_compiler


@dataclass
class Block:
    left: np.ndarray
    right: np.ndarray


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    """Buffers of a few pairs, so that small lists go through all of them."""
    set_buffers(monkeypatch, 8, 64)


def set_buffers(monkeypatch, fewest, most):
    monkeypatch.setattr(gpu_worker, "FEWEST_AT_ONCE", fewest)
    monkeypatch.setattr(gpu_scoring, "FEWEST_AT_ONCE", fewest)
    monkeypatch.setattr(gpu_worker, "PAIRS_AT_ONCE", most)
    monkeypatch.setattr(gpu_scoring, "PAIRS_AT_ONCE", most)
    monkeypatch.setattr(gpu_worker, "FEWEST_ROWS", 4)


def some_table(precision="float32", rows=50, seed=0, link="identity"):
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, some_layout(precision), link)
    return random_table(rng, rows, plan), plan


def some_blocks(rows, sizes, seed=1, dtype=np.int32, others=None):
    rng = np.random.default_rng(seed)
    return [
        Block(rng.integers(0, rows, n).astype(dtype), rng.integers(0, others or rows, n))
        for n in sizes
    ]


def assert_same_bits(blocks, found, scorer):
    found = list(found)
    assert [block for block, _ in found] == blocks
    for block, scores in found:
        assert scores.tobytes() == scorer(block.left, block.right).tobytes()


@pytest.mark.parametrize("order", range(5))
@pytest.mark.parametrize("devices", [1, 3])
def test_a_stream_has_the_bits_of_the_cpu_in_the_order_of_the_blocks(order, devices):
    rows, plan = some_table()
    blocks = some_blocks(50, [200, 0, 1, 333, 64, 65, 7], dtype=np.int64)
    runtimes = [Dirty(order=order + n, number=n) for n in range(devices)]
    scorer = GpuPairScorer(rows, plan, devices=runtimes)
    assert scorer.resident
    assert_same_bits(blocks, scorer.stream(blocks), PairScorer(rows, plan))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("link", LINKS)
def test_every_precision_and_link_has_the_bits_of_the_cpu(precision, link):
    left, plan = some_table(precision, link=link)
    right = random_table(np.random.default_rng(5), 9, plan)
    blocks = some_blocks(50, [150, 30], others=9)
    scorer = GpuPairScorer(left, plan, right, plan, devices=[SimulatedRuntime(order=7)])
    assert_same_bits(blocks, scorer.stream(blocks), PairScorer(left, plan, right, plan))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_head_has_the_bits_of_the_cpu(precision):
    for case in cases(HEADS, [precision], entities=20, columns=12):
        blocks = some_blocks(20, [100, 17])
        scorer = GpuPairScorer(case.rows, case.plan, devices=[SimulatedRuntime(order=3)])
        assert_same_bits(blocks, scorer.stream(blocks), PairScorer(case.rows, case.plan))


@given(
    layout=layouts,
    rows=st.tuples(st.integers(1, 40), st.none() | st.integers(1, 40)),
    sizes=st.lists(st.integers(0, 150), max_size=5),
    memory=st.integers(1 << 13, 1 << 17),
    devices=st.integers(1, 3),
    sorted_left=st.booleans(),
    kind=st.sampled_from(["i1", "u1", "i2", "u4", "i4", "i8", "u8"]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40)
def test_memory_blocks_and_devices_do_not_show(
    layout, rows, sizes, memory, devices, sorted_left, kind, seed
):
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, layout)
    left = random_table(rng, rows[0], plan)
    right = None if rows[1] is None else random_table(rng, rows[1], plan)
    others = rows[1] or rows[0]
    blocks = some_blocks(rows[0], sizes, seed, kind, others)
    if sorted_left:
        for block in blocks:
            block.left.sort()
    runtimes = [SimulatedRuntime(memory, seed % 1000 + n, n) for n in range(devices)]
    try:
        scorer = GpuPairScorer(left, plan, right, devices=runtimes)
    except MemoryBudgetError:
        assert memory < 8 * plan.layout.row_bytes + 2000
        return
    assert_same_bits(blocks, scorer.stream(blocks), PairScorer(left, plan, right))


def test_tables_that_do_not_fit_are_walked_in_blocks_of_rows(monkeypatch):
    rows, plan = some_table(rows=100)
    monkeypatch.setattr(gpu_scoring, "MOST_SORTED", 300)
    blocks = some_blocks(100, [250, 100, 3, 800, 0, 9])
    for runtimes in (
        [SimulatedRuntime(rows.nbytes // 2, 4)],
        [SimulatedRuntime(rows.nbytes // 2, 4), SimulatedRuntime(2 * rows.nbytes, 5, 1)],
    ):
        scorer = GpuPairScorer(rows, plan, devices=runtimes, memory="64MiB")
        assert not scorer.resident
        assert_same_bits(blocks, scorer.stream(blocks), PairScorer(rows, plan))


def test_the_memory_of_a_device_is_kept_to(monkeypatch):
    set_buffers(monkeypatch, 8, 1 << 10)
    rows, plan = some_table(rows=100)
    blocks = some_blocks(100, [2000])
    for budget in (rows.nbytes + 600, rows.nbytes + 20_000, rows.nbytes // 3):
        runtime = Watched(memory=1 << 30)
        scorer = GpuPairScorer(rows, plan, devices=[runtime], device_memory=budget)
        assert scorer.resident == (budget > rows.nbytes)
        assert_same_bits(blocks, scorer.stream(blocks), PairScorer(rows, plan))
        assert runtime.most <= budget
    with pytest.raises(MemoryBudgetError, match=r"gpu:0 has no room .* 1000 bytes"):
        GpuPairScorer(rows, plan, devices=[SimulatedRuntime()], device_memory=1000)
    with pytest.raises(ArgumentError, match="device memory is 0"):
        GpuPairScorer(rows, plan, devices=[SimulatedRuntime()], device_memory=0)


class Dirty(SimulatedRuntime):
    """A device whose new arrays hold small numbers."""

    def empty(self, shape, dtype):
        array = super().empty(shape, dtype)
        array.data.reshape(-1).view(np.uint8)[:] = 0
        return array


class Watched(SimulatedRuntime):
    """Notes the greatest number of bytes that were in use."""

    most = 0

    def empty(self, shape, dtype):
        array = super().empty(shape, dtype)
        self.most = max(self.most, self.memory - self.free_memory())
        return array


class Crowded(SimulatedRuntime):
    """A device on which somebody else takes memory after a while."""

    grants = 1 << 30

    def empty(self, shape, dtype):
        self.grants -= 1
        if self.grants == 0:
            self.memory = self.memory - self.free_memory()  # now full
        return super().empty(shape, dtype)


def test_memory_that_runs_out_on_the_way_leads_to_smaller_blocks(monkeypatch):
    set_buffers(monkeypatch, 8, 1 << 10)
    rows, plan = some_table(rows=100)
    runtime = Crowded(memory=1 << 20)
    scorer = GpuPairScorer(rows, plan, devices=[runtime])
    assert scorer.resident
    runtime.grants = 3
    blocks = some_blocks(100, [700, 900])
    assert_same_bits(blocks, scorer.stream(blocks), PairScorer(rows, plan))
    assert runtime.grants < 0


def test_networks_keep_to_the_memory_too():
    (case,) = cases(["mlp"], ["float32"], entities=40, columns=12)
    blocks = some_blocks(40, [150, 60])
    runtime = Watched(memory=1 << 30)
    resident = GpuPairScorer(case.rows, case.plan, devices=[runtime])
    network = runtime.most - case.rows.nbytes
    for budget in (runtime.most, network + case.rows.nbytes // 2):
        runtime = Watched(memory=1 << 30)
        scorer = GpuPairScorer(case.rows, case.plan, devices=[runtime], device_memory=budget)
        assert scorer.resident == (budget >= network + case.rows.nbytes)
        assert_same_bits(blocks, scorer.stream(blocks), resident)
        assert runtime.most <= budget
    with pytest.raises(MemoryBudgetError, match="has no room"):
        GpuPairScorer(
            case.rows, case.plan, devices=[SimulatedRuntime()], device_memory=network // 2
        )


# --- what is refused ---


@pytest.mark.parametrize("memory", [1 << 20, 20_000])
@pytest.mark.parametrize("bad", [-1, 50, 2**31, 2**32 + 3, -(2**31) - 1, 2**40, 2**63])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_out_of_range_is_refused_in_the_words_of_the_cpu(bad, side, memory):
    rows, plan = some_table()
    (block,) = some_blocks(50, [300], dtype=np.int64)
    block.right = block.right.astype(np.int64)
    if bad == 2**63:
        block.left, block.right = block.left.astype(np.uint64), block.right.astype(np.uint64)
    getattr(block, side)[[170, 171, 299]] = bad
    scorer = GpuPairScorer(rows, plan, devices=[SimulatedRuntime(memory, 3)])
    assert scorer.resident == (memory > 20_000)
    good = some_blocks(50, [300])
    found = scorer.stream([*good, block])
    assert next(found)[0] is good[0]
    with pytest.raises(DataError, match=f"pair 170 has the {side} row number {bad}, ") as told:
        next(found)
    with pytest.raises(DataError) as expected:
        PairScorer(rows, plan)(block.left, block.right)
    assert str(told.value) == str(expected.value)
    assert scorer(good[0].left, good[0].right).shape == (300,)  # it still works


def test_the_least_pair_that_is_wrong_is_named_as_on_the_cpu(monkeypatch):
    rows, plan = some_table()
    (block,) = some_blocks(50, [300])
    for task in (gpu_worker, "fastpair.scoring"):
        name = "PAIRS_A_TASK"
        monkeypatch.setattr(task, name, 100) if task is gpu_worker else monkeypatch.setattr(
            f"{task}.{name}", 100
        )
    block.right[120], block.left[150], block.left[220] = 77, 88, 99
    for memory in (1 << 20, 20_000):
        scorer = GpuPairScorer(rows, plan, devices=[SimulatedRuntime(memory)])
        with pytest.raises(DataError) as told:
            scorer(block.left, block.right)
        with pytest.raises(DataError) as expected:
            PairScorer(rows, plan)(block.left, block.right)
        assert str(told.value) == str(expected.value)
        assert "pair 150" in str(told.value)


def test_what_is_no_list_of_row_numbers_is_refused():
    rows, plan = some_table()
    scorer = GpuPairScorer(rows, plan, devices=[SimulatedRuntime()])
    with pytest.raises(DataError, match="left row numbers are float64, expected integers"):
        scorer(np.array([0.5]), np.array([1]))
    with pytest.raises(ArgumentError, match="expected"):
        scorer(np.array([1, 2]), np.array([1]))
    with pytest.raises(ArgumentError, match="at least one GPU"):
        GpuPairScorer(rows, plan, devices=[])
    with pytest.raises(ArgumentError, match="at least one GPU"):
        GpuPairScorer(rows, plan, devices="cpu")


def test_a_failing_source_ends_the_stream_with_its_error_and_no_thread_stays():
    rows, plan = some_table()

    def blocks():
        yield from some_blocks(50, [100, 100])
        raise DataError("row 7 is broken")

    scorer = GpuPairScorer(rows, plan, devices=[SimulatedRuntime(), SimulatedRuntime(number=1)])
    with pytest.raises(DataError, match="row 7"):
        list(scorer.stream(blocks()))
    some = scorer.stream(some_blocks(50, [10] * 100))
    next(some)
    some.close()
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("fastpair-gpu")], names


def test_a_gpu_that_finds_fault_with_good_pairs_is_not_believed(monkeypatch):
    rows, plan = some_table()
    scorer = GpuPairScorer(rows, plan, devices=[SimulatedRuntime()])

    def accuse(runtime, table, left, right, scores, bad, stream, **_):
        runtime.fill(bad, 0, stream)

    monkeypatch.setattr("fastpair.kernels.gpu.score_pairs", accuse)
    numbers = np.arange(9, dtype=np.int32)
    for score, rows in ((scorer, numbers), (scorer.score_device, OnDevice(numbers))):
        with pytest.raises(DeviceError, match="gpu:0 says that pair 0 has a row number out of"):
            score(rows, rows)


def test_a_gpu_that_fails_is_told_in_one_sentence(monkeypatch):
    rows, plan = some_table()
    scorer = GpuPairScorer(rows, plan, devices=[SimulatedRuntime()])
    failure = type("CUDARuntimeError", (RuntimeError,), {"__module__": "cupy_backends.cuda"})

    def fail(*_, **__):
        raise failure("cudaErrorIllegalAddress:\n an illegal memory access was encountered")

    monkeypatch.setattr("fastpair.kernels.gpu.score_pairs", fail)
    with pytest.raises(DeviceError, match=r"^gpu:0 failed .*illegal memory access") as told:
        scorer(np.arange(9), np.arange(9))
    assert "\n" not in str(told.value)


# --- waits, runs, conversion ---


class Forgetful(SimulatedRuntime):
    """A device whose host code forgets one kind of wait."""

    forgotten = 0

    def wait(self, stream, event):
        self.waits = getattr(self, "waits", 0) + 1
        if self.waits % 2 != self.forgotten:
            super().wait(stream, event)


@pytest.mark.parametrize("forgotten", [0, 1, 2])
def test_the_simulation_finds_a_wait_that_is_left_out(forgotten):
    rows, plan = some_table()
    blocks = some_blocks(50, [300, 200, 300])
    expected = [PairScorer(rows, plan)(block.left, block.right) for block in blocks]
    wrong = 0
    for order in range(4):
        runtime = Forgetful(order=order)
        scorer = GpuPairScorer(rows, plan, devices=[runtime])
        runtime.waits, runtime.forgotten = 0, forgotten
        try:
            found = [scores for _, scores in scorer.stream(blocks)]
            wrong += any(a.tobytes() != b.tobytes() for a, b in zip(found, expected, strict=True))
        except (DataError, DeviceError, SimulationError):
            wrong += 1
            continue
        assert runtime.waits == 2 * 14  # two for each piece of 64 pairs
    assert (wrong > 0) == (forgotten < 2)  # 2: nothing is forgotten


@pytest.mark.parametrize("order", [0, 1, 5])
def test_equal_left_rows_in_a_row_are_found_and_give_the_same_bits(order):
    rows, plan = some_table()
    rng = np.random.default_rng(0)
    block = Block(np.sort(rng.integers(0, 50, 900)), rng.integers(0, 50, 900))
    assert in_runs(block.left)
    shuffled = Block(rng.permutation(block.left), block.right)
    assert not in_runs(shuffled.left)
    blocks = [block, shuffled]
    runtime = SimulatedRuntime(order=order)
    used = []
    scorer = GpuPairScorer(rows, plan, devices=[runtime])
    with pytest.MonkeyPatch.context() as patch:
        from fastpair.kernels import gpu

        real = gpu.score_pairs
        patch.setattr(
            gpu, "score_pairs", lambda *a, **k: (used.append(k["runs"]), real(*a, **k))[1]
        )
        assert_same_bits(blocks, scorer.stream(blocks), PairScorer(rows, plan))
    assert {True, False} == set(used)


@pytest.mark.parametrize("size", [0, 1, 2, 63, 64, 65, 128, 5000])
def test_runs_are_looked_for_in_lists_of_any_length(size):
    assert in_runs(np.zeros(size, int)) == (size > 1)
    assert not in_runs(np.arange(size))


@given(
    st.sampled_from(["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]).flatmap(
        lambda kind: st.lists(
            st.integers(int(np.iinfo(kind).min), int(np.iinfo(kind).max)), max_size=9
        ).map(lambda values: np.array(values, kind))
    ),
    st.sampled_from([np.int32, np.int64]),
)
def test_row_numbers_never_wrap(source, kind):
    target = np.empty(len(source), kind)
    narrow(source, target)
    most = np.iinfo(kind).max
    for given_number, copied in zip(source.tolist(), target.tolist(), strict=True):
        assert copied == given_number or (copied < 0 and not 0 <= given_number <= most)


# --- arrays that live on the device ---


class OnDevice:
    """What another library holds: known by its interface alone."""

    def __init__(self, array):
        self.array = array
        self.__cuda_array_interface__ = array.__array_interface__


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("runs", [False, True])
def test_arrays_of_the_device_are_scored_where_they_are(dtype, runs):
    rows, plan = some_table()
    (block,) = some_blocks(50, [700], dtype=dtype)
    left, right = OnDevice(block.left), OnDevice(block.right.astype(dtype))
    scores = np.full(700, np.nan, np.float32)
    out = OnDevice(scores)
    scorer = GpuPairScorer(rows, plan, devices=[SimulatedRuntime(order=2)])
    assert scorer.score_device(left, right, out, runs=runs) is out
    assert scores.tobytes() == PairScorer(rows, plan)(block.left, block.right).tobytes()
    made = scorer.score_device(left, right)
    assert made.data.tobytes() == scores.tobytes()


def test_arrays_of_the_device_are_checked_too():
    rows, plan = some_table()
    scorer = GpuPairScorer(rows, plan, devices=[SimulatedRuntime()])
    numbers = np.arange(40, dtype=np.int32)
    good = OnDevice(numbers)
    bad = OnDevice(np.where(numbers == 31, 50, numbers).astype(np.int32))
    with pytest.raises(DataError, match="pair 31 has the right row number 50, expected 0 to 49"):
        scorer.score_device(good, bad)
    for left, right, out in (
        (good, OnDevice(numbers[:5].copy()), None),
        (good, OnDevice(numbers.astype(np.int64)), None),
        (OnDevice(numbers.astype(np.int16)), OnDevice(numbers.astype(np.int16)), None),
        (good, good, OnDevice(np.empty(40))),
        (good, good, OnDevice(np.empty(39, np.float32))),
    ):
        with pytest.raises(ArgumentError, match="expected"):
            scorer.score_device(left, right, out)
    column = OnDevice(np.zeros((40, 2), np.int32)[:, 1])
    for left, right, side in ((column, good, "left"), (good, column, "right")):
        with pytest.raises(ArgumentError, match=f"{side} is an array .* not contiguous"):
            scorer.score_device(left, right)
    walked = GpuPairScorer(rows, plan, devices=[SimulatedRuntime(rows.nbytes // 2)])
    with pytest.raises(MemoryBudgetError, match="do not fit gpu:0"):
        walked.score_device(good, good)


def test_arrays_go_to_the_device_that_they_are_on():
    rows, plan = some_table()
    scorer = GpuPairScorer(rows, plan, devices=[SimulatedRuntime(), SimulatedRuntime(number=1)])
    (block,) = some_blocks(50, [40])
    expected = PairScorer(rows, plan)(block.left, block.right).tobytes()
    for place in ({"id": 1}, {"index": 1, "type": "cuda"}):
        left, right = (OnDevice(side.astype(np.int64)) for side in (block.left, block.right))
        left.device = SimpleNamespace(**place)
        scores = scorer.score_device(left, right)
        assert scores.runtime.number == 1
        assert scores.data.tobytes() == expected
    left.device.index = 2
    with pytest.raises(ArgumentError, match="left is on gpu:2, which is none"):
        scorer.score_device(left, right)


class Liar(SimulatedRuntime):
    """Says that the first pair has a row number out of range."""

    def fill(self, target, byte, stream):
        super().fill(target, 0, stream)


@pytest.mark.parametrize("walked", [False, True])
def test_a_device_that_sees_bad_row_numbers_where_there_are_none_is_not_trusted(
    walked, monkeypatch
):
    rows, plan = some_table()
    (block,) = some_blocks(50, [200])
    if walked:
        monkeypatch.setattr(gpu_worker, "FEWEST_AT_ONCE", 64)
        monkeypatch.setattr(gpu_worker, "FEWEST_ROWS", 8)
    memory = {"device_memory": 3 * (64 * 12 + 8) + rows.nbytes // 2} if walked else {}
    scorer = GpuPairScorer(rows, plan, devices=[Liar()], **memory)
    assert scorer.resident is not walked
    with pytest.raises(DeviceError, match="out of range, which it has not: do not trust"):
        scorer(block.left, block.right)
    if not walked:
        numbers = [OnDevice(array.astype(np.int32)) for array in (block.left, block.right)]
        with pytest.raises(DeviceError, match=r"pair 0 has .* do not trust"):
            scorer.score_device(*numbers)


def test_a_table_of_many_columns_is_scored():
    rng = np.random.default_rng(0)
    plan = random_plan(rng, products_only(300, 20, "float16"))
    rows = random_table(rng, 30, plan)
    blocks = some_blocks(30, [200])
    scorer = GpuPairScorer(rows, plan, devices=[SimulatedRuntime()])
    assert_same_bits(blocks, scorer.stream(blocks), PairScorer(rows, plan))
