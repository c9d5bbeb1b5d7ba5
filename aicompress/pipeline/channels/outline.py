"""The output of a removal of channels: every shape, dtype and byte, for any choice of the channels that stay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from aicompress.checkpoint import Checkpoint
from aicompress.layer import LayerInfo
from aicompress.model.channels.cut import Kept, attributes, shapes_after
from aicompress.model.channels.repair import can_refit
from aicompress.pipeline.step.output import Destination, Output, Planned, arrange
from aicompress.recipe import Recipe
from aicompress.weights import TensorSpec, Weight


@dataclass(frozen=True)
class Draft:
    """All that an output depends on beside the channels that stay.

    Attributes:
        checkpoint: the input.
        destination: where the output goes.
        recipe: what to do.
        step: this step for the lineage.
        module: the whole network.
        names: names of the checkpoint's parameters in the module.
        infos: every layer of the input.
    """

    checkpoint: Checkpoint
    destination: Destination
    recipe: Recipe
    step: dict[str, Any]
    module: nn.Module
    names: Mapping[str, str]
    infos: tuple[LayerInfo, ...]

    def output(self, kept: Mapping[str, Kept], config: dict[str, Any] | None = None) -> Output:
        """The output for a choice of channels, with the config.json that expresses it."""
        shapes = shapes_after(self.module, kept)
        infos = {info.tensor: info for info in self.infos}
        parameters: dict[str, Planned] = {}
        for name, spec in self.checkpoint.parameters().items():
            weight, info = self.checkpoint.outline(name), infos.get(name)
            target = self.names[name]
            path = target.rpartition(".")[0]
            if target in shapes:
                spec = TensorSpec(spec.dtype, shapes[target])
                if weight is not None:
                    weight = narrowed(weight, self.module.get_submodule(path), kept[path], meta=True)
                if info is not None:
                    rows = (spec.shape[0], spec.nbytes // spec.dtype.itemsize // spec.shape[0])
                    info = replace(info, shape=rows, tensor_shape=spec.shape)
            parameters[name] = Planned(spec, weight, info)
        widths = {} if self.checkpoint.config is not None else _widths(self.module, kept)
        return arrange(self.checkpoint, self.destination, parameters, self.step, config, widths)


def _widths(module: nn.Module, kept: Mapping[str, Kept]) -> dict[str, dict[str, int]]:
    return {
        path: {} if places.axis is not None else attributes(module.get_submodule(path), places)
        for path, places in kept.items()
    }


def narrowed(weight: Weight, layer: nn.Module, kept: Kept, meta: bool = False) -> Weight | None:
    """A compressed weight with the places that stay, in its own form; None where the form cannot hold them."""
    if kept.inner is not None and not can_refit(layer):
        return None  # in groups, or stored the other way round
    narrow: Weight | None = weight
    if kept.out is not None and narrow is not None:
        narrow = narrow.cut(0, kept.out.to("meta") if meta else kept.out)
    if kept.inner is not None and narrow is not None:
        tail = math.prod(getattr(layer, "kernel_size", ()))  # a kernel's elements lie beside one another in a row
        index = (kept.inner[:, None] * tail + torch.arange(tail)).reshape(-1)
        narrow = narrow.cut(1, index.to("meta") if meta else index)
    return narrow
