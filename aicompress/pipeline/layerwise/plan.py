"""The plan of a layer-wise step: parameters and outline of every layer, and the output that is laid out from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.views.rewritten import RewrittenCheckpoint
from aicompress.data import digest
from aicompress.layer import Kind
from aicompress.methods.decisions import Width, WidthSearch
from aicompress.methods.layerwise import AnyLayerMethod
from aicompress.methods.method import OF_GRADIENTS, MethodConfig
from aicompress.model.equivalence.scaling_groups import ScalingGroup
from aicompress.pipeline.calibration.request import Step
from aicompress.pipeline.layerwise.experts import outline
from aicompress.pipeline.layerwise.report_rows import open_row, plan_row
from aicompress.pipeline.layerwise.sharing import following, outlined, with_groups
from aicompress.pipeline.layerwise.untouched import untouched
from aicompress.pipeline.step.digests import fingerprint
from aicompress.pipeline.step.dry_run import summarize
from aicompress.pipeline.step.layer_plan import LayerPlan
from aicompress.pipeline.step.output import Output, Planned, arrange
from aicompress.report.plan import PlanSummary, Undecided
from aicompress.weights import Dense, Weight

UNDECIDED = "calibration decides how much stays of each layer: the plan shows the average"
UNTRIED = "the running model decides how much stays of each layer: the plan shows the most"


@dataclass(frozen=True)
class Plan(Step):
    """A step that can be run, or printed.

    Attributes:
        checkpoint: the input.
        recipe: what to do.
        method: how.
        layers: every layer of the input, selected or not.
        output: every file and byte of the output.
        kinds: what the model definition says of the parameters.
        request: how it gets statistics of inputs, where the method reads them.
        scaling_groups: inputs that the method rescales before it compresses the layers that read them.
        warnings: what the user should know.
        open: widths to choose among, least bytes first, of layers whose width is to be searched; `layers` and `output`
            have the first.
        searches: the target of that search by budget: of the levels that have one, then of the recipe; empty where
            nothing is open.
        undecided: what is printed of it before it is made.
        notes: what the plan has settled.
        measured_on: record of the calibration data that levels were found with; empty without.
    """

    layers: tuple[LayerPlan, ...]
    method: AnyLayerMethod
    output: Output
    kinds: Mapping[str, Kind | None] | None
    warnings: tuple[str, ...] = field(default=())
    open: Mapping[str, tuple[Width, ...]] = field(default_factory=dict)
    searches: Mapping[str, WidthSearch] = field(default_factory=dict)
    undecided: Undecided | None = None
    scaling_groups: tuple[ScalingGroup, ...] = ()
    notes: tuple[str, ...] = ()
    measured_on: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def by_tensor(self) -> dict[str, list[LayerPlan]]:
        """Plans by parameter: one, or two for the parts of a low-rank layer."""
        by_tensor: dict[str, list[LayerPlan]] = {}
        for layer in self.layers:
            by_tensor.setdefault(layer.info.tensor, []).append(layer)
        return by_tensor

    @property
    def selected(self) -> list[str]:
        """Parameters that the method acts on."""
        return list(dict.fromkeys(layer.info.tensor for layer in self.layers if layer.config is not None))

    @cached_property
    def needs(self) -> frozenset[str]:
        """Statistics that the selected layers' configs read."""
        return frozenset[str]().union(*(self.method.reads(x.config) for x in self.layers if x.config is not None))

    @property
    def reads_gradients(self) -> bool:
        """Whether statistics of gradients are among its needs."""
        return bool(self.needs & OF_GRADIENTS)

    @property
    def input_statistics(self) -> frozenset[str]:
        """Those of its needs that a forward pass collects from the inputs of layers."""
        return self.needs - OF_GRADIENTS

    @property
    def compares_inputs(self) -> bool:
        """Whether a layer's inputs in the original model are compared with those in the compressed one."""
        return any(self.method.compares(layer.config) for layer in self.layers if layer.config is not None)

    @cached_property
    def surveys(self) -> frozenset[str]:
        """Statistics that are read before any layer is compressed."""
        return frozenset[str]().union(*(self.method.surveyed(x.config) for x in self.layers if x.config is not None))

    @property
    def budget(self) -> str:
        """The one budget that all open layers share."""
        (budget,) = self.searches
        return budget

    @property
    def search(self) -> WidthSearch:
        """The search of that budget."""
        return self.searches[self.budget]

    def sharing(self, budget: str) -> Plan:
        """The plan in which those layers alone are open that share a budget."""
        names = {layer.info.name for layer in self.layers if layer.budget == budget}
        opened = {name: widths for name, widths in self.open.items() if name in names}
        return replace(self, open=opened, searches={budget: self.searches[budget]})

    def with_configs(self, configs: Mapping[str, MethodConfig]) -> Plan:
        """The plan with other parameters for some layers, by name, laid out anew."""
        layers = [replace(layer, config=configs.get(layer.info.name, layer.config)) for layer in self.layers]
        planned = {layer.info.name: planned_at(self.method, layer, None) for layer in layers}
        return self._relaid(tuple(outlined(self.method, planned).values()))

    def rewritable(self) -> Plan:
        """The plan over a view of its input that the run may rewrite, where the method rescales it."""
        return replace(self, checkpoint=RewrittenCheckpoint.over(self.checkpoint)) if self.scaling_groups else self

    def summary(self) -> PlanSummary:
        """What a dry run prints."""
        changed = [layer for layer in self.layers if layer.config is not None and layer.outline is not None]
        sizes = [self.output.nbytes(layer.info.tensor, layer.info.part) for layer in changed]
        rows = [plan_row(self.method, layer, size) for layer, size in zip(changed, sizes, strict=True)]
        summary = summarize(self.output, self.checkpoint, rows, len(self.layers) - len(rows), self.warnings)
        left = untouched(self.checkpoint, self.layers)
        notes = (*summary.notes, *self.notes)
        summary = replace(summary, survey=tuple(self.request.survey.measured), untouched=left, notes=notes)
        if any(not isinstance(layer.outline, Dense) for layer in changed):  # else zeros are stored as they were
            most = summary.at_most or UNTRIED in self.warnings
            summary = replace(summary, at_most=most, is_average=UNDECIDED in self.warnings)
        if self.undecided is None:
            return summary
        shown = (open_row(row, self.open[row.name]) if row.name in self.open else row for row in summary.rows)
        return replace(summary, rows=tuple(shown), undecided=self.undecided)

    def with_widths(self, widths: Mapping[str, Width]) -> Plan:
        """The plan with these widths for some layers, laid out anew."""
        return self._relaid(tuple(planned_at(self.method, x, widths.get(x.info.name)) for x in self.layers))

    def _relaid(self, layers: tuple[LayerPlan, ...]) -> Plan:
        step = self.output.manifest.lineage[-1]
        output = arrange(self.checkpoint, self.output.destination, planned_parameters(self.checkpoint, layers), step)
        warnings = (*(line for line in self.warnings if line not in self.output.warnings), *output.warnings)
        return replace(self, layers=layers, output=output, warnings=warnings)

    def at_width(self, tensor: str, width: Width) -> list[LayerPlan]:
        """The layers of a parameter, the open ones with a width."""
        return [
            planned_at(self.method, layer, width if layer.info.name in self.open else None)
            for layer in self.by_tensor[tensor]
        ]

    def stored(self, tensor: str, width: Width) -> Weight | None:
        """Outline of a parameter at a width; None for a plain tensor."""
        return _combined(self.checkpoint, tensor, self.at_width(tensor, width))


def planned_at(method: AnyLayerMethod, layer: LayerPlan, width: Width | None) -> LayerPlan:
    """A layer's plan with its outline, and with another width where one is given."""
    if layer.config is None:
        return layer
    if width is not None and method.widths is not None:
        layer = replace(layer, config=method.widths.at(layer.config, width))
    if layer.product is not None and method.couples is not None:
        return replace(layer, outline=method.couples.outline(layer.product, layer.info, layer.config))
    return replace(layer, outline=outline(method, layer.info, layer.config))


def planned_parameters(checkpoint: Checkpoint, plans: tuple[LayerPlan, ...]) -> dict[str, Planned]:
    """Every parameter of the output in the input's order."""
    by_tensor: dict[str, list[LayerPlan]] = {}
    for layer in plans:
        by_tensor.setdefault(layer.info.tensor, []).append(layer)
    planned: dict[str, Planned] = {}
    for name, spec in checkpoint.parameters().items():
        layers = by_tensor.get(name, [])
        planned[name] = Planned(spec, _combined(checkpoint, name, layers), layers[0].info if layers else None)
    return with_groups(following(checkpoint, planned), plans)


def _combined(checkpoint: Checkpoint, name: str, layers: list[LayerPlan]) -> Weight | None:
    """Outline of a parameter: new, old where nothing selects it, or a mix for the parts of a stored weight."""
    if all(layer.outline is None for layer in layers):
        return checkpoint.outline(name)
    if not layers[0].info.part:
        outline = layers[0].outline
        return None if isinstance(outline, Dense) else outline
    old = checkpoint.outline(name)
    assert old is not None  # a part is of a compressed parameter
    return old.with_parts({layer.info.part: layer.outline for layer in layers if layer.outline is not None})


def fingerprint_of(plan: Plan) -> str:
    """Digest of everything that decides the output's bytes, calibration data included."""
    files = [[str(path.absolute()), path.stat().st_mtime_ns, path.stat().st_size] for path in plan.request.stats]
    calibration = plan.recipe.calibration
    reads = bool(plan.searches) or (bool(plan.needs) and not files)
    data = digest(calibration) if reads and calibration is not None else None
    return fingerprint([plan.checkpoint], plan.output, plan.method.name, plan.recipe.sha256(), files, data)
