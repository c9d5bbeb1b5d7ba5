"""Hold what several layers of a checkpoint share once in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from aicompress.checkpoint import Checkpoint
from aicompress.model.kernels.linear import FastLinear
from aicompress.model.kernels.two_products import LowRankLinear
from aicompress.weights import Weight, restore

Cast = Callable[[Tensor, torch.dtype], Tensor]


@dataclass
class SharedTensors:
    """Tensors of a checkpoint that several of its layers are made of, as the first of these was given them.

    Attributes:
        checkpoint: where they come from.
    """

    checkpoint: Checkpoint
    tensors: dict[str, Tensor] = field(default_factory=dict)  # by name on disk
    factors: dict[str, FastLinear] = field(default_factory=dict)  # modules of right factors, by name on disk
    few: dict[str, Tensor] = field(default_factory=dict)  # these factors in float32, for few inputs

    def keep(self, name: str, parameter: Tensor) -> None:
        """Remember a plain parameter that other parameters are."""
        if name in self.checkpoint.manifest.lent:
            self.tensors[name] = parameter

    def has(self, name: str) -> bool:
        """Whether other layers have tensors of a parameter too."""
        return not self.checkpoint.manifest.lent.keys().isdisjoint(self.checkpoint.stored_names(name).values())

    def weight(self, name: str, weight: Weight) -> Weight:
        """A parameter's weight made of tensors that other layers hold, where there are such."""
        if not self.has(name):
            return weight
        names, lent = self.checkpoint.stored_names(name), self.checkpoint.manifest.lent
        its = weight.tensors()
        held = {s: self.tensors.setdefault(names[s], t).detach() if names[s] in lent else t for s, t in its.items()}
        return restore(held, weight.meta())

    def trainable(self, name: str, weight: Weight, dtype: torch.dtype, cast: Cast) -> dict[str, Tensor]:
        """A parameter's tensors by suffix as a layer holds them; shared ones are one parameter in all layers.

        Args:
            name: the parameter.
            weight: its weight.
            dtype: of its real numbers, unless `cast` has another one for them.
            cast: (tensor, dtype) -> it where and as the model has it.
        """
        names, tensors = self.checkpoint.stored_names(name), {}
        for suffix, tensor in weight.tensors().items():
            disk, tensor = names.get(suffix, ""), cast(tensor, dtype)
            if disk in self.checkpoint.manifest.lent:
                first = nn.Parameter(tensor) if tensor.is_floating_point() else tensor
                tensor = cast(self.tensors.setdefault(disk, first), dtype)
            tensors[suffix] = tensor
        return tensors

    def join(self, name: str, module: nn.Module) -> None:
        """Let a low-rank layer run the right factor of the first one that has the same."""
        disk = self.checkpoint.stored_names(name).get("in")
        if disk in self.checkpoint.manifest.lent and isinstance(module, LowRankLinear):
            module.right = self.factors.setdefault(disk, module.right)
            if module.few is not None:
                right, left = module.few
                module.few = self.few.setdefault(disk, right), left
