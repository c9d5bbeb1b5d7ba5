"""What forward passes do otherwise in training: attention in float32, activations computed again, noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aicompress.model.blocks.find import find_blocks

NAME = "aicompress_sdpa_float32"


def attend_in_float32(model: nn.Module) -> None:
    """Let a transformers model compute its attention core in float32, whatever autocast says; others stay as they are.

    With torch 2.13 on the CPU the backward pass of bfloat16 attention takes seven times as long as the float32 one, and
    more than all matrix products of a small encoder together.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)  # type: ignore[operator]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    """transformers' scaled-dot-product attention with float32 inputs."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    with torch.autocast(query.device.type, enabled=False):
        output, weights = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **options
        )
    return output.to(query.dtype), weights


def recompute_activations(model: nn.Module) -> None:
    """Let every block of a model keep its inputs alone until its gradients are computed.

    What a block decodes of stored weights is not kept either. Gradients are the same, of one more forward pass.
    """
    for block in find_blocks(model):
        block.module.forward = partial(checkpoint, block.module.forward, use_reentrant=False)


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
