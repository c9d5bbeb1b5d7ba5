"""Compiled functions run by the threads of torch's own OpenMP.

A pool beside it would wait for the cores on which torch's threads stay awake after each of their products.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


@cache
def parallel() -> Any | None:
    """OpenMP's call of a function by many threads; None where torch has loaded another runtime than GNU's."""
    try:
        call = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    call.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    call.restype = None
    return call


def run(entry: int, shares: int, threads: int, *numbers: int) -> None:
    """Let threads do the shares of a task.

    Args:
        entry: address of a function of one argument, the address of the task: integers of 64 bits. The first is the
            number of the next share, which a thread raises as it takes it (`llvm.claimed`); then come the number of
            shares and what follows here.
        shares: pieces of work.
        threads: at most.
        numbers: of the task, addresses among them; what they point to is held by the caller.
    """
    call = parallel()
    assert call is not None
    task = (ctypes.c_int64 * (len(numbers) + 2))(0, shares, *numbers)
    call(entry, task, min(threads, shares), 0)
