"""The simulated GPU: what it computes, and that it notices what a GPU would not forgive."""

import os
import subprocess
import sys

import numpy as np
import pytest
from simulated_gpu import SANITIZERS, SimulatedRuntime, SimulationError, needs_compiler

from fastpair.kernels.gpu import OutOfDeviceMemory

pytestmark = needs_compiler

REVERSE = """
struct Shift { int by; double factor; };
extern "C" __global__ void __launch_bounds__(64)
reverse(const float* values, float* reversed, long long count, Shift shift) {
  __shared__ float block[64];
  const long long n = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (n < count) block[threadIdx.x] = values[n];
#ifndef NO_BARRIER
  __syncthreads();
#endif
  if (n < count) reversed[n] = block[(63 - threadIdx.x + shift.by) % 64] * (float)shift.factor;
}
"""
SHIFT = np.dtype([("by", "<i4"), ("factor", "<f8")], align=True)


def reverse(runtime, count=128, options=(), guard=0):
    """Reverse each 64 of `count` numbers on the device; return what came and what was expected."""
    values = np.arange(count, dtype=np.float32)
    stream = runtime.stream()
    source, target = runtime.empty(count, np.float32), runtime.empty(count, np.float32)
    runtime.upload(source, values, stream)
    kernel = runtime.kernel(REVERSE, "reverse", options)
    shift = np.array([(0, 2.0)], SHIFT)
    kernel((count // 64,), (64,), (source, target, np.int64(count + guard), shift), stream)
    result = np.empty(count, np.float32)
    runtime.download(result, target, stream)
    runtime.synchronize(stream)
    return result, 2 * values.reshape(-1, 64)[:, ::-1].ravel()


def run(body, result, threads=32, order=0, options=(), parameters="", arguments=()):
    """Run a kernel of one block that fills `out`, a pointer to the type of `result`."""
    names = {"f": "float", "i": "int", "u": "unsigned"}
    kind = names[result.dtype.kind] if result.itemsize == 4 else "unsigned long long"
    source = f'extern "C" __global__ void probe({kind}* out{parameters}) {{ {body} }}'
    runtime = SimulatedRuntime(order=order)
    stream = runtime.stream()
    target = runtime.empty(result.shape, result.dtype)
    runtime.upload(target, result, stream)
    filled = np.empty_like(result)
    arrays = [runtime.empty(a.shape, a.dtype) for a in arguments]
    for array, values in zip(arrays, arguments, strict=True):
        runtime.upload(array, values, stream)
    runtime.kernel(source, "probe", options)((1,), (threads,), (target, *arrays), stream)
    runtime.download(filled, target, stream)
    runtime.synchronize(stream)
    return filled


@pytest.mark.parametrize("order", [0, 1, 2, 99])
def test_a_kernel_runs_in_any_order(order):
    result, expected = reverse(SimulatedRuntime(order=order))
    assert result.tolist() == expected.tolist()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_missing_barrier_shows(order):
    result, expected = reverse(SimulatedRuntime(order=order), options=("-DNO_BARRIER=1",))
    assert result.tolist() != expected.tolist()


@pytest.mark.skipif(bool(SANITIZERS), reason="a sanitizer ends the process at once")
def test_a_write_past_the_end_shows():
    with pytest.raises(SimulationError, match="outside an array of 400 bytes"):
        run("out[threadIdx.x + 70] = 0;", np.zeros(100, np.float32))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (threadIdx.x < 7) __syncthreads(); out[0] = 1;", "not all threads reach"),
        ("if (threadIdx.x < 7) return; out[0] = __ballot_sync(~0u, 1);", "not all threads reach"),
        ("out[0] = __ballot_sync(0xffffu, 1);", "only full masks"),
        ("out[0] = threadIdx.x < 7 ? __ballot_sync(~0u, 1)\n : __ballot_sync(~0u, 0);", "differ"),
        ("if (threadIdx.x < 7) __syncthreads();\n else __syncthreads();", "different barriers"),
        ("out[0] = __ldg((uint2*)((char*)out + 4)).x;", "misaligned"),
        ("__trap();", "a trap"),
    ],
)
def test_what_no_gpu_forgives_is_an_error_of_python_and_the_next_launch_runs(body, message):
    with pytest.raises(SimulationError, match=message):
        run(body, np.zeros(100, np.uint32))
    assert run("out[threadIdx.x] = 7;", np.zeros(32, np.uint32)).tolist() == [7] * 32


LANES = np.arange(32)


def _bits_and_first(n):
    return n.bit_count() * 100 + f"{n + 32:b}"[::-1].index("1") + 1


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("__shfl_xor_sync(~0u, lane, 5)", LANES ^ 5),
        ("__shfl_xor_sync(~0u, lane, 4, 4)", LANES & ~4),
        ("__shfl_sync(~0u, lane, 9)", np.full(32, 9)),
        ("__shfl_sync(~0u, lane, 9, 8)", LANES // 8 * 8 + 1),
        ("__shfl_down_sync(~0u, lane, 20)", np.where(LANES < 12, LANES + 20, LANES)),
        ("__shfl_down_sync(~0u, lane, 2, 4)", np.where(LANES % 4 < 2, LANES + 2, LANES)),
        ("__shfl_up_sync(~0u, lane, 3)", np.where(LANES > 2, LANES - 3, LANES)),
        ("__ballot_sync(~0u, lane % 3 == 0)", np.full(32, 0x49249249)),
        ("__any_sync(~0u, lane == 9) + 2 * __all_sync(~0u, lane < 9)", np.full(32, 1)),
        ("__reduce_add_sync(~0u, lane)", np.full(32, 496)),
        ("__reduce_max_sync(~0u, lane ^ 1)", np.full(32, 31)),
        ("__popc(lane) * 100 + __ffs(lane + 32)", [_bits_and_first(n) for n in range(32)]),
    ],
)
def test_collectives_are_those_of_the_programming_guide(body, expected):
    found = run(f"const unsigned lane = threadIdx.x; out[lane] = {body};", np.zeros(32, np.uint32))
    assert found.tolist() == list(expected)


def test_atomics_return_the_old_value_and_reach_64_bits():
    found = run(
        "atomicAdd(&out[0], 1ull << 40); atomicMin(&out[1], (1ull << 50) + threadIdx.x);"
        "atomicMax(&out[2], (1ull << 50) + threadIdx.x);"
        "if (atomicCAS(&out[3], 0ull, 5ull) == 0) out[4] += 1;",
        np.array([0, 2**63, 0, 0, 0], np.uint64),
        order=7,
    )
    assert found.tolist() == [32 << 40, 1 << 50, (1 << 50) + 31, 5, 1]


def test_bytes_are_added_and_compared_as_integers():
    rng = np.random.default_rng(0)
    x, y = rng.integers(-128, 128, (2, 32, 4)).astype(np.int8)
    words = [a.view(np.uint32).ravel() for a in (x, y)]
    wide, other = x.astype(int), y.astype(int)
    for body, expected in [
        ("(unsigned)__dp4a((int)x[n], (int)y[n], 5)", (wide * other).sum(1) + 5),
        ("__vsads4(x[n], y[n])", abs(wide - other).sum(1)),
        ("__vsadu4(x[n] ^ 0x80808080u, y[n] ^ 0x80808080u)", abs(wide - other).sum(1)),
        (
            "(unsigned)__dp4a((int)__vmaxs4(x[n], y[n]), 0x01010101, 0)",
            np.maximum(wide, other).sum(1),
        ),
    ]:
        found = run(
            f"const int n = threadIdx.x; out[n] = {body};",
            np.zeros(32, np.uint32),
            parameters=", const unsigned* x, const unsigned* y",
            arguments=words,
        )
        assert found.view(np.int32).tolist() == expected.tolist()


def test_half_precision_is_widened_exactly():
    halves = np.arange(2**16, dtype=np.uint32)
    found = run(
        "for (int n = threadIdx.x; n < 65536; n += 32) out[n] = simulated::half_to_float(x[n]);",
        np.zeros(2**16, np.float32),
        parameters=", const unsigned* x",
        arguments=[halves],
    )
    expected = halves.astype(np.uint16).view(np.float16).astype(np.float32)
    finite = np.isfinite(expected)
    assert found[finite].tobytes() == expected[finite].tobytes()
    assert np.array_equal(found[~finite], expected[~finite], equal_nan=True)


def test_the_tensor_core_multiplies_by_the_layout_of_the_manual():
    rng = np.random.default_rng(1)
    a, b, c = (
        rng.integers(-8, 9, (16, 16)),
        rng.integers(-8, 9, (16, 8)),
        rng.integers(-8, 9, (16, 8)),
    )
    words = [(m.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for m in (a, b.T)]
    body = """
      const int group = threadIdx.x / 4, t = threadIdx.x % 4;
      unsigned x[4], y[2];
      float sum[4];
      for (int r = 0; r < 4; ++r) x[r] = a[((group + r % 2 * 8) * 16 + t * 2 + r / 2 * 8) / 2];
      for (int r = 0; r < 2; ++r) y[r] = b[(group * 16 + t * 2 + r * 8) / 2];
      for (int n = 0; n < 4; ++n) sum[n] = out[(group + n / 2 * 8) * 8 + t * 2 + n % 2];
      simulated::mma_m16n8k16_bf16(sum, x, y, sum, __LINE__);
      for (int n = 0; n < 4; ++n) out[(group + n / 2 * 8) * 8 + t * 2 + n % 2] = sum[n];
    """
    found = run(
        body,
        c.astype(np.float32),
        order=3,
        parameters=", const unsigned* a, const unsigned* b",
        arguments=[np.ascontiguousarray(w).view(np.uint32).ravel() for w in words],
    )
    assert found.tolist() == (a @ b + c).tolist()


# --- streams and memory --------------------------------------------------------------------------


def two_streams(runtime, waits):
    """Upload in one stream, download in another; return what came."""
    values = np.arange(5, dtype=np.float32)
    first, second = runtime.stream(), runtime.stream()
    array, result = runtime.empty(5, np.float32), np.zeros(5, np.float32)
    runtime.upload(array, values, first)
    event = runtime.record(first)
    if waits:
        runtime.wait(second, event)
    runtime.download(result, array, second)
    runtime.synchronize(second)
    return result.tolist() == values.tolist()


def test_a_stream_sees_the_work_of_another_only_if_it_waits():
    assert all(two_streams(SimulatedRuntime(order=order), True) for order in range(9))
    assert not all(two_streams(SimulatedRuntime(order=order), False) for order in range(9))


def test_an_array_dropped_too_early_shows():
    runtime = SimulatedRuntime()
    stream = runtime.stream()
    runtime.fill(runtime.empty(5, np.float32), 0, stream)
    with pytest.raises(SimulationError, match="dropped before"):
        runtime.synchronize(stream)


def test_memory_is_limited_and_comes_back():
    runtime = SimulatedRuntime(memory=1000)
    array = runtime.empty((10, 10), np.float32)
    part = array[2:5]
    assert (part.shape, part.nbytes, runtime.free_memory()) == ((3, 10), 120, 600)
    with pytest.raises(OutOfDeviceMemory):
        runtime.empty(151, np.float32)
    del array, part
    assert runtime.free_memory() == 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "0 arguments, expected 4"),
        ((None, None, np.int32(1), np.zeros(1, SHIFT)), "argument 2 has 4 bytes, the kernel take"),
        ((None, None, 1, np.zeros(1, SHIFT)), "argument 2 is int"),
        ((np.zeros(4), None, np.int64(1), np.zeros(1, SHIFT)), "argument 0 is ndarray"),
    ],
)
def test_arguments_that_do_not_fit_the_kernel_are_refused(arguments, message):
    runtime = SimulatedRuntime()
    with pytest.raises(SimulationError, match=message):
        runtime.kernel(REVERSE, "reverse", ())((1,), (64,), arguments, runtime.stream())


def test_a_sanitizer_sees_a_read_past_the_end():
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(os.path.isabs(path) for path in libraries):
        pytest.skip("g++ has no sanitizers here")
    environment = {
        **os.environ,
        "FASTPAIR_SANITIZE": "address,undefined",
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.path.dirname(__file__),
    }
    for place, seen in ((99, False), (100, True)):
        script = (
            "import numpy as np, test_simulated_gpu as t;"
            f"t.run('out[0] = out[threadIdx.x ? 0 : {place}];', np.zeros(100, np.float32))"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True
        )
        assert (done.returncode != 0) == seen, done.stderr
        assert ("AddressSanitizer: use-after-poison" in done.stderr) == seen


def test_the_host_cannot_read_a_device_array():
    array = SimulatedRuntime().empty(3, np.float32)
    for read in (np.asarray, lambda a: a[1]):
        with pytest.raises(SimulationError):
            read(array)
