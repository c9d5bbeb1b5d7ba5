"""A calibrated step holds one block at a time: memory does not grow with depth."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests import checkpoints

WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "head_dim": 64}
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    method = {"name": "wanda", "sparsity": 0.5, "refit": False}
    data = {"text": str(text_file), "samples": 4, "length": 32}
    path.write_text(json.dumps({"version": 1, "method": method, "calibration": data}))
    return path


def peak(python: list[str], folder: Path, recipe: Path, blocks: int) -> tuple[int, int]:
    """Bytes of the weights, and the most memory that a process of its own held."""
    source = checkpoints.make_llama(folder / f"llama-{blocks}", num_hidden_layers=blocks, **WIDE)
    command = [*python, "-m", "aicompress", "prune", str(source), str(folder / f"out-{blocks}"), "-r"]
    done = subprocess.run(
        [*command, str(recipe), "--latency", "off", "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    return report["before"]["weight_bytes"], report["peak_rss"]


def test_memory_does_not_grow_with_depth(python: list[str], tmp_path: Path, recipe: Path) -> None:
    (shallow, small), (deep, large) = (peak(python, tmp_path, recipe, blocks) for blocks in (4, 16))
    assert deep - shallow > 100_000_000
    assert large - small < 0.5 * (deep - shallow)  # the allocator's slack is some tens of megabytes
