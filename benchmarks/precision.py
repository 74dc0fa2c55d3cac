"""How far each precision of a table is from float64: the README's table, on ten times the pairs.

    python benchmarks/precision.py

Rows are random, of length 1, 300 columns; heads weigh them at random. Errors are those of raw
scores, in units of the standard deviation of the scores, so that a head's weights do not matter:
the greatest and the root of the mean square. "NumPy float32" is the same formula in NumPy on
float32 arrays.
"""

from __future__ import annotations

import click

from fastpair.bench_figures import NUMPY, PRECISION_HEADS, precision_errors
from fastpair.kernels import PRECISIONS

PAIRS, COLUMNS = 200_000, 300


@click.command()
@click.option("--pairs", default=PAIRS, show_default=True, help="How many.")
def main(pairs: int) -> None:
    """Print the table as Markdown."""
    names = [NUMPY, *PRECISIONS]
    click.echo("| head | " + " | ".join(names) + " |")
    click.echo("| --- |" + " --- |" * len(names))
    for head in PRECISION_HEADS:
        errors = precision_errors(head, COLUMNS, pairs=pairs)
        cells = [f"{errors[name]['greatest']:.0e} ({errors[name]['rms']:.0e})" for name in names]
        click.echo(f"| `{head}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
