"""Digests of a step's input, made beside the work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from aicompress.checkpoint.reader import digests
from aicompress.checkpoint.source import Source


@contextmanager
def hashing(source: Source) -> Iterator[Future[dict[str, str]]]:
    """Digests of the input beside the work, for hashing releases the GIL; given up when the work fails."""
    over = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(digests, source, over.is_set)
        finally:
            over.set()
