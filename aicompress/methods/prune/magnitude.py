"""Magnitude pruning: the weights of least |w| become zero, in a layer, a row, all layers together, or N:M groups.

Han et al. 2015 (arXiv:1506.02626); N:M after Mishra et al. 2021 (arXiv:2104.08378). Zeroing the least |w| is the mask
of least ‖W − Ŵ‖_F at its number of zeros. Survivors are bit-exact; an integer weight keeps its codes and scales.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from aicompress.errors import RecipeError
from aicompress.layer import Layer, LayerInfo
from aicompress.methods.prune.masks import global_counts, kept_count, parse_pattern, pattern_mask, row_mask, top_mask
from aicompress.methods.registry import Candidate, LayerMethod, MethodConfig
from aicompress.weights import Dense, IntGrouped, Sparse, Weight, outline_nbytes


class MagnitudeConfig(MethodConfig):
    """Parameters of magnitude."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"sparsity": 0.5},
                {"sparsity": 0.7, "scope": "row"},
                {"sparsity": 0.5, "scope": "global"},
                {"sparsity": 0.9, "store": "sparse"},
                {"pattern": "2:4", "store": "auto"},
                {"kept": 3, "store": "sparse"},
            ]
        }
    )
    one_of: ClassVar[tuple[str, ...]] = ("sparsity", "pattern", "kept")

    name: Literal["magnitude"] = "magnitude"
    sparsity: float | None = Field(None, ge=0, le=1, description="share of the weights that become zero")
    pattern: str | None = Field(None, description="N:M, N kept of every M consecutive inputs, e.g. 2:4")
    kept: int | None = Field(None, ge=1, description="weights of a layer that stay")
    scope: Literal["layer", "row", "global"] = Field(
        "layer", description="what shares a sparsity: a layer, each row of it, or all selected layers together"
    )
    store: Literal["dense", "sparse", "auto"] = Field(
        "dense",
        description="dense loads everywhere and saves nothing; sparse: a bit mask and the survivors; auto: the smaller",
    )

    @field_validator("pattern")
    @classmethod
    def _is_pattern(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            parse_pattern(pattern)
        return pattern

    @model_validator(mode="after")
    def _scope_needs_sparsity(self) -> MagnitudeConfig:
        if self.sparsity is None and self.scope != "layer":
            raise ValueError(f"scope: {self.scope} needs sparsity")
        return self


def survivors(shape: tuple[int, int], config: MagnitudeConfig) -> int:
    """How many weights of a layer the mask keeps. A global sparsity counts per layer until it is settled."""
    out, columns = shape
    if config.kept is not None:
        return min(config.kept, out * columns)
    if config.pattern is not None:
        kept, group = parse_pattern(config.pattern)
        return out * columns // group * kept
    assert config.sparsity is not None
    if config.scope == "row":
        return out * kept_count(columns, config.sparsity)
    return kept_count(out * columns, config.sparsity)


def check(info: LayerInfo, config: MagnitudeConfig) -> tuple[str, str] | None:
    """A pattern fits the width, something is left, and the stored form can hold the mask."""
    columns = info.shape[1]
    if config.pattern is not None and columns % parse_pattern(config.pattern)[1]:
        group = parse_pattern(config.pattern)[1]
        return (
            f"{info.name}: pattern {config.pattern} does not fit its {columns} inputs: {group} does not divide them",
            "exclude the layer, or give it a sparsity instead",
        )
    if info.stored not in ("dense", "sparse", "int_grouped"):
        return (f"{info.name}: a {info.stored} weight cannot hold a mask", "prune first, or exclude the layer")
    if info.stored == "int_grouped" and config.store == "sparse":
        return (
            f"{info.name}: integer codes have no sparse form",
            "store: auto keeps the codes and zeroes them in place",
        )
    if config.scope != "global" and survivors(info.shape, config) == 0:
        per = columns if config.scope == "row" else info.shape[0] * columns
        most = int(1000 * (per - 1) / per) / 1000
        return (
            f"{info.name}: sparsity {config.sparsity} would prune all of its {info.shape[0] * columns} weights",
            f"at most {most} leaves something; or exclude the layer",
        )
    return None


def outline(info: LayerInfo, config: MagnitudeConfig) -> Weight:
    """The stored weight without data."""
    if isinstance(info.outline, IntGrouped):
        return info.outline
    kept, dtype = survivors(info.shape, config), info.dtype
    if isinstance(info.outline, Sparse):
        kept, dtype = min(kept, info.outline.values.numel()), info.outline.values.dtype
    dense, sparse = Dense.outline(info.shape, dtype), Sparse.outline(info.shape, kept, dtype)
    if config.store == "auto":
        return sparse if outline_nbytes(sparse) < outline_nbytes(dense) else dense
    return sparse if config.store == "sparse" else dense


def scores(layer: Layer) -> Tensor:
    """|w| of every weight that is there, flat: a sparse weight's zeros are gone already."""
    return layer.stored.values.float().abs() if isinstance(layer.stored, Sparse) else layer.weight.abs().reshape(-1)


def mask_of(layer: Layer, config: MagnitudeConfig) -> Tensor:
    """(out, in) bool, True for the weights that stay."""
    if config.pattern is not None or config.scope == "row":
        mask = _patterned(layer.weight.abs(), config)
        return mask & layer.stored.mask if isinstance(layer.stored, Sparse) else mask
    kept = top_mask(scores(layer), survivors(layer.info.shape, config))
    if not isinstance(layer.stored, Sparse):
        return kept.reshape(layer.weight.shape)
    return layer.stored.mask.masked_scatter(layer.stored.mask, kept)


def _patterned(magnitude: Tensor, config: MagnitudeConfig) -> Tensor:
    if config.pattern is not None:
        return pattern_mask(magnitude, *parse_pattern(config.pattern))
    assert config.sparsity is not None
    return row_mask(magnitude, kept_count(magnitude.shape[1], config.sparsity))


def apply(layer: Layer, config: MagnitudeConfig) -> Weight:
    """Prune one layer."""
    mask = mask_of(layer, config)
    stored = layer.stored
    if isinstance(stored, IntGrouped):
        return zeroed_codes(stored, mask)
    form = outline(layer.info, config)
    if isinstance(stored, Sparse):
        matrix = stored.matrix()
    else:
        matrix = stored.matrix if isinstance(stored, Dense) else layer.weight.to(layer.info.dtype)
    return Sparse.of(matrix, mask) if isinstance(form, Sparse) else Dense(Sparse.of(matrix, mask).matrix())


def zeroed_codes(stored: IntGrouped, mask: Tensor) -> IntGrouped:
    """Codes that stand for exactly zero where the mask is False: 0, or the group's zero point."""
    if stored.zero is None:
        return dataclasses.replace(stored, codes=stored.codes * mask)
    codes = stored.codes.reshape(*stored.zero.shape, -1)  # (rows, groups, columns of a group)
    zeroed = torch.where(mask.reshape(codes.shape), codes, stored.zero[:, :, None])
    return dataclasses.replace(stored, codes=zeroed.reshape(stored.shape))


def settle(candidates: Sequence[Candidate], other_bytes: int) -> list[MagnitudeConfig]:
    """Turn a global sparsity into the exact number of weights that stay in every layer; reads layers up to 3 times.

    A row or pattern mask over a sparse weight keeps what both keep, which only the data tells: it is counted here.

    Raises:
        RecipeError: several global sparsities, or a layer would be pruned away.
    """
    settled = [_counted(candidate) for candidate in candidates]
    numbers = [n for n, config in enumerate(settled) if config.scope == "global"]
    return _share_globally(candidates, settled, numbers) if numbers else settled


def _counted(candidate: Candidate) -> MagnitudeConfig:
    config: MagnitudeConfig = candidate.config
    if candidate.info.stored != "sparse" or (config.pattern is None and config.scope != "row"):
        return config
    kept = int(mask_of(candidate.read(), config).sum())
    if kept == 0:
        raise RecipeError(
            f"{candidate.info.name}: what it has left would be pruned too", "lower the sparsity, or exclude the layer"
        )
    return config.model_copy(update={"kept": kept})


def _share_globally(
    candidates: Sequence[Candidate], settled: list[MagnitudeConfig], numbers: Sequence[int]
) -> list[MagnitudeConfig]:
    shares = {candidates[n].config.sparsity for n in numbers}
    if len(shares) > 1:
        raise RecipeError(f"scope: global is given with sparsities {sorted(shares)}", "all layers share one: give one")
    total = sum(candidates[n].info.shape[0] * candidates[n].info.shape[1] for n in numbers)
    kept = kept_count(total, shares.pop())
    counts = global_counts([_reader(candidates[n]) for n in numbers], kept) if kept else [0] * len(numbers)
    gone = [candidates[n].info.name for n, count in zip(numbers, counts, strict=True) if count == 0]
    if gone:
        raise RecipeError(
            f"a global sparsity of {settled[numbers[0]].sparsity} would prune all of {', '.join(gone[:5])}",
            "lower it, exclude those layers, or use scope: layer",
        )
    for number, count in zip(numbers, counts, strict=True):
        update = {"sparsity": None, "kept": count, "scope": "layer"}
        settled[number] = settled[number].model_copy(update=update)
    return settled


def _reader(candidate: Candidate) -> Callable[[], Tensor]:
    return lambda: scores(candidate.read())


def describe(config: MagnitudeConfig, weight: Weight) -> dict[str, Any]:
    """Knobs for the report row."""
    count = weight.shape[0] * weight.shape[1]
    kept = weight.values.numel() if isinstance(weight, Sparse) else survivors(weight.shape, config)
    shown: dict[str, Any] = {"sparsity": round(1 - kept / count, 6)}
    if config.pattern is not None:
        shown["pattern"] = config.pattern
    note = _note(kept, count, config, weight)
    return {**shown, "note": note} if note else shown


def _note(kept: int, count: int, config: MagnitudeConfig, weight: Weight) -> str:
    if kept == count and not isinstance(weight, Sparse):
        return f"sparsity {config.sparsity} of {count} weights rounds to none" if config.sparsity else ""
    if isinstance(weight, IntGrouped):
        return "zeros are codes like any other: no bytes saved"
    if isinstance(weight, Dense):
        size = outline_nbytes(Sparse.outline(weight.shape, kept, weight.matrix.dtype))
        if size >= outline_nbytes(weight):
            return f"zeros stored densely: no bytes saved; the sparse form would take {size} bytes"
        return f"zeros stored densely: no bytes saved; store: sparse would take {size} bytes"
    return ""


METHOD = LayerMethod(
    name="magnitude",
    command="prune",
    summary="zero the weights of least magnitude, per layer, row, globally or N:M; data-free",
    config=MagnitudeConfig,
    apply=apply,
    outline=outline,
    check=check,
    settle=settle,
    describe=describe,
)
