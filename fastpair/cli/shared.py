"""What commands share: the group, options, progress, how results are printed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from fastpair.cli.examples import Commands
from fastpair.cli.words import DEVICES, completing

BUILTIN_HELP = "MODEL is a model file or one of cosine, dot, euclidean, manhattan."

Summary = dict[str, Any]


class Meter:
    """Shows progress on a terminal once a command takes longer than a second.

    Call it with numbers of pairs (or rows) done. `total` may be set late.
    """

    def __init__(self, unit: str, total: int | None = None) -> None:
        self.unit, self.total, self.done = unit, total, 0
        self._begun = time.monotonic()
        self._bar: Any = None

    def __call__(self, done: int) -> None:
        """Count `done` more."""
        self.done += done
        if self._bar is None and sys.stderr.isatty() and time.monotonic() - self._begun > 1:
            self._start()
        if self._bar is not None:
            rate = self.done / (time.monotonic() - self._begun)
            self._bar.update(0, completed=self.done, total=self.total, rate=short(rate))

    def expect(self, total: int | None) -> None:
        """Set how much there is to do."""
        self.total = total

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
        from rich.progress import TimeRemainingColumn as TimeLeft

        self._bar = Progress(
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]} " + self.unit + "/s"),
            TimeLeft(),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar.add_task(self.unit, total=self.total, rate="")
        self._bar.start()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def short(number: float) -> str:
    """Write a number with three digits and a letter for its size."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g} "


def say(*lines: str) -> None:
    """Print lines on standard error."""
    for line in lines:
        click.echo(line, err=True)


def finish(summary: Summary, as_json: bool, *lines: str) -> None:
    """Print the summary as JSON on standard output, or words on standard error."""
    if as_json:
        click.echo(json.dumps(summary, indent=2, allow_nan=False))
    else:
        say(*summary.get("notes", []), *lines)


Command = Callable[..., Any]


def options_together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Make one decorator of several options."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


path_type = click.Path(path_type=Path)

output_option = click.option("-o", "--output", type=path_type, required=True, help="File to write.")

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON on standard output."
)

compression_option = click.option(
    "--compression",
    type=click.Choice(["gzip", "lzf", "zstd", "lz4", "blosc2", "bitshuffle"]),
    help="Compress an HDF5 output.",
)

resume_option = click.option(
    "--resume", is_flag=True, help="Go on where an interrupted run stopped."
)

overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace the output if it exists."
)

threads_option = click.option(
    "--threads", type=click.IntRange(1), help="Threads to use.  [default: all processors]"
)

memory_option = click.option(
    "--memory", metavar="SIZE", help="Memory to use, such as 2GiB.  [default: 80 % of what is free]"
)

plan_option = click.option(
    "--plan", is_flag=True, help="Print what would be read, written and held, and do nothing."
)


def without_cluster(options: dict[str, Any]) -> None:
    """Take the options of `cluster_options` out of those of a command; refuse them."""
    for name in ("scheduler", "workers", "consolidate"):
        if options.pop(name):
            raise click.UsageError(f"--{name} does not go with --plan")


def show_plan(plan: Summary, as_json: bool) -> None:
    """Print what a run would do; see docs/scaling.md."""
    if as_json:
        finish(plan, True)
        return
    click.echo(f"{plan['pairs']} pairs of tables of {size(plan['table_bytes'])}")
    if plan["in_memory"]:
        click.echo(f"memory: the tables fit into {size(plan['memory'])}, they are read once")
    else:
        click.echo(
            f"memory: {size(plan['memory'])} hold one of {plan['blocks']} blocks of rows, past "
            f"which {plan['chunks']} chunks are read; tables are read {plan['passes']} times"
        )
    parts = [("tables", "table_bytes_read"), ("pairs", "pair_bytes_read")]
    parts += [("pairs by block", "sorting_bytes_read")]
    shown = ", ".join(f"{size(plan[name])} of {what}" for what, name in parts if plan.get(name))
    click.echo(f"reads: at most {size(plan['bytes_read'])}: {shown}")
    if "bytes_written" in plan:
        click.echo(f"writes: {size(plan['bytes_written'])}; disk needed: {size(plan['disk'])}")


def size(count: int) -> str:
    """Return a number of bytes as people read it: 1.5 GiB."""
    value, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "bytes" else f"{value:.1f} {units[0]}"


device_options = options_together(
    click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="DEVICE",
        shell_complete=completing(DEVICES),
        help="auto, cpu, gpu (all that are there), gpu:1 or gpu:0,1.",
    ),
    click.option(
        "--device-memory",
        metavar="SIZE",
        help="Memory to use on each GPU, such as 8GiB.  [default: 90 % of what is free there]",
    ),
)

worker_options = options_together(
    click.option(
        "--scheduler",
        metavar="ADDRESS",
        help="Run on the Dask cluster of this scheduler, such as tcp://host:8786.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(1),
        metavar="N",
        help="Run in N processes on this machine, which share --threads and --memory.",
    ),
)

cluster_options = options_together(
    worker_options,
    click.option(
        "--consolidate",
        is_flag=True,
        help="On a cluster: write one file, as without a cluster, and no file over parts.",
    ),
)


def on_cluster(options: dict[str, Any]) -> Any:
    """Take the options of `worker_options` out of those of a command.

    Returns
    -------
    context : a ``with`` statement that gives what the command's function takes for `cluster`.
    """
    scheduler, workers = options.pop("scheduler"), options.pop("workers")
    if (scheduler, workers) == (None, None):
        if options.get("consolidate"):
            raise click.UsageError("--consolidate goes with --scheduler or --workers")
        return nullcontext()
    from fastpair.distributed import connected

    shared: dict[str, Any] = {}
    if workers is not None:  # they share what is allowed; those of a scheduler have it each
        shared = {name: options[name] for name in ("threads", "memory") if name in options}
        options.update(dict.fromkeys(shared))
    return connected(scheduler, workers, device=options.get("device", "auto"), **shared)


def _import_own_head(
    _context: click.Context, _parameter: click.Parameter, name: str | None
) -> None:
    if name is not None:
        from fastpair.heads import import_head

        import_head(name)


own_head_option = click.option(
    "--head",
    metavar="MODULE:CLASS",
    callback=_import_own_head,
    expose_value=False,
    help="Your own head that the model was trained with; its module is imported.",
)

dataset_option = click.option(
    "--dataset", metavar="NAME", help="Name of the embeddings inside an HDF5 or npz file."
)

good_option = click.option(
    "--good", type=float, metavar="X", help="A label of X or more is a good pair, others are bad."
)

pair_column_options = options_together(
    click.option("--left", "left_column", metavar="COLUMN", help="Column of the left entities."),
    click.option("--right", "right_column", metavar="COLUMN", help="Column of the right entities."),
)

keys_option = click.option(
    "--keys",
    type=click.Choice(["auto", "rows", "ids"]),
    default="auto",
    show_default=True,
    help="Whether pairs name entities by row number or by id.",
)

reading_options = options_together(
    click.option(
        "--separator",
        metavar="CHARACTER",
        help="Between the fields of a text file, such as ';', tab or space.  [default: found]",
    ),
    click.option(
        "--header/--no-header",
        default=None,
        help="Whether the first line of a text file names its columns.  [default: found]",
    ),
    click.option(
        "--follow-links", is_flag=True, help="Read data of HDF5 that lie in other files too."
    ),
)

nonfinite_option = click.option(
    "--nonfinite",
    type=click.Choice(["refuse", "nan"]),
    default="refuse",
    show_default=True,
    help="Refuse embeddings that are not finite, or keep them apart: they score NaN.",
)


def read_options(options: dict[str, Any]) -> Any:
    """Take the options of `reading_options` out of those of a command."""
    from fastpair.formats import ReadOptions

    return ReadOptions(options.pop("separator"), options.pop("header"), options.pop("follow_links"))


label_column_option = click.option(
    "--label", "label_column", metavar="COLUMN", help="Column of labels."
)


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="fastpair", prog_name="fastpair")
def commands() -> None:
    """Learn how similar two things are from good and bad pairs, then score pairs by the million.

    \b
    A first look:         fastpair demo
    Learn a similarity:   fastpair train embeddings.h5 pairs.csv -o model.h5
    See how good it is:   fastpair evaluate model.h5 embeddings.h5 test.csv
    Fold the embeddings:  fastpair project model.h5 embeddings.h5 -o table.h5
    Score a pair file:    fastpair score table.h5 pairs.csv -o scores.csv
    Best 10 of everyone:  fastpair matrix table.h5 --top-k 10 -o best.h5
    Features for others:  fastpair features model.h5 e.h5 pairs.csv -o features.h5
    How fast, here:       fastpair bench

    Embeddings and pairs are read from CSV, TSV, Parquet, Arrow, npy, npz, HDF5 and more
    (docs/formats.md); - is standard input. Wherever a model is asked for, cosine, dot, euclidean or
    manhattan may stand instead. `fastpair COMMAND --help` ends with examples.
    """  # noqa: D301


def given_options() -> set[str]:
    """Return the names of the options that were given on the command line."""
    context = click.get_current_context()
    command_line = click.core.ParameterSource.COMMANDLINE
    return {n for n in context.params if context.get_parameter_source(n) is command_line}


def spelled(name: str) -> str:
    """Return how the option of this name is written."""
    parameters = click.get_current_context().command.params
    return next(one.opts[0] for one in parameters if one.name == name)
