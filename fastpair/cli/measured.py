"""What was measured, put into words and tables."""

from __future__ import annotations

from fastpair.cli.shared import Summary

METRICS = {
    "auc": "AUC",
    "average_precision": "average precision",
    "spearman": "Spearman",
    "pearson": "Pearson",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "eer": "equal error rate",
    "log_loss": "log loss",
    "brier": "Brier score",
    "ece": "calibration error",
    "rmse": "root mean square error",
    "mae": "mean absolute error",
}
"""Metrics in the order in which they are printed, and what they are called."""

SIMILARITIES = {
    "raw_cosine": "raw cosine",
    "unlabelled_pca": "unlabelled PCA",
    "biases_alone": "biases alone",
}
"""What stands beside the model, where it is there."""


def evaluation_lines(summary: Summary) -> list[str]:
    """Put what `jobs.evaluate` found into words and tables."""
    good = "" if summary["n_good"] is None else f", {summary['n_good']} of them good"
    beside = {name: words for name, words in SIMILARITIES.items() if name in summary}
    others = [summary[name] for name in beside]
    rows = [["", "model", *beside.values()]]
    graded = summary["auc"] is None or "spearman" in summary.get("intervals", {})
    for key, name in METRICS.items():
        if summary.get(key) is None or (key in ("spearman", "pearson") and not graded):
            continue
        if key in ("f1", "precision", "recall"):
            name += f" at {summary['threshold']:.4g}"
        rows.append([name, *(_shown(metrics, key) for metrics in (summary, *others))])
    found = summary["recall_at"]
    for k in found.get("model", {}):
        cells = [_number(found[name][k]) for name in ("model", *beside)]
        rows.append([f"recall in the best {k}", *cells])
    lines = [f"{summary['n_pairs']} pairs{good}", *aligned(rows)]
    for name, words in beside.items():
        gain = summary[name].get("gain", {})
        for key in ("average_precision", "spearman"):
            if key in gain:
                shown = _number(gain[key], "+")
                lines.append(f"gain in {METRICS[key]} over the {words}: {shown}")
    if "entities" in summary:
        lines += ["", *_group_lines(summary["entities"], "entities in training")]
    for column, groups in summary["by"].items():
        lines += ["", *_group_lines(groups, column)]
    if "properties" in summary:
        lines += ["", *_property_lines(summary["properties"])]
        lines += [
            f"raw cosine: {line}"
            for line in _property_lines(summary["raw_cosine"]["properties"])
            if not line.startswith("symmetry")
        ]
    return lines


def _shown(metrics: Summary, key: str) -> str:
    if metrics.get(key) is None:
        return ""
    return _number({"value": metrics[key], "interval": metrics.get("intervals", {}).get(key)})


def _number(measured: Summary, sign: str = "") -> str:
    low_high = measured.get("interval")
    bounds = "" if low_high is None else " [{:{s}.4f}, {:{s}.4f}]".format(*low_high, s=sign)
    return f"{measured['value']:{sign}.4f}{bounds}"


def _group_lines(groups: Summary, name: str) -> list[str]:
    keys = ["auc", "average_precision"]
    if all(metrics.get("auc") is None for metrics in groups.values()):
        keys = ["spearman"]
    beside = next(
        (one for one in ("raw_cosine", "biases_alone") for m in groups.values() if one in m), ""
    )
    words = SIMILARITIES.get(beside, "")
    rows = [[name, "pairs", "good", *(METRICS[key] for key in keys), words, ""]]
    for value, metrics in groups.items():
        cosine = metrics.get(beside, {})
        counts = [str(metrics["n_pairs"]), str(metrics["n_good"] or 0)]
        against = f"against {metrics['against']}" if "against" in metrics else ""
        cells = [_shown(metrics, key) for key in keys]
        rows.append([value, *counts, *cells, _shown(cosine, keys[-1]), against])
    return aligned(rows)


def _property_lines(found: Summary) -> list[str]:
    lines = []
    for backend, counts in (found["symmetry"] or {}).items():
        state = f"{counts['different']} differ" if counts["different"] else "holds to the bit"
        lines.append(f"symmetry ({backend}): {state} in {counts['pairs']} sampled pairs")
    if found["symmetry"] is None:
        lines.append("symmetry: none, the model is asymmetric")
    reflexive = found["reflexivity"]
    lines.append(
        f"reflexivity: {reflexive['beaten']:.2%} of {reflexive['entities']} sampled entities have "
        "another one that scores higher than they do with themselves"
        + (" (by its formula there is none but for rounding)" if reflexive["guaranteed"] else "")
    )
    for kind, what in (
        ("transitivity", "transitivity (Lukasiewicz)"),
        ("triangle", "triangle inequality"),
    ):
        for name, triples in (found[kind] or {}).items():
            if triples["triples"]:
                lines.append(
                    f"{what}: violated by {triples['violated']:.2%} of {triples['triples']} "
                    f"{name} triples"
                )
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
