"""hadamard: what its base may be, and that its base does the work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from aicompress.methods.quantize import gptq, hadamard
from aicompress.methods.quantize.gptq import GptqConfig
from aicompress.methods.quantize.hadamard import HadamardConfig
from aicompress.methods.quantize.qera import QeraConfig
from tests.methods.quantize.layers import correlated, gaussian, layer_of


def test_a_layer_is_what_the_base_makes_of_it() -> None:
    layer = layer_of(gaussian(16, 32), correlated(100, 32))
    config = HadamardConfig(base={"name": "gptq", "bits": 3, "group_size": 16})
    expected = gptq.apply(layer, GptqConfig(bits=3, group_size=16)).dense()
    assert torch.equal(hadamard.apply(layer, config).dense(), expected)


@pytest.mark.parametrize(
    ("base", "needs"),
    [({"name": "rtn"}, set()), ({"name": "gptq"}, {"gram"}), ({"name": "imatrix"}, {"norms"})],
)
def test_it_reads_what_its_base_reads(base: dict[str, Any], needs: set[str]) -> None:
    assert hadamard.METHOD.reads(HadamardConfig(base=base)) == needs


@pytest.mark.parametrize("name", ["awq", "smoothquant", "hadamard", "nothing"])
def test_what_cannot_follow_a_rotation(name: str) -> None:
    with pytest.raises(ValidationError, match=name):
        HadamardConfig(base={"name": name})


def test_its_base_has_explicit_bits() -> None:
    with pytest.raises(ValidationError, match="explicit bits"):
        HadamardConfig(base={"name": "gptq", "bits": "range"})


@pytest.mark.parametrize("name", ["awq", "smoothquant", "hadamard"])
def test_a_correction_of_one_layer_cannot_rewrite_the_model(name: str) -> None:
    with pytest.raises(ValidationError, match="cannot be corrected"):
        QeraConfig(base={"name": name})
