"""Every shipped recipe loads, says what it is, and names itself after its method."""

from __future__ import annotations

from pathlib import Path

import pytest

from aicompress import recipe
from aicompress.methods import COMMANDS, methods
from aicompress.methods.layerwise import LayerMethod

FILES = [
    path
    for command in ("factorize", "quantize", "prune")
    for path in sorted((recipe.shipped() / command).glob("*.yaml"))
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_loads_by_name(path: Path) -> None:
    loaded = recipe.load(f"{path.parent.name}/{path.stem}", path.parent.name)
    assert loaded.method.name in methods(path.parent.name)
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_layerwise_method_has_a_recipe(command: str) -> None:
    shown = {recipe.load(str(path), command).method.name for path in FILES if path.parent.name == command}
    assert {name for name, method in methods(command).items() if isinstance(method, LayerMethod)} <= shown
