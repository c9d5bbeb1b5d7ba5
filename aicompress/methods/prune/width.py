"""Drop neurons of feed-forward layers, as many in every layer: the result is a plain, narrower model.

A neuron is one row of each producer (gate, up or fc1, with its bias) and one column of each consumer (down or fc2). Its
score is made of the L2 norms of these slices (Li et al. 2017, arXiv:1608.08710, for filters). `product` multiplies
them: scaling a producer and unscaling its consumer leaves both the function and the score as they are. `sum` adds
their squares, the group norm of DepGraph (Fang et al. 2023, arXiv:2301.12900, eq. 4). With calibration data,
`taylor` adds up w² E[g²] over a neuron's weights, g the gradient of a sample's loss (Molchanov et al. 2019,
arXiv:1906.10771, eq. 8), `activation` is the mean |x| of what the neuron gives (Minitron, Muralidharan et al. 2024,
arXiv:2407.14679, section 2.2) and `obs` structured optimal brain surgeon: what the consumer's output loses when the
neurons that stay have taken over as well as they can, which the refit then lets them do (see `units.obs`). Layers of
unlike widths share out what any of these scores loses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict, Field

from aicompress.errors import RecipeError
from aicompress.methods.capabilities import Reads
from aicompress.methods.prune.units import units
from aicompress.methods.prune.units.size_targets import TARGETS, multiples
from aicompress.methods.structural import AllocatesSizes, Refits, StructuralMethod, Structure, Unit

POINTS = 48  # widths of a layer that are tried


@dataclass(frozen=True)
class Neurons(Unit):
    """Neurons of feed-forward layers.

    Attributes:
        uniform: layers that config.json counts together keep equal numbers of them, so that it can say the width.
    """

    plural: ClassVar[str] = "neurons"
    uniform: bool = True


class WidthConfig(units.UnitsConfig):
    """Parameters of width. Exactly one of sparsity, keep, intermediate_size and the targets."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"sparsity": 0.5}, {"keep": 0.75, "score": "sum"}]})
    one_of: ClassVar[tuple[str, ...]] = ("sparsity", "keep", "intermediate_size", *TARGETS)

    name: Literal["width"] = "width"
    sparsity: float | None = Field(None, ge=0, lt=1, description="share of the neurons to drop")
    keep: float | None = Field(None, gt=0, le=1, description="share of the neurons to keep")
    intermediate_size: int | None = Field(None, ge=1, description="neurons of each feed-forward layer afterwards")
    multiple: int = Field(
        8, ge=1, description="round the width up to a multiple of this, which kernels like; not for intermediate_size"
    )
    widths: Literal["uniform", "per_layer"] = Field(
        "uniform",
        description="per_layer: layers keep unlike numbers of neurons, as many parameters in total, where the score "
        "loses least; loads with aicompress, and in transformers with trust_remote_code",
    )

    def probing(self) -> WidthConfig:
        """The same with equal widths, which take as many parameters."""
        return self.model_copy(update={"widths": "uniform"})

    def candidates(self, size: int) -> list[int]:
        """Widths that are multiples, from the present one down."""
        return multiples(size, self.multiple)


def sizes(structures: Sequence[Structure], config: WidthConfig) -> list[int]:
    """Width of each feed-forward layer afterwards.

    Raises:
        RecipeError: wider than it is.
    """
    return [_size(layer, config) for layer in structures]


def _size(layer: Structure, config: WidthConfig) -> int:
    width = layer.size // layer.groups  # of each expert, where one tensor holds several
    if config.intermediate_size is not None:
        if config.intermediate_size > width:
            raise RecipeError(
                f"method.intermediate_size is {config.intermediate_size}, but {layer.name} has {width} neurons",
                "choose a smaller one",
            )
        return config.intermediate_size * layer.groups
    share = config.keep if config.keep is not None else 1 - (config.sparsity or 0.0)
    return units.rounded(width, share, config.multiple) * layer.groups


def tried(neurons: int, config: WidthConfig) -> list[int]:
    """Widths of a layer that are tried, multiples from all neurons down."""
    step = max(config.multiple, -(-neurons // (POINTS * config.multiple)) * config.multiple)
    return multiples(neurons, step)


def loss_statistics(config: WidthConfig) -> frozenset[str]:
    """What the losses of unlike widths read of the original model."""
    by_score = {"obs": {"gram", "mean"}, "activation": {"mean_abs"}, "taylor": {"gradients"}}
    return frozenset(by_score.get(config.score, set()))


METHOD = StructuralMethod[WidthConfig](
    name="width",
    command="prune",
    summary="drop feed-forward neurons by weight norm, activation or structured OBS, as many in every layer; loads "
    "everywhere",
    when="feed-forward layers that take most of bytes and time: the structural cut that loses least",
    config=WidthConfig,
    unit=lambda config: Neurons(config.widths == "uniform"),
    sizes=sizes,
    keep=units.keep,
    reading=Reads(units.statistics, units.shift),
    refits=Refits(units.refits, units.refit),
    allocates=AllocatesSizes(lambda config: config.widths == "per_layer", loss_statistics, tried, units.losses),
)
