"""A student that is learnt as codes is written as what was judged, and takes fewer bits where they cost more."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from aicompress import load as load_model
from aicompress.checkpoint import Checkpoint
from aicompress.errors import RecipeError
from aicompress.methods.distill.modes.epr import Config, bits, running, start, written
from aicompress.pipeline import export, steps
from aicompress.pipeline.distillation.plan import DistillPlan, make_plan
from aicompress.pipeline.distillation.run import run
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import load as load_recipe
from aicompress.recipe.distillation import load
from aicompress.recipe.made import ExportRecipe, Target
from aicompress.weights import IntGrouped, fixed_width

SEQUENTIAL = ["conv", "relu", "flatten", "fc1", "relu", "fc2"]


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """A network with a convolution, and images; half of the pixels are always black."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))

    tensors = {"conv.weight": draw(2, 1, 3, 3), "fc1.weight": draw(12, 32), "fc2.weight": draw(3, 12)}
    tensors |= {"conv.bias": draw(2), "fc1.bias": draw(12), "fc2.bias": draw(3)}
    save_file(tensors, tmp_path / "plain.safetensors")
    images = draw(64, 6, 6)
    images[:, :, 3:] = 0
    save_file({"x": images, "y": torch.arange(64) % 3}, tmp_path / "images.safetensors")
    return tmp_path / "plain.safetensors"


def planned(network: Path, out: str, mode: dict[str, Any], **others: Any) -> DistillPlan:
    settings = {"steps": 40, "batch": 16, "learning_rate": 1e-2, "clip": None, "precision": "fp32", "held_out": 0.25}
    plain = {
        "version": 1,
        "mode": {"name": "epr", **mode},
        "method": {"name": "mse"},
        "model": {"sequential": SEQUENTIAL},
        "data": {"arrays": str(network.with_name("images.safetensors")), "inputs": "x", "labels": "y"},
        "training": {**settings, "weight_decay": 0},
        "report": {"html": False},
        **others,
    }
    path = network.with_name("recipe.json")
    path.write_text(json.dumps(plain))
    teacher = None if "mean_teacher" in others else network
    return make_plan(network, teacher, Destination(network.with_name(f"{out}.safetensors")), load(str(path)))


def codes(path: Path) -> Tensor:
    checkpoint = Checkpoint.open(path)
    weights = [fixed_width(checkpoint.weight(name)) for name in checkpoint.parameters()]
    assert all(isinstance(weight, IntGrouped) for weight in weights)
    return torch.cat([weight.codes.flatten() for weight in weights if isinstance(weight, IntGrouped)])


def entropy(symbols: Tensor) -> float:
    share = symbols.unique(return_counts=True)[1] / symbols.numel()
    return float(-(share * share.log2()).sum())


def test_what_is_written_is_what_was_judged(network: Path) -> None:
    plan = planned(network, "free", {"rate": 1e-6})
    report = run(plan, Options(latency="off"))
    free = network.with_name("free.safetensors")
    assert report.after.weight_bytes == plan.output.weight_bytes == free.stat().st_size
    assert {row.form for row in report.layers} == {"int_grouped"}
    batch = plan.samples.batch(plan.split.held_out).inputs[""]
    ours, theirs = (
        load_model(path, model=plan.module_of(plan.checkpoint), kernels="reference")(batch) for path in (free, network)
    )
    assert float((ours - theirs).square().mean()) == pytest.approx(report.training["held_out_after"], rel=1e-5)
    assert report.training["held_out_after"] < report.training["held_out_before"]

    run(planned(network, "dear", {"rate": 1.0}, storage="entropy"), Options(latency="off"))
    stored, small = (network.with_name(f"{name}.safetensors") for name in ("dear", "small"))
    plan = export.make_plan(stored, Destination(small), ExportRecipe(method=Target(name="compact")))
    export.run(plan, Options(latency="off"))
    cheap, dear = codes(free), codes(small)
    assert small.stat().st_size < stored.stat().st_size < free.stat().st_size
    pruned = network.with_name("pruned.safetensors")  # biases, which are no layers, go along as they are
    further = steps.make_plan(small, Destination(pruned), load_recipe("prune/magnitude-50", "prune"), "prune")
    steps.run(further, Options(latency="off"))
    assert (codes(pruned) == 0).float().mean() >= 0.5
    assert entropy(dear) < 0.7 * entropy(cheap)
    assert (dear == 0).sum() > (cheap == 0).sum()


def test_what_cannot_be_is_refused(network: Path) -> None:
    with pytest.raises(RecipeError, match="mode epr has no mean teacher"):
        planned(network, "out", {}, mean_teacher={}, method={"name": "consistency"})
    quantized = network.with_name("quantized.safetensors")
    plan = steps.make_plan(network, Destination(quantized), load_recipe("quantize/rtn-w8", "quantize"), "quantize")
    steps.run(plan, Options(latency="off"))
    with pytest.raises(RecipeError, match="is compressed already"):
        planned(quantized, "out", {})


def test_bits_are_those_of_the_density() -> None:
    matrix = torch.linspace(-3, 3, 35).reshape(5, 7)
    learnt = start(matrix, Config())
    assert torch.equal(running(matrix, learnt), written(matrix, learnt).dense())
    width, step = 1.03, float(learnt["step"].exp())
    position = (matrix / step).round()
    chance = torch.sigmoid((position + 0.5) / width) - torch.sigmoid((position - 0.5) / width)
    assert float(bits(matrix, learnt, None)) == pytest.approx(float(-chance.log2().sum()), rel=1e-3)


def test_bits_have_the_gradients_of_the_density() -> None:
    given = (
        torch.tensor([[-2.3, -0.2, 0.4, 20.0]], dtype=torch.float64),
        {"step": torch.zeros(1, dtype=torch.float64)},
    )
    learnt = {
        "outputs": torch.tensor([0.1], dtype=torch.float64),
        "inputs": torch.tensor([0, -0.2, 0.3, -0.1]).double(),
    }
    tensors = [tensor.requires_grad_() for tensor in (given[0], *given[1].values(), *learnt.values())]

    def whole(matrix: Tensor, step: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
        return bits(matrix, {"step": step, "outputs": outputs, "inputs": inputs}, torch.full_like(matrix, 0.1))

    assert torch.autograd.gradcheck(whole, tensors)


def test_gradients_pass_rounding_and_stop_at_the_largest_code() -> None:
    matrix = torch.tensor([[0.3, -0.9], [500.0, -1.4]], requires_grad=True)
    step = torch.tensor([0.1], requires_grad=True)
    upstream = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    size = step.exp()
    position = (matrix / size).clamp(-127, 127)
    straight = (position + (position.round() - position).detach()) * size
    ours = running(matrix, {"step": step})
    assert torch.equal(ours, straight)
    for expected, given in zip(
        torch.autograd.grad(straight, [matrix, step], upstream),
        torch.autograd.grad(ours, [matrix, step], upstream),
        strict=True,
    ):
        assert torch.allclose(given, expected, rtol=1e-5)
