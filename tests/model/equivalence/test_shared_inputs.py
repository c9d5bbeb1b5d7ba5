"""Layers that share an input, found without weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from aicompress.checkpoint import Checkpoint
from aicompress.pipeline.step.models.shared_inputs import SharedInputs
from tests.pipeline.families import FAMILIES


def units(source: Path) -> set[frozenset[str]]:
    """Groups of two or more, by the last pieces of their names."""
    checkpoint = Checkpoint.open(source)
    names = tuple(info.tensor for info in checkpoint.layers() if info.kind in ("linear", "head"))
    groups: dict[str, set[str]] = {}
    for name, leader in SharedInputs(checkpoint, names).leaders.items():
        groups.setdefault(leader, set()).add(name)
    return {frozenset(name.split(".")[-2] for name in group) for group in groups.values() if len(group) > 1}


def saved(family: str, folder: Path) -> Path:
    FAMILIES[family].saved(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_decoders(tmp_path: Path, family: str) -> None:
    """Query, key and value, gate and up: one input each, in every block."""
    found = units(saved(family, tmp_path / "model"))
    assert found == {frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"gate_proj", "up_proj"})}


def test_other_shapes(tmp_path: Path) -> None:
    assert units(saved("bert", tmp_path / "bert")) == {frozenset({"query", "key", "value"})}
    assert units(saved("gpt2", tmp_path / "gpt2")) == set()  # fused already
    # A decoder's keys and values of all blocks read the encoder's one output.
    assert {"k", "v", "q"} in units(saved("t5", tmp_path / "t5"))
    assert frozenset({"k", "v"}) in units(tmp_path / "t5")


def test_experts(tiny_mixtral: Path) -> None:
    """Routing depends on data; what comes before it, and each expert's own pair, is known all the same."""
    found = units(tiny_mixtral)
    assert frozenset({"q_proj", "k_proj", "v_proj"}) in found
    assert frozenset({"w1", "w3"}) in found


def test_a_bare_file_shares_nothing(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"fc.weight": torch.randn(4, 4)}, tmp_path / "model.safetensors")
    assert SharedInputs(Checkpoint.open(tmp_path / "model.safetensors"), ("fc.weight",)).leaders == {}
