"""Inputs: directories, files, indexes and hub names; what comes along, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.source import INDEX, locate
from aicompress.errors import CheckpointError


@pytest.fixture
def bert(tmp_path: Path, tiny_bert: Path) -> Path:
    return Path(shutil.copytree(tiny_bert, tmp_path / "bert"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards and an index, without config.json."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    for number in (1, 2):
        save_file({f"fc{number}.weight": torch.ones(2, 3)}, folder / f"model-{number}.safetensors")
    index(folder, {"fc1.weight": "model-1.safetensors", "fc2.weight": "model-2.safetensors"})
    return folder


def index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(name: str | Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(name)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return f"{caught.value.message} | {caught.value.hint}"


def relative(paths: tuple[Path, ...]) -> set[str]:
    return {path.as_posix() for path in paths}


def test_every_kind_of_input_gives_the_same_tensors(sharded: Path, tiny_llama_bf16: Path) -> None:
    assert set(Checkpoint.open(sharded).tensors) == {"fc1.weight", "fc2.weight"}
    assert Checkpoint.open(sharded / INDEX).specs == Checkpoint.open(sharded).specs
    assert set(Checkpoint.open(sharded / "model-1.safetensors").tensors) == {"fc1.weight"}
    assert len(Checkpoint.open(tiny_llama_bf16).source.files) >= 3


def test_an_index_beside_a_config_stands_for_its_directory(tiny_llama_bf16: Path) -> None:
    named, whole = locate(tiny_llama_bf16 / INDEX), locate(tiny_llama_bf16)
    assert (named.config, named.side_files, named.files) == (whole.config, whole.side_files, whole.files)
    assert named.config is not None


def test_side_files_come_along(bert: Path) -> None:
    found = relative(locate(bert).side_files)
    assert {"tokenizer.json", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json"} <= found
    assert not found & {"config.json", "model.safetensors"}


def test_parts_of_a_sentence_encoder_keep_their_own_weights(bert: Path) -> None:
    modules = json.loads((bert / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (bert / "modules.json").write_text(json.dumps(modules))
    (bert / "2_Dense").mkdir()
    save_file({"linear.weight": torch.ones(2, 2)}, bert / "2_Dense" / "model.safetensors")
    (bert / "2_Dense" / "pytorch_model.bin").write_bytes(b"1")
    source = locate(bert)
    assert {"2_Dense/model.safetensors", "2_Dense/pytorch_model.bin"} <= relative(source.side_files)
    assert source.left_out == ()


@pytest.mark.parametrize("place", ["", ".", "./"])
def test_a_module_may_lie_in_the_folder_itself(bert: Path, place: str) -> None:
    """model2vec writes a dot."""
    modules = json.loads((bert / "modules.json").read_text())
    modules[0] |= {"path": place, "type": "sentence_transformers.models.StaticEmbedding"}
    (bert / "modules.json").write_text(json.dumps(modules))
    assert locate(bert).encoder_module == "StaticEmbedding"


def test_a_folder_of_checkpoints_is_answered_with_one_of_them(tmp_path: Path) -> None:
    """Such as a pipeline of diffusers."""
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
        save_file({"a.weight": torch.ones(2, 2)}, tmp_path / part / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError) as refusal:
        locate(tmp_path)
    assert f"give {tmp_path / 'unet'} as IN" in refusal.value.hint
    assert "2 of them" in refusal.value.hint


def test_weights_of_other_formats_and_other_checkpoints_are_left_out(bert: Path) -> None:
    stale = {"pytorch_model.bin", "adapter.safetensors", "pytorch_model.bin.index.json", "onnx/model.onnx"}
    stale |= {"checkpoint-500/model.safetensors", "checkpoint-500/optimizer.pt"}
    for name in stale:
        (bert / name).parent.mkdir(exist_ok=True)
        (bert / name).write_bytes(b"1")
    (bert / ".cache").write_text("")
    (bert / "modeling_aicompress.py").write_text("stale")
    source = locate(bert)
    assert relative(source.left_out) == stale
    assert not relative(source.side_files) & {*stale, ".cache", "modeling_aicompress.py"}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../evil.safetensors", "outside its folder"),
        ("/etc/passwd", "outside its folder"),
        ("a/../../evil.safetensors", "outside its folder"),
        ("..\\evil.safetensors", "outside its folder"),
        ("missing.safetensors", "lacks 1 of 2 shards: missing.safetensors"),
        ("", "no weight_map"),
        (7, "no weight_map"),
        ("model-1.safetensors", "the index says 'fc2.weight' is in model-1.safetensors, and it is not"),
    ],
)
def test_an_index_that_lies_is_refused(sharded: Path, name: Any, why: str) -> None:
    (sharded.parent / "evil.safetensors").write_bytes(b"")
    index(sharded, {"fc1.weight": "model-1.safetensors", "fc2.weight": name})
    assert why in refused(sharded)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', "{", "[" * 100_000, "\xff"])
def test_an_index_that_is_none_is_refused(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_bytes(text.encode("latin-1"))
    assert INDEX in refused(sharded)


def test_a_shard_behind_a_link_out_of_the_folder_is_refused(sharded: Path) -> None:
    shard = sharded / "model-2.safetensors"
    shard.rename(sharded.parent / "blob")
    shard.symlink_to(sharded.parent / "blob")
    assert "outside its folder" in refused(sharded)


def test_a_link_within_the_folder_is_followed(sharded: Path) -> None:
    shard = sharded / "model-2.safetensors"
    (sharded / "blobs").mkdir()
    shard.rename(sharded / "blobs" / "b")
    shard.symlink_to(sharded / "blobs" / "b")
    assert torch.equal(Checkpoint.open(sharded).read("fc2.weight"), torch.ones(2, 3))


def test_the_layout_of_the_hubs_cache_is_read(bert: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--a--b"
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots").mkdir()
    snapshot = home / "snapshots" / "0123"
    shutil.move(bert, snapshot)
    (snapshot / "README.md").write_text("read me")
    names = {path.name for path in snapshot.iterdir()}
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(home / "blobs" / str(number))
        path.symlink_to(Path("..") / ".." / "blobs" / str(number))
    source = Checkpoint.open(snapshot).source
    assert not source.outside
    assert {"README.md"} <= relative(source.side_files) <= names


@pytest.mark.parametrize("place", ["notes.txt", "sub/notes.txt"])
@pytest.mark.parametrize("target", ["absolute", "above", "chain"])
def test_a_side_file_behind_a_link_out_of_the_folder_is_left_out(bert: Path, place: str, target: str) -> None:
    secret = bert.parent / "secret"
    secret.write_text("secret")
    link = bert / place
    link.parent.mkdir(exist_ok=True)
    if target == "chain":
        (bert.parent / "hop").symlink_to(secret)
        link.symlink_to(bert.parent / "hop")
    else:
        link.symlink_to(secret if target == "absolute" else Path(*[".."] * len(Path(place).parts)) / "secret")
    assert link.read_text() == "secret"
    source = Checkpoint.open(bert).source
    assert relative(source.outside) == {place}
    assert place not in relative(source.side_files)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    save_file({"fc1.weight": torch.ones(2, 3), "fc2.weight": torch.ones(2, 3)}, sharded / "model-2.safetensors")
    assert "'fc1.weight' is in model-1.safetensors and in model-2.safetensors" in refused(sharded)


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "[" * 100_000, ""])
def test_a_malformed_config_is_refused(bert: Path, text: str) -> None:
    (bert / "config.json").write_text(text)
    assert "config.json" in refused(bert)


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pkl", "model.ckpt"])
def test_pickles_are_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    assert "convert it to safetensors" in refused(tmp_path / name)
    assert "convert it to safetensors" in refused(tmp_path)
    assert not Path("pwned").exists()


@pytest.mark.parametrize("what", ["nothing", "two", "missing", "text.txt"])
def test_what_holds_no_checkpoint_is_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        save_file({"w": torch.ones(2)}, tmp_path / "two" / f"{name}.safetensors")
    (tmp_path / "text.txt").write_text("hello")
    assert what in refused(tmp_path / what)


def test_a_mistyped_path_is_corrected(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    assert "did you mean" in refused(tmp_path / "modle.safetensors")


@pytest.mark.parametrize("name", ["hf://nobody/nothing", "hf://nobody/nothing@main", "hf://a/b/c", "hf://"])
def test_the_hub_offline_is_one_clear_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert name in refused(name)


@pytest.mark.parametrize(
    ("missing", "hint"),
    [
        ("lama", "did you mean '{}/llama'?"),
        ("modle.safetensors", "did you mean '{}/model.safetensors'?"),
        ("nothing", "check the path"),  # no list of whatever lies there, and no likeness by the folder's own name
        ("absent/model.safetensors", "there is no folder {}/absent"),
    ],
)
def test_a_missing_path_is_told_from_what_may_be_a_checkpoint(tmp_path: Path, missing: str, hint: str) -> None:
    (tmp_path / "llama").mkdir()
    for name in ("model.safetensors", "notes.txt", "nothing.yaml"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError) as refusal:
        locate(tmp_path / missing)
    assert refusal.value.hint == hint.format(tmp_path)
