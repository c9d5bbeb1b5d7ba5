"""ALPS: the mask and the survivors together, by ADMM on the layer's output error.

Meng et al. 2024, arXiv:2406.07831, algorithm 1: min tr((W − Ŵ) H (W − Ŵ)ᵀ) over masks of a given size is split into a
dense least-squares problem and a projection onto the largest entries, tied by a penalty ρ that grows; then the
survivors are refitted (section 3.2). Inputs are scaled to H_jj = 1 first (section 3.3). Here ρ grows in stages, so
that one Cholesky factorization serves all iterations of a stage and an iteration is one product with
B = ρ (H + ρ I)⁻¹.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from aicompress.methods.prune.calibrated import CalibratedConfig

SAMPLE = 1 << 14  # scores from which a threshold is estimated between iterations


class AlpsConfig(CalibratedConfig):
    """Parameters of alps."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"sparsity": 0.5},
                {"sparsity": 0.5, "scope": "row", "refit": False},
                {"sparsity": 0.75, "block": "4x1"},
                {"pattern": "2:4", "store": "sparse"},
                {"sparsity": 0.9, "store": "auto", "stages": 2},
            ]
        }
    )

    name: Literal["alps"] = "alps"
    scope: Literal["layer", "row"] = Field("layer", description="what shares a sparsity: a layer, or each row of it")
    stages: int = Field(7, ge=1, le=30, description="values of the penalty, from penalty[0] up to penalty[1]")
    iterations: int = Field(3, ge=1, le=100, description="iterations at each penalty")
    penalty: tuple[float, float] = Field((0.02, 1.28), description="first and last penalty ρ, for inputs of variance 1")
