"""What methods share that prune against the Gram matrix of a layer's inputs: from a mask to the stored weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import ByteSize, Field, field_validator, model_validator
from torch import Tensor

from aicompress.errors import RecipeError
from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Candidate
from aicompress.methods.curvature import damped, inverse_factor, over, raw_gram, shifted
from aicompress.methods.prune.masks import sparsity
from aicompress.methods.prune.masks.already_sparse import resolve_stored
from aicompress.methods.prune.masks.candidates import UNSTRUCTURED, explicit, fitting, understood
from aicompress.methods.prune.masks.refit import refit
from aicompress.methods.prune.masks.sparsity import SparsityConfig, masked, present, store, store_codes
from aicompress.methods.zeros import codes_of, descended, mask_of
from aicompress.weights import Weight, outline_nbytes


class CalibratedConfig(SparsityConfig):
    """Parameters of methods that know the Gram matrix."""

    budgets: ClassVar[frozenset[str]] = frozenset({"sparsity", "target_bytes"})

    refit: bool = Field(True, description="give the survivors their least-squares values")
    damping: float = Field(0.01, gt=0, le=1, description="added to the Gram matrix, as a part of its mean diagonal")
    shift: float = Field(
        0.0, ge=0, le=1, description="how far the target moves to make up for what compressed layers before it changed"
    )
    allocation: Literal["uniform", "global", "owl", "auto"] = Field(
        "uniform",
        description="how layers share the sparsity: uniform; global: one threshold for all scores; owl: more stays in "
        "blocks with more outliers; auto: least measured loss",
    )
    pattern: str | None = Field(
        None, description="N:M, N kept of every M consecutive inputs, e.g. 2:4; search: the best of `candidates`"
    )
    candidates: tuple[str, ...] = Field(
        (), description="pattern: search: N:M, ROWSxCOLUMNS or unstructured; every layer gets one of them"
    )
    searched: float = Field(0.5, gt=0, lt=1, description="search: sparsity of the candidates that are no N:M")
    per: Literal["bytes", "latency"] = Field(
        "bytes", description="search: the least loss per saved byte, or per millisecond saved as this machine runs it"
    )
    target_bytes: ByteSize | None = Field(
        None,
        description="search: bytes of the weight files afterwards, in a level of its layers, at most, such as 20MB",
    )
    outlier: float = Field(5.0, gt=1, description="owl: a score beyond this many times its layer's mean is an outlier")
    spread: float = Field(0.08, gt=0, le=0.5, description="owl: how far a layer's sparsity may be from the average")

    @field_validator("pattern")
    @classmethod
    def _is_pattern(cls, pattern: str | None) -> str | None:
        return pattern if pattern == "search" else super()._is_pattern(pattern)

    @model_validator(mode="after")
    def _search_needs_candidates(self) -> CalibratedConfig:
        wrong = [candidate for candidate in self.candidates if not understood(candidate)]
        if wrong:
            raise ValueError(f"candidate {wrong[0]!r} is not N:M, ROWSxCOLUMNS or {UNSTRUCTURED}")
        if (self.pattern == "search") != bool(self.candidates):
            raise ValueError("pattern: search and candidates belong together")
        if self.target_bytes is not None and (self.pattern != "search" or self.per != "bytes"):
            raise ValueError("target_bytes needs pattern: search, by bytes")
        return self

    @model_validator(mode="after")
    def _allocation_needs_sparsity(self) -> CalibratedConfig:
        if self.allocation != type(self).model_fields["allocation"].default and self.open != self.allocation:
            raise ValueError(f"allocation: {self.allocation} needs sparsity")
        return self

    @model_validator(mode="after")
    def _outliers_need_owl(self) -> CalibratedConfig:
        fields = type(self).model_fields
        for name, value in (("outlier", self.outlier), ("spread", self.spread)):
            if value != fields[name].default and self.open != "owl":
                raise ValueError(f"{name}: {value:g} needs allocation: owl")
        return self

    @property
    def open(self) -> str:
        """What is still to be decided: a search or an allocation; uniform where every layer's survivors are given."""
        if self.pattern == "search":
            return "search"
        return self.allocation if self.sparsity is not None else "uniform"


K = TypeVar("K", bound=CalibratedConfig)


def check(info: LayerInfo, config: CalibratedConfig) -> tuple[str, str] | None:
    """As for every sparsity; and a layer that shares one with others has all of its weights."""
    if config.open != "uniform" and mask_of(info.outline) is not None:
        what = "pattern: search chooses" if config.open == "search" else f"allocation: {config.open} shares out"
        return (
            f"{info.name}: it is sparse already, and {what} weights that are there",
            "give an explicit pattern or sparsity, or exclude the layer",
        )
    if config.open == "search":
        if fitting(info, config, sparsity.check):
            return None
        return sparsity.check(info, explicit(config, config.candidates[0]))
    return sparsity.check(info, config)


def resolve(candidates: Sequence[Candidate[K]], other_bytes: int) -> list[K]:
    """As for every sparsity; a search has to be able to keep to its bytes.

    Raises:
        RecipeError: it cannot, or nothing would be left of a layer.
    """
    require_reachable(candidates, other_bytes)
    return resolve_stored(candidates, other_bytes)


def require_reachable(candidates: Sequence[Candidate[K]], other_bytes: int) -> None:
    """A search with target_bytes must be able to keep to them.

    Raises:
        RecipeError: the smallest candidates are too large, or layers share no one target.
    """
    open_ones = [each for each in candidates if each.config.open == "search" and each.config.target_bytes is not None]
    if not open_ones:
        return
    budgets = {size for each in open_ones if (size := each.config.target_bytes) is not None}
    if len(budgets) > 1 or len(open_ones) < len(candidates):
        raise RecipeError(
            "target_bytes is one number for all layers that are pruned",
            "leave it out of the rules; levels have budgets of their own",
        )
    (budget,) = budgets
    least = other_bytes + sum(min(nbytes(each.info, each.config)) for each in open_ones)
    if least > budget:
        hint = f"the smallest of the candidates give {least:,}; add sparser ones, or store: sparse"
        raise RecipeError(f"method.target_bytes: {budget:,} is out of reach", hint)


def nbytes(info: LayerInfo, config: CalibratedConfig) -> list[int]:
    """Bytes of a layer by the candidates of a search that it can have."""
    return [outline_nbytes(sparsity.outline(info, each)) for each in fitting(info, config, sparsity.check)]


def outline(info: LayerInfo, config: CalibratedConfig) -> Weight:
    """The stored weight without data; of a search that of the first candidate that fits."""
    return sparsity.outline(info, _first(info, config))


def describe(config: CalibratedConfig, weight: Weight) -> dict[str, Any]:
    """Knobs for the report row."""
    return {"pattern": "search"} if config.open == "search" else sparsity.describe(config, weight)


def _first(info: LayerInfo, config: CalibratedConfig) -> CalibratedConfig:
    return fitting(info, config, sparsity.check)[0] if config.open == "search" else config


def statistics(config: CalibratedConfig) -> frozenset[str]:
    """Statistics of the original model that an allocation or a search reads."""
    wanted = {"auto": {"gram", "gradients"}, "owl": {"gram"}, "global": {"gram"}, "search": {"gram", "gradients"}}
    return frozenset(wanted.get(config.open, ()))


def saliency(layer: Layer, config: CalibratedConfig) -> Tensor:
    """w² / [H⁻¹]_jj, (out, in): twice what the layer's output loses when the others make up for a weight.

    Hassibi and Stork 1992, equation 5.
    """
    factor, _ = inverse_factor(raw_gram(layer), config.damping)
    norms: Tensor = torch.linalg.vector_norm(factor, dim=0)  # sqrt([H⁻¹]_jj)
    return (layer.weight / norms).square().float()


@dataclass(frozen=True)
class SurvivorAim:
    """What survivors are fitted to.

    Attributes:
        target: W, (out, in) float32.
        hessian: H with its damping, (in, in) float32.
    """

    target: Tensor
    hessian: Tensor

    @classmethod
    def of(cls, layer: Layer, config: CalibratedConfig) -> SurvivorAim:
        """From a layer's weight and statistics."""
        hessian = damped(raw_gram(layer), config.damping)
        return cls(shifted(layer, config.shift, over(hessian)), hessian.float())


def finished(
    layer: Layer, mask: Tensor, config: CalibratedConfig, start: Tensor | None = None, aim: SurvivorAim | None = None
) -> Weight:
    """The stored weight for a mask.

    Args:
        layer: the layer.
        mask: (out, in) bool.
        config: whether to refit.
        start: the survivors' values, (out, in), where the method has moved them; None: the weight's own.
        aim: what survivors are fitted to, where the method knows it already.
    """
    if not config.refit and start is None:
        return masked(layer, mask, config)
    aim = SurvivorAim.of(layer, config) if aim is None else aim
    codes = codes_of(layer.stored)
    if codes is not None:
        return store_codes(layer, descended(aim.target, codes, mask & present(layer), aim.hessian), mask, config)
    values = layer.weight if start is None else start
    if config.refit:
        values = refit(aim.target, aim.hessian, mask & present(layer), values)
    return store(layer, values.to(layer.info.dtype), mask, config)
