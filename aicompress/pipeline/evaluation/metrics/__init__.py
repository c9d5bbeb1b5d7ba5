"""Quality of outputs, each figure with its uncertainty, for one checkpoint or against baselines."""

from aicompress.pipeline.evaluation.metrics.measure import measure_quality

__all__ = ["measure_quality"]
