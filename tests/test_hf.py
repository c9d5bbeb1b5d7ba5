"""The native layout in transformers: after the import, through trust_remote_code, and never silently wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
)

import aicompress.hf
from aicompress.errors import Refused
from aicompress.layer import LayerInfo
from aicompress.model.loading.load import load
from aicompress.weights import BaseDelta, Dense, Weight
from tests.model.compressed import compress, halved, integers, low_rank

# A process in which the aicompress package cannot be imported.
HIDDEN = "import sys; sys.modules['aicompress'] = None; import torch, transformers\n"
IDS = torch.arange(2, 26).reshape(2, 12)


def every_form(info: LayerInfo, matrix: Tensor) -> Weight | None:
    """A different form for each kind of layer, embeddings and head included."""
    if info.kind in ("embedding", "head"):
        return integers(matrix, 8)
    forms = (
        lambda: low_rank(matrix, 8),
        lambda: low_rank(matrix, 8, bits=8),
        lambda: halved(matrix),
        lambda: integers(matrix, 4, 16, symmetric=False),
        lambda: integers(matrix, 3),
    )
    return forms[sum(info.name.encode()) % len(forms)]()


@pytest.fixture(scope="module")
def native_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every form, and layers that share: a factor, a base, a plain matrix, and a compressed one with factors."""
    layer = "model.layers.{}.{}_proj.weight".format
    factors = {layer(n, f"self_attn.{part}") for n, part in ((1, "k"), (1, "v"), (2, "q"))}
    plain = layer(0, "mlp.gate")
    owners = {
        layer(1, "self_attn.v"): {"in": layer(1, "self_attn.k")},
        layer(2, "self_attn.q"): {"in": layer(1, "self_attn.k")},
        layer(2, "mlp.gate"): {"": plain},
        layer(1, "self_attn.q"): {"": layer(2, "self_attn.q")},
        layer(2, "mlp.up"): {"": layer(0, "mlp.up")},
        layer(1, "mlp.down"): {"base": layer(0, "mlp.down")},
    }

    def pick(info: LayerInfo, matrix: Tensor) -> Weight | None:
        if info.tensor == plain:
            return None
        if info.tensor.endswith("mlp.down_proj.weight"):
            product = low_rank(matrix, 8)
            return BaseDelta(product.parts()["out"], product.parts()["in"], Dense(matrix.clone()))
        return low_rank(matrix, 8) if info.tensor in factors else every_form(info, matrix)

    return compress(tiny_llama, tmp_path_factory.mktemp("native") / "llama", pick, owners)


@pytest.fixture(scope="module")
def native_bert(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(tiny_bert, tmp_path_factory.mktemp("native") / "bert", every_form)


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run(python: list[str]) -> Run:
    """Run code with arguments in a process of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}

    def process(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [*python, "-c", code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)

    return process


@torch.no_grad()
def dense_twin(native: Path, original: Path) -> torch.nn.Module:
    """The plain model with every compressed parameter replaced by what it decodes to."""
    from aicompress.checkpoint import Checkpoint

    model = AutoModelForCausalLM.from_pretrained(original)
    checkpoint = Checkpoint.open(native)
    state = {name: checkpoint.dense(name) for name in checkpoint.parameters()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    return model.eval()


@torch.no_grad()
def test_tied_llama_of_every_form_gives_the_decoded_model(native_llama: Path, tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(native_llama)
    expected = dense_twin(native_llama, tiny_llama)(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(load(native_llama, kernels="reference")(IDS).logits, model(IDS).logits)
    assert "lm_head.weight" not in model.state_dict()


def test_what_layers_share_is_one_parameter_in_every_reader(native_llama: Path) -> None:
    readers = (AutoModelForCausalLM.from_pretrained(native_llama), load(native_llama, kernels="reference"))
    for model in readers:
        (_, one, two), shown = (layer for layer in model.model.layers), []
        attention, other = one.self_attn, two.self_attn
        for held in (attention.k_proj, attention.v_proj, other.q_proj, attention.q_proj):
            stored = held.stored
            shown.append(stored["source_in"] if "source_in" in stored else stored["in"])
        assert len({id(tensor) for tensor in shown}) == 1
        gates = [model.model.layers[0].mlp.gate_proj.weight, model.model.layers[2].mlp.gate_proj.stored["source"]]
        assert gates[0] is gates[1]
        downs = [layer.mlp.down_proj.stored["base"] for layer in model.model.layers[:2]]
        assert downs[0] is downs[1]
    fast = load(native_llama).model.layers
    assert fast[1].self_attn.v_proj.right is fast[1].self_attn.k_proj.right
    assert fast[2].mlp.gate_proj.matrix.data_ptr() == fast[0].mlp.gate_proj.weight.data_ptr()


@torch.no_grad()
def test_gpt2_with_transposed_weights(tiny_gpt2: Path, tmp_path: Path) -> None:
    native = compress(tiny_gpt2, tmp_path / "gpt2", every_form)
    model = AutoModelForCausalLM.from_pretrained(native)
    torch.testing.assert_close(model(IDS).logits, dense_twin(native, tiny_gpt2)(IDS).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_other_classes_of_the_same_checkpoint(native_bert: Path, native_llama: Path) -> None:
    base = AutoModel.from_pretrained(native_bert)
    hidden = base(IDS).last_hidden_state
    classifier = AutoModelForSequenceClassification.from_pretrained(native_bert)
    masked = AutoModelForMaskedLM.from_pretrained(native_bert)
    torch.testing.assert_close(classifier.bert(IDS).last_hidden_state, hidden)
    torch.testing.assert_close(masked.bert(IDS).last_hidden_state, hidden)
    assert masked(IDS).logits.shape == (*IDS.shape, base.config.vocab_size)
    causal = AutoModelForCausalLM.from_pretrained(native_llama)
    decoder = AutoModel.from_pretrained(native_llama)
    torch.testing.assert_close(decoder(IDS).last_hidden_state, causal.model(IDS).last_hidden_state)


@torch.no_grad()
def test_t5_reads_the_weight_of_a_compressed_layer(tiny_t5: Path, tmp_path: Path) -> None:
    """T5 asks for the dtype of `wo.weight`: the stored codes must not be taken for it."""
    native = compress(
        tiny_t5, tmp_path / "t5", lambda info, w: integers(w, 4, 16, False) if "wo" in info.name else None
    )
    model = AutoModelForSeq2SeqLM.from_pretrained(native)
    logits = model(input_ids=IDS, decoder_input_ids=IDS).logits
    ours = load(native, kernels="reference")(input_ids=IDS, decoder_input_ids=IDS).logits
    torch.testing.assert_close(ours, logits)
    assert logits.dtype == torch.float32


@torch.no_grad()
def test_bfloat16_and_generate(native_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(native_llama, dtype=torch.bfloat16)
    assert model(IDS).logits.dtype == torch.bfloat16
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    mask = torch.ones_like(IDS)
    out = model.generate(IDS, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, pad_token_id=1, do_sample=False)
    assert out.shape == (2, 15)


@torch.no_grad()
def test_saved_again_it_keeps_its_compressed_form(native_llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(native_llama)
    model(IDS)  # decoded weights that are kept must not be saved
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    before, after = (folder / "model.safetensors" for folder in (native_llama, tmp_path / "again"))
    assert after.stat().st_size <= before.stat().st_size + 256
    assert torch.equal(load(tmp_path / "again", kernels="reference")(IDS).logits, model(IDS).logits)


def test_head_with_a_decoder_bias_stays_tied(tmp_path: Path) -> None:
    from transformers import BertConfig

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(**shape, vocab_size=96)).save_pretrained(tmp_path / "plain")
    native = compress(tmp_path / "plain", tmp_path / "native", lambda info, w: low_rank(w, 4))
    model = AutoModelForMaskedLM.from_pretrained(native)
    assert model.cls.predictions.decoder.bias.shape == (96,)
    assert torch.equal(model.cls.predictions.decoder.weight, model.bert.embeddings.word_embeddings.weight)
    model.tie_weights()
    torch.testing.assert_close(load(native, kernels="reference")(IDS).logits, model(IDS).logits)


def test_fresh_process_without_the_package(run: Run, native_llama: Path, tmp_path: Path) -> None:
    """trust_remote_code is enough, saving copies the code, and what was saved loads here."""
    code = HIDDEN + (
        "m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "ids = torch.arange(2, 26).reshape(2, 12)\n"
        "with torch.no_grad(): torch.save(m(ids).logits, sys.argv[2] + '/logits.pt')\n"
        "m.save_pretrained(sys.argv[2] + '/saved')\n"
        "b = transformers.AutoModel.from_pretrained(sys.argv[2] + '/saved', trust_remote_code=True)\n"
        "assert type(b).__name__ == 'AICLlamaModel', type(b)\n"
    )
    done = run(code, native_llama, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    logits = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(load(native_llama, kernels="reference")(IDS).logits, logits)
    assert {"modeling_aicompress.py", "decoding_aicompress.py"} <= {p.name for p in (tmp_path / "saved").iterdir()}
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == ["AICLlamaForCausalLM"]
    torch.testing.assert_close(load(tmp_path / "saved", kernels="reference")(IDS).logits, logits)


STOCK = HIDDEN + (
    "import traceback\n"
    "for folder in sys.argv[1:]:\n"
    "    try:\n"
    "        transformers.AutoModel.from_pretrained(folder)\n"
    "        print('it loads', file=sys.stderr)\n"
    "    except Exception:\n"
    "        traceback.print_exc()\n"
    "    print('=== next ===', file=sys.stderr)\n"
)


@pytest.fixture(scope="module")
def stock_loads(run: Run, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process without the import and without trust_remote_code prints of a checkpoint of each form."""
    makers = {
        "low_rank": lambda info, w: low_rank(w, 4),
        "integers": lambda info, w: integers(w, 8, symmetric=False) if "query" in info.name else low_rank(w, 4),
        "sparse": lambda info, w: halved(w),
        "tied": lambda info, w: None,
    }
    query = "encoder.layer.{}.attention.self.query.weight".format
    owners = {"tied": {query(1): {"": query(0)}}}
    folder = tmp_path_factory.mktemp("stock")
    done = run(STOCK, *(compress(tiny_bert, folder / form, make, owners.get(form)) for form, make in makers.items()))
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(makers, done.stderr.split("=== next ===\n"), strict=False))


@pytest.mark.parametrize("form", ["low_rank", "integers", "sparse", "tied"])
def test_stock_load_is_refused_never_random(stock_loads: dict[str, str], form: str) -> None:
    """Without the import and without trust_remote_code."""
    assert "it loads" not in stock_loads[form]
    assert "Traceback" in stock_loads[form]
    assert "mismatch" in stock_loads[form]


def test_a_factor_of_the_dense_shape_is_never_written(tiny_bert: Path, tmp_path: Path) -> None:
    """A stock reader would take it for the weight."""
    with pytest.raises(Refused, match="rank 48"):
        compress(tiny_bert, tmp_path / "square", lambda info, w: low_rank(w, 48) if w.shape == (48, 48) else None)


def test_a_checkpoint_without_its_scales_is_refused(native_bert: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(native_bert, folder)
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("weight_scale"))
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="incomplete"):
        AutoModel.from_pretrained(folder)


def test_registration_is_idempotent() -> None:
    import importlib

    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    registered = AUTO_QUANTIZER_MAPPING["aicompress"]
    importlib.reload(sys.modules["aicompress.model.hf.modeling_aicompress"])
    assert AUTO_QUANTIZER_MAPPING["aicompress"] is registered is aicompress.hf.AicompressQuantizer
