"""Every kind of step that compresses is run in one way: stopped, resumed, refused, short of disk, by processes."""

from __future__ import annotations

import dataclasses
import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from aicompress.checkpoint.place import working_path
from aicompress.errors import OutOfSpace, OutputExists, Refused
from aicompress.methods import get
from aicompress.pipeline import steps
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.step.run import STARTS_ANEW
from aicompress.recipe import Model, Recipe
from aicompress.report.model import Report
from tests import checkpoints
from tests.pipeline.ranks import Ranks

ROOT = Path(__file__).parents[3]
OFF = Options(latency="off")
MODEL = Model(sequential=("flatten", "fc1", "relu", "fc2", "relu", "fc3"))
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "layer-wise": ("quantize", {"name": "rtn", "bits": 8, "group_size": 16}),
    "structured": ("prune", {"name": "width", "sparsity": 0.5}),
    "channels": ("prune", {"name": "channels", "sparsity": 0.5}),
}


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of one kind on a small random checkpoint."""

    kind: str
    source: Path
    out: Path

    def plan(self, **changes: Any) -> steps.Planned:
        command, fields = METHODS[self.kind]
        method = get(command, fields["name"]).config(**{**fields, **changes})
        recipe = Recipe(version=1, method=method, model=MODEL if self.kind == "channels" else None)
        return steps.make_plan(self.source, Destination(self.out), recipe, command)

    def run(self, options: Options = OFF, **changes: Any) -> Report:
        return steps.run(self.plan(**changes), options)

    def elsewhere(self, folder: Path) -> Step:
        return dataclasses.replace(self, out=folder / self.out.name)

    def files(self) -> dict[str, bytes]:
        """All files of the output but its report, whose times differ from run to run."""
        paths = [self.out] if self.out.is_file() else [path for path in self.out.rglob("*") if path.is_file()]
        return {path.name: path.read_bytes() for path in paths if path.stem != "report"}


@pytest.fixture(params=METHODS)
def step(request: pytest.FixtureRequest, tmp_path: Path, tiny_llama: Path) -> Step:
    if request.param != "channels":
        return Step(request.param, tiny_llama, tmp_path / "out")
    torch.manual_seed(0)
    source = checkpoints.make_file(tmp_path / "mlp.safetensors", checkpoints.Mlp())
    return Step(request.param, source, tmp_path / "out.safetensors")


def interrupt(what: str, done: int, total: int) -> None:
    """What a user's Ctrl-C does half way."""
    if 2 * done >= total:
        raise KeyboardInterrupt


def test_an_interrupted_step_is_resumed_or_says_that_it_starts_anew(step: Step, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        step.run(dataclasses.replace(OFF, progress=interrupt))
    assert not step.out.exists()
    assert working_path(step.out).is_dir()
    written: list[str] = []
    report = step.run(Options(True, "off", lambda what, done, total: written.append(what)))
    whole = step.elsewhere(tmp_path / "whole")
    unbroken = whole.run()
    assert step.files() == whole.files()
    rows = [[dataclasses.replace(row, seconds=0.0) for row in each.layers] for each in (report, unbroken)]
    assert rows[0] == rows[1]
    assert len(written) > 1
    assert (STARTS_ANEW in report.warnings) == (step.kind != "layer-wise")
    assert STARTS_ANEW not in unbroken.warnings
    assert not working_path(step.out).exists()


def test_another_recipe_does_not_go_on_with_what_is_there(tmp_path: Path, tiny_llama: Path) -> None:
    step = Step("layer-wise", tiny_llama, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        step.run(dataclasses.replace(OFF, progress=interrupt))
    before = {path.name: path.read_bytes() for path in working_path(step.out).iterdir()}
    with pytest.raises(Refused, match="another input, recipe or version"):
        step.run(Options(resume=True, latency="off"), bits=4)
    assert {path.name: path.read_bytes() for path in working_path(step.out).iterdir()} == before


def test_an_output_that_came_after_the_plan_stays(step: Step) -> None:
    plan = step.plan()
    if step.out.suffix:
        step.out.write_bytes(b"mine")
    else:
        step.out.mkdir()
        (step.out / "mine.txt").write_bytes(b"mine")
    before = step.files()
    with pytest.raises(OutputExists, match="exists") as refused:
        steps.run(plan, OFF)
    assert refused.value.exit_code == 2
    assert step.files() == before
    assert not working_path(step.out).exists()


@contextmanager
def small_files() -> Iterator[None]:
    """A limit on file size is what a full disk looks like to a writer, and it needs no privileges."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_a_disk_that_cannot_take_the_output_leaves_nothing(step: Step) -> None:
    plan = step.elsewhere(step.out.parent / "new").plan()
    with small_files(), pytest.raises(OutOfSpace) as short:
        steps.run(plan, OFF)
    assert short.value.exit_code == 1
    assert not (step.out.parent / "new").exists()


def test_of_two_processes_the_first_one_writes_and_prints(tmp_path: Path, tiny_llama: Path, ranks: Ranks) -> None:
    step = Step("structured", tiny_llama, tmp_path / "out")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"version": 1, "method": METHODS[step.kind][1]}))
    printed = ranks.together(step.source, step.out, recipe, "--json", verb="prune")
    assert Report.from_json(printed) == Report.from_json((step.out / "report.json").read_text())
    alone = step.elsewhere(tmp_path / "alone")
    alone.run()
    assert step.files() == alone.files()
