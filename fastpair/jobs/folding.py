"""`convert`, `project` and `features`: embeddings in, HDF5, a table or features out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastpair.backend import memory_budget
from fastpair.errors import ArgumentError
from fastpair.export import FeatureBlock, write_features
from fastpair.export import convert as convert_file
from fastpair.files import TableWriter, describe
from fastpair.folding import Folder
from fastpair.formats import AS_FOUND, ReadOptions
from fastpair.ingest import open_embeddings
from fastpair.jobs.inputs import (
    Count,
    Summary,
    expect_hdf5,
    file_fingerprint,
    holds_labels,
    ignore,
    load_model,
    own_source,
    refuse_embeddings,
    since,
)
from fastpair.listing import export_format
from fastpair.pairs import open_pairs
from fastpair.spooling import received
from fastpair.staging import check_output

if TYPE_CHECKING:
    from fastpair.ingest import EmbeddingSource
    from fastpair.model import Model

FOLDED_AT_ONCE = 1 << 22
"""Numbers of embeddings that are folded together: 32 MiB in float64."""

FEATURES_AT_ONCE = 1 << 24
"""Features that are computed and written together: 64 MiB."""


def convert(
    source: Path,
    output: Path,
    *,
    kind: str | None = None,
    dataset: str | None = None,
    left_column: str | None = None,
    right_column: str | None = None,
    label_column: str | None = None,
    reading: ReadOptions = AS_FOUND,
    overwrite: bool = False,
) -> Summary:
    """Bring embeddings or pairs of any accepted format into HDF5, ids kept as they are.

    Parameters
    ----------
    kind : "embeddings" or "pairs"; default: by content.
    reading : what the source does not say itself.
    """
    expect_hdf5(output)
    source = received(source)
    written = convert_file(
        source,
        output,
        kind=kind or "auto",
        dataset=dataset,
        left=left_column,
        right=right_column,
        label=label_column,
        options=reading,
        overwrite=overwrite,
    )
    found = describe(output)
    datasets = found["datasets"]
    shape = datasets[written if written in datasets else "left"]["shape"]
    return {"kind": written, "output": str(output), "shape": shape, "ids": found["ids"]}


def project(
    model: str | Path,
    embeddings: Path | None,
    output: Path,
    *,
    precision: str = "float32",
    side: str = "both",
    dataset: str | None = None,
    reading: ReadOptions = AS_FOUND,
    nonfinite: str = "refuse",
    threads: int | None = None,
    memory: str | int | None = None,
    overwrite: bool = False,
    cluster: Any = None,
    resume: bool = False,
    progress: Count = ignore,
    expect: Callable[[int | None], None] | None = None,
) -> Summary:
    """Fold embeddings through a model into a table, in blocks.

    Parameters
    ----------
    model : a model file or the name of a built-in similarity.
    embeddings : a file of any accepted format; None for a model with tables of its own.
    precision : "float32", "float16", "bfloat16" or "int8".
    side : "left" or "right" in asymmetric models and models of two tables: whose entities.
    reading : what the embeddings do not say themselves.
    nonfinite : "refuse" (the default) embeddings that are not finite, or "nan": they score NaN.
    threads : default one for each processor.
    memory : bounds the blocks.
    cluster : a ``distributed.Client``, or what `fastpair.distributed.connected` gives: its workers
        fold, `threads` and `memory` are those of each task; see `fastpair.jobs.cluster_folding`.
    resume : on a cluster, go on with what an interrupted run left.
    """
    if resume and cluster is None:
        raise ArgumentError("--resume of a projection goes with --scheduler or --workers")
    similarity = load_model(model)
    expect_hdf5(output)
    inputs = [Path(path) for path in (embeddings, model) if path is not None]
    check_output(Path(output), overwrite=overwrite, inputs=inputs)
    asked: Summary = {"model": model, "embeddings": embeddings, "precision": precision}
    asked |= {"side": side, "dataset": dataset, "reading": reading, "nonfinite": nonfinite}
    if cluster is not None:
        from fastpair.jobs.cluster_folding import project_on_cluster

        options: Summary = {"threads": threads, "memory": memory}
        options |= {"overwrite": overwrite, "resume": resume}
        return project_on_cluster(cluster, asked, Path(output), progress, expect, **options)
    begun = time.perf_counter()
    if embeddings is not None:
        refuse_embeddings(similarity, model)
        asked["embeddings"] = received(embeddings)
    source, folder, made_from = open_projection(similarity, threads=threads, **asked)
    tables, (count, columns) = similarity.tables, source.shape
    width = max(columns, folder.plan.layout.row_bytes // 4)
    step = max(1, min(FOLDED_AT_ONCE, memory_budget(memory) // 64) // width)
    if expect is not None:
        expect(count * (2 if folder.needs_survey else 1))
    if folder.needs_survey:
        for _, block in source.blocks(step):
            folder.survey(block)
            progress(len(block))
    with table_writer(
        similarity, asked, source, folder, made_from, output, overwrite=overwrite
    ) as table:
        for start, block in source.blocks(step):
            table.write(start, folder.fold(block, start))
            progress(len(block))
        if source.isolated is not None and source.isolated.any():
            table.isolate(np.flatnonzero(source.isolated))
        if tables is not None:
            table.write_unknown(folder.fold(tables.of(side).unknown[None]))
    return summary_of(similarity, source, folder, output, begun)


def table_writer(
    similarity: Model,
    asked: Summary,
    source: EmbeddingSource,
    folder: Folder,
    made_from: dict[str, str] | None,
    output: Path,
    *,
    overwrite: bool,
) -> TableWriter:
    """Return what writes the table of a projection; `asked` are its options."""
    return TableWriter(
        output,
        source.shape[0],
        folder.plan,
        ids=source.ids,
        fingerprint=similarity.fingerprint(),
        model_name=Path(asked["model"]).name,
        side=asked["side"],
        unit=similarity.unit,
        threshold=similarity.threshold,
        calibration=similarity.calibration,
        made_from=made_from,
        overwrite=overwrite,
    )


def open_projection(
    similarity: Model,
    *,
    model: str | Path,
    embeddings: Path | None,
    precision: str,
    side: str,
    dataset: str | None,
    reading: ReadOptions,
    nonfinite: str,
    threads: int | None,
) -> tuple[EmbeddingSource, Folder, dict[str, str] | None]:
    """Return what is folded, what folds it, and what a table tells of its origin."""
    if embeddings is None:
        if (dataset, reading, nonfinite) != (None, AS_FOUND, "refuse"):
            raise ArgumentError(
                "--dataset, --nonfinite and options of reading go with EMBEDDINGS, which are not "
                "given"
            )
        source, side, made_from = own_source(similarity, model, side), "both", None
    else:
        refuse_embeddings(similarity, model)
        source = open_embeddings(embeddings, dataset=dataset, options=reading, nonfinite=nonfinite)
        made_from = {"embeddings_fingerprint": file_fingerprint(embeddings)}
    folder = Folder(similarity, source.shape[1], precision, side=side, threads=threads)
    return source, folder, made_from


def summary_of(
    similarity: Model, source: EmbeddingSource, folder: Folder, output: Path, begun: float
) -> Summary:
    """Return what is told of a table that was made."""
    return {
        "output": str(output),
        "rows": source.shape[0],
        "row_bytes": folder.plan.layout.row_bytes,
        "precision": folder.plan.precision,
        "raw_error_bound": folder.raw_error_bound(),
        "unit": similarity.unit,
        "seconds": time.perf_counter() - begun,
        "notes": [note for note in (source.assumed, source.isolated_note()) if note],
    }


def features(
    model: str | Path,
    embeddings: Path,
    pairs: Path,
    output: Path,
    *,
    kinds: Sequence[str] | None = None,
    left_column: str | None = None,
    right_column: str | None = None,
    label_column: str | None = None,
    keys: str = "auto",
    dataset: str | None = None,
    reading: ReadOptions = AS_FOUND,
    nonfinite: str = "refuse",
    threads: int | None = None,
    overwrite: bool = False,
    progress: Count = ignore,
    expect: Callable[[int | None], None] | None = None,
) -> Summary:
    """Write the symmetric features of pairs, as input for any other prediction model.

    Parameters
    ----------
    model : a model file or the name of a built-in similarity.
    output : ``.parquet``, a column for each feature, or ``.h5`` / ``.hdf5``, one array.
    kinds : names of `fastpair.features.KINDS`; default: all.
    reading : what the pairs do not say themselves; of the embeddings `follow_links` alone.
    nonfinite : "refuse" (the default) embeddings that are not finite, or "nan": so are the features
        of their pairs.
    """
    from fastpair.features import KINDS, PairFeatures
    from fastpair.isolation import isolated_pairs

    similarity = load_model(model)
    refuse_embeddings(similarity, model)
    output = Path(output)
    if export_format(output) != ".parquet":
        expect_hdf5(output)
    inputs = [Path(path) for path in (model, embeddings, pairs)]
    check_output(output, overwrite=overwrite, inputs=inputs)
    begun = time.perf_counter()
    embeddings, pairs = received(embeddings), received(pairs)
    source = open_embeddings(
        embeddings, dataset=dataset, options=reading.of_links, nonfinite=nonfinite
    )
    compute = PairFeatures(similarity, source.shape[1], kinds or KINDS, threads=threads)
    columns = {"left_column": left_column, "right_column": right_column, "keys": keys}
    opened: Summary = {"ids": source.ids, "count": source.shape[0], **columns, "options": reading}
    asked = {**columns, "label_column": label_column, "options": reading}
    has_labels = holds_labels(pairs, source, asked)
    listed = open_pairs(pairs, **opened, label_column=label_column, want_labels=has_labels)
    if expect is not None:
        expect(listed.count)
    vectors = source.read()

    step = max(1, FEATURES_AT_ONCE // len(compute.names))

    def blocks() -> Iterator[FeatureBlock]:
        for block in listed.blocks(step, keep_keys=True):
            values = compute(vectors[block.left], vectors[block.right])
            spoiled = isolated_pairs(block.left, block.right, (source.isolated,) * 2)
            if spoiled is not None:
                values[spoiled] = np.nan
            yield FeatureBlock(block, values)
            progress(len(block.left))

    write_features(
        output,
        blocks(),
        listed.count,
        compute.names,
        keys=listed.names,
        label=has_labels,
        attributes={"model_fingerprint": similarity.fingerprint()},
        overwrite=overwrite,
    )
    return {
        "output": str(output),
        "pairs": listed.count,
        "features": len(compute.names),
        "labels": has_labels,
        "seconds": since(begun),
        "notes": [note for note in (source.isolated_note(), listed.assumed) if note],
    }
