"""Compiled products of 4-bit weights with 8-bit inputs against the decoded reference, which rounds inputs alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import BertConfig, BertModel

from aicompress.model.kernels import select
from aicompress.model.kernels.fusion import fuse
from aicompress.model.kernels.linear import RoundedLinear
from aicompress.model.kernels.select import fast_linear
from aicompress.model.kernels.w4a8 import Norm, W4A8Linear, compiled, normalize, rounded_rows
from aicompress.model.kernels.w4a8_layer import W4A8Layer
from aicompress.weights import IntGrouped
from aicompress.weights.decoding import rounded_input
from tests.model.compressed import integers

HERE = compiled() is not None  # elsewhere the same numbers come from the decoded weight
ROWS = (1, 2, 4, 5, 70)  # of one tile, of several, of a last one that is not full
WEIGHTS = {
    "groups": integers(torch.randn(48, 96, generator=torch.Generator().manual_seed(1)), 4, 32, activations=8),
    "wider groups": integers(torch.randn(16, 128, generator=torch.Generator().manual_seed(2)), 3, 64, activations=8),
    "rows": integers(torch.randn(8, 64, generator=torch.Generator().manual_seed(3)), 2, activations=8),
}
OTHERS = {
    "8 bits": integers(torch.randn(48, 64), 8, 32, activations=8),
    "narrow groups": integers(torch.randn(48, 64), 4, 16, activations=8),
    "odd outputs": integers(torch.randn(20, 64), 4, 32, activations=8),
    "zero points": integers(torch.randn(48, 64), 4, 32, symmetric=False, activations=8),
    "inputs of 6 bits": integers(torch.randn(48, 64), 4, 32, activations=6),
}


def on_cpu(weight: IntGrouped, bias: Tensor | None = None) -> Any:
    return fast_linear(weight, bias, torch.float32, resident=False)


def expected(weight: IntGrouped, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return nn.functional.linear(rounded_input(x, weight.activation_bits), weight.dense(), bias)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", WEIGHTS)
def test_products_are_those_of_the_reference(name: str, biased: bool) -> None:
    weight = WEIGHTS[name]
    bias = torch.randn(weight.shape[0]) if biased else None
    layer = on_cpu(weight, bias)
    assert isinstance(layer, W4A8Linear if HERE else RoundedLinear)
    for rows in ROWS:
        x = torch.randn(rows, weight.shape[1]) * torch.logspace(-3, 3, rows)[:, None]
        torch.testing.assert_close(layer(x), expected(weight, x, bias), rtol=1e-4, atol=1e-5 * float(x.abs().max()))


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_product_does_not_take_is_decoded_and_rounds_its_inputs(name: str) -> None:
    layer, x = on_cpu(OTHERS[name]), torch.randn(5, 64)
    assert layer.kernel == f"dense, inputs of {OTHERS[name].activation_bits} bits"
    torch.testing.assert_close(layer(x), expected(OTHERS[name], x))


def test_without_compiled_products_the_numbers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "compiled", lambda: None)
    layer, x = on_cpu(WEIGHTS["groups"]), torch.randn(5, 96)
    assert layer.kernel == "dense, inputs of 8 bits"
    torch.testing.assert_close(layer(x), expected(WEIGHTS["groups"], x))


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("code", [-8, 7])
def test_sums_of_the_largest_codes_fit(code: int, sign: int) -> None:
    weight = IntGrouped(torch.full((8, 64), code, dtype=torch.int8), torch.ones(8, 2), None, 4, 32, 8)
    x = torch.full((4, 64), float(sign))
    torch.testing.assert_close(on_cpu(weight)(x), expected(weight, x))


def test_rows_of_zeros_of_nan_and_no_rows() -> None:
    bias = torch.randn(48)
    layer, x = on_cpu(WEIGHTS["groups"], bias), torch.randn(6, 96)
    x[2], x[4, 7] = 0, float("nan")
    product = layer(x)
    torch.testing.assert_close(product[2], bias)
    assert product.isnan().any(1).tolist() == [False, False, False, False, True, False]
    assert layer(torch.empty(0, 96)).shape == (0, 48)


def test_bfloat16_inputs_and_leading_dimensions() -> None:
    x = torch.randn(2, 3, 96).bfloat16()
    product = on_cpu(WEIGHTS["groups"])(x)
    assert product.dtype == torch.bfloat16
    assert product.shape == (2, 3, 48)
    torch.testing.assert_close(product.float(), expected(WEIGHTS["groups"], x.float()), rtol=1e-2, atol=1e-1)


def test_threads_share_a_product_and_change_nothing() -> None:
    weight, x = integers(torch.randn(256, 128), 4, 32, activations=8), torch.randn(301, 128)
    layer, before = on_cpu(weight), torch.get_num_threads()
    try:
        products = [layer(x) for threads in (1, 2, 5) if torch.set_num_threads(threads) is None]
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(products[0], expected(weight, x), rtol=1e-4, atol=1e-4)
    assert torch.equal(products[0], products[1])
    assert torch.equal(products[0], products[2])


if HERE:

    def test_gelu_and_norm_between_products_are_those_of_torch() -> None:
        x, residual, norm = torch.randn(9, 96) * 3, torch.randn(9, 96), nn.LayerNorm(96)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        with torch.no_grad():
            activated, normed, alone = x.clone(), x.clone(), x.clone()
            rounded_rows(activated, gelu=True)
            torch.testing.assert_close(activated, gelu(x), rtol=1e-5, atol=2e-6)
            parts = Norm(residual, norm.weight.detach(), norm.bias.detach(), torch.tensor([norm.eps]))
            rounded_rows(normed, norm=parts)
            normalize(alone, parts)
            torch.testing.assert_close(normed, norm(x + residual), rtol=1e-5, atol=1e-5)
            assert torch.equal(normed, alone)


def encoder(**more: Any) -> Any:
    """A BERT whose products are integer ones."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertModel(BertConfig(**{**shape, "vocab_size": 50, "initializer_range": 0.3, **more})).eval()
    for layer in model.encoder.layer:
        for module in [*layer.modules()]:
            for name, child in module.named_children():
                if type(child) is nn.Linear:
                    weight = integers(child.weight.detach(), 4, 32, activations=8)
                    setattr(module, name, on_cpu(weight, child.bias.detach()))
    return model


def outputs(model: Any, **more: Any) -> Tensor:
    ids, mask = torch.arange(24).view(2, 12), torch.ones(2, 12)
    mask[1, 7:] = 0
    with torch.inference_mode():
        hidden: Tensor = model(input_ids=ids, attention_mask=mask, **more).last_hidden_state
    return hidden[mask.bool()]


def test_a_joined_layer_gives_what_its_modules_give() -> None:
    model = encoder()
    apart = outputs(model)
    fuse(model)
    joined = [isinstance(layer.forward, W4A8Layer) for layer in model.encoder.layer]
    assert joined == [HERE] * 2
    difference = (outputs(model) - apart).norm() / apart.norm()
    assert difference < 1e-2  # a sum in another order may round to the next code


def test_a_joined_layer_runs_its_modules_where_one_has_a_hook() -> None:
    model, seen = encoder(), []
    fuse(model)
    model.encoder.layer[0].intermediate.dense.register_forward_hook(lambda *_: seen.append(1))
    outputs(model)
    assert seen == [1]


@pytest.mark.parametrize("more", [{"hidden_act": "relu"}, {"is_decoder": True}, {"hidden_act": "gelu_new"}])
def test_other_layers_are_not_joined(more: dict[str, Any]) -> None:
    model = encoder(**more)
    fuse(model)
    assert not any(isinstance(vars(layer).get("forward"), W4A8Layer) for layer in model.encoder.layer)
