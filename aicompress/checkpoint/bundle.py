"""A small checkpoint as one tensor: names, shapes and the manifest deflated in front of the data of all tensors.

A safetensors header takes 70 bytes a tensor and a manifest more, which is a fifth of a network of a few kilobytes. In a
bundle the file holds one uint8 tensor, `bundle`: the length of the deflated description (u32, little-endian), the
description, and the tensors' bytes one after the other. The description is JSON: {"tensors": {name: [dtype, shape]},
"manifest": ...}. Deflate starts from a dictionary of what such descriptions say, which is part of the format.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

NAME = "bundle"  # of the tensor
MARK = {"aicompress": NAME}  # the file's metadata
PREFIX = 4  # bytes of the length
LONGEST = 1 << 24  # bytes of a description
_DICTIONARY = (
    b'"sparse","sparse_codes","low_rank","codebook","codes","tables","mask","zero","order","kept":"symmetric":true,'
    b'"group_size":0,"activation_bits":null,"storage":"entropy","linear","prune","factorize","export","compact",'
    b'"kmeans","magnitude","rtn","gptq","epr","kl","BF16","F16","I32","I8",["U8",[1,1]],"conv1.weight":"conv2.weight":'
    b'"conv1.bias":"conv2.bias":"fc1.weight":"fc1.bias":"fc2.weight":"fc2.bias":"fc3.weight":"fc3.bias":{"shape":['
    b'],"dtype":"F32","meta":{"form":"int_grouped","bits":8,"shape":[]},"tensors":["","scale"]},"lineage":[{"command":'
    b'"distill","method":"quantize"}],"format_version":1,"entries":{"tensors":{"manifest":{'
)


def deflated(description: Mapping[str, Any]) -> bytes:
    """Return the first bytes of a bundle: the length, and the description."""
    text = json.dumps(description, separators=(",", ":"), ensure_ascii=False).encode()
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=_DICTIONARY)
    packed = squeeze.compress(text) + squeeze.flush()
    return len(packed).to_bytes(PREFIX, "little") + packed


def inflated(packed: bytes) -> bytes:
    """Return the description's JSON.

    Args:
        packed: without the length in front.

    Raises:
        ValueError: damaged, or longer than any description.
    """
    expand = zlib.decompressobj(-15, zdict=_DICTIONARY)
    try:
        text = expand.decompress(packed, LONGEST)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not expand.eof or expand.unused_data:
        raise ValueError("it ends in the middle, or is too long")
    return text
