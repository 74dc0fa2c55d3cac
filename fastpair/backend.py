"""Threads and memory: how many, how much, and the pool that runs serial kernels side by side."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from fastpair.errors import ArgumentError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
LEAST_MEMORY = 64 * 2**20
"""Bytes: below this, not even one block of pairs fits."""


def thread_count(threads: int | None = None) -> int:
    """Return the number of threads to use: the given one, or one for each usable processor."""
    if threads is None:
        return (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
    if threads < 1:
        raise ArgumentError(f"threads is {threads}, expected at least 1")
    return threads


_blas_lock = Lock()
_blas_users: list[Any] = []


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let each matrix product run in the thread that asks for it, until the last user is done.

    The limit belongs to the process: lifted by the first of several Python threads that end, it
    would be gone for the others, and their sums would change with the number of threads.
    """
    from threadpoolctl import threadpool_limits

    with _blas_lock:
        limits = _blas_users[0] if _blas_users else threadpool_limits(1, "blas")
        _blas_users.append(limits)
    try:
        yield
    finally:
        with _blas_lock:
            _blas_users.pop()
            if not _blas_users:
                limits.restore_original_limits()


def parse_size(text: str) -> int:
    """Return the bytes that a text such as ``512MiB``, ``2GB`` or ``1000000`` names."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    if match is None:
        raise ArgumentError(f"memory is {text!r}, expected a size such as 512MiB or 2GB")
    number, unit = float(match[1]), match[2] or ""
    return int(number * (_BINARY_UNITS.get(unit) or _UNITS[unit]))


def memory_budget(memory: int | str | None = None) -> int:
    """Return the bytes that a run may allocate: the given size, or 80 % of what is free."""
    if memory is None:
        return int(0.8 * _free_memory())
    size = parse_size(memory) if isinstance(memory, str) else int(memory)
    if size < LEAST_MEMORY:
        raise ArgumentError(f"memory is {size} bytes, expected at least {LEAST_MEMORY} (64MiB)")
    return size


def _free_memory() -> int:
    free = [_meminfo_available(), *_cgroup_free()]
    return min(size for size in free if size is not None) if any(free) else 2 * 2**30


def _meminfo_available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def _cgroup_free() -> Iterator[int]:
    """Yield what a control group leaves, where one sets a limit."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            yield max(int(limit) - used, 0)
    except (OSError, ValueError):
        return


def run_ordered(
    function: Callable[[_Item], _Result], items: Iterable[_Item], threads: int, ahead: int = 2
) -> Generator[_Result, None, None]:
    """Yield ``function(item)`` in the order of `items`, computed in a pool of threads.

    At most ``threads * ahead`` results wait, so memory stays bounded however many items come.
    When the consumer stops or an item fails, what has not begun is dropped.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="fastpair")
    waiting: deque[Future[_Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= threads * ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def in_order(
    function: Callable[[_Item], _Result], items: Iterable[_Item], threads: int
) -> Iterator[_Result]:
    """Yield ``function(item)`` as `run_ordered` does; with one thread, in the caller's own."""
    return map(function, items) if threads == 1 else run_ordered(function, items, threads)


def read_ahead(items: Iterable[_Item], depth: int = 1) -> Generator[_Item, None, None]:
    """Yield `items`, taken from their source by another thread, `depth` of them ahead of use."""
    source = iter(items)
    done = object()
    with ThreadPoolExecutor(1, thread_name_prefix="fastpair-read") as reader:
        waiting = deque(reader.submit(next, source, done) for _ in range(depth + 1))
        while True:
            item = waiting.popleft().result()
            if item is done:
                return
            waiting.append(reader.submit(next, source, done))
            yield item  # type: ignore[misc]
