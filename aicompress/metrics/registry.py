"""The registry of metrics: every module of this package that has a METRIC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aicompress.discovery import members
from aicompress.metrics.metric import Metric
from aicompress.metrics.outputs import KINDS


def metrics() -> Mapping[str, Metric[Any, Any]]:
    """List all metrics by name, as recipes and reports order them: by the outputs they read, then by name.

    Raises:
        TypeError: two metrics have one name, or give figures of one name.
    """
    known: list[Metric[Any, Any]] = list(members("aicompress.metrics", "METRIC").values())
    owners: dict[str, str] = {}
    for metric in known:
        for figure in metric.figures:
            if owners.setdefault(figure.name, metric.name) != metric.name:
                raise TypeError(f"{owners[figure.name]} and {metric.name} both measure {figure.name!r}")
    return {metric.name: metric for metric in sorted(known, key=lambda m: (KINDS.index(m.reads), m.name))}
