"""Embeddings, tables and models as callers in Python hold them -> folded tables in one form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastpair.errors import ArgumentError, DataError, MismatchError
from fastpair.files import Table, read_model
from fastpair.folding import fold
from fastpair.frames import ArrayLike, as_array, as_matrix
from fastpair.model import BUILTINS, Model, builtin, probabilities
from fastpair.scoring import distance_form, meet

ModelLike = Any
"""A `Model`, the path of a model file, "cosine" or another of `BUILTINS`, or a fitted estimator."""

UNITS = ("score", "probability", "distance", "decision")
"""What the functions can return in the place of scores."""

Form = Callable[[np.ndarray], np.ndarray]


def as_model(model: ModelLike) -> Model:
    """Return a model, whatever names or holds it.

    Raises
    ------
    ArgumentError : it is none of what `ModelLike` says, or an estimator that is not fitted.
    FileError : the file holds no model.
    """
    if isinstance(model, Model):
        return model
    if isinstance(model, str) and model in BUILTINS:
        return builtin(model)
    if isinstance(model, (str, Path)):
        if not Path(model).exists() and Path(model).parent == Path() and not Path(model).suffix:
            known = ", ".join(BUILTINS)
            raise ArgumentError(f"{model} is neither a model file nor one of {known}")
        return read_model(model)
    if isinstance(fitted := getattr(model, "model_", None), Model):
        return fitted
    kind = type(model).__name__
    if hasattr(model, "fit"):
        raise ArgumentError(f"model is a {kind} that is not fitted: call fit first")
    raise ArgumentError(
        f"model is a {kind}, expected a Model, a path, a fitted PairSimilarity or one of "
        f"{', '.join(BUILTINS)}"
    )


def as_table(
    embeddings: ArrayLike | Table,
    name: str,
    model: ModelLike | None,
    precision: str | None,
    side: str = "both",
    threads: int | None = None,
    option: str = "model",
) -> Table:
    """Return folded embeddings.

    Parameters
    ----------
    embeddings : (N, n) finite numbers, or a table, which comes back as it is.
    name : what messages call them.
    model : what folds them, default cosine; a table brings its own.
    precision : of the columns, default float32; a table brings its own.
    side : "both"; "left" or "right" in asymmetric models.
    threads : number of threads; default one for each processor.
    option : what messages call the model.

    Raises
    ------
    ArgumentError, DataError : the embeddings cannot be used; `model` or `precision` beside a table.
    MismatchError : the model takes another number of columns.
    """
    if isinstance(embeddings, Table):
        for other, given in ((option, model), ("precision", precision)):
            if given is not None:
                raise ArgumentError(
                    f"{other} is given but {name} are a table, which has its own: leave it out"
                )
        if embeddings.isolated is not None:
            raise DataError(
                f"{name} are a table with rows whose embeddings are not finite: fold the finite "
                "ones alone"
            )
        return embeddings
    chosen = as_model("cosine" if model is None else model)
    if chosen.tables is not None:
        raise ArgumentError(
            "the model learned ids and has tables of its own: project it and read the tables"
        )
    rows, plan = fold(
        chosen, as_matrix(embeddings, name), precision or "float32", side=side, threads=threads
    )
    return Table(
        rows=rows,
        plan=plan,
        ids=None,
        fingerprint=chosen.fingerprint(),
        model_name=chosen.description.get("builtin", "model"),
        side=side,
        unit=chosen.unit,
        threshold=chosen.threshold,
        digest="",
        calibration=chosen.calibration,
    )


def both_tables(
    embeddings: ArrayLike | Table,
    against: ArrayLike | Table | None,
    model: ModelLike | None,
    precision: str | None,
    threads: int | None,
    names: tuple[str, str] = ("embeddings", "against"),
    option: str = "model",
) -> tuple[Table, Table | None]:
    """Return the left table and the right one, or None where it is the same, with equal plans.

    An asymmetric model folds embeddings of one kind into two tables. Messages call the two `names`
    and the model `option`.

    Raises
    ------
    MismatchError : the two do not belong together.
    """
    given = isinstance(embeddings, Table), isinstance(against, Table)
    if against is not None and given[0] != given[1]:
        raise ArgumentError(
            f"{names[given[1]]} is a table and the other is not: give both in one form"
        )
    if given[0]:
        left = as_table(embeddings, names[0], model, precision, option=option)
        if against is None:
            if left.side != "both":
                raise ArgumentError(f"the table holds {left.side} entities: give the others too")
            return left, None
        right = as_table(against, names[1], None, None)
        if left.fingerprint != right.fingerprint:
            raise MismatchError("the two tables are of two models: fold both with one")
        if "both" not in (left.side, right.side) and (left.side, right.side) != ("left", "right"):
            raise MismatchError(
                f"the tables hold {left.side} and {right.side} entities, expected left and right"
            )
    else:
        chosen = as_model("cosine" if model is None else model)
        sides = ("left", "right") if chosen.asymmetric else ("both", "both")
        embeddings = as_array(embeddings, names[0])
        name, others = names[0], embeddings
        if against is not None:
            name, others = names[1], as_array(against, names[1])
            _check_columns(embeddings, others, names)
        left = as_table(embeddings, names[0], chosen, precision, sides[0], threads)
        if against is None and not chosen.asymmetric:
            return left, None
        right = as_table(others, name, chosen, precision, sides[1], threads)
    left_rows, right_rows, plan = meet(left.rows, left.plan, right.rows, right.plan)
    return _with(left, left_rows, plan), _with(right, right_rows, plan)


def _check_columns(left: np.ndarray, right: np.ndarray, names: tuple[str, str]) -> None:
    if left.ndim == right.ndim == 2 and left.shape[1] != right.shape[1]:
        raise MismatchError(
            f"{names[0]} have {left.shape[1]} columns and {names[1]} {right.shape[1]}: give "
            "embeddings of one encoder"
        )


def _with(table: Table, rows: np.ndarray, plan: Any) -> Table:
    from dataclasses import replace

    return table if rows is table.rows else replace(table, rows=rows, plan=plan)


def form_of(table: Table, unit: str) -> Form:
    """Return what turns scores (m,) float32 of a table into a unit of `UNITS`, float32 again.

    Raises
    ------
    ArgumentError : an unknown unit, or one that the model's scores do not have.
    """
    if unit not in UNITS:
        raise ArgumentError(f"unit is {unit!r}, expected one of {', '.join(UNITS)}")
    if unit == "score":
        return lambda scores: scores
    if unit == "probability":
        if table.calibration is None and table.unit != "log-odds":
            raise ArgumentError(
                f"scores are of the unit {table.unit}, which has no probability: use a model that "
                "was trained on good and bad pairs"
            )
        told = table.unit, table.calibration
        return lambda scores: probabilities(scores.astype(np.float64), *told).astype(np.float32)
    if unit == "decision":
        threshold = table.threshold
        if threshold is None:
            raise ArgumentError("the model has no threshold to decide by: compare scores yourself")
        return lambda scores: (scores >= np.float64(threshold)).astype(np.float32)
    form = distance_form(table.plan)
    if form is None:
        raise ArgumentError(
            "the model is no distance: use euclidean, manhattan, or the head mahalanobis, which "
            "always learns one"
        )
    return lambda scores: form(scores).astype(np.float32)
