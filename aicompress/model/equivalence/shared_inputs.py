"""Find layers that share an input, such as query, key and value, without weights or data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.model.loading.definitions.config import batched_experts
from aicompress.model.loading.places import Place, Slot


def shared_inputs(model: Any, places: Mapping[str, Place], inputs: Mapping[str, Tensor]) -> dict[str, str]:
    """The first layer that is given the same tensor, by layer.

    The model runs on the meta device: shapes only. What an architecture decides by its data cannot be followed, and
    layers that the run does not reach are alone.

    Args:
        model: on the meta device.
        places: by layer name its module's path, or its part of a merged parameter; parts of one expert's tensor share.
        inputs: of a forward pass; only their shapes matter.
    """
    leaders: dict[str, str] = {}
    held: list[tuple[Tensor, str]] = []  # holding a tensor keeps its identity from being used again

    def see(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        if name not in leaders:
            leaders[name] = next((other for tensor, other in held if tensor is given), name)
            held.append((given, leaders[name]))

    hooks = []
    slots: dict[tuple[str, str, int], str] = {}
    for name, place in places.items():
        if isinstance(place, Slot):
            leaders[name] = slots.setdefault((place.module, place.leaf, place.expert), name)
            continue
        module: nn.Module = model.get_submodule(place if isinstance(place, str) else place.module)
        hook = lambda _, args, kwargs, name=name: see(name, args, kwargs)  # noqa: E731
        hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        with torch.no_grad(), torch.device("meta"), batched_experts(model):
            model(**{key: tensor.to("meta") for key, tensor in inputs.items() if key != "attention_mask"})
    except Exception:  # whatever an architecture cannot do without data; what was seen until then holds
        pass
    finally:
        for handle in hooks:
            handle.remove()
    return {name: leaders.get(name, name) for name in places}
