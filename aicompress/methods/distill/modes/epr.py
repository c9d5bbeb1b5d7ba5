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

from aicompress.methods.modes import NOTHING, WHOLE, Mode, ModeConfig, Recodes, StudentParameter
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
    weight: Tensor = _Rounded.apply(matrix, learnt["step"])  # type: ignore[no-untyped-call]
    return weight


class _Rounded(torch.autograd.Function):
    """s round(θ/s), of θ and log s; torch's own derivatives take six times the passes over the matrix."""

    @staticmethod
    def forward(context: Any, matrix: Tensor, step: Tensor) -> Tensor:
        size = float(step.exp())
        weight = (matrix / size).clamp_(-LARGEST, LARGEST).round_().mul_(size)
        context.save_for_backward(matrix, weight)
        context.most = size * LARGEST
        return weight

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        matrix, weight = context.saved_tensors
        by_matrix = gradients[0]
        largest = float(matrix.abs().max()) if matrix.numel() else 0.0
        if largest > context.most:
            by_matrix = by_matrix.masked_fill(matrix.abs() > context.most, 0.0)
        by_step = torch.sum(gradients[0] * weight) - torch.sum(by_matrix * matrix)
        return by_matrix, by_step.reshape(1)


def bits(matrix: Tensor, learnt: Mapping[str, Tensor], noise: Tensor | None) -> Tensor:
    """Σ -log2 p(θ/s + u), or of the codes themselves.

    Args:
        matrix: θ, (out, in).
        learnt: as of `start`.
        noise: u, (out, in); None for the codes.
    """
    tensors = (matrix, learnt["step"], learnt["outputs"], learnt["inputs"])
    chance: Tensor = _LogChance.apply(*tensors, noise)  # type: ignore[no-untyped-call]
    return -chance / math.log(2)


class _LogChance(torch.autograd.Function):
    """Σ log p(x), of θ, log s and the logarithms of both widths.

    With i = σ((1/2 - |x|)/b) and o = σ((-1/2 - |x|)/b), of which p = i - o,

        ∂ log p/∂|x| = -(1 - i - o)/b,   ∂ log p/∂b = -(i (1 - i)/(b p) + (-1/2 - |x|)/b (1 - i - o))/b,

    in which nothing is lost where p is almost zero. The passes over a matrix are what a step of a small net costs.
    """

    @staticmethod
    def forward(
        context: Any, matrix: Tensor, step: Tensor, outputs: Tensor, inputs: Tensor, noise: Tensor | None
    ) -> Tensor:
        size = float(step.exp())
        position = matrix / size
        position = position.round_() if noise is None else position.add_(noise)
        rows, columns = (PACE * outputs).exp_(), (PACE * inputs).exp_()
        narrow = torch.outer(rows, columns).add_(NARROWEST).reciprocal_()  # 1/b
        near = torch.sub(0.5, position.abs()).mul_(narrow).clamp_min_(FARTHEST)
        far = near - narrow
        inner, outer = near.sigmoid_(), far.sigmoid()
        chance = inner - outer
        context.save_for_backward(matrix, position, rows, columns, narrow, far, inner, outer, chance)
        context.step, context.moves = size, noise is not None
        return chance.log().sum()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        matrix, position, rows, columns, narrow, far, inner, outer, chance = context.saved_tensors
        scale = float(gradients[0])
        outside = torch.add(inner, outer).neg_().add_(1)  # 1 - i - o
        by_width = torch.addcmul(inner, inner, inner, value=-1).mul_(narrow).div_(chance).addcmul_(far, outside)
        by_width.mul_(narrow).mul_(-scale)
        by_outputs = (by_width @ columns).mul_(rows).mul_(PACE)
        by_inputs = (rows @ by_width).mul_(columns).mul_(PACE)
        if not context.moves:
            return None, None, by_outputs, by_inputs, None
        by_matrix = outside.mul_(narrow).mul_(position.sign()).mul_(-scale / context.step)
        by_step = -torch.dot(by_matrix.flatten(), matrix.flatten())
        return by_matrix, by_step.reshape(1), by_outputs, by_inputs, None


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
