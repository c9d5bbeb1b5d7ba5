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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from aicompress.layer import from_matrix
from aicompress.model.blocks.moving_weights import TunableLayer, TuningSchedule, moving
from aicompress.model.kernels.bf16_products import RoundedLayers
from aicompress.weights import Weight


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
        parts = [moving(layer, pace) for layer in layers]
        batches = _orders(len(stage.inputs), seed)
        for step in range(pace.steps):
            _loss(stage, next(batches), lambda: {part.layer.parameter: part.dense() for part in parts}).backward()  # type: ignore[no-untyped-call]
            for part in parts:
                part.move(pace, 1 - step / pace.steps)
        tuned = [part.stored() for part in parts]
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
