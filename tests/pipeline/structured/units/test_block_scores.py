"""Blocks scored with data: influence by hand, with blocks skipped, by gradients; and what is missing is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn import functional

from aicompress.errors import CompressError
from aicompress.pipeline.calibration.request import Request
from tests.pipeline.calibration.steps import text
from tests.pipeline.structured.test_calibrated import logits, prune, recipe, windows


def influences(model: Any, blocks: Any, ids: Tensor) -> list[float]:
    """1 − E cos of what goes into each block and what comes out."""
    seen: list[tuple[Tensor, Tensor]] = []

    def see(module: Any, given: tuple[Tensor, ...], output: Any) -> None:
        seen.append((given[0], output if isinstance(output, Tensor) else output[0]))

    handles = [block.register_forward_hook(see) for block in blocks]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return [float(1 - functional.cosine_similarity(x, y, dim=-1).mean()) for x, y in seen]


@pytest.mark.parametrize("fixture", ["trained_llama", "tiny_gpt2"])
def test_the_block_of_least_influence_goes(
    tmp_path: Path, text_file: Path, fixture: str, request: pytest.FixtureRequest
) -> None:
    source: Path = request.getfixturevalue(fixture)
    model = hf.AutoModelForCausalLM.from_pretrained(source)
    blocks = model.model.layers if fixture == "trained_llama" else model.transformer.h
    found = influences(model, blocks, windows(source, text_file))
    method = {"name": "depth", "drop_layers": 1, "strategy": "influence"}
    report = prune(source, tmp_path / "out", recipe(tmp_path, text(text_file), method))
    least = min(range(len(found)), key=lambda block: found[block])
    assert any(f"dropped block {least} of {len(found)}" in line for line in report.notes)
    assert report.calibration["data"][0]["samples"] == 8
    narrow = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert narrow.config.num_hidden_layers == len(found) - 1


def test_one_at_a_time_measures_the_others_without_it(tmp_path: Path, trained_llama: Path, text_file: Path) -> None:
    ids, gone = windows(trained_llama, text_file), []
    model = hf.AutoModelForCausalLM.from_pretrained(trained_llama)
    for _ in range(2):
        left = [block for block in range(3) if block not in gone]
        found = influences(model, model.model.layers, ids)
        least = min(range(len(left)), key=lambda place: found[place])
        gone.append(left[least])
        del model.model.layers[least]
        model.config.num_hidden_layers -= 1
        for place, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = place
    method = {"name": "depth", "drop_layers": 2, "strategy": "influence", "one_by_one": True}
    report = prune(trained_llama, tmp_path / "out", recipe(tmp_path, text(text_file), method))
    assert any(f"dropped blocks {', '.join(map(str, sorted(gone)))} of 3" in line for line in report.notes)


def test_taylor_drops_the_block_of_least_gradient(tmp_path: Path, trained_llama: Path, text_file: Path) -> None:
    model, ids = hf.AutoModelForCausalLM.from_pretrained(trained_llama), windows(trained_llama, text_file, 4)
    total = torch.zeros(3, dtype=torch.float64)
    for each in ids:
        model.zero_grad()
        model(input_ids=each[None], labels=each[None]).loss.backward()
        for name, weight in model.model.layers.named_parameters():
            if weight.ndim == 2:
                total[int(name.split(".")[0])] += (weight * weight.grad).double().square().sum()
    method = {"name": "depth", "drop_layers": 1, "strategy": "taylor", "loss": "task"}
    report = prune(trained_llama, tmp_path / "out", recipe(tmp_path, text(text_file, 4), method))
    assert any(f"dropped block {int(total.argmin())} of 3" in line for line in report.notes)


@pytest.mark.parametrize("strategy", ["influence", "taylor"])
def test_what_is_missing_is_refused(tmp_path: Path, tiny_llama: Path, text_file: Path, strategy: str) -> None:
    method = {"name": "depth", "drop_layers": 1, "strategy": strategy}
    with pytest.raises(CompressError, match="needs calibration data"):
        prune(tiny_llama, tmp_path / "out", recipe(tmp_path, None, method))
    stats = Request(stats=(tmp_path / "s.safetensors",))
    with pytest.raises(CompressError, match="files of statistics do not hold"):
        prune(tiny_llama, tmp_path / "out", recipe(tmp_path, text(text_file), method), stats)
    odd = recipe(tmp_path, text(text_file), {"name": "depth", "drop_layers": 1, "one_by_one": True})
    with pytest.raises(CompressError, match="one_by_one measures influence"):
        prune(tiny_llama, tmp_path / "out", odd)
