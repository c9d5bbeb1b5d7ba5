"""Structural methods: several tensors and config.json, or the layers of any network, change together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from aicompress.layer import InputStats
from aicompress.methods.method import Method, MethodConfig


@dataclass(frozen=True)
class Part:
    """What one tensor gives to the units of a structure.

    Attributes:
        tensor: the parameter.
        module: the layer it belongs to, or the part of a fused one; a weight and its bias share it.
        role: a producer computes the units, a consumer reads them, an offset is added to what a consumer gives; a whole
            unit is none of these.
        first: the unit that the first row belongs to.
        read: float32 matrix (units, numbers): row j belongs to unit first + j; one row for an offset. Call it late and
            drop the result.
        span: entries of the tensor's axis that make a unit; a row holds them one after the other.
        take: the same rows of any tensor of this shape, such as scores of its entries; None where nothing asks.
    """

    tensor: str
    module: str
    role: Literal["producer", "consumer", "offset", "whole"]
    first: int
    read: Callable[[], Tensor]
    span: int = 1
    take: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Structure:
    """Units of one kind of which some can go: the neurons of one feed-forward layer, the blocks of one stack.

    Attributes:
        name: prefix of its tensors.
        size: number of units.
        parts: what each of its tensors gives to the units.
        groups: the units lie in as many runs of equal length, and as many stay of each.
        worth: heads that a unit stands for; of experts, how many a token goes to.
        inputs: statistics of the consumers' inputs by tensor, for methods that read them.
        importance: (units,) measured with calibration data, for methods that ask for it.
    """

    name: str
    size: int
    parts: tuple[Part, ...]
    groups: int = 1
    worth: int = 1
    inputs: Mapping[str, InputStats] = field(default_factory=dict)
    importance: Tensor | None = None

    def of(self, role: str) -> tuple[Part, ...]:
        """The parts of one role."""
        return tuple(part for part in self.parts if part.role == role)


class StructuralConfig(MethodConfig):
    """What the parameters of every structural method hold."""

    stack: str | None = Field(
        None,
        description="prefix of the stack of blocks to act on, such as model.layers; needed where there are several",
    )


@dataclass(frozen=True)
class StructuralMethod(Method):
    """A pure choice of the units that stay; the driver cuts tensors, renumbers and edits config.json.

    Attributes:
        units: what it chooses among: whole blocks, neurons of feed-forward layers, heads of attentions, coordinates of
            the hidden width, or experts of mixtures.
        sizes: (structures, config) -> how many units of each structure stay; decided before any weight is read.
            Raises RecipeError when the config is impossible for them.
        keep: (structure, how many, config) -> the units that stay, ascending. Deterministic.
        reads: config -> what it needs to know: statistics of the consumers' inputs, any of "gram", "norms", "mean_abs",
            "mean"; of whole blocks their "influence" or "gradients", of experts "reap" or "frequency".
        compares: config -> whether it also reads `cross`, the original model's inputs against the compressed one's.
        refits: config -> whether `refit` gives values.
        refit: (structure, units that stay, config) -> new float32 values by tensor, for consumers as `Part.read` gives
            them, the rows of the units that stay, and for offsets; nothing where the rest stays as it is.
    """

    units: Literal["blocks", "neurons", "heads", "hidden", "experts"] = field(kw_only=True)
    sizes: Callable[[Sequence[Structure], Any], list[int]] = field(kw_only=True)
    keep: Callable[[Structure, int, Any], list[int]] = field(kw_only=True)
    reads: Callable[[Any], frozenset[str]] = field(kw_only=True, default=lambda config: frozenset())
    compares: Callable[[Any], bool] = field(kw_only=True, default=lambda config: False)
    refits: Callable[[Any], bool] = field(kw_only=True, default=lambda config: False)
    refit: Callable[[Structure, Sequence[int], Any], Mapping[str, Tensor]] = field(
        kw_only=True, default=lambda structure, kept, config: {}
    )

    kind: ClassVar[str] = "structural"


@dataclass(frozen=True)
class Channels:
    """Units that are removed together from every layer that computes or reads them.

    Attributes:
        structure: name, number of units, and what the tensors of the layers give to each.
        cohorts: a label for each unit, from 0; as many must stay of every cohort.
        saliency: what real inputs say of each unit, (units,), where the method asks for it.
    """

    structure: Structure
    cohorts: tuple[int, ...]
    saliency: Tensor | None = None


@dataclass(frozen=True)
class ChannelMethod(Method):
    """A pure choice of the channels that stay.

    Attributes:
        evidence: config -> what it reads of real inputs: "activation", "taylor", or None.
        choose: (groups, config, fits) -> the units of each group that stay, ascending. `fits` tells whether the
            network with such a choice is within the config's target. Deterministic.
    """

    evidence: Callable[[Any], Literal["activation", "taylor"] | None] = field(kw_only=True)
    choose: Callable[[Sequence[Channels], Any, Callable[[list[list[int]]], bool]], list[list[int]]] = field(
        kw_only=True
    )

    kind: ClassVar[str] = "channels"
