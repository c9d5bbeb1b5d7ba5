"""The commands of a chain, each run once: a step whose output is there is not run again."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aicompress.cli.app import app
from scripts.lenet.networks import NETWORKS, VALIDATION
from scripts.lenet.networks import main as train

RECIPES = Path(__file__).parents[2] / "configs" / "deep-compression"


def split_file(data: Path, folder: Path) -> Path:
    """Write the training images in two parts, so that a recipe can name one: `fit` and `validation`."""
    path = folder / "training.npz"
    if not path.is_file():
        with np.load(data) as arrays:
            images, labels = arrays["train_images"], arrays["train_labels"]
        parts = {"fit": slice(None, -VALIDATION), "validation": slice(-VALIDATION, None)}
        named = {f"{name}_images": images[part] for name, part in parts.items()}
        named |= {f"{name}_labels": labels[part] for name, part in parts.items()}
        unfinished = path.with_name("training.part.npz")
        np.savez(unfinished, **named)
        unfinished.rename(path)
    return path


@dataclass(frozen=True)
class Chain:
    """A chain of commands over one network.

    Attributes:
        network: its name.
        data: MNIST with its test images.
        folder: where outputs go.
        seed: of everything that is random.
    """

    network: str
    data: Path
    folder: Path
    seed: int

    @property
    def training(self) -> Path:
        """The training images in two parts."""
        return split_file(self.data, self.folder.parent)

    def dense(self) -> Path:
        """Train the network on shifted images."""
        out = self.folder / "dense.safetensors"
        if not out.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = out.with_suffix(".part")
            arguments = ["--data", str(self.data), "--network", self.network, "--seed", str(self.seed)]
            _timed("dense", lambda: train([*arguments, "--augment", "--out", str(unfinished)]))
            unfinished.rename(out)
        return out

    def step(self, command: str, source: Path, name: str, recipe: str, *options: str) -> Path:
        """Run a step; returns its output."""
        out = self.folder / f"{name}.safetensors"
        if not out.is_file():
            _aicompress(
                command, str(source), str(out), "-r", str(RECIPES / recipe), *options, "--latency", "off", "--quiet"
            )
        return out

    def distilled(self, source: Path, teacher: Path, name: str, recipe: str, *settings: str) -> Path:
        """Train a student on the first part of the training images."""
        named = ["data.inputs=fit_images", "data.labels=fit_labels", f"seed={self.seed}", *settings]
        options = ["--teacher", str(teacher), *self._sets(f"data.arrays={self.training}", self._model, *named)]
        return self.step("distill", source, name, recipe, *options)

    def compact(self, source: Path, name: str = "compact") -> Path:
        """Write the short header, which every byte of a result counts."""
        out = self.folder / f"{name}.safetensors"
        if not out.is_file():
            _aicompress("export", str(source), str(out), "--to", "compact", "--latency", "off", "--quiet")
        return out

    def error(self, path: Path, images: str) -> float:
        """Percent of images that are classified wrong: of `validation`, or of `test`, which nothing is chosen by."""
        out = path.with_name(f"{path.stem}-{images}")
        if not (out / "report.json").is_file():
            arrays = self.data if images == "test" else self.training
            names = (f"arrays={arrays}", f"inputs={images}_images", f"labels={images}_labels")
            settings = self._sets(self._model, *(f"quality.accuracy.{name}" for name in names))
            _aicompress("eval", str(path), "-r", str(RECIPES / "eval.yaml"), "-o", str(out), *settings, "--quiet")
        report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
        return 100 * (1 - float(report["quality"]["accuracy"]["value"]))

    @property
    def _model(self) -> str:
        return f"model.sequential=[{', '.join(NETWORKS[self.network].sequential)}]"

    @staticmethod
    def _sets(*settings: str) -> list[str]:
        return [word for setting in settings for word in ("--set", setting)]


def _aicompress(*arguments: str) -> None:
    """Run a command line in this process, which spares the imports."""
    _timed(" ".join(arguments[:3]), lambda: app(list(arguments), standalone_mode=False))


def _timed(what: str, work: Any) -> None:
    start = time.process_time()
    with contextlib.redirect_stdout(sys.stderr):
        work()
    print(f"{what}: {time.process_time() - start:.0f} s of processor time", file=sys.stderr, flush=True)
