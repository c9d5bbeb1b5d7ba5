"""Products with rounded inputs on a processor that has them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from aicompress.model.kernels.bf16_products import RoundedLayers


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().double()


def test_linear_layers_round_their_inputs_and_nothing_else_does() -> None:
    x, w = draw(512, 256), draw(128, 256, seed=1)
    with RoundedLayers():
        layer, transposed = functional.linear(x, w), torch.addmm(torch.zeros(128), x, w.t())
        small = functional.linear(x, w[:4])
        product, batched = x @ w.t(), torch.bmm(x[None], w.t()[None])[0]
    exact = x.double() @ w.double().t()
    for found in (layer, transposed):
        torch.testing.assert_close(found.double(), rounded(x) @ rounded(w).t(), rtol=1e-4, atol=1e-4)
        assert (found - exact).abs().max() > 1e-2
    torch.testing.assert_close(small.double(), exact[:, :4], rtol=1e-4, atol=1e-4)
    for found in (product, batched):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
