"""Block reconstruction: tune the codes and scales, or the factors, of a block towards its original output.

AutoRound (Cheng et al. 2023, arXiv:2309.05516): minimise Σ ‖block(x̂; Ŵ) − block(x; W)‖² over the rounding of every
weight by signed gradient descent, x̂ being the inputs behind compressed blocks and x the original's; the rounding is
differentiated as if it were not there (straight through). Two things differ. The start is not round to nearest but
given codes, such as GPTQ's: every weight begins as near to its value as its code allows, so that the block begins with
their error and few steps are needed. And scales move themselves, as in EfficientQAT (arXiv:2407.11062), by a share of
what they are. Factors of low-rank layers, and the norms and biases beside them, move by Adam (Kingma and Ba 2015,
arXiv:1412.6980), in units of their size. What comes out is taken only if the block's error on all inputs is lower than
before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from aicompress.layer import from_matrix
from aicompress.model.kernels.bf16_products import RoundedLayers
from aicompress.weights import Dense, IntGrouped, LowRank, Weight


@dataclass(frozen=True)
class Stage:
    """A block with what it is given and what it should give.

    Attributes:
        name: its path in the model.
        module: the block, its weights loaded.
        inputs: arguments and keyword arguments of every batch, as the compressed model has them.
        targets: the original model's outputs, one tensor a batch.
        masks: real tokens of every batch, (batch, tokens) bool; None where all are.
        rounded: linear layers multiply float32 numbers rounded to bfloat16.
    """

    name: str
    module: nn.Module
    inputs: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    targets: Sequence[Tensor]
    masks: Sequence[Tensor | None]
    rounded: bool = False


@dataclass(frozen=True)
class TunableLayer:
    """A layer of the block that may move, or a norm or bias beside the layers, as a matrix of one row.

    Attributes:
        parameter: its name inside the block.
        weight: codes and scales, factors, or a vector's numbers, to start from.
        wanted: the original matrix (out, in).
        shape, transposed: of the parameter, as in `LayerInfo`.
    """

    parameter: str
    weight: Weight
    wanted: Tensor
    shape: tuple[int, ...]
    transposed: bool = False


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


class Moving(Protocol):
    """What moves of a layer."""

    layer: TunableLayer

    def dense(self) -> Tensor:
        """The parameter, differentiable."""

    def move(self, pace: TuningSchedule, left: float) -> None:
        """A step by the gradients that are there, which are gone afterwards.

        Args:
            pace: how far.
            left: share of the steps that are left.
        """

    def stored(self) -> Weight:
        """The weight as it is stored."""


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
        self.ends = (-(1 << (weight.bits - 1)), (1 << (weight.bits - 1)) - 1)
        grouped = (layer.wanted.shape[0], -1, weight.group_size or layer.wanted.shape[1])
        self.scale = weight.scale.float()[..., None].clone().requires_grad_()  # (out, groups, 1), or (1, 1, 1)
        self.zero = None if weight.zero is None else weight.zero.float()[..., None]
        codes = weight.codes.float().view(grouped)
        exact = layer.wanted.reshape(grouped) / self.scale.detach()
        if self.zero is not None:
            exact += self.zero
        self.latent = torch.clamp(exact, codes - 0.499, codes + 0.499).requires_grad_()

    def dense(self) -> Tensor:
        """The parameter, differentiable."""
        values: Tensor = _Decoded.apply(self.latent, self.scale, self.zero, self.ends)  # type: ignore[no-untyped-call]
        matrix = values.view(self.layer.wanted.shape)
        return from_matrix(matrix, self.layer.shape, self.layer.transposed)

    @torch.no_grad()
    def move(self, pace: TuningSchedule, left: float) -> None:
        """A step against the sign of the gradients; latent codes stay within half a step of the grid's ends."""
        assert self.latent.grad is not None
        assert self.scale.grad is not None
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


class _Numbers:
    """Both factors of a low-rank layer, or a vector beside the layers, with Adam's moments of their gradients."""

    DECAY = (0.9, 0.99)

    def __init__(self, layer: TunableLayer, weight: LowRank | Dense) -> None:
        self.layer = layer
        given = [weight.out, weight.inner] if isinstance(weight, LowRank) else [weight]
        self.dtypes = [spec.dtype for spec in weight.specs().values()]
        self.factors = [factor.dense().clone().requires_grad_() for factor in given]
        self.moments = [(torch.zeros_like(factor), torch.zeros_like(factor)) for factor in self.factors]
        self.units = [float(factor.detach().square().mean().sqrt()) for factor in self.factors]
        self.steps = 0

    def dense(self) -> Tensor:
        """The parameter, differentiable."""
        return from_matrix(reduce(torch.matmul, self.factors), self.layer.shape, self.layer.transposed)

    @torch.no_grad()
    def move(self, pace: TuningSchedule, left: float) -> None:
        """A step of Adam; the first tenth of the steps grow up to the full rate."""
        self.steps += 1
        rate = pace.factor_rate * left * min(1.0, 10 * self.steps / pace.steps)
        slow, fast = (1 - decay**self.steps for decay in self.DECAY)
        for factor, (mean, square), unit in zip(self.factors, self.moments, self.units, strict=True):
            assert factor.grad is not None
            mean.lerp_(factor.grad, 1 - self.DECAY[0])
            square.lerp_(factor.grad.square(), 1 - self.DECAY[1])
            factor.sub_(mean / slow / ((square / fast).sqrt() + torch.finfo(torch.float32).tiny), alpha=rate * unit)
            factor.grad = None

    def stored(self) -> LowRank | Dense:
        """Numbers in the dtypes that they are stored in."""
        factors = [Dense(factor.detach().to(dtype)) for factor, dtype in zip(self.factors, self.dtypes, strict=True)]
        return LowRank(*factors) if len(factors) > 1 else factors[0]


def _moving(layer: TunableLayer) -> Moving:
    weight = layer.weight
    if isinstance(weight, IntGrouped):
        return _Latent(layer, weight)
    assert isinstance(weight, LowRank | Dense)
    return _Numbers(layer, weight)


def moves(weight: Weight | None) -> bool:
    """Whether a weight, or its outline, is of a form that can be tuned: integer codes, or plain factors."""
    if isinstance(weight, LowRank):
        return isinstance(weight.out, Dense) and isinstance(weight.inner, Dense)
    return isinstance(weight, IntGrouped)


def tune(stage: Stage, layers: Sequence[TunableLayer], pace: TuningSchedule, seed: int) -> list[Weight]:
    """Weights that bring the block nearer to its targets than the given ones; those where none are found.

    Args:
        stage: the block.
        layers: what may move; all other parameters stay as the block has them.
        pace: how.
        seed: of the order in which batches are run.
    """
    wanted_gradients = [parameter.requires_grad for parameter in stage.module.parameters()]
    stage.module.requires_grad_(False)
    try:
        start = [layer.weight for layer in layers]
        moving = [_moving(layer) for layer in layers]
        batches = _orders(len(stage.inputs), seed)
        for step in range(pace.steps):
            _loss(stage, next(batches), lambda: {part.layer.parameter: part.dense() for part in moving}).backward()  # type: ignore[no-untyped-call]
            for part in moving:
                part.move(pace, 1 - step / pace.steps)
        tuned = [part.stored() for part in moving]
        return tuned if error(stage, layers, tuned) < error(stage, layers, start) else start
    finally:
        for parameter, wanted in zip(stage.module.parameters(), wanted_gradients, strict=True):
            parameter.requires_grad_(wanted)


@torch.no_grad()
def error(stage: Stage, layers: Sequence[TunableLayer], weights: Sequence[Weight]) -> float:
    """Mean over all batches of the squared distance to the targets."""
    dense = {
        layer.parameter: from_matrix(weight.dense(), layer.shape, layer.transposed)
        for layer, weight in zip(layers, weights, strict=True)
    }
    return sum(float(_loss(stage, number, lambda: dense)) for number in range(len(stage.inputs))) / len(stage.inputs)


def _orders(count: int, seed: int) -> Iterator[int]:
    """Numbers of batches without end: all of them in one random order after another."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _loss(stage: Stage, number: int, parameters: Callable[[], Mapping[str, Tensor]]) -> Tensor:
    """Mean squared distance of one batch's output to its target, over real tokens."""
    args, kwargs = stage.inputs[number]
    own = dict(stage.module.named_parameters())
    placed = {name: value.to(own[name].dtype) for name, value in parameters().items()}
    with RoundedLayers() if stage.rounded else nullcontext():
        output = hidden(functional_call(stage.module, placed, args, kwargs))
    assert output is not None
    target, mask = stage.targets[number], stage.masks[number]
    if mask is not None and output.shape[: mask.ndim] == mask.shape:
        output, target = output[mask], target[mask]
    return (output.float() - target.float()).square().mean()


def hidden(output: Any) -> Tensor | None:
    """The hidden states among a block's outputs: the first floating tensor; None where there is none."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((state for part in parts if (state := hidden(part)) is not None), None)
