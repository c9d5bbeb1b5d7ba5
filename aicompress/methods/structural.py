"""Structural methods: several tensors and config.json change together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

from pydantic import Field
from torch import Tensor

from aicompress.measure import power_sums
from aicompress.methods.capabilities import Reads
from aicompress.methods.method import Method, MethodConfig
from aicompress.statistics import InputStats


@dataclass(frozen=True)
class Unit:
    """A kind of structural unit: one subclass for each kind, whose fields say how a method wants the units grouped.

    A method names the kind by its class; `pipeline/structured/units/` has the file that finds and cuts such units.

    Attributes:
        plural: what the units are called in reports and messages.
    """

    plural: ClassVar[str] = "units"


@dataclass(frozen=True)
class Part:
    """The numbers of one tensor that belong to the units of a structure.

    Attributes:
        tensor: the parameter.
        module: the layer it belongs to, or the part of a fused one; a weight and its bias share it.
        role: a producer computes the units, a consumer reads them, an offset is added to a consumer's output; a part of
            a whole unit, such as a tensor of a block, is none of these.
        first: the unit that the first row belongs to.
        read: () -> float32 matrix (units, numbers), whose row j belongs to unit first + j; of an offset one row. Call
            it late and drop the result.
        span: how many entries of the tensor's axis make a unit; a row holds them one after the other.
        take: (tensor of this shape, such as scores of its entries) -> the same rows of it; None where nothing asks.
        sums: (order) -> Σ |x|^order of each row, (units,) float64, without holding the rows; None: `read` gives them.
        single: whether each unit has a single number, such as the weight of a norm.
    """

    tensor: str
    module: str
    role: Literal["producer", "consumer", "offset", "whole"]
    first: int
    read: Callable[[], Tensor]
    span: int = 1
    take: Callable[[Tensor], Tensor] | None = None
    sums: Callable[[int], Tensor] | None = None
    single: bool = False

    def power_sums(self, order: int = 2) -> Tensor:
        """Σ |x|^order of each row, (units,) float64."""
        return power_sums(self.read(), order) if self.sums is None else self.sums(order)


@dataclass(frozen=True)
class Structure:
    """Units of one kind of which some can go: the neurons of one feed-forward layer, the blocks of one stack.

    Attributes:
        name: prefix of its tensors.
        size: number of units.
        parts: the numbers of each unit in each of its tensors.
        groups: the units lie in this many runs of equal length, and equally many of each run stay.
        worth: of heads, how many query heads a unit stands for; of experts, how many a token is routed to.
        inputs: statistics of the consumers' inputs by tensor, for methods that read them.
        importance: (units,) measured with calibration data, for methods that read it.
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


C = TypeVar("C", bound=StructuralConfig)


@dataclass(frozen=True)
class Refits(Generic[C]):
    """Tensors that read the units get new values, which make up for the units that go.

    Attributes:
        applies: config -> whether it refits.
        values: (structure, units that stay, config) -> new float32 values by tensor: of consumers the rows of the units
            that stay, laid out as `Part.read` gives them, and of offsets their one row. A tensor that is not named
            keeps its values.
    """

    applies: Callable[[C], bool]
    values: Callable[[Structure, Sequence[int], C], Mapping[str, Tensor]]


@dataclass(frozen=True)
class AllocatesSizes(Generic[C]):
    """Structures keep different numbers of units: those of least total loss, with as many parameters as equal numbers.

    Attributes:
        applies: config -> whether sizes are allocated.
        statistics: config -> what the losses read of the original model: statistics of the consumers' inputs, or
            "gradients", which give importance; nothing for losses by weights.
        candidates: (units, config) -> numbers of units that are tried, from all of them down.
        losses: (structure, numbers of units, config) -> the loss at each number, comparable between structures.
    """

    applies: Callable[[C], bool]
    statistics: Callable[[C], frozenset[str]]
    candidates: Callable[[int, C], list[int]]
    losses: Callable[[Structure, Sequence[int], C], list[float]]


@dataclass(frozen=True)
class StructuralMethod(Method, Generic[C]):
    """A method that chooses the units which stay, as a pure function, and its capabilities.

    The driver cuts tensors, renumbers and edits config.json.

    Attributes:
        config: the class of its parameters.
        unit: config -> the units that it chooses among.
        sizes: (structures, config) -> how many units of each structure stay, decided before any weight is read. Raises
            RecipeError where the config is impossible for them.
        keep: (structure, how many, config) -> the units that stay, ascending. Deterministic.
        reading: says what a config reads: statistics of the consumers' inputs, any of "gram", "norms", "mean_abs" and
            "mean", or a measurement that the unit makes: "gradients", "influence" of blocks, "reap" or "frequency" of
            experts.
        refits, allocates: capabilities; None where the method lacks one.
        counts_tokens: whether it chooses by the tokens of the recipe's texts, which takes no run of the model.
    """

    config: type[C]
    unit: Callable[[C], Unit] = field(kw_only=True)
    sizes: Callable[[Sequence[Structure], C], list[int]] = field(kw_only=True)
    keep: Callable[[Structure, int, C], list[int]] = field(kw_only=True)
    reading: Reads[C] | None = field(kw_only=True, default=None)
    refits: Refits[C] | None = field(kw_only=True, default=None)
    allocates: AllocatesSizes[C] | None = field(kw_only=True, default=None)
    counts_tokens: bool = field(kw_only=True, default=False)

    kind: ClassVar[str] = "structural"

    def reads(self, config: C) -> frozenset[str]:
        """What a config reads of calibration data."""
        decides = None if self.reading is None else self.reading.statistics
        return self.needs if decides is None else decides(config)

    def compares(self, config: C) -> bool:
        """Whether a config reads the original model's inputs against the compressed one's."""
        return self.reading is not None and self.reading.shift(config) > 0

    def with_config(self, config: MethodConfig) -> Pruner[C]:
        """The method with its parameters.

        Raises:
            TypeError: they are another method's.
        """
        if not isinstance(config, self.config):
            raise TypeError(f"{self.name} does not take {type(config).__name__}")
        return Pruner(self, config)


@dataclass(frozen=True)
class Pruner(Generic[C]):
    """A structural method with its parameters."""

    method: StructuralMethod[C]
    config: C

    @property
    def unit(self) -> Unit:
        """The units that it chooses among."""
        return self.method.unit(self.config)

    @property
    def reads(self) -> frozenset[str]:
        """What it reads of calibration data."""
        return self.method.reads(self.config)

    @property
    def compares(self) -> bool:
        """Whether it reads the original model's inputs against the compressed one's."""
        return self.method.compares(self.config)

    @property
    def refits(self) -> bool:
        """Whether consumers get new values."""
        return self.method.refits is not None and self.method.refits.applies(self.config)

    def sizes(self, structures: Sequence[Structure]) -> list[int]:
        """How many units of each structure stay.

        Raises:
            RecipeError: the parameters are impossible for them.
        """
        return self.method.sizes(structures, self.config)

    def keep(self, structure: Structure, size: int) -> list[int]:
        """The units that stay, ascending."""
        return self.method.keep(structure, size, self.config)

    def refit(self, structure: Structure, kept: Sequence[int]) -> Mapping[str, Tensor]:
        """New values by tensor; nothing where it does not refit."""
        return {} if self.method.refits is None else self.method.refits.values(structure, kept, self.config)

    @property
    def losses(self) -> Losses | None:
        """What decides on unlike numbers of units; None where structures keep equal numbers, or equal shares."""
        allocates = self.method.allocates
        if allocates is None or not allocates.applies(self.config):
            return None
        return Losses(
            allocates.statistics(self.config),
            lambda units: allocates.candidates(units, self.config),
            lambda structure, sizes: allocates.losses(structure, sizes, self.config),
        )


@dataclass(frozen=True)
class Losses:
    """What structures lose with fewer units, for one method with its parameters; see `AllocatesSizes`.

    Attributes:
        statistics: what the losses read of the original model.
        candidates: (units) -> numbers of units that are tried, from all of them down.
        of: (structure, numbers of units) -> what is lost when so many stay.
    """

    statistics: frozenset[str]
    candidates: Callable[[int], list[int]]
    of: Callable[[Structure, Sequence[int]], list[float]]


AnyPruner: TypeAlias = Pruner[Any]  # found by name: the class of its parameters is known to it alone
AnyStructuralMethod: TypeAlias = StructuralMethod[Any]
