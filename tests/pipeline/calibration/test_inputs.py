"""What kinds of models calibration finds inputs for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

import aicompress
from aicompress import recipe as recipes
from aicompress.pipeline import steps
from aicompress.pipeline.layerwise import Options
from aicompress.pipeline.output import Destination
from tests.checkpoints import _save_byte_level_tokenizer
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
