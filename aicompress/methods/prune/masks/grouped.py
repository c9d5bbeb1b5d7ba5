"""Which N:M masks are packed as such, and in which order of the inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from aicompress.layer import LayerInfo
from aicompress.methods.prune.masks.masks import parse_pattern
from aicompress.methods.zeros import mask_of
from aicompress.weights.grouping import Grouping, packed


def grouping_of(info: LayerInfo, config: Any) -> Grouping | None:
    """How an N:M mask is packed, without data; None where it is a bit mask.

    A layer that is sparse already may have fewer survivors than N in a group.
    """
    if config.pattern is None or mask_of(info.outline) is not None:
        return None
    return packed(Grouping.outline(*parse_pattern(config.pattern), info.shape[1], config.permutation > 0), *info.shape)


def ordered(grouping: Grouping | None, order: Tensor | None) -> Grouping | None:
    """A grouping with its columns' order."""
    if grouping is None or grouping.order is None or order is None:
        return grouping
    return replace(grouping, order=order.to(grouping.order.dtype))
