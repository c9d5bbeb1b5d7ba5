"""The widest layer decides how much memory a step takes: methods that factorize a Gram matrix hold few copies of it,
and those that read no data hold a block of rows of a layer."""

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
# The same of whole steps, in bytes of the layer, which has sixteen blocks of rows here.
STEPS = {
    "prune magnitude-50": 1.5,
    "prune magnitude-90-sparse": 1.5,
    "prune magnitude-2-4 method.store=dense": 1.5,
    "prune lamp-50 method.sparsity=null method.kept=1000000": 1.5,
    "quantize nf4": 1.5,
    "quantize rtn-w4-channel": 1.5,
}
MEASURE_STEPS = """
from pathlib import Path
from safetensors.torch import save_file
from aicompress import recipe
from aicompress.pipeline.layerwise import planner, row_blocks, run
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination

torch.set_num_threads(1)
row_blocks.BLOCK = 1 << 18
folder = Path(sys.argv[3])
for width in (256, 2048):
    draw = torch.Generator().manual_seed(0)
    save_file({"fc.weight": torch.randn(width, width, generator=draw)}, folder / f"{width}.safetensors")

def step(width, command, name, *changes):
    made = recipe.load(f"{command}/{name}", command, [*changes, "report.html=false"])
    out = Destination(folder / f"{command}-{name}-{width}.safetensors")
    run.run(planner.make_plan(folder / f"{width}.safetensors", out, made, command), Options(latency="off"))

for given in json.loads(sys.argv[2]):
    if os.fork():
        assert os.wait()[1] == 0
        continue
    words = given.split()
    step(256, *[word.replace("1000000", "10000") for word in words])
    before = most()
    step(2048, *words)
    print(json.dumps([given, (most() - before) / 2048**2 / 4]), flush=True)
    os._exit(0)
"""
MEASURE = """
import ctypes, json, os, resource, sys
import torch
from aicompress.layer import InputStats, Layer, LayerInfo
from aicompress.methods import get

def wide(width):
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(256, width, generator=draw)
    weight = torch.randn(16, width, generator=draw)
    gram = rows.t() @ rows / len(rows)
    shape = (len(weight), width)
    info = LayerInfo("fc", "fc.weight", "linear", shape, shape, torch.float32)
    return Layer(info, weight, None, InputStats(len(rows), gram, gram.diagonal().clone()))

def most():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

if sys.platform == "linux":  # what is freed goes back at once: M_MMAP_THRESHOLD and M_ARENA_MAX
    ctypes.CDLL(None).mallopt(-3, 1 << 20), ctypes.CDLL(None).mallopt(-8, 1)
torch.set_num_threads(1)
small, large = wide(256), wide(1536)
for given in json.loads(sys.argv[1]):
    command, name, fields = given.split(" ", 2)
    method = get(command, name)
    config = method.config(**eval(fields))
    if os.fork():
        assert os.wait()[1] == 0
        continue
    method.apply(small, config)  # libraries set themselves up
    before = most()  # a new process starts at what it holds, whatever was held before it
    method.apply(large, config)
    print(json.dumps([given, (most() - before) / large.inputs.gram.nbytes]), flush=True)
    os._exit(0)
"""


def test_copies_of_gram_matrices_and_of_layers(bare_python: list[str], tmp_path: Path) -> None:
    given = [*map(json.dumps, map(list, (LIMITS, STEPS))), str(tmp_path)]
    done = subprocess.run(
        [*bare_python, "-c", MEASURE + MEASURE_STEPS, *given],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measured, limits = dict(map(json.loads, done.stdout.splitlines())), LIMITS | STEPS
    assert measured.keys() == limits.keys()
    assert {given: copies for given, copies in measured.items() if copies > limits[given]} == {}
