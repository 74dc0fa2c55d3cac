"""`plan`."""

from __future__ import annotations

from typing import Any

import click

from fastpair.cli.shared import (
    Summary,
    commands,
    finish,
    given_options,
    json_option,
    memory_option,
    options_together,
    path_type,
    short,
)


class Count(click.ParamType):
    """A whole number that may be written as 1e9."""

    name = "count"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> int:
        """Return the number; less than 1 and fractions are refused."""
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is no number", parameter, context)
        if not 1 <= number <= 1e18 or number != int(number):
            self.fail(f"{value!r} is no whole number from 1 to 1e18", parameter, context)
        return int(number)


_rates = options_together(
    click.option(
        "--rates",
        type=path_type,
        metavar="JSON",
        help="What fastpair bench --json printed, on a machine like a worker.",
    ),
    click.option(
        "--run",
        "runs",
        type=path_type,
        multiple=True,
        metavar="JSON",
        help="What score or matrix printed with --json, of two sizes at least; repeat it.",
    ),
    click.option("--pairs-per-second", type=float, metavar="X", help="Of one worker, if known."),
    click.option("--read", metavar="SIZE/S", help="A worker's disk, such as 2GB/s."),
    click.option("--write", metavar="SIZE/S", help="Likewise."),
    click.option("--network", metavar="SIZE/S", help="A worker's link to the shared storage."),
    click.option("--storage", metavar="SIZE/S", help="What the storage gives to all together."),
)


@commands.command()
@click.option("--entities", type=Count(), required=True, help="Rows of the table, such as 1e9.")
@click.option("--against", type=Count(), help="Rows of another table, if there is one.")
@click.option("--columns", type=click.IntRange(1), default=128, show_default=True)
@click.option(
    "--precision",
    type=click.Choice(["float32", "float16", "bfloat16", "int8"]),
    default="float32",
    show_default=True,
)
@click.option("--row-bytes", type=click.IntRange(64), help="Of a row, where --columns is too few.")
@click.option("--pairs", type=Count(), help="Pairs of a file to score, such as 1e12.")
@click.option("--top-k", type=click.IntRange(1), metavar="K", help="All pairs: the K best a row.")
@click.option("--threshold", is_flag=True, help="All pairs: those above a threshold.")
@click.option(
    "--kept", type=click.FloatRange(0, 1), default=1e-4, show_default=True, help="Share of those."
)
@click.option("--dense", is_flag=True, help="All pairs: every score.")
@click.option("--histogram", is_flag=True, help="All pairs: how many score how much.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True)
@memory_option
@_rates
@json_option
def plan(as_json: bool, **options: Any) -> None:
    """Say what a run will cost: bytes, memory, hours, and what binds it.

    Choose one of --pairs, --top-k, --threshold, --dense and --histogram. Rates come from --rates,
    from real runs (--run), or from --pairs-per-second; single ones replace those. --memory is what
    each worker has.
    """
    from fastpair.planning import Job, price

    works = {
        "score": options["pairs"] is not None,
        "top-k": options["top_k"] is not None,
        **{name: options[name] for name in ("threshold", "dense", "histogram")},
    }
    if sum(works.values()) != 1:
        raise click.UsageError(
            "choose one of --pairs, --top-k, --threshold, --dense and --histogram"
        )
    if "kept" in given_options() and not options["threshold"]:
        raise click.UsageError("--kept goes with --threshold")
    if {"columns", "row_bytes"} <= given_options():
        raise click.UsageError("choose one of --columns and --row-bytes")
    job = Job(
        work=next(name for name, chosen in works.items() if chosen),
        entities=options["entities"],
        others=options["against"],
        row_bytes=_row_bytes(options),
        pairs=options["pairs"],
        k=options["top_k"] or 10,
        kept=options["kept"],
        workers=options["workers"],
        memory=_memory(options["memory"]),
    )
    summary = price(job, _rates_of(options, job))
    if as_json:
        finish(summary, True)
    else:
        print_plan(summary, options["memory"])


def _row_bytes(options: Summary) -> int:
    from fastpair.planning import row_bytes_of

    return options["row_bytes"] or row_bytes_of(options["columns"], options["precision"])


def _memory(given: str | None) -> int | None:
    from fastpair.backend import memory_budget

    return None if given is None else memory_budget(given)


def _rates_of(options: Summary, job: Any) -> Any:
    """Take the rates from what was measured, and the given ones in their place."""
    from dataclasses import replace

    from fastpair.planning import Rates, parse_rate, rates_of_bench, rates_of_runs, read_summary

    given: Summary = {
        name: parse_rate(options[name], f"--{name}")
        for name in ("read", "write", "network", "storage")
        if options[name] is not None
    }
    if options["pairs_per_second"] is not None:
        given["pairs_per_second"] = options["pairs_per_second"]
    rates, runs = options["rates"], options["runs"]
    if rates is not None and runs:
        raise click.UsageError("choose one of --rates and --run")
    if rates is not None:
        return replace(rates_of_bench(read_summary(rates), job, options["precision"]), **given)
    if runs:
        summaries = [read_summary(path) for path in runs]
        return replace(rates_of_runs(summaries, job), **given)
    if "pairs_per_second" not in given:
        raise click.UsageError(
            "give rates: --rates with what fastpair bench --json printed, --run with what two runs "
            "printed, or --pairs-per-second"
        )
    return Rates(**given)


def print_plan(summary: Summary, memory: str | None) -> None:
    """Print what `planning.price` returned as a table and a few sentences."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for title, side in (("", "left"), ("time", "right"), ("of the run", "right")):
        table.add_column(title, justify=side)  # type: ignore[arg-type]
    for name, seconds in summary["stages"].items():
        table.add_row(name, _time(seconds), f"{seconds / max(summary['seconds'], 1e-9):.0%}")
    side_by_side = {n: s for n, s in summary["pairs"].items() if n not in summary["stages"]}
    for name, seconds in side_by_side.items():
        table.add_row(f"  beside it, {name}", _time(seconds), "")
    console = Console(highlight=False)
    console.print(table)
    moved = summary["bytes"]
    workers = "one worker" if summary["workers"] == 1 else f"{summary['workers']} workers"
    lines = [
        f"{short(summary['scored'])}pairs on {workers}: {_time(summary['seconds'])}, "
        f"bound by {summary['binds']}",
        f"tables {_bytes(moved['tables'])}; read in all {_bytes(moved['read'])}, written "
        f"{_bytes(moved['written'])}",
        f"each worker needs {_bytes(summary['memory'])} of memory"
        + (
            ""
            if summary["fits"]
            else f", more than the {memory} that it has: it reads the tables by blocks, "
            f"{summary['passes']:.3g} times"
        ),
    ]
    for line in [*lines, *summary["notes"]]:
        console.print(line, markup=False, soft_wrap=True)


def _time(seconds: float) -> str:
    for unit, size in (("years", 365.25 * 86400), ("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.3g} {unit}"
    return f"{seconds:.3g} s"


def _bytes(size: float) -> str:
    for unit, scale in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20)):
        if size >= scale:
            return f"{size / scale:,.3g} {unit}"
    return f"{size / 1024:.3g} KiB"
