"""What score, matrix and project share on a cluster: the job that workers get, and its parts.

The data's way: the process that was asked opens the inputs without the rows of tables, cuts the
output into ranges that depend on the job alone (not on the cluster, so that a resume may use
another one), and has a part made of each. A worker opens the same inputs once a process, sees that
it finds the same, and makes parts with the code of a run without a cluster. Parts are brought
together as they come, in order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from threading import Lock, Thread
from typing import Any, TypeVar

import numpy as np

from fastpair.buckets import discard_buckets
from fastpair.distributed import Cluster, own_device, own_share
from fastpair.errors import ArgumentError, FileError, MismatchError
from fastpair.jobs.inputs import Count, Summary, digest_of_kernels
from fastpair.joining import part_blocks
from fastpair.parts import Part, PartsFolder, Told
from fastpair.spooling import is_stream
from fastpair.staging import PARTIAL

_Run = TypeVar("_Run")

MADE_AGAIN = 2
"""How often a part is made again that is damaged when it is read."""


MOST_PARTS = 400
"""Parts of an output over parts at most: HDF5 holds all of them open, and systems let a process
open 1024 files unless they are told otherwise."""

TOLD_WITHIN = 5.0
"""Seconds that workers are given to hear that a run has ended."""


@dataclass(frozen=True)
class Job:
    """What a worker is told of a run.

    Parameters
    ----------
    asked : the options that say what the run is.
    identity : what a worker must find it made of.
    software : what made it; a worker must have the same.
    run : digest of the run, as in the names of its parts.
    threads, memory : of a task; None: as the worker has them.
    device, device_memory : "cpu" or "gpu", and bytes of a GPU.
    more : what else tasks of this kind need.
    """

    asked: Summary
    identity: Mapping[str, str]
    software: str
    run: str
    threads: int | None
    memory: int | str | None
    device: str
    device_memory: str | int | None
    more: Summary

    @property
    def key(self) -> str:
        """What stands for everything that a worker keeps open for the job."""
        limits = (self.threads, self.memory, self.device, self.device_memory)
        return f"{self.run} {limits}"

    @property
    def budget(self) -> int:
        """Bytes that a task may allocate in this worker."""
        return own_share(self.memory)

    @property
    def own_device(self) -> str:
        """The device of this worker."""
        return own_device(self.device)

    @property
    def own_threads(self) -> int:
        """Kernel threads of a task."""
        return self.threads or 1

    def check(self, found: Mapping[str, str]) -> None:
        """Refuse inputs that are not what the run was begun with."""
        for name, value in self.identity.items():
            if found.get(name) != value:
                raise MismatchError(
                    f"the worker's {name} is {found.get(name)!r}, that of the run {value!r}: every "
                    "worker must see the same files under the same paths"
                )


Work = Callable[[Job, Part], Told]
"""Makes a part in a worker, if it is not there; returns its note."""


def job_for(cluster: Cluster, asked: Summary, identity: Mapping[str, str], **given: Any) -> Job:
    """Return a job; `given` holds `run`, `threads`, `memory`, `device`, `device_memory`, `more`.

    Raises
    ------
    ArgumentError : `threads` or `memory` is given, but workers were started with their own.
    """
    for name in ("threads", "memory"):
        own = getattr(cluster, name)
        if own is not None and given[name] is not None:
            raise ArgumentError(
                f"{name} is {given[name]!r}, but the workers were started with {own} for each: "
                f"give {name} where they are started"
            )
        given[name] = given[name] if own is None else own
    return Job(asked, dict(identity), software(), **given)


def software() -> str:
    """What makes parts: the release of fastpair and its kernels."""
    return f"fastpair {version('fastpair')}, kernels {digest_of_kernels()}"


def matrix_products() -> str:
    """Which library multiplies matrices, and for which processor: results differ in last bits."""
    from threadpoolctl import threadpool_info

    found = [one for one in threadpool_info() if one["user_api"] == "blas"]
    own = [one for one in found if "numpy" in one["filepath"]] or found
    names = {f"{one['internal_api']} for {one.get('architecture', 'any')}" for one in own}
    return ", ".join(sorted(names))


def check_matrix_products(expected: str) -> None:
    """Refuse a worker whose matrix products may differ from those of the other processes."""
    found = matrix_products()
    if found != expected:
        processor = expected.rpartition(" ")[2]
        raise MismatchError(
            f"the worker multiplies matrices with {found}, the run with {expected}, which round "
            f"differently: start workers with OPENBLAS_CORETYPE={processor} in their environment"
        )


def kind_of_device(device: str, device_memory: str | int | None) -> str:
    """Either "cpu" or "gpu", as `fastpair.distributed.own_device` chooses."""
    if device_memory is not None and device != "gpu":
        raise ArgumentError(
            f"--device-memory is {device_memory}, which goes with --device gpu here"
        )
    if device not in ("auto", "cpu", "gpu"):
        raise ArgumentError(
            f"device is {device!r}, but on a cluster it is cpu or gpu: each worker takes one GPU"
        )
    return "gpu" if device == "gpu" else "cpu"


def shared_paths(asked: Summary, *names: str) -> Summary:
    """Options whose paths are found from everywhere; refuse what workers cannot open."""
    paths: Summary = {}
    for name in names:
        if asked[name] is None:
            continue
        if is_stream(Path(asked[name])):
            raise ArgumentError(
                f"workers of a cluster cannot read {asked[name]}: give a file that all of them see"
            )
        paths[name] = Path(os.path.abspath(asked[name]))
    return {**asked, **paths}


def refuse_partial(output: Path, overwrite: bool) -> None:
    """Refuse to forget what a run that makes one file left unfinished."""
    partial = output.with_name(output.name + PARTIAL)
    if partial.exists() and partial.stat().st_size and not overwrite:
        raise FileError(
            f"{partial} holds unfinished work for {output}; say --resume with --consolidate to go "
            "on with it or --overwrite to begin again."
        )


def forget_unfinished(output: Path) -> None:
    """Remove what other runs left unfinished of an output that is complete now."""
    output.with_name(output.name + PARTIAL).unlink(missing_ok=True)
    discard_buckets(output)


def cut(folder: PartsFolder, count: int, step: int, suffix: str = ".h5") -> list[Part]:
    """The parts of `count` rows or pairs, `step` each."""
    starts = range(0, count, step)
    return [folder.part(start, min(start + step, count), suffix) for start in starts]


class Making:
    """Has parts made by a cluster, and counts.

    Parameters
    ----------
    cluster : who makes them.
    job : what of.
    work : what a worker does.
    unit : what ranges count, for messages, such as "pairs".
    progress : called with the size of each part that is there.
    size : what of a part counts as progress; default its range.

    Attributes
    ----------
    notes : of all parts that are there.
    """

    def __init__(
        self,
        cluster: Cluster,
        job: Job,
        work: Work,
        unit: str,
        progress: Count,
        size: Callable[[Part], int] = lambda part: part.last - part.first,
    ) -> None:
        self.cluster, self.job, self.work, self.unit = cluster, job, work, unit
        self.progress, self.size = progress, size
        self.notes: list[Told] = []

    def told(self, part: Part) -> str:
        """What a part is of, for messages."""
        return f"{self.unit} {part.first} to {part.last - 1}"

    def results(self, parts: Sequence[Part]) -> Iterator[tuple[int, Told]]:
        """Have parts made; yield the number of each, and its note, as they come."""
        calls = [(self.job, part) for part in parts]
        found = self.cluster.results(self.work, calls, lambda number: self.told(parts[number]))
        for number, note in found:
            self.progress(self.size(parts[number]))
            self.notes.append(note)
            yield number, note

    def all(self, parts: Sequence[Part], folder: PartsFolder) -> None:
        """Have all parts made, and bring them to the disk: an output shall stand on them."""
        for number, _ in self.results(parts):
            parts[number].flush()
        folder.flush()

    def in_order(self, parts: Sequence[Part]) -> Iterator[Part]:
        """Have parts made; yield them in order, each as soon as those before it are there."""
        ready: set[int] = set()
        following = 0
        for number, _ in self.results(parts):
            ready.add(number)
            while following in ready:
                yield parts[following]
                following += 1

    def blocks(self, part: Part, columns: Sequence[str]) -> Iterator[list[np.ndarray]]:
        """The blocks of a part that was made; one that turns out damaged is made again."""
        done = 0
        for left in reversed(range(MADE_AGAIN + 1)):
            try:
                for number, arrays in enumerate(part_blocks(part, columns)):
                    if number == done:
                        yield arrays
                        done += 1
                return
            except FileError:
                if not left:
                    raise
                part.remove()
                for _ in self.cluster.results(
                    self.work, [(self.job, part)], lambda _: self.told(part)
                ):
                    pass

    def found(self) -> int:
        """How many of the parts were there already."""
        return sum(bool(note.get("found")) for note in self.notes)

    def total(self, name: str) -> int:
        """The sum of what notes tell."""
        return sum(int(note.get(name, 0)) for note in self.notes)

    def forget(self) -> None:
        """Let workers that go on living give the run's memory back; it is not waited for long."""
        if self.cluster.local:
            return

        def tell() -> None:
            with suppress(Exception):  # they may be gone
                self.cluster.client.run(forget, self.job.key, on_error="ignore")

        telling = Thread(target=tell, name="fastpair-forget", daemon=True)
        telling.start()
        telling.join(TOLD_WITHIN)


class GoingOn:
    """Reads ranges of a file that has to be read from its beginning: on from where it was left.

    Parameters
    ----------
    blocks : gives blocks of one size from a row on, which cannot be entered but by reading.
    size : rows of a block.
    """

    def __init__(self, blocks: Callable[[int], Iterator[Any]], size: int) -> None:
        self._blocks, self._size = blocks, size
        self._lock = Lock()
        self._left: tuple[int, Iterator[Any]] | None = None

    def read(self, first: int, last: int) -> Iterator[Any]:
        """The blocks of a range, which begins where a block begins, and not one more."""
        with self._lock:
            left, self._left = self._left, None
        at, blocks = left or (first + 1, iter(()))
        if at > first:
            at, blocks = first, self._blocks(first)
        for _ in islice(blocks, (first - at) // self._size):
            pass
        yield from islice(blocks, -(-(last - first) // self._size))
        with self._lock:
            self._left = last, blocks


# --- what runs in a worker ------------------------------------------------------------------------

_opened: dict[str, Any] = {}
_opening = Lock()


def opened_once(job: Job, make: Callable[[Job], _Run]) -> _Run:
    """Return what a process has opened for a job; what it had for another one goes.

    Raises
    ------
    MismatchError : this worker has another release of fastpair.
    """
    with _opening:
        if job.key not in _opened:
            _opened.clear()
            if software() != job.software:
                raise MismatchError(
                    f"the worker has {software()}, the run {job.software}: install one release "
                    "everywhere"
                )
            _opened[job.key] = make(job)
        return _opened[job.key]


def forget(key: str) -> None:
    """Give back what this process has opened for a job."""
    _opened.pop(key, None)


def found_or_made(part: Part, make: Callable[[Path], Told]) -> Told:
    """Return the note of a part: of one that is there and whole, or of one made now.

    Parameters
    ----------
    part : the part.
    make : writes it under a name of its own and returns what is told of it.
    """
    note = part.find()
    if note is not None:
        return {**note, "found": True}
    with part.attempt() as attempt:
        return part.keep(attempt, make(attempt))
