"""The training loop's parts: the rate, the optimizer's groups, the saved state."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from aicompress.methods.distill import kl
from aicompress.methods.modes import code_rate
from aicompress.methods.outputs import Outputs
from aicompress.pipeline.distillation.loop.state import Point, StateFile, TrainingHistory
from aicompress.pipeline.distillation.teachers.teacher import Loss
from aicompress.pipeline.distillation.trained.optimizer import TrainedParameters, optimizer, rate
from aicompress.recipe.distillation import Training


def test_the_rate_rises_then_falls_along_a_cosine() -> None:
    settings = Training(steps=20, warmup=0.2)
    rates = [rate(step, settings) for step in range(20)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[12] == pytest.approx(0.5)  # half of the sixteen steps after the warm-up
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] > 0


def test_a_loss_has_the_temperature_and_the_weight_of_its_step() -> None:
    student, teacher = Outputs(torch.tensor([[1.0, 0.0]])), Outputs(torch.tensor([[0.0, 2.0]]))
    loss = Loss(((kl.METHOD, kl.Config(temperature=(4.0, 2.0), weight=3.0, ramp=0.5)),))
    for done, temperature, weight in ((0.0, 4.0, 3 * math.exp(-5)), (0.5, 3.0, 3.0), (1.0, 2.0, 3.0)):
        expected = weight * float(kl.loss(student, teacher, kl.Config(temperature=temperature)))
        assert float(loss(student, teacher, done)) == pytest.approx(expected)
    assert loss(student, teacher).equal(loss(student, teacher, 1.0))


def test_there_may_be_no_warm_up() -> None:
    assert rate(0, Training(steps=10, warmup=0)) == 1.0


def test_scales_move_in_proportion_and_only_matrices_decay() -> None:
    parameters = {
        "fc.weight": nn.Parameter(torch.ones(2, 2)),
        "fc.weight_scale": nn.Parameter(torch.full((2, 1), 0.01)),
        "sparse.weight_values": nn.Parameter(torch.ones(3)),
        "fc.bias": nn.Parameter(torch.ones(2)),
        "table.weight": nn.Parameter(torch.ones(2, 2)),
    }
    dtypes = dict.fromkeys(parameters, torch.float32)
    latent = {"table.weight": 0.5}
    rate_of = partial(code_rate, None)
    trained = TrainedParameters(parameters, dtypes, {}, {"fc.weight_scale": 0.01}, latent, rate_of)
    made = optimizer(trained, Training(learning_rate=1e-2, weight_decay=0.1, steps=300))
    found = {id(p): group for group in made.param_groups for p in group["params"]}
    peaks = {name: found[id(p)]["peak"] for name, p in parameters.items()}
    decays = {name: found[id(p)]["weight_decay"] for name, p in parameters.items()}
    assert peaks["fc.weight_scale"] == pytest.approx(1e-4)
    assert peaks["fc.weight"] == peaks["fc.bias"] == 1e-2
    assert peaks["table.weight"] == pytest.approx(0.5 * 1.5 / 300)  # of a grid step, and steps are 0.5 wide
    still = ("fc.weight_scale", "fc.bias", "table.weight")
    assert decays == {"fc.weight": 0.1, "sparse.weight_values": 0.1, **dict.fromkeys(still, 0.0)}


def test_a_saved_state_comes_back(tmp_path: Path) -> None:
    state = StateFile(tmp_path)
    assert state.load() is None
    history = TrainingHistory(
        step=7, best_step=4, curve=[Point(0, None, 1.0), Point(4, 0.75, 0.5)], running=0.25, samples=56
    )
    tensors = {"weight.fc": torch.randn(3, 3), "moment.fc/step": torch.tensor(7.0)}
    state.save(TrainingHistory(curve=[Point(0, None, 1.0)]), tensors)
    state.save(history, tensors)
    found = state.load()
    assert found is not None
    assert found[0] == history
    assert all(torch.equal(found[1][name], tensor) for name, tensor in tensors.items())
    assert history.before == 1.0
    assert history.best == 0.5
    assert sorted(path.name for path in state.folder.iterdir()) == ["state-7.safetensors", "state.json"]


def test_a_kill_while_saving_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = StateFile(tmp_path)
    state.save(TrainingHistory(step=1, curve=[Point(0, None, 1.0)]), {"weight.fc": torch.zeros(2)})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("json.dumps", killed)  # after the tensors, before what names them
    with pytest.raises(KeyboardInterrupt):
        state.save(TrainingHistory(step=2), {"weight.fc": torch.ones(2)})
    found = state.load()
    assert found is not None
    assert found[0].step == 1
    assert torch.equal(found[1]["weight.fc"], torch.zeros(2))
