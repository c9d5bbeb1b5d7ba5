"""Inference modules for stored forms, each on the fastest CPU kernel that PyTorch has for it.

Kernels: oneDNN's int8 matrix product, `_weight_int8pack_mm`, `_weight_int4pack_mm_for_cpu`, and bfloat16 weights packed
by oneDNN. Speeds in the docstrings are against float32 `F.linear`, 2048×2048, on a CPU with AMX.
Outputs have the dtype of the inputs. Numerics differ from the decoded reference by the rounding of inputs and outputs
to bfloat16 (relative error below 1e-2 of a layer's output), or of inputs to 8 bits per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aicompress.errors import Refused
from aicompress.model.kernels.prepacked import Prepacked
from aicompress.weights import IntGrouped
from aicompress.weights.decoding import rounded_input

RESIDENT_BYTES = 64 << 20  # bfloat16 weights up to this size stay in the last-level cache between layers
KEPT_BYTES = 1 << 30  # decoded weights up to this size are held, for products of many rows
INT8_COLUMNS = 16  # the kernel for 8-bit weights reads as many at once, beyond the end of a row that is no multiple
INT8_ROWS = 2
INT8_KEPT_ROWS = 8  # rounding the inputs of more rows takes longer, on several threads, than integers save
FEW = 11 << 17  # multiply-adds of a thread that are over in float32 before inputs are in bfloat16
SMALL = 1 << 19  # weights of a layer that is small
_bfloat16_product = torch.ops.mkldnn._linear_pointwise.default  # looked up once: at 16 rows a lookup shows


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices natively."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@cache
def has_exact_int8() -> bool:
    """Whether oneDNN's int8 product is exact on this CPU: without VNNI, sums of two products saturate at 16 bits."""
    columns = 64
    packed = torch.ops.onednn.qlinear_prepack(torch.full((16, columns), 127, dtype=torch.int8), None)
    scale, zero = torch.ones(16), torch.zeros(16, dtype=torch.int64)
    for rows in (1, 16):
        codes = torch.full((rows, columns), 255, dtype=torch.uint8)
        product = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 128, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        if not bool((product == columns * 127 * 127).all()):
            return False
    return True


@dataclass(frozen=True)
class Packed:
    """What model code may ask of a layer's `weight` whose values exist packed only; no operation takes it."""

    shape: torch.Size
    dtype: torch.dtype
    _is_hf_initialized: ClassVar[bool] = True  # transformers' initialization leaves such a weight alone

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


def refuse_gradients(x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise Refused("this layer runs on an inference kernel", "load the checkpoint with trainable()")


class KernelLayer(nn.Module):
    """A layer in the form that its kernel takes, which no checkpoint has."""

    def _save_to_state_dict(self, *args: Any, **options: Any) -> None:
        """Refuse: a state without the layer would be taken for the whole one."""
        raise Refused(
            f"{type(self).__name__} runs on a kernel for inference: it has no state that could be saved",
            'load the checkpoint with kernels="reference", or copy its files',
        )


class FastLinear(KernelLayer):
    """A linear layer for inference; subclasses multiply a matrix (rows, in)."""

    kernel = "dense"

    def __init__(self, shape: tuple[int, int], bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Packed:
        dtype = torch.float32 if self.bias is None else self.bias.dtype
        return Packed(torch.Size((self.out_features, self.in_features)), dtype)

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradients(x)
        rows = self.multiply(x.reshape(-1, self.in_features))
        return rows.view(*x.shape[:-1], self.out_features)

    def multiply(self, x: Tensor) -> Tensor:
        """(rows, in) -> (rows, out) in the dtype of x, bias added."""
        raise TypeError(f"{type(self).__name__} does not multiply")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, kernel={self.kernel!r}"


class PlainLinear(FastLinear):
    """A dense matrix: a factor, or what no kernel serves."""

    def __init__(self, matrix: Tensor, bias: Tensor | None) -> None:
        super().__init__((matrix.shape[0], matrix.shape[1]), bias)
        self.matrix = nn.Parameter(matrix, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in one call, as `nn.Linear`: at one token a reshape costs a tenth of the product."""
        refuse_gradients(x)
        return self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        matrix = self.matrix
        return F.linear(x, matrix if matrix.dtype is x.dtype else matrix.to(x.dtype), self.bias)


class RoundedLinear(PlainLinear):
    """A dense matrix whose inputs are rounded per token, as the decoded reference does it."""

    def __init__(self, matrix: Tensor, bias: Tensor | None, bits: int) -> None:
        super().__init__(matrix, bias)
        self.bits = bits
        self.kernel = f"dense, inputs of {bits} bits"

    def multiply(self, x: Tensor) -> Tensor:
        return super().multiply(rounded_input(x, self.bits))


class Bfloat16Linear(FastLinear):
    """Weights decoded to bfloat16 and packed once by oneDNN: 2 bytes per weight; 5x from 8 rows on, 1x at one.

    Args:
        wide: inputs are in float32. A small layer is then held in float32 too, for products of a few rows.

    Attributes:
        output: dtype of the outputs where the next layer takes it; None is the inputs' own.
        activation: computed on the product before it is rounded: none or gelu.
    """

    kernel = "bfloat16"

    def __init__(self, matrix: Tensor, bias: Tensor | None, wide: bool = False) -> None:
        super().__init__((matrix.shape[0], matrix.shape[1]), bias)
        self.few = matrix.float() if wide and matrix.numel() <= SMALL else None
        if self.few is not None:
            self.kernel = f"bfloat16, float32 up to {FEW // matrix.numel()} rows a thread"
        self.packed = Prepacked(matrix.bfloat16())
        self.small_bias = None if bias is None else bias.detach().bfloat16()
        self.output: torch.dtype | None = None
        self.activation = "none"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in few calls, as `PlainLinear`."""
        refuse_gradients(x)
        return self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        products = x.numel() * self.out_features
        if self.few is not None and x.dtype is torch.float32 and products <= FEW * torch.get_num_threads():
            return F.linear(x, self.few, self.bias)
        y: Tensor = _bfloat16_product(x.bfloat16(), self.packed.tensor, self.small_bias, self.activation, [], "none")
        return y.to(self.output or x.dtype)


class Int8Linear(FastLinear):
    """8-bit weights and integer inputs, rounded per token: 1 byte per weight; 7x from 4 rows on, 2x at one.

    oneDNN takes unsigned inputs: codes are shifted by 2^(bits - 1). The scale of a row is absmax / (2^(bits - 1) - 1).

    Args:
        input_bits: 8; 7 where the product of 8 bits saturates, as PyTorch's own quantization has it there
            (`reduce_range`): 2 x 127 x 127 is less than 2^15.
        keep: hold the decoded matrix too, in bfloat16, whose inputs are not rounded, for products of many rows.
    """

    kernel = "int8"

    def __init__(
        self, weight: IntGrouped, bias: Tensor | None, input_bits: Literal[7, 8] = 8, keep: bool = False
    ) -> None:
        super().__init__(weight.shape, bias)
        self.kept = Bfloat16Linear(weight.dense(), bias) if keep else None
        self.packed = Prepacked(weight.codes)
        self.scale = weight.scale.float().expand(self.out_features, -1).reshape(-1).contiguous()
        self.zero = torch.zeros(self.out_features, dtype=torch.int64)
        self.input_zero = 1 << (input_bits - 1)
        if input_bits == 7:
            self.kernel = "int8, inputs of 7 bits"
        if keep:
            self.kernel += f", bfloat16 above {INT8_KEPT_ROWS} rows"

    def multiply(self, x: Tensor) -> Tensor:
        if self.kept is not None and len(x) > INT8_KEPT_ROWS:
            return self.kept.multiply(x)
        wide = x.float()
        # Two reductions are several times faster than abs() and one, or than a norm.
        scale = torch.maximum(wide.amax(1, keepdim=True), wide.amin(1, keepdim=True).neg_())
        scale = scale.div_(self.input_zero - 1).clamp_(min=torch.finfo(torch.float32).tiny)
        codes = torch.mul(wide, scale.reciprocal()).round_().to(torch.int8).view(torch.uint8).add_(self.input_zero)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, self.input_zero, self.packed.tensor, self.scale, self.zero,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        y.mul_(scale)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)


class Int8WeightLinear(FastLinear):
    """8-bit weights with a scale per row, inputs in bfloat16: 1 byte per weight; 2x at one row, 2x to 3x above.

    Args:
        keep: hold the decoded matrix too, in bfloat16, for products of many rows.
    """

    kernel = "int8 weights"

    def __init__(self, weight: IntGrouped, bias: Tensor | None, keep: bool = False) -> None:
        super().__init__(weight.shape, bias)
        self.kept = Bfloat16Linear(weight.dense(), bias) if keep else None
        if keep:
            self.kernel = f"int8 weights, bfloat16 above {INT8_ROWS} rows"
        self.codes = weight.codes.contiguous()
        self.scale = weight.scale.expand(self.out_features, -1).reshape(-1).contiguous()

    def multiply(self, x: Tensor) -> Tensor:
        if self.kept is not None and len(x) > INT8_ROWS:
            return self.kept.multiply(x)
        small = x.bfloat16().contiguous()  # the kernel takes no other rows
        if len(x) <= INT8_ROWS:
            y = torch._weight_int8pack_mm(small, self.codes, self.scale.bfloat16()).to(x.dtype)
        else:
            # Codes are exact in bfloat16, and a row's scale can follow the product.
            y = F.linear(small, self.codes.bfloat16()).to(x.dtype).mul_(self.scale.to(x.dtype))
        return y if self.bias is None else y.add_(self.bias)
