"""Training methods: a loss between a teacher's and a student's outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Self, TypeVar

from pydantic import Field
from torch import Tensor

from aicompress.methods.method import Method, MethodConfig
from aicompress.methods.outputs import Output, Outputs, OutputShapes
from aicompress.methods.registry import get


class LossConfig(MethodConfig):
    """Parameters of a loss of distillation."""

    weight: float = Field(1.0, gt=0, description="factor of this loss in the sum of all losses")
    ramp: float = Field(
        0.0,
        ge=0,
        le=1,
        exclude_if=lambda ramp: ramp == 0,  # recipes from before it was there keep their digests
        description="share of the steps in which the weight rises to its full size",
    )

    def at(self, done: float) -> Self:
        """The parameters when a share of the steps is done: what follows a schedule has its value then."""
        return self

    @property
    def leaves_open(self) -> bool:
        """Whether there is a temperature that is chosen before training."""
        return False

    def softened(self, temperature: float) -> Self:
        """The parameters with a temperature that they leave open."""
        return self

    def weight_at(self, done: float) -> float:
        """The weight when a share of the steps is done: weight exp(-5 (1 - x)²), with x = done / ramp up to 1.

        Laine and Aila, "Temporal Ensembling for Semi-Supervised Learning", 2017, section 2.1.
        """
        rise = min(done / self.ramp, 1.0) if self.ramp else 1.0
        return self.weight * math.exp(-5 * (1 - rise) ** 2)


ConfigT = TypeVar("ConfigT", bound=LossConfig)


@dataclass(frozen=True)
class DistillMethod(Method, Generic[ConfigT]):
    """A loss between what a student and its teacher give for the same batch.

    Attributes:
        config: the class of its parameters.
        loss: (student, teacher, config) -> scalar, differentiable in the student's outputs.
        reads: the outputs that it needs of both.
        check: (student, teacher, config) -> what makes the loss impossible for these two, as (message, hint), or None.
        stored: forms of stored logits that it learns from (`methods/distill/signals.py`), beside that of all logits.
        from_known: it takes classes that are known as they are stored; another one is given logits that fit them.
    """

    config: type[ConfigT]
    loss: Callable[[Outputs, Outputs, ConfigT], Tensor] = field(kw_only=True)
    reads: frozenset[Output] = field(kw_only=True)
    check: Callable[[OutputShapes, OutputShapes, ConfigT], tuple[str, str] | None] = field(kw_only=True)

    stored: frozenset[str] = field(default=frozenset(), kw_only=True)
    from_known: bool = field(default=False, kw_only=True)

    kind: ClassVar[str] = "training"


def get_loss(name: str) -> DistillMethod[Any]:
    """Look up a loss.

    Raises:
        RecipeError: there is none of this name.
    """
    method = get("distill", name)
    if not isinstance(method, DistillMethod):
        raise TypeError(f"{method.name} is not a loss")
    return method
