"""Two runs of ``fastpair bench`` beside each other: what became slower, and not the machine alone.

Rates of two runs differ because the code did, or because the machine was busy. Each run has
measured the machine's limits as well, so rates are compared as they are and as shares of their
limit. A row is told slower or faster where both say so: no repeat of one run reaches the other's,
and the shares differ by more than `SMALLEST` too.
"""

from __future__ import annotations

from typing import Any

from fastpair.bench_works import OF_PAIRS
from fastpair.errors import DataError

Summary = dict[str, Any]

SMALLEST = 0.05
"""Change of a share below which nothing is said."""


def compare_benches(found: Summary, earlier: Summary) -> Summary:
    """Compare what `bench.bench` returned with what it returned earlier.

    Returns
    -------
    summary : ``rows``, one for each work x precision x device of both, with ``ratio`` (now by
        earlier) of the medians, ``share_ratio``, ``verdict`` ("slower", "faster", "same");
        ``only_now``, ``only_earlier`` and ``other_size``, names of those that cannot be compared;
        ``machines``, the two processors where they differ.

    Raises
    ------
    DataError : the earlier run is no result of ``fastpair bench --json``.
    """
    if not isinstance(earlier.get("rows"), list) or "settings" not in earlier:
        raise DataError("the earlier run has no rows: give what fastpair bench --json printed")
    now, before = _by_name(found), _by_name(earlier)
    same = {name for name in now.keys() & before.keys() if _alike(now[name], before[name])}
    machines = [run["machine"]["cpu"] for run in (earlier, found)]
    return {
        "rows": [_compared(now[name], before[name]) for name in now if name in same],
        "only_now": [" ".join(name) for name in now if name not in before],
        "only_earlier": [" ".join(name) for name in before if name not in now],
        "other_size": [" ".join(name) for name in now if name in before and name not in same],
        "machines": machines if machines[0] != machines[1] else None,
    }


def _by_name(run: Summary) -> dict[tuple[str, str, str], Summary]:
    return {(row["work"], row["precision"], row["device"]): row for row in run["rows"]}


def _alike(row: Summary, other: Summary) -> bool:
    """Whether rows as long were read; the number of pairs hangs on how fast they were."""
    return row.get("row_bytes") == other.get("row_bytes") and (
        row["work"] not in OF_PAIRS or row["entities"] == other["entities"]
    )


def _compared(now: Summary, earlier: Summary) -> Summary:
    rate, before = now["pairs_per_second"], earlier["pairs_per_second"]
    share_ratio = now["share"] / earlier["share"]
    verdict = "same"
    if rate["greatest"] < before["least"] and share_ratio < 1 - SMALLEST:
        verdict = "slower"
    elif rate["least"] > before["greatest"] and share_ratio > 1 + SMALLEST:
        verdict = "faster"
    return {
        **{name: now[name] for name in ("work", "precision", "device")},
        "now": rate,
        "earlier": before,
        "ratio": rate["median"] / before["median"],
        "share_ratio": share_ratio,
        "verdict": verdict,
    }
