"""The mean of |x|."""

from __future__ import annotations

import torch

from aicompress.statistics.column import ColumnStatistic

STATISTIC = ColumnStatistic("mean_abs", torch.abs, degree=1)
