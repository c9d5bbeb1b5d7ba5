from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from aicompress.errors import CheckpointError
from aicompress.model.channels.cut import attributes, cut_module, kept_places, shapes_after, unit_rows
from aicompress.model.channels.graph import channel_groups
from aicompress.model.channels.removable import generic, refusal, removable
from tests.pipeline.channels.networks import NETWORKS, Stubborn, halves, lively

IMAGES = torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(0))
EXPECTED = {
    "Residual": {"stem": 8, "conv1": 8, "conv3": 12, "conv4": 12},
    "Depthwise": {"stem": 6, "point": 9},
    "Grouped": {"stem": 8, "grouped": 12, "left": 6, "right": 4, "fc1": 20},
    "Flattened": {"conv": 5, "fc1": 16, "fc2": 12},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_groups(name: str) -> None:
    groups, fixed = channel_groups(NETWORKS[name](), IMAGES)
    assert {group.name: group.size for group in groups} == EXPECTED[name]
    assert [one.reason for one in fixed] == ["its channels are the model's output"]
    assert removable(NETWORKS[name](), IMAGES, groups) == (groups, [])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_cut_network_is_the_whole_one_whose_readers_have_zeros(name: str) -> None:
    whole = lively(NETWORKS[name]()).double()
    groups, _ = channel_groups(whole, IMAGES.double())
    choice = halves(groups)
    kept = kept_places(whole, choice)
    shapes = shapes_after(whole, kept)
    small = copy.deepcopy(whole)
    widths = cut_module(small, kept)
    for path, fields in widths.items():
        assert attributes(whole.get_submodule(path), kept[path]) == fields
    assert all(
        tuple(tensor.shape) == shapes.get(key, tuple(tensor.shape)) for key, tensor in small.state_dict().items()
    )
    for group, units in choice:
        gone = [unit for unit in range(group.size) if unit not in units]
        for member in group.members:
            if member.side == "in":
                layer = whole.get_submodule(member.path)
                for place in member.places[gone].reshape(-1).tolist():
                    width = layer.weight.shape[1]
                    rows = len(layer.weight) // getattr(layer, "groups", 1)
                    first = place // width * rows
                    layer.weight.data[first : first + rows, place % width] = 0
    with torch.no_grad():
        torch.testing.assert_close(small(IMAGES.double()), whole(IMAGES.double()))
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in whole.parameters())


def test_cohorts_of_a_grouped_convolution_and_places_after_flattening() -> None:
    groups = {group.name: group for group in channel_groups(NETWORKS["Grouped"](), IMAGES)[0]}
    assert groups["stem"].cohorts == (0, 0, 1, 1, 2, 2, 3, 3)
    assert groups["grouped"].cohorts == (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3)
    (flattened,) = (m for m in groups["right"].members if m.path == "fc1")
    assert flattened.places.tolist() == [list(range(36 * (6 + unit), 36 * (7 + unit))) for unit in range(4)]


def test_rows_of_a_unit() -> None:
    network = lively(NETWORKS["Grouped"]())
    groups = {group.name: group for group in channel_groups(network, IMAGES)[0]}
    reads = next(m for m in groups["stem"].members if m.path == "grouped")
    rows = unit_rows(network, reads, "weight")  # channel 3 is the second one of group 1: filters 3 to 5
    assert torch.equal(rows[3], network.grouped.weight[3:6, 1].reshape(-1))
    makes = next(m for m in groups["grouped"].members if m.path == "grouped")
    assert torch.equal(unit_rows(network, makes, "weight")[7], network.grouped.weight[7].reshape(-1))
    flat = next(m for m in groups["left"].members if m.path == "fc1")
    assert torch.equal(unit_rows(network, flat, "weight")[2], network.fc1.weight[:, 72:108].t().reshape(-1))


def test_what_the_graph_gets_wrong_is_found_by_trying() -> None:
    network = Stubborn()
    groups, fixed = channel_groups(network, IMAGES)
    assert "soft" in {group.name for group in groups}  # the graph takes a softmax for an elementwise operation
    fit, more = removable(network, IMAGES, groups)
    assert [group.name for group in fit] == ["free"]
    reasons = {one.name: one.reason for one in (*fixed, *more)}
    assert reasons["soft"] == "removing its channels changes more than themselves"
    assert {"numbered", "fc"} <= reasons.keys()


class Layered(nn.Module):
    """Norms over channels: what stays is normalised among itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(1, 8, 4, stride=4), nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.ones(8))
        self.group, self.last = nn.GroupNorm(2, 8), nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images)
        x = x + self.scale[:, None, None] * self.norm(x.movedim(1, -1)).movedim(-1, 1)
        return self.fc(torch.relu(self.last(self.group(x))).mean((2, 3)))


def test_norms_over_channels_and_a_lone_parameter() -> None:
    network = lively(Layered())
    groups, _ = channel_groups(network, IMAGES)
    fit, fixed = removable(network, IMAGES, groups)
    assert {group.name: group.size for group in fit} == {"embed": 8, "last": 6}, fixed
    assert fit[0].cohorts == (0, 0, 0, 0, 1, 1, 1, 1)
    kept = kept_places(network, halves(fit))
    small = copy.deepcopy(network)
    assert cut_module(small, kept)["scale"] == {}
    with torch.no_grad():
        wanted = network.norm(IMAGES.new_ones(8))[:4].shape
        assert small.norm.normalized_shape == tuple(wanted)
        assert small.scale.shape == (4,)
        assert small(IMAGES).shape == (3, 10)


def test_refusal_names_what_the_module_says() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(400, 10)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.fc(self.conv(images).view(-1, 400))

    groups, _ = channel_groups(Fixed(), IMAGES)
    assert [group.name for group in groups] == ["conv"]
    reason = refusal(Fixed().double(), IMAGES.double(), groups)
    assert reason is not None
    assert "shape '[-1, 400]' is invalid" in reason


class Attention(nn.Module):
    """One head over rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.fc = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = images.squeeze(1)
        return self.fc(((self.q(rows) @ self.k(rows).transpose(1, 2)).softmax(-1) @ self.v(rows)).mean(1))


def test_attention_is_refused_before_the_graph_is_followed() -> None:
    with pytest.raises(CheckpointError, match="as attention does"):
        channel_groups(Attention(), IMAGES)
    fused = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)
    with pytest.raises(CheckpointError):
        channel_groups(fused, IMAGES.squeeze(1))


class Fresh(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
            self.nbytes += out.nbytes
        return out


def test_random_weights_are_drawn_in_their_place() -> None:
    """A copy is made, and one in float64 of it: nothing of the network's size beside them."""
    layer = nn.Linear(300, 200, bias=False)
    with Fresh() as fresh:
        made = generic(layer)
    assert made.weight.dtype == torch.float64
    assert fresh.nbytes < 4 * layer.weight.nbytes  # a copy is one of these, and one in float64 two
