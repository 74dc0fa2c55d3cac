"""The formula in NumPy float64: the one definition that every backend must agree with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastpair.kernels import SEGMENTS, Network, Plan, network


def widen(stored: np.ndarray, precision: str) -> np.ndarray:
    """Return stored columns as float64 numbers, exactly; int8 stays in its own unit."""
    if precision == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


def unpack_rows(rows: np.ndarray, plan: Plan) -> dict[str, np.ndarray]:
    """Return what rows hold: ``bias`` (n,) and each segment (n, padded columns), float64.

    Parameters
    ----------
    rows : (n, row_bytes) uint8.
    plan : the plan of the table; int8 columns are multiplied by their scales.
    """
    records = np.ascontiguousarray(rows).view(plan.layout.dtype)[:, 0]
    bias = records["bias"] if plan.layout.bias else np.zeros(len(rows))
    unpacked = {"bias": np.asarray(bias, dtype=np.float64)}
    for number, name in enumerate(SEGMENTS):
        if name not in plan.layout.segment_lengths:
            continue
        values = widen(records[name], plan.precision)
        if plan.precision == "int8":
            scale = np.float64(np.float32(plan.segment_scales[number]))
            values *= records["scale"][:, None].astype(float) if name == "product" else scale
        unpacked[name] = values
    return unpacked


def signed_runs(plan: Plan) -> Iterator[tuple[str, int, slice]]:
    """Yield (segment, sign, columns) for every run that is not empty; mirrored: both halves."""
    for number, name in enumerate(SEGMENTS):
        width = 2 if name == "mirrored" else 1
        start = 0
        for sign, run in zip((1, -1), plan.layout.runs[2 * number : 2 * number + 2], strict=True):
            if run:
                yield name, sign, slice(start, start + run * width)
            start += run * width


def terms(name: str, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the terms of one run: (..., columns) from left and right columns that broadcast."""
    if name == "product":
        return left * right
    if name == "maximum":
        return np.maximum(left, right)
    if name == "absolute":
        return np.abs(left - right)
    if name == "squared":
        return (left - right) ** 2
    half = left.shape[-1] // 2  # left is [u, v], its partner the half-swap of right
    swapped = np.concatenate([right[..., half:], right[..., :half]], axis=-1)
    return np.maximum(left, swapped)


def apply_link(raw: np.ndarray, link: str) -> np.ndarray:
    """Return ``link(raw)``, float64; `link` is a name of `fastpair.kernels.LINKS`."""
    if link == "identity":
        return raw
    below = np.minimum(raw, 0.0)
    if link == "negative_root":
        return -np.sqrt(-below)
    if link == "exponential":
        return np.exp(below)
    return -np.log1p(-below + np.sqrt(below * (below - 2)))


def finish(raw: np.ndarray, plan: Plan) -> np.ndarray:
    """Return ``offset + slope * link(raw)``."""
    return plan.offset + plan.slope * apply_link(raw, plan.link)


def _seen(
    first: dict[str, np.ndarray], second: dict[str, np.ndarray], plan: Plan
) -> tuple[np.ndarray, np.ndarray, Network]:
    """Return the columns (m, k) of both sides that the plan's network sees, and the network."""
    assert plan.network is not None
    columns = plan.network.columns
    return first["product"][:, :columns], second["product"][:, :columns], plan.network


def score_pairs(
    left_rows: np.ndarray, right_rows: np.ndarray, left: np.ndarray, right: np.ndarray, plan: Plan
) -> np.ndarray:
    """Return the scores (m,) float64 of pairs of row numbers `left` and `right`, both (m,)."""
    first = unpack_rows(left_rows[left], plan)
    second = unpack_rows(right_rows[right], plan)
    constant = float(np.float32(plan.constant))
    if plan.network is not None:
        return finish(constant + network.raw_scores(*_seen(first, second, plan)), plan)
    raw = constant + (first["bias"] + second["bias"])
    for name, sign, columns in signed_runs(plan):
        raw = raw + sign * terms(name, first[name][:, columns], second[name][:, columns]).sum(-1)
    return finish(raw, plan)


def magnitudes(
    left_rows: np.ndarray, right_rows: np.ndarray, left: np.ndarray, right: np.ndarray, plan: Plan
) -> np.ndarray:
    """Return |c| + |b_i| + |b_j| + sum of |terms| (m,): what float32 errors are relative to."""
    first = unpack_rows(left_rows[left], plan)
    second = unpack_rows(right_rows[right], plan)
    if plan.network is not None:
        sizes = network.magnitudes(*_seen(first, second, plan))
        return abs(plan.constant) + sizes
    size = abs(plan.constant) + np.abs(first["bias"]) + np.abs(second["bias"])
    for name, _, columns in signed_runs(plan):
        size = size + np.abs(terms(name, first[name][:, columns], second[name][:, columns])).sum(-1)
    return size


def score_matrix(left_rows: np.ndarray, right_rows: np.ndarray, plan: Plan) -> np.ndarray:
    """Return the scores (n, n') float64 of all pairs of rows."""
    if plan.network is not None:
        shape = len(left_rows), len(right_rows)
        left, right = np.indices(shape).reshape(2, -1)
        return score_pairs(left_rows, right_rows, left, right, plan).reshape(shape)
    first, second = unpack_rows(left_rows, plan), unpack_rows(right_rows, plan)
    raw = float(np.float32(plan.constant)) + (first["bias"][:, None] + second["bias"][None, :])
    for name, sign, columns in signed_runs(plan):
        for i in range(len(left_rows)):
            raw[i] += sign * terms(name, first[name][i, columns], second[name][:, columns]).sum(-1)
    return finish(raw, plan)
