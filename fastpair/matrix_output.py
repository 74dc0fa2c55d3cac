"""What becomes of all pairs: each form in the formats that suit it, resumable where it is long."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from fastpair.backend import read_ahead
from fastpair.blocks import BlockFile, as_text
from fastpair.compression import write_compressed
from fastpair.errors import ArgumentError
from fastpair.isolation import PairsWithoutIsolated
from fastpair.listing import TEXT_FORMATS, write_listing
from fastpair.remaining import RemainingPairs
from fastpair.results import DenseWriter, LookupWriter, SparseWriter, TopKWriter, write_histogram
from fastpair.scipy_files import write_csr, write_npy

Summary = dict[str, Any]
Walk = RemainingPairs | PairsWithoutIsolated
Remaining = Callable[[int], Any]
"""Gives a `Walk`, or what does as one does: all pairs from a left row on."""


class BestOfRows(Protocol):
    """What finds the best of each left row; more is not asked of it."""

    @property
    def about(self) -> dict[str, Any]:
        """How it was walked, see `fastpair.remaining.RemainingPairs`."""

    def top_k(self, k: int) -> Iterator[Any]:
        """Yield the k best of each left row, as `fastpair.matrix.AllPairs.top_k`."""


HDF5 = (".h5", ".hdf5")
SUFFIXES: dict[str, tuple[str, ...]] = {
    "top-k": (*HDF5, ".parquet", *TEXT_FORMATS),
    "threshold": (*HDF5, ".npz"),
    "dense": (*HDF5, ".npy"),
    "histogram": (*HDF5, *TEXT_FORMATS),
    "lookup": HDF5,
}
"""What each form can be written as."""

LISTED_AT_ONCE = 1 << 17
"""Pairs of a top-k matrix that are listed together, about."""


@dataclass(frozen=True)
class MatrixOutput:
    """Where results go, and what is told of them.

    Parameters
    ----------
    path : the file to make.
    form : "top-k", "threshold", "dense", "histogram" or "lookup".
    shape : (N, N'); of a lookup (N, d).
    ids, ids_right : text that names rows and columns, or None.
    distinct : whether columns are those of another table; else `ids` name them as well.
    identity : what the run is made of, by name.
    attributes : attributes of an HDF5 file.
    compression : name of a filter for HDF5, or None.
    overwrite, resume : as `fastpair.results.ScoreFile` has them.
    """

    path: Path
    form: str
    shape: tuple[int, int]
    ids: pa.Array | None
    ids_right: pa.Array | None
    distinct: bool
    identity: Mapping[str, str]
    attributes: Mapping[str, Any]
    compression: str | None = None
    overwrite: bool = False
    resume: bool = False

    @property
    def _names(self) -> Summary:
        return {"ids": self.ids, "ids_right": self.ids_right}

    def _told(self, **more: Any) -> Summary:
        return {"attributes": {**self.attributes, **more}, **self._names}

    @property
    def _options(self) -> Summary:
        return {"overwrite": self.overwrite, "resume": self.resume}

    def _is_hdf5(self) -> bool:
        return self.path.suffix.lower() in HDF5

    def _finish(self, staged: BlockFile) -> None:
        """Give a complete HDF5 file its name, compressed if that is wanted."""
        if self.compression is None:
            staged.finish()
        else:
            write_compressed(staged, self.compression, overwrite=self.overwrite)
            staged.discard()

    def top_k(self, remaining: Callable[[int], BestOfRows], k: int) -> Summary:
        """Write the k best of every row: HDF5, or a line for each of them."""
        identity = {**self.identity, "k": str(k)}
        with TopKWriter(
            self.path, (self.shape[0], k), identity, **self._told(), **self._options
        ) as file:
            start, pairs = file.next_row, None
            if start < self.shape[0]:
                pairs = remaining(start)
                for _, scores, indices in pairs.top_k(k):
                    file.append(indices, scores)
            if self._is_hdf5():
                self._finish(file)
            else:
                self._list(file)
                file.discard()
        return {"k": k, **_resumed(start, pairs)}

    def _list(self, file: TopKWriter) -> None:
        """Write the k best as lines of left, right, score and rank (from 1)."""
        right_ids = self.ids_right if self.distinct else self.ids

        def lines() -> Iterator[list[pa.Array]]:
            for number in range(file.blocks):
                begin = file.block(number).start
                indices, scores = file.read_block(number)
                step = max(1, LISTED_AT_ONCE // max(1, indices.shape[1]))
                for at in range(0, len(indices), step):
                    part = slice(at, at + step)
                    yield _lines(indices[part], scores[part], begin + at, self.ids, right_ids)

        nothing = np.empty((0, 1), np.int64), np.empty((0, 1), np.float32)
        empty = _lines(*nothing, 0, self.ids, right_ids)
        header = ["left", "right", "score", "rank"]
        write_listing(self.path, header, lines(), empty, overwrite=self.overwrite)

    def threshold(self, remaining: Remaining, threshold: float) -> Summary:
        """Write every pair from a threshold on as CSR: HDF5, or .npz for SciPy."""
        identity = {**self.identity, "threshold": repr(float(threshold))}
        with SparseWriter(self.path, self.shape, identity, **self._options) as file:
            start, pairs = file.next_row, None
            if start < self.shape[0]:
                pairs = remaining(start)
                for _, counts, indices, scores in pairs.above(threshold):
                    file.append(counts, indices, scores)
            kept = file.pairs
            if self._is_hdf5():
                told = self._told(threshold=threshold)
                file.finish(**told, compression=self.compression, overwrite=self.overwrite)
            else:
                write_csr(self.path, file, overwrite=self.overwrite)
                file.discard()
        return {"kept": kept, **_resumed(start, pairs)}

    def dense(self, remaining: Remaining) -> Summary:
        """Write all scores: HDF5, or .npy."""
        with DenseWriter(
            self.path, self.shape, self.identity, **self._told(), **self._options
        ) as file:
            start, pairs = file.next_row, None
            if start < self.shape[0]:
                pairs = remaining(start)
                for _, scores in read_ahead(pairs.dense(), depth=0):  # two groups are in memory
                    file.append(scores)
            if self._is_hdf5():
                self._finish(file)
            else:
                blocks = (arrays[0] for arrays in file.read_blocks())
                write_npy(self.path, self.shape, "<f4", blocks, overwrite=self.overwrite)
                file.discard()
        return _resumed(start, pairs)

    def lookup(self, averages: Callable[[int], Iterator[tuple[int, np.ndarray]]]) -> Summary:
        """Write what `averages` gives from a query on, see `fastpair.attention`: HDF5."""
        told: Summary = {"ids": self.ids, "attributes": self.attributes, **self._options}
        with LookupWriter(self.path, self.shape, self.identity, **told) as file:
            start = file.next_row
            finished = range(-(-start // file.content.block_rows))
            without = sum(_without_key(file.read_block(number)[0]) for number in finished)
            try:
                for _, found in averages(start) if start < self.shape[0] else ():
                    file.append(found)
                    without += _without_key(found)
            except BaseException:
                if not file.done.any():
                    file.discard()  # there is nothing yet to go on with
                raise
            self._finish(file)
        return {"resumed_from": start, "without_key": without}

    def histogram(self, remaining: Remaining, bins: int) -> Summary:
        """Write how scores are spread: HDF5, or a line for each bin; it is not resumed."""
        pairs = remaining(0)
        edges, counts = pairs.histogram(bins)
        if self._is_hdf5():
            told = {**self.attributes, "identity": as_text(self.identity)}
            write_histogram(self.path, edges, counts, attributes=told, overwrite=self.overwrite)
        else:
            columns = [pa.array(edges[:-1]), pa.array(edges[1:]), pa.array(counts)]
            empty = [column[:0] for column in columns]
            header = ["from", "to", "count"]
            write_listing(self.path, header, [columns], empty, overwrite=self.overwrite)
        found = {"edges": edges.tolist(), "counts": counts.tolist()}
        return {**found, **_resumed(0, pairs)}


def _without_key(output: np.ndarray) -> int:
    """How many queries have no key."""
    return int(np.isnan(output[:, 0]).sum())


def _resumed(start: int, pairs: BestOfRows | None) -> Summary:
    about = {"threads": 0, "scan": None, "triangle": False} if pairs is None else pairs.about
    return {"resumed_from": start, **about}


def _lines(
    indices: np.ndarray,
    scores: np.ndarray,
    first: int,
    ids: pa.Array | None,
    right_ids: pa.Array | None,
) -> list[pa.Array]:
    """Left, right, score and rank of what there is, row by row."""
    rows, places = np.nonzero(indices >= 0)
    left, right = pa.array(first + rows), pa.array(indices[rows, places])
    return [
        left if ids is None else ids.take(left),
        right if right_ids is None else right_ids.take(right),
        pa.array(scores[rows, places]),
        pa.array(places + 1),
    ]


def check_form(path: Path, form: str, compression: str | None) -> None:
    """Refuse a name or a filter that does not suit the form.

    Raises
    ------
    ArgumentError
        The form cannot be written so.
    """
    name = path.name.lower()
    if not name.endswith(SUFFIXES[form]):
        raise ArgumentError(
            f"the output {path} ends in {path.suffix!r}, but a {form} matrix is written as "
            f"{', '.join(SUFFIXES[form])}"
        )
    if compression is not None and (form == "histogram" or not name.endswith(HDF5)):
        raise ArgumentError(
            f"--compression {compression} is for HDF5 files of many numbers, and {path} is none"
        )
