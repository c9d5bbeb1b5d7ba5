"""Products of 4-bit weights with 8-bit inputs, and the passes between them, compiled by numba for AVX2.

Import this module only where numba is installed and the processor has AVX2 and FMA. All of it is in one file, since
numba's cache knows a function by the file that it is in.

`vpmaddubsw` multiplies unsigned bytes by signed ones and adds neighbours up in 16 bits. Inputs are shifted by 128 to be
unsigned, so that a pair gives at most 2 x 255 x 8 = 4080, and the eight pairs of 32 columns fit into 16 bits. What the
shift adds to a product is a constant of each output, which the sum starts from.

Layouts, for tiles of R rows and panels of PANEL outputs:
    inputs (tiles, in / 4, R, 4) uint8, codes (out / PANEL, in / 4, PANEL, 4) int8, scales (out / PANEL, in / 32, PANEL)
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from aicompress.model.kernels.llvm import INT64 as _INT64
from aicompress.model.kernels.llvm import at, cached, claimed, instruction

GROUP = 32  # columns whose products add up in 16 bits
PANEL = 8  # outputs side by side in a register
TILE = 4  # rows that share what is loaded of a panel: their sums and products just fit into 16 registers

if not {"+avx2", "+fma"} <= set(cpu_target.target_context.codegen().magic_tuple()[2].split(",")):
    raise ImportError("numba compiles for a processor without AVX2")

_INT16, _INT32, _FLOAT = ir.IntType(16), ir.IntType(32), ir.FloatType()
_BYTES, _WORDS = ir.VectorType(ir.IntType(8), 32), ir.VectorType(_INT16, 16)
_DOUBLES, _FLOATS = ir.VectorType(_INT32, PANEL), ir.VectorType(_FLOAT, PANEL)


class _Emitter:
    """Vector instructions at the end of a function that LLVM builds."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        """An instruction of the processor, by LLVM's name of it."""
        return instruction(self.builder, name, result, *arguments)

    def at(self, address: Any, offset: int, kind: Any) -> Any:
        """A pointer to `kind`, some bytes behind an address."""
        return at(self.builder, address, offset, kind)

    def load(self, address: Any, offset: int, kind: Any) -> Any:
        value = self.builder.load(self.at(address, offset, kind))
        value.align = 4
        return value

    def broadcast(self, address: Any, offset: int, kind: Any) -> Any:
        """Four bytes, in all places of a vector."""
        undefined = ir.Constant(kind, ir.Undefined)
        one = self.builder.insert_element(undefined, self.load(address, offset, kind.element), _INT32(0))
        return self.builder.shuffle_vector(one, undefined, ir.Constant(_DOUBLES, [0] * PANEL))

    def sums(self, inputs: Any, codes: Any, rows: int) -> list[Any]:
        """Products of one group of columns: for each row, sums of half a group in 16 bits, two for each output."""
        sums: list[Any] = [None] * rows
        for step in range(GROUP // 4):
            weights = self.load(codes, step * 4 * PANEL, _BYTES)
            for row in range(rows):
                shared = self.builder.bitcast(self.broadcast(inputs, 4 * (step * rows + row), _DOUBLES), _BYTES)
                pairs = self.call("llvm.x86.avx2.pmadd.ub.sw", _WORDS, shared, weights)
                sums[row] = pairs if step == 0 else self.builder.add(sums[row], pairs)
        return sums


def _tile(rows: int) -> Any:
    """The product of one tile of rows with one panel of outputs, as a function for compiled code.

    Its arguments are addresses: of the tile's inputs and their scales (rows,), of the panel's codes, scales, start
    values (PANEL,) and biases (PANEL,); how many groups of columns there are; where the outputs go, and bytes from one
    row of them to the next.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        inputs, input_scales, codes, scales, starts, biases, groups, out, stride = arguments
        vectors, before = _Emitter(builder), builder.block
        start = vectors.load(starts, 0, _FLOATS)
        loop, after = builder.append_basic_block("group"), builder.append_basic_block("after")
        builder.branch(loop)
        builder.position_at_end(loop)
        group = builder.phi(_INT64)
        totals = [builder.phi(_FLOATS) for _ in range(rows)]
        own_inputs = builder.add(inputs, builder.mul(group, _INT64(GROUP * rows)))
        own_codes = builder.add(codes, builder.mul(group, _INT64(GROUP * PANEL)))
        scale = vectors.load(builder.add(scales, builder.mul(group, _INT64(4 * PANEL))), 0, _FLOATS)
        ones = ir.Constant(_WORDS, [1] * 16)
        added = []
        for total, halves in zip(totals, vectors.sums(own_inputs, own_codes, rows), strict=True):
            whole = builder.sitofp(vectors.call("llvm.x86.avx2.pmadd.wd", _DOUBLES, halves, ones), _FLOATS)
            added.append(vectors.call("llvm.fma.v8f32", _FLOATS, whole, scale, total))
        following = builder.add(group, _INT64(1))
        group.add_incoming(_INT64(0), before)
        group.add_incoming(following, loop)
        for total, value in zip(totals, added, strict=True):
            total.add_incoming(start, before)
            total.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, groups), loop, after)
        builder.position_at_end(after)
        bias = vectors.load(biases, 0, _FLOATS)
        for row, value in enumerate(added):
            input_scale = vectors.broadcast(input_scales, 4 * row, _FLOATS)
            to = vectors.at(builder.add(out, builder.mul(stride, _INT64(row))), 0, _FLOATS)
            builder.store(vectors.call("llvm.fma.v8f32", _FLOATS, value, input_scale, bias), to).align = 4
        return context.get_dummy_value()

    def tile(typing: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any, i: Any) -> Any:
        return types.void(*[types.int64] * 9), emit

    return intrinsic(tile)


def _pointer(kind: Any) -> Any:
    """A function for compiled code that takes an address for a pointer to `kind`."""

    def pointer(typing: Any, address: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), emit

    return intrinsic(pointer)


_floats, _words_at = _pointer(types.float32), _pointer(types.uint32)
_one_row, _four_rows = _tile(1), _tile(TILE)


def _multiply(task: Any) -> None:
    """One thread's share of a product; `w4a8.multiply` fills the task."""
    shares, rows, columns, outputs = task[1], task[2], task[3], task[4]  # rows of a tile
    tiles, deep, wide = task[5], task[6], task[7]  # all tiles; tiles and panels of a share
    inputs, input_scales, codes, scales, starts, biases, out = (
        *(task[8], task[9], task[10], task[11]),
        *(task[12], task[13], task[14]),
    )
    groups, stride, below = columns // GROUP, outputs * 4, (tiles + deep - 1) // deep
    while True:
        share = claimed(task)
        if share >= shares:
            return
        first, panel = share % below * deep, share // below * wide
        for p in range(panel, min(panel + wide, outputs // PANEL)):
            own_codes, own_scales = codes + p * columns * PANEL, scales + p * groups * PANEL * 4
            places = p * PANEL * 4
            for t in range(first, min(first + deep, tiles)):
                own, multipliers = inputs + t * rows * columns, input_scales + t * rows * 4
                to = out + t * rows * stride + places
                if rows == 1:
                    _one_row(
                        *(own, multipliers, own_codes, own_scales, starts + places, biases + places),
                        *(groups, to, stride),
                    )
                else:
                    _four_rows(
                        *(own, multipliers, own_codes, own_scales, starts + places, biases + places),
                        *(groups, to, stride),
                    )


def _gelu(row: Any) -> None:
    """x Φ(x) in place, erf as a ratio of polynomials as Eigen has it, within 4e-7."""
    for c in range(row.size):
        x = row[c]
        z = min(max(x * np.float32(0.7071067811865476), np.float32(-4)), np.float32(4))
        s = z * z
        p = np.float32(-2.72614225801306e-10) * s + np.float32(2.77068142495902e-08)
        p = p * s + np.float32(-2.10102402082508e-06)
        p = p * s + np.float32(-5.69250639462346e-05)
        p = p * s + np.float32(-7.34990630326855e-04)
        p = p * s + np.float32(-2.95459980854025e-03)
        p = p * s + np.float32(-1.60960333262415e-02)
        q = np.float32(-1.45660718464996e-05) * s + np.float32(-2.13374055278905e-04)
        q = q * s + np.float32(-1.68282697438203e-03)
        q = q * s + np.float32(-7.37332916720468e-03)
        q = q * s + np.float32(-1.42647390514189e-02)
        half = np.float32(0.5) * x
        row[c] = half + half * (z * p / q)


def _normalize(row: Any, weight: Any, bias: Any, epsilon: Any) -> None:
    """LayerNorm in place."""
    count = np.float32(row.size)
    mean = np.float32(0)
    for c in range(row.size):
        mean += row[c]
    mean /= count
    variance = np.float32(0)
    for c in range(row.size):
        off = row[c] - mean
        variance += off * off
    factor = np.float32(1) / np.sqrt(variance / count + epsilon)
    for c in range(row.size):
        row[c] = (row[c] - mean) * factor * weight[c] + bias[c]


_INFINITY = np.int32(0x7F800000)
_LEAST = np.float32(1.1920929e-07)  # scale of a row of zeros
_SHIFT = np.float32(12582912 + 128)  # 1.5 x 2^23: what is added to it is rounded to an integer in its low bits


def _round(row: Any, values: Any, codes: Any, to: Any) -> Any:
    """Round a row to bytes, four of them to a word; the scale, NaN where the row has one.

    Args:
        values, codes: room for as many numbers as the row has, float32 and uint8.
        to: (in / 4,) words.
    """
    bits, largest = row.view(np.int32), np.int32(0)
    for c in range(row.size):  # floats without their signs order as their bits do, NaN last
        largest = max(largest, np.int32(bits[c] & np.int32(0x7FFFFFFF)))
    values.view(np.int32)[0] = largest
    scale = values[0] if largest > _INFINITY else max(values[0] / np.float32(127.5), _LEAST)
    for c in range(row.size):
        values[c] = min(row[c] / scale, np.float32(127)) + _SHIFT
    rounded = values.view(np.uint32)
    for c in range(row.size):
        codes[c] = np.uint8(rounded[c])
    words = codes.view(np.uint32)
    for k in range(words.size):
        to[k] = words[k]
    return scale


_quiet = {"nogil": True, "error_model": "numpy"}
_gelu_of = cached(numba.njit, _gelu, fastmath={"contract"}, **_quiet)
_normalized = cached(numba.njit, _normalize, fastmath={"contract", "reassoc", "nsz"}, **_quiet)
_rounded = cached(numba.njit, _round, **_quiet)


def _prepare(task: Any) -> None:
    """One thread's share of rows that become inputs; `w4a8.prepare` fills the task."""
    rows, columns, tiles, deep = task[2], task[3], task[4], task[5]
    count, gelu, normed = task[6], task[7] == 1, task[11] != 0  # rows that there are; others stay as they are
    values = numba.carray(_floats(task[8]), (count, columns))
    codes = numba.carray(_words_at(task[9]), (tiles, columns // 4, rows))
    scales = numba.carray(_floats(task[10]), (tiles * rows,))
    residual = numba.carray(_floats(task[11]), (count if normed else 0, columns))
    weight = numba.carray(_floats(task[12]), (columns if normed else 0,))
    bias = numba.carray(_floats(task[13]), (columns if normed else 0,))
    epsilon = numba.carray(_floats(task[14]), (1 if normed else 0,))
    scratch, rounded = np.empty(columns, np.float32), np.empty(columns, np.uint8)
    while True:
        share = claimed(task)
        if share >= task[1]:
            return
        for r in range(share * deep * rows, min((share + 1) * deep * rows, count)):
            row = values[r]
            if gelu:
                _gelu_of(row)
            if normed:
                for c in range(columns):
                    row[c] += residual[r, c]
                _normalized(row, weight, bias, epsilon[0])
            if task[9] != 0:
                scales[r] = _rounded(row, scratch, rounded, codes[r // rows, :, r % rows])


_entry = functools.partial(numba.cfunc, types.void(types.CPointer(types.int64)))
multiply, prepare = cached(_entry, _multiply), cached(_entry, _prepare)
