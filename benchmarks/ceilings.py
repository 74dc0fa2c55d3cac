"""What this machine can do at most: fused multiply-adds a second, bytes read a second."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import numpy as np
from arrays import halves, in_threads

_CHAINS = 24
"""Independent sums: enough to cover the latency of a multiply-add on two ports, within the
registers of AVX-512 and NEON."""

_STEPS = 1 << 23

_TIMES = 4
"""Reads of the array in a round: one alone is over too soon."""


@cache
def _multiply_adds(lanes: int) -> tuple[object, Callable[[int], float]]:
    """Compile ``f(steps)``: `_CHAINS` multiply-adds of vectors a step, none waiting for another."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    vector = f"<{lanes} x float>"
    chains = range(_CHAINS)
    sums = "\n".join(f"  %s{n} = phi {vector} [%start, %entry], [%t{n}, %loop]" for n in chains)
    steps = "\n".join(
        f"  %t{n} = call {vector} @llvm.fma.v{lanes}f32"
        f"({vector} %s{n}, {vector} %factor, {vector} %start)"
        for n in chains
    )
    total = "\n".join(
        f"  %u{n + 1} = fadd {vector} %{'u' if n else 't'}{n}, %t{n + 1}" for n in chains[:-1]
    )
    module = llvm.parse_assembly(f"""
declare {vector} @llvm.fma.v{lanes}f32({vector}, {vector}, {vector})
define float @multiply_adds(i64 %steps, float %seed) {{
entry:
  %one = insertelement {vector} undef, float %seed, i32 0
  %start = shufflevector {vector} %one, {vector} undef, <{lanes} x i32> zeroinitializer
  %factor = fmul {vector} %start, %start
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%next, %loop]
{sums}
{steps}
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %steps
  br i1 %more, label %loop, label %done
done:
{total}
  %result = extractelement {vector} %u{_CHAINS - 1}, i32 0
  ret float %result
}}""")
    features = llvm.get_host_cpu_features()
    # LLVM prefers 256 bits on some CPUs that have 512: the probe says what the unit can do.
    flags = features.flatten() + (",-prefer-256-bit" if features.get("avx512f") else "")
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=flags, opt=2
    )
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    signature = ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_int64, ctypes.c_float)
    function = signature(engine.get_function_address("multiply_adds"))
    return engine, lambda steps: function(steps, 0.5)


def multiply_add_probe() -> tuple[Callable[[], object], float]:
    """Return what does float32 multiply-adds on one core, and its number of operations.

    A multiply-add counts as two operations.
    """
    import llvmlite.binding as llvm

    lanes = 16 if llvm.get_host_cpu_features().get("avx512f") else 8
    _, function = _multiply_adds(lanes)
    return lambda: function(_STEPS), 2.0 * lanes * _CHAINS * _STEPS


def read_probe(size: int) -> tuple[Callable[[], object], float]:
    """Return what reads about `size` bytes of memory in order on all cores, and their number."""
    from numba import njit

    @njit(nogil=True, fastmath=True)
    def total(numbers: np.ndarray) -> np.float32:
        result = np.float32(0)
        for n in range(len(numbers)):
            result += numbers[n]
        return result

    from fastpair.files import page_aligned

    numbers = page_aligned((1, size // 4096 * 4096)).view(np.float32)[0]
    numbers += 1  # untouched pages would all be the same page of zeros
    total(numbers[:16])

    def read(part: slice) -> None:
        for _ in range(_TIMES):
            total(numbers[part])

    return lambda: in_threads(read, halves(len(numbers))), float(_TIMES * numbers.nbytes)
