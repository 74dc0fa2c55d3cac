"""Reads damaged files in a process of its own, because a library may crash at one.

A line of JSON comes in for each file: its path, and whether it holds embeddings or pairs. Two lines
go out: what fastpair made of it, and what the format's own library makes of it.
"""

import csv
import hashlib
import json
import resource
import sys
from pathlib import Path

import h5py
import hdf5plugin  # noqa: F401  the compressions that are tested
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

from fastpair.errors import FastpairError
from fastpair.ingest import open_embeddings
from fastpair.pairs import open_pairs

MOST_MEMORY = 6 << 30
"""Bytes of address space that a process gets; asking for more is a MemoryError."""


def digest(*arrays):
    whole = hashlib.sha256()
    for array in arrays:
        whole.update(repr(np.asarray(array, np.float64).tolist()).encode())
    return whole.hexdigest()


def ours(path, kind, ids):
    if kind == "embeddings":
        source = open_embeddings(path)
        return digest(source.read())
    table = None if ids is None else pa.array(ids, pa.string())
    source = open_pairs(path, ids=table, count=20, want_labels=False)
    blocks = list(source.blocks(7))
    left = [row for block in blocks for row in block.left]
    right = [row for block in blocks for row in block.right]
    return digest(left, right)


def theirs(path, kind, ids):
    """What another reader finds, None where there is none for the format."""
    suffix = "".join(path.suffixes)
    if kind == "pairs" and suffix == ".csv":
        with open(path, newline="", encoding="utf-8-sig") as file:
            _, *rows = [row for row in csv.reader(file, strict=True) if row]
        return digest([ids.index(row[0]) for row in rows], [ids.index(row[1]) for row in rows])
    if suffix == ".npy":
        array = np.load(path)
        return digest(array[:, 0], array[:, 1]) if kind == "pairs" else digest(array)
    if suffix == ".npz":
        names = ("left", "right") if kind == "pairs" else ("embeddings",)
        archive = np.load(path)
        return digest(*(archive[name] for name in names))
    if suffix == ".h5" and kind == "embeddings":
        with h5py.File(path) as file:
            return digest(file["embeddings"][:])
    if suffix in (".parquet", ".feather"):
        read = pq.read_table if suffix == ".parquet" else pyarrow.feather.read_table
        table = read(path)
        if kind == "embeddings":
            return digest(table["vector"].to_pylist())
        return digest(*([ids.index(key) for key in table[n].to_pylist()] for n in (0, 1)))
    return None


def answer(request):
    path, kind, ids = Path(request["path"]), request["kind"], request["ids"]
    try:
        yield {"found": ours(path, kind, ids)}
    except FastpairError as error:
        text = str(error)
        yield {"refused": text} if "\n" not in text and path.name in text else {"broken": text}
        return
    except BaseException as error:
        yield {"broken": f"{type(error).__name__}: {error}"}
        return
    try:
        yield {"found": theirs(path, kind, ids)}
    except Exception as error:
        yield {"refused": str(error)}


def main():
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    out = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for reply in answer(json.loads(line)):
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            print(json.dumps({**reply, "grown": grown}), file=out, flush=True)


if __name__ == "__main__":
    main()
