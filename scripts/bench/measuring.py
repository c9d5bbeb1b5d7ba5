"""One measurement: a process that compresses, and the evaluation of what it wrote."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bench.inputs import Inputs
from scripts.bench.rows import Row
from scripts.bench.store import Store

EXACT = "kernels=reference"  # outputs are judged as they are stored, not as fast kernels round them here
QUALITY = ("kl", "kl_low", "kl_high", "perplexity", "top1")


class Failed(Exception):
    """A process that did not do what it was asked; its last words."""


@dataclass(frozen=True)
class Bench:
    """Where and how measurements are made.

    Attributes:
        folder: of everything that is written.
        peers: python of the peers' venv.
        threads: of every process.
        store: where measurements go.
        name: of the run; only its own measurements are compared.
        keep: outputs stay for a look.
        timeout: seconds after which a process counts as hung.
    """

    folder: Path
    peers: Path
    threads: int
    store: Store
    name: str
    keep: bool = False
    timeout: float = 1800.0

    def run(self, command: Sequence[str]) -> float:
        """Run a process; returns its wall seconds.

        Raises:
            Failed: it fails, or hangs.
        """
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        environment = {**os.environ, **dict.fromkeys(names, str(self.threads)), "HF_HUB_OFFLINE": "1"}
        start = time.perf_counter()
        try:
            done = subprocess.run(
                list(command), env=environment, capture_output=True, text=True, check=False, timeout=self.timeout
            )
        except subprocess.TimeoutExpired as error:
            raise Failed(f"killed after {self.timeout:.0f} s") from error
        except OSError as error:
            raise Failed(
                f"{command[0]} cannot be started: {error.strerror}; `make bench-peers` makes the venv"
            ) from error
        if done.returncode:
            raise Failed(last_words(done.stderr or done.stdout, done.returncode))
        return time.perf_counter() - start


def last_words(text: str, code: int) -> str:
    """What a failed process said last, on one line; an error line of ours with its hint."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [at for at, line in enumerate(lines) if line.startswith("error:")]
    said = " ".join(lines[errors[-1] : errors[-1] + 2] if errors else lines[-1:])
    return f"exit code {code}: {said[:300]}"


def measure(row: Row, inputs: Inputs, bench: Bench, model: Path | None = None, judge: bool = True) -> dict[str, Any]:
    """Figures of one row: seconds, wall, peak_rss, bytes, and its quality where it is judged.

    Args:
        model: another model than that of the inputs.

    Raises:
        Failed: a process fails.
    """
    out = bench.folder / "out" / row.key
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    source = model or inputs.model
    if row.half:
        source = in_bfloat16(source, bench.folder / f"{source.name}-bf16")
    if row.tool == "cp":
        figures = copied(source, out, bench)
    elif row.is_ours:
        figures = compressed(row, source, out, inputs, bench)
    else:
        figures = compressed_by_peer(row, source, out, inputs, bench)
    figures["file"] = figures["bytes"] / weight_bytes(source)
    if judge:
        figures["digest"] = weights_digest(out)
        figures |= judged(out, figures["digest"], inputs, bench)
    if row.forward:
        figures["forward"] = forward_ratio(out, source, bench)
        removed = 1 - parameters(out)[0] / parameters(source)[0]
        figures["forward_beside_parameters"] = figures["forward"] / (1 - 0.8 * removed)
    if not bench.keep:
        shutil.rmtree(out, ignore_errors=True)
    return figures


def copied(source: Path, out: Path, bench: Bench) -> dict[str, Any]:
    """`cp -r`, the least that any tool has to do."""
    wall = bench.run(["cp", "-r", str(source), str(out)])
    return {"seconds": wall, "wall": wall, "bytes": weight_bytes(out)}


def compressed(row: Row, source: Path, out: Path, inputs: Inputs, bench: Bench) -> dict[str, Any]:
    """aicompress: the seconds are its whole steps, reading, calibrating and writing included."""
    between = out.with_name(f"{out.name}-before")
    shutil.rmtree(between, ignore_errors=True)
    known = {r.row: r.figures["bytes"] for r in bench.store.records(bench.name) if "bytes" in r.figures}
    steps = [(row.recipe, row.overrides, between if row.before else source, out)]
    if row.before:
        steps.insert(0, (row.before[0], row.before[1:], source, between))
    found: dict[str, Any] = {"seconds": 0.0, "wall": 0.0, "peak_rss": 0}
    for recipe, overrides, start, end in steps:
        sets = [filled(text, known, source) for text in overrides]
        if row.calibrated:
            calibration = {"text": inputs.calibration, "samples": inputs.samples, "length": inputs.length}
            sets += [f"calibration.{name}={value}" for name, value in calibration.items()]
        options = [part for text in sets for part in ([text] if text.startswith("--") else ["--set", text])]
        command = [sys.executable, "-m", "aicompress", recipe.split("/")[0], str(start), str(end), "-r", recipe]
        found["wall"] += bench.run([*command, *options, "--latency", "off", "--quiet"])
        report = json.loads((end / "report.json").read_text(encoding="utf-8"))
        found["seconds"] += report["seconds"]
        found["peak_rss"] = max(found["peak_rss"], report["peak_rss"])
    shutil.rmtree(between, ignore_errors=True)
    done = [layer for layer in report["layers"] if layer["method"] != "-"]
    before, after = (sum(layer[f"bytes_{when}"] for layer in done) for when in ("before", "after"))
    return {**found, "bytes": weight_bytes(out), **({"layers": after / before} if before else {})}


def filled(text: str, known: Mapping[str, int], model: Path) -> str:
    """An override with the bytes of other rows, or parameters of the model, put in.

    Raises:
        Failed: such a row was not measured.
    """

    def size(found: re.Match[str]) -> str:
        if found[1] not in known:
            raise Failed(f"{found[1]} was not measured, and its bytes are asked for")
        return str(known[found[1]])

    def count(found: re.Match[str]) -> str:
        total, blocks = parameters(model)
        return str(total - round((1 - float(found[1])) * blocks))

    return re.sub(r"\{parameters:([^}]+)\}", count, re.sub(r"\{bytes:([^}]+)\}", size, text))


def parameters(folder: Path) -> tuple[int, int]:
    """Numbers in the safetensors files of a dense model: all, and those in matrices of its blocks."""
    from safetensors import safe_open

    total = blocks = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a mapping
                shape = tensors.get_slice(name).get_shape()
                total += math.prod(shape)
                blocks += math.prod(shape) if len(shape) == 2 and re.search(r"\.\d+\.", name) else 0
    return total, blocks


def in_bfloat16(model: Path, folder: Path) -> Path:
    """A copy of a model in bfloat16, made once."""
    if not (folder / "config.json").is_file():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        AutoTokenizer.from_pretrained(model).save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def compressed_by_peer(row: Row, source: Path, out: Path, inputs: Inputs, bench: Bench) -> dict[str, Any]:
    """A peer: the seconds are its compressing call alone, after loading and before saving."""
    figures = out.with_suffix(".json")
    command = [str(bench.peers), "-m", "scripts.bench.peers", row.tool, "--model", str(source), "--out", str(out)]
    command += ["--figures", str(figures), "--setting", json.dumps(dict(row.setting))]
    command += ["--calibration", str(inputs.calibration), "--samples", str(inputs.samples)]
    wall = bench.run([*command, "--length", str(inputs.length)])
    found = json.loads(figures.read_text(encoding="utf-8"))
    figures.unlink()
    return {
        "seconds": found["compress_seconds"],
        "save": found.get("save_seconds", 0.0),
        "wall": wall - found.get("dump_seconds", 0.0),
        "peak_rss": found["peak_rss"],
        "bytes": found["bytes"],
    }


def judged(out: Path, digest: str, inputs: Inputs, bench: Bench) -> dict[str, Any]:
    """Quality of an output by `aicompress eval`, the same judge for all; weights judged before are not judged again."""
    known = bench.store.quality(digest, inputs.described(), QUALITY)
    if known is not None:
        return known
    data = {"text": inputs.text, "samples": inputs.tested, "length": inputs.length, "kl_samples": inputs.compared}
    sets = [f"quality.perplexity.{name}={value}" for name, value in data.items()]
    report = evaluated(out, inputs.model, "eval/language-model", [EXACT, "latency=null", *sets], bench)
    quality = report["quality"]
    kl = quality["kl"]
    return {
        "kl": kl["value"],
        "kl_low": kl.get("low"),
        "kl_high": kl.get("high"),
        "perplexity": quality["perplexity"]["value"],
        "base_perplexity": quality["perplexity"].get("baseline"),
        "top1": quality["top1_agreement"]["value"],
    }


def forward_ratio(out: Path, source: Path, bench: Bench) -> float:
    """Forward time of an output beside the input's, 8 x 64 tokens, in turn in one process."""
    sets = ["latency.batch=8", "latency.length=64", "latency.rounds=60"]
    ratio: float = evaluated(out, source, "eval/size-and-speed", sets, bench)["latency"]["ratio"]
    return ratio


def evaluated(out: Path, base: Path, recipe: str, sets: Sequence[str], bench: Bench) -> dict[str, Any]:
    """The report of `aicompress eval`."""
    folder = bench.folder / "eval"
    shutil.rmtree(folder, ignore_errors=True)
    options = [part for text in sets for part in ("--set", text)]
    command = [sys.executable, "-m", "aicompress", "eval", str(out), "--against", str(base), "-r", recipe, *options]
    bench.run([*command, "-o", str(folder), "--quiet"])
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def weights_digest(folder: Path) -> str:
    """Digest of config.json and every safetensors file: what a judge would read."""
    total = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        with file.open("rb") as opened:
            total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()[:16]
