"""`train`: labelled pairs of embeddings in, a model out."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastpair.errors import ArgumentError, DataError
from fastpair.files import write_model
from fastpair.formats import AS_FOUND, ReadOptions
from fastpair.ingest import EmbeddingSource, open_embeddings
from fastpair.jobs.inputs import Summary, holds_labels, truth
from fastpair.pairs import open_pairs, repeats_note
from fastpair.results import (
    SCORE_BLOCK,
)
from fastpair.spooling import received
from fastpair.staging import check_output, writing

if TYPE_CHECKING:
    pass


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
    has_labels = not good_alone or holds_labels(path, source, columns)
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


def _numbers(values: Any, column: str | None, path: Path) -> np.ndarray:
    """Turn an Arrow column into float64; what is missing becomes NaN."""
    import pyarrow as pa

    try:
        return np.asarray(values.cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)
    except pa.ArrowInvalid as error:
        raise DataError(f"the column {column} of {path} holds no numbers: {error}") from error
