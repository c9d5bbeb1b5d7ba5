from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from aicompress.errors import Refused
from aicompress.methods import get
from aicompress.pipeline import structure
from aicompress.pipeline.output import Destination
from aicompress.recipe import Recipe
from aicompress.report.model import Report
from tests.pipeline.families import FAMILIES, Family, silence

STACKS = [(name, stack) for name, family in FAMILIES.items() for stack in family.stacks]


def plan(source: Path, out: Path, **method: Any) -> structure.StructurePlan:
    config = get("prune", method["name"]).config(**method)
    return structure.make_plan(source, Destination(out), Recipe(version=1, method=config), "prune")


def prune(source: Path, out: Path, **method: Any) -> Report:
    """Prune; the plan's bytes must be those of the run."""
    planned = plan(source, out, **method)
    report = structure.run(planned)
    assert planned.output.weight_bytes == report.after.weight_bytes
    assert planned.output.weight_bytes == sum(f.stat().st_size for f in out.glob("*.safetensors"))
    assert planned.output.other_bytes == sum(
        f.stat().st_size for f in out.rglob("*") if f.is_file() and f.suffix != ".safetensors" and f.stem != "report"
    )
    return report


def loaded(model: Any, out: Path) -> Any:
    """Plain transformers, and nothing missing."""
    found, info = type(model).from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    return found.eval()


@pytest.mark.parametrize(("name", "stack"), STACKS)
@pytest.mark.parametrize("drop", [(1,), (0, 2)])
def test_depth_is_the_model_without_those_blocks(name: str, stack: str, drop: tuple[int, ...], tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.saved(tmp_path / "in")
    before = family.output(model)
    report = prune(tmp_path / "in", tmp_path / "out", name="depth", drop=drop, stack=stack)
    blocks = family.blocks(model, stack)
    kept = [block for number, block in enumerate(blocks) if number not in drop]
    if name == "t5" and 0 in drop:  # the bias of the first block serves all blocks
        first, new = blocks[0].layer[0].SelfAttention, kept[0].layer[0].SelfAttention
        new.relative_attention_bias, new.has_relative_attention_bias = first.relative_attention_bias, True
    removed(family, model, stack, kept, drop)
    after = family.output(loaded(model, tmp_path / "out"))
    assert torch.equal(after, family.output(model))
    assert not torch.allclose(after, before, atol=1e-3)
    assert report.after.parameters < report.before.parameters


def removed(family: Family, model: Any, stack: str, kept: list[nn.Module], drop: tuple[int, ...]) -> None:
    """Take blocks out of a model in memory, and their attention kinds out of its configuration."""
    blocks = family.blocks(model, stack)
    kinds = getattr(model.config, "layer_types", None)
    if kinds is not None:
        model.config.layer_types = [kind for number, kind in enumerate(kinds) if number not in drop]
    if hasattr(model.config, "num_hidden_layers") and len(family.stacks) == 1:
        model.config.num_hidden_layers = len(kept)
    for _ in range(len(blocks)):
        del blocks[0]
    blocks.extend(kept)


@pytest.mark.parametrize("name", FAMILIES)
def test_width_is_the_model_with_those_neurons_silent(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.saved(tmp_path / "in")
    before = family.output(model)
    report = prune(tmp_path / "in", tmp_path / "out", name="width", sparsity=0.5, multiple=4)
    narrow = loaded(model, tmp_path / "out")
    silence(family, model, lambda width: width // 2)
    after = family.output(narrow)
    torch.testing.assert_close(after, family.output(model), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(after, before, atol=1e-3)
    assert {row.rel_error for row in report.layers if "neurons" in row.detail} == {None}
    assert report.after.bytes < report.before.bytes


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_dropped_is_the_same_checkpoint(name: str, tmp_path: Path) -> None:
    FAMILIES[name].saved(tmp_path / "in")
    report = prune(tmp_path / "in", tmp_path / "narrow", name="width", sparsity=0)
    stack = next(iter(FAMILIES[name].stacks))
    prune(tmp_path / "in", tmp_path / "shallow", name="depth", drop=(), stack=stack)
    before = load_file(tmp_path / "in" / "model.safetensors")
    for folder in ("narrow", "shallow"):
        after = load_file(tmp_path / folder / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(row.rel_error == 0 for row in report.layers)


def refused(source: Path, out: Path, **method: Any) -> str:
    with pytest.raises(Refused) as found:
        plan(source, out, **method)
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}*"))
    return f"{found.value.message} | {found.value.hint}"
