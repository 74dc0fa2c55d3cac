"""Random tables for tests: rows as kernels take them and the same numbers for the oracle."""

import numpy as np
from hypothesis import strategies as st

from fastpair.kernels import PRECISIONS, SEGMENTS, Plan, RowLayout, aligned_empty

counts = st.tuples(*[st.tuples(st.integers(0, 20), st.integers(0, 20)) for _ in SEGMENTS])
layouts = st.builds(RowLayout, counts, st.booleans(), st.sampled_from(sorted(PRECISIONS)))


def some_layout(precision="float32", bias=True):
    """A layout with every kind of run, none a multiple of 16."""
    return RowLayout(((50, 14), (3, 20), (5, 18), (17, 2), (9, 33)), bias, precision)


def products_only(plus, minus=0, precision="float32", bias=True):
    """A layout of nothing but products, which a shorter loop scores."""
    return RowLayout(((plus, minus),) + ((0, 0),) * 4, bias, precision)


def random_plan(rng, layout, link="identity"):
    scales = tuple(float(np.float32(s)) for s in rng.uniform(0.005, 0.02, len(SEGMENTS)))
    constant = float(np.float32(rng.normal()))
    if link == "identity":
        return Plan(layout, constant, segment_scales=scales)
    return Plan(layout, constant, link, 0.5, 0.25, scales)


def random_table(rng, count, plan, size=1.0):
    """Rows (count, row_bytes) uint8 of normal numbers; padding is zero as the contract says."""
    layout = plan.layout
    rows = aligned_empty((count, layout.row_bytes), np.uint8)
    rows[:] = 0
    records = rows.view(layout.dtype)[:, 0]
    for number, name in enumerate(SEGMENTS):
        for place in run_places(layout, number):
            values = rng.normal(size=(count, len(place))) * size
            records[name][:, place] = stored(values, layout.precision)
    if layout.bias:
        records["bias"] = rng.normal(size=count)
    if layout.scale:
        records["scale"] = rng.uniform(0.005, 0.02, count)
    return rows


def stored(values, precision):
    if precision == "int8":
        return np.clip(np.rint(values * 40), -127, 127).astype(np.int8)
    if precision == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(PRECISIONS[precision])


def run_places(layout, number):
    """Columns within the segment that are true: one array a run, two for a mirrored one."""
    start = 0
    halves = 2 if SEGMENTS[number] == "mirrored" else 1
    for true, padded in zip(layout.columns[number], layout.runs[2 * number :][:2], strict=True):
        for _ in range(halves):
            if true:
                yield np.arange(start, start + true)
            start += padded


def entities(rows, plan):
    """The rows as plain numbers for `naive`."""
    records = rows.view(plan.layout.dtype)[:, 0]
    return [_entity(record, plan) for record in records]


def _entity(record, plan):
    layout = plan.layout
    entity = {"bias": float(record["bias"]) if layout.bias else 0.0}
    for number, name in enumerate(SEGMENTS):
        entity[name] = []
        if name not in layout.segment_lengths:
            continue
        scale = 1.0
        if layout.precision == "int8":
            scale = float(record["scale"]) if name == "product" else plan.segment_scales[number]
        places = list(run_places(layout, number))
        signs = [sign for sign, true in zip((1, -1), layout.columns[number], strict=True) if true]
        if name == "mirrored":
            for sign, (u, v) in zip(
                signs, zip(places[::2], places[1::2], strict=True), strict=True
            ):
                for a, b in zip(u, v, strict=True):
                    pair = (_number(record[name][a], layout), _number(record[name][b], layout))
                    entity[name].append((sign, pair[0] * scale, pair[1] * scale))
        else:
            for sign, place in zip(signs, places, strict=True):
                entity[name] += [(sign, _number(record[name][n], layout) * scale) for n in place]
    return entity


def _number(value, layout):
    if layout.precision == "bfloat16":
        return float(np.array([int(value) << 16], dtype=np.uint32).view(np.float32)[0])
    return float(value)
