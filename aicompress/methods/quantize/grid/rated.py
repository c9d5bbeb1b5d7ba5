"""Codes that cost what they take once they are entropy-coded: steps found for a target, rounding that saves bits.

Where codes are entropy-coded the step alone decides how many bits they take, and a coarser code is worth its error
where it saves enough of them: each weight takes the code of least w (x − ŵ)² + λ R, with R the code length −log2 p of
its column's bucket and λ = 2 ln 2 / 12 of a step's square, the slope of error over rate of a fine uniform quantizer
(CERWU; DeepCABAC, arXiv:1907.11900). Tables of R are counted on the pass before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from aicompress.layer import LayerInfo
from aicompress.methods.method import MethodConfig
from aicompress.methods.quantize.grid.columns import round_columns
from aicompress.weights import ColumnScaled, IntGrouped, Weight
from aicompress.weights.coding.writing import write_stream

BITS = 8  # of a code before it is entropy-coded
MOST = 127
BUCKETS = 16  # of columns, as the coder has them
SLOPE = 2 * math.log(2) / 12
SAMPLE = 256  # rows that steps are searched on
ESTIMATED = 4  # passes whose bits are those of their tables
MEASURED = 6  # passes at most whose codes are coded
NEAR = 0.004  # share of the target that a search stops within
SCALES = torch.bfloat16  # of factors of rows and columns: half a percent of a factor is far below the codes' error


class RatedConfig(MethodConfig):
    """Knobs of methods whose codes are entropy-coded."""

    entropy_coded: ClassVar[bool] = True

    target_bpw: float = Field(
        3.0,
        ge=0.5,
        le=7,
        description="bits per weight of a layer once it is coded, factors of rows and columns included",
    )
    rate: float = Field(
        0.8,
        ge=0,
        le=2,
        description="how much a saved bit counts in rounding, in slopes of error over rate; 0: not at all",
    )


@dataclass(frozen=True)
class Problem:
    """What is to be rounded, columns in the order of rounding.

    Attributes:
        wanted: (in, out) float32.
        coupling: of `round_columns`, (in, in); None where a column's error is not moved into others.
        weight: (in,) what a squared error of each column costs.
        profile: (in,) steps relative to one another.
    """

    wanted: Tensor
    coupling: Tensor | None
    weight: Tensor
    profile: Tensor

    def rows(self, every: int) -> Problem:
        """The same with some of the rows of the weight."""
        return Problem(self.wanted[:, ::every].contiguous(), self.coupling, self.weight, self.profile)


@dataclass(frozen=True)
class RatedGrid:
    """A uniform grid for each column, and what its codes cost.

    Attributes:
        steps: (in,) float32.
        price: of a bit in each column, in squares of its step.
        tables: (buckets, 256) bits of code + 128.
        bucket: of each column.
    """

    steps: Tensor
    price: Tensor
    tables: Tensor | None
    bucket: Tensor

    def round(self, column: int, target: Tensor, codes: Tensor) -> Tensor:
        """Fill `codes` (out,) with the codes of least cost of a column; returns their values."""
        exact = target / self.steps[column]
        nearest = torch.round(exact, out=codes).clamp_(-MOST, MOST)
        if self.tables is not None:
            table, smaller = self.tables[self.bucket[column]], nearest - nearest.sign()
            saved = table[(nearest + 128).int()] - table[(smaller + 128).int()]
            further = (exact - smaller).square_() - (exact - nearest).square_()
            codes.copy_(torch.where(further < saved.mul_(self.price[column]), smaller, nearest))
        return codes * self.steps[column]


def _round(problem: Problem, grid: RatedGrid) -> Tensor:
    """Codes (in, out) of all columns."""
    if problem.coupling is not None:
        return round_columns(problem.wanted.clone(), problem.coupling, grid)
    codes = torch.empty_like(problem.wanted)
    for column in range(len(codes)):
        grid.round(column, problem.wanted[column], codes[column])
    return codes


def _tables(codes: Tensor) -> tuple[Tensor, Tensor, float]:
    """Code lengths (buckets, 256) of buckets of columns alike in spread, each column's bucket, and bits per code."""
    columns, rows = codes.shape
    buckets = BUCKETS if columns >= 4 * BUCKETS and rows >= 16 else 1
    bucket = torch.empty(columns, dtype=torch.long)
    bucket[codes.var(dim=1, correction=0).argsort(stable=True)] = torch.arange(columns) * buckets // columns
    place = (bucket[:, None] * 256 + codes.long() + 128).reshape(-1)
    counts = torch.bincount(place, minlength=256 * buckets).reshape(buckets, 256).double()
    share = (counts + 0.02) / (counts + 0.02).sum(dim=1, keepdim=True)
    return (-share.log2()).float(), bucket, float((counts * -share.log2()).sum() / codes.numel())


def rated_codes(problem: Problem, bits: float, rate: float) -> tuple[Tensor, Tensor]:
    """Codes that take so many bits per weight once they are entropy-coded.

    Returns:
        Codes (in, out) float32, and the steps (in,) of their columns.
    """
    columns, rows = problem.wanted.shape
    spread = problem.wanted.square().mean(dim=1).sqrt()
    known = spread > 0
    if not known.any():
        return torch.zeros_like(problem.wanted), problem.profile.clone()
    # A fine uniform quantizer of a Gaussian takes log2(σ √(2πe) / step) bits.
    log = float((spread[known] / problem.profile[known] * math.sqrt(2 * math.pi * math.e)).log().mean())
    log -= bits * math.log(2)
    price = problem.weight.double().mul(problem.profile.double().square())
    price = (rate * SLOPE * price.mean() / price.clamp_min(1e-30)).clamp_max(16).float()
    tables: Tensor | None = None
    bucket, best = torch.zeros(columns, dtype=torch.long), None
    every = max(1, rows // SAMPLE)
    for attempt in range(ESTIMATED + MEASURED):
        measured = attempt >= ESTIMATED
        steps = math.exp(log) * problem.profile
        grid = RatedGrid(steps, price, tables if rate else None, bucket)
        codes = _round(problem if measured else problem.rows(every), grid)
        tables, bucket, taken = _tables(codes)
        if measured:
            taken = coded_bits(codes)
            off = abs(taken - bits)
            best = (off, codes, steps) if best is None or off < best[0] else best
            if off <= NEAR * bits:
                break
        log += max(-2.0, min(2.0, (taken - bits) * math.log(2)))
    assert best is not None
    return best[1], best[2]


def coded_bits(codes: Tensor) -> float:
    """Bits per code (in, out) of the stream that codes become."""
    return 8 * write_stream((codes.t() + 128).to(torch.uint8)).numel() / codes.numel()


def refitted(wanted: Tensor, hessian: Tensor | None, values: Tensor, columns: bool) -> tuple[Tensor, Tensor]:
    """Factors of rows and columns that bring values closest to what they were rounded from.

    Args:
        wanted: W, (in, out).
        hessian: H, (in, in); None: the identity.
        values: Ŵ, (in, out).
        columns: fit factors of columns too.

    Returns:
        t (out,) and g (in,) of least tr((W − diag(t) Ŵ diag(g)) H (·)ᵀ), by turns; ones where nothing is known.
    """
    pull = wanted if hessian is None else hessian @ wanted
    t, g = torch.ones(wanted.shape[1]), torch.ones(wanted.shape[0])
    for _ in range(3 if columns and hessian is not None else 1):
        scaled = values * g[:, None]
        norm = (scaled * (scaled if hessian is None else hessian @ scaled)).sum(dim=0)
        t = torch.where(norm > 0, (scaled * pull).sum(dim=0) / norm.clamp_min(1e-30), 1.0).clamp_(0.5, 2.0)
        if columns and hessian is not None:
            scaled = values * t
            normal = (hessian * (scaled @ scaled.t())).double()
            ridge = 1e-3 * normal.diagonal() + 1e-12 * normal.diagonal().mean() + 1e-30
            off = (scaled * pull).sum(dim=1).double() - normal.sum(dim=1)
            g = (1 + torch.linalg.solve(normal + torch.diag(ridge), off)).clamp_(0.0, 2.0).float()
    return t, g


def overhead(info: LayerInfo, columns: bool) -> float:
    """Bits per weight of the factors of rows, and of columns where there are such."""
    out, width = info.shape
    return 16 * (out + (width if columns else 0)) / max(1, out * width)


def stored(codes: Tensor, rows: Tensor, columns: Tensor | None) -> Weight:
    """The weight of codes (in, out), row factors (out,) and column factors (in,), all in the layer's own order."""
    coded = IntGrouped(codes.t().contiguous().to(torch.int8), rows[:, None].to(SCALES), None, BITS)
    return coded if columns is None else ColumnScaled(coded, columns.to(SCALES))


def outline(info: LayerInfo, columns: bool) -> Weight:
    """The stored weight without data."""
    coded = IntGrouped.outline(info.shape, (SCALES, (info.shape[0], 1)), True, BITS, 0)
    return ColumnScaled.outline(coded, SCALES) if columns else coded


def describe(config: RatedConfig, weight: Weight) -> dict[str, Any]:
    """Knobs for the report row."""
    return {"target": config.target_bpw, "rate": config.rate}
