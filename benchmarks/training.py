"""Training beside torch: the same model, batches, loss, optimiser and epochs, in one run.

    python benchmarks/training.py --data FOLDER [--threads 1] [--rounds 5] [--json]

FOLDER holds ``amazon-google``. The model is that of arm A: a cosine and an absolute difference,
each over a projection of its own, density, cross-entropy and ranking, Adam with the projections
pulled back to their start. Both learn from the same start and the same batches; that they learn
the same thing is checked by their losses. Rounds take turns, and the matrix rate of the machine is
measured between them. Torch comes from elsewhere: ``pip install torch``.

GFLOP/s are those of the matrix products that learning needs, forward and by the weights, over all
the time that it takes.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from threadpoolctl import threadpool_limits

from fastpair.arms import ARMS, Task, start_learner
from fastpair.learner import Learner, Pairs

BATCH = 256
SETTINGS = {
    "seed": 0,
    "batch": BATCH,
    "graded": False,
    "asymmetric": False,
    "reflexive": 0.0,
    "consistency": 1.0,
}


@dataclass(frozen=True)
class Course:
    """What is learned from: the data, where learning starts, and the batches of every epoch."""

    learner: Learner
    batches: list[list[np.ndarray]]

    @property
    def gflop(self) -> float:
        """Matrix products of all epochs, each distinct row of a batch projected once."""
        pairs, weights = self.learner.pairs, 0
        for branch in self.learner.score.branches:
            weights += branch.tower.parameters["projection"].size
        rows = sum(
            len(np.unique(np.concatenate([pairs.left[chosen], pairs.right[chosen]])))
            for epoch in self.batches
            for chosen in epoch
        )
        return 2 * 2 * rows * weights / 1e9


def make_course(folder: Path, epochs: int) -> Course:
    """Read the pairs, start a learner and deal the batches."""
    import h5py
    import pyarrow.csv

    with h5py.File(folder / "embeddings.h5") as file:
        embeddings = file["embeddings"][:]
        number = {key.decode(): row for row, key in enumerate(file["ids"][:])}

    def read(part: str) -> Pairs:
        table = pyarrow.csv.read_csv(folder / f"pairs_{part}.csv").to_pydict()
        left, right = (np.array([number[key] for key in table[s]]) for s in ("id_a", "id_b"))
        return Pairs(left, right, np.array(table["label"], float))

    with threadpool_limits(1, "blas"):
        task = Task(embeddings, read("train"), read("valid"), SETTINGS)
        learner = start_learner(ARMS["A"], task, np.random.default_rng(0))
    rng = np.random.default_rng(1)
    return Course(learner, [learner._batches(BATCH, rng) for _ in range(epochs)])


def learn_ours(course: Course, threads: int) -> tuple[float, list[float]]:
    """Learn all epochs; return the seconds and the mean loss of each."""
    learner, rng = copy.deepcopy(course.learner), np.random.default_rng(1)
    losses = []
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
        learner.score.pool = pool if threads > 1 else None
        begun = time.perf_counter()
        for _ in course.batches:
            losses.append(learner.epoch(len(course.batches), BATCH, rng))
        return time.perf_counter() - begun, losses


def learn_in_torch(course: Course, threads: int) -> tuple[float, list[float]]:
    """Do the same in torch: autograd, fused Adam, each distinct row of a batch projected once."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits, normalize, softplus

    torch.set_num_threads(threads)
    learner = course.learner
    start = {
        key: torch.from_numpy(value.copy()).requires_grad_()
        for key, value in learner.parameters.items()
    }
    constant, weights = start[-1, "constant"], start[-1, "density"]
    first, second = start[0, "tower.projection"], start[1, "tower.projection"]
    scale, slopes = start[0, "scale"], start[1, "weight"]
    anchor = first.detach().clone()
    groups = [{"params": [value], "lr": learner._rate(key, value)} for key, value in start.items()]
    heights = [group["lr"] for group in groups]
    adam = torch.optim.Adam(groups, fused=True)
    rows, density = (torch.from_numpy(a) for a in (learner.rows._kept, learner.density))
    sides = [
        torch.from_numpy(s.astype(np.int64)) for s in (learner.pairs.left, learner.pairs.right)
    ]
    targets = torch.from_numpy(learner.targets)
    steps, done, losses = sum(map(len, course.batches)), 0, []
    begun = time.perf_counter()
    for epoch in course.batches:
        found = []
        for chosen in map(torch.from_numpy, epoch):
            left, right = sides[0][chosen], sides[1][chosen]
            used, numbers = torch.unique(torch.cat([left, right]), return_inverse=True)
            i, j = numbers[: len(left)], numbers[len(left) :]
            x = rows[used]
            unit, z = normalize(x @ first.T), x @ second.T
            cosine = (unit.index_select(0, i) * unit.index_select(0, j)).sum(1)
            apart = (z.index_select(0, i) - z.index_select(0, j)).abs()
            raw = constant + scale * cosine + apart @ slopes
            raw = raw + (density[left] + density[right]) @ weights
            target = targets[chosen]
            good = target > 0
            behind = raw[~good] - raw[good][:, None]
            loss = binary_cross_entropy_with_logits(raw, target) + softplus(behind).mean()
            adam.zero_grad()
            loss.backward()
            height = 0.5 * (1 + np.cos(np.pi * done / steps))
            small = 1e-8 / (1 - 0.999 ** (done + 1)) ** 0.5  # added to the root as it is, as we do
            for group, full in zip(adam.param_groups, heights, strict=True):
                group["lr"], group["eps"] = full * height, small
            adam.step()
            with torch.no_grad():
                first.lerp_(anchor, min(learner.rates.towers * learner.rates.pull * height, 1))
            done += 1
            found.append(loss.detach())
        losses.append(float(torch.stack(found).mean()))
    return time.perf_counter() - begun, losses


def matrix_rate(threads: int, size: int = 1024) -> float:
    """Return GFLOP/s of NumPy's float32 matrix product, the best of a few."""
    a, b = np.random.default_rng(0).random((2, size, size), np.float32)
    out, seconds = np.empty_like(a), []
    with threadpool_limits(threads, "blas"):
        for _ in range(8):
            begun = time.perf_counter()
            np.matmul(a, b, out=out)
            seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / min(seconds) / 1e9


def compare(course: Course, threads: int, rounds: int) -> dict[str, Any]:
    """Let both learn in turns; return medians, rates and how far their losses are apart."""
    learners: dict[str, Callable[[Course, int], tuple[float, list[float]]]] = {
        "fastpair": learn_ours,
        "torch": learn_in_torch,
    }
    short = Course(course.learner, course.batches[:1])
    for learn in learners.values():
        learn(short, threads)
    seconds: dict[str, list[float]] = {name: [] for name in learners}
    losses, rates = {}, []
    for _ in range(rounds):
        rates.append(matrix_rate(threads))
        for name, learn in learners.items():
            taken, losses[name] = learn(course, threads)
            seconds[name].append(taken)
    rate = median(rates)
    medians = {name: median(taken) for name, taken in seconds.items()}
    ours, theirs = (np.array(losses[name]) for name in learners)
    return {
        "threads": threads,
        "seconds": seconds,
        "median seconds": medians,
        "times torch": medians["torch"] / medians["fastpair"],
        "GFLOP/s": {name: course.gflop / taken for name, taken in medians.items()},
        "SGEMM GFLOP/s": rate,
        "share of SGEMM": {name: course.gflop / t / rate for name, t in medians.items()},
        "losses": losses,
        "losses apart at most": float(np.abs(ours / theirs - 1).max()),
    }


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--threads", type=click.IntRange(1), multiple=True, default=(1, 2), show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--epochs", type=click.IntRange(1), default=8, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(data: Path, threads: tuple[int, ...], rounds: int, epochs: int, as_json: bool) -> None:
    """Measure and print."""
    course = make_course(data / "amazon-google", epochs)
    found = [compare(course, count, rounds) for count in threads]
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    steps = sum(map(len, course.batches))
    click.echo(f"{epochs} epochs, {steps} steps of {BATCH} pairs, {course.gflop:.0f} GFLOP")
    click.echo("threads  what      seconds  ms a step  GFLOP/s  share of SGEMM  times torch")
    for entry in found:
        for name, taken in entry["median seconds"].items():
            ratio = f"{entry['times torch']:.2f}" if name == "fastpair" else ""
            click.echo(
                f"{entry['threads']:7}  {name:8}  {taken:7.2f}  {1e3 * taken / steps:9.2f}  "
                f"{entry['GFLOP/s'][name]:7.0f}  {entry['share of SGEMM'][name]:14.0%}  {ratio}"
            )
        click.echo(
            f"         SGEMM {entry['SGEMM GFLOP/s']:.0f} GFLOP/s; losses of the epochs differ "
            f"by {entry['losses apart at most']:.1e} of themselves at most"
        )


if __name__ == "__main__":
    main()
