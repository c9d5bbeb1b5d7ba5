"""Forward time of a network with fewer channels beside the whole network's, measured on this machine."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.measure import interleaved
from aicompress.model.channels.cut import Kept, cut_module
from aicompress.model.channels.graph import forward

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
