from __future__ import annotations

import io
import subprocess
import sys

import pytest

from aicompress.cli import render
from aicompress.report.table import Cell, Column, Table

LONG = "encoder.layer.0.attention.self.query"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def lines(content: Table, file: io.StringIO) -> list[str]:
    render.table(content, file)
    return file.getvalue().splitlines()


def test_a_table_in_a_pipe_is_plain_and_never_wrapped() -> None:
    wide = Table.of("", ["layer", "bytes", "note"], [[LONG, 12, "x" * 300], ["b", 3456, None]])
    assert [line.rstrip() for line in lines(wide, io.StringIO())] == [
        "layer                                  bytes   note",
        "─" * (36 + 3 + 5 + 3 + 300),
        f"{LONG}      12   {'x' * 300}",
        "b                                      3,456   –",
    ]


def test_a_terminal_has_colours_and_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    verdict = Table("", (Column("gate"), Column("note")), ((Cell("FAILED", tone="bad"), Cell("word " * 20)),))
    shown = lines(verdict, Terminal())
    assert any("\x1b[1;31mFAILED" in line for line in shown)
    assert len(shown) > 3


def test_no_color_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    verdict = Table("", (Column("gate"),), ((Cell("FAILED", tone="bad"),),))
    assert not any("31m" in line for line in lines(verdict, Terminal()))


def test_optional_columns_give_way_and_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    columns = (Column("layer"), Column("kind", optional=True), Column("bytes", True), Column("note", optional=True))
    content = Table("", columns, ((Cell(LONG), Cell("linear"), Cell("590 KB"), Cell("most sensitive of all")),))
    shown = lines(content, io.StringIO())
    assert shown[0].split() == ["layer", "kind", "bytes"]
    assert shown[2].split() == [LONG, "linear", "590", "KB"]
    assert shown[-1] == "not shown at this width: note"


def test_control_characters_and_markup_of_names_do_not_reach_the_terminal() -> None:
    shown = "\n".join(lines(Table.of("", ["name"], [["a\x1b[31mb"], ["[red]x[/red]"], [":smile:"]]), Terminal()))
    assert "a?[31mb" in shown
    assert "[red]x[/red]" in shown
    assert ":smile:" in shown


def test_a_stream_that_is_only_ascii_gets_ascii() -> None:
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding="ascii")
    render.table(Table.of("", ["a → b", "size"], [["é", None], ["2×", 1]]), stream)
    stream.flush()
    assert buffer.getvalue().decode("ascii").splitlines()[0].startswith("a > b")


SCRIPT = """
import sys
from aicompress.cli import render
from aicompress.report import compare, gates, html, markdown, plots
from aicompress.report.model import Report, Side
side = Side("out", 2000, 1000, 500, {"linear": 1000})
report = Report("quantize", "0", side, side, (), None, {"kl": 0.1}, {}, ("look here",), (), {}, {}, (), 1.0, 1)
render.report(report)
markdown.to_markdown(report), gates.evaluate(["bytes < 1KB"], report)
assert "jinja2" not in sys.modules
html.to_html(report), html.comparison_to_html(compare.comparison([report, report]))
assert not {"torch", "numpy", "matplotlib"} & set(sys.modules)
"""


def test_a_report_is_shown_without_importing_torch() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    assert shown[:3] == [
        "quantize: out → out",
        "1.00 KB → 1.00 KB, not smaller; 16.0 bits per parameter",
        "warning: look here",
    ]
    assert any(
        line.split() == ["weight", "bytes", "1.00", "KB", "(1,000)", "1.00", "KB", "(1,000)", "1.00×"] for line in shown
    )
