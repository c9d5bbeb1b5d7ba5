"""Layer-wise methods: one layer in, one stored weight out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

from aicompress.layer import Kind, Layer, LayerInfo
from aicompress.methods.capabilities import (
    Batched,
    Couples,
    Prepares,
    Reads,
    Rescales,
    Rotates,
    Rounded,
    RowWise,
    TwoSided,
)
from aicompress.methods.decisions import Allocates, Surveys, Widths
from aicompress.methods.method import OF_TRAINING, Method, MethodConfig
from aicompress.methods.shares import Shares
from aicompress.methods.zeros import kept_zero, outline_of
from aicompress.weights import Weight

C = TypeVar("C", bound=MethodConfig)


@dataclass(frozen=True)
class LayerMethod(Method, Generic[C]):
    """A pure function from one layer to one stored weight, and what the method can do beside it.

    Attributes:
        config: the class of its parameters.
        apply: (layer, config) -> the compressed weight. Deterministic; must not modify the layer.
        outline: (layer info, config) -> the same weight without data: exactly the dtypes and shapes that `apply` gives.
        check: (layer info, config) -> what makes the config impossible for this layer, as (message, hint), or None.
        describe: the few knobs a report row shows, from the config and the stored weight or its outline; under the key
            "note" a sentence that says why the layer came out as it did, where that is not obvious.
        reading: the parameters decide which statistics are read; None: all of `needs`, whatever they are.
        suits: (layer info) -> whether it is a layer that the method is made for; others stay as they are, and the plan
            says so; the step is refused where none is.
        made_for: what such layers are, in a few words.
        rounded: (layer, config, compressed weight, its bytes and its part of those that layers share) -> what rounding
            the layer in no more bytes would lose; None where that cannot be, or is what the method does.
        stacks: matrices one below the other, as experts lie in one tensor, come out as each by itself.
        batched, prepares, two_sided, couples, shares, row_wise, rescales, rotates, allocates, surveys, widths:
            capabilities; None where it lacks one.
    """

    config: type[C]
    apply: Callable[[Layer, C], Weight] = field(kw_only=True)
    outline: Callable[[LayerInfo, C], Weight] = field(kw_only=True)
    check: Callable[[LayerInfo, C], tuple[str, str] | None] = field(kw_only=True, default=lambda info, config: None)
    describe: Callable[[C, Weight], dict[str, Any]] = field(kw_only=True, default=lambda config, weight: {})
    rounded: Callable[[Layer, C, Weight, int], Rounded | None] = field(
        kw_only=True, default=lambda layer, config, weight, nbytes: None
    )
    reading: Reads[C] | None = field(kw_only=True, default=None)
    batched: Batched[C] | None = field(kw_only=True, default=None)
    prepares: Prepares[C] | None = field(kw_only=True, default=None)
    two_sided: TwoSided[C] | None = field(kw_only=True, default=None)
    couples: Couples[C] | None = field(kw_only=True, default=None)
    shares: Shares[C] | None = field(kw_only=True, default=None)
    row_wise: RowWise[C] | None = field(kw_only=True, default=None)
    rescales: Rescales[C] | None = field(kw_only=True, default=None)
    rotates: Rotates[C] | None = field(kw_only=True, default=None)
    allocates: Allocates[C] | None = field(kw_only=True, default=None)
    surveys: Surveys[C] | None = field(kw_only=True, default=None)
    widths: Widths[C] | None = field(kw_only=True, default=None)
    suits: Callable[[LayerInfo], bool] = field(kw_only=True, default=lambda info: True)
    made_for: str = field(kw_only=True, default="layers")
    stacks: bool = field(kw_only=True, default=False)

    kind: ClassVar[str] = "layerwise"

    def prepared(self, layer: Layer, config: C) -> Callable[[Layer], Weight]:
        """A function that compresses layers with the inputs of one, in turn."""
        return (lambda each: self.apply(each, config)) if self.prepares is None else self.prepares.onto(layer, config)

    def reads(self, config: C) -> frozenset[str]:
        """Statistics that a layer's compression reads under a config."""
        decides = None if self.reading is None else self.reading.statistics
        return self.needs if decides is None else decides(config)

    def takes(self, kind: Kind, config: C) -> bool:
        """Whether a config can compress a layer of some kind as it is; experts in one tensor if they need no inputs."""
        if kind != "experts":
            return True
        searches = self.widths is not None and self.widths.search(config) is not None
        return self.stacks and not self.reads(config) and not self.undecided(config) and not searches

    def takes_each(self, config: C) -> bool:
        """Whether a config can compress the matrices of experts in one tensor one by one.

        Not where layers are compressed together, or are decided on together by what the running model shows.
        """
        searches = self.widths is not None and self.widths.search(config) is not None
        return not self.links and not searches and not self.undecided(config) and not self.reads(config) & OF_TRAINING

    def surveyed(self, config: C) -> frozenset[str]:
        """Statistics of the original model that are read before any layer is compressed; none without a survey."""
        return frozenset() if self.surveys is None else self.surveys.statistics(config)

    def tries(self, config: C) -> bool:
        """Whether the running model decides, on which explicit configs are tried before any layer is compressed."""
        return self.surveys is not None and self.surveys.tries(config)

    def undecided(self, config: C) -> bool:
        """Whether a survey decides how much of a layer stays."""
        return bool(self.surveyed(config)) or self.tries(config)

    def shift(self, config: C) -> float:
        """How far the target moves to make up for what compressed layers before it changed."""
        return 0.0 if self.reading is None else self.reading.shift(config)

    def compares(self, config: C) -> bool:
        """Whether a config reads the original model's inputs against the compressed one's."""
        return self.shift(config) > 0

    @property
    def rewrites(self) -> bool:
        """Whether the model is rewritten before its layers are compressed."""
        return self.rescales is not None or self.rotates is not None

    @property
    def links(self) -> bool:
        """Whether layers are compressed together: they share something, or their products count."""
        return self.couples is not None or self.shares is not None

    @property
    def recodes(self) -> bool:
        """Whether a layer gets new codes: zeros that an earlier step left in it have to be kept apart from them."""
        return self.command == "quantize"

    @property
    def tunable(self) -> bool:
        """Whether what it stores can move on towards what a block gave before: codes, or factors of one layer."""
        return self.command in ("quantize", "factorize") and self.shares is None

    @property
    def leaves(self) -> bool:
        """Whether it leaves selected layers as they are that no other one goes with."""
        return self.couples is not None or (self.shares is not None and not self.shares.alone)

    def planned(self, info: LayerInfo, config: C) -> Weight:
        """Outline of a layer as it is stored: of one that is sparse, the survivors alone where that is smaller."""
        outline = self.outline(info, config)
        return outline_of(info, outline) if self.recodes else outline

    def stored(self, layer: Layer, weight: Weight) -> Weight:
        """A compressed weight as it is stored: zeros of a layer that is sparse stay exactly zero."""
        return kept_zero(layer, weight) if self.recodes else weight


AnyLayerMethod: TypeAlias = LayerMethod[Any]  # found by name: the class of its parameters is known to it alone

STACKED = 1 << 23  # weights of layers with the same inputs that are worked on at once


def stacks(layers: Sequence[Layer], most: int = STACKED) -> list[list[Layer]]:
    """Layers in order, those beside each other in one stack while they are small and stored in one dtype."""
    stacked: list[list[Layer]] = []
    for layer in layers:
        last = stacked[-1] if stacked else []
        alike = all(other.info.dtype == layer.info.dtype for other in last)
        if last and alike and sum(other.weight.numel() for other in (*last, layer)) <= most:
            last.append(layer)
        else:
            stacked.append([layer])
    return stacked
