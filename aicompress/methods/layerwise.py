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
        check: (layer info, config) -> why this layer cannot be compressed so, as (message, hint); None if it can.
        describe: (config, the stored weight or its outline) -> the parameters that a row of the report shows; the key
            "note" holds a sentence that explains the result where it is not obvious.
        reading: says which statistics a config reads; None: all of `needs`, whatever the config.
        suits: (layer info) -> whether the method is made for this layer. Other layers stay as they are, which the plan
            says; the step is refused where no layer suits.
        made_for: what such layers are, in a few words.
        rounded: (layer, config, compressed weight, its bytes with its part of what layers share) -> the error that
            rounding the layer to integer codes in no more bytes would have; None where that is impossible, or is what
            the method does.
        stacks: `apply` treats matrices that lie one below the other, such as experts in one tensor, as each alone.
        batched, prepares, two_sided, couples, shares, row_wise, rescales, rotates, allocates, surveys, widths:
            capabilities; None where the method lacks one.
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
        """A function that compresses layers one after the other, all of which have the same inputs as this one."""
        return (lambda each: self.apply(each, config)) if self.prepares is None else self.prepares.onto(layer, config)

    def reads(self, config: C) -> frozenset[str]:
        """Statistics that a layer's compression reads under a config."""
        decides = None if self.reading is None else self.reading.statistics
        return self.needs if decides is None else decides(config)

    def takes(self, kind: Kind, config: C) -> bool:
        """Whether `apply` takes a layer of this kind as one matrix; experts in a tensor only if no inputs are read."""
        if kind != "experts":
            return True
        searches = self.widths is not None and self.widths.search(config) is not None
        return self.stacks and not self.reads(config) and not self.undecided(config) and not searches

    def takes_each(self, config: C) -> bool:
        """Whether the experts in one tensor can be compressed one by one.

        They cannot where layers are compressed together, or where the running model decides on several at once.
        """
        searches = self.widths is not None and self.widths.search(config) is not None
        return not self.links and not searches and not self.undecided(config) and not self.reads(config) & OF_TRAINING

    def surveyed(self, config: C) -> frozenset[str]:
        """Statistics of the original model that a survey reads before any layer is compressed; none without one."""
        return frozenset() if self.surveys is None else self.surveys.statistics(config)

    def tries(self, config: C) -> bool:
        """Whether explicit configs are tried on the running model before any layer is compressed."""
        return self.surveys is not None and self.surveys.tries(config)

    def undecided(self, config: C) -> bool:
        """Whether a survey decides how much of a layer stays."""
        return bool(self.surveyed(config)) or self.tries(config)

    def shift(self, config: C) -> float:
        """How far the target moves from the original layer's output towards the original model's, from 0 to 1."""
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
        """Whether a layer gets new codes, so that zeros which an earlier step left in it need to be kept."""
        return self.command == "quantize"

    @property
    def tunable(self) -> bool:
        """Whether block tuning can move what the method stores: codes, or the factors of one layer."""
        return self.command in ("quantize", "factorize") and self.shares is None

    @property
    def leaves(self) -> bool:
        """Whether selected layers stay as they are when there is no other layer to compress them with."""
        return self.couples is not None or (self.shares is not None and not self.shares.alone)

    def planned(self, info: LayerInfo, config: C) -> Weight:
        """The outline that is stored: for a sparse layer the codes of its survivors alone, where that is smaller."""
        outline = self.outline(info, config)
        return outline_of(info, outline) if self.recodes else outline

    def stored(self, layer: Layer, weight: Weight, outline: Weight | None = None) -> Weight:
        """The weight that is stored: where the layer was sparse, its zeros are exactly zero again.

        Args:
            layer: as it was read.
            weight: what `apply` gave.
            outline: what was planned for the layer, or for all of it where this one is a block of its rows.
        """
        return kept_zero(layer, weight, outline) if self.recodes else weight


AnyLayerMethod: TypeAlias = LayerMethod[Any]  # found by name: the class of its parameters is known to it alone

STACKED = 1 << 23  # weights of layers with the same inputs that are worked on at once


def stacks(layers: Sequence[Layer], most: int = STACKED) -> list[list[Layer]]:
    """Neighbouring layers of one dtype in stacks of at most so many weights; the order stays."""
    stacked: list[list[Layer]] = []
    for layer in layers:
        last = stacked[-1] if stacked else []
        alike = all(other.info.dtype == layer.info.dtype for other in last)
        if last and alike and sum(other.weight.numel() for other in (*last, layer)) <= most:
            last.append(layer)
        else:
            stacked.append([layer])
    return stacked
