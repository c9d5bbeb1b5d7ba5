"""Entropy-penalised retraining: the loss pays for the bits that the codes of the weights will take.

Oktay, Ballé, Singh and Shrivastava, "Scalable Model Compression by Entropy Penalized Reparameterization", ICLR 2020,
arXiv:1906.06624, equations 3 to 6. A weight is a code times the step of its tensor, w = s q with q = round(θ / s). Both
are trained as if rounding were not there (straight through). The bits are those of a density that is learnt beside
them, here logistic, with a width that is a product of an output's and an input's:

    L = loss + λ/N Σ -log2 p(θ/s + u),  u ~ U(-1/2, 1/2),   p(x) = σ((1/2 - |x|) / b) - σ((-1/2 - |x|) / b)

so that an input that is not needed costs next to nothing. Biases are coded as weights are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.methods.healing import NOTHING, WHOLE, Mode, ModeConfig, Recodes, StudentParameter
from aicompress.weights import IntGrouped, Weight

BITS = 8
LARGEST = (1 << BITS - 1) - 1  # of a code
NARROWEST = 0.03  # width of a density, in steps
FARTHEST = -80.0  # what a logistic function is asked for: below, float32 knows no chance
PACE = 10.0  # widths are learnt so many times as fast as weights


class Config(ModeConfig):
    """Parameters of epr."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"rate": 0.1}]})

    name: Literal["epr"] = "epr"
    rate: float = Field(0.1, gt=0, description="λ: what one bit a weight adds to the loss")
    ramp: float = Field(0.3, ge=0, le=1, description="share of the steps in which λ rises to its full size")
    step: float = Field(0.25, gt=0, description="step between codes at the beginning, of a weight's standard deviation")


def moves(parameter: StudentParameter, config: Config) -> frozenset[str]:
    """Plain tensors."""
    return WHOLE if parameter.weight is None else NOTHING


def check(parameters: Sequence[StudentParameter], config: Config) -> tuple[str, str] | None:
    """Refuse a student that has codes already."""
    coded = next((parameter.name for parameter in parameters if parameter.weight is not None), None)
    if coded is None:
        return None
    return f"{coded} is compressed already, and gets codes here", "give the plain checkpoint, or export it --to dense"


def outline(shape: tuple[int, int]) -> Weight:
    """The stored weight without data."""
    return IntGrouped.outline(shape, (torch.float32, (1, 1)), True, BITS, 0)


def start(matrix: Tensor, config: Config) -> dict[str, Tensor]:
    """What is learnt beside a matrix (out, in): its step, and the widths of its density by output and input."""
    step = torch.maximum(matrix.std(correction=0) * config.step, matrix.abs().max() / LARGEST)
    step = step.clamp_min(torch.finfo(torch.float32).eps)
    return {
        "step": step.log().reshape(1),
        "outputs": torch.zeros(matrix.shape[0]),
        "inputs": torch.zeros(matrix.shape[1]),
    }


def running(matrix: Tensor, learnt: Mapping[str, Tensor]) -> Tensor:
    """The weight s q, whose gradients in θ and s are those without rounding where the code is not the largest."""
    step = learnt["step"].exp()
    position = (matrix / step).clamp(-LARGEST, LARGEST)
    return (position + (position.round() - position).detach()) * step


def bits(matrix: Tensor, learnt: Mapping[str, Tensor], noise: Tensor | None) -> Tensor:
    """Σ -log2 p(θ/s + u), or of the codes themselves.

    Args:
        matrix: θ, (out, in).
        learnt: as of `start`.
        noise: u, (out, in); None for the codes.
    """
    position = matrix / learnt["step"].exp()
    size = (position.round() if noise is None else position + noise).abs()
    width = (PACE * learnt["outputs"]).exp()[:, None] * (PACE * learnt["inputs"]).exp() + NARROWEST
    chance: Tensor = _LogChance.apply(size, width)  # type: ignore[no-untyped-call]
    return -chance / math.log(2)


class _LogChance(torch.autograd.Function):
    """Σ log p(x), of |x| and b; torch's own derivatives take twice the time, and are lost where p is almost zero."""

    @staticmethod
    def forward(context: Any, size: Tensor, width: Tensor) -> Tensor:
        near, far = ((0.5 - size) / width).clamp_min_(FARTHEST), (-0.5 - size) / width
        inner, outer = torch.sigmoid(near), torch.sigmoid(far)
        chance = inner - outer
        context.save_for_backward(near, far, width, inner, outer, chance)
        return chance.log().sum()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        near, far, width, inner, outer, chance = context.saved_tensors
        share = gradients[0] / (chance * width)
        by_near, by_far = (inner - inner.square()) * share, (outer.square() - outer) * share
        return -(by_near + by_far), -(by_near * near + by_far * far)


def written(matrix: Tensor, learnt: Mapping[str, Tensor]) -> Weight:
    """The codes and the step."""
    step = learnt["step"].exp()
    codes = (matrix / step).clamp(-LARGEST, LARGEST).round().to(torch.int8)
    return IntGrouped(codes, step.reshape(1, 1), None, BITS)


def price(done: float, config: Config) -> float:
    """λ when a share of the steps is done."""
    return config.rate * (min(1.0, done / config.ramp) if config.ramp else 1.0)


MODE = Mode(
    "epr",
    "all weights and biases become codes, whose bits the loss pays for (Oktay 2020)",
    Config,
    moves=moves,
    check=check,
    recodes=Recodes(outline, start, running, bits, written, price),
    when="small plain networks with data, for the fewest bytes: `export --to compact` writes the codes in these bits",
)
