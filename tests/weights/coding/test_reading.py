"""reading: symbols that are read a few rows at a time are those that were written, and damage to them is noticed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aicompress.weights.coding import reading, writing
from aicompress.weights.coding.packing import pack_mask
from aicompress.weights.coding.reading import AGAIN, SymbolStream
from aicompress.weights.coding.writing import write_stream
from aicompress.weights.decoding import COMPILED

DRAW = torch.Generator().manual_seed(0)
CODES = (torch.randn(600, 32, generator=DRAW) * torch.linspace(0.5, 4, 32)).round().clamp(-8, 7).add(8).byte()
FEW_ROWS = torch.full((1500, 96), 3, dtype=torch.uint8)
FEW_ROWS[::100, 5:30] = CODES[:15, 5:30]
MASK = torch.rand(600, 32, generator=DRAW)
CASES = {  # symbols, their kind, and how their stream begins
    "buckets of columns": (CODES, 4, 1),
    "one bucket": (CODES[:, 25:].repeat(3, 1), 4, 1),
    "one row": (CODES.reshape(1, -1), 4, 1),
    "few": (CODES[:40], 4, 0),
    "trellis, lanes of some columns": (CODES + 120, "trellis", 3),
    "mask": ((MASK < 0.5).byte().repeat(16, 1), "mask", 2),
    "small mask": ((MASK < 0.1).byte()[:100], "mask", 0),
    "few rows": (FEW_ROWS, 4, 5),
    "mask of few rows": ((FEW_ROWS != 3).byte(), "mask", 5),
}


def opened(stream: Tensor, symbols: Tensor, taken: list[int] | None = None) -> SymbolStream:
    def read(first: int, last: int) -> Tensor:
        if taken is not None:
            taken.append(last - first)
        return stream[first:last].clone()

    return SymbolStream(read, len(stream), *symbols.shape)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_parts_in_any_order_are_those_of_all(case: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    symbols, kind, first_byte = CASES[case]
    monkeypatch.setattr(writing, "SPAN", 300)  # several lanes
    stream, size, step = write_stream(symbols, kind), symbols.numel(), AGAIN * symbols.shape[1]
    for name in list(COMPILED) if not compiled else []:
        monkeypatch.setitem(COMPILED, name, None)
    monkeypatch.setattr(reading, "STEP", 1)
    expected, held = symbols.reshape(-1), opened(stream, symbols)
    if kind == "mask":
        expected, size, step = pack_mask(symbols.bool().reshape(-1)), -(-size // 8), 4097
    step = min(step, 30_001)
    read = held.packed if kind == "mask" else held.read
    places = [(first, min(first + step, size)) for first in range(0, size, step)]
    assert stream[0] == first_byte
    for first, last in (*reversed(places), *places, (0, size)):
        assert torch.equal(read(first, last), expected[first:last])


def test_a_block_takes_few_bytes_of_a_stream() -> None:
    """None at the end of a pass, which would have been read before; symbols take two bytes at most."""
    symbols, taken = CODES.repeat(20, 1), list[int]()
    stream = write_stream(symbols, 4)
    held = opened(stream, symbols, taken)
    for first in range(0, symbols.numel(), 32 * 300):
        held.read(first, first + 32 * 300)
    assert max(taken) == reading.HEAD < len(stream) / 8


@pytest.mark.parametrize("case", ["buckets of columns", "one bucket", "trellis, lanes of some columns", "few rows"])
def test_damage_is_noticed_at_the_last_row_at_the_latest(case: str) -> None:
    symbols, kind, _ = CASES[case]
    stream = write_stream(symbols, kind)
    for place in range(0, len(stream), len(stream) // 9):
        damaged, step = stream.clone(), AGAIN * symbols.shape[1]
        damaged[place] ^= 4
        held = opened(damaged, symbols)
        places = [(first, min(first + step, symbols.numel())) for first in range(0, symbols.numel(), step)]
        with pytest.raises(ValueError, match="stream"):
            [held.read(*place) for place in places]
