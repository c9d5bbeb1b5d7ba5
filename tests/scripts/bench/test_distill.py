"""The benchmark of distillation: its targets are of its rows, its verdicts are told, a run that was cut goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aicompress.methods import get
from scripts.bench.distill import __main__ as distill
from scripts.bench.distill.__main__ import TARGETS, Target, known, measured, spread
from scripts.bench.distill.rows import COMPRESSED, RECIPES, ROWS, Row
from scripts.bench.distill.runs import Budget, Given


def test_targets_are_of_rows() -> None:
    assert {target.row for target in TARGETS} | {target.other for target in TARGETS if target.other} <= set(ROWS)
    for command, method, recipe in COMPRESSED.values():
        get(command, method["name"]).config(**method)
        assert (RECIPES / f"{recipe}.yaml").is_file()


def test_verdicts() -> None:
    figures = {"a": {"speed": [1.0, 2.0]}, "b": {"speed": [1.0, 1.0]}}
    line = Target("a", "speed", 1.3, "b", least=True).line(figures)
    assert line == "- a: speed is 1.500 × that of b, at least 1.3 is the target: met"
    assert "**missed**" in str(Target("a", "speed", 1.3).line(figures))
    assert Target("a", "loss", 1.0).line(figures) is None
    assert spread([2.0]) == "2"
    assert spread([1.0, 2.0, 3.0]) == "2 ± 2.5"


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Budget] = []

    def row(given: Given, budget: Budget) -> dict[str, float]:
        asked.append(budget)
        return {"loss": float(budget.seed)}

    rows = {"here": Row(("model",), 0.5, row), "not here": Row(("encoder",), 1.0, row)}
    monkeypatch.setattr(distill, "ROWS", rows)
    given = Given(tmp_path, tmp_path, *[None] * 6, windows=1, samples=1)
    for seeds in (1, 2):
        figures = measured(given, tmp_path / "results.jsonl", list(rows), seeds, 4.0)
    assert figures == {"here": {"loss": [0.0, 1.0]}}
    assert asked == [Budget(2.0, 0), Budget(2.0, 1)]
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [0, 1]
    assert set(known(tmp_path / "results.jsonl")) == {("here", 0, 4.0), ("here", 1, 4.0)}
