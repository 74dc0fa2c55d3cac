"""HDF5 as fastpair keeps it: embeddings, pairs, tables and models, and the base of all outputs.

Every file carries the attributes `fastpair_kind`, `format_version` and `created_by`, and nothing
that changes from run to run: equal runs give equal bytes. Scores and matrices, which runs produce
and which are resumed, are in `results`; both are the only rooms that know HDF5.
"""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .errors import ArgumentError, DataError, FastpairError, FileError
from .kernels import SEGMENTS, Plan, RowLayout
from .staging import Staging, read_at, reserve, write_at, writing

if TYPE_CHECKING:
    from .model import Model

FORMAT_VERSION = 1
"""The version that is written, and the newest one that is understood."""

LONGEST_FIXED_ID = 256
"""Bytes: ids up to this length are stored with a fixed length, longer ones with a variable one."""

PAGE = 4096
"""Bytes: data sets start at a multiple of this."""

CHECKED_BYTES = 1 << 22
"""Bytes, about: what one checksum of a table stands for."""

IDS_AT_ONCE = 1 << 16
"""Ids that are converted together; bounds the memory that a conversion takes."""

WRITTEN = 1 << 32
"""Added to a crc32, so that a block that was written is told from one that was not (0)."""


# --- opening and checking -----------------------------------------------------------------------


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what HDF5 says about a file that it cannot read into one `FileError`."""
    try:
        yield
    except FastpairError:
        raise
    except (OSError, EOFError, KeyError, RuntimeError, ValueError, TypeError) as error:
        raise FileError(
            f"{path} cannot be read: it is damaged, cut short or not what it says it is "
            f"({_short(error)}); make or fetch it again."
        ) from error


def _short(error: BaseException) -> str:
    text = " ".join(str(error).strip("'\"").split())
    return text if len(text) <= 120 else text[:117] + "..."


def check_readable(path: str | Path) -> Path:
    """The path, if there is a file that can be opened.

    Raises
    ------
    FileError
        The file is missing, is a folder, or may not be read.
    """
    path = Path(path)
    if path.is_dir():
        raise FileError(f"{path} is a folder, not a file; give the name of a file in it.")
    if not path.exists():
        raise FileError(f"{path} does not exist; check the name and the folder.")
    if not os.access(path, os.R_OK):
        raise FileError(f"{path} may not be read by this user; change its permissions.")
    return path


@contextmanager
def open_hdf5(path: str | Path, *, locking: bool | str = "best-effort") -> Iterator[h5py.File]:
    """Open an HDF5 file for reading; whatever it turns out not to hold becomes a `FileError`."""
    path = check_readable(path)
    with reading(path):
        if not h5py.is_hdf5(path):
            raise FileError(
                f"{path} is not an HDF5 file, or its beginning is damaged; "
                "bring other formats into HDF5 with `fastpair convert`."
            )
        with h5py.File(path, "r", locking=locking) as file:
            yield file


def fastpair_kind(file: h5py.File, path: Path) -> str | None:
    """What a file says that it is, None if fastpair did not write it.

    Raises
    ------
    FileError
        The file was written by a fastpair that is newer than this one.
    """
    kind = file.attrs.get("fastpair_kind")
    if kind is None:
        return None
    written = int(file.attrs.get("format_version", 0))
    if written > FORMAT_VERSION:
        raise FileError(
            f"{path} has format version {written}, but this fastpair understands versions up to "
            f"{FORMAT_VERSION}; it was written by {file.attrs.get('created_by', 'a newer one')}: "
            "install that version or a newer one."
        )
    return str(kind)


def expect_kind(file: h5py.File, path: Path, kind: str) -> None:
    """Refuse a file that is not a fastpair file of this kind."""
    found = fastpair_kind(file, path)
    if found != kind:
        what = (
            f"a fastpair file of kind {found}" if found else "an HDF5 file that is not fastpair's"
        )
        raise FileError(f"{path} is {what}, but a file of kind {kind} is needed here.")


# --- ids ----------------------------------------------------------------------------------------


def check_ids(ids: pa.Array, name: str, count: int | None = None) -> pa.Array:
    """Ids as text, if they can name rows: none missing, none twice, no NUL.

    Parameters
    ----------
    ids : text, (N,).
    name : the file or argument they came from, for the message.
    count : the number of rows they must name, default any.

    Returns
    -------
    pa.Array
        The ids as one `pa.string()` array, (N,).

    Raises
    ------
    DataError
        The ids cannot name rows.
    """
    ids = text_array(ids)
    if count is not None and len(ids) != count:
        raise DataError(
            f"{name} holds {len(ids)} ids for {count} rows; there must be one id for every row."
        )
    if ids.null_count:
        row = pc.index(pc.is_null(ids), True).as_py()
        raise DataError(
            f"{name} has no id in row {row} (counted from 0), and {ids.null_count} ids are missing "
            "in all; give every row an id."
        )
    if len(pc.unique(ids)) < len(ids):
        counts = pc.value_counts(ids)
        repeats = counts.filter(pc.greater(counts.field("counts"), 1))
        example = repeats[0].as_py()
        raise DataError(
            f"{name} holds ids that stand for several rows, {len(repeats)} of them, such as "
            f"{example['values']!r} ({example['counts']} times); give every row its own id."
        )
    if pc.any(pc.match_substring(ids, "\0")).as_py():
        row = pc.index(pc.match_substring(ids, "\0"), True).as_py()
        raise DataError(
            f"{name} has a NUL character in the id of row {row}; take it out of the id."
        )
    return ids


def text_array(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Text, integers or dictionaries of them as one `pa.string()` array; text is not altered."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks)
    return values if values.type == pa.string() else values.cast(pa.string())


def _text_parts(text: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Offsets (N + 1,) int32 and bytes uint8 of a `pa.string()` array."""
    _, offsets, data = text.buffers()
    if not len(text) or offsets is None:
        return np.zeros(1, np.int32), np.empty(0, np.uint8)
    positions = np.frombuffer(offsets, np.int32)[text.offset : text.offset + len(text) + 1]
    return positions, np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8)


def longest(text: pa.Array) -> int:
    """Bytes of the longest text, 0 if there is none."""
    positions, _ = _text_parts(text)
    return int(np.diff(positions).max(initial=0))


def fixed_length(text: pa.Array, width: int) -> np.ndarray:
    """Text as a NumPy array of `width` bytes each, filled up with NUL."""
    positions, data = _text_parts(text)
    matrix = np.zeros((len(text), width), np.uint8)
    matrix[np.arange(width) < np.diff(positions)[:, None]] = data[positions[0] : positions[-1]]
    return matrix.reshape(-1).view(f"S{width}")


def text_from_numpy(values: np.ndarray) -> pa.Array:
    """Text that HDF5 or NumPy gave, or integers, as a `pa.string()` array.

    Raises
    ------
    ValueError
        The values are neither, or the bytes are not UTF-8.
    """
    values = np.ascontiguousarray(values)
    if values.dtype.kind == "S":
        matrix = values.view(np.uint8).reshape(len(values), values.dtype.itemsize)
        used = matrix != 0
        offsets = np.concatenate([[0], np.cumsum(used.sum(axis=1))]).astype(np.int32)
        text = pa.StringArray.from_buffers(
            len(values), pa.py_buffer(offsets), pa.py_buffer(matrix[used])
        )
        text.validate(full=True)
        return text
    if values.dtype.kind in "iu":
        return pa.array(values).cast(pa.string())
    if values.dtype.kind == "U":
        return pa.array(values, pa.string())
    if values.dtype.kind == "O" and (h5py.check_string_dtype(values.dtype) or not len(values)):
        return pa.array(list(values), pa.binary()).cast(pa.string())
    raise ValueError(f"values of type {values.dtype} are not ids")


def write_text(file: h5py.File, name: str, text: pa.Array) -> None:
    """Store text as a data set, with a fixed length where no text is too long for that."""
    width = max(1, longest(text))
    fixed = width <= LONGEST_FIXED_ID
    kind = h5py.string_dtype("utf-8", width if fixed else None)
    dataset = file.create_dataset(name, (len(text),), kind)
    for start in range(0, len(text), IDS_AT_ONCE):
        part = text.slice(start, IDS_AT_ONCE)
        values = fixed_length(part, width).view(kind) if fixed else part.to_numpy(False)
        dataset[start : start + len(part)] = values


def read_text(dataset: h5py.Dataset, start: int = 0, stop: int | None = None) -> pa.Array:
    """A data set of strings (fixed or variable length) or integers as `pa.string()`."""
    stop = len(dataset) if stop is None else stop
    parts = [
        text_from_numpy(dataset[at : min(at + IDS_AT_ONCE, stop)])
        for at in range(start, stop, IDS_AT_ONCE)
    ]
    return pa.concat_arrays(parts) if parts else pa.array([], pa.string())


# --- outputs ------------------------------------------------------------------------------------


def stamp(file: h5py.File, kind: str, attributes: Mapping[str, Any]) -> None:
    """Write what every file carries, and the attributes of this one; None is left out."""
    common = {
        "fastpair_kind": kind,
        "format_version": FORMAT_VERSION,
        "created_by": f"fastpair {version('fastpair')}",
    }
    for name, value in {**common, **attributes}.items():
        if value is not None:
            file.attrs[name] = value


def allocate(file: h5py.File, name: str, shape: Sequence[int], dtype: np.dtype | str) -> None:
    """Make a contiguous data set whose room is fixed now and whose content is written later."""
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_layout(h5py.h5d.CONTIGUOUS)
    settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    settings.set_obj_track_times(False)
    kind = h5py.h5t.py_create(np.dtype(dtype), logical=True)
    space = h5py.h5s.create_simple(tuple(shape))
    h5py.h5d.create(file.id, name.encode(), kind, space, dcpl=settings)


class Output:
    """An HDF5 file under way: staged, locked, and named when its `with` block ends well.

    Parameters
    ----------
    path : where the finished file shall stand.
    kind : its `fastpair_kind`.
    attributes : attributes of the file; those that are None are left out.
    overwrite : whether a file that stands there already may be replaced.
    lay_out : makes the data sets.
    """

    def __init__(
        self,
        path: str | Path,
        kind: str,
        attributes: Mapping[str, Any],
        *,
        overwrite: bool,
        lay_out: Callable[[h5py.File], None],
    ) -> None:
        self.staging = Staging(path, overwrite=overwrite)
        self.path = self.staging.path
        try:
            with writing(self.path):
                self.file = create_hdf5(self.staging.partial)
                stamp(self.file, kind, attributes)
                lay_out(self.file)
        except BaseException:
            self.abandon()
            raise

    def place(self, name: str) -> int:
        """Byte at which a contiguous data set starts; 0 if it is empty."""
        return int(self.file[name].id.get_offset() or 0)

    def finish(self) -> None:
        """Close the file and give it its name."""
        try:
            with writing(self.path):
                self.file.close()
            self.staging.finish()
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Give up: nothing is left behind."""
        try:
            if hasattr(self, "file"):
                self.file.close()
        except (OSError, RuntimeError):
            pass  # a full disk; the file goes anyway
        finally:
            self.staging.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.abandon()


def create_hdf5(path: Path) -> h5py.File:
    """Start an HDF5 file; the lock is `Staging`'s, so that HDF5 takes none."""
    return h5py.File(
        path,
        "w",
        libver=("earliest", "v108"),
        locking=False,
        alignment_threshold=PAGE // 2,
        alignment_interval=PAGE,
    )


# --- embeddings and pairs -----------------------------------------------------------------------


def write_embeddings(
    path: str | Path,
    blocks: Iterable[tuple[int, np.ndarray]],
    shape: tuple[int, int],
    dtype: np.dtype | str = "float32",
    ids: pa.Array | None = None,
    *,
    overwrite: bool = False,
    compression: str | None = None,
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
    compression : "gzip" or "lzf", default none; compressed files are read more slowly.
    """
    count, columns = shape
    if ids is not None:
        ids = check_ids(ids, "ids", count)
    settings: dict[str, Any] = {}
    if compression is not None:
        rows = max(1, min(count, (1 << 20) // max(1, columns * np.dtype(dtype).itemsize)))
        settings = {"compression": compression, "shuffle": True, "chunks": (rows, columns)}

    def lay_out(file: h5py.File) -> None:
        file.create_dataset("embeddings", shape, dtype, **settings)
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
    """

    rows: np.ndarray
    plan: Plan
    ids: pa.Array | None
    fingerprint: str
    model_name: str
    side: str
    unit: str
    threshold: float | None


def plan_to_json(plan: Plan) -> str:
    """A plan as text that reads back to the same plan."""
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
        },
        allow_nan=False,
    )


def plan_from_json(text: str) -> Plan:
    """The plan that `plan_to_json` wrote."""
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
    )


class TableWriter(Output):
    """Writes a table, in blocks of rows; to be used in a `with` statement.

    Parameters
    ----------
    path : the file to make.
    count : N, the number of rows.
    plan : what is not per entity; its layout is that of the rows.
    ids : text, (N,), or None.
    fingerprint, model_name, side, unit, threshold : see `Table`.
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
        overwrite: bool = False,
    ) -> None:
        self.count, self.dtype, self.written = count, plan.layout.dtype, 0
        self.block_rows = max(1, CHECKED_BYTES // self.dtype.itemsize)
        blocks = -(-count // self.block_rows)
        if ids is not None:
            ids = check_ids(ids, "ids", count)

        def lay_out(file: h5py.File) -> None:
            allocate(file, "rows", (count,), self.dtype)
            file.create_dataset("block_checksum", (blocks,), "u8")
            if ids is not None:
                write_text(file, "ids", ids)

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
        clean = np.zeros(len(rows), self.dtype)  # what pads a row is zero too: equal bytes
        for name in self.dtype.names or ():
            clean[name] = rows[name]
        with writing(self.path):
            write_at(self.staging.descriptor, clean, self._start + start * self.dtype.itemsize)
        self.written += len(rows)

    def finish(self) -> None:
        """Add the checksums and give the file its name."""
        try:
            if self.written != self.count:
                raise ArgumentError(f"{self.written} of {self.count} rows were written.")
            place = (self.staging.descriptor, self._start)
            with writing(self.path):
                for number, piece in enumerate(_pieces(self.count, self.block_rows)):
                    block = np.empty((len(piece), self.dtype.itemsize), np.uint8)
                    self.file["block_checksum"][number] = _load(block, piece, *place)
        except BaseException:
            self.abandon()
            raise
        super().finish()


def _pieces(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _load(block: np.ndarray, piece: range, descriptor: int, start: int) -> int:
    """Read the bytes of the rows of a piece and give their checksum."""
    read_at(descriptor, block, start + piece.start * block.shape[1])
    return WRITTEN | zlib.crc32(block)


def read_table(path: str | Path, *, random_access: bool = True) -> Table:
    """Read a table.

    Parameters
    ----------
    path : a file that `TableWriter` made.
    random_access : True (the default) reads the rows into memory of huge pages and compares them
        with their checksums; False maps the file, which suits reading in order.

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
        plan = plan_from_json(file.attrs["plan"])
        dataset = file["rows"]
        if dataset.dtype != plan.layout.dtype or dataset.ndim != 1:
            raise ValueError("the type of its rows is not that of its plan")
        rows = _read_rows(path, file, random_access)
        threshold = file.attrs.get("threshold")
        table = Table(
            rows=rows,
            plan=plan,
            ids=read_text(file["ids"]) if "ids" in file else None,
            fingerprint=str(file.attrs["model_fingerprint"]),
            model_name=str(file.attrs["model_name"]),
            side=str(file.attrs["side"]),
            unit=str(file.attrs["unit"]),
            threshold=None if threshold is None else float(threshold),
        )
        if table.ids is not None and len(table.ids) != len(rows):
            raise ValueError(f"{len(table.ids)} ids for {len(rows)} rows")
    return table


def _read_rows(path: Path, file: h5py.File, random_access: bool) -> np.ndarray:
    dataset = file["rows"]
    count, width = len(dataset), dataset.dtype.itemsize
    offset = dataset.id.get_offset()
    if not count:
        return np.empty((0, width), np.uint8)
    if offset is not None and os.path.getsize(path) < offset + count * width:
        raise EOFError("it ends before its last row")
    if offset is not None and not random_access and offset % 64 == 0:
        return np.memmap(path, np.uint8, "r", offset, (count, width))
    rows = page_aligned((count, width))
    if offset is None:  # repacked by some tool, perhaps compressed
        dataset.read_direct(rows.reshape(-1).view(dataset.dtype))
        return rows
    sums = file["block_checksum"][:]
    pieces = _pieces(count, int(file.attrs["checksum_rows"]))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = pool.map(
                lambda piece: _load(rows[piece.start : piece.stop], piece, descriptor, offset),
                pieces,
            )
            if list(found) != sums.tolist():
                raise ValueError("its rows do not agree with their checksums")
    finally:
        os.close(descriptor)
    return rows


def page_aligned(shape: tuple[int, int]) -> np.ndarray:
    """Zeroed bytes of this shape that start on a page, in huge pages where the system has them."""
    memory = mmap.mmap(-1, shape[0] * shape[1], flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without huge pages: slower, not wrong
    return np.frombuffer(memory, np.uint8).reshape(shape)


# --- models -------------------------------------------------------------------------------------


def write_model(path: str | Path, model: Model, *, overwrite: bool = False) -> None:
    """Write a model: its configuration as a JSON attribute, its arrays as data sets."""
    config, arrays = model.to_parts()
    text = json.dumps(config, allow_nan=False, sort_keys=True, ensure_ascii=False)

    def lay_out(file: h5py.File) -> None:
        for name in sorted(arrays):
            file.create_dataset(f"arrays/{name}", data=np.asarray(arrays[name]))

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
    from .model import Model

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
        if model.fingerprint() != file.attrs["fingerprint"]:
            raise ValueError("its content does not agree with its fingerprint")
    return model
