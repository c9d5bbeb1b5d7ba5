"""One layer of a checkpoint as a running module, without the model around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from aicompress.checkpoint import Checkpoint
from aicompress.layer import Kind, LayerInfo
from aicompress.model import hf
from aicompress.model.kernels.select import fast_module, has_room, is_resident
from aicompress.weights import TensorSpec

_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def running_layer(checkpoint: Checkpoint, info: LayerInfo, rows: slice | None = None, part: str = "") -> nn.Module:
    """The layer as `load` would run it, without bias; convolutions with stride 1 and no groups.

    Args:
        checkpoint: where it is read.
        info: a linear, head or convolution layer, or one factor of it, which stands for the whole.
        rows: those of its outputs that the module gives; None: all of them.
        part: a part of its weight that the module multiplies by; '' for all of it.
    """
    entry = checkpoint.manifest.entries.get(info.tensor)
    if entry is None:
        axis = int(info.transposed)
        tensor = (
            checkpoint.read(info.tensor) if rows is None else checkpoint.rows(info.tensor, rows.start, rows.stop, axis)
        )
        matrix = tensor.t() if info.transposed else tensor
        module = _shell(info.kind, matrix.shape)
        module.weight = nn.Parameter(matrix if matrix.dtype.itemsize > 1 else matrix.float(), requires_grad=False)
        return module.eval()
    weight = checkpoint.weight(info.tensor, rows, part)
    shape = (weight.shape[0], *info.tensor_shape[1:]) if info.kind == "conv" else weight.shape
    module = _shell(info.kind, shape)
    memory = (is_resident(checkpoint), has_room(checkpoint))
    if running := fast_module(module, weight, entry.dense.dtype, *memory):
        ready: nn.Module = running.eval()
        return ready
    dtype = entry.dense.dtype if entry.dense.dtype.itemsize > 1 else torch.float32  # as the inputs
    read = replace(
        entry.read_as(weight), dense=TensorSpec(entry.dense.dtype, shape), transposed=False
    )  # (out, in) here
    tensors = {suffix: hf.cast(tensor, dtype) for suffix, tensor in weight.tensors().items()}
    hf.attach(module, read.to_json(), tensors)
    hf.mark_ready(module)
    return module.eval()


def _shell(kind: Kind, shape: Sequence[int]) -> nn.Module:
    """An empty module whose weight has this shape, (out, in, *kernel)."""
    with torch.device("meta"):
        if kind == "conv":
            return _CONVOLUTIONS[len(shape)](shape[1], shape[0], shape[2:], bias=False)  # type: ignore[arg-type]
        out, columns = shape
        return nn.Linear(columns, out, bias=False)
