"""A model that is ready to be walked with calibration data, by one process or several together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aicompress.measure import Counted
from aicompress.model.blocks.walk import Visitor, Walk, walk
from aicompress.model.kernels.bf16_products import rounds
from aicompress.model.loading.partial_model import PartialModel
from aicompress.model.loading.places import Place
from aicompress.pipeline.calibration.data import ROWS, Inputs, calibration_inputs, record_of_data
from aicompress.pipeline.calibration.request import Step, experts_of, follows, module_of
from aicompress.pipeline.step.workers import Processes
from aicompress.statistics import InputStats
from aicompress.weights import TensorSpec


@dataclass(frozen=True)
class CalibrationRun:
    """A model that is ready to be walked.

    Attributes:
        model, loader: the model and what loads its parts.
        inputs: this process's batches.
        wanted: where the model has each selected parameter; those that it does not have are not in it.
        team: the processes that walk together.
        rounded: products of float32 matrices round their inputs to bfloat16.
        follows: blocks see what compressed blocks give, not what the original ones do.
    """

    model: Any
    loader: PartialModel
    inputs: Inputs
    wanted: Mapping[str, Place]
    team: Processes
    rounded: bool = False
    follows: bool = True

    @classmethod
    def of(cls, plan: Step, tensors: Sequence[str], team: Processes, most: int = ROWS) -> CalibrationRun:
        """Build the model without its weights, and read the calibration data.

        Args:
            plan: the step.
            tensors: parameters whose layers' inputs are looked at.
            team: the processes that walk together.
            most: samples in a batch.

        Raises:
            RecipeError: the calibration data does not fit the model.
        """
        assert plan.recipe.calibration is not None
        model = module_of(plan)
        loader = PartialModel(plan.checkpoint, model)
        inputs = calibration_inputs(plan.checkpoint, model, plan.recipe.calibration, plan.recipe.seed, team, most)
        held = experts_of(plan)
        places = {
            tensor: loader.stack_of(tensor, held[tensor].count) if tensor in held else loader.reader_of(tensor)
            for tensor in tensors
        }
        wanted = {tensor: place for tensor, place in places.items() if place is not None}
        rounded = rounds(plan.recipe.calibration.precision)
        return cls(model, loader, inputs, wanted, team, rounded, follows(plan.recipe))

    def walk(
        self,
        visitor: Visitor,
        needs: frozenset[str],
        cross: bool,
        progress: Counted,
        **options: Any,
    ) -> None:
        """Bring the statistics of every block to the visitor, `cross` among them where they are wanted.

        Args:
            visitor: compresses layers.
            needs: statistics to collect.
            cross: also compare with the original model's inputs.
            progress: told of every block.
            options: more fields of `Walk`.
        """
        options = {"rounded": self.rounded, "changes": self.follows, "weights": self.inputs.weights, **options}
        job = Walk(self.model, self.loader, self.inputs.batches, self.wanted, needs, cross, self.team, **options)
        walk(job, visitor, progress)

    def record(self) -> dict[str, Any]:
        """Where the rows came from, for the report."""
        return record_of_data(
            self.inputs.sources,
            self.team.size,
            products="bfloat16" if self.rounded else "float32",
            activations="compressed" if self.follows else "original",
        )


@dataclass
class Broadcast:
    """A visitor of several processes: what the first one has compressed, all get.

    Attributes:
        specs: what the tensors that are sent look like.
        team: the processes.
        first: does the work; None in all processes but the first.
    """

    specs: Mapping[str, TensorSpec]
    team: Processes
    first: Visitor | None

    def finished(self, layers: Sequence[str]) -> Mapping[str, Tensor] | None:
        """As the first process finds it."""
        kept = None if self.first is None else self.first.finished(layers)
        return self._sent(kept) if self.team.gather(kept is not None)[0] else None

    def visit(self, stats: Mapping[str, InputStats]) -> Mapping[str, Tensor]:
        return self._sent(None if self.first is None else self.first.visit(stats))

    def _sent(self, tensors: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
        sent: dict[str, Tensor] = {}
        for name in self.team.gather(list(tensors or ()))[0]:
            spec = self.specs[name]
            sent[name] = self.team.send(torch.empty(spec.shape, dtype=spec.dtype) if tensors is None else tensors[name])
        return sent
