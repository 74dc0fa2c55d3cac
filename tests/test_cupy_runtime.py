"""The one class that calls CuPy: that what it calls exists, and that it passes things on right."""

import ctypes
import inspect
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from fastpair.kernels import gpu

# What is passed to each, by name or place; classes have what is called on their instances.
CALLS = {
    "empty": ("shape", "dtype"),
    "asarray": ("a",),
    "from_dlpack": ("array",),
    "get_default_memory_pool": (),
    "RawModule": ("code", "options", "backend"),
    "RawModule.get_function": ("name",),
    "RawKernel.__call__": ("grid", "block", "args", "kwargs"),
    "cuda.Device": ("device",),
    "cuda.Device.mem_info": (),
    "cuda.Device.__enter__": (),
    "cuda.MemoryPool.free_bytes": (),
    "cuda.MemoryPointer.memset_async": ("value", "size", "stream"),
    "cuda.MemoryPointer.ptr": (),
    "cuda.Stream": ("non_blocking",),
    "cuda.Stream.wait_event": ("event",),
    "cuda.Stream.synchronize": (),
    "cuda.Event": ("disable_timing",),
    "cuda.Event.record": ("stream",),
    "cuda.Event.synchronize": (),
    "cuda.alloc_pinned_memory": ("size",),
    "cuda.get_current_stream": (),
    "cuda.memory.OutOfMemoryError": (),
    "cuda.runtime.getDeviceProperties": ("device",),
    "cuda.runtime.memcpyAsync": ("dst", "src", "size", "kind", "stream"),
    "cuda.runtime.memcpyHostToDevice": (),
    "cuda.runtime.memcpyDeviceToHost": (),
}


def resolve(cupy, name):
    found = cupy
    for part in name.split("."):
        found = getattr(found, part)
    return found


def signature(found):
    """The parameters of what may be compiled and tells them by its first line alone."""
    try:
        return str(inspect.signature(found))
    except (TypeError, ValueError):
        return (found.__doc__ or "").split("\n\n")[0]


def test_every_call_on_cupy_exists():
    cupy = pytest.importorskip("cupy")
    source = inspect.getsource(gpu.CupyRuntime)
    called = set(re.findall(r"\b_?cupy\.([\w.]*\w)", source))
    assert called <= CALLS.keys()
    for name, parameters in CALLS.items():
        found = resolve(cupy, name)
        for parameter in parameters:
            assert re.search(rf"\b{parameter}\b", signature(found)), (name, parameter)
    assert issubclass(cupy.cuda.memory.OutOfMemoryError, Exception)


# --- a CuPy that keeps everything in the host's memory ---


class FakeArray:
    def __init__(self, shape, dtype):
        self.held = np.zeros(shape, dtype)
        self.shape, self.dtype, self.nbytes = self.held.shape, self.held.dtype, self.held.nbytes
        self.data = SimpleNamespace(ptr=self.held.ctypes.data, memset_async=self.memset_async)

    def memset_async(self, value, size, stream):
        self.held.reshape(-1).view(np.uint8)[:size] = value


class FakeDevice:
    mem_info = (1000, 5000)

    def __init__(self, number):
        assert number == 3

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class OutOfMemory(Exception):
    pass


@pytest.fixture
def cupy(monkeypatch):
    launched = []

    def empty(shape, dtype):
        if np.prod(shape) > 1000:
            raise OutOfMemory("too much")
        return FakeArray(shape, dtype)

    def compiled(code, options, backend):
        launch = lambda *given, stream: launched.append((code, options, *given, stream))  # noqa: E731
        return SimpleNamespace(get_function=lambda name: launch)

    def copy(target, source, count, kind, stream):
        launched.append((kind, stream))
        ctypes.memmove(target, source, count)

    runtime = SimpleNamespace(
        getDeviceProperties=lambda number: {"name": b"Some GPU"},
        memcpyHostToDevice=1,
        memcpyDeviceToHost=2,
        memcpyAsync=copy,
    )
    cuda = SimpleNamespace(
        runtime=runtime,
        Device=FakeDevice,
        memory=SimpleNamespace(OutOfMemoryError=OutOfMemory),
        alloc_pinned_memory=bytearray,
        Stream=lambda non_blocking: SimpleNamespace(ptr=77),
        get_current_stream=lambda: SimpleNamespace(synchronize=lambda: launched.append("waited")),
    )
    pool = SimpleNamespace(free_bytes=lambda: 24)
    module = SimpleNamespace(
        cuda=cuda,
        empty=empty,
        RawModule=compiled,
        get_default_memory_pool=lambda: pool,
        asarray=lambda array: ("adopted", array),
        from_dlpack=lambda array: ("from DLPack", array),
        launched=launched,
    )
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_copies_go_to_the_stream_with_their_direction(cupy):
    runtime = gpu.CupyRuntime(3)
    assert (runtime.number, runtime.name, runtime.free_memory()) == (3, "Some GPU", 1024)
    stream, array = runtime.stream(), runtime.empty((2, 3), np.float32)
    values = runtime.pinned((2, 3), np.float32)
    values[:] = 7
    runtime.upload(array, values, stream)
    result = np.zeros((2, 3), np.float32)
    runtime.download(result, array, stream)
    assert result.tolist() == [[7.0] * 3] * 2
    assert cupy.launched == [(1, 77), (2, 77)]
    runtime.fill(array, 0, stream)
    assert not array.held.any()
    assert runtime.pinned(0, np.int64).shape == (0,)
    for wrong in (values[:1], values.T, values.astype(np.float64)):
        with pytest.raises(ValueError, match="no copy between"):
            runtime.upload(array, wrong, stream)
    with pytest.raises(gpu.OutOfDeviceMemory, match="too much"):
        runtime.empty(2000, np.uint8)


def test_kernels_are_compiled_once_and_no_array_is_a_null_pointer(cupy):
    runtime = gpu.CupyRuntime(3)
    kernel = runtime.kernel("source", "name", ("-DA=1",))
    kernel((5,), (256,), (None, np.int32(4)), "stream")
    ((code, options, grid, block, arguments, stream),) = cupy.launched
    assert (code, options, grid, block, stream) == ("source", ("-DA=1",), (5,), (256,), "stream")
    assert [type(argument) for argument in arguments] == [np.uint64, np.int32]
    assert arguments[0] == 0


def test_arrays_of_other_libraries_are_adopted_as_they_show_themselves(cupy):
    runtime = gpu.CupyRuntime(3)
    cuda = SimpleNamespace(__cuda_array_interface__={})
    assert runtime.adopt(cuda) == ("adopted", cuda)
    assert cupy.launched == ["waited"]  # for what fills the array
    other = SimpleNamespace()
    assert runtime.adopt(other) == ("from DLPack", other)
