"""The pair stream: every block scored once, in order, and nothing out of range reaches a kernel."""

from dataclasses import dataclass

import numpy as np
import pytest
from tables import random_plan, random_table, some_layout

from fastpair.backend import memory_budget, parse_size, read_ahead, run_ordered, thread_count
from fastpair.errors import ArgumentError, DataError, MismatchError
from fastpair.folding import fold
from fastpair.kernels import reference
from fastpair.model import Branch, Model
from fastpair.scoring import PairScorer, distance_form, meet


@dataclass
class Block:
    left: np.ndarray
    right: np.ndarray


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    plan = random_plan(rng, some_layout())
    return random_table(rng, 50, plan), plan


@pytest.mark.parametrize("threads", [1, 3])
def test_a_stream_gives_each_block_its_scores_in_order(table, threads):
    rows, plan = table
    rng = np.random.default_rng(1)
    blocks = [
        Block(rng.integers(0, 50, n), rng.integers(0, 50, n)) for n in (200_000, 0, 1, 70_000)
    ]
    results = list(PairScorer(rows, plan, threads=threads).stream(blocks))
    assert [block for block, _ in results] == blocks
    for block, scores in results:
        expected = reference.score_pairs(rows, rows, block.left, block.right, plan)
        size = reference.magnitudes(rows, rows, block.left, block.right, plan)
        assert (np.abs(scores - expected) <= 1e-5 * size).all()


def test_left_and_right_tables_keep_their_sides(table):
    left, plan = table
    right = random_table(np.random.default_rng(2), 7, plan)
    scores = PairScorer(left, plan, right, plan)(np.array([49, 0]), np.array([6, 3]))
    expected = reference.score_pairs(left, right, np.array([49, 0]), np.array([6, 3]), plan)
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
    with pytest.raises(DataError, match="right row number 7, expected 0 to 6"):
        PairScorer(left, plan, right, plan)(np.array([1]), np.array([7]))


@pytest.mark.parametrize("bad", [-1, 50, 2**40])
def test_a_row_out_of_range_never_reaches_a_kernel(table, bad):
    rows, plan = table
    scorer = PairScorer(rows, plan)
    left, right = np.array([3, 4, bad]), np.array([1, 2, 3])
    with pytest.raises(DataError, match=f"pair 2 has the left row number {bad}"):
        scorer(left, right)
    with pytest.raises(DataError, match="right row number"):
        list(scorer.stream([Block(right, left)]))
    with pytest.raises(DataError, match="expected integers"):
        scorer(np.array([0.5]), np.array([1.0]))


def test_tables_of_different_plans_do_not_meet(table):
    rows, plan = table
    other = random_plan(np.random.default_rng(9), some_layout("bfloat16"))
    with pytest.raises(MismatchError, match="project both again"):
        meet(rows, plan, random_table(np.random.default_rng(9), 5, other), other)


def test_a_failing_source_ends_the_stream_with_its_error(table):
    rows, plan = table

    def blocks():
        yield Block(np.array([1]), np.array([2]))
        raise DataError("row 7 is broken")

    with pytest.raises(DataError, match="row 7"):
        list(PairScorer(rows, plan).stream(blocks()))


def test_work_is_handed_out_ahead_but_never_without_bound():
    begun = []

    def work(n):
        begun.append(n)
        return n * n

    results = run_ordered(work, iter(range(100)), threads=2, ahead=2)
    assert next(results) == 0
    assert max(begun) <= 4
    assert list(results) == [n * n for n in range(1, 100)]
    assert list(read_ahead(iter("abc"))) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 512 * 2**20), ("2GB", 2 * 10**9), ("1.5 gib", 3 * 2**29), ("100000000", 10**8)],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text) == size
    assert memory_budget(text) == size


@pytest.mark.parametrize("text", ["much", "-1GB", "12 parsecs", "", "1MiB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ArgumentError, match="memory is"):
        memory_budget(text)


def test_there_is_a_thread_for_each_processor_unless_told():
    assert thread_count(3) == 3
    assert thread_count() >= 1
    assert 0 < memory_budget() < 2**60
    with pytest.raises(ArgumentError, match="threads is 0"):
        thread_count(0)


@pytest.mark.parametrize(("head", "power"), [("absdiff", 1), ("sqdiff", 2)])
def test_learned_differences_are_distances_under_the_calibrated_weights(head, power):
    rng = np.random.default_rng(3)
    z, weight = rng.normal(size=(9, 4)), -rng.exponential(size=4)
    model = Model([Branch(head, {"weight": weight})], 4).calibrated(3.0, 1.5)
    rows, plan = fold(model, z)
    left, right = np.divmod(np.arange(81), 9)
    apart = distance_form(plan)(PairScorer(rows, plan)(left, right))
    sums = (np.abs(z[left] - z[right]) ** power) @ (-3 * weight)
    np.testing.assert_allclose(apart, sums ** (1 / power), rtol=1e-4, atol=2e-3)


def test_sums_of_both_differences_or_of_weights_above_0_are_no_distance():
    below, above = ({"weight": np.full(4, value)} for value in (-1.0, 1.0))
    for branches in (
        [Branch("absdiff", below), Branch("sqdiff", below)],
        [Branch("absdiff", above)],
        [Branch("absdiff", below), Branch("sum", below)],
    ):
        assert distance_form(fold(Model(branches, 4), np.eye(4))[1]) is None
