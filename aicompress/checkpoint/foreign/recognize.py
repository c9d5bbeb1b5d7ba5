"""Recognize the weights of foreign layouts, and refuse what looks like one that no layout understands."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch

from aicompress.checkpoint.foreign.layout import ForeignLayout, ForeignTensors, ForeignWeight
from aicompress.discovery import members
from aicompress.errors import CheckpointError, Unsupported, first_line
from aicompress.weights import TensorSpec

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
BYTES = (torch.uint8, torch.int8)
WORDS = (torch.int32, torch.uint32)
# What lies beside quantized weights and belongs to inputs, outputs and the key-value cache.
RIDER = re.compile(
    r"(?:^|\.)(?:input|output|activation|prob|softmax|kv|[qkv]|kv_cache)(?:_proj)?_(?:global_)?"
    r"(?:scale|zero_point)(?:_ub|_inv|_\d)?$"
)
# Those of them that keys and values are divided by on their way into the cache, whatever the weights become.
CACHE_SCALE = re.compile(r"(?:^|\.)(?:(?:kv|[kv]|kv_cache)(?:_proj)?|[kv]_proj\.output)_(?:scale|zero_point)$")
_SCALE = re.compile(r"scale|absmax|scb|quant_map|zeros|zero_point", re.IGNORECASE)
_CHANGES = re.compile(r"scale|smooth|perm|g_idx|zero_point|zeros|offset", re.IGNORECASE)  # what a weight means
_PACKED = re.compile(r"(?:^|\.)(?:qweight|weight_packed|packed_weight|weight|[^.]*_blocks|[^.]*_packed)$")


def layouts() -> Mapping[str, ForeignLayout]:
    """Every foreign layout by name."""
    return members("aicompress.checkpoint.foreign", "LAYOUT")


def methods() -> list[str]:
    """Values of `quant_method` that are read."""
    return sorted({method for layout in layouts().values() for method in layout.methods})


def foreign_weights(stored: ForeignTensors, method: str | None, where: str) -> dict[str, ForeignWeight]:
    """The weights that foreign layouts recognize, by parameter.

    Args:
        stored: the checkpoint's headers and settings.
        method: its `quant_method`; None where nothing says one, and tensors have to.
        where: the checkpoint, for messages.

    Raises:
        Unsupported: the tensors of a weight are not as its layout has them.
        CheckpointError: a weight is stored in two ways.
    """
    weights: dict[str, ForeignWeight] = {}
    if method is None and not any(_may_be_packed(spec) for spec in stored.specs.values()):
        return weights
    for layout in layouts().values():
        if method is not None and method not in layout.methods:
            continue
        try:
            recognized = layout.weights(stored)
        except CheckpointError as error:  # as this layout is known: a newer writer may have others
            raise Unsupported(error.message, error.hint) from error
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
            raise Unsupported(
                f"{where}: its {layout.name} weights are not understood: {first_line(error, 'they are malformed')}",
                "start from the original checkpoint, or download this one again",
            ) from error
        twice = sorted(weights.keys() & recognized.keys())
        if twice:
            raise CheckpointError(f"{where}: {twice[0]} is stored in two ways", "start from the original checkpoint")
        weights |= recognized
    return weights


def require_understood(specs: Mapping[str, TensorSpec], known: Collection[str], quantized: bool, where: str) -> None:
    """Refuse tensors that must not be read as plain numbers: float8 and packed integers whose scale nothing explains.

    Args:
        specs: every tensor on disk.
        known: those that belong to a weight that is understood.
        quantized: the checkpoint says that it is quantized.
        where: the checkpoint, for messages.

    Raises:
        Unsupported: naming the first one.
    """
    beside: dict[str, list[str]] = {}
    for name in specs:
        module, _, leaf = name.rpartition(".")
        if _SCALE.search(leaf):
            beside.setdefault(module, []).append(name)
    for name, spec in specs.items():
        if name in known or not _may_be_packed(spec):
            continue
        around = [*beside.get(name.rpartition(".")[0], ()), *beside.get(name, ())]
        scales = [scale for scale in around if scale != name and scale not in known and not RIDER.search(scale)]
        packed = spec.dtype in FLOAT8 or bool(_PACKED.search(name))
        if packed and (scales or quantized):
            beside_it = f"what {scales[0]!r} does to it" if scales else "its scale"
            raise Unsupported(
                f"{where} is quantized: {name!r} is {str(spec.dtype).removeprefix('torch.')}, "
                f"and {beside_it} is not understood",
                f"start from the original checkpoint; read are {', '.join(methods())}",
            )


def require_nothing_beside(
    specs: Mapping[str, TensorSpec], weights: Collection[str], known: Collection[str], where: str
) -> None:
    """Refuse a quantized layer with a tensor that changes what its weight means, such as a scale of its inputs.

    Args:
        specs: every tensor on disk.
        weights: parameters that are quantized.
        known: tensors that belong to them.
        where: the checkpoint, for messages.

    Raises:
        Unsupported: naming the first one.
    """
    modules = {name.rpartition(".")[0] for name in weights}
    for name in specs:
        module, _, leaf = name.rpartition(".")
        if module in modules and name not in known and _CHANGES.search(leaf) and not RIDER.search(name):
            raise Unsupported(
                f"{where}: what {name!r} does to the weight beside it is not understood", "start from the original"
            )


def require_settings_read(settings: Mapping[str, Any], where: str) -> None:
    """Refuse settings by which weights are not what their tensors say.

    Raises:
        Unsupported: they rotate inputs as the model runs, or store sparse tensors.
    """
    sparse = settings.get("sparsity_config")
    form = sparse.get("format") if isinstance(sparse, dict) else None
    for holds, what in (
        (bool(settings.get("transform_config")), "transform_config, which changes inputs as the model runs,"),
        (form not in (None, "dense"), f"sparsity_config of format {form!r}"),
    ):
        if holds:
            raise Unsupported(f"{where}: {what} is not read", "start from the original checkpoint")


def _may_be_packed(spec: TensorSpec) -> bool:
    """Whether a tensor may hold codes; vectors of integers are positions, sizes and states."""
    return (spec.dtype in FLOAT8 or spec.dtype in BYTES or spec.dtype in WORDS) and len(spec.shape) > 1


def settings_of(config: Mapping[str, Any] | None, beside: Mapping[str, Any] | None) -> dict[str, Any]:
    """How a checkpoint is quantized, from config.json or else from a file beside it."""
    given = (config or {}).get("quantization_config") or beside or {}
    nested = given.get("quantization") if isinstance(given, dict) else None  # hf_quant_config.json of ModelOpt
    return {**given, **nested} if isinstance(nested, dict) else dict(given)
