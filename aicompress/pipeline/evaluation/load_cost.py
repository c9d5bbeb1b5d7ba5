"""Measure the cost of loading a checkpoint, seconds and peak memory, in a process of its own.

The processes are forked from a server that has imported what they all need, and nothing else: libraries are imported
once, however many checkpoints are measured, and each process holds what a new one would.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import forkserver, get_all_start_methods, get_context
from multiprocessing.context import ForkServerContext, SpawnContext
from statistics import median
from typing import TYPE_CHECKING

from aicompress.checkpoint.source import locate
from aicompress.data import Data
from aicompress.errors import CompressError, Refused
from aicompress.measure import peak_rss
from aicompress.model.loading.load import IMPORTED

if TYPE_CHECKING:
    from aicompress.pipeline.step.input import Adapted
    from aicompress.pipeline.step.models.running_model import Setting

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
    source: Adapted, setting: Setting, size: tuple[int, int] = (1, 16), labelled: Data | None = None
) -> Footprint:
    """Load a checkpoint in a process of its own.

    Args:
        source: the checkpoint, with what is merged into it.
        setting: how it is run, on the CPU.
        size: batch and length of the forward pass.
        labelled: arrays to take the inputs of a bare file from.

    Raises:
        Refused: it cannot be loaded.
        CompressError: loading it failed there; the message says why.
    """
    with ProcessPoolExecutor(1, _context(str(source.path)), _silence) as process:
        try:
            return process.submit(measure, source, setting, size, labelled).result()
        except Refused:
            raise
        except BrokenProcessPool:
            words = "the process was killed"
        except Exception as error:
            words = str(error) or type(error).__name__
    hint = "close other programs, or measure without `latency`"
    raise CompressError(f"{source.path} could not be loaded in a process of its own: {words}", hint)


def prepare(path: str) -> None:
    """Start importing, in the server, what loading this and other checkpoints takes, and do not wait for it."""
    if isinstance(_context(path), ForkServerContext):
        forkserver.ensure_running()


def _context(path: str) -> SpawnContext | ForkServerContext:
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, *_libraries(path)])
    return context


def _libraries(path: str) -> tuple[str, ...]:
    """What loading a checkpoint imports: that is no part of a load."""
    return ("aicompress.model.hf.modeling_aicompress", *IMPORTED) if os.path.isdir(path) else ()


def _silence() -> None:
    """Send what libraries print to nowhere: the command's own output is its user's."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def measure(source: Adapted, setting: Setting, size: tuple[int, int], labelled: Data | None) -> Footprint:
    """Measure the cost of loading a checkpoint in this process."""
    from aicompress.pipeline.step.models.running_model import example, forward_call

    path = str(source.path)
    for name in _libraries(path):
        import_module(name)
    idle = peak_rss()
    running = setting.start(source)
    inputs = example(running.module, *size, labelled)
    if inputs is not None:
        forward_call(running.module, inputs[0])()
    peak = peak_rss()
    del running
    evicted = evict(path)
    cold = _seconds(setting, source)
    warm = [_seconds(setting, source) for _ in range(WARM_LOADS)]
    return Footprint(cold, median(warm), peak, idle, evicted, inputs is not None)


def _seconds(setting: Setting, source: Adapted) -> float:
    start = time.perf_counter()
    setting.start(source)
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
