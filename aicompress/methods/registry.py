"""What a method is, and how it is found: every module under methods/<command>/ that has a METHOD.

Four kinds of method, by what they are given:
    layer-wise   one layer in, one stored weight out (`LayerMethod`)
    structural   several tensors and config.json change together (`StructuralMethod`)
    channels     layers of any network lose channels together (`ChannelMethod`)
    training     a loss between a teacher's and a student's outputs (`DistillMethod`)
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from aicompress.errors import RecipeError, suggestion
from aicompress.layer import InputStats, Layer, LayerInfo
from aicompress.methods.effort import Effort, Level
from aicompress.methods.outputs import Anatomy, Output, Outputs
from aicompress.weights import Weight

COMMANDS = ("factorize", "quantize", "prune", "distill")


class MethodConfig(BaseModel):
    """Parameters of a method, as the recipe's `method:` section gives them. Frozen; unknown keys are errors.

    A subclass gives representative parameters as `json_schema_extra={"examples": [...]}` of its own model_config: they
    are part of the JSON schema, and the tests that every method must pass run on them.

    Attributes:
        one_of: fields that say the same thing in different ways: exactly one of them is given. A rule that gives one
            replaces the method's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    one_of: ClassVar[tuple[str, ...]] = ()

    name: str

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [field for field in self.one_of if getattr(self, field) is not None]
        if self.one_of and len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(self.one_of)}")
        return self

    @classmethod
    def beneath(cls, given: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
        """What a rule's fields leave of the method's: a preset replaces all, one of `one_of` the others.

        Args:
            given: fields of the recipe's method.
            fields: fields of the rule.
        """
        kept = {"name": given["name"]} if "preset" in fields else given
        if any(field in fields for field in cls.one_of):
            kept = {key: value for key, value in kept.items() if key not in cls.one_of}
        return kept


@dataclass(frozen=True)
class Method:
    """What all methods share.

    Attributes:
        name: as the recipe says it.
        command: factorize, quantize, prune or distill.
        summary: one line.
        config: the class of its parameters.
        needs: statistics it reads: of calibration any of "norms", "gram", "mean_abs", "max_abs", "gradients", of
            training "movement"; empty for data-free methods.
    """

    name: str
    command: str
    summary: str
    config: type[MethodConfig]
    needs: frozenset[str] = field(default_factory=frozenset)


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


class LossConfig(MethodConfig):
    """Parameters of a loss of distillation."""

    weight: float = Field(1.0, gt=0, description="factor of this loss in the sum of all losses")


@dataclass(frozen=True)
class DistillMethod(Method):
    """A loss between what a student and its teacher give for the same batch.

    Attributes:
        loss: (student, teacher, config) -> scalar, differentiable in the student's outputs.
        reads: the outputs that it needs of both.
        check: (student, teacher, config) -> what makes the loss impossible for these two, as (message, hint), or None.
    """

    loss: Callable[[Outputs, Outputs, Any], Tensor] = field(kw_only=True)
    reads: frozenset[Output] = field(kw_only=True)
    check: Callable[[Anatomy, Anatomy, Any], tuple[str, str] | None] = field(kw_only=True)

    kind: ClassVar[str] = "training"


@cache
def methods(command: str) -> Mapping[str, Method]:
    """All methods of a command by name. A method file that does not import raises: nothing is skipped silently."""
    package = importlib.import_module(f"aicompress.methods.{command}")
    found: dict[str, Method] = {}
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        method = getattr(importlib.import_module(f"{package.__name__}.{module.name}"), "METHOD", None)
        if method is None:
            continue  # shared math of several methods
        if method.name in found:
            raise TypeError(f"two {command} methods are named {method.name!r}")
        found[method.name] = method
    return found


def get(command: str, name: str) -> Method:
    """Look up a method.

    Raises:
        RecipeError: no such method for this command.
    """
    known = methods(command)
    if name not in known:
        elsewhere = [other for other in COMMANDS if other != command and name in methods(other)]
        hint = f"it belongs to `aicompress {elsewhere[0]}`" if elsewhere else suggestion(name, list(known))
        raise RecipeError(f"{command} has no method {name!r}", hint)
    return known[name]


def floating(dtype: torch.dtype) -> bool:
    """Whether a parameter of this dtype can be compressed."""
    return dtype.is_floating_point
