"""The environment of a run: versions, machine, threads."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from functools import cache
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Versions of the packages that decide results and speed, and the machine."""
    return {
        "python": platform.python_version(),
        **_versions(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


@cache
def _versions() -> dict[str, str]:
    packages = ("aicompress", "torch", "transformers", "safetensors", "compressed-tensors", "numpy")
    return {name: importlib.metadata.version(name) for name in packages}


def _cpu() -> str:
    """The processor's name, where the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
