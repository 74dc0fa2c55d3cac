"""Examples of each command, which stand at the end of its help."""

from __future__ import annotations

import click

EXAMPLES: dict[str, list[tuple[str, str]]] = {
    "demo": [
        ("learn, score and search on handwritten digits", "fastpair demo"),
        ("the same, its files elsewhere", "fastpair demo --folder /tmp/digits"),
    ],
    "train": [
        (
            "from embeddings and labelled pairs, validated on others",
            "fastpair train embeddings.h5 train.csv --valid valid.csv -o model.h5",
        ),
        (
            "one head, 64 columns, grades from 4 on are good",
            "fastpair train e.npy pairs.tsv --head cosine --dim 64 --good 4 -o m.h5",
        ),
        (
            "ids without embeddings, from ratings",
            "fastpair train --ids ratings.csv --graded -o model.h5",
        ),
        ("go on after an interruption", "fastpair train e.h5 pairs.csv -o m.h5 --resume"),
    ],
    "evaluate": [
        ("metrics with intervals", "fastpair evaluate model.h5 embeddings.h5 test.csv"),
        (
            "a page with figures and the worst mistakes in words",
            "fastpair evaluate m.h5 e.h5 test.csv --report r.html --entities e.csv",
        ),
        ("how good plain cosine is", "fastpair evaluate cosine embeddings.h5 test.csv"),
    ],
    "bench": [
        ("this machine, in less than a minute", "fastpair bench"),
        (
            "your own table and pairs, and decisions at your model's threshold",
            "fastpair bench --table table.h5 --pairs candidates.csv",
        ),
        ("for fastpair plan, and for a later --against", "fastpair bench --json > rates.json"),
        ("what became slower since", "fastpair bench --against rates.json"),
    ],
    "info": [
        ("what a file is", "fastpair info table.h5"),
        ("whether it is whole: all of it is read", "fastpair info scores.h5 --verify"),
    ],
    "plan": [
        (
            "a trillion pairs on 64 machines like this one",
            "fastpair plan --entities 1e9 --pairs 1e12 --workers 64 --rates rates.json",
        ),
        (
            "the best 10 of all pairs of 20 million entities",
            "fastpair plan --entities 2e7 --top-k 10 --rates rates.json",
        ),
        (
            "every pair above a threshold, at a known rate",
            "fastpair plan --entities 1e6 --threshold --pairs-per-second 1e9",
        ),
    ],
    "score": [
        (
            "a pair file in its order, ids as they came",
            "fastpair score table.h5 candidates.csv -o scores.csv",
        ),
        (
            "users with items: a table for each side",
            "fastpair score users.h5 pairs.parquet --against items.h5 -o scores.h5",
        ),
        (
            "good pairs alone, as probabilities",
            "fastpair score t.h5 p.csv -o s.csv --probability --min-score 0.9",
        ),
        ("go on after an interruption", "fastpair score t.h5 p.csv -o scores.h5 --resume"),
    ],
    "matrix": [
        ("the best 10 of everyone", "fastpair matrix table.h5 --top-k 10 -o best.h5"),
        (
            "every pair above even odds, as CSR for SciPy",
            "fastpair matrix table.h5 --threshold 0 -o matches.npz",
        ),
        (
            "the best 5 items of each user, without those known already",
            "fastpair matrix u.h5 --against i.h5 --top-k 5 --exclude known.csv -o b.h5",
        ),
        ("how many pairs score how much", "fastpair matrix table.h5 --histogram -o h.csv"),
    ],
    "nearest": [
        ("neighbours of an id", "fastpair nearest model.h5 embeddings.h5 puppy"),
        (
            "of arithmetic on ids, by plain cosine",
            'fastpair nearest cosine words.h5 "king - man + woman" --top-k 5',
        ),
        ("of each line of a text", "fastpair nearest m.h5 e.h5 --file ids.txt --json"),
    ],
    "cluster": [
        (
            "chains of pairs that score at least 2",
            "fastpair cluster scores.csv --threshold 2 -o groups.csv",
        ),
        (
            "groups that are similar as a whole, compared with labelled pairs",
            "fastpair cluster m.h5 --threshold 2 --link average --truth t.csv -o g.csv",
        ),
    ],
    "convert": [
        ("embeddings of a text file", "fastpair convert glove.txt embeddings.h5"),
        (
            "pairs, their columns named",
            "fastpair convert pairs.tsv pairs.h5 --pairs --left a --right b",
        ),
    ],
    "project": [
        ("through a learned model", "fastpair project model.h5 embeddings.h5 -o table.h5"),
        (
            "plain cosine in a quarter of the bytes",
            "fastpair project cosine embeddings.npy -o table.h5 --precision int8",
        ),
        (
            "the left side of a model of two tables of ids",
            "fastpair project model.h5 --side left -o users.h5",
        ),
    ],
    "features": [
        (
            "columns for a gradient booster, keys and labels beside them",
            "fastpair features model.h5 embeddings.h5 pairs.csv -o features.parquet",
        ),
        (
            "products and absolute differences alone",
            "fastpair features m.h5 e.h5 p.csv -o f.h5 --kinds product,absdiff",
        ),
    ],
    "completion": [
        ("in ~/.bashrc", 'eval "$(fastpair completion bash)"'),
        ("in ~/.zshrc", 'eval "$(fastpair completion zsh)"'),
        (
            "for fish",
            "fastpair completion fish > ~/.config/fish/completions/fastpair.fish",
        ),
    ],
}
"""By command: what an example does, and the line that does it."""


class CommandWithExamples(click.Command):
    """A command whose help ends with examples."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what else is to be said, then the examples."""
        super().format_epilog(ctx, formatter)
        with formatter.section("Examples"):
            for number, (words, line) in enumerate(EXAMPLES.get(self.name or "", [])):
                if number:
                    formatter.write("\n")
                formatter.write(f"{'':>{formatter.current_indent}}# {words}\n")
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class Commands(click.Group):
    """The group of all commands."""

    command_class = CommandWithExamples
