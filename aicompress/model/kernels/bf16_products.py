"""Matrix products with bfloat16 inputs and float32 sums, where the processor has instructions for them.

Calibration is forward passes and Gram matrices: products of large float32 matrices. oneDNN rounds their entries to
bfloat16 on the way into an AMX or AVX-512 BF16 unit and adds up in float32, four to six times as fast. A Gram matrix so
made is that of the rounded inputs, exactly symmetric and positive semi-definite to float32 accuracy; its relative error
is about 1e-3, below that of the calibration sample. Models in bfloat16 lose nothing at all: their entries are rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from aicompress.model.kernels.linear import has_fast_bfloat16

LEAST = 1 << 14  # numbers in a weight whose products are rounded
WEIGHT = {functional.linear: 1, torch.addmm: 2}  # position of the weight; addmm is GPT-2's transposed linear layer


@contextmanager
def bfloat16_products(active: bool = True) -> Iterator[None]:
    """Products of float32 matrices round their inputs to bfloat16; what was set before is set again after."""
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    if active:
        setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def is_large(tensor: Tensor) -> bool:
    """Whether rounding is worth while for a layer with this weight, or for attention with these queries."""
    return tensor.numel() >= LEAST


class RoundedLayers(TorchFunctionMode):
    """Rounds the inputs of linear layers in this thread, and of nothing else.

    Positions times frequencies must stay exact, attention's small products would get slower, and small layers, such as
    the router of a mixture, are where rounding costs most for the least time. Gradients of rounded layers are rounded.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        weight = WEIGHT.get(function)
        if weight is None or len(args) <= weight or not is_large(args[weight]):
            return function(*args, **(kwargs or {}))
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return _differentiable(function, args, kwargs or {})
        with bfloat16_products():
            return function(*args, **(kwargs or {}))


class _RoundedLinear(torch.autograd.Function):
    """x Wᵀ + b, rounded in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        with bfloat16_products():
            return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = gradients[0].reshape(-1, weight.shape[0])
        with bfloat16_products():
            return (
                (rows @ weight).view(x.shape) if of_x else None,
                rows.t() @ x.reshape(-1, x.shape[-1]) if of_weight else None,
                rows.sum(0) if of_bias else None,
            )


def _differentiable(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A call of linear, or of addmm without factors, whose backward pass rounds too."""
    if function is functional.linear:
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        return _RoundedLinear.apply(args[0], args[1], bias)  # type: ignore[no-any-return, no-untyped-call]
    if kwargs:
        return torch.addmm(*args, **kwargs)
    return _RoundedLinear.apply(args[1], args[2].t(), args[0])  # type: ignore[no-any-return, no-untyped-call]


def rounds(precision: str) -> bool:
    """Whether products round: `auto` where that is fast, `float32` never."""
    return precision == "auto" and has_fast_bfloat16()
