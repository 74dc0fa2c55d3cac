"""The register tile: raw scores of a few rows against many, computed and tested in registers.

Both sides come as panels, rows side by side. A panel is a header of one bias, scale and start a
row, then words of four bytes: for each step one word of every row. What a word of the product
columns holds is the tile's `form`: one float32, two bfloat16, or four int8 numbers. Columns whose
maxima are summed are float32, two words a step, but in the int8 form eight bytes of each row in
turn: there the absolute differences of bytes are summed. The low forms need instructions that not
every CPU has; they serve to find candidates, see `operands`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from fastpair.kernels.simd import _fma, _greater, cpu_features

_INT8, _INT32, _INT64, _FLOAT32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()


def _register_tile() -> tuple[int, int, int]:
    """Rows, vectors and lanes of the register tile that fills this CPU's vector registers."""
    if "+avx512f" in cpu_features():
        return 8, 3, 16  # 24 sums, 3 columns and 1 broadcast of 32 registers
    if "aarch64" in llvm.get_default_triple():
        return 8, 3, 4
    return 6, 2, 8  # 12 sums, 2 columns and 1 broadcast of 16 registers


TILE_ROWS, _VECTORS, _LANES = _register_tile()
TILE_COLUMNS = _VECTORS * _LANES


def _forms() -> dict[str, int]:
    """Names of the forms that this CPU has instructions for -> product columns in a word."""
    features = cpu_features()
    forms = {"float32": 1}
    if _LANES == 16 and "+avx512bf16" in features:
        forms["bfloat16"] = 2
    wide = _LANES == 16 and "+avx512vnni" in features and "+avx512bw" in features
    if wide or (_LANES == 8 and "+avxvnni" in features and "+avx2" in features):
        forms["int8"] = 4
    return forms


FORMS = _forms()

FORM_TAGS = {"float32": np.float32(0), "bfloat16": np.uint16(0), "int8": np.int8(0)}
"""A number whose type tells kernels the form of the panels."""


HEADER = 3
"""Words of a row before its columns in a panel: its bias, its scale, its start."""


# --- types whose names differ between versions of LLVM -------------------------------------------


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite has no class for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_FLOATS, _WORDS = ir.VectorType(_FLOAT32, _LANES), ir.VectorType(_INT32, _LANES)
_BFLOATS = ir.VectorType(_BFloat(), 2 * _LANES) if llvm.llvm_version_info >= (16,) else _WORDS
_ALL_BYTES = ir.VectorType(_INT8, 4 * _LANES)
_BYTES = _ALL_BYTES if llvm.llvm_version_info >= (22,) else _WORDS
_LONGS = ir.VectorType(_INT64, _LANES // 2)

_ROWS_TOGETHER = 4 if _LANES == 16 else 2
"""Rows of the tile whose sums of bytes, twice as wide as others, fit the registers together."""


class _Emitter:
    """Emits the loops of one register tile; its sums live in registers throughout."""

    def __init__(self, builder: ir.IRBuilder, left: ir.Value, right: ir.Value) -> None:
        self.builder = builder
        self.headers = left, right
        self.left = builder.gep(left, [_number(HEADER * TILE_ROWS)])
        self.right = builder.gep(right, [_number(HEADER * TILE_COLUMNS)])
        self.sums: list[ir.Value] = []

    def vector(self, where: ir.Value, place: int, kind: ir.VectorType) -> ir.Value:
        """`kind` at the word `place` after a pointer."""
        pointer = self.builder.gep(where, [_number(place)])
        return self.builder.load(self.builder.bitcast(pointer, kind.as_pointer()), align=4)

    def broadcast(self, where: ir.Value, place: int, kind: ir.VectorType) -> ir.Value:
        """The word `place` after a pointer in every lane."""
        pointer = self.builder.gep(where, [_number(place)])
        value = self.builder.load(self.builder.bitcast(pointer, kind.element.as_pointer()), align=4)
        undefined = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(undefined, value, ir.Constant(_INT32, 0))
        order = ir.Constant(ir.VectorType(_INT32, kind.count), [0] * kind.count)
        return self.builder.shuffle_vector(first, undefined, order)

    def spread(self, value: ir.Value) -> ir.Value:
        """A float32 in every lane."""
        undefined = ir.Constant(_FLOATS, ir.Undefined)
        first = self.builder.insert_element(undefined, value, ir.Constant(_INT32, 0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(_WORDS, [0] * _LANES))

    def biases(self, constant: ir.Value) -> list[ir.Value]:
        """(b_i + b_j) + c of the whole tile."""
        builder, (left, right) = self.builder, self.headers
        columns = [self.vector(right, v * _LANES, _FLOATS) for v in range(_VECTORS)]
        shift, sums = self.spread(constant), []
        for row in range(TILE_ROWS):
            bias = self.broadcast(left, row, _FLOATS)
            sums += [builder.fadd(builder.fadd(bias, c), shift) for c in columns]
        return sums

    def starts(self) -> list[ir.Value]:
        """The integers at which the sums of each column begin."""
        place = 2 * TILE_COLUMNS
        starts = [self.vector(self.headers[1], place + v * _LANES, _WORDS) for v in range(_VECTORS)]
        return starts * TILE_ROWS

    def scale(self, constant: ir.Value) -> None:
        """Turn integer sums into ``sum s_j s_i + ((b_i + c) + b_j)``.

        Where c is so great that a sum may overflow, b_i has been made infinite.
        """
        builder, (left, right) = self.builder, self.headers
        shift, scales, biases = self.spread(constant), [], []
        for v in range(_VECTORS):
            scales.append(self.vector(right, TILE_COLUMNS + v * _LANES, _FLOATS))
            biases.append(self.vector(right, v * _LANES, _FLOATS))
        for row in range(TILE_ROWS):
            bias = builder.fadd(self.broadcast(left, row, _FLOATS), shift)
            scale = self.broadcast(left, TILE_ROWS + row, _FLOATS)
            for v in range(_VECTORS):
                n = row * _VECTORS + v
                scaled = builder.fmul(builder.sitofp(self.sums[n], _FLOATS), scales[v])
                start = builder.fadd(bias, biases[v])
                self.sums[n] = builder.call(_fma(builder, _FLOATS), [scaled, scale, start])

    def loop(
        self, count: ir.Value, words: int, kind: ir.VectorType, term: Callable[..., ir.Value]
    ) -> None:
        """Take `count` steps of `words` words, adding ``term(builder, sum, *lefts, *rights)``."""
        builder = self.builder

        def step(left: ir.Value, right: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            columns = [
                [self.vector(right, w * TILE_COLUMNS + v * _LANES, kind) for w in range(words)]
                for v in range(_VECTORS)
            ]
            grown = []
            for row in range(TILE_ROWS):
                own = [self.broadcast(left, w * TILE_ROWS + row, kind) for w in range(words)]
                for v, column in enumerate(columns):
                    grown.append(term(builder, sums[row * _VECTORS + v], *own, *column))
            return [*self.advance(left, right, words), *grown]

        self.left, self.right, *self.sums = _repeat(
            builder, count, [self.left, self.right, *self.sums], step
        )

    def advance(self, left: ir.Value, right: ir.Value, words: int) -> list[ir.Value]:
        """Where both panels go on after some words of each row."""
        return [
            self.builder.gep(left, [_number(words * TILE_ROWS)]),
            self.builder.gep(right, [_number(words * TILE_COLUMNS)]),
        ]

    def only_if(self, condition: ir.Value, work: Callable[[], None]) -> None:
        """Let `work` change the sums where a condition holds."""
        builder, before, kept = self.builder, self.builder.block, list(self.sums)
        body, after = builder.append_basic_block("some"), builder.append_basic_block("none")
        builder.cbranch(condition, body, after)
        builder.position_at_end(body)
        work()
        last, changed = builder.block, self.sums
        builder.branch(after)
        builder.position_at_end(after)
        self.sums = []
        for old, new in zip(kept, changed, strict=True):
            phi = builder.phi(old.type)
            phi.add_incoming(old, before)
            phi.add_incoming(new, last)
            self.sums.append(phi)

    def differences(self, plus: ir.Value, minus: ir.Value, factor: ir.Value) -> None:
        """Add `factor` times the absolute differences of bytes, some rows after the others."""
        builder, vectors = self.builder, 2 * _VECTORS
        nothing = ir.Constant(_LONGS, [0] * _LONGS.count)
        for first in range(0, TILE_ROWS, _ROWS_TOGETHER):
            rows = range(first, first + _ROWS_TOGETHER)

            def step(
                left: ir.Value,
                right: ir.Value,
                *sums: ir.Value,
                rows: range = rows,
                grow: Callable[..., ir.Value],
            ) -> list[ir.Value]:
                columns = [self.vector(right, v * _LANES, _LONGS) for v in range(vectors)]
                grown = []
                for n, row in enumerate(rows):
                    own = self.broadcast(left, 2 * row, _LONGS)
                    for v, column in enumerate(columns):
                        grown.append(grow(sums[n * vectors + v], _apart(builder, own, column)))
                return [*self.advance(left, right, 2), *grown]

            state = [self.left, self.right, *[nothing] * (len(rows) * vectors)]
            for count, grow in ((plus, builder.add), (minus, builder.sub)):
                state = _repeat(builder, count, state, functools.partial(step, grow=grow))
            self.add_halves(rows, state[2:], factor)

    def add_halves(self, rows: range, sums: list[ir.Value], factor: ir.Value) -> None:
        """Add `factor` times integers, of which two vectors belong to one of the tile."""
        builder, spread = self.builder, self.spread(factor)
        half = ir.VectorType(_INT32, _LANES // 2)
        order = ir.Constant(_WORDS, list(range(_LANES)))
        for n, row in enumerate(rows):
            for v in range(_VECTORS):
                place = (n * _VECTORS + v) * 2
                parts = [builder.trunc(sums[place + side], half) for side in (0, 1)]
                value = builder.sitofp(builder.shuffle_vector(*parts, order), _FLOATS)
                own = row * _VECTORS + v
                self.sums[own] = builder.call(
                    _fma(builder, _FLOATS), [value, spread, self.sums[own]]
                )

    def tests(self, floors: ir.Value, others: ir.Value) -> list[ir.Value]:
        """For each sum, whether it reaches the lower of its row's and its column's floor."""
        builder = self.builder
        columns = [self.vector(others, v * _LANES, _FLOATS) for v in range(_VECTORS)]
        tests = []
        for row in range(TILE_ROWS):
            own = self.broadcast(floors, row, _FLOATS)
            for v, column in enumerate(columns):
                lower = builder.select(builder.fcmp_ordered("<", own, column), own, column)
                tests.append(builder.fcmp_ordered(">=", self.sums[row * _VECTORS + v], lower))
        return tests

    def any(self, tests: list[ir.Value]) -> ir.Value:
        """Whether a test is passed by any lane, found in registers."""
        passed = functools.reduce(self.builder.or_, tests)
        bits = ir.IntType(_LANES)
        return self.builder.icmp_unsigned(
            "!=", self.builder.bitcast(passed, bits), ir.Constant(bits, 0)
        )

    def store(self, tests: list[ir.Value], tile: ir.Value, masks: ir.Value) -> None:
        """Write the tile row by row, and for each row the bits of the columns that passed."""
        builder = self.builder
        for row in range(TILE_ROWS):
            mask = _number(0)
            for v in range(_VECTORS):
                n = row * _VECTORS + v
                place = builder.gep(tile, [_number(row * TILE_COLUMNS + v * _LANES)])
                builder.store(self.sums[n], builder.bitcast(place, _FLOATS.as_pointer()), align=4)
                bits = builder.zext(builder.bitcast(tests[n], ir.IntType(_LANES)), _INT64)
                mask = builder.or_(mask, builder.shl(bits, _number(v * _LANES)))
            builder.store(mask, builder.gep(masks, [_number(row)]), align=8)


def _number(value: int) -> ir.Constant:
    return ir.Constant(_INT64, value)


def _repeat(
    builder: ir.IRBuilder,
    count: ir.Value,
    starts: list[ir.Value],
    step: Callable[..., list[ir.Value]],
) -> list[ir.Value]:
    """Emit a loop of `count` steps, each of which turns values into their followers."""
    before = builder.block
    body, after = builder.append_basic_block("step"), builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed(">", count, _number(0)), body, after)
    builder.position_at_end(body)
    starts = [_number(0), *starts]
    state = [builder.phi(value.type) for value in starts]
    for phi, value in zip(state, starts, strict=True):
        phi.add_incoming(value, before)
    following = [builder.add(state[0], _number(1)), *step(*state[1:])]
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
    return ends


def _function(
    builder: ir.IRBuilder, name: str, result: ir.Type, factor: ir.Type
) -> Callable[[ir.Value, ir.Value, ir.Value], ir.Value]:
    """A function of LLVM that adds the products of two vectors of `factor` to sums."""
    kind = ir.FunctionType(result, [result, factor, factor])
    function = cgutils.get_or_insert_function(builder.module, kind, name)

    def call(running: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
        return builder.call(
            function, [running, builder.bitcast(x, factor), builder.bitcast(y, factor)]
        )

    return call


def _product(builder: ir.IRBuilder, running: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    return builder.call(_fma(builder, _FLOATS), [x, y, running])


def _bfloat_product(builder: ir.IRBuilder, running: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    return _function(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, _BFLOATS)(running, x, y)


def _byte_product(builder: ir.IRBuilder, running: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    name = f"llvm.x86.avx512.vpdpbusd.{32 * _LANES}"
    return _function(builder, name, _WORDS, _BYTES)(running, x, y)


def _apart(builder: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """Sums of the absolute differences of eight bytes each."""
    name = "llvm.x86.avx512.psad.bw.512" if _LANES == 16 else "llvm.x86.avx2.psad.bw"
    kind = ir.FunctionType(_LONGS, [_ALL_BYTES] * 2)
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [builder.bitcast(z, _ALL_BYTES) for z in (x, y)])


def _two_maxima(builder: ir.IRBuilder, x: tuple[ir.Value, ...]) -> ir.Value:
    return builder.fadd(_greater(builder, x[2], x[0]), _greater(builder, x[3], x[1]))


def _plus_maxima(builder: ir.IRBuilder, running: ir.Value, *x: ir.Value) -> ir.Value:
    return builder.fadd(running, _two_maxima(builder, x))


def _minus_maxima(builder: ir.IRBuilder, running: ir.Value, *x: ir.Value) -> ir.Value:
    return builder.fsub(running, _two_maxima(builder, x))


@intrinsic
def register_tile(
    typingctx, form, left, right, products, plus, minus, constant, step, floors, others, tile, masks
):
    """Raw scores of TILE_ROWS x TILE_COLUMNS pairs; return whether one reaches a floor.

    `form` is a number of `FORM_TAGS`; `left` and `right` are the addresses of panels of that form:
    `products` words whose columns are multiplied, then `plus` and `minus` couples of float32
    words, whose maxima are added together and then to, or taken from, the sum; in the int8 form of
    eight bytes, whose absolute differences count `step` each. `floors` and
    `others` are the addresses of TILE_ROWS and TILE_COLUMNS float32, what a number must reach to
    matter to its row, or to its column. Only if one does, the tile is stored row by row at the
    address `tile`, and at `masks` TILE_ROWS int64 whose bits say which columns do. Every
    number is one chain over the columns in order, and keeps its bits when left and right change
    places (float32 form).
    """
    tag = {types.float32: "float32", types.uint16: "bfloat16", types.int8: "int8"}[form]

    def codegen(context, builder, signature, args):
        pointer = _FLOAT32.as_pointer()
        first, second, floor, store = (builder.inttoptr(args[n], pointer) for n in (1, 2, 8, 10))
        emitter = _Emitter(builder, first, second)
        if tag == "int8":
            emitter.sums = emitter.starts()
            emitter.loop(args[3], 1, _WORDS, _byte_product)
            emitter.scale(args[6])
            some = builder.icmp_signed(">", builder.add(args[4], args[5]), _number(0))
            emitter.only_if(some, lambda: emitter.differences(args[4], args[5], args[7]))
        else:
            emitter.sums = emitter.biases(args[6])
            kind, term = (_FLOATS, _product) if tag == "float32" else (_WORDS, _bfloat_product)
            emitter.loop(args[3], 1, kind, term)
            emitter.loop(args[4], 2, _FLOATS, _plus_maxima)
            emitter.loop(args[5], 2, _FLOATS, _minus_maxima)
        tests = emitter.tests(floor, builder.inttoptr(args[9], pointer))
        reached = emitter.any(tests)
        with builder.if_then(reached):
            emitter.store(tests, store, builder.inttoptr(args[11], _INT64.as_pointer()))
        return reached

    integers = (types.int64,) * 5
    signature = types.boolean(form, *integers, *(types.float32,) * 2, *(types.int64,) * 4)
    return signature, codegen
