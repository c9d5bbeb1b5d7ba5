import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aicompress.errors import GateFailed, Problems, RecipeError
from aicompress.report.gates import FIGURES, Condition, evaluate, parse, parse_all, require
from aicompress.report.model import BYTE_KINDS, Gate, Report


@pytest.mark.parametrize(
    ("expression", "figure", "operator", "bound"),
    [
        ("size.ratio <= 0.3", "size.ratio", "<=", 0.3),
        ("latency.ratio<1.0", "latency.ratio", "<", 1.0),
        ("  quality.kl   <=   5e-2 ", "quality.kl", "<=", 0.05),
        ("quality.novel.top-1 >= .9", "quality.novel.top-1", ">=", 0.9),
        ("bytes <= 20MB", "bytes", "<=", 20e6),
        ("bytes <= 20 MiB", "bytes", "<=", 20 * 2**20),
        ("bytes < 1.5GB", "bytes", "<", 1.5e9),
        ("after.by_kind.linear < 3KiB", "after.by_kind.linear", "<", 3072),
        ("peak_rss <= 700000000", "peak_rss", "<=", 7e8),
        ("peak_rss <= 3 kB", "peak_rss", "<=", 3000),
        ("before.parameters != 7", "before.parameters", "!=", 7),
        ("training.best_step > -1", "training.best_step", ">", -1),
        ("quality.accuracy == 1.", "quality.accuracy", "==", 1),
    ],
)
def test_parse(expression: str, figure: str, operator: str, bound: float) -> None:
    assert parse(expression) == Condition(expression, figure, operator, bound)


@pytest.mark.parametrize(
    ("expression", "message", "hint"),
    [
        ("", "has no comparison", "size.ratio <= 0.3"),
        ("size.ratio", "has no comparison", "size.ratio <= 0.3"),
        ("0 < size.ratio < 1", "more than once", "FIGURE OPERATOR NUMBER"),
        ("size.ratio = 0.3", "'=' is not a comparison", "'=='"),
        ("size.ratio =< 0.3", "'=<' is not a comparison", "'<='"),
        ("size.ratio <> 0.3", "'<>' is not a comparison", "<= >="),
        ("<= 0.3", "names no figure", "FIGURE"),
        ("0.3 >= size.ratio", "number on the left", "FIGURE"),
        ("size.ration <= 0.3", "unknown figure 'size.ration'", "'size.ratio'"),
        ("ratio <= 0.3", "unknown figure 'ratio'", "'latency.ratio' or 'size.ratio'"),
        ("after.by_kind.linears < 1", "unknown figure", "after.by_kind.linear"),
        ("quality <= 1", "is a section", "quality."),
        ("training < 1", "is a section", "training."),
        ("quality..kl < 1", "unknown figure", ""),
        ("__import__('os') < 1", "unknown figure", ""),
        ("size.ratio <=", "no number on the right", "FIGURE"),
        ("size.ratio <= small", "'small' is not a number", "FIGURE"),
        ("size.ratio <= 1 + 1", "'1 + 1' is not a number", "FIGURE"),
        ("size.ratio <= nan", "not a number", ""),
        ("size.ratio <= ٣", "not a number", ""),
        ("bytes <= 20 Mb", "unknown unit 'Mb'", "MB"),
        ("size.ratio <= 30%", "takes no unit", "30 alone"),
        ("latency.after_ms <= 5MB", "takes no unit", "5 alone"),
        ("bytes <= 1e999", "too large", ""),
    ],
)
def test_what_is_no_gate_is_refused_with_a_hint(expression: str, message: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(expression)
    assert message in caught.value.message
    assert repr(expression) in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.hint


def test_a_quality_that_will_not_be_measured_is_refused() -> None:
    assert parse("quality.kl.high <= 1", quality=["kl"]).figure == "quality.kl.high"
    with pytest.raises(RecipeError, match="will not be measured") as caught:
        parse("quality.perplexty <= 1", quality=["kl", "perplexity"])
    assert "'perplexity'" in caught.value.hint


def test_a_figure_without_its_section_is_told_where_it_is() -> None:
    with pytest.raises(RecipeError) as caught:
        parse("kl <= 1", quality=["kl", "perplexity"])
    assert caught.value.hint == "did you mean 'quality.kl'?"


def test_all_bad_gates_are_told_at_once() -> None:
    with pytest.raises(Problems) as caught:
        parse_all(["bytes <= 1", "bytes <=", "size <= 1"])
    assert len(caught.value.problems) == 2


@given(st.text(alphabet=st.one_of(st.sampled_from(".<>=! 0123456789eMKiBquality"), st.characters()), max_size=40))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        condition = parse(text)
    except RecipeError:
        return
    assert text == condition.expression
    assert condition.operator in text


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["<=", "<", ">=", ">", "==", "!="]))
def test_every_finite_number_is_read_exactly(bound: float, operator: str) -> None:
    assert parse(f"seconds {operator} {bound!r}").bound == bound


@pytest.mark.parametrize(
    ("expression", "value", "passed"),
    [
        ("bytes <= 56123456", 56_123_456, True),
        ("bytes < 56123456", 56_123_456, False),
        ("bytes >= 56123456", 56_123_456, True),
        ("bytes > 56123456", 56_123_456, False),
        ("bytes == 56123456", 56_123_456, True),
        ("bytes != 56123456", 56_123_456, False),
        ("after.bytes <= 57MB", 56_900_000, True),
        ("after.by_kind.linear <= 8MB", 7_372_800, True),
        ("size.ratio <= 0.3", 56_123_456 / 90_868_376, False),
        ("latency.ratio < 1.0", 29.4 / 48.2, True),
        ("latency.after_p95_ms < 30", 31.75, False),
        ("quality.kl <= 0.05", 0.0123, True),
        ("quality.kl.high <= 0.0125", 0.0129, False),
        ("quality.similarity.spearman >= 0.95", 0.9876, True),
        ("training.best_step == 300", 300, True),
        ("quality.perplexity <= 50", None, False),
        ("quality.perplexity != 50", None, False),
        ("quality.similarity <= 1", None, False),
        ("after.by_kind.conv >= 0", None, False),
    ],
)
def test_evaluate(report: Report, expression: str, value: float | None, passed: bool) -> None:
    assert evaluate([expression], report) == (Gate(expression, value, passed),)


def test_a_figure_that_is_not_finite_fails_every_gate(report: Report) -> None:
    broken = replace(report, quality={"kl": float("nan"), "perplexity": {"value": float("inf")}})
    gates = evaluate(["quality.kl != 1", "quality.perplexity >= 1"], broken)
    assert [(gate.value, gate.passed) for gate in gates] == [(None, False)] * 2


def test_without_latency_a_latency_gate_fails(report: Report) -> None:
    assert evaluate(["latency.ratio >= 0"], replace(report, latency=None)) == (Gate("latency.ratio >= 0", None, False),)


def test_a_quality_name_may_hold_dots(report: Report) -> None:
    dotted = replace(report, quality={"stsb.dev": {"value": 0.8}})
    assert evaluate(["quality.stsb.dev >= 0.7"], dotted)[0].value == 0.8


def test_every_listed_figure_is_in_the_report(report: Report) -> None:
    kinds = dict.fromkeys(BYTE_KINDS, 1)
    assert report.before is not None
    measured = {"by_kind": kinds, "load_seconds": 1.0, "cold_load_seconds": 1.0, "load_peak_rss": 1, "weights": 1}
    full = replace(
        report, waited=1.0, before=replace(report.before, **measured), after=replace(report.after, **measured)
    )
    assert full.latency is not None
    full = replace(full, latency=replace(full.latency, low=0.5, high=0.6))
    gates = evaluate([f"{figure} >= 0" for figure in FIGURES], Report.from_json(full.to_json()))
    assert [gate.expression for gate in gates if not gate.passed] == []


def test_the_vocabulary_covers_every_number_of_a_side(report: Report) -> None:
    numbers = {key for key, value in json.loads(report.to_json())["after"].items() if isinstance(value, int | float)}
    assert {f"after.{key}" for key in numbers} <= set(FIGURES)


def test_require_names_every_failed_gate(report: Report) -> None:
    require(evaluate(["bytes < 1GB"], report))
    with pytest.raises(GateFailed) as caught:
        require(evaluate(["bytes < 1GB", "bytes < 1MB", "quality.none < 1"], report))
    assert caught.value.exit_code == 3
    assert caught.value.message == (
        "2 of 3 gates failed: bytes < 1MB (found 56,123,456); quality.none < 1 (not measured)"
    )
