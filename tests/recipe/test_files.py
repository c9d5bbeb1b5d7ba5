"""Recipe files and edits of them."""

from __future__ import annotations

import contextlib
import copy
import os
import threading
from pathlib import Path

import pytest

from aicompress.errors import RecipeError
from aicompress.recipe import load as load_step
from aicompress.recipe.files import read_yaml, shipped, with_overrides, with_text

SHIPPED = sorted(path for path in shipped().rglob("*.yaml") if path.parent.name != "demo")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_one_text_serves_every_section_that_reads_text(path: Path, tmp_path: Path) -> None:
    plain = read_yaml(path.read_text(encoding="utf-8"), path.name)
    sections = [plain.get("calibration"), plain.get("data"), *(plain.get("quality") or {}).values()]
    texts = [section for section in sections if section and "text" in section]
    others = [section for section in sections if section and not {"text", "drawn"} & section.keys()]
    if (others and not texts) or (path.parent.name == "eval" and not texts):
        with pytest.raises(RecipeError, match=r"--text: .* reads no text") as refusal:
            with_overrides(plain, [f"text={tmp_path / 'a.txt'}"])
        assert refusal.value.hint
        return
    edited = with_overrides(copy.deepcopy(plain), [f"text={tmp_path / 'a.txt'}"])
    for name in ("calibration", "data"):
        assert name not in plain or edited[name] == {**plain[name], "text": str(tmp_path / "a.txt")}
    for name, figure in (plain.get("quality") or {}).items():
        assert edited["quality"][name] == ({**figure, "text": str(tmp_path / "a.txt")} if "text" in figure else figure)
    assert {key: value for key, value in edited.items() if key not in ("calibration", "data", "quality")} == {
        key: value for key, value in plain.items() if key not in ("calibration", "data", "quality")
    }


@pytest.mark.parametrize(("text", "hint"), [("a: !!int x", "write another value"), ("a: [", "check the indentation")])
def test_what_is_no_yaml_is_told_by_its_line(text: str, hint: str) -> None:
    with pytest.raises(RecipeError, match="is not YAML at line 1") as refusal:
        read_yaml(text, "r.yaml")
    assert refusal.value.hint == hint


def test_text_is_looked_for_from_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    edited = with_overrides({"version": 1, "calibration": {"samples": 3}}, ["text=a b.txt", "calibration.samples=4"])
    assert edited["calibration"] == {"samples": 4, "text": str(tmp_path / "a b.txt")}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.jsonl", "jsonl"), ("a.ndjson", "jsonl"), ("a.JSON", "jsonl"), ("a.tsv", "csv"), ("a.parquet", "parquet")],
)
def test_a_text_that_holds_rows_is_read_as_rows(name: str, kind: str, tmp_path: Path) -> None:
    plain = {"version": 1, "calibration": {"text": "b.txt", "samples": 3}}
    edited = with_overrides(plain, [f"text={tmp_path / name}", "calibration.field=messages"])
    assert edited["calibration"] == {kind: str(tmp_path / name), "samples": 3, "field": "messages"}
    assert with_text({}, [f"text={tmp_path / name}"])["calibration"] == {kind: str(tmp_path / name)}


@pytest.mark.parametrize(
    ("recipe", "file", "source"),
    [
        ("eval/text-classifier", "a.csv", "csv"),
        ("eval/text-classifier", "a.jsonl", "jsonl"),
        ("eval/sts", "a.tsv", "pairs"),
        ("eval/mnist-mlp", "a.npz", "arrays"),
        ("distill/mlp-labels", "a.safetensors", "arrays"),
    ],
)
def test_a_file_of_what_a_recipe_reads_takes_the_place_of_its_own(
    recipe: str, file: str, source: str, tmp_path: Path
) -> None:
    plain = read_yaml((shipped() / f"{recipe}.yaml").read_text(encoding="utf-8"), recipe)
    edited = with_overrides(copy.deepcopy(plain), [f"text={tmp_path / file}"])
    ((own, section),) = {**plain.get("quality", {}), **({"data": plain["data"]} if "data" in plain else {})}.items()
    left = {key: value for key, value in section.items() if key not in ("jsonl", "pairs", "arrays")}
    assert edited.get("quality", edited)[own] == {**left, source: str(tmp_path / file)}
    with pytest.raises(RecipeError, match="reads no text"):
        with_overrides(plain, ["text=a.txt"])


def test_paths_of_an_edit_start_here_however_deep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    edits = ["quality={accuracy: {csv: a.csv, labels: y}}", "calibration={hub: org/data}", "student={config: s.json}"]
    assert with_overrides({"version": 1}, edits) == {
        "version": 1,
        "quality": {"accuracy": {"csv": str(tmp_path / "a.csv"), "labels": "y"}},
        "calibration": {"hub": "org/data"},
        "student": {"config": str(tmp_path / "s.json")},
    }


def test_a_source_that_an_edit_gives_is_the_only_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    plain = {"version": 1, "calibration": {"text": "b.txt", "samples": 3}}
    edited = with_overrides(copy.deepcopy(plain), ["calibration.csv=a.csv"])
    assert edited["calibration"] == {"csv": str(tmp_path / "a.csv"), "samples": 3}
    both = with_overrides(plain, ["calibration.csv=a.csv", "calibration.text=a.txt"])
    assert set(both["calibration"]) == {"csv", "text", "samples"}  # which is refused: none is the one that is meant


def test_a_recipe_comes_through_a_pipe_and_data_does_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").touch()
    pipe = tmp_path / "folder" / "pipe"
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    text = "version: 1\nmethod: {name: gptq}\ncalibration: {text: a.txt, samples: 1}\n"
    for edits in ([], [f"calibration.text={pipe}"]):
        writer = threading.Thread(target=pipe.write_text, args=(text,))
        writer.start()
        with pytest.raises(RecipeError, match="is a pipe") if edits else contextlib.nullcontext():
            assert load_step(str(pipe), "quantize", edits).calibration.path == str(tmp_path / "a.txt")
        writer.join()


def test_a_calibration_that_an_edit_makes_reads_the_text(tmp_path: Path) -> None:
    edits = [f"text={tmp_path / 'a.txt'}", "calibration.samples=4"]
    plain = {"version": 1, "method": {"name": "width"}}
    assert with_overrides(plain, edits)["calibration"] == {"text": str(tmp_path / "a.txt"), "samples": 4}
    drawn = with_overrides({"version": 1, "method": {}}, [*edits, "calibration.drawn=8"])
    assert drawn["calibration"] == {"samples": 4, "drawn": 8}
