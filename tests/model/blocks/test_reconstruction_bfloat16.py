"""Gradients through products that round their inputs, on a processor that has such products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from aicompress.model.kernels import bf16_products as products
from aicompress.model.kernels.bf16_products import RoundedLayers


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_gradients_of_rounded_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LEAST", 1)
    x, weight, bias = draw(2, 64, 96), draw(80, 96, seed=1), draw(80, seed=2)
    found = []
    for mode in (RoundedLayers(), None):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        if mode is None:
            nn.functional.linear(*leaves).square().sum().backward()
        else:
            with mode:
                output = nn.functional.linear(*leaves)
            output.square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for rounded, exact in zip(*found, strict=True):
        assert rounded is not None
        assert exact is not None
        assert 0 < (rounded - exact).norm() < 1e-2 * exact.norm()
