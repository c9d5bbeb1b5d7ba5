"""What is known of a layer beside its weight: statistics of its inputs, and of the gradients of a loss in it.

A statistic of the inputs' columns is one file in `columns/`: it is then collected, merged, stored and rescaled as the
others are, and a method reads it by naming it in `needs`.
"""

from aicompress.statistics.column import ColumnStatistic, column_statistics
from aicompress.statistics.gradients import GradientStats
from aicompress.statistics.inputs import InputStats

__all__ = ["ColumnStatistic", "GradientStats", "InputStats", "column_statistics"]
