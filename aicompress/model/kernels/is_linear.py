"""Recognise linear layers by what they compute, not by their class alone."""

from __future__ import annotations

import copy
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


def multiplies(module: nn.Module) -> bool:
    """Whether the one tensor that a module gives is x Wᵀ + b, W being its own weight of two axes, whatever its class.

    Besides linear layers, such are I-BERT's, which also give a scale where they round. A weight may be stored in any
    form there, and is decoded where the module's own code reads it.
    """
    weight = module._parameters.get("weight")
    if is_linear(module):
        return True
    if weight is None or weight.ndim != 2 or isinstance(module, nn.Linear | nn.Embedding):
        return False
    if next(module.children(), None) is not None:
        return False
    trial = copy.deepcopy(module).requires_grad_(False).eval() if weight.is_meta else None
    return trial is not None and _gives_the_product(trial, "bias" in module._parameters)


def _gives_the_product(module: Any, biased: bool) -> bool:
    """Whether a module without numbers comes to a linear layer, tried with a few random ones."""
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(size, generator=generator) for size in ((3, 5), (3,), (2, 4, 5)))
    module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    biased = biased and module._parameters["bias"] is not None
    if biased:
        module._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
    try:
        with torch.no_grad():
            given = module(x)
    except Exception:  # whatever else it reads
        return False
    tensors = [each for each in (given if isinstance(given, tuple) else (given,)) if isinstance(each, Tensor)]
    return len(tensors) == 1 and _is_product(tensors[0], nn.functional.linear(x, weight, bias if biased else None))


def _is_product(given: Tensor, expected: Tensor) -> bool:
    return not given.is_meta and given.shape == expected.shape and torch.allclose(given, expected, atol=1e-5)


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
    return isinstance(product, Tensor) and _is_product(product, expected)
