"""GPTQ: codes packed down the input axis, zero points packed along the output axis, a scale for each group and output.

`qweight` int32 (in * bits / 32, out), `qzeros` int32 (groups, out * bits / 32), `scales` (groups, out), `g_idx` (in,):
the group of each input. The first version of the layout stores zero points less one, the second (`gptq_v2`) as they
are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from aicompress.checkpoint.foreign.layout import (
    ForeignLayout,
    ForeignTensors,
    ForeignWeight,
    Read,
    decoded,
    modules_with,
    require,
    weight_of,
)
from aicompress.weights import IntGrouped, Weight
from aicompress.weights.coding.packing import WORD, unpack_rows

ROLES = {"codes": "qweight", "zeros": "qzeros", "scale": "scales", "groups": "g_idx"}
ALONG = {"codes": 1, "zeros": 1, "scale": 1}
FORMATS = {"gptq": 1, "gptq_v2": 0}  # what is added to a zero point as it is stored


@dataclass(frozen=True)
class Packing:
    """How one weight is packed.

    Attributes:
        bits: of a code.
        shape: (out, in).
        group_size: inputs that share a scale; 0 for all of a row.
        symmetric: all zero points are 2^(bits - 1).
        added: what is added to a zero point as it is stored.
        ordered: every group is of inputs that lie side by side.
        dtype: what the weight decodes to.
    """

    bits: int
    shape: tuple[int, int]
    group_size: int
    symmetric: bool
    added: int
    ordered: bool
    dtype: torch.dtype


def weights(stored: ForeignTensors) -> dict[str, ForeignWeight]:
    """Modules with `qweight`, `qzeros` and `scales`, as many codes wide as there are scales."""
    recognized: dict[str, ForeignWeight] = {}
    for module in modules_with(stored.specs, "qweight"):
        names = stored.names(module, ROLES)
        if not {"codes", "zeros", "scale"} <= set(names):
            continue
        codes, scale = stored.specs[names["codes"]], stored.specs[names["scale"]]
        if len(codes.shape) == len(scale.shape) == 2 and codes.shape[1] == scale.shape[1]:
            recognized[weight_of(module)] = _weight(stored, module, names)
    return recognized


def _weight(stored: ForeignTensors, module: str, names: dict[str, str]) -> ForeignWeight:
    packing = _packing(stored, names)
    out, columns = packing.shape
    dense, transposed = stored.dense(weight_of(module), packing.shape)
    words = f"gptq, {packing.bits}-bit"
    if not packing.ordered:
        decode, words = partial(_decode, packing), f"{words}, columns in another order"
        return ForeignWeight(dense, names, words, decode, None, transposed, along=ALONG, multiple=WORD)
    groups = -(-columns // (packing.group_size or columns))
    scale = (stored.specs[names["scale"]].dtype, (out, groups))
    outline = IntGrouped.outline(packing.shape, scale, packing.symmetric, packing.bits, packing.group_size)
    decode_integers = partial(_integers, packing)
    return ForeignWeight(dense, names, words, decode_integers, outline, transposed, along=ALONG, multiple=WORD)


def _packing(stored: ForeignTensors, names: dict[str, str]) -> Packing:
    """How a weight is packed, from its tensors' shapes and the settings.

    Raises:
        ValueError: they do not fit one another, or are not understood.
    """
    settings = stored.settings
    codes, zeros, scale = (stored.specs[names[role]] for role in ("codes", "zeros", "scale"))
    groups, out = scale.shape
    bits = zeros.shape[1] * 32 // out if out else 0
    require(1 <= bits <= 8 and zeros.shape == (groups, -(-out * bits // 32)), f"zero points {zeros} for {scale}")
    varied = bool(settings.get("dynamic"))  # some modules are not as the settings say
    fits = (varied or settings.get("bits", bits) == bits) and codes.dtype is zeros.dtype is torch.int32
    require(fits, f"codes {codes}")
    columns = codes.shape[0] * 32 // bits
    size = -1 if varied else int(settings.get("group_size") or -1)
    size = columns if groups == 1 else size if size > 0 else columns // groups
    require(-(-columns // max(1, size)) == groups and scale.dtype.is_floating_point, f"{groups} groups of {columns}")
    layout = settings.get("checkpoint_format", "gptq")
    require(layout in FORMATS and not settings.get("is_marlin_format"), f"checkpoint_format {layout!r} is not read")
    ordered = True
    if "groups" in names:
        require(stored.specs[names["groups"]].shape == (columns,), f"g_idx is not of {columns} inputs")
        ordered = torch.equal(stored.read(names["groups"]).long(), torch.arange(columns) // size)
    symmetric = bool(settings.get("sym", False)) and not varied
    group_size = 0 if size == columns else size
    return Packing(bits, (out, columns), group_size, symmetric, FORMATS[layout], ordered, stored.dtype)


def _codes(packing: Packing, read: Read) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (out, in) and zero points (out, groups) int8, both less 2^(bits - 1), and scales (out, groups).

    Raises:
        ValueError: the settings call the weight symmetric, and it is not.
    """
    bits, half = packing.bits, 1 << (packing.bits - 1)
    codes = unpack_rows(read("codes").t().contiguous(), bits, packing.shape[1], half)
    raw = unpack_rows(read("zeros"), bits, len(codes))
    # Where all are in the middle, it shows which version of the layout this is.
    told = packing.symmetric and bool((raw == half).all())
    zeros = raw if told else (raw + packing.added) & ((1 << bits) - 1)
    require(not packing.symmetric or bool((zeros == half).all()), "its settings say sym, its zero points differ")
    return codes, (zeros.to(torch.int16) - half).to(torch.int8).t().contiguous(), read("scale").t().contiguous()


def _integers(packing: Packing, read: Read) -> IntGrouped:
    codes, zeros, scale = _codes(packing, read)
    return IntGrouped(codes, scale, None if packing.symmetric else zeros, packing.bits, packing.group_size)


def _decode(packing: Packing, read: Read) -> Weight:
    """w = (code - zero) * scale, each column with those of its own group."""
    codes, zeros, scale = _codes(packing, read)
    group = read("groups").long()
    require(int(group.min()) >= 0 and int(group.max()) < scale.shape[1], "g_idx names a group that is not there")

    def rows(start: int, stop: int) -> Tensor:
        values = codes[start:stop].float() - zeros[start:stop].float()[:, group]
        return values * scale[start:stop].float()[:, group]

    return decoded(len(codes), packing.shape[1], packing.dtype, 1, rows)


LAYOUT = ForeignLayout("gptq", ("gptq",), weights)
