"""Statistics in files: collected from the original model, read instead of running it, merged, and checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aicompress.checkpoint.header import read_header
from aicompress.checkpoint.statistics import StatisticsFile, merged
from aicompress.errors import CompressError, Problems, Refused
from aicompress.pipeline.calibration import runner as engine
from aicompress.pipeline.calibration.request import Request
from tests.pipeline.calibration.steps import planned, run, text, write_recipe

FIRST_BLOCK = "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, text_file: Path) -> Path:
    """Statistics of the tiny Llama on eight windows."""
    folder = tmp_path_factory.mktemp("collected")
    path = folder / "stats.safetensors"
    run(tiny_llama, folder / "out", write_recipe(folder, text(text_file)), Request(stats=(path,)))
    return path


def test_a_file_is_read_instead_of_running_the_model(
    tmp_path: Path, tiny_llama: Path, collected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "walk", None)
    report = run(tiny_llama, tmp_path / "out", write_recipe(tmp_path, None), Request(stats=(collected,)))
    again = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in load_file(collected.parent / "out" / "model.safetensors").items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=0)
    assert report.calibration["statistics"] == [str(collected)]
    assert report.calibration["data"][0]["samples"] == 8
    assert not any("another checkpoint" in line for line in report.warnings)


def test_the_first_block_sees_the_same_with_and_without_a_file(
    tmp_path: Path, tiny_llama: Path, text_file: Path, collected: Path
) -> None:
    """Later ones do not: a file holds what the original model's layers are given."""
    run(tiny_llama, tmp_path / "out", write_recipe(tmp_path, text(text_file)))
    direct = load_file(tmp_path / "out" / "model.safetensors")
    filed = load_file(collected.parent / "out" / "model.safetensors")
    same = {name for name in direct if torch.equal(direct[name], filed[name])}
    assert {name for name in direct if ".layers.0." in name} <= same
    assert same != set(direct)


def test_layout(collected: Path) -> None:
    file = StatisticsFile.open(collected)
    assert file.rows[FIRST_BLOCK] == 8 * 32
    assert file.layers["model.layers.0.self_attn.q_proj.weight"] == FIRST_BLOCK
    assert "model.layers.0.self_attn.q_proj.weight/gram" not in file.tensors
    stats = file.stats(FIRST_BLOCK)
    assert stats.gram is not None
    assert stats.norms is not None
    assert stats.mean_abs is not None
    torch.testing.assert_close(stats.norms, stats.gram.diagonal())
    assert (stats.mean_abs.square() <= stats.norms).all()
    assert not list(collected.parent.glob(".*"))


def test_files_are_merged_by_their_rows(tmp_path: Path, tiny_llama: Path, text_file: Path, collected: Path) -> None:
    other = tmp_path / "other.safetensors"
    recipe = write_recipe(tmp_path, text(text_file, samples=4), seed=7)
    run(tiny_llama, tmp_path / "one", recipe, Request(stats=(other,)))
    files = [StatisticsFile.open(path) for path in (collected, other)]
    both, (one, two) = merged(files, FIRST_BLOCK), [file.stats(FIRST_BLOCK) for file in files]
    assert both.count == 12 * 32
    assert both.gram is not None
    assert one.gram is not None
    assert two.gram is not None
    torch.testing.assert_close(both.gram, (one.gram * 8 + two.gram * 4) / 12)
    report = run(tiny_llama, tmp_path / "two", recipe, Request(stats=(collected, other)))
    assert [source["samples"] for source in report.calibration["data"]] == [8, 4]


def test_statistics_of_another_checkpoint_are_used_with_a_warning(
    tmp_path: Path, trained_llama: Path, collected: Path
) -> None:
    report = run(trained_llama, tmp_path / "out", write_recipe(tmp_path, None), Request(stats=(collected,)))
    assert any("collected from another checkpoint" in line for line in report.warnings)


def refusals(source: Path, folder: Path, *stats: Path) -> str:
    with pytest.raises(CompressError) as found:
        planned(source, folder / "out", write_recipe(folder, None), Request(stats=stats))
    assert isinstance(found.value, Refused)
    problems = found.value.problems if isinstance(found.value, Problems) else (found.value,)
    return "\n".join(problem.message for problem in problems)


def test_what_does_not_fit_is_refused_before_work(
    tmp_path: Path, tiny_gpt2: Path, tiny_llama: Path, collected: Path
) -> None:
    assert "holds no statistics of transformer.h.0" in refusals(tiny_gpt2, tmp_path, collected)
    assert "does not exist" in refusals(tiny_llama, tmp_path, collected, tmp_path / "absent.safetensors")
    assert "holds no input statistics" in refusals(tiny_llama, tmp_path, tiny_llama / "model.safetensors")
    assert "needs calibration data" in refusals(tiny_llama, tmp_path, tmp_path / "absent.safetensors")
    tensors = {name: tensor for name, tensor in load_file(collected).items() if not name.startswith(FIRST_BLOCK)}
    narrow = {f"{FIRST_BLOCK}/gram": torch.eye(63)}
    metadata = dict(read_header(collected).metadata)
    save_file({**tensors, **narrow}, tmp_path / "narrow.safetensors", metadata)
    assert f"{FIRST_BLOCK} has 64 inputs" in refusals(tiny_llama, tmp_path, tmp_path / "narrow.safetensors")
    norms = {f"{FIRST_BLOCK}/norms": torch.ones(64)}
    save_file({**tensors, **norms}, tmp_path / "norms.safetensors", metadata)
    assert f"no gram of {FIRST_BLOCK}" in refusals(tiny_llama, tmp_path, tmp_path / "norms.safetensors")


def test_a_run_that_fails_leaves_no_statistics(
    tmp_path: Path, tiny_llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("the model does not run")

    monkeypatch.setattr(engine, "walk", fail)
    with pytest.raises(RuntimeError):
        run(
            tiny_llama,
            tmp_path / "out",
            write_recipe(tmp_path, text(text_file)),
            Request(stats=(tmp_path / "s.safetensors",)),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
