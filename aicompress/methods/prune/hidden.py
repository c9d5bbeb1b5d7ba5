"""Narrow the residual stream: the same coordinates go from every tensor that adds to it, reads it or normalises it.

    norm        sum over all matrices of the squared norm of a coordinate's rows and columns, each matrix's scaled to a
                mean of 1; data-free
    activation  sum over all readers of the mean |x| of what they are given, the norms' outputs (Minitron, Muralidharan
                et al. 2024, arXiv:2407.14679, section 2.2)
    taylor      w² E[g²] added up over a coordinate's rows and columns of all matrices, g the gradient of a sample's
                loss (Molchanov et al. 2019, arXiv:1906.10771, eq. 8)
Where the size of heads follows from the hidden width, as in BERT and GPT-2, as large a share of every head goes, by the
product of the norms of what makes an entry and what reads it.

What reads the stream is then fitted to what it gave: with x the norm's output and K the coordinates that stay,
W' = W E[x x_Kᵀ] E[x_K x_Kᵀ]⁻¹, and its bias takes the mean (see `units.obs`). A norm over fewer coordinates gives other
values for the rest as well, which no weight can undo.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.errors import CompressError, RecipeError
from aicompress.methods.capabilities import Reads
from aicompress.methods.method import GradientLoss
from aicompress.methods.prune.units import obs, units
from aicompress.methods.prune.units.size_targets import TARGETS, TargetedConfig, multiples
from aicompress.methods.structural import Refits, StructuralMethod, Structure, Unit

STREAM = "hidden"  # the structure of the stream's coordinates; others are heads whose size is a share of it


@dataclass(frozen=True)
class Coordinates(Unit):
    """Coordinates of the residual stream.

    Attributes:
        exact: the width is given; otherwise it is rounded up to one that the architecture takes.
    """

    plural: ClassVar[str] = "hidden"
    exact: bool = False


class HiddenConfig(TargetedConfig):
    """Parameters of hidden. Exactly one of sparsity, keep, hidden_size and the targets."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"sparsity": 0.125}, {"keep": 0.75, "score": "activation"}]}
    )
    one_of: ClassVar[tuple[str, ...]] = ("sparsity", "keep", "hidden_size", *TARGETS)

    name: Literal["hidden"] = "hidden"
    sparsity: float | None = Field(None, ge=0, lt=1, description="share of the coordinates to drop")
    keep: float | None = Field(None, gt=0, le=1, description="share of the coordinates to keep")
    hidden_size: int | None = Field(None, ge=1, description="the hidden width afterwards")
    multiple: int = Field(
        8, ge=1, description="round the width up to a multiple of this, which kernels like; not for hidden_size"
    )
    score: Literal["norm", "activation", "taylor"] = Field(
        "norm",
        description="how a coordinate is judged: by all its weights (data-free), by what the readers see, or by what "
        "the loss changes without its weights",
    )
    refit: bool | None = Field(
        None, description="fit what reads the stream to what it gave; by default with every score but norm"
    )
    loss: GradientLoss = Field(
        "auto", description="for taylor: of the labels (task), of the model's own predictions (own), or what there is"
    )
    damping: float = Field(0.001, gt=0, le=1, description="added to the Gram matrix, as a part of its mean diagonal")

    @property
    def refits(self) -> bool:
        """Whether readers are refitted."""
        return self.score != "norm" if self.refit is None else self.refit

    @property
    def gradient_loss(self) -> GradientLoss:
        """The loss whose gradients taylor reads."""
        return self.loss

    def candidates(self, size: int) -> list[int]:
        """Widths that are multiples, from the present one down."""
        return multiples(size, self.multiple)


def sizes(structures: Sequence[Structure], config: HiddenConfig) -> list[int]:
    """The hidden width afterwards, once for each structure.

    Raises:
        RecipeError: wider than it is.
    """
    stream = structures[0]
    if config.hidden_size is None:
        share = config.keep if config.keep is not None else 1 - (config.sparsity or 0.0)
        return [units.rounded(stream.size, share, config.multiple)] * len(structures)
    if config.hidden_size > stream.size:
        raise RecipeError(
            f"method.hidden_size is {config.hidden_size}, but the stream has {stream.size} coordinates",
            "choose a smaller one",
        )
    return [config.hidden_size] * len(structures)


def statistics(config: HiddenConfig) -> frozenset[str]:
    """Statistics that a config reads."""
    gram = {"gram", "mean"} if config.refits else set()
    scores = {"activation": {"mean_abs"}, "taylor": {"gradients"}}
    return frozenset(gram | scores.get(config.score, set()))


def keep(stream: Structure, size: int, config: HiddenConfig) -> list[int]:
    """Coordinates that stay, ascending: those of highest score, the earlier of equals; of each head as many."""
    if size == stream.size:
        return list(range(size))
    if stream.name != STREAM:
        return units.keep(stream, size, units.UnitsConfig(name="hidden", score="product"))
    if config.score == "taylor":
        assert stream.importance is not None  # the driver adds it up where gradients are read
        scores = stream.importance
    else:
        scores = activations(stream) if config.score == "activation" else norms(stream)
    return units.highest(scores, 1, size)


def norms(stream: Structure) -> Tensor:
    """Squared norms of each coordinate's rows and columns over all matrices, (coordinates,) float64."""
    total = torch.zeros(stream.size, dtype=torch.float64)
    for part in stream.parts:
        if part.role == "offset" or part.single:
            continue
        squares = part.power_sums()
        if float(squares.mean()) > 0:
            total += squares / squares.mean()
    return total


def activations(stream: Structure) -> Tensor:
    """Mean |x| of each coordinate, summed over the readers that were reached, (coordinates,) float64.

    Raises:
        CompressError: none was.
    """
    seen = [inputs.mean_abs for inputs in stream.inputs.values() if inputs.count and inputs.mean_abs is not None]
    if not seen:
        raise CompressError("no calibration token reached a reader of the stream", "check the calibration data")
    return torch.stack(seen).double().sum(dim=0)


def refit(stream: Structure, kept: Sequence[int], config: HiddenConfig) -> Mapping[str, Tensor]:
    """New values of the readers whose statistics are there, and of their biases, by tensor."""
    if not config.refits or len(kept) == stream.size:
        return {}
    read = obs.consumers(stream, config.damping)
    return {name: value for consumer in read for name, value in consumer.refitted(kept).items()}


METHOD = StructuralMethod[HiddenConfig](
    name="hidden",
    command="prune",
    summary="narrow the hidden width of a transformer by weight norm, activation or gradient; loads everywhere",
    when="all layers narrower at once; loses far more than width, so distil afterwards",
    config=HiddenConfig,
    unit=lambda config: Coordinates(config.hidden_size is not None),
    sizes=sizes,
    keep=keep,
    reading=Reads(statistics),
    refits=Refits(lambda config: config.refits, refit),
)
