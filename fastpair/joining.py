"""Part files brought together: one HDF5 file over them, by virtual data sets, or their blocks.

A virtual file names its parts relative to itself, in the folder beside it, and carries the
checksums of all their blocks: `fastpair info --verify` reads through it. It must be moved together
with its folder, which keeps its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np

from fastpair.blocks import Content, checksum_of
from fastpair.errors import FileError
from fastpair.hdf5 import Output, open_hdf5
from fastpair.parts import Part
from fastpair.staging import WRITING, writing


def write_virtual(
    path: Path,
    content: Content,
    identity: Mapping[str, str],
    parts: Sequence[Part],
    *,
    overwrite: bool = False,
) -> None:
    """Write an HDF5 file whose columns stand in part files.

    Parameters
    ----------
    path : the file to make, beside the folder of the parts.
    content : what it is.
    identity : what the run is made of.
    parts : of its rows, in order, each of whole blocks.
    overwrite : whether an existing file may be replaced, default False.
    """
    sums = np.concatenate([_checksums(part) for part in parts]) if parts else np.empty(0, "<u8")

    def make(file: h5py.File, name: str, shape: Sequence[int], dtype: str) -> None:
        if name == "block_checksum":
            file.create_dataset(name, data=sums)
            return
        layout = h5py.VirtualLayout(tuple(shape), dtype)
        for part in parts:
            source = f"{part.folder.name}/{part.path.name}".replace("%", "%%")  # HDF5 formats it
            rows = (part.last - part.first, *shape[1:])
            layout[part.first : part.last] = h5py.VirtualSource(source, name, rows, dtype)
        missing = np.nan if np.dtype(dtype).kind == "f" else -1
        file.create_virtual_dataset(name, layout, fillvalue=missing)

    def lay_out(file: h5py.File) -> None:
        content.lay_out(file, identity, make)

    told = {"parts": len(parts)}
    with (
        Output(
            path,
            content.kind,
            told,
            overwrite=overwrite,
            lay_out=lay_out,
            suffix=WRITING,
            newest="v110",
        ) as output,
        writing(output.path),
    ):
        output.file.flush()


def _checksums(part: Part) -> np.ndarray:
    part.await_sight()
    with open_hdf5(part.path) as file:
        return file["block_checksum"][:]


def part_blocks(part: Part, columns: Sequence[str]) -> Iterator[list[np.ndarray]]:
    """Blocks of a part, an array for each column, each compared with its checksum.

    Raises
    ------
    FileError
        The part is missing or damaged.
    """
    part.await_sight()
    with open_hdf5(part.path) as file:
        sums, size = file["block_checksum"][:], int(file.attrs["checksum_rows"])
        datasets = [file[name] for name in columns]
        for number, expected in enumerate(sums.tolist()):
            arrays = [dataset[number * size : (number + 1) * size] for dataset in datasets]
            if checksum_of(arrays) != expected:
                raise FileError(f"{part.path} is damaged: it does not agree with its checksums.")
            yield arrays
