"""Little-endian bit streams: element i of a row starts at bit i*bits of the row's int32 words.

This is the layout of compressed-tensors 0.18 and later for 1 to 8 bits; 3, 5, 6 and 7 bits straddle words. Eight codes
of one byte each lie in an int64; three shifts close the gaps between neighbours, pairs and fours, whatever the width.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32
PIECE = 1 << 18  # codes folded at a time: the temporaries stay in a core's own cache
_LANES = {16: torch.int16, 32: torch.int32, 64: torch.int64}


def words_per_row(columns: int, bits: int) -> int:
    """int32 words that a row of `columns` codes takes."""
    return (columns * bits + WORD - 1) // WORD


def pack_rows(codes: Tensor, bits: int, offset: int = 0) -> Tensor:
    """Pack codes.

    Args:
        codes: (rows, columns) uint8 below 2**bits, or int8 with an offset that makes them so.
        bits: 1 to 8.
        offset: 2**(bits-1) for signed codes, 0 for unsigned ones.

    Returns:
        (rows, words_per_row) int32.
    """
    rows, columns = codes.shape
    words = words_per_row(columns, bits)
    if codes.device.type == "meta":
        return torch.empty(rows, words, dtype=torch.int32, device="meta")
    padded = -(-columns // WORD) * WORD
    codes = codes.view(torch.int8) if offset else codes
    if padded != columns:
        codes = torch.nn.functional.pad(codes, (0, padded - columns), value=-offset)
    flat = codes.contiguous().view(torch.uint8).reshape(-1)
    packed = torch.empty(flat.numel() * bits // 8, dtype=torch.uint8, device=codes.device)
    for start in range(0, flat.numel(), PIECE):
        piece = packed[start * bits // 8 : (start + PIECE) * bits // 8]
        _fold(flat[start : start + PIECE], bits, offset, piece)
    return packed.view(torch.int32).reshape(rows, -1)[:, :words].contiguous()


def unpack_rows(packed: Tensor, bits: int, columns: int, offset: int = 0) -> Tensor:
    """Undo `pack_rows`.

    Args:
        packed: (rows, words) int32.
        bits: 1 to 8.
        columns: codes in a row.
        offset: as packed.

    Returns:
        (rows, columns) uint8, or int8 where an offset is given.
    """
    rows, words = packed.shape
    dtype = torch.int8 if offset else torch.uint8
    if packed.device.type == "meta":
        return torch.empty(rows, columns, dtype=dtype, device="meta")
    padded = -(-columns // WORD) * WORD
    full = padded * bits // WORD
    if full != words:
        packed = torch.nn.functional.pad(packed, (0, full - words))
    stream = packed.contiguous().view(torch.uint8).reshape(-1)
    codes = torch.empty(rows * padded, dtype=torch.uint8, device=packed.device)
    for start in range(0, codes.numel(), PIECE):
        _spread(stream[start * bits // 8 : (start + PIECE) * bits // 8], bits, offset, codes[start : start + PIECE])
    return codes.view(dtype).reshape(rows, padded)[:, :columns].contiguous()


def _repeated(pattern: int, lane: int) -> int:
    """An int64 constant that repeats a pattern in every `lane` bits."""
    value = sum(pattern << shift for shift in range(0, 64, lane))
    return value - (1 << 64) if value >> 63 else value


def _widths(bits: int) -> list[tuple[int, int]]:
    """(lane, used bits) before each step: 8-bit lanes with `bits` used, then 16-bit lanes with twice as many, ..."""
    steps = [(8 << step, bits << step) for step in range(3)]
    return [(lane, used) for lane, used in steps if used < 8 or used % 8]


def _fold(codes: Tensor, bits: int, offset: int, out: Tensor) -> None:
    """Codes of one byte each, a multiple of 8 -> the bit stream."""
    lanes = (codes + offset).view(torch.int64)
    widths = _widths(bits)
    for step, (lane, used) in enumerate(widths, 1):
        low, both = _repeated((1 << used) - 1, 2 * lane), _repeated((1 << 2 * used) - 1, 2 * lane)
        upper = lanes >> (lane - used)
        if lane < 2 * used:  # the lower half's own bits come down into it too
            upper.bitwise_and_(both - low)
            lanes.bitwise_and_(low)
        lanes.bitwise_or_(upper)
        if lane >= 2 * used and not (2 * used == 8 and step == len(widths)):  # there the lowest byte is taken alone
            lanes.bitwise_and_(both)
    lane = 8 << len(widths)
    used = lane * bits // 8
    if used == 8 and lane > 8:
        out.copy_(lanes.view(_LANES[lane]))
    else:
        out.view(-1, used // 8).copy_(lanes.view(torch.uint8).view(-1, lane // 8)[:, : used // 8])


def _spread(stream: Tensor, bits: int, offset: int, out: Tensor) -> None:
    """Undo `_fold`; `out` has one byte per code."""
    lanes = out.view(torch.int64)
    lane = 8 << len(_widths(bits))
    used = lane * bits // 8
    if used == 8 and lane > 8:
        out.view(_LANES[lane]).copy_(stream)
    else:
        lanes.zero_()
        out.view(-1, lane // 8)[:, : used // 8].copy_(stream.view(-1, used // 8))
    for lane, used in reversed(_widths(bits)):
        low = (1 << used) - 1
        upper = (lanes << (lane - used)).bitwise_and_(_repeated(low << lane, 2 * lane))
        lanes.bitwise_and_(_repeated(low, 2 * lane)).bitwise_or_(upper)
    if offset:
        out.sub_(offset)  # wraps to the two's complement of int8


def pack_mask(mask: Tensor) -> Tensor:
    """Boolean (n,) -> uint8 (ceil(n/8),), element i at bit i%8 of byte i//8."""
    count = -(-mask.numel() // 8)
    if mask.device.type == "meta":
        return torch.empty(count, dtype=torch.uint8, device="meta")
    return pack_rows(mask.reshape(1, -1).view(torch.uint8), 1).view(torch.uint8).reshape(-1)[:count].contiguous()


def unpack_mask(packed: Tensor, count: int) -> Tensor:
    """Undo `pack_mask`: boolean (count,).

    Raises:
        ValueError: the bytes are not those of so many elements, or set bits beyond the last one.
    """
    if packed.numel() != -(-count // 8):
        raise ValueError(f"{packed.numel()} bytes of a mask of {count} elements")
    if packed.device.type == "meta":
        return torch.empty(count, dtype=torch.bool, device="meta")
    if count % 8 and int(packed[-1]) >> count % 8:
        raise ValueError(f"a mask of {count} elements sets bits beyond them")
    padded = torch.nn.functional.pad(packed, (0, -packed.numel() % 4))
    return unpack_rows(padded.view(torch.int32).reshape(1, -1), 1, count).view(torch.bool).reshape(-1)


def require_bits(bits: int) -> int:
    """Refuse a width of codes that is not stored.

    Raises:
        ValueError: it is not 1 to 8.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"codes of {bits:.6g} bits")
    return bits
