"""Let a model run under noise that a seed decides: dropout before its layers, Gaussian noise on its inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Noise:
    """What a forward pass is disturbed by.

    Attributes:
        dropout: share of every linear and convolutional layer's inputs that are set to zero, the others scaled up.
        inputs: standard deviation of what is added to inputs of real numbers.
    """

    dropout: float
    inputs: float

    @contextmanager
    def on(self, model: nn.Module, inputs: Mapping[str, Tensor], seed: int) -> Iterator[dict[str, Tensor]]:
        """Disturb the model while the context lasts; what is drawn depends on the seed alone.

        Args:
            model: it is given back as it was.
            inputs: its arguments by name.
            seed: of all that is drawn.

        Yields:
            The inputs to run it on.
        """
        device = next(iter(inputs.values())).device
        hooks = [layer.register_forward_pre_hook(self._drop) for layer in _layers(model)] if self.dropout else []
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(seed)
                yield {name: self._noisy(tensor) for name, tensor in inputs.items()}
        finally:
            for hook in hooks:
                hook.remove()

    def _drop(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        first, *others = arguments
        return (F.dropout(first, self.dropout), *others)

    def _noisy(self, tensor: Tensor) -> Tensor:
        if not self.inputs or not tensor.is_floating_point():
            return tensor
        return tensor + self.inputs * torch.randn_like(tensor)


def _layers(model: nn.Module) -> list[nn.Module]:
    """Linear and convolutional layers, compressed ones too."""
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d)
    return [module for module in model.modules() if isinstance(module, kinds)]
