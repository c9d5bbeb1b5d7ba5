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

import re
from collections.abc import Sequence
from typing import Literal

from pydantic import ConfigDict, Field

from aicompress.methods.capabilities import Candidate
from aicompress.methods.factorize.shared_factor import Grouping, SharedConfig, sharing

_DEPTH = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


class SharedBasisConfig(SharedConfig):
    """Parameters of shared_basis."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"keep": 0.5}, {"rank": 3, "multiple": 2, "blocks": 3}]})

    name: Literal["shared_basis"] = "shared_basis"
    blocks: int = Field(2, ge=1, description="how many neighbouring blocks share; levels can give each its own")


def groups(candidates: Sequence[Candidate[SharedBasisConfig]]) -> list[list[int]]:
    """Linear layers that have one name but for their depth, one shape and one dtype, by contiguous blocks."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for number, candidate in enumerate(candidates):
        info = candidate.info
        if info.kind == "linear" and info.index is not None:
            key = (_DEPTH.sub("#", info.name, count=1), info.shape, info.dtype, candidate.config)
            alike.setdefault(key, []).append(number)
    found: list[list[int]] = []
    for numbers in alike.values():
        numbers.sort(key=lambda number: candidates[number].info.index or 0)
        size = candidates[numbers[0]].config.blocks
        found += [sorted(numbers[start : start + size]) for start in range(0, len(numbers), size)]
    return [group for group in found if len(group) > 1]


METHOD = sharing(
    SharedBasisConfig,
    Grouping(groups, "as no like layer of a neighbouring block is selected", across=True),
    "one right factor for like layers of neighbouring blocks; by rank or share; calibrated or data-free",
    when="blocks that do nearly the same, as after upcycling or weight sharing in training; measure it beside whitened",
    shift=lambda config: 0.0,
)
