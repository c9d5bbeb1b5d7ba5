"""Files that a command writes beside checkpoints are complete or absent; a place for none is refused before work."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from aicompress.checkpoint import CheckpointWriter, plan_shards
from aicompress.checkpoint.statistics import StatisticsWriter
from aicompress.disk import write_whole
from aicompress.errors import CheckpointError, OutOfSpace, Refused
from aicompress.statistics import InputStats
from aicompress.weights import TensorSpec
from tests.cli.calls import Call, refused


@contextmanager
def files_up_to(nbytes: int) -> Iterator[None]:
    """No file may grow beyond this, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, mlp_file: Path) -> Path:
    """A report.json of an evaluation."""
    from aicompress.pipeline.evaluation.run import EvalOptions, evaluate
    from aicompress.recipe.evaluation import EvalRecipe

    folder = tmp_path_factory.mktemp("eval")
    evaluate(str(mlp_file), [], EvalRecipe(version=1), EvalOptions(folder))
    return folder / "report.json"


def test_files_that_belong_together_take_their_places_together(tmp_path: Path) -> None:
    old = tmp_path / "a.txt"
    old.write_text("old")
    with files_up_to(1000), pytest.raises(OutOfSpace):
        write_whole({old: "new", tmp_path / "new" / "deep" / "b.txt": "x" * 2000})
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]
    write_whole({old: "new", tmp_path / "sub" / "b.txt": "\udcff"})
    assert old.read_text() == "new"
    assert (tmp_path / "sub" / "b.txt").read_text() == "\\udcff"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "b.txt", "sub"]


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    """As /dev/stdout: a file in the place of a device takes it from everybody."""
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as reader:
        read = reader.submit((tmp_path / "pipe").read_text)
        write_whole({tmp_path / "pipe": "a page"})
        assert read.result() == "a page"
    assert (tmp_path / "pipe").is_fifo()


def test_statistics_on_a_full_disk(tmp_path: Path) -> None:
    stats = {"fc.weight": InputStats.of(1, torch.eye(64), {})}
    with (
        files_up_to(1000),
        pytest.raises(OutOfSpace, match=r"s\.safetensors"),
        StatisticsWriter(tmp_path / "s.safetensors") as writer,
    ):
        writer.add(stats)
    assert not [*tmp_path.iterdir()]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(Refused, match="not a directory"):
        StatisticsWriter(tmp_path / "file" / "s.safetensors")
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(Refused, match="is a directory"):
        StatisticsWriter(tmp_path / "d.safetensors")


def test_a_page_of_a_comparison(call: Call, report: Path, tmp_path: Path) -> None:
    assert "is a directory" in refused(call("compare", report, "--html", tmp_path))
    (tmp_path / "file").write_text("mine")
    assert "not a directory" in refused(call("compare", report, "--html", tmp_path / "file" / "page.html"))
    page = tmp_path / "page.html"
    with files_up_to(4096):
        refused(call("compare", report, "--html", page), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert call("compare", report, "--html", tmp_path / "new" / "page.html")[0] == 0
    assert "<html" in (tmp_path / "new" / "page.html").read_text()


def test_an_evaluation_looks_at_its_place_first(call: Call, mlp_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("version: 1")
    missing = tmp_path / "no.safetensors"  # the place is looked at before the input
    assert "not a directory" in refused(call("eval", missing, "-r", recipe, "-o", tmp_path / "file" / "eval"))
    out = tmp_path / "eval"
    out.mkdir()
    (out / "report.json").mkdir()
    assert "report.json" in refused(call("eval", missing, "-r", recipe, "-o", out))
    (out / "report.json").rmdir()
    with files_up_to(4096):
        refused(call("eval", mlp_file, "-r", recipe, "-o", out), 1)
    assert not [*out.iterdir()]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_an_output_is_as_private_as_its_input(
    call: Call, tiny_llama: Path, mlp_file: Path, tmp_path: Path, mode: int
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").chmod(mode)
    shutil.copy(mlp_file, tmp_path / "in.safetensors")
    (tmp_path / "in.safetensors").chmod(mode)
    step = ["-r", "quantize/rtn-w8", "--latency", "off", "--quiet"]
    assert call("quantize", tmp_path / "in", tmp_path / "out", *step)[0] == 0
    assert call("quantize", tmp_path / "in.safetensors", tmp_path / "o.safetensors", *step)[0] == 0
    written = [*(tmp_path / "out").iterdir(), *tmp_path.glob("o.*")]
    assert len(written) > 8
    assert {path.stat().st_mode & 0o777 for path in written} == {mode | 0o200}


def test_a_side_file_that_cannot_be_read_is_called_so(tmp_path: Path) -> None:
    shards = plan_shards({"a": TensorSpec(torch.float32, (1,))}, None, {})
    with (
        pytest.raises(CheckpointError, match=r"notes\.txt cannot be read: No such file"),
        CheckpointWriter(tmp_path / "out", shards) as writer,
    ):
        writer.add("notes.txt", tmp_path / "notes.txt")
    assert not [*tmp_path.iterdir()]
