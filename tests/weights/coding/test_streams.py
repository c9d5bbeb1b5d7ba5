"""Streams give back the symbols that were written, cost little more than their entropy, and do not hide damage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aicompress.weights.coding.adaptive import write_adaptive
from aicompress.weights.coding.mixed import MIXED, read_mixed, write_mixed
from aicompress.weights.coding.streams import TRELLIS, WITHIN, read_stream
from aicompress.weights.coding.writing import write_stream
from aicompress.weights.decoding import COMPILED


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def entropy(symbols: Tensor) -> float:
    """Bits per symbol."""
    share = torch.bincount(symbols.reshape(-1).long()).double() / symbols.numel()
    return float(-(share[share > 0] * share[share > 0].log2()).sum())


def rare(count: int) -> Tensor:
    """Zeros with one 255 in their midst."""
    symbols = torch.zeros(1, count, dtype=torch.uint8)
    symbols[0, count // 2] = 255
    return symbols


SYMBOLS = {
    "one": torch.full((1, 1), 200, dtype=torch.uint8),
    "one value, 2^20 times": torch.full((1 << 10, 1 << 10), 7, dtype=torch.uint8),
    "one among 2^20": rare(1 << 20),
    "one among few": rare(300),
    "all values alike": torch.arange(256, dtype=torch.uint8).repeat(64).reshape(128, 128),
    "halves": (2 ** (8 * torch.rand(200, 100, generator=torch.Generator().manual_seed(0)))).to(torch.uint8),
    "a column": (4 * drawn(20_000, 1)).round().add(128).to(torch.uint8),
    "columns of unlike spread": (drawn(300, 99) * torch.arange(99) / 9)
    .round()
    .clamp(-128, 127)
    .add(128)
    .to(torch.uint8),
}


@pytest.mark.parametrize("symbols", SYMBOLS.values(), ids=SYMBOLS)
def test_gives_back_what_was_written(symbols: Tensor) -> None:
    stream = write_stream(symbols)
    assert torch.equal(read_stream(stream, *symbols.shape), symbols)
    assert stream.numel() <= symbols.numel() + 520


@pytest.mark.parametrize("step", [1.0, 0.1])
def test_costs_a_hundredth_of_a_bit_over_the_entropy(step: float) -> None:
    symbols = (drawn(1024, 1024) / step).round().clamp(-128, 127).add(128).to(torch.uint8)
    assert 8 * write_stream(symbols).numel() / symbols.numel() <= entropy(symbols) + 0.01


def test_columns_of_unlike_spread_have_models_of_their_own() -> None:
    symbols = (drawn(512, 64) * torch.exp(drawn(1, 64, 1))).round().clamp(-128, 127).add(128).to(torch.uint8)
    assert 8 * write_stream(symbols).numel() / symbols.numel() < entropy(symbols) - 0.2


def test_a_small_mask_costs_less_where_its_columns_are_empty() -> None:
    mask = (drawn(150, 60) > 1) & (torch.arange(60) % 3 == 0)
    stream = write_stream(mask.to(torch.uint8), "mask")
    assert torch.equal(read_stream(stream, 150, 60), mask.to(torch.uint8))
    assert 8 * stream.numel() < 0.8 * entropy(mask) * mask.numel()


def test_rows_that_are_images_cost_less(monkeypatch: pytest.MonkeyPatch) -> None:
    smooth = torch.nn.functional.avg_pool2d(drawn(60, 196).reshape(60, 1, 14, 14), 5, 1, 2).flatten(1)
    symbols = (smooth * 7).round().mul(smooth.abs() > 0.25).add(128).to(torch.uint8)
    stream = write_stream(symbols)
    assert stream[0] == MIXED
    assert stream[1] == 14
    assert stream.numel() < 0.97 * len(write_adaptive(symbols.numpy(), 14))
    assert stream.numel() < 0.9 * len(write_adaptive(symbols.numpy(), 1))
    for name in list(COMPILED):
        monkeypatch.setitem(COMPILED, name, None)
    assert torch.equal(write_stream(symbols), stream)
    assert torch.equal(read_stream(stream, *symbols.shape), symbols)


def pruned(rows: int, columns: int, kept: int) -> Tensor:
    """Symbols of a layer of which every so many rows and columns are kept, and of these a fifth of the weights."""
    within = (torch.arange(rows) % kept == 1)[:, None] & (torch.arange(columns) % kept == 2)
    return ((4 * drawn(rows, columns)).round() * (within & (drawn(rows, columns, 1) > 0.84))).add(128).to(torch.uint8)


@pytest.mark.parametrize("compiled", [True, False])
def test_rows_and_columns_that_are_empty_cost_next_to_nothing(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    symbols = pruned(500, 800, 8)
    inner = symbols[1::8, 2::8].contiguous()
    stream = write_stream(symbols)
    assert stream[0] == WITHIN
    assert stream.numel() < write_stream(inner).numel() + 100  # 162 of 1300 places are 89 bytes of entropy
    for name in list(COMPILED) if not compiled else []:
        monkeypatch.setitem(COMPILED, name, None)
    assert torch.equal(read_stream(stream, 500, 800), symbols)


def test_damage_to_the_places_of_what_is_not_empty_is_refused() -> None:
    stream = write_stream(pruned(500, 800, 8))
    for place in (*range(1, 110), 600, 1200):
        damaged = stream.clone()
        damaged[place] ^= 16
        with pytest.raises(ValueError, match="stream"):
            read_stream(damaged, 500, 800)
        with pytest.raises(ValueError, match="stream"):
            read_stream(stream[:place], 500, 800)


@pytest.mark.parametrize("binary", [False, True])
def test_is_the_same_without_numba(binary: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    symbols = (drawn(150, 70) > 1).to(torch.uint8) if binary else (drawn(300, 70) * 3).round().add(99).to(torch.uint8)
    stream = write_stream(symbols, "mask" if binary else 8)
    for name in list(COMPILED):
        monkeypatch.setitem(COMPILED, name, None)
    assert torch.equal(write_stream(symbols, "mask" if binary else 8), stream)
    assert torch.equal(read_stream(stream, *symbols.shape), symbols)


def test_another_process_finds_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dispatcher made anew knows of the code no more than another process does."""
    symbols = (drawn(60, 70) > 1).to(torch.uint8)
    for _ in range(2):
        for name in list(COMPILED):
            monkeypatch.delitem(COMPILED, name)
        assert read_stream(write_stream(symbols), 60, 70).equal(symbols)
    for name in ("read_symbols", "write_symbols"):
        assert COMPILED[name].stats.cache_hits
        assert not COMPILED[name].stats.cache_misses


@pytest.mark.parametrize("compiled", [True, False])
def test_codes_of_two_quantizers_have_a_model_each(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    symbols = (drawn(600, 24) * 2).round().add(128).to(torch.uint8)
    for name in list(COMPILED) if not compiled else []:
        monkeypatch.setitem(COMPILED, name, None)
    stream = write_stream(symbols, "trellis")
    assert stream[0] == TRELLIS
    assert torch.equal(read_stream(stream, *symbols.shape), symbols)
    stream[stream.numel() // 2] ^= 8
    with pytest.raises(ValueError, match="stream"):
        read_stream(stream, *symbols.shape)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_symbols_come_back_and_no_damage_is_hidden(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 24))
    values = data.draw(st.lists(st.integers(0, 255), min_size=1, max_size=6))
    chosen = np.random.default_rng(data.draw(st.integers(0, 99))).choice(values, (rows, columns))
    symbols = torch.from_numpy(chosen.astype(np.uint8))
    binary = bool(symbols.max() <= 1)
    stream = write_stream(symbols, "mask" if binary else 8)
    assert torch.equal(read_stream(stream, rows, columns), symbols)
    place = data.draw(st.integers(0, stream.numel() - 1))
    damaged = stream.clone()
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    for other in (damaged, stream[:place]):
        try:
            read = read_stream(other, rows, columns)
        except ValueError:
            continue
        assert torch.equal(read, symbols)  # a bit beyond the last one that is needed


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_mixtures_give_back_any_symbols_and_hide_no_damage(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30))
    values = data.draw(st.lists(st.integers(0, 255), min_size=1, max_size=6))
    symbols = np.random.default_rng(data.draw(st.integers(0, 99))).choice(values, (rows, columns)).astype(np.uint8)
    raw = np.frombuffer(write_mixed(symbols, data.draw(st.sampled_from([0, 3, 5, 40]))), dtype=np.uint8)
    assert (read_mixed(raw, rows, columns).reshape(rows, columns) == symbols).all()
    damaged = raw.copy()
    damaged[data.draw(st.integers(1, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    for other in (damaged, raw[: data.draw(st.integers(0, len(raw) - 1))]):
        try:
            read = read_mixed(other, rows, columns)
        except ValueError:
            continue
        assert (read.reshape(rows, columns) == symbols).all()


def test_a_large_stream_that_is_damaged_is_refused() -> None:
    symbols = (3 * drawn(256, 256)).round().add(99).to(torch.uint8)
    stream = write_stream(symbols)
    for place in range(0, stream.numel(), stream.numel() // 40):
        damaged = stream.clone()
        damaged[place] ^= 64
        with pytest.raises(ValueError, match="stream"):
            read_stream(damaged, 256, 256)
        with pytest.raises(ValueError, match="stream"):
            read_stream(stream[:place], 256, 256)


def test_a_stream_that_asks_for_much_memory_is_refused() -> None:
    stream = write_stream(torch.zeros(1, 100, dtype=torch.uint8))
    with pytest.raises(ValueError, match="cannot hold"):
        read_stream(stream, 1 << 20, 1 << 20)
