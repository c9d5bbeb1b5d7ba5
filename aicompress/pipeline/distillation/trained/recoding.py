"""A student that is learnt as codes: the model runs with what will be written, and the loss pays for the bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from aicompress.checkpoint import Checkpoint
from aicompress.errors import RecipeError
from aicompress.layer import as_matrix
from aicompress.methods.modes import ModeConfig, Recodes
from aicompress.model.loading.resize import owner_of
from aicompress.pipeline.distillation.trained.optimizer import TrainedParameters
from aicompress.pipeline.distillation.trained.student import Student
from aicompress.pipeline.distillation.trained.student_mode import StudentMode
from aicompress.pipeline.step.output import Planned
from aicompress.weights import Weight


class _Running(nn.Module):
    """The weight that a layer runs with, of what is learnt."""

    def __init__(self, recodes: Recodes[ModeConfig], learnt: dict[str, Tensor]) -> None:
        super().__init__()
        self.recodes = recodes
        self.learnt = nn.ParameterDict(learnt)

    def forward(self, tensor: Tensor) -> Tensor:
        return self.recodes.running(as_matrix(tensor), dict(self.learnt.items())).reshape(tensor.shape)


@dataclass(frozen=True)
class Recoding:
    """The parameters of a student that are learnt as codes.

    Attributes:
        recodes: what the mode does.
        config: its parameters.
        learnt: by parameter of the checkpoint, its tensor under '' and what is learnt beside it.
        seed: of the noise.
    """

    recodes: Recodes[ModeConfig]
    config: ModeConfig
    learnt: Mapping[str, Mapping[str, Tensor]]
    seed: int

    @classmethod
    def of(cls, student: Student, model: nn.Module, recodes: Recodes[ModeConfig], seed: int) -> Recoding:
        """Let a model run with codes."""
        targets: Mapping[str, str] = model.aicompress_names  # type: ignore[assignment]
        config = student.student_mode.config
        learnt: dict[str, dict[str, Tensor]] = {}
        for name, tensors in student.stored.items():
            tensor = tensors[""]
            running = _Running(recodes, recodes.start(as_matrix(tensor.detach()), config))
            parametrize.register_parametrization(*owner_of(model, targets[name]), running)
            learnt[name] = {"": tensor, **running.learnt}
        return cls(recodes, config, learnt, seed)

    def trained(self, student: Student, keep_zeros: bool) -> TrainedParameters:
        """All that is learnt, in float32."""
        stored = {name: dict(tensors) for name, tensors in self.learnt.items()}
        trained = replace(student, stored=stored).trained(keep_zeros)
        return replace(trained, dtypes=dict.fromkeys(trained.parameters, torch.float32))

    def cost(self, done: float, draw: int | None) -> Tensor:
        """What the bits of a weight add to the loss, under noise or as they are written.

        Args:
            done: share of the steps.
            draw: number of the noise; None for the codes themselves.
        """
        number = sum(tensors[""].numel() for tensors in self.learnt.values())
        generator = None if draw is None else torch.Generator().manual_seed((self.seed * 1_000_003 + draw) % (1 << 63))
        bits = [
            self.recodes.bits(matrix, tensors, _noise(matrix, generator))
            for tensors in self.learnt.values()
            for matrix in [as_matrix(tensors[""])]
        ]
        return self.recodes.price(done, self.config) * torch.stack(bits).sum() / number

    def value(self, student: Student, name: str) -> Tensor | Weight:
        """A parameter as it is written."""
        if name not in self.learnt:
            return student.value(name)
        learnt = {suffix: tensor.detach().cpu() for suffix, tensor in self.learnt[name].items()}
        return self.recodes.written(as_matrix(learnt[""]), learnt)


def _noise(matrix: Tensor, generator: torch.Generator | None) -> Tensor | None:
    """Numbers between -1/2 and 1/2, or none."""
    if generator is None:
        return None
    return (torch.rand(matrix.shape, generator=generator) - 0.5).to(matrix.device)


def coded_outlines(
    student: Checkpoint, student_mode: StudentMode, planned: Mapping[str, Planned]
) -> dict[str, Planned]:
    """The parameters of an output, those that are learnt as codes in the form of these."""
    recodes = student_mode.mode.recodes
    if recodes is None:
        return dict(planned)
    coded = dict(planned)
    for name in (name for name, suffixes in student_mode.suffixes.items() if suffixes):
        spec = student.specs[name]
        rows, columns = as_matrix(torch.empty(spec.shape, device="meta")).shape
        coded[name] = replace(planned[name], weight=recodes.outline((rows, columns)))
    return coded


def problems(student: Checkpoint, student_mode: StudentMode, averaged: bool) -> list[RecipeError]:
    """Errors that say why a student cannot be learnt as codes.

    Args:
        averaged: the teacher is the student's own average.
    """
    if student_mode.mode.recodes is None:
        return []
    name = student_mode.mode.name
    wrong: list[RecipeError] = []
    if student.config is not None:
        what = f"mode {name} is for bare files, and {student.path} names an architecture"
        wrong.append(RecipeError(what, "quantize it, then take mode: codes or scales"))
    if averaged:
        wrong.append(RecipeError(f"mode {name} has no mean teacher", "give --teacher, the network before it"))
    return wrong
