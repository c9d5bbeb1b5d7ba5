"""Layers for the tests of quantization methods."""

from __future__ import annotations

import torch
from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.statistics import InputStats
from tests.methods.layers import columns_of


def layer_of(weight: Tensor, inputs: Tensor | None = None, original: Tensor | None = None) -> Layer:
    """A float32 layer with the statistics of its inputs (tokens, in), and of the uncompressed model's."""
    shape = (weight.shape[0], weight.shape[1])
    info = LayerInfo("layers.0.fc", "layers.0.fc.weight", "linear", shape, shape, torch.float32)
    stats = None
    if inputs is not None:
        count = len(inputs)
        cross = None if original is None else original.t() @ inputs / count
        stats = InputStats(count, inputs.t() @ inputs / count, columns=columns_of(inputs), cross=cross)
    return Layer(info, weight, None, stats)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs with a few strong directions and columns of different size."""
    mixing = gaussian(columns, columns, seed=seed + 1) * torch.linspace(0.1, 3, columns)
    return gaussian(tokens, columns, seed=seed) @ mixing / columns**0.5
