"""The command starts fast, explains itself, and every command has examples."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aicompress import __version__
from aicompress.cli.app import app

COMMANDS = [command.name or "" for command in app.registered_commands]
ENTRY = [sys.executable, "-m", "aicompress"]
HEAVY = {"torch", "numpy", "transformers", "safetensors", "huggingface_hub", "matplotlib", "jinja2"}


def test_help_is_fast() -> None:
    """Processor time against that of the libraries the help needs, the best of several runs of each."""

    def seconds(command: list[str]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    libraries = [sys.executable, "-c", "import typer, rich.markdown, rich.table, rich.panel"]
    assert min(seconds([*ENTRY, "--help"]) for _ in range(3)) < 2.5 * min(seconds(libraries) for _ in range(3))


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["quantize", "--help"], ["eval", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from pathlib import Path
sys.argv = ["aicompress", *{arguments!r}]
try:
    import aicompress.cli as cli
    cli.main()
finally:
    print("|".join(sorted({HEAVY!r} & set(sys.modules))), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr.strip() == ""
    assert done.stdout


def test_the_module_is_the_command() -> None:
    done = subprocess.run([*ENTRY, "--version"], check=True, capture_output=True, text=True)
    assert done.stdout == f"aicompress {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_examples(name: str) -> None:
    done = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.output)
    assert done.exit_code == 0
    assert "Examples:" in plain
    assert f"aicompress {name} " in plain or f"aicompress {name}\n" in plain


def test_the_help_lists_every_command_and_the_exit_codes() -> None:
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    assert all(name in text for name in COMMANDS)
    assert "Exit codes" in text


@pytest.mark.parametrize("verb", ["factorize", "quantize", "prune"])
def test_a_recipe_may_be_left_out(verb: str, mlp_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    done = CliRunner().invoke(app, [verb, str(mlp_file), str(out), "--latency", "off", "--quiet"])
    assert done.exit_code == 0, done.output
    assert re.fullmatch(rf"recipe: {verb}/[\w-]+, as none was given\n", done.stderr)
