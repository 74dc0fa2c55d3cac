"""Every head of the catalogue side by side: quality on test pairs, seconds, columns.

    python benchmarks/heads.py --data FOLDER -o heads.md

FOLDER holds the sets ``amazon-google``, ``words`` and ``stsb``, each with embeddings and the pairs
``pairs_train``, ``pairs_valid`` and ``pairs_test``. Handwritten digits come with scikit-learn and
need no folder. Each head is trained as ``fastpair train --head`` does it, with all else left at its
default; "default" is ``fastpair train`` without a head. Rows are written as they are measured, and
a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import click

DEFAULT = "default"
BASELINES = {"raw_cosine": "raw cosine", "unlabelled_pca": "unlabelled PCA"}
METRICS = {"auc": "AUC", "average_precision": "average precision", "spearman": "Spearman"}


@dataclass(frozen=True)
class Task:
    """One set of embeddings and pairs, and what is measured on it."""

    name: str
    embeddings: Path
    pairs: dict[str, Path]
    metric: str
    options: dict[str, Any] = field(default_factory=dict)


def find_tasks(data: Path | None, scratch: Path) -> Iterator[Task]:
    """Yield the tasks whose files are there."""
    from fastpair.demo import prepare

    files = prepare(scratch)
    digits = {part: files[f"pairs_{part}"] for part in ("train", "valid", "test")}
    yield Task("digits", files["images"], digits, "auc")
    if data is None:
        return

    def task(folder: str, name: str, embeddings: str, pairs: str, metric: str, **options: Any):
        paths = {part: data / folder / pairs.format(part) for part in digits}
        return Task(name, data / folder / embeddings, paths, metric, options)

    amazon = "amazon-google", "amazon-google", "embeddings.h5", "pairs_{}.parquet"
    stsb = "embeddings.h5", "pairs_{}.parquet"
    yield task(*amazon, "average_precision")
    yield task("words", "words", "vectors.npy", "pairs_{}_index.parquet", "average_precision")
    yield task("stsb", "stsb graded", *stsb, "spearman", graded=True)
    yield task("stsb", "stsb good 4", *stsb, "auc", good=4.0)


def measure(task: Task, head: str, seed: int, scratch: Path) -> dict[str, Any]:
    """Train one head on one set; return what came of it."""
    from fastpair import jobs
    from fastpair.files import read_model
    from fastpair.folding import Folder
    from fastpair.ingest import open_embeddings

    path = scratch / "model.h5"
    settings: dict[str, Any] = {"seed": seed, "overwrite": True, **task.options}
    if head != DEFAULT:
        settings["head"] = head
    begun = time.perf_counter()
    trained = jobs.train(
        task.embeddings, task.pairs["train"], path, valid=task.pairs["valid"], **settings
    )
    seconds = time.perf_counter() - begun
    found = jobs.evaluate(path, task.embeddings, task.pairs["test"], bootstrap=0, **task.options)
    model = read_model(path)
    layout = Folder(model, open_embeddings(task.embeddings).shape[1]).plan.layout
    arms = trained["arms"]
    kept = next(arm["arm"] for arm in arms if arm["kept"])
    validation = [arm for arm in arms if arm["arm"] not in BASELINES.values()]
    metric = "spearman" if task.options.get("graded") else "average_precision"
    return {
        "task": task.name,
        "head": head,
        "seed": seed,
        "metric": task.metric,
        "test": found[task.metric],
        **{name: found[name][task.metric] for name in BASELINES},
        "kept": kept,
        "validation_metric": metric,
        "validation": max((arm[metric] for arm in validation), default=None),
        "validation_cosine": next(a[metric] for a in arms if a["arm"] == "raw cosine"),
        "seconds": seconds,
        "columns": sum(layout.segment_lengths.values()),
    }


def tables(rows: list[dict[str, Any]]) -> str:
    """Lay the rows out as Markdown: one table of all heads and sets, then one for each set."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    heads = list(dict.fromkeys(row["head"] for row in rows))
    metric = {row["task"]: row["metric"] for row in rows}
    text = ["| head | " + " | ".join(f"{t}, {METRICS[metric[t]]}" for t in tasks) + " |"]
    text += ["| --- |" + " --- |" * len(tasks)]
    for name, shown in BASELINES.items():
        values = [next(row[name] for row in rows if row["task"] == task) for task in tasks]
        text.append(f"| {shown} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    for head in heads:
        cells = [_cell([r for r in rows if (r["task"], r["head"]) == (t, head)]) for t in tasks]
        text.append(f"| {head} | " + " | ".join(cells) + " |")
    text += ["", "In brackets: validation preferred this to what the head had learned.", ""]
    for task in tasks:
        text += _table_of(task, [row for row in rows if row["task"] == task])
    return "\n".join(text)


def _cell(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    kept = sorted({row["kept"] for row in rows} & set(BASELINES.values()))
    instead = f" ({', '.join(kept)})" if kept else ""
    return f"{mean(row['test'] for row in rows):.3f}{instead}"


def _table_of(task: str, rows: list[dict[str, Any]]) -> list[str]:
    first = rows[0]
    validation = METRICS[first["validation_metric"]]
    text = [
        f"**{task}**: test {METRICS[first['metric']]} of what is returned; validation {validation} "
        f"of what the head learned (raw cosine {first['validation_cosine']:.3f})",
        "",
        "| head | test | kept | validation | seconds | columns |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for head in dict.fromkeys(row["head"] for row in rows):
        own = [row for row in rows if row["head"] == head]
        kept = ", ".join(dict.fromkeys(row["kept"] for row in own))
        learned = [row["validation"] for row in own if row["validation"] is not None]
        validated = f"{mean(learned):.3f}" if learned else ""
        test, seconds = (mean(row[name] for row in own) for name in ("test", "seconds"))
        columns = ", ".join(str(c) for c in dict.fromkeys(row["columns"] for row in own))
        text.append(f"| {head} | {test:.3f} | {kept} | {validated} | {seconds:.1f} | {columns} |")
    return [*text, ""]


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="Folder of the sets.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("heads.md"))
@click.option("--sets", help="Names of sets, joined by commas.  [default: all that are there]")
@click.option("--heads", help="Heads, joined by commas.  [default: the default and every head]")
@click.option("--seeds", default="0", show_default=True, help="Seeds, joined by commas.")
def main(data: Path | None, output: Path, sets: str | None, heads: str | None, seeds: str) -> None:
    """Measure heads on sets; write a table and, beside it, the numbers as lines of JSON."""
    from fastpair.cli import use_wide_matrix_products

    use_wide_matrix_products()
    from fastpair.heads import HEADS

    chosen = heads.split(",") if heads else [DEFAULT, *HEADS]
    log = output.with_suffix(".jsonl")
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(row["task"], row["head"], row["seed"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        for task in find_tasks(data, Path(folder)):
            if sets and task.name not in sets.split(","):
                continue
            for head in chosen:
                for seed in map(int, seeds.split(",")):
                    if (task.name, head, seed) in done:
                        continue
                    row = measure(task, head, seed, Path(folder))
                    rows.append(row)
                    with log.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    output.write_text(tables(rows))
                    click.echo(f"{task.name}, {head}: {row['test']:.3f} in {row['seconds']:.1f} s")


if __name__ == "__main__":
    main()
