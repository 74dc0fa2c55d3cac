"""Word vectors: the text and the binary form of word2vec, and GloVe's text, perhaps compressed.

A line of text is a word and its numbers between spaces; a first line `rows columns` is word2vec's,
GloVe has none. Words may hold spaces: the last columns of a line are the numbers. The binary form
has the same first line, then a word, a space and little-endian float32 for each row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from fastpair.arrays import RowsInOrder
from fastpair.errors import DataError, FastpairError, FileError
from fastpair.hdf5_arrays import ReadRows
from fastpair.text import compression_of

SAMPLE_BYTES = 1 << 20
"""Bytes that are looked at to see whether a file holds word vectors."""

SAMPLE_LINES = 50
"""Lines that are looked at for it."""

BLOCK_BYTES = 1 << 22
"""Bytes that are parsed together."""

LONGEST_WORD = 1 << 16
"""Bytes of a word, at most."""

MOST_COLUMNS = 1 << 20
"""Numbers of a vector, at most."""

_FIRST_LINE = re.compile(rb"[ \t]*([0-9]{1,12})[ \t]([0-9]{1,9})[ \t]*\r?")
_NUMBER = re.compile(rb"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(nan|inf)", re.I)
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f]")


@dataclass(frozen=True)
class Layout:
    """How a file of word vectors is made.

    Parameters
    ----------
    binary : whether numbers are binary.
    rows : as the first line says, None if there is no such line.
    columns : numbers of each vector.
    """

    binary: bool
    rows: int | None
    columns: int


def find_layout(path: Path) -> Layout | None:
    """How the word vectors in a file are stored, None if there are none."""
    try:
        with pa.input_stream(str(path), compression=compression_of(path)) as stream:
            sample = stream.read(SAMPLE_BYTES)
    except (pa.ArrowException, OSError):
        return None  # who opens it as text says what is wrong
    whole = len(sample) < SAMPLE_BYTES
    first, _, rest = sample.partition(b"\n")
    stated = _FIRST_LINE.fullmatch(first[:64])
    if stated is None:
        return None if _CONTROL.search(sample) else _layout_of_lines(sample, whole)
    rows, columns = int(stated[1]), int(stated[2])
    second = rest.partition(b"\n")[0]
    if not rows or not 0 < columns <= MOST_COLUMNS or not rest:
        return None
    if _CONTROL.search(second) or not _is_utf8(second):
        return Layout(True, rows, columns)
    fields = second.split()
    long_enough = len(fields) > columns and (columns > 1 or not _NUMBER.fullmatch(fields[0]))
    if long_enough and all(map(_NUMBER.fullmatch, fields[-columns:])):
        return Layout(False, rows, columns)
    return None


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _layout_of_lines(sample: bytes, whole: bool) -> Layout | None:
    """GloVe's layout, if all first lines are a word and at least two numbers between spaces."""
    lines = sample.split(b"\n", SAMPLE_LINES)
    lines = lines[: None if whole and len(lines) <= SAMPLE_LINES else -1]
    rows = [line.split(b" ") for line in map(bytes.strip, lines) if line]
    runs = [_numbers_at_end(row) for row in rows]
    columns = min(runs, default=0)
    if columns < 2 or any(len(row) <= columns for row in rows):
        return None
    if all(_NUMBER.fullmatch(row[0]) for row in rows):
        return None  # numbers alone: columns of a table
    return Layout(False, None, columns)


def _numbers_at_end(fields: list[bytes]) -> int:
    count = 0
    while count < len(fields) and _NUMBER.fullmatch(fields[-1 - count]):
        count += 1
    return count


class WordVectors:
    """The words and the vectors of a file, as arrays `ids` and `embeddings`.

    Parameters
    ----------
    path : the file.
    layout : what `find_layout` found.
    """

    format_name = "word vectors (word2vec, GloVe)"
    in_threads = False

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path, self.layout = path, layout
        blocks = [words for words, _ in self._blocks(numbers=False)]
        self._words = pa.concat_arrays(blocks) if blocks else pa.array([], pa.string())
        rows, columns = len(self._words), layout.columns
        if layout.rows not in (None, rows):
            raise FileError(
                f"{path} holds {rows} words, but its first line says {layout.rows}: it is cut "
                "short or damaged; make or fetch it again."
            )
        self.entries: dict[str, tuple[tuple[int, ...], np.dtype | str]] = {
            "embeddings": ((rows, columns), np.dtype(np.float32)),
            "ids": ((rows,), "text"),
        }
        self._vectors = RowsInOrder(
            lambda: (vectors for _, vectors in self._blocks()), np.dtype(np.float32), (columns,)
        )

    def read(self, name: str, start: int, stop: int) -> np.ndarray | pa.Array:
        """Rows `start` to `stop` of the words or of the vectors."""
        if name == "ids":
            return self._words.slice(start, stop - start)
        with self._errors():
            return self._vectors.read(start, stop)

    def opened(self) -> AbstractContextManager[ReadRows]:
        """What reads as `read` does."""
        return nullcontext(self.read)

    def rows_together(self, name: str, least: int) -> int:
        """Rows that are read together: `least`."""
        return least

    def _blocks(self, numbers: bool = True) -> Iterator[tuple[pa.Array, np.ndarray]]:
        """Words and, if asked for, vectors, block by block."""
        parts = self._binary_blocks() if self.layout.binary else self._text_blocks()
        start = 0
        with self._errors():
            for block, cuts in parts:
                words = self._text(block, cuts[:, 0], cuts[:, 1], start)
                vectors = np.empty((0, self.layout.columns), np.float32)
                if numbers:
                    vectors = self._numbers(block, cuts, start)
                yield words, vectors
                start += len(words)

    def _text(self, block: np.ndarray, starts: np.ndarray, ends: np.ndarray, row: int) -> pa.Array:
        words = _cut(block, starts, ends)
        try:
            words.validate(full=True)
        except pa.ArrowInvalid as error:
            raise DataError(
                f"{self.path} has a word that is no text in UTF-8 in one of the rows {row} to "
                f"{row + len(words) - 1} (counted from 0); write it as UTF-8."
            ) from error
        return words

    def _numbers(self, block: np.ndarray, cuts: np.ndarray, row: int) -> np.ndarray:
        columns = self.layout.columns
        if self.layout.binary:
            places = cuts[:, 2, None] + np.arange(4 * columns)
            return block[places].view("<f4").astype(np.float32, copy=False)
        starts, ends = cuts[:, 2 : 2 + columns], cuts[:, 2 + columns :]
        texts = _cut(block, starts.reshape(-1), ends.reshape(-1))
        try:
            return texts.cast(pa.float32()).to_numpy(zero_copy_only=False).reshape(-1, columns)
        except pa.ArrowInvalid as error:
            at = _first_wrong(texts)
            raise DataError(
                f"{self.path} has {_shown(texts, at)} where a number should be, in row "
                f"{row + at // columns} (counted from 0), column {at % columns}."
            ) from error

    # --- text ---

    def _text_blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Bytes of whole lines, and for each line where its word and its numbers begin and end."""
        row, rest, skip = 0, b"", self.layout.rows is not None
        for block in self._bytes():
            block = rest + block
            if skip:
                head, newline, block = block.partition(b"\n")
                skip, block = not newline, block if newline else head
                if skip:
                    rest = block
                    continue
            at = block.rfind(b"\n") + 1
            block, rest = block[:at], block[at:]
            if len(rest) > LONGEST_WORD + 64 * self.layout.columns:
                raise FileError(f"{self.path} has a line without an end in row {row}; mend it.")
            if block:
                cut = self._lines(np.frombuffer(block, np.uint8), row)
                row += len(cut[1])
                yield cut
        if rest.strip() and not skip:
            yield self._lines(np.frombuffer(rest + b"\n", np.uint8), row)

    def _lines(self, block: np.ndarray, row: int) -> tuple[np.ndarray, np.ndarray]:
        columns = self.layout.columns
        ends = np.flatnonzero(block == ord("\n"))
        starts = np.concatenate([[0], ends[:-1] + 1])
        blank = (block == ord(" ")) | (block == ord("\t"))
        while (trimmed := (ends > starts) & (blank | (block == ord("\r")))[ends - 1]).any():
            ends = ends - trimmed
        starts, ends = starts[ends > starts], ends[ends > starts]
        spaces = np.flatnonzero(blank)
        last = np.searchsorted(spaces, ends)
        if len(starts) and (short := last - np.searchsorted(spaces, starts) < columns).any():
            at = int(np.flatnonzero(short)[0])
            raise DataError(
                f"{self.path} has fewer than {columns} numbers in row {row + at} (counted from 0), "
                "the header aside; all rows need the same."
            )
        before = spaces[last[:, None] - np.arange(columns, 0, -1)] if len(starts) else spaces[:0]
        before = before.reshape(-1, columns)
        after = np.column_stack([before[:, 1:], ends])
        return block, np.column_stack([starts, before[:, 0], before + 1, after])

    # --- binary ---

    def _binary_blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Bytes of whole rows, and for each row where its word and its numbers are."""
        rows, width = self.layout.rows or 0, 4 * self.layout.columns
        done, rest, skip = 0, b"", True
        for block in self._bytes():
            rest += block
            if skip:
                head, newline, rest = rest.partition(b"\n")
                skip = not newline
                if skip:
                    rest = head
                    continue
            cuts: list[tuple[int, int, int]] = []
            at = 0
            while done + len(cuts) < rows:
                begin = at
                while rest[begin : begin + 1] == b"\n":
                    begin += 1
                space = rest.find(b" ", begin, begin + LONGEST_WORD)
                if space < 0 and len(rest) - begin >= LONGEST_WORD:
                    raise FileError(f"{self.path} has no word in row {done + len(cuts)}; mend it.")
                if space < 0 or len(rest) < space + 1 + width:
                    break
                at = space + 1 + width
                cuts.append((begin, space, space + 1))
            if cuts:
                yield np.frombuffer(rest, np.uint8), np.array(cuts, np.int64)
                done, rest = done + len(cuts), rest[at:]
        if done == rows and rest.strip(b"\n"):
            raise FileError(f"{self.path} goes on after the {rows} rows that its first line says.")

    def _bytes(self) -> Iterator[bytes]:
        with pa.input_stream(str(self.path), compression=compression_of(self.path)) as stream:
            while block := stream.read(max(BLOCK_BYTES, 8 * self.layout.columns)):
                yield block

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except FastpairError:
            raise
        except (pa.ArrowException, OSError, EOFError) as error:
            raise FileError(
                f"{self.path} is damaged or cut short ({error}); make or fetch it again."
            ) from error


def _cut(block: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> pa.Array:
    """The bytes from each start to each end, which do not overlap and ascend, as text."""
    steps = np.zeros(len(block) + 1, np.int8)
    np.add.at(steps, starts, 1)
    np.add.at(steps, ends, -1)
    kept = np.cumsum(steps[:-1], dtype=np.int8).astype(bool)
    offsets = np.concatenate([[0], np.cumsum(ends - starts)]).astype(np.int32)
    return pa.StringArray.from_buffers(
        len(starts), pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(block[kept]))
    )


def _first_wrong(texts: pa.Array) -> int:
    """Which of some texts is the first that is no number."""
    low, high = 0, len(texts)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            texts.slice(low, middle - low).cast(pa.float32())
            low = middle
        except pa.ArrowInvalid:
            high = middle
    return low


def _shown(texts: pa.Array, at: int) -> str:
    return repr(texts.slice(at, 1).cast(pa.binary())[0].as_py()[:40].decode(errors="replace"))
