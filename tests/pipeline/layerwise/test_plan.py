"""A plan finds every problem before the first byte, and its dry run states exact bytes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from aicompress.errors import OutOfSpace, OutputExists, Problems, Refused
from aicompress.pipeline import steps
from aicompress.pipeline.layerwise import run as layerwise
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import load, shipped
from aicompress.report.plan import layout

RECIPES = [f"{f}/{p.stem}" for f in ("quantize", "factorize", "prune") for p in sorted((shipped() / f).glob("*.yaml"))]


def planned(source: Path, out: Path, recipe: str, *overrides: str, **place: Any) -> Any:
    command = recipe.split("/")[0]
    loaded = load(recipe, command, overrides)
    return steps.make_plan(source, Destination(out, **place), loaded, command)


def messages(source: Path, out: Path, recipe: str, *overrides: str) -> list[str]:
    with pytest.raises(Refused) as caught:
        planned(source, out, recipe, *overrides)
    found = caught.value.problems if isinstance(caught.value, Problems) else (caught.value,)
    return [problem.message for problem in found]


# Layers of the Llama are 64 to 128 wide, and its file takes half a megabyte.
FITTING = {
    "prune/depth-half": ["method.keep_layers=1"],
    "prune/hidden-norm": ["method.sparsity=0.25"],
    "quantize": ["method.group_size=32"],
    "factorize/svd-bytes": ["method.target_bytes=300KB"],
}


OTHERS = {  # inputs that are no Llama
    "factorize/spatial-keep": "cnn_file",
    "factorize/tucker-keep": "cnn_file",
    "prune/experts-norm": "tiny_mixtral",
    "prune/channels-mlp": "mlp_file",
}
ELSEWHERE = {
    "prune/movement-50",  # reads a training run
    "quantize/rdo-3bpw",  # is entropy-coded: its plan says the most that it takes
}
DATA_FREE = [
    recipe
    for recipe in RECIPES
    if recipe not in ELSEWHERE and "\ncalibration:" not in (shipped() / f"{recipe}.yaml").read_text()
]


@pytest.mark.parametrize(
    ("recipe", "shards"), [*((recipe, 100_000) for recipe in DATA_FREE), *((recipe, None) for recipe in DATA_FREE[::5])]
)
def test_a_dry_run_states_the_bytes_that_the_run_writes(
    tmp_path: Path, request: pytest.FixtureRequest, recipe: str, shards: int | None
) -> None:
    out = tmp_path / "out"
    source = request.getfixturevalue(OTHERS.get(recipe, "tiny_llama"))
    grouped = "W8A8" not in str(load(recipe, recipe.split("/")[0]).method)
    overrides = FITTING.get(recipe, FITTING.get(recipe.split("/")[0], []) if grouped else [])
    step = planned(source, out, recipe, *overrides, max_shard_size=shards)
    summary = step.summary()
    assert not out.exists()
    steps.run(step, Options(latency="off"))
    sizes = {path.relative_to(out).as_posix(): path.stat().st_size for path in out.rglob("*") if path.is_file()}
    assert {name: size for name, size in sizes.items() if name.endswith(".safetensors")} == summary.weight_files
    others = {n: s for n, s in sizes.items() if n not in summary.weight_files and not n.startswith("report.")}
    assert sum(others.values()) == summary.other_bytes
    assert (len(summary.weight_files) > 1) == (shards is not None and sum(summary.weight_files.values()) > shards)


def test_a_bare_file_into_a_directory_of_shards(tmp_path: Path, mlp_file: Path) -> None:
    step = planned(mlp_file, tmp_path / "out", "quantize/rtn-w8", max_shard_size=50_000)
    layerwise.run(step, Options(latency="off"))
    others = [p for p in (tmp_path / "out").iterdir() if p.suffix == ".json" and p.name != "report.json"]
    assert step.summary().other_bytes == sum(path.stat().st_size for path in others) > 0
    again = planned(tmp_path / "out", tmp_path / "two.safetensors", "prune/magnitude-50")
    assert len(again.checkpoint.manifest.lineage) == 1


def test_every_problem_is_told_at_once(tmp_path: Path, mlp_file: Path) -> None:
    out = tmp_path / "taken.safetensors"
    out.write_bytes(b"")
    edits = ["select.include=[fc9, fc1, fc2]", "select.exclude=['conv*']", "method.group_size=7", "gates=['sise <= 3']"]
    found = messages(mlp_file, out, "quantize/rtn-w4", *edits)
    for part in (
        "exists",
        "'fc9' matches no layer",
        "'conv*' matches no layer",
        "sise",
        "group_size 7 does not divide",
    ):
        assert any(part in message for message in found), part
    assert any("fc2: group_size 7" in message for message in found)


@pytest.mark.parametrize(
    ("recipe", "edit", "part"),
    [
        ("quantize/rtn-w8", "select.include=['re:(']", "not a regular expression"),
        ("quantize/rtn-w8", "select.include=[fc]", "matches no layer"),
        ("quantize/rtn-w8", "select.kinds=[embedding]", "no embedding layers"),
        ("quantize/rtn-w8", "rules=[{match: 'x*', bits: 4}]", "rules pattern 'x*' matches no layer"),
        ("quantize/rtn-w8", "rules=[{match: 'fc*', bitz: 4}]", "bitz"),
        ("quantize/rtn-w8", "levels=[{layers: 'a-b', bits: 4}]", "not a list of depths"),
        ("quantize/rtn-w8", "levels=[{layers: '0-1', bits: 4}]", "no layer has a depth in '0-1'"),
        ("quantize/rtn-w4", "method.group_size=1000", "does not divide"),
        ("factorize/svd-bytes", "method.target_bytes=10", "10"),
        ("prune/magnitude-2-4", "method.pattern='2:3'", "3"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(
    tmp_path: Path, mlp_file: Path, recipe: str, edit: str, part: str
) -> None:
    assert any(part in message for message in messages(mlp_file, tmp_path / "o.safetensors", recipe, edit))
    assert list(tmp_path.iterdir()) == []


def test_the_output_keeps_away_from_the_input(tmp_path: Path, tiny_llama: Path) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "in"))
    (tmp_path / "link").symlink_to(source)
    for out in (source, tmp_path / "link", source / "sub", tmp_path / "link" / "o.safetensors"):
        with pytest.raises(Refused, match="input"):
            planned(source, out, "quantize/rtn-w8", overwrite=True)
    with pytest.raises(Refused, match="input"):
        planned(source, source, "prune/depth-2", overwrite=True)


def test_a_taken_output_needs_overwrite(tmp_path: Path, mlp_file: Path) -> None:
    out = tmp_path / "o.safetensors"
    layerwise.run(planned(mlp_file, out, "quantize/rtn-w8"), Options(latency="off"))
    first = out.stat().st_ino
    with pytest.raises(OutputExists):
        planned(mlp_file, out, "quantize/rtn-w8")
    layerwise.run(planned(mlp_file, out, "quantize/rtn-w8", overwrite=True), Options(latency="off"))
    assert out.stat().st_ino != first


def test_a_disk_too_small_is_noticed_before_the_work(
    tmp_path: Path, mlp_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutOfSpace, match="1,000 free"):
        planned(mlp_file, tmp_path / "deep" / "o.safetensors", "quantize/rtn-w8")
    assert list(tmp_path.iterdir()) == []


def test_names_that_would_collide_are_refused(tmp_path: Path, mlp_file: Path) -> None:
    tensors = load_file(mlp_file)
    save_file({**tensors, "fc1.weight_scale": tensors["fc1.bias"].clone()}, tmp_path / "in.safetensors")
    found = messages(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "quantize/rtn-w8")
    assert "would be named 'fc1.weight_scale'" in found[0]


def test_a_config_that_describes_no_model_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "in"))
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace('"hidden_size": 64', '"hidden_size": "wide"'))
    (message,) = messages(source, tmp_path / "out", "quantize/rtn-w8")
    assert "does not describe a LlamaForCausalLM" in message
    assert "\n" not in message


def test_weights_that_stay_behind_are_named(tmp_path: Path, tiny_llama: Path) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "in"))
    (source / "pytorch_model.bin").write_bytes(b"1")
    step = planned(source, tmp_path / "out", "quantize/rtn-w8")
    assert any("not taken along: pytorch_model.bin" in warning for warning in step.warnings)
    layerwise.run(step, Options(latency="off"))
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_what_transformers_cannot_run_is_said(tiny_mixtral: Path, tmp_path: Path) -> None:
    said = "this output loads by aicompress.load, not in transformers"
    for recipe, expected in (("factorize/svd-keep", True), ("quantize/rtn-w8", False), ("quantize/w8a8", True)):
        made = planned(tiny_mixtral, tmp_path / "out", recipe)
        assert any(said in warning for warning in made.summary().warnings) == expected


def test_the_layout_and_the_classes_that_load_it_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    line = layout(planned(tiny_llama, tmp_path / "out", "quantize/rtn-w8").summary())
    assert line == "layout: compressed-tensors; loads in LlamaForCausalLM and LlamaModel of transformers"


def test_a_place_below_a_file_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (message,) = messages(tiny_llama, tmp_path / "file" / "out", "quantize/rtn-w8")
    assert "is not a directory" in message


def test_layers_that_grow_are_told_before_they_do(tmp_path: Path, mlp_file: Path) -> None:
    channel = "method.granularity=channel"
    step = planned(mlp_file, tmp_path / "w4.safetensors", "quantize/rtn-w4", channel)
    assert not any("more bytes" in warning for warning in step.warnings)
    layerwise.run(step, Options(latency="off"))
    again = planned(tmp_path / "w4.safetensors", tmp_path / "w8.safetensors", "quantize/rtn-w8", channel)
    (told,) = [warning for warning in again.summary().warnings if "more bytes" in warning]
    rows = again.summary().rows
    before, after = sum(row.bytes_before for row in rows), sum(row.bytes_after for row in rows)
    assert told == (
        f"3 of 3 layers take more bytes than before, fc1 for one: {before:,} become {after:,}, {after / before:.2f}×"
    )
