"""What stock transformers loads is read, run and compressed too, with a word on what it does not use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import aicompress
from aicompress.checkpoint import Checkpoint
from aicompress.model.loading.load import build
from aicompress.model.loading.partial_model import PartialModel
from aicompress.model.loading.pooling import pooling
from aicompress.pipeline import steps
from aicompress.pipeline.calibration.gradients import joints_of
from aicompress.pipeline.step.models.running_model import Setting, encoder
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.verify import verify
from aicompress.recipe import load
from scripts.sweep.configs import small_model
from tests import checkpoints

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = hf.BertConfig(**SHAPE, vocab_size=64)
IDS = torch.arange(3, 19)[None]
OFF = Options(latency="off")


def edited(folder: Path, config: dict[str, Any] | None = None, keep: Callable[[str], bool] = lambda name: True) -> Path:
    """A folder with fields of config.json changed (None removes one), and only some tensors kept."""
    plain = {**json.loads((folder / "config.json").read_text()), **(config or {})}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in plain.items() if value is not None}))
    tensors = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if keep(name)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def quantized(source: Path, out: Path, *overrides: str) -> Any:
    step = steps.make_plan(source, Destination(out), load("quantize/rtn-w8", "quantize", overrides), "quantize")
    return steps.run(step, OFF)


def saved(model: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    model.eval().save_pretrained(folder)
    return folder


def unused_head(folder: Path) -> Path:
    return edited(saved(hf.BertForPreTraining(BERT), folder), {"architectures": ["BertForMaskedLM"]})


def absent_head(folder: Path) -> Path:
    config = hf.MPNetConfig(**SHAPE, vocab_size=64)
    return edited(saved(hf.MPNetModel(config), folder), {"architectures": ["MPNetForMaskedLM"]})


def absent_pooler(folder: Path) -> Path:
    return edited(saved(hf.BertModel(BERT), folder), keep=lambda name: "pooler" not in name)


def no_architecture(folder: Path) -> Path:
    return edited(saved(hf.BertModel(BERT), folder), {"architectures": None})


TOLD = {
    unused_head: "BertForMaskedLM has no place for 4 parameters",
    absent_head: "the checkpoint holds nothing of the head of MPNetForMaskedLM: it is run without",
    absent_pooler: "the checkpoint holds nothing of the pooler: it is run without",
    no_architecture: "",
}


@pytest.mark.parametrize("make", TOLD)
def test_heads_and_poolers_may_be_more_or_less(make: Callable[[Path], Path], tmp_path: Path) -> None:
    source = make(tmp_path / "in")
    with torch.no_grad():
        before = aicompress.load(source)(IDS)[0]
        report = quantized(source, tmp_path / "w8")
        after = aicompress.load(tmp_path / "w8")(IDS)[0]
    assert before.shape == after.shape
    assert (after - before).norm() < 0.1 * before.norm()
    assert verify(tmp_path / "w8").problems == ()
    assert [line for line in report.warnings if "holds nothing of" in line or "no place for" in line] == [
        line for line in report.warnings if TOLD[make] and line.startswith(TOLD[make])
    ]
    assert bool(TOLD[make]) == any(line.startswith(TOLD[make]) for line in report.warnings if TOLD[make])


def test_a_model_without_architectures_is_pruned_as_its_base_class(tmp_path: Path) -> None:
    source = no_architecture(tmp_path / "in")
    recipe = load("prune/width-50", "prune", ["method.multiple=1"])
    steps.run(steps.make_plan(source, Destination(tmp_path / "out"), recipe, "prune"), OFF)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 24


def test_infinity_in_a_configuration_is_read(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8}
    saved(hf.Mamba2ForCausalLM(hf.Mamba2Config(**shape, vocab_size=64, num_hidden_layers=1)), tmp_path / "in")
    assert "__float__" in (tmp_path / "in" / "config.json").read_text()
    quantized(tmp_path / "in", tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "config.json").read_text())["time_step_limit"]
    assert kept == [0.0, {"__float__": "Infinity"}]


def test_infinite_masks_and_excluded_layers_are_copied_with_a_warning(tmp_path: Path) -> None:
    mask, old = torch.full((8, 8), float("-inf")).triu(1), torch.full((8, 8), float("nan"))
    tensors = {"fc.weight": torch.randn(8, 8), "causal_mask": mask, "old.weight": old}
    save_file(tensors, tmp_path / "in.safetensors")
    report = quantized(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "select.exclude=[old]")
    written = load_file(tmp_path / "out.safetensors")
    assert torch.equal(written["causal_mask"], mask)
    assert written["old.weight"].isnan().all()
    (told,) = (line for line in report.warnings if "NaN or infinity" in line)
    assert "causal_mask, old.weight" in told
    save_file({"fc.weight": torch.randn(8, 8), "causal_mask": mask}, tmp_path / "mask.safetensors")
    checked = verify(tmp_path / "mask.safetensors")
    assert checked.problems == ()
    assert any("causal_mask" in note for note in checked.notes)


def test_lists_of_one_value_a_block_are_cut_whatever_their_name(tmp_path: Path) -> None:
    shape = {**SHAPE, "num_hidden_layers": 4, "attention_window": [4, 6, 8, 10], "vocab_size": 64, "pad_token_id": 1}
    saved(hf.LongformerForMaskedLM(hf.LongformerConfig(**shape, max_position_embeddings=40)), tmp_path / "in")
    recipe = load("prune/depth-2", "prune", ["method.drop_layers=1"])
    steps.run(steps.make_plan(tmp_path / "in", Destination(tmp_path / "out"), recipe, "prune"), OFF)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == len(config["attention_window"]) == 3
    assert set(config["attention_window"]) < {4, 6, 8, 10}


@pytest.mark.parametrize(
    ("shards", "index"),
    [
        ("diffusion_pytorch_model-0000{}-of-00002.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
        ("model.fp16-0000{}-of-00002.safetensors", "model.safetensors.index.fp16.json"),
    ],
)
def test_an_index_of_any_name_is_read(shards: str, index: str, tmp_path: Path) -> None:
    tensors = {f"{name}.weight": torch.randn(8, 8) for name in ("a", "b")}
    weight_map = {}
    for number, (name, tensor) in enumerate(tensors.items(), start=1):
        save_file({name: tensor}, tmp_path / shards.format(number))
        weight_map[name] = shards.format(number)
    (tmp_path / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "notes.txt").write_text("mine")
    for place in (tmp_path, tmp_path / index):
        assert Checkpoint.open(place).parameters().keys() == tensors.keys()
    assert [path.name for path in Checkpoint.open(tmp_path).source.side_files] == ["notes.txt"]


def test_outputs_keep_the_name_and_the_strings_that_their_readers_look_for(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    tensors = {"q.weight": torch.randn(8, 64), "k.weight": torch.randn(64, 8)}
    save_file(
        tensors, tmp_path / "in" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt", "author": "me"}
    )
    recipe = load("prune/magnitude-50", "prune")
    steps.run(steps.make_plan(tmp_path / "in", Destination(tmp_path / "out"), recipe, "prune"), OFF)
    with safe_open(tmp_path / "out" / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        assert file.metadata()["author"] == "me"


def test_a_tied_head_of_an_architecture_that_initializes_it_itself_loads(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = hf.ModernBertConfig(**shape, **special, vocab_size=64, max_position_embeddings=32)
    saved(hf.ModernBertForMaskedLM(config), tmp_path / "in")
    quantized(tmp_path / "in", tmp_path / "w8", "select.kinds=[linear, embedding]")
    with torch.no_grad():
        before = aicompress.load(tmp_path / "in")(IDS).logits
        for kernels in ("reference", "fast"):
            after = aicompress.load(tmp_path / "w8", kernels=kernels)(IDS).logits  # type: ignore[arg-type]
            assert (after - before).norm() < 0.1 * before.norm()


def test_sentences_are_encoded_under_a_head_and_through_dense(tiny_bert: Path, tmp_path: Path) -> None:
    folder = checkpoints.make_bert(tmp_path / "encoder")
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    (folder / "2_Dense").mkdir()
    weight, bias = torch.randn(6, width), torch.randn(6)
    save_file({"linear.weight": weight, "linear.bias": bias}, folder / "2_Dense" / "model.safetensors")
    plain = {"in_features": width, "out_features": 6, "bias": True}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(plain))
    modules = [
        module for module in json.loads((folder / "modules.json").read_text()) if "Normalize" not in module["type"]
    ]
    modules.append({"idx": 9, "name": "9", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    without = encoder(Setting().start(str(folder)), 16)(["the cat sees a dog"])
    (folder / "modules.json").write_text(json.dumps(modules))
    dense = encoder(Setting().start(str(folder)), 16)(["the cat sees a dog"])
    assert len(pooling(folder).layers) == 1
    assert dense.shape == (1, 6)
    assert without.shape == (1, width)
    head = hf.BertForMaskedLM(hf.BertConfig(**json.loads((folder / "config.json").read_text())))
    head.bert.load_state_dict(hf.BertModel.from_pretrained(folder, add_pooling_layer=False).state_dict())
    head.save_pretrained(folder)  # the same encoder, under a head
    torch.testing.assert_close(encoder(Setting().start(str(folder)), 16)(["the cat sees a dog"]), dense)


def test_blocks_that_share_their_weights_are_narrowed_together(tmp_path: Path) -> None:
    shape = {**SHAPE, "num_hidden_layers": 4, "num_key_value_heads": 4, "vocab_size": 64, "mamba_d_state": 8}
    blocks = {"n_mamba_heads": 8, "num_mem_blocks": 1, "mamba_headdim": 8, "use_mem_rope": False}
    kinds = {"layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]}
    saved(hf.Zamba2ForCausalLM(hf.Zamba2Config(**shape, **blocks, **kinds)), tmp_path / "in")
    recipe = load("prune/width-50", "prune", ["method.multiple=1"])
    steps.run(steps.make_plan(tmp_path / "in", Destination(tmp_path / "out"), recipe, "prune"), Options(latency="off"))
    model, info = hf.Zamba2ForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.intermediate_size == SHAPE["intermediate_size"] // 2


def test_convolutions_of_a_float32_file_are_timed(tmp_path: Path) -> None:
    save_file({"c.weight": torch.randn(32, 16, 3, 3)}, tmp_path / "in.safetensors")
    recipe = load("quantize/rtn-w8", "quantize")
    plan = steps.make_plan(tmp_path / "in.safetensors", Destination(tmp_path / "out.safetensors"), recipe, "quantize")
    assert steps.run(plan, Options()).latency is not None


@pytest.mark.parametrize(("model_type", "fused"), [("nomic_bert", "attn.Wqkv"), ("molmo2_text", "mlp.ff_proj")])
def test_what_transformers_divides_among_layers_is_calibrated(model_type: str, fused: str, tmp_path: Path) -> None:
    """As rtn-w8 does, gptq finds 8 bits nearly exact; gradients are those of its rows, and its bits are measured."""
    source = saved(small_model(model_type), tmp_path / "in")
    torch.manual_seed(0)
    save_file({"input_ids": torch.randint(3, 99, (8, 16))}, tmp_path / "ids.safetensors")
    calibration = {"arrays": str(tmp_path / "ids.safetensors"), "inputs": "input_ids"}
    rows: dict[str, dict[str, Any]] = {}
    for verb, method in (
        ("quantize", {"name": "gptq", "bits": 8}),
        ("prune", {"name": "taylor", "sparsity": 0.01, "shift": 0}),
        ("quantize", {"name": "rtn", "bits": "auto", "target_bpw": 8}),
    ):
        (tmp_path / "recipe.yaml").write_text(json.dumps({"version": 1, "method": method, "calibration": calibration}))
        recipe = load(str(tmp_path / "recipe.yaml"), verb)
        out = Destination(tmp_path / str(method["name"]))
        report = steps.run(steps.make_plan(source, out, recipe, verb), OFF)
        rows[out.path.name] = {row.name: row for row in report.layers if row.method != "-"}
        assert sum(name.endswith(fused) for name in rows[out.path.name]) == 2
        assert not [row.name for row in report.layers if "data-free" in row.note], method
    assert max(row.detail["bits"] for name, row in rows["rtn"].items() if name.endswith(fused)) > 3
    before, after = (aicompress.load(path)(input_ids=IDS)[0] for path in (source, tmp_path / "gptq"))
    assert torch.nn.functional.cosine_similarity(before.flatten(), after.flatten(), dim=0) > 0.999
    checkpoint = Checkpoint.open(source)
    loader = PartialModel(checkpoint, build(checkpoint))
    loader.load(lambda name: True)
    joints = joints_of(loader, [layer for layer in checkpoint.layers() if layer.name.endswith(fused)])
    assert len(joints) == 2
    for joint in joints:
        for path, numbers in joint.parts.values():
            weight = loader.model.get_submodule(path).weight
            torch.testing.assert_close(checkpoint.dense(f"{joint.name}.weight")[numbers], weight)
