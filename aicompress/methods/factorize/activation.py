"""Singular value decomposition with columns weighted by the size of their inputs: least Σ_j E[x_j²] ‖w_j − ŵ_j‖².

The diagonal form of whitened, without the Gram matrix (Zhang et al. 2025, QERA-approx, arXiv:2410.06040; Yuan et al.
2023, ASVD, arXiv:2312.05821, weighs by a power of the mean |x_j|).
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict

from aicompress.layer import Layer
from aicompress.methods.curvature import importance
from aicompress.methods.factorize.weighting.roots import Root
from aicompress.methods.factorize.weighting.weighted import DampedConfig, Sides, weighted


class ActivationConfig(DampedConfig):
    """Parameters of activation."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"keep": 0.5}, {"energy": 0.9}, {"rank": 4}]})

    name: Literal["activation"] = "activation"


def inputs(layer: Layer, config: ActivationConfig) -> Root:
    """√E[x²] of a layer's inputs.

    Raises:
        CompressError: no calibration token reached the layer, or its inputs are not finite.
    """
    return Root.diagonal(importance(layer), config.damping)


METHOD = weighted(
    ActivationConfig,
    Sides(inputs),
    frozenset({"norms", "frequency"}),
    "two factors whose columns count by the size of their inputs; the diagonal form of whitened; calibrated",
    when="matrices too wide for a Gram matrix in memory; whitened loses less",
)
