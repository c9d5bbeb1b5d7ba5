"""Decoding of stored forms, in differentiable tensor operations.

This file needs torch and safetensors only; a copy lies beside `modeling_aicompress.py` in every checkpoint of the
native layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

WORD = 32


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Codes (rows, columns) uint8 of little-endian bit streams (rows, words) int32."""
    if WORD % bits == 0:
        as_bytes = packed.contiguous().view(torch.uint8)
        mask = (1 << bits) - 1
        pieces = [(as_bytes >> (k * bits)) & mask for k in range(8 // bits)]
        codes = pieces[0] if len(pieces) == 1 else torch.stack(pieces, dim=-1)
        return codes.reshape(packed.shape[0], -1)[:, :columns]
    rows, words = packed.shape
    padded = F.pad(packed, (0, -words % bits)).to(torch.int64) & 0xFFFFFFFF
    blocks = padded.reshape(rows, -1, bits)  # 32 codes fill exactly `bits` words
    codes = torch.empty(rows, blocks.shape[1], WORD, dtype=torch.uint8, device=packed.device)
    for j in range(WORD):
        word, shift = divmod(j * bits, WORD)
        value = blocks[..., word] >> shift
        if shift + bits > WORD:
            value = value | (blocks[..., word + 1] << (WORD - shift))
        codes[..., j] = (value & ((1 << bits) - 1)).to(torch.uint8)
    return codes.reshape(rows, -1)[:, :columns]


def unpack_mask(packed: Tensor, count: int) -> Tensor:
    """Booleans (count,) of a bit mask, element i at bit i%8 of byte i//8."""
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.reshape(-1)[:count].bool()


def masked(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """The mask of a sparse form, (out * in,) bool: a bit mask, or one number for every few groups of an N:M mask."""
    out, columns = meta["shape"]
    if "pattern" not in meta:
        return unpack_mask(tensors[""], out * columns)
    kept, size = meta["pattern"]
    packed, count, device = tensors[""], out * columns // size, tensors[""].device
    ways = torch.tensor([sum(1 << p for p in places) for places in combinations(range(size), kept)], device=device)
    fits = {w: max([d for d in range(1, 8 * w + 1) if len(ways) ** d <= 1 << 8 * w], default=0) for w in (1, 2, 4)}
    width, digits = min(((w, d) for w, d in fits.items() if d), key=lambda item: item[0] / item[1])
    value = (packed.reshape(-1, width).long() << (8 * torch.arange(width, device=device))).sum(dim=1)
    found = (value[:, None] // len(ways) ** torch.arange(digits, device=device)) % len(ways)
    bits = ways[found.reshape(-1)[:count]]
    mask = ((bits[:, None] >> torch.arange(size, device=device)) & 1).bool().reshape(out, columns)
    if "order" in tensors:
        mask = torch.empty_like(mask).index_copy_(1, tensors["order"].long(), mask)
    return mask.reshape(-1)


def decode(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """The matrix (out, in) that a stored form stands for.

    Args:
        meta: the form's facts from the manifest.
        tensors: its tensors by suffix; the primary one has the suffix ''.

    Raises:
        ValueError: a form that this version does not know.
    """
    match meta["form"]:
        case "dense":
            return tensors[""]
        case "low_rank":
            return torch.matmul(*factors(meta, tensors))
        case "int_grouped":
            return _int_grouped(meta, tensors)
        case "sparse":
            return _sparse(meta, tensors)
        case "sparse_codes":
            return _sparse_codes(meta, tensors)
        case "codebook":
            return _codebook(meta, tensors)
        case "column_scaled":
            return decode(meta["inner"], tensors) * tensors["columns"]
        case "corrected":
            correction = {s[11:]: t for s, t in tensors.items() if s.startswith("correction")}
            return decode(meta["base"], tensors) + torch.matmul(*factors(meta["correction"], correction))
    raise ValueError(f"stored form {meta['form']!r} is not known to this version of aicompress: upgrade it")


def factors(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """U (out, rank) and V (rank, in) of a low-rank form."""
    inner = {s: t for s, t in tensors.items() if s == "in" or s.startswith("in_")}
    outer = {s: t for s, t in tensors.items() if s not in inner}
    return decode(meta["out"], outer), decode(meta["in"], {s[3:]: t for s, t in inner.items()})


def _int_grouped(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """w = (q - zero) * scale, computed in float32."""
    out, columns = meta["shape"]
    bits, scale, zero = int(meta["bits"]), tensors["scale"], tensors.get("zero")
    codes = unpack(tensors[""].reshape(out, -1), bits, columns).float() - (1 << (bits - 1))
    size = int(meta["group_size"])
    if zero is not None:
        codes = codes - spread(zero.float(), columns, size)
    return (codes * spread(scale.float(), columns, size)).to(scale.dtype)


def spread(values: Tensor, columns: int, size: int) -> Tensor:
    """(rows, groups) -> (rows, columns), or (1, 1) for all; the last group may be narrower than the others."""
    return values.repeat_interleave(size or columns, dim=1)[:, :columns]


def _sparse(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    out, columns = meta["shape"]
    kept = masked(meta, tensors)
    flat = torch.zeros(out * columns, dtype=tensors["values"].dtype, device=kept.device)
    return flat.masked_scatter(kept, tensors["values"]).reshape(out, columns)


def _sparse_codes(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """w = (q - zero) * scale where the mask is set, computed in float32."""
    out, columns = meta["shape"]
    bits, scale, zero = int(meta["bits"]), tensors["scale"], tensors.get("zero")
    kept = masked(meta, tensors)
    codes = unpack(tensors["codes"].reshape(1, -1), bits, int(meta["kept"])).float() - (1 << (bits - 1))
    whole = torch.zeros(out * columns, device=kept.device).masked_scatter(kept, codes).reshape(out, columns)
    size = int(meta["group_size"])
    if zero is not None:
        whole = (whole - spread(zero.float(), columns, size)) * kept.reshape(out, columns)
    return (whole * spread(scale.float(), columns, size)).to(scale.dtype)


def _codebook(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """w = table[code] * scale; one table for all, per row, or per group of a row."""
    out, columns = meta["shape"]
    tables, scale = tensors["tables"], tensors.get("scale")
    codes = unpack(tensors[""].reshape(out, -1), int(meta["bits"]), columns).long()
    if tables.shape[0] == 1:
        values = tables[0][codes]
    else:
        values = tables.gather(1, codes.reshape(tables.shape[0], -1)).reshape(out, columns)
    if scale is None:
        return values
    return (values.reshape(out, scale.shape[1], -1) * scale[..., None]).reshape(out, columns)


def rounded_input(x: Tensor, bits: int | None) -> Tensor:
    """Inputs rounded to `bits` per token, as compressed-tensors does it; gradients pass straight through."""
    if bits is None:
        return x
    wide = x.detach().float()
    half = ((1 << bits) - 1) / 2
    scale = (wide.abs().amax(dim=-1, keepdim=True) / half).clamp(min=torch.finfo(torch.float32).eps)
    rounded = (wide / scale).round().clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1) * scale
    return x + (rounded.to(x.dtype) - x.detach())


def reshape(layer: Any, leaf: str, shape: tuple[int, ...]) -> None:
    """Give a layer an empty parameter of another shape, and the attributes that follow from it."""
    old = layer._parameters[leaf]
    layer._parameters[leaf] = torch.nn.Parameter(
        torch.empty(shape, dtype=old.dtype, device=old.device), requires_grad=old.requires_grad
    )
    if leaf == "weight" and hasattr(layer, "nf"):  # Conv1D, stored (in, out)
        layer.nx, layer.nf = shape
    elif leaf == "weight":
        layer.out_features, layer.in_features = shape


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of real numbers in another dtype; codes and masks stay."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def outlines(files: Iterable[str]) -> dict[str, Tensor]:
    """Every tensor of safetensors files, on the meta device."""
    found: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:  # tensors are mapped lazily: no data is read
            found.update({name: file.get_tensor(name).to("meta") for name in file.keys()})  # noqa: SIM118
    return found
