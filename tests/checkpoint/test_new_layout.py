"""A foreign layout is one file: what is written here as one is found, read, refused and named as the others are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import aicompress.checkpoint.foreign
from aicompress.checkpoint import Checkpoint
from aicompress.errors import CheckpointError
from tests.foreign import Encoded, write

LAYOUT = '''
"""Halves: int8 codes of 0.5 times `halved`."""

from aicompress.checkpoint.foreign.layout import ForeignLayout, ForeignWeight, ForeignTensors, modules_with, weight_of
from aicompress.weights import Dense


def weights(stored: ForeignTensors) -> dict[str, ForeignWeight]:
    recognized = {}
    for module in modules_with(stored.specs, "halved"):
        names = stored.names(module, {"codes": "halved"})
        dense, transposed = stored.dense(weight_of(module), stored.specs[names["codes"]].shape)
        decode = lambda read: Dense(read("codes").float() / 2)
        recognized[weight_of(module)] = ForeignWeight(dense, names, "halves", decode, transposed=transposed)
    return recognized


LAYOUT = ForeignLayout("halves", ("halving",), weights)
'''


@pytest.fixture
def added(joins: Callable[[ModuleType, str, str], None]) -> None:
    joins(aicompress.checkpoint.foreign, "halves", LAYOUT)


@pytest.mark.usefixtures("added")
def test_it_is_found(tmp_path: Path) -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).reshape(4, 4)
    encoded = Encoded({".halved": codes}, codes.float() / 2)
    checkpoint = Checkpoint.open(write(tmp_path / "in", encoded, {"quant_method": "halving"}))
    assert torch.equal(checkpoint.dense("m.weight"), encoded.dense)
    with pytest.raises(CheckpointError) as refusal:
        Checkpoint.open(write(tmp_path / "other", encoded, {"quant_method": "doubling"}))
    assert "halving" in refusal.value.hint


def test_without_it_the_method_is_unknown(tmp_path: Path) -> None:
    codes = torch.zeros(4, 4, dtype=torch.int8)
    with pytest.raises(CheckpointError, match="'halving', which is not read"):
        Checkpoint.open(write(tmp_path / "in", Encoded({".halved": codes}, codes.float()), {"quant_method": "halving"}))
