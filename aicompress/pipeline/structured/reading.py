"""What structural steps read of the running model, as calibration is asked for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aicompress.checkpoint import Checkpoint
from aicompress.layer import LayerInfo
from aicompress.pipeline.calibration.request import StepInput
from aicompress.pipeline.step.checks import known_kinds
from aicompress.pipeline.step.layer_plan import LayerPlan
from aicompress.pipeline.step.output import Output
from aicompress.pipeline.structured.edit import Edit


@dataclass(frozen=True)
class Measurement(StepInput):
    """A measurement on the running model.

    Attributes:
        layers: whose inputs or gradients are read, with the method's parameters.
    """

    layers: Sequence[LayerPlan]


@dataclass(frozen=True)
class Reading(Measurement):
    """The statistics by which a run chooses the units that stay, and refits what reads them.

    Attributes:
        output: of the step; gradients lie beside it while they are needed.
        edit: the structures, and how many of their units stay.
        needs: statistics of the consumers' inputs, and "gradients".
        compares: the original model's inputs are compared with the compressed one's.
    """

    output: Output
    edit: Edit
    needs: frozenset[str]
    compares: bool

    @property
    def tensors(self) -> list[str]:
        """Parameters of which a file of statistics must tell: gradients of all that changes, else consumers' inputs."""
        if "gradients" in self.needs:
            return list(dict.fromkeys(layer.info.tensor for layer in self.layers))
        return self.edit.consumers


def layers_of(checkpoint: Checkpoint, tensors: Sequence[str]) -> list[LayerInfo]:
    """The layers that some parameters belong to, in the input's order."""
    wanted = set(tensors)
    infos = checkpoint.layers(known_kinds(checkpoint)[0])
    return [info for info in infos if info.tensor in wanted and info.kind != "experts"]
