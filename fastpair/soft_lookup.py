"""A table of queries, one of keys and a file of what keys hold -> a file of outputs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpair.attention import SoftLookup
from fastpair.backend import LEAST_MEMORY
from fastpair.errors import ArgumentError, DataError, MemoryBudgetError, MismatchError
from fastpair.files import Table
from fastpair.ids import text_array
from fastpair.ingest import open_embeddings
from fastpair.jobs.all_pairs import NETWORK_NOTE
from fastpair.jobs.inputs import expect_hdf5, file_fingerprint, load_tables
from fastpair.results import LookupWriter
from fastpair.staging import check_output

Summary = dict[str, Any]


def soft_lookup(
    table: Path,
    values: Path,
    output: Path,
    *,
    against: Path | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    threshold: float | None = None,
    itself: bool = True,
    dataset: str | None = None,
    threads: int | None = None,
    memory: str | int | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda pairs: None,
    expect: Callable[[int | None], None] | None = None,
) -> Summary:
    """Average what keys hold, weighed by a softmax of the scores of each query, and write it.

    Parameters
    ----------
    table : table of the queries, and of the keys unless `against` is given.
    values : a row of numbers a key, a file of any format that embeddings may have; where it and
        the keys have ids, these say which row is whose.
    output : HDF5 with `output` (queries, d) float32, NaN where a query has no key.
    temperature, top_k, threshold, itself : see `attention.SoftLookup`.
    dataset : name of the values inside an HDF5 or npz file.
    memory : what may be allocated, tables and values included.

    Returns
    -------
    summary : with ``shape`` and ``without_key``, how many queries have no key.
    """
    expect_hdf5(output)
    if against is not None and not itself:
        raise ArgumentError("--no-self is for one table: of two, no query is its own key")
    inputs = [Path(path) for path in (table, values, against) if path is not None]
    check_output(Path(output), overwrite=overwrite, inputs=inputs)
    begun = time.perf_counter()
    left, right, budget = load_tables(table, against, memory)
    keys = right or left
    if left.isolated is not None or keys.isolated is not None:
        raise DataError(
            f"{table} or {against or table} has rows whose embeddings are not finite, which a "
            "lookup cannot leave out: project the finite ones alone"
        )
    source = open_embeddings(values, dataset=dataset)
    needed = 2 * 4 * source.shape[0] * source.shape[1]  # as read, and brought into order
    if budget - needed < LEAST_MEMORY:
        raise MemoryBudgetError(
            f"{values} takes {needed} bytes beside the tables, and a lookup at least "
            f"{LEAST_MEMORY}, but --memory leaves {budget}: allow more"
        )
    held = _in_order_of_keys(source.read(), source.ids, keys, values)
    pairs = len(left.rows) * len(keys.rows)
    if expect is not None:
        expect(pairs)
    soft = SoftLookup(
        left.rows,
        None if right is None else right.rows,
        left.plan,
        held,
        temperature=temperature,
        itself=itself,
        threads=threads,
        memory=budget - needed,
        progress=progress,
    )
    shape = len(left.rows), held.shape[1]
    kept = {"top_k": top_k, "threshold": threshold}
    attributes: Summary = {
        "unit": left.unit,
        "model_fingerprint": left.fingerprint,
        "two_tables": right is not None,
        "temperature": temperature,
        **{name: value for name, value in kept.items() if value is not None},
    }
    scoring_begun, without = time.perf_counter(), 0
    identity = {
        "table": left.digest,
        "right table": "the same" if right is None else right.digest,
        "values": file_fingerprint(values),
        "itself": str(itself),
    }
    with LookupWriter(
        output, shape, identity, ids=left.ids, attributes=attributes, overwrite=overwrite
    ) as file:
        try:
            for _, found in soft(top_k, threshold):
                file.append(found)
                without += int(np.isnan(found[:, 0]).sum())
            file.finish()
        except BaseException:
            file.discard()  # a lookup begins anew
            raise
    seconds = time.perf_counter() - scoring_begun
    notes = [source.assumed, f"{without} queries have no key: their output is NaN"]
    network = [] if left.plan.network is None else [NETWORK_NOTE]
    return {
        "output": str(output),
        "pairs": pairs,
        "shape": list(shape),
        "without_key": without,
        "temperature": temperature,
        "seconds": time.perf_counter() - begun,
        "pairs_per_second": pairs / max(seconds, 1e-9),
        "threads": soft.threads,
        "unit": left.unit,
        "notes": [*(notes if without else notes[:1]), *network],
    }


def _in_order_of_keys(
    values: np.ndarray, ids: pa.Array | None, keys: Table, path: Path
) -> np.ndarray:
    """Return the row of each key, found by id where values and keys have ids, else by place."""
    if ids is None or keys.ids is None:
        if len(values) != len(keys.rows):
            raise MismatchError(
                f"{path} has {len(values)} rows for {len(keys.rows)} keys: give a row a key, or ids"
            )
        return values
    own, wanted = text_array(ids), text_array(keys.ids)
    if own.equals(wanted):
        return values
    places = pc.index_in(wanted, own)
    if places.null_count:
        missing = wanted[pc.index(pc.is_null(places), True).as_py()].as_py()
        raise DataError(f"{path} has no row for the key {missing!r}: give a row for each key")
    return values[places.to_numpy()]
