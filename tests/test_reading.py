"""How files are read where they do not say it themselves: options, standard input, unknown ids."""

import json
import os
import subprocess
import sys
import threading

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_cli import read_csv, refused, run, run_json

from fastpair.columns import find_columns, parse_labels
from fastpair.errors import DataError
from fastpair.pairs import open_pairs, repeats_note

IDS = ["ape", "bee", "cat", "007"]
VECTORS = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    with h5py.File(folder / "e.h5", "w") as file:
        file["embeddings"], file["ids"] = VECTORS, IDS
    run("project", "dot", "e.h5", "-o", "t.h5", cwd=folder)
    return folder


def dot(left, right):
    return float(VECTORS[IDS.index(left)] @ VECTORS[IDS.index(right)])


def scores_of(path):
    rows = [tuple(row.values()) for row in read_csv(path)]
    return [(left, right, float(score)) for left, right, score in rows]


def check(path, pairs):
    found = scores_of(path)
    assert [(left, right) for left, right, _ in found] == pairs
    for left, right, score in found:
        assert score == pytest.approx(dot(left, right), rel=1e-5)


# --- options ------------------------------------------------------------------------------------


def test_options_say_what_a_text_file_does_not(zoo):
    (zoo / "odd.txt").write_text("x~y\nape~bee\n007~cat\n")
    run("score", "t.h5", "odd.txt", "--separator", "~", "-o", "odd.csv", cwd=zoo)
    check(zoo / "odd.csv", [("ape", "bee"), ("007", "cat")])
    (zoo / "half.csv").write_text("ape,y\nape,bee\n")
    assert "--header or --no-header" in refused("score", "t.h5", "half.csv", "-o", "h.csv", cwd=zoo)
    run("score", "t.h5", "half.csv", "--header", "-o", "h.csv", cwd=zoo)
    check(zoo / "h.csv", [("ape", "bee")])
    (zoo / "none.csv").write_text("ape,bee\n007,cat\n")
    done = run("score", "t.h5", "none.csv", "-o", "n.csv", cwd=zoo)
    assert "the first line is a pair" in done.stderr
    check(zoo / "n.csv", [("ape", "bee"), ("007", "cat")])


def test_a_lost_line_is_no_outcome_of_convert(zoo):
    (zoo / "bare.csv").write_text("ape,bee\n007,cat\n")
    words = ("convert", "bare.csv", "bare.h5", "--pairs")
    assert "--header or --no-header" in refused(*words, cwd=zoo)
    assert run_json(*words, "--no-header", cwd=zoo)["shape"] == [2]


def test_links_out_of_a_file_are_followed_only_if_that_is_said(zoo):
    with h5py.File(zoo / "linked.h5", "w") as file:
        file["embeddings"] = h5py.ExternalLink("e.h5", "/embeddings")
    words = ("project", "dot", "linked.h5", "-o", "linked_table.h5")
    assert "--follow-links" in refused(*words, cwd=zoo)
    run(*words, "--follow-links", cwd=zoo)


# --- standard input and pipes -------------------------------------------------------------------


@pytest.mark.parametrize("form", ["csv", "parquet", "h5"])
def test_standard_input_is_read_like_a_file(zoo, form, tmp_path):
    pairs = [("ape", "bee"), ("007", "cat"), ("cat", "cat")]
    table = pa.table([[a for a, _ in pairs], [b for _, b in pairs]], ["left", "right"])
    path = tmp_path / f"p.{form}"
    if form == "csv":
        path.write_text("".join(f"{a},{b}\n" for a, b in [("left", "right"), *pairs]))
    elif form == "parquet":
        pq.write_table(table, path)
    else:
        with h5py.File(path, "w") as file:
            file["left"], file["right"] = table["left"].to_pylist(), table["right"].to_pylist()
    with open(path) as source:
        run("score", "t.h5", "-", "-o", tmp_path / "s.csv", cwd=zoo, stdin=source)
    check(tmp_path / "s.csv", pairs)
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(
        target=lambda: (tmp_path / "pipe").write_bytes(path.read_bytes()), daemon=True
    )
    writer.start()
    run("score", "t.h5", tmp_path / "pipe", "-o", tmp_path / "t.csv", cwd=zoo)
    writer.join()
    check(tmp_path / "t.csv", pairs)


def test_what_standard_input_cannot_do_is_said(zoo):
    done = run("score", "t.h5", "-", "-o", "no.csv", cwd=zoo, code=1, input="left,right\nape,ant\n")
    assert "standard input has unknown ids as right" in done.stderr
    done = run("score", "t.h5", "-", "-o", "no.csv", "--resume", cwd=zoo, code=1, input="")
    assert "can be read only once" in done.stderr
    done = run("train", "-", "-", "-o", "no.h5", cwd=zoo, code=1, input="")
    assert "given twice" in done.stderr
    done = run("score", "t.h5", "-", "-o", "no.csv", cwd=zoo, code=1, input="")
    assert "standard input is empty" in done.stderr


def test_a_copy_that_finds_no_room_is_one_sentence(zoo):
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from fastpair.cli import main; main()"
    )
    command = [sys.executable, "-c", limited, "score", "t.h5", "-", "-o", "no.csv"]
    text = "left,right\n" + "ape,bee\n" * 100_000
    done = subprocess.run(command, cwd=zoo, input=text, capture_output=True, text=True)
    assert done.returncode == 1
    assert "set TMPDIR" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# --- unknown ids --------------------------------------------------------------------------------


def test_pairs_with_unknown_ids_get_nan_in_their_places(zoo):
    (zoo / "u.csv").write_text("left,right\nape,ant\nape,bee\nox,007\ncat,cat\n")
    assert "--unknown nan" in refused("score", "t.h5", "u.csv", "-o", "u.h5", cwd=zoo)
    found = run_json("score", "t.h5", "u.csv", "--unknown", "nan", "-o", "u.h5", cwd=zoo)
    assert (found["pairs"], found["unknown"]) == (4, 2)
    assert any("2 pairs have unknown ids, such as 'ox'" in note for note in found["notes"])
    with h5py.File(zoo / "u.h5") as file:
        scores = file["score"][:]
    assert np.isnan(scores).tolist() == [True, False, True, False]
    assert scores[1] == pytest.approx(dot("ape", "bee"), rel=1e-5)
    words = ("--unknown", "nan", "-o", "k.csv", "--min-score", "-1e9")
    run("score", "t.h5", "u.csv", *words, cwd=zoo)
    check(zoo / "k.csv", [("ape", "bee"), ("cat", "cat")])


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_unknown_ids_are_marked_in_blocks_of_any_size(tmp_path, size):
    rows = [("a", "b"), ("x", "a"), ("b", "y"), ("b", "b"), ("z", "z")]
    table = pa.table([[a for a, _ in rows], [b for _, b in rows]], ["left", "right"])
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=2)
    source = open_pairs(tmp_path / "p.parquet", ids=pa.array(["a", "b"]), count=2, unknown="nan")
    masks = [
        np.zeros(len(block.left), bool) if block.unknown is None else block.unknown
        for block in source.blocks(size)
    ]
    assert np.concatenate(masks).tolist() == [False, True, True, False, True]
    assert source.unknown_pairs == 3


def test_integers_beside_ids_of_both_kinds_are_asked_about(tmp_path):
    np.save(tmp_path / "p.npy", np.array([[1, 0]]))
    mixed = pa.array(["10", "1", "0", "x7"])
    with pytest.raises(DataError, match="say --keys ids or --keys rows"):
        open_pairs(tmp_path / "p.npy", ids=mixed, count=4)
    for keys, expected in (("ids", (1, 2)), ("rows", (1, 0))):
        (block,) = open_pairs(tmp_path / "p.npy", ids=mixed, count=4, keys=keys).blocks(9)
        assert (block.left[0], block.right[0]) == expected


# --- labels and columns -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["match", "non-match"], [1, 0]),
        (["Match", "no match", "nonmatch"], [1, 0, 0]),
        (["T", "f"], [1, 0]),
        (["positive", "Negative"], [1, 0]),
        (["similar", "dissimilar"], [1, 0]),
    ],
)
def test_more_words_are_labels(words, expected):
    assert parse_labels(pa.array(words), "p.csv", 0).tolist() == expected
    with pytest.raises(DataError, match=r"row 1 .* of column 'gold'"):
        parse_labels(pa.array(["1", "perhaps"]), "p.csv", 0, "gold")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("unique_id_l unique_id_r match_probability", ("unique_id_l", "unique_id_r")),
        ("id qid1 qid2 question1 question2 is_duplicate", ("qid1", "qid2")),
        ("lhs rhs", ("lhs", "rhs")),
        ("idA idB y", ("idA", "idB")),
        ("left_id right_id left right label", ("left_id", "right_id")),
        ("record_l record_r name", ("record_l", "record_r")),
        ("id1 id2 sentence1 sentence2 score", ("id1", "id2")),
        ("Quality|#1 ID|#2 ID|#1 String|#2 String", ("#1 ID", "#2 ID")),
        ("|foo|bar", ("foo", "bar")),
    ],
)
def test_more_usual_columns_are_found(names, expected):
    listed = names.split("|") if "|" in names else names.split()
    assert find_columns("p.csv", listed, None, None, None, want_labels=False)[:2] == expected


def test_pairs_that_occur_repeatedly_are_counted():
    left, right = np.array([0, 1, 2, 3, 0, 5]), np.array([1, 0, 3, 2, 1, 5])
    labels = np.array([1, 1, 0, 1, 1, 0.0])
    note = repeats_note(left, right, labels)
    assert note == "2 pairs occur more than once, 1 of them with different labels"
    assert repeats_note(left[:1], right[:1], labels[:1]) == ""


def test_training_tells_of_conflicting_labels(zoo, tmp_path):
    rng = np.random.default_rng(1)
    rows = [(IDS[a], IDS[b], int(a == b)) for a, b in rng.integers(0, 4, (200, 2))]
    lines = [("left", "right", "label"), *rows, ("ape", "ape", 0)]
    (tmp_path / "p.csv").write_text("".join(f"{a},{b},{c}\n" for a, b, c in lines))
    found = json.loads(
        run("train", "e.h5", tmp_path / "p.csv", "-o", tmp_path / "m.h5", "--json", cwd=zoo).stdout
    )
    assert any("1 of them with different labels" in note for note in found["notes"])
