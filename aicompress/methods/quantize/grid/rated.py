"""Codes that cost what they take once they are entropy-coded: steps found for a target, rounding that saves bits.

Where codes are entropy-coded the step alone decides how many bits they take, and a coarser code is worth its error
where it saves enough of them: each weight takes the code of least w (x − ŵ)² + λ R, with R the code length −log2 p of
its column's bucket and λ = 2 ln 2 / 12 of a step's square, the slope of error over rate of a fine uniform quantizer
(CERWU; DeepCABAC, arXiv:1907.11900). Tables of R are counted on the pass before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from aicompress.layer import LayerInfo
from aicompress.methods.method import MethodConfig
from aicompress.methods.quantize.grid.columns import Rounding, round_columns
from aicompress.methods.quantize.grid.trellis import TrellisGrid, compiled_search, typical
from aicompress.methods.quantize.grid.uniform import UniformGrid
from aicompress.weights import ColumnScaled, IntGrouped, Trellis, Weight
from aicompress.weights.coding.quantizers import in_use
from aicompress.weights.coding.writing import write_stream
from aicompress.weights.trellis import levels

BITS = 8  # of a code before it is entropy-coded
BUCKETS = 16  # of columns, as the coder has them
SLOPE = 2 * math.log(2) / 12
TRELLIS_ERROR = 4 * 0.7  # of squares of a trellis's step, where a uniform quantizer's error is 1/12 of its own
SAMPLE = 256  # rows that steps are searched on
ESTIMATED = 3  # passes whose bits are those of their tables
MEASURED = 5  # passes at most whose codes are coded
NEAR = 0.006  # share of the target that a search stops within
LARGEST = 120  # code of the largest weight at most: what feedback from other columns adds has to fit as well
TINY = 1024  # weights of a layer up to which the bytes that any stream has tell more than its codes do
WHOLE = 16  # bits that it stops within, however few a small layer has: streams are of whole bytes
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
    quantizer: Literal["uniform", "trellis"] = Field(
        "uniform",
        description="trellis: dependent quantization by two quantizers: about 0.15 bits fewer at the same error",
    )


@dataclass(frozen=True)
class Problem:
    """What is to be rounded, columns in the order of rounding.

    Attributes:
        wanted: (in, out) float32.
        coupling: of `round_columns`, (in, in); None where a column's error is not moved into others.
        weight: (in,) what a squared error of each column costs.
        profile: (in,) steps relative to one another; None: one step for all.
    """

    wanted: Tensor
    coupling: Tensor | None
    weight: Tensor
    profile: Tensor | None


def _tables(codes: Tensor, trellis: bool) -> tuple[Tensor, Tensor, float]:
    """Code lengths of buckets of columns alike in spread, each column's bucket, and bits per code.

    Code lengths are (buckets, 256), of a trellis (buckets, 2, 256).
    """
    columns, rows = codes.shape
    buckets = BUCKETS if columns >= 4 * BUCKETS and rows >= 16 else 1
    bucket = torch.empty(columns, dtype=torch.long)
    bucket[codes.var(dim=1, correction=0).argsort(stable=True)] = torch.arange(columns) * buckets // columns
    models = 2 if trellis else 1
    own = in_use(codes.t()).t().long() if trellis else torch.zeros(1, 1, dtype=torch.long)
    place = (bucket[:, None] * models + own) * 256 + codes.long() + 128
    counts = torch.bincount(place.reshape(-1), minlength=256 * buckets * models).reshape(buckets, models, 256).double()
    lengths = -((counts + 0.02) / (counts + 0.02).sum(dim=2, keepdim=True)).log2()
    taken = float((counts * lengths).sum() / codes.numel())
    return (lengths if trellis else lengths[:, 0]).float(), bucket, taken


@dataclass(frozen=True)
class Rated:
    """Codes of a layer, columns in the order of rounding.

    Attributes:
        codes: (in, out) float32.
        steps: (in,) of the columns.
        coarser: (out,) how many times as coarse the steps of each row are.
        trellis: the codes belong to two quantizers.
    """

    codes: Tensor
    steps: Tensor
    coarser: Tensor
    trellis: bool

    @property
    def values(self) -> Tensor:
        """What the codes stand for, (in, out)."""
        return (levels(self.codes.t()).t() if self.trellis else self.codes) * self.steps[:, None] * self.coarser


def rated_codes(problem: Problem, bits: float, config: RatedConfig) -> Rated:
    """Codes that take so many bits per weight once they are entropy-coded.

    Codes of eight bits reach every weight: a column's step is as coarse as its largest weight needs, and where all
    columns have one step, a row's is, which its factor takes up.
    """
    columns, rows = problem.wanted.shape
    trellis = config.quantizer == "trellis"
    profile = torch.ones(columns) if problem.profile is None else problem.profile
    spread = problem.wanted.square().mean(dim=1).sqrt()
    known = spread > 0
    if not known.any():
        return Rated(torch.zeros_like(problem.wanted), profile, torch.ones(rows), trellis)
    # A fine uniform quantizer of a Gaussian takes log2(σ √(2πe) / step) bits; both of a trellis have half its step.
    log = float((spread[known] / profile[known] * math.sqrt(2 * math.pi * math.e)).log().mean())
    log -= (bits + trellis) * math.log(2)
    floor = problem.wanted.abs().amax(dim=0 if problem.profile is None else 1) / (LARGEST * (2 if trellis else 1))
    slope = config.rate * SLOPE * (TRELLIS_ERROR if trellis else 1)
    kind: type[TrellisGrid | UniformGrid] = TrellisGrid if trellis else UniformGrid
    tables = typical() if trellis else torch.zeros(1, 256)
    bucket = torch.zeros(columns, dtype=torch.long)
    best: tuple[float, Tensor, Tensor, Tensor] | None = None
    every = max(1, rows // SAMPLE)
    for attempt in range(ESTIMATED + MEASURED):
        measured = attempt >= ESTIMATED
        steps, coarser = math.exp(log) * profile, torch.ones(rows)
        if problem.profile is None:
            coarser = (floor / math.exp(log)).clamp_min(1)
        else:
            steps = torch.maximum(steps, floor)
        price = problem.weight.double() * steps.double().square()
        price = (slope * price.mean() / price.clamp_min(1e-30)).clamp_max(16).float()
        grid: Rounding = kind(steps, price, tables, bucket)
        scaled = problem.wanted / coarser
        codes = round_columns(scaled if measured else scaled[:, ::every].contiguous(), problem.coupling, grid)
        tables, bucket, taken = _tables(codes, trellis)
        if measured:
            taken = coded_bits(codes, trellis) if codes.numel() > TINY else taken
            off = abs(taken - bits)
            best = (off, codes, steps, coarser) if best is None or off < best[0] else best
            if off <= max(NEAR * bits, WHOLE / codes.numel()) or (taken > bits and not codes.any()):
                break
        log += max(-2.0, min(2.0, (taken - bits) * math.log(2)))
    assert best is not None
    return Rated(*best[1:], trellis)


def coded_bits(codes: Tensor, trellis: bool) -> float:
    """Bits per code (in, out) of the stream that codes become."""
    stream = write_stream((codes.t() + 128).to(torch.uint8), "trellis" if trellis else BITS)
    return 8 * stream.numel() / codes.numel()


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
    for _ in range(2 if columns and hessian is not None else 1):  # more change nothing
        scaled = values * g[:, None]
        norm = (scaled * (scaled if hessian is None else hessian @ scaled)).sum(dim=0)
        t = torch.where(norm > 0, (scaled * pull).sum(dim=0) / norm.clamp_min(1e-30), 1.0).clamp_(0.5, 2.0)
        if columns and hessian is not None:
            scaled = values * t
            normal = (hessian * (scaled @ scaled.t())).double()
            ridge = 1e-3 * normal.diagonal() + 1e-12 * normal.diagonal().mean() + 1e-30
            off = (scaled * pull).sum(dim=1).double() - normal.sum(dim=1)
            normal.diagonal().add_(ridge)
            g = (1 + torch.cholesky_solve(off[:, None], torch.linalg.cholesky(normal))[:, 0]).clamp_(0.0, 2.0).float()
    return t, g


def bits_of_codes(info: LayerInfo, config: RatedConfig, columns: bool) -> float:
    """Bits per code once the factors of rows, and of columns where there are such, have taken theirs.

    Codes keep half of the target: of a layer so small that factors would take all of it nothing would be left, and its
    bytes are few.
    """
    out, width = info.shape
    factors = 16 * (out + (width if columns else 0)) / max(1, out * width)
    return max(config.target_bpw - factors, config.target_bpw / 2)


def stored(rated: Rated, order: Tensor, rows: Tensor, columns: Tensor | None) -> Weight:
    """The weight of codes, row factors (out,) and column factors (in,) in the order of rounding."""
    own = torch.empty_like(rated.codes)
    own[order] = rated.codes
    codes, scale = own.t().contiguous().to(torch.int8), rows[:, None].to(SCALES)
    coded: Weight = Trellis(codes, scale) if rated.trellis else IntGrouped(codes, scale, None, BITS)
    if columns is None:
        return coded
    factors = torch.empty_like(columns)
    factors[order] = columns
    return ColumnScaled(coded, factors.to(SCALES))


def outline(info: LayerInfo, config: RatedConfig, columns: bool) -> Weight:
    """The stored weight without data."""
    coded: Weight = IntGrouped.outline(info.shape, (SCALES, (info.shape[0], 1)), True, BITS, 0)
    if config.quantizer == "trellis":
        coded = Trellis.outline(info.shape, SCALES)
    return ColumnScaled.outline(coded, SCALES) if columns else coded


def check(info: LayerInfo, config: RatedConfig) -> tuple[str, str] | None:
    """A trellis is searched by compiled code."""
    if config.quantizer == "trellis" and compiled_search() is None:
        return f"{info.name}: its trellis needs numba, which cannot be imported", "pip install numba"
    return None


def describe(config: RatedConfig, weight: Weight) -> dict[str, Any]:
    """Knobs for the report row."""
    return {"target": config.target_bpw, "quantizer": config.quantizer}
