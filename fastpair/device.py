"""Which device works: the CPU, or GPUs that have shown that they can score a pair.

Looking for a GPU is cheap where there is none: the driver is asked first, then whether CuPy is
installed; CuPy is imported only where both are there and a GPU is wanted. A GPU counts once it has
scored a pair through the real kernel: being listed is no proof that kernels can be compiled for it.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import numpy as np

from fastpair.backend import parse_size
from fastpair.errors import ArgumentError, DeviceError, MemoryBudgetError

LEAST_LISTED = 10_000_000
"""Pairs of a list that are worth a GPU to "auto"."""

LEAST_WALKED = 10_000_000_000
"""Pairs of all pairs that are worth a GPU to "auto": the CPU walks them faster than a list."""

OLDEST_CUDA, NEWEST_EXTRA = 12, 13
"""Major versions of CUDA: what a driver must know at least, and the newest extra of fastpair."""

OLDEST_CAPABILITY = 80
"""Compute capability times 10 that a GPU must have: bfloat16 products came with it."""

_DRIVER = "libcuda.so.1"
_WHEELS = {12: "cupy-cuda12x", 13: "cupy-cuda13x"}


@dataclass(frozen=True)
class Choice:
    """What `pick` chose.

    Parameters
    ----------
    runtimes : one `fastpair.kernels.gpu.Runtime` a GPU; empty: the CPU.
    note : a sentence on why this device; empty where it was asked for by name.
    told : the same where a person wants to know it: not of runs that are too small for a GPU.
    """

    runtimes: tuple[Any, ...] = ()
    note: str = ""
    told: str = ""

    @property
    def kind(self) -> str:
        """Either "cpu" or "gpu"."""
        return "gpu" if self.runtimes else "cpu"

    @property
    def name(self) -> str:
        """As `pick` takes it: "cpu", "gpu:0", "gpu:0,1"."""
        numbers = ",".join(str(runtime.number) for runtime in self.runtimes)
        return f"gpu:{numbers}" if numbers else "cpu"


@dataclass(frozen=True)
class Missing:
    """Why no GPU can be used, and what to do about it."""

    why: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.why}; {self.remedy}"


def pick(device: str = "auto", *, pairs: int | None = None, least: int = LEAST_LISTED) -> Choice:
    """Return the device to work on.

    "auto" takes the first GPU if one works and the run has at least `least` pairs, else the CPU:
    starting a GPU and compiling for it takes about as long as the CPU takes for so many pairs. The
    numbers are `LEAST_LISTED` for lists and `LEAST_WALKED` for all pairs. It takes one GPU alone,
    since every further one has to be started too.

    Parameters
    ----------
    device : "auto", "cpu", "gpu" (all that are there), "gpu:1", or several as "gpu:0,1".
    pairs : pairs of the run; None: enough.
    least : pairs from which on "auto" looks for a GPU.

    Raises
    ------
    ArgumentError : `device` is none of these.
    DeviceError : a GPU was asked for that is not there or does not work; the message says what is
        missing and how to install it.
    """
    if device == "cpu":
        return Choice()
    if device == "auto":
        return _automatic(pairs, least)
    wanted = _numbers(device)
    count = find_gpus()
    if isinstance(count, Missing):
        raise DeviceError(f"device is {device!r} but {count}, or use the device cpu")
    numbers = range(count) if wanted is None else wanted
    if absent := [number for number in numbers if number >= count]:
        there = "gpu:0 alone" if count == 1 else f"gpu:0 to gpu:{count - 1}"
        raise DeviceError(
            f"device is {device!r} but there is no gpu:{absent[0]}: {there} can be used"
        )
    runtimes = []
    for number in numbers:
        runtime = open_gpu(number)
        if isinstance(runtime, Missing):
            raise DeviceError(f"device is {device!r} but {runtime}, or use the device cpu")
        runtimes.append(runtime)
    return Choice(tuple(runtimes))


def device_bytes(device: str, device_memory: int | str | None) -> int | None:
    """Return the bytes to use on each GPU; refuse a device that is not there before all else.

    Raises
    ------
    ArgumentError : the size is none, or the device is the CPU.
    DeviceError : as `pick`.
    """
    if device not in ("auto", "cpu"):
        pick(device)
    if device_memory is None:
        return None
    if device == "cpu":
        raise ArgumentError(f"--device-memory is {device_memory} but the device is the CPU")
    size = parse_size(device_memory) if isinstance(device_memory, str) else device_memory
    if size < 1:
        raise ArgumentError(f"device memory is {size} bytes, expected at least 1")
    return size


def _automatic(pairs: int | None, least: int) -> Choice:
    if pairs is not None and pairs < least:
        return Choice(note=f"on the CPU: {pairs} pairs, fewer than a GPU is started for")
    count = find_gpus()
    found = count if isinstance(count, Missing) else open_gpu(0)
    if isinstance(found, Missing):
        note = f"on the CPU: {found}"
        return Choice(note=note, told=note)
    note = f"on gpu:0, {found.name}"
    return Choice((found,), note, note)


def _numbers(device: str) -> tuple[int, ...] | None:
    """Return the numbers that a text such as "gpu:0,1" names; None: all."""
    match = re.fullmatch(r"gpu(?::(\d{1,4}(?:,\d{1,4})*))?", device)
    if match is None:
        raise ArgumentError(
            f"device is {device!r}, expected auto, cpu, gpu, gpu:1 or several as gpu:0,1"
        )
    if match[1] is None:
        return None
    numbers = tuple(int(number) for number in match[1].split(","))
    if len(set(numbers)) < len(numbers):
        raise ArgumentError(f"device is {device!r}, expected every GPU once")
    return numbers


# --- what is there --------------------------------------------------------------------------------


def find_gpus() -> int | Missing:
    """Return how many GPUs the driver lists, at least 1, or what is missing. Imports nothing."""
    known = driver_cuda()
    if known is None:
        return Missing(
            f"this machine has no NVIDIA driver ({_DRIVER} cannot be loaded)",
            f"where there is a GPU, install its driver, then {install_line(NEWEST_EXTRA)}",
        )
    major = known // 1000
    if major < OLDEST_CUDA:
        return Missing(
            f"the NVIDIA driver is too old: it knows CUDA {_dotted(known)}, not {OLDEST_CUDA}.0",
            f"install a newer driver, then {install_line(NEWEST_EXTRA)}",
        )
    if find_spec("cupy") is None:
        return Missing("CuPy is not installed", install_line(major))
    wheel = _installed_wheel()
    if wheel is not None and wheel > major:
        return Missing(
            f"the installed CuPy needs CUDA {wheel}, the NVIDIA driver knows {_dotted(known)}",
            f"pip uninstall {_WHEELS[wheel]}, then {install_line(major)}, or take a newer driver",
        )
    return _listed_gpus()


def install_line(cuda: int) -> str:
    """Return the line that installs what fastpair needs for a driver of a CUDA version."""
    return f"pip install 'fastpair[cuda{min(max(cuda, OLDEST_CUDA), NEWEST_EXTRA)}]'"


def _dotted(known: int) -> str:
    return f"{known // 1000}.{known % 1000 // 10}"


def _driver() -> Any:
    try:
        return ctypes.CDLL(_DRIVER)
    except OSError:
        return None


def driver_cuda() -> int | None:
    """Return the newest CUDA that the driver knows, such as 12040; None without a driver."""
    driver, known = _driver(), ctypes.c_int(0)
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(known)):
        return None
    return known.value


def _listed_gpus() -> int | Missing:
    driver, count = _driver(), ctypes.c_int(0)
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code or not count.value:
        return Missing(
            f"the NVIDIA driver lists no GPU (code {code})",
            "see nvidia-smi and CUDA_VISIBLE_DEVICES",
        )
    return count.value


def _installed_wheel() -> int | None:
    """Return the CUDA version of the CuPy wheel; None if CuPy came in another way."""
    for cuda, name in _WHEELS.items():
        try:
            version(name)
        except PackageNotFoundError:
            continue
        return cuda
    return None


@functools.cache
def open_gpu(number: int) -> Any:
    """Return the runtime of a GPU that has scored a pair, or what is `Missing`; looked at once."""
    try:
        runtime = _start(number)
        if int(runtime.capability) < OLDEST_CAPABILITY:
            return _too_old(number, runtime)
        wrong = probe(runtime)
    except Exception as error:  # whatever CuPy, the compiler or the driver may raise
        return _what_failed(number, error)
    if wrong:
        return Missing(f"gpu:{number} {wrong}", "do not trust this GPU or its driver")
    return runtime


def _start(number: int) -> Any:
    from fastpair.kernels.gpu import CupyRuntime

    return CupyRuntime(number)


def _too_old(number: int, runtime: Any) -> Missing:
    has, needed = int(runtime.capability) / 10, OLDEST_CAPABILITY / 10
    return Missing(
        f"gpu:{number}, {runtime.name}, is too old: compute capability {has}, not {needed}",
        "take a newer GPU",
    )


def told(error: Exception, number: int) -> Exception:
    """Return an error of CuPy or the driver as one of fastpair's; others as they are."""
    from fastpair.kernels.gpu import OutOfDeviceMemory

    if isinstance(error, OutOfDeviceMemory):
        return MemoryBudgetError(
            f"gpu:{number} has no room left ({error}): end what else uses it, or use the device cpu"
        )
    if not type(error).__module__.startswith("cupy"):
        return error
    words = " ".join(f"{type(error).__name__}: {error}".split())
    found = DeviceError(f"gpu:{number} failed ({words[:300]}): use the device cpu, or try again")
    found.__cause__ = error
    return found


@contextmanager
def failures_told(number: int) -> Iterator[None]:
    """Raise errors of CuPy or the driver, about a GPU, as errors of fastpair."""
    try:
        yield
    except Exception as error:
        if (found := told(error, number)) is error:
            raise
        raise found from error


def _what_failed(number: int, error: Exception) -> Missing:
    words = " ".join(f"{type(error).__name__}: {error}".split())
    if "nvrtc" in words.lower() and type(error).__name__ != "CompileException":
        cuda = (driver_cuda() or 0) // 1000
        return Missing("CuPy finds no NVRTC, which compiles the kernels", install_line(cuda))
    return Missing(f"gpu:{number} does not work ({words[:300]})", "see that nvidia-smi shows it")


def probe(runtime: Any) -> str:
    """Score one pair through the real kernel; return what is wrong, empty if all is right."""
    from fastpair.kernels import Plan, RowLayout, aligned_empty
    from fastpair.kernels.gpu import DeviceTable, score_pairs

    plan = Plan(RowLayout(((16, 0),) + ((0, 0),) * 4))
    rows = aligned_empty((2, plan.layout.row_bytes), np.uint8)
    rows.view(np.float32)[:] = np.array([[1.0], [2.0]])
    stream = runtime.stream()
    table = DeviceTable(runtime, rows, None, plan, stream)
    sources = (np.zeros(1, np.int32), np.ones(1, np.int32), np.full(1, 2**64 - 1, np.uint64))
    arrays = [runtime.empty(source.shape, source.dtype) for source in sources]
    for array, source in zip(arrays, sources, strict=True):
        runtime.upload(array, source, stream)
    scores, score = runtime.empty((1,), np.float32), np.empty(1, np.float32)
    score_pairs(runtime, table, arrays[0], arrays[1], scores, arrays[2], stream)
    runtime.download(score, scores, stream)
    runtime.synchronize(stream)
    return "" if score[0] == 32.0 else f"scores {score[0]} where 32 is right"
