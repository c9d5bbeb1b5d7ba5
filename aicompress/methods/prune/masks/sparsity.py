"""What all methods that zero single weights share: how much of a layer stays, in which pattern, stored how."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.method import MethodConfig
from aicompress.methods.prune.masks.grouped import grouping_of, ordered
from aicompress.methods.prune.masks.masks import Keep, kept_count, parse_block, parse_pattern
from aicompress.methods.zeros import codes_of, exact, mask_of, zeroed
from aicompress.weights import Dense, IntGrouped, Masked, Sparse, SparseCodes, Weight, outline_nbytes

SCORED = torch.finfo(torch.float32).tiny  # the least score of a weight that is there; one that is not has 0


class SparsityConfig(MethodConfig):
    """How much goes, in which pattern, and how the rest is stored."""

    one_of: ClassVar[tuple[str, ...]] = ("sparsity", "pattern", "kept")
    budgets: ClassVar[frozenset[str]] = frozenset({"sparsity"})

    sparsity: float | None = Field(None, ge=0, le=1, description="share of the weights that become zero")
    pattern: str | None = Field(None, description="N:M, N kept of every M consecutive inputs, e.g. 2:4")
    kept: int | None = Field(None, ge=1, description="weights of a layer that stay")
    block: str | None = Field(None, description="ROWSxCOLUMNS of weights that stay or go together, e.g. 1x4 or 16x1")
    permutation: int = Field(
        0,
        ge=0,
        le=1000,
        description="N:M: rounds of swaps that regroup a layer's inputs so that more is kept; 0 keeps their order",
    )
    scope: Literal["layer", "row", "global"] = Field(
        "layer", description="what shares a sparsity: a layer, each row of it, or all selected layers (of a level)"
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

    @field_validator("block")
    @classmethod
    def _is_block(cls, block: str | None) -> str | None:
        if block is not None:
            parse_block(block)
        return block

    @model_validator(mode="after")
    def _need_sparsity(self) -> SparsityConfig:
        told = self.sparsity is not None or self.pattern == "search"
        if self.scope != type(self).model_fields["scope"].default and not told:
            raise ValueError(f"scope: {self.scope} needs sparsity")
        if self.permutation and self.pattern is None:
            raise ValueError("permutation needs pattern, whose groups it changes")
        if self.pattern is not None and self.block is not None:
            raise ValueError(f"block: {self.block} needs sparsity, and pattern: {self.pattern} sets it already")
        return self

    @property
    def no_smaller(self) -> str:
        """A dense weight stores its zeros."""
        why = "zeros are stored like other numbers: --set method.store=sparse stores only the other weights"
        return why if self.store == "dense" else ""

    @property
    def tile(self) -> tuple[int, int]:
        return (1, 1) if self.block is None else parse_block(self.block)


def keep_of(shape: tuple[int, int], config: SparsityConfig) -> Keep:
    """What stays of a layer. A global sparsity counts per layer until it is resolved."""
    out, columns = shape
    if config.pattern is not None:
        kept, group = parse_pattern(config.pattern)
        return Keep(out * columns // group * kept, (kept, group))
    tile = config.tile
    area, rows = tile[0] * tile[1], out // tile[0]
    tiles = rows * (columns // tile[1])
    if config.scope == "row":
        per_row = config.kept // area // rows if config.sparsity is None and config.kept is not None else None
        if per_row is None:
            assert config.sparsity is not None
            per_row = kept_count(tiles // rows, config.sparsity)
        return Keep(min(per_row * rows, tiles) * area, None, tile, per_row=True)
    if config.kept is not None:
        return Keep(min(config.kept // area, tiles) * area, None, tile)
    assert config.sparsity is not None
    return Keep(kept_count(tiles, config.sparsity) * area, None, tile)


def check(info: LayerInfo, config: SparsityConfig) -> tuple[str, str] | None:
    """A pattern fits the shape, something is left, and the stored form can hold the mask."""
    return _misfit(info, config) or _unstorable(info, config) or _nothing_left(info, config)


def _misfit(info: LayerInfo, config: SparsityConfig) -> tuple[str, str] | None:
    out, columns = info.shape
    group = parse_pattern(config.pattern)[1] if config.pattern is not None else 1
    if columns % group:
        return (
            f"{info.name}: pattern {config.pattern} does not fit its {columns} inputs: {group} does not divide them",
            "exclude the layer, or give it a sparsity instead",
        )
    high, wide = config.tile
    if out % high or columns % wide:
        return (
            f"{info.name}: blocks of {config.block} do not divide its shape {out}x{columns}",
            "exclude the layer, or give it a block of its own in rules:",
        )
    return None


def _unstorable(info: LayerInfo, config: SparsityConfig) -> tuple[str, str] | None:
    codes = codes_of(info.outline)
    if config.permutation and info.stored != "dense":
        return (f"{info.name}: permutation regroups the inputs of dense weights, it is {info.stored}", "permutation: 0")
    if codes is None and info.stored not in ("dense", "sparse"):
        return (f"{info.name}: a {info.stored} weight cannot hold a mask", "prune first, or exclude the layer")
    if codes is not None and not exact(codes):
        return (f"{info.name}: its zero points are real numbers, no code stands for zero", "prune first, then quantize")
    if mask_of(info.outline) is not None and config.block is not None and config.store != "dense":
        return (
            f"{info.name}: it is sparse already, and how many of its weights lie in blocks depends on the data",
            "store: dense, or prune the dense checkpoint",
        )
    return None


def _nothing_left(info: LayerInfo, config: SparsityConfig) -> tuple[str, str] | None:
    keep = keep_of(info.shape, config)
    if config.scope == "global" or keep.kept >= keep.tile[0] * keep.tile[1]:
        return None
    out, columns = info.shape
    per = (columns if keep.per_row else out * columns) // (keep.tile[0] * keep.tile[1])
    most = int(1000 * (per - 1) / per) / 1000
    return (
        f"{info.name}: sparsity {config.sparsity} would prune all of its {out * columns} weights",
        f"at most {most} leaves something; or exclude the layer",
    )


def outline(info: LayerInfo, config: SparsityConfig) -> Weight:
    """The stored weight without data."""
    kept, codes = keep_of(info.shape, config).kept, codes_of(info.outline)
    if isinstance(info.outline, Masked):
        kept = min(kept if config.kept is None else config.kept, info.outline.numbers())
    dense: Weight
    sparse: Weight
    if codes is not None:
        dense, sparse = codes, SparseCodes.outline(codes, kept, grouping_of(info, config))
    else:
        dtype = info.outline.values.dtype if isinstance(info.outline, Sparse) else info.dtype
        dense = Dense.outline(info.shape, dtype)
        sparse = Sparse.outline(info.shape, kept, dtype, grouping_of(info, config))
    if config.store == "auto":
        return sparse if outline_nbytes(sparse) < outline_nbytes(dense) else dense
    return sparse if config.store == "sparse" else dense


def present(layer: Layer) -> Tensor:
    """(out, in) bool: the weights that are there; one that an earlier step zeroed is not."""
    mask = mask_of(layer.stored)
    return layer.weight != 0 if mask is None else mask


def ranked(scores: Tensor, there: Tensor) -> Tensor:
    """Scores (out, in) with which every weight that is there wins over one that is not."""
    return scores.clamp(min=SCORED).masked_fill_(~there, 0.0)


def choose(layer: Layer, scores: Tensor, config: SparsityConfig, threshold: int | None = None) -> Tensor:
    """(out, in) bool, True for the weights that stay, by scores (out, in) that add up over a block.

    `threshold` is as of `Keep.mask`.
    """
    mask = keep_of(layer.info.shape, config).mask(ranked(scores, present(layer)), threshold)
    stored = mask_of(layer.stored)
    return mask if stored is None else mask & stored


def store(layer: Layer, matrix: Tensor, mask: Tensor, config: SparsityConfig, order: Tensor | None = None) -> Weight:
    """A pruned matrix (out, in), in the dtype it is stored with, in the form that the outline has.

    Args:
        order: (in,) columns in the order in which the mask is N:M; None for their own.
    """
    form = outline(layer.info, config)
    if not isinstance(form, Sparse):
        return Dense(Sparse.of(matrix, mask).matrix())
    return Sparse.of(matrix, mask, ordered(form.grouping, order))


def original(layer: Layer) -> Tensor:
    """The weight (out, in) bit for bit, as far as a matrix can show it."""
    if isinstance(layer.stored, Sparse):
        return layer.stored.matrix()
    return layer.stored.matrix if isinstance(layer.stored, Dense) else layer.weight.to(layer.info.dtype)


def store_codes(layer: Layer, codes: IntGrouped, mask: Tensor, config: SparsityConfig) -> Weight:
    """Integer codes that stand for zero where the mask is False, in the form that the outline has."""
    form = outline(layer.info, config)
    return SparseCodes.of(codes, mask, form.grouping) if isinstance(form, SparseCodes) else codes


def masked(layer: Layer, mask: Tensor, config: SparsityConfig) -> Weight:
    """Survivors bit for bit, zeros elsewhere; an integer weight keeps its codes and scales."""
    codes = codes_of(layer.stored)
    if codes is not None:
        return store_codes(layer, zeroed(codes, mask), mask, config)
    return store(layer, original(layer), mask, config)


def describe(config: SparsityConfig, weight: Weight) -> dict[str, Any]:
    """Knobs for the report row."""
    count = weight.shape[0] * weight.shape[1]
    kept = weight.numbers() if isinstance(weight, Masked) else keep_of(weight.shape, config).kept
    shown: dict[str, Any] = {"sparsity": round(1 - kept / count, 6)}
    shown.update({knob: getattr(config, knob) for knob in ("pattern", "block") if getattr(config, knob) is not None})
    note = _note(kept, count, config, weight)
    return {**shown, "note": note} if note else shown


def _note(kept: int, count: int, config: SparsityConfig, weight: Weight) -> str:
    if isinstance(weight, Masked):
        return ""
    if kept == count:
        return f"sparsity {config.sparsity} of {count} weights rounds to none" if config.sparsity else ""
    if isinstance(weight, Dense):
        sparse: Weight = Sparse.outline(weight.shape, kept, weight.matrix.dtype)
        what = "zeros stored densely"
    else:
        assert isinstance(weight, IntGrouped)
        sparse, what = SparseCodes.outline(weight, kept), "zeros are codes like any other"
    size = outline_nbytes(sparse)
    form = "the sparse form" if size >= outline_nbytes(weight) else "store: sparse"
    return f"{what}: no bytes saved; {form} would take {size} bytes"
