"""Peak memory of a calibrated step on a random Llama of 1.0 billion bfloat16 parameters: one block at a time.

    python -m scripts.bench.memory --folder build/bench

Prints a Markdown table: parameters, bytes of the weights, seconds of the step, and the most memory its process held.
Ends with an error where that is over the limit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts.bench.random_llama import TEXT, write


def measured(model: Path, out: Path, recipe: str, overrides: list[str]) -> dict[str, Any]:
    """The report of the step, run in a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "aicompress", "quantize", str(model), str(out), "-r", recipe, "-q"]
    subprocess.run([*command, "--latency", "off", *(part for o in overrides for part in ("--set", o))], check=True)
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    shutil.rmtree(out)
    return report


def main() -> None:
    """Build the model where it is missing, run the step, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--recipe", default="quantize/gptq-w4")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--limit", type=float, default=2.5, help="GB (10^9 bytes)")
    given = parser.parse_args()
    model = given.folder / f"random-llama-{given.layers}"
    if not (model / "config.json").is_file():
        shutil.rmtree(model, ignore_errors=True)
        write(model, given.layers)
    overrides = [
        f"calibration.text={model / TEXT}",
        f"calibration.samples={given.samples}",
        f"calibration.length={given.length}",
    ]
    report = measured(model, given.folder / "memory-out", given.recipe, overrides)
    before, peak = report["before"], report["peak_rss"]
    print("| step | weights MB | calibration tokens | seconds | peak RSS MB |\n|---|---|---|---|---|")
    tokens = f"{given.samples} x {given.length}"
    size = before["weight_bytes"]
    print(f"| {given.recipe} | {size / 1e6:.0f} | {tokens} | {report['seconds']:.0f} | {peak / 1e6:.0f} |")
    if peak > given.limit * 1e9:
        sys.exit(f"error: {peak / 1e9:.2f} GB is over the limit of {given.limit} GB")


if __name__ == "__main__":
    main()
