"""Small convolutional networks of every shape that channels have to be followed through; images (batch, 1, 12, 12)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from aicompress.model.channels.graph import ChannelGroup


class Residual(nn.Module):
    """A ResNet in small: two blocks with batch norms, the second one strided with a projected shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.norm3 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv4, self.norm4 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.short = nn.Conv2d(8, 12, 1, stride=2)
        self.fc = nn.Linear(12, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(images)))
        x = torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))
        x = torch.relu(self.short(x) + self.norm4(self.conv4(torch.relu(self.norm3(self.conv3(x))))))
        return self.fc(x.mean((2, 3)))


class Depthwise(nn.Module):
    """A MobileNet in small: depthwise and pointwise convolutions, PReLU, and channels kept in two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.PReLU(6)
        self.depth, self.point = nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 9, 1)
        self.depth2 = nn.Conv2d(9, 9, 3, groups=9, bias=False)
        self.fc = nn.Linear(9, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(images)))
        x = self.depth2(functional.relu6(self.point(self.depth(x))))
        return self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Grouped(nn.Module):
    """A grouped convolution between others, two branches concatenated, flattened into linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.left, self.right, self.norm = nn.Conv2d(12, 6, 1), nn.Conv2d(12, 4, 1), nn.BatchNorm2d(10)
        self.fc1, self.fc2 = nn.Linear(10 * 6 * 6, 20), nn.Linear(20, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.stem(images))))
        x = torch.relu(self.norm(torch.cat([self.left(x), self.right(x)], dim=1)))
        return self.fc2(torch.tanh(self.fc1(functional.max_pool2d(x, 2).flatten(1))))


class Flattened(nn.Module):
    """Convolutions flattened into a three-layer perceptron whose neurons have sigmoids, which do not vanish at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3)
        self.fc1, self.fc2, self.fc3 = nn.Linear(5 * 100, 16), nn.Linear(16, 12), nn.Linear(12, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.sigmoid(self.fc1(torch.sigmoid(self.conv(images)).flatten(1)))
        return self.fc3(torch.sigmoid(self.fc2(x)))


class Stubborn(nn.Module):
    """What cannot be pruned stands beside what can: channels named by number, a sum with the input, a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.numbered = nn.Conv2d(1, 4, 3, padding=1)
        self.summed = nn.Conv2d(1, 1, 3, padding=1)
        self.soft = nn.Linear(144, 6)
        self.free, self.fc = nn.Linear(6, 8), nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        four = self.numbered(images).reshape(-1, 4, 144).mean(1)
        x = (images + self.summed(images)).flatten(1) + four
        return self.fc(torch.relu(self.free(torch.softmax(self.soft(x), dim=-1))))


class Wide(nn.Module):
    """Wide enough for its time to follow from its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 64, 3, padding=1), nn.Conv2d(64, 256, 3, padding=1)
        self.last, self.fc = nn.Conv2d(256, 64, 1), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.last(torch.relu(self.conv(torch.relu(self.stem(images))))))
        return self.fc(x.mean((2, 3)))


NETWORKS = {kind.__name__: kind for kind in (Residual, Depthwise, Grouped, Flattened)}


def lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and running statistics, none of them at its initial value."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            noise = 0.4 * torch.randn(tensor.shape, generator=generator)
            tensor.copy_(0.5 + noise.abs() if name.endswith(("running_var", "norm.weight")) else noise)
    return module.eval()


def halves(groups: list[ChannelGroup]) -> list[tuple[ChannelGroup, list[int]]]:
    """The second half of every cohort."""
    kept = []
    for group in groups:
        by_cohort: dict[int, list[int]] = {}
        for unit, cohort in enumerate(group.cohorts):
            by_cohort.setdefault(cohort, []).append(unit)
        kept.append((group, sorted(u for units in by_cohort.values() for u in units[len(units) // 2 :])))
    return kept
