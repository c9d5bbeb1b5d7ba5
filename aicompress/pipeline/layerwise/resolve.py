"""Parameters that depend on a layer's values or on other layers, made explicit before the output is laid out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace

from aicompress.checkpoint import Checkpoint
from aicompress.errors import RecipeError
from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Candidate, WidthSearch
from aicompress.methods.layerwise import AnyLayerMethod
from aicompress.pipeline.layerwise.compress import Compression
from aicompress.pipeline.layerwise.row_blocks import readers
from aicompress.pipeline.step.layer_plan import LayerPlan, layer_seed
from aicompress.pipeline.step.shared_inputs import Sharing


def resolved(
    checkpoint: Checkpoint, layers: Mapping[str, LayerPlan], method: AnyLayerMethod, seed: int
) -> dict[str, LayerPlan]:
    """The layers with parameters that no longer depend on their values or on each other; weights are read for it."""
    if method.allocates is None:
        return dict(layers)
    candidates = []
    compression = Compression(method, checkpoint, seed)
    sharing = Sharing(checkpoint, tuple(layer.info.tensor for layer in layers.values()))
    for layer in layers.values():

        def read(info: LayerInfo = layer.info) -> Layer:
            return checkpoint.layer(info, layer_seed(seed, info.name))

        def input_name(tensor: str = layer.info.tensor) -> str:
            return sharing.leaders.get(tensor, tensor)

        assert layer.config is not None
        candidates.append(Candidate(layer.info, layer.config, read, input_name, readers(compression, layer)))
    own = sum(layer.info.nbytes for layer in layers.values())
    everything = sum(checkpoint.nbytes(name) for name in checkpoint.parameters())
    # Names, shapes and the manifest: an upper bound, so that a byte budget is never exceeded.
    headers = 8192 + 256 * len(checkpoint.tensors) + 768 * len(layers)
    configs = method.allocates.resolve(candidates, everything - own + headers)
    return {name: replace(layer, config=c) for (name, layer), c in zip(layers.items(), configs, strict=True)}


def searches(method: AnyLayerMethod, layers: Mapping[str, LayerPlan]) -> dict[str, WidthSearch]:
    """What is searched for, by name of the layers whose width is open."""
    if method.widths is None:
        return {}
    wanted = {name: method.widths.search(layer.config) for name, layer in layers.items() if layer.config is not None}
    return {name: search for name, search in wanted.items() if search is not None}


def only_search(wanted: Iterable[WidthSearch]) -> WidthSearch | None:
    """The search of a step, which is one for all of its layers; None where nothing is open.

    Raises:
        RecipeError: rules give it several targets or ways.
    """
    given = list(dict.fromkeys(wanted))
    for part in fields(WidthSearch) if len(given) > 1 else ():
        values = dict.fromkeys(getattr(search, part.name) for search in given)
        if len(values) > 1:
            shown = " and ".join(str(value) for value in values)
            raise RecipeError(f"bits: auto is given with {part.name} {shown}", "all its layers share one: give one")
    return given[0] if given else None
