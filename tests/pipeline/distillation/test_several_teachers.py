"""Several teachers, whose outputs are averaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from aicompress.checkpoint import Checkpoint
from aicompress.errors import RecipeError, Refused
from aicompress.model.distillation.outputs import Runner
from aicompress.model.loading.pooling import Pooling
from aicompress.pipeline.distillation.data.samples import Batch
from aicompress.pipeline.distillation.plan import make_plan
from aicompress.pipeline.distillation.run import run
from aicompress.pipeline.distillation.teachers.teacher import Panel, Runnable
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe.distillation import DistillRecipe, load

Make = Callable[..., DistillRecipe]


@pytest.fixture
def recipe(tmp_path: Path, text_file: Path) -> Make:
    def make(method: dict[str, Any]) -> DistillRecipe:
        settings = {"steps": 4, "batch": 8, "evaluate_every": 4, "learning_rate": 2e-3, "precision": "fp32"}
        plain = {"version": 1, "method": method, "data": {"text": str(text_file), "length": 32}, "training": settings}
        (tmp_path / "recipe.yaml").write_text(json.dumps(plain))
        return load(str(tmp_path / "recipe.yaml"))

    return make


def test_logits_are_averaged_over_the_classes_that_all_have() -> None:
    side = Runner("module", Pooling())
    linear = [nn.Linear(3, classes) for classes in (5, 4)]
    batch = Batch(torch.arange(2), {"": torch.randn(2, 3)}, torch.tensor([0, 1]))
    panel = Panel(tuple(Runnable(each, side) for each in linear))
    given = panel(batch, frozenset({"logits"}), "fp32")
    one, other = (each(batch.inputs[""]) for each in linear)
    assert given.logits is not None
    torch.testing.assert_close(given.logits, (one[:, :4] + other) / 2)
    alone = Panel(panel.members[:1])(batch, frozenset({"logits"}), "fp32")
    assert alone.logits is not None
    assert alone.logits.equal(one)


def test_a_student_learns_from_two_and_the_lineage_names_both(
    tiny_llama: Path, trained_llama: Path, tiny_llama_untied: Path, recipe: Make, tmp_path: Path
) -> None:
    teachers = [trained_llama, tiny_llama_untied]
    plan = make_plan(tiny_llama, teachers, Destination(tmp_path / "out"), recipe({"name": "kl"}))
    report = run(plan, Options(latency="off"))
    assert report.training["held_out_after"] < report.training["held_out_before"]
    assert report.training["teacher"]["path"] == f"{trained_llama} + {tiny_llama_untied}"
    (step,) = Checkpoint.open(tmp_path / "out").manifest.lineage
    digests = [step[name]["inputs"]["model.safetensors"] for name in ("teacher", "teacher_2")]
    assert len({*digests, "0" * 64}) == 3


def test_what_cannot_be_averaged_is_refused(
    tiny_bert: Path, other_bert: Path, wide_bert: Path, recipe: Make, tmp_path: Path
) -> None:
    out = Destination(tmp_path / "out")
    with pytest.raises(RecipeError, match="hidden compares what goes on inside a teacher"):
        make_plan(tiny_bert, [tiny_bert, other_bert], out, recipe({"name": "hidden"}))
    similar = {"name": "embedding", "cosine": 0, "similarity": 1}
    with pytest.raises(Refused, match="embeddings are 48 and 64 wide"):
        make_plan(tiny_bert, [other_bert, wide_bert], out, recipe(similar))
