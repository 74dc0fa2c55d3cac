"""Every accepted format, written by its own library where it is small enough to be here.

gensim and anndata are heavy and are asked for only where they are installed; their formats are also
written byte by byte, as their authors describe them.
"""

import bz2
import gzip
import json
import subprocess
import sys
import zipfile

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpair.errors import ArgumentError, DataError, FastpairError, FileError
from fastpair.export import convert
from fastpair.formats import ReadOptions, open_format
from fastpair.hdf5_arrays import Hdf5Arrays
from fastpair.ingest import open_embeddings
from fastpair.pairs import open_pairs
from fastpair.text import LineCounter, TextColumns

IDS = ["the", "007", "NA", "null", "naïve", "a,b", 'q"uote', "1e5", "日本", "-", "2000"]
NUMBERS = np.random.default_rng(0).standard_normal((11, 5)).astype(np.float32)
PAIRS = [(0, 1), (3, 2), (2, 3), (5, 5), (10, 0), (7, 8), (4, 10)]


def read(path, **options):
    source = open_embeddings(path, **options)
    ids = None if source.ids is None else source.ids.to_pylist()
    return ids, source.read(), source


def rows_of(path, ids=None, count=11, size=3, **options):
    array = None if ids is None else pa.array(ids, pa.string())
    source = open_pairs(path, ids=array, count=count, **options)
    blocks = list(source.blocks(size))
    return [pair for block in blocks for pair in zip(block.left.tolist(), block.right, strict=True)]


# --- embeddings ---------------------------------------------------------------------------------


def as_feather(path):
    vectors = pa.FixedSizeListArray.from_arrays(NUMBERS.ravel(), 5)
    pa.feather.write_feather(pa.table({"vector": vectors, "word": IDS}), path, compression="zstd")


def as_arrow_file(path):
    table = pa.table({"id": pa.array(IDS, pa.string_view()), "e": list(NUMBERS)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)


def as_arrow_stream(path):
    columns = {f"d{number}": NUMBERS[:, number] for number in range(5)}
    table = pa.table({"id": pa.array(IDS).dictionary_encode(), **columns})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def word_lines():
    texts = (" ".join(repr(float(number)) for number in row) for row in NUMBERS)
    return [f"{word} {numbers}" for word, numbers in zip(IDS, texts, strict=True)]


def as_word2vec_text(path):
    path.write_text("\n".join(["11 5", *word_lines()]) + "\n", encoding="utf-8")


def as_fasttext(path):
    path.write_text("11 5\r\n" + "".join(f"{line} \r\n" for line in word_lines()), encoding="utf-8")


def as_glove(path):
    path.write_text("\n".join(word_lines()), encoding="utf-8")


def as_word2vec_binary(path, newline=b"\n"):
    rows = zip(IDS, NUMBERS, strict=True)
    content = [w.encode() + b" " + v.astype("<f4").tobytes() + newline for w, v in rows]
    path.write_bytes(b"11 5\n" + b"".join(content))


def as_gensim_binary(path):
    as_word2vec_binary(path, newline=b"")


def as_gzip_binary(path):
    as_word2vec_binary(path)
    path.write_bytes(gzip.compress(path.read_bytes()))


def as_one_dataset_an_id(path):
    with h5py.File(path, "w") as file:
        for word, row in sorted(zip(IDS, NUMBERS, strict=True)):
            file[word] = row[None] if len(word) % 2 else row


def as_grouped(path):
    with h5py.File(path, "w") as file:
        file["model/vectors"] = NUMBERS
        file["model/names"] = IDS
        file["model/counts"] = np.arange(11)


def as_deflated_npz(path):
    np.savez_compressed(path, vectors=NUMBERS, words=np.array(IDS))


def as_columns_first_npz(path):
    np.savez_compressed(path, vectors=np.asfortranarray(NUMBERS), ids=np.array(IDS))


WITH_IDS = {
    "e.feather": as_feather,
    "file.arrow": as_arrow_file,
    "stream.arrows": as_arrow_stream,
    "word2vec.txt": as_word2vec_text,
    "fasttext.vec": as_fasttext,
    "glove.txt": as_glove,
    "word2vec.bin": as_word2vec_binary,
    "gensim.bin": as_gensim_binary,
    "word2vec.bin.gz": as_gzip_binary,
    "proteins.h5": as_one_dataset_an_id,
    "groups.h5": as_grouped,
    "deflated.npz": as_deflated_npz,
    "columns_first.npz": as_columns_first_npz,
}


@pytest.mark.parametrize("name", WITH_IDS)
def test_every_format_gives_its_vectors_and_ids(tmp_path, name):
    WITH_IDS[name](tmp_path / name)
    ids, numbers, source = read(tmp_path / name)
    order = np.argsort(IDS) if name == "proteins.h5" else range(11)
    assert ids == [IDS[row] for row in order]
    assert np.array_equal(numbers.astype(np.float32), NUMBERS[list(order)])
    blocks = list(source.blocks(4))
    assert [(start, len(block)) for start, block in blocks] == [(0, 4), (4, 4), (8, 3)]
    assert np.array_equal(np.concatenate([block for _, block in blocks]), numbers)
    assert convert(tmp_path / name, tmp_path / "out.h5") == "embeddings"
    assert np.array_equal(open_embeddings(tmp_path / "out.h5").read(), numbers)


@pytest.mark.parametrize("binary", [True, False])
def test_vectors_of_gensim_are_read(tmp_path, binary):
    keyed = pytest.importorskip("gensim.models.keyedvectors").KeyedVectors(5)
    keyed.add_vectors(IDS, NUMBERS)
    keyed.save_word2vec_format(str(tmp_path / "v.bin"), binary=binary)
    ids, numbers, _ = read(tmp_path / "v.bin")
    assert ids == keyed.index_to_key
    assert np.array_equal(numbers, keyed.vectors)


def test_words_with_spaces_and_words_that_are_numbers_are_words(tmp_path):
    (tmp_path / "g.txt").write_text("the 0.5 1\n. . . 2 -1e-3\n2000 7 8\n, 0.1 .5\n")
    ids, numbers, _ = read(tmp_path / "g.txt")
    assert ids == ["the", ". . .", "2000", ","]
    assert numbers.tolist() == np.array([[0.5, 1], [2, -1e-3], [7, 8], [0.1, 0.5]], "f4").tolist()


def test_long_word_vectors_are_cut_into_blocks_without_a_seam(tmp_path, monkeypatch):
    monkeypatch.setattr("fastpair.word_vectors.BLOCK_BYTES", 50)
    for name in ("word2vec.txt", "glove.txt", "word2vec.bin"):
        WITH_IDS[name](tmp_path / name)
        ids, numbers, _ = read(tmp_path / name)
        assert ids == IDS
        assert np.array_equal(numbers, NUMBERS)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"3 2\na 1 2\nb 3 4\n", "2 words, but its first line says 3"),
        (b"2 2\na 1 2\nb 3\n", "fewer than 2 numbers in row 1"),
        (b"2 2\na 1 2\nb 3 x\n", "'x' where a number should be, in row 1 .* column 1"),
        (b"2 2\na 1 2\n\xff 3 4\n", "no text in UTF-8"),
        (b"2 2\na 1 2\nb 3 nan\n", "nan in row 1"),
        (b"2 2\na 1 2\na 3 4\n", "'a' \\(2 times\\)"),
        (b"2 2\na \0\0\0\0\0\0\0\0\nb \0\0\0\0\0\0", "1 words, but its first line says 2"),
        (b"1 2\na \0\0\0\0\0\0\0\0\nb \0\0\0\0\0\0\0\0", "goes on after the 1 rows"),
    ],
)
def test_word_vectors_that_are_damaged_are_refused(tmp_path, content, words):
    (tmp_path / "v").write_bytes(content)
    with pytest.raises(FastpairError, match=words):
        read(tmp_path / "v")


@pytest.mark.parametrize("kind", ["F64", "F32", "F16", "BF16", "I8"])
def test_safetensors_are_read_as_they_were_written(tmp_path, kind):
    if kind == "BF16":  # NumPy has no such type, so that the file is written by its description
        stored = (NUMBERS.view(np.uint32) >> 16).astype(np.uint16)
        expected = (stored.astype(np.uint32) << 16).view(np.float32)
        about = {"dtype": "BF16", "shape": [11, 5], "data_offsets": [0, 110]}
        header = json.dumps({"__metadata__": {"format": "pt"}, "e": about}).encode()
        content = len(header).to_bytes(8, "little") + header + stored.tobytes()
    else:
        types = {"F64": "float64", "F32": "float32", "F16": "float16", "I8": "int8"}
        expected = (NUMBERS * 10).astype(types[kind])
        tensors = {"word_embeddings.weight": expected, "bias": np.zeros(11, "f4")}
        content = pytest.importorskip("safetensors.numpy").save(tensors, {"format": "pt"})
    (tmp_path / "m.safetensors").write_bytes(content)
    dataset = "word_embeddings.weight" if kind == "I8" else None
    ids, numbers, _ = read(tmp_path / "m.safetensors", dataset=dataset)
    assert ids is None
    assert np.array_equal(numbers, expected.astype(numbers.dtype))


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [11, 6]},
        {"shape": [-11, -5]},
        {"data_offsets": [0, 10**9]},
        {"data_offsets": [-220, 0]},
        {"dtype": 7},
        {"shape": None},
        {"shape": [11.0, 5]},
    ],
)
def test_a_header_of_safetensors_that_lies_is_refused(tmp_path, change):
    about = {"dtype": "F32", "shape": [11, 5], "data_offsets": [0, 220], **change}
    header = json.dumps({"e": about}).encode()
    content = len(header).to_bytes(8, "little") + header + NUMBERS.tobytes()
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(FastpairError, match=r"m\.safetensors"):
        read(tmp_path / "m.safetensors")


VECTORS = {"f": ("<f4", "fvecs"), "b": ("u1", "bvecs"), "i": ("<i4", "ivecs")}


@pytest.mark.parametrize("kind", VECTORS)
def test_vectors_of_the_texmex_form_are_read(tmp_path, kind):
    dtype, suffix = VECTORS[kind]
    numbers = (np.abs(NUMBERS) * 50).astype(dtype)
    rows = [np.int32(5).tobytes() + row.tobytes() for row in numbers]
    path = tmp_path / f"v.{suffix}"
    path.write_bytes(b"".join(rows))
    assert np.array_equal(read(path)[1], numbers)
    path.write_bytes(b"".join(rows)[:-1])
    with pytest.raises(FileError, match="cut short"):
        read(path)
    path.write_bytes(b"".join([*rows[:4], np.int32(4).tobytes(), *rows[5:]])[: len(b"".join(rows))])
    with pytest.raises(FastpairError, match=path.name):
        read(path)
    bad = bytearray(b"".join(rows))
    bad[4 * len(rows[0])] = 9
    path.write_bytes(bytes(bad))
    with pytest.raises(DataError, match="9 numbers in row 4"):
        read(path)


@pytest.mark.parametrize(("suffix", "dtype"), [("fbin", "<f4"), ("u8bin", "u1"), ("i8bin", "i1")])
def test_matrices_of_the_big_ann_form_are_read(tmp_path, suffix, dtype):
    numbers = (np.abs(NUMBERS) * 20).astype(dtype)
    path = tmp_path / f"m.{suffix}"
    path.write_bytes(np.array([11, 5], "<u4").tobytes() + numbers.tobytes())
    assert np.array_equal(read(path)[1], numbers)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileError, match="11 rows of 5 numbers do not make"):
        read(path)


def test_an_archive_is_read_in_order_and_never_as_a_whole(tmp_path):
    numbers = np.zeros((300_000, 100), np.float32)
    numbers[-1] = 1
    np.savez_compressed(tmp_path / "big.npz", e=numbers)
    code = """
import resource, sys
from fastpair.ingest import open_embeddings
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
total = sum(float(block.sum()) for _, block in open_embeddings(sys.argv[1]).blocks())
print(total, peak() - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "big.npz")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert float(said[0]) == 100
    assert int(said[1]) < 90  # MiB; the array takes 114


def test_a_member_of_an_archive_that_is_damaged_is_refused(tmp_path):
    path = tmp_path / "e.npz"
    np.savez(path, e=NUMBERS)
    content = bytearray(path.read_bytes())
    content[content.index(NUMBERS.tobytes()) + 3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(FileError, match="CRC"):
        read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"\x80\x04.")
    with pytest.raises(FileError, match="without arrays"):
        read(path)


# --- HDF5 ---------------------------------------------------------------------------------------


def test_compressions_of_other_writers_are_read(tmp_path):
    hdf5plugin = pytest.importorskip("hdf5plugin")
    filters = [{"compression": "lzf"}, {"compression": "gzip", "shuffle": True}]
    filters += [hdf5plugin.Blosc2(), hdf5plugin.Blosc(), hdf5plugin.Bitshuffle(), hdf5plugin.LZ4()]
    filters += [hdf5plugin.Zstd()]
    if h5py.h5z.filter_avail(h5py.h5z.FILTER_SZIP):
        filters += [{"compression": "szip"}]
    for number, options in enumerate(filters):
        with h5py.File(tmp_path / f"{number}.h5", "w") as file:
            file.create_dataset("some/where", data=NUMBERS, chunks=(4, 5), **options)
        assert np.array_equal(read(tmp_path / f"{number}.h5")[1], NUMBERS)


def test_a_group_stands_for_what_is_in_it(tmp_path):
    with h5py.File(tmp_path / "e.h5", "w") as file:
        for word, row in zip(IDS, NUMBERS, strict=True):
            file[f"mean/{word}"] = row
        file["one/vectors"] = NUMBERS[::-1]
        file["other"] = NUMBERS[:3]
    ids, numbers, source = read(tmp_path / "e.h5", dataset="mean")
    assert np.array_equal(numbers[ids.index("NA")], NUMBERS[2])
    assert source.assumed == "5 columns of numbers, ids from the names of 11 arrays"
    assert np.array_equal(read(tmp_path / "e.h5", dataset="/one/")[1], NUMBERS[::-1])
    with pytest.raises(DataError, match="--dataset"):
        read(tmp_path / "e.h5")


def test_rows_of_different_length_are_no_embeddings(tmp_path):
    with h5py.File(tmp_path / "e.h5", "w") as file:
        file["p1"], file["p2"] = np.ones((1, 9, 5)), np.ones((1, 7, 5))
    with pytest.raises(DataError, match=r"'p1' \(1, 9, 5\)"):
        read(tmp_path / "e.h5")


def annotated(path, index="names", kind="array"):
    """An AnnData file as its description says: encodings are attributes."""
    with h5py.File(path, "w") as file:
        file.attrs["encoding-type"], file.attrs["encoding-version"] = "anndata", "0.1.0"
        file["X"] = NUMBERS
        file["obsm/X_pca"] = NUMBERS[:, :2] * 2
        file["var/_index"] = ["g1", "g2", "g3", "g4", "g5"]
        observations = file.create_group("obs")
        observations.attrs["_index"] = index
        if kind == "array":
            observations[index] = IDS
        else:
            observations[f"{index}/values"], observations[f"{index}/mask"] = IDS, [False] * 11
    return path


@pytest.mark.parametrize("kind", ["array", "nullable"])
def test_observations_of_h5ad_are_the_ids(tmp_path, kind):
    path = annotated(tmp_path / "a.h5ad", kind=kind)
    for dataset in ("X_pca", "obsm/X_pca"):
        ids, numbers, _ = read(path, dataset=dataset)
        assert ids == IDS
        assert np.array_equal(numbers, NUMBERS[:, :2] * 2)
    assert np.array_equal(read(path, dataset="X")[1], NUMBERS)
    with pytest.raises(DataError, match=r"'obsm/X_pca'.*--dataset"):
        read(path)


def test_h5ad_of_its_own_library_is_read(tmp_path):
    anndata = pytest.importorskip("anndata")
    import pandas
    import scipy.sparse

    observations = pandas.DataFrame(index=pandas.Index(IDS, name="word"))
    made = anndata.AnnData(NUMBERS, observations, obsm={"X_pca": NUMBERS[:, :2]})
    made.write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    assert read(tmp_path / "a.h5ad", dataset="X_pca")[0] == IDS
    assert np.array_equal(read(tmp_path / "a.h5ad", dataset="X")[1], NUMBERS)
    sparse = anndata.AnnData(scipy.sparse.csr_matrix(NUMBERS), observations)
    sparse.write_h5ad(tmp_path / "s.h5ad")
    with pytest.raises(DataError, match="its X is sparse"):
        read(tmp_path / "s.h5ad")


def test_data_in_other_files_is_read_only_if_that_is_said(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["secret"] = NUMBERS
    NUMBERS.tofile(tmp_path / "raw.bin")
    files = {name: h5py.File(tmp_path / f"{name}.h5", "w") for name in ("link", "raw", "virtual")}
    files["link"]["embeddings"] = h5py.ExternalLink("other.h5", "/secret")
    external = [(str(tmp_path / "raw.bin"), 0, NUMBERS.nbytes)]
    files["raw"].create_dataset("embeddings", (11, 5), "f4", external=external)
    layout = h5py.VirtualLayout((11, 5), "f4")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "secret", (11, 5))
    files["virtual"].create_virtual_dataset("embeddings", layout)
    files["soft"] = h5py.File(tmp_path / "soft.h5", "w")
    files["soft"]["there"] = h5py.ExternalLink("other.h5", "/")
    files["soft"]["embeddings"] = h5py.SoftLink("/there/secret")
    for name, file in files.items():
        file.close()
        path = tmp_path / f"{name}.h5"
        with pytest.raises(FileError, match="--follow-links"):
            read(path)
        assert np.array_equal(read(path, options=ReadOptions(follow_links=True))[1], NUMBERS)
        assert "embeddings" not in Hdf5Arrays(path, "leave").entries


def test_links_inside_a_file_are_followed_once(tmp_path):
    with h5py.File(tmp_path / "e.h5", "w") as file:
        file["a/vectors"] = NUMBERS
        file["a/back"] = file["/"]
        file["embeddings"] = h5py.SoftLink("/a/vectors")
        file["nowhere"] = h5py.SoftLink("/b")
        file["circle"] = h5py.SoftLink("/circle")
        layout = h5py.VirtualLayout((11, 5), "f4")
        layout[:] = h5py.VirtualSource(".", "a/vectors", (11, 5))
        file.create_virtual_dataset("virtual", layout)
    assert set(Hdf5Arrays(tmp_path / "e.h5").entries) == {"a/vectors", "embeddings", "virtual"}
    for dataset in (None, "virtual"):
        assert np.array_equal(read(tmp_path / "e.h5", dataset=dataset)[1], NUMBERS)


def test_what_would_take_the_memory_is_refused(tmp_path):
    with h5py.File(tmp_path / "chunk.h5", "w") as file:
        chunks = (1 << 18, 1024)
        file.create_dataset("e", (1 << 20, 1024), "f8", chunks=chunks, compression="gzip")
    with pytest.raises(DataError, match="smaller chunks"):
        read(tmp_path / "chunk.h5")
    with h5py.File(tmp_path / "wide.h5", "w") as file:
        file.create_dataset("e", (3, 1 << 40), "f4", chunks=(1, 1 << 10))
    with pytest.raises(DataError, match="transpose"):
        read(tmp_path / "wide.h5")
    with h5py.File(tmp_path / "long.h5", "w") as file:
        file.create_dataset("e", (1 << 40, 100), "f4", chunks=(1 << 10, 100))
    with pytest.raises(FastpairError, match="more than this machine has"):
        read(tmp_path / "long.h5")
    with h5py.File(tmp_path / "ids.h5", "w") as file:
        file["embeddings"] = NUMBERS
        file.create_dataset("ids", (11,), "S100000000", chunks=(1,))
    with pytest.raises(DataError, match="values of 100000000 bytes"):
        read(tmp_path / "ids.h5")


# --- text ---------------------------------------------------------------------------------------


def compress(content, kind):
    if kind == "gzip":
        return gzip.compress(content[:30]) + gzip.compress(content[30:])  # of two members, as bgzip
    if kind == "bz2":
        return bz2.compress(content)
    if kind == "zstd":
        return pytest.importorskip("zstandard").compress(content)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, kind) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("kind", ["gzip", "zstd", "bz2", "lz4"])
def test_compressed_text_is_known_by_its_content(tmp_path, kind):
    text = "left,right\n" + "".join(f'"{IDS[a]}",{IDS[b]}\n' for a, b in PAIRS[:3])
    path = tmp_path / "anything"
    path.write_bytes(compress(text.encode(), kind))
    assert rows_of(path, IDS) == PAIRS[:3]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(FastpairError, match="anything"):
        rows_of(path, IDS)


@pytest.mark.parametrize("separator", [",", "\t", ";", "|", " ", ":", "~"])
def test_any_separator_is_found_or_given(tmp_path, separator):
    path = tmp_path / "p.txt"
    path.write_text("".join(f"{a}{separator}{b}\n" for a, b in PAIRS))
    given_ = None if separator in ",\t;| " else separator
    for asked in {given_, separator}:
        assert rows_of(path, options=ReadOptions(separator=asked)) == PAIRS
    for wrong in ("", "ab", "é", "\n", '"'):
        with pytest.raises(ArgumentError, match="one ASCII character"):
            rows_of(path, options=ReadOptions(separator=wrong))


def test_numbers_between_spaces_are_columns_without_ids(tmp_path):
    np.savetxt(tmp_path / "e.txt", NUMBERS)
    ids, numbers, _ = read(tmp_path / "e.txt")
    assert ids is None
    assert np.allclose(numbers, NUMBERS)


@given(
    st.text(alphabet='ab,"\n\r ', max_size=60),
    st.lists(st.integers(1, 9), min_size=1, max_size=9),
)
def test_rows_are_counted_as_arrow_cuts_them(text, steps):
    content = text.encode()
    counter, at = LineCounter(","), 0
    while at < len(content):
        step = steps[at % len(steps)]
        counter.add(content[at : at + step])
        at += step
    malformed = []

    def skip(row):
        malformed.append(row)
        return "skip"

    try:
        table = pa.csv.read_csv(
            pa.BufferReader(content),
            read_options=pa.csv.ReadOptions(use_threads=False, column_names=["0", "1"]),
            parse_options=pa.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
        )
    except pa.ArrowInvalid:
        return  # a quote that is never closed, or nothing at all
    assert counter.total() == table.num_rows + len(malformed)
    assert type(counter.total()) is int  # JSON takes no numbers of NumPy


def test_lines_of_a_large_file_are_counted_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("fastpair.text.COUNTED_BYTES", 7)
    path = tmp_path / "p.csv"
    path.write_bytes(b'\xef\xbb\xbfleft,right\r\n\r\n"a\n\nb","c""d"\r\n1,2\r\n\r\n3,"x"y\r\n"",4')
    file = TextColumns(path)
    assert file.count_rows([]) == 4
    assert sum(batch.num_rows for batch in file.batches(file.names)) == 4


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x80\x04\x95abc", "pickle, which is never loaded"),
        (b"SQLite format 3\0", "SQLite"),
        (b"\xfd7zXZ\0\0", "xz"),
        (gzip.compress(b"\x93NUMPY\x01\0abc", mtime=0), "decompress it first"),
        (gzip.compress(b"\x89HDF\r\n\x1a\n", mtime=0), "decompress it first"),
    ],
)
def test_files_of_other_kinds_are_called_by_their_name(tmp_path, content, words):
    (tmp_path / "f").write_bytes(content)
    for opened in (open_embeddings, rows_of):
        with pytest.raises(FileError, match=words):
            opened(tmp_path / "f")


# --- first lines --------------------------------------------------------------------------------


def first_line(tmp_path, text, ids=None, header=None):
    path = tmp_path / "p.csv"
    path.write_text(text)
    array = None if ids is None else pa.array(ids)
    options = ReadOptions(header=header)
    return open_pairs(path, ids=array, count=11 if ids is None else len(ids), options=options)


def test_a_first_line_is_never_lost_in_silence(tmp_path):
    known = ["ape", "bee", "cat", "a", "b"]
    source = first_line(tmp_path, "a,b\nape,bee\n", known)
    assert source.count == 1
    assert "the first line, 'a' and 'b', was taken for a header" in source.assumed
    source = first_line(tmp_path, "ape,bee\nbee,cat\n", known)
    assert (source.count, source.assumed.partition(";")[0]) == (
        2,
        "the first line is a pair, because 'ape' and 'bee' are known ids",
    )
    source = first_line(tmp_path, "x,y\nbee,cat\n", known)
    assert source.count == 1
    assert "the first line, 'x' and 'y', was taken for a header" in source.assumed
    with pytest.raises(DataError, match="say --header or --no-header"):
        first_line(tmp_path, "ape,y\nbee,cat\n", known)
    assert first_line(tmp_path, "ape,y\nbee,cat\n", known, header=True).count == 1
    assert first_line(tmp_path, "x,y\nb,c\n", known, header=False).count == 2
    assert first_line(tmp_path, "0,1\n5,6\n", header=True).count == 1
    assert first_line(tmp_path, "0,1\n5,6\n").count == 2


@pytest.mark.parametrize("first", ["king,queen", "item1,item2", "king,queen,1"])
def test_what_may_be_a_header_is_not_converted_before_that_is_said(tmp_path, first):
    path, second = tmp_path / "p.csv", first.translate(str.maketrans("12", "01"))
    path.write_text(f"{first}\n{second}\n")
    with pytest.raises(DataError, match="say --header or --no-header"):
        convert(path, tmp_path / "out.h5", kind="pairs")
    for header, count in ((False, 2), *([(True, 1)] if first.count(",") == 1 else [])):
        options = {"kind": "pairs", "options": ReadOptions(header=header), "overwrite": True}
        convert(path, tmp_path / "out.h5", **options)
        with h5py.File(tmp_path / "out.h5") as file:
            assert len(file["left"]) == count


def test_a_line_of_an_id_and_a_missing_number_is_no_header(tmp_path):
    for line in ("a,,0.5,1", "a,nan,0.5,1"):
        (tmp_path / "e.csv").write_text(f"{line}\nb,1,2,3\n")
        with pytest.raises(DataError, match="in row 0"):
            read(tmp_path / "e.csv")


def test_a_header_of_numbers_is_said(tmp_path):
    (tmp_path / "e.csv").write_text("0,1,2\n0.5,1,2\n")
    _, numbers, source = read(tmp_path / "e.csv")
    assert len(numbers) == 1
    assert "taken for a header" in source.assumed
    assert len(read(tmp_path / "e.csv", options=ReadOptions(header=False))[1]) == 2


# --- pairs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()),
        *(pa.binary_view(), pa.dictionary("int8", "string"), pa.dictionary("int32", "binary")),
    ],
)
@pytest.mark.parametrize("form", ["parquet", "feather", "arrows"])
def test_ids_of_any_text_type_are_ids(tmp_path, kind, form):
    path = tmp_path / f"p.{form}"
    sides = [pa.array([IDS[pair[side]] for pair in PAIRS]) for side in (0, 1)]
    value_type = kind.value_type if pa.types.is_dictionary(kind) else kind
    sides = [side.cast(value_type) for side in sides]
    if pa.types.is_dictionary(kind):
        sides = [side.dictionary_encode().cast(kind) for side in sides]
    table = pa.table(sides, ["lhs", "rhs"])
    if form == "parquet":
        pq.write_table(table, path, row_group_size=3)
    elif form == "feather":
        pa.feather.write_feather(table, path, chunksize=3)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    assert rows_of(path, IDS) == PAIRS
    source = open_pairs(path, ids=pa.array(IDS), count=11)
    kept = next(source.blocks(7, start=2, keep_keys=True))
    assert kept.left_keys.cast(pa.string()).to_pylist() == [IDS[a] for a, _ in PAIRS[2:]]


@pytest.mark.parametrize("kind", ["i1", "u1", "<i8", ">i4", "u8"])
def test_integers_of_every_width_are_rows(tmp_path, kind):
    array = np.array(PAIRS).astype(kind)
    np.save(tmp_path / "p.npy", array)
    np.savez_compressed(tmp_path / "p.npz", pairs=np.asfortranarray(array), other=np.zeros(3))
    np.savez_compressed(tmp_path / "s.npz", lhs=array[:, 0], rhs=array[:, 1])
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["lhs"], file["rhs"] = array[:, 0], array[:, 1]
    for name in ("p.npy", "p.npz", "s.npz", "p.h5"):
        assert rows_of(tmp_path / name) == PAIRS
        assert rows_of(tmp_path / name, size=100) == PAIRS


def test_a_long_text_in_many_rows_is_not_decoded(tmp_path):
    texts = pa.array(["a" * (1 << 17), "b"])
    keys = pa.DictionaryArray.from_arrays(pa.array([0, 1] * 10_000), texts)
    table = pa.table({"left": keys, "right": keys})
    pa.feather.write_feather(table, tmp_path / "p.feather", compression="zstd")
    with pytest.raises(DataError, match="would take too much memory"):
        rows_of(tmp_path / "p.feather", ["b"])


def test_a_line_without_an_end_does_not_take_the_memory(tmp_path):
    path = tmp_path / "p.csv.gz"
    path.write_bytes(gzip.compress(b"left,right\n" + b"a" * (300 << 20), 1))
    code = """
import resource, sys
from fastpair.errors import FastpairError
from fastpair.pairs import open_pairs
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
try:
    list(open_pairs(sys.argv[1], ids=None, count=3).blocks(1000))
except FastpairError as error:
    print(peak() - before, error)
"""
    command = [sys.executable, "-c", code, str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "p.csv.gz" in said
    assert int(said.split()[0]) < 100  # MiB


def test_bytes_that_are_no_text_are_no_ids(tmp_path):
    table = pa.table({"left": [b"a", b"\xff"], "right": [b"a", b"a"]})
    pq.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(DataError, match="column 'left' that are no text in UTF-8"):
        rows_of(tmp_path / "p.parquet", ["a"])


def test_neighbours_of_ann_benchmarks_are_pairs_of_query_and_neighbour(tmp_path):
    neighbours = np.array([[3, 1], [0, 2], [2, 3]], np.int32)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file.attrs["distance"] = "angular"
        file["train"], file["test"] = NUMBERS[:4], NUMBERS[:3]
        file["neighbors"], file["distances"] = neighbours, neighbours * 0.1
    expected = [(row, int(found)) for row in range(3) for found in neighbours[row]]
    assert rows_of(tmp_path / "a.hdf5", count=4) == expected
    source = open_pairs(tmp_path / "a.hdf5", ids=None, count=3, right_count=4, right_ids=None)
    assert "each query (a row of 'test') with its neighbours" in source.assumed
    for start in range(6):
        (block,) = source.blocks(10, start)
        assert list(zip(block.left, block.right, strict=True)) == expected[start:]
    with pytest.raises(DataError, match="'test'"):
        read(tmp_path / "a.hdf5")
    assert len(read(tmp_path / "a.hdf5", dataset="train")[1]) == 4


@pytest.mark.parametrize(
    ("stored", "value"), [("<i8", 2**32 + 1), ("<u8", 2**32 + 1), ("<u8", 2**63 + 1), ("<u4", 11)]
)
@pytest.mark.parametrize("form", ["npy", "h5", "parquet", "csv"])
def test_row_numbers_that_are_too_large_do_not_wrap(tmp_path, stored, value, form):
    array, path = np.array([[1, 2], [3, value]], stored), tmp_path / f"p.{form}"
    if form == "npy":
        np.save(path, array)
    elif form == "h5":
        with h5py.File(path, "w") as file:
            file["pairs"] = array
    elif form == "parquet":
        pq.write_table(pa.table({"left": array[:, 0], "right": array[:, 1]}), path)
    else:
        path.write_text("".join(f"{a},{b}\n" for a, b in array.tolist()))
    with pytest.raises(DataError, match=f"{value}.* as right in row 1"):
        rows_of(path)


def test_format_of_a_file_does_not_depend_on_its_name(tmp_path):
    as_feather(tmp_path / "wrong.csv")
    np.save(tmp_path / "wrong.h5", NUMBERS)
    (tmp_path / "wrong.h5.npy").rename(tmp_path / "wrong.parquet")
    assert read(tmp_path / "wrong.csv")[0] == IDS
    assert open_format(tmp_path / "wrong.parquet").format_name == "NumPy arrays"
