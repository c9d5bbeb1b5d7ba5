"""The input of a step that is planned: opened, its layers known, and the place of the output checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CompressError
from aicompress.layer import Kind, LayerInfo
from aicompress.pipeline.step.checks import NOT_OF_A_STEP, known_kinds, place_problems
from aicompress.pipeline.step.input import Adapted, open_input
from aicompress.pipeline.step.output import Destination, Planned


@dataclass(frozen=True)
class OpenedInput:
    """The input of a step, as a planner finds it.

    Attributes:
        checkpoint: the input.
        infos: every layer of it.
        kinds: what the model definition says of the parameters.
        warnings: what the user should know of it.
        problems: what is wrong with the place of the output, and with the gates.
    """

    checkpoint: Checkpoint
    infos: tuple[LayerInfo, ...]
    kinds: Mapping[str, Kind | None] | None
    warnings: tuple[str, ...]
    problems: tuple[CompressError, ...]


def opened_input(
    source: str | Path | Adapted,
    destination: Destination,
    gates: Sequence[str],
    absent: Mapping[str, str] = NOT_OF_A_STEP,
) -> OpenedInput:
    """Open an input and look at its headers; `absent` is what its gates cannot ask for.

    Raises:
        CheckpointError: it is missing, damaged, or in a format this version does not read.
    """
    checkpoint, tied = open_input(source)
    problems = place_problems([checkpoint], destination, gates, absent)
    kinds, unknown = known_kinds(checkpoint)
    return OpenedInput(checkpoint, tuple(checkpoint.layers(kinds)), kinds, (*tied, *unknown), tuple(problems))


def as_stored(checkpoint: Checkpoint, layers: Sequence[LayerInfo]) -> dict[str, Planned]:
    """Every parameter of an output that has them in the forms that they are stored in."""
    infos = {info.tensor: info for info in reversed(layers)}
    return {
        name: Planned(spec, checkpoint.outline(name), infos.get(name), checkpoint.manifest.owners(name))
        for name, spec in checkpoint.parameters().items()
    }
