"""A step without data holds blocks of rows: its memory does not grow with the largest tensor.

Each step runs in a process of its own, on a tensor and on one of three times the rows. What is read, ranked or held at
a time is a fraction of what it is, so that small tensors have many blocks.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from aicompress.weights import Corrected, Dense, IntGrouped, LowRank, Sparse, Weight, entropy_coded
from tests.weights.forms import write_form

ROOT = Path(__file__).parents[3]
ROWS, COLUMNS = 1 << 12, 256  # 4 MiB in float32: eight blocks of rows
SHARE = 0.4  # of what the large tensor has more, that may be held more; holding it whole takes 1.7 at least
METHODS: list[tuple[str, dict[str, Any], str]] = [  # the last: of two tensors that are alike, or of other layouts
    ("quantize", {"name": "rtn", "bits": 4, "group_size": 64}, ""),
    ("quantize", {"name": "sinq", "group_size": 64, "iterations": 1, "range": "minmax"}, ""),
    ("quantize", {"name": "rtn", "bits": 4, "granularity": "tensor", "range": "mse"}, ""),
    ("quantize", {"name": "rtn", "bits": "range", "max_error": 0.3}, ""),
    ("quantize", {"name": "sinq", "granularity": "tensor", "iterations": 1}, ""),
    ("prune", {"name": "magnitude", "sparsity": 0.5, "scope": "global", "store": "sparse"}, ""),
    ("prune", {"name": "magnitude", "pattern": "2:4", "permutation": 1, "store": "sparse"}, ""),
    ("prune", {"name": "lamp", "sparsity": 0.5}, ""),
    ("quantize", {"name": "rdo"}, ""),
    ("prune", {"name": "magnitude", "sparsity": 0.8, "store": "sparse", "storage": "entropy"}, ""),
    ("factorize", {"name": "svd", "rank": 32}, ""),
    ("factorize", {"name": "svd", "rank": 8}, ""),
    ("factorize", {"name": "svd", "energy": 0.3}, ""),
    ("factorize", {"name": "spatial", "rank": 8}, "-conv"),
    ("factorize", {"name": "tucker", "rank": 8, "sweeps": 1}, "-conv"),
    ("factorize", {"name": "tie"}, "-twice"),
    ("factorize", {"name": "shared_basis", "rank": 8, "whiten": False}, "-twice"),
    ("factorize", {"name": "shared_basis", "energy": 0.3, "whiten": False}, "-twice"),
    ("factorize", {"name": "stack", "rank": 8, "whiten": False}, ""),
    ("factorize", {"name": "base_delta", "rank": 8, "rounds": 2, "whiten": False}, "-twice"),
    ("quantize", {"name": "rtn", "bits": 8, "group_size": 64}, "-gptq"),
    ("prune", {"name": "magnitude", "sparsity": 0.5}, "-fp8"),
    ("factorize", {"name": "svd", "rank": 8}, "-gptq"),
    ("export", {"name": "dense"}, "-gptq"),
    ("export", {"name": "dense"}, "-fp8"),
    ("export", {"name": "dense"}, "-mask"),
    ("export", {"name": "dense"}, "-codes-coded"),
    ("export", {"name": "fixed"}, "-mask-coded"),
    ("export", {"name": "entropy", "storage": "entropy"}, "-corrected"),
    ("prune", {"name": "magnitude", "sparsity": 0.9}, "-mask-coded"),
    ("quantize", {"name": "rtn", "bits": 8, "group_size": 64}, "-codes-coded"),
    ("quantize", {"name": "rtn", "bits": 8, "group_size": 64}, "-mask"),
    ("prune", {"name": "magnitude", "sparsity": 0.5}, "-experts"),
    ("prune", {"name": "lamp", "sparsity": 0.5}, "-experts"),
    ("quantize", {"name": "sinq", "granularity": "tensor", "iterations": 1}, "-experts"),
    ("prune", {"name": "magnitude", "sparsity": 0.5, "store": "sparse"}, "-factors"),
    ("quantize", {"name": "rtn", "bits": 4, "group_size": 64}, "-factors"),
]
MEASURE = """
import ctypes, json, os, sys
from pathlib import Path
import torch
from aicompress.measure import peak_rss
from aicompress.methods.factorize import decomposition
from aicompress.methods.prune import lamp
from aicompress.methods.quantize import sinq
from aicompress.pipeline.layerwise.rows import reading as rows
from aicompress.pipeline.layerwise import planner, run
from aicompress.pipeline import export
from aicompress.pipeline.step import blocks, storage
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.step.timing import layer_latency
from aicompress.recipe import load
from aicompress.recipe.made import ExportRecipe
from aicompress.weights.coding import reading

torch.set_num_threads(1)
if sys.platform == "linux":  # what is freed goes back at once: M_MMAP_THRESHOLD
    ctypes.CDLL(None).mallopt(-3, 1 << 17)
rows.BLOCK >>= 4
reading.STEP >>= 4
blocks.BLOCK >>= 4
layer_latency.HELD >>= 6
sinq.HELD >>= 7
lamp.RANGE >>= 3
storage.HELD, storage.READ = storage.HELD >> 4, storage.READ >> 4
decomposition.LARGE >>= 3  # rank 8 is few directions
folder = Path(sys.argv[1])

def compress(number, command, name):
    source, out = folder / f"{name}.safetensors", Destination(folder / f"{number}-{name}.safetensors")
    if command == "export":
        given = json.loads((folder / f"{number}.yaml").read_text())
        recipe = ExportRecipe(method=given["method"], storage=given.get("storage"))
        export.run(export.make_plan(source, out, recipe), Options(latency="off"))
        return
    recipe = load(folder / f"{number}.yaml", command, ())
    run.run(planner.make_plan(source, out, recipe, command), Options(latency="off" if number else "auto"))

for number, (command, suffix) in enumerate(json.loads(sys.argv[2])):
    compress(number, command, f"tiny{suffix}")  # libraries set themselves up
    for name in ("small", "large"):
        if os.fork():
            assert os.wait()[1] == 0
            continue
        before = peak_rss()  # a new process starts at what it holds, whatever was held before it
        compress(number, command, f"{name}{suffix}")
        print(json.dumps([number, name, peak_rss() - before]), flush=True)
        os._exit(0)
"""


def as_stored(tensor: torch.Tensor) -> dict[str, Weight]:
    """A layer in forms of which the rows have unlike shares, or that are streams."""
    mask = Sparse.of(tensor, tensor > 0.8)
    codes = (2 * tensor).round_().clamp_(-8, 7).to(torch.int8)
    scale = torch.ones(tensor.shape[0], tensor.shape[1] // 64)
    integers = IntGrouped(codes, scale, None, 4, 64)
    correction = LowRank(Dense(tensor[:, :64].half()), Dense(torch.randn(64, tensor.shape[1]).half()))
    return {
        "corrected": Corrected(integers, correction),
        "factors": LowRank(Dense(tensor), Dense(torch.randn(tensor.shape[1], 2 * tensor.shape[1]))),
        "mask": mask,
        "mask-coded": entropy_coded(mask),
        "codes-coded": entropy_coded(integers),
    }


def encoded(tensor: torch.Tensor, layout: str) -> dict[str, torch.Tensor]:
    """A layer in another tool's layout, with as many numbers."""
    rows, columns = tensor.shape
    if layout == "fp8":
        scale = torch.ones(-(-rows // 128), columns // 128)
        return {"fc.weight": tensor.to(torch.float8_e4m3fn), "fc.weight_scale_inv": scale}
    words = {"qweight": (columns // 8, rows), "qzeros": (columns // 64, rows // 8)}
    drawn = {f"fc.{name}": torch.randint(2**31, shape, dtype=torch.int32) for name, shape in words.items()}
    return {**drawn, "fc.scales": torch.full((columns // 64, rows), 0.01).half()}


def test_memory_does_not_grow_with_a_tensor(bare_python: list[str], tmp_path: Path) -> None:
    rows = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    more = torch.cat([scale * rows for scale in (1, 1.01, 0.99)])
    for name, tensor in {"tiny": rows[:64].clone(), "small": rows, "large": more}.items():
        save_file({"fc.weight": tensor}, tmp_path / f"{name}.safetensors")
        save_file({"conv.weight": tensor.reshape(-1, 64, 1, 4)}, tmp_path / f"{name}-conv.safetensors")
        save_file({"experts.up_proj": tensor.reshape(-1, 64, COLUMNS)}, tmp_path / f"{name}-experts.safetensors")
        save_file(encoded(tensor, "fp8"), tmp_path / f"{name}-fp8.safetensors")
        save_file(encoded(tensor, "gptq"), tmp_path / f"{name}-gptq.safetensors")
        save_file({f"layers.{n}.fc.weight": tensor.clone() for n in range(2)}, tmp_path / f"{name}-twice.safetensors")
        for form, weight in as_stored(tensor).items():
            write_form(tmp_path / f"{name}-{form}.safetensors", weight, weight.tensors())
    for number, (_, method, _) in enumerate(METHODS):
        own = {key: value for key, value in method.items() if key != "storage"}
        stored = {"storage": method["storage"]} if "storage" in method else {}
        (tmp_path / f"{number}.yaml").write_text(json.dumps({"version": 1, "method": own, **stored}))
    commands = json.dumps([(command, suffix) for command, _, suffix in METHODS])
    done = subprocess.run(
        [*bare_python, "-c", MEASURE, str(tmp_path), commands], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {(number, name): peak for number, name, peak in map(json.loads, done.stdout.splitlines())}
    grown_by = more.nbytes - rows.nbytes
    grown = {
        f"{method}{suffix}": (found[n, "large"] - found[n, "small"]) / grown_by
        for n, (_, method, suffix) in enumerate(METHODS)
    }
    assert {method: share for method, share in grown.items() if share > SHARE} == {}
