"""A step reads what an earlier step wrote: its layers' outlines, and bytes that the plan knew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aicompress import recipe
from aicompress.checkpoint import Checkpoint
from aicompress.errors import Refused
from aicompress.pipeline.layerwise.planner import make_plan
from aicompress.pipeline.layerwise.run import run
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination

STEPS = {
    "svd": ("factorize", "{name: svd, keep: 0.4, multiple: 4}"),
    "svd bytes": ("factorize", "{name: svd, target_bytes: 60kB, multiple: 4}"),
    "rtn": ("quantize", "{name: rtn, bits: 4, granularity: channel}"),
    "rtn asymmetric": ("quantize", "{name: rtn, bits: 3, granularity: channel, symmetric: false}"),
    "sparse": ("prune", "{name: magnitude, sparsity: 0.8, store: sparse}"),
    "global": ("prune", "{name: magnitude, sparsity: 0.5, scope: global}"),
    "2:4": ("prune", '{name: magnitude, pattern: "2:4", store: auto}'),
}


def step(source: Path, folder: Path, name: str) -> Path:
    """Run one step, and hold it to its plan."""
    command, method = STEPS[name]
    path = folder / f"{name.replace(':', '-')}.yaml"
    path.write_text(f"version: 1\nmethod: {method}\n", encoding="utf-8")
    out = folder / f"{source.stem}-{path.stem}.safetensors"
    plan = make_plan(source, Destination(out), recipe.load(str(path), command), command)
    report = run(plan, Options(latency="off"))
    assert out.stat().st_size == plan.output.weight_bytes == report.after.weight_bytes
    checkpoint = Checkpoint.open(out)
    for info in checkpoint.layers():
        layer = checkpoint.layer(info)
        assert layer.stored is not None
        if info.outline is None:
            assert layer.stored.form == info.stored == "dense"
        else:
            assert info.outline.specs() == layer.stored.specs()
            assert info.outline.meta() == layer.stored.meta()
    return out


@pytest.mark.parametrize("second", STEPS)
@pytest.mark.parametrize("first", STEPS)
def test_any_step_after_any_other(mlp_file: Path, tmp_path: Path, first: str, second: str) -> None:
    middle = step(mlp_file, tmp_path, first)
    try:
        last = step(middle, tmp_path, second)
    except Refused as refusal:
        assert first != "global", "a dense input is never refused"
        assert STEPS[second][0] == "factorize" or (first.startswith("rtn") and second == "sparse")
        problems = getattr(refusal, "problems", [refusal])
        assert all(problem.hint for problem in problems)
        return
    checkpoint = Checkpoint.open(last)
    assert all(torch.isfinite(checkpoint.dense(name)).all() for name in checkpoint.parameters())


def test_a_byte_budget_holds_for_the_whole_file(mlp_file: Path, tmp_path: Path) -> None:
    out = step(mlp_file, tmp_path, "svd bytes")
    assert 40_000 < out.stat().st_size <= 60_000
