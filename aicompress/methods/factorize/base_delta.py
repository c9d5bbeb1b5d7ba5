"""One matrix for like layers of neighbouring blocks, and a low-rank difference for each: W_i ≈ B + U_i V_i.

Bae et al. 2024, "Relaxed Recursive Transformers", arXiv:2410.20672: blocks share their weights and differ by factors of
low rank, there begun at the SVD of the differences. Here both sides are fitted in turn to the least
Σ_i tr((W_i − B − U_i V_i) H_i (W_i − B − U_i V_i)ᵀ), in which each layer counts in parts of its output's size:
B = Σ_i (W_i − U_i V_i) H_i (Σ_i H_i)⁻¹ for given differences, and the factors of least weighted error of W_i − B for a
given B. No step raises the sum. It begins at B = W_1: at the mean of two layers both differences would be the same
directions for good, where one of them can take those that the other leaves.

K layers (m, n) store m n + K r (m + n) numbers in the place of K m n, so that `keep` must be above 1 / K. Blocks that
were trained apart have little in common: without a distillation behind it the model loses more than with factors of its
own for each layer, in the same bytes. Statistics are the original model's, of one pass over the calibration data; or
data-free: then layers are read in blocks of rows, and so many rows of B are made anew of these and of the factors of
the round before wherever they are needed. Held are these factors, what gives the next ones, and what `streamed` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Reads, Rounded, RowWise
from aicompress.methods.curvature import raw_gram
from aicompress.methods.factorize import shared_factor, streamed, svd
from aicompress.methods.factorize.budget.sizes import factor_dtype, kept_dense
from aicompress.methods.factorize.neighbours import APART, BlocksConfig, neighbours
from aicompress.methods.factorize.shared_rows import Blocks, sizes_of
from aicompress.methods.factorize.streamed import Factors, Rows
from aicompress.methods.factorize.weighting.roots import Root, Weighting
from aicompress.methods.factorize.weighting.rounding import weighed_rounding
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.shares import Shares
from aicompress.weights import BaseDelta, Dense, Weight


class BaseDeltaConfig(BlocksConfig):
    """Parameters of base_delta."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"keep": 0.8}, {"rank": 3, "multiple": 2, "blocks": 3}]})

    name: Literal["base_delta"] = "base_delta"
    rounds: int = Field(10, ge=1, le=100, description="how often the matrix and the differences are fitted in turn")


@dataclass(frozen=True)
class Before:
    """What a round leaves to the next one, which makes rows of B of it and of the same rows of the layers.

    Attributes:
        counts: what each layer's error counts.
        inner: V_i, (rank, in) float32; none before the first round.
        out: these rows of each U_i, (rows, rank) float32.
    """

    counts: list[float]
    inner: list[Tensor]
    out: list[Tensor]

    def base(self, layers: Sequence[Layer]) -> Dense:
        """Rows of B."""
        dtype = factor_dtype(layers[0].info)
        if not self.inner:
            return Dense(layers[0].weight.to(dtype))
        total = torch.zeros_like(layers[0].weight, dtype=torch.float64)
        for count, layer, u, v in zip(self.counts, layers, self.out, self.inner, strict=True):
            total.add_(layer.weight, alpha=count).sub_(u @ v, alpha=count)
        return Dense(total.div_(sum(self.counts)).to(dtype))

    def factors(self, layers: Sequence[Layer], found: Sequence[svd.SvdBlockConfig]) -> tuple[Dense, list[Weight]]:
        """Rows of B, and the factors of those of each W_i − B."""
        base = self.base(layers)
        pairs = zip(layers, found, strict=True)
        return base, [svd.of_rows(_apart(layer, base), each) for layer, each in pairs]


def _apart(layer: Layer, base: Dense) -> Layer:
    """Rows of a layer as those of W_i − B."""
    return replace(layer, weight=layer.weight - base.matrix)


class BaseDeltaBlockConfig(BaseDeltaConfig):
    """Parameters for the same rows of all layers, with what all rows gave.

    Attributes:
        before: what gives these rows of B.
        factors: what gives the factors of each W_i − B; none where the layers stay dense.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    before: Before
    factors: list[svd.SvdBlockConfig]


def rank_of(infos: Sequence[LayerInfo], config: BaseDeltaConfig) -> int:
    """The rank of each difference; 0 where nothing is left for it."""
    multiple = config.multiple or 1
    if config.rank is not None:
        return -(-config.rank // multiple) * multiple
    assert config.keep is not None
    (out, columns), count = infos[0].shape, len(infos)
    rank = int((config.keep * count - 1) * out * columns / (count * (out + columns)))
    return max(0, rank // multiple * multiple)


def shrinks(infos: Sequence[LayerInfo], rank: int) -> bool:
    """Whether the base and the differences are smaller than the layers."""
    (out, columns), count = infos[0].shape, len(infos)
    numbers = out * columns + count * rank * (out + columns)
    return rank > 0 and numbers * factor_dtype(infos[0]).itemsize < count * out * columns * infos[0].dtype.itemsize


def outlines(infos: Sequence[LayerInfo], config: BaseDeltaConfig) -> list[Weight]:
    """The stored weights without data."""
    rank, dtype = rank_of(infos, config), factor_dtype(infos[0])
    if not shrinks(infos, rank):
        return [Dense.outline(info.shape, info.dtype) for info in infos]
    (out, columns), base = infos[0].shape, Dense.outline(infos[0].shape, dtype)
    return [BaseDelta(Dense.outline((out, rank), dtype), Dense.outline((rank, columns), dtype), base) for _ in infos]


def compress(layers: Sequence[Layer], config: BaseDeltaConfig) -> list[Weight]:
    """The base and the differences of like layers, or the layers where these would not be smaller.

    Raises:
        CompressError: no calibration token reached a layer, or its inputs are not finite.
    """
    if isinstance(config, BaseDeltaBlockConfig):
        return _of_rows(layers, config)
    infos = [layer.info for layer in layers]
    rank, dtype = rank_of(infos, config), factor_dtype(infos[0])
    if not shrinks(infos, rank):
        return [kept_dense(layer) for layer in layers]
    roots = [_root(layer, config) for layer in layers]
    counts = [
        shared_factor.size_of(Weighting(root), layer, config) ** -2 for root, layer in zip(roots, layers, strict=True)
    ]
    unit = torch.eye(infos[0].shape[1], dtype=torch.float64)
    total = Root.of(_sum([c * root.weighed(unit) for c, root in zip(counts, roots, strict=True)]), 0.0)
    weights = [layer.weight.double() for layer in layers]
    base, left = Dense(weights[0].to(dtype)), weights
    factors: list[tuple[Tensor, Tensor]] = []
    for number in range(config.rounds):
        if number:
            mean = total.solve(_sum([c * root.weighed(w) for c, root, w in zip(counts, roots, left, strict=True)]))
            base = Dense(mean.to(dtype))
        apart = [weight - base.matrix for weight in weights]
        factors = [Weighting(root).factors(each, rank) for root, each in zip(roots, apart, strict=True)]
        left = [weight - (u @ v).double() for weight, (u, v) in zip(weights, factors, strict=True)]
    return [BaseDelta(Dense(u.to(dtype).contiguous()), Dense(v.to(dtype).contiguous()), base) for u, v in factors]


def _of_rows(layers: Sequence[Layer], config: BaseDeltaBlockConfig) -> list[Weight]:
    """The base and the differences of the same rows of all layers, or these as they are."""
    if not config.factors:
        return [kept_dense(layer) for layer in layers]
    base, factors = config.before.factors(layers, config.factors)
    return [BaseDelta(each.parts()["out"], each.parts()["in"], base) for each in factors]


def divided(infos: Sequence[LayerInfo], blocks: Sequence[Blocks], config: BaseDeltaConfig) -> list[BaseDeltaConfig]:
    """A config for each block of rows, of which all layers have the same."""
    rank, places = rank_of(infos, config), list(zip(*blocks, strict=True))
    counts, found = [size**-2 for size in sizes_of(blocks, config.relative)], list[Factors]()
    before, out = [Before(counts, [], [])] * len(places), [torch.empty(info.shape[0], rank) for info in infos]
    for number in range(config.rounds if shrinks(infos, rank) else 0):
        if number:
            before = _after(places, before, found, out)
        rows = [_rows(info, places, before, layer) for layer, info in enumerate(infos)]
        found = [streamed.factors(its, rank, read().seed) for its, read in zip(rows, places[0], strict=True)]
    found = [replace(each, inner=each.inner.to(factor_dtype(infos[0]))) for each in found]
    make = BaseDeltaBlockConfig.model_construct
    return [make(**dict(config), before=its, factors=_at(found, at)) for at, its in enumerate(before)]


def _rows(info: LayerInfo, places: Sequence[Blocks], before: Sequence[Before], number: int) -> Rows:
    """W_i − B of the layer of a number, in blocks of rows."""

    def block(reads: Blocks, its: Before) -> Tensor:
        layers = [read() for read in reads]
        return _apart(layers[number], its.base(layers)).weight

    return Rows(info.shape, [partial(block, reads, its) for reads, its in zip(places, before, strict=True)])


def _at(found: Sequence[Factors], at: int) -> list[svd.SvdBlockConfig]:
    """What gives the factors of each layer's block of a number."""
    make = svd.SvdBlockConfig.model_construct
    return [make(inner=each.inner, right=each.right, out=each.out[at] if each.out else None) for each in found]


def _after(
    places: Sequence[Blocks], before: Sequence[Before], found: Sequence[Factors], out: Sequence[Tensor]
) -> list[Before]:
    """What a round leaves: its U_i overwrite those of the round before, block by block."""
    after, start = list[Before](), 0
    for at, reads in enumerate(places):
        layers = [read() for read in reads]
        rows = slice(start, start + len(layers[0].weight))
        for whole, each in zip(out, before[at].factors(layers, _at(found, at))[1], strict=True):
            whole[rows] = each.parts()["out"].dense()
        after.append(Before(before[at].counts, [each.inner for each in found], [whole[rows] for whole in out]))
        start = rows.stop
    return after


def _sum(matrices: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(matrices)).sum(0)


def _root(layer: Layer, config: BaseDeltaConfig) -> Root:
    """S of a layer's inputs."""
    if config.whiten:
        return Root.of(raw_gram(layer).double(), config.damping)
    return Root.diagonal(torch.ones(layer.info.shape[1], dtype=torch.float64), 0.0)


def check(info: LayerInfo, config: BaseDeltaConfig) -> tuple[str, str] | None:
    """Only plain layers have a base, and something must be left for the differences."""
    if config.keep is not None and config.keep * config.blocks <= 1:
        message = f"{info.name}: keep {config.keep:g} of {config.blocks} blocks leaves nothing beside their base"
        return (message, f"keep more than {1 / config.blocks:.3g}, or let more blocks share")
    return shared_factor.check(info, config)


def alternative(layer: Layer, config: BaseDeltaConfig, weight: Weight, nbytes: int) -> Rounded | None:
    """What rounding a layer in its part of the bytes would lose."""
    return weighed_rounding(layer, weight, nbytes, Weighting(_root(layer, config)))


def describe(config: BaseDeltaConfig, weight: Weight) -> dict[str, Any]:
    """Knobs for the report row."""
    if isinstance(weight, BaseDelta):
        return {"rank": weight.rank}
    return {"rank": "full", "note": "a base and differences would not make it smaller: kept dense"}


METHOD = LayerMethod(
    name="base_delta",
    command="factorize",
    summary="one matrix for like layers of neighbouring blocks, and a low-rank difference for each; by rank or share",
    when="before a distillation that trains it back, or blocks that hardly differ; others take whitened",
    config=BaseDeltaConfig,
    needs=frozenset({"gram"}),
    apply=lambda layer, config: layer.stored or kept_dense(layer),
    outline=lambda info, config: info.outline or Dense.outline(info.shape, info.dtype),
    check=check,
    describe=describe,
    rounded=alternative,
    row_wise=RowWise(lambda config: not config.whiten),
    shares=Shares(
        "base", neighbours, outlines, compress, APART, alone=False, row_wise=True, divided=divided, across=True
    ),
    reading=Reads(lambda config: frozenset({"gram"}) if config.whiten else frozenset()),
)
