"""Sixteen-lane vectors for Numba: loads, arithmetic, prefetch, the register tile; the cache.

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


def _register_tile() -> tuple[int, int, int]:
    """Rows, vectors and lanes of the register tile that fills this CPU's vector registers."""
    if "+avx512f" in cpu_features():
        return 8, 3, 16  # 24 sums, 3 columns and 1 broadcast of 32 registers
    if "aarch64" in llvm.get_default_triple():
        return 8, 3, 4
    return 6, 2, 8  # 12 sums, 2 columns and 1 broadcast of 16 registers


TILE_ROWS, _TILE_VECTORS, _TILE_LANES = _register_tile()
TILE_COLUMNS = _TILE_VECTORS * _TILE_LANES


# --- compiled code that is kept between processes ------------------------------------------------


@functools.cache
def kernel_digest() -> str:
    """Return a digest of every kernel source and of Numba's version."""
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
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
            return (on_integers if x == int32x16 else on_floats)(builder, *args)

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


# --- the register tile ---------------------------------------------------------------------------

_TILE_VECTOR = ir.VectorType(_FLOAT32, _TILE_LANES)


class _TileEmitter:
    """Emits the loops of one register tile; its sums live in registers throughout."""

    def __init__(self, builder: ir.IRBuilder, left: ir.Value, right: ir.Value) -> None:
        self.builder = builder
        self.left, self.right = left, right
        self.sums: list[ir.Value] = []

    def vector(self, where: ir.Value, number: int) -> ir.Value:
        place = self.builder.gep(where, [ir.Constant(_INT64, number * _TILE_LANES)])
        return self.builder.load(self.builder.bitcast(place, _TILE_VECTOR.as_pointer()), align=4)

    def broadcast(self, value: ir.Value) -> ir.Value:
        undefined = ir.Constant(_TILE_VECTOR, ir.Undefined)
        first = self.builder.insert_element(undefined, value, ir.Constant(_INT32, 0))
        order = ir.Constant(ir.VectorType(_INT32, _TILE_LANES), [0] * _TILE_LANES)
        return self.builder.shuffle_vector(first, undefined, order)

    def scalar(self, where: ir.Value, number: int) -> ir.Value:
        return self.builder.load(self.builder.gep(where, [ir.Constant(_INT64, number)]), align=4)

    def start(self, left_bias: ir.Value, right_bias: ir.Value, constant: ir.Value) -> None:
        """Every sum starts at (b_i + b_j) + c."""
        builder = self.builder
        columns = [self.vector(right_bias, v) for v in range(_TILE_VECTORS)]
        shift = self.broadcast(constant)
        for row in range(TILE_ROWS):
            bias = self.broadcast(self.scalar(left_bias, row))
            self.sums += [builder.fadd(builder.fadd(bias, c), shift) for c in columns]

    def loop(self, count: ir.Value, term: Callable[..., ir.Value]) -> None:
        """Run over `count` columns of both panels, adding ``term(sum, left, right)``."""
        builder = self.builder
        before = builder.block
        body, after = builder.append_basic_block("columns"), builder.append_basic_block("done")
        builder.cbranch(builder.icmp_signed(">", count, ir.Constant(_INT64, 0)), body, after)
        builder.position_at_end(body)
        starts = [ir.Constant(_INT64, 0), self.left, self.right, *self.sums]
        state = [builder.phi(value.type) for value in starts]
        for phi, value in zip(state, starts, strict=True):
            phi.add_incoming(value, before)
        index, left, right, *sums = state
        columns = [self.vector(right, v) for v in range(_TILE_VECTORS)]
        grown = []
        for row in range(TILE_ROWS):
            value = self.broadcast(self.scalar(left, row))
            for v, column in enumerate(columns):
                grown.append(term(builder, sums[row * _TILE_VECTORS + v], value, column))
        following = [
            builder.add(index, ir.Constant(_INT64, 1)),
            builder.gep(left, [ir.Constant(_INT64, TILE_ROWS)]),
            builder.gep(right, [ir.Constant(_INT64, TILE_COLUMNS)]),
            *grown,
        ]
        for phi, value in zip(state, following, strict=True):
            phi.add_incoming(value, builder.block)
        builder.cbranch(builder.icmp_signed("<", following[0], count), body, after)
        builder.position_at_end(after)
        ends = []
        for value, grown_value in zip(starts[1:], following[1:], strict=True):
            phi = builder.phi(value.type)
            phi.add_incoming(value, before)
            phi.add_incoming(grown_value, body)
            ends.append(phi)
        self.left, self.right, *self.sums = ends

    def greatest(self) -> ir.Value:
        """The greatest number of the tile, found in registers."""
        builder, best = self.builder, self.sums[0]
        for value in self.sums[1:]:
            best = _greater(builder, value, best)
        width = _TILE_LANES // 2
        mask = ir.VectorType(_INT32, _TILE_LANES)
        while width:
            order = ir.Constant(mask, [(q + width) % _TILE_LANES for q in range(_TILE_LANES)])
            other = builder.shuffle_vector(best, ir.Constant(_TILE_VECTOR, ir.Undefined), order)
            best = _greater(builder, best, other)
            width //= 2
        return builder.extract_element(best, ir.Constant(_INT32, 0))

    def store(self, tile: ir.Value) -> None:
        for number, value in enumerate(self.sums):
            place = self.builder.gep(tile, [ir.Constant(_INT64, number * _TILE_LANES)])
            self.builder.store(
                value, self.builder.bitcast(place, _TILE_VECTOR.as_pointer()), align=4
            )


def _product_term(builder: ir.IRBuilder, running: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    return builder.call(_fma(builder, _TILE_VECTOR), [x, y, running])


def _plus_maximum(builder: ir.IRBuilder, running: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    return builder.fadd(running, _greater(builder, x, y))


def _minus_maximum(builder: ir.IRBuilder, running: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    return builder.fsub(running, _greater(builder, x, y))


@intrinsic
def register_tile(
    typingctx,
    left,
    right,
    left_bias,
    right_bias,
    products,
    plus,
    minus,
    constant,
    threshold,
    tile,
):
    """Raw scores of TILE_ROWS x TILE_COLUMNS pairs; return the greatest.

    `left` and `right` are addresses of packed panels: for each column TILE_ROWS (or TILE_COLUMNS)
    float32 numbers; first `products` columns that are multiplied, then `plus` whose maxima are
    added and `minus` whose maxima are subtracted. The biases are addresses of as many float32.
    The tile, row by row, is stored at the address `tile` only if its greatest number is at least
    `threshold`. Every number is one chain over the columns in order: it does not depend on the
    size of the tile.
    """

    def codegen(context, builder, signature, args):
        pointer = _FLOAT32.as_pointer()
        numbers = [builder.inttoptr(args[n], pointer) for n in (0, 1, 2, 3, 9)]
        emitter = _TileEmitter(builder, numbers[0], numbers[1])
        emitter.start(numbers[2], numbers[3], args[7])
        emitter.loop(args[4], _product_term)
        emitter.loop(args[5], _plus_maximum)
        emitter.loop(args[6], _minus_maximum)
        best = emitter.greatest()
        with builder.if_then(builder.fcmp_ordered(">=", best, args[8])):
            emitter.store(numbers[4])
        return best

    integers = (types.int64,) * 7
    signature = types.float32(*integers, types.float32, types.float32, types.int64)
    return signature, codegen


@intrinsic
def row_mask(typingctx, row, threshold):
    """Bits of the TILE_COLUMNS numbers of a tile's row, at an address, that reach a threshold."""

    def codegen(context, builder, signature, args):
        emitter = _TileEmitter(builder, args[0], args[0])
        start = builder.inttoptr(args[0], _FLOAT32.as_pointer())
        limit = emitter.broadcast(args[1])
        mask: ir.Value = ir.Constant(_INT64, 0)
        for number in range(_TILE_VECTORS):
            reached = builder.fcmp_ordered(">=", emitter.vector(start, number), limit)
            bits = builder.zext(builder.bitcast(reached, ir.IntType(_TILE_LANES)), _INT64)
            place = ir.Constant(_INT64, number * _TILE_LANES)
            mask = builder.or_(mask, builder.shl(bits, place))
        return mask

    return types.int64(row, threshold), codegen


@intrinsic
def lowest_bit(typingctx, mask):
    """Number of the lowest bit that is set; the mask must not be 0."""

    def codegen(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(mask), codegen
