"""Units scored by gradients: w² E[g²] over a unit's weights, by hand with autograd; with a refit; from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from aicompress.errors import CompressError
from aicompress.pipeline.calibration.request import Request
from aicompress.pipeline.layerwise import planner
from aicompress.pipeline.layerwise import run as layerwise
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import load
from tests.pipeline.calibration.steps import OFF, text
from tests.pipeline.structured.test_calibrated import divergence, prune, recipe, windows

TAYLOR = {"score": "taylor", "loss": "task"}


def sensitivities(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """w² E[g²] of every matrix, one sample after another."""
    total: dict[str, Tensor] = {}
    for each in ids:
        model.zero_grad()
        model(input_ids=each[None], labels=each[None]).loss.backward()
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and weight.grad is not None:
                change = (weight * weight.grad).detach().double().square() / len(ids)
                total[name] = total[name] + change if name in total else change
    return total


def test_neurons_by_hand(tmp_path: Path, trained_llama: Path, text_file: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(trained_llama)
    found = sensitivities(model, windows(trained_llama, text_file, 4))
    report = prune(trained_llama, tmp_path / "out", recipe(tmp_path, text(text_file, 4), {
        "name": "width", "sparsity": 0.5, **TAYLOR}))  # fmt: skip
    narrow = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for number, layer in enumerate(model.model.layers):
        of = {name: found[f"model.layers.{number}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")}
        best = (of["gate"].sum(1) + of["up"].sum(1) + of["down"].sum(0)).topk(64).indices.sort().values
        assert torch.equal(narrow.model.layers[number].mlp.up_proj.weight, layer.mlp.up_proj.weight[best])
    assert report.calibration["data"][0]["samples"] == 4


def test_heads_by_hand(tmp_path: Path, trained_llama: Path, text_file: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(trained_llama)
    found = sensitivities(model, windows(trained_llama, text_file, 4))
    method = {"name": "heads", "heads": 2, **TAYLOR}
    prune(trained_llama, tmp_path / "out", recipe(tmp_path, text(text_file, 4), method))
    narrow = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for number, layer in enumerate(model.model.layers):
        of = {name: found[f"model.layers.{number}.self_attn.{name}_proj.weight"] for name in "qkvo"}
        of["o"] = of["o"].t()
        best = int(sum(each.reshape(2, -1).sum(dim=1) for each in of.values()).argmax())
        keys = layer.self_attn.k_proj.weight.view(2, 16, -1)[best]
        assert torch.equal(narrow.model.layers[number].self_attn.k_proj.weight, keys)


def test_taylor_is_refitted_and_read_from_a_file(tmp_path: Path, trained_llama: Path, text_file: Path) -> None:
    ids = windows(trained_llama, text_file, 8)
    found = {}
    for name, fields in {"norm": {}, "taylor": TAYLOR, "refitted": {**TAYLOR, "refit": True}}.items():
        path = recipe(tmp_path, text(text_file, 8), {"name": "width", "sparsity": 0.5, **fields})
        prune(trained_llama, tmp_path / name, path)
        found[name] = divergence(trained_llama, tmp_path / name, ids)
    assert found["refitted"] < found["taylor"] < found["norm"]
    stats = Request(stats=(tmp_path / "stats.safetensors",))
    method = {"name": "width", "sparsity": 0.5, **TAYLOR}
    one = prune(trained_llama, tmp_path / "one", recipe(tmp_path, text(text_file, 8), method), stats)
    two = prune(trained_llama, tmp_path / "two", recipe(tmp_path, None, method), stats)
    plain = tmp_path / "taylor" / "model.safetensors"
    assert one.after.sha256 == two.after.sha256
    assert plain.read_bytes() == (tmp_path / "two" / "model.safetensors").read_bytes()


def test_factors_are_refused(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    ranks = tmp_path / "ranks.yaml"
    ranks.write_text(json.dumps({"version": 1, "method": {"name": "svd", "rank": 8}}))
    made = planner.make_plan(tiny_llama, Destination(tmp_path / "low"), load(str(ranks), "factorize"), "factorize")
    layerwise.run(made, OFF)
    method = {"name": "width", "sparsity": 0.5, **TAYLOR}
    with pytest.raises(CompressError, match="is a factor of one"):
        prune(tmp_path / "low", tmp_path / "out", recipe(tmp_path, text(text_file), method))
