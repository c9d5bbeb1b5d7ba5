"""README is true: its shell blocks run here, on a small checkpoint, in an empty folder; every command is in it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from aicompress.cli.app import app
from aicompress.methods.registry import COMMANDS, methods
from tests import checkpoints, inputs

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, mlp_file: Path) -> Path:
    """What README's commands find in their folder."""
    found = tmp_path_factory.mktemp("readme")
    shutil.copytree(tiny_llama, found / "model")
    shutil.copy(mlp_file, found / "mlp.safetensors")
    inputs.written(found / "text.txt", checkpoints.sentences(600))
    return found


def runnable(line: str) -> str:
    """`make` is only asked what it would do: the targets have runs of their own."""
    return line.replace("make ", f"make --dry-run --directory {ROOT} ", 1) if line.startswith("make ") else line


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory, python: list[str]) -> Path:
    """A folder with the command, which starts at once."""
    folder = tmp_path_factory.mktemp("bin")
    command = folder / "aicompress"
    command.write_text(f'#!/bin/sh\nexec {shlex.join(python)} -m aicompress "$@"\n')
    command.chmod(0o755)
    return folder


def test_shell_blocks_run(folder: Path, programs: Path) -> None:
    assert len(BLOCKS) >= 4
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    for block in BLOCKS:  # in order, in one folder: later blocks use what earlier ones made
        script = "\n".join(runnable(line) for line in block.splitlines())
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{block}\n{done.stderr}"


TABLE = re.findall(r"^\| .* \| `(aicompress [^`]+)` \|$", README, re.MULTILINE)


@pytest.mark.parametrize("line", TABLE)
def test_commands_of_the_first_table_are_planned(
    line: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each on a model as it comes; those that can only be run are given to the parser alone."""
    monkeypatch.chdir(folder)
    command, given, *rest = line.split()[1:]
    assert given in ("model", "out")
    words = [command, "model", *(str(tmp_path / word) if word in ("out", "healed") else word for word in rest)]
    plans = command in COMMANDS
    done = CliRunner().invoke(app, [*words, "--dry-run" if plans else "--help"])
    assert done.exit_code == 0, done.output


def test_recipes_that_are_named_are_shipped() -> None:
    texts = [page.read_text(encoding="utf-8") for page in (ROOT / "aicompress").rglob("*.py")]
    texts += [(ROOT / page).read_text(encoding="utf-8") for page in PAGES]
    named = {name for text in texts for name in re.findall(r"-r ((?!configs/)\w+/[\w-]+)", text)}
    assert len(named) > 20
    assert not [name for name in named if not (ROOT / "configs" / f"{name}.yaml").is_file()]


@pytest.mark.parametrize(
    "command", [*COMMANDS, "pack", "unpack", "eval", "inspect", "verify", "compare", "methods", "schema"]
)
def test_every_command_is_shown(command: str) -> None:
    assert f"aicompress {command}" in README


@pytest.mark.parametrize("command", COMMANDS)
def test_every_method_is_named(command: str) -> None:
    for name in methods(command):
        assert f"`{name}`" in README, f"README does not name {command} {name}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """To a file or a folder, or to a heading of the page, whose name is its words in lower case with dashes."""
    text = (ROOT / page).read_text(encoding="utf-8")
    headings = {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.M)}
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        assert (ROOT / target).exists(), target
        assert target or heading in headings, heading


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_files_and_folders_that_are_named_are_there(page: str) -> None:
    """A name in backticks that ends in / or in .py, and the function named behind a file."""
    rooms = [ROOT, ROOT / "aicompress", *(ROOT / "aicompress" / room for room in ("pipeline", "model"))]
    named = re.findall(r"`([\w/]+(?:/|\.py))(?:: (\w+))?`", (ROOT / page).read_text(encoding="utf-8"))
    assert len(named) > 5
    for name, function in named:
        places = [room / name for room in rooms if (room / name).exists()]
        assert places, name
        assert not function or any(re.search(rf"(def|class) {function}\b", place.read_text()) for place in places), name


@pytest.mark.parametrize("page", [*PAGES, "SECURITY.md"])
def test_options_that_are_named_are_there(page: str) -> None:
    """Those of commands, and of the programs beside the package that pages name."""
    command = get_command(app)
    known = {option for each in (command, *command.commands.values()) for own in each.params for option in own.opts}  # type: ignore[attr-defined]
    for path in (ROOT / "scripts").rglob("*.py"):
        known |= set(re.findall(r'"(--[a-z-]+)"', path.read_text(encoding="utf-8")))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (ROOT / page).read_text(encoding="utf-8")))
    others = {"--extra-index-url", "--nproc-per-node"}  # of pip and torchrun
    assert named <= known | {"--help", *others}, named - known
