"""The section of a distillation's recipe that prunes and trains in turn."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Self

from pydantic import Field, model_validator

from aicompress.data.section import Data
from aicompress.errors import RecipeError
from aicompress.methods import MethodConfig, get
from aicompress.methods.layerwise import LayerMethod
from aicompress.recipe.section import ReportFiles, Section, validated
from aicompress.recipe.step import Calibration, Recipe

SAMPLES = 128  # of the data that a calibrated method sees


class Rounds(Section):
    """Rounds of a step of prune and a training each: more zeros from round to round."""

    sparsity: tuple[float, ...] = Field(min_length=1, description="share of zeros after each round, ascending")
    prune: dict[str, Any] = Field(
        {"name": "magnitude"}, description="method of prune that makes the zeros, without its sparsity"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_a_list(cls, given: Any) -> Any:
        return {"sparsity": given} if isinstance(given, list | tuple) else given

    @model_validator(mode="after")
    def _rises(self) -> Self:
        shares = (0.0, *self.sparsity, 1.0)
        if any(low >= high for low, high in pairwise(shares)):
            raise ValueError("give shares of zeros between 0 and 1, each above the one before")
        return self

    def method(self, sparsity: float) -> MethodConfig:
        """Parameters of prune in a round.

        Raises:
            RecipeError: the method is none that makes zeros of single weights, or has no such parameters.
        """
        method = get("prune", str(self.prune.get("name", "")))
        if not isinstance(method, LayerMethod) or "sparsity" not in method.config.model_fields:
            hint = "iterate: {sparsity: [0.3, 0.5], prune: {name: wanda}}"
            raise RecipeError(f"iterate.prune: {method.name} makes no zeros of single weights", hint)
        config: MethodConfig = validated(method.config, {**self.prune, "sparsity": sparsity}, "iterate.prune")
        return config

    def steps(self, data: Data, seed: int) -> tuple[Recipe, ...]:
        """Recipes of prune, one for each round.

        Args:
            data: what the student learns from; a calibrated method sees its first samples.
            seed: of the recipe.
        """
        calibration = Calibration(**{**dict(data), "labels": None}).at_most(SAMPLES)
        configs = [self.method(sparsity) for sparsity in self.sparsity]
        return tuple(
            Recipe(
                version=1,
                method=config,
                calibration=calibration if get("prune", config.name).needs else None,
                seed=seed,
                report=ReportFiles(html=False),
            )
            for config in configs
        )
