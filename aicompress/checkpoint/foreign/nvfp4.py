"""NVFP4: numbers of four bits in groups of 16, each group with a float8 scale, and one scale for the tensor.

ModelOpt: `weight` (out, in / 2) bytes, `weight_scale` (out, in / 16), and `weight_scale_2`, which multiplies;
compressed-tensors: `weight_packed`, `weight_scale`, and `weight_global_scale`, which divides.
"""

from __future__ import annotations

from functools import partial

import torch

from aicompress.checkpoint.foreign import fp4
from aicompress.checkpoint.foreign.layout import (
    ForeignLayout,
    ForeignTensors,
    ForeignWeight,
    Read,
    modules_with,
    require,
    weight_of,
)
from aicompress.weights import Codebook

GROUP = 16


def weights(stored: ForeignTensors) -> dict[str, ForeignWeight]:
    """Modules that have a scale for the tensor beside the scales of its groups."""
    recognized: dict[str, ForeignWeight] = {}
    for suffix, packed, divides in (
        ("weight_scale_2", "weight", False),
        ("weight_global_scale", "weight_packed", True),
    ):
        roles = {"packed": packed, "scale": "weight_scale", "whole": suffix}
        for module in modules_with(stored.specs, suffix):
            names = stored.names(module, roles)
            if set(names) == set(roles) and stored.specs[names["packed"]].dtype is torch.uint8:
                recognized[weight_of(module)] = _weight(stored, module, names, divides)
    return recognized


def _weight(stored: ForeignTensors, module: str, names: dict[str, str], divides: bool) -> ForeignWeight:
    packed, scale, whole = (stored.specs[names[role]] for role in ("packed", "scale", "whole"))
    rows, width = packed.shape
    groups = 2 * width // GROUP
    one = all(size == 1 for size in whole.shape) and whole.dtype.is_floating_point
    fits = scale.shape == (rows, groups) and not 2 * width % GROUP and scale.dtype is torch.float8_e4m3fn
    require(fits and one, f"scales {scale} and {whole} for {packed}")
    dense, transposed = stored.dense(weight_of(module), (rows, 2 * width))
    outline = fp4.outline(rows, 2 * width, groups, torch.float32)
    decode, along = partial(_codebook, divides), {"packed": 0, "scale": 0}
    return ForeignWeight(dense, names, "nvfp4", decode, outline, transposed, along=along)


def _codebook(divides: bool, read: Read) -> Codebook:
    whole, scale = read("whole").float().reshape(()), read("scale").float()
    return fp4.codebook(read("packed"), scale / whole if divides else scale * whole)


LAYOUT = ForeignLayout("nvfp4", ("modelopt", "modelopt_fp4", "nvfp4", "compressed-tensors"), weights)
