"""The one class that calls CuPy: that what it calls exists, and that it passes things on right."""

import ctypes
import inspect
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from fastpair.kernels import gpu, gpu_compiler, simd

# What is passed to each, by name or place; classes have what is called on their instances.
CALLS = {
    "empty": ("shape", "dtype"),
    "asarray": ("a",),
    "from_dlpack": ("array",),
    "get_default_memory_pool": (),
    "cuda.Module": (),
    "cuda.Module.load": ("cubin",),
    "cuda.Module.get_function": ("name",),
    "cuda.Function.__call__": ("args", "kwargs"),
    "cuda.Function.linear_launch": ("args", "shared_mem", "stream"),  # tells what __call__ does not
    "cuda.compiler.CompileException": ("msg", "source", "name", "options"),
    "cuda.nvrtc": (),
    "cuda.nvrtc.createProgram": ("src", "name", "headers", "include_names"),
    "cuda.nvrtc.compileProgram": ("prog", "options"),
    "cuda.nvrtc.destroyProgram": ("prog",),
    "cuda.nvrtc.getCUBIN": ("prog",),
    "cuda.nvrtc.getPTX": ("prog",),
    "cuda.nvrtc.getProgramLog": ("prog",),
    "cuda.nvrtc.getSupportedArchs": (),
    "cuda.nvrtc.getVersion": (),
    "cuda.nvrtc.NVRTCError": (),
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
    source = inspect.getsource(gpu.CupyRuntime) + inspect.getsource(gpu_compiler)
    source = re.sub(r"(?<!\.)\bnvrtc\.(?=\w+\b)", "cupy.cuda.nvrtc.", source)
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
        self.ndim, self.flags, self.device = self.held.ndim, self.held.flags, SimpleNamespace(id=3)

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
    launched, compiled = [], []

    def empty(shape, dtype):
        if np.prod(shape) > 1000:
            raise OutOfMemory("too much")
        return FakeArray(shape, dtype)

    class Nvrtc:
        """Its programs are texts; so is what it makes of them."""

        NVRTCError = ZeroDivisionError
        createProgram = staticmethod(lambda source, name, headers, names: [source])
        destroyProgram = staticmethod(list.clear)
        getSupportedArchs = staticmethod(lambda: (75, 80, 90, 100))
        getVersion = staticmethod(lambda: (13, 0))
        getCUBIN = staticmethod(lambda program: f"code {program}".encode())
        getPTX = staticmethod(lambda program: f"text {program}".encode())
        getProgramLog = staticmethod(lambda program: "no such thing")

        @staticmethod
        def compileProgram(program, options):
            compiled.append(options)
            program += options
            1 // ("wrong" not in program)

    class Module:
        def load(self, code):
            self.code = code.decode()

        def get_function(self, name):
            return lambda *given, stream: launched.append((self.code, name, *given, stream))

    class CompileException(Exception):
        pass

    def copy(target, source, count, kind, stream):
        launched.append((kind, stream))
        ctypes.memmove(target, source, count)

    runtime = SimpleNamespace(
        getDeviceProperties=lambda number: {"name": b"Some GPU", "major": 9, "minor": 0},
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
        nvrtc=Nvrtc,
        Module=Module,
        compiler=SimpleNamespace(CompileException=CompileException),
    )
    pool = SimpleNamespace(free_bytes=lambda: 24)
    module = SimpleNamespace(
        cuda=cuda,
        empty=empty,
        get_default_memory_pool=lambda: pool,
        asarray=lambda array: launched.append("adopted") or array.made,
        from_dlpack=lambda array: launched.append("from DLPack") or array.made,
        launched=launched,
        compiled=compiled,
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


def test_page_locked_memory_comes_in_few_sizes(cupy):
    runtime = gpu.CupyRuntime(3)
    cupy.cuda.alloc_pinned_memory = lambda size: sizes.append(size) or bytearray(size)
    sizes = []
    for count in range(1, 1025):
        assert runtime.pinned(count, np.int32).shape == (count,)
    assert set(sizes) == {1 << n for n in range(2, 13)}


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """The folder in which compiled code is kept."""
    monkeypatch.setattr(simd, "cache_folder", lambda: tmp_path)
    return tmp_path


def test_kernels_are_compiled_once_and_no_array_is_a_null_pointer(cupy, kept):
    runtime = gpu.CupyRuntime(3)
    for name in ("name", "name", "other"):
        kernel = runtime.kernel("source", name, ("-DA=1",))
    kernel((5,), (256,), (None, np.int32(4)), "stream")
    ((code, name, grid, block, arguments, stream),) = cupy.launched
    assert (name, grid, block, stream) == ("other", (5,), (256,), "stream")
    assert code == "code ['source', '-DA=1', '-arch=sm_90']"
    assert [type(argument) for argument in arguments] == [np.uint64, np.int32]
    assert arguments[0] == 0
    assert cupy.compiled == [("-DA=1", "-arch=sm_90")]


def test_what_was_compiled_is_kept_unless_it_is_damaged(cupy, kept):
    for _ in range(2):
        gpu.CupyRuntime(3).kernel("source", "name", ())
    assert len(cupy.compiled) == 1
    (path,) = kept.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    gpu.CupyRuntime(3).kernel("source", "name", ())
    assert len(cupy.compiled) == 2
    gpu.CupyRuntime(3).kernel("source", "name", ("-DA=1",))
    assert len(cupy.compiled) == 3


def test_without_a_place_to_keep_it_code_is_compiled_again(cupy, monkeypatch, tmp_path):
    for folder in (None, tmp_path / "missing"):
        monkeypatch.setattr(simd, "cache_folder", lambda folder=folder: folder)
        gpu.CupyRuntime(3).kernel("source", "name", ())
    assert len(cupy.compiled) == 2


def test_a_device_newer_than_the_compiler_gets_text_for_its_driver(cupy, kept):
    runtime = gpu.CupyRuntime(3)
    runtime.capability = "99"
    runtime.kernel("source", "name", ())((1,), (1,), (), "stream")
    assert cupy.launched[0][0] == "text ['source', '-arch=compute_90']"


def test_a_refused_source_is_told_with_the_log(cupy, kept):
    with pytest.raises(cupy.cuda.compiler.CompileException, match="no such thing"):
        gpu.CupyRuntime(3).kernel("wrong", "name", ())
    assert list(kept.iterdir()) == []


def test_the_real_compiler_keeps_denormal_numbers(kept):
    """A device whose code is text, so that it can be read; CuPy and NVRTC need no GPU for it."""
    cupy = pytest.importorskip("cupy")
    try:
        newest = max(cupy.cuda.nvrtc.getSupportedArchs())
    except Exception as error:
        pytest.skip(f"CuPy has no NVRTC: {error}")
    codes = []
    loads = SimpleNamespace(load=codes.append)
    cuda = SimpleNamespace(nvrtc=cupy.cuda.nvrtc, compiler=cupy.cuda.compiler, Module=lambda: loads)
    fake = SimpleNamespace(cuda=cuda)
    source = 'extern "C" __global__ void scale(float* x) { x[0] = x[0] * x[1] + x[2]; }'
    for capability in (newest, newest + 1):
        gpu_compiler.load_module(fake, source, gpu.BASE_OPTIONS, str(capability))
    assert codes[0].startswith(b"\x7fELF")
    assert b"mul.rn.f32" in codes[1]
    assert b"add.rn.f32" in codes[1]
    assert b".ftz" not in codes[1]


def shown(**interface):
    """An array of another library, and what CuPy makes of it."""
    return SimpleNamespace(made=FakeArray((4, 16), np.uint8), **interface)


def test_arrays_of_other_libraries_are_adopted_as_they_show_themselves(cupy):
    runtime = gpu.CupyRuntime(3)
    cuda, other = shown(__cuda_array_interface__={}), shown()
    assert runtime.adopt(cuda) is cuda.made
    assert runtime.adopt(other) is other.made
    # what fills an array is waited for once CuPy's stream waits for the other library's
    assert cupy.launched == ["adopted", "waited", "from DLPack", "waited"]


def test_arrays_that_kernels_cannot_read_are_refused(cupy):
    runtime = gpu.CupyRuntime(3)
    elsewhere, turned, odd = shown(), shown(), shown()
    elsewhere.made.device.id = 1
    turned.made.flags = np.zeros((16, 4)).T.flags
    odd.made.data.ptr += 1
    for array, message in (
        (elsewhere, "lies on gpu:1, not on gpu:3"),
        (turned, "not contiguous"),
        (odd, "odd address"),
    ):
        with pytest.raises(ValueError, match=message):
            runtime.adopt(array)
