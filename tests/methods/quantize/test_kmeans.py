from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from aicompress.methods.quantize.grid.centroids import EXACT, centroids_of, cluster, distinct, histogram, nearest
from aicompress.methods.quantize.kmeans import KmeansConfig, apply
from aicompress.methods.quantize.rtn import RtnConfig
from aicompress.methods.quantize.rtn import apply as rtn
from aicompress.methods.quantize.squeezellm import SqueezellmConfig
from aicompress.methods.quantize.squeezellm import apply as squeezellm
from tests.methods.quantize.layers import correlated, gaussian, layer_of


def cost(values: Tensor, weights: Tensor, tables: Tensor) -> float:
    found = tables.gather(1, nearest(values, tables))
    return float((weights * (values - found).square()).sum())


def test_by_hand() -> None:
    """0, 1 and 10, 11 with the last counted three times: centroids 1/2 and (10 + 33)/4."""
    values, weights = torch.tensor([[10.0, 0.0, 11.0, 1.0]]), torch.tensor([[1.0, 1.0, 3.0, 1.0]])
    assert cluster(values, weights, 2, 10).tolist() == [[0.5, 10.75]]


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_as_many_values_as_the_table_holds_are_exact(bits: int, granularity: str) -> None:
    values = gaussian(1 << bits).half().float()
    weight = values[torch.randint(0, 1 << bits, (16, 256), generator=torch.Generator().manual_seed(1))]
    config = KmeansConfig(bits=bits, granularity=granularity, group_size=64)  # type: ignore[arg-type]
    assert torch.equal(apply(layer_of(weight), config).dense(), weight)


def test_few_values_are_clustered_optimally() -> None:
    """Against every way to cut 9 sorted points into 3 intervals."""
    values = gaussian(1, 9, seed=3).double()
    weights = gaussian(1, 9, seed=4).double().abs() + 0.1
    points, mass = distinct(values, weights)
    least = min(
        sum(
            float(
                (
                    mass[:, a:b] * (points[:, a:b] - (mass[:, a:b] * points[:, a:b]).sum() / mass[:, a:b].sum()) ** 2
                ).sum()
            )
            for a, b in itertools.pairwise((0, *cuts, 9))
        )
        for cuts in itertools.combinations(range(1, 9), 2)
    )
    assert cost(values, weights, cluster(values, weights, 3, 0)) == pytest.approx(least, rel=1e-9)


def test_many_values_come_near_the_gaussian_optimum() -> None:
    """The optimal 16-level quantizer of a Gaussian has error 0.009497 (Max 1960)."""
    values = gaussian(2, 50_000)
    assert values.shape[1] > EXACT
    tables = cluster(values, torch.ones_like(values), 16, 200)
    assert cost(values.double(), torch.ones_like(values), tables) / values.numel() == pytest.approx(0.009497, rel=0.02)


def test_iterations_never_raise_the_cost() -> None:
    values = gaussian(4, 1000)
    ones = torch.ones_like(values)
    costs = [cost(values.double(), ones.double(), cluster(values, ones, 8, n)) for n in (0, 1, 5, 50)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_the_uniform_grid(bits: int) -> None:
    layer = layer_of(gaussian(16, 512))
    plain = rtn(layer, RtnConfig(bits=bits, granularity="channel", range="mse")).dense()  # type: ignore[arg-type]
    found = apply(layer, KmeansConfig(bits=bits)).dense()  # type: ignore[arg-type]
    assert (found - layer.weight).square().sum() < (plain - layer.weight).square().sum()


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_weights_of_the_inputs_lower_the_weighted_error(granularity: str) -> None:
    layer = layer_of(gaussian(16, 256), correlated(300, 256))
    assert layer.inputs is not None
    assert layer.inputs.norms is not None
    plain = apply(layer, KmeansConfig(bits=3, granularity=granularity)).dense()  # type: ignore[arg-type]
    found = squeezellm(layer, SqueezellmConfig(bits=3, granularity=granularity)).dense()  # type: ignore[arg-type]
    h = layer.inputs.norms
    assert (h * (found - layer.weight).square()).sum() < (h * (plain - layer.weight).square()).sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_histogram_of_blocks_holds_the_distinct_values(dtype: torch.dtype) -> None:
    edges = torch.tensor([0.0, -0.0, 1e-7, -65504.0, 3.0]).repeat(10)
    values = torch.cat([gaussian(60, 50), edges[None]]).to(dtype).float()
    points, counts = histogram([lambda block=block: block for block in values.split(7)])
    expected, mass = distinct(
        values.reshape(1, -1).to(torch.float64), torch.ones(1, values.numel(), dtype=torch.float64)
    )
    assert torch.equal(points, expected)
    assert torch.equal(counts, mass)


def test_centroids_of_a_histogram_are_those_of_the_values() -> None:
    """Of float32 values it leaves out bits that no table has."""
    values = gaussian(200, 100)
    exact = cluster(values.reshape(1, -1), torch.ones(1, values.numel()), 16, 50)
    close = centroids_of(*histogram([lambda: values[:90], lambda: values[90:]]), 16, 50)
    flat = values.reshape(1, -1)
    lost = [cost(flat, torch.ones_like(flat), table.float()) for table in (exact, close)]
    assert lost[1] <= 1.0001 * lost[0]
