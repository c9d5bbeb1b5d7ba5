"""Every verb reads what other tools have quantized: layers it leaves keep their form or are said to be decoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from aicompress.checkpoint import Checkpoint
from aicompress.methods import get
from aicompress.model.loading.load import load
from aicompress.pipeline import export, steps
from aicompress.pipeline.inspect import inspect
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.verify import verify
from aicompress.recipe import Recipe
from aicompress.recipe.made import ExportRecipe
from aicompress.recipe.step import Calibration, Select
from aicompress.report.model import Report
from tests import foreign
from tests.foreign import Encode

OFF = Options(latency="off")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
INPUTS: dict[str, tuple[Encode, dict[str, Any]]] = {
    "gptq": (foreign.gptq(), GPTQ),
    "act-order": (foreign.gptq(symmetric=False, order=True), {**GPTQ, "sym": False, "desc_act": True}),
    "awq": (foreign.awq(), {"quant_method": "awq", "bits": 4, "group_size": 32}),
    "nf4": (foreign.nf4(), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "fp8": (foreign.fp8(32, 32), {"quant_method": "fp8", "weight_block_size": [32, 32]}),
    "nvfp4": (foreign.nvfp4(), {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
}
DECODED = {"act-order": "gptq, 4-bit, columns in another order"}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Any:
    """The Llama in another tool's layout, and the matrices that it stands for."""
    made: dict[str, tuple[Path, dict[str, Tensor]]] = {}

    def build(name: str) -> tuple[Path, dict[str, Tensor]]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name.replace("-", "")) / "in"
            made[name] = folder, foreign.convert(tiny_llama, folder, *INPUTS[name])
        return made[name]

    return build


def step(command: str, source: Path, out: Path, include: tuple[str, ...] = (), **method: Any) -> tuple[Any, Report]:
    """Plan and run a step; the plan's bytes must be those of the run."""
    config = get(command, method["name"]).config(**method)
    recipe = Recipe(version=1, method=config, select=Select(include=include))
    planned = steps.make_plan(source, Destination(out), recipe, command)
    report = steps.run(planned, OFF)
    assert planned.output.weight_bytes == report.after.weight_bytes
    assert report.before is not None
    assert min(report.before.by_kind.values()) > 0
    return planned, report


@pytest.mark.parametrize("name", INPUTS)
def test_layers_that_a_step_leaves_keep_their_numbers(quantized: Any, tmp_path: Path, name: str) -> None:
    source, dense = quantized(name)
    planned, report = step(
        "quantize", source, tmp_path / "out", ("model.layers.0.*",), name="rtn", bits=8, granularity="channel"
    )
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    assert after.parameters() == before.parameters()
    for parameter, matrix in dense.items():
        torch.testing.assert_close(before.dense(parameter), matrix, rtol=1e-6, atol=0)
        kept = after.dense(parameter)
        assert torch.equal(kept, before.dense(parameter)) != (".layers.0." in parameter), parameter
        left = before.outline(parameter) if ".layers.0." not in parameter else None
        assert left is None or after.outline(parameter).form == left.form  # type: ignore[union-attr]
    told = [warning for warning in planned.warnings if "are decoded" in warning]
    assert [DECODED[name] in warning for warning in told] == ([True] if name in DECODED else [])
    assert set(planned.warnings) <= set(report.warnings)
    assert verify(tmp_path / "out").sound


@pytest.mark.parametrize("name", ["gptq", "fp8"])
@pytest.mark.parametrize(
    ("command", "method"),
    [
        ("factorize", {"name": "svd", "rank": 2}),
        ("prune", {"name": "magnitude", "sparsity": 0.5, "store": "sparse"}),
        ("prune", {"name": "width", "keep": 0.5, "multiple": 1}),
    ],
)  # fmt: skip
def test_other_verbs_read_them(quantized: Any, tmp_path: Path, name: str, command: str, method: dict[str, Any]) -> None:
    source, _ = quantized(name)
    step(command, source, tmp_path / "out", **method)
    assert verify(tmp_path / "out").sound
    ids = torch.arange(1, 9)[None]
    assert torch.isfinite(load(tmp_path / "out")(ids).logits).all()


@pytest.mark.parametrize("name", ["gptq", "fp8", "nf4"])
def test_they_load_and_are_inspected(quantized: Any, tiny_llama: Path, name: str) -> None:
    source, dense = quantized(name)
    stock = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    with torch.no_grad():
        for parameter, matrix in dense.items():
            stock.get_parameter(parameter).copy_(matrix)
        ids = torch.arange(1, 17)[None]
        expected = stock(ids).logits
        torch.testing.assert_close(load(source, kernels="reference")(ids).logits, expected, rtol=1e-4, atol=1e-5)
    row = next(row for row in inspect(source).rows if row.name.endswith("0.mlp.up_proj"))
    assert row.nbytes == Checkpoint.open(source).nbytes("model.layers.0.mlp.up_proj.weight") < row.numbers * 2
    assert verify(source).sound


def test_what_does_not_come_along_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    foreign.convert(tiny_llama, source, foreign.fp8(), {"quant_method": "fp8", "activation_scheme": "dynamic"})
    (source / "hf_quant_config.json").write_text("{}")
    planned, _ = step("quantize", source, tmp_path / "out", name="rtn", bits=8, granularity="channel")
    told = "\n".join(planned.warnings)
    assert "round their inputs" in told
    assert "not taken along: hf_quant_config.json" in told
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


def with_riders(source: Path, *heads: int) -> dict[str, Tensor]:
    """Scales of cache and inputs beside every attention, as fp8 checkpoints have them; those of the cache."""
    file = source / "model.safetensors"
    attentions = {name.rpartition(".q_proj")[0] for name in load_file(file) if ".q_proj." in name}
    cache = {f"{at}.{leaf}": torch.rand(heads) for at in attentions for leaf in ("k_scale", "v_proj.output_scale")}
    save_file({**load_file(file), **cache, **{f"{at}.q_proj.input_scale": torch.rand(1) for at in attentions}}, file)
    return cache


RIDDEN: dict[str, dict[str, Any]] = {
    "quantize": {"name": "rtn", "bits": 8, "granularity": "channel"},
    "prune": {"name": "depth", "drop_layers": 1},
    "factorize": {"name": "svd", "rank": 2},
}


@pytest.mark.parametrize("command", RIDDEN)
def test_scales_of_the_cache_come_along(tiny_llama: Path, tmp_path: Path, command: str) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    foreign.convert(tiny_llama, source, foreign.fp8(32, 32), INPUTS["fp8"][1])
    cache = with_riders(source)
    planned, _ = step(command, source, out, **RIDDEN[command])
    told = "\n".join(planned.warnings)
    assert (
        f"key-value cache come along, for readers that round it, which aicompress.load does not: {len(cache)}" in told
    )
    assert "has no place" not in told
    assert "left out, since no layer of the output rounds by them" in told
    held = load_file(out / "model.safetensors")
    assert not [name for name in held if "input_scale" in name]
    kept = {name: held[name] for name in held if name in cache}
    assert len(kept) == len(cache) - 2 * (command == "prune")
    assert all(any(torch.equal(tensor, scale) for scale in cache.values()) for tensor in kept.values())
    assert verify(out).sound
    assert torch.isfinite(load(out)(torch.arange(1, 9)[None]).logits).all()
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, trust_remote_code=True)
    assert not info["missing_keys"]


def test_the_scheme_of_the_cache_comes_along(tiny_llama: Path, tmp_path: Path) -> None:
    """And what has a scale for each head does so while no head can go."""
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    source, again, cut = tmp_path / "in", tmp_path / "again", tmp_path / "cut"
    step("quantize", tiny_llama, source, name="rtn", bits=8, granularity="channel")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = scheme
    (source / "config.json").write_text(json.dumps(config))
    cache = with_riders(source, 2)
    step("quantize", source, again, ("*.mlp.*",), name="rtn", bits=4, granularity="channel")
    assert json.loads((again / "config.json").read_text())["quantization_config"]["kv_cache_scheme"] == scheme
    assert cache.keys() <= load_file(again / "model.safetensors").keys()
    planned, _ = step("prune", source, cut, name="heads", keep=0.5, unit="group")
    assert any("for each head are left out" in warning for warning in planned.warnings)
    assert not cache.keys() & load_file(cut / "model.safetensors").keys()


def test_what_a_method_rewrites_is_decoded(quantized: Any, tmp_path: Path, text_file: Path) -> None:
    """Scaling moves between layers and the norms before them, which codes could not follow."""
    source, _ = quantized("gptq")
    data = Calibration(text=str(text_file), samples=4, length=32)
    method = get("quantize", "awq").config(name="awq", bits=8, granularity="channel")
    planned = steps.make_plan(
        source, Destination(tmp_path / "out"), Recipe(version=1, method=method, calibration=data), "quantize"
    )
    assert any("gptq, 4-bit are decoded" in warning for warning in planned.warnings)
    steps.run(planned, OFF)
    ids = torch.arange(1, 17)[None]
    torch.testing.assert_close(load(tmp_path / "out")(ids).logits, load(source)(ids).logits, rtol=0.1, atol=0.2)


def test_biases_that_the_tool_added_are_left_out(tiny_llama: Path, tmp_path: Path) -> None:
    """AutoGPTQ writes one of zeros for every layer; one that is not zero is the model's, and stays."""

    def biased(matrix: Tensor) -> foreign.Encoded:
        encoded = foreign.gptq()(matrix)
        return foreign.Encoded({**encoded.tensors, ".bias": torch.zeros(len(matrix))}, encoded.dense)

    foreign.convert(tiny_llama, tmp_path / "in", biased, GPTQ)
    planned, _ = step("quantize", tmp_path / "in", tmp_path / "out", name="rtn", bits=8, granularity="channel")
    assert any("biases of zeros" in warning for warning in planned.warnings)
    assert Checkpoint.open(tmp_path / "out").parameters() == Checkpoint.open(tiny_llama).parameters()
    load(tmp_path / "in")


def test_stacked_experts_run_and_are_exported(tmp_path: Path) -> None:
    """GPT-OSS as it is published, its experts stacked in mxfp4."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    stock = GptOssForCausalLM(GptOssConfig(**shape, **heads, pad_token_id=0)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        tensors = {}
        for name in ("gate_up_proj", "down_proj"):
            parameter = stock.get_parameter(f"model.layers.0.mlp.experts.{name}")
            blocks = torch.randint(0, 256, (2, parameter.shape[2], 1, 16), dtype=torch.uint8, generator=generator)
            scales = torch.full((2, parameter.shape[2], 1), 122, dtype=torch.uint8)
            parameter.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        stock.save_pretrained(tmp_path / "in")
        ids = torch.arange(1, 9)[None]
        expected = stock(ids).logits
    held = load_file(tmp_path / "in" / "model.safetensors")
    experts = "model.layers.0.mlp.experts."
    held = {name: t for name, t in held.items() if name not in (f"{experts}gate_up_proj", f"{experts}down_proj")}
    save_file({**held, **{f"{experts}{name}": t for name, t in tensors.items()}}, tmp_path / "in" / "model.safetensors")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}})
    )
    torch.testing.assert_close(load(tmp_path / "in")(ids).logits, expected, rtol=1e-4, atol=1e-5)
    export.run(export.make_plan(tmp_path / "in", Destination(tmp_path / "dense"), ExportRecipe()), OFF)
    again = GptOssForCausalLM.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-5)
