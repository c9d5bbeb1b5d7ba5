"""Cosine similarities of embeddings."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_rows(embeddings: Tensor) -> Tensor:
    """Scale rows to length 1, in float64; a zero row stays zero."""
    return torch.nn.functional.normalize(embeddings.double().cpu(), dim=1)
