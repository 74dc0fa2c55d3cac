"""How every output comes to be: staged as a locked NAME.partial, called NAME when it is complete.

No other file format than bytes is known here. One process at a time may write an output: it holds
an exclusive lock on NAME.partial, which the operating system lifts when the process ends, however
it ends. What stands under NAME is always whole.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType

import numpy as np

from fastpair.errors import FastpairError, FileError

PARTIAL = ".partial"
"""What is appended to the name of an output while it is being made."""

FLUSHED_TOGETHER = 1 << 26
"""Bytes that are written before a flush of them begins."""

WRITING = ".writing"
"""The same for an export of scores: NAME.partial holds the scores themselves."""


def reason(error: BaseException) -> str:
    """What the operating system said, in few words, also when HDF5 or Arrow wrapped it."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    wrapped = re.search(r"error message = '([^']*)'", str(error))
    return wrapped.group(1) if wrapped else " ".join(str(error).split()).rstrip(".")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong while `path` is written into one `FileError`."""
    try:
        yield
    except FastpairError:
        raise
    except (OSError, RuntimeError) as error:
        raise FileError(
            f"{path} could not be written ({reason(error)}); "
            "see that the folder can be written to and that the disk has room."
        ) from error


def check_output(path: Path, *, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse an output that cannot be made, before any work is done for it.

    Parameters
    ----------
    path : where the output shall stand.
    overwrite : whether a file that stands there already may be replaced.
    inputs : files that are read for the output, which it may never replace; default none.

    Raises
    ------
    FileError
        The folder is missing, the path is a folder or a link to nothing, or the file exists and
        may not be replaced.
    """
    if path.is_dir():
        raise FileError(f"{path} is a folder, not a file; give the name of an output file.")
    if not path.parent.is_dir():
        raise FileError(f"{path} cannot be written: the folder {path.parent} does not exist.")
    if path.is_symlink() and not path.exists():
        raise FileError(f"{path} is a link to nothing; remove it or choose another name.")
    # What is staged for the output would replace an input just as well.
    for place in (path, path.with_name(path.name + PARTIAL)):
        for source in inputs:
            if place.exists() and Path(source).exists() and place.samefile(source):
                raise FileError(
                    f"{path} cannot be the output, because {source} is read for it; "
                    "choose another name."
                )
    if path.exists() and not overwrite:
        raise FileError(f"{path} exists already; choose another name or say --overwrite.")


_flushes: ContextVar[bool] = ContextVar("flushes", default=True)


@contextmanager
def unflushed() -> Iterator[None]:
    """Do not wait for the disk where what is staged within this block is flushed or finished.

    For files that somebody else brings to the disk, or can make again when a machine goes down.
    """
    token = _flushes.set(False)
    try:
        yield
    finally:
        _flushes.reset(token)


_exports: set[Path] = set()
"""Staged files of this process that are of no use to a resume."""


def remove_exports() -> None:
    """Remove what an interruption left before its `with` block was entered."""
    while _exports:
        _exports.pop().unlink(missing_ok=True)


class Staging:
    """NAME.partial under an exclusive lock, until it becomes NAME or is given up.

    Parameters
    ----------
    path : where the finished output shall stand.
    overwrite : whether a file that stands there already may be replaced, default False.
    suffix : what is appended to the name meanwhile, default `PARTIAL`.

    Raises
    ------
    FileError
        The output cannot be made there, or another process is making it.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False, suffix: str = PARTIAL) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + suffix)
        check_output(self.path, overwrite=overwrite)
        if self.partial.is_dir():
            raise FileError(f"{self.partial} is a folder where the output is staged; move it away.")
        self.durable = _flushes.get()
        with writing(self.path):
            self.descriptor = self._lock()
        self.flushing = Flushing(self.descriptor if self.durable else None)

    def _lock(self) -> int:
        export = self.partial.name.endswith(WRITING)
        if export and not self.partial.exists():
            _exports.add(self.partial)  # before it is made: a signal may come right behind
        while True:
            descriptor = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Between open and lock the file may have been renamed or removed by its owner.
                ours, there = os.fstat(descriptor), os.stat(self.partial)
                if (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino):
                    if export:
                        _exports.add(self.partial)
                    return descriptor
            except BlockingIOError as error:
                _exports.discard(self.partial)  # it is another's
                os.close(descriptor)
                raise FileError(
                    f"{self.path} is being written by another process, which holds {self.partial}; "
                    "wait until it ends or choose another name."
                ) from error
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    @property
    def open(self) -> bool:
        """Whether the lock is still held."""
        return self.descriptor >= 0

    def empty(self) -> None:
        """Forget what is staged, so that no crash can bring it back."""
        if os.fstat(self.descriptor).st_size:
            os.ftruncate(self.descriptor, 0)
            self.flush()

    def flush(self) -> None:
        """Bring everything that was written so far to the disk."""
        if self.durable:
            os.fsync(self.descriptor)

    def finish(self, size: int | None = None) -> None:
        """Bring everything to the disk, give the file its name and lift the lock.

        Parameters
        ----------
        size : bytes that belong to the file; what stands behind them is cut off. Default: all.
        """
        try:
            with writing(self.path):
                self.flushing.finish()
                self.flush()
                if size is not None:
                    os.ftruncate(self.descriptor, size)  # only now: a crash must not lose the note
                    self.flush()
                os.replace(self.partial, self.path)
                if self.durable:
                    flush_folder(self.path.parent)
        except BaseException:
            if self.partial in _exports:
                self.partial.unlink(missing_ok=True)
            raise
        finally:
            self.release()

    def abandon(self) -> None:
        """Remove what was staged and lift the lock."""
        if self.open:
            self.partial.unlink(missing_ok=True)
            self.release()

    def release(self) -> None:
        """Lift the lock and leave what was staged where it is."""
        if self.open:
            self.flushing.stop()
            _exports.discard(self.partial)
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None and self.open:
            self.finish()
        self.abandon()


def flush_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Flushing:
    """Brings what is written to the disk meanwhile, on another thread: little is left at the end.

    Parameters
    ----------
    descriptor : of the open file; None: nothing is flushed.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor, self._written = descriptor, 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fastpair-flush")
        self._under_way: Future[None] | None = None

    def wrote(self, count: int) -> None:
        """Take notice of so many bytes; begin to flush where enough have come together.

        Raises
        ------
        OSError
            What was flushed before did not reach the disk.
        """
        self._written += count
        if self._descriptor is None:
            return
        if self._written < FLUSHED_TOGETHER or (self._under_way and not self._under_way.done()):
            return
        if self._under_way:
            self._under_way.result()
        self._written = 0
        self._under_way = self._pool.submit(os.fsync, self._descriptor)

    def finish(self) -> None:
        """Wait for what is under way; an OSError if it did not reach the disk."""
        self.stop()
        if self._under_way:
            self._under_way.result()

    def stop(self) -> None:
        """Wait for what is under way, however it ends."""
        self._pool.shutdown(wait=True)


def reserve(descriptor: int, size: int) -> None:
    """Take the room for `size` bytes now, so that a full disk is noticed before any work."""
    if not size or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise  # elsewhere: a file system that cannot reserve; writing will tell


def write_at(descriptor: int, data: np.ndarray, offset: int) -> None:
    """Write all bytes of a C-contiguous array at `offset`."""
    view = data.reshape(-1).view(np.uint8).data
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def read_at(descriptor: int, data: np.ndarray, offset: int) -> None:
    """Fill a C-contiguous array from `offset`.

    Raises
    ------
    EOFError
        The file ends before the array is full.
    """
    view = data.reshape(-1).view(np.uint8).data
    while view:
        got = os.preadv(descriptor, [view], offset)
        if not got:
            raise EOFError("the file ends too early")
        view, offset = view[got:], offset + got
