"""Repair a network that lost channels in closed form, layer by layer in running order.

A layer that lost inputs is fitted to the outputs that the whole network's layer gives: with x̂ what it is shown now and
r = y − Ŵx̂ − b̂ what it misses, ΔW = E[r x̂ᵀ](E[x̂ x̂ᵀ] + λI)⁻¹ (the end state of structured optimal brain surgery, from
inputs of the pruned network); with a bias both moments are centred, and the bias takes the mean. Batch norms then
get the mean and variance that their inputs have now.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.measure import Counted
from aicompress.model.blocks.input_rows import rows_of
from aicompress.model.channels.cut import Kept
from aicompress.model.channels.graph import forward


@dataclass(frozen=True)
class Repair:
    """What to do for a network that lost channels.

    Attributes:
        whole, cut: the network before and after, in evaluation mode.
        kept: what stays of each layer that lost something.
        batches: inputs of forward passes.
        refit: fit layers that lost inputs.
        norms: estimate the statistics of batch norms anew.
        damp: λ as a share of the mean of E[x̂²].
    """

    whole: nn.Module
    cut: nn.Module
    kept: Mapping[str, Kept]
    batches: Sequence[Any]
    refit: bool
    norms: bool
    damp: float


class _Reached(Exception):
    """The layer that is watched has run: the rest of the forward pass is not needed."""


def repair(job: Repair, progress: Counted = lambda done, total: None) -> list[str]:
    """Refit and re-estimate in place, from the inputs to the outputs.

    Returns:
        Paths of the layers that changed.
    """
    order = running_order(job.cut, job.batches[0])
    first = min((order.index(path) for path in job.kept if path in order), default=len(order))
    changed: list[str] = []
    for number, path in enumerate(order):
        layer = job.cut.get_submodule(path)
        kept = job.kept.get(path)
        if job.refit and kept is not None and kept.inner is not None and can_refit(layer):
            _refit(job, path, layer, kept)
        elif job.norms and number >= first and has_statistics(layer):
            _estimate(job, path, layer)
        else:
            continue
        changed.append(path)
        progress(number + 1, len(order))
    return changed


def can_refit(layer: nn.Module) -> bool:
    """Whether a layer's inputs are rows of one matrix."""
    if isinstance(layer, nn.Linear):
        return True
    return isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros"


def has_statistics(layer: nn.Module) -> bool:
    """Whether a layer normalises with running statistics."""
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None


def running_order(module: nn.Module, inputs: Any) -> list[str]:
    """Paths of the layers that run, by their first call."""
    order: list[str] = []
    hooks = []
    for path, layer in module.named_modules():
        if next(layer.children(), None) is None:

            def note(layer: nn.Module, args: Any, path: str = path) -> None:
                if path not in order:
                    order.append(path)

            hooks.append(layer.register_forward_pre_hook(note))
    try:
        with torch.no_grad():
            forward(module, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return order


def _watched(module: nn.Module, path: str, inputs: Any) -> tuple[Tensor, Tensor]:
    """What a layer is given, and what it gives."""
    seen: list[Tensor] = []

    def hook(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        seen.extend((args[0] if args else next(iter(kwargs.values())), output))
        raise _Reached

    handle = module.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            forward(module, inputs)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0], seen[1]


def _refit(job: Repair, path: str, layer: Any, kept: Kept) -> None:
    """Fit one layer to the outputs of the whole network."""
    moments = _Moments()
    for inputs in job.batches:
        given, gives = _watched(job.cut, path, inputs)
        _, wanted = _watched(job.whole, path, inputs)
        rows = rows_of(layer, given, None)
        assert rows is not None
        axis = -1 if isinstance(layer, nn.Linear) else 1
        if kept.out is not None:
            wanted = wanted.index_select(axis, kept.out)
        missing = (wanted - gives).movedim(axis, -1).reshape(len(rows), -1)
        moments.add(rows, missing)
    delta, shift = moments.solve(job.damp, centred=layer.bias is not None)
    layer.weight.data += delta.reshape(layer.weight.shape).to(layer.weight.dtype)
    if layer.bias is not None:
        layer.bias.data += shift.to(layer.bias.dtype)


@dataclass
class _Moments:
    """Sums over rows of inputs x̂ and of what the outputs miss, r."""

    count: int = 0
    sums: tuple[Tensor, ...] = ()

    def add(self, rows: Tensor, missing: Tensor) -> None:
        more = (rows.t() @ rows, missing.t() @ rows, rows.sum(dim=0), missing.sum(dim=0))
        doubles = tuple(tensor.double() for tensor in more)
        self.sums = tuple(old + new for old, new in zip(self.sums, doubles, strict=True)) if self.sums else doubles
        self.count += len(rows)

    def solve(self, damp: float, centred: bool) -> tuple[Tensor, Tensor]:
        """ΔW (out, in) and Δb (out,)."""
        gram, cross, mean, miss = (tensor / self.count for tensor in self.sums)
        if centred:
            gram, cross = gram - torch.outer(mean, mean), cross - torch.outer(miss, mean)
        ridge = damp * float(gram.diagonal().mean()) or 1.0
        gram = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
        delta = torch.linalg.solve(gram, cross.t()).t()  # (out, in)
        return delta, miss - delta @ mean


def _estimate(job: Repair, path: str, layer: Any) -> None:
    """Mean and (unbiased) variance of a batch norm's inputs over all batches."""
    count = 0
    total, squares = torch.zeros(2, len(layer.running_mean), dtype=torch.float64)
    for values in _inputs(job, path):
        count += len(values)
        total += values.sum(dim=0)
        squares += values.square().sum(dim=0)
    mean = total / count
    variance = (squares / count - mean * mean).clamp_min(0) * count / max(1, count - 1)
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(variance)


def _inputs(job: Repair, path: str) -> Iterator[Tensor]:
    for inputs in job.batches:
        given, _ = _watched(job.cut, path, inputs)
        yield given.movedim(1, -1).reshape(-1, given.shape[1]).double()  # (rows, channels)
