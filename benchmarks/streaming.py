"""Whole processes from file to file: fastpair beside its peers, interleaved, in one run.

Run ``python benchmarks/streaming.py``. It makes its data in a temporary folder, runs every command
once so that kernels are compiled and files are in the page cache, then `--repeats` times in turn,
and prints medians beside the bars:

- ``score`` from HDF5 into HDF5: at most 1.15 times what ``faiss.pairwise_indexed_inner_product``
  (or the faster of it and our own kernel) needs for the same pairs in memory, plus 1.5 seconds;
  1.6 times that from a file of shuffled and deflated chunks.
- ``score`` from Parquet: at least 20 times as fast as a join in DuckDB that computes the same
  products. DuckDB gets fewer pairs (`--duckdb-pairs`); rates are compared.
- string ids to rows: at least 10 million ids a second.
- ``matrix --dense``: at least 70 % of the rate at which NumPy writes the same bytes; both flush.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

IN_MEMORY = """
import sys, time
import h5py, numpy as np
from fastpair.files import read_table
from fastpair.scoring import PairScorer
table, pairs = read_table(sys.argv[1]), h5py.File(sys.argv[2])["pairs"][:]
left, right = (np.ascontiguousarray(pairs[:, side], np.int64) for side in (0, 1))
if sys.argv[3] == "faiss":
    import faiss
    vectors, at = table.rows.view(np.float32), faiss.swig_ptr
    scores = np.empty(len(left), np.float32)
    score = lambda: faiss.pairwise_indexed_inner_product(
        vectors.shape[1], len(left), at(vectors), at(left), at(vectors), at(right), at(scores))
else:
    scorer = PairScorer(table.rows, table.plan)
    scorer(left[:9], right[:9])
    score = lambda: scorer(left, right)
begun = time.perf_counter()
score()
print(time.perf_counter() - begun)
"""

LOOK_UP = """
import sys, time
import pyarrow.parquet as pq
from concurrent.futures import ThreadPoolExecutor
from fastpair.backend import thread_count
from fastpair.files import read_table
from fastpair.ids import RowsOfIds
ids = read_table(sys.argv[1]).ids
keys = pq.read_table(sys.argv[2], columns=["left"])["left"].combine_chunks()
parts = [keys.slice(start, 1 << 16) for start in range(0, len(keys), 1 << 16)]
RowsOfIds(ids)(keys[:9])
begun = time.perf_counter()
rows_of = RowsOfIds(ids)
with ThreadPoolExecutor(thread_count()) as pool:
    for _ in pool.map(rows_of, parts):
        pass
print(time.perf_counter() - begun)
"""

NUMPY_WRITES = """
import os, sys, time
import numpy as np
count = int(sys.argv[2])
matrix = np.random.default_rng(0).random((count, count), dtype=np.float32)
begun = time.perf_counter()
with open(sys.argv[1], "wb") as file:
    matrix.tofile(file)
    os.fsync(file.fileno())
print(time.perf_counter() - begun)
"""

DUCKDB = """
import sys, duckdb
table, pairs, output, width = sys.argv[1:]
duckdb.sql(f"ATTACH '{table}' AS t (READ_ONLY)")
duckdb.sql(f'''COPY (
    SELECT p.left, p.right, array_inner_product(a.vector, b.vector) AS score
    FROM '{pairs}' p JOIN t.entities a ON p.left = a.id JOIN t.entities b ON p.right = b.id
) TO '{output}' (FORMAT PARQUET)''')
"""


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=50_000_000)
    parser.add_argument("--duckdb-pairs", type=int, default=2_000_000)
    parser.add_argument("--entities", type=int, default=200_000)
    parser.add_argument("--columns", type=int, default=64)
    parser.add_argument("--dense", type=int, default=20_000, help="rows of the dense matrix")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where data is made or found; it stays there")
    parser.add_argument("--only", help="run only the jobs whose name has this in it")
    parser.add_argument("--json", action="store_true", dest="as_json")
    return parser.parse_args()


def fastpair(*words: object) -> list[str]:
    """A command of fastpair as a process of its own."""
    start = "import sys; from fastpair.cli import main; sys.exit(main())"
    return [sys.executable, "-c", start, *map(str, words)]


def python(code: str, *words: object) -> list[str]:
    """Some code as a process of its own."""
    return [sys.executable, "-c", code, *map(str, words)]


def seconds(command: list[str], folder: Path, told: bool) -> float:
    """How long a process took: by its own word where `told`, otherwise as a whole."""
    begun = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return float(done.stdout) if told else time.perf_counter() - begun


def write_pairs(folder: Path, pairs: np.ndarray, few: int) -> None:
    """The same pairs in every form that is measured."""
    forms = {
        "plain": {},
        "chunked": {"chunks": (1 << 16, 2)},
        "gzip": {"chunks": (1 << 16, 2), "compression": "gzip", "shuffle": True},
    }
    for name, options in forms.items():
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file.create_dataset("pairs", data=pairs, **options)
    rows = pa.table({"left": pairs[:, 0], "right": pairs[:, 1]})
    for name, count in (("rows", len(pairs)), ("few_rows", few)):
        pq.write_table(rows.slice(0, count), folder / f"{name}.parquet")
    del rows
    names = pa.array(id_texts(int(pairs.max()) + 1))
    for name, count in (("ids", len(pairs)), ("few_ids", few)):
        with pq.ParquetWriter(
            folder / f"{name}.parquet", pa.schema([("left", "string"), ("right", "string")])
        ) as writer:
            for start in range(0, count, 1 << 20):
                part = pairs[start : min(start + (1 << 20), count)]
                sides = [names.take(pa.array(part[:, side])) for side in (0, 1)]
                writer.write_table(pa.table(sides, ["left", "right"]))


def id_texts(count: int) -> list[str]:
    """Ids that are no integers."""
    return [f"id{number:08d}" for number in range(count)]


def make_data(folder: Path, asked: argparse.Namespace) -> None:
    """Tables and pairs; DuckDB gets its tables in its own format."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((asked.entities, asked.columns), dtype=np.float32)
    texts = id_texts(asked.entities)
    np.save(folder / "rows.npy", vectors)
    np.save(folder / "dense.npy", vectors[: asked.dense])
    with h5py.File(folder / "ids.h5", "w") as file:
        file["embeddings"] = vectors
        file.create_dataset("ids", data=texts)
    for source, table in (("rows.npy", "t"), ("ids.h5", "t_ids"), ("dense.npy", "t_dense")):
        command = fastpair("project", "dot", source, "-o", f"{table}.h5")
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    pairs = rng.integers(0, asked.entities, (asked.pairs, 2), dtype=np.int32)
    write_pairs(folder, pairs, asked.duckdb_pairs)
    try:
        import duckdb
    except ImportError:
        return
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), asked.columns)
    for name, ids in (("rows", pa.array(np.arange(asked.entities))), ("ids", pa.array(texts))):
        entities = pa.table({"id": ids, "vector": column})
        with duckdb.connect(str(folder / f"{name}.duckdb")) as database:
            database.register("given", entities)
            database.sql(
                f"CREATE TABLE entities AS SELECT id, vector::FLOAT[{asked.columns}] AS vector "
                "FROM given"
            )


def make_jobs(asked: argparse.Namespace) -> dict[str, tuple[list[str], bool, int]]:
    """Name -> command, whether it tells its time itself, and how many things it does."""
    count, few = asked.pairs, asked.duckdb_pairs
    jobs = {
        "in memory, faiss": (python(IN_MEMORY, "t.h5", "plain.h5", "faiss"), True, count),
        "in memory, fastpair": (python(IN_MEMORY, "t.h5", "plain.h5", "ours"), True, count),
        "ids to rows": (python(LOOK_UP, "t_ids.h5", "ids.parquet"), True, count),
        "NumPy writes a matrix": (python(NUMPY_WRITES, "n.bin", asked.dense), True, asked.dense**2),
        "matrix --dense": (
            fastpair("matrix", "t_dense.h5", "--dense", "-o", "m.h5"),
            False,
            asked.dense**2,
        ),
    }
    for form in ("plain", "chunked", "gzip"):
        words = ("score", "t.h5", f"{form}.h5", "-o", "s.h5")
        jobs[f"score, {form} HDF5"] = (fastpair(*words), False, count)
    for keys, table in (("rows", "t.h5"), ("ids", "t_ids.h5")):
        words = ("score", table, f"{keys}.parquet", "-o", "s.h5")
        jobs[f"score, Parquet of {keys}"] = (fastpair(*words), False, count)
        join = python(DUCKDB, f"{keys}.duckdb", f"few_{keys}.parquet", "d.parquet", asked.columns)
        jobs[f"DuckDB, Parquet of {keys}"] = (join, False, few)
    return {name: job for name, job in jobs.items() if asked.only is None or asked.only in name}


def measure(folder: Path, asked: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median seconds and things a second of every job; a peer that is not there is left out."""
    jobs, taken = make_jobs(asked), {}
    for turn in range(asked.repeats + 1):
        for name, (command, told, _) in list(jobs.items()):
            for output in ("s.h5", "m.h5", "n.bin", "d.parquet"):
                (folder / output).unlink(missing_ok=True)
            try:
                spent = seconds(command, folder, told)
            except subprocess.CalledProcessError as error:
                if "ModuleNotFoundError" not in error.stderr:
                    raise
                del jobs[name]
                continue
            if turn:  # the first one compiles and warms the page cache
                taken.setdefault(name, []).append(spent)
    return {
        name: {"seconds": median(spent), "a second": jobs[name][2] / median(spent)}
        for name, spent in taken.items()
    }


def bars(found: dict[str, dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Name -> the ratio that was measured and the bar that it is held against."""
    result = {}

    def compare(name: str, bar: float, ratio: Callable[[], float]) -> None:
        with suppress(KeyError, ValueError):  # a job that did not run
            result[name] = ratio(), bar

    def took(name: str) -> float:
        return found[name]["seconds"]

    def rate(name: str) -> float:
        return found[name]["a second"]

    for form, bar in (("plain", 1.15), ("chunked", 1.15), ("gzip", 1.6)):
        compare(
            f"score, {form} HDF5 / (memory + 1.5 s), at most",
            bar,
            lambda form=form: (
                took(f"score, {form} HDF5")
                / (min(found[n]["seconds"] for n in found if n.startswith("in memory")) + 1.5)
            ),
        )
    for keys in ("rows", "ids"):
        compare(
            f"score, Parquet of {keys} / DuckDB, at least",
            20,
            lambda keys=keys: (
                rate(f"score, Parquet of {keys}") / rate(f"DuckDB, Parquet of {keys}")
            ),
        )
    compare("ids to rows / 1e7 a second, at least", 1, lambda: rate("ids to rows") / 1e7)
    compare(
        "matrix --dense / NumPy writes, at least",
        0.7,
        lambda: rate("matrix --dense") / rate("NumPy writes a matrix"),
    )
    return result


def main() -> None:
    """Measure and print."""
    asked = arguments()
    with ExitStack() as stack:
        folder = asked.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(exist_ok=True)
        if not (folder / "made").exists():
            make_data(folder, asked)
            (folder / "made").touch()
        found = measure(folder, asked)
    ratios = bars(found)
    if asked.as_json:
        about = {"processors": os.cpu_count(), **{k: str(v) for k, v in vars(asked).items()}}
        print(json.dumps({"about": about, "found": found, "ratios": ratios}, indent=2))
        return
    for job, numbers in found.items():
        print(f"{job:28} {numbers['seconds']:8.2f} s {numbers['a second'] / 1e6:9.2f} million/s")
    missing = [job for job in make_jobs(asked) if job not in found]
    print(f"missing: {', '.join(missing) or 'nothing'}")
    for ratio, (value, bar) in ratios.items():
        print(f"{ratio:48} {value:7.2f}   bar {bar}")


if __name__ == "__main__":
    main()
