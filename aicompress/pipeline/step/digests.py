"""Digests of a step: of its input files, computed beside the work, and of everything that decides its output."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from aicompress import __version__
from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.reader import digests
from aicompress.checkpoint.source import Source
from aicompress.pipeline.step.output import Output


@contextmanager
def hashing(inputs: Sequence[Source]) -> Iterator[list[Future[dict[str, str]]]]:
    """Digests of the files of each input, computed in threads: hashing releases the GIL. An error stops them."""
    over = threading.Event()
    with ThreadPoolExecutor(len(inputs)) as pool:
        try:
            yield [pool.submit(digests, source, over.is_set) for source in inputs]
        finally:
            over.set()


def fingerprint(inputs: Sequence[Checkpoint], output: Output | None, *settings: Any) -> str:
    """Digest of everything that decides an output's bytes, to tell whether a stopped run can be resumed.

    Args:
        inputs: what the step reads; their headers, times and sizes count.
        output: its file layout counts; None where several are made after one another.
        settings: whatever else counts, JSON-ready: the recipe's digest, the data's.
    """
    tensors = [
        [name, str(ref.file.absolute()), ref.begin, str(ref.spec), stat.st_mtime_ns, stat.st_size]
        for checkpoint in inputs
        for name, ref in {**checkpoint.foreign.refs, **checkpoint.tensors}.items()
        for stat in [ref.file.stat()]
    ]
    shards = [[shard.name, shard.nbytes, list(shard.specs)] for shard in (output.shards if output else ())]
    merged = [[*checkpoint.foreign.merged, *checkpoint.foreign.told] for checkpoint in inputs]
    whole = [__version__, tensors, shards, merged, *settings]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
