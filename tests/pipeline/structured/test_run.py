from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from aicompress.checkpoint import Checkpoint, files
from aicompress.methods import get
from aicompress.pipeline.layerwise import run as layerwise
from aicompress.pipeline.layerwise.planner import make_plan
from aicompress.pipeline.step import blocks
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.step.run import STARTS_ANEW
from aicompress.pipeline.structured import planner as structure_planner
from aicompress.pipeline.structured import run as structure
from aicompress.recipe import Recipe
from tests.pipeline.families import FAMILIES, Family, silence
from tests.pipeline.steps import OFF, loaded, plan, prune

STACKS = [(name, stack) for name, family in FAMILIES.items() for stack in family.stacks]


@pytest.mark.parametrize(
    ("name", "stack", "drop"),
    [
        *((name, stack, (0, 2)) for name, stack in STACKS),
        *((name, stack, (1,)) for name, stack in STACKS if name in ("t5", "gemma3")),  # blocks that are not alike
    ],
)
def test_depth_is_the_model_without_those_blocks(name: str, stack: str, drop: tuple[int, ...], tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.saved(tmp_path / "in")
    before = family.output(model)
    report = prune(tmp_path / "in", tmp_path / "out", name="depth", drop=drop, stack=stack)
    blocks = family.blocks(model, stack)
    kept = [block for number, block in enumerate(blocks) if number not in drop]
    if name == "t5" and 0 in drop:  # the bias of the first block serves all blocks
        first, new = blocks[0].layer[0].SelfAttention, kept[0].layer[0].SelfAttention
        new.relative_attention_bias, new.has_relative_attention_bias = first.relative_attention_bias, True
    removed(family, model, stack, kept, drop)
    after = family.output(loaded(model, tmp_path / "out"))
    assert torch.equal(after, family.output(model))
    assert not torch.allclose(after, before, atol=1e-3)
    assert report.after.parameters < report.before.parameters


def removed(family: Family, model: Any, stack: str, kept: list[nn.Module], drop: tuple[int, ...]) -> None:
    """Take blocks out of a model in memory, and their attention kinds out of its configuration."""
    blocks = family.blocks(model, stack)
    kinds = getattr(model.config, "layer_types", None)
    if kinds is not None:
        model.config.layer_types = [kind for number, kind in enumerate(kinds) if number not in drop]
    if hasattr(model.config, "num_hidden_layers") and len(family.stacks) == 1:
        model.config.num_hidden_layers = len(kept)
    for _ in range(len(blocks)):
        del blocks[0]
    blocks.extend(kept)


@pytest.mark.parametrize("name", FAMILIES)
def test_width_is_the_model_with_those_neurons_silent(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.saved(tmp_path / "in")
    before = family.output(model)
    report = prune(tmp_path / "in", tmp_path / "out", name="width", sparsity=0.5, multiple=4)
    narrow = loaded(model, tmp_path / "out")
    silence(family, model, lambda width: width // 2)
    after = family.output(narrow)
    torch.testing.assert_close(after, family.output(model), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(after, before, atol=1e-3)
    assert {row.rel_error for row in report.layers if "neurons" in row.detail} == {None}
    assert report.after.bytes < report.before.bytes


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_dropped_is_the_same_checkpoint(name: str, tmp_path: Path) -> None:
    FAMILIES[name].saved(tmp_path / "in")
    report = prune(tmp_path / "in", tmp_path / "narrow", name="width", sparsity=0.001)
    assert any("no neuron goes" in line for line in report.warnings)
    stack = next(iter(FAMILIES[name].stacks))
    prune(tmp_path / "in", tmp_path / "shallow", name="depth", drop=(), stack=stack)
    before = load_file(tmp_path / "in" / "model.safetensors")
    for folder in ("narrow", "shallow"):
        after = load_file(tmp_path / folder / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(row.rel_error == 0 for row in report.layers)


def compressed(command: str, source: Path, out: Path, **method: Any) -> None:
    config = get(command, method["name"]).config(**method)
    layerwise.run(make_plan(source, Destination(out), Recipe(version=1, method=config), command), OFF)


def decoded(source: Path, out: Path) -> None:
    """The same checkpoint with every parameter dense."""
    opened = Checkpoint.open(source)
    out.mkdir()
    save_file({name: opened.dense(name).contiguous() for name in opened.parameters()}, out / "model.safetensors")
    config = {key: value for key, value in (opened.config or {}).items() if key != "quantization_config"}
    (out / "config.json").write_text(json.dumps(config))


FORMS = {
    "int4 groups": ("quantize", {"name": "rtn", "bits": 4, "group_size": 8}, {"gate": "int_grouped", "down": "dense"}),
    "int8 rows": ("quantize", {"name": "rtn", "preset": "W8A16"}, {"gate": "int_grouped", "down": "int_grouped"}),
    "int8 tensor": (
        "quantize",
        {"name": "rtn", "bits": 8, "granularity": "tensor"},
        {"gate": "int_grouped", "down": "int_grouped"},
    ),
    "low rank": ("factorize", {"name": "svd", "rank": 6}, {"gate": "low_rank", "down": "low_rank"}),
    "low rank too wide": ("factorize", {"name": "svd", "rank": 15}, {"gate": "dense", "down": "dense"}),
    "sparse": (
        "prune",
        {"name": "magnitude", "sparsity": 0.8, "store": "sparse"},
        {"gate": "dense", "down": "dense"},
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_compressed_input_is_cut_as_its_decoded_self(
    form: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of rows, where it is stored by rows, to the byte as at once."""
    command, method, expected = FORMS[form]
    FAMILIES[family].saved(tmp_path / "in")
    compressed(command, tmp_path / "in", tmp_path / "compressed", **method)
    decoded(tmp_path / "compressed", tmp_path / "decoded")
    with monkeypatch.context() as patched:
        patched.setattr(blocks, "BLOCK", 1)
        patched.setattr(files, "NARROW", 8)
        report = prune(tmp_path / "compressed", tmp_path / "out", name="width", sparsity=0.5, multiple=4)
    prune(tmp_path / "compressed", tmp_path / "whole", name="width", sparsity=0.5, multiple=4)
    if form != "low rank too wide":  # a product of some rows may differ in the last bits
        written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
        assert written[0] == written[1]
    prune(tmp_path / "decoded", tmp_path / "reference", name="width", sparsity=0.5, multiple=4)
    out, reference = Checkpoint.open(tmp_path / "out"), Checkpoint.open(tmp_path / "reference")
    assert out.parameters().keys() == reference.parameters().keys()
    assert all(torch.allclose(out.dense(name), reference.dense(name), atol=1e-6) for name in out.parameters())
    if family == "llama":
        for kind, stored in expected.items():
            entry = out.manifest.entries.get(f"model.layers.0.mlp.{kind}_proj.weight")
            assert (entry.meta["form"] if entry else "dense") == stored
        assert any("are decoded" in warning for warning in report.warnings) == ("dense" in expected.values())


def test_depth_keeps_every_form_bit_for_bit(tmp_path: Path) -> None:
    FAMILIES["llama"].saved(tmp_path / "in")
    compressed("quantize", tmp_path / "in", tmp_path / "int4", name="rtn", bits=4, group_size=8)
    report = prune(tmp_path / "int4", tmp_path / "out", name="depth", drop=(0, 2))
    before, after = Checkpoint.open(tmp_path / "int4"), Checkpoint.open(tmp_path / "out")
    for new, old in enumerate((1, 3)):
        for suffix in ("self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"):
            assert torch.equal(
                after.dense(f"model.layers.{new}.{suffix}"), before.dense(f"model.layers.{old}.{suffix}")
            )
    rows = {row.name: row for row in report.layers}
    assert rows["model.layers.0.mlp.up_proj"].form == "dropped"
    assert rows["model.layers.0.mlp.up_proj"].bytes_after == 0
    assert rows["model.layers.3.mlp.up_proj"].detail == {"block": "3, now 1"}
    assert rows["model.layers.3.mlp.up_proj"].rel_error == 0
    total = sum(ref.spec.nbytes for ref in after.tensors.values())
    small = sum(after.tensors[name].spec.nbytes for name in after.tensors if "norm" in name)
    assert sum(row.bytes_after for row in report.layers) == total - small


def test_side_files_and_shards_come_along(tiny_bert: Path, tmp_path: Path) -> None:
    planned = structure_planner.make_plan(
        tiny_bert,
        Destination(tmp_path / "out", max_shard_size=40_000),
        Recipe(version=1, method=get("prune", "depth").config(name="depth", keep_layers=2, strategy="even")),
        "prune",
    )
    assert planned.summary().weight_bytes == planned.output.weight_bytes
    structure.run(planned, OFF)
    assert len(planned.output.shards) > 2
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny_bert / name).read_bytes()
    model = hf.AutoModel.from_pretrained(tmp_path / "out")
    assert len(model.encoder.layer) == model.config.num_hidden_layers == 2


def test_same_recipe_same_bytes(tmp_path: Path) -> None:
    FAMILIES["gpt2"].saved(tmp_path / "in")
    for out in ("one", "two"):
        prune(tmp_path / "in", tmp_path / out, name="width", keep=0.25)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()
    assert (tmp_path / "one" / "config.json").read_bytes() == (tmp_path / "two" / "config.json").read_bytes()


def silenced(fused: torch.Tensor, down: torch.Tensor, width: int) -> None:
    """Take half of the neurons of a fused gate and up (2 width, hidden) and its down (hidden, width) out by hand."""
    gate, up = fused[:width], fused[width:]
    score = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    with torch.no_grad():
        down[:, score.argsort()[: width // 2]] = 0


@pytest.mark.parametrize("name", ["phi3", "modernbert", "mixtral"])
def test_fused_projections_and_experts(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"vocab_size": 64, "pad_token_id": 0, "initializer_range": 0.3}
    model: Any
    if name == "phi3":
        model = hf.Phi3ForCausalLM(hf.Phi3Config(**shape, num_key_value_heads=2))
        pairs = [(block.mlp.gate_up_proj.weight, block.mlp.down_proj.weight) for block in model.model.layers]
    elif name == "modernbert":
        model = hf.ModernBertModel(hf.ModernBertConfig(**shape))
        pairs = [(block.mlp.Wi.weight, block.mlp.Wo.weight) for block in model.layers]
    else:
        model = hf.MixtralForCausalLM(hf.MixtralConfig(**shape, num_key_value_heads=2, num_local_experts=3))
        experts = [block.mlp.experts for block in model.model.layers]
        pairs = [(e.gate_up_proj[i], e.down_proj[i]) for e in experts for i in range(3)]
    model.eval().save_pretrained(tmp_path / "in")
    prune(tmp_path / "in", tmp_path / "out", name="width", keep=0.5)
    for fused, down in pairs:
        silenced(fused, down, 48)
    ids = torch.arange(3, 19)[None]
    with torch.inference_mode():
        expected, found = model(ids)[0], loaded(model, tmp_path / "out")(ids)[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_resuming_says_that_a_structural_step_starts_anew(tiny_llama: Path, tmp_path: Path) -> None:
    report = structure.run(
        plan(tiny_llama, tmp_path / "out", name="depth", drop_layers=1), Options(resume=True, latency="off")
    )
    assert STARTS_ANEW in report.warnings
