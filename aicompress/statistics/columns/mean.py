"""The mean of x."""

from __future__ import annotations

from aicompress.statistics.column import ColumnStatistic

STATISTIC = ColumnStatistic("mean", None, degree=1)
