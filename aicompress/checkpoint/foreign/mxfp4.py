"""MXFP4: numbers of four bits in groups of 32, each group with a power of two for a scale (OCP Microscaling v1.0).

GPT-OSS keeps its experts so, (experts, out, groups, 16) bytes in `*_blocks` with exponents in `*_scales`, of a
parameter (experts, in, out). Others keep a matrix (out, in / 2) with exponents (out, in / 32).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from aicompress.checkpoint.foreign import fp4
from aicompress.checkpoint.foreign.float8 import scale_of
from aicompress.checkpoint.foreign.layout import ForeignLayout, ForeignTensors, ForeignWeight, Read, require, weight_of
from aicompress.checkpoint.foreign.scaling import real
from aicompress.weights import Codebook, Dense, TensorSpec

GROUP = 32
EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
SCALES = torch.bfloat16  # holds every power of two that eight bits of exponent mean


def weights(stored: ForeignTensors) -> dict[str, ForeignWeight]:
    """Stacks of experts by their `_blocks`, matrices by the width of their scales."""
    recognized: dict[str, ForeignWeight] = {}
    for name, spec in stored.specs.items():
        scales = stored.specs.get(f"{name.removesuffix('_blocks')}_scales")
        if name.endswith("_blocks") and spec.dtype is torch.uint8 and scales is not None and len(spec.shape) == 4:
            recognized[name.removesuffix("_blocks")] = _experts(stored, name.removesuffix("_blocks"))
            continue
        if spec.dtype not in (torch.uint8, torch.int8) or len(spec.shape) != 2:
            continue
        parameter = weight_of(name.removesuffix(".weight_packed")) if name.endswith(".weight_packed") else name
        scale = scale_of(stored, parameter)
        if scale is not None and stored.specs[scale].dtype in EXPONENTS:
            rows, width = spec.shape
            if stored.specs[scale].shape == (rows, width * 2 // GROUP) and not width * 2 % GROUP:
                recognized[parameter] = _matrix(stored, parameter, name, scale)
    return recognized


def _matrix(stored: ForeignTensors, parameter: str, packed: str, scale: str) -> ForeignWeight:
    rows, width = stored.specs[packed].shape
    outline = fp4.outline(rows, 2 * width, 2 * width // GROUP, SCALES)
    names = {"packed": packed, "scale": scale}
    dense, transposed = stored.dense(parameter, (rows, 2 * width))
    return ForeignWeight(dense, names, "mxfp4", _codebook, outline, transposed, along=dict.fromkeys(names, 0))


def _codebook(read: Read) -> Codebook:
    return fp4.codebook(read("packed"), real(read("scale")).to(SCALES))


def _experts(stored: ForeignTensors, name: str) -> ForeignWeight:
    experts, out, groups, size = stored.specs[f"{name}_blocks"].shape
    scales = stored.specs[f"{name}_scales"]
    fits = scales.shape == (experts, out, groups) and scales.dtype in EXPONENTS and size * 2 == GROUP
    require(fits, f"scales {list(scales.shape)} for blocks {[experts, out, groups, size]}")
    names = {"blocks": f"{name}_blocks", "scale": f"{name}_scales"}
    dense = TensorSpec(stored.dtype, (experts, groups * GROUP, out))
    decode = partial(_decode_experts, stored.dtype)
    return ForeignWeight(dense, names, "mxfp4", decode, along=dict.fromkeys(names, 0))


def _decode_experts(dtype: torch.dtype, read: Read) -> Dense:
    """One expert in memory in float32 at a time."""
    blocks, scale = read("blocks"), read("scale")
    experts, out, groups, _ = blocks.shape
    table = torch.tensor(fp4.TABLE)
    matrix = torch.empty(experts, groups * GROUP, out, dtype=dtype)
    for number in range(experts):
        values: Tensor = table[fp4.nibbles(blocks[number]).long()] * real(scale[number])[..., None]
        matrix[number] = values.reshape(out, -1).t()
    return Dense(matrix.reshape(experts, -1))


LAYOUT = ForeignLayout("mxfp4", ("mxfp4", "quark", "fp8", "modelopt", "compressed-tensors"), weights)
