from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO

import pytest

from aicompress.cli import render
from aicompress.report.compare import comparison
from aicompress.report.html import comparison_to_html, to_html
from aicompress.report.markdown import to_markdown
from aicompress.report.model import Report

VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """Text by tag, ids and links; every tag must be closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.texts.setdefault(tag, []).append("")
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "xlink:href", "src"):
                self.links.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data


def test_the_page_is_well_formed_and_holds_every_part(report: Report) -> None:
    page = Page(to_html(report))
    assert page.texts["title"] == ["quantize: build/minilm → build/minilm-q4"]
    assert page.texts["h2"] == [
        "Summary", "Gates", "Quality", "Bytes by tensor kind", "Training", "Compressed layers: size and error",
        "Layers", "Recipe", "Lineage", "Environment",
    ]  # fmt: skip
    cells = [text.strip() for text in page.texts["td"]]
    assert "90.9 MB (90,868,376)" in cells
    assert all(row.name in cells for row in report.layers)
    assert len(page.texts["svg"]) == 3


def test_warnings_and_failed_gates_come_before_the_figures(report: Report) -> None:
    text = to_html(report)
    places = [
        text.index(part)
        for part in ("size.ratio &lt;= 0.3: found 0.6176", "1 layer was not selected", "weights on disk")
    ]
    assert places == sorted(places)


def test_what_was_settled_is_no_warning(report: Report) -> None:
    settled = replace(report, warnings=(), notes=("model.layers: dropped block 1 of 3",))
    assert "<strong>Notes</strong><ul><li>model.layers: dropped block 1 of 3" in to_html(settled)
    assert "> [!NOTE]\n> - model.layers: dropped block 1 of 3" in to_markdown(settled)
    assert Report.from_json(settled.to_json()) == settled
    printed = StringIO()
    render.report(settled, printed)
    assert "note: model.layers: dropped block 1 of 3" in printed.getvalue()
    assert "warning" not in printed.getvalue()


def test_nothing_wider_than_a_phone_lies_outside_of_what_scrolls(report: Report) -> None:
    """Tables, plots and code have a container that scrolls and shows where they go on."""
    page = to_html(report)
    for element in ("<table", "<svg", "<pre"):
        assert page.count(element) == len(re.findall(rf'<div class="(?:scroll[^"]*|plot)">\s*{element}', page)) > 0
    style = page.partition("<style>")[2].partition("</style>")[0]
    (scrolls,) = re.findall(r"\n\.scroll, \.plot \{([^}]*)\}", style)
    assert "overflow-x: auto" in scrolls
    assert "background-attachment: local, local, scroll, scroll" in scrolls
    width = float(re.findall(r"\.plot svg \{ width: (\d+)px; \}", style.partition("max-width: 600px")[2])[0])
    smallest = min(float(size) for size in re.findall(r"font-size: ([\d.]+)px; text-anchor", page))
    assert smallest * width / 960 >= 10  # pixels


def test_nothing_is_fetched_and_ids_are_unique(report: Report) -> None:
    text = to_html(report)
    page = Page(text)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert all(target in page.ids for target in re.findall(r"url\(#([^)]+)\)", text))
    assert len(page.ids) == len(set(page.ids))
    assert "@import" not in text
    assert "default-src 'none'" in text


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "--><b>", '" onload="alert(1)', "$\\frac{1}{0}$", "]]>"])
def test_names_are_escaped_everywhere(report: Report, name: str) -> None:
    row = replace(report.layers[1], name=name, rule=name, method=name, form=name, note=name, detail={name: name})
    assert report.before is not None
    hostile = replace(
        report,
        layers=(row, replace(row, method="rtn")),
        warnings=(name,),
        before=replace(report.before, path=name, by_kind={name: 7}),
        recipe={name: name},
        environment={name: name},
        quality={name: 0.5},
        training={name: [1.0, 2.0]},
        lineage=({"command": name, "note": name},),
    )
    page = Page(to_html(hostile))
    assert [text.strip() for text in page.texts["td"]].count(name) >= 6
    assert len(page.texts["script"]) == 1  # the page's own
    assert "b" not in page.texts
    assert name in page.texts["svg"][1]


def test_the_same_report_gives_the_same_page(report: Report) -> None:
    assert to_html(report) == to_html(report)


def test_a_bare_report_has_only_what_it_knows(report: Report) -> None:
    bare = replace(
        report,
        before=None,
        latency=None,
        quality={},
        training={},
        warnings=(),
        gates=(),
        layers=(),
        lineage=(),
        recipe={},
    )
    page = Page(to_html(bare))
    assert page.texts["h2"] == ["Summary", "Bytes by tensor kind", "Environment"]
    assert "None" not in to_html(bare)


def test_rows_sort_by_value_not_by_text(report: Report) -> None:
    assert 'data-sort="2359296">2.36 MB</td>' in to_html(report)


def test_the_comparison_page_plots_each_objective(report: Report) -> None:
    smaller = replace(
        report, after=replace(report.after, path="b", weight_bytes=1000), quality={"kl": 0.5, "accuracy": 0.7}
    )
    page = Page(comparison_to_html(comparison([report, smaller])))
    assert page.texts["h2"] == ["Reports", "kl against size", "accuracy against size"]
    assert len(page.texts["svg"]) == 2
    assert all("minilm-q4" in text for text in page.texts["svg"])
    assert len(page.ids) == len(set(page.ids))
