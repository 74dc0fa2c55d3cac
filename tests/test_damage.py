"""Damaged files of every format: what comes out is the right result or one sentence, nothing else.

`make fuzz` looks at many more of them. Files are read in another process, so that a crash or a
hang of a native library is a failure of one example and no more.
"""

import bz2
import gzip
import json
import queue
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

SECONDS = 10
"""That a file may take to be read or refused."""

MOST_GROWN = 1 << 20
"""KiB that a process may grow by at one small file."""

FEW = settings(
    max_examples=20 if settings.default.derandomize else settings.default.max_examples,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # to make a crash smaller takes minutes
    suppress_health_check=list(HealthCheck),
    deadline=None,
)

IDS = ["a", "b7", "naïve", "x,y", "007", "NA", 'q"', "long" * 9]
ROWS = [(0, 1), (2, 3), (4, 5), (6, 7), (7, 0), (1, 1)]
VECTORS = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
TABLE = {"left": [IDS[a] for a, _ in ROWS], "right": [IDS[b] for _, b in ROWS]}


def csv_pairs(separator=","):
    quoted = [[f'"{IDS[row]}"'.replace('q"', 'q""') for row in pair] for pair in ROWS]
    return "".join(separator.join(line) + "\n" for line in [["left", "right"], *quoted]).encode()


def hdf5(path, **options):
    import hdf5plugin

    with h5py.File(path, "w") as file:
        if options.get("compression") == "blosc2":
            options = hdf5plugin.Blosc2()
        elif options.get("compression") == "bitshuffle":
            options = hdf5plugin.Bitshuffle()
        chunks = (3, 2) if options else None
        file.create_dataset("embeddings", data=VECTORS, chunks=chunks, **options)
        file["ids"] = IDS


def hdf5_pairs(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("pairs", data=ROWS * 200, chunks=(500, 2), compression="gzip")
        file["label"] = [0, 1] * 600


def hdf5_texts(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("left", data=TABLE["left"], chunks=(4,), compression="gzip")
        file["right"] = np.array([text.encode() for text in TABLE["right"]])


def hdf5_by_id(path):
    with h5py.File(path, "w") as file:
        for text, row in zip(IDS, VECTORS, strict=True):
            file[f"group/{text}"] = row[None]


def annotated(path):
    with h5py.File(path, "w") as file:
        file.attrs["encoding-type"] = "anndata"
        file["X"] = VECTORS
        file["obs/names"] = IDS
        file["obs"].attrs["_index"] = "names"


def lists():
    vectors = pa.FixedSizeListArray.from_arrays(VECTORS.ravel(), 3)
    return pa.table({"id": IDS, "vector": vectors})


def safetensors(path):
    about = {"dtype": "F32", "shape": [8, 3], "data_offsets": [0, 96]}
    header = json.dumps({"__metadata__": {"a": "b"}, "e": about}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + VECTORS.tobytes())


def arrow_stream(path):
    table = pa.table(TABLE)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)


def words(form):
    texts = [text.replace(",", " ") for text in IDS]
    rows = list(zip(texts, VECTORS, strict=True))
    if form == "binary":
        return b"8 3\n" + b"".join(text.encode() + b" " + row.tobytes() for text, row in rows)
    lines = "".join(f"{text} {' '.join(map(str, row.tolist()))}\n" for text, row in rows)
    return (lines if form == "glove" else "8 3\n" + lines).encode()


def embeddings_csv():
    lines = [f'"{i}",{",".join(map(str, row))}' for i, row in zip("abcdefgh", VECTORS, strict=True)]
    return "\n".join(["id,x,y,z", *lines]).encode()


FILES = {
    "embeddings e.npy": lambda path: np.save(path, VECTORS),
    "embeddings f.npy": lambda path: np.save(path, np.asfortranarray(VECTORS.astype(">f8"))),
    "embeddings e.npz": lambda path: np.savez(path, embeddings=VECTORS, ids=np.array(IDS)),
    "embeddings c.npz": lambda path: np.savez_compressed(path, embeddings=VECTORS),
    "embeddings e.h5": hdf5,
    "embeddings gzip.h5": lambda path: hdf5(path, compression="gzip", shuffle=True),
    "embeddings lzf.h5": lambda path: hdf5(path, compression="lzf", fletcher32=True),
    "embeddings blosc2.h5": lambda path: hdf5(path, compression="blosc2"),
    "embeddings bitshuffle.h5": lambda path: hdf5(path, compression="bitshuffle"),
    "embeddings by_id.hdf5": hdf5_by_id,
    "embeddings a.h5ad": annotated,
    "embeddings e.parquet": lambda path: pq.write_table(lists(), path),
    "embeddings e.feather": lambda path: pa.feather.write_feather(lists(), path),
    "embeddings l.feather": lambda path: pa.feather.write_feather(
        lists(), path, compression="uncompressed"
    ),
    "embeddings e.safetensors": safetensors,
    "embeddings e.fvecs": lambda path: path.write_bytes(
        b"".join(np.int32(3).tobytes() + row.tobytes() for row in VECTORS)
    ),
    "embeddings e.fbin": lambda path: path.write_bytes(
        np.array([8, 3], "<u4").tobytes() + VECTORS.tobytes()
    ),
    "embeddings w.txt": lambda path: path.write_bytes(words("text")),
    "embeddings w.bin": lambda path: path.write_bytes(words("binary")),
    "embeddings glove.txt": lambda path: path.write_bytes(words("glove")),
    "embeddings e.csv": lambda path: path.write_bytes(embeddings_csv()),
    "embeddings e.csv.gz": lambda path: path.write_bytes(gzip.compress(embeddings_csv())),
    "pairs p.csv": lambda path: path.write_bytes(csv_pairs()),
    "pairs p.tsv": lambda path: path.write_bytes(csv_pairs("\t")),
    "pairs p.csv.gz": lambda path: path.write_bytes(gzip.compress(csv_pairs())),
    "pairs p.csv.bz2": lambda path: path.write_bytes(bz2.compress(csv_pairs())),
    "pairs p.csv.zst": lambda path: path.write_bytes(
        pytest.importorskip("zstandard").compress(csv_pairs())
    ),
    "pairs p.parquet": lambda path: pq.write_table(pa.table(TABLE), path),
    "pairs plain.parquet": lambda path: pq.write_table(
        pa.table(TABLE), path, use_dictionary=False, compression="zstd", write_page_checksum=False
    ),
    "pairs p.feather": lambda path: pa.feather.write_feather(pa.table(TABLE), path),
    "pairs p.arrows": arrow_stream,
    "pairs p.npy": lambda path: np.save(path, np.array(ROWS)),
    "pairs p.npz": lambda path: np.savez_compressed(
        path, left=[a for a, _ in ROWS], right=[b for _, b in ROWS]
    ),
    "pairs p.h5": hdf5_pairs,
    "pairs t.h5": hdf5_texts,
}
"""What a file holds and its name -> how it is made."""


# --- damage -------------------------------------------------------------------------------------

PLACE = st.floats(0, 1, exclude_max=True)
DAMAGE = st.one_of(
    st.tuples(st.just("flip"), PLACE, st.integers(0, 7)),
    st.tuples(st.just("write"), PLACE, st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("write"), PLACE, st.sampled_from([b"\xff" * 4, b"\xff" * 8, b"\0" * 4])),
    st.tuples(st.just("write"), PLACE, st.sampled_from([b"\x7f", b"\n", b'"', b" ", b"9", b"-"])),
    st.tuples(st.just("cut"), PLACE, st.just(0)),
    st.tuples(st.just("swap"), PLACE, PLACE),
    st.tuples(st.just("repeat"), PLACE, st.integers(1, 64)),
    st.tuples(st.just("drop"), PLACE, st.integers(1, 64)),
    st.tuples(st.just("head"), st.just(0.0), st.binary(min_size=1, max_size=64)),
)


def damaged(content, steps):
    content = bytearray(content)
    for what, place, more in steps:
        at = int(place * len(content))
        if what == "flip" and content:
            content[at] ^= 1 << more
        elif what == "write":
            content[at : at + len(more)] = more
        elif what == "cut":
            del content[at:]
        elif what == "swap" and content:
            other = int(more * len(content))
            size = min(16, len(content) - max(at, other))
            one, two = bytes(content[at : at + size]), bytes(content[other : other + size])
            content[at : at + size], content[other : other + size] = two, one
        elif what == "repeat":
            content[at:at] = content[at : at + more]
        elif what == "drop":
            del content[at : at + more]
        elif what == "head":
            content[: len(more)] = more
    return bytes(content)


class Reader:
    """Another process that reads files, started anew when one has brought it down."""

    def __init__(self):
        self.process = None

    def ask(self, path, kind):
        if self.process is None:
            command = [sys.executable, "-X", "faulthandler"]
            command += [str(Path(__file__).with_name("damage_worker.py"))]
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            self.lines = queue.Queue()
            collecting = (self.lines, self.process.stdout)
            threading.Thread(target=self._collect, args=collecting, daemon=True).start()
        ids = IDS if path.name not in ("p.npy", "p.npz", "p.h5") else None
        request = {"path": str(path), "kind": kind, "ids": ids}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        found = self._line()
        assert "grown" in found, f"{path.name}: {found}"
        assert found["grown"] < MOST_GROWN, f"{path.name} took {found['grown']} KiB"
        assert "broken" not in found, f"{path.name}: {found['broken']}"
        return found, (self._line() if "found" in found else None)

    def _collect(self, lines, stream):
        for line in stream:
            lines.put(line)
        lines.put("")

    def _line(self):
        try:
            line = self.lines.get(timeout=SECONDS)
        except queue.Empty:
            line = None
        if line:
            return json.loads(line)
        self.process.kill()
        self.process.wait()
        said = self.process.stderr.read()
        self.process.stderr.close()
        code, self.process = self.process.returncode, None
        what = "it hung" if line is None else f"it crashed, {code}"
        return {"lost": what, "said": said[-2000:]}

    def close(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
            self.process.stderr.close()


@pytest.fixture(scope="module")
def reader():
    one = Reader()
    yield one
    one.close()


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_read_right_or_refused(tmp_path_factory, reader, name):
    kind, _, called = name.partition(" ")
    path = tmp_path_factory.mktemp("damage") / called
    FILES[name](path)
    whole = path.read_bytes()
    found, expected = reader.ask(path, kind)
    assert "found" in found, found
    assert expected["found"] in (None, found["found"])

    @FEW
    @given(st.lists(DAMAGE, min_size=1, max_size=4))
    def read(steps):
        path.write_bytes(damaged(whole, steps))
        found, expected = reader.ask(path, kind)
        if expected is not None and expected.get("found") is not None:
            assert found["found"] == expected["found"], "another result than that of its library"

    read()
