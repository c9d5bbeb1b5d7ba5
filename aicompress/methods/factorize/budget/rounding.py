"""What rounding a layer to integer codes would lose in the bytes that its factors take: most often less."""

from __future__ import annotations

from collections.abc import Callable

from aicompress.errors import Refused
from aicompress.layer import Layer
from aicompress.methods.capabilities import Rounded
from aicompress.methods.quantize import rtn
from aicompress.methods.quantize.rtn import RtnConfig
from aicompress.weights import Dense, Weight, outline_nbytes

GROUP = 64  # input columns that share a scale
BITS = (8, 4, 3, 2)  # of a code


def rounded(layer: Layer, weight: Weight, nbytes: int, lost: Callable[[Weight], tuple[float, float]]) -> Rounded | None:
    """The layer rounded to the nearest codes, of as many bits as fit into a compressed weight's bytes.

    Args:
        layer: the layer.
        weight: what it became.
        nbytes: what that takes; of what several layers share, its part.
        lost: a weight that takes the layer's place -> its squared error as the method weighs it, and that of zero.

    Returns:
        What that would lose; None where the layer stayed as it was, or no codes fit.
    """
    info = layer.info
    widths = [RtnConfig(bits=bits, group_size=GROUP, pad=True) for bits in BITS]
    config = next((width for width in widths if outline_nbytes(rtn.outline(info, width)) <= nbytes), None)
    if config is None or isinstance(weight, Dense):
        return None
    try:
        codes = rtn.apply(layer, config)
    except Refused:  # values beyond what scales hold
        return None
    return Rounded(int(config.bits), lost(codes), lost(weight))
