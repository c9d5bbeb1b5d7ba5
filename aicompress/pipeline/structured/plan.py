"""Plan a structural step: what is cut, dropped and renamed together with config.json, and every byte of the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.place import require_writable
from aicompress.errors import CompressError, RecipeError, Refused, raise_all
from aicompress.layer import Kind, LayerInfo
from aicompress.methods import get
from aicompress.methods.prune.units.size_targets import TargetedConfig
from aicompress.methods.structural import StructuralConfig, StructuralMethod
from aicompress.pipeline.calibration import requirements as needs
from aicompress.pipeline.calibration.requirements import Request
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
from aicompress.pipeline.step.layer_plan import LayerPlan
from aicompress.pipeline.step.output import Destination, Output, arrange, lineage_step
from aicompress.pipeline.structured.edit import Change, Edit
from aicompress.pipeline.structured.outline import planned
from aicompress.pipeline.structured.size_targets import Sizing
from aicompress.pipeline.structured.units.blocks import drop_blocks
from aicompress.pipeline.structured.units.experts import drop_experts
from aicompress.pipeline.structured.units.gradient_scores import factors
from aicompress.pipeline.structured.units.heads import drop_heads
from aicompress.pipeline.structured.units.hidden import narrow_hidden
from aicompress.pipeline.structured.units.neurons import narrow
from aicompress.recipe import Recipe, Select
from aicompress.report.model import LayerRow
from aicompress.report.plan import PlanSummary
from aicompress.weights import Dense, outline_nbytes

EDITS = {
    "blocks": drop_blocks,
    "neurons": narrow,
    "heads": drop_heads,
    "hidden": narrow_hidden,
    "experts": drop_experts,
}


@dataclass(frozen=True)
class StructurePlan:
    """A structural step that can be run, or printed.

    Attributes:
        checkpoint: the input.
        recipe: what to do.
        method: how.
        infos: every layer of the input.
        edit: what changes.
        output: every file and byte of the output.
        kinds: what the model definition says of the parameters.
        request: how it gets statistics of inputs, where the method reads them.
        warnings: what the user should know.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    method: StructuralMethod
    infos: tuple[LayerInfo, ...]
    edit: Edit
    output: Output
    kinds: Mapping[str, Kind | None] | None
    request: Request = field(default_factory=Request)
    warnings: tuple[str, ...] = ()

    @property
    def reads(self) -> frozenset[str]:
        """Statistics of the consumers' inputs that the method needs."""
        changed = [self.edit.structures[number] for number in self.edit.changed]
        if self.method.units in ("blocks", "experts") or not changed:
            return frozenset()
        known = all(structure.importance is not None for structure in changed)  # measured while it was planned
        return self.method.reads(self.recipe.method) - ({"gradients"} if known else set())

    @property
    def looked_at(self) -> list[str]:
        """Parameters of which a file of statistics must tell: gradients of all that changes, else consumers' inputs."""
        if "gradients" in self.reads:
            return list(dict.fromkeys(layer.info.tensor for layer in self.layers))
        return self.edit.consumers

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        """Layers that make or read units of which some go."""
        changed = (self.edit.structures[number] for number in self.edit.changed)
        tensors = {part.tensor for structure in changed for part in structure.parts}
        return tuple(LayerPlan(info, self.recipe.method) for info in self.infos if info.tensor in tensors)

    def rows(self, seconds: Mapping[str, float] | None = None) -> tuple[LayerRow, ...]:
        """A row for each layer of the input, the dropped ones included."""
        made = {change.source: (name, change) for name, change in self.edit.changes.items()}
        took = seconds or {}
        return tuple(self._row(info, made.get(info.tensor), took.get(info.tensor, 0.0)) for info in self.infos)

    def _row(self, info: LayerInfo, made: tuple[str, Change] | None, seconds: float) -> LayerRow:
        method = self.method.name
        if made is None:
            return LayerRow(info.name, info.kind, "method", method, "dropped", {}, info.nbytes, 0, None, seconds)
        name, change = made
        size, form = self._stored(name, info)
        if not change.detail and not change.note:
            return LayerRow(info.name, info.kind, "-", "-", form, {}, info.nbytes, size, 0.0, seconds, "left as it is")
        detail = dict(change.detail)
        note = "its form cannot hold the cut: decoded" if self.decoded(name) else change.note
        error = None if change.cuts else 0.0
        return LayerRow(info.name, info.kind, "method", method, form, detail, info.nbytes, size, error, seconds, note)

    def decoded(self, name: str) -> bool:
        """Whether a compressed parameter of the input is a plain tensor of the output."""
        source = self.edit.changes[name].source
        return source in self.checkpoint.manifest.entries and self.output.parameters[name].weight is None

    def _stored(self, name: str, info: LayerInfo) -> tuple[int, str]:
        """Bytes and form of a layer of the input in the output; a decoded factor counts with the other one."""
        planned = self.output.parameters[name]
        weight = planned.weight
        if weight is None:
            return (0 if info.part == "in" else planned.dense.nbytes), Dense.form
        if not self.edit.changes[name].cuts:
            return info.nbytes, info.stored
        if info.part:
            weight = weight.parts()[info.part]
            return outline_nbytes(weight), weight.form
        return sum(tensor.nbytes for tensor in self.output.encode(name, weight).values()), weight.form

    def summary(self) -> PlanSummary:
        """What a dry run prints."""
        stored = {info.name: info.stored for info in self.infos}
        return summarize_rows(self.output, self.checkpoint, self.rows(), stored, self.warnings)


def make_plan(
    source: str | Path, destination: Destination, recipe: Recipe, command: str, request: Request | None = None
) -> StructurePlan:
    """Check everything and lay out the output.

    Reads headers only, unless whole blocks are chosen by their weights. transformers loads the planned output, without
    data, before any byte is written.

    Raises:
        Refused: or Problems, everything that is wrong.
    """
    method = get(command, recipe.method.name)
    if not isinstance(method, StructuralMethod) or not isinstance(recipe.method, StructuralConfig):
        raise TypeError(f"{method.name} is not structural")
    request = request or Request()
    checkpoint, tied = open_input(source)
    problems = place_problems([checkpoint], destination, recipe.gates)
    raise_all(problems + _unused_sections(recipe))
    require_writable(destination.path)
    kinds, warnings = known_kinds(checkpoint)
    warnings = [*tied, *warnings]
    infos = tuple(checkpoint.layers(kinds))
    if checkpoint.manifest.widths:
        hint = "prune so that config.json can say it first, this last, or start from the checkpoint before it"
        message = "its layers have unlike widths, or fewer heads, which config.json cannot say"
        raise Refused(f"{checkpoint.path}: {message}", hint)
    by_tensor = {info.tensor: info for info in infos}
    step = lineage_step(command, recipe, checkpoint.source)

    def lay(explicit: Recipe) -> tuple[Edit, Output]:
        edit = EDITS[method.units](checkpoint, method, explicit, request)
        parameters = {name: planned(checkpoint, edit, name, by_tensor) for name in edit.changes}
        output = arrange(checkpoint, destination, parameters, step, edit.config, edit.widths)
        return edit, replace(output, files=edit.files)

    explicit: Recipe = recipe
    found: tuple[str, ...] = ()
    if isinstance(recipe.method, TargetedConfig) and recipe.method.target is not None:
        explicit, found = Sizing(recipe, lay).found()
    edit, output = lay(explicit)
    parameters = output.parameters
    raise_all(_calibration_problems(checkpoint, recipe, method, edit, request))
    require_loads(checkpoint, edit.config, {name: each.dense for name, each in parameters.items()}, edit.widths)
    require_space(output)
    plan = StructurePlan(checkpoint, recipe, method, infos, edit, output, kinds, request)
    decoded = [name for name in parameters if plan.decoded(name)]
    told = [*warnings, *found, *edit.warnings, *left_out(checkpoint), *decoding(decoded)]
    return replace(plan, warnings=tuple(told))


def _calibration_problems(
    checkpoint: Checkpoint, recipe: Recipe, method: StructuralMethod, edit: Edit, request: Request
) -> list[CompressError]:
    """Everything that would keep the method from the statistics that it reads with these parameters."""
    by_tensor: dict[str, list[LayerInfo]] = {}
    for info in checkpoint.layers(known_kinds(checkpoint)[0]):
        by_tensor.setdefault(info.tensor, []).append(info)
    read = edit.consumers
    made = list(dict.fromkeys(part.tensor for n in edit.changed for part in edit.structures[n].parts))
    graded = "gradients" in method.reads(recipe.method) and method.units != "blocks"
    infos = [info for each in (made if graded else read) for info in by_tensor.get(each, ())]
    split = factors(infos) if graded else []
    if split:
        return list(split)
    chosen = [LayerPlan(info, recipe.method) for info in infos]
    return needs.problems(checkpoint, recipe, method, chosen, request)


def _unused_sections(recipe: Recipe) -> list[CompressError]:
    """Sections that choose single layers mean nothing where layers change together."""
    given = [name for name in ("rules", "levels") if getattr(recipe, name)]
    if recipe.select != Select():
        given.append("select")
    return [
        RecipeError(f"{name}: has no meaning for {recipe.method.name}, which changes layers together", "remove it")
        for name in given
    ]
