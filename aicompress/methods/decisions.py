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
    """One config for layers that have to be stored alike: every number is the largest that one of them asks for.

    Args:
        info: one of the layers.
        given: the config as the recipe gives it.
        found: the config that was found for each layer.
    """
    numbers = {name: {getattr(each, name) for each in found} for name in type(found[0]).model_fields}
    return found[0].model_copy(update={name: max(values) for name, values in numbers.items() if len(values) > 1})


@dataclass(frozen=True)
class Allocates(Generic[C]):
    """The weights decide how a budget is shared out, such as an energy, a global sparsity, or bytes of the output.

    Attributes:
        resolve: (candidates, bytes of everything else in the output) -> an explicit config for each candidate.
        alike: (one of the experts in a tensor, their config as the recipe gives it, the config found for each of them)
            -> one config for all of them.
    """

    resolve: Callable[[Sequence[Candidate[C]], int], list[C]]
    alike: Callable[[LayerInfo, C, Sequence[C]], C] = most


@dataclass(frozen=True)
class SurveySetting:
    """What a survey's decision is given beside the layers.

    Attributes:
        other_bytes: bytes of everything else in the output's weight files, at most.
        saved_milliseconds: (layer, compressed weight) -> how much less time the layer's forward pass takes here.
        done: called with the number of layers that are measured.
        divergence: (an explicit config for each candidate) -> KL divergence of the outputs in nats, measured on the
            running model.
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
    """The target of a search for widths, one for all layers, and how it is measured. Exactly one target is given.

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
        at: (config, width) -> the config with this width, as if the recipe had given it.
        sketch: (layer with at most the norms of its inputs, config) -> roughly what `apply` gives, in a fraction of its
            time.
    """

    search: Callable[[C], WidthSearch | None]
    options: Callable[[C, int], Sequence[Width]]
    at: Callable[[C, Width], C]
    sketch: Callable[[Layer, C], Weight]
