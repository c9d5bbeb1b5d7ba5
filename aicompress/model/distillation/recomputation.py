"""Activations of a block are computed again on the way back instead of being kept.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv:1604.06174, section 3.2.
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from aicompress.model.blocks.find import find_blocks


def recompute_activations(model: nn.Module) -> None:
    """Let every block of a model keep its inputs alone until its gradients are computed.

    What a block decodes of stored weights is not kept either. Gradients are the same, of one more forward pass.
    """
    for block in find_blocks(model):
        block.module.forward = partial(checkpoint, block.module.forward, use_reentrant=False)
