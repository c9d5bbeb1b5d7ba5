"""Block tuning: nearer to the block's outputs than before, or nothing changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aicompress.layer import as_matrix
from aicompress.model.blocks.moving_weights import TunableLayer, TuningSchedule, _Decoded
from aicompress.model.blocks.reconstruction import Stage, error, hidden, tune
from aicompress.weights import Dense, IntGrouped, LowRank, Weight

PACE = TuningSchedule(steps=30, rate=0.03, scale_rate=0.002)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """Two layers with a nonlinearity between, in the way of blocks: hidden states first in a tuple."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24, bias=False), nn.Linear(24, 16)
        with torch.no_grad():
            self.up.weight.copy_(draw(24, 16, seed=1))
            self.down.weight.copy_(draw(16, 24, seed=2))
            self.down.bias.zero_()
        self.to(dtype)

    def forward(self, states: Tensor, *, scale: float) -> tuple[Tensor, None]:
        return states + scale * self.down(torch.relu(self.up(states))), None


def nearest(weight: Tensor, bits: int, symmetric: bool) -> IntGrouped:
    """Round to nearest in groups of 8."""
    groups = weight.float().view(weight.shape[0], -1, 8)
    half = 1 << (bits - 1)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = torch.maximum(-low, high) / half if symmetric else (high - low) / (2 * half - 1)
    zero = None if symmetric else (-half - low / scale).round().clamp(-half, half - 1)
    codes = groups / scale[..., None] + (0 if zero is None else zero[..., None])
    codes = codes.round().clamp(-half, half - 1).to(torch.int8).view(weight.shape)
    return IntGrouped(codes, scale.half(), None if zero is None else zero.to(torch.int8), bits, 8)


def stage_of(block: Block, masks: list[Tensor | None] | None = None) -> Stage:
    inputs: list[Any] = [((draw(4, 6, 16, seed=10 + n).to(block.up.weight.dtype),), {"scale": 0.5}) for n in range(5)]
    with torch.no_grad():
        targets = [block(*args, **kwargs)[0] for args, kwargs in inputs]
    return Stage("block", block, inputs, targets, masks or [None] * 5)


def movables(block: Block, bits: int = 3, symmetric: bool = True) -> list[TunableLayer]:
    named = {"up.weight": block.up.weight.detach(), "down.weight": block.down.weight.detach()}
    return [TunableLayer(name, nearest(w, bits, symmetric), w.float(), tuple(w.shape)) for name, w in named.items()]


def test_decoding_by_hand() -> None:
    """Codes 1.4 -> 1, 9 -> 7 (the end of four bits), with zero 1 and scale 2; gradients pass straight through."""
    latent = torch.tensor([[[1.4, 9.0]]], requires_grad=True)
    scale = torch.tensor([[[2.0]]], requires_grad=True)
    values = _Decoded.apply(latent, scale, torch.tensor([[[1.0]]]), (-8, 7))  # type: ignore[no-untyped-call]
    assert values.tolist() == [[[0.0, 12.0]]]
    (values * torch.tensor([3.0, 5.0])).sum().backward()
    assert latent.grad is not None
    assert scale.grad is not None
    assert latent.grad.tolist() == [[[6.0, 10.0]]]
    assert scale.grad.item() == 30.0  # 3 · 0 + 5 · 6


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_falls(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    block = Block(dtype)
    stage, layers = stage_of(block), movables(block, bits, symmetric)
    before = error(stage, layers, [layer.weight for layer in layers])
    weights = tune(stage, layers, PACE, 0)
    after = error(stage, layers, weights)
    assert after < before if bits == 2 else after <= before  # four bits leave little to mend
    for layer, found in zip(layers, weights, strict=True):
        assert found.scale.dtype == layer.weight.scale.dtype
        assert found.codes.amin() >= -(1 << (bits - 1))
        assert found.codes.amax() <= (1 << (bits - 1)) - 1


def test_what_does_not_help_is_not_taken() -> None:
    block = Block()
    stage, layers = stage_of(block), movables(block, bits=8)
    weights = tune(stage, layers, TuningSchedule(steps=2, rate=1.0, scale_rate=0.1), 0)
    assert all(found is layer.weight for layer, found in zip(layers, weights, strict=True))


def test_the_block_is_left_as_it_was_and_the_seed_decides() -> None:
    block = Block()
    block.up.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    stage, layers = stage_of(block), movables(block)
    codes = [[found.codes for found in tune(stage, layers, PACE, seed)] for seed in (0, 0, 1)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
    assert [p.requires_grad for p in block.parameters()] == [False, True, True]
    assert all(p.grad is None for p in block.parameters())
    assert all(torch.equal(a, b) for a, b in zip(codes[0], codes[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(codes[0], codes[2], strict=True))


def test_padding_does_not_count() -> None:
    block = Block()
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[:, 4:] = False
    stage, layers = stage_of(block, [mask] * 5), movables(block)
    spoiled = [target.masked_fill(~mask[..., None], 1e6) for target in stage.targets]
    weights = [layer.weight for layer in layers]
    other = Stage(stage.name, block, stage.inputs, spoiled, stage.masks)
    assert error(other, layers, weights) == error(stage, layers, weights)


def test_one_scale_for_a_tensor_and_a_transposed_parameter() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(draw(16, 24, seed=3))  # (in, out)

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(torch.zeros(24), x, self.weight)

    block = Turned()
    wanted = as_matrix(block.weight.detach(), transposed=True)
    scale = (wanted.abs().max() / 4).view(1, 1)
    start = IntGrouped((wanted / scale).round().clamp(-4, 3).to(torch.int8), scale, None, 3)
    x = draw(40, 4, seed=4) @ draw(4, 16, seed=5)  # correlated, so that roundings can make up for each other
    stage = Stage("", block, [((x,), {})], [x @ block.weight.detach()], [None])
    layers = [TunableLayer("weight", start, wanted, (16, 24), transposed=True)]
    (found,) = tune(stage, layers, PACE, 0)
    assert found.scale.shape == (1, 1)
    assert error(stage, layers, [found]) < error(stage, layers, [start])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_factors_move_towards_the_targets(dtype: torch.dtype, transposed: bool) -> None:
    """Of unlike sizes, and in the dtype that they had."""
    wanted = draw(24, 16, seed=3)
    u, s, v = torch.linalg.svd(wanted, full_matrices=False)
    start = LowRank(Dense((100 * u[:, :4]).to(dtype)), Dense((0.01 * s[:4, None] * v[:4]).to(dtype)))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(wanted.t().clone() if transposed else wanted.clone())

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight if transposed else self.weight.t())

    x = draw(40, 4, seed=4) @ draw(4, 16, seed=5)  # of four directions, which four ranks can serve
    shape = (16, 24) if transposed else (24, 16)
    stage = Stage("", Layer(), [((x,), {})], [x @ wanted.t()], [None])
    layers = [TunableLayer("weight", start, wanted, shape, transposed)]
    (found,) = tune(stage, layers, TuningSchedule(60, 0.01, 0.001, factor_rate=0.05), 0)
    assert found.specs() == start.specs()
    assert error(stage, layers, [found]) < 0.5 * error(stage, layers, [start])


def test_what_is_all_zero_moves_as_well() -> None:
    """A bias that was never trained, and a factor without effect yet, beside a row of zeros whose scale is 0."""
    block = Block()
    block.up.weight.data[0] = 0
    matrix = block.up.weight.detach()
    codes = nearest(matrix + 1e-9, 4, True)
    codes.scale[0] = 0
    nothing = LowRank(Dense(torch.zeros(16, 2)), Dense(draw(2, 24, seed=6)))
    start: dict[str, Weight] = {"up.weight": codes, "down.weight": nothing, "down.bias": Dense(torch.zeros(1, 16))}
    inputs: list[Any] = [((draw(4, 6, 16, seed=10 + n),), {"scale": 0.5}) for n in range(5)]
    with torch.no_grad():
        targets = [block(*args, **kwargs)[0] + 0.25 for args, kwargs in inputs]
    stage = Stage("block", block, inputs, targets, [None] * 5)
    wanted = {"up.weight": matrix, "down.weight": block.down.weight.detach(), "down.bias": torch.zeros(1, 16)}
    layers = [
        TunableLayer(name, weight, wanted[name], tuple(block.get_parameter(name).shape))
        for name, weight in start.items()
    ]
    tuned = tune(stage, layers, TuningSchedule(40, 0.01, 0.001, factor_rate=0.1), 0)
    assert error(stage, layers, tuned) < 0.8 * error(stage, layers, list(start.values()))
    assert not tuned[0].dense()[0].any()
    assert tuned[1].dense().any()
    assert tuned[2].dense().all()


def test_hidden_states_among_outputs() -> None:
    states = torch.ones(2)
    for output in (states, (states, None), [torch.ones(1, dtype=torch.int64), states], {"states": states}):
        assert hidden(output) is states
    assert hidden((None, "x")) is None
