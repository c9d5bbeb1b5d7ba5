"""Prune channels and neurons of two small image classifiers by weight and by gradient, and count what it costs.

    python -m scripts.bench.mnist --data mnist.npz --folder build/bench/mnist

Trains a ResNet-like network with batch norms and the multilayer perceptron 784-300-100-10 on train_images (minutes on
one core), prunes both at several levels with `aicompress prune`, and prints a Markdown table of their accuracy on
test_images, with the 95 % interval that `aicompress eval` gives. Calibration reads training images only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

REPAIRS: dict[str, dict[str, bool]] = {  # what is done after the cut
    "nothing": {"refit": False, "recalibrate_norms": False},
    "norms": {"refit": False, "recalibrate_norms": True},
    "norms and fit": {"refit": True, "recalibrate_norms": True},
}
JOBS = [
    ("l2", "nothing"), ("l2", "norms"), ("l2", "norms and fit"), ("activation", "norms and fit"),
    ("taylor", "nothing"), ("taylor", "norms"), ("taylor", "norms and fit"),
]  # fmt: skip


class Block(nn.Module):
    """Two 3x3 convolutions with batch norms around a shortcut, which is projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()
        self.norm = nn.BatchNorm2d(outputs) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        return functional.relu(y + self.norm(self.short(x)))


class ResNet(nn.Module):
    """Three blocks of 16, 32 and 64 channels over images (batch, 28, 28)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.blocks = nn.ModuleList([Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)])
        self.fc = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(images.unsqueeze(1))))
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


class Mlp(nn.Module):
    """784-300-100-10 with ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(images.flatten(1))))))


NETWORKS: dict[str, tuple[type[nn.Module], int, dict[str, Any]]] = {  # module, epochs, the recipe's model section
    "resnet": (ResNet, 3, {"factory": "scripts.bench.mnist:ResNet"}),
    "mlp": (Mlp, 10, {"sequential": ["flatten", "fc1", "relu", "fc2", "relu", "fc3"]}),
}


def train(name: str, data: Path, path: Path, seed: int = 0) -> None:
    """Train one network on train_images and save it."""
    kind, epochs, _ = NETWORKS[name]
    torch.manual_seed(seed)
    with np.load(data) as arrays:
        images = torch.from_numpy(arrays["train_images"]).float().div(255)
        labels = torch.from_numpy(arrays["train_labels"]).long()
    model, batch = kind(), 128
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(epochs):
        for index in torch.randperm(len(images))[: len(images) // batch * batch].split(batch):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()
            schedule.step()
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, path)


def aicompress(*arguments: str) -> None:
    """Run a command line."""
    subprocess.run([sys.executable, "-m", "aicompress", *arguments], check=True, stdout=subprocess.DEVNULL)


def prune(name: str, source: Path, out: Path, data: Path, method: dict[str, Any]) -> dict[str, Any]:
    """Prune a network; returns the report."""
    with np.load(data) as arrays:
        samples = min(1024, len(arrays["train_labels"]))
    calibration = {"arrays": str(data.absolute()), "samples": samples, "scale": 255}
    calibration |= {"inputs": "train_images", "labels": "train_labels"}
    recipe = {"version": 1, "method": {"name": "channels", **method}, "model": NETWORKS[name][2]}
    if method["score"] != "l2" or method["recalibrate_norms"]:
        recipe["calibration"] = calibration
    path = out.with_suffix(".yaml")
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    aicompress("prune", str(source), str(out), "-r", str(path), "--allow-code", "--latency", "off", "--overwrite")
    return dict(json.loads(out.with_name(f"{out.stem}.report.json").read_text(encoding="utf-8")))


def measured(name: str, path: Path, data: Path) -> tuple[dict[str, float], float]:
    """Accuracy with its interval, and milliseconds of a forward pass of 64 images."""
    accuracy = {"arrays": str(data.absolute()), "inputs": "test_images", "labels": "test_labels", "scale": 255}
    recipe = {"version": 1, "model": NETWORKS[name][2], "quality": {"accuracy": accuracy}}
    recipe["latency"] = {"batch": 64, "rounds": 50}
    written = path.with_suffix(".eval.yaml")
    written.write_text(json.dumps(recipe), encoding="utf-8")
    out = path.with_suffix(".eval")
    aicompress("eval", str(path), "-r", str(written), "-o", str(out), "--allow-code")
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report["quality"]["accuracy"], report["latency"]["after_ms"]


def jobs(name: str, sparsities: list[float], scores: list[str]) -> list[tuple[float, str, str]]:
    """Share of the channels, score and repair of every line of a network's table; the network as it is comes first."""
    chosen = [job for job in JOBS if not scores or job[0] in scores]
    chosen = [job for job in chosen if name == "resnet" or job[1] != "norms"]  # the perceptron has no batch norms
    return [(0.0, "l2", "nothing"), *((sparsity, *job) for sparsity in sparsities for job in chosen)]


def line(name: str, job: tuple[float, str, str], source: Path, data: Path) -> str:
    """One line of the table: prune, then measure."""
    sparsity, score, repair = job
    out = source.with_name(f"{name}-{sparsity}-{score}-{repair.replace(' ', '-')}.safetensors")
    report = prune(name, source, out, data, {"sparsity": sparsity, "score": score, **REPAIRS[repair]})
    accuracy, latency = measured(name, out, data)
    value, low, high = (100 * accuracy[key] for key in ("value", "low", "high"))
    return (
        f"| {name} | {sparsity:.0%} | {score if sparsity else '-'} | {repair if sparsity else '-'} "
        f"| {report['after']['parameters']:,} | {report['after']['weight_bytes']:,} "
        f"| {value:.2f} ({low:.2f}-{high:.2f}) | {latency:.2f} |"
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="an .npz with train_images, test_images and labels")
    parser.add_argument("--folder", type=Path, default=Path("build/bench/mnist"))
    parser.add_argument("--network", action="append", choices=NETWORKS, default=[])
    parser.add_argument("--sparsity", action="append", type=float, default=[])
    parser.add_argument("--score", action="append", choices=sorted({score for score, _ in JOBS}), default=[])
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    print("| network | dropped | by | repaired | parameters | bytes | accuracy % (95 % interval) | 64 images ms |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.network or NETWORKS:
        source = options.folder / f"{name}.safetensors"
        if not source.is_file():
            start = time.perf_counter()
            train(name, options.data, source)
            print(f"trained {name} in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        for job in jobs(name, options.sparsity or [0.3, 0.5, 0.7, 0.85], options.score):
            print(line(name, job, source, options.data), flush=True)


if __name__ == "__main__":
    main()
