import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aicompress import load
from aicompress.checkpoint.reader import digests
from aicompress.checkpoint.source import locate
from aicompress.cli.verbs.verify import command as show_verification
from aicompress.disk import report_path
from aicompress.errors import CheckpointError, Unsupported
from aicompress.pipeline.inspect import inspect
from aicompress.pipeline.verify import verify
from aicompress.report.model import Report, Side
from tests.model.compressed import compress, halved, integers, low_rank
from tests.pipeline.steps import prune


@pytest.fixture
def llama(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "llama"))


def with_report(path: Path) -> None:
    """Note the digests of a checkpoint as the step that wrote it would."""
    after = Side(str(path), 1, 1, 1, {}, digests(locate(path)))
    report = Report("quantize", "0", None, after, (), None, {}, {}, (), (), {}, {}, (), 0.0, 0)
    report_path(path).write_text(report.to_json())


def change(file: Path, name: str, value: float | None) -> None:
    """Set one element of a tensor, or drop the tensor."""
    tensors = load_file(file)
    if value is None:
        del tensors[name]
    else:
        tensors[name].view(-1)[0] = value
    save_file(tensors, file, metadata={"format": "pt"})


TRANSFORMERS = ["tiny_llama", "tiny_llama_untied", "tiny_llama_bf16", "tiny_gpt2", "tiny_bert", "tiny_t5", "tiny_vit"]


@pytest.mark.parametrize("name", [*TRANSFORMERS, "mlp_file", "cnn_file"])
def test_sound_checkpoints_have_no_problems(name: str, request: pytest.FixtureRequest) -> None:
    found = verify(request.getfixturevalue(name))
    assert found.problems == ()
    assert found.sound
    assert found.parameters > 3


def test_every_stored_form_decodes(tiny_llama: Path, tmp_path: Path) -> None:
    forms = [lambda w: integers(w, 4, 32), lambda w: low_rank(w, 4), halved]
    numbers = iter(range(1000))
    out = compress(
        tiny_llama, tmp_path / "out", lambda info, w: forms[next(numbers) % 3](w) if info.kind == "linear" else None
    )
    found = verify(out)
    assert found.problems == ()
    assert found.compressed == 21


def test_widths_that_config_cannot_say_are_known(tiny_bert: Path, tmp_path: Path) -> None:
    prune(tiny_bert, tmp_path / "heads", name="heads", sparsity=0.5, unit="group")
    assert verify(tmp_path / "heads").problems == ()
    out = compress(
        tmp_path / "heads", tmp_path / "w4", lambda info, w: integers(w, 4) if info.kind == "linear" else None
    )
    assert verify(out).problems == ()
    assert verify(out).compressed


def newer(folder: Path) -> None:
    """A manifest of a version to come."""
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "aicompress", "format_version": 99, "entries": {}}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def packed_by_others(folder: Path) -> None:
    """A method that this version does not know."""
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "to_come", "bits": 2}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


@pytest.mark.parametrize("change", [newer, packed_by_others])
def test_what_cannot_be_decoded_is_not_called_damaged(change: Callable[[Path], None], llama: Path) -> None:
    change(llama)
    verification = verify(llama)
    assert not verification.problems
    assert not verification.sound
    assert "newer" in verification.unread or "to_come" in verification.unread
    with pytest.raises(Unsupported, match="not judged") as caught:
        show_verification(str(llama), as_json=False)
    assert caught.value.exit_code == 2
    listed = inspect(llama)
    assert len(listed.rows) == len(load_file(llama / "model.safetensors"))
    assert any("listed as they are stored" in warning for warning in listed.warnings)
    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").write_bytes(b"damaged")
    assert verify(llama).problems
    assert tensors


def test_a_directory_whose_config_is_none_of_transformers_is_loaded_as_tensors(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    tensors = {"fc1.weight": torch.randn(64, 64), "fc1.bias": torch.zeros(64)}
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text('{"hidden": 64}')
    out = compress(tmp_path / "in", tmp_path / "w8", lambda info, w: integers(w, 8))
    assert verify(out).sound
    loaded = load(out)
    assert loaded.keys() == tensors.keys()
    assert torch.allclose(loaded["fc1.weight"], tensors["fc1.weight"], atol=0.05)
    (tmp_path / "in" / "config.json").write_text('{"model_type": "mine"}')
    with pytest.raises(CheckpointError, match="does not know model type 'mine'"):
        load(tmp_path / "in")


def test_nan_is_found(llama: Path) -> None:
    change(llama / "model.safetensors", "model.norm.weight", float("nan"))
    (problem,) = verify(llama).problems
    assert "model.norm.weight" in problem
    assert "NaN" in problem


def test_a_missing_tensor_is_found(llama: Path) -> None:
    change(llama / "model.safetensors", "model.layers.1.mlp.up_proj.weight", None)
    assert verify(llama).problems == ("model.layers.1.mlp.up_proj.weight is missing",)


def test_a_shape_that_config_denies_is_found(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    problems = verify(llama).problems
    assert len(problems) == 9
    assert "model.layers.0.mlp.down_proj.weight is [64, 128], config.json says [64, 96]" in problems


def test_a_flipped_byte_is_found(llama: Path) -> None:
    with_report(llama)
    assert verify(llama).problems == ()
    assert any("sha256" in check for check in verify(llama).checks)
    file = llama / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1  # the last bit of a mantissa: the number stays finite
    file.write_bytes(content)
    (problem,) = verify(llama).problems
    assert "model.safetensors has changed" in problem


def test_a_renamed_single_file_keeps_its_digest(mlp_file: Path, tmp_path: Path) -> None:
    shutil.copy(mlp_file, tmp_path / "a.safetensors")
    with_report(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    (tmp_path / "a.report.json").rename(tmp_path / "b.report.json")
    assert verify(tmp_path / "b.safetensors").problems == ()


def test_without_digests_it_says_so(llama: Path) -> None:
    assert any("no report.json" in note for note in verify(llama).notes)


def test_a_cut_shard_is_found(tiny_llama_bf16: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama_bf16, tmp_path / "cut"))
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-10])
    (problem,) = verify(folder).problems
    assert last.name in problem


def test_a_tensor_that_the_index_forgets_is_found(tiny_llama_bf16: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama_bf16, tmp_path / "index"))
    index = folder / "model.safetensors.index.json"
    plain = json.loads(index.read_text())
    del plain["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(plain))
    assert any("model.norm.weight" in problem for problem in verify(folder).problems)


def test_a_mask_that_lies_is_found(mlp_file: Path, tmp_path: Path) -> None:
    out = compress(mlp_file, tmp_path / "sparse.safetensors", lambda info, w: halved(w) if info.name == "fc2" else None)
    tensors = load_file(out)
    with open(out, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    tensors["fc2.weight"][:] = 255  # every element is kept, but only half of the values are there
    save_file(tensors, out, metadata=header["__metadata__"])
    (problem,) = verify(out).problems
    assert "'fc2.weight' cannot be decoded" in problem
