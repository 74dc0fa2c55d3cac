"""Files for others and for later: features of pairs, and any accepted file as our HDF5."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastpair.columns import pair_candidates, parse_labels
from fastpair.errors import ArgumentError
from fastpair.files import write_embeddings, write_pairs
from fastpair.formats import (
    AS_FOUND,
    Arrays,
    Columns,
    ReadOptions,
    TextColumns,
    is_number,
    open_format,
)
from fastpair.hdf5 import Output, allocate, write_text
from fastpair.ids import all_integers, longest
from fastpair.ingest import open_embeddings
from fastpair.listing import export_format, write_listing
from fastpair.pairs import PairBlock, Side
from fastpair.raw_pairs import SIDE_ARRAYS, RawPairs, is_key, open_raw_pairs
from fastpair.staging import WRITING, Staging, check_output, writing

# --- features of pairs --------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureBlock:
    """Some consecutive pairs with their features.

    Parameters
    ----------
    pairs : the pairs.
    features : (b, F) float32.
    """

    pairs: PairBlock
    features: np.ndarray


def write_features(
    path: str | Path,
    blocks: Iterable[FeatureBlock],
    count: int,
    names: Sequence[str],
    *,
    keys: tuple[str, str] = ("left", "right"),
    label: bool = False,
    attributes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write features of pairs as Parquet, a column each, or as HDF5.

    HDF5 holds `features` (M, F) float32, their `names`, `left` and `right` int64 (rows of the
    embeddings) and perhaps `label`; Parquet the keys as they came, perhaps `label`, the features.

    Parameters
    ----------
    path : the file to make; ".parquet" means Parquet.
    blocks : all pairs in order; each becomes a row group.
    count : M, the number of pairs.
    names : of the features.
    keys : names of the key columns in Parquet, default ("left", "right").
    label : whether pairs carry labels, default False.
    attributes : attributes of an HDF5 file.
    overwrite : whether an existing file may be replaced, default False.
    """
    if export_format(path) == ".parquet":
        header = [*keys, *(["label"] if label else []), *names]
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise ArgumentError(
                f"two columns would be called {twice[0]!r}: rename that of the pair file, or "
                "write HDF5"
            )
        with Staging(path, overwrite=overwrite, suffix=WRITING) as staging:
            _write_feature_groups(staging, blocks, header, label)
        return

    def lay_out(file: Any) -> None:
        allocate(file, "features", (count, len(names)), "<f4")
        for name in ("left", "right"):
            allocate(file, name, (count,), "<i8")
        if label:
            allocate(file, "label", (count,), "<f8")
        write_text(file, "names", pa.array(names, pa.string()))

    with Output(path, "features", attributes or {}, overwrite=overwrite, lay_out=lay_out) as output:
        for block in blocks:
            pairs = block.pairs
            part = slice(pairs.start, pairs.start + len(pairs.left))
            columns = {"features": block.features, "left": pairs.left, "right": pairs.right}
            if pairs.label is not None:
                columns["label"] = pairs.label
            with writing(output.path):
                for name, values in columns.items():
                    output.file[name][part] = values


def _write_feature_groups(
    staging: Staging, blocks: Iterable[FeatureBlock], header: list[str], label: bool
) -> None:
    with ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        for block in blocks:
            columns = [block.pairs.left_keys, block.pairs.right_keys]
            columns += [pa.array(block.pairs.label)] if label else []
            columns += [pa.array(column) for column in np.ascontiguousarray(block.features.T)]
            batch = pa.RecordBatch.from_arrays(columns, header)
            with writing(staging.path):
                if writer is None:
                    writer = stack.enter_context(
                        pq.ParquetWriter(staging.partial, batch.schema, use_dictionary=False)
                    )
                writer.write_batch(batch, row_group_size=len(batch))
        with writing(staging.path):
            stack.close()


# --- any accepted file into HDF5 ----------------------------------------------------------------


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    kind: str = "auto",
    dataset: str | None = None,
    left: str | None = None,
    right: str | None = None,
    label: str | None = None,
    options: ReadOptions = AS_FOUND,
    overwrite: bool = False,
) -> str:
    """Bring embeddings or pairs of any accepted format into HDF5, ids kept as text.

    Parameters
    ----------
    source : the file to read.
    destination : the HDF5 file to make.
    kind : "embeddings", "pairs", or "auto": two columns of keys, or integers (M, 2), are pairs.
    dataset : see `open_embeddings` and `open_pairs`.
    left, right, label : columns of pairs, see `open_pairs`.
    options : what the source does not say itself.
    overwrite : whether an existing file may be replaced, default False.

    Returns
    -------
    str
        What was written, "embeddings" or "pairs".
    """
    if kind not in ("auto", "embeddings", "pairs"):
        raise ArgumentError(f"kind is {kind!r}, but must be 'auto', 'embeddings' or 'pairs'.")
    destination = Path(destination)
    check_output(destination, overwrite=overwrite, inputs=[Path(source)])
    if kind == "auto":
        kind = "pairs" if left or right or label else _kind_by_content(source, dataset, options)
    if kind == "pairs":
        _convert_pairs(source, destination, (left, right, label), dataset, options, overwrite)
    else:
        found = open_embeddings(source, dataset=dataset, options=options)
        write_embeddings(
            destination,
            found.blocks(),
            found.shape,
            found.dtype,
            found.ids,
            overwrite=overwrite,
        )
    return kind


def _kind_by_content(source: str | Path, dataset: str | None, options: ReadOptions) -> str:
    file = open_format(source, options)
    if isinstance(file, Arrays):
        if any(set(couple) <= file.entries.keys() for couple in SIDE_ARRAYS):
            return "pairs"
        names = [dataset] if dataset in file.entries else list(file.entries)
        shapes = [file.entries[name] for name in names if name not in ("label", "ids")]
        pairs = all(shape[1:] == (2,) and is_key(dtype) for shape, dtype in shapes)
        return "pairs" if pairs and shapes else "embeddings"
    if isinstance(file, TextColumns) and all(map(is_number, file.first)):
        return "pairs" if len(file.first) == 2 else "embeddings"
    found = pair_candidates(file.names)
    names = list(found[0]) if found else file.names
    return "pairs" if len(names) == 2 and _are_keys(file, names) else "embeddings"


def _are_keys(file: Columns, names: Sequence[str]) -> bool:
    """Whether columns hold text or integers, going by their types and their first rows."""
    if any(pa.types.is_nested(file.type_of(name)) for name in names):
        return False
    first = next(file.batches(names), None)
    values = [] if first is None else [v for c in first.slice(0, 20).columns for v in c.to_pylist()]
    fractions = [v for v in map(str, values) if is_number(v) and float(v) % 1]
    return not fractions


def _convert_pairs(
    source: str | Path,
    destination: Path,
    columns: tuple[str | None, str | None, str | None],
    dataset: str | None,
    options: ReadOptions,
    overwrite: bool,
) -> None:
    raw = open_raw_pairs(source, *columns, dataset=dataset, options=options)
    if raw.label is not None:
        raw = open_raw_pairs(source, *columns, want_labels=True, dataset=dataset, options=options)
    widest, largest = _survey(raw)

    def blocks() -> Iterator[tuple[Any, Any, np.ndarray | None]]:
        for start, left, right, label in _texts(raw):
            keys = [left, right]
            if largest is not None:
                keys = [key.cast(pa.int64()).to_numpy() for key in keys]
            labels = None
            if label is not None:
                labels = parse_labels(label, str(raw.path), start, raw.label or "label")
            yield keys[0], keys[1], labels

    write_pairs(
        destination,
        blocks(),
        raw.count,
        dtype="int64" if largest is None or largest >= 2**31 else "int32",
        text=largest is None,
        longest_text=widest,
        label=raw.has_labels,
        overwrite=overwrite,
    )


def _texts(raw: RawPairs) -> Iterator[tuple[int, pa.Array, pa.Array, pa.Array | None]]:
    """First row, keys of both sides as text, labels as they are."""
    start = 0
    for batch in raw.read(0):
        sides = [
            Side(str(raw.path), name, batch.column(number), start, 0)
            for number, name in enumerate(raw.names)
        ]
        yield start, sides[0].texts(), sides[1].texts(), batch[2] if raw.has_labels else None
        start += batch.num_rows


def _survey(raw: RawPairs) -> tuple[int, int | None]:
    """Bytes of the longest key; the largest (without sign) if all are integers, else None."""
    widest, largest = 0, 0
    integers = True
    for _, left, right, _ in _texts(raw):
        for text in (left, right):
            widest = max(widest, longest(text))
            integers = integers and all_integers(text)
            if integers:
                numbers = text.cast(pa.int64()).to_numpy()
                largest = max(largest, int(np.abs(numbers).max(initial=0)))
    return widest, largest if integers else None


# --- groups -------------------------------------------------------------------------------------


def write_groups(
    path: str | Path,
    groups: np.ndarray,
    ids: pa.Array | None,
    *,
    left: int | None = None,
    attributes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the group of every entity: `group` and, where there are ids, `ids` (text: `id`).

    Parameters
    ----------
    path : the file to make; its suffix says the format.
    groups : (N,) int64.
    ids : (N,) text, or None: text formats have row numbers in their place.
    left : how many entities are of the left table, where there are two: HDF5 then has
        `group_right` and `ids_right` besides, text formats a column `side`.
    overwrite : whether an existing file may be replaced, default False.
    """
    left = len(groups) if left is None else left
    sides = {"": slice(0, left), "_right": slice(left, None)} if left < len(groups) else {"": ...}
    if export_format(path) is None:

        def lay_out(file: Any) -> None:
            for name, part in sides.items():
                file.create_dataset(f"group{name}", data=groups[part])
                if ids is not None:
                    write_text(file, f"ids{name}", ids if part is ... else ids[part])

        output = Output(path, "groups", attributes or {}, overwrite=overwrite, lay_out=lay_out)
        with output:
            return
    rows = np.concatenate([np.arange(len(groups[part])) for part in sides.values()])
    columns = {"id": pa.array(rows) if ids is None else ids, "group": pa.array(groups)}
    if len(sides) == 2:
        columns["side"] = pa.array(np.where(np.arange(len(groups)) < left, "left", "right"))
    whole = list(columns.values())
    empty = [column.slice(0, 0) for column in whole]
    write_listing(path, list(columns), [whole], empty, overwrite=overwrite)
