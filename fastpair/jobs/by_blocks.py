"""Tables that do not fit into `--memory`: opened with their rows left in the file; plans told."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpair.backend import LEAST_MEMORY, memory_budget
from fastpair.errors import MemoryBudgetError
from fastpair.files import Table, read_table
from fastpair.hdf5 import open_hdf5
from fastpair.jobs.inputs import Summary, check_models, check_sides, load_tables
from fastpair.scoring import common_plan
from fastpair.stored_rows import StoredRows

if TYPE_CHECKING:
    from fastpair.pairs import PairSource
    from fastpair.results import ScoreFile


@dataclass(frozen=True)
class Tables:
    """One or two tables, in memory or with their rows in the file.

    Parameters
    ----------
    left, right : the tables; right is None where it is the left one.
    budget : bytes of memory that are left beside them.
    stored : where the rows are, None if they are in memory.
    """

    left: Table
    right: Table | None
    budget: int
    stored: tuple[StoredRows, StoredRows | None] | None = None

    @property
    def rows(self) -> tuple[Any, Any]:
        """Rows of the left and of the right table (None: the left one), wherever they are."""
        if self.stored is not None:
            return self.stored
        return self.left.rows, None if self.right is None else self.right.rows


def table_bytes(table: Path, against: Path | None) -> int:
    """Return the bytes of the files of one or two tables."""
    paths = [Path(path) for path in (table, against) if path is not None]
    return sum(path.stat().st_size if path.is_file() else 0 for path in paths)


def read_or_leave(
    table: Path,
    against: Path | None,
    memory: str | int | None,
    device: str,
    *,
    unknown: bool = False,
    either_way: bool = False,
    beside: int = 0,
    leave: bool = False,
) -> Tables:
    """Read tables that fit into the memory; leave the rows of others in their files.

    Parameters
    ----------
    table, against, memory, unknown, either_way : as `load_tables` takes them.
    device : what was asked for; rows that stay in their files are scored on the CPU.
    beside : bytes that are needed beside the tables.
    leave : whether to leave rows where they are even if they fit.

    Raises
    ------
    MemoryBudgetError : the tables do not fit and a GPU was asked for, or not even their ids fit.
    """
    budget, size = memory_budget(memory), table_bytes(table, against)
    if size + beside <= budget and not leave:
        return Tables(*load_tables(table, against, memory, unknown=unknown, either_way=either_way))
    if not leave:
        _refuse_device(device, size, budget)
    _check_ids(table, against, budget)
    left = read_table(table, unknown=unknown, rows=False)
    right = None if against is None else read_table(against, unknown=unknown, rows=False)
    plan = left.plan
    if right is not None:
        check_models(table, left, against, right)
        plan = common_plan(left.plan, right.plan)
    stored = (
        StoredRows(table, plan, left.plan, unknown=unknown),
        (None if right is None else StoredRows(str(against), plan, right.plan, unknown=unknown)),
    )
    left = replace(left, plan=plan)
    right = None if right is None else replace(right, plan=plan)
    check_sides(table, left, right, either_way)
    held = sum(_bytes_beside_rows(one) for one in (left, right) if one is not None)
    return Tables(left, right, budget - held, stored)


def _refuse_device(device: str, size: int, budget: int) -> None:
    """Refuse a GPU for tables of so many bytes, which stay in their files."""
    if device not in ("auto", "cpu"):
        raise MemoryBudgetError(
            f"the tables take {size} bytes, more than the {budget} bytes of memory allowed, and "
            "tables that stay on the disk are scored on the CPU: allow more with --memory or leave "
            "out --device"
        )


def _check_ids(table: Path, against: Path | None, budget: int) -> None:
    """Refuse tables whose ids, which are read twice at once, do not fit."""
    size = 0
    for path in (table, against):
        if path is not None:
            with open_hdf5(path) as file:
                size += file["ids"].nbytes if "ids" in file else 0
    if 2 * size > budget:
        raise MemoryBudgetError(
            f"the ids of the tables take {size} bytes and twice as many while they are read, but "
            f"--memory allows {budget}: allow more, or leave ids out of the embeddings, whose rows "
            "have numbers"
        )


def _stored_bytes(tables: Tables) -> int:
    """Bytes of the files in which rows were left."""
    left, right = tables.rows
    return table_bytes(left.path, None if right is None else right.path)


def _bytes_beside_rows(table: Table) -> int:
    """Bytes of what a table holds besides its rows."""
    ids = 0 if table.ids is None else table.ids.nbytes
    return ids + (0 if table.isolated is None else table.isolated.nbytes)


def run_identity(file: ScoreFile) -> dict[str, str]:
    """Return what a run is made of, what is watched included: what its buckets belong to."""
    return {**file.identity, **file.watched, "pairs": str(file.count)}


def scoring_plan(
    tables: Tables,
    source: PairSource,
    memory: str | int | None,
    threads: int | None,
    device: str,
    *,
    again: bool,
) -> Summary:
    """Return what scoring these pairs will do, in plain numbers.

    Parameters
    ----------
    tables : with their rows left in the file.
    source : the pairs.
    memory, threads, device : what was asked for.
    again : whether the pair file is read once more, for an output with keys.

    Returns
    -------
    plan : ``in_memory``, whether the tables fit; ``pairs``; ``table_bytes``; ``blocks`` that are
        held and ``chunks`` that are read past them; ``passes``, how often the tables are read;
        ``rounds`` in which pairs are sorted; ``bytes_read`` (also as ``table_bytes_read``,
        ``pair_bytes_read`` and ``sorting_bytes_read``) and ``bytes_written``, at most; ``disk``,
        the bytes that are needed beside the output until the end, its own scores included;
        ``memory``.
    """
    from fastpair import results
    from fastpair.backend import thread_count
    from fastpair.blockwise import BlockwiseScorer
    from fastpair.jobs.scoring import bytes_beside

    assert tables.stored is not None
    budget = memory_budget(memory)
    size = _stored_bytes(tables)
    rows = sum(len(one) * one.shape[1] for one in tables.stored if one is not None)
    pair_bytes = source.path.stat().st_size
    if size + bytes_beside(source, thread_count(threads)) <= budget:
        told: Summary = {
            "in_memory": True,
            "pairs": source.count,
            "table_bytes": rows,
            "blocks": 1,
            "chunks": 0,
            "passes": 1.0,
            "rounds": 0,
            "table_bytes_read": rows,
            "pair_bytes_read": pair_bytes,
            "sorting_bytes_read": 0,
            "bytes_read": rows + pair_bytes,
            "bytes_written": 4 * source.count,
            "disk": 4 * source.count,
        }
    else:
        _refuse_device(device, size, budget)
        scorer = BlockwiseScorer(tables.stored, memory=tables.budget, threads=threads)
        told = scorer.make_plan(source, results.SCORE_BLOCK).told
    if again:
        told["pair_bytes_read"] += pair_bytes
        told["bytes_read"] += pair_bytes
    return {**told, "memory": budget}


def matrix_plan(
    tables: Tables, memory: str | int | None, device: str, form: str, k: int
) -> Summary:
    """Return what walking all pairs will do, in plain numbers.

    Parameters
    ----------
    tables : with their rows left in the file.
    memory, device : what was asked for.
    form, k : of the result.

    Returns
    -------
    plan : as `scoring_plan` has it, as far as it is known before the pairs are.
    """
    from fastpair.block_pairs import BlockPairs

    assert tables.stored is not None
    left, right = tables.stored
    budget = memory_budget(memory)
    stored = [one for one in tables.stored if one is not None]
    rows = sum(len(one) * one.shape[1] for one in stored)
    told: Summary = {"in_memory": True, "blocks": 1, "chunks": 0, "passes": 1.0}
    read = rows
    if _stored_bytes(tables) + LEAST_MEMORY > budget:
        _refuse_device(device, _stored_bytes(tables), budget)
        pairs = BlockPairs(lambda *_: None, left, right, tables.left.plan, tables.budget)
        read = pairs.rows_read(form, k) * left.shape[1]
        told = {"in_memory": False, **pairs.shape(form, k), "passes": round(read / max(1, rows), 2)}
    return {
        **told,
        "pairs": len(left) * len(right or left),
        "table_bytes": rows,
        "table_bytes_read": read,
        "bytes_read": read,
        "memory": budget,
    }
