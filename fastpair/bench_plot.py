"""The roofline of ``fastpair bench``: what works reach of what memory and arithmetic allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastpair.bench_works import MOVED_KINDS

Summary = dict[str, Any]

MARKS = {"pairs": "o", "stream": "s", "file": "P", "top-k": "^", "threshold": "v", "dense": "D"}

COLOURS = {"float32": "#0072b2", "float16": "#009e73", "bfloat16": "#d55e00", "int8": "#cc79a7"}
"""Colours that readers with any kind of colour vision tell apart (Okabe and Ito)."""

CEILINGS = {"fma": "float32", "bfloat16": "bfloat16", "int8": "int8"}
"""Limits of arithmetic, and the precision whose colour they have."""


def points(found: Summary) -> list[Summary]:
    """Return each row's operations a byte and operations a second, those of the CPU.

    Operations are those that a pair needs at least, bytes those of memory that it moves.
    """
    result = []
    for row in found["rows"]:
        needs, rate = row["needs_per_pair"], row["pairs_per_second"]
        moved = sum(number for kind, number in needs.items() if kind in MOVED_KINDS)
        done = sum(number for kind, number in needs.items() if kind not in MOVED_KINDS)
        if row["device"] == "cpu" and moved and done:
            named = {name: row[name] for name in ("work", "precision", "share", "binds")}
            spread = {key: rate[key] * done for key in ("median", "least", "greatest")}
            result.append({**named, "intensity": done / moved, "operations": spread})
    return result


def draw_roofline(found: Summary, path: Path) -> None:
    """Write the roofline as a picture.

    Parameters
    ----------
    found : what `bench.bench` returned.
    path : ``.png``, ``.svg`` or ``.pdf``, see `fastpair.heat_map.check_plot`; it is replaced.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(
        xscale="log",
        yscale="log",
        xlabel="operations a byte of memory (at least)",
        ylabel="operations a second",
    )
    marks = points(found)
    intensities = [mark["intensity"] for mark in marks] or [0.1, 10.0]
    span = np.geomspace(min(0.05, 0.5 * min(intensities)), 2 * max(10.0, *intensities), 200)
    limits, peak = found["limits"], 0.0
    read = limits["read"]["all"]["median"]
    for name, precision in CEILINGS.items():
        if limits[name] is None:
            continue
        most = limits[name]["all"]["median"]
        peak = max(peak, most)
        axes.plot(span, np.minimum(span * read, most), color=COLOURS[precision], lw=1)
        words = f"{name} {most / 1e9:.0f} G/s"
        axes.annotate(words, (span[-1], most), ha="right", va="bottom", fontsize=8)
    random = limits["random"]["all"]["median"]
    axes.plot(span, np.minimum(span * random, peak), color="0.6", lw=1, ls="--")
    words = f"memory: {read / 1e9:.0f} GB/s in order, {random / 1e9:.0f} at random (dashed)"
    axes.text(0.02, 0.97, words, transform=axes.transAxes, va="top", fontsize=8)
    for mark in marks:
        done = mark["operations"]
        below, above = done["median"] - done["least"], done["greatest"] - done["median"]
        axes.errorbar(
            mark["intensity"],
            done["median"],
            [[below], [above]],
            fmt=MARKS[mark["work"]],
            color=COLOURS[mark["precision"]],
            ms=7,
            mec="white",
            mew=0.6,
        )
    works = [name for name in MARKS if any(mark["work"] == name for mark in marks)]
    used = [name for name in COLOURS if any(mark["precision"] == name for mark in marks)]
    entries = [Line2D([], [], marker=MARKS[name], color="0.3", ls="", label=name) for name in works]
    entries += [Line2D([], [], color=COLOURS[name], lw=3, label=name) for name in used]
    axes.legend(handles=entries, fontsize=8, ncols=2, loc="lower right", frameon=False)
    axes.set_title(
        f"{found['machine']['cpu']}, {found['settings']['threads']} threads", fontsize=10
    )
    axes.grid(visible=True, which="major", color="0.9", lw=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
