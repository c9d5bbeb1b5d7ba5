"""Check on a tiny model in which order neurons lie in a fused gate and up tensor.

The shape of a fused gate and up projection tells that it holds two rows per neuron, not whether they lie as two halves
or interleaved. So a layer of four neurons is built and run twice: with two of them silenced, and without these two.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDE, NARROW = 4, 2
STAY, GONE = torch.tensor([0, 3]), torch.tensor([1, 2])


def lies_in_halves(wide: nn.Module, narrow: nn.Module) -> bool:
    """Whether cutting a fused tensor as whole copies of the neurons, one after the other, takes neurons away.

    Args:
        wide: an architecture of `WIDE` neurons in each feed-forward layer, on the meta device.
        narrow: the same with `NARROW`.

    Returns:
        True when both layers compute the same; False when they do not, or when no part of the model that holds the
        fused tensor and its consumer runs on hidden states alone.
    """
    few = dict(narrow.named_parameters())
    axes = {name: _axis(p, few[name]) for name, p in wide.named_parameters() if p.shape != few[name].shape}
    fused = next((name for name, axis in axes.items() if wide.get_parameter(name).shape[axis] > WIDE), None)
    if fused is None:  # the number of neurons is rounded
        return False
    weight = wide.get_parameter(fused)
    hidden = weight.shape[1 - axes[fused]]
    path = fused.rpartition(".")[0]
    while "." in path:
        path = path.rpartition(".")[0]
        inside = [name for name in axes if name.startswith(f"{path}.")]
        consumers = [
            n for n in inside if wide.get_parameter(n).shape[axes[n]] == WIDE and wide.get_parameter(n).ndim > 1
        ]
        if consumers:
            mine = {name.removeprefix(f"{path}."): axes[name] for name in inside}
            return _same(wide.get_submodule(path), narrow.get_submodule(path), mine, hidden)
    return False


def _axis(wide: Tensor, narrow: Tensor) -> int:
    return next(axis for axis, (a, b) in enumerate(zip(wide.shape, narrow.shape, strict=True)) if a != b)


def _same(wide: nn.Module, narrow: nn.Module, axes: dict[str, int], hidden: int) -> bool:
    """Run both on the same random hidden states (1, 3, hidden)."""
    generator = torch.Generator().manual_seed(0)
    wide, narrow = wide.to_empty(device="cpu").eval(), narrow.to_empty(device="cpu").eval()
    few = dict(narrow.named_parameters())
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            parameter.normal_(generator=generator)
            if name not in axes:
                few[name].copy_(parameter)
                continue
            copies = range(parameter.shape[axes[name]] // WIDE)
            few[name].copy_(parameter.index_select(axes[name], torch.cat([STAY + WIDE * copy for copy in copies])))
            if len(copies) == 1:
                parameter.index_fill_(axes[name], GONE, 0.0)
        states = torch.randn(1, 3, hidden, generator=generator)
        try:
            return torch.allclose(wide(states), narrow(states), rtol=1e-3, atol=1e-3)
        except Exception:  # whatever else it needs beside hidden states, or gives beside one tensor
            return False
