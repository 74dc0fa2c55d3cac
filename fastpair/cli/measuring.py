"""`evaluate`, `bench` and `info`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from fastpair.cli.measured import evaluation_lines
from fastpair.cli.shared import (
    BUILTIN_HELP,
    commands,
    dataset_option,
    finish,
    given_options,
    good_option,
    json_option,
    keys_option,
    label_column_option,
    nonfinite_option,
    overwrite_option,
    own_head_option,
    pair_column_options,
    path_type,
    read_options,
    reading_options,
    say,
    spelled,
    threads_option,
)
from fastpair.cli.words import DEVICES, complete_model, completing


@commands.command(epilog=BUILTIN_HELP)
@click.argument("model", shell_complete=complete_model)
@click.argument("files", type=path_type, nargs=-1, metavar="[EMBEDDINGS] PAIRS")
@good_option
@click.option("--graded", is_flag=True, help="Labels are grades.")
@click.option(
    "--train",
    type=path_type,
    metavar="PAIRS",
    help="Pairs that MODEL learned from: entities that are in them are told apart from new ones.",
)
@click.option(
    "--by", multiple=True, metavar="COLUMN", help="Measure each value of this column apart."
)
@click.option(
    "--bootstrap",
    type=click.IntRange(0),
    default=200,
    show_default=True,
    help="Draws for the intervals; 0: no intervals.",
)
@click.option(
    "--properties", is_flag=True, help="Measure symmetry, reflexivity and transitivity too."
)
@click.option(
    "--report", type=path_type, metavar="FILE.html", help="Write a page of all of it, with figures."
)
@click.option(
    "--entities",
    type=path_type,
    metavar="TABLE",
    help="What ids stand for (CSV, Parquet): shown in the report beside the worst mistakes.",
)
@overwrite_option
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all chance.")
@dataset_option
@pair_column_options
@keys_option
@label_column_option
@threads_option
@own_head_option
@nonfinite_option
@reading_options
@json_option
def evaluate(as_json: bool, files: tuple[Path, ...], **options: Any) -> None:
    """Measure a model on labelled PAIRS, through the same kernels that score.

    Beside it stand the raw cosine and an unlabelled PCA. Numbers in brackets hold 95 % of the draws
    of a bootstrap over entities. A model that learned ids has no EMBEDDINGS; beside it stand its
    biases alone.
    """
    if len(files) not in (1, 2):
        raise click.UsageError("give EMBEDDINGS and PAIRS, or PAIRS for a model that learned ids")
    for name in ("entities", "overwrite"):
        if options["report"] is None and name in given_options():
            raise click.UsageError(f"{spelled(name)} goes with --report")
    if len(files) == 1:
        from fastpair import id_jobs

        for name in ("train", "properties", "dataset", "keys", "nonfinite"):
            if name in given_options():
                raise click.UsageError(f"{spelled(name)} goes with EMBEDDINGS alone")
            options.pop(name)
        summary = id_jobs.evaluate(pairs=files[0], reading=read_options(options), **options)
    else:
        from fastpair import jobs

        options["reading"] = read_options(options)
        summary = jobs.evaluate(embeddings=files[0], pairs=files[1], **options)
    if as_json:
        finish(summary, True)
        return
    say(*summary["notes"])
    if "report" in summary:
        say(f"report -> {summary['report']}")
    for line in evaluation_lines(summary):
        click.echo(line)


class PairsOrCount(click.ParamType):
    """A number of random pairs, or a file of pairs."""

    name = "file or count"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> int | Path:
        """Return the number, which is at least 1, or the path."""
        try:
            number = int(value)
        except (TypeError, ValueError):
            return Path(value)
        if number < 1:
            self.fail(f"{number} is not at least 1", parameter, context)
        return number

    def shell_complete(
        self, context: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Complete files."""
        return [CompletionItem(incomplete, type="file")]


@commands.command()
@click.option(
    "--table", type=path_type, metavar="FILE", help="Table to measure.  [default: generated]"
)
@click.option(
    "--entities",
    type=click.IntRange(2),
    default=100_000,
    show_default=True,
    help="Rows of the generated table.",
)
@click.option(
    "--columns", type=click.IntRange(1), default=128, show_default=True, help="Its columns."
)
@click.option(
    "--pairs",
    type=PairsOrCount(),
    default=4_000_000,
    show_default=True,
    metavar="FILE|N",
    help="Pairs of --table, scored as they are read; or how many random pairs, at most.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    help="All of it shall take; rows are shortened to fit.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all chance.")
@threads_option
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="DEVICE",
    shell_complete=completing(DEVICES),
    help="GPU to measure beside the CPU: auto (the first, if there is one), cpu (none), gpu:1.",
)
@click.option(
    "--against",
    type=path_type,
    metavar="JSON",
    help="What an earlier run printed with --json: say what became slower or faster.",
)
@click.option("--plot", type=path_type, metavar="FILE", help="Draw the roofline: .png, .svg, .pdf.")
@overwrite_option
@own_head_option
@click.option(
    "--markdown", is_flag=True, help="Print the figures as the tables of the README, no others."
)
@json_option
def bench(
    as_json: bool,
    markdown: bool,
    against: Path | None,
    plot: Path | None,
    overwrite: bool,
    pairs: int | Path,
    **options: Any,
) -> None:
    """Measure this machine, what fastpair does on it, and that its results are right.

    Rates stand beside what the machine can do at most, measured in the same run. Every backend is
    compared with the float64 reference; the exit code is 1 where one is further from it than
    rounding explains.
    """
    from fastpair.agreement import check_agreement
    from fastpair.bench import bench as measure
    from fastpair.bench_report import print_bench, skipped_lines, steps

    if markdown and (as_json or options["table"] is not None):
        raise click.UsageError("--markdown does not go with --json or --table")
    options |= {"pair_file": pairs} if isinstance(pairs, Path) else {"pairs": pairs}
    earlier = None
    if against is not None:
        from fastpair.planning import read_summary

        earlier = read_summary(against)
    if plot is not None:
        from fastpair.heat_map import check_plot

        given = (against, options["table"], options.get("pair_file"))
        inputs = [path for path in given if path is not None]
        check_plot(plot, overwrite=overwrite, inputs=inputs)
    with steps() as show:
        summary = measure(say=show, **options)
    if earlier is not None:
        from fastpair.bench_against import compare_benches

        summary["against"] = compare_benches(summary, earlier)
    if plot is not None:
        from fastpair.bench_plot import draw_roofline

        draw_roofline(summary, plot)
    if as_json:
        finish(summary, True)
    elif markdown:
        from fastpair.bench_figures import markdown as as_markdown

        click.echo(as_markdown(summary))
        say(*skipped_lines(summary))
    else:
        print_bench(summary)
    check_agreement(summary["agreement"])


@commands.command()
@click.argument("file", type=path_type)
@click.option("--verify", is_flag=True, help="Read everything, and say where it is damaged.")
@json_option
def info(file: Path, verify: bool, as_json: bool) -> None:
    """Say what FILE is and whether it is whole; with --verify, exit with 1 if it is not."""
    from fastpair import jobs
    from fastpair.errors import FileError

    summary = jobs.info(file, verify=verify)
    if as_json:
        finish(summary, True)
    else:
        click.echo(f"{file}: {summary['summary']}")
        for name, entry in summary["datasets"].items():
            shape = " x ".join(map(str, entry["shape"])) or "one value"
            click.echo(f"  {name:<16} {shape:<20} {entry['dtype']}")
        for name, value in summary["attributes"].items():
            if not isinstance(value, dict | list):
                click.echo(f"  {name.replace('_', ' ')}: {value}")
    if not verify:
        return
    damaged = summary.get("damaged", [])
    if damaged:
        more = f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise FileError(f"{file} is damaged: {damaged[0]['sentence']}{more}; make it again.")
    checked = ", ".join(summary.get("checked", [])) or "nothing in it has a checksum"
    say(f"all of it was read; compared with checksums: {checked}")
