"""Read the description of compressed parameters from a checkpoint's metadata or config.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from aicompress.checkpoint.ct_entries import ct_entries
from aicompress.checkpoint.manifest import KEY, Manifest
from aicompress.checkpoint.source import Source, read_json
from aicompress.errors import CheckpointError, Unsupported
from aicompress.weights import TensorSpec

_FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def manifest_of(
    source: Source, specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> tuple[Manifest, str]:
    """Compressed parameters with the lineage, and how their tensors are named: plain, native or compressed-tensors.

    Raises:
        CheckpointError: malformed, or quantized in a way that this version does not read.
    """
    manifest = Manifest.from_text(metadata[KEY], str(source.path)) if KEY in metadata else Manifest()
    beside = source.folder / "aicompress.json" if source.folder is not None else None
    if beside is not None and beside.is_file():
        manifest = Manifest(manifest.entries, Manifest.from_json(read_json(beside), str(beside)).lineage)
    quantization = (source.config or {}).get("quantization_config")
    if not quantization:
        _refuse_scaled_float8(source, specs)
        return manifest, "native" if manifest.entries else "plain"
    if not isinstance(quantization, dict):
        raise CheckpointError(
            f"{source.path}: quantization_config of its config.json is not a mapping", "download or copy it again"
        )
    method = quantization.get("quant_method")
    if method == KEY:
        native = Manifest.from_json(quantization, str(source.path))
        return Manifest(native.entries, manifest.lineage, native.widths), "native"
    if method == "compressed-tensors":
        entries = ct_entries(quantization, specs, read, _dtype_of(source.config or {}, specs))
        return Manifest(entries, manifest.lineage), "compressed-tensors"
    raise Unsupported(f"{source.path} is already quantized by {method!r}", "start from the original checkpoint")


def _refuse_scaled_float8(source: Source, specs: Mapping[str, TensorSpec]) -> None:
    """A float8 weight with a scale beside it is not the weight's values; without one it is."""
    for name, spec in specs.items():
        scales = [f"{name}{suffix}" for suffix in ("_scale_inv", "_scale") if f"{name}{suffix}" in specs]
        if spec.dtype.itemsize == 1 and spec.dtype.is_floating_point and scales:
            raise Unsupported(
                f"{source.path} is already quantized: {name!r} is float8 and {scales[0]!r} scales it",
                "start from the original checkpoint",
            )


def _dtype_of(config: dict[str, Any], specs: Mapping[str, TensorSpec]) -> torch.dtype:
    """What compressed weights decode to: config.json's dtype, or else that of most plain floating tensors."""
    named = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    if named in _FLOATS:
        return _FLOATS[named]
    plain = Counter(s.dtype for n, s in specs.items() if s.dtype in _FLOATS.values() and not n.endswith("_scale"))
    return plain.most_common(1)[0][0] if plain else torch.float32
