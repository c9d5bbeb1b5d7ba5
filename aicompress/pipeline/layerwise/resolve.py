"""Parameters that depend on a layer's values or on other layers, made explicit before the output is laid out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import chain, islice

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CompressError, RecipeError
from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Candidate
from aicompress.methods.decisions import Width, WidthSearch
from aicompress.methods.layerwise import AnyLayerMethod
from aicompress.methods.method import MethodConfig
from aicompress.pipeline.layerwise.compress import Compression
from aicompress.pipeline.layerwise.experts import ALL_WHOLE, Divisible, infos_of, outline, reader
from aicompress.pipeline.layerwise.rows.reading import readers
from aicompress.pipeline.step.layer_plan import LayerPlan, layer_seed, named, sharing_budgets
from aicompress.pipeline.step.models.shared_inputs import SharedInputs
from aicompress.recipe import Recipe
from aicompress.weights import outline_nbytes


def configured(
    chosen: list[LayerInfo], recipe: Recipe, method: AnyLayerMethod, held: Divisible = ALL_WHOLE
) -> tuple[dict[str, LayerPlan], list[CompressError]]:
    """Each layer's parameters, and every layer for which they are impossible.

    Args:
        chosen: the layers.
        recipe: gives the parameters.
        method: theirs.
        held: the experts that are compressed one by one.
    """
    layers: dict[str, LayerPlan] = {}
    problems: list[CompressError] = []
    unsuited = [info for info in chosen if not method.suits(info)]
    if unsuited and len(unsuited) == len(chosen):
        message = f"{method.name} is made for {method.made_for}, and none of the selected layers is one"
        problems.append(RecipeError(message, f"{unsuited[0].name} for one: select others, or take another method"))
    for info in chosen:
        config, rule = recipe.config_for(info)
        if config is None:
            continue
        info = held.of(info)
        one = info if info.experts is None else infos_of(info)[0]
        config = config.fitted(one.shape[1])
        whole = method.takes(info.kind, config) and not (info.kind == "experts" and info.part)
        if (info.experts is None and not whole) or not method.suits(info):
            continue
        layers[info.name] = LayerPlan(info, config, rule, budget=recipe.budget_for(info))
        problem = method.check(one, config)
        if problem is not None:
            problems.append(RecipeError(*problem))
    return layers, problems


def resolved(
    checkpoint: Checkpoint, layers: Mapping[str, LayerPlan], method: AnyLayerMethod, seed: int
) -> tuple[dict[str, LayerPlan], list[str]]:
    """The layers with parameters that no longer depend on their values or on each other; weights are read for it.

    Returns:
        The layers by name, and a note where experts get other parameters than they would by themselves.
    """
    allocates = method.allocates
    if allocates is None:
        return dict(layers), []
    sharing = SharedInputs(checkpoint, tuple(layer.info.tensor for layer in layers.values()))
    compression = Compression(method, checkpoint, seed)
    own = sum(layer.info.nbytes for layer in layers.values())
    everything = sum(checkpoint.nbytes(name) for name in checkpoint.parameters())
    # Names, shapes and the manifest: an upper bound, so that a byte budget is never exceeded.
    headers = 8192 + 256 * len(checkpoint.tensors) + 768 * len(layers)
    other = everything - own + headers
    explicit: dict[str, LayerPlan] = {}
    changed: list[str] = []
    for budget, members in sharing_budgets(layers.values()).items():
        groups = [_candidates(compression, layer, sharing) for layer in members]
        with named(budget):
            configs = iter(allocates.resolve(list(chain.from_iterable(groups)), 0 if budget else other))
        found = [list(islice(configs, len(group))) for group in groups]
        decided = [_decided(method, layer, its) for layer, its in zip(members, found, strict=True)]
        changed += [told for layer, its in zip(decided, found, strict=True) for told in _differing(layer, its)]
        explicit |= {layer.info.name: layer for layer in decided}
        if budget:  # a part of the output that the recipe's budget has to hold; widths are searched for later
            known = [layer for layer in decided if layer.info.name not in searches(method, {layer.info.name: layer})]
            other += sum(outline_nbytes(outline(method, layer.info, layer.config)) for layer in known)
    more = f", and {len(changed) - 1} more" if changed[1:] else ""
    notes = [f"experts in one tensor are stored alike: those of {changed[0]}{more}"] if changed else []
    return {name: explicit[name] for name in layers}, notes


def _decided(method: AnyLayerMethod, layer: LayerPlan, found: Sequence[MethodConfig]) -> LayerPlan:
    """A layer with the parameters that were found for it, or with the ones for all of the experts that it holds."""
    assert method.allocates is not None
    same = all(config == found[0] for config in found)
    return replace(
        layer, config=found[0] if same else method.allocates.alike(infos_of(layer.info)[0], layer.config, found)
    )


def _differing(layer: LayerPlan, found: Sequence[MethodConfig]) -> list[str]:
    """What the experts of a layer would have got by themselves, where that differs."""
    assert layer.config is not None
    given = [dict(config) for config in found]
    names = [name for name in given[0] if any(fields[name] != given[0][name] for fields in given)]
    if not names:
        return []
    values, own = sorted(fields[names[0]] for fields in given), dict(layer.config)[names[0]]
    return [f"{layer.info.name} get {names[0]} {own} each, and would by themselves get {values[0]} to {values[-1]}"]


def candidates_of(
    checkpoint: Checkpoint, layers: Sequence[LayerPlan], method: AnyLayerMethod, seed: int
) -> list[Candidate[MethodConfig]]:
    """The layers as a method looks at many of them at once."""
    sharing = SharedInputs(checkpoint, tuple(layer.info.tensor for layer in layers))
    compression = Compression(method, checkpoint, seed)
    return [_candidate(compression, layer, sharing) for layer in layers]


def _candidates(compression: Compression, layer: LayerPlan, sharing: SharedInputs) -> list[Candidate[MethodConfig]]:
    """A layer as a candidate, or each of the experts that it holds as one."""
    if layer.info.experts is None:
        return [_candidate(compression, layer, sharing)]
    assert layer.config is not None

    def read(number: int) -> Layer:
        return reader(compression.checkpoint, layer.info, compression.seed)(number)

    return [Candidate(own, layer.config, partial(read, number)) for number, own in enumerate(infos_of(layer.info))]


def _candidate(compression: Compression, layer: LayerPlan, sharing: SharedInputs) -> Candidate[MethodConfig]:
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


def searches_by_budget(wanted: Mapping[str, WidthSearch], layers: Mapping[str, LayerPlan]) -> dict[str, WidthSearch]:
    """The search of each budget, levels first: one for all layers that share it.

    Args:
        wanted: what is searched for, by name of the layers.
        layers: their plans, by name.

    Raises:
        RecipeError: a budget is given several targets or ways, or a bound of the whole output beside levels' budgets.
    """
    shared: dict[str, WidthSearch] = {}
    for budget, members in sharing_budgets(layers[name] for name in wanted).items():
        with named(budget):
            search = _only_search(wanted[layer.info.name] for layer in members)
        if budget and search.target_bytes is not None:  # of its layers, which is so many bits for each of their weights
            weights = sum(layer.info.shape[0] * layer.info.shape[1] for layer in members)
            search = replace(search, target_bytes=None, target_bpw=8 * search.target_bytes / weights)
        shared[budget] = search
    if len(shared) > 1 and any(search.max_kl is not None for search in shared.values()):
        hint = "give target_bpw or target_bytes instead, or take the levels' budgets out"
        raise RecipeError("max_kl bounds what the whole model loses, and levels have budgets of their own", hint)
    return shared


def _only_search(wanted: Iterable[WidthSearch]) -> WidthSearch:
    """The search of a budget, which is one for all of its layers.

    Raises:
        RecipeError: rules give it several targets or ways.
    """
    given = list(dict.fromkeys(wanted))
    for part in fields(WidthSearch) if len(given) > 1 else ():
        values = dict.fromkeys(getattr(search, part.name) for search in given)
        if len(values) > 1:
            shown = " and ".join(str(value) for value in values)
            raise RecipeError(f"bits: auto is given with {part.name} {shown}", "all its layers share one: give one")
    return given[0]


def open_widths(method: AnyLayerMethod, layer: LayerPlan) -> tuple[Width, ...]:
    """What a search chooses among for a layer, least bytes first."""
    assert method.widths is not None
    sizes = {
        width: outline_nbytes(method.planned(layer.info, method.widths.at(layer.config, width)))
        for width in method.widths.options(layer.config, layer.info.shape[1])
    }
    return tuple(sorted(sizes, key=lambda width: (sizes[width], width.bits)))
