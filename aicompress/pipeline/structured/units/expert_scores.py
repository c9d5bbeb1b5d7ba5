"""Experts scored with calibration data, while the step is planned: which tensors stay depends on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.errors import RecipeError, Refused, raise_all
from aicompress.methods.structural import StructuralMethod
from aicompress.model.architecture.experts import Mixture
from aicompress.model.loading.partial_model import PartialModel
from aicompress.model.sensitivity.block_influence import Passage
from aicompress.model.sensitivity.expert_routing import Routing
from aicompress.pipeline.calibration import requirements as needs
from aicompress.pipeline.calibration.data import calibration_inputs
from aicompress.pipeline.calibration.record import record_of_data
from aicompress.pipeline.calibration.requirements import Request
from aicompress.pipeline.step.layer_plan import LayerPlan
from aicompress.pipeline.step.workers import processes
from aicompress.recipe import Recipe


def importances(
    checkpoint: Checkpoint, method: StructuralMethod, recipe: Recipe, request: Request, layers: list[Mixture]
) -> tuple[list[Tensor], dict[str, Any]]:
    """Scores of the experts of every mixture, (experts,) float64 each, and the record of the calibration data.

    Raises:
        Refused: or Problems, what is missing, or experts that cannot be watched.
    """
    if request.stats:
        raise Refused(f"{method.name} scores experts, which files of statistics do not hold", "leave --stats out")
    infos = checkpoint.layers(None)[:1]
    raise_all(needs.problems(checkpoint, recipe, method, [LayerPlan(i, recipe.method) for i in infos], request))
    assert recipe.calibration is not None
    model, team = needs.module_of(checkpoint, recipe, request.allow_code), processes(torch.device("cpu"))
    loader = PartialModel(checkpoint, model)
    paths = {layer.name: _module(loader, layer) for layer in layers}
    inputs = calibration_inputs(checkpoint, model, recipe.calibration, recipe.seed, team)
    routing = Routing({paths[layer.name]: layer.size for layer in layers})
    totals = routing.measure(Passage(model, loader, inputs.batches, team))
    reap = "reap" in method.reads(recipe.method)
    found = [_scores(totals[paths[layer.name]], reap) for layer in layers]
    return found, record_of_data(inputs.source, team.size)


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
