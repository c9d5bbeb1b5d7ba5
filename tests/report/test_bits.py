"""The table of a search for widths: what was worth choosing among, and prices between neighbours."""

from __future__ import annotations

from dataclasses import replace

from aicompress.report import bits
from aicompress.report.model import Report

OPTIONS = [
    {"bits": 2, "group": 128, "bytes": 1000, "loss": 0.9},
    {"bits": 2, "group": 64, "bytes": 2000, "loss": 0.5},
    {"bits": 2, "group": 32, "bytes": 4000, "loss": 0.3},
    {"bits": 3, "group": 128, "bytes": 5000, "loss": 0.35},  # more bytes, and more is lost
    {"bits": 3, "group": 64, "bytes": 6000, "loss": 0.1},
]


def row(report: Report, chosen: dict[str, int | float]) -> list[str]:
    unit = {"layers": ["q", "k"], "bits": chosen["bits"], "group": chosen["group"], "options": OPTIONS}
    (found,) = bits.table(replace(report, bits={"units": [unit]})).rows
    return [cell.text for cell in found]


def test_options_that_cost_more_and_lose_more_are_left_out(report: Report) -> None:
    shown = row(report, OPTIONS[1])
    assert shown[:3] == ["q and 1 that share its input", "2", "64"]
    assert shown[5] == "2/128: 0.900, 2/64: 0.500, 2/32: 0.300, 3/64: 0.100"
    assert [float(price) for price in shown[6:]] == [0.4, 0.1]  # per 1000 bytes: 0.4 / 1, 0.2 / 2


def test_the_chosen_option_is_shown_in_any_case(report: Report) -> None:
    assert row(report, OPTIONS[3])[5] == "2/128: 0.900, 2/64: 0.500, 2/32: 0.300, 3/128: 0.350, 3/64: 0.100"


def test_one_scale_for_a_row_has_no_group(report: Report) -> None:
    option = {"bits": 4, "group": None, "bytes": 100, "loss": 0.1}
    unit = {"layers": ["q"], "bits": 4, "group": None, "options": [option]}
    (found,) = bits.table(replace(report, bits={"units": [unit]})).rows
    assert [cell.text for cell in found][1:3] == ["4", bits.DASH]
