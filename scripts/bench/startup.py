"""Time of a whole step on a small input beside the time to import the libraries that it cannot do without.

    python -m scripts.bench.startup --folder build/bench

Prints a Markdown table: the median of several runs of each, in turn, and the median of their ratios. The inputs are a
perceptron 784-300-100-10 in one file, and a tiny Llama in a directory; reports and latencies are part of a step.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

from scripts.make_tiny_lm import build

RECIPE = "quantize/rtn-w4-channel"
TENSORS = "import torch, safetensors"
MODEL = "import torch, transformers; from transformers import AutoConfig"
WIDTHS = (784, 300, 100, 10)


def write_perceptron(path: Path) -> None:
    """Write a random perceptron: fc1, fc2 and fc3."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for number, (columns, rows) in enumerate(itertools.pairwise(WIDTHS), start=1):
        tensors[f"fc{number}.weight"] = torch.randn(rows, columns, generator=generator) / columns**0.5
        tensors[f"fc{number}.bias"] = torch.zeros(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def seconds(command: list[str]) -> float:
    """Wall time of a process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return time.perf_counter() - start


def row(name: str, source: Path, out: Path, imports: str, rounds: int) -> str:
    """A line of the table: a step and its imports in turn, after one run of each that is not counted."""
    step = ["-m", "aicompress", "quantize", str(source), str(out), "-r", RECIPE, "--overwrite"]
    pairs = [(seconds(step), seconds(["-c", imports])) for _ in range(rounds + 1)][1:]
    steps, bare = zip(*pairs, strict=True)
    ratio = median(whole / part for whole, part in pairs)
    return f"| {name} | {median(steps):.2f} s | {median(bare):.2f} s | {ratio:.2f} |"


def main() -> None:
    """Write the inputs, time both, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    folder = options.folder / "startup"
    write_perceptron(folder / "mlp.safetensors")
    build(vocabulary=2048, hidden=128, layers=4, context=256).save_pretrained(folder / "tiny")
    print("| input | step | imports | ratio |\n|---|---|---|---|")
    print(row("perceptron", folder / "mlp.safetensors", folder / "mlp-w4.safetensors", TENSORS, options.rounds))
    print(row("tiny Llama", folder / "tiny", folder / "tiny-w4", MODEL, options.rounds))


if __name__ == "__main__":
    main()
