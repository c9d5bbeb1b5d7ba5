"""Products with rounded inputs: where they round, by how much, and that nothing stays switched on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from aicompress.model.blocks.input_statistics import PANEL, InputSums
from aicompress.model.kernels.bf16_products import RoundedLayers, bfloat16_products, rounds
from aicompress.model.kernels.linear import has_fast_bfloat16

SETTING: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().double()


def test_the_setting_is_restored_even_after_an_error() -> None:
    before = SETTING.fp32_precision
    with pytest.raises(RuntimeError), RoundedLayers():
        functional.linear(torch.ones(2, 3), torch.ones(4, 5))
    assert SETTING.fp32_precision == before
    with bfloat16_products():
        assert SETTING.fp32_precision == "bf16"
    assert SETTING.fp32_precision == before
    with bfloat16_products(False):
        assert SETTING.fp32_precision == before


def test_float32_never_rounds() -> None:
    assert not rounds("float32")
    assert rounds("auto") == has_fast_bfloat16()


@pytest.mark.parametrize("width", [3, PANEL, 2 * PANEL + 9])
@pytest.mark.parametrize("active", [False, True])
def test_a_gram_matrix_is_whole_symmetric_and_positive(width: int, active: bool) -> None:
    sums = InputSums(frozenset({"gram"}), active)
    rows = draw(600, width)
    sums.add(rows[:400])
    sums.add(rows[400:])
    found = sums.mean().gram
    assert found is not None
    seen = rounded(rows) if active else rows.double()
    expected = seen.t() @ seen / 600
    assert (found - expected).norm() < 2e-6 * expected.norm()
    assert (found - rows.double().t() @ rows.double() / 600).norm() < 4e-3 * expected.norm()
    assert torch.equal(found, found.t())
    assert torch.linalg.eigvalsh(found.double()).min() > -1e-4


def test_a_bfloat16_model_loses_nothing() -> None:
    rows = draw(300, 96).bfloat16()
    grams = []
    for active in (False, True):
        sums = InputSums(frozenset({"gram"}), active)
        sums.add(rows)
        grams.append(sums.mean().gram)
    torch.testing.assert_close(grams[0], grams[1], rtol=1e-4, atol=1e-5)
