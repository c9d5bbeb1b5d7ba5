"""The sections of a distillation's recipe that make the student of IN: cut out of it, or pruned in rounds."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_serializer, model_validator

from aicompress.data.section import Data
from aicompress.disk import expanded
from aicompress.errors import RecipeError
from aicompress.methods import MethodConfig, get
from aicompress.methods.amount import Amount
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.prune.depth import DepthConfig
from aicompress.methods.prune.heads import HeadsConfig
from aicompress.methods.prune.hidden import HiddenConfig
from aicompress.methods.prune.width import WidthConfig
from aicompress.recipe.section import ReportFiles, Section, optional, validated
from aicompress.recipe.step import Calibration, Recipe

SAMPLES = 128  # of the data that decide which units stay


def _blocks(given: Any) -> int | float | tuple[int, ...]:
    """How many blocks stay, or a share of them, or which, ascending."""
    if (type(given) is int and given >= 1) or (type(given) is float and 0 < given < 1):
        return given
    listed = list(given) if isinstance(given, list | tuple) else []
    if listed and all(type(block) is int and block >= 0 for block in listed) and listed == sorted(set(listed)):
        return tuple(listed)
    raise ValueError("give how many blocks stay, a share of them, or a list of those that stay: ascending, from 0")


Blocks = Annotated[int | float | tuple[int, ...], BeforeValidator(_blocks)]


class StudentShape(Section):
    """The student: what stays of IN, cut by the methods of prune one after the other, or a configuration of its own."""

    config: str | None = optional(
        "config.json of the student, or its folder: a model of IN's tokenizer and task; what IN has of the "
        "same name and shape is copied, the rest is drawn. Alone, without what stays"
    )

    layers: Blocks | None = Field(
        None, description="blocks that stay: a share, or how many, evenly spaced; or which, from 0"
    )
    width: Amount | None = Field(None, description="feed-forward neurons that stay in each layer: a share, or how many")
    heads: Amount | None = Field(None, description="attention heads that stay in each layer: a share, or how many")
    hidden: Amount | None = Field(None, description="coordinates of the hidden width that stay: a share, or how many")
    score: Literal["norm", "activation", "taylor", "obs"] = Field(
        "activation",
        description="what neurons, heads and coordinates are kept by, as in prune: by weights alone (norm), or by what "
        "the model does with the first samples of `data`; obs also refits what reads them, and coordinates are then "
        "kept by activation",
    )

    @model_validator(mode="after")
    def _something(self) -> Self:
        kept = [part for part in (self.layers, self.width, self.heads, self.hidden) if part is not None]
        if self.config is not None and kept:
            raise ValueError("config says the whole shape: leave out layers, width, heads and hidden")
        if self.config is None and not kept:
            raise ValueError("give one or more of layers, width, heads and hidden, or a config")
        return self

    @field_serializer("config", when_used="json")
    def _recorded(self, config: str | None) -> str | None:
        """A file's name: where it lies on this machine is nobody's who reads the recipe in a checkpoint."""
        return None if config is None else Path(config).name

    def relative_to(self, folder: Path) -> Self:
        """The same with its path made absolute from a recipe's folder."""
        if self.config is None:
            return self
        return self.model_copy(update={"config": str((folder / expanded(self.config)).resolve())})

    def cuts(self, data: Data, seed: int) -> tuple[Recipe, ...]:
        """Recipes of prune that make the student, in their order.

        Args:
            data: what the student learns from; scores are measured on its first samples.
            seed: of the recipe.
        """
        configs: list[MethodConfig] = []
        if self.layers is not None:
            configs.append(
                DepthConfig(keep=self.layers)
                if isinstance(self.layers, tuple)
                else DepthConfig(keep_layers=self.layers)
            )
        units = {"score": "product" if self.score == "norm" else self.score}
        if self.width is not None:
            configs.append(WidthConfig(**_sized(self.width, "intermediate_size"), **units))
        if self.hidden is not None:
            score = "activation" if self.score == "obs" else self.score
            configs.append(HiddenConfig(**_sized(self.hidden, "hidden_size"), score=score))
        if (
            self.heads is not None
        ):  # last: what config.json of BERT or GPT-2 cannot say then, no further cut has to read
            configs.append(HeadsConfig(**_sized(self.heads, "heads"), **units))
        reads = [self.score != "norm" and not isinstance(config, DepthConfig) for config in configs]
        return _pruning(configs, reads, data, seed)


def _pruning(configs: list[MethodConfig], reads: list[bool], data: Data, seed: int) -> tuple[Recipe, ...]:
    """Recipes of prune, calibrated on the first samples of some data where their method reads any."""
    unlabelled = {**dict(data), "labels": None}  # not every sample of a mean teacher's data has a label
    calibration = Calibration(**unlabelled).at_most(SAMPLES)
    fixed: dict[str, Any] = {"version": 1, "seed": seed, "report": ReportFiles(html=False)}
    return tuple(
        Recipe(method=config, calibration=calibration if calibrates else None, **fixed)
        for config, calibrates in zip(configs, reads, strict=True)
    )


def _sized(amount: int | float, number: str) -> dict[str, Any]:
    """The field of a method that says how much stays: `keep` for a share, or that of a number."""
    return {number if isinstance(amount, int) else "keep": amount}


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
        configs = [self.method(sparsity) for sparsity in self.sparsity]
        return _pruning(configs, [bool(get("prune", config.name).needs) for config in configs], data, seed)
