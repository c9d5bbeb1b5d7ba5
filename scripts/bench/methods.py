"""Every method that zeros or rounds single weights on one language model: what it loses, its time and its data.

    python -m scripts.bench.methods --model M --calibration calibration.txt --text heldout.txt

A method stays where it is ahead somewhere: in quality, in time, or in the data that it asks for. Prints a Markdown
table: KL to the original on held-out text with its 95 % interval, and seconds of the processor for the whole step.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts.bench.drawn import Subject, measured

Settings = dict[str, Any]
SHARES: dict[str, Settings] = {"50 %": {"sparsity": 0.5}, "70 %": {"sparsity": 0.7}, "2:4": {"pattern": "2:4"}}
UNPATTERNED = ("lamp",)
PRUNING: tuple[Settings, ...] = (
    {"name": "magnitude"},
    {"name": "lamp"},
    {"name": "wanda"},
    {"name": "sparsegpt"},
    {"name": "alps"},
    {"name": "taylor"},
)
SEARCHED = ("wanda", "sparsegpt", "alps", "taylor")  # `allocation: auto` as well, at the larger share
WIDTHS = (4, 3, 2)
QUANTIZING: tuple[Settings, ...] = (
    {"name": "rtn"},
    {"name": "rtn", "range": "mse"},
    {"name": "hqq"},
    {"name": "sinq"},
    {"name": "kmeans"},
    {"name": "squeezellm"},
    {"name": "imatrix"},
    {"name": "awq"},
    {"name": "gptq"},
    {"name": "hadamard", "base": {"name": "gptq"}, "untie": True},
    {"name": "qera", "base": {"name": "gptq"}},
    {"name": "rdo"},
    {"name": "entropy_gptq"},
    {"name": "watersic"},
)
GROUPED = {"group_size": 64}
RATED = ("rdo", "entropy_gptq", "watersic")  # entropy-coded, at the bits that groups of 64 take with their scales
TABLES = ("kmeans", "squeezellm")  # a table for each row; groups of 64 would take more bytes than their codes


def settings() -> Iterator[tuple[str, str, Settings]]:
    """Command, what is compressed to, and the method's section of a recipe."""
    for share, amount in SHARES.items():
        for method in PRUNING:
            if "pattern" not in amount or method["name"] not in UNPATTERNED:
                yield "prune", share, {**method, **amount}
    for name in SEARCHED:
        yield "prune", "70 %", {"name": name, "sparsity": 0.7, "allocation": "auto"}
    yield "quantize", "4 bits", {"name": "nf4", **GROUPED}
    for bits in WIDTHS:
        for method in QUANTIZING:
            grid = {"bits": bits} if method["name"] in TABLES else {"bits": bits, **GROUPED}
            if method["name"] in RATED:
                grid = {"target_bpw": bits + 16 / GROUPED["group_size"]}
            if "base" in method:
                yield "quantize", f"{bits} bits", {**method, "base": {**method["base"], **grid}}
            else:
                yield "quantize", f"{bits} bits", {**method, **grid}


def shown(method: Settings) -> str:
    """A method's section without what the line says already."""
    beside = {key: value for key, value in method.items() if key not in ("name", "sparsity", "pattern", "bits")}
    beside = {key: value["name"] if key == "base" else value for key, value in beside.items() if key != "group_size"}
    return " ".join([f"`{method['name']}`", *(f"{key}: {value}" for key, value in beside.items())])


def compressed(subject: Subject, command: str, method: Settings, samples: int, out: Path) -> tuple[float, Any]:
    """Run a step; the processor's seconds, and its report."""
    from aicompress import recipe as recipes
    from aicompress.methods import get
    from aicompress.pipeline import steps
    from aicompress.pipeline.step.options import Options
    from aicompress.pipeline.step.output import Destination

    made: Settings = {"version": 1, "method": method, "report": {"html": False}}
    if get(command, method["name"]).needs or "base" in method:
        made["calibration"] = {"text": str(subject.calibration), "samples": samples, "length": subject.length}
    file = out.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(made), encoding="utf-8")  # JSON is YAML
    start = time.process_time()
    planned = steps.make_plan(subject.model, Destination(out), recipes.load(str(file), command), command)
    report = steps.run(planned, Options(latency="off"))
    return time.process_time() - start, report


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate it on")
    parser.add_argument("--text", type=Path, required=True, help="held-out text")
    parser.add_argument("--samples", type=int, default=64, help="of 256 tokens, to calibrate on")
    parser.add_argument("--windows", type=int, default=40, help="of 256 tokens, that are measured on")
    parser.add_argument("--only", nargs="+", help="names of methods")
    given = parser.parse_args(arguments)
    section = "quality.perplexity"
    edits = (f"{section}.samples={given.windows}", f"{section}.length=256", "kernels=reference")
    texts = (given.calibration, given.text)
    subject = Subject("language model", given.model, *texts, 256, 0, "eval/language-model", edits, "kl")
    out = given.folder / "methods"
    print("| compressed to | method | data | KL | 95 % interval | seconds | MB |\n|---|---|---|---:|---|---:|---:|")
    for command, what, method in settings():
        if given.only and method["name"] not in given.only:
            continue
        shutil.rmtree(out, ignore_errors=True)
        seconds, report = compressed(subject, command, method, given.samples, out)
        kl = measured(subject, out)
        data = "text" if report.calibration.get("data") else "none"
        interval = f"{kl['low']:.4g} to {kl['high']:.4g}"
        size = report.after.weight_bytes / 1e6
        print(
            f"| {what} | {shown(method)} | {data} | {kl['value']:.4g} | {interval} | {seconds:.1f} | {size:.2f} |",
            flush=True,
        )
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
