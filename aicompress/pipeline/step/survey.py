"""The survey: what has to be measured on the running model before the bytes of an output are known.

A plan reads headers. Where names, shapes or config.json depend on a measurement, the planner asks the survey for it,
and nothing else of a plan runs the model. A dry run keeps what was measured, and the run that follows takes it up.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from aicompress import __version__
from aicompress import data as sources
from aicompress.checkpoint import Checkpoint
from aicompress.pipeline.step.options import Progress
from aicompress.recipe import Recipe

Measure = Callable[[Progress], Mapping[str, Tensor]]


def cache_folder() -> Path:
    """Where dry runs keep their measurements: `$XDG_CACHE_HOME/aicompress`, or `~/.cache/aicompress`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "aicompress" / "survey"


@dataclass
class Survey:
    """Measurements of one step, made while it is planned.

    Attributes:
        keep: a dry run: results are kept in files for the run that follows, which uses them up.
        progress: told of every measurement.
        measured: what was measured, in words, for the plan that is printed.
    """

    keep: bool = False
    progress: Progress = lambda what, done, total: None
    measured: list[str] = field(default_factory=list)

    def result(self, what: str, checkpoint: Checkpoint, recipe: Recipe, measure: Measure) -> dict[str, Tensor]:
        """The tensors that `measure` gives, or those that a dry run of the same step kept.

        Args:
            what: the measurement in a few words, such as "influence of 24 blocks"; part of what tells it from others.
            checkpoint, recipe: of the step.
            measure: (progress) -> tensors by name.
        """
        self.measured.append(what)
        path = cache_folder() / f"{_key(what, checkpoint, recipe)}.safetensors"
        if path.exists():
            kept: dict[str, Tensor] = load_file(path)
            if not self.keep:
                path.unlink(missing_ok=True)
            return kept
        tensors = {name: tensor.contiguous() for name, tensor in measure(self._told(what)).items()}
        if self.keep:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            save_file(tensors, partial)
            partial.replace(path)
        return tensors

    def _told(self, what: str) -> Progress:
        return lambda part, done, total: self.progress(f"survey: {what}: {part}", done, total)


def _key(what: str, checkpoint: Checkpoint, recipe: Recipe) -> str:
    """Digest of all that a measurement depends on: input files, recipe, version, calibration data."""
    files = [[str(file.absolute()), file.stat().st_mtime_ns, file.stat().st_size] for file in checkpoint.source.files]
    data = "" if recipe.calibration is None else sources.digest(recipe.calibration)
    whole: list[Any] = [__version__, what, recipe.sha256(), files, data]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
