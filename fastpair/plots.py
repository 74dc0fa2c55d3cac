"""Figures by matplotlib, as SVG that stands inside a page and takes its colours from the page.

Every figure is made without any state of matplotlib's own, so that equal numbers give equal text.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from fastpair.curves import BAND, Curve, Plane, Reliability
from fastpair.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "#010203": "var(--ink)",
    "#020304": "var(--soft)",
    "#030405": "var(--line)",
    "#040506": "var(--first)",
    "#050607": "var(--second)",
    "#060708": "var(--paper)",
}
"""What is drawn in the colours on the left takes those of the page on the right."""

INK, SOFT, LINE, FIRST, SECOND, PAPER = COLOURS

SIZE = (4.6, 3.5)
"""Inches of a figure, of 72 units each."""

STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 2,
}

SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"

NO_CHARACTER = re.compile("[^\\t\\n\\r\\x20-\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]")
"""What XML and pages cannot hold."""


def clean(text: object) -> str:
    """Return text with every character that a page cannot hold replaced."""
    return NO_CHARACTER.sub("\ufffd", str(text))


def check_matplotlib() -> None:
    """Refuse to draw where matplotlib is missing, with what to install."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ArgumentError(
            "figures are drawn by matplotlib, which is not installed: "
            "pip install 'fastpair[report]'"
        ) from error


@contextmanager
def drawing() -> Iterator[None]:
    """Set matplotlib up for one figure, whatever the user's own settings are."""
    import matplotlib

    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        yield


@dataclass(frozen=True)
class Figure:
    """A figure as text.

    Parameters
    ----------
    name : what begins every id in it.
    svg : the element.
    moves : (x, y) units of the figure for one unit of its axes, for parts that a script moves.
    """

    name: str
    svg: str
    moves: tuple[float, float]


Draw = Callable[["Axes"], None]


def figure(
    name: str, words: str, draw: Draw, size: tuple[float, float] = SIZE, grid: str = "both"
) -> Figure:
    """Draw one figure with one pair of axes.

    Parameters
    ----------
    name : begins every id.
    words : what is to be seen, for those who cannot see it.
    draw : draws into the axes.
    size : width and height in inches.
    grid : along which axes there are lines: "both", "x", "y" or "none".
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with drawing():
        matplotlib.rcParams.update(STYLE)
        matplotlib.rcParams["svg.hashsalt"] = name
        canvas = Canvas(figsize=size, dpi=72, layout="constrained")
        axes = canvas.add_subplot()
        axes.grid(grid != "none", axis="both" if grid == "none" else grid)  # type: ignore[arg-type]
        draw(axes)
        text = io.StringIO()
        canvas.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        corner, unit = axes.transData.transform([(0, 0), (1, 1)])
    moves = (float(unit[0] - corner[0]), float(corner[1] - unit[1]))
    return Figure(name, _for_page(text.getvalue(), name, words), moves)


def _for_page(text: str, name: str, words: str) -> str:
    """Make of a file of SVG an element of a page: its own ids, the page's colours and fonts."""
    root = ElementTree.fromstring(text)
    for one in root.findall(f"{SVG}metadata"):
        root.remove(one)
    parts = ["width", "height", "version"]
    root.attrib = {key: value for key, value in root.attrib.items() if key not in parts}
    root.attrib |= {"role": "img", "aria-label": clean(words)}
    for element in root.iter():
        if "id" in element.attrib:
            element.attrib["id"] = f"{name}-{element.attrib['id']}"
        for key in (LINK, "clip-path"):
            if key in element.attrib:
                value = element.attrib.pop(key).replace("#", f"#{name}-")
                element.attrib["href" if key == LINK else key] = value
        if "style" in element.attrib:
            element.attrib["style"] = _style(element.attrib["style"])
        element.tag = element.tag.removeprefix(SVG)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _style(style: str) -> str:
    style = re.sub(r"font: (?:\w+ )*?([0-9.]+px)[^;]*", r"font-size: \1", style)
    for drawn, shown in COLOURS.items():
        style = style.replace(drawn, shown)
    return style


# --- figures --------------------------------------------------------------------------------------


def ranking_figure(
    name: str,
    words: str,
    curves: dict[str, Curve],
    labels: tuple[str, str],
    point: tuple[float, float] | None,
    chance: Sequence[tuple[float, float]] = (),
) -> Figure:
    """Draw ROC or precision-recall curves, the first with its band; a point can be moved.

    Parameters
    ----------
    curves : by what they are called, the model first.
    labels : of the two axes.
    point : where the threshold in use lies.
    chance : two points of the line that chance would give.
    """

    def draw(axes: Axes) -> None:
        if chance:
            axes.plot(*zip(*chance, strict=True), color=SOFT, linewidth=1, linestyle=":")
        looks = ((FIRST, "-", 2.2), (SECOND, "--", 1.8))
        for (called, curve), (colour, dashes, width) in zip(curves.items(), looks, strict=False):
            if curve.low is not None and curve.high is not None:
                axes.fill_between(
                    BAND, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0
                )
            axes.plot(
                curve.x, curve.y, color=colour, linestyle=dashes, linewidth=width, label=called
            )
        if point is not None:
            _movable(axes, point)
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel=labels[0], ylabel=labels[1])
        axes.legend(loc="lower right" if name == "roc" else "best")

    return figure(name, words, draw)


def _movable(axes: Axes, point: tuple[float, float]) -> None:
    """Draw the point of the threshold in use, which a script may move."""
    axes.plot(
        *([at] for at in point),
        marker="o",
        markersize=8,
        markerfacecolor=PAPER,
        markeredgecolor=INK,
        markeredgewidth=2,
        linestyle="none",
        gid="mark",
        zorder=5,
        clip_on=False,
    )


def histogram_figure(
    scores: np.ndarray, truth: np.ndarray, threshold: float, unit: str, marked: str
) -> Figure:
    """Draw how scores of good and of bad pairs are spread, each as shares of its own kind."""
    low, high = float(scores.min()), float(scores.max())
    edges = np.linspace(low, high if high > low else low + 1, 46)

    def draw(axes: Axes) -> None:
        for kind, which, colour in (("bad", ~truth, SECOND), ("good", truth, FIRST)):
            if which.any():
                share = 100 * np.histogram(scores[which], edges)[0] / which.sum()
                axes.stairs(share, edges, fill=True, color=colour, alpha=0.35)
                axes.stairs(share, edges, color=colour, linewidth=1.6, label=f"{kind} pairs")
        axes.axvline(threshold, color=INK, linewidth=1.6, gid="mark", label=marked)
        axes.set(xlabel=f"score ({unit})", ylabel="% of the pairs of each kind")
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper right")

    words = "Histogram of the scores of good and of bad pairs, with a line at the threshold."
    return figure("histogram", words, draw, size=(6.2, 3.1), grid="y")


def reliability_figure(after: Reliability, before: Reliability | None) -> Figure:
    """Draw how often pairs of a probability are good, after and before calibration."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=":")
        parts = [(after, FIRST, "-", "o", "after calibration")]
        if before is not None:
            parts.insert(0, (before, SECOND, "--", "s", "before calibration"))
        for found, colour, dashes, marker, called in parts:
            spread = np.abs(np.stack([found.came - found.low, found.high - found.came]))
            axes.errorbar(
                found.said,
                found.came,
                yerr=spread,
                color=colour,
                linestyle=dashes,
                marker=marker,
                markersize=5,
                linewidth=1.8,
                elinewidth=1,
                label=called,
            )
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
        axes.set(xlabel="mean predicted probability", ylabel="share of good pairs")
        axes.legend(loc="upper left")

    words = "Reliability: share of good pairs over the predicted probability, in ten bins."
    return figure("reliability", words, draw)


def grades_figure(
    name: str, scores: np.ndarray, labels: np.ndarray, called: str, unit: str, first: bool
) -> Figure:
    """Draw scores over grades, one dot a pair, and the mean score along the grades."""
    colour = FIRST if first else SECOND

    def draw(axes: Axes) -> None:
        axes.plot(labels, scores, ".", color=colour, markersize=3.5, alpha=0.45, markeredgewidth=0)
        low, high = labels.min(), labels.max()
        edges = np.linspace(low, high if high > low else low + 1, 11)
        bins = np.clip(np.searchsorted(edges, labels, side="right") - 1, 0, 9)
        counts = np.bincount(bins, minlength=10)
        kept = counts > 0
        means = [np.bincount(bins, of, 10)[kept] / counts[kept] for of in (labels, scores)]
        axes.plot(*means, color=INK, linewidth=1.6, marker="o", markersize=4, label="mean score")
        axes.set(xlabel="grade in the pair file", ylabel=f"{called} ({unit})")
        axes.legend(loc="upper left")

    words = f"Scatter of the score of {called} over the grade, with the mean score."
    return figure(name, words, draw)


def plane_figure(
    name: str, title: str, plane: Plane, lines: dict[str, np.ndarray], both: bool
) -> Figure:
    """Draw entities as dots and pairs of them as lines."""

    def draw(axes: Axes) -> None:
        from matplotlib.collections import LineCollection

        for points in (plane.left, plane.right) if both else (plane.left,):
            axes.plot(*points.T, ".", color=SOFT, markersize=3.5, alpha=0.55, markeredgewidth=0)
        looks = {"bad": (SECOND, "--", 0.9, 0.55), "good": (FIRST, "-", 1.8, 0.95)}
        for kind, (colour, dashes, width, alpha) in looks.items():
            ends = lines[kind]
            if len(ends):
                segments = np.stack([plane.left[ends[:, 0]], plane.right[ends[:, 1]]], axis=1)
                axes.add_collection(
                    LineCollection(
                        list(segments),
                        colors=colour,
                        linestyles=dashes,
                        linewidths=width,
                        alpha=alpha,
                        label=f"{kind} pairs",
                    )
                )
                axes.plot(
                    *segments.reshape(-1, 2).T, ".", color=colour, markersize=4, markeredgewidth=0
                )
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel(f"two directions with {100 * plane.share:.0f} % of the variance")
        axes.margins(0.04)
        axes.legend(loc="best")

    words = f"{title}: entities in two dimensions, lines between those of good and of bad pairs."
    return figure(name, words, draw, grid="none", size=(4.6, 4.2))


@dataclass(frozen=True)
class Group:
    """One row of `groups_figure`: a name, and value and interval by what was measured."""

    name: str
    measured: dict[str, tuple[float, Sequence[float] | None]] = field(default_factory=dict)


def groups_figure(name: str, words: str, groups: Sequence[Group], label: str) -> Figure:
    """Draw values with their intervals, one line for each group of pairs."""
    called = list(dict.fromkeys(key for group in groups for key in group.measured))
    looks = [(FIRST, "o"), (SECOND, "s")]

    def draw(axes: Axes) -> None:
        for number, (key, (colour, marker)) in enumerate(zip(called, looks, strict=False)):
            shift = 0.16 * (1 - 2 * number) if len(called) > 1 else 0
            having = [row for row, group in enumerate(groups) if key in group.measured]
            for row in having:
                value, interval = groups[row].measured[key]
                at = len(groups) - 1 - row + shift
                if interval is not None:
                    axes.plot(interval, [at, at], color=colour, linewidth=1.6)
                axes.plot(
                    [value],
                    [at],
                    marker=marker,
                    color=colour,
                    markersize=6,
                    linestyle="none",
                    label=key if row == having[0] else None,
                )
        names = [shortened(group.name, 24) for group in groups]
        axes.set_yticks(range(len(groups))[::-1], names)
        axes.set(xlabel=label, ylim=(-0.6, len(groups) - 0.4))
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)

    return figure(name, words, draw, size=(4.6, 1.3 + 0.34 * len(groups)), grid="x")


def history_figures(epochs: Sequence[dict[str, Any]], metric: str, called: str) -> list[Figure]:
    """Draw the loss and the validation metric of each arm over its epochs."""
    arms = list(dict.fromkeys(str(entry.get("arm", "")) for entry in epochs))[:4]
    dashes = ["-", "--", ":", "-."]
    figures = []
    for name, key, label in (("loss", "loss", "loss"), ("curve", metric, called)):

        def draw(axes: Axes, key: str = key, label: str = label) -> None:
            from matplotlib.ticker import MaxNLocator

            colours = [FIRST, SECOND, INK, SOFT]
            for arm, line, colour in zip(arms, dashes, colours, strict=False):
                own = [e for e in epochs if str(e.get("arm", "")) == arm and _number(e, key)]
                axes.plot(
                    [entry["epoch"] for entry in own],
                    [entry[key] for entry in own],
                    linestyle=line,
                    color=colour,
                    marker="." if len(own) < 3 else None,
                    label=f"arm {arm}" if arm else None,
                )
            axes.set(xlabel="epoch", ylabel=label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if len(arms) > 1:
                axes.legend(loc="best")

        words = f"{label} over the epochs of training."
        if any(_number(entry, key) for entry in epochs):
            figures.append(figure(name, words, draw, size=(4.6, 3.0)))
    return figures


def _number(entry: dict[str, Any], key: str) -> bool:
    return isinstance(entry.get(key), int | float)


def shortened(text: str, most: int) -> str:
    """Cut text to so many characters."""
    text = clean(text)
    return text if len(text) <= most else text[: most - 1] + "…"
