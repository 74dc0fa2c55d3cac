"""Id models: pairs a second of an epoch, and what they reach on ratings where they are given.

Run ``python benchmarks/id_models.py``. It makes 10 million random pairs of a million left and a
hundred thousand right ids (the right ones unevenly popular) and times one epoch of each way to
learn, in wall-clock and in processor seconds. ``--ratings FILE`` adds training and test on a CSV
file of ``user_id,item_id,rating`` with columns that say ``train``, ``valid`` or ``test``; name them
with ``--split COLUMN``, several if wanted. Test ratings of ids without a train rating count too.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from pathlib import Path

import numpy as np

from fastpair import id_jobs
from fastpair.backend import thread_count
from fastpair.heads import parse_heads
from fastpair.id_heads import start_id_learner
from fastpair.id_learners import IdPairs, IdSettings

WORKS = {
    "squared": IdSettings(),
    "squared, implicit": IdSettings(implicit=True),
    "cross-entropy": IdSettings(loss="cross-entropy"),
    "bpr, 1 drawn": IdSettings(loss="bpr"),
    "softmax, 16 drawn": IdSettings(loss="softmax", negatives=16),
}


def time_epochs(count: int, left: int, right: int, dim: int, threads: int) -> None:
    """Print how long an epoch takes in each way to learn."""
    rng = np.random.default_rng(0)
    lefts = rng.integers(0, left, count).astype(np.int32)
    rights = (right * rng.random(count) ** 2).astype(np.int32)
    targets = rng.random(count, np.float32)
    few = 1000
    for name, settings in WORKS.items():
        settings = IdSettings(**{**vars(settings), "dim": dim})
        head = parse_heads("dot")
        # A small one first: compilation is no part of an epoch.
        small = IdPairs(lefts[:few], rights[:few], targets[:few], (left, right))
        start_id_learner(small, settings, head, rng, threads).epoch(1.0, rng)
        learner = start_id_learner(
            IdPairs(lefts, rights, targets, (left, right)), settings, head, rng, threads
        )
        begun, used = time.perf_counter(), time.process_time()
        learner.epoch(1.0, rng)
        wall, used = time.perf_counter() - begun, time.process_time() - used
        print(f"{name:20} {wall:7.2f} s, {used:7.2f} processor seconds, {count / wall:.3g} pairs/s")


def split_ratings(ratings: Path, column: str, folder: Path) -> dict[str, Path]:
    """Write the parts of a file of ratings; return their paths by name."""
    with ratings.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    paths = {}
    for part in ("train", "valid", "test"):
        paths[part] = folder / f"{column}_{part}.csv"
        with paths[part].open("w", encoding="utf-8") as out:
            out.write("user_id,item_id,rating\n")
            out.writelines(
                f"{row['user_id']},{row['item_id']},{row['rating']}\n"
                for row in rows
                if row[column] == part
            )
    return paths


def measure_ratings(ratings: Path, columns: list[str], seeds: int, good: float) -> None:
    """Print what default settings reach, for each split and seed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for column in columns:
            paths = split_ratings(ratings, column, folder)
            for seed in range(seeds):
                model = folder / f"{column}_{seed}.h5"
                begun, used = time.perf_counter(), time.process_time()
                id_jobs.train(paths["train"], model, valid=paths["valid"], graded=True, seed=seed)
                wall, used = time.perf_counter() - begun, time.process_time() - used
                found = id_jobs.evaluate(model, paths["test"], good=good, bootstrap=0)
                strange = found.get("entities", {}).get("unknown", {}).get("n_pairs", 0)
                print(
                    f"{column} seed {seed}: RMSE {found['rmse']:.4f}, MAE {found['mae']:.4f}, AUC "
                    f"{found['auc']:.4f} on {found['n_pairs']} ratings, {strange} of unseen ids; "
                    f"trained in {wall:.1f} s, {used:.1f} processor seconds"
                )


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=10_000_000)
    parser.add_argument("--left", type=int, default=1_000_000)
    parser.add_argument("--right", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--threads", type=int, default=thread_count())
    parser.add_argument("--ratings", type=Path)
    parser.add_argument("--split", action="append", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--good", type=float, default=4.0)
    given = parser.parse_args()
    if given.pairs:
        time_epochs(given.pairs, given.left, given.right, given.dim, given.threads)
    if given.ratings is not None:
        measure_ratings(given.ratings, given.split, given.seeds, given.good)


if __name__ == "__main__":
    main()
