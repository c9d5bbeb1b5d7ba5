from dataclasses import replace
from io import StringIO

import pytest

from aicompress.cli import render
from aicompress.report import compare, gates
from aicompress.report.html import to_html
from aicompress.report.markdown import to_markdown
from aicompress.report.model import Report
from aicompress.report.quality import Figure, direction, figures


def test_plain_numbers_dicts_and_sections() -> None:
    found = figures(
        {
            "kl": 0.5,
            "accuracy": {"value": 0.9, "low": 0.8, "high": 0.95, "n": 10, "baseline": 0.91},
            "novel": {"mse": 2},
        }
    )
    assert found == {
        "kl": Figure(0.5, None, None, None, None, "lower"),
        "accuracy": Figure(0.9, 0.8, 0.95, 10, 0.91, "higher"),
        "novel.mse": Figure(2, None, None, None, None, "lower"),
    }


def test_a_figure_that_is_no_finite_number_has_no_value() -> None:
    assert [figures({"kl": bad})["kl"].value for bad in (None, float("nan"), float("inf"), True, "0.1")] == [None] * 5


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("kl", "lower"),
        ("novel.perplexity", "lower"),
        ("sts_spearman", "higher"),
        ("top1_agreement", "higher"),
        ("accuracy_loss", None),
        ("surprise", None),
    ],
)
def test_direction_comes_from_the_name(name: str, better: str | None) -> None:
    assert direction(name) == better


def test_a_stated_direction_wins_over_the_name() -> None:
    assert figures({"surprise": {"value": 1.0, "better": "higher"}})["surprise"].better == "higher"


def test_what_differs_on_the_same_samples_is_shown_wherever_a_figure_is(report: Report) -> None:
    change = {"value": 1.00161, "low": 1.00063, "high": 1.00259, "kind": "ratio", "interval": "bootstrap"}
    perplexity = {"value": 76.03, "low": 71.7, "high": 80.4, "baseline": 75.91, "n": 102_000, "change": change}
    report = replace(report, quality={"perplexity": perplexity, "kl": 0.001})
    terminal = StringIO()
    render.report(report, terminal)
    compared = compare.to_markdown(compare.comparison([report]))
    for text in (terminal.getvalue(), to_markdown(report), to_html(report), compared):
        assert "1.0016× (1.0006 to 1.0026)" in text
    passed = gates.evaluate(["quality.perplexity.change.high <= 1.003", "quality.perplexity.change > 1.002"], report)
    assert [(gate.value, gate.passed) for gate in passed] == [(1.00259, True), (1.00161, False)]
    assert Report.from_json(report.to_json()).quality == report.quality


def test_what_figures_ran_on_is_named_for_both_where_it_differs(report: Report) -> None:
    kernels = {"kernels": "int4 on bfloat16", "baseline_kernels": "stored numbers"}
    figure = {"value": 0.01, "better": "lower", **kernels}
    shown = to_markdown(replace(report, quality={"kl": figure}))
    assert "int4 on bfloat16; baseline: stored numbers" in shown
    alike = {**figure, "baseline_kernels": figure["kernels"]}
    assert "baseline: " not in to_markdown(replace(report, quality={"kl": alike})).partition("## Quality")[2]
