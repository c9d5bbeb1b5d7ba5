"""Images of digits: deformed ones to learn from, and the ones that every choice is made by.

The last 10,000 training images are for validation. The others are learnt from as they are, and in copies that are
turned, stretched, moved and bent a little (Simard, Steinkraus and Platt, "Best Practices for Convolutional Neural
Networks Applied to Visual Document Analysis", 2003, section 2). Test images are never read here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

VALIDATION = 10_000  # the last training images
COPIES = 3  # of every other one, each deformed in its own way
TURN, STRETCH, MOVE = math.radians(6), 0.06, 0.8  # at most: angle, share of the size, pixels
BEND, BENDS = 0.7, 7  # root mean square in pixels, and points each way between which it is interpolated
AT_ONCE = 5000
SEED = 0  # of the copies, which are the same for all networks


@dataclass(frozen=True)
class Images:
    """Images (n, height, width) uint8, and their labels (n,)."""

    images: Tensor
    labels: Tensor


def deformed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, stretch, move and bend every image (n, height, width) uint8, in its own way."""
    count, height, width = images.shape
    angle, wide, high, right, down = torch.rand(5, count, generator=generator) * 2 - 1
    angle, wide, high = angle * TURN, 1 + wide * STRETCH, 1 + high * STRETCH
    first = torch.stack([angle.cos() * wide, -angle.sin() * high, right * MOVE * 2 / width], dim=1)
    second = torch.stack([angle.sin() * wide, angle.cos() * high, down * MOVE * 2 / height], dim=1)
    grid = functional.affine_grid(torch.stack([first, second], dim=1), [count, 1, height, width], align_corners=False)
    bends = torch.randn(count, 2, BENDS, BENDS, generator=generator)
    bends = functional.interpolate(bends, (height, width), mode="bicubic", align_corners=False)
    bends *= BEND / bends.square().mean().sqrt()
    grid += bends.permute(0, 2, 3, 1) * torch.tensor([2 / width, 2 / height])
    moved = functional.grid_sample(images[:, None].float(), grid, mode="bilinear", align_corners=False)
    return moved[:, 0].round().to(torch.uint8)


def training_file(data: Path, folder: Path) -> Path:
    """Write the training images in two parts that recipes name: `fit` with its copies, and `validation`."""
    path = folder / "training.npz"
    if not path.is_file():
        with np.load(data) as arrays:
            images, labels = arrays["train_images"], arrays["train_labels"]
        fit, generator = torch.from_numpy(images[:-VALIDATION]), torch.Generator().manual_seed(SEED)
        copies = [deformed(part, generator) for _ in range(COPIES) for part in fit.split(AT_ONCE)]
        named = {
            "fit_images": torch.cat([fit, *copies]).numpy(),
            "fit_labels": np.tile(labels[:-VALIDATION], 1 + COPIES),
            "validation_images": images[-VALIDATION:],
            "validation_labels": labels[-VALIDATION:],
        }
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name("training.part.npz")
        np.savez(unfinished, **named)
        unfinished.rename(path)
    return path


def part(path: Path, name: str) -> Images:
    """Read a part of the training images: `fit` or `validation`."""
    with np.load(path) as arrays:
        labels = torch.from_numpy(arrays[f"{name}_labels"]).long()
        return Images(torch.from_numpy(arrays[f"{name}_images"]), labels)
