"""Matrices as the files of NumPy and SciPy: .npy for dense ones, .npz for CSR.

Both hold plain arrays without any pickle, and neither a name nor a time: equal content gives equal
bytes. The .npy can be mapped into memory.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from fastpair.results import SparseWriter
from fastpair.staging import WRITING, Staging, writing

EARLIEST = (1980, 1, 1, 0, 0, 0)
"""The time that every member of a .npz has: the first that a zip file can tell."""


def _npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    buffer = io.BytesIO()
    kind = np.dtype(dtype)
    about = {"descr": npy.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(buffer, about)
    return buffer.getvalue()


def write_npy(
    path: str | Path,
    shape: tuple[int, ...],
    dtype: str,
    blocks: Iterable[np.ndarray],
    *,
    overwrite: bool = False,
) -> None:
    """Write an array as .npy from blocks of its rows, in order.

    Parameters
    ----------
    path : the file to make.
    shape, dtype : of the array.
    blocks : its rows; only some of them are in memory at once.
    overwrite : whether an existing file may be replaced, default False.
    """
    with (
        Staging(path, overwrite=overwrite, suffix=WRITING) as staging,
        writing(staging.path),
        open(staging.partial, "wb") as file,
    ):
        file.write(_npy_header(shape, dtype))
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype).data)


def write_csr(path: str | Path, sparse: SparseWriter, *, overwrite: bool = False) -> None:
    """Write the pairs above a threshold as .npz, as ``scipy.sparse.load_npz`` reads it.

    Parameters
    ----------
    path : the file to make.
    sparse : what was kept, all rows of it.
    overwrite : whether an existing file may be replaced, default False.
    """
    ends = sparse.ends()
    pairs = (sparse.pairs,)
    with (
        Staging(path, overwrite=overwrite, suffix=WRITING) as staging,
        writing(staging.path),
        open(staging.partial, "wb") as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        _add(archive, "format", (), "S3", [np.array(b"csr")])
        _add(archive, "shape", (2,), "<i8", [np.array(sparse.shape)])
        _add(archive, "indptr", ends.shape, "<i8", [ends])
        columns: dict[str, tuple[str, Callable[[Any], np.ndarray]]] = {
            "indices": ("<i8", lambda record: record.indices),
            "data": ("<f4", lambda record: record.data),
        }
        for name, (dtype, of) in columns.items():
            _add(archive, name, pairs, dtype, map(of, sparse.records()))


def _add(
    archive: zipfile.ZipFile,
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    blocks: Iterable[np.ndarray],
) -> None:
    """Add an array to a .npz, block by block."""
    about = zipfile.ZipInfo(f"{name}.npy", EARLIEST)
    member: IO[bytes]
    with archive.open(about, "w", force_zip64=True) as member:
        member.write(_npy_header(shape, dtype))
        for block in blocks:
            member.write(np.ascontiguousarray(block, dtype).tobytes())
