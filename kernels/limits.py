"""What this CPU can do at most: probes of arithmetic and of memory, one thread each.

An arithmetic probe keeps every vector register busy with chains that do not wait for each other,
as many as the sums of a register tile; their results are stored, so that nothing is optimised
away. The dot products of bfloat16 and int8 are written as machine instructions: whether the CPU
has them is asked first (`arithmetic_probes`). A memory probe reads or copies whole vectors in
order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from fastpair.kernels import LANES, aligned_empty
from fastpair.kernels.simd import (
    add,
    cpu_features,
    jit,
    load,
    prefetch,
    total,
    zeros,
)
from fastpair.kernels.tile import TILE_COLUMNS, TILE_ROWS

_REGISTER_LANES = 16 if TILE_COLUMNS == 48 else 8 if TILE_COLUMNS == 16 else 4
"""Float32 lanes of a vector register, by the register tile that was made for it."""

_CHAINS = TILE_ROWS * TILE_COLUMNS // _REGISTER_LANES
"""Sums of the register tile: 24, or 12 where there are 16 registers; no instruction waits."""

BLOCKS_AHEAD_BYTES = 8192
"""Bytes of blocks that are asked for ahead of use, when they are read in random order."""

_INT64 = ir.IntType(64)
_FLOATS = ir.VectorType(ir.FloatType(), _REGISTER_LANES)
_INTEGERS = ir.VectorType(ir.IntType(32), _REGISTER_LANES)

_Step = Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.Value], ir.Value]


# --- arithmetic ----------------------------------------------------------------------------------


def _chains(name: str, vector: ir.VectorType, step: _Step) -> Any:
    """Return an intrinsic that runs ``chain = step(chain, x, y)`` for all chains `count` times.

    It takes the count, the address of x and y, and the address where the chains are stored.
    """

    def emit(builder: ir.IRBuilder, count: ir.Value, source: ir.Value, target: ir.Value) -> None:
        pointer = vector.as_pointer()
        inputs = builder.inttoptr(source, pointer)
        x, y = (
            builder.load(builder.gep(inputs, [ir.Constant(_INT64, n)]), align=4) for n in range(2)
        )
        before, body = builder.block, builder.append_basic_block("steps")
        after = builder.append_basic_block("done")
        builder.branch(body)
        builder.position_at_end(body)
        index = builder.phi(_INT64)
        index.add_incoming(ir.Constant(_INT64, 0), before)
        chains = [builder.phi(vector) for _ in range(_CHAINS)]
        grown = [step(builder, chain, x, y) for chain in chains]
        for chain, value in zip(chains, grown, strict=True):
            chain.add_incoming(x, before)
            chain.add_incoming(value, body)
        following = builder.add(index, ir.Constant(_INT64, 1))
        index.add_incoming(following, body)
        builder.cbranch(builder.icmp_signed("<", following, count), body, after)
        builder.position_at_end(after)
        outputs = builder.inttoptr(target, pointer)
        for number, value in enumerate(grown):
            place = builder.gep(outputs, [ir.Constant(_INT64, number)])
            builder.store(value, place, align=4)

    def chains(typingctx, count, source, target):
        def codegen(context, builder, signature, args):
            emit(builder, *args)
            return context.get_dummy_value()

        return types.none(types.int64, types.int64, types.int64), codegen

    chains.__name__ = name
    chains.__doc__ = f"Chains of {name}."
    return intrinsic(chains)


def _multiply_add(builder: ir.IRBuilder, chain: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    function = builder.module.declare_intrinsic(f"llvm.fma.v{_REGISTER_LANES}f32", fnty=kind)
    return builder.call(function, [x, y, chain])


def _maximum_add(builder: ir.IRBuilder, chain: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    greater = builder.select(builder.fcmp_ordered(">", chain, x), chain, x)
    return builder.fadd(greater, y)


def _instruction(name: str, vector: ir.VectorType) -> _Step:
    """Return the step of a dot-product instruction that adds to its destination."""

    def step(builder: ir.IRBuilder, chain: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
        llvm.initialize_native_asmparser()  # without it, LLVM ends the process
        kind = ir.FunctionType(vector, [vector] * 3)
        code = ir.InlineAsm(kind, f"{name} $2, $1, $0", "=v,v,v,0", side_effect=True)
        return builder.call(code, [x, y, chain])

    return step


_multiply_add_chains = _chains("multiply_add", _FLOATS, _multiply_add)
_maximum_add_chains = _chains("maximum_add", _FLOATS, _maximum_add)
_bfloat16_chains = _chains("bfloat16_dot", _FLOATS, _instruction("vdpbf16ps", _FLOATS))
_int8_chains = _chains("int8_dot", _INTEGERS, _instruction("vpdpbusd", _INTEGERS))


@jit
def _run_multiply_add(count, source, target):
    _multiply_add_chains(count, source, target)


@jit
def _run_maximum_add(count, source, target):
    _maximum_add_chains(count, source, target)


@jit
def _run_bfloat16_dot(count, source, target):
    _bfloat16_chains(count, source, target)


@jit
def _run_int8_dot(count, source, target):
    _int8_chains(count, source, target)


@dataclass(frozen=True)
class Probe:
    """An arithmetic probe.

    Parameters
    ----------
    kernel : ``kernel(count, source, target)`` of addresses; it releases the interpreter lock.
    operations : additions and multiplications (or maxima) of one count.
    inputs : (2, lanes) of x and y, in the bits that the instruction reads.
    """

    kernel: Any
    operations: int
    inputs: np.ndarray

    def run(self, count: int) -> np.ndarray:
        """Run `count` steps of all chains and return the chains (chains, lanes)."""
        source = aligned_empty(self.inputs.shape, self.inputs.dtype)
        source[:] = self.inputs
        target = aligned_empty((_CHAINS, self.inputs.shape[1]), self.inputs.dtype)
        self.kernel(count, source.ctypes.data, target.ctypes.data)
        return target


def arithmetic_probes() -> dict[str, Probe]:
    """Return the probes that this CPU can run, by name.

    ``fma``: float32 multiply and add. ``maximum``: float32 maximum and add. ``bfloat16``: dot
    products of pairs of bfloat16 into float32. ``int8``: dot products of four unsigned by four
    signed 8-bit numbers into int32.
    """
    floats = np.full((2, _REGISTER_LANES), 1.0, np.float32)
    floats[1] = 2.0**-20  # chains grow, slowly, and stay ordinary numbers
    each = _CHAINS * _REGISTER_LANES
    probes = {
        "fma": Probe(_run_multiply_add, 2 * each, floats),
        "maximum": Probe(_run_maximum_add, 2 * each, floats),
    }
    features = cpu_features().split(",")
    if _REGISTER_LANES == 16 and "+avx512bf16" in features:
        halves = np.full((2, 32), 0x3F80, np.uint16)  # 1.0
        halves[1] = 0x3580  # 2^-20
        probes["bfloat16"] = Probe(_run_bfloat16_dot, 4 * each, halves.view(np.float32))
    if _REGISTER_LANES == 16 and "+avx512vnni" in features:
        bytes_ = np.full((2, 64), 1, np.int8)
        probes["int8"] = Probe(_run_int8_dot, 8 * each, bytes_.view(np.int32))
    return probes


# --- memory --------------------------------------------------------------------------------------


@jit
def _read(start, count, rounds):
    """Sum of `count` float32 at an address, in steps of four vectors, `rounds` times."""
    element = np.float32(0)
    first, second, third, fourth = zeros(), zeros(), zeros(), zeros()
    for _ in range(rounds):
        where = start
        for _ in range(count // (4 * LANES)):
            first = add(first, load(where, element))
            second = add(second, load(where + 64, element))
            third = add(third, load(where + 128, element))
            fourth = add(fourth, load(where + 192, element))
            where += 256
    return total(add(add(first, second), add(third, fourth)))


@jit
def _read_blocks(start, order, block):
    """Sum of blocks of bytes in some order; each is asked for a few kilobytes ahead of use."""
    element = np.float32(0)
    lanes = zeros()
    ahead, last = max(2, BLOCKS_AHEAD_BYTES // block), len(order) - 1
    for n in range(len(order)):
        following = start + np.int64(order[min(n + ahead, last)]) * block
        for line in range(0, block, 64):
            prefetch(following + line)
        where = start + np.int64(order[n]) * block
        for line in range(0, block, 64):
            lanes = add(lanes, load(where + line, element))
    return total(lanes)


@jit
def _copy(source, target):
    for n in range(len(source)):
        target[n] = source[n]


def read(data: np.ndarray, rounds: int = 1) -> float:
    """Read contiguous bytes (n,) uint8 in order, whole 256 bytes of them; return some sum."""
    return float(_read(data.ctypes.data, data.nbytes // 4, rounds))


def read_blocks(data: np.ndarray, order: np.ndarray, block: int) -> float:
    """Read blocks of contiguous bytes (n,) uint8 by number, `order` (m,) int32; return some sum.

    `block` is a multiple of 64 bytes.
    """
    return float(_read_blocks(data.ctypes.data, order, block))


def copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copy contiguous bytes (n,) uint8, n a multiple of 4."""
    _copy(source.view(np.float32), target.view(np.float32))
