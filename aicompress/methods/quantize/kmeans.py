"""Weight sharing: every weight becomes the nearest of 2^bits values that k-means finds. Data-free.

Han et al. 2016, "Deep Compression", arXiv:1510.00149, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Self

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import RowWise
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.method import MethodConfig
from aicompress.methods.quantize.grid.centroids import centroids_of, cluster, histogram, nearest
from aicompress.methods.quantize.grid.fitting import GroupSize, with_fitting_groups
from aicompress.methods.quantize.grid.integer import check, shared_columns, stored_scale_dtype
from aicompress.methods.quantize.grid.rounding import pieces, require_scales
from aicompress.weights import Codebook, Weight


class CodebookConfig(MethodConfig):
    """Knobs of tables found by k-means."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"granularity": "tensor"}, {"granularity": "group", "group_size": 4, "bits": 1}]
        }
    )

    bits: Literal[1, 2, 3, 4, 5, 6, 7, 8] = Field(4, description="bits of a code: 2^bits values in a table")
    granularity: Literal["tensor", "channel", "group"] = Field("channel", description="what shares a table")
    group_size: GroupSize = Field(128, ge=1, description="input columns that share a table, when granularity is group")
    iterations: int = Field(50, ge=0, le=10000, description="of Lloyd's algorithm, at most")
    scale_dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        "auto", description="stored tables; auto: the model's dtype, float16 for a float32 model"
    )

    def fitted(self, columns: int) -> Self:
        """Groups that divide a layer's columns, where the recipe gives no size."""
        return with_fitting_groups(self, columns, "group_size" in self.model_fields_set)


class KmeansConfig(CodebookConfig):
    """Parameters of kmeans."""

    name: Literal["kmeans"] = "kmeans"


def outline(info: LayerInfo, config: CodebookConfig) -> Weight:
    """The stored weight without data."""
    rows, columns = info.shape
    tables = {"tensor": 1, "channel": rows, "group": rows * (columns // config.group_size)}[config.granularity]
    return Codebook.outline(info.shape, config.bits, tables, stored_scale_dtype(config, info.dtype))


class KmeansBlockConfig(KmeansConfig):
    """Parameters for some rows of a layer, with the table of the whole layer, (1, k)."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    table: Tensor


def divided(info: LayerInfo, blocks: Sequence[Callable[[], Layer]], config: KmeansConfig) -> list[KmeansConfig]:
    """A config for each block of rows, with the table of all of them; blocks are read once.

    Raises:
        Refused: its values are too large for the table's dtype.
    """
    points, counts = histogram([partial(_weight, read) for read in blocks])
    table = centroids_of(points, counts, 1 << config.bits, config.iterations)
    table = table.to(stored_scale_dtype(config, info.dtype))
    require_scales(table, info.name)
    return [KmeansBlockConfig.model_construct(**dict(config), table=table)] * len(blocks)


def _weight(read: Callable[[], Layer]) -> Tensor:
    return read().weight


def apply(layer: Layer, config: KmeansConfig) -> Weight:
    """Quantize one layer.

    Raises:
        Refused: its values are too large for the tables' dtype.
    """
    if isinstance(config, KmeansBlockConfig):
        codes = nearest(layer.weight.reshape(1, -1), config.table.float()).to(torch.uint8)
        return Codebook(codes.reshape(layer.weight.shape), config.table, None, config.bits)
    return shared_values(layer, torch.ones(layer.info.shape[1]), config)


def shared_values(layer: Layer, importance: Tensor, config: CodebookConfig) -> Codebook:
    """Tables of least Σ_j h_j (w_j − ŵ_j)², and the codes.

    Args:
        layer: what to quantize.
        importance: h, (in,) positive.
        config: what shares a table, and its size.

    Raises:
        Refused: its values are too large for the tables' dtype.
    """
    weight, k = layer.weight, 1 << config.bits
    dtype = stored_scale_dtype(config, layer.info.dtype)
    if config.granularity == "tensor":
        tables, codes = _solve(weight.reshape(1, -1), importance.expand_as(weight).reshape(1, -1), config, dtype)
        require_scales(tables, layer.info.name)
        return Codebook(codes.reshape(weight.shape), tables, None, config.bits)
    size = shared_columns(config) or weight.shape[1]
    codes, parts = torch.empty(weight.shape, dtype=torch.uint8), []
    for rows in pieces(layer.info.shape):
        values = weight[rows].reshape(-1, size)
        h = importance.expand(len(weight[rows]), -1).reshape(-1, size)
        tables, own = _solve(values, h, config, dtype)
        codes[rows] = own.reshape(-1, weight.shape[1])
        parts.append(tables)
    require_scales(torch.cat(parts), layer.info.name)
    assert parts[0].shape[1] == k
    return Codebook(codes, torch.cat(parts), None, config.bits)


def _solve(values: Tensor, weights: Tensor, config: CodebookConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tables (problems, k) in their stored dtype, and codes (problems, n) uint8."""
    tables = cluster(values, weights, 1 << config.bits, config.iterations).to(dtype)
    return tables, nearest(values, tables.float()).to(torch.uint8)


def describe(config: CodebookConfig, weight: Weight) -> dict[str, Any]:
    """Knobs for the report row."""
    return {
        "bits": config.bits,
        "table per": config.group_size if config.granularity == "group" else config.granularity,
    }


METHOD = LayerMethod(
    name="kmeans",
    command="quantize",
    summary="nearest of 2^bits values found by k-means; data-free",
    when="weights far from Gaussian without data, for size alone: layers run decoded, no kernel multiplies by tables",
    config=KmeansConfig,
    apply=apply,
    outline=outline,
    stacks=True,
    row_wise=RowWise(lambda config: True, divided=divided, divides=lambda config: config.granularity == "tensor"),
    check=check,
    describe=describe,
)
