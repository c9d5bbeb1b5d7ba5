"""How the data of a safetensors file is cut into chunks, and how coded chunks follow one another in a stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from aicompress.checkpoint.packed.raw_header import Extent
from aicompress.lossless.chunks import CHUNK
from aicompress.lossless.elements import BYTE, Element, element_of

LENGTH = 4  # bytes of the length before every coded chunk


@dataclass(frozen=True)
class TensorChunk:
    """A chunk of a tensor.

    Attributes:
        name: the tensor.
        element: what its bytes are made of.
        begin: first byte within the tensor.
        size: bytes.
        is_last: whether the tensor ends with it.
    """

    name: str
    element: Element
    begin: int
    size: int
    is_last: bool


def parts_of(name: str, extent: Extent) -> Iterator[TensorChunk]:
    """The chunks of a tensor, none for one without bytes."""
    element = element_of(extent.dtype)
    element = element if extent.nbytes % element.width == 0 else BYTE
    for begin in range(0, extent.nbytes, CHUNK):
        size = min(CHUNK, extent.nbytes - begin)
        yield TensorChunk(name, element, begin, size, begin + size == extent.nbytes)
