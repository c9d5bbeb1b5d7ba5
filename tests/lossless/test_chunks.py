"""A coded chunk decodes to its bytes, bit for bit; a damaged one is refused, in little memory."""

from __future__ import annotations

import contextlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aicompress.lossless import chunks
from aicompress.lossless.chunks import Layout, best_difference, decode, encode
from aicompress.lossless.difference import Difference
from aicompress.lossless.elements import ELEMENTS, FLOAT16, FLOAT32, element_of

DTYPES = (*ELEMENTS, "BOOL", "U8", "F4", "F99")
# Zeros of both signs, subnormal numbers, infinities, NaNs with payloads of either kind, the ends of the range.
SPECIAL = (0, 0x80000000, 1, 0x80000001, 0x7F800000, 0xFF800000, 0x7FC00001, 0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF)


def weights(count: int, seed: int = 0) -> np.ndarray:
    """Numbers as a layer has them."""
    return (np.random.default_rng(seed).standard_normal(count) * 0.02).astype(np.float32)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(DTYPES), st.binary(max_size=96), st.binary(max_size=96), st.sampled_from(Difference))
def test_any_bytes_come_back(dtype: str, content: bytes, other: bytes, kind: Difference) -> None:
    element = element_of(dtype)
    size = min(len(content), len(other)) // element.width * element.width
    chunk, reference = content[:size], other[:size]
    alone, beside = encode(chunk, element), encode(chunk, element, reference, kind)
    assert decode(alone, size, element).tobytes() == chunk
    assert decode(beside, size, element, reference).tobytes() == chunk
    assert max(len(alone), len(beside)) <= size + 1


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(DTYPES), st.binary(max_size=200), st.integers(0, 200))
def test_damage_is_refused_or_gives_as_many_bytes(dtype: str, coded: bytes, size: int) -> None:
    element = element_of(dtype)
    size = size // element.width * element.width
    with contextlib.suppress(ValueError):
        assert decode(coded, size, element, bytes(size)).nbytes == size


@pytest.mark.parametrize("shift", [0, 13, 16])
def test_special_numbers_keep_their_bits(shift: int) -> None:
    """Also where the others are exactly float16 or bfloat16 numbers."""
    bits = np.concatenate([np.array(SPECIAL, np.uint32), weights(4096).view(np.uint32)]) >> shift << shift
    for kind in Difference:
        coded = encode(bits.tobytes(), FLOAT32, bits[::-1].tobytes(), kind)
        assert decode(coded, bits.nbytes, FLOAT32, bits[::-1].tobytes()).tobytes() == bits.tobytes()


def test_floats_that_are_narrower_are_seen() -> None:
    values = weights(1 << 16)
    wide = encode(values.tobytes(), FLOAT32)
    upper = encode((values.view(np.uint32) & 0xFFFF0000).tobytes(), FLOAT32)
    half = encode(values.astype(np.float16).astype(np.float32).tobytes(), FLOAT32)
    assert [each[0] & 15 for each in (wide, upper, half)] == [Layout.PLANES, Layout.UPPER, Layout.HALF]
    assert len(wide) < 0.86 * values.nbytes
    assert len(upper) == len(encode(bfloat16(values).tobytes(), FLOAT16)) < 0.70 * values.nbytes / 2
    assert len(half) < 0.90 * values.nbytes / 2


def test_the_coder_costs_little_over_the_entropy() -> None:
    exponents = (weights(1 << 18).view(np.uint32) >> 23 & 255).astype(np.uint8)
    shares = np.bincount(exponents) / len(exponents)
    entropy = -(shares[shares > 0] * np.log2(shares[shares > 0])).sum() / 8
    coded = chunks.coder.encode(exponents, is_float=True)
    assert coded is not None
    assert len(coded) < 1.03 * entropy * len(exponents)


def test_differences() -> None:
    """A tensor beside itself costs a byte; the difference that codes shortest is taken."""
    base = weights(1 << 16)
    tuned = bfloat16(base + weights(1 << 16, seed=1) / 200).tobytes()
    other = bfloat16(base).tobytes()
    assert len(encode(other, FLOAT16, other, Difference.XOR)) == 1
    sizes = {kind: len(encode(tuned, FLOAT16, other, kind)) for kind in Difference}
    best = best_difference([(tuned, other)], FLOAT16)
    assert sizes[best] == min(sizes.values()) < 0.6 * sizes[Difference.NONE]
    assert best_difference([(tuned, bfloat16(weights(1 << 16, seed=2)).tobytes())], FLOAT16) is Difference.NONE


def test_a_decompression_bomb_takes_no_memory() -> None:
    """Neither a plane that claims to be large, nor one that is."""
    bomb = chunks.coder.zstandard.ZstdCompressor().compress(bytes(1 << 26))
    hidden = chunks.coder.zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 26))
    tracemalloc.start()
    for plane in (bomb, hidden):
        with pytest.raises(ValueError, match="size"):
            chunks.coder.decode(plane, 1 << 10)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
