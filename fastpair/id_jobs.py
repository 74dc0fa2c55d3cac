"""Commands for id models: pairs of ids in, tables out; measured without a file of embeddings."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fastpair.columns import parse_labels
from fastpair.errors import ArgumentError, DataError
from fastpair.files import write_model
from fastpair.formats import AS_FOUND, ReadOptions
from fastpair.id_tables import IdTable, IdTables
from fastpair.ids import RowsOfIds, check_ids
from fastpair.jobs.inputs import load_model, truth
from fastpair.jobs.learning import logging_epochs
from fastpair.jobs.reporting import check_report, write_report
from fastpair.model import Model
from fastpair.pairs import Side, open_pairs
from fastpair.raw_pairs import RawPairs, open_raw_pairs
from fastpair.results import SCORE_BLOCK
from fastpair.spooling import received
from fastpair.staging import check_output

Summary = dict[str, Any]

TWO_KINDS = {("user", "item"), ("user_id", "item_id")}
"""Names of two columns, in lower case, whose ids are never of one kind."""


@dataclass(frozen=True)
class TextPairs:
    """Pairs as their ids stand in a file.

    Parameters
    ----------
    names : of the two columns.
    left, right : text, (M,) each in chunks.
    labels : (M,) float64, or None where there are none.
    assumed : what was taken for granted while the file was opened; empty if nothing.
    """

    names: tuple[str, str]
    left: pa.ChunkedArray
    right: pa.ChunkedArray
    labels: np.ndarray | None
    assumed: str = ""


def read_text_pairs(
    path: Path,
    left: str | None = None,
    right: str | None = None,
    label: str | None = None,
    *,
    options: ReadOptions = AS_FOUND,
) -> TextPairs:
    """Read ids as text and labels, where there are some.

    Raises
    ------
    DataError : an id is missing or empty, or a label is not one.
    """
    found_label = open_raw_pairs(path, left, right, label, options=options).label
    has_labels = found_label is not None
    raw = open_raw_pairs(path, left, right, label, want_labels=has_labels, options=options)
    sides: tuple[list[pa.Array], list[pa.Array]] = ([], [])
    labels: list[np.ndarray] = []
    start = 0
    for batch in raw.read(0):
        for number, texts in enumerate(sides):
            texts.append(_texts(raw, batch, number, start))
        if has_labels:
            labels.append(parse_labels(batch.column(2), str(path), start))
        start += batch.num_rows
    found = np.concatenate(labels) if has_labels else None
    chunked = [pa.chunked_array(texts, pa.string()) for texts in sides]
    return TextPairs(raw.names, chunked[0], chunked[1], found, raw.assumed)


def _texts(raw: RawPairs, batch: pa.RecordBatch, number: int, start: int) -> pa.Array:
    return Side(str(raw.path), raw.names[number], batch.column(number), start, 0).texts()


def _encoded(texts: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """Return the ids (N,) in the order of their first pairs, and the row of each text, int32."""
    rows = pa.concat_arrays(texts.dictionary_encode().chunks)
    return rows.dictionary.cast(pa.string()), rows.indices.to_numpy()


def _have_two_tables(pairs: TextPairs, asked: bool | None) -> tuple[bool, str]:
    """Return whether left and right ids are told apart, and a sentence on why."""
    if asked is not None:
        return asked, ""
    names = tuple(name.lower() for name in pairs.names)
    if names in TWO_KINDS:
        return True, f"two tables, because the columns are named {' and '.join(pairs.names)}"
    left, right = (side.unique() for side in (pairs.left, pairs.right))
    if len(pa.chunked_array([left, right]).unique()) == len(left) + len(right):
        return True, "two tables, because no left id is also a right id"
    return False, "one table for both sides, because some left ids are also right ids"


def train(
    pairs: Path,
    output: Path,
    *,
    valid: Path | None = None,
    two_tables: bool | None = None,
    good: float | None = None,
    graded: bool = False,
    left_column: str | None = None,
    right_column: str | None = None,
    label_column: str | None = None,
    log: Path | None = None,
    reading: ReadOptions = AS_FOUND,
    overwrite: bool = False,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    **settings: Any,
) -> Summary:
    """Learn tables from pairs of ids and write them as a model.

    Parameters
    ----------
    pairs, valid : files of any accepted format; without labels all pairs are good.
    two_tables : whether left and right ids are of two kinds; default: as columns and ids say.
    good : a label of at least this is a good pair.
    graded : labels are grades and the grade itself is learned.
    log : file for one line of JSON an epoch.
    reading : what the pair files do not say themselves.
    on_epoch : called with each epoch's entry of the history.
    settings : the other settings of `training_ids.train_ids`; None keeps their defaults.

    Raises
    ------
    FastpairError : files or labels cannot be learned from; nothing is written.
    """
    from fastpair.training_ids import train_ids

    if graded and good is not None:
        raise ArgumentError("--good makes labels good or bad, --graded learns grades: choose one")
    inputs = [Path(path) for path in (pairs, valid) if path is not None]
    check_output(Path(output), overwrite=overwrite, inputs=inputs)
    if log is not None:
        check_output(log, overwrite=overwrite, inputs=[*inputs, Path(output)])
    begun = time.perf_counter()
    names = (left_column, right_column, label_column)
    pairs = received(pairs)
    given = read_text_pairs(pairs, *names, options=reading)
    if given.labels is None and (graded or good is not None):
        raise DataError(f"{pairs} has no column of labels: name it with --label")
    apart, assumed = _have_two_tables(given, two_tables)
    ids, left, right = _rows(given, apart, Path(pairs))
    lookups = [RowsOfIds(one) for one in ids]
    held = None
    if valid is not None:
        valid = received(valid)
        texts = read_text_pairs(valid, *names, options=reading)
        if given.labels is not None and texts.labels is None:
            raise DataError(f"{valid} has no column of labels: name it with --label")
        held_labels = _labels(texts, good, graded, Path(valid))
        held = (_found(lookups[0], texts.left), _found(lookups[-1], texts.right), held_labels)
    labels = _labels(given, good, graded, Path(pairs))
    with contextlib.ExitStack() as stack:
        result = train_ids(
            left,
            right,
            labels,
            (len(ids[0]), len(ids[1]) if apart else None),
            valid=held,
            graded=graded,
            on_epoch=logging_epochs(log, [], stack, on_epoch),
            **{name: value for name, value in settings.items() if value is not None},
        )
    tables = IdTables(
        IdTable(ids[0], result.left),
        None if result.right is None else IdTable(ids[1], result.right),
    )
    model = replace(result.model, tables=tables)
    write_model(output, model, overwrite=overwrite)
    return {
        "output": str(output),
        "fingerprint": model.fingerprint(),
        "n_pairs": len(left),
        "ids": {side: len(table.ids) for side, table in tables.sides.items()},
        "columns": list(given.names),
        "seconds": time.perf_counter() - begun,
        "unit": model.unit,
        "meaning": MEANINGS[model.unit],
        "threshold": model.threshold,
        "validation": {result.metric: result.best},
        "history": result.history,
        "arms": [],
        "notes": [note for note in (given.assumed, assumed, *result.notes) if note],
    }


MEANINGS = {
    "log-odds": "positive: a good pair is more likely than a bad one; negative: less likely",
    "grade": "the predicted grade, on the scale of the labels",
}
"""What a score says, by unit."""


def _rows(
    pairs: TextPairs, apart: bool, path: Path
) -> tuple[list[pa.Array], np.ndarray, np.ndarray]:
    """Return the ids of one table or of two, and left and right rows."""
    if apart:
        (left_ids, left), (right_ids, right) = _encoded(pairs.left), _encoded(pairs.right)
        ids = [left_ids, right_ids]
    else:
        both, rows = _encoded(pa.chunked_array([*pairs.left.chunks, *pairs.right.chunks]))
        ids, (left, right) = [both], np.split(rows, 2)
    return [check_ids(one, str(path)) for one in ids], left, right


def _found(lookup: RowsOfIds, texts: pa.ChunkedArray) -> np.ndarray:
    return np.concatenate([lookup(chunk) for chunk in texts.chunks])


def _labels(pairs: TextPairs, good: float | None, graded: bool, path: Path) -> np.ndarray | None:
    """Return 0 and 1, grades, or None where all pairs are good."""
    labels = pairs.labels
    if labels is None:
        return None
    if good is None and not graded and np.isin(labels, (-1, 1)).all() and (labels == -1).any():
        labels = (labels + 1) / 2
    return truth(labels, good, graded, path)


# --- measuring ------------------------------------------------------------------------------------


def evaluate(
    model: str | Path,
    pairs: Path,
    *,
    good: float | None = None,
    graded: bool = False,
    by: Sequence[str] = (),
    bootstrap: int = 200,
    report: Path | None = None,
    entities: Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    left_column: str | None = None,
    right_column: str | None = None,
    label_column: str | None = None,
    reading: ReadOptions = AS_FOUND,
    threads: int | None = None,
) -> Summary:
    """Measure a model on labelled pairs of the ids that it learned.

    Parameters
    ----------
    good, graded, by, bootstrap, report, entities, overwrite, seed : as `fastpair.jobs.evaluate`
        takes them.
    reading : what the pair file does not say itself.

    Returns
    -------
    summary : as that of `fastpair.jobs.evaluate`; the baseline, ``biases_alone``, is the model
        without its vectors. Pairs with unknown ids are measured too, and apart under ``entities``.
    """
    from fastpair.comparison import Comparison, Similarity, breakdown
    from fastpair.evaluation import Scored

    begun = time.perf_counter()
    check_report(report, entities, overwrite, [Path(model), pairs])
    similarity = load_model(model)
    tables = similarity.tables
    if tables is None:
        raise ArgumentError(f"the model {model} has no tables of its own: give EMBEDDINGS too")
    right = tables.left if tables.right is None else tables.right
    counts = len(tables.left.ids), len(right.ids)
    graded = graded or similarity.unit == "grade"
    named, pairs = pairs, received(pairs)
    source = open_pairs(
        pairs,
        ids=tables.left.ids,
        count=counts[0],
        right_ids=right.ids,
        right_count=counts[1],
        left_column=left_column,
        right_column=right_column,
        label_column=label_column,
        want_labels=True,
        keys="ids",
        signed_labels=good is None and not graded,
        extra=by,
        unknown_rows=counts,
        options=reading,
    )
    if not source.has_labels:
        raise DataError(f"{pairs} has no column of labels: name it with --label")
    blocks = list(source.blocks(SCORE_BLOCK))
    rows = [np.concatenate([getattr(b, side) for b in blocks]) for side in ("left", "right")]
    labels = np.concatenate([block.label for block in blocks if block.label is not None])
    strange = (rows[0] == counts[0]) | (rows[1] == counts[1])
    if tables.right is not None:
        rows[1] = rows[1] + counts[0] + 1
    stacked = _stacked(tables)
    similarities = {"model": Similarity(similarity, stacked, threads)}
    without = _biases_alone(similarity, stacked)
    if without is not None:
        similarities["biases_alone"] = Similarity(similarity, without, threads)
    scores = {name: one(*rows) for name, one in similarities.items()}
    chance = None if similarity.calibration is None else similarity.probability(scores["model"])
    scored = {
        name: Scored(
            values, similarity.threshold, similarity.unit, chance if name == "model" else None
        )
        for name, values in scores.items()
    }
    options = {"good": good, "graded": graded}
    options |= {"draws": bootstrap, "seed": seed}
    comparison = Comparison((rows[0], rows[1]), labels, scored, similarities, options)
    result = comparison.all_pairs()
    notes = list(result["notes"])
    if strange.any():
        notes.append(
            f"{strange.sum()} pairs have unknown ids, which score as the mean of their side"
        )
        groups = {"known": ~strange, "unknown": strange}
        result["entities"] = {n: comparison.group(np.flatnonzero(g)) for n, g in groups.items()}
    result["recall_at"] = comparison.recall()
    result["by"] = {}
    for number, name in enumerate(by):
        values = [str(v) for block in blocks for v in block.extra[number].to_pylist()]
        result["by"][name], rest = breakdown(comparison, values)
        if rest:
            notes.append(f"{name} has {rest} more values, rarer than those shown")
    result = {**result, "unit": similarity.unit, "notes": notes}
    if report is not None:
        write_report(
            report,
            result,
            similarity,
            comparison,
            pair_rows=np.arange(len(labels)),
            name_of=lambda entity: _stacked_name(tables, entity),
            entities=entities,
            model_name=model,
            files={"pairs": (named, pairs)},
            options={"good": good, "graded": graded or None, "bootstrap": bootstrap, "seed": seed},
        )
        result["report"] = str(report)
    return {**result, "seconds": time.perf_counter() - begun}


def _stacked(tables: IdTables) -> np.ndarray:
    """Return the rows of all tables one after the other, each with that of unknown ids behind."""
    return np.concatenate([table.with_unknown() for table in tables.sides.values()])


def _stacked_name(tables: IdTables, row: int) -> str:
    """Return the id of a row of `_stacked`."""
    for table in tables.sides.values():
        if row <= len(table.ids):
            return "(an unknown id)" if row == len(table.ids) else str(table.ids[row])
        row -= len(table.ids) + 1
    raise IndexError(row)


def _biases_alone(model: Model, columns: np.ndarray) -> np.ndarray | None:
    """Return columns without vectors, or None where the model has no biases or another head."""
    if model.heads != ("dot", "sum"):
        return None
    without = np.zeros_like(columns)
    without[:, -1] = columns[:, -1]
    return without
