"""Recipes of distill: every shipped one loads, and what is wrong is said with a hint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aicompress import recipe
from aicompress.errors import RecipeError
from aicompress.methods import methods
from aicompress.recipe.distillation import load
from aicompress.recipe.schema import schema

FILES = sorted((recipe.shipped() / "distill").glob("*.yaml"))
PLAIN = {"version": 1, "method": {"name": "kl"}, "data": {"text": "text.txt"}}


def write(folder: Path, **changes: Any) -> str:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({**PLAIN, **changes}))
    return str(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_recipe_loads_by_name(path: Path) -> None:
    loaded = load(f"distill/{path.stem}")
    assert all(loss.name in methods("distill") for loss in loaded.losses)
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_recipes_are_shipped_for_losses_of_every_kind_of_output() -> None:
    shown = {loss.name for path in FILES for loss in load(str(path)).losses}
    assert {"kl", "mse", "embedding", "hidden", "relation"} <= shown <= set(methods("distill"))


@pytest.mark.parametrize("name", methods("distill"))
def test_every_loss_has_a_recipe_of_two_lines(tmp_path: Path, name: str) -> None:
    loaded = load(write(tmp_path, method={"name": name}, also=[{"name": name, "weight": 0.5}]))
    assert [(loss.name, loss.weight) for loss in loaded.losses] == [(name, 1.0), (name, 0.5)]
    assert loaded.resolved()["method"] == loaded.method.model_dump(mode="json")


def test_the_schema_offers_every_loss_as_the_method_and_beside_it() -> None:
    properties = schema("distill")["properties"]
    for options in (properties["method"]["oneOf"], properties["also"]["items"]["oneOf"]):
        assert [option["properties"]["name"]["const"] for option in options] == list(methods("distill"))


def test_the_resolved_recipe_holds_every_parameter_and_loads_again(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, also=[{"name": "hidden", "weight": 0.5}]), ["training.steps=7"])
    resolved = loaded.resolved()
    assert resolved["method"] == {"name": "kl", "weight": 1.0, "temperature": 2.0, "alpha": 1.0}
    assert resolved["also"][0]["distance"] == "squarehead"
    assert resolved["training"]["steps"] == 7
    assert resolved["data"]["text"] == "text.txt"  # not where it lies on this machine
    (tmp_path / "again.yaml").write_text(json.dumps(resolved))
    assert load(str(tmp_path / "again.yaml")).sha256() == loaded.sha256()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "kll"}}, "no method 'kll'"),
        ({"method": {"temperature": 2}}, "method.name is missing"),
        ({"method": {"name": "kl", "temprature": 2}}, "method.temprature: unknown key"),
        ({"method": {"name": "kl", "alpha": 1.5}}, "method.alpha"),
        ({"method": {"name": "rtn"}}, "no method 'rtn'"),
        ({"also": {"name": "mse"}}, "also is not a list"),
        ({"also": [{"name": "mse", "wieght": 2}]}, r"also\[0\].wieght: unknown key"),
        ({"training": {"batch": 10, "accumulate": 4}}, "accumulate 4 does not divide batch 10"),
        ({"training": {"warmup": 1.0}}, "training.warmup"),
        ({"training": {"precision": "fp8"}}, "training.precision"),
        ({"data": {}}, "give exactly one of"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(write(tmp_path, **changes))
