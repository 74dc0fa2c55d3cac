"""Pairs above a threshold -> groups: the transitive closure, and linkage that takes it apart.

The closure puts two entities together if a chain of accepted pairs leads from one to the other.
Linkage then looks at each group that some of whose pairs are not accepted, and splits it so that
all pairs of a group (complete link) or their mean (average link) reach the threshold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastpair.backend import memory_budget
from fastpair.errors import ArgumentError, DataError, MemoryBudgetError, MismatchError
from fastpair.export import write_groups
from fastpair.files import Table, read_table
from fastpair.jobs.inputs import truth as labels_to_truth
from fastpair.jobs.scoring import score_forms
from fastpair.pairs import open_pairs
from fastpair.scored import PAIRS_AT_ONCE, ScoredPairs, open_scored
from fastpair.scoring import PairScorer
from fastpair.staging import check_output

Summary = dict[str, Any]

LINKS = ("single", "average", "complete")
"""What holds a group together; single is the transitive closure."""

LARGEST_SHOWN, MEMBERS_SHOWN = 10, 5

SCORES_COMPARED = 1 << 12
"""Scores of a file that are compared with those of a table."""

NODE_BYTES = 3 * 8
"""What a node takes: its parent, its group, the sum of its partners."""

PAIR_BYTES = 2 * 8
"""What an accepted pair takes while pairs are brought into order."""

LINKED_BYTES = 3 * 8
"""What a pair of a group takes while the group is taken apart."""


@dataclass
class Accepted:
    """Accepted pairs and what they connect.

    Parameters
    ----------
    groups : (N,) int64, numbered by first row.
    count : how many groups there are.
    pairs : how many pairs were accepted, repeats included.
    keys : (m,) int64, ``least * N + greatest`` of every accepted pair once, rising; None where
        they do not fit into the memory.
    """

    groups: np.ndarray
    count: int
    pairs: int
    keys: np.ndarray | None


def connect(
    scored: ScoredPairs,
    accepts: Callable[[np.ndarray], np.ndarray],
    memory: int,
    progress: Callable[[int], None] = lambda pairs: None,
) -> Accepted:
    """Return the groups of the transitive closure of the pairs that `accepts` takes.

    Parameters
    ----------
    scored : the pairs.
    accepts : scores (b,) float64 -> (b,) bool.
    memory : bytes; accepted pairs are kept, to be counted once each, as long as half of it bears
        them.
    """
    from fastpair.kernels.groups import join, number_groups

    if scored.nodes * NODE_BYTES > memory:
        raise MemoryBudgetError(
            f"{scored.nodes} entities need {scored.nodes * NODE_BYTES} bytes, more than the "
            f"{memory} bytes of memory: allow more with --memory"
        )
    parents = np.arange(scored.nodes)
    kept: list[np.ndarray] | None = []
    pairs = held = 0
    for left, right, scores in scored.blocks():
        taken = accepts(scores) & (left != right)
        left, right = left[taken], right[taken]
        join(parents, left, right)
        pairs += len(left)
        held += len(left) * PAIR_BYTES
        if kept is not None and held > memory // 2:
            kept = None
        if kept is not None:
            kept.append(np.minimum(left, right) * scored.nodes + np.maximum(left, right))
        progress(len(scores))
    groups = np.empty(scored.nodes, np.int64)
    count = number_groups(parents, groups)
    return Accepted(groups, count, pairs, None if kept is None else _distinct(kept))


def _distinct(parts: list[np.ndarray]) -> np.ndarray:
    """Every key once, in order; `parts` is emptied."""
    keys = np.concatenate([np.empty(0, np.int64), *parts])
    parts.clear()
    keys.sort()
    return keys[np.concatenate([keys[:1] == keys[:1], keys[1:] != keys[:-1]])]


def violating(accepted: Accepted) -> int | None:
    """Return how many accepted pairs have a third entity that pairs with just one of the two."""
    from fastpair.kernels.groups import count_violating

    if accepted.keys is None:
        return None
    nodes = len(accepted.groups)
    return int(count_violating(accepted.keys, nodes, np.empty(nodes, np.uint64)))


# --- linkage --------------------------------------------------------------------------------------


@dataclass
class Linkage:
    """How groups are taken apart.

    Parameters
    ----------
    link : "average" or "complete".
    threshold : what the pairs of a group must reach, in a unit in which more is more similar.
    missing : the score of a pair that nothing is known of.
    scores : ``scores(rows)`` returns the scores (m, m) float64 of rows of a group, NaN where
        nothing is known.
    most : rows of the largest group that fits the memory.
    """

    link: str
    threshold: float
    missing: float
    scores: Callable[[np.ndarray], np.ndarray]
    most: int

    def split(self, rows: np.ndarray) -> np.ndarray:
        """Return the part (m,) that each of the rows of a group goes to."""
        from scipy.cluster.hierarchy import fcluster, linkage
        from scipy.spatial.distance import squareform

        scores = self.scores(rows)
        scores = np.where(np.isnan(scores), self.missing, scores)
        np.fill_diagonal(scores, np.inf)
        greatest = scores[np.isfinite(scores)].max(initial=self.threshold)
        np.fill_diagonal(scores, greatest)
        tree = linkage(squareform(greatest - scores, checks=False), self.link)
        apart = np.nextafter(greatest - self.threshold, np.inf)
        return fcluster(tree, apart, criterion="distance")


def refine(accepted: Accepted, linkage: Linkage) -> tuple[np.ndarray, int, int, int]:
    """Take apart every group that has a pair that is not accepted.

    Returns
    -------
    groups : (N,) int64, numbered by first row.
    count : how many groups there are.
    split : how many groups of the closure were taken apart.
    passed : how many were left whole because they are too large for the memory.
    """
    assert accepted.keys is not None
    nodes, groups = len(accepted.groups), accepted.groups.copy()
    sizes = np.bincount(groups, minlength=accepted.count)
    inside = np.bincount(groups[accepted.keys // nodes], minlength=accepted.count)
    chained = np.flatnonzero(inside < sizes * (sizes - 1) // 2)
    order = np.argsort(groups, kind="stable")
    ends = np.cumsum(sizes)
    following, split, passed = accepted.count, 0, 0
    for group in chained:
        rows = order[ends[group] - sizes[group] : ends[group]]
        if len(rows) > linkage.most:
            passed += 1
            continue
        parts = linkage.split(rows)
        if parts.max() > 1:
            groups[rows] = following + parts
            following += int(parts.max()) + 1
            split += 1
    groups, count = _numbered(groups)
    return groups, count, split, passed


def _numbered(groups: np.ndarray) -> tuple[np.ndarray, int]:
    """Number groups (N,) anew, by their first row."""
    _, first, own = np.unique(groups, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[own], len(first)


class _KnownScores:
    """Scores of the pairs inside chained groups, as the file has them; of repeats, the last."""

    def __init__(self, scored: ScoredPairs, groups: np.ndarray, sign: float, memory: int) -> None:
        keys, values, held = [np.empty(0, np.int64)], [np.empty(0)], 0
        self.nodes = scored.nodes
        for left, right, scores in scored.blocks():
            inside = (groups[left] == groups[right]) & (left != right) & ~np.isnan(scores)
            left, right = left[inside], right[inside]
            keys.append(np.minimum(left, right) * self.nodes + np.maximum(left, right))
            values.append(sign * scores[inside])
            held += len(left) * 4 * PAIR_BYTES
            if held > memory:
                raise MemoryBudgetError(
                    f"the pairs inside groups need more than the {memory} bytes of memory: raise "
                    "the threshold, allow more with --memory, or take --link single"
                )
        every = np.concatenate(keys)
        order = np.argsort(every, kind="stable")
        last = np.append(np.diff(every[order]) != 0, np.ones(min(1, len(every)), bool))
        self.keys, self.values = every[order][last], np.concatenate(values)[order][last]

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        scores = np.full((len(rows), len(rows)), np.nan)
        for place, row in enumerate(rows[:-1]):
            others = rows[place + 1 :]
            wanted = row * self.nodes + others
            found = np.searchsorted(self.keys, wanted)
            known = np.append(self.keys, -1)[found] == wanted
            own = np.full(len(others), np.nan)
            own[known] = self.values[found[known]]
            scores[place, place + 1 :] = scores[place + 1 :, place] = own
        return scores


class _ScoredAnew:
    """Scores of all pairs of a group, by the kernels and the table, in the unit of the file.

    Raises
    ------
    MismatchError : the file's scores are not the table's in any unit.
    """

    def __init__(
        self, table: Table, path: Path, scored: ScoredPairs, sign: float, threads: int | None
    ) -> None:
        self.scorer, self.sign = PairScorer(table.rows, table.plan, threads=threads), sign
        self.isolated = table.isolated
        left, right, scores = next(scored.blocks())
        some = np.flatnonzero(~np.isnan(scores))[:SCORES_COMPARED]
        anew = self.scorer(left[some], right[some])
        for form in score_forms(path, table):
            if np.allclose(form(anew), scores[some], rtol=1e-5, atol=1e-6):
                self.form = form
                return
        raise MismatchError(
            f"the scores of {scored.path} are not those of {path}: give the table that was scored, "
            "or leave out --table"
        )

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        scores = np.zeros((len(rows), len(rows)))
        left, right = np.triu_indices(len(rows), 1)
        own = self.sign * self.form(self.scorer(rows[left], rows[right])).astype(np.float64)
        scores[left, right] = scores[right, left] = own
        if self.isolated is not None:
            scores[self.isolated[rows]] = scores[:, self.isolated[rows]] = np.nan
        return scores


# --- the command ----------------------------------------------------------------------------------


def cluster(
    file: Path,
    output: Path,
    *,
    threshold: float,
    link: str = "single",
    missing: float | None = None,
    pairs: Path | None = None,
    table: Path | None = None,
    left_column: str | None = None,
    right_column: str | None = None,
    score_column: str | None = None,
    distance: bool = False,
    truth: Path | None = None,
    label_column: str | None = None,
    good: float | None = None,
    threads: int | None = None,
    memory: str | int | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda pairs: None,
) -> Summary:
    """Group entities by scored pairs and write the group of each.

    Parameters
    ----------
    file : scores, a matrix or keys with scores; see `scored.open_scored`.
    output : ``.h5`` / ``.hdf5``, ``.parquet``, ``.csv`` or ``.tsv`` (also ``.gz``).
    threshold : a pair of at least this is accepted; of distances, of at most this.
    link : "single" (the transitive closure), "average" or "complete".
    missing : what a pair counts that the file does not have, where groups are taken apart by
        average link; default: as far on the other side of the threshold as half of the accepted
        pairs are on theirs. Complete link never accepts such a pair.
    pairs, left_column, right_column, score_column : see `scored.open_scored`.
    table : its rows are the entities; groups are then taken apart by the scores of all of their
        pairs, computed anew.
    distance : scores are distances; known already where the file says so.
    truth : labelled pairs to compare the groups with; `good` is the label from which on a pair is
        good.
    memory : what may be allocated, the table included.

    Returns
    -------
    summary : ``entities``, ``accepted`` (pairs, repeats included), ``groups``, ``grouped``
        (entities that are not alone), ``sizes`` (how many groups by size), ``largest`` (size and
        first members), ``violating`` (accepted pairs with a third entity that pairs with just one
        of the two; None where there was no memory to tell), ``implied`` (pairs that are together
        without being accepted), ``split``; with `truth`, ``precision``, ``recall`` and ``f1`` of
        its pairs.
    """
    _check(threshold, link, missing)
    inputs = [Path(path) for path in (file, pairs, table, truth) if path is not None]
    check_output(Path(output), overwrite=overwrite, inputs=inputs)
    begun = time.perf_counter()
    budget = memory_budget(memory)
    entities = None if table is None else read_table(table, random_access=link != "single")
    if entities is not None:
        budget -= entities.rows.nbytes if link != "single" else 0
    columns: Summary = {"left_column": left_column, "right_column": right_column}
    scored = open_scored(file, pairs=pairs, table=entities, score_column=score_column, **columns)
    sign = -1.0 if distance or scored.unit == "distance" else 1.0
    accepted = connect(scored, lambda scores: sign * scores >= sign * threshold, budget, progress)
    notes: list[str] = []
    crossing = violating(accepted)
    if crossing is None:
        notes.append(
            f"{accepted.pairs} accepted pairs do not fit into the memory: violations of "
            "transitivity were not counted"
        )
    groups, count, split = accepted.groups, accepted.count, 0
    if link != "single":
        if accepted.keys is None:
            raise MemoryBudgetError(
                f"--link {link} needs the {accepted.pairs} accepted pairs in memory: raise the "
                "threshold, allow more with --memory, or take --link single"
            )
        linkage = _linkage(link, sign * threshold, missing, scored, accepted, sign, budget)
        if entities is not None and table is not None:
            linkage.scores = _ScoredAnew(entities, Path(table), scored, sign, threads)
        groups, count, split, passed = refine(accepted, linkage)
        if passed:
            notes.append(
                f"{passed} groups of more than {linkage.most} entities were left whole: a higher "
                "threshold or more memory would take them apart"
            )
    write_groups(output, groups, scored.ids, left=scored.left_nodes, overwrite=overwrite)
    found = {
        "output": str(output),
        "entities": scored.nodes,
        "accepted": accepted.pairs,
        **_sizes(groups, count, scored),
        "violating": crossing,
        "implied": None if accepted.keys is None else _implied(groups, count, accepted.keys),
        "split": split,
        "notes": notes,
    }
    if truth is not None:
        found |= _compare(groups, scored, truth, label_column, good, columns)
    return {**found, "seconds": time.perf_counter() - begun}


def _check(threshold: float, link: str, missing: float | None) -> None:
    if not np.isfinite(threshold):
        raise ArgumentError(f"threshold is {threshold}, expected a finite number")
    if link not in LINKS:
        raise ArgumentError(f"link is {link!r}, expected one of {', '.join(LINKS)}")
    if missing is not None and (link != "average" or not np.isfinite(missing)):
        raise ArgumentError(f"missing is {missing}, expected a number, with the link average")


def _linkage(
    link: str,
    threshold: float,
    missing: float | None,
    scored: ScoredPairs,
    accepted: Accepted,
    sign: float,
    memory: int,
) -> Linkage:
    """Return the linkage by the file's own scores; `threshold` has its sign already."""
    known = _KnownScores(scored, accepted.groups, sign, memory // 2)
    enough = known.values[known.values >= threshold]
    if missing is not None:
        absent = sign * missing
    elif link == "complete":
        absent = known.values.min(initial=threshold) - 1
    else:
        absent = 2 * threshold - float(np.median(enough)) if len(enough) else threshold
    most = int(np.sqrt(2 * (memory // 2) / LINKED_BYTES))
    return Linkage(link, threshold, float(absent), known, most)


def _sizes(groups: np.ndarray, count: int, scored: ScoredPairs) -> Summary:
    sizes = np.bincount(groups, minlength=count)
    values, numbers = np.unique(sizes, return_counts=True)
    order = np.argsort(-sizes, kind="stable")[:LARGEST_SHOWN]
    largest = []
    for group in order[sizes[order] > 1]:
        rows = np.flatnonzero(groups == group)[:MEMBERS_SHOWN]
        names = [str(r) if scored.ids is None else scored.ids[int(r)].as_py() for r in rows]
        largest.append({"group": int(group), "size": int(sizes[group]), "members": names})
    return {
        "groups": count,
        "grouped": int(sizes[sizes > 1].sum()),
        "sizes": {int(v): int(n) for v, n in zip(values, numbers, strict=True)},
        "largest": largest,
    }


def _implied(groups: np.ndarray, count: int, keys: np.ndarray) -> int:
    """How many pairs of one group were not accepted."""
    sizes = np.bincount(groups, minlength=count)
    nodes = len(groups)
    together = sum(
        int((groups[part // nodes] == groups[part % nodes]).sum()) for part in _parts(keys)
    )
    return int((sizes * (sizes - 1) // 2).sum()) - together


def _parts(keys: np.ndarray) -> Iterator[np.ndarray]:
    return (keys[n : n + PAIRS_AT_ONCE] for n in range(0, len(keys), PAIRS_AT_ONCE))


def _compare(
    groups: np.ndarray,
    scored: ScoredPairs,
    truth: Path,
    label_column: str | None,
    good: float | None,
    columns: Summary,
) -> Summary:
    """Return precision, recall and F1 of the decision "in one group" over labelled pairs."""
    source = open_pairs(
        truth,
        ids=scored.ids,
        count=scored.nodes,
        want_labels=True,
        label_column=label_column,
        signed_labels=good is None,
        **columns,
    )
    if not source.has_labels:
        raise DataError(f"{truth} has no column of labels: name it with --label")
    together = both = positive = 0
    for block in source.blocks(PAIRS_AT_ONCE):
        assert block.label is not None
        same = groups[block.left] == groups[block.right]
        true = labels_to_truth(block.label, good, False, truth) > 0
        together += int(same.sum())
        positive += int(true.sum())
        both += int((same & true).sum())
    precision = both / together if together else None
    recall = both / positive if positive else None
    total = together + positive
    return {"precision": precision, "recall": recall, "f1": 2 * both / total if total else None}
