"""MXFP6 (E2M3): numbers of six bits in groups of 32, each group with a power of two for a scale; compressed-tensors.

`weight_packed` (out, in * 6 / 8) bytes, a little-endian bit stream; `weight_scale` (out, in / 32) exponents.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from aicompress.checkpoint.foreign.layout import (
    ForeignLayout,
    ForeignTensors,
    ForeignWeight,
    Read,
    modules_with,
    weight_of,
)
from aicompress.checkpoint.foreign.scaling import real
from aicompress.weights import Codebook
from aicompress.weights.coding.packing import unpack_rows

GROUP, BITS = 32, 6
VALUES = [m / 8 for m in range(8)] + [(1 + m / 8) * 2**e for e in range(3) for m in range(8)]
TABLE = (*VALUES, *(-value for value in VALUES))
ROLES = {"packed": "weight_packed", "scale": "weight_scale"}
SCALES = torch.bfloat16


def weights(stored: ForeignTensors) -> dict[str, ForeignWeight]:
    """Packed bytes that are six bits wide for the groups of their scales."""
    recognized: dict[str, ForeignWeight] = {}
    for module in modules_with(stored.specs, "weight_packed"):
        names = stored.names(module, ROLES)
        if set(names) != set(ROLES):
            continue
        packed, scale = (stored.specs[names[role]] for role in ROLES)
        if packed.dtype is not torch.uint8 or scale.dtype not in (torch.uint8, torch.float8_e8m0fnu):
            continue
        if len(packed.shape) == 2 and scale.shape == (packed.shape[0], packed.shape[1] * 8 // (BITS * GROUP)):
            rows, columns = packed.shape[0], packed.shape[1] * 8 // BITS
            if columns % GROUP == 0 and packed.shape[1] * 8 == columns * BITS:
                outline = Codebook.outline((rows, columns), BITS, 1, SCALES, scale.shape)
                dense, transposed = stored.dense(weight_of(module), (rows, columns))
                weight = ForeignWeight(dense, names, "mxfp6", _codebook, outline, transposed)
                recognized[weight_of(module)] = replace(weight, along=dict.fromkeys(names, 0))
    return recognized


def _codebook(read: Read) -> Codebook:
    packed = read("packed")
    codes = unpack_rows(packed.view(torch.int32), BITS, packed.shape[1] * 8 // BITS)
    return Codebook(codes, torch.tensor([TABLE], dtype=SCALES), real(read("scale")).to(SCALES), BITS)


LAYOUT = ForeignLayout("mxfp6", ("compressed-tensors",), weights)
