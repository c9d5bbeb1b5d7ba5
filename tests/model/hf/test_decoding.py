"""The decoding that travels with a checkpoint equals the package's own, and lets gradients through."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aicompress.model.hf.decoding_aicompress import decode, source
from aicompress.model.hf.layers_aicompress import attach, mark_ready
from aicompress.weights import (
    Codebook,
    ColumnScaled,
    Convolutions,
    Corrected,
    Dense,
    IntGrouped,
    LowRank,
    Sparse,
    SparseCodes,
    Weight,
)
from aicompress.weights.decoding import rounded_input
from tests.model.compressed import halved, integers, low_rank
from tests.weights.forms import FORMS


def matrix(out: int, columns: int) -> Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(out * columns))


def running(module: nn.Module, weight: Weight, transposed: bool = False) -> nn.Module:
    """The module with its weight stored."""
    shape = list(module.weight.shape)
    entry = {"shape": shape, "meta": weight.meta(), "transposed": transposed}
    attach(module, entry, weight.tensors())
    mark_ready(module)
    return module.eval()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("columns", "group"), [(48, 0), (48, 16), (45, 0), (45, 15), (1, 0), (45, 16)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_of_every_width(bits: int, columns: int, group: int, symmetric: bool) -> None:
    weight = integers(matrix(6, columns), bits, group, symmetric)
    torch.testing.assert_close(decode(weight.meta(), weight.tensors()), weight.dense(), rtol=0, atol=0)


def test_one_scale_for_the_whole_tensor() -> None:
    weight = IntGrouped(torch.randint(-8, 8, (4, 10), dtype=torch.int8), torch.tensor([[0.5]]), None, 4)
    assert torch.equal(decode(weight.meta(), weight.tensors()), weight.dense())


@pytest.mark.parametrize(
    "weight",
    [
        halved(matrix(7, 9)),
        Sparse(torch.zeros(3, 5, dtype=torch.bool), torch.empty(0)),
        low_rank(matrix(20, 12), 5),
        low_rank(matrix(20, 12), 5, bits=8),
        SparseCodes.of(integers(matrix(6, 32), 3, 8), matrix(6, 32) > 0),
        SparseCodes.of(integers(matrix(6, 30), 4, 0, symmetric=False), matrix(6, 30) > 0),
        SparseCodes.of(integers(matrix(6, 30), 4, 16, symmetric=False), matrix(6, 30) > 0),
        LowRank(halved(matrix(8, 3)), integers(matrix(3, 16), 2, 8, symmetric=False)),
        Codebook(torch.arange(12, dtype=torch.uint8).reshape(3, 4), matrix(1, 16), None, 4),
        Codebook(torch.arange(12, dtype=torch.uint8).reshape(2, 6) % 8, matrix(4, 8), matrix(2, 3), 3),
        ColumnScaled(integers(matrix(8, 16), 4, 8), matrix(1, 16)[0]),
        Corrected(integers(matrix(20, 12), 3), low_rank(matrix(20, 12), 5, bits=8)),
    ],
    ids=[
        "sparse",
        "empty",
        "factors",
        "integer factors",
        "sparse codes",
        "sparse affine codes",
        "sparse codes of narrow last groups",
        "mixed factors",
        "table",
        "tables",
        "columns",
        "corrected",
    ],
)
def test_other_forms(weight: Weight) -> None:
    torch.testing.assert_close(decode(weight.meta(), weight.tensors()), weight.dense())


def test_an_unknown_form_asks_for_an_upgrade() -> None:
    with pytest.raises(ValueError, match="upgrade"):
        decode({"form": "hologram"}, {})


def test_inputs_round_as_compressed_tensors_rounds_them() -> None:
    """By hand: absmax 2 gives steps of 2/127.5; 1 lies at 63.75 of them and becomes 64; -2 lies halfway to -128."""
    step = 2 / 127.5
    rounded = rounded_input(torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0]]), 8)
    torch.testing.assert_close(rounded[:, [0, 2]], torch.tensor([[64 * step, 0.0], [0.0, 0.0]]))
    assert abs(rounded[0, 1].item() + 2) < 0.51 * step
    assert rounded[1, 1] == 0
    x = torch.randn(4, 6, requires_grad=True)
    rounded_input(x, 8).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize(
    ("weight", "trained"),
    [
        (integers(matrix(8, 16), 4, 8), {"weight_scale"}),
        (low_rank(matrix(8, 16), 3), {"weight", "weight_in"}),
        (low_rank(matrix(8, 16), 3, bits=8), {"weight_scale", "weight_in_scale"}),
        (halved(matrix(8, 16)), {"weight_values"}),
        (Codebook(torch.arange(128, dtype=torch.uint8).reshape(8, 16) % 8, matrix(8, 8), None, 3), {"weight_tables"}),
        (ColumnScaled(integers(matrix(8, 16), 4, 8), matrix(1, 16)[0]), {"weight_scale", "weight_columns"}),
        (
            Corrected(integers(matrix(8, 16), 4, 8), low_rank(matrix(8, 16), 3)),
            {"weight_scale", "weight_correction", "weight_correction_in"},
        ),
    ],
    ids=["integers", "factors", "integer factors", "sparse", "tables", "columns", "corrected"],
)
def test_gradients_reach_floating_tensors_and_agree_with_differences(weight: Weight, trained: set[str]) -> None:
    layer = running(nn.Linear(16, 8), weight).double().train()
    x = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        return layer(x).square().mean()

    loss().backward()
    parameters = dict(layer.named_parameters())
    assert {name for name, p in parameters.items() if p.grad is not None} == trained | {"bias"}
    assert {name for name, p in parameters.items() if p.requires_grad} == trained | {"bias"}
    name = sorted(trained)[0]
    flat, gradient = parameters[name].detach().view(-1), parameters[name].grad.view(-1)
    for at in (0, flat.numel() - 1):
        before, values = flat[at].item(), []
        for move in (1e-4, -1e-4):
            flat[at] = before + move
            values.append(loss().item())
        flat[at] = before
        slope = (values[0] - values[1]) / 2e-4
        assert slope == pytest.approx(gradient[at].item(), rel=1e-3, abs=1e-5)


def test_a_masked_weight_stays_masked_when_it_trains() -> None:
    weight = halved(matrix(8, 16))
    assert isinstance(weight, Sparse)
    before = weight.values.clone()
    layer = running(nn.Linear(16, 8), weight).train()
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    layer(torch.randn(5, 16)).square().sum().backward()
    optimizer.step()
    now = layer.weight.detach()
    assert torch.equal(now == 0, ~weight.mask)
    assert not torch.equal(now[weight.mask], before)


def test_a_kept_decoded_weight_follows_its_tensors() -> None:
    layer = running(nn.Linear(16, 8), integers(matrix(8, 16), 8))
    x = torch.randn(3, 16)
    with torch.no_grad():
        first = layer(x)
        assert layer.weight.data_ptr() == layer.weight.data_ptr()  # decoded once
        layer.weight_scale.mul_(2)
        torch.testing.assert_close(layer(x) - layer.bias, 2 * (first - layer.bias))
        assert layer.half().weight.dtype == torch.float16


def test_low_rank_convolution_equals_the_decoded_one() -> None:
    conv = nn.Conv2d(4, 10, 3, stride=2, padding=1, padding_mode="reflect")
    weight = low_rank(conv.weight.detach().reshape(10, -1), 6)
    images, decoded = torch.randn(2, 4, 9, 9), nn.Conv2d(4, 10, 3, stride=2, padding=1, padding_mode="reflect")
    decoded.load_state_dict({"weight": weight.dense().reshape(10, 4, 3, 3), "bias": conv.bias})
    torch.testing.assert_close(running(conv, weight)(images), decoded(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        ({"stride": 2, "padding": 1, "dilation": 2}, ((3, 1), (1, 3))),
        ({"stride": (2, 1), "padding": (0, 1), "padding_mode": "circular"}, ((3, 1), (1, 3))),
        ({"padding": "same", "dilation": 2, "kernel_size": (2, 4)}, ((2, 1), (1, 4))),
        ({"stride": 2, "padding": 1}, ((1, 1), (3, 3), (1, 1))),
        ({"stride": 2, "padding": 2, "kernel_size": (1, 5)}, ((1, 1), (1, 5))),
        ({"groups": 2}, ((1, 1), (3, 3), (1, 1))),
    ],
)
def test_several_convolutions_equal_the_decoded_one(options: dict[str, Any], kernels: Any) -> None:
    """One after the other in memory; where channels are grouped, decoded."""
    options = {"kernel_size": 3, **options}
    conv, channels = nn.Conv2d(4, 10, **options), 4 // options.get("groups", 1)
    first, *between, last = kernels
    parts = [matrix(6, channels * math.prod(first)), matrix(10, 6 * math.prod(last))]
    parts += [matrix(6, 6 * math.prod(size)) for size in between]
    weight = Convolutions(kernels, *map(Dense, parts))
    images, decoded = torch.randn(2, 4, 9, 9), nn.Conv2d(4, 10, **options)
    decoded.load_state_dict({"weight": weight.dense().reshape(conv.weight.shape), "bias": conv.bias})
    layer = running(conv, weight)
    with torch.no_grad():
        torch.testing.assert_close(layer(images), decoded(images), rtol=1e-4, atol=1e-4)
        held = layer.__dict__["decoded"][1]
        torch.testing.assert_close(layer.weight, decoded.weight)
    assert len(held) == (1 if "groups" in options else len(kernels))


def test_low_rank_grouped_convolution_is_decoded() -> None:
    """Each group reads its own channels, so the right factor is no convolution of its own."""
    conv, decoded = nn.Conv1d(6, 8, 3, groups=2), nn.Conv1d(6, 8, 3, groups=2)
    weight = low_rank(conv.weight.detach().reshape(8, -1), 4)
    decoded.load_state_dict({"weight": weight.dense().reshape(8, 3, 3), "bias": conv.bias})
    signal = torch.randn(2, 6, 11)
    torch.testing.assert_close(running(conv, weight)(signal), decoded(signal))


def test_a_subclass_keeps_its_forward() -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids + 1) * 3

    embedding = Scaled(12, 8)
    weight = low_rank(embedding.weight.detach(), 4)
    found = running(embedding, weight)(torch.tensor([0, 5]))
    torch.testing.assert_close(found, weight.dense()[[1, 6]] * 3)


def test_the_file_in_a_checkpoint_decodes_every_form_alone() -> None:
    """It imports torch, numpy and the standard library, and the names that decoders use are in it."""
    text = source()
    imported = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imported - set(sys.stdlib_module_names) == {"torch", "numpy"}
    alone: dict[str, Any] = {}
    exec(compile(text, "decoding_aicompress.py", "exec"), alone)
    for name, weight in FORMS.items():
        tensors = {s: t.float() if t.is_floating_point() else t for s, t in weight.tensors().items()}  # as a model's
        mine, theirs = (one(weight.meta(), tensors) for one in (decode, alone["decode"]))
        assert torch.equal(mine, theirs), name


def test_float8_values_are_decoded() -> None:
    weight = FORMS["sparse float8"]
    assert torch.equal(decode(weight.meta(), weight.tensors()).float(), weight.dense())
