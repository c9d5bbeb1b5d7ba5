"""Ask a small model how neurons lie in fused tensors and in merged experts, where shapes do not tell.

A number that a consumer holds changes one coordinate of what its module gives; one of a producer changes them all, by
way of its neuron. And once all consumers are silent but for one neuron, only that neuron's entries of a producer
matter: they lie in runs of all neurons, or side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aicompress.errors import CheckpointError
from aicompress.model.architecture.shapes import stored_tensors
from aicompress.model.architecture.small_models import tiny_model
from aicompress.model.architecture.small_models.reduced_model import started
from aicompress.model.architecture.small_models.tiny_inputs import inputs_of
from aicompress.model.channels.graph import tensors_of

ONE = 1  # the neuron that is looked at
UNTOLD = "how its neurons lie cannot be told"


@dataclass(frozen=True)
class Lying:
    """How the neurons of a tensor lie.

    Attributes:
        role: a producer computes them, a consumer reads them.
        span: how many entries of a neuron lie side by side.
    """

    role: Literal["producer", "consumer"]
    span: int


def lying(
    config: Mapping[str, Any], on_disk: Callable[[str], str], axes: Mapping[str, tuple[int, int]], width: int
) -> dict[str, Lying]:
    """How the neurons of each tensor lie; those of all blocks alike.

    Args:
        config: of a small model with `width` neurons in each of these layers.
        on_disk: from transformers' names to the checkpoint's.
        axes: by name on disk the axis of neurons, and how many experts the tensor holds.
        width: neurons of a layer, or of each expert.

    Raises:
        CheckpointError: the model cannot be run, or its tensors hold neurons in another way.
    """
    model = started(config)
    names = _names(model, on_disk, axes)
    shares = {}
    for name, parameter in names.items():
        shares[parameter] = _Share(parameter, *axes[name], model.get_parameter(parameter))
    trial = _Trial(model, shares, width)
    first = {tiny_model.family(name): share for name, share in reversed(shares.items())}
    roles = {kind: trial.role(share) for kind, share in first.items()}
    trial.leave_one([share for name, share in shares.items() if roles[tiny_model.family(name)] == "consumer"])
    found = {kind: Lying(roles[kind], trial.span(share)) for kind, share in first.items()}
    families = {name: tiny_model.family(names.get(name, name)) for name in axes}
    if not found.keys() >= set(families.values()):
        raise CheckpointError(UNTOLD)
    return {name: found[kind] for name, kind in families.items()}


def _names(model: Any, on_disk: Callable[[str], str], wanted: Collection[str]) -> dict[str, str]:
    """The parameters that lie on disk as they are, under another name or not, by that name."""
    parameters = dict(model.named_parameters())
    names = {}
    for stored, tensor in stored_tensors(model).items():
        disk = on_disk(stored)
        alike = [name for name, each in parameters.items() if each.shape == tensor.shape and torch.equal(each, tensor)]
        if disk in wanted and alike:
            names[disk] = alike[0]
    return names


@dataclass(frozen=True)
class _Share:
    """A parameter with an axis of neurons; experts lie along axis 0, or one after the other on the axis of neurons."""

    name: str
    axis: int
    experts: int
    value: Tensor

    @property
    def other(self) -> int | None:
        """Its axis that holds something else than neurons or experts."""
        taken = {self.axis, 0} if self.experts > 1 else {self.axis}
        return next((axis for axis in range(self.value.ndim) if axis not in taken), None)

    def times(self, width: int) -> int:
        """Entries of each neuron on the axis."""
        return self.value.shape[self.axis] // (width * (self.experts if self.axis == 0 else 1))

    def entries(self, width: int, span: int) -> Tensor:
        """Positions of neuron ONE of every expert on the axis, if so many of its entries lie side by side."""
        times = self.times(width)
        runs = torch.arange(times // span)[:, None] * width * span
        one = (runs + ONE * span + torch.arange(span)).reshape(-1)
        experts = torch.arange(self.experts if self.axis == 0 else 1)[:, None] * width * times
        return (experts + one).reshape(-1)

    def others(self, width: int, span: int) -> Tensor:
        """All other positions."""
        stays = torch.zeros(self.value.shape[self.axis], dtype=torch.bool)
        stays[self.entries(width, span)] = True
        return (~stays).nonzero()[:, 0]


class _Trial:
    """A small model whose feed-forward layers are watched while their parameters change.

    Raises:
        CheckpointError: it does not run.
    """

    def __init__(self, model: Any, shares: Mapping[str, _Share], width: int) -> None:
        self.model, self.shares, self.width = model, shares, width
        self.inputs = inputs_of(model)
        self.given: dict[str, Tensor] = {}
        for name in {path for share in shares for path in _parents(share) if self._holds_two(path)}:
            model.get_submodule(name).register_forward_hook(self._keep(name))
        self.before = self._run()

    def _holds_two(self, path: str) -> bool:
        inside = [share for name, share in self.shares.items() if name.startswith(f"{path}.") and share.value.ndim > 1]
        return len(inside) > 1

    def _keep(self, name: str) -> Any:
        def keep(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            given = [tensor for tensor in tensors_of(output) if tensor.is_floating_point()]
            if name not in self.given and given:  # what is called again has other inputs by then
                self.given[name] = given[0].clone()

        return keep

    def _run(self) -> dict[str, Tensor]:
        self.given = {}
        tiny_model.outputs_of(self.model, self.inputs)
        return self.given

    def _change(self, share: _Share, axis: int, entries: Tensor) -> Tensor:
        """Coordinates of what the layer gives that change with some entries, (width of the output,)."""
        place = next((path for path in reversed(_parents(share.name)) if path in self.before), None)
        if place is None:
            raise CheckpointError(UNTOLD)
        kept, shape = share.value.clone(), [1] * share.value.ndim
        shape[axis] = -1
        share.value.index_add_(axis, entries, torch.ones_like(share.value.index_select(axis, entries)))
        after, before = self._run()[place], self.before[place]
        share.value.copy_(kept)
        return (after != before).reshape(-1, before.shape[-1]).any(dim=0)

    def role(self, share: _Share) -> Literal["producer", "consumer"]:
        """What one coordinate of a parameter's other axis changes."""
        if share.other is None:
            return "producer"
        changed = self._change(share, share.other, torch.tensor([0])).nonzero()[:, 0].tolist()
        return "consumer" if changed == [0] else "producer"

    def leave_one(self, consumers: list[_Share]) -> None:
        """Silence every neuron but one."""
        for share in consumers:
            share.value.index_fill_(share.axis, share.others(self.width, 1), 0.0)
        self.before = self._run()

    def span(self, share: _Share) -> int:
        """How many entries of a neuron lie side by side in a parameter.

        Raises:
            CheckpointError: they lie neither in runs nor side by side.
        """
        times = share.times(self.width)
        if times == 1:
            return 1
        for span in (1, times):
            if not self._change(share, share.axis, share.others(self.width, span)).any():
                return span
        raise CheckpointError(UNTOLD)


def _parents(name: str) -> list[str]:
    """Modules that a parameter lies in, the outermost first."""
    pieces = name.split(".")[:-1]
    return [".".join(pieces[:length]) for length in range(1, len(pieces) + 1)]
