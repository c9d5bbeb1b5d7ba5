"""A structural unit is added by a file of its own and the file of its method, and by nothing else."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers as hf

from aicompress import methods
from aicompress.methods.structural import StructuralMethod, Unit
from aicompress.pipeline import steps
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.structured import planner
from aicompress.recipe import load

PACKAGES = {"method": "aicompress.methods.prune", "unit": "aicompress.pipeline.structured.units"}
METHOD = '''
"""Keep the tokens of the lowest numbers."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from aicompress.methods.structural import StructuralConfig, StructuralMethod, Unit


@dataclass(frozen=True)
class Tokens(Unit):
    """Tokens of the vocabulary."""

    plural: ClassVar[str] = "tokens"


class TokensConfig(StructuralConfig):
    """Parameters of tokens."""

    name: Literal["tokens"] = "tokens"
    tokens: int = Field(1, ge=1, description="how many stay")


METHOD = StructuralMethod[TokensConfig](
    name="tokens",
    command="prune",
    summary="keep the tokens of the lowest numbers",
    when="never: it shows how a unit is added",
    config=TokensConfig,
    unit=lambda config: Tokens(),
    sizes=lambda structures, config: [config.tokens for _ in structures],
    keep=lambda structure, size, config: list(range(size)),
)
'''
UNIT = '''
"""Tokens of a vocabulary: rows of the embedding."""

from functools import partial

from aicompress.methods.prune.tokens import Tokens
from aicompress.methods.structural import Part, Structure
from aicompress.model.architecture.architecture import Architecture
from aicompress.pipeline.structured.edit import ParameterChange, Cut, Edit
from aicompress.pipeline.structured.unit import UnitLayout, StructuralUnit

NAME = "model.embed_tokens.weight"


class TokenUnit(StructuralUnit):
    """Tokens of the vocabulary."""

    kind = Tokens
    silenceable = False  # a model without some tokens cannot be given them

    def find(self, checkpoint, unit, stack):
        rows = Part(NAME, "embed", "producer", 0, partial(checkpoint.dense, NAME))
        self.names, self.config = list(checkpoint.parameters()), dict(checkpoint.config)
        vocabulary = Structure("vocabulary", checkpoint.config["vocab_size"], (rows,))
        return UnitLayout((vocabulary,), Architecture.of(checkpoint.config, checkpoint.parameters()))

    def edit(self, layout, sizes, kept):
        changes = {name: ParameterChange(name) for name in self.names}
        changes[NAME] = ParameterChange(NAME, (Cut(0, 0),), {"tokens": f"{sizes[0]} of {layout.structures[0].size}"})
        return Edit({**self.config, "vocab_size": sizes[0]}, layout.structures, tuple(sizes), changes)


UNIT = TokenUnit()
'''


@pytest.fixture
def added(joins: Callable[[ModuleType, str, str], None]) -> None:
    """One file for the method and one for its unit, in folders that discovery looks into."""
    for what, content in (("method", METHOD), ("unit", UNIT)):
        joins(importlib.import_module(PACKAGES[what]), "tokens", content)


def test_every_structural_method_has_a_unit() -> None:
    chosen = [method for method in methods.methods("prune").values() if isinstance(method, StructuralMethod)]
    examples = {method.name: method.config.model_config["json_schema_extra"]["examples"][0] for method in chosen}  # type: ignore[index,call-overload]
    units = {method.name: method.unit(method.config(**examples[method.name])) for method in chosen}
    assert len(units) >= 5
    for name, unit in units.items():
        assert planner.unit_for(unit).kind is type(unit), name
    assert {type(unit) for unit in units.values()} == set(planner.structural_units())


def test_a_unit_without_a_file_is_told() -> None:
    class Nothing(Unit):
        """A kind that no file handles."""

    with pytest.raises(TypeError, match="handles Nothing"):
        planner.unit_for(Nothing())


@pytest.mark.usefixtures("added")
def test_two_files_add_a_unit(tmp_path: Path, tiny_llama: Path) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text("{version: 1, method: {name: tokens, tokens: 200}}")
    plan = steps.make_plan(tiny_llama, Destination(tmp_path / "out"), load(str(path), "prune"), "prune")
    report = steps.run(plan, Options(latency="off"))
    assert {row.name: row.detail for row in report.layers}["model.embed_tokens"] == {"tokens": "200 of 256"}
    before, after = (hf.AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_llama, tmp_path / "out"))
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        torch.testing.assert_close(after(ids).logits, before(ids).logits[..., :200])


def test_what_is_added_goes_with_its_files() -> None:
    assert "tokens" not in methods.methods("prune")
    assert PACKAGES["method"] + ".tokens" not in {kind.__module__ for kind in planner.structural_units()}
