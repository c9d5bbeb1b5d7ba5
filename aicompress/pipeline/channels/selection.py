"""The channels of a network that can go, and those that do: traced, tried, selected, scored, timed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.data import SampleSource
from aicompress.errors import RecipeError, Refused
from aicompress.measure import interleaved
from aicompress.methods.channels import AnyChannelPruner, Channels, KeptUnits, Limits
from aicompress.methods.structural import Part, Structure
from aicompress.model.channels.cut import Kept, cut_module, kept_places, unit_rows
from aicompress.model.channels.graph import ChannelGroup, Fixed, channel_groups, forward
from aicompress.model.channels.removable import removable
from aicompress.model.channels.saliency import Batch, saliencies
from aicompress.pipeline.channels.example_inputs import example
from aicompress.pipeline.channels.narrowing import Draft, expressed
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.survey import Survey, SurveyResult


@dataclass(frozen=True)
class CalibrationBatches:
    """Calibration data of a step.

    Attributes:
        batches: inputs with their labels.
        source: where they come from, for the report.
    """

    batches: tuple[Batch, ...]
    source: SampleSource


def traced(module: nn.Module, inputs: Any, place: str) -> tuple[list[ChannelGroup], list[Fixed]]:
    """What can be removed from a network, and what cannot.

    Args:
        module: the network.
        inputs: of one forward pass.
        place: the checkpoint, for messages.

    Raises:
        Refused: nothing can.
    """
    groups, fixed = channel_groups(module, inputs)
    groups, more = removable(module, inputs, groups)
    fixed += more
    if not groups:
        shown = "; ".join(f"{one.name}: {one.reason}" for one in fixed[:3])
        raise Refused(f"{place} has no channels that can be removed: {shown}", "nothing to prune here")
    return groups, fixed


def selected(module: nn.Module, groups: list[ChannelGroup], chosen: set[str]) -> tuple[list[ChannelGroup], list[Fixed]]:
    """Groups all of whose layers are selected; `chosen` are names of weights in the module."""
    whole: list[ChannelGroup] = []
    fixed: list[Fixed] = []
    matrices = {name for name, parameter in module.named_parameters() if parameter.ndim > 1}
    for group in groups:
        makers = [m for m in group.members if m.side != "in" and f"{m.path}.weight" in matrices]
        strangers = [member.path for member in makers if f"{member.path}.weight" not in chosen]
        if strangers:
            reason = "not selected" if strangers[0] == group.name else f"its channels are also those of {strangers[0]}"
            fixed.append(Fixed(group.name, reason))
        else:
            whole.append(group)
    if not whole:
        raise RecipeError("select: no group of channels is selected as a whole", "widen it")
    return whole, fixed


@dataclass(frozen=True)
class ChannelChoice:
    """The channels of a network, and what chooses among them.

    Attributes:
        draft: the output, for any choice.
        pruner: the method with its parameters.
        groups: channels that go together.
        samples: calibration data, where the recipe has it.
        survey: keeps what is measured for the choice.
    """

    draft: Draft
    pruner: AnyChannelPruner
    groups: Sequence[ChannelGroup]
    samples: CalibrationBatches | None
    survey: Survey

    @property
    def decided_by_plan(self) -> bool:
        """Whether the plan chooses: how many channels stay depends on their scores, or these read weights alone."""
        settings = self.pruner.settings
        return settings.saliency is None or settings.compares_groups

    def planned(self) -> tuple[KeptUnits, dict[str, Any] | None]:
        """The units of each group that stay, and the config.json that says so where the input has one.

        Where the run is left to choose, as many units as will stay stand for them.

        Raises:
            RecipeError: the limits cannot be met.
            Refused: config.json cannot express it.
        """
        settings, config = self.pruner.settings, self.draft.checkpoint.config
        if not self.decided_by_plan:
            channels = self._channels([torch.zeros(group.size, dtype=torch.float64) for group in self.groups])
        else:
            channels = self._channels(self._surveyed())
        if config is not None:
            assert settings.share is not None  # refused before: config.json holds one width for a stage
            edited, sizes = expressed(config, self.draft.module, self.groups, settings.share, settings.multiple)
            sized = zip(channels, sizes, strict=True)
            return [self.pruner.choose_sized(group, size) for group, size in sized], edited
        if settings.limits.latency is not None:
            return self._timed(channels), None
        return self.pruner.choose(channels, self._within(settings.limits, None)), None

    def chosen(self, sizes: Sequence[int], progress: Progress) -> KeptUnits:
        """The units of each group that stay, so many of each, chosen now that the step runs."""
        channels = self._channels(self._saliencies(progress))
        return [self.pruner.choose_sized(group, size) for group, size in zip(channels, sizes, strict=True)]

    def _channels(self, scores: Sequence[Tensor] | None) -> list[Channels]:
        """The groups with what the method reads of them."""
        module = self.draft.module
        return [
            Channels(
                Structure(group.name, group.size, tuple(_parts(module, group))),
                group.cohorts,
                None if scores is None else scores[number],
            )
            for number, group in enumerate(self.groups)
        ]

    def _surveyed(self) -> list[Tensor] | None:
        """Saliency of every unit of every group, where the method asks for it."""
        kind = self.pruner.settings.saliency
        if kind is None:
            return None
        what = f"{kind} of {sum(group.size for group in self.groups)} channels in {len(self.groups)} groups"

        def measure(progress: Progress) -> SurveyResult:
            return SurveyResult({f"saliency.{n}": each for n, each in enumerate(self._saliencies(progress))})

        measured = self.survey.recorded(what, self.draft.checkpoint, self.draft.recipe, measure).tensors
        return [measured[f"saliency.{number}"] for number in range(len(self.groups))]

    def _saliencies(self, progress: Progress) -> list[Tensor]:
        """A score for every unit of every group on the calibration data."""
        kind = self.pruner.settings.saliency
        assert kind is not None
        assert self.samples is not None  # refused before: the score reads calibration data
        progress("channels", 0, 1)
        return saliencies(self.draft.module, self.groups, self.samples.batches, kind)

    def _timed(self, channels: Sequence[Channels]) -> KeptUnits:
        """A choice within a limit of forward time, which is measured."""
        settings = self.pruner.settings
        first = self.samples and self.samples.batches[0][0]
        speed = Speed(self.draft.module, example(self.draft.module, first, settings.input_shape))

        def measure(progress: Progress) -> SurveyResult:
            progress("network", 0, 1)
            choice = self.pruner.choose(channels, self._within(settings.limits, speed))
            return SurveyResult({f"units.{number}": torch.tensor(units) for number, units in enumerate(choice)})

        what = f"forward times of the network with fewer channels in {len(self.groups)} groups"
        measured = self.survey.recorded(what, self.draft.checkpoint, self.draft.recipe, measure).tensors
        return [measured[f"units.{number}"].tolist() for number in range(len(self.groups))]

    def _within(self, limits: Limits, speed: Speed | None) -> Callable[[KeptUnits], bool]:
        """Tells whether the network with a choice is within the limits."""
        draft, groups = self.draft, self.groups

        def fits(choice: KeptUnits) -> bool:
            kept = kept_places(draft.module, zip(groups, choice, strict=True))
            if limits.latency is not None and speed is not None:
                return speed.ratio(kept) <= limits.latency
            output = draft.output(kept)
            if limits.nbytes is not None:
                return output.weight_bytes <= limits.nbytes
            sizes = [planned.dense.nbytes // planned.dense.dtype.itemsize for planned in output.parameters.values()]
            return limits.parameters is None or sum(sizes) <= limits.parameters

        return fits


def _parts(module: nn.Module, group: ChannelGroup) -> Iterator[Part]:
    """Rows of what computes a group's units and columns of what reads them."""
    for member in group.members:
        role: Any = "consumer" if member.side == "in" else "producer"
        if member.axis is not None:
            yield Part(member.path, member.path, role, 0, partial(unit_rows, module, member, ""))
            continue
        leaves = [leaf for leaf, _ in module.get_submodule(member.path).named_parameters(recurse=False)]
        for leaf in leaves if member.side != "in" else ["weight"]:
            yield Part(f"{member.path}.{leaf}", member.path, role, 0, partial(unit_rows, module, member, leaf))


BATCH = 64  # inputs of a forward pass that is timed
ROUNDS, WARMUP = 15, 3


@dataclass
class Speed:
    """A table of forward times by the widths of the layers, each measured when it is first asked for.

    Attributes:
        module: the whole network.
        inputs: a few inputs of it.
        ratios: time beside the whole network's, in turn in the same rounds, by widths.
    """

    module: nn.Module
    inputs: Any
    ratios: dict[tuple[tuple[str, int, int], ...], float] = field(default_factory=dict)

    @torch.inference_mode()
    def ratio(self, kept: Mapping[str, Kept]) -> float:
        """Time with the channels that stay, as a part of the whole network's."""
        key = tuple((path, _count(places.out), _count(places.inner)) for path, places in sorted(kept.items()))
        if key not in self.ratios:
            few, inputs = copy.deepcopy(self.module), _filled(self.inputs)
            cut_module(few, kept)
            whole, cut = interleaved(
                [lambda: forward(self.module, inputs), lambda: forward(few, inputs)], ROUNDS, WARMUP
            )
            self.ratios[key] = cut.median / whole.median
        return self.ratios[key]


def _count(places: Tensor | None) -> int:
    return -1 if places is None else len(places)


def _filled(inputs: Any) -> Any:
    """As many inputs as are timed, the given ones again and again."""
    if isinstance(inputs, dict):
        return {name: _filled(value) for name, value in inputs.items()}
    return inputs[torch.arange(BATCH) % len(inputs)] if isinstance(inputs, Tensor) else inputs
