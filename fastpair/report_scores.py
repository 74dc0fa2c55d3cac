"""The parts of a report that are about thresholds: curves, the slider, calibration."""

from __future__ import annotations

import numpy as np

from fastpair import curves, plots
from fastpair.curves import Thresholds
from fastpair.markup import Html, element, paragraph, shown_figure, table, tiles, with_small
from fastpair.model import sigmoid
from fastpair.report_material import Material, Summary, chances
from fastpair.wording import SIMILARITIES

CANDIDATES = 1_000_000
"""Candidate pairs that expected numbers are shown for at first."""

NO_NUMBER = "\u2013"
"""What stands where a number is not defined."""

Moves = dict[str, tuple[float, float]]
"""By the name of a figure, its units for one unit of its axes."""


def slider_data(material: Material, counted: Thresholds, moves: Moves) -> Summary:
    """Return what the script of the page reads: counts, what is shown, and how marks move."""
    shown = {"threshold": counted.shown()}
    chance = chances(material.model, counted.values)
    if chance is not None:
        shown["chance"] = [f"{value:.4f}" for value in chance]
    return {
        "values": counted.values.tolist(),
        "hits": counted.hits.tolist(),
        "taken": counted.taken.tolist(),
        "good": counted.good,
        "pairs": counted.pairs,
        "at": counted.at,
        "shown": shown,
        "moves": moves,
    }


def ranking(material: Material, truth: np.ndarray, counted: Thresholds) -> tuple[Html, Moves]:
    """Return the ROC and the precision-recall curve, and how their marks move."""
    comparison, options = material.comparison, material.comparison.options
    names = {"model": "model"}
    if material.beside:
        names[material.beside] = SIMILARITIES[material.beside]
    draws = {"model": options["draws"]}
    found = {
        words: curves.ranking_curves(
            comparison.scored[name].scores,
            truth,
            comparison.pairs,
            draws.get(name, 0),
            options["seed"],
        )
        for name, words in names.items()
    }
    hits, taken = int(counted.hits[counted.at]), int(counted.taken[counted.at])
    false = (taken - hits) / (counted.pairs - counted.good)
    recall, share = hits / counted.good, counted.good / counted.pairs
    roc = plots.ranking_figure(
        "roc",
        "ROC curve: recall over the share of bad pairs that are taken.",
        {words: both[0] for words, both in found.items()},
        ("share of bad pairs taken (false positive rate)", "recall"),
        (false, recall),
        [(0, 0), (1, 1)],
    )
    ranked = plots.ranking_figure(
        "ranked",
        "Precision over recall.",
        {words: both[1] for words, both in found.items()},
        ("recall", "precision"),
        (recall, hits / taken) if taken else None,
        [(0, share), (1, share)],
    )
    band = " The band holds 95 % of bootstrap draws." if options["draws"] else ""
    parts = element(
        "div",
        shown_figure(roc, f"ROC. Dotted: chance. Circle: the threshold.{band}"),
        shown_figure(
            ranked,
            f"Precision and recall. Dotted: the share of good pairs, {100 * share:.2f} %.{band}",
        ),
        class_="figures",
    )
    return parts, {"roc": roc.moves, "ranked": ranked.moves} if taken else {"roc": roc.moves}


def _field(show: str, value: float, kind: str = "") -> Html:
    """Return a number that the script keeps up to date."""
    text = (
        NO_NUMBER
        if not np.isfinite(value)
        else f"{value:,.0f}"
        if kind == "count"
        else f"{value:.4f}"
    )
    return element("span", text, data_show=show, data_kind=kind or None)


def threshold_section(
    material: Material, truth: np.ndarray, counted: Thresholds
) -> tuple[Html, Moves]:
    """Return the slider with all that it moves."""
    at = counted.at
    value, hits, taken = float(counted.values[at]), int(counted.hits[at]), int(counted.taken[at])
    good, bad = counted.good, counted.pairs - counted.good
    wrong = taken - hits
    own = material.summary.get("threshold") is not None
    marked = "threshold" if own else "best F1 here"
    unit = material.model.unit
    histogram = plots.histogram_figure(material.scores, truth, value, unit, marked)
    origin = (
        "The page opens at the threshold that the model carries."
        if own
        else "The model carries no threshold: the page opens at the one with the best F1 on these "
        "very pairs, which flatters it."
    )
    chance = chances(material.model, counted.values)
    said: list[tuple[str, object]] = [
        ("threshold", element("span", counted.shown()[at], data_value="threshold"))
    ]
    if chance is not None:
        words = element("span", f"{chance[at]:.4f}", data_value="chance")
        said.append(("probability at the threshold", words))
    precision = hits / taken if taken else float("nan")
    said += [
        ("precision", _field("precision", precision)),
        ("recall", _field("recall", hits / good)),
        ("F1", _field("f1", 2 * hits / (taken + good))),
    ]
    slider = element(
        "div",
        element("label", f"Threshold ({unit})", for_="threshold"),
        Html(
            f'<input type="range" id="threshold" min="0" max="{len(counted.values) - 1}" '
            f'value="{at}" step="1" autocomplete="off">'
        ),
        element("button", "Back to where it was", type="button", id="back"),
        class_="control",
        data_needs_script="",
        hidden="",
    )
    confusion = table(
        [
            ["", "taken", "left"],
            ["good pairs", _field("hits", hits, "count"), _field("missed", good - hits, "count")],
            ["bad pairs", _field("wrong", wrong, "count"), _field("left", bad - wrong, "count")],
        ],
        "Pairs of the file, taken if they score at least the threshold",
        numbers=(1, 2),
        kind="small",
    )
    content = [
        paragraph(origin),
        element("noscript", paragraph("Scripts are off: the numbers are those of one threshold.")),
        slider,
        tiles(said),
        shown_figure(histogram, "Scores of good and of bad pairs, as shares of each kind.", "wide"),
        confusion,
        element("h3", "How many pairs to expect"),
        _expected(hits / good, wrong / bad, good / counted.pairs, bad),
    ]
    return Html("".join(content)), {"histogram": histogram.moves}


def _expected(recall: float, false: float, share: float, bad: int) -> Html:
    """Return how many of many candidate pairs would be taken."""
    asks = Html(
        '<div class="asks"><div><label for="candidates">Candidate pairs</label>'
        f'<input type="number" id="candidates" min="1" step="any" value="{CANDIDATES}" '
        'autocomplete="off"></div><div><label for="share">Good among them, in %</label>'
        f'<input type="number" id="share" min="0" max="100" step="any" value="{100 * share:.6g}" '
        'autocomplete="off"></div></div>'
    )
    share = float(f"{100 * share:.6g}") / 100
    expected_good, expected_bad = CANDIDATES * share * recall, CANDIDATES * (1 - share) * false
    total = expected_good + expected_bad
    numbers = [
        ("pairs above the threshold", _field("expected", total, "count")),
        ("good pairs among them", _field("expected-good", expected_good, "count")),
        ("bad pairs among them", _field("expected-bad", expected_bad, "count")),
        (
            "precision there",
            _field("expected-precision", expected_good / total if total else float("nan")),
        ),
    ]
    caution = (
        "Of the good candidates the share taken is the recall above; of the bad ones it is the "
        "share of this file's bad pairs that are taken. Both hold if candidates resemble the pairs "
        "of this file; usually far fewer of them are good, which lowers the precision, so enter "
        f"your own share. With {bad:,} bad pairs here, a share below {3 / bad:.2g} cannot be told "
        "from none (the rule of three)."
    )
    return Html(
        element("div", asks, class_="control", data_needs_script="", hidden="")
        + element(
            "noscript", paragraph(f"Of {CANDIDATES:,} candidates, good as often as in this file:")
        )
        + tiles(numbers)
        + paragraph(caution, kind="note")
    )


def calibration(material: Material, truth: np.ndarray) -> Html:
    """Return how often probabilities come true, or nothing where the unit has none."""
    scored = material.comparison.scored["model"]
    after = scored.probability
    if after is None and material.model.unit == "log-odds":
        after = sigmoid(material.scores)
    if after is None:
        return Html("")
    before = curves.chance_before(material.model, material.scores)
    found = None if before is None else curves.reliability(before, truth)
    bins = curves.reliability(after, truth)
    figure = plots.reliability_figure(bins, found)
    rows = [["probability", "pairs", "mean probability", "share of good pairs"]]
    for tenth, said, came, low, high, pairs in zip(
        bins.bins, bins.said, bins.came, bins.low, bins.high, bins.pairs, strict=True
    ):
        rows.append(
            [
                f"{tenth / 10:.1f} to {(tenth + 1) / 10:.1f}",
                f"{pairs:,}",
                f"{said:.4f}",
                f"{came:.4f} [{low:.4f}, {high:.4f}]",
            ]
        )
    cells = [[with_small(cell) for cell in row] for row in rows]
    about = "On the dotted line probabilities come true. Bars are Wilson intervals of 95 %."
    if before is None:
        about += " The model does not say what its scores were before calibration."
    return element(
        "div",
        shown_figure(figure, about),
        table(cells, "Probabilities in ten bins, after calibration", numbers=(1, 2)),
        class_="figures",
    )
