"""Experts scored with calibration data, by the tokens that are routed to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aicompress.errors import RecipeError
from aicompress.model.architecture.experts import Mixture
from aicompress.model.loading.partial_model import PartialModel
from aicompress.model.sensitivity.block_influence import BlockRun
from aicompress.model.sensitivity.expert_routing import Routing
from aicompress.pipeline.calibration.data import calibration_inputs
from aicompress.pipeline.calibration.record import record_of_data
from aicompress.pipeline.calibration.request import module_of
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.workers import processes
from aicompress.pipeline.structured.reading import Measurement


def routed_scores(
    measurement: Measurement, mixtures: Sequence[Mixture], reap: bool, progress: Progress
) -> tuple[list[Tensor], dict[str, Any]]:
    """Scores of the experts of every mixture, (experts,) float64 each, and the record of the calibration data.

    Args:
        measurement: the model and the data.
        mixtures: whose experts are scored.
        reap: what an expert's answers weigh on its tokens; otherwise how many tokens it gets.
        progress: told when the model begins to run.

    Raises:
        RecipeError: experts that cannot be watched.
    """
    checkpoint, recipe = measurement.checkpoint, measurement.recipe
    assert recipe.calibration is not None
    model = module_of(measurement)
    loader, team = PartialModel(checkpoint, model), processes(torch.device("cpu"))
    paths = {mixture.name: _module(loader, mixture) for mixture in mixtures}
    inputs = calibration_inputs(checkpoint, model, recipe.calibration, recipe.seed, team)
    progress("experts", 0, 1)
    routing = Routing({paths[mixture.name]: mixture.size for mixture in mixtures})
    totals = routing.measure(BlockRun(model, loader, inputs.batches, team))
    scores = [_scores(totals[paths[mixture.name]], reap) for mixture in mixtures]
    return scores, record_of_data(inputs.sources, team.size)


def require_watchable(measurement: Measurement, mixtures: Sequence[Mixture]) -> None:
    """One module runs the experts of each mixture.

    Raises:
        RecipeError: each expert is a module of its own.
    """
    loader = PartialModel(measurement.checkpoint, module_of(measurement))
    for mixture in mixtures:
        _module(loader, mixture)


def _scores(totals: Tensor, reap: bool) -> Tensor:
    """An expert that no token reached has score 0."""
    tokens, weighed = totals.unbind(dim=1)
    return weighed / tokens.clamp_min(1) if reap else tokens


def _module(loader: PartialModel, layer: Mixture) -> str:
    """Path of the module that runs the experts of a layer.

    Raises:
        RecipeError: each expert is a module of its own.
    """
    names = [layer.single(place, 0) for place in layer.singles]
    names += [name for name, _ in layer.axes if ".experts" in name]
    modules = {loader.targets[name][0].rpartition(".")[0] for name in names}
    merged = len(modules) == 1 and all(
        loader.model.get_parameter(loader.targets[name][0]).ndim >= 2 for name in names if loader.targets[name][0]
    )
    if not merged or not modules:
        raise RecipeError(
            f"{layer.name}: its experts are modules of their own, which cannot be watched together",
            "choose them by weight norm: score: norm",
        )
    return modules.pop()
