"""How sensitive the blocks of a model are: what it loses with one of them compressed, and the others as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aicompress.layer import from_matrix
from aicompress.methods.layerwise import AnyLayerMethod
from aicompress.model.blocks.walk import Walk, walk
from aicompress.model.loading.partial_model import PartialModel
from aicompress.pipeline.calibration.data import calibration_inputs, record_of_data
from aicompress.pipeline.calibration.request import StepInput, module_of
from aicompress.pipeline.layerwise.allocation.probe import measured_part, probe_of
from aicompress.pipeline.layerwise.compress import Compression, LayerStatistics, completed
from aicompress.pipeline.step.layer_plan import LayerPlan
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.survey import SurveyResult
from aicompress.pipeline.step.workers import Processes
from aicompress.statistics import GradientStats, InputStats


@dataclass(frozen=True)
class BlockLayers:
    """Blocks of a checkpoint, and what compresses them.

    Attributes:
        step: the input, and the recipe.
        method: the recipe's.
        layers: by depth and by parameter, with explicit parameters of the method.
    """

    step: StepInput
    method: AnyLayerMethod
    layers: Mapping[int, Mapping[str, Sequence[LayerPlan]]]

    @property
    def reads(self) -> frozenset[str]:
        """Statistics of inputs that the method reads."""
        jobs = [job for parameters in self.layers.values() for layers in parameters.values() for job in layers]
        configs = [job.config for job in jobs if job.config is not None]
        return frozenset[str]().union(*(self.method.reads(config) for config in configs)) - {"gradients"}


@dataclass
class BlockTrial:
    """Compresses the layers of a block, and measures the loss when all of them are there.

    Attributes:
        blocks: the blocks.
        loss: dense parameters of a block by name -> what the model loses with them.
        progress: told of every block.
        losses: by depth, of the blocks that are done.
    """

    blocks: BlockLayers
    loss: Callable[[Mapping[str, Tensor]], float]
    progress: Progress
    losses: dict[int, float] = field(default_factory=dict)
    _changed: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def finished(self, layers: Sequence[str]) -> Mapping[str, Tensor] | None:
        return None

    def visit(self, stats: Mapping[str, InputStats]) -> Mapping[str, Tensor]:
        for depth, parameters in self.blocks.layers.items():
            for tensor in parameters.keys() & stats.keys():
                self._compress(depth, tensor, stats[tensor])
        return {}

    def finish(self) -> Tensor:
        """Compress what no statistics came of, as if nothing were known of its inputs; returns all losses, float64."""
        for depth, parameters in self.blocks.layers.items():
            for tensor in parameters if depth not in self.losses else ():
                if tensor not in self._changed.get(depth, {}):
                    self._compress(depth, tensor, InputStats(0))
        return torch.tensor([self.losses[depth] for depth in self.blocks.layers], dtype=torch.float64)

    def _compress(self, depth: int, tensor: str, inputs: InputStats) -> None:
        blocks, step, jobs = self.blocks, self.blocks.step, self.blocks.layers[depth][tensor]
        given = completed(inputs, [job.info for job in jobs])
        known = {job.info.name: LayerStatistics(given, GradientStats.flat(job.info.shape)) for job in jobs}
        weight, _ = Compression(blocks.method, step.checkpoint, step.recipe.seed).compress_parameter(
            tensor, jobs, known
        )
        spec = step.checkpoint.parameters()[tensor]
        changed = self._changed.setdefault(depth, {})
        changed[tensor] = from_matrix(weight.dense(), spec.shape, jobs[0].info.transposed).to(spec.dtype)
        if len(changed) == len(blocks.layers[depth]):
            self.losses[depth] = self.loss(self._changed.pop(depth))
            self.progress("blocks", len(self.losses), len(blocks.layers))


def by_outputs(blocks: BlockLayers, progress: Progress) -> SurveyResult:
    """Losses of the model's outputs on a part of the calibration data, float64 by block.

    Raises:
        RecipeError: the calibration data does not fit the model.
    """
    checkpoint, recipe = blocks.step.checkpoint, blocks.step.recipe
    assert recipe.calibration is not None
    model = module_of(blocks.step)
    inputs = calibration_inputs(checkpoint, model, measured_part(recipe.calibration), recipe.seed, Processes())
    with probe_of(checkpoint, module_of(blocks.step), inputs) as probe:

        def loss(changes: Mapping[str, Tensor]) -> float:
            return probe.loss({name: tensor for name, tensor in changes.items() if probe.holds(name)})

        trial = BlockTrial(blocks, loss, progress)
        if blocks.reads:
            loader = PartialModel(checkpoint, model)
            names = [name for parameters in blocks.layers.values() for name in parameters]
            places = {name: place for name in names if (place := loader.reader_of(name)) is not None}
            job = Walk(model, loader, inputs.batches, places, blocks.reads, changes=False, weights=inputs.weights)
            walk(job, trial)
        tensors = {"losses": trial.finish(), "divergence": torch.tensor(float(probe.divergence))}
    return SurveyResult(tensors, record_of_data(inputs.sources, 1))


def by_weights(blocks: BlockLayers, progress: Progress) -> SurveyResult:
    """Relative squared errors of the blocks' weights, float64 by block."""

    def loss(changes: Mapping[str, Tensor]) -> float:
        error = norm = 0.0
        for name, tensor in changes.items():
            original = blocks.step.checkpoint.dense(name).float()
            error += float((tensor.float() - original).square().sum(dtype=torch.float64))
            norm += float(original.square().sum(dtype=torch.float64))
        return error / norm if norm else 0.0

    return SurveyResult({"losses": BlockTrial(blocks, loss, progress).finish()})
