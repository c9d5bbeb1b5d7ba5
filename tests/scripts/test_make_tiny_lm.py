from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.make_tiny_lm import main, perplexity, train_tokenizer
from tests.checkpoints import sentences

SMALL = ["--steps", "40", "--hidden", "64", "--layers", "1", "--vocabulary", "512", "--length", "32", "--batch", "8"]


def arguments(out: Path, text: Path, heldout: Path) -> list[str]:
    return ["--out", str(out), "--text", str(text), "--heldout", str(heldout), *SMALL]


def test_a_model_is_trained_saved_and_the_same_for_the_same_seed(
    tmp_path: Path, text_file: Path, heldout_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        main(arguments(tmp_path / name, text_file, heldout_file))
    found = re.findall(r"held-out perplexity ([\d.]+)", capsys.readouterr().out)
    assert found[0] == found[1]
    assert 1 < float(found[0]) < 250  # untrained: about 512
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert model.config.num_attention_heads == 2 * model.config.num_key_value_heads
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(AutoTokenizer.from_pretrained(tmp_path / "one")) == model.config.vocab_size


def test_an_output_that_exists_and_a_text_that_does_not_are_refused(tmp_path: Path, text_file: Path) -> None:
    with pytest.raises(SystemExit, match="exists"):
        main(arguments(tmp_path, text_file, text_file))
    with pytest.raises(SystemExit, match=r"absent\.txt does not exist"):
        main(arguments(tmp_path / "out", tmp_path / "absent.txt", text_file))


def test_the_tokenizer_writes_any_text() -> None:
    tokenizer = train_tokenizer("\n".join(sentences(100)), 400)
    text = "Straße → 東京 🙂\n\ttabs"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_perplexity_of_equal_chances_is_the_vocabulary(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    torch.nn.init.zeros_(model.lm_head.weight)
    windows = torch.randint(0, 256, (20, 8), generator=torch.Generator().manual_seed(0))
    assert math.isclose(perplexity(model, windows), 256, rel_tol=1e-4)
