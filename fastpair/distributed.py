"""Dask: the workers of a cluster, what they are given to do, and what becomes of their failures.

A run on a cluster is cut into ranges. Every range is a task that reads the inputs itself and leaves
a part file (`fastpair.parts`), so that nothing but a few words goes through Dask, and a task may be
run twice, or again by another worker, or by a later run. Some tasks for each thread of the cluster
are handed out at a time. What is wrong with an input is told by the first task that meets it and is
not tried again; a task whose worker is lost goes to another one, as often as Dask allows
(``distributed.scheduler.allowed-failures``), and so does one that fails in another way, twice.

Dask moves functions and results between processes by pickle: whoever reaches a scheduler can run
anything on its workers. A scheduler is trusted, as the machine is; a local cluster listens on the
loopback address alone.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any

from fastpair import errors
from fastpair.backend import LEAST_MEMORY, memory_budget, thread_count
from fastpair.errors import ArgumentError, ClusterError, FastpairError

INSTALL = "pip install 'fastpair[cluster]'"
"""What installs Dask."""

CONNECTED_WITHIN = 10.0
"""Seconds within which a scheduler must answer."""

WORKERS_WITHIN = 60.0
"""Seconds for which a run waits for a worker where there is none."""

LOOKED_EVERY = 1.0
"""Seconds between two looks at whether there are workers at all."""

RETRIES = 2
"""How often a task is tried again that failed in a way that is no FastpairError."""

TASKS_A_THREAD = 2
"""Tasks that are handed out for each thread of the cluster: one runs, one waits."""

SHARE_OF_LIMIT = 0.6
"""Of the memory that Dask allows a worker, what fastpair allocates; from 0.8 on Dask pauses it."""

SILENT = 60
"""A level of logging that nothing has."""

Task = Callable[..., dict[str, Any]]
"""What a worker runs: a function of a module, with arguments that can be sent."""


@dataclass(frozen=True)
class Cluster:
    """Workers that a run may use.

    Parameters
    ----------
    client : a ``distributed.Client`` that waits for results (not an asynchronous one).
    threads : kernel threads of a task; None: as `--threads`, or one for each thread of Dask.
    memory : bytes that a task may allocate; None: as `--memory`, or a share of what Dask allows.
    local : whether the workers were started for this run, on this machine.
    """

    client: Any
    threads: int | None = None
    memory: int | None = None
    local: bool = False

    @property
    def workers(self) -> int:
        """How many there are; 0 if the scheduler is gone."""
        with suppress(OSError, RuntimeError, TimeoutError):
            return len(self.client.nthreads())
        return 0

    def results(
        self, task: Task, calls: Sequence[tuple[Any, ...]], told: Callable[[int], str]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Run ``task(*call)`` for all calls; yield the number of each and its result, as they end.

        Parameters
        ----------
        task : what workers run.
        calls : its arguments.
        told : says what a call was about, for messages.

        Raises
        ------
        FastpairError : of a task, with what it was about; or the cluster failed.
        """
        ended: SimpleQueue[Any] = SimpleQueue()
        waiting = deque(range(len(calls)))
        under_way: dict[str, tuple[int, Any]] = {}
        watch = _Watch(self.client)
        check_workers(self.client)
        try:
            while waiting or under_way:
                while waiting and len(under_way) < watch.room:
                    number = waiting.popleft()
                    future = self.client.submit(
                        run_task,
                        task,
                        calls[number],
                        key=f"fastpair-{uuid.uuid4().hex}",
                        pure=False,
                        retries=RETRIES,
                    )
                    under_way[future.key] = number, future
                    future.add_done_callback(ended.put)
                try:
                    done = ended.get(timeout=LOOKED_EVERY)
                except Empty:
                    watch.look()
                    continue
                number, future = under_way.pop(done.key)
                result = _result(future, told(number))
                future.release()
                watch.room_for(bool(waiting))
                yield number, result
        finally:
            with suppress(Exception):  # the scheduler may be gone
                if under_way:
                    self.client.cancel([future for _, future in under_way.values()], force=True)


class _Watch:
    """Looks whether a cluster has workers, and how many threads."""

    def __init__(self, client: Any) -> None:
        self._client, self._alone_since = client, monotonic()
        self._looked, self.room = 0.0, 1
        self.look()

    def room_for(self, more: bool) -> None:
        """Look again from time to time, as workers come and go."""
        if more and monotonic() - self._looked > LOOKED_EVERY:
            self.look()

    def look(self) -> None:
        """Count threads; refuse a cluster that is gone, or that has had no worker for long."""
        self._looked = monotonic()
        if self._client.status != "running":
            raise ClusterError(lost(self._client))
        try:
            threads = sum(self._client.nthreads().values())
        except (OSError, RuntimeError, TimeoutError) as error:
            raise ClusterError(lost(self._client)) from error
        if threads:
            self._alone_since = monotonic()
        elif monotonic() - self._alone_since > WORKERS_WITHIN:
            raise ClusterError(
                f"the scheduler {address(self._client)} has had no workers for {WORKERS_WITHIN:.0f}"
                " seconds: start some with `dask worker`, then say --resume"
            )
        self.room = max(1, TASKS_A_THREAD * threads + 1)


def check_workers(client: Any) -> None:
    """Refuse workers without this release: they could not even read what they are sent, and end."""
    try:
        # a function of the standard library: every worker has it
        found = client.run(version, "fastpair", on_error="return")
    except (OSError, RuntimeError, TimeoutError) as error:
        raise ClusterError(lost(client)) from error
    for worker, release in found.items():
        without = isinstance(release, PackageNotFoundError)
        if not (without or isinstance(release, str)):
            continue  # it has just been lost: others do its work, or the run tells that none does
        if release != version("fastpair"):
            has = "no fastpair" if without else f"fastpair {release}"
            raise ClusterError(
                f"the worker {worker} has {has}, this process fastpair {version('fastpair')}: "
                "install one release everywhere"
            )


def address(client: Any) -> str:
    """Where the scheduler of a client is."""
    return str(getattr(client.scheduler, "address", "") or "of the cluster")


def lost(client: Any) -> str:
    """A sentence on a scheduler that does not answer any more."""
    return (
        f"the scheduler {address(client)} is gone: start it and its workers again and say --resume,"
        " which keeps what was done"
    )


def run_task(task: Task, call: tuple[Any, ...]) -> dict[str, Any]:
    """Run a task in a worker; what fastpair refuses is a result, so that nobody tries it again."""
    try:
        return task(*call)
    except FastpairError as error:
        return {"refused": type(error).__name__, "sentence": str(error), "worker": worker_name()}
    except MemoryError:
        sentence = "the worker's machine has no memory left: give a smaller --memory"
        return {"refused": "MemoryBudgetError", "sentence": sentence, "worker": worker_name()}


def worker_name() -> str:
    """The address of the worker that this runs in; empty outside of one."""
    with suppress(ImportError, ValueError):
        from distributed import get_worker

        return str(get_worker().address)
    return ""


def _result(future: Any, told: str) -> dict[str, Any]:
    """Return what a task gave, or raise what it met, in one sentence with what it was about."""
    status, lost_on_its_way = future.status, None
    if status == "finished":
        try:
            result = dict(future.result())
        except Exception as error:
            status, lost_on_its_way = "error", error
        else:
            if "refused" not in result:
                return result
            kind = getattr(errors, result["refused"], FastpairError)
            raise kind(f"{result['sentence'].rstrip('.')} ({told}, worker {result['worker']})")
    if status != "error":
        raise ClusterError(lost(future.client))
    problem: Any = lost_on_its_way or future.exception()
    if type(problem).__name__ == "KilledWorker":
        raise ClusterError(
            f"every worker that took {told} died, {problem.allowed_failures + 1} of them: see "
            "whether they had enough memory (--memory), then say --resume"
        ) from problem
    words = " ".join(f"{type(problem).__name__}: {problem}".split())[:300]
    if isinstance(problem, (ImportError, AttributeError)):
        words += f"; see that every worker has fastpair {version('fastpair')}"
    raise ClusterError(f"{told} failed on the cluster ({words})") from problem


# --- what runs in a worker ------------------------------------------------------------------------


def own_share(memory: str | int | None) -> int:
    """Bytes that a task may allocate in this worker: what was said, or of what Dask allows."""
    from distributed import get_worker

    worker = get_worker()
    if memory is not None:
        return memory_budget(memory)
    limit = getattr(worker.memory_manager, "memory_limit", None)
    free = memory_budget()
    within = free if not limit else min(free, int(SHARE_OF_LIMIT * limit))
    return within // max(1, worker.state.nthreads)


def own_device(device: str) -> str:
    """The device of this worker: workers take one GPU each.

    A worker of dask-cuda sees its own GPU first. One that fastpair started has a number; it takes
    the GPU of that number.
    """
    if device in ("auto", "cpu"):
        return "cpu"
    if device != "gpu":
        raise ArgumentError(
            f"device is {device!r}, but on a cluster it is cpu or gpu: each worker takes one GPU"
        )
    from distributed import get_worker

    name = get_worker().name
    return f"gpu:{name}" if isinstance(name, int) and not find_spec("dask_cuda") else "gpu:0"


# --- connecting -----------------------------------------------------------------------------------


def as_cluster(given: Any) -> Cluster:
    """Return the workers that a caller gave: a `Cluster`, or a ``distributed.Client``.

    Raises
    ------
    ArgumentError : it is neither, or a client that does not wait.
    """
    if isinstance(given, Cluster):
        return given
    if not hasattr(given, "submit") or not hasattr(given, "nthreads"):
        raise ArgumentError(f"cluster is {given!r}, expected a distributed.Client")
    if getattr(given, "asynchronous", False):
        raise ArgumentError(
            "cluster is an asynchronous distributed.Client, expected one that waits"
        )
    return Cluster(given)


@contextmanager
def connected(
    scheduler: str | None = None,
    workers: int | None = None,
    *,
    threads: int | None = None,
    memory: str | int | None = None,
    device: str = "auto",
) -> Iterator[Cluster | None]:
    """Connect to a scheduler, or start workers on this machine until the ``with`` block ends.

    Parameters
    ----------
    scheduler : address, such as "tcp://host:8786".
    workers : how many processes to start; exclusive with `scheduler`. Neither: no cluster, None.
    threads : of all local workers together; default one for each processor.
    memory : of all local workers together; default 80 % of what is free.
    device : "gpu" starts workers that have one GPU each.

    Raises
    ------
    ArgumentError : both or more workers than GPUs are asked for.
    ClusterError : Dask is not installed, or the scheduler does not answer.
    """
    if scheduler is None and workers is None:
        yield None
        return
    if scheduler is not None and workers is not None:
        raise ArgumentError("choose one of --scheduler and --workers")
    if find_spec("distributed") is None:
        raise ClusterError(f"Dask is not installed: {INSTALL}")
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        if scheduler is not None:
            yield Cluster(stack.enter_context(_client(scheduler)))
            return
        assert workers is not None
        if workers < 1:
            raise ArgumentError(f"workers is {workers}, expected at least 1")
        budget = memory_budget(memory)
        if budget // workers < LEAST_MEMORY:
            raise ArgumentError(
                f"memory is {budget} bytes for {workers} workers together, expected at least "
                f"{LEAST_MEMORY} (64MiB) for each: allow more or start fewer"
            )
        local = stack.enter_context(_local_cluster(workers, device))
        yield Cluster(
            stack.enter_context(_client(local)),
            threads=max(1, thread_count(threads) // workers),
            memory=budget // workers,
            local=True,
        )


@contextmanager
def _client(cluster: Any) -> Iterator[Any]:
    from distributed import Client

    try:
        if isinstance(cluster, str):
            _check_address(cluster)
        client = Client(cluster, set_as_default=False, timeout=CONNECTED_WITHIN)
    except (OSError, TimeoutError, ValueError, ImportError, RuntimeError) as error:
        words = " ".join(str(error).split())[:200]
        raise ClusterError(f"no scheduler answers at {cluster} ({words})") from error
    try:
        yield client
    finally:
        with suppress(Exception):  # the scheduler may be gone
            client.close(timeout=2)


def _check_address(scheduler: str) -> None:
    """Raise a ValueError for what Dask's client does not even try, and hangs at its end for."""
    from distributed.comm.addressing import get_address_host_port, parse_address
    from distributed.security import Security

    get_address_host_port(scheduler)
    context = Security().get_connection_args("client").get("ssl_context")
    if parse_address(scheduler)[0] == "tls" and context is None:
        raise ValueError("no certificates are set in Dask's distributed.comm.tls")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep from the terminal what Dask logs while workers end and schedulers go: it is told here.

    A local cluster does so too, but not until it has ended.
    """
    import distributed  # noqa: F401 - makes its handlers

    handlers = logging.getLogger("distributed").handlers
    levels = [(h, h.level) for h in handlers if isinstance(h, logging.StreamHandler)]
    for handler, _ in levels:
        handler.setLevel(SILENT)
    try:
        yield
    finally:
        for handler, level in levels:
            handler.setLevel(level)


@contextmanager
def _local_cluster(workers: int, device: str) -> Iterator[Any]:
    """Start workers that end with the ``with`` block, at once if it ends by an exception."""
    with tempfile.TemporaryDirectory(prefix="fastpair-workers-", ignore_cleanup_errors=True) as at:
        options: dict[str, Any] = {
            "n_workers": workers,
            "threads_per_worker": 1,
            "host": "127.0.0.1",
            "dashboard_address": "127.0.0.1:0",
            "scheduler_kwargs": {"dashboard": False},
            "local_directory": at,
            "silence_logs": SILENT,
            "memory_limit": None,  # tasks keep within --memory themselves
        }
        with _quick_workers():
            cluster = _start(options, workers, device)
        try:
            yield cluster
        except BaseException:
            _end_workers(cluster)
            raise
        finally:
            with suppress(Exception):
                cluster.close(timeout=5)


@contextmanager
def _quick_workers() -> Iterator[None]:
    """Start workers without what costs a tenth of their time each, and which nobody asks them for.

    Dask has the allocator of workers give back what is freed at once, so that each block is zeroed
    by the kernel anew, and it looks a hundred times a second at what they are doing.
    """
    import dask
    import distributed  # noqa: F401 - brings its settings

    environment = dict(dask.config.get("distributed.nanny.pre-spawn-environ"))
    environment.pop("MALLOC_TRIM_THRESHOLD_", None)
    settings = {
        "distributed.nanny.pre-spawn-environ": environment,
        "distributed.worker.profile.enabled": False,
    }
    with dask.config.set(settings):
        yield


def _start(options: dict[str, Any], workers: int, device: str) -> Any:
    if device != "gpu":
        from distributed import LocalCluster

        return LocalCluster(processes=True, **options)
    from fastpair.device import Missing, find_gpus

    count = find_gpus()
    if isinstance(count, Missing):
        raise ClusterError(f"device is {device!r} but {count}, or use the device cpu")
    if workers > count:
        raise ArgumentError(f"--workers is {workers}, but {count} GPUs are there, one a worker")
    if find_spec("dask_cuda") is None:
        from distributed import LocalCluster

        return LocalCluster(processes=True, **options)
    from dask_cuda import LocalCUDACluster

    return LocalCUDACluster(**options)


def _end_workers(cluster: Any) -> None:
    """End the processes of a local cluster now: whatever they do can be done again."""
    for worker in list(getattr(cluster, "workers", {}).values()):
        worker.auto_restart = False
        pid = getattr(worker, "pid", None)
        if pid:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
