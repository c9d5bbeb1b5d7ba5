"""One layer of a checkpoint as a running module, without the model around it."""

from __future__ import annotations

import torch
from torch import nn

from aicompress.checkpoint import Checkpoint
from aicompress.layer import LayerInfo
from aicompress.model import hf
from aicompress.model.kernels.select import fast_module, has_room, is_resident

_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def running_layer(checkpoint: Checkpoint, info: LayerInfo) -> nn.Module:
    """The layer as `load` would run it, without bias; convolutions with stride 1 and no groups.

    Args:
        info: a linear, head or convolution layer, or one factor of it, which stands for the whole.
    """
    module = _shell(info)
    entry = checkpoint.manifest.entries.get(info.tensor)
    if entry is None:
        tensor = checkpoint.read(info.tensor)
        matrix = tensor.t() if info.transposed else tensor
        module.weight = nn.Parameter(matrix if matrix.dtype.itemsize > 1 else matrix.float(), requires_grad=False)
        return module.eval()
    weight = checkpoint.weight(info.tensor)
    memory = (is_resident(checkpoint), has_room(checkpoint))
    if running := fast_module(module, weight, entry.dense.dtype, *memory):
        ready: nn.Module = running.eval()
        return ready
    plain = {**entry.read_as(weight).to_json(), "transposed": False}
    if info.transposed:
        plain["shape"] = plain["shape"][::-1]  # the stored matrix is (out, in) in any case
    dtype = entry.dense.dtype if entry.dense.dtype.itemsize > 1 else torch.float32  # as the inputs
    hf.attach(module, plain, {suffix: hf.cast(tensor, dtype) for suffix, tensor in weight.tensors().items()})
    hf.mark_ready(module)
    return module.eval()


def _shell(info: LayerInfo) -> nn.Module:
    """An empty module of the layer's shape."""
    shape = info.tensor_shape
    with torch.device("meta"):
        if info.kind == "conv":
            return _CONVOLUTIONS[len(shape)](shape[1], shape[0], shape[2:], bias=False)  # type: ignore[arg-type]
        out, columns = reversed(shape) if info.transposed else shape
        return nn.Linear(columns, out, bias=False)
