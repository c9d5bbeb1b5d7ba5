"""When the command started: its entry point imports this first, for imports are part of what a user waits for."""

from __future__ import annotations

import time

STARTED = time.perf_counter()
