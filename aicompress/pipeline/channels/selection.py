"""The channels of a network that can go, and those that do: traced, tried, selected, scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from aicompress.checkpoint import Checkpoint
from aicompress.data import Source
from aicompress.errors import RecipeError, Refused
from aicompress.methods.prune.channels import ChannelsConfig
from aicompress.methods.structural import ChannelMethod, Channels, Part, Structure
from aicompress.model.channels.cut import kept_places, unit_rows
from aicompress.model.channels.graph import ChannelGroup, Fixed, channel_groups
from aicompress.model.channels.removable import removable
from aicompress.model.channels.saliency import Batch, saliencies
from aicompress.pipeline.channels.config_widths import expressed
from aicompress.pipeline.channels.example_inputs import example
from aicompress.pipeline.channels.outline import Draft
from aicompress.pipeline.channels.speed import Speed
from aicompress.recipe import Recipe


@dataclass(frozen=True)
class Evidence:
    """Calibration data of a step.

    Attributes:
        batches: inputs with their labels.
        source: where they come from, for the report.
    """

    batches: tuple[Batch, ...]
    source: Source


def groups(
    checkpoint: Checkpoint, recipe: Recipe, module: nn.Module, evidence: Evidence | None
) -> tuple[list[ChannelGroup], list[Fixed]]:
    """What can be removed from a network, and what cannot.

    Raises:
        Refused: nothing can.
    """
    assert isinstance(recipe.method, ChannelsConfig)
    inputs = example(module, _first(evidence), recipe.method.input_shape)
    groups, fixed = channel_groups(module, inputs)
    groups, more = removable(module, inputs, groups)
    fixed += more
    if not groups:
        shown = "; ".join(f"{one.name}: {one.reason}" for one in fixed[:3])
        raise Refused(f"{checkpoint.path} has no channels that can be removed: {shown}", "nothing to prune here")
    return groups, fixed


def _first(evidence: Evidence | None) -> Any | None:
    """Inputs of the first batch of calibration data."""
    return None if evidence is None else evidence.batches[0][0]


def selected(module: nn.Module, groups: list[ChannelGroup], chosen: set[str]) -> tuple[list[ChannelGroup], list[Fixed]]:
    """Groups all of whose layers are selected; `chosen` are names of weights in the module."""
    found: list[ChannelGroup] = []
    fixed: list[Fixed] = []
    for group in groups:
        makers = [m for m in group.members if m.side != "in" and f"{m.path}.weight" in _matrices(module)]
        strangers = [member.path for member in makers if f"{member.path}.weight" not in chosen]
        if strangers:
            reason = "not selected" if strangers[0] == group.name else f"its channels are also those of {strangers[0]}"
            fixed.append(Fixed(group.name, reason))
        else:
            found.append(group)
    if not found:
        raise RecipeError("select: no group of channels is selected as a whole", "widen it")
    return found, fixed


def _matrices(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.ndim > 1}


def choice(
    draft: Draft, method: ChannelMethod, groups: Sequence[ChannelGroup], evidence: Evidence | None
) -> tuple[list[list[int]], dict[str, Any] | None]:
    """The units of each group that stay, and the config.json that says so where the input has one.

    Raises:
        RecipeError: the target cannot be met.
        Refused: config.json cannot express it.
    """
    config = draft.recipe.method
    assert isinstance(config, ChannelsConfig)
    kind = method.evidence(config)
    found: list[Tensor | None] = [None] * len(groups)
    if kind is not None:
        assert evidence is not None
        found = list(saliencies(draft.module, groups, evidence.batches, kind))
    channels = [
        Channels(Structure(group.name, group.size, tuple(_parts(draft.module, group))), group.cohorts, saliency)
        for group, saliency in zip(groups, found, strict=True)
    ]
    if draft.checkpoint.config is not None:
        share = config.keep if config.keep is not None else 1 - (config.sparsity or 0.0)
        edited, sizes = expressed(draft.checkpoint.config, draft.module, groups, share, config.multiple)
        sized = [
            config.model_copy(update={"keep": size / group.size, "sparsity": None, "multiple": 1})
            for size, group in zip(sizes, groups, strict=True)
        ]
        chosen = [method.choose([one], each, lambda c: True)[0] for one, each in zip(channels, sized, strict=True)]
        return chosen, edited

    speed = Speed(draft.module, example(draft.module, _first(evidence), config.input_shape))

    def fits(choice: list[list[int]]) -> bool:
        kept = kept_places(draft.module, zip(groups, choice, strict=True))
        if config.target_latency is not None:
            return speed.ratio(kept) <= config.target_latency
        output = draft.output(kept)
        if config.target_bytes is not None:
            return output.weight_bytes <= config.target_bytes
        numbers = sum(planned.dense.nbytes // planned.dense.dtype.itemsize for planned in output.parameters.values())
        return config.target_parameters is None or numbers <= config.target_parameters

    return method.choose(channels, config, fits), None


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
