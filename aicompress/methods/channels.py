"""Channel methods: layers of any network lose the channels together that depend on one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

from torch import Tensor

from aicompress.methods.method import Method, MethodConfig
from aicompress.methods.structural import Structure

KeptUnits = list[list[int]]  # the units of each group that stay, ascending
SaliencyKind = Literal["activation", "taylor"]


@dataclass(frozen=True)
class Channels:
    """Units that are removed together from every layer that computes or reads them.

    Attributes:
        structure: name, number of units, and what the tensors of the layers give to each.
        cohorts: a label for each unit, from 0; as many must stay of every cohort.
        saliency: of each unit on calibration data, (units,), where the method asks for it.
    """

    structure: Structure
    cohorts: tuple[int, ...]
    saliency: Tensor | None = None


@dataclass(frozen=True)
class Limits:
    """What a network with fewer channels may hold or take at most; None where there is no such limit.

    Attributes:
        parameters: numbers, buffers included.
        nbytes: of the weight files.
        latency: forward time, as a part of the whole network's.
    """

    parameters: int | None = None
    nbytes: int | None = None
    latency: float | None = None


@dataclass(frozen=True)
class ChannelSettings:
    """What the parameters of a channel method ask of the driver.

    Attributes:
        saliency: what is measured of each unit on calibration data, or None.
        share: of the channels of every group that stays; None where groups keep unlike shares, or a limit decides.
        compares_groups: how many channels of a group stay depends on the scores of other groups.
        multiple: the channels of a group are rounded up to a multiple of this.
        limits: what the network may hold or take.
        refit: fit the layers that lost inputs to what they gave; None: where there is calibration data.
        recalibrate_norms: estimate the statistics of batch norms anew; None: where there is calibration data.
        damping: ridge of the fit, as a share of the mean squared input.
        input_shape: shape of one input without the batch, or None.
        data_fields: parameters that need calibration data, each as "name: value".
    """

    saliency: SaliencyKind | None
    share: float | None
    compares_groups: bool
    multiple: int
    limits: Limits
    refit: bool | None
    recalibrate_norms: bool | None
    damping: float
    input_shape: tuple[int, ...] | None
    data_fields: tuple[str, ...]


C = TypeVar("C", bound=MethodConfig)


@dataclass(frozen=True)
class ChannelMethod(Method, Generic[C]):
    """A pure choice of the channels that stay.

    Attributes:
        config: the class of its parameters.
        settings: config -> what it asks of the driver.
        choose: (groups, config, fits) -> the units of each group that stay. `fits` tells whether the network with such
            a choice is within the limits. Deterministic.
        choose_sized: (group, how many, config) -> the units of one group that stay where their number is given.
    """

    config: type[C]
    settings: Callable[[C], ChannelSettings] = field(kw_only=True)
    choose: Callable[[Sequence[Channels], C, Callable[[KeptUnits], bool]], KeptUnits] = field(kw_only=True)
    choose_sized: Callable[[Channels, int, C], list[int]] = field(kw_only=True)

    kind: ClassVar[str] = "channels"

    def with_config(self, config: MethodConfig) -> ChannelPruner[C]:
        """The method with its parameters.

        Raises:
            TypeError: they are another method's.
        """
        if not isinstance(config, self.config):
            raise TypeError(f"{self.name} does not take {type(config).__name__}")
        return ChannelPruner(self, config)


@dataclass(frozen=True)
class ChannelPruner(Generic[C]):
    """A channel method with its parameters."""

    method: ChannelMethod[C]
    config: C

    @property
    def settings(self) -> ChannelSettings:
        """What it asks of the driver."""
        return self.method.settings(self.config)

    def choose(self, groups: Sequence[Channels], fits: Callable[[KeptUnits], bool]) -> KeptUnits:
        """The units of each group that stay.

        Raises:
            RecipeError: the limits cannot be met.
        """
        return self.method.choose(groups, self.config, fits)

    def choose_sized(self, group: Channels, size: int) -> list[int]:
        """The units of one group that stay where their number is given."""
        return self.method.choose_sized(group, size, self.config)


AnyChannelPruner: TypeAlias = ChannelPruner[Any]  # found by name: the class of its parameters is known to it alone
