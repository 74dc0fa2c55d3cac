"""Pairs on their way to the kernels: whatever way a file is read, its numbers are HDF5's own."""

import zlib
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpair import chunks
from fastpair.errors import DataError, FileError
from fastpair.hdf5_arrays import Hdf5Arrays
from fastpair.ids import RowsOfIds, text_parts
from fastpair.kernels import lookup
from fastpair.pairs import open_pairs

TYPES = ["<i4", ">i4", "<i8", ">u2", "<u8", "|i1", "<f4", ">f8"]
FILTERS = [
    {"compression": "gzip"},
    {"compression": "gzip", "compression_opts": 0},
    {"compression": "gzip", "shuffle": True},
    {"compression": "lzf", "shuffle": True},
    {"compression": "gzip", "fletcher32": True},
    {"shuffle": True},
    {},
]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "LEAST_CHUNK", 1)


def read_all(path, name, step, threads=3):
    """All rows of a data set, in parts that several threads read at once."""
    file = Hdf5Arrays(path)
    count = file.entries[name][0][0]
    with file.opened() as read_rows, ThreadPoolExecutor(threads) as pool:
        starts = range(0, count, step)
        parts = pool.map(lambda at: read_rows(name, at, min(at + step, count)), starts)
        return np.concatenate([np.asarray(part) for part in parts])


# --- chunks -------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(
    shape=st.tuples(st.integers(1, 60), st.none() | st.integers(1, 4)),
    chunk=st.tuples(st.integers(1, 70), st.integers(1, 5)),
    extendible=st.booleans(),
    dtype=st.sampled_from(TYPES),
    filters=st.sampled_from(FILTERS),
    step=st.integers(1, 61),
    written=st.integers(0, 60),
    latest=st.booleans(),
    seed=st.integers(0, 9),
)
def test_chunks_of_any_shape_give_the_numbers_that_hdf5_reads(
    tmp_path_factory, shape, chunk, extendible, dtype, filters, step, written, latest, seed
):
    path = tmp_path_factory.mktemp("chunks") / "p.h5"
    rows, columns = shape
    shape = (rows,) if columns is None else shape
    chunk = tuple(
        size if extendible else min(size, n) for size, n in zip(chunk, shape, strict=False)
    )
    numbers = np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)
    with h5py.File(path, "w", libver="latest" if latest else None) as file:
        more = {"maxshape": (None,) * len(shape)} if extendible else {}
        dataset = file.create_dataset(
            "pairs", shape, dtype, chunks=chunk, fillvalue=7, **more, **filters
        )
        dataset[:written] = numbers[:written]  # chunks that are never written hold the fill value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "LEAST_CHUNK", 1)
        found = read_all(path, "pairs", step)
        with h5py.File(path) as file:
            expected, ours = file["pairs"][:], chunks.inflates(file["pairs"])
    assert found.dtype == expected.dtype.newbyteorder("=")
    assert np.array_equal(found, expected)
    assert ours == (filters.get("compression") == "gzip" and "fletcher32" not in filters)


def test_chunks_that_were_stored_by_hand_are_left_to_hdf5(tmp_path, small_chunks):
    numbers = np.arange(40, dtype="<i4").reshape(20, 2)
    with h5py.File(tmp_path / "p.h5", "w") as file:
        options = {"chunks": (5, 2), "compression": "gzip", "shuffle": True}
        dataset = file.create_dataset("pairs", (20, 2), "<i4", **options)
        dataset[:] = numbers
        dataset.id.write_direct_chunk((5, 0), numbers[5:10].tobytes(), filter_mask=0b11)
        planes = numbers[10:15].reshape(-1).view(np.uint8).reshape(-1, 4).T.tobytes()
        dataset.id.write_direct_chunk((10, 0), planes, filter_mask=0b10)
    assert np.array_equal(read_all(tmp_path / "p.h5", "pairs", 7), numbers)


def test_odd_types_and_a_user_block_are_left_to_hdf5(tmp_path, small_chunks):
    numbers = np.arange(200, dtype="<i4").reshape(100, 2)
    options = {"chunks": (30, 2), "compression": "gzip"}
    with h5py.File(tmp_path / "block.h5", "w", userblock_size=512) as file:
        file.create_dataset("pairs", data=numbers, **options)
    with h5py.File(tmp_path / "narrow.h5", "w") as file:
        kind = h5py.h5t.STD_I32LE.copy()
        kind.set_precision(24)
        settings_of = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings_of.set_chunk((30, 2))
        settings_of.set_deflate(4)
        space = h5py.h5s.create_simple((100, 2))
        dataset = h5py.Dataset(h5py.h5d.create(file.id, b"pairs", kind, space, dcpl=settings_of))
        dataset[:] = numbers
    for name in ("block.h5", "narrow.h5"):
        with h5py.File(tmp_path / name) as file:
            assert not chunks.inflates(file["pairs"])
        assert np.array_equal(read_all(tmp_path / name, "pairs", 11), numbers)


@pytest.mark.parametrize("damage", ["cut", "flip", "bomb"])
def test_a_damaged_chunk_is_one_sentence(tmp_path, small_chunks, damage):
    numbers = np.random.default_rng(0).integers(0, 9, (1000, 2), dtype="<i4")
    with h5py.File(tmp_path / "p.h5", "w") as file:
        dataset = file.create_dataset("pairs", data=numbers, chunks=(100, 2), compression="gzip")
        where = dataset.id.get_chunk_info(5)
        if damage == "bomb":  # a chunk that says too much; HDF5 takes what fits or refuses it
            data = zlib.compress(numbers[500:600].tobytes() + bytes(10**6))
            dataset.id.write_direct_chunk((500, 0), data)
    if damage != "bomb":
        content = bytearray((tmp_path / "p.h5").read_bytes())
        start = where.byte_offset + where.size // 2
        content[start : start + 20] = bytes(20)
        (tmp_path / "p.h5").write_bytes(content if damage == "flip" else content[:start])

    def left():
        source = open_pairs(tmp_path / "p.h5", ids=None, count=9)
        return np.concatenate([block.left for block in source.blocks(64, threads=2)])

    if damage == "bomb":
        assert np.array_equal(left(), numbers[:, 0])
    else:
        with pytest.raises(FileError, match="cannot be read"):
            left()


# --- blocks -------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    count=st.integers(1, 90),
    size=st.integers(1, 50),
    start=st.integers(0, 89),
    rows=st.integers(1, 40),
    threads=st.integers(1, 4),
    ids=st.booleans(),
)
def test_blocks_are_the_same_for_any_number_of_threads(
    tmp_path_factory, count, size, start, rows, threads, ids
):
    path = tmp_path_factory.mktemp("pairs") / "p.h5"
    pairs = np.random.default_rng(count).integers(0, 100, (count, 2))
    with h5py.File(path, "w") as file:
        file.create_dataset("pairs", data=pairs, chunks=(min(rows, count), 2), compression="gzip")
    names = pa.array([str(number) for number in range(100)]) if ids else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastpair.raw_pairs.ARRAY_PAIRS", 8)
        patch.setattr("fastpair.pairs.KEY_BYTES", 100)
        patch.setattr(chunks, "LEAST_CHUNK", 1)
        source = open_pairs(path, ids=names, count=100)
        blocks = list(source.blocks(size, start, threads=threads))
    assert [block.start for block in blocks] == list(range(start, count, size))
    for side, numbers in (("left", pairs[start:, 0]), ("right", pairs[start:, 1])):
        parts = [getattr(block, side) for block in blocks]
        assert all(part.dtype == np.int64 and part.flags.c_contiguous for part in parts)
        assert np.array_equal(np.concatenate([[], *parts]), numbers)


def test_the_first_bad_pair_is_named_whichever_thread_finds_one(tmp_path):
    pairs = np.zeros((3000, 2), np.int32)
    pairs[[1234, 2900], [1, 0]] = 5
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["pairs"] = pairs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastpair.raw_pairs.ARRAY_PAIRS", 50)
        source = open_pairs(tmp_path / "p.h5", ids=None, count=5)
        with pytest.raises(DataError, match="has 5 as right in row 1234 "):
            list(source.blocks(1000, threads=4))


# --- ids ----------------------------------------------------------------------------------------

texts = st.text(max_size=20) | st.sampled_from(["a", "aa", "a" * 8, "a" * 9, "b" * 16, "b" * 17])


@settings(max_examples=100)
@given(
    ids=st.lists(texts, max_size=80),
    others=st.lists(texts, max_size=40),
    offset=st.integers(0, 3),
)
def test_ids_are_found_as_arrow_finds_them(ids, others, offset):
    named = pa.array(["x"] * offset + ids, pa.string()).slice(offset)
    asked = pa.array(["y"] * offset + others + ids[::-1], pa.string()).slice(offset)
    expected = pc.fill_null(pc.index_in(asked, value_set=named), -1).to_numpy()
    assert RowsOfIds(named)(asked).tolist() == expected.tolist()


def test_a_hash_is_not_believed_until_the_texts_are_equal():
    parts = text_parts(pa.array(["a", "b"]))
    known, asked = lookup.texts_at(*parts), lookup.texts_at(parts[0][:2], parts[1])
    rows = np.empty(1, np.int64)
    slots = lookup.empty_slots(2)
    lookup.fill_slots(slots, asked)
    place = int(np.flatnonzero(slots)[0])
    slots[place] += np.uint64(1)  # the hash of "a" now leads to "b"
    assert lookup.find_rows(slots, known, asked, rows) == 1
    assert rows[0] == -1
    slots[(place + 1) % len(slots)] = slots[place] - np.uint64(1)  # and, further on, to "a"
    assert lookup.find_rows(slots, known, asked, rows) == 0
    assert rows[0] == 0
