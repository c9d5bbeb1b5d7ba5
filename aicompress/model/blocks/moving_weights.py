"""What moves of a block's layers while they are tuned, and how: codes and scales, factors, or numbers of any form.

Codes move against the sign of their gradients, straight through the rounding. Factors of low-rank layers, and norms and
biases, move by Adam (Kingma and Ba 2015, arXiv:1412.6980), in units of their size; so does all that a weight of another
form is made of. What is zero, such as a bias that was never trained, has no size of its own, and takes that of the
weights about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from aicompress.layer import from_matrix
from aicompress.methods.distill.latent import latent_suffixes, relaxed, settled
from aicompress.methods.quantize.grid.rounding import code_range
from aicompress.weights import Dense, IntGrouped, LowRank, Weight
from aicompress.weights.decoding import decode

OF_ZEROS = 0.02  # size of a block that is all zero: what most models' weights are drawn with


@dataclass(frozen=True)
class TunableLayer:
    """A layer of the block that may move, or a norm or bias beside the layers, as a matrix of one row.

    Attributes:
        parameter: its name inside the block.
        weight: codes and scales, factors, or a vector's numbers, to start from.
        wanted: the original matrix (out, in).
        shape, transposed: of the parameter, as in `LayerInfo`.
        keeps_zeros: elements that are zero stay zero.
    """

    parameter: str
    weight: Weight
    wanted: Tensor
    shape: tuple[int, ...]
    transposed: bool = False
    keeps_zeros: bool = False


@dataclass(frozen=True)
class TuningSchedule:
    """How tuning moves.

    Attributes:
        steps: batches that are run forward and back.
        rate: how far a step moves a weight, in steps of its grid; falls linearly to nothing.
        scale_rate: how far a step moves a scale, as a share of it; falls likewise.
        factor_rate: how far a step moves a factor or a vector, as a share of its root mean square; falls likewise.
    """

    steps: int
    rate: float
    scale_rate: float
    factor_rate: float = 0.01


class _Decoded(torch.autograd.Function):
    """Values of latent codes; the gradient passes through the rounding, not through the ends of the grid."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, scale: Tensor, zero: Tensor | None, ends: tuple[int, int]) -> Tensor:
        steps = latent.round().clamp_(*ends)
        if zero is not None:
            steps.sub_(zero)
        ctx.save_for_backward(scale, steps)
        return steps * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        scale, steps = ctx.saved_tensors
        (gradient,) = gradients
        of_scale = (gradient * steps).sum(-1, keepdim=True)
        return gradient * scale, of_scale if scale.shape == of_scale.shape else of_scale.sum().view(1, 1, 1), None, None


class _Latent:
    """A layer's codes as real numbers, and its scales."""

    def __init__(self, layer: TunableLayer, weight: IntGrouped) -> None:
        self.layer, self.weight = layer, weight
        self.ends = code_range(weight.bits)
        grouped = (layer.wanted.shape[0], -1, weight.group_size or layer.wanted.shape[1])
        self.scale = weight.scale.float()[..., None].clone().requires_grad_()  # (out, groups, 1), or (1, 1, 1)
        self.zero = None if weight.zero is None else weight.zero.float()[..., None]
        codes = weight.codes.float().view(grouped)
        exact = (layer.wanted.reshape(grouped) / self.scale.detach()).nan_to_num()  # 0 / 0 where a scale is 0
        if self.zero is not None:
            exact += self.zero
        self.latent = torch.clamp(exact, codes - 0.499, codes + 0.499).requires_grad_()
        self.tensors = [self.latent, self.scale]

    def dense(self) -> Tensor:
        """The parameter, differentiable."""
        values: Tensor = _Decoded.apply(self.latent, self.scale, self.zero, self.ends)  # type: ignore[no-untyped-call]
        matrix = values.view(self.layer.wanted.shape)
        return from_matrix(matrix, self.layer.shape, self.layer.transposed)

    @torch.no_grad()
    def move(self, pace: TuningSchedule, left: float) -> None:
        """A step against the sign of the gradients; latent codes stay within half a step of the grid's ends."""
        if self.latent.grad is None or self.scale.grad is None:
            return
        rate, scale_rate = pace.rate * left, pace.scale_rate * left
        self.latent.sub_(self.latent.grad.sign_(), alpha=rate).clamp_(self.ends[0] - 0.499, self.ends[1] + 0.499)
        self.scale.sub_(self.scale.grad.sign_().mul_(self.scale.abs()), alpha=scale_rate)
        self.latent.grad = self.scale.grad = None

    def stored(self) -> IntGrouped:
        """Codes, and scales in the dtype that they are stored in."""
        weight = self.weight
        codes = self.latent.detach().round().clamp_(*self.ends).to(torch.int8).view_as(weight.codes)
        scale = self.scale.detach()[..., 0].to(weight.scale.dtype)
        return replace(weight, codes=codes, scale=torch.where(scale == 0, weight.scale, scale))


class _Adam:
    """Adam on some tensors, each of which moves in a unit of its own."""

    def __init__(self, tensors: Sequence[Tensor], units: Sequence[float]) -> None:
        self.units, self.steps = units, 0
        groups = [{"params": [tensor]} for tensor in tensors]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=torch.finfo(torch.float32).tiny, fused=True)

    def move(self, pace: TuningSchedule, left: float) -> None:
        """A step; the first tenth of the steps grow up to the full rate.

        What nothing reaches, such as an expert that no token is sent to, has no gradient and stays.
        """
        self.steps += 1
        rate = pace.factor_rate * left * min(1.0, 10 * self.steps / pace.steps)
        for group, unit in zip(self.optimizer.param_groups, self.units, strict=True):
            group["lr"] = rate * unit
        self.optimizer.step()
        self.optimizer.zero_grad()


def _size(tensor: Tensor) -> float:
    """Root mean square."""
    return float(tensor.detach().square().mean().sqrt()) if tensor.numel() else 0.0


def _product(out: Tensor, inner: Tensor) -> Tensor:
    """Factors (m, r) and (r, n) multiplied as a linear layer does it, so that they are rounded where layers are."""
    return functional.linear(out, inner.t())


class _Numbers:
    """Both factors of a low-rank layer, or a vector beside the layers."""

    def __init__(self, layer: TunableLayer, weight: LowRank | Dense, unit: float) -> None:
        self.layer = layer
        given = [weight.out, weight.inner] if isinstance(weight, LowRank) else [weight]
        self.dtypes = [spec.dtype for spec in weight.specs().values()]
        self.tensors = [factor.dense().clone().requires_grad_() for factor in given]
        self.adam = _Adam(self.tensors, [_size(factor) or unit for factor in self.tensors])

    def dense(self) -> Tensor:
        """The parameter, differentiable."""
        return from_matrix(reduce(_product, self.tensors), self.layer.shape, self.layer.transposed)

    @torch.no_grad()
    def move(self, pace: TuningSchedule, left: float) -> None:
        """A step of Adam."""
        self.adam.move(pace, left)

    def stored(self) -> LowRank | Dense:
        """Numbers in the dtypes that they are stored in."""
        factors = [Dense(factor.detach().to(dtype)) for factor, dtype in zip(self.tensors, self.dtypes, strict=True)]
        return LowRank(*factors) if len(factors) > 1 else factors[0]


class _Relaxed:
    """All numbers of a weight of any form, its codes as latent numbers."""

    def __init__(self, layer: TunableLayer, weight: Weight, pace: TuningSchedule, unit: float) -> None:
        self.layer, self.start = layer, relaxed(weight)
        whole = self.start.tensors()
        self.fixed = {suffix: tensor for suffix, tensor in whole.items() if not tensor.is_floating_point()}
        self.moved = {s: t.float().clone().requires_grad_() for s, t in whole.items() if t.is_floating_point()}
        latent, scales = latent_suffixes(weight), weight.scale_suffixes()
        shares = {s: pace.rate if s in latent else pace.scale_rate if s in scales else pace.factor_rate for s in whole}
        self.tensors = list(self.moved.values())
        # Adam moves by `factor_rate`, so that another pace is another unit.
        units = [shares[s] / pace.factor_rate * (_size(t) or unit) for s, t in self.moved.items()]
        self.adam = _Adam(self.tensors, units)
        self.zeros = {s: t.detach() == 0 for s, t in self.moved.items() if layer.keeps_zeros and t.ndim > 1}
        if layer.keeps_zeros and "" in latent and self.moved[""].shape == weight.shape:
            self.zeros[""] = weight.dense() == 0  # a code of zero is not always the number 0

    def dense(self) -> Tensor:
        """The parameter, differentiable."""
        matrix = decode(self.start.meta(), {**self.fixed, **self.moved})
        return from_matrix(matrix, self.layer.shape, self.layer.transposed)

    @torch.no_grad()
    def move(self, pace: TuningSchedule, left: float) -> None:
        """A step of Adam in which zeros stay."""
        for suffix, tensor in self.moved.items():
            if suffix in self.zeros and tensor.grad is not None:
                tensor.grad.masked_fill_(self.zeros[suffix], 0)
        self.adam.move(pace, left)

    def stored(self) -> Weight:
        """Codes, and numbers in the dtypes that they are stored in."""
        whole = self.start.tensors()
        return settled(self.start, {suffix: t.detach().to(whole[suffix].dtype) for suffix, t in self.moved.items()})


# What moves of a layer. Gradients of its parameter, which `dense` gives, reach `tensors`; `move` takes a step by them,
# with so much of the steps left, and `stored` gives the weight.
Moving: TypeAlias = _Latent | _Numbers | _Relaxed


def moving(layers: Sequence[TunableLayer], pace: TuningSchedule) -> list[Moving]:
    """What moves of the layers of a block."""
    sizes = [_size(layer.wanted) for layer in layers]
    least = min((each for each in sizes if each), default=OF_ZEROS)
    return [_moving(layer, pace, each or least) for layer, each in zip(layers, sizes, strict=True)]


def _moving(layer: TunableLayer, pace: TuningSchedule, unit: float) -> Moving:
    """What moves of a layer; numbers that are all zero move in a given unit."""
    weight = layer.weight
    if isinstance(weight, IntGrouped) and weight.even and not layer.keeps_zeros:
        return _Latent(layer, weight)
    if isinstance(weight, Dense) and not layer.keeps_zeros:
        return _Numbers(layer, weight, unit)
    if isinstance(weight, LowRank) and moves(weight):
        return _Numbers(layer, weight, unit)
    return _Relaxed(layer, weight, pace, unit)


def moves(weight: Weight | None) -> bool:
    """Whether a weight, or its outline, is of a form that calibrated steps tune: integer codes, or plain factors."""
    if isinstance(weight, LowRank):
        return isinstance(weight.out, Dense) and isinstance(weight.inner, Dense)
    return isinstance(weight, IntGrouped)
