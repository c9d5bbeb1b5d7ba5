"""The record of the calibration data in a report, and in a file of statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from aicompress.checkpoint.statistics import StatisticsFile
from aicompress.data import SampleSource


def record_of_data(given: Sequence[SampleSource], processes: int, **settings: str) -> dict[str, Any]:
    """The record of samples that ran through the model.

    Args:
        given: where the samples came from.
        processes: how many processes ran them.
        settings: how the model ran.
    """
    return {
        "data": [dataclasses.asdict(source) for source in given],
        "statistics": [],
        "processes": processes,
        **settings,
    }


def record_of_files(files: Sequence[StatisticsFile]) -> dict[str, Any]:
    """The record of statistics that were read from files: the samples behind them, and the files."""
    sources = [source for file in files for source in file.calibration.get("data", [])]
    return {"data": sources, "statistics": [str(file.path) for file in files], "processes": 1}
