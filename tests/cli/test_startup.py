"""What a command imports: a step on a small file waits for nothing that it does not use."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM = """
import sys
sys.argv = ["aicompress", *sys.argv[1:]]
from aicompress.cli import main
try:
    main()
finally:
    print("|".join(sys.modules), file=sys.stderr)
"""
SLOW = {
    "transformers", "accelerate", "datasets", "pyarrow", "pandas", "matplotlib", "sympy", "numba", "huggingface_hub",
    "torch_pruning", "torch._dynamo", "torch._inductor",
}  # fmt: skip
Imported = Callable[..., set[str]]
TIMING = {"aicompress.pipeline.step.timing.layer_latency"}
PAGE = {"jinja2", "aicompress.report.html", "aicompress.report.plots", "aicompress.report.drawing"}


@pytest.fixture
def imported(bare_python: list[str]) -> Imported:
    """Run a command; the modules that it has imported when it ends."""

    def modules(*arguments: str) -> set[str]:
        done = subprocess.run([*bare_python, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return set(done.stderr.strip().splitlines()[-1].split("|"))

    return modules


@pytest.mark.parametrize(
    ("command", "recipe"),
    [("quantize", "quantize/rtn-w4-channel"), ("factorize", "factorize/svd-keep"), ("prune", "prune/magnitude-50")],
)
def test_a_step_on_a_file_of_tensors_imports_nothing_slow(
    imported: Imported, command: str, recipe: str, mlp_file: Path, tmp_path: Path
) -> None:
    modules = imported(command, str(mlp_file), str(tmp_path / "out.safetensors"), "-r", recipe)
    assert not SLOW & modules
    assert (tmp_path / "out.report.html").is_file()
    others = {name for name in modules if name.startswith(f"aicompress.methods.{command}.")}
    assert f"aicompress.methods.{command}.{recipe.partition('/')[2].partition('-')[0]}" in others
    assert not {"aicompress.pipeline.channels", "aicompress.pipeline.structured"} & modules


def test_a_compressed_file_opens_without_anything_slow(imported: Imported, mlp_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    imported("quantize", str(mlp_file), str(out), "-r", "quantize/rtn-w4-channel", "--latency", "off")
    assert not SLOW & imported("inspect", str(out))
    assert not {"aicompress.checkpoint", "aicompress.weights"} & imported("compare", str(out), str(out))  # and no torch


def test_what_is_switched_off_is_not_imported(imported: Imported, mlp_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    arguments = ("quantize", str(mlp_file), str(out), "-r", "quantize/rtn-w4-channel")
    assert imported(*arguments) >= TIMING | PAGE
    modules = imported(*arguments, "--overwrite", "--latency", "off", "--set", "report.html=false")
    assert not (TIMING | PAGE | SLOW) & modules
    assert not (tmp_path / "out.report.html").exists()  # not even the page of the output before
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["latency"] is None
    assert (tmp_path / "out.report.md").is_file()


def test_the_page_is_no_part_of_what_is_stored(bare_python: list[str], mlp_file: Path, tmp_path: Path) -> None:
    source, recipe = str(mlp_file), ["-r", "quantize/rtn-w4-channel", "--latency", "off"]
    outs = [tmp_path / "with.safetensors", tmp_path / "without.safetensors"]
    shown = []
    for out, html in zip(outs, ("true", "false"), strict=True):
        command = [*bare_python, "-m", "aicompress", "quantize", source, str(out), *recipe]
        command += ["--set", f"report.html={html}"]
        shown.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert shown[0].rstrip().endswith(f"report: {tmp_path / 'with.report.html'}")
    assert shown[1].rstrip().endswith(f"report: {tmp_path / 'without.report.md'}")
