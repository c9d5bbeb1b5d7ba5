"""What a layer-wise method can decide over many layers: capabilities that a driver asks for before it compresses any.

Each is a value that a method has or lacks, as those of `capabilities` are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Candidate
from aicompress.methods.method import MethodConfig
from aicompress.weights import Weight

C = TypeVar("C", bound=MethodConfig)


def most(info: LayerInfo, given: C, found: Sequence[C]) -> C:
    """The parameters in which every number is the largest that one of them asks for.

    Args:
        info: one of those that they are of.
        given: as the recipe has them.
        found: what came of them.
    """
    numbers = {name: {getattr(each, name) for each in found} for name in type(found[0]).model_fields}
    return found[0].model_copy(update={name: max(values) for name, values in numbers.items() if len(values) > 1})


@dataclass(frozen=True)
class Allocates(Generic[C]):
    """A budget over several layers, or over the values of a layer, becomes explicit parameters of each layer.

    The weights decide: energy, global sparsity, bytes of the whole output.

    Attributes:
        resolve: (candidates, bytes of everything else in the output) -> one config per candidate.
        alike: (one of the experts in a tensor, config as it was given, those found for them) -> the one of all of them.
    """

    resolve: Callable[[Sequence[Candidate[C]], int], list[C]]
    alike: Callable[[LayerInfo, C, Sequence[C]], C] = most


@dataclass(frozen=True)
class SurveySetting:
    """What decides on a survey beside the layers themselves.

    Attributes:
        other_bytes: of everything else in the output's weight files, at most.
        saved_milliseconds: (layer, compressed weight) -> time that the layer's forward pass takes less on this machine.
        done: told of the number of layers that are measured.
        divergence: (one explicit config per candidate) -> KL of the outputs in nats, measured on the running model.
    """

    other_bytes: int
    saved_milliseconds: Callable[[Layer, Weight], float]
    done: Callable[[int], None] = lambda number: None
    divergence: Callable[[Sequence[MethodConfig]], float] = lambda configs: 0.0


@dataclass(frozen=True)
class Surveys(Generic[C]):
    """Statistics of the original model, read before any layer is compressed, decide how much each layer keeps.

    Attributes:
        statistics: config -> those that the decision reads; none where the config decides alone.
        tries: config -> whether the decision tries explicit configs on the running model.
        decide: (candidates whose layers come with these statistics, setting) -> one explicit config per candidate.
    """

    statistics: Callable[[C], frozenset[str]]
    decide: Callable[[Sequence[Candidate[C]], SurveySetting], list[C]]
    tries: Callable[[C], bool] = lambda config: False


@dataclass(frozen=True)
class Width:
    """How finely a layer's codes tell values apart, as a search chooses it.

    Attributes:
        bits: of a code.
        group: columns that share a scale; None: as the method's granularity says.
    """

    bits: int
    group: int | None = None

    def __str__(self) -> str:
        return f"{self.bits}" if self.group is None else f"{self.bits}/{self.group}"


@dataclass(frozen=True)
class WidthSearch:
    """The target of a search for widths, which is one for all layers, and how it is measured; one target is given.

    Attributes:
        target_bytes: weight bytes of the whole output.
        target_bpw: bits per weight of the layers it chooses for.
        max_kl: divergence of the outputs in nats.
        sensitivity: measure each width by the model's output or by its block's; None: by the work it takes.
        samples: calibration samples that it measures on; None: as many as hold about 1024 tokens.
        evaluations: runs of the model that refine the choice; None: 16.
    """

    target_bytes: int | None = None
    target_bpw: float | None = None
    max_kl: float | None = None
    sensitivity: Literal["output", "block"] | None = None
    samples: int | None = None
    evaluations: int | None = None

    @property
    def target(self) -> tuple[str, float]:
        """The name and the value of what is aimed at.

        Raises:
            ValueError: no target is given.
        """
        targets = {"target_bytes": self.target_bytes, "target_bpw": self.target_bpw, "max_kl": self.max_kl}
        for name, value in targets.items():
            if value is not None:
                return name, value
        raise ValueError("a search has a target")


@dataclass(frozen=True)
class Widths(Generic[C]):
    """A search over the running model can choose the width of each layer's codes.

    Attributes:
        search: config -> what is searched for; None where the config's width is explicit, or found from the weights.
        options: (config, a layer's input columns) -> the widths to choose among.
        at: (config, width) -> the config with this width, as if it had been given.
        sketch: (layer with at most the norms of its inputs, config) -> about what `apply` gives, at a fraction of its
            time.
    """

    search: Callable[[C], WidthSearch | None]
    options: Callable[[C, int], Sequence[Width]]
    at: Callable[[C, Width], C]
    sketch: Callable[[Layer, C], Weight]
