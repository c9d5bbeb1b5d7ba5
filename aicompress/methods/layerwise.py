"""Layer-wise methods: one layer in, one stored weight out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.effort import Effort, Level
from aicompress.methods.method import Method
from aicompress.weights import Weight

STACKED = 1 << 23  # weights of layers with the same inputs that are worked on at once


def stacks(layers: Sequence[Layer], most: int = STACKED) -> list[list[Layer]]:
    """Layers in order, those beside each other together while they are small and stored in one dtype."""
    found: list[list[Layer]] = []
    for layer in layers:
        last = found[-1] if found else []
        alike = all(other.info.dtype == layer.info.dtype for other in last)
        if last and alike and sum(other.weight.numel() for other in (*last, layer)) <= most:
            last.append(layer)
        else:
            found.append([layer])
    return found


@dataclass(frozen=True)
class Candidate:
    """A selected layer with the config its rules gave it, for decisions that look at many layers.

    Attributes:
        info: the layer.
        config: its config.
        read: reads the layer; call it late and drop the result.
        unit: names the layers that share its input, which are one layer to some readers; None: it is alone.
    """

    info: LayerInfo
    config: Any
    read: Callable[[], Layer]
    unit: Callable[[], str] | None = None


class Rotation(Protocol):
    """An orthogonal matrix R."""

    def along(self, tensor: Tensor, axis: int) -> Tensor:
        """The tensor with R applied along an axis."""


@dataclass(frozen=True)
class Balance:
    """Factors for one input that several layers read.

    Attributes:
        factors: s, (in,) above zero: the input is divided by them, the layers' columns are multiplied.
        note: how they were chosen, for the report.
    """

    factors: Tensor
    note: str


@dataclass(frozen=True)
class Measured:
    """A compressed weight and what its relative error is made of.

    Attributes:
        weight: Ŵ.
        error: ‖W − Ŵ‖².
        norm: ‖W‖².
    """

    weight: Weight
    error: float
    norm: float


@dataclass(frozen=True)
class LayerMethod(Method):
    """A pure function from one layer to one stored weight.

    Attributes:
        apply: (layer, config) -> the compressed weight. Deterministic; must not modify the layer.
        outline: (layer info, config) -> the same weight without data: exactly the dtypes and shapes that `apply` gives.
        check: (layer info, config) -> what makes the config impossible for this layer, as (message, hint), or None.
        settle: turns knobs that depend on the data or on other layers (energy, global sparsity, a byte budget) into
            explicit per-layer ones; None when every knob is explicit already. (candidates, bytes of everything else in
            the output) -> one config per candidate.
        describe: the few knobs a report row shows, from the config and the stored weight or its outline; under the key
            "note" a sentence that says why the layer came out as it did, where that is not obvious.
        together: (layers, config) -> what `apply` gives for each of several layers with the same inputs; None where
            nothing is to be gained by it.
        by_rows: config -> whether each row is compressed on its own, with no random numbers: then a block of rows gives
            the same as it would in the whole, and large layers are read, compressed and written in blocks.
        measured: (rows of a weight as they are stored, layer info, config) -> what `apply` gives for them and
            its error, sooner, for methods that work by rows; None where that takes `apply`.
        compares: config -> whether it also reads `cross`, the original model's inputs against the compressed one's.
        balance: for methods that rescale a model before they compress it: (the layers that read one input, a function
            that makes those factors equal which must be) -> factors, or None to leave this input as it is. `apply` then
            sees the rescaled weight and statistics of the rescaled input.
        rotation: for methods that rotate a model's residual stream before they compress it: (its width, whether the
            vector of ones must stay, seed) -> the rotation. `apply` then sees the rotated model.
        spares: config -> which of `needs` it does without.
        efforts: presets by name; empty for a method with one way to go.
        surveys: config -> statistics of the original model's layers that are read before any is compressed, to decide
            how much each of them gets.
        scores: (layer, config) -> (out, in), non-negative: how much each weight matters, comparable between layers.
    """

    apply: Callable[[Layer, Any], Weight] = field(kw_only=True)
    outline: Callable[[LayerInfo, Any], Weight] = field(kw_only=True)
    check: Callable[[LayerInfo, Any], tuple[str, str] | None] = field(kw_only=True, default=lambda info, config: None)
    settle: Callable[[Sequence[Candidate], int], list[Any]] | None = field(kw_only=True, default=None)
    describe: Callable[[Any, Weight], dict[str, Any]] = field(kw_only=True, default=lambda config, weight: {})
    together: Callable[[Sequence[Layer], Any], list[Weight]] | None = field(kw_only=True, default=None)
    by_rows: Callable[[Any], bool] = field(kw_only=True, default=lambda config: False)
    measured: Callable[[Tensor, LayerInfo, Any], Measured | None] | None = field(kw_only=True, default=None)
    compares: Callable[[Any], bool] = field(kw_only=True, default=lambda config: False)
    balance: Callable[[Sequence[Candidate], Callable[[Tensor], Tensor]], Balance | None] | None = field(
        kw_only=True, default=None
    )
    rotation: Callable[[int, bool, int], Rotation] | None = field(kw_only=True, default=None)
    spares: Callable[[Any], frozenset[str]] = field(kw_only=True, default=lambda config: frozenset())
    efforts: Mapping[Level, Effort] = field(kw_only=True, default_factory=dict)
    surveys: Callable[[Any], frozenset[str]] = field(kw_only=True, default=lambda config: frozenset())
    scores: Callable[[Layer, Any], Tensor] | None = field(kw_only=True, default=None)

    kind: ClassVar[str] = "layerwise"

    def reads(self, config: Any) -> frozenset[str]:
        """Statistics that a config needs."""
        return self.needs - self.spares(config)

    @property
    def rewrites(self) -> bool:
        """Whether the model is rewritten before its layers are compressed."""
        return self.balance is not None or self.rotation is not None
