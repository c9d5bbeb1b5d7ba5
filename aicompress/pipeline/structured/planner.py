"""Plan a structural step from headers: every problem found at once, every output byte known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from aicompress.checkpoint import Checkpoint
from aicompress.discovery import members
from aicompress.disk import require_writable
from aicompress.errors import CompressError, RecipeError, Refused, raise_all
from aicompress.methods import get
from aicompress.methods.prune.units.size_targets import TargetedConfig
from aicompress.methods.structural import AnyPruner, StructuralMethod, Unit
from aicompress.pipeline.calibration import requirements
from aicompress.pipeline.calibration.arguments import shortened
from aicompress.pipeline.calibration.request import Request, Step
from aicompress.pipeline.step.checks import (
    NOT_OF_A_STEP,
    NOT_OF_CUTTING_TOKENS,
    decoding,
    left_out,
    require_loads,
    require_space,
)
from aicompress.pipeline.step.input import Adapted
from aicompress.pipeline.step.layer_plan import LayerPlan
from aicompress.pipeline.step.opening import OpenedInput, opened_input
from aicompress.pipeline.step.output import Destination, Output, lineage_step
from aicompress.pipeline.structured.allocation import Allocator
from aicompress.pipeline.structured.choice import UnitChoice
from aicompress.pipeline.structured.edit import Edit
from aicompress.pipeline.structured.plan import StructurePlan, laid_out
from aicompress.pipeline.structured.reading import factor_problems, layers_of
from aicompress.pipeline.structured.reference_cut import require_reference
from aicompress.pipeline.structured.size_targets import Laid, SizeSearch, largest_size
from aicompress.pipeline.structured.unit import AnyUnit
from aicompress.recipe import Recipe, Select
from aicompress.report.gates import TOKENS, require_figures
from aicompress.weights import TensorSpec

COARSE = 0.05  # difference of a share that is told


def make_plan(
    source: str | Path | Adapted, destination: Destination, recipe: Recipe, command: str, request: Request | None = None
) -> StructurePlan:
    """Check everything and lay out the output.

    Reads headers; what names and shapes depend on beside them is left to the survey, or read from the weights.
    transformers loads the planned output, without data, before any byte is written.

    Raises:
        Refused: or Problems, everything that is wrong.
    """
    method = get(command, recipe.method.name)
    if not isinstance(method, StructuralMethod):
        raise TypeError(f"{method.name} is not structural")
    request = request or Request()
    absent = NOT_OF_CUTTING_TOKENS if method.counts_tokens else NOT_OF_A_STEP
    opened = _without_scales_of_heads(opened_input(source, destination, recipe.gates, absent))
    checkpoint = opened.checkpoint
    raise_all([*opened.problems, *_unused_sections(recipe)])
    require_writable(destination.path)
    _require_uniform(checkpoint)
    step = lineage_step(command, recipe, checkpoint.source, checkpoint.foreign.beside)

    def lay_out(explicit: AnyPruner) -> Laid:
        edit = _choice(opened, recipe, explicit, request).edit()
        return edit, laid_out(checkpoint, edit, opened.infos, destination, step)

    pruner: AnyPruner = method.with_config(recipe.method)
    told: tuple[str, ...] = ()
    if isinstance(pruner.config, TargetedConfig) and pruner.config.target is not None:
        search = SizeSearch(pruner, lay_out)
        size = largest_size(search, request.survey, checkpoint, recipe)
        pruner, told = search.sized(size), (search.described(size),)
    choice = _choice(opened, recipe, pruner, request)
    choice.require()
    edit = choice.edit()
    require_figures(recipe.gates, TOKENS, edit.figures)
    output = laid_out(checkpoint, edit, opened.infos, destination, step)
    raise_all(_calibration_problems(choice, edit))
    require_loads(checkpoint, edit.config, _known(choice, edit, output), edit.widths)
    untried = require_reference(choice.unit, pruner.unit, choice.layout.architecture, edit, pruner.config.stack)
    require_space(output)
    plan = StructurePlan(checkpoint, recipe, output, opened.kinds, opened.infos, (), choice, edit)
    decoded = [name for name in output.parameters if plan.decoded(name)]
    warnings = [*opened.warnings, *edit.warnings, *left_out(checkpoint, destination), *decoding(decoded)]
    warnings += [*([] if pruner.method.counts_tokens else shortened(checkpoint, recipe)), *output.warnings]
    if untried:
        warnings.append(f"the cut was not tried on a small model of the architecture: {untried}")
    return replace(plan, warnings=tuple(warnings), notes=(*told, *_coarser(choice)))


def _coarser(choice: UnitChoice[Any, Any]) -> list[str]:
    """A note where whole units come no nearer to the share that was asked for, such as 0.1 of two groups of heads."""
    keep, sparsity = (getattr(choice.pruner.config, name, None) for name in ("keep", "sparsity"))
    asked = 1 - sparsity if isinstance(sparsity, float) else keep
    have, stay = sum(structure.size for structure in choice.structures), sum(choice.sizes)
    if not isinstance(asked, float) or stay == have or abs(stay / have - asked) <= COARSE:
        return []  # that all of them stay is told already
    return [f"{stay / have:.0%} of the {choice.pruner.unit.plural} stay, where {asked:.0%} was asked for"]


def _without_scales_of_heads(opened: OpenedInput) -> OpenedInput:
    """The input without scales of the key-value cache that count heads, of which some may go."""
    checkpoint = opened.checkpoint
    foreign = checkpoint.foreign
    counting = [name for name in foreign.cache_scales if math.prod(checkpoint.tensors[name].spec.shape) > 1]
    if not counting:
        return opened
    foreign = replace(
        foreign,
        refs={**foreign.refs, **{name: checkpoint.tensors[name] for name in counting}},
        riders=(*foreign.riders, *counting),
        cache_scales=tuple(name for name in foreign.cache_scales if name not in counting),
    )
    told = f"scales of the key-value cache for each head are left out, since heads may go: {len(counting)}"
    view = replace(checkpoint, tensors=foreign.shown(checkpoint.tensors), foreign=foreign)
    return replace(opened, checkpoint=view, warnings=(*opened.warnings, told))


def structural_units() -> Mapping[type[Unit], AnyUnit]:
    """All structural units, a file of units/ each, by the class that methods name them by."""
    return {unit.kind: unit for unit in members("aicompress.pipeline.structured.units", "UNIT").values()}


def unit_for(unit: Unit) -> AnyUnit:
    """What handles the units of a kind.

    Raises:
        TypeError: no file under units/ does.
    """
    handler = structural_units().get(type(unit))
    if handler is None:
        raise TypeError(f"no file of pipeline/structured/units handles {type(unit).__name__}")
    return handler


def _choice(opened: OpenedInput, recipe: Recipe, pruner: AnyPruner, request: Request) -> UnitChoice[Any, Any]:
    """The units of an input, and how many of each structure stay; unlike sizes are measured.

    Raises:
        Refused: there are no such units, or not as many can stay.
    """
    unit, checkpoint = unit_for(pruner.unit), opened.checkpoint
    layout = unit.find(checkpoint, pruner.unit, pruner.config.stack)
    layout, record = unit.read(layout, Step(checkpoint, recipe, request, ()))
    sizes = unit.accepted(layout, pruner.sizes(layout.structures))
    if pruner.losses is None:
        return UnitChoice(checkpoint, recipe, request, pruner, unit, layout, tuple(sizes), record)
    allocator = Allocator(checkpoint, recipe, request, pruner, pruner.losses)
    structures, chosen, record = allocator.allocate(layout.structures, sizes)
    layout = replace(layout, structures=structures)
    return UnitChoice(checkpoint, recipe, request, pruner, unit, layout, chosen, record)


def _require_uniform(checkpoint: Checkpoint) -> None:
    """config.json must describe the layers of the input.

    Raises:
        Refused: it does not.
    """
    if checkpoint.manifest.widths:
        hint = "prune so that config.json can say it first, this last, or start from the checkpoint before it"
        message = "its layers have unlike widths, or fewer heads, which config.json cannot say"
        raise Refused(f"{checkpoint.path}: {message}", hint)


def _known(choice: UnitChoice[Any, Any], edit: Edit, output: Output) -> dict[str, TensorSpec]:
    """The output's parameters, but for blocks behind the stack, which transformers does not load under any number."""
    known = choice.layout.architecture.names
    moved = {name for name, change in edit.changes.items() if name != change.source and change.source not in known}
    return {name: parameter.dense for name, parameter in output.parameters.items() if name not in moved}


def _calibration_problems(choice: UnitChoice[Any, Any], edit: Edit) -> list[CompressError]:
    """Everything that would keep the run from the statistics that it reads with these parameters."""
    pruner = choice.pruner
    reads = choice.unit.needs(pruner.reads)
    if choice.unit.scored and pruner.reads and edit.changed:
        return []  # has been checked before anything was scored
    if pruner.reads:
        choice.unit.require_statistics(choice.layout, pruner.reads)
    graded = "gradients" in reads
    changed = [part.tensor for number in edit.changed for part in edit.structures[number].parts]
    infos = layers_of(choice.checkpoint, changed if graded else edit.consumers)
    factors = factor_problems(infos) if graded else []
    if factors:
        return list(factors)
    chosen = [LayerPlan(info, pruner.config) for info in infos]
    return requirements.problems(choice, pruner.method, chosen)


def _unused_sections(recipe: Recipe) -> list[CompressError]:
    """Sections that choose single layers mean nothing where layers change together."""
    given = [name for name in ("rules", "levels") if getattr(recipe, name)]
    if recipe.select != Select():
        given.append("select")
    return [
        RecipeError(f"{name}: has no meaning for {recipe.method.name}, which changes layers together", "remove it")
        for name in given
    ]
