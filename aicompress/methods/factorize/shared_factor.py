"""What methods share that give several layers one right factor: W_i ≈ U_i V.

The layers lie one below the other in one matrix, (Σ out_i, in), of which U and V are the factors of least output error
for inputs whose Gram matrices are added; U_i are the rows of U that belong to layer i. r (in + Σ out_i) numbers are
stored in the place of Σ in out_i.

The error of each layer counts in parts of its output's size (`relative`): values are smaller than queries and keys, and
more depends on them. On a language model of 7 million parameters at keep 0.8 its outputs then diverge by 0.0119 nats
instead of 0.0154, and by 0.0142 where each layer has factors of its own (whitened), in as many bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Candidate, Reads, Rounded, RowWise
from aicompress.methods.curvature import raw_gram, shifted
from aicompress.methods.decisions import Allocates, Surveys, SurveySetting
from aicompress.methods.effort import Effort, Level
from aicompress.methods.factorize import shared_rows, svd
from aicompress.methods.factorize.budget import allocation, groups
from aicompress.methods.factorize.budget.ranks import largest_rank
from aicompress.methods.factorize.budget.shared import SharedConfig, SharedRankConfig, rank_of, shrinks
from aicompress.methods.factorize.budget.sizes import Gains, factor_dtype, kept_dense
from aicompress.methods.factorize.weighting.roots import Root, Weighting, even
from aicompress.methods.factorize.weighting.rounding import weighed_rounding
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.shares import Shares
from aicompress.weights import Dense, LowRank, Weight

C = TypeVar("C", bound=SharedRankConfig)


@dataclass(frozen=True)
class FactorGroups(Generic[C]):
    """Which layers share a factor.

    Attributes:
        groups, why, across: as `Shares` has them.
    """

    groups: Callable[[Sequence[Candidate[C]]], list[list[int]]]
    why: str
    across: bool = False


@dataclass(frozen=True)
class Aim(Generic[C]):
    """What the error of a layer is of, and what it counts beside its inputs.

    Attributes:
        shift: config -> how far the target moves towards the original model's outputs.
        graded: config -> whether gradients in the layer's outputs count.
        outputs: (layer, config) -> the outputs' side where they do; None where no gradient reaches it.
    """

    shift: Callable[[C], float] = lambda config: 0.0
    graded: Callable[[C], bool] = lambda config: False
    outputs: Callable[[Layer, C], Root | None] = lambda layer, config: None


def sharing(
    config: type[C],
    grouping: FactorGroups[C],
    aim: Aim[C],
    summary: str,
    *,
    when: str,
    efforts: Mapping[Level, Effort] | None = None,
) -> LayerMethod[C]:
    """A method whose groups of layers have one right factor.

    Args:
        config: its parameters; their name is the method's.
        grouping: which layers share.
        aim: what the error is of.
        summary: a line for the list of methods.
        when: as of every method.
        efforts: presets.
    """

    gains, reads = partial(_gains, aim), partial(_reads, aim)

    def decide(candidates: Sequence[Candidate[C]], setting: SurveySetting) -> list[C]:
        return groups.resolve(candidates, setting.other_bytes, grouping.groups, gains, setting.divergence)

    def opens(given: C) -> frozenset[str]:
        return reads(given) if given.by_spectrum else frozenset()

    return LayerMethod(
        name=config.model_fields["name"].default,
        command="factorize",
        summary=summary,
        when=when,
        config=config,
        needs=frozenset({"gram", "output_gram"} if "gradients" in config.model_fields else {"gram"}),
        apply=lambda layer, given: compressed([layer], given, aim)[0],
        outline=lambda info, given: outlines([info], given)[0],
        check=check,
        allocates=Allocates(lambda candidates, other: _estimated(candidates, other, grouping, gains, opens)),
        surveys=Surveys(opens, decide, lambda given: given.tried),
        describe=describe,
        rounded=partial(_rounded, aim),
        efforts=efforts or {},
        shares=Shares(
            "in",
            grouping.groups,
            outlines,
            partial(compressed, aim=aim),
            grouping.why,
            row_wise=True,
            divided=shared_rows.divided,
            across=grouping.across,
        ),
        row_wise=RowWise(
            lambda given: not given.whiten,
            divided=lambda info, blocks, given: shared_rows.divided([info], [blocks], given),
            exact=False,
        ),
        reading=Reads(reads, lambda given: aim.shift(given) if given.whiten else 0.0),
    )


def _gains(aim: Aim[C], members: Sequence[Candidate[C]], config: C) -> Gains:
    """What each direction of the layers one below the other is worth."""
    if not config.whiten:
        infos, blocks = [member.info for member in members], [member.parts for member in members]
        squares = shared_rows.squared_singular_values(infos, blocks, config.relative)
        return Gains(squares, not aim.graded(config))
    layers = [member.read() for member in members]
    seen = all(layer.inputs is None or layer.inputs.count > 1 for layer in layers)  # white noise counts one row
    weighed = _weighed(layers, config, aim)
    return Gains(weighed.inputs.squares(weighed.whole), seen and weighed.graded == aim.graded(config))


def _reads(aim: Aim[C], config: C) -> frozenset[str]:
    """The statistics that the factors of a config are made by."""
    if not config.whiten:
        return frozenset()
    return frozenset({"gram", "output_gram"} if aim.graded(config) else {"gram"})


def _rounded(aim: Aim[C], layer: Layer, config: C, weight: Weight, nbytes: int) -> Rounded | None:
    """What rounding would lose in as many bytes, in the error that the factors are chosen by."""
    return weighed_rounding(layer, weight, nbytes, Weighting(_root([layer], config), _graded(layer, config, aim)))


def _estimated(
    candidates: Sequence[Candidate[C]],
    other_bytes: int,
    grouping: FactorGroups[C],
    gains: Callable[[Sequence[Candidate[C]], C], Gains],
    opens: Callable[[C], frozenset[str]],
) -> list[C]:
    """Ranks by the weights alone where a survey will decide, which `opens` asks."""
    tried = [replace(candidate, config=candidate.config.as_tried()) for candidate in candidates]
    plain = [replace(each, config=each.config.model_copy(update={"whiten": False})) for each in tried]
    ranked = groups.resolve(plain, other_bytes, grouping.groups, gains)
    pairs = zip(tried, ranked, strict=True)
    estimates = [config.model_copy(update={"whiten": each.config.whiten}) for each, config in pairs]
    return allocation.still_open(tried, estimates, lambda config: config.tried or bool(opens(config)))


def outlines(infos: Sequence[LayerInfo], config: SharedConfig) -> list[Weight]:
    """The stored weights without data."""
    if isinstance(config, shared_rows.SharedBlockConfig):
        return [svd.outline(info, rows) for info, rows in zip(infos, config.rows, strict=True)]
    rank, dtype = rank_of(infos, config), factor_dtype(infos[0])
    if not shrinks(infos, rank):
        return [Dense.outline(info.shape, info.dtype) for info in infos]
    inner = Dense.outline((rank, infos[0].shape[1]), dtype)
    return [LowRank(Dense.outline((info.shape[0], rank), dtype), inner) for info in infos]


def compressed(layers: Sequence[Layer], config: C, aim: Aim[C]) -> list[Weight]:
    """Factors of layers that share the right one, or the layers where these would not be smaller.

    Raises:
        CompressError: no calibration token reached a layer, or its inputs are not finite.
    """
    if isinstance(config, shared_rows.SharedBlockConfig):
        return [svd.of_rows(layer, rows) for layer, rows in zip(layers, config.rows, strict=True)]
    infos = [layer.info for layer in layers]
    rank, dtype = rank_of(infos, config), factor_dtype(infos[0])
    if not shrinks(infos, rank):
        return [kept_dense(layer) for layer in layers]
    weighed = _weighed(layers, config, aim, aim.shift(config) if config.whiten else 0.0)
    out, inner = weighed.inputs.factors(weighed.whole, rank)
    counts = [info.shape[0] for info in infos]
    rows = zip(weighed.outputs, torch.split(out.double(), counts), strict=True)
    out, inner = even(torch.cat([side.undone(each.t()).t() for side, each in rows]), inner)
    shared = Dense(inner.to(dtype).contiguous())
    return [LowRank(Dense(each.to(dtype).contiguous()), shared) for each in torch.split(out, counts)]


@dataclass(frozen=True)
class _Weighed:
    """Layers one below the other, with what their errors count.

    Attributes:
        inputs: what errors count by the inputs of all layers.
        outputs: the same by each layer's outputs: by their gradients, where these reach all layers, or by their size.
        graded: whether it is by gradients.
        whole: (sum of out, in) float64, rows weighed by their outputs.
    """

    inputs: Weighting
    outputs: list[Root]
    graded: bool
    whole: Tensor


def _weighed(layers: Sequence[Layer], config: C, aim: Aim[C], shift: float = 0.0) -> _Weighed:
    """The layers one below the other; `shift` says how far they move to make up for compressed layers before them."""
    root = _root(layers, config)
    weighting = Weighting(root)
    outputs = [side for layer in layers if (side := _graded(layer, config, aim)) is not None]
    graded = len(outputs) == len(layers)
    if not graded:
        sizes = [(layer.info.shape[0], size_of(weighting, layer, config)) for layer in layers]
        outputs = [Root.diagonal(torch.ones(rows, dtype=torch.float64) / size**2, 0.0) for rows, size in sizes]
    moved = [shifted(layer, shift, root.solve).double() for layer in layers]
    whole = torch.cat([side.times(target.t()).t() for side, target in zip(outputs, moved, strict=True)])
    return _Weighed(weighting, outputs, graded, whole)


def _graded(layer: Layer, config: C, aim: Aim[C]) -> Root | None:
    """The outputs' side of a layer; None where its gradients do not count, or do not reach it."""
    return aim.outputs(layer, config) if config.whiten and aim.graded(config) else None


def size_of(weighting: Weighting, layer: Layer, config: SharedConfig) -> float:
    """What an error of a layer's outputs is divided by: their root of the mean square, or 1."""
    size = math.sqrt(weighting.error(layer.weight)) if config.relative else 1.0
    return size if size > 0 else 1.0


def _root(layers: Sequence[Layer], config: SharedConfig) -> Root:
    """S of the sum of the Gram matrices of the layers' inputs."""
    if not config.whiten:
        return Root.diagonal(torch.ones(layers[0].info.shape[1]), 0.0)
    grams: dict[int, Tensor] = {}
    for layer in layers:
        gram = raw_gram(layer)
        grams[id(gram)] = gram  # layers of one input have one Gram matrix
    first, *others = grams.values()
    return Root.of(sum(others, first.double()), config.damping)


def check(info: LayerInfo, config: SharedConfig) -> tuple[str, str] | None:
    """Only plain layers are factorized."""
    if info.stored == "dense" and not info.part:
        return None
    form = "a factor" if info.part else f"stored as {info.stored}"
    return (
        f"{info.name}: is {form} already, and only plain layers can share a factor",
        "factorize first, then compress the factors, or exclude the layer",
    )


def describe(config: SharedConfig, weight: Weight) -> dict[str, Any]:
    """Knobs for the report row."""
    if isinstance(weight, LowRank):
        return {"rank": weight.rank}
    largest = largest_rank(weight.shape)
    limit = f"by itself only ranks up to {largest} would" if largest else "by itself no rank would"
    return {"rank": "full", "note": f"the rank would not make it smaller ({limit}): kept dense"}
