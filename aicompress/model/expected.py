"""What a model definition expects of a checkpoint: parameters that are missing, or have another shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aicompress.model.kinds import skeleton


def mismatches(config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[str] | None:
    """Parameters that transformers would fill with random values or refuse, each with the reason.

    A tied parameter is there when any of those it is tied to is.

    Args:
        config: config.json.
        shapes: shapes of the checkpoint's parameters by name; a base model's prefix may be missing or added.

    Returns:
        None when transformers does not know the architecture.
    """
    model = skeleton(config)
    if model is None:
        return None
    prefix = f"{model.base_model_prefix}."
    model.tie_weights()
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    wanted = dict(model.named_parameters())
    found: list[str] = []
    for name, parameter in wanted.items():
        variants = [v for tied in groups[id(parameter)] for v in (tied, prefix + tied, tied.removeprefix(prefix))]
        present = next((variant for variant in variants if variant in shapes), None)
        if present is None:
            found.append(f"{name} is missing")
        elif tuple(parameter.shape) != shapes[present]:
            found.append(f"{present} is {list(shapes[present])}, config.json says {list(parameter.shape)}")
    return found
