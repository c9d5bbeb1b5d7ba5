"""Saliency of channels on calibration data: activation size and first-order change of the loss.

Removing a unit takes it away from every layer that reads it, so it is judged there. With one gate of value 1 on all of
its readings x, the loss of sample n changes by Σ x ∂L_n/∂x to first order when the gate closes; the score is the mean
of its square over samples (Molchanov et al. 2019, arXiv:1906.10771, eq. 8, with the gate of their section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from aicompress.model.channels.graph import ChannelGroup, Member, forward, tensors_of

Batch = tuple[Any, Tensor | None]  # inputs of a forward pass, and labels where the data has them
Seen = dict[str, list[Tensor]]  # what each layer that reads units was given, call by call


def saliencies(
    module: nn.Module, groups: Sequence[ChannelGroup], batches: Sequence[Batch], kind: Literal["activation", "taylor"]
) -> list[Tensor]:
    """A score for every unit of every group, (units,) float64.

    Args:
        kind: "activation" is the mean of |x| over samples and positions, summed over the layers that read the unit
            (Minitron, Muralidharan et al. 2024, arXiv:2407.14679, section 2.2); "taylor" see above.
    """
    totals = [torch.zeros(group.size, dtype=torch.float64) for group in groups]
    samples = 0
    for inputs, labels in batches:
        seen: Seen = {}
        with ExitStack() as hooks:
            for path in {member.path for group in groups for member in readers(group)}:
                hook = partial(_keep, seen.setdefault(path, []), kind == "taylor")
                layer = module.get_submodule(path)
                hooks.enter_context(layer.register_forward_pre_hook(hook, with_kwargs=True))
            samples += _run(module, inputs, labels, backward=kind == "taylor")
        for group, total in zip(groups, totals, strict=True):
            total += _unit_scores(module, group, seen, kind)
    return [total / max(1, samples) for total in totals]


def readers(group: ChannelGroup) -> list[Member]:
    """The layers that mix a group's units with others."""
    return [member for member in group.members if member.side == "in"]


def _keep(kept: list[Tensor], differentiable: bool, layer: nn.Module, args: Any, kwargs: Any) -> Any:
    """Note what a layer is given; a copy of its own, so that its gradient comes from this layer alone."""
    given = args[0] if args else next(iter(kwargs.values()))
    if not differentiable:
        kept.append(given.detach())
        return None
    alias = given.clone()
    alias.retain_grad()
    kept.append(alias)
    return ((alias, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): alias})


def _run(module: nn.Module, inputs: Any, labels: Tensor | None, backward: bool) -> int:
    """One batch; returns its samples."""
    if not backward:
        with torch.no_grad():
            return len(tensors_of(forward(module, inputs))[0])
    with torch.enable_grad():
        output = tensors_of(forward(module, _differentiable(module, inputs)))[0]
        total = loss(output, labels)
        total.backward()  # type: ignore[no-untyped-call]
        module.zero_grad()
    return len(output)


def _differentiable(module: nn.Module, inputs: Any) -> Any:
    """Inputs that start a graph; where none is floating, the parameters do."""
    if isinstance(inputs, dict):
        return {name: _differentiable(module, value) for name, value in inputs.items()}
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        return inputs.detach().clone().requires_grad_(True)
    module.requires_grad_(True)
    return inputs


def loss(output: Tensor, labels: Tensor | None) -> Tensor:
    """Sum over samples of the task's loss; without labels the model's own most likely class takes their place.

    Outputs that are no scores of classes, (samples, classes), give half their squared norm.
    """
    if output.ndim != 2 or output.shape[1] < 2:
        return output.square().sum() / 2
    wanted = output.detach().argmax(dim=1) if labels is None else labels
    return functional.cross_entropy(output, wanted, reduction="sum")


def _unit_scores(module: nn.Module, group: ChannelGroup, seen: Seen, kind: str) -> Tensor:
    """Sum over the batch's samples of a group's scores, (units,)."""
    effects: Tensor | float = 0.0  # (samples, units)
    for member in readers(group):
        axis = -1 if isinstance(module.get_submodule(member.path), nn.Linear) else 1
        for given in seen[member.path]:
            effects = effects + _by_unit(given, member, axis, kind)
    assert isinstance(effects, Tensor)
    return (effects if kind == "activation" else effects.square()).sum(dim=0)


def _by_unit(given: Tensor, member: Member, axis: int, kind: str) -> Tensor:
    """One layer's input as (samples, units): the mean of |x|, or the sum of x ∂L/∂x, over all of a unit's places."""
    reduce: Callable[..., Tensor] = torch.mean if kind == "activation" else torch.sum
    if kind == "activation":
        values = given.abs()
    else:
        gradient = given.grad if given.grad is not None else torch.zeros_like(given)
        values = given.detach() * gradient
    values = values.double().movedim(axis, -1)  # (samples, ..., width)
    if values.ndim > 2:
        values = reduce(values.flatten(1, -2), dim=1)  # (samples, width)
    picked = values[:, member.places.reshape(-1)].reshape(len(values), *member.places.shape)
    return reduce(picked, dim=-1)
