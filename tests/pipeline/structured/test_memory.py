"""A structural step without data holds blocks of rows: its memory does not grow with the largest tensors.

Each step runs in a process of its own, on a model and on one with four times the tokens and neurons.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tests import checkpoints

ROOT = Path(__file__).parents[3]
SHARE = 0.5  # of what the largest tensor has more, for what is freed late
METHODS: list[dict[str, Any]] = [
    {"name": "depth", "keep_layers": 1},
    {"name": "width", "sparsity": 0.5},
    {"name": "hidden", "sparsity": 0.25},
]
MEASURE = """
import ctypes, json, os, sys
from pathlib import Path
import torch
from aicompress.measure import peak_rss
from aicompress.pipeline import steps
from aicompress.pipeline.step import blocks
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import load

if sys.platform == "linux":  # what is freed goes back at once: M_MMAP_THRESHOLD and M_ARENA_MAX
    ctypes.CDLL(None).mallopt(-3, 1 << 17), ctypes.CDLL(None).mallopt(-8, 1)
torch.set_num_threads(1)
blocks.BLOCK >>= 4
folder = Path(sys.argv[1])

def pruned(name, number):
    recipe = load(folder / f"{number}.yaml", "prune", ())
    plan = steps.make_plan(folder / name, Destination(folder / f"{os.getpid()}-{name}"), recipe, "prune")
    steps.run(plan, Options(latency="off"))

for number in range(int(sys.argv[2])):
    for name in ("small", "large"):
        if os.fork():
            assert os.wait()[1] == 0
            continue
        pruned("tiny", number)  # libraries set themselves up
        before = peak_rss()
        pruned(name, number)
        print(json.dumps([number, name, peak_rss() - before]), flush=True)
        os._exit(0)
"""


def test_memory_does_not_grow_with_tensors(python: list[str], tmp_path: Path) -> None:
    for name, tokens in (("tiny", 64), ("small", 1 << 12), ("large", 1 << 14)):
        checkpoints.make_llama(
            tmp_path / name,
            vocab_size=tokens,
            intermediate_size=tokens,
            hidden_size=256,
            num_hidden_layers=2,
            tie_word_embeddings=True,
        )
    for number, method in enumerate(METHODS):
        (tmp_path / f"{number}.yaml").write_text(json.dumps({"version": 1, "method": method}))
    done = subprocess.run(
        [*python, "-c", MEASURE, str(tmp_path), str(len(METHODS))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {(number, name): peak for number, name, peak in map(json.loads, done.stdout.splitlines())}
    more = 4 * 256 * ((1 << 14) - (1 << 12))
    grown = {m["name"]: (found[n, "large"] - found[n, "small"]) / more for n, m in enumerate(METHODS)}
    assert {method: share for method, share in grown.items() if share > SHARE} == {}
