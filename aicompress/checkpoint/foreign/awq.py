"""AWQ (gemm): 4-bit codes, eight in a word in the order 0 2 4 6 1 3 5 7 along the output axis, with zero points.

`qweight` int32 (in, out / 8), `qzeros` int32 (groups, out / 8), `scales` (groups, out): w = (code - zero) * scale.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from aicompress.checkpoint.foreign.layout import (
    ForeignLayout,
    ForeignTensors,
    ForeignWeight,
    Read,
    modules_with,
    require,
    weight_of,
)
from aicompress.weights import IntGrouped

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each four bits of a word hold, from the lowest
BITS, IN_WORD = 4, 8
ROLES = {"codes": "qweight", "zeros": "qzeros", "scale": "scales"}


def weights(stored: ForeignTensors) -> dict[str, ForeignWeight]:
    """Modules with `qweight`, `qzeros` and `scales`, of as many inputs as there are rows of words."""
    recognized: dict[str, ForeignWeight] = {}
    for module in modules_with(stored.specs, "qweight"):
        names = stored.names(module, ROLES)
        if set(names) != set(ROLES):
            continue
        codes, zeros, scale = (stored.specs[names[role]] for role in ROLES)
        if len(codes.shape) == len(scale.shape) == 2 and codes.shape[1] * IN_WORD == scale.shape[1]:
            require(codes.dtype is zeros.dtype is torch.int32, f"codes {codes}")
            recognized[weight_of(module)] = _weight(stored, module, names)
    return recognized


def _weight(stored: ForeignTensors, module: str, names: dict[str, str]) -> ForeignWeight:
    codes, zeros, scale = (stored.specs[names[role]] for role in ROLES)
    columns, (groups, out), settings = codes.shape[0], scale.shape, stored.settings
    version = str(settings.get("version", "gemm")).lower()
    bits = settings.get("bits", settings.get("w_bit", BITS))
    require(version == "gemm" and bits == BITS, f"version {version!r} of {bits} bits is not read")
    fits = zeros.shape == (groups, out // IN_WORD) and groups and not columns % groups and scale.dtype.is_floating_point
    require(bool(fits), f"{zeros} and {scale} for {codes}")
    size = 0 if groups == 1 else columns // groups
    dense, transposed = stored.dense(weight_of(module), (out, columns))
    outline = IntGrouped.outline((out, columns), (scale.dtype, (out, groups)), False, BITS, size)
    decode = partial(_integers, size)
    along = dict.fromkeys(ROLES, 1)
    return ForeignWeight(dense, names, "awq, 4-bit", decode, outline, transposed, along=along, multiple=IN_WORD)


def _integers(size: int, read: Read) -> IntGrouped:
    codes, zeros = _unpacked(read("codes")), _unpacked(read("zeros"))
    return IntGrouped(codes.t().contiguous(), read("scale").t().contiguous(), zeros.t().contiguous(), BITS, size)


def _unpacked(words: Tensor) -> Tensor:
    """(rows, out / 8) int32 -> (rows, out) int8, less 8."""
    shifts = torch.tensor([BITS * ORDER.index(place) for place in range(IN_WORD)], dtype=torch.int32)
    values = (words[..., None] >> shifts) & 15
    return (values.reshape(words.shape[0], -1) - 8).to(torch.int8)


LAYOUT = ForeignLayout("awq", ("awq",), weights)
