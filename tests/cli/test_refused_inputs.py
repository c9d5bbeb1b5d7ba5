"""What is given instead of a checkpoint or a recipe is answered with what to give."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CheckpointError
from aicompress.model.loading.load import load
from tests.cli.calls import Call, refused


@pytest.mark.parametrize(("suffix", "name"), [(".gguf", "GGUF"), (".onnx", "ONNX"), (".bin", "pickles")])
def test_other_formats_are_named(call: Call, tmp_path: Path, suffix: str, name: str) -> None:
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / f"model{suffix}", tmp_path / "folder" / f"model{suffix}"):
        place.write_bytes(b"GGUF")
    for given in (tmp_path / f"model{suffix}", tmp_path / "folder"):
        result = call("inspect", given)
        refused(result)
        assert name in result[2]


@pytest.mark.parametrize(
    ("verb", "recipe"), [("eval", "eval/sts"), ("quantize", "quantize/nf4"), ("prune", "prune/lamp-50")]
)
def test_recipes_of_the_verb_are_suggested(call: Call, tmp_path: Path, verb: str, recipe: str) -> None:
    where = ["-o", tmp_path / "out"] if verb == "eval" else [tmp_path / "out"]
    result = call(verb, tmp_path, *where, "-r", f"{recipe}x")
    refused(result)
    assert recipe in result[2]
    far = call(verb, tmp_path, *where, "-r", "size-and-weight")
    others = {"eval", "quantize", "prune", "factorize", "distill"} - {verb}
    assert not any(f"{other}/" in far[2].partition("hint: ")[2] for other in others)


def test_a_weight_file_of_a_quantized_directory(call: Call, tiny_bert: Path, mlp_file: Path, tmp_path: Path) -> None:
    for recipe in ("quantize/rtn-w8", "quantize/kmeans-w4"):  # in compressed-tensors and in the native layout
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert call("quantize", tiny_bert, tmp_path / "out", "-r", recipe, "--latency", "off")[0] == 0
        with pytest.raises(CheckpointError) as error:
            load(tmp_path / "out" / "model.safetensors")
        assert str(tmp_path / "out") in error.value.hint
    assert load(tiny_bert / "model.safetensors").keys() == Checkpoint.open(tiny_bert).parameters().keys()


def test_a_directory_that_becomes_one_file_is_warned_of(call: Call, tiny_bert: Path, tmp_path: Path) -> None:
    for out, told in ((tmp_path / "out.safetensors", True), (tmp_path / "out", False)):
        code, printed, messages = call("quantize", tiny_bert, out, "-r", "quantize/rtn-w8", "--dry-run")
        assert code == 0
        assert ("config.json and tokenizer are not taken along" in printed + messages) == told


def test_a_link_that_leads_nowhere_is_called_one(call: Call, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert "is a link to loop, which is not there" in refused(call("inspect", tmp_path / "loop"))


def test_a_distillation_without_a_teacher(call: Call, tiny_bert: Path, tmp_path: Path) -> None:
    result = call("distill", tiny_bert, tmp_path / "out", "-r", "distill/mse", "--text", tmp_path / "text.txt")
    assert "no teacher is given" in refused(result)
    assert "student" in result[2]


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("https://huggingface.co/org/name/tree/main", "hf://org/name reads it"),
        ("org/name-1.5", "there is no folder org; of the hub it is hf://org/name-1.5"),
        ("arrays.npz", "save_file(dict(numpy.load(IN)), OUT)"),
        ("folder/config.json", "give the folder that it lies in: folder"),
        ("two", "give one of them as IN, such as two/a.safetensors"),
    ],
)
def test_what_is_nearly_an_input(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("arrays.npz", "folder/config.json", "two/a.safetensors", "two/b.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    result = call("inspect", given)
    refused(result)
    assert hint in " ".join(result[2].split())


def test_an_output_called_as_another_format_is_refused(call: Call, mlp_file: Path, tmp_path: Path) -> None:
    for verb, *recipe in (("quantize", "-r", "quantize/rtn-w8-embeddings"), ("export", "--to", "dense"), ("pack",)):
        result = call(verb, mlp_file, tmp_path / "out.gguf", *recipe)
        assert "out.gguf is no name of an output" in refused(result)


def test_a_dash_is_no_place(call: Call, mlp_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["-r", "quantize/rtn-w8"]
    for given in (
        ["quantize", mlp_file, "-", *settings],
        ["eval", mlp_file, "-o", "-", "-r", "eval/size-and-speed"],
        ["quantize", mlp_file, "out", *settings, "--text", "-"],
    ):
        assert "- is no place" in refused(call(*given))
    assert not list(tmp_path.iterdir())
