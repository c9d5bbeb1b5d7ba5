"""Recipes of factorize, quantize and prune."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from aicompress.data.section import Data
from aicompress.errors import CompressError, RecipeError, suggestion
from aicompress.layer import Kind, LayerInfo
from aicompress.methods import MethodConfig, get
from aicompress.methods.effort import Level as Effort
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.method import Method
from aicompress.methods.structural import StructuralMethod
from aicompress.recipe.files import folder_of, read, with_text
from aicompress.recipe.levels import Level, Levels, MeasuredLevels, MethodFields
from aicompress.recipe.section import Model, ReportFiles, Section, StoredCodes, optional, validated
from aicompress.selection import matches, unmatched, unreached

DEFAULT_KINDS: tuple[Kind, ...] = ("linear", "conv")


class Select(Section):
    """Which layers the method acts on."""

    include: tuple[str, ...] = Field(
        (), description="exact names, globs or re: patterns; none means every layer of `kinds`"
    )
    exclude: tuple[str, ...] = Field((), description="the same; exclude wins")
    kinds: tuple[Kind, ...] = Field(
        DEFAULT_KINDS, description="linear (experts in one tensor included), experts, conv, embedding, head"
    )


class Rule(MethodFields):
    """Method fields for the layers of one pattern; the first rule that matches a layer wins."""

    match: str
    skip: bool = False


class Calibration(Data):
    """Samples that run through the model so that a method sees its layers' inputs: of a source, drawn, or both."""

    drawn: int | None = optional(
        "samples of `length` tokens that are drawn from the tokenizer's vocabulary, without data; beside a "
        "source they count as much as its samples do",
        ge=1,
    )

    precision: Literal["auto", "float32"] = Field(
        "auto",
        description="auto: inputs of linear layers and Gram matrices rounded to bfloat16 and summed in float32, and "
        "what passes between the layers of a block kept in bfloat16, where the processor has instructions for it",
    )
    activations: Literal["compressed", "original"] = Field(
        "compressed",
        description="what a layer's inputs have come through: the layers before it as they are compressed, or as they "
        "were, which takes one forward pass instead of two",
    )

    @property
    def draws(self) -> bool:
        """Whether samples are drawn."""
        return self.drawn is not None

    @property
    def takes_several(self) -> bool:
        """Whether a sample may be made of several arrays."""
        return True

    @model_validator(mode="after")
    def _drawn_are_texts(self) -> Calibration:
        if self.draws and self.kind == "arrays":
            raise ValueError("arrays are not averaged with drawn tokens: leave one of them out")
        return self

    def at_most(self, samples: int, length: int | None = None) -> Calibration:
        """A smaller part of the same data.

        Args:
            samples: of each kind.
            length: tokens in one; None leaves it.
        """
        fewer = {
            "samples": min(samples, self.samples or samples),
            "drawn": None if self.drawn is None else min(samples, self.drawn),
            "length": self.length if length is None else min(length, self.length),
        }
        return self.model_copy(update=fewer)


class Tune(Section):
    """Block tuning: codes and scales, or factors, of a block are moved together towards the outputs it had before."""

    steps: int = Field(200, ge=1, description="batches that are run forward and back, per block")
    batch: int = Field(8, ge=1, description="samples in a batch")
    rate: float = Field(
        0.01, gt=0, le=1, description="how far a step moves a weight, in steps of its grid; falls to nothing"
    )
    scale_rate: float = Field(
        0.001, ge=0, le=0.1, description="how far a step moves a scale, as a share of it; falls to nothing"
    )
    factor_rate: float = optional(
        "how far a step moves a factor of a low-rank layer, a norm or a bias, as a share of its root mean square; "
        "falls to nothing",
        0.01,
        gt=0,
        le=1,
    )
    norms: bool = optional("norms and biases of the block move, too", False)


class Recipe(StoredCodes):
    """A recipe of factorize, quantize or prune."""

    version: Literal[1]
    method: MethodConfig
    select: Select = Select()
    rules: tuple[Rule, ...] = ()
    levels: Levels = ()
    model: Model | None = None
    calibration: Calibration | None = None
    held_out: Data | None = optional(
        "texts beside those of calibration, of which the report says how many need a dropped token"
    )
    effort: Effort | None = Field(None, description="preset of the method's fields and of tune; fields beside it win")
    tune: Tune | None = None
    seed: int = Field(0, ge=0)
    gates: tuple[str, ...] = ()
    report: ReportFiles = Field(ReportFiles(), exclude=True, description="how the report is written; not hashed")

    def resolved(self) -> dict[str, Any]:
        """Every field with its value, JSON-ready."""
        return {**self.model_dump(mode="json"), "method": self.method.model_dump(mode="json")}

    @property
    def given_levels(self) -> tuple[Level, ...]:
        """Levels that say which layers they have; none where they are to be measured."""
        return () if isinstance(self.levels, MeasuredLevels) else self.levels

    @property
    def measured_levels(self) -> MeasuredLevels | None:
        """Levels that are to be found by measurement."""
        return self.levels if isinstance(self.levels, MeasuredLevels) else None

    def with_levels(self, levels: Sequence[Level]) -> Recipe:
        """The recipe with other levels."""
        return self.model_copy(update={"levels": tuple(levels)})

    def counted(self, layers: Sequence[LayerInfo]) -> Recipe:
        """The recipe with depths that are counted from the end counted from the start."""
        return self.with_levels([level.counted(layers) for level in self.given_levels]) if self.given_levels else self

    def problems(self, layers: Sequence[LayerInfo]) -> list[CompressError]:
        """Rules and levels that match nothing."""
        spans = [level.layers for level in self.given_levels if level.layers is not None]
        patterns = [level.match for level in self.given_levels if level.match is not None]
        rules = unmatched([rule.match for rule in self.rules], layers, "rules")
        return [*rules, *unmatched(patterns, layers, "levels"), *unreached(spans, layers)]

    def config_for(self, layer: LayerInfo) -> tuple[MethodConfig | None, str]:
        """The method's parameters for a layer and the rule that gave them; None where a rule skips it.

        Raises:
            RecipeError: a rule's fields are not the method's.
        """
        part, where = self._part_for(layer)
        return (self.method, where) if part is None else self._with(part, where)

    def budget_for(self, layer: LayerInfo) -> str:
        """The level with a budget of its own that a layer shares; empty where it shares the recipe's."""
        part, where = self._part_for(layer)
        own = isinstance(part, Level) and not self.method.budgets.isdisjoint(part.fields)
        return where if own else ""

    def _part_for(self, layer: LayerInfo) -> tuple[Rule | Level | None, str]:
        """What gives a layer its parameters, the first that matches: a rule, a level, or else the method."""
        for number, rule in enumerate(self.rules):
            if matches(rule.match, layer):
                return rule, f"rules[{number}]: {rule.match}"
        for number, level in enumerate(self.given_levels):
            if level.holds(layer):
                return level, f"levels[{number}]: {level.members}"
        return None, "method"

    def _with(self, part: Rule | Level, where: str) -> tuple[MethodConfig | None, str]:
        if part.skip:
            return None, where
        given = self.method.beneath(self.method.model_dump(exclude_unset=True), part.fields)
        return validated(type(self.method), {**given, **part.fields}, where), where


def with_effort(plain: dict[str, Any], given: dict[str, Any], method: Method) -> dict[str, Any]:
    """A recipe with the fields that its effort stands for; what it says itself wins.

    Args:
        plain: the recipe.
        given: its method section.
        method: the method that it names.

    Raises:
        RecipeError: the method has no presets, none of that name, or other fields.
    """
    level, presets = str(plain["effort"]), method.efforts
    if not presets:
        hint = "leave it out; `aicompress methods` lists what has presets"
        raise RecipeError(f"effort: {method.name} has no presets", hint)
    preset = next((preset for name, preset in presets.items() if name == level), None)
    if preset is None:
        raise RecipeError(f"effort: unknown {level!r}", suggestion(level, list(presets)))
    validated(method.config, given, "method")  # a preset depends on what is given
    merged = {**plain, "method": {**preset.fields(given), **given}}
    if isinstance(plain.get("calibration"), dict):
        merged["calibration"] = {**preset.calibration(given), **plain["calibration"]}
    if preset.tune is None or not isinstance(plain.get("tune", {}), dict):  # `tune: null` asks for none
        return merged
    return {**merged, "tune": {**preset.tune, **plain.get("tune", {})}}


def _tunable(method: Method) -> bool:
    """Whether a method gives codes or factors to blocks that run, and neither rescales nor rotates what it is given."""
    return isinstance(method, LayerMethod) and method.tunable and bool(method.needs) and not method.rewrites


def load(name: str, command: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe of factorize, quantize or prune.

    Raises:
        RecipeError, Problems: what is wrong, with hints.
    """
    plain, path = read(name, command, overrides)
    given = plain.get("method")
    if not isinstance(given, dict) or "name" not in given:
        named = f"method.name={given}; " if isinstance(given, str) else ""
        raise RecipeError(f"{path.name}: method.name is missing", f"{named}see `aicompress methods {command}`")
    method = get(command, str(given["name"]))
    counts_tokens = isinstance(method, StructuralMethod) and method.counts_tokens
    if counts_tokens and plain.get("calibration") is None:
        plain = with_text(plain, overrides)
    if plain.get("effort") is not None:
        plain = with_effort(plain, given, method)
    if plain.get("tune") is not None and not _tunable(method):
        hint = "take a calibrated method that stores integer codes or factors, such as gptq or whitened"
        raise RecipeError(f"tune: {method.name} runs no block that could be tuned", hint)
    if plain.get("held_out") is not None and not counts_tokens:
        raise RecipeError(f"held_out: {method.name} drops no tokens of a text", "leave it out")
    config = validated(method.config, plain["method"], "method")
    if config.entropy_coded and plain.get("storage") is None:
        plain["storage"] = "entropy"
    return validated(Recipe, {**plain, "method": config}, "").relative_to(folder_of(path))
