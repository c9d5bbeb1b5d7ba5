"""The commands of a chain, each run once: a step whose output is there is not run again."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from aicompress.cli.app import app
from scripts.lenet.images import part, training_file
from scripts.lenet.networks import NETWORKS, trained

RECIPES = Path(__file__).parents[2] / "configs" / "deep-compression"


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
        return training_file(self.data, self.folder.parent.parent)

    def dense(self) -> Path:
        """Train the network."""
        out = self.folder / "dense.safetensors"
        if not out.is_file():
            _timed("dense", lambda: self._train(out))
        return out

    def _train(self, out: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        model = trained(NETWORKS[self.network], part(self.training, "fit"), self.seed)
        unfinished = out.with_suffix(".part")
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, unfinished)
        unfinished.rename(out)

    def step(self, command: str, source: Path, name: str, recipe: str, *options: str) -> Path:
        """Run a step; returns its output."""
        out = self.folder / f"{name}.safetensors"
        if not out.is_file():
            run_command(
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
            run_command("export", str(source), str(out), "--to", "compact", "--latency", "off", "--quiet")
        return out

    def error(self, path: Path, images: str) -> float:
        """Percent of images that are classified wrong: of `validation`, or of `test`, which nothing is chosen by."""
        out = path.with_name(f"{path.stem}-{images}")
        if not (out / "report.json").is_file():
            arrays = self.data if images == "test" else self.training
            names = (f"arrays={arrays}", f"inputs={images}_images", f"labels={images}_labels")
            settings = self._sets(self._model, *(f"quality.accuracy.{name}" for name in names))
            run_command("eval", str(path), "-r", str(RECIPES / "eval.yaml"), "-o", str(out), *settings, "--quiet")
        report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
        return 100 * (1 - float(report["quality"]["accuracy"]["value"]))

    @property
    def _model(self) -> str:
        return f"model.sequential=[{', '.join(NETWORKS[self.network].sequential)}]"

    @staticmethod
    def _sets(*settings: str) -> list[str]:
        return [word for setting in settings for word in ("--set", setting)]


def run_command(*arguments: str) -> None:
    """Run a command line in this process, which spares the imports."""
    _timed(" ".join(arguments[:3]), lambda: app(list(arguments), standalone_mode=False))


def _timed(what: str, work: Any) -> None:
    start = time.process_time()
    with contextlib.redirect_stdout(sys.stderr):
        work()
    print(f"{what}: {time.process_time() - start:.0f} s of processor time", file=sys.stderr, flush=True)
