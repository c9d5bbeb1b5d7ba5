"""The fixtures themselves: what other tests rely on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from tests.checkpoints import Cnn, Mlp


def names(folder: Path) -> set[str]:
    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= set(opened.keys())
    return found


def loss(folder: Path, text: Path) -> float:
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(), return_tensors="pt").input_ids[:, :1024].view(-1, 64)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def test_llama_is_tied_and_its_tokenizer_fits(tiny_llama: Path, tiny_llama_untied: Path) -> None:
    assert "lm_head.weight" not in names(tiny_llama)
    assert "lm_head.weight" in names(tiny_llama_untied)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    assert len(tokenizer) == json.loads((tiny_llama / "config.json").read_text())["vocab_size"]
    text = "Assignments to it are illegal.\nReally?"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_shards_and_dtype(tiny_llama_bf16: Path, tiny_llama: Path) -> None:
    assert len(list(tiny_llama_bf16.glob("model-0000?-of-0000?.safetensors"))) >= 3
    assert names(tiny_llama_bf16) == names(tiny_llama)
    assert AutoModelForCausalLM.from_pretrained(tiny_llama_bf16).dtype == torch.bfloat16


def test_training_lowers_the_loss_on_unseen_text(trained_llama: Path, tiny_llama: Path, heldout_file: Path) -> None:
    assert loss(trained_llama, heldout_file) < loss(tiny_llama, heldout_file) - 1.5


@pytest.mark.parametrize("fixture", ["tiny_gpt2", "tiny_bert", "tiny_t5", "tiny_vit"])
def test_transformers_loads_every_tensor(fixture: str, request: pytest.FixtureRequest) -> None:
    _, info = AutoModel.from_pretrained(request.getfixturevalue(fixture), output_loading_info=True)
    assert not info["missing_keys"] - {"pooler.dense.weight", "pooler.dense.bias"}


def test_bert_names_have_no_prefix_and_the_side_files_are_there(tiny_bert: Path) -> None:
    assert "embeddings.word_embeddings.weight" in names(tiny_bert)
    assert json.loads((tiny_bert / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    batch = tokenizer(["A name.", "A much longer sentence, padded."], padding=True, return_tensors="pt")
    assert batch.attention_mask[0].sum() < batch.attention_mask[1].sum()
    assert tokenizer.cls_token_id == batch.input_ids[0, 0]


def test_the_classifiers_know_the_digits(mlp_file: Path, cnn_file: Path, digits_npz: Path) -> None:
    arrays = np.load(digits_npz)
    images = torch.from_numpy(arrays["test_images"]).float().div(255).unsqueeze(1)
    labels = torch.from_numpy(arrays["test_labels"]).long()
    for model, file in ((Mlp(), mlp_file), (Cnn(), cnn_file)):
        model.load_state_dict(load_file(file))
        accuracy = (model.eval()(images).argmax(1) == labels).float().mean()
        assert 0.85 < accuracy < 1.0


def test_lstm_file_holds_packed_gates(lstm_file: Path) -> None:
    state = load_file(lstm_file)
    assert state["lstm.weight_ih_l0"].shape == (4 * 32, 16)
    assert state["lstm.weight_hh_l1"].shape == (4 * 32, 32)
