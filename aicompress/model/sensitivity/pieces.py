"""Tell which weights one sample's gradients come to in pieces, from the graphs that are gone back through in turn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils._pytree import tree_leaves

from aicompress.model.sensitivity.moments import MomentSums, SpreadError

HELD = 1 << 30  # bytes of gradients that are held for their other pieces


class Pieces:
    """The graphs of one sample."""

    def __init__(self) -> None:
        self._graphs: list[set[Node]] = []

    def add(self, tree: Any) -> None:
        """Note the graph that tensors come from: it is gone back through by itself."""
        self._graphs.append(_behind(tree))

    def hold(self, sums: Mapping[str, MomentSums], samples: int) -> None:
        """Let the weights that several graphs go back to hold their pieces.

        Args:
            sums: weights that are watched.
            samples: how many there are.

        Raises:
            SpreadError: the pieces of all samples are too large.
        """
        spread = [
            each for each in sums.values() if sum(any(node in g for node in each.nodes()) for g in self._graphs) > 1
        ]
        self._graphs.clear()
        held = sum(4 * math.prod(each.watched.shape) for each in spread if each.parameter.requires_grad)
        if held * samples > HELD:
            raise SpreadError
        for each in spread:
            each.hold()


def _behind(tree: Any) -> set[Node]:
    tensors = [each for each in tree_leaves(tree) if isinstance(each, Tensor) and each.requires_grad]
    left, nodes = [get_gradient_edge(each).node for each in tensors], set[Node]()
    while left:
        node = left.pop()
        if node not in nodes:
            nodes.add(node)
            left += [each for each, _ in node.next_functions if each is not None]
    return nodes
