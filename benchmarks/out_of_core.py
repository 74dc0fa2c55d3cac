"""Tables larger than memory: `fastpair score --memory` beside a memory map, under one limit.

Run ``python benchmarks/out_of_core.py`` as root on a Linux machine. It makes a table and random
pairs in `--folder`, and runs inside a memory control group of `--memory` and 200 MiB, which counts
the page cache too. Where no such group can be made, it says so and measures nothing. The bars:

- at least 10 times as many pairs a second as rows gathered from a memory map by NumPy under the
  same limit, which gets as many pairs as it scores in `--naive-seconds`;
- at most 1.5 times the seconds that reading the bytes of `--plan` from this disk (cold, in order)
  and scoring the pairs in memory take together;
- the same bytes as the run in memory writes.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import h5py
import numpy as np

BESIDE = 200 << 20
"""Bytes that a process may use beside --memory."""

BLOCK = 1 << 18
"""Rows or pairs that are made together."""

NAIVE = """
import os, sys, time
import h5py, numpy as np
with h5py.File(sys.argv[1]) as file:
    dataset = file["rows"]
    shape, at = (len(dataset), dataset.dtype.itemsize // 4), dataset.id.get_offset()
    used = sum(dataset.dtype[name].shape[0] for name in ("product",))
rows = np.memmap(sys.argv[1], np.float32, "r", at, shape)[:, :used]
begun, done = time.perf_counter(), 0
with h5py.File(sys.argv[2]) as file:
    while time.perf_counter() - begun < float(sys.argv[3]) and done < len(file["pairs"]):
        pairs = file["pairs"][done : done + 256]
        np.einsum("ij,ij->i", rows[pairs[:, 0]], rows[pairs[:, 1]])
        done += len(pairs)
print(done / (time.perf_counter() - begun))
"""

READ = """
import os, sys, time
buffer, done, most = bytearray(1 << 24), 0, int(float(sys.argv[2]))
begun = time.perf_counter()
with open(sys.argv[1], "rb", buffering=0) as file:
    while done < most and (count := file.readinto(buffer)):
        done += count
print(done / (time.perf_counter() - begun))
"""


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=12_000_000)
    parser.add_argument("--columns", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=200_000_000)
    parser.add_argument("--memory", type=int, default=1 << 30, help="bytes")
    parser.add_argument("--naive-seconds", type=float, default=30)
    parser.add_argument("--folder", type=Path, required=True, help="where the data is made")
    parser.add_argument("--keep", action="store_true", help="leave the data there")
    parser.add_argument("--json", action="store_true", dest="as_json")
    return parser.parse_args()


def make_table(path: Path, rows: int, columns: int) -> None:
    """A table of random rows, written block by block."""
    from fastpair.files import TableWriter
    from fastpair.kernels import Plan, RowLayout

    layout = RowLayout(((columns, 0),) + ((0, 0),) * 4)
    rng = np.random.default_rng(0)
    about = {"fingerprint": "random", "model_name": "dot", "unit": "similarity"}
    with TableWriter(path, rows, Plan(layout), **about) as table:
        for start in range(0, rows, BLOCK):
            block = np.zeros(min(BLOCK, rows - start), layout.dtype)
            shape = block["product"][:, :columns].shape
            block["product"][:, :columns] = rng.random(shape, dtype=np.float32) - np.float32(0.5)
            table.write(start, block)


def make_pairs(path: Path, pairs: int, rows: int) -> None:
    """Random pairs of row numbers, contiguous in HDF5."""
    rng = np.random.default_rng(1)
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("pairs", (pairs, 2), "i4")
        for start in range(0, pairs, BLOCK * 16):
            count = min(BLOCK * 16, pairs - start)
            dataset[start : start + count] = rng.integers(0, rows, (count, 2), dtype=np.int32)


@contextmanager
def limited(memory: int) -> Iterator[Path | None]:
    """A memory control group of so many bytes, as its folder; None where none can be made."""
    name = f"fastpair-{os.getpid()}"
    first, second = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    folder, limit = first / name, "memory.limit_in_bytes"
    if (second / "cgroup.controllers").exists():
        with suppress(OSError):
            (second / "cgroup.subtree_control").write_text("+memory")
        folder, limit = second / name, "memory.max"
    try:
        folder.mkdir()
    except OSError:
        yield None
        return
    try:
        try:
            (folder / limit).write_text(str(memory))
        except OSError:
            yield None
            return
        yield folder
    finally:
        folder.rmdir()


def run(command: list[str], group: Path | None = None) -> str:
    """Run a command, in a control group if one is given; return what it printed."""

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    done = subprocess.run(command, preexec_fn=enter, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[:4]} failed: {done.stderr[-2000:]}")
    return done.stdout


def fastpair(*words: object) -> list[str]:
    """A command of fastpair as a process of its own."""
    start = "import sys; from fastpair.cli import main; sys.exit(main())"
    return [sys.executable, "-c", start, *map(str, words)]


def python(code: str, *words: object) -> list[str]:
    """Some code as a process of its own."""
    return [sys.executable, "-c", code, *map(str, words)]


def forget(*paths: Path) -> None:
    """Drop files from the page cache."""
    os.sync()
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(asked: argparse.Namespace, group: Path) -> dict[str, float]:
    """Everything that is compared."""
    table, pairs = asked.folder / "table.h5", asked.folder / "pairs.h5"
    outputs = asked.folder / "memory.h5", asked.folder / "blocks.h5"
    found: dict[str, float] = {}
    words = ("score", table, pairs, "--memory", asked.memory)
    small = asked.folder / "warm"  # kernels are compiled before anything is measured
    small.mkdir(exist_ok=True)
    make_table(small / "t.h5", (96 << 20) // (4 * asked.columns), asked.columns)
    make_pairs(small / "p.h5", 1000, 1000)
    for size in ("64MiB", "1GiB"):
        warm = (small / "t.h5", small / "p.h5", "-o", small / "s.h5", "--overwrite")
        run(fastpair("score", *warm, "--memory", size))
    shutil.rmtree(small)
    plan = json.loads(run(fastpair(*words, "-o", outputs[1], "--plan", "--json")))
    found |= {f"plan: {name}": value for name, value in plan.items()}
    forget(table, pairs)
    found["disk, bytes/s"] = float(run(python(READ, table, 3e9), group))
    forget(table, pairs)
    begun = time.perf_counter()
    told = json.loads(run(fastpair(*words, "-o", outputs[1], "--json"), group))
    found["by blocks, s"] = time.perf_counter() - begun
    found |= {f"by blocks: {name}": value for name, value in told["by_blocks"].items()}
    found["by blocks, peak bytes of the group"] = peak_of(group)
    forget(table, pairs)
    rate = float(run(python(NAIVE, table, pairs, asked.naive_seconds), group))
    found["memory map, pairs/s"] = rate
    words = ("score", table, pairs, "--memory", 2 * plan["table_bytes"] + (4 << 30))
    told = json.loads(run(fastpair(*words, "-o", outputs[0], "--json", "--device", "cpu")))
    found["in memory, s"] = told["scoring_seconds"]
    found["same bytes"] = filecmp.cmp(*outputs, shallow=False)
    return found


def peak_of(group: Path) -> float:
    """The most memory that a control group has used."""
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        with suppress(OSError):
            return float((group / name).read_text())
    return float("nan")


def main() -> None:
    """Measure and print."""
    asked = arguments()
    asked.folder.mkdir(exist_ok=True, parents=True)
    with limited(asked.memory + BESIDE) as group:
        if group is None:
            print("SKIPPED: no memory control group can be made here (root on Linux can)")
            return
        table, pairs = asked.folder / "table.h5", asked.folder / "pairs.h5"
        for path in (asked.folder / "memory.h5", asked.folder / "blocks.h5"):
            path.unlink(missing_ok=True)
        try:
            if not table.exists():
                make_table(table, asked.rows, asked.columns)
            if not pairs.exists():
                make_pairs(pairs, asked.pairs, asked.rows)
            found = measure(asked, group)
        finally:
            if not asked.keep:
                shutil.rmtree(asked.folder)
    reading = found["plan: bytes_read"] / found["disk, bytes/s"]
    rate = asked.pairs / found["by blocks, s"]
    ratios = {
        "by blocks / memory map, at least": (rate / found["memory map, pairs/s"], 10.0),
        "by blocks / (reading + in memory), at most": (
            found["by blocks, s"] / (reading + found["in memory, s"]),
            1.5,
        ),
    }
    if asked.as_json:
        print(json.dumps({"found": found, "ratios": ratios}, indent=2))
        return
    for name, value in found.items():
        print(f"{name:40} {value:>16,.6g}" if not isinstance(value, bool) else f"{name}: {value}")
    print(f"{'reading the planned bytes, s':40} {reading:16.2f}")
    for name, (value, bar) in ratios.items():
        print(f"{name:48} {value:7.2f}   bar {bar}")


if __name__ == "__main__":
    main()
