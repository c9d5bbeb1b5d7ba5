"""Layers with a stored weight, and the quantizer that builds them for transformers.

This file and `decoding_aicompress.py` need torch, safetensors and transformers only. Copies lie in every checkpoint of
the native layout, so that `from_pretrained(path, trust_remote_code=True)` works without the aicompress package; with
the package, `import aicompress.hf` does the same without trust_remote_code.

A compressed layer keeps its class's behaviour: its class becomes a subclass that holds the stored tensors under their
names on disk (`weight`, `weight_scale`, ...) and decodes them where the layer reads `weight`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .decoding_aicompress import cast, decode, factors, outlines, reshape, rounded_input

METHOD = "aicompress"
FORMAT_VERSION = 1
PREFIX = "AIC"  # AICLlamaForCausalLM is transformers' LlamaForCausalLM, loaded through this file


class Stored(nn.Module):
    """Mixed into a layer's class: the layer's weight is kept in a stored form.

    The stored tensors are parameters named `weight`, `weight_<suffix>`; codes and masks need no gradient. Once they are
    loaded, reading `weight` gives the dense parameter.
    """

    entry: dict[str, Any]
    ready: bool

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.__dict__.get("ready"):
            matrix = self.matrices()[0] if self.entry["meta"]["form"] != "low_rank" else torch.matmul(*self.matrices())
            return matrix.t() if self.entry.get("transposed") else matrix.reshape(self.entry["shape"])
        return super().__getattr__(name)

    @property
    def stored(self) -> dict[str, Tensor]:
        """Stored tensors by suffix; a tied layer has those of its source."""
        holder = self.__dict__.get("source", self)
        return {s: holder._parameters[f"weight_{s}" if s else "weight"] for s in self.entry["tensors"]}

    def matrices(self) -> tuple[Tensor, ...]:
        """The decoded matrix, or the two factors; kept for the next call unless gradients are wanted."""
        tensors, meta = self.stored, self.entry["meta"]
        keep = not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors.values())
        if keep:
            key = (
                torch.is_inference_mode_enabled(),
                *((t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype) for t in tensors.values()),
            )
            known: tuple[Any, tuple[Tensor, ...]] = self.__dict__.get("decoded", (None, ()))
            if known[0] == key:
                return known[1]
        found = factors(meta, tensors) if meta["form"] == "low_rank" else (decode(meta, tensors),)
        if keep:
            self.__dict__["decoded"] = (key, found)
        return found


class StoredLinear(Stored):
    """Linear, and GPT-2's Conv1D: a low-rank weight is two products, the right factor first."""

    def forward(self, x: Tensor) -> Tensor:
        meta, matrices = self.entry["meta"], self.matrices()
        if meta["form"] == "low_rank":
            x = F.linear(rounded_input(x, meta["in"].get("activation_bits")), matrices[1])
            meta = meta["out"]
        return F.linear(rounded_input(x, meta.get("activation_bits")), matrices[0], self.bias)


class StoredEmbedding(Stored):
    """Embedding: rows of the left factor, times the right one."""

    def forward(self, ids: Tensor) -> Tensor:
        if self.entry["meta"]["form"] != "low_rank" or self.max_norm is not None:
            looked_up: Tensor = super().forward(ids)
            return looked_up
        left, right = self.matrices()
        return F.embedding(ids, left, self.padding_idx, None, self.norm_type, self.scale_grad_by_freq, False) @ right


class StoredConv(Stored):
    """Convolution: a low-rank weight is a k×k convolution to `rank` channels, then a 1×1 convolution."""

    def forward(self, x: Tensor) -> Tensor:
        if self.entry["meta"]["form"] != "low_rank" or self.groups != 1:
            convolved: Tensor = super().forward(x)
            return convolved
        left, right = self.matrices()
        kernel = self.entry["shape"][1:]
        ones = (1,) * (len(kernel) - 1)
        narrow = self._conv_forward(x, right.reshape(-1, *kernel), None)
        return (F.conv1d, F.conv2d, F.conv3d)[len(ones) - 1](narrow, left.reshape(*left.shape, *ones), self.bias)


_RUNNING: dict[Any, type[Stored]] = {
    nn.Linear.forward: StoredLinear,
    Conv1D.forward: StoredLinear,
    nn.Embedding.forward: StoredEmbedding,
    nn.Conv1d.forward: StoredConv,
    nn.Conv2d.forward: StoredConv,
    nn.Conv3d.forward: StoredConv,
}


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def stored_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a layer's class with a stored weight; a forward of its own reads the decoded `weight`."""
    if kind not in _CLASSES:
        _CLASSES[kind] = type(f"Stored{kind.__name__}", (_RUNNING.get(kind.forward, Stored), kind), {})
    return _CLASSES[kind]


def attach(module: nn.Module, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Turn a layer into one with a stored weight, in place.

    Args:
        module: has a parameter `weight`.
        entry: the parameter's entry in the manifest.
        tensors: stored tensors by suffix, on any device, the meta device too.
    """
    del module._parameters["weight"]
    for suffix, tensor in tensors.items():
        trains = tensor.is_floating_point()
        module._parameters[f"weight_{suffix}" if suffix else "weight"] = nn.Parameter(tensor, requires_grad=trains)
    module.__class__ = stored_class(type(module))
    module.__dict__["entry"] = {**entry, "tensors": list(tensors)}
    module.__dict__["ready"] = False
    module.__dict__["_is_hf_initialized"] = True  # code that initializes a layer takes its weight for a matrix


def attach_tied(module: nn.Module, source: nn.Module) -> None:
    """Let a layer decode the stored weight of another, in place."""
    del module._parameters["weight"]
    module.__class__ = stored_class(type(module))
    module.__dict__.update(entry=source.entry, source=source, ready=False, _is_hf_initialized=True)


def stored_modules(model: nn.Module) -> Iterable[tuple[str, Stored]]:
    """Layers with a stored weight, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Stored))


def mark_ready(model: nn.Module) -> None:
    """Say that the stored tensors are loaded."""
    for _, module in stored_modules(model):
        module.__dict__["ready"] = True


def parameter_names(model: Any, names: Iterable[str]) -> dict[str, tuple[str, Any]]:
    """Where transformers puts a checkpoint's parameters: its renamings, and a base model's prefix, applied.

    Returns:
        By name in the checkpoint: the name in the model, and the conversion that merges it with others, or None.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    merging = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, tuple[str, Any]] = {}
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known:
            renamed, pattern = rename_source_key(name, [], [], prefix, known)
        found[name] = (renamed, (pattern, merging[pattern]) if pattern else None)
    return found


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
            part._tied_weights_keys = {key: value for key, value in keys.items() if not re.fullmatch(full[key], target)}


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


class AicompressConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """config.json's quantization_config: an entry per compressed parameter."""

    def __init__(
        self, format_version: int = FORMAT_VERSION, entries: dict[str, Any] | None = None, **rest: Any
    ) -> None:
        if format_version > FORMAT_VERSION:
            raise ValueError("this checkpoint was written by a newer aicompress: upgrade aicompress")
        self.quant_method = METHOD
        self.format_version = format_version
        self.entries = entries or {}
        self.lineage = rest.get("lineage", [])
        self.widths = rest.get("widths", {})


class AicompressQuantizer(HfQuantizer):  # type: ignore[misc]
    """Turns layers into stored ones before transformers loads the tensors by name."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        held = outlines(kwargs.get("checkpoint_files") or ())
        entries, known = self.quantization_config.entries, set(model.state_dict())
        shapes = {name: tuple(t.shape) for name, t in held.items()} | {n: e["shape"] for n, e in entries.items()}
        fit_shapes(model, self.quantization_config.widths, shapes)
        for name, (target, merge) in parameter_names(model, entries).items():
            parent, _, leaf = target.rpartition(".")
            if merge or (leaf != "weight" and target in known):
                raise ValueError(
                    f"{name} cannot run compressed in {type(model).__name__}: load it with aicompress.load"
                )
            if target not in known:
                continue  # of a head that this model class does not have
            module, entry = model.get_submodule(parent), entries[name]
            dtype = module._parameters["weight"].dtype
            names = {suffix: f"{name}_{suffix}" if suffix else name for suffix in entry["tensors"]}
            lacking = [disk for disk in names.values() if disk not in held]
            if lacking:
                raise ValueError(f"the checkpoint lacks {lacking[0]!r}: it is incomplete")
            attach(module, entry, {suffix: cast(held[disk], dtype) for suffix, disk in names.items()})
        tie(model, [target for target, _ in parameter_names(model, held).values()])
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
