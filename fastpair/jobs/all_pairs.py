"""`matrix`: a table in, all pairs of it reduced to what is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastpair.backend import LEAST_MEMORY
from fastpair.block_pairs import BlockPairs
from fastpair.compression import check_filter
from fastpair.device import LEAST_WALKED, Choice, pick
from fastpair.errors import ArgumentError, MemoryBudgetError
from fastpair.files import Table
from fastpair.formats import AS_FOUND, ReadOptions
from fastpair.jobs.by_blocks import Tables, matrix_plan, read_or_leave
from fastpair.jobs.inputs import (
    LINKS_BY_DEVICE,
    Count,
    Summary,
    content_digest,
    device_bytes,
    digest_of_kernels,
    ignore,
    parts_left,
    table_sizes,
)
from fastpair.kernels import Plan
from fastpair.matrix_output import MatrixOutput, check_form
from fastpair.remaining import RemainingPairs
from fastpair.spooling import is_stream, received
from fastpair.staging import check_output

if TYPE_CHECKING:
    from fastpair.exclusions import Exclusions


def matrix(
    table: Path,
    output: Path,
    *,
    top_k: int | None = None,
    threshold: float | None = None,
    dense: bool = False,
    histogram: bool = False,
    bins: int | None = None,
    against: Path | None = None,
    exclude: Path | None = None,
    left_column: str | None = None,
    right_column: str | None = None,
    keys: str = "auto",
    reading: ReadOptions = AS_FOUND,
    threads: int | None = None,
    memory: str | int | None = None,
    compression: str | None = None,
    device: str = "auto",
    device_memory: str | int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    plan: bool = False,
    cluster: Any = None,
    consolidate: bool = False,
    progress: Count = ignore,
    expect: Callable[[int | None], None] | None = None,
) -> Summary:
    """Score all pairs of one table or of two, and write what is asked for.

    Parameters
    ----------
    output : ``.h5`` / ``.hdf5``; see `fastpair.matrix_output.SUFFIXES` for what else.
    top_k, threshold, dense, histogram : exactly one of them; `bins` goes with the last.
    exclude : pairs that the best of a row are not to hold, such as those that are known already;
        `left_column`, `right_column`, `keys` and `reading` say how they are read.
    memory : what may be allocated, the tables included.
    compression : name of a filter for an HDF5 output; see `fastpair.compression.FILTERS`.
    device : "auto", "cpu", "gpu", "gpu:1" or "gpu:0,1"; see `fastpair.device.pick`. Dense values
        and the outer edges of a histogram are those of its own tiles, all other results are the
        same on every device.
    device_memory : what may be allocated on each GPU; default 90 % of what is free there.
    resume : go on with what an interrupted run left; a histogram begins anew.
    plan : return what the run would do, see `fastpair.jobs.by_blocks.matrix_plan`; nothing is
        scored or written.
    cluster : a ``distributed.Client``, or what `fastpair.distributed.connected` gives: its workers
        walk, `threads` and `memory` are those of each task; see `fastpair.jobs.cluster_matrix`.
    consolidate : write one file, equal to that of a run without a cluster, byte for byte; default:
        the best of rows and dense matrices are HDF5 over part files beside it.

    Returns
    -------
    summary : with ``device`` and ``device_note`` as in `score`; ``scan``, the form of numbers in
        which pairs were looked for before the pair kernel decided (None for networks); and
        ``triangle``, whether each pair was walked once.
    """
    chosen = (top_k is not None, threshold is not None, dense, histogram)
    if sum(chosen) != 1:
        raise ArgumentError("choose one of top_k, threshold, dense and histogram")
    if bins is not None and not histogram:
        raise ArgumentError(f"bins is {bins} but goes with histogram alone")
    if exclude is not None and top_k is None:
        raise ArgumentError("exclude goes with top_k alone: other results hold every pair")
    named: Summary = {"left_column": left_column, "right_column": right_column, "keys": keys}
    if exclude is None and (*named.values(), reading) != (None, None, "auto", AS_FOUND):
        raise ArgumentError(
            "columns, keys and options of reading are those of --exclude, which is not given"
        )
    if exclude is not None and resume and is_stream(Path(exclude)):
        raise ArgumentError(f"--resume needs a file, but {exclude} can be read only once")
    form = ("top-k", "threshold", "dense", "histogram")[chosen.index(True)]
    output = Path(output)
    check_form(output, form, compression)
    if compression is not None:
        check_filter(compression)
    inputs = [Path(path) for path in (table, against, exclude) if path is not None]
    check_output(output, overwrite=overwrite, inputs=inputs)
    if consolidate and cluster is None:
        raise ArgumentError("--consolidate goes with --scheduler or --workers")
    if plan and exclude is not None:
        raise ArgumentError(
            "--plan does not know how often tables are read where pairs are left out: leave out "
            "--exclude"
        )
    if plan and cluster is not None:
        raise ArgumentError("--plan is of a run on this machine: leave out --scheduler, --workers")
    if cluster is not None:
        from fastpair.jobs.cluster_matrix import matrix_on_cluster

        asked: Summary = {"table": table, "against": against, "exclude": exclude}
        asked |= {**named, "reading": reading, "top_k": top_k, "threshold": threshold}
        asked |= {"bins": bins or 100, "form": form}
        options: Summary = {"threads": threads, "memory": memory, "device": device}
        options |= {"device_memory": device_memory, "resume": resume, "overwrite": overwrite}
        options |= {"compression": compression, "consolidate": consolidate}
        return matrix_on_cluster(cluster, asked, output, progress, expect, **options)
    on_device = device_bytes(device, device_memory)
    begun = time.perf_counter()
    tables = read_or_leave(
        table, against, memory, device, either_way=True, beside=LEAST_MEMORY, leave=plan
    )
    left, right, budget = tables.left, tables.right, tables.budget
    both = right or left
    walked = len(left.rows) * len(both.rows)
    if plan:
        return matrix_plan(tables, memory, device, form, top_k or 0)
    if expect is not None:
        expect(walked * (2 if histogram else 1))
    if budget < LEAST_MEMORY:
        raise MemoryBudgetError(
            f"--memory leaves {budget} bytes beside the tables, but all pairs need at least "
            f"{LEAST_MEMORY}: allow more"
        )
    notes: list[str] = []
    left_out: Exclusions | None = None
    if exclude is not None:
        from fastpair.exclusions import read_exclusions

        exclude = received(exclude)
        left_out, notes = read_exclusions(exclude, left, right, budget, options=reading, **named)
        budget = max(LEAST_MEMORY, budget - left_out.keys.nbytes)
    choice = pick(device, pairs=walked, least=LEAST_WALKED) if not tables.stored else Choice()

    def walk(rows: np.ndarray, right_rows: np.ndarray | None, room: int, **more: Any) -> Any:
        options: Summary = {"threads": threads, "memory": room, "progress": progress, **more}
        # walks that go on side by side share the device as they share the memory here
        share = None if on_device is None else max(1, on_device * room // budget)
        return all_pairs_on(choice, rows, right_rows, left.plan, share, **options)

    remaining = _walk_from(walk, tables, budget, left_out, progress)
    read = {**named, "reading": reading}
    target = MatrixOutput(
        path=output,
        form=form,
        shape=(len(left.rows), len(both.rows)),
        ids=left.ids,
        ids_right=None if right is None else right.ids,
        distinct=right is not None,
        identity=identity_of(left, right, choice.kind, form, exclude, read),
        attributes=attributes_of(left, right),
        compression=compression,
        overwrite=overwrite,
        resume=resume,
    )
    scoring_begun = time.perf_counter()
    if top_k is not None:
        found = target.top_k(remaining, top_k)
        if left_out is not None:
            found["excluded"] = len(left_out.keys)
    elif threshold is not None:
        found = target.threshold(remaining, threshold)
    elif dense:
        found = target.dense(remaining)
    else:
        found = target.histogram(remaining, bins or 100)
    seconds = time.perf_counter() - scoring_begun
    notes += parts_left(output, resume, found["resumed_from"])
    rest = walked - found["resumed_from"] * len(both.rows)
    return {
        "work": form,
        "output": str(output),
        **table_sizes(left, right),
        "pairs": walked,
        **found,
        "seconds": time.perf_counter() - begun,
        "pairs_per_second": rest / max(seconds, 1e-9),
        "device": choice.name,
        "device_note": choice.note,
        "unit": left.unit,
        "notes": [*_matrix_notes(choice, left), *notes],
    }


def identity_of(
    left: Table,
    right: Table | None,
    device: str,
    form: str,
    exclude: Path | None,
    read: Summary,
) -> dict[str, str]:
    """What a run is made of, by name, but for the numbers of its form.

    Parameters
    ----------
    left, right : the tables; `right` is None where they are one.
    device : kind of the device.
    form : what is kept of the pairs.
    exclude : the pairs to leave out, or None.
    read : the options by which they are read; ``reading`` among them.
    """
    by_device = form == "dense" or left.plan.link in LINKS_BY_DEVICE  # other bits on another one
    identity = {
        "table": left.digest,
        "right table": "the same" if right is None else right.digest,
        "kernels": digest_of_kernels(),
        "device": device if by_device else "any",
    }
    if exclude is None:
        return identity
    columns = sorted((name, value) for name, value in read.items() if name != "reading")
    return {
        "exclude": content_digest(exclude),
        "reading of exclude": f"{columns}, {read['reading']}",
        **identity,
    }


def attributes_of(left: Table, right: Table | None) -> Summary:
    """The attributes of a file of all pairs."""
    return {
        "unit": left.unit,
        "model_fingerprint": left.fingerprint,
        "two_tables": right is not None,
    }


def _walk_from(
    walk: Callable[..., Any],
    tables: Tables,
    budget: int,
    left_out: Exclusions | None,
    progress: Count,
) -> Callable[[int], Any]:
    """Return what gives all pairs from a left row on, isolated rows and exclusions left out."""
    from fastpair.isolation import PairsWithoutIsolated

    left, right = tables.left, tables.right
    rows, others = tables.rows
    isolated = (left.isolated, left.isolated if right is None else right.isolated)
    excluded = left_out
    finite = all(mask is None for mask in isolated)
    if left_out is not None and not finite:
        kept = [None if mask is None else ~mask for mask in isolated]
        excluded = left_out.among_kept((kept[0], kept[1]))

    def by_blocks(rows: Any, right_rows: Any, room: int, start: int = 0) -> Any:
        return BlockPairs(walk, rows, right_rows, left.plan, room, start, progress)

    def from_row(rows: Any, right_rows: Any, start: int) -> Any:
        if excluded is None:
            if tables.stored is not None:
                return by_blocks(rows, right_rows, budget, start)
            return RemainingPairs(walk, rows, right_rows, budget, start)
        from fastpair.exclusions import PairsWithoutExcluded

        every = rows if right_rows is None else right_rows
        make = walk if tables.stored is None else by_blocks
        return PairsWithoutExcluded(make, rows, every, excluded, budget, start)

    def remaining(start: int) -> Any:
        progress(start * len((right or left).rows))
        if finite:
            return from_row(rows, others, start)
        return PairsWithoutIsolated(from_row, rows, others, isolated, start)

    return remaining


def _matrix_notes(choice: Choice, table: Table) -> list[str]:
    slow = "" if table.plan.network is None else NETWORK_NOTE
    return [note for note in (slow, choice.told) if note]


def all_pairs_on(
    choice: Choice,
    left: np.ndarray,
    right: np.ndarray | None,
    plan: Plan,
    device_memory: int | None,
    **options: Any,
) -> Any:
    """Return what walks all pairs of rows on the chosen device."""
    if not choice.runtimes:
        from fastpair.matrix import all_pairs

        return all_pairs(left, right, plan, **options)
    from fastpair import gpu_matrix

    options |= {"runtimes": list(choice.runtimes), "device_memory": device_memory}
    return gpu_matrix.all_pairs(left, right, plan, **options)


NETWORK_NOTE = (
    "this model is a network that does not fold: all pairs are gathered one by one, which is slow"
)
