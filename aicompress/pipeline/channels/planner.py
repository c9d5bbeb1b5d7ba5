"""Plan the removal of channels: the network traced and tried, the channels chosen, every byte known.

Unlike other planners this one loads the model: channels that depend on one another are seen by running it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from aicompress import data
from aicompress.checkpoint import Checkpoint
from aicompress.data import arrays
from aicompress.disk import require_writable
from aicompress.errors import CompressError, RecipeError, Refused, raise_all
from aicompress.methods import get
from aicompress.methods.channels import AnyChannelPruner, ChannelMethod, ChannelSettings
from aicompress.model.channels.cut import kept_places
from aicompress.model.channels.graph import OUTPUT
from aicompress.model.loading.partial_model import PartialModel
from aicompress.pipeline.calibration.request import Request, StepInput, module_of
from aicompress.pipeline.channels.example_inputs import example
from aicompress.pipeline.channels.narrowing import FIELDS, HINT, Draft
from aicompress.pipeline.channels.plan import ChannelPlan
from aicompress.pipeline.channels.selection import CalibrationBatches, ChannelChoice, selected, traced
from aicompress.pipeline.step.checks import decoding, left_out, require_loads, require_space
from aicompress.pipeline.step.input import Adapted
from aicompress.pipeline.step.models.accepted_inputs import as_taken
from aicompress.pipeline.step.opening import opened_input
from aicompress.pipeline.step.output import Destination, lineage_step
from aicompress.recipe import Recipe, Select
from aicompress.selection import select

SAMPLES = 1024  # calibration samples at most where the recipe does not say
BATCH = 64


def make_plan(
    source: str | Path | Adapted, destination: Destination, recipe: Recipe, command: str, request: Request | None = None
) -> ChannelPlan:
    """Check everything, trace the network, choose the channels and lay out the output.

    Raises:
        Refused: or Problems, everything that is wrong.
    """
    method = get(command, recipe.method.name)
    if not isinstance(method, ChannelMethod):
        raise TypeError(f"{method.name} does not remove channels")
    pruner: AnyChannelPruner = method.with_config(recipe.method)
    request = request or Request()
    opened = opened_input(source, destination, recipe.gates)
    checkpoint, infos = opened.checkpoint, opened.infos
    given = StepInput(checkpoint, recipe, request)
    chosen, unmatched = select(list(infos), recipe.select.include, recipe.select.exclude, recipe.select.kinds)
    raise_all([*opened.problems, *unmatched, *_problems(given, pruner)])
    require_writable(destination.path)
    module, names = _loaded(given)
    samples = _samples(recipe, module)
    inputs = example(module, samples and samples.batches[0][0], pruner.settings.input_shape)
    groups, fixed = traced(module, inputs, str(checkpoint.path))
    request.survey.ran(f"dependencies of the channels of {len(groups)} groups")
    groups, unselected = selected(module, groups, {names[info.tensor] for info in chosen})
    step = lineage_step(command, recipe, checkpoint.source, checkpoint.foreign.beside)
    draft = Draft(checkpoint, destination, recipe, step, module, names, infos)
    choice = ChannelChoice(draft, pruner, groups, samples, request.survey)
    units, edited = choice.planned()
    pairs = tuple(zip(groups, units, strict=True))
    kept = kept_places(module, pairs)
    output = draft.output(kept, edited)
    require_loads(checkpoint, output.config, {name: each.dense for name, each in output.parameters.items()}, {})
    require_space(output)
    step_of = (checkpoint, recipe, output, opened.kinds, infos, opened.warnings)
    plan = ChannelPlan(*step_of, choice, pairs, kept, tuple(fixed + unselected))
    return replace(
        plan, warnings=(*opened.warnings, *_warnings(plan), *left_out(checkpoint, destination), *output.warnings)
    )


def _problems(given: StepInput, pruner: AnyChannelPruner) -> Iterator[CompressError]:
    """What is wrong with a recipe before anything is loaded."""
    checkpoint, recipe, settings = given.checkpoint, given.recipe, pruner.settings
    if given.request.stats:
        yield Refused(f"{pruner.method.name} reads no statistics of inputs", "leave --stats out")
    for name in ("rules", "levels"):
        if getattr(recipe, name):
            yield RecipeError(f"{name}: has no meaning for channels, whose layers change together", "remove it")
    if checkpoint.config is not None:
        yield from _unexpressed(checkpoint, recipe, settings)
    elif recipe.model is None:
        hint = "give the recipe `model: {sequential: [conv1, relu, flatten, fc]}`, or a factory"
        yield RecipeError(f"{checkpoint.path} names no architecture, and channels are traced by running it", hint)
    if recipe.calibration is not None:
        if recipe.calibration.kind != "arrays":
            yield RecipeError("calibration: channels reads arrays", "calibration: {arrays: file.npz, inputs: name}")
        yield from data.problems(recipe.calibration)
        return
    for name in settings.data_fields:
        yield RecipeError(f"method.{name} needs calibration data", _ADD)


def _unexpressed(checkpoint: Checkpoint, recipe: Recipe, settings: ChannelSettings) -> Iterator[CompressError]:
    """What config.json cannot say: it holds one width for a stage, or none at all."""
    if not any(field in (checkpoint.config or {}) for field in FIELDS):
        yield Refused(
            f"{checkpoint.path}: its config.json holds no widths of stages, so it cannot express other channels", HINT
        )
    if recipe.model is not None:
        yield RecipeError("model: config.json names the architecture already", "leave it out")
    if recipe.select != Select():
        yield RecipeError("select: config.json holds one width for all layers of a stage", "leave it out")
    if settings.share is None:
        yield RecipeError(
            "config.json holds one width for a stage: neither scope: global nor a target can be met exactly",
            "give sparsity or keep, with scope: layer",
        )


_ADD = "add `calibration: {arrays: file.npz, inputs: images, labels: labels, samples: 1024}`"


def _loaded(given: StepInput) -> tuple[nn.Module, dict[str, str]]:
    """The network with plain weights in float32, compressed ones decoded, and what it calls its parameters.

    Raises:
        Refused: it keeps several of the checkpoint's parameters in one.
    """
    module: nn.Module = module_of(given)
    partial = PartialModel(given.checkpoint, module, dtype=torch.float32)
    merged = next((name for name, (_, merge) in partial.targets.items() if merge is not None), None)
    if merged is not None:
        message = f"the model keeps {merged} in one tensor with others: its channels are not followed"
        raise Refused(message, "prune its neurons, heads or experts with `width`, `heads` or `experts`")
    partial.load(lambda name: True)
    names = {name: target for name, (target, _) in partial.targets.items()}
    return module.requires_grad_(False).eval(), names


def _samples(recipe: Recipe, module: nn.Module) -> CalibrationBatches | None:
    """The calibration data of a recipe, where it has any.

    Raises:
        RecipeError: it cannot be read.
    """
    if recipe.calibration is None:
        return None
    inputs, labels, source = arrays(recipe.calibration, recipe.seed, SAMPLES)
    batches = tuple(
        (as_taken(module, inputs[at : at + BATCH]), None if labels is None else labels[at : at + BATCH])
        for at in range(0, len(inputs), BATCH)
    )
    return CalibrationBatches(batches, source)


def _warnings(plan: ChannelPlan) -> Iterator[str]:
    """What the user should know before the step runs."""
    if not plan.kept:
        yield "nothing is removed: the share rounds to no channel of any group"
    fixed = [f"{one.name}: {one.reason}" for one in plan.fixed if one.reason != OUTPUT]
    if fixed:
        yield f"layers that keep all their channels: {'; '.join(fixed[:3])}" + ("; ..." if len(fixed) > 3 else "")
    coded = plan.checkpoint.manifest.entries
    yield from decoding([name for name, p in plan.output.parameters.items() if name in coded and p.weight is None])
    norms = any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in plan.choice.draft.module.modules())
    if plan.kept and norms and not plan.recalibrates:
        yield "the statistics of batch norms are those of the whole network: calibration data would estimate them anew"
