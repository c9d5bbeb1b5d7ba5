"""A k×k convolution as a 1×1, a smaller k×k and a 1×1 one: Tucker decomposition on its channels; data-free.

Kim et al. 2016, "Compression of deep convolutional neural networks for fast and low power mobile applications",
arXiv:1511.06530, section 3.1, with the decomposition of De Lathauwer, De Moor and Vandewalle 2000, "On the best rank-1
and rank-(R1, ..., RN) approximation of higher-order tensors" (HOOI): W[o, i, k] ≈ Σ_{r,s} A[o, r] C[r, s, k] B[i, s]. A
and B have orthonormal columns, and start as the leading left singular vectors of W's unfoldings along o and i (HOSVD);
each sweep takes A of W projected on B, then B of W projected on A. ‖W − Ŵ‖² = ‖W‖² − ‖C‖², which no sweep makes larger.

W is read in blocks of output channels, once for each panel of a projection (`PANEL`), and never held: beside a
block and a panel are the factors in float64, and the Gram matrix (I, I), or the smaller one of W projected on B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor
from torch.nn import functional

from aicompress.errors import RecipeError
from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Candidate, RowWise
from aicompress.methods.decisions import Allocates
from aicompress.methods.factorize import streamed, svd
from aicompress.methods.factorize.budget import sizes
from aicompress.methods.factorize.budget.sizes import energy_rank
from aicompress.methods.factorize.decomposition import add_gram, leading
from aicompress.methods.factorize.streamed import Rows
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.method import MethodConfig
from aicompress.weights import Convolutions, Dense, Weight, outline_nbytes

PANEL = 1 << 22  # numbers of a projection that are held in float64: 32 MiB
Ranks = tuple[int, int]  # channels after the core, and before it


class TuckerConfig(MethodConfig):
    """Parameters of tucker."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"keep": 0.5}, {"rank": 4, "in_rank": 2}, {"energy": 0.9, "multiple": 2}]}
    )
    one_of: ClassVar[tuple[str, ...]] = ("rank", "energy", "keep")

    name: Literal["tucker"] = "tucker"
    rank: int | None = Field(None, ge=1, description="channels that the k×k convolution gives, at most the layer's own")
    in_rank: int | None = Field(None, ge=1, description="channels that it takes; null: as many as `rank`")
    energy: float | None = Field(
        None, gt=0, le=1, description="the fewest channels that hold this share of Σσ², on each side of each layer"
    )
    keep: float | None = Field(
        None, gt=0, le=1, description="share of a layer's parameters; both sides keep one share of their channels"
    )
    multiple: int = Field(1, ge=1, description="channels are multiples of this, or the layer's own")
    sweeps: int = Field(3, ge=0, le=100, description="of HOOI, after the first choice of both sides' directions")

    @model_validator(mode="after")
    def _in_rank_goes_with_rank(self) -> TuckerConfig:
        if self.in_rank is not None and self.rank is None:
            raise ValueError("in_rank goes with rank")
        return self


def suits(info: LayerInfo) -> bool:
    """Whether a layer is a convolution of several positions and channels; a depthwise one has a single channel."""
    if info.part:
        return True  # which `check` refuses
    shape = info.tensor_shape
    return info.kind == "conv" and len(shape) > 2 and shape[1] > 1 and math.prod(shape[2:]) > 1


def ranks_of(info: LayerInfo, config: TuckerConfig) -> Ranks | None:
    """The channels after and before the core; None where the layer's values decide and did not yet."""
    out, channels, positions = _sizes(info)
    if config.rank is not None:
        asked: tuple[float, float] = (config.rank, config.in_rank or config.rank)
        wanted = [math.ceil(rank / config.multiple) * config.multiple for rank in asked]
    elif config.keep is not None:  # f(I² + O²) + f² k² I O = keep k² I O
        linear, square = channels**2 + out**2, positions * channels * out
        share = (math.sqrt(linear**2 + 4 * square**2 * config.keep) - linear) / (2 * square)
        asked = (share * out, share * channels)
        wanted = [max(config.multiple, int(rank / config.multiple) * config.multiple) for rank in asked]
    else:
        return None
    return min(wanted[0], out), min(wanted[1], channels)


def _sizes(info: LayerInfo) -> tuple[int, int, int]:
    """Output channels, input channels, and positions of the kernel."""
    out, channels, *kernel = info.tensor_shape
    return out, channels, math.prod(kernel)


class TuckerBlockConfig(TuckerConfig):
    """Parameters for some output channels of a layer, with what all of them gave.

    Attributes:
        inner: B, (I, s) float64.
        core: C, (r, s k) float64.
        outer: A of these output channels, (o, r) float64.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    inner: Tensor
    core: Tensor
    outer: Tensor


def factors(rows: Rows, channels: int, ranks: Ranks, sweeps: int) -> tuple[Tensor, Tensor, Tensor]:
    """A (O, r), C (r, s k) and B (I, s) of a weight (O, I k) in float64, read in blocks of output channels."""
    outer = None if sweeps else _leading_left(rows, ranks[0], streamed.gram(rows))
    inner = _leading(_inner_gram(rows, channels), ranks[1])
    for _ in range(sweeps):
        projected = _projected(rows, inner)
        gram = streamed.gram(projected) if projected.tall else _outer_gram(rows, inner)
        outer = _leading_left(projected, ranks[0], gram)
        inner = _leading(_inner_gram(rows, channels, outer), ranks[1])
    assert outer is not None
    return outer, _projected(rows, inner).projected(outer), inner


def _projected(rows: Rows, inner: Tensor) -> Rows:
    """W projected on B, (O, s k), in the blocks of W."""
    channels, rank = inner.shape
    columns = rank * rows.shape[1] // channels

    def block(read: Callable[[], Tensor]) -> Tensor:
        return torch.einsum("oik,is->osk", _by_channels(read(), channels), inner).flatten(1)

    return Rows((rows.shape[0], columns), [partial(block, read) for read in rows.blocks])


def _by_channels(block: Tensor, channels: int) -> Tensor:
    """(o, I k) as (o, I, k)."""
    return block.reshape(len(block), channels, -1)


def _inner_gram(rows: Rows, channels: int, outer: Tensor | None = None) -> Tensor:
    """The Gram matrix (I, I) of the input channels of W, or of W projected on A; a panel of that is made at a time."""
    total = torch.zeros(channels, channels, dtype=torch.float64)
    if outer is None:
        for _, block in rows.each():
            add_gram(total, _by_channels(block, channels).transpose(1, 2).flatten(0, 1))
    else:
        for part in torch.split(outer, max(1, PANEL // rows.shape[1]), dim=1):
            add_gram(total, _by_channels(rows.projected(part), channels).transpose(1, 2).flatten(0, 1))
    return total


def _outer_gram(rows: Rows, inner: Tensor) -> Tensor:
    """The Gram matrix (O, O) of W projected on B; a panel of that, of some directions, is made at a time."""
    total = torch.zeros(rows.shape[0], rows.shape[0], dtype=torch.float64)
    for part in torch.split(inner, max(1, PANEL * len(inner) // math.prod(rows.shape)), dim=1):
        projected = _projected(rows, part)
        panel = torch.empty(projected.shape, dtype=torch.float64)
        for place, block in projected.each():
            panel[place] = block
        total.addmm_(panel, panel.t())
    return total


def _leading(gram: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors of a Gram matrix (n, n), which is used up: (n, rank), orthonormal columns."""
    return leading(gram, rank)[1].flip(0).t()


def _leading_left(rows: Rows, rank: int, gram: Tensor) -> Tensor:
    """The leading left singular vectors of a matrix (n, m), by its smaller Gram matrix: (n, rank), orthonormal."""
    vectors = _leading(gram, rank)
    if not rows.tall:
        return vectors
    images = rows.times(vectors)
    basis: Tensor = torch.linalg.qr(functional.pad(images, (0, rank - images.shape[1]))).Q
    return basis  # beyond the rank of the matrix its directions are any


def apply(layer: Layer, config: TuckerConfig) -> Weight:
    """Factorize one layer, or keep it dense where the three convolutions would not be smaller."""
    planned = outline(layer.info, config)
    if not isinstance(planned, Convolutions):
        return sizes.kept_dense(layer)
    if not isinstance(config, TuckerBlockConfig):
        (config,) = divided(layer.info, [lambda: layer], config)
    assert isinstance(config, TuckerBlockConfig)
    dtype = sizes.factor_dtype(layer.info)
    matrices = [Dense(part.to(dtype).contiguous()) for part in (config.inner.t(), config.outer, config.core)]
    return Convolutions(planned.kernels, *matrices)


def divided(info: LayerInfo, blocks: Sequence[Callable[[], Layer]], config: TuckerConfig) -> list[TuckerConfig]:
    """A config for each block of output channels, with what all of them gave."""
    planned = outline(info, config)
    if not isinstance(planned, Convolutions):
        return [config] * len(blocks)
    ranks, rows = (planned.channels[1], planned.channels[0]), _rows(info, blocks)
    outer, core, inner = factors(rows, info.tensor_shape[1], ranks, config.sweeps)
    return [
        TuckerBlockConfig.model_construct(**dict(config), inner=inner, core=core, outer=outer[place])
        for place in rows.places
    ]


def _rows(info: LayerInfo, blocks: Sequence[Callable[[], Layer]]) -> Rows:
    """W (O, I k) in blocks of output channels, float64."""
    return Rows(info.shape, [partial(lambda read: read().weight.double(), read) for read in blocks])


def outline(info: LayerInfo, config: TuckerConfig) -> Weight:
    """The stored weight without data.

    Raises:
        RecipeError: its channels depend on the layer's values.
    """
    dense = Dense.outline(info.shape, info.dtype)
    if not suits(info):
        return dense
    if isinstance(config, TuckerBlockConfig):
        return _outline(info, (config.core.shape[0], config.inner.shape[1]))
    ranks = ranks_of(info, config)
    if ranks is None:
        raise RecipeError(f"{info.name}: its ranks are not decided", "energy needs the layer's values")
    found = _outline(info, ranks)
    return found if outline_nbytes(found) < outline_nbytes(dense) else dense


def _outline(info: LayerInfo, ranks: Ranks) -> Convolutions:
    out, channels, positions = _sizes(info)
    kernel = tuple(info.tensor_shape[2:])
    ones = (1,) * len(kernel)
    shapes = ((ranks[1], channels), (out, ranks[0]), (ranks[0], ranks[1] * positions))
    dtype = sizes.factor_dtype(info)
    return Convolutions((ones, kernel, ones), *(Dense.outline(shape, dtype) for shape in shapes))


def check(info: LayerInfo, config: TuckerConfig) -> tuple[str, str] | None:
    """A part of a factorized layer is not factorized again, and a compressed layer must not grow."""
    if info.part or info.stored == "low_rank":
        return sizes.of_factors(info)
    if not suits(info) or info.stored == "dense" or ranks_of(info, config) is None:
        return None
    size = outline_nbytes(outline(info, config))
    return None if size < info.nbytes else sizes.growing(info, size)


def resolve(candidates: Sequence[Candidate[TuckerConfig]], other_bytes: int) -> list[TuckerConfig]:
    """Turn `energy` into the channels of every layer, which is read."""
    return [_decided(candidate) if suits(candidate.info) else candidate.config for candidate in candidates]


def _decided(candidate: Candidate[TuckerConfig]) -> TuckerConfig:
    """The config with channels for a layer.

    Raises:
        RecipeError: a compressed layer would grow.
    """
    info, config = candidate.info, candidate.config
    if config.energy is None:
        return config
    rows = _rows(info, candidate.parts)
    inputs: Tensor = torch.linalg.eigvalsh(_inner_gram(rows, info.tensor_shape[1])).flip(0).clamp_min_(0)
    out, inner = (energy_rank(each, config.energy) for each in (streamed.squared_singular_values(rows), inputs))
    decided = config.model_copy(update={"energy": None, "rank": out, "in_rank": inner})
    problem = check(info, decided)
    if problem is not None:
        raise RecipeError(*problem)
    return decided


def describe(config: TuckerConfig, weight: Weight) -> dict[str, Any]:
    """Knobs for the report row."""
    if isinstance(weight, Convolutions):
        return {"rank": weight.channels[1], "in_rank": weight.channels[0]}
    return {"rank": "full", "note": "three convolutions would not be smaller: kept dense"}


METHOD = LayerMethod(
    name="tucker",
    command="factorize",
    summary="a k×k convolution as 1×1, smaller k×k and 1×1 ones, by rank, energy or share of parameters; data-free",
    when="convolutions of many channels that go together, before a distillation; `whitened` where there is data",
    config=TuckerConfig,
    apply=apply,
    outline=outline,
    row_wise=RowWise(lambda config: True, divided=divided, exact=False),
    check=check,
    allocates=Allocates(resolve),
    describe=describe,
    rounded=svd.alternative,
    suits=suits,
    made_for="convolutions of several channels and positions",
)
