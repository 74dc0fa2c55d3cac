"""HDF5 files of blocks that are written at once: plain, or in compressed chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from fastpair.blocks import BlockFile, Content, checksum_of
from fastpair.errors import ArgumentError
from fastpair.hdf5 import Output
from fastpair.staging import WRITING, writing

CHUNK_BYTES = 1 << 20
"""Bytes of a chunk, about, before it is compressed."""


def _plugin(make: Callable[[Any], Mapping[str, Any]]) -> Callable[[], dict[str, Any]]:
    def options() -> dict[str, Any]:
        import hdf5plugin

        return dict(make(hdf5plugin))

    return options


FILTERS: dict[str, Callable[[], dict[str, Any]]] = {
    "gzip": lambda: {"compression": "gzip", "compression_opts": 4, "shuffle": True},
    "lzf": lambda: {"compression": "lzf", "shuffle": True},
    "zstd": _plugin(lambda plugin: {**plugin.Zstd(clevel=3), "shuffle": True}),
    "lz4": _plugin(lambda plugin: {**plugin.LZ4(), "shuffle": True}),
    "blosc2": _plugin(lambda plugin: plugin.Blosc2(cname="zstd", clevel=5)),
    "bitshuffle": _plugin(lambda plugin: plugin.Bitshuffle(cname="lz4")),
}
"""What h5py is told for each filter; readers need nothing else for gzip, hdf5plugin for most."""


def check_filter(name: str) -> None:
    """Refuse a filter that is not known.

    Raises
    ------
    ArgumentError
        It is none of `FILTERS`.
    """
    if name not in FILTERS:
        raise ArgumentError(f"compression is {name!r}, expected one of {', '.join(FILTERS)}")


def write_rows(
    path: str | Path,
    content: Content,
    identity: Mapping[str, str],
    parts: Iterable[Sequence[np.ndarray]],
    *,
    compression: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a file of blocks at once; an exception leaves nothing behind.

    Parameters
    ----------
    path : the file to make.
    content : what it is.
    identity : what the run is made of, by name.
    parts : arrays of some rows, one for each column; all rows in order.
    compression : name of a filter, default none.
    overwrite : whether an existing file may be replaced, default False.
    """
    if compression is not None:
        _write_chunks(path, content, identity, parts, compression, overwrite)
        return
    with BlockFile(path, content, identity, overwrite=overwrite, suffix=WRITING) as file:
        try:
            for part in parts:
                file.append(*part)
            file.finish()
        except BaseException:
            file.discard()
            raise


def write_compressed(staged: BlockFile, compression: str, *, overwrite: bool = False) -> None:
    """Write a complete staged file as NAME, in compressed chunks; what is staged stays."""
    arguments = staged.path, staged.content, staged.identity, staged.read_blocks()
    write_rows(*arguments, compression=compression, overwrite=overwrite)


def _write_chunks(
    path: str | Path,
    content: Content,
    identity: Mapping[str, str],
    parts: Iterable[Sequence[np.ndarray]],
    compression: str,
    overwrite: bool,
) -> None:
    check_filter(compression)
    options = FILTERS[compression]()

    def make(file: h5py.File, name: str, shape: Sequence[int], dtype: str) -> None:
        row_bytes = np.dtype(dtype).itemsize * int(np.prod(shape[1:], dtype=np.int64))
        if not all(shape) or name == "block_checksum":
            file.create_dataset(name, shape, dtype)
            return
        chunks = (max(1, min(CHUNK_BYTES // row_bytes, shape[0])), *shape[1:])
        file.create_dataset(name, shape, dtype, chunks=chunks, **options)

    def lay_out(file: h5py.File) -> None:
        content.lay_out(file, identity, make)

    told = {"compression": compression}
    with Output(
        path, content.kind, told, overwrite=overwrite, lay_out=lay_out, suffix=WRITING
    ) as output:
        row = 0
        for number, arrays in enumerate(_in_blocks(parts, content.block_rows)):
            stop = row + len(arrays[0])
            with writing(output.path):
                for column, array in zip(content.columns, arrays, strict=True):
                    output.file[column.name][row:stop] = array
                output.file["block_checksum"][number] = checksum_of(arrays)
            row = stop


def _in_blocks(parts: Iterable[Sequence[np.ndarray]], size: int) -> Iterator[list[np.ndarray]]:
    """The same rows in parts of `size` rows; the last one may have fewer."""
    waiting: list[Sequence[np.ndarray]] = []
    count = 0
    for part in parts:
        while len(part[0]):
            taken = [array[: size - count] for array in part]
            part = [array[len(taken[0]) :] for array in part]
            waiting.append(taken)
            count += len(taken[0])
            if count == size:
                yield _joined(waiting)
                waiting, count = [], 0
    if waiting:
        yield _joined(waiting)


def _joined(parts: list[Sequence[np.ndarray]]) -> list[np.ndarray]:
    return [np.concatenate(column) for column in zip(*parts, strict=True)]
