"""Read the description of compressed parameters from a checkpoint's metadata, config.json or tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aicompress.checkpoint.compressed_tensors.entries import CT_SUFFIXES, ct_entries, rounded
from aicompress.checkpoint.foreign.decompressed import DECOMPRESSED
from aicompress.checkpoint.foreign.layout import ForeignTensors, ForeignWeight
from aicompress.checkpoint.foreign.reading import ForeignWeights
from aicompress.checkpoint.foreign.recognize import (
    CACHE_SCALE,
    RIDER,
    foreign_weights,
    methods,
    require_nothing_beside,
    require_settings_read,
    require_understood,
    settings_of,
)
from aicompress.checkpoint.header import TensorRef
from aicompress.checkpoint.json_text import read_json
from aicompress.checkpoint.manifest import KEY, Manifest
from aicompress.checkpoint.source import OTHER_SETTINGS, Source
from aicompress.errors import CheckpointError, Unsupported
from aicompress.weights import TensorSpec

CT = "compressed-tensors"
_FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
_SCALES = re.compile(r"scale|absmax|SCB|quant_map")


@dataclass(frozen=True)
class Description:
    """What a checkpoint holds beside plain tensors.

    Attributes:
        manifest: compressed parameters in forms of this package, with the lineage.
        layout: how their tensors are named: plain, native or compressed-tensors.
        foreign: weights in layouts of other tools, by parameter; they are not in the manifest.
        riders: tensors of a quantized checkpoint that belong to rounded inputs and outputs of its layers.
        cache_scales: tensors of the same that belong to the key-value cache.
        rounds_inputs: layers round their inputs in a way that no form of this package holds.
    """

    manifest: Manifest
    layout: str
    foreign: Mapping[str, ForeignWeight] = field(default_factory=dict)
    riders: tuple[str, ...] = ()
    cache_scales: tuple[str, ...] = ()
    rounds_inputs: bool = False

    def weights(self, tensors: Mapping[str, TensorRef], path: Path) -> ForeignWeights:
        """The foreign weights with their places on disk."""
        names = {name for weight in self.foreign.values() for name in weight.names.values()} | set(self.riders)
        refs = {name: tensors[name] for name in names}
        return ForeignWeights(self.foreign, refs, self.riders, self.cache_scales, self.rounds_inputs, path=path)


def description(
    source: Source, specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> Description:
    """Describe a checkpoint from its headers and JSON.

    Raises:
        CheckpointError: malformed, or quantized in a way that this version does not read.
    """
    manifest = Manifest.from_text(metadata[KEY], str(source.path)) if KEY in metadata else Manifest()
    beside = source.folder / "aicompress.json" if source.folder is not None else None
    if beside is not None and beside.is_file():
        manifest = Manifest(manifest.entries, Manifest.from_json(read_json(beside), str(beside)).lineage)
    quantization = (source.config or {}).get("quantization_config")
    if quantization and not isinstance(quantization, dict):
        raise CheckpointError(
            f"{source.path}: quantization_config of its config.json is not a mapping", "download or copy it again"
        )
    if quantization and quantization.get("quant_method") == KEY:
        native = Manifest.from_json(quantization, str(source.path))
        return Description(Manifest(native.entries, manifest.lineage, native.widths), "native")
    if manifest.entries:
        return Description(manifest, "native")
    if KEY not in metadata:
        _require_whole(source)
    return _foreign(source, specs, read, manifest)


def _require_whole(source: Source) -> None:
    """Refuse a weight file whose codes the config.json beside it describes.

    Raises:
        CheckpointError: it was named without its directory.
    """
    beside = source.path.parent / "config.json"
    if source.folder is not None or not beside.is_file():
        return
    quantization = read_json(beside).get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") in (KEY, CT):
        raise CheckpointError(
            f"{source.path} holds compressed weights, and {beside} says how to read them",
            f"give the directory {source.path.parent}",
        )


def _foreign(
    source: Source, specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor], manifest: Manifest
) -> Description:
    """What another tool wrote, or compressed-tensors, which this one writes too."""
    if specs and all(name.startswith("base_model.model.") or "lora_" in name for name in specs):
        hint = f"give its base model as IN, and --adapter {source.path.parent}"
        raise CheckpointError(f"{source.path} holds an adapter, no checkpoint", hint)
    settings, method = _settings(source)
    if method is not None and method not in methods():
        hint = f"start from the original checkpoint; read are {', '.join(methods())}"
        raise Unsupported(f"{source.path} is already quantized by {method!r}, which is not read", hint)
    require_settings_read(settings, str(source.path))
    dtype = _dtype_of(source.config or {}, specs)
    stored = ForeignTensors(specs, read, settings, source.config, dtype)
    weights = foreign_weights(stored, method, str(source.path))
    known = {name for weight in weights.values() for name in weight.names.values()}
    if method == CT:
        rest = {name: spec for name, spec in specs.items() if name not in known}
        manifest = Manifest(ct_entries(settings, rest, read, dtype), manifest.lineage)
        modules = [parameter.removesuffix(".weight") for parameter in manifest.entries]
        known |= {f"{module}.{suffix}" for module in modules for suffix in CT_SUFFIXES}
    require_nothing_beside(specs, {*weights, *manifest.entries}, known, str(source.path))
    require_understood(specs, known, method is not None, str(source.path))
    beside = [name for name in specs if name not in known and RIDER.search(name)] if weights or method else []
    cache_scales = tuple(name for name in beside if CACHE_SCALE.search(name))
    riders = tuple(name for name in beside if name not in cache_scales)
    layout = CT if method == CT else "plain"
    return Description(manifest, layout, weights, riders, cache_scales, _rounds_inputs(settings))


def _rounds_inputs(settings: Mapping[str, Any]) -> bool:
    """Whether settings say that layers round their inputs in a way that no form holds."""
    groups = settings.get("config_groups")
    known = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    activations = [each for group in known if isinstance(each := group.get("input_activations"), dict)]
    plain = settings.get("quantization_status") == DECOMPRESSED and bool(activations)  # weights that are no codes
    return plain or "activation_scheme" in settings or not all(rounded(each) for each in activations)


def _settings(source: Source) -> tuple[dict[str, Any], str | None]:
    """How another tool quantized, and its name for it; None where nothing says one."""
    settings = settings_of(source.config, None)
    if settings and "quant_method" not in settings:
        message = f"{source.path}: quantization_config of its config.json names no quant_method"
        raise CheckpointError(message, "download or copy it again")
    if settings:
        return settings, str(settings["quant_method"])
    for name, method in OTHER_SETTINGS.items():
        path = source.folder / name if source.folder is not None else None
        if path is not None and path.is_file():
            settings = settings_of(None, read_json(path))
            return settings, str(settings.get("quant_method", method))
    return {}, None


def _dtype_of(config: dict[str, Any], specs: Mapping[str, TensorSpec]) -> torch.dtype:
    """What compressed weights decode to: config.json's dtype, or else that of most plain floating tensors."""
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, dict) else {}):
        named = str(part.get("dtype") or part.get("torch_dtype")).removeprefix("torch.")
        if named in _FLOATS:
            return _FLOATS[named]
    plain = Counter(
        spec.dtype for name, spec in specs.items() if spec.dtype in _FLOATS.values() and not _SCALES.search(name)
    )
    return plain.most_common(1)[0][0] if plain else torch.float32
