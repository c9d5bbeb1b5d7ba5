"""in_blocks: the stream of symbols that are read in blocks of rows is, to the byte, that of symbols that are held."""

from __future__ import annotations

from functools import partial
from io import BytesIO

import pytest
import torch
from torch import Tensor

from aicompress.weights.coding import writing
from aicompress.weights.coding.in_blocks import StreamInFile, write_in_blocks
from aicompress.weights.coding.packing import pack_mask
from aicompress.weights.coding.streams import read_stream


def joined(stream: StreamInFile) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(stream.pieces())), dtype=torch.uint8)


@pytest.mark.parametrize("trellis", [False, True], ids=["uniform", "trellis"])
@pytest.mark.parametrize(
    ("rows", "columns", "spread"), [(2600, 257, 3.0), (2600, 320, 1.0), (99000, 7, 2.0)], ids=["odd", "even", "narrow"]
)
def test_the_stream_of_blocks_is_that_of_all(rows: int, columns: int, spread: float, trellis: bool) -> None:
    """Buckets of unlike columns, blocks whose symbols lanes do not divide, and one model for few columns."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randn(rows, columns, generator=draw) * torch.linspace(0.3, 1, columns) * spread
    symbols = (codes.round().clamp(-127, 127) + 128).to(torch.uint8)

    def block(first: int) -> Tensor:
        return symbols[first : first + 256]

    blocks = [partial(block, first) for first in range(0, rows, 256)]
    made = write_in_blocks(blocks, (rows, columns), "trellis" if trellis else 8, BytesIO())
    assert made is not None
    stream = joined(made)
    assert torch.equal(stream, writing.write_stream(symbols, "trellis" if trellis else 8))
    assert torch.equal(read_stream(stream, rows, columns), symbols)


def test_of_few_symbols_others_may_be_shorter() -> None:
    symbols = torch.full((1024, 512), 128, dtype=torch.uint8)
    symbols[5] = 7
    assert write_in_blocks([lambda: symbols], (1024, 512), 8, BytesIO()) is None


def test_of_a_mask() -> None:
    """Whose last byte is not full."""
    mask = torch.rand(1001, 605, generator=torch.Generator().manual_seed(0)) > 0.9
    packed = pack_mask(mask.reshape(-1))[:, None]
    blocks = [partial(packed.__getitem__, slice(first, first + 20000)) for first in range(0, len(packed), 20000)]
    assert write_in_blocks(blocks, (len(packed), 1), "mask", BytesIO()) is None  # fewer survivors than are looked at
    mask = torch.rand(1001, 605, generator=torch.Generator().manual_seed(0)) > 0.5
    packed.copy_(pack_mask(mask.reshape(-1))[:, None])
    made = write_in_blocks(blocks, (len(packed), 1), "mask", BytesIO())
    assert made is not None
    assert torch.equal(joined(made), writing.write_stream(mask.to(torch.uint8), "mask"))
    assert made.nbytes == len(joined(made))
