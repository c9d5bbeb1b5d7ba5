"""One right factor for all layers that read the same input, such as query, key and value: W_i ≈ U_i V.

V x is computed from the input that the layers have in common, so that stacking them one below the other and factorizing
the stack is a truncated singular value decomposition of one larger matrix: with H = E[x xᵀ] = S Sᵀ the best U V of rank
r has U V S = SVD_r([W_1; W_2; ...] S), by Eckart and Young 1936, and its output error, summed over the layers, is
Σ_{i>r} σ_i². Layers of n inputs and m_i outputs store r (n + Σ m_i) numbers, which at equal numbers is a larger rank
than each layer would have by itself.

With `gradients` the outputs of each layer count by G_i = Σ d dᵀ of the gradients d in them, as in two_sided: with
G_i = M_iᵀ M_i the stack is [M_1 W_1; M_2 W_2; ...] S, and its error is in units of loss.

Shapes: U_i (m_i, r), V (r, n), stored once under the first layer's name. Calibrated as whitened is, in the walk, or
data-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import ConfigDict, Field

from aicompress.layer import Layer
from aicompress.methods.capabilities import Candidate
from aicompress.methods.effort import Effort, Level
from aicompress.methods.factorize import two_sided
from aicompress.methods.factorize.budget.shared import SharedRankConfig
from aicompress.methods.factorize.shared_factor import Aim, FactorGroups, sharing
from aicompress.methods.factorize.two_sided import TwoSidedConfig
from aicompress.methods.factorize.weighting.roots import Root
from aicompress.methods.factorize.weighting.weighted import AIM_AS_TRIED, FAST, SHIFT
from aicompress.methods.method import GradientLoss


class StackConfig(SharedRankConfig):
    """Parameters of stack."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"keep": 0.5}, {"rank": 3, "multiple": 2}]})

    name: Literal["stack"] = "stack"
    shift: float = Field(
        SHIFT,
        ge=0,
        le=1,
        description=AIM_AS_TRIED,
    )
    gradients: bool = Field(
        False, description="outputs count by the gradients of the model's own predictions, as two_sided has them"
    )
    output_damping: float = Field(
        0.3, ge=0, le=1, description="added to the Gram matrix of output gradients, as a part of its mean diagonal"
    )

    @property
    def gradient_loss(self) -> GradientLoss:
        return "own"


def outputs(layer: Layer, config: StackConfig) -> Root | None:
    """Mᵀ of the Gram matrix of the gradients in a layer's outputs; None where no gradient reaches it.

    Raises:
        CompressError: they are not finite.
    """
    known = TwoSidedConfig(rank=1, output_damping=config.output_damping)
    return two_sided.outputs(layer, known)


def groups(candidates: Sequence[Candidate[StackConfig]]) -> list[list[int]]:
    """Linear layers of one block that read one input and have the same parameters and dtype."""
    members: dict[tuple[object, ...], list[int]] = {}
    for number, candidate in enumerate(candidates):
        info = candidate.info
        if info.kind in ("linear", "head") and candidate.input_name is not None:
            key = (candidate.input_name(), info.index, info.shape[1], info.dtype, candidate.config)
            members.setdefault(key, []).append(number)
    return [numbers for numbers in members.values() if len(numbers) > 1]


EFFORTS: dict[Level, Effort] = {
    "fast": FAST,
    "balanced": Effort("three forward passes, for targets that make up for compressed blocks", lambda given: {}),
    "best": Effort(
        "a backward pass on top, by whose gradients outputs count; factors that layers share are not tuned",
        lambda given: {"gradients": True},
    ),
}

METHOD = sharing(
    StackConfig,
    FactorGroups(groups, "as no other selected layer reads their input"),
    Aim(lambda config: config.shift, lambda config: config.gradients, outputs),
    "one right factor for layers of one input, such as query, key and value; calibrated or data-free",
    when="calibration text: in as many bytes it loses less than whitened, which gives each layer both factors",
    efforts=EFFORTS,
)
