"""Scaling groups of a model: where its inputs can be rescaled, and the factors block by block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from aicompress.checkpoint.journal import Journal
from aicompress.checkpoint.views.rewritten import RewrittenCheckpoint
from aicompress.errors import Refused, listed
from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Candidate, ScalingFactors
from aicompress.methods.layerwise import AnyLayerMethod
from aicompress.model.equivalence.scaling_groups import ChannelAxis, ScalingGroup
from aicompress.model.equivalence.search import probe
from aicompress.pipeline.calibration.random_weights import on_noise
from aicompress.pipeline.calibration.request import StepInput
from aicompress.pipeline.layerwise.compress import Compression
from aicompress.pipeline.layerwise.experts import reader
from aicompress.pipeline.step.layer_plan import LayerPlan
from aicompress.statistics import InputStats


def rescalable(
    step: StepInput, method: AnyLayerMethod, chosen: Sequence[LayerPlan]
) -> tuple[tuple[ScalingGroup, ...], list[str]]:
    """The scaling groups of chosen layers, and a warning that names the layers outside of all.

    The model's structure decides, which `on_noise` searches for on random weights; the factors come later, with the
    statistics of the calibration data, and change no shape.

    Raises:
        Refused: there are none, or the model does not run.
    """
    if method.rescales is None:
        return (), []
    names = {layer.info.tensor for layer in chosen}
    checkpoint = step.checkpoint
    known = on_noise(step, probe).groups
    mine = [group for group in known if names & {axis.parameter for axis in group.consumers}]
    bound = checkpoint.manifest.entries.keys() | set(checkpoint.manifest.lent.values())
    usable = tuple(group for group in mine if not _parameters(group) & bound)
    if not usable:
        why = "they are compressed already" if mine else "nothing before them takes the factors"
        hint = "use a method that rounds the weights as they are: imatrix, gptq, or rtn"
        raise Refused(f"{method.name} can rescale none of the selected layers' inputs: {why}", hint)
    served = {axis.parameter for group in usable for axis in group.consumers}
    left = [layer.info.name for layer in chosen if layer.info.tensor not in served]
    if not left:
        return usable, []
    shown = listed(left)
    return usable, [
        f"the inputs of {len(left)} of {len(names)} layers are not rescaled, "
        f"for the model would compute something else: {shown}"
    ]


def _parameters(group: ScalingGroup) -> set[str]:
    return {axis.parameter for axis in (*group.consumers, *group.producers)}


@dataclass(frozen=True)
class Rescaling:
    """The factors of a step as they are decided, put into the view of its input, and noted in its journal.

    Attributes:
        compression: the method, and its checkpoint, which is rewritten.
        scaling_groups: those of the plan.
        layers: by parameter.
        journal: what it has noted of an earlier run is taken up.
        applied: what was chosen, by parameter of the layers that read a rescaled input.
    """

    compression: Compression
    scaling_groups: Sequence[ScalingGroup]
    layers: Mapping[str, Sequence[LayerPlan]]
    journal: Journal
    applied: dict[str, ScalingFactors] = field(default_factory=dict)

    def decide(self, stats: Callable[[str], InputStats | None]) -> None:
        """Choose the factors of every scaling group whose layers have statistics, and that is not rescaled yet.

        Args:
            stats: statistics by parameter, None for layers that are not at hand.
        """
        for group in self.scaling_groups:
            if group.consumers[0].parameter not in self.applied:
                layers = [layer for axis in group.consumers for layer in self.layers.get(axis.parameter, ())]
                known = [
                    (layer, inputs)
                    for layer in layers
                    if layer.config is not None and (inputs := stats(layer.info.tensor)) is not None
                ]
                if known:
                    self._decide(group, known)

    def _decide(self, group: ScalingGroup, layers: Sequence[tuple[LayerPlan, InputStats]]) -> None:
        rescales = self.compression.method.rescales
        assert rescales is not None
        candidates = [
            Candidate(info, layer.config, read)
            for layer, inputs in layers
            for info, read in self._readers(layer.info, inputs)
            if layer.config is not None
        ]
        scaling = rescales.factors(candidates, group.pooled)
        if scaling is None:
            return
        scaling = replace(scaling, factors=self._storable(group, scaling.factors))
        self.journal.record(_key(group), {"factors": scaling.factors.tolist(), "note": scaling.note})
        self._apply(group, scaling)

    def _readers(self, info: LayerInfo, inputs: InputStats) -> Iterator[tuple[LayerInfo, Callable[[], Layer]]]:
        """What reads a layer with its statistics, or each of the experts that it holds."""
        checkpoint = self.compression.checkpoint

        def reading(number: int, own: InputStats) -> Callable[[], Layer]:
            return lambda: replace(reader(checkpoint, info, 0)(number), inputs=own)

        for number, own in enumerate(inputs.experts):
            yield info.of_expert(number), reading(number, own)
        if not inputs.experts:
            yield info, lambda: replace(checkpoint.layer(info), inputs=inputs)

    def _storable(self, group: ScalingGroup, factors: Tensor) -> Tensor:
        """Factors that a normalization's stored weight has exactly, after rounding to its dtype.

        Where the rounded weight would be zero or too large, the channel is not rescaled.
        """
        axis = group.producers[0]
        if not group.norm:
            return factors
        before = self._checkpoint.exact(axis.parameter)
        dtype = self._checkpoint.tensors[axis.parameter].spec.dtype
        after = axis.scaled(before, factors.reciprocal()).to(dtype).float()
        exact = (before + axis.offset) / (after + axis.offset)
        return torch.where(torch.isfinite(exact) & (exact > 0), exact, 1.0)

    @property
    def _checkpoint(self) -> RewrittenCheckpoint:
        assert isinstance(self.compression.checkpoint, RewrittenCheckpoint)
        return self.compression.checkpoint

    def _apply(self, group: ScalingGroup, scaling: ScalingFactors) -> None:
        """Put the factors into the view of the input."""
        for axis in group.consumers:
            self._scale(axis, scaling.factors)
            self.applied[axis.parameter] = scaling
        for axis in group.producers:
            size = self._checkpoint.specs[axis.parameter].shape[axis.axis]
            self._scale(axis, group.inverse(scaling.factors, size))

    def _scale(self, axis: ChannelAxis, factors: Tensor) -> None:
        change = self._checkpoint.change if axis.offset else self._checkpoint.rescale
        change(axis.parameter, _scaling(axis, factors))

    def restore(self, layers: Collection[str] | None = None) -> None:
        """Take up the factors of an earlier run: of the groups of some layers, or of all that are not rescaled yet."""
        for group in self.scaling_groups:
            plain = self.journal.done.get(_key(group))
            mine = layers is None or any(axis.parameter in layers for axis in group.consumers)
            if plain and mine and group.consumers[0].parameter not in self.applied:
                self._apply(group, ScalingFactors(torch.tensor(plain["factors"]), plain["note"]))

    def rescaled(self, name: str, inputs: InputStats) -> tuple[InputStats, str]:
        """Statistics of a layer's input as it is now, and a note for the layer's row."""
        scaling = self.applied.get(name)
        return (inputs, "") if scaling is None else (inputs.divided(scaling.factors), scaling.note)

    def beside(self, layers: Collection[str]) -> dict[str, Tensor]:
        """Rewritten parameters that are not compressed, of the groups of some layers: norms, biases, routers."""
        rewritten: dict[str, Tensor] = {}
        for group in self.scaling_groups:
            if any(axis.parameter in layers for axis in group.consumers):
                names = [name for name in sorted(_parameters(group)) if name not in layers]
                rewritten.update({name: self.compression.checkpoint.read(name) for name in names})
        return rewritten


def _key(group: ScalingGroup) -> str:
    """What the journal calls a scaling group."""
    return f"{group.consumers[0].parameter} rescaled"


def _scaling(axis: ChannelAxis, factors: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: axis.scaled(tensor, factors)
