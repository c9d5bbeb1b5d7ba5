"""Rescalable inputs are found in every family, and rescaling them leaves the real model as it is."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.views.noise import NoiseCheckpoint
from aicompress.checkpoint.views.rewritten import RewrittenCheckpoint
from aicompress.model.equivalence.scaling_groups import ScalingGroup
from aicompress.model.equivalence.search import ScalingGroups, probe
from aicompress.model.loading.load import build, load
from aicompress.model.loading.partial_model import PartialModel
from tests.pipeline.families import FAMILIES, ids

GATED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
# By family the layers of a block whose input is rescalable, and how many inputs that are in its four blocks.
READERS: dict[str, tuple[set[str], int]] = {
    "llama": (GATED, 16),
    "llama-tied": (GATED, 16),
    "qwen3": (GATED, 16),
    "gemma": (GATED, 16),
    "gemma3": (GATED, 16),
    "gpt2": ({"c_attn", "c_proj", "c_fc"}, 12),  # not the second c_proj, which is behind an activation
    "gpt-neox": ({"query_key_value", "dense", "dense_h_to_4h"}, 12),
    "bert": ({"dense"}, 4),  # of the attention alone: a norm's output is also the residual
    "vit": ({"query", "key", "value", "dense"}, 12),
    "t5": ({"q", "k", "v", "o", "wi_0", "wi_1", "wo"}, 34),
}


def noise(folder: Path) -> NoiseCheckpoint:
    checkpoint = Checkpoint.open(folder)
    return NoiseCheckpoint(**{own.name: getattr(checkpoint, own.name) for own in fields(Checkpoint)})


def groups_in(folder: Path, batch: dict[str, Any]) -> ScalingGroups:
    checkpoint = noise(folder)
    model = build(checkpoint)
    return probe(model, PartialModel(checkpoint, model, dtype=torch.float32), batch)


def save_rescaled(folder: Path, groups: tuple[ScalingGroup, ...], out: Path) -> set[str]:
    """Write the checkpoint with random factors at every group; returns the parameters that changed."""
    view = RewrittenCheckpoint.over(Checkpoint.open(folder))
    generator = torch.Generator().manual_seed(0)
    for group in groups:
        factors = group.pooled(torch.rand(len(group.channels), generator=generator) * 3 + 0.2)
        own = group.inverse(factors, view.specs[group.producers[0].parameter].shape[group.producers[0].axis])
        for axes, values in ((group.consumers, factors), (group.producers, own)):
            for axis in axes:
                view.change(axis.parameter, lambda t, axis=axis, values=values: axis.scaled(t, values))
    tensors = {name: view.read(name).contiguous() for name in view.parameters()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return set(view.changes)


@pytest.mark.parametrize("name", READERS)
def test_rescaling_every_place_keeps_the_model(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    model = family.saved(tmp_path / "in")
    found = groups_in(tmp_path / "in", family.inputs())
    readers = {axis.parameter.split(".")[-2] for group in found.groups for axis in group.consumers}
    assert (readers, len(found.groups)) == READERS[name]
    model.save_pretrained(tmp_path / "out")
    assert save_rescaled(tmp_path / "in", found.groups, tmp_path / "out")
    before = family.output(model)
    after = family.output(type(model).from_pretrained(tmp_path / "out").eval())
    assert torch.allclose(after, before, atol=5e-4 * float(before.abs().max()))


@pytest.mark.parametrize("fixture", ["tiny_mixtral", "tiny_qwen_moe"])
def test_a_router_is_rescaled_with_its_experts(tmp_path: Path, fixture: str, request: pytest.FixtureRequest) -> None:
    source: Path = request.getfixturevalue(fixture)
    found = groups_in(source, {"input_ids": ids(), "use_cache": False})
    assert len(found.groups) == 6
    routed = [group for group in found.groups if len(group.consumers) > 3]
    assert len(routed) == 2
    assert all(sum(".gate." in axis.parameter for axis in group.consumers) == 1 for group in routed)
    before = load(source)
    before.save_pretrained(tmp_path / "out")
    save_rescaled(source, found.groups, tmp_path / "out")
    with torch.no_grad():
        one, other = before(ids()).logits, load(tmp_path / "out")(ids()).logits
    assert torch.allclose(one, other, atol=2e-4 * float(one.abs().max()))


@pytest.mark.parametrize(
    ("name", "reader", "expected"),
    [
        ("gpt2", "h.0.attn.c_proj.weight", [*range(64, 96)]),  # fused query, key and value follow one another
        ("gpt-neox", "layers.0.attention.dense.weight", [24 * (j // 8) + 16 + j % 8 for j in range(32)]),  # by head
        ("llama", "layers.0.self_attn.o_proj.weight", [8 * (j // 16) + j % 8 for j in range(32)]),  # two heads on one
    ],
)
def test_the_rows_that_make_the_values(tmp_path: Path, name: str, reader: str, expected: list[int]) -> None:
    FAMILIES[name].saved(tmp_path)
    found = groups_in(tmp_path, FAMILIES[name].inputs())
    (group,) = [group for group in found.groups if group.consumers[0].parameter.endswith(reader)]
    assert group.channels.tolist() == expected
    assert not group.norm


def test_factors_of_one_origin_are_made_equal() -> None:
    group = ScalingGroup((), (), torch.tensor([0, 1, 0, 1]), norm=False)
    assert torch.allclose(group.pooled(torch.tensor([1.0, 3.0, 4.0, 3.0])), torch.tensor([2.0, 3.0, 2.0, 3.0]))
    assert group.inverse(torch.tensor([2.0, 4.0, 2.0, 4.0]), 3).tolist() == [0.5, 0.25, 1.0]
