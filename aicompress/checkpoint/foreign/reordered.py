"""compressed-tensors with `weight_g_idx`: packed integers whose groups are of columns that do not lie side by side."""

from __future__ import annotations

from functools import partial

import torch

from aicompress.checkpoint.foreign.layout import (
    ForeignLayout,
    ForeignTensors,
    ForeignWeight,
    Read,
    decoded,
    modules_with,
    require,
    weight_of,
)
from aicompress.weights import Dense
from aicompress.weights.coding.packing import WORD, unpack_rows

ROLES = {
    "codes": "weight_packed",
    "scale": "weight_scale",
    "groups": "weight_g_idx",
    "shape": "weight_shape",
    "zeros": "weight_zero_point",
}


def weights(stored: ForeignTensors) -> dict[str, ForeignWeight]:
    """Modules with `weight_g_idx`."""
    return {weight_of(module): _weight(stored, module) for module in modules_with(stored.specs, "weight_g_idx")}


def _weight(stored: ForeignTensors, module: str) -> ForeignWeight:
    names = stored.names(module, ROLES)
    require({"codes", "scale", "groups", "shape"} <= set(names), f"{module} lacks tensors")
    out, columns = (int(size) for size in stored.read(names["shape"]).tolist())
    codes, scale = stored.specs[names["codes"]], stored.specs[names["scale"]]
    require(out > 0 and columns > 0 and codes.dtype is torch.int32 and len(codes.shape) == 2, f"codes {codes}")
    bits = codes.shape[1] * 32 // columns
    fits = 1 <= bits <= 8 and codes.shape == (out, -(-columns * bits // 32)) and scale.shape[:1] == (out,)
    fits = fits and stored.specs[names["groups"]].shape == (columns,) and len(scale.shape) == 2
    require(fits, f"{module}: codes {codes} and scales {scale} for {[out, columns]}")
    if "zeros" in names:
        zeros = stored.specs[names["zeros"]]
        require(zeros.shape == (-(-out * bits // 32), scale.shape[1]), f"zero points {zeros}")
    dense, transposed = stored.dense(weight_of(module), (out, columns))
    words, decode = f"{bits}-bit, columns in another order", partial(_decode, columns, bits, stored.dtype, names)
    along: dict[str, int] = {role: 0 for role in ("codes", "scale", "zeros") if role in names}
    return ForeignWeight(dense, names, words, decode, None, transposed, along=along, multiple=WORD)


def _decode(columns: int, bits: int, dtype: torch.dtype, names: dict[str, str], read: Read) -> Dense:
    """w = (code - zero) * scale, each column with those of its own group."""
    half = 1 << (bits - 1)
    codes = unpack_rows(read("codes"), bits, columns, half)
    group, scale = read("groups").long(), read("scale").float()
    require(int(group.min()) >= 0 and int(group.max()) < scale.shape[1], "weight_g_idx names no group of the scales")
    zeros = torch.zeros_like(scale)
    if "zeros" in names:
        zeros = unpack_rows(read("zeros").t().contiguous(), bits, len(codes)).t().float() - half

    def rows(start: int, stop: int) -> torch.Tensor:
        return (codes[start:stop].float() - zeros[start:stop][:, group]) * scale[start:stop][:, group]

    return decoded(len(codes), columns, dtype, 1, rows)


LAYOUT = ForeignLayout("reordered", ("compressed-tensors",), weights)
