"""MLX: codes in a stream of bits for every row, in words of 32, with one scale for each group of columns.

`weight` uint32 (out, in * bits / 32), the first code in the lowest bits, and `scales` (out, in / group_size). Affine
codes have `biases` of that shape, too: w = code * scale + bias. The modes mxfp4, mxfp8 and nvfp4 hold floating numbers
of four and eight bits, with scales in bytes. Bits, sizes of groups and modes are in config.json alone, under
`quantization`, those of single modules by their names (documentation of `mlx.core.quantize`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aicompress.checkpoint.foreign import fp4
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
from aicompress.checkpoint.foreign.scaling import real
from aicompress.weights import Codebook, Dense, Weight
from aicompress.weights.coding.packing import WORD, unpack_rows

METHOD = "mlx"
BITS = (1, 2, 3, 4, 5, 6, 8)
MODES = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}  # columns of a group, and bits
ROLES = {"packed": "weight", "scale": "scales", "bias": "biases"}
SCALES = {"mxfp4": torch.bfloat16, "nvfp4": torch.float32}  # hold what the bytes of the scales mean


@dataclass(frozen=True)
class MlxScheme:
    """How a module is quantized: mode, bits of a code, columns of a group."""

    mode: str
    bits: int
    size: int

    @classmethod
    def of(cls, settings: Mapping[str, Any], module: str) -> MlxScheme:
        """A module's own scheme, or else that of all."""
        own = settings.get(module)
        given = own if isinstance(own, dict) else settings
        mode = str(given.get("mode", "affine"))
        require(mode in MODES, f"{module}: mode {mode!r} is not read, {', '.join(MODES)} are")
        size, bits = (
            int(given.get(key, usual)) for key, usual in zip(("group_size", "bits"), MODES[mode], strict=True)
        )
        require(bits in BITS and size > 0 and size % WORD in (0, 16), f"{module}: {bits} bits in groups of {size}")
        return cls(mode, bits, size)


def weights(stored: ForeignTensors) -> dict[str, ForeignWeight]:
    """Modules with `scales` beside a `weight` of words."""
    recognized: dict[str, ForeignWeight] = {}
    for module in modules_with(stored.specs, ROLES["scale"]):
        names = stored.names(module, ROLES)
        packed = stored.specs.get(names.get("packed", ""))
        if packed is not None and packed.dtype is torch.uint32 and len(packed.shape) == 2:
            require(bool(stored.settings), f"bits and group_size of {module} are in config.json: give its directory")
            recognized[weight_of(module)] = _weight(stored, module, names)
    return recognized


def _weight(stored: ForeignTensors, module: str, names: dict[str, str]) -> ForeignWeight:
    scheme = MlxScheme.of(stored.settings, module)
    (rows, words), scale = stored.specs[names["packed"]].shape, stored.specs[names["scale"]]
    columns = words * WORD // scheme.bits
    fits = columns * scheme.bits == words * WORD and scale.shape == (rows, columns // scheme.size)
    require(
        fits and not columns % scheme.size, f"{scale} for {scheme.bits} bits in groups of {scheme.size}, {words} words"
    )
    affine = scheme.mode == "affine"
    require(scale.dtype.is_floating_point if affine else scale.dtype is torch.uint8, f"scales {scale}")
    require(affine == ("bias" in names), f"{module} has {'no' if affine else ''} biases")
    require(not affine or stored.specs[names["bias"]] == scale, f"biases and scales of {module} differ")
    dense, transposed = stored.dense(weight_of(module), (rows, columns))
    outline: Weight | None = None
    decode: Callable[[Read], Weight] = partial(_affine if affine else _float8, scheme, dense.dtype)
    if scheme.mode in SCALES:
        outline = fp4.outline(rows, columns, columns // scheme.size, SCALES[scheme.mode])
        decode = partial(_codebook, scheme.mode)
    along = dict.fromkeys(names, 0)
    return ForeignWeight(dense, names, _words(scheme), decode, outline, transposed, along=along)


def _words(scheme: MlxScheme) -> str:
    return f"mlx, {scheme.bits}-bit" if scheme.mode == "affine" else f"mlx, {scheme.mode}"


def _affine(scheme: MlxScheme, dtype: torch.dtype, read: Read) -> Dense:
    packed, scale, bias = read("packed").view(torch.int32), read("scale").float(), read("bias").float()
    columns = scale.shape[1] * scheme.size

    def rows(first: int, last: int) -> Tensor:
        codes = unpack_rows(packed[first:last], scheme.bits, columns).view(last - first, -1, scheme.size)
        return (codes * scale[first:last, :, None] + bias[first:last, :, None]).view(last - first, columns)

    return decoded(len(packed), columns, dtype, 1, rows)


def _codebook(mode: str, read: Read) -> Codebook:
    scale = read("scale")
    levels = real(scale) if mode == "mxfp4" else scale.view(torch.float8_e4m3fn).float()
    return fp4.codebook(read("packed"), levels.to(SCALES[mode]))


def _float8(scheme: MlxScheme, dtype: torch.dtype, read: Read) -> Dense:
    packed, scale = read("packed"), real(read("scale"))
    columns = scale.shape[1] * scheme.size

    def rows(first: int, last: int) -> Tensor:
        numbers = packed[first:last].view(torch.float8_e4m3fn).float().view(last - first, -1, scheme.size)
        return (numbers * scale[first:last, :, None]).view(last - first, columns)

    return decoded(len(packed), columns, dtype, 1, rows)


LAYOUT = ForeignLayout("mlx", (METHOD,), weights)
