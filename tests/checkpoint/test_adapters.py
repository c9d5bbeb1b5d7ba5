"""A LoRA adapter is merged as PEFT's formula says, into plain and into quantized weights; what is none is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.adapters.lora import Adapter
from aicompress.checkpoint.adapters.merging import with_adapter
from aicompress.errors import CheckpointError
from tests import foreign

GATE, EMBED = "model.layers.0.mlp.gate_proj", "model.embed_tokens"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def save_adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """An adapter as PEFT saves it; names are those of the base model's modules."""
    folder.mkdir()
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["gate_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**plain, **config}))
    return folder


def pair(module: str, out: int, columns: int, rank: int = 4, seed: int = 0) -> dict[str, Tensor]:
    a, b = noise(rank, columns, seed=seed), noise(out, rank, seed=seed + 1)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def product(tensors: dict[str, Tensor], module: str) -> Tensor:
    return tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]


def merged(source: Path, adapter: Path, weight: float = 1.0) -> Checkpoint:
    return with_adapter(Checkpoint.open(source), Adapter.open(adapter, weight))


def changed(before: Checkpoint, after: Checkpoint) -> set[str]:
    return {name for name in before.parameters() if not torch.equal(before.dense(name), after.dense(name))}


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 8 / math.sqrt(4)),
        ({"alpha_pattern": {"gate_proj": 2}}, 0.5),
        ({"alpha_pattern": {"^model.layers.0.mlp.gate_proj$": 2, "gate_proj": 4}}, 0.5),
        ({"alpha_pattern": {"up_proj": 2}}, 2.0),
        ({"alpha_pattern": {r"layers\.1\..*": 4, r"layers\.\d+\.mlp\.(gate|up)_proj": 2}}, 0.5),
        ({"r": 16, "rank_pattern": {"mlp.gate_proj": 4}}, 2.0),
    ],
)
def test_what_is_added_to_a_weight(tiny_llama: Path, tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    tensors = pair(GATE, 128, 64)
    base, after = Checkpoint.open(tiny_llama), merged(tiny_llama, save_adapter(tmp_path / "a", tensors, **config), 0.5)
    name = f"{GATE}.weight"
    torch.testing.assert_close(after.dense(name), base.dense(name) + 0.5 * scale * product(tensors, GATE))
    assert changed(base, after) == {name}
    assert after.parameters() == base.parameters()
    assert after.nbytes(name) == base.nbytes(name)
    assert torch.equal(after.rows(name, 3, 9), after.dense(name)[3:9])


def test_several_are_added_up(tiny_llama: Path, tmp_path: Path) -> None:
    one, two = pair(GATE, 128, 64), pair(GATE, 128, 64, rank=2, seed=5)
    after = merged(tiny_llama, save_adapter(tmp_path / "one", one))
    after = with_adapter(after, Adapter.open(save_adapter(tmp_path / "two", two, r=2), -1.0))
    wanted = Checkpoint.open(tiny_llama).dense(f"{GATE}.weight") + 2 * product(one, GATE) - 4 * product(two, GATE)
    torch.testing.assert_close(after.dense(f"{GATE}.weight"), wanted)
    assert list(after.foreign.beside) == ["adapter 1, weight 1", "adapter 2, weight -1"]


@pytest.mark.parametrize("encode", [foreign.gptq(), foreign.fp8(), foreign.nf4()])
def test_into_quantized_weights(tiny_llama: Path, tmp_path: Path, encode: Any) -> None:
    dense = foreign.convert(tiny_llama, tmp_path / "in", encode, None)
    tensors = pair(GATE, 128, 64)
    after = merged(tmp_path / "in", save_adapter(tmp_path / "a", tensors))
    name = f"{GATE}.weight"
    torch.testing.assert_close(after.dense(name), dense[name] + 2 * product(tensors, GATE))
    assert after.outline(name) is None
    other = "model.layers.1.mlp.gate_proj.weight"
    torch.testing.assert_close(after.dense(other), dense[other], rtol=1e-6, atol=0)


def test_embeddings_biases_and_whole_modules(tiny_llama_untied: Path, tmp_path: Path) -> None:
    tensors = {
        f"{EMBED}.lora_embedding_A": noise(4, 256), f"{EMBED}.lora_embedding_B": noise(64, 4, seed=1),
        "model.norm.modules_to_save.weight": noise(64, seed=2), "lm_head.weight": noise(256, 64, seed=3).half(),
        "score.weight": noise(2, 64, seed=4),
    }  # fmt: skip
    base = Checkpoint.open(tiny_llama_untied)
    after = merged(
        tiny_llama_untied, save_adapter(tmp_path / "a", tensors, modules_to_save=["norm", "lm_head", "score"])
    )
    added = 2 * (tensors[f"{EMBED}.lora_embedding_B"] @ tensors[f"{EMBED}.lora_embedding_A"]).t()
    torch.testing.assert_close(after.dense(f"{EMBED}.weight"), base.dense(f"{EMBED}.weight") + added)
    assert torch.equal(after.dense("model.norm.weight"), tensors["model.norm.modules_to_save.weight"])
    assert torch.equal(after.dense("lm_head.weight"), tensors["lm_head.weight"].float())
    assert torch.equal(after.dense("score.weight"), tensors["score.weight"])
    assert set(after.parameters()) - set(base.parameters()) == {"score.weight"}


def test_an_adapted_embedding_is_saved_beside_its_factors(tiny_llama_untied: Path, tmp_path: Path) -> None:
    """PEFT saves the embedding that is adapted, too, which may have grown since: the product is added to that one."""
    factors = {f"{EMBED}.lora_embedding_A": noise(4, 256), f"{EMBED}.lora_embedding_B": noise(64, 4, seed=1)}
    base = noise(256, 64, seed=2)
    adapter = save_adapter(tmp_path / "a", {**factors, f"{EMBED}.base_layer.weight": base})
    added = 2 * (factors[f"{EMBED}.lora_embedding_B"] @ factors[f"{EMBED}.lora_embedding_A"]).t()
    after = merged(tiny_llama_untied, adapter)
    torch.testing.assert_close(after.dense(f"{EMBED}.weight"), base + added)
    torch.testing.assert_close(after.rows(f"{EMBED}.weight", 3, 9), (base + added)[3:9])


def test_a_saved_module_and_not_the_one_it_stands_for(tiny_llama: Path, tmp_path: Path) -> None:
    """With `bias: all` PEFT saves a bias of a module under three names."""
    kinds = (".modules_to_save", "", ".original_module")
    tensors = {f"model.norm{kind}.weight": noise(64, seed=seed) for seed, kind in enumerate(kinds)}
    after = merged(tiny_llama, save_adapter(tmp_path / "a", tensors))
    assert torch.equal(after.dense("model.norm.weight"), noise(64))


def test_layers_that_store_the_transpose(tiny_gpt2: Path, tmp_path: Path) -> None:
    module = "transformer.h.0.attn.c_attn"
    tensors = pair(module, 144, 48)
    after = merged(tiny_gpt2, save_adapter(tmp_path / "a", tensors, fan_in_fan_out=True))
    wanted = Checkpoint.open(tiny_gpt2).dense(f"{module}.weight") + 2 * product(tensors, module).t()
    torch.testing.assert_close(after.dense(f"{module}.weight"), wanted)


def test_a_convolution(cnn_file: Path, tmp_path: Path) -> None:
    tensors = {"conv2.lora_A.weight": noise(4, 8, 3, 3), "conv2.lora_B.weight": noise(16, 4, 1, 1, seed=1)}
    after = merged(cnn_file, save_adapter(tmp_path / "a", tensors))
    added = torch.einsum("or,rikl->oikl", tensors["conv2.lora_B.weight"][..., 0, 0], tensors["conv2.lora_A.weight"])
    torch.testing.assert_close(after.dense("conv2.weight"), Checkpoint.open(cnn_file).dense("conv2.weight") + 2 * added)


def test_a_prefix_that_one_of_the_two_lacks(tiny_bert: Path, tmp_path: Path) -> None:
    module = "encoder.layer.0.attention.self.query"
    tensors = pair(f"bert.{module}", 48, 48)
    after = merged(tiny_bert, save_adapter(tmp_path / "a", tensors))
    assert changed(Checkpoint.open(tiny_bert), after) == {f"{module}.weight"}


@pytest.mark.parametrize(
    ("tensors", "config", "why"),
    [
        (pair(GATE, 128, 64), {"peft_type": "IA3"}, "type IA3"),
        (pair(GATE, 128, 64), {"use_dora": True}, "use_dora"),
        (pair(GATE, 128, 64) | {f"{GATE}.lora_magnitude_vector": noise(128)}, {}, "lora_magnitude_vector"),
        (pair(GATE, 128, 64), {"init_lora_weights": "pissa_niter_4"}, "pissa"),
        (pair(GATE, 128, 64), {"target_parameters": ["experts"]}, "target_parameters"),
        (pair(GATE, 128, 64), {"r": 8}, "rank 4"),
        (pair(GATE, 128, 64), {"lora_alpha": None}, "alpha None"),
        (pair(GATE, 128, 64), {"alpha_pattern": {"(gate": 2}}, "not a regular expression"),
        (pair(GATE, 128, 64), {"rank_pattern": ["gate_proj"]}, "not a mapping"),
        (pair(GATE, 128, 64, rank=0), {"r": 0}, "lora_A"),
        ({f"{GATE}.lora_A.weight": noise(4), f"{GATE}.lora_B.weight": noise(4)}, {}, "lora_A"),
        ({f"{GATE}.lora_A.weight": noise(4, 64)}, {}, "lora_A"),
        (pair(GATE, 64, 128), {}, r"\[64, 128\], and \[128, 64\]"),
        (pair("model.layers.9.mlp.gate_proj", 128, 64), {}, "none of that name"),
        (pair("gate_proj", 128, 64), {}, "may be"),
        ({f"{EMBED}.weight": noise(300, 64)}, {}, "300"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    tiny_llama: Path, tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, Any], why: str
) -> None:
    adapter = save_adapter(tmp_path / "a", tensors, **config)
    with pytest.raises(CheckpointError, match=why) as refusal:
        merged(tiny_llama, adapter)
    assert refusal.value.hint


def test_pickles_and_other_folders_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no adapter"):
        Adapter.open(tiny_llama)
    adapter = save_adapter(tmp_path / "a", pair(GATE, 128, 64))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="has no adapter_model"):
        Adapter.open(adapter)


@pytest.mark.parametrize("name", [".", "adapter_model.safetensors"])
def test_an_adapter_is_no_checkpoint(tmp_path: Path, name: str) -> None:
    adapter = save_adapter(tmp_path / "a", pair(GATE, 128, 64))
    with pytest.raises(CheckpointError, match="an adapter, no checkpoint") as refusal:
        Checkpoint.open(adapter / name)
    assert f"--adapter {adapter}" in refusal.value.hint


def test_an_adapter_beside_a_checkpoint_is_named_and_not_taken_along(tiny_llama: Path, tmp_path: Path) -> None:
    """With its settings and without its weights, transformers would look for it in the output."""
    shutil.copytree(tiny_llama, tmp_path / "in")
    for path in save_adapter(tmp_path / "a", pair(GATE, 128, 64)).iterdir():
        shutil.copy(path, tmp_path / "in")
    source = Checkpoint.open(tmp_path / "in").source
    assert {str(path) for path in source.left_out} == {"adapter_config.json", "adapter_model.safetensors"}
