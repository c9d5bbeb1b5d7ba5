"""Checkpoints of every layout as running models: the outputs of the stock libraries, and nothing left to chance."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    LlamaModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    initialization,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CheckpointError, Refused
from aicompress.layer import LayerInfo
from aicompress.model.kernels import select
from aicompress.model.loading.load import load, trainable
from aicompress.weights import Weight
from tests import checkpoints
from tests.model.compressed import Pick, compress, halved, integers, low_rank

IDS = torch.arange(2, 42).reshape(2, 20)
TOKENS = {"input_ids": IDS}


def linears(bits: int, group: int = 0, **how: Any) -> Pick:
    return lambda info, w: integers(w, bits, group, **how) if info.kind == "linear" else None


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def test_a_compressed_model_is_not_saved_without_its_layers(tiny_llama: Path, tmp_path: Path) -> None:
    """transformers would write a folder without them, and fill them at random as it loads it."""
    out = compress(tiny_llama, tmp_path / "out", linears(8))
    fast, reference = load(out), load(out, kernels="reference")
    for whole in (fast, reference, trainable(out)):
        for model in (whole, whole.model, copy.deepcopy(whole) if whole is reference else whole):
            with pytest.raises(Refused, match="save_pretrained cannot write the compressed layers"):
                model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(Refused, match="no state that could be saved"):
        fast.state_dict()
    again = load(out, kernels="reference")
    again.load_state_dict(reference.state_dict())  # in the form that is stored
    assert torch.equal(again(**TOKENS).logits, reference(**TOKENS).logits)


def test_a_plain_model_is_saved_as_ever(tiny_llama: Path, tmp_path: Path) -> None:
    load(tiny_llama).save_pretrained(tmp_path / "saved")
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", ["integers", "factors"])
def test_a_compressed_weight_with_a_number_that_is_none_is_refused(
    tiny_llama: Path, tmp_path: Path, form: str, value: float
) -> None:
    pick = linears(8) if form == "integers" else lambda info, w: low_rank(w, 4) if info.kind == "linear" else None
    out = compress(tiny_llama, tmp_path / "out", pick)
    file = out / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors, module = load_file(file), "model.layers.0.mlp.up_proj"
    name = max(name for name in tensors if name.startswith(module) and tensors[name].is_floating_point())
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, metadata)
    with pytest.raises(CheckpointError, match=f"{module}.*NaN or infinite"):
        Checkpoint.open(out).weight(f"{module}.weight")
    for reading in (load, trainable):
        with pytest.raises(CheckpointError, match="NaN or infinite"):
            reading(out)


@pytest.mark.parametrize(
    ("fixture", "auto", "inputs"),
    [
        ("tiny_llama", AutoModelForCausalLM, TOKENS),
        ("tiny_llama_untied", AutoModelForCausalLM, TOKENS),
        ("tiny_llama_bf16", AutoModelForCausalLM, TOKENS),
        ("tiny_gpt2", AutoModelForCausalLM, TOKENS),
        ("tiny_bert", AutoModel, TOKENS),
        ("tiny_t5", AutoModelForSeq2SeqLM, {**TOKENS, "decoder_input_ids": IDS}),
        ("tiny_vit", AutoModelForImageClassification, {"pixel_values": torch.ones(1, 1, 28, 28)}),
    ],
)
@torch.no_grad()
def test_plain_checkpoints_are_what_transformers_loads(
    fixture: str, auto: Any, inputs: dict[str, Tensor], request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(fixture)
    ours, stock = load(path), auto.from_pretrained(path)
    assert torch.equal(ours(**inputs)[0], stock(**inputs)[0])
    assert set(ours.state_dict()) == set(stock.state_dict())
    assert {n: b.dtype for n, b in ours.named_buffers()} == {n: b.dtype for n, b in stock.named_buffers()}
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())


PICKS = {"8": linears(8), "4": linears(4, 16), "3": linears(3, 16), "2": linears(2, 16)}


@pytest.mark.parametrize(
    ("fixture", "auto", "pick"),
    [
        *(pytest.param("tiny_llama", AutoModelForCausalLM, pick, id=f"llama-{bits}") for bits, pick in PICKS.items()),
        *(pytest.param("tiny_bert", AutoModel, pick, id=f"bert-{bits}") for bits, pick in PICKS.items()),
        pytest.param("tiny_llama", AutoModelForCausalLM, linears(8, activations=8), id="llama-8-with-inputs"),
    ],
)
@torch.no_grad()
def test_integer_checkpoints_are_what_transformers_loads(
    fixture: str, auto: Any, pick: Pick, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """compressed-tensors decodes exactly as the reference does; the kernels stay near."""
    path = compress(request.getfixturevalue(fixture), tmp_path / "out", pick)
    assert json.loads((path / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    stock = auto.from_pretrained(path)(IDS)[0]
    reference = load(path, kernels="reference")
    torch.testing.assert_close(reference(IDS)[0], stock, rtol=1e-5, atol=1e-5)
    assert relative(load(path)(IDS)[0], stock) < 0.05


@torch.no_grad()
def test_transformers_decodes_an_encoder_and_rounds_no_inputs_of_it(tiny_bert: Path, tmp_path: Path) -> None:
    paths = [
        compress(tiny_bert, tmp_path / str(n), pick) for n, pick in enumerate((linears(8), linears(8, activations=8)))
    ]
    plain, rounding = (AutoModel.from_pretrained(path)(IDS)[0] for path in paths)
    torch.testing.assert_close(rounding, plain, rtol=1e-5, atol=1e-5)
    assert relative(load(paths[1], kernels="reference")(IDS)[0], plain) < 0.05


@pytest.mark.parametrize("resident", [True, False])
@torch.no_grad()
def test_kernels_of_a_tied_model(tiny_llama: Path, tmp_path: Path, resident: bool, monkeypatch: Any) -> None:
    """An embedding of codes is looked up by rows, and the head that is tied to it multiplies."""
    monkeypatch.setattr(select, "RESIDENT_BYTES", 1 << 40 if resident else 0)

    def pick(info: LayerInfo, matrix: Tensor) -> Weight | None:
        if info.kind == "embedding":
            return integers(matrix, 8)
        if "q_proj" in info.name:
            return low_rank(matrix, 12)
        return integers(matrix, 8, activations=8) if "down_proj" in info.name else integers(matrix, 4, 32)

    path = compress(tiny_llama, tmp_path / "out", pick)
    model = load(path)
    kernels = model.aicompress_kernels
    assert kernels["model.embed_tokens.weight"].startswith("row gather, ")
    assert kernels["model.layers.0.self_attn.q_proj.weight"].startswith("low rank: dense, dense")
    assert len(kernels) == 22
    reference = load(path, kernels="reference")
    assert relative(model(IDS).logits, reference(IDS).logits) < 0.05
    kernels = reference.aicompress_kernels
    assert kernels["model.layers.0.self_attn.q_proj.weight"] == "reference: 2 factors, one after the other"
    assert kernels["model.layers.0.self_attn.k_proj.weight"] == "reference: int grouped decoded"
    model.tie_weights()
    assert torch.isfinite(model(IDS).logits).all()
    out = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, min_new_tokens=2, pad_token_id=1)
    assert out.shape == (2, 22)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("kernels", ["fast", "reference"])
@torch.no_grad()
def test_a_loaded_model_is_copied_and_sent_to_other_processes(tiny_llama: Path, tmp_path: Path, kernels: Any) -> None:
    """Every layer's kernel on the way: codes that are tied and packed, factors, zeros, a matrix decoded once."""

    def pick(info: LayerInfo, matrix: Tensor) -> Weight | None:
        forms = {"q_proj": low_rank(matrix, 12), "up_proj": halved(matrix), "gate_proj": integers(matrix, 8)}
        forms["down_proj"] = integers(matrix, 8, activations=8)
        return integers(matrix, 8) if info.kind == "embedding" else forms.get(info.name.rsplit(".", 1)[-1])

    model = load(compress(tiny_llama, tmp_path / "out", pick), kernels=kernels)
    expected = model(IDS).logits
    for make in (copy.deepcopy, pickled):
        made = make(model)
        assert torch.equal(made(IDS).logits, expected)
        made.model.norm.weight.mul_(2)
        assert not torch.equal(made(IDS).logits, expected)
    assert torch.equal(model(IDS).logits, expected)


@torch.no_grad()
def test_untied_in_the_file_stays_untied(tiny_llama_untied: Path, tmp_path: Path) -> None:
    """config.json says tied, the file holds two matrices, one of them compressed."""
    shutil.copytree(tiny_llama_untied, tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    pick: Pick = lambda info, w: low_rank(w, 8) if info.kind == "embedding" else None  # noqa: E731
    tied = compress(tmp_path / "in", tmp_path / "tied", pick)
    apart = compress(tiny_llama_untied, tmp_path / "apart", pick)
    for kernels in ("fast", "reference"):
        torch.testing.assert_close(load(tied, kernels=kernels)(IDS).logits, load(apart, kernels=kernels)(IDS).logits)


@torch.no_grad()
def test_experts_that_the_architecture_merges(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 64}
    MixtralForCausalLM(MixtralConfig(**shape, **experts)).eval().save_pretrained(tmp_path / "plain")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(IDS).logits
    torch.testing.assert_close(load(tmp_path / "plain")(IDS).logits, stock)
    path = compress(
        tmp_path / "plain", tmp_path / "out", lambda info, w: integers(w, 8) if "expert" in info.name else None
    )
    model = load(path)
    assert any(kernel.startswith("dense: ") for kernel in model.aicompress_kernels.values())
    assert relative(model(IDS).logits, stock) < 0.05


@torch.no_grad()
def test_dtype_and_device(tiny_llama: Path, tmp_path: Path) -> None:
    path = compress(tiny_llama, tmp_path / "out", linears(8))
    for kernels in ("fast", "reference"):
        model = load(path, dtype=torch.bfloat16, kernels=kernels)
        assert model(IDS).logits.dtype == torch.bfloat16
        assert model.config.dtype == torch.bfloat16


def edited(source: Path, out: Path, change: Any) -> Path:
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("encoder.layer.1.output.dense.bias"), "lacks parameters: encoder.layer.1.output.dense.bias"),
        (lambda t: t.update({"pooler.dense.bias": torch.ones(3)}), r"pooler.dense.bias is \[3\], the model has \[48\]"),
    ],
    ids=["missing", "shape"],
)
def test_what_the_architecture_reads_must_be_there(tiny_bert: Path, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(edited(tiny_bert, tmp_path / "out", change))


@torch.no_grad()
def test_buffers_that_older_releases_saved_are_no_obstacle(tiny_bert: Path, tmp_path: Path) -> None:
    older = edited(
        tiny_bert, tmp_path / "out", lambda t: t.update({"embeddings.position_ids": torch.arange(128)[None]})
    )
    assert torch.equal(load(older)(IDS)[0], load(tiny_bert)(IDS)[0])


@pytest.mark.parametrize("kernels", ["fast", "reference"])
def test_code_that_initializes_weights_leaves_running_layers_alone(tmp_path: Path, kernels: Any) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_conv_pos_embeddings": 4}
    config = Wav2Vec2Config(**shape, **convolutions, num_conv_pos_embedding_groups=4, vocab_size=32)
    model = Wav2Vec2ForCTC(config).eval()
    model.save_pretrained(tmp_path / "model")
    out = compress(
        tmp_path / "model", tmp_path / "out", lambda info, w: low_rank(w, 5) if "projection" in info.name else None
    )
    sound = torch.randn(1, 400, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        original, found = model(sound).logits, load(out, kernels=kernels)(sound).logits
    assert (found - original).norm() < 0.5 * original.norm()


class SetFromAbove(LlamaModel):  # type: ignore[misc]
    """A block that initializes one of its layers itself, entry by entry, as upsampling convolutions are."""

    is_custom_code = classmethod(lambda cls: False)  # stands for one of transformers' own

    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if isinstance(module, LlamaMLP):
            value = torch.zeros_like(module.up_proj.weight)
            value[:, module.hidden_size - 1] = 1
            initialization.copy_(module.up_proj.weight, value)


def test_stock_code_that_initializes_a_layer_from_above_leaves_it_alone(tiny_llama: Path, tmp_path: Path) -> None:
    out = compress(tiny_llama, tmp_path / "out", lambda info, w: low_rank(w, 5))
    with torch.inference_mode():
        stock = SetFromAbove.from_pretrained(out)(**TOKENS)[0]
        torch.testing.assert_close(stock, load(out, kernels="reference").model(**TOKENS)[0])


def test_matrices_of_several_dtypes_run_in_the_widest(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "mixed")
    stored = load_file(tiny_llama / "model.safetensors")
    mixed = {
        name: t.bfloat16() if "mlp" in name else t.half() if "self_attn" in name else t for name, t in stored.items()
    }
    save_file(mixed, tmp_path / "mixed" / "model.safetensors", metadata={"format": "pt"})
    with torch.inference_mode():
        found = load(tmp_path / "mixed")(**TOKENS).logits
        assert relative(found, load(tiny_llama)(**TOKENS).logits) < 0.02


def test_a_tied_head_finds_the_bias_that_is_tied_too(tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AlbertForMaskedLM(AlbertConfig(**shape, vocab_size=64, embedding_size=8)).eval()
    model.predictions.bias.data.normal_()
    model.save_pretrained(tmp_path / "model")
    out = compress(tmp_path / "model", tmp_path / "out", lambda info, w: integers(w, 8))
    with torch.inference_mode():
        original = model(**TOKENS).logits
        for kernels in ("fast", "reference"):
            found = load(out, kernels=kernels)(**TOKENS).logits  # type: ignore[arg-type]
            assert (found - original).norm() < 0.1 * original.norm()


def test_unknown_architectures_are_refused_unless_their_code_is_trusted(tiny_bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(tiny_bert, folder)
    (folder / "modeling_own.py").write_text(
        "from transformers import BertConfig, BertModel\n\n\n"
        "class OwnConfig(BertConfig):\n    model_type = 'own_bert'\n\n\n"
        "class OwnModel(BertModel):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_bert", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not know OwnModel"):
        load(folder)
    with torch.no_grad():
        assert torch.equal(load(folder, trust_remote_code=True)(IDS)[0], load(tiny_bert)(IDS)[0])


def test_a_bare_file_is_its_dense_tensors(mlp_file: Path, tmp_path: Path) -> None:
    path = compress(
        mlp_file, tmp_path / "out.safetensors", lambda info, w: low_rank(w, 5) if info.name == "fc1" else None
    )
    plain, tensors = load_file(mlp_file), load(path, dtype=torch.float64)
    assert set(tensors) == set(plain)
    assert {t.dtype for t in tensors.values()} == {torch.float64}
    torch.testing.assert_close(tensors["fc2.weight"].float(), plain["fc2.weight"])
    assert torch.linalg.matrix_rank(tensors["fc1.weight"], atol=1e-4) == 5


@torch.no_grad()
def test_a_bare_file_fills_the_users_module(cnn_file: Path, lstm_file: Path, tmp_path: Path) -> None:
    images = torch.rand(3, 1, 28, 28)
    path = compress(
        cnn_file,
        tmp_path / "cnn.safetensors",
        lambda info, w: low_rank(w, 6) if info.name == "conv2" else integers(w, 8),
    )
    dense = checkpoints.Cnn().eval()
    dense.load_state_dict(load(path))
    model = load(path, model=checkpoints.Cnn())
    assert relative(model(images), dense(images)) < 0.02
    reference = load(path, model=checkpoints.Cnn(), kernels="reference")
    torch.testing.assert_close(reference(images), dense(images))
    assert reference.aicompress_kernels["conv2.weight"] == "reference: 2 convolutions, one after the other"
    ids = torch.arange(12).reshape(2, 6)
    path = compress(lstm_file, tmp_path / "lstm.safetensors", lambda info, w: integers(w, 8))
    dense_lstm = checkpoints.Lstm().eval()
    dense_lstm.load_state_dict(load(path))
    lstm = load(path, model=checkpoints.Lstm())
    assert lstm.aicompress_kernels["lstm.weight_ih_l0"].startswith("dense: ")
    assert relative(lstm(ids), dense_lstm(ids)) < 0.02
    with pytest.raises(CheckpointError, match="lacks parameters"):
        load(path, model=checkpoints.Mlp())


def test_training_moves_every_stored_form(tiny_llama: Path, tmp_path: Path) -> None:
    def pick(info: LayerInfo, matrix: Tensor) -> Weight | None:
        forms = {"q_proj": low_rank(matrix, 8), "up_proj": halved(matrix), "down_proj": integers(matrix, 4, 32)}
        return forms.get(info.name.rsplit(".", 1)[-1])

    model = trainable(compress(tiny_llama, tmp_path / "out", pick))
    assert model.training
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    codes = {name: b.clone() for name, b in model.named_buffers() if name.endswith(".weight")}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = dict(model.named_parameters())
    assert {name for name in after if torch.equal(after[name], before[name])} == set()
    assert codes
    assert all(torch.equal(buffer, codes[name]) for name, buffer in model.named_buffers() if name in codes)
    assert "model.layers.0.self_attn.q_proj.weight_in" in model.state_dict()


def test_training_a_bare_file_needs_a_module(mlp_file: Path) -> None:
    with pytest.raises(Refused, match="names no architecture"):
        trainable(mlp_file)
    assert all(p.requires_grad for p in trainable(mlp_file, model=checkpoints.Mlp()).parameters())


def test_loading_reads_each_parameter_once(tiny_llama: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from aicompress.checkpoint import Checkpoint

    path = compress(tiny_llama, tmp_path / "out", linears(4, 32))
    read, original = [], Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: (read.append(name), original(self, name))[1])
    load(path)
    weights = [name for name in read if not name.endswith("weight_shape")]
    assert sorted(weights) == sorted(set(weights))
