"""Files that go into runs, and what any file is: embeddings, pairs, tables, models; `describe`."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pyarrow as pa

from fastpair.errors import ArgumentError
from fastpair.hdf5 import (
    LONGEST_FIXED_ID,
    READING_ERRORS,
    WRITTEN,
    Output,
    allocate,
    array_checksum,
    expect_kind,
    fastpair_kind,
    open_hdf5,
    read_text,
    text_checksum,
    write_array,
    write_text,
)
from fastpair.hdf5_arrays import LEAVE, Hdf5Arrays
from fastpair.id_tables import IdTable, IdTables
from fastpair.ids import check_ids, fixed_length, text_parts
from fastpair.kernels import SEGMENTS, Network, Plan, RowLayout
from fastpair.staging import PARTIAL, WRITING, read_at, write_at, writing
from fastpair.verifying import blocks_whole

if TYPE_CHECKING:
    from fastpair.model import Isotonic, Model

CHECKED_BYTES = 1 << 22
"""Bytes, about: what one checksum of a table stands for."""


# --- embeddings and pairs -----------------------------------------------------------------------


def write_embeddings(
    path: str | Path,
    blocks: Iterable[tuple[int, np.ndarray]],
    shape: tuple[int, int],
    dtype: np.dtype | str = "float32",
    ids: pa.Array | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write embeddings, `embeddings` (N, n) and `ids`.

    Parameters
    ----------
    path : the file to make.
    blocks : (first row, (b, n) float array), which together cover all rows.
    shape : (N, n).
    dtype : float type of the data set, default float32.
    ids : text, (N,), default none.
    overwrite : whether an existing file may be replaced, default False.
    """
    count = shape[0]
    if ids is not None:
        ids = check_ids(ids, "ids", count)

    def lay_out(file: h5py.File) -> None:
        file.create_dataset("embeddings", shape, dtype)
        if ids is not None:
            write_text(file, "ids", ids)

    with Output(path, "embeddings", {}, overwrite=overwrite, lay_out=lay_out) as output:
        written = 0
        for start, block in blocks:
            with writing(output.path):
                output.file["embeddings"][start : start + len(block)] = block
            written += len(block)
        if written != count:
            raise ArgumentError(f"blocks hold {written} rows, but shape says {count}.")


def write_pairs(
    path: str | Path,
    blocks: Iterable[tuple[Any, Any, np.ndarray | None]],
    count: int,
    *,
    dtype: np.dtype | str = "int64",
    text: bool = False,
    longest_text: int | None = None,
    label: bool = False,
    overwrite: bool = False,
) -> None:
    """Write pairs: `pairs` (M, 2) of row numbers, or `left` and `right` (M,) of ids.

    Parameters
    ----------
    path : the file to make.
    blocks : (left, right, label) of consecutive pairs; left and right integers, or `pa.Array`
        of text; label float64 or None.
    count : M, the number of pairs.
    dtype : integer type of row numbers, default int64; int32 does for rows below 2**31.
    text : whether the keys are ids, default False.
    longest_text : bytes of the longest id, default not known (variable length is stored).
    label : whether labels are written as `label` float64, default False.
    overwrite : whether an existing file may be replaced, default False.
    """
    fixed = longest_text is not None and longest_text <= LONGEST_FIXED_ID
    width = max(1, longest_text or 0)
    kind = h5py.string_dtype("utf-8", width if fixed else None)

    def lay_out(file: h5py.File) -> None:
        if text:
            file.create_dataset("left", (count,), kind)
            file.create_dataset("right", (count,), kind)
        else:
            file.create_dataset("pairs", (count, 2), dtype)
        if label:
            file.create_dataset("label", (count,), "f8")

    with Output(path, "pairs", {}, overwrite=overwrite, lay_out=lay_out) as output:
        start = 0
        for left, right, labels in blocks:
            stop = start + len(left)
            with writing(output.path):
                if text:
                    for name, keys in (("left", left), ("right", right)):
                        values = (
                            fixed_length(keys, width).view(kind) if fixed else keys.to_numpy(False)
                        )
                        output.file[name][start:stop] = values
                else:
                    output.file["pairs"][start:stop] = np.column_stack([left, right])
                if label:
                    output.file["label"][start:stop] = labels
            start = stop
        if start != count:
            raise ArgumentError(f"blocks hold {start} pairs, but count says {count}.")


# --- tables -------------------------------------------------------------------------------------


@dataclass
class Table:
    """Folded embeddings, as kernels read them.

    Parameters
    ----------
    rows : (N, row_bytes) uint8, C-contiguous, page aligned if read for random access.
    plan : what is not per entity.
    ids : text, (N,), or None.
    fingerprint : of the model that made the rows.
    model_name : what the model was called, for messages.
    side : "both", "left" or "right".
    unit : what scores are in: "log-odds", "grade" or "similarity".
    threshold : score from which a pair is good, or None.
    calibration : the model's curve from scores to probabilities, or None.
    digest : SHA-256 (hex) over rows, plan and ids: equal only for equal tables.
    isolated : (N,) bool, rows whose embeddings are not finite and that score NaN; None if none is.
    unknown_row : the row of ids that are not here, the last of `rows`, or None.
    """

    rows: np.ndarray
    plan: Plan
    ids: pa.Array | None
    fingerprint: str
    model_name: str
    side: str
    unit: str
    threshold: float | None
    digest: str
    calibration: Isotonic | None = None
    isolated: np.ndarray | None = None
    unknown_row: int | None = None

    @property
    def count(self) -> int:
        """Rows that stand for entities, which come first."""
        return len(self.rows) if self.unknown_row is None else self.unknown_row


def plan_to_json(plan: Plan) -> str:
    """A plan as text that reads back to the same plan, the arrays of a network left out."""
    layout = plan.layout
    return json.dumps(
        {
            "columns": [list(pair) for pair in layout.columns],
            "bias": layout.bias,
            "precision": layout.precision,
            "constant": float(plan.constant),
            "link": plan.link,
            "slope": float(plan.slope),
            "offset": float(plan.offset),
            "segment_scales": [float(scale) for scale in plan.segment_scales],
            **({} if plan.network is None else {"network": plan.network.form}),
        },
        allow_nan=False,
    )


def plan_from_json(text: str, arrays: dict[str, np.ndarray] | None = None) -> Plan:
    """The plan that `plan_to_json` wrote, with the arrays of its network."""
    parts = json.loads(text)
    columns = tuple((int(positive), int(negative)) for positive, negative in parts["columns"])
    if len(columns) != len(SEGMENTS):
        raise ValueError(f"a plan has {len(SEGMENTS)} segments, this one {len(columns)}")
    return Plan(
        RowLayout(columns, bool(parts["bias"]), parts["precision"]),
        constant=parts["constant"],
        link=parts["link"],
        slope=parts["slope"],
        offset=parts["offset"],
        segment_scales=tuple(parts["segment_scales"]),
        network=Network.from_arrays(parts["network"], arrays or {}) if "network" in parts else None,
    )


class TableWriter(Output):
    """Writes a table, in blocks of rows; to be used in a `with` statement.

    Parameters
    ----------
    path : the file to make.
    count : N, the number of rows.
    plan : what is not per entity; its layout is that of the rows.
    ids : text, (N,), or None.
    fingerprint, model_name, side, unit, threshold, calibration : see `Table`.
    overwrite : whether an existing file may be replaced, default False.
    """

    def __init__(
        self,
        path: str | Path,
        count: int,
        plan: Plan,
        *,
        ids: pa.Array | None = None,
        fingerprint: str,
        model_name: str,
        side: str = "both",
        unit: str,
        threshold: float | None = None,
        calibration: Isotonic | None = None,
        made_from: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.count, self.dtype, self.written = count, plan.layout.dtype, 0
        # whole pages, which rows of 64 bytes or more make up together
        self.block_rows = max(1, CHECKED_BYTES // self.dtype.itemsize // 64 * 64)
        blocks = -(-count // self.block_rows)
        if ids is not None:
            ids = check_ids(ids, "ids", count)

        def lay_out(file: h5py.File) -> None:
            allocate(file, "rows", (count,), self.dtype)
            file.create_dataset("block_checksum", (blocks,), "u8")
            if ids is not None:
                write_text(file, "ids", ids)
            for name, array in sorted(plan.network.arrays.items() if plan.network else ()):
                write_array(file, f"network/{name}", array)
            if calibration is not None:
                curve = np.stack([calibration.scores, calibration.probabilities])
                write_array(file, "calibration", curve)

        attributes = {
            "plan": plan_to_json(plan),
            "precision": plan.precision,
            "segments": " ".join(SEGMENTS),
            "true_lengths": np.array(plan.layout.columns, np.int64),
            "padded_lengths": np.array(plan.layout.runs, np.int64).reshape(-1, 2),
            "model_fingerprint": fingerprint,
            "model_name": model_name,
            "side": side,
            "unit": unit,
            "threshold": None if threshold is None else float(threshold),
            "checksum_rows": self.block_rows,
            "checksum_columns": "rows",
            **(made_from or {}),
        }
        super().__init__(path, "table", attributes, overwrite=overwrite, lay_out=lay_out)
        self._start = self.place("rows")

    def write(self, start: int, rows: np.ndarray) -> None:
        """Write structured rows of the layout's type, from row `start` on."""
        if rows.dtype.names != self.dtype.names or start < 0 or start + len(rows) > self.count:
            raise ArgumentError(
                f"rows {start} to {start + len(rows)} of type {rows.dtype} do not fit into a table "
                f"of {self.count} rows of type {self.dtype}."
            )
        clean = self._clean(rows)
        with writing(self.path):
            write_at(self.staging.descriptor, clean, self._start + start * self.dtype.itemsize)
        self.written += len(rows)

    def isolate(self, rows: np.ndarray) -> None:
        """Mark rows (k,) as those of embeddings that are not finite."""
        with writing(self.path):
            self.file.create_dataset("isolated", data=np.asarray(rows, np.int64))

    def write_unknown(self, rows: np.ndarray) -> None:
        """Write the one row that stands for ids that the table does not have."""
        with writing(self.path):
            write_array(self.file, "unknown", self._clean(rows))

    def _clean(self, rows: np.ndarray) -> np.ndarray:
        clean = np.zeros(len(rows), self.dtype)  # what pads a row is zero too: equal bytes
        for name in self.dtype.names or ():
            clean[name] = rows[name]
        return clean

    def finish(self) -> None:
        """Add the checksums and give the file its name."""
        try:
            if self.written != self.count:
                raise ArgumentError(f"{self.written} of {self.count} rows were written.")
            place = (self.staging.descriptor, self._start)
            with writing(self.path):
                for number, piece in enumerate(_pieces(self.count, self.block_rows)):
                    block = np.empty((len(piece), self.dtype.itemsize), np.uint8)
                    self.file["block_checksum"][number] = load_rows(block, piece, *place)
        except BaseException:
            self.abandon()
            raise
        super().finish()


def _pieces(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def load_rows(block: np.ndarray, piece: range, descriptor: int, start: int) -> int:
    """Read the bytes of the rows of a piece and give their checksum."""
    read_at(descriptor, block, start + piece.start * block.shape[1])
    return WRITTEN | zlib.crc32(block.data)


def read_table(
    path: str | Path, *, random_access: bool = True, unknown: bool = False, rows: bool = True
) -> Table:
    """Read a table.

    Parameters
    ----------
    path : a file that `TableWriter` made.
    random_access : True (the default) reads the rows into memory of huge pages and compares them
        with their checksums; False maps the file, which suits reading in order.
    unknown : read the row of unknown ids too, where there is one, behind the others; needs
        `random_access`.
    rows : False leaves the rows in the file, for `fastpair.stored_rows`: zeros that take no memory
        stand for them.

    Returns
    -------
    Table

    Raises
    ------
    FileError
        The file is missing, damaged, or not a table.
    """
    path = Path(path)
    with open_hdf5(path) as file:
        expect_kind(file, path, "table")
        network = {name: part[()] for name, part in file.get("network", {}).items()}
        plan = plan_from_json(file.attrs["plan"], network)
        if plan.network is not None and plan.network.columns > sum(plan.layout.columns[0]):
            raise ValueError("its network sees more columns than its rows have")
        dataset = file["rows"]
        if dataset.dtype != plan.layout.dtype or dataset.ndim != 1:
            raise ValueError("the type of its rows is not that of its plan")
        own = read_unknown(file, plan.layout.dtype) if unknown else np.empty(0, plan.layout.dtype)
        if rows:
            content = _read_rows(path, file, random_access, own)
        else:
            shape = len(dataset) + len(own), dataset.dtype.itemsize
            content = np.broadcast_to(np.uint8(0), shape)
        threshold = file.attrs.get("threshold")
        table = Table(
            rows=content,
            plan=plan,
            ids=_checked_ids(file),
            fingerprint=str(file.attrs["model_fingerprint"]),
            model_name=str(file.attrs["model_name"]),
            side=str(file.attrs["side"]),
            unit=str(file.attrs["unit"]),
            threshold=None if threshold is None else float(threshold),
            digest=_table_digest(file),
            calibration=_read_calibration(file),
            isolated=_read_isolated(file, len(content)),
            unknown_row=len(dataset) if len(own) else None,
        )
        if table.ids is not None and len(table.ids) != table.count:
            raise ValueError(f"{len(table.ids)} ids for {table.count} rows")
    return table


def read_unknown(file: h5py.File, dtype: np.dtype) -> np.ndarray:
    """The row of unknown ids, or none where the table has none."""
    if "unknown" not in file:
        return np.empty(0, dtype)
    dataset = file["unknown"]
    if dataset.dtype != dtype or dataset.shape != (1,):
        raise ValueError("the row of unknown ids is not one of its rows")
    row = np.zeros(1, dtype)  # what pads a row stays zero
    dataset.read_direct(row)
    if array_checksum(row) != dataset.attrs["checksum"]:
        raise ValueError("the row of unknown ids does not agree with its checksum")
    return row


def _checked_ids(file: h5py.File) -> pa.Array | None:
    if "ids" not in file:
        return None
    ids, stored = read_text(file["ids"]), file["ids"].attrs.get("checksum")
    if stored is not None and text_checksum(ids) != stored:
        raise ValueError("its ids do not agree with their checksum")
    return ids


def _read_calibration(file: h5py.File) -> Isotonic | None:
    from fastpair.model import Isotonic

    if "calibration" not in file:
        return None
    calibration = Isotonic(*file["calibration"][:])
    calibration.check()
    return calibration


def _read_isolated(file: h5py.File, count: int) -> np.ndarray | None:
    if "isolated" not in file:
        return None
    rows = file["isolated"][:]
    if rows.min(initial=0) < 0 or rows.max(initial=0) >= count:
        raise ValueError("its isolated rows are outside the table")
    isolated = np.zeros(count, bool)
    isolated[rows] = True
    return isolated


def _table_digest(file: h5py.File) -> str:
    """A digest of a table that stands on the checksums of its rows."""
    digest = hashlib.sha256(f"{file.attrs['plan']} {file.attrs['model_fingerprint']}".encode())
    digest.update(file["block_checksum"][:].tobytes())
    if "isolated" in file:
        digest.update(file["isolated"][:].tobytes())
    if "ids" in file:
        positions, data = text_parts(read_text(file["ids"]))
        digest.update(np.diff(positions).tobytes())
        digest.update(data[positions[0] : positions[-1]].tobytes())
    return digest.hexdigest()


def _read_rows(path: Path, file: h5py.File, random_access: bool, last: np.ndarray) -> np.ndarray:
    """Read the rows of a table, then put `last` behind them, which is one row or none."""
    dataset = file["rows"]
    count, width = len(dataset), dataset.dtype.itemsize
    offset = dataset.id.get_offset()
    if not count:
        return np.empty((0, width), np.uint8)
    if offset is not None and os.path.getsize(path) < offset + count * width:
        raise EOFError("it ends before its last row")
    if offset is not None and not random_access and offset % 64 == 0:
        return np.memmap(path, np.uint8, "r", offset, (count, width))
    everything = page_aligned((count + len(last), width))
    everything[count:] = last.view(np.uint8).reshape(len(last), width)
    rows = everything[:count]
    if offset is None:  # repacked by some tool, perhaps compressed
        dataset.read_direct(rows.reshape(-1).view(dataset.dtype))
        return everything
    sums = file["block_checksum"][:]
    pieces = _pieces(count, int(file.attrs["checksum_rows"]))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = pool.map(
                lambda piece: load_rows(rows[piece.start : piece.stop], piece, descriptor, offset),
                pieces,
            )
            if list(found) != sums.tolist():
                raise ValueError("its rows do not agree with their checksums")
    finally:
        os.close(descriptor)
    return everything


def page_aligned(shape: tuple[int, int]) -> np.ndarray:
    """Zeroed bytes of this shape that start on a page, in huge pages where the system has them."""
    memory = mmap.mmap(-1, shape[0] * shape[1], flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages: slower, not wrong
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8).reshape(shape)


# --- models -------------------------------------------------------------------------------------


def write_model(path: str | Path, model: Model, *, overwrite: bool = False) -> None:
    """Write a model: its configuration as a JSON attribute, its arrays as data sets."""
    config, arrays = model.to_parts()
    text = json.dumps(config, allow_nan=False, sort_keys=True, ensure_ascii=False)

    def lay_out(file: h5py.File) -> None:
        for name in sorted(arrays):
            write_array(file, f"arrays/{name}", arrays[name])
        for side, table in model.tables.sides.items() if model.tables else ():
            write_array(file, f"tables/{side}/embeddings", table.columns)
            write_text(file, f"tables/{side}/ids", table.ids)
        if model.record:
            record = json.dumps(model.record, allow_nan=False, sort_keys=True)
            write_array(file, "record", np.frombuffer(record.encode(), np.uint8))

    attributes = {"config": text, "fingerprint": model.fingerprint()}
    with Output(path, "model", attributes, overwrite=overwrite, lay_out=lay_out):
        pass


def read_model(path: str | Path) -> Model:
    """Read a model; nothing in the file is executed.

    Raises
    ------
    FileError
        The file is missing, damaged, or not a model.
    """
    from fastpair.model import Model

    path = Path(path)
    with open_hdf5(path) as file:
        expect_kind(file, path, "model")
        config = json.loads(file.attrs["config"])
        arrays: dict[str, np.ndarray] = {}

        def collect(name: str, item: h5py.Dataset | h5py.Group) -> None:
            if isinstance(item, h5py.Dataset):
                arrays[name] = item[()]

        if "arrays" in file:
            file["arrays"].visititems(collect)
        model = Model.from_parts(config, arrays)
        if "tables" in file:
            model = replace(model, tables=_read_id_tables(file["tables"]))
        if "record" in file:
            record = json.loads(file["record"][()].astype(np.uint8).tobytes())
            if not isinstance(record, dict):
                raise ValueError("its record of how it was learned is none")
            model = replace(model, record=record)
        if model.fingerprint() != file.attrs["fingerprint"]:
            raise ValueError("its content does not agree with its fingerprint")
    return model


def has_id_tables(path: str | Path) -> bool:
    """Whether a file is a model with tables of its own; False where it is no model at all."""
    if not Path(path).is_file() or not h5py.is_hdf5(path):
        return False
    with open_hdf5(Path(path)) as file:
        return "tables" in file and file.attrs.get("fastpair_kind") == "model"


def _read_id_tables(group: h5py.Group) -> IdTables:
    sides = {
        side: IdTable(check_ids(read_text(part["ids"]), f"the {side} table"), part["embeddings"][:])
        for side, part in group.items()
    }
    if "both" in sides:
        return IdTables(sides["both"])
    return IdTables(sides["left"], sides["right"])


# --- what a file is -----------------------------------------------------------------------------


def describe(path: str | Path) -> dict[str, Any]:
    """What a file is and whether it is whole, for people and as JSON.

    Parameters
    ----------
    path : an HDF5 file, also one that is still being made or whose making was interrupted.

    Returns
    -------
    dict
        `path`, `kind` (None if fastpair did not write it), `summary` (a sentence), `datasets`
        (shape and type by name), `attributes`, `ids` (whether it carries any), `whole` (True, False
        or None where nothing tells) and for unfinished scores `blocks_done` and `blocks`.

    Raises
    ------
    FileError
        The file is missing, damaged, not HDF5, or written by a newer fastpair.
    """
    path = Path(path)
    with open_hdf5(path, locking=False) as file:
        datasets = Hdf5Arrays(path, LEAVE).entries
        result: dict[str, Any] = {
            "path": str(path),
            "kind": fastpair_kind(file, path),
            "datasets": {
                _text(name): {
                    "shape": list(shape),
                    "dtype": "text" if dtype == "text" else str(dtype),
                }
                for name, (shape, dtype) in datasets.items()
            },
            "attributes": {_text(name): _attribute(file, name) for name in file.attrs},
            "ids": "ids" in datasets,
            "whole": None,
        }
        if result["kind"] is not None and "block_checksum" in datasets:
            result.update(_progress(path, file))
        result["summary"] = _summary(result)
    return result


def _attribute(file: h5py.File, name: str) -> Any:
    try:
        return _plain(file.attrs[name])
    except READING_ERRORS:
        return "of a type that cannot be read"


def _plain(value: Any) -> Any:
    """Anything as JSON has it; text that is JSON itself is opened, what JSON lacks becomes text."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {_text(str(name)): _plain(part) for name, part in value.items()}
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, str) and value.startswith("{"):
        with suppress(ValueError, RecursionError):
            return _plain(json.loads(value))
    if value is None or isinstance(value, int) or (isinstance(value, float) and isfinite(value)):
        return value
    return _text(str(value))


def _text(text: str) -> str:
    """Text that can be printed: bytes that were no UTF-8 become question marks."""
    return text.encode(errors="replace").decode()


def _progress(path: Path, file: h5py.File) -> dict[str, Any]:
    """Which blocks of rows agree with their checksums."""
    whole = blocks_whole(path, file)
    if whole is None:
        return {}
    done = int(whole.sum())
    return {"blocks": len(whole), "blocks_done": done, "whole": done == len(whole)}


def _model_summary(attributes: dict[str, Any], datasets: dict[str, Any]) -> str:
    config = attributes["config"]
    heads = "+".join(branch["head"] for branch in config["branches"])
    threshold = config["threshold"]
    decides = "" if threshold is None else f", good from {threshold:.4g}"
    tables = sorted(n for n in datasets if n.startswith("tables/") and n.endswith("/ids"))
    if tables:
        ids = " and ".join(str(datasets[name]["shape"][0]) for name in tables)
        return f"{heads} over tables of {ids} ids, scores are {config['unit']}{decides}"
    columns = config["input_columns"] or "any number of"
    return f"{heads} over {columns} columns, scores are {config['unit']}{decides}"


def _summary(found: dict[str, Any]) -> str:
    kind, datasets = found["kind"], found["datasets"]
    listed = ", ".join(
        f"{name} {' x '.join(map(str, entry['shape'])) or 'one value'} {entry['dtype']}"
        for name, entry in list(datasets.items())[:12]
        if kind != "table" or name != "rows"
    )
    if kind is None:
        return f"an HDF5 file that is not fastpair's, with {listed or 'no data sets'}"
    attributes = found["attributes"]
    what = f"{attributes.get('form', '')} {kind}".strip()
    if kind == "table":
        count, model = datasets["rows"]["shape"][0], attributes["model_name"]
        listed = f"{count} rows of {attributes['precision']} by model {model}"
    elif kind == "model":
        listed = _model_summary(attributes, datasets)
    state = {True: "; whole", False: "; damaged", None: ""}[found["whole"]]
    if found["path"].endswith((PARTIAL, WRITING)):
        done, blocks = found.get("blocks_done", 0), found.get("blocks", 0)
        state = f"; unfinished, {done} of {blocks} blocks are done" if blocks else "; unfinished"
    return f"a fastpair {what} file: {listed}{state}"
