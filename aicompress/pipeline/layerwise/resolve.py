"""Knobs that depend on the data, on other layers or on a search, made explicit or kept open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from aicompress.checkpoint import Checkpoint
from aicompress.errors import RecipeError
from aicompress.layer import LayerInfo
from aicompress.methods.layerwise import Candidate, LayerMethod
from aicompress.methods.method import MethodConfig
from aicompress.methods.quantize.grid.widths import NARROWED, OPEN, WidthConfig
from aicompress.pipeline.step.layer_plan import layer_seed
from aicompress.pipeline.step.shared_inputs import Sharing

if TYPE_CHECKING:
    from aicompress.pipeline.step.layer_plan import LayerPlan


def settled(
    checkpoint: Checkpoint, layers: Mapping[str, LayerPlan], method: LayerMethod, seed: int
) -> dict[str, LayerPlan]:
    """Make knobs that depend on the data or on other layers explicit."""
    if method.settle is None:
        return dict(layers)
    candidates = []
    sharing = Sharing(checkpoint, tuple(layer.info.tensor for layer in layers.values()))
    for layer in layers.values():

        def read(info: LayerInfo = layer.info) -> object:
            return checkpoint.layer(info, layer_seed(seed, info.name))

        def unit(tensor: str = layer.info.tensor) -> str:
            return sharing.leaders.get(tensor, tensor)

        candidates.append(Candidate(layer.info, layer.config, read, unit))  # type: ignore[arg-type]
    mine = sum(layer.info.nbytes for layer in layers.values())
    everything = sum(checkpoint.nbytes(name) for name in checkpoint.parameters())
    # Names, shapes and the manifest: an upper bound, so that a byte budget is never exceeded.
    headers = 8192 + 256 * len(checkpoint.tensors) + 768 * len(layers)
    configs = method.settle(candidates, everything - mine + headers)
    return {name: replace(layer, config=c) for (name, layer), c in zip(layers.items(), configs, strict=True)}


def search_of(configs: Mapping[str, MethodConfig | None]) -> WidthConfig | None:
    """What the recipe says of a search, which is one for all layers.

    Raises:
        RecipeError: rules give it several targets or ways.
    """
    found = [config for config in configs.values() if isinstance(config, WidthConfig)]
    for field_name in (name for name in OPEN if name not in NARROWED):
        values = dict.fromkeys(getattr(config, field_name) for config in found)
        if len(values) > 1:
            shown = " and ".join(str(value) for value in values)
            raise RecipeError(f"bits: auto is given with {field_name} {shown}", "all its layers share one: give one")
    return found[0] if found else None
