"""What comes out of files that others wrote: right numbers, ids as they are, or one sentence."""

import csv
import gzip
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpair import jobs
from fastpair.columns import find_columns, parse_labels
from fastpair.errors import ArgumentError, DataError, FastpairError, FileError
from fastpair.export import convert
from fastpair.ingest import open_embeddings
from fastpair.listing import export_format, write_scored_pairs
from fastpair.pairs import open_pairs

STRANGE_IDS = [
    "NA",
    "007",
    "null",
    " 7",
    "naïve",
    "a,b",
    'q"uote',
    "two\nlines",
    "nan",
    "日本",
    "-",
]
NUMBERS = np.random.default_rng(0).standard_normal((11, 4)).astype(np.float32)
DATA = Path(__file__).parents[2] / "shared" / "data"


def write_csv(path, rows, **options):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, **options).writerows(rows)
    return path


def pairs_of(path, ids=None, count=None, **options):
    array = None if ids is None else pa.array(ids, pa.string())
    return open_pairs(path, ids=array, count=len(ids) if count is None else count, **options)


def all_rows(source, size=3):
    blocks = list(source.blocks(size))
    assert [block.start for block in blocks] == list(range(0, source.count, size))
    left = np.concatenate([block.left for block in blocks]).tolist()
    right = np.concatenate([block.right for block in blocks]).tolist()
    return list(zip(left, right, strict=True))


def everything(path, *, ids, count, **options):
    blocks = list(open_pairs(path, ids=ids, count=count, **options).blocks(1000))
    labels = [block.label for block in blocks if block.label is not None]
    return (
        np.concatenate([block.left for block in blocks]),
        np.concatenate([block.right for block in blocks]),
        np.concatenate(labels) if labels else None,
    )


def id_list(source):
    assert source.ids is not None
    return source.ids.to_pylist()


# --- embeddings ---------------------------------------------------------------------------------


def with_ids(first="NA"):
    return zip([first, *STRANGE_IDS[1:]], NUMBERS.tolist(), strict=True)


def as_csv(path):
    write_csv(path, [["id", *"wxyz"], *([i, *v] for i, v in with_ids())])


def as_tsv(path):
    rows = [["", *range(4)], *([i, *v] for i, v in with_ids())]
    write_csv(path, rows, delimiter="\t")


def as_headless_csv(path):
    write_csv(path, [[i, *v] for i, v in with_ids("king")])


def as_gzip(path):
    as_csv(path)
    path.write_bytes(gzip.compress(path.read_bytes()))


def as_list_parquet(path):
    pq.write_table(pa.table({"vector": pa.array(list(NUMBERS)), "name": STRANGE_IDS}), path)


def as_fixed_list_parquet(path):
    vectors = pa.FixedSizeListArray.from_arrays(NUMBERS.ravel(), 4)
    ids = pa.array(STRANGE_IDS).dictionary_encode()
    pq.write_table(pa.table({"key": ids, "e": vectors}), path, row_group_size=4)


def as_columns_parquet(path):
    columns = {f"d{number}": NUMBERS[:, number] for number in range(4)}
    pq.write_table(pa.table({**columns, "anything": STRANGE_IDS}), path)


def as_npz(path):
    np.savez(path, embeddings=NUMBERS, ids=np.array(STRANGE_IDS), other=np.zeros((3, 3)))


def as_hdf5(path):
    with h5py.File(path, "w") as file:
        file["data"] = NUMBERS
        file["ids"] = STRANGE_IDS


def as_compressed_hdf5(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("x/y", data=NUMBERS, chunks=(3, 2), compression="gzip")
        file["ids"] = np.array([text.encode() for text in STRANGE_IDS], "S20")


FORMS = {
    "e.csv": as_csv,
    "e.tsv": as_tsv,
    "headless.csv": as_headless_csv,
    "e.csv.gz": as_gzip,
    "list.parquet": as_list_parquet,
    "fixed.parquet": as_fixed_list_parquet,
    "columns.parquet": as_columns_parquet,
    "e.npz": as_npz,
    "e.h5": as_hdf5,
    "compressed.h5": as_compressed_hdf5,
}


@pytest.mark.parametrize("name", FORMS)
def test_every_format_gives_the_same_embeddings_and_ids(tmp_path, name):
    FORMS[name](tmp_path / name)
    source = open_embeddings(tmp_path / name)
    assert source.shape == (11, 4)
    ids = id_list(source)
    assert ids[1:] == STRANGE_IDS[1:]
    assert ids[0] == ("king" if name == "headless.csv" else "NA")
    assert np.array_equal(source.read().astype(np.float32), NUMBERS)
    blocks = list(source.blocks(4))
    assert [(start, len(block)) for start, block in blocks] == [(0, 4), (4, 4), (8, 3)]
    assert all(block.flags.c_contiguous and block.dtype == source.dtype for _, block in blocks)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("f2", "f4"), ("f4", "f4"), (">f4", "f4"), ("f8", "f8"), ("i1", "f4"), ("u2", "f4")],
)
def test_small_numbers_are_widened_to_float32(tmp_path, dtype, expected):
    numbers = np.asfortranarray(np.arange(20).reshape(5, 4).astype(dtype))
    np.save(tmp_path / "e.npy", numbers)
    source = open_embeddings(tmp_path / "e.npy")
    assert source.dtype == np.dtype(expected)
    assert source.ids is None
    assert np.array_equal(source.read(), numbers)


@pytest.mark.parametrize("name", ["e.csv", "list.parquet", "columns.parquet", "e.h5", "e.npz"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_named_with_its_row_and_id(tmp_path, name, value):
    kept = NUMBERS[7, 2]
    NUMBERS[7, 2] = value
    try:
        FORMS[name](tmp_path / name)
    finally:
        NUMBERS[7, 2] = kept
    with pytest.raises(DataError, match=r"in row 7 \(counted from 0, id 'two\\nlines'\)"):
        open_embeddings(tmp_path / name).read()


def test_integer_ids_become_their_text(tmp_path):
    pq.write_table(pa.table({"id": [7, 8], "e": [[1.0, 2.0], [3.0, 4.0]]}), tmp_path / "e.parquet")
    assert id_list(open_embeddings(tmp_path / "e.parquet")) == ["7", "8"]
    write_csv(tmp_path / "e.csv", [["id", "x", "y"], ["007", 1, 2], ["8", 3, 4]])
    source = open_embeddings(tmp_path / "e.csv")
    assert id_list(source) == ["007", "8"]
    assert source.read().tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("header", [True, False])
def test_text_of_numbers_alone_has_no_ids(tmp_path, header):
    rows = [*([range(4)] if header else []), *NUMBERS.tolist()]
    source = open_embeddings(write_csv(tmp_path / "e.csv", rows))
    assert source.ids is None
    assert np.array_equal(source.read().astype(np.float32), NUMBERS)


def test_the_dataset_that_is_meant_can_and_must_be_named(tmp_path):
    with h5py.File(tmp_path / "e.h5", "w") as file:
        file["first"] = NUMBERS
        file["second"] = NUMBERS * 2
    with pytest.raises(DataError, match=r"'first' \(11, 4\) float32, 'second'"):
        open_embeddings(tmp_path / "e.h5")
    with pytest.raises(DataError, match="no array 'third'"):
        open_embeddings(tmp_path / "e.h5", dataset="third")
    assert np.array_equal(open_embeddings(tmp_path / "e.h5", dataset="second").read(), NUMBERS * 2)


def test_arrays_that_are_no_embeddings_are_refused(tmp_path):
    np.save(tmp_path / "object.npy", np.array([[{}]]), allow_pickle=True)
    np.save(tmp_path / "complex.npy", np.ones((2, 2), complex))
    np.save(tmp_path / "flat.npy", np.ones(5))
    np.save(tmp_path / "none.npy", np.ones((0, 5)))
    expected = {"object": "pickled", "complex": "complex128", "flat": r"\(5,\)", "none": "0 rows"}
    for name, words in expected.items():
        with pytest.raises(DataError, match=words):
            open_embeddings(tmp_path / f"{name}.npy").read()


def test_ids_that_stand_for_two_rows_are_refused(tmp_path):
    write_csv(tmp_path / "e.csv", [["id", "x"], ["a", 1], ["a", 2]])
    with pytest.raises(DataError, match="'a' \\(2 times\\)"):
        open_embeddings(tmp_path / "e.csv")


def test_rows_of_different_length_are_named(tmp_path):
    pq.write_table(pa.table({"e": [[1.0, 2.0], [3.0]]}), tmp_path / "e.parquet")
    with pytest.raises(DataError, match="1 numbers in row 1"):
        open_embeddings(tmp_path / "e.parquet").read()


@pytest.mark.parametrize(
    "name", ["item_id", "product_id", "user-id", "movie.id", "SKU", "entity_id", "Order Key"]
)
def test_numbers_that_are_named_as_ids_are_ids(tmp_path, name):
    write_csv(tmp_path / "e.csv", [[name, "v0", "v1"], [5, 1, 2], [6, 3, 4]])
    table = pa.table({"v0": [1.0, 3.0], name: [5, 6], "v1": [2.0, 4.0]})
    pq.write_table(table, tmp_path / "e.parquet")
    for file in ("e.csv", "e.parquet"):
        source = open_embeddings(tmp_path / file)
        assert id_list(source) == ["5", "6"]
        assert source.read().tolist() == [[1, 2], [3, 4]]
        assert source.assumed == f"2 columns of numbers, ids from column {name!r}"


@pytest.mark.parametrize("ids", [["007", "8"], ["7", "008"], ["7", "ab"]])
def test_a_first_column_that_is_not_all_proper_numbers_is_ids(tmp_path, ids):
    rows = [["product", "v0", "v1"], [ids[0], 1, 2], [ids[1], 3, 4]]
    source = open_embeddings(write_csv(tmp_path / "e.csv", rows))
    assert id_list(source) == ids
    assert source.shape == (2, 2)


@pytest.mark.parametrize("values", [["1", "2"], ["-1", "0"], ["0.5", "oops"], ["0.50", "1e-3"]])
def test_a_first_column_of_numbers_is_no_ids(tmp_path, values):
    rows = [["x", "y"], [values[0], 1], [values[1], 3]]
    source = open_embeddings(write_csv(tmp_path / "e.csv", rows))
    assert source.ids is None
    assert source.assumed == "2 columns of numbers and no ids"


@pytest.mark.parametrize("second", ["user_id", "Unnamed: 0", "title"])
def test_a_second_column_of_ids_never_becomes_numbers(tmp_path, second):
    value = "words" if second == "title" else 3
    write_csv(tmp_path / "e.csv", [["item_id", second, "v"], [1, value, 0.5]])
    table = pa.table({"item_id": [1], second: [value], "v": [0.5]})
    pq.write_table(table, tmp_path / "e.parquet")
    for file in ("e.csv", "e.parquet"):
        with pytest.raises(DataError, match=second):
            open_embeddings(tmp_path / file)


@pytest.mark.parametrize("header", [["id", 1, 2, 3], ["", 1, 2, 3], ["word", 10, 20, 30]])
def test_a_header_of_numbers_after_the_name_of_ids_is_no_row(tmp_path, header):
    rows = [header, ["a", 0.1, 0.2, 0.3], ["b", 0.4, 0.5, 0.6]]
    assert id_list(open_embeddings(write_csv(tmp_path / "e.csv", rows))) == ["a", "b"]
    write_csv(tmp_path / "w.csv", [["word", 0.5, 0.2], ["b", 0.4, 0.5]])
    assert id_list(open_embeddings(tmp_path / "w.csv")) == ["word", "b"]


def test_text_among_numbers_is_named(tmp_path):
    write_csv(tmp_path / "e.csv", [["id", "x", "y"], ["a", 1, 2], ["b", 1, "oops"]])
    with pytest.raises(DataError, match="oops"):
        open_embeddings(tmp_path / "e.csv").read()
    write_csv(tmp_path / "t.csv", [["id", "title", "y"], ["a", "words", 2]])
    with pytest.raises(DataError, match="'id', 'title'"):
        open_embeddings(tmp_path / "t.csv")


# --- pairs: formats -----------------------------------------------------------------------------

IDS = ["x", *STRANGE_IDS]
PAIRS = [(0, 1), (3, 2), (2, 3), (5, 5), (11, 0), (7, 8), (4, 10)]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "csv.gz"])
@pytest.mark.parametrize("line", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_ids_in_text_are_looked_up_as_they_are(tmp_path, suffix, line, encoding):
    text = io.StringIO(newline="")
    delimiter = "\t" if suffix == "tsv" else ","
    writer = csv.writer(text, delimiter=delimiter, lineterminator=line)
    writer.writerows([("id_a", "id_b"), *((IDS[left], IDS[right]) for left, right in PAIRS)])
    content = text.getvalue().encode(encoding)
    path = tmp_path / f"p.{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    source = pairs_of(path, IDS)
    assert (source.count, source.keys, source.names) == (7, "ids", ("id_a", "id_b"))
    assert "because the embeddings carry ids" in source.assumed
    assert all_rows(source) == PAIRS
    assert next(source.blocks(7)).left_keys is None
    kept = next(source.blocks(7, keep_keys=True))
    assert kept.left_keys.to_pylist() == [IDS[left] for left, _ in PAIRS]


@pytest.mark.parametrize("separator", [",", ";", "|", "\t"])
def test_the_separator_is_found_by_looking(tmp_path, separator):
    path = tmp_path / "p.txt"
    path.write_text("".join(f"{a}{separator}{b}\n" for a, b in [("left", "right"), *PAIRS]))
    assert all_rows(pairs_of(path, count=12)) == PAIRS


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary("int32", "string")])
def test_ids_in_parquet_are_looked_up_whatever_their_text_type(tmp_path, kind):
    left, right = (pa.array([IDS[pair[side]] for pair in PAIRS]).cast(kind) for side in (0, 1))
    table = pa.table({"left": left, "right": right, "more": range(7)})
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=2)
    source = pairs_of(tmp_path / "p.parquet", IDS)
    assert all_rows(source) == PAIRS
    block = next(source.blocks(2, start=5))
    assert (block.start, block.left.tolist()) == (5, [7, 4])


def test_integers_in_columns_are_ids_where_there_are_ids_and_rows_elsewhere(tmp_path):
    pq.write_table(pa.table({"i": [10, 20], "j": [20, 30]}), tmp_path / "p.parquet")
    assert all_rows(pairs_of(tmp_path / "p.parquet", ["30", "20", "10"])) == [(2, 1), (1, 0)]
    source = pairs_of(tmp_path / "p.parquet", count=31)
    assert (source.keys, all_rows(source)) == ("rows", [(10, 20), (20, 30)])
    assert "carry no ids" in source.assumed


def test_integers_in_arrays_are_rows_unless_all_ids_are_integers(tmp_path):
    np.save(tmp_path / "p.npy", np.array([[0, 1], [2, 0]], np.uint8))
    assert all_rows(pairs_of(tmp_path / "p.npy", ["a", "b", "c"])) == [(0, 1), (2, 0)]
    assert all_rows(pairs_of(tmp_path / "p.npy", ["2", "1", "0"])) == [(2, 1), (0, 2)]
    assert all_rows(pairs_of(tmp_path / "p.npy", ["2", "1", "0"], keys="rows")) == [(0, 1), (2, 0)]
    with pytest.raises(ArgumentError, match="carry none"):
        pairs_of(tmp_path / "p.npy", count=3, keys="ids")


def test_hdf5_and_npz_pairs_are_an_array_or_two(tmp_path):
    array = np.array(PAIRS, ">i4")
    with h5py.File(tmp_path / "one.h5", "w") as file:
        file.create_dataset("pairs", data=array, chunks=(3, 2), compression="gzip")
    with h5py.File(tmp_path / "two.h5", "w") as file:
        file["left"], file["right"] = array[:, 0], array[:, 1]
    with h5py.File(tmp_path / "text.h5", "w") as file:
        file["left"] = [IDS[left] for left, _ in PAIRS]
        file["right"] = [IDS[right] for _, right in PAIRS]
    np.savez(tmp_path / "p.npz", pairs=array)
    for name in ("one.h5", "two.h5", "text.h5", "p.npz"):
        source = pairs_of(tmp_path / name, IDS)
        assert all_rows(source) == PAIRS
        assert source.keys == ("ids" if name == "text.h5" else "rows")


def test_integers_in_parquet_are_rows_where_the_ids_are_words(tmp_path):
    pq.write_table(pa.table({"left": [0, 2], "right": [1, 0]}), tmp_path / "p.parquet")
    source = pairs_of(tmp_path / "p.parquet", ["a", "b", "c"])
    assert all_rows(source) == [(0, 1), (2, 0)]
    assert "integers are row numbers" in source.assumed
    write_csv(tmp_path / "p.csv", [("left", "right"), (0, 1)])
    for ids, name in ((["7", "8"], "p.parquet"), (["a", "b"], "p.csv")):
        with pytest.raises(DataError, match="--keys rows"):
            all_rows(pairs_of(tmp_path / name, ids))


@pytest.mark.parametrize("kind", ["U", "S"])
def test_text_in_an_array_of_two_columns_is_ids(tmp_path, kind):
    texts = np.array([["a", "c"], ["b", "a"]], kind)
    np.save(tmp_path / "p.npy", texts)
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["pairs"] = texts.astype("S")
    for name in ("p.npy", "p.h5"):
        source = pairs_of(tmp_path / name, ["a", "b", "c"])
        assert (source.keys, all_rows(source)) == ("ids", [(0, 2), (1, 0)])
    assert convert(tmp_path / "p.npy", tmp_path / "out.h5") == "pairs"


def test_a_first_line_of_two_known_ids_is_a_pair(tmp_path):
    write_csv(tmp_path / "p.csv", [("007", "NA"), ("null", "NA")])
    ids = ["007", "NA", "null", "i", "j"]
    source = pairs_of(tmp_path / "p.csv", ids)
    assert (source.names, all_rows(source)) == (("left", "right"), [(0, 1), (2, 1)])
    write_csv(tmp_path / "l.csv", [("007", "NA", "good"), ("null", "NA", "bad")])
    labels = everything(tmp_path / "l.csv", ids=pa.array(ids), count=5, want_labels=True)[2]
    assert labels.tolist() == [1, 0]
    for header in (("i", "j"), ("x", "y"), ("NA", "null", "score")):
        write_csv(tmp_path / "h.csv", [header, ("007", "NA", "1")[: len(header)]])
        assert all_rows(pairs_of(tmp_path / "h.csv", ids)) == [(0, 1)]


def test_the_table_without_ids_is_named(tmp_path):
    np.save(tmp_path / "p.npy", np.array([[0, 1]]))
    one, two = pa.array(["a", "b"]), {"right_ids": None, "right_count": 2}
    source = open_pairs(tmp_path / "p.npy", ids=one, count=2, **two)
    assert "because the right table carries no ids" in source.assumed
    source = open_pairs(tmp_path / "p.npy", ids=None, count=2, right_ids=one, right_count=2)
    assert "because the left table carries no ids" in source.assumed


def test_labels_of_minus_one_stay_where_that_is_asked(tmp_path):
    write_csv(tmp_path / "p.csv", [("left", "right", "label"), (0, 0, -1), (0, 0, 1)])
    options = {"ids": None, "count": 1, "want_labels": True}
    assert everything(tmp_path / "p.csv", **options)[2].tolist() == [0, 1]
    assert everything(tmp_path / "p.csv", signed_labels=False, **options)[2].tolist() == [-1, 1]


@pytest.mark.parametrize("size", [7, 40_000, 1 << 20])
def test_long_keys_are_looked_up_in_parts_of_a_block(tmp_path, size, monkeypatch):
    monkeypatch.setattr("fastpair.pairs.KEY_BYTES", 1 << 20)
    ids = [f"{number:0200}" for number in range(100)]
    rows = np.random.default_rng(0).integers(0, 100, (30_000, 2))[: 3000 if size == 7 else None]
    left, right = (pa.array(ids).take(pa.array(rows[:, side])) for side in (0, 1))
    pq.write_table(pa.table({"left": left, "right": right}), tmp_path / "p.parquet")
    source = pairs_of(tmp_path / "p.parquet", ids)
    assert all_rows(source, size) == [tuple(pair) for pair in rows]
    kept = next(source.blocks(size, keep_keys=True))
    assert kept.right_keys.equals(right[:size])
    assert source.bytes_a_pair() == 16
    assert 16 + 400 <= source.bytes_a_pair(keep_keys=True) < 16 + 420


def test_two_tables_each_look_up_their_own_side(tmp_path):
    write_csv(tmp_path / "p.csv", [["user", "item"], ["u1", "m2"], ["u0", "m0"]])
    options = {"right_ids": pa.array(["m0", "m1", "m2"]), "right_count": 3}
    assert all_rows(pairs_of(tmp_path / "p.csv", ["u0", "u1"], **options)) == [(1, 2), (0, 0)]
    np.save(tmp_path / "p.npy", np.array([[1, 2]]))
    assert all_rows(pairs_of(tmp_path / "p.npy", count=2, right_count=3)) == [(1, 2)]
    with pytest.raises(DataError, match="go from 0 to 1"):
        all_rows(pairs_of(tmp_path / "p.npy", count=2, right_count=2))


def test_text_without_a_header_is_row_numbers(tmp_path):
    source = pairs_of(write_csv(tmp_path / "p.csv", PAIRS), count=12)
    assert all_rows(source) == PAIRS
    assert source.names == ("left", "right")
    write_csv(tmp_path / "l.csv", [(0, 1, 1), (1, 2, 0)])
    block = next(pairs_of(tmp_path / "l.csv", count=3, want_labels=True).blocks(9))
    assert block.label.tolist() == [1, 0]


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 39), st.sampled_from(["csv", "npy"]))
def test_blocks_are_the_same_pairs_for_any_size_and_start(
    tmp_path_factory, count, size, start, kind
):
    path = tmp_path_factory.mktemp("pairs") / f"p.{kind}"
    pairs = np.random.default_rng(count).integers(0, 100, (count, 2))
    if kind == "npy":
        np.save(path, pairs)
    else:
        write_csv(path, [("left", "right"), *pairs.tolist()])
    blocks = list(pairs_of(path, count=100).blocks(size, start))
    assert all(len(block.left) == size for block in blocks[:-1])
    found = [row for block in blocks for row in zip(block.left, block.right, strict=True)]
    assert found == [tuple(pair) for pair in pairs[start:]]


# --- pairs: what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("3", "'3' as left in row 1 .* from 0 to 2"),
        ("-1", "'-1' as left in row 1 .* from 0 to 2"),
        ("1.5", "'1.5' as left in row 1 .* no row number"),
        ("king", "'king' as left in row 1 .* no row number"),
        ("", "'' as left in row 1 .* no row number"),
        ("99999999999999999999", "no row number"),
    ],
)
def test_keys_that_are_no_rows_of_the_table_are_named(tmp_path, value, words):
    write_csv(tmp_path / "p.csv", [("left", "right"), (0, 1), (value, 1)])
    with pytest.raises(DataError, match=words):
        all_rows(pairs_of(tmp_path / "p.csv", count=3))


@pytest.mark.parametrize("kind", [pa.float64(), pa.int64(), pa.string()])
def test_missing_keys_are_named(tmp_path, kind):
    table = pa.table({"left": pa.array([0, None]).cast(kind), "right": [0, 1]})
    pq.write_table(table, tmp_path / "p.parquet")
    for ids in (None, ["0", "1"]):
        with pytest.raises(DataError, match=r"row 1 .* missing"):
            all_rows(pairs_of(tmp_path / "p.parquet", ids, 2))


def test_keys_outside_an_array_are_named(tmp_path):
    for number in (-1, 3, 2**63):
        np.save(
            tmp_path / "p.npy", np.array([[0, 1], [1, number]], np.uint64 if number > 3 else "i8")
        )
        with pytest.raises(DataError, match=f"{number} as right in row 1"):
            all_rows(pairs_of(tmp_path / "p.npy", count=3))


def test_unknown_ids_are_counted_with_examples(tmp_path):
    rows = [("left", "right"), ("a", "b"), *[(f"z{number}", "a") for number in range(5)]]
    write_csv(tmp_path / "p.csv", rows)
    with pytest.raises(DataError, match=r"5 in this block, such as 'z0', 'z1', 'z2', .* row 1 "):
        list(pairs_of(tmp_path / "p.csv", ["a", "b"]).blocks(100))
    write_csv(tmp_path / "p.csv", [("left", "right"), ("a", "")])
    with pytest.raises(DataError, match="the id is empty"):
        list(pairs_of(tmp_path / "p.csv", ["a", "b"]).blocks(100))


def test_arrays_of_the_wrong_shape_or_type_are_refused(tmp_path):
    np.save(tmp_path / "p.npy", np.zeros((2, 9), int))
    with pytest.raises(DataError, match=r"turn it with \.T"):
        pairs_of(tmp_path / "p.npy", count=3)
    np.save(tmp_path / "p.npy", np.zeros((9, 2)))
    with pytest.raises(DataError, match="float64, but pairs of row numbers are integers"):
        pairs_of(tmp_path / "p.npy", count=3)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\n\n", "holds no rows"),
        (b"left,right\n", "holds no pairs"),
        (b"left,right\n1,2\n1,2,3\n", "Row #3: Expected 2 columns, got 3"),
        (b'left,right\n1,2\n"1,2\n', "not well formed"),
        (b"left,right\n1,2\n\xff,2\n", "invalid UTF8"),
        (b"left,right\n1,\x002\n", "no format"),
        (gzip.compress(b"left,right\n" + b"1,2\n" * 100000, mtime=0)[:-50], "Truncated"),
        ("left,right\n1,2\n".encode("utf-16"), "UTF-16"),
    ],
)
def test_damaged_text_is_refused_in_one_sentence(tmp_path, content, words):
    (tmp_path / "p.csv").write_bytes(content)
    with pytest.raises(FastpairError, match=words) as caught:
        all_rows(pairs_of(tmp_path / "p.csv", count=3))
    assert "p.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["p.parquet", "p.npy", "p.npz", "p.h5"])
def test_files_cut_at_any_length_are_refused_in_one_sentence(tmp_path, name):
    path = tmp_path / name
    array = np.arange(2000).reshape(-1, 2)
    if name.endswith("parquet"):
        pq.write_table(pa.table({"left": array[:, 0], "right": array[:, 1]}), path)
    elif name.endswith("npy"):
        np.save(path, array)
    elif name.endswith("npz"):
        np.savez(path, pairs=array)
    else:
        with h5py.File(path, "w") as file:
            file["pairs"] = array
    content = path.read_bytes()
    for length in [1, 3, 7, 9, 60, 200, 1000, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(FastpairError) as caught:
            all_rows(pairs_of(path, count=10**6))
        assert "\n" not in str(caught.value)


def test_pipes_and_standard_input_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("-", "/dev/stdin", tmp_path / "pipe"):
        with pytest.raises(FileError, match="write it to a file"):
            pairs_of(name, count=3)


def test_columns_of_the_same_name_are_to_be_renamed(tmp_path):
    for header in (("left", "left", "right"), ("x", "x"), ("left", "right", "label", "label")):
        write_csv(tmp_path / "p.csv", [header, (0, 1, 1, 1)[: len(header)]])
        with pytest.raises(DataError, match="different names") as caught:
            pairs_of(tmp_path / "p.csv", count=3, want_labels=len(header) == 4)
        assert "--left" not in str(caught.value)


def test_missing_files_and_folders_are_said_so(tmp_path):
    with pytest.raises(FileError, match="does not exist"):
        pairs_of(tmp_path / "p.csv", count=3)
    with pytest.raises(FileError, match="is a folder"):
        open_embeddings(tmp_path)
    with pytest.raises(FileError, match="is a folder"):
        jobs.project("cosine", tmp_path, tmp_path / "t.h5")
    with pytest.raises(FileError, match=r"e.npy does not exist"):
        jobs.project("cosine", tmp_path / "e.npy", tmp_path / "t.h5")


# --- columns and labels -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("left right", ("left", "right", None)),
        ("ID_A ID_B Score", ("ID_A", "ID_B", "Score")),
        ("word_a word_b label kind", ("word_a", "word_b", "label")),
        (
            "_id label ltable_id rtable_id ltable_title rtable_title",
            ("ltable_id", "rtable_id", "label"),
        ),
        ("query-id corpus-id score", ("query-id", "corpus-id", "score")),
        ("thing1 thing2 target", ("thing1", "thing2", "target")),
        ("source target", ("source", "target", None)),
        ("left_key right_key y", ("left_key", "right_key", "y")),
        ("key_left key_right", ("key_left", "key_right", None)),
        ("foo bar", ("foo", "bar", None)),
        ("foo bar label", ("foo", "bar", "label")),
        ("user_id item_id rating timestamp", ("user_id", "item_id", "rating")),
    ],
)
def test_usual_columns_are_found(names, expected):
    found = find_columns(
        "p.csv", names.split(), None, None, None, want_labels=expected[2] is not None
    )
    assert found == expected


def test_columns_that_cannot_be_told_apart_are_listed():
    with pytest.raises(DataError, match="'x', 'y', 'z', 'w'"):
        find_columns("p.csv", list("xyzw"), None, None, None, want_labels=False)
    with pytest.raises(DataError, match="no column named 'q'; it has 'x', 'y'"):
        find_columns("p.csv", list("xy"), "q", "x", None, want_labels=False)
    with pytest.raises(DataError, match="no label column"):
        find_columns("p.csv", ["left", "right", "note", "more"], None, None, None, want_labels=True)
    with pytest.raises(DataError, match="several columns that could be labels"):
        find_columns("p.csv", ["i", "j", "score", "grade"], None, None, None, want_labels=True)
    with pytest.raises(ArgumentError, match="both key columns"):
        find_columns("p.csv", list("xy"), "x", None, None, want_labels=False)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["0", "1"], [0, 1]),
        (["TRUE", "False"], [1, 0]),
        (["good", "BAD", " yes ", "No"], [1, 0, 1, 0]),
        (["2.5", "-3e1", "+1"], [2.5, -30, 1]),
        (["-1", "1"], [0, 1]),
        (["-1", "0.5"], [-1, 0.5]),
        ([True, False], [1, 0]),
        ([3, 4], [3, 4]),
    ],
)
def test_labels_are_numbers_or_words(tmp_path, labels, expected):
    count = len(labels)
    table = pa.table({"left": [0] * count, "right": [0] * count, "label": labels})
    pq.write_table(table, tmp_path / "p.parquet")
    found = everything(tmp_path / "p.parquet", ids=None, count=1, want_labels=True)[2]
    assert found is not None
    assert found.tolist() == expected
    assert everything(tmp_path / "p.parquet", ids=None, count=1)[2] is None


@pytest.mark.parametrize("label", ["maybe", "", "nan", "inf", "1,5", "0x1"])
def test_labels_that_mean_nothing_are_named(label):
    with pytest.raises(DataError, match="in row 11"):
        parse_labels(pa.array(["1", label]), "p.csv", 10)


# --- what goes out ------------------------------------------------------------------------------

SCORES = np.array([0.1, -0.0, 1e-45, 3.4028235e38, 1 / 3, 123456.79, 7], np.float32)


def scored(size, keys=IDS):
    left, right = (pa.array([keys[pair[side]] for pair in PAIRS]) for side in (0, 1))
    for start in range(0, len(PAIRS), size):
        part = slice(start, start + size)
        yield left.slice(start, size), right.slice(start, size), SCORES[part]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "csv.gz", "tsv.gz"])
def test_scored_text_reads_back_to_the_same_keys_and_bits(tmp_path, suffix):
    path = tmp_path / f"s.{suffix}"
    assert write_scored_pairs(path, scored(3), names=("id_a", "id_b")) == 7
    content = path.read_bytes()
    text = (gzip.decompress(content) if suffix.endswith("gz") else content).decode()
    delimiter = "\t" if "tsv" in suffix else ","
    header, *rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    assert header == ["id_a", "id_b", "score"]
    assert [(left, right) for left, right, _ in rows] == [(IDS[a], IDS[b]) for a, b in PAIRS]
    assert np.array([score for *_, score in rows], np.float32).tobytes() == SCORES.tobytes()
    assert all_rows(pairs_of(path, IDS)) == PAIRS


def test_scored_parquet_keeps_keys_and_bits(tmp_path):
    write_scored_pairs(tmp_path / "s.parquet", scored(3, list(range(12))))
    table = pq.read_table(tmp_path / "s.parquet")
    assert table.column_names == ["left", "right", "score"]
    assert table["left"].type == pa.int64()
    assert table["score"].to_numpy().tobytes() == SCORES.tobytes()


@pytest.mark.parametrize("kind", [None, pa.int64(), pa.string()])
def test_no_scores_are_an_empty_parquet_file(tmp_path, kind):
    none = [] if kind is None else [(pa.array([], kind), pa.array([], kind), SCORES[:0])]
    assert write_scored_pairs(tmp_path / "s.parquet", none) == 0
    table = pq.read_table(tmp_path / "s.parquet")
    assert (table.num_rows, table.column_names) == (0, ["left", "right", "score"])
    assert table.schema.types == [kind or pa.string(), kind or pa.string(), pa.float32()]


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "parquet"])
def test_equal_scores_give_equal_bytes_for_any_blocks(tmp_path, suffix):
    for name, size in (("a", 2), ("b", 7)):
        write_scored_pairs(tmp_path / f"{name}.{suffix}", scored(size))
    first, second = (tmp_path / f"{name}.{suffix}" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [first.name, second.name]


def test_scores_are_not_half_written(tmp_path):
    def broken():
        yield from scored(3)
        raise DataError("unknown id")

    for suffix in ("csv", "csv.gz", "parquet"):
        with pytest.raises(DataError, match="unknown id"):
            write_scored_pairs(tmp_path / f"s.{suffix}", broken())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ArgumentError, match="none of the suffixes"):
        write_scored_pairs(tmp_path / "s.xls", scored(3))
    assert export_format("a/b.CSV.gz") == ".csv.gz"
    assert export_format("a/b.h5") is None


@pytest.mark.parametrize("name", FORMS)
def test_any_embeddings_can_be_converted(tmp_path, name):
    FORMS[name](tmp_path / name)
    assert convert(tmp_path / name, tmp_path / "out.h5") == "embeddings"
    expected, found = open_embeddings(tmp_path / name), open_embeddings(tmp_path / "out.h5")
    assert id_list(found) == id_list(expected)
    assert np.array_equal(found.read(), expected.read())
    with pytest.raises(FileError, match="exists already"):
        convert(tmp_path / name, tmp_path / "out.h5")


def test_pairs_are_converted_with_ids_rows_and_labels(tmp_path):
    rows = [(IDS[left], IDS[right], left % 2) for left, right in PAIRS]
    write_csv(tmp_path / "ids.csv", [("id_a", "id_b", "label"), *rows])
    assert convert(tmp_path / "ids.csv", tmp_path / "ids.h5") == "pairs"
    source = pairs_of(tmp_path / "ids.h5", IDS, want_labels=True)
    assert all_rows(source) == PAIRS
    assert next(source.blocks(9)).label.tolist() == [left % 2 for left, _ in PAIRS]
    write_csv(tmp_path / "rows.csv", PAIRS)
    assert convert(tmp_path / "rows.csv", tmp_path / "rows.h5") == "pairs"
    with h5py.File(tmp_path / "rows.h5") as file:
        assert file["pairs"].dtype == np.int32
        assert file["pairs"][:].tolist() == [list(pair) for pair in PAIRS]
    write_csv(tmp_path / "zeros.csv", [("left", "right"), ("007", "7")])
    convert(tmp_path / "zeros.csv", tmp_path / "zeros.h5")
    assert all_rows(pairs_of(tmp_path / "zeros.h5", ["7", "007"])) == [(1, 0)]


# --- size and real data -------------------------------------------------------------------------


def test_a_long_text_file_is_read_in_bounded_memory(tmp_path):
    count = 2_000_000
    with open(tmp_path / "p.csv", "w") as file:
        file.write("left,right\n")
        for start in range(0, count, 100_000):
            file.write("".join(f"{n},{count - 1 - n}\n" for n in range(start, start + 100_000)))
    code = """
import resource, sys
from fastpair.pairs import open_pairs
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
source = open_pairs(sys.argv[1], ids=None, count=2_000_000)
total = sum(int(block.left.sum()) for block in source.blocks(1 << 16))
print(source.count, total, peak() - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "p.csv")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert said[:2] == [str(count), str(count * (count - 1) // 2)]
    assert int(said[2]) < 100  # MiB; the file's keys alone would take more


@pytest.mark.skipif(not DATA.exists(), reason="the development data is not here")
def test_real_files_agree_across_formats():
    words = pa.array((DATA / "words" / "words.txt").read_text().splitlines())
    by_word = everything(
        DATA / "words" / "pairs_test.csv", ids=words, count=len(words), want_labels=True
    )
    by_row = everything(
        DATA / "words" / "pairs_test_index.parquet", ids=None, count=len(words), want_labels=True
    )
    for one, other in zip(by_word, by_row, strict=True):
        assert one is not None
        assert one.tolist() == np.asarray(other).tolist()
    source = open_embeddings(DATA / "amazon-google" / "embeddings.h5")
    assert source.shape == (4589, 384)
    for suffix in ("csv", "parquet"):
        pairs = open_pairs(
            DATA / "amazon-google" / f"pairs_test.{suffix}",
            ids=source.ids,
            count=source.shape[0],
            want_labels=True,
        )
        labels = [block.label for block in pairs.blocks(1000) if block.label is not None]
        assert np.concatenate(labels).sum() == 234


@pytest.mark.parametrize("suffix", ["csv", "parquet", "h5"])
def test_further_columns_of_pairs_come_as_they_are(tmp_path, suffix):
    path = tmp_path / f"pairs.{suffix}"
    columns = {"left": [0, 1, 2], "right": [2, 1, 0], "label": [0, 1, 1], "kind": ["NA", "b", "c"]}
    table = pa.table(columns)
    if suffix == "csv":
        path.write_text("left,right,label,kind\n0,2,0,NA\n1,1,1,b\n2,0,1,c\n")
    elif suffix == "parquet":
        pq.write_table(table, path)
    else:
        with h5py.File(path, "w") as file:
            for name, values in columns.items():
                file[name] = values
    options = {"ids": None, "count": 3, "extra": ["kind", "label"]}
    for labels in (True, False):
        source = open_pairs(path, **options, want_labels=labels)
        blocks = list(source.blocks(2))
        assert [len(block.extra[0]) for block in blocks] == [2, 1]
        assert [v for block in blocks for v in block.extra[0].to_pylist()] == columns["kind"]
        found = [float(v) for block in blocks for v in block.extra[1].to_pylist()]
        assert found == columns["label"]
        assert (blocks[0].label is not None) == labels
    with pytest.raises(DataError, match="colour"):
        open_pairs(path, ids=None, count=3, extra=["colour"])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.json", b'[["a", "b"]]', "is JSON; write its records"),
        ("p.jsonl", b'{"left": "a", "right": "b"}\n', "is JSON"),
        ("p.html", b"<table><tr><td>a</td></tr></table>", "is a document"),
        ("p.csv", "left,right\nä,b\n".encode("latin-1"), "save it as UTF-8"),
    ],
)
def test_what_is_no_table_is_called_by_its_name(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FastpairError, match=words):
        all_rows(pairs_of(tmp_path / name, count=3))


def test_a_workbook_is_called_by_its_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "p.xlsx", "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr("xl/workbook.xml", "<workbook/>")
    with pytest.raises(FastpairError, match="is an Excel workbook; save its sheet as CSV"):
        all_rows(pairs_of(tmp_path / "p.xlsx", count=3))
