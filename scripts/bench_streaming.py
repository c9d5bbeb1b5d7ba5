"""Time a data-free 4-bit quantization of a large random Llama against `cp -r` of its folder, in one run.

    python scripts/bench_streaming.py --folder build/bench --layers 22

Prints a Markdown table: wall time of the step as its report states it, whole process, peak memory, and the ratio to cp.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

try:
    from scripts.make_random_llama import write
except ModuleNotFoundError:  # started as a file
    from make_random_llama import write


def copied(model: Path, folder: Path) -> float:
    """Seconds of `cp -r`."""
    target = folder / "copy"
    shutil.rmtree(target, ignore_errors=True)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(model), str(target)], check=True)
    return time.perf_counter() - start


def quantized(model: Path, folder: Path, recipe: str) -> tuple[float, float, dict[str, float]]:
    """Seconds of the step, seconds of the process, and the report's figures."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "aicompress", "quantize", str(model), str(out), "-r", recipe, "-q"]
    start = time.perf_counter()
    subprocess.run([*command, "--latency", "off"], check=True)
    wall = time.perf_counter() - start
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report["seconds"], wall, {"rss": report["peak_rss"], "bytes": report["after"]["weight_bytes"]}


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recipe", action="append", default=[])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    model = options.folder / f"random-llama-{options.layers}"
    if not (model / "config.json").is_file():
        write(model, options.layers)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    copied(model, options.folder)  # once, so that the input is in memory for all
    print(f"input: {size / 1e6:.0f} MB of bfloat16, {torch.get_num_threads()} threads, medians of {options.rounds}\n")
    print("| step | wall of the step s | whole process s | peak RSS MB | output MB | step / cp -r |")
    print("|---|---|---|---|---|---|")
    for recipe in options.recipe or ["quantize/rtn-w4", "quantize/rtn-w8"]:
        copies, steps, walls, figures = [], [], [], {}
        for _ in range(options.rounds):
            copies.append(copied(model, options.folder))
            step, wall, figures = quantized(model, options.folder, recipe)
            steps.append(step)
            walls.append(wall)
        ratio = median(s / c for s, c in zip(steps, copies, strict=True))
        print(
            f"| {recipe} | {median(steps):.2f} | {median(walls):.2f} | {figures['rss'] / 1e6:.0f} "
            f"| {figures['bytes'] / 1e6:.0f} | {ratio:.2f} |"
        )
    print(f"| cp -r | {median(copies):.2f} | | | {size / 1e6:.0f} | 1.00 |")


if __name__ == "__main__":
    main()
