"""Block reconstruction: tune the codes and scales, or the factors, of a block towards its original output.

AutoRound (Cheng et al. 2023, arXiv:2309.05516): minimise Σ ‖block(x̂; Ŵ) − block(x; W)‖² over the rounding of every
weight by signed gradient descent, x̂ being the inputs behind compressed blocks and x the original's; the rounding is
differentiated as if it were not there (straight through). Two things differ. The start is not round to nearest but
given codes, such as GPTQ's: every weight begins as near to its value as its code allows, so that the block begins with
their error and few steps are needed. And scales move themselves, as in EfficientQAT (arXiv:2407.11062), by a share of
what they are. Factors of low-rank layers, and the norms and biases beside them, move by Adam (Kingma and Ba 2015,
arXiv:1412.6980), in units of their size. What comes out is taken only if the block's error on all inputs is lower than
before.

Several processes tune as one: each holds some rows of every batch, and gradients and errors are added up.
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
from aicompress.model.blocks.all_reduce import ALONE, Team
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
        team: processes that tune the block together, each with rows of its own of every batch.
    """

    name: str
    module: nn.Module
    inputs: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    targets: Sequence[Tensor]
    masks: Sequence[Tensor | None]
    rounded: bool = False
    team: Team = ALONE

    def shares(self) -> list[float]:
        """For every batch how much of what counts is in this process's rows."""
        own = torch.tensor([_counted(t, m).numel() for t, m in zip(self.targets, self.masks, strict=True)])
        whole = self.team.total(own.to(self.targets[0].device))
        return (own / whole.cpu().clamp_min(1)).tolist()


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
        parts = moving(layers, pace)
        batches, shares = _orders(len(stage.inputs), seed), stage.shares()
        for step in range(pace.steps):
            number = next(batches)
            loss = _loss(stage, number, lambda: {part.layer.parameter: part.dense() for part in parts})
            (loss * shares[number]).backward()  # type: ignore[no-untyped-call]
            if stage.team.size > 1:
                _add_up([tensor for part in parts for tensor in part.tensors], stage.team)
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
    losses = [float(_loss(stage, number, lambda: dense)) * share for number, share in enumerate(stage.shares())]
    mean = torch.tensor(sum(losses) / len(losses), dtype=torch.float64, device=stage.targets[0].device)
    return float(stage.team.total(mean))


def _add_up(tensors: Sequence[Tensor], team: Team) -> None:
    """Replace the gradients of some tensors by their sums over all processes; one that no process has stays away."""
    there = team.total(torch.tensor([float(t.grad is not None) for t in tensors], device=tensors[0].device))
    reached = [tensor for tensor, count in zip(tensors, there.tolist(), strict=True) if count]
    if not reached:
        return
    flat = torch.cat([(torch.zeros_like(t) if t.grad is None else t.grad).reshape(-1) for t in reached])
    parts = torch.split(team.total(flat), [tensor.numel() for tensor in reached])
    for tensor, part in zip(reached, parts, strict=True):
        tensor.grad = part.view_as(tensor)


def _orders(count: int, seed: int) -> Iterator[int]:
    """Numbers of batches without end: all of them in one random order after another."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _loss(stage: Stage, number: int, parameters: Callable[[], Mapping[str, Tensor]]) -> Tensor:
    """Mean squared distance of one batch's output to its target, over real tokens."""
    args, kwargs = stage.inputs[number]
    own = dict(stage.module.named_parameters())
    with RoundedLayers() if stage.rounded else nullcontext():
        placed = {name: value.to(own[name].dtype) for name, value in parameters().items()}
        output = hidden(functional_call(stage.module, placed, args, kwargs))
    assert output is not None
    target, mask = stage.targets[number], stage.masks[number]
    distance = (_counted(output, mask).float() - _counted(target, mask).float()).square()
    return distance.mean() if distance.numel() else distance.sum()


def _counted(states: Tensor, mask: Tensor | None) -> Tensor:
    """What counts of a block's output: its real tokens, or all of it where the mask is of something else."""
    return states if mask is None or states.shape[: mask.ndim] != mask.shape else states[mask]


def hidden(output: Any) -> Tensor | None:
    """The hidden states among a block's outputs: the first floating tensor; None where there is none."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((state for part in parts if (state := hidden(part)) is not None), None)
