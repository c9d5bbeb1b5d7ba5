"""The capability of a method whose layers store a part of their weights once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Candidate
from aicompress.methods.method import MethodConfig
from aicompress.weights import Weight

C = TypeVar("C", bound=MethodConfig)


@dataclass(frozen=True)
class Shares(Generic[C]):
    """Layers are compressed together and store a part of their weights once.

    Attributes:
        part: what they share, as `Weight.borrowed` names it; the first layer of a group stores it.
        groups: candidates -> the numbers of those that share, for each group in ascending order.
        outline: (layers of a group, config) -> the stored weights without data; dense where sharing saves nothing.
        compress: (layers of a group, config) -> the stored weights, which have the shared part in common.
        why: what keeps layers from sharing, in a few words.
        alone: whether a layer that shares nothing is compressed by itself.
        row_wise: `compress` may be given blocks of the layers' rows, the same of each; of a layer that has fewer blocks
            than others none in the end.
        divided: (layers of a group, functions that read the blocks of rows of each, config) -> a config for each number
            of a block, where its result depends on other rows; None: every block takes the layers' config.
        across: layers of several blocks share: what is read of their inputs is of the original model.
    """

    part: str
    groups: Callable[[Sequence[Candidate[C]]], list[list[int]]]
    outline: Callable[[Sequence[LayerInfo], C], list[Weight]]
    compress: Callable[[Sequence[Layer], C], list[Weight]]
    why: str
    alone: bool = True
    row_wise: bool = False
    divided: Callable[[Sequence[LayerInfo], Sequence[Sequence[Callable[[], Layer]]], C], list[C]] | None = None
    across: bool = False
