"""How far each precision of a table is from float64: the table in the README.

    python benchmarks/precision.py

Rows are random, of length 1, 300 columns; heads weigh them at random. Errors are those of raw
scores, in units of the standard deviation of the scores, so that a head's weights do not matter:
the greatest and the root of the mean square over pairs of 2,000 rows. "NumPy float32" is the same
formula in NumPy on float32 arrays.
"""

from __future__ import annotations

import click
import numpy as np

from fastpair.folding import fold
from fastpair.kernels import PRECISIONS, Plan, reference
from fastpair.model import Branch, Model, builtin
from fastpair.scoring import PairScorer

ROWS, PAIRS, COLUMNS = 2_000, 200_000, 300


def models() -> dict[str, Model]:
    """Return the models by the name of their row in the table."""
    weights = {"weight": np.random.default_rng(1).normal(size=COLUMNS)}
    return {
        "cosine": builtin("cosine"),
        "`max`": Model([Branch("max", dict(weights))], COLUMNS),
        "`absdiff`": Model([Branch("absdiff", dict(weights))], COLUMNS),
        "`sqdiff`": Model([Branch("sqdiff", dict(weights))], COLUMNS),
    }


def numpy_float32(rows: np.ndarray, left: np.ndarray, right: np.ndarray, plan: Plan) -> np.ndarray:
    """Return the scores (m,) of a float32 table as plain NumPy computes them in float32."""
    values = {
        name: value.astype(np.float32) for name, value in reference.unpack_rows(rows, plan).items()
    }
    raw = np.float32(plan.constant) + values["bias"][left] + values["bias"][right]
    for name, sign, columns in reference.signed_runs(plan):
        part = values[name][:, columns]
        raw += np.float32(sign) * reference.terms(name, part[left], part[right]).sum(-1)
    return raw


def errors(model: Model, embeddings: np.ndarray) -> dict[str, tuple[float, float]]:
    """Return (greatest, root mean square) error by precision, in standard deviations."""
    left, right = np.random.default_rng(2).integers(0, ROWS, (2, PAIRS))
    found: dict[str, tuple[float, float]] = {}
    truth = np.concatenate(
        [
            model.score(embeddings[left[part]], embeddings[right[part]])
            for part in np.array_split(np.arange(PAIRS), 20)
        ]
    )
    for precision in PRECISIONS:
        rows, plan = fold(model, embeddings, precision)
        scores = {precision: PairScorer(rows, plan)(left, right)}
        if precision == "float32":
            scores["NumPy float32"] = numpy_float32(rows, left, right, plan)
        for name, values in scores.items():
            error = (values - truth) / truth.std()
            found[name] = float(np.abs(error).max()), float(np.sqrt((error**2).mean()))
    return found


@click.command()
def main() -> None:
    """Print the table as Markdown."""
    embeddings = np.random.default_rng(0).normal(size=(ROWS, COLUMNS))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    names = ["NumPy float32", *PRECISIONS]
    click.echo("| head | " + " | ".join(names) + " |")
    click.echo("| --- |" + " --- |" * len(names))
    for head, model in models().items():
        found = errors(model, embeddings)
        cells = [f"{found[name][0]:.0e} ({found[name][1]:.0e})" for name in names]
        click.echo(f"| {head} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
