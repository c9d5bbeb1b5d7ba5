"""The quantizer that builds layers with a stored weight for transformers.

This file, `layers_aicompress.py` and `decoding_aicompress.py` need torch, safetensors and transformers only. Copies lie
in every checkpoint of the native layout, so that `from_pretrained(path, trust_remote_code=True)` works without the
aicompress package; with the package, `import aicompress.hf` does the same without trust_remote_code.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .layers_aicompress import Stored, attach, attach_tied, borrow, mark_ready, reshape

METHOD = "aicompress"
FORMAT_VERSION = 2
INSTEAD = ": load it with aicompress.load"  # how errors about a checkpoint that is sound end
PREFIX = "AIC"  # AICLlamaForCausalLM is transformers' LlamaForCausalLM, loaded through this file


def arrivals(model: Any, names: Iterable[str], quantizer: Any = None) -> dict[str, tuple[str, Any]]:
    """Where transformers puts a checkpoint's tensors: its renamings, and a base model's prefix, applied.

    Args:
        names: of tensors in the checkpoint.
        quantizer: adds conversions of its own.

    Returns:
        By name in the checkpoint: the name in the model, and the conversion that merges it with others, or None.
    """
    conversions = get_model_conversion_mapping(model, None, quantizer)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    merging = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    places: dict[str, tuple[str, Any]] = {}
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = rename_source_key(name, [], [], prefix, known)
        places[name] = (renamed, (pattern, merging[pattern]) if pattern else None)
    return places


def parameter_names(model: Any, names: Iterable[str]) -> dict[str, tuple[str, Any]]:
    """Where a checkpoint's parameters belong: as `arrivals`, and one that is lost so keeps its own name."""
    known, prefix = model.state_dict(), model.base_model_prefix
    places = arrivals(model, names)
    for name in [name for name, (target, _) in places.items() if target not in known]:
        places[name] = (rename_source_key(name, [], [], prefix, known)[0], None)
    return places


def tie(model: Any, held: Collection[str]) -> None:
    """Tied parameters of a transformers model, where one of a pair is stored: let the other decode it.

    Args:
        held: parameters of the model that the checkpoint holds; where it holds both of a pair, they stay apart.
    """
    for target, source in list(model.all_tied_weights_keys.items()):
        names = (target, source)
        ends = [model.get_submodule(name.rpartition(".")[0]) for name in names]
        stored = [isinstance(end, Stored) and name.endswith(".weight") for end, name in zip(ends, names, strict=True)]
        if not any(stored):
            continue
        if target not in held or source not in held:
            attach_tied(ends[stored.index(False)], ends[stored.index(True)])
        del model.all_tied_weights_keys[target]
        forget_tie(model, target)


def forget_tie(model: Any, target: str) -> None:
    """Keep a later `tie_weights` from overwriting a tied stored layer."""
    for name, part in model.named_modules():
        keys = getattr(part, "_tied_weights_keys", None)
        if isinstance(keys, dict):
            full = {key: f"{name}.{key}" if name else key for key in keys}
            left = {key: value for key, value in keys.items() if not re.fullmatch(full[key], target)}
            kind = type(part)
            if isinstance(getattr(kind, "_tied_weights_keys", None), property):  # worked out from the configuration
                part.__class__ = type(
                    kind.__name__, (kind,), {"__module__": kind.__module__, "_tied_weights_keys": left}
                )
            else:
                part._tied_weights_keys = left


def fit_shapes(model: Any, widths: Mapping[str, Mapping[str, int]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give layers the shapes of their parameters, and modules above them their numbers where config.json has others."""
    names = [f"{path}.{leaf}" for path in widths for leaf in ("weight", "bias") if f"{path}.{leaf}" in shapes]
    for name, (target, _) in parameter_names(model, names).items():
        if target not in model.state_dict():
            continue
        reshape(model.get_submodule(target.rpartition(".")[0]), target.rpartition(".")[2], tuple(shapes[name]))
        for path in widths:
            if name.startswith(f"{path}.") and widths[path]:
                above = model.get_submodule(target.rsplit(".", name.count(".") - path.count("."))[0])
                vars(above).update(widths[path])


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of real numbers in another dtype; codes and masks stay."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def outlines(files: Iterable[str]) -> dict[str, Tensor]:
    """Every tensor of safetensors files, on the meta device."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:  # tensors are mapped lazily: no data is read
            tensors.update({name: file.get_tensor(name).to("meta") for name in file.keys()})  # noqa: SIM118
    return tensors


class AicompressConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """config.json's quantization_config: an entry per compressed parameter."""

    def __init__(self, format_version: int = 1, entries: dict[str, Any] | None = None, **rest: Any) -> None:
        if format_version > FORMAT_VERSION:
            raise ValueError("this checkpoint was written by a newer aicompress: upgrade aicompress")
        self.quant_method = METHOD
        self.format_version = format_version
        self.entries = entries or {}
        self.lineage = rest.get("lineage", [])
        self.widths = rest.get("widths", {})


def store(model: Any, described: AicompressConfig, held: Mapping[str, Tensor]) -> None:
    """Turn a model's layers into stored ones, in place, before transformers loads the tensors by name.

    Args:
        model: on the meta device.
        described: the compressed parameters.
        held: every tensor of the checkpoint, on the meta device.

    Raises:
        ValueError: a stored tensor is not there, or would not arrive at its layer.
    """
    entries, known = described.entries, set(model.state_dict())
    shapes = {name: tuple(t.shape) for name, t in held.items()} | {n: e["shape"] for n, e in entries.items()}
    fit_shapes(model, described.widths, shapes)
    expected: dict[str, str] = {}  # tensor of the checkpoint -> of the model
    owned: dict[str, tuple[Any, str]] = {}  # tensor of the checkpoint -> the layer that holds it, and its suffix
    borrowing: list[tuple[Any, dict[str, str]]] = []
    for name, (target, merge) in parameter_names(model, entries).items():
        parent, _, leaf = target.rpartition(".")
        if merge or (leaf != "weight" and target in known):
            raise ValueError(f"{name} cannot run compressed in {type(model).__name__}{INSTEAD}")
        if target not in known:
            continue  # of a head that this model class does not have
        module, entry = model.get_submodule(parent), entries[name]
        dtype, shared = module._parameters["weight"].dtype, entry.get("shared", {})
        names = {s: f"{name}_{s}" if s else name for s in entry["tensors"] if s not in shared}
        lacking = [disk for disk in (*names.values(), *shared.values()) if disk not in held]
        if lacking:
            raise ValueError(f"the checkpoint lacks {lacking[0]!r}: it is incomplete")
        attach(module, entry, {suffix: cast(held[disk], dtype) for suffix, disk in names.items()})
        expected |= {disk: f"{target}_{suffix}" if suffix else target for suffix, disk in names.items()}
        owned |= {disk: (module, suffix) for suffix, disk in names.items()}
        borrowing += [(module, shared)] if shared else []
    share(model, borrowing, owned)
    tie(model, [target for target, _ in parameter_names(model, held).values()])
    for disk, place in arrivals(model, expected).items():
        if place != (expected[disk], None):
            raise ValueError(f"{type(model).__name__} has no place for {disk}, which becomes {place[0]}{INSTEAD}")


def share(model: Any, borrowing: Iterable[tuple[Any, Mapping[str, str]]], owned: Mapping[str, tuple[Any, str]]) -> None:
    """Let stored layers read the tensors that others hold.

    Args:
        model: the model.
        borrowing: each such layer with the names in the checkpoint, by suffix.
        owned: where the stored layers hold tensors, by name in the checkpoint; others are plain parameters.

    Raises:
        ValueError: a tensor would not arrive at a parameter of its own.
    """
    for module, shared in borrowing:
        plain = parameter_names(model, [disk for disk in shared.values() if disk not in owned])
        places = dict(owned)
        for disk, (target, merge) in plain.items():
            if merge or target not in model.state_dict():
                raise ValueError(f"{type(model).__name__} has no place for {disk}, which layers share{INSTEAD}")
            parent, _, leaf = target.rpartition(".")
            places[disk] = (model.get_submodule(parent), leaf)
        borrow(module, {suffix: places[disk] for suffix, disk in shared.items()})


class AicompressQuantizer(HfQuantizer):  # type: ignore[misc]
    """Turns layers into stored ones before transformers loads the tensors by name."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        store(model, self.quantization_config, outlines(kwargs.get("checkpoint_files") or ()))
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        mark_ready(model)
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
    auto.register_quantization_config(METHOD)(AicompressConfig)
    auto.register_quantizer(METHOD)(AicompressQuantizer)


def __getattr__(name: str) -> Any:
    """`AIC<Architecture>`: a subclass of any architecture of transformers, for auto_map to name."""
    architecture = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if architecture is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Code of one's own shares no names with transformers' architectures unless it says so: this is one of them.
    own = {"__module__": __name__, "is_custom_code": classmethod(lambda cls: False)}
    renamings = get_checkpoint_conversion_mapping(architecture.__name__)
    if renamings is not None:
        register_checkpoint_conversion_mapping(name, renamings, overwrite=True)
    return globals().setdefault(name, type(name, (architecture,), own))
