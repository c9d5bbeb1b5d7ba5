"""What kinds of models calibration finds inputs for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

import aicompress
from aicompress import recipe as recipes
from aicompress.checkpoint import Checkpoint
from aicompress.errors import CompressError
from aicompress.methods.quantize.rtn import RtnConfig, apply
from aicompress.pipeline import steps
from aicompress.pipeline.calibration.request import Request
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from tests import checkpoints
from tests.checkpoints import _save_byte_level_tokenizer
from tests.methods.layers import layer_of
from tests.pipeline.families import FAMILIES, speech


@pytest.mark.parametrize("method", ["gptq", "taylor"])
def test_an_encoder_decoder_is_calibrated_on_features(tmp_path: Path, method: str) -> None:
    model = FAMILIES["whisper"].saved(tmp_path / "whisper")
    np.savez(tmp_path / "speech.npz", x=torch.randn(40, 8, 32, generator=torch.Generator().manual_seed(0)).numpy())
    command = "quantize" if method == "gptq" else "prune"
    settings: dict[str, Any] = {"name": "gptq", "bits": 8, "group_size": 8} if method == "gptq" else {"sparsity": 0.1}
    data = {"arrays": "speech.npz", "inputs": "x"}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"version": 1, "method": {"name": method, **settings}, "calibration": data}))
    planned = steps.make_plan(
        tmp_path / "whisper", Destination(tmp_path / "out"), recipes.load(str(path), command), command
    )
    report = steps.run(planned, Options(latency="off"))
    assert not [row.name for row in report.layers if "data-free" in row.note]
    with torch.inference_mode():
        original, found = (each(**speech()).logits for each in (model, aicompress.load(tmp_path / "out")))
    assert (found - original).norm() < 0.5 * original.norm()


def test_a_translator_is_calibrated_on_windows_of_text(tmp_path: Path) -> None:
    sides = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    special = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1, "forced_eos_token_id": 1}
    config = hf.MarianConfig(
        vocab_size=256,
        d_model=16,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        init_std=0.3,
        bos_token_id=0,
        **sides,
        **special,
    )
    hf.MarianMTModel(config).save_pretrained(tmp_path / "marian")
    _save_byte_level_tokenizer(tmp_path / "marian")
    (tmp_path / "text.txt").write_text("a line of text to translate\n" * 60)
    path = tmp_path / "recipe.yaml"
    data = {"text": "text.txt", "length": 16}
    method = {"name": "gptq", "bits": 8, "granularity": "channel"}
    path.write_text(json.dumps({"version": 1, "method": method, "calibration": data}))
    loaded = recipes.load(str(path), "quantize")
    planned = steps.make_plan(tmp_path / "marian", Destination(tmp_path / "out"), loaded, "quantize")
    report = steps.run(planned, Options(latency="off"))
    assert not [row.name for row in report.layers if "data-free" in row.note]


def test_a_network_of_ones_own_is_calibrated_like_any_other(
    tmp_path: Path, mlp_file: Path, digits_npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that a factory makes, with permission: its first layer sees what that of a chain of layers sees."""
    (tmp_path / "own_nets.py").write_text("from tests.checkpoints import Mlp\n\n\ndef mlp():\n    return Mlp()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    chain = {"sequential": ["flatten", "fc1", "relu", "fc2", "relu", "fc3"]}

    def quantized(name: str, model: dict[str, Any], request: Request) -> Checkpoint:
        path, out = tmp_path / f"{name}.yaml", tmp_path / f"{name}.safetensors"
        data = {"arrays": str(digits_npz), "inputs": "train_images", "samples": 64}
        method = {"name": "gptq", "bits": 3, "granularity": "channel"}
        path.write_text(json.dumps({"version": 1, "method": method, "calibration": data, "model": model}))
        recipe = recipes.load(str(path), "quantize")
        planned = steps.make_plan(mlp_file, Destination(out), recipe, "quantize", request)
        report = steps.run(planned, Options(latency="off"))
        assert not [row.name for row in report.layers if "data-free" in row.note]
        return Checkpoint.open(out)

    made = {"factory": "own_nets:mlp"}
    with pytest.raises(CompressError, match="wants to run own_nets:mlp"):
        quantized("refused", made, Request())
    own, chained = quantized("made", made, Request(allow_code=True)), quantized("chained", chain, Request())
    assert torch.equal(own.dense("fc1.weight"), chained.dense("fc1.weight"))
    exact = Checkpoint.open(mlp_file).dense("fc1.weight")
    rounded = apply(layer_of(exact), RtnConfig(bits=3, granularity="channel")).dense()
    images = torch.from_numpy(np.load(digits_npz)["test_images"]).flatten(1).float()
    lost = [(images @ (weight - exact).t()).norm() for weight in (own.dense("fc1.weight"), rounded)]
    assert lost[0] < 0.8 * lost[1]


@pytest.mark.parametrize(
    ("command", "method", "source"),
    [
        ("quantize", {"name": "gptq", "bits": 8, "granularity": "channel"}, "text"),
        ("prune", {"name": "width", "keep": 0.5, "multiple": 1, "score": "activation"}, "drawn"),
    ],
)
def test_samples_longer_than_the_model_are_shortened_and_said_to_be(
    tiny_llama: Path, text_file: Path, tmp_path: Path, command: str, method: dict[str, Any], source: str
) -> None:
    data = {"text": str(text_file), "samples": 2} if source == "text" else {"drawn": 2}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"version": 1, "method": method, "calibration": {**data, "length": 300}}))
    planned = steps.make_plan(tiny_llama, Destination(tmp_path / "out"), recipes.load(str(path), command), command)
    told = "calibration samples are 256 tokens long, not 300: the model takes no more"
    assert told in planned.summary().warnings
    assert told in steps.run(planned, Options(latency="off")).warnings


def test_a_text_without_two_tokens_is_refused_by_the_plan(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "short.txt").write_text("o")
    method = {"name": "gptq", "bits": 8, "granularity": "channel"}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"version": 1, "method": method, "calibration": {"text": "short.txt", "samples": 9}}))
    with pytest.raises(CompressError, match="holds 1 tokens, too few"):
        steps.make_plan(
            tiny_llama,
            Destination(tmp_path / "out"),
            recipes.load(str(path), "quantize"),
            "quantize",
        )


def test_tokens_that_the_model_does_not_have_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoints.make_llama(tmp_path / "in", vocab_size=200)
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "in" / file.name)
    edits = ["drawn=8", "calibration.length=32"]
    recipe = recipes.load("quantize/gptq-w4", "quantize", edits)
    planned = steps.make_plan(tmp_path / "in", Destination(tmp_path / "out"), recipe, "quantize")
    with pytest.raises(CompressError, match=r"has 200 tokens, and its calibration inputs hold token 2\d\d") as refusal:
        steps.run(planned, Options(latency="off"))
    assert "tokenizer" in refusal.value.hint
    assert not (tmp_path / "out").exists()
