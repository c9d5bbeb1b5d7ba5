from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from aicompress.report import plots, tables
from aicompress.report.model import Report

TEXT = "{http://www.w3.org/2000/svg}text"


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(TEXT)]


def widths(svg: str, colour: str) -> list[float]:
    """Widths of the bars of one colour, in the order drawn."""
    return [float(width) for width in re.findall(rf'<rect [^>]*width="([\d.]+)"[^>]*style="fill: {colour}"', svg)]


def test_bars_of_kinds_are_as_long_as_their_bytes(report: Report) -> None:
    svg = plots.kinds(report)
    before, after, legend = widths(svg, plots.PALETTE[0])
    assert after / before == pytest.approx(7_372_800 / 42_467_328, rel=1e-3)
    assert legend < after
    assert {"90.9 MB", "56.1 MB", "42.5 MB", "linear", "embedding", "scale"} <= set(texts(svg))


def test_a_side_without_bytes_is_drawn(report: Report) -> None:
    assert "0 B" in texts(plots.kinds(replace(report, before=None, after=replace(report.after, by_kind={"linear": 0}))))


def test_each_layer_has_its_bars_and_its_point(report: Report) -> None:
    rows = report.layers[1:]
    svg = plots.layers(rows)
    after = widths(svg, plots.PALETTE[0])
    assert len(after) == len(rows)
    assert after[3] / after[0] == pytest.approx(rows[3].bytes_after / rows[0].bytes_after, rel=1e-3)
    assert svg.count("<circle") == len(rows)  # one mark per known relative error
    assert {row.name for row in rows} <= set(texts(svg))


def test_an_unknown_error_has_no_point_and_many_layers_share_labels(report: Report) -> None:
    rows = [replace(report.layers[1], name=f"layer.{at}", rel_error=None if at else 0.5) for at in range(200)]
    svg = plots.layers(rows)
    assert svg.count("<circle") == 1
    named = [text for text in texts(svg) if text.startswith("layer.")]
    assert named == [f"layer.{at}" for at in range(0, 200, 4)]


def test_methods_are_told_apart_by_colour(report: Report) -> None:
    mixed = [replace(report.layers[1], method="rtn"), replace(report.layers[2], method="hqq")]
    assert {"rtn", "hqq"} <= set(texts(plots.layers(mixed)))


def test_training_curves(report: Report) -> None:
    curves = tables.curves(report.training)
    assert curves == {
        "curve.loss": [(0, 2.5), (150, 1.25), (300, 0.75)],
        "curve.held_out": [(0, 2.6), (150, 1.5), (300, 1.0)],
    }
    assert {"curve.loss", "curve.held_out", "step"} <= set(texts(plots.training(curves)))


def test_wide_ranges_get_a_logarithmic_axis() -> None:
    wide = plots.training({"loss": [(0, 100.0), (1, 1.0)]})
    assert {"1", "10", "100"} <= set(texts(wide))
    assert "100" not in texts(plots.training({"loss": [(0, 100.0), (1, -1.0)]}))[:3]


def test_pareto_names_every_report_and_joins_the_optimal_ones() -> None:
    svg = plots.pareto(
        [("a", 0.1, 0.9, True), ("b", 0.2, 0.95, True), ("<c>", 0.3, 0.9, False)], "size ratio", "accuracy"
    )
    assert {"a", "b", "<c>", "size ratio", "accuracy"} <= set(texts(svg))


def test_same_input_same_bytes_and_nothing_of_the_clock(report: Report) -> None:
    first = plots.layers(report.layers)
    assert first == plots.layers(report.layers)
    assert not re.search(r"20\d\d-\d\d-\d\d", first)


def test_what_is_not_finite_is_left_out(report: Report) -> None:
    rows = [replace(report.layers[1], rel_error=float("inf")), replace(report.layers[2], rel_error=0.5)]
    assert plots.layers(rows).count("<circle") == 1
    diverged = plots.training(
        {"loss": [(0, 2.0), (1, float("nan")), (2, float("inf"))], "held_out": [(0, float("nan"))]}
    )
    assert diverged.count("<circle") == 1
    assert {"loss", "held_out"} <= set(texts(diverged))
    svg = plots.pareto([("a", 0.1, float("nan"), True), ("b", 0.2, 0.9, False)], "size ratio", "accuracy")
    assert svg.count("<circle") == 1
    assert "a" not in texts(svg)


def test_everything_lies_within_the_picture(report: Report) -> None:
    named = [("a report with a long name that starts at the right", 0.9, 0.5, True), ("b", 0.1, 0.1, False)]
    methods = [replace(report.layers[1], method=f"method number {at}", name=f"{at}" * 60) for at in range(30)]
    for svg in (
        plots.kinds(report),
        plots.layers(report.layers),
        plots.layers(methods),
        plots.training(tables.curves(report.training)),
        plots.pareto(named, "size ratio", "accuracy"),
    ):
        drawing = ElementTree.fromstring(svg)
        _, _, width, height = map(float, drawing.attrib["viewBox"].split())
        for text in drawing.iter(TEXT):
            size = float(re.findall(r"font-size: ([\d.]+)px", text.attrib["style"])[0])
            reach = 0.5 * size * len(text.text or "")
            anchor = re.findall(r"text-anchor: (\w+)", text.attrib["style"])[0]
            start = float(text.attrib["x"]) - {"start": 0.0, "middle": reach / 2, "end": reach}[anchor]
            if "transform" not in text.attrib:
                assert start >= 0, text.text
                assert start + reach <= width, text.text
            assert size <= float(text.attrib["y"]) <= height, text.text
        for bar in drawing.iter("{http://www.w3.org/2000/svg}rect"):
            x, y, across, down = (float(bar.attrib[key]) for key in ("x", "y", "width", "height"))
            assert x + across <= width
            assert y + down <= height
