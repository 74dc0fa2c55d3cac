"""`score`, `matrix`, `nearest` and `cluster`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from fastpair.cli.shared import (
    BUILTIN_HELP,
    Meter,
    Summary,
    cluster_options,
    commands,
    compression_option,
    dataset_option,
    device_options,
    finish,
    given_options,
    json_option,
    keys_option,
    label_column_option,
    memory_option,
    on_cluster,
    output_option,
    overwrite_option,
    own_head_option,
    pair_column_options,
    path_type,
    plan_option,
    read_options,
    reading_options,
    resume_option,
    short,
    show_plan,
    spelled,
    threads_option,
    without_cluster,
)
from fastpair.cli.words import complete_model


@commands.command()
@click.argument("table", type=path_type)
@click.argument("pairs", type=path_type)
@output_option
@click.option("--against", type=path_type, metavar="TABLE", help="Table of the right entities.")
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
@pair_column_options
@keys_option
@click.option("--dataset", metavar="NAME", help="Name of the pairs inside an HDF5 or npz file.")
@compression_option
@click.option(
    "--unknown",
    type=click.Choice(["refuse", "nan", "mean"]),
    help="Refuse unknown ids, write NaN as the scores of their pairs, or take the mean of their "
    "side, where a model learned ids.  [default: mean where there is one, else refuse]",
)
@resume_option
@threads_option
@memory_option
@device_options
@cluster_options
@overwrite_option
@plan_option
@reading_options
@json_option
def score(as_json: bool, output: Path, **options: Any) -> None:
    """Score the PAIRS of a file by the rows of TABLE, in the order of the file.

    The output is HDF5 (.h5, .hdf5), Parquet (.parquet), CSV or TSV (.csv, .tsv, also .gz and
    .zst); all but HDF5 carry the entities as they came.
    """
    from fastpair import jobs

    options["reading"] = read_options(options)
    if options["plan"]:
        without_cluster(options)
        show_plan(jobs.score(output=output, **options), as_json)
        return
    with on_cluster(options) as cluster, Meter("pairs") as meter:
        reports: Summary = {"progress": meter, "expect": meter.expect, "cluster": cluster}
        summary = jobs.score(output=output, **reports, **options)
    kept = "" if summary["kept"] == summary["pairs"] else f", {summary['kept']} kept"
    finish(
        summary,
        as_json,
        f"{summary['pairs']} pairs{kept} in {summary['seconds']:.1f} s, "
        f"{short(summary['pairs_per_second'])}pairs/s -> {output}",
    )


@commands.command()
@click.argument("table", type=path_type)
@output_option
@click.option("--top-k", type=click.IntRange(1, 10**6), metavar="K", help="The K best of each row.")
@click.option("--threshold", type=float, metavar="X", help="All pairs that score at least X.")
@click.option("--dense", is_flag=True, help="All scores.")
@click.option("--histogram", is_flag=True, help="How many pairs score how much.")
@click.option(
    "--bins", type=click.IntRange(1, 10**6), help="Bins of the histogram.  [default: 100]"
)
@click.option("--against", type=path_type, metavar="TABLE", help="Table of the right entities.")
@click.option(
    "--lookup",
    type=path_type,
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
    type=path_type,
    metavar="PAIRS",
    help="Pairs that --top-k leaves out, such as those that are known already.",
)
@pair_column_options
@keys_option
@click.option(
    "--plot",
    type=path_type,
    metavar="FILE",
    help="Draw a heat map too (.png, .svg, .pdf); of many entities, of some and their best.",
)
@compression_option
@resume_option
@threads_option
@memory_option
@device_options
@cluster_options
@overwrite_option
@plan_option
@reading_options
@json_option
def matrix(as_json: bool, output: Path, plot: Path | None, **options: Any) -> None:
    """Score all pairs of TABLE, or of TABLE and another one, and keep what is asked for.

    Choose one of --top-k, --threshold, --dense, --histogram and --lookup, the last also with one of
    the first two. An entity is not paired with itself, but in a dense matrix and in a lookup. The
    output is HDF5 (.h5, .hdf5); a dense matrix may be .npy, pairs above a threshold .npz (CSR for
    SciPy), the best of each row .parquet, .csv or .tsv, a histogram .csv or .tsv. A histogram
    begins anew after an interruption.
    """
    soft = {name: options.pop(name) for name in ("lookup", "temperature", "no_self")}
    if soft["lookup"] is not None:
        if plot is not None:
            raise click.UsageError("--plot does not go with --lookup")
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

    if plot is not None:
        from fastpair.heat_map import check_plot, plot_table

        tables = [options[name] for name in ("table", "against") if options[name] is not None]
        check_plot(plot, overwrite=options["overwrite"], inputs=[*tables, output])
    options["reading"] = read_options(options)
    if options["plan"]:
        without_cluster(options)
        if plot is not None:
            raise click.UsageError("--plot does not go with --plan")
        show_plan(jobs.matrix(output=output, **options), as_json)
        return
    with on_cluster(options) as cluster, Meter("pairs") as meter:
        told: Summary = {"progress": meter, "expect": meter.expect, "cluster": cluster}
        summary = jobs.matrix(output=output, **told, **options)
    if plot is not None:
        sides = options["table"], options["against"]
        summary |= plot_table(*sides, plot, threads=options["threads"])
    finish(
        summary,
        as_json,
        f"{summary['pairs']} pairs in {summary['seconds']:.1f} s, "
        f"{short(summary['pairs_per_second'])}pairs/s -> {output}",
        *([] if plot is None else [f"heat map -> {plot}"]),
    )


def _look_up(as_json: bool, output: Path, soft: Summary, options: Summary) -> None:
    """Answer `fastpair matrix --lookup`."""
    refused = {"dense", "histogram", "bins", "exclude"}
    refused |= {"left_column", "right_column", "keys", "separator", "header", "follow_links"}
    refused |= {"plan", "scheduler", "workers", "consolidate"}
    for name in sorted(refused & given_options()):
        raise click.UsageError(f"{spelled(name)} does not go with --lookup")
    options = {name: value for name, value in options.items() if name not in refused}
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
    finish(
        summary,
        as_json,
        f"{' x '.join(map(str, summary['shape']))} averages over {summary['pairs']} pairs in "
        f"{summary['seconds']:.1f} s, {short(summary['pairs_per_second'])}pairs/s -> {output}",
    )


@commands.command(epilog=BUILTIN_HELP)
@click.argument("model", shell_complete=complete_model)
@click.argument(
    "words",
    metavar="[EMBEDDINGS] EXPRESSION...",
    nargs=-1,
    shell_complete=lambda _context, _parameter, begun: [CompletionItem(begun, type="file")],
)
@click.option(
    "--file", type=path_type, metavar="FILE", help="More expressions, one a line of this text."
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
@dataset_option
@threads_option
@own_head_option
@json_option
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
        finish(summary, True)
        return
    for answer in summary["answers"]:
        click.echo(answer["expression"])
        width = max((len(one["id"]) for one in answer["neighbours"]), default=0)
        for one in answer["neighbours"]:
            click.echo(f"  {one['id']:<{width}}  {one['score']:.4f}")


@commands.command()
@click.argument("file", type=path_type)
@output_option
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
@click.option(
    "--pairs", type=path_type, metavar="PAIRS", help="The pair file of scores without keys."
)
@click.option(
    "--table",
    type=path_type,
    metavar="TABLE",
    help="The table that was scored: its rows are the entities, and linkage scores all pairs.",
)
@click.option("--left", "left_column", metavar="COL", help="Column of left keys.")
@click.option("--right", "right_column", metavar="COL", help="Column of right keys.")
@click.option(
    "--score", "score_column", metavar="COL", help="Of scores.  [default: score, probability ...]"
)
@click.option("--distance", is_flag=True, help="Scores are distances: small is similar.")
@click.option(
    "--truth", type=path_type, metavar="PAIRS", help="Labelled pairs to compare groups with."
)
@label_column_option
@click.option("--good", type=float, metavar="X", help="Labels of X or more are good pairs.")
@threads_option
@memory_option
@overwrite_option
@json_option
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
        finish(summary, True)
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
