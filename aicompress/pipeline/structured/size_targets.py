"""From a target to a size: the most units that stay within a number of parameters, bytes or milliseconds.

Parameters and bytes are those of the planned output, to the byte. Milliseconds come from a table: every shape that a
matrix layer takes is timed once on this machine, and a model's time is the sum over its layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional

from aicompress.errors import RecipeError
from aicompress.measure import interleaved
from aicompress.methods.prune.units.size_targets import Target, TargetedConfig
from aicompress.pipeline.step.output import Output, Planned
from aicompress.pipeline.structured.edit import Edit
from aicompress.recipe import Recipe

ROWS = 128  # inputs of a layer when it is timed
ROUNDS, WARMUP = 9, 2

Laid = tuple[Edit, Output]


@dataclass
class LatencyTable:
    """Forward times of matrix layers by shape, each measured when it is first asked for."""

    seconds: dict[tuple[int, int, torch.dtype], float] = field(default_factory=dict)

    def total(self, parameters: Mapping[str, Planned]) -> float:
        """Sum over the matrix layers of a model, in seconds."""
        found = 0.0
        for planned in parameters.values():
            if planned.info is not None and planned.info.kind in ("linear", "head"):
                rows, columns = planned.dense.shape[0], math.prod(planned.dense.shape[1:])
                found += self._of(rows, columns, planned.dense.dtype)
        return found

    def _of(self, rows: int, columns: int, dtype: torch.dtype) -> float:
        key = (rows, columns, dtype)
        if key not in self.seconds:
            kind = dtype if dtype.itemsize > 1 else torch.float32
            weight = nn.Parameter(torch.randn(rows, columns, dtype=kind), requires_grad=False)
            inputs = torch.randn(ROWS, columns, dtype=kind)
            self.seconds[key] = interleaved([lambda: functional.linear(inputs, weight)], ROUNDS, WARMUP)[0].median
        return self.seconds[key]


@dataclass(frozen=True)
class Sizing:
    """Finds the size that a target allows.

    Attributes:
        recipe: with a target.
        lay: from a recipe with an explicit size to its edit and output.
    """

    recipe: Recipe
    lay: Callable[[Recipe], Laid]

    @property
    def config(self) -> TargetedConfig:
        """The method's parameters."""
        assert isinstance(self.recipe.method, TargetedConfig)
        return self.recipe.method

    def found(self) -> tuple[Recipe, tuple[str, ...]]:
        """The recipe with the largest size within the target, and what to tell of it.

        Raises:
            RecipeError: even the smallest size is beyond it.
        """
        name, table = self.config.target, LatencyTable()
        assert name is not None
        edit, output = self.lay(self._with(self.config.whole()))
        size, whole = max(structure.size for structure in edit.structures), _cost(name, output, table)
        wanted = float(getattr(self.config, name))
        limit = wanted * whole if name == "target_latency" else wanted
        sizes = self.config.candidates(size)
        best: tuple[int, float] | None = None
        smallest = math.inf
        low, high = 0, len(sizes)  # the first that fits lies between
        while low < high:
            middle = (low + high) // 2
            place, cost = self._valid(range(middle, high), sizes, (name, table))
            if cost > limit:
                smallest = min(smallest, cost)
                low, high = (place + 1, high) if cost < math.inf else (low, middle)
            else:
                best, high = (sizes[place], cost), middle
        if best is None:
            least = "none" if smallest == math.inf else _said(name, smallest, whole)
            hint = f"the smallest size that was tried: {least}; prune something else too, in a step of its own"
            raise RecipeError(f"method.{name}: {wanted:,g} is out of reach", hint)
        kept, cost = best
        told = f"{name}: {kept} of {size} units stay of each, for {_said(name, cost, whole)}"
        return self._with(self.config.sized(kept, size)), (told,)

    def _valid(self, places: range, sizes: list[int], by: tuple[Target, LatencyTable]) -> tuple[int, float]:
        """The first size among places that can be, and its cost; infinity where none can."""
        for place in places:
            try:
                _, output = self.lay(self._with(self.config.probing().sized(sizes[place], sizes[0])))
            except RecipeError:  # such as a number of heads that config.json cannot say
                continue
            return place, _cost(by[0], output, by[1])
        return places.stop, math.inf

    def _with(self, config: TargetedConfig) -> Recipe:
        return self.recipe.model_copy(update={"method": config})


def _cost(name: Target, output: Output, table: LatencyTable) -> float:
    if name == "target_bytes":
        return float(output.weight_bytes)
    if name == "target_latency":
        return table.total(output.parameters)
    return float(sum(math.prod(planned.dense.shape) for planned in output.parameters.values()))


def _said(name: Target, cost: float, whole: float) -> str:
    """A cost in words."""
    if name == "target_latency":
        return f"{cost / whole:.3f} of the forward time of the input's matrix layers ({1e3 * whole:.3g} ms)"
    return f"{cost:,.0f} {'bytes of weight files' if name == 'target_bytes' else 'parameters'}"
