"""What several commands read and refuse alike: models, tables, outputs, fingerprints."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fastpair.backend import memory_budget
from fastpair.device import device_bytes as device_bytes
from fastpair.errors import ArgumentError, DataError, MemoryBudgetError, MismatchError
from fastpair.files import Table, read_model, read_table
from fastpair.ingest import EmbeddingSource
from fastpair.model import BUILTINS, Model, builtin
from fastpair.parts import PARTS
from fastpair.raw_pairs import known_ids, open_raw_pairs
from fastpair.scoring import meet

Summary = dict[str, Any]

Count = Callable[[int], None]

LINKS_BY_DEVICE = ("exponential", "negative_arcosh")
"""Links through library functions, which may round otherwise on another device."""


def ignore(_: int) -> None:
    """Progress that nobody watches."""


def load_model(name: str | Path) -> Model:
    """Return a built-in similarity by its name, or the model in a file."""
    if str(name) in BUILTINS:
        return builtin(str(name))
    if not Path(name).exists() and Path(name).parent == Path() and not Path(name).suffix:
        known = ", ".join(BUILTINS)
        raise ArgumentError(f"{name} is neither a model file nor one of {known}")
    return read_model(name)


def holds_labels(path: Path, source: EmbeddingSource, columns: dict[str, Any]) -> bool:
    """Say whether a pair file has a column of labels."""
    names = (columns["left_column"], columns["right_column"], columns["label_column"])
    known = known_ids(source.ids, source.ids)
    raw = open_raw_pairs(path, *names, known=known, options=columns["options"])
    return raw.label is not None


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


def since(begun: float) -> float:
    """Return the seconds since a moment of `time.perf_counter`."""
    return time.perf_counter() - begun


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


def load_tables(
    table: Path,
    against: Path | None,
    memory: str | int | None,
    *,
    unknown: bool = False,
    either_way: bool = False,
    without_rows: bool = False,
) -> tuple[Table, Table | None, int]:
    """Read one or two tables that belong together; return also the memory that is left.

    Parameters
    ----------
    unknown : whether the rows of unknown ids come too.
    either_way : whether a right table may be the first and a left one the second.
    without_rows : read everything but the rows, which others score: they are (N, 0) bytes.
    """
    if without_rows:
        return _known_tables(table, against, unknown, either_way)
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
        check_models(table, left, against, right)
        rows = meet(left.rows, left.plan, right.rows, right.plan, in_place=True)
        left = replace(left, rows=rows[0], plan=rows[2])
        right = replace(right, rows=rows[1], plan=rows[2])
    check_sides(table, left, right, either_way)
    return left, right, budget - sum(sizes)


def _known_tables(
    table: Path, against: Path | None, unknown: bool, either_way: bool
) -> tuple[Table, Table | None, int]:
    """Read what there is to know of tables without their rows."""
    tables = []
    for path in (table, against):
        if path is not None:
            found = read_table(path, random_access=False, unknown=unknown)
            tables.append(replace(found, rows=np.empty((len(found.rows), 0), np.uint8)))
    left, right = tables[0], tables[1] if len(tables) > 1 else None
    if right is not None:
        check_models(table, left, against, right)
        nothing = np.empty((0, left.plan.layout.row_bytes), np.uint8)
        plan = meet(nothing, left.plan, nothing, right.plan)[2]
        left, right = replace(left, plan=plan), replace(right, plan=plan)
    check_sides(table, left, right, either_way)
    return left, right, 0


def check_models(table: Path, left: Table, against: Path | None, right: Table) -> None:
    """Refuse two tables that were not made by one model."""
    if right.fingerprint != left.fingerprint:
        raise MismatchError(
            f"{against} was made by the model {right.model_name!r} and {table} by "
            f"{left.model_name!r}: project both with one model"
        )


def check_sides(path: Path, left: Table, right: Table | None, either_way: bool) -> None:
    """Refuse tables of a model of two sides that are not one of each side, left first."""
    sides = (left.side, (right or left).side)
    turned = either_way and sides == ("right", "left")
    if sides not in (("both", "both"), ("left", "right")) and not turned:
        raise MismatchError(
            f"{path} holds the {sides[0]} side of a model of two sides and meets the {sides[1]} "
            "side: take the table of --side left --against that of --side right"
        )


def table_sizes(left: Table, right: Table | None) -> Summary:
    """Return what a plan of larger runs is fitted to: bytes of a row, and of the tables."""
    row_bytes = left.plan.layout.row_bytes
    rows = left.count + (0 if right is None else right.count)
    return {"row_bytes": row_bytes, "table_bytes": rows * row_bytes}


def file_fingerprint(path: Path) -> str:
    """What tells a large input from another one without reading it whole: its size and ends."""
    path = Path(path)
    digest = hashlib.sha256(f"{path.stat().st_size} ".encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, path.stat().st_size - (1 << 20)))
        digest.update(file.read())
    return digest.hexdigest()


def content_digest(path: Path) -> str:
    """A digest of all bytes of a file, for inputs that are held whole anyway."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_time(path: Path) -> str:
    """When a file was last changed: what its fingerprint does not see."""
    return str(Path(path).stat().st_mtime_ns)


def prepare_kernels() -> None:
    """Load Numba and the pair kernel, which takes half a second."""
    from fastpair.kernels import pairs  # noqa: F401


def digest_of_kernels() -> str:
    """Return a digest of all kernels, those of GPUs too: either may score a part of a run."""
    from fastpair import kernels
    from fastpair.kernels.simd import kernel_digest

    digest = hashlib.sha256(kernel_digest().encode())
    folder = Path(kernels.__file__).parent
    for source in sorted([*folder.glob("*.cu*"), *folder.glob("gpu*.py")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def parts_left(output: Path, resume: bool, resumed: int) -> list[str]:
    """Return a note, if a run was to go on with what only a run on a cluster goes on with."""
    folder = output.with_name(output.name + PARTS)
    if not resume or resumed or not folder.exists():
        return []
    return [
        f"began anew: {folder} holds parts of a run with --workers or --scheduler, which go on "
        "with them"
    ]


def expect_hdf5(output: Path) -> None:
    """Refuse an output whose name is not that of an HDF5 file."""
    if Path(output).suffix.lower() not in (".h5", ".hdf5"):
        raise ArgumentError(
            f"the output {output} ends in {Path(output).suffix!r}, expected .h5 or .hdf5 here"
        )
