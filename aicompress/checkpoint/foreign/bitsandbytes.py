"""bitsandbytes: 4-bit codes of a table with a scale for every 64 numbers (nf4, fp4), and int8 with a scale per row.

4 bits: `weight` uint8 (numbers / 2, 1), the high four bits first; `weight.quant_map`, the table; `weight.absmax`, the
scales, themselves codes of `weight.nested_quant_map` where they are quantized again; and a JSON in
`weight.quant_state.bitsandbytes__*`. 8 bits: `weight` int8 and `SCB`, w = code * SCB / 127.
"""

from __future__ import annotations

import json
import math
from functools import partial
from typing import Any

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
from aicompress.weights import Codebook, Dense, IntGrouped, TensorSpec, Weight

STATE = ".quant_state.bitsandbytes__"
NESTED = {"offsets": ".nested_absmax", "levels": ".nested_quant_map"}


def weights(stored: ForeignTensors) -> dict[str, ForeignWeight]:
    """Weights with a quant_state, and int8 weights with `SCB`."""
    recognized: dict[str, ForeignWeight] = {}
    for name in stored.specs:
        parameter, mark, kind = name.partition(STATE)
        if mark and parameter in stored.specs:
            recognized[parameter] = _four_bits(stored, parameter, name, kind)
    for module in modules_with(stored.specs, "SCB"):
        recognized[weight_of(module)] = _eight_bits(stored, module)
    return recognized


def _four_bits(stored: ForeignTensors, parameter: str, state_name: str, kind: str) -> ForeignWeight:
    roles = {"packed": "", "table": ".quant_map", "scale": ".absmax"}
    state = json.loads(bytes(stored.read(state_name).tolist()))
    shape, size = tuple(int(length) for length in state["shape"]), int(state["blocksize"])
    nested = "nested_blocksize" in state
    roles |= NESTED if nested else {}
    names = {role: f"{parameter}{suffix}" for role, suffix in roles.items()} | {"state": state_name}
    require(all(name in stored.specs for name in names.values()), f"{parameter} lacks tensors")
    count = math.prod(shape)
    blocks = -(-count // size)
    require(size > 0 and min(shape) > 0, f"blocks of {size} in {list(shape)}")
    fits = math.prod(stored.specs[names["packed"]].shape) == -(-count // 2) and len(shape) == 2
    fits = fits and stored.specs[names["scale"]].shape == (blocks,) and stored.specs[names["table"]].shape == (16,)
    require(fits, f"{parameter}: {stored.specs[names['packed']]} for {list(shape)}")
    dense, transposed = stored.dense(parameter, (shape[0], shape[1]))
    whole = shape[1] % size == 0  # no row shares a block with the next one
    outline = Codebook.outline((shape[0], shape[1]), 4, 1, torch.float32, (shape[0], shape[1] // size))
    decode = partial(_codebook, state, shape[1]) if whole else partial(_flat, state, shape[1], stored.dtype)
    # Rows that hold whole bytes, and whole blocks of scales, also of those that are quantized again.
    numbers = math.lcm(2, size * int(state["nested_blocksize"]) if nested else size)
    along = {"packed": _longest(stored.specs[names["packed"]]), "scale": 0, **({"offsets": 0} if nested else {})}
    return ForeignWeight(
        dense, names, f"bitsandbytes {kind}", decode, outline if whole else None, transposed,
        along=along, multiple=numbers // math.gcd(numbers, shape[1]),
    )  # fmt: skip


def _longest(spec: TensorSpec) -> int:
    """The one axis of a tensor that has more than one entry."""
    return max(range(len(spec.shape)), key=lambda axis: spec.shape[axis], default=0)


def _parts(state: dict[str, Any], read: Read) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (numbers,) uint8, the table, and a scale for each block."""
    packed = read("packed").view(torch.uint8).reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).reshape(-1)
    scale = read("scale")
    if "nested_blocksize" in state:
        levels = read("levels").float()[scale.view(torch.uint8).long()]
        sizes = read("offsets").float()[torch.arange(len(levels)) // int(state["nested_blocksize"])]
        scale = levels * sizes + float(state["nested_offset"])
    return codes, read("table").float(), scale.float()


def _codebook(state: dict[str, Any], columns: int, read: Read) -> Codebook:
    codes, table, scale = _parts(state, read)
    return Codebook(codes.reshape(-1, columns), table[None], scale.reshape(-1, columns // int(state["blocksize"])), 4)


def _flat(state: dict[str, Any], columns: int, dtype: torch.dtype, read: Read) -> Weight:
    """Blocks that go on over the end of a row; the first row begins with one."""
    codes, table, scale = _parts(state, read)
    count = len(codes) // columns * columns  # the last byte may hold one code
    spread = scale[torch.arange(count) // int(state["blocksize"])]
    return Dense((table[codes[:count].long()] * spread).reshape(-1, columns).to(dtype))


def _eight_bits(stored: ForeignTensors, module: str) -> ForeignWeight:
    names = stored.names(module, {"codes": "weight", "scale": "SCB", "format": "weight_format"})
    require("codes" in names, f"{module} has scales and no weight")
    codes, scale = stored.specs[names["codes"]], stored.specs[names["scale"]]
    fits = codes.dtype is torch.int8 and len(codes.shape) == 2 and math.prod(scale.shape) == codes.shape[0]
    require(fits, f"scales {scale} for {codes}")
    rows = "format" not in names or not bool(stored.read(names["format"]).any())
    require(rows, f"{module} is stored in tiles, not in rows")
    shape = (codes.shape[0], codes.shape[1])
    dense, transposed = stored.dense(weight_of(module), shape)
    outline = IntGrouped.outline(shape, (torch.float32, (shape[0], 1)), True, 8, 0)
    along = {"codes": 0, "scale": _longest(scale)}
    return ForeignWeight(dense, names, "bitsandbytes int8", _integers, outline, transposed, along=along)


def _integers(read: Read) -> IntGrouped:
    return IntGrouped(read("codes"), read("scale").float().reshape(-1, 1) / 127, None, 8)


LAYOUT = ForeignLayout("bitsandbytes", ("bitsandbytes",), weights)
