from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from aicompress.model.channels.graph import channel_groups
from aicompress.model.channels.saliency import saliencies
from tests.pipeline.channels.networks import NETWORKS, lively

IMAGES = torch.randn(4, 1, 12, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([1, 0, 7, 3])


@pytest.mark.parametrize("name", NETWORKS)
def test_taylor_is_the_squared_derivative_of_a_gate_on_all_that_reads_a_unit(name: str) -> None:
    network = lively(NETWORKS[name]())
    groups, _ = channel_groups(network, IMAGES)
    found = saliencies(network, groups, [(IMAGES[:2], LABELS[:2]), (IMAGES[2:], LABELS[2:])], "taylor")
    network.double().requires_grad_(True)
    for group, scores in zip(groups, found, strict=True):
        wanted = torch.zeros(group.size, dtype=torch.float64)
        for image, label in zip(IMAGES.double(), LABELS, strict=True):
            network.zero_grad()
            functional.cross_entropy(network(image[None]), label[None]).backward()
            gates = torch.zeros(group.size, dtype=torch.float64)
            for member in group.members:
                if member.side == "in":  # a gate scales the columns that read a unit: its derivative is Σ w ∂L/∂w
                    layer = network.get_submodule(member.path)
                    columns = (layer.weight * layer.weight.grad).detach()
                    for unit, places in enumerate(member.places.tolist()):
                        gates[unit] += sum(column(layer, columns, place) for place in places)
            wanted += gates.square() / len(IMAGES)
        torch.testing.assert_close(scores, wanted, rtol=1e-3, atol=1e-8)


def column(layer: torch.nn.Module, values: torch.Tensor, place: int) -> float:
    width, rows = values.shape[1], len(values) // getattr(layer, "groups", 1)
    first = place // width * rows
    return float(values[first : first + rows, place % width].sum())


def test_activation_by_hand() -> None:
    network = lively(NETWORKS["Flattened"]())
    groups, _ = channel_groups(network, IMAGES)
    (conv, first, _) = saliencies(network, groups, [(IMAGES, None)], "activation")
    with torch.no_grad():
        maps = torch.sigmoid(network.conv(IMAGES))
        hidden = torch.sigmoid(network.fc1(maps.flatten(1)))
    torch.testing.assert_close(conv, maps.double().mean((0, 2, 3)))
    torch.testing.assert_close(first, hidden.double().mean(0))


def test_without_labels_the_models_own_answers_are_taken() -> None:
    network = lively(NETWORKS["Residual"]())
    groups, _ = channel_groups(network, IMAGES)
    own = network(IMAGES).argmax(1)
    for one, other in zip(
        saliencies(network, groups, [(IMAGES, None)], "taylor"),
        saliencies(network, groups, [(IMAGES, own)], "taylor"),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
