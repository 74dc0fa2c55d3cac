"""What was measured, as lines of text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from fastpair.cli.shared import Summary
from fastpair.wording import gain_lines, group_table, metric_table, property_lines

BLOCKS = " ▁▂▃▄▅▆▇█"
"""Heights of the characters that curves in the terminal are made of."""

CURVE_WIDTH = 48
"""Characters of such a curve, at most."""


def evaluation_lines(summary: Summary) -> list[str]:
    """Put what `jobs.evaluate` found into words and tables."""
    good = "" if summary["n_good"] is None else f", {summary['n_good']} of them good"
    lines = [f"{summary['n_pairs']} pairs{good}", *aligned(metric_table(summary))]
    lines += gain_lines(summary)
    if "entities" in summary:
        lines += ["", *aligned(group_table(summary["entities"], "entities in training"))]
    for column, groups in summary["by"].items():
        lines += ["", *aligned(group_table(groups, column))]
    if "properties" in summary:
        lines += ["", *property_lines(summary["properties"])]
        lines += [
            f"raw cosine: {line}"
            for line in property_lines(summary["raw_cosine"]["properties"])
            if not line.startswith("symmetry")
        ]
    return lines


def aligned(rows: list[list[str]]) -> list[str]:
    """Lay cells out in columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return [line.rstrip() for line in lines]


def metric_lines(metrics: Summary, name: str) -> list[str]:
    """Put metrics into one line, or none where there are none."""
    shown = [
        f"{key.replace('_', ' ')} {metrics[key]:.4f}"
        for key in ("auc", "average_precision", "spearman", "f1", "log_loss", "brier")
        if metrics.get(key) is not None
    ]
    return [f"{name}: {', '.join(shown)}"] if shown else []


def history_lines(history: Sequence[Summary], metric: str, arm: str | None = None) -> list[str]:
    """Draw the loss and the validation metric over the epochs of one arm, a line each.

    Parameters
    ----------
    history : one entry an epoch.
    metric : name of the validation metric.
    arm : whose epochs; None: all.
    """
    epochs = [one for one in history if arm is None or one.get("arm") == arm]
    if len(epochs) < 2:
        return []
    rows = []
    for key in ("loss", metric):
        values = [float(entry[key]) for entry in epochs]
        rows.append([key.replace("_", " "), f"{values[0]:.4g}", curve(values), f"{values[-1]:.4g}"])
    whose = "" if arm is None else f" of arm {arm}"
    return [f"{len(epochs)} epochs{whose}:", *aligned(rows)]


def curve(values: Sequence[float]) -> str:
    """Draw values as one line of characters, each as high as its value."""
    step = max(1, -(-len(values) // CURVE_WIDTH))
    means = [
        sum(part) / len(part)
        for part in (values[i : i + step] for i in range(0, len(values), step))
    ]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BLOCKS[1 + round((value - low) / span * (len(BLOCKS) - 2))] for value in means)
