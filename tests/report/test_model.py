import json
from dataclasses import replace

import pytest

from aicompress.errors import Refused
from aicompress.layer import KINDS
from aicompress.report.model import BYTE_KINDS, Report


def test_json_round_trip_keeps_everything(report: Report) -> None:
    assert Report.from_json(report.to_json()) == report


def test_json_has_the_derived_figures(report: Report) -> None:
    plain = json.loads(report.to_json())
    assert plain["size"]["ratio"] == pytest.approx(56_123_456 / 90_868_376)
    assert plain["latency"]["ratio"] == pytest.approx(29.4 / 48.2)
    assert plain["after"]["bits_per_parameter"] == pytest.approx(8 * 56_123_456 / 22_713_216)


def test_what_is_not_finite_becomes_null_in_strict_json(report: Report) -> None:
    bad = replace(report, quality={"perplexity": float("inf")}, training={"curve": [{"step": 1, "loss": float("nan")}]})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    plain = json.loads(bad.to_json(), parse_constant=refuse)
    assert plain["quality"]["perplexity"] is None
    assert plain["training"]["curve"] == [{"step": 1, "loss": None}]


def test_without_a_baseline_there_are_no_ratios(report: Report) -> None:
    assert report.latency is not None
    alone = replace(report, before=None, latency=replace(report.latency, before_ms=None, before_p95_ms=None))
    assert alone.size_ratio is None
    assert alone.latency is not None
    assert alone.latency.ratio is None
    assert Report.from_json(alone.to_json()) == alone


def test_a_checkpoint_without_parameters_has_no_bits_per_parameter(report: Report) -> None:
    assert replace(report.after, parameters=0).bits_per_parameter is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "no schema_version"),
        ("{}", "no schema_version"),
        ('{"schema_version": "1"}', "no schema_version"),
        ('{"schema_version": 99}', "newer"),
        ('{"schema_version": 1}', "damaged"),
    ],
)
def test_what_is_no_report_is_refused(text: str, message: str) -> None:
    with pytest.raises(Refused, match=message) as caught:
        Report.from_json(text)
    assert caught.value.hint


def test_a_damaged_layer_row_is_refused(report: Report) -> None:
    plain = json.loads(report.to_json())
    del plain["layers"][0]["bytes_after"]
    with pytest.raises(Refused, match="damaged"):
        Report.from_json(json.dumps(plain))


def test_every_layer_kind_is_a_byte_kind() -> None:
    assert set(KINDS) < set(BYTE_KINDS)
