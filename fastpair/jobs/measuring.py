"""`evaluate`: a model measured on labelled pairs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastpair.errors import DataError
from fastpair.formats import AS_FOUND, ReadOptions
from fastpair.ingest import EmbeddingSource, open_embeddings
from fastpair.jobs.inputs import Summary, load_model, refuse_embeddings, since
from fastpair.jobs.reporting import check_report, write_report
from fastpair.pairs import open_pairs, repeats_note
from fastpair.results import (
    SCORE_BLOCK,
)
from fastpair.spooling import received

if TYPE_CHECKING:
    pass


def evaluate(
    model: str | Path,
    embeddings: Path,
    pairs: Path,
    *,
    good: float | None = None,
    graded: bool = False,
    train: Path | None = None,
    by: Sequence[str] = (),
    bootstrap: int = 200,
    properties: bool = False,
    report: Path | None = None,
    entities: Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    left_column: str | None = None,
    right_column: str | None = None,
    label_column: str | None = None,
    keys: str = "auto",
    dataset: str | None = None,
    reading: ReadOptions = AS_FOUND,
    nonfinite: str = "refuse",
    threads: int | None = None,
) -> Summary:
    """Measure a model on labelled pairs, through the fold and the kernels that also score.

    Parameters
    ----------
    good : a label of at least this is a good pair.
    graded : labels are grades; also where the model scores in grades.
    train : the pairs that the model was trained on, keys to the same embeddings; pairs with both,
        one and no entity seen there are then measured apart, under ``entities``.
    by : columns of the pair file whose values are measured apart, under ``by``.
    bootstrap : draws for the intervals, 0: none.
    properties : measure symmetry, reflexivity and transitivity too, under ``properties``, and for
        the raw cosine under ``raw_cosine``.
    report : a page (.html) to write of what was found; needs matplotlib.
    entities : a table of what ids stand for, for the worst mistakes of the report.
    overwrite : whether a report that stands there may be replaced.
    seed : of the bootstrap and of samples.
    reading : what the pair files do not say themselves; of the embeddings `follow_links` alone.
    nonfinite : "refuse" (the default) embeddings that are not finite, or "nan": leave their pairs
        out.

    Returns
    -------
    summary : what `evaluation.measure` gives for the model, for the raw cosine under
        ``raw_cosine`` and for the unlabelled PCA under ``unlabelled_pca``; ``recall_at``.
    """
    from fastpair.comparison import breakdown, calibrated_cosine, compare, seen_breakdown
    from fastpair.isolation import without_isolated
    from fastpair.properties import measure_properties

    begun = time.perf_counter()
    check_report(report, entities, overwrite, [Path(model), embeddings, pairs, train])
    similarity = load_model(model)
    refuse_embeddings(similarity, model)
    named = (embeddings, pairs)
    embeddings, pairs = received(embeddings), received(pairs)
    source = open_embeddings(
        embeddings, dataset=dataset, options=reading.of_links, nonfinite=nonfinite
    )
    similarity.check_embeddings(source.shape[1])
    ids = source.ids
    columns: Summary = {"left_column": left_column, "right_column": right_column, "keys": keys}
    columns["options"] = reading
    graded = graded or similarity.unit == "grade"
    signed = good is None and not graded
    left, right, labels, extra, assumed = _labelled_and_more(
        pairs, source, by, label_column=label_column, signed_labels=signed, **columns
    )
    seen = None if train is None else _entities_seen(train, source, columns)
    vectors, pair_rows, kept_rows = source.read(), np.arange(len(left)), np.arange(source.shape[0])
    if source.isolated is not None and source.isolated.any():
        given = [left, right, labels, pair_rows, *extra]
        vectors, columns_left = without_isolated(vectors, source.isolated, given)
        left, right, labels, pair_rows, *extra = columns_left
        seen = None if seen is None else seen[~source.isolated]
        kept_rows = kept_rows[~source.isolated]
    repeats = repeats_note(left, right, labels)
    comparison = compare(
        similarity,
        vectors,
        left,
        right,
        labels,
        good=good,
        graded=graded,
        draws=bootstrap,
        seed=seed,
        threads=threads,
    )
    result = comparison.all_pairs()
    told = (source.assumed, source.isolated_note(), assumed, repeats, *result["notes"])
    notes = [note for note in told if note]
    result["recall_at"] = comparison.recall()
    if seen is not None:
        result["entities"] = seen_breakdown(comparison, seen[np.unique([left, right])])
    result["by"] = {}
    for name, values in zip(by, extra, strict=True):
        result["by"][name], rest = breakdown(comparison, values)
        if rest:
            notes.append(f"{name} has {rest} more values, rarer than those shown")
    if properties:
        result["properties"] = measure_properties(comparison.similarities["model"], seed=seed)
        before = calibrated_cosine(comparison)
        result["raw_cosine"]["properties"] = measure_properties(before, seed=seed)
    result = {**result, "unit": similarity.unit, "notes": notes}
    if report is not None:
        used = kept_rows[np.unique([left, right])]
        write_report(
            report,
            result,
            similarity,
            comparison,
            pair_rows=pair_rows,
            name_of=lambda entity: str(used[entity] if ids is None else ids[int(used[entity])]),
            entities=entities,
            model_name=model,
            files={
                "embeddings": (named[0], embeddings),
                "pairs": (named[1], pairs),
                "training pairs": None if train is None else (train, train),
            },
            options={"good": good, "graded": graded or None, "bootstrap": bootstrap, "seed": seed},
        )
        result["report"] = str(report)
    return {**result, "seconds": since(begun)}


def _labelled_and_more(
    path: Path, source: EmbeddingSource, names: Sequence[str], **columns: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray], str]:
    """Read left, right, labels (M,), further columns as text, and what was assumed of the file."""
    pairs = open_pairs(
        path, ids=source.ids, count=source.shape[0], want_labels=True, extra=names, **columns
    )
    if not pairs.has_labels:
        raise DataError(f"{path} has no column of labels: name it with --label")
    blocks = list(pairs.blocks(SCORE_BLOCK))
    left = np.concatenate([block.left for block in blocks])
    right = np.concatenate([block.right for block in blocks])
    labels = np.concatenate([block.label for block in blocks if block.label is not None])
    extra = [
        np.array(
            ["(none)" if v is None else str(v) for one in blocks for v in one.extra[n].to_pylist()],
            dtype=object,
        )
        for n in range(len(names))
    ]
    return left, right, labels, extra, pairs.assumed


def _entities_seen(train: Path, source: EmbeddingSource, columns: dict[str, Any]) -> np.ndarray:
    """Return which rows are in a pair of the file, (N,) bool."""
    pairs = open_pairs(train, ids=source.ids, count=source.shape[0], **columns)
    seen = np.zeros(source.shape[0], bool)
    for block in pairs.blocks(SCORE_BLOCK):
        seen[block.left] = seen[block.right] = True
    return seen
