"""Offload large parameters of a running model: freed, and read from the file again when the model asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

LEAST = 1 << 24  # bytes of a parameter that is worth a second read


@dataclass
class Offload:
    """Parameters that share one tensor and are offloaded together.

    Attributes:
        fetch: puts the tensor into all of them.
        out: it has not been asked for.
    """

    fetch: Callable[[], None]
    out: bool = True

    def end(self) -> None:
        """Bring the parameters back; fetching may itself look them up."""
        if self.out:
            self.out = False
            self.fetch()


class OffloadedParameters(dict[str, nn.Parameter | None]):
    """The parameters of one module, of which some are away until they are read.

    A module looks its parameters up here whoever asks for them, so that none can be read while it is away. Going
    through all of them fetches none.

    Attributes:
        away: what brings back each parameter that is away, by name.
    """

    def __init__(self, parameters: dict[str, nn.Parameter | None]) -> None:
        super().__init__(parameters)
        self.away: dict[str, Offload] = {}

    def __getitem__(self, leaf: str) -> nn.Parameter | None:
        offloaded = self.away.pop(leaf, None)
        if offloaded is not None:
            offloaded.end()
        return super().__getitem__(leaf)

    def __setitem__(self, leaf: str, parameter: nn.Parameter | None) -> None:
        self.away.pop(leaf, None)
        super().__setitem__(leaf, parameter)


def offload(module: nn.Module, leaf: str, offloaded: Offload) -> None:
    """Mark a parameter on the meta device as offloaded: it is read again when the model asks for it."""
    if not isinstance(module._parameters, OffloadedParameters):
        module._parameters = OffloadedParameters(module._parameters)
    module._parameters.away[leaf] = offloaded
