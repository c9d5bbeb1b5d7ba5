"""The mean of x²: what the diagonal of a Gram matrix holds."""

from __future__ import annotations

import torch

from aicompress.statistics.column import ColumnStatistic

STATISTIC = ColumnStatistic("norms", torch.square, degree=2, of_gram=lambda gram: gram.diagonal().clone())
