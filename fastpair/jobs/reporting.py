"""The page that `evaluate` writes beside its numbers."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastpair.errors import ArgumentError, FileError
from fastpair.jobs.inputs import Summary, file_fingerprint
from fastpair.staging import PARTIAL, check_output, writing

if TYPE_CHECKING:
    from fastpair.comparison import Comparison
    from fastpair.entities import EntityTexts
    from fastpair.model import Model

LIBRARIES = ("fastpair", "numpy", "scipy", "scikit-learn", "matplotlib")
"""Whose versions a report names."""


def check_report(
    report: Path | None, entities: Path | None, overwrite: bool, inputs: Sequence[Path | None]
) -> None:
    """Refuse, before any work is done, a report that cannot be made."""
    if report is None:
        if entities is not None:
            raise ArgumentError("entities are shown in a report alone: give report too")
        if overwrite:
            raise ArgumentError("overwrite goes with a report alone: give report too")
        return
    from fastpair.plots import check_matplotlib

    check_matplotlib()
    report = Path(report)
    if report.suffix.lower() not in (".html", ".htm"):
        raise ArgumentError(f"the report {report} ends in {report.suffix!r}, expected .html")
    files = [Path(path) for path in (*inputs, entities) if path is not None and Path(path).exists()]
    check_output(report, overwrite=overwrite, inputs=files)
    if entities is not None and not Path(entities).is_file():
        raise FileError(f"{entities} does not exist: give a table of entities, such as .csv.")
    if entities is not None:
        from fastpair.entities import open_entities

        open_entities(entities)


def write_report(
    path: Path,
    summary: Summary,
    model: Model,
    comparison: Comparison,
    *,
    pair_rows: np.ndarray,
    name_of: Callable[[int], str],
    entities: Path | None,
    model_name: str | Path,
    files: Mapping[str, tuple[Path, Path] | None],
    options: Mapping[str, Any],
) -> None:
    """Write the report of an evaluation.

    Parameters
    ----------
    path : the page.
    summary : what was found.
    model, comparison : the model, and the labelled pairs under it.
    pair_rows : (M,) rows of the pairs in their file.
    name_of : the id of an entity of the comparison.
    entities : table of what ids stand for, or None.
    model_name : how the model was named.
    files : what was read, by what it is: how it was named, and where it was read.
    options : of the evaluation, by name; those that are None are left out.
    """
    from fastpair.report import report
    from fastpair.report_material import Material

    read: Callable[[Sequence[str]], EntityTexts] | None = None
    if entities is not None:
        from fastpair.entities import read_entities

        def read(ids: Sequence[str]) -> EntityTexts:
            return read_entities(entities, ids)

    made = [(name, metadata.version(name)) for name in LIBRARIES]
    made.append(("Python", platform.python_version()))
    made.append(("model", f"{Path(model_name).name}, fingerprint {model.fingerprint()[:16]}"))
    shown = None if entities is None else (entities, entities)
    made += [
        (name, _described(*paths))
        for name, paths in {**files, "entities": shown}.items()
        if paths is not None
    ]
    made += [(name, str(value)) for name, value in options.items() if value not in (None, (), [])]
    pairs = files["pairs"]
    title = f"{Path(model_name).name} on {Path(pairs[0]).name if pairs else 'pairs'}"
    page = report(Material(summary, model, comparison, pair_rows, name_of, read, made, title))
    path = Path(path)
    staged = path.with_name(path.name + PARTIAL)
    with writing(path):
        try:
            staged.write_text(page, encoding="utf-8")
            os.replace(staged, path)
        finally:
            staged.unlink(missing_ok=True)


def _described(name: Path, path: Path) -> str:
    """Say which file it was; its fingerprint is of its size, its first and its last MiB."""
    path = Path(path)
    size, fingerprint = path.stat().st_size, file_fingerprint(path)[:16]
    return f"{Path(name).name}, {size:,} bytes, fingerprint {fingerprint}"
