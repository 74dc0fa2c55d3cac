"""HDF5 as fastpair uses it: opening and refusing files, text, places for raw bytes, outputs.

Every file carries the attributes `fastpair_kind`, `format_version` and `created_by`, and nothing
that changes from run to run: equal runs give equal bytes. Only `files`, which keeps what goes into
runs, and `results`, which keeps what comes out, build on this room.
"""

from __future__ import annotations

import os
import re
import resource
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
import pyarrow as pa

from fastpair.errors import FastpairError, FileError
from fastpair.ids import fixed_length, longest, text_from_numpy, text_parts
from fastpair.staging import PARTIAL, Staging, writing

FORMAT_VERSION = 1
"""The version that is written, and the newest one that is understood."""

LONGEST_FIXED_ID = 256
"""Bytes: ids up to this length are stored with a fixed length, longer ones with a variable one."""

PAGE = 4096
"""Bytes: data sets start at a multiple of this."""

IDS_AT_ONCE = 1 << 16
"""Ids that are converted together; bounds the memory that a conversion takes."""

TEXT_BYTES_AT_ONCE = 1 << 24
"""Bytes of text of a fixed length that are converted together."""

WRITTEN = 1 << 32
"""Added to a crc32, so that a block that was written is told from one that was not (0)."""


READING_ERRORS = (
    *(OSError, EOFError, LookupError, AttributeError, RuntimeError, ValueError, TypeError),
)
"""What libraries raise at a file that is not what it should be."""


# --- opening and checking -----------------------------------------------------------------------


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what HDF5 says about a file that it cannot read into one `FileError`."""
    try:
        yield
    except FastpairError:
        raise
    except BlockingIOError as error:
        raise FileError(
            f"{path} is locked by another process that writes it; wait until that ends."
        ) from error
    except MemoryError as error:
        raise FileError(
            f"{path} asks for more memory than there is; it is damaged or too large for this "
            "machine."
        ) from error
    except READING_ERRORS as error:
        if "already open for write" in str(error):
            raise FileError(
                f"{path} was not closed by the program that wrote it, or is still open there; "
                "wait until that ends, or say `h5clear -s` to this file and look whether it is "
                "whole."
            ) from error
        raise FileError(
            f"{path} cannot be read: it is damaged, cut short or not what it says it is "
            f"({_short(error)}); make or fetch it again."
        ) from error


def _short(error: BaseException) -> str:
    text = " ".join(str(error).strip("'\"").split())
    if isinstance(error, KeyError) and " " not in text:
        text = f"{text!r} is missing"
    return text if len(text) <= 120 else text[:117] + "..."


def check_readable(path: str | Path) -> Path:
    """The path, if there is a file that can be opened.

    Raises
    ------
    FileError
        The file is missing, is a folder or a pipe, or may not be read.
    """
    path = Path(path)
    if str(path) in ("-", "/dev/stdin") or path.is_fifo() or path.is_socket():
        raise FileError(
            f"{path} cannot be read: standard input and pipes are not supported yet, because files "
            "are read more than once; write it to a file."
        )
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
            if "parts" in file.attrs and "fastpair_kind" in file.attrs:
                _check_parts(file, path)
            yield file


OWN_PART = re.compile(r"[^/\\\0]+\.parts/part-[0-9]{15}-[0-9]{15}-[0-9a-f]{16}\.h5")
"""What a file that a cluster wrote calls its parts, which lie in the folder beside it."""


OTHER_FILES = 64
"""Files that are open beside the parts of one, about."""


def _sources(file: h5py.File) -> set[str]:
    """The other files that a file reads from, as their paths from its folder."""
    datasets = [item for item in file.values() if isinstance(item, h5py.Dataset)]
    virtual = [dataset for dataset in datasets if dataset.is_virtual]
    return {file_named(source) for dataset in virtual for source in dataset.virtual_sources()}


def file_named(source: Any) -> str:
    """The file of a source of a virtual data set: HDF5 takes a single % for a format."""
    return str(source.file_name).replace("%%", "%")


def _check_parts(file: h5py.File, path: Path) -> None:
    """Refuse a file whose parts HDF5 cannot open: it would give what stands for nothing."""
    sources = _sources(file)
    for name in sources:
        if not (path.parent / name).exists():
            raise FileError(
                f"{path} lacks its part {name}; keep it beside the folder that "
                "was written with it, under the same name, or make it again."
            )
    _allow_open(path, len(sources))


def _allow_open(path: Path, parts: int) -> None:
    """Have this process allowed to open all parts of a file at once, as HDF5 does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/proc/self/fd")) + parts + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise FileError(
            f"{path} has {parts} parts, which HDF5 holds open together, but this process may open "
            f"{hard} files at most: raise the limit to {wanted} (`ulimit -n`)."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def parts_of(path: Path) -> set[str]:
    """Names of the part files that a file stands on; none where it is no such file."""
    if not path.is_file() or not h5py.is_hdf5(path):
        return set()
    try:
        with h5py.File(path, "r", locking=False) as file:
            return {Path(name).name for name in _sources(file)} if "parts" in file.attrs else set()
    except (OSError, RuntimeError):
        return set()  # damaged: nothing can be read through it


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


# --- text ---------------------------------------------------------------------------------------


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
    dataset.attrs["checksum"] = text_checksum(text)


def text_checksum(text: pa.Array) -> np.uint64:
    """What stands for text: a crc32 of all lengths and one of all bytes."""
    lengths = data = 0
    for start in range(0, len(text), IDS_AT_ONCE):
        positions, content = text_parts(text.slice(start, IDS_AT_ONCE))
        lengths = zlib.crc32(np.diff(positions).astype("<i8").data, lengths)
        data = zlib.crc32(content[positions[0] : positions[-1]].data, data)
    return np.uint64(lengths << 32 | data)


def write_array(file: h5py.File, name: str, array: np.ndarray) -> None:
    """Store an array that is known as a whole, with a checksum."""
    array = np.asarray(array)
    file.create_dataset(name, data=array).attrs["checksum"] = array_checksum(array)


def array_checksum(array: np.ndarray) -> np.uint64:
    """What stands for an array: a crc32 of its numbers, little-endian, in C order."""
    array = np.asarray(array)
    little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    return np.uint64(WRITTEN | zlib.crc32(little.data))


def attributes_checksum(file: h5py.File) -> int:
    """What stands for the attributes of a file, their own checksum left out."""
    checksum = 0
    for name in sorted(set(file.attrs) - {"attributes_checksum"}):
        value = file.attrs[name]
        content = value if isinstance(value, str) else repr(np.asarray(value).tolist())
        checksum = zlib.crc32(f"{name}={content}\n".encode(errors="surrogateescape"), checksum)
    return checksum


def read_text(dataset: h5py.Dataset, start: int = 0, stop: int | None = None) -> pa.Array:
    """A data set of strings (fixed or variable length) or integers as `pa.string()`."""
    stop = len(dataset) if stop is None else stop
    step = max(1, min(IDS_AT_ONCE, TEXT_BYTES_AT_ONCE // max(1, dataset.dtype.itemsize)))
    parts = [text_from_numpy(dataset[at : min(at + step, stop)]) for at in range(start, stop, step)]
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
    file.attrs["attributes_checksum"] = np.uint64(attributes_checksum(file))


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
    suffix : what is appended to the name meanwhile.
    newest : the newest version of HDF5 whose structures may be used.
    """

    def __init__(
        self,
        path: str | Path,
        kind: str,
        attributes: Mapping[str, Any],
        *,
        overwrite: bool,
        lay_out: Callable[[h5py.File], None],
        suffix: str = PARTIAL,
        newest: str = "v108",
    ) -> None:
        self.staging = Staging(path, overwrite=overwrite, suffix=suffix)
        self.path = self.staging.path
        try:
            with writing(self.path):
                self.file = create_hdf5(self.staging.partial, newest)
                stamp(self.file, kind, attributes)
                lay_out(self.file)
                self.file.flush()  # who looks at it meanwhile sees what it will be
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


def create_hdf5(path: Path, newest: str = "v108") -> h5py.File:
    """Start an HDF5 file; the lock is `Staging`'s, so that HDF5 takes none."""
    return h5py.File(
        path,
        "w",
        libver=("earliest", newest),
        locking=False,
        alignment_threshold=PAGE // 2,
        alignment_interval=PAGE,
    )
