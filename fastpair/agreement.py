"""Agreement: every backend beside the float64 reference, on the same tables and the same pairs.

One function, `agreement`, for tests, benchmarks and ``fastpair bench``. A backend is an entry of
`backends`: what it makes of all pairs of a table, and how far from the reference that may be. The
bound is stated before the link, relative to |c| + |b_i| + |b_j| + sum of |terms|, and comes from
the number of roundings on the way to a score (Higham, Accuracy and Stability of Numerical
Algorithms, 2nd ed., section 4.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from fastpair.errors import AgreementError, DeviceError
from fastpair.folding import fold
from fastpair.heads import HEADS, find_head
from fastpair.kernels import LANES, PRECISIONS, Plan, reference
from fastpair.model import Branch, Model

Summary = dict[str, Any]

ENTITIES, COLUMNS = 80, 40
"""Rows and columns of the tables that are compared: neither fills whole panels or vectors."""

BEST = 5
"""The k of top-k."""

ABOVE = 0.9
"""Share of the pairs that are below the threshold of a case, about."""

GAPS = 20
"""Scores on each side of that share between which the threshold may lie."""

MEMORY = "256MiB"
"""What all pairs of these small tables may allocate."""

_UNIT_ROUNDOFF = 2.0**-24
_SMALLEST = 2.0**-149


# --- what is compared ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """A table of one head in one precision, and what the reference says of all its pairs.

    Parameters
    ----------
    head : name of the head.
    rows : (n, row_bytes) uint8.
    plan : its plan.
    decides : the score, link included, from which the model takes a pair as good; None: the case
        has a threshold of its own.
    truth : float64 scores (n, n), link included, of the same entities before they were rounded to
        the precision; None: nothing is said of what the precision changes.
    """

    head: str
    rows: np.ndarray
    plan: Plan
    decides: float | None = None
    truth: np.ndarray | None = None

    @property
    def unlinked(self) -> Plan:
        """The plan whose scores are raw scores."""
        return replace(self.plan, link="identity", slope=1.0, offset=0.0)

    @cached_property
    def raw(self) -> np.ndarray:
        """Raw scores (n, n) of the reference, float64."""
        return reference.score_matrix(self.rows, self.rows, self.unlinked)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Sums of the sizes (n, n) that a raw score adds up."""
        left, right = np.indices(self.raw.shape).reshape(2, -1)
        return reference.magnitudes(self.rows, self.rows, left, right, self.plan).reshape(
            self.raw.shape
        )

    @cached_property
    def threshold(self) -> float:
        """Raw score that decides: in the widest gap between scores near the share `ABOVE`."""
        scores = np.unique(self.raw[~np.eye(len(self.raw), dtype=bool)])
        first = int(ABOVE * len(scores))
        near = scores[max(0, first - GAPS) : first + GAPS]
        widest = int(np.argmax(np.diff(near))) if len(near) > 1 else 0
        return float(near[widest : widest + 2].mean())

    def deciding_score(self, plan: Plan) -> float:
        """Return the score that decides under the case's own plan, or under that without a link."""
        if self.decides is not None and plan == self.plan:
            return self.decides
        return float(reference.finish(np.array(self.threshold), plan))

    def pair_bound(self) -> np.ndarray:
        """Return how far a raw score of the pair kernel may be from the reference's, (n, n)."""
        if self.plan.network is None:
            roundings = sum(self.plan.layout.segment_lengths.values()) / LANES + 12
        else:
            layers = self.plan.network.layers
            roundings = sum(matrix.shape[1] + 4 for matrix, _ in layers)
            roundings += len(self.plan.network.output) + layers[0][0].shape[1] + 12
        # doubled for terms of second order
        return 2 * _UNIT_ROUNDOFF * roundings * self.sizes + 4 * roundings * _SMALLEST

    def tile_bound(self) -> np.ndarray:
        """Return how far a raw score of a tile may be from the reference's, (n, n)."""
        if self.plan.network is not None:
            return self.pair_bound()
        from fastpair.walk import Sides

        sides = Sides(self.rows, None, self.plan, "float32", 1, 1 << 40)
        _, bound = sides.left_side(0, len(self.rows))
        return self.pair_bound() + bound[:, None]


def cases(
    heads: Sequence[str] = tuple(HEADS),
    precisions: Sequence[str] = tuple(PRECISIONS),
    *,
    entities: int = ENTITIES,
    columns: int = COLUMNS,
    seed: int = 0,
) -> Iterator[Case]:
    """Yield a case of each head and precision, with random embeddings and weights.

    A head whose table is only float32 (a network) has that case alone.
    """
    for precision in precisions:
        for head in heads:
            rng = np.random.default_rng(seed)
            embeddings = rng.standard_normal((entities, columns))
            model = _random_model(head, columns, rng)
            if model.network is None or precision == "float32":
                yield Case(head, *fold(model, embeddings, precision))


def _random_model(name: str, columns: int, rng: np.random.Generator) -> Model:
    """Return a model of one head whose weights were moved off their start, some below 0."""
    head = find_head(name)
    weights = {
        key: value + rng.normal(size=value.shape) / np.sqrt(columns)
        for key, value in head.initial(columns, rng).items()
    }
    link: Summary = {}
    if head.link != "identity":
        link = {"link": head.link, "slope": 0.75, "offset": 0.5}
    constant = 0.0 if link else 0.25
    return Model([Branch(name, weights)], input_columns=columns, constant=constant, **link)


# --- the backends --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """One way to score all pairs of a table.

    Parameters
    ----------
    name : what it is called.
    kind : "scores" (of every pair), "top-k" or "threshold".
    run : ``run(case, plan)`` returns scores (n, n) float32, NaN for pairs that the result does not
        hold; the plan is the case's own or the one without a link.
    bound : ``bound(case)`` returns how far raw scores (n, n) may be from the reference's.
    missing : why it cannot run here; empty if it can.
    """

    name: str
    kind: str
    run: Callable[[Case, Plan], np.ndarray]
    bound: Callable[[Case], np.ndarray] = Case.pair_bound
    missing: str = ""


def backends(device: str = "gpu") -> list[Backend]:
    """Return every backend of fastpair, also those that are missing here.

    Parameters
    ----------
    device : the GPU that is compared too, as `device.pick` takes it; "cpu" asks for none.
    """
    runtimes, missing = _gpus(device)
    return [*_of_device("CPU", (), ""), *_of_device("GPU", runtimes, missing)]


def gpu_backends(runtimes: Sequence[Any]) -> list[Backend]:
    """Return the backends of GPUs that are there."""
    return _of_device("GPU", tuple(runtimes), "")


def _gpus(device: str) -> tuple[tuple[Any, ...], str]:
    """Return the runtimes of a device, or why there are none."""
    from fastpair.device import pick

    if device == "cpu":
        return (), "it was not asked for"
    try:
        return pick(device).runtimes, ""
    except DeviceError as error:
        return (), str(error).removeprefix(f"device is {device!r} but ")


def _of_device(name: str, runtimes: tuple[Any, ...], missing: str) -> list[Backend]:
    """Return the backends of the CPU (no runtimes) or of GPUs."""
    works: list[tuple[str, str, Callable[..., np.ndarray], Callable[[Case], np.ndarray]]] = [
        ("pairs", "scores", _pairs, Case.pair_bound),
        ("dense tiles", "scores", _tiles, Case.tile_bound),
        ("top-k", "top-k", _top_k, Case.pair_bound),
        ("threshold", "threshold", _threshold, Case.pair_bound),
    ]
    return [
        Backend(f"{name} {work}", kind, _nothing, bound, missing)
        if missing
        else Backend(f"{name} {work}", kind, partial(run, runtimes=runtimes), bound)
        for work, kind, run, bound in works
    ]


def _nothing(case: Case, plan: Plan) -> np.ndarray:
    raise AgreementError("a backend that is missing cannot be compared")


def _all_pairs(case: Case, plan: Plan, runtimes: tuple[Any, ...]) -> Any:
    """All pairs in the coarsest scan of the device: small tables would not choose it."""
    if runtimes:
        from fastpair import gpu_matrix

        forms = {} if plan.network is not None else {"scan": "bfloat16"}
        options: Summary = {"runtimes": list(runtimes), "memory": MEMORY, **forms}
        return gpu_matrix.all_pairs(case.rows, None, plan, **options)
    from fastpair.kernels.tile import FORMS
    from fastpair.matrix import all_pairs

    scan = {} if plan.network is not None else {"scan": list(FORMS)[-1]}
    return all_pairs(case.rows, None, plan, memory=MEMORY, **scan)


def _pairs(case: Case, plan: Plan, runtimes: tuple[Any, ...]) -> np.ndarray:
    from fastpair.gpu_scoring import GpuPairScorer
    from fastpair.scoring import PairScorer

    left, right = np.indices(case.raw.shape, np.int32).reshape(2, -1)
    if runtimes:
        scores = GpuPairScorer(case.rows, plan, devices=runtimes)(left, right)
    else:
        scores = PairScorer(case.rows, plan)(left, right)
    return scores.reshape(case.raw.shape)


def _tiles(case: Case, plan: Plan, runtimes: tuple[Any, ...]) -> np.ndarray:
    return np.concatenate([scores for _, scores in _all_pairs(case, plan, runtimes).dense()])


def _top_k(case: Case, plan: Plan, runtimes: tuple[Any, ...]) -> np.ndarray:
    found = np.full(case.raw.shape, np.nan, np.float32)
    for first, scores, indices in _all_pairs(case, plan, runtimes).top_k(BEST):
        rows = np.arange(first, first + len(scores))[:, None]
        found[rows, indices] = scores
    return found


def _threshold(case: Case, plan: Plan, runtimes: tuple[Any, ...]) -> np.ndarray:
    found = np.full(case.raw.shape, np.nan, np.float32)
    threshold = case.deciding_score(plan)
    for first, counts, indices, scores in _all_pairs(case, plan, runtimes).above(threshold):
        rows = np.repeat(np.arange(first, first + len(counts)), counts)
        found[rows, indices] = scores
    return found


# --- the comparison ------------------------------------------------------------------------------


def agreement(those: Sequence[Backend], on: Sequence[Case] | Iterator[Case]) -> list[Summary]:
    """Compare backends with the reference on every case.

    Returns
    -------
    rows : one for each head, precision and backend that is not missing: ``difference``, the
        greatest before the link; ``ulp``, the same in units in the last place of the case's
        greatest raw score; ``bound``, the greatest share of the bound that a
        difference takes; ``threshold``, the score that decides; ``decisions``, how many there are,
        ``flipped``, how many of them differ from the reference on the same table, and
        ``flipped_in_all``, from that on the table before it was rounded, where a case knows it
        (None for top-k);
        ``other_sets``, rows whose k best differ from the reference's (None for others);
        ``wrong``, what is beyond the bound: scores, decisions and members of sets.
    """
    return [compare(case, one) for case in on for one in those if not one.missing]


def check_agreement(rows: Sequence[Summary]) -> None:
    """Refuse rows of `agreement` that are beyond the bound.

    Raises
    ------
    AgreementError : it names the worst.
    """
    bad = [row for row in rows if row["wrong"]]
    if bad:
        worst = max(bad, key=lambda row: row["bound"])
        raise AgreementError(
            f"{len(bad)} of {len(rows)} comparisons are beyond the bound: {worst['backend']}, head "
            f"{worst['head']}, {worst['precision']}, has {worst['wrong']} wrong results and differs"
            f" from the float64 reference by {worst['difference']:.3g}, {worst['bound']:.3g} times "
            "what rounding explains: do not trust scores from this machine, and report it"
        )


def compare(case: Case, backend: Backend) -> Summary:
    """Compare one backend with the reference on one case; see `agreement`."""
    raw = backend.run(case, case.unlinked).astype(np.float64)
    linked = raw if case.plan == case.unlinked else backend.run(case, case.plan).astype(float)
    bound = backend.bound(case)
    given = ~np.isnan(raw)
    apart = np.where(given, np.abs(raw - case.raw), 0.0)
    wrong = int((apart > bound).sum()) + _wrong_links(case, linked, bound)
    off_diagonal = ~np.eye(len(raw), dtype=bool)
    flipped = in_all = other_sets = None
    if backend.kind == "scores":  # of every pair: NaN is no score
        wrong += int((np.isnan(raw) | np.isnan(linked)).sum())
    if backend.kind == "top-k":
        other_sets, more_wrong = _compare_sets(case, given, bound, off_diagonal)
    else:
        flipped, more_wrong = _compare_decisions(case, backend.kind, linked, bound, off_diagonal)
        in_all = _flipped_in_all(case, backend.kind, linked, off_diagonal)
    return {
        "head": case.head,
        "precision": case.plan.precision,
        "backend": backend.name,
        "pairs": int(given.sum()),
        "difference": float(apart.max()),
        "ulp": float(apart.max() / np.spacing(np.float32(np.abs(case.raw).max()))),
        "bound": float((apart / bound).max()),
        "threshold": case.deciding_score(case.plan),
        "decisions": None if flipped is None else int(off_diagonal.sum()),
        "flipped": flipped,
        "flipped_in_all": in_all,
        "other_sets": other_sets,
        "wrong": wrong + more_wrong,
    }


def _score_range(case: Case, bound: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return between which scores (n, n) a backend may be: the link rises."""
    low, high = (reference.finish(case.raw + change, case.plan) for change in (-bound, bound))
    if case.plan == case.unlinked:
        return low, high
    # link, slope and offset are rounded too
    slack = 4 * _UNIT_ROUNDOFF * (np.maximum(np.abs(low), np.abs(high)) + abs(case.plan.offset))
    return low - slack, high + slack


def _wrong_links(case: Case, scores: np.ndarray, bound: np.ndarray) -> int:
    low, high = _score_range(case, bound)
    return int(((scores < low) | (scores > high)).sum())  # NaN is neither


def _compare_decisions(
    case: Case, kind: str, scores: np.ndarray, bound: np.ndarray, where: np.ndarray
) -> tuple[int, int]:
    """Return how many decisions differ, and how many of them rounding does not explain."""
    threshold = case.deciding_score(case.plan)
    expected = reference.finish(case.raw, case.plan) >= threshold
    found = _decisions(kind, scores, threshold)
    low, high = _score_range(case, bound)
    flipped = (found != expected) & where
    explained = (low <= threshold) & (threshold <= high)
    return int(flipped.sum()), int((flipped & ~explained).sum())


def _decisions(kind: str, scores: np.ndarray, threshold: float) -> np.ndarray:
    return ~np.isnan(scores) if kind == "threshold" else scores >= threshold


def _flipped_in_all(case: Case, kind: str, scores: np.ndarray, where: np.ndarray) -> int | None:
    """Return how many decisions differ from those of the entities before they were rounded."""
    if case.truth is None:
        return None
    threshold = case.deciding_score(case.plan)
    found = _decisions(kind, scores, threshold)
    return int(((found != (case.truth >= threshold)) & where).sum())


def _compare_sets(
    case: Case, given: np.ndarray, bound: np.ndarray, where: np.ndarray
) -> tuple[int, int]:
    """Return how many rows have other best ones, and how many members are worse than a tie."""
    raw = np.where(where, case.raw, -np.inf)
    order = np.argsort(-raw, axis=1, kind="stable")[:, :BEST]
    expected = np.zeros_like(given)
    np.put_along_axis(expected, order, True, axis=1)
    last = order[:, -1:]
    floor = np.take_along_axis(raw - bound, last, axis=1)
    worse = given & (raw + bound < floor)
    missing = BEST - given.sum(axis=1)
    others = (given != expected).any(axis=1)
    return int(others.sum()), int(worse.sum() + np.abs(missing).sum())
