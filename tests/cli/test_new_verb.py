"""A verb is added by its method's file, its command's file and a line of the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import aicompress
from aicompress.cli import app

METHOD = '''
"""Round every value to bfloat16."""

from __future__ import annotations

from typing import Literal

import torch

from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.method import MethodConfig
from aicompress.weights import Dense


class HalfConfig(MethodConfig):
    """Parameters of half."""

    name: Literal["half"] = "half"


def apply(layer, config):
    return Dense(layer.weight.bfloat16())


def outline(info, config):
    return Dense(torch.empty(info.shape, dtype=torch.bfloat16, device="meta"))


METHOD = LayerMethod(
    "half", "narrow", "values rounded to bfloat16", HalfConfig, apply=apply, outline=outline, when="halves float32"
)
'''
COMMAND = '''
"""`aicompress narrow`."""

from aicompress.cli.step import command_for

EXAMPLES = "Examples:"
command = command_for("narrow", "Round weights to a narrower type.")
'''


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a copy of the package, to which the verb `narrow` is added."""
    copied = tmp_path / "site" / "aicompress"
    shutil.copytree(Path(aicompress.__file__).parent, copied, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in (("methods/narrow/half.py", METHOD), ("cli/verbs/narrow.py", COMMAND)):
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_text(text)
    line = '    ("factorize", factorize, _STEPS),\n'
    lines = Path(app.__file__).read_text()
    assert line in lines
    added = lines.replace(line, f'{line}    ("narrow", import_module("aicompress.cli.verbs.narrow"), _STEPS),\n')
    (copied / "cli" / "app.py").write_text(
        added.replace("import typer\n", "import typer\nfrom importlib import import_module\n")
    )
    return copied.parent


def test_two_files_and_a_line_are_enough(package: Path, python: list[str], mlp_file: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("version: 1\nmethod: {name: half}\n")
    environment = {**os.environ, "PYTHONPATH": str(package)}
    for arguments in (
        ("narrow", str(mlp_file), "out.safetensors", "-r", "recipe.yaml", "--latency", "off"),
        ("verify", "out.safetensors"),
        ("methods", "narrow"),
    ):
        command = [*python, "-m", "aicompress", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "half" in done.stdout
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["command"] == "narrow"
    before, after = load_file(mlp_file), load_file(tmp_path / "out.safetensors")
    assert torch.equal(after["fc1.weight"].float(), before["fc1.weight"].bfloat16().float())
    assert torch.equal(after["fc1.bias"], before["fc1.bias"])
