"""Recipes of `eval`: what to measure, on which data, and which conditions must hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, create_model, model_validator

from aicompress.data.section import Data
from aicompress.metrics import Metric, metrics
from aicompress.recipe.files import folder_of, read
from aicompress.recipe.section import Model, ReportFiles, Section, WholeRecipe, validated


class Quality(Section):
    """What to measure of the outputs."""

    @property
    def asked(self) -> tuple[tuple[Metric[Any, Any], Data], ...]:
        """The metrics that are asked for, each with its section."""
        known = metrics()
        return tuple((known[name], data) for name, data in self if data is not None)

    @property
    def arrays(self) -> Data | None:
        """The first arrays that something is measured on: they show what a model without a configuration takes."""
        for _, data in self.asked:
            if data.kind == "arrays":
                return Data(**{name: getattr(data, name) for name in Data.model_fields})
        return None

    @model_validator(mode="after")
    def _sources(self) -> Self:
        for metric, data in self.asked:
            kinds = metric.reads.sources
            if data.kind not in kinds:
                raise ValueError(f"{metric.name} is measured on {', '.join(kinds)}, not on {data.kind}")
            if metric.reads.labelled and data.labels is None:
                raise ValueError(f"{metric.name} needs `labels`, the name of the array or column that holds them")
        return self


class Timing(Section):
    """How forward passes are timed."""

    batch: int = Field(8, ge=1, description="samples in a batch")
    length: int = Field(64, ge=1, description="tokens in a sample")
    rounds: int = Field(30, ge=3, description="counted forward passes of each model")
    warmup: int = Field(3, ge=0, description="passes before that are not counted")


class EvalRecipe(WholeRecipe):
    """A recipe of eval."""

    version: Literal[1]
    model: Model | None = None
    quality: Quality = Quality()
    latency: Timing | None = Field(None, description="none means that nothing is timed")
    kernels: Literal["fast", "reference"] = Field(
        "fast",
        description="fast: as aicompress.load runs it here, in part in bfloat16; reference: exactly as stored, "
        "which is what other readers see",
    )
    seed: int = Field(0, ge=0)
    gates: tuple[str, ...] = ()
    report: ReportFiles = Field(ReportFiles(), exclude=True, description="how the report is written; not hashed")

    def figures(self, compared: bool) -> tuple[str, ...]:
        """Names under `quality` that will be measured.

        Args:
            compared: there is a baseline.
        """
        return tuple(
            figure.name
            for metric, _ in self.quality.asked
            for figure in metric.figures
            if compared or not figure.compared
        )


def recipe_class() -> type[EvalRecipe]:
    """Build the class of eval's recipes: EvalRecipe with a section for each metric under `quality`."""
    sections: dict[str, Any] = {
        metric.name: (metric.config | None, Field(None, description=metric.summary)) for metric in metrics().values()
    }
    quality = create_model("Quality", __base__=Quality, __doc__=Quality.__doc__, **sections)
    fields: dict[str, Any] = {"quality": (quality, quality())}
    return create_model("EvalRecipe", __base__=EvalRecipe, __doc__=EvalRecipe.__doc__, **fields)


def load(name: str, overrides: Sequence[str] = ()) -> EvalRecipe:
    """Read and validate a recipe of eval.

    Raises:
        RecipeError, Problems: what is wrong, with hints.
    """
    plain, path = read(name, "eval", overrides)
    return validated(recipe_class(), plain, "").relative_to(folder_of(path))
