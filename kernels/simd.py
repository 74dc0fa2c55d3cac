"""Sixteen-lane vectors for Numba: loads, arithmetic, prefetch; the cache of compiled kernels.

Numba has no vector type of its own. `Vector` is one whose values are LLVM vectors, so that loops
over whole vectors are written in plain Python and LLVM maps them to AVX-512, AVX2 or NEON
registers. Addresses are integers; nothing here checks bounds.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core import config as numba_config
from numba.extending import intrinsic, models, register_model

from fastpair.kernels import LANES

config: Any = numba_config  # its settings are made at run time

_BIT8, _INT16, _INT32, _INT64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FLOAT32, _HALF = ir.FloatType(), ir.HalfType()


def cpu_features() -> str:
    """Return the features that Numba compiles for, as LLVM writes them (``+avx2,+fma,...``)."""
    if config.CPU_FEATURES is not None:
        return str(config.CPU_FEATURES)
    return str(llvm.get_host_cpu_features().flatten())


# --- compiled code that is kept between processes ------------------------------------------------


@functools.cache
def kernel_digest() -> str:
    """Return a digest of every source that Numba compiles, and of its version."""
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        if not source.name.startswith("gpu"):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def cache_folder() -> Path | None:
    """Return the folder of compiled kernels, or None where no folder can be written.

    Numba notices when a cached function's own file changes, but not when a helper in another file
    does. The folder therefore carries the digest of all sources.
    """
    home = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(home).expanduser() / "fastpair" / f"kernels-{kernel_digest()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None


@contextmanager
def _numba_cache_at(folder: Path) -> Iterator[None]:
    previous = config.CACHE_DIR
    config.CACHE_DIR = str(folder)
    try:
        yield
    finally:
        config.CACHE_DIR = previous


def jit(function: Callable[..., Any]) -> Any:
    """Compile without the interpreter lock, on first call, and keep the machine code."""
    folder = cache_folder()
    if folder is None:
        return numba.njit(nogil=True, error_model="numpy")(function)
    with _numba_cache_at(folder):
        return numba.njit(nogil=True, error_model="numpy", cache=True)(function)


def jit_generator(function: Callable[..., Any]) -> Any:
    """Compile a generator; its code is kept with each function that loops over it.

    A generator that Numba reads from its cache cannot be looped over by a function that it must
    still compile, so it has no cache of its own.
    """
    return numba.njit(nogil=True, error_model="numpy")(function)


@jit
def _nothing():
    return 0


# Numba puts off until the first call what it knows of Python and NumPy, and then adds types to a
# register that calls of other threads may be going through. Whoever imports a kernel waits for it.
_nothing()


# --- the vector types ----------------------------------------------------------------------------


class Vector(types.Type):
    """Sixteen lanes of one element type."""

    def __init__(self, name: str, element: ir.Type) -> None:
        super().__init__(name=f"{name}x{LANES}")
        self.llvm = ir.VectorType(element, LANES)


class _Float32Vector(Vector):
    def __init__(self) -> None:
        super().__init__("float32", _FLOAT32)


class _Int32Vector(Vector):
    def __init__(self) -> None:
        super().__init__("int32", _INT32)


float32x16 = _Float32Vector()
int32x16 = _Int32Vector()


@register_model(_Float32Vector)
@register_model(_Int32Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


def _constant(vector: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def _fma(builder: ir.IRBuilder, vector: ir.VectorType) -> ir.Function:
    kind = ir.FunctionType(vector, [vector] * 3)
    return cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{vector.count}f32")


# --- what kernels call ---------------------------------------------------------------------------


@intrinsic
def address(typingctx, array):
    """Address of an array's first element."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, _INT64)

    return types.int64(array), codegen


@intrinsic
def prefetch(typingctx, where):
    """Ask for the cache line at an address."""

    def codegen(context, builder, signature, args):
        pointer = _BIT8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, _INT32, _INT32, _INT32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        flags = [ir.Constant(_INT32, flag) for flag in (0, 3, 1)]  # read, keep, data
        builder.call(function, [builder.inttoptr(args[0], pointer), *flags])
        return context.get_dummy_value()

    return types.none(where), codegen


@intrinsic
def zeros(typingctx):
    """Sixteen float32 zeros."""

    def codegen(context, builder, signature, args):
        return _constant(float32x16.llvm, 0.0)

    return float32x16(), codegen


@intrinsic
def integer_zeros(typingctx):
    """Sixteen int32 zeros."""

    def codegen(context, builder, signature, args):
        return _constant(int32x16.llvm, 0)

    return int32x16(), codegen


@intrinsic
def load(typingctx, where, element):
    """Sixteen columns at an address, widened exactly to float32, or to int32 from int8.

    `element` is a number whose type says how columns are stored: float32, int16 (float16, which
    Numba lacks on a CPU), uint16 (bfloat16) or int8.
    """
    stored = {
        types.float32: _FLOAT32,
        types.int16: _HALF,
        types.uint16: _INT16,
        types.int8: _BIT8,
    }[element]
    result = int32x16 if element == types.int8 else float32x16

    def codegen(context, builder, signature, args):
        raw = ir.VectorType(stored, LANES)
        value = builder.load(builder.inttoptr(args[0], raw.as_pointer()), align=1)
        if stored is _HALF:
            return builder.fpext(value, result.llvm)
        if stored is _BIT8:
            return builder.sext(value, result.llvm)
        if stored is _INT16:
            wide = builder.zext(value, int32x16.llvm)
            return builder.bitcast(builder.shl(wide, _constant(int32x16.llvm, 16)), float32x16.llvm)
        return value

    return result(where, element), codegen


@intrinsic
def load_float32(typingctx, where):
    """One float32 at an address."""

    def codegen(context, builder, signature, args):
        return builder.load(builder.inttoptr(args[0], _FLOAT32.as_pointer()), align=4)

    return types.float32(where), codegen


@intrinsic
def fma(typingctx, x, y, z):
    """x * y + z, rounded once (exact for int32)."""

    def codegen(context, builder, signature, args):
        if x == int32x16:
            return builder.add(builder.mul(args[0], args[1]), args[2])
        return builder.call(_fma(builder, float32x16.llvm), args)

    return x(x, y, z), codegen


def _binary(
    name: str, on_floats: Callable[..., Any], on_integers: Callable[..., Any], meaning: str
) -> Any:
    def operation(typingctx, x, y):
        def codegen(context, builder, signature, args):
            return (on_floats if x == float32x16 else on_integers)(builder, *args)

        return x(x, y), codegen

    operation.__name__ = name
    operation.__doc__ = meaning
    return intrinsic(operation)


def _greater(builder: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def _greater_integer(builder: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return builder.select(builder.icmp_signed(">", x, y), x, y)


add = _binary("add", ir.IRBuilder.fadd, ir.IRBuilder.add, "x + y, lane by lane.")
subtract = _binary("subtract", ir.IRBuilder.fsub, ir.IRBuilder.sub, "x - y, lane by lane.")
maximum = _binary("maximum", _greater, _greater_integer, "The greater of x and y, lane by lane.")


@intrinsic
def total(typingctx, x):
    """Sum of the lanes as a tree: lane q with q + 8, then q + 4, q + 2, q + 1."""
    result = types.int32 if x == int32x16 else types.float32

    def codegen(context, builder, signature, args):
        value = args[0]
        mask = ir.VectorType(_INT32, LANES)
        undefined = ir.Constant(x.llvm, ir.Undefined)
        for width in (8, 4, 2, 1):
            order = ir.Constant(mask, [(lane + width) % LANES for lane in range(LANES)])
            other = builder.shuffle_vector(value, undefined, order)
            value = builder.add(value, other) if x == int32x16 else builder.fadd(value, other)
        return builder.extract_element(value, ir.Constant(_INT32, 0))

    return result(x), codegen


# --- what the pair kernel needs besides ----------------------------------------------------------


def jit_inline(function: Callable[..., Any]) -> Any:
    """Compile into each caller, with its cache: a call would cost as much as a short pair."""
    return numba.njit(nogil=True, error_model="numpy", forceinline=True)(function)


class _Int16Vector(Vector):
    """Two int16 for each of the sixteen lanes."""

    def __init__(self) -> None:
        super().__init__("2xint16", _INT16)
        self.llvm = ir.VectorType(_INT16, 2 * LANES)


int16x32 = _Int16Vector()
register_model(_Int16Vector)(_VectorModel)


def _load_bytes(builder: ir.IRBuilder, where: ir.Value, columns: int) -> ir.Value:
    raw = ir.VectorType(_BIT8, columns)
    value = builder.load(builder.inttoptr(where, raw.as_pointer()), align=1)
    return builder.sext(value, ir.VectorType(_INT16, columns))


@intrinsic
def load_bytes(typingctx, where):
    """Thirty-two int8 columns at an address, as int16."""

    def codegen(context, builder, signature, args):
        return _load_bytes(builder, args[0], 2 * LANES)

    return int16x32(where), codegen


@intrinsic
def load_last_bytes(typingctx, where):
    """Sixteen int8 columns at an address, as int16, and sixteen zeros."""

    def codegen(context, builder, signature, args):
        value = _load_bytes(builder, args[0], LANES)
        order = ir.Constant(ir.VectorType(_INT32, 2 * LANES), list(range(2 * LANES)))
        return builder.shuffle_vector(value, _constant(value.type, 0), order)

    return int16x32(where), codegen


@intrinsic
def ones(typingctx):
    """Thirty-two int16 ones."""

    def codegen(context, builder, signature, args):
        return _constant(int16x32.llvm, 1)

    return int16x32(), codegen


@intrinsic
def add_products(typingctx, x, y, lanes):
    """Lanes of int32 plus the products of int16, two a lane: one instruction where a CPU has it.

    LLVM knows this pattern: it becomes vpdpwssd, vpmaddwd or their like, without a word of ours.
    """

    def codegen(context, builder, signature, args):
        wide = ir.VectorType(_INT32, 2 * LANES)
        product = builder.mul(builder.sext(args[0], wide), builder.sext(args[1], wide), ("nsw",))
        undefined = ir.Constant(wide, ir.Undefined)
        mask = ir.VectorType(_INT32, LANES)
        halves = [
            builder.shuffle_vector(
                product, undefined, ir.Constant(mask, list(range(start, 2 * LANES, 2)))
            )
            for start in (0, 1)
        ]
        return builder.add(builder.add(*halves), args[2])

    return int32x16(x, y, lanes), codegen


@intrinsic
def prefetch_far(typingctx, where):
    """Ask for the cache line at an address, into the second level of cache.

    It can wait for more lines at a time than the first level: random rows come twice as fast.
    """

    def codegen(context, builder, signature, args):
        pointer = _BIT8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, _INT32, _INT32, _INT32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        flags = [ir.Constant(_INT32, flag) for flag in (0, 2, 1)]  # read, second level, data
        builder.call(function, [builder.inttoptr(args[0], pointer), *flags])
        return context.get_dummy_value()

    return types.none(where), codegen


@intrinsic
def load_integer(typingctx, where, kind):
    """The integer at an address, as int64; `kind` is a number of its type, int32 or int64."""

    def codegen(context, builder, signature, args):
        stored = ir.IntType(kind.bitwidth)
        value = builder.load(builder.inttoptr(args[0], stored.as_pointer()), align=1)
        return builder.sext(value, _INT64) if kind.bitwidth < 64 else value

    return types.int64(where, kind), codegen


@intrinsic
def store_float32(typingctx, where, value):
    """Write one float32 to an address."""

    def codegen(context, builder, signature, args):
        builder.store(args[1], builder.inttoptr(args[0], _FLOAT32.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(where, types.float32), codegen


# --- numbers at addresses, bits ------------------------------------------------------------------


@intrinsic
def get(typingctx, where, like):
    """A number at an address, of the type of another."""

    def codegen(context, builder, signature, args):
        kind = context.get_value_type(like)
        return builder.load(builder.inttoptr(args[0], kind.as_pointer()), align=4)

    return like(where, like), codegen


@intrinsic
def put(typingctx, where, value):
    """Store a number at an address."""

    def codegen(context, builder, signature, args):
        kind = context.get_value_type(value)
        builder.store(args[1], builder.inttoptr(args[0], kind.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(where, value), codegen


@intrinsic
def bits_of(typingctx, value):
    """The bits of a float32, as an int32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], _INT32)

    return types.int32(types.float32), codegen


@intrinsic
def float_of(typingctx, bits):
    """The float32 of some bits, an int32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], _FLOAT32)

    return types.float32(types.int32), codegen


@intrinsic
def lowest_bit(typingctx, mask):
    """Number of the lowest bit that is set; the mask must not be 0."""

    def codegen(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(mask), codegen


# --- powers of two, for vectors of any width ------------------------------------------------------

_POWER_OF_TWO = (
    0.6931472,
    0.24022648,
    0.055503324,
    0.009618437,
    0.0013398875,
    0.00015353362,
)
"""Of ``2^r = 1 + r (c1 + r (c2 + ...))``, for abs(r) <= 1/2 with the least relative error: 2e-9."""

_ROUNDER = 1.5 * 2.0**23
"""Added to a small float32, it leaves the nearest integer in the last bits."""


def power_of_two(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Emit 2^x of a vector of float32 at most 0: within 1 unit in the last place.

    What is below the least normal float32, 2^-126, becomes 0 from about 2^-126.5 on; NaN becomes 0.
    x is split into an integer and a rest of at most 1/2, whose power is a polynomial in fused
    multiply-adds; so its bits are the same on every CPU.
    """
    floats = x.type
    integers = ir.VectorType(_INT32, floats.count)
    x = _greater(builder, x, _constant(floats, -127.0))
    shifted = builder.fadd(x, _constant(floats, _ROUNDER))
    rest = builder.fsub(x, builder.fsub(shifted, _constant(floats, _ROUNDER)))
    power = _constant(floats, float(np.float32(_POWER_OF_TWO[-1])))
    for factor in (*_POWER_OF_TWO[-2::-1], 1.0):
        constant = _constant(floats, float(np.float32(factor)))
        power = builder.call(_fma(builder, floats), [power, rest, constant])
    exponent = builder.add(builder.bitcast(shifted, integers), _constant(integers, 127))
    scale = builder.bitcast(builder.shl(exponent, _constant(integers, 23)), floats)
    return builder.fmul(power, scale)
