"""Plan a layer-wise step from headers: every problem found at once, every output byte known."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.views.decoded import with_decoded
from aicompress.disk import require_writable
from aicompress.errors import CompressError, raise_all
from aicompress.layer import Kind, LayerInfo
from aicompress.methods import get
from aicompress.methods.decisions import Width, WidthSearch
from aicompress.methods.layerwise import AnyLayerMethod, LayerMethod
from aicompress.model.equivalence.scaling_groups import ScalingGroup
from aicompress.pipeline.calibration import requirements
from aicompress.pipeline.calibration.arguments import shortened
from aicompress.pipeline.calibration.gradients import OUTPUTS, diagonal_only
from aicompress.pipeline.calibration.request import Request, StepInput
from aicompress.pipeline.layerwise.allocation.levels import Sensitivities, with_levels
from aicompress.pipeline.layerwise.allocation.target import require_reach, undecided
from aicompress.pipeline.layerwise.compress import Compression
from aicompress.pipeline.layerwise.experts import Divisible, divisible
from aicompress.pipeline.layerwise.head_products import coupled
from aicompress.pipeline.layerwise.plan import UNDECIDED, UNTRIED, Plan, planned_at, planned_parameters
from aicompress.pipeline.layerwise.resolve import configured, open_widths, resolved, searches, searches_by_budget
from aicompress.pipeline.layerwise.rotation import rotated
from aicompress.pipeline.layerwise.rows.reading import whole_ones
from aicompress.pipeline.layerwise.scaling import rescalable
from aicompress.pipeline.layerwise.sharing import followers, grouped, outlined
from aicompress.pipeline.layerwise.untouched import passed_over, refused_experts, unsuited
from aicompress.pipeline.step.checks import known_kinds, left_out, place_problems, require_space
from aicompress.pipeline.step.input import Adapted, open_input
from aicompress.pipeline.step.layer_plan import LayerPlan, named
from aicompress.pipeline.step.output import Destination, Output, arrange, lineage_step
from aicompress.recipe import DEFAULT_KINDS, Recipe
from aicompress.selection import select
from aicompress.weights import Dense


@dataclass(frozen=True)
class Chosen:
    """The layers that a recipe compresses, before they are seen beside each other.

    Attributes:
        recipe: with the levels that were measured.
        infos: the layers, but for borrowers of what another one stores.
        layers: by name, each with its parameters.
        experts: which of them are compressed one by one.
        levels: what was measured to find levels.
        notes: what was settled.
    """

    recipe: Recipe
    infos: Sequence[LayerInfo]
    layers: Mapping[str, LayerPlan]
    experts: Divisible
    levels: Sensitivities
    notes: Sequence[str]


@dataclass(frozen=True)
class Settled:
    """The same layers with all that depends on their values, on each other and on the model's structure.

    Attributes:
        layers: by name, with outlines of what they become; of an open width the smallest.
        open: by name of the layers whose width is searched for, the widths, least bytes first.
        searches: what is searched for, by budget.
        scaling_groups: inputs that the method rescales.
        warnings, notes: what the user should know, and what was settled.
    """

    layers: Mapping[str, LayerPlan]
    open: Mapping[str, tuple[Width, ...]]
    searches: Mapping[str, WidthSearch]
    scaling_groups: tuple[ScalingGroup, ...]
    warnings: Sequence[str]
    notes: Sequence[str]


def make_plan(
    source: str | Path | Adapted, destination: Destination, recipe: Recipe, command: str, request: Request | None = None
) -> Plan:
    """Check everything and lay out the output; reads headers only, unless a knob depends on the weights.

    Raises:
        Refused: or Problems, everything that is wrong.
    """
    method = get(command, recipe.method.name)
    if not isinstance(method, LayerMethod):
        raise TypeError(f"{method.name} is not layer-wise")
    request = request or Request()
    checkpoint, kinds, warnings = _opened(source, recipe, method, request)
    recipe = recipe.counted(checkpoint.layers(kinds))
    checkpoint = _with_forms_that_fit(checkpoint, checkpoint.layers(kinds), recipe, method)
    infos = checkpoint.layers(kinds)
    given = StepInput(checkpoint, recipe, request)
    chosen = _chosen(given, infos, method, place_problems([checkpoint], destination, recipe.gates))
    require_writable(destination.path)
    settled = _settled(replace(given, recipe=chosen.recipe), chosen, method)
    layers = tuple(settled.layers.get(info.name, LayerPlan(info)) for info in infos)
    step = lineage_step(command, chosen.recipe, checkpoint.source, checkpoint.foreign.beside)
    output = arrange(checkpoint, destination, planned_parameters(checkpoint, layers), step)
    require_space(output)
    plan = Plan(
        checkpoint=checkpoint,
        recipe=chosen.recipe,
        method=method,
        layers=layers,
        output=output,
        kinds=kinds,
        request=request,
        open=settled.open,
        searches=settled.searches,
        scaling_groups=settled.scaling_groups,
        notes=(*chosen.notes, *settled.notes),
        measured_on=chosen.levels.record,
    )
    return _with_reachable_budgets(replace(plan, warnings=(*warnings, *_warnings(plan, chosen, settled))))


def _chosen(
    given: StepInput, infos: Sequence[LayerInfo], method: AnyLayerMethod, problems: list[CompressError]
) -> Chosen:
    """Select layers, find levels, and give each layer its parameters.

    Args:
        given, method: the input, and the recipe's method.
        infos: every layer of the input.
        problems: what is known to be wrong.

    Raises:
        Refused: or Problems, everything that is wrong.
    """
    recipe = given.recipe
    kinds, others = _kinds(recipe, infos)
    selected, unmatched = select(infos, recipe.select.include, recipe.select.exclude, kinds)
    problems = [*problems, *unmatched, *recipe.problems(infos)]
    borrowers = followers(selected)
    selected = [info for info in selected if not info.owner]
    recipe, levels = with_levels(given, method, selected, problems)
    given = replace(given, recipe=recipe)
    experts = divisible(given, method, selected)
    layers, misfits = configured(selected, recipe, method, experts)
    lacking = requirements.problems(given, method, list(layers.values()))
    raise_all([*problems, *misfits, *lacking])
    return Chosen(recipe, selected, layers, experts, levels, [*others, *levels.notes, *borrowers])


def _settled(given: StepInput, chosen: Chosen, method: AnyLayerMethod) -> Settled:
    """Find layers that go together, resolve what depends on weights, and outline what layers become.

    Raises:
        Refused: or Problems: none can be compressed, or files of statistics lack one.
    """
    checkpoint, seed, layers = given.checkpoint, given.recipe.seed, dict(chosen.layers)
    scaling_groups, unscaled = rescalable(given, method, list(layers.values()))
    layers, uncoupled = coupled(given, method, layers)
    layers, alone = grouped(checkpoint, layers, method, seed)
    if method.leaves:
        raise_all(requirements.in_files(method, list(layers.values()), given.request))
    whole = whole_ones(Compression(method, checkpoint, seed), layers.values())
    layers, alike = resolved(checkpoint, layers, method, seed)
    wanted = searches(method, layers)
    widths = {name: open_widths(method, layers[name]) for name in wanted}
    layers = {name: planned_at(method, layer, widths.get(name, (None,))[0]) for name, layer in layers.items()}
    layers = outlined(method, layers)
    budgets = searches_by_budget(wanted, layers)
    return Settled(layers, widths, budgets, scaling_groups, unscaled, [*alone, *uncoupled, *whole, *alike])


def _warnings(plan: Plan, chosen: Chosen, settled: Settled) -> list[str]:
    """What the user should know of a plan, beside what opening the input has told."""
    checkpoint, method, output, layers = plan.checkpoint, plan.method, plan.output, settled.layers
    outputs = [x.info for x in plan.layers if x.config and OUTPUTS in requirements.wanted(method, x.config)]
    return [
        *_undecided(method, layers),
        *diagonal_only(outputs),
        *shortened(checkpoint, plan.recipe),
        *left_out(checkpoint, output.destination),
        *settled.warnings,
        *output.warnings,
        *_absent(plan.recipe, [layer.info for layer in plan.layers], checkpoint),
        *_no_smaller(checkpoint, output, layers),
        *_larger(output, layers, settled.open),
        *passed_over(checkpoint, [layer.info for layer in plan.layers]),
        *unsuited(checkpoint, method, chosen.infos),
        *refused_experts(checkpoint, method, chosen.infos, list(layers), chosen.experts.why),
    ]


def _opened(
    source: str | Path | Adapted, recipe: Recipe, method: AnyLayerMethod, request: Request
) -> tuple[Checkpoint, Mapping[str, Kind | None] | None, list[str]]:
    """The input as the method reads it, the kinds of its parameters, and warnings."""
    checkpoint, tied = open_input(source)
    if method.rewrites:  # what is rewritten has to be plain
        checkpoint = with_decoded(checkpoint, checkpoint.foreign.kept)
    checkpoint, untied = rotated(StepInput(checkpoint, recipe, request), method)
    kinds, warnings = known_kinds(checkpoint)
    return checkpoint, kinds, [*tied, *untied, *warnings]


def _undecided(method: AnyLayerMethod, layers: Mapping[str, LayerPlan]) -> list[str]:
    """A warning where the running model, or a survey, decides what layers become."""
    if any(method.tries(layer.config) for layer in layers.values()):
        return [UNTRIED]
    return [UNDECIDED] if any(method.surveyed(layer.config) for layer in layers.values()) else []


def _with_reachable_budgets(plan: Plan) -> Plan:
    """The plan, with what its searches leave undecided.

    Raises:
        RecipeError: a budget is out of reach.
    """
    for budget in plan.searches:
        with named(budget):
            require_reach(plan.sharing(budget))
    return replace(plan, undecided=undecided(plan)) if plan.searches else plan


def _kinds(recipe: Recipe, infos: Sequence[LayerInfo]) -> tuple[tuple[Kind, ...], list[str]]:
    """The kinds of layers that a recipe acts on, and a note where these are not the usual ones.

    Experts in one tensor are linear layers, one below the other. A recipe that names no kinds takes what there is where
    a checkpoint has none of the usual ones, such as a table of static embeddings.
    """
    named = recipe.select.kinds
    kinds: tuple[Kind, ...] = (*named, "experts") if "linear" in named else tuple(named)
    there = sorted({info.kind for info in infos})
    if "kinds" in recipe.select.model_fields_set or not there or any(kind in kinds for kind in there):
        return kinds, []
    return tuple(there), [f"select.kinds: [{', '.join(there)}], as the checkpoint has no other layers"]


def _absent(recipe: Recipe, infos: Sequence[LayerInfo], checkpoint: Checkpoint) -> list[str]:
    """Warnings that name selected kinds of which the model has no layer, but for those that are selected anyway."""
    wanted = [kind for kind in recipe.select.kinds if kind not in DEFAULT_KINDS]
    absent = [kind for kind in wanted if not any(info.kind == kind for info in infos)]
    tied = bool((checkpoint.config or {}).get("tie_word_embeddings", True))
    if "head" in absent and tied and any(info.kind == "embedding" for info in infos):
        absent.remove("head")
        if "embedding" not in wanted:
            told = "select.kinds: the model has no head of its own, which is the embedding's matrix: add embedding"
            return [told, *(f"select.kinds: the model has no {kind}" for kind in absent)]
    return [f"select.kinds: the model has no {kind}" for kind in absent]


def _no_smaller(checkpoint: Checkpoint, output: Output, layers: Mapping[str, LayerPlan]) -> list[str]:
    """A warning that says why an output takes as many bytes as its input, where the method knows."""
    before = sum(ref.spec.nbytes for ref in checkpoint.tensors.values())
    reasons = {layer.config.no_smaller for layer in layers.values() if layer.config is not None} - {""}
    return sorted(reasons) if output.weight_bytes >= before else []


def _larger(output: Output, layers: Mapping[str, LayerPlan], opened: Collection[str]) -> list[str]:
    """A warning that names layers which take more bytes than they had, such as codes of more bits than before.

    Of layers that share, one stores for the others: together they are smaller.
    """
    sizes = {
        name: (layer.info.nbytes, output.nbytes(layer.info.tensor, layer.info.part))
        for name, layer in layers.items()
        if name not in opened and layer.config is not None and not layer.config.no_smaller and layer.group is None
    }
    grown = {name: (before, after) for name, (before, after) in sizes.items() if after > before}
    if not grown:
        return []
    before, after = (sum(pair[side] for pair in grown.values()) for side in (0, 1))
    many = f"{len(grown)} of {len(layers)} layers take more bytes than before, {next(iter(grown))} for one"
    return [f"{many}: {before:,} become {after:,}, {after / before:.2f}×"]


def _with_forms_that_fit(
    checkpoint: Checkpoint, infos: Sequence[LayerInfo], recipe: Recipe, method: AnyLayerMethod
) -> Checkpoint:
    """The view in which another tool's weights are decoded where the method takes them decoded, and not as they are."""
    kept = [info for info in infos if checkpoint.foreign.is_kept(info.tensor)]
    kinds, _ = _kinds(recipe, infos)
    chosen, _ = select(kept, recipe.select.include, recipe.select.exclude, kinds)
    unfit = []
    for info in chosen:
        config, _ = recipe.config_for(info)
        plain = replace(info, stored=Dense.form, outline=None)
        if config is not None and method.check(info, config) and not method.check(plain, config):
            unfit.append(info.tensor)
    return with_decoded(checkpoint, unfit)
