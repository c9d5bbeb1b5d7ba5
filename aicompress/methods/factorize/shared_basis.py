"""One right factor for like layers of neighbouring blocks, such as the up projections of blocks 0 and 1: W_i ≈ U_i V.

Wang et al. 2025, "Basis Sharing", arXiv:2410.03765: the matrices of a group lie one below the other (side by side in
the paper, which writes x W), and with H = Σ E[x_i x_iᵀ] = S Sᵀ the best U V of rank r has
U V S = SVD_r([W_1; W_2; ...] S). The rows of V are the basis that the layers share, and U_i their coefficients. That
basis is right for no layer's own inputs: how much the layers lose by it against factors of their own, in the same
bytes, is for a measurement to say. The paper leaves out the layers that write the residual stream (`o_proj`,
`down_proj`): `rules: [{match: "*.o_proj", blocks: 1}]` gives each of them factors of its own.

Shapes: U_i (m, r), V (r, n), stored once under the first layer's name. Statistics are the original model's, of one pass
over the calibration data, for the blocks of a group cannot wait for each other; or data-free.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from aicompress.methods.factorize.budget.shared import SharedRankConfig
from aicompress.methods.factorize.neighbours import APART, BlocksConfig, neighbours
from aicompress.methods.factorize.shared_factor import Aim, FactorGroups, sharing


class SharedBasisConfig(BlocksConfig, SharedRankConfig):
    """Parameters of shared_basis."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"keep": 0.5}, {"rank": 3, "multiple": 2, "blocks": 3}]})

    name: Literal["shared_basis"] = "shared_basis"
    relative: bool = Field(
        False, description="a layer's error counts as a part of its output; false: large outputs count more"
    )


METHOD = sharing(
    SharedBasisConfig,
    FactorGroups(neighbours, APART, across=True),
    Aim(),
    "one right factor for like layers of neighbouring blocks; by rank, energy, share or bytes; calibrated or data-free",
    when="blocks that do nearly the same, as after upcycling or weight sharing in training; measure it beside whitened",
)
