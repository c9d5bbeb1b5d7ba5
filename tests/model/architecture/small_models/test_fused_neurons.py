from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from aicompress.model.architecture.small_models.fused_neurons import NARROW, WIDE, lies_in_halves


class Gated(nn.Module):
    """A feed-forward layer with a fused gate and up projection."""

    def __init__(self, width: int, interleaved: bool) -> None:
        super().__init__()
        self.gate_up = nn.Linear(5, 2 * width)
        self.down = nn.Linear(width, 5)
        self.interleaved = interleaved

    def forward(self, states: Tensor) -> Tensor:
        fused = self.gate_up(states)
        gate, up = (fused[..., ::2], fused[..., 1::2]) if self.interleaved else fused.chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)


class Routed(Gated):
    def forward(self, states: Tensor, routing: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(states) * routing


def model(layer: type[Gated], width: int, interleaved: bool) -> nn.Module:
    with torch.device("meta"):
        return nn.ModuleDict({"block": nn.ModuleDict({"mlp": layer(width, interleaved)})})


@pytest.mark.parametrize(
    ("layer", "interleaved", "expected"), [(Gated, False, True), (Gated, True, False), (Routed, False, False)]
)
def test_tells_halves_from_interleaved(layer: type[Gated], interleaved: bool, expected: bool) -> None:
    wide, narrow = model(layer, WIDE, interleaved), model(layer, NARROW, interleaved)
    assert lies_in_halves(wide, narrow) == expected


def test_a_rounded_number_of_neurons_cannot_be_told() -> None:
    """Where an architecture makes more neurons than config.json says, few are not doubled."""
    with torch.device("meta"):
        wide, narrow = (nn.ModuleDict({"mlp": nn.Linear(width, 5)}) for width in (WIDE, NARROW))
    assert not lies_in_halves(wide, narrow)
