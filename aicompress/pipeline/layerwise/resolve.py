"""Parameters that depend on a layer's values or on other layers, made explicit before the output is laid out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CompressError, RecipeError
from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Candidate, Width, WidthSearch
from aicompress.methods.layerwise import AnyLayerMethod
from aicompress.methods.method import MethodConfig
from aicompress.pipeline.layerwise.compress import Compression
from aicompress.pipeline.layerwise.row_blocks import readers
from aicompress.pipeline.step.layer_plan import LayerPlan, layer_seed, named, sharing_budgets
from aicompress.pipeline.step.shared_inputs import Sharing
from aicompress.recipe import Recipe
from aicompress.weights import outline_nbytes


def configured(
    chosen: list[LayerInfo], recipe: Recipe, method: AnyLayerMethod
) -> tuple[dict[str, LayerPlan], list[CompressError]]:
    """Each layer's parameters, and every layer for which they are impossible."""
    layers: dict[str, LayerPlan] = {}
    problems: list[CompressError] = []
    for info in chosen:
        config, rule = recipe.config_for(info)
        if config is None:
            continue
        config = config.fitted(info.shape[1])
        if not method.takes(info.kind, config):
            continue
        layers[info.name] = LayerPlan(info, config, rule, budget=recipe.budget_for(info))
        problem = method.check(info, config)
        if problem is not None:
            problems.append(RecipeError(*problem))
    return layers, problems


def resolved(
    checkpoint: Checkpoint, layers: Mapping[str, LayerPlan], method: AnyLayerMethod, seed: int
) -> dict[str, LayerPlan]:
    """The layers with parameters that no longer depend on their values or on each other; weights are read for it."""
    allocates = method.allocates
    if allocates is None:
        return dict(layers)
    sharing = Sharing(checkpoint, tuple(layer.info.tensor for layer in layers.values()))
    compression = Compression(method, checkpoint, seed)
    own = sum(layer.info.nbytes for layer in layers.values())
    everything = sum(checkpoint.nbytes(name) for name in checkpoint.parameters())
    # Names, shapes and the manifest: an upper bound, so that a byte budget is never exceeded.
    headers = 8192 + 256 * len(checkpoint.tensors) + 768 * len(layers)
    other = everything - own + headers
    explicit: dict[str, LayerPlan] = {}
    for budget, members in sharing_budgets(layers.values()).items():
        candidates = [_candidate(compression, layer, sharing) for layer in members]
        with named(budget):
            configs = allocates.resolve(candidates, 0 if budget else other)
        decided = [replace(layer, config=config) for layer, config in zip(members, configs, strict=True)]
        explicit |= {layer.info.name: layer for layer in decided}
        if budget:  # a part of the output that the recipe's budget has to hold
            other += sum(outline_nbytes(method.planned(layer.info, layer.config)) for layer in decided)
    return {name: explicit[name] for name in layers}


def _candidate(compression: Compression, layer: LayerPlan, sharing: Sharing) -> Candidate[MethodConfig]:
    info = layer.info
    assert layer.config is not None

    def read() -> Layer:
        return compression.checkpoint.layer(info, layer_seed(compression.seed, info.name))

    def input_name() -> str:
        return sharing.leaders.get(info.tensor, info.tensor)

    return Candidate(info, layer.config, read, input_name, readers(compression, layer))


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


def open_widths(method: AnyLayerMethod, layer: LayerPlan) -> tuple[Width, ...]:
    """What a search chooses among for a layer, least bytes first."""
    assert method.widths is not None
    sizes = {
        width: outline_nbytes(method.planned(layer.info, method.widths.at(layer.config, width)))
        for width in method.widths.options(layer.config, layer.info.shape[1])
    }
    return tuple(sorted(sizes, key=lambda width: (sizes[width], width.bits)))
