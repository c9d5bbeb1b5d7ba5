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
from aicompress.weights.stored.trellis import levels

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


def tables_of(codes: Tensor, trellis: bool) -> tuple[Tensor, Tensor, float]:
    """Code lengths of buckets of columns alike in spread, each column's bucket, and bits per code.

    Code lengths are (buckets, 256), of a trellis (buckets, 2, 256).
    """
    bucket = buckets(codes.var(dim=1, correction=0), codes.shape[1])
    models = 2 if trellis else 1
    own = in_use(codes.t()).t().long() if trellis else torch.zeros(1, 1, dtype=torch.long)
    place = (bucket[:, None] * models + own) * 256 + codes.long() + 128
    several = int(bucket.max()) + 1
    counts = torch.bincount(place.reshape(-1), minlength=256 * several * models).reshape(several, models, 256)
    lengths, taken = code_lengths(counts)
    return lengths, bucket, taken / codes.numel()


def buckets(variance: Tensor, rows: int) -> Tensor:
    """The bucket of each column, by the variances of their codes: as many columns each."""
    columns = len(variance)
    several = BUCKETS if columns >= 4 * BUCKETS and rows >= 16 else 1
    bucket = torch.empty(columns, dtype=torch.long)
    bucket[variance.argsort(stable=True)] = torch.arange(columns) * several // columns
    return bucket


def code_lengths(counts: Tensor) -> tuple[Tensor, float]:
    """Bits of each code by counts (buckets, models, 256), without the axis of a single model, and of all codes."""
    often = counts.double()
    lengths = -((often + 0.02) / (often + 0.02).sum(dim=2, keepdim=True)).log2()
    taken = float((often * lengths).sum())
    return (lengths if counts.shape[1] > 1 else lengths[:, 0]).float(), taken


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


@dataclass(frozen=True)
class RatedRounding:
    """How a pass rounds.

    Attributes:
        log: of the step.
        tables: code lengths of buckets of columns, from the pass before.
        bucket: of each column.
    """

    log: float
    tables: Tensor
    bucket: Tensor

    @classmethod
    def first(cls, log: float, columns: int, trellis: bool) -> RatedRounding:
        """Before any code is counted."""
        return cls(log, typical() if trellis else torch.zeros(1, 256), torch.zeros(columns, dtype=torch.long))

    def next(self, taken: float, bits: float, tables: Tensor, bucket: Tensor) -> RatedRounding:
        """The next pass, after codes took so many bits each and not those that they should."""
        return RatedRounding(self.log + max(-2.0, min(2.0, (taken - bits) * math.log(2))), tables, bucket)


def first_log(spread: Tensor, profile: Tensor, bits: float, trellis: bool) -> float:
    """About the logarithm of a step whose codes take so many bits.

    A fine uniform quantizer of a Gaussian takes log2(σ √(2πe) / step) bits; both of a trellis have half its step.

    Args:
        spread: root mean squares of the columns, some above 0.
        profile: of the same columns.
        bits: per code.
        trellis: the codes belong to two quantizers.
    """
    known = spread > 0
    log = float((spread[known] / profile[known] * math.sqrt(2 * math.pi * math.e)).log().mean())
    return log - (bits + trellis) * math.log(2)


def floor_of(problem: Problem, trellis: bool) -> Tensor:
    """The finest steps whose codes reach every weight: of rows, or of columns that have steps of their own."""
    return problem.wanted.abs().amax(dim=0 if problem.profile is None else 1) / (LARGEST * (2 if trellis else 1))


def one_pass(problem: Problem, floor: Tensor, scheme: RatedRounding, config: RatedConfig, every: int = 1) -> Rated:
    """Round every weight, or every so many rows."""
    columns, rows = problem.wanted.shape
    trellis = config.quantizer == "trellis"
    step, coarser = math.exp(scheme.log), torch.ones(rows)
    if problem.profile is None:
        steps, coarser = step * torch.ones(columns), (floor / step).clamp_min(1)
    else:
        steps = torch.maximum(step * problem.profile, floor)
    slope = config.rate * SLOPE * (TRELLIS_ERROR if trellis else 1)
    price = problem.weight.double() * steps.double().square()
    price = (slope * price.mean() / price.clamp_min(1e-30)).clamp_max(16).float()
    kind: type[TrellisGrid | UniformGrid] = TrellisGrid if trellis else UniformGrid
    grid: Rounding = kind(steps, price, scheme.tables, scheme.bucket)
    scaled = problem.wanted / coarser
    codes = round_columns(scaled[:, ::every].contiguous(), problem.coupling, grid)
    return Rated(codes, steps, coarser, trellis)


def rated_codes(problem: Problem, bits: float, config: RatedConfig) -> Rated:
    """Codes that take so many bits per weight once they are entropy-coded.

    Codes of eight bits reach every weight: a column's step is as coarse as its largest weight needs, and where all
    columns have one step, a row's is, which its factor takes up.
    """
    columns, rows = problem.wanted.shape
    trellis = config.quantizer == "trellis"
    profile = torch.ones(columns) if problem.profile is None else problem.profile
    spread = problem.wanted.square().mean(dim=1).sqrt()
    if not (spread > 0).any():
        return Rated(torch.zeros_like(problem.wanted), profile, torch.ones(rows), trellis)
    floor, every = floor_of(problem, trellis), max(1, rows // SAMPLE)
    scheme = RatedRounding.first(first_log(spread, profile, bits, trellis), columns, trellis)
    best: tuple[float, Rated] | None = None
    for attempt in range(ESTIMATED + MEASURED):
        measured = attempt >= ESTIMATED
        rated = one_pass(problem, floor, scheme, config, 1 if measured else every)
        tables, bucket, taken = tables_of(rated.codes, trellis)
        if measured:
            taken = coded_bits(rated.codes, trellis) if rated.codes.numel() > TINY else taken
            off = abs(taken - bits)
            best = (off, rated) if best is None or off < best[0] else best
            if near(taken, bits, rated.codes.numel()) or (taken > bits and not rated.codes.any()):
                break
        scheme = scheme.next(taken, bits, tables, bucket)
    assert best is not None
    return best[1]


def near(taken: float, bits: float, codes: int) -> bool:
    """Whether so many codes take nearly the bits that they should."""
    return abs(taken - bits) <= max(NEAR * bits, WHOLE / codes)


def coded_bits(codes: Tensor, trellis: bool) -> float:
    """Bits per code (in, out) of the stream that codes become."""
    stream = write_stream((codes.t() + 128).to(torch.uint8), "trellis" if trellis else BITS)
    return 8 * stream.numel() / codes.numel()


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
