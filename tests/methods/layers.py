"""Layers for the tests of methods: plain tensors, no checkpoint."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Candidate
from aicompress.statistics import GradientStats, InputStats, column_statistics
from aicompress.weights import Dense, Weight, restore


def info_of(stored: Weight, dtype: torch.dtype = torch.float32, name: str = "layers.0.fc") -> LayerInfo:
    """The layer as a reader would describe it."""
    outline = None
    if stored.form != "dense":
        outline = restore({suffix: t.to("meta") for suffix, t in stored.tensors().items()}, stored.meta())
    nbytes = sum(spec.nbytes for spec in stored.specs().values())
    shape = stored.shape
    return LayerInfo(
        name, f"{name}.weight", "linear", shape, shape, dtype, stored=stored.form, nbytes=nbytes, outline=outline
    )


def layer_of(
    weight: Tensor | Weight,
    name: str = "layers.0.fc",
    inputs: InputStats | None = None,
    gradients: GradientStats | None = None,
) -> Layer:
    """A layer around a matrix, or around a stored weight."""
    stored = Dense(weight) if isinstance(weight, Tensor) else weight
    dtype = weight.dtype if isinstance(weight, Tensor) else torch.float32
    return Layer(info_of(stored, dtype, name), stored.dense(), stored, inputs, gradients=gradients)


def candidate_of(layer: Layer, config: object) -> Candidate:
    """The layer with its config, read from memory."""
    return Candidate(layer.info, config, lambda: layer)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Gaussian numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def convolution(kernel: Tensor) -> Layer:
    """A convolution around its kernel (out, in, *k); a linear layer around a matrix."""
    layer = layer_of(kernel.flatten(1))
    kind = "conv" if kernel.ndim > 2 else "linear"
    return replace(layer, info=replace(layer.info, kind=kind, tensor_shape=tuple(kernel.shape)))


def columns_of(rows: Tensor) -> dict[str, Tensor]:
    """Every statistic of the columns of inputs, (rows, in)."""
    sums = {name: (statistic, statistic.added(None, rows)) for name, statistic in column_statistics().items()}
    return {name: own if statistic.largest else own / len(rows) for name, (statistic, own) in sums.items()}


def squared_error(layer: Layer, weight: Weight) -> float:
    """‖W − Ŵ‖²."""
    return float((layer.weight - weight.dense()).double().square().sum())
