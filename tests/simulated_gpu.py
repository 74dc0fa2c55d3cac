"""A GPU for tests: the kernels' sources built by g++ and run on the CPU, streams that may lag.

`SimulatedRuntime` has the interface of `fastpair.kernels.gpu.Runtime`. Nothing happens before the
host synchronizes; then the streams run in an order that a seed picks, which respects nothing but
the order within a stream and the events it waits for. A wait that host code forgot, a buffer that
it used again too early, an array that it dropped too early, a write past the end of an array: each
gives a wrong result or a `SimulationError` here, where a GPU may or may not show it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import random
import re
import shutil
import subprocess
import threading
import time
import weakref
from collections import deque
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fastpair.kernels.gpu import BASE_OPTIONS, OutOfDeviceMemory

HEADER = Path(__file__).with_name("cuda_on_cpu.h")
GUARD = 256
"""Bytes before and after each array that nobody may change; also its alignment."""

SANITIZERS = os.environ.get("FASTPAIR_SANITIZE", "")
"""Sanitizers of g++ (``address,undefined``) to build with; their libraries must be preloaded."""

_FLAGS = [
    *("-std=gnu++17", "-O1", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing"),
    *("-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused"),
]
_KEPT_DAYS = 30
_KERNEL_NAMES = r'extern "C" __global__ void\s*(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\('

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or platform.system() != "Linux",
    reason="the simulated GPU needs g++ on Linux",
)


class SimulationError(AssertionError):
    """What a GPU would not have forgiven, or not have noticed."""


# --- kernels -------------------------------------------------------------------------------------


def _cache_folder():
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = home / "fastpair" / "simulated-gpu"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _machine_flags():
    """Fused multiply-add as an instruction, where there is one: the function is slow."""
    try:
        features = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        features = set()
    return ["-march=x86-64-v3"] if {"avx2", "fma", "bmi2", "movbe"} <= features else []


@functools.cache
def _compiler():
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True)
    return version.stdout


def _flags():
    flags = [*_FLAGS, *_machine_flags()]
    if SANITIZERS:
        flags += ["-g", f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all"]
        flags += ["--param", "asan-stack=0", "-fsanitize-sections=fp_shared"]
    return flags


def compile_library(source, options):
    """Return the path of a shared library of a kernel source, built once."""
    names = list(dict.fromkeys(re.findall(_KERNEL_NAMES, source)))  # one a choice of options
    if not names:
        raise SimulationError('the source has no kernel: extern "C" __global__ void NAME(...)')
    defines = [option for option in options if option.startswith("-D")]
    unknown = set(options) - set(defines) - set(BASE_OPTIONS)
    if unknown:
        raise SimulationError(f"compiler options {sorted(unknown)}: expected -D or {BASE_OPTIONS}")
    text = f'#line 1 "kernel"\n{source}\n' + "".join(f"FP_EXPORT({name})\n" for name in names)
    return _build([*defines, "-include", str(compiled_header())], "c++", text, ".so")


def compiled_header():
    """Return the file to include what every kernel needs by, which lies there compiled, too."""
    text = f"#define FP_HOST 1\n{HEADER.read_text()}"
    return _build([], "c++-header", text, ".h.gch").with_suffix("")


def _build(options, language, text, suffix):
    """Return the path of what g++ makes of a text; it is built once and kept."""
    command = ["g++", *_flags(), *options, "-x", language]
    digest = hashlib.sha256(repr((_compiler(), command, text)).encode()).hexdigest()[:32]
    source, built = (_cache_folder() / f"{digest}{end}" for end in (".h", suffix))
    if built.exists():
        for path in (source, built):
            os.utime(path)
        return built
    _drop_old(built.parent)
    with _replacing(source) as partial:
        partial.write_text(text)
    with _replacing(built) as partial:
        found = subprocess.run(
            [*command, str(source), "-o", str(partial)], capture_output=True, text=True, check=False
        )
        if found.returncode:
            raise SimulationError(f"g++ refuses a kernel:\n{found.stderr[:4000]}")
    return built


@contextmanager
def _replacing(path):
    """A file to write that takes a path's place once it is whole."""
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
    yield partial
    os.replace(partial, path)


def _drop_old(folder):
    for path in folder.iterdir():
        try:
            if time.time() - path.stat().st_mtime > _KEPT_DAYS * 86400:
                path.unlink()
        except OSError:  # another process was faster
            pass


_LIBRARIES = {}
_RUNNING = threading.Lock()  # fibers are global to a library, and compiling takes a core


def load_library(source, options):
    """Return the loaded library of a kernel source."""
    with _RUNNING:
        key = source, options
        if key not in _LIBRARIES:
            library = ctypes.CDLL(str(compile_library(source, options)))
            library.fp_message.restype = ctypes.c_char_p
            _LIBRARIES[key] = library
        return _LIBRARIES[key]


def _is_struct(argument):
    return isinstance(argument, np.ndarray) and argument.dtype.fields and argument.size == 1


class SimulatedKernel:
    """A kernel: called as ``kernel(grid, block, arguments, stream)``, it runs in that stream."""

    def __init__(self, runtime, library, name):
        self._runtime, self._library, self.name = runtime, library, name
        self._launch = getattr(library, f"launch_{name}")
        sizes = (ctypes.c_int * 64)()
        count = getattr(library, f"signature_{name}")(sizes)
        self._sizes = list(sizes[:count])

    def __call__(self, grid, block, arguments, stream):
        if len(arguments) != len(self._sizes):
            raise SimulationError(
                f"{self.name}: {len(arguments)} arguments, expected {len(self._sizes)}"
            )
        held, used = [], []
        for number, (argument, size) in enumerate(zip(arguments, self._sizes, strict=True)):
            held.append(self._packed(number, argument, size))
            if isinstance(argument, DeviceArray):
                used.append(argument)
        data = [array.data for array in used]  # keeps the memory of what is dropped too early
        self._runtime.enqueue(stream, functools.partial(self._run, grid, block, held, data), used)

    def _packed(self, number, argument, size):
        """The bytes of an argument, which must have the size that the kernel declares."""
        if argument is None or isinstance(argument, DeviceArray):
            if argument is not None and argument.runtime is not self._runtime:
                raise SimulationError(f"{self.name}: argument {number} is of another device")
            expected, pointer = -8, 0 if argument is None else argument.data.ctypes.data
            packed = pointer.to_bytes(8, "little")
        elif isinstance(argument, np.generic) or _is_struct(argument):
            expected, packed = argument.nbytes, argument.tobytes()
        else:
            raise SimulationError(
                f"{self.name}: argument {number} is {type(argument).__name__}, expected a device "
                f"array, None, a NumPy scalar or a structured array of one element"
            )
        if expected != size:
            raise SimulationError(
                f"{self.name}: argument {number} has {expected} bytes, the kernel takes {size} "
                f"(a pointer counts as -8)"
            )
        return packed

    def _run(self, grid, block, held, data):
        shapes = [(ctypes.c_uint * 3)(*shape, *(1,) * (3 - len(shape))) for shape in (grid, block)]
        buffers = [ctypes.create_string_buffer(packed, len(packed)) for packed in held]
        pointers = (ctypes.c_void_p * max(1, len(buffers)))(*map(ctypes.addressof, buffers))
        with _RUNNING:
            if self._launch(*shapes, pointers, self._runtime.next_order()):
                raise SimulationError(self._library.fp_message().decode())


# --- memory --------------------------------------------------------------------------------------


class _Allocation:
    """Bytes of the device between two guards, filled with 0xFF; counted while it lives."""

    def __init__(self, runtime, count):
        self.runtime, self.count, self.pending = runtime, count, 0
        buffer = np.full(count + 3 * GUARD, 0xA5, np.uint8)
        start = -buffer.ctypes.data % GUARD + GUARD
        self.whole, self.guards = buffer, (buffer[:start], buffer[start + count :])
        self.bytes = buffer[start : start + count]
        self.bytes[:] = 0xFF
        self._tell_sanitizer("__asan_poison_memory_region")  # reads of guards are told, too

    def _tell_sanitizer(self, what):
        for guard in self.guards if SANITIZERS else ():
            place, size = ctypes.c_void_p(guard.ctypes.data), ctypes.c_size_t(guard.nbytes)
            ctypes.CDLL(None)[what](place, size)

    def check(self):
        if any((guard != 0xA5).any() for guard in self.guards):
            raise SimulationError(f"something was written outside an array of {self.count} bytes")

    def __del__(self):
        self._tell_sanitizer("__asan_unpoison_memory_region")  # small ones are reused
        if self.pending:
            self.runtime.faults.append(
                f"an array of {self.count} bytes was dropped before the work on it was done"
            )


class DeviceArray:
    """An array on the simulated device; the host may ask for its shape and cut it, no more."""

    def __init__(self, runtime, data, allocation):
        self.runtime, self.data, self.allocation = runtime, data, allocation

    @property
    def shape(self):
        return self.data.shape

    @property
    def dtype(self):
        return self.data.dtype

    @property
    def nbytes(self):
        return self.data.nbytes

    def __len__(self):
        return len(self.data)

    def __getitem__(self, rows):
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise SimulationError(f"device arrays are cut by [a:b] alone, not by {rows!r}")
        return DeviceArray(self.runtime, self.data[rows], self.allocation)

    def __array__(self, *_, **__):
        raise SimulationError("host code read a device array")


# --- the runtime ---------------------------------------------------------------------------------


class _Event:
    def __init__(self):
        self.done = False


class _Stream:
    def __init__(self):
        self.queue = deque()  # (event to wait for or None, work, allocations)


class SimulatedRuntime:
    """A device of `memory` bytes whose streams and threads run in an order given by a seed.

    Parameters
    ----------
    memory : int
        Bytes that `empty` gives at most.
    order : int
        0: each stream as late as possible, threads forward; 1: threads backward; others: random.
    number : int
        Device number.
    """

    name, capability = "simulated", "90"

    def __init__(self, memory=1 << 30, order=0, number=0):
        self.number, self.memory, self.order = number, memory, order
        self.faults, self.compiled = [], set()  # (kernel, options) that were asked for
        self._streams, self._allocations = [], weakref.WeakSet()
        self._random = random.Random(order)

    def free_memory(self):
        return self.memory - sum(allocation.count for allocation in self._allocations)

    def empty(self, shape, dtype):
        dtype = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if count > self.free_memory():
            raise OutOfDeviceMemory(f"{count} bytes, {self.free_memory()} are free")
        allocation = _Allocation(self, count)
        self._allocations.add(allocation)
        return DeviceArray(self, allocation.bytes.view(dtype).reshape(shape), allocation)

    def pinned(self, shape, dtype):
        count = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        return np.full(count, 0xFF, np.uint8).view(dtype).reshape(shape)

    def stream(self):
        self._streams.append(_Stream())
        return self._streams[-1]

    def upload(self, target, source, stream):
        self._check_copy(target, source)
        data = target.data
        self.enqueue(stream, lambda: np.copyto(data, source), [target])

    def download(self, target, source, stream):
        self._check_copy(source, target)
        data = source.data
        self.enqueue(stream, lambda: np.copyto(target, data), [source])

    def fill(self, target, byte, stream):
        flat = target.data.reshape(-1).view(np.uint8)
        self.enqueue(stream, lambda: flat.fill(byte), [target])

    def record(self, stream):
        event = _Event()
        self.enqueue(stream, lambda: setattr(event, "done", True), [])
        return event

    def wait(self, stream, event):
        stream.queue.append((event, lambda: None, []))

    def synchronize(self, stream_or_event):
        target = stream_or_event
        reached = (lambda: target.done) if isinstance(target, _Event) else lambda: not target.queue
        while not reached():
            self._step(target)
        for allocation in list(self._allocations):
            allocation.check()
        if self.faults:
            raise SimulationError(self.faults.pop())

    def kernel(self, source, name, options):
        self.compiled.add((name, tuple(options)))
        return SimulatedKernel(self, load_library(source, tuple(options)), name)

    def adopt(self, array):
        if isinstance(array, DeviceArray):
            return array
        interface = array.__cuda_array_interface__
        if interface.get("strides") is not None:
            raise ValueError("an array on the device is not contiguous: give a contiguous copy")
        dtype = np.dtype(interface["typestr"])
        count = int(np.prod(interface["shape"])) * dtype.itemsize
        memory = (ctypes.c_uint8 * count).from_address(interface["data"][0])
        data = np.frombuffer(memory, dtype).reshape(interface["shape"])
        return DeviceArray(self, data, array)

    # --- what a stream does

    def enqueue(self, stream, work, arrays):
        if not isinstance(stream, _Stream) or stream not in self._streams:
            raise SimulationError(f"{stream!r} is not a stream of this device")
        allocations = [a.allocation for a in arrays if isinstance(a.allocation, _Allocation)]
        for allocation in allocations:
            allocation.pending += 1
        references = [weakref.ref(allocation) for allocation in allocations]
        stream.queue.append((None, work, references))

    def next_order(self):
        """Order of the threads of the next launch."""
        return self.order if self.order < 2 else self._random.randrange(2, 2**31)

    def _step(self, target):
        """Run the next piece of work of some stream that is not waiting."""
        able = [
            s for s in self._streams if s.queue and (s.queue[0][0] is None or s.queue[0][0].done)
        ]
        if not able:
            raise SimulationError("streams wait for each other, or for an event never recorded")
        first = target if target in able and self.order < 2 else self._random.choice(able)
        _, work, references = first.queue.popleft()
        for reference in references:
            if (allocation := reference()) is not None:
                allocation.pending -= 1
        work()

    @staticmethod
    def _check_copy(device, host):
        if not isinstance(host, np.ndarray) or not host.flags.c_contiguous:
            raise SimulationError("the host's side of a copy must be a contiguous NumPy array")
        if (device.shape, device.dtype) != (host.shape, host.dtype):
            raise SimulationError(
                f"a copy between {device.shape} {device.dtype} and {host.shape} {host.dtype}"
            )
