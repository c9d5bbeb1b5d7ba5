"""Blocks that compute in bfloat16 inside: how near they stay, what stays float32, and where nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional

from aicompress.checkpoint import Checkpoint
from aicompress.model.blocks.bf16_interior import Bf16Interior, given, interior, widened
from aicompress.model.blocks.walk import Walk, walk
from aicompress.model.kernels import bf16_products as products
from aicompress.model.kernels.bf16_products import RoundedLayers
from aicompress.model.loading.load import build
from aicompress.model.loading.partial_model import PartialModel
from tests.model.blocks.test_walk import Halving
from tests.pipeline.families import FAMILIES, SHAPE, TEXT

NARROW, WIDE = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _small_layers_count_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LEAST", 1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def passes(model: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
    """First outputs, exact and narrow."""
    model.eval()
    exact = model(**inputs)[0]
    with Bf16Interior():
        narrow = model(**inputs)
    return exact, widened(narrow[0])


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_stays_as_near_to_float32_as_in_bfloat16(name: str) -> None:
    """Decoders with and without groups of heads or windows, encoders, encoder-decoders, images, speech."""
    torch.manual_seed(0)
    model, inputs = FAMILIES[name].build(), FAMILIES[name].inputs()
    exact, narrow = passes(model, **inputs)
    floating = {
        key: value.bfloat16() if value.is_floating_point() else value
        for key, value in inputs.items()
        if isinstance(value, Tensor)
    }
    with torch.no_grad():
        whole = model.bfloat16()(**{**inputs, **floating})[0].float()
    assert 0 < relative(narrow, exact) < 1.5 * relative(whole, exact)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "bert", "t5"])
def test_padding_on_either_side_stays_masked(kind: str, attention: str) -> None:
    torch.manual_seed(0)
    fields = {"mistral": {"sliding_window": 4}, "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}}.get(kind)
    config = hf.CONFIG_MAPPING[kind](**{**SHAPE, **TEXT, "num_key_value_heads": 4, **(fields or {})})
    model = hf.AutoModel.from_config(config, attn_implementation=attention)
    ids = torch.arange(3, 51).reshape(3, 16)
    mask = torch.ones_like(ids)
    mask[0, :7], mask[1, 9:] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if kind == "t5":
        inputs["decoder_input_ids"] = ids
    exact, narrow = passes(model, **inputs)
    assert bool(torch.isfinite(narrow).all())
    assert relative(narrow[mask.bool()], exact[mask.bool()]) < 4e-2


def test_large_layers_and_attention_give_bfloat16_and_sums_with_the_stream_float32() -> None:
    x, w, b = draw(2, 16, 32), draw(32, 32, seed=1), draw(32, seed=2)
    with Bf16Interior():
        layer, transposed = functional.linear(x, w, b), torch.addmm(b, x[0], w)
        heads = layer.view(2, 16, 4, 8).transpose(1, 2)
        attended = functional.scaled_dot_product_attention(heads, heads.float(), heads, is_causal=True)
        stream, gated = x + layer, functional.silu(layer) * layer
    assert [t.dtype for t in (layer, transposed, attended, gated)] == [NARROW] * 4
    assert stream.dtype == WIDE
    assert torch.equal(stream, x + layer.float())
    assert relative(layer.float(), x @ w.t() + b) < 5e-3
    wide = functional.scaled_dot_product_attention(*[heads.float()] * 3, is_causal=True)
    assert relative(attended.float(), wide) < 1e-2


def test_routers_normalizations_and_softmax_give_float32() -> None:
    x = draw(4, 64).bfloat16()
    router, weight = draw(4, 64, seed=1), torch.ones(64)
    with Bf16Interior():
        logits = functional.linear(x, router)
        rest = [functional.layer_norm(x, (64,), weight), x.softmax(-1), x.pow(2).mean(-1), x @ x.t(), torch.tanh(x)]
    assert [t.dtype for t in (logits, *rest)] == [WIDE] * 6
    assert relative(logits, x.float() @ router.t()) < 5e-3
    assert torch.equal(rest[0], functional.layer_norm(x.float(), (64,), weight))


def test_small_layers_stay_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LEAST", 1 << 14)
    x, w = draw(8, 32), draw(16, 32, seed=1)
    with Bf16Interior():
        assert torch.equal(functional.linear(x, w), functional.linear(x, w))
    with Bf16Interior():
        found = functional.linear(x, w)
    assert torch.equal(found, functional.linear(x, w))


def test_a_few_factors_are_rounded_and_many_are_not() -> None:
    many, table = draw(4, 8, 16, 32).bfloat16(), draw(16, 32, seed=1)
    with Bf16Interior():
        assert (many * table).dtype == NARROW
        assert (table * many).dtype == NARROW
        assert (many * draw(4, 8, 16, 32)).dtype == WIDE
        assert (many * 2).dtype == NARROW


def test_what_is_written_in_place_arrives() -> None:
    narrow, wide = draw(4, 8).bfloat16(), draw(4, 8, seed=1)
    order = torch.tensor([3, 1, 0, 2])
    sums, parts, turned = wide.clone(), narrow.clone(), narrow.clone()
    with Bf16Interior():
        sums.index_add_(0, order, narrow)
        parts[1:3] = wide[1:3]
        turned.t().mul_(wide.t())
        taken = wide.clone()
        taken += narrow
    assert torch.equal(sums, wide.index_add(0, order, narrow.float()))
    assert torch.equal(parts[1:3], wide[1:3].bfloat16())
    assert torch.equal(turned, narrow * wide.bfloat16())
    assert torch.equal(taken, wide + narrow.float())


def test_an_input_is_rounded_once_and_again_when_it_has_changed() -> None:
    x, w = draw(8, 32), draw(32, 32, seed=1)
    with Bf16Interior():
        first = functional.linear(x, w)
        x.mul_(3)
        second = functional.linear(x, w)
    torch.testing.assert_close(second.float(), 3 * first.float(), rtol=2e-2, atol=2e-1)


def test_float32_precision_runs_nothing_differently() -> None:
    block, x = nn.Linear(32, 32), draw(4, 32)
    with torch.no_grad():
        with interior(block, False):
            found = given(block, False, (x,), {})
        assert torch.equal(found, block(x))
        with interior(block, True):
            found = given(block, True, (x,), {})
    assert found.dtype == WIDE
    assert not torch.equal(found, block(x))


def test_a_block_in_bfloat16_keeps_its_own_dtypes() -> None:
    block, x = nn.Linear(32, 32).bfloat16(), draw(4, 32).bfloat16()
    context = interior(block, True)
    assert isinstance(context, RoundedLayers)
    with torch.no_grad(), context:
        found = given(block, True, (x,), {})
    assert found.dtype == NARROW
    assert torch.equal(found, block(x))


def test_experts_are_still_seen(tmp_path: Path) -> None:
    """Experts are recognized by the storage of their weights, which rounding must not hide."""
    torch.manual_seed(0)
    config = hf.MixtralConfig(**SHAPE, **TEXT, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    hf.MixtralForCausalLM(config).save_pretrained(tmp_path)
    counts = []
    for rounded in (False, True):
        checkpoint = Checkpoint.open(tmp_path)
        model = build(checkpoint)
        loader = PartialModel(checkpoint, model)
        names = [info.tensor for info in checkpoint.layers() if "experts" in info.name]
        wanted = {name: place for name in names if (place := loader.place_of(name)) is not None}
        visitor = Halving(checkpoint, 1.0)
        batches = [{"input_ids": torch.arange(3, 51).reshape(3, 16)}]
        walk(Walk(model, loader, batches, wanted, frozenset({"gram"}), rounded=rounded), visitor)
        counts.append({name: stats.count for name, stats in visitor.stats.items()})
    assert len(counts[0]) > 8
    first = [name for name in counts[0] if ".layers.0." in name]
    assert sum(counts[0][name] for name in first) > 0
    assert sum(counts[1][name] for name in first) == sum(counts[0][name] for name in first)
