"""Fewer directions of each attention head, as smaller dense matrices: of values with outputs, and of queries with keys.

Lin et al. 2024, MoDeGPT, arXiv:2408.09632, modules of type II and III. Of a head only the products of two layers count,
so that r of its d directions take r / d of both layers, where factors of one layer have r (out + in) numbers.

Values: with O (out, d) of the heads that read a value, G = Σ Oᵀ O and C = E[z zᵀ] of what they are given, the error is
tr(G (I − B T) C (I − B T)ᵀ), least for T = U_rᵀ G^½ with the top left singular vectors U of G^½ C^½. The value is T V,
and the output is fitted to all of T z by least squares, O E[z zᵀ] Tᵀ (T E[z zᵀ] Tᵀ)⁻¹, aimed at the original model.
Scores: without rotary embedding the same, with G and C the second moments of queries and keys. With one, a pair of rows
that turns together stays or goes, in the query and in the key, by the product of what both hold of it. On a Llama of
7 million parameters three quarters of the pairs cost ten times the divergence of whitened factors in as many bytes, and
three quarters of the values' directions a ninth: so pairs stay unless they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.errors import CompressError
from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Couples, Reads
from aicompress.methods.curvature import raw_gram, shifted, statistics
from aicompress.methods.factorize.budget.sizes import factor_dtype, kept_dense
from aicompress.methods.factorize.heads.bases import directions, facing, placed
from aicompress.methods.factorize.weighting.roots import Root
from aicompress.methods.factorize.weighting.weighted import AIM, SHIFT
from aicompress.methods.head_products import HeadProduct
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.method import MethodConfig
from aicompress.weights import Dense, Submatrix, Weight


class JointConfig(MethodConfig):
    """Parameters of joint."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"keep": 0.5}, {"scores": 0.5}]})

    name: Literal["joint"] = "joint"
    keep: float = Field(0.75, gt=0, le=1, description="share of each head's directions that stay; at least one does")
    scores: float | None = Field(
        None,
        gt=0,
        le=1,
        description="the same of queries and keys; without it `keep`, but all of those that a rotary embedding turns: "
        "in pairs they cost more than directions do",
    )
    damping: float = Field(0.01, ge=0, le=1, description="added to the Gram matrix, as a part of its mean diagonal")
    shift: float = Field(
        SHIFT,
        ge=0,
        le=1,
        description=AIM,
    )


def share_of(product: HeadProduct, config: JointConfig) -> float:
    """The share of each head that stays."""
    if product.kind == "values":
        return config.keep
    return config.scores or (1.0 if product.units else config.keep)


def stays(product: HeadProduct, config: JointConfig) -> str:
    """Why a product stays as it is; empty where it does not."""
    if product.kind == "scores" and product.units and config.scores is None:
        return "a rotary embedding turns them in pairs, which go only where `scores` is given"
    return ""


def sizes(product: HeadProduct, config: JointConfig) -> dict[int, int]:
    """How many units of a head stay, by their number of rows; of directions as of units of one row."""
    units = [len(unit) for unit in product.units] or [1] * product.width
    return {size: max(1, round(share_of(product, config) * units.count(size))) for size in set(units)}


def rank_of(product: HeadProduct, config: JointConfig) -> int:
    """Rows of a head that stay."""
    return sum(size * count for size, count in sizes(product, config).items())


def member_outline(product: HeadProduct, info: LayerInfo, config: JointConfig) -> Weight:
    """The stored weight of one member without data."""
    rank, second = rank_of(product, config), info.tensor == product.members[1]
    if rank >= product.width:
        return Dense.outline(info.shape, info.dtype)
    axis = 1 if second and product.kind == "values" else 0
    kept = rank * (product.heads if second == (product.kind == "values") else product.groups)
    shape = (kept, info.shape[1]) if axis == 0 else (info.shape[0], kept)
    index = torch.empty(kept, dtype=torch.int32, device="meta")
    block = Dense.outline(shape, factor_dtype(info))
    return Submatrix(block, info.shape, *((index, None) if axis == 0 else (None, index)))


def compress(
    product: HeadProduct, layers: Sequence[Layer], biases: Sequence[Tensor | None], config: JointConfig
) -> list[Weight]:
    """Both members with the directions that stay.

    Args:
        product: how their heads lie.
        layers: both members, with statistics of their inputs.
        biases: (out,) of each, where it has one; they stay as they are.
        config: gives the share.

    Raises:
        CompressError: no calibration token reached them, or their inputs are not finite.
    """
    if rank_of(product, config) >= product.width:
        return [kept_dense(layer) for layer in layers]
    first, second = layers
    if product.kind == "values":
        return _values(product, first, second, biases[0], config)
    if product.units:
        return _turned_scores(product, layers, biases, config)
    return _scores(product, first, second, biases[0], config)


def _values(
    product: HeadProduct, value: Layer, output: Layer, bias: Tensor | None, config: JointConfig
) -> list[Weight]:
    """Value and output with the best directions of each group."""
    width, groups, each = product.width, product.groups, product.heads // product.groups
    given, wanted = _moments(output, config)
    matrix = output.weight.double()
    columns = matrix.view(matrix.shape[0], groups, each, width)
    blocks = given.view(groups, each, width, groups, each, width)
    counted = [torch.einsum("oad,oae->de", columns[:, group], columns[:, group]) for group in range(groups)]
    seen = [torch.einsum("adae->de", blocks[group, :, :, group]) for group in range(groups)]
    found = directions(counted, seen, groups * rank_of(product, config))
    bases, places = [], []
    for group in range(groups):
        basis, kept = placed(found[group], _of_head(bias, group, width))
        bases.append(basis)
        places.append(kept)
    values = _target(value, config).double().view(groups, width, -1)
    rows = torch.cat([basis @ values[group] for group, basis in enumerate(bases)])
    every = [bases[head // each] for head in range(product.heads)]
    # (heads rank, heads width): what the output is given is multiplied by it
    narrow: Tensor = torch.block_diag(*every)  # type: ignore[no-untyped-call]
    fitted = Root.of(narrow @ given @ narrow.t(), 0.0).solve(matrix @ wanted @ narrow.t())
    at = _positions(places, width)
    return [
        _submatrix(value, rows, at, 0),
        _submatrix(output, fitted, _positions([places[head // each] for head in range(product.heads)], width), 1),
    ]


def _moments(layer: Layer, config: JointConfig) -> tuple[Tensor, Tensor]:
    """E[x̂ x̂ᵀ] of a layer's inputs, and E[x x̂ᵀ] with the original model's as far as `shift` goes; both damped."""
    given = raw_gram(layer).double()
    cross = statistics(layer).cross if config.shift else given
    if cross is None:
        raise CompressError(f"{layer.info.name}: its inputs are not compared with the original model's", "set shift: 0")
    wanted = given + config.shift * (cross.double() - given)
    damping = config.damping * given.diagonal().mean() * torch.eye(len(given), dtype=given.dtype)
    return given + damping, wanted + damping


def _target(layer: Layer, config: JointConfig) -> Tensor:
    """What a layer's rows should be, aimed at the original model's outputs."""
    return shifted(layer, config.shift, Root.of(raw_gram(layer), config.damping).solve)


def _scores(product: HeadProduct, query: Layer, key: Layer, bias: Tensor | None, config: JointConfig) -> list[Weight]:
    """Query and key with the best directions of each group. What a key's bias adds is the same for all keys."""
    width, groups, each = product.width, product.groups, product.heads // product.groups
    queries = _target(query, config).double().view(groups, each, width, -1)
    keys = _target(key, config).double().view(groups, width, -1)
    of_query, of_key = raw_gram(query).double(), raw_gram(key).double()
    own = [_of_head(bias, group, width) for group in range(groups)]  # of one query head: with several, none has a bias
    counted = [torch.einsum("adi,ij,aej->de", heads, of_query, heads) for heads in queries]
    counted = [errors if b is None else errors + torch.outer(b, b) for errors, b in zip(counted, own, strict=True)]
    seen = [head @ of_key @ head.t() for head in keys]
    found = directions(counted, seen, groups * rank_of(product, config))
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])
    places = []
    for group, basis in enumerate(found):
        back = Root.of(basis @ seen[group] @ basis.t(), 0.0).solve(seen[group] @ basis.t())  # B, (d, rank)
        change, kept = facing(back.t(), own[group])
        rows[0].append((change @ back.t() @ queries[group]).flatten(0, 1))
        rows[1].append(torch.linalg.inv(change).t() @ basis @ keys[group])
        places.append(kept)
    of_heads = [places[head // each] for head in range(product.heads)]
    return [
        _submatrix(query, torch.cat(rows[0]), _positions(of_heads, width), 0),
        _submatrix(key, torch.cat(rows[1]), _positions(places, width), 0),
    ]


def _turned_scores(
    product: HeadProduct, layers: Sequence[Layer], biases: Sequence[Tensor | None], config: JointConfig
) -> list[Weight]:
    """Query and key with the units of each group that hold most of both.

    Of a unit that goes the biases stay, so that what it adds to a score lacks all but the product of these.
    """
    width, groups, each = product.width, product.groups, product.heads // product.groups
    targets = [_target(layer, config).double() for layer in layers]
    held = [((rows @ raw_gram(layer).double()) * rows).sum(1) for rows, layer in zip(targets, layers, strict=True)]
    fixed = [
        torch.zeros(len(rows), dtype=rows.dtype) if bias is None else bias.double().square()
        for rows, bias in zip(targets, biases, strict=True)
    ]
    of_query, of_key = (_by_unit(product, energies) for energies in held)  # (heads, units), (groups, units)
    still_query, still_key = (_by_unit(product, energies) for energies in fixed)
    of_key, still_key = (energies.repeat_interleave(each, dim=0) for energies in (of_key, still_key))
    lost = of_query * of_key + of_query * still_key + still_query * of_key
    places = _kept_units(product, config, lost.view(groups, each, -1).sum(1))
    at = (_positions([places[head // each] for head in range(product.heads)], width), _positions(places, width))
    return [_submatrix(layer, rows[own], own, 0) for layer, rows, own in zip(layers, targets, at, strict=True)]


def _by_unit(product: HeadProduct, energies: Tensor) -> Tensor:
    """Energies of rows (heads width,) as those of units (heads, units)."""
    heads = energies.view(-1, product.width)
    return torch.stack([heads[:, list(unit)].sum(1) for unit in product.units], dim=1)


def _kept_units(product: HeadProduct, config: JointConfig, lost: Tensor) -> list[Tensor]:
    """Rows of each group's head that stay: of each size the units of most loss (groups, units)."""
    rows: list[list[int]] = [[] for _ in range(product.groups)]
    for size, count in sizes(product, config).items():
        alike = [unit for unit in product.units if len(unit) == size]
        numbers = [number for number, unit in enumerate(product.units) if len(unit) == size]
        for place in lost[:, numbers].flatten().topk(product.groups * count).indices.tolist():
            rows[place // len(alike)] += alike[place % len(alike)]
    return [torch.tensor(sorted(own), dtype=torch.int64) for own in rows]


def _of_head(bias: Tensor | None, head: int, width: int) -> Tensor | None:
    """A head's part of a bias."""
    return None if bias is None else bias[head * width : (head + 1) * width].double()


def _positions(places: Iterable[Tensor], width: int) -> Tensor:
    """Rows of a layer where the given rows of its heads lie."""
    return torch.cat([head * width + kept for head, kept in enumerate(places)])


def _submatrix(layer: Layer, block: Tensor, at: Tensor, axis: int) -> Submatrix:
    """A layer of which these rows (axis 0) or columns (axis 1) stay."""
    index = at.to(torch.int32)
    stored = Dense(block.to(factor_dtype(layer.info)).contiguous())
    return Submatrix(stored, layer.info.shape, *((index, None) if axis == 0 else (None, index)))


def apply(layer: Layer, config: JointConfig) -> Weight:
    """Keep a layer whose heads are multiplied with no other's."""
    return kept_dense(layer)


def outline(info: LayerInfo, config: JointConfig) -> Weight:
    """The stored weight of such a layer without data."""
    return Dense.outline(info.shape, info.dtype)


def check(info: LayerInfo, config: JointConfig) -> tuple[str, str] | None:
    """Directions of heads are left out of whole matrices only."""
    if info.stored == "dense" and not info.part:
        return None
    return f"{info.name}: is stored as {info.stored}, and has no plain heads", "start from the model it was made from"


def describe(config: JointConfig, weight: Weight) -> dict[str, Any]:
    """Knobs for the report row."""
    if not isinstance(weight, Submatrix):
        return {"kept": "all"}
    (out, columns), (rows, own) = weight.shape, weight.block.shape
    return {"kept": f"{rows} of {out} rows" if rows < out else f"{own} of {columns} columns"}


METHOD = LayerMethod(
    name="joint",
    command="factorize",
    summary="fewer directions of every attention head, as smaller dense matrices of query, key, value and output",
    when="attention whose factors would take more than they save; it leaves feed-forward layers alone (prune width)",
    config=JointConfig,
    needs=frozenset({"gram"}),
    apply=apply,
    outline=outline,
    check=check,
    couples=Couples(stays, member_outline, compress),
    describe=describe,
    reading=Reads[JointConfig](shift=lambda config: config.shift),
)
