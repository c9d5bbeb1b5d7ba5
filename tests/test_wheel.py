"""The built wheel works from any folder: the command, the shipped recipes, the packaged files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built and unpacked into an empty folder; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("aicompress-*.whl")
    target = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], check=True)
    return target


def test_installed_package_is_the_one_that_runs(installed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import aicompress; print(aicompress.__file__)"]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip().startswith(str(installed))


def test_shipped_recipe_by_name_from_any_folder(
    python: list[str], installed: Path, tmp_path: Path, tiny_llama: Path
) -> None:
    out = tmp_path / "w4"
    command = [*python, "-m", "aicompress", "quantize", str(tiny_llama), str(out), "-r", "quantize/rtn-w4"]
    command += ["--set", "method.group_size=32", "--latency", "off"]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (out / "report.html").is_file()
    assert (out / "model.safetensors").stat().st_size < (tiny_llama / "model.safetensors").stat().st_size


def test_every_recipe_and_data_file_is_packaged(installed: Path) -> None:
    recipes = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}
    packaged = installed / "aicompress" / "configs"
    assert {path.relative_to(packaged) for path in packaged.rglob("*.yaml")} == recipes
    assert (installed / "aicompress" / "model" / "hf" / "modeling_aicompress.py").is_file()
    assert {path.name for path in (installed / "aicompress" / "report").iterdir()} >= {"template.html", "drawing.svg"}
    assert (installed / "aicompress" / "py.typed").is_file()  # type checkers read the package's own types
