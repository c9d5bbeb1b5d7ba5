"""Layers in any forms beside each other compute by their kernels what they store, for any number of tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from aicompress.layer import LayerInfo
from aicompress.model.kernels import int4, linear, select
from aicompress.model.loading.load import load
from aicompress.weights import Weight
from tests.model.compressed import compress, halved, integers, low_rank

TOKENS = ((1, 1), (1, 3), (2, 6), (3, 17))  # batch, length
SHAPE = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
FORMS: dict[str, Callable[[Tensor], Weight | None]] = {
    "plain": lambda matrix: None,
    "8 bits": lambda matrix: integers(matrix, 8),
    "8 bits, rounded inputs": lambda matrix: integers(matrix, 8, activations=8),
    "4 bits": lambda matrix: integers(matrix, 4),
    "4 bits in groups": lambda matrix: integers(matrix, 4, 32, symmetric=False),
    "zeros": halved,
    "few directions": lambda matrix: low_rank(matrix, 10),
    "most directions": lambda matrix: low_rank(matrix, 15),
    "factors of 8 bits": lambda matrix: low_rank(matrix, 10, 8),
}


@pytest.fixture(scope="module", params=["encoder", "decoder"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = (
        BertModel(BertConfig(**SHAPE, vocab_size=64, initializer_range=0.15))
        if request.param == "encoder"
        else LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2, vocab_size=64, initializer_range=0.15))
    )
    model.save_pretrained(folder)
    return folder


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(sorted(FORMS)), min_size=2, max_size=7),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.booleans(),
)
def test_kernels_compute_what_is_stored(
    plain: Path, forms: list[str], dtype: torch.dtype, native: bool, resident: bool
) -> None:
    def picked(info: LayerInfo, matrix: Tensor) -> Weight | None:
        return FORMS[next(rest)](matrix) if info.kind == "linear" else None

    rest = iter(forms * 12)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        path = compress(plain, Path(folder) / "out", picked)
        for module in (select, linear, int4):
            patch.setattr(module, "has_fast_bfloat16", lambda: native)
        patch.setattr(select, "RESIDENT_BYTES", linear.RESIDENT_BYTES if resident else 0)
        fast, stored = load(path, dtype=dtype), load(path, dtype=torch.float32, kernels="reference")
        for batch, length in TOKENS:
            ids = torch.arange(5, 5 + batch * length).view(batch, length) % 64
            found, expected = (model(ids)[0].float() for model in (fast, stored))
            error = float((found - expected).norm() / expected.norm())
            assert error < 0.1, (length, set(fast.aicompress_kernels.values()))
