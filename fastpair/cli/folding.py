"""`convert`, `project` and `features`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastpair.cli.shared import (
    BUILTIN_HELP,
    Meter,
    commands,
    dataset_option,
    finish,
    json_option,
    keys_option,
    label_column_option,
    memory_option,
    nonfinite_option,
    on_cluster,
    output_option,
    overwrite_option,
    own_head_option,
    pair_column_options,
    path_type,
    read_options,
    reading_options,
    threads_option,
    worker_options,
)
from fastpair.cli.words import complete_model


@commands.command()
@click.argument("source", type=path_type)
@click.argument("output", type=path_type)
@dataset_option
@pair_column_options
@label_column_option
@click.option("--pairs", "kind", flag_value="pairs", help="The source holds pairs.")
@click.option("--embeddings", "kind", flag_value="embeddings", help="The source holds embeddings.")
@overwrite_option
@reading_options
@json_option
def convert(source: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Bring embeddings or pairs of any accepted format into HDF5, ids kept as they are."""
    from fastpair import jobs

    reading = read_options(options)
    summary = jobs.convert(source, output, reading=reading, **options)
    ids = "with ids" if summary["ids"] else "without ids"
    shape = " x ".join(map(str, summary["shape"]))
    finish(summary, as_json, f"{summary['kind']} {shape}, {ids} -> {output}")


@commands.command(epilog=BUILTIN_HELP)
@click.argument("model", shell_complete=complete_model)
@click.argument("embeddings", type=path_type, required=False)
@output_option
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
@dataset_option
@threads_option
@memory_option
@worker_options
@click.option(
    "--resume", is_flag=True, help="On a cluster: go on where an interrupted run stopped."
)
@overwrite_option
@own_head_option
@nonfinite_option
@reading_options
@json_option
def project(as_json: bool, output: Path, **options: Any) -> None:
    """Fold EMBEDDINGS through MODEL into a table, the form in which they are scored.

    A model that learned ids takes its own tables: leave EMBEDDINGS out.
    """
    from fastpair import jobs

    options["reading"] = read_options(options)
    with on_cluster(options) as cluster, Meter("rows") as meter:
        reports: dict[str, Any] = {"progress": meter, "expect": meter.expect, "cluster": cluster}
        summary = jobs.project(output=output, **reports, **options)
    finish(
        summary,
        as_json,
        f"{summary['rows']} rows of {summary['row_bytes']} bytes, {summary['precision']}, in "
        f"{summary['seconds']:.1f} s -> {output}",
    )


@commands.command(epilog=BUILTIN_HELP)
@click.argument("model", shell_complete=complete_model)
@click.argument("embeddings", type=path_type)
@click.argument("pairs", type=path_type)
@output_option
@click.option(
    "--kinds",
    metavar="KINDS",
    help="Some of product,absdiff,sqdiff,sum,raw.  [default: all]",
)
@dataset_option
@pair_column_options
@keys_option
@label_column_option
@threads_option
@overwrite_option
@own_head_option
@nonfinite_option
@reading_options
@json_option
def features(as_json: bool, output: Path, kinds: str | None, **options: Any) -> None:
    """Write symmetric features of PAIRS, as input for any other prediction model.

    Of each branch of MODEL: product, absolute and squared difference and sum of the two tower
    outputs, column by column, and its raw score. The output is Parquet (.parquet), a column each,
    with the keys and labels of PAIRS, or HDF5 (.h5, .hdf5).
    """
    from fastpair import jobs

    named = None if kinds is None else [kind.strip() for kind in kinds.split(",")]
    options["reading"] = read_options(options)
    with Meter("pairs") as meter:
        summary = jobs.features(
            output=output, kinds=named, progress=meter, expect=meter.expect, **options
        )
    finish(
        summary,
        as_json,
        f"{summary['features']} features of {summary['pairs']} pairs in "
        f"{summary['seconds']:.1f} s -> {output}",
    )
