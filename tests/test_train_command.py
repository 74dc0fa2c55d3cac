"""``fastpair train``: files in, a model, a comparison of arms and a log out."""

import json

import numpy as np
import pytest

from fastpair import jobs
from fastpair.checkpoints import SUFFIX, FileCheckpoint
from fastpair.errors import ArgumentError, DataError, FileError, MismatchError
from fastpair.files import read_model


@pytest.fixture
def folder(tmp_path):
    """Embeddings of 60 entities in six groups, 600 pairs with labels, grades and weights."""
    rng = np.random.default_rng(0)
    group = np.arange(60) % 6
    rows = rng.normal(size=(60, 12)) * 1.5
    rows[:, :6] = np.eye(6)[group] + 0.1 * rng.normal(size=(60, 6))
    np.save(tmp_path / "rows.npy", rows.astype(np.float32))
    left, right = rng.integers(0, 60, (2, 600))
    good = group[left] == group[right]
    with open(tmp_path / "pairs.csv", "w", encoding="utf-8") as file:
        file.write("left,right,label,grade,trust\n")
        for i, j, label in zip(left, right, good, strict=True):
            file.write(f"{i},{j},{int(label)},{1 + 4 * label},{0.5 + label}\n")
    with open(tmp_path / "good.csv", "w", encoding="utf-8") as file:
        file.write("left,right\n")
        file.writelines(f"{i},{j}\n" for i, j in zip(left[good], right[good], strict=True))
    return tmp_path


def learn(folder, name="model.h5", pairs="pairs.csv", **options):
    options = {"epochs": 4, "label_column": "label", **options}
    return jobs.train(folder / "rows.npy", folder / pairs, folder / name, **options)


def test_the_comparison_of_arms_can_be_written_as_json(folder):
    summary = json.loads(json.dumps(learn(folder), allow_nan=False))
    assert [arm["arm"] for arm in summary["arms"]] == [
        "raw cosine",
        "unlabelled PCA",
        *("A", "B", "D"),
    ]
    (kept,) = (arm for arm in summary["arms"] if arm["kept"])
    assert summary["validation"] == {"average_precision": kept["average_precision"]}
    assert read_model(folder / "model.h5").fingerprint() == summary["fingerprint"]


def test_the_log_has_one_line_of_json_an_epoch(folder):
    summary = learn(folder, log=folder / "log.jsonl")
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == summary["history"]
    assert {"arm", "epoch", "loss", "average_precision"} <= summary["history"][0].keys()
    with pytest.raises(FileError, match=r"log\.jsonl"):
        learn(folder, "other.h5", log=folder / "log.jsonl")


def test_an_interrupted_training_is_resumed_to_the_same_bytes(folder, monkeypatch):
    learn(folder, "whole.h5")
    saved = []

    def save(self, config, arrays):
        self.seconds = 0
        original(self, config, arrays)
        saved.append(config)
        if len(saved) == 6:
            raise KeyboardInterrupt

    original = FileCheckpoint.save
    monkeypatch.setattr(FileCheckpoint, "save", save)
    with pytest.raises(KeyboardInterrupt):
        learn(folder)
    state = folder / ("model.h5" + SUFFIX)
    assert state.exists()
    assert not (folder / "model.h5").exists()
    with pytest.raises(MismatchError, match="had other options"):
        learn(folder, resume=True, seed=1)
    summary = learn(folder, resume=True)
    assert "continued after 6 epochs" in " ".join(summary["notes"])
    assert (folder / "model.h5").read_bytes() == (folder / "whole.h5").read_bytes()
    assert not state.exists()


def test_a_state_that_is_none_is_refused_and_without_one_training_starts_anew(folder):
    state = folder / ("model.h5" + SUFFIX)
    state.write_bytes(b"nothing of the kind")
    with pytest.raises(FileError, match="holds no state of a training"):
        learn(folder, resume=True)
    state.unlink()
    summary = learn(folder, resume=True)
    assert summary["history"]
    assert any("nothing to continue" in note for note in summary["notes"])


def test_a_resumed_log_holds_each_epoch_once(folder, monkeypatch):
    def save(self, config, arrays):
        self.seconds = 0
        original(self, config, arrays)
        if len(config["history"]) == 3:
            raise KeyboardInterrupt

    original = FileCheckpoint.save
    log = folder / "log.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(FileCheckpoint, "save", save)
        with pytest.raises(KeyboardInterrupt):
            learn(folder, log=log)
    history = learn(folder, log=log, resume=True)["history"]
    assert [json.loads(line) for line in log.read_text().splitlines()] == history


@pytest.mark.parametrize("saved", [True, False])
def test_an_interruption_says_whether_training_can_go_on(folder, monkeypatch, saved):
    from click.testing import CliRunner

    from fastpair.cli import commands

    def interrupted(output, **_):
        if saved:
            output.with_name(output.name + SUFFIX).write_bytes(b"state")
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "train", interrupted)
    done = CliRunner().invoke(commands, ["train", "rows", "pairs", "-o", str(folder / "m.h5")])
    assert done.exit_code == 130
    assert ("--resume goes on where it stopped" in done.stderr) == saved


def test_a_log_in_place_of_the_model_is_refused(folder):
    with pytest.raises(ArgumentError, match="its own name"):
        learn(folder, log=folder / "model.h5")


def test_a_bound_above_every_label_is_named(folder):
    with pytest.raises(DataError, match="--good is 9 but the largest label is 5"):
        learn(folder, label_column="grade", good=9)


def test_a_column_of_weights_counts(folder):
    plain, weighted = (learn(folder, f"{name}.h5", weight_column=name) for name in (None, "trust"))
    assert plain["fingerprint"] != weighted["fingerprint"]
    with pytest.raises(DataError, match="wages"):
        learn(folder, "x.h5", weight_column="wages")


def test_good_pairs_without_labels_can_be_learned_from(folder):
    summary = learn(folder, pairs="good.csv", label_column=None, loss="sampled")
    assert any("bad ones were sampled" in note for note in summary["notes"])
    with pytest.raises(DataError, match="label"):
        learn(folder, "x.h5", pairs="good.csv", label_column=None)


def test_grades_are_learned_or_cut_but_not_both(folder):
    graded = learn(folder, "graded.h5", label_column="grade", graded=True)
    assert (graded["unit"], graded["threshold"]) == ("grade", None)
    assert "spearman" in graded["validation"]
    cut = learn(folder, "cut.h5", label_column="grade", good=3)
    assert cut["unit"] == "log-odds"
    with pytest.raises(ArgumentError, match="choose one"):
        learn(folder, "x.h5", label_column="grade", good=3, graded=True)


def test_calibration_and_threshold_are_stored_in_the_model(folder):
    learn(folder, calibrate="isotonic", threshold_by="recall=0.9", prior=0.05)
    model = read_model(folder / "model.h5")
    assert model.calibration is not None
    assert model.threshold is not None
    assert not (folder / ("model.h5" + SUFFIX)).exists()


def test_the_command_shows_a_table_of_arms(folder):
    from click.testing import CliRunner

    from fastpair.cli import commands

    files = [str(folder / name) for name in ("rows.npy", "pairs.csv")]
    arguments = ["train", *files, "-o", str(folder / "m.h5"), "--label", "label", "--epochs", "2"]
    done = CliRunner().invoke(commands, [*arguments, "--arms", "A,D"], catch_exceptions=False)
    assert done.exit_code == 0
    for text in ("raw cosine", "unlabelled PCA", "average precision, validation", "kept"):
        assert text in done.stderr
    done = CliRunner().invoke(commands, [*arguments, "--overwrite", "--asymmetric"])
    assert "will NOT be" in done.stderr
    assert "ASYMMETRIC" in done.stderr
