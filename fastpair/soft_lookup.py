"""A table of queries, one of keys and a file of what keys hold -> a file of outputs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpair.attention import SoftLookup
from fastpair.backend import LEAST_MEMORY
from fastpair.compression import check_filter
from fastpair.device import LEAST_WALKED, device_bytes, pick
from fastpair.errors import ArgumentError, DataError, MemoryBudgetError, MismatchError
from fastpair.files import Table
from fastpair.ids import text_array
from fastpair.ingest import open_embeddings
from fastpair.jobs.all_pairs import NETWORK_NOTE
from fastpair.jobs.inputs import LINKS_BY_DEVICE, digest_of_kernels, load_tables
from fastpair.matrix_output import MatrixOutput, check_form
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
    compression: str | None = None,
    device: str = "auto",
    device_memory: str | int | None = None,
    resume: bool = False,
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
    compression : name of a filter; see `fastpair.compression.FILTERS`.
    device : "auto", "cpu", "gpu", "gpu:1" or "gpu:0,1"; see `fastpair.device.pick`. Averages over
        all keys are those of its own tiles; scores of the best, or from a threshold on, are the
        same on every device.
    device_memory : what may be allocated on each GPU; default 90 % of what is free there.
    resume : go on with what an interrupted run left.

    Returns
    -------
    summary : with ``shape``; ``without_key``, how many queries have no key; ``resumed_from``, the
        first query that was not done before; ``device`` and ``device_note`` as in `score`.
    """
    output = Path(output)
    check_form(output, "lookup", compression)
    if compression is not None:
        check_filter(compression)
    if against is not None and not itself:
        raise ArgumentError("--no-self is for one table: of two, no query is its own key")
    inputs = [Path(path) for path in (table, values, against) if path is not None]
    check_output(output, overwrite=overwrite, inputs=inputs)
    on_device = device_bytes(device, device_memory)
    begun = time.perf_counter()
    left, right, budget = load_tables(table, against, memory)
    keys = right or left
    if left.isolated is not None or keys.isolated is not None:
        raise DataError(
            f"{table} or {against or table} has rows whose embeddings are not finite, which a "
            "lookup cannot leave out: project the finite ones alone"
        )
    held, needed, assumed = _held_values(values, dataset, keys, budget)
    pairs = len(left.rows) * len(keys.rows)
    if expect is not None:
        expect(pairs)
    choice = pick(device, pairs=pairs, least=LEAST_WALKED)
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
        runtimes=choice.runtimes,
        device_memory=on_device,
    )
    shape = len(left.rows), held.shape[1]
    kept = {"top_k": top_k, "threshold": threshold}
    every = top_k is None and threshold is None
    by_device = every or left.plan.link in LINKS_BY_DEVICE  # other bits on another device
    attributes: Summary = {
        "unit": left.unit,
        "model_fingerprint": left.fingerprint,
        "two_tables": right is not None,
        "temperature": temperature,
        **{name: value for name, value in kept.items() if value is not None},
    }
    target = MatrixOutput(
        path=output,
        form="lookup",
        shape=shape,
        ids=left.ids,
        ids_right=None,
        distinct=right is not None,
        identity={
            "table": left.digest,
            "right table": "the same" if right is None else right.digest,
            "values": hashlib.sha256(soft.values.data).hexdigest(),
            "itself": str(itself),
            "temperature": repr(float(temperature)),
            **{name: str(value) for name, value in kept.items()},
            "kernels": digest_of_kernels(),
            "device": choice.kind if by_device else "any",
        },
        attributes=attributes,
        compression=compression,
        overwrite=overwrite,
        resume=resume,
    )

    def averages(start: int) -> Iterator[tuple[int, np.ndarray]]:
        progress(start * len(keys.rows))
        return soft(top_k, threshold, start=start)

    scoring_begun = time.perf_counter()
    found = target.lookup(averages)
    seconds, without = time.perf_counter() - scoring_begun, found["without_key"]
    rest = pairs - found["resumed_from"] * len(keys.rows)
    notes = [assumed, f"{without} queries have no key: their output is NaN"]
    network = [] if left.plan.network is None else [NETWORK_NOTE]
    told = [choice.told] if choice.told else []
    return {
        "output": str(output),
        "pairs": pairs,
        "shape": list(shape),
        **found,
        "temperature": temperature,
        "seconds": time.perf_counter() - begun,
        "pairs_per_second": rest / max(seconds, 1e-9),
        "threads": soft.threads,
        "device": choice.name,
        "device_note": choice.note,
        "unit": left.unit,
        "notes": [*(notes if without else notes[:1]), *network, *told],
    }


def _held_values(
    path: Path, dataset: str | None, keys: Table, budget: int
) -> tuple[np.ndarray, int, str]:
    """Return what keys hold, in their order, the bytes that it takes and what was assumed."""
    source = open_embeddings(path, dataset=dataset)
    needed = 2 * 4 * source.shape[0] * source.shape[1]  # as read, and brought into order
    if budget - needed < LEAST_MEMORY:
        raise MemoryBudgetError(
            f"{path} takes {needed} bytes beside the tables, and a lookup at least "
            f"{LEAST_MEMORY}, but --memory leaves {budget}: allow more"
        )
    return _in_order_of_keys(source.read(), source.ids, keys, path), needed, source.assumed


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
