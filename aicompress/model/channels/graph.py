"""Dependency groups of channels: a unit is rows of some layers and columns of the layers that read them.

torch-pruning traces the graph (Fang et al. 2023, arXiv:2301.12900): through norms, residual sums, concatenations and
the flattening before a linear layer. What it takes for granted (any operation it does not know acts on each channel
alone) is not taken for granted here: `model.channels.removable` removes channels of every group and compares.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aicompress.errors import CheckpointError, first_line

_PRODUCTS = re.compile(r"bmm|scaled_?dot_?product", re.IGNORECASE)
_HINT = "channels are followed through convolutions, linear layers, norms, sums and concatenations"
OUTPUT = "its channels are the model's output"
Side = Literal["out", "in", "along"]


@dataclass(frozen=True)
class Member:
    """Where one tensor or layer holds the units of a group.

    Attributes:
        path: of the module, or of a parameter that belongs to no layer.
        side: a layer's outputs, its inputs, or both at once (a norm, a depthwise convolution, a lone parameter).
        places: positions on that side, (units, per unit).
        axis: of a lone parameter; None for a module.
    """

    path: str
    side: Side
    places: Tensor
    axis: int | None = None


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only be removed together.

    Attributes:
        name: the layer that the graph names it by.
        size: number of units.
        members: where the units are.
        cohorts: a label for each unit; as many must stay of every cohort. All alike but for grouped layers.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    cohorts: tuple[int, ...]

    @property
    def places(self) -> list[int]:
        """The place of each unit in its cohort."""
        counts: defaultdict[int, Iterator[int]] = defaultdict(count)
        return [next(counts[cohort]) for cohort in self.cohorts]


@dataclass(frozen=True)
class Fixed:
    """A layer whose outputs cannot be removed, and why."""

    name: str
    reason: str


_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVS = _LAYERS[1:]
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.PReLU)


def channel_groups(module: nn.Module, inputs: Any) -> tuple[list[ChannelGroup], list[Fixed]]:
    """Groups of channels of a module, in its order of definition, and the layers that have none to give.

    Args:
        module: with weights; its parameters are asked for gradients while it is traced.
        inputs: of one forward pass: a tensor, or keyword arguments.

    Raises:
        CheckpointError: the network cannot be traced, or multiplies activations as attention does: which channels then
            go together cannot be followed, and torch-pruning 1.6 may not return.
    """
    graph = _traced(module, inputs)
    if any(_PRODUCTS.search(str(getattr(each, "_grad_fn", ""))) for each in graph.module2node):
        raise CheckpointError(f"{type(module).__name__} multiplies activations by each other, as attention does", _HINT)
    names = {each: name for name, each in module.named_modules()}
    order = {name: number for number, name in enumerate(names.values())}
    groups: list[ChannelGroup] = []
    fixed: list[Fixed] = []
    for items in graph.get_all_groups(root_module_types=_LAYERS):
        root = names[items[0].dep.target.module]
        try:
            groups.append(_group(_first(items, graph, names, root), items, graph, names))
        except _Unfit as error:
            fixed.append(Fixed(root, str(error)))
    return sorted(groups, key=lambda group: order[group.name]), sorted(fixed, key=lambda one: order[one.name])


class _Unfit(Exception):
    """A group that cannot be pruned."""


def _traced(module: nn.Module, inputs: Any) -> Any:
    from torch_pruning import DependencyGraph

    wanted = [parameter.requires_grad for parameter in module.parameters()]
    training = module.training
    try:
        with torch.enable_grad():
            module.requires_grad_(True)
            return DependencyGraph().build_dependency(module, inputs, forward_fn=_forward, verbose=False)
    except Exception as error:  # what the tracer does not expect
        reason = first_line(error)
        raise CheckpointError(f"torch-pruning cannot trace {type(module).__name__}: {reason}", _HINT) from error
    finally:
        for parameter, before in zip(module.parameters(), wanted, strict=True):
            parameter.requires_grad_(before)
        module.train(training)


def _forward(module: nn.Module, inputs: Any) -> list[Tensor]:
    return tensors_of(forward(module, inputs))


def forward(module: nn.Module, inputs: Any) -> Any:
    """Run a module on a tensor or on keyword arguments."""
    return module(**inputs) if isinstance(inputs, dict) else module(inputs)


def tensors_of(output: Any) -> list[Tensor]:
    """The floating tensors of any output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        return [tensor for value in output.values() for tensor in tensors_of(value)]
    if isinstance(output, list | tuple):
        return [tensor for value in output for tensor in tensors_of(value)]
    return []


def _first(items: Any, graph: Any, names: dict[Any, str], root: str) -> str:
    """The first layer that computes a group's units, in order of definition."""
    makers = {item.dep.target.module for item in items if graph.is_out_channel_pruning_fn(item.dep.handler)}
    return next((name for module, name in names.items() if isinstance(module, _LAYERS) and module in makers), root)


def _group(root: str, items: Any, graph: Any, names: dict[Any, str]) -> ChannelGroup:
    size = len(items[0].idxs)
    members: list[Member] = []
    labels: list[list[int]] = [[0] * size]
    for item in items:
        target, handler = item.dep.target, item.dep.handler
        module = target.module
        if isinstance(module, nn.Parameter):
            places = _places(item, size, graph._param_to_name[module])
            members.append(Member(graph._param_to_name[module], "along", places, target.pruning_dim))
            continue
        if module not in names:
            continue  # an operation of the graph: a sum, a concatenation, a view
        side, groups = _side(module, graph.is_out_channel_pruning_fn(handler), names[module])
        places = _places(item, size, names[module])
        members.append(Member(names[module], side, places))
        if groups > 1:
            width = _width(module, side) // groups
            if places.shape[1] != 1:
                raise _Unfit(f"its channels are spread over the groups of {names[module]}")
            labels.append((places[:, 0] // width).tolist())
    if not any(member.side == "in" for member in members):
        raise _Unfit(OUTPUT)
    return ChannelGroup(root, size, tuple(members), _cohorts(labels))


def _side(module: nn.Module, is_out: bool, name: str) -> tuple[Side, int]:
    """The side of a module that units lie on, and in how many groups it is divided there."""
    if isinstance(module, _NORMS):
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
            raise _Unfit(f"{name} normalises over several axes")
        return "along", module.num_groups if isinstance(module, nn.GroupNorm) else 1
    if isinstance(module, _CONVS) and module.groups > 1:
        if isinstance(module, _TRANSPOSED):
            raise _Unfit(f"{name} is a transposed convolution in groups")
        if module.groups == module.in_channels == module.out_channels:
            return "along", 1
        return ("out" if is_out else "in"), module.groups
    if isinstance(module, _LAYERS):
        return ("out" if is_out else "in"), 1
    if isinstance(module, nn.Embedding):
        return "along", 1
    raise _Unfit(f"its channels reach {name}, a {type(module).__name__}")


def _width(module: Any, side: Side) -> int:
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    return int(module.out_channels if side == "out" else module.in_channels)


def _places(item: Any, size: int, name: str) -> Tensor:
    """Positions by unit, (units, per unit); each unit must have as many."""
    roots = torch.tensor([-1 if root is None else root for root in item.root_idxs])
    places = torch.tensor(item.idxs)
    counts = torch.bincount(roots.clamp_min(0), minlength=size)
    if bool((roots < 0).any()) or len(counts) != size or bool((counts != counts[0]).any()):
        raise _Unfit(f"its channels are not spread evenly over {name}")
    if len(set(item.idxs)) != len(places):
        raise _Unfit(f"several of its channels share a place of {name}")
    order = torch.argsort(places)
    order = order[torch.argsort(roots[order], stable=True)]
    return places[order].reshape(size, -1)


def _cohorts(labels: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """One label for each unit out of those that its layers give; the cohorts must be of one size."""
    numbers: dict[tuple[int, ...], int] = {}
    cohorts = [numbers.setdefault(label, len(numbers)) for label in zip(*labels, strict=True)]
    if len(set(torch.bincount(torch.tensor(cohorts)).tolist())) > 1:
        raise _Unfit("its layers are grouped in ways that do not fit each other")
    return tuple(cohorts)
