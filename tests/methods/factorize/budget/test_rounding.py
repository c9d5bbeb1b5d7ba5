"""What factors lose beside rounding in as many bytes, weighed as their method weighs it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aicompress.layer import Layer
from aicompress.measure import rel_error
from aicompress.methods import methods
from aicompress.methods.factorize import svd, two_sided
from aicompress.methods.factorize.svd import SvdConfig
from aicompress.methods.factorize.two_sided import TwoSidedConfig
from aicompress.methods.factorize.weighting.roots import Root, Weighting
from aicompress.methods.layerwise import LayerMethod
from aicompress.pipeline.layerwise.compress import parts_of_bytes
from aicompress.pipeline.layerwise.report_rows import rounded_note
from aicompress.statistics import GradientStats
from aicompress.weights import outline_nbytes
from tests.methods.factorize.test_whitened import correlated, inputs_of
from tests.methods.layers import layer_of, randn


def both(method: LayerMethod, layer: Layer, rank: int) -> tuple[float, float, int]:
    config = method.config(name=method.name, rank=rank)  # type: ignore[call-arg]
    weight = method.apply(layer, config)
    given = method.rounded(layer, config, weight, outline_nbytes(weight))
    assert given is not None
    return given.error, given.instead_of, given.bits


@pytest.mark.parametrize("outputs", [None, "diagonal", "full"])
def test_an_error_is_weighed_as_the_roots_weigh_it(outputs: str | None) -> None:
    rows, columns = correlated(40, 12, 0), correlated(30, 7, 1)
    right = Root.of(rows.t() @ rows, 0.1)
    left = {"diagonal": Root.diagonal(torch.rand(7), 0.2), "full": Root.of(columns.t() @ columns, 0.2)}.get(
        outputs or ""
    )
    weighting, change = Weighting(right, left), randn(7, 12)
    assert weighting.error(change) == pytest.approx(float(weighting.of(change).square().sum()), rel=1e-5)


def test_noise_is_better_rounded_and_what_is_of_low_rank_is_not() -> None:
    noise = layer_of(randn(64, 96))
    error, instead_of, bits = both(svd.METHOD, noise, 12)  # 7680 bytes: codes of 8 bits and scales take 6400
    assert bits == 8
    weight = svd.apply(noise, SvdConfig(rank=12))
    assert instead_of == pytest.approx(float((noise.weight - weight.dense()).norm() / noise.weight.norm()), rel=1e-5)
    assert error < 0.01 < instead_of
    low_rank = layer_of(randn(64, 3) @ randn(3, 96, seed=1))
    error, instead_of, bits = both(svd.METHOD, low_rank, 4)
    assert bits == 3
    assert instead_of < 1e-5 < error


def test_the_error_is_of_what_the_method_weighs() -> None:
    """Rows that the loss does not feel may be lost."""
    felt = torch.diag((torch.arange(32) < 3).float())
    layer = layer_of(randn(32, 64), inputs=inputs_of(torch.eye(64)), gradients=GradientStats(4, output_gram=felt))
    config = TwoSidedConfig(rank=3, damping=0, output_damping=0)
    weight = two_sided.METHOD.apply(layer, config)
    given = two_sided.METHOD.rounded(layer, config, weight, outline_nbytes(weight))
    assert given is not None
    assert given.instead_of < 1e-5 < given.error
    assert rounded_note(given) == ""


@pytest.mark.parametrize("weight", [torch.zeros(64, 96), randn(1, 64), randn(64, 1), 1e30 * randn(64, 96)], ids=str)
def test_where_nothing_can_be_said(weight: Tensor) -> None:
    layer, config = layer_of(weight), SvdConfig(rank=1)
    compressed = svd.apply(layer, config)
    given = svd.METHOD.rounded(layer, config, compressed, outline_nbytes(compressed))
    assert rounded_note(given) == ""
    assert given is None or outline_nbytes(compressed) < 4 * weight.numel()


SPLITS = ("tie", "joint", "tucker", "spatial")  # equal matrices, products of heads, and convolutions as svd has them


@pytest.mark.parametrize("name", [name for name in methods("factorize") if name not in SPLITS])
def test_every_method_says_what_rounding_noise_in_its_bytes_would_lose(name: str) -> None:
    """Layers that share their part of the bytes: half of what both take."""
    method = methods("factorize")[name]
    assert isinstance(method, LayerMethod)
    stats = inputs_of(torch.eye(64))
    graded = GradientStats(4, torch.ones(64, 64), 2 * torch.ones(64, 64), torch.eye(64))
    layers = [layer_of(randn(64, 64, seed=seed), f"layers.{seed}.fc", stats, graded) for seed in (0, 1)]
    config = method.config(name=name, **({"rank": 4} if name == "residual" else {"keep": 0.8}))  # type: ignore[call-arg]
    weights = [method.apply(layers[0], config)]
    sizes = [outline_nbytes(weights[0])]
    if method.shares is not None:
        weights = method.shares.compress(layers, config)
        sizes = parts_of_bytes(weights, method.shares.part)
        tensors = {tensor.data_ptr(): tensor.nbytes for weight in weights for tensor in weight.tensors().values()}
        assert sum(sizes) == sum(tensors.values())
    for layer, weight, size in zip(layers, weights, sizes, strict=False):
        given = method.rounded(layer, config, weight, size)
        assert given is not None
        assert rounded_note(given) or name == "residual"  # it rounds as well
        assert given.instead_of == pytest.approx(rel_error(layer.weight, weight), rel=1e-3)
