"""Blocks of a stack scored with calibration data: by their influence, or by the gradients of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aicompress.errors import Refused
from aicompress.model.architecture.architecture import Stack
from aicompress.model.blocks.find import find_blocks
from aicompress.model.loading.partial_model import PartialModel
from aicompress.model.sensitivity.block_influence import BlockRun
from aicompress.pipeline.calibration.data import Inputs, calibration_inputs, record_of_data
from aicompress.pipeline.calibration.gradients import differentiate
from aicompress.pipeline.calibration.request import Step, module_of
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.workers import Processes, processes
from aicompress.statistics import GradientStats


@dataclass(frozen=True)
class BlockScores:
    """Scores of the blocks of a stack.

    Attributes:
        measurement: the model and the data; its layers are the matrices of the blocks.
        stack: whose blocks are scored.
        progress: told of the parts of the measurement.
    """

    measurement: Step
    stack: Stack
    progress: Progress

    def influences(self, drop: int) -> Tensor:
        """Block influence, (blocks,) float64.

        Args:
            drop: how many blocks are dropped one at a time, the others measured anew after each; what is dropped has
                influence below all others, in the order in which it goes. 0 measures once.
        """
        model, team = module_of(self.measurement), processes(torch.device("cpu"))
        loader = PartialModel(self.measurement.checkpoint, model)
        passage = BlockRun(model, loader, self._inputs(model, team).batches, team)
        names = self._names(loader)
        gone: list[str] = []
        influence = passage.influences()
        for _ in range(drop):
            self.progress("blocks", len(gone), drop)
            gone.append(min((name for name in names if name not in gone), key=lambda name: influence[name]))
            if len(gone) < drop:
                influence |= passage.influences(frozenset(gone))
        first = {name: place - drop - 2.0 for place, name in enumerate(gone)}
        return torch.tensor([first.get(name, influence[name]) for name in names], dtype=torch.float64)

    def gradients(self) -> Tensor:
        """Σ w² E[g²] over the matrices of each block, (blocks,) float64: what zeroing them one by one would change."""
        total = torch.zeros(self.stack.size, dtype=torch.float64)
        infos = {layer.info.name: layer.info for layer in self.measurement.layers}

        def keep(moments: Mapping[str, GradientStats]) -> None:
            for name, moment in moments.items():
                assert moment.square is not None
                block = self.stack.block_of(infos[name].tensor)
                weight = self.measurement.checkpoint.layer(infos[name], 0).weight
                total[block] += (weight.double().square() * moment.square).sum()

        team = processes(torch.device("cpu"))
        differentiate(self.measurement, team, keep, lambda done, steps: self.progress("gradients", done, steps))
        return total

    def record(self) -> dict[str, Any]:
        """Where the samples came from, for the report."""
        team = processes(torch.device("cpu"))
        return record_of_data(self._inputs(module_of(self.measurement), team).sources, team.size)

    def _inputs(self, model: Any, team: Processes) -> Inputs:
        asked = self.measurement
        assert asked.recipe.calibration is not None
        return calibration_inputs(asked.checkpoint, model, asked.recipe.calibration, asked.recipe.seed, team)

    def _names(self, loader: PartialModel) -> list[str]:
        """Module paths of the stack's blocks."""
        blocks, paths = find_blocks(loader.model), [""] * self.stack.size
        for name, (target, _) in loader.targets.items():
            number = self.stack.block_of(name)
            if number is not None and not paths[number]:
                paths[number] = next((block.name for block in blocks if block.owns(target)), "")
        if "" in paths:
            raise Refused(f"{self.stack.name}: its blocks do not run one by one", "choose them by place or magnitude")
        return paths
