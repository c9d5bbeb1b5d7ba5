"""A model whose parameters are divided over the processes; those of a block are whole only while it runs.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020, section 5 (stage 3),
in the form of Zhao et al., "PyTorch FSDP", 2023, arXiv:2304.11277, section 3: every process holds some rows of each
parameter, and of its gradient after the backward pass. PyTorch's own modules for it are imported when they are needed:
that takes a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.model.blocks.find import find_blocks
from aicompress.model.hf import Stored


class ShardedModel(nn.Module):
    """A model whose parameters are divided, in a module of its own.

    The outermost of divided modules gets another class, by which transformers would not know what a model can tell of
    its layers.

    Args:
        model: all of it.
        body: what of it is run.
    """

    def __init__(self, model: nn.Module, body: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.__dict__["body"] = body  # a part of the model, and not another one

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.__dict__["body"](*inputs, **named)


def shard_parameters(model: nn.Module, body: nn.Module, device: torch.device) -> nn.Module:
    """Divide the parameters of a model over the processes of the default group, along their first axis.

    Parameters become `DTensor`s. Those stay whole in every process that have no axis, or that several blocks read:
    their gradients are those of this process alone.

    Args:
        model: it has whole parameters, on any device.
        body: what of it is run.
        device: where it is to run.

    Returns:
        What is called instead of the body.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    blocks = {id(block.module): block.module for block in find_blocks(model) if block.name}
    whole = _not_divided(model, blocks)
    outermost = ShardedModel(model, body)
    for module in (*blocks.values(), outermost):
        # Also of the root: rows that are moved while it is whole, as for a held-out loss, would not be seen.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        module.register_forward_hook(_forget)
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    _show_stored_once(outermost)
    return outermost


def _show_stored_once(model: nn.Module) -> None:
    """Let compressed layers show their stored `weight` while the first pass looks for it, and not the decoded one."""
    ready = [layer for layer in model.modules() if isinstance(layer, Stored) and layer.__dict__.get("ready")]

    def show(stored: bool) -> None:
        for layer in ready:
            layer.ready = not stored
        hooks.pop().remove()

    hooks = [model.register_forward_pre_hook(lambda module, arguments: show(stored=False))]
    hooks.append(model.register_forward_pre_hook(lambda module, arguments: show(stored=True), prepend=True))


def _not_divided(model: nn.Module, blocks: Mapping[int, nn.Module]) -> set[nn.Parameter]:
    """Parameters that are needed whole outside of the one block they lie in, and such without an axis."""
    group_of: dict[int, int] = {}
    for identity, block in blocks.items():
        group_of |= {id(module): identity for module in block.modules()}
    groups: dict[nn.Parameter, set[int]] = {}
    for module in model.modules():
        read: list[Tensor | None] = list(module._parameters.values())
        read += module.stored.values() if isinstance(module, Stored) else []
        for tensor in read:
            if isinstance(tensor, nn.Parameter):
                groups.setdefault(tensor, set()).add(group_of.get(id(module), 0))
    return {parameter for parameter, of in groups.items() if len(of) > 1 or parameter.ndim == 0}


def _forget(module: nn.Module, arguments: Any, output: Any) -> None:
    """Drop what layers have decoded: it is whole, and of parameters that are put together anew for the next pass."""
    for layer in module.modules():
        layer.__dict__.pop("decoded", None)


def is_divided(parameter: Tensor) -> bool:
    """Whether a process holds some rows of a parameter alone."""
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def own_rows(sharded: Tensor) -> Tensor:
    """This process's rows of a divided parameter, or of its gradient; they share its memory."""
    from torch.distributed.tensor import DTensor

    assert isinstance(sharded, DTensor)
    rows: Tensor = sharded.detach().to_local()  # type: ignore[attr-defined]
    return rows


def rows_of(sharded: Tensor, whole: Tensor) -> Tensor:
    """This process's rows of a tensor that is shaped like a divided parameter; no other process is asked.

    Args:
        sharded: the parameter.
        whole: all rows.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(sharded, DTensor)
    divided = distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None)
    return divided.to_local()


def all_rows(sharded: Tensor, rows: Tensor) -> Tensor:
    """The whole tensor of every process's rows; all processes ask at once.

    Args:
        sharded: a divided parameter of the same shape.
        rows: this process's.
    """
    from torch.distributed.tensor import DTensor

    assert isinstance(sharded, DTensor)
    like = {"shape": sharded.shape, "stride": sharded.stride(), "run_check": False}
    return DTensor.from_local(rows, sharded.device_mesh, sharded.placements, **like).full_tensor()  # type: ignore[arg-type]
