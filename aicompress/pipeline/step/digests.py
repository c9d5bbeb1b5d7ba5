"""Digests of a step's input, made beside the work."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from aicompress import __version__
from aicompress.checkpoint.reader import digests
from aicompress.checkpoint.source import Source
from aicompress.data import digest
from aicompress.pipeline.layerwise.plan import Plan


@contextmanager
def hashing(source: Source) -> Iterator[Future[dict[str, str]]]:
    """Digests of the input beside the work, for hashing releases the GIL; given up when the work fails."""
    over = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(digests, source, over.is_set)
        finally:
            over.set()


def fingerprint(plan: Plan) -> str:
    """Digest of all that decides the output's bytes: input headers, recipe, version, file layout, calibration data."""
    inputs = {
        name: [str(ref.file.absolute()), ref.begin, str(ref.spec), ref.file.stat().st_mtime_ns, ref.file.stat().st_size]
        for name, ref in plan.checkpoint.tensors.items()
    }
    shards = [[shard.name, shard.nbytes, list(shard.specs)] for shard in plan.output.shards]
    whole = [__version__, plan.method.name, plan.recipe.sha256(), inputs, shards, _evidence(plan)]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _evidence(plan: Plan) -> list[Any]:
    """What stands for the data that a calibrated method, or a search, sees."""
    files = [[str(path.absolute()), path.stat().st_mtime_ns, path.stat().st_size] for path in plan.request.stats]
    reads = plan.search is not None or (bool(plan.needs) and not files)
    return [*files, digest(plan.recipe.calibration)] if reads and plan.recipe.calibration is not None else files
