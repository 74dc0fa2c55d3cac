"""The command line: options are validated, a function of `fastpair.jobs` called, words printed.

Nothing heavy is imported before a command runs, so that ``fastpair --help`` answers at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from fastpair.errors import FastpairError

BUILTIN_HELP = "MODEL is a model file or one of cosine, dot, euclidean, manhattan."
Summary = dict[str, Any]

GOES_ON = "; --resume goes on where it stopped"
"""What to say after an interruption that leaves something to go on with."""


def main() -> None:
    """Run the command line; a FastpairError becomes one sentence and exit code 1."""
    _use_wide_matrix_products()
    signal.signal(signal.SIGTERM, _end)
    try:
        commands(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.Abort:
        _stop_interrupted()
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _stop_interrupted()
    except BrokenPipeError:
        _stop_unheard()
    except SystemExit:
        if type(sys.stdout).__name__.endswith("PacifyFlushWrapper"):  # click's way to say the same
            _stop_unheard()
        raise
    except FastpairError as error:
        from fastpair.spooling import named

        _stop(named(str(error)), 1)
    except MemoryError:
        _stop("the machine has no memory left: give a smaller --memory or a smaller task", 1)


def _stop_interrupted() -> None:
    """End after a signal; what no resume needs is removed."""
    if staging := sys.modules.get("fastpair.staging"):
        staging.remove_exports()
    _stop("interrupted" + _going_on(), 128 + _ended_by)


def _stop_unheard() -> None:
    """End where whoever read standard output is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # type: ignore[union-attr]
    _stop("standard output was closed before everything was printed", 1)


_ended_by: int = signal.SIGINT
"""The signal that ended the process, if one did."""


def _end(number: int, _frame: object) -> None:
    """Let a signal end the process as Ctrl-C does: what is of no use to a resume is removed."""
    global _ended_by
    _ended_by = number
    raise KeyboardInterrupt


def _going_on() -> str:
    """What to say of work that is left, if some is."""
    words = sys.argv[1:]
    if not words or words[0] not in ("score", "matrix"):
        return ""
    outputs = [b for a, b in pairwise(words) if a in ("-o", "--output")]
    outputs += [word.partition("=")[2] for word in words if word.startswith("--output=")]
    return GOES_ON if any(os.path.exists(f"{output}.partial") for output in outputs) else ""


def _stop(sentence: str, code: int) -> None:
    click.echo(f"fastpair: {sentence}", err=True)
    sys.exit(code)


SKYLAKE_X = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}
"""What a CPU must have for the widest kernels of the OpenBLAS in NumPy's wheels."""


def _use_wide_matrix_products() -> None:
    """Let OpenBLAS use AVX-512 where it takes a new CPU for an old one.

    It knows CPUs by their number, and takes a new one for a Haswell; what a CPU can do is in its
    flags. The widest kernels in NumPy's wheels are those of Skylake-X, which is also what OpenBLAS
    chooses itself where it knows the CPU. It must be told before NumPy is imported, and only in
    the process of the command; who has told it already is left alone.
    """
    if "OPENBLAS_CORETYPE" in os.environ or not sys.platform.startswith("linux"):
        return
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as info:
            flags = next((line for line in info if line.startswith("flags")), "").split()
    except OSError:
        return
    if set(flags) >= SKYLAKE_X:
        os.environ["OPENBLAS_CORETYPE"] = "SkylakeX"


# --- what commands share --------------------------------------------------------------------------


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
            self._bar.update(0, completed=self.done, total=self.total, rate=_short(rate))

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


def _short(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g} "


def _say(*lines: str) -> None:
    for line in lines:
        click.echo(line, err=True)


def _finish(summary: Summary, as_json: bool, *lines: str) -> None:
    """Print the summary as JSON on standard output, or words on standard error."""
    if as_json:
        click.echo(json.dumps(summary, indent=2, allow_nan=False))
    else:
        _say(*summary.get("notes", []), *lines)


_Command = Callable[..., Any]


def _options(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    def decorate(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_path = click.Path(path_type=Path)
_output = click.option("-o", "--output", type=_path, required=True, help="File to write.")
_json = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON on standard output."
)
_compression = click.option(
    "--compression",
    type=click.Choice(["gzip", "lzf", "zstd", "lz4", "blosc2", "bitshuffle"]),
    help="Compress an HDF5 output.",
)
_resume = click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
_overwrite = click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
_threads = click.option(
    "--threads", type=click.IntRange(1), help="Threads to use.  [default: all processors]"
)
_memory = click.option(
    "--memory", metavar="SIZE", help="Memory to use, such as 2GiB.  [default: 80 % of what is free]"
)

_device = _options(
    click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="DEVICE",
        help="auto, cpu, gpu (all that are there), gpu:1 or gpu:0,1.",
    ),
    click.option(
        "--device-memory",
        metavar="SIZE",
        help="Memory to use on each GPU, such as 8GiB.  [default: 90 % of what is free there]",
    ),
)


def _import_own_head(
    _context: click.Context, _parameter: click.Parameter, name: str | None
) -> None:
    if name is not None:
        from fastpair.heads import import_head

        import_head(name)


_own_head = click.option(
    "--head",
    metavar="MODULE:CLASS",
    callback=_import_own_head,
    expose_value=False,
    help="Your own head that the model was trained with; its module is imported.",
)
_dataset = click.option(
    "--dataset", metavar="NAME", help="Name of the embeddings inside an HDF5 or npz file."
)
_good = click.option(
    "--good", type=float, metavar="X", help="A label of X or more is a good pair, others are bad."
)
_pair_columns = _options(
    click.option("--left", "left_column", metavar="COLUMN", help="Column of the left entities."),
    click.option("--right", "right_column", metavar="COLUMN", help="Column of the right entities."),
)
_keys = click.option(
    "--keys",
    type=click.Choice(["auto", "rows", "ids"]),
    default="auto",
    show_default=True,
    help="Whether pairs name entities by row number or by id.",
)
_reading = _options(
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


_nonfinite = click.option(
    "--nonfinite",
    type=click.Choice(["refuse", "nan"]),
    default="refuse",
    show_default=True,
    help="Refuse embeddings that are not finite, or keep them apart: they score NaN.",
)


def _read_options(options: dict[str, Any]) -> Any:
    """Take the options of `_reading` out of those of a command."""
    from fastpair.formats import ReadOptions

    return ReadOptions(options.pop("separator"), options.pop("header"), options.pop("follow_links"))


_label_column = click.option("--label", "label_column", metavar="COLUMN", help="Column of labels.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="fastpair", prog_name="fastpair")
def commands() -> None:
    """Learn how similar two things are from good and bad pairs, then score pairs by the million.

    \b
    A first look:          fastpair demo
    Learn a similarity:    fastpair train embeddings.h5 pairs.csv -o model.h5
    See how good it is:    fastpair evaluate model.h5 embeddings.h5 test.csv
    Fold the embeddings:   fastpair project model.h5 embeddings.h5 -o table.h5
    Score a pair file:     fastpair score table.h5 candidates.parquet -o scores.parquet
    Best 10 of everyone:   fastpair matrix table.h5 --top-k 10 -o best.h5
    Features for others:   fastpair features model.h5 embeddings.h5 pairs.csv -o features.h5
    How fast, here:        fastpair bench

    Embeddings and pairs are read from CSV, TSV, Parquet, Arrow, npy, npz, HDF5 and more
    (docs/formats.md); - is standard input. Wherever a model is asked for, cosine, dot, euclidean or
    manhattan may stand instead.
    """  # noqa: D301


# --- the commands ---------------------------------------------------------------------------------


@commands.command()
@click.option(
    "--folder",
    type=_path,
    default=Path("fastpair-demo"),
    show_default=True,
    help="Where the files go.",
)
@_threads
def demo(folder: Path, threads: int | None) -> None:
    """Learn, score and search on real data that comes with a dependency: handwritten digits."""
    from fastpair.demo import run_demo

    run_demo(folder, threads=threads)


@commands.command()
@click.argument("source", type=_path)
@click.argument("output", type=_path)
@_dataset
@_pair_columns
@_label_column
@click.option("--pairs", "kind", flag_value="pairs", help="The source holds pairs.")
@click.option("--embeddings", "kind", flag_value="embeddings", help="The source holds embeddings.")
@_overwrite
@_reading
@_json
def convert(source: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Bring embeddings or pairs of any accepted format into HDF5, ids kept as they are."""
    from fastpair import jobs

    reading = _read_options(options)
    summary = jobs.convert(source, output, reading=reading, **options)
    ids = "with ids" if summary["ids"] else "without ids"
    shape = " x ".join(map(str, summary["shape"]))
    _finish(summary, as_json, f"{summary['kind']} {shape}, {ids} -> {output}")


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
@click.argument("embeddings", type=_path, required=False)
@click.argument("pairs", type=_path, required=False)
@_output
@click.option(
    "--ids",
    type=_path,
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
@click.option("--valid", type=_path, metavar="PAIRS", help="Validation pairs; else some are kept.")
@click.option("--graded", is_flag=True, help="Learn the grade itself, not good or bad.")
@_good
@click.option("--arms", metavar="A,B,D", help="Which of the arms to try.  [default: all]")
@click.option(
    "--head", help="Heads joined by +, such as cosine+absdiff, or module:Class.  [default: arms]"
)
@click.option(
    "--tower",
    help="What each embedding goes through: identity, linear or mlp, with options in brackets if "
    'wanted: "linear(bias=1,normalise=1)", "mlp(hidden=128x64,activation=gelu,residual=0)"; '
    "activation is relu, tanh or gelu; normalise=1 brings outputs to length 1.",
)
@click.option("--start", help="Where a linear tower starts: identity, pca or random.")
@click.option("--dim", type=click.IntRange(1), help="Columns of the towers.  [default: all]")
@click.option("--preparation", help="none, centre or half-whitening.")
@click.option(
    "--density/--no-density", default=None, help="Use how close an entity's nearest others are."
)
@click.option(
    "--loss",
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
    "--apart", type=_path, metavar="PAIRS", help="Test pairs that --close-positives must not add."
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
@click.option("--calibrate", help="platt, isotonic or temperature.  [default: platt]")
@click.option(
    "--threshold-by", help="f1, f0.5, accuracy, precision=0.9 or recall=0.9.  [default: f1]"
)
@click.option("--prior", type=float, metavar="SHARE", help="Of good pairs among those to score.")
@click.option("--epochs", type=click.IntRange(1), help="Passes over the pairs, at most.")
@click.option("--batch", type=click.IntRange(2), help="Pairs in a step.  [default: 256]")
@click.option(
    "--learning-rate", type=click.FloatRange(0, min_open=True), help="Height of the rate."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all chance.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted training stopped.")
@click.option("--log", type=_path, metavar="FILE", help="One line of JSON an epoch.")
@_dataset
@_pair_columns
@_keys
@_label_column
@_threads
@_overwrite
@_nonfinite
@_reading
@_json
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

    given = _given_options()
    if options["ids"] is not None:
        _train_ids(as_json, output, given, options)
        return
    if options["pairs"] is None:
        raise click.UsageError("give EMBEDDINGS and PAIRS, or --ids PAIRS")
    for name in sorted(given & IDS_ALONE):
        raise click.UsageError(f"{_spelled(name)} goes with --ids alone")
    options = {name: value for name, value in options.items() if name not in IDS_ALONE}
    if options["asymmetric"]:
        _say("--asymmetric: if learning helps, the score of (a, b) will NOT be that of (b, a)")
    options["reading"] = _read_options(options)
    with Meter("epochs") as meter:

        def on_epoch(entry: Summary) -> None:
            meter.expect(meter.done + 1 + entry["epochs_left"])
            meter(1)

        def on_estimate(seconds: float) -> None:
            if seconds >= 2:
                _say(f"learning will take about {seconds:.0f} s")

        reports: Summary = {"on_estimate": on_estimate, "on_epoch": on_epoch}
        try:
            summary = jobs.train(output=output, **reports, **options)
        except KeyboardInterrupt:
            state = output.with_name(output.name + SUFFIX)
            _stop("interrupted" + (GOES_ON if state.exists() else ""), 128 + _ended_by)
    if not as_json and summary["arms"]:
        _show_arms(summary["arms"])
    _finish(
        summary,
        as_json,
        f"trained on {summary['n_pairs']} pairs in {summary['seconds']:.1f} s -> {output}",
        *_metric_lines(summary["validation"], "on the validation pairs"),
    )


def _given_options() -> set[str]:
    """Return the names of the options that were given on the command line."""
    context = click.get_current_context()
    command_line = click.core.ParameterSource.COMMANDLINE
    return {n for n in context.params if context.get_parameter_source(n) is command_line}


def _spelled(name: str) -> str:
    """Return how the option of this name is written."""
    parameters = click.get_current_context().command.params
    return next(one.opts[0] for one in parameters if one.name == name)


def _train_ids(as_json: bool, output: Path, given: set[str], options: Summary) -> None:
    """Learn tables of ids; refuse options that have no meaning for them."""
    from fastpair import id_jobs

    if options["embeddings"] is not None:
        raise click.UsageError("--ids PAIRS stands in the place of EMBEDDINGS PAIRS: give no more")
    for name in sorted(given - IDS_TOO - IDS_ALONE):
        raise click.UsageError(f"{_spelled(name)} has no meaning with --ids")
    pairs, reading = options["ids"], _read_options(options)
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
    metrics = ", ".join(f"{_metric_name(k)} {v:.4f}" for k, v in summary["validation"].items())
    _finish(
        summary,
        as_json,
        f"trained on {summary['n_pairs']} pairs in {summary['seconds']:.1f} s -> {output}",
        f"on the validation pairs: {metrics}",
        f"scores are of the unit {summary['unit']}: {summary['meaning']}",
    )


def _metric_name(key: str) -> str:
    return METRICS.get(key, key)


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


@commands.command(epilog=BUILTIN_HELP)
@click.argument("model")
@click.argument("files", type=_path, nargs=-1, metavar="[EMBEDDINGS] PAIRS")
@_good
@click.option("--graded", is_flag=True, help="Labels are grades.")
@click.option(
    "--train",
    type=_path,
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
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all chance.")
@_dataset
@_pair_columns
@_keys
@_label_column
@_threads
@_own_head
@_reading
@_json
def evaluate(as_json: bool, files: tuple[Path, ...], **options: Any) -> None:
    """Measure a model on labelled PAIRS, through the same kernels that score.

    Beside it stand the raw cosine and an unlabelled PCA. Numbers in brackets hold 95 % of the draws
    of a bootstrap over entities. A model that learned ids has no EMBEDDINGS; beside it stand its
    biases alone.
    """
    if len(files) not in (1, 2):
        raise click.UsageError("give EMBEDDINGS and PAIRS, or PAIRS for a model that learned ids")
    if len(files) == 1:
        from fastpair import id_jobs

        for name in ("train", "properties", "dataset", "keys"):
            if name in _given_options():
                raise click.UsageError(f"{_spelled(name)} goes with EMBEDDINGS alone")
            options.pop(name)
        summary = id_jobs.evaluate(pairs=files[0], reading=_read_options(options), **options)
    else:
        from fastpair import jobs

        options["reading"] = _read_options(options)
        summary = jobs.evaluate(embeddings=files[0], pairs=files[1], **options)
    if as_json:
        _finish(summary, True)
        return
    _say(*summary["notes"])
    for line in _evaluation_lines(summary):
        click.echo(line)


METRICS = {
    "auc": "AUC",
    "average_precision": "average precision",
    "spearman": "Spearman",
    "pearson": "Pearson",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "eer": "equal error rate",
    "log_loss": "log loss",
    "brier": "Brier score",
    "ece": "calibration error",
    "rmse": "root mean square error",
    "mae": "mean absolute error",
}
"""Metrics in the order in which they are printed, and what they are called."""

SIMILARITIES = {
    "raw_cosine": "raw cosine",
    "unlabelled_pca": "unlabelled PCA",
    "biases_alone": "biases alone",
}
"""What stands beside the model, where it is there."""


def _evaluation_lines(summary: Summary) -> list[str]:
    """Put what `jobs.evaluate` found into words and tables."""
    good = "" if summary["n_good"] is None else f", {summary['n_good']} of them good"
    beside = {name: words for name, words in SIMILARITIES.items() if name in summary}
    others = [summary[name] for name in beside]
    rows = [["", "model", *beside.values()]]
    graded = summary["auc"] is None or "spearman" in summary.get("intervals", {})
    for key, name in METRICS.items():
        if summary.get(key) is None or (key in ("spearman", "pearson") and not graded):
            continue
        if key in ("f1", "precision", "recall"):
            name += f" at {summary['threshold']:.4g}"
        rows.append([name, *(_shown(metrics, key) for metrics in (summary, *others))])
    found = summary["recall_at"]
    for k in found.get("model", {}):
        cells = [_number(found[name][k]) for name in ("model", *beside)]
        rows.append([f"recall in the best {k}", *cells])
    lines = [f"{summary['n_pairs']} pairs{good}", *_aligned(rows)]
    for name, words in beside.items():
        gain = summary[name].get("gain", {})
        for key in ("average_precision", "spearman"):
            if key in gain:
                shown = _number(gain[key], "+")
                lines.append(f"gain in {METRICS[key]} over the {words}: {shown}")
    if "entities" in summary:
        lines += ["", *_group_lines(summary["entities"], "entities in training")]
    for column, groups in summary["by"].items():
        lines += ["", *_group_lines(groups, column)]
    if "properties" in summary:
        lines += ["", *_property_lines(summary["properties"])]
        lines += [
            f"raw cosine: {line}"
            for line in _property_lines(summary["raw_cosine"]["properties"])
            if not line.startswith("symmetry")
        ]
    return lines


def _shown(metrics: Summary, key: str) -> str:
    if metrics.get(key) is None:
        return ""
    return _number({"value": metrics[key], "interval": metrics.get("intervals", {}).get(key)})


def _number(measured: Summary, sign: str = "") -> str:
    low_high = measured.get("interval")
    bounds = "" if low_high is None else " [{:{s}.4f}, {:{s}.4f}]".format(*low_high, s=sign)
    return f"{measured['value']:{sign}.4f}{bounds}"


def _group_lines(groups: Summary, name: str) -> list[str]:
    keys = ["auc", "average_precision"]
    if all(metrics.get("auc") is None for metrics in groups.values()):
        keys = ["spearman"]
    beside = next(
        (one for one in ("raw_cosine", "biases_alone") for m in groups.values() if one in m), ""
    )
    words = SIMILARITIES.get(beside, "")
    rows = [[name, "pairs", "good", *(METRICS[key] for key in keys), words, ""]]
    for value, metrics in groups.items():
        cosine = metrics.get(beside, {})
        counts = [str(metrics["n_pairs"]), str(metrics["n_good"] or 0)]
        against = f"against {metrics['against']}" if "against" in metrics else ""
        cells = [_shown(metrics, key) for key in keys]
        rows.append([value, *counts, *cells, _shown(cosine, keys[-1]), against])
    return _aligned(rows)


def _property_lines(found: Summary) -> list[str]:
    lines = []
    for backend, counts in (found["symmetry"] or {}).items():
        state = f"{counts['different']} differ" if counts["different"] else "holds to the bit"
        lines.append(f"symmetry ({backend}): {state} in {counts['pairs']} sampled pairs")
    if found["symmetry"] is None:
        lines.append("symmetry: none, the model is asymmetric")
    reflexive = found["reflexivity"]
    lines.append(
        f"reflexivity: {reflexive['beaten']:.2%} of {reflexive['entities']} sampled entities have "
        "another one that scores higher than they do with themselves"
        + (" (by its formula there is none but for rounding)" if reflexive["guaranteed"] else "")
    )
    for kind, what in (
        ("transitivity", "transitivity (Lukasiewicz)"),
        ("triangle", "triangle inequality"),
    ):
        for name, triples in (found[kind] or {}).items():
            if triples["triples"]:
                lines.append(
                    f"{what}: violated by {triples['violated']:.2%} of {triples['triples']} "
                    f"{name} triples"
                )
    return lines


def _aligned(rows: list[list[str]]) -> list[str]:
    """Lay cells out in columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return [line.rstrip() for line in lines]


def _metric_lines(metrics: Summary, name: str) -> list[str]:
    shown = [
        f"{key.replace('_', ' ')} {metrics[key]:.4f}"
        for key in ("auc", "average_precision", "spearman", "f1", "log_loss", "brier")
        if metrics.get(key) is not None
    ]
    return [f"{name}: {', '.join(shown)}"] if shown else []


@commands.command(epilog=BUILTIN_HELP)
@click.argument("model")
@click.argument("embeddings", type=_path, required=False)
@_output
@click.option(
    "--precision",
    type=click.Choice(["float32", "float16", "bfloat16", "int8"]),
    default="float32",
    show_default=True,
    help="How the columns of the table are stored.",
)
@click.option(
    "--side",
    type=click.Choice(["both", "left", "right"]),
    default="both",
    show_default=True,
    help="Whose entities these are; models of two sides need left or right.",
)
@_dataset
@_threads
@_memory
@_overwrite
@_own_head
@_nonfinite
@_reading
@_json
def project(as_json: bool, output: Path, **options: Any) -> None:
    """Fold EMBEDDINGS through MODEL into a table, the form in which they are scored.

    A model that learned ids takes its own tables: leave EMBEDDINGS out.
    """
    from fastpair import jobs

    options["reading"] = _read_options(options)
    with Meter("rows") as meter:
        summary = jobs.project(output=output, progress=meter, expect=meter.expect, **options)
    _finish(
        summary,
        as_json,
        f"{summary['rows']} rows of {summary['row_bytes']} bytes, {summary['precision']}, in "
        f"{summary['seconds']:.1f} s -> {output}",
    )


@commands.command(epilog=BUILTIN_HELP)
@click.argument("model")
@click.argument("embeddings", type=_path)
@click.argument("pairs", type=_path)
@_output
@click.option(
    "--kinds",
    metavar="KINDS",
    help="Some of product,absdiff,sqdiff,sum,raw.  [default: all]",
)
@_dataset
@_pair_columns
@_keys
@_label_column
@_threads
@_overwrite
@_own_head
@_reading
@_json
def features(as_json: bool, output: Path, kinds: str | None, **options: Any) -> None:
    """Write symmetric features of PAIRS, as input for any other prediction model.

    Of each branch of MODEL: product, absolute and squared difference and sum of the two tower
    outputs, column by column, and its raw score. The output is Parquet (.parquet), a column each,
    with the keys and labels of PAIRS, or HDF5 (.h5, .hdf5).
    """
    from fastpair import jobs

    named = None if kinds is None else [kind.strip() for kind in kinds.split(",")]
    options["reading"] = _read_options(options)
    with Meter("pairs") as meter:
        summary = jobs.features(
            output=output, kinds=named, progress=meter, expect=meter.expect, **options
        )
    _finish(
        summary,
        as_json,
        f"{summary['features']} features of {summary['pairs']} pairs in "
        f"{summary['seconds']:.1f} s -> {output}",
    )


@commands.command()
@click.argument("table", type=_path)
@click.argument("pairs", type=_path)
@_output
@click.option("--against", type=_path, metavar="TABLE", help="Table of the right entities.")
@click.option(
    "--probability", is_flag=True, help="Write probabilities of being good in place of scores."
)
@click.option(
    "--decision", is_flag=True, help="Write 1 or 0: whether the model's threshold is reached."
)
@click.option("--distance", is_flag=True, help="Write distances, for models that are one.")
@click.option(
    "--min-score",
    type=float,
    metavar="X",
    help="Write only pairs of at least X, in the unit that is written.",
)
@_pair_columns
@_keys
@click.option("--dataset", metavar="NAME", help="Name of the pairs inside an HDF5 or npz file.")
@_compression
@click.option(
    "--unknown",
    type=click.Choice(["refuse", "nan", "mean"]),
    help="Refuse unknown ids, write NaN as the scores of their pairs, or take the mean of their "
    "side, where a model learned ids.  [default: mean where there is one, else refuse]",
)
@_resume
@_threads
@_memory
@_device
@_overwrite
@_reading
@_json
def score(as_json: bool, output: Path, **options: Any) -> None:
    """Score the PAIRS of a file by the rows of TABLE, in the order of the file.

    The output is HDF5 (.h5, .hdf5), Parquet (.parquet), CSV or TSV (.csv, .tsv, also .gz and
    .zst); all but HDF5 carry the entities as they came.
    """
    from fastpair import jobs

    options["reading"] = _read_options(options)
    with Meter("pairs") as meter:
        summary = jobs.score(output=output, progress=meter, expect=meter.expect, **options)
    kept = "" if summary["kept"] == summary["pairs"] else f", {summary['kept']} kept"
    _finish(
        summary,
        as_json,
        f"{summary['pairs']} pairs{kept} in {summary['seconds']:.1f} s, "
        f"{_short(summary['pairs_per_second'])}pairs/s -> {output}",
    )


@commands.command()
@click.argument("table", type=_path)
@_output
@click.option("--top-k", type=click.IntRange(1, 10**6), metavar="K", help="The K best of each row.")
@click.option("--threshold", type=float, metavar="X", help="All pairs that score at least X.")
@click.option("--dense", is_flag=True, help="All scores.")
@click.option("--histogram", is_flag=True, help="How many pairs score how much.")
@click.option(
    "--bins", type=click.IntRange(1, 10**6), help="Bins of the histogram.  [default: 100]"
)
@click.option("--against", type=_path, metavar="TABLE", help="Table of the right entities.")
@click.option(
    "--lookup",
    type=_path,
    metavar="VALUES",
    help="A row of numbers a right entity: write their softmax average by score, over all right "
    "entities, or those of --top-k or --threshold.",
)
@click.option(
    "--temperature", type=float, metavar="T", help="Scores are divided by T.  [default: 1]"
)
@click.option("--no-self", is_flag=True, help="In a lookup, an entity does not find itself.")
@click.option(
    "--exclude",
    type=_path,
    metavar="PAIRS",
    help="Pairs that --top-k leaves out, such as those that are known already.",
)
@_pair_columns
@_keys
@_compression
@_resume
@_threads
@_memory
@_device
@_overwrite
@_reading
@_json
def matrix(as_json: bool, output: Path, **options: Any) -> None:
    """Score all pairs of TABLE, or of TABLE and another one, and keep what is asked for.

    Choose one of --top-k, --threshold, --dense, --histogram and --lookup, the last also with one of
    the first two. An entity is not paired with itself, but in a dense matrix and in a lookup. The
    output is HDF5 (.h5, .hdf5); a dense matrix may be .npy, pairs above a threshold .npz (CSR for
    SciPy), the best of each row .parquet, .csv or .tsv, a histogram .csv or .tsv. A histogram and a
    lookup begin anew after an interruption.
    """
    soft = {name: options.pop(name) for name in ("lookup", "temperature", "no_self")}
    if soft["lookup"] is not None:
        _look_up(as_json, output, soft, options)
        return
    if soft["temperature"] is not None or soft["no_self"]:
        raise click.UsageError("--temperature and --no-self go with --lookup")
    chosen = [
        name
        for name in ("top_k", "threshold", "dense", "histogram")
        if options[name] is not None and options[name] is not False
    ]
    if len(chosen) != 1:
        raise click.UsageError("choose one of --top-k, --threshold, --dense and --histogram")
    if options["bins"] is not None and not options["histogram"]:
        raise click.UsageError("--bins goes with --histogram")
    from fastpair import jobs

    options["reading"] = _read_options(options)
    with Meter("pairs") as meter:
        summary = jobs.matrix(output=output, progress=meter, expect=meter.expect, **options)
    _finish(
        summary,
        as_json,
        f"{summary['pairs']} pairs in {summary['seconds']:.1f} s, "
        f"{_short(summary['pairs_per_second'])}pairs/s -> {output}",
    )


def _look_up(as_json: bool, output: Path, soft: Summary, options: Summary) -> None:
    """Answer `fastpair matrix --lookup`."""
    refused = {"dense", "histogram", "bins", "compression", "resume", "device_memory", "exclude"}
    refused |= {"left_column", "right_column", "keys", "separator", "header", "follow_links"}
    for name in sorted(refused & _given_options()):
        raise click.UsageError(f"{_spelled(name)} does not go with --lookup")
    options = {name: value for name, value in options.items() if name not in refused}
    if options.pop("device") not in ("auto", "cpu"):
        raise click.UsageError("--lookup runs on the CPU: leave out --device")
    if options["top_k"] is not None and options["threshold"] is not None:
        raise click.UsageError("choose one of --top-k and --threshold")
    if soft["temperature"] is not None:
        options["temperature"] = soft["temperature"]
    from fastpair.soft_lookup import soft_lookup

    with Meter("pairs") as meter:
        reports: Summary = {"progress": meter, "expect": meter.expect}
        summary = soft_lookup(
            output=output,
            values=soft["lookup"],
            itself=not soft["no_self"],
            **reports,
            **options,
        )
    _finish(
        summary,
        as_json,
        f"{' x '.join(map(str, summary['shape']))} averages over {summary['pairs']} pairs in "
        f"{summary['seconds']:.1f} s, {_short(summary['pairs_per_second'])}pairs/s -> {output}",
    )


@commands.command(epilog=BUILTIN_HELP)
@click.argument("model")
@click.argument("words", metavar="[EMBEDDINGS] EXPRESSION...", nargs=-1)
@click.option(
    "--file", type=_path, metavar="FILE", help="More expressions, one a line of this text."
)
@click.option(
    "--top-k",
    "k",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    metavar="K",
    help="How many neighbours.",
)
@click.option("--include", is_flag=True, help="Keep the ids of an expression among its neighbours.")
@_dataset
@_threads
@_own_head
@_json
def nearest(
    as_json: bool, model: str, words: tuple[str, ...], file: Path | None, **options: Any
) -> None:
    """Show the entities most similar to an id, or to arithmetic on ids.

    EXPRESSION is an id or several with + - * /, weights and parentheses, words apart by spaces:
    "king - man + woman", "0.7 paris + 0.3 france", "blood * color". Quote ids that have spaces
    inside. What it comes to in the space of EMBEDDINGS goes through MODEL like any embedding.
    A model that learned ids takes its own tables: leave EMBEDDINGS out. Where it learned two,
    EXPRESSION is of left ids and the answers are right ones.
    """
    from fastpair.files import has_id_tables

    embeddings = None
    if not has_id_tables(model):
        if not words:
            raise click.UsageError("Missing argument 'EMBEDDINGS'.")
        embeddings, words = Path(words[0]), words[1:]
    if not words and file is None:
        raise click.UsageError("give an EXPRESSION, or a --file of them")
    from fastpair.nearest import nearest as find

    summary = find(model, embeddings, words, file=file, **options)
    if as_json:
        _finish(summary, True)
        return
    for answer in summary["answers"]:
        click.echo(answer["expression"])
        width = max((len(one["id"]) for one in answer["neighbours"]), default=0)
        for one in answer["neighbours"]:
            click.echo(f"  {one['id']:<{width}}  {one['score']:.4f}")


@commands.command()
@click.argument("file", type=_path)
@_output
@click.option(
    "--threshold",
    type=float,
    required=True,
    metavar="X",
    help="Pairs of at least this belong together; of distances, of at most this.",
)
@click.option(
    "--link",
    type=click.Choice(["single", "average", "complete"]),
    default="single",
    show_default=True,
    help="What holds a group together: a chain of pairs, the mean of its pairs, all of them.",
)
@click.option("--missing", type=float, metavar="X", help="What a pair counts that is not in FILE.")
@click.option("--pairs", type=_path, metavar="PAIRS", help="The pair file of scores without keys.")
@click.option(
    "--table",
    type=_path,
    metavar="TABLE",
    help="The table that was scored: its rows are the entities, and linkage scores all pairs.",
)
@click.option("--left", "left_column", metavar="COL", help="Column of left keys.")
@click.option("--right", "right_column", metavar="COL", help="Column of right keys.")
@click.option(
    "--score", "score_column", metavar="COL", help="Of scores.  [default: score, probability ...]"
)
@click.option("--distance", is_flag=True, help="Scores are distances: small is similar.")
@click.option("--truth", type=_path, metavar="PAIRS", help="Labelled pairs to compare groups with.")
@_label_column
@click.option("--good", type=float, metavar="X", help="Labels of X or more are good pairs.")
@_threads
@_memory
@_overwrite
@_json
def cluster(as_json: bool, output: Path, **options: Any) -> None:
    """Group entities by the pairs of FILE and write the group of each.

    FILE is what score or matrix (--threshold, --top-k) wrote, or CSV, TSV or Parquet with two key
    columns and a score. A chain of accepted pairs makes a group; --link average and complete take
    apart groups whose ends are not similar.
    """
    from fastpair.grouping import cluster as group

    with Meter("pairs") as meter:
        summary = group(output=output, progress=meter, **options)
    if as_json:
        _finish(summary, True)
        return
    for note in summary["notes"]:
        click.echo(note, err=True)
    _print_groups(summary)


def _print_groups(summary: Summary) -> None:
    click.echo(
        f"{summary['accepted']} accepted pairs, {summary['entities']} entities: {summary['groups']}"
        f" groups, {summary['grouped']} entities are not alone -> {summary['output']}"
    )
    if summary["violating"] is not None:
        click.echo(
            f"transitivity: {summary['violating']} accepted pairs have a third entity that pairs "
            f"with just one of the two; {summary['implied']} pairs are together without being "
            "accepted"
        )
    sizes = sorted(summary["sizes"].items(), reverse=True)
    click.echo("sizes: " + ", ".join(f"{number} of {size}" for size, number in sizes[:12]))
    for one in summary["largest"]:
        more = ", ..." if one["size"] > len(one["members"]) else ""
        click.echo(f"  {one['size']}: {', '.join(one['members'])}{more}")
    if "precision" in summary:
        parts = [
            f"{name} {'-' if summary[name] is None else format(summary[name], '.3f')}"
            for name in ("precision", "recall", "f1")
        ]
        click.echo("labelled pairs, together or not: " + ", ".join(parts))


@commands.command()
@click.option("--table", type=_path, metavar="FILE", help="Table to measure.  [default: generated]")
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
    type=click.IntRange(1),
    default=4_000_000,
    show_default=True,
    help="Random pairs to score, at most.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    help="All of it shall take; rows are shortened to fit.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all chance.")
@_threads
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="DEVICE",
    help="GPU to measure beside the CPU: auto (the first, if there is one), cpu (none), gpu:1.",
)
@_own_head
@_json
def bench(as_json: bool, **options: Any) -> None:
    """Measure this machine, what fastpair does on it, and that its results are right.

    Rates stand beside what the machine can do at most, measured in the same run. Every backend is
    compared with the float64 reference; the exit code is 1 where one is further from it than
    rounding explains.
    """
    from fastpair.agreement import check_agreement
    from fastpair.bench import bench as measure
    from fastpair.bench_report import print_bench, steps

    with steps() as say:
        summary = measure(say=say, **options)
    if as_json:
        _finish(summary, True)
    else:
        print_bench(summary)
    check_agreement(summary["agreement"])


@commands.command()
@click.argument("file", type=_path)
@click.option("--verify", is_flag=True, help="Read everything, and say where it is damaged.")
@_json
def info(file: Path, verify: bool, as_json: bool) -> None:
    """Say what FILE is and whether it is whole; with --verify, exit with 1 if it is not."""
    from fastpair import jobs
    from fastpair.errors import FileError

    summary = jobs.info(file, verify=verify)
    if as_json:
        _finish(summary, True)
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
    _say(f"all of it was read; compared with checksums: {checked}")
