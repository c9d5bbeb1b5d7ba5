"""A dictionary of orthonormal directions, and sparse coefficients of every row in it; no training.

Makhov et al. 2026, COMPOT, arXiv:2602.15200: with S Sᵀ = E[x xᵀ] the whitened rows Z = W S (out, in) are written as
C D, for a dictionary D (atoms, in) of orthonormal rows and sparse C (out, atoms). Given D the best C keeps the largest
numbers of Z Dᵀ; given C the best D is U Vᵀ of Cᵀ Z = U Σ Vᵀ (Procrustes). Both take turns, and W ≈ C (D S⁻¹). The paper
keeps equally many numbers of every row; here the largest of the whole matrix stay, which loses less in as many bytes,
as a mask of one bit per number says where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from aicompress.errors import RecipeError
from aicompress.layer import Layer, LayerInfo
from aicompress.methods.capabilities import Candidate, Reads, Rounded
from aicompress.methods.curvature import raw_gram, shifted
from aicompress.methods.decisions import Allocates, Surveys, SurveySetting
from aicompress.methods.factorize.budget.shares import Curve, ShareConfig, Shared, resolve, still_open
from aicompress.methods.factorize.budget.sizes import dense_nbytes, factor_dtype, growing, kept_dense
from aicompress.methods.factorize.weighting.roots import Root, Weighting, even
from aicompress.methods.factorize.weighting.rounding import weighed_rounding
from aicompress.methods.factorize.weighting.weighted import AIM_AS_TRIED, SHIFT
from aicompress.methods.layerwise import LayerMethod
from aicompress.weights import Dense, LowRank, Sparse, Weight


class DictionaryConfig(ShareConfig):
    """Parameters of dictionary."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"keep": 0.8, "rounds": 3}, {"keep": 0.4, "multiple": 2, "rounds": 1}]}
    )

    name: Literal["dictionary"] = "dictionary"
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
        description=AIM_AS_TRIED,
    )

    def as_tried(self) -> DictionaryConfig:
        """The parameters under which layers are tried on the running model, and written so."""
        given = "shift" in self.model_fields_set or self.max_kl is None
        return self if given else self.model_copy(update={"shift": 0.0})


@dataclass(frozen=True)
class DictionarySize:
    """How large the parts of a layer are.

    Attributes:
        atoms: rows of the dictionary.
        kept: coefficients that are not zero.
    """

    atoms: int
    kept: int


def size_of(info: LayerInfo, config: DictionaryConfig) -> DictionarySize | None:
    """The most atoms at the config's density that its share of bytes holds; None where nothing is smaller than dense.

    Where no more atoms are of use, the bytes that are left go to coefficients.

    Raises:
        RecipeError: the share depends on the layers' values.
    """
    if config.keep is None:
        raise RecipeError(f"{info.name}: its share is not decided", "target_bytes and max_kl need its values")
    if config.keep == 1:
        return None
    out, columns = info.shape
    number = factor_dtype(info).itemsize
    budget = int(config.keep * dense_nbytes(info))
    per_atom = columns * number + out / 8 + config.density * out * number
    atoms = min(int(budget / per_atom), out, columns) // config.multiple * config.multiple
    atoms = max(atoms, config.multiple)
    beside = atoms * columns * number + -(-out * atoms // 8)
    kept = min(max((budget - beside) // number, atoms), out * atoms)
    return (
        DictionarySize(atoms, kept)
        if beside + kept * number < dense_nbytes(info) and atoms <= min(out, columns)
        else None
    )


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
    if info.stored == "dense" or config.keep is None:
        return None
    size = nbytes(info, config)
    return None if size < info.nbytes else growing(info, size)


def apply(layer: Layer, config: DictionaryConfig) -> Weight:
    """Find dictionary and coefficients of one layer, or keep it dense where they would not be smaller.

    Raises:
        CompressError: no calibration token reached the layer, or its inputs are not finite.
    """
    size = size_of(layer.info, config)
    if size is None:
        return kept_dense(layer)
    root = Root.of(raw_gram(layer), config.damping)
    rows = root.times(shifted(layer, config.shift, root.solve).double())
    atoms = dictionary(rows, size, config.rounds)
    coefficients, mask = largest(rows @ atoms.t(), size.kept)
    out, inner = even(coefficients, root.undone(atoms))
    dtype = factor_dtype(layer.info)
    return LowRank(Sparse.of(out.to(dtype), mask), Dense(inner.to(dtype).contiguous()))


def dictionary(rows: Tensor, size: DictionarySize, rounds: int) -> Tensor:
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


def _curve(layer: Layer, configs: Sequence[DictionaryConfig], rows: Tensor, comparable: bool) -> Curve:
    """What the largest coefficients of rows (out, in) in their top directions hold, before any round."""
    left, sigma, _ = torch.linalg.svd(rows, full_matrices=False)
    squares = (left * sigma).square_()
    sizes = [size_of(layer.info, config) for config in configs]
    held = [float(squares[:, : x.atoms].flatten().topk(x.kept).values.sum()) if x is not None else 0.0 for x in sizes]
    return Curve(held, float(sigma.square().sum()), comparable)


def _by_weights(layer: Layer, config: DictionaryConfig, configs: Sequence[DictionaryConfig]) -> Curve:
    return _curve(layer, configs, layer.weight.double(), True)


def _by_inputs(layer: Layer, config: DictionaryConfig, configs: Sequence[DictionaryConfig]) -> Curve:
    seen = layer.inputs is None or layer.inputs.count > 1  # white noise counts one row
    return _curve(layer, configs, Root.of(raw_gram(layer), config.damping).times(layer.weight.double()), seen)


def nbytes(info: LayerInfo, config: DictionaryConfig) -> int:
    """Bytes of the stored weight."""
    return sum(spec.nbytes for spec in outline(info, config).specs().values())


def estimated(candidates: Sequence[Candidate[DictionaryConfig]], other_bytes: int) -> list[DictionaryConfig]:
    """Shares by the weights alone where a survey will decide, so that the output can be laid out.

    Raises:
        RecipeError: a budget does not hold the smallest shares, or a compressed layer would grow.
    """
    candidates = [replace(candidate, config=candidate.config.as_tried()) for candidate in candidates]
    return still_open(candidates, resolve(candidates, other_bytes, Shared(nbytes, _by_weights, check)))


def decide(candidates: Sequence[Candidate[DictionaryConfig]], setting: SurveySetting) -> list[DictionaryConfig]:
    """Shares by the layers' inputs; errors as of `estimated`."""
    return resolve(candidates, setting.other_bytes, Shared(nbytes, _by_inputs, check), setting.divergence)


def alternative(layer: Layer, config: DictionaryConfig, weight: Weight, nbytes: int) -> Rounded | None:
    """What rounding a layer in no more bytes would lose."""
    return weighed_rounding(layer, weight, nbytes, Weighting(Root.of(raw_gram(layer), config.damping)))


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
    allocates=Allocates(estimated),
    surveys=Surveys(
        lambda config: frozenset({"gram"}) if config.shared_out else frozenset(),
        decide,
        lambda config: config.max_kl is not None,
    ),
    describe=describe,
    rounded=alternative,
    reading=Reads[DictionaryConfig](shift=lambda config: config.shift),
)
