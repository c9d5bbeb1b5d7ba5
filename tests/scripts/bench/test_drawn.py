"""The comparison of drawn tokens with text: what it runs, and on what."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from aicompress import recipe as recipes
from aicompress.recipe import Recipe
from scripts.bench import drawn


def given(**named: Path | None) -> argparse.Namespace:
    paths = dict.fromkeys(("model", "calibration", "text", "encoder", "sentences", "held"))
    return argparse.Namespace(**{**paths, **named}, windows=2, embedded=2)


def test_every_method_runs_on_all_kinds_of_data(tiny_llama: Path, text_file: Path, heldout_file: Path) -> None:
    (subject,) = drawn.subjects(given(model=tiny_llama, calibration=text_file, text=heldout_file))
    loaded: dict[tuple[str, str], Recipe] = {}
    for name, data, recipe, edits in drawn.jobs(subject):
        loaded[name, data] = recipes.load(recipe, recipe.partition("/")[0], edits)
    assert {name for name, _ in loaded} == set(drawn.METHODS)
    for (_, data), recipe in loaded.items():
        calibration = recipe.calibration
        if data == "none":
            assert calibration is None
            continue
        assert calibration is not None
        assert calibration.draws == ("drawn" in data)
        assert (calibration.kind == "text") == ("text" in data)
        assert calibration.samples == {"text": drawn.SAMPLES, "drawn": None}.get(data, subject.few)


def test_texts_are_asked_for(tiny_llama: Path) -> None:
    with pytest.raises(SystemExit, match="give --model with --calibration and --text"):
        drawn.main(["--model", str(tiny_llama)])
