"""tucker: exact where the ranks are the layer's, the error identity, HOOI against HOSVD, and what it wins over svd."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from aicompress.methods.factorize import svd, tucker
from aicompress.methods.factorize.streamed import Rows
from aicompress.methods.factorize.svd import SvdConfig
from aicompress.methods.factorize.tucker import METHOD, TuckerConfig, apply, factors, outline, ranks_of, resolve
from aicompress.weights import Convolutions, Dense, outline_nbytes
from tests.methods.layers import candidate_of, convolution, randn, squared_error


def few_channels(out: int, channels: int, ranks: tuple[int, int], noise: float) -> Tensor:
    """A 3×3 kernel of few channels between two mixtures of channels, and noise."""
    core, outer, inner = randn(*ranks, 3, 3), randn(out, ranks[0], seed=1), randn(channels, ranks[1], seed=2)
    return torch.einsum("rsyx,or,is->oiyx", core, outer, inner) + noise * randn(out, channels, 3, 3, seed=3)


def test_hand_computed() -> None:
    """Outputs that all are one pattern of two inputs that go together: one channel before the core, one after it."""
    pattern = torch.arange(9.0).reshape(3, 3)
    weight = torch.einsum("o,i,yx->oiyx", torch.tensor([1.0, 2, 0, -1]), torch.tensor([3.0, 4.0]), pattern)
    found = apply(convolution(weight), TuckerConfig(rank=1))
    assert isinstance(found, Convolutions)
    assert found.kernels == ((1, 1), (3, 3), (1, 1))
    torch.testing.assert_close(found.dense(), weight.flatten(1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.inner.dense().abs(), torch.tensor([[0.6, 0.8]]))


@pytest.mark.parametrize(("shape", "ranks"), [((16, 8, 3, 3), (5, 3)), ((6, 12, 5), (6, 4)), ((4, 6, 2, 3, 2), (2, 6))])
def test_the_squared_error_is_what_the_core_lacks(shape: tuple[int, ...], ranks: tuple[int, int]) -> None:
    """Of convolutions along one, two and three axes, also where one side keeps all of its channels."""
    layer = convolution(randn(*shape))
    found = apply(layer, TuckerConfig(rank=ranks[0], in_rank=ranks[1]))
    assert isinstance(found, Convolutions)
    assert found.core is not None
    assert found.channels == (ranks[1], ranks[0])
    squares = [float(each.double().square().sum()) for each in (layer.weight, found.core.dense())]
    assert squared_error(layer, found) == pytest.approx(squares[0] - squares[1], rel=1e-4)
    assert outline(layer.info, TuckerConfig(rank=ranks[0], in_rank=ranks[1])).specs() == found.specs()


@pytest.mark.parametrize("panel", [300, 1 << 20], ids=["two directions at a time", "all directions"])
def test_sweeps_lose_less_than_the_first_choice(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tucker, "PANEL", panel)
    weight = randn(16, 12, 9).double()
    rows, lost = Rows((16, 108), [lambda: weight[:10].flatten(1), lambda: weight[10:].flatten(1)]), list[float]()
    for sweeps in range(4):
        outer, core, inner = factors(rows, 12, (4, 3), sweeps)
        lost.append(float((weight - torch.einsum("rsk,or,is->oik", core.view(4, 3, 9), outer, inner)).square().sum()))
    assert lost == sorted(lost, reverse=True)
    assert lost[3] < 0.995 * lost[0]
    assert lost[3] == pytest.approx(1460.7214)  # by unfoldings that are held whole


def test_few_channels_lose_less_than_with_svd_at_as_many_bytes() -> None:
    layer = convolution(few_channels(32, 24, (6, 5), 0.1))
    ours, plain = apply(layer, TuckerConfig(rank=6, in_rank=5)), svd.apply(layer, SvdConfig(rank=3))
    assert outline_nbytes(ours) <= outline_nbytes(plain)
    assert squared_error(layer, ours) < 0.1 * squared_error(layer, plain)


def test_keep_is_a_share_of_the_parameters() -> None:
    info = convolution(randn(32, 24, 3, 3)).info
    for keep in (0.1, 0.3, 0.6, 1.0):
        found = outline(info, TuckerConfig(keep=keep))
        assert found.numbers() <= keep * 32 * 24 * 9 < found.numbers() + 32 * 9 * 24
        ranks = ranks_of(info, TuckerConfig(keep=keep, multiple=4))
        assert ranks is not None
        assert not any(rank % 4 for rank in ranks)


def test_energy_decides_on_each_side() -> None:
    layer = convolution(few_channels(32, 24, (6, 5), 0.001))
    (config,) = resolve([candidate_of(layer, TuckerConfig(energy=0.9999))], 0)
    assert (config.rank, config.in_rank) == (6, 5)


def test_a_layer_that_would_grow_stays_as_it_is() -> None:
    layer = convolution(randn(12, 6, 3, 3).half())
    found = apply(layer, TuckerConfig(rank=1000))
    assert isinstance(found, Dense)
    assert torch.equal(found.matrix, layer.weight.half())
    assert METHOD.describe(TuckerConfig(rank=1000), found)["note"]


@pytest.mark.parametrize("shape", [(8, 4, 1, 1), (8, 1, 3, 3), (8, 4)], ids=str)
def test_what_is_no_convolution_of_several_channels_stays_as_it_is(shape: tuple[int, ...]) -> None:
    layer = convolution(randn(*shape))
    assert not METHOD.suits(layer.info)
    assert isinstance(apply(layer, TuckerConfig(rank=1)), Dense)


def test_zero_kernels_stay_zero() -> None:
    assert not apply(convolution(torch.zeros(12, 6, 3, 3)), TuckerConfig(rank=2)).dense().any()


@pytest.mark.parametrize("fields", [{}, {"rank": 2, "keep": 0.5}, {"keep": 0.5, "in_rank": 2}, {"rank": 0}])
def test_refused_parameters(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        TuckerConfig.model_validate(fields)
