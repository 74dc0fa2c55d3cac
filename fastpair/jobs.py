"""The commands as functions: files in, files out, a summary of plain numbers and words back.

Each function is what one command of ``fastpair`` calls. Summaries hold only what JSON can hold;
``notes`` are sentences for the reader. ``progress`` is called with numbers of pairs or rows done
and ``expect`` with how many there are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fastpair.backend import LEAST_MEMORY, memory_budget, read_ahead, thread_count
from fastpair.errors import ArgumentError, DataError, MemoryBudgetError, MismatchError
from fastpair.export import FeatureBlock, export_format, write_features, write_scored_pairs
from fastpair.export import convert as convert_file
from fastpair.files import Table, TableWriter, describe, read_model, read_table, write_model
from fastpair.folding import Folder
from fastpair.formats import Arrays, open_format
from fastpair.hdf5 import Hdf5Arrays
from fastpair.ingest import EmbeddingSource, open_embeddings
from fastpair.model import BUILTINS, Model, builtin, sigmoid
from fastpair.pairs import PairBlock, PairSource, open_pairs, open_raw_pairs
from fastpair.results import (
    SCORE_BLOCK,
    DenseWriter,
    ScoreFile,
    SparseWriter,
    TopKWriter,
    write_filtered_scores,
    write_histogram,
)
from fastpair.scoring import PairScorer, distance_form, meet
from fastpair.staging import check_output, writing

Summary = dict[str, Any]
Count = Callable[[int], None]

FOLDED_AT_ONCE = 1 << 22
"""Numbers of embeddings that are folded together: 32 MiB in float64."""

FEATURES_AT_ONCE = 1 << 24
"""Features that are computed and written together: 64 MiB."""
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
    weight_column: str | None = None,
    keys: str = "auto",
    dataset: str | None = None,
    resume: bool = False,
    log: Path | None = None,
    overwrite: bool = False,
    on_estimate: Callable[[float], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    **settings: Any,
) -> Summary:
    """Learn a similarity from labelled pairs and write it as a model.

    Parameters
    ----------
    embeddings, pairs, valid : files of any accepted format.
    good : a label of at least this is a good pair.
    graded : labels are grades and the grade itself is learned.
    weight_column : column of `pairs` that says how much each of them counts.
    resume : go on from where an interrupted training of the same output stopped.
    log : file for one line of JSON an epoch.
    on_estimate : called with about how many seconds learning will take.
    on_epoch : called with each epoch's entry of the history.
    settings : the other settings of `training.train`; those that are None keep their defaults.

    Raises
    ------
    FastpairError : files or labels cannot be learned from; nothing is written.
    """
    from fastpair.checkpoints import FileCheckpoint
    from fastpair.training import train as fit

    if graded and good is not None:
        raise ArgumentError("--good makes labels good or bad, --graded learns grades: choose one")
    inputs = [Path(path) for path in (embeddings, pairs, valid) if path is not None]
    check_output(Path(output), overwrite=overwrite, inputs=inputs)
    if log is not None:
        check_output(log, overwrite=overwrite or resume, inputs=inputs)
        if Path(log).resolve() == Path(output).resolve():
            raise ArgumentError(f"--log and --output are both {output}: give the log its own name")
    begun = time.perf_counter()
    source = open_embeddings(embeddings, dataset=dataset)
    columns: Summary = {
        "left_column": left_column,
        "right_column": right_column,
        "label_column": label_column,
        "keys": keys,
        "signed_labels": good is None and not graded,
    }
    sampled = settings.get("loss") == "sampled"
    given = _pairs_to_learn(pairs, source, weight_column, sampled, columns)
    left, right, labels, weights, assumed = given
    held = None
    if valid is not None:
        held_left, held_right, held_labels, *_ = _pairs_to_learn(
            valid, source, None, sampled, columns
        )
        held = (held_left, held_right, truth(held_labels, good, graded, valid))
    true = truth(labels, good, graded, pairs)
    if good is not None and not true.any():
        raise DataError(
            f"all {len(labels)} pairs are bad: --good is {good:g} but the largest label is "
            f"{labels.max(initial=-np.inf):g}"
        )
    checkpoint = FileCheckpoint(Path(output), resume=resume)
    state = checkpoint.load()
    anew = "there was nothing to continue: training began anew" if resume and not state else ""
    with contextlib.ExitStack() as stack:
        result = fit(
            source.read(),
            left,
            right,
            true,
            valid=held,
            weights=weights,
            graded=graded,
            on_estimate=on_estimate,
            on_epoch=logging_epochs(log, state[0]["history"] if state else [], stack, on_epoch),
            checkpoint=checkpoint,
            **{name: value for name, value in settings.items() if value is not None},
        )
    write_model(output, result.model, overwrite=overwrite)
    checkpoint.remove()
    kept: Summary = next((arm for arm in result.arms if arm["kept"]), {})
    return {
        "output": str(output),
        "fingerprint": result.model.fingerprint(),
        "n_pairs": len(labels),
        "seconds": time.perf_counter() - begun,
        "unit": result.model.unit,
        "threshold": result.model.threshold,
        "validation": {k: v for k, v in kept.items() if k in ("average_precision", "spearman")},
        "arms": result.arms,
        "history": result.history,
        "notes": [note for note in (source.assumed, assumed, anew, *result.notes) if note],
    }


def logging_epochs(
    log: Path | None,
    history: list[dict[str, Any]],
    stack: contextlib.ExitStack,
    on_epoch: Callable[[dict[str, Any]], None] | None,
) -> Callable[[dict[str, Any]], None]:
    """Return what writes each epoch into the log, if there is one, and then calls `on_epoch`.

    The log begins with `history`, the epochs that are not learned again.
    """
    file = None
    if log is not None:
        with writing(log):
            file = stack.enter_context(log.open("w", encoding="utf-8"))
            file.writelines(json.dumps(entry) + "\n" for entry in history)
            file.flush()

    def report(entry: dict[str, Any]) -> None:
        if file is not None and log is not None:
            with writing(log):
                file.write(json.dumps(entry) + "\n")
                file.flush()
        if on_epoch is not None:
            on_epoch(entry)

    return report


def _pairs_to_learn(
    path: Path,
    source: EmbeddingSource,
    weight_column: str | None,
    good_alone: bool,
    columns: dict[str, Any],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None, str]:
    """Read left rows, right rows, labels and weights (M,) of pairs, and what was assumed of them.

    Block by block, so that only these arrays are ever whole. With `good_alone`, pairs without
    labels are good.
    """
    extra = [] if weight_column is None else [weight_column]
    has_labels = not good_alone or _has_labels(path, columns)
    pairs = open_pairs(
        path,
        ids=source.ids,
        count=source.shape[0],
        want_labels=has_labels,
        extra=extra,
        **columns,
    )
    if has_labels and not pairs.has_labels:
        raise DataError(f"{path} has no column of labels: name it with --label")
    small = np.int32 if source.shape[0] < 2**31 else np.int64
    left, right = np.empty(pairs.count, small), np.empty(pairs.count, small)
    labels = np.ones(pairs.count)
    weights = np.empty(pairs.count) if extra else None
    for block in pairs.blocks(SCORE_BLOCK):
        part = slice(block.start, block.start + len(block.left))
        left[part], right[part] = block.left, block.right
        if block.label is not None:
            labels[part] = block.label
        if weights is not None:
            weights[part] = _numbers(block.extra[0], weight_column, path)
    return left, right, labels, weights, pairs.assumed


def _has_labels(path: Path, columns: dict[str, Any]) -> bool:
    names = (columns["left_column"], columns["right_column"], columns["label_column"])
    return open_raw_pairs(path, *names).label is not None


def _numbers(values: Any, column: str | None, path: Path) -> np.ndarray:
    """Turn an Arrow column into float64; what is missing becomes NaN."""
    import pyarrow as pa

    try:
        return np.asarray(values.cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)
    except pa.ArrowInvalid as error:
        raise DataError(f"the column {column} of {path} holds no numbers: {error}") from error


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
    train: Path | None = None,
    by: Sequence[str] = (),
    bootstrap: int = 200,
    properties: bool = False,
    seed: int = 0,
    left_column: str | None = None,
    right_column: str | None = None,
    label_column: str | None = None,
    keys: str = "auto",
    dataset: str | None = None,
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
    properties : measure symmetry, reflexivity and transitivity too, under ``properties``.
    seed : of the bootstrap and of samples.

    Returns
    -------
    summary : what `evaluation.measure` gives for the model, for the raw cosine under
        ``raw_cosine`` and for the unlabelled PCA under ``unlabelled_pca``; ``recall_at``.
    """
    from fastpair.comparison import breakdown, compare, seen_breakdown
    from fastpair.properties import measure_properties

    begun = time.perf_counter()
    similarity = load_model(model)
    refuse_embeddings(similarity, model)
    source = open_embeddings(embeddings, dataset=dataset)
    similarity.check_embeddings(source.shape[1])
    columns: Summary = {"left_column": left_column, "right_column": right_column, "keys": keys}
    signed = good is None and not graded
    left, right, labels, extra, assumed = _labelled_and_more(
        pairs, source, by, label_column=label_column, signed_labels=signed, **columns
    )
    comparison = compare(
        similarity,
        source.read(),
        left,
        right,
        labels,
        good=good,
        graded=graded or similarity.unit == "grade",
        draws=bootstrap,
        seed=seed,
        threads=threads,
    )
    result = comparison.all_pairs()
    notes = [note for note in (source.assumed, assumed, *result["notes"]) if note]
    result["recall_at"] = comparison.recall()
    if train is not None:
        result["entities"] = seen_breakdown(
            comparison, _entities_seen(train, source, np.unique([left, right]), columns)
        )
    result["by"] = {}
    for name, values in zip(by, extra, strict=True):
        result["by"][name], rest = breakdown(comparison, values)
        if rest:
            notes.append(f"{name} has {rest} more values, rarer than those shown")
    if properties:
        result["properties"] = measure_properties(comparison.similarities["model"], seed=seed)
    return {**result, "unit": similarity.unit, "notes": notes, "seconds": _since(begun)}


def _since(begun: float) -> float:
    return time.perf_counter() - begun


def _labelled_and_more(
    path: Path, source: EmbeddingSource, names: Sequence[str], **columns: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[list[str]], str]:
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
        ["(none)" if v is None else str(v) for block in blocks for v in block.extra[n].to_pylist()]
        for n in range(len(names))
    ]
    return left, right, labels, extra, pairs.assumed


def _entities_seen(
    train: Path, source: EmbeddingSource, used: np.ndarray, columns: dict[str, Any]
) -> np.ndarray:
    """Return which of the rows `used` are in a pair of the file, bool."""
    pairs = open_pairs(train, ids=source.ids, count=source.shape[0], **columns)
    seen = np.zeros(source.shape[0], bool)
    for block in pairs.blocks(SCORE_BLOCK):
        seen[block.left] = seen[block.right] = True
    return seen[used]


# --- folding --------------------------------------------------------------------------------------


def own_source(model: Model, path: str | Path, side: str) -> EmbeddingSource:
    """Return what a model learned of the ids of a side, as if it were a file of embeddings.

    Raises
    ------
    ArgumentError : the model has no tables of its own, or not of this side.
    """
    if model.tables is None:
        raise ArgumentError(f"the model {path} has no tables of its own: give EMBEDDINGS too")
    table = model.tables.of(side)

    def read(rows: int) -> Iterator[np.ndarray]:
        starts = range(0, len(table.columns), rows)
        return (table.columns[start : start + rows] for start in starts)

    columns = table.columns
    source = EmbeddingSource(Path(path), columns.shape, columns.dtype, table.ids, read, "the model")
    source.assumed = ""
    return source


def refuse_embeddings(model: Model, path: str | Path) -> None:
    """Refuse a file of embeddings beside a model that has tables of its own."""
    if model.tables is not None:
        raise ArgumentError(f"the model {path} has tables of its own: leave EMBEDDINGS out")


def project(
    model: str | Path,
    embeddings: Path | None,
    output: Path,
    *,
    precision: str = "float32",
    side: str = "both",
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
    embeddings : a file of any accepted format; None for a model with tables of its own.
    precision : "float32", "float16", "bfloat16" or "int8".
    side : "left" or "right" in asymmetric models and models of two tables: whose entities.
    threads : default one for each processor.
    memory : bounds the blocks.
    """
    similarity = load_model(model)
    _expect_hdf5(output)
    inputs = [Path(path) for path in (embeddings, model) if path is not None]
    check_output(Path(output), overwrite=overwrite, inputs=inputs)
    begun = time.perf_counter()
    tables, folded_side = similarity.tables, side
    if embeddings is None:
        source, folded_side = own_source(similarity, model, side), "both"
    else:
        refuse_embeddings(similarity, model)
        source = open_embeddings(embeddings, dataset=dataset)
    count, columns = source.shape
    folder = Folder(similarity, columns, precision, side=folded_side, threads=threads)
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
        side=side,
        unit=similarity.unit,
        threshold=similarity.threshold,
        calibration=similarity.calibration,
        unknown=tables is not None,
        overwrite=overwrite,
    ) as table:
        for start, block in source.blocks(step):
            table.write(start, folder.fold(block, start))
            progress(len(block))
        if tables is not None:
            table.write_unknown(folder.fold(tables.of(side).unknown[None]))
    return {
        "output": str(output),
        "rows": count,
        "row_bytes": folder.plan.layout.row_bytes,
        "precision": precision,
        "raw_error_bound": folder.raw_error_bound(),
        "unit": similarity.unit,
        "seconds": time.perf_counter() - begun,
        "notes": [source.assumed] if source.assumed else [],
    }


# --- features ------------------------------------------------------------------------------------


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
    threads: int | None = None,
    overwrite: bool = False,
    progress: Count = _ignore,
    expect: Callable[[int | None], None] | None = None,
) -> Summary:
    """Write the symmetric features of pairs, as input for any other prediction model.

    Parameters
    ----------
    model : a model file or the name of a built-in similarity.
    output : ``.parquet``, a column for each feature, or ``.h5`` / ``.hdf5``, one array.
    kinds : names of `fastpair.features.KINDS`; default: all.
    """
    from fastpair.features import KINDS, PairFeatures

    similarity = load_model(model)
    output = Path(output)
    if export_format(output) != ".parquet":
        _expect_hdf5(output)
    inputs = [Path(path) for path in (model, embeddings, pairs)]
    check_output(output, overwrite=overwrite, inputs=inputs)
    begun = time.perf_counter()
    source = open_embeddings(embeddings, dataset=dataset)
    compute = PairFeatures(similarity, source.shape[1], kinds or KINDS, threads=threads)
    columns = {"left_column": left_column, "right_column": right_column, "keys": keys}
    opened: Summary = {"ids": source.ids, "count": source.shape[0], **columns}
    has_labels = open_raw_pairs(pairs, left_column, right_column, label_column).label is not None
    listed = open_pairs(pairs, **opened, label_column=label_column, want_labels=has_labels)
    if expect is not None:
        expect(listed.count)
    vectors = source.read()

    step = max(1, FEATURES_AT_ONCE // len(compute.names))

    def blocks() -> Iterator[FeatureBlock]:
        for block in listed.blocks(step, keep_keys=True):
            yield FeatureBlock(block, compute(vectors[block.left], vectors[block.right]))
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
        "seconds": _since(begun),
        "notes": [listed.assumed] if listed.assumed else [],
    }


# --- scoring --------------------------------------------------------------------------------------


def score(
    table: Path,
    pairs: Path,
    output: Path,
    *,
    against: Path | None = None,
    probability: bool = False,
    decision: bool = False,
    distance: bool = False,
    min_score: float | None = None,
    unknown: str | None = None,
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
    probability : write probabilities of being good in place of scores.
    decision : write 1 for pairs that score at least the model's threshold and 0 for others.
    distance : write distances, for models that are minus a distance; see `distance_form`.
    min_score : keep only pairs of at least this, in what is written; default: all.
    unknown : "mean": ids that tables of an id model do not know score as the mean of their side;
        "error": they are refused; default: "mean" for such tables, others can only refuse.
    memory : what may be allocated, the tables included.
    resume : go on with what an interrupted run left.

    Raises
    ------
    FastpairError : anything that cannot be used; an existing output is left as it was.
    """
    if min_score is not None and not np.isfinite(min_score):
        raise ArgumentError(f"min_score is {min_score}, expected a finite number")
    if min_score is not None and distance:
        raise ArgumentError(
            "--min-score keeps high scores, but a --distance is small for good pairs"
        )
    output = Path(output)
    suffix = export_format(output)
    if suffix is None:
        _expect_hdf5(output)
    inputs = [Path(path) for path in (table, pairs, against) if path is not None]
    check_output(output, overwrite=overwrite, inputs=inputs)
    begun = time.perf_counter()
    preparing = threading.Thread(target=_prepare_kernels, name="fastpair-prepare")
    preparing.start()  # takes the interpreter half a second, in which tables are read
    left, right, budget = _load_tables(table, against, memory, unknown=unknown != "error")
    both = right or left
    if unknown == "mean" and (left.unknown_row is None or both.unknown_row is None):
        raise ArgumentError(
            "--unknown mean is for tables of a model that learned ids: leave it out here"
        )
    unit, written = _written_as(table, left, probability, decision, distance)
    source = open_pairs(
        pairs,
        ids=left.ids,
        count=left.count,
        right_ids=both.ids,
        right_count=both.count,
        left_column=left_column,
        right_column=right_column,
        keys=keys,
        dataset=dataset,
        unknown=(left.unknown_row, both.unknown_row),
    )
    _check_room(budget, source, thread_count(threads))
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
        "unit": unit,
        "dataset": str(dataset),
        "kernels": _kernel_digest(),
        "device": "cpu",
    }
    if left.unknown_row is not None:
        identity["unknown ids"] = "mean"
    attributes: Summary = {"unit": unit, "model_fingerprint": left.fingerprint}
    if decision:
        attributes["threshold"] = left.threshold
    scoring_begun = time.perf_counter()
    with ScoreFile(
        output, source.count, identity, attributes=attributes, overwrite=overwrite, resume=resume
    ) as file:
        try:
            unknown_rows = (left.unknown_row, both.unknown_row)
            resumed, strange = _score_blocks(file, source, scorer, written, progress, unknown_rows)
        except DataError:
            file.discard()  # no resume can mend the pair file
            raise
        scoring_seconds = time.perf_counter() - scoring_begun
        kept = source.count
        if suffix is None and min_score is None:
            file.finish()
        else:
            counts = (left.count, both.count)
            kept = _export(file, source, output, suffix, min_score, attributes, overwrite, counts)
    notes = [source.assumed] if source.assumed else []
    if strange:
        notes.append(f"{strange} pairs have unknown ids, which score as the mean of their side")
    return {
        "output": str(output),
        "pairs": source.count,
        "kept": kept,
        "resumed_from": resumed,
        "seconds": time.perf_counter() - begun,
        "scoring_seconds": scoring_seconds,
        "pairs_per_second": (source.count - resumed) / max(scoring_seconds, 1e-9),
        "threads": scorer.threads,
        "unit": unit,
        "keys": source.keys,
        "notes": notes,
    }


def _written_as(
    path: Path, table: Table, probability: bool, decision: bool, distance: bool
) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
    """Return the unit that is written and what turns scores (m,) float32 into it.

    Raises
    ------
    ArgumentError : several forms are asked for, or the model's scores have no such form.
    """
    if probability + decision + distance > 1:
        raise ArgumentError("choose one of --probability, --decision and --distance")
    if distance:
        form = distance_form(table.plan)
        if form is None:
            raise ArgumentError(
                f"the model {table.model_name!r} of {path} is no distance: use euclidean, "
                "manhattan, or a model trained with the head rbf or hyperbolic, or with sqdiff or "
                "absdiff and --no-density whose weights are all below 0"
            )
        return "distance", lambda scores: form(scores).astype(np.float32)
    threshold, calibration = table.threshold, table.calibration
    if decision:
        if threshold is None:
            raise ArgumentError(
                f"the model {table.model_name!r} of {path} has no threshold to decide by: use "
                "--min-score, or a model that was trained on good and bad pairs"
            )
        return "decision", lambda scores: (scores >= np.float64(threshold)).astype(np.float32)
    if not probability:
        return table.unit, lambda scores: scores
    if calibration is None and table.unit != "log-odds":
        raise ArgumentError(
            f"scores of {path} are of the unit {table.unit}, which has no probability: use a model "
            "that was trained on good and bad pairs"
        )
    curve = calibration or sigmoid
    return "probability", lambda scores: curve(scores.astype(np.float64)).astype(np.float32)


def score_forms(path: Path, table: Table) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    """Yield what turns a table's scores (m,) float32 into each graded form that they have."""
    for probability, distance in ((False, False), (True, False), (False, True)):
        with contextlib.suppress(ArgumentError):
            yield _written_as(path, table, probability, False, distance)[1]


def _load_tables(
    table: Path,
    against: Path | None,
    memory: str | int | None,
    *,
    unknown: bool = False,
    either_way: bool = False,
) -> tuple[Table, Table | None, int]:
    """Read one or two tables that belong together; return also the memory that is left.

    Parameters
    ----------
    unknown : whether the rows of unknown ids come too.
    either_way : whether a right table may be the first and a left one the second.
    """
    budget = memory_budget(memory)
    paths = [Path(table)] if against is None else [Path(table), Path(against)]
    sizes = [path.stat().st_size if path.is_file() else 0 for path in paths]
    if sum(sizes) > budget:
        raise MemoryBudgetError(
            f"the tables take {sum(sizes)} bytes, more than the {budget} bytes of memory allowed: "
            "allow more with --memory or project with a smaller --precision"
        )
    left = read_table(paths[0], unknown=unknown)
    right = read_table(paths[1], unknown=unknown) if against is not None else None
    if right is not None:
        if right.fingerprint != left.fingerprint:
            raise MismatchError(
                f"{against} was made by the model {right.model_name!r} and {table} by "
                f"{left.model_name!r}: project both with one model"
            )
        rows = meet(left.rows, left.plan, right.rows, right.plan, in_place=True)
        left = replace(left, rows=rows[0], plan=rows[2])
        right = replace(right, rows=rows[1], plan=rows[2])
    _check_sides(table, left, right, either_way)
    return left, right, budget - sum(sizes)


def _check_sides(path: Path, left: Table, right: Table | None, either_way: bool) -> None:
    """Refuse tables of a model of two sides that are not one of each side, left first."""
    sides = (left.side, (right or left).side)
    turned = either_way and sides == ("right", "left")
    if sides not in (("both", "both"), ("left", "right")) and not turned:
        raise MismatchError(
            f"{path} holds the {sides[0]} side of a model of two sides and meets the {sides[1]} "
            "side: take the table of --side left --against that of --side right"
        )


def _check_room(budget: int, source: PairSource, threads: int) -> None:
    """Refuse a run whose blocks of pairs do not fit beside the tables."""
    needed = min(source.count, SCORE_BLOCK) * (source.bytes_a_pair() + 4) * BLOCKS_UNDER_WAY
    needed += source.reading_bytes(threads)
    if needed > budget:
        raise MemoryBudgetError(
            f"blocks of pairs need {needed} bytes beside the tables, but --memory leaves {budget}: "
            f"allow {needed - budget} more"
        )


def _score_blocks(
    file: ScoreFile,
    source: PairSource,
    scorer: PairScorer,
    written: Callable[[np.ndarray], np.ndarray],
    progress: Count,
    unknown: tuple[int | None, int | None],
) -> tuple[int, int]:
    """Score all blocks that are not done.

    Returns
    -------
    start : the pair at which that began.
    strange : pairs with the row of an unknown id among those that were scored.
    """
    undone, strange = np.flatnonzero(~file.done), 0
    if not len(undone):
        progress(source.count)
        return source.count, 0
    start = int(undone[0]) * SCORE_BLOCK
    progress(start)
    for block, scores in scorer.stream(source.blocks(SCORE_BLOCK, start, threads=scorer.threads)):
        file.write_block(block.start // SCORE_BLOCK, written(scores))
        if unknown != (None, None):
            strange += int(np.sum((block.left == unknown[0]) | (block.right == unknown[1])))
        progress(len(scores))
    return start, strange


def _export(
    file: ScoreFile,
    source: PairSource,
    output: Path,
    suffix: str | None,
    min_score: float | None,
    attributes: Summary,
    overwrite: bool,
    counts: tuple[int, int],
) -> int:
    """Write the staged scores as what was asked for, with the keys of the pair file.

    Rows beyond `counts`, those of unknown ids, are written as -1.
    """

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
                (
                    block.start + kept,
                    _known_rows(block.left[kept], counts[0]),
                    _known_rows(block.right[kept], counts[1]),
                    scores[kept],
                )
                for block, scores, kept in scored()
            ),
            attributes={**attributes, "min_score": min_score},
            overwrite=overwrite,
        )
    file.discard()
    return written


def _known_rows(rows: np.ndarray, count: int) -> np.ndarray:
    return np.where(rows < count, rows, -1)


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


def _prepare_kernels() -> None:
    from fastpair.kernels import pairs, simd  # noqa: F401  Numba and the pair kernel

    simd.prepare()


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
    exclude: Path | None = None,
    left_column: str | None = None,
    right_column: str | None = None,
    keys: str = "auto",
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
    exclude : pairs that the best of a row are not to hold, such as those that are known already;
        `left_column`, `right_column` and `keys` say how they are read.
    memory : what may be allocated, the tables included.

    Returns
    -------
    summary : with ``scan``, the form of numbers in which pairs were looked for before the pair
        kernel decided (None for networks), and ``triangle``, whether each pair was walked once.
    """
    from fastpair.matrix import all_pairs

    chosen = (top_k is not None, threshold is not None, dense, histogram)
    if sum(chosen) != 1:
        raise ArgumentError("choose one of top_k, threshold, dense and histogram")
    if bins is not None and not histogram:
        raise ArgumentError(f"bins is {bins} but goes with histogram alone")
    if exclude is not None and top_k is None:
        raise ArgumentError("exclude goes with top_k alone: other results hold every pair")
    if exclude is None and (left_column, right_column, keys) != (None, None, "auto"):
        raise ArgumentError("columns and keys are those of --exclude, which is not given")
    _expect_hdf5(output)
    inputs = [Path(path) for path in (table, against, exclude) if path is not None]
    check_output(Path(output), overwrite=overwrite, inputs=inputs)
    begun = time.perf_counter()
    left, right, budget = _load_tables(table, against, memory, either_way=True)
    both = right or left
    walked = len(left.rows) * len(both.rows)
    if expect is not None:
        expect(walked * (2 if histogram else 1))
    if budget < LEAST_MEMORY:
        raise MemoryBudgetError(
            f"--memory leaves {budget} bytes beside the tables, but all pairs need at least "
            f"{LEAST_MEMORY}: allow more"
        )
    options: Summary = {"threads": threads, "memory": budget, "progress": progress}
    pairs = all_pairs(left.rows, None if right is None else right.rows, left.plan, **options)
    notes = [] if left.plan.network is None else [NETWORK_NOTE]
    found: Summary = {}
    common: Summary = {
        "attributes": {"unit": left.unit, "model_fingerprint": left.fingerprint},
        "overwrite": overwrite,
    }
    ids: Summary = {"ids": left.ids, "ids_right": None if right is None else right.ids}
    scoring_begun = time.perf_counter()
    if top_k is not None and exclude is not None:
        from fastpair.exclusions import read_exclusions, top_k_without

        named = {"left_column": left_column, "right_column": right_column, "keys": keys}
        excluded, more = read_exclusions(exclude, left, right, budget, **named)
        notes += more
        with TopKWriter(output, (len(left.rows), top_k), **ids, **common) as best:
            rest = (left.rows, both.rows, left.plan, top_k, excluded)
            for first, scores, indices in top_k_without(*rest, **options):
                best.write(first, indices, scores)
        found = {"k": top_k, "excluded": len(excluded.keys)}
    elif top_k is not None:
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
            for first, scores in read_ahead(pairs.dense(), depth=0):  # two groups are in memory
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
        "scan": pairs.scan,
        "triangle": pairs.triangle,
        "unit": left.unit,
        "notes": notes,
    }


NETWORK_NOTE = (
    "this model is a network that does not fold: all pairs are gathered one by one, which is slow"
)


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
