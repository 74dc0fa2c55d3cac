"""Words that options take beside what is free: for completion, where nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Callable

import click
from click.shell_completion import CompletionItem

Completion = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]

BUILTINS = ("cosine", "dot", "euclidean", "manhattan")

HEADS = (
    *("cosine", "dot", "product", "absdiff", "sqdiff", "mahalanobis", "sum", "max", "min"),
    *("mean-interaction", "bilinear", "plda", "rbf", "hyperbolic", "mirrored", "concat", "mlp"),
)

TOWERS = ("identity", "linear", "mlp")

STARTS = ("identity", "pca", "random")

PREPARATIONS = ("none", "centre", "half-whitening", "scaling")

LOSSES = (
    *("cross-entropy", "ranking", "contrastive", "triplet", "squared", "correlation"),
    *("sampled", "bpr", "softmax"),
)

CALIBRATIONS = ("platt", "isotonic", "temperature")

GOALS = ("f1", "f0.5", "accuracy", "precision=0.9", "recall=0.9")

DEVICES = ("auto", "cpu", "gpu", "gpu:0", "gpu:1", "gpu:0,1")


def completing(words: tuple[str, ...], joined: str = "") -> Completion:
    """Return what completes one of some words, or several that a character joins."""

    def complete(
        _context: click.Context, _parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        before, joint, last = incomplete.rpartition(joined) if joined else ("", "", incomplete)
        return [CompletionItem(before + joint + word) for word in words if word.startswith(last)]

    return complete


def complete_model(
    _context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete a built-in similarity once it is begun, else files."""
    named = [
        CompletionItem(word) for word in BUILTINS if incomplete and word.startswith(incomplete)
    ]
    return named or [CompletionItem(incomplete, type="file")]
