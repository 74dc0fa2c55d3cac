"""Several ways to do one piece of work, timed in turn in one process on the same arrays.

Round 1 of every contender, then round 2 of every contender, and so on: whatever the machine does
meanwhile hits all alike. pytest-benchmark runs the rounds of one function after another; so the
rounds are run here, and each test then hands the durations of its contender to pytest-benchmark
through `passed`, a clock that replays them. Statistics, tables and files are pytest-benchmark's.
"""

from __future__ import annotations

import gc
import importlib
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

SETTLE = 0.05
"""Seconds of rest before each round: idle threads of some libraries keep spinning for a while."""


class WrongAnswer(Exception):
    """What a contender computed is not what was asked for."""


@dataclass
class Entry:
    """One contender, ready to run.

    Parameters
    ----------
    run : what is timed; the arrays that it needs are made.
    share : the part of the work that one run does; durations are divided by it.
    read : turns what `run` returned into what the work's check takes; not timed.
    tolerance : how far the scores may be from float64.
    amounts : what the whole work amounts to for this contender, beside the pairs: "bytes" that it
        must move, "operations" that it must do.
    check : takes the place of the work's own check of `read(run())`.
    """

    run: Callable[[], Any]
    share: float = 1.0
    read: Callable[[Any], Any] = lambda answer: answer
    tolerance: float = 2e-5
    amounts: dict[str, float] = field(default_factory=dict)
    check: Callable[[Any], None] | None = None


@dataclass(frozen=True)
class Contender:
    """Who does the work, and with which package."""

    name: str
    prepare: Callable[[Any], Entry]
    package: str | None = None
    most_rounds: int = 1_000_000
    remark: str = ""


@dataclass(frozen=True)
class Bar:
    """`ours` does at least `factor` times as much a second as `against`, one or the best of many.

    `by` says what is counted: "pairs", "bytes" or "operations".
    """

    factor: float
    against: tuple[str, ...]
    ours: str = "fastpair"
    by: str = "pairs"
    aim: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return what a file keeps."""
        return {name: getattr(self, name) for name in ("factor", "against", "ours", "by", "aim")}


@dataclass
class Outcome:
    """What came of one contender: durations in seconds of the whole work, or why there are none."""

    durations: list[float] = field(default_factory=list)
    entry: Entry | None = None
    missing: str = ""
    failure: str = ""


class Work:
    """One piece of work and all who do it.

    Parameters
    ----------
    title : what is done, sizes included.
    make : makes the arrays, from a scale: 1 for the sizes of the title.
    check : ``check(job, answer, tolerance)`` raises `WrongAnswer`.
    bars : what fastpair is to reach.
    absent : those who cannot do this work, and why.
    """

    def __init__(
        self,
        title: str,
        make: Callable[[float], Any],
        check: Callable[[Any, Any, float], None],
        bars: Iterable[Bar] = (),
        absent: dict[str, str] | None = None,
    ) -> None:
        self.title, self.make, self.check = title, make, check
        self.bars, self.absent = tuple(bars), dict(absent or {})
        self.contenders: dict[str, Contender] = {}

    def contender(
        self, name: str, package: str | None = None, **options: Any
    ) -> Callable[[Callable[[Any], Entry]], Callable[[Any], Entry]]:
        """Enter what the decorated function prepares; see `Contender` for the parameters."""

        def enter(prepare: Callable[[Any], Entry]) -> Callable[[Any], Entry]:
            self.contenders[name] = Contender(name, prepare, package, **options)
            return prepare

        return enter

    def contest(self, test: Callable[..., None]) -> Callable[..., None]:
        """Make a test one for each contender that was entered before."""
        test.work = self  # type: ignore[attr-defined]
        mark = pytest.mark.benchmark(group=self.title, timer=passed)
        return pytest.mark.parametrize("contender", list(self.contenders))(mark(test))


@dataclass
class Results:
    """What came of a work: an outcome a contender, and the sizes that were run."""

    sizes: dict[str, float]
    pairs: float
    outcomes: dict[str, Outcome]


def run_race(work: Work, names: Iterable[str], scale: float, rounds: int) -> Results:
    """Prepare and check the named contenders of a work, then time them in turn.

    Parameters
    ----------
    work : what is done.
    names : who takes part.
    scale : 1 for the sizes of the title, less for a trial.
    rounds : rounds of every contender, after one that is not counted and whose answer is checked.
    """
    job = work.make(scale)
    outcomes = {name: _prepared(work, work.contenders[name], job) for name in names}
    entries = {name: o.entry for name, o in outcomes.items() if o.entry is not None}
    for number in range(rounds):
        for name, entry in entries.items():
            if number < work.contenders[name].most_rounds and not outcomes[name].failure:
                outcomes[name].durations.append(_timed(entry.run) / entry.share)
    for entry in entries.values():  # frees the arrays; what it did is still told
        entry.run = entry.read = lambda *_: None
        entry.check = None
    return Results(job.sizes, job.pairs, outcomes)


def _prepared(work: Work, contender: Contender, job: Any) -> Outcome:
    """Let a contender make what it needs, run once and show that it is right."""
    if contender.package is not None:
        try:
            importlib.import_module(contender.package)
        except ImportError as error:
            return Outcome(missing=f"{contender.package}: {error}")
    try:
        entry = contender.prepare(job)
        answer = entry.read(entry.run())
        if entry.check is not None:
            entry.check(answer)
        else:
            work.check(job, answer, entry.tolerance)
    except Exception:
        return Outcome(failure=traceback.format_exc())
    return Outcome(entry=entry)


def _timed(run: Callable[[], Any]) -> float:
    gc.collect()
    time.sleep(SETTLE)
    start = time.perf_counter()
    answer = run()
    duration = time.perf_counter() - start
    del answer
    return duration


_PASSED = [0.0]


def passed() -> float:
    """Return the seconds that `replay` has let pass: the timer of every test of these suites."""
    return _PASSED[0]


def replay(benchmark: Any, durations: list[float]) -> None:
    """Hand durations that were measured in turn to pytest-benchmark, one round each."""
    waiting = iter(durations)

    def let_pass(seconds: float) -> None:
        _PASSED[0] += seconds

    benchmark.pedantic(let_pass, setup=lambda: ((next(waiting),), {}), rounds=len(durations))
