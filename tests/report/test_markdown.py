"""Markdown is checked as GitHub reads it: through a CommonMark parser with tables."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from aicompress.recipe import load
from aicompress.report import markdown
from aicompress.report.markdown import to_markdown
from aicompress.report.model import Report
from aicompress.report.table import Table

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


class Cells(HTMLParser):
    """The text of every table cell, and every tag seen."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.inside = False
        self.feed(PARSER.render(source))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def section(text: str, title: str) -> list[str]:
    """Lines of the table under a heading or a folded title."""
    lines = text.split(title, 1)[1].splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("|"))
    end = next(at for at, line in enumerate(lines[start:], start) if not line.startswith("|"))
    return lines[start:end]


def test_title_headline_and_order(report: Report) -> None:
    lines = to_markdown(report).splitlines()
    assert lines[0] == "# quantize: `build/minilm` → `build/minilm-q4`"
    assert lines[2] == "**90.9 MB → 56.1 MB, 1.62× smaller; 19.8 bits per parameter; latency 0.610×.**"
    assert lines[4:6] == ["> [!WARNING]", "> - 1 layer was not selected: it holds 83.5 % of the output's bytes"]
    assert lines[7:9] == ["> [!CAUTION]", "> - Gate failed: size.ratio <= 0.3"]


def test_summary_states_bytes_exactly_and_what_was_timed(report: Report) -> None:
    rows = section(to_markdown(report), "[!CAUTION]")
    assert rows[0] == "|  | before | after | after / before |"
    assert rows[2] == "| weight bytes | 90.9 MB (90,868,376) | 56.1 MB (56,123,456) | 0.618× |"
    assert rows[6] == "| latency, median (whole model, 8 x 64 tokens) | 48.2 ms | 29.4 ms | 0.610× |"
    assert rows[8:] == [
        "| wall time of the step | – | 12.3 s | – |",
        "| peak memory of the step (RSS) | – | 412 MB | – |",
    ]


def test_gates_quality_kinds_and_training(report: Report) -> None:
    text = to_markdown(report)
    assert section(text, "## Gates")[2:] == [
        "| **FAILED** | `size.ratio <= 0.3` | 0.6176 |",
        "| passed | `quality.kl <= 0.05` | 0.0123 |",
    ]
    assert section(text, "## Quality")[2:] == [
        "| `kl` | – | 0.01230 | 0.01170 to 0.01290 | 102,400 | lower |",
        "| `accuracy` | 0.8201 | 0.8123 | 0.7900 to 0.8300 | 1,500 | higher |",
        "| `similarity.spearman` | – | 0.9876 | – | – | higher |",
    ]
    assert "| scale | 0 B | 348 KB (347,508) | – |" in section(text, "## Bytes by tensor kind")
    assert section(text, "## Training")[2:] == [
        "| best_step | 300 |",
        "| curve.loss | 2.500 → 0.7500, least 0.7500 (3 points) |",
        "| curve.held_out | 2.600 → 1.000, least 1.000 (3 points) |",
    ]


def test_one_row_per_layer(report: Report) -> None:
    rows = section(to_markdown(report), "<summary>Layers (25)</summary>")
    assert len(rows) == 2 + len(report.layers)
    assert rows[2] == (
        "| `embeddings.word_embeddings` | embedding | – | – | dense | – "
        "| 46.9 MB | 46.9 MB | 1.00× | 0 | – | left as it is |"
    )
    assert rows[6] == (
        "| `encoder.layer.0.output.dense` | linear | `rules[0]: *.output.dense` | rtn | int_grouped "
        "| bits=8 group_size=64 | 2.36 MB | 608 KB | 0.258× | 0.00647 | 15.3 ms | kept at 8 bits: most sensitive |"
    )


def test_a_layer_that_grew_stands_out(report: Report) -> None:
    grown = replace(report.layers[1], bytes_before=100, bytes_after=150)
    assert "| 100 B | 150 B | **1.50×** |" in to_markdown(replace(report, layers=(grown,)))


def test_recipe_lineage_and_environment(report: Report) -> None:
    text = to_markdown(report)
    block = text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(block) == report.recipe
    assert section(text, "<summary>Lineage")[2] == (
        "| 1 | prune | depth | recipe_sha256 cccccccccccc, tool aicompress 0.1.0, seed 0, "
        "inputs.model.safetensors dddddddddddd |"
    )
    assert "| cpu.model | x86_64 |" in section(text, "<summary>Environment")
    assert f"| sha256 of output model.safetensors | `{'b' * 64}` |" in section(text, "<summary>Environment")


def test_lists_are_shown_and_only_curves_are_summed_up(report: Report) -> None:
    listed = replace(
        report, environment={"load": [0.5, 1.0], "gpus": []}, training={"stages": ["a", "b"], "loss": [2, 1]}
    )
    text = to_markdown(listed)
    assert "| load | 0.5000, 1.000 |" in text
    assert "| gpus | – |" in text
    assert section(text, "## Training")[2:] == ["| stages | a, b |", "| loss | 2 → 1, least 1 (2 points) |"]


def test_what_was_not_measured_is_a_dash(report: Report) -> None:
    bare = replace(
        report, before=None, latency=None, quality={}, training={}, warnings=(), gates=(), layers=(), lineage=()
    )
    text = to_markdown(bare)
    assert text.startswith("# quantize: `build/minilm-q4`\n\n**56.1 MB; 19.8 bits per parameter.**\n\n| ")
    assert "| weight bytes | – | 56.1 MB (56,123,456) | – |" in text
    assert "| latency, median | – | – | – |" in text
    assert all(absent not in text for absent in ("None", "[!", "## Gates", "## Quality", "Layers", "Lineage"))


@pytest.mark.parametrize("before_bytes", [56_123_456, 56_000_000])
def test_no_gain_is_said(report: Report, before_bytes: int) -> None:
    assert report.before is not None
    text = to_markdown(replace(report, before=replace(report.before, weight_bytes=before_bytes)))
    assert ("not smaller" if before_bytes == 56_123_456 else "1.00× larger") in text


HOSTILE = (
    "<script>alert(1)</script>",
    "a|b",
    "`tick`",
    "``",
    "*bold* _it_ __b__ ~~x~~ ![i](http://x)",
    "a\nb",
    "&lt;",
    "$x$",
    "\\",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_come_through_as_they_are(report: Report, name: str) -> None:
    row = replace(report.layers[1], name=name, note=name, rule=name, detail={"key": name})
    hostile = replace(report, layers=(row,), warnings=(name,), lineage=(), recipe={"x": name}, environment={"e": name})
    read = Cells(to_markdown(hostile))
    flat = " ".join(name.split())
    found = next(cells for cells in read.rows if cells[1:2] == ["linear"] and len(cells) == 12)
    assert [found[0], found[2], found[5], found[11]] == [flat, flat, f"key={flat}", flat]
    assert not {"script", "em", "s", "img", "a"} & set(read.tags)
    assert read.tags.count("strong") == 2  # the headline and the failed gate


@given(st.text(max_size=20).filter(lambda text: "\x00" not in text))
def test_any_text_stays_in_its_cell(text: str) -> None:
    flat = " ".join(text.split())
    read = Cells(markdown.table(Table.of("", ["a", "b"], [[text, 1]])))
    assert read.rows == [["a", "b"], [flat, "1"]]


@given(st.text(max_size=30))
def test_a_fence_holds_any_text(text: str) -> None:
    tokens = [token for token in PARSER.parse(markdown.fenced(text, "yaml")) if token.type == "fence"]
    assert len(tokens) == 1
    assert tokens[0].info == "yaml"


@pytest.mark.parametrize("name", ["quantize/gptq-auto-bpw", "prune/wanda-search", "factorize/svd-rank"])
def test_a_recipe_is_printed_without_what_was_left_open_and_means_the_same(name: str, tmp_path: Path) -> None:
    command = name.split("/")[0]
    recipe = load(name, command)
    shown = markdown.recipe_yaml(recipe.resolved())
    assert "null" not in shown
    assert "[]" not in shown
    (tmp_path / "shown.yaml").write_text(shown)
    assert load(str(tmp_path / "shown.yaml"), command).resolved() == recipe.resolved()
    rule = {"match": "*.up_proj", "pattern": None}  # what its author wrote overrides the method
    assert yaml.safe_load(markdown.recipe_yaml({"rules": [rule], "tune": None})) == {"rules": [rule]}
