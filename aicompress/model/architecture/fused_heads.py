"""Check on a tiny block in which order heads lie in a fused query, key and value tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.errors import CheckpointError
from aicompress.model.architecture.architecture import Architecture, keep_blocks
from aicompress.model.architecture.attention import Attention, HeadCount, HeadTensor
from aicompress.model.architecture.config_fields import DEPTH_FIELDS, fields
from aicompress.model.architecture.shapes import build
from aicompress.model.architecture.small_models.reduced_model import with_few
from aicompress.model.loading.definitions.definition import refusing


def lies_in_sections(architecture: Architecture, attention: Attention) -> bool:
    """Whether cutting a fused tensor section by section takes heads away, tried with half of the groups.

    Returns:
        False also where the trial cannot be made: with one group only, or a model that is not given tokens.
    """
    count = attention.count
    config = dict(architecture.config)
    for field in fields(config, DEPTH_FIELDS):
        config = keep_blocks(config, field, range(1))
    config = with_few(config)
    for few in sorted(range(1, count.groups), key=lambda groups: abs(2 * groups - count.groups)):
        try:
            wide = build(config)
            narrow = build(count.edited(config, few * (count.heads // count.groups), few))
        except CheckpointError:  # strict configurations do not take every number
            continue
        try:
            return _same(wide, narrow, attention, architecture.on_disk, few)
        except CheckpointError:  # whatever else the model would have to be given
            return False
    return False


def _same(
    wide: nn.Module,
    narrow: nn.Module,
    attention: Attention,
    on_disk: Callable[[str], str],
    few_groups: int,
) -> bool:
    """Run both on the same tokens: one with heads that nothing reads, one without these heads."""
    generator = torch.Generator().manual_seed(0)
    wide, narrow = _started(wide), _started(narrow)
    few, tensors = dict(narrow.named_parameters()), {t.tensor: t for t in attention.tensors}
    kept = torch.randperm(attention.count.groups, generator=generator)[:few_groups].sort().values
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            parameter.normal_(std=0.2, generator=generator)
            stored = tensors.get(on_disk(name))
            if name not in few or (stored is None and few[name].shape != parameter.shape):
                return False  # another size follows from the number of heads
            if stored is None:
                few[name].copy_(parameter)
                continue
            index = positions(stored, kept, attention.count)
            few[name].copy_(parameter.index_select(stored.axis, index))
            if stored.role == "consumer":
                gone = torch.ones(parameter.shape[stored.axis], dtype=torch.bool)
                gone[index] = False
                parameter.index_fill_(stored.axis, gone.nonzero()[:, 0], 0.0)
        ids = torch.arange(1, 8)[None]
        with refusing("a small model does not run on tokens"):
            first, second = (model(input_ids=ids, use_cache=False)[0] for model in (wide, narrow))
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-3, atol=1e-3)


def _started(model: Any) -> Any:
    """In memory, its computed buffers made."""
    with refusing("a small model cannot be made"):
        model.to_empty(device="cpu")
        model.eval().init_weights()
        return model.float()


def positions(tensor: HeadTensor, kept: Tensor, count: HeadCount) -> Tensor:
    """What stays of an axis when only the groups `kept` do."""
    runs, begin = [], 0
    for section in tensor.sections:
        span = section.span * (count.heads // count.groups if section.kind == "query" else 1)
        runs.append((begin + kept[:, None] * span + torch.arange(span)).reshape(-1))
        begin += span * count.groups
    return torch.cat(runs)


def query_positions(tensor: HeadTensor, kept: Tensor, count: HeadCount) -> Tensor:
    """What stays of an axis when of every group only the query heads `kept` do, and all keys."""
    runs, begin, each = [], 0, count.heads // count.groups
    for section in tensor.sections:
        if section.kind == "query":
            heads = (torch.arange(count.groups)[:, None] * each + kept).reshape(-1)
            runs.append((begin + heads[:, None] * section.span + torch.arange(section.span)).reshape(-1))
            begin += section.span * count.heads
        else:
            runs.append(begin + torch.arange(section.span * count.groups))
            begin += section.span * count.groups
    return torch.cat(runs)
