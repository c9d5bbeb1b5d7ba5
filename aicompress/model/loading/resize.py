"""Resize the layers of a module to the shapes that a checkpoint's tensors have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CheckpointError
from aicompress.model import hf

WIDTH_ATTRIBUTES = (
    "out_features", "in_features", "out_channels", "in_channels", "groups",
    "num_features", "num_channels", "num_parameters", "normalized_shape", "embedding_dim",
)  # fmt: skip


def owner_of(model: nn.Module, name: str) -> tuple[Any, str]:
    """The module that holds a tensor of a model, and the tensor's name there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def put(layer: nn.Module, leaf: str, value: Tensor) -> None:
    if leaf in layer._parameters:
        layer._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        layer._buffers[leaf] = value


def set_widths(layer: nn.Module, widths: Mapping[str, int]) -> None:
    for name, value in widths.items():
        setattr(layer, name, (value,) if name == "normalized_shape" else value)


def resize(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Make a module fit a checkpoint of pruned channels; its tensors there become empty ones of the right shape.

    Raises:
        CheckpointError: the module has no such layer.
    """
    shapes = {name: spec.shape for name, spec in checkpoint.parameters().items()} if checkpoint.manifest.widths else {}
    if hasattr(module, "all_tied_weights_keys"):  # of transformers: names on disk may differ from names of modules
        hf.fit_shapes(module, checkpoint.manifest.widths, shapes)
        return
    for path, widths in checkpoint.manifest.widths.items():
        try:
            layer = module.get_submodule(path) if widths else module.get_submodule(path.rpartition(".")[0])
        except AttributeError as error:
            raise CheckpointError(
                f"{checkpoint.path} was pruned at {path!r}, which {type(module).__name__} does not have",
                "give the module that it was pruned from",
            ) from error
        leaves = [*layer._parameters, *layer._buffers] if widths else [path.rpartition(".")[2]]
        prefix = path if widths else path.rpartition(".")[0]
        for leaf in leaves:
            old, shape = getattr(layer, leaf, None), shapes.get(f"{prefix}.{leaf}" if prefix else leaf)
            if isinstance(old, Tensor) and shape is not None and tuple(old.shape) != shape:
                put(layer, leaf, torch.empty(shape, dtype=old.dtype, device=old.device))
        set_widths(
            layer, {name: value for name, value in widths.items() if name in WIDTH_ATTRIBUTES and hasattr(layer, name)}
        )
