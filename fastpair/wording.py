"""What is measured, in words: for the terminal and for the report alike."""

from __future__ import annotations

from typing import Any

Summary = dict[str, Any]

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
"""Metrics in the order in which they are shown, and what they are called."""

SIMILARITIES = {
    "raw_cosine": "raw cosine",
    "unlabelled_pca": "unlabelled PCA",
    "biases_alone": "biases alone",
}
"""What stands beside the model, where it is there."""


def metric_table(summary: Summary) -> list[list[str]]:
    """Return rows of cells: names of similarities, then each metric with its intervals."""
    beside = {name: words for name, words in SIMILARITIES.items() if name in summary}
    others = [summary[name] for name in beside]
    rows = [["", "model", *beside.values()]]
    for key, name in METRICS.items():
        if summary.get(key) is None or (key in ("spearman", "pearson") and not summary["graded"]):
            continue
        if key in ("f1", "precision", "recall"):
            name += f" at {summary['threshold']:.4g}"
        rows.append([name, *(shown(metrics, key) for metrics in (summary, *others))])
    found = summary["recall_at"]
    for k in found.get("model", {}):
        cells = [number(found[name][k]) for name in ("model", *beside)]
        rows.append([f"recall in the best {k}", *cells])
    return rows


def gain_lines(summary: Summary) -> list[str]:
    """Say what the model has more than what stands beside it."""
    return [
        f"gain in {METRICS[key]} over the {words}: {number(summary[name]['gain'][key], '+')}"
        for name, words in SIMILARITIES.items()
        for key in ("average_precision", "spearman")
        if key in summary.get(name, {}).get("gain", {})
    ]


def shown(metrics: Summary, key: str) -> str:
    """Return a metric with its interval, or nothing where it is not defined."""
    if metrics.get(key) is None:
        return ""
    return number({"value": metrics[key], "interval": metrics.get("intervals", {}).get(key)})


def number(measured: Summary, sign: str = "") -> str:
    """Return a value with its interval."""
    low_high = measured.get("interval")
    bounds = "" if low_high is None else " [{:{s}.4f}, {:{s}.4f}]".format(*low_high, s=sign + "z")
    return f"{measured['value']:{sign}z.4f}{bounds}"


def group_keys(groups: Summary) -> tuple[list[str], str]:
    """Return the metrics that groups of pairs are told apart by, and what stands beside them."""
    keys = ["auc", "average_precision"]
    if all(metrics.get("auc") is None for metrics in groups.values()):
        keys = ["spearman"]
    beside = next(
        (one for one in ("raw_cosine", "biases_alone") for m in groups.values() if one in m), ""
    )
    return keys, beside


def group_table(groups: Summary, name: str) -> list[list[str]]:
    """Return rows of cells, one for each group of pairs."""
    keys, beside = group_keys(groups)
    words = SIMILARITIES.get(beside, "")
    rows = [[name, "pairs", "good", *(METRICS[key] for key in keys), words, ""]]
    for value, metrics in groups.items():
        cosine = metrics.get(beside, {})
        counts = [str(metrics["n_pairs"]), str(metrics["n_good"] or 0)]
        against = f"against {metrics['against']}" if "against" in metrics else ""
        cells = [shown(metrics, key) for key in keys]
        rows.append([value, *counts, *cells, shown(cosine, keys[-1]), against])
    return rows


def property_lines(found: Summary) -> list[str]:
    """Say what `properties.measure_properties` found."""
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
                of = f" of {triples['of']}" if "of" in triples else ""
                lines.append(
                    f"{what}{of}: violated by {triples['violated']:.2%} of {triples['triples']} "
                    f"{name} triples"
                )
    return lines
