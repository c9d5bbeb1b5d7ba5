"""Each block is tuned towards what the teacher's block gives, behind blocks that are tuned, one block in memory.

Block reconstruction (AutoRound, arXiv:2309.05516; the first stage of EfficientQAT, arXiv:2407.11062): the squared
distance of the block's output, on the inputs that the student has, to the output that the original has. All that a
block is made of moves in the form that it has: codes, scales, factors, survivors of a mask, norms and biases.
"""

from __future__ import annotations

from typing import Literal

from aicompress.methods.distill.latent import latent_suffixes
from aicompress.methods.modes import NOTHING, WHOLE, BlockTuning, Mode, StudentParameter, real_suffixes


class Config(BlockTuning):
    """Parameters of blocks."""

    name: Literal["blocks"] = "blocks"


def moves(parameter: StudentParameter, config: Config) -> frozenset[str]:
    """All numbers and codes, but what is stored in another block too."""
    if parameter.shared:
        return NOTHING
    return WHOLE if parameter.weight is None else real_suffixes(parameter.weight) | latent_suffixes(parameter.weight)


MODE = Mode(
    "blocks",
    "each block is tuned towards the teacher's, in every form; one block in memory",
    Config,
    moves=moves,
    when="minutes, and models that do not fit into memory; `codes` or `scales` afterwards win back more",
)
