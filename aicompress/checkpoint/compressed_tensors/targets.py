"""Which config group of the compressed-tensors layout a module belongs to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from aicompress.checkpoint.naming import is_embedding
from aicompress.errors import CheckpointError
from aicompress.selection import Expression

# What this package writes: one module by name, with any prefix or with none. It is looked up, not tried.
_LITERAL = re.compile(r"re:(?P<prefix>\(\.\*\\\.\)\?)?(?P<name>(?:\w|\\[^\w\s])+)\$")


@dataclass(frozen=True)
class Targets:
    """The targets of all config groups; a module belongs to the first group of which one matches.

    Attributes:
        groups: the config groups.
        names: number of the group by name of a module.
        endings: number of the group by the name that a module's own one is, or ends in after a dot.
        expressions: others, with the number of their group.
        classes: targets that name a class, such as Linear, with the number of their group.
    """

    groups: tuple[dict[str, Any], ...]
    names: Mapping[str, int]
    endings: Mapping[str, int]
    expressions: tuple[tuple[Expression, int], ...] = field(default=())
    classes: tuple[tuple[str, int], ...] = field(default=())

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Read them from a quantization_config.

        Raises:
            ValueError: an expression does not compile.
        """
        groups = tuple(config["config_groups"].values())
        names: dict[str, int] = {}
        endings: dict[str, int] = {}
        expressions: list[tuple[Expression, int]] = []
        classes: list[tuple[str, int]] = []
        for number, group in enumerate(groups):
            for target in group["targets"]:
                literal = _LITERAL.fullmatch(target)
                if literal is not None:
                    name = re.sub(r"\\(.)", r"\1", literal["name"])
                    (endings if literal["prefix"] else names).setdefault(name, number)
                elif target.startswith("re:"):
                    expressions.append((Expression(target[3:]), number))
                else:
                    names.setdefault(target, number)
                    classes += [(target, number)] if target.isidentifier() else []
        return cls(groups, names, endings, tuple(expressions), tuple(classes))

    def group_of(self, module: str) -> dict[str, Any]:
        """The config group of a module; a class name such as Linear takes what is left.

        Raises:
            CheckpointError: no group names it.
            ValueError: an expression takes too long.
        """
        pieces = module.split(".")
        numbers = [self.endings.get(".".join(pieces[first:])) for first in range(len(pieces))]
        least = min((number for number in (*numbers, self.names.get(module)) if number is not None), default=None)
        for expression, number in self.expressions:  # in the order of their groups
            if least is not None and number >= least:
                break
            if expression.begins(module):
                least = number
                break
        if least is None:  # what has no name of an embedding is a linear layer of some class, Linear or a fused one
            embedding = is_embedding(module)
            least = next((number for name, number in self.classes if ("Embedding" in name) == embedding), None)
        if least is None:
            message = f"{module} is quantized, but no config group names it"
            raise CheckpointError(message, "its config.json is inconsistent")
        return self.groups[least]
