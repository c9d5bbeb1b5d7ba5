"""Every layout of compressed-tensors decodes to what the library itself decodes it to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from tests.checkpoint.test_foreign import matrix, opened
from tests.foreign import Encoded


def compressed(weights: dict[str, Any], form: str, **more: Tensor) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    """A matrix as compressed-tensors stores it, what it decodes that to, and config.json's section."""
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    library = BaseCompressor.get_value_from_registry(form)
    stored = library.compress({"weight": matrix(), **more}, scheme)
    decoded = library.decompress(stored, scheme)["weight"]
    group = {"targets": ["Linear"], "weights": weights, "format": form, "input_activations": None}
    settings = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return {f".{name}": tensor for name, tensor in stored.items()}, decoded, settings


def integers(bits: int, strategy: str, symmetric: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    scales = {"tensor": (1,), "channel": (40, 1), "group": (40, 2)}[strategy]
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": False}
    scale = torch.full(scales, 0.6 / (1 << bits)) * torch.linspace(0.8, 1.2, scales[0]).reshape(
        -1, *[1] * (len(scales) - 1)
    )
    zero = torch.full(scales, 0 if symmetric else 1, dtype=torch.int8)
    return weights | ({"group_size": 32} if strategy == "group" else {}), {
        "weight_scale": scale,
        "weight_zero_point": zero,
    }


def floats(bits: int, strategy: str, scale: Tensor, **more: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    weights = {"num_bits": bits, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False, **more}
    return weights, {"weight_scale": scale}


POWERS = torch.full((40, 2), 2.0**-6)
LIBRARY = {
    **{
        f"{form} {bits} {strategy} {symmetric}": (form, *integers(bits, strategy, symmetric))
        for form, widths in (("pack-quantized", (3, 4, 8)), ("int-quantized", (8,)), ("naive-quantized", (8,)))
        for bits in widths
        for strategy in ("tensor", "channel", "group")
        for symmetric in (True, False)
        if symmetric or strategy == "group"
    },
    "float, tensor": ("float-quantized", *floats(8, "tensor", torch.tensor([0.002]))),
    "float, channel": ("float-quantized", *floats(8, "channel", torch.linspace(1e-3, 2e-3, 40)[:, None])),
    "float, group": ("float-quantized", *floats(8, "group", torch.full((40, 2), 0.002), group_size=32)),
    "float, block": ("float-quantized", *floats(8, "block", torch.full((1, 1), 0.002), block_structure=[128, 128])),
    "naive float": ("naive-quantized", *floats(8, "channel", torch.linspace(1e-3, 2e-3, 40)[:, None])),
    "mxfp4": ("mxfp4-pack-quantized", *floats(4, "group", POWERS * 4, group_size=32, scale_dtype="torch.uint8")),
    "mxfp6": ("mxfp6-pack-quantized", *floats(6, "group", POWERS * 4, group_size=32, scale_dtype="torch.uint8")),
    "mxfp8": ("mxfp8-quantized", *floats(8, "group", POWERS / 8, group_size=32, scale_dtype="torch.uint8")),
}  # fmt: skip


@pytest.mark.parametrize("case", LIBRARY)
def test_decodes_as_compressed_tensors_does_it(tmp_path: Path, case: str) -> None:
    form, weights, scales = LIBRARY[case]
    tensors, theirs, settings = compressed(weights, form, **scales)
    dense = opened(tmp_path, Encoded(tensors, theirs), settings).dense("m.weight")
    torch.testing.assert_close(
        dense.to(theirs.dtype), theirs, rtol=1e-7 if theirs.dtype == torch.float32 else 0, atol=0
    )


def test_columns_in_another_order(tmp_path: Path) -> None:
    weights, scales = integers(4, "group", False)
    tensors, plain, settings = compressed(weights, "pack-quantized", **scales)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)) % 2
    dense = opened(tmp_path, Encoded({**tensors, ".weight_g_idx": order.int()}, plain), settings).dense("m.weight")
    codes = plain / scales["weight_scale"].repeat_interleave(32, 1)
    torch.testing.assert_close(dense, codes * scales["weight_scale"][:, order], rtol=1e-6, atol=0)
