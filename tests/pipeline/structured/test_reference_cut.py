"""A small model without some units computes as the whole one with these silent, or the step is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CheckpointError
from aicompress.methods import get
from aicompress.methods.prune.heads import Heads
from aicompress.model.architecture.architecture import Architecture
from aicompress.pipeline.structured import reference_cut
from aicompress.pipeline.structured.planner import structural_units, unit_for
from aicompress.pipeline.structured.reference_cut import require_reference
from aicompress.pipeline.structured.unit import UnitLayout
from aicompress.pipeline.structured.units.heads import AttentionLayout, HeadUnit, _chosen, _structure
from tests.pipeline.families import FAMILIES
from tests.pipeline.steps import plan
from tests.pipeline.structured.units.test_heads import PHI3, gemma3n

METHODS: dict[str, dict[str, Any]] = {
    "width": {"sparsity": 0.5, "multiple": 1},
    "heads": {"sparsity": 0.5, "unit": "group"},
    "depth": {"drop_layers": 1},
    "experts": {"sparsity": 0.25},
}


def opened(source: Path | Callable[[Path], Any], folder: Path) -> Checkpoint:
    if callable(source):
        torch.manual_seed(0)
        source(folder)
    return Checkpoint.open(folder if callable(source) else source)


def tried(checkpoint: Checkpoint, method: str, **config: Any) -> str:
    pruner = get("prune", method).with_config(get("prune", method).config(name=method, **config))
    handler = unit_for(pruner.unit)
    layout = handler.find(checkpoint, pruner.unit, None)
    sizes = handler.accepted(layout, pruner.sizes(layout.structures))
    kept = {n: tuple(range(s.size - size, s.size)) for n, (s, size) in enumerate(zip(layout.structures, sizes))}  # noqa: B905
    return require_reference(handler, pruner.unit, layout.architecture, handler.edit(layout, sizes, kept))


CASES = [("llama", "width"), ("llama", "heads"), ("llama", "depth"), ("phi3", "width"), ("phi3", "heads")]
CASES += [("gpt2", "width"), ("gpt2", "depth"), ("bert-head", "width"), ("vit", "heads"), ("vit", "depth")]
CASES += [("t5", "width"), ("whisper", "width"), ("gemma3", "depth"), ("gemma3n", "heads")]
CASES += [("mixtral", "experts"), ("mixtral", "width"), ("qwen-moe", "experts"), ("clip", "width")]
CASES += [("t5", "heads")]  # a table of biases serves all blocks


def clip() -> Any:
    side = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**side, "image_size": 16, "patch_size": 8}
    return hf.CLIPModel(hf.CLIPConfig(text_config={**side, "vocab_size": 64}, vision_config=vision))


@pytest.fixture
def source(request: pytest.FixtureRequest) -> Path | Callable[[Path], Any]:
    name = request.param
    made = {"phi3": PHI3.saved, "gemma3n": lambda folder: gemma3n(6, 3).save_pretrained(folder)}
    made |= {"clip": lambda folder: clip().save_pretrained(folder)}
    if name in ("mixtral", "qwen-moe", "llama", "gpt2", "vit"):
        return Path(request.getfixturevalue(f"tiny_{name.replace('-', '_')}"))
    return made.get(name) or FAMILIES[name].saved


@pytest.mark.parametrize(("source", "method"), CASES, indirect=["source"])
def test_every_unit_is_tried_and_holds(source: Path | Callable[[Path], Any], method: str, tmp_path: Path) -> None:
    assert tried(opened(source, tmp_path / "in"), method, **METHODS[method]) == ""


def test_every_kind_of_unit_is_among_them() -> None:
    kinds = {type(get("prune", name).unit(get("prune", name).config(name=name, **METHODS[name]))) for _, name in CASES}  # type: ignore[attr-defined]
    assert kinds == {kind for kind, handler in structural_units().items() if handler.silenceable}


class Apart(HeadUnit):
    """Heads of every attention for itself, also where one reads another's keys."""

    def find(self, checkpoint: Checkpoint, unit: Heads, stack: str | None) -> AttentionLayout:
        architecture = Architecture.of(checkpoint.config, checkpoint.parameters())
        chosen = _chosen(architecture, unit, stack)
        structures = tuple(_structure(checkpoint, attention, unit.grouped) for attention in chosen)
        return AttentionLayout(structures, architecture, chosen, unit.grouped)


def refusal(handler: Any, unit: Any, layout: UnitLayout, kept: dict[int, tuple[int, ...]]) -> str:
    sizes = [len(kept.get(number, range(s.size // 2))) for number, s in enumerate(layout.structures)]
    with pytest.raises(CheckpointError) as error:
        require_reference(handler, unit, layout.architecture, handler.edit(layout, sizes, kept))
    return error.value.message


def test_what_no_shape_shows_is_refused(tmp_path: Path) -> None:
    """Blocks that borrow keys, as if each had its own."""
    checkpoint = opened(lambda folder: gemma3n(6, 3).save_pretrained(folder), tmp_path)
    layout = Apart().find(checkpoint, Heads(grouped=True), None)
    assert "without some heads, a small model" in refusal(Apart(), Heads(grouped=True), layout, {})


def test_a_cut_that_cannot_be_tried_is_told(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = plan(tiny_llama, tmp_path / "out", name="width", sparsity=0.5, multiple=1)
    assert not any("was not tried" in warning for warning in silent.warnings)
    monkeypatch.setattr(reference_cut, "LARGEST", 10)
    reference_cut._tried.cache_clear()
    told = plan(tiny_llama, tmp_path / "out", name="width", sparsity=0.5, multiple=1)
    reference_cut._tried.cache_clear()
    assert (
        "the cut was not tried on a small model of the architecture: its smallest model is too large" in told.warnings
    )
