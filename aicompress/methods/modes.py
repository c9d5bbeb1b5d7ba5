"""Modes of distillation: which tensors of a student move while it learns, and how they are written back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import Field
from torch import Tensor

from aicompress.discovery import members
from aicompress.errors import RecipeError, suggestion
from aicompress.methods.method import MethodConfig
from aicompress.weights import Weight

PACKAGE = "aicompress.methods.distill.modes"
NOTHING: frozenset[str] = frozenset()
WHOLE: frozenset[str] = frozenset({""})


class ModeConfig(MethodConfig):
    """Parameters of a mode, as the recipe's `mode:` section gives them.

    Attributes:
        layer_by_layer: each layer or block is compared with the teacher's of the same name, instead of the outputs.
    """

    layer_by_layer: ClassVar[bool] = False


class LayerCorrection(ModeConfig):
    """Parameters of a mode that corrects one layer after another in closed form."""

    layer_by_layer: ClassVar[bool] = True

    samples: int = Field(256, ge=1, description="training samples that are run, those of the first steps")


TRAVEL = 0.75  # steps of its grid that a code can move by in all, while the rate falls to nothing


class BlockTuning(ModeConfig):
    """Parameters of a mode that tunes one block after another."""

    layer_by_layer: ClassVar[bool] = True

    samples: int = Field(
        128, ge=1, description="training samples that every block is tuned on, those of the first steps"
    )
    steps: int = Field(100, ge=1, description="batches that are run forward and back, per block")
    rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="how far a step moves a code, in steps of its grid; falls to nothing. By itself 1.5 / steps: "
        "however many steps there are, a code can move by three quarters of a grid step",
    )
    scale_rate: float = Field(
        0.001, gt=0, le=0.1, description="how far a step moves a scale, as a share of it; falls to nothing"
    )
    factor_rate: float = Field(
        0.01,
        gt=0,
        le=1,
        description="how far a step moves a factor, a weight, norm or bias, as a share of its size; falls to nothing",
    )

    @property
    def code_rate(self) -> float:
        """How far a step moves a code, in steps of its grid."""
        return code_rate(self.rate, self.steps)


def code_rate(given: float | None, steps: int, travel: float = TRAVEL, most: float = 1.0) -> float:
    """How far a step moves a code at first, in steps of its grid: as given, or so that all steps make a travel.

    Args:
        given: by the recipe, or None.
        steps: of the training, over which the rate falls to nothing.
        travel: steps of its grid that a code can move by in all.
        most: what the rate is at most, where it is not given.
    """
    return min(most, 2 * travel / steps) if given is None else given


@dataclass(frozen=True)
class StudentParameter:
    """A parameter of a student, before it is loaded.

    Attributes:
        name: in the checkpoint.
        shape: of the dense parameter.
        weight: the outline of its stored form; None of a plain tensor.
        zeros: whether some of its elements are exactly zero and stay so, which may read it.
        shared: another parameter has some of its tensors, too.
    """

    name: str
    shape: tuple[int, ...]
    weight: Weight | None
    zeros: Callable[[], bool] = field(default=lambda: False)
    shared: bool = False

    @property
    def is_vector(self) -> bool:
        """Whether it is a norm or a bias, which is stored as it is."""
        return self.weight is None and len(self.shape) <= 1


ConfigT = TypeVar("ConfigT", bound=ModeConfig)


@dataclass(frozen=True)
class Recodes(Generic[ConfigT]):
    """What a mode does whose plain tensors are learnt as codes. Matrices are (out, in); a vector is a column.

    Attributes:
        outline: (shape) -> the form that a matrix is written in, without data.
        start: (matrix, config) -> what is learnt beside a matrix, by suffix, as vectors.
        running: (matrix, learnt) -> the matrix that the model runs with, differentiable in both.
        bits: (matrix, learnt, noise between -1/2 and 1/2, or None) -> bits that its codes take, differentiable.
        written: (matrix, learnt) -> the matrix in its form: exactly the one that the model runs with.
        price: (share of the steps that are done, config) -> what one bit a weight adds to the loss.
    """

    outline: Callable[[tuple[int, int]], Weight]
    start: Callable[[Tensor, ConfigT], dict[str, Tensor]]
    running: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    bits: Callable[[Tensor, Mapping[str, Tensor], Tensor | None], Tensor]
    written: Callable[[Tensor, Mapping[str, Tensor]], Weight]
    price: Callable[[float, ConfigT], float]


@dataclass(frozen=True)
class Mode(Generic[ConfigT]):
    """What moves of a student while it learns. A moved tensor is written in the form and dtype that it had.

    Attributes:
        name: as the recipe says it.
        summary: one line.
        when: when to take it, and what to take otherwise, in one line.
        config: the class of its parameters.
        moves: (parameter, config) -> suffixes of the tensors of its stored form that move; '' of a plain tensor.
        check: (parameters, config) -> why it can do nothing for a student of these, as (message, hint), or None.
        relative: (weight) -> suffixes of the tensors whose learning rate is relative to their own size.
        rate: (config, steps) -> how far the first steps move a code, in steps of its grid.
        relax: (weight) -> the weight with real numbers in the place of codes that move, as `latent.relaxed` gives it;
            None where none do.
        keeps_zeros: zeros of matrices stay zero; else the recipe's training section decides.
        recodes: how plain tensors that move are learnt as codes, and written as such; None for tensors that stay real.
    """

    name: str
    summary: str
    when: str = field(kw_only=True)
    config: type[ConfigT]
    moves: Callable[[StudentParameter, ConfigT], frozenset[str]] = field(kw_only=True)
    check: Callable[[Sequence[StudentParameter], ConfigT], tuple[str, str] | None] = field(
        kw_only=True, default=lambda parameters, config: None
    )
    relative: Callable[[Weight], frozenset[str]] = field(kw_only=True, default=lambda weight: weight.scale_suffixes())
    rate: Callable[[ConfigT, int], float] = field(kw_only=True, default=lambda config, steps: code_rate(None, steps))
    relax: Callable[[Weight], Weight] | None = field(kw_only=True, default=None)
    keeps_zeros: bool = field(kw_only=True, default=False)
    recodes: Recodes[ConfigT] | None = field(kw_only=True, default=None)


def modes() -> Mapping[str, Mode[Any]]:
    """List all modes by name."""
    return members(PACKAGE, "MODE")


def get_mode(name: str) -> Mode[Any]:
    """Look up a mode.

    Raises:
        RecipeError: there is none of this name.
    """
    known = modes()
    if name not in known:
        raise RecipeError(f"distill has no mode {name!r}", suggestion(name, list(known)))
    return known[name]


def real_suffixes(weight: Weight) -> frozenset[str]:
    """Suffixes of the tensors of real numbers of a stored form."""
    return frozenset(suffix for suffix, spec in weight.specs().items() if spec.dtype.is_floating_point)
