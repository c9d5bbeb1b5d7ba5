"""The sweep over model types: outcomes are told apart, and one type that does not end ends nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from aicompress import recipe
from aicompress.model.architecture.small_models import tiny_model
from aicompress.model.architecture.small_models.tiny_inputs import inputs_of
from aicompress.model.loading.load import load
from aicompress.pipeline import steps
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from scripts.sweep import trial
from scripts.sweep.__main__ import main, over, tried
from scripts.sweep.configs import LARGEST, model_types, small_model
from scripts.sweep.table import markdown, read
from scripts.sweep.trial import ABSENT, FAULT, REFUSED, WORKS, Outcome


@pytest.mark.parametrize("model_type", ["llama", "mamba2", "detr", "swinv2", "esm", "dbrx"])
def test_small_models(model_type: str) -> None:
    """Where a backbone is of another library, fields are bound to each other, left to be given, or lacking."""
    assert model_type in model_types()
    model = small_model(model_type)
    assert sum(parameter.numel() for parameter in model.parameters()) <= LARGEST


@pytest.mark.parametrize("model_type", ["sam", "sam_hq", "sam2", "sam2_vision_model"])
def test_models_of_given_configurations_run(model_type: str) -> None:
    model = small_model(model_type)
    assert tiny_model.outputs_of(model, {name: value.float() for name, value in inputs_of(model).items()})


def test_outcomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BERT's blocks are too few for what is asked in the last step."""
    monkeypatch.setitem(trial.STEPS, "depth", ("prune", "depth-half", ("method.keep_layers=9",)))
    found = list(trial.trials("bert", ("magnitude", "gptq", "depth"), tmp_path))
    assert [(outcome.step, outcome.verdict) for outcome in found] == [
        ("build", WORKS),
        ("magnitude", WORKS),
        ("gptq", WORKS),
        ("depth", REFUSED),
    ]
    assert "9" in found[-1].reason
    assert [outcome.verdict for outcome in trial.trials("nothing", ("depth",), tmp_path)] == [ABSENT]


def test_noise_tells_a_model_that_picks_from_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rounding alone makes a model pick another one, other kernels may, too."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).requires_grad_(False)
    given = torch.ones(1, 4)
    layer.weight.data[1] = layer.weight.data[0]
    layer.bias.data[:2] = 9  # two that are alike
    smooth, picks = nn.Sequential(layer), nn.Sequential(layer, Largest())
    monkeypatch.setattr(trial, "inputs_of", lambda model: {"input": given})
    monkeypatch.setattr(trial.tiny_model, "outputs_of", lambda model, inputs: [model(**inputs)])
    shaken = [[trial._same(trial._outputs(m, seed), trial._outputs(m)) for seed in range(8)] for m in (smooth, picks)]
    assert all(shaken[0])
    assert not all(shaken[1])
    assert not layer._forward_hooks


@pytest.mark.parametrize("model_type", ["mamba", "t5", "cpmant"])
def test_fast_kernels_differ_from_the_reference_as_rounding_alone_does(model_type: str, tmp_path: Path) -> None:
    """CPM-Ant makes a tenth of its outputs of rounding at bfloat16, whatever computes it."""
    small_model(model_type).save_pretrained(tmp_path / "in")
    read = recipe.load("quantize/w8a8", "quantize", ["report.html=false"])
    steps.run(steps.make_plan(tmp_path / "in", Destination(tmp_path / "out"), read, "quantize"), Options(latency="off"))
    fast, reference = load(tmp_path / "out"), load(tmp_path / "out", kernels="reference")
    (wanted, *_), (given, *_) = trial._outputs(reference), trial._outputs(fast)
    shaken = [float((trial._outputs(reference, seed)[0] - wanted).norm()) for seed in range(3)]
    assert 0 < float((given - wanted).norm()) < 3 * max(shaken) < 0.6 * float(wanted.norm())


class Largest(nn.Module):
    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(given.argmax(-1), given.shape[-1]).float()


def test_a_type_that_does_not_end_is_a_fault_and_is_tried_once(tmp_path: Path) -> None:
    log = tmp_path / "outcomes.jsonl"
    tried("llama", ("magnitude",), log, seconds=0)
    (outcome,) = read(log)
    assert (outcome.verdict, outcome.reason) == (FAULT, "after 0 s the process ended")
    assert main(["--folder", str(tmp_path), "--table"]) == 0
    assert "1 of 804 model types tried" in (tmp_path / "table.md").read_text().replace(f"{len(model_types())}", "804")


def test_the_table_counts_and_names(tmp_path: Path) -> None:
    outcomes = [Outcome("a", "build", WORKS), Outcome("a", "width", WORKS), Outcome("b", "build", WORKS)]
    outcomes += [Outcome("b", "width", REFUSED, "model.layers.3.mlp.up has 12"), Outcome("b", "heads", FAULT, "x|y")]
    log = tmp_path / "log"
    log.write_text("".join(json.dumps(outcome.as_row()) + "\n" for outcome in outcomes))
    text = markdown(read(log), 3)
    assert text.startswith("2 of 3 model types tried, 2 built small")
    assert "| width | 1 | 1 | 0 |" in text
    assert "| heads | x/y | 1: b |" in text
    assert "| width | TENSOR has N | 1: b |" in text


def test_a_type_that_a_stopped_sweep_had_begun_with_is_tried_again(tmp_path: Path) -> None:
    """Its last steps are not there; of those that ended by themselves there is no more to come."""
    outcomes = [
        *(Outcome("whole", step, WORKS) for step in ("build", "magnitude", "depth")),
        *(Outcome("begun", step, WORKS) for step in ("build", "magnitude")),
        Outcome("absent", "build", ABSENT, "of another library"),
        Outcome("faulty", "build", WORKS),
        Outcome("faulty", "magnitude", FAULT, "ValueError"),
    ]
    assert over(outcomes, ["magnitude", "depth"]) == {"whole", "absent"}
    tried("llama", ("magnitude", "depth"), tmp_path / "log", 0.0)
    assert over(read(tmp_path / "log"), ["magnitude", "depth"]) == {"llama"}
