"""Tables larger than memory: the bytes of the run in memory, however they were cut."""

import contextlib
import os
from dataclasses import replace

import h5py
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import random_plan, random_table

from fastpair import block_pairs, blockwise, buckets, files, jobs, results
from fastpair.errors import FastpairError
from fastpair.files import TableWriter, write_embeddings
from fastpair.jobs import by_blocks, scoring
from fastpair.kernels import LINKS, PRECISIONS, RowLayout

BLOCK = 64
"""Pairs of a block of scores here."""


@contextlib.contextmanager
def little_memory(rows, rounds=2, chunk=3):
    """Let no table fit: so many rows do, in chunks of a third; rounds are of so many blocks."""
    with pytest.MonkeyPatch.context() as patch:
        real_cut, real_plan = blockwise.cut_tables, blockwise.BlockwiseScorer.make_plan
        real_pairs = block_pairs.BlockPairs.__init__

        def cut(counts, row_bytes, steps, memory):
            patch.setattr(buckets, "LEAST_CHUNK", row_bytes * max(1, rows // (2 * chunk)))
            return real_cut(counts, row_bytes, (1, 1), row_bytes * rows)

        def plan(scorer, source, block, first=0):
            made = real_plan(scorer, source, block, first)
            return replace(made, rounds=replace(made.rounds, round_pairs=rounds * block))

        def pairs(walk, *given, **named):
            real_pairs(walk, *given, **named)
            walk._held, walk._chunk = min(walk._held, rows), min(walk._chunk, max(1, rows // chunk))

        patch.setattr(by_blocks, "table_bytes", lambda *_: 1 << 60)
        patch.setattr(blockwise, "cut_tables", cut)
        patch.setattr(blockwise.BlockwiseScorer, "make_plan", plan)
        patch.setattr(block_pairs.BlockPairs, "__init__", pairs)
        yield patch


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(results, "SCORE_BLOCK", BLOCK)
    monkeypatch.setattr(scoring, "SCORE_BLOCK", BLOCK)
    monkeypatch.setattr(scoring, "EXPORTED_AT_ONCE", BLOCK // 8)
    monkeypatch.setattr(blockwise, "PIECE", 37)
    monkeypatch.setattr(files, "CHECKED_BYTES", 1)


def write_table(path, rows, plan, isolated=()):
    about = {"fingerprint": "f", "model_name": "m", "unit": "similarity"}
    with TableWriter(path, len(rows), plan, overwrite=True, **about) as table:
        table.write(0, rows.view(plan.layout.dtype)[:, 0])
        if len(isolated):
            table.isolate(np.asarray(isolated))


def write_pairs(path, pairs):
    with h5py.File(path, "w") as file:
        file["pairs"] = pairs


def layouts():
    count = st.integers(0, 9)
    runs = st.tuples(*[st.tuples(count, count) for _ in range(5)])
    made = st.builds(RowLayout, runs, st.booleans(), st.sampled_from(sorted(PRECISIONS)))
    return made.filter(lambda layout: layout.bias or layout.segment_lengths)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("out_of_core")


worlds = st.fixed_dictionaries(
    {
        "layout": layouts(),
        "link": st.sampled_from(LINKS),
        "seed": st.integers(0, 2**20),
        "left": st.integers(1, 60),
        "right": st.none() | st.integers(1, 60),
        "memory": st.integers(6, 40),
        "isolated": st.booleans(),
    }
)


def make_world(folder, world):
    """Tables as files; those of int8 differ in their scales. Returns what names them."""
    rng = np.random.default_rng(world["seed"])
    plan = random_plan(rng, world["layout"], world["link"])
    sizes = [world["left"]] + ([] if world["right"] is None else [world["right"]])
    paths = [folder / "left.h5", folder / "right.h5"][: len(sizes)]
    for path, size in zip(paths, sizes, strict=True):
        own = plan.with_scales(tuple(float(np.float32(s * 1.5)) for s in plan.segment_scales))
        own = own if path.stem == "right" and world["layout"].precision == "int8" else plan
        rows = random_table(rng, size, own)
        isolated = np.flatnonzero(rng.random(size) < 0.2) if world["isolated"] else []
        isolated = isolated if len(isolated) < size else []
        rows[isolated] = 0
        write_table(path, rows, own, isolated)
    return rng, dict(zip(("table", "against"), paths, strict=False))


@settings(max_examples=60)
@given(world=worlds, count=st.integers(1, 400), rounds=st.integers(1, 9))
def test_scores_have_the_bytes_of_the_run_in_memory(folder, world, count, rounds):
    rng, tables = make_world(folder, world)
    shape = world["left"], world["right"] or world["left"]
    pairs = np.stack([rng.integers(0, size, count) for size in shape], axis=1)
    write_pairs(folder / "p.h5", pairs)
    asked = {**tables, "pairs": folder / "p.h5", "overwrite": True}
    jobs.score(output=folder / "memory.h5", **asked)
    with little_memory(world["memory"], rounds):
        told = jobs.score(output=folder / "blocks.h5", **asked)
    assert "by_blocks" in told
    assert (folder / "memory.h5").read_bytes() == (folder / "blocks.h5").read_bytes()
    assert not list(folder.glob("*.buckets"))


@pytest.fixture(scope="module")
def named(folder):
    """Tables with ids, of a model that learned ids too, and pairs some of which are unknown."""
    rng = np.random.default_rng(3)
    ids = pa.array([f"entity {number}" for number in range(200)])
    vectors = rng.normal(size=(200, 7)).astype(np.float32)
    write_embeddings(folder / "e.h5", [(0, vectors)], vectors.shape, vectors.dtype, ids)
    jobs.project("cosine", folder / "e.h5", folder / "cosine.h5")
    lines = [f"entity {a},entity {b}" for a, b in rng.integers(0, 200, (500, 2))]
    (folder / "p.csv").write_text("left,right\n" + "\n".join(lines) + "\n")
    lines[77] = "entity 5,nobody"
    (folder / "odd.csv").write_text("left,right\n" + "\n".join(lines) + "\n")
    return folder


FORMS = {
    "s.csv": {},
    "s.parquet": {},
    "kept.h5": {"min_score": 0.2},
    "kept.tsv.gz": {"min_score": 0.2},
    "gzip.h5": {"compression": "gzip"},
    "nan.h5": {"unknown": "nan", "pairs": "odd.csv"},
    "nan.csv": {"unknown": "nan", "pairs": "odd.csv"},
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_output_is_that_of_the_run_in_memory(named, tmp_path, name):
    options = {"table": named / "cosine.h5", **FORMS[name]}
    options["pairs"] = named / options.get("pairs", "p.csv")
    expected = jobs.score(output=tmp_path / f"memory.{name}", **options)
    with little_memory(40):
        found = jobs.score(output=tmp_path / name, **options)
    assert (tmp_path / name).read_bytes() == (tmp_path / f"memory.{name}").read_bytes()
    assert [found[key] for key in ("kept", "unknown", "notes")] == [
        expected[key] for key in ("kept", "unknown", "notes")
    ]
    assert set(os.listdir(tmp_path)) == {name, f"memory.{name}"}


@settings(max_examples=40)
@given(world=worlds, k=st.integers(1, 70))
def test_matrices_have_the_bytes_of_the_run_in_memory(folder, world, k):
    _, tables = make_world(folder, world)
    forms = {
        "top": {"top_k": k},
        "above": {"threshold": 0.5},
        "dense": {"dense": True},
        "spread": {"histogram": True, "bins": 7},
    }
    for name, form in forms.items():
        asked = {**tables, **form, "overwrite": True}
        try:
            jobs.matrix(output=folder / f"{name}.memory.h5", **asked)
        except FastpairError as error:
            with little_memory(world["memory"]), pytest.raises(type(error), match=str(error)[:20]):
                jobs.matrix(output=folder / f"{name}.h5", **asked)
            continue
        with little_memory(world["memory"]):
            jobs.matrix(output=folder / f"{name}.h5", **asked)
        expected = (folder / f"{name}.memory.h5").read_bytes()
        assert (folder / f"{name}.h5").read_bytes() == expected, name


def test_rows_that_some_tool_compressed_are_read_too(named, tmp_path):
    with h5py.File(named / "cosine.h5") as old, h5py.File(tmp_path / "t.h5", "w") as new:
        for name, value in old.attrs.items():
            new.attrs[name] = value
        for name in old:
            packed = {"chunks": (16,), "compression": "gzip"} if name == "rows" else {}
            new.create_dataset(name, data=old[name][:], dtype=old[name].dtype, **packed)
    for table in (named / "cosine.h5", tmp_path / "t.h5"):
        with little_memory(40):
            jobs.score(table, named / "p.csv", tmp_path / "s.h5", overwrite=True)
        with h5py.File(tmp_path / "s.h5") as file:
            scores = file["score"][:]
        jobs.score(named / "cosine.h5", named / "p.csv", tmp_path / "memory.h5", overwrite=True)
        with h5py.File(tmp_path / "memory.h5") as file:
            np.testing.assert_array_equal(scores, file["score"][:])


def test_known_pairs_are_left_out_of_the_best(named, tmp_path):
    options = {"table": named / "cosine.h5", "top_k": 4, "exclude": named / "p.csv"}
    jobs.matrix(output=tmp_path / "memory.h5", **options)
    with little_memory(50):
        jobs.matrix(output=tmp_path / "blocks.h5", **options)
    assert (tmp_path / "memory.h5").read_bytes() == (tmp_path / "blocks.h5").read_bytes()


@pytest.mark.parametrize("form", [{"top_k": 3}, {"threshold": 0.3}, {"dense": True}])
def test_matrices_go_on_after_an_interruption(named, tmp_path, form, monkeypatch):
    monkeypatch.setattr(results, "fitting_rows", lambda columns: 16)
    options = {"table": named / "cosine.h5", **form}
    jobs.matrix(output=tmp_path / "memory.h5", **options)
    real, count = block_pairs.BlockPairs._walk, 0

    def walk(*arguments, **more):
        nonlocal count
        count += 1
        if count == 25:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    with little_memory(50) as patch:
        patch.setattr(block_pairs.BlockPairs, "_walk", walk)
        with pytest.raises(KeyboardInterrupt):
            jobs.matrix(output=tmp_path / "blocks.h5", **options)
        told = jobs.matrix(output=tmp_path / "blocks.h5", resume=True, **options)
    assert told["resumed_from"] > 0
    assert (tmp_path / "memory.h5").read_bytes() == (tmp_path / "blocks.h5").read_bytes()


def test_a_threshold_that_keeps_much_is_walked_in_smaller_blocks(named, tmp_path):
    options = {"table": named / "cosine.h5", "threshold": -2.0}
    jobs.matrix(output=tmp_path / "memory.h5", **options)
    with little_memory(150) as patch:
        patch.setattr(block_pairs, "LEAST_ROWS", 4)
        patch.setattr(block_pairs, "HIT_BYTES", 1 << 14)  # 4096 pairs fit into an eighth
        jobs.matrix(output=tmp_path / "blocks.h5", memory="512MiB", **options)
    assert (tmp_path / "memory.h5").read_bytes() == (tmp_path / "blocks.h5").read_bytes()
