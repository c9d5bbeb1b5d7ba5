"""The largest |x|."""

from __future__ import annotations

import torch

from aicompress.statistics.column import ColumnStatistic

STATISTIC = ColumnStatistic("max_abs", torch.abs, degree=1, largest=True)
