"""Id models as files and commands: train --ids, project, score, matrix, evaluate, nearest."""

import json

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from fastpair import id_jobs, jobs
from fastpair.cli import commands
from fastpair.errors import ArgumentError, DataError, FastpairError, FileError, MismatchError
from fastpair.files import describe, read_model, read_table
from fastpair.nearest import nearest
from fastpair.verifying import verify

USERS, ITEMS = 40, 60


def grade_of(user, item):
    """Two kinds of users, two kinds of items, and items that all like more or less."""
    return 3 + (1 if user % 2 == item % 2 else -1) + (item % 5 - 2) / 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ratings of a third of all pairs and a model of them; the rest to test on."""
    folder = tmp_path_factory.mktemp("ids")
    rng = np.random.default_rng(0)
    cells = [(u, i) for u in range(USERS) for i in range(ITEMS)]
    order = rng.permutation(len(cells))
    for name, part in (("train", order[:1200]), ("test", order[1200:])):
        rows = [f"u{u},{i},{grade_of(u, i)},{u % 3}\n" for u, i in (cells[n] for n in part)]
        (folder / f"{name}.csv").write_text("user_id,item_id,rating,part\n" + "".join(rows))
        good = [row.rsplit(",", 2)[0] for row in rows if float(row.split(",")[2]) > 3]
        (folder / f"{name}_good.csv").write_text("user_id,item_id\n" + "\n".join(good) + "\n")
    (folder / "strange.csv").write_text("user_id,item_id,rating\nu1,3,4\nnobody,3,2\nu1,none,3\n")
    id_jobs.train(folder / "train.csv", folder / "model.h5", graded=True, dim=4)
    for side in ("left", "right"):
        jobs.project(folder / "model.h5", None, folder / f"{side}.h5", side=side)
    return folder


def run(*words):
    result = CliRunner().invoke(commands, [str(word) for word in words])
    return result


def score(folder, pairs, name, **options):
    options = {"against": folder / "right.h5", "overwrite": True, **options}
    summary = jobs.score(folder / "left.h5", folder / pairs, folder / name, **options)
    with h5py.File(folder / name) as file:
        return summary, {key: file[key][:] for key in file}


def test_a_model_of_ids_is_read_back_as_it_was_written(folder):
    model = read_model(folder / "model.h5")
    assert set(model.tables.sides) == {"left", "right"}
    assert model.tables.left.columns.shape == (USERS, 5)
    assert model.tables.right.ids.to_pylist()[0].isdigit()
    assert describe(folder / "model.h5")["summary"].endswith(
        "dot+sum over tables of 40 and 60 ids, scores are grade"
    )
    with h5py.File(folder / "model.h5", "r+") as file:
        kept = file["tables/left/embeddings"][0, 0]
        file["tables/left/embeddings"][0, 0] = kept + 1
    try:
        with pytest.raises(Exception, match="fingerprint"):
            read_model(folder / "model.h5")
    finally:
        with h5py.File(folder / "model.h5", "r+") as file:
            file["tables/left/embeddings"][0, 0] = kept


def test_equal_trainings_write_equal_bytes(folder, tmp_path):
    for name, threads in (("a.h5", 1), ("b.h5", 2)):
        id_jobs.train(
            folder / "train.csv", tmp_path / name, graded=True, dim=4, epochs=2, threads=threads
        )
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_scores_of_test_pairs_are_predicted_grades(folder):
    summary, found = score(folder, "test.csv", "scores.h5")
    lines = (folder / "test.csv").read_text().splitlines()[1:]
    grades = np.array([float(line.split(",")[2]) for line in lines])
    assert summary["unit"] == "grade"
    assert np.sqrt(np.mean((found["score"] - grades) ** 2)) < 0.35 * grades.std()


def test_unknown_ids_score_as_the_mean_of_their_side(folder):
    summary, found = score(folder, "strange.csv", "scores.h5")
    model = read_model(folder / "model.h5")
    left, right = model.tables.left, model.tables.right
    user, item = left.ids.to_pylist().index("u1"), right.ids.to_pylist().index("3")
    expected = model.score(
        np.array([left.columns[user], left.columns.mean(0), left.columns[user]]),
        np.array([right.columns[item], right.columns[item], right.columns.mean(0)]),
    )
    assert found["score"] == pytest.approx(expected, rel=1e-4)
    assert "2 pairs have unknown ids" in summary["notes"][-1]
    _, kept = score(folder, "strange.csv", "scores.h5", min_score=-100.0)
    assert kept["left"].tolist() == [user, -1, user]
    assert kept["right"].tolist() == [item, item, -1]
    with pytest.raises(DataError, match=r"unknown ids as user_id.*'nobody'"):
        score(folder, "strange.csv", "scores.h5", unknown="refuse")


@pytest.mark.parametrize("name", ["scores.h5", "scores.csv"])
def test_pairs_of_unknown_ids_are_nan_where_that_is_asked_for(folder, tmp_path, name):
    words = ("--against", folder / "right.h5", "-o", tmp_path / name, "--json", "--unknown", "nan")
    done = run("score", folder / "left.h5", folder / "strange.csv", *words)
    summary = json.loads(done.stdout)
    assert summary["unknown"] == 2
    assert "2 pairs have unknown ids, such as 'nobody'" in summary["notes"]
    if name.endswith(".csv"):
        lines = (tmp_path / name).read_text().splitlines()[1:]
        found = np.array([float(line.split(",")[2] or "nan") for line in lines])
    else:
        with h5py.File(tmp_path / name) as file:
            found = file["score"][:]
    assert np.isnan(found).tolist() == [False, True, True]


def test_what_becomes_of_unknown_ids_is_one_of_three(folder):
    with pytest.raises(ArgumentError, match="must be 'refuse', 'nan' or 'mean'"):
        score(folder, "strange.csv", "no.h5", unknown="error")
    assert "invalid" in run("score", "t", "p", "-o", "s.h5", "--unknown", "error").stderr.lower()


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_changed_tables_and_rows_of_unknown_ids_are_found(folder, tmp_path, precision):
    path = tmp_path / "left.h5"
    jobs.project(folder / "model.h5", None, path, side="left", precision=precision)
    for whole, names in (
        (path, {"rows", "unknown", "ids"}),
        (folder / "model.h5", {"tables/left/embeddings", "tables/right/ids"}),
    ):
        found = verify(whole)
        assert (found["whole"], found["unchecked"]) == (True, [])
        assert names <= set(found["checked"])
    with h5py.File(path, "r+") as file:
        place = file["unknown"].id.get_offset()
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert [damage["where"] for damage in verify(path)["damaged"]] == ["unknown"]
    with pytest.raises(FileError, match="unknown ids does not agree with its checksum"):
        read_table(path, unknown=True)


def test_asking_for_the_mean_of_plain_tables_is_refused(folder, tmp_path):
    np.save(tmp_path / "rows.npy", np.eye(4, dtype=np.float32))
    np.save(tmp_path / "pairs.npy", np.array([[0, 1]]))
    jobs.project("cosine", tmp_path / "rows.npy", tmp_path / "table.h5")
    with pytest.raises(ArgumentError, match="--unknown mean is for tables of a model"):
        jobs.score(tmp_path / "table.h5", tmp_path / "pairs.npy", tmp_path / "s.h5", unknown="mean")


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "int8"])
def test_tables_of_other_precisions_know_unknown_ids_too(folder, tmp_path, precision):
    for side in ("left", "right"):
        jobs.project(
            folder / "model.h5", None, tmp_path / f"{side}.h5", side=side, precision=precision
        )
    summary = jobs.score(
        tmp_path / "left.h5",
        folder / "strange.csv",
        tmp_path / "scores.h5",
        against=tmp_path / "right.h5",
    )
    _, exact = score(folder, "strange.csv", "scores.h5")
    assert summary["pairs"] == 3
    with h5py.File(tmp_path / "scores.h5") as file:
        assert file["score"][:] == pytest.approx(exact["score"], abs=0.1)


def recommended(path):
    with h5py.File(path) as file:
        return file["indices"][:], file["ids"].asstr()[:], file["ids_right"].asstr()[:]


@pytest.mark.parametrize("turned", [False, True])
def test_recommendations_leave_known_pairs_out_in_both_directions(folder, turned):
    tables = [folder / "left.h5", folder / "right.h5"][:: -1 if turned else 1]
    rated = [line.split(",")[:2] for line in (folder / "train.csv").read_text().splitlines()[1:]]
    known = {tuple(pair[::-1] if turned else pair) for pair in rated}
    options = {"against": tables[1], "top_k": 5, "overwrite": True}
    summary = jobs.matrix(tables[0], folder / "best.h5", exclude=folder / "train.csv", **options)
    indices, ids, others = recommended(folder / "best.h5")
    rows, names = read_table(tables[0]), set(map(tuple, known))
    assert summary["excluded"] == len(known)
    assert len(rows.rows) == len(indices)
    for name, best in zip(ids, indices, strict=True):
        assert len(set(best)) == 5
        assert not {(name, others[one]) for one in best} & names
    jobs.matrix(tables[0], folder / "all.h5", **options)
    plain, _, _ = recommended(folder / "all.h5")
    assert not np.array_equal(plain, indices)


def test_how_exclusions_are_read_can_be_said_and_goes_with_them_alone(folder, tmp_path):
    text = (folder / "strange.csv").read_text().splitlines()[1]
    (tmp_path / "known.csv").write_text("#".join(text.split(",")[:2]) + "\n")
    words = ("matrix", folder / "left.h5", "--against", folder / "right.h5", "--top-k", 2)
    how = ("--separator", "#", "--no-header", "-o", tmp_path / "best.h5", "--json")
    done = run(*words, *how, "--exclude", tmp_path / "known.csv")
    assert json.loads(done.stdout)["excluded"] == 1
    refused = run(*words, *how, "--overwrite")
    assert "are those of --exclude, which is not given" in str(refused.exception)


def test_exclusions_of_unknown_ids_are_passed_over_with_a_note(folder):
    options = {"against": folder / "right.h5", "top_k": 5, "overwrite": True}
    summary = jobs.matrix(
        folder / "left.h5", folder / "best.h5", exclude=folder / "strange.csv", **options
    )
    assert summary["excluded"] == 1
    assert "2 pairs of --exclude have ids that the tables do not know" in summary["notes"]
    with pytest.raises(ArgumentError, match="exclude goes with top_k alone"):
        jobs.matrix(
            folder / "left.h5",
            folder / "x.h5",
            against=folder / "right.h5",
            threshold=1.0,
            exclude=folder / "strange.csv",
        )


def test_recommendations_are_listed_and_go_on_after_an_interruption(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fastpair.results.fitting_rows", lambda columns: 16)
    monkeypatch.setattr("fastpair.exclusions.ROWS_AT_ONCE", 10)
    rest = {"against": folder / "right.h5", "top_k": 4, "threads": 1}

    def recommend(name, file="train.csv", **options):
        return jobs.matrix(
            folder / "left.h5", tmp_path / name, exclude=folder / file, **rest, **options
        )

    def stop(name):
        pairs = 0

        def progress(more):
            nonlocal pairs
            pairs += more
            if pairs > 30 * ITEMS:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            recommend(name, progress=progress)

    for name in ("best.h5", "best.csv"):
        whole = tmp_path / f"whole{name}"
        assert recommend(whole.name)["resumed_from"] == 0
        stop(name)
        with pytest.raises(FastpairError, match="its exclude is"):
            recommend(name, "test.csv", resume=True)
        assert recommend(name, resume=True)["resumed_from"] == 16
        assert (tmp_path / name).read_bytes() == whole.read_bytes()
    lines = (tmp_path / "best.csv").read_text().splitlines()
    assert lines[0] == "left,right,score,rank"
    assert len(lines) == 1 + 4 * USERS


@pytest.mark.parametrize("options", [["--exclude", "p.csv"], ["--keys", "ids"], ["--header"]])
def test_a_lookup_leaves_nothing_out(options):
    done = run("matrix", "t.h5", "--lookup", "v.npy", "-o", "o.h5", *options)
    assert done.exit_code == 2
    assert f"{options[0]} does not go with --lookup" in done.stderr


def test_two_tables_of_one_side_do_not_meet(folder):
    with pytest.raises(MismatchError, match="meets the left side"):
        jobs.matrix(folder / "left.h5", folder / "x.h5", top_k=2)
    with pytest.raises(ArgumentError, match="use --side left or --side right"):
        jobs.project(folder / "model.h5", None, folder / "x.h5")


def test_evaluate_needs_no_embeddings_and_measures_unknown_ids_apart(folder):
    lines = (folder / "test.csv").read_text() + "nobody,3,2,0\n"
    (folder / "more.csv").write_text(lines)
    summary = id_jobs.evaluate(
        folder / "model.h5", folder / "more.csv", good=4, bootstrap=10, by=["part"]
    )
    assert summary["rmse"] < 0.5
    assert summary["auc"] > 0.9 > summary["biases_alone"]["auc"]
    assert summary["entities"]["unknown"]["n_pairs"] == 1
    assert set(summary["by"]["part"]) == {"0", "1", "2"}
    assert any(note.startswith("1 pairs have unknown ids") for note in summary["notes"])
    json.dumps(summary, allow_nan=False)
    with pytest.raises(ArgumentError, match="leave EMBEDDINGS out"):
        jobs.evaluate(folder / "model.h5", folder / "left.h5", folder / "test.csv")


def test_grades_of_plus_and_minus_one_are_grades_to_a_model_of_grades(folder, tmp_path):
    (tmp_path / "signs.csv").write_text("user_id,item_id,rating\nu1,3,-1\nu2,5,1\nu3,4,-1\n")
    found = id_jobs.evaluate(folder / "model.h5", tmp_path / "signs.csv", bootstrap=0)
    labels, users, items = [-1, 1, -1], [1, 2, 3], [3, 5, 4]
    errors = [abs(grade_of(u, i) - one) for u, i, one in zip(users, items, labels, strict=True)]
    assert found["mae"] == pytest.approx(np.mean(errors), abs=0.3)


def test_nearest_asks_left_ids_and_answers_right_ones(folder):
    answer = nearest(folder / "model.h5", None, ["u1"], k=3)["answers"][0]
    model = read_model(folder / "model.h5")
    user = model.tables.left.ids.to_pylist().index("u1")
    items = model.tables.right.columns
    scores = model.score(np.repeat(model.tables.left.columns[[user]], len(items), 0), items)
    assert [one["row"] for one in answer["neighbours"]] == np.argsort(-scores)[:3].tolist()
    assert answer["neighbours"][0]["id"] == model.tables.right.ids[int(np.argmax(scores))].as_py()


def write_one_table(path, header="a,b"):
    """Pairs of 30 ids in three groups: those of one group are good."""
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 30, (800, 2))
    rows = [f"x{a},x{b},{int(a % 3 == b % 3)}\n" for a, b in pairs if a != b]
    path.write_text(f"{header},label\n" + "".join(rows))


def test_ids_of_one_kind_have_one_table_that_every_command_takes(tmp_path):
    write_one_table(tmp_path / "pairs.csv")
    model = tmp_path / "model.h5"
    summary = id_jobs.train(tmp_path / "pairs.csv", model, dim=4)
    assert summary["ids"] == {"both": 30}
    assert summary["notes"][0].startswith("one table for both sides, because some left ids")
    jobs.project(model, None, tmp_path / "table.h5")
    jobs.matrix(
        tmp_path / "table.h5", tmp_path / "best.h5", top_k=3, exclude=tmp_path / "pairs.csv"
    )
    with h5py.File(tmp_path / "best.h5") as file:
        ids, indices = file["ids"].asstr()[:], file["indices"][:]
    lines = [line.split(",")[:2] for line in (tmp_path / "pairs.csv").read_text().splitlines()]
    known = {tuple(sorted(line)) for line in lines}
    for row, best in enumerate(indices):
        assert row not in best
        assert not {tuple(sorted((ids[row], ids[one]))) for one in best if one >= 0} & known
    found = nearest(model, None, ["x1"], k=5)["answers"][0]["neighbours"]
    assert all(int(one["id"][1:]) % 3 == 1 for one in found)
    assert "x1" not in {one["id"] for one in found}
    jobs.score(tmp_path / "table.h5", tmp_path / "pairs.csv", tmp_path / "scores.h5")
    assert id_jobs.evaluate(model, tmp_path / "pairs.csv", bootstrap=0)["auc"] > 0.95


def test_what_was_assumed_of_the_sides_is_said_and_can_be_changed(tmp_path):
    write_one_table(tmp_path / "pairs.csv")
    write_one_table(tmp_path / "named.csv", header="user,item")
    apart = tmp_path / "apart.csv"
    apart.write_text((tmp_path / "pairs.csv").read_text().replace(",x", ",y"))

    def learned(name, **options):
        options = {"dim": 2, "epochs": 1, "overwrite": True, **options}
        summary = id_jobs.train(tmp_path / name, tmp_path / "model.h5", **options)
        return summary["ids"], summary["notes"][0]

    two = {"left": 30, "right": 30}
    ids, note = learned("named.csv")
    assert (ids, note) == (two, "two tables, because the columns are named user and item")
    assert learned("apart.csv") == (two, "two tables, because no left id is also a right id")
    assert learned("pairs.csv", two_tables=True)[0] == two
    assert learned("named.csv", two_tables=False)[0] == {"both": 30}


def test_the_command_learns_and_says_what_scores_mean(folder):
    out = folder / "cli.h5"
    done = run("train", "--ids", folder / "train.csv", "-o", out, "--graded", "--dim", 4, "--json")
    summary = json.loads(done.stdout)
    assert summary["unit"] == "grade"
    assert summary["meaning"] == "the predicted grade, on the scale of the labels"
    assert summary["ids"] == {"left": USERS, "right": ITEMS}
    good = run("train", "--ids", folder / "train_good.csv", "-o", folder / "good.h5", "--json")
    assert json.loads(good.stdout)["meaning"].startswith("positive: a good pair is more likely")
    shown = run("evaluate", out, folder / "test.csv", "--good", 4, "--bootstrap", 0)
    assert "root mean square error" in shown.stdout
    assert "biases alone" in shown.stdout
    assert "raw cosine" not in shown.stdout
    assert run("nearest", out, "u3", "--top-k", 2).stdout.count("\n") == 3


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--arms", "A"], "--arms has no meaning with --ids"),
        (["--resume"], "--resume has no meaning with --ids"),
        (["more.csv"], "give no more"),
    ],
)
def test_options_that_mean_nothing_for_ids_are_refused(folder, words, sentence):
    done = run("train", "--ids", folder / "train.csv", "-o", folder / "no.h5", *words)
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert not (folder / "no.h5").exists()


def test_ids_are_read_as_the_options_of_reading_say(folder, tmp_path):
    for name in ("train.csv", "test.csv"):
        lines = (folder / name).read_text().splitlines()[1:]
        cut = ["|".join(line.split(",")[:3]) + "\n" for line in lines]
        (tmp_path / name).write_text("".join(cut))
    how = ("--separator", "|", "--no-header")
    rest = ("--graded", "--dim", 2, "--epochs", 2, "--two-tables", "--json")
    done = run("train", "--ids", tmp_path / "train.csv", "-o", tmp_path / "m.h5", *how, *rest)
    assert json.loads(done.stdout)["n_pairs"] == 1200
    words = ("evaluate", tmp_path / "m.h5", tmp_path / "test.csv", "--bootstrap", 0, "--json")
    assert json.loads(run(*words, *how).stdout)["n_pairs"] == USERS * ITEMS - 1200


def test_reading_of_embeddings_means_nothing_for_tables_of_a_model(folder):
    for words in (["--nonfinite", "nan"], ["--separator", ";"], ["--dataset", "x"]):
        out = folder / "no.h5"
        done = run("project", folder / "model.h5", "--side", "left", "-o", out, *words)
        assert isinstance(done.exception, ArgumentError)
        assert "go with EMBEDDINGS" in str(done.exception)


def test_options_for_ids_are_refused_without_them(folder):
    done = run("train", "a.npy", "b.csv", "-o", folder / "no.h5", "--two-tables")
    assert done.exit_code == 2
    assert "--two-tables goes with --ids alone" in done.stderr
    assert "give EMBEDDINGS and PAIRS" in run("train", "-o", folder / "no.h5").stderr


def test_files_that_cannot_be_learned_from_are_refused_in_one_sentence(folder, tmp_path):
    train = id_jobs.train
    with pytest.raises(DataError, match="has the label"):
        train(folder / "train.csv", tmp_path / "m.h5")
    with pytest.raises(DataError, match="no column of labels"):
        train(folder / "train_good.csv", tmp_path / "m.h5", graded=True)
    (tmp_path / "empty.csv").write_text("user,item\na,b\n,c\n")
    with pytest.raises(DataError, match="so the id is empty"):
        train(tmp_path / "empty.csv", tmp_path / "m.h5")
    with pytest.raises(ArgumentError, match="needs labels"):
        train(folder / "train_good.csv", tmp_path / "m.h5", loss="cross-entropy")
    assert not (tmp_path / "m.h5").exists()
