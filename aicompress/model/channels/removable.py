"""Check on random weights that a cut removes channels and changes nothing else, before it is planned.

A cut network must give what the whole one gives when every layer that reads the removed channels is shown zeros in
their place. Random weights in float64 make a channel that leaks elsewhere visible, whatever the real weights are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from aicompress.errors import first_line
from aicompress.model.channels.cut import cut_module, kept_places
from aicompress.model.channels.graph import OUTPUT, ChannelGroup, Fixed, forward, tensors_of

TOLERANCE = 1e-9


def removable(module: nn.Module, inputs: Any, groups: Sequence[ChannelGroup]) -> tuple[list[ChannelGroup], list[Fixed]]:
    """Groups whose channels can be removed, and those that cannot with the reason.

    Args:
        module: any weights; not modified.
        inputs: of one forward pass.
    """
    trial = generic(module)
    wide = _double(inputs)
    if groups and refusal(trial, wide, groups) is None:
        return list(groups), []
    reasons = [(group, refusal(trial, wide, [group])) for group in groups]
    fit = [group for group, reason in reasons if reason is None]
    fixed = [Fixed(group.name, reason) for group, reason in reasons if reason is not None]
    if fit and (reason := refusal(trial, wide, fit)) is not None:
        return [], fixed + [Fixed(group.name, f"not together with others: {reason}") for group in fit]
    return fit, fixed


def refusal(module: nn.Module, inputs: Any, groups: Sequence[ChannelGroup]) -> str | None:
    """Why channels of these groups cannot be removed; None where they can.

    Args:
        module: with generic weights in float64; not modified.
    """
    choice = [(group, _half(group)) for group in groups]
    held: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    cut = copy.deepcopy(module, held)  # has these tensors, and puts smaller ones in the place of those that are cut
    try:
        with torch.no_grad():
            cut_module(cut, kept_places(module, choice))
            wanted = _masked(module, inputs, choice)
            got = tensors_of(forward(cut, inputs))
    except Exception as error:  # whatever a changed width breaks in the module's own code
        return first_line(error)
    if [tensor.shape for tensor in got] != [tensor.shape for tensor in wanted]:
        return OUTPUT
    for one, other in zip(got, wanted, strict=True):
        if not torch.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE * float(other.abs().max().clamp_min(1))):
            return "removing its channels changes more than themselves"
    return None


def _half(group: ChannelGroup) -> list[int]:
    """Every other unit of each cohort; the first alone where there are two or fewer."""
    return [unit for unit, place in enumerate(group.places) if place % 2 == 0]


def generic(module: nn.Module) -> nn.Module:
    """A copy with random weights in float64: no symmetry, no zeros, nothing saturated."""
    made = copy.deepcopy(module).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
        if tensor.is_floating_point() and (tensor.ndim > 0):
            fan = max(1, tensor[0].numel()) if tensor.ndim > 1 else 1
            tensor.normal_(generator=generator).div_(fan**0.5)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
    return made


def _double(inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {name: _double(value) for name, value in inputs.items()}
    return inputs.double() if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs


def _masked(module: nn.Module, inputs: Any, choice: Sequence[tuple[ChannelGroup, list[int]]]) -> list[Tensor]:
    """Outputs when the layers that read removed channels are shown zeros there; norms over channels see the rest."""
    with ExitStack() as hooks:
        for path, kept in kept_places(module, choice).items():
            if kept.axis is not None:
                continue
            layer = module.get_submodule(path)
            if kept.inner is not None:
                hook = _zeroing(kept.inner, -1 if isinstance(layer, nn.Linear) else 1)
                hooks.enter_context(layer.register_forward_pre_hook(hook, with_kwargs=True))
            if kept.out is not None and isinstance(layer, nn.LayerNorm | nn.GroupNorm):
                hooks.enter_context(layer.register_forward_hook(_normalising(kept.out)))
        return tensors_of(forward(module, inputs))


def _zeroing(kept: Tensor, axis: int) -> Callable[..., Any]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0] if args else next(iter(kwargs.values()))
        shown = torch.zeros_like(given).index_copy(axis, kept, given.index_select(axis, kept))
        return ((shown, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): shown})

    return hook


def _normalising(kept: Tensor) -> Callable[..., Any]:
    """A norm over channels that sees those that stay; its channels are the last axis, or the one after the samples."""

    def hook(layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        weight = None if layer.weight is None else layer.weight[kept]
        bias = None if layer.bias is None else layer.bias[kept]
        if isinstance(layer, nn.GroupNorm):
            part = args[0].index_select(1, kept)
            normed = functional.group_norm(part, layer.num_groups, weight, bias, layer.eps)
            return torch.zeros_like(output).index_copy(1, kept, normed)
        axis = 1 if getattr(layer, "data_format", "channels_last") == "channels_first" else -1
        part = args[0].index_select(axis, kept).movedim(axis, -1)
        normed = functional.layer_norm(part, (len(kept),), weight, bias, layer.eps).movedim(-1, axis)
        return torch.zeros_like(output).index_copy(axis, kept, normed)

    return hook
