"""Digests of a step: of its input files, computed beside the work, and of everything that decides its output."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
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


def with_digests(output: Output, inputs: Mapping[str, str], further: Mapping[str, Mapping[str, str]]) -> Output:
    """The output with the inputs' real digests in its lineage; no length changes.

    Args:
        output: as planned.
        inputs: sha256 of the input's files by name.
        further: the same of inputs beside the first.
    """
    *earlier, step = output.manifest.lineage
    beside = {name: {"inputs": dict(files)} for name, files in further.items()}
    lineage = (*earlier, {**step, "inputs": dict(inputs), **beside})
    return replace(output, manifest=replace(output.manifest, lineage=lineage))
