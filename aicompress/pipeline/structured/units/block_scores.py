"""Blocks of a stack scored with calibration data while the step is planned: names and config.json depend on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.errors import Refused, raise_all
from aicompress.layer import GradientStats
from aicompress.methods.structural import StructuralMethod
from aicompress.model.architecture.architecture import Stack
from aicompress.model.blocks.find import find_blocks
from aicompress.model.loading.partial_model import PartialModel
from aicompress.model.sensitivity.block_influence import Passage
from aicompress.pipeline.calibration import requirements as needs
from aicompress.pipeline.calibration.data import Inputs, calibration_inputs
from aicompress.pipeline.calibration.record import record_of_data
from aicompress.pipeline.calibration.requirements import Request
from aicompress.pipeline.step.workers import Processes, processes
from aicompress.recipe import Recipe


@dataclass(frozen=True)
class Scoring:
    """What is scored, and with what data.

    Attributes:
        checkpoint, recipe, request: of the step.
        stack: whose blocks are scored.
        layers: matrices of its blocks, with the method's parameters.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    request: Request
    stack: Stack
    layers: Sequence[needs.Chosen]

    def require(self, method: StructuralMethod) -> None:
        """Data and a model that runs.

        Raises:
            Refused: or Problems, what is missing.
        """
        if self.request.stats:
            raise Refused(f"{method.name} scores blocks, which files of statistics do not hold", "leave --stats out")
        raise_all(needs.problems(self.checkpoint, self.recipe, method, self.layers, self.request))

    def influences(self, drop: int) -> Tensor:
        """Block influence, (blocks,) float64.

        Args:
            drop: how many blocks are dropped one at a time, the others measured anew after each; what is dropped has
                influence below all others, in the order in which it goes. 0 measures once.
        """
        model, team = self._model(), processes(torch.device("cpu"))
        loader = PartialModel(self.checkpoint, model)
        passage = Passage(model, loader, self._inputs(model, team).batches, team)
        names = self._names(loader)
        gone: list[str] = []
        found = passage.influences()
        for _ in range(drop):
            gone.append(min((name for name in names if name not in gone), key=lambda name: found[name]))
            if len(gone) < drop:
                found |= passage.influences(frozenset(gone))
        first = {name: place - drop - 2.0 for place, name in enumerate(gone)}
        return torch.tensor([first.get(name, found[name]) for name in names], dtype=torch.float64)

    def taylor(self) -> Tensor:
        """Σ w² E[g²] over the matrices of each block, (blocks,) float64: what zeroing them one by one would change."""
        from aicompress.pipeline.calibration.gradients import differentiate

        total = torch.zeros(self.stack.size, dtype=torch.float64)
        infos = {layer.info.name: layer.info for layer in self.layers}

        def keep(moments: Mapping[str, GradientStats]) -> None:
            for name, found in moments.items():
                block = self.stack.block_of(infos[name].tensor)
                weight = self.checkpoint.layer(infos[name], 0).weight
                total[block] += (weight.double().square() * found.square).sum()

        differentiate(self, processes(torch.device("cpu")), keep, lambda done, total: None)
        return total

    def record(self) -> dict[str, Any]:
        """Where the samples came from, for the report."""
        team = processes(torch.device("cpu"))
        source = self._inputs(self._model(), team).source
        return record_of_data(source, team.size)

    def _model(self) -> Any:
        return needs.module_of(self.checkpoint, self.recipe, self.request.allow_code)

    def _inputs(self, model: Any, team: Processes) -> Inputs:
        assert self.recipe.calibration is not None
        return calibration_inputs(self.checkpoint, model, self.recipe.calibration, self.recipe.seed, team)

    def _names(self, loader: PartialModel) -> list[str]:
        """Module paths of the stack's blocks."""
        blocks, found = find_blocks(loader.model), [""] * self.stack.size
        for name, (target, _) in loader.targets.items():
            number = self.stack.block_of(name)
            if number is not None and not found[number]:
                found[number] = next((block.name for block in blocks if block.owns(target)), "")
        if "" in found:
            raise Refused(f"{self.stack.name}: its blocks do not run one by one", "choose them by place or magnitude")
        return found
