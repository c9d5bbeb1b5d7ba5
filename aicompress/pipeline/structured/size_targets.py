"""From a target to a size: the most units that stay within a number of parameters, bytes or milliseconds.

Parameters and bytes are those of the planned output, to the byte. Milliseconds come from a table: every shape that a
matrix layer takes is timed once on this machine, and a model's time is the sum over its layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.nn import functional

from aicompress.checkpoint import Checkpoint
from aicompress.errors import RecipeError
from aicompress.measure import interleaved
from aicompress.methods.prune.units.size_targets import Target, TargetedConfig
from aicompress.methods.structural import AnyPruner
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.output import Output, Planned
from aicompress.pipeline.step.survey import Survey, SurveyResult
from aicompress.pipeline.structured.edit import Edit
from aicompress.recipe import Recipe

ROWS = 128  # inputs of a layer when it is timed
ROUNDS, WARMUP = 9, 2

Laid = tuple[Edit, Output]
LayOut = Callable[[AnyPruner], Laid]


@dataclass
class LatencyTable:
    """Forward times of matrix layers by shape, each measured when it is first asked for."""

    seconds: dict[tuple[int, int, torch.dtype], float] = field(default_factory=dict)

    def total(self, parameters: Mapping[str, Planned]) -> float:
        """Sum over the matrix layers of a model, in seconds."""
        seconds = 0.0
        for planned in parameters.values():
            if planned.info is not None and planned.info.kind in ("linear", "head"):
                rows, columns = planned.dense.shape[0], math.prod(planned.dense.shape[1:])
                seconds += self._of(rows, columns, planned.dense.dtype)
        return seconds

    def _of(self, rows: int, columns: int, dtype: torch.dtype) -> float:
        key = (rows, columns, dtype)
        if key not in self.seconds:
            kind = dtype if dtype.itemsize > 1 else torch.float32
            weight = nn.Parameter(torch.randn(rows, columns, dtype=kind), requires_grad=False)
            inputs = torch.randn(ROWS, columns, dtype=kind)
            self.seconds[key] = interleaved([lambda: functional.linear(inputs, weight)], ROUNDS, WARMUP)[0].median
        return self.seconds[key]


@dataclass(frozen=True)
class AllowedSize:
    """The size that a target allows.

    Attributes:
        kept, of: units that stay of each structure, and how many there are.
        cost: parameters, bytes or seconds of the output.
        whole: the same of the input, where nothing goes.
    """

    kept: int
    of: int
    cost: float
    whole: float


@dataclass(frozen=True)
class SizeSearch:
    """A search for the largest size within a target.

    Attributes:
        pruner: with a target.
        lay_out: from a pruner with an explicit size to its edit and output.
    """

    pruner: AnyPruner
    lay_out: LayOut

    @property
    def config(self) -> TargetedConfig:
        """The method's parameters."""
        config: TargetedConfig = self.pruner.config
        return config

    @property
    def target(self) -> Target:
        """The name of the target."""
        target = self.config.target
        assert target is not None  # there is no search without one
        return target

    def largest(self) -> AllowedSize:
        """The largest size within the target.

        Raises:
            RecipeError: even the smallest size is beyond it.
        """
        name, table = self.target, LatencyTable()
        edit, output = self.lay_out(self._with(self.config.probing().whole()))
        size, whole = max(structure.size for structure in edit.structures), _cost(name, output, table)
        wanted = float(getattr(self.config, name))
        limit = wanted * whole if name == "target_latency" else wanted
        sizes = self.config.candidates(size)
        best: tuple[int, float] | None = None
        smallest = math.inf
        low, high = 0, len(sizes)  # the first that fits lies between
        while low < high:
            middle = (low + high) // 2
            place, cost = self._valid(range(middle, high), sizes, table)
            if cost > limit:
                smallest = min(smallest, cost)
                low, high = (place + 1, high) if cost < math.inf else (low, middle)
            else:
                best, high = (sizes[place], cost), middle
        if best is None:
            least = "none" if smallest == math.inf else _said(name, smallest, whole)
            hint = f"the smallest size that was tried: {least}; prune something else too, in a step of its own"
            raise RecipeError(f"method.{name}: {wanted:,g} is out of reach", hint)
        return AllowedSize(best[0], size, best[1], whole)

    def sized(self, size: AllowedSize) -> AnyPruner:
        """The pruner with a size in place of the target."""
        return self._with(self.config.sized(size.kept, size.of))

    def described(self, size: AllowedSize) -> str:
        """A size in a sentence."""
        cost = _said(self.target, size.cost, size.whole)
        return f"{self.target}: {size.kept} of {size.of} units stay of each, for {cost}"

    def _valid(self, places: range, sizes: list[int], table: LatencyTable) -> tuple[int, float]:
        """The first size among places that can be, and its cost; infinity where none can."""
        for place in places:
            try:
                _, output = self.lay_out(self._with(self.config.probing().sized(sizes[place], sizes[0])))
            except RecipeError:  # such as a number of heads that config.json cannot say
                continue
            return place, _cost(self.target, output, table)
        return places.stop, math.inf

    def _with(self, config: TargetedConfig) -> AnyPruner:
        return replace(self.pruner, config=config)


def largest_size(search: SizeSearch, survey: Survey, checkpoint: Checkpoint, recipe: Recipe) -> AllowedSize:
    """The largest size within a target; where layers are timed for it, the survey keeps the result.

    Raises:
        RecipeError: even the smallest size is beyond it.
    """
    if search.target != "target_latency":
        return search.largest()

    def measure(progress: Progress) -> SurveyResult:
        progress("layers", 0, 1)
        size = search.largest()
        seconds = torch.tensor([size.cost, size.whole], dtype=torch.float64)
        return SurveyResult({"units": torch.tensor([size.kept, size.of]), "seconds": seconds})

    measured = survey.recorded("forward times of the layers, by their sizes", checkpoint, recipe, measure).tensors
    kept, of = measured["units"].tolist()
    cost, whole = measured["seconds"].tolist()
    return AllowedSize(kept, of, cost, whole)


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
