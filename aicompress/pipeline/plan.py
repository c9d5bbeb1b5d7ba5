"""Plan a layer-wise step from the headers: every problem found at once, every output byte known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.place import require_writable
from aicompress.checkpoint.rewritten import RewrittenCheckpoint
from aicompress.errors import CompressError, RecipeError, raise_all
from aicompress.layer import Kind, LayerInfo
from aicompress.methods import get
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.method import MethodConfig
from aicompress.methods.quantize.widths import Width, WidthConfig, open_bits, open_widths, with_width
from aicompress.methods.zeros import outline_of
from aicompress.model.places import Place
from aicompress.pipeline.calibration import request as needs
from aicompress.pipeline.calibration.request import Request
from aicompress.pipeline.calibration.rescaling import rescalable
from aicompress.pipeline.output import Destination, Output, Planned, arrange, lineage_step
from aicompress.pipeline.preflight import confined, known_kinds, left_out, place_problems, require_space, stored_outline
from aicompress.pipeline.preview import summarize
from aicompress.pipeline.rotation import rotated
from aicompress.pipeline.settling import search_of, settled
from aicompress.pipeline.tied import open_input
from aicompress.recipe import Recipe
from aicompress.report.plan import PlanRow, PlanSummary
from aicompress.selection import select
from aicompress.weights import Dense, Weight, outline_nbytes

UNDECIDED = "calibration decides how much stays of each layer: the plan shows the average"


@dataclass(frozen=True)
class LayerPlan:
    """What will happen to one layer.

    Attributes:
        info: the layer.
        config: the method's parameters for it; None leaves it alone.
        rule: where the parameters come from.
        outline: the stored weight without data; None leaves it alone.
    """

    info: LayerInfo
    config: MethodConfig | None = None
    rule: str = "-"
    outline: Weight | None = None


@dataclass(frozen=True)
class Plan:
    """A step that can be run, or printed.

    Attributes:
        checkpoint: the input.
        recipe: what to do.
        method: how.
        layers: every layer of the input, selected or not.
        output: every file and byte of the output.
        kinds: what the model definition says of the parameters.
        request: how it gets statistics of inputs, where the method reads them.
        places: inputs that the method rescales before it compresses the layers that read them.
        warnings: what the user should know.
        open: widths to choose among, least bytes first, of layers whose bits are to be searched; `layers` and `output`
            have the first.
        search: what the recipe says of that search; None where nothing is open.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    method: LayerMethod
    layers: tuple[LayerPlan, ...]
    output: Output
    kinds: Mapping[str, Kind | None] | None
    request: Request = field(default_factory=Request)
    warnings: tuple[str, ...] = field(default=())
    open: Mapping[str, tuple[Width, ...]] = field(default_factory=dict)
    search: WidthConfig | None = None
    places: tuple[Place, ...] = ()

    @cached_property
    def by_tensor(self) -> dict[str, list[LayerPlan]]:
        """Plans by parameter: one, or two for the parts of a low-rank layer."""
        found: dict[str, list[LayerPlan]] = {}
        for layer in self.layers:
            found.setdefault(layer.info.tensor, []).append(layer)
        return found

    @cached_property
    def needs(self) -> frozenset[str]:
        """Statistics that the selected layers' configs read."""
        return frozenset[str]().union(*(self.method.reads(x.config) for x in self.layers if x.config is not None))

    @cached_property
    def surveys(self) -> frozenset[str]:
        """Statistics that are read before any layer is compressed."""
        return frozenset[str]().union(*(self.method.surveys(x.config) for x in self.layers if x.config is not None))

    def with_configs(self, configs: Mapping[str, MethodConfig]) -> Plan:
        """The plan with other parameters for some layers, by name, laid out anew."""
        layers = [replace(layer, config=configs.get(layer.info.name, layer.config)) for layer in self.layers]
        return self._relaid(tuple(_with_width(self.method, layer, None) for layer in layers))

    def rewritable(self) -> Plan:
        """The plan over a view of its input that the run may rewrite, where the method rescales it."""
        return replace(self, checkpoint=RewrittenCheckpoint.over(self.checkpoint)) if self.places else self

    def summary(self) -> PlanSummary:
        """What a dry run prints."""
        changed = [layer for layer in self.layers if layer.config is not None and layer.outline is not None]
        rows = [_row(self.method, layer) for layer in changed]
        found = summarize(self.output, self.checkpoint, rows, len(self.layers) - len(rows), self.warnings)
        if self.search is None:
            return found
        from aicompress.pipeline.bits.target import undecided

        return undecided(self, found)

    def with_widths(self, widths: Mapping[str, Width]) -> Plan:
        """The plan with these widths for some layers, laid out anew."""
        return self._relaid(tuple(_with_width(self.method, x, widths.get(x.info.name)) for x in self.layers))

    def _relaid(self, layers: tuple[LayerPlan, ...]) -> Plan:
        step = self.output.manifest.lineage[-1]
        output = arrange(self.checkpoint, self.output.destination, _parameters(self.checkpoint, layers), step)
        return replace(self, layers=layers, output=output)

    def at_width(self, tensor: str, width: Width) -> list[LayerPlan]:
        """The layers of a parameter, the open ones with a width."""
        return [
            _with_width(self.method, layer, width if layer.info.name in self.open else None)
            for layer in self.by_tensor[tensor]
        ]

    def stored(self, tensor: str, width: Width) -> Weight | None:
        """Outline of a parameter at a width; None for a plain tensor."""
        return _combined(self.checkpoint, tensor, self.at_width(tensor, width))


def _row(method: LayerMethod, layer: LayerPlan) -> PlanRow:
    assert layer.outline is not None
    detail = {k: v for k, v in method.describe(layer.config, layer.outline).items() if k != "note"}
    info, size = layer.info, outline_nbytes(layer.outline)
    return PlanRow(info.name, info.kind, layer.rule, info.stored, layer.outline.form, detail, info.nbytes, size)


def make_plan(
    source: str | Path, destination: Destination, recipe: Recipe, command: str, request: Request | None = None
) -> Plan:
    """Check everything and lay out the output; reads headers only, unless a knob depends on the weights.

    Raises:
        Refused: or Problems, everything that is wrong.
    """
    method = get(command, recipe.method.name)
    if not isinstance(method, LayerMethod):
        raise TypeError(f"{method.name} is not layer-wise")
    request = request or Request()
    checkpoint, tied = open_input(source)
    checkpoint, turned = rotated(checkpoint, recipe, method, request.allow_code)
    kinds, warnings = known_kinds(checkpoint)
    warnings = [*tied, *turned, *warnings]
    infos = checkpoint.layers(kinds)
    problems = place_problems([checkpoint], destination, recipe.gates)
    chosen, found = select(infos, recipe.select.include, recipe.select.exclude, recipe.select.kinds)
    problems += found + recipe.problems(infos)
    layers, found = _configure(chosen, recipe, method)
    raise_all(problems + found + needs.problems(checkpoint, recipe, method, list(layers.values()), request))
    places, unscaled = rescalable(checkpoint, recipe, method, list(layers.values()), request.allow_code)
    require_writable(destination.path)
    layers = settled(checkpoint, layers, method, recipe.seed)
    searched = {name: layer.config for name, layer in layers.items() if open_bits(layer.config) == "auto"}
    opened = {name: _widths(method, layers[name]) for name in searched}
    layers = {name: _with_width(method, layer, opened.get(name, (None,))[0]) for name, layer in layers.items()}
    plans = tuple(layers.get(info.name, LayerPlan(info)) for info in infos)
    parameters = _parameters(checkpoint, plans)
    output = arrange(checkpoint, destination, parameters, lineage_step(command, recipe, checkpoint.source))
    require_space(output)
    if any(method.surveys(layer.config) for layer in layers.values()):
        warnings.append(UNDECIDED)
    warnings += [*left_out(checkpoint), *unscaled, *confined(output)]
    plan = Plan(
        checkpoint, recipe, method, plans, output, kinds, request, tuple(warnings), opened, search_of(searched), places
    )
    if plan.search is not None:
        from aicompress.pipeline.bits.target import require_reach

        require_reach(plan)
    return plan


def _widths(method: LayerMethod, layer: LayerPlan) -> tuple[Width, ...]:
    """What a search chooses among for a layer, least bytes first."""
    sizes = {
        w: outline_nbytes(_outline(method, replace(layer, config=with_width(layer.config, w))))
        for w in open_widths(layer.config, layer.info.shape[1])
    }
    return tuple(sorted(sizes, key=lambda width: (sizes[width], width.bits)))


def _with_width(method: LayerMethod, layer: LayerPlan, width: Width | None) -> LayerPlan:
    """A layer's plan with its outline, and with another width where one is given."""
    if layer.config is None:
        return layer
    layer = layer if width is None else replace(layer, config=with_width(layer.config, width))
    return replace(layer, outline=_outline(method, layer))


def _configure(
    chosen: list[LayerInfo], recipe: Recipe, method: LayerMethod
) -> tuple[dict[str, LayerPlan], list[CompressError]]:
    """Each layer's parameters, and every layer for which they are impossible."""
    layers: dict[str, LayerPlan] = {}
    problems: list[CompressError] = []
    for info in chosen:
        config, rule = recipe.config_for(info)
        if config is None:
            continue
        layers[info.name] = LayerPlan(info, config, rule)
        problem = method.check(info, config)
        if problem is not None:
            problems.append(RecipeError(*problem))
    return layers, problems


def _outline(method: LayerMethod, layer: LayerPlan) -> Weight:
    outline = method.outline(layer.info, layer.config)
    return outline_of(layer.info, outline) if method.command == "quantize" else outline


def _parameters(checkpoint: Checkpoint, plans: tuple[LayerPlan, ...]) -> dict[str, Planned]:
    """Every parameter of the output in the input's order."""
    by_tensor: dict[str, list[LayerPlan]] = {}
    for layer in plans:
        by_tensor.setdefault(layer.info.tensor, []).append(layer)
    found: dict[str, Planned] = {}
    for name, spec in checkpoint.parameters().items():
        layers = by_tensor.get(name, [])
        found[name] = Planned(spec, _combined(checkpoint, name, layers), layers[0].info if layers else None)
        if name in checkpoint.manifest.entries and not layers:
            raise CompressError(f"{name} is compressed but is not seen as a layer", "report this checkpoint")
    return found


def _combined(checkpoint: Checkpoint, name: str, layers: list[LayerPlan]) -> Weight | None:
    """Outline of a parameter: new, old where nothing selects it, or a mix for a low-rank layer's parts."""
    if all(layer.outline is None for layer in layers):
        return stored_outline(checkpoint, name)
    if not layers[0].info.part:
        outline = layers[0].outline
        return None if isinstance(outline, Dense) else outline
    old = stored_outline(checkpoint, name)
    assert old is not None  # a part is of a compressed parameter
    return old.with_parts({layer.info.part: layer.outline for layer in layers if layer.outline is not None})
