"""`demo` and `train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from fastpair.cli.ending import GOES_ON, interrupted_code, stop
from fastpair.cli.measured import history_lines, metric_lines
from fastpair.cli.shared import (
    Meter,
    Summary,
    commands,
    dataset_option,
    finish,
    given_options,
    good_option,
    json_option,
    keys_option,
    label_column_option,
    nonfinite_option,
    output_option,
    overwrite_option,
    pair_column_options,
    path_type,
    read_options,
    reading_options,
    say,
    spelled,
    threads_option,
)
from fastpair.cli.words import (
    CALIBRATIONS,
    GOALS,
    HEADS,
    LOSSES,
    PREPARATIONS,
    STARTS,
    TOWERS,
    completing,
)
from fastpair.wording import METRICS


@commands.command()
@click.option(
    "--folder",
    type=path_type,
    default="fastpair-demo",
    show_default=True,
    help="Where the files go.",
)
@threads_option
def demo(folder: Path, threads: int | None) -> None:
    """Learn, score and search on real data that comes with a dependency: handwritten digits."""
    from fastpair.demo import run_demo

    run_demo(folder, threads=threads)


IDS_TOO = {
    *("output", "valid", "good", "graded", "head", "dim", "loss", "epochs", "batch", "seed"),
    *("learning_rate", "calibrate", "threshold_by", "prior", "left_column", "right_column"),
    *("label_column", "log", "threads", "overwrite", "as_json"),
    *("separator", "header", "follow_links"),
}
"""Options of `train` that are also there with --ids."""

IDS_ALONE = {"ids", "two_tables", "weight_decay", "negatives", "implicit", "biases"}
"""Options of `train` that are there with --ids alone."""


@commands.command()
@click.argument("embeddings", type=path_type, required=False)
@click.argument("pairs", type=path_type, required=False)
@output_option
@click.option(
    "--ids",
    type=path_type,
    metavar="PAIRS",
    help="Learn a table of the ids in PAIRS, in the place of EMBEDDINGS PAIRS.",
)
@click.option(
    "--two-tables/--one-table",
    default=None,
    help="Left and right ids are of two kinds, or of one.  [default: as columns and ids say]",
)
@click.option(
    "--weight-decay", type=click.FloatRange(0), help="Of the vectors of a pair, with --ids."
)
@click.option(
    "--negatives", type=click.IntRange(1), help="Drawn for each good pair, with bpr and softmax."
)
@click.option(
    "--implicit/--no-implicit",
    default=None,
    help="With --ids: which right ids a left one has says something about it, whatever the label.",
)
@click.option("--biases/--no-biases", default=None, help="A bias for each id, with --ids.")
@click.option(
    "--valid", type=path_type, metavar="PAIRS", help="Validation pairs; else some are kept."
)
@click.option("--graded", is_flag=True, help="Learn the grade itself, not good or bad.")
@good_option
@click.option("--arms", metavar="A,B,D", help="Which of the arms to try.  [default: all]")
@click.option(
    "--head",
    shell_complete=completing(HEADS, "+"),
    help="Heads joined by +, such as cosine+absdiff, or module:Class.  [default: arms]",
)
@click.option(
    "--tower",
    shell_complete=completing(TOWERS),
    help="What each embedding goes through: identity, linear or mlp, with options in brackets if "
    'wanted: "linear(bias=1,normalise=1)", "mlp(hidden=128x64,activation=gelu,residual=0)"; '
    "activation is relu, tanh or gelu; normalise=1 brings outputs to length 1.",
)
@click.option(
    "--start",
    shell_complete=completing(STARTS),
    help="Where a linear tower starts: identity, pca or random.",
)
@click.option("--dim", type=click.IntRange(1), help="Columns of the towers.  [default: all]")
@click.option(
    "--preparation",
    shell_complete=completing(PREPARATIONS),
    help="none, centre, half-whitening or scaling.",
)
@click.option(
    "--density/--no-density", default=None, help="Use how close an entity's nearest others are."
)
@click.option(
    "--loss",
    shell_complete=completing(LOSSES, "+"),
    help="cross-entropy, ranking, contrastive, triplet, squared or correlation, joined by +, each "
    "with a number after a colon if wanted; or sampled: good pairs alone, bad ones are sampled. "
    "With --ids cross-entropy, squared, or of good pairs alone bpr or softmax.",
)
@click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), help="Of the input.")
@click.option("--pull", type=click.FloatRange(0), help="Of projections back to their start.")
@click.option("--balance", is_flag=True, help="Good and bad pairs count the same in all.")
@click.option(
    "--reflexive",
    type=click.FloatRange(0),
    metavar="WEIGHT",
    help="Penalty where others score higher than oneself.",
)
@click.option(
    "--transitive",
    type=click.FloatRange(0),
    metavar="WEIGHT",
    help="Penalty where x and z score lower than both with a y that they are good pairs with.",
)
@click.option(
    "--close-positives", is_flag=True, help="Add the good pairs that chains of good pairs imply."
)
@click.option(
    "--apart",
    type=path_type,
    metavar="PAIRS",
    help="Test pairs that --close-positives must not add.",
)
@click.option(
    "--consistency",
    type=click.FloatRange(0),
    metavar="WEIGHT",
    help="Of the two orders of the head concat.  [default: 1]",
)
@click.option("--weight", "weight_column", metavar="COLUMN", help="How much each pair counts.")
@click.option(
    "--asymmetric", is_flag=True, help="Another tower for left than for right: no longer symmetric."
)
@click.option(
    "--calibrate",
    shell_complete=completing(CALIBRATIONS),
    help="platt, isotonic or temperature.  [default: platt]",
)
@click.option(
    "--threshold-by",
    shell_complete=completing(GOALS),
    help="f1, f0.5, accuracy, precision=0.9 or recall=0.9.  [default: f1]",
)
@click.option("--prior", type=float, metavar="SHARE", help="Of good pairs among those to score.")
@click.option("--epochs", type=click.IntRange(1), help="Passes over the pairs, at most.")
@click.option("--batch", type=click.IntRange(2), help="Pairs in a step.  [default: 256]")
@click.option(
    "--learning-rate", type=click.FloatRange(0, min_open=True), help="Height of the rate."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all chance.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted training stopped.")
@click.option("--log", type=path_type, metavar="FILE", help="One line of JSON an epoch.")
@dataset_option
@pair_column_options
@keys_option
@label_column_option
@threads_option
@overwrite_option
@nonfinite_option
@reading_options
@json_option
def train(as_json: bool, output: Path, **options: Any) -> None:
    """Learn a similarity from labelled PAIRS of EMBEDDINGS, which stay as they are.

    Labels are 0 and 1 (or bad and good, no and yes, false and true); graded labels need --good X
    or --graded. A few arms, each one set of options, learn from the same pairs, and the one that
    ranks validation pairs best is kept. Options replace those of every arm.

    With --ids there are no embeddings: a vector and a bias are learned for each id, from labels,
    from grades (--graded), or from good pairs alone (no column of labels).
    """
    from fastpair import jobs
    from fastpair.checkpoints import SUFFIX

    given = given_options()
    if options["ids"] is not None:
        _train_ids(as_json, output, given, options)
        return
    if options["pairs"] is None:
        raise click.UsageError("give EMBEDDINGS and PAIRS, or --ids PAIRS")
    for name in sorted(given & IDS_ALONE):
        raise click.UsageError(f"{spelled(name)} goes with --ids alone")
    options = {name: value for name, value in options.items() if name not in IDS_ALONE}
    if options["asymmetric"]:
        say("--asymmetric: if learning helps, the score of (a, b) will NOT be that of (b, a)")
    options["reading"] = read_options(options)
    with Meter("epochs") as meter:

        def on_epoch(entry: Summary) -> None:
            meter.expect(meter.done + 1 + entry["epochs_left"])
            meter(1)

        def on_estimate(seconds: float) -> None:
            if seconds >= 2:
                say(f"learning will take about {seconds:.0f} s")

        reports: Summary = {"on_estimate": on_estimate, "on_epoch": on_epoch}
        try:
            summary = jobs.train(output=output, **reports, **options)
        except KeyboardInterrupt:
            state = output.with_name(output.name + SUFFIX)
            stop("interrupted" + (GOES_ON if state.exists() else ""), interrupted_code())
    if not as_json and summary["arms"]:
        _show_arms(summary["arms"])
        kept = next(arm for arm in summary["arms"] if arm["kept"])
        _show_history(summary["history"], next(iter(summary["validation"])), kept["arm"])
    finish(
        summary,
        as_json,
        f"trained on {summary['n_pairs']} pairs in {summary['seconds']:.1f} s -> {output}",
        *metric_lines(summary["validation"], "on the validation pairs"),
    )


def _train_ids(as_json: bool, output: Path, given: set[str], options: Summary) -> None:
    """Learn tables of ids; refuse options that have no meaning for them."""
    from fastpair import id_jobs

    if options["embeddings"] is not None:
        raise click.UsageError("--ids PAIRS stands in the place of EMBEDDINGS PAIRS: give no more")
    for name in sorted(given - IDS_TOO - IDS_ALONE):
        raise click.UsageError(f"{spelled(name)} has no meaning with --ids")
    pairs, reading = options["ids"], read_options(options)
    renamed = {"learning_rate": "rate", "weight_decay": "decay"}
    settings = {
        renamed.get(name, name): value
        for name, value in options.items()
        if name in (IDS_TOO | IDS_ALONE) - {"ids"}
    }
    settings["reading"] = reading
    with Meter("epochs") as meter:

        def on_epoch(entry: Summary) -> None:
            meter.expect(meter.done + 1 + entry["epochs_left"])
            meter(1)

        summary = id_jobs.train(pairs, output, on_epoch=on_epoch, **settings)
    if not as_json:
        _show_history(summary["history"], next(iter(summary["validation"])))
    metrics = ", ".join(f"{_metric_name(k)} {v:.4f}" for k, v in summary["validation"].items())
    finish(
        summary,
        as_json,
        f"trained on {summary['n_pairs']} pairs in {summary['seconds']:.1f} s -> {output}",
        f"on the validation pairs: {metrics}",
        f"scores are of the unit {summary['unit']}: {summary['meaning']}",
    )


def _metric_name(key: str) -> str:
    return METRICS.get(key, key)


def _show_history(history: list[Summary], metric: str, arm: str | None = None) -> None:
    """Draw how learning went, where somebody looks on."""
    if sys.stderr.isatty():
        say(*history_lines(history, metric, arm))


def _show_arms(arms: list[Summary]) -> None:
    """Print what each arm reached on the validation pairs as a table on standard error."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    metric = "spearman" if "spearman" in arms[0] else "average_precision"
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("", f"{metric.replace('_', ' ')}, validation", "best epoch", "seconds", ""):
        table.add_column(title, justify="left" if not title else "right")
    for arm in arms:
        epoch = f"{arm['epoch']} of {arm['epochs']}" if "epoch" in arm else ""
        seconds = f"{arm['seconds']:.1f}" if "seconds" in arm else ""
        kept = "kept" if arm["kept"] else ""
        table.add_row(arm["arm"], f"{arm[metric]:.4f}", epoch, seconds, kept)
    Console(stderr=True, width=None if sys.stderr.isatty() else 100).print(table)
