"""Layers of 4-bit weights that round their inputs to 8 bits per token, on compiled products of integers.

The products are those of `w4a8_compiled`, shared out among threads. Outputs differ from the decoded reference by the
order of sums in float32, and by nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from aicompress.model.kernels.linear import FastLinear
from aicompress.model.kernels.openmp import parallel, run
from aicompress.weights import IntGrouped
from aicompress.weights.stored.int_grouped import spread

INPUT_BITS = 8
GROUP, PANEL, TILE = 32, 8, 4  # columns, outputs and rows that are multiplied at once, as in `w4a8_compiled`
DEEP = 32  # tiles of inputs that stay in the second-level cache while the panels pass
SMALL = 1 << 18  # products of fewer numbers are one thread's


@dataclass(frozen=True)
class Compiled:
    """Entries of the compiled functions, each called with a task."""

    multiply: int
    prepare: int


@cache
def compiled() -> Compiled | None:
    """The compiled functions; None where numba, the processor's instructions or GNU's OpenMP are missing.

    Compiling takes seconds, once: later processes find the code in numba's cache, where that has a folder.
    """
    if not torch.cpu._is_avx2_supported() or parallel() is None:
        return None
    try:
        from aicompress.model.kernels import w4a8_compiled
    except ImportError:
        return None
    return Compiled(w4a8_compiled.multiply.address, w4a8_compiled.prepare.address)


@dataclass(frozen=True)
class RoundedInputs:
    """Inputs as the product takes them.

    Attributes:
        codes: (tiles, in / 4, rows of a tile, 4) uint8, shifted by 128.
        scales: (tiles x rows of a tile,) float32.
        count: rows that there are; the last tile may hold more.
    """

    codes: Tensor
    scales: Tensor
    count: int


@dataclass(frozen=True)
class Norm:
    """LayerNorm of the sum of rows and a residual: (rows, in), contiguous and float32, like weight and bias (in,)."""

    residual: Tensor
    weight: Tensor
    bias: Tensor
    epsilon: Tensor


def rounded_rows(values: Tensor, gelu: bool = False, norm: Norm | None = None) -> RoundedInputs:
    """Round rows (rows, in) to 8 bits each; contiguous, float32.

    Args:
        values: what is computed before they are rounded, is computed in place.
        gelu: of the values.
        norm: of the values.
    """
    count, columns = values.shape
    rows = 1 if count == 1 else TILE
    tiles = -(-count // rows)
    inputs = RoundedInputs(
        torch.empty(tiles, columns // 4, rows, 4, dtype=torch.uint8), torch.empty(tiles * rows), count
    )
    _prepare(values, rows, (inputs.codes.data_ptr(), inputs.scales.data_ptr()), gelu, norm)
    return inputs


def normalize(values: Tensor, norm: Norm) -> None:
    """LayerNorm of rows (rows, in), in place; contiguous, float32."""
    _prepare(values, TILE, (0, 0), False, norm)


def _prepare(values: Tensor, rows: int, to: tuple[int, int], gelu: bool, norm: Norm | None) -> None:
    count, columns = values.shape
    tiles = -(-count // rows)
    threads, deep = _shares(values.numel() * 16, tiles, 16)
    more = (0, 0, 0, 0)
    if norm is not None:
        more = (norm.residual.data_ptr(), norm.weight.data_ptr(), norm.bias.data_ptr(), norm.epsilon.data_ptr())
    kernels = _required()
    run(
        *(kernels.prepare, -(-tiles // deep), threads, rows, columns, tiles, deep, count, int(gelu)),
        *(values.data_ptr(), *to, *more),
    )


def _required() -> Compiled:
    kernels = compiled()
    assert kernels is not None
    return kernels


def _shares(numbers: int, tiles: int, deep: int) -> tuple[int, int]:
    """How many threads work, and how many tiles are one share."""
    threads = 1 if numbers < SMALL else torch.get_num_threads()
    return threads, max(1, min(deep, -(-tiles // threads)))


class PackedMatrix:
    """A matrix of 4-bit codes in the order of the product, with its biases: one byte per weight.

    Args:
        weight: symmetric, of at most 4 bits, in groups that 32 divides.
        bias: (out,) or None.
    """

    def __init__(self, weight: IntGrouped, bias: Tensor | None) -> None:
        out, columns = weight.shape
        self.shape = (out, columns)
        scale = spread(weight.scale.float().expand(out, -1), columns, weight.group_size)[:, ::GROUP]
        codes = weight.codes.view(out // PANEL, PANEL, columns // 4, 4)
        self.codes = codes.transpose(1, 2).contiguous()
        self.scales = scale.view(out // PANEL, PANEL, -1).transpose(1, 2).contiguous()
        sums = weight.codes.view(out, -1, GROUP).sum(2, dtype=torch.int32)
        self.starts = (sums * scale).sum(1).mul_(-128.0)
        self.bias = torch.zeros(out, dtype=torch.float32) if bias is None else bias.detach().float().contiguous()

    @classmethod
    def joined(cls, parts: list[PackedMatrix]) -> PackedMatrix:
        """Matrices of the same inputs as one; the parts become views of it."""
        whole = cls.__new__(cls)
        whole.shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
        for name in ("codes", "scales", "starts", "bias"):
            tensors = [getattr(part, name) for part in parts]
            setattr(whole, name, torch.cat(tensors))
            pieces = getattr(whole, name).split([len(tensor) for tensor in tensors])
            for part, piece in zip(parts, pieces, strict=True):
                setattr(part, name, piece)
        return whole

    def multiply(self, inputs: RoundedInputs) -> Tensor:
        """(rows, out) float32."""
        (out, columns), (tiles, _, rows, _) = self.shape, inputs.codes.shape
        product = torch.empty(tiles * rows, out, dtype=torch.float32)
        threads, deep = _shares(product.numel() * columns // 16, tiles, DEEP)
        panels, below = out // PANEL, -(-tiles // deep)
        wide = max(1, panels * below // (4 * threads)) if threads > 1 else panels
        kernels = _required()
        run(
            *(kernels.multiply, below * -(-panels // wide), threads, rows, columns, out, tiles, deep, wide),
            *(inputs.codes.data_ptr(), inputs.scales.data_ptr(), self.codes.data_ptr(), self.scales.data_ptr()),
            *(self.starts.data_ptr(), self.bias.data_ptr(), product.data_ptr()),
        )
        return product[: inputs.count]


def fits(weight: IntGrouped) -> bool:
    """Whether the compiled product takes a weight."""
    out, columns = weight.shape
    return (
        weight.activation_bits == INPUT_BITS
        and weight.bits <= 4
        and weight.symmetric
        and out % PANEL == 0 == columns % GROUP
        and weight.group_size % GROUP == 0
        and weight.scale.shape[1] * (weight.group_size or columns) == columns
    )


class W4A8Linear(FastLinear):
    """Codes of at most 4 bits in groups of 32 columns, inputs rounded to 8 bits per token: 1 byte per weight."""

    kernel = "int4, inputs of 8 bits"

    def __init__(self, weight: IntGrouped, bias: Tensor | None) -> None:
        super().__init__(weight.shape, bias)
        self.packed = PackedMatrix(weight, bias)

    def multiply(self, x: Tensor) -> Tensor:
        if not len(x):
            return x.new_empty(0, self.out_features)
        return self.packed.multiply(rounded_rows(x.float().contiguous())).to(x.dtype)
