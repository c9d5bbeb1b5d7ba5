"""Run work on several threads and take its results in order, a bounded number of them in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

AHEAD = 3  # jobs begun or done for each thread before the first result is taken
Job = TypeVar("Job")
Result = TypeVar("Result")


def in_order(jobs: Iterable[Job], work: Callable[[Job], Result]) -> Iterator[tuple[Job, Result]]:
    """Every job with its result, in the order of the jobs, on as many threads as torch has.

    The work must release the interpreter's lock for the most part, as reading, numpy and Zstandard do.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield from ((job, work(job)) for job in jobs)
        return
    waiting: deque[tuple[Job, Future[Result]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for job in jobs:
                waiting.append((job, pool.submit(work, job)))
                if len(waiting) > AHEAD * threads:
                    first, result = waiting.popleft()
                    yield first, result.result()
            while waiting:
                first, result = waiting.popleft()
                yield first, result.result()
        finally:
            for _, result in waiting:
                result.cancel()
