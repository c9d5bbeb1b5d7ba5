"""Which of two quantizers each code of a trellis belongs to, and streams that code it by that one's model.

A stream is that of static models with lanes of whole columns: a lane decodes one column of its bucket from above, then
the next one that is its own. Each bucket has two models, one after the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from aicompress.weights.decoding import NEXT_STATE, compiled, shipped

TRELLIS = 3  # the first byte of a stream


@shipped
def in_use(codes: Tensor) -> Tensor:
    """The quantizer, 0 or 1, of each code (rows, columns) of a trellis whose state starts anew every 256 rows."""
    rows, columns = codes.shape
    follow = compiled(follow_states) if codes.device.type == "cpu" else None
    if follow is not None:
        held = torch.empty(rows, columns, dtype=torch.uint8)
        follow(codes.detach().to(torch.int16).contiguous().numpy(), np.array(NEXT_STATE).reshape(-1), held.numpy())
        return held
    block = min(256, max(1, rows))
    blocks = torch.nn.functional.pad(codes.detach().abs(), (0, 0, 0, -rows % block)).reshape(-1, block, columns)
    odd = (blocks.long() & 1).transpose(0, 1)
    table = torch.tensor(NEXT_STATE, device=codes.device).reshape(-1)
    state = torch.zeros_like(odd[0])
    quantizer = torch.empty(odd.shape, dtype=torch.uint8, device=codes.device)
    for row in range(block):
        quantizer[row] = state & 1
        state = table[2 * state + odd[row]]
    return quantizer.transpose(0, 1).reshape(-1, columns)[:rows]


@shipped
def follow_states(codes: Any, follow: Any, out: Any) -> None:
    """Fill `out` with the quantizer of each code (rows, columns) int16. Compiled by numba."""
    state = np.zeros(codes.shape[1], dtype=np.int64)
    for row in range(codes.shape[0]):
        if row % 256 == 0:
            state[:] = 0
        for column in range(codes.shape[1]):
            out[row, column] = state[column] & 1
            state[column] = follow[2 * state[column] + (codes[row, column] & 1)]


@shipped
def trellis_decoded(
    states: Any, words: Any, symbol: Any, frequency: Any, start: Any, bits: int, follow: Any, out: Any
) -> int:
    """Fill `out` (rows, columns), as `rans_decoded` does, by the model of the quantizer in use. Compiled by numba."""
    lanes, position, mask = len(states), 0, (1 << bits) - 1
    rows, columns = out.shape
    trellis = np.zeros(lanes, dtype=np.int64)
    for first in range(0, columns, lanes):
        for row in range(rows):
            if row % 256 == 0:
                trellis[:] = 0
            for lane in range(lanes):
                state, quantizer = states[lane], trellis[lane] & 1
                slot = state & mask
                value = symbol[quantizer, slot]
                out[row, first + lane] = value
                trellis[lane] = follow[2 * trellis[lane] + (value & 1)]
                state = frequency[quantizer, value] * (state >> bits) + slot - start[quantizer, value]
                if state < 65536:
                    if position >= len(words):
                        return -1
                    state = (state << 16) | words[position]
                    position += 1
                states[lane] = state
    return position


@shipped
def trellis_decoded_in_steps(
    states: Any, words: Any, symbol: Any, frequency: Any, start: Any, bits: int, follow: Any, out: Any
) -> int:
    """The same without numba: one symbol of every lane at a time."""
    lanes, position, mask = len(states), 0, (1 << bits) - 1
    trellis = np.zeros(lanes, dtype=np.int64)
    for first in range(0, out.shape[1], lanes):
        for row in range(out.shape[0]):
            if row % 256 == 0:
                trellis[:] = 0
            quantizer, slot = trellis & 1, states & mask
            value = symbol[quantizer, slot]
            out[row, first : first + lanes] = value
            trellis = follow[2 * trellis + (value & 1)]
            states[:] = frequency[quantizer, value] * (states >> bits) + slot - start[quantizer, value]
            low = np.flatnonzero(states < 65536)
            if position + len(low) > len(words):
                return -1
            states[low] = (states[low] << 16) | words[position : position + len(low)]
            position += len(low)
    return position
