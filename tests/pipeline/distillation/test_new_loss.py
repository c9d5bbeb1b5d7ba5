"""A loss is added by one file: recipes, their schema, the command line and training find it by themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from aicompress.checkpoint import Checkpoint
from aicompress.cli.app import app
from aicompress.errors import RecipeError
from aicompress.methods import distill, get
from aicompress.methods.losses import DistillMethod
from aicompress.recipe.distillation import load
from aicompress.recipe.schema import schema
from aicompress.report.model import Report
from tests.methods.distill.contract import require_contract

FILE = '''
"""Total variation between the softmax of two models' logits: mean over positions of sum |p_s - p_t| / 2."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from aicompress.methods.distill.logits import READS, check_logits
from aicompress.methods.outputs import wanted
from aicompress.methods.losses import DistillMethod, LossConfig


class Config(LossConfig):
    """Parameters of variation."""

    name: Literal["variation"] = "variation"
    power: float = Field(1.0, gt=0, description="exponent of the differences")


def loss(student, teacher, config):
    ours, theirs = (wanted(side.logits, "logits").float().softmax(-1) for side in (student, teacher))
    return (ours - theirs).abs().pow(config.power).sum(-1).mean() / 2


def check(student, teacher, config):
    return check_logits(student, teacher, 1.0)


METHOD = DistillMethod(
    "variation", "distill", "total variation between predictions", Config, loss=loss, reads=READS, check=check,
    when="never: it shows how a loss is added",
)
'''


@pytest.fixture
def added(joins: Callable[[ModuleType, str, str], None]) -> None:
    """The loss `variation`."""
    joins(distill, "variation", FILE)


def written(folder: Path, text: Path, **sections: Any) -> str:
    plain = {
        "version": 1,
        "data": {"text": str(text), "length": 32},
        "training": {"steps": 2, "batch": 4, "evaluate_every": 1, "precision": "fp32", "learning_rate": 1e-3},
        **sections,
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(plain))
    return str(path)


@pytest.mark.usefixtures("added")
def test_the_command_line_distils_with_it(
    tiny_llama: Path, trained_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = written(tmp_path, text_file, method={"name": "variation"}, also=[{"name": "kl", "weight": 0.5}])
    out = tmp_path / "out"
    arguments = ["distill", str(tiny_llama), str(out), "--teacher", str(trained_llama), "-r", recipe]
    done = CliRunner().invoke(app, [*arguments, "--latency", "off", "--quiet"])
    assert done.exit_code == 0, done.output
    report = Report.from_json((out / "report.json").read_text(encoding="utf-8"))
    assert report.training["loss"] == "1 variation + 0.5 kl"
    assert [point["step"] for point in report.training["curve"]] == [0, 1, 2]
    assert report.training["held_out_after"] < report.training["held_out_before"]
    assert report.recipe["method"] == {"name": "variation", "weight": 1.0, "power": 1.0}
    before, after = Checkpoint.open(tiny_llama), Checkpoint.open(out)
    name = next(name for name in after.tensors if name.endswith("up_proj.weight"))
    assert not torch.equal(before.read(name), after.read(name))


@pytest.mark.usefixtures("added")
def test_the_contract_holds_for_it() -> None:
    method = get("distill", "variation")
    assert isinstance(method, DistillMethod)
    require_contract(method)


@pytest.mark.usefixtures("added")
def test_recipes_and_their_schema_know_its_parameters(tmp_path: Path, text_file: Path) -> None:
    recipe = load(written(tmp_path, text_file, method={"name": "kl"}, also=[{"name": "variation", "power": 2}]))
    assert recipe.resolved()["also"] == [{"name": "variation", "weight": 1.0, "power": 2.0}]
    with pytest.raises(RecipeError, match=r"method\.powr: unknown key") as caught:
        load(written(tmp_path, text_file, method={"name": "variation", "powr": 2}))
    assert "'power'" in caught.value.hint
    properties = schema("distill")["properties"]
    for options in (properties["method"]["oneOf"], properties["also"]["items"]["oneOf"]):
        (shown,) = (option for option in options if option["properties"]["name"]["const"] == "variation")
        assert shown["properties"]["power"]["description"] == "exponent of the differences"


@pytest.mark.usefixtures("added")
def test_the_list_of_methods_shows_it() -> None:
    shown = CliRunner().invoke(app, ["methods", "distill"]).output
    assert "variation   total variation between predictions" in shown
    assert "exponent of the differences" in shown


def test_without_its_file_there_is_no_such_loss(tmp_path: Path, text_file: Path) -> None:
    with pytest.raises(RecipeError, match="no method 'variation'"):
        load(written(tmp_path, text_file, method={"name": "variation"}))
