"""Metrics: what `eval` measures of a model's outputs, one file each, found by discovery.

A metric names the key of its section in a recipe (`quality: {perplexity: {...}}`), the outputs that it reads, and the
figures that it makes of them. It runs no model: `pipeline/evaluation` does, and hands every metric its outputs.
"""

from collections.abc import Mapping
from typing import Any

from aicompress.discovery import members
from aicompress.metrics.metric import Estimate, FigureSpec, MeasuredFigures, Metric
from aicompress.metrics.outputs import KINDS

__all__ = ["Estimate", "FigureSpec", "MeasuredFigures", "Metric", "metrics"]


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
