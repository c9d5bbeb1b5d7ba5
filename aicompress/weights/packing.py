"""Little-endian bit streams: element i of a row starts at bit i*bits of the row's int32 words.

This is the layout of compressed-tensors 0.18 and later for 1 to 8 bits; 3, 5, 6 and 7 bits straddle words.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32


def words_per_row(columns: int, bits: int) -> int:
    """int32 words that a row of `columns` codes takes."""
    return (columns * bits + WORD - 1) // WORD


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes.

    Args:
        codes: (rows, columns) uint8, each below 2**bits.
        bits: 1 to 8.

    Returns:
        (rows, words_per_row) int32.
    """
    rows, columns = codes.shape
    words = words_per_row(columns, bits)
    if codes.device.type == "meta":
        return torch.empty(rows, words, dtype=torch.int32, device="meta")
    padded = words * WORD // bits if WORD % bits == 0 else -(-columns // WORD) * WORD
    if padded != columns:
        codes = torch.nn.functional.pad(codes, (0, padded - columns))
    if WORD % bits == 0:
        per_byte = 8 // bits
        packed = codes[:, 0::per_byte].clone()
        for k in range(1, per_byte):
            packed |= codes[:, k::per_byte] << (k * bits)
        return packed.contiguous().view(torch.int32)
    return _pack_straddling(codes, bits)[:, :words].contiguous()


def unpack_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Undo `pack_rows`.

    Args:
        packed: (rows, words) int32.
        bits: 1 to 8.
        columns: codes in a row.

    Returns:
        (rows, columns) uint8.
    """
    if packed.device.type == "meta":
        return torch.empty(packed.shape[0], columns, dtype=torch.uint8, device="meta")
    if WORD % bits == 0:
        as_bytes = packed.contiguous().view(torch.uint8)
        if bits == 8:
            return as_bytes[:, :columns].contiguous()
        per_byte = 8 // bits
        out = torch.empty(packed.shape[0], as_bytes.shape[1] * per_byte, dtype=torch.uint8)
        mask = (1 << bits) - 1
        for k in range(per_byte):
            out[:, k::per_byte] = (as_bytes >> (k * bits)) & mask
        return out[:, :columns].contiguous()
    return _unpack_straddling(packed, bits)[:, :columns].contiguous()


def _pack_straddling(codes: Tensor, bits: int) -> Tensor:
    """32 codes fill exactly `bits` words, so the same 32 steps serve every block of every row."""
    rows = codes.shape[0]
    blocks = codes.reshape(rows, -1, WORD).to(torch.int64)  # (rows, blocks, 32)
    out = torch.zeros(rows, blocks.shape[1], bits, dtype=torch.int64)
    for j in range(WORD):
        word, shift = divmod(j * bits, WORD)
        out[..., word] |= (blocks[..., j] << shift) & 0xFFFFFFFF
        if shift + bits > WORD:
            out[..., word + 1] |= blocks[..., j] >> (WORD - shift)
    return out.reshape(rows, -1).to(torch.uint32).view(torch.int32)


def _unpack_straddling(packed: Tensor, bits: int) -> Tensor:
    rows, words = packed.shape
    full = -(-words // bits) * bits
    if full != words:
        packed = torch.nn.functional.pad(packed, (0, full - words))
    blocks = packed.contiguous().view(torch.uint32).to(torch.int64).reshape(rows, -1, bits)
    out = torch.empty(rows, blocks.shape[1], WORD, dtype=torch.uint8)
    for j in range(WORD):
        word, shift = divmod(j * bits, WORD)
        value = blocks[..., word] >> shift
        if shift + bits > WORD:
            value = value | (blocks[..., word + 1] << (WORD - shift))
        out[..., j] = (value & ((1 << bits) - 1)).to(torch.uint8)
    return out.reshape(rows, -1)


def pack_mask(mask: Tensor) -> Tensor:
    """Boolean (n,) -> uint8 (ceil(n/8),), element i at bit i%8 of byte i//8."""
    count = -(-mask.numel() // 8)
    if mask.device.type == "meta":
        return torch.empty(count, dtype=torch.uint8, device="meta")
    bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, count * 8 - mask.numel())).reshape(count, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, count: int) -> Tensor:
    """Undo `pack_mask`: boolean (count,)."""
    if packed.device.type == "meta":
        return torch.empty(count, dtype=torch.bool, device="meta")
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.reshape(-1)[:count].bool()
