"""All tensors that a training run moves or keeps, as its saved state has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aicompress.errors import CompressError
from aicompress.pipeline.distillation.loop.shards import Shards


@dataclass
class TrainingTensors:
    """Tensors of a training run by name of a parameter, of each what this process holds.

    Attributes:
        parameters: what is trained.
        optimizer: its moments.
        average: the moving average of the weights, where there is one.
        movement: -Σ w g of what is watched.
        shards: what is divided over the processes.
        best: weights as they are stored, of the lowest held-out loss; empty where the input has that.
    """

    parameters: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]
    movement: dict[str, Tensor]
    shards: Shards = field(default_factory=Shards)
    best: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Give trained parameters other values, in place."""
        for name, tensor in tensors.items():
            self.parameters[name].copy_(tensor)

    def saved(self) -> dict[str, Tensor]:
        """All of them, whole, by the names of the state's file; every process asks at once."""
        whole = self.shards.whole
        tensors = {f"weight.{name}": whole(name, tensor.detach()) for name, tensor in self.parameters.items()}
        tensors |= {f"best.{name}": whole(name, tensor) for name, tensor in self.best.items()}
        tensors |= {f"average.{name}": whole(name, tensor) for name, tensor in self.average.items()}
        tensors |= {f"movement.{name}": whole(name, tensor) for name, tensor in self.movement.items()}
        for name, parameter in self.parameters.items():
            own = self.optimizer.state.get(parameter, {})
            tensors |= {f"moment.{name}/{key}": whole(name, value) for key, value in own.items()}
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what was saved, of each tensor what this process holds.

        Raises:
            CompressError: the run that saved it watched other parameters.
        """
        part = self.shards.part
        self.put({name: part(name, tensor) for name, tensor in _under("weight.", tensors).items()})
        self.best = {name: part(name, tensor) for name, tensor in _under("best.", tensors).items()}
        averages = _under("average.", tensors)
        for name, average in self.average.items():
            average.copy_(part(name, averages[name]))
        moved = _under("movement.", tensors)
        if moved.keys() != self.movement.keys():
            raise CompressError("the stopped run did not record the same movement", "start again without --resume")
        self.movement = {name: part(name, moved[name]) for name in self.movement}
        moments = _under("moment.", tensors)
        for name, parameter in self.parameters.items():
            own = _under(f"{name}/", moments)
            if own:
                self.optimizer.state[parameter] = {key: part(name, value) for key, value in own.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
