"""Decoding of stored forms in differentiable tensor operations, for readers without this package.

This file needs torch and numpy only. A checkpoint of the native layout carries a `decoding_aicompress.py`, which is
this file followed by the decoder of every form: the functions under `@decoder`, `@product` and `@convolutions` in the
forms' own files, and those under `@shipped` that they call. A decoder may therefore use torch, numpy and the names of
this file, and nothing else.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Mapping
from functools import reduce
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WORD = 32
LANES = 1024  # of an entropy-coded stream, at most
# Of the trellis: the state that follows each one, after an even and after an odd code.
NEXT_STATE = ((0, 2), (7, 5), (1, 3), (6, 4), (2, 0), (5, 7), (3, 1), (4, 6))
SYMBOLS_PER_BYTE = 1024  # that an entropy-coded stream may stand for: a small file cannot ask for much memory

Any_Function = TypeVar("Any_Function", bound=Callable[..., Any])
Meta = Mapping[str, Any]  # a form's facts from the manifest
Tensors = Mapping[str, Tensor]  # its tensors by suffix; the primary one has the suffix ''
Decoder = Callable[[Meta, Tensors], Tensor]
Factors = list[tuple[Meta, Tensors]]
Kept = tuple[Meta, Tensors, Tensor | None, Tensor | None]  # a stored weight, the rows and the columns it stands at
Kernels = list[Tensor]  # (out, in, *k) each, of the convolution that comes first first

DECODERS: dict[str, Decoder] = {}
PRODUCTS: dict[str, Callable[[Meta, Tensors], Factors]] = {}
SUBMATRICES: dict[str, Callable[[Meta, Tensors], Kept]] = {}
CONVOLUTIONS: dict[str, Callable[[Meta, Tensors], Kernels]] = {}
SHIPPED: dict[str, Callable[..., Any]] = {}
COMPILED: dict[str, Any] = {}


def shipped(function: Any_Function) -> Any_Function:
    """Register a function that decoders call."""
    SHIPPED[function.__name__] = function
    return function


def decoder(form: str) -> Callable[[Decoder], Decoder]:
    """Register the function that gives the matrix (out, in) of a form."""

    def register(function: Decoder) -> Decoder:
        DECODERS[form] = function
        return function

    return register


def product(form: str) -> Callable[[Callable[[Meta, Tensors], Factors]], Callable[[Meta, Tensors], Factors]]:
    """Register the function that gives the factors of a form that is a product, the left one first."""

    def register(function: Callable[[Meta, Tensors], Factors]) -> Callable[[Meta, Tensors], Factors]:
        PRODUCTS[form] = function
        return function

    return register


def submatrix(form: str) -> Callable[[Callable[[Meta, Tensors], Kept]], Callable[[Meta, Tensors], Kept]]:
    """Register the function that gives what is not zero of a form that has whole rows or columns of zeros."""

    def register(function: Callable[[Meta, Tensors], Kept]) -> Callable[[Meta, Tensors], Kept]:
        SUBMATRICES[form] = function
        return function

    return register


def convolutions(form: str) -> Callable[[Callable[[Meta, Tensors], Kernels]], Callable[[Meta, Tensors], Kernels]]:
    """Register the function that gives the kernels of a form that is several convolutions, from its parts' matrices."""

    def register(function: Callable[[Meta, Tensors], Kernels]) -> Callable[[Meta, Tensors], Kernels]:
        CONVOLUTIONS[form] = function
        return function

    return register


def kept(meta: Meta, tensors: Tensors) -> Kept:
    """A stored weight without its rows and columns of zeros, and where the others stand; None for all of them."""
    split = SUBMATRICES.get(meta["form"])
    return (meta, tensors, None, None) if split is None else split(meta, tensors)


def kernels(meta: Meta, tensors: Tensors) -> Kernels:
    """The decoded kernels of a stored weight that is several convolutions; none of any other."""
    if meta["form"] not in CONVOLUTIONS:
        return []
    names = [name for name, part in meta.items() if isinstance(part, Mapping) and name != "out"]
    held: dict[str, dict[str, Tensor]] = {name: {} for name in (*names, "out")}
    for suffix, tensor in tensors.items():
        name, _, rest = suffix.partition("_")
        held[name if name in names else "out"][rest if name in names else suffix] = tensor
    return CONVOLUTIONS[meta["form"]](meta, {name: decode(meta[name], part) for name, part in held.items()})


def composed(chain: Kernels) -> Tensor:
    """The matrix (out, in*prod(k)) of convolutions of which the earlier ones go along the earlier axes."""
    *others, whole = (kernel.flatten(2) for kernel in chain)
    for kernel in reversed(others):  # for some of the rows, what is between is of these rows only
        whole = torch.einsum("orq,rip->oipq", whole, kernel).flatten(2)
    return whole.flatten(1)


def factors(meta: Meta, tensors: Tensors) -> Factors:
    """The stored weights whose product a stored weight is: itself alone, unless its form is a product."""
    split = PRODUCTS.get(meta["form"])
    return [(meta, tensors)] if split is None else split(meta, tensors)


def decode(meta: Meta, tensors: Tensors) -> Tensor:
    """The matrix (out, in) that a stored form stands for.

    Raises:
        ValueError: a form that this version does not know.
    """
    form = meta["form"]
    if form in PRODUCTS:
        return reduce(torch.matmul, [decode(*factor) for factor in factors(meta, tensors)])
    if form in CONVOLUTIONS:
        return composed(kernels(meta, tensors))
    if form not in DECODERS:
        raise ValueError(f"stored form {form!r} is not known to this version of aicompress: upgrade it")
    return DECODERS[form](meta, tensors)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Codes (rows, columns) uint8 of little-endian bit streams (rows, words) int32."""
    if WORD % bits == 0:
        as_bytes = packed.contiguous().view(torch.uint8)
        mask = (1 << bits) - 1
        pieces = [(as_bytes >> (k * bits)) & mask for k in range(8 // bits)]
        codes = pieces[0] if len(pieces) == 1 else torch.stack(pieces, dim=-1)
        return codes.reshape(packed.shape[0], -1)[:, :columns]
    rows, words = packed.shape
    padded = F.pad(packed, (0, -words % bits)).to(torch.int64) & 0xFFFFFFFF
    blocks = padded.reshape(rows, -1, bits)  # 32 codes fill exactly `bits` words
    codes = torch.empty(rows, blocks.shape[1], WORD, dtype=torch.uint8, device=packed.device)
    for j in range(WORD):
        word, shift = divmod(j * bits, WORD)
        value = blocks[..., word] >> shift
        if shift + bits > WORD:
            value = value | (blocks[..., word + 1] << (WORD - shift))
        codes[..., j] = (value & ((1 << bits) - 1)).to(torch.uint8)
    return codes.reshape(rows, -1)[:, :columns]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Undo `unpack`: codes (rows, columns) uint8 -> (rows, words) int32."""
    rows, columns = codes.shape
    places = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    filled = F.pad(codes, (0, -columns % WORD)).cpu()
    stream = ((filled[:, :, None] >> places.cpu()) & 1).reshape(-1).numpy()
    words = torch.from_numpy(np.packbits(stream, bitorder="little")).view(torch.int32).reshape(rows, -1)
    return words[:, : (columns * bits + WORD - 1) // WORD].to(codes.device)


def compiled(function: Callable[..., Any], *called: Callable[..., Any]) -> Any:
    """A function compiled by numba, with the functions that it calls; None where that cannot be imported.

    Later processes find the code in numba's cache: beside the source, or in the user's folder for caches. Functions
    that were passed as arguments would be new ones in every process, and compiled again.
    """
    name = function.__name__
    if name not in COMPILED:
        try:
            numba = importlib.import_module("numba")
            extending = importlib.import_module("numba.extending")
        except ImportError:  # it is not installed, or does not go with the other packages
            return None
        for each in called:
            extending.register_jitable(each)
        try:
            COMPILED[name] = numba.njit(function, nogil=True, cache=True)
        except RuntimeError:  # no folder for a cache
            COMPILED[name] = numba.njit(function, nogil=True)
    return COMPILED[name]


def count_at(raw: Any, at: int) -> tuple[int, int]:
    """A number of a stream, in seven bits a byte, and where the next thing begins."""
    value = shift = 0
    while at < len(raw) and shift < 35:
        value |= (int(raw[at]) & 127) << shift
        at, shift = at + 1, shift + 7
        if raw[at - 1] < 128:
            return value, at
    raise ValueError("a stream of symbols is damaged: a number does not end")


def checksum(symbols: bytes | bytearray) -> int:
    """Two bytes by which damage is noticed."""
    return zlib.crc32(symbols) & 0xFFFF


def unpack_mask(packed: Tensor, count: int) -> Tensor:
    """Booleans (count,) of a bit mask, element i at bit i%8 of byte i//8."""
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.reshape(-1)[:count].bool()


def masked(meta: Meta, tensors: Tensors) -> Tensor:
    """The mask of a sparse form, (out * in,) bool: a bit mask, or one number for every few groups of an N:M mask."""
    out, columns = meta["shape"]
    if "pattern" not in meta:
        return unpack_mask(tensors[""], out * columns)
    kept, size = meta["pattern"]
    packed, count, device = tensors[""], out * columns // size, tensors[""].device
    ways = torch.tensor([sum(1 << p for p in places) for places in combinations(range(size), kept)], device=device)
    fits = {w: max([d for d in range(1, 8 * w + 1) if len(ways) ** d <= 1 << 8 * w], default=0) for w in (1, 2, 4)}
    width, digits = min(((w, d) for w, d in fits.items() if d), key=lambda item: item[0] / item[1])
    value = (packed.reshape(-1, width).long() << (8 * torch.arange(width, device=device))).sum(dim=1)
    digit = (value[:, None] // len(ways) ** torch.arange(digits, device=device)) % len(ways)
    bits = ways[digit.reshape(-1)[:count]]
    mask = ((bits[:, None] >> torch.arange(size, device=device)) & 1).bool().reshape(out, columns)
    if "order" in tensors:
        mask = torch.empty_like(mask).index_copy_(1, tensors["order"].long(), mask)
    return mask.reshape(-1)


def require_kept(mask: Tensor, count: int) -> None:
    """Refuse a mask that keeps another number of elements than are stored: they would all stand in wrong places.

    Raises:
        ValueError: it does.
    """
    if mask.is_meta or torch.compiler.is_compiling():
        return
    kept = int(mask.sum())
    if kept != count:
        raise ValueError(f"{count} elements are stored under a mask that keeps {kept}")


def by_column(values: Tensor, columns: int, size: int) -> Tensor:
    """(rows, groups) -> (rows, columns), or (1, 1) for all; the last group may be narrower than the others."""
    return values.repeat_interleave(size or columns, dim=1)[:, :columns]


def rounded_input(x: Tensor, bits: int | None) -> Tensor:
    """Inputs rounded to `bits` per token, as compressed-tensors does it; gradients pass straight through."""
    if bits is None:
        return x
    wide = x.detach().float()
    half = ((1 << bits) - 1) / 2
    scale = (wide.abs().amax(dim=-1, keepdim=True) / half).clamp(min=torch.finfo(torch.float32).eps)
    rounded = (wide / scale).round().clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1) * scale
    return x + (rounded.to(x.dtype) - x.detach())
