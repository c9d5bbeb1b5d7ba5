"""Singular value decomposition of the layer's output: the factors of least E‖W x − U V x‖², from the Gram matrix of x.

Wang et al. 2025, "SVD-LLM V2", arXiv:2503.12340: with H = E[x xᵀ] = S Sᵀ from its eigendecomposition, the best U V of
rank r has U V S = SVD_r(W S), and its error is Σ_{i>r} σ_i². Behind compressed blocks x̂ are the inputs that come, and
W E[x x̂ᵀ] H⁻¹ answers them nearest to what the original layer gives on the original model's inputs x. The target is half
way between W and that (`shift`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict

from aicompress.layer import Layer
from aicompress.methods.curvature import raw_gram
from aicompress.methods.factorize.weighting.roots import Root
from aicompress.methods.factorize.weighting.weighted import EFFORTS, AnchoredConfig, Sides, shift_of, weighted


class WhitenedConfig(AnchoredConfig):
    """Parameters of whitened."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"keep": 0.5}, {"rank": 3, "multiple": 2, "shift": 0.0}, {"energy": 0.9, "damping": 0.0}]
        }
    )

    name: Literal["whitened"] = "whitened"


def inputs(layer: Layer, config: WhitenedConfig) -> Root:
    """S of the Gram matrix of a layer's inputs.

    Raises:
        CompressError: no calibration token reached the layer, or its inputs are not finite.
    """
    return Root.of(raw_gram(layer), config.damping)


METHOD = weighted(
    WhitenedConfig,
    Sides(inputs, shift=shift_of, efforts=EFFORTS),
    frozenset({"gram", "frequency"}),
    "the two factors that change the layer's output least; by rank, energy, share or bytes; calibrated",
    when="low rank with calibration text and no backward pass; two_sided loses less, and quantizing saves more",
)
