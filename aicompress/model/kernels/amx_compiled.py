"""Two thin products one after the other in bfloat16, compiled by numba for the matrix unit of x86 processors (AMX).

Import this module only where numba is installed and the processor has AMX and AVX512-BF16.

A tile is 16 rows of 64 bytes. `tdpbf16ps` adds to 16 × 16 sums in float32 the products of 16 rows of 32 bfloat16
numbers with 16 columns of as many, which lie in pairs: (32 / 2, 16, 2). Four tiles hold the sums of 32 rows and 32
columns, and four what is multiplied: two of rows, two of columns.

Layouts: rows as PyTorch has them, matrices (columns / 16, depth / 32, 16, 16, 2) by tiles.
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

from aicompress.model.kernels.llvm import INT64, at, cached, claimed, instruction

SIDE = 32  # rows and columns of a block of four tiles, and numbers of a tile's row
LINE = 64  # bytes of a tile's row, and of a line of the cache
TILE = 16 * LINE
BLOCK = SIDE * SIDE * 4  # bytes of a block's sums

if not {"+amx-bf16", "+amx-tile", "+avx512bf16"} <= set(
    cpu_target.target_context.codegen().magic_tuple()[2].split(",")
):
    raise ImportError("numba compiles for a processor without AMX")


class _Bfloat16(ir.Type):  # type: ignore[misc]
    """LLVM's type, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat16)

    def __hash__(self) -> int:
        return hash("bfloat")


_INT8, _VOID = ir.IntType(8), ir.VoidType()
_FLOATS, _HALVES = ir.VectorType(ir.FloatType(), 16), ir.VectorType(_Bfloat16(), SIDE)
_SUMS = ((0, 0), (1, 0), (2, 16), (3, 16))  # tiles of a block's sums with their first rows; odd ones lie on the right
_ABOVE, _BELOW, _LEFT, _RIGHT = 4, 5, 6, 7  # tiles of rows, and of columns


def _tile(builder: Any, action: str, tile: int, address: Any, offset: int, stride: Any) -> None:
    """Load a tile, or store it."""
    where = at(builder, address, offset, _INT8)
    instruction(builder, f"llvm.x86.tile{action}64", _VOID, _INT8(tile), where, stride)


def _multiply(builder: Any, sums: int, rows: int, columns: int) -> None:
    instruction(builder, "llvm.x86.tdpbf16ps", _VOID, _INT8(sums), _INT8(rows), _INT8(columns))


def _block(typing: Any, rows: Any, stride: Any, columns: Any, depth: Any, sums: Any) -> Any:
    """Sums of 32 rows with 32 columns.

    Args:
        rows, stride: the address of the rows, and bytes from one to the next.
        columns, depth: the address of the columns' tiles, and how many there are: one for 32 numbers.
        sums: where the sums go, (32, 32) float32.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, stride, columns, depth, sums = arguments
        for tile, _ in _SUMS:
            instruction(builder, "llvm.x86.tilezero", _VOID, _INT8(tile))
        before, loop, after = builder.block, builder.append_basic_block("depth"), builder.append_basic_block("after")
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(INT64)
        above = builder.add(rows, builder.mul(step, INT64(LINE)))
        below = builder.add(above, builder.mul(stride, INT64(16)))
        left = builder.add(columns, builder.mul(step, INT64(TILE)))
        right = builder.add(left, builder.mul(depth, INT64(TILE)))
        _tile(builder, "loadd", _LEFT, left, 0, INT64(LINE))
        _tile(builder, "loadd", _ABOVE, above, 0, stride)
        _tile(builder, "loadd", _BELOW, below, 0, stride)
        _multiply(builder, 0, _ABOVE, _LEFT)
        _tile(builder, "loadd", _RIGHT, right, 0, INT64(LINE))
        _multiply(builder, 2, _BELOW, _LEFT)
        _multiply(builder, 1, _ABOVE, _RIGHT)
        _multiply(builder, 3, _BELOW, _RIGHT)
        following = builder.add(step, INT64(1))
        step.add_incoming(INT64(0), before)
        step.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
        builder.position_at_end(after)
        for tile, row in _SUMS:
            _tile(builder, "stored", tile, sums, row * 4 * SIDE + (tile % 2) * LINE, INT64(4 * SIDE))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), emit


def _round(typing: Any, sums: Any, biases: Any, to: Any, stride: Any) -> Any:
    """32 rows of sums and biases, rounded to bfloat16: a line of the cache each.

    Args:
        sums, biases: addresses of (32, 32) and (32,) in float32.
        to, stride: where the first row goes, and bytes to the next.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, biases, to, stride = arguments

        def load(address: Any, offset: int) -> Any:
            value = builder.load(at(builder, address, offset, _FLOATS))
            value.align = 4
            return value

        own = [load(biases, LINE * half) for half in range(2)]
        for row in range(SIDE):
            low, high = (builder.fadd(load(sums, 4 * SIDE * row + LINE * n), bias) for n, bias in enumerate(own))
            rounded = instruction(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", _HALVES, high, low)
            place = at(builder, builder.add(to, builder.mul(stride, INT64(row))), 0, _HALVES)
            builder.store(rounded, place).align = 2
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), emit


def _set_up(typing: Any, address: Any) -> Any:
    """Give this thread's tiles their shapes, by a table of 64 bytes at an address."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        instruction(builder, "llvm.x86.ldtilecfg", _VOID, at(builder, arguments[0], 0, _INT8))
        return context.get_dummy_value()

    return types.void(types.int64), emit


def _give_up(typing: Any) -> Any:
    """Leave the tiles as other code expects them."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        instruction(builder, "llvm.x86.tilerelease", _VOID)
        return context.get_dummy_value()

    return types.void(), emit


_block_of, _rounded = intrinsic(_block), intrinsic(_round)
_set, _released = intrinsic(_set_up), intrinsic(_give_up)


def _product(inputs: Any, shape: Any, matrix: Any, biases: Any, to: Any, sums: Any) -> None:
    """(count, depth) times a matrix of `width` columns, and biases, to (count, width).

    The sums of a block are rounded while the next one is multiplied.

    Args:
        inputs: the address of the first rows, how many of them are there, and the address of the 32 that follow.
        shape: count, depth and width, all multiples of 32.
        matrix, biases: addresses, of tiles and of float32.
        to: where (count, width) go.
        sums: room for two blocks.
    """
    (rows, there, behind), (count, depth, width) = inputs, shape
    stride, wide, tiles = 2 * depth, 2 * width, depth // SIDE
    current, finished = sums, sums + BLOCK
    last_biases, last = biases, to
    for first in range(0, width, SIDE):
        columns = matrix + first // 16 * tiles * TILE
        for row in range(0, count, SIDE):
            place = to + row * wide + 2 * first
            _block_of(rows + row * stride if row < there else behind, stride, columns, tiles, current)
            if first or row:
                _rounded(finished, last_biases, last, wide)
            last_biases, last = biases + 4 * first, place
            current, finished = finished, current
    _rounded(finished, last_biases, last, wide)


_quiet = {"nogil": True, "error_model": "numpy"}
_product_of = cached(numba.njit, _product, **_quiet)


def _two_products(task: Any) -> None:
    """One thread's share of x Rᵀ Lᵀ and biases; `amx.TiledFactors` fills the task."""
    shares, deep, rows, there = task[1], task[2], task[3], task[4]
    columns, rank, outputs = task[5], task[6], task[7]
    x, behind, right, left, biases, zeros, out, shapes = (
        *(task[8], task[9], task[10], task[11]),
        *(task[12], task[13], task[14], task[15]),
    )
    room = np.empty(2 * BLOCK + 2 * deep * rank + LINE, np.uint8)
    sums = (room.ctypes.data + LINE - 1) // LINE * LINE
    inner = sums + 2 * BLOCK
    _set(shapes)
    while True:
        share = claimed(task)
        if share >= shares:
            break
        first = share * deep
        count = min(deep, rows - first)
        given = (x + 2 * first * columns, there - first, behind)
        _product_of(given, (count, columns, rank), right, zeros, inner, sums)
        _product_of((inner, count, inner), (count, rank, outputs), left, biases, out + 2 * first * outputs, sums)
    _released()
    room[0] = 0  # numba frees an array once its name was used for the last time, and another thread may be given it


_entry = functools.partial(numba.cfunc, types.void(types.CPointer(types.int64)))
two_products = cached(_entry, _two_products)
