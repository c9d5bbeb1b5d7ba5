"""Structured optimal brain surgeon: which units of a layer's input can go, and what the consumer of the rest becomes.

A consumer W reads x; only the entries K of x stay. The least E‖W x − W' x_K‖² is reached by W'ᵀ = A_KK⁻¹ B_K with
A = E[x xᵀ] and B = A Wᵀ: ordinary least squares, the end state of optimal brain surgeon (Hassibi and Stork 1992) when
whole columns go. With P = A_KK⁻¹ and V = P B_K, taking out a unit S costs tr(V_Sᵀ (P_SS)⁻¹ V_S) and leaves
V − P_:S (P_SS)⁻¹ V_S and P − P_:S (P_SS)⁻¹ P_S: (Kurtic et al. 2023, ZipLM, arXiv:2302.04089, eq. 3 and 4). A bias
takes up what the mean of x gave: then A is the covariance. Where the original model's x̃ is known beside the compressed
one's x, B = E[x x̃ᵀ] Wᵀ aims at the original's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aicompress.errors import CompressError
from aicompress.methods.curvature import damped
from aicompress.methods.structural import Part, Structure
from aicompress.statistics import InputStats

ROUNDS = 64  # steps in which units go; several at once where there are more


@dataclass(frozen=True)
class Consumer:
    """One consumer of a structure's units, as least squares sees it. All float64.

    Attributes:
        part: where its weight comes from; the units' entries are the rows of the matrices here.
        offset: where its bias comes from, or None.
        second: A, damped, (in, in).
        right: B, (in, out).
        weight: Wᵀ, (in, out); zero for inputs that do not vary, which cost nothing.
        mean: of x, (in,); zero where no bias can take it up.
        constant: what the bias takes up, W E[x̃], (out,).
    """

    part: Part
    offset: Part | None
    second: Tensor
    right: Tensor
    weight: Tensor
    mean: Tensor
    constant: Tensor

    def rows(self, units: Sequence[int]) -> Tensor:
        """Entries of x that belong to units."""
        return (torch.tensor(units)[:, None] * self.part.span + torch.arange(self.part.span)).reshape(-1)

    def refitted(self, kept: Sequence[int]) -> dict[str, Tensor]:
        """New values by tensor: (units, numbers) of the weight, (1, out) of the bias; float32."""
        rows = self.rows(kept)
        factor = torch.linalg.cholesky(self.second[rows][:, rows])
        values = torch.cholesky_solve(self.right[rows], factor)  # (kept in, out)
        fitted = {self.part.tensor: values.reshape(len(kept), -1).float()}
        if self.offset is not None:
            change = self.constant - self.mean[rows] @ values  # (out,)
            fitted[self.offset.tensor] = (self.offset.read().double() + change).float()
        return fitted


def consumers(structure: Structure, damping: float, shift: float = 0.0) -> list[Consumer]:
    """The consumers of a structure with their statistics.

    Args:
        structure: with a Gram matrix for each consumer.
        damping: added to A, as a part of its mean diagonal.
        shift: how far the target moves from what the weight makes of x to the original model's output, 0 to 1.

    Raises:
        CompressError: statistics are missing or not finite.
    """
    return [_consumer(structure, part, damping, shift) for part in structure.of("consumer")]


def _consumer(structure: Structure, part: Part, damping: float, shift: float) -> Consumer:
    inputs = structure.inputs.get(part.tensor)
    if inputs is None or inputs.gram is None:
        raise CompressError(f"{part.tensor}: there is no Gram matrix of its inputs", "calibrate with gram")
    if not torch.isfinite(inputs.gram).all():
        raise CompressError(f"{part.tensor}: its inputs hold NaN or infinity", "calibrate in float32")
    gram = inputs.gram.double()
    weight = part.read().double().reshape(len(gram), -1)  # (in, out)
    offset = next((o for o in structure.of("offset") if o.module == part.module), None)
    zero = torch.zeros(len(gram), dtype=torch.float64)
    mean = zero if offset is None else _mean(part, inputs).double()
    original = mean if inputs.original_mean is None or offset is None else inputs.original_mean.double()
    original = mean + shift * (original - mean)
    covariance = gram - torch.outer(mean, mean)
    second = damped(covariance, damping)
    varied = weight * (covariance.diagonal() > 0)[:, None]
    right = second @ varied
    if shift:
        if inputs.cross is None:
            raise CompressError(f"{part.tensor}: nothing compares its inputs with the original's", "set shift: 0")
        cross = (inputs.cross.double() - torch.outer(original if offset is not None else zero, mean)) - covariance
        right += shift * cross.t() @ weight
    return Consumer(part, offset, second, right, varied, mean, original @ weight)


def _mean(part: Part, inputs: InputStats) -> Tensor:
    if inputs.mean is None:
        raise CompressError(f"{part.tensor}: there is no mean of its inputs", "calibrate with mean")
    return inputs.mean


@dataclass
class _Left:
    """What is left of a consumer while units go: P = A_KK⁻¹ and V = P B_K, rows of what is gone zero."""

    span: int
    inverse: Tensor
    values: Tensor

    @classmethod
    def of(cls, consumer: Consumer) -> _Left:
        factor = torch.linalg.cholesky(consumer.second)
        inverse = torch.cholesky_inverse(factor)
        return cls(consumer.part.span, inverse, inverse @ consumer.right)

    def losses(self, units: Tensor) -> Tensor:
        """tr(V_Sᵀ (P_SS)⁻¹ V_S) of each unit, (units,)."""
        rows = units[:, None] * self.span + torch.arange(self.span)  # (units, span)
        if self.span == 1:
            return self.values[rows[:, 0]].square().sum(dim=1) / self.inverse.diagonal()[rows[:, 0]]
        blocks = self.inverse[rows[:, :, None], rows[:, None, :]]  # (units, span, span)
        values = self.values[rows]  # (units, span, out)
        solved: Tensor = torch.linalg.solve(blocks, values)
        return (values * solved).sum(dim=(1, 2))

    def without(self, units: Tensor) -> float:
        """Take units out; returns what that costs."""
        rows = (units[:, None] * self.span + torch.arange(self.span)).reshape(-1)
        factor, wrong = torch.linalg.cholesky_ex(self.inverse[rows][:, rows])
        if int(wrong):
            raise CompressError("the inverse Gram matrix lost its definiteness while units went", "raise damping")
        cost = float(torch.linalg.solve_triangular(factor, self.values[rows], upper=False).square().sum())
        columns = self.inverse[:, rows].clone()  # (in, gone)
        self.values -= columns @ torch.cholesky_solve(self.values[rows], factor)
        half = torch.linalg.solve_triangular(factor, columns.t(), upper=False)  # (gone, in)
        self.inverse.addmm_(half.t(), half, alpha=-1)
        return cost


def chosen(structure: Structure, read: Sequence[Consumer], size: int) -> list[int]:
    """The units that stay, ascending: those of least loss go, a few at a time, and the rest is scored anew.

    Of equals the later ones go. As many stay of each of the structure's groups.
    """
    left = [_Left.of(consumer) for consumer in read]
    run, quota = structure.size // structure.groups, (structure.size - size) // structure.groups
    step = max(1, -(-quota // ROUNDS))
    present = torch.ones(structure.size, dtype=torch.bool)
    gone = 0
    while gone < quota:
        units = present.nonzero()[:, 0]
        losses = torch.stack([each.losses(units) for each in left]).sum(dim=0)
        take = min(step, quota - gone)
        ranked = torch.full((structure.size,), torch.inf, dtype=torch.float64).index_copy_(0, units, losses)
        lowest = ranked.view(structure.groups, run).flip(1).argsort(dim=1, stable=True)[:, :take]
        away = (torch.arange(structure.groups)[:, None] * run + run - 1 - lowest).reshape(-1)
        present[away] = False
        gone += take
        if gone < quota:
            for each in left:
                each.without(away)
    return [int(unit) for unit in present.nonzero()[:, 0]]


def curve(structure: Structure, read: Sequence[Consumer], sizes: Sequence[int]) -> list[float]:
    """What the consumers' outputs lose, E‖W x − W' x_K‖², when so many units stay; for descending sizes.

    One path: what is gone at a size is gone at the smaller ones.
    """
    left = [_Left.of(consumer) for consumer in read]
    present, lost, by_size = torch.ones(structure.size, dtype=torch.bool), 0.0, []
    step = max(1, -(-structure.size // ROUNDS))
    for size in sizes:
        while (more := int(present.sum()) - size) > 0:
            units = present.nonzero()[:, 0]
            losses = torch.stack([each.losses(units) for each in left]).sum(dim=0)
            away = units[losses.argsort(stable=True)[: min(step, more)]]
            present[away] = False
            lost += sum(each.without(away) for each in left)
        by_size.append(lost)
    return by_size
