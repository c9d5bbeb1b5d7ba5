"""Recognise linear layers by what they compute, not by their class alone."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x Wᵀ + b, so that any form of W may stand in its place.

    GPT-2's Conv1D does, and so does a subclass of Linear whose own forward comes to the same (Falcon's), which is
    found by running it on a few random numbers; a router that is a Linear does not.
    """
    if type(module) is nn.Linear or _is_conv1d(module):
        return True
    kind: Any = type(module)
    if not isinstance(module, nn.Linear) or kind.forward is nn.Linear.forward:
        return False  # an output projection of MultiheadAttention is a Linear that is never called
    return _acts_linear(kind, module.bias is not None)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's Conv1D, of which there is none before transformers is imported."""
    imported: Any = sys.modules.get("transformers.pytorch_utils")
    return imported is not None and isinstance(module, imported.Conv1D)


@cache
def _acts_linear(kind: Any, biased: bool) -> bool:
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(size, generator=generator) for size in ((3, 5), (3,), (2, 4, 5)))
    small = kind.__new__(kind)
    nn.Linear.__init__(small, 5, 3, bias=biased)
    small.weight.data = weight
    if biased:
        small.bias.data = bias
    expected = nn.functional.linear(x, weight, bias if biased else None)
    try:
        with torch.no_grad():
            product = small(x)
    except Exception:  # whatever it lacks that its own constructor sets, or asks for beside its input
        return False
    return (
        isinstance(product, Tensor) and product.shape == expected.shape and torch.allclose(product, expected, atol=1e-5)
    )
