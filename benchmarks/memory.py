"""Pair files far larger than the memory that a run is given: rates, cores that are busy, peaks.

Run ``python benchmarks/memory.py``. It makes a table with ids and the same pairs as plain HDF5, as
gzip HDF5 and as CSV of ids (2.2 GB for the default 1e8 pairs), and scores each into HDF5 with
``--memory`` set to the table's size and 512 MiB. For each it prints the rate, processor seconds by
wall seconds, and the peak of resident memory beside what is allowed: ``--memory`` and 200 MiB for
the interpreter and its libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

START = "import sys; from fastpair.cli import main; sys.exit(main())"
BESIDE = 200 * 2**20
"""Bytes that the interpreter and the libraries may use beside --memory."""

MAKE = """
import sys
import h5py, numpy as np, pyarrow as pa, pyarrow.csv as csv
entities, columns, pairs = map(int, sys.argv[1:])
rng = np.random.default_rng(0)
names = pa.array([f"id{number:08d}" for number in range(entities)])
with h5py.File("e.h5", "w") as file:
    file["embeddings"] = rng.standard_normal((entities, columns), dtype=np.float32)
    file.create_dataset("ids", data=names.to_pylist())
step, shape, chunks = 1 << 20, (pairs, 2), {"chunks": (1 << 16, 2)}
with h5py.File("plain.h5", "w") as plain, h5py.File("gzip.h5", "w") as packed:
    files = [plain.create_dataset("pairs", shape, "i4")]
    files += [packed.create_dataset("pairs", shape, "i4", compression=1, shuffle=True, **chunks)]
    schema = pa.schema([("left", "string"), ("right", "string")])
    options = csv.WriteOptions(quoting_style="none")
    with csv.CSVWriter("ids.csv", schema, write_options=options) as text:
        for start in range(0, pairs, step):
            part = rng.integers(0, entities, (min(step, pairs - start), 2), dtype=np.int32)
            for file in files:
                file[start : start + len(part)] = part
            sides = [names.take(pa.array(part[:, side])) for side in (0, 1)]
            text.write_table(pa.table(sides, schema=schema))
"""


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=100_000_000)
    parser.add_argument("--entities", type=int, default=1_000_000)
    parser.add_argument("--columns", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where data is made or found; it stays there")
    parser.add_argument("--json", action="store_true", dest="as_json")
    return parser.parse_args()


def fastpair(folder: Path, *words: object) -> dict[str, float]:
    """Run a command; return seconds, processor seconds and the peak of resident bytes."""
    begun = time.perf_counter()
    command = [sys.executable, "-c", START, *map(str, words)]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE)
    words_said = process.stderr.read().decode() if process.stderr else ""
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(words_said)
    wall = time.perf_counter() - begun
    return {
        "seconds": wall,
        "busy": (used.ru_utime + used.ru_stime) / wall,
        "peak": used.ru_maxrss * 1024,
    }


def main() -> None:
    """Measure and print."""
    asked = arguments()
    with ExitStack() as stack:
        folder = asked.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(exist_ok=True)
        if not (folder / "made").exists():
            sizes = map(str, (asked.entities, asked.columns, asked.pairs))
            subprocess.run([sys.executable, "-c", MAKE, *sizes], cwd=folder, check=True)
            fastpair(folder, "project", "dot", "e.h5", "-o", "t.h5", "--overwrite")
            (folder / "made").touch()
        memory = (folder / "t.h5").stat().st_size + 512 * 2**20
        runs: dict[str, list[dict[str, float]]] = {}
        for turn in range(asked.repeats + 1):
            for name in ("plain.h5", "gzip.h5", "ids.csv"):
                words = ("score", "t.h5", name, "--keys", "ids" if "csv" in name else "rows")
                options = ("-o", "s.h5", "--memory", memory, "--overwrite")
                found = fastpair(folder, *words, *options)
                if turn:  # the first one compiles and warms the page cache
                    runs.setdefault(name, []).append(found)
        result = {
            name: {key: median(run[key] for run in found) for key in found[0]}
            for name, found in runs.items()
        }
    if asked.as_json:
        print(json.dumps({"allowed": memory + BESIDE, "pairs": asked.pairs, "found": result}))
        return
    for name, found in result.items():
        rate = asked.pairs / found["seconds"] / 1e6
        peak, allowed = found["peak"] / 2**20, (memory + BESIDE) / 2**20
        print(
            f"{name:9} {found['seconds']:7.2f} s {rate:7.2f} million pairs/s, "
            f"{found['busy']:.2f} cores busy, peak {peak:.0f} MiB of {allowed:.0f}"
        )


if __name__ == "__main__":
    main()
