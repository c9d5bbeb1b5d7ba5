"""Encoders with a decoder: perplexity of targets as transformers computes their loss, and against a baseline."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from aicompress.data import Data
from aicompress.errors import CheckpointError, RecipeError
from aicompress.pipeline.evaluation.run import evaluate
from aicompress.pipeline.evaluation.sequences import sequences
from aicompress.pipeline.step.models.running_model import Setting, example, forward_call
from aicompress.recipe.evaluation import EvalRecipe, recipe_class
from tests import checkpoints
from tests.model.compressed import compress, integers


def asking(**perplexity: object) -> EvalRecipe:
    recipe = {"version": 1, "quality": {"perplexity": perplexity}, "kernels": "reference"}
    return recipe_class().model_validate(recipe)


@pytest.fixture(scope="module")
def compressed(tiny_t5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "w3"
    return compress(tiny_t5, out, lambda info, w: integers(w, 3, 32) if info.kind == "linear" else None)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six rows of unlike length."""
    texts = checkpoints.sentences(12)
    rows = [
        {"de": one, "en": other[: 5 + 9 * n]} for n, (one, other) in enumerate(zip(texts[:6], texts[6:], strict=True))
    ]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@torch.no_grad()
def losses(folder: Path, batches: list[dict[str, torch.Tensor]]) -> tuple[float, int]:
    """The sum of the losses of all targets, and how many there are, by transformers alone."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    counts = [int((batch["labels"] != -100).sum()) for batch in batches]
    return sum(float(model(**batch).loss) * n for batch, n in zip(batches, counts, strict=True)), sum(counts)


def test_targets_of_rows_are_judged_as_transformers_trains_on_them(
    tiny_t5: Path, pairs: Path, compressed: Path
) -> None:
    recipe = asking(jsonl=str(pairs), field="de", labels="en", length=48)
    report = evaluate(str(compressed), [str(tiny_t5)], recipe)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_t5)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    cut = {"truncation": True, "max_length": 48, "return_tensors": "pt"}
    batches = [{**tokenizer(r["de"], **cut), "labels": tokenizer(r["en"], **cut)["input_ids"]} for r in rows]
    total, count = losses(tiny_t5, batches)
    figure = report.quality["perplexity"]
    assert figure["n"] == count == report.quality["kl"]["n"]
    assert figure["baseline"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert figure["low"] < figure["value"] < figure["high"]
    assert report.quality["kl"]["value"] > 0
    same = evaluate(str(tiny_t5), [str(tiny_t5)], recipe).quality
    assert same["kl"]["value"] == 0
    assert same["perplexity"]["change"]["value"] == same["perplexity"]["change"]["high"] == 1


def test_of_plain_text_the_second_half_of_a_window_follows_from_the_first(tiny_t5: Path, heldout_file: Path) -> None:
    report = evaluate(str(tiny_t5), [], asking(text=str(heldout_file), samples=5, length=33))
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_t5)
    ids = tokenizer(heldout_file.read_text(), add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    windows = ids[: 5 * 33].view(5, 33)
    total, count = losses(tiny_t5, [{"input_ids": windows[:, :17], "labels": windows[:, 17:].clone()}])
    assert report.quality["perplexity"]["n"] == count == 5 * 16
    assert report.quality["perplexity"]["value"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_sound_and_the_tokens_written_of_it_come_as_arrays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8, "max_source_positions": 10}
    special = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = WhisperConfig(**sizes, **heads, **special, vocab_size=40, suppress_tokens=None, begin_suppress_tokens=None)
    model = WhisperForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "whisper")
    sound, tokens = torch.randn(4, 8, 20), torch.randint(4, 40, (4, 7))
    tokens[1, 4:] = -100
    np.savez(tmp_path / "a.npz", sound=sound.numpy(), tokens=tokens.numpy())
    recipe = asking(arrays=str(tmp_path / "a.npz"), inputs="sound", labels="tokens")
    figure = evaluate(str(tmp_path / "whisper"), [], recipe).quality["perplexity"]
    with torch.no_grad():
        loss = float(model.eval()(input_features=sound, labels=tokens).loss)
    assert (figure["value"], figure["n"]) == (pytest.approx(math.exp(loss), rel=1e-5), 25)
    timed = example(model, 2, 8, recipe.quality.arrays)
    assert timed is not None
    assert timed[1] == "2 samples"
    assert forward_call(model, timed[0])().logits.shape == (2, 1, 40)  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match=r"predicts `labels`, int64 tokens"):
        evaluate(str(tmp_path / "whisper"), [], asking(arrays=str(tmp_path / "a.npz"), inputs="sound"))


def test_what_does_not_belong_together_is_refused(
    tiny_t5: Path, trained_llama: Path, pairs: Path, tmp_path: Path
) -> None:
    rows = asking(jsonl=str(pairs), field="de", labels="en")
    with pytest.raises(RecipeError, match="has no encoder"):
        evaluate(str(trained_llama), [], rows)
    with pytest.raises(RecipeError, match="'fr'"):
        evaluate(str(tiny_t5), [], asking(jsonl=str(pairs), field="de", labels="fr"))
    text = tmp_path / "text.txt"
    text.write_text("words " * 200)
    with pytest.raises(CheckpointError, match="other tokens"):
        evaluate(str(tiny_t5), [str(trained_llama)], asking(text=str(text), length=32))


def test_no_sentence_embedding_is_asked_of_a_decoder(tiny_t5: Path, heldout_file: Path) -> None:
    embedding = {"text": str(heldout_file), "samples": 5, "length": 16}
    recipe = recipe_class().model_validate({"version": 1, "quality": {"embedding": embedding}})
    with pytest.raises(CheckpointError, match="gives a sentence no embedding") as refusal:
        evaluate(str(tiny_t5), [str(tiny_t5)], recipe)
    assert "`-r eval/language-model`" in refusal.value.hint


def test_a_masked_language_model_predicts_what_it_does_not_see(
    tiny_bert: Path, heldout_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bert, tmp_path / "bert")
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig.from_pretrained(tiny_bert, initializer_range=0.5)).eval()
    model.save_pretrained(tmp_path / "bert")
    running = Setting().start(str(tmp_path / "bert"))
    data = Data(text=str(heldout_file), samples=5, length=34)
    read, _ = sequences([running], data)
    ids, asked = read.inputs["input_ids"], read.targets != -100
    mask = running.tokenizer.mask_token_id  # type: ignore[union-attr]
    assert ids.shape == read.targets.shape == (5, 34)
    assert torch.equal(ids == mask, asked)
    assert asked.sum(1).tolist() == [5] * 5  # 15 % of 32, between [CLS] and [SEP]
    report = evaluate(str(tmp_path / "bert"), [], asking(text=str(heldout_file), samples=5, length=34))
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=read.targets).loss)
    assert report.quality["perplexity"]["n"] == 25
    assert report.quality["perplexity"]["value"] == pytest.approx(math.exp(loss), rel=1e-5)


SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("config", "model", "causal"),
    [
        (BertConfig(**SHAPE, initializer_range=0.3), hf.BertLMHeadModel, False),
        (BertConfig(**SHAPE, initializer_range=0.3, is_decoder=True), hf.BertLMHeadModel, True),
        (
            hf.XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=64, initializer_range=0.3),
            hf.XLNetLMHeadModel,
            False,
        ),
        (hf.MixtralConfig(**SHAPE, num_key_value_heads=2, initializer_range=0.3), hf.MixtralForCausalLM, True),
    ],
)
def test_a_model_that_sees_what_it_predicts_has_no_perplexity(
    config: Any, model: Any, causal: bool, tiny_bert: Path, heldout_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bert, tmp_path / "model")
    config.vocab_size = BertConfig.from_pretrained(tiny_bert).vocab_size
    torch.manual_seed(0)
    model(config).bfloat16().save_pretrained(tmp_path / "model")
    recipe = asking(text=str(heldout_file), samples=3, length=16)
    if causal:
        assert evaluate(str(tmp_path / "model"), [], recipe).quality["perplexity"]["n"] == 45
        return
    with pytest.raises(CheckpointError, match=f"a {model.__name__} sees the tokens that it is to predict"):
        evaluate(str(tmp_path / "model"), [], recipe)
