"""Sparse layers: a compressed-row product where a measurement on this machine finds it faster than a dense one.

MKL's product with a CSR matrix takes time in proportion to the survivors and is far from a dense product's rate, so
that it wins only where nearly all weights are gone; where exactly depends on the shape, the dtype and the processor.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from aicompress.measure import interleaved
from aicompress.model.kernels.linear import FastLinear, PlainLinear
from aicompress.weights import Sparse

LEAST_ZEROS = 0.9  # below, a dense product has won on every machine and shape that was tried
ROWS = (1, 16, 128)  # inputs that are timed
ROUNDS, WARMUP = 5, 2
MARGIN = 0.9  # of the dense product's time: less is noise

_measured: dict[tuple[int, int, int, torch.dtype, int], bool] = {}


class CsrLinear(FastLinear):
    """Survivors by rows, in float32: 8 bytes each."""

    kernel = "csr"

    def __init__(self, matrix: Tensor, bias: Tensor | None) -> None:
        super().__init__((matrix.shape[0], matrix.shape[1]), bias)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that torch's sparse layouts are new
            self.matrix = nn.Parameter(matrix.float().to_sparse_csr(), requires_grad=False)

    def multiply(self, x: Tensor) -> Tensor:
        y = torch.mm(self.matrix, x.float().t()).t().to(x.dtype)
        return y if self.bias is None else y + self.bias


def sparse_linear(weight: Sparse, bias: Tensor | None, dtype: torch.dtype) -> FastLinear:
    """The faster of a dense and a compressed-row layer.

    Layers of one shape, dtype and share of zeros (in percent) are timed once in a process.

    Args:
        weight: survivors under a mask.
        bias: (out,) or None.
        dtype: of the dense layer.
    """
    dense = PlainLinear(weight.dense().to(dtype), bias)
    percent = math.floor(100 * (1 - weight.values.numel() / weight.mask.numel()))
    if percent < 100 * LEAST_ZEROS:
        return dense
    rows = CsrLinear(dense.matrix, bias)
    key = (*weight.shape, percent, dtype, torch.get_num_threads())
    if key not in _measured:
        _measured[key] = ratio(rows, dense, dtype) < MARGIN
    return rows if _measured[key] else dense


@torch.inference_mode()
def ratio(one: FastLinear, other: FastLinear, dtype: torch.dtype) -> float:
    """Geometric mean over several numbers of inputs of one layer's time relative to another's."""
    draw = torch.Generator().manual_seed(0)
    product = 1.0
    for count in ROWS:
        inputs = torch.randn(count, one.in_features, generator=draw).to(dtype)
        calls = [lambda layer=layer, inputs=inputs: layer(inputs) for layer in (one, other)]
        mine, theirs = interleaved(calls, ROUNDS, WARMUP)
        product *= mine.median / theirs.median
    return float(product ** (1 / len(ROWS)))
