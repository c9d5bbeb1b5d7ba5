"""Codes as real numbers that training can move: rounded on the way forward, passed straight through on the way back.

Bengio et al. 2013, arXiv:1308.3432. A latent number stands in the place of each code of a stored form. Going forward it
is the code that will be written, so that what is evaluated is what is stored; going back its gradient is that of the
code, but for what would push it further beyond the ends of the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from aicompress.methods.quantize.grid.rounding import code_range
from aicompress.weights import Codebook, EntropyCoded, Float8, IntGrouped, SparseCodes, Weight, restore
from aicompress.weights.decoding import DECODERS, Meta, Tensors, by_column, decoder, masked
from aicompress.weights.form import inside, within
from aicompress.weights.stored.float8 import DTYPES


@dataclass(frozen=True)
class LatentKind:
    """How the codes of one stored form become real numbers and codes again.

    Attributes:
        suffix: of the tensor that holds the codes.
        start: (weight) -> latent numbers that round to its codes.
        decode: (meta, tensors) -> the matrix (out, in), differentiable; latent numbers are under `suffix`.
        rounded: (weight, latent numbers) -> the weight with the codes that they round to.
        gap: (weight) -> the mean distance between neighbouring numbers that a latent one can round to.
    """

    suffix: str
    start: Callable[[Any], Tensor]
    decode: Callable[[Meta, Tensors], Tensor]
    rounded: Callable[[Any, Tensor], Weight]
    gap: Callable[[Any], float] = lambda weight: 1.0


@dataclass(frozen=True)
class Latent(Weight):
    """A weight in training, with real numbers in the place of its codes; it is never stored.

    Attributes:
        coded: the weight with the codes that it had.
        values: latent numbers, in the shape of the codes.
    """

    form: ClassVar[str] = "latent"
    coded: Weight
    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.coded.shape

    def tensors(self) -> dict[str, Tensor]:
        return {**self.coded.tensors(), KINDS[type(self.coded)].suffix: self.values}

    def meta(self) -> dict[str, Any]:
        return {**self.coded.meta(), "form": self.form, "coded": self.coded.form}

    def dense(self) -> Tensor:
        return self.stored().dense()

    def stored(self) -> Weight:
        """The weight with the codes that its latent numbers round to."""
        return KINDS[type(self.coded)].rounded(self.coded, self.values)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        raise TypeError("latent numbers are never stored")


def relaxed(weight: Weight) -> Weight:
    """The weight, or outline, with latent numbers in the place of all codes in it; itself where it has none.

    Entropy-coded codes stay: with others their streams would be longer or shorter than is planned.
    """
    if isinstance(weight, EntropyCoded):
        return weight
    if type(weight) in KINDS:
        return Latent(weight, KINDS[type(weight)].start(weight))
    parts = {name: relaxed(part) for name, part in inside(weight).items()}
    return replace(weight, **parts) if parts else weight  # type: ignore[type-var]


def settled(weight: Weight, moved: Mapping[str, Tensor]) -> Weight:
    """A relaxed weight as it is stored after its tensors have moved.

    Args:
        weight: what `relaxed` gave.
        moved: tensors by suffix, in the dtypes that `weight` has them in.
    """
    if not any(isinstance(part, Latent) for part in within(weight)):
        return restore({**weight.tensors(), **moved}, weight.meta())
    suffixes = {id(tensor): suffix for suffix, tensor in weight.tensors().items() if suffix in moved}

    def settle(part: Weight) -> Weight:
        own = {n: moved[suffixes[id(t)]] for n, t in vars(part).items() if id(t) in suffixes}
        changed = {**own, **{name: settle(each) for name, each in inside(part).items()}}
        now: Weight = replace(part, **changed) if changed else part  # type: ignore[type-var]
        return now.stored() if isinstance(now, Latent) else now

    return settle(weight)


def latent_suffixes(weight: Weight) -> frozenset[str]:
    """Suffixes of a weight's tensors that hold codes which can move."""
    before, after = weight.specs(), relaxed(weight).specs()
    return frozenset(suffix for suffix, spec in after.items() if spec.dtype != before[suffix].dtype)


def gaps(weight: Weight) -> dict[str, float]:
    """The step of the grid of each tensor of latent numbers, by suffix, of what `relaxed` gave."""
    suffixes = {id(tensor): suffix for suffix, tensor in weight.tensors().items()}
    latent = [part for part in within(weight) if isinstance(part, Latent)]
    return {suffixes[id(part.values)]: KINDS[type(part.coded)].gap(part.coded) for part in latent}


class _Rounded(torch.autograd.Function):
    """Whole numbers between two ends; the gradient passes, but not what would push a number further out."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(values)
        ctx.ends = low, high
        return values.round().clamp_(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (values,), (low, high), (gradient,) = ctx.saved_tensors, ctx.ends, gradients
        outward = ((values > high) & (gradient < 0)) | ((values < low) & (gradient > 0))
        return gradient.masked_fill(outward, 0), None, None


def _codes(values: Tensor, bits: int) -> Tensor:
    """The codes that latent numbers round to, differentiable."""
    codes: Tensor = _Rounded.apply(values, *code_range(bits))  # type: ignore[no-untyped-call]
    return codes


def _through(chosen: Tensor, values: Tensor) -> Tensor:
    """What has been chosen for latent numbers, with their gradient beside its own."""
    return chosen + (values - values.detach())


def _integers(meta: Meta, tensors: Tensors) -> Tensor:
    codes, zero = _codes(tensors[""], int(meta["bits"])), tensors.get("zero")
    return _scaled(codes, None if zero is None else zero.float(), meta, tensors)


def _scaled(codes: Tensor, zero: Tensor | None, meta: Meta, tensors: Tensors) -> Tensor:
    columns, size = meta["shape"][1], int(meta["group_size"])
    if zero is not None:
        codes = codes - by_column(zero, columns, size)
    return codes * by_column(tensors["scale"], columns, size)


def _survivors(meta: Meta, tensors: Tensors) -> Tensor:
    out, columns = meta["shape"]
    kept, zero = masked(meta, tensors), tensors.get("zero")
    codes = _codes(tensors["codes"], int(meta["bits"]))
    whole = (
        torch.zeros(out * columns, dtype=codes.dtype, device=kept.device)
        .masked_scatter(kept, codes)
        .reshape(out, columns)
    )
    if zero is not None:
        whole = (whole - by_column(zero.float(), columns, int(meta["group_size"]))) * kept.reshape(out, columns)
    return _scaled(whole, None, meta, tensors)


def _looked_up(meta: Meta, tensors: Tensors) -> Tensor:
    (out, columns), tables, values = meta["shape"], tensors["tables"], tensors[""]
    rows = values.reshape(len(tables), -1)
    chosen = _through(tables.gather(1, nearest(rows.detach(), tables.detach())), rows).reshape(out, columns)
    scale = tensors.get("scale")
    if scale is None:
        return chosen
    return (chosen.reshape(out, scale.shape[1], -1) * scale[..., None]).reshape(out, columns)


def nearest(values: Tensor, tables: Tensor) -> Tensor:
    """Indices (tables, n) of the table's values that are nearest to values (tables, n)."""
    ordered, order = tables.sort(dim=1)
    places = torch.searchsorted((ordered[:, 1:] + ordered[:, :-1]) / 2, values.contiguous())
    return order.gather(1, places)


def _floats(meta: Meta, tensors: Tensors) -> Tensor:
    (_, columns), (height, width), values, scale = meta["shape"], meta["block"], tensors[""], tensors["scale"]
    rows = scale.repeat_interleave(height or len(values), dim=0)[: len(values)]
    chosen = _float8(values.detach(), DTYPES[meta["dtype"]]).float()
    return _through(chosen, values) * by_column(rows, columns, width)


def _float8(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest numbers of eight bits."""
    most = torch.finfo(dtype).max
    return values.clamp(-most, most).to(dtype)


def _rounded_integers(weight: IntGrouped | SparseCodes, values: Tensor) -> Weight:
    return replace(weight, codes=values.round().clamp(*code_range(weight.bits)).to(torch.int8))


def _start_of_codebook(weight: Codebook) -> Tensor:
    tables, codes = weight.tables.float(), weight.codes.long()
    return tables.gather(1, codes.reshape(len(tables), -1)).reshape(codes.shape)


def _rounded_codebook(weight: Codebook, values: Tensor) -> Codebook:
    tables = weight.tables.float()
    codes = nearest(values.reshape(len(tables), -1), tables).to(torch.uint8)
    return replace(weight, codes=codes.reshape(weight.codes.shape))


def _gap_of_codebook(weight: Codebook) -> float:
    tables = weight.tables.float()
    return float((tables.amax(1) - tables.amin(1)).mean()) / max(1, tables.shape[1] - 1)


KINDS: Mapping[type[Weight], LatentKind] = {
    IntGrouped: LatentKind("", lambda weight: weight.codes.float(), _integers, _rounded_integers),
    SparseCodes: LatentKind("codes", lambda weight: weight.codes.float(), _survivors, _rounded_integers),
    Codebook: LatentKind("", _start_of_codebook, _looked_up, _rounded_codebook, _gap_of_codebook),
    Float8: LatentKind(
        "",
        lambda weight: weight.values.float(),
        _floats,
        lambda weight, values: replace(weight, values=_float8(values, weight.values.dtype)),
        lambda weight: float(weight.values.float().square().mean().sqrt() * torch.finfo(weight.values.dtype).eps),
    ),
}


@decoder("latent")
def decode_latent(meta: Meta, tensors: Tensors) -> Tensor:
    """The matrix of a weight in training; of one whose codes stay in another layer that does not move, as stored."""
    kind = next(kind for each, kind in KINDS.items() if each.form == meta["coded"])
    if not tensors[kind.suffix].is_floating_point():
        return DECODERS[meta["coded"]]({**meta, "form": meta["coded"]}, tensors)
    return kind.decode(meta, tensors)
