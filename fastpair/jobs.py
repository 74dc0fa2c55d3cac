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
from typing import TYPE_CHECKING, Any

import numpy as np

from fastpair.backend import LEAST_MEMORY, memory_budget, parse_size, thread_count
from fastpair.compression import check_filter, write_compressed
from fastpair.device import LEAST_WALKED, Choice, pick
from fastpair.errors import ArgumentError, DataError, MemoryBudgetError, MismatchError
from fastpair.export import FeatureBlock, write_features
from fastpair.export import convert as convert_file
from fastpair.files import Table, TableWriter, describe, read_model, read_table, write_model
from fastpair.folding import Folder
from fastpair.formats import AS_FOUND, Arrays, Columns, ReadOptions, open_format
from fastpair.hdf5_arrays import Hdf5Arrays
from fastpair.ingest import EmbeddingSource, open_embeddings
from fastpair.kernels import Plan
from fastpair.listing import export_format, write_scored_pairs
from fastpair.matrix_output import MatrixOutput, check_form
from fastpair.model import BUILTINS, Model, builtin, sigmoid
from fastpair.pairs import PairBlock, PairSource, open_pairs, repeats_note
from fastpair.raw_pairs import known_ids, open_raw_pairs
from fastpair.remaining import RemainingPairs
from fastpair.results import (
    SCORE_BLOCK,
    ScoreFile,
    write_filtered_scores,
)
from fastpair.scoring import PairScorer, distance_form, meet
from fastpair.spooling import is_stream, received
from fastpair.staging import check_output, writing
from fastpair.verifying import describe_log
from fastpair.verifying import verify as verify_file

if TYPE_CHECKING:
    from fastpair.exclusions import Exclusions
    from fastpair.gpu_scoring import GpuPairScorer

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

BLOCKS_A_GPU = 6
"""Blocks more for each GPU: three under way, and as many page-locked copies."""

LINKS_BY_DEVICE = ("exponential", "negative_arcosh")
"""Links through library functions, which may round otherwise on another device."""


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
    reading: ReadOptions = AS_FOUND,
    overwrite: bool = False,
) -> Summary:
    """Bring embeddings or pairs of any accepted format into HDF5, ids kept as they are.

    Parameters
    ----------
    kind : "embeddings" or "pairs"; default: by content.
    reading : what the source does not say itself.
    """
    _expect_hdf5(output)
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


# --- learning -------------------------------------------------------------------------------------


def train(
    embeddings: Path,
    pairs: Path,
    output: Path,
    *,
    valid: Path | None = None,
    apart: Path | None = None,
    good: float | None = None,
    graded: bool = False,
    left_column: str | None = None,
    right_column: str | None = None,
    label_column: str | None = None,
    weight_column: str | None = None,
    keys: str = "auto",
    dataset: str | None = None,
    reading: ReadOptions = AS_FOUND,
    nonfinite: str = "refuse",
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
    apart : pairs, such as those of a test, that `close_positives` must not add.
    good : a label of at least this is a good pair.
    graded : labels are grades and the grade itself is learned.
    weight_column : column of `pairs` that says how much each of them counts.
    reading : what the pair files do not say themselves; of the embeddings `follow_links` alone.
    nonfinite : "refuse" (the default) embeddings that are not finite, or "nan": leave their pairs
        out.
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
    from fastpair.isolation import without_isolated
    from fastpair.training import train as fit

    if graded and good is not None:
        raise ArgumentError("--good makes labels good or bad, --graded learns grades: choose one")
    inputs = [Path(path) for path in (embeddings, pairs, valid, apart) if path is not None]
    check_output(Path(output), overwrite=overwrite, inputs=inputs)
    if log is not None:
        check_output(log, overwrite=overwrite or resume, inputs=inputs)
        if Path(log).resolve() == Path(output).resolve():
            raise ArgumentError(f"--log and --output are both {output}: give the log its own name")
    begun = time.perf_counter()
    embeddings, pairs = received(embeddings), received(pairs)
    source = open_embeddings(
        embeddings, dataset=dataset, options=reading.of_links, nonfinite=nonfinite
    )
    columns: Summary = {
        "left_column": left_column,
        "right_column": right_column,
        "label_column": label_column,
        "keys": keys,
        "signed_labels": good is None and not graded,
        "options": reading,
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
    if apart is not None:
        settings["apart"] = _rows_of_pairs(apart, source, left_column, right_column, keys)
    true = truth(labels, good, graded, pairs)
    if good is not None and not true.any():
        raise DataError(
            f"all {len(labels)} pairs are bad: --good is {good:g} but the largest label is "
            f"{labels.max(initial=-np.inf):g}"
        )
    checkpoint = FileCheckpoint(Path(output), resume=resume)
    state = checkpoint.load()
    anew = "there was nothing to continue: training began anew" if resume and not state else ""
    vectors = source.read()
    if source.isolated is not None and source.isolated.any():
        given_columns = [left, right, true, labels, weights]
        if held is not None:
            held = tuple(without_isolated(vectors, source.isolated, held)[1])
        vectors, columns_left = without_isolated(vectors, source.isolated, given_columns)
        left, right, true, labels, weights = columns_left
    with contextlib.ExitStack() as stack:
        result = fit(
            vectors,
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
        "notes": [
            note
            for note in (source.assumed, source.isolated_note(), assumed, anew, *result.notes)
            if note
        ],
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
    has_labels = not good_alone or _has_labels(path, source, columns)
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
    assumed = "; ".join(filter(None, [pairs.assumed, repeats_note(left, right, labels)]))
    return left, right, labels, weights, assumed


def _rows_of_pairs(
    path: Path, source: EmbeddingSource, left: str | None, right: str | None, keys: str
) -> tuple[np.ndarray, np.ndarray]:
    """Read left and right rows (M,) of the pairs of a file."""
    columns = {"left_column": left, "right_column": right, "keys": keys}
    pairs = open_pairs(path, ids=source.ids, count=source.shape[0], **columns)  # type: ignore[arg-type]
    blocks = [(block.left, block.right) for block in pairs.blocks(SCORE_BLOCK)]
    if not blocks:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    return tuple(np.concatenate(side) for side in zip(*blocks, strict=True))  # type: ignore[return-value]


def _has_labels(path: Path, source: EmbeddingSource, columns: dict[str, Any]) -> bool:
    names = (columns["left_column"], columns["right_column"], columns["label_column"])
    known = known_ids(source.ids, source.ids)
    raw = open_raw_pairs(path, *names, known=known, options=columns["options"])
    return raw.label is not None


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
    reading: ReadOptions = AS_FOUND,
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
    seed : of the bootstrap and of samples.
    reading : what the pair files do not say themselves; of the embeddings `follow_links` alone.

    Returns
    -------
    summary : what `evaluation.measure` gives for the model, for the raw cosine under
        ``raw_cosine`` and for the unlabelled PCA under ``unlabelled_pca``; ``recall_at``.
    """
    from fastpair.comparison import breakdown, calibrated_cosine, compare, seen_breakdown
    from fastpair.properties import measure_properties

    begun = time.perf_counter()
    similarity = load_model(model)
    refuse_embeddings(similarity, model)
    embeddings, pairs = received(embeddings), received(pairs)
    source = open_embeddings(embeddings, dataset=dataset, options=reading.of_links)
    similarity.check_embeddings(source.shape[1])
    columns: Summary = {"left_column": left_column, "right_column": right_column, "keys": keys}
    columns["options"] = reading
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
        before = calibrated_cosine(comparison)
        result["raw_cosine"]["properties"] = measure_properties(before, seed=seed)
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
    reading: ReadOptions = AS_FOUND,
    nonfinite: str = "refuse",
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
    reading : what the embeddings do not say themselves.
    nonfinite : "refuse" (the default) embeddings that are not finite, or "nan": they score NaN.
    threads : default one for each processor.
    memory : bounds the blocks.
    """
    similarity = load_model(model)
    _expect_hdf5(output)
    inputs = [Path(path) for path in (embeddings, model) if path is not None]
    check_output(Path(output), overwrite=overwrite, inputs=inputs)
    begun = time.perf_counter()
    tables, folded_side, made_from = similarity.tables, side, None
    if embeddings is None:
        if (dataset, reading, nonfinite) != (None, AS_FOUND, "refuse"):
            raise ArgumentError(
                "--dataset, --nonfinite and options of reading go with EMBEDDINGS, which are not "
                "given"
            )
        source, folded_side = own_source(similarity, model, side), "both"
    else:
        refuse_embeddings(similarity, model)
        embeddings = received(embeddings)
        made_from = {"embeddings_fingerprint": file_fingerprint(embeddings)}
        source = open_embeddings(embeddings, dataset=dataset, options=reading, nonfinite=nonfinite)
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
        made_from=made_from,
        overwrite=overwrite,
    ) as table:
        for start, block in source.blocks(step):
            table.write(start, folder.fold(block, start))
            progress(len(block))
        if source.isolated is not None and source.isolated.any():
            table.isolate(np.flatnonzero(source.isolated))
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
        "notes": [note for note in (source.assumed, source.isolated_note()) if note],
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
    reading: ReadOptions = AS_FOUND,
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
    reading : what the pairs do not say themselves; of the embeddings `follow_links` alone.
    """
    from fastpair.features import KINDS, PairFeatures

    similarity = load_model(model)
    output = Path(output)
    if export_format(output) != ".parquet":
        _expect_hdf5(output)
    inputs = [Path(path) for path in (model, embeddings, pairs)]
    check_output(output, overwrite=overwrite, inputs=inputs)
    begun = time.perf_counter()
    embeddings, pairs = received(embeddings), received(pairs)
    source = open_embeddings(embeddings, dataset=dataset, options=reading.of_links)
    compute = PairFeatures(similarity, source.shape[1], kinds or KINDS, threads=threads)
    columns = {"left_column": left_column, "right_column": right_column, "keys": keys}
    opened: Summary = {"ids": source.ids, "count": source.shape[0], **columns, "options": reading}
    asked = {**columns, "label_column": label_column, "options": reading}
    has_labels = _has_labels(pairs, source, asked)
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
    left_column: str | None = None,
    right_column: str | None = None,
    keys: str = "auto",
    dataset: str | None = None,
    reading: ReadOptions = AS_FOUND,
    unknown: str | None = None,
    threads: int | None = None,
    memory: str | int | None = None,
    compression: str | None = None,
    device: str = "auto",
    device_memory: str | int | None = None,
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
    output : ``.h5`` / ``.hdf5``, ``.parquet``, ``.csv`` or ``.tsv`` (also ``.gz`` and ``.zst``).
    probability : write probabilities of being good in place of scores.
    decision : write 1 for pairs that score at least the model's threshold and 0 for others.
    distance : write distances, for models that are minus a distance; see `distance_form`.
    min_score : keep only pairs of at least this, in what is written; default: all.
    reading : what the pair file does not say itself.
    unknown : "refuse" unknown ids, write "nan" as the scores of their pairs, or "mean": they score
        as the mean of their side, which tables of a model that learned ids have; default: "mean"
        for such tables, "refuse" for others.
    memory : what may be allocated, the tables included.
    compression : name of a filter for an HDF5 output; see `fastpair.compression.FILTERS`.
    device : "auto", "cpu", "gpu", "gpu:1" or "gpu:0,1"; see `fastpair.device.pick`.
    device_memory : what may be allocated on each GPU; default 90 % of what is free there.
    resume : go on with what an interrupted run left. It may go on with another device: a pair has
        the same bits on all of them, except under the links exponential and negative_arcosh, whose
        library functions differ; there the kind of device is part of what a run is.

    Returns
    -------
    summary : with ``device``, such as "cpu" or "gpu:0", and ``device_note``, why it was chosen;
        empty where it was asked for.

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
    if compression is not None:
        check_filter(compression)
        if suffix is not None:
            raise ArgumentError(f"--compression {compression} is for HDF5, and {output} is none")
    inputs = [Path(path) for path in (table, pairs, against) if path is not None]
    check_output(output, overwrite=overwrite, inputs=inputs)
    on_device = _device_bytes(device, device_memory)
    if resume and is_stream(Path(pairs)):
        raise ArgumentError(f"--resume needs a pair file, but {pairs} can be read only once")
    begun = time.perf_counter()
    pairs = received(pairs)
    preparing = threading.Thread(target=_prepare_kernels, name="fastpair-prepare")
    preparing.start()  # takes the interpreter half a second, in which tables are read
    stand_in = unknown in (None, "mean")
    left, right, budget = _load_tables(table, against, memory, unknown=stand_in)
    both = right or left
    unknown, unknown_rows = _unknown_ids(unknown, left, both)
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
        unknown="nan" if unknown == "nan" else "refuse",
        unknown_rows=unknown_rows,
        options=reading,
    )
    choice = pick(device, pairs=source.count)
    room = _check_room(budget, source, thread_count(threads), len(choice.runtimes))
    if expect is not None:
        expect(source.count)
    scorer = _pair_scorer(choice, left, right, threads, on_device, room)
    identity = {
        "table": left.digest,
        "right table": "the same" if right is None else right.digest,
        "pair file": file_fingerprint(pairs),
        "columns": f"{source.names[0]}, {source.names[1]}, {source.keys}",
        "unit": unit,
        "dataset": str(dataset),
        "reading": f"{reading}, unknown: {unknown}",
        "kernels": _kernel_digest(),
        "device": choice.kind if left.plan.link in LINKS_BY_DEVICE else "any",
    }
    attributes: Summary = {
        "unit": unit,
        "model_fingerprint": left.fingerprint,
        "two_tables": right is not None,
    }
    if decision:
        attributes["threshold"] = left.threshold
    scoring_begun = time.perf_counter()
    with ScoreFile(
        output,
        source.count,
        identity,
        watched={"time of the pair file": file_time(pairs)},
        attributes=attributes,
        overwrite=overwrite,
        resume=resume,
    ) as file:
        try:
            isolated = (left.isolated, both.isolated)
            walked = _score_blocks(file, source, scorer, written, progress, isolated, unknown_rows)
            resumed, strange = walked
        except DataError:
            file.discard()  # no resume can mend the pair file
            raise
        scoring_seconds = time.perf_counter() - scoring_begun
        notes = [source.assumed, source.unknown_note(), choice.told]
        strange += source.unknown_pairs
        counts = (left.count, both.count)
        finishing = _Finishing(file, source, output, min_score, compression, overwrite, counts)
        kept = finishing.listed() if suffix is not None else finishing.hdf5()
    if strange and unknown == "mean":
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
        "device": choice.name,
        "device_note": choice.note,
        "unit": unit,
        "keys": source.keys,
        "unknown": strange,
        "notes": [note for note in notes if note],
    }


def _unknown_ids(
    unknown: str | None, left: Table, right: Table
) -> tuple[str, tuple[int | None, int | None]]:
    """Return what becomes of unknown ids, and the rows that stand for them."""
    if unknown not in (None, "refuse", "nan", "mean"):
        raise ArgumentError(f"unknown is {unknown!r}, but must be 'refuse', 'nan' or 'mean'")
    rows = left.unknown_row, right.unknown_row
    if None not in rows:
        return "mean", rows
    if unknown == "mean":
        raise ArgumentError(
            "--unknown mean is for tables of a model that learned ids: leave it out here"
        )
    return unknown or "refuse", (None, None)


def _device_bytes(device: str, device_memory: str | int | None) -> int | None:
    """Return the bytes to use on a GPU; refuse a device that is not there before all else."""
    if device not in ("auto", "cpu"):
        pick(device)
    if device_memory is None:
        return None
    if device == "cpu":
        raise ArgumentError(f"--device-memory is {device_memory} but the device is the CPU")
    size = parse_size(device_memory) if isinstance(device_memory, str) else device_memory
    if size < 1:
        raise ArgumentError(f"device memory is {size} bytes, expected at least 1")
    return size


def _pair_scorer(
    choice: Choice,
    left: Table,
    right: Table | None,
    threads: int | None,
    device_memory: int | None,
    room: int,
) -> PairScorer | GpuPairScorer:
    """Return what scores pairs on the chosen device; on GPUs, `room` bytes may sort pairs."""
    tables = (
        left.rows,
        left.plan,
        None if right is None else right.rows,
        None if right is None else right.plan,
    )
    if not choice.runtimes:
        return PairScorer(*tables, threads=threads)
    from fastpair.gpu_scoring import GpuPairScorer

    return GpuPairScorer(
        *tables,
        devices=choice.runtimes,
        device_memory=device_memory,
        memory=max(LEAST_MEMORY, room),
        threads=threads,
    )


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


def _check_room(budget: int, source: PairSource, threads: int, gpus: int = 0) -> int:
    """Return the bytes left beside the tables and blocks of pairs, or refuse the run."""
    # each GPU has three blocks in its buffers, and those of the next ones wait
    blocks = BLOCKS_UNDER_WAY + BLOCKS_A_GPU * gpus
    needed = min(source.count, SCORE_BLOCK) * (source.bytes_a_pair() + 4) * blocks
    needed += source.reading_bytes(threads)
    if needed > budget:
        raise MemoryBudgetError(
            f"blocks of pairs need {needed} bytes beside the tables, but --memory leaves {budget}: "
            f"allow {needed - budget} more"
        )
    return budget - needed


def _score_blocks(
    file: ScoreFile,
    source: PairSource,
    scorer: PairScorer | GpuPairScorer,
    written: Callable[[np.ndarray], np.ndarray],
    progress: Count,
    isolated: tuple[np.ndarray | None, np.ndarray | None],
    unknown_rows: tuple[int | None, int | None],
) -> tuple[int, int]:
    """Score all blocks that are not done.

    Returns
    -------
    start : the pair at which that began.
    strange : pairs with the row of an unknown id among those that were scored.
    """
    from fastpair.isolation import isolated_pairs

    undone, strange = np.flatnonzero(~file.done), 0
    if not len(undone):
        progress(source.count)
        return source.count, 0
    start = int(undone[0]) * SCORE_BLOCK
    progress(start)
    blocks = source.blocks(SCORE_BLOCK, start, threads=scorer.threads)
    wanted = (block for block in blocks if not file.done[block.start // SCORE_BLOCK])
    for block, scores in scorer.stream(wanted):
        values = written(scores)
        for spoiled in (block.unknown, isolated_pairs(block.left, block.right, isolated)):
            if spoiled is not None:
                values = np.where(spoiled, np.float32(np.nan), values)
        file.write_block(block.start // SCORE_BLOCK, values)
        if unknown_rows != (None, None):
            strange += int(
                np.sum((block.left == unknown_rows[0]) | (block.right == unknown_rows[1]))
            )
        progress(len(scores))
    return start, strange


class _Finishing:
    """Turns staged scores, all of which are done, into what was asked for.

    Parameters
    ----------
    file : the staged scores.
    source : the pairs, for their keys.
    output : the file to make.
    min_score : keep only pairs of at least this; None: all.
    compression : name of a filter, or None.
    overwrite : whether an existing file may be replaced.
    counts : rows of the left and of the right table; those beyond, of unknown ids, become -1.
    """

    def __init__(
        self,
        file: ScoreFile,
        source: PairSource,
        output: Path,
        min_score: float | None,
        compression: str | None,
        overwrite: bool,
        counts: tuple[int, int],
    ) -> None:
        self.counts = counts
        self.file, self.source, self.output = file, source, output
        self.min_score, self.compression, self.overwrite = min_score, compression, overwrite

    def hdf5(self) -> int:
        """Give the scores their name, or write those that are kept; return how many."""
        if self.min_score is not None:
            return self._filtered(self.min_score)
        if self.compression is None:
            self.file.finish()
        else:
            write_compressed(self.file, self.compression, overwrite=self.overwrite)
            self.file.discard()
        return self.source.count

    def _filtered(self, least: float) -> int:
        kept = sum(
            int(np.count_nonzero(self.file.scores(number).astype(np.float64) >= least))
            for number in range(self.file.blocks)
        )
        write_filtered_scores(
            self.output,
            kept,
            (
                (
                    block.start + kept,
                    _known_rows(block.left[kept], self.counts[0]),
                    _known_rows(block.right[kept], self.counts[1]),
                    scores[kept],
                )
                for block, scores, kept in self._scored(keep_keys=False)
            ),
            self.file.identity,
            attributes={**self.file.content.attributes, "min_score": least},
            compression=self.compression,
            overwrite=self.overwrite,
        )
        self.file.discard()
        return kept

    def listed(self) -> int:
        """Write scores beside the keys as they came; return how many."""
        unit = str(self.file.content.attributes["unit"])
        kept = write_scored_pairs(
            self.output,
            (
                (block.left_keys.take(kept), block.right_keys.take(kept), scores[kept])
                for block, scores, kept in self._scored(keep_keys=True)
                if block.left_keys is not None and block.right_keys is not None
            ),
            names=self.source.names,
            score=unit if unit in COLUMNS_BY_UNIT else "score",
            overwrite=self.overwrite,
        )
        self.file.discard()
        return kept

    def _scored(self, keep_keys: bool) -> Iterator[tuple[PairBlock, np.ndarray, np.ndarray]]:
        """Blocks of pairs, their scores, and which of them are kept."""
        of_block, scores = -1, np.empty(0, dtype=np.float32)
        for block in self.source.blocks(EXPORTED_AT_ONCE, keep_keys=keep_keys):
            number, first = divmod(block.start, SCORE_BLOCK)
            if number != of_block:
                of_block, scores = number, self.file.scores(number)
            part = scores[first : first + len(block.left)]
            kept = np.arange(len(part))
            if self.min_score is not None:
                kept = np.flatnonzero(part.astype(np.float64) >= self.min_score)
            yield block, part, kept


COLUMNS_BY_UNIT = ("probability", "decision", "distance")
"""What a column of CSV or Parquet is called by the unit that is written; others: score."""


def _known_rows(rows: np.ndarray, count: int) -> np.ndarray:
    return np.where(rows < count, rows, -1)


def file_fingerprint(path: Path) -> str:
    """What tells a large input from another one without reading it whole: its size and ends."""
    path = Path(path)
    digest = hashlib.sha256(f"{path.stat().st_size} ".encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, path.stat().st_size - (1 << 20)))
        digest.update(file.read())
    return digest.hexdigest()


def file_time(path: Path) -> str:
    """When a file was last changed: what its fingerprint does not see."""
    return str(Path(path).stat().st_mtime_ns)


def _prepare_kernels() -> None:
    from fastpair.kernels import pairs, simd  # noqa: F401  Numba and the pair kernel

    simd.prepare()


def _kernel_digest() -> str:
    """Return a digest of all kernels, those of GPUs too: either may score a part of a run."""
    from fastpair import kernels
    from fastpair.kernels.simd import kernel_digest

    digest = hashlib.sha256(kernel_digest().encode())
    for source in sorted(Path(kernels.__file__).parent.glob("*.cu*")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


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
    reading: ReadOptions = AS_FOUND,
    threads: int | None = None,
    memory: str | int | None = None,
    compression: str | None = None,
    device: str = "auto",
    device_memory: str | int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Count = _ignore,
    expect: Callable[[int | None], None] | None = None,
) -> Summary:
    """Score all pairs of one table or of two, and write what is asked for.

    Parameters
    ----------
    output : ``.h5`` / ``.hdf5``; see `fastpair.matrix_output.SUFFIXES` for what else.
    top_k, threshold, dense, histogram : exactly one of them; `bins` goes with the last.
    exclude : pairs that the best of a row are not to hold, such as those that are known already;
        `left_column`, `right_column`, `keys` and `reading` say how they are read.
    memory : what may be allocated, the tables included.
    compression : name of a filter for an HDF5 output; see `fastpair.compression.FILTERS`.
    device : "auto", "cpu", "gpu", "gpu:1" or "gpu:0,1"; see `fastpair.device.pick`. Dense values
        and the outer edges of a histogram are those of its own tiles, all other results are the
        same on every device.
    device_memory : what may be allocated on each GPU; default 90 % of what is free there.
    resume : go on with what an interrupted run left; a histogram begins anew.

    Returns
    -------
    summary : with ``device`` and ``device_note`` as in `score`; ``scan``, the form of numbers in
        which pairs were looked for before the pair kernel decided (None for networks); and
        ``triangle``, whether each pair was walked once.
    """
    chosen = (top_k is not None, threshold is not None, dense, histogram)
    if sum(chosen) != 1:
        raise ArgumentError("choose one of top_k, threshold, dense and histogram")
    if bins is not None and not histogram:
        raise ArgumentError(f"bins is {bins} but goes with histogram alone")
    if exclude is not None and top_k is None:
        raise ArgumentError("exclude goes with top_k alone: other results hold every pair")
    named: Summary = {"left_column": left_column, "right_column": right_column, "keys": keys}
    if exclude is None and (*named.values(), reading) != (None, None, "auto", AS_FOUND):
        raise ArgumentError(
            "columns, keys and options of reading are those of --exclude, which is not given"
        )
    if exclude is not None and resume and is_stream(Path(exclude)):
        raise ArgumentError(f"--resume needs a file, but {exclude} can be read only once")
    form = ("top-k", "threshold", "dense", "histogram")[chosen.index(True)]
    output = Path(output)
    check_form(output, form, compression)
    if compression is not None:
        check_filter(compression)
    inputs = [Path(path) for path in (table, against, exclude) if path is not None]
    check_output(output, overwrite=overwrite, inputs=inputs)
    on_device = _device_bytes(device, device_memory)
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
    notes: list[str] = []
    left_out: Exclusions | None = None
    identity: dict[str, str] = {}
    if exclude is not None:
        from fastpair.exclusions import read_exclusions

        exclude = received(exclude)
        left_out, notes = read_exclusions(exclude, left, right, budget, options=reading, **named)
        budget = max(LEAST_MEMORY, budget - left_out.keys.nbytes)
        identity["exclude"] = file_fingerprint(exclude)
        identity["reading of exclude"] = f"{sorted(named.items())}, {reading}"
    choice = pick(device, pairs=walked, least=LEAST_WALKED)

    def walk(rows: np.ndarray, right_rows: np.ndarray | None, room: int) -> Any:
        options: Summary = {"threads": threads, "memory": room, "progress": progress}
        # walks that go on side by side share the device as they share the memory here
        share = None if on_device is None else max(1, on_device * room // budget)
        return _all_pairs(choice, rows, right_rows, left.plan, share, **options)

    remaining = _walk_from(walk, left, right, budget, left_out, progress)
    by_device = dense or left.plan.link in LINKS_BY_DEVICE  # other bits on another device
    target = MatrixOutput(
        path=output,
        form=form,
        shape=(len(left.rows), len(both.rows)),
        ids=left.ids,
        ids_right=None if right is None else right.ids,
        distinct=right is not None,
        identity={
            **identity,
            "table": left.digest,
            "right table": "the same" if right is None else right.digest,
            "kernels": _kernel_digest(),
            "device": choice.kind if by_device else "any",
        },
        attributes={
            "unit": left.unit,
            "model_fingerprint": left.fingerprint,
            "two_tables": right is not None,
        },
        compression=compression,
        overwrite=overwrite,
        resume=resume,
    )
    scoring_begun = time.perf_counter()
    if top_k is not None:
        found = target.top_k(remaining, top_k)
        if left_out is not None:
            found["excluded"] = len(left_out.keys)
    elif threshold is not None:
        found = target.threshold(remaining, threshold)
    elif dense:
        found = target.dense(remaining)
    else:
        found = target.histogram(remaining, bins or 100)
    seconds = time.perf_counter() - scoring_begun
    rest = walked - found["resumed_from"] * len(both.rows)
    return {
        "output": str(output),
        "pairs": walked,
        **found,
        "seconds": time.perf_counter() - begun,
        "pairs_per_second": rest / max(seconds, 1e-9),
        "device": choice.name,
        "device_note": choice.note,
        "unit": left.unit,
        "notes": [*_matrix_notes(choice, left), *notes],
    }


def _walk_from(
    walk: Callable[[np.ndarray, np.ndarray | None, int], Any],
    left: Table,
    right: Table | None,
    budget: int,
    left_out: Exclusions | None,
    progress: Count,
) -> Callable[[int], Any]:
    """Return what gives all pairs from a left row on, isolated rows and exclusions left out."""
    from fastpair.isolation import PairsWithoutIsolated

    others = None if right is None else right.rows
    isolated = (left.isolated, left.isolated if right is None else right.isolated)
    excluded = left_out
    finite = all(mask is None for mask in isolated)
    if left_out is not None and not finite:
        kept = [None if mask is None else ~mask for mask in isolated]
        excluded = left_out.among_kept((kept[0], kept[1]))

    def from_row(rows: np.ndarray, right_rows: np.ndarray | None, start: int) -> Any:
        if excluded is None:
            return RemainingPairs(walk, rows, right_rows, budget, start)
        from fastpair.exclusions import PairsWithoutExcluded

        every = rows if right_rows is None else right_rows
        return PairsWithoutExcluded(walk, rows, every, excluded, budget, start)

    def remaining(start: int) -> Any:
        progress(start * len((right or left).rows))
        if finite:
            return from_row(left.rows, others, start)
        return PairsWithoutIsolated(from_row, left.rows, others, isolated, start)

    return remaining


def _matrix_notes(choice: Choice, table: Table) -> list[str]:
    slow = "" if table.plan.network is None else NETWORK_NOTE
    return [note for note in (slow, choice.told) if note]


def _all_pairs(
    choice: Choice,
    left: np.ndarray,
    right: np.ndarray | None,
    plan: Plan,
    device_memory: int | None,
    **options: Any,
) -> Any:
    """Return what walks all pairs of rows on the chosen device."""
    if not choice.runtimes:
        from fastpair.matrix import all_pairs

        return all_pairs(left, right, plan, **options)
    from fastpair import gpu_matrix

    options |= {"runtimes": list(choice.runtimes), "device_memory": device_memory}
    return gpu_matrix.all_pairs(left, right, plan, **options)


NETWORK_NOTE = (
    "this model is a network that does not fold: all pairs are gathered one by one, which is slow"
)


def info(file: Path, *, verify: bool = False) -> Summary:
    """Say what a file is and whether it is whole.

    Parameters
    ----------
    verify : read everything in it, and say where it is damaged.

    Returns
    -------
    summary : ``summary`` (a sentence), ``kind`` (None for files of others), ``datasets`` (shape
        and type by name), ``attributes``, ``ids``, ``whole`` (None where nothing tells); with
        `verify` also ``damaged``, ``checked`` and ``unchecked``, see `fastpair.verifying.verify`.
    """
    logged = describe_log(file)
    if logged is not None:
        return logged
    found = open_format(file)
    if isinstance(found, Hdf5Arrays):
        return {**describe(file), **(verify_file(file) if verify else {})}
    checks = _read_through(found) if verify else {}
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
        **checks,
    }


def _read_through(file: Arrays | Columns) -> Summary:
    """Read all of a file that has no checksums of ours; a FileError if that cannot be done."""
    if isinstance(file, Arrays):
        names = list(file.entries)
        for name, (shape, _) in file.entries.items():
            for start in range(0, shape[0] if shape else 0, SCORE_BLOCK):
                file.read(name, start, min(start + SCORE_BLOCK, shape[0]))
    else:
        names = list(file.names)
        for _ in file.batches(names):
            pass
    return {"damaged": [], "checked": [], "unchecked": names}
