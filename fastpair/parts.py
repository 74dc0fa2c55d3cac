"""Part files: what the workers of a cluster write, each a range of one output.

A run has a folder, OUTPUT.parts, with a file that says what the run is made of. A part is called by
its range and a digest of that, so that parts of another run are never taken for its own. A worker
writes a part under a name that nobody else uses and renames it; beside it stands a note with its
checksum and what else is told of it. Who makes a part a second time, after a loss or beside a slow
worker, replaces it by the same bytes. A part that agrees with its note is never made again, in this
run or a later one; one that does not is damaged, and is. So nobody waits for the disk: what is lost
with a machine that goes down is made again. Only parts that an output will stand on are brought to
the disk before it gets its name: by the workers, or by who has them made on the same machine.

An output over parts may be replaced by a run whose parts have the same names. Those stay until the
new one is complete.

All that is kept between runs lies in the folder, which every worker must see under the same path.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fastpair.errors import FileError
from fastpair.hdf5 import parts_of
from fastpair.journal import refuse_another, refuse_unfinished
from fastpair.staging import check_output, flush_folder, unflushed, writing

PARTS = ".parts"
"""What is appended to the name of an output for the folder of its parts."""

RUN = "_run.json"
"""The file that says what the run of a folder is made of. Readers of Parquet folders skip it."""

SEEN_WITHIN = 30.0
"""Seconds within which a shared file system shows everybody what one of them wrote."""

CHECKED_AT_ONCE = 1 << 22
"""Bytes that are read together to be checked."""

_OURS = re.compile(r"(_|_attempt-[0-9a-f]{32}-_?)?part-\d{15}-\d{15}-[0-9a-f]{16}\.[a-z0-9.]+")

Told = dict[str, Any]
"""What is told of a part, as JSON holds it."""


@dataclass(frozen=True)
class Part:
    """A range of an output and the file that holds it.

    Parameters
    ----------
    folder : where the parts of the run are.
    run : digest of what the run is made of.
    first, last : the range; what it counts is known to who cuts the output.
    suffix : of the file.
    flushed : whether who makes it brings it to the disk, default False.
    """

    folder: Path
    run: str
    first: int
    last: int
    suffix: str = ".h5"
    flushed: bool = False

    @property
    def path(self) -> Path:
        """The file; names sort as the ranges do."""
        return self.folder / f"part-{self.first:015d}-{self.last:015d}-{self.run}{self.suffix}"

    @property
    def note(self) -> Path:
        """The file that says whether the part is whole."""
        return self.path.with_name(f"_{self.path.name}.json")

    @contextmanager
    def attempt(self) -> Iterator[Path]:
        """Give a name to write under that nobody else uses; what is left there is removed.

        Nothing that is staged within is brought to the disk: see `Part.flush`.
        """
        place = self.path.with_name(f"_attempt-{uuid.uuid4().hex}-{self.path.name}")
        try:
            with unflushed():
                yield place
        finally:
            for left in place.parent.glob(place.name + "*"):
                left.unlink(missing_ok=True)

    def keep(self, attempt: Path, told: Mapping[str, Any]) -> Told:
        """Give what was written under `attempt` its name, with a note of it; return the note.

        Where another attempt came first, its part and note stay and are returned.
        """
        with writing(self.path):
            if (first := self.find()) is not None:
                return first
            with open(attempt, "rb") as file:
                size, checksum = _checksum(file.fileno())
                if self.flushed or self.path.exists():  # an output may stand on that already
                    os.fsync(file.fileno())
            note = {**told, "run": self.run, "size": size, "crc32": checksum}
            beside = attempt.with_name(attempt.name + ".json")
            with open(beside, "w", encoding="utf-8") as file:
                json.dump(note, file)
            os.replace(attempt, self.path)
            os.replace(beside, self.note)
        return note

    def flush(self) -> None:
        """See that the part is on the disk, for an output that stands on it."""
        self.await_sight()
        if self.flushed:
            return
        with writing(self.path), open(self.path, "rb") as file:
            os.fsync(file.fileno())

    def find(self) -> Told | None:
        """The note of the part; None where there is none that is whole and of this run.

        One that was made for a run that did not need it on the disk is brought there where this
        one does.
        """
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
            with open(self.path, "rb") as file:
                if note["run"] != self.run or os.fstat(file.fileno()).st_size != note["size"]:
                    return None
                whole = _checksum(file.fileno()) == (note["size"], note["crc32"])
                if whole and self.flushed:
                    os.fsync(file.fileno())
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return note if whole else None

    def await_sight(self) -> None:
        """Wait until what a worker wrote is seen here, on file systems that take their time."""
        end = time.monotonic() + SEEN_WITHIN
        while not self.path.exists() and time.monotonic() < end:
            time.sleep(0.1)
            with suppress(OSError):
                os.listdir(self.folder)  # asks the server anew

    def remove(self) -> None:
        """Remove the part and its note."""
        self.note.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def _checksum(descriptor: int) -> tuple[int, int]:
    """Bytes of a file, and their crc32."""
    size = checksum = 0
    while block := os.pread(descriptor, CHECKED_AT_ONCE, size):
        checksum = zlib.crc32(block, checksum)
        size += len(block)
    return size, checksum


def digest_of(facts: Mapping[str, str]) -> str:
    """What stands for a run in the names of its parts."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()[:16]


class PartsFolder:
    """OUTPUT.parts, locked by the one process that has its parts made.

    Parameters
    ----------
    output : the output that the parts are of.
    facts : what the run is made of, by name.
    overwrite : whether unfinished work may be forgotten, default False.
    resume : whether to go on with it, default False.
    flushed : whether who makes a part brings it to the disk, default False.

    Attributes
    ----------
    run : digest of the facts, for the names of parts.
    standing : names of the parts that the present output stands on.

    Raises
    ------
    FileError
        The folder cannot be made, another process uses it, or unfinished work is there and neither
        `resume` nor `overwrite` was said.
    MismatchError
        The unfinished work belongs to another run.
    """

    def __init__(
        self,
        output: Path,
        facts: Mapping[str, str],
        *,
        overwrite: bool = False,
        resume: bool = False,
        flushed: bool = False,
    ) -> None:
        self.output, self.flushed = output, flushed
        self.standing = parts_of(output)
        self.path = output.absolute().with_name(output.name + PARTS)
        self.facts = {name: str(value) for name, value in sorted(facts.items())}
        self.run = digest_of(self.facts)
        if self.path.exists() and not self.path.is_dir():
            raise FileError(f"{self.path} is no folder, but parts are staged there; move it away.")
        with writing(output):
            self.path.mkdir(exist_ok=True)
            self._descriptor = self._lock()
        try:
            then = self._stored_facts()
            unfinished = then is not None and any(self._notes())
            if then is not None and unfinished and resume:
                refuse_another(self.path, then, self.facts)
            elif unfinished and not overwrite:
                refuse_unfinished(self.path, output)
            with writing(output):
                self._begin(then, resume)
        except BaseException:
            self.close()
            raise

    def _lock(self) -> int:
        while True:
            place = self.path / RUN
            descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ours, there = os.fstat(descriptor), os.stat(place)
                if (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino):
                    return descriptor
            except BlockingIOError as error:
                os.close(descriptor)
                raise FileError(
                    f"{self.output} is being written by another process, which holds {self.path}; "
                    "wait until it ends or choose another name."
                ) from error
            except FileNotFoundError:
                self.path.mkdir(exist_ok=True)
            os.close(descriptor)

    def _stored_facts(self) -> dict[str, str] | None:
        size = os.fstat(self._descriptor).st_size
        try:
            found = json.loads(os.pread(self._descriptor, size, 0))
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def _begin(self, then: dict[str, str] | None, resume: bool) -> None:
        for note in [] if resume else list(self._notes()):
            note.unlink()  # the parts may be those of an output that is still in use
        if then != self.facts:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(self.facts, indent=1).encode(), 0)
            os.fsync(self._descriptor)
        for left in self.path.glob("_attempt-*"):
            if _OURS.match(left.name):
                left.unlink(missing_ok=True)

    def _part_files(self) -> Iterator[Path]:
        return (path for path in self.path.iterdir() if _OURS.fullmatch(path.name))

    def _notes(self) -> Iterator[Path]:
        return (path for path in self._part_files() if path.name.startswith("_part-"))

    def part(self, first: int, last: int, suffix: str = ".h5") -> Part:
        """The part of a range."""
        return Part(self.path, self.run, first, last, suffix, self.flushed)

    def drop(self, part: Part) -> None:
        """Remove a part that is not needed any more, unless the present output stands on it."""
        if part.path.name not in self.standing:
            part.remove()

    def flush(self) -> None:
        """Bring the names of parts to the disk; what is in them `Part.flush` does."""
        with writing(self.output):
            flush_folder(self.path)

    def keep_only(self, parts: list[Part]) -> None:
        """The output is complete and stands on these parts: remove everything else of ours."""
        self._keep({part.path.name for part in parts})

    def give_up(self) -> None:
        """No resume can go on with this run: remove what the present output does not stand on."""
        self._keep(self.standing)
        with suppress(OSError):
            self.path.rmdir()

    def become(self, output: Path, parts: list[Part], *, overwrite: bool) -> None:
        """Give the folder, in which the parts are complete, the name of the output."""
        self.flush()
        check_output(output, overwrite=overwrite)
        with writing(output):
            output.unlink(missing_ok=True)  # a file, which may be replaced
            os.rename(self.path, output)
            flush_folder(output.absolute().parent)
        self.path = output
        self.keep_only(parts)

    def _keep(self, kept: set[str]) -> None:
        for path in list(self._part_files()):
            if path.name not in kept:
                path.unlink(missing_ok=True)
        (self.path / RUN).unlink(missing_ok=True)
        self.close()

    def remove(self) -> None:
        """Remove all parts, and the folder if nothing else is in it."""
        self.keep_only([])
        with suppress(OSError):
            self.path.rmdir()

    def close(self) -> None:
        """Lift the lock; the parts stay for a later resume. An empty folder goes."""
        if self._descriptor < 0:
            return
        with suppress(OSError):
            if not any(self._part_files()):
                (self.path / RUN).unlink(missing_ok=True)
                self.path.rmdir()
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
