"""A local Dask cluster beside threads of one process: the same job, the same bytes, in turn.

Run ``python benchmarks/cluster.py``. It makes a table and a pair file in a temporary folder (or in
`--folder`, where it is kept), scores the pairs by `--threads` threads of one process and by as many
worker processes of one thread, `--repeats` times in turn, and prints medians beside the bar: the
cluster reaches at least 0.85 of the rate of one process. Rates are those of the whole job, in which
every worker reads the table and loads the kernels; what it takes to start and to end the cluster is
told apart. The job should take 20 seconds or more, or that part is all there is to see. Seconds of
the processors, of all processes and with their starts, are told too: they say what a cluster costs
where others use the machine meanwhile.
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

import h5py
import numpy as np

BAR = 0.85
"""Of the rate of one process, what a cluster of as many threads reaches at least."""

PAIRS_AT_ONCE = 1 << 24

RUN = """
import json, resource, sys, time
from pathlib import Path
from fastpair import jobs
from fastpair.distributed import connected
def main():
    folder, output = Path(sys.argv[1]), Path(sys.argv[2])
    threads, kind = int(sys.argv[3]), sys.argv[4]
    begun = time.perf_counter()
    with connected(workers=None if kind == "process" else threads, threads=threads) as cluster:
        started = time.perf_counter()
        given = {"threads": threads} if cluster is None else {"cluster": cluster}
        given["consolidate"] = kind == "consolidated"
        told = jobs.score(folder / "table.h5", folder / "pairs.h5", output, overwrite=True, **given)
        done = time.perf_counter()
    ends = (started - begun) + (time.perf_counter() - done)
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    spent = sum(one.ru_utime + one.ru_stime for one in spent)
    found = {"seconds": done - started, "around": ends, "processor": spent, "pairs": told["pairs"]}
    print(json.dumps(found))
if __name__ == "__main__":
    main()
"""

KINDS = ("process", "consolidated", "parts")


def make_data(folder: Path, asked: argparse.Namespace) -> None:
    """Write a table and a pair file."""
    from fastpair import jobs

    rng = np.random.default_rng(0)
    with h5py.File(folder / "vectors.h5", "w") as file:
        file["embeddings"] = rng.standard_normal((asked.rows, asked.columns), dtype=np.float32)
    jobs.project("cosine", folder / "vectors.h5", folder / "table.h5", overwrite=True)
    with h5py.File(folder / "pairs.h5", "w") as file:
        pairs = file.create_dataset("pairs", (asked.pairs, 2), "i4")
        for start in range(0, asked.pairs, PAIRS_AT_ONCE):
            stop = min(start + PAIRS_AT_ONCE, asked.pairs)
            pairs[start:stop] = rng.integers(0, asked.rows, (stop - start, 2), dtype=np.int32)


def run(folder: Path, script: Path, kind: str, threads: int) -> dict[str, float]:
    """Score all pairs in a process of its own."""
    output = folder / f"{kind}.h5"
    words = [sys.executable, str(script), str(folder), str(output), str(threads), kind]
    found = subprocess.run(words, check=True, capture_output=True, text=True)
    return json.loads(found.stdout)


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two files are equal."""
    with open(one, "rb") as first, open(other, "rb") as second:
        while True:
            blocks = first.read(1 << 24), second.read(1 << 24)
            if blocks[0] != blocks[1]:
                return False
            if not blocks[0]:
                return True


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="where data are kept; default: temporary")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--columns", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=600_000_000)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", dest="as_json", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    asked = arguments()
    with ExitStack() as stack:
        folder = asked.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(exist_ok=True, parents=True)
        if not (folder / "made").exists():
            make_data(folder, asked)
            (folder / "made").touch()
        script = folder / "run.py"
        script.write_text(RUN)
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for repeat in range(asked.repeats):
            for kind in KINDS if repeat % 2 == 0 else reversed(KINDS):
                found[kind].append(run(folder, script, kind, asked.threads))
                print(f"{kind}: {found[kind][-1]}", file=sys.stderr, flush=True)
        equal = same_bytes(folder / "process.h5", folder / "consolidated.h5")
    seconds = {kind: median(one["seconds"] for one in runs) for kind, runs in found.items()}
    spent = {kind: median(one["processor"] for one in runs) for kind, runs in found.items()}
    around = {kind: median(one["around"] for one in runs) for kind, runs in found.items()}
    ratios = {kind: seconds["process"] / seconds[kind] for kind in KINDS[1:]}
    if asked.as_json:
        told = {"found": found, "ratios": ratios, "bar": BAR, "same bytes": equal}
        print(json.dumps({"processors": os.cpu_count(), "date": time.strftime("%F"), **told}))
        return
    for kind in KINDS:
        rate = asked.pairs / seconds[kind] / 1e6
        ends = f", and {around[kind]:.1f} s to start and end" if kind != "process" else ""
        rest = f"{spent[kind]:7.1f} s of processors{ends}"
        print(f"{kind:14} {seconds[kind]:7.2f} s {rate:8.1f} million pairs a second, {rest}")
    for kind, ratio in ratios.items():
        print(f"{kind:14} {ratio:7.2f} of the rate of one process   bar {BAR}")
    print(f"same bytes: {'yes' if equal else 'NO'}")


if __name__ == "__main__":
    main()
