"""Bit streams against compressed-tensors' own packing and against numpy's bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from aicompress.weights.coding.packing import PIECE, pack_mask, pack_rows, unpack_mask, unpack_rows, words_per_row


def random_codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits * 1000 + columns)
    low = -(1 << (bits - 1))
    return torch.randint(low, -low, (rows, columns), generator=generator).to(torch.int8)


def test_hand_computed() -> None:
    """1, 2, 3, ..., 8 in four bits each, the first in the lowest."""
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8)
    assert pack_rows(codes, 4).view(torch.uint8).tolist() == [[0x21, 0x43, 0x65, 0x87]]
    assert torch.equal(pack_rows(codes.to(torch.int8) - 8, 4, 8), pack_rows(codes, 4))


@pytest.mark.parametrize("columns", [1, 7, 8, 31, 32, 33, 64, 100, 333])
@pytest.mark.parametrize("bits", range(1, 9))
def test_is_the_layout_of_compressed_tensors(bits: int, columns: int) -> None:
    codes = random_codes(5, columns, bits)
    packed = pack_rows(codes, bits, 1 << (bits - 1))
    assert packed.shape == (5, words_per_row(columns, bits))
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)
    assert torch.equal(unpack_rows(packed, bits, columns, 1 << (bits - 1)), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_unsigned_codes_are_a_plain_bit_stream(bits: int) -> None:
    codes = random_codes(3, 64, bits).view(torch.uint8) & ((1 << bits) - 1)
    stream = pack_rows(codes, bits).view(torch.uint8).numpy()
    expected = np.unpackbits(codes.numpy()[..., None], axis=-1, bitorder="little")[..., :bits].reshape(3, -1)
    assert np.array_equal(np.unpackbits(stream, axis=-1, bitorder="little"), expected)
    assert torch.equal(unpack_rows(torch.from_numpy(stream).view(torch.int32), bits, 64), codes)


@pytest.mark.parametrize("bits", [3, 4])
def test_pieces_join(bits: int) -> None:
    codes = random_codes(3, PIECE // 2, bits)
    packed = pack_rows(codes, bits, 1 << (bits - 1))
    assert torch.equal(packed[1:2], pack_rows(codes[1:2], bits, 1 << (bits - 1)))
    assert torch.equal(unpack_rows(packed, bits, PIECE // 2, 1 << (bits - 1)), codes)


def test_input_may_be_strided() -> None:
    codes = random_codes(24, 40, 4)
    assert torch.equal(pack_rows(codes.t(), 4, 8), pack_rows(codes.t().contiguous(), 4, 8))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 31, 32, 33, 1000])
def test_masks(count: int) -> None:
    mask = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
    packed = pack_mask(mask)
    assert packed.tolist() == np.packbits(mask.numpy(), bitorder="little").tolist()
    assert torch.equal(unpack_mask(packed, count), mask)
