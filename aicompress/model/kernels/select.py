"""Choose the fastest module of this CPU for a stored weight, and say what computes one that has none."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.naming import kind_of, routers_of
from aicompress.model.kernels.amx import TiledFactors
from aicompress.model.kernels.amx import compiled as tile_products
from aicompress.model.kernels.amx import fits as fits_tiles
from aicompress.model.kernels.int4 import INT4_GROUPS, Int4Linear
from aicompress.model.kernels.is_linear import is_linear
from aicompress.model.kernels.linear import (
    INT8_COLUMNS,
    KEPT_BYTES,
    RESIDENT_BYTES,
    SMALL,
    Bfloat16Linear,
    FastLinear,
    Int8Linear,
    Int8WeightLinear,
    KernelLayer,
    Packed,
    PlainLinear,
    RoundedLinear,
    has_exact_int8,
    has_fast_bfloat16,
)
from aicompress.model.kernels.sparse import sparse_linear
from aicompress.model.kernels.submatrix import SubmatrixLinear
from aicompress.model.kernels.two_products import BaseDeltaLinear, LowRankLinear, turned
from aicompress.model.kernels.w4a8 import W4A8Linear, compiled, fits
from aicompress.weights import BaseDelta, Coded, Dense, IntGrouped, LowRank, Sparse, Submatrix, Tied, Weight
from aicompress.weights.decoding import CONVOLUTIONS, factors
from aicompress.weights.stored.int_grouped import spread


class IntEmbedding(KernelLayer):
    """Rows of codes, decoded as they are looked up; codes of at most 4 bits lie two in a byte."""

    kernel = "row gather"

    def __init__(self, weight: IntGrouped, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.group_size = weight.group_size
        self.nibbles = weight.bits <= 4 and self.embedding_dim % 2 == 0
        low, high = weight.codes.chunk(2, dim=1)
        self.codes = (low & 15) | (high << 4) if self.nibbles else weight.codes
        self.scale = weight.scale.expand(self.num_embeddings, -1)
        self.zero = None if weight.zero is None else weight.zero.expand(self.num_embeddings, -1)
        self.dtype = dtype

    @property
    def weight(self) -> Packed:
        return Packed(torch.Size((self.num_embeddings, self.embedding_dim)), self.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        rows, scale = self.codes[flat], self.scale[flat].float()
        zero = None if self.zero is None else self.zero[flat].float()
        values = torch.empty(len(flat), self.embedding_dim, dtype=torch.float32)
        if self.nibbles:
            low, high = values.chunk(2, dim=1)
            low.copy_((rows << 4) >> 4)  # an arithmetic shift restores the sign
            high.copy_(rows >> 4)
        else:
            values.copy_(rows)
        groups = values
        if self.embedding_dim % (self.group_size or self.embedding_dim):
            scale = spread(scale, self.embedding_dim, self.group_size)
            zero = None if zero is None else spread(zero, self.embedding_dim, self.group_size)
        else:
            groups = values.view(len(flat), scale.shape[1], -1)
            scale, zero = scale[..., None], None if zero is None else zero[..., None]
        if zero is not None:
            groups.sub_(zero)
        groups.mul_(scale)
        return values.to(self.dtype).view(*ids.shape, self.embedding_dim)


def is_resident(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's compressed weights fit into the processor's cache as bfloat16."""
    entries = checkpoint.manifest.entries.values()
    return sum(math.prod(entry.dense.shape) * 2 for entry in entries) <= RESIDENT_BYTES


def has_room(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's compressed weights may be held decoded beside their codes: they take at most 1 GiB so."""
    entries = checkpoint.manifest.entries.values()
    return sum(math.prod(entry.dense.shape) * 4 for entry in entries) <= KEPT_BYTES


def running_dtype(checkpoint: Checkpoint, asked: torch.dtype | None) -> torch.dtype | None:
    """The dtype of all floating parameters: what is asked for, the widest where matrices differ, else their own.

    A model multiplies one matrix by the other's outputs, and PyTorch no two dtypes; routers are cast by their models.
    """
    specs = checkpoint.parameters()
    routers = routers_of(specs)
    matrices = {name: spec for name, spec in specs.items() if kind_of(name, spec) not in (None, "conv", "experts")}
    kinds = {spec.dtype for name, spec in matrices.items() if name not in routers} if asked is None else set()
    return functools.reduce(torch.promote_types, kinds) if len(kinds) > 1 else asked


def fast_linear(
    weight: Weight, bias: Tensor | None, dtype: torch.dtype, resident: bool, keep: bool = False, shared: bool = False
) -> FastLinear:
    """The module that multiplies by a stored weight fastest on this CPU.

    Args:
        weight: in any form.
        bias: (out,) or None.
        dtype: of the layer where no kernel serves it.
        resident: all weights of the model fit into the cache as bfloat16, so that their size does not decide.
        keep: the weight may be held decoded beside its codes, for products of many rows.
        shared: other layers hold a part of the weight too, so that it stays one where memory is what counts.
    """
    match weight:
        case LowRank():
            return _low_rank(weight, bias, dtype, resident, keep, shared)
        case Submatrix():
            block = fast_linear(weight.block, None, dtype, resident, keep)
            return SubmatrixLinear(block, weight.shape, weight.kept_rows, weight.kept_columns, bias)
        case BaseDelta():
            if resident and keep:
                return _multiplied_out(weight, bias, dtype, isinstance(weight.base, Dense))
            base = fast_linear(weight.base, bias, dtype, resident, keep)
            delta = LowRank(weight.out, weight.inner)
            return BaseDeltaLinear(base, fast_linear(delta, None, dtype, resident, keep))
        case Tied():
            return fast_linear(weight.source, bias, dtype, resident, keep)
        case Sparse():
            return sparse_linear(weight, bias, dtype)
        case Coded():
            return _integer_linear(weight.grouped(), bias, dtype, resident, keep)
        case Dense():
            return PlainLinear(weight.matrix.to(dtype), bias)
    return PlainLinear(weight.dense().to(dtype), bias)  # decoded once: a kernel for a form is an option


def _low_rank(
    weight: LowRank, bias: Tensor | None, dtype: torch.dtype, resident: bool, keep: bool, shared: bool
) -> FastLinear:
    """Two products; where a second call takes longer than what they save, also the one that they make."""
    inner, outer = weight.inner, weight.out
    plain = isinstance(inner, Dense) and isinstance(outer, Dense)
    size, products = math.prod(weight.shape), weight.rank * sum(weight.shape)
    one = None
    if keep and (resident or (plain and not shared)) and size <= 2 * SMALL:
        one = _multiplied_out(weight, bias, dtype, plain)
        if 10 * products > 9 * size:
            return one
    if isinstance(inner, Dense) and isinstance(outer, Dense):
        return _two_products(inner.matrix.to(dtype), outer.matrix.to(dtype), bias, keep, one)
    first = fast_linear(inner, None, dtype, resident, keep)
    return LowRankLinear(first, fast_linear(outer, bias, dtype, resident, keep), one=one)


def _multiplied_out(weight: Weight, bias: Tensor | None, dtype: torch.dtype, plain: bool) -> FastLinear:
    """One product with the matrix that parts make; those that are plain float32 numbers are not rounded."""
    layer: PlainLinear | Bfloat16Linear
    if has_fast_bfloat16() and (dtype is torch.bfloat16 or not plain):
        layer = Bfloat16Linear(weight.dense(), bias, dtype is torch.float32)
    else:
        layer = PlainLinear(weight.dense().to(dtype), bias)
    layer.kernel = f"{weight.form.replace('_', ' ')}, multiplied out: {layer.kernel}"
    return layer


def _two_products(
    right: Tensor, left: Tensor, bias: Tensor | None, keep: bool, one: FastLinear | None = None
) -> LowRankLinear:
    """Two plain factors; what else is held of them for few inputs or many is so if `keep`."""
    if right.dtype is not torch.bfloat16 or not has_fast_bfloat16():
        return LowRankLinear(PlainLinear(turned(right), None), PlainLinear(turned(left), bias), one=one)
    (rank, columns), out = right.shape, len(left)
    few = (turned(right.float()), turned(left.float())) if keep and rank * (out + columns) <= SMALL // 2 else None
    tiled = keep and fits_tiles(out, rank, columns) and tile_products() is not None
    many = TiledFactors(right, left, bias) if tiled else None
    return LowRankLinear(Bfloat16Linear(right, None), Bfloat16Linear(left, bias), few, many, one)


def _integer_linear(
    weight: IntGrouped, bias: Tensor | None, dtype: torch.dtype, resident: bool, keep: bool
) -> FastLinear:
    bfloat16 = has_fast_bfloat16()
    out, columns = weight.shape
    per_row = weight.scale.shape[1] == 1 and weight.symmetric
    if resident and bfloat16:
        return Bfloat16Linear(weight.dense(), bias, dtype is torch.float32)
    if fits(weight) and compiled() is not None:
        return W4A8Linear(weight, bias)
    if weight.activation_bits == 8 and per_row:
        held = keep and bfloat16 and dtype is torch.bfloat16
        return Int8Linear(weight, bias, 8 if has_exact_int8() else 7, held)
    if weight.activation_bits is not None:
        return RoundedLinear(weight.dense().to(dtype), bias, weight.activation_bits)
    if resident:  # float32 is as fast as it gets here from a few rows on, and small
        return PlainLinear(weight.dense().to(dtype), bias)
    group = next((g for g in INT4_GROUPS if (weight.group_size or columns) % g == 0 == columns % g), 0)
    if weight.bits <= 4 and group and out % 16 == 0:
        return Int4Linear(weight, bias, group, keep)
    if weight.bits > 4 and per_row and bfloat16 and columns % INT8_COLUMNS == 0:
        return Int8WeightLinear(weight, bias, keep)
    return Bfloat16Linear(weight.dense(), bias) if bfloat16 else PlainLinear(weight.dense().to(dtype), bias)


def fast_module(
    module: nn.Module,
    weight: Weight,
    dtype: torch.dtype,
    resident: bool,
    keep: bool = False,
    shared: bool = False,
) -> Any | None:
    """An inference module for a layer with a stored weight; None where no kernel fits the layer's class."""
    if is_linear(module):
        bias: Any = module.bias
        return fast_linear(weight, bias, dtype, resident, keep, shared)
    if type(module) is nn.Embedding and module.max_norm is None and isinstance(weight, IntGrouped):
        return IntEmbedding(weight, dtype)
    return None


def reference_kernel(module: nn.Module, weight: Weight) -> str:
    """Name what a layer computes by its stored weight: parts one after the other, or the decoded matrix.

    Args:
        module: the layer as it runs.
        weight: what is stored.
    """
    from aicompress.model.hf.layers_aicompress import StoredConv, StoredEmbedding, StoredLinear  # with transformers

    chained = len(weight.parts()) if weight.form in CONVOLUTIONS else len(factors(weight.meta(), weight.tensors()))
    if isinstance(module, StoredConv) and module.groups == 1 and (chained == 2 or weight.form in CONVOLUTIONS):
        return f"reference: {chained} convolutions, one after the other"
    if isinstance(module, (StoredLinear, StoredEmbedding)) and chained > 1:
        return f"reference: {chained} factors, one after the other"
    return f"reference: {weight.form.replace('_', ' ')} decoded"
