"""Settings of the C library's allocator, for threads that work through blocks of rows."""

from __future__ import annotations

import ctypes
import sys

import torch

KEPT = 1 << 24  # bytes
M_ARENA_MAX = -8  # of glibc's mallopt


def share_one_arena() -> None:
    """Set the allocator up for threads that work through blocks of rows, before the first of them starts."""
    # The C library keeps freed memory up to the size of the largest block freed so far. The rest goes back to the
    # system, and to get it anew for every block of rows would cost as much as the arithmetic.
    torch.empty(KEPT, dtype=torch.uint8)
    # glibc gives every thread an arena of its own, whose holes no other thread fills: half as much again as one arena
    # takes. Blocks of rows are few and large, so that threads do not wait for each other.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)
