"""Metrics: what `eval` measures of a model's outputs, one file each, found by discovery.

A metric names the key of its section in a recipe (`quality: {perplexity: {...}}`), the outputs that it reads, and the
figures that it makes of them. It runs no model: `pipeline/evaluation` does, and hands every metric its outputs.
"""

from aicompress.metrics.estimate import Estimate
from aicompress.metrics.metric import FigureSpec, MeasuredFigures, Metric
from aicompress.metrics.registry import metrics

__all__ = ["Estimate", "FigureSpec", "MeasuredFigures", "Metric", "metrics"]
