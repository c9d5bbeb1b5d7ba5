"""LeNet-300-100 and LeNet-5 (as Caffe has it), trained on MNIST and saved as bare safetensors.

    python -m scripts.lenet.networks --data mnist.npz --network lenet-300-100 --out lenet.safetensors

The test images are never read here. The last 10,000 training images are kept apart for every choice.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from aicompress.pipeline.distillation.plan import resolved_precision
from scripts.lenet.images import Images, part, training_file

BATCH = 256
RATE, DECAY = 3e-3, 1e-2


@dataclass(frozen=True)
class Network:
    """A network that `aicompress` runs from a bare file.

    Attributes:
        layers: how to make its layers, by their names in the file.
        sequential: the recipe's `model: {sequential: ...}`.
        steps: how long it is trained.
    """

    layers: dict[str, Callable[[], nn.Module]]
    sequential: tuple[str, ...]
    steps: int


NETWORKS = {
    "lenet-300-100": Network(
        {"fc1": lambda: nn.Linear(784, 300), "fc2": lambda: nn.Linear(300, 100), "fc3": lambda: nn.Linear(100, 10)},
        ("flatten", "fc1", "relu", "fc2", "relu", "fc3"),
        6000,
    ),
    "lenet-5": Network(
        {
            "conv1": lambda: nn.Conv2d(1, 20, 5),
            "conv2": lambda: nn.Conv2d(20, 50, 5),
            "fc1": lambda: nn.Linear(800, 500),
            "fc2": lambda: nn.Linear(500, 10),
        },
        ("conv1", "maxpool:2", "conv2", "maxpool:2", "flatten", "fc1", "relu", "fc2"),
        4000,
    ),
}


class Classifier(nn.Module):
    """A network's layers with its operations between them."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.steps = network.sequential
        for name, make in network.layers.items():
            self.add_module(name, make())

    def forward(self, images: Tensor) -> Tensor:
        x = images.unsqueeze(-1).movedim(
            -1, 1
        )  # one channel, innermost: convolutions and pools take two thirds of the time
        for step in self.steps:
            if step in self._modules:
                x = self.get_submodule(step)(x)
            elif step == "maxpool:2":
                x = functional.max_pool2d(x, 2)
            else:
                x = x.flatten(1) if step == "flatten" else functional.relu(x)
        return x


def trained(network: Network, samples: Images, seed: int) -> Classifier:
    """Train by AdamW on cross-entropy under a one-cycle schedule."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = Classifier(network)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=network.steps)
    for _ in range(network.steps):
        index = torch.randint(len(samples.labels), (BATCH,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=resolved_precision("auto") == "bf16"):
            logits = model(samples.images[index].float() / 255)
        optimizer.zero_grad()
        functional.cross_entropy(logits.float(), samples.labels[index]).backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def error(model: nn.Module, samples: Images) -> float:
    """Return the share of images that are not classified right."""
    right = [
        (model(images.float() / 255).argmax(1) == labels).sum()
        for images, labels in zip(samples.images.split(1000), samples.labels.split(1000), strict=True)
    ]
    return 1 - float(sum(right)) / len(samples.labels)


def main(arguments: list[str] | None = None) -> None:
    """Train one network, save it, and print its error on the validation images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="an .npz with train_images and train_labels")
    parser.add_argument("--network", choices=NETWORKS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    network, images = NETWORKS[options.network], training_file(options.data, options.out.parent)
    model = trained(network, part(images, "fit"), options.seed)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, options.out)
    print(f"{100 * error(model, part(images, 'validation')):.2f} % error on the validation images")


if __name__ == "__main__":
    main()
