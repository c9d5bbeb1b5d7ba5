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
        one_of: fields that say the same thing in different ways: exactly one of them is given. A rule that gives one
            replaces the method's.
        budgets: fields that several layers share: those of a level that gives one share the level's own.
        entropy_coded: codes are entropy-coded where the recipe does not say how they are stored.
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
            raise ValueError(f"give exactly one of {', '.join(self.one_of)}")
        return self

    @property
    def gradient_loss(self) -> GradientLoss:
        """The loss whose gradients are read: of true labels, of the model's own predictions, or as the data allows."""
        return "auto"

    @property
    def no_smaller(self) -> str:
        """Why the layers are stored in as many bytes as before, and what to set instead; empty where they are not."""
        return ""

    def fitted(self, columns: int) -> Self:
        """The parameters for a layer of so many input columns: what the recipe leaves open fits it."""
        return self

    def relative_to(self, folder: Path) -> Self:
        """The parameters with paths of files made absolute from a recipe's folder."""
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
        needs: statistics it reads: of calibration any of "norms", "gram", "mean_abs", "max_abs", "gradients",
            "output_gram", and of embeddings "frequency", of training "movement"; empty for data-free methods.
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
