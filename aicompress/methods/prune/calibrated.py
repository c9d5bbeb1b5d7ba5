"""What methods share that prune against the Gram matrix of a layer's inputs: from a mask to the stored weight."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.curvature import damped, gram, shifted
from aicompress.methods.prune.refit import refit
from aicompress.methods.prune.sparsity import SparsityConfig, masked, present, store, store_codes
from aicompress.methods.zeros import codes_of, descended
from aicompress.weights import Weight


class CalibratedConfig(SparsityConfig):
    """Parameters of methods that know the Gram matrix."""

    refit: bool = Field(True, description="give the survivors their least-squares values")
    damping: float = Field(0.01, gt=0, le=1, description="added to the Gram matrix, as a part of its mean diagonal")
    shift: float = Field(
        0.0, ge=0, le=1, description="how far the target moves to make up for what compressed layers before it changed"
    )


def finished(layer: Layer, mask: Tensor, config: CalibratedConfig, start: Tensor | None = None) -> Weight:
    """The stored weight for a mask.

    Args:
        layer: the layer.
        mask: (out, in) bool.
        config: whether to refit.
        start: the survivors' values, (out, in), where the method has moved them; None: the weight's own.
    """
    if not config.refit and start is None:
        return masked(layer, mask, config)
    hessian = damped(gram(layer), config.damping)
    target = shifted(layer, hessian, config.shift)
    codes = codes_of(layer.stored)
    if codes is not None:
        return store_codes(layer, descended(target, codes, mask & present(layer), hessian.float()), mask, config)
    values = layer.weight if start is None else start
    if config.refit:
        values = refit(target, hessian.float(), mask & present(layer), values)
    return store(layer, values.to(layer.info.dtype), mask, config)
