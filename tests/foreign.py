"""Weights in the layouts that other tools write, packed here from their published descriptions, value by value."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
NF4 = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass(frozen=True)
class Encoded:
    """A matrix as a tool stores it.

    Attributes:
        tensors: by what follows the module's name: `.qweight`, `.weight_scale`.
        dense: the matrix that they stand for, float32.
    """

    tensors: Mapping[str, Tensor]
    dense: Tensor


Encode = Callable[[Tensor], Encoded]


def _bits(codes: np.ndarray, bits: int) -> Tensor:
    """(rows, columns) codes -> (rows, words) int32: bit i * bits of a row's little-endian stream begins code i."""
    stream = (codes[..., None].astype(np.int64) >> np.arange(bits)) & 1
    stream = stream.reshape(len(codes), -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return torch.from_numpy(np.packbits(stream.astype(np.uint8), axis=1, bitorder="little").view(np.int32).copy())


def _rounded(matrix: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (out, in) and zero points (out, groups) from 0 to 2^bits - 1, and float16 scales (out, groups)."""
    groups = matrix.reshape(len(matrix), -1, group)
    top = (1 << bits) - 1
    if symmetric:
        scale = (groups.abs().amax(-1) * 2 / top).half()
        zero = torch.full(scale.shape, 1 << (bits - 1))
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((high - low) / top).half()
        zero = (-low / scale.float()).round().clamp(0, top).int()
    codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, top).int()
    return codes.reshape(matrix.shape), zero, scale


def decompressed(matrix: Tensor) -> Encoded:
    """What compressed-tensors leaves of a weight of 8 bits that it has decompressed in memory."""
    scale = matrix.abs().amax(1, keepdim=True) / 127
    dense = (matrix / scale).round() * scale
    beside = {".weight_scale": scale, ".weight_shape": torch.tensor(matrix.shape)}
    return Encoded({".weight": dense, **beside}, dense)


def gptq(bits: int = 4, group: int = 32, symmetric: bool = True, v2: bool = False, order: bool = False) -> Encode:
    """GPTQ: v1 stores zero points less one; with an order, columns belong to groups as `g_idx` says."""

    def encode(matrix: Tensor) -> Encoded:
        columns = matrix.shape[1]
        index = torch.arange(columns) // group
        places = torch.randperm(columns, generator=torch.Generator().manual_seed(0)) if order else torch.arange(columns)
        codes, zero, scale = _rounded(matrix[:, places], bits, group, symmetric)
        own, owner = torch.empty_like(codes), torch.empty_like(index)
        own[:, places], owner[places] = codes, index
        stored = zero if v2 else (zero - 1) % (1 << bits)
        tensors = {
            ".qweight": _bits(own.numpy(), bits).t().contiguous(),
            ".qzeros": _bits(stored.t().numpy(), bits),
            ".scales": scale.t().contiguous(),
            ".g_idx": owner.int(),
        }
        return Encoded(tensors, (own - zero[:, owner]).float() * scale.float()[:, owner])

    return encode


def awq(group: int = 32) -> Encode:
    """AWQ, gemm."""

    def words(codes: Tensor) -> Tensor:
        packed = np.zeros((codes.shape[0], codes.shape[1] // 8), dtype=np.uint32)
        for nibble, column in enumerate(AWQ_ORDER):
            packed |= codes[:, column::8].numpy().astype(np.uint32) << np.uint32(4 * nibble)
        return torch.from_numpy(packed.view(np.int32))

    def encode(matrix: Tensor) -> Encoded:
        codes, zero, scale = _rounded(matrix, 4, group, symmetric=False)
        tensors = {".qweight": words(codes.t()), ".qzeros": words(zero.t()), ".scales": scale.t().contiguous()}
        wide = zero.repeat_interleave(group, 1), scale.float().repeat_interleave(group, 1)
        return Encoded(tensors, (codes - wide[0]).float() * wide[1])

    return encode


def nf4(nested: bool = False, block: int = 64) -> Encode:
    """bitsandbytes, 4 bits."""

    def encode(matrix: Tensor) -> Encoded:
        flat = matrix.reshape(-1)
        blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).reshape(-1, block)
        scale, table = blocks.abs().amax(1), torch.tensor(NF4)
        codes = ((blocks / scale[:, None])[..., None] - table).abs().argmin(-1).to(torch.uint8).reshape(-1)[: len(flat)]
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "float32", "shape": [*matrix.shape]}
        even = torch.nn.functional.pad(codes, (0, len(codes) % 2))
        tensors = {".weight": ((even[::2] << 4) | even[1::2])[:, None], ".weight.quant_map": table}
        if nested:
            offset, levels = float(scale.mean()), torch.linspace(-1, 1, 256)
            spans = torch.nn.functional.pad(scale - offset, (0, -len(scale) % 256)).reshape(-1, 256)
            sizes = spans.abs().amax(1)
            index = ((spans / sizes[:, None])[..., None] - levels).abs().argmin(-1).reshape(-1)[: len(scale)]
            scale = levels[index] * sizes.repeat_interleave(256)[: len(scale)] + offset
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            tensors |= {".weight.absmax": index.to(torch.uint8), ".weight.nested_absmax": sizes}
            tensors[".weight.nested_quant_map"] = levels
        else:
            tensors[".weight.absmax"] = scale
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        tensors[".weight.quant_state.bitsandbytes__nf4"] = text
        return Encoded(tensors, (table[codes.long()] * scale.repeat_interleave(block)[: len(flat)]).view_as(matrix))

    return encode


def int8(matrix: Tensor) -> Encoded:
    """bitsandbytes, 8 bits."""
    scale = matrix.abs().amax(1)
    codes = (matrix * 127 / scale[:, None]).round().to(torch.int8)
    tensors = {".weight": codes, ".SCB": scale, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
    return Encoded(tensors, codes.float() * scale[:, None] / 127)


def fp8(rows: int | None = 128, columns: int | None = 128, name: str = ".weight_scale_inv") -> Encode:
    """Float8 with a scale for each block; None makes a block as long as the matrix, and the last may be narrower."""

    def encode(matrix: Tensor) -> Encoded:
        height, width = rows or matrix.shape[0], columns or matrix.shape[1]
        codes, dense = torch.empty_like(matrix, dtype=torch.float8_e4m3fn), torch.empty_like(matrix)
        scale = torch.empty(-(-matrix.shape[0] // height), -(-matrix.shape[1] // width))
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                at = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
                scale[i, j] = matrix[at].abs().max() / 448
                codes[at] = (matrix[at] / scale[i, j]).to(torch.float8_e4m3fn)
                dense[at] = codes[at].float() * scale[i, j]
        return Encoded({".weight": codes, name: scale.squeeze() if rows is None else scale}, dense)

    return encode


def _nearest_fp4(values: Tensor) -> Tensor:
    return (values[..., None] - torch.tensor(FP4)).abs().argmin(-1).to(torch.uint8)


def mxfp4(matrix: Tensor) -> Encoded:
    """Microscaling, as compressed-tensors stores it."""
    groups = matrix.reshape(len(matrix), -1, 32)
    exponent = (groups.abs().amax(-1) / 4).log2().floor()
    codes = _nearest_fp4(groups / exponent.exp2()[..., None])
    flat = codes.reshape(matrix.shape)
    tensors = {".weight_packed": flat[:, ::2] | (flat[:, 1::2] << 4), ".weight_scale": (exponent + 127).to(torch.uint8)}
    dense = (torch.tensor(FP4)[codes.long()] * exponent.exp2()[..., None]).reshape(matrix.shape)
    return Encoded(tensors, dense)


def nvfp4(divides: bool = False) -> Encode:
    """ModelOpt; compressed-tensors where the scale of the tensor divides."""

    def encode(matrix: Tensor) -> Encoded:
        groups = matrix.reshape(len(matrix), -1, 16)
        whole = groups.abs().amax() / (6 * 448)
        scale = (groups.abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
        real = scale.float() * whole
        codes = _nearest_fp4(groups / real[..., None])
        flat = codes.reshape(matrix.shape)
        packed = flat[:, ::2] | (flat[:, 1::2] << 4)
        dense = (torch.tensor(FP4)[codes.long()] * real[..., None]).reshape(matrix.shape)
        if divides:
            tensors = {".weight_packed": packed, ".weight_scale": scale, ".weight_global_scale": (1 / whole)[None]}
        else:
            tensors = {".weight": packed, ".weight_scale": scale, ".weight_scale_2": whole}
        return Encoded(tensors, dense)

    return encode


def mlx(bits: int = 4, group: int = 32, mode: str = "affine") -> Encode:
    """MLX: a stream of codes in every row; the floating modes have their scales in bytes and no biases."""

    def affine(matrix: Tensor) -> Encoded:
        groups = matrix.reshape(len(matrix), -1, group)
        low, top = groups.amin(-1).half(), (1 << bits) - 1
        scale = ((groups.amax(-1) - low) / top).half()
        codes = ((groups - low[..., None]) / scale.float()[..., None]).round().clamp(0, top)
        words = _bits(codes.reshape(matrix.shape).int().numpy(), bits).view(torch.uint32)
        dense = codes * scale.float()[..., None] + low.float()[..., None]
        return Encoded({".weight": words, ".scales": scale, ".biases": low}, dense.reshape(matrix.shape))

    def floating(matrix: Tensor) -> Encoded:
        groups = matrix.reshape(len(matrix), -1, group)
        scale = groups.abs().amax(-1) / (448 if mode == "mxfp8" else 6)
        stored = (scale.log2().ceil() + 127).to(torch.uint8)
        wide = (stored.int() - 127).float().exp2()[..., None]
        if mode == "nvfp4":
            stored = scale.to(torch.float8_e4m3fn).view(torch.uint8)
            wide = stored.view(torch.float8_e4m3fn).float()[..., None]
        if mode == "mxfp8":
            numbers = (groups / wide).to(torch.float8_e4m3fn)
            words, values = numbers.view(torch.uint8), numbers.float()
            words = words.reshape(matrix.shape).view(torch.uint32)
        else:
            codes = _nearest_fp4(groups / wide)
            words, values = (
                _bits(codes.reshape(matrix.shape).numpy(), 4).view(torch.uint32),
                torch.tensor(FP4)[codes.long()],
            )
        return Encoded({".weight": words, ".scales": stored}, (values * wide).reshape(matrix.shape))

    return affine if mode == "affine" else floating


def convert(source: Path, folder: Path, encode: Encode, settings: dict[str, Any] | None) -> dict[str, Tensor]:
    """A copy of a checkpoint whose linear layers are encoded.

    Returns:
        The matrices that they now stand for, by parameter.
    """
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    dense: dict[str, Tensor] = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        encoded = encode(tensors.pop(name))
        dense[name] = encoded.dense
        tensors |= {name.removesuffix(".weight") + suffix: t.contiguous() for suffix, t in encoded.tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    told = {} if settings is None else {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps({**config, **told}))
    return dense


def write(folder: Path, encoded: Encoded, settings: dict[str, Any] | None, **config: Any) -> Path:
    """A checkpoint of one layer `m`, with a config.json that says how it is quantized."""
    folder.mkdir(parents=True)
    save_file({f"m{suffix}": t.contiguous() for suffix, t in encoded.tensors.items()}, folder / "model.safetensors")
    told = {} if settings is None else {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps({"dtype": "float32", **config, **told}))
    return folder
