"""Quantized models of many architectures in stock transformers: every class that people load them by gives what
`aicompress.load` gives, or refuses; none is filled at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional
from transformers.quantizers import auto

import aicompress.hf  # noqa: F401  the reader of the native layout
from aicompress.model.loading.load import load
from aicompress.pipeline.layerwise import planner
from aicompress.pipeline.layerwise import run as layerwise
from aicompress.pipeline.layerwise.plan import Plan
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import load as load_recipe
from aicompress.weights.decoding import rounded_input

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
DECODER = {**SHAPE, **TEXT, "num_key_value_heads": 2, "head_dim": 8}
VISION = {**SHAPE, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLP = {"select.kinds": ["linear"], "select.include": ["*mlp*"]}


def llava() -> Any:
    vision = {**VISION, "model_type": "clip_vision_model"}
    text = {**DECODER, "model_type": "llama"}
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=5))


def gemma3() -> Any:
    config = hf.Gemma3Config(text_config={**DECODER, "sliding_window": 8}, vision_config=VISION, mm_tokens_per_image=4)
    return hf.Gemma3ForConditionalGeneration(config)


def llama4() -> Any:
    mixture = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48}
    return hf.Llama4ForCausalLM(hf.Llama4TextConfig(**DECODER, **mixture))


def t5() -> Any:
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return hf.T5ForConditionalGeneration(hf.T5Config(**shape, vocab_size=64, decoder_start_token_id=0))


def mixtral() -> Any:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**DECODER, num_local_experts=4))


def gpt2() -> Any:
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64))


def bert(kind: str) -> Any:
    return getattr(hf, kind)(hf.BertConfig(**SHAPE, vocab_size=64))


def decoder(name: str, **more: Any) -> Any:
    return getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**DECODER, **more))


Case = tuple[Callable[[], Any], str, dict[str, Any], str]
# What is built, the recipe with its changes, and how the output is stored.
CASES: dict[str, Case] = {
    "llama": (lambda: decoder("Llama"), "rtn-w8", {}, "compressed-tensors"),
    "llama-w8a8": (lambda: decoder("Llama"), "w8a8", {}, "compressed-tensors"),
    "llama-embeddings": (lambda: decoder("Llama"), "rtn-w8-embeddings", {}, "compressed-tensors"),
    "qwen2": (lambda: decoder("Qwen2"), "rtn-w8", {}, "compressed-tensors"),
    "gemma2-embeddings": (lambda: decoder("Gemma2"), "rtn-w8-embeddings", {}, "compressed-tensors"),
    "gpt2": (gpt2, "rtn-w8", {}, "native"),
    "bert": (lambda: bert("BertModel"), "rtn-w8", {}, "compressed-tensors"),
    "bert-head": (lambda: bert("BertForMaskedLM"), "rtn-w8", {}, "compressed-tensors"),
    "t5": (t5, "rtn-w8", {}, "compressed-tensors"),
    "llava": (llava, "rtn-w8", {"select.kinds": ["linear"]}, "compressed-tensors"),
    "llava-convolution": (llava, "rtn-w8", {}, "native"),
    "gemma3-tied": (gemma3, "rtn-w8-embeddings", {}, "native"),
    "llama4": (llama4, "rtn-w8", {}, "native"),
    "mixtral": (mixtral, "rtn-w8", {}, "compressed-tensors"),
    "mixtral-attention": (mixtral, "rtn-w8", {"select.include": ["*self_attn*"]}, "native"),
    "mixtral-w8a8": (mixtral, "w8a8", {}, "compressed-tensors"),
    "qwen3-moe": (lambda: decoder("Qwen3Moe", **MIXTURE), "rtn-w8", {}, "compressed-tensors"),
    "nomic-bert": (lambda: hf.NomicBertModel(hf.NomicBertConfig(**SHAPE, vocab_size=64)), "rtn-w8", {}, "native"),
}
# Where transformers' reader of compressed-tensors would fill experts at random, or lose what is not quantized.
PASSED_OVER = ("mixtral-attention", "nomic-bert")


def quantized(source: Path, out: Path, recipe: str, changes: dict[str, Any]) -> Plan:
    sets = [f"{key}={value}" for key, value in {"report.html": "false", **changes}.items()]
    plan = planner.make_plan(source, Destination(out), load_recipe(f"quantize/{recipe}", "quantize", sets), "quantize")
    layerwise.run(plan, Options(latency="off"))
    return plan


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer, as dense as the model computes with it."""
    for path, module in model.named_modules():
        for leaf in {*module._parameters, *module._buffers, "weight"}:
            value = None if leaf.startswith("weight_") else getattr(module, leaf, None)
            if isinstance(value, Tensor):
                yield (f"{path}.{leaf}" if path else leaf), value


@contextmanager
def stock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers without `import aicompress.hf`."""
    with monkeypatch.context() as context:
        context.delitem(auto.AUTO_QUANTIZER_MAPPING, "aicompress")
        context.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "aicompress")
        yield


def require_same(kind: Any, path: Path, ours: Any) -> None:
    """A class of transformers loads the numbers of our model, whose head it may lack; only a pooler may be its own."""
    theirs, info = kind.from_pretrained(path, output_loading_info=True)
    if hasattr(getattr(theirs, "hf_quantizer", None), "compressor"):
        theirs.hf_quantizer.compressor.decompress_model(theirs)
    own = dict(tensors(ours))
    for name, value in tensors(theirs):
        found = [expected for each, expected in own.items() if f".{each}".endswith(f".{name}")]
        if not found:
            assert name.startswith("pooler.")
            assert name in info["missing_keys"]
            continue
        torch.testing.assert_close(value.float(), found[0].float(), rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_every_class_gives_what_load_gives_or_refuses(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, recipe, changes, layout = CASES[name]
    torch.manual_seed(0)
    model = build()
    model.save_pretrained(tmp_path / "in")
    plan = quantized(tmp_path / "in", tmp_path / "out", recipe, changes)
    assert plan.output.layout == layout
    assert any("not in compressed-tensors" in line for line in plan.summary().warnings) == (name in PASSED_OVER)
    ours = load(tmp_path / "out", kernels="reference")
    loading = []
    for kind in {type(model), hf.MODEL_MAPPING[type(model.config)]}:
        if layout == "native":
            with stock(monkeypatch), pytest.raises(RuntimeError, match=r"mismatch|CONVERSION"):
                kind.from_pretrained(tmp_path / "out")
        if kind.__name__ in plan.output.readers:
            loading.append(kind.__name__)
            require_same(kind, tmp_path / "out", ours)
        else:
            with pytest.raises((ValueError, RuntimeError)):
                kind.from_pretrained(tmp_path / "out")
    assert sorted(loading) == sorted(plan.output.readers)


def bart() -> Any:
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 1, "decoder_layers": 1}
    widths = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    config = hf.BartConfig(**heads, **widths, **TEXT, decoder_start_token_id=1, init_std=0.3, forced_eos_token_id=None)
    return hf.BartForConditionalGeneration(config)


def clip() -> Any:
    return hf.CLIPModel(hf.CLIPConfig(text_config={**SHAPE, **TEXT}, vision_config=VISION, projection_dim=32))


IDS = torch.arange(5, 25).view(2, 10)
# A model, and what people ask of it before they call it.
PARTS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "bart": (bart, lambda model: model.generate(IDS, max_new_tokens=6)),
    "clip": (clip, lambda model: model.get_text_features(IDS).pooler_output),
}


@pytest.mark.parametrize(
    ("recipe", "changes", "layout"),
    [
        ("rtn-w8", {}, "compressed-tensors"),
        ("w8a8", {}, "compressed-tensors"),
        ("rtn-w8", {"rules": [{"match": "*k_proj", "bits": 4}]}, "native"),
    ],
)
@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_model_run_before_the_model_itself(
    name: str, recipe: str, changes: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    """What decodes compressed-tensors at the first call of the model is passed by then."""
    build, ask = PARTS[name]
    torch.manual_seed(0)
    model = build()
    model.save_pretrained(tmp_path / "in")
    given = {"select.kinds": ["linear"], **changes}
    plan = quantized(tmp_path / "in", tmp_path / "out", recipe, given)
    assert plan.output.layout == layout
    told = "transformers decodes it at load; aicompress.load alone rounds inputs too"
    assert (told in plan.summary().warnings) == (recipe == "w8a8")
    theirs = type(model).from_pretrained(tmp_path / "out")
    with torch.no_grad():
        found = ask(theirs)
        if recipe != "w8a8":
            torch.testing.assert_close(found, ask(load(tmp_path / "out", kernels="reference")), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("kinds", "layout"), [(["linear"], "compressed-tensors"), (["linear", "embedding"], "native")])
def test_inputs_are_rounded_by_every_reader_alike(
    tiny_llama: Path, text_file: Path, tmp_path: Path, kinds: list[str], layout: str
) -> None:
    calibration = {"calibration.text": text_file, "calibration.samples": 4, "calibration.length": 16}
    method = {"method.group_size": 32, "method.activation_bits": 8, "effort": "fast"}
    plan = quantized(tiny_llama, tmp_path / "out", "gptq-w4", {**calibration, **method, "select.kinds": kinds})
    assert plan.output.layout == layout
    ours, fast = load(tmp_path / "out", kernels="reference"), load(tmp_path / "out")
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids, x = torch.arange(5, 29).view(2, 12), torch.randn(3, 64)
    with torch.no_grad():
        expected = ours(ids).logits
        torch.testing.assert_close(theirs(ids).logits, expected)
        # In the fast kernels' order of sums, a number may round to the next code.
        assert (fast(ids).logits - expected).norm() < 5e-2 * expected.norm()
        layers = [model.model.layers[0].mlp.up_proj for model in (ours, fast)]
        rounded = functional.linear(rounded_input(x, 8), layers[0].weight)
        torch.testing.assert_close(layers[0](x), rounded, rtol=1e-4, atol=1e-5)
        # A processor that multiplies bfloat16 rounds decoded weights to it.
        assert (layers[1](x) - rounded).norm() < 1e-2 * rounded.norm()
