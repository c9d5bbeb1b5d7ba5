"""Weights in float8 with a scale beside them: per tensor, per row, or for blocks; the scale multiplies.

DeepSeek's and Qwen's checkpoints (`weight_scale_inv`), FBGEMM, ModelOpt, Quark, llm-compressor (`weight_scale`), and
bare files (`scale`, `scale_weight`). A stack of matrices (experts, out, in) has scales for each of them.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from aicompress.checkpoint.foreign.layout import ForeignLayout, ForeignTensors, ForeignWeight, Read, decoded, require
from aicompress.checkpoint.foreign.scaling import blocks_of, real, scaled_rows, spread_words
from aicompress.weights import Dense, Float8, TensorSpec
from aicompress.weights.stored.float8 import DTYPES, numbers, require_numbers

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
ALONG = {"weight": 0, "scale": 0}
# The scale of `m.weight`, or of `m.experts.down_proj`, by what its name adds or has in the place of `weight`.
ADDED, INSTEAD = ("_scale_inv", "_scale"), ("scale", "scale_weight", "scale_inv")


def scale_of(stored: ForeignTensors, name: str) -> str | None:
    """The tensor that scales a weight; None where there is none.

    Raises:
        ValueError: there are two.
    """
    module = name.removesuffix("weight")
    beside = [f"{name}{suffix}" for suffix in ADDED]
    beside += [f"{module}{leaf}" for leaf in INSTEAD] if name.endswith(".weight") or name == "weight" else []
    there = [scale for scale in beside if scale in stored.specs]
    require(len(there) < 2, f"{name} has the scales {' and '.join(there)}")
    return there[0] if there else None


def weights(stored: ForeignTensors) -> dict[str, ForeignWeight]:
    """Float8 tensors that have a scale."""
    recognized: dict[str, ForeignWeight] = {}
    for name, spec in stored.specs.items():
        scale = scale_of(stored, name) if spec.dtype in FLOAT8 and len(spec.shape) in (2, 3) else None
        if scale is not None:
            recognized[name] = _weight(stored, name, scale)
    return recognized


def _weight(stored: ForeignTensors, name: str, scale: str) -> ForeignWeight:
    spec, scales = stored.specs[name], stored.specs[scale].shape
    given = stored.settings.get("weight_block_size")
    block = (int(given[0]), int(given[1])) if given else None
    if len(spec.shape) == 3 and scales and any(size != 1 for size in scales):
        require(scales[0] == spec.shape[0], f"scales {list(scales)} for {list(spec.shape)}")
        scales = scales[1:]
    shape = (spec.shape[-2], spec.shape[-1])
    spread = blocks_of(shape, scales, block)
    names = {"weight": name, "scale": scale}
    if f"{name}_zero_point" in stored.specs:
        names["zero"] = f"{name}_zero_point"
    words, zeros = f"fp8, {spread_words(shape, spread)}", "zero" in names
    if len(spec.shape) == 3:
        decode = partial(_decode_stack, spread, stored.dtype, zeros)
        return ForeignWeight(TensorSpec(stored.dtype, spec.shape), names, words, decode, along=ALONG)
    dense, transposed = stored.dense(name, shape)
    grid = _grid(shape, spread)
    own = (0 if spread[0] == shape[0] else spread[0], 0 if spread[1] == shape[1] else spread[1])
    if str(spec.dtype).removeprefix("torch.") not in DTYPES:
        decode_plain = partial(_decode, grid[1], spread, stored.dtype, zeros)
        return ForeignWeight(
            dense, names, words, decode_plain, transposed=transposed, along=ALONG, multiple=own[0] or 1
        )
    held = (_scale_dtype(stored.specs[scale].dtype), grid)
    outline = Float8.outline(shape, spec.dtype, held, own)
    decode_kept = partial(_kept, held, own, zeros)
    return ForeignWeight(dense, names, words, decode_kept, outline, transposed, along=ALONG, multiple=own[0] or 1)


def _scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scales are held in: their own dtype; exponents of two in one that has room for each of them."""
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.bfloat16


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


def _tensors(zeros: bool, read: Read) -> tuple[Tensor, Tensor]:
    """Values, and scales in float32.

    Raises:
        ValueError: it has zero points.
    """
    require(not zeros or not bool(read("zero").float().any()), "float8 with zero points is not understood")
    return read("weight"), real(read("scale"))


def _kept(held: tuple[torch.dtype, tuple[int, int]], block: tuple[int, int], zeros: bool, read: Read) -> Float8:
    values, scale = _tensors(zeros, read)
    require_numbers(values)
    return Float8(values, scale.reshape(-1, held[1][1]).to(held[0]), block)


def _decode(across: int, block: tuple[int, int], dtype: torch.dtype, zeros: bool, read: Read) -> Dense:
    """A matrix with so many scales across its columns."""
    values, scale = _tensors(zeros, read)
    return _matrix(values, scale.reshape(-1, across), block, dtype)


def _decode_stack(block: tuple[int, int], dtype: torch.dtype, zeros: bool, read: Read) -> Dense:
    """One matrix of the stack after the other."""
    values, scale = _tensors(zeros, read)
    count, grid = len(values), _grid(values.shape, block)
    scale = scale.expand(count, *grid) if scale.numel() == 1 else scale.reshape(count, *grid)
    matrix = torch.empty(values.shape, dtype=dtype)
    for number in range(count):
        matrix[number] = _matrix(values[number], scale[number], block, dtype).matrix
    return Dense(matrix.reshape(count, -1))


def _matrix(codes: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Dense:
    def rows(start: int, stop: int) -> Tensor:
        return scaled_rows(numbers(codes[start:stop]), scale, block, start)

    return decoded(codes.shape[0], codes.shape[1], dtype, block[0], rows)


LAYOUT = ForeignLayout("float8", ("fp8", "fbgemm_fp8", "modelopt", "quark", "compressed-tensors"), weights)
