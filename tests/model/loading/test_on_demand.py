"""Large parameters between the blocks are away while the blocks run, and come back when they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aicompress.checkpoint import Checkpoint
from aicompress.model.loading.load import build
from aicompress.model.loading.partial_model import PartialModel
from tests import checkpoints


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    return checkpoints.make_llama(tmp_path / "untied", tied=False)


def is_between(name: str) -> bool:
    return "layers." not in name


def lent(folder: Path, monkeypatch: pytest.MonkeyPatch, least: int = 0) -> tuple[Any, PartialModel]:
    monkeypatch.setattr("aicompress.model.loading.partial_model.LEAST", least)
    checkpoint = Checkpoint.open(folder)
    model = build(checkpoint)
    loader = PartialModel(checkpoint, model)
    loader.load(is_between)
    loader.offload(is_between)
    return model, loader


def held(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters(remove_duplicate=False) if p.device.type != "meta"}


def test_a_parameter_comes_back_when_it_is_read(untied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, loader = lent(untied, monkeypatch)
    assert not held(model)
    rows = model.model.embed_tokens(torch.arange(4))
    assert torch.equal(rows, Checkpoint.open(untied).dense("model.embed_tokens.weight")[:4])
    assert held(model) == {"model.embed_tokens.weight"}
    loader.offload(is_between)
    assert not held(model)
    assert not model.model.embed_tokens.weight.is_meta


def test_tied_parameters_come_back_together(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = lent(tiny_llama, monkeypatch)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert held(model) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_what_was_replaced_while_it_was_away_stays(untied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, loader = lent(untied, monkeypatch)
    loader.replace("lm_head.weight", torch.zeros(model.lm_head.weight.shape))
    assert not model.lm_head.weight.any()


def test_small_parameters_stay(untied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = lent(untied, monkeypatch, least=1 << 12)
    assert held(model) == {"model.norm.weight"}
