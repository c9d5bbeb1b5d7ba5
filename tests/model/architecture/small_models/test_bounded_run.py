"""A forward pass that would not end in time is an error of one line, long before it would."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor

from aicompress.model.architecture.small_models import bounded_run, tiny_model
from aicompress.model.architecture.small_models.bounded_run import BoundedRun, EndlessRun
from aicompress.pipeline.structured import reference_cut
from tests.pipeline.steps import plan


def without_end(value: Tensor) -> None:
    while True:
        value = value + 1


def growing(value: Tensor) -> None:
    while True:
        value = torch.cat((value, value))


def all_pairs(value: Tensor) -> None:
    value = torch.ones(1 << 11, 1) @ value[:1, :1].expand(1, 1 << 11)


def of_long_sound(value: Tensor) -> None:
    torch.conv1d(torch.ones(1, 1, 1 << 20), torch.ones(1 << 12, 1, 16))


def attending_to_all(value: Tensor) -> None:
    states = torch.ones(1, 1, 1 << 18, 4)
    torch.nn.functional.scaled_dot_product_attention(states, states, states)


@pytest.mark.parametrize("run", [without_end, growing, all_pairs, of_long_sound, attending_to_all])
def test_what_does_not_end_is_ended(run: Callable[[Tensor], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_run, "OVERHEAD", bounded_run.MOST_WORK / 1000)  # of calls
    monkeypatch.setattr(bounded_run, "LARGEST", 1 << 20)
    start = time.process_time()
    with torch.no_grad(), pytest.raises(EndlessRun, match="it takes far longer"), BoundedRun("it", ""):
        run(torch.ones(4, 4))
    assert time.process_time() - start < 5


def test_a_convolution_with_strides_counts_the_places_it_looks_at() -> None:
    with torch.no_grad(), BoundedRun("it", "") as bound:
        torch.conv2d(torch.ones(1, 3, 64, 64), torch.ones(8, 3, 16, 16), stride=16)
    products = 4 * 4 * 8 * 3 * 16 * 16
    assert products < bound.work < products + 10 * bounded_run.OVERHEAD


def test_a_vocoder_that_makes_hours_of_sound_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random VITS draws how many frames a token lasts: tens of thousands."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "ffn_dim": 16, "num_hidden_layers": 2, "flow_size": 16}
    sizes |= {"spectrogram_bins": 17, "upsample_initial_channel": 64, "wavenet_dilation_rate": 1, "vocab_size": 32}
    sizes |= {"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1]], "prior_encoder_num_flows": 1}
    sizes |= {"posterior_encoder_num_wavenet_layers": 1, "prior_encoder_num_wavenet_layers": 1}
    torch.manual_seed(0)
    hf.VitsModel(hf.VitsConfig(**sizes)).save_pretrained(tmp_path / "in")
    monkeypatch.setattr(bounded_run, "MOST_WORK", 2e7)  # a small model of another type takes less
    reference_cut._tried.cache_clear()
    told = plan(tmp_path / "in", tmp_path / "out", name="depth", keep_layers=1)
    assert any("a small model with random weights takes far longer" in warning for warning in told.warnings)
    llama = hf.LlamaForCausalLM(
        hf.LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2, vocab_size=32)
    )
    tiny_model.outputs_of(llama, {"input_ids": torch.arange(12).reshape(2, 6)})
