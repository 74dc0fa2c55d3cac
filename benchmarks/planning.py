"""Whether ``fastpair plan`` is right: fitted to runs of two sizes, it prices one ten times larger.

Run ``python benchmarks/planning.py``. It scores a pair file and walks all pairs (best 10, above a
threshold) at three sizes, the last with ten times the pairs of the second, and prints the seconds
that the first two foretell beside those that the third took; the bar is 30 %. ``fastpair bench``
is asked for its own estimate of the same runs, to see how far rates of small rows carry.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import h5py
import numpy as np

START = "import sys; from fastpair.cli import main; sys.exit(main())"
BAR = 0.3


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10_000_000, help="of the second size")
    parser.add_argument("--entities", type=int, default=200_000, help="of the table of pairs")
    parser.add_argument("--rows", type=int, default=30_000, help="of all pairs, the second size")
    parser.add_argument("--columns", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bench", action="store_true", help="compare with fastpair bench too")
    parser.add_argument("--json", action="store_true", dest="as_json")
    return parser.parse_args()


def fastpair(folder: Path, *words: object) -> dict[str, Any]:
    """Run a command and return its summary."""
    command = [sys.executable, "-c", START, *map(str, words), "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def make_table(folder: Path, name: str, rows: int, columns: int) -> None:
    """A table of random embeddings."""
    vectors = np.random.default_rng(rows).standard_normal((rows, columns), dtype=np.float32)
    np.save(folder / "e.npy", vectors)
    fastpair(folder, "project", "cosine", "e.npy", "-o", name, "--overwrite")


def typical(folder: Path, repeats: int, *words: object) -> dict[str, Any]:
    """The summary of a run of median length; the first run, which may compile, is left out."""
    runs = [fastpair(folder, *words, "--overwrite") for _ in range(repeats + 1)][1:]
    middle = median(run["seconds"] for run in runs)
    return min(runs, key=lambda run: abs(run["seconds"] - middle))


def measure(folder: Path, asked: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Summaries of each work at three sizes."""
    found: dict[str, list[dict[str, Any]]] = {"score": [], "top-k": [], "threshold": []}
    make_table(folder, "t.h5", asked.entities, asked.columns)
    rng = np.random.default_rng(0)
    for count in (asked.pairs // 5, asked.pairs, 10 * asked.pairs):
        with h5py.File(folder / "p.h5", "w") as file:
            pairs = file.create_dataset("pairs", (count, 2), "i4")
            for start in range(0, count, 1 << 22):
                part = min(1 << 22, count - start)
                pairs[start : start + part] = rng.integers(0, asked.entities, (part, 2), "i4")
        words = ("score", "t.h5", "p.h5", "-o", "s.h5", "--keys", "rows")
        found["score"].append(typical(folder, asked.repeats, *words))
    forms = {"top-k": ("--top-k", 10), "threshold": ("--threshold", 0.55)}
    for rows in (asked.rows // 2, asked.rows, round(asked.rows * 10**0.5)):
        make_table(folder, "m.h5", rows, asked.columns)
        for work, form in forms.items():
            words = ("matrix", "m.h5", "-o", "r.h5", *form)
            found[work].append(typical(folder, asked.repeats, *words))
    return found


def job_of(run: dict[str, Any], asked: argparse.Namespace) -> list[object]:
    """The words that ask `fastpair plan` for a run like this one."""
    work = run["work"]
    rows = run["table_bytes"] // run["row_bytes"]
    words: list[object] = ["--entities", rows, "--columns", asked.columns]
    if work == "score":
        return [*words, "--pairs", run["pairs"]]
    return [*words, "--top-k", 10] if work == "top-k" else [*words, "--threshold", "--kept", 1e-6]


def main() -> None:
    """Measure and print."""
    asked = arguments()
    result: dict[str, Any] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = []
        if asked.bench:
            (folder / "bench.json").write_text(
                json.dumps(fastpair(folder, "bench", "--columns", asked.columns))
            )
            bench = ["--rates", "bench.json"]
        for work, runs in measure(folder, asked).items():
            given: list[object] = []
            for number, run in enumerate(runs[:2]):
                (folder / f"{number}.json").write_text(json.dumps(run))
                given += ["--run", f"{number}.json"]
            job = job_of(runs[2], asked)
            priced = {"two runs": fastpair(folder, "plan", *job, *given)["seconds"]}
            if bench:
                priced["bench"] = fastpair(folder, "plan", *job, *bench)["seconds"]
            took = runs[2]["seconds"]
            result[work] = {
                "seconds": [run["seconds"] for run in runs],
                "pairs": [run["pairs"] for run in runs],
                "priced": {name: {"seconds": s, "off": s / took - 1} for name, s in priced.items()},
            }
    if asked.as_json:
        print(json.dumps(result, indent=2))
        return
    for work, found in result.items():
        sizes = ", ".join(
            f"{pairs:.3g} pairs {seconds:.2f} s"
            for pairs, seconds in zip(found["pairs"], found["seconds"], strict=True)
        )
        print(f"{work}: {sizes}")
        for name, price in found["priced"].items():
            bar = f", bar {BAR:.0%}" if name == "two runs" else ""
            print(f"  by {name}: {price['seconds']:.2f} s, {price['off']:+.0%}{bar}")


if __name__ == "__main__":
    main()
