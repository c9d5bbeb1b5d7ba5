"""What all methods share: parameters, a name, and what they read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from aicompress.methods.effort import Effort, Level

GradientLoss = Literal["auto", "task", "own"]
OF_GRADIENTS = frozenset({"gradients", "output_gram"})  # statistics that a backward pass gives
OF_TRAINING = frozenset({"movement"})  # statistics that a training run records, and calibration does not


class MethodConfig(BaseModel):
    """Parameters of a method, as the recipe's `method:` section gives them. Frozen; unknown keys are errors.

    A subclass gives representative parameters as `json_schema_extra={"examples": [...]}` of its own model_config: they
    are part of the JSON schema, and the tests that every method must pass run on them.

    Attributes:
        one_of: fields that say the same thing in different ways: a recipe gives exactly one of them. One that a rule
            gives replaces the recipe's.
        budgets: fields that are shared out among layers. A level that gives one has a budget of its own.
        entropy_coded: whether codes are entropy-coded where the recipe does not say `storage`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    one_of: ClassVar[tuple[str, ...]] = ()
    budgets: ClassVar[frozenset[str]] = frozenset()
    entropy_coded: ClassVar[bool] = False

    name: str

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [field for field in self.one_of if getattr(self, field) is not None]
        if self.one_of and len(given) != 1:
            several = f", not {' and '.join(given)}: null takes one back" if given else ""
            raise ValueError(f"give exactly one of {', '.join(self.one_of)}{several}")
        return self

    @property
    def gradient_loss(self) -> GradientLoss:
        """The loss whose gradients are read: of true labels (task), of the model's own predictions (own), or auto."""
        return "auto"

    @property
    def no_smaller(self) -> str:
        """Why the layers take as many bytes as before, and what to set instead; empty where they take fewer."""
        return ""

    def fitted(self, columns: int) -> Self:
        """The parameters for a layer of this many input columns: a group size that is left open divides them."""
        return self

    def relative_to(self, folder: Path) -> Self:
        """The parameters with paths of files made absolute from a recipe's folder."""
        return self

    @classmethod
    def beneath(cls, given: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
        """The method's fields that hold beside a rule's: none beside a preset, no other of `one_of` beside one of it.

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
        needs: statistics it reads: of calibration "gram", those of columns by name (`statistics/columns/`), "gradients"
            and "output_gram", of embeddings "frequency", of training "movement"; empty for data-free methods.
        when: when to take it, and what to take otherwise, in one line; the list of methods shows it.
        efforts: presets by name; empty for a method without presets.
    """

    name: str
    command: str
    summary: str
    config: type[MethodConfig]
    needs: frozenset[str] = field(default_factory=frozenset)
    when: str = field(kw_only=True)
    efforts: Mapping[Level, Effort] = field(kw_only=True, default_factory=dict)
