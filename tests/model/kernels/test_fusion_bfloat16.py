"""Joined layers compute what the separate ones did, for every architecture that is joined."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel

from aicompress.errors import Refused
from aicompress.layer import LayerInfo
from aicompress.model.kernels import select
from aicompress.model.kernels.fusion import LIKE_BERT, JoinedLayer, ResidualNorm
from aicompress.model.loading.load import load
from aicompress.weights import Weight
from tests.model.compressed import compress, integers

IDS = torch.arange(5, 45).reshape(2, 20)
MASK = torch.ones_like(IDS).index_fill(1, torch.arange(14, 20), 0)


def encoder(kind: str, folder: Path, **config: Any) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = CONFIG_MAPPING[kind](**shape, vocab_size=64, embedding_size=32, initializer_range=0.1, **config)
    AutoModel.from_config(settings).save_pretrained(folder)
    return folder


def eight_bits(info: LayerInfo, matrix: Tensor) -> Weight | None:
    return integers(matrix, 8) if info.kind == "linear" else None


def in_eight_bits(kind: str, folder: Path, **config: Any) -> Path:
    """An encoder of a kind, with layers in 8 bits."""
    return compress(encoder(kind, folder / "in", **config), folder / "out", eight_bits)


@torch.no_grad()
def states(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=IDS, attention_mask=MASK).last_hidden_state
    return found[MASK.bool()]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", sorted(LIKE_BERT))
def test_joined_encoders_stay_near_the_reference(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "has_fast_bfloat16", lambda: True)
    path = in_eight_bits(kind, tmp_path)
    fast, reference = load(path), load(path, kernels="reference")
    layer = fast.encoder.layer[0]
    assert isinstance(layer.intermediate.intermediate_act_fn, nn.Identity)
    assert layer.attention.self.query.output == torch.bfloat16
    assert isinstance(layer.output, ResidualNorm)
    assert states(fast).dtype == torch.float32
    assert relative(states(fast), states(reference)) < 1.5e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_joined_encoders_of_narrow_numbers(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "has_fast_bfloat16", lambda: True)
    folder = encoder("bert", tmp_path / "in")
    AutoModel.from_pretrained(folder).to(dtype).save_pretrained(folder)
    path = compress(folder, tmp_path / "out", eight_bits)
    fast, reference = load(path), load(path, kernels="reference")
    assert isinstance(fast.encoder.layer[0].output, ResidualNorm)
    assert states(fast).dtype == dtype
    assert relative(states(fast).float(), states(reference).float()) < 1.5e-2


@pytest.mark.parametrize("dense", ["output.dense", "query", "intermediate.dense"])
def test_a_layer_with_a_plain_neighbour_is_left_alone(
    dense: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "has_fast_bfloat16", lambda: True)
    path = compress(
        encoder("bert", tmp_path / "in"),
        tmp_path / "out",
        lambda info, w: None if dense in info.name or info.kind != "linear" else integers(w, 8),
    )
    fast, reference = load(path), load(path, kernels="reference")
    assert relative(states(fast), states(reference)) < 1.5e-2
    with torch.no_grad():  # few inputs go through products in float32, which have no activation in them
        found, expected = (model(IDS[:1, :4]).last_hidden_state for model in (fast, reference))
    assert relative(found, expected) < 1.5e-2


def test_every_hidden_state_keeps_its_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "has_fast_bfloat16", lambda: True)
    path = in_eight_bits("bert", tmp_path)
    with torch.no_grad():
        found, expected = (load(path, kernels=k)(IDS, MASK, output_hidden_states=True) for k in ("fast", "reference"))
    assert [state.dtype for state in found.hidden_states] == [torch.float32] * 3
    for state, wanted in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert relative(state[MASK.bool()], wanted[MASK.bool()]) < 1.5e-2


def test_a_decoder_with_cross_attention_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "has_fast_bfloat16", lambda: True)
    path = in_eight_bits("bert", tmp_path, is_decoder=True, add_cross_attention=True)
    seen = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = (load(path, kernels=k)(IDS, encoder_hidden_states=seen)[0] for k in ("fast", "reference"))
    assert relative(found, expected) < 1.5e-2


def test_other_activations_are_not_taken_for_gelu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "has_fast_bfloat16", lambda: True)
    path = in_eight_bits("bert", tmp_path, hidden_act="relu")
    model = load(path)
    assert not isinstance(model.encoder.layer[0].intermediate.intermediate_act_fn, nn.Identity)
    assert relative(states(model), states(load(path, kernels="reference"))) < 1.5e-2


def test_a_bfloat16_encoder_stays_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "has_fast_bfloat16", lambda: True)
    path = in_eight_bits("bert", tmp_path)
    model = load(path, dtype=torch.bfloat16)
    assert states(model).dtype == torch.bfloat16
    assert relative(states(model).float(), states(load(path, kernels="reference"))) < 5e-2


def joined(tmp_path: Path, kind: str = "bert", **config: Any) -> Any:
    """An encoder whose layers are joined, from integers."""
    return load(in_eight_bits(kind, tmp_path, **config))


def apart(model: Any) -> Any:
    """The same model with its layers' own forward passes."""
    for layer in model.encoder.layer:
        assert isinstance(layer.forward, JoinedLayer)
        del layer.forward
    return model


@pytest.mark.parametrize("kind", sorted(LIKE_BERT))
def test_a_joined_layer_gives_what_its_modules_give(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "has_fast_bfloat16", lambda: True)
    model = joined(tmp_path, kind)
    plain = apart(load(tmp_path / "out"))
    for mask in (MASK, torch.ones_like(MASK), None):
        with torch.no_grad():
            found = model(IDS, mask, output_hidden_states=True)
            expected = plain(IDS, mask, output_hidden_states=True)
        real = torch.ones_like(MASK).bool() if mask is None else mask.bool()
        for state, wanted in zip(found.hidden_states, expected.hidden_states, strict=True):
            assert state.dtype == torch.float32
            assert relative(state[real], wanted[real]) < 2e-3


def test_what_is_asked_for_inside_a_joined_layer_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks, attention weights, gradients refused, and modules put in later."""
    monkeypatch.setattr(select, "has_fast_bfloat16", lambda: True)
    model = joined(tmp_path)
    before = states(model)
    seen: list[Tensor] = []
    handle = model.encoder.layer[1].attention.self.key.register_forward_hook(lambda m, a, output: seen.append(output))
    assert relative(states(model), before) < 2e-3
    assert len(seen) == 1
    handle.remove()
    states(model)
    assert len(seen) == 1
    norm = model.encoder.layer[0].output.LayerNorm
    norm.weight.data.mul_(2)
    changed = states(model)
    assert relative(changed, before) > 1e-2
    norm.weight.data.div_(2)
    model.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()
    assert relative(states(model), before) > 1e-3
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(IDS, MASK, output_attentions=True).attentions
    assert len(weights) == 2
    torch.testing.assert_close(weights[0].float().sum(-1), torch.ones(2, 4, 20), rtol=1e-2, atol=1e-2)
    with pytest.raises(Refused):
        model(inputs_embeds=torch.ones(1, 4, 32, requires_grad=True))


def test_a_causal_layer_is_not_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "has_fast_bfloat16", lambda: True)
    model = joined(tmp_path, is_decoder=True)
    assert not any(isinstance(layer.forward, JoinedLayer) for layer in model.encoder.layer)
    with torch.no_grad():
        whole, part = (model(IDS[:, :columns])[0][:, :8] for columns in (20, 8))
    assert relative(part, whole) < 1e-2
