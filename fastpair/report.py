"""The report of an evaluation: one page that needs nothing but itself.

Whatever comes from files (ids, texts, names of columns) is text here and never markup.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence
from importlib import resources
from string import Template

import numpy as np

from fastpair import curves, plots
from fastpair.curves import Thresholds
from fastpair.entities import EntityTexts
from fastpair.markup import (
    Html,
    element,
    json_text,
    markup,
    paragraph,
    shown_figure,
    table,
    tiles,
    with_small,
)
from fastpair.model import Model
from fastpair.plots import shortened
from fastpair.report_material import Material, Summary, chances
from fastpair.report_scores import Moves, calibration, ranking, slider_data, threshold_section
from fastpair.wording import (
    METRICS,
    SIMILARITIES,
    gain_lines,
    group_keys,
    group_table,
    metric_table,
    property_lines,
)

FIRST_SHOWN = 8
"""Mistakes of each kind that are seen at once; the others unfold."""

LONGEST_NAME = 80
"""Characters of an id or of a value of a column."""

LONGEST_TEXT = 200
"""Characters of a cell of the table of entities."""

MOST_DOTS = 1500
"""Pairs in the scatter of scores over grades."""


def report(material: Material) -> str:
    """Return the page.

    Raises
    ------
    ArgumentError : matplotlib is not installed.
    """
    plots.check_matplotlib()
    truth = material.comparison.truth
    sections = [("How good it is", _overall(material))]
    counted: Thresholds | None = None
    moves: Moves = {}
    if truth is not None and truth.any() and not truth.all():
        in_use = material.summary.get("threshold")
        counted = curves.count_at_thresholds(material.scores, truth, in_use)
        ranked, moves = ranking(material, truth, counted)
        spread, more = threshold_section(material, truth, counted)
        moves |= more
        sections += [("Ranking", ranked), ("Choosing a threshold", spread)]
        sections.append(("Calibration", calibration(material, truth)))
    if truth is None or material.model.unit == "grade":
        sections.append(("Scores and grades", _grades(material)))
    sections.append(("The worst mistakes", _mistakes(material, truth, counted)))
    sections.append(("Parts of the pairs", _parts(material)))
    if "properties" in material.summary:
        sections.append(("Properties", _properties(material.summary)))
    if material.model.network is None and truth is not None and not material.builtin:
        sections.append(("The learned projection", _projection(material, truth)))
    sections.append(("Training", _training(material.model)))
    sections.append(("What made this report", _made(material)))
    return _page(material, [one for one in sections if one[1]], counted, moves)


def _page(
    material: Material,
    sections: Sequence[tuple[str, Html]],
    counted: Thresholds | None,
    moves: Moves,
) -> str:
    folder = resources.files("fastpair") / "page"
    script = (folder / "report.js").read_text(encoding="utf-8")
    policy = ["default-src 'none'", "style-src 'unsafe-inline'", "base-uri 'none'"]
    scripts = Html("")
    if counted is not None:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += ["form-action 'none'", f"script-src 'sha256-{digest}'"]
        counts = json_text(slider_data(material, counted, moves))
        scripts = Html(
            f'<script type="application/json" id="counts">{counts}</script>\n'
            f"<script>{script}</script>"
        )
    bodies, contents = [], []
    for title, body in sections:
        name = title.lower().replace(" ", "-")
        heading = element("h2", title, id=f"{name}-title")
        bodies.append(element("section", heading, body, id=name, aria_labelledby=f"{name}-title"))
        contents.append(element("li", element("a", title, href=f"#{name}")))
    template = Template((folder / "report.html").read_text(encoding="utf-8"))
    good = material.summary["n_good"]
    lead = f"{material.summary['n_pairs']:,} labelled pairs"
    lead += "" if good is None else f", {good:,} of them good"
    return template.substitute(
        policy=html.escape("; ".join(policy)),
        generator=html.escape(dict(material.made)["fastpair"]),
        title=markup(material.title),
        lead=markup(
            f"{lead}. Scores are of the unit {material.model.unit}; higher is more similar."
        ),
        contents="".join(contents),
        body="\n".join(bodies),
        scripts=scripts,
    )


def _overall(material: Material) -> Html:
    summary = material.summary
    first = "spearman" if summary["auc"] is None else "average_precision"
    others = ["rmse", "pearson"] if summary["auc"] is None else ["auc", "f1"]
    beside = summary.get(material.beside, {})
    numbers: list[tuple[str, object]] = []
    for key in (first, *others):
        if summary.get(key) is not None:
            at = f" at {summary['threshold']:.4g}" if key == "f1" else ""
            numbers.append((f"{METRICS[key]}{at}", f"{summary[key]:.4f}"))
    if beside.get(first) is not None:
        words = f"{METRICS[first]} of the {SIMILARITIES[material.beside]}"
        numbers.insert(1, (words, f"{beside[first]:.4f}"))
    rows = [[with_small(cell) for cell in row] for row in metric_table(summary)]
    known = "Numbers in brackets hold 95 % of the draws of a bootstrap over entities: pairs that "
    known += "share an entity are not independent of each other."
    parts = [tiles(numbers), table(rows, "Metrics of the model and of what needs no labels")]
    if "intervals" in summary:
        parts.append(paragraph(known, kind="note"))
    lines = [*gain_lines(summary), *summary["notes"]]
    parts.append(element("ul", *(element("li", line) for line in lines), class_="facts"))
    return Html("".join(parts))


def _grades(material: Material) -> Html:
    labels, unit = material.comparison.labels, material.model.unit
    rng = np.random.default_rng(material.comparison.options["seed"])
    some = np.sort(rng.permutation(len(labels))[:MOST_DOTS])
    shown = [("model", "model", unit)]
    if material.beside:
        shown.append((material.beside, SIMILARITIES[material.beside], "similarity"))
    figures = [
        shown_figure(
            plots.grades_figure(
                f"grades-{number}",
                material.comparison.scored[name].scores[some].astype(np.float64),
                labels[some],
                words,
                of,
                number == 0,
            ),
            f"The {words}: each dot is a pair"
            + (
                f", {len(some):,} of {len(labels):,} drawn at random."
                if len(some) < len(labels)
                else "."
            ),
        )
        for number, (name, words, of) in enumerate(shown)
    ]
    return element("div", *figures, class_="figures")


def _mistakes(material: Material, truth: np.ndarray | None, counted: Thresholds | None) -> Html:
    labels = material.comparison.labels
    if truth is None:
        worst = curves.worst_grades(material.scores, labels, material.model.unit)
        titles = {
            "bad": "Scored too high for their grade",
            "good": "Scored too low for their grade",
        }
        about = "Ranks are compared where scores are no grades."
    elif counted is not None:
        threshold = float(counted.values[counted.at])
        worst = curves.worst_pairs(material.scores, truth, threshold)
        titles = {"bad": "Bad pairs that score highest", "good": "Good pairs that score lowest"}
        about = (
            f"On the wrong side of the threshold {counted.shown()[counted.at]}, the worst first, "
        )
        about += (
            f"at most {curves.MOST_SHOWN} of each kind. Labels can be wrong too: look here first."
        )
    else:
        return Html("")
    ids = {
        int(entity)
        for rows in worst.values()
        for side in material.comparison.pairs
        for entity in side[rows]
    }
    names = {entity: material.name_of(entity) for entity in sorted(ids)}
    texts = None if material.texts is None else material.texts(list(names.values()))
    parts = [paragraph(about)]
    lacking = set(names.values()).difference(() if texts is None else texts.rows)
    if texts is not None and lacking:
        key = shortened(texts.key, LONGEST_NAME)
        words = f"The column {key} of the table of entities lacks {len(lacking)} of these ids."
        parts.append(paragraph(words, kind="note"))
    for kind, rows in worst.items():
        parts.append(element("h3", titles[kind]))
        if len(rows):
            cells = _pair_rows(material, rows, names, texts, graded=truth is None)
            numbers = range(len(cells[0]) - 2)
            parts.append(
                table(cells[: FIRST_SHOWN + 1], titles[kind], numbers, "pairs", headed=True)
            )
            rest = cells[FIRST_SHOWN + 1 :]
            if rest:
                more = table([cells[0], *rest], titles[kind], numbers, "pairs", headed=True)
                parts.append(element("details", element("summary", f"{len(rest)} more"), more))
        else:
            parts.append(paragraph("None."))
    return Html("".join(parts))


def _pair_rows(
    material: Material,
    rows: np.ndarray,
    names: dict[int, str],
    texts: EntityTexts | None,
    *,
    graded: bool,
) -> list[list[object]]:
    """Return a row of cells for each of some pairs."""
    head: list[object] = ["score"]
    columns = [[f"{value:.4f}" for value in material.scores[rows]]]
    chance = None if graded else chances(material.model, material.scores[rows])
    if chance is not None:
        head.append("probability")
        columns.append([f"{value:.4f}" for value in chance])
    if material.beside:
        head.append(SIMILARITIES[material.beside])
        beside = material.comparison.scored[material.beside].scores[rows]
        columns.append([f"{value:.4f}" for value in beside])
    if graded:
        head.append("grade")
        columns.append([f"{value:g}" for value in material.comparison.labels[rows]])
    head += ["row of the file", "left", "right"]
    columns.append([f"{row}" for row in material.pair_rows[rows]])
    sides = [
        [_entity(names[int(entity)], texts) for entity in side[rows]]
        for side in material.comparison.pairs
    ]
    return [head, *(list(cells) for cells in zip(*columns, *sides, strict=True))]


def _entity(name: str, texts: EntityTexts | None) -> Html:
    """Return an id, with what it stands for where that is known."""
    title = element("b", shortened(name, LONGEST_NAME))
    if texts is None:
        return element("div", title)
    parts: list[object] = []
    for column, cell in zip(texts.columns, texts.rows.get(name, []), strict=False):
        if cell:
            parts += [element("dt", f"{shortened(column, LONGEST_NAME)}:"), " "]
            parts += [element("dd", shortened(cell, LONGEST_TEXT)), " "]
    return element("div", title, element("dl", *parts) if parts else "")


def _parts(material: Material) -> Html:
    """Return what was measured apart: entities seen in training or not, values of columns."""
    summary = material.summary
    groups = dict(summary["by"])
    if "entities" in summary:
        groups = {"entities in training": summary["entities"], **groups}
    parts = []
    for number, (column, found) in enumerate(groups.items()):
        if not found:
            continue
        rows = group_table(found, shortened(column, LONGEST_NAME))
        cells = [[with_small(shortened(cell, LONGEST_NAME)) for cell in row] for row in rows]
        if not any(row[-1] for row in cells):
            cells = [row[:-1] for row in cells]
        title = shortened(column, LONGEST_NAME)
        figure = _groups_figure(f"parts-{number}", title, found)
        body = table(cells, f"The pairs by {title}", (1, 2), headed=True)
        parts += [element("h3", f"By {title}"), body, figure]
    return Html("".join(parts))


def _groups_figure(name: str, title: str, found: Summary) -> Html:
    keys, beside = group_keys(found)
    key = keys[-1]
    rows = []
    for value, metrics in found.items():
        sources = {"model": metrics}
        if beside:
            sources[SIMILARITIES[beside]] = metrics.get(beside, {})
        measured = {
            words: (one[key], one.get("intervals", {}).get(key))
            for words, one in sources.items()
            if one.get(key) is not None
        }
        rows.append(plots.Group(value, measured))
    if not any(row.measured for row in rows):
        return Html("")
    words = f"{METRICS[key]} of the model and of what stands beside it, by {title}."
    figure = plots.groups_figure(name, words, rows, METRICS[key])
    return shown_figure(figure, _sentence(f"{METRICS[key]} by {title}; bars are 95 % intervals."))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _properties(summary: Summary) -> Html:
    lines = property_lines(summary["properties"])
    lines += [
        f"raw cosine: {line}"
        for line in property_lines(summary["raw_cosine"]["properties"])
        if not line.startswith("symmetry")
    ]
    about = (
        "Measured on samples of the entities. A probability of being the same cannot break "
        "transitivity, a distance cannot break the triangle inequality; scores that do so much "
        "make groups that contradict their pairs."
    )
    facts = element("ul", *(element("li", line) for line in lines), class_="facts")
    return Html(paragraph(about) + facts)


def _projection(material: Material, truth: np.ndarray) -> Html:
    comparison = material.comparison
    embeddings = comparison.similarities["model"].embeddings
    entities, lines = curves.plane_sample(comparison.pairs, truth, comparison.options["seed"])
    if len(entities) < 3:
        return Html("")
    some = np.asarray(embeddings[entities], np.float64)
    learned = curves.learned_plane(material.model, some, lines)
    figures = []
    if comparison.similarities.get("raw_cosine") is not None:
        from fastpair.heads import unit_rows

        plain = curves.plane_of(unit_rows(some)[0], None, lines)
        figures.append(("plane-raw", "embeddings as they came", plain, False))
    title = "what the model makes of them" if figures else "what the model learned"
    figures.append(("plane-learned", title, learned, material.model.asymmetric))
    about = (
        f"{len(entities):,} of the entities in the pair file, in the two directions of most "
        "variance. A good projection makes the lines of good pairs short beside those of bad ones; "
        "two directions of many can only hint at it."
    )
    shown = [
        shown_figure(
            plots.plane_figure(name, words, plane, lines, both),
            f"{_sentence(words)}: {_apart(plane)}",
        )
        for name, words, plane, both in figures
    ]
    return Html(paragraph(about) + element("div", *shown, class_="figures"))


def _apart(plane: curves.Plane) -> str:
    if plane.ratio is None:
        return "entities as dots."
    return f"over all columns, good pairs are {plane.ratio:.2f} times as far apart as bad ones."


def _training(model: Model) -> Html:
    record = model.record
    epochs = curves.drawable_epochs(record.get("history"))
    metric = record.get("metric")
    if not epochs or not isinstance(metric, str):
        return Html("")
    called = METRICS.get(metric, metric)
    figures = plots.history_figures(epochs, metric, shortened(called, LONGEST_NAME))
    kept = record.get("kept", {})
    told = isinstance(kept, dict) and "epoch" in kept
    words = f"{len(epochs)} epochs in all."
    if told:
        arm = f" of arm {shortened(str(kept['arm']), LONGEST_NAME)}" if "arm" in kept else ""
        words += f" What was kept is epoch {shortened(str(kept['epoch']), LONGEST_NAME)}{arm}."
    captions = ("Loss on the training pairs.", f"{_sentence(called)} on the validation pairs.")
    shown = [shown_figure(one, text) for one, text in zip(figures, captions, strict=False)]
    return Html(paragraph(words) + element("div", *shown, class_="figures"))


def _made(material: Material) -> Html:
    rows = [["what", "which"], *([name, element("code", words)] for name, words in material.made)]
    described = material.model.description
    notes = described.get("notes")
    told = [
        [shortened(name, LONGEST_NAME), shortened(str(value), LONGEST_TEXT)]
        for name, value in described.items()
        if value is not None and name != "notes"
    ]
    parts = [table(rows, "Model, data and versions")]
    if told and not material.builtin:
        title = "Settings that the model was trained with"
        settings = table([["setting", "value"], *told], title, headed=True)
        parts.append(element("details", element("summary", title), settings))
    if isinstance(notes, list) and notes:
        parts.append(element("h3", "What training said"))
        lines = [element("li", shortened(str(note), 2 * LONGEST_TEXT)) for note in notes[:50]]
        parts.append(element("ul", *lines, class_="facts"))
    return Html("".join(parts))
