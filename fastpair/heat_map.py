"""A picture of all pairs: the scores of some entities with some, similar ones side by side."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastpair.errors import ArgumentError
from fastpair.files import Table, read_table
from fastpair.plots import check_matplotlib, clean, drawing, shortened
from fastpair.scoring import meet
from fastpair.staging import PARTIAL, check_output, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_SHOWN = 240
"""Entities of a side that are shown."""

PARTNERS = 5
"""Best partners that are shown with each entity that was drawn, where not all are shown."""

MOST_SEARCHED = 20_000
"""Entities among which partners are looked for."""

MOST_NAMED = 40
"""Ids that are written at a side, at most; of more entities, ids in equal steps."""

FORMATS = (".png", ".svg", ".pdf")
"""What a picture can be."""


def check_plot(plot: Path, *, overwrite: bool, inputs: list[Path]) -> None:
    """Refuse, before any work is done, a picture that cannot be made."""
    check_matplotlib()
    if plot.suffix.lower() not in FORMATS:
        raise ArgumentError(
            f"the plot {plot} ends in {plot.suffix!r}, expected one of {', '.join(FORMATS)}"
        )
    check_output(plot, overwrite=overwrite, inputs=inputs)


def plot_table(
    table: Path, against: Path | None, plot: Path, *, seed: int = 0, threads: int | None = None
) -> dict[str, Any]:
    """Draw the scores of entities of a table with each other, or with those of another one.

    Of many entities some are drawn at random, each with its best partners, so that there is
    something to see; what is similar comes side by side (average linkage of the rows of scores,
    optimal order of the leaves).

    Parameters
    ----------
    table, against : files of tables; the rows are mapped, not read.
    plot : .png, .svg or .pdf.
    seed : of the sample.

    Returns
    -------
    summary : ``plot``, ``plot_shape``, and ``plot_sampled``, whether entities were left out.
    """
    left, right = _tables(table, against)
    rng = np.random.default_rng(seed)
    rows = _sample(left, right, rng, threads)
    scores = _scores(left, right, *rows, threads)
    symmetric = right is None
    order = leaf_order(scores)
    other = order if symmetric else leaf_order(scores.T)
    names = [_names(left, rows[0][order]), _names(right or left, rows[1][other])]
    counts = [table.count for table in (left, right or left)]
    whole = [len(one) == count for one, count in zip(rows, counts, strict=True)]
    picture = heat_map(scores[np.ix_(order, other)], names, left.unit, counts)
    _save(picture, plot)
    return {
        "plot": str(plot),
        "plot_shape": list(scores.shape),
        "plot_sampled": not all(whole),
    }


def _tables(table: Path, against: Path | None) -> tuple[Table, Table | None]:
    left = read_table(table, random_access=False)
    right = None if against is None else read_table(against, random_access=False)
    if right is not None and (left.side, right.side) == ("right", "left"):
        left, right = right, left
    return left, right


def _sample(
    left: Table, right: Table | None, rng: np.random.Generator, threads: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the rows of both sides, rising."""
    sides = [_finite(one) for one in (left, right or left)]
    if all(len(side) <= MOST_SHOWN for side in sides):
        return sides[0], sides[1]
    drawn = np.sort(rng.permutation(sides[0])[: MOST_SHOWN // (PARTNERS + 1)])
    among = np.sort(rng.permutation(sides[1])[:MOST_SEARCHED])
    partners = np.unique(_best(left, right, drawn, among, threads))
    if right is not None:
        return drawn, partners
    both = np.union1d(drawn, partners)
    return both, both


def _finite(table: Table) -> np.ndarray:
    rows = np.arange(table.count)
    return rows if table.isolated is None else rows[~table.isolated[: table.count]]


def _folded(left: Table, right: Table | None, rows: np.ndarray, others: np.ndarray) -> Any:
    """Return copies of some rows of both sides, brought together, and their plan."""
    own, plan = left.rows[rows], left.plan
    if right is None:
        return own, left.rows[others], plan
    first, second, plan = meet(own, left.plan, right.rows[others], right.plan)
    return first, second, plan


def _best(
    left: Table, right: Table | None, drawn: np.ndarray, among: np.ndarray, threads: int | None
) -> np.ndarray:
    """Return the best partners of some entities among others, each once or more."""
    from fastpair.matrix import all_pairs

    own, others, plan = _folded(left, right, drawn, among)
    found = all_pairs(own, others, plan, threads=threads).top_k(min(PARTNERS + 1, len(among)))
    places = np.concatenate([part[2] for part in found])
    return among[places[places >= 0]]


def _scores(
    left: Table,
    right: Table | None,
    rows: np.ndarray,
    others: np.ndarray,
    threads: int | None,
) -> np.ndarray:
    from fastpair.matrix import all_pairs

    own, second, plan = _folded(left, right, rows, others)
    blocks = [block for _, block in all_pairs(own, second, plan, threads=threads).dense()]
    return np.concatenate(blocks).astype(np.float64)


def _names(table: Table, rows: np.ndarray) -> list[str]:
    if table.ids is None:
        return [str(row) for row in rows]
    return [str(table.ids[int(row)]) for row in rows]


def leaf_order(scores: np.ndarray) -> np.ndarray:
    """Return the order (N,) of the rows of scores in which similar rows are neighbours."""
    from scipy.cluster.hierarchy import leaves_list, linkage

    if len(scores) < 3 or not np.isfinite(scores).all():
        return np.arange(len(scores))
    return leaves_list(linkage(scores, "average", optimal_ordering=True))


def heat_map(scores: np.ndarray, names: list[list[str]], unit: str, counts: list[int]) -> Figure:
    """Return the figure of scores (N, N').

    Parameters
    ----------
    names : ids of rows and of columns; of many, some are written.
    unit : of the scores; log-odds are coloured by their sign.
    counts : entities that the tables hold.
    """
    from matplotlib.figure import Figure as Canvas

    with drawing():
        import matplotlib

        matplotlib.rcParams["text.parse_math"] = False
        canvas = Canvas(figsize=(9, 8), dpi=150, layout="constrained")
        axes = canvas.add_subplot()
        most = float(np.abs(scores).max(initial=1e-9))
        looks: Any = {"cmap": "viridis"}
        if unit == "log-odds":
            looks = {"cmap": "RdBu", "vmin": -most, "vmax": most}
        image = axes.imshow(scores, aspect="auto", interpolation="nearest", **looks)
        canvas.colorbar(image, label=f"score ({unit})", shrink=0.8)
        for axis, ids, count in zip((axes.yaxis, axes.xaxis), names, counts, strict=True):
            step = max(1, -(-len(ids) // MOST_NAMED))
            named = range(0, len(ids), step)
            axis.set_ticks(named, [shortened(clean(ids[one]), 24) for one in named])
            words = f"{len(ids):,} of {count:,} entities, similar ones side by side"
            axis.set_label_text(words + (f", one in {step} named" if step > 1 else ""))
            axis.set_tick_params(labelsize=8, length=0 if step == 1 else 3)
        axes.tick_params("x", rotation=90)
    return canvas


def _save(picture: Figure, plot: Path) -> None:
    """Write a figure, in the place of one that stood there once it is whole."""
    staged = plot.with_name(plot.name + PARTIAL)
    kind = plot.suffix.lower()[1:]
    dates: dict[str, Any] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with writing(plot), drawing():
        import matplotlib

        matplotlib.rcParams["svg.hashsalt"] = "heat map"
        try:
            picture.savefig(staged, format=kind, metadata=dates[kind])
            os.replace(staged, plot)
        finally:
            staged.unlink(missing_ok=True)
