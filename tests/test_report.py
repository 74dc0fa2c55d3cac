"""The report of an evaluation: one page that holds what `evaluate` found, and nothing foreign."""

import csv
import html
import json
import re
import warnings
from html.parser import HTMLParser
from types import SimpleNamespace

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from fastpair import jobs, plots
from fastpair.cli import commands
from fastpair.cli.measured import curve, history_lines
from fastpair.curves import (
    MOST_POINTS,
    MOST_SHOWN,
    MOST_THRESHOLDS,
    chance_before,
    count_at_thresholds,
    learned_plane,
    main_directions,
    ranking_curves,
    reliability,
    thinned,
    worst_grades,
    worst_pairs,
)
from fastpair.entities import read_entities
from fastpair.errors import ArgumentError, DataError, FileError
from fastpair.evaluation import Scored
from fastpair.files import read_model, write_model
from fastpair.heat_map import MOST_SHOWN as MOST_DRAWN
from fastpair.heat_map import heat_map, leaf_order
from fastpair.markup import json_text
from fastpair.model import Branch, Isotonic, Model, Preparation
from fastpair.report_scores import calibration
from fastpair.towers import Linear

pytest.importorskip("matplotlib")

NASTY = [
    "<script>alert(1)</script>",
    "\"quoted\" & 'single'",
    "</script><b>",
    "$x^2$ \x07 bell",
    "日本 <!-- -->",
]
VOID = {"meta", "input", "br", "link", "img"}


def a_model(columns=6, **fields):
    rng = np.random.default_rng(1)
    projection = np.eye(columns) + 0.1 * rng.normal(size=(columns, columns))
    branches = [Branch("cosine", {"scale": np.array([6.0])}, Linear(projection))]
    record = {
        "metric": "average_precision",
        "kept": {"arm": "A", "epoch": 2},
        "calibration": {"slope": 2.0, "offset": -1.0},
        "history": [
            {"arm": "A", "epoch": n, "loss": 1 / n, "average_precision": 0.5 + 0.1 * n}
            for n in (1, 2, 3)
        ],
    }
    settings = {"constant": -3.0, "threshold": 0.25, "unit": "log-odds", "record": record}
    return Model(branches, columns, Preparation(unit_rows=True), **{**settings, **fields})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """60 entities in six groups, some with ids that are no friends of a page; pairs; a model."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    groups = np.arange(60) % 6
    rows = (rng.normal(size=(6, 6))[groups] + 0.8 * rng.normal(size=(60, 6))).astype("f4")
    # Bell characters are no ids of HDF5, but what a table says can hold them.
    ids = [NASTY[n].replace("\x07", "") if n < len(NASTY) else f"e{n}" for n in range(60)]
    with h5py.File(folder / "embeddings.h5", "w") as file:
        file["embeddings"], file["ids"] = rows, ids
    left, right = rng.integers(0, 60, (2, 300))
    left[:40] = np.arange(40) % 5
    same = groups[left] == groups[right]
    kinds = np.where(same, "same <i>", np.where(left % 2 == right % 2, "near", "far"))
    with open(folder / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id_a", "id_b", "label", "kind", "grade"])
        writer.writerows(
            [ids[i], ids[j], int(s), k, 1.5 + s + 0.1 * (i % 3)]
            for i, j, s, k in zip(left, right, same, kinds, strict=True)
        )
    with open(folder / "train.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id_a", "id_b"])
        writer.writerows([ids[n], ids[n + 1]] for n in range(0, 30))
    with open(folder / "entities.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["words", "id", "price"])
        writer.writerows([f"{NASTY[n % 5]} text {n}", name, n] for n, name in enumerate(ids))
    write_model(folder / "model.h5", a_model())
    return folder


def evaluated(world, name, **options):
    files = (world / "model.h5", world / "embeddings.h5", world / "pairs.csv")
    options = {"bootstrap": 10, "label_column": "label", **options}
    return jobs.evaluate(*files, report=world / name, overwrite=True, **options)


@pytest.fixture(scope="module")
def page(world):
    """The report with everything in it, and the summary."""
    summary = evaluated(
        world,
        "full.html",
        by=["kind"],
        train=world / "train.csv",
        properties=True,
        entities=world / "entities.csv",
    )
    return (world / "full.html").read_text(encoding="utf-8"), summary


class Page(HTMLParser):
    """The elements of a page, their attributes and their text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts, self.lost = [], [], {}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append((tag, dict(attributes)))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open[-1][0] != tag:
            self.lost.append(tag)
        else:
            self.open.pop()

    def handle_data(self, data):
        for tag, attributes in self.open[-1:]:
            key = (tag, attributes.get("id") or attributes.get("data-show") or "")
            self.texts[key] = self.texts.get(key, "") + data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def rows_of(world):
    with open(world / "pairs.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def sides_of(world):
    """The embeddings of both sides of the pairs, and the labels."""
    with h5py.File(world / "embeddings.h5") as file:
        embeddings, ids = file["embeddings"][:], [one.decode() for one in file["ids"][:]]
    rows = rows_of(world)
    left, right = (np.array([ids.index(row[side]) for row in rows]) for side in ("id_a", "id_b"))
    labels = np.array([int(row["label"]) for row in rows]) == 1
    return embeddings[left], embeddings[right], labels


def scores_of(world):
    left, right, labels = sides_of(world)
    return read_model(world / "model.h5").score(left, right), labels


def cosines_of(world):
    left, right, _ = (one.astype(np.float64) for one in sides_of(world))
    return (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


# --- the page ---


def test_the_page_is_well_formed_and_every_id_is_there_once(page):
    parsed = Page(page[0])
    assert parsed.lost == []
    assert parsed.open == []
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for used in re.findall(r'(?:href="#|url\(#)([^")]+)', page[0]):
        assert used in ids


def test_the_page_needs_nothing_but_itself(page):
    parsed = Page(page[0])
    for tag, attributes in parsed.elements:
        assert tag not in ("link", "img", "iframe", "object", "base", "form")
        assert not {"src", "srcset", "action", "onload", "onclick"} & attributes.keys()
        assert attributes.get("href", "#").startswith("#")
    assert "@import" not in page[0]
    outside = set(re.findall(r"https?://[^\s\"'<]+", page[0]))
    assert outside <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    policy = next(a["content"] for a in parsed.all("meta") if "http-equiv" in a)
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1]


def test_ids_texts_and_columns_are_text_and_never_markup(page):
    text, _ = page
    parsed = Page(text)
    assert len(parsed.all("script")) == 2
    assert "alert(1)" in text
    assert "<script>alert" not in text
    assert "<i>" not in text
    assert "same &lt;i&gt;" in text
    assert "\x07" not in text
    assert "日本" in text
    counts = re.search(r'id="counts">(.*?)</script>', text, re.DOTALL)[1]
    assert "<" not in counts
    json.loads(counts)


def test_json_cannot_end_the_element_that_it_stands_in():
    data = {"</script>": "<!-- & -->"}
    text = json_text(data)
    assert not set("<>&") & set(text)
    assert json.loads(text) == data


def test_the_numbers_are_those_of_evaluate(page):
    text, summary = page
    parsed = Page(text)
    for key in ("auc", "average_precision", "log_loss"):
        low, high = summary["intervals"][key]
        assert f"{summary[key]:.4f} <small>[{low:.4f}, {high:.4f}]</small>" in text
        assert f"{summary[key]:.4f}" in text
    assert f"{summary['raw_cosine']['auc']:.4f}" in text
    for key in ("precision", "recall", "f1"):
        assert parsed.texts["span", key] == f"{summary[key]:.4f}"
    assert f"{summary['entities']['both seen']['n_pairs']}" in text
    for kind in ("near", "far"):
        assert f"{summary['by']['kind'][kind]['auc']:.4f}" in text
    reflexive = summary["properties"]["reflexivity"]
    assert f"{reflexive['beaten']:.2%} of {reflexive['entities']} sampled entities" in text
    assert summary["report"].endswith("full.html")


def test_counts_and_expected_pairs_at_the_threshold_are_right(world, page):
    parsed = Page(page[0])
    scores, labels = scores_of(world)
    taken = scores >= 0.25
    shown = {key: parsed.texts["span", key] for key in ("hits", "missed", "wrong", "left")}
    assert shown == {
        "hits": f"{(taken & labels).sum()}",
        "missed": f"{(~taken & labels).sum()}",
        "wrong": f"{(taken & ~labels).sum()}",
        "left": f"{(~taken & ~labels).sum()}",
    }
    # As many good ones as in the file: of a million the same share is taken as of the file.
    expected = int(parsed.texts["span", "expected"].replace(",", ""))
    assert expected == pytest.approx(1e6 * taken.mean(), abs=2)
    good = int(parsed.texts["span", "expected-good"].replace(",", ""))
    assert good == pytest.approx(1e6 * (taken & labels).mean(), abs=2)


def test_the_worst_mistakes_are_on_the_wrong_side_with_their_texts(world, page):
    text, _ = page
    scores, labels = scores_of(world)
    part = text[text.index("Bad pairs that score highest") : text.index("Good pairs that score")]
    worst = np.flatnonzero(~labels & (scores >= 0.25))
    worst = worst[np.argsort(-scores[worst], kind="stable")]
    shown = re.findall(r'data-name="score">(-?[0-9.]+)<', part)
    assert [float(one) for one in shown] == pytest.approx(scores[worst][:MOST_SHOWN], abs=1e-4)
    found = [int(one) for one in re.findall(r'data-name="row of the file">(\d+)<', part)]
    assert set(found[:3]) == set(worst[:3].tolist())
    beside = [float(one) for one in re.findall(r'data-name="raw cosine">(-?[0-9.]+)<', part)]
    assert beside == pytest.approx(cosines_of(world)[found], abs=1e-4)
    first = rows_of(world)[found[0]]["id_b"]
    assert f"<b>{html.escape(first)}</b>" in part
    number = (
        first[1:]
        if re.fullmatch(r"e\d+", first)
        else [one.replace("\x07", "") for one in NASTY].index(first)
    )
    assert f" text {number}</dd>" in part


def test_each_curve_is_that_of_its_own_scores(world, monkeypatch):
    drawn = {}

    def ranking_figure(name, words, curves, *more):
        drawn[name] = curves
        return plots.Figure(name, "<svg></svg>", (1.0, 1.0))

    monkeypatch.setattr(plots, "ranking_figure", ranking_figure)
    evaluated(world, "curves.html", bootstrap=0)
    scores, labels = scores_of(world)
    for called, values in (("model", scores), ("raw cosine", cosines_of(world))):
        curve = drawn["roc"][called]
        area = metrics.roc_auc_score(labels, values)
        assert metrics.auc(curve.x, curve.y) == pytest.approx(area, abs=1e-6)
        best = np.sort(values[labels])[-1]
        first = (labels[values >= best]).mean()  # precision where the first good pair is taken
        curve = drawn["ranked"][called]
        assert curve.y[np.flatnonzero(curve.x > 0)[0]] == pytest.approx(first)


def test_equal_runs_give_equal_pages(world, page):
    evaluated(
        world,
        "again.html",
        by=["kind"],
        train=world / "train.csv",
        properties=True,
        entities=world / "entities.csv",
    )
    assert (world / "again.html").read_text(encoding="utf-8") == page[0]
    assert not list(world.glob("*.partial"))


def test_figures_take_the_colours_of_the_page_and_have_words(page):
    parsed = Page(page[0])
    figures = parsed.all("svg")
    assert len(figures) == 10
    assert all(one["role"] == "img" and len(one["aria-label"]) > 20 for one in figures)
    drawn = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", page[0]))
    assert drawn == set()
    for name in ("--ink", "--first", "--second", "--line"):
        assert f"var({name})" in page[0]
    assert [tag for tag, _ in parsed.elements if tag in ("h1", "h2", "h3")][:2] == ["h1", "h2"]
    assert all("scope" in one for one in parsed.all("th"))
    assert len(parsed.all("caption")) == len(parsed.all("table"))


def test_a_graded_report_has_no_threshold_and_no_script(world):
    summary = evaluated(world, "graded.html", graded=True, label_column="grade")
    text = (world / "graded.html").read_text(encoding="utf-8")
    parsed = Page(text)
    assert not parsed.all("script")
    assert not parsed.all("input")
    assert f"{summary['spearman']:.4f}" in text
    assert "Scored too high for" in text
    assert "ROC" not in text
    assert "probability" not in text
    grades = read_model(world / "model.h5")
    assert grades.unit == "log-odds"


def test_pairs_of_one_kind_make_a_page_without_curves(world, tmp_path):
    rows = [row for row in rows_of(world) if row["label"] == "1"]
    with open(tmp_path / "good.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    jobs.evaluate(
        "cosine",
        world / "embeddings.h5",
        tmp_path / "good.csv",
        label_column="label",
        bootstrap=0,
        report=tmp_path / "r.html",
    )
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "all pairs are good" in text
    assert not Page(text).all("input")


def test_a_similarity_without_threshold_or_unit_shows_no_probability(world, tmp_path):
    files = (world / "embeddings.h5", world / "pairs.csv")
    summary = jobs.evaluate(
        "cosine", *files, label_column="label", bootstrap=0, report=tmp_path / "r.html"
    )
    assert "threshold" not in summary
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "carries no threshold" in text
    assert "Calibration" not in text
    assert 'data-value="chance"' not in text
    labels = scores_of(world)[1]
    best = float(Page(text).texts["span", "f1"])
    assert best >= 2 * labels.mean() / (1 + labels.mean()) - 1e-4  # that of taking every pair


def test_a_model_that_learned_ids_has_a_report_too(tmp_path):
    from fastpair import id_jobs

    rng = np.random.default_rng(3)
    with open(tmp_path / "p.csv", "w", encoding="utf-8") as file:
        file.write("user,item,label\n")
        for _ in range(200):
            u, i = rng.integers(0, 12, 2)
            file.write(f"u{u}<b>,m{i},{int((u + i) % 2)}\n")
    id_jobs.train(tmp_path / "p.csv", tmp_path / "m.h5", epochs=3, dim=4)
    assert len(read_model(tmp_path / "m.h5").record["history"]) >= 1
    id_jobs.evaluate(tmp_path / "m.h5", tmp_path / "p.csv", bootstrap=5, report=tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "biases alone" in text
    assert "&lt;b&gt;" in text
    assert "Training" in text


def test_many_pairs_make_no_large_page(world, tmp_path):
    rng = np.random.default_rng(5)
    count = 60_000
    left, right = rng.integers(0, 60, (2, count))
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["pairs"], file["label"] = np.stack([left, right], 1), (left % 6 == right % 6) * 1
    jobs.evaluate(
        world / "model.h5",
        world / "embeddings.h5",
        tmp_path / "p.h5",
        keys="rows",
        bootstrap=3,
        report=tmp_path / "r.html",
        entities=world / "entities.csv",
    )
    assert (tmp_path / "r.html").stat().st_size < 1_500_000


# --- what it refuses ---


def test_a_report_is_refused_in_one_sentence_before_any_work(world, tmp_path, monkeypatch):
    files = (world / "model.h5", world / "embeddings.h5", world / "pairs.csv")
    with pytest.raises(ArgumentError, match=r"ends in '\.txt', expected \.html"):
        jobs.evaluate(*files, report=tmp_path / "r.txt")
    (tmp_path / "r.html").write_text("mine")
    with pytest.raises(FileError, match="exists already"):
        jobs.evaluate(*files, report=tmp_path / "r.html")
    with pytest.raises(FileError, match="does not exist"):
        jobs.evaluate(*files, report=tmp_path / "s.html", entities=tmp_path / "none.csv")
    with pytest.raises(ArgumentError, match="give report too"):
        jobs.evaluate(*files, entities=world / "entities.csv")
    (tmp_path / "one.csv").write_text("id\na\n")
    np.save(tmp_path / "e.npy", np.eye(3))
    pq.write_table(pa.table({"a": [[1]], "b": [[2]]}), tmp_path / "nested.parquet")
    monkeypatch.setattr("fastpair.jobs.measuring.load_model", None)
    for name, words in (
        ("one.csv", "no table of entities"),
        ("e.npy", "no table of entities"),
        ("nested.parquet", "no column of texts or numbers"),
    ):
        with pytest.raises(DataError, match=words):
            jobs.evaluate(*files, report=tmp_path / "s.html", entities=tmp_path / name)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ArgumentError, match=r"pip install 'fastpair\[report\]'"):
        jobs.evaluate(*files, report=tmp_path / "s.html")
    assert (tmp_path / "r.html").read_text() == "mine"


def test_a_table_without_the_ids_is_a_note_on_the_page(world, tmp_path):
    (tmp_path / "e.csv").write_text("id,text\nnobody,words of nobody\n")
    evaluated(world, "bare.html", entities=tmp_path / "e.csv")
    text = (world / "bare.html").read_text(encoding="utf-8")
    (ids,) = re.findall(r"The column id of the table of entities lacks (\d+) of these ids\.", text)
    assert int(ids) > 0
    assert "words of nobody" not in text
    evaluated(world, "whole.html", entities=world / "entities.csv")
    assert "of these ids" not in (world / "whole.html").read_text(encoding="utf-8")


def test_the_command_says_where_the_report_is_and_what_goes_with_it(world, tmp_path):
    files = [str(world / name) for name in ("model.h5", "embeddings.h5", "pairs.csv")]
    arguments = ["evaluate", *files, "--label", "label", "--bootstrap", "0"]
    result = CliRunner().invoke(commands, [*arguments, "--report", str(tmp_path / "r.html")])
    assert result.exit_code == 0, result.output
    assert "report -> " in result.stderr
    assert "AUC" in result.stdout
    result = CliRunner().invoke(commands, [*arguments, "--entities", "x.csv"])
    assert result.exit_code == 2
    assert "--entities goes with --report" in result.output


def test_texts_of_entities_come_from_csv_and_parquet_by_their_id(tmp_path):
    (tmp_path / "e.tsv").write_text("sku\ttext\na\tan apple\nb\t\n", encoding="utf-8")
    found = read_entities(tmp_path / "e.tsv", ["b", "a", "zz"])
    assert (found.columns, found.rows) == (["text"], {"a": ["an apple"], "b": [""]})
    table = pa.table(
        {"vector": [[1.0], [2.0]], "price": [1.5, None], "id": [7, 8], "ok": [True] * 2}
    )
    pq.write_table(table, tmp_path / "e.parquet")
    found = read_entities(tmp_path / "e.parquet", ["8", "7"])
    assert found.columns == ["price", "ok"]
    assert found.rows == {"7": ["1.5", "true"], "8": ["", "true"]}
    assert read_entities(tmp_path / "e.tsv", ["c"]).rows == {}
    np.save(tmp_path / "e.npy", np.eye(3))
    with pytest.raises(DataError, match="no table of entities"):
        read_entities(tmp_path / "e.npy", ["c"])


def test_the_column_of_ids_is_the_one_with_most_different_ids(tmp_path):
    wanted = ["3", "17", "250", "999"]
    lines = [f"{n},product {n},{n % 5 + 1}" for n in range(1000)]
    (tmp_path / "e.csv").write_text("\n".join(["id,title,rating", *lines]))
    found = read_entities(tmp_path / "e.csv", wanted)
    assert found.rows == {n: [f"product {n}", str(int(n) % 5 + 1)] for n in wanted}
    # As many in both: its name tells, or that it repeats none.
    for name in ("id", "number"):
        (tmp_path / "e.csv").write_text(
            "\n".join([f"rating,{name}", *(f"{n % 5},{n}" for n in range(99))])
        )
        assert read_entities(tmp_path / "e.csv", ["1", "2", "3"]).columns == ["rating"]
    # A column called id that has nearly none of them is the id of something else.
    lines = [f"{n},s{n},words {n}" for n in range(9)]
    (tmp_path / "e.csv").write_text("\n".join(["id,article,text", *lines, "s1,x,y"]))
    found = read_entities(tmp_path / "e.csv", ["s1", "s2", "s3", "s4"])
    assert found.rows["s3"] == ["3", "words 3"]


def test_ids_are_found_wherever_in_a_table_they_stand(tmp_path):
    count = 200_000
    table = pa.table(
        {"group": np.arange(count) % 7, "article": np.arange(count) + 10, "text": ["x"] * count}
    )
    pq.write_table(table, tmp_path / "e.parquet", row_group_size=10_000)
    wanted = ["5", "190005", "190006", "190007"]
    found = read_entities(tmp_path / "e.parquet", wanted)
    assert (found.columns, list(found.rows)) == (["group", "text"], wanted[1:])


# --- what is drawn ---


def test_counts_at_thresholds_are_those_of_plain_comparison():
    rng = np.random.default_rng(0)
    for count in (5, 3000):
        scores = np.round(rng.normal(size=count), 3)  # many are a threshold themselves
        truth = rng.random(count) < 0.3
        truth[:2] = True, False
        found = count_at_thresholds(scores, truth, 0.12345678)
        assert len(found.values) <= MOST_THRESHOLDS + 1
        assert found.values[found.at] == 0.12345678
        taken = scores[None] >= found.values[:, None]
        np.testing.assert_array_equal(found.taken, taken.sum(axis=1))
        np.testing.assert_array_equal(found.hits, (taken & truth).sum(axis=1))
        best = count_at_thresholds(scores, truth)
        f1 = 2 * best.hits / (best.taken + best.good)
        assert f1[best.at] == f1.max()


TINY = 1e-7
LEVELS = [0.99999911, 0.99999923, 0.99999935, 0.99999952, 0.99999964]


@given(
    st.lists(
        st.floats(-1, 1, width=32) | st.floats(1 - TINY, 1) | st.sampled_from(LEVELS), min_size=2
    )
)
def test_every_score_is_a_threshold_that_can_be_read(scores):
    scores, truth = np.array(scores), np.arange(len(scores)) % 2 == 0
    found = count_at_thresholds(scores, truth)
    levels = np.unique(scores)
    np.testing.assert_array_equal(found.values, levels)
    assert found.taken[0] == len(scores)
    shown = np.array([float(text) for text in found.shown()])
    assert (shown <= levels).all()
    assert (shown[1:] > levels[:-1]).all()


def test_thresholds_are_shown_with_the_digits_that_they_need():
    truth = np.array([False, False, True, True, True])
    found = count_at_thresholds(np.array(LEVELS), truth)
    assert found.shown() == ["0.999999", "0.9999992", "0.9999993", "0.9999995", "0.9999996"]
    assert (found.hits[found.at], found.taken[found.at]) == (3, 3)
    found = count_at_thresholds(np.array([0.12345678, 0.3, 0.98765432]), truth[:3])
    assert found.taken.tolist() == [3, 2, 1]
    assert found.shown() == ["0.123456", "0.3", "0.987654"]


def test_of_many_scores_too_the_lowest_and_the_best_are_thresholds():
    rng = np.random.default_rng(3)
    for _ in range(20):
        truth = rng.random(3000) < 0.1
        scores = rng.normal(size=3000) + truth * rng.normal(2, 1)
        found = count_at_thresholds(scores, truth)
        assert found.values[0] == scores.min()
        assert found.taken[0] == len(scores)
        order = np.argsort(-scores)
        every = 2 * np.cumsum(truth[order]) / (np.arange(1, 3001) + truth.sum())
        assert 2 * found.hits[found.at] / (found.taken[found.at] + found.good) == every.max()


def test_curves_are_those_of_scikit_learn_and_thin_evenly():
    from sklearn import metrics

    rng = np.random.default_rng(1)
    truth = rng.random(4000) < 0.2
    scores = np.round(rng.normal(size=4000) + truth, 2)
    pairs = rng.integers(0, 500, (2, 4000))
    roc, ranked = ranking_curves(scores, truth, (pairs[0], pairs[1]), draws=20)
    false, true, _ = metrics.roc_curve(truth, scores)
    assert np.abs(np.interp(roc.x, false, true) - roc.y).max() < 0.02
    assert np.trapezoid(roc.y, roc.x) == pytest.approx(metrics.auc(false, true), abs=1e-3)
    precision, recall, _ = metrics.precision_recall_curve(truth, scores)
    known = {(round(x, 9), round(y, 9)) for x, y in zip(recall, precision, strict=True)}
    own = zip(ranked.x[1:], ranked.y[1:], strict=True)
    assert all((round(x, 9), round(y, 9)) in known for x, y in own)
    for one in (roc, ranked):
        assert len(one.x) <= MOST_POINTS + 2
        assert (one.low <= one.high).all()
    middle = np.interp(np.linspace(0, 1, 101), roc.x, roc.y)
    assert ((roc.low <= middle + 0.02) & (middle <= roc.high + 0.02)).mean() > 0.9
    x = np.linspace(0, 1, 10_000)
    kept = thinned(x, x**3)
    assert (kept.x[0], kept.x[-1]) == (0, 1)
    assert np.diff(kept.x).max() < 0.01


def test_reliability_counts_what_came_true():
    chance = np.array([0.05, 0.05, 0.95, 1.0, 0.55])
    found = reliability(chance, np.array([False, True, True, True, False]))
    assert found.pairs.tolist() == [2, 1, 2]
    assert found.came.tolist() == [0.5, 0.0, 1.0]
    assert found.said == pytest.approx([0.05, 0.55, 0.975])
    assert ((found.low >= 0) & (found.low <= found.came + 1e-9)).all()
    assert found.high[0] == pytest.approx(0.9055, abs=1e-3)  # Wilson, one of two


def test_a_mean_that_rounds_below_its_bin_is_in_its_bin():
    chance, truth = np.full(10, 0.1), np.arange(10) < 1
    assert reliability(chance, truth).said[0] < 0.1  # ten times 0.1 is less than 1
    scored = {"model": Scored(np.zeros(10), probability=chance)}
    model = a_model(record={})
    material = SimpleNamespace(
        comparison=SimpleNamespace(scored=scored), model=model, scores=np.zeros(10)
    )
    shown = str(calibration(material, truth))
    assert "0.1 to 0.2" in shown
    assert "0.0 to 0.1" not in shown


def test_what_a_model_said_before_calibration_is_taken_back():
    model = a_model()
    raw = np.array([-1.0, 0.0, 2.0])
    assert chance_before(model, 2.0 * raw - 1.0) == pytest.approx(1 / (1 + np.exp(-raw)))
    assert chance_before(a_model(record={}), raw) is None
    assert chance_before(a_model(record={"calibration": {"slope": "x"}}), raw) is None


def test_mistakes_come_the_worst_first():
    scores = np.array([3.0, 1.0, 2.0, -1.0, -2.0, 0.5])
    truth = np.array([False, False, True, True, True, False])
    found = worst_pairs(scores, truth, 0.75)
    assert {kind: rows.tolist() for kind, rows in found.items()} == {"bad": [0, 1], "good": [4, 3]}
    found = worst_grades(np.array([1.0, 5.0, 3.0]), np.array([3.0, 1.0, 3.0]), "grade")
    assert (found["bad"][0], found["good"][0]) == (1, 0)


def test_main_directions_keep_distances_of_flat_points_and_their_sign():
    rng = np.random.default_rng(2)
    flat = rng.normal(size=(30, 2)) @ rng.normal(size=(2, 7))
    points, share = main_directions(flat)
    assert share == pytest.approx(1)
    expected = np.linalg.norm(flat[:, None] - flat[None], axis=-1)
    assert np.linalg.norm(points[:, None] - points[None], axis=-1) == pytest.approx(expected)
    assert main_directions(flat[:, :1])[0].shape == (30, 2)
    assert main_directions(np.zeros((4, 3)))[1] == 0


def test_an_asymmetric_model_has_two_places_for_an_entity():
    rng = np.random.default_rng(0)
    towers = [Linear(rng.normal(size=(4, 6))) for _ in range(2)]
    branch = Branch("dot", {"weight": np.ones(1)}, towers[0], towers[1])
    rows, lines = rng.normal(size=(20, 6)), {"good": np.array([[0, 1]]), "bad": np.array([[2, 3]])}
    found = learned_plane(Model([branch], 6), rows, lines)
    assert found.left.shape == found.right.shape == (20, 2)
    assert not np.allclose(found.left, found.right)
    sides = [rows @ tower.projection.T for tower in towers]
    scale = [np.sqrt((side**2).sum(axis=1).mean()) for side in sides]
    left, right = (side / size for side, size in zip(sides, scale, strict=True))
    ratio = np.linalg.norm(left[0] - right[1]) / np.linalg.norm(left[2] - right[3])
    assert found.ratio == pytest.approx(ratio)
    same = learned_plane(a_model(), rows, lines)
    assert same.left is same.right


# --- training ---


def test_a_model_keeps_how_it_was_learned_and_its_fingerprint_does_not_hang_on_it(tmp_path):
    model = a_model()
    write_model(tmp_path / "m.h5", model)
    again = read_model(tmp_path / "m.h5")
    assert again.record == model.record
    assert again.fingerprint() == a_model(record={}).fingerprint() == model.fingerprint()
    write_model(tmp_path / "old.h5", a_model(record={}))
    with h5py.File(tmp_path / "old.h5") as file:
        assert "record" not in file
    assert read_model(tmp_path / "old.h5").record == {}


def test_training_leaves_its_curves_without_clocks_in_the_model(tmp_path):
    rng = np.random.default_rng(0)
    group = np.arange(40) % 4
    rows = np.eye(8)[group] + 0.3 * rng.normal(size=(40, 8))
    np.save(tmp_path / "rows.npy", rows.astype(np.float32))
    left, right = rng.integers(0, 40, (2, 200))
    with open(tmp_path / "pairs.csv", "w", encoding="utf-8") as file:
        file.write("left,right,label\n")
        for i, j in zip(left, right, strict=True):
            file.write(f"{i},{j},{int(group[i] == group[j])}\n")
    for name in ("a.h5", "b.h5"):
        summary = jobs.train(
            tmp_path / "rows.npy", tmp_path / "pairs.csv", tmp_path / name, epochs=3
        )
    record = read_model(tmp_path / "a.h5").record
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    told = [
        {k: v for k, v in entry.items() if k in record["history"][0]}
        for entry in summary["history"]
    ]
    assert record["history"] == told
    assert "seconds" not in record["history"][0]
    assert record["calibration"]["slope"] > 0


def test_a_record_that_is_none_is_refused_or_passed_over(world, tmp_path):
    write_model(tmp_path / "m.h5", a_model(record={"history": "x", "metric": 3, "kept": 1}))
    files = (tmp_path / "m.h5", world / "embeddings.h5", world / "pairs.csv")
    jobs.evaluate(*files, label_column="label", bootstrap=0, report=tmp_path / "r.html")
    assert "Training" not in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_curves_in_the_terminal_are_as_high_as_their_values():
    assert curve([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert curve([1, 1]) == "▁▁"
    assert len(curve(list(range(500)))) <= 48
    history = [{"arm": "A", "epoch": n, "loss": 3.0 - n, "auc": 0.1 * n} for n in range(3)]
    history.append({"arm": "B", "epoch": 1, "loss": 9.0, "auc": 0})
    assert history_lines(history, "auc", "A") == [
        "3 epochs of arm A:",
        "loss  3  █▅▁  1",
        "auc   0  ▁▅█  0.2",
    ]
    assert history_lines(history, "auc", "B") == []


# --- the heat map ---


def test_groups_are_labelled_though_the_first_one_has_no_pairs():
    """As with pairs of entities that training never saw: of "both seen" there is none."""
    measured = {"model": (0.9, [0.8, 0.95]), "raw cosine": (0.7, None)}
    groups = [
        plots.Group("both seen"),
        plots.Group("one seen", measured),
        plots.Group("none", measured),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = str(plots.groups_figure("parts", "words", groups, "AUC").svg)
    assert drawn.count(">model<") == drawn.count(">raw cosine<") == 1


def test_a_heat_map_is_drawn_of_few_and_of_many_entities(world, tmp_path):
    jobs.project(world / "model.h5", world / "embeddings.h5", tmp_path / "t.h5")
    arguments = ["matrix", str(tmp_path / "t.h5"), "--top-k", "2", "--json"]
    for name in ("a.png", "b.svg"):
        plot = ["-o", str(tmp_path / f"{name}.h5"), "--plot", str(tmp_path / name)]
        result = CliRunner().invoke(commands, [*arguments, *plot])
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert (found["plot_shape"], found["plot_sampled"]) == ([60, 60], False)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    result = CliRunner().invoke(
        commands, [*arguments, "-o", str(tmp_path / "c.h5"), "--plot", str(tmp_path / "a.png")]
    )
    assert result.exit_code == 1
    assert "exists already" in str(result.exception)
    assert not (tmp_path / "c.h5").exists()
    rng = np.random.default_rng(0)
    np.save(tmp_path / "many.npy", rng.normal(size=(700, 6)).astype(np.float32))
    jobs.project("cosine", tmp_path / "many.npy", tmp_path / "many.h5")
    from fastpair.heat_map import plot_table

    found = plot_table(tmp_path / "many.h5", None, tmp_path / "many.png")
    assert found["plot_sampled"]
    assert 40 < found["plot_shape"][0] <= MOST_DRAWN
    for kind in ("png", "svg", "pdf"):
        one, other = (tmp_path / f"{name}.{kind}" for name in ("one", "other"))
        for plot in (one, other):
            plot_table(tmp_path / "t.h5", None, plot)
        assert one.read_bytes() == other.read_bytes(), kind


@pytest.mark.parametrize("two", [False, True])
def test_a_heat_map_has_the_scores_of_the_ids_beside_it(tmp_path, monkeypatch, two):
    from fastpair import heat_map as room

    rng = np.random.default_rng(2)
    sides = {"a": rng.normal(size=(12, 5)), "b": rng.normal(size=(9, 5))}
    for side, rows in sides.items():
        with h5py.File(tmp_path / f"{side}.h5", "w") as file:
            file["embeddings"], file["ids"] = rows, [f"{side}{n}" for n in range(len(rows))]
        jobs.project("cosine", tmp_path / f"{side}.h5", tmp_path / f"{side}-table.h5")
    seen = []
    monkeypatch.setattr(room, "_save", lambda picture, plot: seen.append(picture))
    other = tmp_path / "b-table.h5" if two else None
    room.plot_table(tmp_path / "a-table.h5", other, tmp_path / "map.png")
    axes = seen[0].axes[0]
    names = [[t.get_text() for t in axis.get_ticklabels()] for axis in (axes.yaxis, axes.xaxis)]
    assert [sorted(one) for one in names] == [
        sorted(f"{side}{n}" for n in range(len(sides[side]))) for side in ("a", "b" if two else "a")
    ]
    unit = {side: rows / np.linalg.norm(rows, axis=1)[:, None] for side, rows in sides.items()}
    left, right = (np.stack([unit[name[0]][int(name[1:])] for name in one]) for one in names)
    np.testing.assert_allclose(axes.images[0].get_array(), left @ right.T, atol=1e-5)


@pytest.mark.parametrize(("count", "step"), [(2, 1), (40, 1), (41, 2), (240, 6)])
def test_ids_stand_at_their_rows_however_many_there_are(count, step):
    names = [[f"{side}{n}" for n in range(count)] for side in "ab"]
    axes = heat_map(np.eye(count), names, "similarity", [count, count]).axes[0]
    for axis, ids in zip((axes.yaxis, axes.xaxis), names, strict=True):
        assert [text.get_text() for text in axis.get_ticklabels()] == ids[::step]
        assert [int(place) for place in axis.get_ticklocs()] == list(range(0, count, step))
        assert (f"one in {step} named" in axis.get_label_text()) == (step > 1)


def test_similar_rows_come_side_by_side():
    group = np.array([0, 1, 0, 1, 0, 1, 2, 2])
    order = leaf_order((group[:, None] == group[None]) * 1.0)
    assert sorted(order.tolist()) == list(range(8))
    assert (np.diff(group[order]) != 0).sum() == 2


def test_a_curve_of_probabilities_is_what_is_reliable(world, tmp_path):
    isotonic = Isotonic(np.array([-3.0, 3.0]), np.array([0.2, 0.6]))
    write_model(tmp_path / "m.h5", a_model(calibration=isotonic))
    files = (tmp_path / "m.h5", world / "embeddings.h5", world / "pairs.csv")
    jobs.evaluate(*files, label_column="label", bootstrap=0, report=tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "0.6 to 0.7" in text
    assert "0.7 to 0.8" not in text
