"""Decoding of every stored form, whose decoders lie in the forms' own files.

In a checkpoint the file of this name holds their sources instead, so that it needs torch and numpy only.
"""

from __future__ import annotations

import inspect
from functools import cache

from aicompress.weights import decoding, forms
from aicompress.weights.decoding import CONVOLUTIONS, decode, factors, kept, kernels, rounded_input

forms()  # a form's file registers its decoder


def source() -> str:
    """The text of this file in a checkpoint."""
    registered = {**decoding.PRODUCTS, **decoding.CONVOLUTIONS, **decoding.DECODERS}
    stored = sorted(registered.keys() & forms().keys())  # what training alone decodes is not of a checkpoint
    functions = [*decoding.SHIPPED.values(), *(registered[form] for form in stored), *decoding.SUBMATRICES.values()]
    texts = [_text(decoding), *map(_text, functions)]
    return "\n\n".join(texts)


_text = cache(inspect.getsource)


__all__ = ["CONVOLUTIONS", "decode", "factors", "kept", "kernels", "rounded_input", "source"]
