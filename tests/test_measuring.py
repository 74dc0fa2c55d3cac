"""What `evaluate`, `features` and `score` say of a model agrees with what it writes."""

import csv
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from sklearn import metrics

from fastpair import jobs, wording
from fastpair.cli import commands
from fastpair.comparison import Similarity, breakdown, compare
from fastpair.errors import ArgumentError, DataError, MismatchError
from fastpair.features import KINDS, PairFeatures
from fastpair.files import read_model, write_model
from fastpair.model import Branch, Isotonic, Model, Preparation, builtin, probabilities
from fastpair.properties import measure_properties
from fastpair.towers import Linear
from fastpair.wording import metric_table, property_lines


def learned_model(columns=6, **fields):
    """A cosine of projected rows and a distance of others, in log-odds."""
    rng = np.random.default_rng(1)
    projections = [np.eye(columns) + 0.1 * rng.normal(size=(columns, columns)) for _ in range(2)]
    branches = [
        Branch("cosine", {"scale": np.array([6.0])}, Linear(projections[0])),
        Branch("absdiff", {"weight": np.full(columns, -0.2)}, Linear(projections[1])),
    ]
    settings = {"constant": -2.0, "threshold": 0.25, "unit": "log-odds", **fields}
    return Model(branches, columns, Preparation(unit_rows=True), **settings)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """80 entities in eight groups; pairs with a column `kind`; a model."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    groups = np.arange(80) % 8
    embeddings = (rng.normal(size=(8, 6))[groups] + 0.7 * rng.normal(size=(80, 6))).astype("f4")
    ids = [f"e{number}" for number in range(80)]
    with h5py.File(folder / "embeddings.h5", "w") as file:
        file["embeddings"], file["ids"] = embeddings, ids
    for name, count, first in (("train", 200, 0), ("test", 400, 20)):
        left, right = rng.integers(first, 60 if name == "train" else 80, (2, count))
        same = groups[left] == groups[right]
        kinds = np.where(same, "same", np.where(left % 2 == right % 2, "near", "far"))
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id_a", "id_b", "label", "kind"])
            writer.writerows(
                [ids[i], ids[j], int(s), k]
                for i, j, s, k in zip(left, right, same, kinds, strict=True)
            )
    write_model(folder / "model.h5", learned_model())
    jobs.project(folder / "model.h5", folder / "embeddings.h5", folder / "table.h5")
    return folder


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def numbers_of(world, name="test"):
    rows = rows_of(world / f"{name}.csv")
    with h5py.File(world / "embeddings.h5") as file:
        embeddings = file["embeddings"][:]
    sides = (np.array([int(row[side][1:]) for row in rows]) for side in ("id_a", "id_b"))
    labels = np.array([float(row["label"]) for row in rows])
    return embeddings, *sides, labels, np.array([row["kind"] for row in rows])


def evaluated(world, **options):
    files = (world / "model.h5", world / "embeddings.h5", world / "test.csv")
    return jobs.evaluate(*files, **{"bootstrap": 0, **options})


# --- evaluate ---


def test_metrics_are_those_of_the_model_and_of_its_baselines(world):
    embeddings, left, right, labels, _ = numbers_of(world)
    found = evaluated(world, bootstrap=30)
    scores = read_model(world / "model.h5").score(embeddings[left], embeddings[right])
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(labels, scores))
    assert found["f1"] == pytest.approx(metrics.f1_score(labels, scores >= 0.25))
    chance = 1 / (1 + np.exp(-scores))
    assert found["log_loss"] == pytest.approx(metrics.log_loss(labels, chance), rel=1e-5)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosine = (unit[left] * unit[right]).sum(axis=1)
    assert found["raw_cosine"]["auc"] == pytest.approx(metrics.roc_auc_score(labels, cosine))
    distance = np.linalg.norm(unit[left] - unit[right], axis=1)  # all components are kept
    assert found["unlabelled_pca"]["auc"] == pytest.approx(metrics.roc_auc_score(labels, -distance))
    for name in ("raw_cosine", "unlabelled_pca"):
        low, high = found[name]["gain"]["auc"]["interval"]
        assert low <= found["auc"] - found[name]["auc"] <= high
    low, high = found["intervals"]["auc"]
    assert low < found["auc"] < high
    json.dumps(found, allow_nan=False)


def test_recall_counts_good_partners_among_the_best(world):
    embeddings, left, right, labels, _ = numbers_of(world)
    found = evaluated(world, bootstrap=20)["recall_at"]
    candidates = np.unique([left, right])  # entities stand on both sides
    good = labels == 1
    assert found["queries"] == len(np.unique(left[good]))
    assert (found["candidates"], found["n_good"]) == (len(candidates), good.sum())
    model = read_model(world / "model.h5")
    hits = []
    for i, j in zip(left[good], right[good], strict=True):
        others = candidates[candidates != i]
        scores = model.score(np.repeat(embeddings[i][None], len(others), 0), embeddings[others])
        own = model.score(embeddings[[i]], embeddings[[j]])[0]
        place = (scores > own).sum() if i != j else math.inf
        hits.append([place < k for k in (1, 10, 50)])
    for k, expected in zip(("1", "10", "50"), np.mean(hits, axis=0), strict=True):
        assert found["model"][k]["value"] == pytest.approx(expected)
        low, high = found["model"][k]["interval"]
        assert low <= expected <= high


def test_pairs_are_measured_apart_by_entities_in_training_and_by_columns(world):
    _, left, right, labels, kinds = numbers_of(world)
    _, *trained, _, _ = numbers_of(world, "train")
    seen = np.isin(left, trained).astype(int) + np.isin(right, trained)
    found = evaluated(world, train=world / "train.csv", by=["kind"])
    for number, name in ((2, "both seen"), (1, "one seen"), (0, "none seen")):
        group = found["entities"][name]
        assert group["n_pairs"] == (seen == number).sum()
        assert group["n_good"] == labels[seen == number].sum()
    assert min(group["n_pairs"] for group in found["entities"].values()) > 0
    by = found["by"]["kind"]
    assert {kind: by[kind]["n_pairs"] for kind in by} == {k: (kinds == k).sum() for k in set(kinds)}
    embeddings = numbers_of(world)[0]
    scores = read_model(world / "model.h5").score(embeddings[left], embeddings[right])
    part = (kinds == "near") | (labels == 1)
    assert by["near"]["against"] == "all good pairs"
    assert by["near"]["n_good"] == 0
    assert by["near"]["auc"] == pytest.approx(metrics.roc_auc_score(labels[part], scores[part]))
    assert by["same"]["auc"] == found["auc"]


def test_rare_values_of_a_column_are_left_out_and_counted(world):
    embeddings, left, right, labels, _ = numbers_of(world)
    comparison = compare(builtin("cosine"), embeddings, left, right, labels)
    values = [f"v{number % 25 if number % 2 else 0}" for number in range(len(left))]
    found, rest = breakdown(comparison, values)
    assert (len(found), rest) == (20, len(set(values)) - 20)
    assert next(iter(found)) == "v0"


def test_grades_are_measured_by_correlations(world, tmp_path):
    embeddings, left, right, _, _ = numbers_of(world)
    grades = np.round(builtin("cosine").score(embeddings[left], embeddings[right]) * 2 + 2)
    np.save(tmp_path / "v.npy", embeddings)
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["pairs"], file["label"] = np.stack([left, right], 1), grades
        file["part"] = np.array([b"x", b"y"])[np.arange(len(left)) % 2]
    found = jobs.evaluate(
        "cosine", tmp_path / "v.npy", tmp_path / "p.h5", graded=True, bootstrap=20, by=["part"]
    )
    assert found["spearman"] > 0.9
    assert set(found["intervals"]) == {"spearman", "pearson"}
    assert found["recall_at"] == {}
    assert found["by"]["part"]["x"]["n_pairs"] == found["by"]["part"]["y"]["n_pairs"] == 200
    assert found["by"]["part"]["x"]["spearman"] > 0.9
    both = jobs.evaluate("cosine", tmp_path / "v.npy", tmp_path / "p.h5", good=3, bootstrap=20)
    assert both["n_good"] == (grades >= 3).sum()
    assert {"auc", "spearman"} <= set(both["intervals"])
    few = jobs.evaluate("cosine", tmp_path / "v.npy", tmp_path / "p.h5", good=3, bootstrap=0)
    for summary in (found, both, few):
        assert {"Spearman", "Pearson"} <= {row[0] for row in metric_table(summary)}
    assert "Spearman" not in {row[0] for row in metric_table(evaluated(world))}


def test_grades_of_plus_and_minus_one_are_grades_to_a_model_of_grades(world, tmp_path):
    embeddings, left, right, labels, _ = numbers_of(world)
    np.save(tmp_path / "v.npy", embeddings)
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["pairs"], file["label"] = np.stack([left, right], 1), 2 * labels - 1
    model = replace(builtin("cosine"), unit="grade")
    write_model(tmp_path / "m.h5", model)
    found = jobs.evaluate(tmp_path / "m.h5", tmp_path / "v.npy", tmp_path / "p.h5", bootstrap=0)
    errors = model.score(embeddings[left], embeddings[right]) - (2 * labels - 1)
    assert found["mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-5)


def test_a_curve_of_probabilities_is_what_is_measured(world, tmp_path):
    curve = Isotonic(np.array([-3.0, 0.0, 3.0]), np.array([0.1, 0.3, 0.8]))
    write_model(tmp_path / "m.h5", learned_model(calibration=curve))
    found = jobs.evaluate(
        tmp_path / "m.h5", world / "embeddings.h5", world / "test.csv", bootstrap=0
    )
    embeddings, left, right, labels, _ = numbers_of(world)
    chance = curve(learned_model().score(embeddings[left], embeddings[right]))
    assert found["brier"] == pytest.approx(metrics.brier_score_loss(labels, chance), rel=1e-4)


def test_the_words_of_evaluate_hold_its_numbers(world):
    files = [str(world / name) for name in ("model.h5", "embeddings.h5", "test.csv")]
    options = ["--by", "kind", "--train", str(world / "train.csv"), "--properties"]
    told = CliRunner().invoke(commands, ["evaluate", *files, *options, "--bootstrap", "20"])
    assert told.exit_code == 0
    found = evaluated(world)
    for text in (
        f"{found['auc']:.4f} [",
        f"F1 at 0.25             {found['f1']:.4f}",
        "raw cosine",
        "unlabelled PCA",
        "recall in the best 10",
        "gain in average precision over the raw cosine",
        "none seen",
        "against all good pairs",
        "holds to the bit",
        "transitivity",
    ):
        assert text in told.stdout
    assert "[" not in CliRunner().invoke(commands, ["evaluate", *files, "--bootstrap", "0"]).stdout


def test_what_rounds_to_zero_has_the_sign_of_zero():
    assert (
        wording.number({"value": -4e-9, "interval": (-1e-5, 1e-5)}, "+")
        == "+0.0000 [+0.0000, +0.0000]"
    )
    assert wording.number({"value": -4e-4, "interval": None}, "+") == "-0.0004"
    assert wording.number({"value": -1e-9}) == "0.0000"


def test_columns_that_are_not_there_are_named(world):
    with pytest.raises(DataError, match=r"'colour'.*'kind'"):
        evaluated(world, by=["colour"])


# --- properties ---


def test_the_cosine_is_symmetric_and_reflexive(world):
    embeddings = numbers_of(world)[0]
    found = measure_properties(Similarity(builtin("cosine"), embeddings))
    assert {name: counts["different"] for name, counts in found["symmetry"].items()} == {
        "cpu": 0,
        "reference": 0,
    }
    assert found["reflexivity"]["entities"] == 80
    assert found["transitivity"] is None  # of similarities without probabilities
    assert found["triangle"] is None


def test_the_dot_product_is_not_reflexive():
    rows = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    found = measure_properties(Similarity(builtin("dot"), rows))
    expected = {"entities": 3, "beaten": pytest.approx(1 / 3), "guaranteed": False}
    assert found["reflexivity"] == expected


METRICS = {
    "mahalanobis": {"log_weight": np.zeros(1)},
    "sqdiff": {"weight": -np.ones(3)},
    "absdiff": {"weight": -np.ones(3)},
    "hyperbolic": {"log_scale": np.zeros(1)},
}


@pytest.mark.parametrize("head", ["euclidean", "manhattan", *METRICS])
def test_a_metric_violates_no_triangle(head):
    """Where a score is minus a square, the distance is its root."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 3))
    rows[30:] = rows[:30] + 1e-3 * rng.normal(size=(30, 3))  # a root makes much of what is small
    model = builtin(head) if head not in METRICS else None
    if model is None:
        link = "negative_arcosh" if head == "hyperbolic" else "identity"
        model = Model([Branch(head, METRICS[head])], 3, link=link, offset=7.0, slope=2.0)
    found = measure_properties(Similarity(model, rows))["triangle"]
    assert all(triples["triples"] > 10_000 for triples in found.values())
    assert all(triples["violated"] == 0 for triples in found.values())
    assert {triples["of"] for triples in found.values()} == {"distances"}


def test_differences_that_are_no_metric_violate_triangles():
    rows = np.random.default_rng(0).normal(size=(60, 3))
    branches = [Branch(head, {"weight": -np.ones(3)}) for head in ("sqdiff", "absdiff")]
    found = measure_properties(Similarity(Model(branches, 3, Preparation()), rows))
    assert found["triangle"]["random"]["violated"] > 0.01
    assert found["triangle"]["random"]["of"] == "falls of scores"
    (line, _) = (line for line in property_lines(found) if line.startswith("triangle"))
    assert line.startswith("triangle inequality of falls of scores: violated by ")


def test_violated_triples_of_probabilities_are_counted():
    """a and c are both near b but not near each other: p is 0.88 and 0.88, but 0.12."""
    angle = np.deg2rad([0, 60, 120])
    rows = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    branch = Branch("cosine", {"scale": np.array([4.0])})
    model = Model([branch], 2, Preparation(), unit="log-odds")
    found = measure_properties(Similarity(model, rows))["transitivity"]
    # Of the three that can stand in the middle, one is violated.
    assert found["random"]["violated"] == pytest.approx(1 / 3, abs=0.03)
    calm = Model([branch], 2, Preparation(), unit="log-odds", constant=-4.0)
    assert measure_properties(Similarity(calm, rows))["transitivity"]["random"]["violated"] == 0


def test_an_asymmetric_model_has_no_symmetry_to_measure():
    rng = np.random.default_rng(0)
    towers = [Linear(rng.normal(size=(3, 4))) for _ in range(2)]
    model = Model([Branch("cosine", {"scale": np.ones(1)}, *towers)], 4, Preparation())
    rows = rng.normal(size=(20, 4))
    similarity = Similarity(model, rows)
    left, right = rng.integers(0, 20, (2, 30))
    expected = model.score(rows[left], rows[right])
    np.testing.assert_allclose(similarity(left, right), expected, atol=1e-6)
    assert measure_properties(similarity)["symmetry"] is None
    best, _ = similarity.top_k(np.array([3]), np.arange(20), 1)
    assert best[0, 0] == np.argmax(model.score(np.repeat(rows[3:4], 20, 0), rows))


# --- features ---


def test_features_are_what_their_names_say(world):
    embeddings, left, right, _, _ = numbers_of(world)
    model = learned_model()
    compute = PairFeatures(model, 6)
    features = dict(zip(compute.names, compute(embeddings[left], embeddings[right]).T, strict=True))
    assert len(features) == 2 * (4 * 6 + 1)
    rows = model.prepare(embeddings)
    z = rows @ model.branches[1].tower.projection.T
    a, b = z[left], z[right]
    for kind, values in {
        "product": a * b,
        "absdiff": np.abs(a - b),
        "sqdiff": (a - b) ** 2,
        "sum": a + b,
    }.items():
        for column in range(6):
            found = features[f"absdiff_{kind}_{column}"]
            np.testing.assert_allclose(found, values[:, column], rtol=1e-5, atol=1e-6)
    raw = features["cosine_raw"] + features["absdiff_raw"] + model.constant
    np.testing.assert_allclose(raw, model.score(embeddings[left], embeddings[right]), atol=1e-5)


def test_features_of_swapped_pairs_are_the_same_to_the_bit_in_any_company(world):
    embeddings, left, right, _, _ = numbers_of(world)
    compute = PairFeatures(learned_model(), 6)
    whole = compute(embeddings[left], embeddings[right])
    assert compute(embeddings[right], embeddings[left]).tobytes() == whole.tobytes()
    some = slice(7, 40)
    assert compute(embeddings[left[some]], embeddings[right[some]]).tobytes() == (
        whole[some].tobytes()
    )


@pytest.mark.parametrize("suffix", ["parquet", "h5"])
def test_feature_files_hold_keys_labels_and_features(world, tmp_path, monkeypatch, suffix):
    monkeypatch.setattr("fastpair.jobs.folding.FEATURES_AT_ONCE", 13 * 90)  # several blocks
    embeddings, left, right, labels, _ = numbers_of(world)
    output = tmp_path / f"features.{suffix}"
    files = (world / "model.h5", world / "embeddings.h5", world / "test.csv", output)
    summary = jobs.features(*files, kinds=["absdiff", "raw"])
    assert (summary["pairs"], summary["features"], summary["labels"]) == (400, 14, True)
    compute = PairFeatures(learned_model(), 6, ["absdiff", "raw"])
    expected = compute(embeddings[left], embeddings[right])
    if suffix == "parquet":
        table = pq.read_table(output)
        assert table.column_names == ["id_a", "id_b", "label", *compute.names]
        assert table["id_a"].to_pylist() == [f"e{number}" for number in left]
        found = np.stack([table[name].to_numpy() for name in compute.names], axis=1)
        assert table["label"].to_numpy().tolist() == labels.tolist()
    else:
        with h5py.File(output) as file:
            found = file["features"][:]
            assert file["names"].asstr()[:].tolist() == compute.names
            assert file["left"][:].tolist() == left.tolist()
            assert file["right"][:].tolist() == right.tolist()
            assert file["label"][:].tolist() == labels.tolist()
    assert found.tobytes() == expected.tobytes()
    before = output.read_bytes()
    jobs.features(*files, kinds=["absdiff", "raw"], overwrite=True, threads=1)
    assert output.read_bytes() == before


def test_pairs_without_labels_have_features_too(tmp_path):
    np.save(tmp_path / "v.npy", np.eye(4))
    np.save(tmp_path / "p.npy", np.array([[0, 1], [2, 2]]))
    summary = jobs.features(
        "cosine", tmp_path / "v.npy", tmp_path / "p.npy", tmp_path / "f.parquet"
    )
    assert summary["labels"] is False
    assert pq.read_table(tmp_path / "f.parquet")["cosine_raw"].to_pylist() == [0, 1]


def test_features_that_cannot_be_written_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match="quotient"):
        PairFeatures(builtin("cosine"), 4, ["product", "quotient"])
    with pytest.raises(ArgumentError, match="once"):
        PairFeatures(builtin("cosine"), 4, ["product", "product"])
    with pytest.raises(MismatchError, match="4 columns"):
        PairFeatures(learned_model(), 4)
    with pytest.raises(DataError, match="float32 cannot hold"):
        PairFeatures(builtin("dot"), 2, KINDS)(np.full((3, 2), 1e30), np.ones((3, 2)) * -1e30)
    np.save(tmp_path / "v.npy", np.eye(4))
    table = pa.table({"dot_raw": [0, 1], "other": [2, 3]})
    pq.write_table(table, tmp_path / "p.parquet")
    files = ("dot", tmp_path / "v.npy", tmp_path / "p.parquet", tmp_path / "f.parquet")
    with pytest.raises(ArgumentError, match="'dot_raw'"):
        jobs.features(*files)
    assert not (tmp_path / "f.parquet").exists()


def test_a_boosted_tree_learns_from_features(tmp_path):
    """The example of the documentation, on handwritten digits."""
    from sklearn.datasets import load_digits
    from sklearn.ensemble import HistGradientBoostingClassifier

    digits = load_digits()
    np.save(tmp_path / "images.npy", digits.data.astype(np.float32))
    rng = np.random.default_rng(0)
    order = rng.permutation(len(digits.target))
    for name, part in (("train", order[:1200]), ("test", order[1200:])):
        left = rng.choice(part, 6000)
        right = rng.choice(part, 6000)
        labels = digits.target[left] == digits.target[right]
        table = pa.table({"left": left, "right": right, "label": labels.astype(int)})
        pq.write_table(table, tmp_path / f"{name}.parquet")
        files = (tmp_path / "images.npy", tmp_path / f"{name}.parquet")
        jobs.features(
            "cosine", *files, tmp_path / f"{name}.h5", kinds=["product", "absdiff", "raw"]
        )

    with h5py.File(tmp_path / "train.h5") as file:
        tree = HistGradientBoostingClassifier(max_iter=60, random_state=0)
        tree.fit(file["features"][:], file["label"][:])

    with h5py.File(tmp_path / "test.h5") as file:
        features, labels = file["features"][:], file["label"][:]
    reached = metrics.roc_auc_score(labels, tree.predict_proba(features)[:, 1])
    cosine = features[:, -1]  # the raw score of the only branch
    assert reached > metrics.roc_auc_score(labels, cosine) + 0.02


# --- score ---


def scores_of(path):
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            return file["score"][:], dict(file.attrs)
    if path.suffix == ".parquet":
        return pq.read_table(path).column(2).to_numpy(), None
    return np.array([list(row.values())[2] for row in rows_of(path)], np.float32), None


@pytest.mark.parametrize("suffix", ["h5", "csv", "parquet"])
def test_probabilities_and_decisions_follow_from_scores(world, tmp_path, suffix):
    found = {}
    for form in ("score", "probability", "decision"):
        path = tmp_path / f"{form}.{suffix}"
        options = {} if form == "score" else {form: True}
        summary = jobs.score(world / "table.h5", world / "test.csv", path, **options)
        assert summary["unit"] == ("log-odds" if form == "score" else form)
        found[form], attributes = scores_of(path)
        if attributes is not None:
            assert attributes["unit"] == summary["unit"]
    scores = found["score"].astype(np.float64)
    expected = (1 / (1 + np.exp(-scores))).astype(np.float32)
    np.testing.assert_allclose(found["probability"], expected, rtol=1e-6)
    assert found["decision"].tolist() == (scores >= 0.25).tolist()
    assert 0 < found["decision"].sum() < len(scores)


def test_the_least_score_is_in_the_unit_that_is_written(world, tmp_path):
    table, pairs = world / "table.h5", world / "test.csv"
    jobs.score(table, pairs, tmp_path / "all.h5", probability=True)
    chance, _ = scores_of(tmp_path / "all.h5")
    summary = jobs.score(table, pairs, tmp_path / "some.h5", probability=True, min_score=0.6)
    kept, attributes = scores_of(tmp_path / "some.h5")
    assert summary["kept"] == len(kept) == (chance >= 0.6).sum() < len(chance)
    assert attributes["min_score"] == 0.6
    jobs.score(table, pairs, tmp_path / "taken.csv", decision=True, min_score=1)
    assert {row["decision"] for row in rows_of(tmp_path / "taken.csv")} == {"1"}


def test_a_curve_in_the_model_gives_the_probabilities(world, tmp_path):
    curve = Isotonic(np.array([-3.0, 0.0, 3.0]), np.array([0.1, 0.3, 0.8]))
    write_model(tmp_path / "m.h5", learned_model(calibration=curve))
    jobs.project(tmp_path / "m.h5", world / "embeddings.h5", tmp_path / "t.h5")
    pairs = world / "test.csv"
    jobs.score(tmp_path / "t.h5", pairs, tmp_path / "s.h5")
    jobs.score(tmp_path / "t.h5", pairs, tmp_path / "p.h5", probability=True)
    scores, chance = (scores_of(tmp_path / f"{name}.h5")[0] for name in "sp")
    assert chance.tolist() == curve(scores.astype(np.float64)).astype(np.float32).tolist()


def test_what_has_no_probability_or_threshold_is_refused(world, tmp_path):
    pairs, output = world / "test.csv", tmp_path / "s.h5"
    jobs.project("cosine", world / "embeddings.h5", tmp_path / "t.h5")
    with pytest.raises(ArgumentError, match=r"similarity.*no probability"):
        jobs.score(tmp_path / "t.h5", pairs, output, probability=True)
    with pytest.raises(ArgumentError, match="no threshold"):
        jobs.score(tmp_path / "t.h5", pairs, output, decision=True)
    with pytest.raises(ArgumentError, match="one of"):
        jobs.score(world / "table.h5", pairs, output, decision=True, probability=True)
    assert not output.exists()


def test_tiny_probabilities_stay_apart():
    log_odds = np.array([-80.0, -40.0, 0.0, 800.0])
    expected = [math.exp(-80), math.exp(-40), 0.5, 1.0]
    np.testing.assert_allclose(probabilities(log_odds, "log-odds"), expected, rtol=1e-12)


def test_the_commands_take_the_same_options(world, tmp_path):
    def told(*arguments, code=0):
        done = CliRunner().invoke(commands, [str(argument) for argument in arguments])
        assert done.exit_code == code, done.output
        return done

    files = [world / name for name in ("model.h5", "embeddings.h5", "test.csv")]
    done = told("features", *files, "-o", tmp_path / "f.h5", "--kinds", "product, raw", "--json")
    assert json.loads(done.stdout)["features"] == 2 * 6 + 2
    pairs = [world / "table.h5", world / "test.csv"]
    told("score", *pairs, "-o", tmp_path / "p.csv", "--probability")
    chance, _ = scores_of(tmp_path / "p.csv")
    assert 0 <= chance.min() < chance.max() <= 1
    told("score", *pairs, "-o", tmp_path / "d.csv", "--decision")
    assert set(scores_of(tmp_path / "d.csv")[0]) == {0, 1}
    found = json.loads(told("evaluate", *files, "--json", "--properties").stdout)
    assert found["properties"]["symmetry"]["cpu"]["different"] == 0


def test_an_interrupted_run_goes_on_in_the_same_unit_alone(world, tmp_path):
    table, pairs, output = world / "table.h5", world / "test.csv", tmp_path / "s.h5"
    jobs.score(table, pairs, tmp_path / "whole.h5", probability=True)
    with pytest.raises(KeyboardInterrupt):
        jobs.score(table, pairs, output, probability=True, progress=interrupt)
    with pytest.raises(MismatchError, match="its unit is 'probability', now it is 'log-odds'"):
        jobs.score(table, pairs, output, resume=True)
    jobs.score(table, pairs, output, probability=True, resume=True)
    assert output.read_bytes() == (tmp_path / "whole.h5").read_bytes()


def interrupt(pairs):
    if pairs:
        raise KeyboardInterrupt


def test_a_head_of_ones_own_is_named_where_the_model_is_used(world, tmp_path):
    """Each command in a process of its own: only what the command line names is imported."""
    (tmp_path / "mine.py").write_text(
        "from fastpair.heads import AbsoluteDifference\n\n"
        "class Chord(AbsoluteDifference):\n    pass\n"
    )
    embeddings, pairs = world / "embeddings.h5", world / "test.csv"

    def run(*arguments, code=0):
        program = [sys.executable, "-c", "from fastpair.cli import main; main()"]
        command = [*program, *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done

    own = ("--head", "mine:Chord")
    run("train", embeddings, world / "train.csv", "--valid", pairs, "-o", "m.h5", *own)
    assert "mine:Chord" in run("evaluate", "m.h5", embeddings, pairs, code=1).stderr
    found = json.loads(run("evaluate", "m.h5", embeddings, pairs, *own, "--json").stdout)
    run("features", "m.h5", embeddings, pairs, "-o", "f.h5", *own)
    run("project", "m.h5", embeddings, "-o", "t.h5", *own)
    run("score", "t.h5", pairs, "-o", "s.h5")
    labels = numbers_of(world)[3]
    scores, _ = scores_of(tmp_path / "s.h5")
    assert metrics.roc_auc_score(labels, scores) == pytest.approx(found["auc"], abs=1e-12)


BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "heads.py"


@pytest.mark.skipif(not BENCHMARK.exists(), reason="the benchmarks are not beside these tests")
def test_the_table_of_heads_can_be_made_again(tmp_path):
    output = tmp_path / "heads.md"
    command = [sys.executable, BENCHMARK, "-o", output, "--sets", "digits", "--heads", "cosine,sum"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    told = output.read_text()
    assert "| head | digits, AUC |" in told
    # What an image is by itself says nothing about pairs: a baseline is kept, and said.
    assert "| sum | 0.864 (" in told
    rows = [json.loads(line) for line in (tmp_path / "heads.jsonl").read_text().splitlines()]
    assert [row["head"] for row in rows] == ["cosine", "sum"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert len((tmp_path / "heads.jsonl").read_text().splitlines()) == 2
