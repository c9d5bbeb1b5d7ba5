"""The plan of one layer, and its seed."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from aicompress.layer import LayerInfo
from aicompress.methods.method import MethodConfig
from aicompress.weights import Weight


@dataclass(frozen=True)
class LayerPlan:
    """The plan of one layer.

    Attributes:
        info: the layer.
        config: the method's parameters for it; None leaves it alone.
        rule: where the parameters come from.
        outline: the stored weight without data; None leaves it alone.
    """

    info: LayerInfo
    config: MethodConfig | None = None
    rule: str = "-"
    outline: Weight | None = None


def layer_seed(seed: int, name: str) -> int:
    """A layer's own seed, so that the order of layers does not matter."""
    return (seed << 32) ^ zlib.crc32(name.encode())
