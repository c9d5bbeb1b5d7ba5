"""Keep the routers of a small model from choosing some experts, as if these were not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.errors import CheckpointError
from aicompress.model.architecture.small_models import tiny_model

LEAST = -1e4  # a score that no softmax or sigmoid lets through


@torch.no_grad()
def silence_experts(model: Any, routed: Sequence[str], gone: Tensor, inputs: Mapping[str, Tensor]) -> None:
    """Give experts the least score for every token that a model is run on.

    A router's rows for them become the solution of X w = `LEAST` for its inputs X (tokens, hidden), of which there are
    fewer than coordinates.

    Args:
        model: small, in memory.
        routed: parameters with an axis of experts, of one layer.
        gone: the experts.
        inputs: the tokens.

    Raises:
        CheckpointError: no router's inputs can be seen.
    """
    matrices = [name for name in routed if model.get_parameter_or_buffer(name).ndim == 2]
    for name in routed:
        value = model.get_parameter_or_buffer(name)
        if value.ndim == 1:
            value[gone] = LEAST
    if not matrices:
        raise CheckpointError("which tensor routes tokens to experts cannot be told")
    for name in matrices:
        states = _inputs_of(model, model.get_submodule(name.rpartition(".")[0]), inputs)
        rows = torch.linalg.lstsq(states, torch.full((len(states), 1), LEAST, dtype=states.dtype)).solution[:, 0]
        router = model.get_parameter(name)
        if router.shape[1] != len(rows):
            raise CheckpointError(f"{name} reads something else than tokens")
        router[gone] = rows.to(router.dtype)


def _inputs_of(model: Any, module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """What a module is given in a forward pass, (tokens, width).

    Raises:
        CheckpointError: nothing.
    """
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda module, arguments: seen.extend(arguments[:1]))
    try:
        tiny_model.outputs_of(model, inputs)
    finally:
        hook.remove()
    if not seen:
        raise CheckpointError("the states that a router reads cannot be seen")
    return seen[0].reshape(-1, seen[0].shape[-1]).double()
