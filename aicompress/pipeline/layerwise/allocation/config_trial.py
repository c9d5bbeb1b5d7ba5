"""Trying explicit parameters of all layers on the running model before any of them is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from aicompress.errors import RecipeError
from aicompress.layer import Layer
from aicompress.methods.method import MethodConfig
from aicompress.model.sensitivity.output_divergence import OutputSensitivity
from aicompress.pipeline.calibration.data import calibration_inputs, record_of_data
from aicompress.pipeline.calibration.request import module_of
from aicompress.pipeline.layerwise.allocation.probe import measured_part, probe_of
from aicompress.pipeline.layerwise.allocation.width_trial import dense
from aicompress.pipeline.layerwise.plan import Plan
from aicompress.pipeline.step.layer_plan import LayerPlan
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.workers import Processes
from aicompress.weights import Weight


@dataclass
class ConfigTrial:
    """A running model, and layers that are compressed as a survey asks.

    Attributes:
        plan: of the step; its layers that are not tried have explicit parameters.
        layers: those that are tried.
        read: reads a layer with the statistics that its method reads.
        probe: the running model.
        record: of the calibration data that it runs on.
        progress: told of every trial.
        losses: measured ones, by the parameters that were tried.
    """

    plan: Plan
    layers: Sequence[LayerPlan]
    read: Callable[[LayerPlan], Layer]
    probe: OutputSensitivity
    record: Mapping[str, Any]
    progress: Progress
    losses: dict[tuple[MethodConfig, ...], float] = field(default_factory=dict)
    _held: dict[str, tuple[MethodConfig, Tensor]] = field(default_factory=dict)

    def divergence(self, configs: Sequence[MethodConfig]) -> float:
        """KL of the outputs to the original's in nats, with explicit parameters for every layer that is tried."""
        key = tuple(configs)
        if key not in self.losses:
            self.progress("trials", len(self.losses), len(self.losses) + 1)
            chosen = dict(zip((layer.info.name for layer in self.layers), configs, strict=True))
            changes = {}
            for layer in self.plan.layers:
                config = chosen.get(layer.info.name, layer.config)
                if config is not None and self.probe.holds(layer.info.tensor):
                    changes[layer.info.tensor] = self._compressed(layer, config)
            self.losses[key] = self.probe.loss(changes)
        return self.losses[key]

    def note(self, plan: Plan) -> str:
        """What was measured of the parameters that a plan has now, for the report."""
        configs = {layer.info.name: layer.config for layer in plan.layers}
        key = tuple(config for layer in self.layers if (config := configs[layer.info.name]) is not None)
        told = f"{self.losses[key]:.4g} nats" if key in self.losses else "nothing, as no layer becomes smaller"
        return (
            f"max_kl: the outputs lose {told} on the calibration data that was tried, after {len(self.losses)} trials"
        )

    def _compressed(self, layer: LayerPlan, config: MethodConfig) -> Tensor:
        """A parameter as the model runs it; the one that was tried last is kept."""
        held = self._held.get(layer.info.name)
        if held is None or held[0] != config:
            for member, weight in self._weights(layer, config):
                self._held[member.info.name] = config, dense(self.plan, member.info.tensor, weight)
        return self._held[layer.info.name][1]

    def _weights(self, layer: LayerPlan, config: MethodConfig) -> list[tuple[LayerPlan, Weight]]:
        """A layer with its weight, and those that it shares a part with."""
        method = self.plan.method
        if layer.group is None or method.shares is None:
            read = self.read(layer)
            return [(layer, method.stored(read, method.apply(read, config)))]
        members = [self.plan.by_tensor[name][0] for name in layer.group.members]
        weights = method.shares.compress([self.read(member) for member in members], config)
        return list(zip(members, weights, strict=True))


@contextmanager
def tried(
    plan: Plan, layers: Sequence[LayerPlan], read: Callable[[LayerPlan], Layer], progress: Progress
) -> Iterator[ConfigTrial | None]:
    """A trial of layers whose parameters the running model decides; None where it decides of none.

    Raises:
        RecipeError: the model gives no logits, or the calibration data does not fit it.
    """
    if not any(plan.method.tries(layer.config) for layer in layers):
        yield None
        return
    assert plan.recipe.calibration is not None
    data = measured_part(plan.recipe.calibration)
    model = module_of(plan)
    inputs = calibration_inputs(plan.checkpoint, model, data, plan.recipe.seed, Processes())
    with probe_of(plan.checkpoint, model, inputs) as probe:
        if not probe.divergence:
            raise RecipeError("max_kl needs a model that gives logits, and this one gives states", "give target_bytes")
        yield ConfigTrial(plan, layers, read, probe, record_of_data(inputs.sources, 1), progress)
