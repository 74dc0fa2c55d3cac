"""The commands as functions: files in, files out, a summary of plain numbers and words back.

Each function is what one command of ``fastpair`` calls. Summaries hold only what JSON can hold;
``notes`` are sentences for the reader. ``progress`` is called with numbers of pairs or rows done
and ``expect`` with how many there are.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fastpair.backend import LEAST_MEMORY, memory_budget
from fastpair.errors import ArgumentError, DataError, MemoryBudgetError, MismatchError
from fastpair.evaluation import evaluate_scores, raw_cosine
from fastpair.export import convert as convert_file
from fastpair.export import export_format, write_scored_pairs
from fastpair.files import Table, TableWriter, describe, read_model, read_table, write_model
from fastpair.folding import Folder, fold
from fastpair.formats import Arrays, open_format
from fastpair.hdf5 import Hdf5Arrays
from fastpair.ingest import EmbeddingSource, open_embeddings
from fastpair.model import BUILTINS, Model, builtin
from fastpair.pairs import KEY_BYTES, PairBlock, PairSource, open_pairs
from fastpair.results import (
    SCORE_BLOCK,
    DenseWriter,
    ScoreFile,
    SparseWriter,
    TopKWriter,
    write_filtered_scores,
    write_histogram,
)
from fastpair.scoring import PairScorer, meet
from fastpair.staging import check_output

Summary = dict[str, Any]
Count = Callable[[int], None]

FOLDED_AT_ONCE = 1 << 22
"""Numbers of embeddings that are folded together: 32 MiB in float64."""

EXPORTED_AT_ONCE = SCORE_BLOCK // 8
"""Pairs whose keys are held while scores are written as CSV or Parquet."""

BLOCKS_UNDER_WAY = 4
"""Blocks of pairs in memory at once: one read, one waiting, one scored, one written."""


def _ignore(_: int) -> None:
    """Progress that nobody watches."""


def load_model(name: str | Path) -> Model:
    """Return a built-in similarity by its name, or the model in a file."""
    if str(name) in BUILTINS:
        return builtin(str(name))
    if not Path(name).exists() and Path(name).parent == Path() and not Path(name).suffix:
        known = ", ".join(BUILTINS)
        raise ArgumentError(f"{name} is neither a model file nor one of {known}")
    return read_model(name)


def convert(
    source: Path,
    output: Path,
    *,
    kind: str | None = None,
    dataset: str | None = None,
    left_column: str | None = None,
    right_column: str | None = None,
    label_column: str | None = None,
    overwrite: bool = False,
) -> Summary:
    """Bring embeddings or pairs of any accepted format into HDF5, ids kept as they are.

    Parameters
    ----------
    kind : "embeddings" or "pairs"; default: by content.
    """
    _expect_hdf5(output)
    written = convert_file(
        source,
        output,
        kind=kind or "auto",
        dataset=dataset,
        left=left_column,
        right=right_column,
        label=label_column,
        overwrite=overwrite,
    )
    found = describe(output)
    datasets = found["datasets"]
    shape = datasets[written if written in datasets else "left"]["shape"]
    return {"kind": written, "output": str(output), "shape": shape, "ids": found["ids"]}


# --- learning -------------------------------------------------------------------------------------


def train(
    embeddings: Path,
    pairs: Path,
    output: Path,
    *,
    valid: Path | None = None,
    good: float | None = None,
    graded: bool = False,
    left_column: str | None = None,
    right_column: str | None = None,
    label_column: str | None = None,
    keys: str = "auto",
    dataset: str | None = None,
    overwrite: bool = False,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    **settings: Any,
) -> Summary:
    """Learn a similarity from labelled pairs and write it as a model.

    Parameters
    ----------
    embeddings, pairs, valid : files of any accepted format.
    good : a label of at least this is a good pair.
    graded : labels are grades and the grade itself is learned.
    settings : head, dim, loss, epochs, batch, learning_rate and seed of `training.train`; those
        that are None keep their defaults.

    Raises
    ------
    FastpairError : files or labels cannot be learned from; nothing is written.
    """
    from fastpair.training import train as fit

    if graded and good is not None:
        raise ArgumentError("--good makes labels good or bad, --graded learns grades: choose one")
    inputs = [Path(path) for path in (embeddings, pairs, valid) if path is not None]
    check_output(Path(output), overwrite=overwrite, inputs=inputs)
    begun = time.perf_counter()
    source = open_embeddings(embeddings, dataset=dataset)
    columns = {
        "left_column": left_column,
        "right_column": right_column,
        "label_column": label_column,
        "keys": keys,
    }
    signed = good is None and not graded
    left, right, labels, assumed = labelled_pairs(pairs, source, signed, **columns)
    held = None
    if valid is not None:
        held_left, held_right, held_labels, _ = labelled_pairs(valid, source, signed, **columns)
        held = (held_left, held_right, truth(held_labels, good, graded, valid))
    result = fit(
        source.read(),
        left,
        right,
        truth(labels, good, graded, pairs),
        valid=held,
        graded=graded,
        on_epoch=on_epoch,
        **{name: value for name, value in settings.items() if value is not None},
    )
    write_model(output, result.model, overwrite=overwrite)
    return {
        "output": str(output),
        "fingerprint": result.model.fingerprint(),
        "n_pairs": len(labels),
        "seconds": time.perf_counter() - begun,
        "unit": result.model.unit,
        "threshold": result.model.threshold,
        "validation": result.validation,
        "history": result.history,
        "notes": [note for note in (source.assumed, assumed, *result.notes) if note],
    }


def labelled_pairs(
    path: Path, source: EmbeddingSource, signed_labels: bool, **columns: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Read left rows, right rows and labels (M,) of a pair file, and what was assumed of it.

    With `signed_labels`, labels that are all -1 or 1 become 0 and 1.
    """
    pairs = open_pairs(
        path,
        ids=source.ids,
        count=source.shape[0],
        want_labels=True,
        signed_labels=signed_labels,
        **columns,
    )
    blocks = list(pairs.blocks(SCORE_BLOCK))
    if not pairs.has_labels:
        raise DataError(f"{path} has no column of labels: name it with --label")
    labels = np.concatenate([block.label for block in blocks if block.label is not None])
    left = np.concatenate([block.left for block in blocks])
    right = np.concatenate([block.right for block in blocks])
    return left, right, labels, pairs.assumed


def truth(labels: np.ndarray, good: float | None, graded: bool, path: Path) -> np.ndarray:
    """Turn labels into what is learned: 0 and 1, or the grades as they are.

    Raises
    ------
    DataError : labels are grades and nobody said from which on a pair is good.
    """
    if graded:
        return labels
    if good is not None:
        if np.isnan(good):
            raise ArgumentError("good is NaN, expected a number")
        return (labels >= good).astype(np.float64)
    if not np.isin(labels, (0, 1)).all():
        odd = labels[~np.isin(labels, (0, 1))][0]
        raise DataError(
            f"{path} has the label {odd:g}, expected 0 (bad) or 1 (good): say --good X (X or more "
            "is good) or --graded"
        )
    return labels


def evaluate(
    model: str | Path,
    embeddings: Path,
    pairs: Path,
    *,
    good: float | None = None,
    graded: bool = False,
    left_column: str | None = None,
    right_column: str | None = None,
    label_column: str | None = None,
    keys: str = "auto",
    dataset: str | None = None,
    threads: int | None = None,
) -> Summary:
    """Measure a model on labelled pairs, through the fold and the kernels that also score.

    Returns
    -------
    summary : auc, average_precision, spearman, n_pairs, n_good and what the threshold gives;
        the same for the raw cosine under ``raw_cosine``.
    """
    similarity = load_model(model)
    source = open_embeddings(embeddings, dataset=dataset)
    left, right, labels, assumed = labelled_pairs(
        pairs,
        source,
        good is None and not graded,
        left_column=left_column,
        right_column=right_column,
        label_column=label_column,
        keys=keys,
    )
    similarity.check_embeddings(source.shape[1])
    vectors = source.read()
    used, places = np.unique(np.concatenate([left, right]), return_inverse=True)
    rows, plan = fold(similarity, vectors[used], threads=threads)
    scores = PairScorer(rows, plan, threads=threads)(places[: len(left)], places[len(left) :])
    graded = graded or similarity.unit == "grade"
    options: Summary = {"good": good, "graded": graded}
    result = evaluate_scores(
        scores, labels, threshold=similarity.threshold, unit=similarity.unit, **options
    )
    result["raw_cosine"] = evaluate_scores(raw_cosine(vectors, left, right), labels, **options)
    result["notes"] = [note for note in (source.assumed, assumed, *result["notes"]) if note]
    return result


# --- folding --------------------------------------------------------------------------------------


def project(
    model: str | Path,
    embeddings: Path,
    output: Path,
    *,
    precision: str = "float32",
    dataset: str | None = None,
    threads: int | None = None,
    memory: str | int | None = None,
    overwrite: bool = False,
    progress: Count = _ignore,
    expect: Callable[[int | None], None] | None = None,
) -> Summary:
    """Fold embeddings through a model into a table, in blocks.

    Parameters
    ----------
    model : a model file or the name of a built-in similarity.
    precision : "float32", "float16", "bfloat16" or "int8".
    threads : default one for each processor.
    memory : bounds the blocks.
    """
    similarity = load_model(model)
    _expect_hdf5(output)
    check_output(Path(output), overwrite=overwrite, inputs=[Path(embeddings), Path(model)])
    begun = time.perf_counter()
    source = open_embeddings(embeddings, dataset=dataset)
    count, columns = source.shape
    folder = Folder(similarity, columns, precision, threads=threads)
    width = max(columns, folder.plan.layout.row_bytes // 4)
    step = max(1, min(FOLDED_AT_ONCE, memory_budget(memory) // 64) // width)
    if expect is not None:
        expect(count * (2 if folder.needs_survey else 1))
    if folder.needs_survey:
        for _, block in source.blocks(step):
            folder.survey(block)
            progress(len(block))
    with TableWriter(
        output,
        count,
        folder.plan,
        ids=source.ids,
        fingerprint=similarity.fingerprint(),
        model_name=Path(model).name,
        unit=similarity.unit,
        threshold=similarity.threshold,
        overwrite=overwrite,
    ) as table:
        for start, block in source.blocks(step):
            table.write(start, folder.fold(block, start))
            progress(len(block))
    return {
        "output": str(output),
        "rows": count,
        "row_bytes": folder.plan.layout.row_bytes,
        "precision": precision,
        "raw_error_bound": folder.raw_error_bound(),
        "unit": similarity.unit,
        "seconds": time.perf_counter() - begun,
        "notes": [source.assumed],
    }


# --- scoring --------------------------------------------------------------------------------------


def score(
    table: Path,
    pairs: Path,
    output: Path,
    *,
    against: Path | None = None,
    min_score: float | None = None,
    left_column: str | None = None,
    right_column: str | None = None,
    keys: str = "auto",
    dataset: str | None = None,
    threads: int | None = None,
    memory: str | int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Count = _ignore,
    expect: Callable[[int | None], None] | None = None,
) -> Summary:
    """Score the pairs of a file and write the scores in its order.

    Parameters
    ----------
    table : table of the left entities, and of the right ones unless `against` is given.
    pairs : file of any accepted format.
    output : ``.h5`` / ``.hdf5``, ``.parquet``, ``.csv`` or ``.tsv`` (also ``.gz``).
    min_score : keep only pairs that score at least this; default: all.
    memory : what may be allocated, the tables included.
    resume : go on with what an interrupted run left.

    Raises
    ------
    FastpairError : anything that cannot be used; an existing output is left as it was.
    """
    if min_score is not None and not np.isfinite(min_score):
        raise ArgumentError(f"min_score is {min_score}, expected a finite number")
    output = Path(output)
    suffix = export_format(output)
    if suffix is None:
        _expect_hdf5(output)
    inputs = [Path(path) for path in (table, pairs, against) if path is not None]
    check_output(output, overwrite=overwrite, inputs=inputs)
    begun = time.perf_counter()
    left, right, budget = _load_tables(table, against, memory)
    both = right or left
    source = open_pairs(
        pairs,
        ids=left.ids,
        count=len(left.rows),
        right_ids=both.ids,
        right_count=len(both.rows),
        left_column=left_column,
        right_column=right_column,
        keys=keys,
        dataset=dataset,
    )
    _check_room(budget, source)
    if expect is not None:
        expect(source.count)
    scorer = PairScorer(
        left.rows,
        left.plan,
        None if right is None else right.rows,
        None if right is None else right.plan,
        threads=threads,
    )
    identity = {
        "table": left.digest,
        "right table": both.digest,
        "pair file": file_identity(pairs),
        "columns": f"{source.names[0]}, {source.names[1]}, {source.keys}",
        "dataset": str(dataset),
        "kernels": _kernel_digest(),
        "device": "cpu",
    }
    attributes = {"unit": left.unit, "model_fingerprint": left.fingerprint}
    scoring_begun = time.perf_counter()
    with ScoreFile(
        output, source.count, identity, attributes=attributes, overwrite=overwrite, resume=resume
    ) as file:
        try:
            resumed = _score_blocks(file, source, scorer, progress)
        except DataError:
            file.discard()  # no resume can mend the pair file
            raise
        scoring_seconds = time.perf_counter() - scoring_begun
        kept = source.count
        if suffix is None and min_score is None:
            file.finish()
        else:
            kept = _export(file, source, output, suffix, min_score, attributes, overwrite)
    return {
        "output": str(output),
        "pairs": source.count,
        "kept": kept,
        "resumed_from": resumed,
        "seconds": time.perf_counter() - begun,
        "scoring_seconds": scoring_seconds,
        "pairs_per_second": (source.count - resumed) / max(scoring_seconds, 1e-9),
        "threads": scorer.threads,
        "unit": left.unit,
        "keys": source.keys,
        "notes": [source.assumed] if source.assumed else [],
    }


def _load_tables(
    table: Path, against: Path | None, memory: str | int | None
) -> tuple[Table, Table | None, int]:
    """Read one or two tables that belong together; return also the memory that is left."""
    budget = memory_budget(memory)
    paths = [Path(table)] if against is None else [Path(table), Path(against)]
    sizes = [path.stat().st_size if path.is_file() else 0 for path in paths]
    if sum(sizes) > budget:
        raise MemoryBudgetError(
            f"the tables take {sum(sizes)} bytes, more than the {budget} bytes of memory allowed: "
            "allow more with --memory or project with a smaller --precision"
        )
    left = read_table(paths[0])
    right = read_table(paths[1]) if against is not None else None
    if right is not None:
        if right.fingerprint != left.fingerprint:
            raise MismatchError(
                f"{against} was made by the model {right.model_name!r} and {table} by "
                f"{left.model_name!r}: project both with one model"
            )
        rows = meet(left.rows, left.plan, right.rows, right.plan, in_place=True)
        left = replace(left, rows=rows[0], plan=rows[2])
        right = replace(right, rows=rows[1], plan=rows[2])
    return left, right, budget - sum(sizes)


def _check_room(budget: int, source: PairSource) -> None:
    """Refuse a run whose blocks of pairs do not fit beside the tables."""
    needed = min(source.count, SCORE_BLOCK) * (source.bytes_a_pair() + 4) * BLOCKS_UNDER_WAY
    if source.keys == "ids":
        needed += 2 * KEY_BYTES
    if needed > budget:
        raise MemoryBudgetError(
            f"blocks of pairs need {needed} bytes beside the tables, but --memory leaves {budget}: "
            f"allow {needed - budget} more"
        )


def _score_blocks(file: ScoreFile, source: PairSource, scorer: PairScorer, progress: Count) -> int:
    """Score all blocks that are not done; return the pair at which that began."""
    undone = np.flatnonzero(~file.done)
    if not len(undone):
        progress(source.count)
        return source.count
    start = int(undone[0]) * SCORE_BLOCK
    progress(start)
    for block, scores in scorer.stream(source.blocks(SCORE_BLOCK, start)):
        file.write_block(block.start // SCORE_BLOCK, scores)
        progress(len(scores))
    return start


def _export(
    file: ScoreFile,
    source: PairSource,
    output: Path,
    suffix: str | None,
    min_score: float | None,
    attributes: Summary,
    overwrite: bool,
) -> int:
    """Write the staged scores as what was asked for, with the keys of the pair file."""

    def scored() -> Iterator[tuple[PairBlock, np.ndarray, np.ndarray]]:
        of_block, scores = -1, np.empty(0, dtype=np.float32)
        for block in source.blocks(EXPORTED_AT_ONCE, keep_keys=suffix is not None):
            number, first = divmod(block.start, SCORE_BLOCK)
            if number != of_block:
                of_block, scores = number, file.read_block(number)
            part = scores[first : first + len(block.left)]
            kept = np.arange(len(part))
            if min_score is not None:
                kept = np.flatnonzero(part.astype(np.float64) >= min_score)
            yield block, part, kept

    def with_keys() -> Iterator[tuple[Any, Any, np.ndarray]]:
        for block, scores, kept in scored():
            assert block.left_keys is not None
            assert block.right_keys is not None
            yield block.left_keys.take(kept), block.right_keys.take(kept), scores[kept]

    if suffix is not None:
        written = write_scored_pairs(output, with_keys(), names=source.names, overwrite=overwrite)
    else:
        written = write_filtered_scores(
            output,
            (
                (block.start + kept, block.left[kept], block.right[kept], scores[kept])
                for block, scores, kept in scored()
            ),
            attributes={**attributes, "min_score": min_score},
            overwrite=overwrite,
        )
    file.discard()
    return written


def file_identity(path: Path) -> str:
    """What tells a large input from another one without reading it: its size, times and ends."""
    path = Path(path)
    about = path.stat()
    digest = hashlib.sha256(f"{about.st_size} {about.st_mtime_ns} ".encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, about.st_size - (1 << 20)))
        digest.update(file.read())
    return digest.hexdigest()


def _kernel_digest() -> str:
    from fastpair.kernels.simd import kernel_digest

    return kernel_digest()


def _expect_hdf5(output: Path) -> None:
    if Path(output).suffix.lower() not in (".h5", ".hdf5"):
        raise ArgumentError(
            f"the output {output} ends in {Path(output).suffix!r}, expected .h5 or .hdf5 here"
        )


# --- all pairs ------------------------------------------------------------------------------------


def matrix(
    table: Path,
    output: Path,
    *,
    top_k: int | None = None,
    threshold: float | None = None,
    dense: bool = False,
    histogram: bool = False,
    bins: int | None = None,
    against: Path | None = None,
    threads: int | None = None,
    memory: str | int | None = None,
    overwrite: bool = False,
    progress: Count = _ignore,
    expect: Callable[[int | None], None] | None = None,
) -> Summary:
    """Score all pairs of one table or of two, and write what is asked for.

    Parameters
    ----------
    top_k, threshold, dense, histogram : exactly one of them; `bins` goes with the last.
    memory : what may be allocated, the tables included.
    """
    from fastpair.matrix import AllPairs

    chosen = (top_k is not None, threshold is not None, dense, histogram)
    if sum(chosen) != 1:
        raise ArgumentError("choose one of top_k, threshold, dense and histogram")
    if bins is not None and not histogram:
        raise ArgumentError(f"bins is {bins} but goes with histogram alone")
    _expect_hdf5(output)
    inputs = [Path(path) for path in (table, against) if path is not None]
    check_output(Path(output), overwrite=overwrite, inputs=inputs)
    begun = time.perf_counter()
    left, right, budget = _load_tables(table, against, memory)
    both = right or left
    walked = len(left.rows) * len(both.rows)
    if expect is not None:
        expect(walked * (2 if histogram else 1))
    if budget < LEAST_MEMORY:
        raise MemoryBudgetError(
            f"--memory leaves {budget} bytes beside the tables, but all pairs need at least "
            f"{LEAST_MEMORY}: allow more"
        )
    pairs = AllPairs(
        left.rows,
        None if right is None else right.rows,
        left.plan,
        threads=threads,
        memory=budget,
        progress=progress,
    )
    found: Summary = {}
    common: Summary = {
        "attributes": {"unit": left.unit, "model_fingerprint": left.fingerprint},
        "overwrite": overwrite,
    }
    ids: Summary = {"ids": left.ids, "ids_right": None if right is None else right.ids}
    scoring_begun = time.perf_counter()
    if top_k is not None:
        with TopKWriter(output, (len(left.rows), top_k), **ids, **common) as best:
            for first, scores, indices in pairs.top_k(top_k):
                best.write(first, indices, scores)
        found = {"k": top_k}
    elif threshold is not None:
        common["attributes"]["threshold"] = threshold
        kept = 0
        with SparseWriter(output, (len(left.rows), len(both.rows)), **ids, **common) as sparse:
            for _, counts, indices, scores in pairs.above(threshold):
                sparse.append(counts, indices, scores)
                kept += len(indices)
        found = {"kept": kept}
    elif dense:
        with DenseWriter(output, (len(left.rows), len(both.rows)), **ids, **common) as full:
            for first, scores in pairs.dense():
                full.write(first, 0, scores)
    else:
        edges, counts = pairs.histogram(bins or 100)
        write_histogram(output, edges, counts, **common)
        found = {"edges": edges.tolist(), "counts": counts.tolist()}
    seconds = time.perf_counter() - scoring_begun
    return {
        "output": str(output),
        "pairs": walked,
        **found,
        "seconds": time.perf_counter() - begun,
        "pairs_per_second": walked / max(seconds, 1e-9),
        "threads": pairs.threads,
        "unit": left.unit,
    }


def info(file: Path) -> Summary:
    """Say what a file is and whether it is whole.

    Returns
    -------
    summary : ``summary`` (a sentence), ``kind`` (None for files of others), ``datasets`` (shape
        and type by name), ``attributes``, ``ids``, ``whole`` (None where nothing tells).
    """
    found = open_format(file)
    if isinstance(found, Hdf5Arrays):
        return describe(file)
    if isinstance(found, Arrays):
        entries = {
            name: (list(shape), str(dtype)) for name, (shape, dtype) in found.entries.items()
        }
    else:
        rows = found.count_rows(found.names)
        entries = {name: ([rows], str(found.type_of(name))) for name in found.names}
    return {
        "path": str(file),
        "kind": None,
        "datasets": {name: {"shape": s, "dtype": t} for name, (s, t) in entries.items()},
        "attributes": {},
        "ids": False,
        "whole": None,
        "summary": f"a file of {found.format_name} with {', '.join(map(str, entries))}",
    }
