"""Widths that nobody tunes by hand: `bits: auto` and `bits: range`, shared by every method with integer codes.

`range` looks at the weights alone: each layer gets the least width whose rounding error, at the recipe's group size,
stays within `max_error`. `auto` is a search over the running model under one target for all layers; it is made outside
the methods (in the pipeline), which are given explicit widths in any case. Its widths have a second axis, how many
columns share a scale: between two numbers of bits lie smaller and larger groups, so that a layer that needs little
more than 2 bits is not given 3, and what a robust layer spends on scales goes where it saves more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

import torch
from pydantic import ByteSize, Field, field_validator, model_validator
from torch import Tensor

from aicompress.errors import CompressError, RecipeError, raise_all
from aicompress.layer import Layer
from aicompress.methods.capabilities import Candidate
from aicompress.methods.decisions import Width, Widths, WidthSearch
from aicompress.methods.method import MethodConfig
from aicompress.methods.quantize.grid.fitting import with_fitting_groups
from aicompress.methods.quantize.grid.rounding import decode, encode, grouped, pieces
from aicompress.methods.quantize.grid.scales import Grid, full_range, full_range_of_matrix
from aicompress.methods.quantize.grid.totals import Blocks
from aicompress.weights import Weight

WIDTHS = (2, 3, 4, 8)
GROUPS = (32, 64, 128)  # of `bits: auto` where none are given: sizes that fast kernels know, vLLM's Marlin among them
MAX_ERROR = 0.12  # of `bits: range`: what 4 bits keep of Gaussian weights in groups of up to 128
TARGETS = ("target_bytes", "target_bpw", "max_kl")
NARROWED = ("choices", "group_sizes")  # what layers may differ in under one search
OPEN = (*TARGETS, *NARROWED, "max_error", "sensitivity", "samples", "evaluations")  # mean nothing for explicit bits

if TYPE_CHECKING:
    Bits = int  # what a method is given; `auto` and `range` are resolved before
else:
    Bits = Literal[2, 3, 4, 8, "auto", "range"]


class CodeWidthConfig(MethodConfig):
    """Knobs of a width, given or found."""

    budgets: ClassVar[frozenset[str]] = frozenset({"target_bytes", "target_bpw"})

    bits: Bits = Field(
        4, description="bits of a code; auto: searched on the running model; range: from each layer's values"
    )
    choices: tuple[Literal[2, 3, 4, 8], ...] | None = Field(
        None, description="widths that auto and range choose among; all of 2, 3, 4 and 8 where not given"
    )
    group_sizes: tuple[int, ...] | None = Field(
        None,
        description="auto: columns that share a scale, to choose among where they divide a layer's; 32, 64, 128 and "
        "group_size where not given; each is measured at each width, so that time goes with their number",
    )
    target_bytes: ByteSize | None = Field(
        None, gt=0, description="auto: weight bytes of the whole output, in a level of its layers, never exceeded"
    )
    target_bpw: float | None = Field(
        None, gt=0, description="auto: bits per weight of the layers it chooses for, scales and zero points included"
    )
    max_kl: float | None = Field(
        None, gt=0, description="auto: least bytes with this divergence of the outputs in nats, on calibration data"
    )
    sensitivity: Literal["output", "block"] | None = Field(
        None,
        description="auto: measure each width by the model's output, or its block's; by the work where not given",
    )
    samples: int | None = Field(
        None, ge=1, description="auto: calibration samples it measures on; 1024 tokens where not given"
    )
    evaluations: int | None = Field(
        None, ge=0, description="auto: runs of the model that refine the choice; 16 where not given"
    )
    max_error: float | None = Field(
        None, gt=0, lt=1, description="range: ‖W − Ŵ‖ / ‖W‖ that no layer exceeds; 0.12 where not given"
    )

    @field_validator("choices")
    @classmethod
    def _ascending(cls, given: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if given is not None and not given:
            raise ValueError("give at least one width")
        return None if given is None else tuple(sorted(set(given)))

    @field_validator("group_sizes")
    @classmethod
    def _sizes(cls, given: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if given is not None and (not given or min(given) < 1):
            raise ValueError("give at least one size, of at least one column")
        return None if given is None else tuple(sorted(set(given)))

    @model_validator(mode="after")
    def _of_these_bits(self) -> Self:
        given = [field for field in OPEN if getattr(self, field) is not None]
        targets = [field for field in TARGETS if field in given]
        if open_bits(self) == "auto":
            if len(targets) != 1:
                raise ValueError(f"bits: auto needs exactly one of {', '.join(TARGETS)}")
            fitting: tuple[str, ...] = tuple(field for field in OPEN if field != "max_error")
        else:
            fitting = ("choices", "max_error") if open_bits(self) == "range" else ()
        if foreign := [field for field in given if field not in fitting]:
            raise ValueError(f"{', '.join(foreign)} has no meaning beside bits: {self.bits}")
        shared = getattr(self, "granularity", "group")
        if self.group_sizes and shared != "group":
            raise ValueError(f"group_sizes has no meaning beside granularity: {shared}")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths to choose among, ascending."""
        return self.choices or WIDTHS

    def fitted(self, columns: int) -> Self:
        """Groups that divide a layer's columns, where the recipe gives no size."""
        return with_fitting_groups(self, columns, "group_size" in self.model_fields_set or self.group_sizes is not None)

    @classmethod
    def beneath(cls, given: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
        """Explicit bits of a rule pin its layers, and its target is the only one: the method's does not touch them."""
        kept = super().beneath(given, fields)
        if any(target in fields for target in TARGETS):
            kept = {name: value for name, value in kept.items() if name not in TARGETS}
        if "bits" not in fields or fields["bits"] == given.get("bits"):
            return kept
        return {name: value for name, value in kept.items() if name not in OPEN}


W = TypeVar("W", bound=CodeWidthConfig)


def group_sizes(config: Any, columns: int) -> tuple[int | None, ...]:
    """Numbers of columns that may share a scale in a layer under `bits: auto`; None: as the granularity says.

    Those that divide the columns; where none of the recipe's own does and the last group may be narrower, all of them.
    """
    if config.granularity != "group":
        return (None,)
    own = config.group_size
    wanted = config.group_sizes or tuple(sorted({*GROUPS, own}))
    fitting = tuple(size for size in wanted if columns % size == 0)
    if fitting or not config.pad:
        return fitting
    return config.group_sizes or (own,)


def open_widths(config: Any, columns: int) -> tuple[Width, ...]:
    """What `bits: auto` chooses among for a layer; empty where no size of its groups fits."""
    return tuple(Width(bits, size) for bits in config.widths for size in group_sizes(config, columns))


def unfit(config: Any, columns: int) -> str | None:
    """Group sizes none of which divides a layer's columns, in words; None where one does."""
    if open_bits(config) == "auto":
        if group_sizes(config, columns):
            return None
        if config.group_sizes:
            return f"none of group_sizes {', '.join(map(str, config.group_sizes))} divides"
    pads = getattr(config, "pad", False)  # codebooks have no narrower last group
    divides = config.granularity != "group" or columns % config.group_size == 0 or pads
    return None if divides else f"group_size {config.group_size} does not divide"


def open_bits(config: MethodConfig) -> str | None:
    """`auto` or `range` where a config's width is still to be found."""
    bits: object = config.bits if isinstance(config, CodeWidthConfig) else None
    return bits if isinstance(bits, str) else None


def with_bits(config: W, bits: int) -> W:
    """The config with a width, as if it had been given."""
    return config.model_copy(update={"bits": bits, **dict.fromkeys(OPEN)})


def with_width(config: W, width: Width) -> W:
    """The config with what a search has chosen, as if it had been given."""
    explicit = with_bits(config, width.bits)
    return explicit if width.group is None else explicit.model_copy(update={"group_size": width.group})


def search_of(config: CodeWidthConfig) -> WidthSearch | None:
    """What `bits: auto` searches for; None where the width is explicit, or found from the weights."""
    if open_bits(config) != "auto":
        return None
    targets = (config.target_bytes, config.target_bpw, config.max_kl)
    return WidthSearch(*targets, config.sensitivity, config.samples, config.evaluations)


def searched(config: type[W], sketch: Callable[[Layer, Any], Weight]) -> Widths[W]:
    """The capability of a method whose parameters hold a width.

    Args:
        config: the class of its parameters.
        sketch: about what the method gives, at a fraction of its time.
    """
    return Widths[W](search_of, open_widths, with_width, sketch)


def rounding_errors(blocks: Blocks, config: Any, widths: Sequence[int]) -> dict[int, float]:
    """‖W − Ŵ‖ / ‖W‖ of rounding to nearest with the full range of every group, by width; 0 for a weight of zeros.

    Args:
        blocks: functions that read W's blocks of rows; each is called once; once more for each width where all
            share a scale.
        config: gives granularity, group_size and symmetric.
        widths: in bits.
    """
    configs = [with_bits(config, bits) for bits in widths]
    shared: dict[int, tuple[Tensor, Tensor | None]] = {}
    if config.granularity == "tensor":
        shared = {own.bits: full_range_of_matrix(blocks, own, torch.float32) for own in configs}
    errors, norms = dict.fromkeys(widths, 0.0), dict.fromkeys(widths, 0.0)
    for read in blocks:
        weight = read()
        for own in configs:
            grid = shared.get(own.bits) or full_range(weight, own, torch.float32)
            for groups, codes, scale, zero in _rounded(weight, own, grid):
                errors[own.bits] += float((decode(codes, scale, zero) - groups).square().sum(dtype=torch.float64))
                norms[own.bits] += float(groups.square().sum(dtype=torch.float64))
    return {bits: (errors[bits] / norms[bits]) ** 0.5 if norms[bits] else 0.0 for bits in widths}


def effective_levels(blocks: Blocks, config: Grid) -> float:
    """2 to the power of the codes' entropy: of the 2^bits codes, how many are in use; 1 for a weight of zeros.

    Args:
        blocks: functions that read the weight's blocks of rows; each is called once.
        config: of groups, or of one scale for each row.
    """
    counts = torch.zeros(1 << config.bits, dtype=torch.float64)
    for read in blocks:
        weight = read()
        for _, codes, _, _ in _rounded(weight, config, full_range(weight, config, torch.float32)):
            counts += torch.bincount((codes.flatten() + (1 << config.bits - 1)).int(), minlength=len(counts))
    shares = counts[counts > 0] / counts.sum()
    return float(2 ** -(shares * shares.log2()).sum())


def _rounded(
    weight: Tensor, config: Grid, grid: tuple[Tensor, Tensor | None]
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Groups of a few rows at a time, with their codes, scales and zero points."""
    scale, zero = grid
    size = config.group_size if config.granularity == "group" else 0
    for rows in pieces((weight.shape[0], weight.shape[1])):
        own = slice(0, 1) if config.granularity == "tensor" else rows
        groups, own_zero = grouped(weight[rows], size), None if zero is None else zero[own]
        yield groups, encode(groups, scale[own], own_zero, config.bits), scale[own], own_zero


def proposed(errors: dict[int, float], max_error: float) -> int | None:
    """The least width whose error is within a bound; None where none is."""
    return next((bits for bits in sorted(errors) if errors[bits] <= max_error), None)


def resolve(candidates: Sequence[Candidate[W]], other_bytes: int) -> list[W]:
    """Give every layer with `bits: range` a width; layers that share their input get the widest of theirs.

    Layers are read once, those with one scale once more for each width. Layers with `bits: auto` stay as they are.

    Raises:
        RecipeError: a layer whose error is too large at every width; or Problems, several.
    """
    widths: dict[int, int] = {}
    problems: list[CompressError] = []
    for number, candidate in enumerate(candidates):
        config = candidate.config
        if open_bits(config) == "range":
            blocks = [partial(_weight, read) for read in candidate.parts]
            errors = rounding_errors(blocks, config, config.widths)
            bound = config.max_error or MAX_ERROR
            widths[number] = proposed(errors, bound) or max(errors)
            if min(errors.values()) > bound:
                message = f"{candidate.info.name}: its error at {max(errors)} bits is {errors[max(errors)]:.3g}"
                hint = "raise max_error, or give the layer bits of its own in rules"
                problems.append(RecipeError(f"{message}, above max_error {bound:g}", hint))
    raise_all(problems)
    widest: dict[str, int] = {}
    for number, bits in widths.items():
        name = _input_name(candidates[number])
        widest[name] = max(bits, widest.get(name, bits))
    return [
        with_bits(candidate.config, widest[_input_name(candidate)]) if number in widths else candidate.config
        for number, candidate in enumerate(candidates)
    ]


def _weight(read: Callable[[], Layer]) -> Tensor:
    return read().weight


def _input_name(candidate: Candidate[W]) -> str:
    return candidate.info.name if candidate.input_name is None else candidate.input_name()
