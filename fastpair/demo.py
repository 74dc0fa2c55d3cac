"""What ``fastpair demo`` shows: the main job, end to end, on handwritten digits.

The data are the 1,797 images of 8 x 8 grey values that come with scikit-learn (Alpaydin and
Kaynak, Optical Recognition of Handwritten Digits, 1998). Two images of one digit are a good pair.
Images, not pairs, are split, so that no image of the test pairs was seen in training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastpair import jobs

SPLIT = (0.6, 0.15, 0.25)
"""Shares of the images: train, valid, test."""

PAIRS_AN_IMAGE = 40
"""Training and validation pairs drawn for each image of their part."""


def prepare(folder: Path) -> dict[str, Path]:
    """Write embeddings and pairs; return the files by name."""
    import pyarrow as pa
    from sklearn.datasets import load_digits

    from fastpair.files import write_embeddings

    digits = load_digits()
    count = len(digits.target)
    files = {
        name: folder / f"{name}.h5"
        for name in ("images", "pairs_train", "pairs_valid", "pairs_test", "pairs_all")
    }
    ids = pa.array([f"{n:04d}:{digit}" for n, digit in enumerate(digits.target)])
    images = digits.data.astype(np.float32)
    write_embeddings(files["images"], [(0, images)], images.shape, ids=ids, overwrite=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(count)
    train, valid, test = np.split(order, np.cumsum([int(s * count) for s in SPLIT[:2]]))
    for name, part in (("pairs_train", train), ("pairs_valid", valid)):
        left, right = rng.choice(part, (2, PAIRS_AN_IMAGE * len(part)))
        apart = left != right
        _write(files[name], left[apart], right[apart], digits.target)
    _write(files["pairs_test"], *_all_pairs(np.sort(test)), digits.target)
    _write(files["pairs_all"], *_all_pairs(np.arange(count)), None)
    return files


def _write(path: Path, left: np.ndarray, right: np.ndarray, digits: np.ndarray | None) -> None:
    from fastpair.files import write_pairs

    same = None if digits is None else (digits[left] == digits[right]).astype(np.float64)
    blocks = [(left, right, same)]
    labelled = same is not None
    write_pairs(path, blocks, len(left), dtype="int32", label=labelled, overwrite=True)


def _all_pairs(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    left, right = np.triu_indices(len(rows), 1)
    return rows[left], rows[right]


def run_demo(folder: Path, threads: int | None = None) -> dict[str, Any]:
    """Run the demo in `folder`, print what happens, and return the figures.

    Parameters
    ----------
    folder : made if it is missing; files of an earlier demo are replaced.
    threads : default one for each processor.

    Raises
    ------
    FileError : the folder cannot be written, or holds other files.
    """
    from rich.console import Console

    from fastpair.errors import FileError
    from fastpair.staging import writing

    console = Console(highlight=False)
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / "pairs_all.h5").exists():
        raise FileError(f"{folder} holds other files: name a new folder with --folder")
    console.print("1,797 handwritten digits of 64 grey values; a good pair shows one digit twice.")
    files = prepare(folder)
    model, table = folder / "model.h5", folder / "table.h5"
    scores, best = folder / "scores.h5", folder / "best.h5"
    options: dict[str, Any] = {"overwrite": True}
    trained = jobs.train(
        files["images"],
        files["pairs_train"],
        model,
        valid=files["pairs_valid"],
        threads=threads,
        **options,
    )
    console.print(
        f"Learned from {trained['n_pairs']:,} labelled pairs in {trained['seconds']:.1f} s."
    )
    measured = jobs.evaluate(model, files["images"], files["pairs_test"], threads=threads)
    _print_quality(console, measured)
    jobs.project(model, files["images"], table, threads=threads, **options)
    warm_up(table, files["pairs_valid"], folder, threads)
    scored = jobs.score(table, files["pairs_all"], scores, threads=threads, **options)
    console.print(
        f"\nScored all {scored['pairs']:,} pairs from an HDF5 file: "
        f"{scored['pairs_per_second'] / 1e6:.1f} million a second, {scored['threads']} threads."
    )
    jobs.matrix(table, best, top_k=3, threads=threads, **options)
    _print_best(console, best)
    _print_commands(console, folder)
    return {"evaluation": measured, "score": scored, "train": trained}


def warm_up(table: Path, pairs: Path, folder: Path, threads: int | None) -> None:
    """Have the kernels compiled before the clock runs; later processes find them compiled."""
    output = folder / "warm_up.h5"
    jobs.score(table, pairs, output, threads=threads, overwrite=True)
    output.unlink()


def _print_quality(console: Any, measured: dict[str, Any]) -> None:
    from rich.table import Table

    rows = Table(title=f"{measured['n_pairs']:,} pairs of images never seen", title_justify="left")
    for column in ("similarity", "AUC", "average precision"):
        rows.add_column(column, justify="left" if column == "similarity" else "right")
    for name, metrics in (("raw cosine", measured["raw_cosine"]), ("learned", measured)):
        rows.add_row(name, f"{metrics['auc']:.4f}", f"{metrics['average_precision']:.4f}")
    console.print(rows)


def _print_best(console: Any, best: Path) -> None:
    from rich.table import Table

    from fastpair.results import read_top_k

    found = read_top_k(best)
    ids = found.ids.to_pylist() if found.ids is not None else []
    rows = Table(title="The 3 most similar images of a few (number:digit)", title_justify="left")
    for column in ("image", "first", "second", "third"):
        rows.add_column(column)
    for row in (0, 500, 1000, 1500):
        cells = [
            f"{ids[index]} ({score:+.2f})"
            for index, score in zip(found.indices[row], found.scores[row], strict=True)
        ]
        rows.add_row(ids[row], *cells)
    console.print(rows)


def _print_commands(console: Any, folder: Path) -> None:
    console.print(f"\nThe files are in {folder}. These commands made them; go on from here:\n")
    for command in (
        "fastpair train images.h5 pairs_train.h5 --valid pairs_valid.h5 -o model.h5",
        "fastpair evaluate model.h5 images.h5 pairs_test.h5",
        "fastpair project model.h5 images.h5 -o table.h5",
        "fastpair score table.h5 pairs_all.h5 -o scores.h5",
        "fastpair matrix table.h5 --top-k 3 -o best.h5",
        "fastpair info best.h5",
    ):
        console.print(f"  {command}", markup=False)
