from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from aicompress.model.channels.cut import Kept, cut_module, kept_places
from aicompress.model.channels.graph import channel_groups
from aicompress.model.channels.repair import Repair, repair
from tests.pipeline.channels.networks import NETWORKS, halves, lively

IMAGES = torch.randn(256, 1, 12, 12, generator=torch.Generator().manual_seed(0))


def test_a_layer_is_fitted_by_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    whole = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)).requires_grad_(False)
    small = copy.deepcopy(whole)
    kept = {"0": Kept(torch.tensor([0, 2, 5])), "1": Kept(None, torch.tensor([0, 2, 5]))}
    cut_module(small, kept)
    assert repair(Repair(whole, small, kept, [inputs[:100], inputs[100:]], True, False, 1e-9)) == ["1"]
    shown = torch.cat([small[0](inputs), torch.ones(400, 1)], dim=1)
    best = torch.linalg.lstsq(shown, whole(inputs)).solution
    torch.testing.assert_close(small[1].weight, best[:3].t(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(small[1].bias, best[3], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_repaired_network_is_nearer_to_the_whole_one(name: str) -> None:
    whole = lively(NETWORKS[name]()).requires_grad_(False)
    groups, _ = channel_groups(whole, IMAGES[:2])
    kept = kept_places(whole, halves(groups))
    errors = []
    for refit in (False, True):
        small = copy.deepcopy(whole)
        cut_module(small, kept)
        repair(Repair(whole, small, kept, [IMAGES[:128], IMAGES[128:]], refit, False, 1e-3))
        errors.append(float((small(IMAGES) - whole(IMAGES)).norm() / whole(IMAGES).norm()))
    assert errors[1] < 0.8 * errors[0]


def test_batch_norms_get_the_statistics_of_their_inputs_now() -> None:
    whole = lively(NETWORKS["Residual"]()).requires_grad_(False)
    groups, _ = channel_groups(whole, IMAGES[:2])
    kept = kept_places(whole, [(g, units) for g, units in halves(groups) if g.name == "conv3"])
    small = copy.deepcopy(whole)
    cut_module(small, kept)
    changed = repair(Repair(whole, small, kept, [IMAGES[:128], IMAGES[128:]], False, True, 0.01))
    assert changed == ["norm3", "norm4"]  # what comes before conv3 sees what it always saw
    normed: dict[str, torch.Tensor] = {}
    for path in changed:
        small.get_submodule(path).register_forward_hook(lambda m, a, y, p=path: normed.update({p: a[0]}))
    small(IMAGES)
    for path in changed:
        layer = small.get_submodule(path)
        torch.testing.assert_close(layer.running_mean, normed[path].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.running_var, normed[path].var((0, 2, 3)), rtol=1e-4, atol=1e-5)
