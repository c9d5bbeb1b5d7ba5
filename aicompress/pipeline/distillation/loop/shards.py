"""Where the trained numbers of a student lie: all of them in every process, or some rows of each in one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from aicompress.methods.outputs import Output
from aicompress.model.distillation.outputs import body_of
from aicompress.model.distillation.sharding import all_rows, is_divided, own_rows, rows_of, shard_parameters
from aicompress.pipeline.distillation.trained.optimizer import TrainedParameters
from aicompress.pipeline.distillation.trained.student import Student
from aicompress.pipeline.step.workers import Processes


@dataclass(frozen=True)
class Shards:
    """What is divided over the processes.

    Attributes:
        divided: the model's own parameters, whose rows are divided, by name; empty where every process has everything.
        zeros: how many numbers of each parameter stay zero, in all processes.
    """

    divided: Mapping[str, Tensor] = field(default_factory=dict)
    zeros: Mapping[str, int] = field(default_factory=dict)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """What this process holds of a tensor that belongs to a parameter."""
        return rows_of(self.divided[name], whole) if self._divides(name, whole) else whole

    def whole(self, name: str, part: Tensor) -> Tensor:
        """All of a tensor that belongs to a parameter; every process asks for it at once."""
        return all_rows(self.divided[name], part) if self._divides(name, part) else part

    def _divides(self, name: str, tensor: Tensor) -> bool:
        return name in self.divided and tensor.ndim > 0  # an optimizer counts its steps in a number

    def gradients(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradients of all parameters that have one, each put where its parameter is moved."""
        for name, divided in self.divided.items():
            gradient = divided.grad
            parameters[name].grad = None if gradient is None else own_rows(gradient)
            divided.grad = None
        return {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}

    def own(self, gradients: Mapping[str, Tensor]) -> list[Tensor]:
        """Those that are of this process's samples alone; rows of divided parameters come averaged."""
        return [gradient for name, gradient in gradients.items() if name not in self.divided]

    def norm(self, gradients: Mapping[str, Tensor], team: Processes) -> Tensor:
        """The length of all gradients together, in every process."""
        if not self.divided:
            return nn.utils.get_total_norm(list(gradients.values()))
        alike = nn.utils.get_total_norm(self.own(gradients))
        rows = nn.utils.get_total_norm([gradient for name, gradient in gradients.items() if name in self.divided])
        return (alike.square() + team.total(rows.square())).sqrt()


def divided_student(
    student: Student, trained: TrainedParameters, model: nn.Module, reads: frozenset[Output], device: torch.device
) -> tuple[Student, TrainedParameters, Shards, nn.Module]:
    """Divide a student over the processes: what each of them trains is its own rows.

    Args:
        student: as it lies in the model.
        trained: its parameters, whole.
        model: on any device.
        reads: outputs that are read of it.
        device: where it is to run.

    Returns:
        Its parameters as they lie in the model, this process's rows of them, how they are divided, what runs it.
    """
    places = {
        id(parameter): (module, leaf)
        for module in model.modules()
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    }
    running = shard_parameters(model, body_of(model, reads), device)

    def now(parameter: Tensor) -> Tensor:
        module, leaf = places[id(parameter)]
        return module._parameters[leaf]  # type: ignore[return-value]

    stored = {name: {s: now(p) for s, p in tensors.items()} for name, tensors in student.stored.items()}
    current = {name: now(parameter) for name, parameter in trained.parameters.items()}
    divided = {name: parameter for name, parameter in current.items() if is_divided(parameter)}
    shards = Shards(divided, {name: int(zero.sum()) for name, zero in trained.zeros.items()})
    rows = {name: nn.Parameter(own_rows(parameter)) for name, parameter in divided.items()}
    zeros = {name: shards.part(name, zero.to(device)) for name, zero in trained.zeros.items()}
    own = replace(trained, parameters={**current, **rows}, zeros=zeros)
    return replace(student, stored=stored), own, shards, running


def gathered(stored: Mapping[str, Mapping[str, Tensor]], keeps: bool) -> dict[str, dict[str, Tensor]]:
    """Divided tensors put together on the CPU, one after the other; every process asks at once.

    Args:
        stored: tensors by parameter and suffix.
        keeps: this process is the one that needs them.
    """
    whole: dict[str, dict[str, Tensor]] = {}
    for name, tensors in stored.items():
        whole[name] = {}
        for suffix, tensor in tensors.items():
            full = all_rows(tensor, own_rows(tensor)) if is_divided(tensor) else tensor.detach()
            whole[name][suffix] = full.cpu() if keeps else full.new_empty(0)
    return whole
