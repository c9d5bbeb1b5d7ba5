"""A dictionary of orthonormal directions, and sparse coefficients of every row in it; no training.

Makhov et al. 2026, COMPOT, arXiv:2602.15200: with S Sᵀ = E[x xᵀ] the whitened rows Z = W S (out, in) are written as
C D, for a dictionary D (atoms, in) of orthonormal rows and sparse C (out, atoms). Given D the best C keeps the largest
numbers of Z Dᵀ; given C the best D is U Vᵀ of Cᵀ Z = U Σ Vᵀ (Procrustes). Both take turns, and W ≈ C (D S⁻¹). The paper
keeps equally many numbers of every row; here the largest of the whole matrix stay, which loses less in as many bytes,
as a mask of one bit per number says where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Reads, Rounded
from aicompress.methods.curvature import moments, shifted
from aicompress.methods.factorize.budget.sizes import dense_nbytes, factor_dtype, kept_dense
from aicompress.methods.factorize.weighting.roots import Root, Weighting, even
from aicompress.methods.factorize.weighting.rounding import weighed_rounding
from aicompress.methods.factorize.weighting.weighted import AIM, SHIFT
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.method import MethodConfig
from aicompress.weights import Dense, LowRank, Sparse, Weight


class DictionaryConfig(MethodConfig):
    """Parameters of dictionary."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"rounds": 3}, {"keep": 0.4, "multiple": 2, "rounds": 1}]}
    )

    name: Literal["dictionary"] = "dictionary"
    keep: float = Field(0.8, gt=0, le=1, description="share of a layer's bytes that dictionary and coefficients take")
    density: float = Field(
        0.6, gt=0, lt=1, description="share of the coefficients that stay; the fewer, the more directions there are"
    )
    rounds: int = Field(20, ge=0, le=100, description="how often coefficients and dictionary are fitted in turn")
    multiple: int = Field(
        1, ge=1, description="the number of directions is one of this, so that groups of a later quantization fit"
    )
    damping: float = Field(0.01, ge=0, le=1, description="added to the Gram matrix, as a part of its mean diagonal")
    shift: float = Field(
        SHIFT,
        ge=0,
        le=1,
        description=AIM,
    )


@dataclass(frozen=True)
class Size:
    """How large the parts of a layer are.

    Attributes:
        atoms: rows of the dictionary.
        kept: coefficients that are not zero.
    """

    atoms: int
    kept: int


def size_of(info: LayerInfo, config: DictionaryConfig) -> Size | None:
    """The most atoms at the config's density that its share of bytes holds; None where nothing is smaller than dense.

    Where no more atoms are of use, the bytes that are left go to coefficients.
    """
    out, columns = info.shape
    number = factor_dtype(info).itemsize
    budget = int(config.keep * dense_nbytes(info))
    per_atom = columns * number + out / 8 + config.density * out * number
    atoms = min(int(budget / per_atom), out, columns) // config.multiple * config.multiple
    atoms = max(atoms, config.multiple)
    beside = atoms * columns * number + -(-out * atoms // 8)
    kept = min(max((budget - beside) // number, atoms), out * atoms)
    return Size(atoms, kept) if beside + kept * number < dense_nbytes(info) and atoms <= min(out, columns) else None


def outline(info: LayerInfo, config: DictionaryConfig) -> Weight:
    """The stored weight without data."""
    size, dtype = size_of(info, config), factor_dtype(info)
    if size is None:
        return Dense.outline(info.shape, info.dtype)
    coefficients = Sparse.outline((info.shape[0], size.atoms), size.kept, dtype)
    return LowRank(coefficients, Dense.outline((size.atoms, info.shape[1]), dtype))


def check(info: LayerInfo, config: DictionaryConfig) -> tuple[str, str] | None:
    """A factor is not factorized again, and a compressed layer must not grow."""
    if info.part or info.stored == "low_rank":
        return f"{info.name}: is a factor of a low-rank layer already", "factorize the model it was made from"
    size = sum(spec.nbytes for spec in outline(info, config).specs().values())
    if info.stored == "dense" or size < info.nbytes:
        return None
    return (
        f"{info.name}: is stored as {info.stored} in {info.nbytes} bytes; it would take {size}",
        "factorize first, then compress the factors, or exclude the layer",
    )


def apply(layer: Layer, config: DictionaryConfig) -> Weight:
    """Find dictionary and coefficients of one layer, or keep it dense where they would not be smaller.

    Raises:
        CompressError: no calibration token reached the layer, or its inputs are not finite.
    """
    size = size_of(layer.info, config)
    if size is None:
        return kept_dense(layer)
    root = Root.of(moments(layer), config.damping)
    rows = root.times(shifted(layer, config.shift, root.solve).double())
    atoms = dictionary(rows, size, config.rounds)
    coefficients, mask = largest(rows @ atoms.t(), size.kept)
    out, inner = even(coefficients, root.undone(atoms))
    dtype = factor_dtype(layer.info)
    return LowRank(Sparse.of(out.to(dtype), mask), Dense(inner.to(dtype).contiguous()))


def dictionary(rows: Tensor, size: Size, rounds: int) -> Tensor:
    """D (atoms, in) with orthonormal rows, whose sparse coefficients are near the given rows (out, in).

    It starts from the top directions of the rows.
    """
    start: Tensor = torch.linalg.svd(rows, full_matrices=False).Vh
    atoms = start[: size.atoms]
    for _ in range(rounds):
        coefficients, _ = largest(rows @ atoms.t(), size.kept)
        left, _, right = torch.linalg.svd(coefficients.t() @ rows, full_matrices=False)
        atoms = left @ right
    return atoms


def largest(coefficients: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """The largest numbers of a matrix, the others zero, and the mask of these."""
    order = coefficients.abs().flatten().topk(kept).indices
    mask = torch.zeros(coefficients.numel(), dtype=torch.bool)
    mask[order] = True
    mask = mask.view_as(coefficients)
    return coefficients * mask, mask


def alternative(layer: Layer, config: DictionaryConfig, weight: Weight, nbytes: int) -> Rounded | None:
    """What rounding a layer in no more bytes would lose."""
    return weighed_rounding(layer, weight, nbytes, Weighting(Root.of(moments(layer), config.damping)))


def describe(config: DictionaryConfig, weight: Weight) -> dict[str, Any]:
    """Knobs for the report row."""
    if isinstance(weight, LowRank):
        return {"rank": weight.rank, "density": round(weight.out.numbers() / weight.out.shape[0] / weight.rank, 3)}
    return {"rank": "full", "note": "a dictionary would not make it smaller: kept dense"}


METHOD = LayerMethod(
    name="dictionary",
    command="factorize",
    summary="orthonormal directions and sparse coefficients that change the layer's output little; calibrated",
    when="in place of whitened where a layer's singular values fall off slowly; it takes an svd in each of its rounds",
    config=DictionaryConfig,
    needs=frozenset({"gram"}),
    apply=apply,
    outline=outline,
    check=check,
    describe=describe,
    rounded=alternative,
    reading=Reads[DictionaryConfig](shift=lambda config: config.shift),
)
