"""The survey: what has to be measured on the running model before the bytes of an output are known.

A plan reads headers. Where names, shapes or config.json depend on a measurement, the planner asks the survey for it,
and nothing else of a plan runs the model. A dry run keeps what was measured, and the run that follows takes it up.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aicompress import __version__
from aicompress import data as sources
from aicompress.checkpoint import Checkpoint
from aicompress.model.loading.tokenizer import vocabulary_digest
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.workers import Processes, processes
from aicompress.recipe import Recipe


@dataclass(frozen=True)
class SurveyResult:
    """A result of the survey.

    Attributes:
        tensors: by name.
        record: where the calibration samples came from, for the report.
    """

    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any] = field(default_factory=dict)


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

    def recorded(
        self, what: str, checkpoint: Checkpoint, recipe: Recipe, measure: Callable[[Progress], SurveyResult]
    ) -> SurveyResult:
        """What `measure` gives, or what a dry run of the same step kept.

        Several processes measure together; the first one's file decides for all of them whether they have to.

        Args:
            what: the measurement in a few words, such as "influence of 24 blocks"; part of what tells it from others.
            checkpoint, recipe: of the step.
            measure: told of progress.
        """
        team = processes(torch.device("cpu"))
        path = cache_folder() / f"{_key(what, checkpoint, recipe)}.safetensors"
        kept = team.gather(_read(path) if team.rank == 0 else None)[0]
        if kept is not None:
            self.measured.append(f"{what} (measured by an earlier dry run)")
            self._use_up(path, team)
            return SurveyResult(*kept)
        measured = measure(lambda part, done, total: self.progress(f"survey: {what}: {part}", done, total))
        self.progress(f"survey: {what}", 1, 1)
        written = self.keep and team.rank == 0 and _write(path, measured)
        self.measured.append(f"{what} (kept for the run)" if written else what)
        return measured

    def ran(self, what: str) -> None:
        """Note that the model ran for something that is too little to be kept."""
        self.measured.append(what)

    def _use_up(self, path: Path, team: Processes) -> None:
        """Remove a file that has been read, unless this is another dry run."""
        if not self.keep and team.rank == 0:
            with contextlib.suppress(OSError):
                path.unlink()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """A kept measurement; None where there is none, or none that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get("record", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, record  # noqa: SIM118
    except (OSError, SafetensorError, ValueError):
        return None


def _write(path: Path, measured: SurveyResult) -> bool:
    """Keep a measurement; False where the folder cannot be written: then the run measures again."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    tensors = {name: tensor.contiguous() for name, tensor in measured.tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, {"record": json.dumps(measured.record)})
        partial.replace(path)
    except (OSError, SafetensorError):
        return False
    return True


def _key(what: str, checkpoint: Checkpoint, recipe: Recipe) -> str:
    """Digest of all that a measurement depends on: input files, tokenizer, recipe, version, calibration data."""
    files = [[str(file.absolute()), file.stat().st_mtime_ns, file.stat().st_size] for file in checkpoint.source.files]
    data = "" if recipe.calibration is None else sources.digest(recipe.calibration)
    tokens = vocabulary_digest(checkpoint.source.folder)
    whole: list[Any] = [__version__, what, recipe.sha256(), files, tokens, data]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
