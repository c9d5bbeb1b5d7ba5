"""Rows of the comparison of distillation: what each trains, for how long, and what is measured of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

from scripts.bench.commands import step
from scripts.bench.distill import loops
from scripts.bench.distill.runs import PROBE, Budget, Given, distilled, evaluated

LENGTH, BATCH = 256, 8  # tokens in a window, windows in a step
BLOCK_BATCH = 4  # windows in a step where blocks are tuned: more steps in the same time
ROUNDS = 3  # of two trainings in turn, whose speeds are compared
MLP = {"sequential": ["flatten", "fc1", "relu", "fc2", "relu", "fc3"]}
FEW = 1000  # labels of the mean teacher
KL = {"method": {"name": "kl", "temperature": 1.0}}
HIDDEN = {**KL, "also": [{"name": "hidden", "weight": 0.5}]}


@dataclass(frozen=True)
class Row:
    """A row.

    Attributes:
        needs: fields of `Given` that it reads.
        share: of the minutes.
        measure: figures by name.
    """

    needs: tuple[str, ...]
    share: float
    measure: Callable[[Given, Budget], dict[str, float]]


def perplexity(given: Given, path: Path) -> dict[str, Any]:
    """Perplexity and KL to the original on the held-out text."""
    data = {"text": str(given.text), "length": LENGTH, "samples": given.windows, "kl_samples": min(100, given.windows)}
    return evaluated(given, path, {"quality": {"perplexity": data}}, given.model)


def text(given: Given) -> dict[str, Any]:
    return {"data": {"text": str(given.train), "length": LENGTH}, "training": {"batch": BATCH}}


def half(given: Given) -> dict[str, Any]:
    """The section of a student with half the layers."""
    plain = json.loads((given.model / "config.json").read_text(encoding="utf-8"))  # type: ignore[operator]
    return {"student": {"layers": max(1, plain["num_hidden_layers"] // 2)}}


def learned(sections: Mapping[str, Any], given: Given, budget: Budget) -> dict[str, float]:
    """A student of half the layers that learns from the whole model."""
    assert given.model is not None
    out, _ = distilled(given, given.model, {**text(given), **half(given), **sections}, budget, "half")
    return {"perplexity": perplexity(given, out)["perplexity"]["value"]}


def alone(random: bool, given: Given, budget: Budget) -> dict[str, float]:
    """A student of half the layers, drawn or cut, that learns from text alone."""
    assert given.model is not None
    assert given.train is not None
    out = given.folder / "alone"
    cut = given.folder / "cut"
    shutil.rmtree(cut, ignore_errors=True)
    step("prune", given.model, {"method": {"name": "depth", "keep_layers": half(given)["student"]["layers"]}}, cut)
    loops.cross_entropy(cut, given.train, out, loops.Settings(budget.minutes, budget.seed, LENGTH, BATCH), random)
    return {"perplexity": perplexity(given, out)["perplexity"]["value"]}


RECIPES = Path(__file__).parents[3] / "configs" / "distill"
COMPRESSED: dict[str, tuple[str, dict[str, Any], str]] = {  # command, method, recipe of healing
    "60 % of the weights": ("prune", {"name": "sparsegpt", "sparsity": 0.6}, "masked"),
    "40 % of the neurons": ("prune", {"name": "width", "keep": 0.6, "score": "obs"}, "kl"),
    "keep 0.6": ("factorize", {"name": "two_sided", "keep": 0.6}, "factors"),
    "2 bits": ("quantize", {"name": "gptq", "bits": 2, "group_size": 64, "pad": True}, "codes"),
}


def healed(name: str, by_blocks: bool, given: Given, budget: Budget) -> dict[str, float]:
    """A compressed model that learns from the original, as a shipped recipe says: the share of its KL that is won back.

    Batches are smaller than the recipe's, so that there are more steps in the minutes.
    """
    assert given.model is not None
    command, method, own = COMPRESSED[name]
    recipe = yaml.safe_load((RECIPES / f"{'blocks' if by_blocks else own}.yaml").read_text(encoding="utf-8"))
    out = given.folder / "compressed"
    shutil.rmtree(out, ignore_errors=True)
    calibration = {"text": str(given.train), "length": LENGTH, "samples": given.samples}
    step(command, given.model, {"method": method, "calibration": calibration}, out)
    before = perplexity(given, out)["kl"]["value"]
    training = {"batch": BLOCK_BATCH if by_blocks else BATCH}
    training |= {key: value for key, value in recipe["training"].items() if key == "learning_rate"}
    sections = {**recipe, **text(given), "training": training, "teacher": given.model}
    done, _ = distilled(given, out, sections, budget, "healed")
    after = perplexity(given, done)["kl"]["value"]
    return {"KL before": before, "KL after": after, "KL won back": 1 - after / before}


def encoder(given: Given, budget: Budget) -> dict[str, float]:
    """A sentence encoder of three layers that learns from the whole one, on lines without labels."""
    assert given.encoder is not None
    training = {"batch": 64, "learning_rate": 5e-4}
    sections = {
        "student": {"layers": 3},
        "method": {"name": "embedding", "cosine": 1.0, "similarity": 1.0},
        "data": {"text": str(given.sentences), "length": 64},
        "training": training,
    }
    out, _ = distilled(given, given.encoder, sections, budget, "encoder")
    pairs = {"pairs": str(given.pairs), "columns": [5, 6], "score": 4, "length": 128}
    latency = {"batch": 8, "length": 64, "rounds": 30}
    report = evaluated(given, out, {"quality": {"similarity": pairs}, "latency": latency}, given.encoder)
    return {"Spearman": report["similarity"]["value"], "time beside the whole": report["latency"].ratio}


def perceptron(kind: str, given: Given, budget: Budget) -> dict[str, float]:
    """784-100-50-10 on images: from a teacher, on labels alone, or as its own mean teacher; its test error."""
    assert given.data is not None
    epochs = max(1, round(budget.minutes * 10))
    teacher, start = given.folder / f"teacher-{epochs}.safetensors", given.folder / "student.safetensors"
    if not teacher.is_file():
        loops.perceptron(given.data, teacher, 3 * epochs)
    loops.drawn_perceptron(start, budget.seed)
    data = {"inputs": "train_images", "labels": "train_labels", "scale": 255, "arrays": str(given.data)}
    sections: dict[str, Any] = {"model": MLP, "teacher": teacher}
    steps = epochs * (60_000 // 128)
    if kind in ("few", "mean teacher"):
        data["arrays"] = str(few_labels(given, keep_all=kind == "mean teacher"))
        steps = epochs * 100
    if kind == "teacher":
        sections["method"] = {"name": "kl", "temperature": 4.0, "alpha": 0.7}
    elif kind == "mean teacher":
        sections |= {"method": {"name": "consistency", "weight": 2.0, "ramp": 0.3}, "teacher": None}
        sections["mean_teacher"] = {"noise": 0.3, "labelled": 0.25}
    else:
        sections["method"] = {"name": "kl", "alpha": 0.0}
    training = {"steps": steps, "batch": 128, "learning_rate": 1e-3, "held_out": 0.02}
    out, _ = distilled(given, start, {**sections, "data": data, "training": training}, budget, "mlp.safetensors")
    images = {"arrays": str(given.data), "inputs": "test_images", "labels": "test_labels", "scale": 255}
    report = evaluated(given, out, {"model": MLP, "quality": {"accuracy": images}})
    return {"error %": 100 * (1 - report["accuracy"]["value"])}


def few_labels(given: Given, keep_all: bool) -> Path:
    """Images of which the first thousand have labels: those alone, or all, the others with -1."""
    assert given.data is not None
    place = given.folder / ("unlabelled.npz" if keep_all else "few.npz")
    with np.load(given.data) as arrays:
        images, labels = arrays["train_images"], arrays["train_labels"].astype(np.int64)
    labels[FEW:] = -1
    end = len(images) if keep_all else FEW
    np.savez(place, train_images=images[:end], train_labels=labels[:end])
    return place


def outputs(given: Given, budget: Budget) -> dict[str, float]:
    """A student of half the layers, from the teacher itself and from its stored outputs in turn: KL and speed."""
    assert given.model is not None
    data = {"text": str(given.train), "length": LENGTH, "samples": 4 * given.samples}
    training = {"batch": BATCH, "cache": False, "steps": steps_in(budget)}
    sections = {**half(given), **KL, "data": data, "training": training}
    signals = yaml.safe_load((RECIPES / "kl-stored.yaml").read_text(encoding="utf-8"))["signals"]
    stored = {**sections, "signals": signals, "training": {**training, "cache": "auto"}}
    shutil.rmtree(given.folder / "signals", ignore_errors=True)  # drawn by another seed
    reports: dict[str, list[dict[str, Any]]] = {"teacher": [], "stored": []}
    divergence: dict[str, float] = {}
    for last in range(1, ROUNDS + 1):
        for name, asked, cache in (("teacher", sections, None), ("stored", stored, given.folder / "signals")):
            out, report = distilled(given, given.model, asked, budget, "outputs", cache)
            reports[name].append(report)
            if last == ROUNDS:
                divergence[name] = perplexity(given, out)["kl"]["value"]
    return {
        "KL, teacher": divergence["teacher"],
        "KL, stored": divergence["stored"],
        "KL beside the teacher": divergence["stored"] / divergence["teacher"],
        "bytes a token": reports["stored"][0]["signals"]["bytes_per_token"],
        "speed beside the teacher": speed(reports["stored"]) / speed(reports["teacher"]),
    }


def loop(given: Given, budget: Budget) -> dict[str, float]:
    """Samples a second of our training loop and, in turn, of the least that does the same two passes."""
    assert given.model is not None
    assert given.train is not None
    steps = steps_in(budget)
    training = {"batch": BATCH, "cache": False, "steps": steps, "precision": "fp32", "held_out": 0.01}
    sections = {**half(given), **KL, **text(given), "training": {**training, "evaluate_every": steps}}
    settings = loops.Settings(budget.minutes, budget.seed, LENGTH, BATCH)
    ours, bare = [], []
    for _ in range(ROUNDS):
        bare.append(loops.bare(given.model, half(given)["student"]["layers"], given.train, steps, settings))
        ours.append(distilled(given, given.model, sections, budget, "loop")[1])
    return {"samples / s": speed(ours), "bare": median(bare), "speed beside a bare loop": speed(ours) / median(bare)}


def steps_in(budget: Budget) -> int:
    """Steps of a training whose speed is measured: it need not last as long as the minutes."""
    return max(PROBE, round(5 * budget.minutes))


def speed(reports: Sequence[Mapping[str, Any]]) -> float:
    """The median of samples a second."""
    return median(report["samples_per_second"] for report in reports)


LANGUAGE, IMAGES = ("model", "train", "text"), ("data",)
ROWS: dict[str, Row] = {
    "random, cross-entropy": Row(LANGUAGE, 1.0, partial(alone, True)),
    "half the layers, cross-entropy": Row(LANGUAGE, 1.0, partial(alone, False)),
    "half the layers, kl": Row(LANGUAGE, 1.0, partial(learned, KL)),
    "half the layers, kl + hidden": Row(LANGUAGE, 1.0, partial(learned, HIDDEN)),
    **{f"healed: {name}": Row(LANGUAGE, 0.5, partial(healed, name, False)) for name in COMPRESSED},
    **{f"healed by blocks: {name}": Row(LANGUAGE, 0.1, partial(healed, name, True)) for name in COMPRESSED},
    "encoder of 3 layers": Row(("encoder", "sentences", "pairs"), 3.0, encoder),
    "perceptron on labels alone": Row(IMAGES, 0.05, partial(perceptron, "labels")),
    "perceptron from its teacher": Row(IMAGES, 0.05, partial(perceptron, "teacher")),
    "1,000 labels alone": Row(IMAGES, 0.05, partial(perceptron, "few")),
    "mean teacher on 1,000 labels": Row(IMAGES, 0.05, partial(perceptron, "mean teacher")),
    "stored outputs": Row(LANGUAGE, 1.0, outputs),
    "training loop": Row(("model", "train"), 1.0, loop),
}
