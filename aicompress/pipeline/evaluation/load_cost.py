"""Measure the cost of loading a checkpoint, seconds and peak memory, in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import aicompress
from aicompress.checkpoint.source import locate
from aicompress.data import Data
from aicompress.errors import CompressError
from aicompress.measure import peak_rss
from aicompress.recipe import Model

if TYPE_CHECKING:
    from aicompress.pipeline.step.running_model import Setting

WARM_LOADS = 3


@dataclass(frozen=True)
class Footprint:
    """Cost of loading.

    Attributes:
        cold_seconds: load time with the files evicted from the page cache, where the system allows that.
        warm_seconds: median of WARM_LOADS loads with the files in the page cache.
        peak_rss: bytes at the highest point of a first load and one forward pass.
        idle_rss: of these, bytes that Python and the libraries took before the load.
        evicted: the files were evicted before the cold load.
        ran: a forward pass was made; False where nothing says what the model takes.
    """

    cold_seconds: float
    warm_seconds: float
    peak_rss: int
    idle_rss: int
    evicted: bool
    ran: bool


def footprint(
    path: str,
    model: Model | None,
    allow_code: bool,
    size: tuple[int, int],
    labelled: Data | None,
    kernels: str = "fast",
) -> Footprint:
    """Load a checkpoint in a fresh process.

    Args:
        model: how to build a bare file's module.
        allow_code: the recipe's factory may run.
        size: batch and length of the forward pass.
        labelled: arrays to take the inputs of a bare file from.
        kernels: fast or reference.

    Raises:
        CompressError: the process failed; its last words are in the message.
    """
    request = {
        "path": path,
        "model": None if model is None else model.model_dump(mode="json"),
        "allow_code": allow_code,
        "size": size,
        "labelled": None if labelled is None else labelled.model_dump(mode="json"),
        "kernels": kernels,
    }
    package = str(Path(aicompress.__file__).parent.parent)
    given = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package, given] if given else [package])}
    done = subprocess.run(
        [sys.executable, "-m", "aicompress.pipeline.evaluation.load_cost"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CompressError(f"{path} could not be loaded in a process of its own: {words}", "")
    return Footprint(**json.loads(done.stdout.strip().splitlines()[-1]))


def measure(request: dict[str, Any]) -> Footprint:
    """Measure the cost of loading a checkpoint in this process."""
    from aicompress.pipeline.step.running_model import Setting, example, forward_call

    model = None if request["model"] is None else Model.model_validate(request["model"])
    labelled = None if request["labelled"] is None else Data.model_validate(request["labelled"])
    setting = Setting(model, request["allow_code"], kernels=request["kernels"])
    path = request["path"]
    import aicompress.model.hf.modeling_aicompress  # noqa: F401  # importing transformers is no part of a load

    batch, length = request["size"]
    idle = peak_rss()
    running = setting.start(path)
    inputs = example(running.module, batch, length, labelled)
    if inputs is not None:
        forward_call(running.module, inputs[0])()
    peak = peak_rss()
    del running
    evicted = evict(path)
    cold = _seconds(setting, path)
    warm = [_seconds(setting, path) for _ in range(WARM_LOADS)]
    return Footprint(cold, median(warm), peak, idle, evicted, inputs is not None)


def _seconds(setting: Setting, path: str) -> float:
    start = time.perf_counter()
    setting.start(path)
    return time.perf_counter() - start


def evict(path: str) -> bool:
    """Drop a checkpoint's files from the page cache; False where the system does not offer it."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in locate(path).files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # only pages that are on the disk can be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return True


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(measure(json.load(sys.stdin)))) + "\n")
