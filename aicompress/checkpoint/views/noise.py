"""A checkpoint with random numbers for weights: the same names and shapes, no byte of the weights read."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from aicompress.checkpoint.naming import kind_of
from aicompress.checkpoint.reader import Checkpoint

ROWS = 4096  # of the tables of a vocabulary: those of its first tokens are enough to try a model


class NoiseCheckpoint(Checkpoint):
    """Float32 parameters of the size that keeps activations near one, each from a seed of its own name."""

    def row_multiple(self, parameter: str, part: str = "") -> int:
        """Numbers are drawn for all of a parameter."""
        return 0

    def dense(self, parameter: str, rows: slice | None = None) -> Tensor:
        """Vectors lie in [1/2, 3/2], so that no normalization is trivial; matrices have rows of unit norm.

        Embeddings and output heads have at most `ROWS` rows.
        """
        spec = self.parameters()[parameter]
        if not spec.dtype.is_floating_point:
            return super().dense(parameter, rows)
        generator, shape = torch.Generator().manual_seed(zlib.crc32(parameter.encode())), spec.shape
        if len(shape) < 2:
            return torch.rand(shape, generator=generator) + 0.5
        if kind_of(parameter, spec) in ("embedding", "head"):
            shape = (min(shape[0], ROWS), *shape[1:])
        return torch.randn(shape, generator=generator).div_(math.sqrt(shape[-1]))
