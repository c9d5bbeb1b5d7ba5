"""A checkpoint's parameters as random numbers: its names and shapes without reading a byte of its weights."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from aicompress.checkpoint.reader import Checkpoint
from aicompress.weights import TensorSpec

LARGEST = 1 << 26  # numbers in a parameter beyond which it is made of one short vector


class NoiseCheckpoint(Checkpoint):
    """Float32 parameters of the size that keeps activations near one, each from a seed of its own name."""

    def dense(self, parameter: str) -> Tensor:
        """Vectors lie in [1/2, 3/2], so that no normalization is trivial; matrices have rows of unit norm."""
        spec = self.parameters()[parameter]
        if not spec.dtype.is_floating_point:
            return super().dense(parameter)
        return _noise(spec, torch.Generator().manual_seed(zlib.crc32(parameter.encode())))


def _noise(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    if len(spec.shape) < 2:
        return torch.rand(spec.shape, generator=generator) + 0.5
    rows, columns = spec.shape[0], spec.nbytes // spec.dtype.itemsize // max(1, spec.shape[0])
    if len(spec.shape) == 2 and rows * columns > LARGEST:  # the table of a large vocabulary: rows that overlap
        vector = torch.randn(rows + columns, generator=generator).div_(math.sqrt(columns))
        return vector.as_strided((rows, columns), (1, 1))
    return torch.randn(spec.shape, generator=generator).div_(math.sqrt(spec.shape[-1]))
