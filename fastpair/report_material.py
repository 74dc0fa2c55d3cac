"""What a report is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastpair.comparison import Comparison
from fastpair.entities import EntityTexts
from fastpair.model import Model
from fastpair.wording import SIMILARITIES

Summary = dict[str, Any]


@dataclass(frozen=True)
class Material:
    """What a report is made of.

    Parameters
    ----------
    summary : what `jobs.evaluate` found.
    model : the model that was measured.
    comparison : the labelled pairs under it and its baselines.
    pair_rows : (M,) row numbers of the pairs in their file.
    name_of : the id of an entity of the comparison.
    texts : what ids stand for, or None where no table says it.
    made : what the report came from: names and words.
    title : of the page.
    """

    summary: Summary
    model: Model
    comparison: Comparison
    pair_rows: np.ndarray
    name_of: Callable[[int], str]
    texts: Callable[[Sequence[str]], EntityTexts] | None
    made: list[tuple[str, str]]
    title: str

    @property
    def beside(self) -> str:
        """The name of what stands beside the model in figures, or "" where nothing does."""
        itself = f"raw_{self.builtin}"
        names = [n for n in self.comparison.scored if n in SIMILARITIES and n != itself]
        return names[0] if names else ""

    @property
    def builtin(self) -> str:
        """The name of a built-in similarity, or "" where a model was learned."""
        return str(self.model.description.get("builtin", ""))

    @property
    def scores(self) -> np.ndarray:
        """The model's scores (M,) float64."""
        return self.comparison.scored["model"].scores.astype(np.float64)


def chances(model: Model, scores: np.ndarray) -> np.ndarray | None:
    """Return the probabilities of scores, or None where the unit has none."""
    if model.unit != "log-odds" and model.calibration is None:
        return None
    return model.probability(scores)
