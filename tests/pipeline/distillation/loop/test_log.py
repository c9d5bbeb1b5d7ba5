"""The log of a training run: every step once, also behind a stop; events that TensorBoard reads; a full disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from aicompress.errors import Refused
from aicompress.pipeline.distillation.loop.log import METRICS, TrainingLog
from aicompress.pipeline.distillation.plan import make_plan
from aicompress.pipeline.distillation.run import TrainingOptions, run
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe.distillation import DistillRecipe, load


@pytest.fixture
def recipe(tmp_path: Path, text_file: Path) -> DistillRecipe:
    settings = {"steps": 6, "batch": 4, "evaluate_every": 3, "learning_rate": 2e-3, "precision": "fp32"}
    plain = {"version": 1, "method": {"name": "kl"}, "data": {"text": str(text_file), "length": 16, "samples": 40}}
    (tmp_path / "recipe.yaml").write_text(json.dumps({**plain, "training": settings}))
    return load(str(tmp_path / "recipe.yaml"))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def scalars(folder: Path) -> list[tuple[str, int]]:
    """Names and steps of all numbers in a folder's events: records of a length, its sum, an event, and its sum."""
    found = []
    for path in sorted(folder.glob("events.*")):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            found += [(value.tag, event.step) for value in event.summary.value]
            content = content[16 + size :]
    return found


def test_every_step_is_logged_once_though_the_run_was_stopped(
    tiny_llama: Path, trained_llama: Path, recipe: DistillRecipe, tmp_path: Path
) -> None:
    logs = tmp_path / "logs"
    own = TrainingOptions(save_seconds=0, log_folder=logs)

    def stop(what: str, done: int, total: int) -> None:
        assert what.startswith("loss ")
        assert " tokens/s" in what
        if done == 4:
            raise KeyboardInterrupt

    def distil(**options: Any) -> Any:
        plan = make_plan(tiny_llama, trained_llama, Destination(tmp_path / "out"), recipe)
        return run(plan, Options(latency="off", **options), own)

    with pytest.raises(KeyboardInterrupt):
        distil(progress=stop)
    with (logs / METRICS).open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step"')  # of a step behind the saved state, and what a kill has cut
    with pytest.raises(Refused, match="the log of another run"):
        distil()
    report = distil(resume=True)
    told = lines(logs)
    assert [line["step"] for line in told if "loss" in line] == [1, 2, 3, 4, 5, 6]
    held_out = [(line["step"], line["held_out"]) for line in told if "held_out" in line]
    assert held_out == [(point["step"], point["held_out"]) for point in report.training["curve"]]
    assert told[-2]["learning_rate"] < told[2]["learning_rate"] < 2.1e-3
    assert {("loss", step) for step in range(1, 7)} | {("held_out", 6)} <= set(scalars(logs))


def test_tuned_blocks_log_the_loss_before_and_after(
    tiny_llama: Path, trained_llama: Path, recipe: DistillRecipe, tmp_path: Path
) -> None:
    plain = json.loads((tmp_path / "recipe.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(json.dumps({**plain, "mode": {"name": "blocks", "steps": 1, "samples": 4}}))
    plan = make_plan(tiny_llama, tiny_llama, Destination(tmp_path / "out"), load(str(tmp_path / "recipe.yaml")))
    run(plan, Options(latency="off"), TrainingOptions(log_folder=tmp_path / "logs"))
    assert [set(line) for line in lines(tmp_path / "logs")] == [{"step", "held_out"}] * 2


def test_a_full_disk_ends_the_log_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = TrainingLog(tmp_path / "logs")
    log.add(1, {"loss": 2.0})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log._events, "add_scalar", full)
    log.add(2, {"loss": 1.0})
    log.add(3, {"loss": 1.0})
    assert log.trouble == "the log ends at step 2: No space left on device"
    assert [line["step"] for line in lines(tmp_path / "logs")] == [1, 2]
