"""Methods that factorize a Gram matrix hold few copies of it: the widest layer decides how much memory a step takes.

Those that make one of the weight's rows hold no copy of the weight.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Most memory during a call, in float32 matrices of the Gram's size beside the one that is given; one in float64 is two.
LIMITS = {
    "quantize gptq {}": 4.2,  # measured 3.6: H⁻¹'s factor in float64, and in float32
    "prune sparsegpt {'sparsity': 0.5}": 4.0,  # 3.4: the same
    "prune wanda {'sparsity': 0.5}": 5.0,  # 4.4: H in float64, and its factor
    "prune alps {'sparsity': 0.5, 'stages': 1}": 5.2,  # 4.4: H in float64 and float32, H⁻¹ beside it
}
# The same of a tall layer, in matrices of the weight's size.
TALL = {
    "factorize svd {'rank': 48}": 0.65,  # measured 0.50: a block of rows in float64, or the factors
}
MEASURE = """
import ctypes, json, os, resource, sys
import torch
from aicompress.layer import Layer, LayerInfo
from aicompress.statistics import InputStats
from aicompress.methods import get

def wide(width):
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(256, width, generator=draw)
    weight = torch.randn(16, width, generator=draw)
    gram = rows.t() @ rows / len(rows)
    shape = (len(weight), width)
    info = LayerInfo("fc", "fc.weight", "linear", shape, shape, torch.float32)
    return Layer(info, weight, None, InputStats.of(len(rows), gram, {}))

def most():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

if sys.platform == "linux":  # what is freed goes back at once: M_MMAP_THRESHOLD and M_ARENA_MAX
    ctypes.CDLL(None).mallopt(-3, 1 << 20), ctypes.CDLL(None).mallopt(-8, 1)
def tall(rows):
    weight = torch.randn(rows, 512, generator=torch.Generator().manual_seed(0))
    return Layer(LayerInfo("fc", "fc.weight", "linear", weight.shape, weight.shape, torch.float32), weight)

torch.set_num_threads(1)
for given in json.loads(sys.argv[1]):
    command, name, fields = given.split(" ", 2)
    method = get(command, name)
    config = method.config(**eval(fields))
    small, large = (wide(256), wide(1536)) if command != "factorize" else (tall(64), tall(24576))
    unit = (large.inputs.gram if large.inputs else large.weight).nbytes
    if os.fork():
        assert os.wait()[1] == 0
        continue
    method.apply(small, config)  # libraries set themselves up
    before = most()  # a new process starts at what it holds, whatever was held before it
    method.apply(large, config)
    print(json.dumps([given, (most() - before) / unit]), flush=True)
    os._exit(0)
"""


def test_copies_of_the_gram_matrix(bare_python: list[str]) -> None:
    done = subprocess.run(
        [*bare_python, "-c", MEASURE, json.dumps(list(LIMITS | TALL))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = dict(map(json.loads, done.stdout.splitlines()))
    limits = LIMITS | TALL
    assert found.keys() == limits.keys()
    assert {given: copies for given, copies in found.items() if copies > limits[given]} == {}
