from __future__ import annotations

from dataclasses import replace
from typing import Any

from aicompress.report import compare
from aicompress.report.compare import comparison
from aicompress.report.model import Report


def variant(report: Report, path: str, weight_bytes: int, quality: dict[str, Any]) -> Report:
    return replace(report, after=replace(report.after, path=path, weight_bytes=weight_bytes), quality=quality)


def marked(reports: list[Report]) -> list[str]:
    return [row.name for row in comparison(reports).rows if row.pareto]


def test_pareto_by_hand(report: Report) -> None:
    # (bytes, kl): c is beaten by b in both; d has the bytes of b and a worse kl; e is the smallest, a the best.
    points = {"a": (100, 0.01), "b": (50, 0.02), "c": (60, 0.03), "d": (50, 0.04), "e": (10, 0.5)}
    reports = [variant(report, name, size, {"kl": kl}) for name, (size, kl) in points.items()]
    assert marked(reports) == ["a", "b", "e"]


def test_equal_rows_do_not_beat_each_other(report: Report) -> None:
    assert marked([variant(report, name, 50, {"kl": 0.02}) for name in "ab"]) == ["a", "b"]


def test_higher_is_better_where_the_figure_says_so(report: Report) -> None:
    points = {"a": (100, 0.9), "b": (50, 0.8), "c": (60, 0.7)}
    reports = [variant(report, name, size, {"accuracy": {"value": v}}) for name, (size, v) in points.items()]
    assert marked(reports) == ["a", "b"]


def test_every_common_figure_is_an_objective(report: Report) -> None:
    # b is larger and worse in kl than a, but better in accuracy.
    reports = [
        variant(report, "a", 50, {"kl": 0.1, "accuracy": 0.7}),
        variant(report, "b", 60, {"kl": 0.2, "accuracy": 0.8}),
    ]
    assert comparison(reports).objectives == {"kl": "lower", "accuracy": "higher"}
    assert marked(reports) == ["a", "b"]


def test_a_figure_that_not_all_have_does_not_count_and_that_is_said(report: Report) -> None:
    reports = [variant(report, "a", 50, {"kl": 0.1, "accuracy": 0.7}), variant(report, "b", 60, {"kl": 0.2})]
    compared = comparison(reports)
    assert compared.objectives == {"kl": "lower"}
    assert [row.name for row in compared.rows if row.pareto] == ["a"]
    assert any("Not an objective" in note and "accuracy" in note for note in compared.notes)
    assert "| 0.2000 | – |" in compare.to_markdown(compared)


def test_without_a_common_quality_nothing_is_marked(report: Report) -> None:
    compared = comparison([variant(report, "a", 50, {"surprise": 1}), variant(report, "b", 60, {"surprise": 2})])
    assert not any(row.pareto for row in compared.rows)
    assert compare.legend(compared).startswith("No row is marked")


def test_names_are_the_shortest_that_tell_apart(report: Report) -> None:
    paths = ["runs/w4/out", "runs/w8/out", "runs/w8/best", "x/same", "x/same"]
    rows = comparison([variant(report, path, 1, {}) for path in paths]).rows
    assert [row.name for row in rows] == ["w4/out", "w8/out", "best", "same #1", "same #2"]


def test_different_inputs_recipes_and_machines_are_noted(report: Report) -> None:
    assert report.before is not None
    other = replace(
        report,
        before=replace(report.before, sha256={"model.safetensors": "f" * 64}),
        environment={"cpu": "another"},
        recipe={"quality": {"perplexity": {"samples": 3}}},
    )
    measured = replace(report, recipe={"quality": {"perplexity": {"samples": 4}}})
    notes = " ".join(comparison([measured, other]).notes)
    assert "different inputs" in notes
    assert "different recipes" in notes
    assert "different machines" in notes
    assert comparison([report, report]).notes == ()


def test_the_table(report: Report) -> None:
    assert report.before is not None
    report = replace(report, before=replace(report.before, weights=22_713_216))
    lines = compare.to_markdown(comparison([report])).splitlines()
    assert lines[0] == (
        "| name | Pareto | step | weight bytes | size ratio | bits/weight | kl | accuracy | similarity.spearman "
        "| latency ratio | time |"
    )
    assert lines[2] == (
        "| `minilm-q4` | ● | quantize | 56.1 MB (56,123,456) | 0.618× | 19.8 | 0.01230 (0.01170 to 0.01290) "
        "| 0.8123 (0.7900 to 0.8300) | 0.9876 | 0.610× | 12.3 s |"
    )
    assert "kl (lower is better), accuracy (higher is better), similarity.spearman (higher is better)" in lines[4]


def test_no_reports_make_an_empty_comparison() -> None:
    assert comparison([]).rows == ()
