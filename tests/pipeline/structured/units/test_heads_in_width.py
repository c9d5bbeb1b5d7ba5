"""Heads whose number config.json ties to the hidden width: fewer of them load with aicompress, nowhere as garbage."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import aicompress.hf  # noqa: F401
from aicompress.checkpoint import Checkpoint
from aicompress.errors import CompressError
from aicompress.model.loading.load import load
from aicompress.pipeline.layerwise import run as layerwise
from aicompress.pipeline.layerwise.planner import make_plan
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import load as load_recipe
from tests.pipeline.calibration.steps import OFF, text
from tests.pipeline.families import FAMILIES, SHAPE, TEXT, Family, images, text_pairs, tokens, uncached
from tests.pipeline.steps import plan, prune, refused
from tests.pipeline.structured.test_calibrated import logits, recipe, windows
from tests.pipeline.structured.test_calibrated import prune as calibrated

DEBERTA = Family(
    lambda: hf.DebertaV2Model(hf.DebertaV2Config(**SHAPE, vocab_size=64, initializer_range=0.3)), {}, (), "", tokens
)
GPTJ = Family(
    lambda: hf.GPTJForCausalLM(hf.GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, **TEXT)),
    {},
    (),
    "",
    uncached,
)
BLOOM = Family(
    lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **TEXT)), {}, (), "", uncached
)
SIDES = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
SIDES |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 32, "max_position_embeddings": 32}
BART = Family(
    lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SIDES, **TEXT, init_std=0.3, decoder_start_token_id=1)),
    {}, (), "", text_pairs,
)  # fmt: skip
OPT = Family(
    lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**{**SHAPE, **TEXT, "init_std": 0.3, "ffn_dim": 48, "word_embed_proj_dim": 32})
    ),
    {}, (), "", uncached,
)  # fmt: skip
XGLM_SIZES = {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 32}
XGLM = Family(lambda: hf.XGLMForCausalLM(hf.XGLMConfig(**XGLM_SIZES, **TEXT, init_std=0.3)), {}, (), "", uncached)


def clip() -> Any:
    vision = {**SHAPE, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8, "initializer_range": 0.3}
    text = {**SHAPE, "num_hidden_layers": 2, "vocab_size": 64, "initializer_range": 0.3}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision))


CLIP = Family(clip, {}, (), "", lambda: {**tokens(), **images()})
READERS = {  # what reads the heads in a block, and what makes them: name -> how many sections lie on its axis
    "bert": ("attention.output.dense", {"attention.self.query": 1, "attention.self.key": 1, "attention.self.value": 1}),
    "distilbert": ("attention.out_lin", {"attention.q_lin": 1, "attention.k_lin": 1, "attention.v_lin": 1}),
    "deberta": ("attention.output.dense", {"attention.self.query_proj": 1, "attention.self.value_proj": 1}),
    "gpt2": ("attn.c_proj", {"attn.c_attn": 3}),
    "gpt-neox": ("attention.dense", {"attention.query_key_value": 1}),
    "gpt-j": ("attn.out_proj", {"attn.q_proj": 1, "attn.k_proj": 1, "attn.v_proj": 1}),
}
READERS["bert-head"] = READERS["bert"]
READERS |= dict.fromkeys(
    ("opt", "bart", "xglm", "whisper", "clip"), ("_attn.out_proj", {f"_attn.{n}_proj": 1 for n in "qkv"})
)
CASES = {
    **FAMILIES,
    "opt": OPT,
    "bart": BART,
    "clip": CLIP,
    "xglm": XGLM,
    "deberta": DEBERTA,
    "gpt-j": GPTJ,
    "bloom": BLOOM,
}


def matrix(layer: Any) -> Tensor:
    """(out, in), a view."""
    return layer.weight.t() if isinstance(layer, hf.pytorch_utils.Conv1D) else layer.weight


def silence(model: Any, narrow: Any, name: str) -> list[list[int]]:
    """Make the heads silent that a narrow model lacks; returns those that stay, which must be its rows everywhere."""
    reader, makers = READERS[name]
    few, found = dict(narrow.named_modules()), []
    for path, layer in model.named_modules():
        if not path.endswith(reader):
            continue
        whole, left = matrix(layer), matrix(few[path])
        heads, stay = whole.split(8, dim=1), left.split(8, dim=1)
        kept = [next(n for n, head in enumerate(heads) if torch.equal(head, one)) for one in stay]
        block = path.removesuffix(reader)
        for maker, sections in makers.items():
            for wide, thin in zip(
                matrix(model.get_submodule(block + maker)).chunk(sections),
                matrix(few[block + maker]).chunk(sections),
                strict=True,
            ):
                rows = wide.reshape(4, -1, wide.shape[1])[kept]
                assert torch.equal(rows.reshape(thin.shape), thin)
        with torch.no_grad():
            for gone in set(range(4)) - set(kept):
                whole[:, 8 * gone : 8 * gone + 8] = 0
        found.append(kept)
    return found


@pytest.mark.parametrize("name", READERS)
def test_heads_are_the_model_with_those_heads_silent(name: str, tmp_path: Path) -> None:
    family = CASES[name]
    model = family.saved(tmp_path / "in")
    before = family.output(model)
    report = prune(tmp_path / "in", tmp_path / "out", name="heads", sparsity=0.5)
    narrow = load(tmp_path / "out")
    kept = silence(model, narrow, name)
    assert kept
    assert {len(each) for each in kept} == {2}
    torch.testing.assert_close(family.output(narrow), family.output(model), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(family.output(narrow), before, atol=1e-3)
    again = type(model).from_pretrained(tmp_path / "out").eval()  # with aicompress.hf
    torch.testing.assert_close(family.output(again), family.output(narrow))
    assert {row.detail["heads"] for row in report.layers if "heads" in row.detail} == {"2 of 4"}
    assert report.after.weight_bytes < report.before.weight_bytes
    assert any("trust_remote_code" in line for line in report.warnings)


def test_generation_keeps_its_cache(tmp_path: Path) -> None:
    FAMILIES["gpt2"].saved(tmp_path / "in")
    prune(tmp_path / "in", tmp_path / "out", name="heads", heads=3)
    model = load(tmp_path / "out")
    start = torch.arange(3, 9)[None]
    found = [model.generate(start, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*found)


def test_transformers_alone_refuses_and_takes_it_with_remote_code(tmp_path: Path, python: list[str]) -> None:
    FAMILIES["gpt-neox"].saved(tmp_path / "in")
    prune(tmp_path / "in", tmp_path / "out", name="heads", sparsity=0.5)
    script = (
        "import sys, torch, transformers as hf\n"
        "try:\n"
        "    hf.GPTNeoXForCausalLM.from_pretrained(sys.argv[1])\n"
        "except Exception:\n"
        "    print('closed')\n"
        "model = hf.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(model(input_ids=torch.arange(3, 19)[None]).logits.double().sum().item())\n"
        "assert 'aicompress' not in sys.modules\n"
    )
    command = [*python, "-c", script, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    closed, total = done.stdout.splitlines() or ("", "0")
    with torch.inference_mode():
        expected = float(load(tmp_path / "out")(input_ids=torch.arange(3, 19)[None]).logits.double().sum())
    assert closed == "closed"
    assert float(total) == pytest.approx(expected, rel=1e-4)


def test_obs_takes_over_and_later_steps_go_on(tmp_path: Path, tiny_bert: Path, text_file: Path) -> None:
    ids, found = windows(tiny_bert, text_file, 8), {}
    before = logits(hf.AutoModel.from_pretrained(tiny_bert), ids)
    for score in ("product", "obs"):
        method = {"name": "heads", "sparsity": 0.5, "score": score}
        calibrated(tiny_bert, tmp_path / score, recipe(tmp_path, text(text_file, 16), method))
        found[score] = float((logits(load(tmp_path / score), ids) - before).norm())
    assert found["obs"] < found["product"]
    ints = tmp_path / "int8.yaml"
    ints.write_text(json.dumps({"version": 1, "method": {"name": "gptq", "bits": 8, "granularity": "channel"},
                                "calibration": text(text_file)}))  # fmt: skip
    made = make_plan(tmp_path / "obs", Destination(tmp_path / "int8"), load_recipe(str(ints), "quantize"), "quantize")
    layerwise.run(made, OFF)
    assert Checkpoint.open(tmp_path / "int8").manifest.widths == Checkpoint.open(tmp_path / "obs").manifest.widths
    after = logits(load(tmp_path / "int8"), ids)
    exact = logits(load(tmp_path / "obs"), ids)
    assert float((after - exact).norm() / exact.norm()) < 0.05
    with pytest.raises(CompressError, match="fewer heads"):
        prune(tmp_path / "obs", tmp_path / "again", name="width", sparsity=0.5)


def falcon(**fields: Any) -> Any:
    shape = {**SHAPE, **TEXT, "num_hidden_layers": 1}
    del shape["intermediate_size"]
    return hf.FalconForCausalLM(hf.FalconConfig(**shape, **{"alibi": False, "bias": True, **fields}))


def stablelm(**fields: Any) -> Any:
    shape = {**SHAPE, **TEXT, "num_hidden_layers": 1, "num_key_value_heads": 2}
    return hf.StableLmForCausalLM(hf.StableLmConfig(**{**shape, **fields}))


def phi() -> Any:
    """A norm of a head is as long as its share of the hidden width, whatever head_dim says."""
    shape = {**SHAPE, **TEXT, "num_hidden_layers": 1, "num_key_value_heads": 2, "qk_layernorm": True}
    return hf.PhiForCausalLM(hf.PhiConfig(**shape))


def prophetnet() -> Any:
    """`num_decoder_attention_heads` counts heads; a table of positions holds something for each."""
    sides = {"num_encoder_layers": 1, "num_decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "hidden_size": 32}
    return hf.ProphetNetForCausalLM(hf.ProphetNetConfig(**sides, **heads, **TEXT))


def jetmoe() -> Any:
    """One projection makes keys and values, and a router chooses the queries."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "kv_channels": 8}
    return hf.JetMoeForCausalLM(hf.JetMoeConfig(**sizes, num_key_value_heads=2, num_local_experts=4, **TEXT))


ONE_KEY = {"multi_query": True, "new_decoder_architecture": False}
GROUPS = {"new_decoder_architecture": True, "num_kv_heads": 2}  # each group's queries, key and value lie together
TOGETHER = {"multi_query": False, "new_decoder_architecture": False}
SHARED: dict[str, tuple[Callable[..., Any], dict[str, Any], str, str]] = {
    "one key for all": (falcon, ONE_KEY, "query", "transformer.h.0.self_attention.dense"),
    "groups beside their key": (falcon, GROUPS, "group", "transformer.h.0.self_attention.dense"),
    "heads beside their key": (falcon, TOGETHER, "group", "transformer.h.0.self_attention.dense"),
    "groups": (stablelm, {}, "group", "model.layers.0.self_attn.o_proj"),
    "a norm of a head's share": (phi, {}, "group", "model.layers.0.self_attn.dense"),
    "queries of groups": (stablelm, {}, "query", "model.layers.0.self_attn.o_proj"),
}


@pytest.mark.parametrize("name", SHARED)
def test_heads_that_share_keys_are_the_model_with_those_silent(name: str, tmp_path: Path) -> None:
    build, fields, unit, reader = SHARED[name]
    torch.manual_seed(0)
    model = build(**fields).eval()
    model.save_pretrained(tmp_path / "in")
    before = FAMILIES["llama"].output(model)
    prune(tmp_path / "in", tmp_path / "out", name="heads", sparsity=0.5, unit=unit)
    narrow = load(tmp_path / "out")
    whole, left = model.get_submodule(reader).weight.detach(), narrow.get_submodule(reader).weight
    gone = [not any(torch.equal(head, one) for one in left.split(8, dim=1)) for head in whole.split(8, dim=1)]
    assert sum(gone) == 2
    if unit == "group" and name != "heads beside their key":
        assert gone[0] == gone[1]
    whole[:, torch.tensor(gone).repeat_interleave(8)] = 0
    after = FAMILIES["llama"].output(narrow)
    torch.testing.assert_close(after, FAMILIES["llama"].output(model), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(after, before, atol=1e-3)


@pytest.mark.parametrize(
    ("build", "fields", "unit", "reason"),
    [
        (BLOOM.build, {}, "group", "each head computes by its number among all, as ALiBi slopes go"),
        (stablelm, {"qk_layernorm": True}, "group", "self_attn.q_layernorm.norms holds a module for every head"),
        (prophetnet, {}, "group", "relative_pos_embeddings.bias holds something for every head"),
        (jetmoe, {}, "group", "where config.json counts 4 heads and 2 keys of 8"),
        (falcon, GROUPS, "query", "query heads lie beside the key of their group"),
    ],
)
def test_heads_that_cannot_go_are_refused_with_the_reason(
    build: Callable[..., Any], fields: dict[str, Any], unit: str, reason: str, tmp_path: Path
) -> None:
    build(**fields).save_pretrained(tmp_path / "in")
    assert reason in refused(tmp_path / "in", tmp_path / "out", name="heads", sparsity=0.5, unit=unit)


def test_one_key_for_all_is_no_group_that_can_go(tmp_path: Path) -> None:
    falcon(**ONE_KEY).save_pretrained(tmp_path / "in")
    planned = plan(tmp_path / "in", tmp_path / "out", name="heads", sparsity=0.5)
    assert any("share one key; choose unit: query" in line for line in planned.warnings)
