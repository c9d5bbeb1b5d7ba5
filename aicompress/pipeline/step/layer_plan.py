"""The plan of one layer, and its seed."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from aicompress.errors import RecipeError
from aicompress.layer import LayerInfo
from aicompress.methods.head_products import HeadProduct
from aicompress.methods.method import MethodConfig
from aicompress.weights import Weight


@dataclass(frozen=True)
class Group:
    """Layers that are compressed together and store a part of their weights once.

    Attributes:
        members: their parameters, in the output's order; the first one stores what they share.
        part: what they share, as `Weight.borrowed` names it.
    """

    members: tuple[str, ...]
    part: str

    def owners(self, parameter: str) -> dict[str, str]:
        """Parts of a member that another one stores, each with that one."""
        return {} if parameter == self.members[0] else {self.part: self.members[0]}


@dataclass(frozen=True)
class LayerPlan:
    """The plan of one layer.

    Attributes:
        info: the layer.
        config: the method's parameters for it; None leaves it alone.
        rule: where the parameters come from.
        outline: the stored weight without data; None leaves it alone.
        budget: the level whose own budget it shares; empty: the recipe's.
        product: of heads, in which it is compressed together with another layer.
        group: the layers that it shares tensors with; None: it shares none.
    """

    info: LayerInfo
    config: MethodConfig | None = None
    rule: str = "-"
    outline: Weight | None = None
    budget: str = ""
    product: HeadProduct | None = None
    group: Group | None = None

    @property
    def members(self) -> tuple[str, ...]:
        """Parameters that are compressed together with it, itself among them; none where it is compressed alone."""
        if self.product is not None:
            return self.product.members
        return () if self.group is None else self.group.members


def sharing_budgets(layers: Iterable[LayerPlan]) -> dict[str, list[LayerPlan]]:
    """Layers that share a budget, by its level; those that share the recipe's come last.

    What the whole output takes is known when the levels are decided.
    """
    by_budget: dict[str, list[LayerPlan]] = {}
    for layer in sorted(layers, key=lambda layer: not layer.budget):
        by_budget.setdefault(layer.budget, []).append(layer)
    return by_budget


@contextmanager
def named(budget: str) -> Iterator[None]:
    """Say in a refusal which level's budget it is about."""
    try:
        yield
    except RecipeError as error:
        if not budget:
            raise
        raise RecipeError(f"{budget}: {error.message}", error.hint) from error


def layer_seed(seed: int, name: str) -> int:
    """A layer's own seed, so that the order of layers does not matter."""
    return (seed << 32) ^ zlib.crc32(name.encode())
