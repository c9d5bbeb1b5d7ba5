"""A sentence encoder, compressed: forward times in turn, and how well its similarities agree with people's scores.

The rows here are those of 8 bits; `pruned` holds others, which are measured in the same way.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from scripts.bench import running
from scripts.bench.inputs import digest, made
from scripts.bench.measuring import Bench, Failed, evaluated, weight_bytes
from scripts.bench.rows import Row, Target, ours
from scripts.bench.store import Record
from scripts.bench.tables import Column, megabytes, section

NAME = "encoder"
GROUP = "Forward pass of 8 × 64 tokens, all in turn"
ROWS = (
    Row("encoder-fp32", "torch", GROUP, seconds=120),
    ours(
        "encoder-w8a8", GROUP, "quantize/w8a8", against=("encoder-fp32", "onnx-int8", "onnx-int8-linears"), seconds=120
    ),
    Row("onnx-int8", "onnxruntime", GROUP, setting={}, seconds=120, note="embedding in 8 bits too"),
    Row("onnx-int8-linears", "onnxruntime", GROUP, setting={"linears": True}, seconds=120, note="linear layers only"),
)
TARGETS = (
    Target("encoder-w8a8", "milliseconds", 0.30, "encoder-fp32"),
    Target("encoder-w8a8", "lost", 0.1),
)
COLUMNS = (
    Column("milliseconds", "forward ms", lambda value: f"{value:.2f}", spread=True),
    Column("forward", "forward / input", lambda value: f"{value:.3f}", spread=True),
    Column("seconds", "compress s", lambda value: f"{value:.2f}"),
    Column("bytes", "weights MB", megabytes),
    Column("spearman", "STS-B Spearman × 100", lambda value: f"{value:.2f}", lower=False),
    Column("low", "from", lambda value: f"{value:.2f}", lower=None),
    Column("high", "to", lambda value: f"{value:.2f}", lower=None),
)
PAIRS = {"columns": [5, 6], "score": 4, "length": 128}
WINDOWS = {"samples": 128, "length": 128}  # of the calibration text
TURNS = 30
REST = 0.02  # seconds between two models: threads of the last one stop spinning


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this part."""
    group = parser.add_argument_group("encoder")
    group.add_argument("--minilm", type=Path, help="folder of all-MiniLM-L6-v2; without it, fetched")
    group.add_argument("--stsb", type=Path, help="sentence pairs in the layout of the STS benchmark")


def run(given: argparse.Namespace, bench: Bench, schedule: running.Schedule, rows: Sequence[Row] = ROWS) -> int:
    """Measure all rows of a round together; returns how many measurements are left.

    Args:
        rows: the first one is the encoder as it is.
    """
    if not schedule.chosen(rows):
        return 0
    model = given.minilm or bench.folder.parent / "minilm"
    made(model / "model.safetensors", "scripts.fetch_demo_model", "--out", str(model))
    inputs = {"encoder": digest(model / "model.safetensors"), "pairs": digest(given.stsb) if given.stsb else ""}
    texts = Texts(given.stsb, given.calibration)
    left = 0
    for number in range(1, schedule.rounds + 1):
        known = {r.row: r for r in bench.store.records(bench.name) if r.round == number}
        if all(row.key in known and not (known[row.key].failed and schedule.retry) for row in rows):
            continue
        if not schedule.fits(running.expected(rows[0], bench.store.records(bench.name))):
            left += len(rows)
            continue
        start = time.perf_counter()
        found = measured(rows, model, texts, bench)
        for row in rows:
            figures, failed = found[row.key]
            figures["took"] = time.perf_counter() - start
            where = running.environment(bench)
            bench.store.add(Record(bench.name, row.key, number, figures, failed, where, inputs))
            running.say(row.key, number, figures, failed)
    return left


@dataclass(frozen=True)
class Texts:
    """What an encoder reads.

    Attributes:
        pairs: sentence pairs with people's scores, or None.
        calibration: plain text for rows that are calibrated.
    """

    pairs: Path | None
    calibration: Path | None = None


def measured(rows: Sequence[Row], model: Path, texts: Texts, bench: Bench) -> dict[str, tuple[dict[str, Any], str]]:
    """Figures of every row, or why there are none."""
    folder, first = bench.folder / "encoder", rows[0].key
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, tuple[dict[str, Any], str]] = {}
    paths: dict[str, Path] = {}
    for row in rows:
        try:
            paths[row.key], figures = made_by(row, model, texts, folder, bench)
            found[row.key] = figures, ""
        except Failed as error:
            found[row.key] = {}, str(error)
    base = found[first][0].get("spearman")
    for figures, _ in found.values():
        if "spearman" in figures and base is not None:
            figures["lost"] = base - figures["spearman"]
    for key, times in in_turn(paths, model, bench).items():
        found[key][0].update(times)
    return found


def made_by(row: Row, model: Path, texts: Texts, folder: Path, bench: Bench) -> tuple[Path, dict[str, Any]]:
    """What is timed of a row, with its bytes and its agreement with people."""
    out, pairs = folder / row.key, texts.pairs
    if row.tool == "torch":
        return model, {"bytes": weight_bytes(model), **spearman(model, pairs, model, bench)}
    if row.is_ours:
        step = row.recipe.split("/")[0]
        command = [sys.executable, "-m", "aicompress", step, str(model), str(out), "-r", row.recipe, "--overwrite"]
        bench.run([*command, *edits(row, texts), "--latency", "off", "--quiet"])
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        figures = {"seconds": report["seconds"], "bytes": weight_bytes(out)}
        return out, {**figures, **spearman(out, pairs, model, bench)}
    setting = dict(row.setting)
    if pairs is not None:
        listed = folder / "texts.json"
        listed.write_text(json.dumps(sentences(pairs)), encoding="utf-8")
        setting["texts"] = str(listed)
    written = folder / f"{row.key}.json"
    command = [str(bench.peers), "-m", "scripts.bench.peers", row.tool, "--model", str(model), "--out", str(out)]
    bench.run([*command, "--figures", str(written), "--setting", json.dumps(setting)])
    peer = json.loads(written.read_text(encoding="utf-8"))
    figures = {"seconds": peer["compress_seconds"], "bytes": peer["bytes"]}
    return out / "int8.onnx", {**figures, **(spearman_of(out / "embeddings.npy", pairs) if pairs else {})}


def edits(row: Row, texts: Texts) -> list[str]:
    """Options that fill in a row's recipe.

    Raises:
        Failed: there is no text to calibrate on.
    """
    sets = list(row.overrides)
    if row.calibrated:
        if texts.calibration is None:
            raise Failed("there is no text to calibrate on; give --calibration")
        sets += [f"calibration.text={texts.calibration}", *(f"calibration.{n}={v}" for n, v in WINDOWS.items())]
    return [part for text in sets for part in ("--set", text)]


def spearman(path: Path, pairs: Path | None, model: Path, bench: Bench) -> dict[str, float]:
    """By `aicompress eval`."""
    if pairs is None:
        return {}
    sets = [f"quality.similarity.{name}={value}" for name, value in {"pairs": pairs, **PAIRS}.items()]
    report = evaluated(path, model, "eval/sts", ["latency=null", *sets], bench)
    return points(report["quality"]["similarity"])


def spearman_of(embeddings: Path, pairs: Path) -> dict[str, float]:
    """The same figure of embeddings that another runtime gave, for `sentences`."""
    import numpy as np
    import torch

    from aicompress.data import Data
    from aicompress.data import pairs as read
    from aicompress.metrics.outputs import PairEmbeddings
    from aicompress.metrics.similarity import METRIC

    data = Data(pairs=str(pairs), **PAIRS)
    first, second, scores, _ = read(data)
    row = {text: number for number, text in enumerate(sentences(pairs))}
    one, other = (torch.tensor([row[text] for text in side]) for side in (first, second))
    outputs = PairEmbeddings(scores, one, other, (torch.from_numpy(np.load(embeddings)),))
    return points(METRIC.measure([outputs], data, 0).alone[0]["similarity"].plain())


def sentences(pairs: Path) -> list[str]:
    """Every sentence of the pairs once."""
    from aicompress.data import Data
    from aicompress.data import pairs as read

    first, second, _, _ = read(Data(pairs=str(pairs), **PAIRS))
    return sorted({*first, *second})


def points(figure: dict[str, Any]) -> dict[str, float]:
    """A correlation and its interval, times 100."""
    names = {"spearman": "value", "low": "low", "high": "high"}
    return {name: 100 * figure[key] for name, key in names.items() if key in figure}


def in_turn(paths: dict[str, Path], model: Path, bench: Bench) -> dict[str, dict[str, float]]:
    """Median milliseconds of each runtime, one pass of each in turn, and of its ratios to the first one's."""
    vocabulary = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    samples: dict[str, list[float]] = {key: [] for key in paths}
    with waiting(paths, vocabulary, bench) as workers:
        for _ in range(TURNS):
            for key, worker in workers.items():
                time.sleep(REST)
                samples[key].append(ordered(worker))
    base = next(iter(samples.values()))
    return {
        key: {"milliseconds": median(found), "forward": median(a / b for a, b in zip(found, base, strict=True))}
        for key, found in samples.items()
    }


@contextmanager
def waiting(paths: dict[str, Path], vocabulary: int, bench: Bench) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Processes that hold the models and wait for orders."""
    import os

    workers: dict[str, subprocess.Popen[str]] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": str(bench.threads)}
    try:
        for key, path in paths.items():
            python = str(bench.peers) if path.suffix == ".onnx" else sys.executable
            command = [python, "-m", "scripts.bench.encoder.forward", str(path), "--vocabulary", str(vocabulary)]
            workers[key] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
            assert workers[key].stdout is not None
            while (line := workers[key].stdout.readline()) != "ready\n":
                if not line:
                    raise Failed(f"{key} ended before it was ready")
        yield workers
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()


def ordered(worker: subprocess.Popen[str]) -> float:
    """Milliseconds of one order."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("go\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def tables(records: list[Record]) -> str:
    """The tables of this part."""
    return section("Sentence encoder", ROWS, records, TARGETS, COLUMNS)
