"""Plan the removal of channels from a network: the graph traced and tried, the channels chosen, every byte known.

Unlike other plans this one loads the model: what depends on what is seen by running it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from aicompress import data
from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.place import require_writable
from aicompress.data import arrays
from aicompress.errors import CompressError, RecipeError, Refused, raise_all
from aicompress.layer import Kind, LayerInfo
from aicompress.methods import get
from aicompress.methods.prune.channels import ChannelsConfig
from aicompress.methods.structural import ChannelMethod
from aicompress.model.channels.cut import Kept, kept_places
from aicompress.model.channels.graph import OUTPUT, ChannelGroup, Fixed
from aicompress.pipeline.calibration.requirements import Request, module_of
from aicompress.pipeline.channels import selection as choosing
from aicompress.pipeline.channels.config_widths import FIELDS, HINT
from aicompress.pipeline.channels.example_inputs import as_taken
from aicompress.pipeline.channels.outline import Draft
from aicompress.pipeline.channels.selection import Evidence
from aicompress.pipeline.step.checks import (
    decoding,
    known_kinds,
    left_out,
    place_problems,
    require_loads,
    require_space,
)
from aicompress.pipeline.step.dry_run import summarize_rows
from aicompress.pipeline.step.input import open_input
from aicompress.pipeline.step.output import Destination, Output, Planned, lineage_step
from aicompress.recipe import Recipe, Select
from aicompress.report.model import LayerRow
from aicompress.report.plan import PlanSummary
from aicompress.selection import select
from aicompress.weights import Dense, Weight

SAMPLES = 1024  # calibration samples at most where the recipe does not say
BATCH = 64


@dataclass(frozen=True)
class ChannelPlan:
    """A removal of channels that can be run, or printed.

    Attributes:
        checkpoint: the input.
        recipe: what to do.
        method: how.
        module: the whole network with its weights in float32.
        names: names of the checkpoint's parameters in the module.
        groups: each group of channels with the units that stay.
        kept: what stays of every layer that loses something.
        infos: every layer of the input.
        output: every file and byte of the output.
        evidence: calibration data, where the recipe has it.
        fixed: layers whose channels cannot be removed.
        warnings: what the user should know.
        kinds: what the model definition says of the parameters.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    method: ChannelMethod
    module: nn.Module
    names: Mapping[str, str]
    groups: tuple[tuple[ChannelGroup, list[int]], ...]
    kept: Mapping[str, Kept]
    infos: tuple[LayerInfo, ...]
    output: Output
    evidence: Evidence | None
    fixed: tuple[Fixed, ...]
    warnings: tuple[str, ...]
    kinds: Mapping[str, Kind | None] | None = None

    @property
    def config(self) -> ChannelsConfig:
        assert isinstance(self.recipe.method, ChannelsConfig)
        return self.recipe.method

    @property
    def refits(self) -> bool:
        return self.evidence is not None if self.config.refit is None else self.config.refit

    @property
    def recalibrates(self) -> bool:
        given = self.config.recalibrate_norms
        return self.evidence is not None if given is None else given

    def rows(self, seconds: Mapping[str, float] | None = None) -> tuple[LayerRow, ...]:
        """A row for each layer of the input."""
        return tuple(self._row(info, (seconds or {}).get(info.tensor, 0.0)) for info in self.infos)

    def _row(self, info: LayerInfo, seconds: float) -> LayerRow:
        planned = self.output.parameters[info.tensor]
        path = self.names[info.tensor].rpartition(".")[0]
        size = planned.dense.nbytes if planned.weight is None else _nbytes(self.output, info.tensor, planned.weight)
        form = Dense.form if planned.weight is None else planned.weight.form
        reason = next((one.reason for one in self.fixed if one.name == path), "left as it is")
        if path not in self.kept or info.part:
            return LayerRow(info.name, info.kind, "-", "-", form, {}, info.nbytes, size, 0.0, seconds, reason)
        old = {"out": info.tensor_shape[0], "in": info.tensor_shape[1]}
        new = {"out": planned.dense.shape[0], "in": planned.dense.shape[1]}
        detail = {side: f"{new[side]} of {old[side]}" for side in old if new[side] != old[side]}
        decoded = info.outline is not None and planned.weight is None
        note = "its form cannot hold the cut: decoded" if decoded else ""
        name = self.method.name
        return LayerRow(info.name, info.kind, "method", name, form, detail, info.nbytes, size, None, seconds, note)

    def summary(self) -> PlanSummary:
        """What a dry run prints."""
        stored = {info.name: info.stored for info in self.infos}
        return summarize_rows(self.output, self.checkpoint, self.rows(), stored, self.warnings)


def _nbytes(output: Output, name: str, weight: Weight) -> int:
    return sum(tensor.nbytes for tensor in output.encode(name, weight).values())


def make_plan(
    source: str | Path, destination: Destination, recipe: Recipe, command: str, request: Request | None = None
) -> ChannelPlan:
    """Check everything, trace the network, choose the channels and lay out the output.

    Raises:
        Refused: or Problems, everything that is wrong.
    """
    method = get(command, recipe.method.name)
    if not isinstance(method, ChannelMethod) or not isinstance(recipe.method, ChannelsConfig):
        raise TypeError(f"{method.name} does not remove channels")
    request = request or Request()
    checkpoint, warnings = open_input(source)
    problems = place_problems([checkpoint], destination, recipe.gates)
    kinds, told = known_kinds(checkpoint)
    warnings += told
    infos = tuple(checkpoint.layers(kinds))
    chosen, found = select(list(infos), recipe.select.include, recipe.select.exclude, recipe.select.kinds)
    raise_all(problems + found + list(_problems(checkpoint, recipe, method, request)))
    require_writable(destination.path)
    module, names = _loaded(checkpoint, recipe, request)
    evidence = _evidence(recipe, module)
    groups, fixed = choosing.groups(checkpoint, recipe, module, evidence)
    groups, unselected = choosing.selected(module, groups, {names[info.tensor] for info in chosen})
    draft = Draft(
        checkpoint, destination, recipe, lineage_step(command, recipe, checkpoint.source), module, names, infos
    )
    choice, edited = choosing.choice(draft, method, groups, evidence)
    kept = kept_places(module, zip(groups, choice, strict=True))
    output = draft.output(kept, edited)
    require_loads(checkpoint, output.config, {name: each.dense for name, each in output.parameters.items()}, {})
    require_space(output)
    pairs = tuple(zip(groups, choice, strict=True))
    plan = ChannelPlan(
        checkpoint,
        recipe,
        method,
        module,
        names,
        pairs,
        kept,
        infos,
        output,
        evidence,
        tuple(fixed + unselected),
        (),
        kinds,
    )
    return replace(plan, warnings=(*warnings, *_warnings(plan), *left_out(checkpoint)))


def _problems(
    checkpoint: Checkpoint, recipe: Recipe, method: ChannelMethod, request: Request
) -> Iterator[CompressError]:
    """What is wrong with a recipe before anything is loaded."""
    config = recipe.method
    assert isinstance(config, ChannelsConfig)
    if request.stats:
        yield Refused(f"{method.name} reads no statistics of inputs", "leave --stats out")
    for name in ("rules", "levels"):
        if getattr(recipe, name):
            yield RecipeError(f"{name}: has no meaning for channels, whose layers change together", "remove it")
    if checkpoint.config is not None:
        yield from _unexpressed(checkpoint, recipe, config)
    elif recipe.model is None:
        hint = "give the recipe `model: {sequential: [conv1, relu, flatten, fc]}`, or a factory"
        yield RecipeError(f"{checkpoint.path} names no architecture, and channels are traced by running it", hint)
    if recipe.calibration is not None:
        if recipe.calibration.kind != "arrays":
            yield RecipeError("calibration: channels reads arrays", "calibration: {arrays: file.npz, inputs: name}")
        yield from data.problems(recipe.calibration)
        return
    asked = ["score"] if method.evidence(config) else []
    asked += [name for name in ("refit", "recalibrate_norms") if getattr(config, name)]
    for name in asked:
        yield RecipeError(f"method.{name}: {getattr(config, name)} needs calibration data", _ADD)


def _unexpressed(checkpoint: Checkpoint, recipe: Recipe, config: ChannelsConfig) -> Iterator[CompressError]:
    """What config.json cannot say: it holds one width for a stage, or none at all."""
    if not any(field in (checkpoint.config or {}) for field in FIELDS):
        yield Refused(
            f"{checkpoint.path}: its config.json holds no widths of stages, so it cannot express other channels", HINT
        )
    if recipe.model is not None:
        yield RecipeError("model: config.json names the architecture already", "leave it out")
    if recipe.select != Select():
        yield RecipeError("select: config.json holds one width for all layers of a stage", "leave it out")
    if config.scope == "global" or (config.keep is None and config.sparsity is None):
        yield RecipeError(
            "config.json holds one width for a stage: neither scope: global nor a target can be met exactly",
            "give sparsity or keep, with scope: layer",
        )


_ADD = "add `calibration: {arrays: file.npz, inputs: images, labels: labels, samples: 1024}`"


def _loaded(checkpoint: Checkpoint, recipe: Recipe, request: Request) -> tuple[nn.Module, dict[str, str]]:
    """The network with plain weights in float32, compressed ones decoded, and what it calls its parameters.

    Raises:
        Refused: it keeps several of the checkpoint's parameters in one.
    """
    from aicompress.model.loading.partial_model import PartialModel

    module: nn.Module = module_of(checkpoint, recipe, request.allow_code)
    partial = PartialModel(checkpoint, module, dtype=torch.float32)
    merged = next((name for name, (_, merge) in partial.targets.items() if merge is not None), None)
    if merged is not None:
        raise Refused(f"the model keeps {merged} in one tensor with others: its channels are not followed", "")
    partial.load(lambda name: True)
    names = {name: target for name, (target, _) in partial.targets.items()}
    return module.requires_grad_(False).eval(), names


def _evidence(recipe: Recipe, module: nn.Module) -> Evidence | None:
    if recipe.calibration is None:
        return None
    inputs, labels, source = arrays(recipe.calibration, recipe.seed)
    if recipe.calibration.samples is None and len(inputs) > SAMPLES:
        fewer = recipe.calibration.model_copy(update={"samples": SAMPLES})
        inputs, labels, source = arrays(fewer, recipe.seed)
    batches = tuple(
        (as_taken(module, inputs[at : at + BATCH]), None if labels is None else labels[at : at + BATCH])
        for at in range(0, len(inputs), BATCH)
    )
    return Evidence(batches, source)


def _warnings(plan: ChannelPlan) -> Iterator[str]:
    """What the user should know before the step runs."""
    if not plan.kept:
        yield "nothing is removed: the share rounds to no channel of any group"
    fixed = [f"{one.name}: {one.reason}" for one in plan.fixed if one.reason != OUTPUT]
    if fixed:
        yield f"layers that keep all their channels: {'; '.join(fixed[:3])}" + ("; ..." if len(fixed) > 3 else "")
    decoded = [name for name, p in plan.output.parameters.items() if _is_decoded(plan.checkpoint, name, p)]
    yield from decoding(decoded)
    norms = any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in plan.module.modules())
    if plan.kept and norms and not plan.recalibrates:
        yield "the statistics of batch norms are those of the whole network: calibration data would estimate them anew"


def _is_decoded(checkpoint: Checkpoint, name: str, planned: Planned) -> bool:
    return name in checkpoint.manifest.entries and planned.weight is None
