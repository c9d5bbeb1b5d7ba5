"""Run the inside of a block in bfloat16 and its residual stream in float32.

With products at the speed of bfloat16 units, a float32 forward pass is mostly attention and the traffic of elementwise
work. Both take half as long when the tensors between a block's layers are bfloat16, as they are where such a model runs
in bfloat16. Less is rounded than by autocast: what small layers and routers of mixtures give, normalizations, softmax,
and all that is not known to be harmless, compute in float32; masks keep their range; a sum with the residual stream is
float32 again.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from aicompress.model.kernels.bf16_products import WEIGHT, RoundedLayers, bfloat16_products, is_large

# By name, functions that may take bfloat16 as it comes. All that give a view are here: what is written through a view
# must arrive. Elementwise work computes in float32 inside and rounds its result once.
_SHAPES = """
    __get__ __set__ __getitem__ __len__ as_strided bfloat16 chunk clone contiguous data_ptr detach diagonal
    dim element_size expand expand_as flatten flip float is_contiguous is_floating_point item movedim moveaxis
    narrow ndimension numel permute repeat repeat_interleave requires_grad_ reshape reshape_as roll select
    size split split_with_sizes squeeze storage_offset stride swapaxes swapdims t tensor_split to transpose
    type_as unbind unflatten unfold unsqueeze untyped_storage view view_as
"""
_ELEMENTWISE = "dropout gelu leaky_relu neg __neg__ relu relu6 silu cat concat"
_PLAIN = frozenset({*_SHAPES.split(), *_ELEMENTWISE.split()})
_PRODUCTS = frozenset({"mul", "multiply", "__mul__", "__rmul__"})
_SUMS = frozenset({"add", "__add__", "__radd__"})
_AUGMENTED = frozenset({"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__"})
_FEW = 8  # a layer with this many times fewer outputs than inputs gives float32
_SMALL = 4  # a factor with this many times fewer numbers than the other is rounded rather than the other widened


class Bf16Interior(TorchFunctionMode):
    """Makes large float32 layers and attention of this thread give bfloat16; for inference.

    Blocks run in it must have no parameters in bfloat16: every bfloat16 tensor counts as one that was narrowed here.
    """

    def __init__(self) -> None:
        super().__init__()
        self._taken: tuple[Tensor, int, Tensor] | None = None  # input of the last layer, its version, rounded

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        weight = WEIGHT.get(function)
        if weight is not None and len(args) > weight and is_large(args[weight]):
            if _decides(args[weight], weight):
                with bfloat16_products():
                    return function(*widened(args), **widened(kwargs))
            return function(*map(self._rounded, args), **{key: self._rounded(value) for key, value in kwargs.items()})
        if function is functional.scaled_dot_product_attention and len(args) > 2 and is_large(args[0]):
            return function(*map(_narrow, args[:3]), *args[3:], **kwargs)
        name = getattr(function, "__name__", "")
        if name in _PLAIN or kwargs.get("inplace") or kwargs.get("out") is not None:
            return function(*args, **kwargs)
        if name in _PRODUCTS:
            return function(*_balanced(*args), **kwargs)
        if name in _AUGMENTED or (name.endswith("_") and not name.endswith("__")):
            return function(args[0], *_like(args[0], args[1:]), **_like(args[0], kwargs))
        if name in _SUMS and all(not isinstance(a, Tensor) or a.dtype == torch.bfloat16 for a in args):
            return function(*args, **kwargs)
        return function(*widened(args), **widened(kwargs))

    def _rounded(self, value: Any) -> Any:
        """An argument of a layer; an input is rounded once for all layers that are given it."""
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if isinstance(value, nn.Parameter) or value.is_inference():
            return value.bfloat16()
        if self._taken is None or self._taken[0] is not value or self._taken[1] != value._version:
            self._taken = value, value._version, value.bfloat16()
        return self._taken[2]


def narrows(block: nn.Module) -> bool:
    """Whether a block can run in `Bf16Interior`: it is float32 throughout."""
    return all(tensor.dtype == torch.float32 for tensor in block.parameters() if tensor.is_floating_point())


def interior(block: nn.Module, rounded: bool) -> AbstractContextManager[Any]:
    """What a block runs in, without gradients: exactly as it is unless `rounded`."""
    if not rounded:
        return nullcontext()
    return Bf16Interior() if narrows(block) else RoundedLayers()


def given(block: nn.Module, rounded: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A block's outputs, in the dtypes that it gives outside of `interior`."""
    output = block(*args, **kwargs)
    return widened(output) if rounded and narrows(block) else output


def _decides(weight: Tensor, position: int) -> bool:
    """Whether a layer gives few numbers of many: a router's choice would hang on ties of rounded ones."""
    out, columns = weight.shape if position == 1 else reversed(weight.shape)
    return out * _FEW < columns


def widened(tree: Any) -> Any:
    """Tensors in bfloat16 as float32, other values as they are."""
    return tree_map_only(Tensor, lambda tensor: tensor.float() if tensor.dtype == torch.bfloat16 else tensor, tree)


def _narrow(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def _balanced(*factors: Any) -> tuple[Any, ...]:
    """Factors of an elementwise product, a few numbers beside many rounded as those are, such as rotary tables."""
    if len(factors) != 2 or not all(isinstance(factor, Tensor) for factor in factors):
        return factors
    few, many = sorted(factors, key=lambda factor: factor.numel())
    if many.dtype == torch.bfloat16 and few.numel() * _SMALL <= many.numel():
        return tuple(map(_narrow, factors))
    return factors


def _like(target: Any, tree: Any) -> Any:
    """Floating tensors in the dtype of the one that they are written to."""
    if not isinstance(target, Tensor) or target.dtype not in (torch.float32, torch.bfloat16):
        return tree
    return tree_map_only(
        Tensor, lambda t: t.to(target.dtype) if t.dtype in (torch.float32, torch.bfloat16) else t, tree
    )
