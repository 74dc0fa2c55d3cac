"""The figures of the README's tables, as ``fastpair bench`` measures them on any machine.

Sizes follow those of the run: the README has them at the defaults, 100,000 rows and 128 columns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastpair.backend import memory_budget
from fastpair.bench_works import Works
from fastpair.files import Table, page_aligned
from fastpair.folding import fold
from fastpair.kernels import PRECISIONS, Plan, reference
from fastpair.model import Branch, Model, builtin

if TYPE_CHECKING:
    from fastpair.bench import Task

Summary = dict[str, Any]

LONGEST_FIGURE = 0.8
"""Seconds of repeats of a figure, about; three repeats it has in any case."""

MOST_PAIRS = 2_000_000
"""Random pairs of a figure, at most."""

MADE_ROWS = 1 << 14
"""Rows that are drawn; longer tables hold them again and again.

What a pair costs hangs on where its rows lie, not on what they hold.
"""

PRECISION_ROWS, PRECISION_PAIRS = 2_000, 20_000
"""Rows and pairs whose scores are compared with float64."""

PRECISION_HEADS = ("cosine", "max", "absdiff", "sqdiff")

NUMPY = "NumPy float32"
"""The same formula in NumPy on float32 arrays."""

LEAST_LEFT = 1.0
"""Seconds that must be left for a figure to begin."""


@dataclass(frozen=True)
class Figure:
    """One line of the README's table of speeds.

    Parameters
    ----------
    work : one of `bench_works.WORKS`.
    head : what the table is folded by.
    precision : of the table.
    rows, columns : of the table, as shares of those of the run.
    """

    work: str
    head: str
    precision: str
    rows: float
    columns: float

    @property
    def key(self) -> str:
        """Its name among the figures."""
        return f"{self.work} {self.head} {self.precision}"

    def shape(self, entities: int, columns: int) -> tuple[int, int]:
        """Return the rows and columns of its table."""
        return max(2, round(self.rows * entities)), max(1, round(self.columns * columns))


FIGURES = (
    Figure("top-k", "dot", "float32", 0.2, 1),
    Figure("threshold", "dot", "float32", 0.2, 1),
    Figure("top-k", "absdiff", "float32", 0.2, 1),
    Figure("pairs", "dot", "float32", 10, 1),
    Figure("pairs", "dot", "int8", 10, 1),
    Figure("pairs", "cosine", "float32", 10, 300 / 128),
)


def measure_figures(
    task: Task, entities: int, columns: int, compiled: Collection[str] = ()
) -> Summary:
    """Measure the figures that there is time and memory for, on the CPU.

    Parameters
    ----------
    task, entities, columns : of the run.
    compiled : heads of `PRECISION_HEADS` whose kernels are: they take next to no time, and come
        first.

    Returns
    -------
    figures : ``speed``, by `Figure.key`: a row of `Works.row` with ``head``, ``columns`` and
        ``kept_share``; ``precision``, by head and then by precision (and `NUMPY`): the
        ``greatest`` error of scores and the root of their mean square, ``rms``, in standard
        deviations of the scores.
    """
    precision = _measure_precision(task, [h for h in PRECISION_HEADS if h in compiled], columns)
    speed: Summary = {}
    for figure in FIGURES:
        shape = figure.shape(entities, columns)
        name = f"{figure.key} of {shape[0]:,} x {shape[1]}"
        if 3 * 4 * shape[0] * shape[1] > memory_budget():
            task.skipped.append(f"{name}: the memory is too small")
        elif task.fits(name, LEAST_LEFT):
            task.say(f"measuring {name}")
            with task.step():
                speed[figure.key] = _measured(task, figure, shape)
    rest = [head for head in PRECISION_HEADS if head not in compiled]
    precision |= _measure_precision(task, rest, columns)
    in_order = {head: precision[head] for head in PRECISION_HEADS if head in precision}
    return {"speed": speed, "precision": in_order}


def _measure_precision(task: Task, heads: Sequence[str], columns: int) -> Summary:
    task.say("measuring how far each precision is from float64")
    precision: Summary = {}
    for head in heads:
        if task.fits(f"precision of {head}", LEAST_LEFT):
            with task.step():
                precision[head] = precision_errors(head, max(1, round(300 / 128 * columns)))
    return precision


def _measured(task: Task, figure: Figure, shape: tuple[int, int]) -> Summary:
    rows, plan = folded(figure, shape, task.seed, task.threads)
    table = Table(rows, plan, None, "", figure.head, "both", "similarity", None, "")
    works = Works(Path("no file"), table, Path("no folder"), task)
    size = min(MOST_PAIRS, len(works.left)) if figure.work == "pairs" else len(rows)
    row = works.row(figure.work, min(LONGEST_FIGURE, task.left()), size)
    return {"head": figure.head, "columns": shape[1], **row}


def folded(
    figure: Figure, shape: tuple[int, int], seed: int, threads: int
) -> tuple[np.ndarray, Plan]:
    """Return the table of a figure, (rows, row_bytes) uint8, and its plan."""
    rng = np.random.default_rng(seed)
    made = rng.standard_normal((min(MADE_ROWS, shape[0]), shape[1]), dtype=np.float32)
    some, plan = fold(_model(figure.head, shape[1]), made, figure.precision, threads=threads)
    rows = page_aligned((shape[0], some.shape[1]))
    for start in range(0, len(rows), len(some)):
        rows[start : start + len(some)] = some[: len(rows) - start]
    return rows, plan


def _model(head: str, columns: int) -> Model:
    if head in ("cosine", "dot"):
        return builtin(head)
    weights = np.random.default_rng(1).standard_normal(columns)
    return Model([Branch(head, {"weight": weights})], columns)


# --- precision -----------------------------------------------------------------------------------


def precision_errors(
    head: str, columns: int, rows: int = PRECISION_ROWS, pairs: int = PRECISION_PAIRS
) -> Summary:
    """Return how far scores of each precision, and of NumPy in float32, are from float64.

    Rows are random, of length 1; a head weighs their columns at random. Errors are in standard
    deviations of the scores, so that a head's weights do not matter.

    Returns
    -------
    errors : by precision and `NUMPY`: ``greatest`` and ``rms`` over all pairs.
    """
    from fastpair.scoring import PairScorer

    model = _model(head, columns)
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((rows, columns))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    left, right = rng.integers(0, rows, (2, pairs))
    parts = np.array_split(np.arange(pairs), -(-pairs // 10_000))
    truth = np.concatenate(
        [model.score(embeddings[left[part]], embeddings[right[part]]) for part in parts]
    )

    def errors() -> Iterator[tuple[str, np.ndarray]]:
        for precision in PRECISIONS:
            table, plan = fold(model, embeddings, precision)
            if precision == "float32":
                yield NUMPY, _in_numpy(table, plan, left, right)
            yield precision, PairScorer(table, plan)(left, right)

    found = {}
    for name, scores in errors():
        error = (scores - truth) / truth.std()
        greatest, rms = np.abs(error).max(), np.sqrt((error**2).mean())
        found[name] = {"greatest": float(greatest), "rms": float(rms)}
    return found


def _in_numpy(rows: np.ndarray, plan: Plan, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the scores (m,) of a float32 table as plain NumPy computes them in float32."""
    values = {
        name: value.astype(np.float32) for name, value in reference.unpack_rows(rows, plan).items()
    }
    raw = np.float32(plan.constant) + values["bias"][left] + values["bias"][right]
    for name, sign, columns in reference.signed_runs(plan):
        part = values[name][:, columns]
        raw += np.float32(sign) * reference.terms(name, part[left], part[right]).sum(-1)
    return raw


# --- as Markdown ---------------------------------------------------------------------------------

HEADS = {"absdiff": "absolute difference"}
"""Heads that the README calls otherwise."""


def speed_label(figure: Figure, shape: tuple[int, int]) -> tuple[str, str, str]:
    """Return what the README's table calls a figure: what is done, on what, in which precision."""
    work = {
        "pairs": "random pairs",
        "top-k": "all pairs, best 10",
        "threshold": "all pairs, threshold",
    }
    table = f"{shape[0]:,} x {shape[1]}, {HEADS.get(figure.head, figure.head)}"
    return work[figure.work], table, figure.precision


def markdown(found: Summary) -> str:
    """Return the README's two tables from what `bench.bench` returned.

    Figures that there was no time for are left out, and named by ``skipped``.
    """
    settings, figures = found["settings"], found["figures"]
    energy = bool(found["energy"]["counters"])
    heads = ["work", "table", "precision", "million pairs/s (least to greatest)", "of the limit"]
    lines = _table_head([*heads, "J per million pairs"] if energy else heads)
    for figure in FIGURES:
        if figure.key in figures["speed"]:
            row = figures["speed"][figure.key]
            shape = figure.shape(settings["entities"], settings["columns"])
            cells = [*speed_label(figure, shape), _rate(row), f"{row['share']:.0%} {row['binds']}"]
            if energy:
                used = row["joules_per_million_pairs"]
                cells.append("" if used is None else f"{used['median']:.3g}")
            lines.append(f"| {' | '.join(cells)} |")
    names = [NUMPY, *PRECISIONS]
    lines += ["", *_table_head(["head", *names])]
    for head, errors in figures["precision"].items():
        cells = [f"{errors[name]['greatest']:.0e} ({errors[name]['rms']:.0e})" for name in names]
        lines.append(f"| `{head}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _table_head(names: list[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]


def _rate(row: Summary) -> str:
    rate = row["pairs_per_second"]
    median, low, high = (_short(rate[key] / 1e6) for key in ("median", "least", "greatest"))
    return f"{median} ({low} to {high})"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
