"""Layer-wise methods that need statistics: the engine brings them block by block, and the layers are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.errors import RecipeError
from aicompress.layer import InputStats, from_matrix
from aicompress.model.calibrate import Walk, walk
from aicompress.model.load import build
from aicompress.model.partial import PartialModel
from aicompress.pipeline.calibration import calibration_inputs
from aicompress.pipeline.layerwise import Work
from aicompress.pipeline.output import Planned
from aicompress.weights import Weight


def compress_blocks(work: Work) -> None:
    """Walk the model and compress every selected layer that has statistics.

    Raises:
        RecipeError: the checkpoint names no architecture to run, or the calibration data does not fit it.
    """
    plan = work.plan
    assert plan.recipe.calibration is not None
    if plan.checkpoint.config is None:
        raise RecipeError(f"{plan.method.name} runs the model, and {plan.checkpoint.path} names no architecture", "")
    model = build(plan.checkpoint)
    loader = PartialModel(plan.checkpoint, model)
    inputs = calibration_inputs(plan.checkpoint, model, plan.recipe.calibration, plan.recipe.seed)
    chosen = {layer.info.tensor: layer.info for layer in plan.layers if layer.config is not None}
    paths = {tensor: loader.path_of(tensor) for tensor in chosen}
    unseen = [chosen[tensor].name for tensor, path in paths.items() if path is None]
    if unseen:
        work.warnings.append(
            f"{len(unseen)} layers are not modules of the running model, no statistics: {unseen[0]}, ..."
        )
    wanted = {tensor: path.removesuffix(".weight") for tensor, path in paths.items() if path is not None}
    walk(Walk(model, loader, inputs.batches, wanted, plan.method.needs), _Visitor(work))


@dataclass
class _Visitor:
    """Writes the layers of each block as their statistics come in. Here layers go by their parameters' names."""

    work: Work

    def finished(self, layers: Sequence[str]) -> Mapping[str, Tensor] | None:
        """A block that an earlier run wrote: its parameters as the working files hold them."""
        if not all(name in self.work.journal.done for name in layers):
            return None
        written = _opened(self.work)
        return {name: written.dense(name) for name in layers}

    def visit(self, stats: Mapping[str, InputStats]) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, inputs in stats.items():
            planned = self.work.plan.output.parameters[name]
            by_layer = {layer.info.name: inputs for layer in self.work.plan.by_tensor[name]}
            found[name] = _dense(self.work.write(name, by_layer), planned)
        return found


def _dense(value: Weight | Tensor, planned: Planned) -> Tensor:
    if isinstance(value, Tensor):
        return value
    assert planned.info is not None
    return from_matrix(value.dense(), planned.dense.shape, planned.info.transposed).to(planned.dense.dtype)


def _opened(work: Work) -> Checkpoint:
    """The working files as a checkpoint."""
    output = work.plan.output
    work.plan.output.write_files(work.writer)
    return Checkpoint.open(work.writer.work / output.shards[0].name if output.destination.single else work.writer.work)
